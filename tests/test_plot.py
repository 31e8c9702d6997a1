"""plot.py: the figures and tables that a user reads after a few runs."""

import gzip
import json
import math
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from run_fixture import KS, make_features, make_run, table
from scipy import stats

import plot
from harness import drawing, run_records, tables

REPO = Path(__file__).resolve().parent.parent
REFERENCE = REPO.parent / "shared" / "reference" / "run_0_baseline.json"


def ten_runs(root, seeds=(0,), **options):
    """The plan's ten runs (docs/results.md, On tinylm: the runs of the plan), to look at."""
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


def names(figure):
    """What the lines of a figure are called, where they end."""
    return [text.get_text().replace("\n", " ") for axes in figure.axes for text in axes.texts]


# ---- tables -----------------------------------------------------------------------------------


def test_table_holds_the_recorded_figures(tmp_path, figures):
    seeds = (0, 1, 2, 7)
    one = make_run(tmp_path, "run_1", log=False, seeds=seeds, tests="the full method")
    two = make_run(tmp_path, "run_2", log=False, seeds=seeds, gain=0.03, tests="fixed temperatures",
                   fixed={"tau_sel": 0.3, "tau_pen": 0.1})
    assert plot.main(tmp_path, ()) == 0
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
    plot.main(tmp_path, ())
    ours, theirs = scores_by_seed(two), scores_by_seed(one)
    gaps = [ours[1] - theirs[3], ours[2] - theirs[2], ours[3] - theirs[1]]
    assert ablation(tmp_path)["run_2"]["difference to run_1"].startswith(f"{np.mean(gaps):+.4f} [")


def test_what_can_not_be_compared_is_not(tmp_path, figures):
    make_run(tmp_path, "run_1", log=False, seeds=(0, 1, 2))
    make_run(tmp_path, "run_2", log=False, seeds=(0, 1, 2), layers=(1, 2))  # other layers
    make_run(tmp_path, "run_3", log=False, seeds=(0, 1, 2), curriculum=False)  # L0 about 40, not 16
    make_run(tmp_path, "run_4", log=False, gain=0.1)  # one seed
    make_run(tmp_path, "run_5", log=False, seeds=(0, 1, 2), probe_sets=("tinylm/A",))
    plot.main(tmp_path, ())
    text = (tmp_path / "figures" / "tinylm" / "ablation.md").read_text()
    rows = ablation(tmp_path)
    assert ("Not comparable with the others: run_2 (layers 1, 2 against 1, 2, 4); "
            "run_5 (probe_sets tinylm/A against tinylm/B).") in text
    assert [rows[f"run_{i}"]["verdict"] for i in (2, 3, 4, 5)] == 4 * ["not comparable"]
    assert [rows[f"run_{i}"]["p"] for i in (2, 3, 4, 5)] == 4 * ["-"]
    assert rows["run_2"]["difference to run_1"] == rows["run_5"]["difference to run_1"] == "-"
    for i in (3, 4):  # a difference, and no interval: neither of FVU
        assert rows[f"run_{i}"]["difference to run_1"] != "-"
        assert not any("[" in cell for cell in rows[f"run_{i}"].values())


def test_another_language_models_figures_are_not_pooled(tmp_path, figures):
    """Nor its untrained SAEs': the lines and rows of reference are those of run_1's model."""
    one = make_run(tmp_path, "run_1", log=False, seeds=(0, 1, 2))
    other = make_run(tmp_path, "run_2", log=False, seeds=(0, 1, 2))
    for layer in (1, 2, 4):
        for part in ("means", "final_info_dict"):
            for metric, value in other[f"layer_{layer}"][part].items():
                if metric.startswith(("llm_", "untrained_top")):
                    other[f"layer_{layer}"][part][metric] = (
                        value / 2 if part == "means" else [v / 2 for v in value])
    (tmp_path / "run_2" / "final_info.json").write_text(json.dumps(other))
    config = json.loads((tmp_path / "run_2" / "config.json").read_text())
    for name, model in (("run_1", "tinylm"), ("run_2", "another/model")):
        config["settings"]["model"] = model
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    plot.main(tmp_path, ("probing",))
    rows = ablation(tmp_path)
    assert rows["run_2"]["verdict"] == "not comparable"
    for who, row in (("llm", "language model"), ("untrained", "untrained SAE")):
        scores = [one[f"layer_{layer}"]["means"][f"{who}_top_{k}_test_accuracy"]
                  for layer in (1, 2, 4) for k in (1, 2, 5)]
        assert rows[row]["primary"] == f"{np.mean(scores):.4f}"
    assert "references: not of run_2" in figures["tinylm", "probing"].get_supxlabel()
    (lines,) = [line for line in line_data(figures["tinylm", "probing"].axes[0], "black")
                if len(line) == 6]
    assert lines[0, 1] == one["layer_1"]["means"]["llm_top_1_test_accuracy"]


