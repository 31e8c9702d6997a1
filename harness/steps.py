"""The steps of several trainers: side by side on a CPU, as one graph on a GPU."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.checkpoints import share_trainers
from harness.console import print_line
from harness.errors import ExperimentError, error_context, first_line
from harness.generators import (
    States,
    TorchDraws,
    generator_states,
    generators_of,
    same_states,
    set_generator_states,
)
from harness.gpu import CapturedSteps, Results
from harness.interfaces import SettingsLike, TrainerLike
from harness.machine import in_threads, n_at_once, retain_memory_for_steps
from harness.object_state import Unsavable, restore, state_of
from harness.ranks import RANKS
from harness.store import place_for

if TYPE_CHECKING:
    from harness.training import TrainingLog

Key = tuple[int, int]  # layer and seed


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """The same with floats in place of tensors of one number, all fetched at once."""
    tensors = {name: value for name, value in record.items() if isinstance(value, Tensor)}
    if not tensors:
        return record
    fetched = torch.stack([value.detach().double() for value in tensors.values()]).tolist()
    return record | dict(zip(tensors, fetched))


def shown(records: list[dict[str, Any]]) -> str:
    """What progress says of the SAEs' last records: "fvu 0.27/0.31, L0 31/32, dead 0.08/0.05".

    Of each layer, the mean over its seeds.
    """
    names = {"fvu": ("fvu", ".2f"), "L0": ("l0", ".0f"), "dead": ("dead_fraction", ".2f")}
    layers: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        layers.setdefault(record["layer"], []).append(record)
    return ", ".join(
        f"{name} " + "/".join(format(fmean(r[key] for r in of), form) for of in layers.values())
        for name, (key, form) in names.items()
        if all(key in record for record in records)
    )


def named(key: Key) -> str:
    """An SAE, in words."""
    return "layer {}, seed {}".format(*key)


def replace_entries(
    optimizer: torch.optim.Optimizer, parameter: Tensor, index: tuple, which: Tensor,
    new: Tensor | float,
) -> None:  # fmt: skip
    """Changes entries of a parameter and forgets what an optimizer has of them.

    Args:
        index: of the entries, each once. which: of these, the ones that change. new: to what.
    """
    parameter[index] = torch.where(which, new, parameter[index])
    for moment in optimizer.state[parameter].values():
        if moment.shape == parameter.shape:
            moment[index] = torch.where(which, 0.0, moment[index])


def take_steps(
    settings: SettingsLike,
    trainers: dict[Key, TrainerLike],
    acts_LND: Tensor,
    shuffles: dict[int, torch.Generator],
    steps: range,
    log: TrainingLog,
) -> None:
    """Every trainer's steps on one filling of the buffer, each seed in an order of its own.

    Of several ranks each takes the steps of its own trainers; at the end all have every one.

    Args:
        trainers: by layer and seed. acts_LND: raw activations, a layer after the other.
        shuffles: by seed, what draws its order. steps: their numbers. log: it notes them as done.
    """
    orders = {
        seed: torch.randperm(acts_LND.shape[1], generator=shuffle).to(acts_LND.device)
        for seed, shuffle in shuffles.items()
    }

    def batch_of(key: Key, step: int) -> Tensor:
        layer, seed = key
        rows = orders[seed][(step - steps.start) * settings.batch :][: settings.batch]
        return acts_LND[settings.layers.index(layer)][rows]

    log.n_trainers, own = len(trainers), RANKS.own(trainers)
    records = run_side_by_side(own, batch_of, steps, log, acts_LND) if own else []
    log.add(steps, of_all_ranks(records, trainers, own, steps, log))
    if steps.stop == log.n_steps:
        share_trainers(trainers, log.given)


def of_all_ranks(
    records: list[dict[str, Any]], trainers: dict[Key, TrainerLike], own: dict[Key, TrainerLike],
    steps: range, log: TrainingLog,
) -> list[dict[str, Any]]:  # fmt: skip
    """The records of all trainers. The log gets what the others' steps draw from, for a resume."""
    if RANKS.size == 1:
        return records
    drawn = {of: states for of, states in log.generators.items() if of[1:3] in own}
    parts = RANKS.gathered((records, drawn))
    for _, drawn in parts:
        log.generators |= drawn
    records = [record for part, _ in parts for record in part]
    n_tokens = (len(trainers) - len(own)) * len(steps) * log.settings.batch
    log.progress.advance(n_tokens, shown([*{(r["layer"], r["seed"]): r for r in records}.values()]))
    return in_order_of_steps(records, trainers)


def in_order_of_steps(
    records: list[dict[str, Any]], trainers: dict[Key, TrainerLike]
) -> list[dict[str, Any]]:
    """Records by step, and then as the trainers stand."""
    keys = list(trainers)
    return sorted(records, key=lambda r: (r["step"], keys.index((r["layer"], r["seed"]))))


def run_side_by_side(
    trainers: dict[Key, TrainerLike],
    batch_of: Callable[[Key, int], Tensor],
    steps: range,
    log: TrainingLog,
    acts_LND: Tensor,
) -> list[dict[str, Any]]:
    """Takes the steps of several trainers; their records, in order of steps.

    On a CPU they advance side by side, each on its own cores: a step's operations are too small
    to be worth sharing. What a trainer computes does not depend on when the others run. Where a
    step draws from the process's own generators that takes turns, in which each trainer has
    states of its own: then all go back to where this filling of the buffer began. On a GPU all
    trainers' steps are launched together: see `CapturedSteps`.

    Args:
        trainers: by layer and seed.
        batch_of: the activations (B, D) of a layer and seed at a step.
        steps: the numbers of the steps to take. log: of what came before.
        acts_LND: the activations that batches are drawn from.
    Raises:
        ExperimentError: a loss is not finite.
    """
    given = trainers, batch_of, steps, log, acts_LND
    if log.in_turn or n_at_once(log.n_trainers or len(trainers), acts_LND.device) == 1:
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


