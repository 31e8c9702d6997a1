"""Speed and memory of the gemma-2-2b profile at its true size, with random weights, offline.

    python bench/full_size.py [--tokens N] [--device auto|cpu|cuda] [--d_sae F] [--tiny]

Builds Gemma-2-2b at its published dimensions with random weights in bfloat16, harvests the
profile's layers, trains its SAEs for some steps and evaluates them with SAE-Bench's core metrics,
by the functions that a run calls. Prints a Markdown table of tokens per second, share of the
arithmetic peak and peak memory. The SAEs' own figures mean nothing here and go nowhere.

FLOPs are those of matrix products, 2 for a multiplication and its addition. In formulas B is the
tokens of a batch, L those of a context, D the model dimension, F features, H and G the heads of
queries and of keys, d the dimension of a head, M that of the MLP, V the vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import experiment  # noqa: E402
from bench.common import run_on, settings_of
from experiment import Settings  # noqa: E402
from harness.console import Progress, redirect_output
from harness.evaluation.core import prepare_for_sae_bench, shared_core_evals
from harness.fingerprint import versions
from harness.language_model import LanguageModel
from harness.machine import n_cores, peak_memory_gb, processor_name
from harness.steps import take_steps
from harness.training import ActivationStats, TrainingLog

PAD, EOS, BOS = 0, 1, 2
GEMMA_2_2B = dict(
    vocab_size=256000, hidden_size=2304, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, intermediate_size=9216, query_pre_attn_scalar=256,
    sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    max_position_embeddings=8192, rms_norm_eps=1e-6, hidden_activation="gelu_pytorch_tanh",
    initializer_range=0.02, attention_bias=False, tie_word_embeddings=True,
    pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS,
)  # fmt: skip
TINY = GEMMA_2_2B | dict(
    vocab_size=500, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=128, query_pre_attn_scalar=16,
    initializer_range=0.1,
)  # fmt: skip

# ---------------------------------------------------------------------- the model and its tokens


def build(dimensions: dict[str, Any], device: torch.device | str) -> LanguageModel:
    """A Gemma-2 model with random weights, made on `device` in bfloat16: never in float32.

    Gemma-2 normalizes before and after each part of a block, so that a random model's residual
    stream grows with the square root of the depth: finite, and different from token to token.
    """
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(
            Gemma2Config(**dimensions), dtype=torch.bfloat16, attn_implementation="eager"
        )
    hf.requires_grad_(False)
    return LanguageModel(hf.eval(), number_tokenizer(hf.config.vocab_size), "gemma-2-2b")


def number_tokenizer(vocab_size: int) -> Any:
    """A tokenizer whose text is the token ids themselves: "17 4" is BOS, 17, 4."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<bos>", *map(str, range(BOS + 1, vocab_size))]
    ids = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=ids, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        add_bos_token=True, name_or_path="",
    )  # fmt: skip
    # Only now: transformers 5 asks the hub about large tokenizers that come with a splitting rule.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


class RandomTokens:
    """Contexts of random token ids, in place of TokenStream: no text is tokenized."""

    def __init__(self, vocab_size: int, context: int) -> None:
        self.vocab_size, self.context = vocab_size, context
        self.generator = torch.Generator().manual_seed(0)
        self.n_read = 0  # tokens, BOS included

    def contexts(self, n: int) -> Tensor:
        """The next n contexts, (n, L) int64, BOS first."""
        shape = (n, self.context)
        rows = torch.randint(BOS + 1, self.vocab_size, shape, generator=self.generator)
        rows[:, 0] = BOS
        self.n_read += rows.numel()
        return rows


