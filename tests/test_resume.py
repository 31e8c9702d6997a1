"""A training that was interrupted and went on ends as one that was not, whatever an edit keeps."""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime
import functools
import inspect
import itertools
import json
import random
import re
import time
import types
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from harness.checkpoints import Checkpoints
from harness.isolation import isolated
from harness.object_parts import Unsavable
from harness.object_state import fingerprint, restore, state_of
from harness.rehearsal import TrainingPass, resume_problems
from harness.startup import Run
from harness.store import TENSORS, Shelf, store_dir
from harness.text import TokenStream, documents, passages
from harness.training import ActivationCache
from tests.conftest import cut_off, run_command, settings_of


@dataclasses.dataclass
class Momentum:
    """State of an edit's own, in a dataclass."""

    mean: torch.Tensor | None = None
    n: int = 0


class Slotted:
    __slots__ = ("__hidden", "n")

    def __init__(self) -> None:
        self.n, self.__hidden = 0, [1.0]

    def next(self) -> float:
        self.n += 1
        self.__hidden.append(self.__hidden[-1] * 0.5)
        return self.n + self.__hidden[-1]


class Counter:
    """State behind a call."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self) -> float:
        self.n += 1
        return float(self.n)


class Gate(nn.Module):
    """A module with an optimizer, a buffer that is not persistent, and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(32, 1), 0
        self.register_buffer("mean_D", torch.zeros(32), persistent=False)
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def step(self, x_BD: torch.Tensor) -> float:
        self.calls += 1
        self.mean_D = self.mean_D.lerp(x_BD.mean(0), 0.3)
        self.optimizer.zero_grad()
        loss = self.linear(x_BD - self.mean_D).pow(2).mean() * self.calls
        loss.backward()
        self.optimizer.step()
        return float(loss.detach().clamp(0, 1))


# What an edit adds to a trainer when it is made, and what a step then multiplies the SAE's encoder
# bias by (1 + 0.001 times it): by the kind of state that it keeps.
def hidden(t):
    t._n = 0


def hidden_step(t, x_BD):
    t._n += 1
    return t._n


def own_parameter(t):
    t.temperature = nn.Parameter(torch.ones(()))
    t.optimizer.add_param_group({"params": [t.temperature], "lr": 0.1})


def own_parameter_step(t, x_BD):
    t.optimizer.zero_grad()
    (t.temperature * x_BD.std()).pow(2).backward()
    t.optimizer.step()
    return float(t.temperature.detach())


def second_generator(t):
    t.noise = torch.Generator().manual_seed(5)


def second_generator_step(t, x_BD):
    return float(torch.rand((), generator=t.noise))


def module(t):
    t.gate = Gate()


def module_step(t, x_BD):
    return t.gate.step(x_BD)


def on_the_sae(t):
    t.sae.gate = Gate()


def on_the_sae_step(t, x_BD):
    return t.sae.gate.step(x_BD)


def a_dataclass(t):
    t.momentum = Momentum()


def a_dataclass_step(t, x_BD):
    m = t.momentum
    m.n, old = m.n + 1, x_BD.mean(0) if m.mean is None else m.mean
    m.mean = old.lerp(x_BD.mean(0), 0.5)
    return float(m.mean.abs().sum().clamp(0, 2)) / m.n


def callable_object(t):
    t.count = Counter()


def callable_object_step(t, x_BD):
    return t.count()


def slots(t):
    t.slotted = Slotted()


def slots_step(t, x_BD):
    return t.slotted.next()


def buffer_not_persistent(t):
    t.sae.register_buffer("seen", torch.zeros(()), persistent=False)


def buffer_not_persistent_step(t, x_BD):
    t.sae.seen += 1
    return float(t.sae.seen)


def containers(t):
    t.queue, t.names, t.by_step = collections.deque([1.0], 3), {"a"}, collections.defaultdict(list)


def containers_step(t, x_BD):
    t.queue.append(t.queue[-1] * 0.7)
    t.names.add(str(len(t.names)))
    t.by_step[len(t.by_step), "seen"].append(len(t.names))
    return sum(t.queue) + len(t.names) + len(t.by_step)


def numpy_state(t):
    t.rates, t.rng = numpy.zeros(3), numpy.random.default_rng(3)
    t.legacy = numpy.random.RandomState(4)


def numpy_state_step(t, x_BD):
    t.rates = t.rates * 0.5 + t.rng.random(3)
    return float(t.rates.sum() + t.legacy.rand())


