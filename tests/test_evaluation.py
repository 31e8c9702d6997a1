"""The evaluation against stock SAE-Bench, and its traps.

The traps are listed in docs/operations.md, Traps of other software.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from harness import ExperimentError
from harness.console import Progress
from harness.evaluation.core import (
    core_config,
    core_store,
    core_text,
    export_to_saelens,
    prepare_for_sae_bench,
    run_core,
)
from harness.evaluation.probing import (
    probe,
    probe_names,
    probing_config,
    read_probe_texts,
    tinylm_tasks,
)
from harness.language_model import load_language_model
from harness.store import store_dir
from tests.conftest import replace


@pytest.fixture()
def scored(toy, toy_run: Path):
    """A complete toy run of one seed: (the module, its settings, its folder)."""
    return toy, toy.settings_of("run_1", "tinylm"), toy_run


def stock_probing(settings, sae, model, artifacts: Path) -> tuple[dict, dict]:
    """`run_eval_single_sae` twice: the first call also probes the language model."""
    from sae_bench.evals.sparse_probing import main as stock
    from sae_bench.sae_bench_utils import general_utils

    sae = general_utils.load_and_format_sae("", sae, "cpu")[1]
    config = probing_config(settings)
    load = torch.load
    torch.load = lambda path: load(path, weights_only=False)  # its own file, just written
    try:
        first, second = (
            stock.run_eval_single_sae(config, sae, model, "cpu", str(artifacts), True)[0]
            for _ in range(2)
        )
    finally:
        torch.load = load
    return first, second


def test_reported_figures_are_stock_sae_bench_on_the_stored_sae(scored, tmp_path: Path) -> None:
    """SAELens reads the SAE back; SAE-Bench, called directly, finds what the run reported."""
    from sae_bench.evals.core import main as core
    from sae_bench.sae_bench_utils import general_utils
    from sae_lens.training.activations_store import ActivationsStore

    _, settings, out_dir = scored
    model = load_language_model(settings.model).hooked()
    info = json.loads((out_dir / "final_info.json").read_text())
    for layer in settings.layers:
        sae = SAE.load_from_disk(out_dir / "sae" / f"layer_{layer}" / "seed_0")
        assert sae.cfg.architecture() == "topk" and sae.cfg.k == settings.k_min
        metadata = sae.cfg.metadata
        assert metadata.model_name == settings.model
        assert metadata.hook_name == f"blocks.{layer}.hook_resid_post"
        assert (metadata.context_size, metadata.prepend_bos) == (settings.context, True)
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(settings.d_sae), atol=1e-5)
        means = info[f"layer_{layer}"]["means"]

        first, second = stock_probing(settings, sae, model, tmp_path / f"artifacts_{layer}")
        name = probe_names(settings)[0]
        detail = json.loads(
            next((out_dir / "eval_results" / "sparse_probing").glob(f"layer_{layer}_seed_0_c*"))
            .read_text()
        )["eval_result_details"]  # fmt: skip
        assert [entry.pop("dataset_name") for entry in detail] == [
            f"{name}_results" for name in probe_names(settings)
        ]
        for at, name in enumerate(probe_names(settings)):
            for metric, value in second[f"{name}_results"].items():
                if metric.startswith("sae_"):
                    assert detail[at][metric] == value, (name, metric)
        for metric, value in first[f"{probe_names(settings)[0]}_results"].items():
            if metric.startswith("llm_"):
                assert detail[0][metric] == value, metric
        for k in settings.probe_ks:
            metric = f"sae_top_{k}_test_accuracy"
            assert means[metric] == pytest.approx(second[metric], abs=1e-12)

        sae = general_utils.load_and_format_sae("", sae, "cpu")[1]
        store = ActivationsStore.from_sae(
            model, sae, core_text(settings), context_size=settings.context
        )
        store.shuffle_input_dataset(seed=42)
        scalars, _ = core.run_evals(
            sae, store, model, core_config(settings), ignore_tokens={0, 1, 2}
        )
        for group in scalars.values():
            for metric, value in group.items():
                assert means[metric] == pytest.approx(value, rel=1e-4, abs=1e-6), metric


def test_raw_outputs_have_sae_bench_s_own_form(scored) -> None:
    from pydantic import TypeAdapter
    from sae_bench.evals.core.eval_output import CoreEvalOutput
    from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput

    _, settings, out_dir = scored
    for kind, form in (("core", CoreEvalOutput), ("sparse_probing", SparseProbingEvalOutput)):
        files = sorted((out_dir / "eval_results" / kind).glob("*.json"))
        assert len(files) == 2 * len(settings.layers)  # each layer, and its untrained twin
        for file in files:
            output = TypeAdapter(form).validate_json(file.read_text())
            assert output.sae_cfg_dict["d_sae"] == settings.d_sae


def test_untrained_twin_has_equal_width_and_l0_and_was_never_trained(scored) -> None:
    _, settings, out_dir = scored
    info = json.loads((out_dir / "final_info.json").read_text())
    for layer in settings.layers:
        means = info[f"layer_{layer}"]["means"]
        assert means["untrained_l0"] == pytest.approx(means["l0"], rel=0.05)
        assert means["untrained_fvu"] > means["fvu"]
        for k in settings.probe_ks:
            assert 0 <= means[f"untrained_top_{k}_test_accuracy"] <= 1


def two_saes(toy, settings, model) -> dict:
    """SAEs of layers 0 and 2, prepared for SAE-Bench."""
    generator = torch.Generator().manual_seed(3)
    saes = {}
    for layer in (0, 2):
        mean = torch.randn(32, generator=generator)
        sae = toy.new_sae(settings, layer, layer, mean, 1.0, {}, 4)
        saes[f"layer_{layer}"] = prepare_for_sae_bench(sae, settings)
    return saes


def stock_core(sae, settings, model) -> tuple[dict, dict]:
    from sae_bench.evals.core import main as core

    store = core_store(settings, model, sae)
    return core.run_evals(sae, store, model, core_config(settings), ignore_tokens={0, 1, 2})


def test_core_side_by_side_is_stock_core_one_by_one(toy, toy_lm) -> None:
    """Shared passes change no figure, not even in the last bit, and each batch is read once."""
    settings = dataclasses.replace(toy.settings_of("run_1", "tinylm"), layers=(0, 2))
    model = toy_lm.hooked()
    saes = two_saes(toy, settings, model)
    seen = []
    together = run_core(saes, model, settings, seen.append)
    assert len(seen) == settings.core_reconstruction_batches + settings.core_sparsity_batches
    for name, sae in saes.items():
        scalars, features = stock_core(sae, settings, model)
        assert together[name][0] == scalars
        # As text, since a feature that never fires has a NaN, which equals nothing.
        assert json.dumps(together[name][1]) == json.dumps(features)


def test_an_error_in_one_core_evaluation_ends_all(toy, toy_lm) -> None:
    settings = dataclasses.replace(toy.settings_of("run_1", "tinylm"), layers=(0, 2))
    model = toy_lm.hooked()
    saes = two_saes(toy, settings, model)

    def broken(features):
        raise RuntimeError("broken decoder")

    saes["layer_2"].decode = broken
    with pytest.raises(RuntimeError, match="broken decoder"):
        run_core(saes, model, settings, lambda n: None)
    assert torch.is_grad_enabled()


def test_fvu_is_the_formula(toy, toy_lm) -> None:
    """A constant scores 1, and an SAE what the formula says of the tokens that stock core sees."""
    settings = dataclasses.replace(toy.settings_of("run_1", "tinylm"), layers=(2,))
    model = toy_lm.hooked()
    sae = two_saes(toy, settings, model)["layer_2"]
    seen = []
    encode = sae.encode
    sae.encode = lambda x: (seen.append(x), encode(x))[1]
    store = core_store(settings, model, sae)
    tokens = []
    take = store.get_batch_tokens
    store.get_batch_tokens = lambda n: (tokens.append(take(n)), tokens[-1])[1]
    from sae_bench.evals.core import main as core

    core.run_evals(sae, store, model, core_config(settings), ignore_tokens={0, 1, 2})
    n = settings.core_sparsity_batches  # its passes come last
    x = torch.cat([acts[ids > 2] for acts, ids in zip(seen[-n:], tokens[-n:])]).double()
    sae.encode = encode
    error = (x - sae(x.float()).detach().double()).pow(2).sum()
    expected = float(error / (x - x.mean(0)).pow(2).sum())
    constant = toy.CustomSAE(32, settings.d_sae, settings.model, 2, k=1)
    constant.b_dec.data = x.mean(0).float()
    both = {"sae": sae, "constant": prepare_for_sae_bench(constant, settings)}
    results = run_core(both, model, settings, lambda n: None)
    assert results["sae"][2] == pytest.approx(expected, rel=1e-6)
    assert results["constant"][2] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    "changes, form",
    [({}, "topk"), ({"curriculum": False}, "standard"), ({"activation": "jumprelu"}, "jumprelu")],
)
def test_exported_sae_gives_the_same_output(toy, toy_lm, tmp_path: Path, changes, form) -> None:
    settings = dataclasses.replace(toy.settings_of("run_1", "tinylm"), layers=(2,), **changes)
    mean = torch.randn(32, generator=torch.Generator().manual_seed(1))
    trainers = toy.start_trainers(settings, {2: (mean, 0.7)}, {(2, 0): {"gamma": 0.1}}, False)
    sae = trainers[2, 0].sae
    if form == "jumprelu":
        sae.threshold.fill_(0.9)
    export_to_saelens(sae, settings, tmp_path)
    stored = SAE.load_from_disk(tmp_path)
    assert stored.cfg.architecture() == form
    x = 3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(stored.encode(x), sae.fold_activation_norm_scaling().encode(x), atol=1e-6)
    assert torch.allclose(stored(x), sae.fold_activation_norm_scaling()(x), atol=1e-5)
    assert torch.allclose(stored(x), sae(0.7 * x) / 0.7, atol=1e-5)
    theta = json.loads((tmp_path / "theta.json").read_text())
    assert theta["theta_3"] is None and theta["gamma"] == pytest.approx(0.1)
    assert theta["scale"] == 0.7
    assert theta["theta_1"] == 0.0 and theta["tau_sel"] == pytest.approx(0.3)


def test_evaluation_leaves_the_sae_as_it_was(toy, toy_lm) -> None:
    """SAE-Bench casts and marks the SAE it is given: it gets a copy."""
    settings = dataclasses.replace(toy.settings_of("run_1", "tinylm"), lm_dtype="bfloat16")
    sae = toy.new_sae(settings, 2, 0, torch.zeros(32), 1.0, {}, 4)
    ready = prepare_for_sae_bench(sae, settings)
    assert ready.W_enc.dtype == torch.bfloat16 and ready.dtype == torch.bfloat16
    assert ready.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
    assert sae.W_enc.dtype == torch.float32 and not hasattr(sae.cfg, "metadata")


def test_a_nan_in_core_stops_the_run_and_is_not_recorded_as_minus_one(
    toy, toy_lm, tmp_path: Path
) -> None:
    settings = toy.settings_of("run_1", "tinylm")
    sae = toy.new_sae(settings, 2, 0, torch.zeros(32), 1.0, {}, 4)
    sae.b_dec.data[0] = float("nan")
    with pytest.raises(ExperimentError, match="core evaluation of broken: .* is nan"):
        toy.core_evaluation({"broken": sae}, toy_lm.hooked(), settings, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_core_does_not_replace_bos(toy, toy_lm) -> None:
    """An SAE that reconstructs nothing but BOS badly costs no cross-entropy."""
    settings = toy.settings_of("run_1", "tinylm")
    model = toy_lm.hooked()
    from sae_bench.evals.core import main as core

    sae = prepare_for_sae_bench(toy.new_sae(settings, 2, 0, torch.zeros(32), 1.0, {}, 4), settings)
    bos = toy_lm.activations(torch.tensor([[2, 9]]), (2,))[0][0, 0]
    sae.encode = lambda x: x
    sae.decode = lambda x: torch.where((x - bos).abs().amax(-1, keepdim=True) < 1e-3, 100.0, x)
    metrics = core.get_recons_loss(
        sae, model, torch.tensor([[2, 9, 40, 70]]), None, True, True,
        ignore_tokens={0, 1, 2}, exclude_special_tokens_from_reconstruction=True,
    )  # fmt: skip
    assert torch.equal(metrics["ce_loss_with_sae"], metrics["ce_loss_without_sae"])
    assert core_config(settings).exclude_special_tokens_from_reconstruction


def test_the_language_model_s_probes_are_computed_once(toy, toy_lm, tmp_path, monkeypatch) -> None:
    """The second run reads them; the figures are the same, and an SAE's own are not touched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = dataclasses.replace(toy.settings_of("run_1", "tinylm"), layers=(2,))
    model = toy_lm.hooked()
    texts = read_probe_texts(settings, toy_lm.tokenizer, torch.device("cpu"))
    sae = toy.new_sae(settings, 2, 0, torch.zeros(32), 1.0, {}, 4)
    calls = []
    stock = probe
    replace(monkeypatch, "probe", lambda *a: (calls.append(a[2]), stock(*a))[1])

    def score(settings=settings) -> dict:
        calls.clear()
        progress = Progress("sparse probing", 2, "SAEs")
        return toy.sparse_probing({"sae": sae}, texts, model, settings, tmp_path, progress)["sae"]

    first = score()
    assert calls == ["llm", "sae", "llm", "sae"]
    assert score() == first and calls == ["sae", "sae"]
    for file in store_dir().joinpath("language_model_probes").iterdir():
        file.write_text(file.read_text().replace("0.", "1.", 1))
    assert score() == first and calls == ["llm", "sae", "llm", "sae"]  # damage is found
    other = dataclasses.replace(settings, probe_seed=43)
    assert score(other) != first and calls == ["llm", "sae", "llm", "sae"]


