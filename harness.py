"""The plumbing of an experiment: nothing here is about sparse autoencoders, and nobody edits it.

Errors a user can act on, the protection of out_dir, progress lines, the place for library noise,
atomic records, the two forms of the language model, the adapters to SAE-Bench and SAELens, and
the verdict's arithmetic. torch is imported where it is used, since `plot.py` imports this file
and needs none. In names of tensors, B is batch, L sequence, D model dimension, F features, N rows.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
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
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from experiment import CustomSAE, Settings

HERE = Path(__file__).resolve().parent

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
POOL_FILES = 512  # files of tinylm's corpus from which passages are drawn at a time
VERSIONED = (
    "torch", "transformers", "sae-bench", "sae-lens", "transformer-lens", "datasets",
    "numpy", "scikit-learn", "beartype", "jaxtyping",
)  # fmt: skip


class ExperimentError(Exception):
    """A failure whose message is the whole story: what was expected, what was found, what to do."""


# ---------------------------------------------------------------------------- places and files


def cache_dir() -> Path:
    """What outlives a run: `$XDG_CACHE_HOME/parametric-sae`, by default under `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "parametric-sae"


def new_log(run_name: str) -> Path:
    """An empty log file for this attempt, outside `run_i/` so that it outlives it.

    Falls back to the system's temporary folder where the cache can't be written.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for folder in (cache_dir() / "logs", Path(tempfile.gettempdir())):
        path = folder / f"{run_name}-{stamp}-{os.getpid()}.log"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError:
            continue
        return path
    raise ExperimentError(
        f"no place for a log: neither {cache_dir()} nor {tempfile.gettempdir()} can be written; "
        "set XDG_CACHE_HOME to a folder that can"
    )


def prepare_out_dir(out_dir: Path) -> str | None:
    """Makes `out_dir`, writable and without results.

    A complete run that stands there (it has a final_info.json) is set aside as `out_dir.1`, `.2`,
    …; what an unfinished attempt left is overwritten file by file.

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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def kept(kind: str, key: dict[str, Any], compute: Callable[..., Any], *arguments: Any) -> Any:
    """What `compute(*arguments)` returns, from the cache where an earlier run has left it.

    Args:
        kind: the folder in the cache. key: all that the result depends on, as JSON.
    Returns:
        the result as JSON has it. A damaged file is set aside and made again.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / kind / f"{name[:32]}.json"
    if path.exists():
        try:
            stored = json.loads(path.read_text())
            digest = hashlib.sha256(json.dumps(stored["value"]).encode()).hexdigest()
            if stored["key"] == key and stored["sha256"] == digest:
                return stored["value"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        print(f"{path} is damaged: set aside as {path.name}.damaged, and made again", file=CONSOLE)
        path.replace(path.with_name(f"{path.name}.damaged"))
    value = json.loads(json.dumps(compute(*arguments)))
    digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    with contextlib.suppress(OSError):  # a cache that can't be written costs time, not results
        write_json(path, {"key": key, "sha256": digest, "value": value})
    return value


# ---------------------------------------------------------------------------- the command


class _Arguments(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def error(self, message: str) -> Any:
        raise ExperimentError(
            f"{message}; the command is `python experiment.py --out_dir=run_i`, no other argument"
        )


def main(run: Callable[[Path, Path], None], argv: list[str] | None = None) -> int:
    """Calls `run(out_dir, log)`; on failure the end of standard error says why, in words.

    Returns:
        the exit status: 0, or 1 after a failure.
    """
    log = None
    try:
        parser = _Arguments(description="Train and score a parametric contrastive SAE.")
        parser.allow_abbrev = False
        parser.add_argument("--out_dir", type=Path, required=True, help="the folder of this run")
        out_dir = parser.parse_args(argv).out_dir.absolute()
        log = new_log(out_dir.name)
        run(out_dir, log)
    except ExperimentError as error:
        print(f"experiment.py: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        cause = f"{type(error).__name__}: {str(error)[:1000]}"
        if is_out_of_memory(error):
            cause = f"out of memory during {Progress.stage_now} ({first_line(error)}): lower " + (
                LOWER.get(Progress.stage_now, "d_sae or the number of layers and seeds")
            )
        print(
            f"experiment.py: {cause}; "
            + (f"what was written so far is in {out_dir}, " if out_dir.exists() else "")
            + f"the traceback is at the end of {log}",
            file=sys.stderr,
        )
        return 1
    return 0


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def check(name: str, settings: Any, rules: Iterable[tuple[str, Callable, str]]) -> None:
    """Holds settings against rules: (field, what must be true of its value, the same in words).

    Raises:
        ExperimentError: the first field that breaks its rule, or whose value is of a wrong type.
    """
    for field, holds, expected in rules:
        value = getattr(settings, field)
        try:
            passed = holds(value)
        except (TypeError, ValueError):
            passed = False
        if not passed:
            raise ExperimentError(
                f"{name}: {field} must be {expected}, but is {value!r}: "
                "change it at the top of experiment.py"
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


def choose_train_dtype(settings: Settings, device: torch.device) -> str:
    """What `settings.train_dtype` stands for: "auto" is bfloat16 where the hardware multiplies it.

    On processors that don't, bfloat16 is emulated and many times slower than float32.
    """
    import torch

    if settings.train_dtype != "auto":
        return settings.train_dtype
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        native = any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    return "bfloat16" if native else "float32"


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
    parts = memory_estimate(settings)
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
            f"the {kind} {name!r} is gated and this account has no access: accept its licence on "
            "its Hugging Face page, and log in with `hf auth login` (or set HF_TOKEN); "
            "SAE_PROFILE=tinylm make run OUT=run_try works now"
        )
    except errors.RepositoryNotFoundError:
        return (
            f"the {kind} {name!r} is not on the hub, or is private: check the name at the top of "
            "experiment.py, and log in with `hf auth login` (or set HF_TOKEN) if it is private"
        )
    except Exception as error:
        return (
            f"the hub can't be reached for the {kind} {name!r} ({type(error).__name__}), and it is "
            f"not in the local cache {constants.HF_HOME}: connect to the network, or set HF_HOME "
            "to a cache that holds it; SAE_PROFILE=tinylm make run OUT=run_try works now"
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


def check_memory(parts: dict[str, float], device: torch.device) -> str:
    """A line with the estimate and what the device has free; ExperimentError if that is less."""
    import torch

    fixed = parts["language model"] + parts["SAEs"]
    needed = (fixed + max(parts["training"], parts["evaluation"])) / 1e9
    free = torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else memory_gb()
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
        self._stream().write(text)

    def flush(self) -> None:
        self._stream().flush()

    def fileno(self) -> int:
        return self._stream().fileno()

    def isatty(self) -> bool:
        return self._stream().isatty()


CONSOLE = _Console()


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Sends what libraries print, from Python or from C, to `log` instead of the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    # Under a test runner sys.stdout may be another object than descriptor 1: replace both.
    streams = sys.stdout, sys.stderr
    text = open(target, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
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
        text.flush()
        for number, descriptor in zip((1, 2), saved):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(target)


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


class Progress:
    """How far a stage is: a bar on a terminal, elsewhere a plain line now and then.

    Args:
        stage: the stage's name.
        total: units of work in all.
        unit: their name, for example "tokens".
        every: least seconds between two plain lines.
    """

    stage_now = "start-up"  # the stage that began last

    def __init__(self, stage: str, total: int, unit: str, every: float = 15.0) -> None:
        Progress.stage_now = stage
        self.stage, self.total, self.unit, self.every = stage, total, unit, every
        self.done = 0
        self.note = ""
        self.started = self.last = time.monotonic()
        self.bar = None
        if CONSOLE.isatty():
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
            left = (self.last - self.started) * (self.total - self.done) / max(self.done, 1)
            self._line(f"{100 * self.done / self.total:3.0f}%, {left:.0f} s left")

    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self.started

    def close(self) -> None:
        """Ends the bar, or prints the stage's last line."""
        if self.bar is not None:
            self.bar.close()
        else:
            self._line(f"done in {self.seconds():.0f} s")

    def _line(self, state: str) -> None:
        note = f", {self.note}" if self.note else ""
        print(f"{self.stage}: {state}{note}", file=CONSOLE, flush=True)


# ---------------------------------------------------------------------------- what ran, and where


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_config(
    settings: Settings, profile: str, device: torch.device, train_dtype: str, out_dir: Path
) -> None:
    """Writes what ran and where: config.json, and the code itself beside it."""
    import torch

    hashes = {}
    for file in ("experiment.py", "harness.py"):
        shutil.copyfile(HERE / file, out_dir / file)
        hashes[file] = sha256_file(HERE / file)
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
    }
    write_json(out_dir / "config.json", record)


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


def streamed_texts(name: str) -> Iterator[str]:
    """The column "text" of a data set's split "train", streamed; texts of white space left out.

    A broken connection is tried again, after 1, 2, 4, … seconds, and the stream goes on where it
    stopped.

    Raises:
        ExperimentError: it can't be read, has no such column, or the connection stays broken.
    """
    import datasets

    def rows() -> Any:
        return datasets.load_dataset(name, split="train", streaming=True, trust_remote_code=True)

    stream, failures = None, 0
    while True:
        try:
            if stream is None:
                stream = rows()
            for row in stream:
                failures = 0
                if (row["text"] or "").strip():
                    yield row["text"]
            return
        except KeyError as error:
            raise ExperimentError(
                f"the text {name!r} must have a column {error}, but has {sorted(row)}: "
                "choose another data set, or rename its column"
            ) from error
        except UnicodeDecodeError as error:
            raise ExperimentError(
                f"the text {name!r} must be UTF-8, but is not ({error}): convert it"
            ) from error
        except Exception as error:
            if not is_connection_error(error):
                raise ExperimentError(
                    f"the text {name!r} can't be read ({type(error).__name__}: "
                    f"{first_line(error)}): check its name, and that the hub can be reached"
                ) from error
            failures += 1
            if failures > STREAM_RETRIES:
                raise ExperimentError(
                    f"the connection to the text {name!r} broke {failures} times in a row "
                    f"({type(error).__name__}): try again when the network is back"
                ) from error
            time.sleep(2.0 ** (failures - 1))
            if stream is not None:
                state, stream = stream.state_dict(), rows()
                stream.load_state_dict(state)


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
    line = text.splitlines()[0] if text else type(error).__name__
    return re.sub(r"hf_\w{8,}|(?i:bearer)\s+\S+", "[token]", line)[:300]


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
        self._pending: list[int] = []
        self._ready: queue.Queue = queue.Queue(maxsize=ahead)
        self._reader: threading.Thread | None = None

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
            self._reader = threading.Thread(target=self._read, name="text", daemon=True)
            self._reader.start()
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._reader = None
            raise item
        if item is None:
            if not self._pending and self.epoch == 0:
                raise ExperimentError("the training text holds no text: check training_text")
            self.epoch += 1
            print(f"training text: all of it used {self.epoch} times, starting again", flush=True)
        else:
            self._pending += item

    def _read(self, n_texts: int = 32) -> None:
        """The thread: texts as token ids, None at each end of the corpus, an exception at last."""
        bos = self.tokenizer.bos_token_id
        try:
            while True:
                texts, some = self.texts(), False
                while batch := list(itertools.islice(texts, n_texts)):
                    ids = self.tokenizer(batch, add_special_tokens=False)["input_ids"]
                    self._ready.put([token for text in ids for token in (bos, *text)])
                    some = True
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
        from transformer_lens import HookedTransformer
        from transformer_lens.pretrained.weight_conversions import convert_gemma_weights

        cfg = hooked_config(self.hf.config, self.hf.dtype, self.hf.device, self.name)
        model = HookedTransformer(cfg, self.tokenizer, move_to_device=False)
        # Both forms share their matrices, but for W_E, which holds the embedding's scale.
        # load_and_process_state_dict (TransformerLens 3.9.0) would copy all of them by way of
        # float32, into a layout that the layers turn back before each product.
        weights = convert_gemma_weights(self.hf, cfg)
        weights = {name: weight.to(cfg.dtype) for name, weight in weights.items()}
        model.load_state_dict(dict(model.named_buffers()) | weights, assign=True)
        model.move_model_modules_to_device()
        model.requires_grad_(False)
        return model.eval()


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
            "google/gemma-2-2b, accept the licence on its Hugging Face page and log in with "
            "`hf auth login` (or set HF_TOKEN); SAE_PROFILE=tinylm make run OUT=run_try works now"
        ) from error


def language_model_config(name: str) -> Any:
    """A model's config.json, as transformers reads it."""
    from transformers import AutoConfig

    with access_errors(name):
        return AutoConfig.from_pretrained(model_path(name))


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
    with access_errors(name):
        hf = Gemma2ForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.unk_token_id in tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise ExperimentError(
            f"the tokenizer of the language model {name!r} knows no words: its tokenizer.json is "
            "missing or damaged; fetch the model again"
        )
    hf.requires_grad_(False)
    return LanguageModel(hf.eval().to(device), tokenizer, name)


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
        if name.startswith("tinylm/"):
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
        dataset_trust_remote_code=True,
    )
    store.shuffle_input_dataset(seed=42)
    return store


def core_text(settings: Settings) -> Any:
    """The text of the core evaluation in a form that SAELens takes: a data set, or its name."""
    return heldout_passages() if settings.core_text == "tinylm" else settings.core_text


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
    """

    def __init__(
        self, model: Any, store: Any, layers: Iterable[int], advance: Callable[[int], None]
    ) -> None:
        self.model, self.store, self.advance = model, store, advance
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
        return self.once(
            "original",
            lambda: self.model.run_with_cache(
                self.tokens_BL, return_type="both", loss_per_token=True,
                names_filter=list(self.hooks),
            ),
        )  # fmt: skip

    def residuals(self) -> Any:
        """The residual streams by hook, and the count of what fvu needs of them."""

        def compute() -> Any:
            _, cache = self.model.run_with_cache(
                self.tokens_BL, prepend_bos=False, names_filter=list(self.hooks),
                stop_at_layer=self.layers[-1] + 1,
            )  # fmt: skip
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
            return self.shared.model(
                changed_BLD, start_at_layer=self.shared.hooks[name] + 1, tokens=tokens_BL,
                return_type=return_type, loss_per_token=loss_per_token,
            )  # fmt: skip

        return compute() if changed_BLD.any() else self.shared.once(("ablated", name), compute)

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


def run_core(
    saes: dict[Any, CustomSAE], model: Any, settings: Settings, advance: Callable[[int], None]
) -> dict[Any, tuple[dict, dict, float]]:
    """SAE-Bench's `run_evals` of SAEs that `formatted` has prepared, side by side.

    Returns:
        by the SAEs' keys: scalars by group, metrics of each feature, and fvu.
    """
    import torch
    from sae_bench.evals.core import main as core

    config = core_config(settings)
    saes = {key: copy.copy(sae) for key, sae in saes.items()}  # views put their decode on them
    store = core_store(settings, model, next(iter(saes.values())))
    shared = SharedPasses(model, store, (sae.cfg.hook_layer for sae in saes.values()), advance)
    views = {key: SharedView(shared, sae) for key, sae in saes.items()}

    def job(key: Any) -> Callable[[], tuple[dict, dict]]:
        return lambda: core.run_evals(
            saes[key], views[key], views[key], config, ignore_tokens=special_ids(model.tokenizer)
        )

    # Around all of them: each run_evals restores, when it ends, the mode that it began in.
    try:
        with torch.no_grad():
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

    So is the beginning of the evaluation's text.
    """
    if not settings.core_text.startswith("tinylm"):
        texts = documents(settings.core_text, "heldout")()
        if next(texts, None) is None:
            raise ExperimentError(f"the text {settings.core_text!r} holds no text: check core_text")
    with tinylm_tasks(settings):
        names = probe_names(settings)
        progress = Progress("probing texts", len(names), "data sets")
        texts = {}
        for name in names:
            texts[name] = probe_tokens(name, tokenizer, device, settings)
            progress.advance(1, name)
    progress.close()
    return texts


def pooled_features(
    tokens: dict[str, Any], model: Any, saes: dict[str, CustomSAE], settings: Settings
) -> tuple[dict[int, dict], dict[str, dict]]:
    """Mean activations of each text, of the language model and of each SAE, in one forward pass.

    The batches are SAE-Bench's (`probe_llm_batch` texts through the model, `probe_sae_batch`
    through an SAE, one class at a time), and so are the functions: the features are the stock
    ones bit for bit, without ever holding a data set's activations at once.

    Args:
        tokens: class -> {"input_ids": (N, L)}, from SAE-Bench's tokenize_data_dictionary.
    Returns:
        by layer {class: (N, D)}, and by the SAE's name {class: (N, F)}.
    """
    import torch
    from sae_bench.sae_bench_utils import activation_collection as collection

    layers = settings.layers
    llm: dict[int, dict] = {layer: {} for layer in layers}
    features: dict[str, dict] = {name: {} for name in saes}
    hooks = {layer: f"blocks.{layer}.hook_resid_post" for layer in layers}
    for label, encoded in tokens.items():
        tokens_NL = encoded["input_ids"]
        waiting = {layer: [] for layer in layers}
        llm_parts, sae_parts = {k: [] for k in llm}, {k: [] for k in features}
        done = 0
        for start in range(0, len(tokens_NL), settings.probe_llm_batch):
            batch_BL = tokens_NL[start : start + settings.probe_llm_batch]
            mask_BL = collection.get_bos_pad_eos_mask(batch_BL, model.tokenizer)
            _, cache = model.run_with_cache(
                batch_BL, names_filter=list(hooks.values()), stop_at_layer=max(layers) + 1
            )
            for layer, hook in hooks.items():
                waiting[layer].append(cache[hook] * mask_BL[:, :, None])
            done_now = start + len(batch_BL)
            while (size := min(settings.probe_sae_batch, len(tokens_NL) - done)) and (
                done_now - done >= size
            ):
                done += size
                for layer in layers:
                    acts_BLD = torch.cat(waiting[layer])
                    window = {label: acts_BLD[:size].clone()}
                    waiting[layer] = [acts_BLD[size:]]
                    llm_parts[layer].append(
                        collection.create_meaned_model_activations(window)[label]
                    )
                    for name, sae in saes.items():
                        if sae.cfg.hook_layer == layer:
                            sae_parts[name].append(
                                collection.get_sae_meaned_activations(
                                    window, sae, settings.probe_sae_batch
                                )[label]
                            )
        for parts, result in ((llm_parts, llm), (sae_parts, features)):
            for key, tensors in parts.items():
                result[key][label] = torch.cat(tensors)
    return llm, features


def llm_probes_key(
    dataset: str, layer: int, split: list[dict[str, Any]], settings: Settings
) -> dict[str, Any]:
    """All that the language model's probes of a layer and a data set depend on.

    Args:
        split: {class: {"input_ids": (N, L)}}, for train and for test.
    """
    import torch

    tokens = hashlib.sha256()
    for part in split:
        for label, encoded in part.items():
            tokens.update(f"{label} {tuple(encoded['input_ids'].shape)} ".encode())
            tokens.update(encoded["input_ids"].cpu().numpy().tobytes())
    chosen = ("lm_dtype", "probe_ks", "probe_seed", "probe_llm_batch", "probe_sae_batch")
    on_gpu = next(iter(split[0].values()))["input_ids"].is_cuda
    return {
        "dataset": dataset,
        "layer": layer,
        "model": model_identity(settings.model),
        "tokens": tokens.hexdigest(),
        "settings": {field: getattr(settings, field) for field in chosen}
        | {"probe_ks": list(settings.probe_ks)},
        "versions": versions(),
        "hardware": torch.cuda.get_device_name() if on_gpu else processor_name(),
        "threads": torch.get_num_threads(),
    }


@functools.cache
def model_identity(name: str) -> str:
    """What tells a model's weights from others: their commit on the hub, or their SHA-256."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(model_path(name))
    if folder.is_dir():
        return " ".join(sha256_file(file) for file in sorted(folder.glob("*.safetensors")))
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent.name if isinstance(config, str) else name


def probe(train: dict, test: dict, prefix: str, ks: tuple[int, ...]) -> dict[str, dict]:
    """SAE-Bench's probes on pooled features, in SAE-Bench's order: {metric: {class: accuracy}}."""
    from sae_bench.evals.sparse_probing import probe_training

    results = {}
    for k in (None, *ks):
        options = dict(use_sklearn=False, batch_size=250, epochs=100, lr=1e-2) if k is None else {}
        _, accuracies = probe_training.train_probe_on_activations(
            train, test, select_top_k=k, **options
        )
        middle = "" if k is None else f"top_{k}_"
        results[f"{prefix}_{middle}test_accuracy"] = accuracies
    return results


def evaluation_seconds(
    saes: dict[Any, CustomSAE], lm: LanguageModel, texts: dict[str, list], settings: Settings
) -> float:
    """How long the evaluation of SAEs and of their untrained twins will take, from a sample.

    Times a few batches of core, and the first `probe_sae_batch` texts of a class of one data set;
    what is downloaded meanwhile doesn't count.
    """
    import torch

    model = lm.hooked()
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
    features = pooled_features(sample, model, ready, settings)[1]
    n_texts = sum(size(train) + size(test) for train, test in texts.values())
    total += (time.monotonic() - began) * n_texts / size(sample)
    state = torch.get_rng_state()
    began = time.monotonic()
    probe(next(iter(features.values())), next(iter(features.values())), "sae", settings.probe_ks)
    torch.set_rng_state(state)
    n_trained = sum(size(train) for train, _ in texts.values())
    return total + (time.monotonic() - began) * len(ready) * n_trained / size(sample)


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
    print(reason, flush=True)
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
    """Writes an SAE, folded, as SAELens stores it: as TopK where it selects, else as standard.

    `sae_lens.SAE.load_from_disk(folder)` reads it. theta.json holds θ, what follows from it, and
    the scale that was folded.
    """
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
    if sae.k is None:
        stored: Any = StandardSAE(StandardSAEConfig(**shape))
    else:
        stored = TopKSAE(TopKSAEConfig(k=sae.k, **shape))
    raw = sae.folded()
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        getattr(stored, name).data.copy_(getattr(raw, name).data)
    stored.save_model(folder)
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
    at = {seed: index for index, seed in enumerate(reference["seed"])}
    differences = [
        ours - reference["primary"][at[seed]]
        for seed, ours in zip(run["seed"], run["primary"])
        if seed in at
    ]
    numbers["n_paired_seeds"] = len(differences)
    if differences:
        numbers["difference"] = mean(differences)
    l0s = f"L0 {numbers['l0']:.1f} against {numbers['l0_reference']:.1f}"
    if len(differences) < MIN_SEEDS:
        shown = f", difference {numbers['difference']:+.4f}" if differences else ""
        return (
            f"not comparable ({len(differences)} seeds shared with {compare_to}, "
            f"{MIN_SEEDS} are needed{shown}, {l0s})",
            numbers,
        )
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(differences) - 1)) * stderr(differences)
    low, high = numbers["difference"] - half, numbers["difference"] + half
    numbers |= {"ci95_low": low, "ci95_high": high}
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
