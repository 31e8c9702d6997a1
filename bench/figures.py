"""Figures and tables of what bench/ measured: quality.jsonl and ground_truth.jsonl.

Each line of those files is one SAE: what identifies it (stage, method, seed, sparsity by layer, its
own layer), its metrics, where and when it was made. bench/quality.py and bench/ground_truth.py
write them, and read them with `read_rows` and `of`; `python plot.py` calls `draw_bench`.
"""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from harness.drawing import DOUBLE, GREY, STYLE, label_ends, plain_log_axis, save
from harness.run_records import COLOURS, seed_means
from harness.tables import interval, markdown, pm, show, show_p
from harness.verdict import (
    PRIMARY,
    PRIMARY_KS,
    holm,
    mean,
    paired_difference,
    same_l0,
    stderr,
    with_current_names,
)

REFERENCE = "run_1"  # of the plan: whose form the tables of forms are about
PEER = "BatchTopK"  # what methods are compared to
OURS = "this project"  # what the names of its methods begin with
UNTRAINED = "untrained"
LLM = f"llm_{PRIMARY}"
PANELS = (("FVU ↓", "fvu"), ("CE loss score ↑", "ce_loss_score"), ("primary metric ↑", PRIMARY))
QUALITY = {  # heading -> metric of bench/quality.jsonl, digits
    "primary": (PRIMARY, 4), "L0": ("l0", 2), "FVU": ("fvu", 4),
    "CE loss score": ("ce_loss_score", 4), "alive": ("frac_alive", 3),
}
BETTER = {"dead": "↓", "FVU": "↓", "L0": ""}  # which way is; of the others' panels: up
GROUND_TRUTH = {  # the same of bench/ground_truth.jsonl
    "MCC": ("mcc", 3), "uniqueness": ("uniqueness", 3), "precision": ("precision", 3),
    "recall": ("recall", 3), "dead": ("dead", 3), "FVU": ("fvu", 3), "L0": ("l0", 2),
    "true L0": ("true_l0", 2),
}


# ---- reading ----------------------------------------------------------------------------------


def read_rows(path):
    """The lines of a file of bench/ that exists, as dicts; none where it doesn't."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row | {"options": with_current_names(row.get("options", {}))} for row in rows]


def of(rows, **wanted):
    """The rows that have these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def frames(rows):
    """{stage: its rows as a frame}, in which PRIMARY and LLM are the SAE's and the model's."""
    found = {}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        frame = pd.DataFrame(of(rows, stage=stage))
        for name, who in ((PRIMARY, "sae"), (LLM, "llm")):
            probes = frame.filter(items=[f"{who}_top_{k}_test_accuracy" for k in PRIMARY_KS])
            frame[name] = probes.mean(axis=1)
        found[stage] = frame.assign(sparsity=frame["sparsity"].map(tuple))
    return found


def groups(frame, key):
    """(value, its rows) for each value of a column, in the order in which they first appear."""
    return list(frame.groupby(key, sort=False))


def by_seed(frame, metric):
    """{seed: a metric's mean over the layers}, of one method's rows at one sparsity."""
    return frame.groupby("seed", sort=False)[metric].mean().to_dict()


# ---- tables -----------------------------------------------------------------------------------


def where_made(frame):
    """Machine, cores and dates of rows, in words."""
    machines = []
    for machine, mine in groups(frame, "machine"):
        cores = sorted(mine["cores"].unique())
        machines.append(f"{machine}, {' or '.join(map(str, cores))} core" + "s" * (cores != [1]))
    dates = sorted(frame["date"].unique())
    return " and ".join(machines) + f"; {dates[0]}" + f" to {dates[-1]}" * (len(dates) > 1)


def pm_seeds(values, digits):
    return pm(mean(list(values)), stderr(list(values)), digits)


def mean_cells(frame, columns):
    return [show(frame[metric].mean(), digits) for metric, digits in columns.values()]


def seed_cells(frame, columns):
    return [pm_seeds(by_seed(frame, metric).values(), digits)
            for metric, digits in columns.values()]


def seeds_table(frame, columns, first):
    """A row per method: columns as mean ± s.e. over seeds, and its paired difference in `first`.

    columns: heading -> (metric, digits).
    """
    metric, digits = columns[first]
    peer = by_seed(frame[frame["method"] == PEER], metric)
    methods = groups(frame, "method")
    differences = [paired_difference(by_seed(mine, metric), peer) if method != PEER else {}
                   for method, mine in methods]
    adjusted = holm([found.get("p", math.nan) for found in differences])
    lines = [[method, *seed_cells(mine, columns), interval(found, digits), show_p(p),
              mine["seed"].nunique()]
             for (method, mine), found, p in zip(methods, differences, adjusted)]
    return ["method", *columns, f"{first}: difference to {PEER}", "p (Holm)", "seeds"], lines


