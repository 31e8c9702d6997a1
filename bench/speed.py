"""How fast this project is, beside its peers, its own floor and itself at other sizes.

    python bench/speed.py [--only step,harvest,training,evaluation,loop,growth] [--rounds N]
        [--points PART] [--tokens N] [--out FILE]

Measured on tinylm, or on the profile that SAE_PROFILE names.
Prints a Markdown table per section. Contenders take turns, in several rounds after a warm-up each;
a figure is the median over all rounds, and "times ours" is a contender's seconds per token divided
by this project's: above 1 it is slower. With --out each point is appended to FILE as a line of
JSON, and what FILE has from the same machine, versions, sizes and code of the experiment is not
measured again. "spread" is the range of what the median is of, divided by it.

SAELens, TransformerLens and SAE-Bench are dependencies of the project. The other peers are not:

    .venv/bin/python -m pip install --no-deps --target bench/.peers -r bench/peers.txt

- `step`: one train step on activations in memory. This trainer in three states of its training.
  Each is made from an untrained SAE by lowering b_enc, feature by feature, to a quantile of its
  preactivations on one batch. The frequencies of features are log-normal, and their mean is what
  makes the state: "start", untrained, F/2 features active per token and k_start selected;
  "middle", k_t of half the curriculum, and the geometric mean of the other two states' active
  features; "end", k_min selected and 1.1 k_min active. They are modelled on an SAE trained on
  tinylm by the default settings, shortened to 800 steps of 512 tokens (layer 2, 2026-11-23): of its
  1024 features 512 were active at first, 95 after 15 to 20% of training, 18 to 21 from 40% to 80%,
  17.8 with a standard deviation of 3.8 at the end, where 5%, 50% and 95% of them fired on no more
  than 0, 0.004 and 0.08 of the tokens. Learning rates are 0 and nothing dies, so that a state stays
  as it is: the arithmetic is the same. L0 and the rest are of a batch of its own. Peers start
  untrained, with k = k_min: what they compute does not depend on their state, but for dead
  features, of which they have none. The floor is the five matrix products of a dense step; the
  share of the peak is that of their FLOPs in what the machine does in bfloat16 at best, which on
  some processors is less than in float32.
- `harvest`: activations of three layers from the same contexts of tokens, in passes of
  the same size. The BOS that begins a context is in no contender's result, and no token counts
  more than once. The floor is the matrix products of one pass up to the last layer.
- `training`: from text to three trained SAEs, in tokens that each of them learns from, with the
  same model, precision, width and batch. SAELens' MultiSAETrainingRunner, which shares a pass among
  SAEs as this project does, without evaluations, logs or saves, and once with its tokenizing left
  out and its language model in a thread of its own. dictionary_learning's trainSAE, one SAE at a
  time, with its own ActivationBuffer per layer, and on activations that this project harvests
  once for all three, which its time includes.
- `evaluation`: core and sparse probing of an SAE for each of three layers, against stock SAE-Bench
  called once per SAE. The figures must be the same, or it fails.
- `loop`: what a rerun costs, by bench/loop.py.
- `growth`: seconds and memory against features, tokens, layers and seeds, each point in a process
  of its own; memory is what its peak is above what it held before; the exponent is the slope on
  logarithmic scales. Draws bench/growth.png.

This project runs as in a run, with PyTorch's deterministic algorithms; peers run without. All run
in this process with OMP_WAIT_POLICY=PASSIVE, as experiment.py sets it, unless it is set outside.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

import experiment
from bench import loop, peers
from bench.common import run_on, settings_of
from bench.full_size import arithmetic_peak, now, step_flops
from bench.peers import Call
from experiment import Settings
from harness import fused_model
from harness.console import Progress, redirect_output
from harness.evaluation.core import core_evaluation, core_text
from harness.evaluation.probe_texts import known_to_stock, read_probe_texts
from harness.evaluation.probing import sparse_probing
from harness.fingerprint import versions
from harness.gpu import CapturedSteps
from harness.language_model import LanguageModel, load_language_model
from harness.machine import (
    choose_train_dtype,
    make_reproducible,
    peak_memory_gb,
    processor_name,
    retain_memory_for_steps,
)
from harness.probe_sets import own_sets
from harness.start import SOURCES_AT_START
from harness.startup import Run
from harness.store import sha256_file
from harness.text import TokenStream, documents
from harness.training import ActivationStats

INSTALL = "python -m pip install --no-deps --target bench/.peers -r bench/peers.txt"
OURS = "this project"
PROFILE = os.environ.get("SAE_PROFILE") or "tinylm"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    rounds: int = 3
    shapes: tuple[tuple[int, int, int, int], ...] = (  # d_in, d_sae, k_min, steps per turn
        (2304, 2304, 64, 4), (2304, 16384, 64, 1), (256, 1024, 16, 20),
    )  # fmt: skip
    batch: int = 2048
    peak: int = 4096  # size of the matrices that the arithmetic peak is measured with
    passes: int = 8  # of the language model in a turn of `harvest`
    batches: tuple[int, ...] = (512, 2048)  # of `training`
    tokens: int = 131_072  # of `training`
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)  # settings of its own
    widths: tuple[int, ...] = (1024, 4096, 16384, 65536)  # of `growth`, at d_in 256
    lengths: tuple[int, ...] = (32_768, 65_536, 131_072, 262_144)  # tokens
    steps: int = 5  # of a point of `growth`


TINY = Sizes(
    rounds=2, shapes=((64, 128, 4, 2), (32, 256, 4, 2)), batch=256, peak=256, passes=1,
    batches=(128,), tokens=1024, widths=(64, 128), lengths=(1024, 2048), steps=2,
    evaluation=dict(
        core_prompts=2, core_reconstruction_batches=1, core_sparsity_batches=2, probe_train=24,
        probe_test=12, probe_ks=(1, 2),
    ),
)  # fmt: skip

# ---------------------------------------------------------------------- turns, rows, tables

Row = dict[str, Any]


@dataclasses.dataclass
class Contender:
    """Something to be measured.

    Args:
        start: sets it up and returns what a turn calls: one unit of work, and its tokens.
        columns: of its row, beside what is measured.
        around: what its turn is in, as in a run.
    """

    name: str
    start: Callable[[], Call]
    columns: Row = dataclasses.field(default_factory=dict)
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def alternate(
    contenders: list[Contender], device: torch.device, rounds: int, calls: int = 1,
    warmup_calls: int = 0, warmup_rounds: int = 0,
) -> list[Row]:  # fmt: skip
    """A row per contender: each has a turn of `calls` calls in every round.

    Not timed are `warmup_calls` more at the beginning of each turn, and `warmup_rounds` rounds at
    the beginning of all. Contenders whose name begins with OURS run as in a run. A peer that
    can't be imported gets a row that says how to get it. Nothing of a turn is left when the next
    one begins.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    missing: dict[str, str] = {}
    held: dict[str, float] = {}
    cuda = device.type == "cuda"
    gc.collect()
    gc.freeze()  # what is there already is not looked through after each turn
    for number, contender in itertools.product(range(-warmup_rounds, rounds), contenders):
        name = contender.name
        if name in missing:
            continue
        torch.use_deterministic_algorithms(name.startswith(OURS))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            call = contender.start()
        except ModuleNotFoundError as error:
            if name.startswith(OURS):
                raise
            missing[name] = f"{name}: not measured, no module {error.name}; {INSTALL}"
            continue
        with contender.around():
            for at in range(-warmup_calls, calls):
                began = now(device)
                tokens = call()
                took = now(device) - began
                if min(number, at) >= 0:
                    seconds[name].append(took / tokens)
        if cuda:
            held[name] = torch.cuda.max_memory_allocated() / 1e9
        del call
        gc.collect()
    gc.unfreeze()
    torch.use_deterministic_algorithms(False)
    rows: list[Row] = []
    for contender in contenders:
        name, times = contender.name, seconds[contender.name]
        row = {"contender": missing.get(name, name), **contender.columns}
        if times:
            median = statistics.median(times)
            row |= {"tokens/s": 1 / median, "spread": (max(times) - min(times)) / median}
        if name in held:
            row["peak memory, GB"] = held[name]
        rows.append(row)
    return rows


