"""SAE-Bench's core evaluation of several SAEs, each pass of the language model made once."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import ExperimentError, error_context
from harness.fingerprint import forward_key, text_identity
from harness.interfaces import SAELike, SettingsLike
from harness.machine import retain_freed_memory, run_cooperatively, yield_turn
from harness.store import ACTIVATIONS_GB, TensorCache, write_json
from harness.text import documents, load_dataset, special_token_ids, text_errors, text_rows


def core_config(settings: SettingsLike) -> Any:
    """SAE-Bench's CoreEvalConfig of a run, everything switched on."""
    from sae_bench.evals.core.eval_config import CoreEvalConfig

    return CoreEvalConfig(
        model_name=settings.model,
        llm_dtype=settings.lm_dtype,
        batch_size_prompts=settings.core_prompts,
        n_eval_reconstruction_batches=settings.core_reconstruction_batches,
        n_eval_sparsity_variance_batches=settings.core_sparsity_batches,
        dataset=settings.core_text,
        context_size=settings.context,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        # Without both of these SAE-Bench 0.6.0 fails in its own validation of the result.
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        # BOS is not trained on, so it must not be replaced by its reconstruction.
        exclude_special_tokens_from_reconstruction=True,
    )


def core_store(settings: SettingsLike, model: Any, sae: Any) -> Any:
    """SAELens' store of the evaluation text, as SAE-Bench's multiple_evals makes it."""
    from sae_lens.training.activations_store import ActivationsStore

    store = ActivationsStore.from_sae(
        model,
        sae,
        context_size=settings.context,
        dataset=core_text(settings),
    )
    store.shuffle_input_dataset(seed=42)
    return store


def core_text(settings: SettingsLike) -> Any:
    """The text of the core evaluation in a form that SAELens takes."""
    name = settings.core_text
    if name == "tinylm":
        return heldout_passages()
    with text_errors(name):
        return EvaluationText(name, load_dataset(name, split="train", streaming=True))


class EvaluationText:
    """A streamed data set for SAELens' store; what is wrong with it is an ExperimentError."""

    def __init__(self, name: str, stream: Any) -> None:
        self.name, self.stream = name, stream

    def __iter__(self) -> Iterator[dict]:
        with text_errors(self.name):
            yield from text_rows(self.name, self.stream)

    def shuffle(self, seed: int) -> EvaluationText:
        """The order of files alone, as SAELens' store shuffles a stream."""
        return EvaluationText(self.name, self.stream.shuffle(seed=seed, buffer_size=1))


@functools.cache
def heldout_passages() -> Any:
    """tinylm's held-out text as a data set, read once: each SAE is evaluated on it."""
    import datasets

    return datasets.Dataset.from_dict({"text": list(documents("tinylm", "heldout")())})


def prepare_for_sae_bench(sae: SAELike, settings: SettingsLike) -> SAELike:
    """A copy of a folded SAE, prepared for SAE-Bench, which casts and marks what it is given."""
    from sae_bench.sae_bench_utils import general_utils

    dtype = general_utils.str_to_dtype(settings.lm_dtype)
    sae = copy.deepcopy(sae).to(device=sae.W_enc.device, dtype=dtype)
    sae.cfg.dtype = settings.lm_dtype
    return general_utils.load_and_format_sae("", sae, str(sae.W_enc.device))[1]


