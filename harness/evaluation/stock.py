"""SAE-Bench's absorption, scr, tpp and autointerp: evaluations that are asked for, by stock code.

Each SAE is given to SAE-Bench's own `run_eval` (0.6.0), with the run's own language model where
that would load one by its name. What is done is kept from run to run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pandas
import torch
from sklearn.metrics import f1_score

from harness.call_graph import reachable_code
from harness.console import Progress
from harness.errors import ExperimentError, error_context
from harness.evaluation.core import prepare_for_sae_bench
from harness.fingerprint import environment_fingerprint, result_key, text_identity
from harness.generators import seed_generators
from harness.identity import describe
from harness.interfaces import RunLike, SAELike, SettingsLike
from harness.observation import OBSERVED
from harness.partials import scratch_dir
from harness.preflight import EXTRA_DATA
from harness.start import ENVIRON_AT_START
from harness.store import ACTIVATIONS_GB, TensorCache, cached_each
from harness.text import load_dataset

MODULES = {"absorption": "absorption", "scr": "scr_and_tpp", "tpp": "scr_and_tpp",
           "autointerp": "autointerp"}  # fmt: skip
SHOWN = {  # by evaluation, what the metrics that go to final_info.json begin and end with
    "absorption": ("mean_", ""), "scr": ("scr_metric_", ""), "tpp": ("tpp_", "_total_metric"),
    "autointerp": ("autointerp_score", ""),
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"
KEY = "OPENAI_API_KEY"
MODEL = "model"  # what SAE-Bench calls folders of the language model's probes
PROBE_FILES = ("probe.pth", "data.npz", "train_df.csv", "test_df.csv")
PRECALC_BYTES = 2e9  # of codes that absorption's probes read at once


def check_stock(settings: SettingsLike) -> None:
    """ExperimentError where an evaluation can't be had, whatever the language model says.

    That its data sets can be had is looked at by `harness.preflight`.
    """
    asked = settings.extra_evals
    if "ravel" in asked:
        raise ExperimentError(
            "extra_evals can't have 'ravel': SAE-Bench 0.6.0's own takes the first of a block's "
            "output for its activations, which since transformers 5 is the batch's first text "
            "alone: leave it out"
        )
    if "absorption" in asked and settings.hook != "resid_post":
        raise ExperimentError(
            "extra_evals can have 'absorption' with hook = 'resid_post' alone, where SAE-Bench "
            f"0.6.0 reads it, but hook is {settings.hook!r}: change one of them"
        )
    if "autointerp" in asked and not ENVIRON_AT_START.get(KEY):
        raise ExperimentError(
            "extra_evals has 'autointerp', which asks OpenAI's gpt-4o-mini about features, but "
            f"{KEY} is not set: set it, or leave 'autointerp' out"
        )


def config_of(kind: str, settings: SettingsLike, tokenizer: Any = None) -> Any:
    """SAE-Bench's configuration of an evaluation: its defaults, and what the settings say.

    Args:
        tokenizer: the language model's, which absorption's prompts depend on.
    """
    room = importlib.import_module(f"sae_bench.evals.{MODULES[kind]}.eval_config")
    # Stock names folders of its own by it: one that is a path would lead out of them.
    name = Path(settings.model).name if Path(settings.model).is_absolute() else settings.model
    common: dict[str, Any] = dict(
        model_name=name, llm_dtype=settings.lm_dtype, random_seed=settings.probe_seed
    )
    if kind == "absorption":
        config = room.AbsorptionEvalConfig(**common)
        words = len(words_of(tokenizer, config.prompt_template))
        config.prompt_token_pos = word_position(tokenizer, config.prompt_template)
        config.precalc_k_sparse_probe_sae_acts = words * settings.d_sae * 4 <= PRECALC_BYTES
        return config
    common["llm_batch_size"] = settings.probe_llm_batch
    if kind == "autointerp":
        return room.AutoInterpEvalConfig(**common, llm_context_size=settings.context)
    sizes = dict(train_set_size=settings.probe_train, test_set_size=settings.probe_test)
    config = room.ScrAndTppEvalConfig(
        **common, **sizes, perform_scr=kind == "scr", context_length=settings.context,
        sae_batch_size=settings.probe_sae_batch,
    )  # fmt: skip
    config.n_values = [n for n in config.n_values if n <= settings.d_sae]
    return config


@contextlib.contextmanager
def in_place_of(module: Any, **others: Any) -> Iterator[None]:
    """Puts something else in the place of what a module has under these names; then undone."""
    before = {name: getattr(module, name) for name in others}
    try:
        for name, other in others.items():
            setattr(module, name, other)
        yield
    finally:
        for name, stock in before.items():
            setattr(module, name, stock)


@contextlib.contextmanager
def tokenizer_as_it_was(tokenizer: Any) -> Iterator[None]:
    """Stock evaluations have it cut and pad texts on one side; afterwards undone."""
    before = tokenizer.truncation_side, tokenizer.padding_side
    try:
        yield
    finally:
        tokenizer.truncation_side, tokenizer.padding_side = before
        if backend := getattr(tokenizer, "backend_tokenizer", None):
            backend.no_truncation()
            backend.no_padding()


# ---- absorption: its prompts and the probes that read first letters -----------------------------


def prompt(word: str, template: str) -> str:
    """A word's line of a prompt, and its answer, as absorption has them."""
    return f"\n{template.format(word=word)} {word.strip()[0].upper()}"


