"""plot.py: the figures and tables that a user reads after a few runs."""

import json
import math
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from scipy import stats

import plot

REPO = Path(__file__).resolve().parent.parent
REFERENCE = REPO.parent / "shared" / "reference" / "run_0_baseline.json"
KS = (1, 2, 5, 10, 20, 50)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def make_run(root, name, *, profile="tinylm", layers=(1, 2, 4), seeds=(0,), tests="", gain=0.0,
             fixed=None, curriculum=True, steps=30, total=1_000_000, log=True,
             probe_sets=("tinylm/B",)):
    """A run's folder as experiment.py leaves one, with plausible numbers; returns its info."""
    fixed = fixed or {}
    folder = root / name
    folder.mkdir(parents=True)
    info, lines = {}, []
    for i, layer in enumerate(layers):
        per_seed = {}
        for seed in seeds:
            rng = np.random.default_rng([seed, layer, round(1e4 * abs(gain))])
            for step in range(1, steps + 1):
                done = step / steps
                theta = [1.2 * done, -2.5 * done, -3.0 * done + 0.1 * rng.normal()]
                tau_sel = fixed.get("tau_sel", 0.1 + 0.4 * sigmoid(theta[0]))
                tau_pen = fixed.get("tau_pen", 0.05 + 0.2 * sigmoid(theta[1]))
                gamma = fixed.get("gamma", 0.3 * sigmoid(theta[2]))
                k_t = 16 * 4 ** max(0.0, 1 - done / 0.3) if curriculum else None
                fvu = 0.2 + 0.03 * i + 0.5 * math.exp(-6 * done) + 0.004 * rng.normal() - gain / 4
                parts = {"loss_reconstruction": fvu, "loss_reg": 0.01 * sum(t * t for t in theta),
                         "loss_penalty": gamma * tau_pen * 9 * math.exp(-3 * done)}
                entry = {"step": step, "tokens": round(total * done), "layer": layer, "seed": seed,
                         "loss": sum(parts.values()), **parts, "tau_sel": tau_sel,
                         "tau_pen": tau_pen, "gamma": gamma, "w": gamma * tau_pen,
                         "k_t": k_t, "l0": k_t or 300 * math.exp(-2 * done) + rng.normal(),
                         "fvu": fvu, "dead_fraction": 0.15 * math.exp(-4 * done), "lr": 2e-3,
                         "tokens_per_second": 9000.0}
                for n, key in enumerate(("tau_sel", "tau_pen", "gamma"), 1):
                    entry[f"theta_{n}"] = None if key in fixed else theta[n - 1]
                lines.append(entry)
            base = {"l0": entry["l0"], "mse": 0.4, "ce_loss_score": 0.93 - 0.01 * i,
                    "frac_alive": 0.97, "fvu": fvu, "dead_fraction": entry["dead_fraction"],
                    "explained_variance": 0.8, "tau_sel": tau_sel, "tau_pen": tau_pen,
                    "gamma": gamma, "w": gamma * tau_pen, "llm_test_accuracy": 0.93 + 0.01 * i,
                    "training_tokens": total, "n_seeds": len(seeds)}
            base |= {"untrained_l0": base["l0"] + 0.1, "untrained_fvu": 0.61}
            for n, k in enumerate(KS):
                sae = 0.70 + 0.035 * n + 0.01 * i + gain + 0.006 * rng.normal()
                base[f"sae_top_{k}_test_accuracy"] = sae
                base[f"untrained_top_{k}_test_accuracy"] = 0.62 + 0.035 * n + 0.005 * i
                base[f"llm_top_{k}_test_accuracy"] = 0.63 + 0.045 * n + 0.005 * i
            for key, value in base.items():
                per_seed.setdefault(key, []).append(float(value))
        info[f"layer_{layer}"] = {
            "means": {key: float(np.mean(v)) for key, v in per_seed.items()},
            "stderrs": {key: float(np.std(v, ddof=1) / len(v) ** 0.5) if len(v) > 1 else 0.0
                        for key, v in per_seed.items()},
            "final_info_dict": per_seed}
    info["verdict"] = {"means": {"primary": 0.0}, "stderrs": {"primary": 0.0},
                       "final_info_dict": {"primary": [0.0]}}
    settings = {"tau_sel": None, "tau_pen": None, "gamma": None, **fixed, "k_min": 16,
                "curriculum": curriculum, "layers": list(layers), "seeds": list(seeds),
                "description": tests, "probe_sets": list(probe_sets), "compare_to": "run_1"}
    (folder / "config.json").write_text(json.dumps({"profile": profile, "settings": settings}))
    if log:
        with (folder / "train_log.jsonl").open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    (folder / "final_info.json").write_text(json.dumps(info))
    return info


