"""What plot.py reads: the records of runs, as frames. No torch."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import lzma
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from harness.curves import ASIDE, method_code, on_one_curve
from harness.verdict import (
    PRIMARY,
    PRIMARY_KS,
    Curve,
    compare_records,
    mean,
    verdict,
    with_current_names,
)

# Colours that are told apart with red-green blindness, too: Okabe and Ito's without yellow (too
# faint for a line on white), then four of Tol's kind. Black and grey are kept for references.
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#332288", "#882255",
    "#999933", "#7F4F24",
)  # fmt: skip
MARKERS = ("", "s", "^", "o", "D")


@dataclass(frozen=True, eq=False)
class Run:
    """What a folder run_* says of itself; its figures stand in `Report.records`."""

    name: str
    label: str
    profile: str
    given: bool
    tests: str  # what it tests, in words
    settings: dict
    config: dict  # config.json
    log: pd.DataFrame | None  # by number of training tokens; columns (metric, layer, seed)
    folder: Path
    code: str  # of the method, see `method_code`
    unfinished: str = ""  # "unfinished: 43% of training": it has no figures, or not yet


@dataclass(frozen=True, eq=False)
class Report:
    """What the figures and tables of one profile are made from."""

    runs: list[Run]  # in the order shown
    reference: Run | None
    records: pd.DataFrame  # long: run, layer, seed, metric, value; also of a reference not shown
    # Other trainers over L0: method, l0, fvu, ce_loss_score, `PRIMARY`, a row per point.
    trainers: pd.DataFrame | None = None

    @functools.cached_property
    def by_run(self):
        """(run) x (metric): means over layers, NaN unless every layer has the metric."""
        return summary(self.records, ["run", "layer"]).groupby("run").agg(lambda v: mean(list(v)))

    @functools.cached_property
    def logged_layers(self):
        return sorted({layer for run in self.runs if run.log is not None
                       for layer in run.log.columns.unique("layer")})

    @functools.cached_property
    def curves(self):
        """The runs by method: lists of those that differ in nothing but what moves L0."""
        found = []
        for run in (run for run in self.runs if not run.given):
            mine = next((curve for curve in found if same_method(run, curve[0])), None)
            found.append([run]) if mine is None else mine.append(run)
        return found

    @functools.cached_property
    def styles(self):
        """Colour, of its method, and marker of each run, the same in every figure."""
        looks, same = {}, Counter()  # of one colour: a method's runs, and the eleventh method's
        for i, curve in enumerate(self.curves):
            for run in curve:
                colour = COLOURS[i % len(COLOURS)]
                looks[run] = colour, MARKERS[same[colour] % len(MARKERS)]
                same[colour] += 1
        return {run: looks[run] for run in self.runs if run in looks}

    @property
    def complete(self):
        return [run for run in self.runs if not run.unfinished]

    @functools.cached_property
    def full_probe(self):
        """The metric of the model's probe on all dimensions, and what to note of SAE-Bench's."""
        ours = "llm_all_test_accuracy" in set(self.records["metric"])
        return ("llm_all_test_accuracy", "") if ours else ("llm_test_accuracy", " (best epoch)")

    def unlike(self, run, but=()):
        """What forbids to compare a run to the reference, or else the first run; "": nothing."""
        base = self.reference or next((run for run in self.complete if not run.given), run)
        return compare_records(run.config, base.config).reasons(but)

    def reference_curve(self, run):
        """The `Curve` that a run at another L0 is held against, as `harness.reference` has it."""
        if self.reference is None:
            return Curve({})
        if same_method(run, self.reference):
            return Curve({}, f"on {self.reference.name}'s own curve")
        mine = [other for other in {self.reference: 0} | dict.fromkeys(self.complete)
                if other is self.reference or same_method(other, self.reference)]
        return Curve({other.name: lists for other in mine
                      if (lists := per_seed(self.records, other))})

    def value(self, run, metric):
        """A metric's mean over the run's layers; NaN where one lacks it."""
        return float(self.by_run.get(metric, {}).get(run.name, math.nan))


def same_method(mine, theirs):
    """Whether two runs are points of one curve over L0."""
    return mine is theirs or (mine.code == theirs.code
                              and on_one_curve(mine.config, theirs.config))


def complain(sentence):
    print(f"plot.py: {sentence}", file=sys.stderr)


def number(value):
    """value as a float, or NaN when it's missing, null or no finite number."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else math.nan


def read_text(path):
    opened = lzma.open if path.suffix == ".xz" else open
    try:
        with opened(path, "rt", encoding="utf-8", errors="replace") as file:
            return file.read()
    except (OSError, lzma.LZMAError) as error:
        raise ValueError(f"{path} can't be read ({getattr(error, 'strerror', error)})") from error


def read_json(path):
    """The JSON object in path; a ValueError in one sentence when there is none."""
    try:
        if isinstance(content := json.loads(read_text(path)), dict):
            return content
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    raise ValueError(f"{path} should hold a JSON object and holds a {type(content).__name__}")


