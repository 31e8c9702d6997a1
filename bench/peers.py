"""What bench/speed.py measures beside this project: other projects' code paths, and floors.

Each function sets a contender up and returns what its turn calls: one unit of work, whose number
of tokens the call returns. SAELens, TransformerLens and SAE-Bench are dependencies of the project;
the other peers lie in bench/.peers (bench/peers.txt says how), or their import fails.
"""

from __future__ import annotations

import copy
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import experiment
from bench.common import run_on
from experiment import Settings
from harness.evaluation.core import core_config, core_store, prepare_for_sae_bench
from harness.evaluation.probing import probing_config
from harness.language_model import LanguageModel
from harness.text import TokenStream
from harness.tokenizer import special_token_ids

# Last, so that what the environment has comes first.
sys.path.append(str(Path(__file__).resolve().parent / ".peers"))

Call = Callable[[], float]


def hooks(settings: Settings) -> list[str]:
    """The layers of a run by TransformerLens' names."""
    return [f"blocks.{layer}.hook_resid_post" for layer in settings.layers]


# ---------------------------------------------------------------------- one train step


def saelens_step(
    settings: Settings, x_NBD: Tensor, autocast: bool, kind: str, **options: Any
) -> Call:
    """SAELens' SAETrainer as its `fit` drives it, with its defaults and without wandb."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    sae_class, config_class = get_sae_training_class(kind)
    device = str(x_NBD.device)
    shape = dict(d_in=x_NBD.shape[-1], d_sae=settings.d_sae, device=device)
    sae = sae_class(config_class(**shape, **options))
    config = SAETrainerConfig(10**9, settings.batch, lr_end=3e-5, device=device, autocast=autocast)
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def call() -> float:
        trainer.step(x_NBD[trainer.n_training_steps % len(x_NBD)])
        trainer.n_training_steps += 1
        return settings.batch

    return call


def dictionary_learning(*names: str) -> list[Any]:
    """Members of dictionary_learning's modules, by their paths below the package.

    Its import imports nnsight, which wraps math and einops for the whole process: undone here,
    since nothing that is measured needs it, and no other contender shall pay for it.
    """
    import importlib

    import nnsight

    nnsight.DEFAULT_PATCHER.__exit__(None, None, None)
    found = []
    for name in names:
        module, _, member = f"dictionary_learning.{name}".rpartition(".")
        found.append(getattr(importlib.import_module(module), member))
    return found


def dictionary_learning_step(
    settings: Settings, x_NBD: Tensor, autocast: bool, kind: str, **options: Any
) -> Call:
    """dictionary_learning's trainer.update under the autocast of its trainSAE."""
    (trainer_class,) = dictionary_learning(f"trainers.{kind}")
    device = x_NBD.device
    trainer = trainer_class(
        steps=10**6, activation_dim=x_NBD.shape[-1], dict_size=settings.d_sae, layer=0,
        lm_name="none", device=str(device), **options,
    )  # fmt: skip
    # Step 0 sets b_dec; the threshold of inference is kept up from step 1000 on.
    steps = itertools.chain([0], itertools.count(2000))

    def call() -> float:
        step = next(steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            trainer.update(step, x_NBD[step % len(x_NBD)])
        return settings.batch

    return call


def sparsify_step(settings: Settings, x_NBD: Tensor, autocast: bool) -> Call:
    """What sparsify's Trainer does with a batch, with its defaults, for one SparseCoder.

    Its forward asks for bfloat16 itself on a GPU that has it, and its `fit` for fast float32
    products; on a CPU this asks for bfloat16.
    """
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    d_sae, device = settings.d_sae, x_NBD.device
    config = SparseCoderConfig(num_latents=d_sae, k=settings.k_min)
    coder = SparseCoder(x_NBD.shape[-1], config, device, dtype=torch.float32)
    signs = SignSGD(coder.parameters(), lr=5e-3 / (d_sae / 2**14) ** 0.5)
    optimizer = ScheduleFreeWrapper(signs, momentum=0.95)
    optimizer.train()
    tokens_since_fired_F = torch.zeros(d_sae, dtype=torch.long, device=device)
    steps = itertools.count()

    def call() -> float:
        torch.set_float32_matmul_precision("high")
        x_BD = x_NBD[next(steps) % len(x_NBD)]
        coder.set_decoder_norm_to_unit_norm()
        variance = (x_BD - x_BD.mean(0)).pow(2).sum()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            out = coder(x=x_BD, y=x_BD, total_variance=variance)
        fired_F = torch.zeros(d_sae, dtype=torch.bool, device=device)
        fired_F[out.latent_indices.flatten()] = True
        float(out.fvu.detach())  # it is logged at every step
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        tokens_since_fired_F.add_(settings.batch)[fired_F] = 0
        torch.set_float32_matmul_precision("highest")
        return settings.batch

    return call


def five_products(settings: Settings, x_NBD: Tensor, autocast: bool) -> Call:
    """The floor: the matrix products of a dense step, two of its forward, three of its backward."""
    dtype = torch.bfloat16 if autocast else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=x_NBD.device).to(dtype)

    (n_tokens, width), d_sae = x_NBD[0].shape, settings.d_sae
    x_BD, grad_BD, f_BF = x_NBD[0].to(dtype), random(n_tokens, width), random(n_tokens, d_sae)
    W_enc, W_dec = random(width, d_sae), random(d_sae, width)

    def call() -> float:
        x_BD @ W_enc
        f_BF @ W_dec
        f_BF.T @ grad_BD
        grad_pre_BF = grad_BD @ W_dec.T
        x_BD.T @ grad_pre_BF
        return settings.batch

    return call