def python_random(t):
    t.draw = random.Random(1)


def python_random_step(t, x_BD):
    return t.draw.random() + t.draw.gauss(0, 0.1)


def schedule(t):
    t.schedule = torch.optim.lr_scheduler.LambdaLR(t.optimizer, lambda epoch: 0.9**epoch)


def schedule_step(t, x_BD):
    t.schedule.step()
    return t.schedule.get_last_lr()[0] * 1000


def made_late(t):
    t.average = None


def made_late_step(t, x_BD):
    if t.average is None:
        t.average, t.late = copy.deepcopy(t.sae), random.Random(2)
    with torch.no_grad():
        t.average.b_enc.lerp_(t.sae.b_enc, 0.1)
    return float(t.average.b_enc.sum().clamp(-1, 1)) + t.late.random()


def closure(t):
    seen: list[int] = []
    t.weight = lambda: seen.append(1) or len(seen)


def closure_step(t, x_BD):
    return t.weight()


def training_mode(t):
    t.dropout = nn.Dropout(0.5)


def training_mode_step(t, x_BD):
    was = t.dropout.training
    t.dropout.eval()
    return 1 + was


def accumulated_gradient(t):
    t.bias = nn.Parameter(torch.zeros(()))


def accumulated_gradient_step(t, x_BD):
    (t.bias * x_BD.std()).backward()
    return float(t.bias.grad.clamp(0, 9))


def two_names(t):
    t.also = t.optimizer
    t.alias = t.sae.b_enc


def two_names_step(t, x_BD):
    t.also.param_groups[0]["weight_decay"] = 0.01
    assert t.also is t.optimizer and t.alias is t.sae.b_enc
    return 1.0


SAVED = (
    hidden, own_parameter, second_generator, module, on_the_sae, a_dataclass, callable_object,
    slots, buffer_not_persistent, containers, numpy_state, python_random, schedule, made_late,
    closure, training_mode, accumulated_gradient, two_names,
)  # fmt: skip


def edit_trainer(
    monkeypatch: pytest.MonkeyPatch, toy, begin: Callable | None, step: Callable
) -> None:
    """A trainer that `begin` adds to, and whose step is moved by what `step` returns."""
    init, take = toy.Trainer.__init__, toy.Trainer.step

    def with_more(trainer, *arguments):
        init(trainer, *arguments)
        if begin is not None:
            begin(trainer)

    def moved(trainer, x_BD, progress, log):
        found = take(trainer, x_BD, progress, log)
        with torch.no_grad():
            trainer.sae.b_enc.sub_(0.01)
        by = step(trainer, x_BD)
        with torch.no_grad():
            trainer.sae.b_enc.mul_(1 + 1e-3 * by)
        return found

    monkeypatch.setattr(toy.Trainer, "__init__", with_more)
    monkeypatch.setattr(toy.Trainer, "step", moved)


class Trained:
    """A training of the toy in three fillings of the buffer, whole or with interruptions."""

    def __init__(self, toy, toy_lm, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.toy, self.lm, self.folder, self.monkeypatch = toy, toy_lm, folder, monkeypatch
        self.settings = dataclasses.replace(
            settings_of(toy, "run_1"), training_tokens=1536, buffer_tokens=512
        )

    def run(self, **changes) -> Run:
        settings = dataclasses.replace(self.settings, **changes)
        return Run(settings, self.lm, out_dir=self.folder)

    def once(self, run: Run, fillings: int | None = None):
        texts = functools.partial(iter, passages("".join(documents("toy", "train")())))
        with TokenStream(texts, self.lm.tokenizer, run.settings.context) as stream:
            buffer = self.toy.ActivationBuffer(run, stream)
            cut_off(buffer, fillings)
            return self.toy.train(run, buffer)

    def whole(self, **changes) -> dict:
        training = self.once(self.run(**changes))
        self.in_turn = training.log.in_turn
        return weights(training)

    def in_pieces(self, **changes) -> dict:
        """Interrupted after each filling, and begun again in new objects."""
        for fillings in (1, 1, None):
            saving = Checkpoints({"a": 1}, every=0.0, share=1e9, given=None)
            self.monkeypatch.setattr(Run, "checkpoints", lambda *_, s=saving, **__: s)
            try:
                found = self.once(self.run(**changes), fillings)
            except KeyboardInterrupt:
                continue
        return weights(found)

    def problems(self, **changes) -> dict[str, str]:
        """What the rehearsal finds."""
        run = self.run(training_tokens=384, buffer_tokens=256, log_every=1, **changes)

        def play(training_pass: TrainingPass) -> None:
            rehearsed = dataclasses.replace(run, training_pass=training_pass)
            with isolated():
                saes = self.once(rehearsed).saes
                training_pass.score({str(key): sae for key, sae in saes.items()}, rehearsed)

        return resume_problems(play, self.folder)


def weights(training) -> dict:
    return {
        (*key, name): value
        for key, sae in training.saes.items()
        for name, value in sae.state_dict().items()
    }


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[at], other[at]) for at in one)


