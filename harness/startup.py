"""From settings to a run that can be run: pre-flight, models, texts, the rehearsal."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import inspect
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from harness import command
from harness.call_graph import hash_definitions
from harness.checkpoints import Checkpoints
from harness.command import check_out_dir, prepared_out_dir
from harness.console import STAGE, Progress, print_line, redirect_output, rehearsal
from harness.errors import ExperimentError
from harness.evaluation.core import RunEvals
from harness.evaluation.estimate import evaluation_seconds
from harness.evaluation.extra import check_extra_evals
from harness.evaluation.probe_texts import read_probe_texts
from harness.evaluation.probing import Probe
from harness.evaluation.stock import check_letters
from harness.fingerprint import environment_fingerprint, result_key, text_identity
from harness.fused_model import FusedLanguageModel, for_harvest
from harness.generators import generators_of, seed_generators
from harness.identity import changed, remember, remember_libraries
from harness.interfaces import SAELike, SettingsLike
from harness.isolation import isolated, own_digits
from harness.language_model import LanguageModel, load_language_model
from harness.ledger import LEDGER
from harness.machine import choose_device, choose_train_dtype, make_reproducible
from harness.observation import OBSERVED, now
from harness.partials import scratch_dir
from harness.preflight import fit_core_batches, preflight, tracker
from harness.provenance import config_record, write_config
from harness.ranks import RANKS
from harness.records import check_complete, constants, read_final_info
from harness.reference import check_references, complete_folder
from harness.rehearsal import TrainingPass, resume_problems
from harness.settings import choose_profile, settings_of_run
from harness.start import source_at_start
from harness.store import cached, digest
from harness.text_checks import look_at_texts
from harness.tracking import TRACKER

DESCRIPTION = "Train and score a parametric contrastive SAE."


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is ready: its settings, and all that was loaded for it.

    Attributes:
        settings: with core's batches as they fit the memory.
        device: of the language model and the SAEs. train_dtype: of training's matrix products.
        language_model: in the form and precision for harvesting.
        sae_bench_model: TransformerLens' bridge to it, which SAE-Bench calls.
        probe_texts: by data set, the token ids of its train and its test split.
        out_dir: the folder that it leaves; runs: the folder where others stand beside it.
        log: what libraries print. source: of experiment.py, as it runs.
        core_metrics, probe: what evaluates an SAE, for an estimate of how long that takes.
        keeps: whether results are kept for the next run; in a rehearsal they are not.
        resumes: whether a training may be saved. warnings: for the records, of the rehearsal.
        training_pass: of a rehearsal; see `harness.rehearsal`.
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
    core_metrics: RunEvals | None = None
    probe: Probe | None = None
    keeps: bool = False
    resumes: bool = True
    warnings: tuple[str, ...] = ()
    training_pass: TrainingPass | None = None

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Progress]:
        """A stage with its progress, in which what libraries print goes to the log."""
        seed_generators(name)  # as it doesn't depend on what was drawn before
        with Progress(name, total, unit) as progress, redirect_output(self.log):
            yield progress

    def evaluation_seconds(self, saes: dict[Any, SAELike]) -> float:
        """How long the evaluation of folded SAEs, and of as many untrained ones, will take."""
        if self.core_metrics is None or self.probe is None:
            return 0.0
        with redirect_output(self.log), generators_of("estimate", kept={}):
            return evaluation_seconds(self, saes, self.core_metrics, self.probe)

    def constants(self, names: tuple[str, ...]) -> dict[tuple[int, int], dict[str, float]]:
        """By layer and seed: which of these scalars are constants, and their values."""
        return RANKS.by_first(constants, self, names)

    def key_parts(self) -> tuple[Any, ...]:
        """What computes with a run can take from it, beside files: see `harness.identity`."""
        return self.settings, self.language_model, self.sae_bench_model, self.train_dtype

    def checkpoints(self, constants: dict, **objects: Any) -> Checkpoints:
        """Where a training saves itself.

        Args:
            constants: by layer and seed, of the loss. objects: by name, what trains: functions,
                and the buffer that they are given.
        """
        if not self.keeps or not self.resumes or not RANKS.first:
            return Checkpoints(None, given=self, rehearsal=self.training_pass)
        objects |= {"language model": self.language_model}
        more = {
            "constants": [[list(key), values] for key, values in constants.items()],
            "dtype": self.train_dtype,
            **text_identity(self.settings.training_text),
        }
        key = result_key("training", self, objects, with_callers=True, **more)
        return Checkpoints(key, given=self)

    def in_miniature(self, folder: Path) -> Run:
        """The same run at a size that takes seconds, into another folder; nothing of it is kept.

        Three steps of training in two fillings of the buffer, two contexts of each core batch, one
        probing set of 8 texts per class, all layers, at most two seeds.
        """
        settings = self.settings
        dataset, split = next(iter(self.probe_texts.items()))
        small = dataclasses.replace(
            settings,
            probe_sets=(dataset,),
            seeds=settings.seeds[:2],
            training_tokens=3 * settings.batch,
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
    core_metrics: RunEvals,
    probe: Probe,
    argv: list[str] | None = None,
) -> int:
    """The command: one run, from its settings to its records, after a rehearsal of all of it.

    Args:
        main: the experiment. settings: the class; profiles and plan set its fields.
        core_metrics, probe: see `Run`; given here, since a training doesn't depend on their code.
    Returns:
        the exit status. On failure the end of standard error says why, in words.
    """
    if not gc.isenabled():  # see harness.start; no collection looks through what is there by now
        gc.freeze()
        gc.enable()
    file = Path(inspect.getfile(main)).resolve()
    source, OBSERVED.home = source_at_start(file), file

    def attempt(out_dir: Path, log: Path) -> None:
        check_out_dir(out_dir)
        profile = choose_profile(profiles, out_dir.parent, file.parent)
        with contextlib.ExitStack() as around:
            if not RANKS.first:  # it writes where nobody reads
                out_dir = around.enter_context(scratch_dir()) / out_dir.name
            chosen = settings_of_run(out_dir.name, settings, profiles[profile], plan)
            run = set_up(chosen, profile, out_dir, log, source, out_dir.name in plan)
            run = dataclasses.replace(run, core_metrics=core_metrics, probe=probe)
            if RANKS.first:
                check_references(run, config_record(run))
            run = rehearse(main, run)
            if moved := around.enter_context(prepared_out_dir(out_dir)):
                print(moved)
            perform(main, run)

    return command.main(attempt, argv, DESCRIPTION, memory_settings)


def perform(main: Callable[[Run], None], run: Run, whole: bool = True) -> None:
    """The experiment, and what surrounds it in every run. `whole`: with its records."""
    if whole and RANKS.first:
        write_config(run)
    seed_generators("main")
    STAGE.begin("train")
    kind = tracker(run.settings) if RANKS.first and not LEDGER.rehearsing else ""
    with TRACKER.watching(kind, f"{run.profile}/{run.out_dir.name}", run.settings):
        main(run)
    if RANKS.first:
        check_complete(run.out_dir)


def set_up(
    settings: SettingsLike, profile: str, out_dir: Path, log: Path, source: str, planned: bool
) -> Run:
    """Everything that a run loads, after a look at what it needs, which is printed.

    Raises:
        ExperimentError: something isn't there, isn't accessible or doesn't fit.
    """
    tracker(settings)
    device = choose_device(settings, profile)
    RANKS.use(device)
    train_dtype = choose_train_dtype(settings, device)
    print(f"profile: {profile} on {device}" + (f", {RANKS.of} ranks" if RANKS.of > 1 else ""))
    if not planned:
        print(f"{out_dir.name}: not in PLAN, defaults")
    if settings.constants_from_run is not None and RANKS.first:
        name, runs = settings.constants_from_run, out_dir.parent
        read_final_info(complete_folder(name, out_dir, runs) or runs / name)
    with redirect_output(log):
        needs = RANKS.by_first(preflight, settings, device)
        check_extra_evals(settings)
    print("\n".join(needs), end="\n" if needs else "")
    if needs:
        settings = RANKS.by_first(fit_core_batches, settings, device)
    make_reproducible()
    RANKS.by_first(look_at_texts, settings)
    with redirect_output(log):
        models = RANKS.after_first(load_models, settings, train_dtype, device)
        RANKS.by_first(check_letters, settings, models["sae_bench_model"], device)
        given = settings, models["language_model"].tokenizer, device
        return Run(
            settings=settings,
            probe_texts=read_probe_texts(*given),
            **models,
            profile=profile,
            device=device,
            train_dtype=train_dtype,
            out_dir=out_dir,
            runs=out_dir.parent,
            log=log,
            source=source,
            keeps=True,
        )


def load_models(
    settings: SettingsLike, train_dtype: str, device: torch.device
) -> dict[str, Any]:
    """The language model in the forms for harvesting and for SAE-Bench, by their names in `Run`."""
    lm = load_language_model(settings.model, settings.lm_dtype, device, settings.hook)
    check_layers(settings, lm)
    harvest = for_harvest(lm, train_dtype, settings.harvest_contexts, settings.context)
    return {
        "sae_bench_model": lm.bridge(),
        "language_model": remember(harvest, harvest.hf),
    }


def with_models_as_loaded(run: Run) -> Run:
    """The run; where something has changed its language model, with one that is loaded again."""
    if changed(run.language_model) or changed(run.sae_bench_model):
        return dataclasses.replace(run, **load_models(run.settings, run.train_dtype, run.device))
    return run


def rehearse(main: Callable[[Run], None], run: Run) -> Run:
    """The whole run in miniature, before anything is paid for: what an edit breaks shows here.

    Nothing of it is shown or kept, but for that it passed, what was seen of its code
    (`harness.observation`), and whether its training can be resumed and is reproducible. Returns
    the run that knows the latter.
    """
    code = hash_definitions(run.source, run.settings)
    key = {
        "code of": code.parts,
        "setting": dataclasses.asdict(run.settings),
        **environment_fingerprint(run.settings, code, run.device),
    }

    def in_miniature() -> dict[str, Any]:
        began = time.monotonic()
        OBSERVED.forget()
        OBSERVED.held = own_digits
        with scratch_dir() as folder, rehearsal(run.log), LEDGER.rehearsal(), RANKS.alone():
            small = run.in_miniature(folder / "run_rehearsal")

            def play(training_pass: TrainingPass) -> None:
                nonlocal small
                shutil.rmtree(small.out_dir, ignore_errors=True)
                small.out_dir.mkdir()
                small = with_models_as_loaded(small)
                whole = training_pass.until is None  # as the first is, which alone is watched
                with contextlib.ExitStack() as around:
                    around.enter_context(isolated())
                    if whole:
                        around.enter_context(OBSERVED.watching(type(run.settings)))
                    perform(main, dataclasses.replace(small, training_pass=training_pass), whole)

            problems = resume_problems(play, folder)
        seconds = time.monotonic() - began
        print_line(f"rehearsal: the whole run in miniature passed in {seconds:.0f} s")
        return {"problems": problems, **OBSERVED.record()}

    with redirect_output(run.log):
        import_evaluations()
    remember_libraries()
    check_equal(key)
    found = RANKS.by_first(cached, "rehearsal", key, in_miniature)
    read = {sort: now(by_kind, sort) for sort, by_kind in found["read"].items()}
    if read != found["read"]:  # files, variables and the like that its code reads
        found = RANKS.by_first(cached, "rehearsal", key | {"read": read}, in_miniature)
    OBSERVED.restore(found)
    import_seen()
    problems = problems_in(found)
    check_sharable(problems)
    for problem in problems.values():
        print_line(problem)
    return dataclasses.replace(
        with_models_as_loaded(run),
        resumes="unresumable" not in problems,
        keeps=run.keeps and not {"moved", "started"} & problems.keys(),
        warnings=tuple(problems.values()),
    )


def check_sharable(problems: dict[str, str]) -> None:
    """ExperimentError where several ranks can't share a training: see `problems_in`."""
    if RANKS.of > 1 and (why := problems.get("unresumable") or problems.get("moved")):
        raise ExperimentError(
            f"several ranks can't share this run, since what is trained on one has to come to the "
            f"others, but {why}; or run it as one process: python experiment.py"
        )


