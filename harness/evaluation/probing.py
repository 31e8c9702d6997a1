"""SAE-Bench's sparse probing of several SAEs, each pass of the language model made once."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.console import Progress
from harness.errors import ExperimentError, error_context
from harness.evaluation.core import prepare_for_sae_bench
from harness.fingerprint import result_key, tokens_digest
from harness.generators import seed_generators
from harness.identity import describe
from harness.interfaces import RunLike, SAELike, SettingsLike
from harness.language_model import acts_at, hook_name, plain_of
from harness.machine import in_order, retain_freed_memory
from harness.probe_sets import probe_names
from harness.store import ACTIVATIONS_GB, TensorCache, cached, cached_each
from harness.tokenizer import counted, special_token_ids


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


def probing_cache(run: RunLike | None, texts: Sequence[dict[str, Any]]) -> TensorCache:
    """Where a data set's passes of the language model are kept, if they are not too large.

    Args:
        run: for which they are kept; None: they are not.
        texts: {class: {"input_ids": (N, L)}} per split.
    """
    key = None
    if run is not None and run.keeps:
        s, model = run.settings, run.sae_bench_model
        numbers = sum(encoded["input_ids"].numel() for part in texts for encoded in part.values())
        numbers *= len(s.layers) * model.cfg.d_model
        if numbers * model.cfg.dtype.itemsize <= ACTIVATIONS_GB * 1e9:
            given = {"passes": masked_activations, "language model": model}
            more = {"layers": s.layers, "hook": s.hook, "batch": s.probe_llm_batch}
            more["texts"] = tokens_digest(texts)
            key = result_key("probing passes", run, given, **more)
    return TensorCache("probing passes", key)


def masked_activations(
    tokens_NL: Tensor, one_pass: Callable[[Tensor], dict[str, Tensor]], tokenizer: Any,
    settings: SettingsLike, cache: TensorCache, name: str,
) -> Iterator[list[Tensor]]:  # fmt: skip
    """What is read of texts, (B, L, D) for each of `settings.layers`.

    `probe_llm_batch` texts at a time, zero where a token doesn't count, as SAE-Bench has it.

    Args:
        one_pass: of token ids (B, L), what stands at the hooks.
        name: the beginning of that under which the passes are kept.
    """
    def acts_of(tokens_BL: Tensor) -> list[Tensor]:
        return list(one_pass(tokens_BL).values())

    for start in range(0, len(tokens_NL), settings.probe_llm_batch):
        tokens_BL = tokens_NL[start : start + settings.probe_llm_batch]
        mask_BL = counted(tokens_BL, special_token_ids(tokenizer), settings.first_positions)
        acts = cache.get(f"{name}-{start:06d}", functools.partial(acts_of, tokens_BL))
        yield [acts_BLD.to(mask_BL.device) * mask_BL[:, :, None] for acts_BLD in acts]


def regrouped(parts: Iterable[list[Tensor]], size: int) -> Iterator[list[Tensor]]:
    """Joins and cuts batches into others of `size` rows; the last one has what is left.

    Args:
        parts: of each batch several tensors, of as many rows.
    """
    waiting: list[list[Tensor]] = []
    n_rows = 0
    for part in parts:
        waiting.append(part)
        n_rows += len(part[0])
        while n_rows >= size:
            joined = [torch.cat(tensors) for tensors in zip(*waiting)]
            # Cloned: what a product of matrices rounds to may depend on where in memory they lie.
            yield [tensor[:size].clone() for tensor in joined]
            waiting = [[tensor[size:] for tensor in joined]]
            n_rows -= size
    if n_rows:
        yield [torch.cat(tensors) for tensors in zip(*waiting)]


def mean_activations(
    acts: dict[int, Tensor], saes: dict[str, SAELike], settings: SettingsLike
) -> dict[Any, Tensor]:
    """SAE-Bench's means over the tokens of texts: by layer (B, D), by SAE (B, F).

    Args:
        acts: by layer (B, L, D), zero where a token doesn't count.
    """
    from sae_bench.sae_bench_utils import activation_collection as collection

    means: dict[Any, Tensor] = {}
    for layer in {sae.cfg.hook_layer: None for sae in saes.values()}:
        means[layer] = collection.create_meaned_model_activations({"": acts[layer]})[""]
    for key, sae in saes.items():
        texts = {"": acts[sae.cfg.hook_layer]}
        means[key] = collection.get_sae_meaned_activations(texts, sae, settings.probe_sae_batch)[""]
    return means


Classes = dict[str, Tensor]  # {class: (N, D)} or {class: (N, F)}


def probing_features(
    splits: Sequence[dict[str, Any]],
    model: Any,
    saes: dict[str, SAELike],
    settings: SettingsLike,
    run: RunLike | None = None,
) -> tuple[dict[int, tuple[Classes, ...]], dict[str, tuple[Classes, ...]]]:
    """Mean activations of each text, of the language model and of each SAE, in one forward pass.

    The batches are SAE-Bench's (`probe_llm_batch` texts through the model, `probe_sae_batch`
    through an SAE, one class at a time), and so are the functions: the features are the stock
    ones bit for bit, without ever holding a data set's activations at once. On a CPU classes are
    passed through side by side, each on its own cores.

    Args:
        splits: class -> {"input_ids": (N, L)}, from SAE-Bench's tokenize_data_dictionary; of
            several splits, train first.
        saes: prepared by `prepare_for_sae_bench`.
        run: for which the language model's passes are kept; None: they are not.
    Returns:
        by layer of the SAEs, {class: (N, D)} of each split; by SAE, {class: (N, F)} of each split.
    """
    cache = probing_cache(run, splits)
    hooks = {hook_name(settings.hook, layer): layer for layer in settings.layers}
    one_pass = functools.partial(acts_at, model, hooks, plain=plain_of(model))

    def one_class(item: tuple[int, int, str]) -> dict[Any, Tensor]:
        split, number, label = item
        tokens_NL = splits[split][label]["input_ids"]
        name = f"{('train', 'test')[split]}-{number:03d}"
        given = tokens_NL, one_pass, model.tokenizer, settings, cache, name
        passes = masked_activations(*given)
        means = [
            mean_activations(dict(zip(settings.layers, acts)), saes, settings)
            for acts in regrouped(passes, settings.probe_sae_batch)
        ]
        return {key: torch.cat([part[key] for part in means]) for key in means[0]}

    items = [
        (split, number, label)
        for split, classes in enumerate(splits)
        for number, label in enumerate(classes)
    ]
    found = in_order(one_class, items, torch.device(model.cfg.device))
    cache.flush()
    llm = {sae.cfg.hook_layer: tuple({} for _ in splits) for sae in saes.values()}
    sae = {key: tuple({} for _ in splits) for key in saes}
    both = llm | sae
    for (split, _, label), means in zip(items, found):
        for key, mean in means.items():
            both[key][split][label] = mean
    return llm, sae


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
) -> dict[str, dict[str, dict[str, float]]]:
    """`probe` of SAEs on one data set, and of the language model at their layers.

    The language model's own probes begin at the seed for each data set and are kept from run to
    run: no SAE changes them.

    Args:
        saes: prepared by `prepare_for_sae_bench`.
        states: of the generator that each SAE's probes draw from; left as the next set needs them.
        probe: called with {class: (N, D or F)} of train and of test, "llm" or "sae", and
            `probe_ks`; returns {metric: {class: accuracy}}.
        digits: by SAE, what stands for it in keys.
    Returns:
        by SAE, {metric: {class: accuracy}}.
    """
    settings, split = run.settings, run.probe_texts[dataset]
    more = {"data set": dataset, "texts": tokens_digest(split)}
    given = {"features": probing_features, "draws": drawn_from, "probe": probe,
             "language model": run.sae_bench_model}  # fmt: skip
    of_llm: dict[str, Any] = {}
    keys: dict[str, dict | None] = dict.fromkeys(saes)
    if run.keeps:
        common = result_key("sparse probing", run, given, saes.values(), **more)
        keys = {name: common | {"SAE": digits[name], "state": states[name]} for name in saes}
        of_llm = result_key("language model probes", run, given, **more)

    def llm_probes(layer: int, acts: tuple[Classes, ...]) -> dict[str, dict[str, float]]:
        key = of_llm | {"layer": layer} if run.keeps else None
        draws = settings.probe_seed, probe, acts, "llm", settings.probe_ks, settings.probe_seed
        return cached("language model probes", key, drawn_from, *draws)[0]

    def probed(names: list[str]) -> Iterator[tuple[str, tuple[dict, str]]]:
        some = {name: saes[name] for name in names}
        with retain_freed_memory():
            llm_acts, sae_acts = probing_features(split, run.sae_bench_model, some, settings, run)
            llm = {layer: llm_probes(layer, acts) for layer, acts in llm_acts.items()}
            for name, acts in sae_acts.items():
                draws = states[name], probe, acts, "sae", settings.probe_ks, settings.probe_seed
                own, after = drawn_from(*draws)
                yield name, (own | llm[saes[name].cfg.hook_layer], after)

    with error_context(dataset):
        found = cached_each("sparse probing", keys, probed)
    states |= {name: after for name, (_, after) in found.items()}
    return {name: accuracies for name, (accuracies, _) in found.items()}


def sparse_probing(
    run: RunLike,
    saes: dict[str, SAELike],
    probe: Probe,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """`probe` of folded SAEs on every data set: by name, sae_… and llm_… mean accuracies.

    Stock SAE-Bench draws all probes of an SAE from one generator, seeded once. This keeps a
    generator state per SAE, so that an SAE's figures are those of a stock call that finds the
    activations stored (the second call of `run_eval_single_sae`). Writes
    eval_results/sparse_probing/….json in SAE-Bench's own form.

    Args:
        probe: see `shared_probing`. progress: counts SAEs times data sets.
    """
    s = run.settings
    ready = {name: prepare_for_sae_bench(sae, s) for name, sae in saes.items()}
    digits = {name: describe(sae) if run.keeps else "" for name, sae in ready.items()}
    states: dict[str, int | str] = dict.fromkeys(saes, s.probe_seed)
    per_class: dict[str, dict] = {name: {} for name in saes}
    for dataset in run.probe_texts:
        found = shared_probing(run, dataset, ready, states, probe, digits)
        for name, accuracies in found.items():
            per_class[name][f"{dataset}_results"] = accuracies
        progress.advance(len(saes), dataset)
    return {
        name: save_probing(name, ready[name], per_class[name], s, run.out_dir) for name in saes
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
