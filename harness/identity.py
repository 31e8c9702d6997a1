"""What objects are, as JSON: what a result depends on beside the code that it runs.

Two objects with the same description compute the same by the same code: class and bases, values,
weights, hooks, what is wrapped or closed over. What has no content that can be seen (a lock, a
file, a tokenizer's compiled half) counts by its class alone.
"""

from __future__ import annotations

import collections
import enum
import functools
import hashlib
import random
import sys
import types
import uuid
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from harness.observation import is_known, name_of, real, unwatched
from harness.store import digest

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Path,
         enum.Enum, numpy.generic, range, slice)  # fmt: skip
# What functions and the like hold that their behaviour comes from, by their kind.
HELD = {
    types.FunctionType: ("__dict__", "__defaults__", "__kwdefaults__", "__closure__"),
    types.CellType: ("cell_contents",),
    types.MethodType: ("__func__", "__self__"),
    types.BuiltinMethodType: ("__self__",),
    functools.partial: ("func", "args", "keywords"),
    property: ("fget", "fset", "fdel"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
}
# Of a module of torch: what its passes go through.
OF_MODULE = (
    "training", "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks",
    "_backward_hooks", "_backward_pre_hooks", "fwd_hooks", "bwd_hooks",
)  # fmt: skip
WATCHED = ("torch", "transformers", "sae_bench", "sae_lens", "transformer_lens", "datasets",
           "tokenizers", "safetensors", "sklearn", "numpy", "harness", "tinylm",
           "smollm2")  # fmt: skip


@unwatched()
def describe(thing: object, settings: object = None, home: Path | None = None) -> str:
    """Digits that stand for what an object is; see `Description`.

    An object that can't be walked through is another one each time: in doubt it is computed again.
    """
    try:
        return digest(Description(settings, home)(thing))
    except Exception as error:  # of an object's own, or a RecursionError
        print(f"no key holds a {type(thing).__qualname__} ({type(error).__name__}: {error})")
        return uuid.uuid4().hex


class Description:
    """Makes JSON of objects; one that it has met before is said by its number.

    Args:
        settings: of the run: they count field by field, not as a whole, where an object holds them.
        home: the file of experiment.py, whatever it is called.
        quick: tensors by sums instead of by SHA-256.
        whole: also a language model part by part, not as what differs from when it was loaded.
    """

    def __init__(
        self,
        settings: object = None,
        home: Path | None = None,
        quick: bool = False,
        whole: bool = False,
    ) -> None:
        self.settings, self.home, self.quick, self.whole = settings, home, quick, whole
        self.met: dict[int, tuple[int, object]] = {}  # the object too, so that none takes its place

    def __call__(self, thing: Any) -> Any:
        if isinstance(thing, torch.device):
            thing = torch.device(thing.type)  # of several ranks each has a number of its own
        if isinstance(thing, PLAIN):
            return f"{type(thing).__qualname__} {thing!r}"
        if id(thing) in self.met:
            return [self.met[id(thing)][0]]
        self.met[id(thing)] = len(self.met), thing
        if not self.whole and any(thing is model for model in AS_LOADED):
            return ["language model", AS_LOADED[thing].weights, changed(thing)]
        if isinstance(thing, Tensor):
            return self.tensor(thing)
        if isinstance(thing, nn.Module):
            return self.module(thing)
        if isinstance(thing, type):
            return self.class_of(thing)
        if isinstance(thing, types.ModuleType):
            return thing.__name__
        if isinstance(thing, types.FunctionType) and hasattr(thing, "registry"):  # singledispatch's
            return [self.place_of(thing), self(thing.registry)]  # not what it was called with
        for kind, attributes in HELD.items():
            if isinstance(thing, kind):
                return self.held(thing, attributes)
        return [self.place_of(type(thing)), self.content(thing)]

    def content(self, thing: Any) -> Any:
        """Of an object that is neither plain nor torch's."""
        # The type first: what another library's objects are equal to may be an error.
        if type(thing) is type(self.settings) and thing == self.settings:
            return "the run's"
        if hasattr(type(thing), "key_parts"):
            return self(thing.key_parts())
        if isinstance(thing, (list, tuple, collections.deque)):
            return [*map(self, thing), self(getattr(thing, "__dict__", None))]
        if isinstance(thing, (set, frozenset)):
            return sorted(digest(self(item)) for item in thing)
        if isinstance(thing, (dict, types.MappingProxyType)):
            return [[self(key), self(value)] for key, value in [*thing.items()]]
        if isinstance(thing, numpy.ndarray):
            return self(thing.tolist()) if thing.dtype.hasobject else [
                str(thing.dtype), list(thing.shape), hashlib.sha256(thing.tobytes()).hexdigest()
            ]  # fmt: skip
        if isinstance(thing, torch.Generator):
            return self(thing.get_state())
        if isinstance(thing, random.Random):
            return digest(repr(thing.getstate()))
        if isinstance(thing, numpy.random.Generator):
            return self(thing.bit_generator.state)
        if type(thing).__module__ == "itertools":
            return self(thing.__reduce__())
        state = dict(getattr(thing, "__dict__", {}))
        state.pop("deprecation_warnings", None)  # of a tokenizer: those that it has given
        for name in (n for c in type(thing).__mro__ for n in getattr(c, "__slots__", ())):
            if isinstance(name, str) and hasattr(thing, name):
                state.setdefault(name, getattr(thing, name))
        own = self(type(thing)) if is_users(type(thing)) else None
        return [own, {name: self(value) for name, value in sorted(state.items())}]

    def held(self, thing: Any, attributes: tuple[str, ...]) -> Any:
        """Of a function or the like: where its code stands, and what it is called with."""
        parts = []
        for attribute in attributes:
            try:
                parts.append(self(getattr(thing, attribute)))
            except ValueError:  # an empty cell
                parts.append(None)
        code = getattr(thing, "__code__", None)
        if code is not None and code.co_filename.startswith("<"):
            parts.append(hashlib.sha256(code.co_code + repr(code.co_consts).encode()).hexdigest())
        return [self.place_of(thing), parts]

    def place_of(self, thing: Any) -> str:
        """Where a class or function is defined."""
        code = getattr(thing, "__code__", None)
        if code is not None:
            file = Path(real(code.co_filename))
            where = "experiment.py" if file == self.home else name_of(file)
            if not is_known(code.co_filename):
                where = getattr(thing, "__module__", "")
            return f"{where}:{code.co_qualname}"
        name = getattr(thing, "__qualname__", type(thing).__qualname__)
        # experiment.py is __main__, or of another name in a test.
        return name if is_users(thing) else f"{getattr(thing, '__module__', '')}.{name}"

    def class_of(self, thing: type) -> Any:
        """Of a class: its name; of one of the user's also its bases and its values."""
        if not is_users(thing):
            return self.place_of(thing)
        values = {
            name: self(value)
            for name, value in sorted(vars(thing).items())
            if not name.startswith("__") and name not in ("_abc_impl", "_is_protocol")
            and not getattr(value, "__qualname__", "").startswith(f"{thing.__qualname__}.")
        }  # fmt: skip
        return [self.place_of(thing), [self(base) for base in thing.__bases__], values]

    def tensor(self, thing: Tensor) -> Any:
        """Of a tensor: type, shape and content."""
        said = [self.place_of(type(thing)), str(thing.dtype), [*thing.shape], thing.requires_grad]
        if thing.is_sparse or thing.is_mkldnn or thing.is_meta or thing.is_quantized:
            return said
        return [*said, checksum(thing) if self.quick else sha256_tensor(thing)]

    def module(self, thing: nn.Module) -> Any:
        """Of a module: of a library's what its passes go through, of the user's all that it holds.

        Functions that stand on the object are what it was patched with.
        """
        held = dict(thing.__dict__)
        if not is_users(type(thing)):
            functions = (types.FunctionType, types.MethodType, functools.partial)
            held = {n: v for n, v in held.items() if n in OF_MODULE or isinstance(v, functions)
                    or isinstance(v, (bool, int, float)) and n != "hook_id"}  # fmt: skip
        state = {}
        for name, value in sorted(held.items()):
            if "hooks" in name and not isinstance(value, PLAIN):  # by numbers of the process
                value = [*value.values()] if isinstance(value, dict) else [*value]
            if "hooks" not in name or value:
                state[name] = self(value)
        return [self(type(thing)), state]


def is_users(thing: Any) -> bool:
    """Whether a class is defined in code of the user's or of the harness, or nowhere."""
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    if module is None:
        return True
    file = getattr(module, "__file__", None)
    return file is not None and is_known(file)


def sha256_tensor(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's content."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy()).hexdigest()


def checksum(tensor: Tensor, columns: int = 1009) -> str:
    """Stands for a tensor's content at the cost of reading it once: sums of every 1009th number."""
    flat = tensor.detach().contiguous().flatten()
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = flat.view(sizes.get(flat.element_size(), torch.uint8))
    whole = len(bits) // columns * columns
    sums = bits[:whole].view(whole // columns, columns).sum(0, dtype=torch.int64)
    return sha256_tensor(torch.cat([sums, bits[whole:].to(torch.int64)]))


# ---- The language model, as it was loaded


class Loaded(NamedTuple):
    """Digits for what a language model was when it was loaded: all of it, and its weights alone."""

    whole: str
    weights: str


AS_LOADED: weakref.WeakKeyDictionary[Any, Loaded] = weakref.WeakKeyDictionary()


def remember(model: Any, weights: nn.Module) -> Any:
    """Notes what a language model is like now, for `changed`; returns it."""
    AS_LOADED[model] = Loaded(
        digest(Description(quick=True, whole=True)(model)),
        digest(Description(quick=True)([*weights.parameters(), *weights.buffers()])),
    )
    return model


@unwatched()
def changed(model: Any) -> str:
    """Empty where a language model is as it was loaded: weights, hooks, methods; else digits."""
    if model not in AS_LOADED:
        return describe(model)
    now = digest(Description(quick=True, whole=True)(model))
    return "" if AS_LOADED[model].whole == now else digest(Description(whole=True)(model))


# ---- The process


def process_state() -> dict[str, Any]:
    """Switches of libraries that change numbers."""
    matmul = torch.backends.cuda.matmul
    return {
        "default dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": [matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "reduced": [matmul.allow_fp16_reduced_precision_reduction,
                    matmul.allow_bf16_reduced_precision_reduction],
        "mkldnn": torch.backends.mkldnn.enabled,
        "benchmark": torch.backends.cudnn.benchmark,
        "numpy": numpy.geterr(),
    }  # fmt: skip


class Definition(NamedTuple):
    """A function, class or method of a library: where it stands, and what stood there first."""

    place: str
    holder: Any  # a module or a class
    name: str
    was: Any

    def now(self) -> Any:
        """What stands there now; None where nothing does."""
        return vars(self.holder).get(self.name)


PRISTINE: list[Definition] = []


def remember_libraries() -> None:
    """Notes functions, classes and methods of the libraries that results come from."""
    PRISTINE.clear()
    for place, module in [*sys.modules.items()]:
        if place.split(".")[0] not in WATCHED or module is None:
            continue
        for name, value in [*vars(module).items()]:
            kind = type(value)  # isinstance asks the object, and some warn of themselves then
            if issubclass(kind, (types.FunctionType, types.BuiltinFunctionType, type)):
                PRISTINE.append(Definition(f"{place}.{name}", module, name, value))
            if issubclass(kind, type) and value.__module__ == place:
                wrappers = staticmethod, classmethod, property
                PRISTINE.extend(
                    Definition(f"{place}.{name}.{method}", value, method, function)
                    for method, function in [*vars(value).items()]
                    if callable(function) or isinstance(function, wrappers)
                )


def replaced() -> list[Definition]:
    """Those of `remember_libraries` in whose place something else stands now."""
    differing = [definition for definition in PRISTINE if definition.now() is not definition.was]
    # torch itself wraps an optimizer's step, when the first one is made.
    return [definition for definition in differing if not hasattr(definition.now(), "hooked")]


def patched() -> dict[str, Any]:
    """By name, what stands where a library's function, class or method stood."""
    return {definition.place: definition.now() for definition in replaced()}