def read_records(path, info, run, seeds):
    """final_info.json's content as rows (run, layer, seed, metric, value), with the primary metric.

    Beside the SAE's (`PRIMARY`) stand those of the untrained SAE and of the language model's own
    dimensions. Raises ValueError, naming the file, where a layer has no figures.
    """
    rows = []
    for key, record in info.items():
        if not (match := re.fullmatch(r"layer_(\d+)", key)):
            continue
        per_seed = record.get("final_info_dict") if isinstance(record, dict) else None
        if not isinstance(per_seed, dict):
            raise ValueError(f"{path} has no final_info_dict under {key}")
        per_seed = {metric: [number(value) for value in values]
                    for metric, values in with_current_names(per_seed).items()
                    if isinstance(values, list)}
        for who in ("sae", "untrained", "llm"):
            probes = [per_seed.get(f"{who}_top_{k}_test_accuracy", ()) for k in PRIMARY_KS]
            per_seed[PRIMARY if who == "sae" else f"{who}_{PRIMARY}"] = [
                mean(values) for values in zip(*probes)]
        for metric, values in per_seed.items():
            named = isinstance(seeds, list) and len(seeds) == len(values)
            rows += [(run, int(match[1]), seed, metric, value)
                     for seed, value in zip(seeds if named else range(len(values)), values)]
    if not rows:
        raise ValueError(f"{path} has no layer_… key, so nothing to show")
    return rows


