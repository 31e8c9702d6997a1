"""The evaluations that `extra_evals` asks for: SAE-Bench's, beside core and sparse probing.

Here is its sparse probing on the data sets of sae-probes; for the others see `stock`. Stock code
computes each data set's figures and collates them. This gives it the run's own language model,
where stock would load one by its name, and keeps what is done from run to run.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.console import Progress
from harness.errors import ExperimentError, error_context
from harness.evaluation.core import prepare_for_sae_bench
from harness.evaluation.stock import MODULES, check_stock, stock_evaluation, tokenizer_as_it_was
from harness.fingerprint import result_key
from harness.identity import describe
from harness.interfaces import RunLike, SAELike, SettingsLike
from harness.partials import scratch_dir
from harness.ranks import RANKS
from harness.store import ACTIVATIONS_GB, TensorCache, cached_each

MAX_TOKENS, TEXTS_AT_ONCE = 1024, 32  # sae-probes' own, of a text and of a pass
BASELINE = "language model, "  # before a hook's name: the probes on all its dimensions


def check_extra_evals(settings: SettingsLike) -> None:
    """ExperimentError where an evaluation is none, or can't be had."""
    known = ("sae_probes", *MODULES)
    if unknown := [name for name in settings.extra_evals if name not in (*known, "ravel")]:
        raise ExperimentError(
            f"extra_evals must be among {', '.join(known)}, but one is {unknown[0]!r}: choose "
            "among these"
        )
    check_stock(settings)
    if "sae_probes" in settings.extra_evals:
        from sae_probes import DATASETS

        if unknown := [name for name in settings.sae_probes_sets if name not in DATASETS]:
            raise ExperimentError(
                f"sae_probes_sets must be among sae-probes' data sets ({', '.join(DATASETS)}), "
                f"but one is {unknown[0]!r}: choose among these"
            )


