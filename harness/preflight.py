"""What a run needs, looked at in seconds: access, data sets, disk and memory."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from harness import tracking
from harness.errors import GET_ACCESS, LOG_IN, TRY_TINYLM, ExperimentError
from harness.interfaces import SettingsLike
from harness.language_model import language_model_config
from harness.machine import free_gb
from harness.probe_sets import check_probe_sets, known_to_sae_bench
from harness.text_files import BUILT_IN, form_of

DATA_GB = 5.0  # set aside for the probing data sets, which datasets stores twice
BIOS, REVIEWS = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"
EXTRA_DATA = {  # of the hub, that an evaluation of `extra_evals` reads
    "scr": (BIOS, REVIEWS), "tpp": (BIOS, REVIEWS), "autointerp": ("monology/pile-uncopyrighted",),
}  # fmt: skip


def preflight(settings: SettingsLike, device: torch.device) -> list[str]:
    """Checks what a run needs, in seconds, before anything large is downloaded or computed.

    The hub reachable or the files in its local cache, access to gated weights, every data set
    there, disk and memory enough. What is built in needs none of it.

    Returns:
        lines that say what is needed and what there is.
    Raises:
        ExperimentError: what is missing, and what to do.
    """
    check_probe_sets(settings)
    texts = [settings.training_text, settings.core_text]
    wanted = [("model", settings.model)] if settings.model not in BUILT_IN else []
    wanted += [("dataset", text) for text in texts if text not in BUILT_IN]
    sets = [name for name in settings.probe_sets if name in known_to_sae_bench()]
    wanted += [("dataset", hub_name(name)) for name in sets]
    extra = {name: kind for kind in settings.extra_evals for name in EXTRA_DATA.get(kind, ())}
    wanted += [("dataset", name) for name in extra]
    if not wanted:
        return []
    wanted = list(dict.fromkeys(wanted))
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = dict(zip(wanted, pool.map(lambda kind_name: hub_problem(*kind_name), wanted)))
    for name, kind in extra.items():
        if problem := found["dataset", name]:
            problem = problem.removesuffix(f"; {TRY_TINYLM}")
            found["dataset", name] = f"{problem}; or leave {kind!r} out of extra_evals"
    problems = [problem for problem in found.values() if problem]
    if problems:
        more = f" (and {len(problems) - 1} more of the kind)" if len(problems) > 1 else ""
        raise ExperimentError(problems[0] + more)
    if settings.model in BUILT_IN:
        return []
    parts = memory_estimate(fit_core_batches(settings, device))
    return [check_disk(settings), check_memory(parts, device)]


def hub_name(probe_set: str) -> str:
    """The hub's name of a probing set; SAE-Bench gives parts and variants of one a suffix."""
    return probe_set.split("_class_set")[0].removesuffix("_sentiment")


def hub_problem(kind: str, name: str) -> str | None:
    """Why a model or data set can't be had, in a sentence; None if it can.

    Args:
        kind: "model" or "dataset".
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if kind == "model" and os.path.isfile(name) and not name.endswith(".gguf"):
        return (
            f"the model {name!r} must be a folder or a GGUF file, but is another file: name the "
            "folder that it is in"
        )
    if os.path.exists(name) or in_local_cache(kind, name):
        return None
    if not may_be_on_the_hub(name):
        return (
            f"the {kind} {name!r} must be there, or a name on the hub, but there is no such file "
            "or folder, and the hub has no such names: check it at the top of experiment.py"
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"the {kind} {name!r} is not in the local cache {constants.HF_HOME} and HF_HUB_OFFLINE "
            "is set: unset it, or set HF_HOME to a cache that holds it"
        )
    try:
        huggingface_hub.HfApi().auth_check(name, repo_type=kind)
    except errors.GatedRepoError:
        return (
            f"the {kind} {name!r} is gated and this account has no access: {GET_ACCESS}"
        )
    except errors.RepositoryNotFoundError:
        return (
            f"the {kind} {name!r} is not on the hub, or is private: check the name at the top of "
            f"experiment.py, and {LOG_IN} if it is private"
        )
    except Exception as error:
        return (
            f"the hub can't be reached for the {kind} {name!r} ({type(error).__name__}), and it is "
            f"not in the local cache {constants.HF_HOME}: connect to the network, or set HF_HOME "
            f"to a cache that holds it; {TRY_TINYLM}"
        )
    return None


def may_be_on_the_hub(name: str) -> bool:
    """Whether the hub can have that name, and not that of a file."""
    from huggingface_hub import errors, utils

    try:
        utils.validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return form_of(name) is None


def in_local_cache(kind: str, name: str) -> bool:
    """Whether the hub's cache, or that of `datasets`, holds files of it."""
    import datasets
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    prepared = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    if kind == "model":
        return any(folder.glob("*/*.safetensors"))
    return prepared.is_dir() or any(folder.glob("*/*"))


