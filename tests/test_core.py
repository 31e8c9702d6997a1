"""SAE-Bench's core evaluation against stock SAE-Bench, and SAEs in SAELens' form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import datasets
import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file

from bench.common import run_on, settings_of
from harness.errors import ExperimentError
from harness.evaluation import core as evaluation_core
from harness.evaluation.core import (
    core_config,
    core_evaluation,
    core_store,
    prepare_for_sae_bench,
    shared_core_evals,
)
from harness.evaluation.export import export_saes, export_to_saelens
from harness.evaluation.shared_forward import CountingSAE, ModelView, SharedForward, StoreView
from harness.language_model import load_language_model
from harness.ledger import LEDGER
from harness.records import odd_results
from harness.store import store_dir
from tests.conftest import SOURCES, Calls, replace

STATS = torch.zeros(32), 1.0  # of activations: their mean, and the factor to unit norm


def stored_sae(out_dir: Path, layer: int):
    """What SAELens reads of a run's SAE."""
    return SAE.load_from_disk(out_dir / "sae" / f"layer_{layer}" / "seed_0")


def test_a_run_s_core_figures_are_stock_sae_bench_s_on_the_stored_sae(toy, toy_run: Path) -> None:
    """SAELens reads the SAE back; SAE-Bench, called directly, finds what the run reported."""
    from sae_bench.evals.core import main as core
    from sae_bench.sae_bench_utils import general_utils
    from sae_lens.training.activations_store import ActivationsStore

    settings = settings_of("run_1", "tinylm")
    model = load_language_model(settings.model).bridge()
    info = json.loads((toy_run / "final_info.json").read_text())
    for layer in settings.layers:
        sae = stored_sae(toy_run, layer)
        assert sae.cfg.architecture() == "topk" and sae.cfg.k == settings.k_min
        metadata = sae.cfg.metadata
        assert metadata.model_name == settings.model
        assert metadata.hook_name == f"blocks.{layer}.hook_resid_post"
        assert (metadata.context_size, metadata.prepend_bos) == (settings.context, True)
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(settings.d_sae), atol=1e-5)
        means = info[f"layer_{layer}"]["means"]
        sae = general_utils.load_and_format_sae("", sae, "cpu")[1]
        store = ActivationsStore.from_sae(
            model, sae, evaluation_core.core_text(settings), context_size=settings.context
        )
        store.shuffle_input_dataset(seed=42)
        scalars, _ = core.run_evals(
            sae, store, model, core_config(settings), ignore_tokens={0, 1, 2}
        )
        for group in scalars.values():
            for metric, value in group.items():
                assert means[metric] == pytest.approx(value, rel=1e-4, abs=1e-6), metric


def test_core_s_files_have_sae_bench_s_own_form(toy, toy_run: Path) -> None:
    from pydantic import TypeAdapter
    from sae_bench.evals.core.eval_output import CoreEvalOutput

    settings = settings_of("run_1", "tinylm")
    files = sorted((toy_run / "eval_results" / "core").glob("*.json"))
    assert len(files) == 2 * len(settings.layers)  # each layer, and its untrained baseline
    for file in files:
        output = TypeAdapter(CoreEvalOutput).validate_json(file.read_text())
        assert output.sae_cfg_dict["d_sae"] == settings.d_sae


def test_the_untrained_sae_has_equal_l0_and_was_never_trained(toy, toy_run: Path) -> None:
    info = json.loads((toy_run / "final_info.json").read_text())
    for layer in settings_of("run_1", "tinylm").layers:
        means = info[f"layer_{layer}"]["means"]
        assert means["untrained_l0"] == pytest.approx(means["l0"], rel=0.05)
        assert means["untrained_fvu"] > means["fvu"]


