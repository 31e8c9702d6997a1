"""Figures and tables from the records of the runs: `python plot.py`, no argument.

Reads every folder run_* beside this file that holds a final_info.json, and writes for each profile
figures/<profile>/adaptation, training_losses, training_sparsity, plane, probing, ablation, forest
(.png and .pdf) and ablation.md; and from bench/quality.jsonl and bench/ground_truth.jsonl figures
and tables in figures/bench. Profiles are never mixed. Needs matplotlib, numpy and scipy; no torch.
"""

import json
import math
import re
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from harness.verdict import (
    MAX_L0_RATIO,
    MIN_SEEDS,
    PRIMARY,
    PRIMARY_KS,
    mean,
    paired,
    primary_metric,
    stderr,
    verdict,
)

# ---------------------------------------------------------------------------------------------
# Edit here
# ---------------------------------------------------------------------------------------------

# Run name -> label, in the order wanted. Empty: every run found, under its own name.
labels = {
    # "run_1": "full method",
    # "run_5": "no curriculum",
}
REFERENCE = "run_1"  # differences in the ablation table are to this run

# ---------------------------------------------------------------------------------------------

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
    "lines.markersize": 3, "lines.markerfacecolor": "white",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "legend.frameon": False,
    "pdf.fonttype": 42, "savefig.dpi": 220, "figure.constrained_layout.h_pad": 0.03,
}

# One row of panels each: metric of train_log.jsonl, axis label, axis scale.
ADAPTATION = (
    ("tau_sel", "selection\ntemperature $\\tau_{sel}$", "linear"),
    ("tau_pen", "penalty\ntemperature $\\tau_{pen}$", "linear"),
    ("gamma", "loss weight $\\gamma$", "linear"),
    ("w", "penalty's weight\n$w = \\gamma\\,\\tau_{pen}$", "linear"),
)
LOSSES = (
    ("loss", "loss", "log"),
    ("loss_reconstruction", "reconstruction\n(part of the loss)", "log"),
    ("loss_penalty", "penalty\n$\\gamma\\,L_{pen}$", "log"),
    ("loss_reg", "regularization\n$L_{reg}$", "log"),
    ("loss_density", "cost by frequency\n$\\varphi\\,L_{freq}$", "log"),  # where a run has it
)
SPARSITY = (
    ("l0", "L0\n(active features)", "log"),
    ("fvu", "fraction of variance\nunexplained", "log"),
    ("dead_fraction", "dead features\n(fraction)", "linear"),
)
# Columns of the tables: metric, Markdown heading, heading in the figure (if there), decimals.
COLUMNS = (
    ("l0", "L0", "L0", 1),
    ("fvu", "FVU", "FVU", 3),
    ("ce_loss_score", "CE loss score", "CE\nscore", 3),
    ("dead_fraction", "dead fraction", "dead", 3),
    ("frac_alive", "frac alive", "", 3),
    ("tau_sel", "tau_sel", "$\\tau_{sel}$", 3),
    ("tau_pen", "tau_pen", "$\\tau_{pen}$", 3),
    ("gamma", "gamma", "$\\gamma$", 3),
    ("w", "w", "$w$", 4),
)


# ---- reading the records --------------------------------------------------------------------


def complain(sentence):
    print(f"plot.py: {sentence}", file=sys.stderr)


def number(value):
    """value as a float, or NaN when it's missing, null or not a number."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if usable else math.nan


def read_json(path):
    """The JSON object in path; a ValueError in one sentence when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object and holds a {type(content).__name__}")
    return content