def test_a_probe_on_all_dimensions_that_chooses_nothing_is_shown_where_recorded(tmp_path, figures):
    """SAE-Bench's, of a run of before, is no longer shown beside it, and says what it is."""
    make_run(tmp_path, "run_1", log=False, layers=(1,))
    info = make_run(tmp_path, "run_2", log=False, layers=(1,))
    plot.main(tmp_path, ("probing",))
    note, label = "probe on all dimensions", "language model, all dimensions"
    text = (tmp_path / "figures" / "tinylm" / "ablation.md").read_text()
    assert f"{note} (best epoch): 0.9300" in text and "llm all (best epoch)" in text
    assert f"{label} (best epoch)" in names(figures["tinylm", "probing"])
    for part, value in (("means", 0.88), ("final_info_dict", [0.88])):
        info["layer_1"][part]["llm_all_test_accuracy"] = value
    (tmp_path / "run_2" / "final_info.json").write_text(json.dumps(info))
    plot.main(tmp_path, ("probing",))
    text = (tmp_path / "figures" / "tinylm" / "ablation.md").read_text()
    assert f"{note}: 0.8800" in text and "best epoch" not in text
    layers = table(text, "run", 1)
    assert layers["run_1"]["llm all"] == "-" and layers["run_2"]["llm all"] == "0.8800"
    assert label in names(figures["tinylm", "probing"])
    (line,) = [line for line in line_data(figures["tinylm", "probing"].axes[0], "black")
               if len(line) == 2]
    assert set(line[:, 1]) == {0.88}


def test_values_fixed_at_another_runs_end_are_marked(tmp_path, figures):
    make_run(tmp_path, "run_9", log=False)
    config = json.loads((tmp_path / "run_9" / "config.json").read_text())
    config["settings"]["constants_from_run"] = "run_1"
    (tmp_path / "run_9" / "config.json").write_text(json.dumps(config))
    plot.main(tmp_path, ())
    row = ablation(tmp_path)["run_9"]
    assert all(row[name].endswith("(fixed)") for name in ("tau_sel", "tau_pen", "gamma"))


def test_records_with_the_names_of_before_are_read(tmp_path, figures):
    make_run(tmp_path, "run_9", layers=(1,), steps=3)
    config, log = (tmp_path / "run_9" / name for name in ("config.json", "train_log.jsonl"))
    config.write_text(config.read_text().replace('"k_min"', '"fix_at": "run_1", "k_min"'))
    log.write_text(log.read_text().replace('"loss_reg"', '"loss_frequency"'))
    plot.main(tmp_path, ("training_losses",))
    assert ablation(tmp_path)["run_9"]["gamma"].endswith("(fixed)")
    labels = [axes.get_ylabel() for axes in figures["tinylm", "training_losses"].axes]
    assert len(labels) == 4 and labels[-1].startswith("density penalty")


def test_a_run_without_probing_is_in_the_table(tmp_path, figures):
    info = make_run(tmp_path, "run_1")
    for record in info.values():
        for part in record.values():
            for metric in [metric for metric in part if "test_accuracy" in metric]:
                del part[metric]
    (tmp_path / "run_1" / "final_info.json").write_text(json.dumps(info))
    assert plot.main(tmp_path, ("probing", "adaptation")) == 0
    row = ablation(tmp_path)["run_1"]
    assert row["primary"] == row["seeds"] == "-" and row["L0"] == "16.0"
    assert ("tinylm", "probing") not in figures and ("tinylm", "adaptation") in figures


def test_a_missing_metric_is_a_dash(tmp_path, figures):
    info = make_run(tmp_path, "run_1", log=False)
    for part in ("means", "final_info_dict"):
        del info["layer_2"][part]["fvu"]
    info["layer_4"]["means"]["frac_alive"] = None
    info["layer_4"]["final_info_dict"]["frac_alive"] = [None]
    (tmp_path / "run_1" / "final_info.json").write_text(json.dumps(info))
    assert plot.main(tmp_path, ()) == 0
    row = ablation(tmp_path)["run_1"]
    assert row["FVU"] == row["frac alive"] == "-" and row["L0"] == "16.0"


# ---- figures ----------------------------------------------------------------------------------


