"""The whole command on the profile gemma-2-2b, offline: real names and loaders, toy contents."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked, gemma_fixture
from tests.conftest import add_runs, copy_project

LAYERS = (5, 12, 19)
KS = (1, 2, 5, 10, 20, 50)
CLASSES = {
    "LabHC/bias_in_bios_class_set1": ["0", "1", "2", "6", "9"],
    "LabHC/bias_in_bios_class_set2": ["11", "13", "14", "18", "19"],
    "LabHC/bias_in_bios_class_set3": ["20", "21", "22", "25", "26"],
    "canrager/amazon_reviews_mcauley_1and5": ["1", "2", "3", "5", "6"],
    "canrager/amazon_reviews_mcauley_1and5_sentiment": ["1.0", "5.0"],
    "codeparrot/github-code": ["C", "Python", "HTML", "Java", "PHP"],
    "fancyzhx/ag_news": ["0", "1", "2", "3"],
    "Helsinki-NLP/europarl": ["en", "fr", "de", "es", "nl"],
}
PILE = "monology/pile-uncopyrighted"
TOY_SIZES = dict(
    description="toy sizes",
    device="cpu",
    context=32,
    d_sae=64,
    k_min=4,
    training_tokens=4000,
    batch=64,
    buffer_tokens=1024,
    harvest_contexts=8,
    dead_feature_window=1000,
    log_every=8,
    core_prompts=4,
    core_reconstruction_batches=2,
    core_sparsity_batches=4,
    probe_train=40,
    probe_test=20,
    probe_llm_batch=8,
    probe_sae_batch=15,
)
STOCK = """import json
import os
import sys

import torch
from sae_bench.evals.core import main as core
from sae_bench.evals.sparse_probing import main as probing
from sae_bench.sae_bench_utils import general_utils
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore

import experiment
from harness.settings import checked_settings
from harness.evaluation.core import core_config
from harness.evaluation.probing import probing_config
from harness.language_model import load_language_model
from harness.machine import n_cores

torch.set_num_threads(n_cores())
chosen = experiment.PROFILES["gemma-2-2b"] | experiment.PLAN["run_x"]
settings = checked_settings("run_x", experiment.Settings, chosen)
model = load_language_model(settings.model, settings.lm_dtype).bridge()
assert model.tokenizer.padding_side == "right"  # whatever Gemma's own has
sae = general_utils.load_and_format_sae("", SAE.load_from_disk(sys.argv[1]), "cpu")[1]
sae = sae.to(device="cpu", dtype=general_utils.str_to_dtype(settings.lm_dtype))  # as its run_eval
load = torch.load
torch.load = lambda path: load(path, weights_only=False)  # its own file, just written
config = probing_config(settings)
calls = [probing.run_eval_single_sae(config, sae, model, "cpu", "stock", True)[0] for _ in "12"]
store = ActivationsStore.from_sae(
    model, sae, settings.core_text, context_size=settings.context, dataset_trust_remote_code=True
)
store.shuffle_input_dataset(seed=42)
scalars, _ = core.run_evals(
    sae, store, model, core_config(settings), ignore_tokens={0, 1, 2}
)
with open("stock.json", "w") as file:
    json.dump({"probing": calls, "core": scalars}, file)
"""


def environment(hf_home: Path, folder: Path) -> dict[str, str]:
    return forked.environment(
        hf_home, SAE_PROFILE="gemma-2-2b", XDG_CACHE_HOME=str(folder / "cache")
    )


def in_fork(hf_home: Path, folder: Path, *arguments: str) -> tuple[int, str, str]:
    """`python arguments` in a folder, with a store there: exit status, output, errors."""
    process = forked.Forked(folder, *arguments, environment=environment(hf_home, folder))
    out, error = process.communicate(300)
    return process.returncode, out, error


@pytest.fixture(scope="module")
def place(hf_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the code, its plan extended by run_x, the data sets and the model."""
    folder = tmp_path_factory.mktemp("gemma")
    gemma_fixture.write_datasets(folder)
    gemma_fixture.write_model(hf_home)
    copy_project(folder)
    add_runs(folder / "experiment.py", {"run_x": TOY_SIZES})
    (folder / "stock.py").write_text(STOCK)
    return folder