def n_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def word_position(tokenizer: Any, template: str) -> int:
    """Where a prompt has its last word, from its end; stock's −6 is Gemma's."""
    return -1 - n_tokens(tokenizer, template.format(word=""))


def words_of(tokenizer: Any, template: str) -> list[str]:
    """SAE-Bench's words, the tokens of letters alone, that are one token in the prompt, too.

    Stock takes the others as well, and stops at the first prompt of another length.
    """
    from sae_bench.evals.absorption.vocab import get_alpha_tokens

    length = n_tokens(tokenizer, "\n") + 1 + n_tokens(tokenizer, template.format(word=""))
    length += n_tokens(tokenizer, " A")
    words = sorted(get_alpha_tokens(tokenizer))
    return [word for word in words if n_tokens(tokenizer, prompt(word, template)) == length]


@contextlib.contextmanager
def absorption_in(folder: Path, model: Any, config: Any) -> Iterator[None]:
    """Has SAE-Bench's absorption read the words above, and keep its files in a folder.

    Stock has them within its own package, and in the folder that a command is given in.
    """
    from sae_bench.evals.absorption import common, feature_absorption, main

    words = words_of(model.tokenizer, config.prompt_template)
    places = {"experiment_dir": folder / "features", "probes_dir": folder / "probes"}
    probing = functools.partial(
        main.run_k_sparse_probing_experiment, **places | {"experiment_dir": folder / "sparse"}
    )
    absorbing = functools.partial(
        main.run_feature_absortion_experiment, **places,
        sparse_probing_experiment_dir=folder / "sparse",
    )  # fmt: skip
    path = SimpleNamespace(join=functools.partial(os.path.join, folder), dirname=os.path.dirname,
                           exists=os.path.exists)  # fmt: skip
    with contextlib.ExitStack() as stack:
        for module in (common, feature_absorption):
            stack.enter_context(in_place_of(module, get_alpha_tokens=lambda _: words))
        stack.enter_context(in_place_of(
            main, run_k_sparse_probing_experiment=probing,
            run_feature_absortion_experiment=absorbing,
            os=SimpleNamespace(path=path, makedirs=os.makedirs),
        ))  # fmt: skip
        stack.enter_context(in_place_of(model.cfg, model_name=MODEL))  # not a path, of one that is
        yield


def letter_probes(
    settings: SettingsLike, model: Any, layer: int, device: torch.device, keeps: bool = True
) -> dict[str, torch.Tensor]:
    """SAE-Bench's probes of first letters at a layer, and what they were trained on: its files.

    No SAE changes them: they are kept from run to run, unless they are too large.

    Returns:
        each file's bytes, by name.
    """
    config = config_of("absorption", settings, model.tokenizer)

    def train() -> dict[str, torch.Tensor]:
        from sae_bench.evals.absorption import common

        seed_generators("letters", settings.probe_seed, layer)
        with scratch_dir() as folder, absorption_in(folder, model, config), torch.enable_grad():
            with tokenizer_as_it_was(model.tokenizer):
                common.train_and_save_probes(
                    model, [layer], config.prompt_template, config.prompt_token_pos,
                    probes_dir=folder / "probes", device=str(device),
                )  # fmt: skip
            files = folder / "probes" / MODEL / f"layer_{layer}"
            contents = {name: bytearray((files / name).read_bytes()) for name in PROBE_FILES}
            return {name: torch.frombuffer(content, dtype=torch.uint8)
                    for name, content in contents.items()}  # fmt: skip

    code, key = reachable_code(None, [letter_probes, absorption_in, words_of, config_of]), None
    n_words = len(words_of(model.tokenizer, config.prompt_template))
    if keeps and n_words * model.cfg.d_model * 4 * len(settings.layers) <= ACTIVATIONS_GB * 1e9:
        key = {
            "layer": layer, "config": dataclasses.asdict(config) | {"model_name": ""},
            "language model": describe(model), "tokenizer": describe(model.tokenizer),
            **environment_fingerprint(settings, code, device),
        }  # fmt: skip
    cache = TensorCache("letter probes", key)
    files = cache.get("all", train)
    cache.flush()
    return files