def with_ratios(rows: list[Row], column: str, base: str) -> list[Row]:
    """Adds to each row how many times the seconds of the contender `base` it takes for a token."""
    rate = next(row["tokens/s"] for row in rows if row["contender"] == base)
    return [row | {column: rate / row["tokens/s"]} if "tokens/s" in row else row for row in rows]


def cell(value: Any) -> str:
    """A value in a table: 4 significant digits, and a dash for none."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "–" if value is None else str(value)


def table(rows: list[Row]) -> str:
    """Rows in Markdown, with the columns that any of them has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Results:
    """What was measured: appended to a file, and read from it when the same is asked again.

    Args:
        path: a line of JSON per point: what was measured, where, with which versions and sizes.
    """

    def __init__(self, path: Path | None, sizes: Sizes, device: torch.device) -> None:
        self.path = path
        cuda = device.type == "cuda"
        self.where = {
            "machine": torch.cuda.get_device_name() if cuda else processor_name(),
            "cores": torch.get_num_threads(),
            "versions": versions(),
            "code": [sha256_file(f) for f in SOURCES_AT_START],
            "profile": PROFILE,
            "sizes": json.loads(json.dumps(dataclasses.asdict(sizes))),
        }
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.stored = [json.loads(line) for line in lines]
        self.dates: set[str] = set()

    def rows(self, section: str, point: str, measure: Callable[[], list[Row]]) -> list[Row]:
        """The rows of a point: measured, or read."""
        key = {"section": section, "point": point, **self.where}
        for record in self.stored:
            if {name: record.get(name) for name in key} == key:
                self.dates.add(record["date"])
                return record["rows"]
        record = key | {"date": str(datetime.date.today()), "rows": measure()}
        self.dates.add(record["date"])
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return record["rows"]


