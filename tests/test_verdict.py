"""Better or worse: the word, the figures, and what is compared with what."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
import types
from pathlib import Path

import pytest

from harness.curves import on_one_curve
from harness.errors import ExperimentError
from harness.plans import standing
from harness.records import final_values
from harness.reference import check_references, verdict_of
from harness.startup import Run
from harness.verdict import (
    ASIDE,
    BEFORE,
    PRIMARY,
    Curve,
    compare_records,
    read_off,
    verdict,
    with_current_names,
)
from tests.conftest import ROOT, run_command, settings_of
from tests.test_command import words


def of(primary: list[float], l0: float = 16.0, first_seed: int = 0) -> dict[str, list[float]]:
    seeds = [float(first_seed + i) for i in range(len(primary))]
    return {"seed": seeds, PRIMARY: primary, "l0": [l0] * len(primary)}


@pytest.mark.parametrize(
    "run, reference, word",
    [
        (of([0.80, 0.81, 0.82]), of([0.70, 0.71, 0.73]), "better"),
        (of([0.70, 0.71, 0.73]), of([0.80, 0.81, 0.82]), "worse"),
        (of([0.70, 0.75, 0.72]), of([0.71, 0.73, 0.72]), "no difference"),
        (of([0.80, 0.81]), of([0.70, 0.71]), "not comparable (2 seeds shared"),
        (of([0.80, 0.81, 0.82], 20.0), of([0.70, 0.71, 0.73]), "not comparable (+0.0967"),
        (of([0.80, 0.81, 0.82], 19.1), of([0.70, 0.71, 0.73]), "better"),
        (of([0.80, 0.81, 0.82], 16.0, 1), of([0.70, 0.71, 0.73]), "not comparable (2 seeds"),
        (of([0.80, 0.81, 0.82]), None, "not comparable (run_1)"),
    ],
)
def test_verdict(run, reference, word) -> None:
    sentence, numbers = verdict(run, reference, "run_1")
    assert sentence.startswith(word)
    assert all(math.isfinite(value) for value in numbers.values())
    assert numbers["comparable"] == (not word.startswith("not"))
    assert numbers[PRIMARY] == pytest.approx(sum(run[PRIMARY]) / len(run[PRIMARY]))


def test_verdict_interval_worked_out_by_hand() -> None:
    """Differences 0.10, 0.10, 0.09: mean 0.0966667, sd 0.0057735, t(0.975, 2) = 4.3027."""
    _, numbers = verdict(of([0.80, 0.81, 0.82]), of([0.70, 0.71, 0.73]), "run_1")
    half = 4.302653 * 0.00577350 / math.sqrt(3)
    assert numbers["difference"] == pytest.approx(0.0966667, abs=1e-6)
    assert numbers["ci95_low"] == pytest.approx(0.0966667 - half, abs=1e-6)
    assert numbers["ci95_high"] == pytest.approx(0.0966667 + half, abs=1e-6)


# ---- at another L0: the reference's curve -----------------------------------------------------

CURVE = Curve({
    "run_1": of([0.70, 0.71, 0.73], 16.0),
    "run_k_8": of([0.60, 0.63, 0.65], 8.0),
    "run_k_36": of([0.80, 0.80, 0.80], 36.0),
})  # fmt: skip


def test_a_verdict_at_equal_l0_worked_out_by_hand() -> None:
    """At L0 24, half-way from 16 to 36 in log L0: the reference has 0.75, 0.755 and 0.765 there.

    Differences 0.05, 0.055, 0.055: mean 0.0533333, sd 0.00288675, t(0.975, 2) = 4.3027.
    """
    run = of([0.80, 0.81, 0.82], 24.0)
    said, numbers = verdict(run, CURVE.points["run_1"], "run_1", None, CURVE)
    assert said == (
        "better at equal L0 (interpolated between run_1 and run_k_36: +0.0533 [+0.0462, +0.0605] "
        "against run_1's curve, L0 24.0 against 16.0 and 36.0)"
    )
    half = 4.302653 * 0.00288675 / math.sqrt(3)
    wanted = {
        "difference": 0.0533333, "ci95_low": 0.0533333 - half, "ci95_high": 0.0533333 + half,
        f"{PRIMARY}_reference": 0.7566667, "l0_reference": 24.0, "l0_below": 16.0, "l0_above": 36.0,
        "interpolated": 1.0, "comparable": 1.0, "n_paired_seeds": 3, PRIMARY: 0.81, "l0": 24.0,
    }  # fmt: skip
    assert {name: numbers[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    assert numbers.keys() == wanted.keys() | {"p"}


@pytest.mark.parametrize("run, said", [
    (of([0.50, 0.51, 0.53], 10.0), "worse at equal L0 (interpolated between run_k_8 and run_1: -0"),
    (of([0.60, 0.65, 0.64], 8.0), "no difference at equal L0 (by run_k_8: +0.0033"),
    (of([0.80, 0.81, 0.82], 36.5), "not comparable (+0.0967"),  # nothing is extrapolated
    (of([0.80, 0.81, 0.82], 7.9), "not comparable (+0.0967"),
    (of([0.80, 0.81], 24.0), "not comparable (2 seeds shared"),
    (of([0.80, 0.81, 0.82], 24.0, 1), "not comparable (2 seeds shared"),
    (of([0.80, 0.81, 0.82], 16.5), "better (+0.0967"),  # L0 is equal: the curve is not asked
    (of([0.80, 0.81, 0.82], 0.0), "not comparable"),
])  # fmt: skip
def test_a_curve_is_read_between_its_ends_alone(run, said) -> None:
    sentence, numbers = verdict(run, CURVE.points["run_1"], "run_1", None, CURVE)
    assert sentence.startswith(said), sentence
    assert ("interpolated" in numbers) == (" at equal L0" in said)
    assert all(math.isfinite(value) for value in numbers.values())
    if run["l0"][0] in (36.5, 7.9):
        assert sentence.endswith(
            "; run_1's curve has L0 8.0, 16.0, 36.0 and is read between two that are at most 2.5 "
            "times apart)"
        )


def test_a_run_that_shares_too_few_seeds_is_no_point_of_the_curve() -> None:
    """run_k_30 is nearer than run_k_36, and has one seed."""
    points = CURVE.points | {"run_k_30": of([0.1], 30.0)}
    names, values = read_off(Curve(points), of([0.80, 0.81, 0.82], 24.0))
    assert names == ["run_1", "run_k_36"] and values == pytest.approx({0: 0.75, 1: 0.755, 2: 0.765})


def test_a_curve_is_not_read_over_a_gap() -> None:
    """A straight line over a factor of 4 would lie under the curve, and the run seem better."""
    points = {name: lists for name, lists in CURVE.points.items() if name != "run_1"}
    assert read_off(Curve(points), of([0.80, 0.81, 0.82], 24.0)) == ([], {})  # from 8 to 36


def said_of(run: Run, config: dict, lists: dict) -> tuple[str, dict[str, float]]:
    return verdict_of(run.out_dir, run.runs, config, lists)


@pytest.fixture()
def beside(tmp_path: Path):
    """A function that writes a complete run beside others: its folder and config.json."""

    def make(name: str, primary: list[float], l0: float, code: str = "", **settings):
        folder = tmp_path / name
        folder.mkdir()
        record = changed(RUN_1, **settings)
        (folder / "config.json").write_text(json.dumps(record))
        shutil.copy(ROOT / "run_1" / "experiment.py", folder)
        (folder / "final_info.json").write_text(
            json.dumps({"verdict": {"final_info_dict": of(primary, l0)}})
        )
        with (folder / "experiment.py").open("a") as file:
            file.write(code)
        return folder, record

    return make


def test_the_reference_s_curve_is_found_among_the_runs_beside_it(beside, tmp_path) -> None:
    beside("run_1", [0.70, 0.71, 0.73], 16.0)
    plan = "\nPLAN |= {'run_k_36': dict(k_min=36)}  # a comment\nPLAN['run_5'] = dict(lr=1.0)\n"
    beside("run_k_36", [0.80] * 3, 36.0, code=plan, k_min=36, description="another", log_every=7)
    beside("run_2", [0.1] * 3, 20.0, k_min=40, lr=0.5)  # another method
    beside("run_3", [0.1] * 3, 28.0, code="\ndef loss():\n    return 0\n", k_min=50)  # edited
    beside("run_4", [0.1] * 3, 23.0, k_min=33, context=16)
    beside("run_k_36.1", [0.1] * 3, 30.0, k_min=30)  # set aside
    (tmp_path / "run_5").mkdir()  # unfinished
    folder, config = beside("run_11", [0.80, 0.81, 0.82], 24.0, lr=0.7, k_min=20)
    settings = types.SimpleNamespace(compare_to="run_1")
    run = Run(settings, None, out_dir=folder, runs=tmp_path)
    said, numbers = said_of(run, config, of([0.80, 0.81, 0.82], 24.0))
    assert said.startswith("better at equal L0 (interpolated between run_1 and run_k_36: +0.0533")
    assert "differing in k_min 20 against" in said and "lr 0.7 against" in said
    assert numbers["interpolated"] == 1
    interval = f"[{numbers['ci95_low']:+.4f}, {numbers['ci95_high']:+.4f}]"
    assert standing(folder, "tinylm") == (  # as plan.py's table has it
        "0.8100", f"better at equal L0 (+0.0533 {interval})"
    )  # fmt: skip
    # The same method at another L0: the curve's own bend would be the difference.
    folder, like = beside("run_12", [0.80, 0.81, 0.82], 24.0, k_min=20)
    same = dataclasses.replace(run, out_dir=folder)
    assert "; on run_1's own curve; " in said_of(same, like, of([0.8, 0.81, 0.82], 24.0))[0]
    (folder / "experiment.py").write_text("edited")  # and no longer on it
    assert said_of(same, like, of([0.8, 0.81, 0.82], 24.0))[0].startswith("better at equal")
    shutil.rmtree(tmp_path / "run_k_36")
    said, numbers = said_of(run, config, of([0.80, 0.81, 0.82], 24.0))
    assert "run_12, run_3 ran another experiment.py than run_1" in said and said.startswith("not")
    assert "interpolated" not in numbers


def test_a_record_without_a_count_of_tokens_was_trained_in_whole_steps() -> None:
    mine = current(RUN_1)
    counted = mine | {"training_tokens": 1_200_000 // 512 * 512}
    assert "training_tokens" not in mine and not compare_records(counted, mine).varied
    assert compare_records(counted | {"training_tokens": 1_199_104}, mine).varied


def test_what_moves_l0() -> None:
    mine = current(RUN_1)
    for change, equal in (
        (dict(k_min=8), True), (dict(k_min=8, k_start_factor=3.0), False), (dict(gamma=0.1), False),
        (dict(k_min=8, description="x", seeds=[7]), True), (dict(training_tokens=5), False),
    ):  # fmt: skip
        assert on_one_curve(changed(mine, **change), mine) is equal, change
    for none in (dict(curriculum=False), dict(activation="relu")):  # no selection
        for gamma, equal in ((0.1, True), (None, False)):  # the penalty's weight moves it
            two = (changed(mine, gamma=g, **none) for g in (gamma, 0.05))
            assert on_one_curve(*two) is equal
    assert on_one_curve(*(changed(mine, activation="relu", k_min=k) for k in (8, 16)))
    moved = changed(mine, l1_coefficient=3.0), changed(mine, l1_coefficient=5.0)
    assert on_one_curve(*moved)
    assert on_one_curve(mine | {"hardware": {"processor": "another"}}, mine)


# ---- what can be compared ---------------------------------------------------------------------

RUN_1 = json.loads((ROOT / "run_1" / "config.json").read_text())
SILENT = {  # settings that change neither an SAE nor the meaning of a figure
    "description", "compare_to", "device", "log_every", "track", "budget_minutes", "seeds",
    "probe_llm_batch", "probe_sae_batch", "extra_evals", "sae_probes_sets",
}  # fmt: skip


def changed(config: dict, **settings) -> dict:
    """A config.json with other settings."""
    return config | {"settings": config["settings"] | settings}


def current(config: dict) -> dict:
    """A config.json with the names of now, and all settings of now."""
    import experiment

    given = dataclasses.asdict(experiment.Settings())
    return config | {"settings": json.loads(json.dumps(given))}


@pytest.mark.parametrize("change, sentence", [
    (dict(layers=[3]), "layers 3 against 1, 2, 4"),
    (dict(context=64), "context 64 against 128"),
    (dict(hook="mlp_out"), "hook mlp_out against resid_post"),
    (dict(lm_dtype="bfloat16"), "lm_dtype bfloat16 against float32"),
    (dict(model="other/model"), "language model other/model against tinylm"),
    (dict(training_text="other"), "training_text other against tinylm"),
    (dict(core_text="other"), "core_text other against tinylm"),
    (dict(core_sparsity_batches=50), "core_sparsity_contexts 800 against 640"),
    (dict(probe_sets=["tinylm/A"]), "probe_sets tinylm/A against tinylm/B"),
    (dict(probe_train=100, probe_test=30),
     "probe_train 100 against 300; probe_test 30 against 200"),
    (dict(probe_seed=1), "probe_seed 1 against 42"),
    (dict(core_of_an_edit=2, context=64), "context 64 against 128"),
])  # fmt: skip
def test_what_must_be_equal_is_named(change, sentence) -> None:
    """With the figures of a run that would be worse: no difference is recorded."""
    compared = compare_records(changed(RUN_1, **change), RUN_1)
    said, numbers = verdict(of([0.70, 0.71, 0.73]), of([0.80, 0.81, 0.82]), "run_1", compared)
    assert said == f"not comparable ({sentence})"
    assert numbers.keys() == {PRIMARY, "l0", "comparable"} and numbers["comparable"] == 0
    assert compare_records(RUN_1, changed(RUN_1, **change)).unlike  # either way


def test_a_profile_is_named_alone() -> None:
    """It stands for all that it sets: nine reasons in one line are not read."""
    other = changed(RUN_1, layers=[9], context=64) | {"profile": "smollm2"}
    compared = compare_records(other, RUN_1)
    assert compared.reasons() == "profile smollm2 against tinylm" and "layers" in compared.unlike


@pytest.mark.parametrize("change, named", [
    (dict(d_sae=2048), "d_sae 2048 against 1024"),
    (dict(lr=3e-3, k_min=8), "k_min 8 against 16, lr 0.003 against 0.0015"),
    (dict(training_tokens=600_000), "training_tokens 599552 against 1199616"),
    (dict(density_penalty=0.01, activation="jumprelu"),
     "activation jumprelu against topk, density_penalty 0.01 against 0.0"),
    (dict(aux_weight=0.5), "aux_weight 0.5 against none"),  # a setting that an edit added
    (dict(tau_sel=0.123456789), "tau_sel 0.123456789 against none"),
])  # fmt: skip
def test_what_an_experiment_varies_is_named(change, named) -> None:
    compared = compare_records(changed(RUN_1, **change), RUN_1)
    said, _ = verdict(of([0.80, 0.81, 0.82]), of([0.70, 0.71, 0.73]), "run_1", compared)
    assert said == f"better (+0.0967 [+0.0823, +0.1110] against run_1, L0 16.0 against 16.0; " \
                   f"differing in {named})"  # fmt: skip


def test_no_setting_is_left_out_of_a_comparison() -> None:
    """Each field of Settings, changed, is told of, but for those that change nothing."""
    import experiment

    mine, silent = current(RUN_1), set()
    for field in dataclasses.fields(experiment.Settings):
        compared = compare_records(changed(mine, **{field.name: "another"}), mine)
        if not (compared.unlike or compared.varied):
            silent.add(field.name)
    assert silent == SILENT | {"train_dtype"}  # of which config.json holds what "auto" has become
    assert compare_records(mine | {"train_dtype": "float32"}, mine).varied
    smaller = changed(mine, core_prompts=8, core_reconstruction_batches=20,
                      core_sparsity_batches=80)  # fmt: skip
    assert not compare_records(smaller, mine).unlike  # as fit_core_batches does it


def test_language_models_and_texts_are_compared_by_what_they_hold() -> None:
    mine = changed(current(RUN_1), model="a/folder", training_text="some/text")
    mine |= {"content": {"model": "1", "training_text": "2"}}
    moved = changed(mine, model="another/folder", training_text="elsewhere/text")
    assert not compare_records(moved, mine).unlike and not compare_records(moved, mine).unknown
    other = moved | {"content": {"model": "3", "training_text": "2"}}
    said = compare_records(other, mine).reasons()
    assert said == "language model another/folder against a/folder"
    tuned = mine | {"content": {"model": "3", "training_text": "4"}}
    assert compare_records(tuned, mine).unlike == {
        "language model": "of other content", "training_text": "of other content",
    }  # fmt: skip
    tuned = copy.deepcopy(RUN_1)  # tinylm's own, in records of before
    tuned["sha256"]["tinylm/model.safetensors"] = "0"
    assert compare_records(tuned, RUN_1).unlike == {"language model": "of other content"}
    lacking = {name: value for name, value in mine.items() if name not in ("content", "sha256")}
    assert compare_records(lacking, mine).unknown == (
        "language model", "training_text", "core_text", "probe_sets",
    )  # fmt: skip
    said, _ = verdict(of([0.8] * 3), of([0.8] * 3), "run_1", compare_records(lacking, mine))
    assert said.endswith("; not recorded, so perhaps not equal: "
                         "language model, training_text, core_text, probe_sets)")  # fmt: skip


def test_an_edited_probe_is_not_compared_and_edited_core_metrics_are_named() -> None:
    mine = RUN_1 | {"code": {"probe": "1", "core_metrics": "1"}}
    assert compare_records(mine, RUN_1).unknown == ("code of probe",)  # of before, without
    for function, unlike in (("probe", True), ("core_metrics", False)):
        edited = mine | {"code": mine["code"] | {function: "2"}}
        compared = compare_records(edited, mine)
        assert compared.unlike == ({"code of probe": "edited"} if unlike else {})
        assert compared.varied == ({} if unlike else {"code of core_metrics": "edited"})


def test_the_committed_runs_have_the_verdicts_they_had() -> None:
    words_of = []
    for i in range(2, 11):
        records = [
            json.loads((ROOT / f"run_{j}" / name).read_text())
            for j in (i, 1) for name in ("config.json", "final_info.json")
        ]  # fmt: skip
        compared = compare_records(records[0], records[2])
        lists = (with_current_names(info["verdict"]["final_info_dict"]) for info in records[1::2])
        said, numbers = verdict(*lists, "run_1", compared)
        words_of.append(said.split(" (")[0])
        for name, value in with_current_names(records[1]["verdict"]["means"]).items():
            assert name == "seed" or numbers[name] == pytest.approx(value, abs=1e-12)
    same, unlike = "no difference", "not comparable"
    assert words_of == [same, same, same, unlike, unlike, unlike, same, same, "better"]
    import plot

    report = plot.load_reports(ROOT)["tinylm"]
    drawn = {run.name: plot.compare(report.records, run, report.reference)[0]
             for run in report.runs}  # fmt: skip
    assert [drawn[f"run_{i}"] for i in range(2, 11)] == words_of


# ---- the run that is compared to --------------------------------------------------------------


@pytest.fixture()
def second(toy, toy_run: Path, tmp_path: Path) -> tuple[Run, dict]:
    """A run_2 like the toy's run_1, and its config.json; run_1 stands beside it."""
    shutil.copytree(toy_run, tmp_path / "run_1")
    config = json.loads((toy_run / "config.json").read_text())
    settings = settings_of(toy, "run_2")
    return Run(settings, None, out_dir=tmp_path / "run_2", runs=tmp_path), config