def read_log(path):
    """train_log.jsonl as {layer: {seed: [entries in order of tokens]}}.

    A resumed run may log a step twice; the later line counts. Raises ValueError, naming file and
    line, for a line that isn't a JSON object with layer, seed and tokens.
    """
    steps = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for i, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                key = (int(entry["layer"]), int(entry["seed"]), float(entry["tokens"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {i}, is not a JSON object with layer, seed and "
                                 f"tokens ({type(error).__name__}: {error})") from error
            steps[key] = entry
    if not steps:
        raise ValueError(f"{path} is empty")
    log = {}
    for layer, seed, tokens in sorted(steps):
        log.setdefault(layer, {}).setdefault(seed, []).append(steps[layer, seed, tokens])
    return log


def load_run(folder):
    """A run's records as a dict: name, label, profile, given, tests, settings, layers, log.

    layers maps a layer's number to its {"means", "stderrs", "final_info_dict"}. log is None when
    there is none to draw. Raises ValueError in one sentence for a run that can't be shown at all.
    """
    info, config = read_json(folder / "final_info.json"), read_json(folder / "config.json")
    profile = config.get("profile")
    if not isinstance(profile, str) or not re.fullmatch(r"\w[\w.-]*", profile):
        raise ValueError(f"{folder / 'config.json'} should name a profile and has {profile!r}")
    layers = {}
    for key, record in info.items():
        if match := re.fullmatch(r"layer_(\d+)", key):
            parts = {part: record.get(part) if isinstance(record, dict) else None
                     for part in ("means", "stderrs", "final_info_dict")}
            if not isinstance(parts["means"], dict):
                raise ValueError(f"{folder / 'final_info.json'} has no means under {key}")
            layers[int(match[1])] = {part: values if isinstance(values, dict) else {}
                                     for part, values in parts.items()}
    if not layers:
        raise ValueError(f"{folder / 'final_info.json'} has no layer_… key, so nothing to show")
    settings = config.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    tests = next((text for source in (settings, config) for key in ("description", "tests", "note")
                  if isinstance(text := source.get(key), str) and text), "")
    return {
        "name": folder.name, "label": labels.get(folder.name, folder.name), "profile": profile,
        "given": bool(config.get("given")), "tests": tests, "settings": settings,
        "layers": dict(sorted(layers.items())), "log": load_log(folder, config),
    }


def load_log(folder, config):
    path = folder / "train_log.jsonl"
    if config.get("given") and not path.exists():
        return None  # run_0 was never trained: there is nothing to log
    try:
        return read_log(path)
    except OSError as error:
        complain(f"{path} can't be read ({error.strerror}): {folder.name} stands in the tables "
                 "and is left out of the curves.")
    except ValueError as error:
        complain(f"{error}: {folder.name} stands in the tables and is left out of the curves.")
    return None


def natural(name):
    """Sort key that puts run_2 before run_10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part)
            for part in re.split(r"(\d+)", name) if part]


def load_runs(root):
    """The runs to show, in order, and the reference run of each profile (shown or not)."""
    found = {folder.name: folder for folder in root.glob("run_*") if folder.is_dir()}
    # run_3.1 is a complete run_3 that was set aside (prepare_out_dir): only if asked for.
    names = list(labels) or sorted((n for n in found if not re.search(r"\.\d+$", n)), key=natural)
    shown, references = [], {}
    for name in [*names, *({REFERENCE} & found.keys() - set(names))]:
        if name not in found:
            complain(f"labels names {name}, and there is no folder {root / name}: left out.")
            continue
        try:
            run = load_run(found[name])
        except ValueError as error:
            complain(f"{error}: {name} is left out; run it again or remove its folder.")
            continue
        if name in names:
            shown.append(run)
        if name == REFERENCE:
            references[run["profile"]] = run
    return shown, references


# ---- arithmetic -----------------------------------------------------------------------------


def mean_over_layers(run, metric):
    """A metric's mean over the run's layers; NaN unless every layer has it."""
    return float(np.mean([number(r["means"].get(metric)) for r in run["layers"].values()]))


def primary(run, who="sae"):
    """Mean over layers of (top_1 + top_2 + top_5) / 3: who is sae, untrained or llm."""
    return float(np.mean([mean_over_layers(run, f"{who}_top_{k}_test_accuracy")
                          for k in PRIMARY_KS]))


def per_seed(run):
    """Lists per seed under seed, primary and l0 (mean over layers), as verdict wants them.

    None when a layer lacks a value that the primary metric needs.
    """
    layers = [record["final_info_dict"] for record in run["layers"].values()]
    needed = [f"sae_top_{k}_test_accuracy" for k in PRIMARY_KS]
    lists = [layer.get(metric) for layer in layers for metric in needed]
    if not all(isinstance(values, list) and values for values in lists):
        return None
    if len({len(values) for values in lists}) > 1 or np.isnan(
            [number(v) for values in lists for v in values]).any():
        return None
    seeds = run["settings"].get("seeds")
    if not isinstance(seeds, list) or len(seeds) != len(lists[0]):
        seeds = list(range(len(lists[0])))
    l0s = [layer.get("l0") if isinstance(layer.get("l0"), list) else [] for layer in layers]
    l0 = [mean([number(v) for v in values]) for values in zip(*l0s)] or [math.nan]
    return {"seed": seeds, PRIMARY: primary_metric(layers), "l0": l0}


def seed_means(run, metric):
    """{seed: a metric's mean over the layers, or "primary"}; empty where a layer lacks it."""
    found = per_seed(run)
    if found is None:
        return {}
    if metric == "primary":
        return dict(zip(found["seed"], found[PRIMARY]))
    lists = [layer["final_info_dict"].get(metric) for layer in run["layers"].values()]
    if not all(isinstance(values, list) and len(values) == len(found["seed"]) for values in lists):
        return {}
    return dict(zip(found["seed"], map(mean, zip(*lists))))


def compare(run, reference):
    """The verdict's word against the reference, and its figures; ("-", {}) where there is none.

    None for the reference itself, for the given baseline, and where the layers or the probing
    tasks differ.
    """
    if reference is None or run["given"] or run["name"] == reference["name"]:
        return "-", {}
    mine, theirs = per_seed(run), per_seed(reference)
    alike = (run["layers"].keys() == reference["layers"].keys() and
             run["settings"].get("probe_sets") == reference["settings"].get("probe_sets"))
    if mine is None or theirs is None or not alike or np.isnan(mine["l0"] + theirs["l0"]).any():
        return "-", {}
    sentence, figures = verdict(mine, theirs, reference["name"])
    return sentence.split(" (")[0], figures


def curve(run, layer, metric):
    """(tokens, mean, lowest, highest) over the seeds of a logged metric, or None.

    Seeds share their forward passes, so their logging steps agree; where they don't, a seed is
    read between its own steps, on the first seed's tokens, as far as all of them go.
    """
    lines = []
    for entries in run["log"].get(layer, {}).values():
        points = np.array([(e["tokens"], number(e.get(metric))) for e in entries])
        points = points[np.isfinite(points).all(1)]
        if len(points):
            lines.append(points)
    if not lines:
        return None
    tokens = lines[0][:, 0]
    tokens = tokens[tokens <= min(line[-1, 0] for line in lines)]
    tokens = tokens[tokens >= max(line[0, 0] for line in lines)]
    if not len(tokens):
        return None
    values = np.array([np.interp(tokens, *line.T) for line in lines])
    return tokens, values.mean(0), values.min(0), values.max(0)


# ---- tables ---------------------------------------------------------------------------------


def show(value, decimals, sign=False):
    if not math.isfinite(value):
        return "-"
    return f"{value:{'+' if sign else ''}.{decimals}f}"


def show_p(p):
    return "< 0.001" if p < 0.001 else show(p, 3)


def pm(value, error, decimals):
    """value ± error; the value alone for one seed (error 0) or an unknown error."""
    return show(value, decimals) + (f" ± {error:.{decimals}f}" if error > 0 else "")


def is_fixed(run, metric):
    """True where the settings hold a temperature or the weight constant."""
    settings = run["settings"]
    return metric in BOUNDS and (math.isfinite(number(settings.get(metric)))
                                 or bool(settings.get("constants_from_run")))


def ablation_rows(runs, reference):
    """The ablation table: a dict per run, then the untrained SAE and the language model.

    Numbers are means over the run's layers and seeds; a run's dict also keeps the run itself. p is
    Holm's over all runs that have one.
    """
    rows = []
    for run in [r for r in runs if not r["given"]] + [r for r in runs if r["given"]]:
        verdict, figures = compare(run, reference)
        seeds = per_seed(run)
        rows.append({
            "kind": "given" if run["given"] else "run", "run": run, "label": run["label"],
            "tests": GIVEN if run["given"] else run["tests"],
            "primary": primary(run), "untrained": primary(run, "untrained"),
            "stderr": stderr(seeds[PRIMARY]) if seeds else math.nan,
            "seeds": len(seeds["seed"]) if seeds else "-", "verdict": verdict,
            **difference(figures), "p": figures.get("p", math.nan),
            "paired": figures.get("n_paired_seeds", 0), "fvu_difference": difference(
                paired(seed_means(run, "fvu"), seed_means(reference, "fvu"))
                if figures else {}),
            **{metric: mean_over_layers(run, metric) for metric, *_ in COLUMNS},
        })
    for row, p in zip(rows, holm([row["p"] for row in rows])):
        row["p"] = p
    made = [run for run in runs if not run["given"]]
    for who, label, short in (
            ("untrained", "untrained SAE", "untrained SAE"),
            ("llm", "language model", "language model, best k dimensions")):
        sources = [run for run in made if math.isfinite(primary(run, who))]
        if who == "untrained" and any(run is reference for run in sources):  # at its L0
            sources = [run for run in sources if same_l0(run, reference)]
        if not sources and who == "llm":  # the given baseline's figures of the model are sound
            sources = [run for run in runs if math.isfinite(primary(run, who))]
        values = [primary(run, who) for run in sources]
        if values:
            rows.append({"kind": "reference", "label": label, "primary": float(np.mean(values)),
                         "range": (min(values), max(values)), "sources": sources,
                         "tests": reference_text(who, sources), "short": short,
                         **{metric: float(np.mean([mean_over_layers(run, f"{who}_{metric}")
                                                   for run in sources]))
                            for metric, *_ in COLUMNS}})
    return rows


def same_l0(run, other):
    """Whether two runs' L0 are close enough for a comparison (MAX_L0_RATIO)."""
    smaller, larger = sorted(mean_over_layers(each, "l0") for each in (run, other))
    return larger <= MAX_L0_RATIO * smaller


def reference_text(who, sources):
    if who == "untrained":
        text = "same width and L0, never trained"
        return text if len(sources) == 1 else f"{text}: of {len(sources)} runs at one L0"
    full = np.mean([mean_over_layers(run, "llm_test_accuracy") for run in sources])
    probe = f"; probe on all dimensions: {full:.4f}" if math.isfinite(full) else ""
    return f"best k dimensions of the residual stream{probe}"


def difference(figures):
    """What `interval` reads, of what paired or verdict found; NaN for what isn't there."""
    names = {"difference": "difference", "low": "ci95_low", "high": "ci95_high"}
    return {mine: figures.get(name, math.nan) for mine, name in names.items()}


def interval(row, decimals, gap=" "):
    text = show(row["difference"], decimals, sign=True)
    if math.isfinite(row["low"]):
        text += f"{gap}[{row['low']:+.{decimals}f}, {row['high']:+.{decimals}f}]"
    return text


def spread(row):
    """A reference's value, with its range where the runs don't agree on it."""
    low, high = row["range"]
    text = show(row["primary"], 4)
    return text if high - low < 5e-5 else f"{text} ({low:.4f} to {high:.4f})"


def markdown(header, lines):
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |"
                     for line in [header, ["---"] * len(header), *lines])


def tables(profile, runs, rows):
    """Both tables of a profile as Markdown text: a row per run, and a row per run and layer."""
    header = ["run", "what it tests", "primary", f"difference to {REFERENCE}", "p", "verdict",
              f"FVU: difference to {REFERENCE}", "untrained SAE",
              *(heading for _, heading, _, _ in COLUMNS), "seeds"]
    lines = []
    for row in rows:
        if row["kind"] == "reference":
            lines.append([row["label"], row["tests"], spread(row), "-", "-", "-", "-", "-",
                          *(show(row[metric], digits) for metric, _, _, digits in COLUMNS), "-"])
            continue
        lines.append([
            row_name(row), row["tests"] or "-", pm(row["primary"], row["stderr"], 4),
            interval(row, 4), show_p(row["p"]), row["verdict"],
            interval(row["fvu_difference"], 4), show(row["untrained"], 4),
            *(show(row[metric], digits) + (" (fixed)" if is_fixed(row["run"], metric) else "")
              for metric, _, _, digits in COLUMNS), row["seeds"]])
    detail = [(metric, heading, digits) for metric, heading, _, digits in COLUMNS]
    detail += [(f"{who}_top_{k}_test_accuracy", f"{who} top {k}", 4)
               for who in ("sae", "untrained", "llm") for k in PRIMARY_KS]
    detail.append(("llm_test_accuracy", "llm all", 4))
    by_layer = [[run["label"], layer, *(pm(number(record["means"].get(metric)),
                                           number(record["stderrs"].get(metric)), digits)
                                        for metric, _, digits in detail)]
                for run in runs for layer, record in run["layers"].items()]
    return "\n\n".join([
        f"# Ablation, profile {profile}",
        "primary: mean over layers of the sparse-probing test accuracy at k = 1, 2 and 5, ± "
        f"standard error over seeds (none for one seed). Difference to {REFERENCE}: paired over "
        f"the seeds that both have, from {MIN_SEEDS} seeds on with its 95% interval "
        "(Student's t), p by Holm over all runs, and a verdict, which is \"not comparable\" where "
        f"L0 differs by over {100 * (MAX_L0_RATIO - 1):.0f}%. FVU's difference is paired "
        "likewise. The other columns are means over layers. A dash: not recorded, or nothing to "
        "compare.",
        markdown(header, lines), *task_sets(runs),
        "## By layer",
        markdown(["run", "layer", *(heading for _, heading, _ in detail)], by_layer),
    ]) + "\n"


def task_sets(runs):
    """A sentence that warns when the runs were not probed on the same tasks."""
    used = {run["label"]: ", ".join(map(str, sets)) for run in runs
            if isinstance(sets := run["settings"].get("probe_sets"), list)}
    if len(set(used.values())) < 2:
        return []
    return ["Not all on the same probing tasks, so not all comparable: "
            + "; ".join(f"{label} on {sets}" for label, sets in used.items()) + "."]


def row_name(row):
    run = row["run"]
    return row["label"] if row["label"] == run["name"] else f"{row['label']} ({run['name']})"


# ---- figures --------------------------------------------------------------------------------


def save(figure, path):
    figure.savefig(path.with_suffix(".png"))
    figure.set_layout_engine("none")  # the PDF keeps the PNG's layout: computed once
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})  # same in, same out
    plt.close(figure)


