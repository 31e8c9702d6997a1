"""A training's log, budget and checkpoints, and trainers that advance side by side."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.console import Progress, print_line
from harness.errors import ExperimentError, error_context, first_line
from harness.fingerprint import result_key, text_identity
from harness.fused_model import FusedLanguageModel
from harness.generators import (
    States,
    TorchDraws,
    generator_states,
    generators_of,
    same_states,
    set_generator_states,
)
from harness.interfaces import RunLike, SettingsLike, TrainerLike
from harness.ledger import LEDGER
from harness.machine import in_threads, n_at_once, retain_memory_for_steps
from harness.object_state import Unsavable, restore, state_of
from harness.observation import OBSERVED
from harness.store import ACTIVATIONS_GB, TensorCache, place_for
from harness.text import TokenStream

Key = tuple[int, int]  # layer and seed
TakeStep = Callable[[Key, int], tuple[Tensor, dict[str, Any] | None]]
PASSES = 8  # of the language model whose activations are stored in one file


class TrainingLog:
    """train_log.jsonl, and how far a training is: steps done and in all, its records and seconds.

    `with` opens the file and closes it.

    Args:
        settings: the run's.
        path: train_log.jsonl.
        saved: what `state` of an earlier attempt has returned: this one goes on from there.
        given: the run: what hangs on it is no part of a trainer.
    """

    SAVED = ("done", "n_steps", "timed", "shortened", "records", "seconds", "generators")

    def __init__(
        self, settings: SettingsLike, path: Path, saved: dict[str, Any] | None = None,
        given: object = None,
    ) -> None:  # fmt: skip
        self.settings, self.path, self.given = settings, path, given
        self.in_turn = False  # a step was seen to draw from the process's own generators
        self.looked = False  # the first one was looked at for that
        self.generators: dict[tuple, States] = {}  # theirs, by what draws: see `generators_of`
        self.done, self.n_steps = 0, settings.training_tokens // settings.batch
        self.timed = settings.budget_minutes is None
        self.shortened: str | None = None  # why it takes fewer steps than the settings say
        self.records: list[dict[str, Any]] = []
        self.seconds = {"seconds_harvest": 0.0, "seconds_training": 0.0}
        for name, value in (saved or {}).items():
            setattr(self, name, value)
        # A token counts when it is read, and when an SAE learns from it.
        self.per_step = (1 + len(settings.layers) * len(settings.seeds)) * settings.batch
        total = self.n_steps * self.per_step
        self.progress = Progress("train", total, "tokens read or learned")
        self.progress.resume(self.done * self.per_step, sum(self.seconds.values()))

    def __enter__(self) -> TrainingLog:
        self.file = self.path.open("w", encoding="utf-8")
        self._write(self.records)
        return self

    def __exit__(self, failed: type | None, *_: object) -> None:
        self.file.close()
        if not failed:
            self.progress.close()

    def state(self) -> dict[str, Any]:
        """What the next attempt goes on from."""
        return {name: getattr(self, name) for name in self.SAVED}

    @property
    def part(self) -> float:
        """The part of the training that is done."""
        return self.done / self.n_steps

    def next_steps(self) -> range:
        """The steps on the next filling of the buffer; empty at the end."""
        portion = max(self.settings.buffer_tokens // self.settings.batch, 1)
        return range(self.done, min(self.done + portion, self.n_steps))

    def is_due(self, step: int) -> bool:
        """Whether this step is to have a record."""
        return step % self.settings.log_every == 0 or step == self.n_steps - 1

    @contextlib.contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Adds the seconds that a block takes to `seconds[stage]`."""
        started = time.monotonic()
        yield
        self.seconds[stage] += time.monotonic() - started

    def add(self, steps: range, records: list[dict[str, Any]]) -> None:
        """Counts steps as done and writes their records."""
        self.done = steps.stop
        self.records += records
        self._write(records)

    def _write(self, records: list[dict[str, Any]]) -> None:
        self.file.writelines(json.dumps(record) + "\n" for record in records)
        self.file.flush()

    @property
    def last(self) -> dict[tuple[int, int], dict[str, Any]]:
        """By layer and seed, the last record."""
        return {(record["layer"], record["seed"]): record for record in self.records}

    def is_budget_due(self) -> bool:
        """Whether the length is to be decided now: once, after 5% of it."""
        return not self.timed and self.done >= 0.05 * self.n_steps

    def fit_budget(self, evaluation: float) -> None:
        """Takes fewer steps where training and `evaluation` seconds would not fit the budget."""
        self.timed = True
        spent, budget = sum(self.seconds.values()), self.settings.budget_minutes * 60
        self.n_steps, self.shortened = steps_in_budget(
            self.n_steps, self.done, spent, evaluation, budget
        )
        self.progress.total = self.n_steps * self.per_step


