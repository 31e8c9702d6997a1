"""All that a result depends on: code, settings, texts, weights, versions and machine."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.checkpoints import plain_attributes
from harness.interfaces import SAELike, SettingsLike
from harness.language_model import LanguageModel, model_path
from harness.machine import processor_name
from harness.start import ENVIRON_AT_START, HERE, SOURCES_AT_START
from harness.store import ACTIVATIONS_GB, digest, sha256_file

NUMERIC = ("ATEN", "CUBLAS", "CUDA", "KMP", "MKL", "NVIDIA_TF32", "OMP", "PYTORCH", "TORCH")
VERSIONED = (
    "torch", "transformers", "sae-bench", "sae-lens", "transformer-lens", "datasets",
    "numpy", "scikit-learn", "scipy", "tokenizers", "safetensors", "beartype", "jaxtyping",
)  # fmt: skip


def without_docstrings(tree: ast.AST) -> ast.AST:
    """The tree, its docstrings taken out; comments are in no tree."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = body[1:]
    return tree


def names_in(node: ast.AST) -> set[str]:
    """Every name and attribute that code mentions, or may mention in a string."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    found |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    strings = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return found | {s for s in strings if isinstance(s, str) and s.isidentifier()}


def does_nothing(node: ast.stmt) -> bool:
    """Whether reading a statement only binds a name to a function or to a plain value."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        values = [*node.args.defaults, *filter(None, node.args.kw_defaults), *node.decorator_list]
    elif isinstance(node, ast.Assign) and [type(t) for t in node.targets] == [ast.Name]:
        values = [node.value]
    else:
        return False
    try:
        for value in values:
            if not isinstance(value, ast.Lambda):
                ast.literal_eval(value)
        return True
    except (ValueError, TypeError):
        return False


BY_MAIN = {"evaluate", "core_metrics", "probe", "write_records", "PROFILES", "PLAN"}  # what MAIN may mention freely


def hash_definitions(
    source: str, without: Sequence[str] = ()
) -> tuple[dict[str, str], set[str], dict[str, set[str]]]:
    """What experiment.py does, by function: hashes of its syntax, no comments or docstrings.

    SettingsLike' fields, PROFILES and PLAN are left out, for what they say is in a run's settings.

    Args:
        without: the first words of the titles of ruled sections to leave out. In doubt their code
            stays: what does more, when the file is read, than to define a function or a constant,
            and what other sections mention, but for MAIN's call of `evaluate` and `write_records`.
    Returns:
        {function, method or class: hash}, all names that this code mentions, and those that each
        part mentions.
    """
    lines = source.splitlines()
    titles = [
        (number, lines[number].removeprefix("# "))
        for number in range(1, len(lines) - 1)
        if lines[number - 1].startswith("# ===") and lines[number + 1].startswith("# ===")
    ]
    tree = without_docstrings(ast.parse(source))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    counted: list[tuple[str, ast.stmt]] = []
    waiting: list[tuple[str, ast.stmt]] = []
    mentioned: set[str] = set()
    for node in tree.body:
        section = next((title for at, title in reversed(titles) if at < node.lineno), "")
        word = section.split(" ")[0].rstrip(":,")
        target = getattr(node, "target", (getattr(node, "targets", None) or [None])[0])
        name = getattr(node, "name", getattr(target, "id", f"the top level of {section}"))
        if word == "SETTINGS" and name == "SettingsLike":  # the values of its fields are settings
            node.body = [part for part in node.body if not isinstance(part, ast.AnnAssign)]
        listed = word == "SETTINGS" and name in ("PROFILES", "PLAN")
        if listed or (word in without and does_nothing(node)):
            waiting.append((name, node))
            continue
        counted.append((name, node))
        mentioned |= names_in(node) - (BY_MAIN if word == "MAIN" else set())
    while called := [(name, node) for name, node in waiting if name in mentioned]:
        waiting = [pair for pair in waiting if pair not in called]
        counted += called
        mentioned = mentioned.union(*(names_in(node) for _, node in called))
    parts: dict[str, str] = {}
    mentions: dict[str, set[str]] = {}

    def add(name: str, node: ast.AST) -> None:
        parts[name] = digest(parts.get(name, "") + ast.dump(node))
        begins = isinstance(node, ast.If) and "__name__" in names_in(node.test)
        mentions[name] = mentions.get(name, set()) | (set() if begins else names_in(node))

    for name, node in counted:
        for part in list(getattr(node, "body", [])) if isinstance(node, ast.ClassDef) else []:
            if isinstance(part, definitions):
                add(f"{name}.{part.name}", part)
                node.body.remove(part)
        add(name, node)
    return parts, set().union(*mentions.values()), mentions


