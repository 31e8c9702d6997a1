"""What is kept from run to run, under which key, and what is refused: in one process."""

from __future__ import annotations

import collections
import dataclasses
import errno
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from harness.checkpoints import Checkpoints
from harness.startup import Run
from harness.store import (
    LEDGER,
    TENSORS,
    TensorCache,
    cached,
    cached_each,
    evict,
    pinned,
    store_dir,
    write_json,
)
from harness.text import TokenStream, documents
from tests.conftest import ROOT, replace, settings_of

SOURCE = (ROOT / "experiment.py").read_text()
NOT_TRAINING = ("EVALUATION", "RECORDS")


# ------------------------------------------------------------------------------- the store


STATE = {
    "a": torch.arange(6).reshape(2, 3).T, "pairs": {(2, 0): {"x": torch.zeros(())}, 7: [1, (2,)]},
    "text": None, "number": 0.1, "random": torch.Generator().get_state(),
}  # fmt: skip


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    with (tmp_path / "state").open("wb") as file:
        TENSORS.write(STATE, file)
    back = TENSORS.read(tmp_path / "state")
    assert list(back) == list(STATE) and back["number"] == 0.1 and back["text"] is None
    assert torch.equal(back["a"], STATE["a"]) and torch.equal(back["random"], STATE["random"])
    assert back["pairs"][7] == [1, (2,)] and back["pairs"][2, 0]["x"].shape == ()


def test_records_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "final_info.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["final_info.json"]


def test_what_is_kept_is_computed_once_and_the_oldest_goes_first(
    own_cache: Path, monkeypatch
) -> None:
    calls = []

    def compute(n: int) -> list:
        calls.append(n)
        return [n, float("nan"), "x" * 1000]

    for n in (1, 2, 3, 1):
        assert cached("squares", {"n": (n,)}, compute, n)[0] == n
    assert calls == [1, 2, 3]
    files = sorted((own_cache / "store" / "squares").iterdir(), key=lambda f: f.stat().st_mtime)
    tomorrow = time.time() + 86400  # a clock that jumped back left this
    os.utime(files[0], (tomorrow, tomorrow))
    replace(monkeypatch, "STORE_GB", 2500e-9)
    assert cached("squares", {"n": (4,)}, compute, 4)[0] == 4
    left = set((own_cache / "store" / "squares").iterdir())
    assert len(left) == 2 and files[0] in left and files[1] not in left
    # What another process is at stays, however old.
    busy = Checkpoints({"a": 1})
    busy.save(STATE, 0.5)
    (path,) = busy.shelf.folder.glob("*.pt")
    os.utime(path, (0, 0))
    replace(monkeypatch, "STORE_GB", 0.0)
    evict()
    assert path.exists() and not any((own_cache / "store" / "squares").iterdir())
    busy.close()
    evict()
    assert not path.exists()
    cached("squares", {"n": (5,)}, compute, 5)
    done = subprocess.run(["make", "clean-cache"], cwd=ROOT, capture_output=True, text=True)
    assert f"{store_dir()} emptied: 0.0 MB; logs stay" in done.stdout, done.stderr
    assert not store_dir().exists()


def test_a_result_of_some_names_is_computed_for_those_alone(own_cache: Path, capsys) -> None:
    """One without a key is never kept; a file that was changed by hand is set aside."""
    asked = []

    def lengths(names: list[str]) -> list[tuple[str, list]]:
        asked.append(names)
        return [(name, [len(name), (1, 2)]) for name in names]

    keys = {"a": {"x": 1}, "bb": {"x": 2}, "ccc": None}
    first = cached_each("lengths", keys, lengths)
    assert first == {"a": [1, [1, 2]], "bb": [2, [1, 2]], "ccc": [3, (1, 2)]}
    assert list(cached_each("lengths", keys, lengths)) == ["a", "bb", "ccc"]
    assert asked == [["a", "bb", "ccc"], ["ccc"]]
    assert "lengths of a, bb: kept, as all that it depends on" in capsys.readouterr().out
    folder = own_cache / "store" / "lengths"
    (path,) = [path for path in folder.iterdir() if '"x": 2' in path.read_text()]
    path.write_text(path.read_text().replace('"value": [2', '"value": [3'))
    assert cached_each("lengths", keys, lengths) == first
    assert asked[2:] == [["bb", "ccc"]] and len(list(folder.glob("*.damaged"))) == 1
    assert f"{path} is damaged: set aside as {path.name}.damaged" in capsys.readouterr().out


def test_a_rehearsal_finds_and_keeps_nothing_but_what_is_pinned(own_cache: Path) -> None:
    cached("words", {"a": 1}, str, 1)
    with LEDGER.rehearsal():
        assert cached("words", {"a": 1}, str, 2) == "2"
        assert cached("words", {"a": 2}, str, 2) == "2"
        files = TensorCache("things", {"of": 1})
        assert len(files.get("a", lambda: torch.ones(3))) == 3
        files.flush()
        with Checkpoints({"a": 1}) as checkpoints:
            checkpoints.save(STATE, 0.5)
            assert checkpoints.load() is None
        assert pinned("revisions", {"data set": "x"}, str, "first") == "first"
    assert {file.parent.name for file in store_dir().rglob("*.*")} == {"words", "revisions"}
    assert cached("words", {"a": 1}, str, 3) == "1"
    assert pinned("revisions", {"data set": "x"}, str, "second") == "first"


