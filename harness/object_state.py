"""What objects hold, found by walking: as plain data, and put back into newly made ones.

An object becomes a node: what it is, what it holds by itself, and the nodes that hang on it. One
that is reached in two ways is one node, so what was shared stays shared. Reading runs no code of
the file's: an object goes into the one that stands in its place in the new ones; where none does,
its class is looked up among what is imported, and it is made without a call of that class.
"""

from __future__ import annotations

import collections
import hashlib
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from harness.object_parts import (
    ATOMS,
    NAMED,
    Edge,
    Parts,
    Unsavable,
    attributes_of,
    looked_up,
    name_of,
    parts,
    type_name,
)
from harness.observation import unwatched

# Classes that may be called, with what a file says, where nothing stands in the place of a value.
MAKERS = ("collections:", "datetime:", "decimal:", "fractions:", "functools:partial", "itertools:",
          "pathlib:", "random:Random", "torch._C:Generator",
          "torch:device", "builtins:range", "builtins:slice", "builtins:complex")  # fmt: skip
TRANSPARENT = ("_parameters", "_buffers", "_modules")  # of a torch module: its attributes


@unwatched()
def state_of(given: object = None, copied: bool = False, **things: Any) -> dict[str, Any]:
    """All that objects hold, as plain data (see `harness.store.plain`).

    Args:
        given: what hangs on it is another one's: it is not saved, and left as it is.
        copied: tensors are copies; else they are the objects' own.
        things: by the name that they have in messages.
    Raises:
        Unsavable: says what it is and where it hangs.
    """
    walk = _Walk(given)
    try:
        roots = {name: walk.reference(thing, name) for name, thing in things.items()}
    except RecursionError as error:
        raise Unsavable(f"{' or '.join(things)} is too deeply nested") from error
    for node in walk.nodes if copied else ():
        if node["kind"] == "tensor":
            node["data"]["value"] = node["data"]["value"].clone()
    return {"nodes": walk.nodes, "roots": roots}


def restore(state: dict[str, Any], given: object = None, **things: Any) -> dict[str, Any]:
    """Puts newly made objects where others stood at their `state_of`.

    Returns:
        them, by name; in the place of one that can't be changed, as of itertools, another one.
    Raises:
        Unsavable: something has no counterpart in the new ones, and can't be made.
    """
    back = _Return(state["nodes"], given)
    for name, thing in things.items():
        back.pair(state["roots"][name], thing)
    # Of two tensors on one memory, the parameter stays on it.
    for number, old in list(back.pairs.items()):
        if isinstance(old, nn.Parameter):
            back.made_of(number)
    return {name: back.made_of(reference) for name, reference in state["roots"].items()}


