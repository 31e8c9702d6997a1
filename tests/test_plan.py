"""plan.py: in what order runs go, what is started again, and how it ends; here and on Ray."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.errors import ExperimentError
from harness.plans import chosen_runs, needed_runs
from harness.settings import choose_profile, settings_of_run
from harness.verdict import MIN_SEEDS, PRIMARY
from tests.conftest import ROOT

# What plan.py sees of an experiment, and a command that ends as the run's description says.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

from harness.settings import checked


@checked
class Settings:
    description: str = ""
    compare_to: str = "run_1"
    constants_from_run: str | None = None
    scores: tuple[float, ...] = ()
    other: str = ""

PROFILES = {"tinylm": {}, "smollm2": {}}
PLAN = PLAN_HERE

if __name__ == "__main__":
    out = Path(sys.argv[1].removeprefix("--out_dir="))
    plan = PLAN[out.name]
    starts = Path(f"{out.name}.starts")
    with starts.open("a") as file:
        threads = os.environ.get("OMP_NUM_THREADS")
        file.write(f"{os.getpid()} {os.environ['SAE_PROFILE']} {threads}\\n")
    n = len(starts.read_text().splitlines())
    if plan["description"] == "fails":
        sys.exit("experiment.py failed during rehearsal\\ncause: it was told to")
    if plan["description"] == "is killed once" and n == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if plan["description"] == "is told to end once" and n == 1:
        sys.exit(128 + signal.SIGTERM)
    if plan["description"] == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan["description"] == "waits for another":
        other, until = Path(plan["other"] + ".starts"), time.monotonic() + 60
        while not other.exists():
            assert time.monotonic() < until, "both were to run at once"
            time.sleep(0.05)
    if plan["description"] == "takes long" and n == 1:
        time.sleep(60)
    out.mkdir(parents=True)
    figures = {"seed": [0, 1, 2], "mean_topk_probe_accuracy": plan["scores"], "l0": [16, 16, 16]}
    means = {name: sum(values) / 3 for name, values in figures.items()}
    settings = {"compare_to": plan.get("compare_to", "run_1")}
    config = {"profile": os.environ["SAE_PROFILE"], "settings": settings}
    (out / "config.json").write_text(json.dumps(config))
    info = {"verdict": {"means": means, "final_info_dict": figures}}
    (out / "final_info.json").write_text(json.dumps(info))
    with open("order", "a") as file:
        file.write(out.name + "\\n")
"""


def a_run(description: str = "", scores: tuple = (0.5, 0.6, 0.7), **more: object) -> dict:
    return {"description": description, "scores": scores, **more}


@pytest.fixture
def project(tmp_path: Path):
    """A function that makes a folder with plan.py and a stand-in of an experiment."""

    def make(**plan: dict) -> Path:
        shutil.copy(ROOT / "plan.py", tmp_path)
        (tmp_path / "harness").symlink_to(ROOT / "harness")
        (tmp_path / "experiment.py").write_text(STAND_IN.replace("PLAN_HERE", repr(plan)))
        return tmp_path

    return make


def call(folder: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "plan.py", *arguments], cwd=folder, capture_output=True, text=True,
        env=kept | {"SAE_PROFILE": "tinylm"} | variables, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def rows_of(output: str) -> dict[str, list[str]]:
    """The table at the end, by run."""
    lines = output.splitlines()
    (at,) = [n for n, line in enumerate(lines) if line.startswith("run ") and PRIMARY in line]
    rows = (re.split(r"\s{2,}", line) for line in lines[at + 1 :])
    return {run: cells for run, *cells in rows}


def starts(folder: Path, run: str) -> list[str]:
    return (folder / f"{run}.starts").read_text().splitlines()


def first_start(folder: Path, run: str) -> str:
    until = time.monotonic() + 60
    while not (folder / f"{run}.starts").exists() or not starts(folder, run):
        assert time.monotonic() < until, f"{run} was to begin"
        time.sleep(0.05)
    return starts(folder, run)[0]