def styles_of(runs):
    """Colour and marker of each run, the same in every figure of a profile."""
    made = [run["name"] for run in runs if not run["given"]]
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)])
            for i, name in enumerate(made)}


def tokens_text(tokens, _=None):
    return "0" if tokens == 0 else f"{tokens / 1e6:.6g}M"


def plain_log_axis(axis, low, high):
    """A handful of ticks on a log axis, as plain numbers."""
    decades = np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ([1], [1, 3], [1, 2, 5], range(1, 10), np.arange(10, 100) / 10):
        ticks = [v for d in decades for s in steps if low <= (v := float(s * 10.0**d)) <= high]
        if len(ticks) >= 3:
            break
    cached = ticks[:1]
    for tick in ticks[1:]:  # no two labels closer than an eighth of the axis
        if math.log(tick / cached[-1]) >= math.log(high / low) / 8:
            cached.append(tick)
    axis.set_ticks(cached or [low, high])
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4g}" if 1e-3 < v < 1e4
                                           else f"{v:.2g}".replace("e-0", "e-")))
    axis.set_minor_locator(NullLocator())


def legend_above(figure, handles, width):
    """A legend over the panels, in as many columns as its longest label leaves room for."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), 5, int(width * 19 / (longest + 7))))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=1.8,
                  columnspacing=1.2)


def run_label(run, longest=46):
    """What a figure calls a run: its label, with what it tests where it has no label of its own."""
    text = run["label"]
    if run["tests"] and text == run["name"] and len(run["tests"]) <= longest:
        text = f"{text}: {run['tests']}"
    return text.replace("$", r"\$")  # no mathematics: a stray dollar sign would be an error


def same_curves(curves, scale):
    """Groups of positions in curves whose lines lie on each other, to within 1% of the panel."""
    rescale = np.log if scale == "log" else np.asarray
    values = np.concatenate([rescale(line) for _, line, _, _ in curves])
    tolerance = 0.01 * (np.ptp(values) if np.ptp(values) > 0 else 1)
    groups = []
    for i, (tokens, values, _, _) in enumerate(curves):
        for group in groups:
            first_tokens, first, _, _ = curves[group[0]]
            if np.abs(np.interp(tokens, first_tokens, rescale(first))
                      - rescale(values)).max() <= tolerance:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def draw_curves(axes, runs, layer, metric, scale, styles):
    """One panel: a line per run (mean over seeds) with a band from lowest to highest seed."""
    drawn = []
    for run in runs:
        line = curve(run, layer, metric)
        if line is not None and scale == "log":
            keep = line[1] > 0
            line = tuple(part[keep] for part in line) if keep.any() else None
        if line is not None:
            drawn.append((run, line))
    if not drawn:
        return
    for group in same_curves([line for _, line in drawn], scale):
        for place, i in enumerate(group):
            run, (tokens, mean, low, high) = drawn[i]
            colour, marker = styles[run["name"]]
            # Lines that lie on each other take turns, dash by dash, so that each can be seen.
            n = len(group)
            dashes = "solid" if n == 1 else (4 * place, (4, 4 * (n - 1)))
            if len(tokens) == 1:  # a line of one point would not show
                axes.plot(tokens, mean, color=colour, marker=marker or "o", zorder=3)
                continue
            axes.plot(tokens, mean, color=colour, linestyle=dashes, marker=marker,
                      markevery=(0.1 * (place % 2), 0.2), zorder=3)
            if scale == "log":
                low = np.maximum(low, mean * 1e-3)
            if (high > low).any():
                axes.fill_between(tokens, low, high, color=colour, alpha=0.18, linewidth=0)


def draw_panels(runs, rows, styles, path):
    """A grid of curves against training tokens: a row of panels per metric, a column per layer."""
    layers = sorted({layer for run in runs for layer in run["log"]})
    width = SINGLE if len(layers) == 1 else max(DOUBLE, 1.7 * len(layers))
    figure, grid = plt.subplots(
        len(rows), len(layers), sharex=True, sharey="row", squeeze=False, layout="constrained",
        figsize=(width, 0.55 + 1.15 * len(rows) + 0.13 * math.ceil(len(runs) / 3)))
    handles = [Line2D([], [], color=styles[run["name"]][0], marker=styles[run["name"]][1],
                      label=run_label(run)) for run in runs]
    for (metric, label, scale), line in zip(rows, grid):
        logged = [values for run in runs for layer in layers
                  if (values := curve(run, layer, metric)) is not None]
        positive = [v for _, mean, _, _ in logged for v in mean[mean > 0]]
        if not positive:
            scale = "linear"  # nothing to show on a log axis: a line at 0 is what was logged
        for layer, axes in zip(layers, line):
            draw_curves(axes, runs, layer, metric, scale, styles)
            if metric == "l0":
                draw_k_t(axes, runs, layer)
            for bound in BOUNDS.get(metric, ()):
                axes.axhline(bound, color=GREY, linestyle="--", linewidth=0.8, zorder=1)
        first = line[0]
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
    if rows is ADAPTATION:
        handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=0.8, label="bounds"))
    if rows is SPARSITY and any(curve(run, layer, "k_t") for run in runs for layer in layers):
        handles.append(Line2D([], [], color="black", linestyle="--", linewidth=0.8,
                              label="$k_t$, the curriculum"))
    for layer, axes in zip(layers, grid[0]):
        axes.set_title(f"layer {layer}")
    grid[0, 0].set_xlim(left=0)
    grid[0, 0].xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    grid[0, 0].xaxis.set_major_formatter(FuncFormatter(tokens_text))
    figure.supxlabel("training tokens", fontsize=7)
    figure.align_ylabels(grid[:, 0])
    legend_above(figure, handles, width)
    save(figure, path)


def draw_k_t(axes, runs, layer):
    """The curriculum's k_t as a dashed black line; runs that share it share the line."""
    drawn = set()
    for run in runs:
        line = curve(run, layer, "k_t")
        if line is not None and (key := (line[0].tobytes(), line[1].tobytes())) not in drawn:
            drawn.add(key)
            axes.plot(line[0], line[1], color="black", linestyle="--", linewidth=0.8, zorder=4)


