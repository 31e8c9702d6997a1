"""Figures and tables from the records of the runs: `python plot.py`, no argument.

Reads every folder run_* beside this file that holds a final_info.json, and writes for each profile
figures/<profile>/adaptation, training_losses, training_sparsity, plane, probing, ablation, forest
(.png and .pdf), ablation.md, and index.html, a page of all this and of the runs' features; and into
figures/bench what bench/ measured. Profiles are never mixed. Needs matplotlib, pandas, scipy.
"""

import functools
import json
import lzma
import math
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from harness.report import write_report
from harness.verdict import (
    MAX_L0_RATIO,
    MIN_SEEDS,
    PRIMARY,
    PRIMARY_KS,
    compare_records,
    holm,
    mean,
    paired_difference,
    same_l0,
    stderr,
    verdict,
    with_current_names,
)

# ---- edit here ------------------------------------------------------------------------------

# Run name -> label, in the order wanted. Empty: every run found, under its own name.
labels = {
    # "run_1": "full method",
}
REFERENCE = "run_1"  # differences in the ablation table are to this run

HERE = Path(__file__).resolve().parent
K_VALUES = (1, 2, 5, 10, 20, 50)
BOUNDS = {"tau_sel": (0.1, 0.5), "tau_pen": (0.05, 0.25), "gamma": (0.0, 0.3)}
BAND = " (mean, range over runs)"
GIVEN = "given baseline: untrained, zero weights"

SINGLE, DOUBLE = 3.3, 6.8  # widths of a paper's column and page, inches
# Okabe and Ito's colour-blind-safe palette. Black and grey are kept for references, and yellow is
# left out: it's too faint for a line on white. From the seventh run on, a marker tells them apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("", "s", "^", "o", "D")
GREY = "#777777"
STYLE = {
    "font.size": 7, "axes.titlesize": 7.5, "axes.labelsize": 7, "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5, "ytick.labelsize": 6.5, "axes.linewidth": 0.6, "lines.linewidth": 1.0,
    "lines.markersize": 3, "lines.markerfacecolor": "white", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.5,
    "axes.axisbelow": True, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "legend.frameon": False, "pdf.fonttype": 42, "savefig.dpi": 220,
    "figure.constrained_layout.h_pad": 0.03,
}

# Rows of panels, where a run has them: metric of train_log.jsonl, axis label, axis scale.
CURVES = {
    "adaptation": (
        ("tau_sel", "selection\ntemperature $\\tau_{sel}$", "linear"),
        ("tau_pen", "penalty\ntemperature $\\tau_{pen}$", "linear"),
        ("gamma", "loss weight $\\gamma$", "linear"),
        ("w", "penalty's weight\n$w = \\gamma\\,\\tau_{pen}$", "linear"),
    ),
    "training_losses": (
        ("loss", "loss", "log"),
        ("loss_reconstruction", "reconstruction\n(part of the loss)", "log"),
        ("loss_penalty", "penalty\n$\\gamma\\,L_{pen}$", "log"),
        ("loss_reg", "regularization\n$L_{reg}$", "log"),
        ("loss_density", "cost by frequency\n$\\varphi\\,L_{freq}$", "log"),
    ),
    "training_sparsity": (
        ("l0", "L0\n(active features)", "log"),
        ("fvu", "fraction of variance\nunexplained", "log"),
        ("dead_fraction", "dead features\n(fraction)", "linear"),
    ),
}
# Columns of the tables: metric, Markdown heading, heading in the figure (if there), decimals.
COLUMNS = (
    ("l0", "L0", "L0", 1), ("fvu", "FVU", "FVU", 3),
    ("ce_loss_score", "CE loss score", "CE\nscore", 3),
    ("dead_fraction", "dead fraction", "dead", 3), ("frac_alive", "frac alive", "", 3),
    ("tau_sel", "tau_sel", "$\\tau_{sel}$", 3), ("tau_pen", "tau_pen", "$\\tau_{pen}$", 3),
    ("gamma", "gamma", "$\\gamma$", 3), ("w", "w", "$w$", 4),
)


# ---- reading the records --------------------------------------------------------------------

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


