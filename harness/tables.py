"""The tables of a profile, as rows and as Markdown: every run beside the reference. No torch."""

from __future__ import annotations

import functools
import math

import numpy as np

from harness.run_records import compare, natural, per_seed, seed_means, summary
from harness.verdict import (
    MAX_L0_RATIO,
    MIN_SEEDS,
    PRIMARY,
    PRIMARY_KS,
    holm,
    mean,
    paired_difference,
    read_off,
    same_l0,
    stderr,
)

GIVEN = "given baseline: untrained, zero weights"
LEARNED = {"tau_sel": "theta_1", "tau_pen": "theta_2", "gamma": "theta_3"}  # what can be
# Columns of the tables: metric, Markdown heading, heading in the figure (if there), decimals.
COLUMNS = (
    ("l0", "L0", "L0", 1), ("fvu", "FVU", "FVU\u2009↓", 3),
    ("ce_loss_score", "CE loss score", "CE\nscore\u2009↑", 3),
    ("dead_fraction", "dead fraction", "dead\u2009↓", 3), ("frac_alive", "frac alive", "", 3),
    ("tau_sel", "tau_sel", "$\\tau_{sel}$", 3), ("tau_pen", "tau_pen", "$\\tau_{pen}$", 3),
    ("gamma", "gamma", "$\\gamma$", 3), ("w", "w", "$w$", 4),
)  # fmt: skip
STAGES = ("harvest", "training", "core", "sparse_probing")  # seconds_… of final_info.json


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
        curve = report.reference_curve(run)
        word, figures = compare(records, run, reference, curve)
        if word == "not comparable" and "p" in figures:  # for its L0 alone
            word = curve.apart or word
        scores = seed_means(records, run, PRIMARY)
        rows.append({
            "run": run, "label": run.label + f" ({run.name})" * (run.label != run.name),
            "tests": GIVEN if run.given else run.tests, "range": "", "seeds": len(scores) or "-",
            "primary": report.value(run, PRIMARY), "stderr": stderr(list(scores.values())),
            "untrained": report.value(run, f"untrained_{PRIMARY}"),
            "verdict": run.unfinished or word, "figures": figures,
            "fvu_figures": fvu_figures(report, run, curve, figures),
            "fixed": [name for name in LEARNED if run.settings.get("constants_from_run")
                      or run.settings.get(name) is not None],
            **{metric: report.value(run, metric) for metric, *_ in COLUMNS}})
    for row, p in zip(rows, holm([row["figures"].get("p", math.nan) for row in rows])):
        row["p"] = p
    references = reference_row(report, "untrained", "untrained SAE"), reference_row(
        report, "llm", "language model", ", best k dimensions")
    return rows + [row for row in references if row]


def fvu_figures(report, run, curve, figures):
    """FVU's paired difference, where the primary metric's was read: "comparable" as there."""
    if "difference" not in figures:
        return {}
    mine, theirs = (per_seed(report.records, each) for each in (run, report.reference))
    there = dict(zip(theirs["seed"], theirs["fvu"]))
    if figures.get("interpolated"):
        there = read_off(curve, mine, "fvu")[1]
    pairs = [{seed: value for seed, value in each.items() if math.isfinite(value)}
             for each in (dict(zip(mine["seed"], mine["fvu"])), there)]
    return paired_difference(*pairs) | {"comparable": figures["comparable"]}


def reference_row(report, who, label, more=""):
    """The row of what is no run, "untrained" or "llm"; None where no run has scored it."""
    name = f"{who}_{PRIMARY}"
    scored = [run for run in report.complete if math.isfinite(report.value(run, name))]
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
    """The difference that `paired_difference` or `verdict` found, with its 95% interval.

    Without one where the two can't be compared: the difference is of what isn't alike.
    """
    text = show(figures.get("difference", math.nan), decimals, sign=True)
    if "ci95_low" in figures and figures.get("comparable", 1):
        text += f"{gap}[{figures['ci95_low']:+.{decimals}f}, {figures['ci95_high']:+.{decimals}f}]"
    return text


def markdown(header, lines):
    """A Markdown table. DataFrame.to_markdown would pad each column to its longest cell."""
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |"
                     for line in [header, ["---"] * len(header), *lines])


def ablation_table(report, reference):
    """A row per run, then the untrained SAE and the language model."""
    header = ["run", "what it tests", "primary", f"difference to {reference}", "p", "verdict",
              f"FVU: difference to {reference}", "untrained SAE",
              *(heading for _, heading, _, _ in COLUMNS), "seeds"]
    lines = [[row["label"], row["tests"] or "-",
              pm(row["primary"], row["stderr"], 4) + row["range"], interval(row["figures"], 4),
              show_p(row["p"] if row["figures"].get("comparable") else math.nan), row["verdict"],
              interval(row["fvu_figures"], 4), show(row["untrained"], 4),
              *(show(row[metric], digits)
                + " (fixed)" * (metric in row["fixed"] and math.isfinite(row[metric]))
                for metric, _, _, digits in COLUMNS), row["seeds"]]
             for row in ablation_rows(report)]
    return markdown(header, lines)