def accuracies(run, layer, who):
    """Arrays k, mean, stderr of who's (sae, untrained, llm) accuracy over the recorded k."""
    record = run["layers"].get(layer, {"means": {}, "stderrs": {}})
    points = [(k, *(number(record[part].get(f"{who}_top_{k}_test_accuracy"))
                    for part in ("means", "stderrs"))) for k in K_VALUES]
    return np.array([point for point in points if math.isfinite(point[1])]).reshape(-1, 3).T


def draw_reference(axes, runs, layer, who, **look):
    """Mean over runs of a reference's accuracy, with a band where runs don't agree on it.

    Returns None when no run has it, otherwise whether there is a band.
    """
    lines = [accuracies(run, layer, who)[:2] for run in runs]
    ks = sorted({k for line in lines for k in line[0]})
    if not ks:
        return None
    values = [[v for line in lines for k, v in line.T if k == at] for at in ks]
    axes.plot(ks, [np.mean(v) for v in values], zorder=2, **look)
    low, high = [min(v) for v in values], [max(v) for v in values]
    band = max(np.subtract(high, low)) > 5e-4
    if band:
        axes.fill_between(ks, low, high, color=look["color"], alpha=0.15, linewidth=0)
    return band


def draw_probing(runs, styles, path):
    """Probing accuracy against k, a panel per layer: SAEs, untrained SAE, language model."""
    layers = sorted({layer for run in runs for layer in run["layers"]})
    made = [run for run in runs if not run["given"]]
    given = [run for run in runs if run["given"]]
    width = SINGLE if len(layers) == 1 else max(DOUBLE, 1.7 * len(layers))
    figure, (line,) = plt.subplots(1, len(layers), sharey=True, squeeze=False,
                                   layout="constrained",
                                   figsize=(width, 2.4 + 0.13 * math.ceil((len(runs) + 3) / 3)))
    handles = {}
    for layer, axes in zip(layers, line):
        for run in made:
            k, mean, error = accuracies(run, layer, "sae")
            colour, marker = styles[run["name"]]
            if len(k):
                handles[run["name"], run_label(run)] = axes.errorbar(
                    k, mean, yerr=np.nan_to_num(error), color=colour, marker=marker or ".",
                    markerfacecolor="white" if marker else colour, elinewidth=0.7, capsize=1.5,
                    zorder=3)[0]
        # The given baseline stands apart, also with its model's figures, where a run has its own.
        here = [run for run in made if layer in run["layers"]] or given
        for who, label, look in (
                ("untrained", "untrained SAE", {"color": GREY, "linestyle": "-."}),
                ("llm", "language model, best k dimensions", {"color": "black"})):
            band = draw_reference(axes, here, layer, who, **look)
            if band:
                handles.pop(("", label), None)
            if band is not None and ("", label + BAND) not in handles:
                handles["", label + (BAND if band else "")] = Line2D([], [], **look)
        full = [number(run["layers"][layer]["means"].get("llm_test_accuracy"))
                for run in here if layer in run["layers"]]
        if np.isfinite(full).any():
            look = {"color": "black", "linestyle": ":"}
            axes.axhline(np.nanmean(full), zorder=1, **look)
            handles["", "language model, all dimensions"] = Line2D([], [], **look)
        for run in given:
            k, mean, _ = accuracies(run, layer, "sae")
            if len(k):
                handles["", GIVEN] = axes.plot(k, mean, color=GREY, linestyle="none", marker="x")[0]
        axes.set_xscale("log")
        axes.set_xticks(K_VALUES, [str(k) for k in K_VALUES])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"layer {layer}")
    line[0].set_ylabel("probing accuracy (test)")
    figure.supxlabel("k, features or dimensions that the probe reads", fontsize=7)
    for (_, label), handle in handles.items():
        handle.set_label(label)
    if not handles:  # runs without a probing figure
        plt.close(figure)
        return
    legend_above(figure, list(handles.values()), width)
    save(figure, path)