def test_the_language_model_s_passes_are_made_once(toy, toy_lm, tmp_path, monkeypatch) -> None:
    """Another SAE's evaluation reads them; a damaged one is made again; a rehearsal keeps none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = dataclasses.replace(toy.settings_of("run_1", "tinylm"), layers=(2,))
    model, numbers = toy_lm.hooked(), iter(range(100))
    texts = read_probe_texts(settings, toy_lm.tokenizer, torch.device("cpu"))
    sae = toy.new_sae(settings, 2, 0, torch.zeros(32), 1.0, {}, 4)
    calls, run_with_cache = [], model.run_with_cache
    monkeypatch.setattr(
        model, "run_with_cache", lambda *a, **k: (calls.append(1), run_with_cache(*a, **k))[1]
    )

    def score(keep: bool = True) -> tuple[dict, dict]:
        calls.clear()
        keys = {"sae": {"SAE": next(numbers)}} if keep else None
        progress = Progress("sparse probing", 2, "SAEs")
        return (
            toy.core_evaluation({"sae": sae}, model, settings, tmp_path, keys=keys),
            toy.sparse_probing({"sae": sae}, texts, model, settings, tmp_path, progress, keys),
        )

    anew = score(keep=False)
    n_passes = len(calls)
    assert n_passes > 10 and not store_dir().joinpath("core_passes").exists()
    assert score() == anew and len(calls) == n_passes
    assert score() == anew and len(calls) == 0
    for kind in ("core_passes/*/*residuals*", "probing_passes/*/*"):
        file = min(store_dir().glob(kind))
        *rest, last = file.read_bytes()
        file.write_bytes(bytes([*rest, last ^ 1]))
    assert score() == anew and len(calls) == 2
    replace(monkeypatch, "ACTIVATIONS_GB", 1e-6)
    assert score() == anew and len(calls) == n_passes


def test_tinylm_s_figures_are_stock_sae_bench_s(tmp_path: Path, monkeypatch) -> None:
    """On the shipped model and its tasks: sparse probing exactly, core to the last bit."""
    import experiment

    settings = dataclasses.replace(
        experiment.settings_of("run_1", "tinylm"), layers=(2,), probe_train=24, probe_test=12,
        core_prompts=4, core_reconstruction_batches=1, core_sparsity_batches=2, probe_ks=(1, 2, 5),
    )  # fmt: skip
    lm = load_language_model("tinylm")
    model = lm.hooked()
    generator = torch.Generator().manual_seed(0)
    sae = experiment.new_sae(settings, 2, 0, torch.randn(256, generator=generator), 1.0, {}, 16)
    texts = read_probe_texts(settings, lm.tokenizer, torch.device("cpu"))
    progress = Progress("sparse probing", 3, "SAEs")
    ours = experiment.sparse_probing({"sae": sae}, texts, model, settings, tmp_path, progress)
    with tinylm_tasks(settings):
        first, second = stock_probing(settings, sae, model, tmp_path / "artifacts")
    for k in settings.probe_ks:
        metric = f"sae_top_{k}_test_accuracy"
        assert ours["sae"][metric] == second[metric]
    (file,) = (tmp_path / "eval_results" / "sparse_probing").glob("*.json")
    detail = json.loads(file.read_text())["eval_result_details"][0]
    for metric, value in first[f"{detail['dataset_name']}"].items():
        if metric.startswith("llm_"):
            assert detail[metric] == value, metric
    ready = {"sae": prepare_for_sae_bench(sae, settings)}
    scalars = run_core(ready, model, settings, lambda n: None)["sae"][0]
    assert scalars == stock_core(prepare_for_sae_bench(sae, settings), settings, model)[0]
