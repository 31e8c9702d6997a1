"""What a setting can be, checked where it is made, and the sentence that says so where it isn't."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic

from harness.errors import ExperimentError
from harness.verdict import OWN, without_effect

# A dataclass whose values must have their field's type and bounds: a bool is no number.
checked = pydantic.dataclasses.dataclass(
    frozen=True, config=pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
)


PLAINLY = {  # what pydantic says in other words
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "True or False",
    "string_type": "a string",
    "tuple_type": "a tuple",
}


def must_hold(settings: object, rules: dict[str, tuple[Any, str]]) -> None:
    """ValueError at the first rule that doesn't hold.

    Args:
        rules: by field, whether its value can be beside those of others, and what it must be.
    """
    for field, (holds, allowed) in rules.items():
        if not holds:
            raise ValueError(f"{field} must be {allowed}, but is {getattr(settings, field)!r}")


def sweep(
    name: str, given: dict[str, Any] | None = None, **values: Iterable[Any]
) -> dict[str, dict[str, Any]]:
    """Runs for a plan, one per value, or per combination of the values of several fields.

    `sweep("k", k_min=(8, 16))` is run_k_8 and run_k_16.

    Args:
        name: of the sweep. given: what all its runs have. values: by field, those that it takes.
    Raises:
        ExperimentError: a field has no values, or two runs would have one name.
    """
    runs: dict[str, dict[str, Any]] = {}
    for field, of in values.items():
        if isinstance(of, (str, bytes)) or not isinstance(of, Iterable):
            raise ExperimentError(
                f"sweep({name!r}): {field} must be a tuple of values, but is {of!r}: write "
                f"{field}=({of!r},)"
            )
    choices = {field: tuple(of) for field, of in values.items()}
    if not choices or not all(choices.values()):
        raise ExperimentError(
            f"sweep({name!r}) must have one or more values of one or more fields, but has "
            f"{choices}: such as sweep({name!r}, k_min=(8, 16))"
        )
    for combination in itertools.product(*choices.values()):
        changes = dict(zip(choices, combination))
        run = "_".join(["run", name, *map(word, combination)])
        if run in runs:
            raise ExperimentError(
                f"sweep({name!r}): the names of runs must differ, but two would be {run}: leave "
                "one value out, or write these runs into PLAN"
            )
        said = ", ".join(f"{field} {value}" for field, value in changes.items())
        runs[run] = {"description": said} | (given or {}) | changes
    return runs


def word(value: Any) -> str:
    """A value as the name of a folder can have it: 0p001, None, 1-2-4, alice-texts.

    run_3.1 is a run_3 that was set aside, so no number has its point.
    """
    if isinstance(value, (tuple, list)):
        return "-".join(map(word, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "-", re.sub(r"\.(?=\d)", "p", text))


def choose_profile(
    profiles: Iterable[str], runs: Path, home: Path, otherwise: str | None = None
) -> str:
    """The profile after which the folder of a run in `home` is named: smollm2/run_1 is of smollm2.

    Elsewhere SAE_PROFILE; or the only one there is; or `otherwise`, by default gemma-2-2b with
    CUDA and tinylm without.

    Args:
        runs: the folder that the run is put into. home: where experiment.py lies.
    Raises:
        ExperimentError: SAE_PROFILE is none of them, or another than the folder's.
    """
    profile, known, runs = os.environ.get("SAE_PROFILE"), list(profiles), runs.resolve()
    if profile and profile not in known:
        raise ExperimentError(
            f"SAE_PROFILE must be {' or '.join(known)}, but is {profile!r}: change or unset it"
        )
    if runs.parent == home and runs.name in known:
        if profile and profile != runs.name:
            raise ExperimentError(
                f"a run in {runs.name}/ is of that profile, but SAE_PROFILE is {profile!r}: "
                "unset it, or name another folder"
            )
        return runs.name
    if profile or len(known) == 1:
        return profile or known[0]
    if otherwise:
        return otherwise
    import torch  # here, as plan.py and the figures need it for nothing else

    return "gemma-2-2b" if torch.cuda.is_available() else "tinylm"


def settings_of_run(
    name: str, make: type, profile: dict[str, Any], plan: dict[str, dict[str, Any]]
) -> Any:
    """The settings of the run called `name`: the profile's, or what the plan has for that run.

    Args:
        make: their class, made by `checked`. profile: the fields that it sets; under the name of a
            run of the plan, those that this run has otherwise there; under "trainers", by the
            name of a trainer, those that its runs have. plan: of all runs.
    Raises:
        ExperimentError: see `checked_settings` and `check_trainer`.
    """
    if not isinstance(planned := plan.get(name, {}), dict):
        raise ExperimentError(
            f"PLAN[{name!r}] must be a dict of settings, but is {planned!r}: look for a comma too "
            "many or brackets too few in its line, such as dict(k_min=8)"
        )
    given = planned | (profile.get(name, {}) if name in plan else {})
    of_all = {field: value for field, value in profile.items() if field not in plan}
    of_trainer = of_all.pop("trainers", {})
    trainer = str((of_all | given).get("trainer", getattr(make, "trainer", OWN)))
    layers = of_all.get("layers", getattr(make, "layers", ()))
    tuned = of_layers(of_trainer.get(trainer, {}), layers, given)
    chosen = of_all | tuned | given
    settings = checked_settings(name, make, chosen)
    check_trainer(name, settings, given)
    return settings


def of_layers(
    tuned: dict[str, Any], layers: tuple[int, ...], given: dict[str, Any]
) -> dict[str, Any]:
    """A trainer's settings with the coefficients of a run's own layers; of others there are none.

    Args:
        tuned: with a coefficient for each of the profile's `layers`. given: what the plan sets.
    """
    values = tuned.get("sparsity_coefficient")
    if not isinstance(values, tuple) or given.get("layers", layers) == layers:
        return tuned
    by_layer, wanted = dict(zip(layers, values)), given["layers"]
    others = {field: value for field, value in tuned.items() if field != "sparsity_coefficient"}
    if not isinstance(wanted, tuple) or not by_layer.keys() >= {*wanted}:
        return others
    return others | {"sparsity_coefficient": tuple(by_layer[layer] for layer in wanted)}


def check_trainer(name: str, settings: Any, given: dict[str, Any]) -> None:
    """Holds what a run sets against what its trainer reads: what is ignored would mislead.

    Args:
        given: what the plan sets for it, whatever is the default or the profile's.
    Raises:
        ExperimentError: a setting has no effect, or there are too many or too few coefficients.
    """
    trainer = getattr(settings, "trainer", OWN)
    where = "change it at the top of experiment.py"
    if ignored := sorted(given.keys() & without_effect(trainer)):
        hint = ", whose L0 follows from sparsity_coefficient" if "k_min" in ignored else ""
        raise ExperimentError(
            f"{name}: {' and '.join(ignored)} must be left out, as nothing reads "
            f"{'it' if len(ignored) == 1 else 'them'} with trainer={trainer!r}{hint}: {where}"
        )
    values = getattr(settings, "sparsity_coefficient", None)
    if isinstance(values, (list, tuple)) and len(values) != len(settings.layers):
        raise ExperimentError(
            f"{name}: sparsity_coefficient must be one number, or one for each of the layers "
            f"{settings.layers}, but is {values!r}: {where}"
        )


def checked_settings(name: str, make: type, chosen: dict[str, Any]) -> Any:
    """The settings of the run called `name`.

    Args:
        make: their class, made by `checked`. chosen: the fields that it is given.
    Raises:
        ExperimentError: a field that doesn't exist, or a value that can't be, in one sentence.
    """
    try:
        return make(**chosen)
    except ValueError as error:
        invalid = error
    if not isinstance(invalid, pydantic.ValidationError):
        sentence = str(invalid)
    else:
        error = invalid.errors()[0]
        field = str(error["loc"][0]) if error["loc"] else ""
        if error["type"] == "unexpected_keyword_argument":
            raise ExperimentError(
                f"{name}: PLAN or PROFILES sets what Settings has no field for ({field!r}): "
                "see the list at the top of experiment.py"
            )
        sentence = error["msg"].removeprefix("Value error, ")
        if field:
            allowed = PLAINLY.get(error["type"], sentence.removeprefix("Input should be "))
            or_none = "None or " if getattr(make, field, "") is None else ""
            of = f" (of {chosen[field]!r})" if error["input"] != chosen[field] else ""
            sentence = f"{field} must be {or_none}{allowed}, but is {error['input']!r}{of}"
    raise ExperimentError(f"{name}: {sentence}: change it at the top of experiment.py")