@pytest.fixture
def trained(toy, toy_lm, tmp_path: Path, own_cache: Path, monkeypatch) -> Trained:
    return Trained(toy, toy_lm, tmp_path, monkeypatch)


@pytest.mark.parametrize("begin", SAVED, ids=lambda begin: begin.__name__)
def test_what_an_edit_keeps_on_a_trainer_goes_on(
    trained: Trained, toy, monkeypatch, begin: Callable
) -> None:
    edit_trainer(monkeypatch, toy, begin, globals()[f"{begin.__name__}_step"])
    assert trained.problems() == {}
    assert same(trained.whole(), trained.in_pieces())


def with_(**held) -> types.SimpleNamespace:
    return types.SimpleNamespace(**held)


def scheduled(schedule: Callable) -> types.SimpleNamespace:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    made = schedule(optimizer)
    return with_(optimizer=optimizer, schedule=made)


def hooked() -> nn.Module:
    module, seen = nn.Linear(2, 2), []
    module.register_forward_hook(lambda *_: seen.append(1))
    module(torch.ones(1, 2))
    return module


def looped() -> list:
    loop: list = [1]
    loop.append(loop)
    return loop


lrs = torch.optim.lr_scheduler
Pair = collections.namedtuple("Pair", "x y")
HELD = {  # how it is made, and what then happens to it
    "compiled": (lambda: with_(f=torch.compile(looped), m=torch.compile(nn.Linear(2, 2))), None),
    "averaged": (lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
                 lambda a: a.update_parameters(nn.Linear(2, 2))),
    "one cycle": (lambda: scheduled(lambda o: lrs.OneCycleLR(o, 0.1, 10)),
                  lambda a: (a.optimizer.step(), a.schedule.step())),
    "one after the other": (
        lambda: scheduled(lambda o: lrs.SequentialLR(
            o, [lrs.ConstantLR(o), lrs.LambdaLR(o, lambda epoch: 0.5**epoch)], [1])),
        lambda a: [(a.optimizer.step(), a.schedule.step()) for _ in range(3)]),
    "plateau": (lambda: scheduled(lrs.ReduceLROnPlateau), lambda a: a.schedule.step(3.0)),
    "L-BFGS": (lambda: torch.optim.LBFGS([nn.Parameter(torch.ones(2))]),
               lambda a: a.step(lambda: a.param_groups[0]["params"][0].detach().sum())),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
                      lambda a: a(torch.ones(1, 3))),
    "hooks": (hooked, lambda a: a(torch.ones(1, 2))),
    "memo": (lambda: with_(f=forked_memo), None),
    "values": (lambda: with_(a=datetime.date(2026, 1, 1), b=Fraction(1, 2), c=Path("x"), d=b"xy",
                             e=numpy.float32(2), f=range(3), g=torch.float32, h=itertools.count()),
               lambda a: [next(a.h), vars(a).update(d=b"z", e=numpy.float32(3), f=range(4))]),
    "containers": (lambda: with_(a=Pair(1, [2]), b=torch.Size([1]), c=frozenset("ab"), d=looped(),
                                 e=collections.Counter("aab"), f=collections.OrderedDict(a=1)),
                   lambda a: [a.a.y.append(3), a.d.append(2), a.e.update("c"), a.f.update(b=2)]),
    "tensors": (lambda: with_(a=torch.zeros(3, dtype=torch.bfloat16), b=torch.zeros(0),
                              c=torch.zeros(2, dtype=torch.complex64), d=None),
                lambda a: [a.a.add_(1), a.c.add_(1j), setattr(a, "d", torch.ones(2).expand(3, 2))]),
}  # fmt: skip


@functools.lru_cache
def forked_memo() -> None: ...


