"""What is checked before anything large is downloaded: each failure is one sentence."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

import experiment
from harness.errors import ExperimentError
from harness.preflight import fit_core_batches, memory_estimate, preflight
from tests.conftest import replace, settings_of
from tests.test_language_model import GEMMA_2_2B

CPU = torch.device("cpu")


@pytest.fixture()
def gemma(tmp_path: Path, monkeypatch) -> experiment.Settings:
    """The profile's settings, an empty cache, a large disk, a hub that grants everything."""
    settings = settings_of(experiment, "run_try", "gemma-2-2b")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**11))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *_, **__: None)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(GEMMA_2_2B))
    replace(monkeypatch, "model_path", lambda name: str(tmp_path / "config"))
    return settings


def refuse(monkeypatch, name: str, error: type[Exception]) -> None:
    """The hub answers for this name with an error."""

    def auth_check(self, repo_id: str, repo_type: str) -> None:
        if repo_id == name:
            request = httpx.Request("GET", "https://hub.example", headers={"x": "hf_secretsecret"})
            if issubclass(error, errors.HfHubHTTPError):
                raise error("hf_secretsecret", response=httpx.Response(403, request=request))
            raise error("hf_secretsecret")

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)


def test_tinylm_needs_nothing() -> None:
    assert preflight(settings_of(experiment, "run_1", "tinylm"), CPU) == []


def test_what_is_needed_is_said_per_part(gemma, monkeypatch) -> None:
    replace(monkeypatch, "memory_gb", lambda: 80.0)
    memory, disk = sorted(preflight(gemma, CPU), reverse=True)
    assert "language model 5.2" in memory and "80.0 free on cpu" in memory  # 2.6 G
    assert all(part in memory for part in ("SAEs", "training", "evaluation"))
    assert disk.startswith("disk: up to 15.5 GB") and "100.0 free" in disk


def test_the_defaults_fit_24_gb_and_16384_features_fit_80(gemma) -> None:
    def needed(settings) -> float:
        parts = memory_estimate(settings)
        fixed = parts["language model"] + parts["SAEs"]
        return (fixed + max(parts["training"], parts["evaluation"])) / 1e9

    assert needed(gemma) < 24
    assert 24 < needed(dataclasses.replace(gemma, d_sae=16384, core_prompts=32)) < 80


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("google/gemma-2-2b", errors.GatedRepoError, "is gated .*accept its licence .*hf auth"),
        ("fancyzhx/ag_news", errors.RepositoryNotFoundError, "ag_news' is not on the hub"),
        ("codeparrot/github-code", ConnectionError, "can't be reached for the dataset 'codeparrot"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_without_token(
    gemma, monkeypatch, name, error, message
) -> None:
    refuse(monkeypatch, name, error)
    with pytest.raises(ExperimentError, match=message) as caught:
        preflight(gemma, CPU)
    assert "hf_secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("training_text", "/no/such/folder", "'/no/such/folder' must be there.* no such file or"),
        ("core_text", "texts.jsonl", "'texts.jsonl' must be there, or a name on the hub"),
        ("training_text", "own_sentiment", "the dataset 'own_sentiment' is not on the hub"),
        ("model", "model.safetensors", "must be a folder or a GGUF file, but is another file"),
        ("probe_sets", ("own",), "whose classes SAE-Bench knows .*but one is 'own': choose"),
    ],
)
def test_a_name_that_can_t_be_right_is_told_as_what_it_is(
    gemma, tmp_path: Path, monkeypatch, setting, value, message
) -> None:
    """The hub is not asked for it, nor blamed."""
    refuse(monkeypatch, "own_sentiment", errors.RepositoryNotFoundError)
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").touch()
    with pytest.raises(ExperimentError, match=message):
        preflight(dataclasses.replace(gemma, **{setting: value}), CPU)


def test_a_file_is_a_text_too(gemma, tmp_path: Path, monkeypatch) -> None:
    refuse(monkeypatch, "texts.jsonl", errors.RepositoryNotFoundError)
    replace(monkeypatch, "memory_gb", lambda: 80.0)
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text('{"text": "one"}\n')
    assert preflight(dataclasses.replace(gemma, training_text="texts.jsonl"), CPU)


def test_offline_needs_the_cache(gemma, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExperimentError, match="HF_HUB_OFFLINE is set: .* \\(and 7 more of"):
        preflight(gemma, CPU)
    snapshot = tmp_path / "hub" / "models--google--gemma-2-2b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    with pytest.raises(ExperimentError, match="pile-uncopyrighted.* \\(and 6 more"):
        preflight(gemma, CPU)


def test_core_s_batches_follow_the_memory(gemma, monkeypatch) -> None:
    """As many contexts, in smaller batches; as they are where they fit."""
    for free, prompts in ((24.0, 16), (16.0, 8)):
        replace(monkeypatch, "memory_gb", lambda free=free: free)
        fitted = fit_core_batches(gemma, CPU)
        assert fitted.core_prompts == prompts
        for field in ("core_reconstruction_batches", "core_sparsity_batches"):
            assert getattr(fitted, field) * prompts == getattr(gemma, field) * 16
        (memory,) = [line for line in preflight(gemma, CPU) if line.startswith("memory")]
        assert f"{free:.1f} free on cpu" in memory


def test_too_little_memory_names_the_setting(gemma, monkeypatch) -> None:
    replace(monkeypatch, "memory_gb", lambda: 12.0)
    with pytest.raises(ExperimentError, match="12.0 free on cpu: lower batch or buffer_tokens"):
        preflight(gemma, CPU)
    replace(monkeypatch, "memory_gb", lambda: 16.0)
    with pytest.raises(ExperimentError, match="16.0 free on cpu: lower core_prompts"):
        preflight(dataclasses.replace(gemma, core_prompts=15), CPU)


def test_too_little_disk_names_hf_home(gemma, monkeypatch) -> None:
    replace(monkeypatch, "memory_gb", lambda: 80.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=3 * 10**9))
    with pytest.raises(ExperimentError, match="3.0 free in .* set HF_HOME"):
        preflight(gemma, CPU)