SEEDS = {"seed": [0.0], PRIMARY: [0.5], "l0": [4.0]}


def test_a_missing_or_unlike_reference_is_told_at_the_start(second, capsys) -> None:
    run, config = second
    check_references(run, config)
    assert capsys.readouterr().out == ""
    assert "1 seeds shared with run_1" in said_of(run, config, SEEDS)[0]
    check_references(run, changed(config, layers=[1]))
    assert capsys.readouterr().out == (
        "no verdict to come: not comparable with run_1 (layers 1 against 0, 2)\n"
    )
    shutil.rmtree(run.runs / "run_1")
    check_references(run, config)
    said = capsys.readouterr().out
    assert said == f"no verdict to come: there is no complete run_1 in {run.runs}\n"
    assert said_of(run, config, SEEDS)[0] == "not comparable (no complete run_1)"


@pytest.mark.parametrize("name, content", [
    ("final_info.json", '{"layer_0": {"means"'), ("final_info.json", "[]"),
    ("final_info.json", '{"verdict": {}}'), ("config.json", None), ("config.json", "{}"),
    ("final_info.json", '{"verdict": {"final_info_dict": {"seed": [0], "primary": [], "l0": []}}}'),
    ("final_info.json",
     '{"verdict": {"final_info_dict": {"seed": [0], "primary": [NaN], "l0": [4]}}}'),
])  # fmt: skip
def test_a_damaged_reference_ends_the_start_and_not_the_run(second, name, content) -> None:
    run, config = second
    path = run.runs / "run_1" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ExperimentError, match=f"compare_to='run_1' needs .*run_1/{name}"):
        check_references(run, config)
    assert said_of(run, config, SEEDS)[0].startswith(f"not comparable ({path} ")


