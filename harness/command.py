"""One attempt at the command: lock, heartbeat, signals, last words. Knows nothing of SAEs."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

import psutil
from filelock import FileLock

from harness.console import STAGE, all_to_log, tolerant_output
from harness.errors import (
    ExperimentError,
    first_line,
    is_full_disk,
    is_out_of_memory,
    last_words,
    place_of,
    redact,
    text_of,
)
from harness.ledger import LEDGER
from harness.partials import PREFIX, remove_left, temporary_dir
from harness.ranks import RANKS
from harness.signals import GRACE, Ended, Signals, leave_within, signal_of
from harness.start import HERE, WATCH
from harness.store import cache_dir, digest, new_log, place_for, take_lock, write_atomic
from harness.witness import witnessed

HEARTBEAT = 5.0  # seconds between two notes of what an attempt is doing
LOCK = ".lock"  # the file in a run's folder that the process that writes it holds


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
    if RANKS.first and (out_dir / LOCK).exists():  # of several at once, one would find it held
        lock_folder(out_dir).release()
    place = out_dir
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ExperimentError(
            f"--out_dir={out_dir} must be a folder that can be written, but {place} is "
            f"{'read-only' if place.is_dir() else 'a file'}; name another, or change that"
        )


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, complete or not; or what stands before its config.json."""
    if (folder / "final_info.json").exists():
        return True
    if all(path.name == LOCK or path.name.startswith(PREFIX) for path in folder.iterdir()):
        return True
    try:
        return {"run", "sha256"} <= json.loads((folder / "config.json").read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def lock_folder(out_dir: Path) -> FileLock:
    """Holds a run's folder, by whatever name and with whatever cache another process comes to it.

    Raises:
        ExperimentError: another one holds it.
    """
    lock = take_lock(out_dir / LOCK)
    if lock is None:
        raise ExperimentError(
            f"{out_dir} is being written by another process: wait until it ends, or name another "
            "--out_dir"
        )
    return lock


@contextlib.contextmanager
def prepared_out_dir(out_dir: Path) -> Iterator[str | None]:
    """Inside, `out_dir` is this process's, and at first it is writable and without results.

    A complete run that stands there (it has a final_info.json) is set aside as `out_dir.1`, `.2`,
    …. What an unfinished attempt left is removed: all that was paid for is in the store.

    Yields:
        a line that says what was set aside, or None.
    Raises:
        ExperimentError: the folder can't be made or written, or another process writes it.
    """
    moved = None
    try:
        lock = lock_folder(out_dir)
        if (out_dir / "final_info.json").exists():
            number = 1
            while (aside := out_dir.with_name(f"{out_dir.name}.{number}")).exists():
                number += 1
            out_dir.rename(aside)
            moved = f"{out_dir} holds a complete run: set aside as {aside}"
            (aside / LOCK).unlink()
            lock.release()
            lock = lock_folder(out_dir)
        elif (out_dir / "config.json").exists():
            for folder in ("sae", "eval_results", "features"):
                shutil.rmtree(out_dir / folder, ignore_errors=True)
            for file in ("code.zip", "warnings.json", "train_log.jsonl"):
                (out_dir / file).unlink(missing_ok=True)
        for left in out_dir.glob(f"{PREFIX}*"):
            left.unlink()
    except OSError as error:
        if is_full_disk(error):
            raise
        raise ExperimentError(
            f"--out_dir={out_dir} must be a folder that can be written, but: "
            f"{error.strerror or error}; name another, or change its permissions"
        ) from error
    try:
        yield moved
    finally:
        with contextlib.suppress(OSError):
            (out_dir / LOCK).unlink(missing_ok=True)
            lock.release()


class _Arguments(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def error(self, message: str) -> Any:
        raise ExperimentError(
            f"{message}; the command is `python experiment.py --out_dir=run_i`, no other argument"
        )


class RunLock:
    """An `out_dir` for this process alone, and a record of what it does for the next one to read.

    The record says every few seconds at which stage it is and how much memory is used; a process
    that is killed leaves that. Of several ranks each has a lock and a record of its own.

    Raises:
        ExperimentError: another process writes the same out_dir.
    """

    def __init__(self, out_dir: Path, log: Path) -> None:
        self.out_dir = out_dir
        resolved = out_dir.resolve()
        name = f"{resolved.name[:60]}-{digest(str(resolved))[:16]}"
        name += "" if RANKS.first else f"-rank-{RANKS.rank}"
        self.path = place_for("attempts") / f"{name}.json"
        self.lock = take_lock(self.path.with_suffix(".lock"))
        self.before = self._read()
        if self.lock is None:
            raise ExperimentError(
                f"{out_dir} is being written by another process ({self.before.get('pid', '?')}): "
                "wait until it ends, or name another --out_dir"
            )
        self.began = time.monotonic()
        self.record: dict[str, Any] = {
            "pid": os.getpid(),
            "rank": RANKS.on,
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

    def _read(self) -> dict[str, Any]:
        """What the process before left; {} where that is no whole record."""
        numbers = dict.fromkeys(("seconds", "memory_gb", "machine_gb", "total_gb"), (int, float))
        texts = dict.fromkeys(("log", "began", "stage"), str)
        kinds = {**numbers, **texts, "pid": int, "silent": int, "key": (dict, type(None))}
        try:
            record = json.loads(self.path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        whole = isinstance(record, dict) and all(
            name in record and isinstance(record[name], kind) for name, kind in kinds.items()
        )
        return record if whole else {}

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
            f"the last attempt at {self.out_dir.name}{last.get('rank', '')}, of {last['began']}, "
            "ended without a word"
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


class _Attempt:
    """What is known of one attempt when it fails.

    Attributes:
        log, lock: once they are there. memory_settings: see `main`.
    """

    def __init__(self, memory_settings: Callable[[str], str]) -> None:
        self.log: Path | None = None
        self.lock: RunLock | None = None
        self.memory_settings = memory_settings
        self.stderr = os.dup(2)  # also while output is redirected
        self.ends_by_itself: Callable[[], None] = lambda: None

    def fails(self, error: BaseException, stderr: TextIO | None = None) -> int:
        """Says why, at the end of standard error and at length in the log: the exit status.

        Of several ranks the one that fails speaks, and the first, which names that one.
        """
        told = isinstance(error, (KeyboardInterrupt, Ended))
        elsewhere = RANKS.failed_elsewhere(error)
        if self.log:
            with contextlib.suppress(OSError):
                with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    traceback.print_exception(error, file=file)
                    if told:  # where each thread was: one may never return
                        file.flush()
                        faulthandler.dump_traceback(file)
        notes = [str(note) for note in reversed(getattr(error, "__notes__", []))]
        notes = [note for note in notes if len(note) < 80][:3]
        stage = STAGE.name + (f" ({', '.join(notes)})" if notes else "")
        said = explained(error, self.lock, self.memory_settings, elsewhere)
        at = f", at {said['at']}" if "at" in said else ""
        in_short = f"during {stage}: {said['cause']}{at}"
        stage += "" if elsewhere else RANKS.on
        words = last_words(stage, **said, log=str(self.log or ""))
        speaks = not (elsewhere or told) and RANKS.announce(words, in_short)
        RANKS.leave()
        if RANKS.first or speaks:
            print(words, file=stderr or sys.stderr, flush=True)
        return 128 + signal_of(error) if told and not elsewhere else 1

    def runs(self, run: Callable[[Path, Path], None], out_dir: Path) -> None:
        """Calls `run`, once the folder is this process's. Of several ranks the first one prints."""
        self.lock = RunLock(out_dir, self.log)
        for folder in (cache_dir(), temporary_dir()):
            remove_left(folder)
        if death := self.lock.last_death(self.memory_settings):
            print(death, file=sys.stderr, flush=True)
        with contextlib.ExitStack() as around:
            watching = witnessed(self.log, self.lock.path, self.stderr)
            self.ends_by_itself = around.enter_context(watching)
            if not RANKS.first:
                around.enter_context(all_to_log(self.log))
            run(out_dir, self.log)

    def give_up(self, error: Ended) -> NoReturn:
        """Ends the process from another thread than the main one, which doesn't come back."""
        leave_within(GRACE, 128 + signal_of(error))
        shown = open(self.stderr, "w", errors="backslashreplace", closefd=False)
        status = self.fails(error, shown)
        self.ends_by_itself()
        self.release(status)
        os._exit(status)

    def release(self, status: int) -> None:
        """Notes how it ended, and lets go of its folder."""
        if self.lock:
            self.lock.release("complete" if status == 0 else f"status {status}")
        os.close(self.stderr)


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
    WATCH.launched = True
    attempt, status = _Attempt(memory_settings), 1
    STAGE.name = "start-up"
    with tolerant_output(), Signals(attempt.give_up) as signals:
        try:
            parser = _Arguments(description=description, allow_abbrev=False)
            parser.add_argument("--out_dir", type=Path, required=True, help="the run's folder")
            out_dir = parser.parse_args(argv).out_dir.absolute()
            RANKS.begin()
            attempt.log = new_log(out_dir.name)
            with RANKS.joined():
                attempt.runs(run, out_dir)
            status = 0
        except (Exception, KeyboardInterrupt, SystemExit, Ended) as error:
            signals.over.set()
            if isinstance(error, SystemExit) and not attempt.log:  # --help
                raise
            status = attempt.fails(error)
        finally:
            signals.over.set()
            attempt.release(status)
    WATCH.status = status
    if status and WATCH.program:
        leave_within(GRACE, status)
    return status


def explained(
    error: BaseException, lock: RunLock | None, memory_settings: Callable[[str], str],
    elsewhere: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """Why the command failed ("cause"), "at" which line where that helps, and what "to_do".

    An ExperimentError says what to do by itself.

    Args:
        elsewhere: how another rank has failed, where that is why.
    """
    again = "give the same command again"
    if lock and LEDGER.kept:
        again += f": it goes on from what is kept ({', '.join(LEDGER.kept)})"
    if elsewhere:
        return {"cause": redact(elsewhere), "to_do": again}
    if isinstance(error, ExperimentError):
        return {"cause": text_of(error)}
    if isinstance(error, (KeyboardInterrupt, Ended)):
        return {"cause": f"it was told to end ({signal_of(error).name})", "to_do": again}
    if is_out_of_memory(error):
        cause, remedy = "out of memory", f"lower {memory_settings(STAGE.name)}"
    elif is_full_disk(error):
        place = lock.out_dir if lock else "the run"
        cause, remedy = "a disk is full", f"free space where {place} is"
    else:
        cause = f"{type(error).__name__}: {redact(text_of(error))}"
        return {"at": place_of(error), "cause": cause, "to_do": f"mend it, and {again}"}
    return {"cause": f"{cause} ({first_line(error)})", "to_do": f"{remedy}, and {again}"}
