"""This SAE beside SAELens' trainers: the same activations, tokens, width, seeds, scale and export.

    python bench/quality.py [--minutes 150] [--stages sweep,range,curves,seeds,forms]
                            [--methods "BatchTopK;this project (run_10)"]

Each trained and scored SAE is a line of bench/quality.jsonl. What stands there is not made again,
for another stage neither; no training is begun after `--minutes`, and the same command goes on.
Prints the tables of what there is, in Markdown; plot.py draws it.

- `sweep`: learning rate of each method, and for the coefficient of a penalty two values on either
  side of the L0 that is wanted. Seed 100, layer 2. What is chosen has the lowest FVU at L0 = k_min
  (methods with a penalty: on the line through its two values, both axes logarithmic, where they
  are on either side of it).
- `range`: methods with a penalty, at the learning rate chosen, at four values of its coefficient;
  seed 0. One coefficient gives each layer another L0; from here on it is read off these, layer by
  layer, both axes logarithmic.
- `curves`: each method at L0 8, 16, 32 and 64, seed 0.
- `seeds`: each method at L0 = k_min, seeds 0 to 4; run_10 and what it is held against to 9.
- `forms`: forms of this project's method that are no run of the plan, seeds 0 to 2, and what the
  planned ones are at other L0; those in which γ holds L0 at k_min, seeds 0 to 4.

Every SAE is trained by `experiment.train`, on the batches that this project's SAE of the same seed
gets (SAELens' by the setting `trainer`), exported to SAELens' files, read by SAELens, and scored by
the evaluation of a run: core on held-out text, sparse probing on `tinylm/B`, no `extra_evals`. L0
and everything else are of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import experiment
import plot
from bench.common import exported, settings_of
from bench.figures import of, quality_tables, read_rows
from experiment import Settings
from harness.console import Progress, redirect_output
from harness.evaluation.core import core_evaluation
from harness.evaluation.probe_texts import read_probe_texts
from harness.evaluation.probing import sparse_probing
from harness.fused_model import for_harvest
from harness.language_model import load_language_model
from harness.machine import (
    choose_device,
    choose_train_dtype,
    make_reproducible,
    n_cores,
    processor_name,
)
from harness.peers import TANH, TUNED
from harness.start import SOURCES_AT_START
from harness.startup import Run
from harness.store import new_log
from harness.text import TokenStream, documents

FILE = ROOT / "bench" / "quality.jsonl"
STAGES = ("sweep", "range", "curves", "seeds", "forms")
LEARNING_RATES = (7.5e-4, 1.5e-3, 3e-3, 4.5e-3, 6e-3)
L0 = (8, 16, 32, 64)  # of the curves
SWEEP_SEED, SWEEP_LAYERS = 100, (2,)
SEEDS, MORE_SEEDS, FORM_SEEDS = experiment.FIVE, tuple(range(5, 10)), experiment.THREE
OURS, TENTH = "this project (run_1)", "this project (run_10)"
UNWEIGHTED = "this project (run_10 without L_freq)"
UNTRAINED = "untrained"
METRICS = ("l0", "fvu", "ce_loss_score", "frac_alive") + tuple(
    f"{who}_top_{k}_test_accuracy" for who in ("sae", "llm") for k in Settings.probe_ks
)


@dataclasses.dataclass(frozen=True)
class Method:
    """One contender.

    Args:
        kind: the setting `trainer`, or None: this project's.
        sparsity: the setting that L0 follows from; of SAELens' trainers their own name of it.
        near: two of its values between which L0 is k_min; None: it is L0.
        values: of the coefficient in `range`, or of a form's `sparsity`.
        options: settings; of SAELens' trainers `dead_window` and `density_penalty`, and what tells
            a method's rows from others.
    """

    kind: str | None
    sparsity: str = "k"
    near: tuple[float, float] | None = None
    values: tuple[float, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def planned(name: str) -> dict[str, Any]:
    """What the plan's entry changes in the method."""
    changes = experiment.PLAN[name]
    return {field: v for field, v in changes.items() if field not in ("description", "seeds")}


