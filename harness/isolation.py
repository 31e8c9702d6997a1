"""A rehearsal leaves no trace: the run after it computes what it would without it."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy
import torch

from harness.identity import describe, process_state, replaced
from harness.observation import is_own

CONTAINERS = (list, dict, set)
VALUES = (bool, int, float, complex, str, bytes, type(None), tuple, torch.Tensor, numpy.ndarray)


@contextlib.contextmanager
def isolated(names: dict[str, Any]) -> Iterator[None]:
    """Puts back, afterwards, what code inside has changed beyond its own objects.

    The values of global names and class attributes of experiment.py and of the user's modules;
    functions and methods of libraries; generators of random numbers; environment variables; torch's
    switches. What a C library holds itself, and a language model, is not put back.

    Args:
        names: the globals of experiment.py.
    """
    before = Globals(names), process_state(), dict(os.environ)
    generators = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    try:
        yield
    finally:
        held, switches, environ = before
        held.restore()
        for definition in replaced():
            setattr(definition.holder, definition.name, definition.was)
        torch.set_rng_state(generators[0])
        numpy.random.set_state(generators[1])
        random.setstate(generators[2])
        if dict(os.environ) != environ:
            os.environ.clear()
            os.environ.update(environ)
        torch.set_default_dtype(getattr(torch, switches["default dtype"].removeprefix("torch.")))
        torch.use_deterministic_algorithms(switches["deterministic"])
        torch.set_float32_matmul_precision(switches["precision"])
        torch.backends.mkldnn.enabled = switches["mkldnn"]
        numpy.seterr(**switches["numpy"])


class Globals:
    """The values of global names and of class attributes in the user's code, to be put back.

    Args:
        names: the globals of experiment.py.
    """

    def __init__(self, names: dict[str, Any]) -> None:
        self.spaces = [names]
        for module in [*sys.modules.values()]:
            file = getattr(module, "__file__", None)
            if file and is_own(file) and vars(module) is not names:
                self.spaces.append(vars(module))
        classes = {
            id(value): value
            for space in self.spaces
            for value in space.values()
            if type(value) is type and value.__module__ == space.get("__name__")
        }
        self.spaces += classes.values()
        self.before = [self.values(space) for space in self.spaces]

    @staticmethod
    def values(space: Any) -> dict[str, tuple[Any, Any, str]]:
        """By name: the object, a copy of it, and digits for what it is."""
        found = {}
        for name, value in [*(vars(space) if isinstance(space, type) else space).items()]:
            if not name.startswith("__") and isinstance(value, (*CONTAINERS, *VALUES)):
                with contextlib.suppress(Exception):  # what can't be copied stays as it is
                    found[name] = value, copy.deepcopy(value), describe(value)
        return found

    def restore(self) -> None:
        """Binds names anew to what they were bound to, with the content that it had."""
        for space, before in zip(self.spaces, self.before):
            for name, (value, copied, digits) in before.items():
                if describe(value) != digits:
                    if isinstance(value, (list, set, dict)):
                        value.clear()
                        (value.extend if isinstance(value, list) else value.update)(copied)
                    elif isinstance(value, torch.Tensor):
                        value.data.copy_(copied)
                    elif isinstance(value, numpy.ndarray):
                        value[...] = copied
                held = vars(space) if isinstance(space, type) else space
                if held.get(name) is not value:
                    if isinstance(space, type):
                        setattr(space, name, value)
                    else:
                        space[name] = value