def ten_runs(root, seeds=(0,), **options):
    """The plan's ten runs (docs/results.md, The runs of the plan), for looking at the figures."""
    temperatures, everything = {"tau_sel": 0.3, "tau_pen": 0.1}, {"gamma": 0.15}
    plan = [("full method", {}, True), ("fixed temperatures", temperatures, True),
            ("fixed loss weight", everything, True), ("stronger regularization", {}, True),
            ("no curriculum", {}, False),
            ("full ablation", {**temperatures, **everything}, False),
            ("the loss as first written", {}, False),
            ("adaptation of the selection alone", {"tau_pen": 0.15, **everything}, True),
            ("adaptation against its end point",
             {"tau_sel": 0.4, "tau_pen": 0.07, "gamma": 0.02}, True),
            ("the best form found", {}, True)]
    for i, (tests, fixed, curriculum) in enumerate(plan):
        make_run(root, f"run_{i + 1}", tests=tests, fixed=fixed, curriculum=curriculum,
                 gain=0.004 * (i % 4) - 0.02 * (not curriculum), seeds=seeds, **options)


@pytest.fixture
def figures(monkeypatch):
    """Figures by profile and name, as objects: what plot.py draws, without writing files."""
    drawn = {}
    monkeypatch.setattr(plot, "save",
                        lambda figure, path: drawn.update({(path.parent.name, path.name): figure}))
    yield drawn
    plt.close("all")


def table(text, heading_of_first_column, section=0):
    """{first cell: {heading: cell}} of the section-th Markdown table in text."""
    blocks = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    lines = [[cell.strip() for cell in line.strip().strip("|").split(" | ")]
             for line in blocks[section].strip().splitlines()]
    assert lines[0][0] == heading_of_first_column
    assert all(len(line) == len(lines[0]) for line in lines)
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def ablation(root, profile="tinylm"):
    return table((root / "figures" / profile / "ablation.md").read_text(), "run")


def scores_by_seed(info):
    """The primary metric of each seed, worked out here from the recorded lists."""
    layers = [record["final_info_dict"] for key, record in info.items() if key != "verdict"]
    n = len(layers[0]["l0"])
    return [sum(layer[f"sae_top_{k}_test_accuracy"][i] for layer in layers for k in (1, 2, 5))
            / (3 * len(layers)) for i in range(n)]


def line_data(axes, colour):
    """Data of the lines of one colour in a panel."""
    return [np.column_stack(line.get_data()) for line in axes.get_lines()
            if to_rgb(line.get_color()) == to_rgb(colour)]


def legend_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


# ---- tables -----------------------------------------------------------------------------------


