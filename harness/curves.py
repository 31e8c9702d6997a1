"""Runs of one method at several L0: a curve, and which runs are on it. No torch."""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

from harness.verdict import LISTS_OF_SETTINGS, compare_records, part_of, with_current_names

ASIDE = re.compile(r"\.\d+$")  # run_3.1 is a complete run_3 that was set aside
OF_MACHINE = ("processor", "device", "version of ")  # may differ along a curve


def moves_l0(config: dict[str, Any]) -> set[str]:
    """The settings of a run that set its L0, and so may differ along a curve.

    With a selection that is k_min, and so where γ holds L0 at it. Without either it is the
    penalty's weight, where it is a number.
    A trainer's coefficient is a setting whose name ends so.
    """
    settings = with_current_names(part_of(config, "settings"))
    selects = settings.get("curriculum", True) and settings.get("loss_variant") != "as_written"
    selects = selects and settings.get("activation") != "relu"
    found = {"k_min"} if selects or settings.get("gamma") is None else {"gamma"}
    return found | {name for name in settings if name.endswith("coefficient")}


def on_one_curve(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two runs' settings, by their config.json, differ in nothing but what moves L0.

    Whether they ran the same code is `method_code`.
    """
    compared = compare_records(mine, theirs)
    moving = moves_l0(mine) & moves_l0(theirs)
    varied = [name for name in compared.varied if not name.startswith(OF_MACHINE)]
    return not compared.unlike and moving.issuperset(varied)


def method_code(folder: Path, config: dict[str, Any]) -> str:
    """Stands for the code that a run trained by: its experiment.py, and what that imports.

    Without comments, docstrings, PLAN, PROFILES and the settings' defaults, which config.json
    holds the outcome of, and without the harness. The plain text's where it can't be parsed; "" for
    a folder without experiment.py.
    """
    try:
        text = (folder / "experiment.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    modules = {
        file: digest
        for file, digest in part_of(config, "sha256").items()
        if file.endswith(".py") and not file.startswith(("harness", "experiment.py"))
    }
    return hashlib.sha256(f"{bare_code(text)} {sorted(modules.items())}".encode()).hexdigest()


@functools.lru_cache(maxsize=64)
def bare_code(text: str) -> str:
    """A module's syntax tree as text, without what `method_code` leaves out."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return text
    tree.body = [line for line in tree.body if not assigned(line) & LISTS_OF_SETTINGS]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        if isinstance(node, ast.ClassDef) and node.name == "Settings":
            for line in body:
                if isinstance(line, ast.AnnAssign):
                    line.value = None
        node.body = [line for line in body if not is_text(line)]
    return ast.dump(tree)


def assigned(line: ast.stmt) -> set[str]:
    """The names that a statement gives a value to, or to an entry of: PLAN["run_11"]."""
    targets = [*(getattr(line, "targets", None) or [getattr(line, "target", None)])]
    for at, target in enumerate(targets):
        while isinstance(target, ast.Subscript):
            targets[at] = target = target.value
    return {target.id for target in targets if isinstance(target, ast.Name)}


def is_text(line: ast.stmt) -> bool:
    """Whether a statement is a string alone: a docstring."""
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