def test_a_run_is_compared_to_itself_set_aside(second) -> None:
    run, config = second
    again = dataclasses.replace(run, out_dir=run.runs / "run_1")
    for number in (1, 2, 10):  # run_1.10 is the last
        shutil.copytree(run.runs / "run_1", run.runs / f"run_1.{number}")
    (run.runs / "run_1" / "final_info.json").unlink()
    sentence, _ = said_of(again, config, SEEDS)
    assert "1 seeds shared with run_1.10" in sentence
    itself = dataclasses.replace(again.settings, constants_from_run="run_1")
    assert dataclasses.replace(again, settings=itself).constants(("gamma",))
    for path in run.runs.glob("run_1.*"):
        shutil.rmtree(path)
    assert said_of(again, config, SEEDS)[0] == "not comparable (no complete run_1)"


def test_constants_are_taken_from_a_run_like_this_one(second, capsys) -> None:
    run, config = second
    run = dataclasses.replace(
        run, settings=dataclasses.replace(run.settings, constants_from_run="run_1")
    )
    check_references(run, config)
    check_references(run, changed(config, probe_train=20, layers=[2], k_min=2))  # their own matter
    assert final_values(run.runs / "run_1", [(2, 0)], ["gamma"])
    check_references(run, config | {"content": {}})
    assert "run_1 may not be a run like this one: not both record lang" in capsys.readouterr().out
    for change, words_said in (
        (dict(context=16), "differs in context 16 against 32"),
        (dict(model="other"), "differs in language model other"),
        (dict(training_text="other"), "differs in training_text other against toy"),
    ):
        other = changed(config, **change)
        if "model" in change:
            other |= {"content": other["content"] | {"model": "of other weights"}}
        with pytest.raises(ExperimentError, match=f"constants_from_run='run_1' .*{words_said}"):
            check_references(run, other)