def read_log(path, growing=False):
    """train_log.jsonl as a frame, `Run.log`.

    A resumed run may log a step twice; the later line counts. Of one that is growing the last line
    may be half-written. Raises ValueError, naming file and line, for a line that isn't a JSON
    object with layer, seed and tokens.
    """
    steps, lines = {}, read_text(path).splitlines(keepends=True)
    if growing and lines and not lines[-1].endswith("\n"):
        del lines[-1]
    for i, line in enumerate(lines, 1):
        try:
            entry = with_current_names(json.loads(line))
            key = float(entry.pop("tokens")), int(entry.pop("layer")), int(entry.pop("seed"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {i}, is not a JSON object with layer, seed and tokens "
                             f"({type(error).__name__}: {error})") from error
        steps[key] = {metric: number(value) for metric, value in entry.items()}
    if not steps:
        raise ValueError(f"{path} is empty")
    index = pd.MultiIndex.from_tuples(steps, names=["tokens", "layer", "seed"])
    return pd.DataFrame(list(steps.values()), index=index).unstack(["layer", "seed"])


def progress(log, settings):
    """ "unfinished: 43% of training", by the last line of a log."""
    total, done = settings.get("training_tokens"), float(log.index.max())
    if not number(total) > 0:
        return f"unfinished: {done:,.0f} tokens"
    part = min(done / total, 1)
    return f"unfinished: {100 * part:.0f}% of training" if part < 0.99 else "trained, not scored"


def load_run(folder, labels=None):
    """A folder's Run and its records; a ValueError in one sentence if it can't be shown at all.

    A run without final_info.json is unfinished where it has a log to show: it goes on, or failed.
    """
    name, plain = folder.name, folder / "train_log.jsonl"
    logs = [path for path in (plain.with_name("train_log.jsonl.xz"), plain) if path.exists()]
    complete = (folder / "final_info.json").exists()
    if not complete and not logs:
        raise ValueError(f"there is no {folder / 'final_info.json'}, nor a train_log.jsonl")
    config = read_json(folder / "config.json")
    profile, settings = config.get("profile"), config.get("settings")
    if not isinstance(profile, str) or not re.fullmatch(r"\w[\w.-]*", profile):
        raise ValueError(f"{folder / 'config.json'} should name a profile and has {profile!r}")
    settings = with_current_names(settings) if isinstance(settings, dict) else {}
    given, log, records, unfinished = bool(config.get("given")), None, [], ""
    if complete:
        info = read_json(folder / "final_info.json")
        records = read_records(folder / "final_info.json", info, name, settings.get("seeds"))
    try:  # run_0 was never trained: there is nothing to log
        log = None if given else read_log((logs or [plain])[0], not complete)
    except ValueError as error:
        if not complete:
            raise ValueError(f"there is no {folder / 'final_info.json'} and {error}") from error
        complain(f"{error}: {name} stands in the tables and is left out of the curves.")
    if not complete:
        unfinished = progress(log, settings)
    tests = next((text for source in (settings, config) for key in ("description", "tests", "note")
                  if isinstance(text := source.get(key), str) and text), "")
    run = Run(name, (labels or {}).get(name, name), profile, given, tests, settings, config, log,
              folder, method_code(folder, config), unfinished)
    return run, records


def natural(name):
    """A key by which run_2 comes before run_10, and run_k_8 before run_k_16."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part)
            for part in re.split(r"(\d+)", name)]


def run_folders(root):
    """{name: the folders of runs of that name}: in root, and in its folders named as a profile is.

    The latter come first.
    """
    here, inside = ([folder for folder in sorted(root.glob(pattern)) if folder.is_dir()]
                    for pattern in ("run_*", "*/run_*"))
    profiles = set()
    for folder in (*here, *inside):
        with contextlib.suppress(ValueError):
            profiles.add(str(read_json(folder / "config.json").get("profile")))
    found = {}
    for folder in (*(folder for folder in inside if folder.parent.name in profiles), *here):
        found.setdefault(folder.name, []).append(folder)
    return found


def load_reports(root, labels, reference):
    """{profile: Report} of the runs to show, in order; a profile's reference may not be shown.

    labels: {run: label}, in the order wanted; empty: all runs in root and in the folders there that
    are named after a profile. reference: a run's name. Profiles may have runs of the same name.
    """
    folders, found = run_folders(root), {}
    # A run that was set aside is shown only if asked for.
    names = list(labels) or sorted(
        (name for name in folders if not ASIDE.search(name)), key=natural)
    for name in dict.fromkeys([*names, *({reference} & folders.keys())]):
        if name not in folders:
            complain(f"labels names {name}, and there is no folder {root / name}: left out.")
        for folder in folders.get(name, ()):
            shown = folder.relative_to(root)
            try:
                run, records = load_run(folder, labels)
            except ValueError as error:
                complain(f"{error}: {shown} is left out; run it again or remove its folder.")
                continue
            mine = found.setdefault(run.profile, {})
            if name in mine:
                complain(f"{shown} is left out, as {mine[name][0].folder.relative_to(root)} has "
                         f"that name, too, and is of {run.profile}: rename one.")
            else:
                mine[name] = run, records
    reports = {}
    for profile, mine in found.items():
        base = mine[reference][0] if reference in mine else None
        if shown := [run for name, (run, _) in mine.items() if name in names]:
            reports[profile] = Report(
                shown, base if base and not base.unfinished else None,
                pd.DataFrame([row for _, records in mine.values() for row in records],
                             columns=["run", "layer", "seed", "metric", "value"]))
    return reports


def read_densities(folder):
    """{layer: the density of each feature} of a run's features/; empty where it has none."""
    found = {}
    for path in sorted(folder.glob("features/layer_*.json.gz")):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                content = json.load(file)
            values = [float(feature["density"]) for feature in content["features"]]
            found[int(content["layer"])] = np.asarray(values)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            complain(f"{path} can't be read ({type(error).__name__}: {error}): left out.")
    return found


# ---- arithmetic -----------------------------------------------------------------------------

def summary(records, by, statistic=mean):
    """A row per combination of `by`, a column per metric: the statistic of the values there."""
    groups = records.groupby([*by, "metric"])["value"]
    return groups.agg(lambda values: statistic(list(values))).unstack("metric")


def seed_means(records, run, metric):
    """{seed: a metric's mean over the run's layers}, of the seeds that have it on all of them."""
    mine = records[records["run"] == run.name]
    values = mine[mine["metric"] == metric].pivot(index="seed", columns="layer", values="value")
    values = values.reindex(columns=mine["layer"].unique()).dropna()
    return dict(zip(values.index, map(mean, values.to_numpy().tolist())))


def per_seed(records, run):
    """A run's lists per seed, as `verdict` takes them, and FVU; None where one is missing."""
    values = {metric: seed_means(records, run, metric) for metric in (PRIMARY, "l0", "fvu")}
    seeds = [seed for seed in values[PRIMARY] if seed in values["l0"]]
    lists = {metric: [mine.get(seed, math.nan) for seed in seeds]
             for metric, mine in values.items()}
    return {"seed": seeds, **lists} if seeds else None


def compare(records, run, reference, curve=None):
    """The verdict's word against the reference, and its figures; ("-", {}) where there is none.

    None for the reference itself, the given baseline, and a run without figures by seed.
    """
    compared = (run, reference) if reference not in (None, run) and not run.given else ()
    lists = [per_seed(records, each) for each in compared]
    if not lists or None in lists:
        return "-", {}
    sentence, found = verdict(
        *lists, reference.name, compare_records(run.config, reference.config), curve)
    return sentence.split(" (")[0], found


@functools.cache
def curve(run, layer, metric):
    """(tokens, mean, lowest, highest) over the seeds of a logged metric, or None.

    Seeds share their forward passes, so their logging steps agree; where they don't, a seed is
    read between its own steps, on the first seed's tokens, as far as all of them go.
    """
    if run.log is None or (metric, layer) not in run.log.columns:
        return None
    lines = run.log[metric, layer].dropna(axis="columns", how="all")
    if lines.isna().to_numpy().any():
        own = lines.iloc[:, :1].dropna().index
        lines = lines.interpolate("index", limit_area="inside").loc[own].dropna()
    if lines.empty:
        return None
    values = lines.to_numpy()
    return lines.index.to_numpy(), values.mean(1), values.min(1), values.max(1)


