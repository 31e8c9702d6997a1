"""Runs that are killed again and again end as the one that nobody disturbed, bit for bit.

    python bench/kills.py 100

Four forms of the method at toy sizes, two layers and two seeds each. The command is killed
(SIGKILL) at a moment drawn from start to end and given again until it is complete; then the next
one begins with an empty store, until so many kills are spent. Weights, figures, log and SAE-Bench's
files must be those of an undisturbed run, but for times. Prints a Markdown table; status 1 where
one differs. Needs Linux: the commands are forked from a process that has imported the libraries.
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiment import PLAN
from harness.machine import processor_name
from tests import forked, gemma_fixture
from tests.conftest import add_runs, copy_project, write_toy_model
from tests.test_golden import RUNS, SIZES, record_of
from tests.test_loop import SAVING_OFTEN

LONGEST = 300.0  # seconds that a command may take here


class Commands:
    """A folder with the code, a model and texts, in which runs are started, killed and read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hf_home = folder, folder / "hf"
        write_toy_model(folder / SIZES["model"])
        gemma_fixture.write_pile(folder / SIZES["training_text"])
        gemma_fixture.write_ag_news(folder / SIZES["probe_sets"][0])
        copy_project(folder)
        cores = f"import os\nos.sched_setaffinity(0, {os.sched_getaffinity(0)})\n"
        (folder / "saving_often.py").write_text(cores + SAVING_OFTEN)
        sizes = SIZES | {"seeds": (0, 1)}
        forms = {name.replace("run", "form"): PLAN[name] | sizes for name in RUNS}
        add_runs(folder / "experiment.py", forms)
        forked.start_server(self.hf_home)

    def start(self, form: str, killed_after: float = LONGEST) -> bool:
        """Gives the command, with the store that is there; False where it was killed.

        Raises:
            RuntimeError: it fails.
        """
        environment = forked.environment(
            self.hf_home, SAE_PROFILE="tinylm", XDG_CACHE_HOME=str(self.folder / "cache")
        )
        arguments = "saving_often.py", f"--out_dir={form}"
        process = forked.Forked(self.folder, *arguments, environment=environment)
        try:
            process.wait(killed_after)
        except subprocess.TimeoutExpired:
            process.kill()
        _, error = process.communicate(LONGEST)
        if process.returncode > 0:
            raise RuntimeError(f"{form} ended with status {process.returncode}: {error}")
        return process.returncode == 0

    def last_stage(self) -> str:
        """Where the command was last, as it has noted itself."""
        notes = list((self.folder / "cache").glob("parametric-sae/attempts/*.json"))
        return json.loads(notes[0].read_text())["stage"] if notes else "before its first note"

    def forget(self, form: str) -> None:
        """Empties the store and removes the run."""
        for folder in ("cache", form):
            shutil.rmtree(self.folder / folder, ignore_errors=True)


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The parts of two records of runs that are not the same."""
    return [part for part in expected if found[part] != expected[part]]


def measure(commands: Commands, form: str, n_kills: int, draw: random.Random) -> bool:
    """Kills runs of a form `n_kills` times and prints a row; whether all came out right."""
    began = time.monotonic()
    commands.start(form)
    seconds = time.monotonic() - began
    undisturbed = record_of(commands.folder / form)
    stages: collections.Counter[str] = collections.Counter()
    n_runs, wrong = 0, []
    while stages.total() < n_kills:
        commands.forget(form)
        complete = False
        while not complete:
            left = stages.total() < n_kills
            complete = commands.start(form, draw.uniform(0, seconds) if left else LONGEST)
            if not complete:
                stages[commands.last_stage()] += 1
        n_runs += 1
        wrong += differing(record_of(commands.folder / form), undisturbed)
    where = ", ".join(f"{stage} {n}" for stage, n in stages.most_common())
    said = f"all {n_runs} equal" if not wrong else f"differ in {', '.join(wrong)}"
    print(f"| {form} | {seconds:.1f} | {n_kills} | {where} | {said} |", flush=True)
    return not wrong


def main() -> int:
    n_kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    draw, right = random.Random(0), True
    print("| form | seconds undisturbed | kills | killed during | complete runs |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(Path(folder))
        for name in RUNS:
            form = name.replace("run", "form")
            right = measure(commands, form, n_kills // len(RUNS), draw) and right
            commands.forget(form)
    cores = len(os.sched_getaffinity(0))
    print(f"\n{processor_name()}, {cores} cores; {time.strftime('%Y-%m-%d')}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