def write_text(folder: Path, stream: RandomTokens, n_contexts: int) -> Path:
    """Makes `folder` a data set with a "text" column, as `datasets` and so SAELens load it."""
    folder.mkdir()
    rows = stream.contexts(n_contexts)[:, 1:].tolist()
    lines = [json.dumps({"text": " ".join(map(str, row))}) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


# ---------------------------------------------------------------------- FLOPs


def pass_flops(config: Any, length: int, n_blocks: int, logits: bool) -> int:
    """FLOPs per token of a pass through `n_blocks` blocks, and through the unembedding if `logits`.

    A block: 2 (2 D H d + 2 D G d + 3 D M) for its weights and 4 L H d for its attention, which
    multiplies all L² pairs of a context, the masked ones too. The unembedding: 2 D V.
    """
    width, d = config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    weights = 2 * width * d * (heads + groups) + 3 * width * config.intermediate_size
    block = 2 * weights + 4 * length * heads * d
    return n_blocks * block + (2 * width * config.vocab_size if logits else 0)


def step_flops(settings: Settings, width: int) -> int:
    """FLOPs of one step of one SAE: 10 B D F + 4 D F.

    Five products of 2 B D F: encoder and decoder forwards; backwards the gradients of W_enc, of
    W_dec and of the features (the activations get none). 4 D F is b_dec's way through W_enc.
    """
    return (10 * settings.batch + 4) * width * settings.d_sae


def core_flops(config: Any, settings: Settings) -> int:
    """FLOPs of core evaluation for one SAE per layer of `settings`.

    A reconstruction batch: the whole pass; from each SAE's layer on, a pass with zeros and one
    with the reconstruction, which costs 4 D F per token. A sparsity batch: the pass up to the last
    layer, and each SAE. Once per SAE, 4 D F²: cosines between rows of W_dec, columns of W_enc.
    """
    length, n_blocks = settings.context, config.num_hidden_layers
    sae = 4 * config.hidden_size * settings.d_sae
    saes = len(settings.layers) * sae
    later = sum(pass_flops(config, length, n_blocks - at - 1, True) for at in settings.layers)
    reconstruction = pass_flops(config, length, n_blocks, True) + 2 * later + saes
    sparsity = pass_flops(config, length, max(settings.layers) + 1, False) + saes
    batches = (
        settings.core_reconstruction_batches * reconstruction
        + settings.core_sparsity_batches * sparsity
    )
    return batches * settings.core_prompts * length + saes * settings.d_sae


# ---------------------------------------------------------------------- measurements


class Stages:
    """The lines of the table, as they are measured. Memory is in GB, 10^9 bytes.

    The peak is the best seen before or after any stage: on a shared machine one measurement of it
    may be far too low.

    Args:
        device: where the stages compute. size: of the matrices of `arithmetic_peak`.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.device, self.size = device, size
        self.peak = arithmetic_peak(device, size)
        self.rows: list[tuple[str, float, int, int, float]] = []

    def add(self, name: str, seconds: float, tokens: int = 0, flops: int = 0) -> None:
        """Adds a stage that has ended; `tokens` and `flops` where it computes with tokens."""
        cuda = self.device.type == "cuda"
        held = torch.cuda.max_memory_allocated() / 1e9 if cuda else peak_memory_gb()
        self.rows.append((name, seconds, tokens, flops, held))
        self.peak = max(self.peak, arithmetic_peak(self.device, self.size))

    def lines(self) -> list[str]:
        """The table, in Markdown."""
        lines = [
            "| stage | tokens | seconds | tokens/s | TFLOP/s | share of peak | peak memory, GB |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, seconds, tokens, flops, held in self.rows:
            cells = [name, "–", f"{seconds:.2f}", "–", "–", "–"]
            if tokens:
                rate = flops / seconds
                cells[1], cells[3] = f"{tokens}", f"{tokens / seconds:.1f}"
                cells[4:] = f"{rate / 1e12:.4g}", f"{rate / self.peak:.3f}"
            lines.append(f"| {' | '.join(cells)} | {held:.2f} |")
        return lines


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def arithmetic_peak(device: torch.device, size: int) -> float:
    """FLOP/s of the best of 6 products of two (size, size) matrices in bfloat16."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(6):
        started = now(device)
        a @ b
        seconds.append(now(device) - started)
    return 2 * size**3 / min(seconds)


def measure(
    dimensions: dict[str, Any], settings: Settings, tokens: int, n_steps: int, stages: Stages
) -> None:
    """Builds the model, harvests, trains and evaluates, and adds each to `stages`.

    Args:
        tokens: to harvest, in whole fillings of the buffer; SAEs learn from the last of these.
        n_steps: of each SAE.
    """
    device = stages.device
    started = now(device)
    lm = build(dimensions, device)
    config = lm.hf.config
    stages.add("build the model", now(device) - started)

    stream = RandomTokens(config.vocab_size, settings.context)
    run = run_on(lm, settings)
    buffer = experiment.ActivationBuffer(run, stream)
    lm.activations(stream.contexts(1), settings.layers)  # sets up what a first pass needs
    stream.n_read = 0
    progress = Progress("harvest", tokens, "tokens")
    started = now(device)
    for _ in range(tokens // settings.buffer_tokens):
        acts_LND = None  # freed before the next filling, as in a run
        acts_LND = buffer.next_tokens(settings.buffer_tokens, progress.advance)
    seconds = now(device) - started
    progress.close()
    flops = pass_flops(config, settings.context, max(settings.layers) + 1, False)
    stages.add("harvest", seconds, stream.n_read, stream.n_read * flops)
    if not torch.isfinite(acts_LND).all():
        raise SystemExit("the random model's activations are not finite")

    keys = [(layer, seed) for layer in settings.layers for seed in settings.seeds]
    stats = {at: ActivationStats.of(a_ND) for at, a_ND in zip(settings.layers, acts_LND)}
    trainers = experiment.new_trainers(run, stats, dict.fromkeys(keys, {}))
    shuffles = {seed: torch.Generator().manual_seed(seed) for seed in settings.seeds}
    portion = settings.buffer_tokens // settings.batch
    parts = [range(i, min(i + portion, n_steps)) for i in range(0, n_steps, portion)]
    n_learned = len(keys) * n_steps * settings.batch
    counted = dataclasses.replace(settings, training_tokens=n_steps * settings.batch)
    with TrainingLog(counted, Path(os.devnull)) as log:
        for steps in (range(1), *parts):  # the first step is taken twice: it sets up
            if steps is parts[0]:
                started = now(device)
            take_steps(settings, trainers, acts_LND, shuffles, steps, log)
        seconds = now(device) - started
    flops = len(keys) * n_steps * step_flops(settings, config.hidden_size)
    stages.add("SAE steps", seconds, n_learned, flops)
    saes = {
        experiment.sae_name(*key): trainer.sae.fold_activation_norm_scaling()
        for key, trainer in trainers.items()
    }
    del acts_LND, trainers, buffer

    n_batches = settings.core_reconstruction_batches + settings.core_sparsity_batches
    progress = Progress("core evaluation", n_batches, "batches")
    times = []  # of every batch: the first is when the text is loaded and the first batch drawn

    def advance(n: int) -> None:
        times.append(now(device))
        progress.advance(n)

    with tempfile.TemporaryDirectory() as folder, redirect_output(Path(folder) / "log"):
        started = now(device)
        model = lm.bridge()
        stages.add("build its TransformerLens form", now(device) - started)
        text = write_text(Path(folder) / "text", stream, (n_batches + 1) * settings.core_prompts)
        settings = dataclasses.replace(settings, core_text=str(text))
        ready = {key: prepare_for_sae_bench(sae, settings) for key, sae in saes.items()}
        results = shared_core_evals(
            ready, model, settings, experiment.core_metrics, advance
        )
        seconds = now(device) - times[0]
    progress.close()
    n_tokens = n_batches * settings.core_prompts * settings.context
    stages.add("core evaluation", seconds, n_tokens, core_flops(config, settings))
    for key, (scalars, _, own, *_) in results.items():
        values = [value for group in (own, *scalars.values()) for value in group.values()]
        if not all(map(math.isfinite, values)):
            raise SystemExit(f"a core metric of {key} is not finite: {scalars}, {own}")


def circumstances(settings: Settings, n_steps: int, stages: Stages) -> str:
    """What was measured, on what and when: a paragraph."""
    installed = versions()
    cuda = stages.device.type == "cuda"
    processor = f"{processor_name()}, {torch.get_num_threads()} cores"
    return (
        f"{torch.cuda.get_device_name() if cuda else processor}; bfloat16, peak "
        f"{stages.peak / 1e12:.4g} TFLOP/s; torch {installed['torch']}, transformers "
        f"{installed['transformers']}; {datetime.date.today()}. Random weights. Layers "
        f"{', '.join(map(str, settings.layers))}, d_sae {settings.d_sae}, {n_steps} steps of "
        f"{settings.batch} tokens per SAE, tokens counted once per SAE; core evaluation of "
        f"{settings.core_reconstruction_batches} + {settings.core_sparsity_batches} batches of "
        f"{settings.core_prompts} contexts of {settings.context} tokens. Memory: the most held so "
        f"far by {'tensors on the GPU' if cuda else 'the process'}."
    )


def main(argv: list[str] | None = None) -> int:
    """Reads the flags, chooses sizes for the device, measures and prints."""
    parser = argparse.ArgumentParser(description="Speed and memory of the gemma-2-2b profile.")
    parser.add_argument("--tokens", type=int, help="to harvest; default 2^20 on CUDA, 512 on a CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--d_sae", type=int, help="features of an SAE; default the profile's")
    parser.add_argument("--tiny", action="store_true", help="a toy model, for a test of seconds")
    args = parser.parse_args(argv)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if args.device == "auto" else args.device)
    large = device.type == "cuda" and not args.tiny

    settings = settings_of("full_size", "gemma-2-2b")
    tokens = args.tokens or (2**20 if large else 512)
    if tokens < settings.context:
        parser.error(f"--tokens must be at least {settings.context}, one context")
    changes: dict[str, Any] = dict(layers=(0, 1, 2), k_min=8, d_sae=96) if args.tiny else {}
    if args.d_sae:
        changes["d_sae"] = args.d_sae
    settings = dataclasses.replace(
        settings,
        **changes,
        batch=min(settings.batch, tokens),
        buffer_tokens=min(settings.buffer_tokens, tokens),
        harvest_contexts=min(settings.harvest_contexts, -(-tokens // (settings.context - 1))),
        core_prompts=settings.core_prompts if large else 2,
        core_reconstruction_batches=5 if large else 1,  # and ten times as many sparsity batches,
        core_sparsity_batches=50 if large else 10,  # as in the profile
    )
    n_steps = 256 if large else 16
    torch.set_num_threads(n_cores())  # this and what follows as in a run
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False

    stages = Stages(device, 512 if args.tiny else 8192 if large else 4096)
    measure(TINY if args.tiny else GEMMA_2_2B, settings, tokens, n_steps, stages)
    print("\n".join(["", *stages.lines(), "", circumstances(settings, n_steps, stages)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
