"""What a rerun costs: the default tinylm run with an empty store, then again after edits.

    python bench/loop.py

Copies the code into a temporary folder with a store of its own, runs the command as a user does,
edits, runs it again, and prints a Markdown table: seconds by the clock, and the ratio to the first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness.machine import n_cores, processor_name

STAGES = ("harvest", "training", "core", "sparse_probing")
EDITS = (  # what a rerun follows: its name, what is replaced, and by what
    ("nothing", "", ""),
    ("the records", 'f"untrained_{metric}"', 'f"untrained_SAE_{metric}"'),
    ("sparse probing", "for k in (None, *ks):", "for k in [None, *ks]:"),
    ("core evaluation", "= core.calculate_misc_metrics(features)",
     "= {**core.calculate_misc_metrics(features)}"),
    ("the loss", "residual_BD.pow(2).mean()", "residual_BD.pow(2).mean() * 1.001"),
)


def run(folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds of the command by the clock, of its stages by its own count, and its memory in GB."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "SAE_PROFILE": "tinylm"}
    began = time.monotonic()
    output = subprocess.run(
        [sys.executable, "experiment.py", "--out_dir=run_try"],
        cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    seconds = time.monotonic() - began
    info = json.loads((folder / "run_try" / "final_info.json").read_text())
    means = next(iter(info.values()))["means"]
    stages = {stage: means[f"seconds_{stage}"] for stage in STAGES}
    peak = float(output.split("peak_memory_gb: ")[1].split()[0])
    return seconds, stages | {"peak memory, GB": peak}


def measure() -> Iterator[tuple[str, float, dict[str, float]]]:
    """Runs the command again and again: what it follows, its seconds, those of its stages."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("experiment.py", "sparse_ops.py", "constraints.txt"):
            shutil.copy(ROOT / file, folder)
        for package in ("harness", "tinylm"):
            shutil.copytree(ROOT / package, folder / package)
        yield "the first, with an empty store", *run(folder)
        for what, old, new in EDITS:
            path = folder / "experiment.py"
            text = path.read_text()
            assert not old or text.count(old) == 1, old
            path.write_text(text.replace(old, new) if old else text)
            yield f"after an edit of {what}", *run(folder)


def main() -> None:
    first = None
    for what, seconds, stages in measure():
        if first is None:
            first = seconds
            print(f"| run | seconds | times as fast as the first | {' | '.join(stages)} |")
            print("| --- | --- | --- |" + " --- |" * len(stages))
        figures = " | ".join(f"{value:.3g}" for value in stages.values())
        print(f"| {what} | {seconds:.0f} | {first / seconds:.1f} | {figures} |", flush=True)
    print(f"\n{processor_name()}, {n_cores()} cores; "
          f"{time.strftime('%Y-%m-%d')}. Stages that are kept show what they once took, "
          "but for the evaluations'.")  # fmt: skip


if __name__ == "__main__":
    main()
