"""The language model and the bridge, the token stream and the activation buffer."""

from __future__ import annotations

import functools
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from experiment import ActivationBuffer, Settings
from harness.errors import ExperimentError, first_line
from harness.evaluation.probe_texts import known_to_stock
from harness.fused_model import FusedLanguageModel, for_harvest
from harness.language_model import acts_at, load_language_model
from harness.machine import in_order
from harness.probe_sets import own_sets, probe_names
from harness.startup import Run
from harness.text import TokenStream, documents, passages, streamed_texts
from tests.conftest import ROOT, SOURCES, settings_of

# The published config.json of google/gemma-2-2b, as far as the architecture goes.
GEMMA_2_2B = dict(
    architectures=["Gemma2ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    attn_logit_softcapping=50.0, bos_token_id=2, cache_implementation="hybrid", eos_token_id=1,
    final_logit_softcapping=30.0, head_dim=256, hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh", hidden_size=2304, initializer_range=0.02,
    intermediate_size=9216, max_position_embeddings=8192, model_type="gemma2",
    num_attention_heads=8, num_hidden_layers=26, num_key_value_heads=4, pad_token_id=0,
    query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096,
    torch_dtype="float32", use_cache=True, vocab_size=256000,
)  # fmt: skip


def some_contexts(lm, length: int, n: int = 3) -> torch.Tensor:
    """(n, length) of SOURCES, BOS first."""
    ids = lm.tokenizer("\n".join(SOURCES), add_special_tokens=False)["input_ids"]
    tokens_BL = torch.tensor(ids[: n * (length - 1)]).reshape(n, length - 1)
    return torch.nn.functional.pad(tokens_BL, (1, 0), value=lm.tokenizer.bos_token_id)


@pytest.mark.parametrize("name", ["toy", "tinylm"])
def test_the_bridge_gives_what_the_model_gives(name: str, toy_model: Path) -> None:
    """Also past the sliding window, which the contexts of a run never fill."""
    lm = load_language_model(str(toy_model) if name == "toy" else name)
    length = 40 if name == "toy" else 128
    if name == "toy":
        assert lm.hf.config.sliding_window < length
    tokens_BL = some_contexts(lm, length)
    layers = tuple(range(len(lm.blocks)))
    logits, cache = lm.bridge().run_with_cache(tokens_BL)
    for layer, acts_BLD in zip(layers, lm.activations(tokens_BL, layers)):
        assert torch.equal(acts_BLD, cache[f"blocks.{layer}.hook_resid_post"]), layer
    assert torch.equal(lm.logits(tokens_BL)[0], logits)


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ at the layer where it is largest."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected))


@pytest.mark.parametrize("name", ["toy", "tinylm"])
def test_fused_passes_are_the_plain_ones(name: str, toy_model: Path) -> None:
    """Within rounding, past the sliding window too; in bfloat16 with no more of it than plain."""
    lm = load_language_model(str(toy_model) if name == "toy" else name)
    length = 40 if name == "toy" else 128  # the toy's window has 16
    tokens_BL = some_contexts(lm, length)
    layers = tuple(range(lm.hf.config.num_hidden_layers))
    exact = [acts.double() for acts in lm.activations(tokens_BL, layers)]
    fused = for_harvest(lm, "float32", 3, length)
    assert isinstance(fused, FusedLanguageModel)
    assert relative_error(fused.activations(tokens_BL, layers), exact) < 1e-5
    assert fused.activations(tokens_BL, (1,))[0].shape == (3, length, lm.hf.config.hidden_size)
    plain = lm.cast("bfloat16")
    fused = for_harvest(lm, "bfloat16", 3, length)
    assert isinstance(fused, FusedLanguageModel)
    found = fused.activations(tokens_BL, layers)
    assert found[0].dtype == torch.bfloat16
    errors = [relative_error(acts, exact) for acts in (found, plain.activations(tokens_BL, layers))]
    assert errors[0] < 1.1 * errors[1] < 0.05
    short_BL = tokens_BL[:, :9]  # another length than it was made for
    pairs = zip(fused.activations(short_BL, layers), plain.activations(short_BL, layers))
    assert all(torch.equal(one, other) for one, other in pairs)


def test_fused_passes_are_used_only_where_they_are_right(toy_lm, monkeypatch) -> None:
    """A build of torch without the operators, or with wrong ones, gets the plain form."""
    assert isinstance(for_harvest(toy_lm, "float32", 2, 16), FusedLanguageModel)
    right = FusedLanguageModel.activations
    monkeypatch.setattr(
        FusedLanguageModel, "activations", lambda *a: [1.01 * x for x in right(*a)]
    )
    assert for_harvest(toy_lm, "float32", 2, 16) is toy_lm

    def missing(*args: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(FusedLanguageModel, "activations", missing)
    assert for_harvest(toy_lm, "float32", 2, 16) is toy_lm


def test_several_threads_may_make_passes_of_one_bridge(toy_lm) -> None:
    """Each gets its own activations, by the model's passes and by the bridge's own."""
    model, cpu = toy_lm.bridge(), torch.device("cpu")
    hooks = {f"blocks.{layer}.hook_resid_post": layer for layer in (0, 2)}
    batches = list(some_contexts(toy_lm, 40, 48).split(2))

    def found(plain, tokens_BL: torch.Tensor) -> dict[str, torch.Tensor]:
        return acts_at(model, hooks, tokens_BL, plain)

    for plain in (None, model.plain):
        one = functools.partial(found, plain)
        expected = [one(tokens_BL) for tokens_BL in batches]
        for together, alone in zip(in_order(one, batches, cpu), expected):
            assert all(torch.equal(together[hook], alone[hook]) for hook in hooks)


def test_forward_pass_stops_after_the_last_layer(toy_lm) -> None:
    calls = Counter()
    handles = [
        block.register_forward_pre_hook(lambda *_, at=at: calls.update([at]))
        for at, block in enumerate(toy_lm.hf.model.layers)
    ]
    tokens_BL = torch.full((2, 8), 5)
    two, zero = toy_lm.activations(tokens_BL, (2, 0))
    assert calls == {0: 1, 1: 1, 2: 1}
    for handle in handles:
        handle.remove()
    assert torch.equal(zero, toy_lm.activations(tokens_BL, (0,))[0])
    assert two.shape == (2, 8, 32)


def test_a_model_that_is_not_there_says_how_to_get_access(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="licence.*SAE_PROFILE=tinylm make run OUT=run_try"):
        load_language_model(str(tmp_path / "nothing"))


def stream_of(texts: list[str], tokenizer, context: int = 16) -> TokenStream:
    return TokenStream(lambda: iter(texts), tokenizer, context)


def test_contexts_are_the_text_packed(toy_lm) -> None:
    """BOS first; between two texts too; otherwise every token once, in order, no padding."""
    tokenizer = toy_lm.tokenizer
    texts = [SOURCES[0][:700], "short", SOURCES[1][:900]]
    joined = []
    for text in texts:
        joined += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    rows = stream_of(texts, tokenizer).contexts(50)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert not (rows == tokenizer.pad_token_id).any()
    flat = [token for row in rows.tolist() for token in row if token != tokenizer.bos_token_id]
    assert flat == [token for token in joined if token != tokenizer.bos_token_id][: len(flat)]
    inside = [row.tolist()[1:].count(tokenizer.bos_token_id) for row in rows]
    assert sum(inside) <= 2 and len(flat) == 50 * 15 - sum(inside)
    assert "short" in tokenizer.decode(flat)


def test_reading_in_pieces_changes_nothing(toy_lm) -> None:
    whole = stream_of(SOURCES, toy_lm.tokenizer).contexts(50)
    stream = stream_of(SOURCES, toy_lm.tokenizer)
    assert torch.equal(whole, torch.cat([stream.contexts(n) for n in (1, 30, 19)]))


def test_a_corpus_that_runs_out_starts_again_and_says_so(toy_lm, capsys) -> None:
    stream = stream_of([SOURCES[0][:300]], toy_lm.tokenizer)
    stream.contexts(4)
    assert capsys.readouterr().out == ""
    stream.contexts(40)
    assert "all of it used once, starting again" in capsys.readouterr().out
    with pytest.raises(ExperimentError, match="no text"):
        stream_of([], toy_lm.tokenizer).contexts(1)


def test_a_text_of_one_token_is_used_again_without_a_line_each_time(toy_lm, capsys) -> None:
    with stream_of(["a"], toy_lm.tokenizer) as stream:
        stream.contexts(40)
    assert stream.epoch >= 300
    assert len(capsys.readouterr().out.splitlines()) == 9  # after 1, 2, 4, … 256 times


def test_texts_without_a_token_are_no_text() -> None:
    """Or a run would wait for ever for a token to train on."""

    class Deaf:
        bos_token_id = 2

        def __call__(self, texts: list[str], add_special_tokens: bool) -> dict:
            return {"input_ids": [[] for _ in texts]}

    with pytest.raises(ExperimentError, match="no text"):
        stream_of(["one", "two"], Deaf()).contexts(1)


def test_buffer_hands_out_every_text_token_once_in_order(toy_lm) -> None:
    """The activations of all tokens but BOS, of all layers alike, whatever the portions."""
    layers = (0, 2)
    tokens_BL = stream_of(SOURCES, toy_lm.tokenizer).contexts(24)
    keep_BL = tokens_BL != toy_lm.tokenizer.bos_token_id
    expected = torch.stack(
        [
            torch.cat([toy_lm.activations(tokens_BL[i : i + 4], layers)[at][keep_BL[i : i + 4]]
                       for i in range(0, 24, 4)])
            for at in range(2)
        ]
    )  # fmt: skip
    settings = Settings(layers=layers, harvest_contexts=4)
    buffer = ActivationBuffer(Run(settings, toy_lm), stream_of(SOURCES, toy_lm.tokenizer))
    taken = torch.cat([buffer.next_tokens(n) for n in (7, 130, 64, 99)], dim=1)
    assert taken.shape == (2, 300, 32)
    assert torch.equal(taken, expected[:, :300])


def test_repository_has_the_published_layers_of_both_profiles() -> None:
    import experiment

    tinylm, gemma = (settings_of(experiment, "x", p) for p in ("tinylm", "gemma-2-2b"))
    assert (tinylm.layers, tinylm.d_sae, tinylm.k_min) == ((1, 2, 4), 1024, 16)
    assert (gemma.layers, gemma.d_sae, gemma.k_min) == ((5, 12, 19), 2304, 64)
    assert (ROOT / "tinylm" / "config.json").exists()


def test_tinylm_tasks_are_registered_and_undone() -> None:
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    import experiment

    settings = settings_of(experiment, "x", "tinylm")
    before = dict(dataset_info.chosen_classes_per_dataset)
    stock = dataset_utils.get_multi_label_train_test_data
    names = probe_names(settings)
    assert len(names) == 3
    with pytest.raises(ZeroDivisionError), known_to_stock(own_sets(settings)):
        for name in names:
            train, test = dataset_utils.get_multi_label_train_test_data(name, 20, 10, 42)
            assert list(train) == list(test) == dataset_info.chosen_classes_per_dataset[name]
            assert {len(texts) for texts in train.values()} == {10}
            assert {len(texts) for texts in test.values()} == {5}
        raise ZeroDivisionError
    assert dataset_info.chosen_classes_per_dataset == before
    assert dataset_utils.get_multi_label_train_test_data is stock


def test_tinylm_text_comes_mixed_and_whole() -> None:
    """A buffer of the default size draws on hundreds of files; no passage is lost or repeated."""
    from itertools import islice

    from tinylm import corpus

    first = list(islice(documents("tinylm", "train")(), 400))
    assert first == list(islice(documents("tinylm", "train")(), 400))
    whole = [passage for text in corpus.documents("heldout") for passage in passages(text)]
    mixed = list(documents("tinylm", "heldout")())
    assert Counter(mixed) == Counter(whole) and mixed != whole
    text = SOURCES[0]
    assert "".join(passages(text)) == text
    assert all(2000 <= len(passage) < 2200 for passage in passages(text)[:-1])
    files = list(islice(corpus.documents("train"), 1500))
    of = [next(at for at, text in enumerate(files) if passage in text) for passage in first]
    assert len(set(of)) > 200


def test_a_cast_model_rounds_and_does_nothing_else(toy_lm) -> None:
    """bfloat16 has 8 bits: activations differ by well under 1% of their variance, also late in a
    context (the angles of RoPE stay in float32), and the model itself stays as it was."""
    cast = toy_lm.cast("bfloat16")
    assert toy_lm.cast("float32") is toy_lm and cast.hf.dtype == torch.bfloat16
    tokens = torch.randint(3, 300, (8, 128), generator=torch.Generator().manual_seed(0))
    for exact, rounded in zip(toy_lm.activations(tokens, (0, 3)), cast.activations(tokens, (0, 3))):
        assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
        late, error = exact[:, 96:], (exact - rounded.float())[:, 96:]
        assert 0 < error.pow(2).sum() < 2e-3 * (late - late.mean((0, 1))).pow(2).sum()


def test_passes_run_side_by_side(toy_lm) -> None:
    """Threads that share a model each get the activations of their own pass and layers."""
    from concurrent.futures import ThreadPoolExecutor

    tokens = torch.randint(3, 300, (16, 4, 16), generator=torch.Generator().manual_seed(0))
    wanted = [(0,), (1, 3), (2,), (3, 0)] * 4
    alone = [toy_lm.activations(ids, layers) for ids, layers in zip(tokens, wanted)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(toy_lm.activations, tokens, wanted))
    for one, other in zip(alone, together):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other))


