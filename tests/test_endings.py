"""How a command ends: killed, told to, crashed, cut off, or before it began."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.command import check_out_dir, main, prepared_out_dir
from harness.errors import ExperimentError
from harness.partials import remove_left, scratch_dir
from harness.provenance import write_config
from harness.ranks import RANKS
from harness.start import HERE
from harness.startup import Run
from harness.store import write_atomic, write_whole
from tests.conftest import copy_project, replace, settings_of
from tests.test_command import words

SOURCE = (HERE / "experiment.py").read_text()

# A command whose run is BODY, and that waits for nothing longer than half a second.
COMMAND = """
import os, sys, threading, time
import torch
from harness import command, machine, signals
from harness.console import STAGE, print_line, redirect_output
from harness.start import WATCH

WATCH.program = True  # as experiment.py is
command.GRACE = signals.GRACE = 0.5
machine.LONGEST_CALL = 0.2

def run(out_dir, log):
    STAGE.begin("train")
    print("begun", flush=True)
    BODY

sys.exit(command.main(run))
"""


def started(script: Path, body: str = "", **options) -> subprocess.Popen:
    """A Python program in the folder of `script`, with a cache there; with a body, a `COMMAND`."""
    if body:
        script.write_text(COMMAND.replace("BODY", "\n    ".join(body.strip().splitlines())))
    environment = os.environ | {
        "XDG_CACHE_HOME": str(script.parent / "cache"), "PYTHONPATH": str(HERE),
        **options.pop("environment", {}),
    }  # fmt: skip
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(
        [sys.executable, str(script), f"--out_dir={script.parent / 'run_x'}"],
        cwd=script.parent, env=environment, text=True, **pipes | options,
    )  # fmt: skip


# ---------------------------------------------------------------- asked to end, or unable to go on

LOOPS = """
def step(key, part):
    while key == "a" or {loops}:
        time.sleep(0.01)
    raise ValueError("one of two")
torch.set_num_threads(2)
list(machine.in_threads(step, ["a", "b"], [0], torch.device("cpu")))
"""
SWALLOWS = """
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""
OWN_THREAD = """
threading.Thread(target=time.sleep, args=[60]).start()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("body", "number", "cause"),
    [
        (LOOPS.format(loops=True), signal.SIGTERM, "it was told to end (SIGTERM)"),
        (LOOPS.format(loops=False), None, "ValueError: one of two"),
        (SWALLOWS, signal.SIGUSR1, "it was told to end (SIGUSR1)"),
        (OWN_THREAD, signal.SIGINT, "it was told to end (SIGINT)"),
    ],
    ids=["trainers that loop", "one raises, one loops", "an edit that swallows", "its own thread"],
)
def test_what_never_returns_holds_up_no_end(
    tmp_path: Path, body: str, number: signal.Signals | None, cause: str
) -> None:
    process = started(tmp_path / "loops.py", body)
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    began = time.monotonic()
    if number:
        process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == (128 + number if number else 1)
    said = words(error)
    assert said["during"] == "train" and said["cause"] == cause
    log = Path(said["log"]).read_text()
    assert "ValueError: one of two" in log or 'loops.py"' in log  # where the threads were
    attempts = [*(tmp_path / "cache" / "parametric-sae" / "attempts").glob("*.json")]
    assert f'"ended": "status {process.returncode}"' in attempts[0].read_text()


SLOW_WORDS = """
said = command.last_words
command.last_words = lambda *a, **b: (print("speaks", flush=True), time.sleep(1), said(*a, **b))[2]
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_asks_twice_does_not_cut_the_last_words_short(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = started(tmp_path / "slow.py", SLOW_WORDS)
    for line in ("begun\n", "speaks\n"):
        assert process.stdout.readline() == line
        time.sleep(0.2)
        process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert words(error)["cause"] == f"it was told to end ({number.name})"


FORKS = """
import ctypes, multiprocessing
for job in (lambda: time.sleep(60), lambda: ctypes.string_at(0)):
    child = multiprocessing.get_context("fork").Process(target=job)
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join()
    print(child.exitcode)
time.sleep(1)
"""


def test_the_end_of_a_process_that_an_edit_forks_is_not_the_run_s(tmp_path: Path) -> None:
    process = started(tmp_path / "forks.py", FORKS)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (0, "begun\n-15\n-11\n", "")
    (log,) = (tmp_path / "cache" / "parametric-sae" / "logs").iterdir()
    assert "Segmentation fault" in log.read_text()


@pytest.mark.parametrize(
    ("body", "status", "cause"),
    [
        ("import ctypes\nctypes.string_at(0)", -signal.SIGSEGV, "a crash in C code (Segmentation"),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, "it was killed (SIGKILL, as where memory"),
        ("with redirect_output(log): os._exit(0)", 0, "it was killed (SIGKILL, "),
    ],
)
def test_a_crash_in_c_and_a_kill_are_told_on_standard_error(
    tmp_path: Path, body: str, status: int, cause: str
) -> None:
    process = started(tmp_path / "experiment.py", body)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    said = words(error)
    assert said["during"] == "train" and said["cause"].startswith(cause)
    if status == -signal.SIGSEGV:
        assert re.fullmatch(r"experiment.py, line \d+, in run", said["at"])
        assert "most recent call first" in Path(said["log"]).read_text()