def layer_table(report):
    """A row per run and layer."""
    metrics, headings, digits = zip(
        *((metric, heading, digits) for metric, heading, _, digits in COLUMNS),
        *((f"{who}_top_{k}_test_accuracy", f"{who} top {k}", 4)
          for who in ("sae", "untrained", "llm") for k in PRIMARY_KS),
        (report.full_probe[0], f"llm all{report.full_probe[1]}", 4))
    means, errors = (summary(report.records, ["run", "layer"], statistic).reindex(
        columns=list(metrics)) for statistic in (mean, stderr))
    lines = [[run.label, layer, *map(pm, means.loc[run.name, layer], errors.loc[run.name, layer],
                                     digits)]
             for run in report.complete for layer in means.loc[run.name].index]
    return markdown(["run", "layer", *headings], lines)


@functools.cache
def run_costs(report):
    """What each trained run took: a dict per run, in minutes, NaN where it isn't recorded.

    Tokens per second are the median over a log's lines: of all layers and seeds of the run
    together. What was reused took none, so such a run is marked.
    """
    rows = []
    for run in (run for run in report.runs if not run.given):
        logged = run.log is not None and "tokens_per_second" in run.log.columns.unique(0)
        speed = np.nanmedian(run.log["tokens_per_second"].to_numpy()) if logged else math.nan
        minutes = {stage: report.value(run, f"seconds_{stage}") / 60
                   for stage in (*STAGES, "total")}
        rows.append({"run": run, "speed": float(speed), "reused": bool(run.config.get("reused")),
                     "seeds": len(run.settings.get("seeds") or ()), **minutes})
    return [row for row in rows if math.isfinite(row["speed"]) or math.isfinite(row["total"])]


def cost_table(report):
    """`run_costs` as Markdown."""
    lines = [[row["run"].label, row["seeds"] or "-", show(row["speed"], 0),
              *(show(row[stage], 1) for stage in (*STAGES, "total")),
              "yes" if row["reused"] else "no", row["run"].unfinished or "-"]
             for row in run_costs(report)]
    return markdown(["run", "seeds", "tokens per second", *(f"{s.replace('_', ' ')}, minutes"
                     for s in STAGES), "total, minutes", "parts reused", "state"], lines)


def extra_table(report):
    """A row per figure that `extra_evals` asked for, a column per run that has any; or ""."""
    cells = {}
    for run in report.complete:
        kinds = tuple(f"{kind}_" for kind in run.settings.get("extra_evals") or ())
        mine = report.records[report.records["run"] == run.name]["metric"].unique() if kinds else ()
        for metric in (metric for metric in mine if metric.startswith(kinds)):
            if values := [*seed_means(report.records, run, metric).values()]:
                cells.setdefault(run, {})[metric] = pm(mean(values), stderr(values), 4)
    names = {metric for mine in cells.values() for metric in mine}
    names = sorted(names, key=lambda metric: (natural(metric.replace("untrained_", "")), metric))
    lines = [[name, *(mine.get(name, "-") for mine in cells.values())] for name in names]
    return markdown(["figure", *(run.label for run in cells)], lines) if lines else ""


def tables(profile, report, reference):
    """All tables of a profile as Markdown text: by run, by layer, other figures, what runs took."""
    unlike = [f"{run.label} ({reasons})" for run in report.complete
              if not run.given and (reasons := report.unlike(run))]
    parts = [
        f"# Ablation, profile {profile}",
        "primary: mean over layers of the sparse-probing test accuracy at k = 1, 2 and 5, ± "
        f"standard error over seeds (none for one seed). Difference to {reference}: paired over "
        f"the seeds that both have, from {MIN_SEEDS} seeds on with its 95% interval "
        "(Student's t), p by Holm over all runs, and a verdict. Where L0 differs by over "
        f"{100 * (MAX_L0_RATIO - 1):.0f}% it is the difference to {reference}'s curve at equal L0, "
        "if there is one among the runs shown; else, and where what must be equal differs, the "
        "verdict is \"not comparable\" and the difference is a raw one, without interval. FVU's "
        "difference is paired likewise. The other columns are means over layers. A dash: not "
        "recorded, or nothing to compare.",
        ablation_table(report, reference)]
    if unlike:
        parts.append("Not comparable with the others: " + "; ".join(unlike) + ".")
    if len(report.records):
        parts += ["## By layer", layer_table(report)]
    if extra := extra_table(report):
        parts += ["## SAE-Bench's other evaluations", "What extra_evals asked for: means over "
                  "layers, ± standard error over seeds. docs/metrics.md says what each is.", extra]
    if run_costs(report):
        parts += ["## What it took", "Tokens per second of training, all layers and seeds of a run "
                  "together; minutes by stage. What was reused took none.", cost_table(report)]
    return "\n\n".join(parts) + "\n"
