"""What a step does on a GPU, held on a CPU: the same forms, and a stand-in for a captured graph."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import experiment
import sparse_ops
from experiment import Settings, Trainer, contrastive_loss
from harness import gpu
from harness.gpu import CapturedSteps
from harness.object_state import restore, state_of
from harness.steps import captured_steps
from harness.training import ActivationStats

READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")
THRESHOLD = dict(activation="jumprelu", gamma=0.0, tau_sel=0.3, tau_pen=0.1, density_penalty=0.01)
KEYS = ((1, 0), (2, 0))
N_STEPS = 60


class Tape(TorchDispatchMode):
    """Notes operations on tensors, to do them again on the same ones: a graph of CUDA's, on a CPU.

    What Python does between them is not on it, and a read of a value is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        as_they_are = tree_map(alias, (args, kwargs or {}))  # some change a shape in place
        out = func(*args, **(kwargs or {}))
        self.notes.append((func, *as_they_are, tree_map(alias, out)))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.notes:
            again = func(*args, **kwargs)
            pairs = zip(out, again) if isinstance(out, (tuple, list)) else [(out, again)]
            for old, new in pairs:
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def alias(value: Any) -> Any:
    """A tensor on the same memory."""
    return value.detach() if isinstance(value, Tensor) else value


def taped(trainers: dict) -> Callable:
    """Stands in for `gpu.captured`: what it does while it notes is undone."""

    def capture(function: Callable, generators: list, others: list) -> tuple[Callable, Any]:
        before = state_of(copied=True, trainers=trainers)
        with Tape() as tape:
            result = function()
        for trainer in trainers.values():
            trainer.optimizer.zero_grad()
        left = {key: {k: [*v] if isinstance(v, list) else v for k, v in vars(trainer).items()}
                for key, trainer in trainers.items()}  # fmt: skip
        restore(before, trainers=trainers)
        for key, trainer in trainers.items():  # what isn't a tensor stays as the function left it
            vars(trainer).update({k: v for k, v in left[key].items() if not hasattr(v, "shape")})
        return tape.replay, result

    return capture


@pytest.fixture
def forms_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sparse_ops, experiment):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    adam = torch.optim.Adam  # "capturable" is for tensors on a GPU
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, capturable, **k: adam(*a, **k))


def settings_with(**changes: Any) -> Settings:
    small = dict(
        d_sae=32, k_min=4, batch=64, training_tokens=64 * N_STEPS, dead_feature_window=64 * 5,
        lr=2e-3, probe_ks=(1, 2, 5), resample_every=2, layers=(1, 2), curriculum_fraction=0.3,
    )  # fmt: skip
    return Settings(**small | changes)


def batches(layer: int) -> Tensor:
    """(steps, B, D): sums of a few of 24 directions."""
    generator = torch.Generator().manual_seed(layer)
    directions = torch.randn(24, 8, generator=generator)
    on = torch.rand(N_STEPS, 64, 24, generator=generator) < 0.1
    return on.float() @ directions + 0.1 * torch.randn(N_STEPS, 64, 8, generator=generator)


def new_trainers(settings: Settings, trainer: type = Trainer) -> dict:
    by_threshold = settings.activation == "jumprelu"
    k = None if settings.activation == "relu" else settings.k_min
    found = {}
    for layer, seed in KEYS:
        fixed = {name: getattr(settings, name) for name in ("tau_sel", "tau_pen", "gamma")}
        fixed = {name: value for name, value in fixed.items() if value is not None}
        stats = ActivationStats.of(batches(layer)[0])
        sae = experiment.new_sae(settings, layer, seed, stats, fixed, k, by_threshold)
        found[layer, seed] = trainer(sae, settings, seed)
    return found


def trained(settings: Settings, trainer: type, capture: bool) -> tuple[dict, list, CapturedSteps]:
    """Trainers after all steps, the losses of each step, and what took the steps."""
    trainers = new_trainers(settings, trainer)
    steps = CapturedSteps(trainers, None, taped(trainers))
    if not capture:
        steps.why_not = "not asked for"
    x = {key: batches(key[0]) for key in KEYS}
    losses = []
    for step in range(N_STEPS):
        at = {key: t.at(step, N_STEPS) for key, t in trainers.items()}
        found = steps.step({key: x[key][step] for key in KEYS}, at, step % 20 == 0)
        losses.append([float(loss) for loss, _ in found.values()])
        assert all((record is None) == (step % 20 != 0) for _, record in found.values())
    return trainers, losses, steps


