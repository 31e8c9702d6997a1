"""A folder for AI-Scientist: what is in it, and what its driver makes of it."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import ExperimentError
from harness.settings import choose_profile, settings_of_run
from harness.template import copy, main, make_template
from harness.verdict import PRIMARY, mean
from tests import forked
from tests.conftest import ROOT, SOURCES, TOY_TASKS, add_runs, copy_project, edit

SIZES = dict(
    layers=(2,), context=32, d_sae=64, k_min=4, training_tokens=4096, batch=128, seeds=(0, 1, 2),
    buffer_tokens=2048, harvest_contexts=8, dead_feature_window=1024, log_every=8, core_prompts=4,
    core_reconstruction_batches=2, core_sparsity_batches=4, probe_ks=(1, 2, 5), probe_train=40,
    probe_test=20, probe_llm_batch=8, probe_sae_batch=15, description="a toy",
)  # fmt: skip
LIMIT = 900.0  # seconds that the driver waits; 7,200 in earnest


def module_of(folder: Path, name: str):
    """A file of a folder as a module, without a trace in sys.modules."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name], before = module, sys.modules.get(name)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
    return module


def test_no_run_of_a_profiles_folder_is_taken_along(tmp_path: Path) -> None:
    """smollm2/run_1 lies in the folder that a template of smollm2 needs."""
    for file in ("corpus.py", "run_records.py", "run_1/config.json", "__pycache__/corpus.pyc"):
        (tmp_path / "smollm2" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "smollm2" / file).touch()
    copy(tmp_path / "smollm2", tmp_path / "out" / "smollm2")
    taken = {path.name for path in (tmp_path / "out").rglob("*")}
    assert taken == {"smollm2", "corpus.py", "run_records.py"}


def test_the_committed_baseline_as_a_template(tmp_path: Path, capsys) -> None:
    """Defaults are run_1's settings; run_1 is run_0; no other run is in the way."""
    out = tmp_path / "sae"
    main([str(out)])
    assert "--experiment sae" in capsys.readouterr().out
    assert {path.name for path in out.glob("run_*")} == {"run_0"}
    experiment = module_of(out, "experiment")
    assert list(experiment.PROFILES) == ["tinylm"] and experiment.PLAN == {}
    parts = experiment.Settings, experiment.PROFILES["tinylm"], experiment.PLAN
    found = dataclasses.asdict(settings_of_run("run_1", *parts))
    was = json.loads((ROOT / "run_1" / "config.json").read_text())["settings"]
    differing = {name for name, value in was.items()
                 if name in found and json.loads(json.dumps(found[name])) != value}  # fmt: skip
    assert differing == {"seeds", "compare_to", "description"}
    assert (found["seeds"], found["compare_to"]) == ((0, 1, 2), "run_0")

    code = (out / "run_0" / "experiment.py").read_text()  # tells whose curve is the baseline's
    assert code == (ROOT / "run_1" / "experiment.py").read_text()
    info = json.loads((out / "run_0" / "final_info.json").read_text())
    given = json.loads((ROOT / "run_1" / "final_info.json").read_text())
    assert info["verdict"]["means"][PRIMARY] == given["verdict"]["means"]["primary"]
    assert info["layer_2"] == given["layer_2"]
    # Both files are pasted into an editor's context: 4 characters a token.
    assert len((out / "experiment.py").read_text()) < 4 * 12_000
    assert len((out / "plot.py").read_text()) < 4 * 1_000
    prompt = json.loads((out / "prompt.json").read_text())
    assert prompt.keys() == {"system", "task_description"} and PRIMARY in prompt["task_description"]
    for idea in json.loads((out / "seed_ideas.json").read_text()):
        assert idea.keys() == {
            "Name", "Title", "Experiment", "Interestingness", "Feasibility", "Novelty"
        }  # fmt: skip
        assert {*re.findall(r"(\w+)=", idea["Experiment"])} <= found.keys()
    paper = (out / "latex" / "template.tex").read_text()
    assert re.search(r"\\begin{filecontents}{references.bib}.*?\\end{filecontents}", paper, re.S)
    (figure,) = re.findall(r"\\includegraphics.*?{(.*?)}", paper)
    assert f'HERE / "{figure}"' in (out / "plot.py").read_text()


def test_the_only_profile_of_a_template_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SAE_PROFILE")
    assert choose_profile(["smollm2"], tmp_path, tmp_path) == "smollm2"


def test_what_is_no_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="needs the folder of a complete run as its baseline"):
        make_template(tmp_path / "run_none", tmp_path / "out")
    with pytest.raises(ExperimentError, match="run_9 takes constants from run_1"):
        make_template(ROOT / "run_9", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ExperimentError, match="must be a new folder"):
        make_template(ROOT / "run_1", tmp_path)
    copy = tmp_path / "run_one_seed"
    shutil.copytree(ROOT / "run_1", copy)
    config = json.loads((copy / "config.json").read_text())
    config["settings"]["seeds"] = [0]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExperimentError, match="must have 3 seeds or more.*run_one_seed has 1"):
        make_template(copy, tmp_path / "out")