def two_saes(toy, settings) -> dict:
    """SAEs of layers 0 and 2, prepared for SAE-Bench."""
    generator = torch.Generator().manual_seed(3)
    saes = {}
    for layer in (0, 2):
        mean = torch.randn(32, generator=generator)
        sae = toy.new_sae(settings, layer, layer, (mean, 1.0), {}, 4)
        saes[f"layer_{layer}"] = prepare_for_sae_bench(sae, settings)
    return saes


def stock_core(sae, settings, model) -> tuple[dict, dict]:
    from sae_bench.evals.core import main as core

    store = core_store(settings, model, sae)
    scalars, features = core.run_evals(
        sae, store, model, core_config(settings), ignore_tokens={0, 1, 2}
    )
    return scalars | {"misc_metrics": core.calculate_misc_metrics(features)}, features


def test_core_side_by_side_is_stock_core_one_by_one(toy, toy_lm) -> None:
    """Shared passes change no figure, not even in the last bit, and each batch is read once."""
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), layers=(0, 2))
    model = toy_lm.bridge()
    saes = two_saes(toy, settings)
    seen = []
    together = shared_core_evals(saes, model, settings, toy.core_metrics, seen.append)
    assert len(seen) == settings.core_reconstruction_batches + settings.core_sparsity_batches
    for name, sae in saes.items():
        scalars, features = stock_core(sae, settings, model)
        assert together[name][0] == scalars
        # As text, since a feature that never fires has a NaN, which equals nothing.
        assert json.dumps(together[name][1]) == json.dumps(features)


def test_what_an_edit_asks_beside_is_answered_by_sae_and_model(toy, toy_lm) -> None:
    """No pass over the shared batch stands for one over other tokens, layers or options."""
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), layers=(0, 2))
    model = toy_lm.bridge()
    sae = two_saes(toy, settings)["layer_2"]
    hooks = {f"blocks.{layer}.hook_resid_post": layer for layer in (0, 2)}
    shared = SharedForward(model, core_store(settings, model, sae), hooks, lambda n: None)
    counting = CountingSAE(sae, shared)
    view = ModelView(shared, counting)
    tokens_BL = shared.batch(1, 4)
    hook, stock = sae.cfg.hook_name, dict(return_type="both", loss_per_token=True)
    double = [(hook, lambda acts, hook: 2 * acts)]
    with torch.no_grad():
        x_BLD = model.run_with_cache(tokens_BL)[1][hook]
        assert torch.equal(counting(x_BLD), sae(x_BLD)) and counting.squared_error == 0.0
        for asked in (
            lambda m: m(tokens_BL[:2], **stock)[0],
            lambda m: m(tokens_BL, return_type="logits"),
            lambda m: m.run_with_hooks(tokens_BL[:2], fwd_hooks=double, **stock)[0],
            lambda m: m.run_with_hooks(tokens_BL, fwd_hooks=2 * double, **stock)[0],
            lambda m: m.run_with_hooks(tokens_BL, fwd_hooks=double, **stock)[1],
            lambda m: m.run_with_cache(tokens_BL[:2], names_filter=[hook])[1][hook],
            lambda m: m.run_with_cache(tokens_BL, names_filter=["hook_embed"])[1]["hook_embed"],
        ):
            assert torch.equal(asked(view), asked(model))
    assert view.tokenizer is model.tokenizer
    assert counting.target_BLD is None


def probing_texts(toy_lm) -> dict:
    """A data set of one class, of 8 texts."""
    ids = toy_lm.tokenizer(SOURCES[0], add_special_tokens=False)["input_ids"]
    tokens_NL = torch.nn.functional.pad(torch.tensor(ids[: 8 * 31]).view(8, 31), (1, 0), value=2)
    return {"toy": 2 * [{"argparse": {"input_ids": tokens_NL}}]}


class ScaledCodes:
    """An edit by which features alone are others: twice as large, and halved by decode."""

    def __init__(self, sae):
        encode, decode = sae.encode, sae.decode
        sae.encode = lambda x: 2 * encode(x)
        sae.decode = lambda f: decode(f / 2)