# What a section measures: names of points, and a function that measures the point's rows.
Points = Iterator[tuple[str, Callable[[], list[Row]]]]

# ---------------------------------------------------------------------- step

PHASES = ("start", "middle", "end")


def precision(autocast: bool) -> str:
    return "bfloat16" if autocast else "float32"


def step_settings(d_in: int, d_sae: int, k_min: int, batch: int) -> Settings:
    """Of the profile whose width is nearest, with learning rates 0 and no feature ever dead."""
    profile = "gemma-2-2b" if d_in > 1000 else "tinylm"
    return dataclasses.replace(
        settings_of("speed", profile), layers=(0,), d_sae=d_sae, k_min=k_min,
        batch=batch, lr=1e-30, theta_lr=1e-30, dead_feature_window=2**62,
    )  # fmt: skip


def phase(settings: Settings, name: str) -> tuple[float, float]:
    """Of a state of training: progress, from 0 to 1, and features active per token."""
    dense, sparse = settings.d_sae / 2, 1.1 * settings.k_min
    return {
        "start": (0.0, dense),
        "middle": (settings.curriculum_fraction / 2, math.sqrt(dense * sparse)),
        "end": (0.5, sparse),
    }[name]


@torch.no_grad()
def set_active(sae: experiment.CustomSAE, x_BD: Tensor, active: float) -> None:
    """Sets b_enc so that on x (B, D) `active` features per token are positive on average.

    Their frequencies are log-normal (σ = 1.7; see the docstring of this file), between one token
    of x and half of them.
    """
    n_tokens, n_features = len(x_BD), sae.cfg.d_sae
    counts_F = (1.7 * torch.randn(n_features, generator=torch.Generator().manual_seed(0))).exp()
    for _ in range(50):  # until the mean is right though the ends are cut off
        counts_F *= active * n_tokens / counts_F.sum()
        counts_F.clamp_(1, n_tokens // 2)
    at_F = counts_F.round().long().to(x_BD.device)
    pre_BF = sae.preactivations(x_BD * sae.norm_scaling_factor).acts
    high_BF = pre_BF.sort(dim=0, descending=True).values
    least_F, next_F = (high_BF.gather(0, at[None])[0] for at in (at_F - 1, at_F))
    sae.b_enc -= (least_F + next_F) / 2


def new_trainer(settings: Settings, x_NBD: Tensor, autocast: bool) -> experiment.Trainer:
    """A trainer of one SAE on raw activations (N, B, D)."""
    stats = {0: ActivationStats.of(x_NBD.flatten(0, 1))}
    run = Run(settings, None, train_dtype="bfloat16" if autocast else "float32")
    return experiment.new_trainers(run, stats, {(0, 0): {}})[0, 0]


@torch.no_grad()
def state_of(settings: Settings, x_NBD: Tensor, name: str) -> tuple[Tensor, Row]:
    """b_enc of one of PHASES, and what it comes to on another batch than it was set on."""
    sae = new_trainer(settings, x_NBD, False).sae
    progress, active = phase(settings, name)
    if name != "start":
        set_active(sae, x_NBD[0], active)
    f = sae.preactivations(x_NBD[1] * sae.norm_scaling_factor).map(sae.activation_fn)
    k = experiment.k_at(settings, progress)
    used = f.only(experiment.select(f, k))
    active_B, used_B = (codes.n_active().float() for codes in (f, used))
    means = {"active": float(active_B.mean()), "its sd": float(active_B.std())}
    return sae.b_enc.clone(), means | {"k": k, "L0": float(used_B.mean())}


def our_step(
    settings: Settings, x_NBD: Tensor, autocast: bool, name: str, b_enc: Tensor
) -> Call:
    """This project's Trainer.step in one of PHASES, with records and looks for dead features.

    On a GPU it is taken as in a run: as a graph, where that can be.
    """
    trainer = new_trainer(settings, x_NBD, autocast)
    trainer.sae.b_enc.data.copy_(b_enc)
    key, n_steps = (0, 0), 10**9  # so many steps that those measured are all of one state
    captured = CapturedSteps({key: trainer}, None)
    first, steps = round(n_steps * phase(settings, name)[0]), itertools.count()

    def call() -> float:
        step = next(steps)
        x_BD, at = x_NBD[step % len(x_NBD)], trainer.at(first + step, n_steps)
        if x_BD.is_cuda:
            captured.step({key: x_BD}, {key: at}, step % settings.log_every == 0)
        else:
            trainer.step(x_BD, at, step % settings.log_every == 0)
        return settings.batch

    return call


def step_contenders(settings: Settings, x_NBD: Tensor, autocast: bool) -> list[Contender]:
    """All contenders of a shape and a precision."""
    contenders = []
    memory = functools.partial(retain_memory_for_steps, settings, x_NBD.shape[-1])
    for name in PHASES:
        b_enc, columns = state_of(settings, x_NBD, name)
        start = functools.partial(our_step, settings, x_NBD, autocast, name, b_enc)
        contenders.append(Contender(f"{OURS}, {name}", start, columns, memory))
    k = {"k": settings.k_min}
    # With the default of the first its backward fails: no view of a sparse tensor (SAELens 6.54.12,
    # torch 2.13.0 on a CPU).
    topk = {"rescale_acts_by_decoder_norm": False, "use_sparse_activations": True}
    for name, setup, options, columns in (
        ("SAELens standard", peers.saelens_step, dict(kind="standard"), {}),
        ("SAELens TopK", peers.saelens_step, dict(kind="topk", **k), k),
        ("SAELens TopK, sparse", peers.saelens_step, dict(kind="topk", **k, **topk), k),
        ("SAELens BatchTopK", peers.saelens_step, dict(kind="batchtopk", **k), k),
        ("SAELens JumpReLU", peers.saelens_step, dict(kind="jumprelu"), {}),
        ("dictionary_learning standard", peers.dictionary_learning_step,
         dict(kind="StandardTrainer"), {}),
        ("dictionary_learning BatchTopK", peers.dictionary_learning_step,
         dict(kind="BatchTopKTrainer", **k), k),
        ("sparsify", peers.sparsify_step, {}, k),
        ("floor: five products", peers.five_products, {}, {}),
    ):  # fmt: skip
        if not (autocast and name.endswith("sparse")):  # SAELens: for float32 alone
            start = functools.partial(setup, settings, x_NBD, autocast, **options)
            contenders.append(Contender(name, start, columns))
    return contenders


def step_rows(
    shape: tuple[int, int, int, int], autocast: bool, sizes: Sizes, device: torch.device
) -> list[Row]:
    """The rows of a shape (d_in, d_sae, k_min, steps per turn) in a precision."""
    d_in, d_sae, k_min, steps = shape
    settings = step_settings(d_in, d_sae, k_min, sizes.batch)
    draw = torch.Generator().manual_seed(0)
    x_NBD = torch.randn(4, sizes.batch, d_in, generator=draw).to(device)
    size = sizes.peak * (2 if device.type == "cuda" else 1)
    peak = arithmetic_peak(device, size)
    contenders = step_contenders(settings, x_NBD, autocast)
    rows = alternate(contenders, device, sizes.rounds, steps, warmup_calls=1)
    peak = max(peak, arithmetic_peak(device, size))
    rows = with_ratios(rows, "times ours at the end", f"{OURS}, end")
    rows = with_ratios(rows, "times ours at the start", f"{OURS}, start")
    flops = step_flops(settings, d_in) / sizes.batch
    for row in rows:
        if "tokens/s" in row:
            row["share of bfloat16 peak"] = row["tokens/s"] * flops / peak
    return [{"shape": f"{d_in} → {d_sae}", "precision": precision(autocast)} | row for row in rows]


def step_section(sizes: Sizes, device: torch.device) -> Points:
    """One train step on activations in memory."""
    for shape in sizes.shapes:
        for autocast in (False, True):
            name = f"{shape[0]} → {shape[1]} {precision(autocast)}"
            yield name, functools.partial(step_rows, shape, autocast, sizes, device)


# ---------------------------------------------------------------------- harvest


class SameTokens:
    """The same contexts, (N, L), whenever it is asked, in place of TokenStream."""

    def __init__(self, tokens_NL: Tensor) -> None:
        self.tokens_NL, self.context = tokens_NL, tokens_NL.shape[1]

    def contexts(self, n: int) -> Tensor:
        """The first n contexts, (n, L) int64, BOS first."""
        return self.tokens_NL[:n]


@functools.cache
def language_model(name: str) -> LanguageModel:
    return load_language_model(name)


def training_texts(lm: LanguageModel, settings: Settings, tokens: int) -> list[str]:
    """The first texts of the training text that hold so many tokens, and few more.

    This project's stream tokenizes ahead, which a long run doesn't pay for in the end.
    """
    texts, left = [], tokens
    for text in documents(settings.training_text, "train")():
        texts.append(text)
        left -= len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
        if left < 0:
            break
    return texts


def for_harvest(dtype: str, settings: Settings) -> LanguageModel:
    """The language model as a run harvests with it."""
    lm = language_model(settings.model)
    return fused_model.for_harvest(lm, dtype, settings.harvest_contexts, settings.context)


def our_harvest(lm: LanguageModel, tokens_NL: Tensor, settings: Settings) -> Call:
    """ActivationBuffer.harvest: one pass of the language model for all layers."""
    buffer = experiment.ActivationBuffer(run_on(lm, settings), SameTokens(tokens_NL))
    n_passes = len(tokens_NL) // settings.harvest_contexts
    return lambda: sum(part.shape[1] for part in buffer.harvest(n_passes))


def harvest_rows(dtype: str, sizes: Sizes, device: torch.device) -> list[Row]:
    """The rows of a precision, in which the language model is for all contenders."""
    settings = settings_of("speed", PROFILE)
    lm = language_model(settings.model).cast(dtype)
    fused = for_harvest(dtype, settings)
    n_contexts = (sizes.passes + 1) * settings.harvest_contexts
    texts = training_texts(lm, settings, n_contexts * settings.context)
    stream = TokenStream(lambda: iter(texts), lm.tokenizer, settings.context)
    with contextlib.closing(stream):
        tokens_NL = stream.contexts(n_contexts)
    model, lens, store = lm.bridge(), peers.transformer_lens_harvest, peers.saelens_harvest
    contenders = [
        Contender(name, functools.partial(setup, form, tokens_NL, settings, *options))
        for name, setup, form, *options in (
            (OURS, our_harvest, fused),
            ("TransformerLens, one pass for all layers", lens, model, True),
            ("TransformerLens, one pass per layer", lens, model, False),
            ("SAELens, one store for all layers", store, model, True),
            ("SAELens, one store per layer", store, model, False),
            ("dictionary_learning, one buffer per layer", peers.dictionary_learning_harvest, lm),
            ("floor: matrix products", peers.pass_products, lm),
        )
    ]
    rows = alternate(contenders, device, sizes.rounds, warmup_rounds=1)
    rows = with_ratios(rows, "times ours", OURS)
    return [{"precision": dtype} | row for row in rows]


def harvest_section(sizes: Sizes, device: torch.device) -> Points:
    """Activations of three layers."""
    for dtype in ("float32", "bfloat16"):
        yield dtype, functools.partial(harvest_rows, dtype, sizes, device)


# ---------------------------------------------------------------------- training


def our_training(lm: LanguageModel, texts: list[str], settings: Settings) -> Call:
    """experiment.train from text, with nothing kept from an earlier run."""

    def call() -> float:
        with (
            tempfile.TemporaryDirectory() as folder,
            TokenStream(lambda: iter(texts), lm.tokenizer, settings.context) as stream,
        ):
            run = run_on(lm, settings, out_dir=Path(folder))
            experiment.train(run, experiment.ActivationBuffer(run, stream))
        return settings.training_tokens

    return call


def training_rows(batch: int, dtype: str, sizes: Sizes, device: torch.device) -> list[Row]:
    """The rows of a batch size and a precision."""
    settings = settings_of("speed", PROFILE)
    settings = dataclasses.replace(
        settings, batch=batch, training_tokens=sizes.tokens // batch * batch
    )
    lm, fused = language_model(settings.model).cast(dtype), for_harvest(dtype, settings)
    texts = training_texts(lm, settings, sizes.tokens + 16_384)
    stream = TokenStream(lambda: iter(texts), lm.tokenizer, settings.context)
    with contextlib.closing(stream):
        n_contexts = sizes.tokens // settings.context + 8 * settings.harvest_contexts
        tokens = {"input_ids": stream.contexts(n_contexts).tolist()}
    later = functools.partial  # a contender is set up when its turn begins
    saelens = later(later, peers.saelens_training, lm.bridge(), settings=settings)
    learning = later(later, peers.dictionary_learning_training, fused, texts, settings)
    text, k = {"text": texts}, dict(k=settings.k_min)
    standard = dict(kind="StandardTrainer", sparsity_warmup_steps=None)
    contenders = [Contender(OURS, later(our_training, fused, texts, settings))]
    for name, start in (
        ("SAELens TopK", saelens(text, kind="topk", **k)),
        ("SAELens TopK, tokens given, prefetching", saelens(tokens, kind="topk", **k, prefetch=1)),
        ("SAELens standard", saelens(text, kind="standard")),
        ("dictionary_learning standard", learning(**standard, shared=False)),
        ("dictionary_learning standard, our harvest", learning(**standard, shared=True)),
        ("dictionary_learning BatchTopK, our harvest",
         learning(kind="BatchTopKTrainer", **k, shared=True)),
    ):  # fmt: skip
        mixed = dtype != "float32" and not name.startswith("SAELens")
        columns = {"precision": f"{dtype}, SAEs float32"} if mixed else {}
        contenders.append(Contender(name, start, columns))
    rows = alternate(contenders, device, sizes.rounds, warmup_rounds=1)
    rows = with_ratios(rows, "times ours", OURS)
    return [{"batch": batch, "precision": dtype} | row for row in rows]


def training_section(sizes: Sizes, device: torch.device) -> Points:
    """From text to three SAEs, in the precision that a run takes on this machine, and float32."""
    taken = choose_train_dtype(settings_of("speed", PROFILE), device)
    for batch in sizes.batches:
        for dtype in dict.fromkeys((taken, "float32")):
            rows = functools.partial(training_rows, batch, dtype, sizes, device)
            yield f"batch {batch} {dtype}", rows


# ---------------------------------------------------------------------- evaluation


def our_evaluation(saes: dict[str, Any], run: Run) -> dict[str, dict[str, float]]:
    """core_evaluation and sparse_probing, with an empty store."""
    before = os.environ.get("XDG_CACHE_HOME")
    progress = Progress("sparse probing", len(run.probe_texts) * len(saes), "SAEs x sets")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            run = dataclasses.replace(run, out_dir=Path(folder))
            core = core_evaluation(run, saes, experiment.core_metrics)
            probing = sparse_probing(run, saes, experiment.probe, progress)
        finally:
            del os.environ["XDG_CACHE_HOME"]
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before
    return {name: core[name] | probing[name] for name in saes}


def largest_difference(
    ours: dict[str, dict[str, float]], stock: dict[str, dict[str, float]]
) -> tuple[int, float]:
    """Of the figures that stock has: their number, and by how much one differs from ours at most.

    Raises:
        AssertionError: by more than 1e-4 of it.
    """
    pairs = [(ours[name][metric], value) for name in stock for metric, value in stock[name].items()]
    for one, other in pairs:
        assert math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6), (one, other)
    return len(pairs), max(abs(one - other) for one, other in pairs)


