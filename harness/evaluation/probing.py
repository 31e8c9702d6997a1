"""SAE-Bench's sparse probing of several SAEs, each pass of the language model made once."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.console import Progress
from harness.errors import ExperimentError, error_context, first_line
from harness.fingerprint import (
    environment_fingerprint,
    forward_key,
    llm_probes_key,
    text_identity,
    tokens_digest,
)
from harness.interfaces import SAELike, SettingsLike
from harness.machine import in_order, retain_freed_memory
from harness.store import ACTIVATIONS_GB, TensorCache, cached, cached_each
from harness.text import corpus_errors, documents, load_dataset


@contextlib.contextmanager
def tinylm_tasks(settings: SettingsLike) -> Iterator[None]:
    """Makes tinylm's labelled tasks known to SAE-Bench by the names tinylm/A/… and tinylm/B/….

    SAE-Bench knows only its own data sets; this adds to its table of classes and stands in front
    of its loader, and undoes both afterwards.
    """
    if not any(name.startswith("tinylm/") for name in settings.probe_sets):
        yield
        return
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    from tinylm import tasks

    stock = dataset_utils.get_multi_label_train_test_data
    names = {
        f"tinylm/{letter}/{task}": task
        for letter, members in tasks.TASK_SETS.items()
        for task in members
    }

    def load(name: str, train_size: int, test_size: int, seed: int) -> tuple[dict, dict]:
        if name not in names:
            return stock(name, train_size, test_size, seed)
        with corpus_errors():
            return tasks.load_task(names[name], train_size, test_size, seed)

    for name, task in names.items():
        dataset_info.chosen_classes_per_dataset[name] = list(tasks.TASKS[task])
    dataset_utils.get_multi_label_train_test_data = load
    try:
        yield
    finally:
        dataset_utils.get_multi_label_train_test_data = stock
        for name in names:
            del dataset_info.chosen_classes_per_dataset[name]


def probe_names(settings: SettingsLike) -> list[str]:
    """The data sets of sparse probing; tinylm/A and tinylm/B stand for three tasks each."""
    names = []
    for name in settings.probe_sets:
        if name in ("tinylm/A", "tinylm/B"):
            from tinylm import tasks

            names += [f"{name}/{task}" for task in tasks.TASK_SETS[name.removeprefix("tinylm/")]]
        else:
            names.append(name)
    return names


def probing_config(settings: SettingsLike) -> Any:
    """SAE-Bench's SparseProbingEvalConfig of a run."""
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    return SparseProbingEvalConfig(
        random_seed=settings.probe_seed,
        dataset_names=probe_names(settings),
        probe_train_set_size=settings.probe_train,
        probe_test_set_size=settings.probe_test,
        context_length=settings.context,
        sae_batch_size=settings.probe_sae_batch,
        llm_batch_size=settings.probe_llm_batch,
        llm_dtype=settings.lm_dtype,
        model_name=settings.model,
        k_values=list(settings.probe_ks),
    )


def probe_tokens(
    dataset: str, tokenizer: Any, device: torch.device, settings: SettingsLike
) -> list[dict[str, Any]]:
    """The token ids of a probing data set, train and test, as SAE-Bench draws and tokenizes it.

    Raises:
        ExperimentError: it has other columns or classes, or too few rows.
    """
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    too_few = (
        f"the probing data set {dataset!r} has too few rows for probe_train = "
        f"{settings.probe_train} and probe_test = {settings.probe_test}: lower them"
    )
    stock, dataset_utils.load_dataset = dataset_utils.load_dataset, load_dataset
    try:
        split = dataset_utils.get_multi_label_train_test_data(
            dataset, settings.probe_train, settings.probe_test, settings.probe_seed
        )
    except ExperimentError:
        raise
    except KeyError as error:
        raise ExperimentError(
            f"the probing data set {dataset!r} has no {error}, which SAE-Bench reads: its columns "
            "or classes have changed; take it out of probe_sets, or pin an older copy"
        ) from error
    except Exception as error:
        if isinstance(error, AssertionError) or "larger sample" in str(error):
            raise ExperimentError(too_few) from error
        raise ExperimentError(
            f"the probing data set {dataset!r} can't be read ({type(error).__name__}: "
            f"{first_line(error)}): look at its files, or take it out of probe_sets"
        ) from error
    finally:
        dataset_utils.load_dataset = stock
    classes = dataset_info.chosen_classes_per_dataset[dataset]
    # SAE-Bench leaves out classes of some data sets that have too few rows.
    if any(label not in texts for texts in split for label in classes):
        raise ExperimentError(too_few)
    return [
        dataset_utils.tokenize_data_dictionary(
            dataset_utils.filter_dataset(texts, classes),
            tokenizer,
            settings.context,
            str(device),
        )
        for texts in split
    ]