@dataclass(frozen=True, eq=False)
class Report:
    """What the figures and tables of one profile are made from."""

    runs: list[Run]  # in the order shown
    reference: Run | None
    records: pd.DataFrame  # long: run, layer, seed, metric, value; also of a reference not shown

    @functools.cached_property
    def by_run(self):
        """(run) x (metric): means over layers, NaN unless every layer has the metric."""
        return summary(self.records, ["run", "layer"]).groupby("run").agg(lambda v: mean(list(v)))

    @functools.cached_property
    def logged_layers(self):
        return sorted({layer for run in self.runs if run.log is not None
                       for layer in run.log.columns.unique("layer")})

    @functools.cached_property
    def styles(self):
        """Colour and marker of each run, the same in every figure."""
        return {run: (COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)])
                for i, run in enumerate(run for run in self.runs if not run.given)}

    @functools.cached_property
    def full_probe(self):
        """The metric of the model's probe on all dimensions, and what to note of SAE-Bench's."""
        ours = "llm_all_test_accuracy" in set(self.records["metric"])
        return ("llm_all_test_accuracy", "") if ours else ("llm_test_accuracy", " (best epoch)")

    def unlike(self, run, but=()):
        """What forbids to compare a run to the reference, or else the first run; "": nothing."""
        base = self.reference or next((run for run in self.runs if not run.given), run)
        return compare_records(run.config, base.config).reasons(but)

    def value(self, run, metric):
        """A metric's mean over the run's layers; NaN where one lacks it."""
        return float(self.by_run.get(metric, {}).get(run.name, math.nan))


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


def read_log(path):
    """train_log.jsonl as a frame, `Run.log`.

    A resumed run may log a step twice; the later line counts. Raises ValueError, naming file and
    line, for a line that isn't a JSON object with layer, seed and tokens.
    """
    steps = {}
    for i, line in enumerate(read_text(path).splitlines(), 1):
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


def load_run(folder):
    """A folder's Run and its records; a ValueError in one sentence if it can't be shown at all."""
    info, config = (read_json(folder / name) for name in ("final_info.json", "config.json"))
    profile, settings = config.get("profile"), config.get("settings")
    if not isinstance(profile, str) or not re.fullmatch(r"\w[\w.-]*", profile):
        raise ValueError(f"{folder / 'config.json'} should name a profile and has {profile!r}")
    settings = with_current_names(settings) if isinstance(settings, dict) else {}
    records = read_records(folder / "final_info.json", info, folder.name, settings.get("seeds"))
    tests = next((text for source in (settings, config) for key in ("description", "tests", "note")
                  if isinstance(text := source.get(key), str) and text), "")
    name, given, log = folder.name, bool(config.get("given")), None
    try:  # run_0 was never trained: there is nothing to log
        plain, packed = folder / "train_log.jsonl", folder / "train_log.jsonl.xz"
        log = None if given else read_log(packed if packed.exists() else plain)
    except ValueError as error:
        complain(f"{error}: {name} stands in the tables and is left out of the curves.")
    run = Run(name, labels.get(name, name), profile, given, tests, settings, config, log)
    return run, records


def load_reports(root):
    """{profile: Report} of the runs to show, in order; a profile's reference may not be shown."""
    found = {folder.name: folder for folder in root.glob("run_*") if folder.is_dir()}
    # run_3.1 is a complete run_3 that was set aside (prepare_out_dir): only if asked for.
    names = list(labels) or sorted((name for name in found if not re.search(r"\.\d+$", name)),
                                   key=lambda name: (len(name), name))  # run_2 before run_10
    runs, rows = [], []
    for name in dict.fromkeys([*names, *({REFERENCE} & found.keys())]):
        if name not in found:
            complain(f"labels names {name}, and there is no folder {root / name}: left out.")
            continue
        try:
            run, records = load_run(found[name])
        except ValueError as error:
            complain(f"{error}: {name} is left out; run it again or remove its folder.")
            continue
        runs.append(run)
        rows += records
    records = pd.DataFrame(rows, columns=["run", "layer", "seed", "metric", "value"])
    reports = {}
    for profile in dict.fromkeys(run.profile for run in runs if run.name in names):
        mine = {run.name: run for run in runs if run.profile == profile}
        reports[profile] = Report([run for run in mine.values() if run.name in names],
                                  mine.get(REFERENCE), records[records["run"].isin(mine)])
    return reports