def test_the_command_names_what_is_unlike_first_and_last(
    toy, toy_run, tmp_path, monkeypatch, capsys
) -> None:
    """At the start, in the verdict, and in final_info.json; what is damaged ends it there."""
    shutil.copytree(toy_run, tmp_path / "run_1")
    plan = dict(layers=(2,), probe_train=20, seeds=(0,))
    monkeypatch.setitem(toy.PLAN, "run_2", plan)
    assert run_command(toy, tmp_path / "run_2") == 0
    said = capsys.readouterr().out
    reasons = "(layers 2 against 0, 2; probe_train 20 against 40)"
    assert said.index(f"not comparable with run_1 {reasons}") < said.index("rehearsal: ")
    assert said.splitlines()[-1] == f"verdict: not comparable {reasons}"
    info = json.loads((tmp_path / "run_2" / "final_info.json").read_text())
    assert "difference" not in info["verdict"]["means"]
    (tmp_path / "run_1" / "final_info.json").write_text("{")
    assert run_command(toy, tmp_path / "run_3") == 1
    captured = capsys.readouterr()
    assert "rehearsal" not in captured.out
    assert "run_1/final_info.json can't be read" in words(captured.err)["cause"]


def test_a_setting_that_the_committed_records_lack_was_what_its_default_is() -> None:
    """Or each verdict against them would name it."""
    import experiment

    record = json.loads((ROOT / "run_1" / "config.json").read_text())["settings"]
    lacking = {field.name for field in dataclasses.fields(experiment.Settings)}
    lacking -= set(with_current_names(record))
    assert lacking <= {*BEFORE, *ASIDE}, lacking
    for name in lacking & {*BEFORE}:
        assert BEFORE[name] == getattr(experiment.Settings(), name)
