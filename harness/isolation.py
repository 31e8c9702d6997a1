"""A rehearsal leaves no trace: the run after it computes what it would without it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy
import torch

from harness.generators import generator_states, set_generator_states
from harness.identity import describe, process_state, replaced
from harness.object_state import Unsavable, restore, state_of
from harness.observation import is_own


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Puts back, afterwards, what code inside has changed beyond its own objects.

    What experiment.py and the user's modules hold, and which of these are imported; functions and
    methods of libraries; generators of random numbers; environment variables; torch's switches.
    What a C library holds itself is not put back, nor is a language model: see
    `harness.identity.changed`.
    """
    own, switches, environ = OwnState(), process_state(), dict(os.environ)
    loaded = {*sys.modules}
    generators = generator_states()
    try:
        yield
    finally:
        own.put_back()
        for name in {*sys.modules} - loaded:
            if sys.modules[name] in own_modules():
                forget_module(name)
        for definition in replaced():
            setattr(definition.holder, definition.name, definition.was)
        set_generator_states(generators)
        if dict(os.environ) != environ:
            os.environ.clear()
            os.environ.update(environ)
        torch.set_default_dtype(getattr(torch, switches["default dtype"].removeprefix("torch.")))
        torch.use_deterministic_algorithms(switches["deterministic"])
        torch.set_float32_matmul_precision(switches["precision"])
        torch.backends.mkldnn.enabled = switches["mkldnn"]
        numpy.seterr(**switches["numpy"])


def forget_module(name: str) -> None:
    """The next import of it reads it again."""
    parent, _, last = name.rpartition(".")
    module = sys.modules.pop(name)
    if vars(sys.modules.get(parent) or types).get(last) is module:
        delattr(sys.modules[parent], last)


class OwnState:
    """What the experiment's modules, their classes and functions hold, to be put back.

    So that a pass finds nothing that the one before has left in them, and the run neither.
    """

    def __init__(self) -> None:
        self.places = [place for module in own_modules() for place in (module, *_classes(module))]
        self.held = [dict(vars(place)) for place in self.places]
        self.states: list[tuple[Any, str, Any, dict[str, Any]]] = []
        for place, name, value in _own_values():
            with contextlib.suppress(Unsavable):
                self.states.append((place, name, value, state_of(copied=True, value=value)))

    def put_back(self) -> None:
        """Everything stands as it stood when this was made."""
        for place, held in zip(self.places, self.held):
            for name, value in list(vars(place).items()):
                if name not in held and not name.startswith("__"):
                    delattr(place, name)
                elif held.get(name) is not value and not name.startswith("__"):
                    setattr(place, name, held[name])
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
        for place, name, value, state in self.states:
            with contextlib.suppress(Unsavable):
                made = restore(state, value=value)["value"]
                if made is not value:
                    setattr(place, name, made)


def own_digits() -> dict[str, str]:
    """By name, digits for what global names and class attributes of the user's code hold now."""
    found = {}
    for place, name, value in _own_values():
        inside = f"{place.__qualname__}." if isinstance(place, type) else ""
        where = getattr(value, "__qualname__", None) or ""
        if not (inside and where.startswith(inside)):  # a class's own methods
            found[inside + name] = describe(value)
    return found


def _own_values() -> Iterator[tuple[Any, str, Any]]:
    """(module or class, name, value) of all that the user's code holds, but what it imports."""
    for module in own_modules():
        for place in (module, *_classes(module)):
            for name, value in [*vars(place).items()]:
                if not name.startswith("__") and not isinstance(value, (type, types.ModuleType)):
                    yield place, name, value


def own_modules() -> list[types.ModuleType]:
    """experiment.py, and the user's modules."""
    files = {module: vars(module).get("__file__") for module in [*sys.modules.values()] if module}
    return [module for module, file in files.items() if file and is_own(file)]


def _classes(module: types.ModuleType) -> list[type]:
    return [v for v in vars(module).values()
            if isinstance(v, type) and v.__module__ == module.__name__]  # fmt: skip