def language_model(frame, width, at):
    """A table's row for the language model's own dimensions, the primary metric in cell `at`."""
    line = ["language model, best k dimensions", *["-"] * (width - 1)]
    line[at] = show(frame[LLM].mean(), 4)
    return line


def references(frame, untrained, width):
    """The last lines of a table: untrained SAEs, where they have been scored, and the model."""
    lines = [language_model(frame, width, at=2)]
    if len(untrained):
        cells = mean_cells(untrained, QUALITY)
        lines.insert(0, ["untrained SAE", "-", *cells, *["-"] * (width - 2 - len(cells))])
    return lines


def quality_tables(rows, report=None):
    """bench/quality.jsonl as Markdown: seeds at one L0, the curves, the forms, and the sweep.

    report: plot.py's of the plan's runs; of the ones at another L0 than the reference's, what can
    be read off the curve of its form.
    """
    stages, parts = frames(rows), []
    seeds = stages.get("seeds")
    untrained = () if seeds is None else seeds[seeds["method"] == UNTRAINED]
    if seeds is not None:
        header, lines = seeds_table(seeds, QUALITY, "primary")
        lines.append(language_model(seeds, len(header), at=1))
        parts += [f"At one L0. {where_made(seeds)}.", markdown(header, lines),
                  markdown(*seeds_table(seeds, {"FVU": QUALITY["FVU"]}, "FVU"))]
    if (curves := stages.get("curves")) is not None:
        lines = [[method, sparsity_text(sparsity), *mean_cells(here, QUALITY)]
                 for method, mine in groups(curves, "method")
                 for sparsity, here in groups(mine, "sparsity")]
        lines += references(curves, untrained, len(QUALITY) + 2)
        parts += [f"Over L0, one seed. {where_made(curves)}.",
                  markdown(["method", "k, or coefficient by layer", *QUALITY], lines)]
    if (forms := stages.get("forms")) is not None:
        parts += [f"Forms of this project's method, mean ± s.e. over seeds. {where_made(forms)}.",
                  forms_table(forms, untrained)]
        if report and (lines := read_off_lines(forms, report)):
            parts += [
                f"Runs of the plan at another L0 than {REFERENCE}'s, beside {REFERENCE}'s form at "
                "that L0: seed by seed on straight lines between the k_min above, L0 logarithmic; "
                "paired over seeds, 95% interval.",
                markdown(["run", "metric", "L0", f"{REFERENCE}'s L0", "run", REFERENCE,
                          "raw difference", f"{REFERENCE}'s form at that L0",
                          "difference at that L0", "seeds"], lines)]
    if (sweep := stages.get("sweep")) is not None:
        lines = [[method, f"{lr:g}",
                  "; ".join(f"{value:g}: {show(here['l0'].mean(), 1)}, "
                            f"{show(here['fvu'].mean(), 4)}"
                            for value, here in groups(at_lr, "of_layer"))]
                 for method, mine in groups(sweep, "method") for lr, at_lr in groups(mine, "lr")]
        parts += [f"The sweep. {where_made(sweep)}.",
                  markdown(["method", "learning rate", "k or coefficient: L0, FVU"], lines)]
    if (ranges := stages.get("range")) is not None:
        lines = [[method, f"{here['of_layer'].iloc[0]:g}",
                  *("/".join(show(value, digits) for value in here[metric])
                    for metric, digits in (("l0", 1), ("fvu", 3)))]
                 for method, mine in groups(ranges, "method")
                 for _, here in groups(mine, "sparsity")]
        parts += [f"One coefficient for all layers, one seed. {where_made(ranges)}.",
                  markdown(["method", "coefficient", "L0 by layer", "FVU by layer"], lines)]
    return "\n\n".join(parts)


