"""The generators that code draws from unless it is given one: torch's, CUDA's, numpy's, Python's.

Each is the whole process's. Where several things draw from them, each does so from states of its
own, so that none depends on when the others draw.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch.utils._python_dispatch import TorchDispatchMode

States = dict[str, Any]


def generator_states() -> States:
    """Where they stand, as plain data."""
    kind, keys, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), *rest),
        "python": random.getstate(),
    }


def set_generator_states(states: States) -> None:
    """Sets what `generator_states` returned."""
    torch.set_rng_state(states["torch"])
    for state in states["cuda"]:
        torch.cuda.set_rng_state(state)
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    random.setstate(states["python"])


def seed_generators(*of: object) -> None:
    """Seeds them all by what they are to draw for, such as a layer and a seed."""
    number = int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:4], "big")
    torch.manual_seed(number)
    numpy.random.seed(number)
    random.seed(number)


def same_states(one: States, other: States) -> bool:
    """Whether nothing was drawn between two `generator_states`."""
    return (
        torch.equal(one["torch"], other["torch"])
        and all(map(torch.equal, one["cuda"], other["cuda"]))
        and torch.equal(one["numpy"][1], other["numpy"][1])
        and one["numpy"][2:] == other["numpy"][2:]
        and one["python"] == other["python"]
    )


class TorchDraws(TorchDispatchMode):
    """Inside, `seen` becomes true where an operation draws from torch's own generator.

    Also where that is put back before anybody looks at it, as `torch.random.fork_rng` does.
    """

    seen = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Or torch.compile would leave out what runs under it."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = *args, *(kwargs or {}).values()
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.seen |= not any(isinstance(value, torch.Generator) for value in given)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def generators_of(*of: object, kept: dict[Any, States]) -> Iterator[None]:
    """Inside, what is drawn comes from states of its own; then they stand where they stood.

    Args:
        of: what draws; its states are seeded by it when it draws first.
        kept: its states between two times, under `of`.
    """
    before = generator_states()
    try:
        if of in kept:
            set_generator_states(kept[of])
        else:
            seed_generators(*of)
        yield
        kept[of] = generator_states()
    finally:
        set_generator_states(before)
