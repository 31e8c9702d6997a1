"""Parts of figures: style, axes, lines that are labelled where they end. No torch."""

from __future__ import annotations

import math
import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from harness.run_records import curve

SINGLE, DOUBLE = 3.3, 6.8  # widths of a paper's column and page, inches
GREY = "#777777"
DASHED = {"linestyle": "--", "linewidth": 0.8}
STYLE = {
    "font.size": 7, "axes.titlesize": 7.5, "axes.labelsize": 7, "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5, "ytick.labelsize": 6.5, "axes.linewidth": 0.6, "lines.linewidth": 1.0,
    "lines.markersize": 3, "lines.markerfacecolor": "white", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.5,
    "axes.axisbelow": True, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "legend.frameon": False, "pdf.fonttype": 42, "savefig.dpi": 220,
    "figure.constrained_layout.h_pad": 0.03,
}  # fmt: skip


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


def token_axis(axis):
    """Training tokens in millions."""
    axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda n, _: f"{n / 1e6:.6g}M" if n else "0")


def end_of(run, layer, metric):
    """Where a run's curve ends: tokens, and the mean over seeds."""
    tokens, middle, *_ = curve(run, layer, metric)
    return tokens[-1], middle[-1]


def spread(wanted, heights, low, high):
    """Centres of labels as near as can be to where they are wanted, without an overlap.

    In the order of what is wanted; between low and high where they fit.
    """
    order = np.argsort(wanted, kind="stable")
    tall = np.asarray(heights, dtype=float)[order]
    offsets = np.concatenate([[0.0], np.cumsum((tall[1:] + tall[:-1]) / 2)])
    pools = []  # of neighbours that push each other: sum, count
    for value in np.asarray(wanted, dtype=float)[order] - offsets:
        pools.append([value, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, n = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + n]
    placed = np.concatenate([np.full(n, total / n) for total, n in pools])
    top = max(high - offsets[-1] - tall[-1] / 2, low + tall[0] / 2)
    placed = np.clip(placed, low + tall[0] / 2, top) + offsets
    return placed[np.argsort(order, kind="stable")]


def label_ends(figure, labels, size=6.0, wrap=26):
    """Names lines at the right of their panel, in their colour, none over another.

    labels: {panel: [(x, y, text, colour)]}, x and y where a line ends, in data.
    """
    placed = {}
    for axes, ends in labels.items():
        placed[axes] = [
            axes.annotate("\n".join(textwrap.wrap(text, wrap)), (x, y), xytext=(1.04, 0.5),
                          textcoords="axes fraction", va="center", color=colour, fontsize=size,
                          linespacing=1.0, annotation_clip=False,
                          arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.35,
                                      "alpha": 0.7, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)})
            for x, y, text, colour in ends]
    figure.draw_without_rendering()  # places are known after this
    for axes, notes in placed.items():
        if not notes:
            continue
        box = axes.get_window_extent()
        wanted = [axes.transData.transform(note.xy)[1] for note in notes]
        heights = [1.02 * plt.Text.get_window_extent(note).height for note in notes]
        room = max(0.0, sum(heights) - box.height) / 2
        for note, at in zip(notes, spread(wanted, heights, box.y0 - room, box.y1 + room)):
            note.set_position((1.04, (at - box.y0) / box.height))


def run_label(run, longest=46):
    """What a figure calls a run: its label, with what it tests where it has no label of its own.

    longest: at most so long a description; 0: the label alone.
    """
    text = run.label
    if run.tests and text == run.name and len(run.tests) <= longest:
        text = f"{text}: {run.tests}"
    text += f" ({run.unfinished})" * bool(run.unfinished)
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


