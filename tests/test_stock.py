"""SAE-Bench's absorption, scr, tpp and autointerp: stock's figures, kept, in stock's form."""

from __future__ import annotations

import dataclasses
import importlib
import json
import string
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from pydantic import TypeAdapter
from sae_bench.sae_bench_utils import dataset_utils

from bench.common import run_on, settings_of
from harness import fingerprint
from harness.errors import ExperimentError
from harness.evaluation import stock
from harness.evaluation.core import prepare_for_sae_bench
from harness.evaluation.extra import check_extra_evals, extra_evaluations
from harness.observation import OBSERVED
from harness.preflight import hub_problem, preflight
from harness.store import store_dir
from tests import gemma_fixture
from tests.conftest import ROOT

NAMES = ("layer_2_seed_0", "layer_2_seed_0_untrained")
CPU = torch.device("cpu")
# Before toy sizes have others in their place.
LOAD, HUB_PROBLEM = dataset_utils.get_multi_label_train_test_data, hub_problem


@pytest.fixture()
def asked(toy, toy_lm, own_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a run that asks for an evaluation, and two SAEs of it, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def make(*kinds: str, **changes):
        settings = dataclasses.replace(
            settings_of("run_1", "tinylm"), layers=(2,), extra_evals=kinds, d_sae=64, **changes
        )
        run = run_on(toy_lm, settings, sae_bench_model=toy_lm.bridge(), out_dir=tmp_path / "out",
                     source=(ROOT / "experiment.py").read_text(), keeps=True)  # fmt: skip
        stats = torch.zeros(32), 1.0
        return run, {n: toy.new_sae(settings, 2, at, stats, {}, 4) for at, n in enumerate(NAMES)}

    return make


def records_in(run, kind: str) -> dict[str, dict]:
    """SAE-Bench's records that a run has left, checked by its own form."""
    room = importlib.import_module(f"sae_bench.evals.{stock.MODULES[kind]}.eval_output")
    forms = {"absorption": "AbsorptionEvalOutput", "scr": "ScrEvalOutput", "tpp": "TppEvalOutput",
             "autointerp": "AutoInterpEvalOutput"}  # fmt: skip
    found = {}
    for path in (run.out_dir / "eval_results" / kind).iterdir():
        text = path.read_text()
        TypeAdapter(getattr(room, forms[kind])).validate_json(text)
        found[path.name.removesuffix("_custom_sae_eval_results.json")] = json.loads(text)
    return found


# ---- absorption ---------------------------------------------------------------------------------


@pytest.fixture()
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy model's words: each letter, often enough to be in train and in test.

    It spells worse than SAE-Bench asks for.
    """
    words, config_of = 5 * list(string.ascii_letters), stock.config_of

    def less(*given) -> object:
        config = config_of(*given)
        config.min_GT_probe_f1, config.min_feats_for_eval, config.max_k_value = 0.2, 10, 2
        return config

    monkeypatch.setattr(stock, "words_of", lambda *_: words)
    monkeypatch.setattr(stock, "config_of", less)


def test_absorption_is_measured_by_sae_bench_s_own_code(asked, letters, tmp_path: Path) -> None:
    from sae_bench.evals.absorption.common import RESULTS_DIR

    run, saes = asked("absorption")
    own = (RESULTS_DIR, Path(run.settings.model))
    before = [sorted(folder.rglob("*")) for folder in own]
    stock.check_letters(run.settings, run.sae_bench_model, CPU)
    figures, seconds = extra_evaluations(run, saes)
    assert 0 < seconds["seconds_absorption"]
    records = records_in(run, "absorption")
    assert {*records} == {*NAMES}
    for name, begins in zip(NAMES, ("absorption_", "absorption_untrained_")):
        mean = records[name]["eval_result_metrics"]["mean"]
        for metric in ("mean_absorption_fraction_score", "mean_full_absorption_score",
                       "mean_num_split_features"):  # fmt: skip
            assert figures[NAMES[0]][begins + metric] == mean[metric]
    assert len(figures[NAMES[0]]) == 6
    assert len(records[NAMES[0]]["eval_result_details"]) >= 10
    assert [sorted(folder.rglob("*")) for folder in own] == before
    assert not (tmp_path / "artifacts").exists()
    alone = {NAMES[0]: saes[NAMES[0]]}
    again, _ = extra_evaluations(dataclasses.replace(run, keeps=False), alone)
    own = {metric: v for metric, v in figures[NAMES[0]].items() if "untrained" not in metric}
    assert again[NAMES[0]] == own and len(own) == 3  # drawn by the seed


def test_a_model_that_does_not_spell_is_refused(asked, monkeypatch) -> None:
    run, _ = asked("absorption")
    words = 2 * list(string.ascii_letters)
    monkeypatch.setattr(stock, "words_of", lambda *_: words)
    monkeypatch.setattr(stock, "letters_told", lambda _: (dict.fromkeys("abc", 0.7), ""))
    with pytest.raises(ExperimentError, match=r"at layer 2 of .* probes tell 3: leave it out"):
        stock.check_letters(run.settings, run.sae_bench_model, CPU)


def test_probes_of_letters_are_of_the_language_model_as_it_is(asked, letters, monkeypatch) -> None:
    """An edit may change it: what was kept of the one that was loaded is then not its own."""
    from sae_bench.evals.absorption import common

    def train(model, layers, *_, probes_dir: Path, **__) -> None:  # in no time
        place = probes_dir / stock.MODEL / "layer_2"
        place.mkdir(parents=True)
        for name in stock.PROBE_FILES:
            (place / name).write_text("a probe")

    monkeypatch.setattr(common, "train_and_save_probes", train)
    run, _ = asked("absorption")
    model, folder = run.sae_bench_model, store_dir() / "letter_probes"
    weights = next(model.parameters())
    for factor, n_kept in ((1.0, 1), (1.0, 1), (2.0, 2), (0.5, 2)):
        with torch.no_grad():
            weights.mul_(factor)
        stock.letter_probes(run.settings, model, 2, CPU)
        assert len([*folder.iterdir()]) == n_kept


def test_absorption_s_words_are_one_token_in_its_prompts() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tinylm")
    template = "{word} has the first letter:"
    words = stock.words_of(tokenizer, template)
    at = stock.word_position(tokenizer, template)
    assert at == -8 and len(words) > 1000 and {word.strip()[0].lower() for word in words} >= {
        *string.ascii_lowercase
    }  # fmt: skip
    assert "between" not in words
    for word in words[::100]:
        line = "\n" + template.format(word=word)
        ids = tokenizer(f"\n{template.format(word='a')} A{line}")["input_ids"]
        assert tokenizer.decode(ids[at]) == word


# ---- scr and tpp --------------------------------------------------------------------------------

SIZES = dict(probe_train=20, probe_test=8, context=32)


@pytest.fixture()
def data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data sets of the hub, made up, where `datasets` finds them by their names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(dataset_utils, LOAD.__name__, LOAD)
    monkeypatch.setattr(gemma_fixture, "CATEGORIES", range(34))
    gemma_fixture.write_bias_in_bios(tmp_path / "LabHC" / "bias_in_bios")
    gemma_fixture.write_amazon_reviews(tmp_path / "canrager" / "amazon_reviews_mcauley_1and5")


@pytest.mark.parametrize("kind", ["tpp", "scr"])
def test_figures_of_scr_and_tpp_are_stock_s(asked, data_sets, tmp_path: Path, kind: str) -> None:
    main = importlib.import_module("sae_bench.evals.scr_and_tpp.main")
    run, saes = asked(kind, **SIZES)
    figures, _ = extra_evaluations(run, saes)
    records = records_in(run, kind)
    config = stock.config_of(kind, run.settings)
    loader = SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: run.sae_bench_model)
    ready = [(name, prepare_for_sae_bench(sae, run.settings)) for name, sae in saes.items()]
    with stock.in_place_of(main, HookedTransformer=loader), torch.enable_grad():  # it ends without
        for _ in range(2):  # the second finds the activations there, as each SAE does here
            theirs = main.run_eval(config, ready, "cpu", str(tmp_path / "stock"), True,
                                   artifacts_path=str(tmp_path / "artifacts"))  # fmt: skip
    for name in NAMES:
        for part in ("eval_result_metrics", "eval_result_details"):
            stock_part = json.loads(json.dumps(theirs[f"{name}_custom_sae"][part]))
            assert records[name][part] == stock_part and stock_part
    metrics = theirs[f"{NAMES[0]}_custom_sae"]["eval_result_metrics"][f"{kind}_metrics"]
    shown = {"tpp": "tpp_threshold_10_total_metric", "scr": "scr_metric_threshold_10"}[kind]
    assert figures[NAMES[0]][shown] == metrics[shown]
    assert shown.replace(f"{kind}_", f"{kind}_untrained_") in figures[NAMES[0]]
    with torch.no_grad():
        saes[NAMES[0]].W_dec.neg_()
    changed, _ = extra_evaluations(run, saes)
    assert changed[NAMES[0]] != figures[NAMES[0]]
    assert not [*Path(run.settings.model).rglob("*activations.pt")]


def test_too_few_rows_are_told(asked, data_sets) -> None:
    run, saes = asked("scr", **SIZES | {"probe_train": 400})
    with pytest.raises(ExperimentError, match="too few rows for probe_train and probe_test"):
        extra_evaluations(run, saes)


# ---- what can't be had --------------------------------------------------------------------------


@pytest.mark.parametrize(("kinds", "changes", "words"), [
    (("scl",), {}, "extra_evals must be among sae_probes, absorption, .* but one is 'scl'"),
    (("tpp", "ravel"), {}, "extra_evals can't have 'ravel': SAE-Bench 0.6.0's own takes"),
    (("absorption",), {"hook": "mlp_out"}, "'absorption' with hook = 'resid_post' alone"),
    (("autointerp",), {}, "OPENAI_API_KEY is not set: set it, or leave 'autointerp' out"),
])  # fmt: skip
def test_what_cannot_be_had_is_refused_before_training(kinds, changes, words, monkeypatch) -> None:
    monkeypatch.setattr(stock, "ENVIRON_AT_START", {})
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), extra_evals=kinds, **changes)
    with pytest.raises(ExperimentError, match=words) as refused:
        check_extra_evals(settings)
    assert "\n" not in str(refused.value)


def test_data_sets_that_cannot_be_had_are_told_before_training(monkeypatch, tmp_path) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("harness.preflight.hub_problem", HUB_PROBLEM)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    settings = dataclasses.replace(
        settings_of("run_1", "tinylm"), extra_evals=("tpp",), model="tinylm",
        probe_sets=("tinylm/B",), training_text="tinylm", core_text="tinylm",
    )  # fmt: skip
    with pytest.raises(ExperimentError, match="bias_in_bios' is not in .* or leave 'tpp' out"):
        preflight(settings, CPU)


def test_ravel_is_refused_for_a_reason_that_holds(toy_lm) -> None:
    """Where this fails, SAE-Bench's ravel may have been mended: let it in."""
    from sae_bench.sae_bench_utils.activation_collection import get_layer_activations

    tokens_BL = torch.arange(3, 15).reshape(2, 6)
    ask = dict(input_ids=tokens_BL, attention_mask=torch.ones_like(tokens_BL))
    expected = toy_lm.activations(tokens_BL, (1,))[0][torch.arange(2), torch.tensor([5, 5])]
    try:
        found = get_layer_activations(toy_lm.hf, 1, ask, torch.tensor([5, 5]))
    except Exception:
        return
    assert found.shape != expected.shape or not torch.allclose(found, expected)


# ---- autointerp ---------------------------------------------------------------------------------


def test_autointerp_asks_with_the_key_and_leaves_untrained_saes_out(asked, monkeypatch) -> None:
    """With an answering machine in OpenAI's place, and a text of its own in the hub's."""
    main = importlib.import_module("sae_bench.evals.autointerp.main")
    config_of, keys = stock.config_of, []
    text = {"text": "def self(a): return None if a else 1 " * 99}

    def small(*given) -> object:
        config = config_of(*given)
        config.n_latents, config.total_tokens = 3, 4000
        return config

    def client(api_key: str) -> SimpleNamespace:
        keys.append(api_key)
        answer = SimpleNamespace(message=SimpleNamespace(content="1, 2"))
        create = lambda **_: SimpleNamespace(choices=[answer])  # noqa: E731
        return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))

    monkeypatch.setattr(stock, "config_of", small)
    monkeypatch.setattr(main, "OpenAI", client)
    monkeypatch.setattr(dataset_utils, "load_dataset", lambda *_, **__: [text] * 40)
    monkeypatch.setattr(stock, "ENVIRON_AT_START", {stock.KEY: "not-a-key"})
    run, saes = asked("autointerp", context=32)
    figures, _ = extra_evaluations(run, saes)
    assert {*keys} == {"not-a-key"} and {*records_in(run, "autointerp")} == {NAMES[0]}
    assert 0 <= figures[NAMES[0]]["autointerp_score"] <= 1 and figures[NAMES[1]] == {}
    asked_before = len(keys)
    assert extra_evaluations(run, saes)[0] == figures and len(keys) == asked_before
    kept = [path.read_text() for path in (store_dir() / "autointerp").rglob("*.json")]
    assert kept and not any("not-a-key" in text for text in kept)