def test_table_holds_the_recorded_figures(tmp_path, figures):
    seeds = (0, 1, 2, 7)
    one = make_run(tmp_path, "run_1", log=False, seeds=seeds, tests="the full method")
    two = make_run(tmp_path, "run_2", log=False, seeds=seeds, gain=0.03, tests="fixed temperatures",
                   fixed={"tau_sel": 0.3, "tau_pen": 0.1})
    assert plot.main(tmp_path) == 0
    rows = ablation(tmp_path)
    row = rows["run_2"]
    assert row["what it tests"] == "fixed temperatures"
    ours, theirs = scores_by_seed(two), scores_by_seed(one)
    error = stats.sem(ours)
    assert row["primary"] == f"{sum(ours) / 4:.4f} ± {error:.4f}"
    gaps = np.subtract(ours, theirs)
    low, high = stats.t.interval(0.95, 3, loc=gaps.mean(), scale=stats.sem(gaps))
    assert row["difference to run_1"] == f"{gaps.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
    assert row["verdict"] == "better" and rows["run_1"]["verdict"] == "-"
    gap = np.mean([np.subtract(two[f"layer_{i}"]["final_info_dict"]["fvu"],
                               one[f"layer_{i}"]["final_info_dict"]["fvu"]) for i in (1, 2, 4)])
    assert row["FVU: difference to run_1"].startswith(f"{gap:+.4f} [")
    means = [two[f"layer_{layer}"]["means"] for layer in (1, 2, 4)]
    for heading, metric, digits in (("L0", "l0", 1), ("FVU", "fvu", 3), ("gamma", "gamma", 3),
                                    ("CE loss score", "ce_loss_score", 3), ("w", "w", 4),
                                    ("dead fraction", "dead_fraction", 3)):
        assert row[heading] == f"{sum(m[metric] for m in means) / 3:.{digits}f}", heading
    assert row["tau_sel"] == "0.300 (fixed)" and row["tau_pen"] == "0.100 (fixed)"
    assert "fixed" not in rows["run_1"]["tau_sel"] and row["seeds"] == "4"
    untrained = [m[f"untrained_top_{k}_test_accuracy"] for m in means for k in (1, 2, 5)]
    assert rows["untrained SAE"]["primary"] == row["untrained SAE"] == f"{np.mean(untrained):.4f}"
    assert rows["untrained SAE"]["L0"] == "16.1" and rows["untrained SAE"]["FVU"] == "0.610"
    llm = [m[f"llm_top_{k}_test_accuracy"] for m in means for k in (1, 2, 5)]
    assert rows["language model"]["primary"] == f"{np.mean(llm):.4f}"
    assert rows["language model"]["L0"] == "-"
    assert f"{np.mean([m['llm_test_accuracy'] for m in means]):.4f}" in (
        rows["language model"]["what it tests"])
    layers = table((tmp_path / "figures" / "tinylm" / "ablation.md").read_text(), "run", 1)
    last = two["layer_4"]  # the last row of run_2
    assert layers["run_2"]["layer"] == "4"
    assert layers["run_2"]["sae top 5"] == (f"{last['means']['sae_top_5_test_accuracy']:.4f} ± "
                                            f"{last['stderrs']['sae_top_5_test_accuracy']:.4f}")


def test_seeds_are_paired_by_their_number(tmp_path, figures):
    one = make_run(tmp_path, "run_1", log=False, seeds=(0, 1, 2, 3))
    two = make_run(tmp_path, "run_2", log=False, seeds=(9, 3, 2, 1), gain=0.02)
    for layer in (1, 2, 4):  # seed 9, which run_1 lacks, is far off: it must not count
        for values in two[f"layer_{layer}"]["final_info_dict"].values():
            values[0] *= 0.7
    (tmp_path / "run_2" / "final_info.json").write_text(json.dumps(two))
    plot.main(tmp_path)
    ours, theirs = scores_by_seed(two), scores_by_seed(one)
    gaps = [ours[1] - theirs[3], ours[2] - theirs[2], ours[3] - theirs[1]]
    assert ablation(tmp_path)["run_2"]["difference to run_1"].startswith(f"{np.mean(gaps):+.4f} [")


def test_what_can_not_be_compared_is_not(tmp_path, figures):
    make_run(tmp_path, "run_1", log=False, seeds=(0, 1, 2))
    make_run(tmp_path, "run_2", log=False, seeds=(0, 1, 2), layers=(1, 2))  # other layers
    make_run(tmp_path, "run_3", log=False, seeds=(0, 1, 2), curriculum=False)  # L0 about 40, not 16
    make_run(tmp_path, "run_4", log=False, gain=0.1)  # one seed
    make_run(tmp_path, "run_5", log=False, seeds=(0, 1, 2), probe_sets=("tinylm/A",))
    plot.main(tmp_path)
    text = (tmp_path / "figures" / "tinylm" / "ablation.md").read_text()
    rows = ablation(tmp_path)
    assert "run_1 on tinylm/B" in text and "run_5 on tinylm/A" in text
    assert [rows[f"run_{i}"]["verdict"] for i in (2, 3, 4, 5)] == (
        ["-", "not comparable", "not comparable", "-"])
    assert rows["run_2"]["difference to run_1"] == rows["run_5"]["difference to run_1"] == "-"
    assert "[" not in rows["run_4"]["difference to run_1"]  # a difference, and no interval