def read_probe_texts(
    settings: SettingsLike, tokenizer: Any, device: torch.device
) -> dict[str, list[dict[str, Any]]]:
    """`probe_tokens` of each data set: read before training, so that what is wrong shows early.

    So is the beginning of the evaluation's text. tinylm's are kept for the next run.
    """

    def drawn(name: str) -> list[dict[str, Any]]:
        return [
            {label: {"input_ids": encoded["input_ids"]} for label, encoded in part.items()}
            for part in probe_tokens(name, tokenizer, device, settings)
        ]

    if not settings.core_text.startswith("tinylm"):
        texts = documents(settings.core_text, "heldout")()
        if next(texts, None) is None:
            raise ExperimentError(f"the text {settings.core_text!r} holds no text: check core_text")
    with tinylm_tasks(settings):
        names = probe_names(settings)
        progress = Progress("probing texts", len(names), "data sets")
        texts = {}
        for name in names:
            kept_texts = probing_texts(name, settings, device)
            texts[name] = [
                {label: {"input_ids": e["input_ids"].to(device)} for label, e in part.items()}
                for part in kept_texts.get("all", functools.partial(drawn, name))
            ]
            kept_texts.flush()
            progress.advance(1, name)
    progress.close()
    return texts


def probing_texts(dataset: str, settings: SettingsLike, device: torch.device) -> TensorCache:
    """Where the token ids of one of tinylm's tasks are kept; a hub's data sets may change."""
    if not dataset.startswith("tinylm/"):
        return TensorCache("probing texts", None)
    chosen = ("probe_train", "probe_test", "probe_seed")
    key = {
        "data set": dataset,
        "setting": {field: getattr(settings, field) for field in chosen},
        **environment_fingerprint(settings, "import harness", device),
        **text_identity("tinylm"),
    }
    return TensorCache("probing texts", key)


def probing_passes(settings: SettingsLike, model: Any, texts: list[dict[str, Any]]) -> TensorCache:
    """Where a data set's passes of the language model are kept, if they are not too large.

    Args:
        texts: {class: {"input_ids": (N, L)}} per split.
    """
    numbers = sum(encoded["input_ids"].numel() for part in texts for encoded in part.values())
    numbers *= len(settings.layers) * model.cfg.d_model
    key = None
    if numbers * model.cfg.dtype.itemsize <= ACTIVATIONS_GB * 1e9:
        key = forward_key(settings, model.cfg.device, texts=tokens_digest(texts))
    return TensorCache("probing passes", key)


