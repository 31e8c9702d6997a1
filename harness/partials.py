"""What is half-written: marked while its process writes it, removed once that process is gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = ".partial-"


def partial_in(folder: Path) -> Path:
    """Where this thread may write what is not whole yet."""
    return folder / f"{PREFIX}{os.getpid()}-{threading.get_ident()}"


def mark(descriptor: int) -> None:
    """Holds an open file or folder as this process's, until it is closed or the process ends."""
    with contextlib.suppress(OSError):  # a file system without locks: it is never taken for left
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def paths_below(folder: Path) -> Iterator[Path]:
    """All paths below a folder that others write too: what goes meanwhile is passed over."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in (*folders, *files))


def remove_left(root: Path) -> None:
    """Removes what processes that are gone have left half-written in a folder and those below."""
    for path in [path for path in paths_below(root) if path.name.startswith(PREFIX)]:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < 1:  # perhaps begun just now, not yet marked
                continue
            descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an OSError where it lives
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)


def temporary_dir() -> Path:
    """The user's own folder for temporary files of this project."""
    return Path(tempfile.gettempdir()) / f"parametric-sae-{os.getuid()}"


@contextlib.contextmanager
def scratch_dir() -> Iterator[Path]:
    """A temporary folder, each time another; what a kill leaves of it, the next start removes."""
    place = temporary_dir()
    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{partial_in(place).name}-", dir=place))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        mark(descriptor)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)
