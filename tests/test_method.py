"""The method: every formula against an independent calculation."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import experiment
import sparse_ops
from experiment import (
    LEARNED_SCALARS,
    CustomSAE,
    Settings,
    Trainer,
    contrastive_loss,
    k_at,
)
from harness.steps import numbers
from sparse_ops import Codes
from tests.conftest import weights_of


def make_sae(
    d_in=3, d_sae=5, k=2, fixed=None, dtype=torch.float64, scale=1.0, seed=0, threshold=None
):
    sae = CustomSAE(
        d_in, d_sae, "toy", 0, dtype=dtype, k=k, fixed=fixed, norm_scaling_factor=scale,
        by_threshold=threshold is not None,
    )  # fmt: skip
    if threshold is not None:
        sae.threshold.fill_(threshold)
    sae.initialize(seed, torch.linspace(-0.1, 0.1, d_in, dtype=dtype))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn(sae.W_enc.shape, generator=generator))
        sae.b_enc.copy_(0.3 * torch.rand(d_sae, generator=generator))
        for theta in sae.thetas():
            theta.copy_(torch.randn((), generator=generator))
    return sae


def inputs(n=7, d_in=3, seed=5) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


RAW = experiment.ActivationStats(torch.zeros(8), 1.0)  # as they are


def sigmoid(theta: float) -> float:
    return 1 / (1 + math.exp(-theta))


def by_hand(sae: CustomSAE, x: torch.Tensor, k: int | None, lam: float, form: str) -> dict:
    """The formulas, token by token, in plain Python and numpy (docs/method.md, The loss)."""
    W_enc, W_dec, b_enc, b_dec = (p.detach().numpy() for p in weights_of(sae))
    theta = {
        name: None if name in sae.fixed else getattr(sae, t).item()
        for name, (t, _, _) in LEARNED_SCALARS.items()
    }
    value = dict(sae.fixed)
    if theta["tau_sel"] is not None:
        value["tau_sel"] = 0.1 + 0.4 * sigmoid(theta["tau_sel"])
    if theta["tau_pen"] is not None:
        value["tau_pen"] = 0.05 + 0.2 * sigmoid(theta["tau_pen"])
    if theta["gamma"] is not None:
        value["gamma"] = 0.3 * sigmoid(theta["gamma"])
    squares, norms, penalties, everywhere = [], [], [], []
    for row in x.numpy():
        f = np.maximum((row - b_dec) @ W_enc + b_enc, 0)
        ranked = list(np.argsort(-f))
        kept = ranked if k is None or form == "as_written" else ranked[:k]
        spared = ranked[:1] if k is None else ranked[:k]
        x_hat = b_dec + sum(f[i] * W_dec[i] for i in kept)
        squares.append(((row - x_hat) ** 2).sum() / len(row))
        norms.append(math.sqrt(((row - x_hat) ** 2).sum()))
        saturated = np.tanh(f / value["tau_sel"])
        penalties.append(sum(saturated[i] for i in range(len(f)) if i not in spared))
        everywhere.append(saturated.mean())
    reg = lam * sum(t * t for t in theta.values() if t is not None)
    if form == "as_written":
        reconstruction = np.mean(norms)
        penalty = value["gamma"] * value["tau_pen"] * np.mean(everywhere)
    else:
        reconstruction = np.mean(squares)
        penalty = value["gamma"] * value["tau_pen"] * np.mean(penalties)
    return {
        "total": reconstruction + penalty + reg,
        "reconstruction": reconstruction,
        "penalty": penalty,
        "reg": reg,
    }


@pytest.mark.parametrize("fixed", [{}, {"tau_sel": 0.3, "tau_pen": 0.1}, {"gamma": 0.15}])
@pytest.mark.parametrize(
    "k, form", [(2, "contrastive"), (5, "contrastive"), (None, "contrastive"), (None, "as_written")]
)
def test_loss_is_the_formula(k, form, fixed) -> None:
    sae, x = make_sae(fixed=fixed), inputs()
    loss = contrastive_loss(sae, x, k, 0.01, form)
    for part, expected in by_hand(sae, x, k, 0.01, form).items():
        assert getattr(loss, part).item() == pytest.approx(expected, rel=1e-12), part


def test_loss_worked_out_on_paper() -> None:
    """D = 1, F = 3, x = 2: f = (2, 1, 0.5); k = 1 keeps the first, W_dec = 1, so x̂ = 2."""
    sae = CustomSAE(1, 3, "toy", 0, dtype=torch.float64, k=1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.5, 0.25]]))
        sae.W_dec.fill_(1.0)
    loss = contrastive_loss(sae, torch.tensor([[2.0]], dtype=torch.float64), 1, 0.01)
    assert float(loss.reconstruction) == 0.0
    # τ_sel = 0.3, τ_pen = 0.15, γ = 0.15: tanh(1 / 0.3) = 0.9974579, tanh(0.5 / 0.3) = 0.9311096
    assert float(loss.penalty) == pytest.approx(0.15 * 0.15 * (0.9974579 + 0.9311096), abs=1e-8)
    assert float(loss.reg) == 0.0
    written = contrastive_loss(
        sae, torch.tensor([[2.0]], dtype=torch.float64), None, 0.01, "as_written"
    )
    assert float(written.reconstruction) == pytest.approx(1.5)  # ‖2 − (2 + 1 + 0.5)‖
    # tanh(2 / 0.3) = 0.9999968; the mean over the three features
    assert float(written.penalty) == pytest.approx(
        0.0225 * (0.9999968 + 0.9974579 + 0.9311096) / 3, abs=1e-8
    )


@pytest.mark.parametrize(
    "k, form", [(2, "contrastive"), (None, "contrastive"), (None, "as_written")]
)
def test_gradients(k, form) -> None:
    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sae = make_sae()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return contrastive_loss(self.sae, x, k, 0.01, form).total

    objective = Objective()
    names, values = zip(*objective.named_parameters())
    assert {"sae.theta_1", "sae.theta_2", "sae.theta_3"} <= set(names)
    x = inputs()
    assert torch.autograd.gradcheck(
        lambda *v: torch.func.functional_call(objective, dict(zip(names, v)), (x,)),
        tuple(v.detach().clone().requires_grad_() for v in values),
    )


@pytest.mark.parametrize("theta", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_bounds(theta) -> None:
    sae = CustomSAE(3, 5, "toy", 0)
    with torch.no_grad():
        for parameter in sae.thetas():
            parameter.fill_(theta)
    ranges = {"tau_sel": (0.1, 0.5), "tau_pen": (0.05, 0.25), "gamma": (0.0, 0.3)}
    start = {"tau_sel": 0.3, "tau_pen": 0.15, "gamma": 0.15}
    for name, (low, high) in ranges.items():
        value = float(sae.scalar(name).detach())
        assert low - 1e-6 <= value <= high + 1e-6
        if theta == 0.0:
            assert value == pytest.approx(start[name])


def test_selected_features_reconstruct_and_are_not_penalised() -> None:
    sae, x = make_sae(d_sae=8), inputs(n=20)
    f = torch.relu(sae.preactivations(x).acts).detach()
    kept, rest = (codes.acts for codes in Codes(f).split(experiment.select(Codes(f), 3)))
    assert torch.equal(kept + rest, f)
    top = f.argsort(dim=1, descending=True)[:, :3]
    chosen = torch.zeros_like(f, dtype=torch.bool).scatter(1, top, True)
    assert (kept[~chosen] == 0).all() and (rest[chosen] == 0).all()

    loss = contrastive_loss(sae, x, 3, 0.0)
    assert torch.equal(loss.selected.acts > 0, chosen & (f > 0))
    # Penalty gradient on the pre-activations: none where selected, positive on the other active.
    bias = torch.zeros(20, 8, dtype=torch.float64, requires_grad=True)
    stock = sae.preactivations
    sae.preactivations = lambda *args: stock(*args).map(lambda pre: pre + bias)
    (gradient,) = torch.autograd.grad(contrastive_loss(sae, x, 3, 0.0).penalty, bias)
    active = f > 0
    assert (gradient[chosen] == 0).all()
    assert (gradient[~chosen & active] > 0).all()
    (gradient,) = torch.autograd.grad(contrastive_loss(sae, x, 3, 0.0).reconstruction, bias)
    assert (gradient[~chosen] == 0).all()
    assert (gradient[chosen & active] != 0).all()


def test_learning_can_only_weaken_the_penalty() -> None:
    """∂loss/∂γ ≥ 0, ∂loss/∂τ_pen ≥ 0, ∂loss/∂τ_sel ≤ 0 in the data term, for any data."""
    for seed in range(5):
        sae = make_sae(seed=seed)
        loss = contrastive_loss(sae, inputs(seed=seed), 2, reg_lambda=0.0).total
        sel, pen, gamma = torch.autograd.grad(loss, sae.thetas())
        assert sel <= 0 and pen >= 0 and gamma >= 0


def test_curriculum() -> None:
    settings = Settings(k_min=16, k_start_factor=4.0, curriculum_fraction=0.3)
    steps = [k_at(settings, t / 1000) for t in range(1001)]
    assert steps[0] == 64 and steps[300] == 16 and set(steps[300:]) == {16}
    assert steps == sorted(steps, reverse=True)
    assert steps[150] == 32  # half-way, the geometric mean
    large = dataclasses.replace(settings, k_min=64, d_sae=4096)  # in steps of two
    assert {k_at(large, t / 1000) for t in range(1001)} == {*range(64, 257, 2)}
    assert k_at(dataclasses.replace(settings, curriculum_fraction=0.0), 0.0) == 16
    default = Settings()
    assert experiment.k_at(default, 0.0) == default.k_start_factor * default.k_min
    assert experiment.k_at(default, 1.0) == default.k_min
    assert experiment.k_at(dataclasses.replace(default, curriculum=False), 0.0) is None
    # k_start never exceeds the number of features
    narrow = dataclasses.replace(default, d_sae=20, probe_ks=(1, 2, 5))
    assert experiment.k_at(narrow, 0.0) == 20


def test_learning_rate_rises_stays_and_falls_to_zero() -> None:
    factors = [experiment.lr_factor(t / 100, 0.1, 0.2) for t in range(101)]
    assert factors[0] == 0 and factors[5] == pytest.approx(0.5) and factors[10] == 1
    assert set(factors[10:81]) == {1.0}
    assert factors[90] == pytest.approx(0.5) and factors[100] == 0


def test_fixed_parameters_have_no_theta_and_no_gradient() -> None:
    sae = make_sae(fixed={"tau_sel": 0.3, "gamma": 0.15})
    assert [name for name, _ in sae.named_parameters() if "theta" in name] == ["theta_2"]
    loss = contrastive_loss(sae, inputs(), 2, 0.01)
    loss.total.backward()
    assert sae.theta_2.grad is not None
    record = numbers(sae.learned_scalars())
    assert record["tau_sel"] == pytest.approx(0.3) and record["theta_1"] is None
    assert record["w"] == pytest.approx(0.15 * record["tau_pen"])
    everything_fixed = make_sae(fixed={"tau_sel": 0.3, "tau_pen": 0.1, "gamma": 0.15})
    assert float(contrastive_loss(everything_fixed, inputs(), 2, 0.01).reg) == 0.0


def test_initialization() -> None:
    mean = torch.arange(4.0)
    first, again, other = (CustomSAE(4, 6, "toy", 0) for _ in range(3))
    first.initialize(3, mean)
    again.initialize(3, mean)
    other.initialize(4, mean)
    assert torch.equal(first.W_dec, again.W_dec) and not torch.equal(first.W_dec, other.W_dec)
    assert torch.allclose(first.W_dec.norm(dim=1), torch.ones(6))
    assert torch.equal(first.W_enc, first.W_dec.T)
    assert torch.equal(first.b_dec, mean) and (first.b_enc == 0).all()
    assert first.check_decoder_norms()


def test_encode_decode_are_the_formula_on_any_leading_shape() -> None:
    sae = make_sae(k=2)
    x = inputs(n=6).reshape(2, 3, 3)
    W_enc, W_dec, b_enc, b_dec = (p.detach().numpy() for p in weights_of(sae))
    f = np.maximum((x.numpy() - b_dec) @ W_enc + b_enc, 0)
    f[f < np.sort(f, axis=-1)[..., -2:-1]] = 0
    assert np.allclose(sae.encode(x).detach().numpy(), f)
    assert np.allclose(sae(x).detach().numpy(), f @ W_dec + b_dec)


@pytest.mark.parametrize("k, threshold", [(2, None), (None, None), (None, 0.2)])
@pytest.mark.parametrize("function", [torch.relu, lambda pre: torch.relu(pre) ** 2, nn.SiLU()])
def test_training_and_encode_select_the_same_for_any_activation(k, threshold, function) -> None:
    """An edit of `activation_fn` touches that method alone."""
    sae, x = make_sae(d_in=8, d_sae=40, k=k, threshold=threshold), inputs(n=30, d_in=8)
    sae.activation_fn = function
    chosen = k if threshold is None else 3
    selected = contrastive_loss(sae, x, chosen, 0.01).selected.dense()
    assert torch.equal(sae.encode(x), selected) and selected.any()


def test_an_activation_that_can_not_be_folded_is_said() -> None:
    """Squared ReLU of s x is s² that of x: the SAE that is scored would be another one."""
    sae = make_sae(k=2, scale=2.5)
    sae.activation_fn = lambda pre: torch.relu(pre) ** 2
    with pytest.raises(ValueError, match="activation_fn"):
        sae.fold_activation_norm_scaling()
    sae.activation_fn = nn.functional.leaky_relu
    sae.fold_activation_norm_scaling()


@pytest.mark.parametrize("k, threshold", [(2, None), (None, None), (None, 0.4)])
def test_folding_gives_raw_units(k, threshold) -> None:
    sae = make_sae(k=k, scale=2.5, threshold=threshold)
    raw, x = sae.fold_activation_norm_scaling(), inputs()
    assert torch.allclose(raw.encode(x), sae.encode(2.5 * x) / 2.5)
    assert torch.allclose(raw(x), sae(2.5 * x) / 2.5)
    assert torch.equal(raw.W_dec, sae.W_dec) and raw.norm_scaling_factor == 1.0
    assert not torch.equal(raw.b_dec, sae.b_dec)  # the original is left as it was


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("fixed", [{}, {"gamma": 0.0}])
def test_what_is_above_the_threshold_reconstructs_and_is_not_penalised(fixed, sparse) -> None:
    sae, x = make_sae(d_in=16, d_sae=300, fixed=fixed, threshold=0.3), inputs(n=60, d_in=16)
    few_active(sae, x, 6)
    f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    used, rest = f * (f > 0.3), f * (f <= 0.3)
    assert torch.equal(sae.encode(x) > 0, used > 0) and 0 < (used > 0).sum() < (f > 0).sum()
    error = (x - used @ sae.W_dec - sae.b_dec).pow(2).mean()
    weight = sae.scalar("gamma") * sae.scalar("tau_pen")
    penalty = weight * torch.tanh(rest / sae.scalar("tau_sel")).sum(1).mean()
    loss = contrastive_loss(sae, x, 4, 0.0, sparse=sparse)
    assert float(loss.penalty) == pytest.approx(float(penalty))
    for one, other in zip(
        torch.autograd.grad(loss.total, weights_of(sae)),
        torch.autograd.grad(error + penalty, weights_of(sae)),
    ):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    if sparse:  # without a penalty the others aren't looked at
        counted = used if fixed else f
        assert loss.selected.indices.shape == (60, int((counted > 0).sum(1).max()))


def unpenalised(settings: Settings) -> Trainer:
    """A run's own trainer, with gamma 0, for activations of 8 dimensions."""
    run = SimpleNamespace(settings=settings, train_dtype="float32")
    (trainer,) = experiment.new_trainers(run, {0: RAW}, {(0, 0): {"gamma": 0.0}}).values()
    return trainer