def draw_ablation(rows, styles, path):
    """The ablation table as a figure: the primary metric as dots, the rest as numbers."""
    step, top = 0.27, 0.4
    height = top + step * len(rows) + 0.35
    figure = plt.figure(figsize=(DOUBLE, height))
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, DOUBLE), ylim=(height, 0))
    page.axis("off")
    left, dots = 0.06, (1.5, 1.05)  # inches: label column; start and width of the dots' panel
    shown = [column for column in COLUMNS if column[2]]
    columns = [("primary", "primary\n(± s.e.)", 2.94),
               ("difference", f"difference to\n{REFERENCE} [95%]", 3.68)]
    columns += [(metric, heading, 4.31 + 0.328 * i)
                for i, (metric, _, heading, _) in enumerate(shown)]
    for _, heading, x in columns:
        page.text(x, top - 0.12, heading, ha="center", va="bottom", fontsize=6)
    page.plot([left, DOUBLE - left], [top - 0.06] * 2, color="black", linewidth=0.6)
    panel = figure.add_axes((dots[0] / DOUBLE, 0.35 / height, dots[1] / DOUBLE,
                             step * len(rows) / height), ylim=(len(rows) - 0.5, -0.5),
                            facecolor="none")
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    panel.set_xlabel("primary metric: mean accuracy, k = 1, 2, 5", fontsize=6, loc="right")
    panel.tick_params(labelsize=6)
    panel.xaxis.set_major_locator(MaxNLocator(3))
    for i, row in enumerate(rows):
        y = top + step * (i + 0.5)
        if i and row["kind"] != rows[i - 1]["kind"]:
            page.plot([left, DOUBLE - left], [top + step * i] * 2, color=GREY, linewidth=0.5)
        reference = row["kind"] == "reference"
        name = row["short"] if reference else run_label(row["run"], longest=1000)
        page.text(left, y, "\n".join(textwrap.wrap(name, 32, max_lines=2, placeholder=" …")),
                  va="center", fontsize=5.8, linespacing=1.05)
        colour, marker = ((GREY, "x") if row["kind"] == "given" else ("black", "D") if reference
                          else styles[row["run"]["name"]])
        error = 0 if reference or not row["stderr"] > 0 else row["stderr"]
        panel.errorbar(row["primary"], i, xerr=error or None, color=colour, marker=marker or "o",
                       markerfacecolor="white" if marker in MARKERS[1:] else colour,
                       markersize=3.5, capsize=2, elinewidth=0.9)
        if reference:
            panel.axvline(row["primary"], color=GREY, linestyle=":", linewidth=0.8, zorder=1)
        cells = {"primary": pm(row["primary"], error, 3),
                 "difference": "" if reference else interval(row, 3, gap="\n")}
        for metric, *_, digits in COLUMNS:
            missing = reference and not math.isfinite(row[metric])  # nothing of the kind: blank
            cells[metric] = "" if missing else show(row[metric], digits)
        for key, _, x in columns:
            grey = not reference and (row["verdict"] == "not comparable" if key == "difference"
                                      else is_fixed(row["run"], key))
            page.text(x, y, cells[key].replace("-", "−" if len(cells[key]) > 1 else "-"),
                      ha="center", va="center", fontsize=5.8, color=GREY if grey else "black")
    page.text(dots[0] + dots[1] + 0.15, height - 0.06,
              "Grey: a difference that is not comparable (L0 differs by over "
              f"{100 * (MAX_L0_RATIO - 1):.0f}%, or fewer than {MIN_SEEDS} seeds);"
              "\na temperature or weight that was fixed, not learned.",
              va="bottom", fontsize=5.5, color=GREY)
    save(figure, path)


# ---- what bench/ measured ------------------------------------------------------------------


def read_rows(path):
    """The lines of a file of bench/ that exists, as dicts; none where it doesn't."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of(rows, **wanted):
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def in_order(rows, key):
    """The values of a key, in the order in which they first appear."""
    return list(dict.fromkeys(row[key] for row in rows))


def row_primary(rows, who="sae"):
    """The primary metric of the rows of one SAE per layer."""
    return float(np.mean([row[f"{who}_top_{k}_test_accuracy"]
                          for row in rows for k in PRIMARY_KS]))


def by_seed(rows, value):
    """{seed: value of its rows}, of one method's rows at one sparsity."""
    return {seed: value(of(rows, seed=seed)) for seed in in_order(rows, "seed")}


def by_sparsity(rows):
    """One method's rows in groups of the same sparsity, in the order in which they were made."""
    return [of(rows, sparsity=list(sparsity))
            for sparsity in dict.fromkeys(tuple(row["sparsity"]) for row in rows)]


def metric_mean(metric):
    return lambda rows: float(np.mean([row[metric] for row in rows]))


def row_value(metric):
    """What takes the rows of one SAE per layer to a metric's mean, or to the primary metric."""
    return row_primary if metric == "primary" else metric_mean(metric)


def holm(ps):
    """Holm's adjustment of p values, NaN staying NaN (Holm 1979, Scandinavian J. Statistics 6)."""
    known = sorted((p, i) for i, p in enumerate(ps) if math.isfinite(p))
    adjusted, so_far = [math.nan] * len(ps), 0.0
    for rank, (p, i) in enumerate(known):
        so_far = max(so_far, min(1.0, p * (len(known) - rank)))
        adjusted[i] = so_far
    return adjusted


def where_made(rows):
    """Machine, cores and dates of rows, in words."""
    machines = " and ".join(
        f"{machine}, {' or '.join(str(n) for n in sorted(in_order(mine, 'cores')))} core"
        + "s" * (in_order(mine, "cores") != [1])
        for machine in in_order(rows, "machine") for mine in [of(rows, machine=machine)])
    dates = sorted(in_order(rows, "date"))
    return f"{machines}; {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")


