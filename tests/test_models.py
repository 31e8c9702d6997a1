"""Any causal language model: tiny random ones of seven architectures, through all of it."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import SAE

from bench.common import run_on, settings_of
from harness.console import Progress
from harness.errors import ExperimentError
from harness.evaluation.core import shared_core_evals
from harness.evaluation.probe_texts import read_probe_texts
from harness.evaluation.probing import sparse_probing
from harness.fingerprint import model_identity
from harness.fused_model import FusedLanguageModel, for_harvest
from harness.identity import changed, remember
from harness.language_model import LanguageModel, acts_at, hook_name, load_language_model
from harness.preflight import hub_problem, memory_estimate
from harness.provenance import weights_digest_of
from harness.training import ActivationCache
from tests.conftest import SOURCES, run_command
from tests.test_core import stock_core, two_saes
from tests.test_probing import CPU, stock_probing

LAYERS = range(4)
# GPT-2's bridge multiplies queries, keys and values one by one, where the model has one product.
ROUNDED = {"gpt2": 1e-4}


def config_of(kind: str) -> Any:
    """A configuration of 4 layers, d_model 32 and 300 tokens."""
    import transformers as hf

    ids = dict(vocab_size=300, initializer_range=0.2, pad_token_id=0, eos_token_id=1,
               bos_token_id=2)  # fmt: skip
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                 max_position_embeddings=256, **ids)  # fmt: skip
    grouped = dict(num_key_value_heads=2, **sizes)
    gemma = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=16, **grouped)
    return {
        "gemma2": lambda: hf.Gemma2Config(**gemma),
        "gemma3": lambda: hf.Gemma3TextConfig(
            layer_types=2 * ["sliding_attention", "full_attention"], **gemma
        ),
        "llama": lambda: hf.LlamaConfig(**grouped),
        "qwen3": lambda: hf.Qwen3Config(head_dim=8, tie_word_embeddings=True, **grouped),
        "mistral": lambda: hf.MistralConfig(sliding_window=16, **grouped),
        "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=256, **ids),
        "neox": lambda: hf.GPTNeoXConfig(**sizes),
    }[kind]()


KINDS = ("gemma2", "gemma3", "llama", "qwen3", "mistral", "gpt2", "neox")


def save_random(config: Any, folder: Path, toy_model: Path) -> str:
    """A random model of a configuration with the toy's tokenizer; its name."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in toy_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


