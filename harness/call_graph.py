"""The code that a result depends on, found by call graph.

It starts from objects (the classes of the SAEs and of the buffer at hand, the functions that
train), never from names in strings, so that a subclass or a new name can't fall out of it. It goes
on by every name that reached code mentions: through experiment.py and the harness by function and
class, through modules of the user's whole. What can't be followed (code made by exec or type)
takes in everything of its file.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import importlib.util
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from harness.errors import ExperimentError
from harness.identity import HELD, describe
from harness.observation import OBSERVED, is_of_a_library, name_of, real
from harness.start import HERE, source_at_start
from harness.store import digest
from harness.syntax import (
    ALL,
    FUNCTIONS,
    PACKAGE,
    Statement,
    bound_by,
    does_something,
    read_statements,
    statement_of,
)
from harness.verdict import LISTS_OF_SETTINGS

EXPERIMENT = Path("experiment.py")  # stands for the file whose text a key is given
# Without code of their own.
PLAIN = (str, bytes, int, float, complex, type(None), torch.Tensor, torch.dtype, torch.device)


def modules_below(folder: Path) -> list[Path]:
    """A folder's modules; the experiment.py of runs that a profile's folder holds is a record."""
    return sorted({*folder.glob("**/*.py")} - {*folder.glob("run_*/**/*.py")})


@functools.cache
def files_of(module: str) -> list[Path]:
    """The project's or the user's files behind a module's name; none for those of a library.

    Of the harness, the modules on the way to it; of another package, all of its files.
    """
    top, *rest = module.split(".")
    if top == PACKAGE:
        steps = [HERE.joinpath(PACKAGE, *rest[:n]) for n in range(len(rest) + 1)]
        found = [f for s in steps for f in (s.with_suffix(".py"), s / "__init__.py")]
    elif (HERE / f"{top}.py").is_file():
        found = [HERE / f"{top}.py"]
    elif not (found := modules_below(HERE / top)):
        spec = None
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(top)
        file = Path(spec.origin).resolve() if spec and spec.has_location else None
        if file and not is_of_a_library(file):
            package = spec.submodule_search_locations
            found = sorted(file.parent.glob("**/*.py")) if package else [file]
    return [file for file in found if file.is_file()]


def defined_in(thing: Any) -> tuple[Path | None, str]:
    """Where a function or class is defined: a file (None: a library's) and a name there, or `ALL`.

    Raises:
        LookupError: nowhere.
    """
    if isinstance(thing, types.FunctionType):
        file, name = thing.__code__.co_filename, thing.__code__.co_qualname
        if not file.startswith("<"):
            file = Path(real(file))
            return (None, "") if is_of_a_library(file) else (file, name.split(".")[0])
    module = sys.modules.get(thing.__module__ or "")
    file = getattr(module, "__file__", None)
    if file is None:
        python = any(isinstance(value, types.FunctionType) for value in vars(thing).values())
        frozen = getattr(getattr(module, "__spec__", None), "origin", "") in ("built-in", "frozen")
        if module is None or not frozen and (python or isinstance(thing, types.FunctionType)):
            raise LookupError(thing)
        return None, ""
    if is_of_a_library(file := Path(real(file))):
        return None, ""
    name = thing.__qualname__.split(".")[0]
    known = name != thing.__qualname__ or vars(module).get(name) is thing
    return file, name if known and isinstance(thing, type) else ALL


def of_experiment(file: Path, source: str | None) -> Path:
    """The file, or `EXPERIMENT` where it is the one with this source."""
    return EXPERIMENT if source is not None and source_at_start(file) == source else file


def placed(thing: Any, name: str, statements: tuple[Statement, ...]) -> set[str]:
    """The names that the statement binds in which a function or a class is defined, or `ALL`."""
    if any(name in s.binds for s in statements):
        return {name}
    line = thing.__code__.co_firstlineno if name == "<lambda>" else 0
    for s in statements:
        if s.node.lineno <= line <= s.node.end_lineno:
            return set(s.binds)
    return {ALL}


def held_by(thing: Any, settings_class: type | None) -> list[Any]:
    """What an object's behaviour may come from: what it wraps, calls, inherits from or holds."""
    for kind, attributes in HELD.items():
        if isinstance(thing, kind):
            with contextlib.suppress(ValueError):  # an empty cell
                return [getattr(thing, attribute) for attribute in attributes]
            return []
    if isinstance(thing, type):
        body = f"{thing.__qualname__}."  # what stands there is found where the class is
        values = [*vars(thing).values()]
        foreign = (v for v in values if not str(getattr(v, "__qualname__", "")).startswith(body))
        return [*thing.__mro__[1:], *foreign]
    if isinstance(thing, (list, tuple, set, frozenset, dict)):
        return [*(thing.values() if isinstance(thing, dict) else thing)]
    if settings_class and isinstance(thing, settings_class):
        return []
    if hasattr(type(thing), "key_parts"):
        return [type(thing), thing.key_parts()]
    held = getattr(thing, "__dict__", {})
    with contextlib.suppress(LookupError):
        if not isinstance(thing, nn.Module) and defined_in(type(thing))[0] is None:
            return [held.get("__wrapped__")]
    return [type(thing), *held.values()]


def definitions_of(
    roots: Iterable[object], source: str | None, settings_class: type | None
) -> dict[Path, set[str]]:
    """By file, the names of the definitions that objects are made of.

    Args:
        source: of experiment.py.
    Raises:
        ExperimentError: the code of a root stands nowhere.
    """
    found: dict[Path, set[str]] = {}
    waiting, seen = list(roots), {}
    of_roots = {id(root) for root in waiting}
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or (isinstance(thing, PLAIN) and id(thing) not in of_roots):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, types.ModuleType):
            for file in files_of(thing.__name__):
                found.setdefault(of_experiment(file, source), set()).add(ALL)
            continue
        try:
            if isinstance(thing, PLAIN):
                raise LookupError(thing)
            if isinstance(thing, (type, types.FunctionType)):
                file, name = defined_in(thing)
                if file and (file := of_experiment(file, source)) == EXPERIMENT:
                    names = placed(thing, name, read_statements(source, settings_class))
                elif file and file.is_relative_to(HERE / PACKAGE):
                    names = placed(thing, name, read_statements(source_at_start(file)))
                else:
                    names = {ALL}
                if file:
                    found.setdefault(file, set()).update(names)
        except LookupError as error:
            if id(thing) in of_roots:
                raise ExperimentError(
                    "the key of a result must start from functions, classes or objects of "
                    f"experiment.py, of a module beside it or of a library, but the code of "
                    f"{thing!r} is found in no file: define it in a file"
                ) from error
            found.setdefault(EXPERIMENT, set()).add(ALL)
        waiting += held_by(thing, settings_class)
    return found