# ---- arithmetic and tables ------------------------------------------------------------------

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


def compare(records, run, reference):
    """The verdict's word against the reference, and its figures; ("-", {}) where there is none.

    None for the reference itself, the given baseline, and a run without figures by seed.
    """
    lists = []
    for each in (run, reference) if reference not in (None, run) and not run.given else ():
        scores, l0s = (seed_means(records, each, metric) for metric in (PRIMARY, "l0"))
        lists.append({"seed": [*scores], PRIMARY: [*scores.values()], "l0": [*l0s.values()]})
    if not lists or any([] in columns.values() for columns in lists):
        return "-", {}
    sentence, found = verdict(*lists, reference.name, compare_records(run.config, reference.config))
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


def show(value, decimals, sign=False):
    return f"{value:{'+' if sign else ''}.{decimals}f}" if math.isfinite(value) else "-"


def show_p(p):
    return "< 0.001" if p < 0.001 else show(p, 3)


def pm(value, error, decimals):
    """value ± error; the value alone for one seed (error 0) or an unknown error."""
    return show(value, decimals) + (f" ± {error:.{decimals}f}" if error > 0 else "")


@functools.cache
def ablation_rows(report):
    """The ablation table: a dict per run, then the untrained SAE and the language model.

    Numbers are means over the run's layers and seeds. p is Holm's over all runs that have one.
    """
    records, reference, rows = report.records, report.reference, []
    for run in sorted(report.runs, key=lambda run: run.given):
        word, figures = compare(records, run, reference)
        scores = seed_means(records, run, PRIMARY)
        fvu = [seed_means(records, each, "fvu") for each in (run, reference)
               if "difference" in figures]
        rows.append({
            "run": run, "label": run.label + f" ({run.name})" * (run.label != run.name),
            "tests": GIVEN if run.given else run.tests, "range": "", "seeds": len(scores) or "-",
            "primary": report.value(run, PRIMARY), "stderr": stderr(list(scores.values())),
            "untrained": report.value(run, f"untrained_{PRIMARY}"), "verdict": word,
            "figures": figures, "fvu_figures": paired_difference(*fvu) if fvu else {},
            "fixed": [name for name in BOUNDS if run.settings.get("constants_from_run")
                      or run.settings.get(name) is not None],
            **{metric: report.value(run, metric) for metric, *_ in COLUMNS}})
    for row, p in zip(rows, holm([row["figures"].get("p", math.nan) for row in rows])):
        row["p"] = p
    references = reference_row(report, "untrained", "untrained SAE"), reference_row(
        report, "llm", "language model", ", best k dimensions")
    return rows + [row for row in references if row]


def reference_row(report, who, label, more=""):
    """The row of what is no run, "untrained" or "llm"; None where no run has scored it."""
    name = f"{who}_{PRIMARY}"
    scored = [run for run in report.runs if math.isfinite(report.value(run, name))]
    runs = [run for run in scored if not run.given and not report.unlike(run)]
    if who == "llm":
        runs = runs or scored  # the given baseline's figures of the model are sound
    elif report.reference in runs:  # at its L0
        at = report.value(report.reference, "l0")
        runs = [run for run in runs if same_l0(report.value(run, "l0"), at)]
    if not runs:
        return None
    values = [report.value(run, name) for run in runs]
    text = "same width and L0, never trained" + f": of {len(runs)} runs at one L0" * (len(runs) > 1)
    if who == "llm":
        text = "best k dimensions of the residual stream"
        metric, note = report.full_probe
        if len(full := [v for run in runs if math.isfinite(v := report.value(run, metric))]):
            text += f"; probe on all dimensions{note}: {np.mean(full):.4f}"
    return {"run": None, "label": label, "short": label + more, "tests": text, "fixed": (),
            "primary": np.mean(values), "stderr": 0.0, "figures": {}, "fvu_figures": {},
            "range": f" ({min(values):.4f} to {max(values):.4f})" if np.ptp(values) >= 5e-5 else "",
            "p": math.nan, "verdict": "-", "untrained": math.nan, "seeds": "-",
            **{metric: np.mean([report.value(run, f"{who}_{metric}") for run in runs])
               for metric, *_ in COLUMNS}}


