"""The run that another is compared to, or takes constants from: found, read, and checked."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from harness.curves import ASIDE, method_code, on_one_curve
from harness.errors import ExperimentError
from harness.interfaces import RunLike
from harness.verdict import (
    OF_EVALUATION,
    PRIMARY,
    Comparison,
    Curve,
    compare_records,
    mean,
    same_l0,
    verdict,
    with_current_names,
)

Records = tuple[dict[str, Any], dict[str, Any]]  # config.json and final_info.json


def complete_folder(name: str, out_dir: Path, runs: Path) -> Path | None:
    """The folder of a complete run that another names; None where there is none.

    A run that names itself means the one that was set aside for it last.

    Args:
        out_dir: of the run that names it. runs: the folder where both stand.
    """
    folder = runs / name
    folders = [folder]
    if folder.resolve() == out_dir.resolve():
        numbers = (re.fullmatch(rf"{re.escape(folder.name)}\.(\d+)", path.name)
                   for path in folder.parent.glob("*"))  # fmt: skip
        aside = sorted((int(match[1]) for match in numbers if match), reverse=True)
        folders += [folder.with_name(f"{folder.name}.{number}") for number in aside]
    return next((f for f in folders if (f / "final_info.json").exists()), None)


def read_records(folder: Path) -> Records:
    """A complete run's config.json and final_info.json.

    Raises:
        ValueError: one is damaged: which, and in what.
    """
    found = []
    for name in ("config.json", "final_info.json"):
        try:
            record = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder / name} can't be read ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{folder / name} holds no JSON object")
        found.append(record)
    config, info = found
    if not isinstance(config.get("settings"), dict):
        raise ValueError(f"{folder / 'config.json'} holds no settings")
    try:
        per_seed = lists_of(info)
        values = [per_seed[name] for name in ("seed", PRIMARY, "l0")]
        whole = len({len(column) for column in values}) == 1 and len(values[0]) > 0
        whole = whole and all(math.isfinite(value) for column in values for value in column)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f'{folder / "final_info.json"} lacks a seed, {PRIMARY} or l0 under "verdict"'
        )
    return config, info


def lists_of(info: dict[str, Any]) -> dict[str, list[float]]:
    """The lists per seed of a final_info.json: seed, the primary metric, L0."""
    return with_current_names(info["verdict"]["final_info_dict"])


def check_references(run: RunLike, config: dict[str, Any]) -> None:
    """Looks at the runs that the settings name, before anything is paid for.

    Prints a line where there will be no verdict.

    Args:
        config: of this run, as config.json will hold it.
    Raises:
        ExperimentError: the records of one are damaged, or its constants are of another model,
            layer or text.
    """
    settings = run.settings
    for field in ("constants_from_run", "compare_to"):
        name = getattr(settings, field)
        folder = name and complete_folder(name, run.out_dir, run.runs)
        if not folder:
            if field == "compare_to":
                print(f"no verdict to come: there is no complete {name} in {run.runs}")
            continue
        try:
            theirs, _ = read_records(folder)
        except ValueError as error:
            raise ExperimentError(
                f"{field}={getattr(settings, field)!r} needs the records of a complete run, but "
                f"{error}: run it again, or name another at the top of experiment.py"
            ) from error
        compared = compare_records(config, theirs)
        if field == "compare_to" and compared.unlike:
            print(f"no verdict to come: not comparable with {folder.name} ({compared.reasons()})")
        if field == "constants_from_run":
            check_constants(compared, folder.name)


def check_constants(compared: Comparison, name: str) -> None:
    """ExperimentError where a run's constants are those of another model, text or precision."""
    aside = (*OF_EVALUATION, "layers")  # a layer that it lacks is named by `final_values`
    if reasons := compared.reasons(but=aside):
        raise ExperimentError(
            f"constants_from_run={name!r} must be a run like this one, but differs in {reasons}: "
            "run it again like this one, or name another"
        )
    if unknown := [fact for fact in compared.unknown if not fact.startswith(aside)]:
        print(f"constants_from_run: {name} may not be a run like this one: not both record "
              f"{', '.join(unknown)}")  # fmt: skip


def verdict_of(
    out_dir: Path, runs: Path, config: dict[str, Any], per_seed: dict[str, list[float]]
) -> tuple[str, dict[str, float]]:
    """The verdict of a run, see `harness.verdict.verdict`.

    Args:
        out_dir: its folder. runs: the folder where those stand that it is held against.
        config: its config.json. per_seed: its seeds, primary metric and L0.
    """
    name = config["settings"]["compare_to"]
    folder = complete_folder(name, out_dir, runs)
    if folder is None:
        return verdict(per_seed, None, f"no complete {name}")
    try:
        theirs, info = read_records(folder)
    except ValueError as error:  # it became so during the run
        return verdict(per_seed, None, str(error))
    at = mean(lists_of(info)["l0"])
    near = same_l0(mean(per_seed["l0"]), at)
    curve = None if near else reference_curve(out_dir, runs, config, folder)
    compared = compare_records(config, theirs)
    return verdict(per_seed, lists_of(info), folder.name, compared, curve)


def reference_curve(out_dir: Path, runs: Path, config: dict[str, Any], reference: Path) -> Curve:
    """The curve of a run's reference: the complete runs beside it of the same settings and code.

    Args:
        out_dir, runs, config: see `verdict_of`. reference: the reference's folder.
    """
    theirs, info = read_records(reference)
    code = method_code(reference, theirs)
    if on_one_curve(config, theirs) and method_code(out_dir, config) == code:
        return Curve({}, f"on {reference.name}'s own curve")
    points, edited = {reference.name: lists_of(info)}, []
    these = out_dir.resolve(), reference.resolve()
    for folder in sorted(runs.glob("run_*")):
        if ASIDE.search(folder.name) or folder.resolve() in these:
            continue
        try:
            other, info = read_records(folder)
        except ValueError:  # unfinished, or damaged: no point of the curve
            continue
        if not on_one_curve(other, theirs):
            continue
        if method_code(folder, other) == code:
            points[folder.name] = lists_of(info)
        else:
            edited.append(folder.name)
    if edited and len(points) == 1:
        return Curve(
            {}, f"{', '.join(edited)} ran another experiment.py than {reference.name}, so they are "
            f"not its curve: run {reference.name} again, or compare to one of them"
        )  # fmt: skip
    return Curve(points)