def evaluation_rows(sizes: Sizes, device: torch.device) -> list[Row]:
    """The rows of an untrained SAE for each layer."""
    settings = settings_of("speed", PROFILE)
    settings = dataclasses.replace(settings, **sizes.evaluation)
    lm = language_model(settings.model)
    model = lm.bridge()
    texts = read_probe_texts(settings, lm.tokenizer, device)
    run = run_on(lm, settings, sae_bench_model=model, probe_texts=texts)
    core_text(settings)  # read now, and not by who comes first
    pieces = training_texts(lm, settings, 4096)
    stream = TokenStream(lambda: iter(pieces), lm.tokenizer, settings.context)
    with contextlib.closing(stream):
        buffer = experiment.ActivationBuffer(run, stream)
        acts_LND = buffer.next_tokens(2048)
    stats = {at: ActivationStats.of(a_ND) for at, a_ND in zip(settings.layers, acts_LND)}
    saes = {
        experiment.sae_name(layer, 0): experiment.new_sae(
            settings, layer, 0, layer_stats, {}, settings.k_min
        ).fold_activation_norm_scaling()
        for layer, layer_stats in stats.items()
    }
    stock = functools.partial(peers.stock_evaluation, saes, model, settings, device)
    figures: dict[str, dict] = {}

    def contender(name: str, evaluate: Callable[[], dict]) -> Contender:
        def call() -> float:
            figures[name] = evaluate()
            return len(saes)

        return Contender(name, lambda: call)

    with known_to_stock(own_sets(settings)):
        ours = contender(OURS, lambda: our_evaluation(saes, run))
        both = [ours, contender("stock SAE-Bench, SAE by SAE", stock)]
        rows = alternate(both, device, sizes.rounds)
        n_figures, apart = largest_difference(figures[OURS], stock(again=True))
    rows = with_ratios(rows, "times ours", OURS)
    for row in rows:
        row |= {"seconds per SAE": 1 / row.pop("tokens/s"), "figures compared": n_figures}
        row["differ by at most"] = apart
    return [{"SAEs": len(saes)} | row for row in rows]