def test_threshold_keeps_l0_at_k() -> None:
    settings = small_settings(activation="jumprelu", gamma=0.0, training_tokens=64 * 200)
    trainer = unpenalised(settings)
    assert trainer.sae.k is None
    l0 = []
    for step in range(200):
        x = structured(64, seed=step)
        if step in (0, 199):
            trainer.start_threshold(x, experiment.k_at(settings, step / 200))
            l0.append(float((trainer.sae.encode(x) > 0).sum(1).float().mean()))
        trainer.step(x, trainer.at(step, 200), log=False)
    assert l0[0] == pytest.approx(8, rel=0.01)  # k_start, from the first step
    held_out = trainer.sae.encode(structured(2000, seed=1000))
    assert float((held_out > 0).sum(1).float().mean()) == pytest.approx(4, rel=0.1)


def without_selection(**changes) -> Trainer:
    """A trainer in whose SAE all active features reconstruct."""
    settings = small_settings(activation="relu", **changes)
    run = SimpleNamespace(settings=settings, train_dtype="float32")
    (trainer,) = experiment.new_trainers(run, {0: RAW}, {(0, 0): {}}).values()
    return trainer


def l0_of(sae: CustomSAE) -> float:
    return float((sae.encode(structured(2000, seed=1000)) > 0).sum(1).float().mean())


