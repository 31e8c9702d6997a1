"""docs/metrics.md: what figures of the same name are, computed on one SAE and the same tokens.

The SAE is no trained one, so that it is the same everywhere: its features are the principal
directions of activations and their opposites, of which each token keeps 32.
Packages that are not installed are skipped. `METRICS=print pytest -s tests/test_metrics.py` prints
the table's lines.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import experiment
from bench.common import run_on, settings_of
from harness.evaluation import core as evaluation_core
from harness.evaluation.core import prepare_for_sae_bench, shared_core_evals
from harness.evaluation.export import export_saes
from harness.language_model import load_language_model
from harness.text import TokenStream, documents
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "metrics.md").read_text()
LAYER, K, F, N_CONTEXTS = 3, 32, 512, 16
HOOK = f"blocks.{LAYER}.hook_resid_post"


def heading(line: str) -> str:
    return line.split("|")[1].strip()


ROWS = {  # of the table, by its first cell
    heading(line): [cell.strip(" *") for cell in line.strip().strip("|").split("|")[1:]]
    for line in PAGE.split("## One SAE, the same tokens")[1].split("\n## ")[0].splitlines()
    if line.startswith("| ") and not line.startswith(("| package", "| ---"))
}


class Tokens:
    """A store of the same contexts, in batches of any size, from the beginning after a reset."""

    context_size = 128

    def __init__(self, tokens_BL: Tensor) -> None:
        self.tokens_BL, self.at = tokens_BL, 0

    def get_batch_tokens(self, n_prompts: int) -> Tensor:
        batch_BL = self.tokens_BL[self.at : self.at + n_prompts]
        assert len(batch_BL) == n_prompts
        self.at += n_prompts
        return batch_BL

    def reset_input_dataset(self) -> None:
        self.at = 0


@dataclasses.dataclass(frozen=True, eq=False)
class One:
    """An SAE, as it is and as SAELens reads it, its model and settings, and the same tokens."""

    sae: Any
    stored: Any
    model: Any
    settings: Any
    tokens_BL: Tensor
    x_ND: Tensor  # the activations that count
    special: set[int]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> One:
    from sae_lens import SAE

    lm = load_language_model("tinylm")
    with TokenStream(documents("tinylm", "heldout"), lm.tokenizer, 128) as stream:
        train_BL, tokens_BL = stream.contexts(16 + N_CONTEXTS).split([16, N_CONTEXTS])
    (train_BLD,), (x_BLD,) = (lm.activations(part, (LAYER,)) for part in (train_BL, tokens_BL))
    settings = dataclasses.replace(
        settings_of("run_1"), layers=(LAYER,), d_sae=F, k_min=K
    )
    train_ND = train_BLD[:, 1:].flatten(0, 1)
    mean_D = train_ND.mean(0)
    sae = experiment.new_sae(settings, LAYER, 0, (mean_D, 1.0), {}, K)
    directions_DD = torch.linalg.svd(train_ND - mean_D, full_matrices=False).Vh
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([directions_DD, -directions_DD]))
        sae.W_enc.copy_(sae.W_dec.T)
    folder = tmp_path_factory.mktemp("metrics")
    texts = [{"": {"input_ids": train_BL}}, {}]
    run = run_on(lm, settings, out_dir=folder, probe_texts={"": texts})
    export_saes(run, {(LAYER, 0): sae})
    stored = SAE.load_from_disk(folder / "sae" / f"layer_{LAYER}" / "seed_0")
    x_ND = x_BLD[~torch.isin(tokens_BL, torch.tensor(sorted(lm.special_token_ids)))]
    return One(sae, stored, lm.bridge(), settings, tokens_BL, x_ND, lm.special_token_ids)


@functools.cache
def of_core(one: One, prompts: int = 8, constant: bool = False) -> dict[str, float]:
    """SAE-Bench's core figures of an SAE, and this project's own.

    Args:
        constant: of one that predicts the mean of the tokens, whatever they are.
    """
    sae, n_batches = one.sae, N_CONTEXTS // prompts
    if constant:
        n_batches, stats = 2, (one.x_ND.mean(0), 1.0)
        sae = experiment.new_sae(one.settings, LAYER, 0, stats, {}, k=1)
        with torch.no_grad():
            sae.W_enc.zero_()
            sae.b_enc.fill_(-1.0)
            sae.b_enc[0] = 1e-6  # SAE-Bench divides by how often features fire
    settings = dataclasses.replace(
        one.settings, core_prompts=prompts, core_reconstruction_batches=n_batches,
        core_sparsity_batches=n_batches,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(evaluation_core, "core_store", lambda *_: Tokens(one.tokens_BL))
        saes, metrics = {"sae": prepare_for_sae_bench(sae, settings)}, experiment.core_metrics
        scalars, _, own, *_ = shared_core_evals(saes, one.model, settings, metrics)["sae"]
    return {name: v for group in scalars.values() for name, v in group.items()} | own


def held(row: str, *values: float | None) -> None:
    """The row of docs/metrics.md holds these values; None where it has none."""
    if os.environ.get("METRICS") == "print":
        shown = ["" if v is None else f"{v:.4g}" if abs(v) >= 100 else f"{v:.4f}" for v in values]
        print("|", row, "|", " | ".join(shown), "|")
        return
    for cell, value in zip(ROWS[row], values, strict=True):
        assert (cell == "") == (value is None), row
        if value is not None:  # processors round otherwise, and ties of top-k fall otherwise
            assert float(cell) == pytest.approx(value, rel=0.01, abs=0.002), (row, cell, value)


def test_our_figures(one) -> None:
    own = of_core(one)
    held("this project: 1 − `fvu`, `mse_per_token`, `ce_loss_score`",
         1 - own["fvu"], own["mse_per_token"], own["ce_loss_score"], own["l0"])  # fmt: skip
    residual_ND = one.x_ND - one.sae(one.x_ND).detach()
    variance = (one.x_ND - one.x_ND.mean(0)).pow(2).sum()
    assert own["fvu"] == pytest.approx(float(residual_ND.pow(2).sum() / variance), rel=1e-4)
    mean = of_core(one, constant=True)
    held("this project, a constant: the mean", 1 - mean["fvu"], mean["mse_per_token"], None, None)
    assert mean["fvu"] == pytest.approx(1.0, abs=1e-4)


def test_sae_lens(one) -> None:
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    def of(**options: Any) -> list[float]:
        config = EvalConfig(
            batch_size_prompts=8, n_eval_reconstruction_batches=2,
            n_eval_sparsity_variance_batches=2, compute_ce_loss=True, compute_l2_norms=True,
            compute_sparsity_metrics=True, compute_variance_metrics=True,
        )  # fmt: skip
        store = Tokens(one.tokens_BL)
        groups, _ = run_evals(one.stored, store, one.model, ActivationScaler(), config, **options)
        found = {name: value for group in groups.values() for name, value in group.items()}
        return [found[name] for name in ("explained_variance", "mse", "ce_loss_score", "l0")]

    held("sae-lens, its evaluation", *of())
    held("sae-lens, special tokens replaced and scored", *of(exclude_special_tokens=False))


def test_sae_bench(one) -> None:
    names = "explained_variance", "mse", "ce_loss_score", "l0"
    for prompts in (8, 2):
        found = of_core(one, prompts)
        held(f"sae-bench core, {prompts} prompts a batch", *(found[name] for name in names))
    found = of_core(one, constant=True)
    held("sae-bench core, a constant: the mean", found["explained_variance"], None, None, None)
    from sae_bench.evals.core import main as core

    def in_units(scale: float) -> float:
        """`explained_variance` where activations are measured in other units."""

        def run_with_cache(tokens_BL: Tensor, **_: Any) -> tuple[None, dict[str, Tensor]]:
            return None, {HOOK: scale * one.model.run_with_cache(tokens_BL)[1][HOOK]}

        sae = prepare_for_sae_bench(one.sae, one.settings)
        with torch.no_grad():
            for bias in (sae.b_enc, sae.b_dec):
                bias.mul_(scale)
            model = SimpleNamespace(run_with_cache=run_with_cache)
            switches = dict.fromkeys(
                ("compute_l2_norms", "compute_sparsity_metrics", "compute_variance_metrics",
                 "compute_featurewise_density_statistics"), True)  # fmt: skip
            metrics, _ = core.get_sparsity_and_variance_metrics(
                sae, model, Tokens(one.tokens_BL), n_batches=2, eval_batch_size_prompts=8,
                model_kwargs={}, ignore_tokens=one.special, **switches,
            )  # fmt: skip
        return metrics["explained_variance"]

    for unit, scale in (("a tenth of the unit", 10.0), ("ten units", 0.1)):
        row = f"sae-bench core, activations measured in {unit}"
        held(row, in_units(scale), None, None, None)


def test_sparsify(one) -> None:
    sparsify = pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(k=K, num_latents=F, activation="topk")
    coder = sparsify.SparseCoder(one.x_ND.shape[1], config)
    with torch.no_grad():
        coder.encoder.weight.copy_(one.sae.W_enc.T)
        coder.encoder.bias.copy_(one.sae.b_enc)
        coder.W_dec.copy_(one.sae.W_dec)
        coder.b_dec.copy_(one.sae.b_dec)
        fvus = [float(coder(part_ND).fvu) for part_ND in one.x_ND.split(512)]
        held("sparsify, 1 − FVU of one batch", 1 - float(coder(one.x_ND).fvu), None, None, K)
        mean = sum(fvus) / len(fvus)
        held("sparsify, 1 − FVU, the mean of batches of 512", 1 - mean, None, None, K)


def test_dictionary_learning(one) -> None:
    pytest.importorskip("dictionary_learning")
    from dictionary_learning.evaluation import evaluate
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    coder = AutoEncoderTopK(one.x_ND.shape[1], F, K)
    with torch.no_grad():
        coder.encoder.weight.copy_(one.sae.W_enc.T)
        coder.encoder.bias.copy_(one.sae.b_enc)
        coder.decoder.weight.copy_(one.sae.W_dec.T)
        coder.b_dec.copy_(one.sae.b_dec)

    def of() -> list[float]:
        found = evaluate(coder, iter([one.x_ND]))
        return [found["frac_variance_explained"], found["l2_loss"], None, found["l0"]]

    held("dictionary_learning, its evaluation of one batch; the error is a norm", *of())
    decode = coder.decode
    coder.decode = lambda f: decode(f) + 2.0
    held("dictionary_learning, 2 added to every output", *of())


def test_versions_are_those_that_the_page_names() -> None:
    """Those that are installed here."""
    named = dict(re.findall(r"([\w-]+) (\d+\.\d+\.\d+)", PAGE))
    assert named.keys() == {"sae-lens", "sae-bench", "eai-sparsify", "dictionary_learning"}
    for name, version in named.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        assert installed.split("+")[0] == version, name