def test_values_fixed_at_another_runs_end_are_marked(tmp_path, figures):
    make_run(tmp_path, "run_9", log=False)
    config = json.loads((tmp_path / "run_9" / "config.json").read_text())
    config["settings"]["constants_from_run"] = "run_1"
    (tmp_path / "run_9" / "config.json").write_text(json.dumps(config))
    plot.main(tmp_path)
    row = ablation(tmp_path)["run_9"]
    assert all(row[name].endswith("(fixed)") for name in ("tau_sel", "tau_pen", "gamma"))


def test_a_run_without_probing_is_in_the_table(tmp_path, figures):
    info = make_run(tmp_path, "run_1")
    for record in info.values():
        for part in record.values():
            for metric in [metric for metric in part if "test_accuracy" in metric]:
                del part[metric]
    (tmp_path / "run_1" / "final_info.json").write_text(json.dumps(info))
    assert plot.main(tmp_path) == 0
    row = ablation(tmp_path)["run_1"]
    assert row["primary"] == row["seeds"] == "-" and row["L0"] == "16.0"
    assert ("tinylm", "probing") not in figures and ("tinylm", "adaptation") in figures


def test_a_missing_metric_is_a_dash(tmp_path, figures):
    info = make_run(tmp_path, "run_1", log=False)
    del info["layer_2"]["means"]["fvu"]
    info["layer_4"]["means"]["frac_alive"] = None
    (tmp_path / "run_1" / "final_info.json").write_text(json.dumps(info))
    assert plot.main(tmp_path) == 0
    row = ablation(tmp_path)["run_1"]
    assert row["FVU"] == row["frac alive"] == "-" and row["L0"] == "16.0"


# ---- figures ----------------------------------------------------------------------------------


def test_adaptation_curves_show_the_log_and_the_bounds(tmp_path, figures):
    make_run(tmp_path, "run_1", seeds=(0, 1, 2))
    make_run(tmp_path, "run_2", seeds=(0, 1, 2), fixed={"gamma": 0.15})
    plot.main(tmp_path)
    figure = figures["tinylm", "adaptation"]
    assert len(figure.axes) == 4 * 3  # a row per parameter and w, a column per layer
    log = [json.loads(line) for line in (tmp_path / "run_1" / "train_log.jsonl").open()]
    for row, metric, bounds in ((0, "tau_sel", (0.1, 0.5)), (1, "tau_pen", (0.05, 0.25)),
                                (2, "gamma", (0, 0.3)), (3, "w", None)):
        axes = figure.axes[3 * row + 1]  # the second column: layer 2
        by_tokens = {}
        for entry in log:
            if entry["layer"] == 2:
                by_tokens.setdefault(entry["tokens"], []).append(entry[metric])
        expected = [(t, sum(values) / 3) for t, values in sorted(by_tokens.items())]
        (line,) = line_data(axes, plot.COLOURS[0])
        np.testing.assert_allclose(line, expected)
        grey = [line[0, 1] for line in line_data(axes, plot.GREY)]
        assert sorted(grey) == sorted(bounds or ())
        assert bounds is None or (axes.get_ylim()[0] < bounds[0] and bounds[1] < axes.get_ylim()[1])
    (constant,) = line_data(figure.axes[6], plot.COLOURS[1])  # run_2's gamma in layer 1
    assert set(constant[:, 1]) == {0.15}


def test_l0_is_drawn_with_its_curriculum(tmp_path, figures):
    make_run(tmp_path, "run_1")
    make_run(tmp_path, "run_2", curriculum=False)
    plot.main(tmp_path)
    panel = figures["tinylm", "training_sparsity"].axes[0]
    (k_t,) = line_data(panel, "black")
    assert k_t[-1, 1] == 16 and k_t[0, 1] > 50
    dashed = [line for line in panel.get_lines() if line.get_linestyle() == "--"]
    assert len(dashed) == 1 and len(line_data(panel, plot.COLOURS[1])) == 1
    shutil.rmtree(tmp_path / "run_1")
    plot.main(tmp_path)
    figure = figures["tinylm", "training_sparsity"]
    assert not line_data(figure.axes[0], "black") and "$k_t$" not in str(legend_texts(figure))