class SharedPasses:
    """The batches, and the language model's passes, of core evaluations that run side by side.

    SAE-Bench's `run_evals` asks a store for batches and a model for passes over them, and makes
    every pass anew for each SAE. Here SAEs advance together, and a batch costs one pass of the
    unchanged model for all of them, one from each ablated layer on, and for each SAE one from its
    own layer on. The tensors are the stock ones bit for bit. Only one batch is held.

    Args:
        model: a HookedTransformer. store: SAELens' ActivationsStore of the evaluation text.
        layers: those of the SAEs.
        advance: called with 1 after each batch.
        kept: where the unchanged and the ablated model's passes are kept.
    """

    def __init__(
        self,
        model: Any,
        store: Any,
        layers: Iterable[int],
        advance: Callable[[int], None],
        cached: TensorCache | None = None,
    ) -> None:
        self.model, self.store, self.advance = model, store, advance
        self.kept = cached or TensorCache("", None)
        self.layers = sorted(set(layers))
        self.hooks = {f"blocks.{layer}.hook_resid_post": layer for layer in self.layers}
        self.n_batches = self.n_resets = 0
        self.tokens_BL: Tensor | None = None
        self.passes: dict[Any, Any] = {}
        # Sums over the tokens of the sparsity batches, for fvu: {hook: …}.
        self.count = 0
        self.sum_D: dict[str, Any] = dict.fromkeys(self.hooks, 0.0)
        self.squares: dict[str, float] = dict.fromkeys(self.hooks, 0.0)

    def batch(self, number: int, n_prompts: int) -> Tensor:
        """The batch of this number, from 1 on: the last one, or the next."""
        if number > self.n_batches:
            self.n_batches = number
            self.tokens_BL = self.store.get_batch_tokens(n_prompts)
            self.passes = {}
            self.advance(1)
        return self.tokens_BL

    def reset(self, number: int) -> None:
        """The store's reset of this number, from 1 on."""
        if number > self.n_resets:
            self.n_resets = number
            self.store.reset_input_dataset()

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, computed once for the batch."""
        if key not in self.passes:
            self.passes[key] = compute()
        return self.passes[key]

    def original(self) -> tuple[Any, Any]:
        """Logits and losses of the unchanged model; its residual streams by hook."""

        def compute() -> Any:
            both, cache = self.model.run_with_cache(
                self.tokens_BL, return_type="both", loss_per_token=True,
                names_filter=list(self.hooks),
            )  # fmt: skip
            return tuple(both), {hook: cache[hook] for hook in self.hooks}

        return self.once("original", lambda: self.from_kept("original", compute))

    def from_kept(self, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` returns for this batch; see `TensorCache.get`."""
        device = self.tokens_BL.device

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device)
            if isinstance(value, dict):
                return {key: moved(item) for key, item in value.items()}
            return tuple(moved(item) for item in value)

        found = self.kept.get(f"{self.n_batches:06d}-{name}", compute)
        self.kept.flush()  # logits are large: a copy of the next ones beside these takes 0.5 GB
        return moved(found)

    def residuals(self) -> Any:
        """The residual streams by hook, and the count of what fvu needs of them."""

        def one_pass() -> Any:
            _, cache = self.model.run_with_cache(
                self.tokens_BL, prepend_bos=False, names_filter=list(self.hooks),
                stop_at_layer=self.layers[-1] + 1,
            )  # fmt: skip
            return {hook: cache[hook] for hook in self.hooks}

        def compute() -> Any:
            cache = self.from_kept("residuals", one_pass)
            keep_BL = self.keep()
            self.count += int(keep_BL.sum())
            for hook in self.hooks:
                x_ND = cache[hook][keep_BL].double()
                self.sum_D[hook] = self.sum_D[hook] + x_ND.sum(0)
                self.squares[hook] += float(x_ND.pow(2).sum())
            return cache

        return self.once("residuals", compute)

    def keep(self) -> Tensor:
        """(B, L) bool: neither BOS nor EOS nor padding."""
        def compute() -> Tensor:
            special = torch.tensor(sorted(special_token_ids(self.model.tokenizer)))
            return ~torch.isin(self.tokens_BL, special.to(self.tokens_BL.device))

        return self.once("keep", compute)

    def spread(self, hook: str) -> float:
        """Σ‖x − x̄‖² over the tokens of the sparsity batches."""
        return self.squares[hook] - float(self.sum_D[hook].pow(2).sum()) / self.count


