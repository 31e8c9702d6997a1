"""features/layer_L.json.gz against a plain reference; what is kept of it; SAEDashboard."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bench.common import run_on, settings_of
from harness.console import Progress
from harness.evaluation import core as evaluation_core
from harness.evaluation import features as rooms_features
from harness.evaluation import logit_lens as rooms_lens
from harness.evaluation.core import core_evaluation
from harness.evaluation.features import FeatureGatherer, write_features
from harness.evaluation.logit_lens import final_norm, gain_of, logit_lens, token_strings
from harness.evaluation.probe_texts import read_probe_texts
from harness.evaluation.probing import sparse_probing
from harness.language_model import load_language_model
from harness.ledger import LEDGER
from harness.ranks import RANKS
from harness.store import store_dir
from tests.conftest import TOY_TASKS, run_command
from tests.test_metrics import Tokens
from tests.test_models import KINDS, config_of

LAYER, NAME, LENGTH, DEAD = 2, "layer_2_seed_0", 32, 5
CPU = torch.device("cpu")


def read(out_dir: Path, layer: int = LAYER) -> dict[str, Any]:
    return json.loads(gzip.decompress((out_dir / f"features/layer_{layer}.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def lm(toy_model: Path):
    """The toy with a final norm that does something."""
    lm = load_language_model(str(toy_model))
    generator = torch.Generator().manual_seed(5)
    norm = lm.hf.model.norm.weight
    norm.data.copy_(torch.randn(norm.shape, generator=generator) / 2)
    return lm


@pytest.fixture(scope="module")
def settings(toy):
    changes = dict(layers=(LAYER,), seeds=(0, 1), probe_ks=(1, 2, 5))
    return dataclasses.replace(settings_of("run_1", "tinylm"), **changes)


@pytest.fixture(scope="module")
def tokens_NL() -> Tensor:
    """The contexts of the sparsity batches: the last one is the first again, one holds an EOS."""
    tokens_NL = torch.randint(3, 300, (16, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens_NL[:, 0], tokens_NL[3, 10], tokens_NL[15] = 2, 1, tokens_NL[0]
    tokens_NL[15, 0] = 2
    return tokens_NL


@pytest.fixture(scope="module")
def stream_NLD(lm, tokens_NL: Tensor) -> Tensor:
    return lm.activations(tokens_NL, (LAYER,))[0]


def an_sae(toy, settings, stream_NLD: Tensor, kind: str):
    """An SAE of a form, one of its features dead, the rows of its decoder of unit norm."""
    stats = stream_NLD[:, 1:].mean((0, 1)), 1.0
    k = None if kind == "no selection" else 4
    sae = toy.new_sae(settings, LAYER, 0, stats, {}, None if kind == "jumprelu" else k,
                      by_threshold=kind == "jumprelu")  # fmt: skip
    if kind == "jumprelu":
        sae.threshold.fill_(2.0)
    sae.b_enc.data[DEAD] = -1e6
    return sae


def evaluated(toy, lm, settings, sae, tokens_NL, out_dir: Path, **more: Any) -> dict[str, Any]:
    """Core evaluation and sparse probing of an SAE; the features that they leave, and the run."""
    texts = read_probe_texts(settings, lm.tokenizer, CPU)
    given = dict(sae_bench_model=lm.bridge(), probe_texts=texts, out_dir=out_dir)
    run = run_on(lm, settings, **given, **more)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(evaluation_core, "core_store", lambda *_: Tokens(tokens_NL))
        core_evaluation(run, {NAME: sae}, toy.core_metrics)
    sparse_probing(run, {NAME: sae}, toy.probe, Progress("probing", len(texts), "sets"))
    return read(out_dir) | {"texts": texts}


@torch.no_grad()
def reference(sae, lm, tokens_NL: Tensor, stream_NLD: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Activations (N, L, F), zero where a token doesn't count, and which count."""
    counts_NL = ~torch.isin(tokens_NL, torch.tensor([0, 1, 2]))
    acts_NLF = sae.fold_activation_norm_scaling().encode(stream_NLD) * counts_NL[..., None]
    return acts_NLF.double().numpy(), counts_NL.numpy()


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "no selection"])
def test_features_are_those_of_a_plain_reference(
    toy, lm, settings, tokens_NL, stream_NLD, tmp_path, monkeypatch, kind
) -> None:
    monkeypatch.setattr(rooms_lens, "ROWS_AT_ONCE", 7)  # in parts, as large ones are
    monkeypatch.setattr(rooms_lens, "AT_ONCE", 7 * 50)
    sae = an_sae(toy, settings, stream_NLD, kind)
    found = evaluated(toy, lm, settings, sae, tokens_NL, tmp_path)
    acts_NLF, counts_NL = reference(sae, lm, tokens_NL, stream_NLD)
    assert (found["version"], found["model"], found["seed"]) == (1, settings.model, 0)
    assert (found["layer"], found["hook_name"]) == (LAYER, "blocks.2.hook_resid_post")
    assert found["d_sae"] == len(found["features"]) == settings.d_sae
    assert found["n_tokens"] == counts_NL.sum() == 16 * 31 - 1
    names = token_strings(lm.tokenizer, range(300))
    W_FD, hf = sae.W_dec.detach(), lm.hf
    logits_FV = W_FD * (1 + hf.model.norm.weight) @ hf.lm_head.weight.T
    logits_FV = (logits_FV - logits_FV.mean(1, keepdim=True)).numpy()
    cosines_FF = (W_FD @ W_FD.T).fill_diagonal_(-2).numpy()
    edges = found["edges"]
    for i, feature in enumerate(found["features"]):
        active = acts_NLF[..., i][acts_NLF[..., i] > 0]
        assert feature["density"] == pytest.approx(len(active) / counts_NL.sum(), rel=0.006)
        assert feature["mean"] == pytest.approx(active.mean() if len(active) else 0, rel=0.006)
        assert feature["max"] == pytest.approx(max(active, default=0), rel=0.006)
        counts = np.histogram(np.maximum(active, edges[0]), edges)[0]
        assert feature["histogram"] == counts.tolist() and sum(counts) == len(active)
        # The last context is the first again, and shows once.
        order = (-acts_NLF[:15, :, i].max(1)).argsort(kind="stable")
        strongest = [n for n in order[:5] if acts_NLF[n, :, i].max() > 0]
        assert [context["passage"] for context in feature["contexts"]] == strongest
        for context in feature["contexts"]:
            acts_L = acts_NLF[context["passage"], :, i]
            peak = int(acts_L.argmax())
            window = slice(max(peak - 12, 0), peak + 7)
            assert context["acts"] == pytest.approx(acts_L[window], rel=0.006)
            assert context["at"] == peak - window.start
            shown = [found["tokens"][token] for token in context["tokens"]]
            assert shown == [names[id_] for id_ in tokens_NL[context["passage"], window]]
        for said, largest in (("raises", -1), ("lowers", 1)):
            best = (largest * logits_FV[i]).argsort()[:10]
            shown = [found["tokens"][token] for token, _ in feature[said]]
            assert shown == [names[token] for token in best]
            values = [value for _, value in feature[said]]
            assert values == pytest.approx(logits_FV[i, best], rel=0.006)
        near = (-cosines_FF[i]).argsort()[:5]
        assert [at for at, _ in feature["nearest"]] == near.tolist()
        cosines = [value for _, value in feature["nearest"]]
        assert cosines == pytest.approx(cosines_FF[i, near], rel=0.006, abs=1e-6)
    assert found["lens"] == "the final norm's gain and the unembedding"
    assert found["features"][DEAD]["density"] == found["features"][DEAD]["max"] == 0
    assert found["features"][DEAD]["contexts"] == []
    assert sum(len(feature["contexts"]) for feature in found["features"]) > 5
    check_probe(found, sae, lm)


