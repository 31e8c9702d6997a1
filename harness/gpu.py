"""A training's steps on a GPU: losses that are compiled, and steps that are captured as one graph.

A step launches some 200 kernels, most of a few microseconds, and launching them one by one takes
several times as long as they run (bench/RESULTS.md). A graph launches them all at once.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from harness.console import print_line
from harness.errors import first_line
from harness.interfaces import TrainerLike
from harness.object_parts import ATOMS
from harness.object_state import Unsavable, restore, state_of

Key = tuple[int, int]  # layer and seed
Results = dict[Key, tuple[Tensor, dict[str, Any] | None]]  # loss and record of a step
Replay = Callable[[], None]
N_EAGER = 4  # steps of a kind before its graph: a rare one needs none, and compilers do their work
N_NEW = 50  # steps after which one kind at least has come that often
N_GRAPHS = 4  # kept: with and without a record, with and without a look for dead features


@functools.cache
def compiled(function: Callable, device: torch.device) -> Callable:
    """A function whose elementwise operations are fused on a GPU; on a CPU itself."""
    return torch.compile(function, fullgraph=True) if device.type == "cuda" else function


def captured(
    function: Callable[[], Results], generators: list[torch.Generator], others: list[Replay]
) -> tuple[Replay, Results]:
    """What launches again what a function launches on a GPU, and the function's result.

    Nothing runs yet. The result's tensors are the ones that each launch writes to.

    Args:
        generators: that the function draws from. others: graphs that this one shares memory with,
            since they run one after the other.
    """
    graph, stream, cause = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), []
    for generator in generators:
        graph.register_generator_state(generator)
    # A pool whose graphs are all gone can't be taken again.
    pool = others[0].__self__.pool() if others else torch.cuda.graph_pool_handle()
    try:
        # Threads that write what was harvested may go on meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            try:
                result = function()
            except Exception as error:
                cause.append(error)
                raise
    except Exception as error:
        torch.cuda.set_stream(stream)  # a capture that can't be ended leaves its own
        raise (cause[0] if cause else error) from None
    return graph.replay, result


@contextlib.contextmanager
def reads_of_values(device: torch.device) -> Iterator[list[str]]:
    """Inside, a list of where a value is read back from a GPU, as far as torch can tell."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
            found += [f"line {w.lineno} of {w.filename} reads a value back" for w in seen
                      if "synchroniz" in str(w.message)]  # fmt: skip


class Uncapturable(Exception):
    """A step is none that a graph repeats."""