class SharedView:
    """SharedPasses for one SAE: what `run_evals` takes for a store and for a model."""

    def __init__(self, shared: SharedPasses, sae: SAELike) -> None:
        self.shared, self.hook = shared, sae.cfg.hook_name
        self.n_batches = self.n_resets = 0
        self.error = 0.0  # Σ‖x − x̂‖² over the tokens of the sparsity batches
        self.x_BLD: Tensor | None = None  # what the SAE is to reconstruct, in those batches
        self.context_size = shared.store.context_size
        decode = sae.decode

        def decode_and_count(feature_acts: Tensor) -> Tensor:
            out_BLD = decode(feature_acts)
            if self.x_BLD is not None:
                error_BLD = (self.x_BLD - out_BLD)[shared.keep()].double()
                self.error += float(error_BLD.pow(2).sum())
                self.x_BLD = None
            return out_BLD

        sae.decode = decode_and_count

    def get_batch_tokens(self, n_prompts: int) -> Tensor:
        yield_turn()
        self.n_batches += 1
        return self.shared.batch(self.n_batches, n_prompts)

    def reset_input_dataset(self) -> None:
        self.n_resets += 1
        self.shared.reset(self.n_resets)

    def __call__(self, tokens_BL: Tensor, return_type: str, loss_per_token: bool) -> Any:
        return self.shared.original()[0]

    def run_with_hooks(
        self, tokens_BL: Tensor, return_type: str, fwd_hooks: list, loss_per_token: bool
    ) -> Any:
        ((name, hook),) = fwd_hooks
        changed_BLD = hook(self.shared.original()[1][name], hook=None)

        def compute() -> Any:
            return tuple(self.shared.model(
                changed_BLD, start_at_layer=self.shared.hooks[name] + 1, tokens=tokens_BL,
                return_type=return_type, loss_per_token=loss_per_token,
            ))  # fmt: skip

        if changed_BLD.any():
            return compute()
        ablated = f"ablated-{self.shared.hooks[name]}"
        return self.shared.once(ablated, lambda: self.shared.from_kept(ablated, compute))

    def run_with_cache(self, tokens_BL: Tensor, **kwargs: Any) -> tuple[None, Any]:
        cache = self.shared.residuals()
        self.x_BLD = cache[self.hook]
        return None, cache

    def fvu(self) -> float:
        """Σ‖x − x̂‖² / Σ‖x − x̄‖² over the tokens of the sparsity batches.

        Reported because SAE-Bench 0.6.0's `explained_variance` averages x² where it should
        average x (evals/core/main.py, mean_act_per_dimension): a constant doesn't score 0.
        """
        return self.error / self.shared.spread(self.hook)


def core_passes(settings: SettingsLike, model: Any, layers: list[int]) -> TensorCache:
    """Where core evaluation's passes of the language model are kept, if they are not too large."""
    tokens = settings.core_prompts * settings.context
    logits = settings.core_reconstruction_batches * (1 + len(layers)) * model.cfg.d_vocab
    residuals = settings.core_reconstruction_batches + settings.core_sparsity_batches
    numbers = tokens * (logits + residuals * len(layers) * model.cfg.d_model)
    key = None
    if numbers * model.cfg.dtype.itemsize <= ACTIVATIONS_GB * 1e9:
        counts = [settings.core_reconstruction_batches, settings.core_sparsity_batches, layers]
        text = text_identity(settings.core_text)
        key = forward_key(settings, model.cfg.device, counts=counts, **text)
    return TensorCache("core passes", key)


def run_core(
    saes: dict[Any, SAELike],
    model: Any,
    settings: SettingsLike,
    advance: Callable[[int], None],
    keep: bool = False,
) -> dict[Any, tuple[dict, dict, float]]:
    """SAE-Bench's `run_evals` of SAEs that `prepare_for_sae_bench` has prepared, side by side.

    Args:
        keep: the language model's passes for the next run.
    Returns:
        by the SAEs' keys: scalars by group, metrics of each feature, and fvu.
    """
    from sae_bench.evals.core import main as core

    config = core_config(settings)
    saes = {key: copy.copy(sae) for key, sae in saes.items()}  # views put their decode on them
    store = core_store(settings, model, next(iter(saes.values())))
    layers = sorted({sae.cfg.hook_layer for sae in saes.values()})
    kept_passes = core_passes(settings, model, layers) if keep else None
    shared = SharedPasses(model, store, layers, advance, kept_passes)
    views = {key: SharedView(shared, sae) for key, sae in saes.items()}

    def job(key: Any) -> Callable[[], tuple[dict, dict]]:
        def evaluated() -> tuple[dict, dict]:
            with error_context(str(key)):
                view = views[key]
                ignored = special_token_ids(model.tokenizer)
                return core.run_evals(saes[key], view, view, config, ignore_tokens=ignored)

        return evaluated

    # Around all of them: each run_evals restores, when it ends, the mode that it began in.
    try:
        with torch.no_grad(), retain_freed_memory():
            results = run_cooperatively({key: job(key) for key in saes})
    except StopIteration as error:
        raise ExperimentError(
            f"the text {settings.core_text!r} is too short for one batch of core_prompts = "
            f"{settings.core_prompts} contexts: lower it, or choose another core_text"
        ) from error
    return {
        key: (scalars, features, views[key].fvu()) for key, (scalars, features) in results.items()
    }


