"""Toy runs of run_1, 5, 7 and 10, to the last bit: what a change of the plumbing must not move.

`golden.json` holds, by machine, a digest of each run's weights, figures, log lines and SAE-Bench
files, and the figures themselves. Rounding differs between processors: on one that the file does
not know, the figures are held to 5% alone. `GOLDEN=write pytest tests/test_golden.py` writes what
this machine gives, after a change that moves bits for a good reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import experiment
from harness.machine import processor_name
from harness.verdict import OLD_NAMES
from tests import gemma_fixture
from tests.conftest import run_command

RUNS = ("run_1", "run_5", "run_7", "run_10")
FILE = Path(__file__).with_name("golden.json")
SIZES = dict(
    model="toy-gemma-2", layers=(0, 2), context=32, training_text="pile", core_text="pile",
    d_sae=64, k_min=4, training_tokens=10_240, batch=128, buffer_tokens=2048, harvest_contexts=8,
    dead_feature_window=1024, log_every=8, core_prompts=4, core_reconstruction_batches=2,
    core_sparsity_batches=2, probe_sets=("fancyzhx/ag_news",), probe_ks=(1, 2, 5),
    probe_train=40, probe_test=20,
    probe_llm_batch=8, probe_sae_batch=15, train_dtype="float32",
)  # fmt: skip


def machine() -> str:
    """What rounding depends on."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor_name()}, {capability}, {torch.get_num_threads()} threads"


def digest(content: Any) -> str:
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def as_first_named(record: dict[str, Any]) -> dict[str, Any]:
    """With the names that figures had when golden.json was written."""
    first = {new: old for old, new in OLD_NAMES.items()}
    return {first.get(name, name): value for name, value in record.items()}


def record_of(run: Path) -> dict[str, Any]:
    """What a run left, but for times, versions and names of files."""
    info = json.loads((run / "final_info.json").read_text())
    figures = {
        key: {
            part: as_first_named({m: v for m, v in values.items() if not m.startswith("seconds")})
            for part, values in entry.items()
        }
        for key, entry in info.items()
    }
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    for record in log:
        del record["tokens_per_second"]
    bench = {}
    for path in sorted((run / "eval_results").rglob("*.json")):
        result = json.loads(path.read_text())
        for name in ("eval_id", "datetime_epoch_millis"):
            del result[name]
        bench[str(path.relative_to(run))] = result
    weights = {
        str(path.relative_to(run)): digest(path.read_bytes())
        for path in sorted((run / "sae").rglob("*.safetensors"))
    }
    return {
        "weights": digest(weights),
        "figures": digest(figures),
        "log": digest([as_first_named(record) for record in log]),
        "SAE-Bench": digest(bench),
        "means": {key: entry["means"] for key, entry in figures.items()},
    }


@pytest.fixture(scope="module")
def records(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """By run, what it leaves here."""
    folder = tmp_path_factory.mktemp("golden")
    shutil.copytree(toy_model, folder / SIZES["model"])
    gemma_fixture.write_pile(folder / SIZES["training_text"])
    gemma_fixture.write_ag_news(folder / SIZES["probe_sets"][0])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setitem(experiment.PROFILES, "tinylm", SIZES)
        for name in RUNS:
            changes = experiment.PLAN[name] | {"seeds": (0, 1)}
            monkeypatch.setitem(experiment.PLAN, name, changes)
            assert run_command(experiment, name) == 0, name
    found = {name: record_of(folder / name) for name in RUNS}
    if os.environ.get("GOLDEN") == "write":
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps(known | {machine(): found}, indent=1) + "\n")
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_toy_run_leaves_what_it_always_left(records: dict[str, dict], name: str) -> None:
    known = json.loads(FILE.read_text())
    if expected := known.get(machine()):
        found = {part: value for part, value in records[name].items() if part != "means"}
        assert found == {part: expected[name][part] for part in found}
    for expected in known.values():
        for key, means in expected[name]["means"].items():
            found = records[name]["means"][key]
            assert found.keys() == means.keys()
            for metric, value in means.items():
                near = 0.1 if metric.endswith("accuracy") or metric == "primary" else 0.01
                assert found[metric] == pytest.approx(value, rel=0.05, abs=near), (key, metric)