def test_adaptation_shows_the_runs_that_learn_on_one_layer(tmp_path, figures):
    make_run(tmp_path, "run_1", seeds=(0, 1, 2))
    make_run(tmp_path, "run_2", seeds=(0, 1, 2), fixed={"gamma": 0.15})
    make_run(tmp_path, "run_3", fixed={"gamma": 0.15, "tau_sel": 0.3, "tau_pen": 0.1})
    plot.main(tmp_path, ("adaptation", "adaptation_supplement"))
    figure = figures["tinylm", "adaptation"]
    log = [json.loads(line) for line in (tmp_path / "run_1" / "train_log.jsonl").open()]
    assert figure.get_suptitle() == "layer 2" and len(figure.axes) == 4
    for axes, metric in zip(figure.axes, ("tau_sel", "tau_pen", "gamma", "w")):
        by_tokens = {}
        for entry in log:
            if entry["layer"] == 2:
                by_tokens.setdefault(entry["tokens"], []).append(entry[metric])
        expected = [(t, sum(values) / 3) for t, values in sorted(by_tokens.items())]
        (line,) = line_data(axes, run_records.COLOURS[0])
        np.testing.assert_allclose(line, expected)
        low, high = axes.get_ylim()  # by the data
        assert low <= line[:, 1].min() and line[:, 1].max() <= high
        assert high - low < 1.6 * np.ptp(np.concatenate(
            [line, *line_data(axes, run_records.COLOURS[1])])[:, 1])
        assert len(line_data(axes, run_records.COLOURS[1])) == (metric != "gamma")  # run_2's
        assert not line_data(axes, run_records.COLOURS[2])  # run_3 learns nothing
    assert [line[0, 1] for line in line_data(figure.axes[2], drawing.GREY)] == [0]  # in sight
    assert not line_data(figure.axes[0], drawing.GREY)  # 0.1 and 0.5 are not
    titles = [axes.get_title() for axes in figures["tinylm", "adaptation_supplement"].axes]
    assert titles[:2] == ["layer 1", "layer 4"]
    assert {"run_1", "run_2"} == {name for name in names(figure) if ":" not in name}


def test_seeds_logged_at_other_steps_are_read_between_their_own(tmp_path):
    steps = {0: {10: 1.0, 20: 3.0, 30: 5.0, 50: 9.0}, 1: {5: 0.0, 25: 4.0, 40: 1.0}}
    lines = [json.dumps({"tokens": tokens, "layer": 1, "seed": seed, "l0": l0}) + "\n"
             for seed, log in steps.items() for tokens, l0 in log.items()]
    make_run(tmp_path, "run_1", layers=(1,), steps=1)
    (tmp_path / "run_1" / "train_log.jsonl").write_text("".join(lines))
    run, _ = plot.load_run(tmp_path / "run_1")
    tokens, middle, low, high = plot.curve(run, 1, "l0")
    assert list(tokens) == [10, 20, 30]  # of the first seed, as far as the second one goes
    second = np.interp(tokens, [5, 25, 40], [0.0, 4.0, 1.0])
    np.testing.assert_allclose(low, np.minimum([1.0, 3.0, 5.0], second))
    np.testing.assert_allclose(high, np.maximum([1.0, 3.0, 5.0], second))
    np.testing.assert_allclose(middle, (np.array([1.0, 3.0, 5.0]) + second) / 2)


def test_l0_is_drawn_with_its_curriculum(tmp_path, figures):
    make_run(tmp_path, "run_1", layers=(1,))
    make_run(tmp_path, "run_2", curriculum=False, layers=(1,), fixed={"gamma": 0.1})
    plot.main(tmp_path, ("training_sparsity",))
    panel = figures["tinylm", "training_sparsity"].axes[0]
    (k_t,) = line_data(panel, "black")
    assert k_t[-1, 1] == 16 and k_t[0, 1] > 50
    dashed = [line for line in panel.get_lines() if line.get_linestyle() == "--"]
    assert len(dashed) == 1 and len(line_data(panel, run_records.COLOURS[1])) == 1
    shutil.rmtree(tmp_path / "run_1")
    plot.main(tmp_path, ("training_sparsity",))
    figure = figures["tinylm", "training_sparsity"]
    assert not line_data(figure.axes[0], "black") and "$k_t$" not in str(names(figure))


