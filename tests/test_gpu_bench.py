"""bench/gpu.py at toy size, on a CPU where there is no GPU: its rows, its ratios, its verdicts."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench import gpu, speed
from harness.machine import processor_name
from tests.conftest import replace

COLUMNS = ["measurement", "ours", "best other", "ratio", "aim", "result"]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def no_lasting_changes(monkeypatch: pytest.MonkeyPatch):
    replace(monkeypatch, "make_reproducible", lambda: None)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def bench(tmp_path: Path) -> gpu.Bench:
    return gpu.Bench(DEVICE, gpu.TOY, tmp_path, time.monotonic() + 600)


def rows_in(output: str) -> list[dict[str, str]]:
    """The rows of the only table in what was printed, and it begins with the table."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    assert output.startswith("\n".join(lines) + "\n\n")
    head, rule, *rest = ([c.strip() for c in line.strip("|").split(" | ")] for line in lines)
    assert head == COLUMNS and set(rule) == {"---"}
    return [dict(zip(head, cells, strict=True)) for cells in rest]


def test_the_command_measures_every_row(capsys: pytest.CaptureFixture) -> None:
    assert gpu.main(["--toy"]) == 0
    out, err = capsys.readouterr()
    rows = {row["measurement"]: row for row in rows_in(out)}
    assert [name.split(",")[0] for name in rows] == [
        "train step 32 → 64", "train step 32 → 64", "train step 32 → 128", "train step 32 → 256",
        "SAEs of 3 layers together", "SAEs of 5 seeds together",
        "relative difference of the weights after 20 steps as a graph", "harvest of layers 0",
        "its share of the bfloat16 peak", "core evaluation of six SAEs",
        "sparse probing of a set", "a default gemma-2-2b run",
    ]  # fmt: skip
    assert [row["aim"].removeprefix("at least ") for row in rows.values()] == [
        "2.5", "2", "2", "2", "1", "1", "at most 0", "1.4", "0.6", "3", "4", "at most 15 minutes"
    ]  # fmt: skip
    assert not any(row["ours"].startswith("not measured") for row in rows.values()), err
    for name, row in rows.items():
        if row["aim"].startswith("at most"):
            assert row["ratio"] == row["best other"] == "–"
        elif name.startswith("core evaluation"):  # what stands beside it is of another size
            assert row["ratio"] == "–" and "12632 tokens/s" in row["best other"]
        else:
            met = float(row["ratio"]) >= float(row["aim"].removeprefix("at least "))
            assert row["result"] == ("met" if met else "short"), row
    different = rows[next(name for name in rows if name.startswith("relative"))]
    if not GPU:
        assert different["ours"] == "0; no graph was taken: no GPU"
        assert different["result"] == "not measured"
    assert "SAELens" in rows[next(iter(rows))]["best other"]
    compared = rows["sparse probing of a set, 24 / 12 texts, of six SAEs and the language model"]
    assert "18 figures differ by at most" in compared["ours"]  # best 1, 2 and 5 of both, by layer
    assert compared["best other"].endswith("(stock SAE-Bench)")
    paragraph = out.strip().splitlines()[-1]
    assert "Toy sizes" in paragraph and "torch" in paragraph and "Left out: " in paragraph
    assert GPU or processor_name() in paragraph
    assert all(name in err for name in rows)


def test_without_time_every_row_says_so(capsys: pytest.CaptureFixture) -> None:
    assert gpu.main(["--toy", "--minutes", "0"]) == 0
    rows = rows_in(capsys.readouterr().out)
    assert Counter(row["ours"] for row in rows) == {
        "not measured, out of time": 11,
        "not measured, without harvest, SAE steps, core evaluation, sparse probing": 1,
    }
    assert {row["result"] for row in rows} == {"not measured"}


def test_a_section_that_fails_is_a_row_and_the_others_go_on(monkeypatch, capsys) -> None:
    def fail(bench: gpu.Bench) -> None:
        raise ValueError("no | memory\nis left")

    sections = gpu.sections
    monkeypatch.setattr(gpu, "together", fail)
    monkeypatch.setattr(gpu, "sections", lambda bench: sections(bench)[4:6])
    assert gpu.main(["--toy"]) == 0
    out, err = capsys.readouterr()
    *failed, graph = rows_in(out)
    assert [row["ours"] for row in failed] == ["not measured, ValueError: no / memory"] * 2
    assert {row["result"] for row in failed} == {"not measured"}
    assert not graph["ours"].startswith("not measured") and "Traceback" in err