@torch.no_grad()
def check_probe(found: dict[str, Any], sae, lm) -> None:
    """The values by class are the differences of the means of texts' mean activations."""
    differences = {}
    for dataset, (train, _) in found["texts"].items():
        means = {}
        for label, encoded in train.items():
            tokens_NL = encoded["input_ids"]
            acts_NLF, counts_NL = reference(
                sae, lm, tokens_NL, lm.activations(tokens_NL, (LAYER,))[0]
            )
            means[label] = acts_NLF.sum(1) / counts_NL.sum(1, keepdims=True)
        for label, mean_NF in means.items():
            others = np.concatenate([means[other] for other in means if other != label])
            differences[f"{dataset}: {label}"] = mean_NF.mean(0) - others.mean(0)
    assert found["probed"] == [f"{name}: {label}" for name, of in TOY_TASKS.items() for label in of]
    halves = [f"toy/halves: {label}" for label in TOY_TASKS["toy/halves"]]
    for i, feature in enumerate(found["features"]):
        values = {
            name: value_F[i] for name, value_F in differences.items()
            if abs(value_F[i]) > 1e-9 and not (name in halves and value_F[i] < 0)
        }  # fmt: skip
        best = sorted(values, key=lambda name: -abs(values[name]))[:5]
        # Rounded values may be equal, and their order is that of the classes then.
        sizes = [abs(value) for _, value in feature["probe"]]
        assert sizes == pytest.approx([abs(values[name]) for name in best], rel=0.006)
        told = {found["probed"][at]: value for at, value in feature["probe"]}
        assert told == {name: pytest.approx(values[name], rel=0.006) for name in told}
    assert any(feature["probe"] for feature in found["features"])


