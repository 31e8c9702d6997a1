"""A training as far as it has come: what it is saved from, where, and how it goes on."""

from __future__ import annotations

import math
import time
from typing import Any

from harness import object_state
from harness.console import print_line
from harness.errors import ExperimentError
from harness.generators import generator_states, seed_generators, set_generator_states
from harness.ledger import LEDGER
from harness.object_parts import Unsavable
from harness.observation import OBSERVED
from harness.ranks import RANKS
from harness.store import TENSORS, Shelf, plain


def share_trainers(trainers: dict[Any, Any], given: object, by_first: bool = False) -> None:
    """Puts every trainer, as far as it has come on its own rank, in its place on the others.

    Args:
        given: what hangs on it is not shared. by_first: on the first rank alone.
    """
    if RANKS.size == 1:
        return
    own = RANKS.own(trainers)
    of_own = plain(object_state.state_of(given, trainers=own))
    for keys, state in RANKS.gathered(([*own], of_own), by_first):
        if keys and keys[0] not in own:
            some = {key: trainers[key] for key in keys}
            object_state.restore(state, given, trainers=some)
            trainers.update(some)


class Checkpoints:
    """A training as far as it has come, in the store under all that it depends on.

    Of several ranks the first reads and saves it, as a run of one process does: so it goes on with
    another number of them.

    Args:
        key: all that the training depends on; None: nothing is kept.
        every: seconds between two saves, at least.
        share: of the time that saving may take, at most.
        given: the run: what hangs on it is not saved with what is trained.
        rehearsal: what finds and puts states instead of the store (see `harness.rehearsal`).
    """

    def __init__(
        self, key: dict[str, Any] | None, every: float = 60.0, share: float = 0.025,
        given: object = None, rehearsal: Any = None,
    ) -> None:  # fmt: skip
        self.key = None if LEDGER.rehearsing else key
        self.every, self.share, self.given = every, share, given
        self.lock, self.cost, self.saved = None, 0.0, time.monotonic()
        self.found: dict[str, Any] | None = None  # what `load` has read
        self.shelf = rehearsal
        if rehearsal is not None:  # after every filling of the buffer
            self.every, self.share = 0.0, math.inf
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

        Sets torch's, numpy's and Python's own generators to where they stood, or to the beginning.
        """
        self.found = RANKS.by_first(self._find)
        if self.found is None:
            seed_generators("training")
            return None
        set_generator_states(self.found["generators"])
        return self.found["state"]

    def restore(self, **things: Any) -> None:
        """Puts newly made objects where those stood that `save` was given under these names.

        Raises:
            ExperimentError: they have no place for something. What was saved is set aside.
        """
        try:
            object_state.restore(self.found["things"], self.given, **things)
        except Unsavable as error:
            if self.key is None:
                raise
            for path in self.shelf.folder.glob("state.*.pt"):
                path.replace(path.with_name(f"{path.name}.damaged"))
            raise ExperimentError(
                f"what was saved of the training must fit into new objects, but {error}: it is "
                "set aside; give the same command again, and the training begins anew"
            ) from error
        set_generator_states(self.found["generators"])  # once more: making them may draw

    def _find(self) -> dict[str, Any] | None:
        return self._from_the_store() if self.key else self.shelf and self.shelf.find("state")

    def _from_the_store(self) -> dict[str, Any] | None:
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
        return found

    def due(self) -> bool:
        """Whether to save: `every` has passed, and saving stays within its `share`."""
        due = time.monotonic() - self.saved >= max(self.every, self.cost / self.share)
        return RANKS.by_first(lambda: due and self._saves())

    def _saves(self) -> bool:
        return self.shelf is not None and (self.key is None or self.lock is not None)

    def save(self, state: dict[str, Any], part: float, **things: Any) -> None:
        """Puts a state in the place of the one before, once it is on the disk.

        Where it can't be saved, that is said and training goes on.

        Args:
            state: tensors, numbers, strings, None; in dicts, lists and tuples.
            part: of the training that is done; 1: all of it.
            things: objects, with all that hangs on them (see `harness.object_state`).
        """
        began = time.monotonic()
        if not RANKS.by_first(self._saves):
            return
        if part < 1 and "trainers" in things:  # at the end all ranks have them
            share_trainers(things["trainers"], self.given, by_first=True)
        if not RANKS.first:
            return
        try:
            objects = object_state.state_of(self.given, **things)
            whole = {"part": part, "state": state, "things": objects}
            if self.shelf.put("state", whole | {"generators": generator_states()}) and self.key:
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
