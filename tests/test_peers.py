"""SAELens' trainers as settings: the same steps as by hand, and a run like any other."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import types
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

import experiment
from harness import peers
from harness.checkpoints import Checkpoints
from harness.errors import ExperimentError
from harness.evaluation.core import prepare_for_sae_bench
from harness.evaluation.export import kind_of, write_as_saelens
from harness.model_card import method
from harness.observation import OBSERVED
from harness.publish import publish
from harness.settings import settings_of_run
from harness.startup import Run
from harness.text import TokenStream, documents, passages
from harness.verdict import PENALISED, SELECTING, compare_records, without_effect
from tests.conftest import cut_off, run_command, settings_of

N_STEPS, SCALE, LAYER = 40, 0.25, 2
SETTINGS = dataclasses.replace(
    experiment.Settings(), layers=(1, LAYER), d_sae=64, k_min=4, batch=64,
    training_tokens=64 * N_STEPS, lr=1e-2, lr_warmup=0.1, dead_feature_window=128,
)  # fmt: skip
PROFILE = dict(experiment.PROFILES["tinylm"])  # as it is; the toy has another
KINDS = pytest.mark.parametrize("kind", peers.PEERS)


def settings_with(kind: str, **changes) -> experiment.Settings:
    """Settings of a peer; of those with a penalty, another coefficient on each layer."""
    changes = {"sparsity_coefficient": (9.0, 0.1)} | changes if kind in PENALISED else changes
    return dataclasses.replace(SETTINGS, trainer=kind, **changes)


@functools.cache
def batches() -> torch.Tensor:
    torch.manual_seed(7)
    return 4 * torch.randn(N_STEPS, 64, 16) + 2


def trained(settings: experiment.Settings, n_steps: int = N_STEPS) -> peers.PeerTrainer:
    x_NBD = batches()
    trainer = peers.PeerTrainer(settings, LAYER, 0, x_NBD[0].mean(0), SCALE)
    for step in range(n_steps):
        trainer.step(x_NBD[step], trainer.at(step, N_STEPS), log=False)
    return trainer


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


# ---- the steps -----------------------------------------------------------------------------------


def by_hand(kind: str):
    """SAELens' own trainer as its documentation drives it, on the same batches."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    options = {
        "standard": dict(l1_coefficient=0.1, l1_warm_up_steps=4),
        "topk": dict(k=4),
        "batchtopk": dict(k=4),
        "jumprelu": dict(l0_coefficient=0.1, l0_warm_up_steps=4),
        "jumprelu_tanh": dict(l0_coefficient=0.1, l0_warm_up_steps=40, **peers.TANH),
        "gated": dict(l1_coefficient=0.1, l1_warm_up_steps=4),
        "matryoshka_batchtopk": dict(k=4, matryoshka_widths=[2, 6, 14, 30, 64]),
    }
    sae_class, config_class = get_sae_training_class(kind.removesuffix("_tanh"))
    torch.manual_seed(0)
    sae = sae_class(config_class(d_in=16, d_sae=64, **options[kind]))
    sae.b_dec.data.copy_(batches()[0].mean(0) * SCALE)
    config = SAETrainerConfig(
        64 * N_STEPS, 64, lr=1e-2, lr_end=0.0, lr_warm_up_steps=4, lr_decay_steps=8,
        dead_feature_window=2,
    )  # fmt: skip
    trainer = SAETrainer(config, sae, data_provider=iter(SCALE * batches()))
    trainer.fit()
    return sae


@KINDS
def test_a_peer_is_saelens_own_trainer_bit_for_bit(kind, capfd) -> None:
    ours = weights_of(trained(settings_with(kind)).sae)
    assert ours.keys() == weights_of(by_hand(kind)).keys()
    assert_equal(ours, weights_of(by_hand(kind)))


def test_a_training_cut_short_ends_its_schedules_with_it() -> None:
    """As `budget_minutes` cuts it: the learning rate is 0 after the last step, and not before."""
    settings = settings_with("gated")
    trainer = trained(settings, n_steps=4)
    rates, coefficients = [], []
    for step in range(4, 20):
        trainer.at(step, 20)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        coefficients.append(trainer.trainer.get_coefficients()["l1"])
        trainer.step(batches()[step], None, log=False)
    falling = [1e-2 * left / 4 for left in (4, 3, 2, 1)]
    assert rates == pytest.approx([1e-2] * 12 + falling)
    assert coefficients == pytest.approx([0.1] * 16)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", SELECTING)
