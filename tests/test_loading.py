"""What is loaded is what was meant: weights, TransformerLens' form, tokenizer."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from sae_bench.sae_bench_utils.activation_collection import get_bos_pad_eos_mask
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file, save_file
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import AutoTokenizer

from experiment import ActivationBuffer
from harness.errors import ExperimentError
from harness.evaluation.core import prepare_for_sae_bench
from harness.evaluation.probe_texts import probe_tokens
from harness.evaluation.shared_forward import SharedForward
from harness.language_model import load_language_model
from harness.startup import Run, check_layers
from tests.conftest import SOURCES, settings_of
from tests.test_language_model import stream_of


def changed_model(toy_model: Path, folder: Path, change, **config) -> str:
    """A copy of the toy model, its tensors changed and its config.json; its name."""
    shutil.copytree(toy_model, folder)
    weights = load_file(toy_model / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", {"format": "pt"})
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    return str(folder)


SIX = dict(num_hidden_layers=6, layer_types=3 * ["sliding_attention", "full_attention"])
TWO = dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda w: {n: t for n, t in w.items() if ".2." not in n}, {},
         r"lacks model\.layers\.2\.input_layernorm\.weight and 10 more: "),
        (lambda w: {f"lm.{n}": t for n, t in w.items()}, {},
         r"lacks .* and 46 more, also has lm\.model\.embed_tokens\.weight and 45 more"),
        (dict, SIX, r"lacks model\.layers\.4\.input_layernorm\.weight and 21 more"),
        (dict, TWO, r"also has model\.layers\.2\.input_layernorm\.weight and 21 more"),
        (dict, dict(intermediate_size=128), "has in another shape .*mlp"),
    ],
)  # fmt: skip
def test_weights_that_config_json_does_not_describe_are_refused(
    toy_model: Path, tmp_path: Path, change, config, message
) -> None:
    """transformers would give what it doesn't find random values."""
    name = changed_model(toy_model, tmp_path / "changed", change, **config)
    with pytest.raises(ExperimentError, match=message):
        load_language_model(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_no_numbers_are_refused(toy_model: Path, tmp_path: Path, dtype) -> None:
    broken = lambda w: w | {"model.norm.weight": w["model.norm.weight"] * math.nan}  # noqa: E731
    name = changed_model(toy_model, tmp_path / "changed", broken)
    with pytest.raises(ExperimentError, match="the last block gives what is off by nan.* for NaN"):
        load_language_model(name, dtype).bridge()


def tokenizer_of(toy_model: Path, folder: Path, **changes) -> tuple[str, Any]:
    """A copy of the toy model, attributes of its tokenizer changed; its name, and that."""
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    for attribute, value in changes.items():
        at, _, last = attribute.rpartition("__")
        setattr(getattr(tokenizer, at) if at else tokenizer, last, value)
    shutil.copytree(toy_model, folder)
    tokenizer.save_pretrained(folder)
    return str(folder), tokenizer


NAMED = {"id": "e", "ids": [1], "tokens": ["<eos>"]}


@pytest.mark.parametrize(
    "changes",
    [
        {"backend_tokenizer__post_processor": ByteLevel()},
        {"backend_tokenizer__post_processor": TemplateProcessing("$A e", special_tokens=[NAMED])},
        {"pad_token": None},
        {"pad_token": None, "eos_token": None},
    ],
)
def test_training_core_and_probing_read_a_text_alike(
    toy, toy_model: Path, tmp_path: Path, changes
) -> None:
    """BOS and the text, whatever the tokenizer adds by itself, and what it has to pad with."""
    name, tokenizer = tokenizer_of(toy_model, tmp_path / "model", **changes)
    lm = load_language_model(name)
    hooked = lm.bridge()
    text, other = SOURCES[0][:300], SOURCES[1][:200]
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, other)]
    joined = [2, *ids[0], 2, *ids[1]]
    assert hooked.tokenizer is not lm.tokenizer  # the stream's thread may be at that one
    with stream_of([text, other], lm.tokenizer, 64) as stream:
        training = stream.contexts(1)[0].tolist()
    settings = dataclasses.replace(settings_of(toy, "run_1"), context=64)
    sae = prepare_for_sae_bench(toy.CustomSAE(32, 64, "toy", 0, k=4), settings)
    texts = datasets.Dataset.from_dict({"text": [text, other]})
    store = ActivationsStore.from_sae(hooked, sae, texts, context_size=64)
    core = store.get_batch_tokens(1)[0].tolist()
    splits = probe_tokens("toy/modules", lm.tokenizer, torch.device("cpu"), settings)
    assert training == core == joined[:64]
    for encoded in splits[0].values():
        assert (encoded["input_ids"][:, 0] == 2).all()
        kept = ~torch.isin(encoded["input_ids"], torch.tensor(sorted(lm.special_token_ids)))
        assert torch.equal(get_bos_pad_eos_mask(encoded["input_ids"], lm.tokenizer), kept)
    assert None not in lm.special_token_ids


def test_additional_special_tokens_count_everywhere(toy, toy_model: Path, tmp_path: Path) -> None:
    """Turns of a chat: BOS, EOS and padding alone are left out, in training and evaluation."""
    turn = 299
    word = AutoTokenizer.from_pretrained(toy_model).convert_ids_to_tokens(turn)
    name, _ = tokenizer_of(toy_model, tmp_path / "model", extra_special_tokens=[word])
    lm = load_language_model(name)
    assert turn in lm.tokenizer.all_special_ids
    assert lm.special_token_ids == {0, 1, 2}
    tokens_BL = torch.tensor([[2, 50, turn, 60]])
    settings = dataclasses.replace(settings_of(toy, "run_1"), context=4, harvest_contexts=1)
    stream = SimpleNamespace(contexts=lambda n: tokens_BL, context=4, state_dict=dict)
    buffer = ActivationBuffer(Run(settings, lm), stream)
    assert buffer.next_tokens(3).shape[1] == 3  # of training
    shared = SharedForward(lm.bridge(), None, {}, lambda n: None)
    shared.tokens_BL = tokens_BL
    assert shared.token_mask().tolist() == [[False, True, True, True]]  # of core
    assert get_bos_pad_eos_mask(tokens_BL, lm.tokenizer).equal(shared.token_mask())  # of probing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token": None}, "must have a BOS token.* but has none: name one as bos_token"),
        ({"extra_special_tokens": ["<turn>"]}, "ids below 300, the rows .*, but has 300: take"),
    ],
)
def test_a_tokenizer_that_can_t_be_used_is_one_sentence(
    toy_model: Path, tmp_path: Path, changes, message
) -> None:
    name, _ = tokenizer_of(toy_model, tmp_path / "model", **changes)
    with pytest.raises(ExperimentError, match=message):
        load_language_model(name)


def test_a_context_beyond_the_model_s_positions_is_one_sentence(toy, toy_lm) -> None:
    settings = dataclasses.replace(settings_of(toy, "run_1"), context=257)
    with pytest.raises(ExperimentError, match="context must be at most 256, .* but is 257"):
        check_layers(settings, toy_lm)