class Code(NamedTuple):
    """Code that a result depends on.

    Attributes:
        parts: of experiment.py, a hash by function, method or class. files: by name, a hash of
            what is reached of other files: the harness and modules of the user's.
        names: that experiment.py and modules of the user's mention in it; all_names: and that the
            harness does.
        values: by name, digits for what experiment.py and modules of the user's bind it to now.
        strings: that stand in it. home: the file that experiment.py is in.
    """

    parts: dict[str, str]
    files: dict[str, str]
    names: set[str]
    all_names: set[str]
    values: dict[str, str]
    strings: set[str]
    home: Path | None


def reach(
    start: dict[Path, set[str]], source: str | None, own: tuple[Statement, ...]
) -> tuple[dict[Path, list[Statement]], set[str]]:
    """By file, the statements that names lead to, directly or by way of others.

    Of experiment.py and of the harness these are the statements that bind a name which is
    mentioned, and those that do something when they are read; of other files all of them.

    Args:
        source, own: experiment.py, and its statements.
    Returns:
        them, and all names that those of experiment.py and of the user's modules mention.
    """
    package = HERE / PACKAGE
    names = {file: set(given) for file, given in start.items()}
    users = {file for file in names if not file.is_relative_to(package)}
    found: dict[Path, dict[int, Statement]] = {}

    def follow(module: str, name: str, of_users: bool) -> None:
        if module == "__main__":
            names[EXPERIMENT].add(name)
        for file in files_of(module):
            path = of_experiment(file, source)
            if path != EXPERIMENT and not path.is_relative_to(package):
                names.setdefault(path, set()).add(ALL)
                users.update({path} if of_users else ())
            else:  # of packages on the way to it only what they do when they are read
                wanted = {name} if file.stem == module.split(".")[-1] else set()
                names.setdefault(path, set()).update(wanted)

    def grow(file: Path) -> bool:
        taken, wanted = found.setdefault(file, {}), names[file]
        before = len(taken)
        statements = own if file == EXPERIMENT else read_statements(source_at_start(file))
        for at, statement in enumerate(statements):
            listed = statement.binds & LISTS_OF_SETTINGS
            if at not in taken and (
                statement.always or statement.binds & wanted or (ALL in wanted and not listed)
            ):
                taken[at] = statement
                wanted |= statement.mentions
                for module, name in statement.imports:
                    follow(module, name, file in users)
        if before == 0:  # what it imports by a name that it makes
            importers = [path for path in OBSERVED.imports if of_experiment(path, source) == file]
            for module in (m for path in importers for m in sorted(OBSERVED.imports[path])):
                if module.split(".")[0] != PACKAGE and files_of(module):
                    follow(module, ALL, file in users)
        return len(taken) > before

    while any([grow(file) for file in list(names)]):
        pass
    mentioned = set().union(*(names[file] for file in users))
    return {file: [taken[at] for at in sorted(taken)] for file, taken in found.items()}, mentioned


