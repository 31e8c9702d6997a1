"""How a text becomes token ids: one rule for training, core evaluation and probing."""

from __future__ import annotations

from typing import Any

from tokenizers.processors import TemplateProcessing

from harness.errors import ExperimentError


def prepare_tokenizer(tokenizer: Any, name: str, n_embeddings: int) -> None:
    """Has a tokenizer give BOS and the text, nothing else, and a token to pad with.

    So training, core evaluation and probing read a text alike, whatever the tokenizer adds.

    Raises:
        ExperimentError: it can't, or the model has no embedding for some of its tokens.
    """
    plain = tokenizer("text", add_special_tokens=False)["input_ids"]
    largest = max(tokenizer.get_vocab().values())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    wrong = {
        "must know words, but knows none: its tokenizer.json is missing or damaged; fetch the "
        "model again": not plain or tokenizer.unk_token_id in plain,
        f"must have ids below {n_embeddings}, the rows of the embedding, but has {largest}: take "
        "the tokenizer that belongs to the model": largest >= n_embeddings,
        "must have a BOS token, which begins each context, but has none: name one as bos_token in "
        "its tokenizer_config.json": tokenizer.bos_token_id is None,
        "must be a fast one, with a tokenizer.json, but is none: convert it": backend is None,
    }
    for sentence, holds in wrong.items():
        if holds:
            raise ExperimentError(f"the tokenizer of the language model {name!r} {sentence}")
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if tokenizer("text")["input_ids"] != [bos_id, *plain]:
        named = {"id": "bos", "ids": [bos_id], "tokens": [bos]}
        backend.post_processor = TemplateProcessing(single="bos $A", special_tokens=[named])
    if tokenizer.pad_token_id is None:  # it is left out wherever it stands, as these are
        tokenizer.pad_token = tokenizer.eos_token or bos