def mean_l0(
    saes: dict[Any, SAELike], model: Any, settings: SettingsLike, n_batches: int = 4
) -> dict[Any, float]:
    """Active features per token, on the first batches of the evaluation text, by any key."""
    ready = {key: prepare_for_sae_bench(sae, settings) for key, sae in saes.items()}
    store = core_store(settings, model, next(iter(ready.values())))
    layers = (sae.cfg.hook_layer for sae in ready.values())
    shared = SharedPasses(model, store, layers, advance=lambda n: None)
    active = dict.fromkeys(saes, 0)
    with torch.no_grad():
        for number in range(1, n_batches + 1):
            shared.batch(number, settings.core_prompts)
            cache, keep_BL = shared.residuals(), shared.keep()
            for key, sae in ready.items():
                with error_context(f"layer {sae.cfg.hook_layer}"):
                    f_NF = sae.encode(cache[sae.cfg.hook_name][keep_BL])
                    active[key] += int((f_NF > 0).sum())
    return {key: count / shared.count for key, count in active.items()}


def save_core(
    name: str, sae: SAELike, scalars: dict, features: dict, settings: SettingsLike, out_dir: Path
) -> None:
    """Writes an SAE's core results as SAE-Bench's multiple_evals does."""
    from sae_bench.evals.core import main as core
    from sae_bench.sae_bench_utils import (
        general_utils,
        get_eval_uuid,
        get_sae_bench_version,
        get_sae_lens_version,
    )

    folder = out_dir / "eval_results" / "core"
    folder.mkdir(parents=True, exist_ok=True)
    core.save_single_eval_result(
        {
            "sae_set": name,
            "sae_id": "custom_sae",
            "eval_cfg": core_config(settings),
            "metrics": scalars,
            # Features that never fire have no such ratio; this is SAE-Bench's own step.
            "feature_metrics": core.replace_nans_with_negative_one(features),
        },
        get_eval_uuid(),
        get_sae_lens_version(),
        get_sae_bench_version(),
        general_utils.get_results_filepath(str(folder), name, "custom_sae"),
        sae,
    )


def export_to_saelens(sae: SAELike, settings: SettingsLike, folder: Path) -> None:
    """Writes an SAE, folded, as SAELens stores it: TopK or JumpReLU if it selects, else standard.

    `sae_lens.SAE.load_from_disk(folder)` reads it. theta.json holds θ, what follows from it, and
    the scale that was folded.
    """
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    metadata = SAEMetadata(
        model_name=settings.model,
        hook_name=sae.cfg.hook_name,
        hook_layer=sae.cfg.hook_layer,
        context_size=settings.context,
        prepend_bos=True,
        dataset_path=settings.training_text,
    )
    shape: dict[str, Any] = dict(d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, metadata=metadata)
    if sae.threshold is not None:
        stored: Any = JumpReLUSAE(JumpReLUSAEConfig(**shape))
    elif sae.k is None:
        stored = StandardSAE(StandardSAEConfig(**shape))
    else:
        stored = TopKSAE(TopKSAEConfig(k=sae.k, **shape))
    raw = sae.fold_activation_norm_scaling()
    if sae.threshold is not None:
        stored.threshold.data.fill_(raw.threshold)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        getattr(stored, name).data.copy_(getattr(raw, name).data)
    stored.save_model(folder)
    from sae_lens import SAE

    read = SAE.load_from_disk(folder).state_dict()
    if any(not torch.equal(read[name].cpu(), t.cpu()) for name, t in stored.state_dict().items()):
        raise ExperimentError(
            f"the SAE in {folder} is not read back by SAELens as it was written: look at the disk, "
            "and at the versions in constraints.txt"
        )
    write_json(folder / "theta.json", {**sae.learned_scalars(), "scale": sae.norm_scaling_factor})


def check_core(name: str, metrics: dict[str, float]) -> None:
    """ExperimentError where a scalar of core is not finite, is the -1 for NaN, or L0 is 0."""
    for metric, value in metrics.items():
        if not math.isfinite(value) or value == -1:
            raise ExperimentError(
                f"core evaluation of {name}: {metric} is {value}, which can't be right; "
                "look at the SAE's weights and at the evaluation text"
            )
    if metrics["l0"] == 0:
        raise ExperimentError(
            f"core evaluation of {name}: L0 is 0, no feature is active on any token of the "
            "evaluation text; look at the SAE's weights, at the penalty and at encode"
        )