def steps_of(trainers: dict, steps: range) -> CapturedSteps:
    """Takes these steps of trainers, as a run does in one filling of the buffer."""
    taken = CapturedSteps(trainers, None, taped(trainers))
    for step in steps:
        x = {key: batches(key[0])[step] for key in KEYS}
        taken.step(x, {key: t.at(step, N_STEPS) for key, t in trainers.items()}, step % 20 == 0)
    taken.forget_gradients()
    return taken


@pytest.mark.parametrize("changes", [{}, THRESHOLD], ids=str)
def test_a_training_that_goes_on_elsewhere_is_the_one_in_one_go(forms_of_a_gpu, changes) -> None:
    """Its state goes into new trainers, whose first steps are no graphs again."""
    settings = settings_with(**changes)
    whole, first, second = (new_trainers(settings) for _ in range(3))
    assert steps_of(whole, range(N_STEPS)).graphs and steps_of(first, range(30)).graphs
    restore(state_of(copied=True, trainers=first), trainers=second)
    assert steps_of(second, range(30, N_STEPS)).graphs
    assert same_weights(whole, second)


def same_weights(one: dict, other: dict) -> bool:
    for trainer in (*one.values(), *other.values()):
        trainer.optimizer.zero_grad()
    states = [CapturedSteps(trainers, None).held() for trainers in (one, other)]
    tensors = ([n["data"]["value"] for n in state["nodes"] if n["kind"] == "tensor"]
               for state in states)  # fmt: skip
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


@pytest.mark.parametrize("changes", [{}, THRESHOLD, {"curriculum": False},
                                     {"activation": "relu", "theta_rule": "ascent"}], ids=str)
def test_captured_steps_are_the_steps(forms_of_a_gpu, changes) -> None:
    settings = settings_with(**changes)
    plain, losses, _ = trained(settings, Trainer, capture=False)
    graphs, again, steps = trained(settings, Trainer, capture=True)
    assert steps.why_not is None and 1 < len(steps.graphs) <= gpu.N_GRAPHS
    assert losses == again and same_weights(plain, graphs)
    never, _, _ = trained(settings_with(resample=False, **changes), Trainer, capture=False)
    assert not same_weights(plain, never)


class Reads(Trainer):
    def step(self, x_BD, at, log):
        if float(x_BD.abs().max()) > 1e9:
            return None, None
        return super().step(x_BD, at, log)


class Counts(Trainer):
    calls = 0

    def step(self, x_BD, at, log):
        self.calls = self.calls + 1
        return super().step(x_BD / (2 if self.calls % 10 == 0 else 1), at, log)


class Rebinds(Trainer):
    def step(self, x_BD, at, log):
        self.firing_rate_F = self.firing_rate_F * 1.0
        return super().step(x_BD, at, log)


class Keeps(Trainer):
    def step(self, x_BD, at, log):
        seen = vars(self).setdefault("seen", [])
        seen.append(at.k)
        return super().step(x_BD / (2 if len(seen) % 10 == 0 else 1), at, log)


class Listed(Trainer):
    def at(self, step, n_steps):
        return super().at(step, n_steps)._replace(resample=[step % 2 == 0])

    def step(self, x_BD, at, log):
        return super().step(x_BD, at._replace(resample=at.resample[0]), log)


class Accumulates(Trainer):
    def step(self, x_BD, at, log):
        loss = contrastive_loss(self.sae, x_BD, at.k, 0.01)
        loss.total.backward()  # on what an earlier step has left
        self.optimizer.step()
        return loss.total.detach(), {"loss": loss.total} if log else None


class Draws(Trainer):
    def step(self, x_BD, at, log):
        return super().step(x_BD * random.uniform(0.5, 1.5), at, log)


@pytest.mark.parametrize("trainer, why", [
    (Reads, "not permitted when stream is capturing"),
    (Counts, "is new at most steps"),
    (Rebinds, "is new at most steps"),
    (Keeps, "can't repeat how it changes"),
    (Accumulates, "leaves another trainers[1, 0]"),
    (Listed, "has no hash, such as a list: make it a tuple"),
    (Draws, "leaves another trainers[1, 0]"),
])  # fmt: skip
def test_steps_that_a_graph_would_not_repeat_are_taken_one_by_one(
    forms_of_a_gpu, trainer, why, capsys
) -> None:
    random.seed(0)
    plain, losses, _ = trained(settings_with(), trainer, capture=False)
    stood = random.getstate()
    random.seed(0)
    found, again, steps = trained(settings_with(), trainer, capture=True)
    assert why in steps.why_not and steps.why_not in capsys.readouterr().out
    if trainer is not Draws:
        assert losses == again and same_weights(plain, found)
    assert trainer is not Draws or random.getstate() != stood  # it drew for a graph, too