# ------------------------------------------------------------------------------ words and streams


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def with_note(error: Exception, note: str) -> Exception:
    error.add_note(note)
    return error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("a \udcff byte"), r"ValueError: a \udcff byte"),
        (ExperimentError("a \udcff byte"), r"a \udcff byte"),
        (Unspeakable(), "Unspeakable: (its __str__ raised RuntimeError)"),
        (with_note(ValueError("τ"), "layer \udcff"), "ValueError: τ"),
        (KeyboardInterrupt("enough"), "it was told to end (SIGINT)"),
    ],
    ids=["surrogate", "surrogate, ours", "__str__ raises", "note", "KeyboardInterrupt"],
)
def test_whatever_an_error_s_text_is_there_are_last_words(
    tmp_path: Path, own_cache: Path, capfd, error: BaseException, cause: str
) -> None:
    def run(out_dir: Path, log: Path) -> None:
        raise error

    assert main(run, [f"--out_dir={tmp_path / 'run_x'}"]) in (1, 130)
    said = words(capfd.readouterr().err)
    assert said["cause"] == cause
    assert "Traceback" in Path(said["log"]).read_text()


@pytest.mark.parametrize("stdout", ["cut", "full", "closed", "ascii"])
def test_a_complete_run_is_complete_whoever_reads_it(tmp_path: Path, stdout: str) -> None:
    """`| head`, a full disk behind `>`, `>&-`, a terminal that knows no Greek."""
    body = """
for n in range(2000):
    print("τ" * 50)
    print_line("θ")
with redirect_output(log):
    print_line("θ")
"""
    read, write = os.pipe()
    os.close(read)
    options = {
        "cut": {"stdout": write},
        "full": {"stdout": open("/dev/full", "w")},
        "closed": {"preexec_fn": lambda: os.close(1), "stdout": None},
        "ascii": {"environment": {"PYTHONIOENCODING": "ascii"}},
    }[stdout]
    process = started(tmp_path / "prints.py", body, **options)
    out, error = process.communicate(timeout=60)
    os.close(write)
    assert process.returncode == 0 and error == ""
    assert stdout != "ascii" or out.endswith("\\u03b8\n")


def test_failure_with_a_closed_standard_error_keeps_its_status(tmp_path: Path) -> None:
    process = started(
        tmp_path / "fails.py", "raise ValueError", stderr=None, preexec_fn=lambda: os.close(2)
    )
    process.communicate(timeout=60)
    assert process.returncode == 1


# ------------------------------------------------------------------- before `launch`, with no torch

BEFORE = {  # what stands in the place of torch, and what is said
    "a syntax error": ("import torch torch", "SyntaxError: invalid syntax (torch.py, line 1)"),
    "an import": ("import torchh", "ModuleNotFoundError: No module named 'torchh'"),
    "sys.exit": ("import sys; sys.exit(0)", "it ended before it called launch, so that nothing"),
    "SIGTERM": ("import time; print('slow', flush=True); time.sleep(60)", "it was told to end (SI"),
}


@pytest.mark.parametrize("what", BEFORE)
def test_what_fails_while_libraries_are_imported_ends_in_last_words(
    tmp_path: Path, what: str
) -> None:
    copy_project(tmp_path)
    code, cause = BEFORE[what]
    (tmp_path / "torch.py").write_text(code)
    process = started(tmp_path / "experiment.py")
    if what == "SIGTERM":
        assert process.stdout.readline() == "slow\n"
        process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == (128 + signal.SIGTERM if what == "SIGTERM" else 1)
    said = words("experiment.py failed" + error.split("experiment.py failed")[1])
    assert said["during"] == "start-up" and said["cause"].startswith(cause)
    if what == "a syntax error":
        assert said["at"] == "torch.py, line 1: import torch torch"


def test_a_syntax_error_in_experiment_py_is_python_s_to_tell(tmp_path: Path) -> None:
    copy_project(tmp_path)
    (tmp_path / "experiment.py").write_text(SOURCE.replace("def k_at(", "def k_at(("))
    process = started(tmp_path / "experiment.py")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "SyntaxError: " in error.splitlines()[-1]
    assert 'experiment.py", line ' in error.splitlines()[0]


# ------------------------------------------------------------------------------- folders and files


def test_a_run_that_ended_as_it_began_is_begun_again(
    toy, tmp_path: Path, own_cache: Path, monkeypatch
) -> None:
    """Before there is a config.json, and right after: by a full disk, or a kill."""
    run = Run(settings_of(toy, "run_1"), None, out_dir=tmp_path / "run_1", source=SOURCE)
    out_dir, write = run.out_dir, write_atomic

    def full(path: Path, text: str) -> None:
        if path.name == full.at:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    replace(monkeypatch, "write_atomic", full)
    for full.at in ("config.json", "experiment.py"):
        with pytest.raises(OSError), prepared_out_dir(out_dir):
            write_config(run)
        for name in (".lock", ".partial-1-2"):  # had it been a kill
            (out_dir / name).write_text("")
        (out_dir / "features").mkdir(exist_ok=True)  # another attempt's
    check_out_dir(out_dir)
    with prepared_out_dir(out_dir) as moved:
        names = {path.name for path in out_dir.iterdir()}
        assert moved is None and names == {".lock", "config.json"}
    (out_dir / "config.json").unlink()
    (out_dir / "experiment.py").write_text("a user's own")
    with pytest.raises(ExperimentError, match="holds other files"):
        check_out_dir(out_dir)


