"""Figures of training: of a Report, or None where there is nothing to show. No torch."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from harness.drawing import (
    DASHED,
    DOUBLE,
    GREY,
    draw_curves,
    label_ends,
    layer_panels,
    plain_log_axis,
    run_label,
    token_axis,
)
from harness.run_records import curve
from harness.tables import LEARNED

BOUNDS = {"tau_sel": (0.1, 0.5), "tau_pen": (0.05, 0.25), "gamma": (0.0, 0.3)}


def draw_training(report, rows):
    """A grid of curves against training tokens: a row of panels per metric, a column per layer."""
    layers = report.logged_layers
    rows = [row for row in rows if any(curve(run, layer, row[0])
                                       for run in report.styles for layer in layers)]
    if not rows:
        return None
    figure, grid = layer_panels(layers, 0.45 + 1.25 * len(rows), len(rows),
                                sharex=True, sharey="row")
    labels = {}
    for row, panels in zip(rows, grid):
        drawn = [draw_panel(axes, report.styles, report.styles, layer, row)
                 for layer, axes in zip(layers, panels)]
        labels[panels[-1]] = drawn[-1]
        set_scale(panels, row)
        panels[0].set_ylabel(row[1])
    return finish_training(figure, grid, labels)


def learning(run, layer, metric):
    """Whether a run learns what a metric shows: its own θ, or of w one of its two."""
    thetas = [LEARNED["tau_pen"], LEARNED["gamma"]] if metric == "w" else [LEARNED[metric]]
    return any(curve(run, layer, theta) for theta in thetas)


def draw_adaptation(report, rows, supplement=False):
    """What is learned, of the runs that learn it: on the middle layer; the others a supplement."""
    layers, looks = report.logged_layers, report.styles
    shown = layers[len(layers) // 2:][:1]
    if supplement:
        shown = [layer for layer in layers if layer not in shown]
    runs = {row: [run for run in looks if any(learning(run, layer, row[0]) for layer in shown)]
            for row in rows}
    if not shown or not any(runs.values()):
        return None
    rows = [row for row in rows if runs[row]]
    if supplement:
        figure, grid = layer_panels(shown, 0.45 + 1.25 * len(rows), len(rows),
                                    sharex=True, sharey="row")
    else:
        figure, grid = plt.subplots(math.ceil(len(rows) / 2), 2, squeeze=False, sharex=True,
                                    figsize=(DOUBLE, 0.5 + 1.7 * math.ceil(len(rows) / 2)),
                                    layout="constrained")
        figure.suptitle(f"layer {shown[0]}", fontsize=7.5)
        for axes in grid.flat[len(rows):]:
            axes.remove()
    labels = {}
    panels_of = grid if supplement else [[axes] for axes in grid.flat]
    for row, panels in zip(rows, panels_of):
        for layer, axes in zip(shown, panels):
            ends = draw_panel(axes, looks, runs[row], layer, row)
            labels[axes] = ends if axes is panels[-1] else []
            if axes in grid[:, -1] and not supplement:  # room for what each run tests
                tests = {run.label: run_label(run) for run in looks}
                labels[axes] = [(*at, tests.get(text, text), colour) for *at, text, colour in ends]
        set_scale(panels, row)
        panels[0].set_ylabel(row[1])
        low, high = panels[0].get_ylim()
        for axes in panels:
            for bound in BOUNDS.get(row[0], ()):
                if low <= bound <= high:
                    axes.axhline(bound, color=GREY, zorder=1, **DASHED)
        panels[0].set_ylim(low, high)
    return finish_training(figure, grid, labels)


def draw_panel(axes, looks, runs, layer, row):
    """The curves of one metric on one layer; returns what names them, see `label_ends`.

    Where a run is unfinished its line ends in a ring.
    """
    metric, _, scale = row
    lines = {run: line for run in runs if (line := curve(run, layer, metric))}
    scale = log_if(scale, lines)
    if scale == "log":  # what isn't positive has no place there
        lines = {run: [part[line[1] > 0] for part in line] for run, line in lines.items()
                 if (line[1] > 0).any()}
    draw_curves(axes, [(looks[run], line) for run, line in lines.items()], scale)
    ends = []
    for run, (tokens, middle, *_) in lines.items():
        text = run.label.replace("$", r"\$") + ", unfinished" * bool(run.unfinished)
        ends.append((tokens[-1], middle[-1], text, looks[run][0]))
        if run.unfinished:
            axes.plot(tokens[-1:], middle[-1:], "o", color=looks[run][0], markersize=4, zorder=5)
    if metric == "l0":
        k_ts = [line for run in lines if (line := curve(run, layer, "k_t"))]
        shared = {bytes(line[0]) + bytes(line[1]): line for line in k_ts}  # one for all that share
        for tokens, k_t, *_ in shared.values():
            axes.plot(tokens, k_t, color="black", zorder=4, **DASHED)
            ends.append((tokens[-1], k_t[-1], "$k_t$, the curriculum", "black"))
        ends = [*{end[1:]: end for end in ends}.values()]
    return ends


def log_if(scale, lines):
    """A log scale needs something positive; else a line at 0 is what was logged."""
    return scale if any((line[1] > 0).any() for line in lines.values()) else "linear"


def set_scale(panels, row):
    """The y axis of panels that share it: its limits by what is drawn there."""
    first, scale = panels[0], row[2]
    values = np.concatenate([line.get_ydata() for axes in panels for line in axes.get_lines()]
                            or [[0.0]])
    if scale == "log" and (values > 0).any():
        first.set_yscale("log")
        low, high = values[values > 0].min(), values.max()
        margin = max((high / low) ** 0.06, 1.05)
        first.set_ylim(low / margin, high * margin)
        plain_log_axis(first.yaxis, *first.get_ylim())
        return
    low, high = values.min(), values.max()
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    # Where 0 is as good as in sight, from it on: a fraction, or a weight.
    bottom = 0 if 0 <= low < 0.3 * (high - low) or not values.any() else low - margin
    first.set_ylim(bottom - margin * 0.3 * (bottom == 0), high + margin)
    first.yaxis.set_major_locator(MaxNLocator(4))


def finish_training(figure, grid, labels):
    grid[0, 0].set_xlim(left=0)
    token_axis(grid[0, 0].xaxis)
    figure.supxlabel("training tokens", fontsize=7)
    figure.align_ylabels(grid[:, 0])
    label_ends(figure, labels)
    return figure
