"""A training as far as it has come: what it is saved from, where, and how it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable
from typing import Any

import numpy
import torch

from harness.console import print_line
from harness.interfaces import TrainerLike
from harness.observation import OBSERVED
from harness.store import LEDGER, TENSORS, Shelf, plain


class Checkpoints:
    """A training as far as it has come, in the store under all that it depends on.

    Args:
        key: all that the training depends on; None: nothing is kept.
        every: seconds between two saves, at least.
        share: of the time that saving may take, at most.
    """

    def __init__(
        self, key: dict[str, Any] | None, every: float = 60.0, share: float = 0.025
    ) -> None:
        self.key = None if LEDGER.rehearsing else key
        self.every, self.share = every, share
        self.lock, self.cost, self.saved = None, 0.0, time.monotonic()
        if self.key is None:
            return
        self.shelf = Shelf("training", TENSORS, key)
        try:
            self.lock = self.shelf.lock()
        except OSError as error:
            self.shelf.complain(error)
            return
        if self.lock is None:
            print_line(
                "training: another process is at the same one and saves it; this one doesn't save"
            )

    def __enter__(self) -> Checkpoints:
        self.computing = OBSERVED.computing("training")
        self.computing.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self.computing.__exit__(*failure)
        self.close()

    def load(self) -> Any:
        """The state saved last, on the CPU; None where there is none that is whole.

        Sets torch's, numpy's and Python's own generators to where they stood.
        """
        if self.key is None:
            return None
        changed = LEDGER.changed(self.key)
        same = "code, settings, model, versions and machine"
        found = self.shelf.find("state")
        if found is None:
            if changed:
                print_line(f"training: anew, as this differs from the last attempt: {changed}")
            return None
        if found["part"] == 1:
            print_line(f"training: kept, as {same} are unchanged; not repeated")
        else:
            print_line(f"training: goes on at {100 * found['part']:.0f}%, as {same} are unchanged")
        LEDGER.reuses("training", quietly=True)
        self.note(found["part"])
        set_generator_states(found["generators"])
        return found["state"]

    def due(self) -> bool:
        """Whether to save: `every` has passed, and saving stays within its `share`."""
        return time.monotonic() - self.saved >= max(self.every, self.cost / self.share)

    def save(self, state: dict[str, Any], part: float) -> None:
        """Puts a state in the place of the one before, once it is on the disk.

        Where it can't be saved, that is said and training goes on.

        Args:
            state: tensors, numbers, strings, None; in dicts, lists and tuples.
            part: of the training that is done; 1: all of it.
        """
        if self.lock is None:
            return
        began = time.monotonic()
        try:
            whole = {"part": part, "state": state, "generators": generator_states()}
            if self.shelf.put("state", whole):
                self.note(part)
        except Exception as error:  # of what an edit has made of the state
            self.shelf.complain(error)
        self.saved = time.monotonic()
        self.cost = self.saved - began

    def note(self, part: float) -> None:
        """Tells the ledger how much of the training the store holds."""
        LEDGER.keeps("training" if part == 1 else f"training up to {100 * part:.0f}%")

    def close(self) -> None:
        """Lets other processes save the same training."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None


def state_of(trainer: TrainerLike) -> dict[str, Any]:
    """All that a trainer's next steps depend on, with whatever an edit gave to it or to its SAE."""
    return {
        "sae": trainer.sae.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "generator": trainer.generator.get_state(),
        "attributes": {type(thing).__name__: attributes(thing) for thing in (trainer, trainer.sae)},
    }


def restore(trainer: TrainerLike, state: dict[str, Any]) -> None:
    """Puts a trainer where another one of the same SAE stood at its `state_of`."""
    trainer.sae.load_state_dict(state["sae"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.generator.set_state(state["generator"])
    for thing, attributes in zip((trainer, trainer.sae), state["attributes"].values()):
        set_attributes(thing, attributes)


def attributes(thing: object) -> dict[str, Any]:
    """What an object holds beside parameters, modules, optimizers, generators and functions.

    So that what an edit adds to a trainer or an SAE is saved with it, and not lost.
    """
    others = (
        torch.nn.Module, torch.nn.Parameter, torch.optim.Optimizer, torch.Generator, torch.device,
        torch.dtype, Callable,
    )  # fmt: skip
    found = {name: value for name, value in vars(thing).items() if not name.startswith("_")}
    return {
        name: value
        for name, value in found.items()
        if not isinstance(value, others) and not dataclasses.is_dataclass(value)
    }


def plain_attributes(thing: object) -> dict[str, Any]:
    """Those attributes that could be saved."""
    found = {}
    for name, value in attributes(thing).items():
        with contextlib.suppress(TypeError):
            found[name] = plain(value)
    return found


def set_attributes(thing: object, attributes: dict[str, Any]) -> None:
    """Sets what `attributes` returned, tensors on the device they had."""
    for name, value in attributes.items():
        old = getattr(thing, name, None)
        on = old.device if isinstance(old, torch.Tensor) else None
        setattr(thing, name, value.to(on) if isinstance(value, torch.Tensor) and on else value)


def generator_states() -> dict[str, Any]:
    """The states of the generators that code draws from unless it is given one."""
    kind, keys, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), *rest),
        "python": random.getstate(),
    }


def set_generator_states(states: dict[str, Any]) -> None:
    """Sets what `generator_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    random.setstate(states["python"])
