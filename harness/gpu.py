"""A training's steps on a GPU: losses that are compiled, and steps that are captured as one graph.

A step launches some 200 kernels, most of a few microseconds, and launching them one by one takes
several times as long as they run (bench/RESULTS.md). A graph launches them all at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from harness.console import print_line
from harness.errors import first_line
from harness.interfaces import TrainerLike
from harness.object_state import Unsavable, restore, state_of

Key = tuple[int, int]  # layer and seed
Results = dict[Key, tuple[Tensor, dict[str, Any] | None]]  # loss and record of a step
N_EAGER = 6  # schedules whose first step is taken as it is: compilers have work at some of them
N_GRAPHS = 4  # kept: with and without a record, with and without a look for dead features


@functools.cache
def compiled(function: Callable, device: torch.device) -> Callable:
    """A function whose elementwise operations are fused on a GPU; on a CPU itself."""
    return torch.compile(function, fullgraph=True) if device.type == "cuda" else function


Replay = Callable[[], None]


def captured(
    function: Callable[[], Results], generators: list[torch.Generator], others: list[Replay]
) -> tuple[Replay, Results]:
    """What launches again what a function launches on a GPU, and the function's result.

    Nothing runs yet. The result's tensors are the ones that each launch writes to.

    Args:
        generators: that the function draws from. others: graphs that this one shares memory with,
            since they run one after the other.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    # A pool whose graphs are all gone can't be taken again.
    pool = others[0].__self__.pool() if others else torch.cuda.graph_pool_handle()
    # Threads that write what was harvested may go on meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


class Uncapturable(Exception):
    """A step is none that a graph repeats."""


class CapturedSteps:
    """Takes the steps of all SAEs together, as one graph where that gives the same.

    Steps that differ in a choice of their schedule (a whole number, yes or no, None) or in whether
    they are recorded are of different kinds, each with a graph of its own. The other numbers of a
    schedule are tensors that the graphs read. What a graph can't repeat is found out: a read of a
    value ends the capture; a trainer must hold the same objects after it as before; and the first
    graph has to leave the weights that the same step leaves when it is taken operation by
    operation. Where one of these isn't so, all steps are taken in that way, and a line says why.

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
        self.checked = False
        self.met: set[tuple] = set()
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
        choices = tuple(tuple(v for v in of if not isinstance(v, Tensor)) for of in at.values())
        if self.why_not is None and (kind := (log, choices)) not in self.graphs:
            if choices not in self.met and len(self.met) < N_EAGER:
                self.met.add(choices)
                return self.eager(at, log)
            self.add_graph(kind, at, log)
        if self.why_not is not None:
            return self.eager(at, log)
        replay, results = self.graphs[log, choices]
        replay()
        return results

    def filled(self, key: Key, schedule: Any) -> Any:
        """A schedule whose fractional numbers are in tensors, the same ones at every step."""
        values = []
        for place, value in enumerate(schedule):
            if isinstance(value, float):
                if (key, place) not in self.numbers:
                    device = self.trainers[key].sae.W_enc.device
                    self.numbers[key, place] = torch.zeros((), device=device)
                value = self.numbers[key, place].fill_(value)
            values.append(value)
        return type(schedule)(*values)

    def eager(self, at: dict[Key, Any], log: bool) -> Results:
        """The step, operation by operation."""
        return {key: t.step(self.x[key], at[key], log) for key, t in self.trainers.items()}

    def add_graph(self, kind: tuple, at: dict[Key, Any], log: bool) -> None:
        """Captures a kind of step, or says why not."""
        generators = [trainer.generator for trainer in self.trainers.values()]
        while len(self.graphs) >= N_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        before = None
        try:
            before = self.held()
            others = [replay for replay, _ in self.graphs.values()]
            replay, results = self.capture(lambda: self.eager(at, log), generators, others)
            if what := rebound(before, self.held()):
                raise Uncapturable(f"a graph can't repeat how it changes {what}")
            if not self.checked:
                self.check(replay, at, log)
        except (RuntimeError, Unsavable, Uncapturable) as error:  # CUDA's are RuntimeErrors
            self.why_not, self.graphs = first_line(error), {}
            if before is not None:  # nothing was computed, but what Python did is done
                restore(before, self.given, trainers=self.trainers)
            print_line(f"steps are taken operation by operation, not as one graph: {self.why_not}")
        else:
            self.graphs[kind] = replay, results

    def held(self, copied: bool = False) -> dict[str, Any]:
        """The trainers' state, without gradients: what a step leaves there no other one reads."""
        for trainer in self.trainers.values():
            trainer.optimizer.zero_grad()
        return state_of(self.given, copied, trainers=self.trainers)

    def check(self, replay: Replay, at: dict[Key, Any], log: bool) -> None:
        """Holds a graph against the step that it stands for; leaves all as it was before both.

        Raises:
            Uncapturable: it leaves something else.
        """
        before, left = self.held(copied=True), []
        for launch in (lambda: self.eager(at, log), replay):
            launch()
            left.append(self.held(copied=True))
            restore(before, self.given, trainers=self.trainers)
        for one, other in zip(*(state["nodes"] for state in left)):
            if one["kind"] == "tensor":
                plain, graph = (node["data"]["value"].double() for node in (one, other))
                if not float((graph - plain).norm()) <= 1e-3 * float(plain.norm()) + 1e-9:
                    raise Uncapturable(f"a graph of it leaves another {one['name']}")
        self.checked = True


def rebound(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The name of what isn't the same object or value any more; a tensor may hold other numbers."""
    nodes = before["nodes"], after["nodes"]
    for one, other in zip(*nodes):
        data = dict(one["data"]), dict(other["data"])
        tensors = [part.pop("value", None) for part in data]
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
