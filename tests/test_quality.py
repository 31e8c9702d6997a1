"""The comparison with other trainers: what is compared went the same way, and the arithmetic."""

import dataclasses
import math

import pytest
from scipy import stats

import experiment
from bench import ground_truth, quality
from harness.verdict import holm, paired_difference

SETTINGS = dataclasses.replace(
    experiment.Settings(), layers=(0,), d_sae=64, k_min=4, batch=64, training_tokens=64 * 40
)

def test_an_untrained_sae_does_not_begin_as_the_true_features(tmp_path):
    # From one seed SAELens' dictionary and this project's initialization are the same directions.
    base = dataclasses.replace(
        SETTINGS, d_sae=ground_truth.N_FEATURES, k_min=8, batch=512, training_tokens=512 * 5
    )
    cell = quality.Cell("seeds", quality.OURS, 0, 1e-3, (0,), (8,))
    trained, untrained = ground_truth.run_cell(cell, base, tmp_path)
    assert untrained["method"] == quality.UNTRAINED and untrained["mcc"] < 0.5
    assert trained["mcc"] < 0.5  # five steps find nothing
    assert untrained["l0"] == 8 and 6 < untrained["true_l0"] < 10


def test_cells_that_have_rows_are_not_made_again(tmp_path):
    results = quality.Results(tmp_path / "rows.jsonl")
    cells = [quality.Cell("sweep", "TopK", 0, lr, (0,), (4.0,)) for lr in (1e-3, 2e-3)]
    made = []

    def make(cell):
        made.append(cell)
        return [dataclasses.asdict(cell) | {"l0": 4.0}]

    stages = {"sweep": lambda: iter(cells)}
    assert not quality.make_missing(stages, ["sweep"], make, results, minutes=-1)
    assert quality.make_missing(stages, ["sweep"], make, results, minutes=1)
    again = quality.Results(results.path)  # from the file
    assert quality.make_missing(stages, ["sweep"], make, again, minutes=1)
    assert made == cells and len(again.rows) == 2
    committed = quality.Results(quality.FILE)  # of before settings had the names of now
    tenth = quality.Cell("seeds", quality.TENTH, 0, 6e-3, (1, 2, 4), (16, 16, 16))
    tenth = dataclasses.replace(tenth, options=quality.METHODS[quality.TENTH].options)
    assert {row["layer"] for row in committed.rows_of(tenth)} == {1, 2, 4}
    # A method with another option is another one.
    assert not again.rows_of(dataclasses.replace(cells[0], options={"dead_window": 1}))


def test_a_training_that_another_stage_has_is_not_made_again(tmp_path):
    results = quality.Results(tmp_path / "rows.jsonl")
    curve = quality.Cell("curves", quality.OURS, 0, 1.5e-3, (1,), (16,))
    results.add([dataclasses.asdict(curve) | {"l0": 15.0}])
    form = dataclasses.replace(curve, stage="forms", method="run_1")
    (row,) = quality.made_elsewhere(form, results)
    assert row == results.rows[0] | {"stage": "forms", "method": "run_1"}
    assert results.rows == quality.Results(results.path).rows  # alike before they are read again
    for change in (
        {"seed": 1}, {"lr": 1e-3}, {"sparsity": (8,)}, {"method": "run_1, theta_lr / 3"},
        {"stage": "seeds", "method": quality.TENTH}, {"stage": "sweep", "method": quality.OURS},
        {"stage": "seeds", "method": quality.OURS},  # untrained SAEs come with those
    ):  # fmt: skip
        assert not quality.made_elsewhere(dataclasses.replace(form, **change), results)


def test_a_coefficient_is_read_off_the_curve():
    points = [(8.0, 12.0), (32.0, 3.0), (100.0, 1.0)]  # coefficient = 96 / L0, nearest two
    assert quality.line_at(points, 16.0) == pytest.approx(6.0)
    assert quality.line_at([(16.0, 2.0), (16.0, 8.0)], 20.0) == pytest.approx(4.0)


def test_paired_differences_are_students_and_holm_is_stepwise():
    mine, theirs = {0: 0.71, 1: 0.74, 2: 0.70, 7: 0.9}, {0: 0.70, 1: 0.70, 2: 0.69}
    found = paired_difference(mine, theirs)
    test = stats.ttest_rel([0.71, 0.74, 0.70], [0.70, 0.70, 0.69])
    assert (found["difference"], found["p"]) == pytest.approx((0.02, test.pvalue))
    interval = found["ci95_low"], found["ci95_high"]
    assert interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    # Two seeds: no interval.
    assert "p" not in paired_difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0})
    same = paired_difference(dict.fromkeys(range(3), 0.5), dict.fromkeys(range(3), 0.5))
    assert (same["ci95_low"], same["ci95_high"], same["p"]) == (0.0, 0.0, 1.0)
    adjusted = holm([0.01, 0.04, math.nan, 0.03])
    assert adjusted[:2] + adjusted[3:] == pytest.approx([0.03, 0.06, 0.06])
    assert math.isnan(adjusted[2])