def take_step(
    trainers: dict[Key, TrainerLike], x: dict[Key, Tensor], step: int, log: TrainingLog
) -> Results:
    """One step of the trainers that have a batch in x: its loss and its record, or None."""
    at = {key: trainers[key].at(step, log.n_steps) for key in x}
    if log.captured is not None:
        return log.captured.step(x, at, log.is_due(step))
    return {key: trainers[key].step(x[key], at[key], log.is_due(step)) for key in x}


def captured_steps(trainers: dict[Key, TrainerLike], log: TrainingLog) -> CapturedSteps | None:
    """What takes all trainers' steps together; None where they have schedules of their own."""
    given = [trainer.at(log.done, log.n_steps) for trainer in trainers.values()]
    if all(isinstance(at, tuple) for at in given):
        return CapturedSteps(trainers, log.given)
    why = "SAELens' trainers read values back and keep count of steps"
    if any(at is not None for at in given):
        why = "what a trainer's `at` gives its step is no named tuple"
    if not log.looked:
        print_line(f"steps are taken operation by operation, not as one graph: {why}")
    return None


def check_nothing_drawn(stood: States, looked: list[TorchDraws]) -> None:
    """Raises `Drawn` where the generators don't stand where they `stood`, or a look saw one."""
    if any(draws.seen for draws in looked) or not same_states(stood, generator_states()):
        raise Drawn


def advance(
    trainers: dict[Key, TrainerLike],
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
    stood, draws, records = generator_states(), {}, []
    last: dict[Key, dict] = {key: {} for key in trainers}

    def some_steps(keys: tuple[Key, ...], part: range) -> list[dict[str, Any]]:
        losses, found = ({key: [] for key in keys} for _ in range(2))
        with contextlib.ExitStack() as around:
            around.enter_context(error_context(" and ".join(map(named, keys))))
            if in_turn:
                of = "steps", *itertools.chain(*keys)
                around.enter_context(generators_of(*of, kept=log.generators))
            if not log.looked and log.captured is None:
                draws[keys] = around.enter_context(TorchDraws())
            for step in part:
                x = {key: batch_of(key, step) for key in keys}
                for key, (loss, record) in take_step(trainers, x, step, log).items():
                    losses[key].append(loss.clone())
                    if record:
                        found[key].append(log.located(key, step, numbers(record)))
            # Looked at once in a while: a GPU would have to wait for each step otherwise.
            for key in keys:
                if len(wrong := (~torch.stack(losses[key]).isfinite()).nonzero()):
                    at, before = int(wrong[0]), [last[key], *found[key]]
                    given = losses[key][: at + 1], part[at], batch_of(key, part[at]), before
                    raise broken_loss(*given, log.path.parent.name, named(key) if keys[1:] else "")
                last[key] = [last[key], *found[key]][-1]
        return [record for of_key in found.values() for record in of_key]

    if acts_LND.is_cuda and log.captured is None:
        log.captured = captured_steps(trainers, log)
    groups = [(key,) for key in trainers] if log.captured is None else [tuple(trainers)]
    # The first step alone: it shows most of what draws.
    parts = [steps[:1], *(steps[i : i + 32] for i in range(1, len(steps), 32))]
    with retain_memory_for_steps(log.settings, acts_LND.shape[-1]):
        for some in filter(None, (parts[:1], parts[1:])):
            of = some_steps, groups, some, acts_LND.device, in_turn, log.n_trainers
            with contextlib.closing(in_threads(*of)) as calls:
                for keys, part, found in calls:
                    if not in_turn:
                        check_nothing_drawn(stood, list(draws.values()))
                    records += found
                    n_tokens = len(keys) * len(part) * log.settings.batch
                    log.progress.advance(n_tokens, shown([r for r in last.values() if r]))
            log.looked = True
    if log.captured is not None:
        log.captured.forget_gradients()
    return in_order_of_steps(records, trainers)


def broken_loss(
    losses: list[Tensor], step: int, x_BD: Tensor, records: list[dict[str, Any]], run: str,
    of: str = "",
) -> ExperimentError:
    """What to raise where a loss is not finite; saves the batch that it came from.

    Args:
        losses: of consecutive steps, the last of them not finite. step: that one's number.
        x_BD: its activations. records: of its SAE, in order. run: the run's name.
        of: the SAE, where it isn't told otherwise.
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
        for name, value in [{}, *(r for r in records if r.get("step", step) < step)][-1].items()
        if isinstance(value, (int, float)) and name not in left_out
    )
    before = f"; the loss of the step before: {float(losses[-2]):.4g}" if len(losses) > 1 else ""
    return ExperimentError(
        f"{of}{': ' * bool(of)}the loss is {float(losses[-1])} at step {step} "
        f"({step * len(x_BD)} tokens){before}"
        + (f"; the last record: {values}" if values else "")
        + f"; {saved}: look at the loss for a division by 0 or the root of one, or lower lr"
    )
