"""The plumbing of an experiment: nothing here is about sparse autoencoders, and nobody edits it.

Errors a user can act on, the protection of out_dir, progress lines, the place for library noise,
atomic records, the two forms of the language model, the adapters to SAE-Bench and SAELens, and
the verdict's arithmetic. torch is imported where it is used, since `plot.py` imports this file
and needs none. In names of tensors, B is batch, L sequence, D model dimension, F features, N rows.
"""

from __future__ import annotations

import abc
import argparse
import ast
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import errno
import faulthandler
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import queue
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from experiment import CustomSAE, Settings

HERE = Path(__file__).resolve().parent
ENVIRONMENT = dict(os.environ)  # as given: scikit-learn, for one, adds to it when it is imported
PLUMBING = Path(__file__).read_text(encoding="utf-8")  # as it runs, whatever is edited later

PRIMARY_KS = (1, 2, 5)  # the primary metric averages the SAE's probes of 1, 2 and 5 features
MAX_L0_RATIO = 1.2  # runs whose L0 differ by more than 20% are not compared
MIN_SEEDS = 3  # nor are runs that share fewer seeds
LOWER = {  # by stage, the settings that take less memory there
    "train": "batch, harvest_contexts or buffer_tokens",
    "core evaluation": "core_prompts",
    "sparse probing": "probe_llm_batch or probe_sae_batch",
}
LOOSE = ("llm_top_1_test_accuracy", "llm_top_2_test_accuracy")  # probes of few dimensions vary
DATA_GB = 5.0  # set aside for the probing data sets, which datasets stores twice
STREAM_RETRIES = 6  # of a broken connection in a row: a minute in all
NETWORK_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")
LAST_WORDS = 1500  # characters of standard error that a driver shows of a run that failed
STORE_GB = 20.0  # of paid-for work kept in the cache; the least recently used goes first
ACTIVATIONS_GB = 4.0  # of a training, or of an evaluation; larger ones are made anew in each run
PASSES = 8  # of the language model whose activations are stored in one file
SAVE_EVERY = 60.0  # seconds between two saves of a training, at least
SAVE_SHARE = 0.025  # of the time that saving may take
PINS = "revisions"  # of data sets with loading scripts: kept, but no result
NUMERIC = ("ATEN", "CUBLAS", "CUDA", "KMP", "MKL", "NVIDIA_TF32", "OMP", "PYTORCH", "TORCH")
HEARTBEAT = 5.0  # seconds between two notes of what an attempt is doing
POOL_FILES = 512  # files of tinylm's corpus from which passages are drawn at a time
MAY_RUN_CODE = (  # the named data sets: a loading script of theirs, and of no other, may run
    "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5", "codeparrot/github-code",
    "fancyzhx/ag_news", "Helsinki-NLP/europarl", "Skylion007/openwebtext",
    "monology/pile-uncopyrighted",
)  # fmt: skip
LOADING = threading.Lock()  # `datasets` has one place for loading scripts, which load_dataset moves
LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"
TRY_TINYLM = "SAE_PROFILE=tinylm make run OUT=run_try works now"
GET_ACCESS = f"accept its licence on its Hugging Face page and {LOG_IN}; {TRY_TINYLM}"
VERSIONED = (
    "torch", "transformers", "sae-bench", "sae-lens", "transformer-lens", "datasets",
    "numpy", "scikit-learn", "scipy", "tokenizers", "safetensors", "beartype", "jaxtyping",
)  # fmt: skip


class ExperimentError(Exception):
    """A failure whose message is the whole story: what was expected, what was found, what to do."""


# ---------------------------------------------------------------------------- places and files


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
    place = out_dir
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ExperimentError(
            f"--out_dir={out_dir} must be a folder that can be written, but {place} is "
            f"{'read-only' if place.is_dir() else 'a file'}; name another, or change that"
        )


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, complete or not."""
    if (folder / "final_info.json").exists():
        return True
    try:
        return {"run", "sha256"} <= json.loads((folder / "config.json").read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def prepare_out_dir(out_dir: Path) -> str | None:
    """Makes `out_dir`, writable and without results.

    A complete run that stands there (it has a final_info.json) is set aside as `out_dir.1`, `.2`,
    …. What an unfinished attempt left is removed: all that was paid for is in the store.

    Returns:
        a line that says what was set aside, or None.
    Raises:
        ExperimentError: the folder can't be made or written.
    """
    moved = None
    try:
        if (out_dir / "final_info.json").exists():
            number = 1
            while (aside := out_dir.with_name(f"{out_dir.name}.{number}")).exists():
                number += 1
            out_dir.rename(aside)
            moved = f"{out_dir} holds a complete run: set aside as {aside}"
        elif (out_dir / "config.json").exists():
            for folder in ("sae", "eval_results"):
                shutil.rmtree(out_dir / folder, ignore_errors=True)
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except OSError as error:
        raise ExperimentError(
            f"--out_dir={out_dir} must be a folder that can be written, but: "
            f"{error.strerror or error}; name another, or change its permissions"
        ) from error
    return moved


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


# ------------------------------------------------------- the store of work that was paid for


def store_dir() -> Path:
    """What `make clean-cache` empties. A folder for each kind of work."""
    return cache_dir() / "store"


def digest(key: object) -> str:
    """32 digits that stand for JSON."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def set_aside(path: Path) -> None:
    """Takes a damaged file out of use, and says so."""
    aside = path.with_name(f"{path.name}.damaged")
    say(f"{path} is damaged: set aside as {aside.name}, and made again")
    path.replace(aside)


def kept(kind: str, key: dict[str, Any] | None, compute: Callable[..., Any], *args: Any) -> Any:
    """What `compute(*args)` returns, from the store where an earlier run has left it.

    See `kept_each`.
    """
    return kept_each(kind, {"": key}, lambda _: {"": compute(*args)})[""]


def kept_each(
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
        Attempt.reuses(kind, part=f" of {', '.join(found)}" if len(found) < len(keys) else "")
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
            Attempt.keeps(kind)
        except OSError as error:
            cannot_keep(kind, error)
    return {name: found[name] for name in keys}


def cannot_keep(what: str, error: Exception) -> None:
    """Says so: a store that can't be written costs time, not results."""
    say(f"{what} can't be kept in {store_dir()} ({first_line(error)}): this run goes on without")


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


class Checkpoints:
    """A training as far as it has come, in the store under all that it depends on.

    One file, `{part done}.{the first 32 digits of its SHA-256}.safetensors`: tensors as such,
    everything else as JSON in its header.

    Args:
        key: all that the training depends on; None: nothing is kept.
    """

    def __init__(self, key: dict[str, Any] | None) -> None:
        self.key, self.lock, self.cost = key, None, 0.0
        self.saved = time.monotonic()
        if key is None:
            return
        self.folder = store_dir() / "training" / digest(key)
        try:
            self.lock = take_lock(self.folder / "lock")
        except OSError as error:
            cannot_keep("training", error)
            return
        if self.lock is None:
            say("training: another process is at the same one and saves it; this one doesn't save")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self) -> dict[str, Any] | None:
        """The state saved last, on the CPU; None where there is none that is whole."""
        if self.key is None:
            return None
        changed = Attempt.changed(self.key)
        same = "code, settings, model, versions and machine"
        for path in sorted(self.folder.glob("*.safetensors"), reverse=True):
            try:
                whole = sha256_file(path)[:32] == path.name.split(".")[-2]
                if whole:
                    state = read_state(path)
            except OSError:  # another process has put a later one in its place
                continue
            if not whole:
                with contextlib.suppress(OSError):
                    set_aside(path)
                continue
            mark_used(path)
            set_generators(state["generators"])
            part = float(path.name.rsplit(".", 2)[0])
            if part == 1:
                say(f"training: kept, as {same} are unchanged; not repeated")
            else:
                say(f"training: goes on at {100 * part:.0f}%, as {same} are unchanged")
            Attempt.reuses("training", quietly=True)
            Attempt.keeps("training" if part == 1 else f"training up to {100 * part:.0f}%")
            return state["state"]
        if changed:
            say(f"training: anew, as this differs from the last attempt: {changed}")
        return None

    def due(self) -> bool:
        """Whether to save: `SAVE_EVERY` has passed, and saving stays within `SAVE_SHARE`."""
        passed = time.monotonic() - self.saved
        return passed >= max(SAVE_EVERY, self.cost / SAVE_SHARE)

    def save(self, state: Callable[[], dict[str, Any]], part: float) -> None:
        """Puts a state in the place of the one before.

        Args:
            state: returns it: tensors, numbers, strings, None; in dicts, lists and tuples.
            part: of the training that is done; 1: all of it.
        """
        if self.lock is None:
            return
        began = time.monotonic()
        partial = self.folder / f"partial-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_state({"state": state(), "generators": generators()}, partial)
            with partial.open("rb") as file:  # down to the disk before it replaces the last one
                os.fsync(file.fileno())
            path = self.folder / f"{part:.6f}.{sha256_file(partial)[:32]}.safetensors"
            partial.replace(path)
            for other in self.folder.glob("*.safetensors"):
                if other != path:
                    other.unlink()
            evict()
            Attempt.keeps("training" if part == 1 else f"training up to {100 * part:.0f}%")
        except Exception as error:  # of what an edit has made of the state, too: training goes on
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            cannot_keep("training", error)
        self.saved = time.monotonic()
        self.cost = self.saved - began

    def close(self) -> None:
        """Lets other processes save the same training."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


class Resumable:
    """What `experiment.Trainer` needs to be saved between two steps.

    It has an `sae`, an `optimizer` and a `generator`; whatever else an edit gives to it or to its
    SAE as plain values is saved with them.
    """

    sae: CustomSAE
    optimizer: torch.optim.Optimizer
    generator: torch.Generator

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on."""
        return {
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "attributes": [plain_attributes(thing) for thing in (self, self.sae)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another trainer of the same SAE stood."""
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        for thing, attributes in zip((self, self.sae), state["attributes"]):
            set_attributes(thing, attributes)


class Course:
    """The course of a training: steps done and in all, its records and seconds, and its saving.

    Goes on from what an earlier attempt has saved. `with` opens train_log.jsonl and closes it.

    Args:
        log: train_log.jsonl.
        checkpoints: where it is saved, whenever a filling of the buffer is used up.
    """

    OWN = ("done", "n_steps", "timed", "shortened", "records", "seconds")  # attributes to save

    def __init__(self, settings: Settings, log: Path, checkpoints: Checkpoints) -> None:
        self.settings, self.log, self.checkpoints = settings, log, checkpoints
        self.done, self.n_steps = 0, settings.training_tokens // settings.batch
        self.timed = settings.budget_minutes is None
        self.shortened: str | None = None  # why it takes fewer steps than the settings say
        self.records: list[dict[str, Any]] = []
        self.seconds = {"seconds_harvest": 0.0, "seconds_training": 0.0}
        self.saved = checkpoints.load()
        for name in self.OWN if self.saved else ():
            setattr(self, name, self.saved[name])
        # A token counts when it is read, and when an SAE learns from it.
        self.per_step = (1 + len(settings.layers) * len(settings.seeds)) * settings.batch
        total = self.n_steps * self.per_step
        self.progress = Progress("train", total, "tokens read or learned")
        self.progress.resume(self.done * self.per_step, sum(self.seconds.values()))

    def __enter__(self) -> Course:
        self.file = self.log.open("w", encoding="utf-8")
        self.file.writelines(json.dumps(record) + "\n" for record in self.records)
        return self

    def __exit__(self, failed: type | None, *_: object) -> None:
        self.file.close()
        if not failed:
            self.progress.close()

    def measured(self, device: torch.device) -> dict[int, tuple[Tensor, float]]:
        """What SAEs are centred and scaled by, as it was saved; nothing where nothing was."""
        saved = self.saved["measured"] if self.saved else {}
        return {layer: (mean_D.to(device), scale) for layer, (mean_D, scale) in saved.items()}

    def restore(
        self, trainers: dict[Any, Any], shuffles: dict[int, torch.Generator], buffer: Any
    ) -> None:
        """Puts trainers, shuffles and the buffer where they stood when they were saved."""
        for key, trainer in trainers.items():
            trainer.load_state_dict(self.saved["trainers"][key])
        for seed, generator in shuffles.items():
            generator.set_state(self.saved["shuffles"][seed])
        buffer.load_state_dict(self.saved["buffer"])
        self.saved = None

    def next_steps(self) -> range:
        """The steps on the next filling of the buffer; empty at the end."""
        portion = max(self.settings.buffer_tokens // self.settings.batch, 1)
        return range(self.done, min(self.done + portion, self.n_steps))

    @contextlib.contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Adds the seconds that a block takes to `seconds[stage]`."""
        started = time.monotonic()
        yield
        self.seconds[stage] += time.monotonic() - started

    def add(self, records: list[dict[str, Any]]) -> None:
        """Writes records into the log."""
        self.records += records
        self.file.writelines(json.dumps(record) + "\n" for record in records)
        self.file.flush()

    def finish(
        self,
        steps: range,
        measured: dict[int, tuple[Tensor, float]],
        trainers: dict[Any, Any],
        shuffles: dict[int, torch.Generator],
        buffer: Any,
        evaluation_seconds: Callable[[dict], float],
    ) -> None:
        """After these steps: fits what is left into the budget, once, and saves all when it's due.

        Args:
            evaluation_seconds: estimates how long the evaluation of these SAEs will take.
        """
        self.done = steps.stop
        save = self.checkpoints.due() or self.done == self.n_steps
        if not self.timed and self.done >= 0.05 * self.n_steps:
            evaluation = evaluation_seconds({key: t.sae for key, t in trainers.items()})
            self.timed = save = True
            self.n_steps, self.shortened = fit_budget(
                self.n_steps, self.done, sum(self.seconds.values()), evaluation,
                self.settings.budget_minutes * 60,
            )  # fmt: skip
            self.progress.total = self.n_steps * self.per_step

        def state() -> dict[str, Any]:
            return {name: getattr(self, name) for name in self.OWN} | {
                "measured": measured,
                "trainers": {key: trainer.state_dict() for key, trainer in trainers.items()},
                "shuffles": {seed: shuffle.get_state() for seed, shuffle in shuffles.items()},
                "buffer": buffer.state_dict(),
            }

        if save:
            self.checkpoints.save(state, self.done / self.n_steps)


def generators() -> dict[str, Any]:
    """The states of the generators that code draws from unless it is given one."""
    import numpy
    import torch

    kind, keys, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), *rest),
        "python": random.getstate(),
    }


def set_generators(states: dict[str, Any]) -> None:
    """Sets what `generators` returned."""
    import numpy
    import torch

    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    random.setstate(states["python"])


class TensorFiles:
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
                    Attempt.reuses(self.kind)
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
            Attempt.keeps(self.kind)
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