def test_gamma_holds_l0_at_k_where_all_active_features_reconstruct() -> None:
    trainer = without_selection(training_tokens=64 * 600, gamma_rate=0.02, k_min=10)
    sae = trainer.sae
    assert sae.k is None and sae.threshold is None
    assert l0_of(sae) > 14
    start, loss_of = float(sae.theta_3.detach()), experiment.contrastive_loss
    for step in range(600):
        x, before = structured(64, seed=step), sae.theta_3.detach().clone()
        l0 = float(loss_of(sae, x, None, 0.01).selected.n_active().float().mean())
        at = trainer.at(step, 600)
        trainer.step(x, at, log=False)
        # Up where L0 is above k_t, else down; neither by a gradient nor by L_reg.
        assert float(sae.theta_3.detach()) == pytest.approx(
            float(before) + 0.02 * min(l0 / at.k - 1, 1.0), abs=1e-6
        )
    assert float(sae.theta_3.detach()) > start  # descent could only have weakened the penalty
    assert l0_of(sae) == pytest.approx(10, rel=0.1)


def test_gamma_does_not_wind_up_beyond_its_bounds() -> None:
    trainer = without_selection(gamma_rate=0.5, k_min=1)
    for step in range(40):
        trainer.step(structured(64, seed=step), trainer.at(59, 60), log=False)
    assert float(trainer.sae.theta_3.detach()) == 6.0
    assert 0.299 < float(trainer.sae.scalar("gamma").detach()) < 0.3


