"""SAE-Bench's core evaluation of several SAEs side by side."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from harness.errors import ExperimentError, error_context
from harness.evaluation.features import FeatureGatherer, shown_saes, write_features
from harness.evaluation.shared_forward import CountingSAE, ModelView, SharedForward, StoreView
from harness.fingerprint import result_key, text_identity
from harness.generators import seed_generators
from harness.identity import changed, describe
from harness.interfaces import RunLike, SAELike, SettingsLike
from harness.machine import retain_freed_memory, run_cooperatively
from harness.observation import unwatched
from harness.ranks import RANKS
from harness.store import (
    ACTIVATIONS_GB,
    LEDGER,
    TensorCache,
    cached_each,
)
from harness.text import documents, text_errors, text_rows, text_stream
from harness.text_files import BUILT_IN
from harness.tokenizer import special_token_ids


def core_config(settings: SettingsLike) -> Any:
    """SAE-Bench's CoreEvalConfig of a run, everything switched on."""
    from sae_bench.evals.core.eval_config import CoreEvalConfig

    return CoreEvalConfig(
        model_name=settings.model,
        llm_dtype=settings.lm_dtype,
        batch_size_prompts=settings.core_prompts,
        n_eval_reconstruction_batches=settings.core_reconstruction_batches,
        n_eval_sparsity_variance_batches=settings.core_sparsity_batches,
        dataset=settings.core_text,
        context_size=settings.context,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        # Without both of these SAE-Bench 0.6.0 fails in its own validation of the result.
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        # BOS is not trained on, so it must not be replaced by its reconstruction.
        exclude_special_tokens_from_reconstruction=True,
    )


def core_store(settings: SettingsLike, model: Any, sae: Any) -> Any:
    """SAELens' store of the evaluation text, as SAE-Bench's multiple_evals makes it."""
    from sae_lens.training.activations_store import ActivationsStore

    store = ActivationsStore.from_sae(
        model,
        sae,
        context_size=settings.context,
        dataset=core_text(settings),
    )
    store.shuffle_input_dataset(seed=42)
    return store


def core_text(settings: SettingsLike) -> Any:
    """The text of the core evaluation in a form that SAELens takes."""
    name = settings.core_text
    if name in BUILT_IN:
        return heldout_passages(name)
    with text_errors(name):
        return EvaluationText(name, text_stream(name))


class EvaluationText:
    """A streamed data set for SAELens' store; what is wrong with it is an ExperimentError."""

    def __init__(self, name: str, stream: Any) -> None:
        self.name, self.stream = name, stream

    def __iter__(self) -> Iterator[dict]:
        with text_errors(self.name):
            yield from text_rows(self.name, self.stream)

    def shuffle(self, seed: int) -> EvaluationText:
        """The order of files alone, as SAELens' store shuffles a stream."""
        return EvaluationText(self.name, self.stream.shuffle(seed=seed, buffer_size=1))


@functools.cache
def heldout_passages(name: str) -> Any:
    """A built-in corpus' held-out text as a data set, read once: each SAE is evaluated on it."""
    import datasets

    return datasets.Dataset.from_dict({"text": list(documents(name, "heldout")())})


def prepare_for_sae_bench(sae: SAELike, settings: SettingsLike) -> SAELike:
    """A copy of a folded SAE, prepared for SAE-Bench, which casts and marks what it is given."""
    from sae_bench.sae_bench_utils import general_utils

    dtype = general_utils.str_to_dtype(settings.lm_dtype)
    sae = copy.deepcopy(sae).to(device=sae.W_enc.device, dtype=dtype)
    sae.cfg.dtype = settings.lm_dtype
    return general_utils.load_and_format_sae("", sae, str(sae.W_enc.device))[1]


def core_cache(run: RunLike, settings: SettingsLike, hooks: dict[str, int]) -> TensorCache:
    """Where core evaluation's passes of the language model are kept, if they are not too large."""
    model = run.sae_bench_model
    tokens = settings.core_prompts * settings.context
    logits = settings.core_reconstruction_batches * (1 + len(hooks)) * model.cfg.d_vocab
    residuals = settings.core_reconstruction_batches + settings.core_sparsity_batches
    numbers = tokens * (logits + residuals * len(hooks) * model.cfg.d_model)
    key = None
    if run.keeps and numbers * model.cfg.dtype.itemsize <= ACTIVATIONS_GB * 1e9:
        given = {"store": core_store, "passes": SharedForward, "language model": model}
        more = {"hooks": hooks, **text_identity(settings.core_text)}
        key = result_key("core passes", run, given, **more)
    return TensorCache("core passes", key)


RunEvals = Callable[[Any, Any, Any, Any, set[int]], tuple[dict[str, dict], dict[str, list]]]