def evaluation_section(sizes: Sizes, device: torch.device) -> Points:
    """Core and sparse probing of an SAE for each layer."""
    yield "an SAE per layer", functools.partial(evaluation_rows, sizes, device)


# ---------------------------------------------------------------------- loop


def loop_section(sizes: Sizes, device: torch.device) -> Points:
    """What a rerun costs after an edit."""

    def rows() -> list[Row]:
        runs = list(loop.measure())
        return [
            {"run": what, "seconds": seconds, "times as fast": runs[0][1] / seconds, **stages}
            for what, seconds, stages in runs
        ]

    yield "edits", rows


# ---------------------------------------------------------------------- growth


def growth_points(sizes: Sizes) -> list[Row]:
    """What grows ("of"), its number ("x"), and the settings of the point."""
    layers, tokens = (4, 2, 1), sizes.lengths[0]  # always with the deepest: the passes are as long
    points: list[Row] = [
        {"of": "features", "x": width, "phase": phase}
        for phase in ("start", "end")
        for width in sizes.widths
    ]
    points += [{"of": "tokens", "x": n, "training_tokens": n} for n in sizes.lengths]
    for n in (1, 2, 3):
        points.append({"of": "layers", "x": n, "layers": layers[:n], "training_tokens": tokens})
    for n in (1, 2, 4):
        settings = {"seeds": tuple(range(n)), "layers": layers[:1], "training_tokens": tokens}
        points.append({"of": "seeds", "x": n, **settings})
    return points


