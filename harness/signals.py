"""Signals that ask the process to end, and ends that nothing may hold up."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from harness.errors import text_of
from harness.start import ENDS, WATCH

GRACE = 5.0  # seconds in which what was told to end, or has failed, must have ended


class Ended(BaseException):
    """Raised by a signal that asks the process to end."""


def signal_of(error: BaseException) -> signal.Signals:
    """The signal behind an `Ended`, or a KeyboardInterrupt."""
    return signal.Signals.__members__.get(text_of(error), signal.SIGINT)


class Signals:
    """Inside, signals that ask for an end raise `Ended` in the main thread, Ctrl-C as ever.

    Once it is `over` they don't: last words are not cut short. Where an `Ended` has not ended the
    command within `GRACE` (the main thread is in C code, or an edit swallows it), `give_up` is
    called from another thread, with the signal.
    """

    def __init__(self, give_up: Callable[[Ended], NoReturn]) -> None:
        self.give_up, self.over = give_up, threading.Event()

    def __enter__(self) -> Signals:
        self.stock: dict[int, Any] = {}
        self.installed = threading.current_thread() is threading.main_thread()
        if self.installed:
            # Not where it is ignored (nohup), or an edit's own.
            stock = signal.SIG_DFL, signal.default_int_handler, WATCH.told_to_end
            for number in (*ENDS, signal.SIGINT):
                if signal.getsignal(number) in stock:
                    self.stock[number] = signal.signal(number, self._raise)
            self.hook, sys.unraisablehook = sys.unraisablehook, self._send_again
            self.reading, self.writing = os.pipe()
            os.set_blocking(self.writing, False)
            self.wakeup = signal.set_wakeup_fd(self.writing, warn_on_full_buffer=False)
            os.register_at_fork(after_in_child=self._in_child)
            threading.Thread(target=self._insist, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.installed:
            signal.set_wakeup_fd(self.wakeup)
            os.close(self.writing)
            sys.unraisablehook = self.hook
            for number, handler in self.stock.items():
                signal.signal(number, handler)

    def _in_child(self) -> None:
        """In a process that an edit forks: a signal to it ends it alone, and says nothing."""
        if self.installed and not self.over.is_set():
            signal.set_wakeup_fd(-1)
            for number in self.stock:
                signal.signal(number, signal.SIG_DFL)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if not self.over.is_set():
            told = signal.Signals(number)
            raise KeyboardInterrupt if told is signal.SIGINT else Ended(told.name)

    def _send_again(self, swallowed: Any) -> None:
        """`sys.unraisablehook`: what a finalizer raises is lost, so the signal is sent again."""
        if not isinstance(swallowed.exc_value, (KeyboardInterrupt, Ended)):
            sys.__unraisablehook__(swallowed)
            return
        number = signal_of(swallowed.exc_value)
        threading.Timer(0.1, os.kill, [os.getpid(), number]).start()

    def _insist(self) -> None:
        """Reads the signals as they come; they do so before Python's handlers are called."""
        with open(self.reading, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                # Not at a Ctrl-C: a debugger goes on.
                ours = number[0] in ENDS and signal.getsignal(number[0]) == self._raise
                if ours and not self.over.wait(GRACE):
                    self.give_up(Ended(signal.Signals(number[0]).name))


def leave_within(seconds: float, status: int) -> None:
    """Ends the process by then, whatever waits for what: for a thread that never returns."""
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()