def run_side_by_side(
    trainers: dict[Key, TrainerLike],
    take_step: TakeStep,
    batch_of: Callable[[Key, int], Tensor],
    steps: range,
    log: TrainingLog,
    acts_LND: Tensor,
) -> list[dict[str, Any]]:
    """Takes the steps of several trainers; their records, in order of steps.

    On a CPU they advance side by side, each on its own cores: a step's operations are too small
    to be worth sharing. What a trainer computes does not depend on when the others run. Where a
    step draws from the process's own generators that takes turns, in which each trainer has
    states of its own: then all go back to where this filling of the buffer began.

    Args:
        trainers: by layer and seed.
        take_step: of a layer and seed and the number of a step: its loss, its record or None.
        batch_of: the activations (B, D) of a layer and seed at a step, for what goes wrong.
        steps: the numbers of the steps to take. log: of what came before.
        acts_LND: the activations that the batches are drawn from.
    Raises:
        ExperimentError: a loss is not finite.
    """
    given = trainers, take_step, batch_of, steps, log, acts_LND
    if log.in_turn or n_at_once(len(trainers), acts_LND.device) == 1:
        return advance(*given, in_turn=True)
    try:
        before = state_of(log.given, copied=True, trainers=trainers)
    except Unsavable:  # no way back
        return advance(*given, in_turn=True)
    stood, done = generator_states(), log.progress.done
    try:
        return advance(*given, in_turn=False)
    except Drawn:
        log.in_turn = True
    restore(before, log.given, trainers=trainers)
    set_generator_states(stood)
    log.progress.done = done
    return advance(*given, in_turn=True)


class Drawn(Exception):
    """While several trainers were at their steps, one drew from the process's own generators."""


def check_nothing_drawn(stood: States, looked: list[TorchDraws]) -> None:
    """Raises `Drawn` where the generators don't stand where they `stood`, or a look saw one."""
    if any(draws.seen for draws in looked) or not same_states(stood, generator_states()):
        raise Drawn


def advance(
    trainers: dict[Key, TrainerLike],
    take_step: TakeStep,
    batch_of: Callable[[Key, int], Tensor],
    steps: range,
    log: TrainingLog,
    acts_LND: Tensor,
    in_turn: bool,
) -> list[dict[str, Any]]:
    """See `run_side_by_side`. `in_turn`: one at a time, and each draws from states of its own.

    Raises:
        Drawn: it was not to be in turn, and has to be.
    """
    batch, stood = log.settings.batch, generator_states()
    last: dict[Key, dict[str, Any]] = {key: {} for key in trainers}
    draws: dict[Key, TorchDraws] = {}

    def some_steps(key: Key, part: range) -> list[dict[str, Any]]:
        layer, seed = key
        records, losses, looking = [], [], contextlib.nullcontext()
        if in_turn:
            looking = generators_of("steps", layer, seed, kept=log.generators)
        elif not log.looked and part is parts[0]:
            looking = draws[key] = TorchDraws()
        with error_context(f"layer {layer}, seed {seed}"), looking:
            for step in part:
                loss, record = take_step(key, step)
                losses.append(loss)
                if record:
                    tokens = step * batch
                    where = {"step": step, "tokens": tokens, "layer": layer, "seed": seed}
                    speed = {"tokens_per_second": tokens / log.progress.seconds()}
                    records.append(where | record | speed)
            # Looked at once in a while: a GPU would have to wait for each step otherwise.
            if len(wrong := (~torch.stack(losses).isfinite()).nonzero()):
                step, so_far = part[int(wrong[0])], losses[: int(wrong[0]) + 1]
                records = [last[key], *(r for r in records if r["step"] < step)]
                x_BD, values = batch_of(key, step), [float(loss) for loss in so_far]
                raise broken_loss(values, step, x_BD, records[-1], log.path.parent.name)
        last[key] = records[-1] if records else last[key]
        return records

    records: list[dict[str, Any]] = []
    # The first step alone: it shows most of what draws.
    parts = [steps[:1], *(steps[i : i + 32] for i in range(1, len(steps), 32))]
    calls = in_threads(some_steps, list(trainers), parts, acts_LND.device, in_turn)
    with retain_memory_for_steps(log.settings, acts_LND.shape[-1]), contextlib.closing(calls):
        for _, part, found in calls:
            if not in_turn:
                check_nothing_drawn(stood, list(draws.values()))
            records += found
            note = "fvu " + "/".join(f"{r['fvu']:.2f}" for r in last.values() if r)
            log.progress.advance(len(part) * batch, note)
    place = {key: index for index, key in enumerate(trainers)}
    log.looked = True
    return sorted(records, key=lambda r: (r["step"], place[r["layer"], r["seed"]]))


