"""bench/speed.py at toy size: its tables, its ratios, and the states that its steps are taken in.

Peers that are not installed (bench/peers.txt) are rows that say so.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from bench import loop, speed
from harness.machine import processor_name
from harness.text import documents, passages
from tests.conftest import replace, settings_of, weights_of

CPU = torch.device("cpu")
TINY = dataclasses.replace(
    speed.TINY, rounds=1, shapes=((32, 64, 4, 1),), batch=128, peak=64, tokens=512, lengths=(512,),
    evaluation=dict(probe_sets=("toy/halves",), probe_ks=(1, 2, 5), core_sparsity_batches=2),
)  # fmt: skip


def rows_of(section: str, sizes: speed.Sizes = TINY) -> list[speed.Row]:
    return [row for _, measure in speed.SECTIONS[section](sizes, CPU) for row in measure()]


def names(rows: list[speed.Row]) -> list[str]:
    return [row["contender"].partition(":")[0] for row in rows]


def check_rates(rows: list[speed.Row], column: str, base: str) -> None:
    """Every row that was measured has a rate, and the ratio that belongs to it."""
    rates = {row["contender"]: row["tokens/s"] for row in rows if "tokens/s" in row}
    assert base in rates
    for row in rows:
        if "tokens/s" in row:
            assert row[column] == pytest.approx(rates[base] / row["tokens/s"])
        else:
            assert "not measured, no module" in row["contender"]
            assert "bench/peers.txt" in row["contender"]


@pytest.fixture()
def short_texts(toy, monkeypatch: pytest.MonkeyPatch):
    """The toy's training text in passages, as tinylm's is."""
    texts = passages("".join(documents("toy", "train")()))
    replace(monkeypatch, "documents", lambda name, split: lambda: iter(texts))


@pytest.fixture(autouse=True)
def no_lasting_changes(monkeypatch: pytest.MonkeyPatch):
    replace(monkeypatch, "make_reproducible", lambda: None)
    yield
    torch.use_deterministic_algorithms(False)


def test_turns_alternate_and_medians_and_ratios_are_right(monkeypatch) -> None:
    """Seconds per token of each turn's calls after the warm-up; a missing peer is a row."""
    tries, order = itertools.count(), []
    ticks = {speed.OURS: [9, 9, 9, 9, 1, 2, 9, 3, 6], "peer": [9, 9, 9, 9, 8, 8, 9, 2, 8]}
    time = [0.0]
    monkeypatch.setattr(speed, "now", lambda device: time[0])

    def contender(name: str) -> speed.Contender:
        left = iter(ticks[name])

        def call() -> float:
            order.append((name, torch.are_deterministic_algorithms_enabled()))
            time[0] += next(left)
            return 2.0

        return speed.Contender(name, lambda: call, {"k": 3})

    def missing() -> speed.Call:
        next(tries)
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")

    contenders = [contender(speed.OURS), speed.Contender("gone", missing), contender("peer")]
    rows = speed.alternate(
        contenders, CPU, rounds=2, calls=2, warmup_calls=1, warmup_rounds=1
    )
    assert order == ([(speed.OURS, True)] * 3 + [("peer", False)] * 3) * 3
    assert next(tries) == 1  # tried once
    rows = speed.with_ratios(rows, "times ours", speed.OURS)
    seconds = {name: statistics.median(x / 2 for x in t if x < 9) for name, t in ticks.items()}
    assert [row["tokens/s"] for row in rows if "tokens/s" in row] == pytest.approx(
        [1 / seconds[speed.OURS], 1 / seconds["peer"]]
    )
    assert rows[0]["times ours"] == 1
    assert rows[2]["times ours"] == pytest.approx(seconds["peer"] / seconds[speed.OURS])
    assert rows[2]["spread"] == pytest.approx((4 - 1) / 4)
    assert rows[1]["contender"] == f"gone: not measured, no module elsewhere; {speed.INSTALL}"
    lines = speed.table(rows).splitlines()
    assert lines[0] == "| contender | k | tokens/s | spread | times ours |"
    assert lines[3].endswith("| – | – | – | – |")
    assert {line.count("|") for line in lines} == {6}


