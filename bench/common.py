"""What the benches share: settings of a run, a run of their own, an SAE in SAELens' form."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from experiment import PLAN, PROFILES, Settings
from harness.evaluation.export import kind_of, write_as_saelens
from harness.peers import SAELensSAE
from harness.settings import settings_of_run
from harness.startup import Run


def settings_of(name: str, profile: str = "tinylm") -> Settings:
    """The settings of a run of the plan; of another name, the profile's."""
    return settings_of_run(name, Settings, PROFILES[profile], PLAN)


def run_on(lm: Any, settings: Settings, **more: Any) -> Run:
    """A run that trains in the precision of a language model, and keeps nothing unless told to."""
    dtype = str(lm.hf.dtype).removeprefix("torch.")
    return Run(settings, lm, **{"device": lm.hf.device, "train_dtype": dtype} | more)


def exported(sae: Any, settings: Settings, layer: int) -> SAELensSAE:
    """A trained SAE, this project's or SAELens', as it comes back from SAELens' files.

    It is in raw units, with decoder rows of unit norm.
    """
    raw = sae.fold_activation_norm_scaling()
    with tempfile.TemporaryDirectory() as folder:
        stored = write_as_saelens(raw, settings, Path(folder), *kind_of(raw))
    return SAELensSAE(stored, settings, layer)