def test_here_runs_go_one_after_the_other_and_end_in_a_table(project) -> None:
    """run_1 before those that need it; what dies is started again, what fails is not."""
    folder = project(
        run_8=a_run(scores=(0.6, 0.72, 0.8)),
        run_2=a_run("is killed once"),
        run_3=a_run("fails"),
        run_4=a_run("is told to end once", constants_from_run="run_8"),
        run_5=a_run("is killed"),
        run_1=a_run(),
        other=a_run("fails"),
    )
    status, out, error = call(folder, "run_*")
    assert status == 1 and error == ""
    order = (folder / "order").read_text().split()
    assert order[0] == "run_1" and order.index("run_8") < order.index("run_4")
    assert {*order} == {"run_1", "run_2", "run_4", "run_8"}
    numbers = [len(starts(folder, run)) for run in ("run_1", "run_2", "run_3", "run_4", "run_5")]
    assert numbers == [1, 2, 1, 2, 4]
    assert "run_3: failed\nexperiment.py failed during rehearsal\ncause: it was told to\n" in out
    rows = rows_of(out)
    assert {run: row[0] for run, row in rows.items()} == {
        "run_8": "complete", "run_2": "complete", "run_3": "failed", "run_4": "complete",
        "run_5": "died", "run_1": "complete",
    }  # fmt: skip
    assert rows["run_8"][2] == "0.7067" and rows["run_8"][3].startswith("better (+0.1067 [+0.0")
    assert rows["run_2"][3] == "no difference (+0.0000 [+0.0000, +0.0000])"
    assert [rows[run][2:] for run in ("run_1", "run_3")] == [["0.6000", "-"], ["-", "-"]]

    status, out, _ = call(folder, "run_1", "run_3")
    assert status == 1 and "run_1 is complete, and stays" in out
    assert rows_of(out)["run_1"][:2] == ["complete before", "-"]
    assert len(starts(folder, "run_1")) == 1 and len(starts(folder, "run_3")) == 2


def test_runs_in_a_profiles_folder_are_of_that_profile(project) -> None:
    """And are held against those beside them; the same names elsewhere are other runs."""
    folder = project(run_1=a_run(), run_2=a_run(scores=(0.6, 0.72, 0.8)))
    assert call(folder, "run_1")[0] == 0
    status, out, error = call(folder, "smollm2/run_*", SAE_PROFILE="")
    assert (status, error) == (0, "") and "profile: smollm2" in out
    assert (folder / "order").read_text().split() == ["run_1", "run_1", "run_2"]
    assert (folder / "smollm2" / "run_2" / "final_info.json").exists()
    rows = rows_of(out)
    assert [*rows] == ["smollm2/run_1", "smollm2/run_2"]
    assert rows["smollm2/run_2"][3].startswith("better (+0.1067 [+0.0")
    status, out, _ = call(folder, "smollm2/run_2", SAE_PROFILE="")
    assert status == 0
    assert "smollm2/run_2 is complete, and stays (make run OUT=smollm2/run_2 runs it again)" in out
    status, _, error = call(folder, "run_1", "smollm2/run_1", SAE_PROFILE="")
    assert status == 1 and "must lie in one folder, but these lie in . and smollm2" in error


def test_a_clusters_runs_take_the_large_profile_where_nothing_says_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAE_PROFILE", raising=False)
    profiles = ["gemma-2-2b", "tinylm", "smollm2"]
    for runs, known, found in (
        (tmp_path, profiles, "gemma-2-2b"), (tmp_path / "smollm2", profiles, "smollm2"),
        (tmp_path, ["tinylm"], "tinylm"),  # a template's only one
    ):  # fmt: skip
        assert choose_profile(known, runs, tmp_path, "gemma-2-2b") == found


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child")
def test_a_run_dies_with_the_plan(project) -> None:
    """Else a second start of the same run would find the first one writing its folder."""
    folder = project(run_1=a_run("takes long"))
    started = subprocess.Popen([sys.executable, "plan.py"], cwd=folder)
    run = psutil.Process(int(first_start(folder, "run_1").split()[0]))
    started.kill()
    started.wait()
    run.wait(timeout=10)


def test_runs_are_chosen_by_name_or_pattern() -> None:
    plan = ["run_1", "run_k_8", "run_k_16", "run_2"]
    assert chosen_runs(plan, []) == chosen_runs(plan, ["all"]) == plan
    assert chosen_runs(plan, ["run_2", "run_k_*"]) == ["run_k_8", "run_k_16", "run_2"]
    with pytest.raises(ExperimentError, match="PLAN has no run 'run_3': name one of run_1, run_k"):
        chosen_runs(plan, ["run_1", "run_3"])


