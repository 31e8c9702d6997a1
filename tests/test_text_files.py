"""Local files of texts: a text is the text, and which files are read is said."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import zipfile
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

import experiment
from harness.errors import ExperimentError
from harness.evaluation.core import core_text
from harness.fingerprint import text_identity
from harness.ledger import LEDGER
from harness.provenance import write_config
from harness.text import streamed_texts
from harness.text_checks import look_at_texts
from harness.text_files import FIRST_ROWS
from tests.conftest import ROOT, settings_of

DATES = ["2020-01-01", "2020-01-02T10:00:00Z", "2021-05-05"]
WORDS = ["NA", "null", "007", "1e5", "True", "nan", 'a "b"\r\nc, d', " x "]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LEDGER, "warnings", [])
    return tmp_path


def lines(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def rows_of(texts: list[str]) -> list[dict]:
    return [{"text": text} for text in texts]


def table(texts: list[str], separator: str = ",") -> bytes:
    quoted = ['"' + text.replace('"', '""') + '"' if "," in text else text for text in texts]
    return f"n{separator}text\n".encode() + "".join(
        f"{n}{separator}{text}\n" for n, text in enumerate(quoted)
    ).encode()


@pytest.mark.parametrize(
    ("file", "content", "texts"),
    [
        ("train.jsonl", lines(rows_of(DATES)), DATES),
        ("train.jsonl.gz", gzip.compress(lines(rows_of(DATES)), mtime=0), DATES),
        ("train.json", json.dumps(rows_of(DATES), indent=1).encode(), DATES),
        ("train.json", json.dumps(DATES).encode(), DATES),
        ("train.jsonl", b"\xef\xbb\xbf" + lines(rows_of(WORDS)), WORDS),
        ("train.csv", table(WORDS), WORDS),
        ("train.csv", b"text\n007\n1.50\n12\n", ["007", "1.50", "12"]),
        ("train.tsv", table(WORDS[:6], "\t"), WORDS[:6]),
        ("train.txt", b"2020-01-01\n007\nNA\n", ["2020-01-01", "007", "NA"]),
        ("train.jsonl", lines([*({"id": n} for n in range(99)), *rows_of(DATES)]), DATES),
        ("train.jsonl", lines([{"text": None}, {"text": " \n"}, *rows_of(DATES)]), DATES),
        ("train.parquet", parquet([{"text": "a", "tokens": [1, 2]}]), ["a"]),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_a_text_is_the_text(file: str, content: bytes, texts: list[str], as_file: bool) -> None:
    """No date, number or None is made of it; of a folder as of a file; in core as in training."""
    Path("own").mkdir()
    Path("own", file).write_bytes(content)
    name = f"own/{file}" if as_file else "own"
    assert list(streamed_texts(name)) == texts
    settings = dataclasses.replace(settings_of(experiment, "run_1"), core_text=name)
    assert list(core_text(settings)) == rows_of(texts)


@pytest.mark.parametrize(
    ("name", "form", "head"),
    [("csv", "csv", "text\n"), ("json", "csv", "text\n"), ("text", "txt", "")],
)
def test_a_folder_may_be_called_like_a_reader_of_datasets(name: str, form: str, head: str) -> None:
    """Whose name alone would read all that lies around."""
    Path(name).mkdir()
    for folder, word in ((".", "wrong"), (name, "right")):
        Path(folder, f"train.{form}").write_text(f"{head}{word}\n")
    assert list(streamed_texts(name)) == ["right"]


def test_what_save_to_disk_left_is_read() -> None:
    saved = datasets.Dataset.from_dict({"text": DATES + WORDS})
    saved.save_to_disk("alone", num_shards=2)
    datasets.DatasetDict(train=saved, test=saved).save_to_disk("split")
    for name in ("alone", "split"):
        assert list(streamed_texts(name)) == DATES + WORDS
    datasets.DatasetDict(test=saved).save_to_disk("other")
    with pytest.raises(ExperimentError, match=r"must have a split 'train', but holds \['test'\]"):
        list(streamed_texts("other"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.jsonl", lines([{"text": 7}]), r"strings in its column .*but row 1 has 7 \(int"),
        ("train.jsonl", lines([{"text": ["a"]}]), r"but row 1 has \['a'\] \(list\): make each row"),
        ("train.jsonl", lines([{"body": 1}] * (FIRST_ROWS + 9)), r"'text', but has \['body'\]"),
        ("train.csv", b"body\nx\n", r"must have a column 'text', but has \['body'\]"),
        ("train.csv", b'text\n"open\n', "can't be read"),
        ("train.csv", b"n,text\n1,not quoted, so two\n", "can't be read"),
        ("train.jsonl", b'\n{"text": "a"}\n{"text": "\\ud800"}\n', "line 3 of 'own/train.jsonl' "
         "must have text in its column 'text', but has half of a surrogate pair"),
        ("train.jsonl", b'\n{"text": "a"}\n{"text": "b\n', r"line 3 of 'own/train.jsonl' must be "
         r"JSON, but is not \(Invalid control character at character 12\): mend it"),
        ("train.json", json.dumps(rows_of(DATES), indent=1).encode()[:-4], "'own/train.json' must "
         r"be JSON, but is not \(.* at line 10, character 1\)"),
        ("train.csv", b"n;text\n1;x\n", "columns of .* by commas, .* its first line is 'n;text'"),
        ("train.csv", "text\nx\n".encode("utf-16"), "must be UTF-8, but is not"),
    ],
)
def test_what_holds_no_texts_is_one_sentence(file: str, content: bytes, message: str) -> None:
    """Before anything is loaded, and where it is read."""
    Path("own").mkdir()
    Path("own", file).write_bytes(content)
    for read in (look_at, lambda name: list(streamed_texts(name))):
        with pytest.raises(ExperimentError, match=message) as caught:
            read("own")
        assert "\n" not in str(caught.value)


def look_at(name: str) -> None:
    look_at_texts(dataclasses.replace(settings_of(experiment, "run_1"), training_text=name))


def test_every_row_is_looked_at_before_anything_is_paid_for(capsys, own_cache) -> None:
    """In a folder of files, the file is named; rows without a text are told."""
    Path("own").mkdir()
    Path("own", "train-1.jsonl").write_bytes(lines([*rows_of(DATES), {"text": None}, {"id": 1}]))
    Path("own", "train-2.jsonl").write_bytes(lines(rows_of(["x"] * 70)))
    look_at("own")
    assert "the text 'own' has no text in 2 of 75 rows: left out\n" in capsys.readouterr().out
    Path("own", "train-2.jsonl").write_bytes(lines([*rows_of(["x"] * 70), {"text": 7}]))
    with pytest.raises(ExperimentError, match="the text 'own/train-2.jsonl' .* row 71 has 7"):
        look_at("own")
    Path("own.txt").write_bytes(b"one\n\ntwo\n")
    look_at("own.txt")
    assert "has no text" not in capsys.readouterr().out
    Path("own.txt").touch()
    Path("own.txt").write_bytes(b"\n \n")
    with pytest.raises(ExperimentError, match="'own.txt' must have texts, but has none in its 2 r"):
        look_at("own.txt")


def test_a_file_of_another_form_is_one_sentence() -> None:
    with zipfile.ZipFile("texts.zip", "w"):
        pass
    with pytest.raises(ExperimentError, match="must be a file of one of the forms .*convert it"):
        list(streamed_texts("texts.zip"))


def test_a_key_knows_a_file_s_content() -> None:
    Path("own.csv").write_text("text\nx\n")
    before = text_identity("own.csv")
    Path("own.csv").write_text("text\nlonger\n")
    assert text_identity("own.csv") != before


def test_which_files_are_read_is_said_and_recorded(capsys, tmp_path: Path) -> None:
    """And warned of, where some are left out since their names lack "train"."""
    Path("own").mkdir()
    for name in ("a", "b", "c", "d", "train"):
        Path("own", f"{name}.jsonl").write_bytes(lines(rows_of([name])))
    Path("whole.csv").write_text("text\nx\n")
    Path("own", "train2.jsonl").symlink_to("train.jsonl")
    settings = dataclasses.replace(
        settings_of(experiment, "run_1"), training_text="own", core_text="whole.csv"
    )
    look_at_texts(settings)
    said = capsys.readouterr().out
    assert (
        "warning: the text 'own' is read from 2 of 6 files: train.jsonl, train2.jsonl; not from "
        "a.jsonl, b.jsonl, c.jsonl and 1 more: where a file is named as the split 'train'"
    ) in said
    assert "the text 'whole.csv' is read from that file\n" in said
    assert len(LEDGER.warnings) == 1
    run = experiment.Run(settings, None, out_dir=tmp_path / "run_1", device=torch.device("cpu"))
    write_config(run)
    texts = json.loads((tmp_path / "run_1" / "config.json").read_text())["texts"]
    assert texts["own"]["read"] == ["own/train.jsonl", "own/train2.jsonl"]
    assert texts["own"]["left_out"] == [f"own/{name}.jsonl" for name in "abcd"]
    assert texts["whole.csv"]["read"] == ["whole.csv"]


def test_one_text_for_training_and_core_is_warned_of(here: Path, monkeypatch, capsys) -> None:
    Path("own").mkdir()
    Path("own", "train.jsonl").write_bytes(lines(rows_of(DATES)))
    settings = settings_of(experiment, "run_1")
    monkeypatch.chdir(ROOT)  # where a folder is called tinylm
    look_at_texts(settings)
    assert not LEDGER.warnings and not capsys.readouterr().out  # its text is split
    monkeypatch.chdir(here)
    for core in ("own", "./own", "own/train.jsonl"):
        monkeypatch.setattr(LEDGER, "warnings", [])
        look_at_texts(dataclasses.replace(settings, training_text="own", core_text=core))
        assert f"core_text, '{core}', is text that the SAEs are trained on" in LEDGER.warnings[0]
