"""Better or worse: the word, the figures, and what is compared with what."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from harness.records import read_reference
from harness.startup import Run
from harness.verdict import PRIMARY, verdict
from tests.conftest import settings_of


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
        (of([0.80, 0.81, 0.82]), None, "not comparable (no complete run_1 of this profile and"),
    ],
)
def test_verdict(run, reference, word) -> None:
    sentence, numbers = verdict(run, reference, "run_1")
    assert sentence.startswith(word)
    assert all(math.isfinite(value) for value in numbers.values())
    assert numbers[PRIMARY] == pytest.approx(sum(run[PRIMARY]) / len(run[PRIMARY]))


def test_verdict_interval_worked_out_by_hand() -> None:
    """Differences 0.10, 0.10, 0.09: mean 0.0966667, sd 0.0057735, t(0.975, 2) = 4.3027."""
    _, numbers = verdict(of([0.80, 0.81, 0.82]), of([0.70, 0.71, 0.73]), "run_1")
    half = 4.302653 * 0.00577350 / math.sqrt(3)
    assert numbers["difference"] == pytest.approx(0.0966667, abs=1e-6)
    assert numbers["ci95_low"] == pytest.approx(0.0966667 - half, abs=1e-6)
    assert numbers["ci95_high"] == pytest.approx(0.0966667 + half, abs=1e-6)


def test_verdict_reads_only_runs_of_the_same_profile_and_task_set(toy, toy_run: Path) -> None:
    settings, runs = settings_of(toy, "run_2"), toy_run.parent
    run = Run(settings, None, out_dir=runs / "run_2", runs=runs)
    found = read_reference(run)
    assert found["seed"] == [0.0] and len(found[PRIMARY]) == 1
    assert read_reference(dataclasses.replace(run, profile="gemma-2-2b")) is None
    assert read_reference(dataclasses.replace(run, out_dir=toy_run)) is None  # itself
    other = dataclasses.replace(settings, probe_sets=("toy/halves",))
    assert read_reference(dataclasses.replace(run, settings=other)) is None
