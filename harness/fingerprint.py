"""All that a result depends on: code, settings, texts, weights, versions and machine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import language_model, machine
from harness.call_graph import Code, reachable_code
from harness.checkpoints import plain_attributes
from harness.interfaces import SAELike, SettingsLike
from harness.language_model import model_path
from harness.machine import processor_name
from harness.start import ENVIRON_AT_START, HERE
from harness.store import ACTIVATIONS_GB, sha256_file

NUMERIC = (
    "ATEN", "CUBLAS", "CUDA", "KMP", "MKL", "NVIDIA_TF32", "OMP", "OPENBLAS", "PYTORCH", "TORCH",
)  # fmt: skip
VERSIONED = (
    "torch", "transformers", "sae-bench", "sae-lens", "transformer-lens", "datasets",
    "numpy", "scikit-learn", "scipy", "tokenizers", "safetensors", "beartype", "jaxtyping",
)  # fmt: skip
EVALUATION_ONLY = ("core_", "probe_", "compare_to", "description")  # beginnings of settings' names
BENEATH = (language_model, machine)  # modules that every result stands on: hashed whole


def training_key(
    settings: SettingsLike,
    source: str,
    roots: Iterable[object],
    constants: dict[tuple[int, int], dict[str, float]],
    train_dtype: str,
    device: torch.device,
) -> dict[str, Any]:
    """All that a training depends on, as JSON.

    Args:
        source: of experiment.py.
        roots: what trains: functions, classes, and the language model.
        constants: by layer and seed, those among tau_sel, tau_pen and gamma.
    """
    code = reachable_code(source, [*roots, *BENEATH], settings, with_callers=True)
    chosen = {
        field: value
        for field, value in dataclasses.asdict(settings).items()
        if not field.startswith(EVALUATION_ONLY) or f".{field}" in code.names
    }
    return {
        "code of": code.parts,
        "setting": chosen,
        "constants": [[list(key), values] for key, values in constants.items()],
        "dtype": train_dtype,
        **environment_fingerprint(settings, code, device),
    } | text_identity(settings.training_text)


def activations_key(
    settings: SettingsLike, source: str, buffer_class: type, train_dtype: str, lm: Any
) -> dict[str, Any] | None:
    """All that harvested activations depend on, as JSON; None where they would take too much.

    Args:
        buffer_class: that of the buffer at hand. lm: the language model that it reads.
    """
    n_bytes = settings.training_tokens * len(settings.layers) * lm.hf.config.hidden_size * (
        2 if train_dtype == "bfloat16" else 4
    )
    if n_bytes > ACTIVATIONS_GB * 1e9:
        return None
    code = reachable_code(source, [buffer_class, lm, *BENEATH], settings, with_callers=True)
    fields = {"layers", "context", "harvest_contexts", "lm_dtype", "device"}
    return {
        "code of": code.parts,
        "setting": {
            field: value
            for field, value in dataclasses.asdict(settings).items()
            if field in fields or f".{field}" in code.names
        },
        "dtype": train_dtype,
        **environment_fingerprint(settings, code, lm.hf.device),
    } | text_identity(settings.training_text)


def evaluation_keys(
    saes: dict[str, SAELike], settings: SettingsLike, source: str, roots: Iterable[object]
) -> dict[str, dict[str, Any]]:
    """By SAE, all that a part of its evaluation depends on, as JSON; texts of probing excepted.

    Args:
        roots: the functions that this part begins with, and the language model.
    """
    code = reachable_code(source, [*roots, *saes.values(), *BENEATH], settings)
    chosen = {
        field: value
        for field, value in dataclasses.asdict(settings).items()
        if f".{field}" in code.names
        or field.startswith(("core_", "probe_", "lm_dtype", "context", "device"))
    }
    device = next(iter(saes.values())).W_enc.device
    common = {"code of": code.parts, "setting": chosen}
    common |= environment_fingerprint(settings, code, device) | text_identity(settings.core_text)
    return {
        name: {**common, "SAE": weights_digest(sae), "layer": sae.cfg.hook_name,
               "attributes": repr(sorted(plain_attributes(sae).items()))}
        for name, sae in saes.items()
    }  # fmt: skip


def forward_key(
    settings: SettingsLike, device: torch.device, roots: Iterable[object], **more: Any
) -> dict[str, Any]:
    """What passes of the language model in an evaluation depend on beside their text, as JSON.

    Args:
        roots: the function that makes them, and the language model.
    """
    chosen = ("lm_dtype", "layers", "context", "core_prompts", "probe_llm_batch")
    return {
        "setting": {field: getattr(settings, field) for field in chosen},
        **environment_fingerprint(settings, reachable_code(None, [*roots, *BENEATH]), device),
        **more,
    }


def llm_probes_key(
    dataset: str,
    layer: int,
    split: list[dict[str, Any]],
    settings: SettingsLike,
    source: str,
    roots: Iterable[object],
) -> dict[str, Any]:
    """All that the language model's probes of a layer and a data set depend on.

    Args:
        split: {class: {"input_ids": (N, L)}}, for train and for test.
        source: of experiment.py. roots: the functions that make them, and the language model.
    """
    code = reachable_code(source, [*roots, *BENEATH], settings)
    chosen = ("lm_dtype", "probe_ks", "probe_seed", "probe_llm_batch", "probe_sae_batch")
    device = next(iter(split[0].values()))["input_ids"].device
    return {
        "dataset": dataset,
        "layer": layer,
        "tokens": tokens_digest(split),
        "code of": code.parts,
        "setting": {
            field: value
            for field, value in dataclasses.asdict(settings).items()
            if field in chosen or f".{field}" in code.names
        },
        **environment_fingerprint(settings, code, device),
    }


def environment_fingerprint(
    settings: SettingsLike, code: Code, device: torch.device
) -> dict[str, Any]:
    """What else results depend on, bit for bit: other files, model, versions, the machine."""
    on_gpu = torch.device(device).type == "cuda"
    reads = code.names if code.names & {".environ", ".getenv", "environ", "getenv"} else ()
    return {
        "file": code.files,
        "model": model_identity(settings.model),
        "version of": versions(),
        "device": torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "variable": {
            name: value
            for name, value in sorted(ENVIRON_AT_START.items())
            if name.startswith(NUMERIC) or f".{name}" in reads
        },
    }


def weights_digest(module: nn.Module) -> str:
    """Stands for the exact values of a module's parameters and buffers."""
    content = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        content.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()


def tokens_digest(split: list[dict[str, Any]]) -> str:
    """Stands for the token ids of a probing data set, {class: {"input_ids": (N, L)}} per split."""
    tokens = hashlib.sha256()
    for part in split:
        for label, encoded in part.items():
            tokens.update(f"{label} {tuple(encoded['input_ids'].shape)} ".encode())
            tokens.update(encoded["input_ids"].cpu().numpy().tobytes())
    return tokens.hexdigest()


def text_identity(name: str) -> dict[str, Any]:
    """What tells a text from another: its name; of tinylm's corpus and of a folder, the files."""
    if name == "tinylm":
        files = ("manifest.tsv", "corpus.py", "tokenizer.json")
        return {"text": [sha256_file(HERE / "tinylm" / file) for file in files]}
    folder = Path(name)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return {"text": [name, [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]]}


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def model_identity(name: str) -> str:
    """What tells a model's weights from others: their commit on the hub, or their SHA-256."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(model_path(name))
    if folder.is_dir():
        files = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".json")]
        return " ".join(sha256_file(file) for file in files)
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent.name if isinstance(config, str) else name
