"""One run as several processes, as torchrun starts them: who this one is, and what they exchange.

Every rank runs the whole of experiment.py, on the same numbers in the same order. What is divided:
the language model's passes (`exchanged`), the trainers (`own`) and evaluation (`spread`). Whatever
decides how a run goes on is the first rank's word (`by_first`): it alone reads the training text
and what is kept of a training, and writes. In a run of one process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from harness.errors import ExperimentError, first_line
from harness.observation import OBSERVED

BEAT = 1.0  # seconds between two signs of life
SILENT = 60.0  # seconds without one after which a rank on another machine counts as gone
LONGEST = datetime.timedelta(days=7)  # that a rank waits for another: a rehearsal, an evaluation


class Elsewhere(Exception):
    """An exchange has failed, as where another rank has ended."""


class Ranks:
    """The processes of a run.

    Attributes:
        rank: of this one; 0: the first, which reads and writes for all.
        of: how many there are. size: how many work together now: in a rehearsal one.
        local: this one's number on its machine, and its GPU's.
        store: torchrun's, where they tell each other who they are and why they fail.
    """

    def __init__(self) -> None:
        self.rank, self.of, self.size, self.local = 0, 1, 1, 0
        self.store: Any = None
        self.over = threading.Event()

    def key_parts(self) -> None:
        """No result depends on it: see `harness.identity`."""

    @property
    def first(self) -> bool:
        """Whether this process reads and writes for all."""
        return self.rank == 0

    @property
    def on(self) -> str:
        """What follows what is told of this one: nothing where it is the only one."""
        return "" if self.of == 1 else f" on rank {self.rank} of {self.of}"

    def begin(self) -> None:
        """Reads what torchrun has set; an ExperimentError where it is not all there."""
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return
        try:
            given = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
            _ = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise ExperimentError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, as torchrun sets it for several "
                f"processes, but RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT ({error}) are not: "
                "start the run by `torchrun --nproc-per-node=N experiment.py --out_dir=run_i`, or "
                "unset WORLD_SIZE"
            ) from error
        self.rank, self.of, self.local = given
        self.size = self.of

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Inside, the ranks know each other and fail together; they leave it together."""
        if self.of == 1:
            yield
            return
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        self.store, _, _ = next(rendezvous("env://", self.rank, self.of, timeout=LONGEST))
        who = {"pid": os.getpid(), "host": socket.gethostname(), "where": self._where()}
        self.store.set(f"who/{self.rank}", json.dumps(who))
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        with self._talking():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=self.store, rank=self.rank, world_size=self.of, timeout=LONGEST,
            )  # fmt: skip
        yield
        self.gathered(None)
        self.leave()
        dist.destroy_process_group()

    def use(self, device: torch.device) -> None:
        """Takes this rank's GPU; an ExperimentError where the machine has none for it."""
        if self.of == 1 or device.type != "cuda":
            return
        if self.local >= torch.cuda.device_count():
            raise ExperimentError(
                f"each rank needs a GPU of its own, but {socket.gethostname()} has "
                f"{torch.cuda.device_count()} for {self.local + 1} and more: lower --nproc-per-node"
            )
        torch.cuda.set_device(self.local)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, this rank does everything itself."""
        self.size = 1
        try:
            yield
        finally:
            self.size = self.of

    # ---- what they exchange: each rank has to come to it, in the same order

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are of this kind
            raise Elsewhere(first_line(error)) from error

    def by_first(self, function: Callable[..., Any], *args: Any) -> Any:
        """What function(*args) returns on the first rank, which alone calls it: on all of them."""
        if self.size == 1:
            return function(*args)
        import torch.distributed as dist

        box = [function(*args) if self.first else None]
        with self._talking():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def after_first(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args) on every rank, on the others once the first has done: it may download."""
        if self.size == 1:
            return function(*args)
        found = function(*args) if self.first else None
        self.gathered(None)
        return found if self.first else function(*args)

    def gathered(self, value: Any, by_first: bool = False) -> list[Any]:
        """What each rank gives, in their order, on all of them; `by_first`: there alone, else [].

        With it goes what the user's code was seen to read for it: the first rank keeps results.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        given = value, {kind: OBSERVED.seen_by(kind) for kind in OBSERVED.kinds}
        found: list[Any] = [None] * self.size
        with self._talking():
            if by_first:
                dist.gather_object(given, found if self.first else None)
            else:
                dist.all_gather_object(found, given)
        if by_first and not self.first:
            return []
        for _, seen in found:
            OBSERVED.learn(seen)
        return [value for value, _ in found]

    def own(self, items: dict) -> dict:
        """This rank's share: neighbours, as of one layer, stay together; the first always has one.
        """
        n = len(items)
        return {key: item for at, (key, item) in enumerate(items.items())
                if at * self.size // n == self.rank or self.size == 1}  # fmt: skip

    def spread(self, of: Callable[[dict], dict], items: dict) -> dict:
        """of(items), by key, where each rank computes it of its own share."""
        if self.size == 1:
            return of(items)
        own, merged = self.own(items), {}
        for part in self.gathered(of(own) if own else {}):
            merged |= part
        return {key: merged[key] for key in items}

    def exchanged(self, mine: dict[int, Tensor], n: int, device: torch.device) -> list[Tensor]:
        """Tensors 0 to n − 1, of which number i was made by rank i mod size: on all of them."""
        if self.size == 1:
            return [mine[at] for at in range(n)]
        import torch.distributed as dist

        shapes: dict[int, tuple] = {}
        for part in self.gathered({at: (tuple(x.shape), x.dtype) for at, x in mine.items()}):
            shapes |= part
        found, under_way = [], []
        with self._talking():
            for at in range(n):
                shape, dtype = shapes[at]
                x = mine.get(at)
                x = torch.empty(shape, dtype=dtype, device=device) if x is None else x.contiguous()
                under_way.append(
                    dist.broadcast(x.view(torch.uint8), src=at % self.size, async_op=True)
                )
                found.append(x)
            for work in under_way:
                work.wait()
        return found

    # ---- how they fail: together, with words that name the one that did

    def leave(self) -> None:
        """Tells the others that this one ends and has said why, or has come to its end."""
        self.over.set()
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"over/{self.rank}", "")

    def announce(self, words: str, in_short: str) -> bool:
        """Tells torchrun, and the others, why this one fails: whether it is the first to say so."""
        if self.store is None:
            return True
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun shows at its end
            with contextlib.suppress(OSError):
                Path(path).write_text(json.dumps({"message": words, "timestamp": int(time.time())}))
        mine = json.dumps([self.rank, in_short])
        with contextlib.suppress(RuntimeError):
            return self.store.compare_set("failed", "", mine) == mine.encode()
        return True

    def failed_elsewhere(self, error: BaseException) -> str | None:
        """Why another rank's end is behind an error or a signal; None: it is this one's own."""
        if self.store is None or isinstance(error, Exception) and not isinstance(error, Elsewhere):
            return None
        # torchrun tells all to end where one has; a user may have told them, too.
        until = time.monotonic() + (5 if isinstance(error, Elsewhere) else 1)
        beats: dict[int, tuple[bytes, float]] = {}
        while True:
            try:
                if self.store.check(["failed"]):
                    rank, in_short = json.loads(self.store.get("failed"))
                    words = f"{self._called(rank)} has failed {in_short}"
                    return None if rank == self.rank else words
                if (gone := self._gone(beats, self.store, 3)) is not None:
                    return f"{self._called(gone)} has ended without a word: killed? out of memory?"
            except RuntimeError:
                return f"torchrun at {os.environ['MASTER_ADDR']}, which holds all together, is gone"
            if time.monotonic() > until:
                return None
            time.sleep(0.1)

    def _called(self, rank: int) -> str:
        who = json.loads(self.store.get(f"who/{rank}"))
        return f"rank {rank} of {self.of} (process {who['pid']} on {who['host']})"

    def _where(self) -> str:
        """What processes share whose numbers mean the same."""
        with contextlib.suppress(OSError):  # a machine may hold several containers
            return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
        return socket.gethostname()

    def _gone(
        self, beats: dict[int, tuple[bytes, float]], store: Any, patience: float
    ) -> int | None:
        """A rank that is no more and hasn't said why.

        Args:
            beats: of ranks on other machines, the last sign of life and when it was new.
            patience: seconds without another one.
        """
        for rank in range(self.of):
            if rank == self.rank or not store.check([f"who/{rank}", f"beat/{rank}"]):
                continue
            who, now = json.loads(store.get(f"who/{rank}")), time.monotonic()
            if who["where"] == self._where():
                gone = not is_alive(who["pid"])
            else:
                beat = store.get(f"beat/{rank}")
                if rank not in beats or beats[rank][0] != beat:
                    beats[rank] = beat, now
                gone = now - beats[rank][1] > patience
            if gone and not store.check([f"over/{rank}"]):
                return rank
        return None

    def _watch(self) -> None:
        """Gives signs of life, and ends this process where another rank has failed."""
        store, beats, n = self.store.clone(), {}, 0
        while not self.over.wait(BEAT if n else 0):
            n += 1
            try:
                store.set(f"beat/{self.rank}", str(n))
                failed = store.check(["failed"])
                failed = failed or self.first and self._gone(beats, store, SILENT) is not None
            except RuntimeError:  # torchrun is gone
                failed = True
            if failed and not self.over.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
                return


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs, and not only waits to be asked for its status."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


RANKS = Ranks()
