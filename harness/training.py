"""A training's log and budget, and the activations that are kept for the next one."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.console import Progress, print_line
from harness.fingerprint import result_key, text_identity
from harness.generators import States, generators_of
from harness.gpu import CapturedSteps
from harness.interfaces import RunLike, SettingsLike
from harness.ledger import LEDGER
from harness.observation import OBSERVED
from harness.ranks import RANKS
from harness.store import ACTIVATIONS_GB, TensorCache
from harness.text import TokenStream
from harness.tracking import TRACKER

Key = tuple[int, int]  # layer and seed
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
        self.captured: CapturedSteps | None = None  # what takes the others, on a GPU
        self.generators: dict[tuple, States] = {}  # theirs, by what draws: see `generators_of`
        self.n_trainers = 0  # of all ranks; 0: those at hand
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
        TRACKER.records(self.records)  # a tracker begins anew with each attempt
        return self

    def __exit__(self, failed: type | None, *_: object) -> None:
        self.file.close()
        self.captured = None  # or its graphs' memory would be held as long as the log
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
        TRACKER.records(records)

    def _write(self, records: list[dict[str, Any]]) -> None:
        self.file.writelines(json.dumps(record) + "\n" for record in records)
        self.file.flush()

    @property
    def last(self) -> dict[tuple[int, int], dict[str, Any]]:
        """By layer and seed, the last record."""
        return {(record["layer"], record["seed"]): record for record in self.records}

    def located(self, key: Key, step: int, record: dict[str, Any]) -> dict[str, Any]:
        """A record with what it is of, and how fast the training is so far."""
        tokens = step * self.settings.batch
        where = {"step": step, "tokens": tokens, "layer": key[0], "seed": key[1]}
        return where | record | {"tokens_per_second": tokens / self.progress.seconds()}

    def is_budget_due(self) -> bool:
        """Whether the length is to be decided now: once, after 5% of it."""
        return not self.timed and self.done >= 0.05 * self.n_steps

    def fit_budget(self, evaluation: float) -> None:
        """Takes fewer steps where training and `evaluation` seconds would not fit the budget."""
        self.timed = True
        spent, budget = sum(self.seconds.values()), self.settings.budget_minutes * 60
        given = self.n_steps, self.done, spent, evaluation, budget
        self.n_steps, self.shortened = RANKS.by_first(steps_in_budget, *given)
        self.progress.total = self.n_steps * self.per_step


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
        """Where they are kept, unless they are too many; of several ranks by the first alone."""
        s, d_model = self.run.settings, self.run.language_model.d_model
        size = 2 if self.run.train_dtype == "bfloat16" else 4
        n_bytes = s.training_tokens * len(s.layers) * d_model * size
        key = None
        if RANKS.first and self.run.keeps and n_bytes <= ACTIVATIONS_GB * 1e9:
            given = {"harvest": self.harvest, "language model": self.run.language_model}
            more = {"dtype": self.run.train_dtype, **text_identity(s.training_text)}
            key = result_key("activations", self.run, given, with_callers=True, **more)
        return TensorCache("activations", key)

    def made(self, n: int) -> list[Tensor]:
        """The next n passes; what they draw doesn't depend on which others were in the store."""
        if hasattr(lm := self.run.language_model, "look"):
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
        if not RANKS.by_first(lambda: self.files.on):
            self.n_made += 1
            return self.made(min(n, PASSES))
        name = f"{self.number:06d}"
        stored = RANKS.by_first(self.files.find, name) if self.reading else None
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
        if not RANKS.by_first(lambda: self.files.on):
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