def test_the_density_penalty_is_the_formula_and_does_what_it_is_for(kind) -> None:
    """φ · mean over tokens of Σ p_i f_i beside ‖x − x̂‖² / D, with p of the batches before."""
    trainer = trained(settings_with(kind, density_penalty=0.02), n_steps=30)
    x_BD, rate_F = batches()[30] * SCALE, trainer.sae.firing_rate_F.clone()
    with torch.no_grad():
        f_BF = trainer.sae.encode_with_hidden_pre(x_BD)[0]
    _, record = trainer.step(batches()[30], None, log=True)
    expected = 0.02 * (f_BF * rate_F).sum(-1).mean()
    assert rate_F.max() > 0.01 and float(record["loss_density"]) == pytest.approx(float(expected))
    parts = sum(value for name, value in record.items() if name.startswith("loss_"))
    assert float(record["loss"]) == pytest.approx(float(parts))
    fired_F = (f_BF > 0).float().mean(0)
    torch.testing.assert_close(trainer.sae.firing_rate_F, rate_F.lerp(fired_F, 0.02))
    # Of features that fire on most tokens, a strong one leaves fewer.
    plain, strong = (trained(settings_with(kind, density_penalty=phi)) for phi in (0.0, 0.3))
    rates = [
        (t.sae.encode_with_hidden_pre(batches().flatten(0, 1) * SCALE)[0] > 0).float().mean(0)
        for t in (plain, strong)
    ]
    assert rates[1].pow(2).sum() < rates[0].pow(2).sum()


# ---- what is stored ------------------------------------------------------------------------------


@KINDS
def test_an_exported_peer_is_the_trained_one_in_raw_units(kind, tmp_path) -> None:
    """SAELens reads back what is scored: the same weights, features and reconstructions."""
    trainer, settings = trained(settings_with(kind)), settings_with(kind)
    before, raw_BD = weights_of(trainer.sae), batches()[-1]
    ours = trainer.sae.fold_activation_norm_scaling()
    assert_equal(before, weights_of(trainer.sae))
    copy.deepcopy(trainer.sae).save_inference_model(tmp_path / "scaled")
    theirs = SAE.load_from_disk(tmp_path / "scaled")  # in the units of training
    f_BF, x_BD = ours.encode(raw_BD), ours(raw_BD)
    torch.testing.assert_close(x_BD * SCALE, theirs(raw_BD * SCALE), atol=1e-4, rtol=1e-4)
    expected_BF = theirs.encode(raw_BD * SCALE) * theirs.W_dec.norm(dim=1)
    torch.testing.assert_close(f_BF * SCALE, expected_BF, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(64))
    assert (f_BF > 0).any()

    write_as_saelens(ours, settings, tmp_path / "raw", *kind_of(ours))
    read = SAE.load_from_disk(tmp_path / "raw")
    form = kind.replace("_tanh", "").replace("matryoshka_", "").replace("batchtopk", "jumprelu")
    assert read.cfg.architecture() == form
    assert torch.equal(read.encode(raw_BD), f_BF) and torch.equal(read(raw_BD), x_BD)
    metadata = read.cfg.metadata
    assert metadata.hook_name == f"blocks.{LAYER}.hook_resid_post"
    assert metadata.training_architecture == kind.removesuffix("_tanh")


@KINDS
def test_a_peer_is_scored_in_the_precision_of_the_language_model(kind) -> None:
    settings = dataclasses.replace(settings_with(kind), lm_dtype="bfloat16")
    sae = trained(settings, n_steps=5).sae.fold_activation_norm_scaling()
    ready = prepare_for_sae_bench(sae, settings)
    x_BD = batches()[-1].bfloat16()
    assert ready(x_BD).dtype == ready.encode(x_BD).dtype == torch.bfloat16
    assert sae(batches()[-1]).dtype == torch.float32  # the copy alone


# ---- a training that was interrupted -------------------------------------------------------------


