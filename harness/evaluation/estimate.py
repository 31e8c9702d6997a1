"""How long an evaluation will take, from a sample of it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from harness.evaluation.core import RunEvals, prepare_for_sae_bench, shared_core_evals
from harness.evaluation.probe_features import probing_features
from harness.evaluation.probing import Probe, drawn_from
from harness.interfaces import RunLike, SAELike
from harness.ranks import RANKS


def evaluation_seconds(
    run: RunLike, saes: dict[Any, SAELike], run_evals: RunEvals, probe: Probe
) -> float:
    """How long the evaluation of folded SAEs, and of as many untrained ones, will take.

    What is downloaded meanwhile doesn't count.

    Args:
        run_evals, probe: see `shared_core_evals` and `shared_probing`.
    """
    ready = {
        f"{key}{kind}": prepare_for_sae_bench(sae, run.settings)
        for key, sae in saes.items() for kind in ("", " untrained")
    }  # fmt: skip
    own = RANKS.own(ready)
    return core_seconds(run, ready, run_evals) + RANKS.by_first(probing_seconds, run, own, probe)


def core_seconds(run: RunLike, saes: dict[str, SAELike], run_evals: RunEvals) -> float:
    """Of core evaluation, from a few batches."""
    n_reconstruction = run.settings.core_reconstruction_batches
    n_sparsity = run.settings.core_sparsity_batches

    def seconds(reconstruction: int, sparsity: int) -> float:
        sample = dataclasses.replace(
            run.settings,
            core_reconstruction_batches=min(reconstruction, n_reconstruction),
            core_sparsity_batches=min(sparsity, n_sparsity),
        )
        began = time.monotonic()
        shared_core_evals(saes, run.sae_bench_model, sample, run_evals)
        return time.monotonic() - began

    seconds(1, 1)  # reads the text's beginning, and warms up
    one, more_sparsity, more_reconstruction = seconds(1, 1), seconds(1, 4), seconds(3, 1)
    return (
        n_reconstruction * max(more_reconstruction - one, 0.0) / 2
        + n_sparsity * max(more_sparsity - one, 0.0) / 3
    )


def probing_seconds(run: RunLike, saes: dict[str, SAELike], probe: Probe) -> float:
    """Of sparse probing: from the first texts of each class of a data set, and one SAE's probes."""
    def size(split: dict[str, Any]) -> int:
        return sum(len(encoded["input_ids"]) for encoded in split.values())

    _, test = next(iter(run.probe_texts.values()))
    some = slice(run.settings.probe_sae_batch)
    sample = {label: {"input_ids": encoded["input_ids"][some]} for label, encoded in test.items()}
    began = time.monotonic()
    _, features = probing_features([sample], run.sae_bench_model, saes, run.settings)
    seconds_features = time.monotonic() - began
    (classes,) = next(iter(features.values()))
    state = torch.get_rng_state()  # which training draws from
    began = time.monotonic()
    drawn_from(0, probe, (classes, classes), "sae", run.settings.probe_ks, seed=0)
    seconds_probes = (time.monotonic() - began) * len(saes)
    torch.set_rng_state(state)
    n_trained = sum(size(train) for train, _ in run.probe_texts.values())
    n_texts = n_trained + sum(size(test) for _, test in run.probe_texts.values())
    return (seconds_features * n_texts + seconds_probes * n_trained) / size(sample)
