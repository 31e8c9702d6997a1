"""Processor, memory and devices: what this machine has, and how work is spread over it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil
import torch
from greenlet import getcurrent, greenlet

from harness.errors import ExperimentError
from harness.generators import generator_states, same_states, set_generator_states
from harness.interfaces import SettingsLike
from harness.ranks import RANKS
from harness.start import VARIABLES

LONGEST_CALL = 2.0  # seconds that calls side by side are waited for once one of them has failed
DRAWING: set[Any] = set()  # code that drew from the process's own generators: see `in_order`


def choose_device(settings: SettingsLike, profile: str) -> torch.device:
    """The device that `settings.device` stands for.

    "auto" is a GPU for gemma-2-2b, a CPU for tinylm, and else a GPU where there is one.
    """
    wanted = settings.device
    if wanted == "auto":
        available = profile != "tinylm" and torch.cuda.is_available()
        wanted = "cuda" if profile == "gemma-2-2b" or available else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ExperimentError(
            f"the profile {profile} with device={settings.device!r} needs a CUDA GPU, and none is "
            "available: set device='cpu', or use SAE_PROFILE=tinylm make run OUT=run_try"
        )
    return torch.device(wanted)


def n_cores() -> int:
    """The cores that this process may use; on macOS, which doesn't say, all."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def make_reproducible() -> None:
    """The same seed on the same machine gives the same results, bit for bit."""
    for name, value in VARIABLES.items():  # where a notebook calls launch
        os.environ.setdefault(name, value)
    torch.set_num_threads(n_cores())
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # no result depends on it
    torch.backends.cudnn.benchmark = False


def choose_train_dtype(settings: SettingsLike, device: torch.device) -> str:
    """What `settings.train_dtype` stands for: "auto" is bfloat16 where the hardware gains by it.

    On processors that don't have it, bfloat16 is emulated and many times slower than float32, and
    Intel's that have it without AMX multiply it at half of float32's rate (AMD's at 2 to 4 times;
    `python bench/speed.py --only step` measures both). A rule: timed on a busy machine, the answer
    would change from run to run, and with it what can be reused.
    """
    if settings.train_dtype != "auto":
        return settings.train_dtype
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        gains = cpu.get("amx_bf16") or cpu.get("arm_bf16")
        gains = gains or cpu.get("avx512_bf16") and "Intel" not in processor_name()
    return "bfloat16" if gains else "float32"


def free_gb(device: torch.device) -> float:
    """Memory that is free on a GPU, or a CPU's whole, in GB (10^9 bytes)."""
    return torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else memory_gb()


def n_at_once(n_keys: int, device: torch.device) -> int:
    """How many keys `in_threads` is at, at a time."""
    return min(n_keys, torch.get_num_threads()) if device.type == "cpu" else 1


def in_threads(
    function: Callable[[Any, Any], Any],
    keys: list,
    parts: list,
    device: torch.device,
    in_turn: bool = False,
    of: int = 0,
) -> Iterator[tuple[Any, Any, Any]]:
    """Calls function(key, part) for every key and part, several keys at once on a CPU.

    A key's parts come one after the other, in order; each call has its own share of the cores,
    the same one every time, so that its results are reproducible bit for bit.

    Args:
        in_turn: one call at a time, on its share of the cores.
        of: how many keys there are, where other ranks have some of them: it sets the shares.
    Yields:
        key, part and result, as calls end.
    """
    cores, n_workers = torch.get_num_threads(), n_at_once(of or len(keys), device)
    if n_workers == 1:
        for part in parts:
            for key in keys:
                yield key, part, function(key, part)
        return
    share = cores // n_workers
    ready, next_part = list(keys), dict.fromkeys(keys, 0)
    running: dict[Future, Any] = {}
    pool = ThreadPoolExecutor(n_workers, "steps", torch.set_num_threads, (share,))
    try:
        while ready or running:
            while ready and len(running) < (1 if in_turn else n_workers):
                key = ready.pop(0)
                running[pool.submit(function, key, parts[next_part[key]])] = key
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(done)
                yield key, parts[next_part[key]], done.result()
                next_part[key] += 1
                if next_part[key] < len(parts):
                    ready.append(key)
    finally:  # after an error, or a signal, not for ever: a call may never return
        pool.shutdown(wait=not running, cancel_futures=True)
        wait(running, timeout=LONGEST_CALL)
        torch.set_num_threads(cores)


def in_order(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    device: torch.device,
    of_all_ranks: bool = False,
) -> list[Any]:
    """function(item) of each item, in their order, several at once on a CPU (see `in_threads`).

    Where calls draw from the process's own generators they are made one after the other: two at a
    time would draw in an order that nobody knows.

    Args:
        of_all_ranks: every rank is given the same items, calls it for its share of them, and gets
            all results, which are tensors.
    """
    found, keys = {}, list(range(len(items)))
    before, code = generator_states(), getattr(function, "__code__", function)
    while True:
        divided = of_all_ranks and RANKS.size > 1 and code not in DRAWING
        in_turn = code in DRAWING or n_at_once(len(keys), device) == 1
        own = keys[RANKS.rank :: RANKS.size] if divided else keys
        for at, _, result in in_threads(lambda at, _: function(items[at]), own, [None], device,
                                        in_turn, len(keys)):  # fmt: skip
            found[at] = result
        drew = not same_states(before, generator_states())
        if divided and not any(RANKS.gathered(drew)):
            return RANKS.exchanged(found, len(keys), device)
        if not divided and (in_turn or not drew):
            return [found[at] for at in keys]
        DRAWING.add(code)
        set_generator_states(before)


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
    return psutil.virtual_memory().total / 1e9


@contextlib.contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Has glibc's allocator keep what is freed, for the next tensor; elsewhere nothing.

    By itself it asks the system for every large tensor anew, and each page of it is then zeroed
    when it is first touched: a third of the time of an evaluation on two cores. Training with
    small tensors gains little by it and would take twice the memory; see `retain_memory_for_steps`.
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


def retain_memory_for_steps(
    settings: SettingsLike, d_in: int
) -> contextlib.AbstractContextManager[None]:
    """`retain_freed_memory` for steps whose tensors glibc would ask the system for every time.

    Those of 32 MiB and more: at 2304 -> 16384 a step takes a little over half of the time with it.
    """
    largest = 4 * settings.d_sae * max(settings.batch, d_in)
    return retain_freed_memory() if largest >= 2**25 else contextlib.nullcontext()


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


def run_cooperatively(jobs: dict[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """Runs functions in turns, each until it returns or calls `yield_turn`: {name: its result}.

    One thread, one order: what they compute is reproducible. An exception of one ends all.
    """
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


def yield_turn() -> None:
    """Lets the other functions of `run_cooperatively` catch up."""
    getcurrent().parent.switch()
