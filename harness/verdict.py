"""Better or worse: the arithmetic of means, paired differences and their intervals. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

PRIMARY = "mean_topk_probe_accuracy"  # the primary metric
PRIMARY_KS = (1, 2, 5)  # the primary metric averages the SAE's probes of 1, 2 and 5 features
MAX_L0_RATIO = 1.2  # runs whose L0 differ by more than 20% are not compared
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


def verdict(
    run: dict[str, list[float]], reference: dict[str, list[float]] | None, compare_to: str
) -> tuple[str, dict[str, float]]:
    """Is this run better than the one it is compared to?

    The paired difference of the primary metric over the seeds both have, with its 95% interval
    (Student's t). Not comparable where the mean L0 differ by over 20% or fewer than 3 seeds pair.

    Args:
        run, reference: lists per seed under "seed", `PRIMARY` and "l0" (the mean over layers);
            reference is None where there is no such run of the same profile and task set.
        compare_to: the reference's name, for the sentence.
    Returns:
        the sentence that follows "verdict: ", and its figures as numbers.
    """
    numbers = {PRIMARY: mean(run[PRIMARY]), "l0": mean(run["l0"])}
    if reference is None:
        missing = f"no complete {compare_to} of this profile and these probe_sets"
        return f"not comparable ({missing})", numbers
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
            f"{MIN_SEEDS} are needed{shown}, {l0s})",
            numbers,
        )
    low, high = numbers["ci95_low"], numbers["ci95_high"]
    figures = f"{numbers['difference']:+.4f} [{low:+.4f}, {high:+.4f}] against {compare_to}, {l0s}"
    larger, smaller = sorted((numbers["l0"], numbers["l0_reference"]), reverse=True)
    if larger > MAX_L0_RATIO * smaller:
        return f"not comparable ({figures})", numbers
    word = "better" if low > 0 else "worse" if high < 0 else "no difference"
    return f"{word} ({figures})", numbers
