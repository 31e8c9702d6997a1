"""Better or worse, and what can be compared: means, paired differences, intervals. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Lists = dict[str, list[float]]  # of a run, per seed: "seed", `PRIMARY`, "l0" (the mean over layers)

PRIMARY = "mean_topk_probe_accuracy"  # the primary metric
PRIMARY_KS = (1, 2, 5)  # the primary metric averages the SAE's probes of 1, 2 and 5 features
MAX_L0_RATIO = 1.2  # runs whose L0 differ by more than 20% are not compared
# A curve over L0 is read between two of its runs that are at most so many times apart. The line
# lies under the curve: over a factor of 4 by 0.013 in the mean (docs/method.md, At another L0).
MAX_L0_STEP = 2.5
MIN_SEEDS = 3  # nor are runs that share fewer seeds
OLD_NAMES = {  # in records of before 2026-11-27: what is called so now
    "primary": PRIMARY,
    "primary_reference": f"{PRIMARY}_reference",
    "loss_frequency": "loss_density",
    "frequency_weight": "density_penalty",
    "fix_at": "constants_from_run",
    "dead_after": "dead_feature_window",
    "form": "loss_variant",
    "selection": "activation",
}
OLD_ACTIVATIONS = {"token": "topk", "threshold": "jumprelu"}  # the same of that setting's values
# Settings that the records of before 2026-11-28 lack: what they were.
BEFORE = {
    "activation": "topk", "density_penalty": 0.0, "threshold_rate": 0.05, "hook": "resid_post",
    "first_positions": 1, "resample_every": 1, "trainer": "contrastive",
    "sparsity_coefficient": None, "gamma_rate": 0.01, "theta_rule": "descent",
}  # fmt: skip
LISTS_OF_SETTINGS = {"PROFILES", "PLAN"}  # of experiment.py: what they say is in a run's settings
OWN = "contrastive"  # this project's trainer
SELECTING = ("topk", "batchtopk", "matryoshka_batchtopk")  # SAELens' trainers whose L0 is k,
PENALISED = ("standard", "jumprelu", "jumprelu_tanh", "gated")  # and those with a coefficient
OF_OWN = {  # settings that mean nothing to SAELens'
    "loss_variant", "tau_sel", "tau_pen", "gamma", "constants_from_run", "reg_lambda",
    "activation", "threshold_rate", "gamma_rate", "theta_rule", "curriculum", "k_start_factor",
    "curriculum_fraction", "theta_lr", "resample", "resample_every",
}  # fmt: skip

# What makes figures comparable: settings, and entries of `facts`, that begin so. All others may
# vary, and the verdict names those that do: also a setting that an edit adds.
MUST_BE_EQUAL = (
    "profile", "language model", "lm_dtype", "layers", "hook", "context", "first_positions",
    "training_text", "core_", "probe_", "code of probe",
)  # fmt: skip
OF_EVALUATION = ("core_", "probe_", "code of ")  # of these: what no SAE's weights depend on
CONTENTS = {  # settings that name a text or a model, as the verdict calls them
    "model": "language model",
    "training_text": "training_text",
    "core_text": "core_text",
    "probe_sets": "probe_sets",
}
SIZES_OF_TEXTS = {"probe_train", "probe_test", "probe_seed", "context", "language model"}
OTHER = "of other content"
ASIDE = {  # say nothing of an SAE or its figures, or are compared otherwise (`facts`, seeds)
    "description", "compare_to", "device", "log_every", "track", "budget_minutes", "seeds",
    "probe_llm_batch", "probe_sae_batch", "core_prompts", "core_reconstruction_batches",
    "core_sparsity_batches", "extra_evals", "sae_probes_sets",
}  # fmt: skip


def without_effect(trainer: str) -> set[str]:
    """The settings that mean nothing to a trainer, as far as it is known here."""
    if trainer in SELECTING:
        return OF_OWN | {"sparsity_coefficient"}
    if trainer in PENALISED:
        return OF_OWN | {"density_penalty", "k_min"}
    return {"sparsity_coefficient"} if trainer == OWN else set()


def with_current_names(record: dict[str, Any]) -> dict[str, Any]:
    """A record, or a part of one, whose old names are replaced by those of now."""
    current = {OLD_NAMES.get(name, name): value for name, value in record.items()}
    if "selection" in record:
        current["activation"] = OLD_ACTIVATIONS[record["selection"]]
    return current


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def stderr(values: Sequence[float]) -> float:
    """sd (ddof 1) / √n; 0 for one value."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def summarize(per_seed: dict[str, list[float]]) -> dict[str, dict]:
    """{metric: a value per seed} as the entry of final_info.json: means, stderrs, the values."""
    return {
        "means": {metric: mean(values) for metric, values in per_seed.items()},
        "stderrs": {metric: stderr(values) for metric, values in per_seed.items()},
        "final_info_dict": per_seed,
    }


