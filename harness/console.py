"""What a user reads: stages, progress, single lines, and the place for what libraries print."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm


class _Tolerant:
    """A stream that loses what it can't write instead of raising: a full disk, a closed pipe.

    What its encoding lacks it writes as escapes. Without a stream of its own it is standard
    output, whatever that is at the time.
    """

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream or sys.stdout, name)

    def write(self, text: str) -> int:
        stream = self.stream or sys.stdout
        with contextlib.suppress(OSError, ValueError):  # ValueError: an edit has closed it
            try:
                stream.write(text)
            except UnicodeEncodeError:
                encoding = stream.encoding or "ascii"
                stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            (self.stream or sys.stdout).flush()


CONSOLE = _Tolerant()  # the user's; its stream is standard output's while that is redirected


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """Inside, output that can't be written is lost and costs no run, and none when Python ends."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Tolerant, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            try:
                stream.flush()
            except OSError:  # Python flushes once more, and its exit status would be 120
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except ValueError:  # an edit has closed it
                pass


@contextlib.contextmanager
def redirect_output(log: Path) -> Iterator[None]:
    """Sends what libraries print, from Python or from C, to `log` instead of the terminal."""
    if CONSOLE.stream is not None:  # it is redirected already
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    # Under a test runner sys.stdout may be another object than descriptor 1: replace both.
    streams = sys.stdout, sys.stderr
    binary = open(target, "wb", buffering=0, closefd=False)
    text = io.TextIOWrapper(binary, encoding="utf-8", errors="replace", write_through=True)
    try:
        own_stdout = sys.stdout.fileno() != 1
    except (OSError, ValueError, AttributeError):
        own_stdout = True
    try:
        CONSOLE.stream = streams[0]
        if not own_stdout:
            CONSOLE.stream = open(saved[0], "w", encoding=streams[0].encoding, closefd=False)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout = sys.stderr = _Tolerant(text)
        yield
    finally:
        CONSOLE.flush()
        CONSOLE.stream = None
        sys.stdout, sys.stderr = streams
        text.detach()
        for number, descriptor in zip((1, 2), saved):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(target)


@contextlib.contextmanager
def all_to_log(log: Path) -> Iterator[None]:
    """`redirect_output` for what the user would read, too."""
    with redirect_output(log):
        shown, CONSOLE.stream = CONSOLE.stream, sys.stdout
        try:
            yield
        finally:
            CONSOLE.stream = shown


@contextlib.contextmanager
def rehearsal(log: Path) -> Iterator[None]:
    """`all_to_log`, where stages are named as a rehearsal's."""
    before = STAGE.name
    with all_to_log(log):
        STAGE.prefix = "rehearsal: "
        try:
            yield
        finally:
            STAGE.prefix = ""
    STAGE.name = before  # but not after an error: it says where that was


def print_line(text: str) -> None:
    """A line for the user, also while `redirect_output` sends the rest elsewhere."""
    print(text, file=CONSOLE, flush=True)


class _Stage:
    """What the command is at: its heartbeat and its last words say it.

    Attributes:
        name: of the stage that began last. listener: called when one begins.
    """

    def __init__(self) -> None:
        self.name, self.prefix = "start-up", ""
        self.listener: Callable[[], None] | None = None

    def begin(self, name: str) -> None:
        """Begins a stage. `Progress` does so by itself."""
        self.name = self.prefix + name
        if self.listener is not None:
            self.listener()


STAGE = _Stage()


class Progress:
    """How far a stage is: a bar on a terminal, elsewhere a plain line now and then.

    Args:
        stage: the stage's name.
        total: units of work in all.
        unit: their name, for example "tokens".
        every: least seconds between two plain lines.
    """

    def __init__(self, stage: str, total: int, unit: str, every: float = 15.0) -> None:
        STAGE.begin(stage)
        self.stage, self.total, self.every = stage, total, every
        self.done = self.resumed = 0
        self.note = ""
        self.began = self.printed = time.monotonic()
        self.ended: float | None = None
        self.bar = None
        if CONSOLE.isatty():
            options = {"unit": f" {unit}", "unit_scale": True, "dynamic_ncols": True}
            self.bar = tqdm(total=total, desc=stage, file=CONSOLE, **options)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, failed: type | None, *_: object) -> None:
        if not failed:
            self.close()

    def resume(self, done: int, seconds: float) -> None:
        """Counts what an earlier attempt has done, and the time it took."""
        self.began -= seconds
        self.done = self.resumed = done
        if self.bar is not None:
            self.bar.start_t -= seconds
            self.bar.update(done)

    def advance(self, n: int, note: str = "") -> None:
        """Counts `n` more units as done; `note` is shown beside the figures."""
        self.done = min(self.done + n, self.total)
        self.note = note or self.note
        now = time.monotonic()
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(self.done - self.bar.n)
        elif now - self.printed >= self.every and self.done < self.total:
            self.printed = now
            left = self.seconds() * (self.total - self.done) / max(self.done, 1)
            self._print(f"{100 * self.done / self.total:3.0f}%, {left:.0f} s left")

    def seconds(self) -> float:
        """Since the stage began, to its end."""
        return (self.ended or time.monotonic()) - self.began

    def close(self) -> None:
        """Ends the bar, or prints the stage's last line; none where nothing was left to do."""
        self.ended = time.monotonic()
        if self.bar is not None:
            self.bar.close()
        elif not self.resumed == self.total > 0:
            self._print(f"done in {self.seconds():.0f} s")

    def _print(self, state: str) -> None:
        print_line(f"{self.stage}: {state}" + (f", {self.note}" if self.note else ""))