@KINDS
def test_a_training_that_goes_on_ends_in_the_same_weights(
    kind, toy, toy_lm, tmp_path, monkeypatch, own_cache
) -> None:
    """Interrupted after each filling of the buffer, and begun again in new objects."""
    settings = dataclasses.replace(
        settings_of(toy, "run_1"), training_tokens=1536, buffer_tokens=512, trainer=kind
    )

    def once(fillings: int | None = None):
        run = Run(settings, toy_lm, out_dir=tmp_path)
        texts = functools.partial(iter, passages("".join(documents("toy", "train")())))
        with TokenStream(texts, toy_lm.tokenizer, settings.context) as stream:
            buffer = toy.ActivationBuffer(run, stream)
            cut_off(buffer, fillings)
            return toy.train(run, buffer)

    whole = once()
    for fillings in (1, 1, None):
        saving = Checkpoints({"a": kind}, every=0.0, share=1e9, given=None)
        monkeypatch.setattr(Run, "checkpoints", lambda *_, s=saving, **__: s)
        try:
            pieces = once(fillings)
        except KeyboardInterrupt:
            continue
    for key, sae in whole.saes.items():
        assert_equal(weights_of(sae), weights_of(pieces.saes[key]))
    times = ("tokens_per_second",)
    logs = [[{k: v for k, v in record.items() if k not in times} for record in t.log.records]
            for t in (whole, pieces)]  # fmt: skip
    assert logs[0] == logs[1]


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer_run(toy, toy_run: Path) -> Path:
    """The folder of a complete run of BatchTopK, beside run_1 of this project's trainer."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        plan = dict(description="BatchTopK", trainer="batchtopk", seeds=(0,), lr=3e-3)
        monkeypatch.setitem(toy.PLAN, "run_11", plan)
        assert run_command(toy, toy_run.parent / "run_11") == 0
        yield toy_run.parent / "run_11"


def test_a_peer_is_a_run_like_any_other(toy, peer_run, capfd) -> None:
    """One line in PLAN; again it takes all from the store, and the verdict names both trainers."""
    info = json.loads((peer_run / "final_info.json").read_text())
    means = info["layer_0"]["means"]
    assert {"loss_reconstruction", "loss_auxiliary", "dead_fraction", "l0", "fvu"} <= means.keys()
    assert not {"tau_sel", "w", "loss_penalty"} & means.keys()
    assert info["verdict"]["means"]["n_paired_seeds"] == 1
    records = [json.loads(line) for line in (peer_run / "train_log.jsonl").read_text().splitlines()]
    assert {"fvu", "l0", "dead_fraction", "threshold", "lr"} <= records[-1].keys()
    for seed in peer_run.glob("sae/*/*"):
        assert SAE.load_from_disk(seed).cfg.architecture() == "jumprelu"
    capfd.readouterr()
    assert run_command(toy, peer_run) == 0
    said = capfd.readouterr().out
    for stage in ("rehearsal", "training", "core evaluation", "sparse probing"):
        assert f"{stage}: kept, " in said, said
    assert "layer_0_fvu: " in said and "tau_sel" not in said
    last = said.splitlines()[-1]
    assert "differing in trainer batchtopk against contrastive" in last, last
    assert not [name for name in without_effect("batchtopk") if f"{name} " in last]
    again = json.loads((peer_run / "final_info.json").read_text())
    assert again["layer_2"]["means"]["fvu"] == info["layer_2"]["means"]["fvu"]
    # Another peer, or another value of what it reads, is trained anew.
    read = {"trainer", "k_min", "density_penalty", "lr", "lr_warmup", "dead_feature_window"}
    assert read <= OBSERVED.settings["training"]


def test_a_peer_is_drawn_beside_a_run_of_this_project(peer_run) -> None:
    import plot

    report = plot.load_reports(peer_run.parent)["tinylm"]
    (run,) = [run for run in report.runs if run.name == "run_11"]
    (row,) = [row for row in plot.tables("tinylm", report, "run_1").splitlines()
              if row.startswith("| run_11 | BatchTopK |")]  # fmt: skip
    assert "not comparable" in row and "nan" not in row
    assert plot.curve(run, 0, "tau_sel") is None and math.isnan(report.value(run, "tau_sel"))
    assert plot.curve(run, 0, "fvu") is not None


def test_a_peer_is_published_under_its_own_name(peer_run, tmp_path) -> None:
    """The card tells of its method, and not of this project's loss."""
    folder = publish(peer_run, "alice/run_11", "alice/toy-gemma-2", tmp_path)
    card = (folder / "README.md").read_text()
    assert "Trained by SAELens' own trainer: BatchTopK, k = 4. Stored in" in card
    assert "that are not in S" not in card and "`tau_sel`" not in card
    read = SAE.load_from_disk(folder / "layer_2" / "seed_0")
    assert read.cfg.metadata.model_name == "alice/toy-gemma-2"
    config = json.loads((peer_run / "config.json").read_text())
    config["settings"] |= {"trainer": "gated", "sparsity_coefficient": [1.5, 2.0]}
    published = types.SimpleNamespace(settings=config["settings"], architecture="gated")
    assert "a gated SAE, sparsity coefficients by layer: 1.5 and 2.0." in method(published)