def primary_metric(layers: Iterable[dict[str, list[float]]]) -> list[float]:
    """The primary metric of each seed: the mean over layers of (top_1 + top_2 + top_5) / 3.

    Args:
        layers: for each layer {metric: a value per seed}, with `sae_top_{k}_test_accuracy`.
    """
    per_layer = [
        [mean(values) for values in zip(*(layer[f"sae_top_{k}_test_accuracy"] for k in PRIMARY_KS))]
        for layer in layers
    ]
    return [mean(values) for values in zip(*per_layer)]


def paired_difference(mine: dict[int, float], theirs: dict[int, float]) -> dict[str, float]:
    """The paired difference, mine − theirs, of a figure that both have by seed.

    Returns:
        `n_paired_seeds`; with one or more of them `difference`, the mean; from 3 on `ci95_low` and
        `ci95_high`, its 95% interval, and `p`, two-sided (both by Student's t).
    """
    from scipy import stats

    differences = [value - theirs[seed] for seed, value in mine.items() if seed in theirs]
    found: dict[str, float] = {"n_paired_seeds": len(differences)}
    if differences:
        found["difference"] = centre = mean(differences)
    if len(differences) >= MIN_SEEDS:
        error, free = stderr(differences), len(differences) - 1
        half = float(stats.t.ppf(0.975, free)) * error
        p = 2 * float(stats.t.sf(abs(centre) / error, free)) if error else float(centre == 0)
        found |= {"ci95_low": centre - half, "ci95_high": centre + half, "p": p}
    return found


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjustment of p values, NaN staying NaN (Holm 1979, Scandinavian J. Statistics 6)."""
    known = sorted((p, i) for i, p in enumerate(ps) if math.isfinite(p))
    adjusted, so_far = [math.nan] * len(ps), 0.0
    for rank, (p, i) in enumerate(known):
        so_far = max(so_far, min(1.0, p * (len(known) - rank)))
        adjusted[i] = so_far
    return adjusted


def same_l0(mine: float, theirs: float) -> bool:
    """Whether two runs' L0 are close enough for a comparison; NaN is close to nothing."""
    return mine <= MAX_L0_RATIO * theirs and theirs <= MAX_L0_RATIO * mine


@dataclass(frozen=True)
class Comparison:
    """What two runs differ in, by name, each as "3 against 1, 2, 4".

    Attributes:
        unlike: of what must be equal; where there is any, their figures can't be compared.
        varied: of what an experiment may vary.
        unknown: what must be equal, and may not be: a record doesn't hold it.
    """

    unlike: dict[str, str]
    varied: dict[str, str]
    unknown: tuple[str, ...] = ()

    def reasons(self, but: tuple[str, ...] = ()) -> str:
        """ "layers 3 against 1, 2, 4; context 64 against 128", without names that begin so.

        A profile stands for all that it sets: where runs have two, it is named alone.
        """
        named = {name: v for name, v in self.unlike.items() if not name.startswith(but)}
        named = {"profile": named["profile"]} if "profile" in named else named
        return "; ".join(f"{name} {values}" for name, values in named.items())

    def also(self) -> str:
        """What a verdict has to name beside its figures, for the end of its brackets."""
        varied = ", ".join(f"{name} {values}" for name, values in self.varied.items())
        unknown = ", ".join(self.unknown)
        return (f"; differing in {varied}" if varied else "") + (
            f"; not recorded, so perhaps not equal: {unknown}" if unknown else ""
        )