def test_probing_figure_holds_saes_and_references(tmp_path, figures):
    info = make_run(tmp_path, "run_1", log=False, seeds=(0, 1, 2))
    plot.main(tmp_path, ("probing",))
    panel = figures["tinylm", "probing"].axes[2]
    means = info["layer_4"]["means"]
    for colour, who in ((run_records.COLOURS[0], "sae"), (drawing.GREY, "untrained"),
                        ("black", "llm")):
        expected = [(k, means[f"{who}_top_{k}_test_accuracy"]) for k in KS]
        assert any(line.shape == (6, 2) and np.allclose(line, expected)
                   for line in line_data(panel, colour)), who
    assert any(np.allclose(line[:, 1], means["llm_test_accuracy"])
               for line in line_data(panel, "black"))
    assert panel.get_xscale() == "log"
    assert [label.get_text() for label in panel.get_xticklabels()] == [str(k) for k in KS]


def test_coinciding_curves_can_all_be_seen(tmp_path, figures):
    for i in range(1, 4):
        make_run(tmp_path, f"run_{i}", layers=(1,), tests=str(i))
    plot.main(tmp_path, ("training_sparsity",))
    lines = [line for line in figures["tinylm", "training_sparsity"].axes[1].get_lines()
             if line.get_color() in run_records.COLOURS]
    patterns = {line._unscaled_dash_pattern for line in lines}  # (offset, (on, off))
    offsets = sorted(offset for offset, _ in patterns)
    assert len(lines) == 3 and offsets == [0, 4, 8]
    assert all(dashes == (4, 8) for _, dashes in map(lambda p: (p[0], tuple(p[1])), patterns))


def test_a_description_is_not_read_as_mathematics(tmp_path, figures):
    make_run(tmp_path, "run_1", steps=2, layers=(1,), tests="$5_{$")
    plot.main(tmp_path, ("adaptation", "probing", "ablation"))
    for name in ("adaptation", "probing", "ablation"):
        figures["tinylm", name].draw_without_rendering()  # mathtext can't parse it: ValueError


def test_a_log_of_one_line_is_a_point(tmp_path, figures):
    make_run(tmp_path, "run_1", steps=1, layers=(1,))
    plot.main(tmp_path, ("training_losses",))
    for axes in figures["tinylm", "training_losses"].axes:
        (line,) = axes.get_lines()
        assert line.get_marker() == "o" and line.get_markevery() is None


def test_nothing_overlaps_in_ten_runs_of_five_seeds(tmp_path, figures):
    ten_runs(tmp_path, seeds=range(5), steps=4)
    plot.main(tmp_path)
    assert {name for _, name in figures} == set(plot.FIGURES) - {"density", "cost"}
    for (_, name), figure in figures.items():
        assert figure.get_figwidth() == drawing.DOUBLE
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
        for axes in figure.axes:
            ends = [plt.Text.get_window_extent(text) for text in axes.texts]
            assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in ends), name
            assert not any(a.overlaps(b) for i, a in enumerate(ends) for b in ends[:i]), name
        if name == "ablation":
            cells = [text.get_window_extent() for text in figure.axes[0].texts]
            assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in cells)
            assert not any(a.overlaps(b) for i, a in enumerate(cells) for b in cells[:i])


# ---- which runs, and where --------------------------------------------------------------------


def test_profiles_are_never_mixed(tmp_path, figures):
    options = {"layers": (1,), "steps": 3}
    make_run(tmp_path, "run_1", tests="small", **options)
    make_run(tmp_path, "run_2", tests="small too", gain=0.1, **options)
    make_run(tmp_path, "run_3", profile="gemma-2-2b", tests="large", **options)
    assert plot.main(tmp_path) == 0
    assert {profile for profile, _ in figures} == {"tinylm", "gemma-2-2b"}
    assert "run_3" not in ablation(tmp_path)
    gemma = ablation(tmp_path, "gemma-2-2b")
    assert set(gemma) == {"run_3", "untrained SAE", "language model"}
    assert gemma["run_3"]["difference to run_1"] == "-"  # run_1 is of the other profile
    for (profile, name), figure in figures.items():
        texts = " ".join(text.get_text() for text in figure.findobj(plt.Text))
        assert ("run_3" in texts) == (profile == "gemma-2-2b"), name
        assert ("run_1" in texts) == (profile == "tinylm"), name