def pm_seeds(values, digits):
    return pm(mean(list(values)), stderr(list(values)), digits)


PEER = "BatchTopK"  # what methods are compared to
OURS = "this project"  # what the names of its methods begin with


def seeds_table(rows, columns, first):
    """A row per method: columns as mean ± s.e. over seeds, and its paired difference in `first`.

    columns: heading -> (value of one seed's rows, digits).
    """
    methods = in_order(rows, "method")
    value, digits = columns[first]
    peer = by_seed(of(rows, method=PEER), value)
    differences = [paired(by_seed(of(rows, method=m), value), peer) if m != PEER else {}
                   for m in methods]
    adjusted = holm([found.get("p", math.nan) for found in differences])
    lines = []
    for method, found, p in zip(methods, differences, adjusted):
        mine = of(rows, method=method)
        cells = [pm_seeds(by_seed(mine, function).values(), places)
                 for function, places in columns.values()]
        lines.append([method, *cells, interval(difference(found), digits), show_p(p),
                      len(in_order(mine, "seed"))])
    return lines, ["method", *columns, f"{first}: difference to {PEER}", "p (Holm)", "seeds"]


def language_model(rows, width, at):
    """A table's row for the language model's own dimensions, the primary metric in cell `at`."""
    line = ["language model, best k dimensions", *["-"] * (width - 1)]
    line[at] = show(row_primary(rows, "llm"), 4)
    return line


def quality_tables(rows, runs=()):
    """bench/quality.jsonl as Markdown: seeds at one L0, the curves, the forms, and the sweep.

    runs: those of the plan; of the ones at another L0 than the reference's, what can be read off
    the curve of its form.
    """
    columns = {
        "primary": (row_primary, 4), "L0": (metric_mean("l0"), 2), "FVU": (metric_mean("fvu"), 4),
        "CE loss score": (metric_mean("ce_loss_score"), 4),
        "alive": (metric_mean("frac_alive"), 3),
    }
    parts = []
    seeds = of(rows, stage="seeds")
    twins = of(seeds, method="untrained")
    if seeds:
        lines, header = seeds_table(seeds, columns, "primary")
        lines.append(language_model(seeds, len(header), at=1))
        parts += [f"At one L0. {where_made(seeds)}.", markdown(header, lines)]
        fvu, heading = seeds_table(seeds, {"FVU": columns["FVU"]}, "FVU")
        parts.append(markdown(heading, fvu))
    curves = of(rows, stage="curves")
    if curves:
        lines = []
        for method in in_order(curves, "method"):
            for here in by_sparsity(of(curves, method=method)):
                lines.append([method, sparsity_text(here[0]["sparsity"]),
                              *(show(function(here), digits)
                                for function, digits in columns.values())])
        lines += references(curves, twins, columns, len(columns) + 2)
        parts += [f"Over L0, one seed. {where_made(curves)}.",
                  markdown(["method", "k, or coefficient by layer", *columns], lines)]
    forms = of(rows, stage="forms")
    if forms:
        parts += [f"Forms of this project's method, mean ± s.e. over seeds. {where_made(forms)}.",
                  forms_table(forms, twins, columns)]
        if lines := read_off_lines(forms, runs):
            parts += [
                f"Runs of the plan at another L0 than {REFERENCE}'s, beside {REFERENCE}'s form at "
                "that L0: seed by seed on straight lines between the k_min above, L0 logarithmic; "
                "paired over seeds, 95% interval.",
                markdown(["run", "metric", "L0", f"{REFERENCE}'s L0", "run", REFERENCE,
                          "raw difference", f"{REFERENCE}'s form at that L0",
                          "difference at that L0", "seeds"], lines)]
    sweep = of(rows, stage="sweep")
    if sweep:
        lines = [[method, f"{lr:g}",
                  "; ".join(f"{of_layer:g}: {show(metric_mean('l0')(h), 1)}, "
                            f"{show(metric_mean('fvu')(h), 4)}"
                            for of_layer in in_order(here, "of_layer")
                            for h in [of(here, of_layer=of_layer)])]
                 for method in in_order(sweep, "method")
                 for lr in in_order(of(sweep, method=method), "lr")
                 for here in [of(sweep, method=method, lr=lr)]]
        parts += [f"The sweep. {where_made(sweep)}.",
                  markdown(["method", "learning rate", "k or coefficient: L0, FVU"], lines)]
    ranges = of(rows, stage="range")
    if ranges:
        lines = [[method, f"{here[0]['of_layer']:g}",
                  *("/".join(show(row[metric], digits) for row in here)
                    for metric, digits in (("l0", 1), ("fvu", 3)))]
                 for method in in_order(ranges, "method")
                 for here in by_sparsity(of(ranges, method=method))]
        parts += [f"One coefficient for all layers, one seed. {where_made(ranges)}.",
                  markdown(["method", "coefficient", "L0 by layer", "FVU by layer"], lines)]
    return "\n\n".join(parts)


