"""One attempt at the command: its folder, its lock, its signals, its last words."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from harness.command import RunLock, main
from harness.console import STAGE, redirect_output
from harness.errors import LAST_WORDS, error_context
from harness.startup import memory_settings
from tests.conftest import ROOT, run_command


def run_expecting_failure(toy, capfd, out_dir: Path, *arguments: str) -> str:
    """The cause that a run names which must fail."""
    assert run_command(toy, out_dir, *arguments) == 1
    return words(capfd.readouterr().err)["cause"]


def words(error: str) -> dict[str, str]:
    """The last words on standard error: failed during, at, cause, to do and log."""
    assert "Traceback" not in error and len(error) <= LAST_WORDS
    first, *lines = error.strip().splitlines()
    assert first.startswith("experiment.py failed during "), error
    return {"during": first.removeprefix("experiment.py failed during ")} | dict(
        line.split(": ", 1) for line in lines
    )


def test_unknown_argument_and_missing_out_dir(toy, tmp_path: Path, capfd) -> None:
    says = run_expecting_failure(toy, capfd, tmp_path / "run_1", "--lr=1")
    assert "--lr=1" in says and "no other argument" in says
    assert main(lambda out_dir, log: None, []) == 1
    assert "--out_dir" in capfd.readouterr().err


def test_the_real_command_in_a_subprocess(tmp_path: Path) -> None:
    """As a driver runs it: standard error in a pipe, its end read."""
    result = subprocess.run(
        [sys.executable, "experiment.py", "--out_dir", str(tmp_path / "run_1"), "extra"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 1 and result.stdout == ""
    assert words(result.stderr)["cause"] == (
        "unrecognized arguments: extra; "
        "the command is `python experiment.py --out_dir=run_i`, no other argument"
    )


def test_sys_exit_in_the_middle_is_a_failure(tmp_path: Path, own_cache: Path, capsys) -> None:
    assert main(lambda out_dir, log: exit(0), [f"--out_dir={tmp_path / 'run_1'}"]) == 1
    assert "SystemExit" in words(capsys.readouterr().err)["cause"]
    with pytest.raises(SystemExit):
        main(lambda out_dir, log: None, ["--help"])


def test_out_dir_that_cannot_be_written(toy, tmp_path: Path, capfd) -> None:
    (tmp_path / "file").write_text("mine")
    says = run_expecting_failure(toy, capfd, tmp_path / "file" / "run_1")
    assert "must be a folder that can be written" in says
    says = run_expecting_failure(toy, capfd, tmp_path / "file")
    assert "must be a folder that can be written" in says
    assert (tmp_path / "file").read_text() == "mine"


def test_folders_that_are_no_run_s_are_left_alone(toy, tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    cases = {
        tmp_path: "holds other files",
        ROOT / "tinylm": "holds other files",
        ROOT / "run_0": "the given baseline",
        ROOT: "of the run's own",
    }
    for folder, says in cases.items():
        assert run_command(toy, folder) == 1
        assert says in words(capsys.readouterr().err)["cause"]


def test_a_failure_loses_nothing_that_existed(toy, tmp_path: Path, monkeypatch, capfd) -> None:
    out_dir = tmp_path / "run_3"
    out_dir.mkdir()
    (out_dir / "final_info.json").write_text("{}")
    monkeypatch.setitem(toy.PLAN, "run_3", {"k_min": -1})
    run_expecting_failure(toy, capfd, out_dir)
    assert (out_dir / "final_info.json").read_text() == "{}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_in_a_finalizer_ends_the_run(
    tmp_path: Path, monkeypatch, capfd, number: signal.Signals
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    # A worker of the tests has a handler of its own.
    stock = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Dying:
        def __del__(self) -> None:  # what is raised in here, Python prints and forgets
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    def run(out_dir: Path, log: Path) -> None:
        thing = Dying()
        del thing
        time.sleep(20)

    began = time.monotonic()
    try:
        assert main(run, [f"--out_dir={tmp_path / 'run_x'}"]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, stock)
    assert time.monotonic() - began < 10
    assert f"({number.name})" in capfd.readouterr().err


def test_the_next_start_tells_of_a_death_without_a_word(
    tmp_path: Path, own_cache: Path, monkeypatch, capsys
) -> None:
    """Read from what a killed process leaves: the record of its attempt as it last stood."""
    out_dir, log = tmp_path / "run_1", tmp_path / "log"

    def dies() -> None:
        lock = RunLock(out_dir, log)
        STAGE.begin("core evaluation")
        record = json.loads(lock.path.read_text())
        assert record["stage"] == "core evaluation" and record["memory_gb"] > 0.05
        lock.released.set()  # no heartbeat any more
        lock.lock.release()
        record |= {"machine_gb": 15.5, "total_gb": 16.0, "seconds": 312.0}
        lock.path.write_text(json.dumps(record))

    dies()
    dies()
    argv = [f"--out_dir={out_dir}"]
    assert main(lambda out_dir, log: None, argv, memory_settings=memory_settings) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the last attempt at run_1, of ")
    assert "ended without a word, as 1 before it: killed during core evaluation, after 312" in line
    assert "the machine 15.5 of 16.0; if it was for want of memory, lower core_prompts" in line
    assert str(log) in line
    assert main(lambda out_dir, log: None, [f"--out_dir={out_dir}"]) == 0
    assert capsys.readouterr().err == ""


def test_last_words_fit_whatever_was_said_before(tmp_path: Path, own_cache, capfd) -> None:
    def noisy(out_dir: Path, log: Path) -> None:
        with redirect_output(log):
            for n in range(1000):
                os.write(2, b"\rLoading checkpoint shards: %d" % n)
        with error_context("layer 7"), error_context("tinylm/B/subject"):
            raise ValueError("beginning " + 5000 * "noise\n" + " the end; hf_abcdefghijk")

    assert main(noisy, [f"--out_dir={tmp_path / 'run_1'}"]) == 1
    error = capfd.readouterr().err
    assert len(error) <= 1500 and "Loading" not in error and "hf_a" not in error
    said = words(error)
    assert said["during"] == "start-up (layer 7, tinylm/B/subject)"
    assert said["cause"].startswith("ValueError: beginning noise")
    assert said["cause"].endswith("the end; [token]")
    assert "Loading checkpoint shards: 999" in Path(said["log"]).read_text()


def test_an_unexpected_error_names_itself_and_its_log(toy, tmp_path: Path, monkeypatch, capfd):
    def breaks(*_: object) -> None:
        raise RuntimeError("the edit was wrong")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(toy, "train", breaks)
    assert run_command(toy, tmp_path / "run_1") == 1
    said = words(capfd.readouterr().err)
    assert said["during"] == "rehearsal: train"
    assert re.match(r"experiment.py, line \d+, in main: .* in breaks$", said["at"])
    assert said["cause"] == "RuntimeError: the edit was wrong"
    assert said["to do"].startswith("mend it, and give the same command again")
    assert "in breaks" in Path(said["log"]).read_text()
    assert not (tmp_path / "run_1").exists()


@pytest.mark.parametrize(
    ("stage", "setting"),
    [("train", "harvest_contexts"), ("core evaluation", "core_prompts"), ("start-up", "d_sae")],
)
def test_out_of_memory_names_the_setting_to_lower(
    tmp_path: Path, monkeypatch, capsys, stage, setting
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(out_dir: Path, log: Path) -> None:
        STAGE.begin(stage)
        torch.empty(2**50)

    argv = [f"--out_dir={tmp_path / 'run_1'}"]
    assert main(run, argv, memory_settings=memory_settings) == 1
    said = words(capsys.readouterr().err)
    assert said["during"] == stage and "out of memory" in said["cause"]
    assert setting in said["to do"]


def test_nobody_listens(tmp_path: Path, own_cache: Path) -> None:
    """`python experiment.py … | head -1` ends in last words, or goes on; never in silence."""
    code = """if True:
        import sys
        from harness.command import main
        from harness.console import print_line, redirect_output
        def run(out_dir, log):
            with redirect_output(log):
                print_line("x" * 100000)
                raise ValueError("the cause")
        sys.exit(main(run, ["--out_dir=run_x"]))"""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=write,
                          stderr=subprocess.PIPE, text=True)  # fmt: skip
    os.close(write)
    assert words(done.stderr.split("Exception ignored")[0])["cause"] == "ValueError: the cause"