def test_runs_in_a_profiles_folder_are_shown_with_that_profile(tmp_path, figures, capsys):
    """Runs of one name in two profiles are two runs; published/ is no profile's folder."""
    options = {"layers": (1,), "steps": 3, "seeds": (0, 1, 2)}
    small = [make_run(tmp_path, "run_1", **options),
             make_run(tmp_path, "run_2", gain=0.1, **options)]
    options["profile"] = "smollm2"
    large = [make_run(tmp_path / "smollm2", "run_1", gain=0.05, **options),
             make_run(tmp_path / "smollm2", "run_2", gain=0.2, **options)]
    make_features(tmp_path / "smollm2" / "run_2", 1, 20)
    (tmp_path / "published" / "run_2").mkdir(parents=True)
    assert plot.main(tmp_path) == 0
    assert capsys.readouterr().err == ""
    for profile, runs in (("tinylm", small), ("smollm2", large)):
        rows = ablation(tmp_path, profile)
        assert {*rows} == {"run_1", "run_2", "untrained SAE", "language model"}
        scores = [np.mean(scores_by_seed(info)) for info in runs]
        assert [rows[run]["primary"].split()[0] for run in ("run_1", "run_2")] == [
            f"{score:.4f}" for score in scores]
        assert rows["run_2"]["difference to run_1"].startswith(f"{scores[1] - scores[0]:+.4f}")
        text = (tmp_path / "figures" / profile / "index.html").read_text("utf-8")
        assert ('data-run="run_2" data-layer="1"' in text) == (profile == "smollm2")
    (tmp_path / "smollm2" / "run_2" / "config.json").write_text("{")
    make_run(tmp_path, "run_3", gain=0.3, **options)
    run_3 = make_run(tmp_path / "smollm2", "run_3", gain=0.2, **options)
    assert plot.main(tmp_path, ()) == 0
    said = capsys.readouterr().err
    assert "smollm2/run_2 is left out; run it again" in said
    assert "run_3 is left out, as smollm2/run_3 has that name, too, and is of smollm2" in said
    shown = ablation(tmp_path, "smollm2")["run_3"]["primary"]
    assert shown.startswith(f"{np.mean(scores_by_seed(run_3)):.4f}")


def test_given_baseline_is_in_the_tables_and_not_in_the_curves(tmp_path, figures, capsys):
    shutil.copytree(REPO / "run_0", tmp_path / "run_0")
    assert plot.main(tmp_path) == 0
    assert capsys.readouterr().err == ""
    assert {name for _, name in figures} == {"probing", "ablation"}, figures
    rows = ablation(tmp_path, "gemma-2-2b")
    assert rows["run_0"]["primary"] == "0.5000"
    assert rows["run_0"]["what it tests"] == tables.GIVEN
    assert rows["language model"]["primary"] == "0.7283"  # (0.684275 + 0.7260625 + 0.774625) / 3
    tasks = json.loads((tmp_path / "run_0" / "config.json").read_text())["settings"]["probe_sets"]
    make_run(tmp_path, "run_1", profile="gemma-2-2b", layers=(5,), probe_sets=tasks)
    plot.main(tmp_path)
    rows = ablation(tmp_path, "gemma-2-2b")
    assert rows["run_0"]["difference to run_1"] == rows["run_0"]["verdict"] == "-"
    assert rows["language model"]["primary"] == "0.6750"  # run_1's own, not mixed with run_0's
    for name in ("adaptation", "training_losses", "training_sparsity"):
        assert "run_0" not in str(names(figures["gemma-2-2b", name]))
    assert tables.GIVEN in names(figures["gemma-2-2b", "probing"])
    points = line_data(figures["gemma-2-2b", "probing"].axes[0], drawing.GREY)
    assert any(set(line[:, 1]) == {0.5} for line in points)


def test_labels_choose_name_and_order_runs(tmp_path, figures, monkeypatch, capsys):
    for i in (1, 2, 3, 10):
        make_run(tmp_path, f"run_{i}", seeds=(0, 1, 2), gain=0.01 * i, layers=(1,), steps=3)
    make_run(tmp_path, "run_3.1", steps=3)  # an earlier run_3, set aside
    plot.main(tmp_path, ("adaptation",))
    assert list(ablation(tmp_path))[:4] == ["run_1", "run_2", "run_3", "run_10"]
    monkeypatch.setattr(plot, "labels", {"run_3": "third", "run_2": "second", "run_8": "none"})
    capsys.readouterr()
    assert plot.main(tmp_path, ("adaptation",)) == 0
    rows = ablation(tmp_path)
    assert list(rows)[:2] == ["third (run_3)", "second (run_2)"] and len(rows) == 4
    assert rows["third (run_3)"]["verdict"] == "better"  # against run_1, which isn't shown
    assert {"third", "second"} <= set(names(figures["tinylm", "adaptation"]))
    assert "run_8" in capsys.readouterr().err