def interval(figures, decimals, gap=" "):
    """The difference that `paired_difference` or `verdict` found, with its 95% interval."""
    text = show(figures.get("difference", math.nan), decimals, sign=True)
    if "ci95_low" in figures:
        text += f"{gap}[{figures['ci95_low']:+.{decimals}f}, {figures['ci95_high']:+.{decimals}f}]"
    return text


def markdown(header, lines):
    """A Markdown table. DataFrame.to_markdown would pad each column to its longest cell."""
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |"
                     for line in [header, ["---"] * len(header), *lines])


def tables(profile, report):
    """Both tables of a profile as Markdown text: a row per run, and a row per run and layer."""
    header = ["run", "what it tests", "primary", f"difference to {REFERENCE}", "p", "verdict",
              f"FVU: difference to {REFERENCE}", "untrained SAE",
              *(heading for _, heading, _, _ in COLUMNS), "seeds"]
    lines = [[row["label"], row["tests"] or "-",
              pm(row["primary"], row["stderr"], 4) + row["range"], interval(row["figures"], 4),
              show_p(row["p"]), row["verdict"], interval(row["fvu_figures"], 4),
              show(row["untrained"], 4),
              *(show(row[metric], digits) + " (fixed)" * (metric in row["fixed"])
                for metric, _, _, digits in COLUMNS), row["seeds"]]
             for row in ablation_rows(report)]
    metrics, headings, digits = zip(
        *((metric, heading, digits) for metric, heading, _, digits in COLUMNS),
        *((f"{who}_top_{k}_test_accuracy", f"{who} top {k}", 4)
          for who in ("sae", "untrained", "llm") for k in PRIMARY_KS),
        (report.full_probe[0], f"llm all{report.full_probe[1]}", 4))
    means, errors = (summary(report.records, ["run", "layer"], statistic).reindex(
        columns=list(metrics)) for statistic in (mean, stderr))
    by_layer = [[run.label, layer, *map(pm, means.loc[run.name, layer],
                                        errors.loc[run.name, layer], digits)]
                for run in report.runs for layer in means.loc[run.name].index]
    unlike = [f"{run.label} ({reasons})" for run in report.runs
              if not run.given and (reasons := report.unlike(run))]
    warning = ["Not comparable with the others: " + "; ".join(unlike) + "."]
    return "\n\n".join([
        f"# Ablation, profile {profile}",
        "primary: mean over layers of the sparse-probing test accuracy at k = 1, 2 and 5, ± "
        f"standard error over seeds (none for one seed). Difference to {REFERENCE}: paired over "
        f"the seeds that both have, from {MIN_SEEDS} seeds on with its 95% interval "
        "(Student's t), p by Holm over all runs, and a verdict, which is \"not comparable\" where "
        f"L0 differs by over {100 * (MAX_L0_RATIO - 1):.0f}% or what must be equal differs. FVU's "
        "difference is paired likewise. The other columns are means over layers. A dash: not "
        "recorded, or nothing to compare.",
        markdown(header, lines), *warning * bool(unlike),
        "## By layer", markdown(["run", "layer", *headings], by_layer)]) + "\n"


# ---- parts of figures -----------------------------------------------------------------------

def save(figure, path):
    figure.savefig(path.with_suffix(".png"))
    figure.set_layout_engine("none")  # the PDF keeps the PNG's layout: computed once
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})  # same in, same out
    plt.close(figure)


def plain_log_axis(axis, low, high):
    """A handful of ticks on a log axis, as plain numbers."""
    decades = np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ([1], [1, 3], [1, 2, 5], range(1, 10), np.arange(10, 100) / 10):
        ticks = [v for d in decades for s in steps if low <= (v := float(s * 10.0**d)) <= high]
        if len(ticks) >= 3:
            break
    shown = ticks[:1]
    for tick in ticks[1:]:  # no two labels closer than an eighth of the axis
        if math.log(tick / shown[-1]) >= math.log(high / low) / 8:
            shown.append(tick)
    axis.set_ticks(shown or [low, high])
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4g}" if 1e-3 < v < 1e4
                                           else f"{v:.2g}".replace("e-0", "e-")))
    axis.set_minor_locator(NullLocator())


