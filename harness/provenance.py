"""What ran and where: config.json, and the code as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import platform
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from harness.call_graph import own_files, reachable_code
from harness.fingerprint import tokens_digest, versions
from harness.interfaces import RunLike
from harness.language_model import model_path
from harness.ledger import LEDGER
from harness.machine import memory_gb, n_cores, processor_name
from harness.start import HERE
from harness.store import digest, sha256_file, write_atomic, write_json
from harness.text import hub_revision
from harness.text_files import BUILT_IN, local_texts


def write_config(run: RunLike) -> None:
    """Writes what ran and where: config.json, and experiment.py beside it.

    Where the project's own code is not that of a commit, code.zip holds it.
    """
    record = config_record(run)
    write_json(run.out_dir / "config.json", record)  # first: by it the folder is known as a run's
    write_atomic(run.out_dir / "experiment.py", run.source)
    if record["git"]["dirty"]:
        write_code(code_texts(run), run.out_dir / "code.zip")


def code_texts(run: RunLike) -> dict[str, str]:
    """The code of a run by its file's name: experiment.py, and the project's own beside it."""
    return {"experiment.py": run.source, **own_files(run.source)}


def config_record(run: RunLike) -> dict[str, Any]:
    """What ran and where, as config.json holds it."""
    settings, texts = run.settings, code_texts(run)
    hashes = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in texts.items()}
    names = settings.model, settings.training_text, settings.core_text, *settings.probe_sets
    for package in {name.split("/")[0] for name in names} & {*BUILT_IN}:
        for file in ("manifest.tsv", "model.safetensors", "tokenizer.json"):
            if (path := HERE / package / file).exists():
                hashes[f"{package}/{file}"] = sha256_file(path)
    return {
        "run": run.out_dir.name,
        "profile": run.profile,
        "settings": dataclasses.asdict(settings),
        "model": settings.model,
        "git": git_state(texts),
        "sha256": hashes,
        "content": content_digests(run),
        "code": evaluation_code(run),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "dtype": settings.lm_dtype,
        "train_dtype": run.train_dtype,
        "device": str(run.device),
        "texts": {name: text._asdict() for name, text in local_texts(settings).items()},
        "hardware": {
            "machine": platform.machine(),
            "processor": processor_name(),
            "cores": n_cores(),
            "memory_gb": round(memory_gb(), 1),
            "gpu": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None,
        },
        "reused": [],  # see write_outcome
    }


def content_digests(run: RunLike) -> dict[str, str]:
    """What stands for the content of what the settings name, by setting, as far as it is known.

    A built-in text is known by its manifest, under "sha256".
    """
    s = run.settings
    tokens = {name: tokens_digest(split) for name, split in run.probe_texts.items()}
    found = {"model": weights_digest_of(s.model), "probe_sets": digest(tokens)}
    for field in ("training_text", "core_text"):
        if (name := getattr(s, field)) not in BUILT_IN:
            found[field] = text_digest(name)
    return {field: content for field, content in found.items() if content}


def weights_in(path: Path) -> list[Path]:
    """The files of a model's weights: in a folder, or the file itself."""
    if path.is_file():
        return [path]
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))


@functools.cache
def weights_digest_of(model: str) -> str | None:
    """Stands for the weights of a language model: its folder's, or those in the hub's cache."""
    path = Path(model_path(model))
    if not path.exists():
        config = try_to_load_from_cache(model, "config.json")
        path = Path(config).parent if isinstance(config, str) else path
    files = [file.resolve() for file in weights_in(path)]
    # The hub's cache calls a large file by its SHA-256.
    hashes = [f.name if re.fullmatch("[0-9a-f]{64}", f.name) else sha256_file(f) for f in files]
    return digest(hashes) if hashes else None


@functools.cache
def text_digest(name: str) -> str | None:
    """Stands for a text: a local file's or folder's files, or the commit that the hub has it at.

    Files of over 1 GB together are told apart by their sizes. None where it can't be had.
    """
    path = Path(name)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    sizes = [file.stat().st_size for file in files]
    contents = [sha256_file(file) for file in files] if sum(sizes) <= 1e9 else sizes
    names = [file.relative_to(path).as_posix() for file in files]
    if files:
        return digest([names, contents])
    with contextlib.suppress(Exception):
        return hub_revision(name)
    return None


def evaluation_code(run: RunLike) -> dict[str, str]:
    """A digest of the code of experiment.py that scores an SAE, by function."""
    functions = {"core_metrics": run.core_metrics, "probe": run.probe}
    return {
        name: digest(reachable_code(run.source, [function], run.settings).parts)
        for name, function in functions.items()
        if function is not None
    }


def git_state(texts: dict[str, str]) -> dict[str, Any]:
    """The commit that the project's folder is at, and whether these files differ from it.

    Args:
        texts: the project's own code, by its file's name below the project's folder.
    Returns:
        {"commit": its hash, or None where there is no git, "dirty": bool}
    """
    try:
        asked = ["git", "-C", str(HERE), "ls-tree", "-r", "-z", "HEAD"]
        commit, listed = (
            subprocess.run(call, capture_output=True, text=True, check=True, timeout=30).stdout
            for call in (["git", "-C", str(HERE), "rev-parse", "HEAD"], asked)
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": True}
    entries = (entry.split("\t", 1) for entry in listed.split("\0") if entry)
    committed = {file: about.split()[2] for about, file in entries}

    def blob(text: str) -> str:
        content = text.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def differs(file: str, text: str) -> bool:  # which was read with "\n" for each end of a line
        return committed.get(file) not in (blob(text), blob(text.replace("\n", "\r\n")))

    dirty = any(differs(file, text) for file, text in texts.items())
    return {"commit": commit.strip(), "dirty": dirty}


def write_code(texts: dict[str, str], path: Path) -> None:
    """Files and their texts as a zip archive, the same bytes for the same texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, text in sorted(texts.items()):
            entry = zipfile.ZipInfo(file.lstrip("/"))  # of a module elsewhere its whole path
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED)


def write_outcome(out_dir: Path, training_tokens: int) -> dict[str, Any]:
    """Adds to config.json what is known in the end, and returns it.

    Args:
        training_tokens: as many as there were; a budget may have shortened the training.
    """
    path = out_dir / "config.json"
    record = json.loads(path.read_text())
    record |= {"reused": LEDGER.reused, "training_tokens": training_tokens}
    write_json(path, record)
    return record