def growth_point(point: Row, sizes: Sizes) -> Row:
    """Seconds of a step or of a training, in this process, and the memory that it takes, in GB.

    A step in the state "end" has no figure of memory: to make the state takes more.
    """
    make_reproducible()
    settings = settings_of("speed", PROFILE)
    if "phase" in point:
        settings = step_settings(256, point["x"], settings.k_min, sizes.batch)
        x_NBD = torch.randn(4, sizes.batch, 256, generator=torch.Generator().manual_seed(0))
        b_enc = torch.zeros(point["x"])
        if point["phase"] != "start":
            b_enc, _ = state_of(settings, x_NBD, point["phase"])
        held = peak_memory_gb()
        warm = call = our_step(settings, x_NBD, False, point["phase"], b_enc)
        calls = sizes.steps
    else:
        changes = {name: value for name, value in point.items() if name not in ("of", "x")}
        settings = dataclasses.replace(settings, **changes)
        dtype = choose_train_dtype(settings, torch.device("cpu"))
        lm = for_harvest(dtype, settings)
        texts = training_texts(lm, settings, settings.training_tokens)
        held = peak_memory_gb()
        call, calls = our_training(lm, texts, settings), 1
        short = dataclasses.replace(settings, training_tokens=settings.batch)
        warm = our_training(lm, texts, short)
    warm()
    seconds = []
    for _ in range(calls):
        began = now(torch.device("cpu"))
        call()
        seconds.append(now(torch.device("cpu")) - began)
    figures = {"seconds": statistics.median(seconds)}
    if point.get("phase") != "end":
        figures["memory, GB"] = peak_memory_gb() - held
    return figures