UNWEIGHTED_OPTIONS = planned("run_10") | {"lr": 4.5e-3}  # its best of five
del UNWEIGHTED_OPTIONS["density_penalty"]

METHODS = {
    OURS: Method(None, "k_min"),
    TENTH: Method(None, "k_min", options=planned("run_10")),
    UNWEIGHTED: Method(None, "k_min", options=UNWEIGHTED_OPTIONS),
    "Standard": Method("standard", "l1_coefficient", (1.0, 3.0), (0.6, 1.0, 1.6, 2.7)),
    "TopK": Method("topk"),
    "BatchTopK": Method("batchtopk"),
    # A feature is dead after as many tokens as for run_10; for SAELens' other trainers 100,000.
    "BatchTopK, dead after 30,000": Method("batchtopk", options={"dead_window": 30_000}),
    "BatchTopK, density penalty": Method(
        "batchtopk", options={"density_penalty": planned("run_10")["density_penalty"]}
    ),
    "JumpReLU": Method("jumprelu", "l0_coefficient", (0.5, 2.0), (0.17, 0.35, 0.7, 1.4)),
    "JumpReLU (tanh)": Method(
        "jumprelu_tanh", "l0_coefficient", (0.25, 1.0), (0.1, 0.25, 0.5, 1.0), TANH
    ),
    "Gated": Method("gated", "l1_coefficient", (1.0, 3.0), (0.8, 1.25, 2.0, 3.2)),
    "Matryoshka": Method("matryoshka_batchtopk"),
}
TO_TEN_SEEDS = {TENTH, "BatchTopK", "BatchTopK, density penalty", "Gated"}


def variant(**options: Any) -> Method:
    """run_1's form with other settings, at its own k_min."""
    return Method(None, "k_min", values=(Settings.k_min,), options=options)