def put_probes(files: dict[str, torch.Tensor], folder: Path, layer: int) -> Path:
    """Writes what `letter_probes` has found where SAE-Bench looks for it."""
    place = folder / "probes" / MODEL / f"layer_{layer}"
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (place / name).write_bytes(content.numpy().tobytes())
    return place


def check_letters(settings: SettingsLike, model: Any, device: torch.device) -> None:
    """ExperimentError where SAE-Bench would not measure absorption on this language model.

    It wants a number of letters (20) that its probes tell (F1 above 0.6), at each layer.
    """
    if "absorption" not in settings.extra_evals:
        return
    config = config_of("absorption", settings, model.tokenizer)
    progress = Progress("first letters", len(settings.layers), "layers")
    for layer in settings.layers:
        files = letter_probes(settings, model, layer, device)
        with scratch_dir() as folder:
            told, missing = letters_told(put_probes(files, folder, layer))
        n_told = sum(f1 > config.min_GT_probe_f1 for f1 in told.values())
        if missing or n_told < config.min_feats_for_eval:
            why = f"probes tell {n_told}" if not missing else f"no word begins with {missing}"
            raise ExperimentError(
                "extra_evals can have 'absorption' where probes tell the first letter of a word "
                f"for at least {config.min_feats_for_eval} of 26 letters (F1 above "
                f"{config.min_GT_probe_f1}), but at layer {layer} of {settings.model} {why}: leave "
                "it out, or take another language model or layer"
            )
        progress.advance(1, f"layer {layer}")
    progress.close()


@torch.no_grad()
def letters_told(place: Path) -> tuple[dict[str, float], str]:
    """By letter the F1 of its probe on words held out, and the letters that no word begins with."""
    probe = torch.load(place / "probe.pth", map_location="cpu", weights_only=False).float()
    with numpy.load(place / "data.npz") as data:
        x_ND, y_N, seen = data["X_test"], data["y_test"], set(data["y_train"].tolist())
    positive_NL = (probe(torch.from_numpy(x_ND).float()) > 0).numpy()
    told = {letter: float(f1_score(y_N == at, positive_NL[:, at], zero_division=0.0))
            for at, letter in enumerate(LETTERS)}  # fmt: skip
    return told, "".join(letter for at, letter in enumerate(LETTERS) if at not in seen)


# ---- all of them --------------------------------------------------------------------------------


def stock_evaluation(
    run: RunLike, kind: str, saes: dict[str, SAELike]
) -> tuple[dict[str, dict[str, float]], float]:
    """One of `MODULES`, of folded SAEs; writes eval_results/<kind>/….json in SAE-Bench's own form.

    A rehearsal has each SAE do what is asked of it here and nowhere else: codes of (B, L, D), and a
    reconstruction without some features.

    Args:
        saes: by name; an untrained one's ends in "_untrained". autointerp, which costs money,
            leaves these out.
    Returns:
        the figures of each trained SAE and of its untrained one, and the seconds that it took.
    """
    ready = {name: prepare_for_sae_bench(sae, run.settings) for name, sae in saes.items()}
    if kind == "autointerp":
        ready = {name: sae for name, sae in ready.items() if not name.endswith("_untrained")}
    with run.stage(kind, len(ready), "SAEs") as progress:
        if run.training_pass is not None:
            try_out(run, kind, ready)
            return {name: {} for name in saes}, progress.seconds()
        config = config_of(kind, run.settings, run.sae_bench_model.tokenizer)
        keys: dict[str, dict[str, Any] | None] = dict.fromkeys(ready)
        if run.keeps:
            given = {"evaluation": stock_records, "language model": run.sae_bench_model}
            more = {"config": dataclasses.asdict(config),
                    "data": [text_identity(name) for name in EXTRA_DATA.get(kind, ())]}  # fmt: skip
            common = result_key(kind, run, given, ready.values(), **more)
            keys = {name: common | {"of": describe(sae)} for name, sae in ready.items()}
        compute = functools.partial(stock_records, run, kind, ready, config, progress)
        records = cached_each(kind, keys, compute)
        means = {name: save(run, kind, name, record) for name, record in records.items()}
        progress.advance(len(ready))
    for name in ready:
        untrained = means.get(f"{name}_untrained", {})
        means[name] = means[name] | {
            metric.replace(f"{kind}_", f"{kind}_untrained_", 1): value
            for metric, value in untrained.items()
        }  # fmt: skip
    return {name: means.get(name, {}) for name in saes}, progress.seconds()