def in_fresh_process(point: Row, sizes: Sizes) -> Row:
    """`growth_point` in a process of its own, whose memory has held nothing else."""
    tiny = ["--tiny"] if sizes == TINY else []
    command = [sys.executable, __file__, "--point", json.dumps(point), *tiny]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def exponent(xs: list[float], ys: list[float]) -> float:
    """The slope of log y over log x by least squares."""
    return statistics.linear_regression([*map(math.log, xs)], [*map(math.log, ys)]).slope


def growth_rows(sizes: Sizes) -> list[Row]:
    """A row per point: medians over rounds that take all points in turn; exponents at the end."""
    points = growth_points(sizes)
    found = [[in_fresh_process(point, sizes) for point in points] for _ in range(sizes.rounds)]
    rows = []
    for point, results in zip(points, zip(*found)):
        row = {"what grows": point["of"], "seconds of": "training", "number": point["x"]}
        if "phase" in point:
            row["seconds of"] = f"a step, {point['phase']}"
        for figure in results[0]:
            row[figure] = statistics.median(one[figure] for one in results)
        rows.append(row)
    for some in lines_of_growth(rows).values():
        for figure in ("seconds", "memory, GB"):
            if figure in some[0]:
                numbers, values = zip(*((row["number"], row[figure]) for row in some))
                some[-1][f"exponent of {figure}"] = exponent(numbers, values)
    return rows