def layer_panels(layers, height, n_rows=1, **options):
    """A figure with a column of panels per layer: the figure, and its panels (n_rows, layers)."""
    width = SINGLE if len(layers) == 1 else max(DOUBLE, 1.7 * len(layers))
    figure, grid = plt.subplots(n_rows, len(layers), squeeze=False, layout="constrained",
                                figsize=(width, height), **options)
    for layer, axes in zip(layers, grid[0]):
        axes.set_title(f"layer {layer}")
    return figure, grid


def legend_above(figure, handles=None):
    """A legend over the panels, by default of all labels there, in as many columns as it can."""
    handles = handles or list({label: handle for axes in figure.axes for handle, label in zip(
        *axes.get_legend_handles_labels())}.values())
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), 5, int(figure.get_figwidth() * 19 / (longest + 7))))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=1.8,
                  columnspacing=1.2)


def run_label(run, longest=46):
    """What a figure calls a run: its label, with what it tests where it has no label of its own."""
    text = run.label
    if run.tests and text == run.name and len(run.tests) <= longest:
        text = f"{text}: {run.tests}"
    return text.replace("$", r"\$")  # no mathematics: a stray dollar sign would be an error


def same_curves(curves, scale):
    """Groups of positions in curves whose lines lie on each other, to within 1% of the panel."""
    rescale = np.log if scale == "log" else np.asarray
    values = np.concatenate([rescale(line) for _, line, _, _ in curves])
    tolerance = 0.01 * (np.ptp(values) if np.ptp(values) > 0 else 1)
    groups = {}
    for i, (tokens, line, _, _) in enumerate(curves):
        near = (j for j in groups if np.abs(np.interp(tokens, curves[j][0], rescale(curves[j][1]))
                                            - rescale(line)).max() <= tolerance)
        groups.setdefault(next(near, i), []).append(i)
    return groups.values()


def draw_curves(axes, styled, scale):
    """One panel: a line per (style, curve), the mean over seeds, in a band of all seeds."""
    if scale == "log":
        styled = [(style, [part[line[1] > 0] for part in line]) for style, line in styled
                  if (line[1] > 0).any()]
    for group in same_curves([line for _, line in styled], scale) if styled else []:
        for place, i in enumerate(group):
            (colour, marker), (tokens, mean, low, high) = styled[i]
            if len(tokens) == 1:  # a line of one point would not show
                axes.plot(tokens, mean, color=colour, marker=marker or "o", zorder=3)
                continue
            # Lines that lie on each other take turns, dash by dash, so that each can be seen.
            dashes = "solid" if len(group) == 1 else (4 * place, (4, 4 * (len(group) - 1)))
            axes.plot(tokens, mean, color=colour, linestyle=dashes, marker=marker,
                      markevery=(0.1 * (place % 2), 0.2), zorder=3)
            if scale == "log":
                low = np.maximum(low, mean * 1e-3)
            if (high > low).any():
                axes.fill_between(tokens, low, high, color=colour, alpha=0.18, linewidth=0)


# ---- a function per figure: of a Report, or None where there is nothing to show ---------------

def draw_panels(report, rows):
    """A grid of curves against training tokens: a row of panels per metric, a column per layer."""
    layers, dashed = report.logged_layers, {"linestyle": "--", "linewidth": 0.8}
    curves = {row: [[(style, line) for run, style in report.styles.items()
                     if (line := curve(run, layer, row[0]))] for layer in layers] for row in rows}
    curves = {row: panels for row, panels in curves.items() if any(panels)}
    if not curves:
        return None
    runs = [run for run in report.styles if run.log is not None]
    figure, grid = layer_panels(
        layers, 0.55 + 1.15 * len(curves) + 0.13 * math.ceil(len(runs) / 3), len(curves),
        sharex=True, sharey="row")
    handles = [Line2D([], [], color=report.styles[run][0], marker=report.styles[run][1],
                      label=run_label(run)) for run in runs]
    for ((metric, label, scale), styled), panels in zip(curves.items(), grid):
        positive = any((line[1] > 0).any() for mine in styled for _, line in mine)
        scale = scale if positive else "linear"  # nothing positive: a line at 0 is what was logged
        for layer, mine, axes in zip(layers, styled, panels):
            draw_curves(axes, mine, scale)
            k_ts = [curve(run, layer, "k_t") for run in runs if metric == "l0"]
            for line in {bytes(line[0]) + bytes(line[1]): line for line in k_ts if line}.values():
                axes.plot(*line[:2], color="black", zorder=4, **dashed)  # one for all that share it
            for bound in BOUNDS.get(metric, ()):
                axes.axhline(bound, color=GREY, zorder=1, **dashed)
        first = panels[0]
        first.set_ylabel(label)
        if metric in BOUNDS:
            low, high = BOUNDS[metric]
            first.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        elif scale == "log":
            first.set_yscale("log")
            plain_log_axis(first.yaxis, *first.get_ylim())
        else:
            first.set_ylim(bottom=0, top=None if positive else 1)
            first.yaxis.set_major_locator(MaxNLocator(4))
    shown = {line.get_color() for axes in grid.flat for line in axes.get_lines()}
    handles += [Line2D([], [], color=colour, label=label, **dashed) for colour, label in (
        (GREY, "bounds"), ("black", "$k_t$, the curriculum")) if colour in shown]
    grid[0, 0].set_xlim(left=0)
    grid[0, 0].xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    grid[0, 0].xaxis.set_major_formatter(lambda n, _: f"{n / 1e6:.6g}M" if n else "0")
    figure.supxlabel("training tokens", fontsize=7)
    figure.align_ylabels(grid[:, 0])
    legend_above(figure, handles)
    return figure