@pytest.mark.parametrize("by", ["a link", "another cache"])
def test_one_folder_has_one_run_by_whatever_name_and_cache(
    tmp_path: Path, own_cache: Path, monkeypatch, capfd, by: str
) -> None:
    folder, link = tmp_path / "run_1", tmp_path / "run_2"
    folder.mkdir()
    link.symlink_to(folder)

    def run(out_dir: Path, log: Path) -> None:
        check_out_dir(out_dir)
        with prepared_out_dir(out_dir):
            if out_dir == folder:
                if by == "another cache":
                    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
                assert main(run, [f"--out_dir={link}"]) == 1

    assert main(run, [f"--out_dir={folder}"]) == 0
    assert "is being written by another process" in words(capfd.readouterr().err)["cause"]
    assert not [*folder.iterdir()]


def test_the_lock_of_a_folder_does_not_come_along_when_a_run_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run_1"
    folder.mkdir()
    (folder / "final_info.json").write_text("{}")
    with prepared_out_dir(folder) as moved:
        assert moved == f"{folder} holds a complete run: set aside as {folder}.1"
        assert [path.name for path in folder.iterdir()] == [".lock"]
        with pytest.raises(ExperimentError, match="by another process"):
            check_out_dir(folder)
        monkeypatch.setattr(RANKS, "rank", 1)  # which the first one looks for
        check_out_dir(folder)
    assert [path.name for path in Path(f"{folder}.1").iterdir()] == ["final_info.json"]


@pytest.mark.parametrize(
    "record", ["null", "[]", "{}", '{"pid": 1, "ended": null}', "[" * 100_000, '"\udcff"']
)
def test_a_record_of_an_attempt_that_is_none_stops_no_start(
    tmp_path: Path, own_cache: Path, capfd, record: str
) -> None:
    argv = [f"--out_dir={tmp_path / 'run_x'}"]
    assert main(lambda out_dir, log: None, argv) == 0
    (path,) = (own_cache / "attempts").glob("*.json")
    path.write_text(record, errors="surrogateescape")
    assert main(lambda out_dir, log: None, argv) == 0
    assert '"ended": "complete"' in path.read_text() and capfd.readouterr().err == ""


def test_a_file_system_without_locks_refuses_no_run_for_ever(tmp_path: Path, monkeypatch) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    for run in [prepared_out_dir(tmp_path / "run_1") for _ in range(2)]:  # the first: killed
        run.__enter__()
        write_whole(tmp_path / "run_1", lambda file: file.write(b"{}"), lambda _: "config.json")
    assert (tmp_path / "run_1" / "config.json").exists()


WRITES = """
import sys, time
from pathlib import Path
from harness.partials import mark, partial_in
folder = Path(sys.argv[1])
with partial_in(folder).open("wb") as file:
    mark(file.fileno())
    print("begun", flush=True)
    time.sleep(60)
"""


def test_a_folder_that_another_run_removes_meanwhile_ends_nothing(
    tmp_path: Path, monkeypatch
) -> None:
    for name in ("goes", "stays"):
        (tmp_path / "store" / name / ".partial-1-1").mkdir(parents=True)
        os.utime(tmp_path / "store" / name / ".partial-1-1", (0, 0))
    scan = os.scandir

    def scan_late(folder):  # "goes" was listed, and is gone when it is looked into
        if str(folder).endswith("goes"):
            os.rename(folder, tmp_path / "gone")
        return scan(folder)

    monkeypatch.setattr("os.scandir", scan_late)
    remove_left(tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").rglob("*")] == ["stays"]


def test_what_a_kill_leaves_half_written_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "store" / "kind").mkdir(parents=True)
    folder = tmp_path / "store" / "kind"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(folder)], stdout=subprocess.PIPE, cwd=HERE
    )
    assert process.stdout.readline() == b"begun\n"
    (partial,) = folder.iterdir()
    os.utime(partial, (0, 0))
    remove_left(tmp_path)
    assert partial.exists()  # its process writes it
    process.kill()
    process.communicate()
    left = folder / ".partial-1-1"
    (left / "sae").mkdir(parents=True)
    os.utime(left, (0, 0))
    (folder / "whole.json").write_text("{}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with scratch_dir() as scratch:
        os.utime(scratch, (0, 0))
        remove_left(tmp_path)
        assert scratch.is_dir()
        shutil.rmtree(scratch)
    remove_left(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["whole.json"]
    write_whole(folder, lambda file: file.write(b"[]"), lambda _: "whole.json")
    assert [path.name for path in folder.iterdir()] == ["whole.json"]
