"""Whether a training can go on from what it saves, and comes out the same twice: in miniature.

The rehearsal is the first of up to four passes. A second one, from the same start, tells whether
steps are reproducible. A third, in new objects, goes on from what the first has saved after two
steps, and a fourth from its end. What they come to is held against the first, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.errors import first_line
from harness.object_state import Unsavable, differences, fingerprint, state_of
from harness.store import read_tensors, write_tensors

CAN_NOT = "this edit can't be resumed, so its training is not saved"
KEEP = "keep all that steps depend on as attributes of the trainer or its SAE"
KEEP_OFF = "keep it off the trainer and its SAE, if no step depends on it"


class PassOver(BaseException):
    """A pass has come as far as it was meant to."""


class TrainingPass:
    """One pass. It stands where the store does, for `Checkpoints`, and sees what comes out.

    Args:
        folder: of the states that the first pass saves.
        start: the file that it goes on from; None: the beginning. until: "saved", at the first
            save, or "scored", where the SAEs are to be; None: it goes to its end and keeps states.
    """

    def __init__(self, folder: Path, start: Path | None = None, until: str | None = None) -> None:
        self.folder, self.start, self.until = folder, start, until
        self.files: list[Path] = []
        self.states: list[dict[str, str]] = []  # fingerprints
        self.scored: dict[str, str] | None = None
        self.problem: BaseException | None = None

    def find(self, name: str) -> Any:
        """The state that it goes on from."""
        return None if self.start is None else read_tensors(self.start)

    def put(self, name: str, whole: dict[str, Any]) -> bool:
        """Notes a state."""
        noted = fingerprint(whole["things"]) | fingerprint(whole["state"])
        noted |= fingerprint(whole["generators"], "generators")
        self.states.append({at: v for at, v in noted.items() if not _is_time(at)})
        if self.until is None:
            self.files.append(self.folder / f"{name}-{len(self.files)}.pt")
            with self.files[-1].open("wb") as file:
                write_tensors(whole, file)
        if self.until == "saved":
            raise PassOver
        return True

    def complain(self, error: Exception) -> None:
        """Notes why a state can't be saved."""
        self.problem = error

    def score(self, saes: dict[str, Any], given: object) -> None:
        """Notes the SAEs that are to be scored."""
        if self.scored is None:
            with contextlib.suppress(Unsavable):
                self.scored = fingerprint(state_of(given, saes=saes))
        if self.until == "scored":
            raise PassOver


def _is_time(name: str) -> bool:
    return name.startswith("log.") and "second" in name


def resume_problems(play: Callable[[TrainingPass], None], folder: Path) -> dict[str, str]:
    """What is wrong with resuming a training, and with its steps: a sentence each.

    Args:
        play: the run in miniature, from its start to its end or to a `PassOver`.
        folder: for what is saved meanwhile.
    Returns:
        "unresumable", where a training that goes on would not come out as one that was not
        interrupted; "irreproducible", where two from the same start don't; "untried".
    """
    def another(start: Path | None, until: str) -> TrainingPass:
        tried = TrainingPass(folder, start, until)
        try:
            play(tried)
        except PassOver:
            pass
        except Exception as error:
            tried.problem = tried.problem or error
        return tried

    first = TrainingPass(folder)
    play(first)
    if isinstance(first.problem, OSError):
        why = f"its state must fit into {folder.parent}, but did not ({first_line(first.problem)})"
        return {"untried": f"whether this edit can be resumed was not tried: {why}"}
    if first.problem:
        return {"unresumable": f"{CAN_NOT}: {first_line(first.problem)}; {KEEP_OFF}"}
    if not first.states:  # it saves nothing
        return {}
    found, again = {}, another(None, "saved")
    varying = differences(first.states[0], again.states[0]) if again.states else []
    if varying or again.problem:
        what = _listed(varying) if varying else f"the second failed ({_kind(again.problem)})"
        found["irreproducible"] = (
            "two trainings from the same start must come out the same, but in the rehearsal "
            f"{what}: seed what draws at random, and keep clocks off what is trained"
        )
    results = [name for name in varying if name.startswith("log.records") or ".sae." in name]
    for file in dict.fromkeys((first.files[0], first.files[-1])):
        on = another(file, "scored")
        differing = differences(first.states[-1], on.states[-1]) if on.states else []
        differing += differences(first.scored or {}, on.scored or {})
        if on.problem:
            why = f"a resume failed in the rehearsal ({_kind(on.problem)})"
        elif left := [name for name in differing if name not in varying and not results]:
            why = f"after a resume in the rehearsal {_listed(left)}"
        else:
            continue
        return found | {"unresumable": f"{CAN_NOT}: {why}; {KEEP}"}
    return found


def _kind(error: BaseException) -> str:
    name = "" if isinstance(error, Unsavable) else f"{type(error).__name__}: "
    return name + first_line(error)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} differ{'s' if len(names) == 1 else ''}"