def extra_evaluations(
    run: RunLike, saes: dict[str, SAELike]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """What `extra_evals` asks for beside core and sparse probing, of folded SAEs.

    Args:
        saes: by name; an untrained one's ends in "_untrained".
    Returns:
        the figures of each trained SAE, with those of its untrained one, all under names that begin
        with the evaluation's; and the seconds that each took, as seconds_sae_probes or
        seconds_absorption.
    """
    return RANKS.by_first(by_kind, run, saes)


def by_kind(
    run: RunLike, saes: dict[str, SAELike]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """See `extra_evaluations`. Of several ranks the first does it alone."""
    figures: dict[str, dict[str, float]] = {name: {} for name in saes}
    seconds = {}
    for kind in run.settings.extra_evals:
        if kind == "sae_probes":
            found, seconds[f"seconds_{kind}"] = sae_probes_evaluation(run, saes)
        else:
            found, seconds[f"seconds_{kind}"] = stock_evaluation(run, kind, saes)
        figures = {name: figures[name] | found[name] for name in saes}
    return figures, seconds


def sae_probes_evaluation(
    run: RunLike, saes: dict[str, SAELike]
) -> tuple[dict[str, dict[str, float]], float]:
    """SAE-Bench's sparse probing on sae-probes' data sets; see `extra_evaluations`.

    Writes eval_results/sparse_probing_sae_probes/….json in SAE-Bench's own form. With the figures
    of an SAE stand those of the language model.
    """
    from sae_probes.utils_data import get_dataset_sizes

    rehearsing, sizes = run.training_pass is not None, get_dataset_sizes()
    sets = list(run.settings.sae_probes_sets or sizes)
    sets = [min(sets, key=sizes.get)] if rehearsing else sets
    ready = {name: prepare_for_sae_bench(sae, run.settings) for name, sae in saes.items()}
    with run.stage("sae_probes", len(sets), "data sets") as progress, scratch_dir() as folder:
        config = sae_probes_config(run, sets, folder)
        if rehearsing:
            config.include_llm_baseline = False  # the slowest part, and no edit changes it
        files_of_sets(run, ready, config, progress)
        means = collated(run, ready, config)
    return means, progress.seconds()


def sae_probes_config(run: RunLike, sets: list[str], folder: Path) -> Any:
    """SAE-Bench's SparseProbingSaeProbesEvalConfig of a run: its defaults, files in a folder."""
    from sae_bench.evals.sparse_probing_sae_probes import eval_config

    return eval_config.SparseProbingSaeProbesEvalConfig(
        model_name=run.settings.model,
        random_seed=run.settings.probe_seed,
        dataset_names=sets,
        results_path=str(folder / "results"),
        model_cache_path=str(folder / "activations"),
    )


def files_of_sets(run: RunLike, saes: dict[str, SAELike], config: Any, progress: Progress) -> None:
    """Fills the folders of a configuration with sae-probes' files of each data set.

    What an earlier run has left is written from the store; a kill costs the data set and SAE that
    it came in.
    """
    hooks = sorted({sae.cfg.hook_name for sae in saes.values()})
    names = list(saes)
    if config.include_llm_baseline:
        names += [f"{BASELINE}{hook}" for hook in hooks]
    keys: dict[str, dict[str, Any] | None] = dict.fromkeys(names)
    if run.keeps:
        given = {"probes": files_of_set, "language model": run.sae_bench_model}
        more = {"sae-probes": importlib.metadata.version("sae-probes"), "ks": config.ks}
        common = result_key("sae_probes", run, given, saes.values(), **more)
        of = {name: describe(saes[name]) if name in saes else name for name in names}
        keys = {name: common | {"of": of[name]} for name in names}
    for dataset in config.dataset_names:
        found = functools.partial(files_of_set, run, saes, config, dataset)
        of_set = {name: key and key | {"data set": dataset} for name, key in keys.items()}
        with error_context(dataset):
            done = cached_each("sae_probes", of_set, found)
        for name, figures in done.items():
            path = file_for(saes, config, dataset, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(figures))
        for hook in hooks:  # stock looks whether it is there, before it skips what is done
            acts_path(config, dataset, hook).touch()
        progress.advance(1, dataset)


def hook_of(saes: dict[str, SAELike], name: str) -> str:
    """The hook whose activations an SAE reads, or the language model's probes."""
    return saes[name].cfg.hook_name if name in saes else name.removeprefix(BASELINE)


def acts_path(config: Any, dataset: str, hook: str) -> Path:
    """Where sae-probes looks for the activations of a data set."""
    folder = Path(config.model_cache_path) / f"model_activations_{config.model_name}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{dataset}_{hook}.pt"


def file_for(saes: dict[str, SAELike], config: Any, dataset: str, name: str) -> Path:
    """Where sae-probes writes the figures of an SAE, or of the language model at a hook."""
    from sae_probes.run_baselines import get_baseline_save_path
    from sae_probes.run_sae_evals import get_save_metrics_path

    model, results, hook = config.model_name, config.results_path, hook_of(saes, name)
    if name in saes:
        folder = f"{results}/{name}_custom_sae"
        return get_save_metrics_path(dataset, hook, config.reg_type, model, folder)
    return get_baseline_save_path(dataset, hook, config.baseline_method, model, results)


def files_of_set(
    run: RunLike, saes: dict[str, SAELike], config: Any, dataset: str, names: list[str]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Stock sae-probes on one data set: each name, and what it writes of it."""
    from sae_probes.run_baselines import run_baseline_dataset_layer
    from sae_probes.run_sae_evals import run_sae_eval

    hooks = sorted({hook_of(saes, name) for name in names})
    for hook, acts_ND in zip(hooks, last_activations(run, dataset, hooks)):
        torch.save(acts_ND, acts_path(config, dataset, hook))
    places = dict(model_name=config.model_name, model_cache_path=config.model_cache_path,
                  seed=config.random_seed)  # fmt: skip
    for name in names:
        hook, path = hook_of(saes, name), file_for(saes, config, dataset, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in saes:
            run_sae_eval(
                saes[name], dataset, hook, config.reg_type, config.setting, ks=config.ks,
                binarize=config.binarize, device=str(run.device),
                results_path=f"{config.results_path}/{name}_custom_sae", **places,
            )  # fmt: skip
        else:
            method, results = config.baseline_method, config.results_path
            run_baseline_dataset_layer(hook, dataset, method, results_path=results, **places)
        yield name, json.loads(path.read_text())
    for hook in hooks:  # not all data sets' at once
        acts_path(config, dataset, hook).unlink()


def last_activations(run: RunLike, dataset: str, hooks: list[str]) -> list[Tensor]:
    """Activations at each text's last token, (N, D) for each hook, as sae-probes has them.

    From the run's language model, and kept if all data sets' are not too large.
    """
    from sae_probes import DATASETS
    from sae_probes.generate_model_activations import _process_activations
    from sae_probes.utils_data import read_numbered_dataset_df

    model, texts = run.sae_bench_model, read_numbered_dataset_df(dataset)["prompt"].tolist()

    def passes() -> list[Tensor]:
        # A text is cut to what the model can read: stock's 1024 tokens, or fewer.
        n_tokens = min(MAX_TOKENS, model.cfg.n_ctx)
        with tokenizer_as_it_was(model.tokenizer):
            found = _process_activations(
                model, texts, TEXTS_AT_ONCE, n_tokens, hooks, None, str(run.device)
            )
        return [found[hook].clone() for hook in hooks]

    key, n_sets = None, len(run.settings.sae_probes_sets or DATASETS)
    size = len(texts) * len(hooks) * model.cfg.d_model * model.cfg.dtype.itemsize
    if run.keeps and size <= ACTIVATIONS_GB * 1e9 / n_sets:
        given = {"passes": last_activations, "language model": model}
        more = {"data set": dataset, "hooks": hooks,
                "sae-probes": importlib.metadata.version("sae-probes")}  # fmt: skip
        key = result_key("sae_probes passes", run, given, **more)
    cache = TensorCache("sae_probes passes", key)
    acts = cache.get("all", passes)
    cache.flush()
    return acts


def collated(run: RunLike, saes: dict[str, SAELike], config: Any) -> dict[str, dict[str, float]]:
    """Writes SAE-Bench's records of what `files_of_sets` has left.

    Returns:
        the means of each SAE, such as sae_probes_top_5_test_accuracy, with those of its untrained
        one, sae_probes_untrained_…, and the language model's, sae_probes_llm_test_accuracy.
    """
    from sae_bench.evals.sparse_probing_sae_probes import eval_config, main
    from sae_bench.sae_bench_utils import general_utils

    folder = run.out_dir / "eval_results" / "sparse_probing_sae_probes"
    records = main.run_eval(config, list(saes.items()), str(run.device), str(folder), True)
    stock = eval_config.SparseProbingSaeProbesEvalConfig()
    means = {}
    for name in saes:
        record = records[f"{name}_custom_sae"]
        # Of this machine, and gone: a record says where stock would have them.
        for field in ("results_path", "model_cache_path"):
            record["eval_config"][field] = getattr(stock, field)
        path = general_utils.get_results_filepath(str(folder), name, "custom_sae")
        Path(path).write_text(json.dumps(record, indent=2))
        means[name] = record["eval_result_metrics"]
    figures = {}
    for name in saes:
        own = {f"sae_probes_{metric[4:]}": v for metric, v in means[name]["sae"].items()}
        own |= {f"sae_probes_{metric}": v for metric, v in means[name]["llm"].items()}
        untrained = means.get(f"{name}_untrained", {"sae": {}})["sae"]
        own |= {f"sae_probes_untrained_{metric[4:]}": v for metric, v in untrained.items()}
        figures[name] = {metric: v for metric, v in own.items() if v is not None}
    return figures
