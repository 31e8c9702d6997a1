"""The shape of the project: imports go down alone, rooms and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import harness
from tests.conftest import ROOT

# From the ground up: a room imports only from rooms below its own line.
FLOORS = (
    ("errors", "start", "observation", "signals", "witness", "partials", "verdict", "interfaces",
     "settings", "curves", "reference", "generators", "object_parts", "object_state", "report",
     "ranks"),
    ("run_records", "tables", "drawing", "figures", "training_figures"),
    ("reads", "console", "machine"),
    ("ledger", "gpu"),
    ("store",),
    ("checkpoints", "rehearsal", "command", "text_files", "text", "probe_sets", "syntax",
     "identity", "isolation", "call_graph", "steering", "tokenizer"),
    ("packaged_model", "model_checks", "text_checks", "tracking"),
    ("language_model",),
    ("compiled_model",),
    ("fused_model", "fingerprint", "preflight"),
    ("evaluation.logit_lens", "evaluation.features", "evaluation.shared_forward",
     "evaluation.probe_texts", "evaluation.probe_features"),
    ("evaluation.core", "evaluation.export", "evaluation.probing",
     "evaluation.estimate", "evaluation.stock", "evaluation.extra"),
    ("training", "peers", "steps", "provenance", "records"),
    ("startup", "model_card", "privacy", "sparsify_form", "publish", "plans", "template"),
)
MAX_LINES = {"experiment.py": 800, "plot.py": 500}
REASON = "one piece"  # with this in its docstring a function may have more than 60 lines


def trees(*patterns: str) -> dict[Path, ast.Module]:
    files = sorted(file for pattern in patterns for file in ROOT.glob(pattern))
    return {file: ast.parse(file.read_text()) for file in files}


def imported(tree: ast.Module) -> set[str]:
    """The modules that a file imports, anywhere in it, and what it takes from the harness."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            found.add(node.module)
            if node.module == "harness":
                found |= {f"harness.{alias.name}" for alias in node.names}
    return found


ROOMS = {
    ".".join(file.relative_to(ROOT / "harness").with_suffix("").parts): tree
    for file, tree in trees("harness/*.py", "harness/evaluation/*.py").items()
}


def test_every_room_stands_on_a_floor_and_on_the_map() -> None:
    rooms = {room for room in ROOMS if not room.endswith("__init__")}
    assert rooms == {room for floor in FLOORS for room in floor}
    for room in rooms:
        assert f"    {room.split('.')[0]}" in harness.__doc__, room


@pytest.mark.parametrize("room", [room for floor in FLOORS for room in floor])
def test_imports_go_down_alone(room: str) -> None:
    at = next(n for n, floor in enumerate(FLOORS) if room in floor)
    below = {f"harness.{name}" for floor in FLOORS[:at] for name in floor}
    # Within a floor in the order of its line: still no circle.
    below |= {f"harness.{name}" for name in FLOORS[at][: FLOORS[at].index(room)]}
    names = imported(ROOMS[room])
    ours = {name for name in names if name.startswith("harness.")}
    assert ours <= below | {"harness.evaluation"}, ours - below
    assert not names & {"experiment", "sparse_ops", "plot", "bench", "tests"}


def test_the_map_imports_nothing_and_the_ground_needs_no_torch() -> None:
    assert not imported(ROOMS["__init__"]) - {"__future__"}
    rooms = "harness, harness.report, harness.errors, harness.figures"
    code = f"import sys, {rooms}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_sparse_ops_knows_torch_alone() -> None:
    (tree,) = trees("sparse_ops.py").values()
    roots = {name.split(".")[0] for name in imported(tree)}
    assert roots <= {"torch", "numpy"} | sys.stdlib_module_names


def test_the_public_face_is_what_experiment_uses() -> None:
    (tree,) = trees("experiment.py").values()
    used = {
        f"{node.module.removeprefix('harness.')}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("harness.")
        for alias in node.names
    }
    listed = {f"{room}.{name}" for room, names in harness.PUBLIC.items() for name in names}
    assert used == listed
    assert len(listed) <= 27


def test_uv_and_pip_install_the_same_versions() -> None:
    lines = [*(ROOT / "requirements.txt").open(), *(ROOT / "constraints.txt").open()]
    named = [line.strip() for line in lines if line.strip() and line[0] not in "-#"]
    pinned = dict(line.split("==") for line in named if "==" in line)
    required = {name: pinned[name] for name in named if "==" not in name}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    assert dict(line.split("==") for line in wanted) == required
    for line in project["tool"]["uv"]["constraint-dependencies"]:
        name, version = line.split("==")
        assert pinned[name] == version


def test_no_class_of_the_harness_is_a_base() -> None:
    classes = {
        node.name for tree in ROOMS.values() for node in tree.body if isinstance(node, ast.ClassDef)
    }
    classes -= {"ExperimentError"}  # errors may be caught by kind
    for file, tree in trees("*.py", "harness/**/*.py", "bench/*.py").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
                assert not bases & classes, (file, node.name)


def test_files_and_functions_stay_small() -> None:
    for file, tree in trees("*.py", "harness/**/*.py").items():
        lines = file.read_text().splitlines()
        assert len(lines) <= MAX_LINES.get(file.name, 450), (file, len(lines))
        assert max(map(len, lines)) <= 100, file
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                assert REASON in (ast.get_docstring(node) or ""), (file, node.name)