def sparsity_text(values):
    """The sparsity of an SAE per layer: one number where it is the same on all."""
    texts = [f"{value:.3g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else "/".join(texts)


def forms_table(frame, untrained):
    """A row per form and sparsity, and its paired difference to run_1 at run_1's own k."""
    plain = frame[(frame["method"] == "run_1") & (frame["of_layer"] == 16)]
    reference, lines = by_seed(plain, PRIMARY), []
    for method, mine in groups(frame, "method"):
        for _, here in groups(mine, "sparsity"):
            found = paired_difference(by_seed(here, PRIMARY), reference)
            value = here["of_layer"].iloc[0]
            lines.append([method, f"{value:g}", *seed_cells(here, QUALITY),
                          "-" if method == "run_1" and value == 16
                          else interval(found, 4), here["seed"].nunique()])
    lines += references(frame, untrained, len(QUALITY) + 4)
    return markdown(["form", "k_min or gamma", *QUALITY, "primary: difference to run_1", "seeds"],
                    lines)


def other_l0(report):
    """The runs whose L0 is too far from the reference's for a comparison, of other methods."""
    if not report or not report.reference:
        return []
    at = report.value(report.reference, "l0")
    return [run for run in report.complete
            if not (run.given or report.unlike(run) or report.reference_curve(run).apart)
            and not same_l0(report.value(run, "l0"), at)]


def read_off(frame, metric, at):
    """{seed: a metric on that seed's line through a form's sparsities, at the L0 of `at`}.

    Straight lines, L0 logarithmic; none for a seed whose L0 lies outside of them.
    """
    found = {}
    for seed, l0 in at.items():
        points = sorted((math.log(here["l0"].mean()), here[metric].mean())
                        for _, here in groups(frame[frame["seed"] == seed], "sparsity"))
        if points and points[0][0] <= math.log(l0) <= points[-1][0]:
            found[seed] = float(np.interp(math.log(l0), *zip(*points)))
    return found


def read_off_lines(frame, report):
    """A line per run at another L0 than the reference's, and metric; see `quality_tables`."""
    plain, lines, reference = frame[frame["method"] == REFERENCE], [], report.reference
    for run in other_l0(report):
        for label, metric in (("primary", PRIMARY), ("FVU", "fvu")):
            mine, theirs = (seed_means(report.records, each, metric) for each in (run, reference))
            there = read_off(plain, metric, seed_means(report.records, run, "l0"))
            lines.append([
                run.name, label, *(show(report.value(each, "l0"), 1) for each in (run, reference)),
                pm_seeds(mine.values(), 4), pm_seeds(theirs.values(), 4),
                show(paired_difference(mine, theirs).get("difference", math.nan), 4, sign=True),
                pm_seeds(there.values(), 4) if there else "outside of the curve",
                interval(paired_difference(mine, there), 4) if there else "-",
                len(there) or "-"])
    return lines


def ground_truth_table(rows):
    """bench/ground_truth.jsonl as Markdown: the means over seeds."""
    seeds = frames(rows).get("seeds")
    if seeds is None:
        return ""
    return f"{where_made(seeds)}.\n\n{markdown(*seeds_table(seeds, GROUND_TRUTH, 'MCC'))}"


# ---- figures ----------------------------------------------------------------------------------


def method_styles(methods):
    """Colour and marker of each method; this project's are black, the untrained SAE's grey."""
    ours = [method for method in methods if method.startswith(OURS)]
    made = [method for method in methods if method not in (*ours, UNTRAINED)]
    looks = {m: (COLOURS[i % len(COLOURS)], "o^v"[i // len(COLOURS)]) for i, m in enumerate(made)}
    looks |= {method: ("black", "sDo^v"[i % 5]) for i, method in enumerate(ours)}
    return looks | {UNTRAINED: (GREY, "x")}


def against_l0(axes, label):
    axes.set_xscale("log")
    plain_log_axis(axes.xaxis, *axes.get_xlim())
    axes.set_title(label)


def comparable_trainers(source, report):
    """SAELens' trainers over L0, for `Report.trainers`; None where runs can't be held beside them.

    They can on tinylm, on these layers, where the language model's own best dimensions tell the
    same: the model, the texts and the tasks are the same then.
    """
    rows = of(read_rows(source / "quality.jsonl"), stage="curves")
    base = report.reference or next((run for run in report.complete if not run.given), None)
    if not rows or base is None or base.profile != "tinylm":
        return None
    curves = frames(rows)["curves"]
    mine = report.records[report.records["run"] == base.name]
    mine = mine[mine["metric"] == LLM].groupby("layer")["value"].mean()
    theirs = curves.groupby("layer")[LLM].mean()
    if set(mine.index) != set(theirs.index) or not (mine - theirs).abs().max() < 0.005:
        return None
    curves = curves[~curves["method"].str.startswith((OURS, UNTRAINED))]
    metrics = ["l0", *(metric for _, metric in PANELS)]
    return curves.groupby(["method", "sparsity"], sort=False)[metrics].mean().reset_index()


def draw_forms(frame, report, path):
    """FVU, CE loss score and the primary metric against L0: forms as lines, runs in circles.

    A contrast of runs with unequal L0 is read off these lines. Bars: s.e. over seeds.
    """
    styles = method_styles(frame["method"].unique())
    figure, line = plt.subplots(1, 3, figsize=(DOUBLE, 2.5), layout="constrained")
    for axes, (label, metric) in zip(line, PANELS):
        ends = []
        for method, mine in groups(frame, "method"):
            points = []
            for _, here in groups(mine, "sparsity"):
                values = list(by_seed(here, metric).values())
                points.append((here["l0"].mean(), mean(values), stderr(values)))
            l0, height, error = zip(*sorted(points))
            colour, marker = styles[method]
            axes.errorbar(l0, height, yerr=error, color=colour, marker=marker, elinewidth=0.7,
                          capsize=1.5)
            ends.append((l0[-1], height[-1], method, colour))
        for run in other_l0(report):
            at = report.value(run, "l0"), report.value(run, metric)
            axes.scatter(*at, s=60, facecolor="white", edgecolor="black", linewidth=0.6, zorder=4)
            axes.text(*at, run.name.removeprefix("run_"), ha="center", va="center_baseline",
                      fontsize=6, zorder=5)
        against_l0(axes, label)
    figure.supxlabel("L0: active features per token (mean over layers); in circles: runs of the "
                     f"plan at another L0 than {REFERENCE}", fontsize=7)
    label_ends(figure, {axes: ends}, wrap=24)  # in the last panel
    save(figure, path)


def draw_quality(stages, path):
    """FVU, CE loss score and the primary metric against L0: a line per method, dots for seeds."""
    curves, seeds = stages["curves"], stages.get("seeds", stages["curves"].iloc[:0])
    styles = method_styles(list(dict.fromkeys([*curves["method"], *seeds["method"]])))
    figure, line = plt.subplots(1, 3, figsize=(DOUBLE, 2.6), layout="constrained")
    for axes, (label, metric) in zip(line, PANELS):
        ends = []
        for method, mine in groups(curves, "method"):
            colour, marker = styles[method]
            points = sorted((here["l0"].mean(), here[metric].mean())
                            for _, here in groups(mine, "sparsity"))
            axes.plot(*zip(*points), color=colour, marker=marker)
            ends.append((*points[-1], method, colour))
        for method, mine in groups(seeds, "method"):
            values = by_seed(mine, metric).values()
            if method == UNTRAINED:
                if metric == PRIMARY:
                    height = mean(list(values))
                    axes.axhline(height, color=GREY, linestyle="-.")
                    ends.append((axes.get_xlim()[1], height, "untrained SAE", GREY))
                continue
            axes.plot(list(by_seed(mine, "l0").values()), list(values), color=styles[method][0],
                      linestyle="none", marker=".", alpha=0.6)
        if metric == PRIMARY:
            axes.axhline(curves[LLM].mean(), color="black", linestyle=":")
            ends.append((axes.get_xlim()[1], curves[LLM].mean(), "language model", "black"))
        against_l0(axes, label)
    figure.supxlabel("L0: active features per token (mean over layers); dots: five seeds at L0 16",
                     fontsize=7)
    label_ends(figure, {axes: ends})  # in the last panel
    save(figure, path)


def draw_ground_truth(frame, path):
    """A panel per figure of the ground truth: a dot per seed, a bar at their mean.

    Without the untrained SAE, far off in all but L0: it is in the table.
    """
    methods = groups(frame[frame["method"] != UNTRAINED], "method")
    shown = [(heading, metric) for heading, (metric, _) in GROUND_TRUTH.items()
             if metric != "true_l0"]
    figure, line = plt.subplots(1, len(shown), sharey=True, layout="constrained",
                                figsize=(DOUBLE, 0.6 + 0.2 * len(methods)))
    styles = method_styles([method for method, _ in methods])
    for axes, (heading, metric) in zip(line, shown):
        for i, (method, mine) in enumerate(methods):
            colour = styles[method][0]
            axes.plot(mine[metric], [i] * len(mine), ".", color=colour, alpha=0.7)
            axes.plot([mine[metric].mean()], [i], "|", color=colour, markersize=9)
        if metric == "l0":
            axes.axvline(frame["true_l0"].mean(), color="black", linestyle=":")
        axes.set_xlabel(f"{heading} {BETTER.get(heading, '↑')}")
        axes.xaxis.set_major_locator(MaxNLocator(2))
    line[0].set_yticks(range(len(methods)), [method for method, _ in methods])
    line[0].set_ylim(len(methods) - 0.5, -0.5)
    save(figure, path)


def draw_bench(source, folder, report):
    """Figures and tables of the files in source that are there; returns the tables' text.

    report: plot.py's of the runs of tinylm, or None.
    """
    texts = []
    for name in ("quality", "ground_truth"):
        rows = read_rows(source / f"{name}.jsonl")
        text = quality_tables(rows, report) if name == "quality" else ground_truth_table(rows)
        if not text:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        texts.append(f"# bench/{name}.py\n\n{text}\n")
        (folder / f"{name}.md").write_text(texts[-1], encoding="utf-8")
        stages = frames(rows)
        with plt.rc_context(STYLE):
            if "forms" in stages:
                draw_forms(stages["forms"], report, folder / "forms")
            if name == "quality" and "curves" in stages:
                draw_quality(stages, folder / "quality")
            if name == "ground_truth":
                draw_ground_truth(stages["seeds"], folder / "ground_truth")
    return "\n".join(texts)
