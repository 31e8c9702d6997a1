"""The runs of a plan: which are meant, which come first, and how they stand."""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.errors import ExperimentError
from harness.reference import complete_folder, lists_of, read_records
from harness.settings import choose_profile, settings_of_run
from harness.verdict import PRIMARY, compare_records, mean, verdict

Ended = dict[str, tuple[str, float | None]]  # by run, how it ended and in how many minutes


@dataclasses.dataclass(frozen=True)
class Planned:
    """The runs that are meant.

    Attributes:
        folder: where they lie. runs: all, in the plan's order. complete: those that are.
        needs: by each other run, those of them that come before it.
    """

    folder: Path
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
            rows.append([run, how, shown, *(standing(self.folder / run, self.profile) or "--")])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def planned(experiment: Any, folder: Path, patterns: Iterable[str]) -> Planned:
    """The runs that patterns name, none or "all" all; says which are complete.

    Ends the process, with a sentence, where one can't be run.

    Args:
        experiment: what holds Settings, PROFILES and PLAN. folder: where runs lie.
    """
    plan = experiment.PLAN
    try:
        profile = choose_profile(experiment.PROFILES, folder, folder)
        runs = chosen_runs(plan, patterns)
        complete = [run for run in runs if standing(folder / run, profile)]
        left = [run for run in runs if run not in complete]
        needs = needed_runs(left, experiment.Settings, experiment.PROFILES[profile], plan)
    except ExperimentError as error:
        sys.exit(str(error))
    print(f"profile: {profile}")
    for run in complete:
        print(f"{run} is complete, and stays (make run OUT={run} runs it again)")
    done: Ended = {run: ("complete before", None) for run in complete}
    return Planned(folder, profile, runs, done, needs)


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
    reference = complete_folder(config["settings"].get("compare_to", ""), folder, folder.parent)
    try:
        if reference is None or reference == folder:
            return primary, "-"
        theirs, their_info = read_records(reference)
    except ValueError:
        return primary, "-"
    compared = compare_records(config, theirs)
    said, numbers = verdict(lists_of(info), lists_of(their_info), reference.name, compared)
    word = said.split(" (")[0]
    found = [f"{numbers[key]:+.4f}" for key in ("difference", "ci95_low", "ci95_high")
             if key in numbers and word != "not comparable"]  # fmt: skip
    return primary, f"{word} ({found[0]} [{found[1]}, {found[2]}])" if found else word