def test_probing_figure_holds_saes_and_references(tmp_path, figures):
    info = make_run(tmp_path, "run_1", log=False, seeds=(0, 1, 2))
    plot.main(tmp_path)
    panel = figures["tinylm", "probing"].axes[2]
    means = info["layer_4"]["means"]
    for colour, who in ((plot.COLOURS[0], "sae"), (plot.GREY, "untrained"), ("black", "llm")):
        expected = [(k, means[f"{who}_top_{k}_test_accuracy"]) for k in KS]
        assert any(line.shape == (6, 2) and np.allclose(line, expected)
                   for line in line_data(panel, colour)), who
    assert any(np.allclose(line[:, 1], means["llm_test_accuracy"])
               for line in line_data(panel, "black"))
    assert panel.get_xscale() == "log"
    assert [label.get_text() for label in panel.get_xticklabels()] == [str(k) for k in KS]


def test_coinciding_curves_can_all_be_seen(tmp_path, figures):
    for i in range(1, 4):
        make_run(tmp_path, f"run_{i}", fixed={"gamma": 0.15})
    plot.main(tmp_path)
    lines = [line for line in figures["tinylm", "adaptation"].axes[6].get_lines()
             if line.get_color() in plot.COLOURS]
    patterns = {line._unscaled_dash_pattern for line in lines}  # (offset, (on, off))
    offsets = sorted(offset for offset, _ in patterns)
    assert len(lines) == 3 and offsets == [0, 4, 8]
    assert all(dashes == (4, 8) for _, dashes in map(lambda p: (p[0], tuple(p[1])), patterns))


def test_a_description_is_not_read_as_mathematics(tmp_path, figures):
    make_run(tmp_path, "run_1", steps=2, layers=(1,), tests="$5_{$")
    plot.main(tmp_path)
    for name in ("adaptation", "probing", "ablation"):
        figures["tinylm", name].draw_without_rendering()  # mathtext can't parse it: ValueError


def test_a_log_of_one_line_is_a_point(tmp_path, figures):
    make_run(tmp_path, "run_1", steps=1, layers=(1,))
    plot.main(tmp_path)
    for axes in figures["tinylm", "training_losses"].axes:
        (line,) = axes.get_lines()
        assert line.get_marker() == "o" and line.get_markevery() is None


def test_nothing_overlaps_in_ten_runs_of_five_seeds(tmp_path, figures):
    ten_runs(tmp_path, seeds=range(5), steps=12)
    plot.main(tmp_path)
    assert len(figures) == 7
    for (_, name), figure in figures.items():
        assert figure.get_figwidth() == plot.DOUBLE
        figure.draw_without_rendering()
        page = figure.bbox
        boxes = [axes.get_window_extent() for axes in figure.axes if axes.axison]
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(other) for other in boxes), name
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and box.y1 <= page.y1, name
        texts = [text for text in figure.findobj(plt.Text)
                 if text.get_text().strip() and text.get_visible() and text.get_figure()]
        assert min(text.get_fontsize() for text in texts) >= 5.5, name
        extents = [text.get_window_extent() for text in texts if name == "forest"]
        assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in extents), name
        if name == "ablation":
            cells = [text.get_window_extent() for text in figure.axes[0].texts]
            assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in cells)
            assert not any(a.overlaps(b) for i, a in enumerate(cells) for b in cells[:i])


# ---- which runs, and where --------------------------------------------------------------------


def test_profiles_are_never_mixed(tmp_path, figures):
    make_run(tmp_path, "run_1", tests="small")
    make_run(tmp_path, "run_2", tests="small too", gain=0.1)
    make_run(tmp_path, "run_3", profile="gemma-2-2b", tests="large")
    assert plot.main(tmp_path) == 0
    assert {profile for profile, _ in figures} == {"tinylm", "gemma-2-2b"}
    assert "run_3" not in ablation(tmp_path)
    gemma = ablation(tmp_path, "gemma-2-2b")
    assert set(gemma) == {"run_3", "untrained SAE", "language model"}
    assert gemma["run_3"]["difference to run_1"] == "-"  # run_1 is of the other profile
    for (profile, name), figure in figures.items():
        texts = " ".join(text.get_text() for text in figure.findobj(plt.Text))
        assert ("large" in texts) == (profile == "gemma-2-2b"), name
        assert ("small" in texts) == (profile == "tinylm"), name


