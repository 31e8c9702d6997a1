"""Figures of what came out: of a Report, or None where there is nothing to show. No torch."""

from __future__ import annotations

import math
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator, NullLocator

from harness.curves import moves_l0
from harness.drawing import (
    DOUBLE,
    GREY,
    label_ends,
    layer_panels,
    plain_log_axis,
    run_label,
)
from harness.run_records import MARKERS, read_densities, seed_means
from harness.tables import (
    COLUMNS,
    GIVEN,
    STAGES,
    ablation_rows,
    interval,
    pm,
    run_costs,
    show,
    show_p,
)
from harness.verdict import MAX_L0_RATIO, MIN_SEEDS, PRIMARY, compare_records, mean, stderr

K_VALUES = (1, 2, 5, 10, 20, 50)
OVER_L0 = (("FVU ↓", "fvu"), ("CE loss score ↑", "ce_loss_score"), ("primary metric ↑", PRIMARY))
STAGE_COLOURS = dict(zip(STAGES, ("#bbbbbb", "#0072B2", "#E69F00", "#009E73")))


def draw_over_l0(report):
    """FVU, CE loss score and the primary metric against L0: a line per method of several runs.

    A method is a `Report.curves`. A run alone is a dot. In grey what others' trainers do.
    """
    points = report.by_run.join(pd.Series({run.name: run for run in report.complete}, name="of"),
                                how="inner")
    points = points.assign(of=points["of"].map(lambda run: report.unlike(run) == "" and run))
    points = points[points["of"].astype(bool)]
    panels = [(label, metric) for label, metric in OVER_L0 if metric in points]
    methods = [[run for run in method if run.name in points.index] for method in report.curves]
    methods = [method for method in methods if method]
    if "l0" not in points or not panels or not methods:
        return None
    points, beyond = in_sight(points, methods, report.trainers)
    methods = [shown for method in methods
               if (shown := [run for run in method if run.name in points.index])]
    names = method_labels(methods)
    figure, (line,) = plt.subplots(1, len(panels), figsize=(DOUBLE, 2.6), squeeze=False,
                                   layout="constrained")
    for axes, (label, metric) in zip(line, panels):
        ends = []
        if report.trainers is not None:
            for name, mine in report.trainers.groupby("method", sort=False):
                mine = mine.sort_values("l0")
                axes.plot(mine["l0"], mine[metric], color="#bdbdbd", linewidth=0.8, zorder=1)
                ends.append((*mine[["l0", metric]].to_numpy()[-1], name, "#8a8a8a"))
        for method, name in zip(methods, names):
            colour = report.styles[method[0]][0]
            mine = points.loc[[run.name for run in method], ["l0", metric]].sort_values("l0")
            for run in method:
                values = [*seed_means(report.records, run, metric).values()]
                axes.errorbar(*mine.loc[run.name], yerr=stderr(values) or None, color=colour,
                              marker="o", elinewidth=0.7, capsize=1.5, zorder=3)
            axes.plot(*mine.to_numpy().T, color=colour, zorder=2)
            ends.append((*mine.to_numpy()[-1], name, colour))
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        plain_log_axis(axes.xaxis, low, high)
        axes.set_title(label)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    figure.supxlabel("L0: active features per token (mean over layers); bars: s.e. over seeds"
                     + "; grey: SAELens' trainers, one seed" * (report.trainers is not None)
                     + beyond, fontsize=7)
    label_ends(figure, {axes: ends}, size=5.5)  # in the last panel
    return figure


def in_sight(points, methods, trainers):
    """Points whose L0 is within a factor of 2 of the lines', and a note on those that aren't.

    All where there are no lines.
    """
    several = [run.name for method in methods if len(method) > 1 for run in method]
    lines = [*points["l0"].reindex(several), *([] if trainers is None else trainers["l0"])]
    if not lines:
        return points, ""
    near = points["l0"].between(min(lines) / 2, 2 * max(lines))
    beyond = [f"{name} (L0 {l0:.0f})" for name, l0 in points["l0"][~near].items()]
    return points[near], f"\nbeyond: {', '.join(beyond)}" if beyond else ""


