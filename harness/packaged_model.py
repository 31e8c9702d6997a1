"""smollm2's weights in the form that transformers takes: converted once, kept in the store."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

from harness.console import print_line
from harness.errors import ExperimentError, first_line
from harness.partials import mark, partial_in
from harness.store import digest, sha256_file, store_dir, write_json
from harness.text import corpus_errors

SUMS = "sums"  # not .json, which transformers or a key might take for part of the model


@functools.cache
def smollm2_folder() -> Path:
    """Where the model lies as safetensors, with its tokenizer. The first call converts it.

    Raises:
        ExperimentError: its packages are missing or others, or the store can't be written.
    """
    from smollm2 import weights

    with corpus_errors():
        gguf = weights.gguf_file()
    key = {"gguf": weights.SHA256, "code": sha256_file(Path(weights.__file__))}
    folder = store_dir() / "language_models" / digest(key)
    if not is_whole(folder):
        print_line("smollm2: its weights are converted for transformers, once; half a minute")
        try:
            with corpus_errors():
                make(folder, functools.partial(weights.convert, gguf))
        except OSError as error:
            raise ExperimentError(
                f"smollm2 needs 550 MB in {folder.parent}, which can't be written "
                f"({first_line(error)}): free some, or set XDG_CACHE_HOME to another folder"
            ) from error
    for file in folder.iterdir():
        os.utime(file)  # used now: see `store.evict`
    return folder


def is_whole(folder: Path) -> bool:
    """Whether all files that were written there are there, as they were written."""
    try:
        sums = json.loads((folder / SUMS).read_text())
        return bool(sums) and all(sha256_file(folder / name) == s for name, s in sums.items())
    except (OSError, ValueError):
        return False


def make(folder: Path, write) -> None:
    """Has `write` fill a folder that is there as a whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_in(folder.parent)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        mark(descriptor)
        write(partial)
        write_json(partial / SUMS, {f.name: sha256_file(f) for f in sorted(partial.iterdir())})
        if not is_whole(folder):  # another process may have made it meanwhile
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)
