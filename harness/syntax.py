"""The statements of a Python file: what each binds and mentions, and whether it does more."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from harness.store import digest
from harness.verdict import LISTS_OF_SETTINGS

PACKAGE = __name__.split(".")[0]
ALL = "*"  # in the place of a name: everything of a file
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (ast.ClassDef, *FUNCTIONS)
# Calls and decorators that only make an object, so that reading them does no more.
MAKERS = frozenset({
    "dict", "list", "tuple", "set", "frozenset", "partial", "range", "len", "min", "max", "Path",
    "Field", "ConfigDict", "torch", "functools", "contextlib", "dataclasses", "dataclass",
    "checked", "property", "staticmethod", "classmethod", "cache", "lru_cache",
    "cached_property", "wraps", "contextmanager", "abstractmethod", "field_validator",
    "model_validator", "sweep",
})  # fmt: skip

LOOKUPS = {"globals", "__globals__", "eval", "exec", "modules"}  # find a name that stands nowhere


class Statement(NamedTuple):
    """A statement at the top level of a file.

    Attributes:
        parts: (name, hash of its syntax, no comments or docstrings); of a class, by method.
        binds: the names that it binds; of a class, its methods too, as ".method".
        mentions: the names that it mentions; attributes also as ".attribute".
        imports: the modules that it imports, anywhere in it, and the names it takes from each.
        always: whether reading it does more than to bind names.
        declares: the names that functions in it declare global. strings: that stand in it.
    """

    node: ast.stmt
    parts: tuple[tuple[str, str], ...]
    binds: frozenset[str]
    mentions: frozenset[str]
    imports: tuple[tuple[str, str], ...]
    always: bool
    declares: frozenset[str]
    strings: frozenset[str]


def without_docstrings(tree: ast.AST) -> ast.AST:
    """The tree, its docstrings taken out; comments are in no tree."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, *DEFINITIONS)) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = body[1:]
    return tree


def names_in(nodes: Iterable[ast.AST]) -> set[str]:
    """Every name that code mentions; attributes also as ".attribute", and so words in strings.

    `ALL` is among them where names of the file may be looked up that stand nowhere.

    Args:
        nodes: of the code, each by itself, as `ast.walk` gives them.
    """
    found: set[str] = set()
    for n in nodes:
        if isinstance(n, ast.Name):
            found |= {n.id, ALL} if n.id in LOOKUPS else {n.id}
        elif isinstance(n, ast.Attribute):
            found |= {n.attr, f".{n.attr}"}
            if n.attr in LOOKUPS - {"eval"} or "builtins" in ast.unparse(n):  # a model has an eval
                found.add(ALL)
        elif isinstance(n, ast.Constant) and isinstance(n.value, str):
            found |= {f".{word}" for word in n.value.split(".") if word.isidentifier()}
    return found


def bound_by(node: ast.stmt) -> set[str]:
    """The names that a statement binds, and those of a class's methods as ".method"."""
    if isinstance(node, ast.ClassDef):
        methods = {f".{part.name}" for part in node.body if isinstance(part, FUNCTIONS)}
        return {node.name} | {name for name in methods if not name.startswith(".__")}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, FUNCTIONS):
        return {node.name}
    inside = {n.name for n in ast.walk(node) if isinstance(n, DEFINITIONS)}
    loops = [n.target for n in ast.walk(node) if isinstance(n, ast.comprehension)]
    its_own = {n for target in loops for n in ast.walk(target)}  # a comprehension's variables
    stored = (n for n in ast.walk(node) if isinstance(n, ast.Name) and n not in its_own)
    # What reads PLAN depends on PLAN["run_11"] = dict(...), too.
    entries = (first_name(innermost(n)) for n in ast.walk(node)
               if is_entry(n) and isinstance(n.ctx, ast.Store))  # fmt: skip
    return {n.id for n in stored if isinstance(n.ctx, ast.Store)} | {*entries} | inside