def test_the_values_by_class_are_what_sae_bench_selects_by(
    toy, lm, settings, tokens_NL, stream_NLD, tmp_path
) -> None:
    """Of two classes of equal size it draws all texts: its best k are ours."""
    from sae_bench.evals.sparse_probing import probe_training

    from harness.evaluation.core import prepare_for_sae_bench
    from harness.evaluation.probe_features import probing_features

    settings = dataclasses.replace(settings, probe_sets=("toy/halves",))
    sae = an_sae(toy, settings, stream_NLD, "topk")
    found = evaluated(toy, lm, settings, sae, tokens_NL, tmp_path)
    ready = {NAME: prepare_for_sae_bench(sae, settings)}
    _, of_saes = probing_features(found["texts"]["toy/halves"], lm.bridge(), ready, settings)
    data = probe_training.prepare_probe_data(of_saes[NAME][0], "first")
    kept = ~probe_training.get_top_k_mean_diff_mask(*data, 6)
    told = [max([abs(v) for _, v in feature["probe"]], default=0) for feature in found["features"]]
    assert {*kept.nonzero()[:, 0].tolist()} == {*np.argsort(told)[-6:].tolist()}


def test_features_come_from_the_store_with_the_results(
    toy, lm, settings, tokens_NL, stream_NLD, tmp_path, own_cache, monkeypatch
) -> None:
    """The same bytes, of the SAE that is asked for; nothing gathered of an SAE that isn't shown."""
    sae = an_sae(toy, settings, stream_NLD, "topk")
    other = dataclasses.replace(settings, seeds=(1, 0))
    given = toy, lm, other, sae, tokens_NL
    with pytest.raises(FileNotFoundError):
        evaluated(*given, tmp_path / "hidden", keeps=True)
    files, reused = [], []
    for folder in ("anew", "stored"):
        monkeypatch.setattr(LEDGER, "reused", [])
        evaluated(toy, lm, settings, sae, tokens_NL, tmp_path / folder, keeps=True)
        files.append((tmp_path / folder / f"features/layer_{LAYER}.json.gz").read_bytes())
        reused.append({"core evaluation", "sparse probing"} & {*LEDGER.reused})
    assert files[0] == files[1] and reused == [set(), {"core evaluation", "sparse probing"}]
    assert any(feature["probe"] for feature in read(tmp_path / "stored")["features"])
    assert len([*store_dir().glob("core_evaluation/*.json")]) == 2
    sae.b_enc.data.add_(0.5)
    evaluated(toy, lm, settings, sae, tokens_NL, tmp_path / "another", keeps=True)
    assert read(tmp_path / "another") != read(tmp_path / "stored")


def test_a_run_leaves_its_features_and_the_same_again(toy, toy_run: Path, tmp_path) -> None:
    """The second command takes all from the store."""
    assert not any("can't be looked at" in said for said in read_warnings(toy_run))
    assert run_command(toy, tmp_path / "run_1") == 0
    assert len([*toy_run.glob("features/*")]) == 2
    for file in toy_run.glob("features/*"):
        assert (tmp_path / "run_1" / "features" / file.name).read_bytes() == file.read_bytes()
    for layer in (0, 2):
        alive = [feature for feature in read(toy_run, layer)["features"] if feature["contexts"]]
        assert len(alive) > 5 and any(feature["probe"] for feature in alive)


def read_warnings(run: Path) -> list[str]:
    return json.loads((run / "warnings.json").read_text())


def test_of_several_ranks_the_first_writes_features(
    toy, lm, settings, stream_NLD, tmp_path, monkeypatch
) -> None:
    run = run_on(lm, settings, out_dir=tmp_path)
    sae = an_sae(toy, settings, stream_NLD, "topk")
    feature = {"contexts": []}
    gathered = {"n_tokens": 1, "edges": [1, 2], "features": [feature] * settings.d_sae}
    for rank, n_files in ((1, 0), (0, 1)):
        monkeypatch.setattr(RANKS, "rank", rank)
        write_features(run, sae, gathered)
        assert len([*tmp_path.glob("features/*")]) == n_files