def pooled_features(
    splits: Sequence[dict[str, Any]],
    model: Any,
    saes: dict[str, SAELike],
    settings: SettingsLike,
    kept_passes: TensorCache | None = None,
) -> list[tuple[dict[int, dict], dict[str, dict]]]:
    """Mean activations of each text, of the language model and of each SAE, in one forward pass.

    The batches are SAE-Bench's (`probe_llm_batch` texts through the model, `probe_sae_batch`
    through an SAE, one class at a time), and so are the functions: the features are the stock
    ones bit for bit, without ever holding a data set's activations at once. On a CPU classes are
    passed through side by side, each on its own cores.

    Args:
        splits: class -> {"input_ids": (N, L)}, from SAE-Bench's tokenize_data_dictionary; of
            several splits, train first.
        kept_passes: where the language model's are kept.
    Returns:
        for each split, by layer {class: (N, D)}, and by the SAE's name {class: (N, F)}.
    """
    from sae_bench.sae_bench_utils import activation_collection as collection

    hooks = {layer: f"blocks.{layer}.hook_resid_post" for layer in settings.layers}
    kept_passes = kept_passes or TensorCache("", None)

    def one_pass(tokens_BL: Tensor) -> list[Tensor]:
        _, cache = model.run_with_cache(
            tokens_BL, names_filter=list(hooks.values()), stop_at_layer=max(hooks) + 1
        )
        return [cache[hook] for hook in hooks.values()]

    def one_class(item: tuple[int, int, str]) -> dict[Any, Tensor]:
        """By layer (N, D), and by the SAE's name (N, F)."""
        at, number, label = item
        tokens_NL = splits[at][label]["input_ids"]
        waiting = {layer: [] for layer in hooks}
        parts: dict[Any, list] = {key: [] for key in (*hooks, *saes)}
        done = 0
        for start in range(0, len(tokens_NL), settings.probe_llm_batch):
            batch_BL = tokens_NL[start : start + settings.probe_llm_batch]
            mask_BL = collection.get_bos_pad_eos_mask(batch_BL, model.tokenizer)
            name = f"{('train', 'test')[at]}-{number:03d}-{start:06d}"
            acts = kept_passes.get(name, functools.partial(one_pass, batch_BL))
            for layer, acts_BLD in zip(hooks, acts):
                waiting[layer].append(acts_BLD.to(mask_BL.device) * mask_BL[:, :, None])
            done_now = start + len(batch_BL)
            while (size := min(settings.probe_sae_batch, len(tokens_NL) - done)) and (
                done_now - done >= size
            ):
                done += size
                for layer in hooks:
                    acts_BLD = torch.cat(waiting[layer])
                    window = {label: acts_BLD[:size].clone()}
                    waiting[layer] = [acts_BLD[size:]]
                    parts[layer].append(collection.create_meaned_model_activations(window)[label])
                    for name, sae in saes.items():
                        if sae.cfg.hook_layer == layer:
                            meaned = collection.get_sae_meaned_activations(
                                window, sae, settings.probe_sae_batch
                            )
                            parts[name].append(meaned[label])
        return {key: torch.cat(tensors) for key, tensors in parts.items()}

    items = [
        (at, number, label)
        for at, tokens in enumerate(splits)
        for number, label in enumerate(tokens)
    ]
    found = in_order(one_class, items, torch.device(model.cfg.device))
    results = [({key: {} for key in hooks}, {key: {} for key in saes}) for _ in splits]
    for (at, _, label), meaned in zip(items, found):
        for kind in results[at]:
            for key in kind:
                kind[key][label] = meaned[key]
    kept_passes.flush()
    return results


def probe(train: dict, test: dict, prefix: str, ks: tuple[int, ...]) -> dict[str, dict]:
    """SAE-Bench's probes on pooled features, in SAE-Bench's order: {metric: {class: accuracy}}."""
    from sae_bench.evals.sparse_probing import probe_training

    results = {}
    for k in (None, *ks):
        options = dict(use_sklearn=False, batch_size=250, epochs=100, lr=1e-2) if k is None else {}
        try:
            _, accuracies = probe_training.train_probe_on_activations(
                train, test, select_top_k=k, **options
            )
        except AssertionError as error:
            raise ExperimentError(
                "SAE-Bench's probe tells none of the test texts right, which happens with few of "
                "them: raise probe_test"
            ) from error
        middle = "" if k is None else f"top_{k}_"
        results[f"{prefix}_{middle}test_accuracy"] = accuracies
    return results