def method_labels(methods):
    """What sets each method apart from the others of several runs; of a run alone its label."""
    several = [method for method in methods if len(method) > 1]
    found = []
    for method in methods:
        if len(method) == 1:
            found.append(run_label(method[0], longest=0))
            continue
        apart = {}
        for other in several:
            for name in compare_records(method[0].config, other[0].config).varied:
                if name in method[0].settings and name not in moves_l0(method[0].config):
                    apart[name] = method[0].settings[name]
        text = ", ".join(f"{name} {value}" for name, value in apart.items())
        names = " to ".join(dict.fromkeys([method[0].label, method[-1].label]))
        found.append((text if 0 < len(apart) <= 2 else names).replace("$", r"\$"))
    return found


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
    probes = probe_accuracies(report) if len(report.records) else pd.DataFrame()
    if probes.empty:
        return None
    given = probes["run"].isin([run.name for run in report.runs if run.given])
    # The given baseline stands apart, also with its model's figures, where a run has its own.
    references = probes[~given | ~probes["layer"].isin(probes["layer"][~given])]
    others = [run.name for run in report.complete
              if not run.given and report.unlike(run, "layers")]
    references = references[~references["run"].isin(others)]  # of another language model, say
    layers = sorted(set(probes["layer"]))
    figure, (panels,) = layer_panels(layers, 2.75, sharey=True)
    labels, banded = {}, False
    for layer, axes in zip(layers, panels):
        saes = probes[(probes["layer"] == layer) & (probes["who"] == "sae") & probes["k"].notna()]
        ends = labels[axes] = []
        for run, (colour, marker) in report.styles.items():
            mine = saes.loc[saes["run"] == run.name, ["k", "mean", "stderr"]].to_numpy()
            if len(mine):
                axes.errorbar(*mine.T, color=colour, marker=marker or ".", capsize=1.5,
                              markerfacecolor="white" if marker else colour, elinewidth=0.7,
                              zorder=3)
                ends.append((*mine[-1, :2], run_label(run, longest=0), colour))
        for who, label, colour, dashes in (
                ("untrained", "untrained SAE", GREY, "-."),
                ("llm", "language model, best k", "black", "-")):
            mine = references[(references["layer"] == layer) & (references["who"] == who)]
            by_k = mine.groupby("k")["mean"].agg(["mean", "min", "max"])
            if len(by_k):
                axes.plot(by_k["mean"], dashes, color=colour, zorder=2)
                ends.append((by_k.index[-1], by_k["mean"].iloc[-1], label, colour))
            if (by_k["max"] - by_k["min"]).max() > 5e-4:
                banded = True
                axes.fill_between(by_k.index, by_k["min"], by_k["max"], color=colour, alpha=0.15,
                                  linewidth=0)
            full = mine["mean"][mine["k"].isna()]
            if who == "llm" and len(full):
                axes.axhline(full.mean(), zorder=1, color="black", linestyle=":")
                ends.append((K_VALUES[-1], full.mean(), "language model, all dimensions"
                             + report.full_probe[1], "black"))
        if len(mine := saes[given[saes.index]]):
            axes.plot(mine["k"], mine["mean"], "x", color=GREY)
            ends.append((mine["k"].max(), mine["mean"].iloc[-1], GIVEN, GREY))
        axes.set_xscale("log")
        axes.set_xticks(K_VALUES, [str(k) for k in K_VALUES])
        axes.xaxis.set_minor_locator(NullLocator())
    panels[0].set_ylabel("probing accuracy (test) ↑")
    note = "; bands: range over runs" * banded + (
        f"; references: not of {', '.join(others)}" if others else "")
    figure.supxlabel(f"k, features or dimensions that the probe reads{note}", fontsize=7)
    label_ends(figure, {panels[-1]: labels[panels[-1]]}, wrap=24)
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
    reference = report.reference.name if report.reference else "the reference"
    columns = [("primary", "primary ↑\n(± s.e.)", 2.94),
               ("difference", f"difference to\n{reference} [95%]", 3.68)]
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
        y = top + step * (i + 0.5)
        if i and kinds[i] != kinds[i - 1]:
            page.plot([left, DOUBLE - left], [top + step * i] * 2, color=GREY, linewidth=0.5)
        draw_ablation_dot(panel, report, row, i)
        draw_ablation_cells(page, row, y, left, columns)
    page.text(sum(dots) + 0.15, height - 0.06,
              "Grey: a raw difference to what can't be compared (L0 differs by over "
              f"{100 * (MAX_L0_RATIO - 1):.0f}%, or fewer than\n{MIN_SEEDS} seeds); a temperature "
              "or weight that was fixed, not learned. = L0: to the curve at equal L0.",
              va="bottom", fontsize=5.5, color=GREY)
    return figure


def draw_ablation_dot(panel, report, row, at):
    run = row["run"]
    colour, marker = report.styles.get(run, (GREY, "x") if run else ("black", "D"))
    panel.errorbar(row["primary"], at, xerr=row["stderr"] or None, color=colour,
                   marker=marker or "o", capsize=2, elinewidth=0.9, markersize=3.5,
                   markerfacecolor="white" if marker in MARKERS[1:] else colour)
    if not run:
        panel.axvline(row["primary"], color=GREY, linestyle=":", linewidth=0.8, zorder=1)


