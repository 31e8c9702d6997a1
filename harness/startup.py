"""From settings to a run that can be run: pre-flight, models, texts, the rehearsal."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness.console import Progress, print_line, redirect_output
from harness.errors import GET_ACCESS, LOG_IN, TRY_TINYLM, ExperimentError
from harness.evaluation.core import prepare_for_sae_bench, run_core
from harness.evaluation.probing import pooled_features, probe, read_probe_texts
from harness.fingerprint import environment_fingerprint, hash_definitions
from harness.fused_gemma import for_harvest
from harness.interfaces import SAELike, SettingsLike
from harness.language_model import LanguageModel, language_model_config, load_language_model
from harness.machine import free_gb, make_reproducible
from harness.store import cached
from harness.verdict import PRIMARY_KS

DATA_GB = 5.0  # set aside for the probing data sets, which datasets stores twice


def choose_profile(profiles: Iterable[str]) -> str:
    """SAE_PROFILE, or gemma-2-2b where CUDA is available, tinylm elsewhere."""
    profile = os.environ.get("SAE_PROFILE")
    if not profile:
        return "gemma-2-2b" if torch.cuda.is_available() else "tinylm"
    if profile not in profiles:
        raise ExperimentError(
            f"SAE_PROFILE must be {' or '.join(profiles)}, but is {profile!r}: change or unset it"
        )
    return profile


def checked_settings(name: str, make: Callable[..., SettingsLike], chosen: dict) -> SettingsLike:
    """The settings of the run called `name`: `make` is the class, `chosen` sets its fields.

    Raises:
        ExperimentError: a field that doesn't exist, or a value that can't be.
    """
    try:
        settings = make(**chosen)
    except TypeError as error:
        raise ExperimentError(
            f"PLAN[{name!r}] sets what SettingsLike has no field for ({error}): "
            "see the list at the top of experiment.py"
        ) from error
    check_settings(name, settings)
    return settings


def check_settings(name: str, s: SettingsLike) -> None:
    """Holds the settings of the run called `name` against what can be.

    Raises:
        ExperimentError: the first field that breaks its rule, or whose value is of a wrong type.
    """
    counts = (
        "k_min d_sae training_tokens batch buffer_tokens harvest_contexts log_every "
        "dead_feature_window core_prompts core_reconstruction_batches core_sparsity_batches probe_train "
        "probe_test probe_llm_batch probe_sae_batch"
    )
    rules: list[tuple[str, Callable[[Any], bool], str]] = [
        *((field, lambda v: v >= 1 and v == int(v), "a count above 0") for field in counts.split()),
        *((field, lambda v: v > 0, "above 0") for field in ("lr", "theta_lr", "k_start_factor")),
        *(
            (field, lambda v: 0 <= v <= 1, "between 0 and 1")
            for field in ("curriculum_fraction", "lr_warmup", "lr_decay")
        ),
        *((field, lambda v: v >= 0, "0 or above") for field in ("reg_lambda", "density_penalty")),
        *(
            (field, lambda v: v is None or v > 0, "None or above 0")
            for field in ("tau_sel", "tau_pen", "budget_minutes")
        ),
        ("gamma", lambda v: v is None or v >= 0, "None, or 0 or above"),
        ("threshold_rate", lambda v: 0 < v <= 1, "above 0, and at most 1"),
        ("activation", lambda v: v in ("topk", "jumprelu"), "'topk' or 'jumprelu'"),
        (
            "activation",
            lambda v: v == "topk" or (s.curriculum and s.loss_variant == "contrastive"),
            "'topk' where nothing is selected (no curriculum, or loss_variant='as_written')",
        ),
        ("k_min", lambda v: v <= s.d_sae, f"at most d_sae = {s.d_sae}"),
        ("context", lambda v: v >= 2, "at least 2"),
        ("probe_train", lambda v: v >= 4, "at least 4: two texts of a class"),
        ("probe_test", lambda v: v >= 4, "at least 4: two texts of a class"),
        ("training_tokens", lambda v: v >= s.batch, f"at least one batch of {s.batch}"),
        ("buffer_tokens", lambda v: v >= s.batch, f"at least one batch of {s.batch}"),
        (
            "loss_variant",
            lambda v: v in ("contrastive", "as_written"),
            "'contrastive' or 'as_written'",
        ),
        ("resample", lambda v: isinstance(v, bool), "True or False"),
        ("curriculum", lambda v: isinstance(v, bool), "True or False"),
        ("device", lambda v: v in ("auto", "cpu", "cuda"), "'auto', 'cpu' or 'cuda'"),
        ("lm_dtype", lambda v: v in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
        (
            "train_dtype",
            lambda v: v in ("auto", "float32", "bfloat16"),
            "'auto', 'float32' or 'bfloat16'",
        ),
        ("seeds", lambda v: v and len(set(v)) == len(v) and min(v) >= 0, "different, 0 or above"),
        ("layers", lambda v: v and len(set(v)) == len(v) and min(v) >= 0, "different, 0 or above"),
        (
            "probe_sets",
            lambda v: v and all(n in ("tinylm/A", "tinylm/B") or n[:7] != "tinylm/" for n in v),
            "one or more data sets; of tinylm, 'tinylm/A' or 'tinylm/B'",
        ),
        (
            "probe_ks",
            lambda v: set(PRIMARY_KS) <= set(v) and 1 <= min(v) <= max(v) <= s.d_sae,
            "between 1 and d_sae, with 1, 2 and 5 among them",
        ),
    ]
    for field, holds, expected in rules:
        value = getattr(s, field)
        try:
            passed = holds(value)
        except (TypeError, ValueError):
            passed = False
        if not passed:
            raise ExperimentError(
                f"{name}: {field} must be {expected}, but is {value!r}: "
                "change it at the top of experiment.py"
            )


def check_layers(settings: SettingsLike, lm: LanguageModel) -> None:
    """ExperimentError where the language model has fewer blocks than the settings name."""
    n_layers = lm.hf.config.num_hidden_layers
    if max(settings.layers) >= n_layers:
        raise ExperimentError(
            f"layers must be below {n_layers}, the number of blocks of {settings.model}, but are "
            f"{settings.layers}: change them at the top of experiment.py"
        )


def preflight(settings: SettingsLike, device: torch.device) -> list[str]:
    """Checks what a run needs, in seconds, before anything large is downloaded or computed.

    The hub reachable or the files in its local cache, access to gated weights, every data set
    there, disk and memory enough. tinylm needs none of it.

    Returns:
        lines that say what is needed and what there is.
    Raises:
        ExperimentError: what is missing, and what to do.
    """
    texts = [settings.training_text, settings.core_text, *settings.probe_sets]
    wanted = [("model", settings.model)] if settings.model != "tinylm" else []
    wanted += [("dataset", hub_name(text)) for text in texts if not text.startswith("tinylm")]
    if not wanted:
        return []
    wanted = list(dict.fromkeys(wanted))
    with ThreadPoolExecutor(len(wanted)) as pool:
        problems = [p for p in pool.map(lambda kind_name: hub_problem(*kind_name), wanted) if p]
    if problems:
        more = f" (and {len(problems) - 1} more of the kind)" if len(problems) > 1 else ""
        raise ExperimentError(problems[0] + more)
    if settings.model == "tinylm":
        return []
    parts = memory_estimate(fit_core_batches(settings, device))
    return [check_disk(settings), check_memory(parts, device)]


def hub_name(text: str) -> str:
    """The hub's name of a data set; SAE-Bench gives parts and variants of one a suffix."""
    return text.split("_class_set")[0].removesuffix("_sentiment")