def draw_plane(report):
    """Each run's way through the plane of γ and τ_sel, a panel per layer; mean over seeds."""
    ways = {(run, layer): (gamma[1], tau[1]) for run in report.styles
            for layer in report.logged_layers
            if (gamma := curve(run, layer, "gamma")) and (tau := curve(run, layer, "tau_sel"))}
    if not ways:
        return None
    figure, (panels,) = layer_panels(report.logged_layers, 2.6, sharex=True, sharey=True)
    for (run, layer), (gamma, tau) in ways.items():
        axes, (colour, marker) = panels[report.logged_layers.index(layer)], report.styles[run]
        axes.plot(gamma, tau, color=colour, linewidth=0.8)
        axes.plot(gamma[-1:], tau[-1:], color=colour, marker=marker or "o", label=run_label(run))
    for axes in panels:
        axes.plot([0.15], [0.3], "k+", markersize=7)
    panels[0].set_ylabel(r"$\tau_\mathrm{sel}$")
    panels[0].xaxis.set_major_locator(MaxNLocator(4))
    figure.supxlabel(r"$\gamma$ (cross: where training starts; symbol: where it ends)", fontsize=7)
    legend_above(figure)
    return figure


def probe_accuracies(report):
    """The shown runs' probes: columns layer, who, k (NaN: of all dimensions), run, mean, stderr."""
    records = report.records[report.records["run"].isin([run.name for run in report.runs])]
    full = report.full_probe[0].removeprefix("llm_")
    names = records["metric"].str.extract(
        rf"^(?P<who>[a-z]+)_(?:top_(?P<k>\d+)_test_accuracy|{full})$").astype({"k": float})
    probes = records.join(names[names["k"].isna() | names["k"].isin(K_VALUES)])
    values = probes.dropna(subset=["who", "value"]).groupby(
        ["layer", "who", "k", "run"], dropna=False)["value"].agg(list)
    return pd.DataFrame({"mean": values.map(mean), "stderr": values.map(stderr)}).reset_index()