def sparsity_text(values):
    """The sparsity of an SAE per layer: one number where it is the same on all."""
    texts = [f"{value:.3g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else "/".join(texts)


def other_l0(runs):
    """The reference, or None, and the runs whose L0 is too far from its for a comparison."""
    reference = next((run for run in runs if run["name"] == REFERENCE), None)
    return reference, [run for run in runs if reference and not run["given"]
                       and run["profile"] == reference["profile"] and not same_l0(run, reference)]


def read_off(rows, value, at):
    """{seed: value on that seed's line through a form's sparsities, at the L0 of `at`}.

    Straight lines, L0 logarithmic; none for a seed whose L0 lies outside of them.
    """
    found = {}
    for seed, l0 in at.items():
        points = sorted((math.log(metric_mean("l0")(here)), value(here))
                        for here in by_sparsity(of(rows, seed=seed)))
        if points and points[0][0] <= math.log(l0) <= points[-1][0]:
            found[seed] = float(np.interp(math.log(l0), *zip(*points)))
    return found


def read_off_lines(rows, runs):
    """A line per run at another L0 than the reference's, and metric; see `quality_tables`."""
    reference, runs = other_l0(runs)
    plain, lines = of(rows, method=REFERENCE), []
    for run in runs:
        for label, metric in (("primary", "primary"), ("FVU", "fvu")):
            mine, theirs = seed_means(run, metric), seed_means(reference, metric)
            there = read_off(plain, row_value(metric), seed_means(run, "l0"))
            lines.append([
                run["name"], label, *(show(mean_over_layers(r, "l0"), 1) for r in (run, reference)),
                pm_seeds(mine.values(), 4), pm_seeds(theirs.values(), 4),
                show(paired(mine, theirs).get("difference", math.nan), 4, sign=True),
                pm_seeds(there.values(), 4) if there else "outside of the curve",
                interval(difference(paired(mine, there)), 4) if there else "-",
                len(there) or "-"])
    return lines


def references(rows, twins, columns, width):
    """The last lines of a table: untrained SAEs, where they have been scored, and the model."""
    lines = [language_model(rows, width, at=2)]
    if twins:
        cells = [show(value(twins), digits) for value, digits in columns.values()]
        lines.insert(0, ["untrained SAE", "-", *cells, *["-"] * (width - 2 - len(cells))])
    return lines


def forms_table(rows, twins, columns):
    """A row per form and sparsity, and its paired difference to run_1 at run_1's own k."""
    plain = of(rows, method="run_1")
    reference = by_seed([row for row in plain if row["of_layer"] == 16], row_primary)
    lines = []
    for method in in_order(rows, "method"):
        for here in by_sparsity(of(rows, method=method)):
            found = paired(by_seed(here, row_primary), reference)
            same = method == "run_1" and here[0]["of_layer"] == 16
            lines.append([method, f"{here[0]['of_layer']:g}",
                          *(pm_seeds(by_seed(here, value).values(), digits)
                            for value, digits in columns.values()),
                          "-" if same else interval(difference(found), 4),
                          len(in_order(here, "seed"))])
    lines += references(rows, twins, columns, len(columns) + 4)
    return markdown(["form", "k_min or gamma", *columns, "primary: difference to run_1", "seeds"],
                    lines)


GROUND_TRUTH = {  # heading -> metric of bench/ground_truth.jsonl, digits
    "MCC": ("mcc", 3), "uniqueness": ("uniqueness", 3), "precision": ("precision", 3),
    "recall": ("recall", 3), "dead": ("dead", 3), "FVU": ("fvu", 3), "L0": ("l0", 2),
    "true L0": ("true_l0", 2),
}


def ground_truth_table(rows):
    """bench/ground_truth.jsonl as Markdown: the means over seeds."""
    seeds = of(rows, stage="seeds")
    if not seeds:
        return ""
    columns = {heading: (metric_mean(metric), digits)
               for heading, (metric, digits) in GROUND_TRUTH.items()}
    lines, header = seeds_table(seeds, columns, "MCC")
    return f"{where_made(seeds)}.\n\n{markdown(header, lines)}"


def method_styles(methods):
    """Colour and marker of each method; this project's are black, the untrained SAE's grey."""
    ours = [method for method in methods if method.startswith(OURS)]
    made = [method for method in methods if method not in (*ours, "untrained")]
    looks = {m: (COLOURS[i % len(COLOURS)], "o^v"[i // len(COLOURS)]) for i, m in enumerate(made)}
    looks |= {method: ("black", "sDo^v"[i % 5]) for i, method in enumerate(ours)}
    return looks | {"untrained": (GREY, "x")}


PANELS = (("FVU", "fvu"), ("CE loss score", "ce_loss_score"), ("primary metric", "primary"))


def against_l0(axes, label):
    axes.set_xscale("log")
    plain_log_axis(axes.xaxis, *axes.get_xlim())
    axes.set_ylabel(label)


def draw_forms(rows, runs, path):
    """FVU, CE loss score and the primary metric against L0: forms as lines, runs in circles.

    A contrast of runs with unequal L0 is read off these lines. Bars: s.e. over seeds.
    """
    _, runs = other_l0(runs)
    styles = method_styles(in_order(rows, "method"))
    figure, line = plt.subplots(1, 3, figsize=(DOUBLE, 2.8), layout="constrained")
    for axes, (label, metric) in zip(line, PANELS):
        value = row_value(metric)
        for method in in_order(rows, "method"):
            points = []
            for here in by_sparsity(of(rows, method=method)):
                values = list(by_seed(here, value).values())
                points.append((metric_mean("l0")(here), mean(values),
                               stderr(values)))
            l0, height, error = zip(*sorted(points))
            colour, marker = styles[method]
            axes.errorbar(l0, height, yerr=error, color=colour, marker=marker, label=method,
                          elinewidth=0.7, capsize=1.5)
        for run in runs:
            found = primary(run) if metric == "primary" else mean_over_layers(run, metric)
            at = mean_over_layers(run, "l0"), found
            axes.scatter(*at, s=60, facecolor="white", edgecolor="black", linewidth=0.6, zorder=4)
            axes.text(*at, run["name"].removeprefix("run_"), ha="center", va="center_baseline",
                      fontsize=6, zorder=5)
        against_l0(axes, label)
    figure.supxlabel("L0: active features per token (mean over layers); in circles: runs of the "
                     f"plan at another L0 than {REFERENCE}", fontsize=7)
    legend_above(figure, line[0].get_legend_handles_labels()[0], DOUBLE)
    save(figure, path)


def draw_quality(rows, path):
    """FVU, CE loss score and the primary metric against L0: a line per method, dots for seeds."""
    curves, seeds = of(rows, stage="curves"), of(rows, stage="seeds")
    styles = method_styles(in_order(curves + seeds, "method"))
    figure, line = plt.subplots(1, 3, figsize=(DOUBLE, 2.6), layout="constrained")
    for axes, (label, metric) in zip(line, PANELS):
        value = row_value(metric)
        for method in in_order(curves, "method"):
            colour, marker = styles[method]
            points = sorted((metric_mean("l0")(here), value(here))
                            for here in by_sparsity(of(curves, method=method)))
            axes.plot(*zip(*points), color=colour, marker=marker, label=method)
        for method in in_order(seeds, "method"):
            mine = of(seeds, method=method)
            l0, values = by_seed(mine, metric_mean("l0")), by_seed(mine, value)
            if method == "untrained":
                if value is row_primary:
                    axes.axhline(mean(list(values.values())), color=GREY, linestyle="-.")
                continue
            axes.plot(list(l0.values()), list(values.values()), color=styles[method][0],
                      linestyle="none", marker=".", alpha=0.6,
                      label=None if of(curves, method=method) else method)
        if value is row_primary:
            axes.axhline(row_primary(curves, "llm"), color="black", linestyle=":")
        against_l0(axes, label)
    handles = line[0].get_legend_handles_labels()[0]
    handles += [Line2D([], [], color="black", linestyle=":", label="language model")]
    if of(seeds, method="untrained"):
        handles += [Line2D([], [], color=GREY, linestyle="-.", label="untrained SAE")]
    figure.supxlabel("L0: active features per token (mean over layers)", fontsize=7)
    legend_above(figure, handles, DOUBLE)
    save(figure, path)


def draw_ground_truth(rows, path):
    """A panel per figure of the ground truth: a dot per seed, a bar at their mean.

    Without the untrained SAE, far off in all but L0: it is in the table.
    """
    seeds = of(rows, stage="seeds")
    methods = [method for method in in_order(seeds, "method") if method != "untrained"]
    shown = [(h, m) for h, (m, _) in GROUND_TRUTH.items() if m not in ("true_l0",)]
    figure, line = plt.subplots(1, len(shown), sharey=True, layout="constrained",
                                figsize=(DOUBLE, 0.6 + 0.2 * len(methods)))
    styles = method_styles(methods)
    for axes, (heading, metric) in zip(line, shown):
        for i, method in enumerate(methods):
            values = [row[metric] for row in of(seeds, method=method)]
            colour = styles[method][0]
            axes.plot(values, [i] * len(values), ".", color=colour, alpha=0.7)
            axes.plot([np.mean(values)], [i], "|", color=colour, markersize=9)
        if metric == "l0":
            axes.axvline(np.mean([row["true_l0"] for row in seeds]), color="black", linestyle=":")
        axes.set_xlabel(heading)
        axes.xaxis.set_major_locator(MaxNLocator(2))
    line[0].set_yticks(range(len(methods)), methods)
    line[0].set_ylim(len(methods) - 0.5, -0.5)
    save(figure, path)


def draw_forest(rows, reference, path):
    """The difference of each run's primary metric to the reference's, with its 95% interval."""
    rows = [row for row in rows if math.isfinite(row.get("p", math.nan))]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(DOUBLE, 0.7 + 0.24 * len(rows)), layout="constrained")
    for i, row in enumerate(rows):
        colour = GREY if row["verdict"] == "not comparable" else "black"
        centre = row["difference"]
        axes.errorbar(centre, i, color=colour, marker="o", capsize=2, xerr=[
            [centre - row["low"]], [row["high"] - centre]])
        axes.text(1.02, i, f"L0 {row['l0']:.1f}   n = {row['paired']:.0f}   "
                  f"p: {show_p(row['p'])}   {row['verdict']}", fontsize=6, color=colour,
                  transform=axes.get_yaxis_transform(), va="center")
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(rows)), [run_label(row["run"], longest=1000) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"primary metric: difference to {reference['name']} (L0 "
                    f"{mean_over_layers(reference, 'l0'):.1f}), paired over seeds, 95% interval; "
                    "p by Holm over all rows")
    save(figure, path)


def draw_plane(runs, styles, path):
    """Each run's way through the plane of γ and τ_sel, a panel per layer; mean over seeds."""
    layers = sorted({layer for run in runs for layer in run["log"]})
    figure, (line,) = plt.subplots(1, len(layers), sharex=True, sharey=True, squeeze=False,
                                   figsize=(DOUBLE, 2.6), layout="constrained")
    handles = {}
    for layer, axes in zip(layers, line):
        for run in runs:
            gamma, tau = curve(run, layer, "gamma"), curve(run, layer, "tau_sel")
            if gamma is None or tau is None:
                continue
            colour, marker = styles[run["name"]]
            axes.plot(gamma[1], tau[1], color=colour, linewidth=0.8)
            axes.plot(gamma[1][-1:], tau[1][-1:], color=colour, marker=marker or "o")
            handles[run["name"]] = Line2D([], [], color=colour, marker=marker or "o",
                                          label=run_label(run))
        axes.plot([0.15], [0.3], "k+", markersize=7)
        axes.set_title(f"layer {layer}")
    if not handles:
        plt.close(figure)
        return
    line[0].set_ylabel(r"$\tau_\mathrm{sel}$")
    line[0].xaxis.set_major_locator(MaxNLocator(4))
    figure.supxlabel(r"$\gamma$ (cross: where training starts; symbol: where it ends)", fontsize=7)
    legend_above(figure, list(handles.values()), DOUBLE)
    save(figure, path)


# ---- all of it ------------------------------------------------------------------------------


def draw_profile(profile, runs, reference, folder):
    """Every figure and table of one profile into folder; returns the tables' text."""
    for stale in ("adaptation", "training_losses", "training_sparsity", "probing", "forest",
                  "plane"):
        for suffix in (".png", ".pdf"):
            (folder / stale).with_suffix(suffix).unlink(missing_ok=True)
    styles = styles_of(runs)
    logged = [run for run in runs if run["log"]]
    if logged:
        draw_panels(logged, ADAPTATION, styles, folder / "adaptation")
        parts = [row for row in LOSSES if any(
            curve(run, layer, row[0]) is not None for run in logged for layer in run["log"])]
        draw_panels(logged, parts or LOSSES, styles, folder / "training_losses")
        draw_panels(logged, SPARSITY, styles, folder / "training_sparsity")
    draw_probing(runs, styles, folder / "probing")
    rows = ablation_rows(runs, reference)
    draw_ablation(rows, styles, folder / "ablation")
    if reference:
        draw_forest(rows, reference, folder / "forest")
    if logged:
        draw_plane(logged, styles, folder / "plane")
    text = tables(profile, runs, rows)
    (folder / "ablation.md").write_text(text, encoding="utf-8")
    return text


def draw_bench(root, folder, runs):
    """Figures and tables of what bench/ measured, where it did; returns the tables' text."""
    texts = []
    for name, table, draw in (("quality", lambda rows: quality_tables(rows, runs), draw_quality),
                              ("ground_truth", ground_truth_table, draw_ground_truth)):
        rows = read_rows(root / "bench" / f"{name}.jsonl")
        text = table(rows)
        if not text:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        texts.append(f"# bench/{name}.py\n\n{text}\n")
        (folder / f"{name}.md").write_text(texts[-1], encoding="utf-8")
        if forms := of(rows, stage="forms"):
            with plt.rc_context(STYLE):
                draw_forms(forms, runs, folder / "forms")
        if of(rows, stage="curves" if name == "quality" else "seeds"):
            with plt.rc_context(STYLE):
                draw(rows, folder / name)
    return "\n".join(texts)


def main(root=HERE):
    """Draws everything found under root; returns the exit status, 1 if nothing could be drawn."""
    runs, references = load_runs(root)
    if not runs:
        complain(f"no complete run found in {root}: expected folders run_* with final_info.json "
                 "and config.json; make one with python experiment.py --out_dir=run_try.")
        return 1
    for profile in dict.fromkeys(run["profile"] for run in runs):
        mine = [run for run in runs if run["profile"] == profile]
        folder = root / "figures" / profile
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with plt.rc_context(STYLE):
                text = draw_profile(profile, mine, references.get(profile), folder)
        except OSError as error:
            complain(f"{error.filename or folder} can't be written ({error.strerror}): make "
                     "room or set its permissions, and run plot.py again.")
            return 1
        print(text)
        print(f"figures of {profile}: {folder}" + (
            "" if any(run["log"] for run in mine) else " (no training logs, so no curves)"))
    tinylm = [run for run in runs if run["profile"] == "tinylm"]
    if text := draw_bench(root, root / "figures" / "bench", tinylm):
        print(f"{text}\nfigures of bench/: {root / 'figures' / 'bench'}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(f"plot.py: takes no argument and got {' '.join(sys.argv[1:])}: choose the runs "
                 "in the dict labels at its top.")
    sys.exit(main())
