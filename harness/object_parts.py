"""What a Python object is made of: by itself, and what hangs on it. Nothing is left out."""

from __future__ import annotations

import collections
import contextlib
import copyreg
import enum
import functools
import sys
import types
import weakref
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

ATOMS = (type(None), bool, int, float, str)
ITEMS = (list, tuple, set, frozenset, collections.deque)
NAMED = (type, types.ModuleType, types.MethodDescriptorType, types.WrapperDescriptorType,
         enum.Enum, torch.dtype)  # fmt: skip
Edge = tuple[str, Any]  # how a thing hangs on another: ("attribute", name), ("item", index), …


class Unsavable(TypeError):
    """Something holds what can't be saved: a file, a generator that has begun, a lock."""


class Parts(NamedTuple):
    """What an object is made of: its kind, plain data of its own, and what hangs on it."""

    kind: str
    data: dict[str, Any]
    children: dict[Edge, Any]


def type_name(value: object) -> str:
    """module:name, by which `looked_up` finds it."""
    named = value if isinstance(value, (type, types.FunctionType)) else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def looked_up(name: str) -> Any:
    """What is called module:name, of what is imported; None where there is none."""
    module, _, path = name.partition(":")
    with contextlib.suppress(AttributeError, KeyError):
        return functools.reduce(getattr, path.split(".") if path else [], sys.modules[module])
    return None


def _slots(value: object) -> dict[str, Any]:
    """What stands in an object's __slots__."""
    found = {}
    for kind in type(value).__mro__:
        if "__slots__" in vars(kind):
            for name, member in vars(kind).items():
                if isinstance(member, types.MemberDescriptorType):
                    with contextlib.suppress(AttributeError):
                        found[name] = member.__get__(value)
    return found


def attributes_of(value: object) -> dict[Edge, Any]:
    """What an object has under names, whatever these begin with."""
    named = {**getattr(value, "__dict__", {}), **_slots(value)}
    return {("attribute", name): item for name, item in named.items()}


def place_of(device: torch.device) -> str:
    """Where a tensor is; of the GPU that this process works on the kind alone.

    Another rank, or another attempt, that goes on with it has another one.
    """
    is_own = device.type == "cuda" and device.index == torch.cuda.current_device()
    return device.type if is_own else str(device)


def is_simple(key: Any) -> bool:
    """Whether a key of a dictionary is one by its value, not by what it is."""
    return type(key) in ATOMS or type(key) is tuple and all(map(is_simple, key))


def parts(value: Any) -> Parts:
    """What an object is made of.

    Raises:
        Unsavable: nobody can know.
    """
    if isinstance(value, Tensor):
        return _tensor_parts(value)
    if isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype != object:
        content = torch.frombuffer(bytearray(value.tobytes()) or bytearray(1), dtype=torch.uint8)
        data = {"bytes": content, "dtype": value.dtype.str, "shape": tuple(value.shape)}
        return Parts("array", data, {})
    if isinstance(value, (bytes, bytearray)):
        return Parts("bytes", {"hex": value.hex()}, {})
    if isinstance(value, NAMED):
        return Parts("named", {"of": name_of(value)}, {})
    if isinstance(value, types.FunctionType):
        return _function_parts(value)
    if isinstance(value, types.MethodType):
        children = {("part", "function"): value.__func__, ("part", "self"): value.__self__}
        return Parts("method", {}, children)
    if isinstance(value, weakref.ref):
        return Parts("weak", {}, {("part", "of"): value()})
    if isinstance(value, dict):
        children, factory = {}, getattr(value, "default_factory", None)
        for number, (key, item) in enumerate(value.items()):
            if is_simple(key):
                children["item", key] = item
            else:
                children["key", number], children["value", number] = key, item
        children |= {("part", "default_factory"): factory} if factory else {}
        return Parts("dict", {}, children | attributes_of(value))
    if isinstance(value, ITEMS):
        data = {"maxlen": value.maxlen} if isinstance(value, collections.deque) else {}
        items = value
        if isinstance(value, (set, frozenset)) and all(map(is_simple, value)):
            items = sorted(value, key=repr)
        children = {("item", number): item for number, item in enumerate(items)}
        return Parts("items", data, children | attributes_of(value))
    if _is_of_python(value):
        return Parts("object", {}, attributes_of(value))
    return _reduced_parts(value)


def _is_of_python(value: object) -> bool:
    """Whether an object is what its attributes say; else C code may keep more of it.

    Raises:
        Unsavable: it does, and gives it to nobody.
    """
    kind, stock = type(value), object
    if kind.__reduce_ex__ is not stock.__reduce_ex__ or kind.__reduce__ is not stock.__reduce__:
        return False
    if kind in copyreg.dispatch_table:
        return False
    if kind.__getstate__ is stock.__getstate__:
        try:
            object.__reduce_ex__(value, 4)
        except TypeError as error:
            raise Unsavable(str(error)) from error
        return True
    return isinstance(kind.__getstate__, types.FunctionType)


def name_of(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return f"{type_name(value)}.{value.name}"
    if isinstance(value, torch.dtype):
        return str(value).replace(".", ":")
    if isinstance(value, types.ModuleType):
        return f"{value.__name__}:"
    module = getattr(value, "__module__", None) or getattr(
        getattr(value, "__objclass__", None), "__module__", "builtins"
    )
    return f"{module}:{value.__qualname__}"


def _tensor_parts(value: Tensor) -> Parts:
    if value.layout != torch.strided:
        raise Unsavable(f"{value.layout} tensor")
    data = {"value": value.detach(), "requires_grad": value.requires_grad and value.is_leaf}
    dense = value.numel() and torch.empty_like(value, device="meta").stride() == value.stride()
    data |= {"stride": value.stride() if dense else None, "device": place_of(value.device)}
    data["memory"] = value.untyped_storage().data_ptr()
    children = {("attribute", name): item for name, item in vars(value).items()
                if not name.startswith("_dynamo")}  # a compiler's notes  # fmt: skip
    if value.is_leaf and value.grad is not None:
        children["member", "grad"] = value.grad
    return Parts("tensor", data, children)


def _function_parts(value: types.FunctionType) -> Parts:
    children = {}
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
        with contextlib.suppress(ValueError):  # not filled yet
            children["member", name] = cell.cell_contents
    children |= attributes_of(value)
    if value.__defaults__ and not all(map(is_simple, value.__defaults__)):
        children["part", "defaults"] = value.__defaults__
    return Parts("function", {"of": type_name(value)}, children)


def _reduced_parts(value: object) -> Parts:
    """Of what says by itself how it is made again, as for pickle."""
    reduce = copyreg.dispatch_table.get(type(value))
    try:
        said = reduce(value) if reduce else value.__reduce_ex__(4)
    except Exception as error:
        raise Unsavable(str(error)) from error
    if isinstance(said, str):
        module = getattr(value, "__module__", None) or type(value).__module__
        return Parts("named", {"of": f"{module}:{said}"}, {})
    maker, arguments, state, items, pairs = (*said, None, None, None)[:5]
    children: dict[Edge, Any] = {("argument", n): item for n, item in enumerate(arguments)}
    for name, some in (("state", state), ("items", items), ("pairs", pairs)):
        if some is not None:
            children["part", name] = some if name == "state" else list(some)
    return Parts("reduced", {"maker": name_of(maker)}, children)
