"""How fast this project is on a GPU: one command, one table, and what falls short of its aim.

    python bench/gpu.py [--minutes 8] [--toy]

Offline, on made-up data at true size and Gemma-2-2b's dimensions with random weights. Contenders
take turns in one process, after a warm-up each, and figures are medians over rounds. A turn is of
several steps without a pause: a GPU is at one while the next is launched. "ratio" is how many times
as fast as the best other this project is, and of a share that share; where the aim is an upper
bound, "ours" is held against it. Peers that aren't installed (bench/peers.txt), or fail, are left
out and named below the table. Rows go to standard error as they come. When the time is over, what
is left is not measured. `--toy` is for the test of this file: toy sizes, also on a CPU, whose
figures mean nothing.

- Steps in bfloat16, this project's at the end of the curriculum as in bench/speed.py, taken as a
  run takes them. "SAEs together" is in tokens per second, summed over SAEs.
- Graph: an SAE's weights after steps in which k falls, a record is made now and then and dead
  features are brought back, taken as graphs and operation by operation.
- Harvest and core evaluation as in bench/full_size.py, but of six SAEs: for each layer one with
  features as sparse as a trained one's, and one as it is initialized.
- Sparse probing of one set of two classes, from its file to the accuracies. Stock SAE-Bench is
  called once per SAE, and keeps the activations of a layer for that layer's second SAE, whose
  figures are compared. Where time is short it is measured on fewer layers.
- A default run, from these: without its start, rehearsal and downloads.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import io
import itertools
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STARTED = time.monotonic()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import experiment
from bench.common import run_on, settings_of
from bench.full_size import (
    BOS,
    GEMMA_2_2B,
    TINY,
    RandomTokens,
    arithmetic_peak,
    build,
    now,
    pass_flops,
    write_text,
)
from bench.peers import Call
from bench.speed import (
    OURS,
    Contender,
    Row,
    alternate,
    cell,
    new_trainer,
    our_harvest,
    phase,
    set_active,
    step_contenders,
    step_settings,
    table,
)
from experiment import Settings
from harness.console import Progress, redirect_output
from harness.errors import first_line
from harness.evaluation.core import prepare_for_sae_bench, shared_core_evals
from harness.evaluation.probe_texts import known_to_stock, read_probe_texts
from harness.evaluation.probing import probing_config, sparse_probing
from harness.fingerprint import versions
from harness.fused_model import for_harvest
from harness.gpu import CapturedSteps
from harness.language_model import LanguageModel
from harness.machine import make_reproducible, processor_name
from harness.probe_sets import known_to_sae_bench, own_sets
from harness.startup import Run
from harness.training import ActivationStats

Shape = tuple[int, int, int, int, int]  # d_in, d_sae, k_min, batch, steps of a turn's call
KEY = (0, 0)  # layer and seed, where there is one SAE
SILENT = -1e3  # a bias with which a feature never fires
N_STEPS = 10**9  # of a training whose state stays as it is while it is measured
CORE_BEFORE = 12_632  # tokens/s of core evaluation, three SAEs, at e848b95 on an H200
NO_GRAPH = "steps are taken operation by operation"  # how harness.gpu's line begins


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    true: bool = True  # Gemma-2-2b's
    rounds: int = 3
    shapes: tuple[Shape, ...] = (
        (2304, 2304, 64, 2048, 20), (2304, 2304, 64, 8192, 20), (2304, 16384, 64, 2048, 20),
        (2304, 65536, 64, 4096, 10),
    )  # fmt: skip
    before: int = 101  # steps of ours at the beginning of a turn, in which graphs are captured
    compared_steps: int = 50
    peak: int = 8192  # size of the matrices that the arithmetic peak is measured with
    passes: int = 8  # of the language model in a turn
    core: tuple[int, int] = (5, 50)  # batches of reconstruction and of sparsity
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # other than the profile's


TOY = Sizes(
    true=False, rounds=1, before=2, compared_steps=20, peak=128, passes=1, core=(1, 2),
    shapes=((32, 64, 4, 64, 2), (32, 64, 4, 128, 2), (32, 128, 4, 64, 1), (32, 256, 4, 64, 1)),
    settings=dict(
        layers=(0, 1, 2), d_sae=96, k_min=8, context=32, harvest_contexts=4, core_prompts=2,
        probe_train=24, probe_test=12, probe_ks=(1, 2, 5), probe_llm_batch=8, probe_sae_batch=12,
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a row is to say: a measurement, and the least or the most that it is to come to."""

    measurement: str
    bound: float
    at_most: bool = False
    unit: str = ""

    @property
    def text(self) -> str:
        """The aim's cell."""
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}{self.unit}"