def compare_records(mine: dict[str, Any], theirs: dict[str, Any]) -> Comparison:
    """What two runs differ in, from their config.json: may their figures be compared?

    The one rule for verdicts, tables, figures and `constants_from_run`. Language models are
    compared by their weights and texts by their content, as far as both records hold them, and
    by name otherwise.
    """
    ours, others = facts(mine), facts(theirs)
    unlike, varied, unknown = {}, {}, []
    trainers = {ours["trainer"], others["trainer"]} - {OWN}
    aside = set().union(*map(without_effect, trainers))  # of what one of them doesn't have
    for name in dict.fromkeys([*ours, *others]):
        if name in aside:
            continue
        a, b = ours.get(name), others.get(name)
        must, known = name.startswith(MUST_BE_EQUAL), name in ours and name in others
        if must and not known:
            unknown.append(name)
        elif not known and name.startswith(("version of ", "code of ")):
            continue  # a record may lack it for its age alone
        elif isinstance(a, Content) and isinstance(b, Content):
            equal = a.equals(b)
            if equal is False:
                unlike[name] = against(a.name, b.name)
            elif equal is None:
                unknown.append(name)
        elif name.startswith("code of ") and a != b:
            (unlike if must else varied)[name] = "edited"
        elif not same(a, b):
            (unlike if must else varied)[name] = against(a, b)
    if unlike.get("probe_sets") == OTHER and unlike.keys() & SIZES_OF_TEXTS:
        del unlike["probe_sets"]  # for their sizes, which are named
    return Comparison(unlike, varied, tuple(unknown))


@dataclass(frozen=True)
class Content:
    """A text or a language model: its name, and digests of what it holds, by how they are made."""

    name: Any
    digests: dict[str, Any]

    def equals(self, other: Content) -> bool | None:
        """Whether both hold the same; None where they have the same name and it isn't known."""
        for kind in ("content", "built-in"):
            if kind in self.digests and kind in other.digests:
                return self.digests[kind] == other.digests[kind]
        return None if same(self.name, other.name) else False


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """What a run's figures may depend on, by name, from its config.json."""
    given, versions = part_of(config, "settings"), part_of(config, "versions")
    settings = BEFORE | with_current_names(given)
    found = {name: config[name] for name in ("profile",) if name in config}
    for name, label in CONTENTS.items():
        if name in given:
            found[label] = Content(given[name], content_digests(config, name))
    found |= {name: v for name, v in settings.items() if name not in {*ASIDE, *CONTENTS}}
    prompts = settings.get("core_prompts")  # halved where memory is small, for twice the batches
    for kind in ("reconstruction", "sparsity"):
        if prompts and (batches := settings.get(f"core_{kind}_batches")):
            found[f"core_{kind}_contexts"] = prompts * batches
    # As it was trained: in whole steps, a budget may have shortened it, and "auto" is no precision.
    total, batch = settings.get("training_tokens"), settings.get("batch")
    if isinstance(total, int) and isinstance(batch, int):
        found["training_tokens"] = total - total % batch
    done = ("training_tokens", "train_dtype")
    found |= {name: config[name] for name in done if name in config}
    if "device" in config:
        found["device"] = str(config["device"]).split(":")[0]
    if processor := part_of(config, "hardware").get("processor"):
        found["processor"] = processor
    found |= {f"code of {function}": code for function, code in part_of(config, "code").items()}
    return found | {f"version of {name}": version for name, version in versions.items()}


