"""What a run writes, and the checks that it can be right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import lzma
import math
import re
import sys
import tarfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.console import STAGE
from harness.errors import ExperimentError
from harness.evaluation.export import check_published
from harness.evaluation.probing import probing_config
from harness.interfaces import RunLike, SAELike, SettingsLike
from harness.language_model import hook_name
from harness.ledger import LEDGER
from harness.machine import peak_memory_gb
from harness.provenance import write_outcome
from harness.ranks import RANKS
from harness.reference import complete_folder, verdict_of
from harness.start import HERE, STARTED
from harness.store import write_json
from harness.tracking import TRACKER
from harness.training import TrainingLog
from harness.verdict import PRIMARY, mean, primary_metric, summarize

LOOSE = ("llm_top_1_test_accuracy", "llm_top_2_test_accuracy")  # probes of few dimensions vary


def read_final_info(run: Path) -> dict[str, Any]:
    """A run's final_info.json; an ExperimentError where it isn't complete."""
    path = run / "final_info.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExperimentError(
            f"constants_from_run={run.name!r} needs the final values in {path}, which can't be "
            f"read ({type(error).__name__}: {error}): run {run.name} first"
        ) from error


def constants(
    run: RunLike, names: tuple[str, ...]
) -> dict[tuple[int, int], dict[str, float]]:
    """By layer and seed: which of the named scalars are constants, and their values.

    Those that are set; with `constants_from_run` all of them, at that run's final values for the
    layer and seed.
    """
    s = run.settings
    keys = list(itertools.product(s.layers, s.seeds))
    if s.constants_from_run is not None:
        folder = complete_folder(s.constants_from_run, run.out_dir, run.runs)
        return final_values(folder or run.runs / s.constants_from_run, keys, names)
    given = {name: getattr(s, name) for name in names if getattr(s, name) is not None}
    return dict.fromkeys(keys, given)


def final_values(
    run: Path, keys: Iterable[tuple[int, int]], metrics: Sequence[str]
) -> dict[tuple[int, int], dict[str, float]]:
    """The final values of metrics in another run, by (layer, seed).

    A seed that the run doesn't have gets the mean over those that it has.

    Raises:
        ExperimentError: the run isn't complete, or lacks a layer or a metric.
    """
    info = read_final_info(run)
    found = {}
    try:
        seeds = info["verdict"]["final_info_dict"]["seed"]
        for layer, seed in keys:
            entry = info[f"layer_{layer}"]
            found[layer, seed] = {
                metric: entry["final_info_dict"][metric][seeds.index(seed)]
                if seed in seeds
                else entry["means"][metric]
                for metric in metrics
            }
    except KeyError as error:
        raise ExperimentError(
            f"constants_from_run={run.name!r} needs {error} in {run / 'final_info.json'}, which "
            f"has none: run {run.name} with the same layers, or name a run that has"
        ) from error
    return found


def pack(folder: str) -> None:
    """Packs the long files of a run, for the repository: the same bytes for the same files.

    SAE-Bench's files and theta.json become eval_results.tar.xz, train_log.jsonl becomes
    train_log.jsonl.xz, which plot.py reads. Core evaluation's files are long, with lists by
    feature: those of the first seed's trained SAEs are kept. Its figures are in final_info.json.
    """
    run = Path(folder)
    files = [*run.glob("eval_results/*/*.json"), *run.glob("sae/*/*/theta.json")]
    names = sorted(file.relative_to(run).as_posix() for file in files)
    seeds = [int(seed) for name in names for seed in re.findall(r"_seed_(\d+)_", name)]
    first = f"_seed_{min(seeds, default=0)}_custom"
    names = [name for name in names if "/core/" not in name or first in name]
    if not folder or not names or not (run / "train_log.jsonl").exists():
        sys.exit(f"make pack needs the folder of a complete run, and {folder!r} is none: "
                 "make pack RUN=run_11")  # fmt: skip
    with tarfile.open(run / "eval_results.tar.xz", "w:xz", preset=9) as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = (run / name).stat().st_size
            with (run / name).open("rb") as file:
                archive.addfile(entry, file)
    (run / "train_log.jsonl.xz").write_bytes(
        lzma.compress((run / "train_log.jsonl").read_bytes(), preset=9)
    )
    print(f"{run}: {len(names)} files and the log packed; now: git add {run}")


def against_given_baseline(
    settings: SettingsLike, layers: dict[str, dict[str, list[float]]]
) -> tuple[str, list[str]]:
    """The language model's own probes against those in run_0/, which don't depend on an SAE.

    Compared where model, layer and probing settings are the baseline's.

    Returns:
        a line with the largest difference, empty where there is nothing to compare; and warnings
        of what differs by over 0.01 (for the best 1 and 2 dimensions by over 0.02).
    """
    try:
        info = json.loads((HERE / "run_0" / "final_info.json").read_text())
        config = json.loads((HERE / "run_0" / "config.json").read_text())
    except (OSError, ValueError):
        return "", []
    if settings.model != config["model"]:
        return "", []
    if dataclasses.asdict(probing_config(settings)) != config.get("sparse_probing"):
        return "", []
    differences, warnings = {}, []
    for layer in layers.keys() & info.keys():
        for metric, given in info[layer]["means"].items():
            if not metric.startswith("llm_"):
                continue
            found = mean(layers[layer][metric])
            differences[f"{layer} {metric}"] = found - given
            allowed = 0.02 if metric in LOOSE else 0.01
            if abs(found - given) > allowed:
                warnings.append(
                    f"{layer}: {metric} is {found:.4f}, but {given:.4f} in the given baseline: "
                    f"more than {allowed} apart, so model, data or versions differ"
                )
    if not differences:
        return "", []
    where = max(differences, key=lambda key: abs(differences[key]))
    line = f"largest difference to the given baseline: {differences[where]:+.4f} ({where})"
    return line, warnings


def by_layer(
    figures: dict[tuple[int, int], dict[str, float]], settings: SettingsLike
) -> dict[str, dict[str, list[float]]]:
    """{layer_L: {metric: a value per seed}}, in the order of the settings' layers and seeds.

    Raises:
        ExperimentError: an SAE has no figures, or lacks one that another seed has, or it is no
            number.
    """
    keys = list(itertools.product(settings.layers, settings.seeds))
    if set(figures) != set(keys):
        raise ExperimentError(
            f"write_records must be given figures of these layers and seeds, {keys}, but was given "
            f"those of {list(figures)}: look at main"
        )
    layers: dict[str, dict[str, list[float]]] = {f"layer_{at}": {} for at in settings.layers}
    for layer, seed in keys:
        metrics = dict.fromkeys(m for other in settings.seeds for m in figures[layer, other])
        for metric in metrics:
            value = figures[layer, seed].get(metric)
            try:
                layers[f"layer_{layer}"].setdefault(metric, []).append(float(value))
            except (TypeError, ValueError) as error:
                raise ExperimentError(
                    f"{metric} must be a number for every seed, but is {str(value)[:80]!r} for "
                    f"layer {layer}, seed {seed}: record it for each SAE, or for none"
                ) from error
    return layers


def check_info(info: dict[str, dict]) -> None:
    """ExperimentError where a figure that is to be recorded can't be right."""
    for entry, content in info.items():
        for metric, values in content["final_info_dict"].items():
            for value in values:
                accuracy = metric.endswith("accuracy") or metric == PRIMARY
                if not math.isfinite(value) or (accuracy and not 0 <= value <= 1):
                    raise ExperimentError(
                        f"{entry}: {metric} is {value}, which can't be right, so nothing is "
                        "recorded: look at the code that the figure comes from"
                    )