@pytest.mark.parametrize("reg_lambda", [0.0, 1.0])
def test_theta_that_ascends_strengthens_the_penalty(reg_lambda) -> None:
    """Each learned θ goes up the penalty and down L_reg."""
    moved = {}
    for rule in ("descent", "ascent"):
        trainer = without_selection(theta_rule=rule, reg_lambda=reg_lambda)
        taus = trainer.sae.theta_1, trainer.sae.theta_2
        with torch.no_grad():
            for theta in taus:
                theta.fill_(3.0)
        trainer.step(structured(64), trainer.at(0, 100), log=False)
        moved[rule] = [float(theta.detach()) - 3.0 for theta in taus]
    descent, ascent = moved["descent"], moved["ascent"]
    if reg_lambda:  # far from 0 L_reg outweighs the penalty
        assert max(descent + ascent) < 0
    else:
        assert descent[0] > 0 > descent[1] and ascent[0] < 0 < ascent[1]


def few_active(sae: CustomSAE, x: torch.Tensor, n: int) -> None:
    """Lowers b_enc until n features per token are active in the mean."""
    with torch.no_grad():
        pre = sae.preactivations(x).acts
        sae.b_enc -= pre.flatten().topk(n * len(x)).values[-1]


@pytest.mark.parametrize("cost_F", [None, torch.linspace(0, 1, 300).double()])
@pytest.mark.parametrize(
    "k, form", [(3, "contrastive"), (50, "contrastive"), (None, "contrastive"),
                (None, "as_written")]
)  # fmt: skip
def test_the_sparse_layout_gives_the_same_loss_and_gradients(k, form, cost_F) -> None:
    """The fast form against the plain one; some tokens have no active feature."""
    sae, x = make_sae(d_in=16, d_sae=300, k=k), inputs(n=60, d_in=16)
    few_active(sae, x, 6)
    results = []
    for sparse in (True, False):
        loss = contrastive_loss(sae, x, k, 0.01, form, sparse, cost_F)
        gradients = torch.autograd.grad(loss.total, list(sae.parameters()))
        parts = loss.total, loss.reconstruction, loss.penalty, loss.reg, loss.density
        counted = loss.selected.fired(), loss.selected.counts(), loss.selected.n_active()
        results.append((loss, [*parts, loss.residual_BD, *gradients, *counted]))
    assert results[1][0].selected.indices is None
    f = torch.relu(sae.preactivations(x).acts).detach()
    assert results[0][0].selected.indices.shape == (60, int((f > 0).sum(1).max()))
    assert 0 in (f > 0).sum(1)
    used = [int((loss.selected.acts > 0).sum()) for loss, _ in results]
    assert used[0] == used[1]
    for fast, plain in zip(results[0][1], results[1][1]):
        assert torch.allclose(fast, plain, rtol=1e-10, atol=1e-12)