def core_keys(
    run: RunLike | None, saes: dict[str, SAELike], run_evals: RunEvals, shown: Collection[str]
) -> dict[str, dict[str, Any] | None]:
    """By SAE, all that its core evaluation depends on; None: it is not kept."""
    if run is None or not run.keeps:
        return dict.fromkeys(saes)
    given = {"evaluation": shared_core_evals, "run_evals": run_evals}
    given |= {"language model": run.sae_bench_model}
    more = text_identity(run.settings.core_text)
    common = result_key("core evaluation", run, given, saes.values(), **more)
    return {name: common | {"SAE": describe(sae), "shown": name in shown}
            for name, sae in saes.items()}  # fmt: skip


Result = tuple[dict, dict, dict[str, float], list[int], dict[str, Any] | None]


def shared_core_evals(
    saes: dict[str, SAELike],
    model: Any,
    settings: SettingsLike,
    run_evals: RunEvals,
    advance: Callable[[int], None] = lambda n: None,
    run: RunLike | None = None,
    shown: Collection[str] = (),
) -> dict[str, Result]:
    """`run_evals` of SAEs that `prepare_for_sae_bench` has prepared, side by side.

    Of several ranks each evaluates its share of them.

    Args:
        run_evals: called under no_grad with an SAE, a store, a model, SAE-Bench's configuration
            and the token ids that don't count; returns scalars by group, and metrics by feature.
        advance: called with 1 after each batch.
        run: for which results, and the language model's passes, are kept; None: nothing is.
        shown: the SAEs whose features are shown.
    Returns:
        by SAE: what `run_evals` returned, figures of our own (`CountingSAE.figures`), how many
            contexts were drawn and differ, and what `FeatureGatherer` found of one that is shown.
    Raises:
        ExperimentError: the text is too short, or a score of the loss has nothing to divide by.
    """
    def evaluated(names: list[str]) -> list[tuple[str, tuple]]:
        config, ignored = core_config(settings), special_token_ids(model.tokenizer)
        hooks = {saes[name].cfg.hook_name: saes[name].cfg.hook_layer for name in names}
        store = core_store(settings, model, saes[names[0]])
        cache = core_cache(run, settings, hooks) if run is not None else None
        shared = SharedForward(model, store, hooks, advance, cache, settings.first_positions)
        gatherers = {name: FeatureGatherer() for name in names if name in shown}
        counting = {n: CountingSAE(saes[n], shared, gatherers.get(n)) for n in names}

        def one(name: str) -> tuple[dict, dict]:
            sae = counting[name]
            seed_generators("core evaluation", name)
            with error_context(name), zero_division(name, settings):
                return run_evals(sae, StoreView(shared), ModelView(shared, sae), config, ignored)

        # Around all of them: each run_evals restores, when it ends, the mode that it began in.
        with torch.no_grad(), retain_freed_memory(), unchanged(shared):
            found = run_cooperatively({name: functools.partial(one, name) for name in names})
        drawn = [shared.n_contexts, len(shared.contexts)]
        features = {name: gatherer.gathered() for name, gatherer in gatherers.items()}
        return [(name, (*result, counting[name].figures(), drawn, features.get(name)))
                for name, result in found.items()]  # fmt: skip

    def of_share(own: dict[str, SAELike]) -> dict[str, Any]:
        return cached_each("core evaluation", core_keys(run, own, run_evals, shown), evaluated)

    try:
        return RANKS.spread(of_share, saes)
    except StopIteration as error:
        raise ExperimentError(
            f"the text {settings.core_text!r} must hold one context of {settings.context} tokens, "
            "but is shorter: choose another core_text, or lower context"
        ) from error


@contextlib.contextmanager
def zero_division(name: str, settings: SettingsLike) -> Iterator[None]:
    """Says what SAE-Bench's scores of the loss divide by, where it is 0: they have no guard."""
    try:
        yield
    except ZeroDivisionError as error:
        raise ExperimentError(
            f"core evaluation of {name}: a score divides by how much worse the language model gets "
            "with zeros in place of the layer, which must differ from 0, but is 0 on "
            f"{settings.core_text!r} in {settings.lm_dtype}: look at the model's weights, at "
            "core_text and at lm_dtype"
        ) from error


@contextlib.contextmanager
def unchanged(shared: SharedForward) -> Iterator[None]:
    """ExperimentError where the language model is left with other weights, hooks or methods."""
    before = changed(shared.model)
    yield
    if shared.is_hooked() or changed(shared.model) != before:
        raise ExperimentError(
            "core_metrics leaves the language model changed (weights, hooks or methods), so that "
            "other SAEs' figures would depend on this one: undo it before it returns"
        )