@pytest.mark.parametrize("what", HELD)
def test_what_an_edit_may_hold_is_held_again(own_cache: Path, what: str) -> None:
    """Through a file that is read as data."""
    make, move = HELD[what]
    first, second = make(), make()
    if move is not None:
        move(first)
    shelf, state = Shelf("held", TENSORS, {}), state_of(held=first)
    shelf.put("it", state)
    restore(shelf.find("it"), held=second)
    assert fingerprint(state_of(held=second)) == fingerprint(state)


def a_file(t):
    t.notes = open("/dev/null", "w")


def a_generator(t):
    t.weights = (0.5**n for n in range(99))


def a_late_lambda(t):
    t.weight = None


def a_late_lambda_step(t, x_BD):
    seen = [0] if t.weight is None else t.weight()
    seen.append(len(seen))
    t.weight = lambda: seen
    return len(seen)


@pytest.mark.parametrize(
    ("begin", "what"),
    [(a_file, "trainers[0, 0].notes is a TextIOWrapper"),
     (a_generator, "trainers[0, 0].weights is a generator"),
     (a_late_lambda, "trainers[0, 0].weight is a a_late_lambda_step.<locals>.<lambda> that can't")],
    ids=lambda begin: getattr(begin, "__name__", ""),
)  # fmt: skip
def test_what_can_not_be_saved_is_named(trained, toy, monkeypatch, begin, what) -> None:
    steps = {a_late_lambda: a_late_lambda_step, a_generator: lambda t, x_BD: next(t.weights)}
    edit_trainer(monkeypatch, toy, begin, steps.get(begin, lambda t, x_BD: 0.0))
    problems = trained.problems()
    assert [*problems] == ["unresumable"]
    assert "this edit can't be resumed, so its training is not saved: " in problems["unresumable"]
    assert what in problems["unresumable"]


LOST = {  # in train or around it, where nobody can save it
    "a local variable": {
        "        while steps :=": "        scale = 1.0\n        while steps :=",
        "                take_steps(": "                scale *= 0.5\n"
        "                for trainer in trainers.values():\n"
        "                    trainer.sae.b_dec.data.mul_(scale)\n"
        "                take_steps(",
    },
    "a local variable that is used at the end": {
        "        while steps :=": "        mean = {}\n        while steps :=",
        "            if decided or": "            for key, trainer in trainers.items():\n"
        "                now = trainer.sae.W_dec.detach().clone()\n"
        "                mean[key] = 0.5 * (mean.get(key, now) + now)\n"
        "            if decided or",
        "    return Training(": "    for key, trainer in trainers.items():\n"
        "        trainer.sae.W_dec.data.copy_(mean[key])\n    return Training(",
    },
    "a global variable": {
        "    s, device, fixed =": "    global SCALE\n    s, device, fixed =",
        "                take_steps(": "                SCALE = globals().get('SCALE', 1.0) * 0.5\n"
        "                for trainer in trainers.values():\n"
        "                    trainer.sae.b_dec.data.mul_(SCALE)\n"
        "                take_steps(",
    },
    "an attribute of a class": {
        "                take_steps(": "                Trainer.n_fillings = "
        "getattr(Trainer, 'n_fillings', 0) + 1\n"
        "                for trainer in trainers.values():\n"
        "                    trainer.sae.b_dec.data.mul_(Trainer.n_fillings)\n"
        "                take_steps(",
    },
    "a default argument": {
        "buffer: ActivationBuffer) -> Training": "buffer: ActivationBuffer, seen=[]) -> Training",
        "                take_steps(": "                seen.append(1)\n"
        "                for trainer in trainers.values():\n"
        "                    trainer.sae.b_dec.data.mul_(len(seen))\n"
        "                take_steps(",
    },
    "a memo": {
        "def train(": "SEEN = __import__('functools').cache(lambda: [])\n\n\ndef train(",
        "                take_steps(": "                SEEN().append(1)\n"
        "                for trainer in trainers.values():\n"
        "                    trainer.sae.b_dec.data.mul_(len(SEEN()))\n"
        "                take_steps(",
    },
    "an attribute of the buffer": {
        "                acts_LND = buffer.next": "                buffer.n = "
        "getattr(buffer, 'n', 0) + 1\n"
        "                acts_LND = buffer.n * buffer.next",
    },
    "an order that isn't saved": {
        "trainers=trainers, shuffles=shuffles)\n            buffer": "trainers=trainers)\n"
        "            buffer",
    },
}  # fmt: skip