def test_other_evaluations_have_a_table_of_their_own(tmp_path, figures):
    """Where `extra_evals` asks for them; means over layers, and their standard error."""
    make_run(tmp_path, "run_1", seeds=(0, 1, 2))
    info = make_run(tmp_path, "run_2", seeds=(0, 1, 2))
    for i, layer in enumerate(info):
        if layer != "verdict":
            info[layer]["final_info_dict"] |= {
                "scr_metric_threshold_10": [0.1 + i, 0.2 + i, 0.3 + i],
                "scr_untrained_metric_threshold_10": [0.01, 0.01, 0.01],
                "scr_metric_threshold_2": [0.5, 0.5, 0.5], "seconds_scr": [60.0, 60.0, 60.0]}
    (tmp_path / "run_2" / "final_info.json").write_text(json.dumps(info))
    path = tmp_path / "run_2" / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["extra_evals"] = ["scr"]
    path.write_text(json.dumps(config))
    assert plot.main(tmp_path, ()) == 0
    text = (tmp_path / "figures" / "tinylm" / "ablation.md").read_text()
    rows = table(text.split("## SAE-Bench's other evaluations")[1], "figure")
    error = 0.1 / math.sqrt(3)
    assert {name: row["run_2"] for name, row in rows.items()} == {
        "scr_metric_threshold_2": "0.5000", "scr_metric_threshold_10": f"1.2000 ± {error:.4f}",
        "scr_untrained_metric_threshold_10": "0.0100"}
    assert [*rows] == ["scr_metric_threshold_2", "scr_metric_threshold_10",
                       "scr_untrained_metric_threshold_10"]
    assert "run_1" not in rows["scr_metric_threshold_2"]
    page = (tmp_path / "figures" / "tinylm" / "index.html").read_text("utf-8")
    assert "<details><summary>SAE-Bench&#x27;s other evaluations</summary>" in page


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("file, content", [
    ("final_info.json", '{"layer_1": {"means"'),
    ("final_info.json", "[]"), ("final_info.json", '{"layer_1": {}}'),
    ("config.json", None), ("config.json", '{"profile": "../../elsewhere"}'),
])
def test_a_broken_run_is_named_and_the_others_are_drawn(tmp_path, figures, capsys, file, content):
    make_run(tmp_path, "run_1", steps=3, layers=(1,))
    make_run(tmp_path, "run_2", steps=3, layers=(1,))
    path = tmp_path / "run_2" / file
    path.unlink() if content is None else path.write_text(content)
    assert plot.main(tmp_path, ()) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"run_2/{file}" in said and "Traceback" not in said
    assert "run_1" in ablation(tmp_path) and "run_2" not in ablation(tmp_path)


@pytest.mark.parametrize("content", [None, "", '{"tokens": 5}\n', '{"tokens": 5, "layer": 1, "se'])
def test_a_broken_log_keeps_the_run_in_the_tables(tmp_path, figures, capsys, content):
    make_run(tmp_path, "run_1", steps=3, layers=(1,))
    make_run(tmp_path, "run_2", steps=3, layers=(1,))
    path = tmp_path / "run_2" / "train_log.jsonl"
    path.unlink() if content is None else path.write_text(content)
    assert plot.main(tmp_path, ("training_losses",)) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "run_2/train_log.jsonl" in said
    assert "run_2" in ablation(tmp_path)
    assert set(names(figures["tinylm", "training_losses"])) == {"run_1"}


def test_only_broken_runs_or_none_is_an_error(tmp_path, capsys):
    assert plot.main(tmp_path) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no complete run" in said
    (tmp_path / "run_1").mkdir()
    assert plot.main(tmp_path) == 1 and "run_1/final_info.json" in capsys.readouterr().err