def test_the_sweep_chooses_by_fvu_at_the_l0_that_is_wanted(tmp_path):
    results = quality.Results(tmp_path / "rows.jsonl")
    base = dataclasses.replace(SETTINGS, k_min=10)
    # At L0 = 10 it is 0.1 and 0.05; the lowest FVU of all is at another L0.
    for lr, l0, fvu in ((1.5e-3, 5, 0.2), (1.5e-3, 40, 0.025), (3e-3, 8, 0.0625), (3e-3, 16, 0.03)):
        row = {"stage": "sweep", "method": "Standard", "lr": lr, "l0": l0, "fvu": fvu}
        results.rows.append(row)
    row = {"stage": "sweep", "method": "Standard", "lr": 6e-3, "l0": 10, "fvu": 0.9}
    results.rows += [row, row]
    # A line through two points on one side of L0 = 10 is no guess: 0.006 there.
    for l0, fvu in ((2, 0.9), (4, 0.1)):
        results.rows.append(row | {"lr": 4.5e-3, "l0": l0, "fvu": fvu})
    assert quality.chosen("Standard", quality.METHODS["Standard"], base, results) == 3e-3
    results.rows = [row for row in results.rows if row["lr"] == 4.5e-3]
    assert quality.chosen("Standard", quality.METHODS["Standard"], base, results) == 4.5e-3


def test_a_coefficient_is_chosen_layer_by_layer(tmp_path):
    results = quality.Results(tmp_path / "rows.jsonl")
    base = dataclasses.replace(SETTINGS, layers=(1, 2), k_min=10)
    methods = {name: quality.METHODS[name] for name in ("Standard", "TopK")}
    for name in methods:
        row = {"stage": "sweep", "method": name, "lr": 3e-3, "l0": 10, "fvu": 0.1}
        results.rows += [row, row]
    values = methods["Standard"].values
    ranges = list(quality.range_cells(methods, base, results))
    assert [cell.sparsity for cell in ranges] == [(value, value) for value in values]
    for cell in ranges:  # L0 is 32 / coefficient on layer 1, and twice that on layer 2
        for layer, value in zip(cell.layers, cell.sparsity):
            row = dataclasses.asdict(cell) | {"layer": layer, "of_layer": value}
            results.rows.append(row | {"l0": 32 * layer / value})
    curves = list(quality.curve_cells(methods, base, results))
    expected = [pytest.approx((32 / l0, 64 / l0)) for l0 in quality.L0]
    assert [cell.sparsity for cell in curves] == expected + [(l0, l0) for l0 in quality.L0]
    seeds = list(quality.seed_cells(methods, base, results, seeds=(4,)))
    assert [cell.sparsity for cell in seeds] == [pytest.approx((3.2, 6.4)), (10, 10)]


def test_every_form_has_settings_that_can_be():
    forms = quality.METHODS | quality.FORMS | ground_truth.METHODS
    assert len(ground_truth.METHODS) > len(quality.METHODS)
    for name, method in forms.items():
        value = method.values[0] if method.values else 8
        cell = quality.Cell("forms", name, 0, 1e-3, (0,), (value,))
        settings = quality.settings_for(cell, method, SETTINGS)
        assert settings.lr == 1e-3 and settings.trainer == (method.kind or "contrastive")
        if method.kind is None:
            assert getattr(settings, method.sparsity) == value
        elif method.near is None:
            dead = method.options.get("dead_window", 100_000)
            assert (settings.k_min, settings.dead_feature_window) == (8, dead)
        else:
            assert settings.sparsity_coefficient == (value,)


def test_a_method_or_stage_that_is_not_there_is_named(capsys, monkeypatch):
    for option, value in (("--methods", "TopK;Topk"), ("--stages", "sweep,seed")):
        monkeypatch.setattr("sys.argv", ["quality.py", option, value])
        with pytest.raises(SystemExit):
            quality.arguments_of("", quality.STAGES, quality.METHODS, quality.FILE)
        assert f"no {[value[5:].strip(';,')]}" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["quality.py", "--methods", "TopK;Gated"])
    found = quality.arguments_of("", quality.STAGES, quality.METHODS, quality.FILE)
    assert list(found.methods) == ["TopK", "Gated"] and found.stages == list(quality.STAGES)