def test_a_rehearsal_tells_what_an_sae_can_not_do(asked) -> None:
    """Codes of several texts at once, which nothing else asks for; no figures are made of it."""
    run, saes = asked("tpp")
    split = {"a": {"input_ids": torch.arange(3, 23).reshape(2, 10)}}
    run = dataclasses.replace(run, probe_texts={"toy": [split, split]}, training_pass=object())
    assert extra_evaluations(run, saes)[0] == {name: {} for name in NAMES}
    with torch.no_grad():
        saes[NAMES[0]].W_dec = torch.nn.Parameter(torch.zeros(64, 31))
    with pytest.raises(RuntimeError):
        extra_evaluations(run, saes)


def test_a_setting_that_a_rehearsal_has_not_seen_used_is_in_no_key(asked, monkeypatch) -> None:
    """Else another word in a description would have OpenAI asked, and paid, anew."""
    made: list[dict] = []

    def kept(kind: str, keys: dict, compute: object) -> dict:
        made.append(keys)
        return {name: {"eval_result_metrics": {}} for name in keys}

    monkeypatch.setattr(stock, "cached_each", kept)
    monkeypatch.setattr(fingerprint, "patched", dict)  # what tests put there reads every setting
    monkeypatch.setattr(OBSERVED, "ran", {})
    monkeypatch.setattr(OBSERVED, "settings", {})
    run, saes = asked("tpp")
    split = {"a": {"input_ids": torch.arange(3, 23).reshape(2, 10)}}
    rehearsed = dict(probe_texts={"toy": [split, split]}, training_pass=object())
    with OBSERVED.watching(type(run.settings)):
        extra_evaluations(dataclasses.replace(run, **rehearsed), saes)
    for change in ({}, dict(description="a word", compare_to="run_2"), dict(context=64)):
        settings = dataclasses.replace(run.settings, **change)
        extra_evaluations(dataclasses.replace(run, settings=settings), saes)
    assert made[0] == made[1] and made[0] != made[2]