def test_given_baseline_is_in_the_tables_and_not_in_the_curves(tmp_path, figures, capsys):
    shutil.copytree(REPO / "run_0", tmp_path / "run_0")
    assert plot.main(tmp_path) == 0
    assert capsys.readouterr().err == ""
    assert {name for _, name in figures} == {"probing", "ablation"}
    rows = ablation(tmp_path, "gemma-2-2b")
    assert rows["run_0"]["primary"] == "0.5000"
    assert rows["run_0"]["what it tests"] == plot.GIVEN
    assert rows["language model"]["primary"] == "0.7283"  # (0.684275 + 0.7260625 + 0.774625) / 3
    tasks = json.loads((tmp_path / "run_0" / "config.json").read_text())["settings"]["probe_sets"]
    make_run(tmp_path, "run_1", profile="gemma-2-2b", layers=(5,), probe_sets=tasks)
    plot.main(tmp_path)
    rows = ablation(tmp_path, "gemma-2-2b")
    assert rows["run_0"]["difference to run_1"] == rows["run_0"]["verdict"] == "-"
    assert rows["language model"]["primary"] == "0.6750"  # run_1's own, not mixed with run_0's
    for name in ("adaptation", "training_losses", "training_sparsity"):
        assert "run_0" not in str(legend_texts(figures["gemma-2-2b", name]))
    assert plot.GIVEN in legend_texts(figures["gemma-2-2b", "probing"])
    points = line_data(figures["gemma-2-2b", "probing"].axes[0], plot.GREY)
    assert any(set(line[:, 1]) == {0.5} for line in points)


def test_labels_choose_name_and_order_runs(tmp_path, figures, monkeypatch, capsys):
    for i in (1, 2, 3, 10):
        make_run(tmp_path, f"run_{i}", seeds=(0, 1, 2), gain=0.01 * i)
    make_run(tmp_path, "run_3.1")  # an earlier run_3, set aside
    plot.main(tmp_path)
    assert list(ablation(tmp_path))[:4] == ["run_1", "run_2", "run_3", "run_10"]
    monkeypatch.setattr(plot, "labels", {"run_3": "third", "run_2": "second", "run_8": "none"})
    capsys.readouterr()
    assert plot.main(tmp_path) == 0
    rows = ablation(tmp_path)
    assert list(rows)[:2] == ["third (run_3)", "second (run_2)"] and len(rows) == 4
    assert rows["third (run_3)"]["verdict"] == "better"  # against run_1, which isn't shown
    assert legend_texts(figures["tinylm", "adaptation"])[:2] == ["third", "second"]
    assert "run_8" in capsys.readouterr().err


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("file, content", [
    ("final_info.json", '{"layer_1": {"means"'), ("final_info.json", None),
    ("final_info.json", "[]"), ("final_info.json", '{"layer_1": {}}'),
    ("config.json", None), ("config.json", '{"profile": "../../elsewhere"}'),
])
def test_a_broken_run_is_named_and_the_others_are_drawn(tmp_path, figures, capsys, file, content):
    make_run(tmp_path, "run_1", steps=3, layers=(1,))
    make_run(tmp_path, "run_2", steps=3, layers=(1,))
    path = tmp_path / "run_2" / file
    path.unlink() if content is None else path.write_text(content)
    assert plot.main(tmp_path) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"run_2/{file}" in said and "Traceback" not in said
    assert "run_1" in ablation(tmp_path) and "run_2" not in ablation(tmp_path)


@pytest.mark.parametrize("content", [None, "", '{"tokens": 5}\n', '{"tokens": 5, "layer": 1, "se'])
def test_a_broken_log_keeps_the_run_in_the_tables(tmp_path, figures, capsys, content):
    make_run(tmp_path, "run_1", steps=3, layers=(1,))
    make_run(tmp_path, "run_2", steps=3, layers=(1,))
    path = tmp_path / "run_2" / "train_log.jsonl"
    path.unlink() if content is None else path.write_text(content)
    assert plot.main(tmp_path) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "run_2/train_log.jsonl" in said
    assert "run_2" in ablation(tmp_path)
    assert legend_texts(figures["tinylm", "training_losses"]) == ["run_1"]


def test_only_broken_runs_or_none_is_an_error(tmp_path, capsys):
    assert plot.main(tmp_path) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no complete run" in said
    (tmp_path / "run_1").mkdir()
    assert plot.main(tmp_path) == 1 and "run_1/final_info.json" in capsys.readouterr().err