# ---- settings ------------------------------------------------------------------------------------


def plan_of(**given) -> experiment.Settings:
    return settings_of_run("run_11", experiment.Settings, PROFILE, {"run_11": given})


def test_a_peer_has_what_was_found_best_for_it_unless_the_plan_says_otherwise() -> None:
    assert plan_of().lr == experiment.Settings.lr
    found = plan_of(trainer="gated")
    assert (found.lr, found.lr_warmup, found.dead_feature_window) == (4.5e-3, 0.05, 100_000)
    assert len(found.sparsity_coefficient) == len(found.layers)
    mine = plan_of(trainer="gated", lr=1e-4, sparsity_coefficient=2.0)
    assert (mine.lr, mine.sparsity_coefficient) == (1e-4, 2.0)
    assert peers.options_of(mine, 2) == {"l1_coefficient": 2.0}
    at_4, at_1, _ = plan_of(trainer="gated", layers=(4, 1, 2)).sparsity_coefficient
    assert plan_of(trainer="gated", layers=(1, 4)).sparsity_coefficient == (at_1, at_4)
    assert at_1 < at_4 and plan_of(trainer="gated", layers=(3,)).sparsity_coefficient is None
    assert plan_of(trainer="topk").k_min == experiment.Settings.k_min
    assert {*peers.TUNED} == {*peers.PEERS} == {*SELECTING, *PENALISED}
    assert {name for name, peer in peers.PEERS.items() if peer.penalty} == {*PENALISED}


@pytest.mark.parametrize("given, said", [
    (dict(trainer="batchtopk", tau_sel=0.3), "tau_sel must be left out, as nothing reads it with "
     "trainer='batchtopk'"),
    (dict(trainer="topk", curriculum=False, theta_lr=0.1), "curriculum and theta_lr must be left "
     "out, as nothing reads them"),
    (dict(trainer="gated", k_min=8), "k_min must be left out, as nothing reads it with "
     "trainer='gated', whose L0 follows from sparsity_coefficient"),
    (dict(trainer="gated", density_penalty=0.01), "density_penalty must be left out"),
    (dict(trainer="topk", sparsity_coefficient=1.0), "sparsity_coefficient must be left out"),
    (dict(sparsity_coefficient=1.0), "sparsity_coefficient must be left out, as nothing reads it "
     "with trainer='contrastive'"),
    (dict(trainer="gated", layers=(2,), sparsity_coefficient=(1.0, 2.0)), "sparsity_coefficient "
     "must be one number, or one for each of the layers"),
    (dict(trainer="gated", sparsity_coefficient=-1.0), "sparsity_coefficient must be None or "),
    (dict(trainer="batchtopK"), "trainer must be 'contrastive', 'standard', 'topk'"),
])  # fmt: skip
def test_what_a_trainer_does_not_read_is_refused(given, said) -> None:
    with pytest.raises(ExperimentError, match="run_11: ") as caught:
        plan_of(**given)
    assert said in str(caught.value), caught.value


@pytest.mark.parametrize("name", ["layers", "trainers"])
def test_a_run_called_as_a_setting_is_has_the_profiles_own(name: str) -> None:
    profile = PROFILE | {"layers": (1,)}
    assert settings_of_run(name, experiment.Settings, profile, {}).layers == (1,)


def test_the_density_penalty_goes_with_every_selection() -> None:
    for kind in SELECTING:
        assert plan_of(trainer=kind, density_penalty=0.01).density_penalty == 0.01


def test_a_trainer_of_an_edit_is_held_to_nothing() -> None:
    assert without_effect("mine") == set()


def test_records_of_before_are_of_this_projects_trainer() -> None:
    """And what one of two trainers doesn't have is not named as a difference."""
    config = {"profile": "tinylm", "settings": {"lr": 1e-3, "tau_sel": 0.3, "k_min": 16}}
    own = {"profile": "tinylm", "settings": {"lr": 1e-3, "tau_sel": None, "k_min": 8,
                                             "trainer": "contrastive"}}  # fmt: skip
    peer = {"profile": "tinylm", "settings": own["settings"] | {"trainer": "topk"}}
    assert compare_records(own, config).varied == {
        "tau_sel": "none against 0.3", "k_min": "8 against 16",
    }  # fmt: skip
    assert compare_records(peer, config).varied == {
        "trainer": "topk against contrastive", "k_min": "8 against 16",
    }  # fmt: skip
    assert not compare_records(peer, config).unlike
