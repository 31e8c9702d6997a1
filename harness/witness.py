"""Last words for a process that can't speak: it crashed in C code, or was killed.

`witnessed` starts this file as a process of its own. It reads what faulthandler writes into a pipe,
until the other process has said that it ends by itself, or is gone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.errors import last_words, redact

BY_ITSELF = b"\nended by itself\n"
LONGEST = 5.0  # seconds that the witness is waited for


@contextlib.contextmanager
def witnessed(log: Path, record: Path, stderr: int) -> Iterator[Callable[[], None]]:
    """Inside, the end of this process is told on a descriptor, standard error, if it can't itself.

    Args:
        log: gets the stack of a crash in C code. record: the attempt's own, see `RunLock`.
    Yields:
        what is called before `os._exit` by who has spoken.
    """
    command = [sys.executable, "-S", "-m", "harness.witness", str(log), str(record)]
    process = None
    with contextlib.suppress(OSError):  # no process can be started: this one goes on without
        process = subprocess.Popen(
            command, cwd=Path(__file__).parent.parent, bufsize=0, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip
        faulthandler.enable(process.stdin)

    def ends_by_itself() -> None:
        with contextlib.suppress(OSError, AttributeError):
            process.stdin.write(BY_ITSELF)

    try:
        yield ends_by_itself
    finally:
        faulthandler.disable()
        ends_by_itself()
        if process is not None:
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LONGEST)


def main(log: str, record: str) -> None:
    """The witness: waits, and speaks where the other process has not."""
    heard = b""
    while not heard.endswith(BY_ITSELF) and (part := sys.stdin.buffer.read1()):
        heard += part
    text = heard.removesuffix(BY_ITSELF).decode(errors="replace")
    with contextlib.suppress(OSError), open(log, "a") as file:
        file.write(text)
    if heard.endswith(BY_ITSELF):  # a process that it had forked may have crashed
        return
    known = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(Path(record).read_text())
    crashed = text.split("Current thread", 1)[-1]  # other threads stand above or below it
    place = re.search(r'File "[^"]*experiment\.py", line (\d+) in (\S+)', crashed)
    if fatal := re.search("Fatal Python error: (.*)", text):
        cause = f"a crash in C code ({fatal[1]})"
    else:
        cause = "it was killed (SIGKILL, as where memory runs out), or left by os._exit"
        with contextlib.suppress(KeyError):
            cause += (
                f"; it used {known['memory_gb']:.1f} GB, "
                f"the machine {known['machine_gb']:.1f} of {known['total_gb']:.1f}"
            )
    words = last_words(
        known.get("stage", "start-up") + known.get("rank", ""), redact(cause), log=log,
        at=f"experiment.py, line {place[1]}, in {place[2]}" if place else "",
        to_do="give the same command again: it goes on from what is kept",
    )  # fmt: skip
    print(words, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
