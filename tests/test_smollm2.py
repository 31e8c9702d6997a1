"""smollm2: its corpus and tasks, from sae-probes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from smollm2 import corpus, tasks


@pytest.fixture(scope="module")
def splits() -> dict[str, list[str]]:
    return {split: [*corpus.documents(split)] for split in corpus.SPLITS}


def test_the_installed_package_agrees_with_the_manifest() -> None:
    corpus.check_package()
    entries = corpus.manifest_entries()
    by_use = {use: {e.name for e in entries if e.use == use} for use in ("train", "task")}
    labelled = {kind.set for classes in tasks.TASKS.values() for kind in classes.values()}
    assert by_use == {"train": {*corpus.TRAINING}, "task": labelled}
    assert len(entries) == len({e.name for e in entries}) == len({e.sha256 for e in entries})


def test_no_text_stands_in_two_splits(splits: dict[str, list[str]]) -> None:
    keys = {split: [*map(corpus.text_key, texts)] for split, texts in splits.items()}
    keys["tasks"] = [
        *{corpus.text_key(text) for entry in corpus.manifest_entries() if entry.use == "task"
          for text, _ in corpus.rows(entry.name)}
    ]  # fmt: skip
    counted = Counter(key for of_split in keys.values() for key in of_split)
    assert max(counted.values()) == 1
    assert len(keys["train"]) > 80_000 and 2000 < len(keys["heldout"]) < 4000
    # The sets do share texts: without that rule some of the tasks' would be trained on.
    taken = {*keys["tasks"]}
    trained = [e.name for e in corpus.manifest_entries() if e.use == "train"]
    assert any(corpus.text_key(text) in taken for name in trained for text, _ in corpus.rows(name))


def test_texts_are_the_same_whatever_their_white_space_case_and_end() -> None:
    text = "A  text,\nof which   there are two. " + "So it goes on and on. " * 9
    other = " a text of which there are two.\t" + "so it goes ON and on. " * 9 + "To another end."
    assert corpus.text_key(text) == corpus.text_key(other) != corpus.text_key("A text, of which")
    assert len(corpus.text_key(" " * 5000 + text)) == corpus.KEY_CHARS
    assert corpus.text_key("…") == ""


def test_texts_come_mixed_and_in_a_fixed_order(splits: dict[str, list[str]]) -> None:
    first = splits["heldout"][:50]
    assert first == [text for text, _ in zip(corpus.documents("heldout"), range(50))]
    sets = {
        e.name: {text for text, _ in corpus.rows(e.name)} for e in corpus.manifest_entries()
    }  # fmt: skip
    assert sum(any(text in texts for text in first) for texts in sets.values()) > 10
    with pytest.raises(ValueError, match="expected a split of train, heldout"):
        next(corpus.documents("test"))


def test_a_file_that_is_another_is_named(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "manifest.tsv"
    monkeypatch.setattr(corpus, "MANIFEST", path)
    with pytest.raises(corpus.CorpusError, match="found nothing.*git checkout -- smollm2"):
        corpus.check_package()
    path.write_text(f"train\t{'0' * 64}\t100_news_fake\n")
    expected = "100_news_fake.*other contents.*sae-probes==0.4.2"
    with pytest.raises(corpus.CorpusError, match=expected):
        next(corpus.documents("train"))
    path.write_text("train\t100_news_fake\n")
    with pytest.raises(corpus.CorpusError, match="expected use, SHA-256 and name .* on line 1"):
        corpus.manifest_entries()


def test_two_sets_of_tasks_share_no_texts() -> None:
    """Nor do training and testing of a probe, nor two classes."""
    assert len(tasks.TASK_SETS["A"]) >= 6 and len(tasks.TASK_SETS["B"]) >= 6
    drawn = {}
    for letter, names in tasks.TASK_SETS.items():
        keys = drawn[letter] = []
        for name in names:
            train, test = tasks.load_task(name, 300, 200, seed=42)
            assert tuple(train) == tuple(test) == tasks.CLASSES[name]
            assert {*map(len, train.values())} == {150} and {*map(len, test.values())} == {100}
            texts = sum((texts for part in (train, test) for texts in part.values()), [])
            assert max(map(len, texts)) <= tasks.MAX_CHARS and all(map(str.strip, texts))
            assert max(Counter(map(corpus.text_key, texts)).values()) == 1, name
            keys += map(corpus.text_key, texts)
        assert len({*keys}) == len(keys)
    assert not {*drawn["A"]} & {*drawn["B"]}


def test_tasks_are_drawn_by_a_seed_and_say_what_there_is() -> None:
    name = tasks.TASK_SETS["A"][0]
    drawn = [tasks.load_task(name, 20, 10, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(corpus.CorpusError, match=r"expected 1 to \d+ train texts .* 50000"):
        tasks.load_task(name, 100_000, 10, 1)
    with pytest.raises(ValueError, match="expected a task of"):
        tasks.load_task("unheard_of", 20, 10, 1)
    assert tasks.cut("x" * 500) == "x" * 240 and tasks.cut(" word" * 99)[-5:] == " word"