def reachable_code(source: str, roots: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """As `hash_definitions`, of what functions or classes mention, directly or by way of others.

    Statements that do something when the file is read are always among it.
    """
    parts, names, mentions = hash_definitions(source)
    defined = {part.split(".")[0] for part in mentions}
    reached: set[str] = {part for part in defined if part.startswith("the top level of")}
    waiting = [*roots, *reached]
    while waiting:
        here = waiting.pop()
        for part, mentioned in mentions.items():
            if part.split(".")[0] == here:
                waiting += mentioned & defined - reached - {here}
                reached |= mentioned & defined | {here}
    found = {p: h for p, h in parts.items() if p.split(".")[0] in reached}
    return found, set().union(*(mentions[part] for part in found))


EVALUATION_ONLY = ("core_", "probe_", "compare_to", "description")  # beginnings of settings' names


def training_key(
    settings: SettingsLike,
    source: str,
    fixed: dict[tuple[int, int], dict[str, float]],
    train_dtype: str,
    device: torch.device,
) -> dict[str, Any]:
    """All that a training depends on, as JSON.

    Args:
        source: of experiment.py. fixed: the constants among tau_sel, tau_pen and gamma.
    """
    code, names, _ = hash_definitions(source, without=("EVALUATION", "RECORDS"))
    chosen = {
        field: value
        for field, value in dataclasses.asdict(settings).items()
        if not field.startswith(EVALUATION_ONLY) or field in names
    }
    return {
        "code of": code,
        "setting": chosen,
        "constants": [[list(key), values] for key, values in fixed.items()],
        "dtype": train_dtype,
        **environment_fingerprint(settings, source, device),
    } | text_identity(settings.training_text)


def activations_key(
    settings: SettingsLike, source: str, train_dtype: str, lm: LanguageModel
) -> dict[str, Any] | None:
    """All that harvested activations depend on, as JSON; None where they would take too much."""
    n_bytes = settings.training_tokens * len(settings.layers) * lm.hf.config.hidden_size * (
        2 if train_dtype == "bfloat16" else 4
    )
    if n_bytes > ACTIVATIONS_GB * 1e9:
        return None
    code, names = reachable_code(source, ["ActivationBuffer"])
    fields = {"layers", "context", "harvest_contexts", "lm_dtype", "device"} | names
    return {
        "code of": code,
        "setting": {f: v for f, v in dataclasses.asdict(settings).items() if f in fields},
        "dtype": train_dtype,
        **environment_fingerprint(settings, source, lm.hf.device),
    } | text_identity(settings.training_text)


def evaluation_keys(
    saes: dict[str, SAELike], settings: SettingsLike, source: str, roots: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """By SAE, all that a part of its evaluation depends on, as JSON; texts of probing excepted.

    Args:
        roots: the functions that this part of the evaluation begins with.
    """
    code, names = reachable_code(source, ("SAELike", *roots))
    chosen = {
        field: value
        for field, value in dataclasses.asdict(settings).items()
        if field in names or field.startswith(("core_", "probe_", "lm_dtype", "context", "device"))
    }
    device = next(iter(saes.values())).W_enc.device
    common = {"code of": code, "setting": chosen, **environment_fingerprint(settings, source, device)}
    common |= text_identity(settings.core_text)
    return {
        name: {**common, "SAE": weights_digest(sae), "layer": sae.cfg.hook_name,
               "attributes": repr(sorted(plain_attributes(sae).items()))}
        for name, sae in saes.items()
    }  # fmt: skip


def weights_digest(module: nn.Module) -> str:
    """Stands for the exact values of a module's parameters and buffers."""
    content = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        content.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()


def environment_fingerprint(settings: SettingsLike, source: str, device: torch.device) -> dict[str, Any]:
    """What else results depend on, bit for bit: other files, model, versions, the machine."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "file": own_modules(source),
        "model": model_identity(settings.model),
        "version of": versions(),
        "device": torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "variable": {
            name: value
            for name, value in sorted(ENVIRON_AT_START.items())
            if name.startswith(NUMERIC) or name in variables_in(source)
        },
    }


@functools.cache
def variables_in(source: str) -> set[str]:
    """The environment variables that code reads by a name in quotes."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Call, ast.Subscript)):
            what = ast.unparse(node.func if isinstance(node, ast.Call) else node.value)
            if what.endswith(("environ", "environ.get", "getenv")):
                given = node.args[:1] if isinstance(node, ast.Call) else [node.slice]
                found |= {g.value for g in given if isinstance(g, ast.Constant)}
    return found


@functools.cache
def own_modules(source: str) -> dict[str, str]:
    """Hashes of the files beside this one that code imports, directly or by way of each other."""
    found: dict[str, str] = {}
    waiting = [source]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in {name.split(".")[0] for name in names}:
                files = [HERE / f"{name}.py", *sorted((HERE / name).glob("**/*.py"))]
                for file in files if name not in ("", "experiment", "tests") else []:
                    if file.is_file() and str(file.relative_to(HERE)) not in found:
                        text = SOURCES_AT_START.get(file) or file.read_text(encoding="utf-8")
                        tree = without_docstrings(ast.parse(text))
                        found[str(file.relative_to(HERE))] = digest(ast.dump(tree))
                        waiting.append(text)
    return found


def own_files(source: str) -> dict[str, str]:
    """The texts of the files that `own_modules` hashes, by their names."""
    return {
        file: SOURCES_AT_START.get(HERE / file) or (HERE / file).read_text(encoding="utf-8")
        for file in own_modules(source)
    }


def text_identity(name: str) -> dict[str, Any]:
    """What tells a text from another: its name; of tinylm's corpus and of a folder, the files."""
    if name == "tinylm":
        files = ("manifest.tsv", "corpus.py", "tokenizer.json")
        return {"text": [sha256_file(HERE / "tinylm" / file) for file in files]}
    folder = Path(name)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return {"text": [name, [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]]}


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def forward_key(settings: SettingsLike, device: torch.device, **more: Any) -> dict[str, Any]:
    """What passes of the language model in an evaluation depend on beside their text, as JSON."""
    chosen = ("lm_dtype", "layers", "context", "core_prompts", "probe_llm_batch")
    return {
        "setting": {field: getattr(settings, field) for field in chosen},
        **environment_fingerprint(settings, "import harness", device),
        **more,
    }


def tokens_digest(split: list[dict[str, Any]]) -> str:
    """Stands for the token ids of a probing data set, {class: {"input_ids": (N, L)}} per split."""
    tokens = hashlib.sha256()
    for part in split:
        for label, encoded in part.items():
            tokens.update(f"{label} {tuple(encoded['input_ids'].shape)} ".encode())
            tokens.update(encoded["input_ids"].cpu().numpy().tobytes())
    return tokens.hexdigest()


def llm_probes_key(
    dataset: str,
    layer: int,
    split: list[dict[str, Any]],
    settings: SettingsLike,
    source: str,
    probe: str,
) -> dict[str, Any]:
    """All that the language model's probes of a layer and a data set depend on.

    Args:
        split: {class: {"input_ids": (N, L)}}, for train and for test.
        source: of experiment.py. probe: the name of its function that trains and tests them.
    """
    code, names = reachable_code(source, [probe])
    chosen = ("lm_dtype", "probe_ks", "probe_seed", "probe_llm_batch", "probe_sae_batch")
    device = next(iter(split[0].values()))["input_ids"].device
    return {
        "dataset": dataset,
        "layer": layer,
        "tokens": tokens_digest(split),
        "code of": code,
        "setting": {
            field: value for field, value in dataclasses.asdict(settings).items()
            if field in chosen or field in names
        },
        **environment_fingerprint(settings, source, device),
    }


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