@pytest.mark.parametrize("autocast", [False, True])
def test_states_have_the_l0_that_is_promised(autocast: bool) -> None:
    """So they have after steps were taken, and SAEs are sparse as at those points of training."""
    settings = speed.step_settings(256, 512, 16, 1024)
    x_NBD = torch.randn(2, 1024, 256, generator=torch.Generator().manual_seed(1))
    promised = {"start": 256, "middle": math.sqrt(256 * 17.6), "end": 17.6}
    k = {"start": 32, "middle": 23, "end": 16}
    for name in speed.PHASES:
        b_enc, columns = speed.state_of(settings, x_NBD, name)
        assert columns["active"] == pytest.approx(promised[name], rel=0.06)
        assert columns["k"] == k[name]
        assert columns["its sd"] > 0.1 * columns["active"] or name == "start"
        assert columns["L0"] == pytest.approx(k[name], rel=0.1) and columns["L0"] <= k[name]
        call = speed.our_step(settings, x_NBD, autocast, name, b_enc)
        trainer = call.__closure__[[*call.__code__.co_freevars].index("trainer")].cell_contents
        before = [weight.detach().clone() for weight in weights_of(trainer.sae)]
        assert [call() for _ in range(2)] == [1024, 1024]
        for weight, was in zip(weights_of(trainer.sae), before):
            assert torch.allclose(weight, was, atol=1e-6)


def test_step_has_a_row_per_contender() -> None:
    rows = rows_of("step")
    assert names(rows)[:3] == ["this project, start", "this project, middle", "this project, end"]
    for some, sparse in ((rows[:12], 1), (rows[12:], 0)):
        assert len(some) == 11 + sparse and names(some)[-1] == "floor"
        check_rates(some, "times ours at the end", "this project, end")
        check_rates(some, "times ours at the start", "this project, start")
        assert all(row["share of bfloat16 peak"] > 0 for row in some if "tokens/s" in row)


def test_harvest_has_a_row_per_contender(short_texts) -> None:
    rows = rows_of("harvest")
    assert len(rows) == 14
    for some in (rows[:7], rows[7:]):
        check_rates(some, "times ours", speed.OURS)
        assert names(some)[-1] == "floor"


def test_harvests_count_the_same_tokens(toy, toy_lm) -> None:
    """All of a context but BOS, once for all layers."""
    settings = settings_of(toy, "speed", "tinylm")
    tokens_NL = torch.randint(3, 300, (16, settings.context))
    tokens_NL[:, 0] = toy_lm.tokenizer.bos_token_id
    model = toy_lm.bridge()
    expected = 16 * (settings.context - 1)
    assert speed.our_harvest(toy_lm, tokens_NL, settings)() == expected
    assert speed.peers.pass_products(toy_lm, tokens_NL, settings)() == expected
    for setup in (speed.peers.transformer_lens_harvest, speed.peers.saelens_harvest):
        for together in (True, False):
            assert setup(model, tokens_NL, settings, together)() == expected


def test_training_has_a_row_per_contender(short_texts) -> None:
    rows = rows_of("training")
    assert len(rows) in (7, 14) and {row["batch"] for row in rows} == {128}
    for at in range(0, len(rows), 7):
        check_rates(rows[at : at + 7], "times ours", speed.OURS)
    assert {row["precision"] for row in rows[-7:]} == {"float32"}


def test_evaluation_finds_the_figures_of_stock_sae_bench(toy) -> None:
    rows = rows_of("evaluation")
    assert [row["SAEs"] for row in rows] == [2, 2]
    for row in rows:
        assert row["figures compared"] > 12 * row["SAEs"] and row["seconds per SAE"] > 0
        assert row["differ by at most"] <= 1e-4
    one, stock = rows
    assert stock["times ours"] == pytest.approx(stock["seconds per SAE"] / one["seconds per SAE"])


def test_differing_figures_end_the_evaluation() -> None:
    ours = {"sae": {"l0": 15.0, "fvu": 0.2}}
    assert speed.largest_difference(ours, {"sae": {"l0": 15.0}}) == (1, 0.0)
    with pytest.raises(AssertionError):
        speed.largest_difference(ours, {"sae": {"l0": 15.1}})