def draw_ablation_cells(page, row, y, left, columns):
    run, figures = row["run"], row["figures"]
    name = run_label(run, longest=1000) if run else row["short"]
    page.text(left, y, textwrap.fill(name, 32, max_lines=2, placeholder=" …"), va="center",
              fontsize=5.8, linespacing=1.05)
    cells = {metric: show(row[metric], digits) for metric, *_, digits in COLUMNS}
    cells |= {"primary": pm(row["primary"], row["stderr"], 3),
              "difference": interval(figures, 3, gap="\n")}
    if figures.get("interpolated"):
        cells["difference"] = cells["difference"].replace("\n", " = L0\n")
    for key, _, x in columns:
        grey = key in row["fixed"] or (key == "difference" and not figures.get("comparable"))
        text = cells[key].replace("-", "−") if len(cells[key]) > 1 else cells[key]
        page.text(x, y, text if run or text != "-" else "", ha="center", va="center",
                  fontsize=5.8, color=GREY if grey else "black")


def draw_forest(report):
    """The difference of each run's primary metric to the reference's, with its 95% interval.

    A run that can't be compared has a line that says so, and no dot.
    """
    rows = [row for row in ablation_rows(report) if math.isfinite(row["p"])]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(DOUBLE, 0.7 + 0.24 * len(rows)), layout="constrained")
    for i, row in enumerate(rows):
        found = row["figures"]
        centre, comparable = found["difference"], found["comparable"]
        text = f"L0 {row['l0']:.1f}   {row['verdict']}"
        if comparable:
            text = (f"L0 {row['l0']:.1f}   n = {found['n_paired_seeds']:.0f}   "
                    f"p: {show_p(row['p'])}   {row['verdict']}")
            axes.errorbar(centre, i, color=report.styles[row["run"]][0], marker="o", capsize=2,
                          xerr=[[centre - found["ci95_low"]], [found["ci95_high"] - centre]])
        axes.text(1.02, i, text, fontsize=6, color="black" if comparable else GREY,
                  transform=axes.get_yaxis_transform(), va="center")
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(rows)), [run_label(row["run"], longest=1000) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"primary metric: difference to {report.reference.name} (L0 "
                    f"{report.value(report.reference, 'l0'):.1f}), paired over seeds, 95% "
                    "interval, → better; p by Holm over all rows")
    return figure


def draw_density(report):
    """How often features fire: a histogram of log densities per layer, a line per run."""
    densities = {run: found for run in report.styles if (found := read_densities(run.folder))}
    if not densities:
        return None
    layers = sorted({layer for found in densities.values() for layer in found})
    figure, (panels,) = layer_panels(layers, 2.3, sharey=True, sharex=True)
    active = np.concatenate([values for found in densities.values() for values in found.values()])
    active = active[active > 0]
    lowest = math.floor(np.log10(active.min())) if len(active) else -4
    edges = 10 ** np.arange(lowest, 0.1, 0.25)
    for layer, axes in zip(layers, panels):
        ends = []
        for run, found in densities.items():
            if layer not in found:
                continue
            values, colour = np.asarray(found[layer]), report.styles[run][0]
            counts, _ = np.histogram(values, edges)
            axes.stairs(counts, edges, color=colour, linewidth=1.0)
            axes.plot([edges[0] / 4], [np.sum(values == 0)], "o", color=colour, clip_on=False)
            ends.append((edges[counts.argmax() + 1], counts.max(), run_label(run, 0), colour))
        axes.set_xscale("log")
        axes.set_xlim(edges[0] / 6, 1)
        decades = 10.0 ** np.arange(lowest, 1)
        axes.set_xticks([edges[0] / 4, *decades], ["0", *(f"{tick:g}" for tick in decades)])
        axes.xaxis.set_minor_locator(NullLocator())
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("features, per quarter of a decade")
    figure.supxlabel("density: part of tokens on which a feature is active; dots: silent features",
                     fontsize=7)
    label_ends(figure, {axes: ends})  # in the last panel
    return figure


def draw_cost(report):
    """What each run took: minutes by stage as bars, tokens per second beside them."""
    rows = [row for row in run_costs(report) if math.isfinite(row["total"])]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(DOUBLE, 0.75 + 0.2 * len(rows)), layout="constrained")
    for i, row in enumerate(rows):
        start = 0.0
        for stage in STAGES:
            width = row[stage] if math.isfinite(row[stage]) else 0.0
            axes.barh(i, width, left=start, height=0.62, color=STAGE_COLOURS[stage],
                      label=stage.replace("_", " ") if i == 0 else None)
            start += width
        rest = max(0.0, row["total"] - start)
        axes.barh(i, rest, left=start, height=0.62, facecolor="none", edgecolor=GREY,
                  linewidth=0.5, label="the rest" if i == 0 else None)
        seeds = f"{row['seeds']} seed" + "s" * (row["seeds"] != 1)
        text = f"{seeds}   {show(row['speed'], 0)} tokens/s   {row['total']:.1f} min" \
               + "   parts reused" * row["reused"]
        axes.text(1.02, i, text, fontsize=6, va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(rows)), [run_label(row["run"], 0) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("minutes ← better; tokens per second of training, all SAEs of a run together")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=5, handlelength=1, columnspacing=1.2)
    return figure
