"""What the harness asks of settings, SAE and trainer: the answer to "what may I rename?"."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class SettingsLike(Protocol):
    """The fields of a run's settings that the harness reads."""

    model: str
    lm_dtype: str
    train_dtype: str
    device: str
    layers: tuple[int, ...]
    hook: str
    context: int
    first_positions: int
    training_text: str
    d_sae: int
    trainer: str
    sparsity_coefficient: float | tuple[float, ...] | None
    density_penalty: float
    k_min: int
    lr: float
    lr_warmup: float
    lr_decay: float
    dead_feature_window: int
    seeds: tuple[int, ...]
    training_tokens: int
    budget_minutes: float | None
    batch: int
    buffer_tokens: int
    harvest_contexts: int
    log_every: int
    track: str
    core_text: str
    core_prompts: int
    core_reconstruction_batches: int
    core_sparsity_batches: int
    probe_sets: tuple[str, ...]
    probe_train: int
    probe_test: int
    probe_ks: tuple[int, ...]
    probe_llm_batch: int
    probe_sae_batch: int
    probe_seed: int
    extra_evals: tuple[str, ...]
    sae_probes_sets: tuple[str, ...]
    compare_to: str
    constants_from_run: str | None


class RunLike(Protocol):
    """What the rooms below `harness.startup` need of a run; see `Run` there."""

    settings: Any
    language_model: Any
    sae_bench_model: Any
    probe_texts: dict[str, list[dict[str, Any]]]
    profile: str
    device: torch.device
    train_dtype: str
    out_dir: Path
    runs: Path
    source: str
    keeps: bool
    core_metrics: Any
    probe: Any
    warnings: tuple[str, ...]
    training_pass: Any


class SAELike(Protocol):
    """An SAE as SAE-Bench calls it: a torch module that holds what it computes with."""

    cfg: Any
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, feature_acts: Tensor) -> Tensor: ...

    def state_dict(self) -> dict[str, Tensor]: ...


class TrainerLike(Protocol):
    """One SAE and what its training needs.

    `at` gives a step what changes as training goes on, in a named tuple; None where the trainer
    has schedules of its own, whose steps can't be captured as a graph and need no `generator`.
    """

    sae: SAELike
    optimizer: torch.optim.Optimizer
    generator: torch.Generator

    def at(self, step: int, n_steps: int) -> Any: ...

    def step(self, x_BD: Tensor, at: Any, log: bool) -> tuple[Tensor, dict | None]: ...