def test_a_section_ends_when_the_time_is_over(bench: gpu.Bench) -> None:
    def forever(bench: gpu.Bench) -> list[gpu.Found]:
        while True:
            time.sleep(0.01)

    bench.ends = time.monotonic() + 0.2
    section = gpu.Section((gpu.Goal("endless", 1.0),), forever)
    assert gpu.rows_of(section, bench)[0]["ours"] == "not measured, out of time"
    assert time.monotonic() < bench.ends + 5
    still = gpu.Section(section.goals, lambda bench: [gpu.Found("x", "y", 2.0)], limited=False)
    assert gpu.rows_of(still, bench)[0]["result"] == "met"


def test_ratios_are_the_right_way_round() -> None:
    """Above 1 this project is faster."""
    assert gpu.times_as_fast(2.0, 5.0) == 2.5
    found = gpu.against_best({"a": 50.0, "ours": 200.0, "b": 80.0}, "ours")
    assert found == ("200 tokens/s", "80 tokens/s (b)", pytest.approx(2.5))
    assert gpu.against_best({"ours": 200.0}, "ours") == ("200 tokens/s", "none is installed", None)


@pytest.mark.parametrize("at_most, value, result", [
    (False, 2.5, "met"), (False, 2.49, "short"), (False, None, "not measured"),
    (True, 2.5, "met"), (True, 2.51, "short"), (True, math.inf, "short"), (True, math.nan, "short"),
])  # fmt: skip
def test_verdicts(at_most: bool, value: float | None, result: str) -> None:
    goal = gpu.Goal("a", 2.5, at_most)
    assert gpu.verdict(value, goal) == result
    row = gpu.row(goal, gpu.Found("x", "y", value))
    assert [*row] == COLUMNS and row["result"] == result
    assert row["ratio"] is (None if at_most else value)


def test_ours_have_their_graphs_before_they_are_measured(monkeypatch, bench: gpu.Bench) -> None:
    """`before` steps and one call, as a peer's; then a call counts the tokens of n steps."""
    clock, taken = [0.0], Counter()
    monkeypatch.setattr(speed, "now", lambda device: clock[0])

    def contender(name: str, seconds: float) -> gpu.Contender:
        def call() -> float:
            clock[0] += seconds
            taken[name] += 1
            return 10.0

        return gpu.Contender(name, lambda: call)

    contenders = [contender(gpu.OURS, 2.0), contender("peer", 5.0)]
    rates = gpu.rates_of_steps(contenders, 4, bench)
    assert rates == {gpu.OURS: pytest.approx(5.0), "peer": pytest.approx(2.0)}
    assert taken == {gpu.OURS: gpu.TOY.before + 12, "peer": 12}


def test_peers_that_fail_are_left_out_and_named(bench: gpu.Bench) -> None:
    def gone() -> gpu.Call:
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")

    def fails() -> float:
        raise RuntimeError("no memory\nis left")

    contenders = [
        gpu.Contender(name, start)
        for name, start in (
            (gpu.OURS, gone), ("gone", gone), ("large", lambda: fails), ("there", lambda: int),
        )
    ]  # fmt: skip
    kept = gpu.usable(contenders, bench, "2 → 4")
    assert [contender.name for contender in kept] == [gpu.OURS, "there"]
    assert bench.left_out == {"gone": "no module elsewhere", "large at 2 → 4": "no memory"}
    paragraph = gpu.circumstances(bench)
    assert "Left out: gone (no module elsewhere); large at 2 → 4 (no memory)." in paragraph


def test_steps_that_are_compared_bring_dead_features_back(bench: gpu.Bench) -> None:
    settings = gpu.step_settings(*gpu.TOY.shapes[0][:4])
    settings = dataclasses.replace(settings, dead_feature_window=64, lr=1e-3, resample_every=2)
    x_NBD = gpu.random_activations(gpu.TOY.shapes[0], DEVICE)
    sae, why_not = gpu.trained(settings, x_NBD, 10, capture=False)
    again, _ = gpu.trained(settings, x_NBD, 10, capture=False)
    assert why_not == ("not asked for" if not GPU else why_not)
    assert gpu.relative_difference(again, sae) == 0
    again.W_dec.data *= 1.5
    assert gpu.relative_difference(again, sae) == pytest.approx(0.5)
    again.b_dec.data[0] = math.nan
    assert math.isnan(gpu.relative_difference(again, sae))
    with pytest.raises(RuntimeError, match="dead features"):
        gpu.trained(dataclasses.replace(settings, resample=False), x_NBD, 10, capture=False)