def test_selected_features_cost_what_their_frequency_says() -> None:
    sae, x = make_sae(d_in=16, d_sae=300, k=3), inputs(n=60, d_in=16)
    cost_F = torch.linspace(0, 1, 300).double()
    free, loss = (contrastive_loss(sae, x, 3, 0.01, cost_F=cost) for cost in (None, cost_F))
    cost = (sae.encode(x) * cost_F).sum(1).mean().detach()
    assert float(loss.density.detach()) == pytest.approx(float(cost))
    assert float(free.density) == 0.0
    assert float(loss.total.detach()) == pytest.approx(float(free.total.detach() + cost))
    assert torch.equal(loss.selected.counts(), (sae.encode(x) > 0).sum(0))
    assert torch.equal(loss.selected.fired(), (sae.encode(x) > 0).any(0))


def test_where_frequency_costs_no_feature_fires_as_often() -> None:
    def often(n: int, seed: int) -> torch.Tensor:  # one direction more, on half of the tokens
        on = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) < 0.5
        return structured(n, seed) + on * torch.eye(8)[:1]

    x, highest = often(2000, seed=1000), []
    for weight in (1e-9, 2.0):  # with 0 it isn't counted
        settings = small_settings(
            activation="jumprelu", gamma=0.0, density_penalty=weight, resample=False
        )
        trainer = unpenalised(settings)
        for step in range(400):
            trainer.step(often(64, seed=step), trainer.at(step, 400), log=False)
        frequency_F = (trainer.sae.encode(x) > 0).float().mean(0)
        assert float(frequency_F.sum()) == pytest.approx(4, rel=0.15)  # L0 is what it was
        assert torch.allclose(trainer.firing_rate_F, frequency_F, atol=0.1)  # as training knows it
        highest.append(float(frequency_F.max()))
    assert highest[1] < 0.8 * highest[0]