@pytest.fixture(scope="module")
def finished(hf_home: Path, place: Path) -> subprocess.CompletedProcess:
    """The command, ended: no fork, but a Python of its own, as a user starts it."""
    with forked.one_core():
        return subprocess.run(
            [sys.executable, "experiment.py", "--out_dir=run_x"], cwd=place,
            env=environment(hf_home, place), capture_output=True, text=True, timeout=300,
        )  # fmt: skip


@pytest.fixture(scope="module")
def run_x(place: Path, finished: subprocess.CompletedProcess) -> Path:
    """The folder of the complete run."""
    assert finished.returncode == 0, finished.stderr
    return place / "run_x"


def results(run: Path, kind: str, layer: int, untrained: bool = False) -> dict:
    """SAE-Bench's own record of an SAE, or of its untrained baseline."""
    name = f"layer_{layer}_seed_0{'_untrained' if untrained else ''}_custom_sae_eval_results.json"
    return json.loads((run / "eval_results" / kind / name).read_text())


def numbers(record: object) -> list[float]:
    """All numbers in a record."""
    if isinstance(record, dict):
        record = list(record.values())
    if isinstance(record, list):
        return [number for member in record for number in numbers(member)]
    return [record] if isinstance(record, (int, float)) else []


def test_the_command_succeeds_and_says_nothing_on_standard_error(finished) -> None:
    assert finished.stderr == ""
    assert finished.returncode == 0
    assert finished.stdout.startswith("profile: gemma-2-2b on cpu\n")
    assert finished.stdout.splitlines()[-1].startswith("verdict: not comparable")
    assert "training text: all of it used" not in finished.stdout


def test_config_names_the_model_the_profile_and_the_data_sets(run_x: Path) -> None:
    config = json.loads((run_x / "config.json").read_text())
    assert config["profile"] == "gemma-2-2b" and config["model"] == "google/gemma-2-2b"
    assert config["dtype"] == "bfloat16" and config["device"] == "cpu"
    assert config["settings"]["training_text"] == PILE
    assert config["settings"]["core_text"] == "Skylion007/openwebtext"
    assert config["settings"]["layers"] == list(LAYERS)
    assert config["settings"]["probe_sets"] == list(CLASSES)
    assert not [key for key in config["sha256"] if key.startswith("tinylm")]


@pytest.mark.parametrize("layer", LAYERS)
def test_probing_has_every_data_set_class_and_k(run_x: Path, layer: int) -> None:
    metrics = ["test_accuracy", *(f"top_{k}_test_accuracy" for k in KS)]
    metrics = {f"{who}_{metric}" for who in ("sae", "llm") for metric in metrics}
    for untrained in (False, True):
        record = results(run_x, "sparse_probing", layer, untrained)
        details = record["eval_result_details"]
        assert [detail["dataset_name"] for detail in details] == [f"{n}_results" for n in CLASSES]
        for detail in details:
            found = {metric for metric, value in detail.items() if value is not None}
            assert found == {"dataset_name"} | metrics
        for name, classes in CLASSES.items():
            for metric, accuracies in record["eval_result_unstructured"][f"{name}_results"].items():
                assert metric in metrics and list(accuracies) == classes
                assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())
    means = json.loads((run_x / "final_info.json").read_text())[f"layer_{layer}"]["means"]
    for k in KS:
        metric = f"top_{k}_test_accuracy"
        for who, untrained in (("sae", False), ("untrained", True)):
            record = results(run_x, "sparse_probing", layer, untrained)
            values = [detail[f"sae_{metric}"] for detail in record["eval_result_details"]]
            assert means[f"{who}_{metric}"] == pytest.approx(sum(values) / len(CLASSES))


def test_probes_find_what_the_texts_differ_in(run_x: Path) -> None:
    """Labels stay with their texts on the way through the loaders."""
    for detail in results(run_x, "sparse_probing", LAYERS[0])["eval_result_details"]:
        assert detail["llm_top_50_test_accuracy"] > 0.7, detail["dataset_name"]