def try_out(run: RunLike, kind: str, saes: dict[str, SAELike]) -> None:
    """Has each SAE do what a stock evaluation asks of it, on some activations.

    What is seen to be used for it is in the keys of its results, and no other code or setting.
    """
    from sae_bench.evals.scr_and_tpp.main import ablated_precomputed_activations

    train, _ = next(iter(run.probe_texts.values()))
    tokens_BL = next(iter(train.values()))["input_ids"][:2]
    for name, sae in saes.items():
        hook = sae.cfg.hook_name
        _, cache = run.sae_bench_model.run_with_cache(tokens_BL, names_filter=[hook])
        some_F = torch.arange(sae.cfg.d_sae, device=run.device) < 2
        with error_context(name), torch.no_grad(), OBSERVED.computing(kind):
            ablated_precomputed_activations(cache[hook], sae, some_F, sae_batch_size=2)


def stock_records(
    run: RunLike, kind: str, saes: dict[str, SAELike], config: Any, progress: Progress,
    names: list[str],
) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    """SAE-Bench's record of each of these SAEs, by its own `run_eval`."""
    module = importlib.import_module(f"sae_bench.evals.{MODULES[kind]}.main")
    model, s = run.sae_bench_model, run.settings
    loader = SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: model)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch_dir())
        stack.enter_context(tokenizer_as_it_was(model.tokenizer))
        stack.enter_context(in_place_of(module, HookedTransformer=loader))
        stack.enter_context(torch.set_grad_enabled(True))  # stock leaves it as it likes
        more: dict[str, Any] = {"artifacts_path": str(folder / "artifacts")}
        if kind == "absorption":
            more = {}
            stack.enter_context(absorption_in(folder, model, config))
            for layer in sorted({saes[name].cfg.hook_layer for name in names}):
                files = letter_probes(s, model, layer, run.device, run.keeps)
                put_probes(files, folder, layer)
        elif kind == "autointerp":
            more["api_key"] = ENVIRON_AT_START[KEY]
        else:
            stack.enter_context(stock_data_sets())
        def evaluated(name: str) -> dict[str, Any]:
            seed_generators(kind, s.probe_seed)
            out = Path(tempfile.mkdtemp(dir=folder))
            with error_context(name):
                return module.run_eval(
                    dataclasses.replace(config), [(name, saes[name])], str(run.device),
                    output_path=str(out), force_rerun=True, **more,
                )  # fmt: skip

        progress.advance(len(saes) - len(names))
        primed = set()
        for name in names:
            hook = saes[name].cfg.hook_name
            if kind in ("scr", "tpp") and hook not in primed:
                evaluated(name)  # leaves the activations; what is drawn depends on them being there
                primed.add(hook)
            found = evaluated(name)
            if not found:
                raise ExperimentError(
                    f"SAE-Bench gave no {kind} figures of {name}, for the reason that the log "
                    f"names: leave {kind!r} out of extra_evals"
                )
            progress.advance(1, name)
            yield name, found[f"{name}_custom_sae"]


@contextlib.contextmanager
def stock_data_sets() -> Iterator[None]:
    """Has scr and tpp read data sets as sparse probing here does; too few rows are told."""
    from sae_bench.evals.scr_and_tpp import dataset_creation
    from sae_bench.sae_bench_utils import dataset_utils

    with (
        in_place_of(dataset_creation, load_dataset=load_dataset),
        in_place_of(dataset_utils, load_dataset=load_dataset),
    ):
        try:
            yield
        except AssertionError as error:
            raise ExperimentError(
                "a data set of extra_evals has too few rows for probe_train and probe_test: lower "
                "them, or leave 'scr' and 'tpp' out of extra_evals"
            ) from error


def save(run: RunLike, kind: str, name: str, record: dict[str, Any]) -> dict[str, float]:
    """Writes a record where SAE-Bench would; returns the means that final_info.json has.

    Under SAE-Bench's names, with the evaluation's before them: scr_metric_threshold_10,
    tpp_threshold_10_total_metric, autointerp_score, absorption_mean_absorption_fraction_score,
    absorption_mean_full_absorption_score, absorption_mean_num_split_features.

    Raises:
        ExperimentError: one is no number.
    """
    from sae_bench.sae_bench_utils import general_utils

    folder = run.out_dir / "eval_results" / kind
    folder.mkdir(parents=True, exist_ok=True)
    path = general_utils.get_results_filepath(str(folder), name, "custom_sae")
    Path(path).write_text(json.dumps(record, indent=2, default=str))
    begins, ends = SHOWN[kind]
    means = {}
    for metrics in record["eval_result_metrics"].values():
        for metric, value in metrics.items():
            if value is None or not (metric.startswith(begins) and metric.endswith(ends)):
                continue
            if pandas.isna(value):
                raise ExperimentError(
                    f"SAE-Bench's {kind} gave no number for {metric} of {name}: look at {path}, or "
                    f"leave {kind!r} out of extra_evals"
                )
            means[metric if metric.startswith(f"{kind}_") else f"{kind}_{metric}"] = float(value)
    return means