@pytest.fixture()
def broken_stream(monkeypatch):
    """Makes streamed_texts read 100 rows over a connection that breaks; [seconds slept]."""
    import datasets

    def install(break_at: list[int], error: Exception) -> list[float]:
        left, slept = list(break_at), []

        def rows():
            for number in range(100):
                if left and number == left[0]:
                    left.pop(0)
                    raise error
                yield {"text": f"text {number}"}

        monkeypatch.setattr(
            datasets, "load_dataset",
            lambda *_, **__: datasets.IterableDataset.from_generator(rows),
        )  # fmt: skip
        monkeypatch.setattr(time, "sleep", slept.append)
        return slept

    return install


def test_a_broken_stream_goes_on_where_it_stopped(broken_stream) -> None:
    slept = broken_stream([10, 10, 40], ConnectionError("reset by peer"))
    assert list(streamed_texts("some/text")) == [f"text {i}" for i in range(100)]
    assert slept == [1.0, 2.0, 1.0]


def test_a_connection_that_stays_broken_is_one_sentence(broken_stream) -> None:
    error = ConnectionError("https://user hf_abcdefghijklmnop refused")
    slept = broken_stream([3] * 50, error)
    with pytest.raises(ExperimentError, match="connection to the text 'some/text' broke 7 times"):
        list(streamed_texts("some/text"))
    assert slept == [1, 2, 4, 8, 16, 32]