def check_equal(key: dict[str, Any]) -> None:
    """ExperimentError where ranks differ in what the run is.

    Args:
        key: of the rehearsal.
    """
    own = {part: digest(key[part]) for part in ("code of", "setting", "model", "version of")}
    first = RANKS.by_first(lambda: own)
    if differing := [part.removesuffix(" of") for part in own if own[part] != first[part]]:
        raise ExperimentError(
            f"all ranks must run the same, but this one and rank 0 differ in "
            f"{' and '.join(differing)}: give each machine the same code, model and environment"
        )


def import_seen() -> None:
    """Imports the user's modules that were seen to be imported, before keys are made of them.

    Whether the rehearsal that has seen it was of this attempt or is kept.
    """
    for name in sorted(set().union(*OBSERVED.imports.values())):
        if name not in sys.modules:
            with contextlib.suppress(Exception):  # of a module that was tried for, as then
                importlib.import_module(name)


def import_evaluations() -> None:
    """Imports what the experiment does as it comes to it: watched, this took twice as long."""
    for name in ("core.main", "sparse_probing.probe_training"):
        importlib.import_module(f"sae_bench.evals.{name}")


def problems_in(found: dict[str, Any]) -> dict[str, str]:
    """What a rehearsal has found to be wrong with keeping a run's results, a sentence each."""
    nothing = "nothing of this run is kept or taken from the store, since"
    problems = dict(found["problems"])
    if moved := found["moved"]:
        problems["moved"] = (
            f"{nothing} {', '.join(moved[:3])} changes while results are computed, and would not "
            "where they are found: keep it on the trainer or the SAE, or return it"
        )
    if started := found["started"]:
        problems["started"] = (
            f"{nothing} {', '.join(started[:3])}, and what another program reads is not seen: "
            "start it at the top of the file, or in main before train"
        )
    return problems


def memory_settings(stage: str) -> str:
    """The settings that take less memory in a stage."""
    settings = {
        "train": "batch, harvest_contexts or buffer_tokens",
        "core evaluation": "core_prompts",
        "sparse probing": "probe_llm_batch or probe_sae_batch",
    } | dict.fromkeys(
        ("sae_probes", "absorption", "scr", "tpp", "autointerp"),
        "the number of layers and seeds, or leave out extra_evals",
    )
    return settings.get(stage.split(": ")[-1], "d_sae or the number of layers and seeds")


def check_layers(settings: SettingsLike, lm: LanguageModel) -> None:
    """ExperimentError where the language model has fewer blocks, or positions, than are asked."""
    n_layers = lm.hf.config.num_hidden_layers
    if max(settings.layers) >= n_layers:
        raise ExperimentError(
            f"layers must be below {n_layers}, the number of blocks of {settings.model}, but are "
            f"{settings.layers}: change them at the top of experiment.py"
        )
    positions = getattr(lm.hf.config, "max_position_embeddings", None)
    if positions is not None and settings.context > positions:
        raise ExperimentError(
            f"context must be at most {positions}, the positions of {settings.model}, but is "
            f"{settings.context}: lower it at the top of experiment.py"
        )