def test_an_unfinished_run_is_in_the_curves_and_has_no_figures(tmp_path, figures, capsys):
    """It goes on, or has failed; its last line may be half-written."""
    for i in (1, 2):
        make_run(tmp_path, f"run_{i}", layers=(1,), seeds=range(3), tests=f"test {i}", gain=i / 100,
                 fixed={"tau_pen": 0.1} if i == 2 else None)
    (tmp_path / "run_2" / "final_info.json").unlink()
    path = tmp_path / "run_2" / "train_log.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= 13) + '{"st')
    config = json.loads((tmp_path / "run_2" / "config.json").read_text())
    config["settings"]["training_tokens"] = 1_000_000
    (tmp_path / "run_2" / "config.json").write_text(json.dumps(config))
    assert plot.main(tmp_path) == 0
    assert capsys.readouterr().err == ""
    row = ablation(tmp_path)["run_2"]
    assert row["verdict"] == "unfinished: 43% of training" and row["what it tests"] == "test 2"
    assert row["primary"] == row["difference to run_1"] == row["L0"] == row["seeds"] == "-"
    assert row["tau_pen"] == "-"  # fixed, but at what it has no figure for
    figure = figures["tinylm", "training_sparsity"]
    assert names(figure).count("run_2, unfinished") == 3 and "run_1" in names(figure)
    lines = line_data(figure.axes[1], run_records.COLOURS[1])
    assert max(line[-1, 0] for line in lines) == round(1e6 * 13 / 30)
    for name in ("probing", "forest", "over_l0"):
        assert ("tinylm", name) not in figures or "run_2" not in str(names(figures["tinylm", name]))
    shutil.rmtree(tmp_path / "run_1")  # and alone
    assert plot.main(tmp_path) == 0
    text = (tmp_path / "figures" / "tinylm" / "ablation.md").read_text()
    assert "nan" not in text.lower() and "By layer" not in text


# ---- runs at several L0 -----------------------------------------------------------------------


def sweep_of(root, name, values, gain=0.0, **settings):
    """Runs that differ in k_min alone, of L0 k_min; returns {k_min: the primary metric by seed}."""
    scores = {}
    for k in values:
        info = make_run(root, f"{name}_{k}", layers=(1, 2), seeds=range(3), log=False,
                        gain=gain + 0.01 * math.log2(k))
        for layer in (1, 2):
            info[f"layer_{layer}"]["final_info_dict"]["l0"] = 3 * [float(k)]
        (root / f"{name}_{k}" / "final_info.json").write_text(json.dumps(info))
        config = json.loads((root / f"{name}_{k}" / "config.json").read_text())
        config["settings"] |= {"k_min": k, "description": f"k_min {k}", **settings}
        (root / f"{name}_{k}" / "config.json").write_text(json.dumps(config))
        scores[k] = np.array(scores_by_seed(info))
    return scores


def test_runs_that_differ_in_what_moves_l0_are_a_curve(tmp_path, figures, monkeypatch):
    sweep_of(tmp_path, "run_k", (8, 16, 32))
    sweep_of(tmp_path, "run_t", (8, 32), gain=0.02, lr=0.5)
    sweep_of(tmp_path, "run_n", (16,), lr=0.7)
    monkeypatch.setattr(plot, "REFERENCE", "run_k_16")
    report = plot.load_reports(tmp_path)["tinylm"]
    curves = [[run.name for run in curve] for curve in report.curves]
    assert curves == [["run_k_8", "run_k_16", "run_k_32"], ["run_n_16"], ["run_t_8", "run_t_32"]]
    colours = {run.name: colour for run, (colour, _) in report.styles.items()}
    assert len({colours[name] for name in curves[0]}) == 1 and len(set(colours.values())) == 3
    assert len(set(report.styles.values())) == 6
    plot.main(tmp_path, ("over_l0",))
    figure = figures["tinylm", "over_l0"]
    assert [axes.get_title()[:-2] for axes in figure.axes] == ["FVU", "CE loss score",
                                                               "primary metric"]
    lines = [line for line in line_data(figure.axes[0], colours["run_k_8"]) if len(line) > 1]
    np.testing.assert_allclose(lines[0][:, 0], [8, 16, 32])
    assert sorted(names(figure)) == ["lr 0.5", "run_k_8 to run_k_32", "run_n_16"]


def test_no_two_runs_look_the_same(tmp_path):
    """Eleven methods for ten colours, and a second run of the first one."""
    for i in range(12):
        make_run(tmp_path, f"run_{i}", layers=(1,), steps=2, fixed={"tau_sel": 0.1 + i % 11 / 100})
    path = tmp_path / "run_11" / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["k_min"] = 32
    path.write_text(json.dumps(config))
    report = plot.load_reports(tmp_path)["tinylm"]
    assert len(report.curves) == 11 and len(report.styles) == 12
    assert len(set(report.styles.values())) == 12


def test_a_curve_is_named_by_what_sets_it_apart(tmp_path, figures, monkeypatch):
    sweep_of(tmp_path, "run_k", (8, 16), lr=0.1)
    sweep_of(tmp_path, "run_t", (8, 16), lr=0.5)
    plot.main(tmp_path, ("over_l0",))
    assert sorted(names(figures["tinylm", "over_l0"])) == ["lr 0.1", "lr 0.5"]