def test_what_fails_is_a_warning(
    toy, lm, settings, tokens_NL, stream_NLD, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(LEDGER, "warnings", [])
    monkeypatch.setattr(rooms_features, "FORGIVEN", (Exception,))
    gatherer = FeatureGatherer()
    gatherer.add(torch.ones(2, 3, 4), tokens_NL[:1], torch.ones(2, 3))
    gatherer.add(torch.ones(2, 3, 4), tokens_NL[:2, :3], torch.ones(2, 3))  # too late
    sae = an_sae(toy, settings, stream_NLD, "topk")
    run = run_on(lm, settings, out_dir=tmp_path)
    assert FeatureGatherer().gathered() == {
        "problem": "core_metrics decodes nothing in the sparsity batches"
    }
    write_features(run, sae, gatherer.gathered())
    sae.W_dec = None
    write_features(run, sae, {"n_tokens": 1, "edges": [1, 2], "features": []})
    first, second = LEDGER.warnings
    where = "features of layer 2 can't be looked at, features/layer_2.json.gz is missing or not wh"
    assert first.startswith(where) and second.startswith(where)
    assert "IndexError" in first and "AttributeError: 'NoneType'" in second
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_come_through_the_model_s_own_norm_and_unembedding(kind: str) -> None:
    """A row alone in the stream, passed through both: the same up to the norm's division."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config_of(kind)).eval()
    names = {"gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm"}
    norm = hf.get_submodule(names.get(kind, "model.norm"))
    for parameter in norm.parameters():
        parameter.data.normal_(1.0, 0.3)
    assert final_norm(hf, kind) is norm
    W_FD = torch.randn(6, 32)
    found, through = logit_lens(hf, kind, W_FD, 290, 4)
    assert through == "the final norm's gain and the unembedding"
    with torch.no_grad():
        alone_FD = norm(W_FD) - norm(torch.zeros_like(W_FD))
        logits_FV = (alone_FD @ hf.get_output_embeddings().weight.T)[:, :290]
    logits_FV -= logits_FV.mean(1, keepdim=True)
    for said, largest in (("raises", True), ("lowers", False)):
        values, at = logits_FV.topk(4, largest=largest)
        ratio = found[said][0] / values
        assert torch.equal(found[said][1], at) and (ratio > 0).all()
        assert torch.allclose(ratio, ratio[:, :1], rtol=1e-3)


def test_without_a_final_norm_or_an_unembedding_it_is_said(toy_model: Path) -> None:
    hf = load_language_model(str(toy_model)).hf
    W_FD = torch.randn(6, 32)
    hf.model.norm = nn.Identity()
    found, through = logit_lens(hf, "toy", W_FD, 300, 3)
    assert through == "the unembedding alone"
    logits_FV = W_FD @ hf.lm_head.weight.T
    assert torch.equal(found["raises"][1], (logits_FV - logits_FV.mean(1, True)).topk(3).indices)
    hf.set_output_embeddings(nn.Linear(16, 300))
    assert logit_lens(hf, "toy", W_FD, 300, 3)[0] == {}
    for no_norm in (nn.Linear(32, 32), nn.Identity(), nn.Linear(16, 16)):
        assert gain_of(no_norm, 32) is None


def test_tokens_are_shown_as_they_stand_in_a_text(toy_lm) -> None:
    """Byte-level: with its space; a part of a character as bytes, specials by name."""
    ids = toy_lm.tokenizer(" def\n‽", add_special_tokens=False)["input_ids"]
    shown = token_strings(toy_lm.tokenizer, [*ids, 2, 1])
    assert shown[0].startswith(" ") and "".join(shown[:-5]) == " def\n"
    assert shown[-5:] == ["\\xe2", "\\x80", "\\xbd", "<bos>", "<eos>"]


def test_tokens_of_sentencepiece_keep_their_space() -> None:
    """Its decoder drops the space that a text begins with, and joins bytes to characters."""
    vocabulary = {word: n for n, word in enumerate(("<unk>", "<s>", "▁", "a", "x", "▁a", "▁x"))}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    merges = [("▁", "a"), ("▁", "x")]
    raw = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
             decoders.Strip(" ", 1, 0)]  # fmt: skip
    raw.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    ids = [vocabulary[token] for token in ("▁x", "x", "▁", "<0xE2>", "<0x41>", "<s>")]
    assert tokenizer.decode(ids[:1]) == "x"
    assert token_strings(tokenizer, ids) == [" x", "x", " ", "<0xE2>", "A", "<s>"]
