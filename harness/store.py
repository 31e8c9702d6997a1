"""What outlives a run: results and tensors under all that they depend on, in the user's cache."""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash
from filelock import FileLock, Timeout
from torch import Tensor

from harness.console import print_line
from harness.errors import ExperimentError, first_line
from harness.ledger import LEDGER
from harness.observation import OBSERVED
from harness.partials import mark, partial_in, paths_below, temporary_dir

STORE_GB = 20.0  # of paid-for work kept in the cache; the least recently used goes first
ACTIVATIONS_GB = 4.0  # of a training, or of an evaluation; larger ones are made anew in each run


def cache_dir() -> Path:
    """What outlives a run: `$XDG_CACHE_HOME/parametric-sae`, by default under `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "parametric-sae"


def store_dir() -> Path:
    """What `make clean-cache` empties. A folder for each kind of work."""
    return cache_dir() / "store"


def place_for(kind: str) -> Path:
    """A folder of the cache that can be written; where the cache can't, a temporary one.

    Raises:
        ExperimentError: neither can be written.
    """
    for folder in (cache_dir() / kind, temporary_dir() / kind):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    raise ExperimentError(
        f"no place for a log: neither {cache_dir()} nor {temporary_dir()} can be written; "
        "set XDG_CACHE_HOME to a folder that can"
    )


def new_log(run_name: str) -> Path:
    """An empty log file for this attempt, outside `run_i/` so that it outlives it."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = place_for("logs") / f"{run_name[:60]}-{stamp}-{os.getpid()}.log"
    path.touch()
    return path


def write_whole(
    folder: Path,
    write: Callable[[BinaryIO], Any],
    name: Callable[[Path], str],
    durable: bool = True,
) -> Path:
    """Writes a file that is there as a whole or not at all, in the place of one of its name.

    Args:
        name: of the file; it is called with a path to what was written.
        durable: it is on the disk itself before it takes the other one's place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = partial_in(folder)
    try:
        with partial.open("wb") as file:
            mark(file.fileno())
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            return partial.replace(folder / name(partial))
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Writes the whole file or nothing: readers never see a part of it."""
    write_whole(path.parent, lambda file: file.write(text.encode()), lambda _: path.name)


