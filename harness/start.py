"""What has to be read before the libraries: imports take seconds, in which files may be edited.

Where experiment.py is the program, this speaks until `launch` does: of an import that fails, of a
signal in these seconds, of an end before `launch` was called. Before this, Python itself speaks: a
syntax error in experiment.py is told in its own form, with status 1, and no line of it runs.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from harness.errors import last_words, place_of, redact, text_of

if sys.platform == "win32":
    sys.exit("experiment.py needs Linux or macOS: on Windows, run it in WSL")

STARTED = time.monotonic()
HERE = Path(__file__).resolve().parent.parent
STAGE = "start-up"
ENDS = tuple(  # signals that ask a process to end; SIGINT is a KeyboardInterrupt
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2")
)

PROGRAM = getattr(sys.modules["__main__"], "__file__", None) or ""  # none in a notebook
VARIABLES = {  # that the libraries read when they start
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the same seed on the same machine: the same weights
    "TOKENIZERS_PARALLELISM": "true",
    # Threads that wait don't spin: beside other jobs a run took half to a third of the time.
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
for name in VARIABLES if PROGRAM else ():  # a notebook's own stay as they are
    os.environ.setdefault(name, VARIABLES[name])
# What torchrun tells each process. Of threads it allows one, where nothing was said: figures are to
# be those of a single process, bit for bit.
OF_TORCHRUN = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)  # fmt: skip
if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
    del os.environ["OMP_NUM_THREADS"]

ENVIRON_AT_START = {  # scikit-learn, for one, adds to it when it is imported
    name: value for name, value in os.environ.items()
    if name not in OF_TORCHRUN and not name.startswith("TORCHELASTIC_")
}  # fmt: skip


class _Watch:
    """Last words for a program that fails, or is told to end, while nothing else can speak.

    Attributes:
        program: whether experiment.py is the program. launched: whether `launch` has taken over.
        status: what it has ended with.
    """

    def __init__(self) -> None:
        self.program, self.launched, self.status = False, False, None

    def begin(self) -> None:
        """Before the libraries are imported: for millions of objects that stay, no collection."""
        gc.disable()
        self.program = True
        sys.excepthook = self.failed
        atexit.register(self.ended)
        for number in ENDS:
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup has it ignored
                signal.signal(number, self.told_to_end)

    def failed(self, kind: type, error: BaseException, trace: TracebackType | None) -> None:
        """`sys.excepthook`: the traceback, and last words below it."""
        self.launched = True  # `ended` has nothing to add
        if isinstance(error, KeyboardInterrupt):
            self.leave(signal.SIGINT)
        sys.__excepthook__(kind, error, trace)
        cause = f"{kind.__name__}: {redact(text_of(error))}"
        self.say(cause, at=place_of(error), to_do="mend it, and give the same command again")

    def told_to_end(self, number: int, frame: FrameType | None) -> NoReturn:
        """A signal's handler, but for while the command has its own."""
        self.leave(signal.Signals(number))

    def leave(self, told: signal.Signals) -> NoReturn:
        """Ends the process at a signal; a command that has ended keeps its status."""
        if self.status is None:
            self.say(f"it was told to end ({told.name})", to_do="give the same command again")
        os._exit(128 + told if self.status is None else self.status)

    def ended(self) -> None:
        """At Python's end: status 1 and words where `launch` was never reached."""
        if not self.launched:
            sys.stdout.flush()
            self.say(
                "it ended before it called launch, so that nothing was run",
                to_do="look at the end of experiment.py, and for calls of sys.exit in it",
            )
            os._exit(1)

    def say(self, cause: str, **more: str) -> None:
        print(last_words(STAGE, cause, **more), file=sys.stderr, flush=True)


def _open_closed_streams() -> None:
    """Standard streams that were closed (`>&-`) lead nowhere, and not into the next file opened."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, mode, closefd=False))


def _sources() -> dict[Path, str]:
    """The project's own Python files, and those a user has put beside them."""
    files = [*HERE.glob("*.py"), *HERE.glob("[a-z]*/*.py"), *HERE.glob("[a-z]*/*/*.py")]
    left_out = ("tests", "bench", "findings", "figures", "run_")
    return {
        file: file.read_text(encoding="utf-8")
        for file in files
        if not file.relative_to(HERE).parts[0].startswith(left_out)
        and not file.parent.name.startswith("run_")  # in a profile's folder
    }


def source_at_start(file: Path) -> str:
    """What stood in a file when the command began; of one that came later, what stands there."""
    return SOURCES_AT_START.get(file) or file.read_text(encoding="utf-8")


_open_closed_streams()
WATCH = _Watch()
if Path(PROGRAM).resolve() == HERE / "experiment.py":
    WATCH.begin()
SOURCES_AT_START = _sources()