def does_something(node: ast.stmt, makers: frozenset[str] = MAKERS) -> bool:
    """Whether reading a statement may do more than to bind names to what it says.

    Args:
        makers: those of `MAKERS` that are what they are called.
    """
    if isinstance(node, DEFINITIONS):
        if any(first_name(decorator) not in makers for decorator in node.decorator_list):
            return True
        evaluated = [a for d in node.decorator_list for a in getattr(d, "args", [])]
        if isinstance(node, ast.ClassDef):  # a keyword is a metaclass, or for one
            evaluated += node.bases
            if node.keywords or any(does_something(part, makers) for part in node.body):
                return True
        else:
            evaluated += [*node.args.defaults, *filter(None, node.args.kw_defaults)]
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        targets = [n for t in targets for n in (t.elts if isinstance(t, ast.Tuple) else [t])]
        entries = [t for t in targets if is_entry(t)]
        if not all(isinstance(target, ast.Name) or target in entries for target in targets):
            return True
        evaluated = [*entries, *filter(None, [node.value])]
    elif isinstance(node, ast.AugAssign) and first_name(node.target) in LISTS_OF_SETTINGS:
        evaluated = [node.value]  # PLAN |= sweep("k", k_min=(8, 16))
    else:
        return not isinstance(node, ast.Pass)
    return any(calls_something(value, makers) for value in evaluated)


def innermost(target: ast.AST) -> ast.AST:
    """What a subscript, or several, is of."""
    while isinstance(target, ast.Subscript):
        target = target.value
    return target


def is_entry(target: ast.AST) -> bool:
    """Whether it is an entry of a list of settings: PLAN["run_11"], PROFILES["tinylm"]["lr"]."""
    return isinstance(target, ast.Subscript) and first_name(innermost(target)) in LISTS_OF_SETTINGS


def first_name(expression: ast.AST) -> str:
    """Of a decorator, a name or call with dots: its beginning."""
    while isinstance(expression, (ast.Call, ast.Attribute)):
        expression = getattr(expression, "func", getattr(expression, "value", None))
    return getattr(expression, "id", "")


def calls_something(expression: ast.AST, makers: frozenset[str]) -> bool:
    """Whether evaluating it calls a function that may do more than to make an object."""
    if isinstance(expression, ast.Lambda):
        return any(calls_something(value, makers) for value in expression.args.defaults)
    if isinstance(expression, (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)):
        return True
    if isinstance(expression, ast.Call) and first_name(expression.func) not in makers - {"torch"}:
        return True  # torch's decorators make; of its functions some set something
    return any(calls_something(child, makers) for child in ast.iter_child_nodes(expression))


@functools.cache
def read_statements(source: str, settings_class: type | None = None) -> tuple[Statement, ...]:
    """The statements of a file, in order.

    The block that begins the run is taken apart: of its last statement, which does so, nothing is
    followed.

    Args:
        settings_class: of its fields and of what checks them nothing is read: the values count.
    """
    tree = ast.parse(source)
    if not {"__doc__", "getdoc"} & {*re.findall(r"\w+", source)}:  # there they are data
        tree = without_docstrings(tree)
    defined = (bound_by(n) for n in tree.body if not isinstance(n, (ast.Import, ast.ImportFrom)))
    makers = MAKERS.difference(*defined)
    registers = any(isinstance(n, FUNCTIONS) and n.name == "__init_subclass__"
                    for n in ast.walk(tree))  # fmt: skip
    of_harness = {alias.asname or alias.name for node in tree.body if is_of_harness(node)
                  for alias in node.names}  # fmt: skip
    nodes: list[tuple[ast.stmt, bool]] = []  # with whether it begins the run
    for node in tree.body:
        if isinstance(node, ast.If) and "__name__" in names_in(ast.walk(node.test)):
            nodes += [(inner, inner is node.body[-1]) for inner in node.body]
        elif isinstance(node, ast.ImportFrom) and is_of_harness(node):
            each = (ast.ImportFrom(node.module, [alias], 0) for alias in node.names)
            nodes += [(ast.copy_location(alone, node), False) for alone in each]
        else:
            nodes.append((node, False))
    found = []
    for node, begins in nodes:
        if isinstance(node, ast.ClassDef) and settings_class:
            leave_fields(node, settings_class)
        imports = isinstance(node, (ast.Import, ast.ImportFrom))
        always = begins or (does_more(node) if imports else does_something(node, makers))
        always |= registers and isinstance(node, ast.ClassDef)
        # What the run begins with is given to the harness by name; what is done to it is followed.
        calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)] if begins else []
        given = {arg.id for call in calls for arg in call.args if isinstance(arg, ast.Name)
                 and first_name(call) in of_harness}  # fmt: skip
        found.append(statement_of(node, always, left_out=given | of_harness if begins else None))
    return tuple(found)