class Found(NamedTuple):
    """Two cells of a row, and the number that is held against the aim; None: there is none."""

    ours: str
    other: str | None = None
    value: float | None = None


@dataclasses.dataclass
class Bench:
    """What the sections share.

    Attributes:
        folder: for what they write. ends: by `time.monotonic`, when the time is over.
        left_out: contenders that were not measured, and why. said: why steps were not a graph.
        rates: by stage, tokens per second; of sparse probing, classes per second.
    """

    device: torch.device
    sizes: Sizes
    folder: Path
    ends: float
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    said: dict[str, None] = dataclasses.field(default_factory=dict)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    @property
    def card(self) -> str:
        """What is measured on."""
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if cuda else processor_name()

    @functools.cached_property
    def settings(self) -> Settings:
        """The gemma-2-2b profile's."""
        return dataclasses.replace(settings_of("gpu", "gemma-2-2b"), **self.sizes.settings)

    @functools.cached_property
    def lm(self) -> LanguageModel:
        """With random weights, in bfloat16."""
        return build(GEMMA_2_2B if self.sizes.true else TINY, self.device)

    @functools.cached_property
    def model(self) -> Any:
        """The form that SAE-Bench calls."""
        return self.lm.bridge()

    @functools.cached_property
    def stream(self) -> RandomTokens:
        """Contexts for the language model."""
        return RandomTokens(self.lm.hf.config.vocab_size, self.settings.context)

    @functools.cached_property
    def saes(self) -> dict[str, experiment.CustomSAE]:
        """By name two SAEs per layer: as sparse as a trained one, and as it is initialized."""
        s, saes = self.settings, {}
        acts = self.lm.activations(self.stream.contexts(16), s.layers)
        for layer, acts_BLD in zip(s.layers, acts):
            x_ND = acts_BLD[:, s.first_positions :].flatten(0, 1).float()
            for kind in ("", "_untrained"):
                stats = ActivationStats.of(x_ND)
                sae = experiment.new_sae(s, layer, 0, stats, {}, s.k_min)
                if not kind:
                    set_active(sae, x_ND, phase(s, "end")[1])
                name = f"{experiment.sae_name(layer, 0)}{kind}"
                saes[name] = sae.fold_activation_norm_scaling()
        return saes


class Section(NamedTuple):
    """Rows that are measured together. `limited`: by the time that the command has."""

    goals: tuple[Goal, ...]
    measure: Callable[[Bench], list[Found]]
    limited: bool = True


# ---------------------------------------------------------------------- ratios and rows


def times_as_fast(seconds: float, other: float) -> float:
    """How many times as fast what takes `seconds` is as what takes `other` for the same work."""
    return other / seconds


def verdict(value: float | None, goal: Goal) -> str:
    """Whether a number comes up to its aim."""
    if value is None:
        return "not measured"
    met = value <= goal.bound if goal.at_most else value >= goal.bound
    return "met" if met else "short"


def row(goal: Goal, found: Found) -> Row:
    """A row of the table."""
    return {
        "measurement": goal.measurement,
        "ours": found.ours.replace("|", "/"),
        "best other": found.other,
        "ratio": None if goal.at_most else found.value,
        "aim": goal.text,
        "result": verdict(found.value, goal),
    }


def rates_of(rows: list[Row]) -> dict[str, float]:
    """Tokens per second by contender, of those that were measured."""
    return {row["contender"]: row["tokens/s"] for row in rows if "tokens/s" in row}


def against_best(rates: dict[str, float], ours: str) -> Found:
    """One contender beside the fastest of the others, of tokens per second."""
    mine, others = rates[ours], {name: rate for name, rate in rates.items() if name != ours}
    if not others:
        return Found(f"{cell(mine)} tokens/s", "none is installed")
    best = max(others, key=others.get)
    ratio = times_as_fast(1 / mine, 1 / others[best])
    return Found(f"{cell(mine)} tokens/s", f"{cell(others[best])} tokens/s ({best})", ratio)


# ---------------------------------------------------------------------- steps


