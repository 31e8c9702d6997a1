"""Files of texts with labels, as probing sets: what is drawn, what is said, what is refused."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import os
import string
from pathlib import Path

import pytest
import torch
import zstandard

import experiment
from harness.errors import ExperimentError
from harness.evaluation import probe_texts
from harness.evaluation.probe_texts import known_to_stock, read_probe_texts
from harness.fingerprint import tokens_digest
from harness.ledger import LEDGER
from harness.preflight import preflight
from harness.probe_sets import draw, own_sets, probe_names
from tests.conftest import Calls, replace, run_command, settings_of
from tests.test_text_files import lines, parquet

CPU = torch.device("cpu")
MOODS = ("glad", "sad")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LEDGER, "warnings", [])
    return tmp_path


def rows(n: int = 40, labels: tuple = MOODS, text: str = "text", label: str = "label") -> list:
    """n texts of each label."""
    return [{"id": i, text: f"{of} number {i}\n, \"said\"", label: of}
            for i in range(n) for of in labels]  # fmt: skip


def table(records: list[dict], separator: str = ",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().encode()


def settings(*sets: str, train: int = 20, test: int = 10, **changes):
    given = dict(probe_sets=sets or ("tinylm/A",), probe_train=train, probe_test=test, **changes)
    return dataclasses.replace(settings_of(experiment, "run_try"), **given)


def write(name: str, content: bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)
    return name


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("mood.csv", table(rows())),
        ("mood.tsv", table(rows(), "\t")),
        ("mood.jsonl", lines(rows())),
        ("mood.json", json.dumps(rows(), indent=1).encode()),
        ("mood.parquet", parquet(rows())),
        ("mood.csv.gz", gzip.compress(table(rows()), mtime=0)),
        ("mood.jsonl.zst", zstandard.ZstdCompressor().compress(lines(rows()))),
        ("mood.csv", table(rows(text="prompt", label="target"))),
    ],
)
def test_every_form_gives_the_same_texts(file: str, content: bytes) -> None:
    train, test = draw(write(file, content), settings(file))
    assert list(train) == list(test) == [*MOODS]
    given = {row["text"]: row["label"] for row in rows()}
    for split, n in ((train, 10), (test, 5)):
        for label, texts in split.items():
            assert len({*texts}) == n and {given[text] for text in texts} == {label}
    assert not {*sum(train.values(), [])} & {*sum(test.values(), [])}
    again = draw(write("of_records.jsonl", lines(rows())), settings(file))
    assert (train, test) == again != draw(file, settings(file, probe_seed=7))


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        (("007", "7"), ["007", "7"]),
        (("NA", "null"), ["NA", "null"]),
        ((1, 0), ["0", "1"]),
        ((True, False), ["False", "True"]),
        ((1.0, 5.0), ["1.0", "5.0"]),
        (("a", "b", "c d"), ["a", "b", "c d"]),
    ],
)
def test_a_label_is_the_label(given: tuple, labels: list[str]) -> None:
    for file, content in (("l.csv", table), ("l.jsonl", lines), ("l.parquet", parquet)):
        assert list(draw(write(file, content(rows(labels=given))), settings())[0]) == labels


def test_a_folder_s_splits_are_drawn_as_sae_bench_draws_ag_news(monkeypatch) -> None:
    """The same texts in the same order, from the same rows."""
    import datasets
    from sae_bench.sae_bench_utils import dataset_utils

    both = {split: [{"text": f"{split} {i}", "label": i % 3} for i in range(90)]
            for split in ("train", "test")}  # fmt: skip
    for split, records in both.items():
        write(f"news/{split}.jsonl", lines(sorted(records, key=lambda row: row["label"])))
    ours = draw("news", settings(train=40, test=20))
    hub = datasets.DatasetDict({s: datasets.Dataset.from_list(both[s]) for s in both})
    monkeypatch.setattr(dataset_utils, "load_dataset", lambda *_, **__: hub)
    assert ours == dataset_utils.get_ag_news_dataset("news", ["0", "1", "2"], 40, 20, 42)


def test_unequal_classes_are_cut_to_equal_ones_and_it_is_said(capsys) -> None:
    many = rows(200, ("glad",)) + rows(30, ("sad",))
    train, test = draw(write("mood.csv", table(many)), settings(train=20, test=10))
    assert capsys.readouterr().out == (
        "the probing set 'mood.csv' has texts by class, 200 glad, 30 sad; of each 10 train probes "
        "and 5 test them\n"
    )
    assert not LEDGER.warnings
    train, test = draw("mood.csv", settings(train=300, test=200))
    assert {len(texts) for texts in train.values()} == {18}
    assert {len(texts) for texts in test.values()} == {12}
    assert "of each 18 train probes and 12 test them" in capsys.readouterr().out
    assert LEDGER.warnings == [
        "the probing set 'mood.csv' has fewer texts of a class than probe_train = 300 and "
        "probe_test = 200 ask for, which is 150 and 100: all its classes are cut to 18 and 12"
    ]


def test_what_stands_twice_counts_once_and_it_is_said(capsys) -> None:
    """And what stands under two labels, or in train and in test, is left out."""
    twice = [*rows(40), *rows(3), {"id": 0, "text": rows()[8]["text"], "label": "sad"}]
    assert rows()[8]["label"] == "glad"
    train, test = draw(write("mood.jsonl", lines(twice)), settings(train=30, test=40))
    used = sum([*train.values(), *test.values()], [])
    assert len(used) == len({*used}) and rows()[8]["text"] not in used
    assert capsys.readouterr().out.strip().endswith(
        "39 glad, 40 sad; of each 15 train probes and 20 test them; without 2 texts that stand "
        "under two labels; without 6 texts that repeat another"
    )
    write("both/train.jsonl", lines(rows(40)))
    write("both/test.jsonl", lines(rows(10)))
    train, test = draw("both", settings(train=60, test=20))
    assert not {*sum(train.values(), [])} & {*sum(test.values(), [])}
    assert "train: 30 glad, 30 sad, test: 10 glad, 10 sad" in (out := capsys.readouterr().out)
    assert "; without 20 texts of train that stand in test, too\n" in out


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.csv", table(rows(label="mood")), r"'a.csv' must have a column 'label' or 'target', but "
                                             r"has \['id', 'mood', 'text'\]"),
        ("a.jsonl", lines(rows(text="body")), r"'a.jsonl' must have a column 'text' or 'prompt'"),
        ("a.jsonl", lines(["one", "two"]), r"have a column 'label' or 'target', but has \['te"),
        ("a.parquet", parquet(rows(label="mood")), r"'a.parquet' must have a column 'label' or"),
        ("a.csv", b"text,label\nx,y\nz,\n", r"of 'a.csv' must have a label in its column 'label', "
                                            r"but row 2 has '': give it one, or leave"),
        ("a.csv", b"text,label\nx,y\nz\n", "a label in its column 'label', but row 2 has ''"),
        ("a.jsonl", lines([{"text": "x", "label": 1}, {"text": "y"}]), "but row 2 has None"),
        ("a.jsonl", lines([{"text": "x", "label": []}]), r"a label .* but row 1 has \[\]"),
        ("a.jsonl", lines([{"prompt": 7, "label": 1}]), "a text in its column 'prompt', but row 1 "
                                                        "has 7"),
        ("a.csv", b"text,label\n ,y\n", "a text in its column 'text', but row 1 has ' '"),
        ("a.parquet", parquet([{"text": None, "label": 1}]), "a text .* but row 1 has None"),
        ("a.csv", table(rows(labels=("glad",))), "texts of two classes or more, but has 'glad' al"),
        ("a.jsonl", b"", "must have a column"),
        ("a.csv", b"text,label\n", "two classes or more, but has no rows"),
        ("a.csv", table(rows() + rows(3, ("so",))), "must have 10 different texts or more of each "
                                                    "class, but has 3 of 'so': add some"),
        ("a.jsonl", lines(rows(1))[:-9], r"line 2 of 'a.jsonl' must be JSON, but is not \(Expe"),
        ("a.csv", b"text;label\nx;y\n", "columns of 'a.csv' must be divided by commas"),
        ("a.csv", table(rows()).decode().encode("utf-16"), "must be UTF-8, but is not .*: convert"),
        ("a.csv", b"text,label\nglad, or so,glad\n", r"can't be read .*\(ParserWarning: Length of"),
        ("a.csv", b"text,label\nx,y\nglad, or so,glad\n", "ParserError: .* 2 fields in line 3"),
        ("a.txt", b"text\n", "must be of files in one of the forms CSV, .* 'a.txt' is another"),
        ("a/test.csv", table(rows()), "'a' must have a file .* the split 'train', .* rename one"),
        ("a/notes.md", b"words", "'a' can't be read"),
    ],
)  # fmt: skip
def test_what_holds_no_labelled_texts_is_one_sentence(file, content, message) -> None:
    """File, row and column are named."""
    write(file, content)
    with pytest.raises(ExperimentError, match=message) as caught:
        draw(file.split("/")[0], settings())
    assert "\n" not in str(caught.value)


def test_a_class_that_test_lacks_is_named() -> None:
    write("both/train.csv", table(rows()))
    write("both/test.csv", table(rows(labels=("glad", "cross"))))
    with pytest.raises(ExperimentError, match="of each class in train, but has 0 of 'cross'"):
        draw("both", settings())


def test_names_in_records_are_the_files_and_tell_them_apart() -> None:
    for name in ("a/mood.csv", "b/mood.csv", "news.csv"):
        write(name, table(rows()))
    assert probe_names(settings("a/mood.csv", "tinylm/A")) == [
        "mood.csv", "tinylm/A/package", "tinylm/A/code_docstring_comment", "tinylm/A/scipy_field",
    ]  # fmt: skip
    assert probe_names(settings("./a/mood.csv", os.path.abspath("news.csv"))) == [
        "mood.csv", "news.csv",
    ]  # fmt: skip
    assert probe_names(settings("a/mood.csv", "b/mood.csv")) == ["a/mood.csv", "b/mood.csv"]
    assert {*own_sets(settings("a/mood.csv", "b/mood.csv"))} == {"a/mood.csv", "b/mood.csv"}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("tinylm/C",), "of tinylm, probe_sets must name tinylm/A or tinylm/B, or one of their ta"),
        (("tinylm/B/package",), "but names 'tinylm/B/package'"),
        (("gone.csv",), "set 'gone.csv' must be there, but there is no such file or folder"),
        (("gone",), "or files and folders of texts with labels that are there, but one is 'gone'"),
        (("mood.csv", "./mood.csv"), "all different, but has 'mood.csv' twice"),
        (("tinylm/B", "tinylm/B/subject"), "but has 'tinylm/B/subject' twice"),
    ],
)
def test_a_set_that_is_none_is_told_at_the_start(sets: tuple, message: str) -> None:
    write("mood.csv", table(rows()))
    with pytest.raises(ExperimentError, match=message):
        preflight(settings(*sets), CPU)
    assert preflight(settings("mood.csv", "tinylm/B/subject"), CPU) == []


def test_token_ids_are_kept_while_the_file_is_the_same(toy_lm, own_cache, monkeypatch) -> None:
    calls, stock = Calls(), probe_texts.probe_tokens
    replace(monkeypatch, "probe_tokens", lambda *a: (calls.append(1), stock(*a))[1])
    replace(monkeypatch, "documents", lambda name, split: lambda: iter(["text"]))

    def read() -> tuple[str, int]:
        calls.clear()
        texts = read_probe_texts(settings("mood.csv"), toy_lm.tokenizer, CPU)
        return tokens_digest(texts["mood.csv"]), len(calls)

    write("mood.csv", table(rows()))
    first, n = read()
    assert n == 1 and read() == (first, 0)
    write("mood.csv", table([row | {"label": MOODS[row["label"] == "glad"]} for row in rows()]))
    second, n = read()
    assert n == 1 and second != first


def test_a_text_of_which_no_token_counts_is_told_before_training(toy_lm, own_cache) -> None:
    """Its mean activation would be 0 / 0, which scikit-learn refuses when all else is paid for."""
    letters = [{"text": of(letter), "label": label} for letter in string.ascii_lowercase
               for label, of in zip(MOODS, (str.lower, str.upper))]  # fmt: skip
    write("mood.csv", table(letters))
    assert read_probe_texts(settings("mood.csv"), toy_lm.tokenizer, CPU)["mood.csv"]
    says = r"'mood.csv' must have a token that counts, but 30 have none, such as '\w' \(first_posit"
    with pytest.raises(ExperimentError, match=says):
        read_probe_texts(settings("mood.csv", first_positions=2), toy_lm.tokenizer, CPU)


def test_texts_are_padded_to_the_longest_of_their_class_and_no_further(toy_lm, own_cache) -> None:
    """SAE-Bench pads to the context: of six tasks of short texts two thirds were padding."""
    long = [row | {"text": row["text"] * 30} for row in rows(labels=("glad",))]
    write("mood.csv", table([*long, *rows(labels=("sad",))]))
    tokenizer, given = toy_lm.tokenizer, settings("mood.csv")
    for split in read_probe_texts(given, tokenizer, CPU)["mood.csv"]:
        glad, sad = (split[label]["input_ids"] for label in MOODS)
        assert glad.shape[1] == given.context > sad.shape[1] + 30
        ends = (sad != tokenizer.pad_token_id).sum(dim=1)
        assert ends.max() == sad.shape[1] and ends.min() > 5


def test_stock_sae_bench_finds_the_file_by_its_name_and_forgets_it() -> None:
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    before = dict(dataset_info.chosen_classes_per_dataset)
    write("mood.csv", table(rows()))
    with known_to_stock(own_sets(settings("mood.csv"))):
        train, test = dataset_utils.get_multi_label_train_test_data("mood.csv", 20, 10, 42)
        assert dataset_info.chosen_classes_per_dataset["mood.csv"] == list(train) == [*MOODS]
    assert dataset_info.chosen_classes_per_dataset == before


def test_a_run_records_the_file_by_its_name_and_knows_another_content(
    toy, monkeypatch, capsys
) -> None:
    """Of a file of the same name with other texts, figures are not compared."""
    small = dict(layers=(2,), training_tokens=1024, probe_sets=("mood.csv", "b/mood.csv"))
    for name in ("run_1", "run_2"):
        monkeypatch.setitem(toy.PLAN, name, small)
    for name in small["probe_sets"]:
        write(name, table(rows(len(name) + 40)))
    assert run_command(toy, "run_1") == 0
    out = capsys.readouterr().out
    assert "the probing set 'mood.csv' has texts by class, 48 glad, 48 sad; of each 20 train" in out
    (file,) = Path("run_1/eval_results/sparse_probing").glob("layer_2_seed_0_custom_sae_*")
    record = json.loads(file.read_text())
    names = record["eval_config"]["dataset_names"]
    assert [Path(name).name for name in names] == ["mood.csv"] * 2 and len({*names}) == 2
    assert [of["dataset_name"] for of in record["eval_result_details"]] == [
        f"{name}_results" for name in names
    ]
    write("mood.csv", table(rows(60)))
    assert run_command(toy, "run_2") == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict == "verdict: not comparable (probe_sets of other content)"
