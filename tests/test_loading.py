"""What is loaded is what was meant: weights, TransformerLens' form, tokenizer."""

from __future__ import annotations

import copy
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
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from experiment import ActivationBuffer
from harness.errors import ExperimentError
from harness.evaluation.core import prepare_for_sae_bench
from harness.evaluation.probe_features import masked_activations
from harness.evaluation.probe_texts import probe_tokens
from harness.evaluation.shared_forward import SharedForward
from harness.language_model import load_language_model
from harness.ledger import LEDGER
from harness.startup import Run, check_layers
from harness.store import TensorCache
from harness.tokenizer import counted, prepare_tokenizer
from harness.training import ActivationCache
from tests.conftest import SOURCES, settings_of
from tests.test_language_model import stream_of

CPU = torch.device("cpu")


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
    with pytest.raises(ExperimentError, match="the last block gives NaN or infinity: look at "):
        load_language_model(name, dtype).bridge()


def test_a_bridge_that_rounds_otherwise_is_not_told_as_nan(toy_lm, monkeypatch) -> None:
    monkeypatch.setattr("harness.language_model.ROUNDING", {torch.float32: -1.0})
    with pytest.raises(ExperimentError, match="is off by .* more than rounding's -1: choose anot"):
        toy_lm.bridge()


@pytest.mark.parametrize("words", [["red", "blue"], []])
def test_a_tokenizer_is_known_by_its_own_words(words: list[str]) -> None:
    """One that knows none is that of a damaged tokenizer.json."""
    vocabulary = {word: n for n, word in enumerate(["<unk>", "<eos>", *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>"
    )
    if words:
        prepare_tokenizer(tokenizer, "own", 4)
        assert tokenizer("red blue text")["input_ids"] == [1, 2, 3, 0]
    else:
        with pytest.raises(ExperimentError, match="must know words, but knows none"):
            prepare_tokenizer(tokenizer, "own", 4)


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
TEMPLATE = TemplateProcessing("$A e", special_tokens=[NAMED])
KINDS = {  # as in the table of docs/operations.md: changes, and what a context begins with
    "adds BOS": ({}, 2),
    "has BOS, does not add it": ({"backend_tokenizer__post_processor": ByteLevel()}, 2),
    "adds EOS behind": ({"backend_tokenizer__post_processor": TEMPLATE}, 2),
    "EOS alone": ({"bos_token": None}, 1),
    "neither": ({"bos_token": None, "eos_token": None}, None),
    "neither, and no padding": ({"bos_token": None, "eos_token": None, "pad_token": None}, None),
    "pad is EOS": ({"pad_token": "<eos>"}, 2),
    "no padding": ({"pad_token": None}, 2),
    "no padding, no EOS": ({"pad_token": None, "eos_token": None}, 2),
    "pads on the left": ({"padding_side": "left"}, 2),
    "a chat model's": ({"chat_template": "{{ messages }}"}, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_core_and_probing_read_a_text_alike(
    toy, toy_model: Path, tmp_path: Path, kind: str
) -> None:
    """What the context begins with and the text, whatever the tokenizer does by itself."""
    changes, begin = KINDS[kind]
    first = 2 if kind == "pad is EOS" else 1  # positions that don't count: SmolLM2 is such
    name, tokenizer = tokenizer_of(toy_model, tmp_path / "model", **changes)
    lm = load_language_model(name)
    bridge, special = lm.bridge(), lm.special_token_ids
    text, other = SOURCES[0][:300], SOURCES[1][:200]
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, other)]
    front = [] if begin is None else [begin]
    joined = [*front, *ids[0], *front, *ids[1]]
    assert bridge.tokenizer is not lm.tokenizer  # the stream's thread may be at that one
    with stream_of([text, other], lm.tokenizer, 64) as stream:
        training = stream.contexts(1)
    settings = settings_of(toy, "run_1")
    settings = dataclasses.replace(settings, context=64, first_positions=first)
    sae = prepare_for_sae_bench(toy.CustomSAE(32, 64, "toy", 0, k=4), settings)
    texts = datasets.Dataset.from_dict({"text": [text, other]})
    store = ActivationsStore.from_sae(bridge, sae, texts, context_size=64)
    shared = SharedForward(bridge, store, {}, lambda n: None, first=first)
    shown_BL = shared.batch(1, 1)
    assert training.tolist() == shared.tokens_BL.tolist() == [joined[:64]]
    assert None not in special
    # SAE-Bench leaves out by ids what is left out here by place, too.
    counts_BL = counted(training, special, first)
    assert not counts_BL[:, :first].any() and torch.equal(shared.token_mask(), counts_BL)
    assert torch.equal(get_bos_pad_eos_mask(shown_BL, lm.tokenizer), counts_BL)
    assert torch.equal(shown_BL[:, first:], training[:, first:])

    splits = probe_tokens("toy/modules", lm.tokenizer, CPU, settings)
    short = lm.tokenizer(["a b"], padding="max_length", max_length=64)["input_ids"][0]
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert short[: len(front) + len(plain)] == [*front, *plain]
    padding = torch.tensor([short[len(front) + len(plain) :]])
    assert padding.numel() and not counted(padding, special, 1).any()
    cache = TensorCache("probing passes", None)
    for encoded in splits[0].values():
        tokens_BL = encoded["input_ids"]
        assert begin is None or (tokens_BL[:, 0] == begin).all()
        given = tokens_BL, lambda t: {"": torch.ones(*t.shape, 1)}, lm.tokenizer, settings
        (masked,) = (torch.cat([acts[0] for acts in masked_activations(*given, cache, "")]),)
        assert torch.equal(masked[..., 0] != 0, counted(tokens_BL, special, first))


def test_a_tokenizer_written_in_python_reads_as_the_others_do() -> None:
    """ByT5's: EOS alone, which it puts behind a text."""
    tokenizer = ByT5Tokenizer()
    plain = tokenizer("text", add_special_tokens=False)["input_ids"]
    prepare_tokenizer(tokenizer, "byt5", 400)
    for one in (tokenizer, copy.deepcopy(tokenizer)):
        assert one("text")["input_ids"] == [1, *plain]
        padded = one(["text", "a"], padding="max_length", max_length=4, truncation=True)
        assert padded["input_ids"] == [[1, *plain[:3]], [1, 100, 0, 0]]


@pytest.mark.parametrize("first", [1, 2])
def test_the_first_positions_are_not_counted_whatever_stands_there(
    toy, toy_model: Path, first: int
) -> None:
    """A sink there a thousand times as long as the rest moves neither scale, mean nor FVU."""
    lm = load_language_model(str(toy_model))
    lm.tokenizer.bos_token = lm.tokenizer.eos_token = None
    lm.special_token_ids = {0}
    tokens_BL = torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    plain = lm.activations

    def with_sink(tokens_BL: torch.Tensor, layers: tuple[int, ...]) -> list[torch.Tensor]:
        acts = plain(tokens_BL, layers)
        for acts_BLD in acts:
            acts_BLD[:, :first] *= 1000
        return acts

    settings = dataclasses.replace(
        settings_of(toy, "run_1"), harvest_contexts=8, layers=(1,), first_positions=first
    )
    stream = SimpleNamespace(contexts=lambda n: tokens_BL, context=32, state_dict=dict)
    taken = {}
    for name, activations in (("sink", with_sink), ("plain", plain)):
        lm.activations = activations
        taken[name] = ActivationBuffer(Run(settings, lm), stream).next_tokens(8 * (32 - first))
    assert torch.equal(taken["sink"], taken["plain"])


def test_activations_far_longer_than_most_are_told(toy, toy_lm, monkeypatch, capsys) -> None:
    monkeypatch.setattr(LEDGER, "warnings", [])
    settings = dataclasses.replace(settings_of(toy, "run_1"), layers=(0, 1))
    acts_LND = torch.nn.functional.normalize(torch.randn(2, 50, 8), dim=-1)
    acts_LND[1, :3] *= 40
    stream = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    cache = ActivationCache(Run(settings, toy_lm), stream, lambda n: [acts_LND])
    assert torch.equal(cache.passes(1)[0], acts_LND)
    cache.passes(1)
    (said,) = LEDGER.warnings
    assert said.startswith("layer 1: 3 of the first 50 activations are over 10 times as long as ")
    assert capsys.readouterr().out == f"warning: {said}\n"
    LEDGER.warnings.clear()  # a resumed training says it again
    ActivationCache(Run(settings, toy_lm), stream, list).load_state_dict(cache.state_dict())
    assert LEDGER.warnings == [said]


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
    assert counted(tokens_BL, lm.special_token_ids, 1).equal(shared.token_mask())  # of probing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
