"""What a user reads, and what goes into the log."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from harness.console import STAGE, Progress, print_line, redirect_output, rehearsal


def test_progress_in_a_pipe_is_plain_lines(capsys) -> None:
    progress = Progress("stage", 100, "tokens", every=0.0)
    progress.advance(50, "fvu 0.5")
    progress.close()
    out = capsys.readouterr().out
    assert re.fullmatch(r"stage:  50%, \d+ s left, fvu 0\.5\nstage: done in \d+ s, fvu 0\.5\n", out)


def test_progress_is_shown_while_libraries_are_quiet(tmp_path: Path, capfd) -> None:
    log = tmp_path / "log"
    log.touch()
    with redirect_output(log):
        progress = Progress("stage", 10, "batches", every=0.0)
        print("noise")
        progress.advance(4, "halfway")
        progress.close()
    out = capfd.readouterr().out
    assert "stage:  40%" in out and "halfway" in out and "noise" not in out
    assert "noise" in log.read_text() and "stage" not in log.read_text()


def test_quiet_catches_python_and_c_output(tmp_path: Path, capfd) -> None:
    log = tmp_path / "log"
    with redirect_output(log):
        print("from python")
        os.write(2, b"from c\n")
        print("an error", file=sys.stderr)
    print("after")
    captured = capfd.readouterr()
    assert captured.out == "after\n" and captured.err == ""
    assert {"from python", "from c", "an error"} <= set(log.read_text().splitlines())


def test_a_rehearsal_is_read_in_the_log_alone_and_named_where_it_fails(
    tmp_path: Path, monkeypatch, capfd
) -> None:
    log, heard = tmp_path / "log", []
    monkeypatch.setattr(STAGE, "name", "start-up")
    monkeypatch.setattr(STAGE, "listener", lambda: heard.append(STAGE.name))
    with rehearsal(log):
        STAGE.begin("train")
        with redirect_output(log), Progress("core", 2, "batches", every=0.0) as progress:
            progress.advance(1)
        print_line("a line")
    assert capfd.readouterr().out == "" and STAGE.name == "start-up"
    assert re.fullmatch(r"core:  50%.*\ncore: done in 0 s\na line\n", log.read_text())
    with pytest.raises(ValueError), rehearsal(log):
        STAGE.begin("train")
        raise ValueError
    assert STAGE.name == "rehearsal: train"
    STAGE.begin("train")
    assert heard == ["rehearsal: train", "rehearsal: core", "rehearsal: train", "train"]
    print_line("shown")
    assert capfd.readouterr().out == "shown\n"