@pytest.mark.parametrize(
    "edit",
    [
        lambda sae: setattr(sae, "activation_fn", torch.nn.functional.silu),
        lambda sae: setattr(sae, "encode", lambda x, was=sae.encode: was(x).clamp(max=0.5)),
        lambda sae: setattr(sae, "decode", lambda f, was=sae.decode: was(f) + 1),
        lambda sae: setattr(sae, "k", 5),
        ScaledCodes,
    ],
)
def test_an_sae_that_saelens_would_read_as_another_is_not_written_as_one(
    toy, toy_lm, tmp_path, capsys, monkeypatch, edit
) -> None:
    """Its weights and a note are, and it is said, once."""
    monkeypatch.setattr(LEDGER, "warnings", [])
    settings = settings_of("run_1", "tinylm")
    run = run_on(toy_lm, settings, probe_texts=probing_texts(toy_lm))
    sae = toy.new_sae(settings, 2, 0, STATS, {}, 4)
    edit(sae)
    for seed in "01":
        export_to_saelens(run, sae, tmp_path / seed, "topk", k=4, theta={"scale": 1.0})
    (warning,) = LEDGER.warnings
    assert "SAELens' topk SAE with these weights gives other features" in warning
    assert capsys.readouterr().out == f"warning: {warning}\n"
    files = {file.name for file in (tmp_path / "0").iterdir()}
    assert files == {"README.txt", "theta.json", "weights.safetensors"}
    assert "not written as an SAE of SAELens" in (tmp_path / "0" / "README.txt").read_text()
    written = load_file(tmp_path / "0" / "weights.safetensors")
    assert all(torch.equal(written[name], t) for name, t in sae.state_dict().items())
    with pytest.raises(FileNotFoundError):
        SAE.load_from_disk(tmp_path / "0")


def test_what_warns_comes_into_warnings_json(toy, toy_run: Path) -> None:
    """Here: training and core evaluation on the same text; FVU above 1."""
    said = json.loads((toy_run / "warnings.json").read_text())
    assert any("core_text, 'toy', is text that the SAEs are trained on" in s for s in said)
    layer = {"l0": [4.0], "frac_alive": [1.0], "fvu": [1.2], "sae_top_5_test_accuracy": [0.9],
             "untrained_top_5_test_accuracy": [0.8], "ce_loss_with_ablation": [8.0],
             "ce_loss_without_sae": [3.0]}  # fmt: skip
    assert odd_results({"layer_0": layer}, 64) == [
        "layer_0: FVU is 1.20: the mean reconstructs better"
    ]


def test_a_core_text_that_is_used_again_is_said(
    toy, toy_lm, own_cache, tmp_path, monkeypatch
) -> None:
    """Also where the figures come from the store."""
    text = datasets.Dataset.from_dict({"text": [SOURCES[0][:200]]})
    replace(monkeypatch, "core_text", lambda settings: text)
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), layers=(2,))
    run = run_on(
        toy_lm, settings, sae_bench_model=toy_lm.bridge(), out_dir=tmp_path, keeps=True
    )
    sae = toy.new_sae(settings, 2, 0, (torch.ones(32), 1.0), {}, 4)
    for _ in range(2):
        monkeypatch.setattr(LEDGER, "warnings", [])
        core_evaluation(run, {"sae": sae}, toy.core_metrics)
        assert len(LEDGER.warnings) == 1
        assert "'toy', is short: of 24 contexts that were drawn 5 differ" in LEDGER.warnings[0]


def test_a_core_text_without_a_whole_context_is_one_sentence(toy, toy_lm, monkeypatch) -> None:
    text = datasets.Dataset.from_dict({"text": ["one two"]})
    replace(monkeypatch, "core_text", lambda settings: text)
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), layers=(0, 2))
    with pytest.raises(ExperimentError, match="must hold one context of 32 tokens, but is shorter"):
        shared_core_evals(two_saes(toy, settings), toy_lm.bridge(), settings, toy.core_metrics)