class CapturedSteps:
    """Takes the steps of all SAEs together, as one graph where that gives the same.

    Steps that differ in a choice of their schedule (a whole number, yes or no, None) or in whether
    they are recorded are of different kinds, each with a graph of its own once it has come a few
    times. The other numbers of a schedule are in tensors that the graphs read. What a graph can't
    repeat is found out: a read of a value; a trainer that doesn't hold the same objects after a
    step as before; weights other than those that the same step leaves when it is taken operation
    by operation. Then all steps are taken in that way, and a line says why. What a trainer or its
    SAE hold beside tensors may change between steps: that makes a new graph.

    Not found out: a count in a global that changes a step by less than a thousandth.

    Args:
        trainers: their `at` returns a named tuple.
        given: what hangs on it is no part of a trainer: see `state_of`.
        capture: see `captured`.
    """

    def __init__(
        self, trainers: Mapping[Key, TrainerLike], given: object, capture: Callable = captured
    ) -> None:
        self.trainers, self.given, self.capture = trainers, given, capture
        self.why_not: str | None = None
        self.met: collections.Counter[tuple] = collections.Counter()
        self.graphs: dict[tuple, tuple[Replay, Results]] = {}
        self.x: dict[Key, Tensor] = {}
        self.numbers: dict[tuple[Key, int], Tensor] = {}

    def step(self, x: dict[Key, Tensor], at: dict[Key, Any], log: bool) -> Results:
        """A step of each trainer on its batch (B, D); what is returned is good until the next."""
        at = {key: self.filled(key, schedule) for key, schedule in at.items()}
        for key, x_BD in x.items():
            if key not in self.x or self.x[key].shape != x_BD.shape:
                self.x[key], self.graphs = torch.empty_like(x_BD), {}
            self.x[key].copy_(x_BD)
        if self.why_not is not None:
            return self.eager(at, log)
        choices = tuple(tuple(v for v in of if not isinstance(v, Tensor)) for of in at.values())
        kind = log, choices, *map(taken_for_granted, self.trainers.values())
        if not is_hashable(kind):
            self.says("a schedule holds what has no hash, such as a list: make it a tuple")
            return self.eager(at, log)
        if kind not in self.graphs:
            self.met[kind] += 1
            if self.met[kind] <= N_EAGER:
                if not self.graphs and self.met.total() >= N_NEW:
                    self.says("what a step is given, or its trainer holds, is new at most steps")
                return self.watched(at, log)
            self.add_graph(kind, at, log)
            if self.why_not is not None:
                return self.eager(at, log)
        replay, results = self.graphs[kind]
        replay()
        return results

    def filled(self, key: Key, schedule: Any) -> Any:
        """A schedule whose fractional numbers are in tensors, the same ones at every step."""
        values = []
        for place, value in enumerate(schedule):
            if isinstance(value, (float, Tensor)):
                if (key, place) not in self.numbers:
                    device, given = self.trainers[key].sae.W_enc.device, torch.as_tensor(value)
                    kind = given.dtype if isinstance(value, Tensor) else torch.float32
                    self.numbers[key, place] = torch.empty(given.shape, dtype=kind, device=device)
                number = self.numbers[key, place]  # a float is filled in, which nothing waits for
                value = number.copy_(value) if isinstance(value, Tensor) else number.fill_(value)
            values.append(value)
        return type(schedule)(*values)

    def eager(self, at: dict[Key, Any], log: bool) -> Results:
        """The step, operation by operation."""
        results = {key: t.step(self.x[key], at[key], log) for key, t in self.trainers.items()}
        # Detached: what a result's gradients hang on would hold the step's tensors.
        return {key: (loss.detach(), record and {name: value.detach() if isinstance(value, Tensor)
                                                 else value for name, value in record.items()})
                for key, (loss, record) in results.items()}  # fmt: skip

    def watched(self, at: dict[Key, Any], log: bool) -> Results:
        """`eager`, with a look at whether it reads values."""
        with reads_of_values(next(iter(self.x.values())).device) as reads:
            results = self.eager(at, log)
        if reads and max(self.met.values()) > 1:  # compilers read, once
            self.says(reads[0])
        return results

    def says(self, why: str) -> None:
        """Steps are taken operation by operation from now on."""
        self.why_not, self.graphs = why, {}
        print_line(f"steps are taken operation by operation, not as one graph: {why}")

    def add_graph(self, kind: tuple, at: dict[Key, Any], log: bool) -> None:
        """Captures a kind of step, or says why not. All is left as it was."""
        generators = [trainer.generator for trainer in self.trainers.values()]
        while len(self.graphs) >= N_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        whole = None
        try:
            whole = self.held(copied=True)
            for key, trainer in self.trainers.items():
                check_tensors(f"trainer {key}", trainer, trainer.sae.W_enc.device)
            self.forget_gradients()
            before, others = self.held(), [replay for replay, _ in self.graphs.values()]
            replay, results = self.capture(lambda: self.eager(at, log), generators, others)
            self.forget_gradients()
            if what := rebound(before, self.held()):
                raise Uncapturable(f"a graph can't repeat how it changes {what}")
            self.check(whole, lambda: self.eager(at, log), replay)
            self.graphs[kind] = replay, results
        except (RuntimeError, TypeError, Unsavable, Uncapturable) as error:
            self.says(first_line(error))  # CUDA's are RuntimeErrors
        finally:
            if whole is not None:
                restore(whole, self.given, trainers=self.trainers)

    def forget_gradients(self) -> None:
        """Leaves trainers without them, as a step that is taken once more finds them."""
        for trainer in self.trainers.values():
            trainer.optimizer.zero_grad()

    def held(self, copied: bool = False) -> dict[str, Any]:
        """The trainers' state."""
        return state_of(self.given, copied, trainers=self.trainers)

    def check(self, whole: dict[str, Any], *steps: Callable[[], Any]) -> None:
        """Holds a graph against the step that it stands for.

        Raises:
            Uncapturable: it leaves something else.
        """
        left: list[dict[str, Any]] = []
        for take in steps:
            restore(whole, self.given, trainers=self.trainers)
            for trainer in self.trainers.values():
                for parameter in trainer.sae.parameters():
                    if parameter.requires_grad:  # no step may go on from what is there
                        parameter.grad = torch.full_like(parameter, float("nan"))
            take()
            self.forget_gradients()
            left.append(self.held(copied=not left))
        for one, other in zip(*(state["nodes"] for state in left)):
            if one["kind"] == "tensor":
                plain, graph = (node["data"]["value"].double() for node in (one, other))
                if not float((graph - plain).norm()) <= 1e-3 * float(plain.norm()) + 1e-9:
                    raise Uncapturable(f"a graph of it leaves another {one['name']}")


def is_hashable(value: object) -> bool:
    """Whether it can be told from others by its value."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def taken_for_granted(trainer: TrainerLike) -> tuple:
    """What a graph of a trainer's step has fixed: values beside tensors, and where tensors lie."""
    sae = trainer.sae
    held = [*vars(trainer).values(), *vars(sae).values(), *getattr(sae, "fixed", {}).values()]
    held += [value for group in trainer.optimizer.param_groups for value in group.values()
             if not isinstance(value, (list, Tensor))]  # fmt: skip
    where = [tensor.data_ptr() for tensor in (*sae.parameters(), *sae.buffers())]
    return *(value if type(value) in ATOMS else id(value) for value in held), *where


def check_tensors(name: str, trainer: TrainerLike, device: torch.device) -> None:
    """Uncapturable where a trainer or its SAE holds a tensor that a graph would read but once."""
    for of in (trainer, trainer.sae):
        for attribute, value in vars(of).items():
            if isinstance(value, Tensor) and value.device.type != device.type:
                raise Uncapturable(f"{attribute} of {name} is not on the {device.type}")


def rebound(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The name of what isn't the same object or value any more; a tensor may hold other numbers."""
    nodes = before["nodes"], after["nodes"]
    for one, other in zip(*nodes):
        data = dict(one["data"]), dict(other["data"])
        tensors = [part.pop("value", part.pop("bytes", None)) for part in data]
        same = all(one[part] == other[part] for part in ("name", "type", "kind"))
        if not same or data[0] != data[1] or not is_same_memory(*tensors):
            return one["name"]
        for edge, child in (one["children"] | other["children"]).items():
            if one["children"].get(edge) != child:
                return f"{edge[1]} of {one['name']}"
    return None if len(nodes[0]) == len(nodes[1]) else "what it holds"


def is_same_memory(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are one; of a generator's state, which is made at each look, if equal."""
    if one is None or other is None or one.data_ptr() == other.data_ptr():
        return (one is None) == (other is None)
    return one.dtype == torch.uint8 and not one.is_cuda and torch.equal(one, other)
