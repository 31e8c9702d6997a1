"""What a user reads: progress, single lines, and the place for what libraries print."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class _Console:
    """Standard output, also while `redirect_output` sends it elsewhere: progress is shown all the time."""

    encoding = "utf-8"
    outer: Any = None  # standard output as it was before `redirect_output`

    def _stream(self) -> Any:
        return self.outer or sys.stdout

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more: no reason to end a run
            self._stream().write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream().flush()

    def fileno(self) -> int:
        return self._stream().fileno()

    def isatty(self) -> bool:
        return self._stream().isatty()


CONSOLE = _Console()


class _Tolerant(io.TextIOWrapper):
    """A text file that loses what a full disk won't take, instead of raising in a library."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


@contextlib.contextmanager
def redirect_output(log: Path) -> Iterator[None]:
    """Sends what libraries print, from Python or from C, to `log` instead of the terminal."""
    if CONSOLE.outer is not None:  # it is quiet already
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    # Under a test runner sys.stdout may be another object than descriptor 1: replace both.
    streams = sys.stdout, sys.stderr
    binary = open(target, "wb", buffering=0, closefd=False)
    text = _Tolerant(binary, encoding="utf-8", errors="replace", write_through=True)
    try:
        own_stdout = sys.stdout.fileno() != 1
    except (OSError, ValueError, AttributeError):
        own_stdout = True
    try:
        CONSOLE.outer = streams[0] if own_stdout else open(saved[0], "w", closefd=False)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout = sys.stderr = text
        yield
    finally:
        CONSOLE.flush()
        CONSOLE.outer = None
        sys.stdout, sys.stderr = streams
        text.detach()
        for number, descriptor in zip((1, 2), saved):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(target)


def print_line(text: str) -> None:
    """A line on standard output, also while libraries are quiet; in the log in a rehearsal."""
    print(text, file=sys.stdout if Progress.prefix else CONSOLE, flush=True)


class Progress:
    """How far a stage is: a bar on a terminal, elsewhere a plain line now and then.

    Args:
        stage: the stage's name.
        total: units of work in all.
        unit: their name, for example "tokens".
        every: least seconds between two plain lines.
    """

    stage_now = "start-up"  # the stage that began last
    prefix = ""  # of stages: "rehearsal: " in one, which shows no progress
    on_stage: Callable[[], None] = staticmethod(lambda: None)  # called where a stage begins

    def __init__(self, stage: str, total: int, unit: str, every: float = 15.0) -> None:
        Progress.stage(stage)
        self.stage, self.total, self.unit, self.every = stage, total, unit, every
        self.done = self.resumed = 0
        self.note = ""
        self.started = self.last = time.monotonic()
        self.ended: float | None = None
        self.bar = None
        if CONSOLE.isatty() and not Progress.prefix:
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, desc=stage, unit=f" {unit}", unit_scale=True, file=CONSOLE,
                dynamic_ncols=True,
            )  # fmt: skip

    def advance(self, n: int, note: str = "") -> None:
        """Counts `n` more units as done; `note` is shown beside the figures."""
        self.done = min(self.done + n, self.total)
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(self.done - self.bar.n)
        elif time.monotonic() - self.last >= self.every and self.done < self.total:
            self.last = time.monotonic()
            left = self.seconds() * (self.total - self.done) / max(self.done, 1)
            self._line(f"{100 * self.done / self.total:3.0f}%, {left:.0f} s left")

    @classmethod
    def stage(cls, name: str) -> None:
        """Begins a stage that has no bar."""
        cls.stage_now = cls.prefix + name
        cls.on_stage()

    def resume(self, done: int, seconds: float) -> None:
        """Counts what an earlier attempt has done, and the time it took."""
        self.started -= seconds
        self.done = self.resumed = done
        if self.bar is not None:
            self.bar.start_t -= seconds
            self.bar.update(done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, failed: type | None, *_: object) -> None:
        if not failed:
            self.close()

    def seconds(self) -> float:
        """Since the stage began, to its end."""
        return (self.ended or time.monotonic()) - self.started

    def close(self) -> None:
        """Ends the bar, or prints the stage's last line; none where nothing was left to do."""
        self.ended = time.monotonic()
        if self.resumed == self.total > 0:
            return
        if self.bar is not None:
            self.bar.close()
        else:
            self._line(f"done in {self.seconds():.0f} s")

    def _line(self, state: str) -> None:
        note = f", {self.note}" if self.note else ""
        if not Progress.prefix:
            print_line(f"{self.stage}: {state}{note}")