def beginnings(
    called: set[str], reached: list[Statement], own: tuple[Statement, ...]
) -> Iterator[Statement]:
    """What comes before a key's roots: of functions that call them, and that are called by these,
    what they do until then. It makes what the roots are given; what comes after counts for nothing.

    Args:
        called: the names of the roots. reached, own: of experiment.py, what is reached, and all.
    """
    called, others = set(called), [s for s in own if s not in reached]
    while callers := [s for s in others if mentions(executed(s.node), called)]:
        others = [s for s in others if s not in callers]
        for statement in callers:
            node = copy.deepcopy(statement.node)
            if isinstance(node, FUNCTIONS):
                node.body = until_called(node, called)
            begun = statement_of(node, always=True)
            yield begun._replace(mentions=begun.mentions - LISTS_OF_SETTINGS)
        called = called.union(*(s.binds for s in callers))


def executed(node: ast.AST) -> list[ast.AST]:
    """What runs of a statement: of a function its body, and not its annotations."""
    return node.body if isinstance(node, FUNCTIONS) else [node]


def mentions(nodes: list[ast.AST], called: set[str]) -> bool:
    return any(isinstance(n, ast.Name) and n.id in called for node in nodes for n in ast.walk(node))


def until_called(function: Any, called: set[str]) -> list[ast.stmt]:
    """The statements of a function, or of a `with`, up to the last that mentions what is called."""
    inner = [n for s in function.body for n in ast.walk(s) if isinstance(n, FUNCTIONS)]
    called = called | {n.name for n in inner if mentions(n.body, called)}
    last = max(at for at, s in enumerate(function.body) if mentions([s], called))
    begun = function.body[: last + 1]
    for at, statement in enumerate(begun):
        straight = isinstance(statement, FUNCTIONS) or (
            at == last and isinstance(statement, (ast.With, ast.AsyncWith))
        )
        if straight and mentions(statement.body, called):
            statement.body = until_called(statement, called)
        elif at == last and not hasattr(statement, "body"):
            begun[at] = ArgumentsFirst(called).visit(statement)
    kept: list[ast.stmt] = []
    outer = {name for n in ast.walk(function) for name in getattr(n, "names", ())
             if isinstance(n, (ast.Global, ast.Nonlocal))}  # fmt: skip
    for statement in reversed(begun):  # without what only names something for later
        bound = isinstance(statement, ast.Assign) and not does_something(statement)
        if not bound or outer & bound_by(statement) or mentions(kept, bound_by(statement)):
            kept.insert(0, statement)
    return kept


class ArgumentsFirst(ast.NodeTransformer):
    """Leaves, of a call that a root's is an argument of, what is evaluated until then."""

    def __init__(self, called: set[str]) -> None:
        self.called = called

    def visit_Call(self, node: ast.Call) -> ast.AST:
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        if mentions([node.func], self.called) or not mentions(given, self.called):
            return node
        while not mentions(given[-1:], self.called):
            given.pop()
        return self.generic_visit(ast.Tuple(given, ast.Load()))


