"""Figures and tables from the records of the runs: `python plot.py`, no argument.

Reads every folder run_* here, and in a folder here that is named after a profile, that holds a
final_info.json, or a train_log.jsonl of a run that goes on or has failed. Writes for each profile
figures/<profile>/ with the figures named in FIGURES (.png and .pdf), ablation.md, and index.html, a
page of all this and of the runs' features; and with bench/figures.py what bench/ measured, into
figures/bench. Profiles are never mixed. Needs matplotlib, numpy, pandas and scipy; no torch.
harness/figures.py and training_figures.py draw what harness/run_records.py reads.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from harness import figures as draw
from harness import run_records
from harness import training_figures as training
from harness.drawing import STYLE, save
from harness.report import write_report
from harness.run_records import Report, Run, compare, complain, curve, load_run  # noqa: F401
from harness.tables import ablation_rows, tables  # noqa: F401

# ---- edit here ------------------------------------------------------------------------------

# Run name -> label, in the order wanted, of every profile. Empty: all runs, under their own names.
labels = {
    # "run_1": "full method",
}
REFERENCE = "run_1"  # differences in the ablation table are to this run

# Rows of panels, where a run has them: metric of train_log.jsonl, axis label, axis scale.
ADAPTATION = (
    ("tau_sel", "selection\ntemperature $\\tau_{sel}$", "linear"),
    ("tau_pen", "penalty\ntemperature $\\tau_{pen}$", "linear"),
    ("gamma", "loss weight $\\gamma$", "linear"),
    ("w", "penalty's weight\n$w = \\gamma\\,\\tau_{pen}$", "linear"),
)
LOSSES = (
    ("loss", "loss ↓", "log"),
    ("loss_reconstruction", "reconstruction\n(part of the loss) ↓", "log"),
    ("loss_penalty", "penalty\n$\\gamma\\,L_{pen}$", "log"),
    ("loss_reg", "regularization\n$L_{reg}$", "log"),
    ("loss_density", "density penalty\n$\\varphi\\,L_{density}$", "log"),
)
SPARSITY = (
    ("l0", "L0\n(active features)", "log"),
    ("fvu", "fraction of variance\nunexplained ↓", "log"),
    ("dead_fraction", "dead features\n(fraction) ↓", "linear"),
)
# Name -> function of a Report that draws a figure, or returns None where there is nothing to show.
FIGURES = {
    "over_l0": draw.draw_over_l0,  # methods over L0, SAELens' trainers behind them
    "forest": draw.draw_forest,  # differences to the reference
    "ablation": draw.draw_ablation,  # the table
    "probing": draw.draw_probing,  # accuracy against the number of features
    "adaptation": partial(training.draw_adaptation, rows=ADAPTATION),
    "adaptation_supplement": partial(training.draw_adaptation, rows=ADAPTATION, supplement=True),
    "training_losses": partial(training.draw_training, rows=LOSSES),
    "training_sparsity": partial(training.draw_training, rows=SPARSITY),
    "density": draw.draw_density,  # how often features fire, where a run has features/
    "cost": draw.draw_cost,  # minutes and tokens per second
}

# ---- end of what is edited ------------------------------------------------------------------

HERE = Path(__file__).resolve().parent


def load_reports(root):
    """{profile: Report} of the runs to show; see harness/run_records.py."""
    return run_records.load_reports(root, labels, REFERENCE)


def draw_profile(profile, report, folder, figures):
    """Figures and tables into folder, without those no longer true; returns the tables' text."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in figures):
        with plt.rc_context(STYLE):
            figure = FIGURES[path.name](report)
            if figure:
                save(figure, path)
        for suffix in () if figure else (".png", ".pdf"):
            path.with_suffix(suffix).unlink(missing_ok=True)
    text = tables(profile, report, REFERENCE)
    (folder / "ablation.md").write_text(text, encoding="utf-8")
    return text


def with_trainers(report, root):
    """The report with what bench/ measured of others' trainers, where that can be held beside."""
    from bench.figures import comparable_trainers

    return dataclasses.replace(report, trainers=comparable_trainers(root / "bench", report))


def main(root=HERE, figures=tuple(FIGURES)):
    """Draws what stands under root, of each profile the figures named; 1 if there is nothing."""
    if not (reports := load_reports(root)):
        complain(f"no complete run found in {root}: expected folders run_* with final_info.json "
                 "and config.json; make one with python experiment.py --out_dir=run_try.")
        return 1
    bench = (root / "bench").is_dir()
    for profile, report in reports.items():
        folder = root / "figures" / profile
        report = with_trainers(report, root) if bench else report
        try:
            print(text := draw_profile(profile, report, folder, figures))
            write_report(folder, [run.folder for run in report.runs], text)
        except OSError as error:
            complain(f"{error.filename or folder} can't be written ({error.strerror}): make "
                     "room or set its permissions, and run plot.py again.")
            return 1
        print(f"figures of {profile}: {folder}" + (
            "" if report.logged_layers else " (no training logs, so no curves)"))
    if bench:
        from bench.figures import draw_bench

        if text := draw_bench(root / "bench", root / "figures" / "bench", reports.get("tinylm")):
            print(f"{text}\nfigures of bench/: {root / 'figures' / 'bench'}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit("plot.py takes no argument: choose the runs in the dict labels at its top.")
    sys.exit(main())