def random_activations(shape: Shape, device: torch.device) -> Tensor:
    """Four batches, (4, B, D)."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(4, shape[3], shape[0], generator=draw).to(device)


def rates_of_steps(contenders: list[Contender], n: int, bench: Bench) -> dict[str, float]:
    """Tokens per second by contender, whose calls are steps: n of them are measured together.

    Ours take `Sizes.before` steps first: with them each kind of step has its graph.
    """
    def several(contender: Contender) -> Call:
        call = contender.start()
        for _ in range(bench.sizes.before if contender.name.startswith(OURS) else 0):
            call()
        return lambda: sum(call() for _ in range(n))

    contenders = [dataclasses.replace(one, start=functools.partial(several, one))
                  for one in contenders]  # fmt: skip
    rounds = bench.sizes.rounds
    return rates_of(alternate(contenders, bench.device, rounds, calls=2, warmup_calls=1))


def usable(contenders: list[Contender], bench: Bench, where: str) -> list[Contender]:
    """Those that take a step here; the others are noted in `left_out`. Ours are not tried.

    Args:
        where: the shape, in words.
    """
    kept = []
    torch.use_deterministic_algorithms(False)
    for contender in contenders:
        if not contender.name.startswith(OURS):
            try:
                with contender.around():
                    contender.start()()
            except ModuleNotFoundError as error:
                bench.left_out[contender.name] = f"no module {error.name}"
                continue
            except Exception as error:
                bench.left_out[f"{contender.name} at {where}"] = first_line(error)
                continue
            finally:
                free_memory(bench.device)
        kept.append(contender)
    return kept


def step(bench: Bench, shape: Shape, among: str) -> list[Found]:
    """A step at the end of the curriculum, beside the best peer whose name begins so."""
    d_in, d_sae, k_min, batch, n_steps = shape
    settings, ours = step_settings(d_in, d_sae, k_min, batch), f"{OURS}, end"
    x_NBD = random_activations(shape, bench.device)
    contenders = [
        contender for contender in step_contenders(settings, x_NBD, autocast=True)
        if contender.name == ours
        or contender.name.startswith(among) and not contender.name.startswith((OURS, "floor"))
    ]  # fmt: skip
    contenders = usable(contenders, bench, f"{d_in} → {d_sae}")
    return [against_best(rates_of_steps(contenders, n_steps, bench), ours)]


def captured_steps(trainers: dict, device: torch.device) -> CapturedSteps:
    """What takes the steps in a run on a GPU; on a CPU operation by operation."""
    steps = CapturedSteps(trainers, None)
    if device.type != "cuda":
        steps.why_not = "no GPU"
    return steps


def steps_together(settings: Settings, x_NBD: Tensor, keys: list[tuple[int, int]]) -> Call:
    """The steps of SAEs by layer and seed, taken together at the end of the curriculum."""
    stats = dict.fromkeys([layer for layer, _ in keys], ActivationStats.of(x_NBD.flatten(0, 1)))
    run = Run(settings, None, train_dtype="bfloat16")
    trainers = experiment.new_trainers(run, stats, {key: {} for key in keys})
    progress, active = phase(settings, "end")
    for trainer in trainers.values():
        set_active(trainer.sae, x_NBD[0], active)
    steps, numbers = captured_steps(trainers, x_NBD.device), itertools.count()
    first = round(N_STEPS * progress)

    def call() -> float:
        number = next(numbers)
        x = {key: x_NBD[(number + at) % len(x_NBD)] for at, key in enumerate(keys)}
        at = {key: t.at(first + number, N_STEPS) for key, t in trainers.items()}
        steps.step(x, at, number % settings.log_every == 0)
        return settings.batch * len(keys)

    return call


def together(bench: Bench) -> list[Found]:
    """Three layers' SAEs, and five seeds', beside one alone: tokens per second of all."""
    shape = bench.sizes.shapes[0]
    settings = step_settings(*shape[:4])
    x_NBD = random_activations(shape, bench.device)
    alone, layers, seeds = (f"{OURS}, {what}" for what in ("one SAE", "layers", "seeds"))
    keys = {alone: [KEY], layers: [(n, 0) for n in range(3)], seeds: [(0, n) for n in range(5)]}
    contenders = [
        Contender(name, functools.partial(steps_together, settings, x_NBD, some))
        for name, some in keys.items()
    ]
    rates = rates_of_steps(contenders, shape[4], bench)
    bench.rates["SAE steps"] = rates[layers]
    return [against_best({name: rates[name], "one SAE alone": rates[alone]}, name)
            for name in (layers, seeds)]  # fmt: skip


def trained(settings: Settings, x_NBD: Tensor, n_steps: int, capture: bool) -> tuple[Any, str]:
    """An SAE after all steps of a training, some of whose features were dead at first.

    Returns:
        it, and why its steps were not taken as graphs; "": they were.
    """
    trainer = new_trainer(settings, x_NBD, autocast=True)
    some = slice(settings.d_sae // 16)
    trainer.sae.b_enc.data[some] = SILENT
    steps = captured_steps({KEY: trainer}, x_NBD.device)
    if not capture:
        steps.why_not = "not asked for"
    for number in range(n_steps):
        x, at = x_NBD[number % len(x_NBD)], trainer.at(number, n_steps)
        steps.step({KEY: x}, {KEY: at}, number % settings.log_every == 0)
    if (trainer.sae.b_enc[some] < SILENT / 2).any():
        raise RuntimeError("dead features were not brought back")
    return trainer.sae, steps.why_not or ("" if steps.graphs else "no kind of step came again")


def relative_difference(one: Any, other: Any) -> float:
    """The largest ‖a − b‖ / ‖b‖ of the weights of two SAEs; NaN where one isn't a number."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    pairs = [(a.detach().double(), b.detach().double()) for a, b in pairs]
    return float(torch.stack([(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in pairs]).max())


def graph(bench: Bench) -> list[Found]:
    """Steps as graphs beside the same ones operation by operation."""
    shape = bench.sizes.shapes[0]
    settings = dataclasses.replace(
        step_settings(*shape[:4]), lr=3e-4, theta_lr=1e-2, dead_feature_window=4 * shape[3],
        resample_every=5, log_every=10, curriculum_fraction=0.3,
    )  # fmt: skip
    given = settings, random_activations(shape, bench.device), bench.sizes.compared_steps
    with as_in_a_run():
        plain, _ = trained(*given, capture=False)
        graphs, why_not = trained(*given, capture=True)
    apart = relative_difference(graphs, plain)
    value = math.inf if why_not else apart  # steps that are no graph don't come up to the aim
    taken = f"no graph was taken: {why_not}" if why_not else "a graph was taken"
    return [Found(f"{apart:.3g}; {taken}", None, value if bench.device.type == "cuda" else None)]


# ---------------------------------------------------------------------- the language model


@contextlib.contextmanager
def as_in_a_run() -> Iterator[None]:
    """PyTorch's deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def harvest(bench: Bench) -> list[Found]:
    """The activations of three layers, and the share of the peak that this is."""
    s, lm, sizes, device = bench.settings, bench.lm, bench.sizes, bench.device
    peak = arithmetic_peak(device, sizes.peak)
    with as_in_a_run():
        fast = for_harvest(lm, "bfloat16", s.harvest_contexts, s.context)
    tokens_NL = bench.stream.contexts(sizes.passes * s.harvest_contexts)
    ours, plain = f"{OURS}, {type(fast).__name__}", f"{OURS}, plain"
    contenders = [
        Contender(name, functools.partial(our_harvest, form, tokens_NL, s))
        for name, form in ((ours, fast), (plain, lm))
    ]
    rates = rates_of(alternate(contenders, device, sizes.rounds, warmup_rounds=1))
    bench.rates["harvest"] = rates[ours]
    peak = max(peak, arithmetic_peak(device, sizes.peak))
    passed = s.context / (s.context - s.first_positions)  # tokens, for each that counts
    flops = passed * pass_flops(lm.hf.config, s.context, max(s.layers) + 1, logits=False)
    share = rates[ours] * flops / peak
    form = f" ({type(fast).__name__})"
    found = against_best({ours: rates[ours], "plain LanguageModel": rates[plain]}, ours)
    return [
        found._replace(ours=found.ours + form),
        Found(f"{rates[ours] * flops / 1e12:.4g} TFLOP/s", f"{peak / 1e12:.4g} TFLOP/s", share),
    ]


def core_rate(saes: dict[str, Any], bench: Bench, settings: Settings) -> float:
    """Core evaluation's tokens of text per second, from the moment when the first is drawn."""
    times: list[float] = []

    def advance(n: int) -> None:
        times.append(now(bench.device))

    shared_core_evals(saes, bench.model, settings, experiment.core_metrics, advance)
    n_batches = settings.core_reconstruction_batches + settings.core_sparsity_batches
    n_tokens = n_batches * settings.core_prompts * settings.context
    return n_tokens / (now(bench.device) - times[0])


def core(bench: Bench) -> list[Found]:
    """Core evaluation of all SAEs, beside what three took at an earlier commit."""
    s, n_contexts = bench.settings, (sum(bench.sizes.core) + 1) * bench.settings.core_prompts
    text = write_text(bench.folder / "core_text", bench.stream, n_contexts)

    def with_batches(reconstruction: int, sparsity: int) -> Settings:
        batches = dict(core_reconstruction_batches=reconstruction, core_sparsity_batches=sparsity)
        return dataclasses.replace(s, core_text=str(text), **batches)

    settings = with_batches(*bench.sizes.core)
    with as_in_a_run():
        ready = {name: prepare_for_sae_bench(sae, settings) for name, sae in bench.saes.items()}
        core_rate(ready, bench, with_batches(1, 1))  # warms up
        rates = [core_rate(ready, bench, settings) for _ in range(bench.sizes.rounds)]
    rate = bench.rates["core evaluation"] = statistics.median(rates)
    same = bench.sizes.true and "H200" in bench.card
    ratio = times_as_fast(1 / rate, 1 / CORE_BEFORE) if same else None
    before = f"{CORE_BEFORE} tokens/s (this project at e848b95, three SAEs, on an H200)"
    return [Found(f"{cell(rate)} tokens/s", before, ratio)]


# ---------------------------------------------------------------------- sparse probing


def write_probe_set(path: Path, settings: Settings, vocab_size: int) -> Path:
    """Texts of two classes as long as a context, which tell by how frequent some tokens are."""
    draw, n = random.Random(0), (settings.probe_train + settings.probe_test) // 2
    third = (vocab_size - BOS - 1) // 3  # a third of the tokens is its own, of each class

    def token(label: int) -> int:
        low = label * third if draw.random() < 0.1 else 2 * third
        return BOS + 1 + draw.randrange(low, low + third)

    with path.open("w") as file:
        for label in [0, 1] * n:
            text = " ".join(str(token(label)) for _ in range(settings.context - 1))
            file.write(json.dumps({"text": text, "label": str(label)}) + "\n")
    return path


@contextlib.contextmanager
def empty_store(folder: Path) -> Iterator[None]:
    """Nothing that an earlier run has kept is found."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "store")
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


Figures = dict[str, dict[str, float]]  # by SAE, by metric


def our_probing(bench: Bench, settings: Settings) -> tuple[float, Figures]:
    """`sparse_probing` of all SAEs, from the texts on: seconds and figures."""
    lm, model, saes, device = bench.lm, bench.model, bench.saes, bench.device
    with empty_store(bench.folder), as_in_a_run():
        began = now(device)
        texts = read_probe_texts(settings, lm.tokenizer, device)
        folder = bench.folder / "run"
        run = run_on(lm, settings, sae_bench_model=model, probe_texts=texts, out_dir=folder)
        progress = Progress("sparse probing", len(saes), "SAEs")
        figures = sparse_probing(run, saes, experiment.probe, progress)
        return now(device) - began, figures


def stock_probing(bench: Bench, settings: Settings) -> tuple[dict[int, float], Figures]:
    """Stock SAE-Bench, called once per SAE: seconds by layer, as many as there is time for.

    Figures are of the last SAE of each layer: its call finds the activations stored, and so draws
    the probes that this project draws (`peers.stock_evaluation`).
    """
    from sae_bench.evals.sparse_probing import main as stock

    seconds: dict[int, float] = {}
    figures: Figures = {}
    ready = {name: prepare_for_sae_bench(sae, settings) for name, sae in bench.saes.items()}
    load = torch.load
    torch.load = lambda path: load(path, weights_only=False)  # SAE-Bench's own, just written
    try:
        with known_to_stock(own_sets(settings)):
            for layer in settings.layers:
                if seconds and bench.left() < 1.3 * max(seconds.values()):
                    break
                began = now(bench.device)
                with tempfile.TemporaryDirectory(dir=bench.folder) as artifacts:
                    for name, sae in ready.items():
                        if sae.cfg.hook_layer == layer:
                            last, (found, _) = name, stock.run_eval_single_sae(
                                probing_config(settings), sae, bench.model, str(bench.device),
                                artifacts, True,
                            )  # fmt: skip
                seconds[layer] = now(bench.device) - began
                figures[last] = {m: v for m, v in found.items() if "_top_" in m}
    finally:
        torch.load = load
    return seconds, figures


def compared_figures(ours: Figures, stock: Figures) -> tuple[int, float]:
    """Of the figures that stock has: how many, and by how much one differs from ours at most."""
    apart = [abs(ours[sae][metric] - value) for sae, found in stock.items()
             for metric, value in found.items()]  # fmt: skip
    return len(apart), max(apart)


def probing(bench: Bench) -> list[Found]:
    """Sparse probing of all SAEs and of the language model on one set, beside stock SAE-Bench."""
    vocab_size = bench.lm.hf.config.vocab_size
    path = write_probe_set(bench.folder / "probes.jsonl", bench.settings, vocab_size)
    text = write_text(bench.folder / "probing_core_text", bench.stream, 2)  # it is looked at
    settings = dataclasses.replace(
        bench.settings, probe_sets=(str(path),), core_text=str(text)
    )
    seconds, ours = our_probing(bench, settings)
    bench.rates["sparse probing"] = 2 / seconds  # the classes of the set
    by_layer, stock = stock_probing(bench, settings)
    n_layers = len(settings.layers)
    took = sum(by_layer.values()) * n_layers / len(by_layer)
    how = "stock SAE-Bench"
    if len(by_layer) < n_layers:
        how += f", measured on {len(by_layer)} of {n_layers} layers and multiplied"
    n_figures, apart = compared_figures(ours, stock)
    compared = f"{n_figures} figures differ by at most {apart:.2g}"
    ratio = times_as_fast(seconds, took)
    return [Found(f"{cell(seconds)} s; {compared}", f"{cell(took)} s ({how})", ratio)]


# ---------------------------------------------------------------------- a default run


def minutes_of_run(
    rates: dict[str, float], settings: Settings, n_classes: int
) -> dict[str, float]:
    """By stage of a run, how long it takes at these rates (`Bench.rates`).

    Args:
        n_classes: of all its probing sets.
    """
    s, tokens = settings, settings.training_tokens
    n_batches = s.core_reconstruction_batches + s.core_sparsity_batches
    work = {
        "harvest": tokens,
        "SAE steps": tokens * len(s.layers) * len(s.seeds),
        "core evaluation": n_batches * s.core_prompts * s.context,
        "sparse probing": n_classes,
    }
    return {stage: amount / rates[stage] / 60 for stage, amount in work.items()}


def default_run(bench: Bench) -> list[Found]:
    """A default run's minutes, from the stages that were measured."""
    stages = ("harvest", "SAE steps", "core evaluation", "sparse probing")
    if missing := [stage for stage in stages if stage not in bench.rates]:
        return [Found(f"not measured, without {', '.join(missing)}")]
    classes = known_to_sae_bench()
    n_classes = sum(len(classes[name]) for name in bench.settings.probe_sets)
    minutes = minutes_of_run(bench.rates, bench.settings, n_classes)
    parts = ", ".join(f"{stage} {cell(value)}" for stage, value in minutes.items())
    total = sum(minutes.values())
    return [Found(f"{cell(total)} minutes: {parts}", None, total)]


# ---------------------------------------------------------------------- all of it


def sections(bench: Bench) -> list[Section]:
    """All that is measured, in the order of the table."""
    sizes, found = bench.sizes, []
    for shape, bound, among in zip(
        sizes.shapes, (2.5, 2.0, 2.0, 2.0), ("SAELens", "SAELens", "", "")
    ):
        d_in, d_sae, _, batch, _ = shape
        name = f"train step {d_in} → {d_sae}, batch {batch}, and the best of {among or 'all peers'}"
        measure = functools.partial(step, shape=shape, among=among)
        found.append(Section((Goal(name, bound),), measure))
    d_in, d_sae, _, batch, _ = sizes.shapes[0]
    same = f"{d_in} → {d_sae}, batch {batch}"
    goals = [Goal(f"SAEs of {what} together, {same}", 1.0) for what in ("3 layers", "5 seeds")]
    found.append(Section(tuple(goals), together))
    name = f"relative difference of the weights after {sizes.compared_steps} steps as a graph"
    found.append(Section((Goal(f"{name}, {same}", 0.0, at_most=True),), graph))
    layers = ", ".join(map(str, bench.settings.layers))
    goals = [Goal(f"harvest of layers {layers}", 1.4), Goal("its share of the bfloat16 peak", 0.6)]
    found.append(Section(tuple(goals), harvest))
    found.append(Section((Goal("core evaluation of six SAEs", 3.0),), core))
    n_texts = f"{bench.settings.probe_train} / {bench.settings.probe_test}"
    name = f"sparse probing of a set, {n_texts} texts, of six SAEs and the language model"
    found.append(Section((Goal(name, 4.0),), probing))
    goal = Goal("a default gemma-2-2b run, estimated", 15.0, at_most=True, unit=" minutes")
    return [*found, Section((goal,), default_run, limited=False)]


class OutOfTime(BaseException):
    """The command's time is over."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in what runs inside when so many seconds have passed."""
    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10)  # again: it is lost in a destructor, say
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free_memory(device: torch.device) -> None:
    """Gives back what no tensor holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rows_of(section: Section, bench: Bench) -> list[Row]:
    """The rows of a section; where it fails or the time is over, rows that say so."""
    def without(why: str) -> list[Row]:
        return [row(goal, Found(f"not measured, {why}")) for goal in section.goals]

    if section.limited and bench.left() <= 0:
        return without("out of time")
    limit = time_limit(bench.left()) if section.limited else contextlib.nullcontext()
    said = io.StringIO()  # what a run would say
    if bench.device.type == "cuda":
        torch.compiler.reset()  # as in a run, whose shapes are always the same
    try:
        with limit, contextlib.redirect_stdout(said), redirect_output(bench.folder / "log"):
            found = section.measure(bench)
    except OutOfTime:
        return without("out of time")
    except Exception as error:
        traceback.print_exception(error)
        return without(f"{type(error).__name__}: {first_line(error)}")
    finally:
        free_memory(bench.device)
        lines = said.getvalue().splitlines()
        bench.said |= dict.fromkeys(line for line in lines if line.startswith(NO_GRAPH))
    return [row(goal, one) for goal, one in zip(section.goals, found, strict=True)]


def circumstances(bench: Bench) -> str:
    """On what, when and at which sizes it was measured, and what was left out: a paragraph."""
    installed, s, sizes = versions(), bench.settings, bench.sizes
    names = ("torch", "transformers", "sae-lens", "sae-bench", "transformer-lens")
    cuda = f", CUDA {torch.version.cuda}" if bench.device.type == "cuda" else ""
    named = ", ".join(f"{name} {installed[name]}" for name in names if name in installed)
    out = "; ".join(f"{name} ({why})" for name, why in bench.left_out.items())
    said = "".join(f" In a section {line}." for line in bench.said)
    return (
        f"{bench.card}; {named}{cuda}; {datetime.date.today()}. "
        f"{'' if sizes.true else 'Toy sizes, whose figures mean nothing. '}Made-up data, random "
        f"weights, bfloat16; medians of {sizes.rounds} rounds, sparse probing once. Harvest: "
        f"{sizes.passes} passes of {s.harvest_contexts} contexts of {s.context} tokens. Core "
        f"evaluation: {sizes.core[0]} + {sizes.core[1]} batches of {s.core_prompts} contexts; "
        f"d_sae {s.d_sae}. Sparse probing: a set of two classes. "
        f"Left out: {out or 'nothing'}.{said}"
    )


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    """Measures and prints. `started`: when the time began, by `time.monotonic`; None: now."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="that it may take; default 8")
    parser.add_argument("--toy", action="store_true", help="toy sizes, also on a CPU, for a test")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    if not (cuda or args.toy):
        raise SystemExit("bench/gpu.py needs a CUDA GPU, and none is available.")
    make_reproducible()
    sizes, device = TOY if args.toy else Sizes(), torch.device("cuda" if cuda else "cpu")
    ends = (time.monotonic() if started is None else started) + 60 * args.minutes
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, sizes, Path(folder), ends)
        for section in sections(bench):
            some = rows_of(section, bench)
            rows += some
            for one in some:
                print(*(f"{cell(value)};" for value in one.values()), file=sys.stderr, flush=True)
    print(f"{table(rows)}\n\n{circumstances(bench)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