@pytest.fixture(scope="module")
def model_of(toy_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A function: the language model of a kind."""
    folder, loaded = tmp_path_factory.mktemp("models"), {}

    def model(kind: str) -> LanguageModel:
        if kind not in loaded:
            loaded[kind] = load_language_model(
                save_random(config_of(kind), folder / kind, toy_model)
            )
        return loaded[kind]

    return model


def contexts() -> torch.Tensor:
    """(3, 40) token ids, BOS first."""
    tokens_BL = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.pad(tokens_BL[:, 1:], (1, 0), value=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_harvest_s_passes_are_the_model_s(model_of, kind: str, dtype: str) -> None:
    """Fused where they can be; of Mistral as long as its window of 16 holds the context."""
    lm, tokens_BL, layers = model_of(kind), contexts(), tuple(LAYERS)
    for length in (40, 12):
        harvest, short_BL = for_harvest(lm, dtype, 3, length), tokens_BL[:, :length].contiguous()
        fused = kind in ("gemma2", "llama") or (kind == "mistral" and length == 12)
        assert isinstance(harvest, FusedLanguageModel) is fused
        found = harvest.activations(short_BL, layers)
        for acts_BLD, exact_BLD in zip(found, lm.activations(short_BL, layers)):
            assert acts_BLD.dtype == getattr(torch, dtype) and acts_BLD.shape == exact_BLD.shape
            error = (acts_BLD - exact_BLD).norm() / exact_BLD.norm()
            assert error < (1e-5 if dtype == "float32" else 2e-2), error


@pytest.mark.parametrize("edit", ["weights", "hook"])
def test_a_harvest_sees_what_an_edit_does_to_the_model(model_of, edit: str) -> None:
    """Fused passes are of weights that were laid out before it."""
    lm, tokens_BL = copy.deepcopy(model_of("llama")), contexts()
    harvest = for_harvest(lm, "float32", 3, 40)
    remember(harvest, harvest.hf)
    run = SimpleNamespace(language_model=harvest)
    cache = ActivationCache(run, None, lambda n: harvest.activations(tokens_BL, (1,)))
    (before,) = cache.made(1)
    block = harvest.hf.model.layers[0]
    if edit == "weights":
        block.mlp.down_proj.weight.data.zero_()
    else:
        block.register_forward_hook(lambda module, given, out: 2 * out)
    (found,), (plain,) = cache.made(1), harvest.plain.activations(tokens_BL, (1,))
    assert torch.equal(found, plain) and not torch.allclose(found, before, atol=0.1)


def test_a_model_is_fused_only_where_its_blocks_are_the_known_ones(toy_model, tmp_path) -> None:
    """Though a context can't tell, as where all tokens' embeddings are alike."""
    small = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4)  # fmt: skip
    from transformers import LlamaConfig, MistralConfig

    configs = {
        "known": (LlamaConfig(**small), True),
        "bias": (LlamaConfig(attention_bias=True, **small), False),
        "act": (LlamaConfig(hidden_act="gelu", **small), False),
        "window": (MistralConfig(sliding_window=8, num_key_value_heads=2, **small), False),
        "no window": (LlamaConfig(layer_types=2 * ["sliding_attention"], sliding_window=None,
                                  **small), True),
    }  # fmt: skip
    for name, (config, fused) in configs.items():
        lm = load_language_model(save_random(config, tmp_path / name, toy_model))
        lm.hf.get_input_embeddings().weight.data[:] = 1.0
        assert isinstance(for_harvest(lm, "float32", 2, 16), FusedLanguageModel) is fused, name


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_hugging_face_s_and_the_bridge_s(model_of, kind: str) -> None:
    """`output_hidden_states` ends, in all of these, with the last stream behind the final norm."""
    lm, tokens_BL, close = model_of(kind), contexts(), dict(rtol=0, atol=ROUNDED.get(kind, 0))
    streams = lm.activations(tokens_BL, tuple(LAYERS))
    with torch.no_grad():
        out = lm.hf(input_ids=tokens_BL, use_cache=False, output_hidden_states=True)
        norm = list(lm.hf.get_decoder().children())[-1 if kind == "gpt2" else -2]
        assert torch.equal(norm(streams[-1]), out.hidden_states[-1])
    for stream, expected in zip(streams[:-1], out.hidden_states[1:]):
        assert torch.equal(stream, expected)
    assert torch.equal(lm.logits(tokens_BL)[0], out.logits)

    bridge, hooks = lm.bridge(), [hook_name("resid_post", layer) for layer in LAYERS]
    logits, cache = bridge.run_with_cache(tokens_BL, names_filter=hooks)
    torch.testing.assert_close(out.logits, logits, **close)
    for hook, stream in zip(hooks, streams):
        torch.testing.assert_close(stream, cache[hook], **close)
    stopped = acts_at(bridge, {hooks[1]: 1}, tokens_BL)[hooks[1]]
    torch.testing.assert_close(streams[1], stopped, **close)

    assert lm.starts_late
    replaced = torch.randn(streams[2].shape, generator=torch.Generator().manual_seed(1))
    theirs = bridge.run_with_hooks(tokens_BL, fwd_hooks=[(hooks[2], lambda acts, hook: replaced)])
    torch.testing.assert_close(lm.logits_from(tokens_BL, 2, replaced), theirs, **close)
    lm.starts_late = False
    assert torch.equal(lm.logits_from(tokens_BL, 2, replaced),
                       bridge.plain.logits_from(tokens_BL, 2, replaced))  # fmt: skip
    lm.starts_late = True
    assert not changed(bridge)  # all these passes left it as it was


@pytest.fixture()
def scored(toy, tmp_path: Path):
    """A function: settings, SAEs and figures of a language model, ours and stock SAE-Bench's."""

    def score(lm: LanguageModel, hook: str = "resid_post") -> None:
        settings = dataclasses.replace(
            settings_of("run_1", "tinylm"), model=lm.name, layers=(0, 2), hook=hook,
            probe_ks=(1, 2, 5), probe_train=20, probe_test=10,
        )  # fmt: skip
        bridge, saes = lm.bridge(), two_saes(toy, settings)
        together = shared_core_evals(saes, bridge, settings, toy.core_metrics)
        texts = read_probe_texts(settings, lm.tokenizer, CPU)
        run = run_on(lm, settings, sae_bench_model=bridge, probe_texts=texts, out_dir=tmp_path)
        probed = sparse_probing(run, saes, toy.probe, Progress("probing", 2, "SAEs"))
        for name, sae in saes.items():
            assert sae.cfg.hook_name == hook_name(hook, sae.cfg.hook_layer)
            kind = lm.hf.config.model_type
            scalars = {m: v for group in together[name][0].values() for m, v in group.items()}
            stock = stock_core(sae, settings, bridge)[0]
            stock = {m: v for group in stock.values() for m, v in group.items()}
            exact = kind not in ROUNDED
            assert scalars == (stock if exact else pytest.approx(stock, rel=1e-3, abs=1e-5))
            _, second = stock_probing(settings, sae, bridge, tmp_path / name)
            for k in settings.probe_ks:
                metric = f"sae_top_{k}_test_accuracy"
                near = dict(rel=0, abs=0 if exact else 0.1)
                assert probed[name][metric] == pytest.approx(second[metric], **near)

    return score


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_stock_sae_bench_s_on_the_bridge(model_of, scored, kind: str) -> None:
    scored(model_of(kind))


@pytest.mark.parametrize("hook", ["resid_mid", "mlp_out", "attn_out"])
def test_figures_of_another_hook_are_stock_sae_bench_s(model_of, scored, hook: str) -> None:
    """What is read and replaced is what stands there: a block's own output is something else."""
    lm = LanguageModel(model_of("llama").hf, model_of("llama").tokenizer, "toy", hook)
    stream, other = (one.activations(contexts(), (2,))[0] for one in (model_of("llama"), lm))
    assert other.shape == stream.shape and (other - stream).norm() > 0.1 * stream.norm()
    scored(lm, hook)


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_the_whole_command_on_another_model(
    toy, model_of, tmp_path: Path, monkeypatch, kind: str
) -> None:
    """SAELens reads the SAE back with the name of its hook and of its model."""
    hook = {"llama": "mlp_out", "neox": "resid_post"}[kind]
    lm = model_of(kind)
    monkeypatch.setitem(toy.PROFILES, "tinylm", toy.PROFILES["tinylm"] | {"model": lm.name})
    monkeypatch.setitem(toy.PLAN, "run_1", toy.PLAN["run_1"] | {"hook": hook, "seeds": (0,)})
    assert run_command(toy, tmp_path / "run_1") == 0
    info = json.loads((tmp_path / "run_1" / "final_info.json").read_text())
    for layer in settings_of("run_1", "tinylm").layers:
        sae = SAE.load_from_disk(tmp_path / "run_1" / "sae" / f"layer_{layer}" / "seed_0")
        metadata = sae.cfg.metadata
        assert (metadata.model_name, metadata.hook_name) == (lm.name, hook_name(hook, layer))
        assert info[f"layer_{layer}"]["means"]["l0"] > 0


def test_of_a_model_that_also_sees_the_text_model_is_taken(
    toy_model: Path, tmp_path: Path
) -> None:
    """With its numbers, by name of that architecture alone."""
    import transformers as hf

    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=4, image_size=28,
                  num_attention_heads=2, patch_size=14)  # fmt: skip
    config = hf.Gemma3Config(
        text_config=config_of("gemma3").to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    whole = hf.Gemma3ForConditionalGeneration(config).eval()
    whole.set_attn_implementation("eager")
    whole.save_pretrained(tmp_path)
    for file in toy_model.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    lm = load_language_model(str(tmp_path))
    assert type(lm.hf).__name__ == "Gemma3ForCausalLM" and lm.bridge().plain is not None
    with torch.no_grad():
        assert torch.equal(lm.logits(contexts())[0], whole(input_ids=contexts()).logits)


def test_what_is_needed_is_known_of_every_architecture(model_of) -> None:
    for kind in KINDS:
        lm = model_of(kind)
        settings = dataclasses.replace(settings_of("run_1", "tinylm"), model=lm.name)
        parts = memory_estimate(settings)
        assert parts["language model"] == 4 * sum(p.numel() for p in lm.hf.parameters())


def test_a_block_s_own_hooks_are_in_what_is_kept_of_it(model_of) -> None:
    lm, tokens_BL = model_of("llama"), contexts()
    (plain_BLD,) = lm.activations(tokens_BL, (1,))
    hook = lm.blocks[1].register_forward_hook(lambda block, given, out_BLD: 2 * out_BLD)
    try:
        for found in (lm.activations(tokens_BL, (1,)), lm.logits(tokens_BL, (1,))[1]):
            assert torch.equal(found[0], 2 * plain_BLD)
    finally:
        hook.remove()


# ---- What can't be


def other_config(kind: str) -> Any:
    import transformers as hf

    sizes = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2)
    return {
        "bert": lambda: hf.BertConfig(num_attention_heads=4, intermediate_size=64, **sizes),
        "headless": lambda: other_config("bert"),
        "t5": lambda: hf.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, vocab_size=300),
        "vit": lambda: hf.ViTConfig(hidden_size=32, num_hidden_layers=2),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bert", "must be causal, but what BertLMHeadModel computes of a token depends on later"),
        ("headless", "must be causal, but what BertLMHeadModel computes of a token depends on la"),
        ("t5", "must be a causal language model, but 't5' is an encoder-decoder: set"),
        ("vit", "must be a causal language model, but 'vit' is none that transformers has: set"),
    ],
)
def test_what_is_no_causal_language_model_is_one_sentence(
    toy_model: Path, tmp_path: Path, kind: str, message: str
) -> None:
    from transformers import BertModel

    name, config = str(tmp_path / kind), other_config(kind)
    if kind == "bert":
        save_random(config, tmp_path / kind, toy_model)
    elif kind == "headless":  # as the hub has it: transformers gives it a random head
        BertModel(config).save_pretrained(name)
    else:
        config.save_pretrained(name)
    with pytest.raises(ExperimentError, match=message):
        load_language_model(name)