def test_a_figure_that_is_no_longer_true_is_removed(tmp_path, figures):
    make_run(tmp_path, "run_1", log=False)
    folder = tmp_path / "figures" / "tinylm"
    folder.mkdir(parents=True)
    for name in ("adaptation.png", "training_losses.pdf", "mine.png"):  # from when it had a log
        (folder / name).touch()
    plot.main(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["ablation.md", "mine.png"]


# ---- the command, and run_0 -------------------------------------------------------------------


def test_the_command_writes_files_without_torch(tmp_path):
    shutil.copy(REPO / "plot.py", tmp_path)
    shutil.copytree(REPO / "harness", tmp_path / "harness")
    make_run(tmp_path, "run_1", steps=5, layers=(1, 2))
    # From another folder: the runs are those beside plot.py, wherever it's called from.
    done = subprocess.run([sys.executable, "-X", "importtime", str(tmp_path / "plot.py")],
                          cwd=REPO.parent, capture_output=True, text=True, timeout=240)
    said = done.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in said if line.startswith("import time:")}
    assert done.returncode == 0 and len(said) > 100, done.stderr[-1500:]
    assert all(line.startswith("import time:") for line in said), done.stderr[-1500:]
    assert "matplotlib" in imported
    assert not {name.split(".")[0] for name in imported} & {"torch", "transformers", "sae_lens"}
    folder = tmp_path / "figures" / "tinylm"
    assert (folder / "ablation.md").read_text() in done.stdout
    for name in ("adaptation", "training_losses", "training_sparsity", "probing", "ablation"):
        width, _ = struct.unpack(">II", (folder / f"{name}.png").read_bytes()[16:24])
        assert width == round(plot.DOUBLE * 220), name  # the PNG header's pixels, at 220 a inch
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    refused = subprocess.run([sys.executable, str(tmp_path / "plot.py"), "--all"],
                             capture_output=True, text=True, timeout=240)
    assert refused.returncode != 0 and "takes no argument" in refused.stderr


def test_run_0_says_what_it_is():
    config = json.loads((REPO / "run_0" / "config.json").read_text())
    means = json.loads((REPO / "run_0" / "final_info.json").read_text())["layer_5"]["means"]
    assert config["given"] and config["profile"] == "gemma-2-2b"
    assert "never trained" in config["note"] and "layer 19" in config["note"]
    assert {means[f"sae_top_{k}_test_accuracy"] for k in KS} == {0.5}
    assert not any("top_100" in metric for metric in means)
    record = json.loads((REPO / "run_0" / config["source"]).read_text())
    assert all(detail[f"sae_top_{k}_test_accuracy"] == 0.5
               for detail in record["eval_result_details"] for k in KS)


@pytest.mark.skipif(not REFERENCE.exists(), reason="the given baseline is not beside the checkout")
def test_run_0_holds_the_given_figures():
    given = json.loads(REFERENCE.read_text())
    config = json.loads((REPO / "run_0" / "config.json").read_text())
    assert json.loads((REPO / "run_0" / config["source"]).read_text()) == given
    figures = {metric: value for part in given["eval_result_metrics"].values()
               for metric, value in part.items() if value is not None}
    (record,) = json.loads((REPO / "run_0" / "final_info.json").read_text()).values()
    assert record["means"] == figures and len(figures) == 14
    assert record["final_info_dict"] == {metric: [value] for metric, value in figures.items()}
    assert record["stderrs"] == dict.fromkeys(figures, 0.0)


def bench_row(stage, method, seed, l0, gain=0.0, value=16, layer=1):
    draw = np.random.default_rng([seed, layer, int(l0), int(100 * (1 + gain))])
    row = {"stage": stage, "method": method, "seed": seed, "lr": 1e-3, "layer": layer,
           "layers": [1, 2], "sparsity": [value, value], "of_layer": value, "l0": l0,
           "fvu": 1 / l0 + 0.01 * draw.random() - gain, "ce_loss_score": 0.9, "frac_alive": 1.0,
           "machine": "a machine", "cores": 2, "date": "2026-01-02"}
    for k in (1, 2, 5):
        row[f"sae_top_{k}_test_accuracy"] = 0.7 + gain + 0.02 * draw.random()
        row[f"llm_top_{k}_test_accuracy"] = 0.65
    return row