class ActivationStats(NamedTuple):
    """What the SAEs of a layer are centred and scaled by."""

    mean_D: Tensor  # in raw units
    norm_scaling_factor: float  # s with E‖s x‖² = D

    @classmethod
    def of(cls, acts_ND: Tensor) -> ActivationStats:
        """Of a layer's raw activations."""
        total_D, squares = torch.zeros_like(acts_ND[0], dtype=torch.float64), 0.0
        for part_ND in acts_ND.split(8192):  # float64 in parts: all of it would take gigabytes
            total_D += part_ND.double().sum(0)
            squares += float(part_ND.double().pow(2).sum())
        factor = math.sqrt(acts_ND.numel() / squares)
        return cls((total_D / len(acts_ND)).float(), factor)


class ActivationCache:
    """Harvested activations, kept for the next run on the same text and language model.

    A file holds those of `PASSES` forward passes, and where the text stands after them.

    Args:
        run: the run. stream: the text. It is read, and its thread started, only from where the
            store ends.
        harvest: makes that many passes on the stream: a tensor (layers, N, D) of each. They are
            kept under what it is when it is called first.
    """

    def __init__(
        self, run: RunLike, stream: TokenStream, harvest: Callable[[int], list[Tensor]]
    ) -> None:
        self.run, self.stream, self.harvest = run, stream, harvest
        self.number = 0  # of the next file
        self.n_made = 0  # harvests that are in no file
        self.after: dict[str, Any] | None = None  # where the text stands, if the stream doesn't
        self.said: list[str] | None = None  # of activations that are far longer than others
        self.reading = True

    def key_parts(self) -> None:
        """Nothing of it changes what it holds: see `harness.identity`."""

    @functools.cached_property
    def files(self) -> TensorCache:
        """Where they are kept, unless they are too many."""
        s, d_model = self.run.settings, self.run.language_model.d_model
        size = 2 if self.run.train_dtype == "bfloat16" else 4
        n_bytes = s.training_tokens * len(s.layers) * d_model * size
        key = None
        if self.run.keeps and n_bytes <= ACTIVATIONS_GB * 1e9:
            given = {"harvest": self.harvest, "language model": self.run.language_model}
            more = {"dtype": self.run.train_dtype, **text_identity(s.training_text)}
            key = result_key("activations", self.run, given, with_callers=True, **more)
        return TensorCache("activations", key)

    def made(self, n: int) -> list[Tensor]:
        """The next n passes; what they draw doesn't depend on which others were in the store."""
        if isinstance(lm := self.run.language_model, FusedLanguageModel):
            lm.look()
        draws = generators_of("harvest", self.number, self.n_made, kept={})
        with OBSERVED.computing("activations"), draws:
            return self.harvest(n)

    def passes(self, n: int) -> list[Tensor]:
        """The activations of the next forward passes: n, or `PASSES` at most."""
        acts = self.next_passes(n)
        if self.said is None:
            self.say(far_longer(self.run.settings, acts))
        return acts

    def say(self, said: list[str] | None) -> None:
        """Warns of what was seen in the first passes; None: they are to come."""
        self.said = said
        for sentence in said or ():
            LEDGER.warns(sentence)

    def next_passes(self, n: int) -> list[Tensor]:
        """See `passes`."""
        if not self.files.on:
            self.n_made += 1
            return self.made(min(n, PASSES))
        name = f"{self.number:06d}"
        stored = self.files.find(name) if self.reading else None
        self.number += 1
        if stored is not None:
            self.after = stored["after"]
            return stored["acts"]
        self.reading = False
        if self.after is not None:
            self.stream.load_state_dict(self.after)
            self.after = None
        acts = self.made(PASSES)
        # The list is the caller's to change, while the tensors are still being written.
        self.files.keep(name, {"acts": list(acts), "after": self.stream.state_dict()})
        return acts

    def state_dict(self) -> dict[str, Any]:
        """Where the store and the text stand, once what it counts is on the disk."""
        self.files.flush()
        stands = self.after or self.stream.state_dict()
        counts = {"number": self.number, "n_made": self.n_made, "said": self.said}
        return {**counts, "stream": stands}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another one stood."""
        self.number, self.n_made = state["number"], state["n_made"]
        self.say(state["said"])
        if not self.files.on:
            self.stream.load_state_dict(state["stream"])
        else:
            self.after = state["stream"]


def far_longer(settings: SettingsLike, passes: list[Tensor], times: int = 10) -> list[str]:
    """A sentence for each layer some of whose activations are over ten times as long as most.

    Args:
        passes: of the first passes, (layers, N, D) each.
    """
    said = []
    for at, layer in enumerate(settings.layers):
        norms_N = torch.cat([acts_LND[at].float().norm(dim=1) for acts_LND in passes])
        median = float(norms_N.median())
        if n_far := int((norms_N > times * median).sum()):
            said.append(
                f"layer {layer}: {n_far} of the first {len(norms_N)} activations are over {times} "
                f"times as long as the median, {median:.3g} (the longest {norms_N.max():.3g}), and "
                "weigh accordingly in mean, scale and FVU"
            )
    return said


def steps_in_budget(
    n_steps: int, done: int, spent: float, evaluation: float, budget: float
) -> tuple[int, str | None]:
    """The steps that fit into a budget: a multiple of 5% of `n_steps`; why they are fewer, or None.

    Never under twice the steps done, so that the schedules that depend on the total come to their
    ends.

    Args:
        spent: seconds that the steps done took. evaluation, budget: seconds.
    """
    whole = spent * n_steps / done
    if whole + evaluation <= budget:
        return n_steps, None
    least = math.ceil(20 * 2 * done / n_steps)
    twentieths = min(max(math.floor(20 * (budget - evaluation) / whole), least), 20)
    if twentieths == 20:
        return n_steps, None
    reason = (
        f"training is shortened to {5 * twentieths}% of training_tokens: all of it would take "
        f"{whole / 60:.3g} minutes, and evaluation about {evaluation / 60:.3g}, "
        f"of {budget / 60:.3g} (budget_minutes)"
    )
    print_line(reason)
    return n_steps * twentieths // 20, reason


def broken_loss(
    losses: Sequence[float], step: int, x_BD: Tensor, last: dict[str, Any], run: str
) -> ExperimentError:
    """What to raise where a loss is not finite; saves the batch that it came from.

    Args:
        losses: of consecutive steps, the last of them not finite. step: that one's number.
        x_BD: its activations. last: the last record before it. run: the run's name.
    """
    from safetensors.torch import save_file

    path = place_for("failures") / f"{run}-step-{step}-{os.getpid()}.safetensors"
    try:
        save_file({"x_BD": x_BD.contiguous()}, path)
        saved = f"its batch is in {path} (x_BD)"
    except Exception as error:
        saved = f"its batch could not be saved ({first_line(error)})"
    left_out = ("tokens", "layer", "seed", "tokens_per_second")
    values = ", ".join(
        f"{name} {value:.4g}"
        for name, value in last.items()
        if isinstance(value, (int, float)) and name not in left_out
    )
    before = f"; the loss of the step before: {losses[-2]:.4g}" if len(losses) > 1 else ""
    return ExperimentError(
        f"the loss is {losses[-1]} at step {step} ({step * len(x_BD)} tokens){before}"
        + (f"; the last record: {values}" if values else "")
        + f"; {saved}: look at the loss for a division by 0 or the root of one, or lower lr"
    )