def probe_rng_states(saes: Iterable[str], settings: SettingsLike) -> dict[str, str]:
    """By SAE, the state of the generator that its probes draw from at the start, in hexadecimal."""
    torch.manual_seed(settings.probe_seed)
    return dict.fromkeys(saes, torch.get_rng_state().numpy().tobytes().hex())


def probe_data_set(
    dataset: str,
    split: list[dict],
    saes: dict[str, SAELike],
    states: dict[str, str],
    model: Any,
    settings: SettingsLike,
    keys: dict[str, dict] | None,
) -> dict[str, dict]:
    """SAE-Bench's probes on one data set: by SAE {metric: {class: accuracy}}.

    The language model's own probes begin at the seed for each data set and are kept from run to
    run: no SAE changes them.

    Args:
        saes: prepared by `prepare_for_sae_bench`. states: see `probe_rng_states`; left as the next set needs them.
        keys: by SAE, all that its figures depend on beside texts and states: they are kept under
            it, and the language model's passes are; None: nothing is.
    """
    @retain_freed_memory()
    def some_saes(names: list[str]) -> dict[str, tuple[dict, str]]:
        some = {name: saes[name] for name in names}
        passes = probing_passes(settings, model, split) if keys else None
        (llm_train, sae_train), (llm_test, sae_test) = pooled_features(
            split, model, some, settings, passes
        )
        llm, results = {}, {}
        for layer in {sae.cfg.hook_layer: None for sae in some.values()}:
            torch.manual_seed(settings.probe_seed)
            key = llm_probes_key(dataset, layer, split, settings)
            acts = llm_train[layer], llm_test[layer], "llm", settings.probe_ks
            llm[layer] = cached("language model probes", key, probe, *acts)
        for name, sae in some.items():
            torch.set_rng_state(torch.tensor(list(bytes.fromhex(states[name])), dtype=torch.uint8))
            found = probe(sae_train[name], sae_test[name], "sae", settings.probe_ks)
            after = torch.get_rng_state().numpy().tobytes().hex()
            # SAE-Bench's order: the SAE's full probe, the language model's, the SAE's top k.
            full = {"sae_test_accuracy": found.pop("sae_test_accuracy")}
            results[name] = full | llm[sae.cfg.hook_layer] | found, after
        return results

    before = {"dataset": dataset, "texts": tokens_digest(split)}
    own = {n: keys and keys[n] | before | {"state": states[n]} for n in saes}
    with error_context(dataset):
        found = cached_each("sparse probing", own, some_saes)
    states |= {name: state for name, (_, state) in found.items()}
    return {name: results for name, (results, _) in found.items()}


def save_probing(
    name: str, sae: SAELike, per_class: dict, settings: SettingsLike, out_dir: Path
) -> dict[str, float]:
    """Writes an SAE's sparse-probing results as SAE-Bench's run_eval does; returns the means.

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

    config = probing_config(settings)
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
                **{metric: v for metric, v in means.items() if metric.startswith("llm_")}
            ),
            sae=output.SparseProbingSaeMetrics(
                **{metric: v for metric, v in means.items() if metric.startswith("sae_")}
            ),
        ),
        eval_result_details=[
            output.SparseProbingResultDetail(dataset_name=dataset, **detail)
            for dataset, detail in details.items()
        ],
        eval_result_unstructured=per_class,
        sae_bench_commit_hash=get_sae_bench_version(),
        sae_lens_id="custom_sae",
        sae_lens_release_id=name,
        sae_lens_version=get_sae_lens_version(),
        sae_cfg_dict=sae.cfg.to_dict(),
    )
    path = general_utils.get_results_filepath(str(folder), name, "custom_sae")
    result.to_json_file(path, indent=2)
    return means