def memory_estimate(settings: SettingsLike) -> dict[str, float]:
    """Bytes that the parts of a run need on its device, from the shapes of their largest tensors.

    Training and evaluation follow each other: beside the language model and the SAEs, a run needs
    the larger of the two.
    """
    config, parameters = language_model_config(settings.model), n_parameters(settings.model)
    size = {"float32": 4, "bfloat16": 2}
    lm_bytes = size[settings.lm_dtype]
    D, F, V = config.hidden_size, settings.d_sae, config.vocab_size
    # Not every architecture names it; GPT-2's is four times as wide unless it says otherwise.
    wide = getattr(config, "intermediate_size", None) or 4 * D
    n_saes = len(settings.layers) * len(settings.seeds)
    n_tokens = settings.harvest_contexts * settings.context
    core_tokens = settings.core_prompts * settings.context
    return {
        "language model": parameters * lm_bytes,
        # Weights, gradient, two moments and the untrained SAE, in float32.
        "SAEs": n_saes * 2 * D * F * 4 * 5,
        # The buffer, its parts while they are joined; a pass; ten tensors (B, F) of a step.
        "training": 2 * settings.buffer_tokens * len(settings.layers) * D * lm_bytes
        + n_tokens * (3 * wide + 6 * D) * lm_bytes
        + 10 * settings.batch * F * 4,
        # Logits: unchanged, ablated (a layer each), reconstructed, and six terms of the KL.
        "evaluation": core_tokens * V * lm_bytes * (8 + len(settings.layers)),
    }


@functools.cache
def n_parameters(name: str) -> int:
    """Of a language model, from its config.json."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(language_model_config(name))
    return sum(parameter.numel() for parameter in model.parameters())


def fit_core_batches(settings: SettingsLike, device: torch.device) -> SettingsLike:
    """SettingsLike whose core evaluation fits the free memory: smaller batches, and more of them.

    The logits of a batch are core_prompts x context x vocabulary.
    """
    parts = memory_estimate(settings)
    free = free_gb(device) * 1e9 - parts["language model"] - parts["SAEs"]
    fitted = settings
    while parts["evaluation"] > free and fitted.core_prompts % 2 == 0:
        fitted = dataclasses.replace(
            fitted,
            core_prompts=fitted.core_prompts // 2,
            core_reconstruction_batches=fitted.core_reconstruction_batches * 2,
            core_sparsity_batches=fitted.core_sparsity_batches * 2,
        )
        parts = memory_estimate(fitted)
    if fitted != settings:
        print(f"core_prompts: {fitted.core_prompts}, so that the core evaluation fits the memory")
    return fitted


def check_memory(parts: dict[str, float], device: torch.device) -> str:
    """A line with the estimate and what the device has free; ExperimentError if that is less."""
    fixed = parts["language model"] + parts["SAEs"]
    needed = (fixed + max(parts["training"], parts["evaluation"])) / 1e9
    free = free_gb(device)
    listed = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items())
    line = f"memory, estimated in GB: {listed}; {needed:.1f} at once, {free:.1f} free on {device}"
    if needed > free:
        lower = "batch or buffer_tokens" if parts["training"] > parts["evaluation"] else (
            "core_prompts"
        )
        raise ExperimentError(f"{line}: lower {lower}, or free memory on the device")
    return line


def check_disk(settings: SettingsLike) -> str:
    """A line with the space needed and free; ExperimentError if that is less."""
    from huggingface_hub import constants

    cached = os.path.isdir(settings.model) or in_local_cache("model", settings.model)
    # The hub stores Gemma-2-2b in float32.
    needed = (0 if cached else 4 * n_parameters(settings.model) / 1e9) + DATA_GB
    place = Path(constants.HF_HOME)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    line = f"disk: up to {needed:.1f} GB for weights and data sets, {free:.1f} free in {place}"
    if needed > free:
        raise ExperimentError(f"{line}: free some, or set HF_HOME to a folder on a larger disk")
    return line


def tracker(settings: SettingsLike) -> str:
    """What a run is watched in: "wandb", "tensorboard", or "", nothing.

    Raises:
        ExperimentError: there is no such tracker, it isn't installed, or W&B knows no key.
    """
    kind = settings.track or os.environ.get("SAE_TRACK", "")
    if kind not in tracking.STARTS:
        raise ExperimentError(
            f"SAE_TRACK must be one of {', '.join(map(repr, tracking.STARTS))}, but is {kind!r}"
        )
    if kind and importlib.util.find_spec(kind) is None:
        raise ExperimentError(
            f"track={kind!r} takes the package {kind}, which is not installed: "
            f"`pip install {kind}`, or set track to ''"
        )
    if kind == "wandb" and tracking.lacks_login():
        raise ExperimentError(
            "track='wandb' needs an API key of W&B, and there is none: `wandb login`, or "
            "WANDB_MODE=offline, which writes to the cache alone"
        )
    return kind