def test_runs_wait_for_those_that_they_need() -> None:
    """Among the chosen ones; two that are compared to each other don't wait for ever."""
    import experiment

    plan = experiment.PLAN | {
        "run_a": dict(compare_to="run_b"),
        "run_b": dict(compare_to="run_a"),
        "run_c": dict(compare_to="run_a", constants_from_run="run_9"),
    }
    runs = ["run_c", "run_9", "run_2", "run_a", "run_b"]
    needs = needed_runs(runs, experiment.Settings, {}, plan)
    assert needs == {
        "run_c": {"run_9", "run_a"}, "run_9": set(), "run_2": set(), "run_a": {"run_b"},
        "run_b": set(),
    }  # fmt: skip
    needs = needed_runs(list(experiment.PLAN), experiment.Settings, {}, experiment.PLAN)
    assert needs == {run: {"run_1"} - {run} for run in experiment.PLAN}


def test_a_setting_that_cannot_be_is_told_before_anything_runs(project) -> None:
    folder = project(run_1=a_run(), run_2=a_run(k=3))
    status, out, error = call(folder)
    assert status == 1 and not (folder / "order").exists()
    assert error == (
        "run_2: PLAN or PROFILES sets what Settings has no field for ('k'): see the list at the "
        "top of experiment.py\n"
    )


def test_what_program_md_tells_an_agent(tmp_path: Path) -> None:
    """Its runs are runs: on set A, with three seeds, compared to the baseline there."""
    import experiment

    text = (ROOT / "program.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    plan = eval("{" + block + "}", {"THREE": experiment.THREE})
    parts = experiment.Settings, experiment.PROFILES["tinylm"], experiment.PLAN | plan
    made = {run: settings_of_run(run, *parts) for run in plan}
    assert {settings.probe_sets for settings in made.values()} == {("tinylm/A",)}
    assert all(len(settings.seeds) >= MIN_SEEDS for settings in made.values())
    assert needed_runs([*plan], *parts) == {"run_a0": set(), "run_a1": {"run_a0"}}
    (command,) = re.findall(r"`(sed .*?) >> results.tsv`", text)
    output = "train: done\nresults.tsv: run_a1\t0123456\t0.7\nverdict: better (…)\n"
    done = subprocess.run(
        f"cat > run.log; {command}", shell=True, input=output, capture_output=True, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == "run_a1\t0123456\t0.7\n"


needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (requirements-ray.txt)"
)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    """A local Ray cluster, and its two machines that have a core each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    from ray.cluster_utils import Cluster

    made = Cluster()
    made.add_node(num_cpus=0, include_dashboard=False)
    yield made, [made.add_node(num_cpus=1) for _ in range(2)]
    made.shutdown()


@needs_ray
def test_on_ray_runs_are_beside_each_other_and_outlive_a_machine(project, cluster) -> None:
    made, machines = cluster
    folder = project(
        run_1=a_run("is killed once"),
        run_2=a_run("waits for another", other="run_3"),
        run_3=a_run("waits for another", other="run_2"),
        run_4=a_run("fails"),
        run_5=a_run("takes long"),
    )
    status, out, error = call(folder, "run_[1-4]", "--gpus=0", RAY_ADDRESS=made.address)
    assert status == 1, error
    rows = rows_of(out)
    assert [row[0] for row in rows.values()] == ["complete", "complete", "complete", "failed"]
    assert (folder / "order").read_text().split()[0] == "run_1"
    assert "run_4: failed\nexperiment.py failed during rehearsal" in out
    # Ray's own number of threads would be in every key of the store.
    assert {line.split(" ", 1)[1] for line in starts(folder, "run_1")} == {"tinylm None"}

    command = [sys.executable, "plan.py", "run_5", "--gpus=0"]
    environment = os.environ | {"RAY_ADDRESS": made.address}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE,
                               text=True)  # fmt: skip
    first = psutil.Process(int(first_start(folder, "run_5").split()[0]))
    above = {parent.pid for parent in first.parents()}
    (its,) = [m for m in machines if above & {p.pid for _, p in m.live_processes()}]
    made.remove_node(its, allow_graceful=False)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and rows_of(out)["run_5"][0] == "complete"
    assert len(starts(folder, "run_5")) == 2 and not first.is_running()