def check_complete(out_dir: Path) -> None:
    """ExperimentError where a run has come to its end without its results."""
    if not (out_dir / "final_info.json").exists():
        raise ExperimentError(
            f"the run ended, but there is no {out_dir.name}/final_info.json: look for a return "
            "before write_records in main, or a yield, and at write_records"
        )


def check_results(
    saes: dict[str, SAELike], evaluation: dict[str, dict], settings: SettingsLike, out_dir: Path
) -> None:
    """Holds the SAEs against their export, and what SAE-Bench wrote: layer, hook, width, results.

    The given baseline was evaluated at one layer and recorded as another.

    Args:
        saes: by name, layer_L_seed_S or layer_L_seed_S_untrained. evaluation: see `evaluate`.
    Raises:
        ExperimentError: one lacks a result, or has another SAE's.
    """
    if not RANKS.first:
        return
    for name, sae in saes.items():
        _, layer, _, seed, *untrained = name.split("_")
        layer = int(layer)
        if not untrained:
            check_published(name, sae, out_dir / "sae" / f"layer_{layer}" / f"seed_{seed}")
        expected = {
            "layer": layer,
            "hook": hook_name(settings.hook, layer),
            "width": settings.d_sae,
        }
        found = {"layer": sae.cfg.hook_layer, "hook": sae.cfg.hook_name, "width": len(sae.W_dec)}
        where = {"the SAE itself": found}
        for kind, folder in (("core", "core"), ("probing", "sparse_probing")):
            files = list((out_dir / "eval_results" / folder).glob(f"{name}_custom_sae_*.json"))
            if len(files) != 1 or not evaluation.get(kind, {}).get(name):
                raise ExperimentError(
                    f"{folder} evaluation of {name} left no result in {out_dir / 'eval_results'}: "
                    "SAE-Bench skipped it, or the call was edited away"
                )
            cfg = json.loads(files[0].read_text())["sae_cfg_dict"]
            where[f"its {folder} result"] = {
                "layer": cfg["hook_layer"], "hook": cfg["hook_name"], "width": cfg["d_sae"],
            }  # fmt: skip
        for source, values in where.items():
            if values != expected:
                raise ExperimentError(
                    f"{name}: expected {expected}, but {source} has {values}; "
                    "results of one SAE must not be recorded as another's"
                )
        wanted = {
            f"{who}_top_{k}_test_accuracy"
            for who, width in (("sae", sae.cfg.d_sae), ("llm", sae.cfg.d_in))
            for k in settings.probe_ks if k <= width
        }  # fmt: skip
        if missing := wanted - evaluation["probing"][name].keys():
            raise ExperimentError(f"sparse probing of {name} lacks {sorted(missing)}: run it again")


