"""All that a result depends on: code, objects, settings, texts, versions, the machine.

A key holds what was seen to be used (`observation`), and what code may lead to (`call_graph`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from harness import language_model, machine, steering, tokenizer
from harness.call_graph import EXPERIMENT, Code, reachable_code
from harness.identity import describe, patched, process_state
from harness.interfaces import RunLike, SettingsLike
from harness.language_model import model_path
from harness.machine import processor_name
from harness.observation import OBSERVED, content, name_of
from harness.start import ENVIRON_AT_START, HERE
from harness.store import sha256_file
from harness.syntax import ALL
from harness.text_files import BUILT_IN, stamps

NUMERIC = (
    "ATEN", "CUBLAS", "CUDA", "KMP", "MKL", "NVIDIA_TF32", "OMP", "OPENBLAS", "PYTORCH", "TORCH",
)  # fmt: skip
WHICH_CARD = "CUDA_VISIBLE_DEVICES"  # a cluster's next start may have another of the same kind
LOOK_UP = {"environ", "getenv", "environb"}  # names with which code reads variables
VERSIONED = (
    "torch", "transformers", "sae-bench", "sae-lens", "transformer-lens", "datasets",
    "numpy", "scikit-learn", "scipy", "tokenizers", "safetensors", "beartype", "jaxtyping",
)  # fmt: skip
BENEATH = (language_model, machine, steering, tokenizer)  # all results stand on them: hashed whole


def result_key(
    kind: str,
    run: RunLike,
    objects: dict[str, Any],
    others: Iterable[object] = (),
    with_callers: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """All that results of a kind depend on, as JSON.

    Args:
        kind: as `Observer.computing` is told when they are computed.
        objects: by name, what they are computed by and from: each counts by its code and by what
            it is. others: that count by their code alone.
        more: what else they depend on, as JSON.
        with_callers: also what the functions that call the objects do before.
    Raises:
        ExperimentError: the code of an object stands in no file.
    """
    new = patched()
    roots = [*objects.values(), *others, *BENEATH, *new.values()]
    seen = kind in OBSERVED.ran
    # Of what has not been seen, all counts.
    ran = OBSERVED.ran[kind] if seen else {str(EXPERIMENT): {ALL}}
    code = reachable_code(run.source, roots, run.settings, with_callers, ran)
    settings, read = vars(run.settings), OBSERVED.read_for(kind)
    fields = {field.name for field in dataclasses.fields(run.settings)}
    if seen:
        named = {field for field in fields if f".{field}" in code.names}
        fields = named | OBSERVED.settings.get(kind, set())
    files = files_named(code.strings)
    OBSERVED.key_made(
        kind,
        *(("file read", name_of(Path(os.path.abspath(file)))) for file in files),
        *(("variable read", name) for name in looked_up(code)),
        *(("module imported", file) for file in code.files),
    )
    return {
        "code of": code.parts,
        "value of": code.values,
        "object": {name: describe(thing, run.settings, code.home)
                   for name, thing in objects.items()},
        "setting": {name: describe(value) if not_json(value) else value
                    for name, value in settings.items()
                    if name in fields or name not in {*run.settings.__dataclass_fields__}},
        "in the place of": {name: describe(thing) for name, thing in new.items()},
        **read,
        "file read": read["file read"] | files,
        **environment_fingerprint(run.settings, code, run.device),
        **more,
    }  # fmt: skip


def not_json(value: Any) -> bool:
    """Whether a setting's value is to be described, since JSON hasn't its kind."""
    plain = (bool, int, float, str, type(None))
    return not isinstance(value, plain) and not (
        isinstance(value, (tuple, list)) and all(isinstance(item, plain) for item in value)
    )


def looked_up(code: Code) -> set[str]:
    """What code may look up among the environment variables: all strings in it, where it does."""
    return code.strings if code.names & LOOK_UP else set()


def files_named(strings: set[str]) -> dict[str, str | None]:
    """The content of files that strings in code name, from here or from the project's folder."""
    found = {}
    for string in strings:
        if 3 < len(string) < 300 and "\n" not in string and Path(string).suffix:
            for path in {Path(string), HERE / string}:
                with contextlib.suppress(OSError, ValueError):
                    if path.is_file() and path.suffix != ".py":
                        found[string] = content(os.fspath(path))
    return found


def environment_fingerprint(
    settings: SettingsLike, code: Code, device: torch.device
) -> dict[str, Any]:
    """What else results depend on, bit for bit: other files, model, versions, the machine."""
    on_gpu = torch.device(device).type == "cuda"
    reads = looked_up(code)
    return {
        "file": code.files,
        "model": model_identity(settings.model),
        "version of": versions(),
        "device": torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "switch": process_state(),
        "argument": sys.argv if "argv" in code.names else [],
        "variable": {
            name: value
            for name, value in sorted(ENVIRON_AT_START.items())
            if name.startswith(NUMERIC) and name != WHICH_CARD or name in reads and name != "_"
        },
    }


def tokens_digest(split: list[dict[str, Any]]) -> str:
    """Stands for the token ids of a probing data set, {class: {"input_ids": (N, L)}} per split."""
    tokens = hashlib.sha256()
    for part in split:
        for label, encoded in part.items():
            tokens.update(f"{label} {tuple(encoded['input_ids'].shape)} ".encode())
            tokens.update(encoded["input_ids"].cpu().numpy().tobytes())
    return tokens.hexdigest()


def text_identity(name: str) -> dict[str, Any]:
    """What tells a text from another: its name; of built-in corpora and what lies here, files."""
    if name in BUILT_IN:
        files = [HERE / name / file for file in ("manifest.tsv", "corpus.py", "tokenizer.json")]
        return {"text": [sha256_file(file) for file in files if file.exists()]}
    return {"text": [name, stamps(name)]}


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

    path, kinds = Path(model_path(name)), (".safetensors", ".gguf", ".json")
    if path.exists():
        files = [path] if path.is_file() else sorted(path.iterdir())
        files = [file for file in files if file.suffix in kinds]
        return " ".join(sha256_file(file) for file in files)
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent.name if isinstance(config, str) else name
