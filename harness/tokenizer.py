"""How a text becomes token ids: one rule for training, core evaluation and probing."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from harness.errors import ExperimentError


def prepare_tokenizer(tokenizer: Any, name: str, n_embeddings: int) -> None:
    """Has a tokenizer read a text by the one rule, whatever it does by itself.

    A context begins with BOS; where there is none with EOS, which then stands in its place; where
    there is neither with nothing. Nothing else is added. Padding is on the right: with the token
    for that, or where there is none with EOS, BOS, the unknown token or token 0, which then counts
    nowhere, as `special_token_ids` has it.

    Raises:
        ExperimentError: it knows no words, or the model has no embedding for some of its tokens.
    """
    vocabulary = tokenizer.get_vocab()
    words = [word for word in vocabulary if word not in tokenizer.all_special_tokens]
    largest = max(vocabulary.values())
    wrong = {
        "must know words, but knows none: its tokenizer.json is missing or damaged; fetch the "
        "model again": not any(is_read(tokenizer, word) for word in words),
        f"must have ids below {n_embeddings}, the rows of the embedding, but has {largest}: take "
        "the tokenizer that belongs to the model": largest >= n_embeddings,
    }
    for sentence, holds in wrong.items():
        if holds:
            raise ExperimentError(f"the tokenizer of the language model {name!r} {sentence}")
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    plain = tokenizer("text", add_special_tokens=False)["input_ids"]
    if tokenizer("text")["input_ids"] != [*begin, *plain]:
        add_in_front(tokenizer, begin)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = (
            tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
            or tokenizer.convert_ids_to_tokens(0)
        )  # fmt: skip
    tokenizer.padding_side = "right"


def is_read(tokenizer: Any, word: str) -> bool:
    """Whether a text of this word of the vocabulary becomes tokens that are known."""
    text = tokenizer.convert_tokens_to_string([word])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(ids) and tokenizer.unk_token_id not in ids


def add_in_front(tokenizer: Any, begin: list[int]) -> None:
    """Has a tokenizer put these ids, one or none, before a text, and nothing behind it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one that is written in Python
        tokenizer.build_inputs_with_special_tokens = lambda ids, other=None: [*begin, *ids]
        return
    named = [{"id": "bos", "ids": begin, "tokens": [tokenizer.bos_token]}] if begin else []
    single = "bos $A" if begin else "$A"
    backend.post_processor = TemplateProcessing(single=single, special_tokens=named)


def special_token_ids(tokenizer: Any) -> set[int]:
    """The ids of BOS, EOS and padding: the tokens that neither training nor evaluation counts.

    All others count, a tokenizer's additional special tokens (turns of a chat) among them.
    """
    return {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}


def counted(tokens_BL: Tensor, special: set[int], first: int) -> Tensor:
    """(B, L) bool: the tokens that count, in training and in every evaluation.

    Not the first of a context, whatever stands there: it is where attention goes that is of no use,
    and its residual stream may be a hundred times as long as any other (an attention sink).

    Args:
        special: see `special_token_ids`. first: how many positions are left out.
    """
    counts_BL = ~torch.isin(tokens_BL, torch.tensor(sorted(special), device=tokens_BL.device))
    counts_BL[:, :first] = False
    return counts_BL