def draw_probing(report):
    """Probing accuracy against k, a panel per layer: SAEs, untrained SAE, language model."""
    probes = probe_accuracies(report)
    if probes.empty:
        return None
    given = probes["run"].isin([run.name for run in report.runs if run.given])
    # The given baseline stands apart, also with its model's figures, where a run has its own.
    references = probes[~given | ~probes["layer"].isin(probes["layer"][~given])]
    others = [run.name for run in report.runs if not run.given and report.unlike(run, "layers")]
    references = references[~references["run"].isin(others)]  # of another language model, say
    without = f" (not of {', '.join(others)})" if others else ""
    spread = references.groupby(["who", "layer", "k"])["mean"].agg(np.ptp)
    banded = set(spread[spread > 5e-4].index.get_level_values("who"))
    layers = sorted(set(probes["layer"]))
    figure, (panels,) = layer_panels(
        layers, 2.4 + 0.13 * math.ceil((len(report.runs) + 3) / 3), sharey=True)
    for layer, axes in zip(layers, panels):
        saes = probes[(probes["layer"] == layer) & (probes["who"] == "sae") & probes["k"].notna()]
        for run, (colour, marker) in report.styles.items():
            mine = saes.loc[saes["run"] == run.name, ["k", "mean", "stderr"]].to_numpy()
            if len(mine):
                line, *_ = axes.errorbar(*mine.T, color=colour, marker=marker or ".", capsize=1.5,
                                         markerfacecolor="white" if marker else colour,
                                         elinewidth=0.7, zorder=3)
                line.set_label(run_label(run))
        for who, label, colour, dashes in (
                ("untrained", "untrained SAE", GREY, "-."),
                ("llm", "language model, best k dimensions", "black", "-")):
            mine = references[(references["layer"] == layer) & (references["who"] == who)]
            by_k = mine.groupby("k")["mean"].agg(["mean", "min", "max"])
            if len(by_k):
                axes.plot(by_k["mean"], dashes, color=colour, zorder=2,
                          label=label + without + BAND * (who in banded))
            if (by_k["max"] - by_k["min"]).max() > 5e-4:
                axes.fill_between(by_k.index, by_k["min"], by_k["max"], color=colour, alpha=0.15,
                                  linewidth=0)
            full = mine["mean"][mine["k"].isna()]
            if who == "llm" and len(full):
                axes.axhline(full.mean(), zorder=1, color="black", linestyle=":",
                             label=f"language model, all dimensions{report.full_probe[1]}")
        if len(mine := saes[given[saes.index]]):
            axes.plot(mine["k"], mine["mean"], "x", color=GREY, label=GIVEN)
        axes.set_xscale("log")
        axes.set_xticks(K_VALUES, [str(k) for k in K_VALUES])
        axes.xaxis.set_minor_locator(NullLocator())
    panels[0].set_ylabel("probing accuracy (test)")
    figure.supxlabel("k, features or dimensions that the probe reads", fontsize=7)
    legend_above(figure)
    return figure


def draw_ablation(report):
    """The ablation table as a figure: the primary metric as dots, the rest as numbers."""
    rows = ablation_rows(report)
    kinds = [row["run"] and row["run"].given for row in rows]  # None: no run
    step, top, left, dots = 0.27, 0.4, 0.06, (1.5, 1.05)  # inches; start and width of the dots
    height = top + step * len(rows) + 0.35
    figure = plt.figure(figsize=(DOUBLE, height))
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, DOUBLE), ylim=(height, 0))
    page.axis("off")
    columns = [("primary", "primary\n(± s.e.)", 2.94),
               ("difference", f"difference to\n{REFERENCE} [95%]", 3.68)]
    columns += [(metric, heading, 4.31 + 0.328 * i) for i, (metric, _, heading, _) in enumerate(
        column for column in COLUMNS if column[2])]
    for _, heading, x in columns:
        page.text(x, top - 0.12, heading, ha="center", va="bottom", fontsize=6)
    page.plot([left, DOUBLE - left], [top - 0.06] * 2, color="black", linewidth=0.6)
    panel = figure.add_axes((dots[0] / DOUBLE, 0.35 / height, dots[1] / DOUBLE,
                             step * len(rows) / height), ylim=(len(rows) - 0.5, -0.5),
                            facecolor="none", yticks=[])
    panel.spines["left"].set_visible(False)
    panel.set_xlabel("primary metric: mean accuracy, k = 1, 2, 5", fontsize=6, loc="right")
    panel.tick_params(labelsize=6)
    panel.xaxis.set_major_locator(MaxNLocator(3))
    for i, row in enumerate(rows):
        y, run = top + step * (i + 0.5), row["run"]
        if i and kinds[i] != kinds[i - 1]:
            page.plot([left, DOUBLE - left], [top + step * i] * 2, color=GREY, linewidth=0.5)
        name = run_label(run, longest=1000) if run else row["short"]
        page.text(left, y, textwrap.fill(name, 32, max_lines=2, placeholder=" …"), va="center",
                  fontsize=5.8, linespacing=1.05)
        colour, marker = report.styles.get(run, (GREY, "x") if run else ("black", "D"))
        panel.errorbar(row["primary"], i, xerr=row["stderr"] or None, color=colour,
                       marker=marker or "o", capsize=2, elinewidth=0.9, markersize=3.5,
                       markerfacecolor="white" if marker in MARKERS[1:] else colour)
        if not run:
            panel.axvline(row["primary"], color=GREY, linestyle=":", linewidth=0.8, zorder=1)
        cells = {metric: show(row[metric], digits) for metric, *_, digits in COLUMNS}
        cells |= {"primary": pm(row["primary"], row["stderr"], 3),
                  "difference": interval(row["figures"], 3, gap="\n")}
        for key, _, x in columns:
            grey = key in row["fixed"] or (key, row["verdict"]) == ("difference", "not comparable")
            text = cells[key].replace("-", "−") if len(cells[key]) > 1 else cells[key]
            page.text(x, y, text if run or text != "-" else "", ha="center", va="center",
                      fontsize=5.8, color=GREY if grey else "black")
    page.text(sum(dots) + 0.15, height - 0.06,
              "Grey: a difference that is not comparable (L0 differs by over "
              f"{100 * (MAX_L0_RATIO - 1):.0f}%, or fewer than {MIN_SEEDS} seeds);"
              "\na temperature or weight that was fixed, not learned.",
              va="bottom", fontsize=5.5, color=GREY)
    return figure


