"""One attempt at the command: lock, heartbeat, signals, last words. Knows nothing of SAEs."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from harness.console import STAGE
from harness.errors import (
    ExperimentError,
    first_line,
    is_full_disk,
    is_out_of_memory,
    redact,
    shortened,
)
from harness.start import HERE
from harness.store import LEDGER, digest, new_log, place_for, take_lock, write_atomic

LAST_WORDS = 1500  # characters of standard error that a driver shows of a run that failed
HEARTBEAT = 5.0  # seconds between two notes of what an attempt is doing


def check_out_dir(out_dir: Path) -> None:
    """ExperimentError where the folder can't be made or written, or holds this project."""
    if out_dir.resolve() in (HERE, *HERE.parents):
        raise ExperimentError(
            f"--out_dir={out_dir} must be a folder of the run's own, but holds experiment.py: "
            "name another, such as --out_dir=run_try"
        )
    if out_dir.resolve() == HERE / "run_0":
        raise ExperimentError(
            "--out_dir=run_0 is the given baseline, which no run replaces: name another folder"
        )
    if out_dir.is_dir() and any(out_dir.iterdir()) and not is_run(out_dir):
        raise ExperimentError(
            f"--out_dir={out_dir} must be a new folder, or that of a run, but holds other files: "
            "name another"
        )
    place = out_dir
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ExperimentError(
            f"--out_dir={out_dir} must be a folder that can be written, but {place} is "
            f"{'read-only' if place.is_dir() else 'a file'}; name another, or change that"
        )


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, complete or not."""
    if (folder / "final_info.json").exists():
        return True
    try:
        return {"run", "sha256"} <= json.loads((folder / "config.json").read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def prepare_out_dir(out_dir: Path) -> str | None:
    """Makes `out_dir`, writable and without results.

    A complete run that stands there (it has a final_info.json) is set aside as `out_dir.1`, `.2`,
    …. What an unfinished attempt left is removed: all that was paid for is in the store.

    Returns:
        a line that says what was set aside, or None.
    Raises:
        ExperimentError: the folder can't be made or written.
    """
    moved = None
    try:
        if (out_dir / "final_info.json").exists():
            number = 1
            while (aside := out_dir.with_name(f"{out_dir.name}.{number}")).exists():
                number += 1
            out_dir.rename(aside)
            moved = f"{out_dir} holds a complete run: set aside as {aside}"
        elif (out_dir / "config.json").exists():
            for folder in ("sae", "eval_results"):
                shutil.rmtree(out_dir / folder, ignore_errors=True)
            for file in ("code.zip", "warnings.json"):
                (out_dir / file).unlink(missing_ok=True)
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except OSError as error:
        raise ExperimentError(
            f"--out_dir={out_dir} must be a folder that can be written, but: "
            f"{error.strerror or error}; name another, or change its permissions"
        ) from error
    return moved


class _Arguments(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def error(self, message: str) -> Any:
        raise ExperimentError(
            f"{message}; the command is `python experiment.py --out_dir=run_i`, no other argument"
        )


class RunLock:
    """An `out_dir` for this process alone, and a record of what it does for the next one to read.

    The record says every few seconds at which stage it is and how much memory is used; a process
    that is killed leaves that.

    Raises:
        ExperimentError: another process writes the same out_dir.
    """

    def __init__(self, out_dir: Path, log: Path) -> None:
        self.out_dir = out_dir
        name = f"{out_dir.name[:60]}-{digest(str(out_dir.resolve()))[:16]}"
        self.path = place_for("attempts") / f"{name}.json"
        self.lock = take_lock(self.path.with_suffix(".lock"))
        try:
            self.before = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.before = {}
        if self.lock is None:
            raise ExperimentError(
                f"{out_dir} is being written by another process ({self.before.get('pid', '?')}): "
                "wait until it ends, or name another --out_dir"
            )
        self.began = time.monotonic()
        self.record: dict[str, Any] = {
            "pid": os.getpid(),
            "log": str(log),
            "began": datetime.datetime.now().isoformat(" ", "seconds"),
            "silent": self.before.get("silent", 0) + 1 if self.died_before() else 0,
            "ended": None,
        }
        LEDGER.begin(self.before.get("key"))
        self.released = threading.Event()
        self.beating = threading.Lock()
        self.beat()
        threading.Thread(target=self._beat_on, name="heartbeat", daemon=True).start()
        STAGE.listener = self.beat

    def beat(self) -> None:
        """Writes the record."""
        memory = psutil.virtual_memory()
        with self.beating, contextlib.suppress(OSError):
            self.record |= {
                "stage": STAGE.name,
                "key": LEDGER.key,
                "seconds": time.monotonic() - self.began,
                "memory_gb": psutil.Process().memory_info().rss / 1e9,
                "machine_gb": (memory.total - memory.available) / 1e9,
                "total_gb": memory.total / 1e9,
            }
            write_atomic(self.path, json.dumps(self.record))

    def _beat_on(self) -> None:
        while not self.released.wait(HEARTBEAT):
            self.beat()

    def died_before(self) -> bool:
        """Whether the process before ended without a word."""
        return bool(self.before) and self.before.get("ended") is None

    def last_death(self, memory_settings: Callable[[str], str]) -> str | None:
        """A line on a process before that ended without a word, or None."""
        if not self.died_before():
            return None
        last, silent = self.before, self.record["silent"]
        times = f", as {silent - 1} before it" if silent > 1 else ""
        remedy = ""
        if last["machine_gb"] > 0.8 * last["total_gb"]:
            remedy = f"; if it was for want of memory, lower {memory_settings(last['stage'])}"
        return (
            f"the last attempt at {self.out_dir.name}, of {last['began']}, ended without a word"
            f"{times}: killed during {last['stage']}, after {last['seconds']:.0f} s, when it used "
            f"{last['memory_gb']:.1f} GB and the machine {last['machine_gb']:.1f} of "
            f"{last['total_gb']:.1f}{remedy}; its log is {last['log']}"
        )

    def release(self, how: str) -> None:
        """Notes how the command ended, and lets go of out_dir."""
        STAGE.listener = None
        self.released.set()
        self.record["ended"] = how
        self.beat()
        self.lock.release()


class _Ended(BaseException):
    """Raised by a signal that asks the process to end."""


def _end(number: int, frame: Any) -> None:
    raise _Ended(signal.Signals(number).name)


def _end_again(swallowed: Any) -> None:
    """`sys.unraisablehook`: what a finalizer raises is lost, so the signal is sent again."""
    if not isinstance(swallowed.exc_value, (KeyboardInterrupt, _Ended)):
        sys.__unraisablehook__(swallowed)
        return
    number = signal_of(swallowed.exc_value)
    threading.Timer(0.1, os.kill, [os.getpid(), number]).start()


def signal_of(error: BaseException) -> signal.Signals:
    """The signal behind an `_Ended`, or a KeyboardInterrupt."""
    return signal.Signals[str(error) or "SIGINT"]


@contextlib.contextmanager
def handlers(log: Path) -> Iterator[None]:
    """Signals that ask for an end raise; a crash in C leaves its stack in the log."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        asked.append(signal.SIGHUP)
    stock = {number: signal.signal(number, _end) for number in asked}
    hook, sys.unraisablehook = sys.unraisablehook, _end_again
    with log.open("a") as file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
            sys.unraisablehook = hook
            for number, handler in stock.items():
                signal.signal(number, handler)


