"""The runs of a plan: which are meant, which come first, and how they stand."""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.errors import ExperimentError
from harness.reference import complete_folder, lists_of, read_records, verdict_of
from harness.settings import choose_profile, settings_of_run
from harness.verdict import PRIMARY, mean

Ended = dict[str, tuple[str, float | None]]  # by run, how it ended and in how many minutes


@dataclasses.dataclass(frozen=True)
class Planned:
    """The runs that are meant.

    Attributes:
        home: where experiment.py lies. runs: the folders of all, from there, in the plan's order.
        complete: those that are. needs: by each other run, those of them that come before it.
    """

    home: Path
    profile: str
    runs: list[str]
    complete: Ended
    needs: dict[str, set[str]]

    def table(self, ended: Ended) -> str:
        """How all have ended, and how they stand: a line each below a heading."""
        rows = [["run", "status", "minutes", PRIMARY, "verdict"]]
        for run in self.runs:
            how, minutes = ended[run]
            shown = "-" if minutes is None else f"{minutes:.1f}"
            rows.append([run, how, shown, *(standing(self.home / run, self.profile) or "--")])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def planned(
    experiment: Any, home: Path, patterns: Iterable[str], otherwise: str | None = None
) -> Planned:
    """The runs that patterns name, none or "all" all; says which are complete.

    Ends the process, with a sentence, where one can't be run.

    Args:
        experiment: what holds Settings, PROFILES and PLAN. home: where it lies.
        patterns: of names in PLAN, with the folder that the runs lie in where it isn't home.
        otherwise: the profile where nothing says it, instead of the one by this machine.
    """
    plan = experiment.PLAN
    try:
        folder, patterns = folder_of(patterns)
        profile = choose_profile(experiment.PROFILES, home / folder, home, otherwise)
        runs = chosen_runs(plan, patterns)
        complete = [run for run in runs if standing(home / folder / run, profile)]
        left = [run for run in runs if run not in complete]
        needs = needed_runs(left, experiment.Settings, experiment.PROFILES[profile], plan)
    except ExperimentError as error:
        sys.exit(str(error))
    print(f"profile: {profile}")
    at = {run: str(folder / run) for run in runs}
    for run in complete:
        print(f"{at[run]} is complete, and stays (make run OUT={at[run]} runs it again)")
    done: Ended = {at[run]: ("complete before", None) for run in complete}
    before = {at[run]: {at[other] for other in others} for run, others in needs.items()}
    return Planned(home, profile, [*at.values()], done, before)


def folder_of(patterns: Iterable[str]) -> tuple[Path, list[str]]:
    """The folder that patterns such as smollm2/run_* name, and what stands behind it in each.

    Raises:
        ExperimentError: they name several: their runs are of one profile, and compared there.
    """
    paths = [Path(pattern) for pattern in patterns]
    folders = list(dict.fromkeys(path.parent for path in paths)) or [Path()]
    if len(folders) > 1:
        raise ExperimentError(
            f"the runs of a plan must lie in one folder, but these lie in "
            f"{' and '.join(map(str, folders))}: give a command for each"
        )
    return folders[0], [path.name for path in paths]


def chosen_runs(plan: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The runs of a plan that match a pattern, in its order; none or "all" stands for all.

    Raises:
        ExperimentError: one matches none.
    """
    names, patterns = list(plan), ["*" if p == "all" else p for p in patterns] or ["*"]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ExperimentError(
                f"PLAN has no run {pattern!r}: name one of {', '.join(names) or 'those to come'}"
            )
    return [run for run in names if any(fnmatch.fnmatchcase(run, p) for p in patterns)]


def needed_runs(
    runs: list[str], make: type, profile: dict[str, Any], plan: dict[str, dict[str, Any]]
) -> dict[str, set[str]]:
    """By run, those among them that it takes constants from or is compared to.

    What would close a circle does not count.

    Raises:
        ExperimentError: a setting can't be, see `settings_of_run`.
    """
    settings = {run: settings_of_run(run, make, profile, plan) for run in runs}
    needs: dict[str, set[str]] = {run: set() for run in runs}

    def leads_to(run: str, other: str) -> bool:
        return run == other or any(leads_to(needed, other) for needed in needs[run])

    for field in ("constants_from_run", "compare_to"):
        for run in runs:
            named = getattr(settings[run], field)
            if named in needs and not leads_to(named, run):
                needs[run].add(named)
    return needs


def standing(folder: Path, profile: str) -> tuple[str, str] | None:
    """The primary metric and the verdict of a complete run of the profile; None of no such."""
    try:
        config, info = read_records(folder)
    except ValueError:
        return None
    if config.get("profile") != profile:
        return None
    primary = f"{mean(lists_of(info)[PRIMARY]):.4f}"
    named = config["settings"].get("compare_to", "")
    if complete_folder(named, folder, folder.parent) in (None, folder):
        return primary, "-"
    said, numbers = verdict_of(folder, folder.parent, config, lists_of(info))
    word = said.split(" (")[0]
    found = [f"{numbers[key]:+.4f}" for key in ("difference", "ci95_low", "ci95_high")
             if key in numbers and word != "not comparable"]  # fmt: skip
    return primary, f"{word} ({found[0]} [{found[1]}, {found[2]}])" if found else word