def statement_of(node: ast.stmt, always: bool, left_out: set[str] | None = None) -> Statement:
    """See `Statement`; the names that are left out are not among what it mentions."""
    nodes = [*ast.walk(node)]
    return Statement(
        node,
        parts=tuple(hashes_of(node)),
        binds=frozenset(bound_by(node)),
        mentions=frozenset(names_in(nodes) - (left_out or set())),
        imports=tuple(imports_in(nodes)),
        always=always,
        declares=frozenset(name for n in nodes if isinstance(n, ast.Global)
                           for name in n.names),
        strings=frozenset(n.value for n in nodes if isinstance(n, ast.Constant)
                          and isinstance(n.value, str)),
    )  # fmt: skip


def imports_in(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, str]]:
    """The modules that code imports, each with a name that it takes from it, or `ALL`."""
    for n in nodes:
        if isinstance(n, ast.Import):
            yield from ((alias.name, ALL) for alias in n.names)
        elif isinstance(n, ast.ImportFrom) and not n.level:  # a package's own are all in the key
            for alias in n.names:
                yield n.module, alias.name
                yield f"{n.module}.{alias.name}", ALL
        elif isinstance(n, ast.Call) and n.args and isinstance(n.args[0], ast.Constant):
            if names_in(ast.walk(n.func)) & {"import_module", "__import__"}:
                yield str(n.args[0].value), ALL


def is_of_harness(node: ast.stmt) -> bool:
    """Whether it imports names from the harness: they count one by one, where they are used."""
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE


def does_more(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import may do more than to bind names: neither the harness's nor Python's own."""
    named = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or "."]
    return any(name.split(".")[0] not in {PACKAGE, *sys.stdlib_module_names} for name in named)


def leave_fields(node: ast.ClassDef, settings_class: type) -> None:
    """Takes the fields of a settings' class out of its syntax, and the methods that check them.

    Frozen, it can set nothing beside its fields where it checks them.
    """
    if node.name not in {base.__qualname__ for base in settings_class.__mro__}:
        return
    fields = {field.name for field in dataclasses.fields(settings_class)}

    def stays(part: ast.stmt) -> bool:
        if isinstance(part, ast.AnnAssign):
            return getattr(part.target, "id", "") not in fields
        decorators = {first_name(d) for d in getattr(part, "decorator_list", [])}
        checks = decorators & {"field_validator", "model_validator"}
        return not checks and getattr(part, "name", "") != "__post_init__"

    node.body = [part for part in node.body if stays(part)]


def hashes_of(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """The parts of a statement with hashes: of a class, each method is a part of its own."""
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            if isinstance(part, DEFINITIONS):
                yield f"{node.name}.{part.name}", digest(ast.dump(part))
        rest = [part for part in node.body if not isinstance(part, DEFINITIONS)]
        node = ast.ClassDef(node.name, node.bases, node.keywords, rest, node.decorator_list)
    target = getattr(node, "target", (getattr(node, "targets", None) or [None])[0])
    name = getattr(node, "name", getattr(target, "id", "the top level"))
    yield name, digest(ast.dump(node))