def draw_forest(report):
    """The difference of each run's primary metric to the reference's, with its 95% interval."""
    rows = [row for row in ablation_rows(report) if math.isfinite(row["p"])]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(DOUBLE, 0.7 + 0.24 * len(rows)), layout="constrained")
    for i, row in enumerate(rows):
        colour, found = GREY if row["verdict"] == "not comparable" else "black", row["figures"]
        centre = found["difference"]
        axes.errorbar(centre, i, color=colour, marker="o", capsize=2, xerr=[
            [centre - found["ci95_low"]], [found["ci95_high"] - centre]])
        axes.text(1.02, i, f"L0 {row['l0']:.1f}   n = {found['n_paired_seeds']:.0f}   "
                  f"p: {show_p(row['p'])}   {row['verdict']}", fontsize=6, color=colour,
                  transform=axes.get_yaxis_transform(), va="center")
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(rows)), [run_label(row["run"], longest=1000) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"primary metric: difference to {report.reference.name} (L0 "
                    f"{report.value(report.reference, 'l0'):.1f}), paired over seeds, 95% "
                    "interval; p by Holm over all rows")
    return figure


FIGURES = {name: functools.partial(draw_panels, rows=rows) for name, rows in CURVES.items()} | {
    "plane": draw_plane, "probing": draw_probing, "ablation": draw_ablation, "forest": draw_forest,
}


def draw_profile(profile, report, folder, figures):
    """Figures and tables into folder, without those no longer true; returns the tables' text."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in figures):
        with plt.rc_context(STYLE):
            if figure := FIGURES[path.name](report):
                save(figure, path)
        for suffix in () if figure else (".png", ".pdf"):
            path.with_suffix(suffix).unlink(missing_ok=True)
    text = tables(profile, report)
    (folder / "ablation.md").write_text(text, encoding="utf-8")
    return text


def main(root=HERE, figures=tuple(FIGURES)):
    """Draws what stands under root, of each profile the figures named; 1 if there is nothing."""
    if not (reports := load_reports(root)):
        complain(f"no complete run found in {root}: expected folders run_* with final_info.json "
                 "and config.json; make one with python experiment.py --out_dir=run_try.")
        return 1
    for profile, report in reports.items():
        folder = root / "figures" / profile
        try:
            print(text := draw_profile(profile, report, folder, figures))
            write_report(folder, [root / run.name for run in report.runs], text)
        except OSError as error:
            complain(f"{error.filename or folder} can't be written ({error.strerror}): make "
                     "room or set its permissions, and run plot.py again.")
            return 1
        print(f"figures of {profile}: {folder}" + (
            "" if report.logged_layers else " (no training logs, so no curves)"))
    if (root / "bench").is_dir():
        from bench.figures import draw_bench  # it draws with what stands here
        if text := draw_bench(root / "bench", root / "figures" / "bench", reports.get("tinylm")):
            print(f"{text}\nfigures of bench/: {root / 'figures' / 'bench'}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit("plot.py takes no argument: choose the runs in the dict labels at its top.")
    sys.exit(main())