def test_what_is_stored_of_a_view_is_the_view_alone(tmp_path: Path) -> None:
    whole = torch.arange(100_000)
    with (tmp_path / "view").open("wb") as file:
        TENSORS.write({"x": whole[10:13], "y": torch.ones(1).expand(4)}, file)
    assert (tmp_path / "view").stat().st_size < 5000
    back = TENSORS.read(tmp_path / "view")
    assert back["x"].tolist() == [10, 11, 12] and back["y"].add_(1).tolist() == [2.0] * 4


def test_what_can_not_be_stored_is_named(tmp_path: Path) -> None:
    with (tmp_path / "state").open("wb") as file:
        with pytest.raises(TypeError, match=r"it.log.1.queue is a deque"):
            TENSORS.write({"log": [1, {"queue": collections.deque()}]}, file)


def test_activations_are_harvested_once(toy, toy_lm, tmp_path, own_cache, monkeypatch) -> None:
    """Another training of the same text reads them; a longer one harvests the rest; a damaged
    file is made again, and what follows it."""
    settings = dataclasses.replace(settings_of(toy, "run_1"), harvest_contexts=8)
    n_passes = [0]
    activations = toy_lm.activations

    def counted(*arguments):
        n_passes[0] += 1
        return activations(*arguments)

    monkeypatch.setattr(toy_lm, "activations", counted)

    def taken(amounts: list[int], key: dict | None, state: dict | None = None):
        n_passes[0] = 0
        monkeypatch.setattr("harness.training.result_key", lambda *_, **__: key)
        texts = documents("toy", "train")
        with TokenStream(texts, toy_lm.tokenizer, settings.context) as stream:
            run = Run(settings, toy_lm, keeps=key is not None)
            buffer = toy.ActivationBuffer(run, stream)
            if state:
                buffer.load_state_dict(state)
            acts = torch.cat([buffer.next_tokens(n) for n in amounts], dim=1)
        return acts, n_passes[0], buffer.state_dict()

    expected, _, _ = taken([9000], None)
    first, n_first, _ = taken([1000, 2000], {"a": 1})
    assert torch.equal(first, expected[:, :3000]) and n_first == 16
    again, n_again, state = taken([700, 1300], {"a": 1})
    assert torch.equal(again, expected[:, :2000]) and n_again == 0
    longer, n_longer, _ = taken([9000], {"a": 1})
    assert torch.equal(longer, expected) and n_longer == 40 - 16
    resumed, n_resumed, _ = taken([3000], {"a": 1}, state)
    assert torch.equal(resumed, expected[:, 2000:5000]) and n_resumed == 0
    resumed, n_resumed, _ = taken([3000], None, state)  # where the store is gone
    assert torch.equal(resumed, expected[:, 2000:5000]) and n_resumed > 0
    second = sorted((own_cache / "store" / "activations").rglob("*.pt"))[1]
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    mended, n_mended, _ = taken([9000], {"a": 1})
    assert torch.equal(mended, expected) and n_mended == 40 - 8
    assert second.exists() and second.with_name(f"{second.name}.damaged").exists()
    assert taken([9000], {"a": 2})[1] == 40


def test_tensors_are_written_while_work_goes_on(own_cache: Path, monkeypatch, capsys) -> None:
    """Whole once `flush` returns; a disk that is full is said once, and costs the keeping alone."""
    save, begun, go_on = torch.save, threading.Event(), threading.Event()

    def slowly(state: object, file: BinaryIO) -> None:
        begun.set()
        assert go_on.wait(10)
        save(state, file)

    monkeypatch.setattr(torch, "save", slowly)
    files = TensorCache("things", {"of": 1})
    files.keep("a", {"x": torch.arange(4)})  # returns at once
    assert begun.wait(10) and files.find("a") is None
    go_on.set()
    files.keep("b", {"x": torch.arange(5)})
    files.flush()
    again = TensorCache("things", {"of": 1})
    assert [len(again.find(name)["x"]) for name in "ab"] == [4, 5]

    def full(state: object, file: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    for name in "cd":
        files.keep(name, {"x": torch.arange(4)})
    files.flush()
    assert capsys.readouterr().out.count("things can't be kept in") == 1
    assert files.find("a") is None and not list(own_cache.rglob(".partial-*"))

    def broken(state: object, file: BinaryIO) -> None:
        raise TypeError("a state that is none")

    monkeypatch.setattr(torch, "save", broken)
    again.keep("e", {"x": torch.arange(4)})
    with pytest.raises(TypeError, match="a state that is none"):
        again.flush()
