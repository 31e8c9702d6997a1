"""Local texts looked at before anything is paid for: which files are read, and every row."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from harness.console import print_line
from harness.errors import ExperimentError
from harness.interfaces import SettingsLike
from harness.ledger import LEDGER
from harness.store import pinned
from harness.text import text_errors, text_of, text_stream
from harness.text_files import BUILT_IN, LocalText, files_line, local_text, rows_of, stamps

LOOKED_THROUGH = 2**26  # characters of a text: a second or two


def look_at_texts(settings: SettingsLike) -> None:
    """Says which files local texts are read from; warns of files left out, and of one text twice.

    Raises:
        ExperimentError: a text that lies here can't be read.
    """
    training, core = settings.training_text, settings.core_text
    files: dict[str, set[str]] = {}
    for name in dict.fromkeys((training, core)):
        with text_errors(name):
            text = local_text(name)
        if text is not None:
            say = LEDGER.warns if text.left_out else print_line
            say(files_line(name, text))
            if line := pinned("texts looked through", text_key(name), look_through, name, text):
                print_line(line)
            files[name] = {*map(os.path.realpath, text.read)}
    same = core == training and core not in BUILT_IN
    if same or files.get(core, set()) & files.get(training, set()):
        LEDGER.warns(
            f"core_text, {core!r}, is text that the SAEs are trained on, {training!r}: core "
            "evaluation's figures are of what they may have seen"
        )


def text_key(name: str) -> dict[str, Any]:
    """What a local text is told by."""
    return {"name": os.path.abspath(name), "files": stamps(name), "as of": 1}


def look_through(name: str, text: LocalText) -> str:
    """Reads a local text before anything is trained on it, its first `LOOKED_THROUGH` characters.

    Returns:
        a line that says how many rows have no text; empty where all have.
    Raises:
        ExperimentError: it has no text, or a row that can't be read; file and row are named.
    """
    n_rows = n_texts = size = 0
    for found in texts_by_row(name, text):
        n_rows, n_texts, size = n_rows + 1, n_texts + bool(found), size + len(found)
        if size > LOOKED_THROUGH:
            break
    if not n_texts:
        raise ExperimentError(
            f"the text {name!r} must have texts, but has none in its {n_rows} rows: look at its "
            "files"
        )
    if n_texts == n_rows or text.form == "text":  # paragraphs are divided by empty lines
        return ""
    return f"the text {name!r} has no text in {n_rows - n_texts} of {n_rows} rows: left out"


def texts_by_row(name: str, text: LocalText) -> Iterator[str]:
    """The text of each row, empty where it has none; errors name the file."""
    for file in text.read if text.form in ("json", "csv", "parquet") else [name]:
        with text_errors(file):
            rows = text_stream(name) if file == name else rows_of([file], file)
            for number, row in enumerate(rows, 1):
                yield text_of(file, row, number)