def edit_train(monkeypatch: pytest.MonkeyPatch, toy, changes: dict[str, str]) -> None:
    """`train` with some lines changed, in a module that can be put back."""
    source = inspect.getsource(toy.train)
    for old, new in changes.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    monkeypatch.setattr(toy, "train", toy.train)
    exec(compile(source, toy.__file__, "exec", dont_inherit=False, flags=FUTURE), vars(toy))


FUTURE = annotations.compiler_flag


@pytest.mark.parametrize("what", LOST)
def test_what_no_trainer_holds_is_found_in_the_rehearsal(
    trained: Trained, toy, monkeypatch, what: str
) -> None:
    monkeypatch.setattr(toy, "SEEN", None, raising=False)
    edit_train(monkeypatch, toy, LOST[what])
    before = names(toy), names(toy.Trainer)
    problems = trained.problems()
    assert [*problems] == ["unresumable"], problems
    assert re.search(r"after a resume in the rehearsal \S.* differ", problems["unresumable"])
    assert before == (names(toy), names(toy.Trainer)), "left by the rehearsal"
    assert toy.train.__defaults__ in (None, ([],))


def names(place: object) -> set[str]:
    return {name for name in vars(place) if not name.startswith("__")}


def clock(t, x_BD):
    t.began = time.monotonic()
    return 1.0


def unseeded(t, x_BD):
    return float(numpy.random.default_rng().random())


@pytest.mark.parametrize(("step", "what"), [(clock, ".began"), (unseeded, ".sae.")])
def test_steps_that_are_not_reproducible_are_warned_of(
    trained: Trained, toy, monkeypatch, step: Callable, what: str
) -> None:
    edit_trainer(monkeypatch, toy, None, step)
    problems = trained.problems()
    assert [*problems] == ["irreproducible"]
    assert f"trainers[0, 0]{what}" in problems["irreproducible"]