def test_what_bench_measured_is_in_tables_and_figures(tmp_path, figures):
    make_run(tmp_path, "run_1", tests="the full method", seeds=range(3), layers=(1, 2))
    for name, l0 in {"run_5": 30.0, "run_7": 800.0}.items():
        info = make_run(tmp_path, name, tests="elsewhere", seeds=range(4), layers=(1, 2))
        for record in (record for record in info.values() if "l0" in record["means"]):
            record["means"]["l0"], record["final_info_dict"]["l0"] = l0, [l0] * 4
        (tmp_path / name / "final_info.json").write_text(json.dumps(info))
    methods = {"ours": 0.05, "BatchTopK": 0.0, "untrained": -0.1}
    rows = [bench_row("seeds", method, seed, 16.0, gain, layer=layer)
            for method, gain in methods.items() for seed in range(5) for layer in (1, 2)]
    rows += [bench_row("curves", method, 0, value, gain, value, layer)
             for method, gain in methods.items() for value in (8, 32) for layer in (1, 2)
             if method != "untrained"]
    rows += [bench_row("forms", "run_1", seed, value, 0.0, value, layer)
             for value in (8, 16, 32) for seed in range(3) for layer in (1, 2)]
    rows += [bench_row("range", "penalised", 0, layer * value, 0.0, value, layer)
             for value in (8, 32) for layer in (1, 2)]
    rows += [bench_row("curves", "penalised", 0, 16, 0.0, value, layer) | {"sparsity": [8, 4]}
             for value, layer in ((8, 1), (4, 2))]
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "quality.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert plot.main(tmp_path) == 0
    folder = tmp_path / "figures" / "bench"
    text = (folder / "quality.md").read_text()
    found = table(text, "method")
    primaries = {m: [np.mean([r[f"sae_top_{k}_test_accuracy"] for r in rows for k in (1, 2, 5)
                              if r["stage"] == "seeds" and r["method"] == m and r["seed"] == s])
                     for s in range(5)] for m in methods}
    test = stats.ttest_rel(primaries["ours"], primaries["BatchTopK"])
    low, high = test.confidence_interval(0.95)
    centre = np.mean(primaries["ours"]) - np.mean(primaries["BatchTopK"])
    interval = f"{centre:+.4f} [{low:+.4f}, {high:+.4f}]"
    assert found["ours"]["primary: difference to BatchTopK"] == interval
    assert found["ours"]["p (Holm)"] == "< 0.001"
    assert found["language model, best k dimensions"]["primary"] == "0.6500"
    assert "a machine, 2 cores; 2026-01-02" in text and text.count("language model") == 3
    assert "| penalised | 8/4 | " in text and "| penalised | 32 | 32.0/64.0 | " in text
    assert text.count("| untrained") == 4  # at one L0 twice, over L0, forms
    # A run at another L0: the difference on the line at its own L0, of the seeds that both have.
    info = json.loads((tmp_path / "run_5" / "final_info.json").read_text())
    part = math.log(30 / 16) / math.log(32 / 16)
    differences = []
    for seed in range(3):
        at = [np.mean([r["fvu"] for r in rows if r["method"] == "run_1" and r["seed"] == seed
                       and r["l0"] == l0]) for l0 in (16, 32)]
        mine = np.mean([info[f"layer_{i}"]["final_info_dict"]["fvu"][seed] for i in (1, 2)])
        differences.append(mine - (1 - part) * at[0] - part * at[1])
    lines = [line for line in text.splitlines() if re.match(r"\| run_[57] \| FVU", line)]
    assert f" | {np.mean(differences):+.4f} [" in lines[0] and lines[0].endswith("| 3 |")
    assert "30.0 | " in lines[0] and "outside of the curve | - | - |" in lines[1]
    quality, forms = figures["bench", "quality"], figures["bench", "forms"]
    assert [a.get_ylabel() for a in quality.axes] == ["FVU", "CE loss score", "primary metric"]
    assert list(quality.axes[0].get_lines()[0].get_xdata()) == [8.0, 32.0]
    # The runs whose L0 can't be compared with run_1's, and no other.
    assert [text.get_text() for text in forms.axes[0].texts] == ["5", "7"]
