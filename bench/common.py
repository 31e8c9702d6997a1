"""What the benches share: the settings of a run, and a run of their own on a language model."""

from __future__ import annotations

from typing import Any

from experiment import PLAN, PROFILES, Settings
from harness.settings import settings_of_run
from harness.startup import Run


def settings_of(name: str, profile: str = "tinylm") -> Settings:
    """The settings of a run of the plan; of another name, the profile's."""
    return settings_of_run(name, Settings, PROFILES[profile], PLAN)


def run_on(lm: Any, settings: Settings, **more: Any) -> Run:
    """A run that trains in the precision of a language model, and keeps nothing unless told to."""
    dtype = str(lm.hf.dtype).removeprefix("torch.")
    return Run(settings, lm, **{"device": lm.hf.device, "train_dtype": dtype} | more)
