"""A run as a folder that AI-Scientist takes as a template: `python -m harness.template folder`.

Its experiment.py has the run's settings as defaults; the run itself is run_0 there, the baseline
that run_1 to run_5 are compared to. What is taken over as it stands lies in template/.
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from harness.errors import ExperimentError
from harness.reference import read_records
from harness.start import HERE
from harness.store import write_atomic, write_json
from harness.text_files import BUILT_IN
from harness.verdict import MIN_SEEDS, PRIMARY, mean, with_current_names

TAKEN = (  # that experiment.py needs, or its reader
    "sparse_ops.py", "harness", "requirements.txt", "constraints.txt", "LICENSE",
    "docs/method.md", "docs/metrics.md",
)  # fmt: skip
PROFILES = "PROFILES: dict[str, dict[str, Any]] = {%s: {}}  # the defaults above\n"
PLAN = """\
PLAN: dict[str, dict[str, Any]] = {
    # A run without a line here has the defaults above. They are run_0's, the baseline's.
    # "run_1": dict(description="what it tests", lr=1e-3),
}
"""


def make_template(run: Path, out: Path) -> dict[str, Any]:
    """Makes the folder from a complete run.

    Args:
        out: the folder; it must be new, or empty.
    Returns:
        the settings that its experiment.py has as defaults.
    Raises:
        ExperimentError: the run isn't complete, or is no baseline.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExperimentError(f"{out} must be a new folder, but holds something: name another")
    try:
        config, info = read_records(run)
    except ValueError as error:
        raise ExperimentError(
            f"a template needs the folder of a complete run as its baseline, but {error}: "
            "make template OUT=folder RUN=run_1"
        ) from error
    settings = as_defaults(run, with_current_names(config["settings"]))
    source = with_defaults((HERE / "experiment.py").read_text(encoding="utf-8"), settings)
    source = with_assigned(source, "PROFILES", PROFILES % literal(config["profile"]))
    source = with_assigned(source, "PLAN", PLAN)
    shutil.copytree(HERE / "template", out, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    write_atomic(out / "experiment.py", source)
    shutil.copyfile(HERE / "plot.py", out / "drawing.py")
    packages = {str(name).split("/")[0] for name in names_in(settings)} & {*BUILT_IN}
    for name in (*TAKEN, *sorted(packages)):
        copy(HERE / name, out / name)
    write_baseline(run, config | {"run": "run_0", "settings": settings}, info, out / "run_0")
    return settings


def as_defaults(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings as the runs after it have them: compared to run_0, with three seeds.

    Raises:
        ExperimentError: it has too few seeds for a verdict, or takes constants from another run.
    """
    if len(settings["seeds"]) < MIN_SEEDS:
        raise ExperimentError(
            f"a baseline must have {MIN_SEEDS} seeds or more, as a verdict needs them, but "
            f"{run.name} has {len(settings['seeds'])}: run it with seeds=THREE"
        )
    if settings.get("constants_from_run"):
        raise ExperimentError(
            f"a baseline must stand alone, but {run.name} takes constants from "
            f"{settings['constants_from_run']}: name another run"
        )

    def elsewhere(name: str) -> str:  # what lies here is found from the template, too
        there = name not in BUILT_IN and Path(name).exists()
        return str(Path(name).resolve()) if there else name

    texts = {name: elsewhere(settings[name]) for name in ("model", "training_text", "core_text")}
    own = {
        "seeds": settings["seeds"][:MIN_SEEDS],
        "probe_sets": [elsewhere(name) for name in settings["probe_sets"]],
        "compare_to": "run_0",
        "description": "defaults",
    }
    return settings | texts | own


def names_in(settings: dict[str, Any]) -> list[str]:
    """The texts, sets and the model that settings name."""
    fields = ("model", "training_text", "core_text")
    return [*(settings[field] for field in fields), *settings["probe_sets"]]


def literal(value: Any) -> str:
    """A setting's value as Python has it; of JSON's lists, tuples."""
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(literal, value))}{',' * (len(value) == 1)})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def with_defaults(source: str, settings: dict[str, Any]) -> str:
    """The text of experiment.py with other defaults in its Settings, where they differ.

    Raises:
        ExperimentError: it has no such setting any more.
    """
    (made,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "Settings"]
    fields = {node.target.id: node.value for node in made.body if isinstance(node, ast.AnnAssign)}
    if gone := settings.keys() - fields.keys():
        raise ExperimentError(
            f"experiment.py has no setting {', '.join(sorted(gone))}, which the run has: make the "
            "template from the commit of the run, or run it again"
        )
    lines = source.splitlines(keepends=True)
    for field, value in settings.items():
        node, new = fields[field], literal(value)
        if literal(ast.literal_eval(node)) != new:
            assert node.lineno == node.end_lineno, field
            line = lines[node.lineno - 1].encode()
            line = line[: node.col_offset] + new.encode() + line[node.end_col_offset :]
            lines[node.lineno - 1] = line.decode()
    return "".join(lines)


def with_assigned(source: str, name: str, text: str) -> str:
    """The text of experiment.py with another assignment of a global: whole lines."""
    (node,) = [
        node for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == name
    ]  # fmt: skip
    lines = source.splitlines(keepends=True)
    lines[node.lineno - 1 : node.end_lineno] = [text]
    return "".join(lines)


def copy(source: Path, to: Path) -> None:
    """A file or a folder, without what Python has compiled, and runs in a profile's folder."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if name.startswith(("__pycache__", "run_"))
                and (Path(folder) / name).is_dir()}  # fmt: skip

    to.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, to, ignore=left_out)
    else:
        shutil.copyfile(source, to)


def write_baseline(run: Path, config: dict, info: dict, folder: Path) -> None:
    """The run's records under the names of now, its code and its log; no SAEs, no other files.

    By its code the runs after it are known to be of its method, or not.
    """
    renamed = {
        entry: {part: with_current_names(figures) for part, figures in content.items()}
        for entry, content in info.items()
    }
    folder.mkdir()
    for name in ("experiment.py", "train_log.jsonl", "train_log.jsonl.xz"):
        if (run / name).exists():
            shutil.copy(run / name, folder)
    write_json(folder / "config.json", config)
    write_json(folder / "final_info.json", renamed)


def main(arguments: list[str] | None = None) -> None:
    """The command; a refusal is one sentence, with status 1."""
    parser = argparse.ArgumentParser(prog="python -m harness.template", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to be made")
    parser.add_argument("--run", type=Path, default=HERE / "run_1", help="the baseline: a run")
    given = parser.parse_args(arguments)
    try:
        make_template(given.run, given.out)
    except ExperimentError as error:
        sys.exit(str(error))
    verdict = json.loads((given.out / "run_0" / "final_info.json").read_text())["verdict"]
    primary, name = mean(verdict["final_info_dict"][PRIMARY]), given.out.resolve().name
    print(f"{given.out}: its run_0 is {given.run.name}, {PRIMARY} {primary:.4f}\n"
          "AI-Scientist calls `python`, which has to be the one of this project:\n"
          f"cp -r {given.out} AI-Scientist/templates/{name}\n"
          f"PATH={Path(sys.executable).parent}:$PATH /its/own/python launch_scientist.py "
          f"--experiment {name}")  # fmt: skip


if __name__ == "__main__":
    main()