class ActivationStore:
    """Harvested activations, kept for the next run on the same text and language model.

    A file holds those of `PASSES` forward passes, and where the text stands after them.

    Args:
        stream: the text. It is read, and its thread started, only from where the store ends.
        key: all that activations depend on; None: they are not kept.
    """

    def __init__(self, stream: TokenStream, key: dict[str, Any] | None) -> None:
        self.stream = stream
        self.number = 0  # of the next file
        self.after: dict[str, Any] | None = None  # where the text stands, if the stream doesn't
        self.files = TensorFiles("activations", key)
        self.reading = self.files.on

    def passes(self, n: int, harvest: Callable[[int], list[Tensor]]) -> list[Tensor]:
        """The activations of the next forward passes: n, or `PASSES` where they are kept.

        Args:
            harvest: makes that many passes on the stream: a tensor (layers, N, D) of each.
        """
        if not self.files.on:
            return harvest(n)
        name = f"{self.number:06d}"
        stored = self.files.find(name) if self.reading else None
        self.number += 1
        if stored is not None:
            self.after = stored["after"]
            return stored["acts"]
        self.reading = False
        if self.after is not None:
            self.stream.load_state_dict(self.after)
            self.after = None
        acts = harvest(PASSES)
        # The list is the caller's to change, while the tensors are still being written.
        self.files.keep(name, {"acts": list(acts), "after": self.stream.state_dict()})
        return acts

    def state_dict(self) -> dict[str, Any]:
        """Where the store and the text stand, once what it counts is on the disk."""
        self.files.flush()
        return {"number": self.number, "stream": self.after or self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another one stood."""
        self.number = state["number"]
        if not self.files.on:
            self.stream.load_state_dict(state["stream"])
        else:
            self.after = state["stream"]


class Buffered(abc.ABC):
    """Activations by the number of tokens, from what a subclass's `harvest` makes of the text.

    Args:
        lm, stream: the language model and its text.
        layers: whose residual streams.
        contexts: per forward pass.
        key: all that activations depend on: they are kept under it, for the next run.
    """

    def __init__(
        self,
        lm: LanguageModel,
        stream: TokenStream,
        layers: tuple[int, ...],
        contexts: int,
        key: dict[str, Any] | None = None,
    ) -> None:
        self.lm, self.stream, self.layers, self.contexts = lm, stream, layers, contexts
        self.store = ActivationStore(stream, key)
        self._rest: Tensor | None = None  # harvested, not yet handed out

    @abc.abstractmethod
    def harvest(self, n_passes: int) -> list[Tensor]:
        """The activations of the next passes: a tensor (layers, N, D) of each."""

    def take(self, n: int, advance: Callable[[int], None] = lambda n: None) -> Tensor:
        """The activations of the next n tokens: (layers, n, D), on the model's device.

        Args:
            advance: called with the number of tokens of each few forward passes.
        """
        import torch

        hf, have = self.lm.hf, 0
        shape = (len(self.layers), n, hf.config.hidden_size)
        taken = torch.empty(shape, device=hf.device, dtype=hf.dtype)
        parts = [] if self._rest is None else [self._rest]
        while have < n:
            if not parts:
                n_passes = max(1, (n - have) // (self.contexts * (self.stream.context - 1)))
                parts = self.store.passes(min(n_passes, PASSES), self.harvest)
                advance(sum(part.shape[1] for part in parts))
            part = parts.pop(0).to(hf.device)
            missing = n - have
            taken[:, have : have + part.shape[1]] = part[:, :missing]
            have, rest = have + part.shape[1], part[:, missing:]
        self._rest = torch.cat([rest, *(part.to(hf.device) for part in parts)], dim=1)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where the text stands, and what is harvested and not handed out."""
        return {"store": self.store.state_dict(), "rest": self._rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another buffer on the same text stood."""
        self.store.load_state_dict(state["store"])
        rest = state["rest"]
        self._rest = None if rest is None else rest.to(self.lm.hf.device)


def write_state(state: object, path: Path) -> None:
    """Writes what `Checkpoints.save` takes as one safetensors file."""
    import torch
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
    import torch

    for name, value in attributes.items():
        old = getattr(thing, name, None)
        on = old.device if isinstance(old, torch.Tensor) else None
        setattr(thing, name, value.to(on) if isinstance(value, torch.Tensor) and on else value)


# ------------------------------------------------------------- what results depend on


def without_docstrings(tree: ast.AST) -> ast.AST:
    """The tree, its docstrings taken out; comments are in no tree."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = body[1:]
    return tree


def names_in(node: ast.AST) -> set[str]:
    """Every name and attribute that code mentions, or may mention in a string."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    found |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    strings = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return found | {s for s in strings if isinstance(s, str) and s.isidentifier()}


def does_nothing(node: ast.stmt) -> bool:
    """Whether reading a statement only binds a name to a function or to a plain value."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        values = [*node.args.defaults, *filter(None, node.args.kw_defaults), *node.decorator_list]
    elif isinstance(node, ast.Assign) and [type(t) for t in node.targets] == [ast.Name]:
        values = [node.value]
    else:
        return False
    try:
        for value in values:
            if not isinstance(value, ast.Lambda):
                ast.literal_eval(value)
        return True
    except (ValueError, TypeError):
        return False


BY_MAIN = {"evaluate", "write_records", "PROFILES", "PLAN"}  # what MAIN may mention freely


def code_parts(
    source: str, without: Sequence[str] = ()
) -> tuple[dict[str, str], set[str], dict[str, set[str]]]:
    """What experiment.py does, by function: hashes of its syntax, no comments or docstrings.

    Settings' fields, PROFILES and PLAN are left out, for what they say is in a run's settings.

    Args:
        without: the first words of the titles of ruled sections to leave out. In doubt their code
            stays: what does more, when the file is read, than to define a function or a constant,
            and what other sections mention, but for MAIN's call of `evaluate` and `write_records`.
    Returns:
        {function, method or class: hash}, all names that this code mentions, and those that each
        part mentions.
    """
    lines = source.splitlines()
    titles = [
        (number, lines[number].removeprefix("# "))
        for number in range(1, len(lines) - 1)
        if lines[number - 1].startswith("# ===") and lines[number + 1].startswith("# ===")
    ]
    tree = without_docstrings(ast.parse(source))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    counted: list[tuple[str, ast.stmt]] = []
    waiting: list[tuple[str, ast.stmt]] = []
    mentioned: set[str] = set()
    for node in tree.body:
        section = next((title for at, title in reversed(titles) if at < node.lineno), "")
        word = section.split(" ")[0].rstrip(":,")
        target = getattr(node, "target", (getattr(node, "targets", None) or [None])[0])
        name = getattr(node, "name", getattr(target, "id", f"the top level of {section}"))
        if word == "SETTINGS" and name == "Settings":  # the values of its fields are settings
            node.body = [part for part in node.body if not isinstance(part, ast.AnnAssign)]
        listed = word == "SETTINGS" and name in ("PROFILES", "PLAN")
        if listed or (word in without and does_nothing(node)):
            waiting.append((name, node))
            continue
        counted.append((name, node))
        mentioned |= names_in(node) - (BY_MAIN if word == "MAIN" else set())
    while called := [(name, node) for name, node in waiting if name in mentioned]:
        waiting = [pair for pair in waiting if pair not in called]
        counted += called
        mentioned = mentioned.union(*(names_in(node) for _, node in called))
    parts: dict[str, str] = {}
    mentions: dict[str, set[str]] = {}

    def add(name: str, node: ast.AST) -> None:
        parts[name] = digest(parts.get(name, "") + ast.dump(node))
        begins = isinstance(node, ast.If) and "__name__" in names_in(node.test)
        mentions[name] = mentions.get(name, set()) | (set() if begins else names_in(node))

    for name, node in counted:
        for part in list(getattr(node, "body", [])) if isinstance(node, ast.ClassDef) else []:
            if isinstance(part, definitions):
                add(f"{name}.{part.name}", part)
                node.body.remove(part)
        add(name, node)
    return parts, set().union(*mentions.values()), mentions


def code_reached(source: str, roots: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """As `code_parts`, of what functions or classes mention, directly or by way of others.

    Statements that do something when the file is read are always among it.
    """
    parts, names, mentions = code_parts(source)
    defined = {part.split(".")[0] for part in mentions}
    reached: set[str] = {part for part in defined if part.startswith("the top level of")}
    waiting = [*roots, *reached]
    while waiting:
        here = waiting.pop()
        for part, mentioned in mentions.items():
            if part.split(".")[0] == here:
                waiting += mentioned & defined - reached - {here}
                reached |= mentioned & defined | {here}
    found = {p: h for p, h in parts.items() if p.split(".")[0] in reached}
    return found, set().union(*(mentions[part] for part in found))


EVALUATION_ONLY = ("core_", "probe_", "compare_to", "description")  # beginnings of settings' names


def training_key(
    settings: Settings,
    source: str,
    fixed: dict[tuple[int, int], dict[str, float]],
    train_dtype: str,
    device: torch.device,
) -> dict[str, Any]:
    """All that a training depends on, as JSON.

    Args:
        source: of experiment.py. fixed: the constants among tau_sel, tau_pen and gamma.
    """
    code, names, _ = code_parts(source, without=("EVALUATION", "RECORDS"))
    chosen = {
        field: value
        for field, value in dataclasses.asdict(settings).items()
        if not field.startswith(EVALUATION_ONLY) or field in names
    }
    return {
        "code of": code,
        "setting": chosen,
        "constants": [[list(key), values] for key, values in fixed.items()],
        "dtype": train_dtype,
        **surroundings(settings, source, device),
    } | text_identity(settings.training_text)


def activations_key(
    settings: Settings, source: str, train_dtype: str, lm: LanguageModel
) -> dict[str, Any] | None:
    """All that harvested activations depend on, as JSON; None where they would take too much."""
    n_bytes = settings.training_tokens * len(settings.layers) * lm.hf.config.hidden_size * (
        2 if train_dtype == "bfloat16" else 4
    )
    if n_bytes > ACTIVATIONS_GB * 1e9:
        return None
    code, names = code_reached(source, ["ActivationBuffer"])
    fields = {"layers", "context", "harvest_contexts", "lm_dtype", "device"} | names
    return {
        "code of": code,
        "setting": {f: v for f, v in dataclasses.asdict(settings).items() if f in fields},
        "dtype": train_dtype,
        **surroundings(settings, source, lm.hf.device),
    } | text_identity(settings.training_text)


def evaluation_keys(
    saes: dict[str, CustomSAE], settings: Settings, source: str, roots: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """By SAE, all that a part of its evaluation depends on, as JSON; texts of probing excepted.

    Args:
        roots: the functions that this part of the evaluation begins with.
    """
    code, names = code_reached(source, ("CustomSAE", *roots))
    chosen = {
        field: value
        for field, value in dataclasses.asdict(settings).items()
        if field in names or field.startswith(("core_", "probe_", "lm_dtype", "context", "device"))
    }
    device = next(iter(saes.values())).W_enc.device
    common = {"code of": code, "setting": chosen, **surroundings(settings, source, device)}
    common |= text_identity(settings.core_text)
    return {
        name: {**common, "SAE": weights_digest(sae), "layer": sae.cfg.hook_name,
               "attributes": repr(sorted(plain_attributes(sae, strict=False).items()))}
        for name, sae in saes.items()
    }  # fmt: skip


def plain_attributes(thing: object, strict: bool = True) -> dict[str, Any]:
    """What an object holds beside parameters, modules, optimizers and generators.

    So that what an edit adds to a trainer or an SAE is saved with it, and not lost.

    Raises:
        TypeError: `strict`, and it holds something that can't be stored as tensors and JSON.
    """
    import torch

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


def weights_digest(module: nn.Module) -> str:
    """Stands for the exact values of a module's parameters and buffers."""
    content = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        content.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()


def surroundings(settings: Settings, source: str, device: torch.device) -> dict[str, Any]:
    """What else results depend on, bit for bit: other files, model, versions, the machine."""
    import torch

    on_gpu = torch.device(device).type == "cuda"
    return {
        "file": own_modules(source),
        "model": model_identity(settings.model),
        "version of": versions(),
        "device": torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "variable": {
            name: value
            for name, value in sorted(ENVIRONMENT.items())
            if name.startswith(NUMERIC) or name in variables_in(source)
        },
    }


@functools.cache
def variables_in(source: str) -> set[str]:
    """The environment variables that code reads by a name in quotes."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Call, ast.Subscript)):
            what = ast.unparse(node.func if isinstance(node, ast.Call) else node.value)
            if what.endswith(("environ", "environ.get", "getenv")):
                given = node.args[:1] if isinstance(node, ast.Call) else [node.slice]
                found |= {g.value for g in given if isinstance(g, ast.Constant)}
    return found


@functools.cache
def own_modules(source: str) -> dict[str, str]:
    """Hashes of the files beside this one that code imports, directly or by way of each other."""
    found: dict[str, str] = {}
    waiting = [source]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in {name.split(".")[0] for name in names}:
                files = [HERE / f"{name}.py", *sorted((HERE / name).glob("**/*.py"))]
                for file in files if name not in ("", "experiment", "tests") else []:
                    if file.is_file() and str(file.relative_to(HERE)) not in found:
                        text = PLUMBING if name == "harness" else file.read_text(encoding="utf-8")
                        tree = without_docstrings(ast.parse(text))
                        found[str(file.relative_to(HERE))] = digest(ast.dump(tree))
                        waiting.append(text)
    return found


def text_identity(name: str) -> dict[str, Any]:
    """What tells a text from another: its name; of tinylm's corpus and of a folder, the files."""
    if name == "tinylm":
        files = ("manifest.tsv", "corpus.py", "tokenizer.json")
        return {"text": [sha256_file(HERE / "tinylm" / file) for file in files]}
    folder = Path(name)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return {"text": [name, [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]]}


# ---------------------------------------------------------------------------- the command


class _Arguments(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def error(self, message: str) -> Any:
        raise ExperimentError(
            f"{message}; the command is `python experiment.py --out_dir=run_i`, no other argument"
        )


class Attempt:
    """One start of the command: its lock on out_dir, and what the next start can read of it.

    Its record says every few seconds what it does and how much memory it uses; an attempt that is
    killed leaves that.

    Raises:
        ExperimentError: another process writes the same out_dir.
    """

    current: Attempt | None = None

    def __init__(self, out_dir: Path, log: Path) -> None:
        self.out_dir = out_dir
        name = f"{out_dir.name[:60]}-{digest(str(out_dir.resolve()))[:16]}"
        self.path = place_for("attempts") / f"{name}.json"
        self.lock = take_lock(self.path.with_suffix(".lock"))
        try:
            self.before = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.before = {}
        if self.lock is None:
            raise ExperimentError(
                f"{out_dir} is being written by another process ({self.before.get('pid', '?')}): "
                "wait until it ends, or name another --out_dir"
            )
        self.log, self.began = log, time.monotonic()
        self.record: dict[str, Any] = {
            "pid": os.getpid(),
            "log": str(log),
            "began": datetime.datetime.now().isoformat(" ", "seconds"),
            "silent": self.before.get("silent", 0) + 1 if self.ended_silently() else 0,
            "ended": None,
            "key": self.before.get("key"),
        }
        self.kept: list[str] = []
        self.reused: list[str] = []
        self.over = threading.Event()
        self.beating = threading.Lock()
        self.beat()
        threading.Thread(target=self._beat_on, name="heartbeat", daemon=True).start()
        Attempt.current = self

    def ended_silently(self) -> bool:
        """Whether the attempt before ended without a word."""
        return bool(self.before) and self.before.get("ended") is None

    def what_happened_before(self) -> str | None:
        """A line on an attempt before that ended without a word, or None."""
        if not self.ended_silently():
            return None
        last = self.before
        times = f", as {silent - 1} before it" if (silent := self.record["silent"]) > 1 else ""
        return (
            f"the last attempt at {self.out_dir.name}, of {last['began']}, ended without a word"
            f"{times}: killed during {last['stage']}, after {last['seconds']:.0f} s, when it used "
            f"{last['memory_gb']:.1f} GB and the machine {last['machine_gb']:.1f} of "
            f"{last['total_gb']:.1f}" + (
                f"; if it was for want of memory, lower {lower(last['stage'])}"
                if last["machine_gb"] > 0.8 * last["total_gb"]
                else ""
            ) + f"; its log is {last['log']}"
        )  # fmt: skip

    def beat(self) -> None:
        """Writes the record."""
        import psutil

        memory = psutil.virtual_memory()
        with self.beating, contextlib.suppress(OSError):
            self.record |= {
                "stage": Progress.stage_now,
                "seconds": time.monotonic() - self.began,
                "memory_gb": psutil.Process().memory_info().rss / 1e9,
                "machine_gb": (memory.total - memory.available) / 1e9,
                "total_gb": memory.total / 1e9,
            }
            write_atomic(self.path, json.dumps(self.record))

    def _beat_on(self) -> None:
        while not self.over.wait(HEARTBEAT):
            self.beat()

    def end(self, how: str) -> None:
        """Says that the attempt ended by itself, and lets go of out_dir."""
        self.over.set()
        self.record["ended"] = how
        self.beat()
        os.close(self.lock)
        Attempt.current = None

    @classmethod
    def keeps(cls, what: str) -> None:
        """Remembers what the store holds of this attempt, for its last words."""
        if cls.current and what not in ("rehearsal", PINS):
            first = what.split(" up to ")[0]
            cls.current.kept = [w for w in cls.current.kept if not w.startswith(first)] + [what]

    @classmethod
    def reuses(cls, what: str, quietly: bool = False, part: str = "") -> None:
        """Says once that something is not repeated, and remembers it for config.json."""
        if cls.current and what not in (PINS, *cls.current.reused):
            cls.current.reused.append(what)
            cls.keeps(what)
            if not quietly:
                say(f"{what}{part}: kept, as all that it depends on is unchanged; not repeated")

    @classmethod
    def changed(cls, key: dict[str, Any]) -> str:
        """In what the key of this training differs from the attempt's before: at most six names."""
        before = (cls.current.record["key"] if cls.current else None) or {}
        if cls.current:
            cls.current.record["key"] = key
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


class _Ended(BaseException):
    """Raised by a signal that asks the process to end."""


def _end(number: int, frame: Any) -> None:
    raise _Ended(signal.Signals(number).name)


def _end_again(swallowed: Any) -> None:
    """`sys.unraisablehook`: what a finalizer raises is lost, so the signal is sent again."""
    error = swallowed.exc_value
    if not isinstance(error, (KeyboardInterrupt, _Ended)):
        sys.__unraisablehook__(swallowed)
        return
    number = signal.Signals[str(error) or "SIGINT"]
    threading.Timer(0.1, os.kill, [os.getpid(), number]).start()


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Has an error that comes from within say where: a layer, a seed, a data set."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


def main(run: Callable[[Path, Path], None], argv: list[str] | None = None) -> int:
    """Calls `run(out_dir, log)`; on failure the end of standard error says why, in words.

    Returns:
        the exit status: 0; 1 after a failure; 128 + its number after a signal.
    """
    log = attempt = None
    status = 0
    Progress.stage_now = "start-up"
    try:
        parser = _Arguments(description="Train and score a parametric contrastive SAE.")
        parser.allow_abbrev = False
        parser.add_argument("--out_dir", type=Path, required=True, help="the folder of this run")
        out_dir = parser.parse_args(argv).out_dir.absolute()
        log = new_log(out_dir.name)
        attempt = Attempt(out_dir, log)
        if before := attempt.what_happened_before():
            print(before, file=sys.stderr, flush=True)
        with handlers(log):
            run(out_dir, log)
    except (Exception, KeyboardInterrupt, SystemExit, _Ended) as error:
        if isinstance(error, SystemExit) and not log:  # --help
            raise
        status = 1
        if isinstance(error, (KeyboardInterrupt, _Ended)):
            name = str(error) or "SIGINT"
            status = 128 + signal.Signals[name]
        if log:
            with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
                traceback.print_exception(error, file=file)
        print(last_words(error, log, attempt), file=sys.stderr)
    finally:
        if attempt:
            attempt.end("complete" if status == 0 else f"status {status}")
    return status


@contextlib.contextmanager
def handlers(log: Path) -> Iterator[None]:
    """Signals that ask for an end raise; a crash in C leaves its stack in the log."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        asked.append(signal.SIGHUP)
    stock = {number: signal.signal(number, _end) for number in asked}
    hook, sys.unraisablehook = sys.unraisablehook, _end_again
    with log.open("a") as file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
            sys.unraisablehook = hook
            for number, handler in stock.items():
                signal.signal(number, handler)


def last_words(error: BaseException, log: Path | None, attempt: Attempt | None) -> str:
    """What failed, why, what to do and where the log is: at most `LAST_WORDS` characters."""
    notes = [note for note in reversed(getattr(error, "__notes__", [])) if len(note) < 80]
    where = f"{Progress.stage_now}" + (f" ({', '.join(notes[:3])})" if notes else "")
    lines = [f"experiment.py failed during {where}"]
    kept_now = attempt.kept if attempt else []
    again = "give the same command again" + (
        f": it goes on from what is kept ({', '.join(kept_now)})" if kept_now else ""
    )
    if isinstance(error, ExperimentError):
        cause, remedy = str(error), ""
    elif isinstance(error, (KeyboardInterrupt, _Ended)):
        cause, remedy = f"it was told to end ({str(error) or 'SIGINT'})", again
    elif is_out_of_memory(error):
        cause = f"out of memory ({first_line(error)})"
        remedy = f"lower {lower(Progress.stage_now)}, and {again}"
    elif is_full_disk(error):
        cause = f"a disk is full ({first_line(error)})"
        remedy = f"free space where {attempt.out_dir if attempt else 'the run'} is, and {again}"
    else:
        cause, remedy = f"{type(error).__name__}: {tidy(str(error))}", f"mend it, and {again}"
        if place := place_of(error):
            lines.append(f"at: {place}")
    room = LAST_WORDS - len("\n".join(lines)) - len(remedy) - len(str(log)) - 200
    lines.append(f"cause: {shortened(cause, max(room, 100))}")
    lines += [f"to do: {remedy}"] if remedy else []
    lines += [f"log: {log}"] if log else []
    return "\n".join(lines)


def shortened(text: str, length: int) -> str:
    """The text, or its beginning and its end."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]} … {text[-(length // 2 - 3) :]}"


def place_of(error: BaseException) -> str:
    """The line of experiment.py that an error passed last, and where it came from below that."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).name == "experiment.py"]
    if not frames:
        return ""
    frame = (ours or frames)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}: {frame.line}"
    if frames[-1] is not frame:
        deepest = frames[-1]
        place += f" -> {Path(deepest.filename).name}, line {deepest.lineno}, in {deepest.name}"
    return tidy(place)[:300]


def lower(stage: str) -> str:
    """The settings that take less memory in a stage."""
    return LOWER.get(stage.split(": ")[-1], "d_sae or the number of layers and seeds")


def is_full_disk(error: BaseException) -> bool:
    """Whether a disk, or a user's share of it, is full."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def choose_profile(profiles: Iterable[str]) -> str:
    """SAE_PROFILE, or gemma-2-2b where CUDA is available, tinylm elsewhere."""
    import torch

    profile = os.environ.get("SAE_PROFILE")
    if not profile:
        return "gemma-2-2b" if torch.cuda.is_available() else "tinylm"
    if profile not in profiles:
        raise ExperimentError(
            f"SAE_PROFILE must be {' or '.join(profiles)}, but is {profile!r}: change or unset it"
        )
    return profile


def checked_settings(name: str, make: Callable[..., Settings], chosen: dict) -> Settings:
    """The settings of the run called `name`: `make` is the class, `chosen` sets its fields.

    Raises:
        ExperimentError: a field that doesn't exist, or a value that can't be.
    """
    try:
        settings = make(**chosen)
    except TypeError as error:
        raise ExperimentError(
            f"PLAN[{name!r}] sets what Settings has no field for ({error}): "
            "see the list at the top of experiment.py"
        ) from error
    check_settings(name, settings)
    return settings


def check_settings(name: str, s: Settings) -> None:
    """Holds the settings of the run called `name` against what can be.

    Raises:
        ExperimentError: the first field that breaks its rule, or whose value is of a wrong type.
    """
    counts = (
        "k_min d_sae training_tokens batch buffer_tokens harvest_contexts log_every dead_after "
        "core_prompts core_reconstruction_batches core_sparsity_batches probe_train "
        "probe_test probe_llm_batch probe_sae_batch"
    )
    rules: list[tuple[str, Callable[[Any], bool], str]] = [
        *((field, lambda v: v >= 1 and v == int(v), "a count above 0") for field in counts.split()),
        *((field, lambda v: v > 0, "above 0") for field in ("lr", "theta_lr", "k_start_factor")),
        *(
            (field, lambda v: 0 <= v <= 1, "between 0 and 1")
            for field in ("curriculum_fraction", "lr_warmup", "lr_decay")
        ),
        *((field, lambda v: v >= 0, "0 or above") for field in ("reg_lambda", "frequency_weight")),
        *(
            (field, lambda v: v is None or v > 0, "None or above 0")
            for field in ("tau_sel", "tau_pen", "budget_minutes")
        ),
        ("gamma", lambda v: v is None or v >= 0, "None, or 0 or above"),
        ("threshold_rate", lambda v: 0 < v <= 1, "above 0, and at most 1"),
        ("selection", lambda v: v in ("token", "threshold"), "'token' or 'threshold'"),
        (
            "selection",
            lambda v: v == "token" or (s.curriculum and s.form == "contrastive"),
            "'token' where nothing is selected (curriculum=False, or form='as_written')",
        ),
        ("k_min", lambda v: v <= s.d_sae, f"at most d_sae = {s.d_sae}"),
        ("context", lambda v: v >= 2, "at least 2"),
        ("probe_train", lambda v: v >= 4, "at least 4: two texts of a class"),
        ("probe_test", lambda v: v >= 4, "at least 4: two texts of a class"),
        ("training_tokens", lambda v: v >= s.batch, f"at least one batch of {s.batch}"),
        ("buffer_tokens", lambda v: v >= s.batch, f"at least one batch of {s.batch}"),
        ("form", lambda v: v in ("contrastive", "as_written"), "'contrastive' or 'as_written'"),
        ("resample", lambda v: isinstance(v, bool), "True or False"),
        ("curriculum", lambda v: isinstance(v, bool), "True or False"),
        ("device", lambda v: v in ("auto", "cpu", "cuda"), "'auto', 'cpu' or 'cuda'"),
        ("lm_dtype", lambda v: v in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
        (
            "train_dtype",
            lambda v: v in ("auto", "float32", "bfloat16"),
            "'auto', 'float32' or 'bfloat16'",
        ),
        ("seeds", lambda v: v and len(set(v)) == len(v) and min(v) >= 0, "different, 0 or above"),
        ("layers", lambda v: v and len(set(v)) == len(v) and min(v) >= 0, "different, 0 or above"),
        (
            "probe_sets",
            lambda v: v and all(n in ("tinylm/A", "tinylm/B") or n[:7] != "tinylm/" for n in v),
            "one or more data sets; of tinylm, 'tinylm/A' or 'tinylm/B'",
        ),
        (
            "probe_ks",
            lambda v: set(PRIMARY_KS) <= set(v) and 1 <= min(v) <= max(v) <= s.d_sae,
            "between 1 and d_sae, with 1, 2 and 5 among them",
        ),
    ]
    for field, holds, expected in rules:
        value = getattr(s, field)
        try:
            passed = holds(value)
        except (TypeError, ValueError):
            passed = False
        if not passed:
            raise ExperimentError(
                f"{name}: {field} must be {expected}, but is {value!r}: "
                "change it at the top of experiment.py"
            )


def check_layers(settings: Settings, lm: LanguageModel) -> None:
    """ExperimentError where the language model has fewer blocks than the settings name."""
    n_layers = lm.hf.config.num_hidden_layers
    if max(settings.layers) >= n_layers:
        raise ExperimentError(
            f"layers must be below {n_layers}, the number of blocks of {settings.model}, but are "
            f"{settings.layers}: change them at the top of experiment.py"
        )


def choose_device(settings: Settings, profile: str) -> torch.device:
    """The device that `settings.device` stands for: "auto" is a GPU for gemma-2-2b, else a CPU."""
    import torch

    wanted = settings.device
    if wanted == "auto":
        wanted = "cuda" if profile == "gemma-2-2b" else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ExperimentError(
            f"the profile {profile} with device={settings.device!r} needs a CUDA GPU, and none is "
            "available: set device='cpu', or use SAE_PROFILE=tinylm make run OUT=run_try"
        )
    return torch.device(wanted)


def make_reproducible() -> None:
    """The same seed on the same machine gives the same results, bit for bit."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # no result depends on it
    torch.backends.cudnn.benchmark = False


def choose_train_dtype(settings: Settings, device: torch.device) -> str:
    """What `settings.train_dtype` stands for: "auto" is bfloat16 where the hardware gains by it.

    On processors that don't have it, bfloat16 is emulated and many times slower than float32, and
    Intel's that have it without AMX multiply it at half of float32's rate (AMD's at 2 to 4 times;
    `python bench/speed.py --only step` measures both). A rule: timed on a busy machine, the answer
    would change from run to run, and with it what can be reused.
    """
    import torch

    if settings.train_dtype != "auto":
        return settings.train_dtype
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        gains = cpu.get("amx_bf16") or cpu.get("arm_bf16")
        gains = gains or cpu.get("avx512_bf16") and "Intel" not in processor_name()
    return "bfloat16" if gains else "float32"


# ---------------------------------------------------------------------------- pre-flight


def preflight(settings: Settings, device: torch.device) -> list[str]:
    """Checks what a run needs, in seconds, before anything large is downloaded or computed.

    The hub reachable or the files in its local cache, access to gated weights, every data set
    there, disk and memory enough. tinylm needs none of it.

    Returns:
        lines that say what is needed and what there is.
    Raises:
        ExperimentError: what is missing, and what to do.
    """
    texts = [settings.training_text, settings.core_text, *settings.probe_sets]
    wanted = [("model", settings.model)] if settings.model != "tinylm" else []
    wanted += [("dataset", hub_name(text)) for text in texts if not text.startswith("tinylm")]
    if not wanted:
        return []
    wanted = list(dict.fromkeys(wanted))
    with ThreadPoolExecutor(len(wanted)) as pool:
        problems = [p for p in pool.map(lambda kind_name: hub_problem(*kind_name), wanted) if p]
    if problems:
        more = f" (and {len(problems) - 1} more of the kind)" if len(problems) > 1 else ""
        raise ExperimentError(problems[0] + more)
    if settings.model == "tinylm":
        return []
    parts = memory_estimate(fit_core_batches(settings, device))
    return [check_disk(settings), check_memory(parts, device)]


def hub_name(text: str) -> str:
    """The hub's name of a data set; SAE-Bench gives parts and variants of one a suffix."""
    return text.split("_class_set")[0].removesuffix("_sentiment")


def hub_problem(kind: str, name: str) -> str | None:
    """Why a model or data set can't be had, in a sentence; None if it can.

    Args:
        kind: "model" or "dataset".
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if os.path.isdir(name) or in_local_cache(kind, name):
        return None
    if constants.HF_HUB_OFFLINE:
        return (
            f"the {kind} {name!r} is not in the local cache {constants.HF_HOME} and HF_HUB_OFFLINE "
            "is set: unset it, or set HF_HOME to a cache that holds it"
        )
    try:
        huggingface_hub.HfApi().auth_check(name, repo_type=kind)
    except errors.GatedRepoError:
        return (
            f"the {kind} {name!r} is gated and this account has no access: {GET_ACCESS}"
        )
    except errors.RepositoryNotFoundError:
        return (
            f"the {kind} {name!r} is not on the hub, or is private: check the name at the top of "
            f"experiment.py, and {LOG_IN} if it is private"
        )
    except Exception as error:
        return (
            f"the hub can't be reached for the {kind} {name!r} ({type(error).__name__}), and it is "
            f"not in the local cache {constants.HF_HOME}: connect to the network, or set HF_HOME "
            f"to a cache that holds it; {TRY_TINYLM}"
        )
    return None


def in_local_cache(kind: str, name: str) -> bool:
    """Whether the hub's cache, or that of `datasets`, holds files of it."""
    import datasets
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    prepared = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    if kind == "model":
        return any(folder.glob("*/*.safetensors"))
    return prepared.is_dir() or any(folder.glob("*/*"))


def memory_estimate(settings: Settings) -> dict[str, float]:
    """Bytes that the parts of a run need on its device, from the shapes of their largest tensors.

    Training and evaluation follow each other: beside the language model and the SAEs, a run needs
    the larger of the two.
    """
    config, parameters = language_model_config(settings.model), n_parameters(settings.model)
    size = {"float32": 4, "bfloat16": 2}
    lm_bytes = size[settings.lm_dtype]
    D, F, V = config.hidden_size, settings.d_sae, config.vocab_size
    n_saes = len(settings.layers) * len(settings.seeds)
    n_tokens = settings.harvest_contexts * settings.context
    core_tokens = settings.core_prompts * settings.context
    return {
        # With its embedding twice: TransformerLens scales it.
        "language model": (parameters + V * D) * lm_bytes,
        # Weights, gradient, two moments and the untrained twin, in float32.
        "SAEs": n_saes * 2 * D * F * 4 * 5,
        # The buffer, its parts while they are joined; a pass; ten tensors (B, F) of a step.
        "training": 2 * settings.buffer_tokens * len(settings.layers) * D * lm_bytes
        + n_tokens * (3 * config.intermediate_size + 6 * D) * lm_bytes
        + 10 * settings.batch * F * 4,
        # Logits: unchanged, ablated (a layer each), reconstructed, and six terms of the KL.
        "evaluation": core_tokens * V * lm_bytes * (8 + len(settings.layers)),
    }


@functools.cache
def n_parameters(name: str) -> int:
    """Of a language model, from its config.json."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(language_model_config(name))
    return sum(parameter.numel() for parameter in model.parameters())


def fit_core_batches(settings: Settings, device: torch.device) -> Settings:
    """Settings whose core evaluation fits the free memory: smaller batches, and more of them.

    The logits of a batch are core_prompts x context x vocabulary.
    """
    parts = memory_estimate(settings)
    free = free_gb(device) * 1e9 - parts["language model"] - parts["SAEs"]
    fitted = settings
    while parts["evaluation"] > free and fitted.core_prompts % 2 == 0:
        fitted = dataclasses.replace(
            fitted,
            core_prompts=fitted.core_prompts // 2,
            core_reconstruction_batches=fitted.core_reconstruction_batches * 2,
            core_sparsity_batches=fitted.core_sparsity_batches * 2,
        )
        parts = memory_estimate(fitted)
    if fitted != settings:
        print(f"core_prompts: {fitted.core_prompts}, so that the core evaluation fits the memory")
    return fitted


def free_gb(device: torch.device) -> float:
    """Memory that is free on a GPU, or a CPU's whole, in GB (10^9 bytes)."""
    import torch

    return torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else memory_gb()


def check_memory(parts: dict[str, float], device: torch.device) -> str:
    """A line with the estimate and what the device has free; ExperimentError if that is less."""
    fixed = parts["language model"] + parts["SAEs"]
    needed = (fixed + max(parts["training"], parts["evaluation"])) / 1e9
    free = free_gb(device)
    listed = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items())
    line = f"memory, estimated in GB: {listed}; {needed:.1f} at once, {free:.1f} free on {device}"
    if needed > free:
        lower = "batch or buffer_tokens" if parts["training"] > parts["evaluation"] else (
            "core_prompts"
        )
        raise ExperimentError(f"{line}: lower {lower}, or free memory on the device")
    return line


def check_disk(settings: Settings) -> str:
    """A line with the space needed and free; ExperimentError if that is less."""
    from huggingface_hub import constants

    cached = os.path.isdir(settings.model) or in_local_cache("model", settings.model)
    # The hub stores Gemma-2-2b in float32.
    needed = (0 if cached else 4 * n_parameters(settings.model) / 1e9) + DATA_GB
    place = Path(constants.HF_HOME)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    line = f"disk: up to {needed:.1f} GB for weights and data sets, {free:.1f} free in {place}"
    if needed > free:
        raise ExperimentError(f"{line}: free some, or set HF_HOME to a folder on a larger disk")
    return line


# ---------------------------------------------------------------------------- output


class _Console:
    """Standard output, also while `quiet` sends it elsewhere: progress is shown all the time."""

    encoding = "utf-8"
    outer: Any = None  # standard output as it was before `quiet`

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
def quiet(log: Path) -> Iterator[None]:
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


def say(text: str) -> None:
    """A line on standard output, also while libraries are quiet; in the log in a rehearsal."""
    print(text, file=sys.stdout if Progress.prefix else CONSOLE, flush=True)


def in_threads(
    function: Callable[[Any, Any], Any], keys: list, parts: list, device: torch.device
) -> Iterator[tuple[Any, Any, Any]]:
    """Calls function(key, part) for every key and part, several keys at once on a CPU.

    A key's parts come one after the other, in order; each call has its own share of the cores,
    the same one every time, so that its results are reproducible bit for bit.

    Yields:
        key, part and result, as calls end.
    """
    import torch

    cores = torch.get_num_threads()
    n_workers = min(len(keys), cores) if device.type == "cpu" else 1
    if n_workers == 1:
        for part in parts:
            for key in keys:
                yield key, part, function(key, part)
        return
    share = cores // n_workers
    ready, next_part = list(keys), dict.fromkeys(keys, 0)
    running: dict[Future, Any] = {}
    with ThreadPoolExecutor(n_workers, "steps", torch.set_num_threads, (share,)) as pool:
        try:
            while ready or running:
                while ready and len(running) < n_workers:
                    key = ready.pop(0)
                    running[pool.submit(function, key, parts[next_part[key]])] = key
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    key = running.pop(done)
                    yield key, parts[next_part[key]], done.result()
                    next_part[key] += 1
                    if next_part[key] < len(parts):
                        ready.append(key)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)


def in_order(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    device: torch.device,
) -> list[Any]:
    """function(item) of each item, in their order, several at once on a CPU (see `in_threads`)."""
    found = {}
    keys = list(range(len(items)))
    for index, _, result in in_threads(lambda at, _: function(items[at]), keys, [None], device):
        found[index] = result
    return [found[index] for index in keys]


def take_steps(
    settings: Settings,
    trainers: dict[tuple[int, int], Any],
    acts_LND: Tensor,
    orders: dict[int, Tensor],
    steps: range,
    n_steps: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Every trainer's steps on one filling of the buffer; their records, in order of steps.

    `trainer.step(x_BD, progress, logging)` returns the loss and, if `logging`, a record.

    On a CPU trainers run side by side, each on its own cores: a step's operations are too small
    to be worth sharing. What a trainer computes does not depend on when the others run.

    Args:
        orders: by seed, the order in which the tokens of the buffer are drawn.
        steps: the steps to take, of n_steps in all.
    Raises:
        ExperimentError: a loss is not finite.
    """
    import torch

    last: dict[tuple[int, int], dict[str, Any]] = {key: {} for key in trainers}

    def batch(key: tuple[int, int], step: int) -> Tensor:
        layer, seed = key
        start = (step - steps.start) * settings.batch
        acts_ND = acts_LND[settings.layers.index(layer)]
        return acts_ND[orders[seed][start : start + settings.batch].to(acts_ND.device)]

    def some_steps(key: tuple[int, int], part: range) -> list[dict[str, Any]]:
        records, losses = [], []
        for step in part:
            logging = step % settings.log_every == 0 or step == n_steps - 1
            with doing(f"layer {key[0]}, seed {key[1]}"):
                loss, record = trainers[key].step(batch(key, step), step / n_steps, logging)
            losses.append(loss)
            if record:
                tokens = step * settings.batch
                where = {"step": step, "tokens": tokens, "layer": key[0], "seed": key[1]}
                speed = {"tokens_per_second": tokens / progress.seconds()}
                records.append(where | record | speed)
        # Looked at once in a while: a GPU would have to wait for each step otherwise.
        wrong = (~torch.stack(losses).isfinite()).nonzero()
        if len(wrong):
            step, so_far = part[int(wrong[0])], losses[: int(wrong[0]) + 1]
            records = [last[key], *(r for r in records if r["step"] < step)]
            with doing(f"layer {key[0]}, seed {key[1]}"):
                raise broken_loss(
                    [float(v) for v in so_far], step, settings, batch(key, step), records[-1]
                )
        last[key] = records[-1] if records else last[key]
        return records

    records: list[dict[str, Any]] = []
    parts = [range(i, min(i + 32, steps.stop)) for i in range(steps.start, steps.stop, 32)]
    with memory_for_steps(settings, acts_LND.shape[-1]):
        for _, part, found in in_threads(some_steps, list(trainers), parts, acts_LND.device):
            records += found
            note = "fvu " + "/".join(f"{r['fvu']:.2f}" for r in last.values() if r)
            progress.advance(len(part) * settings.batch, note)
    place = {key: index for index, key in enumerate(trainers)}
    return sorted(records, key=lambda r: (r["step"], place[r["layer"], r["seed"]]))


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
        if Attempt.current:
            Attempt.current.beat()

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
            say(f"{self.stage}: {state}{note}")


# ---------------------------------------------------------------------------- what ran, and where


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_config(
    settings: Settings,
    profile: str,
    device: torch.device,
    train_dtype: str,
    source: str,
    out_dir: Path,
) -> None:
    """Writes what ran and where: config.json, and the code itself beside it.

    Args:
        source: of experiment.py, as it was when it was started.
    """
    import torch

    hashes = {}
    for file, text in (("experiment.py", source), ("harness.py", PLUMBING)):
        write_atomic(out_dir / file, text)
        hashes[file] = sha256_file(out_dir / file)
    if settings.model == "tinylm":
        for file in ("manifest.tsv", "model.safetensors", "tokenizer.json"):
            hashes[f"tinylm/{file}"] = sha256_file(HERE / "tinylm" / file)
    record = {
        "run": out_dir.name,
        "profile": profile,
        "settings": dataclasses.asdict(settings),
        "model": settings.model,
        "sha256": hashes,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "dtype": settings.lm_dtype,
        "train_dtype": train_dtype,
        "device": str(device),
        "hardware": {
            "machine": platform.machine(),
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(memory_gb(), 1),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "reused": [],  # see write_reused
    }
    write_json(out_dir / "config.json", record)


def write_reused(out_dir: Path) -> None:
    """Adds to config.json what an earlier attempt had paid for."""
    path = out_dir / "config.json"
    record = json.loads(path.read_text())
    record["reused"] = Attempt.current.reused if Attempt.current else []
    write_json(path, record)


def processor_name() -> str:
    """The processor's name as Linux gives it, else as Python does."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def peak_memory_gb() -> float:
    """The most memory that this process has held so far, in GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def memory_gb() -> float:
    """The machine's main memory, in GB (10^9 bytes)."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


# ------------------------------------------------------------------- text and language model


def passages(text: str, n_chars: int = 2000) -> list[str]:
    """The text cut at ends of lines into passages of about `n_chars` characters (600 tokens)."""
    parts: list[str] = [""]
    for line in text.splitlines(keepends=True):
        if len(parts[-1]) >= n_chars:
            parts.append("")
        parts[-1] += line
    return parts


def documents(name: str, split: str) -> Callable[[], Iterator[str]]:
    """A function that starts an iterator over the texts of a data set, or of tinylm's corpus.

    tinylm's corpus comes as passages, drawn at random from `POOL_FILES` files at a time: its files
    are long (7,000 tokens), and in their own order a buffer of 262,144 tokens holds some 40 of
    them, to which SAEs then overfit (FVU jumped by a third with each new buffer).
    """

    def corpus() -> Iterator[str]:
        draw = random.Random(0)
        pool: list[list[str]] = []  # the passages left of each file
        with corpus_errors():
            from tinylm import corpus

            for text in corpus.documents(split):
                pool.append(passages(text))
                draw.shuffle(pool[-1])
                while len(pool) >= POOL_FILES:
                    yield take_passage(pool, draw)
            while pool:
                yield take_passage(pool, draw)

    def take_passage(pool: list[list[str]], draw: random.Random) -> str:
        at = draw.randrange(len(pool))
        passage = pool[at].pop()
        if not pool[at]:
            pool[at] = pool[-1]
            pool.pop()
        return passage

    return corpus if name == "tinylm" else functools.partial(streamed_texts, name)


def load_dataset(name: str, *arguments: Any, **options: Any) -> Any:
    """`datasets.load_dataset`, which takes what it reads for data.

    A data set of `MAY_RUN_CODE` that can't be loaded without its own loading script runs it: at
    the revision of its first use, ever after; a line in the log names both. Arguments and result
    are those of `datasets.load_dataset`, but for `trust_remote_code`, which is ignored.

    Raises:
        ExperimentError: another data set that can't be loaded without a script.
    """
    import datasets
    import fsspec

    fsspec.compression.register_compression("zstd", whole_zstd, "zst", force=True)
    with LOADING:
        # In an empty folder: a script that `datasets` finds where it keeps them, it runs unasked.
        with tempfile.TemporaryDirectory() as empty, scripts_in(empty):
            try:
                options["trust_remote_code"] = False  # not None, which asks on the terminal
                return datasets.load_dataset(name, *arguments, **options)
            except ValueError as error:
                if "trust_remote_code=True" not in str(error):
                    raise
                if name not in MAY_RUN_CODE:
                    raise ExperimentError(
                        f"the data set {name!r} must load without code of its own, but has a "
                        "loading script, which is not run: choose another, or store its rows as "
                        "Parquet or JSON lines"
                    ) from error
        options["trust_remote_code"] = True
        script = Path(name, f"{Path(name).name}.py")
        if script.is_file():
            which = f"of SHA-256 {sha256_file(script)}"
        else:
            options["revision"] = kept(PINS, {"dataset": name}, hub_revision, name)
            which = f"at revision {options['revision']}"
        print(f"the data set {name} runs its own loading script, {which}", flush=True)
        # Of our own: where the hub fails, `datasets` runs the latest script that it finds there.
        with scripts_in(cache_dir() / "scripts"):
            return datasets.load_dataset(name, *arguments, **options)


@contextlib.contextmanager
def scripts_in(folder: Path | str) -> Iterator[None]:
    """Makes `folder` the place where `datasets` keeps, and looks for, loading scripts."""
    from datasets import config

    stock, config.HF_MODULES_CACHE = config.HF_MODULES_CACHE, str(folder)
    try:
        yield
    finally:
        config.HF_MODULES_CACHE = stock
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def hub_revision(name: str) -> str:
    """The newest commit of a data set: the hub's, or the local cache's where that can't be had."""
    import huggingface_hub
    from huggingface_hub import constants

    try:
        return huggingface_hub.HfApi().dataset_info(name).sha
    except Exception:
        repository = f"datasets--{name.replace('/', '--')}"
        main = Path(constants.HF_HUB_CACHE) / repository / "refs" / "main"
        if not main.is_file():
            raise
        return main.read_text().strip()


def whole_zstd(file: Any, mode: str = "rb") -> Any:
    """A reader of a .zst file that raises an OSError where the file ends too early.

    zstandard's own, which fsspec 2025.3 takes, ends there as if it were the end of the text.
    """
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), buffer_size=2**17)


def streamed_texts(name: str) -> Iterator[str]:
    """The column "text" of a data set's split "train", streamed; texts of white space left out.

    A broken connection is tried again, after 1, 2, 4, … seconds, and the stream goes on where it
    stopped.

    Raises:
        ExperimentError: it can't be read, has no such column, or the connection stays broken.
    """
    stream, failures = None, 0
    while True:
        try:
            if stream is None:
                stream = load_dataset(name, split="train", streaming=True)
            for row in text_rows(name, stream):
                failures = 0
                if row["text"].strip():
                    yield row["text"]
            return
        except ExperimentError:
            raise
        except Exception as error:
            failures += 1
            if not is_connection_error(error) or failures > STREAM_RETRIES:
                raise text_error(name, error, failures) from error
            time.sleep(2.0 ** (failures - 1))
            if stream is not None:
                state = stream.state_dict()
                stream = load_dataset(name, split="train", streaming=True)
                stream.load_state_dict(state)


def text_rows(name: str, rows: Iterable[dict]) -> Iterator[dict]:
    """The rows that have a text; ExperimentError at one without such a column."""
    for row in rows:
        if "text" not in row:
            raise ExperimentError(
                f"the text {name!r} must have a column 'text', but has {sorted(row)}: "
                "choose another data set, or rename its column"
            )
        if row["text"] is not None:
            yield row


def text_error(name: str, error: Exception, failures: int = 1) -> ExperimentError:
    """What is wrong with a text, from what reading it has raised, `failures` times in a row."""
    found = type(error).__name__
    if is_connection_error(error):
        times = f" {failures} times in a row" if failures > 1 else ""
        return ExperimentError(
            f"the connection to the text {name!r} broke{times} ({found}): try again when the "
            "network is back"
        )
    if isinstance(error, UnicodeDecodeError):
        return ExperimentError(
            f"the text {name!r} must be UTF-8, but is not ({error}): convert it"
        )
    return ExperimentError(
        f"the text {name!r} must be a data set with whole files, but can't be read "
        f"({found}: {first_line(error)}): check its name, and fetch its files again"
    )


@contextlib.contextmanager
def text_errors(name: str) -> Iterator[None]:
    """Makes what reading a text raises an ExperimentError."""
    try:
        yield
    except ExperimentError:
        raise
    except Exception as error:
        raise text_error(name, error) from error


def is_connection_error(error: BaseException) -> bool:
    """Whether the network is behind it: worth another try."""
    seen: BaseException | None = error
    while seen is not None:
        library = type(seen).__module__.split(".")[0]
        if isinstance(seen, (ConnectionError, TimeoutError)) or library in NETWORK_LIBRARIES:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name; without anything that looks like a token."""
    text = str(error).strip()
    return tidy(text.splitlines()[0] if text else type(error).__name__)[:300]


def tidy(text: str) -> str:
    """The text on one line, without anything that looks like a token."""
    return re.sub(r"hf_\w{8,}|(?i:bearer)\s+\S+", "[token]", " ".join(text.split()))


@contextlib.contextmanager
def corpus_errors() -> Iterator[None]:
    """Makes what tinylm's files raise an ExperimentError: its messages are whole sentences."""
    from tinylm.corpus import CorpusError

    try:
        yield
    except CorpusError as error:
        raise ExperimentError(str(error)) from error


class TokenStream:
    """Packs texts into contexts of token ids: BOS, then text; BOS also stands between two texts.

    It holds no padding. A corpus that runs out starts again, with a line that says so. A thread
    reads and tokenizes ahead, so that the language model needn't wait for text.

    Args:
        texts: starts an iterator over the corpus.
        tokenizer: a fast tokenizer with a BOS token.
        context: tokens per context, L.
        ahead: batches of 32 texts that are read ahead at most.
    """

    def __init__(
        self,
        texts: Callable[[], Iterator[str]],
        tokenizer: Any,
        context: int,
        ahead: int = 64,
    ) -> None:
        self.texts, self.tokenizer, self.context = texts, tokenizer, context
        self.epoch = 0
        self.n_texts = 0  # of this epoch, in what was handed out or is pending
        self._pending: list[int] = []
        self._ready: queue.Queue = queue.Queue(maxsize=ahead)
        self._reader: threading.Thread | None = None
        self._over = threading.Event()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, for `load_state_dict` of a new one on the same texts."""
        return {"epoch": self.epoch, "n_texts": self.n_texts, "pending": list(self._pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another stream stood. To be called before the first contexts are taken."""
        self.epoch, self.n_texts = state["epoch"], state["n_texts"]
        self._pending = list(state["pending"])

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        self._over.set()
        while self._reader is not None and self._reader.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)
            self._reader.join(0.05)

    def contexts(self, n: int) -> Tensor:
        """The next n contexts, (n, L) int64, the corpus in its own order."""
        import torch

        bos, width = self.tokenizer.bos_token_id, self.context - 1
        rows = torch.full((n, self.context), bos)
        start = 0
        for row in range(n):
            while len(self._pending) - start < width + 1:
                del self._pending[:start]
                start = 0
                self._take()
            start += self._pending[start] == bos  # the context's own BOS separates already
            rows[row, 1:] = torch.tensor(self._pending[start : start + width])
            start += width
        del self._pending[:start]
        return rows

    def _take(self) -> None:
        """Adds the next texts to the end of what is pending."""
        if self._reader is None:
            self._reader = threading.Thread(
                target=self._read, args=(self.n_texts,), name="text", daemon=True
            )
            self._reader.start()
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._reader = None
            raise item
        if item is None:
            if not self._pending and self.epoch == 0:
                raise ExperimentError("the training text holds no text: check training_text")
            self.epoch += 1
            self.n_texts = 0
            say(f"training text: all of it used {self.epoch} times, starting again")
        else:
            ids, n_texts = item
            self._pending += ids
            self.n_texts += n_texts

    def _read(self, skip: int, n_texts: int = 32) -> None:
        """The thread: ids and number of texts; None at each end of the corpus; an exception."""
        bos = self.tokenizer.bos_token_id
        try:
            while not self._over.is_set():
                texts, some = iter(self.texts()), skip > 0
                for _ in itertools.islice(texts, skip):
                    pass
                skip = 0
                while batch := list(itertools.islice(texts, n_texts)):
                    ids = self.tokenizer(batch, add_special_tokens=False)["input_ids"]
                    ids = [token for text in ids for token in (bos, *text)]
                    self._ready.put((ids, len(batch)))
                    some = True
                    if self._over.is_set():
                        return
                self._ready.put(None)
                if not some:
                    return
        except BaseException as error:
            self._ready.put(error)


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of BOS, EOS and padding."""
    return {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}


class _LastLayerReached(Exception):
    """Ends a forward pass after the last layer that is wanted."""


class LanguageModel:
    """A Hugging Face Gemma-2 model in the two forms that training and evaluation need."""

    def __init__(self, hf: nn.Module, tokenizer: Any, name: str) -> None:
        self.hf, self.tokenizer, self.name = hf, tokenizer, name
        self.special_ids = special_ids(tokenizer)
        self._pass = threading.local()  # passes run side by side, each with its own results
        for layer, block in enumerate(hf.model.layers):
            block.register_forward_hook(lambda _m, _i, out, at=layer: self._keep(at, out))

    def activations(self, tokens_BL: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """Residual streams after the given blocks, from one forward pass that stops at the last.

        Args:
            tokens_BL: (B, L) token ids.
        Returns:
            a tensor (B, L, D) per layer, as TransformerLens' blocks.L.hook_resid_post.
        """
        import torch

        self._pass.found, self._pass.layers = {}, layers
        try:
            with torch.no_grad():
                self.hf.model(input_ids=tokens_BL.to(self.hf.device), use_cache=False)
        except _LastLayerReached:
            pass
        finally:
            found, self._pass.found, self._pass.layers = self._pass.found, {}, ()
        return [found[layer] for layer in layers]

    def _keep(self, layer: int, output: Any) -> None:
        """Called after each block: keeps its output if this thread's pass is to have it."""
        layers = getattr(self._pass, "layers", ())
        if layer in layers:
            # transformers 4 returns a tuple here, transformers 5 the tensor.
            self._pass.found[layer] = output[0] if isinstance(output, tuple) else output
            if layer == max(layers):
                raise _LastLayerReached

    def cast(self, dtype: str) -> LanguageModel:
        """The same model in another precision; itself where it has that precision."""
        import torch

        if self.hf.dtype == getattr(torch, dtype):
            return self
        hf = copy.deepcopy(self.hf)
        for parameter in hf.parameters():  # not the buffers: RoPE's angles need float32
            parameter.data = parameter.data.to(getattr(torch, dtype))
        return LanguageModel(hf, self.tokenizer, self.name)

    def hooked(self) -> Any:
        """The same model as TransformerLens' HookedTransformer, unprocessed, for SAE-Bench."""
        from transformer_lens.pretrained.weight_conversions import convert_gemma_weights

        cfg = hooked_config(self.hf.config, self.hf.dtype, self.hf.device, self.name)
        model = hooked_class()(cfg, self.tokenizer, move_to_device=False)
        # Both forms share their matrices, but for W_E, which holds the embedding's scale.
        # load_and_process_state_dict (TransformerLens 3.9.0) would copy all of them by way of
        # float32, into a layout that the layers turn back before each product.
        weights = convert_gemma_weights(self.hf, cfg)
        weights = {name: weight.to(cfg.dtype) for name, weight in weights.items()}
        model.load_state_dict(dict(model.named_buffers()) | weights, assign=True)
        model.move_model_modules_to_device()
        model.requires_grad_(False)
        return model.eval()


@functools.cache
def hooked_class() -> type:
    """HookedTransformer, with a `run_with_cache` that several threads may call at once.

    Its hooks lie in the modules (TransformerLens 3.9.0): a call that finds those of the model in
    use gets modules of its own, on the same weights. They are copies of modules that never run,
    since a copy made during a pass would have that pass's hooks for ever.
    """
    from transformer_lens import HookedTransformer

    class Hooked(HookedTransformer):
        """See `hooked_class`."""

        turn = threading.Lock()

        def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
            with self.turn:
                if "free" not in self.__dict__:  # set there, or one would be a submodule
                    self.__dict__.update(unused=self.on_same_weights(), free=[self])
                lens = self.free.pop() if self.free else self.unused.on_same_weights()
            try:
                return super(Hooked, lens).run_with_cache(*args, **kwargs)
            finally:
                self.free.append(lens)

        def on_same_weights(self) -> Hooked:
            """A copy of the modules."""
            shared = (*self.parameters(), *self.buffers(), self.tokenizer, self.cfg)
            return copy.deepcopy(self, {id(thing): thing for thing in shared})

    return Hooked


class FusedLanguageModel(LanguageModel):
    """The same passes on a CPU, faster; see `LanguageModel`, which is the plain reference.

    Matrices are laid out once as oneDNN multiplies them. Queries, keys and values are one product,
    and GELU and the product with the gate part of others. The residual stream is float32 whatever
    the precision of the products. Scores are capped in the form softmax(c tanh(s / c)) =
    softmax(2 c σ(2 s / c)), since torch's σ takes a sixth of the time of its tanh.
    """

    def __init__(self, plain: LanguageModel, contexts: int, context: int) -> None:
        """Args: contexts, context: the shape of the passes that are to be fast."""
        import torch

        super().__init__(plain.hf, plain.tokenizer, plain.name)
        self.blocks, dtype = [], plain.hf.dtype

        def laid_out(*weights: Tensor) -> Tensor:
            weight = torch.cat([weight.detach() for weight in weights])
            return torch.ops.mkldnn._reorder_linear_weight(weight, contexts * context)

        for block in plain.hf.model.layers:
            attention, mlp = block.self_attn, block.mlp
            matrices = (
                laid_out(*(getattr(attention, f"{x}_proj").weight for x in "qkv")),
                laid_out(attention.o_proj.weight),
                *(laid_out(getattr(mlp, f"{x}_proj").weight) for x in ("gate", "up", "down")),
            )
            gains = [
                1 + norm.weight.detach().float()
                for norm in (
                    block.input_layernorm, block.post_attention_layernorm,
                    block.pre_feedforward_layernorm, block.post_feedforward_layernorm,
                )
            ]  # fmt: skip
            self.blocks.append((matrices, gains))
        half = plain.hf.config.head_dim // 2
        at_L = torch.arange(context)
        angles = plain.hf.model.rotary_emb(torch.empty(1, 1, dtype=dtype), at_L[None])
        self.cos_L1H, self.sin_L1H = (part[0, :, None, :half].clone() for part in angles)
        far_LL = at_L[:, None] - at_L  # from the query back to the key
        self.masks = []
        for kind in plain.hf.config.layer_types:
            window = plain.hf.config.sliding_window if kind == "sliding_attention" else context
            seen_LL = (far_LL >= 0) & (far_LL < window)
            self.masks.append(torch.zeros(context, context).masked_fill_(~seen_LL, -math.inf))

    def activations(self, tokens_BL: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        import torch

        (n_contexts, length), config = tokens_BL.shape, self.hf.config
        if length != len(self.masks[0]):
            return super().activations(tokens_BL, layers)
        heads, kv_heads, width = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )  # fmt: skip
        half, cap, dtype = width // 2, config.attn_logit_softcapping, self.hf.dtype
        product = torch.ops.mkldnn._linear_pointwise

        def rms(x_ND: Tensor) -> Tensor:
            norm_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
            return (norm_N1.square_() / x_ND.shape[-1]).add_(config.rms_norm_eps).rsqrt_()

        def by_head(part_BLHW: Tensor, rows: int) -> Tensor:
            """(B, L, heads, W) -> (B · kv_heads, rows, W)."""
            return part_BLHW.transpose(1, 2).reshape(n_contexts * kv_heads, rows, width)

        found: dict[int, Tensor] = {}
        with torch.no_grad():
            x_ND = self.hf.model.embed_tokens(tokens_BL).flatten(0, 1).float()
            for at, ((qkv, out, gate, up, down), gains) in enumerate(self.blocks):
                y_ND = (x_ND * rms(x_ND)).mul_(gains[0]).to(dtype)
                qkv_BLHW = product(y_ND, qkv, None, "none", [], "").view(
                    n_contexts, length, heads + 2 * kv_heads, width
                )
                # Rotary embedding of queries and keys: two halves of a head are a plane's axes.
                qk_BLHW, v_BLHW = qkv_BLHW.split([heads + kv_heads, kv_heads], dim=2)
                a, b = qk_BLHW[..., :half], qk_BLHW[..., half:]
                turned_BHLW = qk_BLHW.new_empty(n_contexts, heads + kv_heads, length, width)
                turned_BLHW = turned_BHLW.transpose(1, 2)
                for goal, one, other, sign in (
                    (turned_BLHW[..., :half], a, b, -1), (turned_BLHW[..., half:], b, a, 1)
                ):  # fmt: skip
                    torch.mul(one, self.cos_L1H, out=goal)
                    goal.addcmul_(other, self.sin_L1H, value=sign)
                group = heads // kv_heads * length
                q = by_head(turned_BLHW[:, :, :heads], group)
                k = by_head(turned_BLHW[:, :, heads:], length)
                scores = torch.bmm(q, k.transpose(1, 2)).float().view(-1, length, length)
                scores.mul_(2 / cap / math.sqrt(config.query_pre_attn_scalar)).sigmoid_()
                torch.add(self.masks[at], scores, alpha=2 * cap, out=scores)
                weights = scores.softmax(-1).to(dtype).view(-1, group, length)
                mixed_BHLW = torch.bmm(weights, by_head(v_BLHW, length)).view(
                    n_contexts, heads, length, width
                )
                y_ND = mixed_BHLW.transpose(1, 2).reshape(len(x_ND), heads * width)
                y_ND = product(y_ND, out, None, "none", [], "").float()
                x_ND = torch.addcmul(x_ND, y_ND.mul_(rms(y_ND)), gains[1])
                y_ND = (x_ND * rms(x_ND)).mul_(gains[2]).to(dtype)
                h_NM = product(y_ND, gate, None, "gelu", [], "tanh")
                h_NM = product.binary(y_ND, h_NM, up, None, "mul")
                y_ND = product(h_NM, down, None, "none", [], "").float()
                x_ND.addcmul_(y_ND.mul_(rms(y_ND)), gains[3])
                if at in layers:
                    found[at] = x_ND.to(dtype).view(n_contexts, length, -1)
                if at == max(layers):
                    break
        return [found[layer] for layer in layers]


def for_harvest(lm: LanguageModel, dtype: str, contexts: int, context: int) -> LanguageModel:
    """The language model in the precision and the form in which its passes take least time.

    On a CPU the fused form, where oneDNN has what it needs, the model is small enough to be held
    twice, and its activations are those of the plain form: a context is passed through both.
    """
    import torch

    plain = lm.cast(dtype)
    config = plain.hf.config
    small = sum(parameter.nbytes for parameter in plain.hf.parameters()) < 1e9
    if plain.hf.device.type != "cpu" or not small or not config.attn_logit_softcapping:
        return plain
    last = (config.num_hidden_layers - 1,)
    tokens_BL = torch.arange(context)[None] % config.vocab_size
    try:
        fused = FusedLanguageModel(plain, contexts, context)
        found, expected = (form.activations(tokens_BL, last)[0] for form in (fused, plain))
    except (AttributeError, RuntimeError):  # an operator that this build of torch doesn't have
        return plain
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    return fused if error < (1e-5 if dtype == "float32" else 2e-2) else plain


def hooked_config(hf_config: Any, dtype: torch.dtype, device: Any, name: str) -> Any:
    """TransformerLens' configuration of a Gemma-2 model, from the model's own config.json."""
    from transformer_lens import HookedTransformerConfig

    rope = getattr(hf_config, "rope_parameters", None) or {}
    kinds = {"sliding_attention": "local", "full_attention": "global"}
    return HookedTransformerConfig(
        model_name=name.split("/")[-1],
        tokenizer_name=name,
        original_architecture="Gemma2ForCausalLM",
        n_layers=hf_config.num_hidden_layers,
        d_model=hf_config.hidden_size,
        d_head=hf_config.head_dim,
        n_heads=hf_config.num_attention_heads,
        n_key_value_heads=hf_config.num_key_value_heads,
        d_mlp=hf_config.intermediate_size,
        d_vocab=hf_config.vocab_size,
        n_ctx=hf_config.max_position_embeddings,
        eps=hf_config.rms_norm_eps,
        act_fn=hf_config.hidden_activation,
        initializer_range=hf_config.initializer_range,
        attn_scale=math.sqrt(hf_config.query_pre_attn_scalar),
        use_attn_scale=True,
        attn_scores_soft_cap=hf_config.attn_logit_softcapping or -1.0,
        output_logits_soft_cap=hf_config.final_logit_softcapping or -1.0,
        use_local_attn=True,
        window_size=hf_config.sliding_window,
        attn_types=[kinds[kind] for kind in hf_config.layer_types],
        positional_embedding_type="rotary",
        rotary_base=rope.get("rope_theta", getattr(hf_config, "rope_theta", 10000.0)),
        rotary_dim=hf_config.head_dim,
        normalization_type="RMS",
        final_rms=True,
        use_normalization_before_and_after=True,
        gated_mlp=True,
        init_weights=False,
        default_prepend_bos=True,
        dtype=dtype,
        device=str(device),
    )


def model_path(name: str) -> str:
    """What transformers loads: the hub's name, or a folder; "tinylm": the built-in model's."""
    return str(HERE / "tinylm") if name == "tinylm" else name


@contextlib.contextmanager
def access_errors(name: str) -> Iterator[None]:
    """Makes what transformers raises for a model that can't be loaded an ExperimentError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ExperimentError(
            f"the language model {name!r} can't be loaded ({first_line(error)}); for the gated "
            f"google/gemma-2-2b, {GET_ACCESS}"
        ) from error


def language_model_config(name: str) -> Any:
    """A model's config.json, as transformers reads it."""
    from transformers import AutoConfig

    with access_errors(name):
        # False, not None, which asks on the terminal whether a model's own code may run.
        return AutoConfig.from_pretrained(model_path(name), trust_remote_code=False)


def load_language_model(
    name: str, dtype: str = "float32", device: torch.device | str = "cpu"
) -> LanguageModel:
    """Loads a Gemma-2 model by its Hugging Face name, or from a folder in that form.

    Args:
        name: the hub's name or a folder; "tinylm": the built-in model, its files verified first.
        dtype: "float32" or "bfloat16".

    Raises:
        ExperimentError: it is not there, not readable, not allowed, or not a Gemma-2 model.
    """
    from transformers import AutoTokenizer, Gemma2ForCausalLM

    if name == "tinylm":
        from tinylm import corpus

        with corpus_errors():
            corpus.verify_files()
            corpus.check_packages()
    config, path = language_model_config(name), model_path(name)
    if config.model_type != "gemma2":
        raise ExperimentError(
            f"model {name!r} must be of the Gemma-2 architecture, but its config.json says "
            f"{config.model_type!r}: set Settings.model to a Gemma-2 model"
        )
    # Or transformers takes what a bot has made of the pickle in a pull request.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    with access_errors(name):
        try:
            hf = Gemma2ForCausalLM.from_pretrained(
                path, dtype=dtype, attn_implementation="eager", use_safetensors=True
            )
        except OSError as error:
            if " file named model.safetensors" not in str(error):
                raise
            raise ExperimentError(
                f"the language model {name!r} must have its weights as safetensors, but has no "
                "model.safetensors; a pickle such as pytorch_model.bin is not read, since it can "
                "run code: choose a model with safetensors, or convert the weights"
            ) from error
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.unk_token_id in tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise ExperimentError(
            f"the tokenizer of the language model {name!r} knows no words: its tokenizer.json is "
            "missing or damaged; fetch the model again"
        )
    hf.requires_grad_(False)
    return LanguageModel(hf.eval().to(device), tokenizer, name)


# ---------------------------------------------------------------------------- few of many
#
# Products with features of which almost all are zero: on a CPU, gathering rows takes less time
# than multiplying whole matrices where less than FEW of the features are active (bench/speed.py).

FEW = 0.125


class Few(NamedTuple):
    """The positive entries of a (B, F) matrix, in its order, and their places in a (B, M) one."""

    rows: Tensor
    columns: Tensor
    places: Tensor
    widest: int  # M, the most in a row


def few_active(pre_BF: Tensor, above: float | Tensor = 0.0) -> Few | None:
    """Where preactivations are above a number; None if there are many, or on a GPU (unmeasured)."""
    import numpy as np
    import torch

    if pre_BF.device.type != "cpu":
        return None
    n_rows, width = pre_BF.shape
    active_BF = pre_BF.detach() > above
    if active_BF.count_nonzero() > FEW * active_BF.numel():
        return None
    flat = torch.from_numpy(np.flatnonzero(active_BF.numpy()))  # torch's nonzero takes 4 times it
    rows = flat // width
    counts_B = torch.bincount(rows, minlength=n_rows)
    places = torch.arange(len(rows)) - (counts_B.cumsum(0) - counts_B)[rows]
    return Few(rows, flat - rows * width, places, max(int(counts_B.max()), 1))


def active_values(
    pre_BF: Tensor, few: Few, centred_BD: Tensor, bias_F: Tensor, W_enc: Tensor
) -> tuple[Tensor, Tensor]:
    """What `few` names of pre_BF = centred_BD @ W_enc + bias_F: (B, M) values, (B, M) columns.

    Rows with fewer than M end in zeros. Gradients of W_enc and bias_F are sums over these entries.
    """
    import torch

    shape, at = (len(pre_BF), few.widest), (few.rows, few.places)
    columns_BM = torch.zeros(shape, dtype=torch.int64).index_put(at, few.columns)
    values_BM = pre_BF.new_zeros(shape).index_put(at, pre_BF[few.rows, few.columns])
    return gradients_by_index()[0].apply(values_BM, few, centred_BD, bias_F, W_enc), columns_BM


@functools.cache
def gradients_by_index() -> tuple[type, type]:
    """Two functions that return their first argument; what they are for is their backward pass."""
    import torch

    class OfEncoder(torch.autograd.Function):
        """See `active_values`."""

        @staticmethod
        def forward(
            ctx: Any, values_BM: Tensor, few: Few, centred_BD: Tensor, bias_F: Tensor, W_enc: Tensor
        ) -> Tensor:
            ctx.few, ctx.centred_BD, ctx.n_features = few, centred_BD, len(bias_F)
            return values_BM.view_as(values_BM)

        @staticmethod
        def backward(ctx: Any, grad_BM: Tensor) -> tuple[Tensor | None, ...]:
            few, n_features = ctx.few, ctx.n_features
            grad = grad_BM[few.rows, few.places]
            sums_FD = weighted_sums(few.columns, grad, few.rows, ctx.centred_BD, n_features)
            bias_F = torch.bincount(few.columns, weights=grad, minlength=n_features)
            return None, None, None, bias_F.to(grad.dtype), sums_FD.T

    class OfDecoder(torch.autograd.Function):
        """See `sum_of_rows`."""

        @staticmethod
        def forward(
            ctx: Any, out_BD: Tensor, indices: Tensor, values: Tensor, rows: Tensor, W_dec: Tensor
        ) -> Tensor:
            ctx.save_for_backward(indices, values, rows)
            ctx.n_features = len(W_dec)
            return out_BD.view_as(out_BD)

        @staticmethod
        def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
            indices, values, rows = ctx.saved_tensors
            sums_FD = weighted_sums(indices, values, rows, grad_BD, ctx.n_features)
            return grad_BD, None, None, None, sums_FD

    return OfEncoder, OfDecoder


def weighted_sums(groups: Tensor, weights: Tensor, rows: Tensor, table: Tensor, n: int) -> Tensor:
    """(n, D): by group, the sum of weight * table[row] over the entries that are in the group.

    Args:
        groups, weights, rows: (N,) each. table: (·, D).
    """
    import numpy as np
    import torch

    # numpy's stable sort of 16-bit numbers is a radix sort, ten times as fast as torch's.
    narrow = np.uint16 if n <= 2**16 else np.int32
    order = torch.from_numpy(np.argsort(groups.numpy().astype(narrow), kind="stable"))
    counts = torch.bincount(groups, minlength=n)
    return torch.nn.functional.embedding_bag(
        rows[order], table, counts.cumsum(0) - counts, mode="sum",
        per_sample_weights=weights[order],
    )  # fmt: skip


def same_by_index(loss: Callable[[bool], Any], parameters: list[nn.Parameter]) -> bool:
    """Whether a loss has the gradients with features by index that it has with all of them.

    An edit may be written for all of them alone: a mean over features, say.

    Args:
        loss: by whether features go by index, what has the loss as its `total`.
    """
    import torch

    def gradients(by_index: bool) -> list[Tensor]:
        return torch.autograd.grad(loss(by_index).total, parameters, materialize_grads=True)

    pairs = zip(gradients(True), gradients(False))
    return all(float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-9 for a, b in pairs)


def by_index_if_same(
    trainer: Any, loss: Callable[[bool], Any], parameters: list[nn.Parameter]
) -> Any:
    """The loss with features by index, or with all of them where that has other gradients.

    The first loss that goes by index decides; `trainer.by_index` says how: None, not yet known.

    Args:
        loss: see `same_by_index`; its `indices_BM` is None where features don't go by index.
    """
    import torch

    found = loss(trainer.by_index is not False)
    if found.indices_BM is not None and trainer.by_index is None:
        with torch.autocast(parameters[0].device.type, enabled=False):
            trainer.by_index = same_by_index(loss, parameters)
        if not trainer.by_index:
            print("contrastive_loss has other gradients with features by index: all are used")
            return loss(False)
    return found


def sum_of_rows(values_BM: Tensor, indices_BM: Tensor, W_dec: Tensor) -> Tensor:
    """(B, D): Σ_m values[b, m] · W_dec[indices[b, m]], over the values that are not zero."""
    import torch

    used_BM = values_BM.detach() != 0
    counts_B = used_BM.sum(1)
    indices, values = indices_BM[used_BM], values_BM[used_BM]
    out_BD = torch.nn.functional.embedding_bag(
        indices, W_dec.detach(), counts_B.cumsum(0) - counts_B, mode="sum",
        per_sample_weights=values,
    )  # fmt: skip

    # embedding_bag's own gradient of its rows is slower.
    rows = torch.repeat_interleave(counts_B)
    return gradients_by_index()[1].apply(out_BD, indices, values.detach(), rows, W_dec)


# --------------------------------------------------------------------- SAE-Bench and SAELens


@contextlib.contextmanager
def tinylm_tasks(settings: Settings) -> Iterator[None]:
    """Makes tinylm's labelled tasks known to SAE-Bench by the names tinylm/A/… and tinylm/B/….

    SAE-Bench knows only its own data sets; this adds to its table of classes and stands in front
    of its loader, and undoes both afterwards.
    """
    if not any(name.startswith("tinylm/") for name in settings.probe_sets):
        yield
        return
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    from tinylm import tasks

    stock = dataset_utils.get_multi_label_train_test_data
    names = {
        f"tinylm/{letter}/{task}": task
        for letter, members in tasks.TASK_SETS.items()
        for task in members
    }

    def load(name: str, train_size: int, test_size: int, seed: int) -> tuple[dict, dict]:
        if name not in names:
            return stock(name, train_size, test_size, seed)
        with corpus_errors():
            return tasks.load_task(names[name], train_size, test_size, seed)

    for name, task in names.items():
        dataset_info.chosen_classes_per_dataset[name] = list(tasks.TASKS[task])
    dataset_utils.get_multi_label_train_test_data = load
    try:
        yield
    finally:
        dataset_utils.get_multi_label_train_test_data = stock
        for name in names:
            del dataset_info.chosen_classes_per_dataset[name]


def probe_names(settings: Settings) -> list[str]:
    """The data sets of sparse probing; tinylm/A and tinylm/B stand for three tasks each."""
    names = []
    for name in settings.probe_sets:
        if name in ("tinylm/A", "tinylm/B"):
            from tinylm import tasks

            names += [f"{name}/{task}" for task in tasks.TASK_SETS[name.removeprefix("tinylm/")]]
        else:
            names.append(name)
    return names


def probing_config(settings: Settings) -> Any:
    """SAE-Bench's SparseProbingEvalConfig of a run."""
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    return SparseProbingEvalConfig(
        random_seed=settings.probe_seed,
        dataset_names=probe_names(settings),
        probe_train_set_size=settings.probe_train,
        probe_test_set_size=settings.probe_test,
        context_length=settings.context,
        sae_batch_size=settings.probe_sae_batch,
        llm_batch_size=settings.probe_llm_batch,
        llm_dtype=settings.lm_dtype,
        model_name=settings.model,
        k_values=list(settings.probe_ks),
    )


def core_config(settings: Settings) -> Any:
    """SAE-Bench's CoreEvalConfig of a run, everything switched on."""
    from sae_bench.evals.core.eval_config import CoreEvalConfig

    return CoreEvalConfig(
        model_name=settings.model,
        llm_dtype=settings.lm_dtype,
        batch_size_prompts=settings.core_prompts,
        n_eval_reconstruction_batches=settings.core_reconstruction_batches,
        n_eval_sparsity_variance_batches=settings.core_sparsity_batches,
        dataset=settings.core_text,
        context_size=settings.context,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        # Without both of these SAE-Bench 0.6.0 fails in its own validation of the result.
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        # BOS is not trained on, so it must not be replaced by its reconstruction.
        exclude_special_tokens_from_reconstruction=True,
    )


def core_store(settings: Settings, model: Any, sae: Any) -> Any:
    """SAELens' store of the evaluation text, as SAE-Bench's multiple_evals makes it."""
    from sae_lens.training.activations_store import ActivationsStore

    store = ActivationsStore.from_sae(
        model,
        sae,
        context_size=settings.context,
        dataset=core_text(settings),
    )
    store.shuffle_input_dataset(seed=42)
    return store


def core_text(settings: Settings) -> Any:
    """The text of the core evaluation in a form that SAELens takes."""
    name = settings.core_text
    if name == "tinylm":
        return heldout_passages()
    with text_errors(name):
        return EvaluationText(name, load_dataset(name, split="train", streaming=True))


class EvaluationText:
    """A streamed data set for SAELens' store; what is wrong with it is an ExperimentError."""

    def __init__(self, name: str, stream: Any) -> None:
        self.name, self.stream = name, stream

    def __iter__(self) -> Iterator[dict]:
        with text_errors(self.name):
            yield from text_rows(self.name, self.stream)

    def shuffle(self, seed: int) -> EvaluationText:
        """The order of files alone, as SAELens' store shuffles a stream."""
        return EvaluationText(self.name, self.stream.shuffle(seed=seed, buffer_size=1))


@functools.cache
def heldout_passages() -> Any:
    """tinylm's held-out text as a data set, read once: each SAE is evaluated on it."""
    import datasets

    return datasets.Dataset.from_dict({"text": list(documents("tinylm", "heldout")())})


def formatted(sae: CustomSAE, settings: Settings) -> CustomSAE:
    """A copy of a folded SAE, prepared for SAE-Bench, which casts and marks what it is given."""
    from sae_bench.sae_bench_utils import general_utils

    dtype = general_utils.str_to_dtype(settings.lm_dtype)
    sae = copy.deepcopy(sae).to(device=sae.W_enc.device, dtype=dtype)
    sae.cfg.dtype = settings.lm_dtype
    return general_utils.load_and_format_sae("", sae, str(sae.W_enc.device))[1]


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Has glibc's allocator keep what is freed, for the next tensor; elsewhere nothing.

    By itself it asks the system for every large tensor anew, and each page of it is then zeroed
    when it is first touched: a third of the time of an evaluation on two cores. Training with
    small tensors gains little by it and would take twice the memory; see `memory_for_steps`.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # as in malloc.h
    glibc = c_library()
    if glibc:
        glibc.mallopt(mmap_max, 0)
        glibc.mallopt(trim_threshold, 2**31 - 1)
    try:
        yield
    finally:
        if glibc:  # to where the allocator's own adjustment ends up
            glibc.mallopt(mmap_max, 65_536)
            glibc.mallopt(mmap_threshold, 2**25)
            glibc.mallopt(trim_threshold, 2**26)
        trim_memory()


def memory_for_steps(settings: Settings, d_in: int) -> contextlib.AbstractContextManager[None]:
    """`memory_kept` for training steps whose tensors glibc would ask the system for every time.

    Those of 32 MiB and more: at 2304 -> 16384 a step takes a little over half of the time with it.
    """
    largest = 4 * settings.d_sae * max(settings.batch, d_in)
    return memory_kept() if largest >= 2**25 else contextlib.nullcontext()


def trim_memory() -> None:
    """Gives freed memory back to the system, which glibc's allocator does only for its end."""
    if glibc := c_library():
        glibc.malloc_trim(0)


def c_library() -> ctypes.CDLL | None:
    """glibc, where it is."""
    with contextlib.suppress(OSError):
        found = ctypes.CDLL("libc.so.6")
        return found if hasattr(found, "mallopt") and hasattr(found, "malloc_trim") else None
    return None


def side_by_side(jobs: dict[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """Runs functions in turns, each until it returns or calls `give_way`: {name: its result}.

    One thread, one order: what they compute is reproducible. An exception of one ends all.
    """
    from greenlet import greenlet

    running = {name: greenlet(job) for name, job in jobs.items()}
    results = {}
    try:
        while running:
            for name, turn in list(running.items()):
                result = turn.switch()
                if turn.dead:
                    results[name] = result
                    del running[name]
    finally:
        for turn in running.values():  # after an exception: leave their with blocks now
            turn.throw()
    return results


def give_way() -> None:
    """Lets the other functions of `side_by_side` catch up."""
    from greenlet import getcurrent

    getcurrent().parent.switch()


class SharedPasses:
    """The batches, and the language model's passes, of core evaluations that run side by side.

    SAE-Bench's `run_evals` asks a store for batches and a model for passes over them, and makes
    every pass anew for each SAE. Here SAEs advance together, and a batch costs one pass of the
    unchanged model for all of them, one from each ablated layer on, and for each SAE one from its
    own layer on. The tensors are the stock ones bit for bit. Only one batch is held.

    Args:
        model: a HookedTransformer. store: SAELens' ActivationsStore of the evaluation text.
        layers: those of the SAEs.
        advance: called with 1 after each batch.
        kept: where the unchanged and the ablated model's passes are kept.
    """

    def __init__(
        self,
        model: Any,
        store: Any,
        layers: Iterable[int],
        advance: Callable[[int], None],
        kept: TensorFiles | None = None,
    ) -> None:
        self.model, self.store, self.advance = model, store, advance
        self.kept = kept or TensorFiles("", None)
        self.layers = sorted(set(layers))
        self.hooks = {f"blocks.{layer}.hook_resid_post": layer for layer in self.layers}
        self.n_batches = self.n_resets = 0
        self.tokens_BL: Tensor | None = None
        self.passes: dict[Any, Any] = {}
        # Sums over the tokens of the sparsity batches, for fvu: {hook: …}.
        self.count = 0
        self.sum_D: dict[str, Any] = dict.fromkeys(self.hooks, 0.0)
        self.squares: dict[str, float] = dict.fromkeys(self.hooks, 0.0)

    def batch(self, number: int, n_prompts: int) -> Tensor:
        """The batch of this number, from 1 on: the last one, or the next."""
        if number > self.n_batches:
            self.n_batches = number
            self.tokens_BL = self.store.get_batch_tokens(n_prompts)
            self.passes = {}
            self.advance(1)
        return self.tokens_BL

    def reset(self, number: int) -> None:
        """The store's reset of this number, from 1 on."""
        if number > self.n_resets:
            self.n_resets = number
            self.store.reset_input_dataset()

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, computed once for the batch."""
        if key not in self.passes:
            self.passes[key] = compute()
        return self.passes[key]

    def original(self) -> tuple[Any, Any]:
        """Logits and losses of the unchanged model; its residual streams by hook."""

        def compute() -> Any:
            both, cache = self.model.run_with_cache(
                self.tokens_BL, return_type="both", loss_per_token=True,
                names_filter=list(self.hooks),
            )  # fmt: skip
            return tuple(both), {hook: cache[hook] for hook in self.hooks}

        return self.once("original", lambda: self.from_kept("original", compute))

    def from_kept(self, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` returns for this batch; see `TensorFiles.get`."""
        import torch

        device = self.tokens_BL.device

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device)
            if isinstance(value, dict):
                return {key: moved(item) for key, item in value.items()}
            return tuple(moved(item) for item in value)

        found = self.kept.get(f"{self.n_batches:06d}-{name}", compute)
        self.kept.flush()  # logits are large: a copy of the next ones beside these takes 0.5 GB
        return moved(found)

    def residuals(self) -> Any:
        """The residual streams by hook, and the count of what fvu needs of them."""

        def one_pass() -> Any:
            _, cache = self.model.run_with_cache(
                self.tokens_BL, prepend_bos=False, names_filter=list(self.hooks),
                stop_at_layer=self.layers[-1] + 1,
            )  # fmt: skip
            return {hook: cache[hook] for hook in self.hooks}

        def compute() -> Any:
            cache = self.from_kept("residuals", one_pass)
            keep_BL = self.keep()
            self.count += int(keep_BL.sum())
            for hook in self.hooks:
                x_ND = cache[hook][keep_BL].double()
                self.sum_D[hook] = self.sum_D[hook] + x_ND.sum(0)
                self.squares[hook] += float(x_ND.pow(2).sum())
            return cache

        return self.once("residuals", compute)

    def keep(self) -> Tensor:
        """(B, L) bool: neither BOS nor EOS nor padding."""
        import torch

        def compute() -> Tensor:
            special = torch.tensor(sorted(special_ids(self.model.tokenizer)))
            return ~torch.isin(self.tokens_BL, special.to(self.tokens_BL.device))

        return self.once("keep", compute)

    def spread(self, hook: str) -> float:
        """Σ‖x − x̄‖² over the tokens of the sparsity batches."""
        return self.squares[hook] - float(self.sum_D[hook].pow(2).sum()) / self.count


class SharedView:
    """SharedPasses for one SAE: what `run_evals` takes for a store and for a model."""

    def __init__(self, shared: SharedPasses, sae: CustomSAE) -> None:
        self.shared, self.hook = shared, sae.cfg.hook_name
        self.n_batches = self.n_resets = 0
        self.error = 0.0  # Σ‖x − x̂‖² over the tokens of the sparsity batches
        self.x_BLD: Tensor | None = None  # what the SAE is to reconstruct, in those batches
        self.context_size = shared.store.context_size
        decode = sae.decode

        def decode_and_count(feature_acts: Tensor) -> Tensor:
            out_BLD = decode(feature_acts)
            if self.x_BLD is not None:
                error_BLD = (self.x_BLD - out_BLD)[shared.keep()].double()
                self.error += float(error_BLD.pow(2).sum())
                self.x_BLD = None
            return out_BLD

        sae.decode = decode_and_count

    def get_batch_tokens(self, n_prompts: int) -> Tensor:
        give_way()
        self.n_batches += 1
        return self.shared.batch(self.n_batches, n_prompts)

    def reset_input_dataset(self) -> None:
        self.n_resets += 1
        self.shared.reset(self.n_resets)

    def __call__(self, tokens_BL: Tensor, return_type: str, loss_per_token: bool) -> Any:
        return self.shared.original()[0]

    def run_with_hooks(
        self, tokens_BL: Tensor, return_type: str, fwd_hooks: list, loss_per_token: bool
    ) -> Any:
        ((name, hook),) = fwd_hooks
        changed_BLD = hook(self.shared.original()[1][name], hook=None)

        def compute() -> Any:
            return tuple(self.shared.model(
                changed_BLD, start_at_layer=self.shared.hooks[name] + 1, tokens=tokens_BL,
                return_type=return_type, loss_per_token=loss_per_token,
            ))  # fmt: skip

        if changed_BLD.any():
            return compute()
        ablated = f"ablated-{self.shared.hooks[name]}"
        return self.shared.once(ablated, lambda: self.shared.from_kept(ablated, compute))

    def run_with_cache(self, tokens_BL: Tensor, **kwargs: Any) -> tuple[None, Any]:
        cache = self.shared.residuals()
        self.x_BLD = cache[self.hook]
        return None, cache

    def fvu(self) -> float:
        """Σ‖x − x̂‖² / Σ‖x − x̄‖² over the tokens of the sparsity batches.

        Reported because SAE-Bench 0.6.0's `explained_variance` averages x² where it should
        average x (evals/core/main.py, mean_act_per_dimension): a constant doesn't score 0.
        """
        return self.error / self.shared.spread(self.hook)


def passes_key(settings: Settings, device: torch.device, **more: Any) -> dict[str, Any]:
    """What passes of the language model in an evaluation depend on beside their text, as JSON."""
    chosen = ("lm_dtype", "layers", "context", "core_prompts", "probe_llm_batch")
    return {
        "setting": {field: getattr(settings, field) for field in chosen},
        **surroundings(settings, "import harness", device),
        **more,
    }


def core_passes(settings: Settings, model: Any, layers: list[int]) -> TensorFiles:
    """Where core evaluation's passes of the language model are kept, if they are not too large."""
    tokens = settings.core_prompts * settings.context
    logits = settings.core_reconstruction_batches * (1 + len(layers)) * model.cfg.d_vocab
    residuals = settings.core_reconstruction_batches + settings.core_sparsity_batches
    numbers = tokens * (logits + residuals * len(layers) * model.cfg.d_model)
    key = None
    if numbers * model.cfg.dtype.itemsize <= ACTIVATIONS_GB * 1e9:
        counts = [settings.core_reconstruction_batches, settings.core_sparsity_batches, layers]
        text = text_identity(settings.core_text)
        key = passes_key(settings, model.cfg.device, counts=counts, **text)
    return TensorFiles("core passes", key)


def run_core(
    saes: dict[Any, CustomSAE],
    model: Any,
    settings: Settings,
    advance: Callable[[int], None],
    keep: bool = False,
) -> dict[Any, tuple[dict, dict, float]]:
    """SAE-Bench's `run_evals` of SAEs that `formatted` has prepared, side by side.

    Args:
        keep: the language model's passes for the next run.
    Returns:
        by the SAEs' keys: scalars by group, metrics of each feature, and fvu.
    """
    import torch
    from sae_bench.evals.core import main as core

    config = core_config(settings)
    saes = {key: copy.copy(sae) for key, sae in saes.items()}  # views put their decode on them
    store = core_store(settings, model, next(iter(saes.values())))
    layers = sorted({sae.cfg.hook_layer for sae in saes.values()})
    kept_passes = core_passes(settings, model, layers) if keep else None
    shared = SharedPasses(model, store, layers, advance, kept_passes)
    views = {key: SharedView(shared, sae) for key, sae in saes.items()}

    def job(key: Any) -> Callable[[], tuple[dict, dict]]:
        def evaluated() -> tuple[dict, dict]:
            with doing(str(key)):
                view = views[key]
                ignored = special_ids(model.tokenizer)
                return core.run_evals(saes[key], view, view, config, ignore_tokens=ignored)

        return evaluated

    # Around all of them: each run_evals restores, when it ends, the mode that it began in.
    try:
        with torch.no_grad(), memory_kept():
            results = side_by_side({key: job(key) for key in saes})
    except StopIteration as error:
        raise ExperimentError(
            f"the text {settings.core_text!r} is too short for one batch of core_prompts = "
            f"{settings.core_prompts} contexts: lower it, or choose another core_text"
        ) from error
    return {
        key: (scalars, features, views[key].fvu()) for key, (scalars, features) in results.items()
    }


def mean_l0(
    saes: dict[Any, CustomSAE], model: Any, settings: Settings, n_batches: int = 4
) -> dict[Any, float]:
    """Active features per token, on the first batches of the evaluation text, by any key."""
    import torch

    ready = {key: formatted(sae, settings) for key, sae in saes.items()}
    store = core_store(settings, model, next(iter(ready.values())))
    layers = (sae.cfg.hook_layer for sae in ready.values())
    shared = SharedPasses(model, store, layers, advance=lambda n: None)
    active = dict.fromkeys(saes, 0)
    with torch.no_grad():
        for number in range(1, n_batches + 1):
            shared.batch(number, settings.core_prompts)
            cache, keep_BL = shared.residuals(), shared.keep()
            for key, sae in ready.items():
                with doing(f"layer {sae.cfg.hook_layer}"):
                    f_NF = sae.encode(cache[sae.cfg.hook_name][keep_BL])
                    active[key] += int((f_NF > 0).sum())
    return {key: count / shared.count for key, count in active.items()}


def probe_tokens(
    dataset: str, tokenizer: Any, device: torch.device, settings: Settings
) -> list[dict[str, Any]]:
    """The token ids of a probing data set, train and test, as SAE-Bench draws and tokenizes it.

    Raises:
        ExperimentError: it has other columns or classes, or too few rows.
    """
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    too_few = (
        f"the probing data set {dataset!r} has too few rows for probe_train = "
        f"{settings.probe_train} and probe_test = {settings.probe_test}: lower them"
    )
    stock, dataset_utils.load_dataset = dataset_utils.load_dataset, load_dataset
    try:
        split = dataset_utils.get_multi_label_train_test_data(
            dataset, settings.probe_train, settings.probe_test, settings.probe_seed
        )
    except ExperimentError:
        raise
    except KeyError as error:
        raise ExperimentError(
            f"the probing data set {dataset!r} has no {error}, which SAE-Bench reads: its columns "
            "or classes have changed; take it out of probe_sets, or pin an older copy"
        ) from error
    except Exception as error:
        if isinstance(error, AssertionError) or "larger sample" in str(error):
            raise ExperimentError(too_few) from error
        raise ExperimentError(
            f"the probing data set {dataset!r} can't be read ({type(error).__name__}: "
            f"{first_line(error)}): look at its files, or take it out of probe_sets"
        ) from error
    finally:
        dataset_utils.load_dataset = stock
    classes = dataset_info.chosen_classes_per_dataset[dataset]
    # SAE-Bench leaves out classes of some data sets that have too few rows.
    if any(label not in texts for texts in split for label in classes):
        raise ExperimentError(too_few)
    return [
        dataset_utils.tokenize_data_dictionary(
            dataset_utils.filter_dataset(texts, classes),
            tokenizer,
            settings.context,
            str(device),
        )
        for texts in split
    ]


def read_probe_texts(
    settings: Settings, tokenizer: Any, device: torch.device
) -> dict[str, list[dict[str, Any]]]:
    """`probe_tokens` of each data set: read before training, so that what is wrong shows early.

    So is the beginning of the evaluation's text. tinylm's are kept for the next run.
    """

    def drawn(name: str) -> list[dict[str, Any]]:
        return [
            {label: {"input_ids": encoded["input_ids"]} for label, encoded in part.items()}
            for part in probe_tokens(name, tokenizer, device, settings)
        ]

    if not settings.core_text.startswith("tinylm"):
        texts = documents(settings.core_text, "heldout")()
        if next(texts, None) is None:
            raise ExperimentError(f"the text {settings.core_text!r} holds no text: check core_text")
    with tinylm_tasks(settings):
        names = probe_names(settings)
        progress = Progress("probing texts", len(names), "data sets")
        texts = {}
        for name in names:
            kept_texts = probing_texts(name, settings, device)
            texts[name] = [
                {label: {"input_ids": e["input_ids"].to(device)} for label, e in part.items()}
                for part in kept_texts.get("all", functools.partial(drawn, name))
            ]
            kept_texts.flush()
            progress.advance(1, name)
    progress.close()
    return texts


def probing_texts(dataset: str, settings: Settings, device: torch.device) -> TensorFiles:
    """Where the token ids of one of tinylm's tasks are kept; a hub's data sets may change."""
    if not dataset.startswith("tinylm/"):
        return TensorFiles("probing texts", None)
    chosen = ("probe_train", "probe_test", "probe_seed")
    key = {
        "data set": dataset,
        "setting": {field: getattr(settings, field) for field in chosen},
        **surroundings(settings, "import harness", device),
        **text_identity("tinylm"),
    }
    return TensorFiles("probing texts", key)


def probing_passes(settings: Settings, model: Any, texts: list[dict[str, Any]]) -> TensorFiles:
    """Where a data set's passes of the language model are kept, if they are not too large.

    Args:
        texts: {class: {"input_ids": (N, L)}} per split.
    """
    numbers = sum(encoded["input_ids"].numel() for part in texts for encoded in part.values())
    numbers *= len(settings.layers) * model.cfg.d_model
    key = None
    if numbers * model.cfg.dtype.itemsize <= ACTIVATIONS_GB * 1e9:
        key = passes_key(settings, model.cfg.device, texts=tokens_digest(texts))
    return TensorFiles("probing passes", key)


def pooled_features(
    splits: Sequence[dict[str, Any]],
    model: Any,
    saes: dict[str, CustomSAE],
    settings: Settings,
    kept_passes: TensorFiles | None = None,
) -> list[tuple[dict[int, dict], dict[str, dict]]]:
    """Mean activations of each text, of the language model and of each SAE, in one forward pass.

    The batches are SAE-Bench's (`probe_llm_batch` texts through the model, `probe_sae_batch`
    through an SAE, one class at a time), and so are the functions: the features are the stock
    ones bit for bit, without ever holding a data set's activations at once. On a CPU classes are
    passed through side by side, each on its own cores.

    Args:
        splits: class -> {"input_ids": (N, L)}, from SAE-Bench's tokenize_data_dictionary; of
            several splits, train first.
        kept_passes: where the language model's are kept.
    Returns:
        for each split, by layer {class: (N, D)}, and by the SAE's name {class: (N, F)}.
    """
    import torch
    from sae_bench.sae_bench_utils import activation_collection as collection

    hooks = {layer: f"blocks.{layer}.hook_resid_post" for layer in settings.layers}
    kept_passes = kept_passes or TensorFiles("", None)

    def one_pass(tokens_BL: Tensor) -> list[Tensor]:
        _, cache = model.run_with_cache(
            tokens_BL, names_filter=list(hooks.values()), stop_at_layer=max(hooks) + 1
        )
        return [cache[hook] for hook in hooks.values()]

    def one_class(item: tuple[int, int, str]) -> dict[Any, Tensor]:
        """By layer (N, D), and by the SAE's name (N, F)."""
        at, number, label = item
        tokens_NL = splits[at][label]["input_ids"]
        waiting = {layer: [] for layer in hooks}
        parts: dict[Any, list] = {key: [] for key in (*hooks, *saes)}
        done = 0
        for start in range(0, len(tokens_NL), settings.probe_llm_batch):
            batch_BL = tokens_NL[start : start + settings.probe_llm_batch]
            mask_BL = collection.get_bos_pad_eos_mask(batch_BL, model.tokenizer)
            name = f"{('train', 'test')[at]}-{number:03d}-{start:06d}"
            acts = kept_passes.get(name, functools.partial(one_pass, batch_BL))
            for layer, acts_BLD in zip(hooks, acts):
                waiting[layer].append(acts_BLD.to(mask_BL.device) * mask_BL[:, :, None])
            done_now = start + len(batch_BL)
            while (size := min(settings.probe_sae_batch, len(tokens_NL) - done)) and (
                done_now - done >= size
            ):
                done += size
                for layer in hooks:
                    acts_BLD = torch.cat(waiting[layer])
                    window = {label: acts_BLD[:size].clone()}
                    waiting[layer] = [acts_BLD[size:]]
                    parts[layer].append(collection.create_meaned_model_activations(window)[label])
                    for name, sae in saes.items():
                        if sae.cfg.hook_layer == layer:
                            meaned = collection.get_sae_meaned_activations(
                                window, sae, settings.probe_sae_batch
                            )
                            parts[name].append(meaned[label])
        return {key: torch.cat(tensors) for key, tensors in parts.items()}

    items = [
        (at, number, label)
        for at, tokens in enumerate(splits)
        for number, label in enumerate(tokens)
    ]
    found = in_order(one_class, items, torch.device(model.cfg.device))
    results = [({key: {} for key in hooks}, {key: {} for key in saes}) for _ in splits]
    for (at, _, label), meaned in zip(items, found):
        for kind in results[at]:
            for key in kind:
                kind[key][label] = meaned[key]
    kept_passes.flush()
    return results


def tokens_digest(split: list[dict[str, Any]]) -> str:
    """Stands for the token ids of a probing data set, {class: {"input_ids": (N, L)}} per split."""
    tokens = hashlib.sha256()
    for part in split:
        for label, encoded in part.items():
            tokens.update(f"{label} {tuple(encoded['input_ids'].shape)} ".encode())
            tokens.update(encoded["input_ids"].cpu().numpy().tobytes())
    return tokens.hexdigest()


def llm_probes_key(
    dataset: str, layer: int, split: list[dict[str, Any]], settings: Settings
) -> dict[str, Any]:
    """All that the language model's probes of a layer and a data set depend on.

    Args:
        split: {class: {"input_ids": (N, L)}}, for train and for test.
    """
    chosen = ("lm_dtype", "probe_ks", "probe_seed", "probe_llm_batch", "probe_sae_batch")
    device = next(iter(split[0].values()))["input_ids"].device
    return {
        "dataset": dataset,
        "layer": layer,
        "tokens": tokens_digest(split),
        "setting": {field: getattr(settings, field) for field in chosen},
        **surroundings(settings, "import harness", device),
    }


@functools.cache
def model_identity(name: str) -> str:
    """What tells a model's weights from others: their commit on the hub, or their SHA-256."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(model_path(name))
    if folder.is_dir():
        files = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".json")]
        return " ".join(sha256_file(file) for file in files)
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent.name if isinstance(config, str) else name


def probe(train: dict, test: dict, prefix: str, ks: tuple[int, ...]) -> dict[str, dict]:
    """SAE-Bench's probes on pooled features, in SAE-Bench's order: {metric: {class: accuracy}}."""
    from sae_bench.evals.sparse_probing import probe_training

    results = {}
    for k in (None, *ks):
        options = dict(use_sklearn=False, batch_size=250, epochs=100, lr=1e-2) if k is None else {}
        try:
            _, accuracies = probe_training.train_probe_on_activations(
                train, test, select_top_k=k, **options
            )
        except AssertionError as error:
            raise ExperimentError(
                "SAE-Bench's probe tells none of the test texts right, which happens with few of "
                "them: raise probe_test"
            ) from error
        middle = "" if k is None else f"top_{k}_"
        results[f"{prefix}_{middle}test_accuracy"] = accuracies
    return results


def probe_states(saes: Iterable[str], settings: Settings) -> dict[str, str]:
    """By SAE, the state of the generator that its probes draw from at the start, in hexadecimal."""
    import torch

    torch.manual_seed(settings.probe_seed)
    return dict.fromkeys(saes, torch.get_rng_state().numpy().tobytes().hex())


def probe_data_set(
    dataset: str,
    split: list[dict],
    saes: dict[str, CustomSAE],
    states: dict[str, str],
    model: Any,
    settings: Settings,
    keys: dict[str, dict] | None,
) -> dict[str, dict]:
    """SAE-Bench's probes on one data set: by SAE {metric: {class: accuracy}}.

    The language model's own probes begin at the seed for each data set and are kept from run to
    run: no SAE changes them.

    Args:
        saes: prepared by `formatted`. states: see `probe_states`; left as the next set needs them.
        keys: by SAE, all that its figures depend on beside texts and states: they are kept under
            it, and the language model's passes are; None: nothing is.
    """
    import torch

    @memory_kept()
    def some_saes(names: list[str]) -> dict[str, tuple[dict, str]]:
        some = {name: saes[name] for name in names}
        passes = probing_passes(settings, model, split) if keys else None
        (llm_train, sae_train), (llm_test, sae_test) = pooled_features(
            split, model, some, settings, passes
        )
        llm, results = {}, {}
        for layer in {sae.cfg.hook_layer: None for sae in some.values()}:
            torch.manual_seed(settings.probe_seed)
            key = llm_probes_key(dataset, layer, split, settings)
            acts = llm_train[layer], llm_test[layer], "llm", settings.probe_ks
            llm[layer] = kept("language model probes", key, probe, *acts)
        for name, sae in some.items():
            torch.set_rng_state(torch.tensor(list(bytes.fromhex(states[name])), dtype=torch.uint8))
            found = probe(sae_train[name], sae_test[name], "sae", settings.probe_ks)
            after = torch.get_rng_state().numpy().tobytes().hex()
            # SAE-Bench's order: the SAE's full probe, the language model's, the SAE's top k.
            full = {"sae_test_accuracy": found.pop("sae_test_accuracy")}
            results[name] = full | llm[sae.cfg.hook_layer] | found, after
        return results

    before = {"dataset": dataset, "texts": tokens_digest(split)}
    own = {n: keys and keys[n] | before | {"state": states[n]} for n in saes}
    with doing(dataset):
        found = kept_each("sparse probing", own, some_saes)
    states |= {name: state for name, (_, state) in found.items()}
    return {name: results for name, (results, _) in found.items()}


def evaluation_seconds(
    saes: dict[Any, CustomSAE], model: Any, texts: dict[str, list], settings: Settings
) -> float:
    """How long the evaluation of SAEs and of their untrained twins will take, from a sample.

    Times a few batches of core, and the first `probe_sae_batch` texts of a class of one data set;
    what is downloaded meanwhile doesn't count.
    """
    import torch

    ready = {
        (key, twin): formatted(sae.folded(), settings)
        for key, sae in saes.items()
        for twin in (False, True)
    }
    batches = settings.core_reconstruction_batches, settings.core_sparsity_batches

    def core_seconds(reconstruction: int, sparsity: int) -> float:
        sample = dataclasses.replace(
            settings,
            core_reconstruction_batches=min(reconstruction, batches[0]),
            core_sparsity_batches=min(sparsity, batches[1]),
        )
        began = time.monotonic()
        run_core(ready, model, sample, lambda n: None)
        return time.monotonic() - began

    core_seconds(1, 1)  # reads the text's beginning, and warms up
    one, more_sparsity, more_reconstruction = (
        core_seconds(1, 1), core_seconds(1, 4), core_seconds(3, 1)
    )  # fmt: skip
    total = batches[0] * max(more_reconstruction - one, 0.0) / 2
    total += batches[1] * max(more_sparsity - one, 0.0) / 3

    def size(split: dict[str, Any]) -> int:
        return sum(len(encoded["input_ids"]) for encoded in split.values())

    _, test = next(iter(texts.values()))
    some = slice(settings.probe_sae_batch)
    sample = {label: {"input_ids": encoded["input_ids"][some]} for label, encoded in test.items()}
    began = time.monotonic()
    ((_, features),) = pooled_features([sample], model, ready, settings)
    n_texts = sum(size(train) + size(test) for train, test in texts.values())
    total += (time.monotonic() - began) * n_texts / size(sample)
    state = torch.get_rng_state()
    began = time.monotonic()
    probe(next(iter(features.values())), next(iter(features.values())), "sae", settings.probe_ks)
    torch.set_rng_state(state)
    n_trained = sum(size(train) for train, _ in texts.values())
    return total + (time.monotonic() - began) * len(ready) * n_trained / size(sample)


class Ready(NamedTuple):
    """What a run works with: see `prepare`."""

    settings: Settings  # core's batches as they fit into the GPU's memory
    lm: LanguageModel
    training_lm: LanguageModel  # in the form and precision for harvesting
    model: Any  # in TransformerLens' form, for SAE-Bench
    probe_texts: dict[str, list[dict]]  # by data set: token ids of the train and the test split


def prepare(settings: Settings, device: torch.device, train_dtype: str, log: Path) -> Ready:
    """Everything that a run loads, after a look at what it needs, which is printed.

    Raises:
        ExperimentError: something isn't there, isn't accessible or doesn't fit.
    """
    with quiet(log):
        needs = preflight(settings, device)
    print("\n".join(needs), end="\n" if needs else "")
    if needs:
        settings = fit_core_batches(settings, device)
    make_reproducible()
    with quiet(log):
        lm = load_language_model(settings.model, settings.lm_dtype, device)
        check_layers(settings, lm)
        probe_texts = read_probe_texts(settings, lm.tokenizer, device)
        model = lm.hooked()
        training_lm = for_harvest(lm, train_dtype, settings.harvest_contexts, settings.context)
    return Ready(settings, lm, training_lm, model, probe_texts)


def rehearse(
    experiment: Callable[[Settings, dict, Path, None], None],
    settings: Settings,
    texts: dict[str, list[dict]],
    source: str,
    log: Path,
) -> None:
    """The whole run in miniature, before anything is paid for: what an edit breaks shows here.

    Two steps of training, two contexts of each core batch, one probing set of 8 texts per class,
    all layers, at most two seeds. Nothing of it is shown or kept, but for that it passed.

    Args:
        experiment: runs settings on probing texts, into a folder; its key is None: keep nothing.
    """
    dataset, split = next(iter(texts.items()))
    small = dataclasses.replace(
        settings,
        probe_sets=(dataset,),
        seeds=settings.seeds[:2],
        training_tokens=2 * settings.batch,
        buffer_tokens=2 * settings.batch,
        budget_minutes=None,
        dead_after=settings.batch,
        log_every=1,
        core_prompts=2,
        core_reconstruction_batches=1,
        core_sparsity_batches=1,
    )
    # Trained and tested on the same: SAE-Bench's probes fail where no text is told right.
    few = 2 * [{label: {"input_ids": e["input_ids"][:8]} for label, e in split[0].items()}]
    device = next(iter(split[0].values()))["input_ids"].device
    key = {
        "code of": code_parts(source)[0],
        "setting": dataclasses.asdict(settings),
        **surroundings(settings, source, device),
    }

    def in_miniature() -> float:
        began, stage = time.monotonic(), Progress.stage_now
        Progress.prefix = "rehearsal: "
        try:
            with tempfile.TemporaryDirectory() as folder, quiet(log):
                experiment(small, {dataset: few}, Path(folder) / "run_rehearsal", None)
        finally:
            Progress.prefix = ""
        Progress.stage_now = stage
        seconds = time.monotonic() - began
        say(f"rehearsal: the whole run in miniature passed in {seconds:.0f} s")
        return seconds

    kept("rehearsal", key, in_miniature)


def fit_budget(
    n_steps: int, done: int, spent: float, evaluation: float, budget: float
) -> tuple[int, str | None]:
    """The steps that fit into a budget: a multiple of 5% of `n_steps`; why they are fewer, or None.

    Never under twice the steps done, so that the schedules that depend on the total come to their
    ends.

    Args:
        spent: seconds that the steps done took. evaluation, budget: seconds.
    """
    whole = spent * n_steps / done
    if whole + evaluation <= budget:
        return n_steps, None
    least = math.ceil(20 * 2 * done / n_steps)
    twentieths = min(max(math.floor(20 * (budget - evaluation) / whole), least), 20)
    if twentieths == 20:
        return n_steps, None
    reason = (
        f"training is shortened to {5 * twentieths}% of training_tokens: all of it would take "
        f"{whole / 60:.0f} minutes, and evaluation about {evaluation / 60:.0f}, "
        f"of {budget / 60:.0f} (budget_minutes)"
    )
    say(reason)
    return n_steps * twentieths // 20, reason


def save_core(
    name: str, sae: CustomSAE, scalars: dict, features: dict, settings: Settings, out_dir: Path
) -> None:
    """Writes an SAE's core results as SAE-Bench's multiple_evals does."""
    from sae_bench.evals.core import main as core
    from sae_bench.sae_bench_utils import (
        general_utils,
        get_eval_uuid,
        get_sae_bench_version,
        get_sae_lens_version,
    )

    folder = out_dir / "eval_results" / "core"
    folder.mkdir(parents=True, exist_ok=True)
    core.save_single_eval_result(
        {
            "sae_set": name,
            "sae_id": "custom_sae",
            "eval_cfg": core_config(settings),
            "metrics": scalars,
            # Features that never fire have no such ratio; this is SAE-Bench's own step.
            "feature_metrics": core.replace_nans_with_negative_one(features),
        },
        get_eval_uuid(),
        get_sae_lens_version(),
        get_sae_bench_version(),
        general_utils.get_results_filepath(str(folder), name, "custom_sae"),
        sae,
    )


def save_probing(
    name: str, sae: CustomSAE, per_class: dict, settings: Settings, out_dir: Path
) -> dict[str, float]:
    """Writes an SAE's sparse-probing results as SAE-Bench's run_eval does; returns the means.

    Raises:
        ExperimentError: an accuracy is not between 0 and 1.
    """
    from sae_bench.evals.sparse_probing import eval_output as output
    from sae_bench.sae_bench_utils import (
        general_utils,
        get_eval_uuid,
        get_sae_bench_version,
        get_sae_lens_version,
    )

    config = probing_config(settings)
    details = {
        # sum / len, as SAE-Bench has it: equal figures are to be equal bit for bit.
        dataset: {m: sum(accuracy.values()) / len(accuracy) for m, accuracy in metrics.items()}
        for dataset, metrics in per_class.items()
    }
    means = general_utils.average_results_dictionaries(details, config.dataset_names)
    for metric, value in means.items():
        if not 0.0 <= value <= 1.0:
            raise ExperimentError(
                f"sparse probing of {name}: {metric} is {value}, which is no accuracy; "
                "look at the SAE's weights and at the probing data"
            )
    folder = out_dir / "eval_results" / "sparse_probing"
    folder.mkdir(parents=True, exist_ok=True)
    result = output.SparseProbingEvalOutput(
        eval_config=config,
        eval_id=get_eval_uuid(),
        datetime_epoch_millis=int(time.time() * 1000),
        eval_result_metrics=output.SparseProbingMetricCategories(
            llm=output.SparseProbingLlmMetrics(
                **{metric: v for metric, v in means.items() if metric.startswith("llm_")}
            ),
            sae=output.SparseProbingSaeMetrics(
                **{metric: v for metric, v in means.items() if metric.startswith("sae_")}
            ),
        ),
        eval_result_details=[
            output.SparseProbingResultDetail(dataset_name=dataset, **detail)
            for dataset, detail in details.items()
        ],
        eval_result_unstructured=per_class,
        sae_bench_commit_hash=get_sae_bench_version(),
        sae_lens_id="custom_sae",
        sae_lens_release_id=name,
        sae_lens_version=get_sae_lens_version(),
        sae_cfg_dict=sae.cfg.to_dict(),
    )
    path = general_utils.get_results_filepath(str(folder), name, "custom_sae")
    result.to_json_file(path, indent=2)
    return means


def export(sae: CustomSAE, settings: Settings, folder: Path) -> None:
    """Writes an SAE, folded, as SAELens stores it: TopK or JumpReLU if it selects, else standard.

    `sae_lens.SAE.load_from_disk(folder)` reads it. theta.json holds θ, what follows from it, and
    the scale that was folded.
    """
    import torch
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    metadata = SAEMetadata(
        model_name=settings.model,
        hook_name=sae.cfg.hook_name,
        hook_layer=sae.cfg.hook_layer,
        context_size=settings.context,
        prepend_bos=True,
        dataset_path=settings.training_text,
    )
    shape: dict[str, Any] = dict(d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, metadata=metadata)
    if sae.threshold is not None:
        stored: Any = JumpReLUSAE(JumpReLUSAEConfig(**shape))
    elif sae.k is None:
        stored = StandardSAE(StandardSAEConfig(**shape))
    else:
        stored = TopKSAE(TopKSAEConfig(k=sae.k, **shape))
    raw = sae.folded()
    if sae.threshold is not None:
        stored.threshold.data.fill_(raw.threshold)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        getattr(stored, name).data.copy_(getattr(raw, name).data)
    stored.save_model(folder)
    from sae_lens import SAE

    read = SAE.load_from_disk(folder).state_dict()
    if any(not torch.equal(read[name].cpu(), t.cpu()) for name, t in stored.state_dict().items()):
        raise ExperimentError(
            f"the SAE in {folder} is not read back by SAELens as it was written: look at the disk, "
            "and at the versions in constraints.txt"
        )
    write_json(folder / "theta.json", {**sae.adaptive(), "scale": sae.scale})


# ---------------------------------------------------------------------------- the verdict


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def stderr(values: Sequence[float]) -> float:
    """sd (ddof 1) / √n; 0 for one value."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def summarize(per_seed: dict[str, list[float]]) -> dict[str, dict]:
    """{metric: a value per seed} as the entry of final_info.json: means, stderrs, the values."""
    return {
        "means": {metric: mean(values) for metric, values in per_seed.items()},
        "stderrs": {metric: stderr(values) for metric, values in per_seed.items()},
        "final_info_dict": per_seed,
    }


def primary_metric(layers: Iterable[dict[str, list[float]]]) -> list[float]:
    """The primary metric of each seed: the mean over layers of (top_1 + top_2 + top_5) / 3.

    Args:
        layers: for each layer {metric: a value per seed}, with `sae_top_{k}_test_accuracy`.
    """
    per_layer = [
        [mean(values) for values in zip(*(layer[f"sae_top_{k}_test_accuracy"] for k in PRIMARY_KS))]
        for layer in layers
    ]
    return [mean(values) for values in zip(*per_layer)]


def paired(mine: dict[int, float], theirs: dict[int, float]) -> dict[str, float]:
    """The paired difference, mine − theirs, of a figure that both have by seed.

    Returns:
        `n_paired_seeds`; with one or more of them `difference`, the mean; from 3 on `ci95_low` and
        `ci95_high`, its 95% interval, and `p`, two-sided (both by Student's t).
    """
    from scipy import stats

    differences = [value - theirs[seed] for seed, value in mine.items() if seed in theirs]
    found: dict[str, float] = {"n_paired_seeds": len(differences)}
    if differences:
        found["difference"] = centre = mean(differences)
    if len(differences) >= MIN_SEEDS:
        error, free = stderr(differences), len(differences) - 1
        half = float(stats.t.ppf(0.975, free)) * error
        p = 2 * float(stats.t.sf(abs(centre) / error, free)) if error else float(centre == 0)
        found |= {"ci95_low": centre - half, "ci95_high": centre + half, "p": p}
    return found


def verdict(
    run: dict[str, list[float]], reference: dict[str, list[float]] | None, compare_to: str
) -> tuple[str, dict[str, float]]:
    """Is this run better than the one it is compared to?

    The paired difference of the primary metric over the seeds both have, with its 95% interval
    (Student's t). Not comparable where the mean L0 differ by over 20% or fewer than 3 seeds pair.

    Args:
        run, reference: lists per seed under "seed", "primary" and "l0" (the mean over layers);
            reference is None where there is no such run of the same profile and task set.
        compare_to: the reference's name, for the sentence.
    Returns:
        the sentence that follows "verdict: ", and its figures as numbers.
    """
    numbers = {"primary": mean(run["primary"]), "l0": mean(run["l0"])}
    if reference is None:
        return f"not comparable (there is no complete {compare_to} of this profile)", numbers
    numbers |= {
        "primary_reference": mean(reference["primary"]),
        "l0_reference": mean(reference["l0"]),
    }
    primaries = (dict(zip(lists["seed"], lists["primary"])) for lists in (run, reference))
    numbers |= paired(*primaries)
    l0s = f"L0 {numbers['l0']:.1f} against {numbers['l0_reference']:.1f}"
    if "p" not in numbers:
        shown = f", difference {numbers['difference']:+.4f}" if "difference" in numbers else ""
        return (
            f"not comparable ({numbers['n_paired_seeds']} seeds shared with {compare_to}, "
            f"{MIN_SEEDS} are needed{shown}, {l0s})",
            numbers,
        )
    low, high = numbers["ci95_low"], numbers["ci95_high"]
    figures = f"{numbers['difference']:+.4f} [{low:+.4f}, {high:+.4f}] against {compare_to}, {l0s}"
    larger, smaller = sorted((numbers["l0"], numbers["l0_reference"]), reverse=True)
    if larger > MAX_L0_RATIO * smaller:
        return f"not comparable ({figures})", numbers
    word = "better" if low > 0 else "worse" if high < 0 else "no difference"
    return f"{word} ({figures})", numbers


def read_reference(
    settings: Settings, out_dir: Path, profile: str
) -> dict[str, list[float]] | None:
    """The lists per seed of the run to compare with; None if it isn't there or not comparable."""
    folder = out_dir.parent / settings.compare_to
    if folder.resolve() == out_dir.resolve():
        return None
    try:
        info = json.loads((folder / "final_info.json").read_text())
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    same_sets = config.get("settings", {}).get("probe_sets") == list(settings.probe_sets)
    if config.get("profile") != profile or not same_sets:
        return None
    return info["verdict"]["final_info_dict"]


def final_values(
    run: Path, keys: Iterable[tuple[int, int]], metrics: Sequence[str]
) -> dict[tuple[int, int], dict[str, float]]:
    """The final values of metrics in another run, by (layer, seed).

    A seed that the run doesn't have gets the mean over those that it has.

    Raises:
        ExperimentError: the run isn't complete, or lacks a layer or a metric.
    """
    path = run / "final_info.json"
    found = {}
    try:
        info = json.loads(path.read_text())
        seeds = info["verdict"]["final_info_dict"]["seed"]
        for layer, seed in keys:
            entry = info[f"layer_{layer}"]
            found[layer, seed] = {
                metric: entry["final_info_dict"][metric][seeds.index(seed)]
                if seed in seeds
                else entry["means"][metric]
                for metric in metrics
            }
    except (OSError, ValueError, KeyError) as error:
        raise ExperimentError(
            f"fix_at={run.name!r} needs the final values in {path}, which can't be read "
            f"({type(error).__name__}: {error}): run {run.name} first"
        ) from error
    return found


def against_given_baseline(
    settings: Settings, layers: dict[str, dict[str, list[float]]]
) -> tuple[str, list[str]]:
    """The language model's own probes against those in run_0/, which don't depend on an SAE.

    Compared where model, layer and probing settings are the baseline's.

    Returns:
        a line with the largest difference, empty where there is nothing to compare; and warnings
        of what differs by over 0.01 (for the best 1 and 2 dimensions by over 0.02).
    """
    try:
        info = json.loads((HERE / "run_0" / "final_info.json").read_text())
        config = json.loads((HERE / "run_0" / "config.json").read_text())
    except (OSError, ValueError):
        return "", []
    if settings.model != config["model"]:
        return "", []
    if dataclasses.asdict(probing_config(settings)) != config["sparse_probing"]:
        return "", []
    differences, warnings = {}, []
    for layer in layers.keys() & info.keys():
        for metric, given in info[layer]["means"].items():
            if not metric.startswith("llm_"):
                continue
            found = mean(layers[layer][metric])
            differences[f"{layer} {metric}"] = found - given
            allowed = 0.02 if metric in LOOSE else 0.01
            if abs(found - given) > allowed:
                warnings.append(
                    f"{layer}: {metric} is {found:.4f}, but {given:.4f} in the given baseline: "
                    f"more than {allowed} apart, so model, data or versions differ"
                )
    if not differences:
        return "", []
    where = max(differences, key=lambda key: abs(differences[key]))
    line = f"largest difference to the given baseline: {differences[where]:+.4f} ({where})"
    return line, warnings


def check_info(info: dict[str, dict]) -> None:
    """ExperimentError where a figure that is to be recorded can't be right."""
    for entry, content in info.items():
        for metric, values in content["final_info_dict"].items():
            for value in values:
                accuracy = metric.endswith("accuracy") or metric == "primary"
                if not math.isfinite(value) or (accuracy and not 0 <= value <= 1):
                    raise ExperimentError(
                        f"{entry}: {metric} is {value}, which can't be right, so nothing is "
                        "recorded: look at the code that the figure comes from"
                    )


def check_complete(out_dir: Path) -> None:
    """ExperimentError where a run has come to its end without its results."""
    if not (out_dir / "final_info.json").exists():
        raise ExperimentError(
            f"the run ended, but there is no {out_dir.name}/final_info.json: look at write_records"
        )


def check_trained(trained: nn.Module, untrained: nn.Module, name: str) -> None:
    """ExperimentError where training left an SAE as it was, or weights that are no numbers."""
    import torch

    for parameter, tensor in trained.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ExperimentError(
                f"{name}: {parameter} holds values that are not finite after training: "
                "look at the loss and at lr"
            )
    if torch.equal(trained.W_enc, untrained.W_enc):
        raise ExperimentError(
            f"{name}: no training step was done, its weights are those it was initialized with: "
            "look at the training loop"
        )


def check_core(name: str, metrics: dict[str, float]) -> None:
    """ExperimentError where a scalar of core is not finite, is the -1 for NaN, or L0 is 0."""
    for metric, value in metrics.items():
        if not math.isfinite(value) or value == -1:
            raise ExperimentError(
                f"core evaluation of {name}: {metric} is {value}, which can't be right; "
                "look at the SAE's weights and at the evaluation text"
            )
    if metrics["l0"] == 0:
        raise ExperimentError(
            f"core evaluation of {name}: L0 is 0, no feature is active on any token of the "
            "evaluation text; look at the SAE's weights, at the penalty and at encode"
        )


def check_results(
    saes: dict[str, CustomSAE], evaluation: dict[str, dict], settings: Settings, out_dir: Path
) -> None:
    """Holds what SAE-Bench wrote against the SAEs: each one's layer, hook, width and results.

    The given baseline was evaluated at one layer and recorded as another.

    Args:
        saes: by name, layer_L_seed_S or layer_L_seed_S_untrained. evaluation: see `evaluate`.
    Raises:
        ExperimentError: one lacks a result, or has another SAE's.
    """
    wanted = {f"{who}_top_{k}_test_accuracy" for who in ("sae", "llm") for k in settings.probe_ks}
    for name, sae in saes.items():
        layer = int(name.split("_")[1])
        expected = {
            "layer": layer,
            "hook": f"blocks.{layer}.hook_resid_post",
            "width": settings.d_sae,
        }
        found = {"layer": sae.cfg.hook_layer, "hook": sae.cfg.hook_name, "width": len(sae.W_dec)}
        where = {"the SAE itself": found}
        for kind, folder in (("core", "core"), ("probing", "sparse_probing")):
            files = list((out_dir / "eval_results" / folder).glob(f"{name}_custom_sae_*.json"))
            if len(files) != 1 or not evaluation.get(kind, {}).get(name):
                raise ExperimentError(
                    f"{folder} evaluation of {name} left no result in {out_dir / 'eval_results'}: "
                    "SAE-Bench skipped it, or the call was edited away"
                )
            cfg = json.loads(files[0].read_text())["sae_cfg_dict"]
            where[f"its {folder} result"] = {
                "layer": cfg["hook_layer"], "hook": cfg["hook_name"], "width": cfg["d_sae"],
            }  # fmt: skip
        for source, values in where.items():
            if values != expected:
                raise ExperimentError(
                    f"{name}: expected {expected}, but {source} has {values}; "
                    "results of one SAE must not be recorded as another's"
                )
        if missing := wanted - evaluation["probing"][name].keys():
            raise ExperimentError(f"sparse probing of {name} lacks {sorted(missing)}: run it again")


def broken_loss(
    losses: Sequence[float], step: int, settings: Settings, x_BD: Tensor, last: dict[str, Any]
) -> ExperimentError:
    """What to raise where a loss is not finite; saves the batch that it came from.

    Args:
        losses: of consecutive steps, the last of them not finite. step: that one's number.
        x_BD: its activations. last: the last record before it.
    """
    from safetensors.torch import save_file

    run = Attempt.current.out_dir.name if Attempt.current else "run"
    path = place_for("failures") / f"{run}-step-{step}-{os.getpid()}.safetensors"
    try:
        save_file({"x_BD": x_BD.contiguous()}, path)
        saved = f"its batch is in {path} (x_BD)"
    except Exception as error:
        saved = f"its batch could not be saved ({first_line(error)})"
    known = {k: last[k] for k in ("step", "loss", "fvu", "l0", "tau_sel", "gamma") if k in last}
    values = ", ".join(f"{k} {v:.4g}" for k, v in known.items() if v is not None)
    before = f"; the loss of the step before: {losses[-2]:.4g}" if len(losses) > 1 else ""
    return ExperimentError(
        f"the loss is {losses[-1]} at step {step} ({step * settings.batch} tokens){before}"
        + (f"; the last record: {values}" if values else "")
        + f"; {saved}: look at the loss for a division by 0 or the root of one, or lower lr"
    )


def odd_results(layers: dict[str, dict[str, list[float]]], d_sae: int) -> list[str]:
    """What is odd in the metrics of the layers but may be true, a sentence each."""
    warnings = []
    for layer, metrics in layers.items():
        value = {metric: mean(values) for metric, values in metrics.items()}
        top, untrained = value["sae_top_5_test_accuracy"], value["untrained_top_5_test_accuracy"]
        odd = {
            f"the codes are dense, L0 is {value['l0']:.0f}": value["l0"] > d_sae / 4,
            "over half of the features are dead": value["frac_alive"] < 0.5,
            "probing on the SAE's best 5 features is at chance": top < 0.55,
            f"the SAE's best 5 features ({top:.3f}) tell less than those of an untrained SAE "
            f"({untrained:.3f})": top < untrained,
        }
        warnings += [f"{layer}: {sentence}" for sentence, holds in odd.items() if holds]
    return warnings


def write_records(
    settings: Settings,
    profile: str,
    layers: dict[str, dict[str, list[float]]],
    shown: Iterable[str],
    seconds: dict[str, float],
    warnings: list[str],
    out_dir: Path,
) -> None:
    """Writes warnings.json and, last, final_info.json; prints the closing block.

    Args:
        layers: {metric: a value per seed} of each layer.
        shown: the metrics to print. seconds: by stage. warnings: found so far.
    """
    overall = {
        "seed": [float(seed) for seed in settings.seeds],
        "primary": primary_metric(layers.values()),
        "l0": [mean(values) for values in zip(*(metrics["l0"] for metrics in layers.values()))],
    }
    reference = read_reference(settings, out_dir, profile)
    sentence, numbers = verdict(overall, reference, settings.compare_to)
    info = {name: summarize(metrics) for name, metrics in layers.items()}
    info["verdict"] = summarize(overall)
    info["verdict"]["means"] |= numbers
    baseline, differing = against_given_baseline(settings, layers)
    warnings = [*warnings, *odd_results(layers, settings.d_sae), *differing]
    notes = [baseline] if baseline else []
    check_info(info)
    write_reused(out_dir)
    write_json(out_dir / "warnings.json", warnings)
    write_json(out_dir / "final_info.json", info)
    print_closing_block(out_dir, profile, info, shown, seconds, warnings, notes, sentence)


def print_closing_block(
    out_dir: Path,
    profile: str,
    info: dict[str, dict],
    shown: Iterable[str],
    seconds: dict[str, float],
    warnings: list[str],
    notes: list[str],
    sentence: str,
) -> None:
    """The last thing a run prints: `key: value` lines that grep can read, the verdict last.

    Args:
        info: final_info.json. shown: the metrics of a layer to print.
    """
    print(f"---\nrun: {out_dir.name}\nprofile: {profile}")
    for layer, entry in info.items():
        if layer != "verdict":
            for metric in shown:
                print(f"{layer}_{metric}: {entry['means'][metric]:.4f}")
    for stage, value in seconds.items():
        print(f"{stage}: {value:.1f}")
    print(f"peak_memory_gb: {peak_memory_gb():.2f}")
    for warning in warnings:
        print(f"warning: {warning}")
    for note in notes:
        print(note)
    print(f"results: {out_dir}")
    print(f"primary: {info['verdict']['means']['primary']:.4f}")
    print(f"verdict: {sentence}")
