"""What a forward pass does at a model's blocks: keep, stop, replace, begin late."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class _LastLayerReached(Exception):
    """Ends a forward pass after the last layer that is wanted."""


@dataclass
class Steering:
    """What one pass does at the blocks: keep their outputs, stop, have another output, begin late.

    Attributes:
        layers: those whose output is kept. stops: whether the pass ends at the last of them.
        at, stream_BLD: a layer whose output is this one. late: no block up to that one runs.
        passed: the layers in the order in which they were passed. found: outputs, by layer.
    """

    layers: Sequence[int] = ()
    stops: bool = False
    at: int = -1
    stream_BLD: Tensor | None = None
    late: bool = False
    passed: list[int] = field(default_factory=list)
    found: dict[int, Tensor] = field(default_factory=dict)

    def through(self, layer: int, x_BLD: Tensor, block: Callable[[], Any]) -> Any:
        """The output of a block whose input is x."""
        self.passed.append(layer)
        out = x_BLD if self.late and layer <= self.at else block()
        if layer == self.at:
            out = (self.stream_BLD, *out[1:]) if isinstance(out, tuple) else self.stream_BLD
        if layer in self.layers:
            # Of some models, and of all in transformers 4, it is the first of a tuple.
            self.found[layer] = out[0] if isinstance(out, tuple) else out
            if self.stops and layer == max(self.layers):
                raise _LastLayerReached
        return out

    def __enter__(self) -> Steering:
        CURRENT.steering = self
        return self

    def __exit__(self, kind: type | None, *_: object) -> bool:
        CURRENT.steering = None
        return kind is _LastLayerReached


CURRENT = threading.local()  # of each thread, the steering of the pass that it makes


@functools.cache
def steered(kind: type) -> type:
    """The class of a block, its passes as this thread's `Steering` has them. Of the same name.

    A class, since a copy of a module would take functions that stand on it along as they are. A
    pass of a block is its call, with the hooks that hang on it.
    """

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        steering = getattr(CURRENT, "steering", None)
        if steering is None:
            return kind.__call__(self, *args, **kwargs)
        x_BLD = args[0] if args else kwargs["hidden_states"]
        return steering.through(
            self.layer_of_steering, x_BLD, lambda: kind.__call__(self, *args, **kwargs)
        )

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