def reachable_code(
    source: str | None,
    roots: Iterable[object],
    settings: object = None,
    with_callers: bool = False,
    ran: dict[str, set[str]] | None = None,
) -> Code:
    """The code that objects are made of and lead to.

    Args:
        source: of experiment.py; None: nothing of it is among what is looked for.
        roots: classes, functions, modules, or objects with code of their own.
        settings: the run's: what its class says of its fields is left out.
        with_callers: also what the functions that call the roots do before.
        ran: by file, what else was seen to run (`Observer.ran`).
    Raises:
        ExperimentError: the code of a root is found in no file.
    """
    kind = None if settings is None else type(settings)
    roots = [*roots]
    own = () if source is None else read_statements(source, kind)
    start = definitions_of(roots, source, kind)
    start.setdefault(EXPERIMENT, set())
    called = set(start[EXPERIMENT])
    for file, names in (ran or {}).items():
        path = EXPERIMENT if file == str(EXPERIMENT) else of_experiment(HERE / file, source)
        placed_names = set().union(*(by_line(name, own) for name in names))
        start.setdefault(path, set()).update(placed_names if path == EXPERIMENT else {ALL})
    found, names = reach(start, source, own)
    if with_callers:
        own += tuple(beginnings(called, found[EXPERIMENT], own))
        found, names = reach(start, source, own)
    return code_of(found, names, roots, source, settings)


def hash_definitions(source: str, settings: object) -> Code:
    """All code of experiment.py and what it leads to; the lists of runs left out."""
    own = read_statements(source, type(settings))
    return code_of(*reach({EXPERIMENT: {ALL}}, source, own), [], source, settings)


def by_line(name: str, statements: tuple[Statement, ...]) -> set[str]:
    """A name as `Observer.ran` has it; of a lambda those that the statement binds it stands in."""
    if not name.startswith("<"):
        return {name}
    line = int(name.split(":")[1])
    return set().union(*(s.binds for s in statements if s.node.lineno <= line <= s.node.end_lineno))


def code_of(
    found: dict[Path, list[Statement]],
    names: set[str],
    roots: list[object],
    source: str | None,
    settings: object,
) -> Code:
    values: dict[str, str] = {}
    strings: set[str] = set()
    all_names = set().union(*(s.mentions for statements in found.values() for s in statements))
    home, own_names = home_of(roots, source)
    spaces = {vars(m).get("__file__"): vars(m) for m in [*sys.modules.values()] if m is not None}
    for file, statements in found.items():
        if file == EXPERIMENT or not file.is_relative_to(HERE / PACKAGE):
            held = own_names if file == EXPERIMENT else spaces.get(str(file), {})
            label = "" if file == EXPERIMENT else f"{name_of(file)} "
            here = [s for s in statements if not isinstance(s.node, (ast.Import, ast.ImportFrom))]
            for name in set().union(*(s.binds | s.declares for s in here)):
                if name in held and name not in LISTS_OF_SETTINGS:
                    values[label + name] = describe(held[name], settings, home)
            strings |= {string for s in statements for string in s.strings}
    parts: dict[str, str] = {}
    order: list[str] = []  # of what does something when it is read, or binds a name again
    for statement in found.pop(EXPERIMENT):
        again = any(name in parts for name, _ in statement.parts)
        for name, part in statement.parts:
            parts[name] = digest(parts.get(name, "") + part)
        if statement.always or again:
            order += [part for _, part in statement.parts]
    files = {
        name_of(file): digest([part for s in statements for part in s.parts])
        for file, statements in found.items()
    }
    parts["the order of statements"] = digest(order)
    return Code(parts, files, names, all_names, values, strings, home)


def home_of(roots: list[object], source: str | None) -> tuple[Path | None, dict[str, Any]]:
    """The file that experiment.py is in, and its globals, from its functions among the roots."""
    for root in roots:
        function = getattr(root, "__func__", root)
        if isinstance(function, types.FunctionType):
            file = Path(function.__code__.co_filename).resolve()
            if file.is_file() and of_experiment(file, source) == EXPERIMENT:
                return file, function.__globals__
    return None, {}


def own_files(source: str) -> dict[str, str]:
    """The texts of the project's and the user's files that code imports, by their names."""
    found: dict[Path, str] = {EXPERIMENT: source}
    waiting = [source]
    while waiting:
        text = waiting.pop()
        modules = {module for s in read_statements(text) for module, _ in s.imports}
        for file, seen in OBSERVED.imports.items():  # by a name that it makes
            modules |= seen if file.is_file() and source_at_start(file) == text else set()
        for file in (file for module in sorted(modules) for file in files_of(module)):
            if of_experiment(file, source) not in found:
                found[file] = source_at_start(file)
                waiting.append(found[file])
    return {name_of(file): text for file, text in found.items() if file != EXPERIMENT}