@pytest.mark.parametrize(("given", "said"), [
    (None, "SAELens' trainers read values back and keep count of steps"),
    ({"lr": 1e-3}, "what a trainer's `at` gives its step is no named tuple"),
])  # fmt: skip
def test_why_no_graph_is_tried_is_said_once(capfd, given: object, said: str) -> None:
    trainers = {(1, 0): SimpleNamespace(at=lambda step, n_steps: given)}
    log = SimpleNamespace(done=0, n_steps=3, looked=False, given=None)
    assert captured_steps(trainers, log) is None
    log.looked = True
    assert captured_steps(trainers, log) is None
    out = capfd.readouterr().out
    assert out == f"steps are taken operation by operation, not as one graph: {said}\n"



@pytest.mark.parametrize("changes", [{}, THRESHOLD], ids=str)
def test_a_gpus_forms_are_the_plain_ones(monkeypatch, forms_of_a_gpu, changes) -> None:
    """Masks in place of places; dead features replaced without a look at how many they are."""

    def steps_and_a_look() -> Trainer:
        trainer, x = new_trainers(settings_with(**changes))[1, 0], batches(1)
        for step in range(20):
            trainer.step(x[step], trainer.at(2 * step + 1, N_STEPS), False)
        trainer.n_forward_passes_since_fired[3:9] = 1000
        trainer.generator.manual_seed(1)
        trainer.resample(x[0] - trainer.sae(x[0]).detach())
        assert not trainer.dead().any()
        return trainer

    found = steps_and_a_look()
    with monkeypatch.context() as patch:
        for module in (sparse_ops, experiment):
            patch.setattr(module, "on_gpu", lambda x: False)
        plain = steps_and_a_look()
    for one, other in zip(plain.sae.parameters(), found.sae.parameters()):
        torch.testing.assert_close(one, other)
    for one, other in zip(plain.optimizer.state.values(), found.optimizer.state.values()):
        torch.testing.assert_close(one["exp_avg_sq"], other["exp_avg_sq"])


@pytest.mark.parametrize("changes", [{}, THRESHOLD, {"curriculum": False},
                                     {"loss_variant": "as_written", "curriculum": False}], ids=str)
def test_a_compiler_takes_the_loss_whole(changes) -> None:
    """One graph without a break, the same gradients, and not one for each k."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
    settings, x_BD = settings_with(**changes), batches(1)[0]
    trainer = new_trainers(settings)[1, 0]
    trainer.start_threshold(x_BD, 4)
    ks = (8, 7, 6, 5, 4) if settings.curriculum else (None,)
    cost_F = torch.rand(32) if settings.density_penalty else None
    for k in ks:
        for sae in (t.sae for t in new_trainers(settings).values()):
            losses, grads = [], []
            for function in (contrastive_loss, compiled):
                loss = function(sae, x_BD, k, 0.01, settings.loss_variant, False, cost_F)
                parameters = [p for p in sae.parameters()]
                grads += [torch.autograd.grad(loss.total, parameters, materialize_grads=True)]
                losses.append(loss)
            torch.testing.assert_close(losses[1].total, losses[0].total)
            torch.testing.assert_close(losses[1].selected.acts, losses[0].selected.acts)
            torch.testing.assert_close(grads[1], grads[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("changes", [{}, THRESHOLD, {"curriculum": False}], ids=str)
def test_a_step_depends_on_no_value_and_launches_little(
    forms_of_a_gpu, monkeypatch, changes
) -> None:
    """Traced without values: a read of one, or a shape that depends on one, is an error."""
    trainer, x = new_trainers(settings_with(**changes))[1, 0], batches(1)
    trainer.step(x[0], trainer.at(0, N_STEPS), True)
    launched = []
    for step, log in ((1, False), (2, False), (3, True)):
        with Tape() as tape:
            trainer.step(x[step], trainer.at(step, N_STEPS), log)
        launched.append(sum(not func.is_view for func, *_ in tape.notes))
    plain, resampling, recorded = launched
    assert plain <= 125 and resampling <= plain + 65 and recorded <= plain + 30
    trainer.generator = None  # none of those draws where there are no values
    monkeypatch.setattr(Tensor, "exponential_", lambda self, generator: self.fill_(1.0))
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        trainer, x = copy.deepcopy((trainer, x))
    for step, log in ((1, False), (2, False), (3, True)):
        with mode:
            loss, record = trainer.step(x[step], trainer.at(step, N_STEPS), log)
        assert isinstance(loss, FakeTensor) and (record is not None) == log