def test_an_error_in_one_core_evaluation_ends_all(toy, toy_lm) -> None:
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), layers=(0, 2))
    saes = two_saes(toy, settings)

    def broken(features):
        raise RuntimeError("broken decoder")

    saes["layer_2"].decode = broken
    with pytest.raises(RuntimeError, match="broken decoder"):
        shared_core_evals(saes, toy_lm.bridge(), settings, toy.core_metrics)
    assert torch.is_grad_enabled()


def test_own_figures_are_the_formula(toy, toy_lm) -> None:
    """A constant scores 1, and an SAE what the formula says of the tokens that stock core sees."""
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), layers=(2,))
    model = toy_lm.bridge()
    sae = two_saes(toy, settings)["layer_2"]
    seen = []
    encode = sae.encode
    sae.encode = lambda x: (seen.append(x), encode(x))[1]
    store = core_store(settings, model, sae)
    tokens = []
    take = store.get_batch_tokens
    store.get_batch_tokens = lambda n: (tokens.append(take(n)), tokens[-1])[1]
    toy.core_metrics(sae, store, model, core_config(settings), {0, 1, 2})
    n = settings.core_sparsity_batches  # its passes come last
    x = torch.cat([acts[ids > 2] for acts, ids in zip(seen[-n:], tokens[-n:])]).double()
    sae.encode = encode
    error = (x - sae(x.float()).detach().double()).pow(2).sum()
    expected = float(error / (x - x.mean(0)).pow(2).sum())
    constant = toy.CustomSAE(32, settings.d_sae, settings.model, 2, k=1)
    constant.b_dec.data = x.mean(0).float()
    both = {"sae": sae, "constant": prepare_for_sae_bench(constant, settings)}
    results = shared_core_evals(both, model, settings, toy.core_metrics)
    assert results["sae"][2]["fvu"] == pytest.approx(expected, rel=1e-6)
    assert results["constant"][2]["fvu"] == pytest.approx(1.0, rel=1e-5)
    assert results["sae"][2]["mse_per_token"] == pytest.approx(float(error) / len(x), rel=1e-6)


def test_a_batch_of_another_size_changes_no_figure_of_our_own(toy, toy_lm) -> None:
    """SAE-Bench's mse is halved where the batch is doubled; as where memory is small."""
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), layers=(2,))
    sae = {"sae": two_saes(toy, settings)["layer_2"]}
    twice = dataclasses.replace(settings, core_prompts=8, core_reconstruction_batches=1,
                                core_sparsity_batches=2)  # fmt: skip
    model = toy_lm.bridge()
    one, other = (
        shared_core_evals(sae, model, s, toy.core_metrics)["sae"] for s in (settings, twice)
    )
    mse, mse_of_other = (found[0]["reconstruction_quality"]["mse"] for found in (one, other))
    assert mse == pytest.approx(2 * mse_of_other, rel=0.02)
    assert one[2] == pytest.approx(other[2], rel=1e-5)


def test_a_layer_that_the_loss_does_not_need_is_named(toy, toy_model: Path) -> None:
    """SAE-Bench divides by the loss with zeros in the layer's place less the loss as it is."""
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), layers=(0, 2))
    lm = load_language_model(str(toy_model))
    lm.hf.lm_head.weight = torch.nn.Parameter(torch.zeros_like(lm.hf.lm_head.weight))
    model = lm.bridge()
    with pytest.raises(ExperimentError, match="core evaluation of layer_0: a score divides by"):
        shared_core_evals(two_saes(toy, settings), model, settings, toy.core_metrics)


