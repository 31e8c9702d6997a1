"""SAE-Bench's sparse probing of several SAEs."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.console import Progress
from harness.errors import ExperimentError, error_context
from harness.evaluation.core import prepare_for_sae_bench
from harness.evaluation.features import add_probing, class_differences, shown_saes
from harness.evaluation.probe_features import Classes, probing_features
from harness.fingerprint import result_key, tokens_digest
from harness.generators import seed_generators
from harness.identity import describe
from harness.interfaces import RunLike, SAELike, SettingsLike
from harness.machine import retain_freed_memory
from harness.probe_sets import probe_names
from harness.ranks import RANKS
from harness.store import cached, cached_each


def probing_config(settings: SettingsLike, names: Sequence[str] | None = None) -> Any:
    """SAE-Bench's SparseProbingEvalConfig of a run. `names`: of the data sets, where known."""
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    return SparseProbingEvalConfig(
        random_seed=settings.probe_seed,
        dataset_names=list(names or probe_names(settings)),
        probe_train_set_size=settings.probe_train,
        probe_test_set_size=settings.probe_test,
        context_length=settings.context,
        sae_batch_size=settings.probe_sae_batch,
        llm_batch_size=settings.probe_llm_batch,
        llm_dtype=settings.lm_dtype,
        model_name=settings.model,
        k_values=list(settings.probe_ks),
    )


ALL = "all_test_accuracy"  # of `all_dimensions`, behind sae_ or llm_: not SAE-Bench's
Probe = Callable[[tuple[Classes, ...], str, tuple[int, ...]], dict[str, dict[str, float]]]


def all_dimensions(acts: tuple[Classes, ...], seed: int) -> dict[str, float]:
    """By class, the test accuracy of a probe on all dimensions that chooses nothing by it.

    SAE-Bench's own such probe keeps the epoch that is best on the test set. This one is what its
    probes of k dimensions are, on all of them. The texts are drawn from a generator of their own,
    so that all SAEs and the language model are tested on the same ones.

    Args:
        acts: of the train and of the test texts, {class: (N, D or F)}.
    """
    from sae_bench.evals.sparse_probing.probe_training import prepare_probe_data

    accuracies = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for label in acts[0]:
            train, (x_ND, y_N) = (prepare_probe_data(part, label) for part in acts)
            w_D, b = logistic_regression(*train)
            right_N = (x_ND.float() @ w_D + b > 0) == (y_N > 0)
            accuracies[label] = float(right_N.double().mean())
    return accuracies


