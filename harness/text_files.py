"""Local files of texts: which of them are read, and JSON and CSV so that a text is the text.

`datasets` (3.6) makes dates of strings that look like dates, numbers and None of "007" and "NA" in
CSV, and leaves out a column that the first rows of a JSON file don't have.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import warnings
from collections.abc import Collection, Iterator
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
BUILT_IN = ("tinylm", "smollm2")  # language models whose weights and texts lie in packages
FIRST_ROWS = 1000  # of a JSON file, in one of which the column "text" must stand
HALF_A_PAIR = re.compile("[\ud800-\udfff]")
TEXT = (("text",),)  # the columns of a text, each by the names that it may have


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
    if name in BUILT_IN or not path.is_dir() or (path / f"{path.name}.py").exists():
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


def rows_of(
    files: list[str], name: str, columns: tuple[tuple[str, ...], ...] = TEXT
) -> Iterator[dict[str, Any]]:
    """Columns of JSON, CSV and Parquet files, {"text": a string; None where a row has none}.

    Args:
        name: of the text, for an error. columns: each by its names, of which the first counts that
            is there.
    """
    import fsspec

    read_zstd_whole()
    for file in files:
        with fsspec.open(file, "rb", compression="infer") as stream:
            if form_of(file) == "csv":
                separator = "\t" if ".tsv" in Path(file).suffixes else ","
                yield from csv_rows(stream, name, separator, columns)
            elif form_of(file) == "parquet":
                yield from parquet_rows(stream, name, columns)
            else:
                yield from json_rows(stream, file, name, columns)


def read_zstd_whole() -> None:
    """Has fsspec, and so `datasets`, read .zst files by `whole_zstd`."""
    import fsspec

    fsspec.compression.register_compression("zstd", whole_zstd, "zst", force=True)


def whole_zstd(file: Any, mode: str = "rb") -> Any:
    """A reader of a .zst file that raises an OSError where the file ends too early.

    zstandard's own, which fsspec 2025.3 takes, ends there as if it were the end of the text.
    """
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), buffer_size=2**17)


def csv_rows(
    stream: Any, name: str, separator: str, columns: tuple[tuple[str, ...], ...]
) -> Iterator[dict[str, Any]]:
    """Of a CSV file, its fields as they stand there.

    Raises:
        pandas.errors.ParserWarning: the first row has more fields than the header, as an unquoted
            comma in a text makes them; of a later row it is a ParserError.
    """
    import pandas

    options = dict(sep=separator, dtype=str, na_filter=False, index_col=False)
    parts = pandas.read_csv(stream, chunksize=10_000, encoding="utf-8-sig", **options)
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            if (part := next(parts, None)) is None:
                return
        if len(part.columns) == 1 and {*part.columns[0]} & {*";|\t"}:
            raise ExperimentError(
                f"the columns of {name!r} must be divided by commas, or by tabs in a .tsv file, "
                f"but its first line is {part.columns[0]!r:.60}: save it so"
            )
        found = names_in(part.columns, columns, name)
        for values in zip(*(part[column] for column in found)):
            yield dict(zip(found, values))


def parquet_rows(
    stream: Any, name: str, columns: tuple[tuple[str, ...], ...]
) -> Iterator[dict[str, Any]]:
    """Of a Parquet file."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    for part in file.iter_batches(columns=names_in(file.schema_arrow.names, columns, name)):
        yield from part.to_pylist()


def json_rows(
    stream: Any, file: str, name: str, columns: tuple[tuple[str, ...], ...]
) -> Iterator[dict[str, Any]]:
    """Of a JSON file: an object, or a string, by line; or a list of them.

    Raises:
        ExperimentError: a line is no JSON, or what it holds can't be text.
    """
    lines = enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), 1)
    number, first = next(((n, line) for n, line in lines if line.strip()), (1, "{}"))
    if first.lstrip().startswith("["):
        whole = first + "".join(line for _, line in lines)
        rows = enumerate(json_value(whole, f"{file!r} must be JSON"), 1)
        unit = "row"
    else:
        rows = ((n, json_value(line, f"line {n} of {file!r} must be JSON"))
                for n, line in itertools.chain([(number, first)], lines) if line.strip())
        unit = "line"
    there: set[str] = set()
    lacking = columns
    for read, (number, row) in enumerate(rows):
        row = row if isinstance(row, dict) else {"text": row}
        if lacking:
            there |= row.keys()
            lacking = tuple(names for names in columns if not there & {*names})
            if read == FIRST_ROWS and lacking:
                break
        found = [next((n for n in names if n in row), names[0]) for names in columns]
        values = {column: row.get(column) for column in found}
        for column, value in values.items():
            if isinstance(value, str) and (half := HALF_A_PAIR.search(value)):
                raise ExperimentError(
                    f"{unit} {number} of {file!r} must have text in its column {column!r}, but has "
                    f"half of a surrogate pair, {half[0]!r}: mend it, or leave it out"
                )
        yield values
    names_in(there, columns, name)


def json_value(text: str, must: str) -> Any:
    """What JSON stands for; an ExperimentError, which begins with `must`, where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if text.count("\n") > 1 else ""
        what = error.msg.removesuffix(" at")
        raise ExperimentError(
            f"{must}, but is not ({what} at {at}character {error.colno}): mend it, or leave it out"
        ) from error


def names_in(there: Collection[str], columns: tuple[tuple[str, ...], ...], name: str) -> list[str]:
    """Of each column the first of its names that is there; an ExperimentError where none is."""
    for names in columns:
        if not any(column in there for column in names):
            raise no_column(name, there, names)
    return [next(column for column in names if column in there) for names in columns]


def no_column(name: str, there: Any, names: tuple[str, ...] = ("text",)) -> ExperimentError:
    """What to raise where a text has other columns than one of these names."""
    return ExperimentError(
        f"the text {name!r} must have a column {' or '.join(map(repr, names))}, but has "
        f"{sorted(there)}: choose another data set, or rename its column"
    )