def core_evaluation(
    run: RunLike,
    saes: dict[str, SAELike],
    run_evals: RunEvals,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, dict[str, float]]:
    """`run_evals` of folded SAEs: by name, the scalars by their names, and figures of our own.

    Writes eval_results/core/….json in SAE-Bench's own form, and features/layer_L.json.gz of the
    first seed's.

    Args:
        run_evals, advance: see `shared_core_evals`.
    Raises:
        ExperimentError: a scalar is not finite, or is the -1 that stands for NaN, or L0 is 0.
    """
    s = run.settings
    if run.training_pass is not None:
        run.training_pass.score(saes, run)
    for name, sae in saes.items():
        if (untrained := saes.get(f"{name}_untrained")) is not None:
            check_trained(name, sae, untrained)
    ready = {name: prepare_for_sae_bench(sae, s) for name, sae in saes.items()}
    shown = shown_saes(saes, s)
    results = shared_core_evals(ready, run.sae_bench_model, s, run_evals, advance, run, shown)
    for name in shown:
        write_features(run, saes[name], results[name][4])
    for drawn, differ in {tuple(result[3]) for result in results.values()}:
        if differ < 0.95 * drawn:
            LEDGER.warns(
                f"the text of core evaluation, {s.core_text!r}, is short: of {drawn} contexts that "
                f"were drawn {differ} differ, so its figures are of fewer tokens than they say"
            )
    return {
        name: save_core(name, ready[name], result, s, run.out_dir)
        for name, result in results.items()
    }


def mean_l0(
    saes: dict[Any, SAELike], model: Any, settings: SettingsLike, n_batches: int = 4
) -> dict[Any, float]:
    """Active features per token, on the first batches of the evaluation text, by any key."""
    ready = {key: prepare_for_sae_bench(sae, settings) for key, sae in saes.items()}
    store = core_store(settings, model, next(iter(ready.values())))
    hooks = {sae.cfg.hook_name: sae.cfg.hook_layer for sae in ready.values()}
    shared = SharedForward(model, store, hooks, lambda n: None, None, settings.first_positions)
    active = dict.fromkeys(saes, 0)
    with torch.no_grad():
        for number in range(1, n_batches + 1):
            shared.batch(number, settings.core_prompts)
            acts, mask_BL = shared.residuals(), shared.token_mask()
            for key, sae in ready.items():
                with error_context(f"layer {sae.cfg.hook_layer}"):
                    feature_acts_NF = sae.encode(acts[sae.cfg.hook_name][mask_BL])
                    active[key] += int((feature_acts_NF > 0).sum())
    return {key: count / shared.n_tokens for key, count in active.items()}


@unwatched()
def save_core(
    name: str,
    sae: SAELike,
    result: Result,
    settings: SettingsLike,
    out_dir: Path,
) -> dict[str, float]:
    """Writes an SAE's core results as SAE-Bench's multiple_evals does.

    Args:
        result: see `shared_core_evals`.
    Returns:
        the scalars, without their groups, and our own figures, checked by `check_core`.
    """
    from sae_bench.evals.core import main as core
    from sae_bench.sae_bench_utils import (
        general_utils,
        get_eval_uuid,
        get_sae_bench_version,
        get_sae_lens_version,
    )

    scalars, features, own, *_ = result
    flat = {metric: value for group in scalars.values() for metric, value in group.items()} | own
    check_core(name, flat)
    folder = out_dir / "eval_results" / "core"
    folder.mkdir(parents=True, exist_ok=True)
    core.save_single_eval_result(
        {
            "sae_set": name,
            "sae_id": "custom_sae",
            "eval_cfg": core_config(settings),
            "metrics": scalars,
            # Features that never fire have no such ratio; this is SAE-Bench's own step.
            "feature_metrics": core.replace_nans_with_negative_one(features),
        },
        get_eval_uuid(),
        get_sae_lens_version(),
        get_sae_bench_version(),
        general_utils.get_results_filepath(str(folder), name, "custom_sae"),
        sae,
    )
    return flat


def check_trained(name: str, sae: SAELike, untrained: SAELike) -> None:
    """ExperimentError where training left an SAE as it was, or weights that are no numbers."""
    check_finite(name, dict(sae.named_parameters()))
    if torch.equal(sae.W_enc, untrained.W_enc):
        raise ExperimentError(
            f"{name}: no training step was done, its weights are those it was initialized with: "
            "look at the training loop"
        )


def check_finite(name: str, weights: dict[str, torch.Tensor]) -> None:
    """ExperimentError where a weight of an SAE is no number."""
    for parameter, tensor in weights.items():
        if n_odd := int((~torch.isfinite(tensor)).sum()):
            raise ExperimentError(
                f"{name}: {n_odd} of the {tensor.numel()} values of {parameter} are not finite "
                "after training: look at what writes it, at the loss and at lr"
            )


def check_core(name: str, metrics: dict[str, float]) -> None:
    """ExperimentError where a scalar of core is not finite, is the -1 for NaN, or L0 is 0."""
    for metric, value in metrics.items():
        if not math.isfinite(value) or value == -1:
            raise ExperimentError(
                f"core evaluation of {name}: {metric} is {value}, which can't be right; "
                "look at the SAE's weights and at the evaluation text"
            )
    if metrics["l0"] == 0:
        raise ExperimentError(
            f"core evaluation of {name}: L0 is 0, no feature is active on any token of the "
            "evaluation text; look at the SAE's weights, at the penalty and at encode"
        )