# ---------------------------------------------------------------------- harvest


@torch.no_grad()
def transformer_lens_harvest(
    model: Any, tokens_NL: Tensor, settings: Settings, together: bool
) -> Call:
    """run_with_cache that stops after the last layer wanted: one pass for all, or one for each."""
    names = [hooks(settings)] if together else [[name] for name in hooks(settings)]
    special = torch.tensor(sorted(special_token_ids(model.tokenizer)))

    @torch.no_grad()
    def call() -> float:
        cached = []
        for part_BL in tokens_NL.split(settings.harvest_contexts):
            keep_BL = ~torch.isin(part_BL, special)
            for some in names:
                last = max(int(name.split(".")[1]) for name in some)
                cache = model.run_with_cache(part_BL, names_filter=some, stop_at_layer=last + 1)[1]
                cached += [cache[name][keep_BL] for name in some]
        return sum(map(len, cached)) / len(settings.layers)

    return call


def saelens_harvest(model: Any, tokens_NL: Tensor, settings: Settings, together: bool) -> Call:
    """SAELens' ActivationsStore on tokens: one store for all layers, or one for each."""
    import datasets
    from sae_lens.training.activations_store import ActivationsStore

    rows = datasets.Dataset.from_dict({"input_ids": tokens_NL.tolist()})
    names = [hooks(settings)] if together else [[name] for name in hooks(settings)]
    stores = [
        ActivationsStore.from_config_multi_hook(
            model, dataset=rows, hook_names=some, total_training_tokens=1, streaming=False,
            hook_d_ins=dict.fromkeys(some, model.cfg.d_model), context_size=settings.context,
            store_batch_size_prompts=settings.harvest_contexts,
            exclude_special_tokens=torch.tensor(sorted(special_token_ids(model.tokenizer))),
        )
        for some in names
    ]  # fmt: skip

    def call() -> float:
        cached = 0
        for store in stores:
            for _ in range(len(tokens_NL) // settings.harvest_contexts):
                batch = store._get_filtered_multi_hook_llm_batch()  # what its loader calls
                cached += sum(map(len, batch.values()))
        return cached / len(settings.layers)

    return call


def traced_model(lm: LanguageModel) -> Any:
    """The model in nnsight's form: a copy, since nnsight leaves hooks in it."""
    from nnsight import LanguageModel

    return LanguageModel(copy.deepcopy(lm.hf), tokenizer=lm.tokenizer)


def dictionary_learning_buffer(
    traced: Any, layer: int, texts: list[str], n_contexts: int, batch: int, settings: Settings
) -> Any:
    """dictionary_learning's ActivationBuffer of one layer: it cuts texts off after a context."""
    (buffer_class,) = dictionary_learning("buffer.ActivationBuffer")
    return buffer_class(
        itertools.cycle(texts), traced, traced.model.layers[layer], ctx_len=settings.context,
        d_submodule=traced.config.hidden_size, n_ctxs=n_contexts, device=str(traced.device),
        refresh_batch_size=settings.harvest_contexts, out_batch_size=batch, remove_bos=True,
    )  # fmt: skip


def dictionary_learning_harvest(
    lm: LanguageModel, tokens_NL: Tensor, settings: Settings
) -> Call:
    """Its ActivationBuffer, once per layer. It takes text, which nnsight tokenizes again."""
    dictionary_learning()
    traced = traced_model(lm)
    texts = lm.tokenizer.batch_decode(tokens_NL[:, 1:])
    n_contexts = len(tokens_NL) - settings.harvest_contexts  # all of a context but BOS fills it

    def call() -> float:
        for layer in settings.layers:
            buffer = dictionary_learning_buffer(traced, layer, texts, n_contexts, 1, settings)
            buffer.refresh()
        return len(buffer.activations)

    return call


@torch.no_grad()
def pass_products(lm: LanguageModel, tokens_NL: Tensor, settings: Settings) -> Call:
    """The floor: the matrix products of the passes up to the last layer, on random numbers."""
    config, per_pass = lm.hf.config, settings.harvest_contexts
    blocks = lm.hf.model.layers[: max(settings.layers) + 1]
    matrices = [weight for block in blocks for weight in block.parameters() if weight.dim() == 2]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=lm.hf.device).to(lm.hf.dtype)

    widths = {weight.shape[1] for weight in matrices}
    x = {width: random(per_pass * settings.context, width) for width in widths}
    heads = per_pass * config.num_attention_heads
    queries = random(heads, settings.context, config.head_dim)
    scores = random(heads, settings.context, settings.context)

    @torch.no_grad()
    def call() -> float:
        for _ in range(len(tokens_NL) // per_pass):
            for weight in matrices:
                x[weight.shape[1]] @ weight.T
            for _ in blocks:
                queries @ queries.transpose(1, 2)
                scores @ queries
        return tokens_NL[:, 1:].numel()

    return call


# ---------------------------------------------------------------------- training


def saelens_training(
    model: Any, column: dict[str, list], settings: Settings, kind: str, prefetch: bool = False,
    **options: Any,
) -> Call:  # fmt: skip
    """SAELens' MultiSAETrainingRunner without evaluations, logs or saves.

    Args:
        model: a HookedTransformer; in bfloat16, SAEs train under autocast.
        column: "text", or "input_ids": contexts of tokens.
        prefetch: a thread of its own runs the language model.
    """
    import datasets
    from sae_lens import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
    from sae_lens.config import LoggingConfig
    from sae_lens.registry import get_sae_training_class

    names = hooks(settings)
    config_class = get_sae_training_class(kind)[1]
    shape = dict(d_in=model.cfg.d_model, d_sae=settings.d_sae)
    rows = datasets.Dataset.from_dict(column)

    def call() -> float:
        config = MultiSAETrainingRunnerConfig(
            saes={name: config_class(**shape, **options) for name in names},
            hook_names={name: name for name in names}, streaming=False,
            context_size=settings.context, training_tokens=settings.training_tokens,
            store_batch_size_prompts=settings.harvest_contexts, prefetch_llm_batches=prefetch,
            train_batch_size_tokens=settings.batch, lr=settings.lr, exclude_special_tokens=True,
            autocast=model.cfg.dtype == torch.bfloat16,
            logger=LoggingConfig(log_to_wandb=False), checkpoint_path=None, output_path=None,
        )  # fmt: skip
        MultiSAETrainingRunner(config, override_dataset=rows, override_model=model).run()
        return settings.training_tokens

    return call


def dictionary_learning_training(
    lm: LanguageModel, texts: list[str], settings: Settings, kind: str, shared: bool,
    **options: Any,
) -> Call:  # fmt: skip
    """dictionary_learning's trainSAE, once per layer; on a CPU it has no autocast: float32.

    Args:
        shared: all layers learn from one harvest by this project, which counts in the time;
            otherwise each from dictionary_learning's own ActivationBuffer, of four batches.
    """
    trainer, train = dictionary_learning(f"trainers.{kind}", "training.trainSAE")
    n_steps, batch = settings.training_tokens // settings.batch, settings.batch
    traced = None if shared else traced_model(lm)
    device = str(lm.hf.device)

    def harvested() -> Tensor:
        with TokenStream(lambda: iter(texts), lm.tokenizer, settings.context) as stream:
            return experiment.ActivationBuffer(run_on(lm, settings), stream).next_tokens(
                n_steps * batch
            )

    def shuffled(acts_ND: Tensor) -> Iterator[Tensor]:
        parts = torch.randperm(len(acts_ND)).split(batch)
        return (acts_ND[part] for part in itertools.chain(parts, parts[:1]))  # it reads one more

    def call() -> float:
        acts_LND = harvested() if shared else [None] * len(settings.layers)
        for layer, acts_ND in zip(settings.layers, acts_LND):
            n_contexts = 4 * batch // settings.context
            data = shuffled(acts_ND) if shared else dictionary_learning_buffer(
                traced, layer, texts, n_contexts, batch, settings
            )  # fmt: skip
            config = dict(
                trainer=trainer, steps=n_steps, device=device, layer=layer,
                activation_dim=lm.hf.config.hidden_size, dict_size=settings.d_sae,
                lm_name=settings.model, warmup_steps=n_steps // 10, **options,
            )  # fmt: skip
            train(data, [config], n_steps, device=device)
        return settings.training_tokens

    return call


# ---------------------------------------------------------------------- evaluation


def stock_evaluation(
    saes: dict[str, Any], model: Any, settings: Settings, device: torch.device, again: bool = False
) -> dict[str, dict[str, float]]:
    """Stock SAE-Bench, called once per SAE: by SAE, the figures that this project reports too.

    Args:
        again: probes each SAE a second time. Stock draws an SAE's probes after the language
            model's own, from the same generator; the second call finds the latter stored, and its
            figures of the SAE are those that this project reports.
    """
    from sae_bench.evals.core import main as core
    from sae_bench.evals.sparse_probing import main as probing

    figures = {}
    ignored = special_token_ids(model.tokenizer)
    load = torch.load
    torch.load = lambda path: load(path, weights_only=False)  # SAE-Bench's own, just written
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, sae in saes.items():
                ready = prepare_for_sae_bench(sae, settings)
                store = core_store(settings, model, ready)
                config = core_config(settings)
                scalars, _ = core.run_evals(ready, store, model, config, ignore_tokens=ignored)
                figures[name] = {m: v for group in scalars.values() for m, v in group.items()}
                artifacts = f"{folder}/{ready.cfg.hook_layer}"  # run_eval has one per layer, too
                config = probing_config(settings)
                for _ in range(1 + again):
                    found, _ = probing.run_eval_single_sae(
                        config, ready, model, str(device), artifacts, True
                    )
                figures[name] |= {m: v for m, v in found.items() if m.startswith("sae_top")}
    finally:
        torch.load = load
    return figures
