"""Local files of texts: which of them are read, and JSON and CSV so that a text is the text.

`datasets` (3.6) makes dates of strings that look like dates, numbers and None of "007" and "NA" in
CSV, and leaves out a column that the first rows of a JSON file don't have.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import ExperimentError
from harness.interfaces import SettingsLike

FORMS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".txt": "text", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
NOT_DATA = ("README.md", "config.json", "dataset_info.json", "dataset_infos.json", "state.json")
FIRST_ROWS = 1000  # of a JSON file, in one of which the column "text" must stand


class LocalText(NamedTuple):
    """A text that lies here: its form, the files of its split "train", and those left out."""

    form: str
    read: list[str]
    left_out: list[str]


def form_of(file: str | Path) -> str | None:
    """A key of `datasets`' own readers, by a file's name; None: no form of texts."""
    path = Path(file)
    path = path.with_suffix("") if path.suffix in COMPRESSED else path
    return FORMS.get(path.suffix)


def local_text(name: str) -> LocalText | None:
    """What a file or folder of that name holds; None: there is none, or other code reads it.

    Of a folder, the files that `datasets` takes for its split "train": where one is named so, those
    that are; else all that aren't named as another split's. Of one form: the most frequent.

    Raises:
        ExperimentError: it is a file of another form.
    """
    import datasets

    path = Path(name)
    if path.is_file():
        if (form := form_of(path)) is None:
            raise ExperimentError(
                f"the text {name!r} must be a file of one of the forms {', '.join(FORMS)}, or a "
                "folder of them, but is another: convert it"
            )
        return LocalText(form, [name], [])
    if name == "tinylm" or not path.is_dir() or (path / f"{path.name}.py").exists():
        return None
    if saved := saved_dataset(path):
        files = sorted(str(file) for file in saved.glob("*.arrow"))
        return LocalText("saved", files, [])
    # By its whole path: "csv" alone is a reader of `datasets`, and would read what lies around.
    whole = path.resolve()
    config = datasets.load_dataset_builder(str(whole), trust_remote_code=False).config
    read = [str(file) for file in (config.data_files or {}).get("train", ())]
    left_out = [
        str(file) for file in sorted(whole.rglob("*"))
        if form_of(file) and file.name not in NOT_DATA and str(file) not in read
    ]  # fmt: skip
    forms = {form_of(file) for file in read}
    form = forms.pop() if len(forms) == 1 else None
    return LocalText(form, [*map(os.path.relpath, read)], [*map(os.path.relpath, left_out)])


def saved_dataset(folder: Path) -> Path | None:
    """Where `Dataset.save_to_disk` has left the rows, of a DatasetDict those of "train"."""
    if (folder / "dataset_dict.json").exists():
        if not (folder / "train").is_dir():
            raise ExperimentError(
                f"the text {str(folder)!r} must have a split 'train', but holds "
                f"{json.loads((folder / 'dataset_dict.json').read_text())['splits']}: name the "
                "folder of one of them"
            )
        return folder / "train"
    return folder if (folder / "state.json").exists() else None


def files_line(name: str, text: LocalText) -> str:
    """A line that says which files of a local text are read, and which are not."""
    def some(files: list[str]) -> str:
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        return ", ".join(os.path.relpath(file, name) for file in files[:3]) + more

    if Path(name).is_file():
        return f"the text {name!r} is read from that file"
    n_files = len(text.read) + len(text.left_out)
    line = f"the text {name!r} is read from {len(text.read)} of {n_files} files: {some(text.read)}"
    if text.left_out:
        line += (
            f"; not from {some(text.left_out)}: where a file is named as the split 'train', or is "
            "of a more frequent form, only such are read"
        )
    return line


def stamps(name: str) -> list[list[Any]]:
    """Of the files of what lies here under a name: path, size and time of change."""
    place = Path(name)
    files = sorted(path for path in (place, *place.rglob("*")) if path.is_file())
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def local_texts(settings: SettingsLike) -> dict[str, LocalText]:
    """The local texts of a run, by name. See `local_text`."""
    found = {name: local_text(name) for name in (settings.training_text, settings.core_text)}
    return {name: text for name, text in found.items() if text is not None}


def local_rows(name: str, text: LocalText, load: Any) -> Any:
    """The rows of a local text, a stream of `datasets`: shuffled by file, it goes on anywhere.

    Args:
        load: harness.text.load_dataset, for what `datasets` reads as it is.
    """
    import datasets

    if text.form == "saved":
        rows = datasets.load_from_disk(str(Path(text.read[0]).parent))
        return rows.to_iterable_dataset(num_shards=min(len(text.read), len(rows)))
    if text.form in ("json", "csv"):
        given = {"files": text.read, "name": name}
        return datasets.IterableDataset.from_generator(rows_of, gen_kwargs=given)
    if Path(name).is_file():
        return load(text.form, data_files=text.read, split="train", streaming=True)
    return load(str(Path(name).resolve()), split="train", streaming=True)


def rows_of(files: list[str], name: str) -> Iterator[dict[str, Any]]:
    """The column "text" of JSON and CSV files, {"text": a string; None where a row has none}."""
    import fsspec

    for file in files:
        with fsspec.open(file, "rb", compression="infer") as stream:
            if form_of(file) == "csv":
                separator = "\t" if ".tsv" in Path(file).suffixes else ","
                yield from csv_rows(stream, name, separator)
            else:
                yield from json_rows(stream, name)


def csv_rows(stream: Any, name: str, separator: str) -> Iterator[dict[str, Any]]:
    """Of a CSV file, its fields as they stand there."""
    import pandas

    options = dict(sep=separator, dtype=str, na_filter=False, index_col=False)
    for part in pandas.read_csv(stream, chunksize=10_000, encoding="utf-8-sig", **options):
        if "text" not in part:
            raise no_column(name, part.columns)
        yield from ({"text": text} for text in part["text"])


def json_rows(stream: Any, name: str) -> Iterator[dict[str, Any]]:
    """Of a JSON file: an object, or a string, by line; or a list of them."""
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig")
    first = next((line for line in lines if line.strip()), "{}")
    if first.lstrip().startswith("["):
        rows = iter(json.loads(first + lines.read()))
    else:
        rows = (json.loads(line) for line in itertools.chain([first], lines) if line.strip())
    columns: set[str] = set()
    for number, row in enumerate(rows):
        row = row if isinstance(row, dict) else {"text": row}
        if "text" not in columns:
            columns |= row.keys()
            if number == FIRST_ROWS and "text" not in columns:
                break
        text = row.get("text")
        if isinstance(text, str):
            text.encode()  # half a surrogate pair is no text: an error here
        yield {"text": text}
    if "text" not in columns:
        raise no_column(name, columns)


def no_column(name: str, columns: Any) -> ExperimentError:
    """What to raise where a text has other columns."""
    return ExperimentError(
        f"the text {name!r} must have a column 'text', but has {sorted(columns)}: "
        "choose another data set, or rename its column"
    )