def main(
    run: Callable[[Path, Path], None],
    argv: list[str] | None = None,
    description: str = "",
    memory_settings: Callable[[str], str] = lambda stage: "what takes memory",
) -> int:
    """Calls `run(out_dir, log)`; on failure the end of standard error says why, in words.

    Args:
        argv: of the command; by default sys.argv's. description: what `--help` says of it.
        memory_settings: the settings that take less memory in a stage, in words.
    Returns:
        the exit status: 0; 1 after a failure; 128 + its number after a signal.
    """
    log = lock = None
    status = 0
    STAGE.name = "start-up"
    try:
        parser = _Arguments(description=description, allow_abbrev=False)
        parser.add_argument("--out_dir", type=Path, required=True, help="the folder of this run")
        out_dir = parser.parse_args(argv).out_dir.absolute()
        log = new_log(out_dir.name)
        lock = RunLock(out_dir, log)
        if death := lock.last_death(memory_settings):
            print(death, file=sys.stderr, flush=True)
        with handlers(log):
            run(out_dir, log)
    except (Exception, KeyboardInterrupt, SystemExit, _Ended) as error:
        if isinstance(error, SystemExit) and not log:  # --help
            raise
        told = isinstance(error, (KeyboardInterrupt, _Ended))
        status = 128 + signal_of(error) if told else 1
        if log:
            with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
                traceback.print_exception(error, file=file)
        print(last_words(error, log, lock, memory_settings), file=sys.stderr)
    finally:
        if lock:
            lock.release("complete" if status == 0 else f"status {status}")
    return status


def last_words(
    error: BaseException,
    log: Path | None,
    lock: RunLock | None,
    memory_settings: Callable[[str], str],
) -> str:
    """What failed, why, what to do and where the log is: at most `LAST_WORDS` characters."""
    notes = [note for note in reversed(getattr(error, "__notes__", [])) if len(note) < 80]
    where = STAGE.name + (f" ({', '.join(notes[:3])})" if notes else "")
    said = explained(error, lock, memory_settings) | {"log": str(log or "")}
    cause = said.pop("cause")
    # Room for the labels, and for the line that make adds.
    room = LAST_WORDS - 200 - len(where) - sum(map(len, said.values()))
    said["cause"] = shortened(cause, max(room, 100))
    lines = [f"{what}: {said[what]}" for what in ("at", "cause", "to do", "log") if said.get(what)]
    return "\n".join([f"experiment.py failed during {where}", *lines])


def explained(
    error: BaseException, lock: RunLock | None, memory_settings: Callable[[str], str]
) -> dict[str, str]:
    """Why the command failed ("cause"), "at" which line where that helps, and what "to do".

    An ExperimentError says what to do by itself.
    """
    again = "give the same command again"
    if lock and LEDGER.kept:
        again += f": it goes on from what is kept ({', '.join(LEDGER.kept)})"
    if isinstance(error, ExperimentError):
        return {"cause": str(error)}
    if isinstance(error, (KeyboardInterrupt, _Ended)):
        return {"cause": f"it was told to end ({signal_of(error).name})", "to do": again}
    if is_out_of_memory(error):
        cause, remedy = "out of memory", f"lower {memory_settings(STAGE.name)}"
    elif is_full_disk(error):
        place = lock.out_dir if lock else "the run"
        cause, remedy = "a disk is full", f"free space where {place} is"
    else:
        cause = f"{type(error).__name__}: {redact(str(error))}"
        return {"at": place_of(error), "cause": cause, "to do": f"mend it, and {again}"}
    return {"cause": f"{cause} ({first_line(error)})", "to do": f"{remedy}, and {again}"}


def place_of(error: BaseException) -> str:
    """The line of experiment.py that an error passed last, and where it came from below that."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).name == "experiment.py"]
    if not frames:
        return ""
    frame = (ours or frames)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}: {frame.line}"
    if frames[-1] is not frame:
        deepest = frames[-1]
        place += f" -> {Path(deepest.filename).name}, line {deepest.lineno}, in {deepest.name}"
    return redact(place)[:300]