@pytest.fixture(scope="module")
def template(toy_model: Path, hf_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from a run of toy size, on texts and labels that lie here."""
    project = tmp_path_factory.mktemp("project")
    copy_project(project)
    (project / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text[at : at + 3000]}) + "\n" for text in SOURCES
                for at in range(0, len(text), 3000))
    )  # fmt: skip
    with (project / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for label, text in TOY_TASKS["toy/halves"].items():
            rows.writerows([text[at : at + 200], label] for at in range(0, 10_000, 200))
    own = {name: str(project / "texts.jsonl") for name in ("training_text", "core_text")}
    own |= {"probe_sets": (str(project / "labels.csv"),), "model": str(toy_model)}
    add_runs(project / "experiment.py", {"run_a": SIZES | own})
    process = forked.Forked(project, "experiment.py", "--out_dir=run_a", environment=env(hf_home))
    _, error = process.communicate(LIMIT)
    assert process.returncode == 0, error
    out = tmp_path_factory.mktemp("templates") / "toy"
    make_template(project / "run_a", out)
    return out


def env(hf_home: Path) -> dict[str, str]:
    """Without a profile named: the template has one alone."""
    environment = forked.environment(hf_home)
    return {name: v for name, v in environment.items() if name != "SAE_PROFILE"}


def set_run(folder: Path, line: str) -> None:
    edit(folder / "experiment.py", '    # "run_1": dict', f'    {line},\n    # "run_1": dict')


def test_driven_as_its_driver_does(template: Path, hf_home: Path, tmp_path: Path) -> None:
    """A copy per idea; on failure its end of standard error is all that is seen, and no folder."""
    folder = tmp_path / "20261128_idea"
    shutil.copytree(template, folder)

    def drive(number: int) -> tuple[int, str, str]:
        shutil.copy(folder / "experiment.py", folder / f"run_{number}.py")
        process = forked.Forked(
            folder, "experiment.py", f"--out_dir=run_{number}", environment=env(hf_home)
        )
        out, error = process.communicate(LIMIT)
        if process.returncode:
            shutil.rmtree(folder / f"run_{number}", ignore_errors=True)
        return process.returncode, out, error[-1500:]

    set_run(folder, '"run_1": dict(description="faster", lr=5e-3)')
    status, out, error = drive(1)
    assert status == 0, error
    info = json.loads((folder / "run_1" / "final_info.json").read_text())
    assert {key: entry["means"] for key, entry in info.items()}.keys() == {"layer_2", "verdict"}
    assert info["verdict"]["means"]["comparable"] == 1.0
    baseline = json.loads((folder / "run_0" / "final_info.json").read_text())["verdict"]
    reference = info["verdict"]["means"][f"{PRIMARY}_reference"]
    assert reference == pytest.approx(mean(baseline["final_info_dict"][PRIMARY]))
    assert " against run_0, L0 " in out.splitlines()[-1]

    edit(folder / "experiment.py", "    core, probing = scores", "    core, probing = score")
    status, out, error = drive(2)
    assert status == 1 and not (folder / "run_2").exists()
    assert "cause: NameError: name 'score' is not defined" in error
    edit(folder / "experiment.py", "    core, probing = score[", "    core, probing = scores[")
    assert drive(2)[0] == 0

    edit(folder / "plot.py", '    "run_0": "baseline",\n',
         '    "run_0": "baseline",\n    "run_1": "faster",\n')  # fmt: skip
    subprocess.run([sys.executable, "plot.py"], cwd=folder, check=True, capture_output=True)
    drawn = {file.name for file in folder.glob("*.png")}
    assert {"scores.png", "forest.png", "probing.png", "training_sparsity.png"} <= drawn


@pytest.mark.skipif("AI_SCIENTIST" not in os.environ, reason="AI_SCIENTIST names no copy of it")
def test_ai_scientist_s_own_driver(
    template: Path, hf_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """perform_experiments, with an editor that makes these edits in the place of a model."""
    package = Path(os.environ["AI_SCIENTIST"]) / "ai_scientist"
    driver = module_of(package, "perform_experiments")
    folder = tmp_path / "20261128_idea"
    shutil.copytree(template, folder)
    for name in {*os.environ} - {*(environment := env(hf_home))}:
        monkeypatch.delenv(name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for name, value in (environment | {"PATH": path}).items():
        monkeypatch.setenv(name, value)
    asked: list[str] = []

    class Editor:
        def run(self, prompt: str) -> str:
            asked.append(prompt)
            if len(asked) == 1:  # the idea
                set_run(folder, '"run_1": dict(description="faster", lr=nothing)')
            if len(asked) == 2:  # run_1 has failed
                edit(folder / "experiment.py", "lr=nothing", "lr=5e-3")
            if len(asked) == 4:  # the figures
                edit(folder / "plot.py", '    "run_0": "baseline",\n',
                     '    "run_0": "baseline",\n    "run_1": "faster",\n')  # fmt: skip
            return "ALL_COMPLETED" if len(asked) == 3 else ""

    info = json.loads((folder / "run_0" / "final_info.json").read_text())
    means = {key: entry["means"] for key, entry in info.items()}
    idea = {"Title": "Faster", "Experiment": "A higher learning rate."}
    assert driver.perform_experiments(idea, str(folder), Editor(), means)
    assert "name 'nothing' is not defined" in asked[1]
    assert "Run 1 completed" in asked[2] and f"'{PRIMARY}'" in asked[2]
    assert len(asked) == 5 and (folder / "run_1.py").exists()
    assert (folder / "forest.png").exists()