@pytest.mark.parametrize("name, changes", [
    ("run_1", {}), ("run_7", {}), ("run_10", {}),
    ("run_1", dict(activation="relu", theta_rule="ascent")),
], ids=str)  # fmt: skip
def test_as_it_is_nothing_is_wrong_and_nothing_takes_turns(
    trained: Trained, toy, monkeypatch, name: str, changes: dict
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    small = dict(training_tokens=1536, buffer_tokens=512, dead_feature_window=128) | changes
    trained.settings = dataclasses.replace(settings_of(toy, name), **small)
    assert trained.problems() == {}
    log = trained.once(trained.run()).log
    assert log.looked and not log.in_turn and not log.generators
    assert not changes or same(trained.whole(), trained.in_pieces())


# What draws from the process's own generators.
DRAWS = {
    "torch": lambda t, x_BD: float(torch.rand(())),
    "dropout": lambda t, x_BD: float(nn.functional.dropout(x_BD, 0.5).mean()),
    "numpy": lambda t, x_BD: float(numpy.random.rand() + numpy.random.normal()),
    "python": lambda t, x_BD: random.random() + random.gauss(0, 1),
    "late": lambda t, x_BD: float(torch.rand(())) if t.n_steps > 3 else 0.0,
    "forked": lambda t, x_BD: forked_draw(),
}


def forked_draw() -> float:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return float(torch.rand(()))


@pytest.mark.parametrize("draw", DRAWS)
def test_a_step_that_draws_gives_the_same_alone_beside_others_and_after_a_resume(
    trained: Trained, toy, monkeypatch, draw: str
) -> None:
    def begin(trainer):
        trainer.n_steps = 0

    def step(trainer, x_BD):
        trainer.n_steps += 1
        return DRAWS[draw](trainer, x_BD)

    edit_trainer(monkeypatch, toy, begin, step)
    one_core = dict(layers=(2,), seeds=(1,))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    beside = trained.whole(seeds=(0, 1))
    assert trained.in_turn
    assert same(beside, trained.whole(seeds=(0, 1)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert same(beside, trained.whole(seeds=(0, 1))), "in turn"
    alone = trained.whole(**one_core)
    assert alone and all(torch.equal(beside[at], value) for at, value in alone.items())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert same(beside, trained.in_pieces(seeds=(0, 1)))
    assert trained.problems(seeds=(0, 1)) == {}


def test_what_is_drawn_at_the_beginning_depends_on_no_other_trainer(
    trained: Trained, toy, monkeypatch
) -> None:
    """By an SAE, by its untrained baseline and by a trainer."""
    initialize = toy.CustomSAE.initialize

    def more(sae, seed, mean_D):
        initialize(sae, seed, mean_D)
        with torch.no_grad():
            sae.b_enc.normal_(std=0.1).add_(numpy.random.rand() + random.random())

    monkeypatch.setattr(toy.CustomSAE, "initialize", more)
    edit_trainer(monkeypatch, toy, lambda t: setattr(t, "w", torch.rand(())), lambda t, _: t.w)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    both, alone = trained.whole(seeds=(0, 1)), trained.whole(layers=(2,), seeds=(1,))
    assert all(torch.equal(both[at], value) for at, value in alone.items())
    assert not torch.equal(both[2, 0, "b_enc"], both[2, 1, "b_enc"])
    stats = dict.fromkeys((0, 2), (torch.zeros(32), 1.0))
    saes = [toy.new_sae(trained.settings, 2, 1, stats[2], {}, 4) for _ in range(2)]
    assert torch.equal(saes[0].b_enc, saes[1].b_enc)


@pytest.mark.parametrize("draws", [torch.randn_like, lambda x: x * random.random()])
def test_a_harvest_that_draws_is_the_same_in_threads_and_after_a_resume(
    trained: Trained, toy, monkeypatch, draws: Callable
) -> None:
    acts = trained.lm.activations

    def noisy(tokens_BL, layers):
        return [a + 0.1 * draws(a) for a in acts(tokens_BL, layers)]

    monkeypatch.setattr(trained, "lm", copy.copy(trained.lm))
    monkeypatch.setattr(trained.lm, "activations", noisy, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = trained.whole()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert same(expected, trained.whole())
    assert same(expected, trained.in_pieces())
    assert trained.problems() == {}


def test_what_a_harvest_draws_does_not_depend_on_what_is_in_the_store(
    toy, toy_lm, own_cache: Path, monkeypatch
) -> None:
    text = types.SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)

    monkeypatch.setattr("harness.training.result_key", lambda *_, **__: {"a": 1})
    run = Run(settings_of(toy, "run_1"), toy_lm, keeps=True)

    def harvests() -> list[torch.Tensor]:
        torch.rand(random.randrange(99))
        cache = ActivationCache(run, text, lambda n: [torch.rand(len(run.settings.layers), 2, 3)])
        made = [cache.passes(1)[0] for _ in range(2)]
        cache.files.flush()
        return made

    made = harvests()
    (second_file,) = store_dir().glob("activations/*/000001.*")
    second_file.unlink()
    assert all(map(torch.equal, made, harvests()))


def test_a_state_holds_no_part_of_the_run_and_a_file_runs_no_code(
    trained: Trained, toy, toy_lm
) -> None:
    run = trained.run()
    holder = collections.UserDict(run=run, settings=run.settings, hf=toy_lm.hf, n=3)
    state = state_of(run, holder=holder)
    assert not any(node["kind"] == "tensor" for node in state["nodes"])
    other = collections.UserDict(run=run, settings=None, hf=None, n=0)
    restore(state, run, holder=other)
    assert other["hf"] is toy_lm.hf and other["n"] == 3 and other["run"] is run

    state = state_of(at=[numpy.random.default_rng(0)])
    (node,) = (node for node in state["nodes"] if node["kind"] == "reduced")
    node["data"]["maker"] = "os:system"
    for place in ([None], [numpy.random.default_rng(1)]):
        with pytest.raises(Unsavable, match="can't be made again"):
            restore(state, at=place)


def test_an_edit_that_can_not_be_resumed_says_so_at_the_start_and_in_the_records(
    toy, tmp_path: Path, own_cache: Path, monkeypatch, capsys
) -> None:
    """In the first lines, also where the rehearsal is found in the store; nothing is saved."""
    edit_train(monkeypatch, toy, LOST["a local variable"])
    for _ in range(2):
        assert run_command(toy, tmp_path / "run_1") == 0
        out = capsys.readouterr().out
        assert "this edit can't be resumed, so its training is not saved: after a resume" in out
        assert out.index("can't be resumed") < out.index("\ntrain: ") and "goes on" not in out
        (warning,) = [w for w in json.loads((tmp_path / "run_1" / "warnings.json").read_text())
                      if "can't be resumed" in w]  # fmt: skip
        assert "keep all that steps depend on as attributes of the trainer" in warning
        assert not list((own_cache / "store").glob("training/*/*.pt"))