@pytest.mark.parametrize(
    "changes, form",
    [({}, "topk"), ({"curriculum": False}, "standard"), ({"activation": "relu"}, "standard"),
     ({"activation": "jumprelu"}, "jumprelu")],
)
def test_exported_sae_gives_the_same_output(toy, toy_lm, tmp_path: Path, changes, form) -> None:
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), layers=(2,), **changes)
    mean = torch.randn(32, generator=torch.Generator().manual_seed(1))
    run = run_on(toy_lm, settings, out_dir=tmp_path, probe_texts=probing_texts(toy_lm))
    trainers = toy.new_trainers(run, {2: (mean, 0.7)}, {(2, 0): {"gamma": 0.1}})
    sae = trainers[2, 0].sae
    if form == "jumprelu":
        sae.threshold.fill_(0.9)
    export_saes(run, {(2, 0): sae})
    stored = stored_sae(tmp_path, 2)
    assert stored.cfg.architecture() == form
    # As SAEDashboard asks of a topk SAE.
    assert form != "topk" or stored.cfg.rescale_acts_by_decoder_norm
    x = 3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(stored.encode(x), sae.fold_activation_norm_scaling().encode(x), atol=1e-6)
    assert torch.allclose(stored(x), sae.fold_activation_norm_scaling()(x), atol=1e-5)
    assert torch.allclose(stored(x), sae(0.7 * x) / 0.7, atol=1e-5)
    theta = json.loads((tmp_path / "sae" / "layer_2" / "seed_0" / "theta.json").read_text())
    assert theta["theta_3"] is None and theta["gamma"] == pytest.approx(0.1)
    assert theta["scale"] == 0.7
    assert theta["theta_1"] == 0.0 and theta["tau_sel"] == pytest.approx(0.3)


def test_evaluation_leaves_the_sae_as_it_was(toy) -> None:
    """SAE-Bench casts and marks the SAE it is given: it gets a copy."""
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), lm_dtype="bfloat16")
    sae = toy.new_sae(settings, 2, 0, STATS, {}, 4)
    ready = prepare_for_sae_bench(sae, settings)
    assert ready.W_enc.dtype == torch.bfloat16 and ready.dtype == torch.bfloat16
    assert ready.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
    assert sae.W_enc.dtype == torch.float32 and not hasattr(sae.cfg, "metadata")


def test_a_nan_in_core_stops_the_run_and_is_not_recorded_as_minus_one(
    toy, toy_lm, tmp_path: Path
) -> None:
    settings = settings_of("run_1", "tinylm")
    sae = toy.new_sae(settings, 2, 0, STATS, {}, 4)
    sae.b_dec.data[0] = float("nan")
    run = run_on(toy_lm, settings, sae_bench_model=toy_lm.bridge(), out_dir=tmp_path)
    with pytest.raises(ExperimentError, match="core evaluation of broken: .* is nan"):
        core_evaluation(run, {"broken": sae}, toy.core_metrics)
    assert not list(tmp_path.rglob("*.json"))


def test_core_does_not_replace_bos(toy, toy_lm) -> None:
    """An SAE that reconstructs nothing but BOS badly costs no cross-entropy."""
    settings = settings_of("run_1", "tinylm")
    from sae_bench.evals.core import main as core

    sae = prepare_for_sae_bench(toy.new_sae(settings, 2, 0, STATS, {}, 4), settings)
    bos = toy_lm.activations(torch.tensor([[2, 9]]), (2,))[0][0, 0]
    sae.encode = lambda x: x
    sae.decode = lambda x: torch.where((x - bos).abs().amax(-1, keepdim=True) < 1e-3, 100.0, x)
    metrics = core.get_recons_loss(
        sae, toy_lm.bridge(), torch.tensor([[2, 9, 40, 70]]), None, True, True,
        ignore_tokens={0, 1, 2}, exclude_special_tokens_from_reconstruction=True,
    )  # fmt: skip
    assert torch.equal(metrics["ce_loss_with_sae"], metrics["ce_loss_without_sae"])
    assert core_config(settings).exclude_special_tokens_from_reconstruction