def test_what_an_error_says_holds_no_token() -> None:
    error = OSError("401: header Authorization: Bearer abc.def, hf_abcdefghijklmnop\nmore")
    said = first_line(error)
    assert "hf_abc" not in said and "abc.def" not in said and "more" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"body": "a"}\n', "must have a column 'text', but has \\['body'\\]"),
        (b'{"text": " "}\n{"text": "\\n"}\n', "the training text holds no text"),
        (b'{"text": "\xff\xfe"}\n', "can't be read|must be UTF-8"),
    ],
)
def test_unusable_text_is_one_sentence(toy_lm, tmp_path, monkeypatch, content, message) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.jsonl").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    stream = TokenStream(documents("own", "train"), toy_lm.tokenizer, 16)
    with pytest.raises(ExperimentError, match=message) as caught:
        stream.contexts(1)
    assert "\n" not in str(caught.value)


def test_the_bridge_shares_the_model_s_weights(toy_lm) -> None:
    own = {p.data_ptr() for p in toy_lm.hf.parameters()}
    model = toy_lm.bridge()
    assert {p.data_ptr() for p in model.parameters() if p.ndim > 1} == {
        p.data_ptr() for p in toy_lm.hf.parameters() if p.ndim > 1
    }
    assert {p.data_ptr() for p in model.plain.hf.parameters()} == own