def odd_results(layers: dict[str, dict[str, list[float]]], d_sae: int) -> list[str]:
    """What is odd in the metrics of the layers but may be true, a sentence each."""
    warnings = []
    for layer, metrics in layers.items():
        value = {metric: mean(values) for metric, values in metrics.items()}
        gap = value["ce_loss_with_ablation"] - value["ce_loss_without_sae"]
        top, untrained = value["sae_top_5_test_accuracy"], value["untrained_top_5_test_accuracy"]
        odd = {
            f"the codes are dense, L0 is {value['l0']:.0f}": value["l0"] > d_sae / 4,
            f"ce_loss_score says little: it divides by {gap:.3f}, what the language model's loss "
            "rises by with zeros in place of the layer": gap < 0.1,
            "over half of the features are dead": value["frac_alive"] < 0.5,
            f"FVU is {value['fvu']:.2f}: the mean reconstructs better": value["fvu"] > 1,
            "probing on the SAE's best 5 features is at chance": top < 0.55,
            f"the SAE's best 5 features ({top:.3f}) tell less than those of an untrained SAE "
            f"({untrained:.3f})": top < untrained,
        }
        warnings += [f"{layer}: {sentence}" for sentence, holds in odd.items() if holds]
    return warnings


def write_records(
    run: RunLike,
    figures: dict[tuple[int, int], dict[str, float]],
    shown: Iterable[str],
    log: TrainingLog,
    seconds: dict[str, float],
) -> None:
    """Writes warnings.json and, last, final_info.json; prints the closing block.

    Args:
        figures: of each SAE, by layer and seed.
        shown: the metrics to print. log: of the training. seconds: of the evaluation's stages.
    """
    if not RANKS.first:
        return
    STAGE.begin("records")
    settings = run.settings
    seconds = log.seconds | seconds | {"seconds_total": time.monotonic() - STARTED}
    counts = {
        "training_tokens": log.n_steps * settings.batch,
        "n_seeds": len(settings.seeds),
    }
    rows = {key: row | counts | seconds for key, row in figures.items()}
    layers = by_layer(rows, settings)
    overall = {
        "seed": [float(seed) for seed in settings.seeds],
        PRIMARY: primary_metric(layers.values()),
        "l0": [mean(values) for values in zip(*(metrics["l0"] for metrics in layers.values()))],
    }
    config = write_outcome(run.out_dir, counts["training_tokens"])
    sentence, numbers = verdict_of(run.out_dir, run.runs, config, overall)
    info = {name: summarize(metrics) for name, metrics in layers.items()}
    info["verdict"] = summarize(overall)
    info["verdict"]["means"] |= numbers
    baseline, differing = against_given_baseline(settings, layers)
    shortened = [log.shortened] if log.shortened else []
    odd = odd_results(layers, settings.d_sae)
    warnings = [*run.warnings, *shortened, *LEDGER.warnings, *odd, *differing]
    notes = [baseline] if baseline else []
    check_info(info)
    write_json(run.out_dir / "warnings.json", warnings)
    write_json(run.out_dir / "final_info.json", info)
    TRACKER.summary(info, log.n_steps)
    notes.append(results_line(run.out_dir.name, config, info["verdict"]["means"], sentence))
    print_closing_block(
        run.out_dir, run.profile, info, shown, seconds, warnings, notes, sentence
    )


