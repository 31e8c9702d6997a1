"""The labelled texts of sparse probing, drawn and tokenized as SAE-Bench does it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from harness.call_graph import reachable_code
from harness.console import Progress
from harness.errors import ExperimentError, first_line
from harness.fingerprint import environment_fingerprint, text_identity
from harness.identity import describe
from harness.interfaces import SettingsLike
from harness.probe_sets import SHIPPED, ProbeSet, load_task, own_sets, probe_names
from harness.ranks import RANKS
from harness.store import TensorCache, digest
from harness.text import documents, load_dataset
from harness.tokenizer import counted, special_token_ids

CPU = torch.device("cpu")


@contextlib.contextmanager
def known_to_stock(sets: dict[str, ProbeSet]) -> Iterator[None]:
    """Makes labelled texts known to SAE-Bench by their names.

    SAE-Bench knows only its own data sets; this adds to its table of classes and stands in front
    of its loader, and undoes both afterwards.
    """
    if not sets:
        yield
        return
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    stock = dataset_utils.get_multi_label_train_test_data

    def load(name: str, *sizes_and_seed: int) -> tuple[dict, dict]:
        if name in sets:
            return sets[name].load(*sizes_and_seed)
        return stock(name, *sizes_and_seed)

    for name, own in sets.items():
        dataset_info.chosen_classes_per_dataset[name] = own.classes
    dataset_utils.get_multi_label_train_test_data = load
    try:
        yield
    finally:
        dataset_utils.get_multi_label_train_test_data = stock
        for name in sets:
            del dataset_info.chosen_classes_per_dataset[name]


def probe_tokens(
    dataset: str, tokenizer: Any, device: torch.device, settings: SettingsLike
) -> list[dict[str, Any]]:
    """The token ids of a probing data set, train and test, as SAE-Bench draws and tokenizes it.

    Of each class without the columns at the end that are padding alone.

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
    encoded = (
        dataset_utils.tokenize_data_dictionary(
            dataset_utils.filter_dataset(texts, classes),
            tokenizer,
            settings.context,
            str(device),
        )
        for texts in split
    )
    return [
        {label: {"input_ids": cut(of["input_ids"], tokenizer)} for label, of in part.items()}
        for part in encoded
    ]


def cut(tokens_NL: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Texts (N, L) as long as the longest of them: SAE-Bench pads all to the context.

    Short ones would cost as much as long ones. What stands behind a token changes nothing of it.
    """
    columns = counted(tokens_NL, special_token_ids(tokenizer), first=0).any(dim=0).nonzero()
    return tokens_NL[:, : int(columns[-1]) + 1 if len(columns) else 1].contiguous()


def read_probe_texts(
    settings: SettingsLike, tokenizer: Any, device: torch.device
) -> dict[str, list[dict[str, Any]]]:
    """`probe_tokens` of each data set: read before training, so that what is wrong shows early.

    Of several ranks the first reads them, on the CPU: its GPU is another one's, too.
    """
    read = RANKS.by_first(texts_read, settings, tokenizer)
    return {
        name: [{label: {"input_ids": e["input_ids"].to(device)} for label, e in part.items()}
               for part in split]
        for name, split in read.items()
    }  # fmt: skip


def texts_read(settings: SettingsLike, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """See `read_probe_texts`; looks at the beginning of the evaluation's text, too.

    Those that no hub may change are kept for the next run.
    """
    if settings.core_text != "tinylm":
        texts = documents(settings.core_text, "heldout")()
        if next(texts, None) is None:
            raise ExperimentError(f"the text {settings.core_text!r} holds no text: check core_text")
    names, sets, texts = probe_names(settings), own_sets(settings), {}
    with known_to_stock(sets):
        progress = Progress("probing texts", len(names), "data sets")
        for name in names:
            kept_texts = probing_texts(name, sets.get(name), settings, tokenizer)
            found = functools.partial(probe_tokens, name, tokenizer, CPU, settings)
            texts[name] = kept_texts.get("all", found)
            kept_texts.flush()
            check_texts(name, texts[name], tokenizer, settings.first_positions)
            progress.advance(1, name)
    progress.close()
    return texts


def check_texts(dataset: str, split: list[dict[str, Any]], tokenizer: Any, first: int) -> None:
    """ExperimentError where a text has no token that counts: probes would be given NaN of it."""
    special = special_token_ids(tokenizer)
    tokens = [e["input_ids"] for part in split for e in part.values()]
    rows = [row for t_BL in tokens for row in t_BL[~counted(t_BL, special, first).any(dim=1)]]
    if rows:
        text = tokenizer.decode(rows[0], skip_special_tokens=True)
        raise ExperimentError(
            f"each text of the probing data set {dataset!r} must have a token that counts, but "
            f"{len(rows)} have none, such as {text!r} (first_positions = {first}, and special "
            "tokens don't count): leave them out, or the set"
        )


def probing_texts(
    dataset: str, own: ProbeSet | None, settings: SettingsLike, tokenizer: Any
) -> TensorCache:
    """Where the token ids of a set are kept, if SAE-Bench doesn't read it: a hub's may change."""
    if own is None:
        return TensorCache("probing texts", None)
    code_of = [SHIPPED[own.package]().load_task, load_task] if own.package else []
    code = reachable_code(None, [probe_tokens, known_to_stock, *code_of])
    fields = [field.name for field in dataclasses.fields(settings)]
    key = {
        "data set": dataset,
        # All that its code names, so that none is forgotten.
        "setting": {f: getattr(settings, f) for f in fields if f".{f}" in code.all_names},
        "tokenizer": describe(tokenizer),
        **environment_fingerprint(settings, code, CPU),
        **(text_identity(own.package) if own.package else {"text": digest(own.load(0, 0, 0))}),
    }
    return TensorCache("probing texts", key)