def test_the_language_model_s_passes_are_made_once(toy, toy_lm, tmp_path, monkeypatch) -> None:
    """Another SAE's evaluation reads them; a damaged one is made again; a rehearsal keeps none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), layers=(2,))
    model, numbers = toy_lm.bridge(), iter(range(100))
    sae = toy.new_sae(settings, 2, 0, STATS, {}, 4)
    calls = Calls()
    for kind in ("activations", "logits"):
        stock = getattr(model.plain, kind)
        monkeypatch.setattr(
            model.plain, kind, lambda *a, stock=stock: (calls.append(1), stock(*a))[1]
        )

    run = run_on(toy_lm, settings, sae_bench_model=model, out_dir=tmp_path)

    def score(keep: bool = True) -> dict:
        calls.clear()
        sae.another = next(numbers)
        return core_evaluation(
            dataclasses.replace(run, keeps=keep), {"sae": sae}, toy.core_metrics
        )

    anew = score(keep=False)
    n_passes = len(calls)
    assert n_passes == settings.core_reconstruction_batches + settings.core_sparsity_batches
    assert not store_dir().joinpath("core_passes").exists()
    assert score() == anew and len(calls) == n_passes
    assert score() == anew and len(calls) == 0
    file = min(store_dir().glob("core_passes/*/*residuals*"))
    *rest, last = file.read_bytes()
    file.write_bytes(bytes([*rest, last ^ 1]))
    assert score() == anew and len(calls) == 1
    replace(monkeypatch, "ACTIVATIONS_GB", 1e-6)
    assert score() == anew and len(calls) == n_passes


def test_passes_are_kept_by_the_tokens_they_are_over(toy, toy_lm, tmp_path, monkeypatch) -> None:
    """An evaluation edited to draw other batches finds no pass of the batches drawn before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), layers=(2,))
    model = toy_lm.bridge()
    run = run_on(toy_lm, settings, sae_bench_model=model, keeps=True)
    saes = {"sae": two_saes(toy, settings)["layer_2"]}

    def mse(core_prompts: int, keep: bool) -> float:
        def metrics(sae, store, model, config, ignored):
            edited = dataclasses.replace(config, batch_size_prompts=core_prompts)
            return toy.core_metrics(sae, store, model, edited, ignored)

        results = shared_core_evals(saes, model, settings, metrics, run=run if keep else None)
        return results["sae"][0]["reconstruction_quality"]["mse"]

    first = mse(4, keep=True)
    assert mse(2, keep=True) == mse(2, keep=False) != first


def test_a_store_s_view_has_what_run_evals_reads(toy, toy_lm) -> None:
    """The number of tokens that SAE-Bench reports comes from the context's length."""
    settings = dataclasses.replace(settings_of("run_1", "tinylm"), layers=(2,))
    model = toy_lm.bridge()
    store = core_store(settings, model, two_saes(toy, settings)["layer_2"])
    view = StoreView(SharedForward(model, store, {}, lambda n: None))
    assert view.context_size == settings.context


def test_tinylm_s_core_figures_are_stock_sae_bench_s(tmp_path: Path) -> None:
    """On the shipped model and its held-out text, to the last bit."""
    import experiment

    settings = dataclasses.replace(
        settings_of("run_1", "tinylm"), layers=(2,), core_prompts=4,
        core_reconstruction_batches=1, core_sparsity_batches=2,
    )  # fmt: skip
    model = load_language_model("tinylm").bridge()
    generator = torch.Generator().manual_seed(0)
    stats = torch.randn(256, generator=generator), 1.0
    sae = experiment.new_sae(settings, 2, 0, stats, {}, 16)
    ready = {"sae": prepare_for_sae_bench(sae, settings)}
    scalars = shared_core_evals(ready, model, settings, experiment.core_metrics)["sae"][0]
    assert scalars == stock_core(prepare_for_sae_bench(sae, settings), settings, model)[0]