def lines_of_growth(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows by what grows and whose seconds they are."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["what grows"], row["seconds of"]), []).append(row)
    return lines


def growth_section(sizes: Sizes, device: torch.device) -> Points:
    """Seconds and memory against size."""
    yield "all", functools.partial(growth_rows, sizes)


def draw_growth(rows: list[Row], path: Path) -> None:
    """The growth section's rows as a figure: seconds and memory, a column per thing that grows.

    Both axes of a panel span as many decades, so that a slope of 1 is a diagonal everywhere.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row["what grows"] for row in rows))
    figure, axes = pyplot.subplots(2, len(kinds), figsize=(3.2 * len(kinds), 6.2), squeeze=False)
    for (kind, what), some in lines_of_growth(rows).items():
        column = axes[:, kinds.index(kind)]
        for axis, measure in zip(column, ("seconds", "memory, GB")):
            axis.set_xlabel(kind)
            axis.set_ylabel(measure)
            if measure in some[0]:
                numbers, values = zip(*((row["number"], row[measure]) for row in some))
                slope = some[-1][f"exponent of {measure}"]
                axis.loglog(numbers, values, "o-", label=f"{what}: exponent {slope:.2f}")
    for axis in axes.flat:
        xs, ys = zip(*(point for line in axis.lines for point in line.get_xydata()))
        ratio = 1.5 * max(max(xs) / min(xs), max(ys) / min(ys)) ** 0.5
        for values, limit in ((xs, axis.set_xlim), (ys, axis.set_ylim)):
            middle = math.sqrt(min(values) * max(values))
            limit(middle / ratio, middle * ratio)
        axis.set_xticks(sorted(set(xs)), [f"{x:,.0f}" for x in sorted(set(xs))], fontsize=8)
        axis.set_yticks([min(ys), max(ys)], [f"{y:.3g}" for y in (min(ys), max(ys))], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------------- all of it

SECTIONS: dict[str, Callable[[Sizes, torch.device], Points]] = {
    "step": step_section,
    "harvest": harvest_section,
    "training": training_section,
    "evaluation": evaluation_section,
    "loop": loop_section,
    "growth": growth_section,
}


def circumstances(results: Results) -> str:
    """On what it was measured, and when."""
    versions = results.where["versions"]
    named = ", ".join(
        f"{name} {versions[name]}"
        for name in ("torch", "transformers", "sae-lens", "sae-bench", "transformer-lens")
        if name in versions
    )
    where = f"{results.where['machine']}, {results.where['cores']} cores"
    return f"{where}; {named}; {', '.join(sorted(results.dates))}."


def main(argv: list[str] | None = None) -> int:
    """Reads the flags, measures what is asked, and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--points", default="", help="only those whose name has this: bfloat16")
    parser.add_argument("--out", type=Path, help="file that each point is appended to")
    parser.add_argument("--figure", type=Path, help="of growth; by default bench/growth.png")
    parser.add_argument("--rounds", type=int, help="turns of each contender; by default 3")
    parser.add_argument("--tokens", type=int, help="of `training`; by default 131072")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, and no figure by default")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sizes = TINY if args.tiny else Sizes()
    given = {"rounds": args.rounds, "tokens": args.tokens}
    sizes = dataclasses.replace(sizes, **{size: n for size, n in given.items() if n})
    if args.point:
        print(json.dumps(growth_point(args.point, sizes)))
        return 0
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: choose of {', '.join(SECTIONS)}")
    make_reproducible()
    cpu = torch.device("cpu")
    for section in chosen:
        devices = [cpu]
        if section == "step" and torch.cuda.is_available():
            devices.append(torch.device("cuda"))
        for device in devices:
            results = Results(args.out, sizes, device)
            rows: list[Row] = []
            with tempfile.TemporaryDirectory() as folder:
                for point, measure in SECTIONS[section](sizes, device):
                    if args.points not in point:
                        continue
                    with redirect_output(Path(folder) / "log"):
                        rows += results.rows(section, point, measure)
            if not rows:
                parser.error(f"no point of {section} has {args.points!r} in its name")
            print(f"\n## {section}\n\n{table(rows)}\n\n{circumstances(results)}", flush=True)
            if section == "growth" and (args.figure or not args.tiny):
                draw_growth(rows, args.figure or ROOT / "bench" / "growth.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