def test_every_edit_of_the_loop_has_its_place() -> None:
    text = (speed.ROOT / "experiment.py").read_text()
    assert all(text.count(old) == 1 for _, old, _ in loop.EDITS if old)


def test_loop_has_a_row_per_run(monkeypatch) -> None:
    runs = [("the first", 10.0, {"core": 4.0}), ("after an edit", 2.0, {"core": 0.0})]
    monkeypatch.setattr(loop, "measure", lambda: iter(runs))
    assert rows_of("loop")[1] == {
        "run": "after an edit", "seconds": 2.0, "times as fast": 5.0, "core": 0.0
    }  # fmt: skip


def test_growth_fits_exponents_and_draws_them(toy, monkeypatch, tmp_path: Path) -> None:
    assert speed.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    sizes = dataclasses.replace(speed.TINY, rounds=1)
    points = speed.growth_points(sizes)
    for point in (points[0], points[2]):
        figures = speed.growth_point(json.loads(json.dumps(point)), TINY)
        assert figures["seconds"] > 0 and ("memory, GB" in figures) == (point is points[0])
    monkeypatch.setitem(toy.PROFILES["tinylm"], "layers", (1,))
    trained = {"of": "tokens", "x": 512, "training_tokens": 512}
    assert speed.growth_point(trained, TINY)["seconds"] > 0

    def measured(point: speed.Row, sizes: speed.Sizes) -> speed.Row:
        memory = {} if point.get("phase") == "end" else {"memory, GB": 0.1 * point["x"] ** 0.5}
        return {"seconds": 2.0 * point["x"], **memory}

    monkeypatch.setattr(speed, "in_fresh_process", measured)
    rows = speed.growth_rows(sizes)
    assert len(rows) == len(points)
    lines = speed.lines_of_growth(rows)
    assert [kind for kind, _ in lines] == ["features", "features", "tokens", "layers", "seeds"]
    for (_, what), line in lines.items():
        assert line[-1]["exponent of seconds"] == pytest.approx(1)
        if what != "a step, end":
            assert line[-1]["exponent of memory, GB"] == pytest.approx(0.5)
    speed.draw_growth(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_its_table_and_resumes(tmp_path: Path, capsys, monkeypatch) -> None:
    """What the file holds is not measured again, unless the code or the sizes are others."""
    monkeypatch.setattr(speed, "TINY", TINY)
    all_of_them = speed.step_contenders
    monkeypatch.setattr(speed, "step_contenders", lambda *how: all_of_them(*how)[:3])
    out = tmp_path / "speed.jsonl"
    command = ["--tiny", "--only", "step", "--out", str(out)]
    assert speed.main(command) == 0
    first = capsys.readouterr().out
    rows = [line for line in first.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 + 3 and len({row.count("|") for row in rows}) == 1
    assert "## step" in first and processor_name() in first
    assert len(out.read_text().splitlines()) == 2
    monkeypatch.setattr(speed, "alternate", lambda *a, **k: pytest.fail("measured again"))
    assert speed.main(command) == 0
    assert capsys.readouterr().out == first
    monkeypatch.setattr(speed, "TINY", dataclasses.replace(TINY, rounds=2))
    with pytest.raises(pytest.fail.Exception):
        speed.main(command)


def test_a_section_that_does_not_exist_is_named(capsys) -> None:
    with pytest.raises(SystemExit):
        speed.main(["--only", "step,stop"])
    assert "no section stop" in capsys.readouterr().err


def test_points_can_be_chosen(capsys, monkeypatch) -> None:
    monkeypatch.setattr(speed, "TINY", TINY)
    monkeypatch.setattr(speed, "step_rows", lambda shape, autocast, *how: [{"of": autocast}])
    assert speed.main(["--tiny", "--only", "step", "--points", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "| True |" in out and "| False |" not in out
    with pytest.raises(SystemExit):
        speed.main(["--tiny", "--only", "step", "--points", "float8"])
    assert "no point of step has 'float8' in its name" in capsys.readouterr().err