def write_json(path: Path, record: object) -> None:
    """Writes JSON atomically. A NaN or an infinity in it is a ValueError: neither is JSON."""
    write_atomic(path, json.dumps(record, indent=1, allow_nan=False, sort_keys=False) + "\n")


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: Path) -> str:
    """32 digits of a file's content, for damage that nobody meant; seven times as fast to make."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def digest(key: object) -> str:
    """32 digits that stand for JSON."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def take_lock(path: Path) -> FileLock | None:
    """A lock that ends with `release` or with the process; None where another one is held.

    On a file system without locks nothing is held: a mark in their place would outlive a kill.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    return lock


class Codec(NamedTuple):
    """How a value becomes a file: the ending of its name, and what writes and reads it."""

    suffix: str
    write: Callable[[Any, BinaryIO], None]
    read: Callable[[Path], Any]


def write_tensors(value: Any, file: BinaryIO) -> None:
    """Writes tensors, numbers, strings and None, in dicts, lists and tuples.

    Raises:
        TypeError: there is something else in it. OSError: the disk is full.
    """
    sums = torch.serialization.get_crc32_options()
    try:
        # A shelf has a checksum of the whole file; those of its parts take most of the time.
        torch.serialization.set_crc32_options(False)
        torch.save(plain(value), file)
    except RuntimeError as error:  # torch's own words for a full disk don't name it
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    finally:
        torch.serialization.set_crc32_options(sums)


def read_tensors(path: Path) -> Any:
    """What `write_tensors` wrote, tensors on the CPU. Runs no code that the file may hold."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def plain(value: Any, name: str = "it") -> Any:
    """A copy of what `write_tensors` takes; its tensors on the CPU, and no views of larger ones.

    Args:
        name: what the value is called where it can't be taken.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, dict):
        return {plain(k, name): plain(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = (plain(item, f"{name}.{n}") for n, item in enumerate(value))
        return list(items) if isinstance(value, list) else tuple(items)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # a plain one, where numpy's are these too
    if value is None:
        return None
    raise TypeError(f"{name} is a {type(value).__name__}")


JSON = Codec(
    ".json",
    lambda value, file: file.write(json.dumps(value).encode()),
    lambda path: json.loads(path.read_text()),
)
TENSORS = Codec(".pt", write_tensors, read_tensors)


class Shelf:
    """A folder of the store. Its files are whole: their names hold their `checksum`.

    Args:
        kind: what they are, in words. codec: their form.
        key: all that they depend on, as JSON, where they have a folder for themselves.
    """

    def __init__(self, kind: str, codec: Codec, key: dict[str, Any] | None = None) -> None:
        self.kind, self.codec = kind, codec
        self.folder = store_dir() / kind.replace(" ", "_")
        if key is not None:
            self.folder /= digest(key)
        self.n_put, self.complained = 0, False

    def find(self, name: str) -> Any:
        """The value of that name; None where there is none. A damaged file is set aside."""
        for path in self.folder.glob(f"{name}.*{self.codec.suffix}"):
            with contextlib.suppress(OSError):  # another process has put a later one in its place
                if checksum(path) == path.name.split(".")[-2]:
                    with contextlib.suppress(OSError):
                        os.utime(path)  # used now: see `evict`
                    return self.codec.read(path)
                aside = path.with_name(f"{path.name}.damaged")
                path.replace(aside)
                print_line(f"{path} is damaged: set aside as {aside.name}, and made again")
        return None

    def put(self, name: str, value: Any, durable: bool = True) -> bool:
        """Puts a value in the place of that of the same name.

        Returns:
            whether it could be written. It isn't where computing it has read what its key lacks:
            in a branch that the rehearsal doesn't take, under a name that stands nowhere.
        Raises:
            TypeError: the value is none that the codec writes.
        """
        def named(partial: Path) -> str:
            return f"{name}.{checksum(partial)}{self.codec.suffix}"

        if new := OBSERVED.unforeseen(self.kind):
            LEDGER.says(
                f"{self.kind}: not kept, since it depends on what the rehearsal didn't come to: "
                f"{', '.join(new[:3])}"
            )
            return False
        try:
            write = functools.partial(self.codec.write, value)
            path = write_whole(self.folder, write, named, durable)
            for other in self.folder.glob(f"{name}.*{self.codec.suffix}"):
                if other != path:
                    other.unlink(missing_ok=True)
            if self.n_put % 32 == 0:  # it looks at every file of the store
                evict()
        except OSError as error:
            self.complain(error)
            return False
        self.n_put += 1
        return True

    def complain(self, error: Exception) -> None:
        """Says, once, that nothing can be kept: it costs time, not results."""
        if not self.complained:
            why = f"{store_dir()} ({first_line(error)})"
            print_line(f"{self.kind} can't be kept in {why}: this run goes on without")
        self.complained = True

    def lock(self) -> FileLock | None:
        """Keeps what is here from `evict`; None where another process has done so."""
        return take_lock(self.folder / "lock")


def _stored_files() -> Iterator[tuple[float, int, Path]]:
    """The files of the store: when each was last used, its bytes, where it is."""
    for path in paths_below(store_dir()):
        with contextlib.suppress(OSError):  # another process has removed it
            if path.is_file() and path.name != "lock":
                yield path.stat().st_mtime, path.stat().st_size, path


def evict() -> None:
    """Removes the least recently used files down to `STORE_GB`; folders in use, locked, stay."""
    found = sorted(_stored_files())
    excess = sum(size for _, size, _ in found) - STORE_GB * 1e9
    for _, size, path in found:
        if excess <= 0:
            return
        guard = path.parent / "lock"
        with contextlib.suppress(OSError):  # filelock's Timeout is one
            with FileLock(guard, blocking=False) if guard.exists() else contextlib.nullcontext():
                path.unlink()
                excess -= size


def clean_cache() -> None:
    """Empties the store; logs stay."""
    size = sum(size for _, size, _ in _stored_files())
    shutil.rmtree(store_dir(), ignore_errors=True)
    print(f"{store_dir()} emptied: {size / 1e6:.1f} MB; logs stay in {cache_dir() / 'logs'}")


def cached(kind: str, key: dict[str, Any] | None, compute: Callable[..., Any], *args: Any) -> Any:
    """What `compute(*args)` returns, from the store where an earlier run has left it.

    See `cached_each`.
    """
    return cached_each(kind, {"": key}, lambda _: [("", compute(*args))])[""]


def cached_each(
    kind: str,
    keys: dict[str, dict[str, Any] | None],
    compute: Callable[[list[str]], Iterable[tuple[str, Any]]],
) -> dict[str, Any]:
    """Results by name: from the store where an earlier run has left them, the others computed.

    Args:
        kind: what they are, in words. keys: by name, all that a result depends on, as JSON; None:
            it is computed and not kept.
        compute: gives the results of these names, each as (name, result); one is kept before the
            next is asked for, so that a kill costs the one that it was at.
    Returns:
        the results as JSON has them.
    """
    shelf = Shelf(kind, JSON)
    keys = json.loads(json.dumps(dict.fromkeys(keys) if LEDGER.rehearsing else keys))
    found = {}
    for name, key in keys.items():
        stored = shelf.find(digest(key)) if key is not None else None
        if stored is not None and stored["key"] == key:
            found[name] = stored["value"]
    if found:
        LEDGER.reuses(kind, part=f" of {', '.join(found)}" if len(found) < len(keys) else "")
    missing = [name for name in keys if name not in found]
    with OBSERVED.computing(kind):
        for name, value in compute(missing) if missing else ():
            if (key := keys.get(name)) is not None:
                value = json.loads(json.dumps(value))
                if shelf.put(digest(key), {"key": key, "value": value}):
                    LEDGER.keeps(kind)
            found[name] = value
    return {name: found[name] for name in keys}


def pinned(kind: str, key: dict[str, Any], compute: Callable[..., Any], *args: Any) -> Any:
    """`cached`, for what is no result: found and kept in a rehearsal too, and in no ledger."""
    shelf = Shelf(kind, JSON)
    if (value := shelf.find(digest(key))) is None:
        value = compute(*args)
        shelf.put(digest(key), value)
    return value


class TensorCache:
    """Tensors that are kept for the next run, in a file for each name.

    A thread writes them, one file at a time, so that what comes next needn't wait.

    Args:
        kind: what they are, in words. key: all that they depend on, as JSON; None: none is kept.
    """

    def __init__(self, kind: str, key: dict[str, Any] | None) -> None:
        self.shelf = Shelf(kind, TENSORS, key)
        self.on = key is not None and not LEDGER.rehearsing
        self._turn = threading.RLock()
        self._writer = ThreadPoolExecutor(1, "store")
        self._writing: Future | None = None

    def find(self, name: str) -> Any:
        """What `keep` was given, tensors on the CPU; None where there is none, or a damaged one."""
        found = self.shelf.find(name) if self.on else None
        if found is not None:
            LEDGER.reuses(self.shelf.kind)
        return found

    def keep(self, name: str, value: Any) -> None:
        """Begins to write what `write_tensors` takes; it must not change until `flush` returns."""
        with self._turn:
            self.flush()
            if self.on:
                self._writing = self._writer.submit(self._write, name, value)

    def _write(self, name: str, value: Any) -> None:
        self.on = self.shelf.put(name, value, durable=False)
        if self.on:
            LEDGER.keeps(self.shelf.kind)

    def flush(self) -> None:
        """Returns when all is written."""
        with self._turn:
            writing, self._writing = self._writing, None
            if writing is not None:
                writing.result()

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, or has returned to an earlier run."""
        found = self.find(name)
        if found is None:
            with OBSERVED.computing(self.shelf.kind):
                found = compute()
            self.keep(name, found)
        return found
