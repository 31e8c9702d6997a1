"""Commands as processes of their own, without the 8 seconds in which their libraries import.

A server imports what LIBRARIES names, once, and forks (multiprocessing's "forkserver"). The
project's own files are not among them: a child reads those of its folder, as they are by then.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = [
    "torch",
    "sae_bench.custom_saes.base_sae",
    "sae_bench.evals.core.main",
    "sae_bench.evals.sparse_probing.main",
    "sae_lens",
    "transformer_lens",
    "transformers.models.gemma2.modeling_gemma2",
    "datasets",
    "psutil",
]
CONTEXT = multiprocessing.get_context("forkserver")
PINS = hasattr(os, "sched_setaffinity")  # macOS doesn't
CORES = itertools.cycle(sorted(os.sched_getaffinity(0)) if PINS else [0])


def environment(hf_home: Path, **variables: str) -> dict[str, str]:
    """This process's, without a network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return kept | offline | {"HF_HOME": str(hf_home)} | variables


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Processes started here have one: at toy sizes threads cost more than they save."""
    if not PINS:
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {next(CORES)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def start_server(hf_home: Path) -> None:
    """With Hugging Face's caches in a folder, for all its children: libraries read that at import.

    On one core libraries start no threads, which would not come along into a child.
    """
    before = dict(os.environ)
    os.environ |= environment(hf_home)
    try:
        with one_core():
            CONTEXT.set_forkserver_preload(LIBRARIES)
            first = CONTEXT.Process(target=os.getpid)  # it starts once all is imported
            first.start()
            first.join()
    finally:
        os.environ.clear()
        os.environ |= before


class Forked:
    """`python script arguments` in a folder, as subprocess.Popen would start it, in a new session.

    See `one_core`.
    """

    def __init__(
        self,
        folder: Path,
        script: str,
        *arguments: str,
        environment: dict[str, str],
    ) -> None:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
        self.process = CONTEXT.Process(
            target=_run,
            args=(str(folder), [script, *arguments], environment, next(CORES),
                  *(write for _, write in pipes)),
        )  # fmt: skip
        self.process.start()
        self.pid = self.process.pid
        for _, write in pipes:
            write.close()
        self.stdout, self.stderr = (open(os.dup(read.fileno())) for read, _ in pipes)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        """The exit status; subprocess.TimeoutExpired after so many seconds."""
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.returncode

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """The rest of standard output and of standard error, once it has ended."""
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            return texts[0].result(), texts[1].result()


def _run(
    folder: str,
    arguments: list[str],
    environment: dict[str, str],
    core: int,
    stdout: multiprocessing.connection.Connection,
    stderr: multiprocessing.connection.Connection,
) -> None:
    """In the child: becomes what a fresh Python would be, and runs the script as the program."""
    os.setsid()
    if PINS:
        os.sched_setaffinity(0, {core})
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    stdout.close()
    stderr.close()
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    sys.argv = arguments
    own = {"", str(ROOT), str(ROOT / "tests")}
    here = str(Path(arguments[0]).resolve().parent)
    sys.path = [here, *(place for place in sys.path if place not in own)]
    runpy.run_path(arguments[0], run_name="__main__")