HELD = "γ holds L0, temperatures "
FORMS = {
    "run_1": Method(None, "k_min", values=(4, 8, 16, 32, 64, 128)),
    "run_1, theta_lr / 3": variant(theta_lr=Settings.theta_lr / 3),
    "run_1, theta_lr x 3": variant(theta_lr=Settings.theta_lr * 3),
    "run_1, k_start = k_min": variant(k_start_factor=1.0),
    f"{HELD}fixed": variant(activation="relu", tau_sel=0.3, tau_pen=0.15),
    f"{HELD}by descent": variant(activation="relu"),
    f"{HELD}by ascent": variant(activation="relu", theta_rule="ascent"),
    "run_6": Method(None, "gamma", values=(0.005, 0.015, 0.05), options=planned("run_6")),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training: an SAE on each of `layers`. `sparsity` is by layer, `options` the method's."""

    stage: str
    method: str
    seed: int
    lr: float
    layers: tuple[int, ...]
    sparsity: tuple[float, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


class Results:
    """The lines of a file: a dict for each SAE, with what identifies it, metrics, and where."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = read_rows(path)

    def rows_of(self, cell: Cell) -> list[dict[str, Any]]:
        """All of a cell's rows, which are written together, or none."""
        return self.of(**json.loads(json.dumps(dataclasses.asdict(cell))))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Appends lines, all at once; `rows` then has them as they are read from the file."""
        lines = [json.dumps(row) for row in rows]
        self.rows += [json.loads(line) for line in lines]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))

    def of(self, **wanted: Any) -> list[dict[str, Any]]:
        """The rows that have these values."""
        return of(self.rows, **wanted)


@dataclasses.dataclass
class Bench:
    """Everything that is loaded once: language models, probing texts, settings."""

    settings: Settings
    out_dir: Path
    log: Path

    def __post_init__(self) -> None:
        s = self.settings
        device = choose_device(s, "tinylm")
        train_dtype = choose_train_dtype(s, device)
        make_reproducible()
        with redirect_output(self.log):
            lm = load_language_model(s.model, s.lm_dtype, device)
            self.run = Run(
                settings=s,
                probe_texts=read_probe_texts(s, lm.tokenizer, device),
                sae_bench_model=lm.bridge(),
                language_model=for_harvest(lm, train_dtype, s.harvest_contexts, s.context),
                device=device,
                train_dtype=train_dtype,
                out_dir=self.out_dir,
                runs=self.out_dir,
                log=self.log,
                source=SOURCES_AT_START[Path(experiment.__file__).resolve()],
            )

    def train(self, settings: Settings) -> experiment.Training:
        """`experiment.train` on the run's own text and batches.

        Activations are kept from cell to cell, SAEs are not.
        """
        run = dataclasses.replace(self.run, settings=settings)
        texts = documents(settings.training_text, "train")
        with TokenStream(texts, run.language_model.tokenizer, settings.context) as stream:
            buffer = experiment.ActivationBuffer(dataclasses.replace(run, keeps=True), stream)
            return experiment.train(run, buffer)

    def score(self, saes: dict[str, Any], settings: Settings, probing: bool) -> dict[str, dict]:
        """SAE-Bench's figures of exported SAEs, by name; the language model's passes are kept."""
        run = dataclasses.replace(self.run, settings=settings, keeps=True)
        with redirect_output(self.log):
            found = core_evaluation(run, saes, experiment.core_metrics)
            if probing:
                with Progress("sparse probing", len(run.probe_texts) * len(saes), "") as progress:
                    probes = sparse_probing(run, saes, experiment.probe, progress)
                found = {name: row | probes[name] for name, row in found.items()}
        return found


def settings_for(cell: Cell, method: Method, base: Settings) -> Settings:
    """The settings that `experiment.train` gets for a cell."""
    changes: dict[str, Any] = {"seeds": (cell.seed,), "layers": cell.layers}
    k = int(cell.sparsity[0])
    if method.kind is None:
        value = k if method.sparsity == "k_min" else cell.sparsity[0]
        changes |= method.options | {"lr": cell.lr, method.sparsity: value}
    else:
        changes |= TUNED[method.kind] | {"trainer": method.kind, "lr": cell.lr}
        changes |= {"k_min": k} if method.sparsity == "k" else {
            "sparsity_coefficient": tuple(map(float, cell.sparsity))
        }  # fmt: skip
        names = {"dead_window": "dead_feature_window", "density_penalty": "density_penalty"}
        changes |= {names[n]: value for n, value in method.options.items() if n in names}
    return dataclasses.replace(base, **changes)


def untrained(training: experiment.Training, settings: Settings) -> dict[str, Any]:
    """An SAE per layer as this project's start, that keeps k_min features and learned nothing."""
    saes = {}
    for layer, seed in training.saes:
        sae = experiment.new_sae(settings, layer, seed, training.stats[layer], {}, settings.k_min)
        saes[experiment.sae_name(layer, seed)] = exported(sae, settings, layer)
    return saes


def run_cell(cell: Cell, bench: Bench) -> list[dict[str, Any]]:
    """Trains, exports and scores a cell's SAEs: their rows."""
    method = (METHODS | FORMS)[cell.method]
    settings = settings_for(cell, method, bench.settings)
    started = time.monotonic()
    training = bench.train(settings)
    trained_s = time.monotonic() - started
    saes = {
        experiment.sae_name(layer, seed): exported(sae, settings, layer)
        for (layer, seed), sae in training.saes.items()
    }
    probing = cell.stage != "sweep"
    rows = rows_of(cell, settings, bench.score(saes, settings, probing))
    if cell.stage == "seeds" and cell.method == OURS:
        alike = dataclasses.replace(cell, method=UNTRAINED, lr=0.0, options={})
        twins = untrained(training, settings)
        rows += rows_of(alike, settings, bench.score(twins, settings, probing))
    seconds = {"seconds_training": trained_s, "seconds": time.monotonic() - started}
    return [row | seconds for row in rows]


def made_elsewhere(cell: Cell, results: Results) -> list[dict[str, Any]]:
    """The rows of the same training in another stage, or under another name, as this cell's.

    None for those of `seeds` with which untrained SAEs come.
    """
    if cell.stage == "sweep" or (cell.stage, cell.method) == ("seeds", OURS):
        return []

    def same(method: Method) -> tuple:
        return method.kind, method.sparsity, method.options

    known = METHODS | FORMS
    names = [name for name, method in known.items() if same(method) == same(known[cell.method])]
    for stage, name in itertools.product(STAGES[1:], names):
        if rows := results.rows_of(dataclasses.replace(cell, stage=stage, method=name)):
            return [row | {"stage": cell.stage, "method": cell.method} for row in rows]
    return []


def machine() -> dict[str, Any]:
    """Where and when figures are made."""
    return {
        "machine": processor_name(),
        "cores": n_cores(),
        "date": str(datetime.date.today()),
    }


def rows_of(cell: Cell, settings: Settings, figures: dict[str, dict]) -> list[dict[str, Any]]:
    """A row per layer: what identifies it, its figures, and where they were made."""
    where, rows = machine(), []
    for layer, sparsity in zip(cell.layers, cell.sparsity):
        found = figures[experiment.sae_name(layer, cell.seed)]
        row = dataclasses.asdict(cell) | {"layer": layer, "of_layer": sparsity}
        rows.append(row | {m: v for m, v in found.items() if m in METRICS} | where)
    return rows


# ------------------------------------------------------------------------- what is to be made


def line_at(points: list[tuple[float, float]], x: float) -> float:
    """y at x by the straight line through the two nearest points, both axes logarithmic."""
    near = sorted(points, key=lambda point: abs(math.log(point[0] / x)))[:2]
    (x1, y1), (x2, y2) = ((math.log(a), math.log(b)) for a, b in near)
    if x1 == x2:
        return math.exp((y1 + y2) / 2)
    return math.exp(y1 + (y2 - y1) * (math.log(x) - x1) / (x2 - x1))


def sweep_cells(
    methods: dict[str, Method], base: Settings, rates: tuple[float, ...] = LEARNING_RATES
) -> Iterator[Cell]:
    """Every method, learning rate, and two values of a penalty."""
    layers = tuple(layer for layer in base.layers if layer in SWEEP_LAYERS) or base.layers
    for name, method in methods.items():
        for lr, value in itertools.product(rates, method.near or (base.k_min,)):
            sparsity = (value,) * len(layers)
            yield Cell("sweep", name, SWEEP_SEED, lr, layers, sparsity, method.options)


def chosen(name: str, method: Method, base: Settings, results: Results) -> float:
    """The learning rate with which the sweep found the lowest FVU at L0 = k_min.

    Of a penalty's, one that has L0 on either side of it, if any has: a line is no guess far beyond
    its points.
    """
    found: dict[float, list[tuple[float, float]]] = {}
    for row in results.of(stage="sweep", method=name):
        found.setdefault(row["lr"], []).append((row["l0"], row["fvu"]))
    if not method.near:
        return min(found, key=lambda lr: found[lr][0][1])
    around = {lr: p for lr, p in found.items() if min(p)[0] <= base.k_min <= max(p)[0]}
    return min(around or found, key=lambda lr: line_at(found[lr], base.k_min))


def range_cells(methods: dict[str, Method], base: Settings, results: Results) -> Iterator[Cell]:
    """Every method with a penalty at the values of its coefficient, the same on all layers."""
    for name, method in methods.items():
        for value in method.values if method.near else ():
            lr, sparsity = chosen(name, method, base, results), (value,) * len(base.layers)
            yield Cell("range", name, SEEDS[0], lr, base.layers, sparsity, method.options)


def cell_at(
    stage: str, l0: int, seed: int, name: str, method: Method, base: Settings, results: Results
) -> Cell:
    """A method at this L0, on every layer: a penalty's coefficient as `range` has it there."""
    values = []
    for layer in base.layers:
        rows = results.of(stage="range", method=name, layer=layer)
        points = [(row["l0"], row["of_layer"]) for row in rows]
        values.append(line_at(points, l0) if method.near else l0)
    lr = chosen(name, method, base, results)
    return Cell(stage, name, seed, lr, base.layers, tuple(values), method.options)


def curve_cells(methods: dict[str, Method], base: Settings, results: Results) -> Iterator[Cell]:
    """Every method at every L0 of the curves."""
    for (name, method), l0 in itertools.product(methods.items(), L0):
        yield cell_at("curves", l0, SEEDS[0], name, method, base, results)


def seed_cells(
    methods: dict[str, Method], base: Settings, results: Results, seeds: tuple[int, ...] = SEEDS
) -> Iterator[Cell]:
    """Every method at L0 = k_min."""
    for seed, (name, method) in itertools.product(seeds, methods.items()):
        yield cell_at("seeds", base.k_min, seed, name, method, base, results)


def form_cells(forms: dict[str, Method], base: Settings) -> Iterator[Cell]:
    """Every form at its values, at the run's own learning rate."""
    for seed, (name, method) in itertools.product(SEEDS, forms.items()):
        for value in method.values if seed in FORM_SEEDS or name.startswith(HELD) else ():
            sparsity = (value,) * len(base.layers)
            yield Cell("forms", name, seed, base.lr, base.layers, sparsity, method.options)


def arguments_of(
    description: str, stages: tuple[str, ...], known: dict[str, Method], file: Path
) -> argparse.Namespace:
    """What the command line says: minutes, stages, methods of those known, the file of results."""

    def names_of(text: str, between: str, among: Iterable[str]) -> list[str]:
        names = text.split(between)
        if unknown := [name for name in names if name not in among]:
            raise argparse.ArgumentTypeError(f"no {unknown}; there are {list(among)}")
        return names

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=150.0)
    parser.add_argument(
        "--stages", type=lambda text: names_of(text, ",", stages), default=list(stages)
    )
    parser.add_argument(
        "--methods", type=lambda text: names_of(text, ";", known), default=list(known),
        help="names, a semicolon between",
    )  # fmt: skip
    parser.add_argument("--file", type=Path, default=file)
    arguments = parser.parse_args()
    arguments.methods = {name: known[name] for name in arguments.methods}
    return arguments


def make_missing(
    cells: dict[str, Callable[[], Iterator[Cell]]],
    stages: list[str],
    make: Callable[[Cell], list[dict[str, Any]]],
    results: Results,
    minutes: float,
) -> bool:
    """Makes the cells that have no rows yet; False where the time was too short for all.

    Args:
        cells: by stage; a stage's are asked for when the stages before it are complete.
    """
    began = time.monotonic()
    for stage in stages:
        for cell in list(cells[stage]()):
            if results.rows_of(cell):
                continue
            if time.monotonic() - began > minutes * 60:
                print("no time is left; the same command goes on from here")
                return False
            sparsity = "/".join(f"{value:.4g}" for value in cell.sparsity)
            print(f"{stage}: {cell.method}, lr {cell.lr:g}, {sparsity}, seed {cell.seed}")
            results.add(make(cell))
    return True


def main() -> int:
    """Makes what is missing, as long as there is time, and prints the tables."""
    arguments = arguments_of(__doc__.split("\n")[0], STAGES, METHODS | FORMS, FILE)
    results = Results(arguments.file)
    base = settings_of("the defaults")
    methods, forms = (
        {name: method for name, method in arguments.methods.items() if name in known}
        for known in (METHODS, FORMS)
    )
    to_ten = {name: method for name, method in methods.items() if name in TO_TEN_SEEDS}
    cells = {
        "sweep": lambda: sweep_cells(methods, base),
        "range": lambda: range_cells(methods, base, results),
        "curves": lambda: curve_cells(methods, base, results),
        "seeds": lambda: itertools.chain(
            seed_cells(methods, base, results), seed_cells(to_ten, base, results, MORE_SEEDS)
        ),
        "forms": lambda: form_cells(forms, base),
    }
    log = new_log("quality")
    print(f"log: {log}")
    with tempfile.TemporaryDirectory() as folder:
        bench = functools.cache(lambda: Bench(base, Path(folder), log))
        make_missing(
            cells, arguments.stages,
            lambda cell: made_elsewhere(cell, results) or run_cell(cell, bench()), results,
            arguments.minutes,
        )  # fmt: skip
    print(quality_tables(results.rows, plot.load_reports(ROOT).get("tinylm")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