@pytest.mark.parametrize("layer", LAYERS)
def test_core_results_are_finite(run_x: Path, layer: int) -> None:
    means = json.loads((run_x / "final_info.json").read_text())[f"layer_{layer}"]["means"]
    assert all(math.isfinite(value) for value in means.values())
    for untrained in (False, True):
        record = results(run_x, "core", layer, untrained)
        found = numbers(record["eval_result_metrics"])
        assert len(found) > 15 and all(math.isfinite(value) and value != -1 for value in found)
    assert 0 < means["l0"] <= 4 and means["fvu"] < means["untrained_fvu"]


def test_results_are_stock_sae_bench_on_the_stored_sae(
    hf_home: Path, place: Path, run_x: Path
) -> None:
    """In bfloat16, exactly: no figure is off by a single text."""
    layer = LAYERS[1]
    sae = run_x / "sae" / f"layer_{layer}" / "seed_0"
    status, _, error = in_fork(hf_home, place, "stock.py", str(sae))
    assert status == 0, error
    stock = json.loads((place / "stock.json").read_text())
    first, second = stock["probing"]
    details = results(run_x, "sparse_probing", layer)["eval_result_details"]
    for at, name in enumerate(CLASSES):
        for metric in (f"{who}_test_accuracy" for who in ("sae", *(f"sae_top_{k}" for k in KS))):
            assert details[at][metric] == second[f"{name}_results"][metric], (name, metric)
    name = next(iter(CLASSES))  # on the others the first call draws after the SAE's probes
    for metric in (f"{who}_test_accuracy" for who in ("llm", *(f"llm_top_{k}" for k in KS))):
        assert details[0][metric] == first[f"{name}_results"][metric], metric
    ours = results(run_x, "core", layer)["eval_result_metrics"]
    for group, scalars in stock["core"].items():
        for metric, value in scalars.items():
            assert ours[group][metric] == value, metric


def test_what_is_not_there_is_one_sentence(hf_home: Path, place: Path) -> None:
    """Said at once, and with nothing written. SAE-Bench's eight names are of five data sets."""
    (place / "elsewhere").mkdir()
    (hf_home / "hub").rename(hf_home / "away")
    try:
        arguments = "../experiment.py", "--out_dir=run_x"
        status, _, error = in_fork(hf_home, place / "elsewhere", *arguments)
    finally:
        (hf_home / "away").rename(hf_home / "hub")
    assert status == 1
    (sentence,) = [line for line in error.splitlines() if line.startswith("cause: ")]
    assert re.search(
        r"the model 'google/gemma-2-2b' is not in the local cache \S+ and HF_HUB_OFFLINE is set: "
        r".* \(and 7 more of the kind\)$",
        sentence,
    )
    assert not (place / "elsewhere" / "run_x").exists()


def test_changed_data_is_one_sentence(hf_home: Path, place: Path) -> None:
    """Of data sets that changed on the hub, and of text that is none."""
    changed = {
        "column": lambda at: gemma_fixture.write_bias_in_bios(
            at / "LabHC/bias_in_bios", text_column="bio"
        ),
        "rows": lambda at: gemma_fixture.write_ag_news(at / "fancyzhx/ag_news", n_train=3),
        "text": lambda at: gemma_fixture.write_pile(at / PILE, texts=[" \n"] * 40),
        "text column": lambda at: gemma_fixture.write_pile(at / PILE, text_column="content"),
    }
    expected = (
        "the probing data set 'LabHC/bias_in_bios_class_set1' has no 'hard_text', ",
        "the probing data set 'fancyzhx/ag_news' has too few rows for probe_train = 40 and ",
        f"the text '{PILE}' must have texts, but has none in its 40 rows: look at its files",
        f"the text '{PILE}/train/00.jsonl.zst' must have a column 'text', but has ['content', 'me",
    )
    for (case, write), says in zip(changed.items(), expected, strict=True):
        for name in gemma_fixture.WRITERS:
            shutil.copytree(place / name, place / case / name)
        write(place / case)
        arguments = "../experiment.py", "--out_dir=run_x"
        status, _, error = in_fork(hf_home, place / case, *arguments)
        (sentence,) = [line for line in error.splitlines() if line.startswith("cause: ")]
        assert status == 1 and sentence.startswith(f"cause: {says}")
        assert not (place / case / "run_x" / "final_info.json").exists()
