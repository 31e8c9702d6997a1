"""From settings to a run that can be run: pre-flight, models, texts, the rehearsal."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from harness import command
from harness.call_graph import hash_definitions
from harness.checkpoints import Checkpoints
from harness.command import check_out_dir, prepare_out_dir
from harness.console import Progress, print_line, redirect_output, rehearsal
from harness.errors import GET_ACCESS, LOG_IN, TRY_TINYLM, ExperimentError
from harness.evaluation.probe_texts import read_probe_texts
from harness.fingerprint import (
    activations_key,
    environment_fingerprint,
    evaluation_keys,
    training_key,
)
from harness.fused_gemma import FusedLanguageModel, for_harvest
from harness.interfaces import SAELike, SettingsLike
from harness.language_model import LanguageModel, language_model_config, load_language_model
from harness.machine import choose_device, choose_train_dtype, free_gb, make_reproducible
from harness.records import check_complete, constants, read_final_info, write_config
from harness.settings import checked_settings
from harness.start import source_at_start
from harness.store import LEDGER, cached

DESCRIPTION = "Train and score a parametric contrastive SAE."
DATA_GB = 5.0  # set aside for the probing data sets, which datasets stores twice


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is ready: its settings, and all that was loaded for it.

    Attributes:
        settings: with core's batches as they fit the memory.
        device: of the language model and the SAEs. train_dtype: of training's matrix products.
        language_model: in the form and precision for harvesting.
        sae_bench_model: the same in TransformerLens' form.
        probe_texts: by data set, the token ids of its train and its test split.
        out_dir: the folder that it leaves; runs: the folder where others stand beside it.
        log: what libraries print. source: of experiment.py, as it runs.
        keeps: whether results are kept for the next run; in a rehearsal they are not.
    """

    settings: SettingsLike
    language_model: LanguageModel | FusedLanguageModel
    sae_bench_model: Any = None
    probe_texts: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    profile: str = "tinylm"
    device: torch.device = torch.device("cpu")
    train_dtype: str = "float32"
    out_dir: Path = Path("run")
    runs: Path = Path()
    log: Path = Path(os.devnull)
    source: str = ""
    keeps: bool = False

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Progress]:
        """A stage with its progress, in which what libraries print goes to the log."""
        with Progress(name, total, unit) as progress, redirect_output(self.log):
            yield progress

    def constants(self, names: tuple[str, ...]) -> dict[tuple[int, int], dict[str, float]]:
        """By layer and seed: which of these scalars are constants, and their values."""
        return constants(self, names)

    def activations_key(self, buffer: type) -> dict[str, Any] | None:
        """All that the activations of a class of buffers depend on; None: they are not kept."""
        if not self.keeps:
            return None
        given = self.settings, self.source, buffer, self.train_dtype, self.language_model
        return activations_key(*given)

    def checkpoints(self, *roots: object, constants: dict) -> Checkpoints:
        """Where a training saves itself.

        Args:
            roots: the functions and classes that train. constants: by layer and seed, of the loss.
        """
        if not self.keeps:
            return Checkpoints(None)
        roots = *roots, self.language_model
        given = self.settings, self.source, roots, constants, self.train_dtype, self.device
        return Checkpoints(training_key(*given))

    def evaluation_keys(self, saes: dict[str, SAELike], *roots: object) -> dict[str, dict] | None:
        """By SAE, all that a part of its evaluation depends on; None: it is not kept.

        Args:
            roots: the functions that this part begins with.
        """
        if not self.keeps:
            return None
        roots = *roots, self.sae_bench_model
        return evaluation_keys(saes, self.settings, self.source, roots)

    def in_miniature(self, folder: Path) -> Run:
        """The same run at a size that takes seconds, into another folder; nothing of it is kept.

        Two steps of training, two contexts of each core batch, one probing set of 8 texts per
        class, all layers, at most two seeds.
        """
        settings = self.settings
        dataset, split = next(iter(self.probe_texts.items()))
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
        changes = dict(settings=small, probe_texts={dataset: few}, out_dir=folder, keeps=False)
        return dataclasses.replace(self, **changes)