def test_the_layout_is_sparse_only_where_few_features_are_active() -> None:
    sae, x = make_sae(d_in=16, d_sae=300), inputs(n=60, d_in=16)
    loss = contrastive_loss(sae, x, 3, 0.01, sparse=True)  # what is selected is few
    assert loss.selected.indices is not None and loss.unselected.indices is None
    assert contrastive_loss(sae, x, 60, 0.01, sparse=True).selected.indices is None
    few_active(sae, x, round(300 * sparse_ops.MAX_DENSITY) - 1)
    loss = contrastive_loss(sae, x, 3, 0.01, sparse=True)
    assert loss.selected.indices is not None and loss.unselected.indices is not None
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)  # none at all
    loss = contrastive_loss(sae, x, 3, 0.01, sparse=True)
    assert float(loss.penalty) == 0.0 and not loss.selected.fired().any()
    loss.total.backward()
    assert not sae.W_enc.grad.any()


@pytest.mark.parametrize("part, layout", [(0.5, "selected and unselected"), (0.1, "selected")])
def test_training_in_the_sparse_layout_is_training(monkeypatch, part, layout) -> None:
    """The same steps as with all features, but for rounding; and the same again, bit for bit."""
    found = []
    for few in (0.0, part, part):
        monkeypatch.setattr(sparse_ops, "MAX_DENSITY", few)
        found.append(trained(small_settings(d_sae=64, lr_warmup=0.0, resample=False), steps=40))
    plain, fast, again = found
    assert plain.fast == () and fast.fast == (layout,)
    assert torch.allclose(plain.sae.W_dec, fast.sae.W_dec, atol=1e-3)
    for one, other in zip(fast.sae.parameters(), again.sae.parameters()):
        assert torch.equal(one, other)