def test_other_code_is_another_curve(tmp_path, figures):
    """A run of an edited loss, of equal settings, isn't a point of the method before it."""
    sweep_of(tmp_path, "run_k", (8, 16, 32))
    for k, code in ((8, "x = 1  # one\n"), (16, "PLAN = {}\nx = 1\n"), (32, "x = 2\n")):
        (tmp_path / f"run_k_{k}" / "experiment.py").write_text(code)
    report = plot.load_reports(tmp_path)["tinylm"]
    assert [[run.name[6:] for run in curve] for curve in report.curves] == [["8", "16"], ["32"]]


def test_the_table_reads_the_reference_s_curve(tmp_path, figures, monkeypatch):
    theirs = sweep_of(tmp_path, "run_k", (16, 36))
    mine = sweep_of(tmp_path, "run_n", (24,), gain=0.03, lr=0.7)[24]
    sweep_of(tmp_path, "run_n", (64,), lr=0.9)
    monkeypatch.setattr(plot, "REFERENCE", "run_k_16")
    plot.main(tmp_path, ("forest", "ablation"))
    rows = ablation(tmp_path)
    gaps = mine - (theirs[16] + theirs[36]) / 2  # 24 is half-way in log L0
    low, high = stats.t.interval(0.95, 2, loc=gaps.mean(), scale=stats.sem(gaps))
    row = rows["run_n_24"]
    assert row["difference to run_k_16"] == f"{gaps.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
    assert row["verdict"] == "better at equal L0" and "[" in row["FVU: difference to run_k_16"]
    assert rows["run_n_64"]["verdict"] == "not comparable"  # beyond the curve
    assert rows["run_k_36"]["verdict"] == "on run_k_16's own curve"
    assert "[" not in rows["run_n_64"]["difference to run_k_16"]
    forest = figures["tinylm", "forest"].axes[0]
    assert len(forest.containers) == 1  # an interval for run_n_24 alone
    assert any("better at equal L0" in text for text in names(figures["tinylm", "forest"]))
    cells = [text.get_text() for text in figures["tinylm", "ablation"].axes[0].texts]
    assert any(cell.startswith(f"{gaps.mean():+.3f} = L0\n[") for cell in cells)


# ---- densities and costs ----------------------------------------------------------------------


def test_densities_and_costs_are_drawn_where_they_are_recorded(tmp_path, figures, capsys):
    info = make_run(tmp_path, "run_1", layers=(1,), steps=4)
    for part, wrap in (("means", float), ("final_info_dict", lambda value: [value])):
        seconds = {"seconds_training": 120.0, "seconds_core": 30.0, "seconds_total": 200.0}
        info["layer_1"][part] |= {name: wrap(value) for name, value in seconds.items()}
    (tmp_path / "run_1" / "final_info.json").write_text(json.dumps(info))
    densities = [0.0, 0.0, *np.geomspace(1e-3, 0.5, 62)]
    (tmp_path / "run_1" / "features").mkdir()
    for layer, content in ((1, {"layer": 1, "features": [{"density": d} for d in densities]}),
                           (2, {"layer": 2})):  # damaged
        with gzip.open(tmp_path / "run_1" / "features" / f"layer_{layer}.json.gz", "wt") as file:
            json.dump(content, file)
    plot.main(tmp_path, ("density", "cost"))
    assert "features/layer_2.json.gz can't be read" in capsys.readouterr().err
    (axes,) = figures["tinylm", "density"].axes
    (steps,) = axes.patches
    assert steps.get_data().values.sum() == 62
    (dot,) = line_data(axes, run_records.COLOURS[0])
    assert dot[0, 1] == 2  # the silent ones
    row = table((tmp_path / "figures" / "tinylm" / "ablation.md").read_text(), "run", 2)["run_1"]
    assert row["tokens per second"] == "9000" and row["training, minutes"] == "2.0"
    assert row["total, minutes"] == "3.3" and row["sparse probing, minutes"] == "-"
    (text,) = names(figures["tinylm", "cost"])
    assert text == "1 seed   9000 tokens/s   3.3 min"
    widths = [patch.get_width() for patch in figures["tinylm", "cost"].axes[0].patches]
    assert sum(widths) == pytest.approx(200 / 60)


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
        assert width == round(drawing.DOUBLE * 220), name  # the PNG header's pixels, at 220 a inch
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_the_command_takes_no_argument(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot.py", "--all"])
    with pytest.raises(SystemExit, match="takes no argument"):
        runpy.run_path(plot.__file__, run_name="__main__")


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
