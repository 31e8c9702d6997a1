"""bench/figures.py: the tables and figures of what bench/ measured."""

import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
from run_fixture import make_run, table
from scipy import stats

import plot
from bench import figures
from harness.verdict import PRIMARY
from tests.conftest import ROOT


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


def test_what_bench_measured_is_in_tables_and_figures(tmp_path, monkeypatch):
    make_run(tmp_path, "run_1", tests="the full method", seeds=range(3), layers=(1, 2))
    for name, l0 in {"run_5": 30.0, "run_7": 800.0}.items():
        info = make_run(tmp_path, name, tests="elsewhere", seeds=range(4), layers=(1, 2),
                        fixed={"gamma": l0 / 1000})
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
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.update({path.name: figure}))
    assert plot.main(tmp_path, ()) == 0
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
    quality, forms = drawn["quality"], drawn["forms"]
    titles = [axes.get_title() for axes in quality.axes]
    assert titles == ["FVU ↓", "CE loss score ↑", "primary metric ↑"]
    assert {"ours", "BatchTopK", "untrained SAE"} <= {t.get_text() for t in quality.axes[2].texts}
    assert list(quality.axes[0].get_lines()[0].get_xdata()) == [8.0, 32.0]
    # The runs whose L0 can't be compared with run_1's, and no other.
    assert [text.get_text() for text in forms.axes[0].texts] == ["5", "7"]
    # What others' trainers do is behind the runs: at these L0, where the model tells the same.
    over = figures.comparable_trainers(tmp_path / "bench", plot.load_reports(tmp_path)["tinylm"])
    assert over is None  # the runs' language model tells 0.63 to 0.855, the bench's 0.65
    for path in tmp_path.glob("run_*/final_info.json"):
        info = json.loads(path.read_text())
        for layer in (1, 2):
            for k in (1, 2, 5):
                values = info[f"layer_{layer}"]["final_info_dict"]
                values[f"llm_top_{k}_test_accuracy"] = [0.65] * len(values["l0"])
        path.write_text(json.dumps(info))
    report = plot.load_reports(tmp_path)["tinylm"]
    over = figures.comparable_trainers(tmp_path / "bench", report)
    assert list(over["method"]) == ["ours", "ours", "BatchTopK", "BatchTopK", "penalised",
                                    "penalised", "penalised"][:len(over)]
    mine = over[over["method"] == "BatchTopK"]
    assert list(mine["l0"]) == [8.0, 32.0]
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.update({path.name: figure}))
    plot.main(tmp_path, ("over_l0",))
    assert "BatchTopK" in {text.get_text() for text in drawn["over_l0"].axes[2].texts}
    assert "beyond: run_7 (L0 800)" in drawn["over_l0"].get_supxlabel()
    plt.close("all")


def test_what_a_line_over_l0_leaves_out_is_what_the_docs_say():
    """The middle one of three points of a curve lies above the line through its neighbours."""
    stages = figures.frames(figures.read_rows(ROOT / "bench" / "quality.jsonl"))

    def misses(frame):
        found = []
        for _, mine in figures.groups(frame, "method"):
            points = sorted((math.log(here["l0"].mean()), here[PRIMARY].mean())
                            for _, here in figures.groups(mine, "sparsity"))
            found += [b[1] - np.interp(b[0], [a[0], c[0]], [a[1], c[1]])
                      for a, b, c in zip(points, points[1:], points[2:])]
        return found

    forms = stages["forms"][stages["forms"]["method"] == "run_1"]
    text = " ".join((ROOT / "docs" / "method.md").read_text().split())
    for found, said in ((misses(stages["curves"]), "by {:.3f} in the mean over {} methods (up to"
                                                   " {:.3f}; one seed"),
                        (misses(forms), "by {:.3f} in the mean (up to {:.3f})")):
        words = {11: "eleven"}[stages["curves"]["method"].nunique()]
        values = np.mean(found), max(map(abs, found))
        numbers = (values[0], words, values[1]) if "methods" in said else values
        assert said.format(*numbers) in text, values
