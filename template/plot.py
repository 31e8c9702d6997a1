"""Figures of the runs, as .png files beside this one: `python plot.py`, no argument.

drawing.py draws training curves, probing, the table of ablations, and each run's difference to the
baseline with its interval. Below stands what to change; a figure of your own goes to its end.
"""

import json
import shutil
from pathlib import Path

import drawing
import matplotlib.pyplot as plt

# Run -> its name in the figures, in the order wanted. Runs that are not here are not drawn.
labels = {
    "run_0": "baseline",
}

HERE = Path(__file__).resolve().parent
PRIMARY = "mean_topk_probe_accuracy"  # the primary metric: higher is better


def shared_figures():
    """What drawing.py makes of the runs in `labels`, against run_0."""
    drawing.labels, drawing.REFERENCE = labels, "run_0"
    if drawing.main(HERE):
        raise SystemExit("no run to draw")
    for file in (HERE / "figures").glob("*/*.png"):
        shutil.copy(file, HERE)


def scores():
    """scores.png: the primary metric of each run, a point per seed and the mean as a bar."""
    figure, axes = plt.subplots(figsize=(5, 0.8 + 0.35 * len(labels)), layout="constrained")
    for row, run in enumerate(labels):
        verdict = json.loads((HERE / run / "final_info.json").read_text())["verdict"]
        values = verdict["final_info_dict"][PRIMARY]
        axes.plot(values, [row] * len(values), "o", color="black", markersize=3)
        axes.plot(verdict["means"][PRIMARY], row, "|", color="#D55E00", markersize=18)
    axes.set_yticks(range(len(labels)), labels.values())
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("mean accuracy of probes on the best 1, 2 and 5 features\n"
                    "(a point per seed; bar: their mean)")
    figure.savefig(HERE / "scores.png", dpi=200)


shared_figures()
scores()