def differences(one: Any, other: Any) -> list[str]:
    """The names of what differs between two fingerprints (see `fingerprint`)."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


@unwatched()
def fingerprint(state: Any, name: str = "") -> dict[str, str]:
    """A digest for each name in plain data, or in a `state_of`: compared bit for bit."""
    found: dict[str, Any] = {}
    for at, value in _leaves(state, name):
        found.setdefault(at, hashlib.sha256()).update(value)
    return {at: digest.hexdigest() for at, digest in found.items()}


def _leaves(value: Any, name: str) -> Iterator[tuple[str, bytes]]:
    if isinstance(value, dict) and value.keys() == {"nodes", "roots"}:
        names = [node["name"] for node in value["nodes"]]
        for node in value["nodes"]:
            at = node["name"]
            yield at, f"{node['kind']} {node['type']}".encode()
            data = {name: held for name, held in node["data"].items() if name != "stride"}
            yield from ((at, leaf) for _, leaf in _leaves(data, ""))
            for called, child in _named(at, node["children"]):
                hangs = repr(child) if isinstance(child, list) else names[child]
                yield called if isinstance(child, list) else at, hangs.encode()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}".strip("."))
    elif isinstance(value, (list, tuple)) and not all(type(item) in ATOMS for item in value):
        for at, item in enumerate(value):
            yield from _leaves(item, f"{name}[{at}]")
    elif isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        content = value.flatten().view(torch.uint8).numpy().tobytes()
        yield name, f"{value.dtype} {tuple(value.shape)}".encode() + content
    else:
        yield name, repr(value).encode()


def _named(name: str, children: dict[Edge, Any]) -> Iterator[tuple[str, Any]]:
    """What hangs on a thing, as it is called. torch numbers hooks over the process: not here."""
    hooks = "_hooks" in name.rpartition(".")[2]
    for place, (edge, child) in enumerate(children.items()):
        yield _called(name, ("item", place) if hooks else edge), child


def _called(name: str, edge: Edge) -> str:
    """What a thing is called that hangs on another, as code would reach it."""
    how, which = edge
    if how in ("attribute", "member"):
        return f"{name}." if which in TRANSPARENT else f"{name}.{which}"
    if name.endswith("."):
        return f"{name}{which}"
    if how in ("item", "value", "key"):
        return f"{name}[{', '.join(map(repr, which)) if isinstance(which, tuple) else repr(which)}]"
    return name


class _Walk:
    """Gives every object that it meets a number, and notes what it is made of."""

    def __init__(self, given: object) -> None:
        self.given = {id(value): name for name, value in _hanging_on(given)}
        self.numbers: dict[int, int] = {}
        self.nodes: list[dict[str, Any]] = []
        self.met: list[Any] = []  # so that no other object gets its id
        self.memory: dict[int, int] = {}

    def reference(self, value: Any, name: str) -> Any:
        """[value] of an atom, else the number of its node."""
        if type(value) in ATOMS:
            return [value]
        if id(value) in self.numbers:
            return self.numbers[id(value)]
        number = self.numbers[id(value)] = len(self.nodes)
        node = {"name": name.strip("."), "type": type_name(value)}
        self.nodes.append(node)
        self.met.append(value)
        if id(value) in self.given:
            found = Parts("given", {"of": self.given[id(value)]}, {})
        else:
            try:
                found = parts(value)
            except Unsavable as error:
                what = error if isinstance(value, Tensor) else type(value).__name__
                raise Unsavable(f"{name} is a {what}") from error
        if "memory" in found.data:  # a number for each, where addresses change from run to run
            found.data["memory"] = self.memory.setdefault(found.data["memory"], len(self.memory))
        node |= {"kind": found.kind, "data": found.data}
        named = _named(name, found.children)
        node["children"] = {
            edge: self.reference(child, called)
            for edge, (called, child) in zip(found.children, named)
        }
        return number


def _hanging_on(given: object) -> Iterable[tuple[str, Any]]:
    """What can be reached from an object, by its shortest name; no classes, no functions."""
    waiting, seen = collections.deque([("", given)]), set()
    while waiting:
        name, value = waiting.popleft()
        if id(value) in seen or isinstance(value, NAMED):
            continue
        seen.add(id(value))
        yield name, value
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        elif not isinstance(value, (types.FunctionType, types.MethodType)):
            items = attributes_of(value).items()
        waiting += [(f"{name}[{at!r}]", item) for at, item in items if type(item) not in ATOMS]


class _Return:
    """Makes objects of nodes: in the place of new ones where these are of the same kind."""

    def __init__(self, nodes: list[dict[str, Any]], given: object) -> None:
        self.nodes = nodes
        self.given = dict(_hanging_on(given))
        self.pairs: dict[int, Any] = {}
        self.made: dict[int, Any] = {}
        self.on: dict[int, int] = {}  # by address, the memory that a saved tensor was on

    def pair(self, reference: Any, new: Any) -> None:
        """Finds for every node the new object that stands in its place."""
        if isinstance(reference, list) or reference in self.pairs:
            return
        node = self.nodes[reference]
        if node["kind"] == "given" or type_name(new) != node["type"] or type(new) in ATOMS:
            return
        found = parts(new)
        if found.kind != node["kind"]:
            return
        self.pairs[reference] = new
        children = found.children
        if node["data"].get("maker") == "itertools:cycle":  # its state is a list that it fills
            children = {edge: item for edge, item in children.items() if edge[1] != "state"}
        if found.kind == "dict" and children.keys() != node["children"].keys():
            if len(children) == len(node["children"]):  # keys that differ from run to run
                children = dict(zip(node["children"], children.values()))
        for edge, child in node["children"].items():
            if edge in children:
                self.pair(child, children[edge])

    def made_of(self, reference: Any) -> Any:
        """The object of a node, with all that hangs on it."""
        if isinstance(reference, list):
            return reference[0]
        if reference not in self.made:
            node = self.nodes[reference]
            make = getattr(self, f"_{node['kind']}")
            try:
                self.made[reference] = make(node, self.pairs.get(reference), reference)
            except (TypeError, LookupError, AttributeError, ValueError, RuntimeError) as error:
                if isinstance(error, Unsavable):
                    raise
                kind = node["type"].partition(":")[2]
                raise Unsavable(f"{node['name']} is a {kind} that can't be made again") from error
        return self.made[reference]

    def _child(self, node: dict, *edge: Any) -> Any:
        return self.made_of(node["children"].get(edge, [None]))

    def _given(self, node: dict, old: Any, number: int) -> Any:
        return self.given[node["data"]["of"]]

    def _named(self, node: dict, old: Any, number: int) -> Any:
        found, name = looked_up(node["data"]["of"]), node["data"]["of"]
        if found is None and (old is None or name_of(old) != name):
            raise LookupError(name)
        return old if found is None else found

    def _bytes(self, node: dict, old: Any, number: int) -> Any:
        kind = bytearray if node["type"] == "builtins:bytearray" else bytes
        return kind.fromhex(node["data"]["hex"])

    def _array(self, node: dict, old: Any, number: int) -> Any:
        data = node["data"]
        kind, shape = numpy.dtype(data["dtype"]), tuple(data["shape"])
        content = data["bytes"].numpy().tobytes()[: kind.itemsize * int(numpy.prod(shape))]
        value = numpy.frombuffer(content, kind).reshape(shape)
        if node["type"] != "numpy:ndarray":
            return value[()]
        if old is not None and old.shape == shape and old.dtype == kind and old.flags.writeable:
            old[...] = value
            return old
        return value.copy()

    def _tensor(self, node: dict, old: Any, number: int) -> Any:
        data = node["data"]
        value = data["value"]
        with torch.no_grad():
            if old is not None and self._fits(old, value, data["memory"]):
                old.copy_(value)
            else:
                device = data["device"] if old is None else old.device
                old = self._new_tensor(value, data["stride"], device, looked_up(node["type"]))
        self.made[number] = old
        if old.is_leaf and old.requires_grad != data["requires_grad"]:
            old.requires_grad_(data["requires_grad"])
        if old.is_leaf:
            old.grad = self._child(node, "member", "grad")
        self._set_attributes(node, old)
        return old

    def _fits(self, old: Tensor, value: Tensor, memory: int) -> bool:
        """Whether a new tensor can take a saved value, and no other saved one is on its memory."""
        same = old.shape == value.shape and old.dtype == value.dtype and 0 not in old.stride()
        address = old.untyped_storage().data_ptr()
        return same and (not address or self.on.setdefault(address, memory) == memory)

    def _new_tensor(self, value: Tensor, stride: Any, device: Any, kind: Any) -> Tensor:
        made = torch.empty(value.shape, dtype=value.dtype, device=device)
        made = (made.as_strided(value.shape, stride) if stride else made).copy_(value)
        return made if kind is Tensor else made.as_subclass(kind)

    def _function(self, node: dict, old: Any, number: int) -> Any:
        found = old if old is not None else looked_up(node["data"]["of"])
        if not isinstance(found, types.FunctionType) or (old is None and found.__closure__):
            raise LookupError(node["data"]["of"])
        self.made[number] = found
        for name, cell in zip(found.__code__.co_freevars, found.__closure__ or ()):
            if ("member", name) in node["children"]:
                cell.cell_contents = self._child(node, "member", name)
        if ("part", "defaults") in node["children"]:
            found.__defaults__ = self._child(node, "part", "defaults")
        self._set_attributes(node, found)
        return found

    def _method(self, node: dict, old: Any, number: int) -> Any:
        of = self._child(node, "part", "self")
        return types.MethodType(self._child(node, "part", "function"), of)

    def _weak(self, node: dict, old: Any, number: int) -> Any:
        of = self._child(node, "part", "of")
        return old if old is not None and old() is of else weakref.ref(of)

    def _dict(self, node: dict, old: Any, number: int) -> Any:
        made = self.made[number] = self._empty(node) if old is None else old
        items = []
        for (how, which), child in node["children"].items():
            if how == "item":
                items.append((which, self.made_of(child)))
            elif how == "key":
                items.append((self.made_of(child), self._child(node, "value", which)))
        made.clear()
        for key, item in items:
            made[key] = item
        if ("part", "default_factory") in node["children"]:
            made.default_factory = self._child(node, "part", "default_factory")
        self._set_attributes(node, made)
        return made

    def _items(self, node: dict, old: Any, number: int) -> Any:
        kind = type(old) if old is not None else self._class_of(node)
        children = node["children"].items()
        if issubclass(kind, (tuple, frozenset)):
            items = [self.made_of(child) for (how, _), child in children if how == "item"]
            if isinstance(old, tuple) and len(old) == len(items):
                if all(one is other for one, other in zip(old, items)):
                    return old
            base = kind if kind is torch.Size else tuple if issubclass(kind, tuple) else frozenset
            made = base(items) if kind is base else base.__new__(kind, items)
            self._set_attributes(node, made)
            return made
        made = self.made[number] = self._empty(node) if old is None else old
        items = [self.made_of(child) for (how, _), child in children if how == "item"]
        made.clear()
        (made.update if issubclass(kind, set) else made.extend)(items)
        self._set_attributes(node, made)
        return made

    def _object(self, node: dict, old: Any, number: int) -> Any:
        made = self.made[number] = object.__new__(self._class_of(node)) if old is None else old
        self._set_attributes(node, made)
        return made

    def _reduced(self, node: dict, old: Any, number: int) -> Any:
        """In place where it is made of the same; else as the new one in its place was made."""
        children = node["children"].items()
        arguments = [self.made_of(child) for (how, _), child in children if how == "argument"]
        made, maker = None, node["data"]["maker"]
        if old is not None:
            before = parts(old)
            if before.data["maker"] != maker:
                raise LookupError(maker)
            held = [item for (how, _), item in before.children.items() if how == "argument"]
            if len(held) == len(arguments) and all(map(_same, arguments, held)):
                made = old
        elif not maker.startswith("numpy.random._pickle:"):
            if not maker.startswith(MAKERS) or not isinstance(looked_up(maker), type):
                raise LookupError(maker)
        if made is None:
            made = looked_up(maker)(*arguments)
        self.made[number] = made
        state = self._child(node, "part", "state")
        if hasattr(made, "__setstate__") and state is not None:
            made.__setstate__(state)
        elif state is not None:
            vars(made).update(state)
        for item in self._child(node, "part", "items") or ():
            made.append(item)
        for key, item in self._child(node, "part", "pairs") or ():
            made[key] = item
        return made

    def _class_of(self, node: dict) -> type:
        found = looked_up(node["type"])
        if not isinstance(found, type):
            raise LookupError(node["type"])
        return found

    def _empty(self, node: dict) -> Any:
        """A container of a class, made without a call of that class."""
        kind = self._class_of(node)
        bases = (collections.OrderedDict, collections.defaultdict, dict, list, set)
        if issubclass(kind, collections.deque):
            made = collections.deque.__new__(kind)
            collections.deque.__init__(made, maxlen=node["data"]["maxlen"])
            return made
        return next(base for base in bases if issubclass(kind, base)).__new__(kind)

    def _set_attributes(self, node: dict, made: Any) -> None:
        """Those that a node has, and no others."""
        saved = {w: child for (how, w), child in node["children"].items() if how == "attribute"}
        for name in [name for _, name in attributes_of(made) if name not in saved]:
            if not name.startswith("_dynamo"):
                object.__delattr__(made, name)
        for name, child in saved.items():
            value, held = self.made_of(child), getattr(made, "__dict__", None)
            if held is not None and (name in held or not hasattr(type(made), name)):
                held[name] = value
            else:
                object.__setattr__(made, name, value)


def _same(one: Any, other: Any) -> bool:
    by_value = type(one) is type(other) and type(one) in (*ATOMS, torch.device)
    return one is other or (by_value and one == other)