def test_blocks_without_one_residual_stream_are_one_sentence(model_of, tmp_path: Path) -> None:
    lm = model_of("llama")
    lm.hf.config.num_hidden_layers = 5
    try:
        with pytest.raises(ExperimentError, match="blocks in one list.* 5, but LlamaForCausalLM"):
            LanguageModel(lm.hf, lm.tokenizer, "toy")
    finally:
        lm.hf.config.num_hidden_layers = 4


def test_a_model_that_the_bridge_does_not_wrap_is_one_sentence(model_of, monkeypatch) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("Could not determine supported architecture: " + 300 * "x")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", refuse)
    with pytest.raises(ExperimentError, match="TransformerBridge wraps.*of LlamaForCausalLM it"):
        model_of("llama").bridge()


def test_a_hook_that_a_model_does_not_have_is_one_sentence(model_of) -> None:
    """GPT-NeoX's attention and MLP read the same stream: nothing stands between them."""
    lm = model_of("neox")
    with pytest.raises(ExperimentError, match="hook must be one that 'toy' has .*hook_resid_mid"):
        LanguageModel(lm.hf, lm.tokenizer, "toy", "resid_mid")


# ---- GGUF


def test_a_gguf_file_is_asked_for_its_package_and_told_apart_by_content(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    one.write_bytes(b"GGUF 1")
    for name in (str(one), str(tmp_path)):
        with pytest.raises(ExperimentError, match="takes the package gguf.*`pip install gguf`"):
            load_language_model(name)
        assert model_identity(name) == model_identity(str(one))
        assert weights_digest_of(name) == weights_digest_of(str(one))
        assert hub_problem("model", name) is None
    other.write_bytes(b"GGUF 2")
    assert model_identity(str(other)) != model_identity(str(one))
    assert weights_digest_of(str(other)) != weights_digest_of(str(one))
    with pytest.raises(ExperimentError, match="has 2 GGUF files: set model to one of them"):
        load_language_model(str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_a_gguf_file_gives_the_model_it_was_made_of(model_of, tmp_path: Path) -> None:
    import gguf

    lm = model_of("llama")
    writer = gguf.GGUFWriter(tmp_path / "toy.gguf", "llama")
    for name, value in dict(context_length=256, embedding_length=32, block_count=4,
                            feed_forward_length=64, head_count=4, head_count_kv=2,
                            layer_norm_rms_eps=1e-6, rope_dimension_count=8,
                            vocab_size=300).items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    assert lm.hf.config.rms_norm_eps == 1e-6
    # transformers adds a token of this name where there is none, beyond the embeddings.
    words = ["<|endoftext|>", *(lm.tokenizer.convert_ids_to_tokens(i) for i in range(1, 300))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    merges = json.loads(lm.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    for kind, at in (("bos", 2), ("eos", 1), ("pad", 0)):
        getattr(writer, f"add_{kind}_token_id")(at)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    for name, weight in lm.hf.state_dict().items():
        *where, last, _ = name.split(".")
        block = f"blk.{where[2]}." if "layers" in where else ""
        array = weight.numpy()
        if last in ("q_proj", "k_proj"):  # llama.cpp turns neighbours, not halves, of a head
            heads = 4 if last == "q_proj" else 2
            array = array.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{block}{names[last]}.weight", array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = load_language_model(str(tmp_path))
    tokens_BL = contexts()
    assert torch.equal(read.logits(tokens_BL)[0], lm.logits(tokens_BL)[0])
    assert read.bridge().plain.name == str(tmp_path)
    text = SOURCES[0][:200]
    assert read.tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]
