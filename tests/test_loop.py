"""The command as a program drives it, at toy sizes: killed, edited, starved, started twice."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import forked, gemma_fixture
from tests.conftest import add_runs, copy_project, edit

PILE, NEWS = "monology/pile-uncopyrighted", "fancyzhx/ag_news"
SIZES = dict(
    layers=(0, 2), context=32, training_text=PILE, core_text=PILE, d_sae=64, k_min=4,
    training_tokens=40_960, batch=128, buffer_tokens=4096, harvest_contexts=8,
    dead_feature_window=1024, log_every=8, core_prompts=4, core_reconstruction_batches=2,
    core_sparsity_batches=4,
    probe_sets=(NEWS,), probe_ks=(1, 2, 5), probe_train=40, probe_test=20, probe_llm_batch=8,
    probe_sae_batch=15,
)  # fmt: skip
# experiment.py as a user starts it, but for how often its training saves itself.
SAVING_OFTEN = """
import functools, runpy
import harness.start
from harness.checkpoints import Checkpoints

Checkpoints.__init__ = functools.partialmethod(Checkpoints.__init__, every=0.0, share=1e9)
runpy.run_path("experiment.py", run_name="__main__")
"""
LIMIT = 120.0  # seconds that a driver waits; 7,200 in earnest


class Driver:
    """A folder with the code and all that it reads, and a program that runs the command in it."""

    def __init__(self, folder: Path, model: Path, hf_home: Path) -> None:
        self.folder, self.hf_home = folder, hf_home
        gemma_fixture.write_pile(folder / PILE)
        gemma_fixture.write_ag_news(folder / NEWS)
        copy_project(folder)
        (folder / "saving_often.py").write_text(SAVING_OFTEN)
        sizes = SIZES | {"model": str(model)}
        add_runs(folder / "experiment.py", dict.fromkeys(("run_a", "run_b", "run_c"), sizes))

    def edit(self, file: str, old: str, new: str) -> None:
        edit(self.folder / file, old, new)

    def start(self, run: str, cache: str | Path = "cache") -> forked.Forked:
        environment = forked.environment(
            self.hf_home, SAE_PROFILE="tinylm", XDG_CACHE_HOME=str(self.folder / cache)
        )
        return forked.Forked(
            self.folder, "saving_often.py", f"--out_dir={run}", environment=environment
        )

    def finish(self, process: forked.Forked, run: str) -> tuple[int, str, str]:
        """Exit status, output, and what a driver shows of standard error.

        See docs/operations.md, A program that drives the experiment.
        """
        out, error = process.communicate(LIMIT)
        if process.returncode:
            shutil.rmtree(self.folder / run, ignore_errors=True)
        return process.returncode, out, error[-1500:]

    def run(self, run: str, cache: str | Path = "cache") -> tuple[int, str, str]:
        return self.finish(self.start(run, cache), run)

    def weights(self, run: str) -> dict[str, str]:
        files = sorted((self.folder / run / "sae").rglob("*.safetensors"))
        assert len(files) == 2
        return {str(f.parent.name + f.parent.parent.name): sha256(f) for f in files}

    def figures(self, run: str) -> dict[str, dict[str, float]]:
        """The means, but for times."""
        info = json.loads((self.folder / run / "final_info.json").read_text())
        return {
            key: {m: v for m, v in entry["means"].items() if not m.startswith("seconds")}
            for key, entry in info.items()
        }

    def log_lines(self, run: str) -> list[dict]:
        lines = (self.folder / run / "train_log.jsonl").read_text().splitlines()
        return [
            {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
            for line in lines
        ]

    def results(self, run: str) -> tuple:
        return self.weights(run), self.figures(run), self.log_lines(run)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def driver(toy_model: Path, hf_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """With run_a complete, in "cache", after `seconds`; `undisturbed` is what it left."""
    made = Driver(tmp_path_factory.mktemp("driver"), toy_model, hf_home)
    began = time.monotonic()
    status, out, error = made.run("run_a")
    made.seconds = time.monotonic() - began
    assert status == 0 and error == "", error
    assert "rehearsal: the whole run in miniature passed" in out
    made.undisturbed = made.results("run_a")
    return made


def test_killed_at_ten_moments_the_run_ends_as_if_it_had_not_been(driver: Driver) -> None:
    """Weights, figures and log are those of the run that nobody disturbed, bit for bit."""
    draw = random.Random(0)
    shares = (draw.uniform(0.1, 0.95) for _ in range(10))
    moments = sorted(share * driver.seconds for share in shares)  # the first one kills
    said = []
    for moment in moments:
        process = driver.start("run_b", "killed")
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
        _, out, error = driver.finish(process, "run_b")
        said.append(out + error)
    status, out, _ = driver.run("run_b", "killed")
    assert status == 0
    assert driver.results("run_b") == driver.undisturbed
    told = "".join(said)
    assert re.search(r"the last attempt at run_b, .* ended without a word.*: killed during ", told)
    assert re.search(r"training: (goes on at \d+%|kept)", told)


def test_an_edit_costs_what_it_changed(driver: Driver) -> None:
    """An edit of the records repeats nothing, one of the evaluation no training, one of the loss
    what hangs on it; and the output says what is reused, and why not."""
    experiment = (driver.folder / "experiment.py").read_text()
    status, out, _ = driver.run("run_a")
    assert status == 0 and "holds a complete run: set aside as" in out
    for stage in ("rehearsal", "training", "core evaluation", "sparse probing"):
        assert re.search(f"^{stage}: kept, as .* not repeated$", out, re.MULTILINE), stage
    assert driver.weights("run_a") == driver.weights("run_a.1")
    config = json.loads((driver.folder / "run_a" / "config.json").read_text())
    assert {"training", "core evaluation", "sparse probing"} <= set(config["reused"])

    driver.edit("experiment.py", 'f"untrained_{metric}"', 'f"untrained_SAE_{metric}"')
    status, out, error = driver.run("run_a")
    assert status == 0 and "untrained_SAE_l0" in driver.figures("run_a")["layer_0"], error
    assert "rehearsal: the whole run" in out and "sparse probing: kept" in out

    driver.edit("experiment.py", "for k in (None, *ks):", "for k in [None, *ks]:")
    status, out, _ = driver.run("run_a")
    assert status == 0 and "training: kept" in out and "core evaluation: kept" in out
    assert "sparse probing: kept" not in out

    driver.edit("experiment.py", "residual_BD.pow(2).mean()", "residual_BD.abs().mean()")
    status, out, _ = driver.run("run_a")
    assert status == 0
    assert "training: anew, as this differs from the last attempt: code of contrastive_loss" in out
    assert driver.weights("run_a") != driver.weights("run_a.1")
    assert "language model probes: kept" in out
    (driver.folder / "experiment.py").write_text(experiment)


@pytest.mark.parametrize("stage", ["probe", "figures_of"])
def test_an_edit_that_breaks_the_end_is_found_at_the_beginning(driver: Driver, stage: str) -> None:
    experiment = (driver.folder / "experiment.py").read_text()
    (function,) = [
        node for node in ast.parse(experiment).body if getattr(node, "name", None) == stage
    ]
    lines = experiment.splitlines(keepends=True)
    lines.insert(function.body[1].lineno - 1, "    print(undefined_name)\n")
    (driver.folder / "experiment.py").write_text("".join(lines))
    status, out, error = driver.run("run_c")
    (driver.folder / "experiment.py").write_text(experiment)
    assert status == 1 and not re.search("^train", out, re.MULTILINE)
    assert not (driver.folder / "run_c").exists()
    first, at, cause, remedy, log = error.strip().splitlines()
    assert first.startswith("experiment.py failed during rehearsal: ")
    assert re.match(rf"at: experiment.py, line \d+, in {stage}: print\(undefined_name\)", at)
    assert cause == "cause: NameError: name 'undefined_name' is not defined"
    assert remedy.startswith("to do: ")
    assert "Traceback" in Path(log.removeprefix("log: ")).read_text()


def test_two_at_once(driver: Driver) -> None:
    """On one run_i: the second says so. On one cache, with one training: both come out right."""
    first = driver.start("run_b", "shared")
    time.sleep(0.2)
    second = driver.start("run_b", "shared")
    third = driver.start("run_c", "shared")
    results = [process.communicate(LIMIT) for process in (first, second, third)]
    statuses = [process.returncode for process in (first, second, third)]
    assert sorted(statuses[:2]) == [0, 1] and statuses[2] == 0, results
    (_, error) = results[statuses.index(1)]
    assert re.search(r"cause: \S+run_b is being written by another process \(\d+\): wait", error)
    for run in ("run_b", "run_c"):
        assert driver.results(run) == driver.undisturbed


def test_told_to_end_it_says_so_and_leaves_no_process(driver: Driver) -> None:
    process = driver.start("run_c", "ended")
    for line in process.stdout:
        if line.startswith("rehearsal: "):
            break
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    _, error = process.communicate(LIMIT)
    assert process.returncode == 128 + signal.SIGTERM
    assert "cause: it was told to end (SIGTERM)" in error
    assert "to do: give the same command again" in error
    assert processes_of_session(process.pid) == []

    process = driver.start("run_c", "ended")
    for line in process.stdout:
        if line.startswith(("training: ", "train: ", "core ")):
            break
    os.kill(process.pid, signal.SIGKILL)  # the command alone, as a driver does
    process.wait(LIMIT)
    process.communicate(LIMIT)
    deadline = time.monotonic() + 5
    while processes_of_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of_session(process.pid) == []


def processes_of_session(leader: int) -> list[int]:
    """Processes alive of a session, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(after_name[3]) == leader and after_name[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_a_cache_on_a_full_disk_or_none_costs_time_not_results(
    driver: Driver, tmp_path: Path
) -> None:
    """A tmpfs of 300 kB holds no training; under /proc nothing can be written."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", small], capture_output=True
    )
    places = {Path("/proc/none"): "training can't be kept in /proc/none"}
    if mounted.returncode == 0:
        places[small] = "can't be kept in .*No space left on device.*: this run goes on without"
    try:
        for place, says in places.items():
            status, out, error = driver.run("run_b", place)
            assert status == 0, error
            assert re.search(says, out), out
            assert driver.results("run_b") == driver.undisturbed
    finally:
        subprocess.run(["umount", small], capture_output=True)


def test_results_on_a_full_disk_are_a_clear_failure_and_training_is_kept(
    driver: Driver, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    # Room for all that comes before evaluation's results, and for a third of these.
    sizes = {path: path.stat().st_size for path in (driver.folder / "run_a").rglob("*")}
    results = sum(size for path, size in sizes.items() if "eval_results" in path.parts)
    late = {"eval_results", "features"}
    others = sum(size for path, size in sizes.items() if not late & {*path.parts})
    room = f"size={others + results // 3}"
    mount = ["mount", "-t", "tmpfs", "-o", room, "tmpfs", small]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        process = driver.start(str(small / "run_b"), "cache")
        out, error = process.communicate(LIMIT)
        assert process.returncode == 1
        assert "cause: a disk is full (" in error
        assert re.search(r"it goes on from what is kept \(.*training", error)
        assert not (small / "run_b" / "final_info.json").exists()
    finally:
        subprocess.run(["umount", small], capture_output=True)