def part_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    """An entry of config.json that holds others; empty where there is none."""
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def content_digests(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What config.json holds of the content that a setting names, by how it was digested."""
    content, files = part_of(config, "content"), part_of(config, "sha256")
    found = {"content": content[name]} if name in content else {}
    value = config["settings"][name]
    packages = {str(n).split("/")[0] for n in (value if isinstance(value, list) else [value])}
    of_package = "model.safetensors" if name == "model" else "manifest.tsv"
    file = f"{min(packages, default='')}/{of_package}"
    if file in files and len(packages) == 1:
        found["built-in"] = [value, files[file]]
    return found


def same(a: Any, b: Any) -> bool:
    """Whether values of a setting are equal; as JSON has it, a tuple is a list."""
    return list(a) == list(b) if {type(a), type(b)} <= {list, tuple} else a == b


def against(mine: Any, theirs: Any) -> str:
    """ "3 against 1, 2, 4"; of long lists what the other lacks."""
    texts = [as_text(mine), as_text(theirs)]
    if max(map(len, texts)) > 60 and {type(mine), type(theirs)} <= {list, tuple}:
        texts = [as_text([v for v in mine if v not in theirs] or "fewer"),
                 as_text([v for v in theirs if v not in mine] or "fewer")]  # fmt: skip
    if texts[0] == texts[1]:
        return OTHER
    return " against ".join(t if len(t) <= 60 else f"{t[:28]} … {t[-28:]}" for t in texts)


def as_text(value: Any) -> str:
    """A value of a setting in words: a tuple's with commas."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(as_text, value))
    return "none" if value is None else str(value)


@dataclass(frozen=True)
class Curve:
    """The reference's method at several L0.

    Attributes:
        points: {name of a run: its lists per seed}; see `harness.curves.reference_curve`.
        apart: why there is none, or why a run can't be held against it; for the sentence.
    """

    points: dict[str, Lists]
    apart: str = ""


def read_off(curve: Curve, run: Lists, metric: str = PRIMARY) -> tuple[list[str], dict]:
    """A metric of the curve at a run's mean L0, for each seed that is there.

    Between the two runs around that L0 each seed's value lies on the straight line between its
    own two, over log L0. Both runs weigh the same for all seeds, by their own mean L0.

    Returns:
        the names of the two, lower L0 first, of one where it has that L0 itself, and {seed:
        value}; nothing where the L0 is outside of the curve, or the two are too far apart. A run
        that shares fewer than 3 seeds is no part of it.
    """
    at, seeds = mean(run["l0"]), set(run["seed"])
    places = sorted(
        (mean(lists["l0"]), name)
        for name, lists in curve.points.items()
        if len(seeds & set(lists["seed"])) >= MIN_SEEDS
    )
    below = [place for place in places if 0 < place[0] <= at]
    above = [place for place in places if place[0] >= at]
    if not below or not above:
        return [], {}
    (low, left), (high, right) = below[-1], above[0]
    if high > MAX_L0_STEP * low:
        return [], {}
    part = math.log(at / low) / math.log(high / low) if high > low else 0.0
    lower, upper = (
        dict(zip(curve.points[name]["seed"], curve.points[name][metric])) for name in (left, right)
    )
    values = {s: (1 - part) * lower[s] + part * upper[s] for s in lower if s in upper}
    return list(dict.fromkeys([left, right])), values


def at_equal_l0(
    run: Lists, curve: Curve, compare_to: str, compared: Comparison
) -> tuple[str, dict[str, float]] | None:
    """The verdict against the reference's curve, see `verdict`; None where there is none."""
    names, values = read_off(curve, run)
    found = paired_difference(dict(zip(run["seed"], run[PRIMARY])), values)
    if curve.apart or "p" not in found:
        return None
    l0s = [mean(curve.points[name]["l0"]) for name in names]
    paired = [values[seed] for seed in run["seed"] if seed in values]
    found |= {f"{PRIMARY}_reference": mean(paired), "l0_reference": mean(run["l0"])}
    found |= {"l0_below": l0s[0], "l0_above": l0s[-1], "interpolated": 1.0, "comparable": 1.0}
    source = f"interpolated between {' and '.join(names)}" if len(names) > 1 else f"by {names[0]}"
    return (
        f"{word_for(found)} at equal L0 ({source}: {difference_text(found)} against {compare_to}'s "
        f"curve, L0 {mean(run['l0']):.1f} against {' and '.join(f'{l0:.1f}' for l0 in l0s)}"
        f"{compared.also()})",
        found,
    )


def word_for(found: dict[str, float]) -> str:
    if found["ci95_low"] > 0:
        return "better"
    return "worse" if found["ci95_high"] < 0 else "no difference"


def difference_text(found: dict[str, float]) -> str:
    low, high = found["ci95_low"], found["ci95_high"]
    return f"{found['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"


def verdict(
    run: Lists,
    reference: Lists | None,
    compare_to: str,
    compared: Comparison | None = None,
    curve: Curve | None = None,
) -> tuple[str, dict[str, float]]:
    """Is this run better than the one it is compared to?

    The paired difference of the primary metric over the seeds both have, with its 95% interval
    (Student's t). Where the mean L0 differ by over 20%, it is the difference to the reference's
    curve at the run's L0, if there is one. Not comparable where there is none, where what must be
    equal isn't, or where fewer than 3 seeds pair.

    Args:
        run, reference: `Lists`; reference is None where there is no such run.
        compare_to: the reference's name, for the sentence; where there is none, what is missing.
        compared: what they differ in. curve: of the reference.
    Returns:
        the sentence that follows "verdict: ", and its figures as numbers; "comparable" is 1 where
        it is better, worse or no difference, and "interpolated" is 1, and there, where it is so
        on the curve.
    """
    numbers = {PRIMARY: mean(run[PRIMARY]), "l0": mean(run["l0"]), "comparable": 0.0}
    if reference is None:
        return f"not comparable ({compare_to})", numbers
    compared = compared or Comparison({}, {})
    if compared.unlike:
        return f"not comparable ({compared.reasons()})", numbers
    numbers |= {
        f"{PRIMARY}_reference": mean(reference[PRIMARY]),
        "l0_reference": mean(reference["l0"]),
    }
    primaries = (dict(zip(lists["seed"], lists[PRIMARY])) for lists in (run, reference))
    numbers |= paired_difference(*primaries)
    l0s = f"L0 {numbers['l0']:.1f} against {numbers['l0_reference']:.1f}"
    if "p" not in numbers:
        shown = f", difference {numbers['difference']:+.4f}" if "difference" in numbers else ""
        return (
            f"not comparable ({numbers['n_paired_seeds']} seeds shared with {compare_to}, "
            f"{MIN_SEEDS} are needed{shown}, {l0s}{compared.also()})",
            numbers,
        )
    figures = f"{difference_text(numbers)} against {compare_to}, {l0s}"
    if same_l0(numbers["l0"], numbers["l0_reference"]):
        return f"{word_for(numbers)} ({figures}{compared.also()})", numbers | {"comparable": 1.0}
    curve = curve or Curve({})
    if read := at_equal_l0(run, curve, compare_to, compared):
        return read[0], numbers | read[1]
    apart = curve.apart
    if len(curve.points) > 1:
        at = sorted(mean(lists["l0"]) for lists in curve.points.values())
        apart = f"{compare_to}'s curve has L0 {', '.join(f'{l0:.1f}' for l0 in at)} and is read " \
                f"between two that are at most {MAX_L0_STEP:g} times apart"  # fmt: skip
    apart = f"; {apart}" if apart else ""
    return f"not comparable ({figures}{apart}{compared.also()})", numbers