def hub_problem(kind: str, name: str) -> str | None:
    """Why a model or data set can't be had, in a sentence; None if it can.

    Args:
        kind: "model" or "dataset".
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if os.path.isdir(name) or in_local_cache(kind, name):
        return None
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
    n_saes = len(settings.layers) * len(settings.seeds)
    n_tokens = settings.harvest_contexts * settings.context
    core_tokens = settings.core_prompts * settings.context
    return {
        # With its embedding twice: TransformerLens scales it.
        "language model": (parameters + V * D) * lm_bytes,
        # Weights, gradient, two moments and the untrained twin, in float32.
        "SAEs": n_saes * 2 * D * F * 4 * 5,
        # The buffer, its parts while they are joined; a pass; ten tensors (B, F) of a step.
        "training": 2 * settings.buffer_tokens * len(settings.layers) * D * lm_bytes
        + n_tokens * (3 * config.intermediate_size + 6 * D) * lm_bytes
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


def evaluation_seconds(
    saes: dict[Any, SAELike], model: Any, texts: dict[str, list], settings: SettingsLike
) -> float:
    """How long the evaluation of SAEs and of their untrained twins will take, from a sample.

    Times a few batches of core, and the first `probe_sae_batch` texts of a class of one data set;
    what is downloaded meanwhile doesn't count.
    """
    ready = {
        (key, twin): prepare_for_sae_bench(sae.fold_activation_norm_scaling(), settings)
        for key, sae in saes.items()
        for twin in (False, True)
    }
    batches = settings.core_reconstruction_batches, settings.core_sparsity_batches

    def core_seconds(reconstruction: int, sparsity: int) -> float:
        sample = dataclasses.replace(
            settings,
            core_reconstruction_batches=min(reconstruction, batches[0]),
            core_sparsity_batches=min(sparsity, batches[1]),
        )
        began = time.monotonic()
        run_core(ready, model, sample, lambda n: None)
        return time.monotonic() - began

    core_seconds(1, 1)  # reads the text's beginning, and warms up
    one, more_sparsity, more_reconstruction = (
        core_seconds(1, 1), core_seconds(1, 4), core_seconds(3, 1)
    )  # fmt: skip
    total = batches[0] * max(more_reconstruction - one, 0.0) / 2
    total += batches[1] * max(more_sparsity - one, 0.0) / 3

    def size(split: dict[str, Any]) -> int:
        return sum(len(encoded["input_ids"]) for encoded in split.values())

    _, test = next(iter(texts.values()))
    some = slice(settings.probe_sae_batch)
    sample = {label: {"input_ids": encoded["input_ids"][some]} for label, encoded in test.items()}
    began = time.monotonic()
    ((_, features),) = pooled_features([sample], model, ready, settings)
    n_texts = sum(size(train) + size(test) for train, test in texts.values())
    total += (time.monotonic() - began) * n_texts / size(sample)
    state = torch.get_rng_state()
    began = time.monotonic()
    probe(next(iter(features.values())), next(iter(features.values())), "sae", settings.probe_ks)
    torch.set_rng_state(state)
    n_trained = sum(size(train) for train, _ in texts.values())
    return total + (time.monotonic() - began) * len(ready) * n_trained / size(sample)


class Ready(NamedTuple):
    """What a run works with: see `prepare`."""

    settings: SettingsLike  # core's batches as they fit into the GPU's memory
    lm: LanguageModel
    training_lm: LanguageModel  # in the form and precision for harvesting
    model: Any  # in TransformerLens' form, for SAE-Bench
    probe_texts: dict[str, list[dict]]  # by data set: token ids of the train and the test split


def prepare(settings: SettingsLike, device: torch.device, train_dtype: str, log: Path) -> Ready:
    """Everything that a run loads, after a look at what it needs, which is printed.

    Raises:
        ExperimentError: something isn't there, isn't accessible or doesn't fit.
    """
    with redirect_output(log):
        needs = preflight(settings, device)
    print("\n".join(needs), end="\n" if needs else "")
    if needs:
        settings = fit_core_batches(settings, device)
    make_reproducible()
    with redirect_output(log):
        lm = load_language_model(settings.model, settings.lm_dtype, device)
        check_layers(settings, lm)
        probe_texts = read_probe_texts(settings, lm.tokenizer, device)
        model = lm.hooked()
        training_lm = for_harvest(lm, train_dtype, settings.harvest_contexts, settings.context)
    return Ready(settings, lm, training_lm, model, probe_texts)


def rehearse(
    experiment: Callable[[SettingsLike, dict, Path, None], None],
    settings: SettingsLike,
    texts: dict[str, list[dict]],
    source: str,
    log: Path,
) -> None:
    """The whole run in miniature, before anything is paid for: what an edit breaks shows here.

    Two steps of training, two contexts of each core batch, one probing set of 8 texts per class,
    all layers, at most two seeds. Nothing of it is shown or kept, but for that it passed.

    Args:
        experiment: runs settings on probing texts, into a folder; its key is None: keep nothing.
    """
    dataset, split = next(iter(texts.items()))
    small = dataclasses.replace(
        settings,
        probe_sets=(dataset,),
        seeds=settings.seeds[:2],
        training_tokens=2 * settings.batch,
        buffer_tokens=2 * settings.batch,
        budget_minutes=None,
        dead_feature_window=settings.batch,
        log_every=1,
        core_prompts=2,
        core_reconstruction_batches=1,
        core_sparsity_batches=1,
    )
    # Trained and tested on the same: SAE-Bench's probes fail where no text is told right.
    few = 2 * [{label: {"input_ids": e["input_ids"][:8]} for label, e in split[0].items()}]
    device = next(iter(split[0].values()))["input_ids"].device
    key = {
        "code of": hash_definitions(source)[0],
        "setting": dataclasses.asdict(settings),
        **environment_fingerprint(settings, source, device),
    }

    def in_miniature() -> float:
        began, stage = time.monotonic(), Progress.stage_now
        Progress.prefix = "rehearsal: "
        try:
            with tempfile.TemporaryDirectory() as folder, redirect_output(log):
                experiment(small, {dataset: few}, Path(folder) / "run_rehearsal", None)
        finally:
            Progress.prefix = ""
        Progress.stage_now = stage
        seconds = time.monotonic() - began
        print_line(f"rehearsal: the whole run in miniature passed in {seconds:.0f} s")
        return seconds

    cached("rehearsal", key, in_miniature)
