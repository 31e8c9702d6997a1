"""What outlives a run: results and tensors under all that they depend on, in the user's cache."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.console import Progress, print_line
from harness.errors import ExperimentError, first_line

STORE_GB = 20.0  # of paid-for work kept in the cache; the least recently used goes first
ACTIVATIONS_GB = 4.0  # of a training, or of an evaluation; larger ones are made anew in each run
PINS = "revisions"  # of data sets with loading scripts: kept, but no result


def cache_dir() -> Path:
    """What outlives a run: `$XDG_CACHE_HOME/parametric-sae`, by default under `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "parametric-sae"


def place_for(kind: str) -> Path:
    """A folder of the cache that can be written; where the cache can't, a temporary one.

    Raises:
        ExperimentError: neither can be written.
    """
    temporary = Path(tempfile.gettempdir()) / f"parametric-sae-{os.getuid()}"
    for folder in (cache_dir() / kind, temporary / kind):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    raise ExperimentError(
        f"no place for a log: neither {cache_dir()} nor {temporary} can be written; "
        "set XDG_CACHE_HOME to a folder that can"
    )


def new_log(run_name: str) -> Path:
    """An empty log file for this attempt, outside `run_i/` so that it outlives it."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = place_for("logs") / f"{run_name}-{stamp}-{os.getpid()}.log"
    path.touch()
    return path


def write_atomic(path: Path, text: str) -> None:
    """Writes the whole file or nothing: readers never see a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, record: object) -> None:
    """Writes JSON atomically. A NaN or an infinity in it is a ValueError: neither is JSON."""
    write_atomic(path, json.dumps(record, indent=1, allow_nan=False, sort_keys=False) + "\n")


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def store_dir() -> Path:
    """What `make clean-cache` empties. A folder for each kind of work."""
    return cache_dir() / "store"


def digest(key: object) -> str:
    """32 digits that stand for JSON."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def set_aside(path: Path) -> None:
    """Takes a damaged file out of use, and says so."""
    aside = path.with_name(f"{path.name}.damaged")
    print_line(f"{path} is damaged: set aside as {aside.name}, and made again")
    path.replace(aside)


class Ledger:
    """What the store has given to this attempt and holds of it, and the key of its training.

    Attributes:
        kept: what an attempt that fails goes on from. reused: what was not repeated.
        key: all that the training of this attempt depends on, or of the attempt before.
    """

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.reused: list[str] = []
        self.key: dict[str, Any] | None = None

    def keeps(self, what: str) -> None:
        """Remembers what the store holds of this attempt, for its last words."""
        if what not in ("rehearsal", PINS):
            first = what.split(" up to ")[0]
            self.kept = [w for w in self.kept if not w.startswith(first)] + [what]

    def reuses(self, what: str, quietly: bool = False, part: str = "") -> None:
        """Says once that something is not repeated, and remembers it for config.json."""
        if what not in (PINS, *self.reused):
            self.reused.append(what)
            self.keeps(what)
            if not quietly:
                print_line(f"{what}{part}: kept, as all that it depends on is unchanged; not repeated")

    def changed(self, key: dict[str, Any]) -> str:
        """In what the key of this training differs from the attempt's before: at most six names."""
        before, self.key = self.key or {}, key
        differences = []
        for kind, value in key.items() if before else ():
            old = before.get(kind)
            if isinstance(value, dict) and isinstance(old, dict):
                names = [n for n in (*value, *(o for o in old if o not in value))
                         if json.dumps(value.get(n)) != json.dumps(old.get(n))]  # fmt: skip
                differences += [f"{kind} {name}" for name in names]
            elif json.dumps(value) != json.dumps(old):
                differences.append(kind)
        more = f" and {len(differences) - 6} more" if len(differences) > 6 else ""
        return ", ".join(differences[:6]) + more


LEDGER = Ledger()


def cached(kind: str, key: dict[str, Any] | None, compute: Callable[..., Any], *args: Any) -> Any:
    """What `compute(*args)` returns, from the store where an earlier run has left it.

    See `cached_each`.
    """
    return cached_each(kind, {"": key}, lambda _: {"": compute(*args)})[""]


def cached_each(
    kind: str,
    keys: dict[str, dict[str, Any] | None],
    compute: Callable[[list[str]], dict[str, Any]],
) -> dict[str, Any]:
    """Results by name: from the store where an earlier run has left them, the others computed.

    Args:
        kind: what they are, in words. keys: by name, all that a result depends on, as JSON; None:
            it is computed and not kept, as in a rehearsal.
        compute: returns the results of the names it is given.
    Returns:
        the results as JSON has them. A damaged file is set aside and made again.
    """
    if Progress.prefix and kind != PINS:
        keys = dict.fromkeys(keys)
    keys = json.loads(json.dumps(keys))
    paths = {
        name: store_dir() / kind.replace(" ", "_") / f"{digest(key)}.json"
        for name, key in keys.items() if key is not None
    }  # fmt: skip
    found = {}
    for name, path in paths.items():
        if path.exists():
            try:
                stored = json.loads(path.read_text())
                if stored["key"] == keys[name] and stored["sha256"] == digest(stored["value"]):
                    mark_used(path)
                    found[name] = stored["value"]
                    continue
            except (OSError, ValueError, KeyError, TypeError):
                pass
            with contextlib.suppress(OSError):
                set_aside(path)
    if found:
        LEDGER.reuses(kind, part=f" of {', '.join(found)}" if len(found) < len(keys) else "")
    missing = [name for name in keys if name not in found]
    for name, value in (compute(missing) if missing else {}).items():
        if name not in paths:
            found[name] = value
            continue
        found[name] = value = json.loads(json.dumps(value))
        record = {"key": keys[name], "sha256": digest(value), "value": value}
        try:
            write_atomic(paths[name], json.dumps(record))
            evict()
            LEDGER.keeps(kind)
        except OSError as error:
            cannot_keep(kind, error)
    return {name: found[name] for name in keys}


def cannot_keep(what: str, error: Exception) -> None:
    """Says so: a store that can't be written costs time, not results."""
    print_line(f"{what} can't be kept in {store_dir()} ({first_line(error)}): this run goes on without")


def mark_used(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)


def evict() -> None:
    """Removes the least recently used files of the store until it is under `STORE_GB`.

    Work that a process is at is left alone: its folder is locked.
    """
    found = []
    for path in store_dir().rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and path.name != "lock":
                found.append((path.stat().st_mtime, path.stat().st_size, path))
    excess = sum(size for _, size, _ in found) - STORE_GB * 1e9
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            guard = path.parent / "lock"
            held = take_lock(guard) if guard.exists() else -1
            if held is None:
                continue
            path.unlink()
            excess -= size
            if held >= 0:
                os.close(held)


def clean_cache() -> None:
    """Empties the store; logs stay."""
    size = sum(path.stat().st_size for path in store_dir().rglob("*") if path.is_file())
    shutil.rmtree(store_dir(), ignore_errors=True)
    print(f"{store_dir()} emptied: {size / 1e6:.1f} MB; logs stay in {cache_dir() / 'logs'}")


def take_lock(path: Path) -> int | None:
    """A lock that ends with the process: its descriptor, or None where another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


class TensorCache:
    """Tensors that are kept for the next run, in a file for each name.

    A thread writes them, one file at a time, so that what comes next needn't wait.

    Args:
        kind: what they are, in words. key: all that they depend on, as JSON; None: none is kept.
    """

    def __init__(self, kind: str, key: dict[str, Any] | None) -> None:
        self.kind, self.on = kind, key is not None and not Progress.prefix
        self.folder = store_dir() / kind.replace(" ", "_") / digest(key)
        self.written = 0
        self._turn = threading.Lock()
        self._writer = ThreadPoolExecutor(1, "store")
        self._writing: Future | None = None

    def find(self, name: str) -> Any:
        """What `keep` was given, tensors on the CPU; None where there is none, or a damaged one."""
        for path in self.folder.glob(f"{name}.*.safetensors") if self.on else ():
            with contextlib.suppress(OSError):
                if sha256_file(path)[:32] == path.name.split(".")[-2]:
                    mark_used(path)
                    LEDGER.reuses(self.kind)
                    return read_state(path)
                set_aside(path)
        return None

    def keep(self, name: str, state: Any) -> None:
        """Begins to write what `write_state` takes, which must not change until `flush` returns."""
        with self._turn:
            self._wait()
            if self.on:
                self._writing = self._writer.submit(self._write, name, state)

    def flush(self) -> None:
        """Returns when all is written."""
        with self._turn:
            self._wait()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, name: str, state: Any) -> None:
        """A disk that is full costs the keeping alone."""
        from safetensors import SafetensorError

        partial = self.folder / f"partial-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_state(state, partial)
            partial.replace(self.folder / f"{name}.{sha256_file(partial)[:32]}.safetensors")
            if self.written % 32 == 0:  # it looks at every file of the store
                evict()
            self.written += 1
            LEDGER.keeps(self.kind)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            cannot_keep(self.kind, error)
            self.on = False

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, or has returned to an earlier run."""
        found = self.find(name)
        if found is None:
            found = compute()
            self.keep(name, found)
        return found


def write_state(state: object, path: Path) -> None:
    """Writes what `Checkpoints.save` takes as one safetensors file."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}

    def packed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous()
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[packed(k), packed(v)] for k, v in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [packed(item) for item in value]}
        return [packed(item) for item in value] if isinstance(value, list) else value

    save_file(tensors, path, metadata={"state": json.dumps(packed(state))})


def read_state(path: Path) -> Any:
    """What `write_state` wrote, tensors on the CPU."""
    from safetensors import safe_open

    def unpacked(value: Any) -> Any:
        if isinstance(value, list):
            return [unpacked(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return file.get_tensor(content)
        if kind == "tuple":
            return tuple(unpacked(item) for item in content)
        return {unpacked(k): unpacked(v) for k, v in content}

    with safe_open(path, "pt") as file:
        return unpacked(json.loads(file.metadata()["state"]))


def set_attributes(thing: object, attributes: dict[str, Any]) -> None:
    """Sets what `plain_attributes` returned, tensors on the device they had."""
    for name, value in attributes.items():
        old = getattr(thing, name, None)
        on = old.device if isinstance(old, torch.Tensor) else None
        setattr(thing, name, value.to(on) if isinstance(value, torch.Tensor) and on else value)


def plain_attributes(thing: object, strict: bool = True) -> dict[str, Any]:
    """What an object holds beside parameters, modules, optimizers and generators.

    So that what an edit adds to a trainer or an SAE is saved with it, and not lost.

    Raises:
        TypeError: `strict`, and it holds something that can't be stored as tensors and JSON.
    """
    harmless = (
        torch.nn.Module, torch.nn.Parameter, torch.optim.Optimizer, torch.Generator, torch.device,
        torch.dtype,
    )  # fmt: skip

    def plain(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        if isinstance(value, dict):
            return all(plain(k) and plain(v) for k, v in value.items())
        return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))

    found = {}
    for name, value in vars(thing).items():
        if name.startswith("_") or isinstance(value, harmless) or dataclasses.is_dataclass(value):
            continue
        if plain(value):
            found[name] = value
        elif strict and not callable(value):
            raise TypeError(f"{type(thing).__name__}.{name} is a {type(value).__name__}")
    return found