def logistic_regression(x_ND: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and bias that minimize −Σ log p(y) + ‖w‖² / 2: scikit-learn's, with its C = 1.

    On the device of x, by L-BFGS. y is 0 or 1.
    """
    x_ND, y_N = x_ND.float(), y_N.float()
    w_D = x_ND.new_zeros(x_ND.shape[1], requires_grad=True)
    b = x_ND.new_zeros((), requires_grad=True)
    options = dict(max_iter=100, tolerance_grad=1e-3, line_search_fn="strong_wolfe")
    optimizer = torch.optim.LBFGS([w_D, b], **options)

    def loss() -> Tensor:
        optimizer.zero_grad()
        nll = F.binary_cross_entropy_with_logits(x_ND @ w_D + b, y_N, reduction="sum")
        total = nll + w_D.pow(2).sum() / 2
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return w_D.detach(), b.detach()


def drawn_from(
    state: int | str, probe: Probe, acts: tuple[Classes, ...], who: str, ks: tuple[int, ...],
    seed: int,
) -> tuple[dict[str, dict[str, float]], str]:  # fmt: skip
    """`probe(acts, who, ks)` with torch's generator in a state, and the state that it leaves.

    Beside `probe`'s accuracies stand those of `all_dimensions`.

    Args:
        state: a seed, or what this has returned.
    """
    seed_generators("probes", state)  # numpy's and Python's, for what an edit draws
    if isinstance(state, int):
        torch.manual_seed(state)
    else:
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8))
    try:
        accuracies = probe(acts, who, ks)
    except AssertionError as error:
        raise ExperimentError(
            "SAE-Bench's probe tells none of the test texts right, which happens with few of "
            "them: raise probe_test"
        ) from error
    accuracies = accuracies | {f"{who}_{ALL}": all_dimensions(acts, seed)}
    return accuracies, torch.get_rng_state().numpy().tobytes().hex()


def shared_probing(
    run: RunLike,
    dataset: str,
    saes: dict[str, SAELike],
    states: dict[str, int | str],
    probe: Probe,
    digits: dict[str, str],
    shown: Collection[str] = (),
) -> dict[str, tuple[dict[str, dict[str, float]], dict[str, list[float]]]]:
    """`probe` of SAEs on one data set, and of the language model at their layers.

    The language model's own probes begin at the seed for each data set and are kept from run to
    run: no SAE changes them.

    Args:
        saes: prepared by `prepare_for_sae_bench`.
        states: of the generator that each SAE's probes draw from; left as the next set needs them.
        probe: called with {class: (N, D or F)} of train and of test, "llm" or "sae", and
            `probe_ks`; returns {metric: {class: accuracy}}.
        digits: by SAE, what stands for it in keys. shown: those whose features are shown.
    Returns:
        by SAE, {metric: {class: accuracy}}, and of one that is shown `class_differences`.
    """
    settings, split = run.settings, run.probe_texts[dataset]
    more = {"data set": dataset, "texts": tokens_digest(split)}
    given = {"features": probing_features, "draws": drawn_from, "probe": probe,
             "language model": run.sae_bench_model, "differences": class_differences}
    of_llm: dict[str, Any] = {}
    keys: dict[str, dict | None] = dict.fromkeys(saes)
    if run.keeps:
        common = result_key("sparse probing", run, given, saes.values(), **more)
        keys = {name: common | {"SAE": digits[name], "state": states[name], "shown": name in shown}
                for name in saes}  # fmt: skip
        of_llm = result_key("language model probes", run, given, **more)

    def llm_probes(layer: int, acts: tuple[Classes, ...]) -> dict[str, dict[str, float]]:
        key = of_llm | {"layer": layer} if run.keeps else None
        draws = settings.probe_seed, probe, acts, "llm", settings.probe_ks, settings.probe_seed
        return cached("language model probes", key, drawn_from, *draws)[0]

    def probed(names: list[str]) -> Iterator[tuple[str, tuple[dict, str, dict]]]:
        some = {name: saes[name] for name in names}
        with retain_freed_memory():
            llm_acts, sae_acts = probing_features(split, run.sae_bench_model, some, settings, run)
            llm = {layer: llm_probes(layer, acts) for layer, acts in llm_acts.items()}
            for name, acts in sae_acts.items():
                draws = states[name], probe, acts, "sae", settings.probe_ks, settings.probe_seed
                own, after = drawn_from(*draws)
                told = class_differences(acts[0]) if name in shown else {}
                yield name, (own | llm[saes[name].cfg.hook_layer], after, told)

    with error_context(dataset):
        found = cached_each("sparse probing", keys, probed)
    states |= {name: after for name, (_, after, _) in found.items()}
    return {name: (accuracies, told) for name, (accuracies, _, told) in found.items()}


def sparse_probing(
    run: RunLike,
    saes: dict[str, SAELike],
    probe: Probe,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """`probe` of folded SAEs on every data set: by name, sae_… and llm_… mean accuracies.

    Stock SAE-Bench draws all probes of an SAE from one generator, seeded once. This keeps a
    generator state per SAE, so that an SAE's figures are those of a stock call that finds the
    activations stored (the second call of `run_eval_single_sae`). Of several ranks each probes its
    share of them. Writes eval_results/sparse_probing/….json in SAE-Bench's own form; adds to
    features/layer_L.json.gz.

    Args:
        probe: see `shared_probing`. progress: counts SAEs times data sets.
    """
    s = run.settings
    ready = {name: prepare_for_sae_bench(sae, s) for name, sae in saes.items()}
    digits = {name: describe(sae) if run.keeps else "" for name, sae in ready.items()}
    shown = shown_saes(saes, s)

    def of_share(own: dict[str, SAELike]) -> dict[str, tuple[dict, dict]]:
        states: dict[str, int | str] = dict.fromkeys(own, s.probe_seed)
        share: dict[str, tuple[dict, dict]] = {name: ({}, {}) for name in own}
        for dataset in run.probe_texts:
            found = shared_probing(run, dataset, own, states, probe, digits, shown)
            for name, (accuracies, told) in found.items():
                share[name][0][f"{dataset}_results"] = accuracies
                share[name][1][dataset] = told
            progress.advance(len(saes), dataset)
        return share

    found = RANKS.spread(of_share, ready)
    for name, layer in shown.items():
        add_probing(run.out_dir, layer, found[name][1])
    return {
        name: save_probing(name, ready[name], found[name][0], s, run.out_dir) for name in saes
    }


def save_probing(
    name: str, sae: SAELike, per_class: dict, settings: SettingsLike, out_dir: Path
) -> dict[str, float]:
    """Writes an SAE's sparse-probing results as SAE-Bench's run_eval does; returns the means.

    Over 60 lines, as one piece: half of them fill the fields of SAE-Bench's record.

    Args:
        per_class: {data set's name and "_results": {metric: {class: accuracy}}}.
    Returns:
        the means, our own among them, and none of more features or dimensions than there are.
    Raises:
        ExperimentError: an accuracy is not between 0 and 1.
    """
    from sae_bench.evals.sparse_probing import eval_output as output
    from sae_bench.sae_bench_utils import (
        general_utils,
        get_eval_uuid,
        get_sae_bench_version,
        get_sae_lens_version,
    )

    def stock(metrics: dict[str, Any]) -> dict[str, Any]:
        return {metric: v for metric, v in metrics.items() if not metric.endswith(ALL)}

    def place(metric: str) -> int:  # SAE-Bench's order
        return 0 if metric == "sae_test_accuracy" else 1 if metric.startswith("llm_") else 2

    per_class = {
        dataset: {metric: metrics[metric] for metric in sorted(metrics, key=place)}
        for dataset, metrics in per_class.items()
    }
    config = probing_config(settings, [name.removesuffix("_results") for name in per_class])
    details = {
        # sum / len, as SAE-Bench has it: equal figures are to be equal bit for bit.
        dataset: {m: sum(accuracy.values()) / len(accuracy) for m, accuracy in metrics.items()}
        for dataset, metrics in per_class.items()
    }
    means = general_utils.average_results_dictionaries(details, config.dataset_names)
    for metric, value in means.items():
        if not 0.0 <= value <= 1.0:
            raise ExperimentError(
                f"sparse probing of {name}: {metric} is {value}, which is no accuracy; "
                "look at the SAE's weights and at the probing data"
            )
    folder = out_dir / "eval_results" / "sparse_probing"
    folder.mkdir(parents=True, exist_ok=True)
    result = output.SparseProbingEvalOutput(
        eval_config=config,
        eval_id=get_eval_uuid(),
        datetime_epoch_millis=int(time.time() * 1000),
        eval_result_metrics=output.SparseProbingMetricCategories(
            llm=output.SparseProbingLlmMetrics(
                **{metric: v for metric, v in stock(means).items() if metric.startswith("llm_")}
            ),
            sae=output.SparseProbingSaeMetrics(
                **{metric: v for metric, v in stock(means).items() if metric.startswith("sae_")}
            ),
        ),
        eval_result_details=[
            output.SparseProbingResultDetail(dataset_name=dataset, **stock(detail))
            for dataset, detail in details.items()
        ],
        eval_result_unstructured={dataset: stock(found) for dataset, found in per_class.items()},
        sae_bench_commit_hash=get_sae_bench_version(),
        sae_lens_id="custom_sae",
        sae_lens_release_id=name,
        sae_lens_version=get_sae_lens_version(),
        sae_cfg_dict=sae.cfg.to_dict(),
    )
    path = general_utils.get_results_filepath(str(folder), name, "custom_sae")
    result.to_json_file(path, indent=2)
    # SAE-Bench calls a probe of 32 dimensions top_50, where there are no more.
    widths = {"sae": sae.cfg.d_sae, "llm": sae.cfg.d_in}
    top = {f"{who}_top_{k}_test_accuracy": k <= n for who, n in widths.items()
           for k in settings.probe_ks}  # fmt: skip
    return {metric: value for metric, value in means.items() if top.get(metric, True)}