def test_a_runs_minutes_are_its_work_by_its_rates(bench: gpu.Bench) -> None:
    settings = dataclasses.replace(
        bench.settings, training_tokens=6_000, layers=(1, 2, 3), seeds=(0, 1), context=10,
        core_prompts=2, core_reconstruction_batches=4, core_sparsity_batches=26,
    )  # fmt: skip
    rates = {"harvest": 10, "SAE steps": 20, "core evaluation": 5, "sparse probing": 0.1}
    assert gpu.minutes_of_run(rates, settings, 36) == {
        "harvest": pytest.approx(10), "SAE steps": pytest.approx(30),
        "core evaluation": pytest.approx(2), "sparse probing": pytest.approx(6),
    }  # fmt: skip
    bench.rates |= {"harvest": 1.0, "SAE steps": 1.0}
    (found,) = gpu.default_run(bench)
    assert found == ("not measured, without core evaluation, sparse probing", None, None)


def test_the_estimate_is_of_all_the_profiles_sets(bench: gpu.Bench) -> None:
    bench.rates |= {"harvest": 1e9, "SAE steps": 1e9, "core evaluation": 1e9, "sparse probing": 0.1}
    (found,) = gpu.default_run(bench)
    assert found.value == pytest.approx(36 * 10 / 60, rel=0.05)  # 36 classes in eight sets


def test_figures_are_compared_by_name() -> None:
    ours = {"a": {"l0": 15.0, "fvu": 0.2}, "b": {"l0": 1.0}}
    assert gpu.compared_figures(ours, {"a": {"fvu": 0.25}}) == (1, pytest.approx(0.05))
    assert gpu.compared_figures(ours, {"a": {"l0": 15.0}, "b": {"l0": 1.0}}) == (2, 0.0)


def test_stock_is_measured_on_as_many_layers_as_there_is_time_for(monkeypatch, bench) -> None:
    """At least on one; the figures are those of the second call for a layer."""
    from sae_bench.evals.sparse_probing import main as stock

    calls = []

    def called(config, sae, model, device: str, artifacts: str, save: bool) -> tuple[dict, dict]:
        calls.append((sae.cfg.hook_layer, artifacts))
        figures = {"sae_top_1_test_accuracy": float(len(calls)), "sae_test_accuracy": 0.5}
        return figures | {"llm_top_1_test_accuracy": 0.25, "set": {}}, {}

    monkeypatch.setattr(stock, "run_eval_single_sae", called)
    path = gpu.write_probe_set(bench.folder / "set.jsonl", bench.settings, 500)
    settings = dataclasses.replace(bench.settings, probe_sets=(str(path),))
    load, bench.model = torch.load, None
    seconds, figures = gpu.stock_probing(bench, settings)
    assert [*seconds] == [0, 1, 2] and [layer for layer, _ in calls] == [0, 0, 1, 1, 2, 2]
    assert len({artifacts for _, artifacts in calls}) == 3
    assert figures["layer_1_seed_0_untrained"] == {
        "sae_top_1_test_accuracy": 4.0, "llm_top_1_test_accuracy": 0.25
    }  # fmt: skip
    bench.ends = 0.0
    seconds, figures = gpu.stock_probing(bench, settings)
    assert [*seconds] == [0] and [*figures] == ["layer_0_seed_0_untrained"]
    assert torch.load is load


def test_stocks_time_on_some_layers_is_multiplied(monkeypatch, bench: gpu.Bench) -> None:
    figures = {"a": {"sae_top_1_test_accuracy": 0.5}}
    monkeypatch.setattr(gpu, "our_probing", lambda *given: (2.0, figures))
    monkeypatch.setattr(gpu, "stock_probing", lambda *given: ({0: 3.0}, figures))
    (found,) = gpu.probing(bench)
    assert found.value == pytest.approx(3 * 3.0 / 2.0)
    assert found.ours == "2 s; 1 figures differ by at most 0"
    assert found.other == "9 s (stock SAE-Bench, measured on 1 of 3 layers and multiplied)"
    assert bench.rates["sparse probing"] == 1.0  # of two classes in two seconds


def test_probing_texts_fill_a_context_and_differ(bench: gpu.Bench, tmp_path: Path) -> None:
    settings = bench.settings
    path = gpu.write_probe_set(tmp_path / "set.jsonl", settings, vocab_size=500)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    n = (settings.probe_train + settings.probe_test) // 2
    assert Counter(row["label"] for row in rows) == {"0": n, "1": n}
    tokens = [[*map(int, row["text"].split())] for row in rows]
    assert {len(some) for some in tokens} == {settings.context - 1}
    assert all(gpu.BOS < token < 500 for some in tokens for token in some)
    assert len({tuple(some) for some in tokens}) == 2 * n


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        gpu.main([])