def test_a_loss_that_needs_all_features_gets_them(monkeypatch, capsys) -> None:
    """An edit that is right for all features alone, as a mean over them: noticed, and served."""
    monkeypatch.setattr(sparse_ops, "MAX_DENSITY", 0.5)
    stock = contrastive_loss

    def edited(*args):
        loss = stock(*args)
        loss.total = loss.total + 0.1 * loss.selected.acts.mean()
        return loss

    monkeypatch.setattr(experiment, "contrastive_loss", edited)
    trainer = trained(small_settings(lr_warmup=0.0), steps=40)
    assert trainer.fast is None
    assert "other gradients: the plain one is taken" in capsys.readouterr().out


def small_settings(**changes) -> Settings:
    small = dict(
        d_sae=32, k_min=4, batch=64, training_tokens=64 * 60, dead_feature_window=64 * 5, lr=2e-3,
        layers=(0,), probe_ks=(1, 2, 5),
    )  # fmt: skip
    return Settings(**small | changes)


def structured(n: int, seed: int = 0, d_in: int = 8, n_true: int = 24) -> torch.Tensor:
    """Sparse combinations of more directions than dimensions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_true, d_in, generator=torch.Generator().manual_seed(99))
    on = torch.rand(n, n_true, generator=generator) < 0.1
    return (on * torch.rand(n, n_true, generator=generator)) @ directions


def trained(settings: Settings, steps: int = 60, fixed: dict | None = None) -> Trainer:
    sae = experiment.new_sae(settings, 0, 0, RAW, fixed or {}, settings.k_min)
    trainer = Trainer(sae, settings, 0)
    for step in range(steps):
        x = structured(settings.batch, seed=step)
        trainer.step(x, trainer.at(step, steps), log=False)
    return trainer


def test_training_learns_and_keeps_decoder_rows_at_unit_norm() -> None:
    x = structured(500, seed=12345)
    before = trained(small_settings(), steps=0).sae
    after = trained(small_settings()).sae
    error = [float((x - sae(x)).pow(2).sum()) for sae in (before, after)]
    assert error[1] < 0.7 * error[0]
    assert torch.allclose(after.W_dec.norm(dim=1), torch.ones(32), atol=1e-6)
    assert not torch.equal(after.theta_1, before.theta_1)


def test_gradient_along_decoder_rows_is_removed() -> None:
    sae = make_sae()
    contrastive_loss(sae, inputs(), 2, 0.01).total.backward()
    sae.remove_parallel_gradient()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-7
    assert sae.W_dec.grad.abs().max() > 0


def test_theta_has_its_own_learning_rate_without_schedule() -> None:
    settings = small_settings(theta_lr=0.05)
    trainer = trained(settings, steps=1)
    # Adam's first step moves a parameter by its learning rate; the weights' is 0 at progress 0.
    assert float(trainer.sae.theta_1.detach()) == pytest.approx(0.05, rel=1e-3)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0
    assert trainer.optimizer.param_groups[1]["lr"] == 0.05


def test_dead_features_are_counted_and_brought_back() -> None:
    left = {}
    for resample in (False, True):
        settings = small_settings(resample=resample)
        trainer = trained(settings, steps=10)
        with torch.no_grad():
            trainer.sae.W_enc[:, :16] = 0.0
            trainer.sae.b_enc[:16] = -1.0
        for step in range(10, 30):
            trainer.step(structured(64, seed=step), trainer.at(1, 10), log=False)
        if not resample:
            assert trainer.dead()[:16].all()
            assert (trainer.n_forward_passes_since_fired[:16] >= 20).all()
        for step in range(30, 100):
            trainer.step(structured(64, seed=step), trainer.at(1, 10), log=False)
        assert torch.allclose(trainer.sae.W_dec.norm(dim=1), torch.ones(32), atol=1e-6)
        fired = (trainer.sae.encode(structured(5000, seed=7)) > 0).any(0)
        left[resample] = int((~fired[:16]).sum())
    assert left[False] == 16
    assert left[True] <= 4


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "relu"])
def test_a_resampled_feature_has_the_bias_of_the_others_where_l0_is_held(activation) -> None:
    settings = small_settings(activation=activation)
    run = SimpleNamespace(settings=settings, train_dtype="float32")
    (trainer,) = experiment.new_trainers(run, {0: RAW}, {(0, 0): {}}).values()
    sae = trainer.sae
    trainer.step(structured(64), trainer.at(1, 2), log=False)
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-3, -1, 32))
    expected_F = sae.b_enc.detach().clone()
    trainer.n_forward_passes_since_fired[:8] = 1000
    expected_F[:8] = expected_F[8:].mean() if activation != "topk" else 0.0
    before_F = sae.W_enc.norm(dim=0).mean()
    trainer.resample(structured(64, seed=1))
    assert torch.allclose(sae.b_enc, expected_F)
    assert torch.allclose(sae.W_enc[:, :8].norm(dim=0), before_F)
    assert not trainer.dead().any()
    trainer.n_forward_passes_since_fired[:] = 1000  # none is left to be like
    trainer.resample(structured(64, seed=2))
    assert not sae.b_enc.any()


def test_bfloat16_products_leave_float32_weights_and_nearly_the_same_training() -> None:
    """Gradients differ by bfloat16's rounding (2^-9 per factor), and only by that."""
    grads = {}
    for autocast in (False, True):
        settings = small_settings()
        sae = experiment.new_sae(settings, 0, 0, RAW, {}, settings.k_min)
        trainer = Trainer(sae, settings, 0, autocast)
        trainer.step(structured(64), trainer.at(1, 2), log=False)
        grads[autocast] = torch.cat([p.grad.flatten() for p in weights_of(sae)])
        assert all(p.dtype == torch.float32 for p in sae.parameters())
    difference = (grads[True] - grads[False]).norm() / grads[False].norm()
    assert 0 < difference < 0.02


def test_same_seed_same_weights_bit_for_bit() -> None:
    first, second = (trained(small_settings()).sae for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a, b)
