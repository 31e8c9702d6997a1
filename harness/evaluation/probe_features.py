"""What SAE-Bench probes: means over the tokens of texts, each pass of the model made once."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.fingerprint import result_key, tokens_digest
from harness.interfaces import RunLike, SAELike, SettingsLike
from harness.language_model import acts_at, hook_name, plain_of
from harness.machine import in_order
from harness.store import ACTIVATIONS_GB, TensorCache
from harness.tokenizer import counted, special_token_ids


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


class CountedTokens:
    """An SAE that encodes only tokens that count: the others are zero, and left out of means.

    Where the first batch shows that the features of a token don't depend on what else there is.
    """

    MOST = 0.9  # of a batch's tokens that may count: picking them out has a cost, too

    def __init__(self, sae: SAELike) -> None:
        self.sae = sae

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sae, name)

    def encode(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, F), zeros where x is zero."""
        counts_BL = (x_BLD != 0).any(-1)
        alone = ALONE.get(self.sae)
        if alone is False or float(counts_BL.float().mean()) > self.MOST:
            return self.sae.encode(x_BLD)
        acts_NF = self.sae.encode(x_BLD[counts_BL])
        acts_BLF = acts_NF.new_zeros(*x_BLD.shape[:2], acts_NF.shape[-1])
        acts_BLF[counts_BL] = acts_NF
        if alone is None:
            whole_BLF = self.sae.encode(x_BLD)
            ALONE[self.sae] = torch.equal(whole_BLF * counts_BL[..., None], acts_BLF)
            return whole_BLF
        return acts_BLF


ALONE: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()  # see `CountedTokens`


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
        given = {"": acts[sae.cfg.hook_layer]}, CountedTokens(sae), settings.probe_sae_batch
        means[key] = collection.get_sae_meaned_activations(*given)[""]
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