def launch(
    main: Callable[[Run], None],
    settings: type[SettingsLike],
    profiles: dict[str, dict[str, Any]],
    plan: dict[str, dict[str, Any]],
    argv: list[str] | None = None,
) -> int:
    """The command: one run, from its settings to its records, after a rehearsal of all of it.

    Args:
        main: the experiment. settings: the class; profiles and plan set its fields.
    Returns:
        the exit status. On failure the end of standard error says why, in words.
    """
    file = Path(inspect.getfile(main)).resolve()
    source = source_at_start(file)

    def attempt(out_dir: Path, log: Path) -> None:
        check_out_dir(out_dir)
        profile = choose_profile(profiles)
        chosen = profiles[profile] | plan.get(out_dir.name, {})
        run = set_up(checked_settings(out_dir.name, settings, chosen), profile, out_dir, log,
                     source, out_dir.name in plan)  # fmt: skip
        rehearse(main, run)
        if moved := prepare_out_dir(out_dir):
            print(moved)
        perform(main, run)

    return command.main(attempt, argv, DESCRIPTION, memory_settings)


def perform(main: Callable[[Run], None], run: Run) -> None:
    """The experiment, and what surrounds it in every run."""
    write_config(run)
    main(run)
    check_complete(run.out_dir)


def set_up(
    settings: SettingsLike, profile: str, out_dir: Path, log: Path, source: str, planned: bool
) -> Run:
    """Everything that a run loads, after a look at what it needs, which is printed.

    Raises:
        ExperimentError: something isn't there, isn't accessible or doesn't fit.
    """
    device = choose_device(settings, profile)
    train_dtype = choose_train_dtype(settings, device)
    print(f"profile: {profile} on {device}")
    if not planned:
        print(f"{out_dir.name}: not in PLAN, defaults")
    if settings.constants_from_run is not None:
        read_final_info(out_dir.parent / settings.constants_from_run)
    with redirect_output(log):
        needs = preflight(settings, device)
    print("\n".join(needs), end="\n" if needs else "")
    if needs:
        settings = fit_core_batches(settings, device)
    make_reproducible()
    with redirect_output(log):
        lm = load_language_model(settings.model, settings.lm_dtype, device)
        check_layers(settings, lm)
        return Run(
            settings=settings,
            probe_texts=read_probe_texts(settings, lm.tokenizer, device),
            sae_bench_model=lm.hooked(),
            language_model=for_harvest(
                lm, train_dtype, settings.harvest_contexts, settings.context
            ),
            profile=profile,
            device=device,
            train_dtype=train_dtype,
            out_dir=out_dir,
            runs=out_dir.parent,
            log=log,
            source=source,
            keeps=True,
        )


def rehearse(main: Callable[[Run], None], run: Run) -> None:
    """The whole run in miniature, before anything is paid for: what an edit breaks shows here.

    Nothing of it is shown or kept, but for that it passed.
    """
    code = hash_definitions(run.source, run.settings)
    key = {
        "code of": code.parts,
        "setting": dataclasses.asdict(run.settings),
        **environment_fingerprint(run.settings, code, run.device),
    }

    def in_miniature() -> float:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, rehearsal(run.log), LEDGER.rehearsal():
            perform(main, run.in_miniature(Path(folder) / "run_rehearsal"))
        seconds = time.monotonic() - began
        print_line(f"rehearsal: the whole run in miniature passed in {seconds:.0f} s")
        return seconds

    cached("rehearsal", key, in_miniature)


def memory_settings(stage: str) -> str:
    """The settings that take less memory in a stage."""
    settings = {
        "train": "batch, harvest_contexts or buffer_tokens",
        "core evaluation": "core_prompts",
        "sparse probing": "probe_llm_batch or probe_sae_batch",
    }
    return settings.get(stage.split(": ")[-1], "d_sae or the number of layers and seeds")


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
