"""bench/full_size.py at toy size: its table, and its FLOPs against PyTorch's own count."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import experiment
from bench import full_size
from bench.common import run_on
from harness.evaluation.core import prepare_for_sae_bench, shared_core_evals
from harness.language_model import LanguageModel
from harness.training import ActivationStats
from tests.conftest import settings_of
from tests.test_language_model import GEMMA_2_2B


def flops_of(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return full_size.build(full_size.TINY, "cpu")


@pytest.fixture()
def settings(tmp_path: Path) -> experiment.Settings:
    stream = full_size.RandomTokens(full_size.TINY["vocab_size"], 32)
    return dataclasses.replace(
        settings_of(experiment, "full_size", "gemma-2-2b"),
        layers=(0, 2),
        context=32,
        d_sae=48,
        k_min=4,
        batch=64,
        core_text=str(full_size.write_text(tmp_path / "text", stream, 20)),
        core_prompts=2,
        core_reconstruction_batches=2,
        core_sparsity_batches=3,
        probe_ks=(1, 2, 5),
    )


def test_table_has_every_stage_with_finite_figures(capsys) -> None:
    assert full_size.main(["--tiny", "--device", "cpu"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()
            if line.startswith("|")]  # fmt: skip
    assert {len(row) for row in rows} == {7}
    stages = {row[0]: row[1:] for row in rows[2:]}
    assert list(stages) == [
        "build the model", "harvest", "SAE steps", "build its TransformerLens form",
        "core evaluation",
    ]  # fmt: skip
    for name, cells in stages.items():
        figures = [cells[1], cells[5]] if name.startswith("build") else cells
        assert all(math.isfinite(float(figure)) for figure in figures), name
    for name in ("harvest", "SAE steps", "core evaluation"):
        assert float(stages[name][0]) > 0 and float(stages[name][3]) > 0
    assert float(stages["harvest"][0]) == 5 * 128  # contexts that hold 512 tokens beside BOS


def test_dimensions_are_the_published_ones() -> None:
    shared = full_size.GEMMA_2_2B.keys() & GEMMA_2_2B.keys()
    assert full_size.GEMMA_2_2B.keys() - shared == {"tie_word_embeddings"}
    for name in shared:
        assert full_size.GEMMA_2_2B[name] == GEMMA_2_2B[name], name
    lm = full_size.build(full_size.GEMMA_2_2B, "meta")
    assert lm.tokenizer("17 255999")["input_ids"] == [lm.tokenizer.bos_token_id, 17, 255999]
    weights = list(lm.hf.parameters())
    assert sum(weight.numel() for weight in weights) == 2_614_341_888
    assert {weight.dtype for weight in weights} == {torch.bfloat16}


def test_random_activations_are_finite_and_differ(tiny) -> None:
    """Those of the last layer, too, lie in no common direction."""
    tokens_BL = full_size.RandomTokens(500, 64).contexts(4)
    assert (tokens_BL[:, 0] == tiny.tokenizer.bos_token_id).all()
    assert not torch.isin(tokens_BL[:, 1:], torch.tensor(sorted(tiny.special_token_ids))).any()
    x_ND = tiny.activations(tokens_BL, (3,))[0][:, 1:].flatten(0, 1).float()
    assert torch.isfinite(x_ND).all()
    assert (x_ND - x_ND.mean(0)).pow(2).sum() > 0.5 * x_ND.pow(2).sum()
    assert torch.linalg.matrix_rank(x_ND) == 64


def test_flops_are_those_that_pytorch_counts(tiny, settings) -> None:
    config = tiny.hf.config
    tokens_BL = full_size.RandomTokens(500, 32).contexts(4)
    counted = flops_of(lambda: tiny.activations(tokens_BL, settings.layers))
    # Some releases of transformers multiply the rotary angles out, which is next to nothing.
    assert full_size.pass_flops(config, 32, 3, False) * 128 == pytest.approx(counted, rel=1e-3)
    with torch.no_grad():
        counted = flops_of(lambda: tiny.hf(tokens_BL))
    assert full_size.pass_flops(config, 32, 4, True) * 128 == pytest.approx(counted, rel=1e-3)

    acts_LND = torch.stack(tiny.activations(tokens_BL, settings.layers)).flatten(1, 2)
    keys = [(layer, 0) for layer in settings.layers]
    stats = {at: ActivationStats.of(a_ND) for at, a_ND in zip(settings.layers, acts_LND)}
    fixed = dict.fromkeys(keys, {})
    trainers = experiment.new_trainers(run_on(tiny.cast("float32"), settings), stats, fixed)
    at = trainers[0, 0].at(1, 2)
    counted = flops_of(lambda: trainers[0, 0].step(acts_LND[0, :64], at, True))
    assert full_size.step_flops(settings, config.hidden_size) == counted

    saes = {
        str(key): prepare_for_sae_bench(trainer.sae.fold_activation_norm_scaling(), settings)
        for key, trainer in trainers.items()
    }
    model = tiny.bridge()
    counted = flops_of(
        lambda: shared_core_evals(saes, model, settings, experiment.core_metrics)
    )
    assert full_size.core_flops(config, settings) == pytest.approx(counted, rel=1e-3)
