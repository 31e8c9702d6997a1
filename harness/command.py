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

from harness.console import Progress
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

LOWER = {  # by stage, the settings that take less memory there
    "train": "batch, harvest_contexts or buffer_tokens",
    "core evaluation": "core_prompts",
    "sparse probing": "probe_llm_batch or probe_sae_batch",
}
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


class Attempt:
    """One start of the command: its lock on out_dir, and what the next start can read of it.

    Its record says every few seconds what it does and how much memory it uses; an attempt that is
    killed leaves that.

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
        self.log, self.began = log, time.monotonic()
        self.record: dict[str, Any] = {
            "pid": os.getpid(),
            "log": str(log),
            "began": datetime.datetime.now().isoformat(" ", "seconds"),
            "silent": self.before.get("silent", 0) + 1 if self.ended_silently() else 0,
            "ended": None,
        }
        LEDGER.__init__()
        LEDGER.key = self.before.get("key")
        self.over = threading.Event()
        self.beating = threading.Lock()
        self.beat()
        threading.Thread(target=self._beat_on, name="heartbeat", daemon=True).start()
        Progress.on_stage = self.beat

    def ended_silently(self) -> bool:
        """Whether the attempt before ended without a word."""
        return bool(self.before) and self.before.get("ended") is None

    def what_happened_before(self) -> str | None:
        """A line on an attempt before that ended without a word, or None."""
        if not self.ended_silently():
            return None
        last = self.before
        times = f", as {silent - 1} before it" if (silent := self.record["silent"]) > 1 else ""
        return (
            f"the last attempt at {self.out_dir.name}, of {last['began']}, ended without a word"
            f"{times}: killed during {last['stage']}, after {last['seconds']:.0f} s, when it used "
            f"{last['memory_gb']:.1f} GB and the machine {last['machine_gb']:.1f} of "
            f"{last['total_gb']:.1f}" + (
                f"; if it was for want of memory, lower {lower(last['stage'])}"
                if last["machine_gb"] > 0.8 * last["total_gb"]
                else ""
            ) + f"; its log is {last['log']}"
        )  # fmt: skip

    def beat(self) -> None:
        """Writes the record."""
        import psutil

        memory = psutil.virtual_memory()
        with self.beating, contextlib.suppress(OSError):
            self.record |= {
                "stage": Progress.stage_now,
                "key": LEDGER.key,
                "seconds": time.monotonic() - self.began,
                "memory_gb": psutil.Process().memory_info().rss / 1e9,
                "machine_gb": (memory.total - memory.available) / 1e9,
                "total_gb": memory.total / 1e9,
            }
            write_atomic(self.path, json.dumps(self.record))

    def _beat_on(self) -> None:
        while not self.over.wait(HEARTBEAT):
            self.beat()

    def end(self, how: str) -> None:
        """Says that the attempt ended by itself, and lets go of out_dir."""
        self.over.set()
        self.record["ended"] = how
        self.beat()
        os.close(self.lock)
        Progress.on_stage = lambda: None


class _Ended(BaseException):
    """Raised by a signal that asks the process to end."""


def _end(number: int, frame: Any) -> None:
    raise _Ended(signal.Signals(number).name)


def _end_again(swallowed: Any) -> None:
    """`sys.unraisablehook`: what a finalizer raises is lost, so the signal is sent again."""
    error = swallowed.exc_value
    if not isinstance(error, (KeyboardInterrupt, _Ended)):
        sys.__unraisablehook__(swallowed)
        return
    number = signal.Signals[str(error) or "SIGINT"]
    threading.Timer(0.1, os.kill, [os.getpid(), number]).start()


def main(run: Callable[[Path, Path], None], argv: list[str] | None = None) -> int:
    """Calls `run(out_dir, log)`; on failure the end of standard error says why, in words.

    Returns:
        the exit status: 0; 1 after a failure; 128 + its number after a signal.
    """
    log = attempt = None
    status = 0
    Progress.stage_now = "start-up"
    try:
        parser = _Arguments(description="Train and score a parametric contrastive SAE.")
        parser.allow_abbrev = False
        parser.add_argument("--out_dir", type=Path, required=True, help="the folder of this run")
        out_dir = parser.parse_args(argv).out_dir.absolute()
        log = new_log(out_dir.name)
        attempt = Attempt(out_dir, log)
        if before := attempt.what_happened_before():
            print(before, file=sys.stderr, flush=True)
        with handlers(log):
            run(out_dir, log)
    except (Exception, KeyboardInterrupt, SystemExit, _Ended) as error:
        if isinstance(error, SystemExit) and not log:  # --help
            raise
        status = 1
        if isinstance(error, (KeyboardInterrupt, _Ended)):
            name = str(error) or "SIGINT"
            status = 128 + signal.Signals[name]
        if log:
            with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
                traceback.print_exception(error, file=file)
        print(last_words(error, log, attempt), file=sys.stderr)
    finally:
        if attempt:
            attempt.end("complete" if status == 0 else f"status {status}")
    return status


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


def last_words(error: BaseException, log: Path | None, attempt: Attempt | None) -> str:
    """What failed, why, what to do and where the log is: at most `LAST_WORDS` characters."""
    notes = [note for note in reversed(getattr(error, "__notes__", [])) if len(note) < 80]
    where = f"{Progress.stage_now}" + (f" ({', '.join(notes[:3])})" if notes else "")
    lines = [f"experiment.py failed during {where}"]
    kept_now = LEDGER.kept if attempt else []
    again = "give the same command again" + (
        f": it goes on from what is kept ({', '.join(kept_now)})" if kept_now else ""
    )
    if isinstance(error, ExperimentError):
        cause, remedy = str(error), ""
    elif isinstance(error, (KeyboardInterrupt, _Ended)):
        cause, remedy = f"it was told to end ({str(error) or 'SIGINT'})", again
    elif is_out_of_memory(error):
        cause = f"out of memory ({first_line(error)})"
        remedy = f"lower {lower(Progress.stage_now)}, and {again}"
    elif is_full_disk(error):
        cause = f"a disk is full ({first_line(error)})"
        remedy = f"free space where {attempt.out_dir if attempt else 'the run'} is, and {again}"
    else:
        cause, remedy = f"{type(error).__name__}: {redact(str(error))}", f"mend it, and {again}"
        if place := place_of(error):
            lines.append(f"at: {place}")
    room = LAST_WORDS - len("\n".join(lines)) - len(remedy) - len(str(log)) - 200
    lines.append(f"cause: {shortened(cause, max(room, 100))}")
    lines += [f"to do: {remedy}"] if remedy else []
    lines += [f"log: {log}"] if log else []
    return "\n".join(lines)


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


def lower(stage: str) -> str:
    """The settings that take less memory in a stage."""
    return LOWER.get(stage.split(": ")[-1], "d_sae or the number of layers and seeds")
