"""How work is spread over a machine."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from harness.machine import choose_train_dtype, in_threads, n_cores
from tests.conftest import ROOT, replace, settings_of


def test_threads_take_the_parts_of_a_key_in_order_with_a_share_of_the_cores() -> None:
    torch.set_num_threads(2)
    seen: dict[str, list] = {"a": [], "b": [], "c": []}

    def work(key: str, part: int) -> tuple[str, int]:
        seen[key].append((part, torch.get_num_threads()))
        return key, part

    results = list(in_threads(work, ["a", "b", "c"], [0, 1, 2, 3], torch.device("cpu")))
    assert all(result == (key, part) for key, part, result in results)
    assert sorted(results) == [(k, p, (k, p)) for k in "abc" for p in range(4)]
    assert all(calls == [(part, 1) for part in range(4)] for calls in seen.values())
    assert torch.get_num_threads() == 2

    def broken(key: str, part: int) -> None:
        if (key, part) == ("b", 1):
            raise RuntimeError("step failed")

    with pytest.raises(RuntimeError, match="step failed"):
        list(in_threads(broken, ["a", "b", "c"], [0, 1, 2, 3], torch.device("cpu")))
    assert torch.get_num_threads() == 2


def test_a_machine_that_does_not_say_which_cores_are_free_gives_all(monkeypatch) -> None:
    """As macOS."""
    assert n_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert n_cores() == os.cpu_count()


def test_windows_itself_is_one_sentence() -> None:
    code = "import sys; sys.platform = 'win32'; import harness.start"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "experiment.py needs Linux or macOS: on Windows, run it in WSL\n"


def test_an_error_does_not_wait_for_calls_that_never_return(monkeypatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr("harness.machine.LONGEST_CALL", 0.1)
    go_on = threading.Event()

    def work(key: str, part: int) -> None:
        if key == "a":
            raise RuntimeError("step failed")
        go_on.wait(30)

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="step failed"):
        list(in_threads(work, ["a", "b"], [0], torch.device("cpu")))
    assert time.monotonic() - began < 10
    go_on.set()


def test_train_dtype_is_what_the_hardware_multiplies(toy, monkeypatch) -> None:
    settings = settings_of(toy, "run_1")
    amx = {"avx512_bf16": True, "amx_bf16": True}
    for name, capabilities, expected in (
        ("AMD EPYC", {"avx512_bf16": True}, "bfloat16"),
        ("AMD EPYC", {}, "float32"),
        ("Intel(R) Xeon(R) Processor", {"avx512_bf16": True}, "float32"),
        ("Intel(R) Xeon(R) Processor", amx, "bfloat16"),
    ):
        replace(monkeypatch, "processor_name", lambda name=name: name)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert choose_train_dtype(settings, torch.device("cpu")) == expected
    forced = dataclasses.replace(settings, train_dtype="bfloat16")
    assert choose_train_dtype(forced, torch.device("cpu")) == "bfloat16"