def results_line(
    name: str, config: dict[str, Any], means: dict[str, float], sentence: str
) -> str:
    """A run in a line that a loop may append to its results.tsv, behind "results.tsv: ".

    Columns, with tabs between them: run, commit (with a + where the tree was changed; "-" without
    git), primary metric, L0, the verdict's word, what the run tests.

    Args:
        config: its config.json. means: of its verdict. sentence: the verdict's.
    """
    git = config["git"]
    commit = (git["commit"] or "-")[:7] + ("+" if git["commit"] and git["dirty"] else "")
    description = " ".join(config["settings"]["description"].split())
    figures = f"{means[PRIMARY]:.4f}", f"{means['l0']:.1f}"
    return "results.tsv: " + "\t".join(
        (name, commit, *figures, sentence.split(" (")[0], description)
    )


def print_closing_block(
    out_dir: Path,
    profile: str,
    info: dict[str, dict],
    shown: Iterable[str],
    seconds: dict[str, float],
    warnings: list[str],
    notes: list[str],
    sentence: str,
) -> None:
    """The last thing a run prints: `key: value` lines that grep can read, the verdict last.

    Args:
        info: final_info.json. shown: the metrics of a layer to print, where it has them.
    """
    print(f"---\nrun: {out_dir.name}\nprofile: {profile}")
    for layer, entry in info.items():
        if layer != "verdict":
            for metric in (metric for metric in shown if metric in entry["means"]):
                print(f"{layer}_{metric}: {entry['means'][metric]:.4f}")
    for stage, value in seconds.items():
        print(f"{stage}: {value:.1f}")
    print(f"peak_memory_gb: {peak_memory_gb():.2f}")
    for warning in warnings:
        print(f"warning: {warning}")
    for note in notes:
        print(note)
    print(f"results: {out_dir}")
    print(f"{PRIMARY}: {info['verdict']['means'][PRIMARY]:.4f}")
    print(f"verdict: {sentence}")
