"""A training that was interrupted ends as if it had not been."""

from __future__ import annotations

import collections
import dataclasses
import json
import time
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from harness import startup
from harness.checkpoints import Checkpoints
from harness.console import STAGE
from harness.errors import ExperimentError
from harness.startup import Run
from harness.text import TokenStream, documents
from tests.conftest import cut_off, replace, run_command, settings_of
from tests.test_command import words

STATE = {
    "a": torch.arange(6).reshape(2, 3).T, "pairs": {(2, 0): {"x": torch.zeros(())}, 7: [1, (2,)]},
    "text": None, "number": 0.1, "random": torch.Generator().get_state(),
}  # fmt: skip


@pytest.mark.parametrize("damage", ["cut short", "a byte flipped", "emptied"])
def test_a_damaged_checkpoint_is_set_aside_and_never_read(
    own_cache: Path, capsys, damage: str
) -> None:
    checkpoints = Checkpoints({"a": 1})
    checkpoints.save(STATE, 0.25)
    checkpoints.save(STATE | {"number": 0.2}, 0.5)
    (path,) = checkpoints.shelf.folder.glob("*.pt")
    content = bytearray(path.read_bytes())
    if damage == "a byte flipped":
        content[-5] ^= 1
    path.write_bytes(content[: {"cut short": len(content) - 3, "emptied": 0}.get(damage)])
    checkpoints.close()
    again = Checkpoints({"a": 1})
    assert again.load() is None
    out = capsys.readouterr().out
    assert f"{path} is damaged: set aside as {path.name}.damaged, and made again" in out
    again.save(STATE | {"number": 0.3}, 1.0)
    assert again.load()["number"] == 0.3
    again.close()


def test_only_one_process_saves_a_training_and_others_may_read_it(own_cache: Path, capsys) -> None:
    first, second = Checkpoints({"a": 1}), Checkpoints({"a": 1})
    assert "another process is at the same one" in capsys.readouterr().out
    first.save(STATE, 0.5)
    second.save(STATE | {"number": 9}, 0.75)
    assert second.load()["number"] == 0.1
    first.close()
    second.close()


def test_saving_keeps_to_its_share_of_the_time(own_cache: Path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoints = Checkpoints({"a": 1}, every=60.0, share=0.025)
    now[0] = 60 - 1
    assert not checkpoints.due()
    now[0] += 1
    assert checkpoints.due()

    save = torch.save

    def slowly(state: dict, file: BinaryIO) -> None:
        save(state, file)
        now[0] += 10

    monkeypatch.setattr(torch, "save", slowly)
    checkpoints.save(STATE, 0.5)
    now[0] += 10 / 0.025 - 1
    assert not checkpoints.due()
    now[0] += 1
    assert checkpoints.due()
    checkpoints.close()


def test_what_has_no_place_in_new_objects_is_set_aside(own_cache: Path) -> None:
    class Local:
        n = 0

    checkpoints = Checkpoints({"a": 1})
    checkpoints.save(STATE, 0.5, trainers=[Local()])
    assert checkpoints.load()["number"] == 0.1
    with pytest.raises(ExperimentError, match="Local that can't be made again"):
        checkpoints.restore(trainers=[None])
    assert checkpoints.load() is None
    checkpoints.close()


def test_trained_halfway_by_threads_the_rest_comes_out_the_same(
    toy, toy_lm, tmp_path: Path, own_cache: Path, monkeypatch
) -> None:
    """After each filling of the buffer, in every form; the text starts again meanwhile."""
    for name in ("run_1", "run_6", "run_10"):
        settings = dataclasses.replace(
            settings_of(toy, name), seeds=(0, 1), training_tokens=24_576, buffer_tokens=6_144
        )
        run = Run(settings, toy_lm, out_dir=tmp_path)

        def train(key, fillings=None, settings=settings, run=run):
            checkpoints = Checkpoints(key, every=0.0, share=1e9)
            monkeypatch.setattr(Run, "checkpoints", lambda *_, **__: checkpoints)
            texts = documents("toy", "train")
            with TokenStream(texts, toy_lm.tokenizer, settings.context) as stream:
                buffer = toy.ActivationBuffer(run, stream)
                cut_off(buffer, fillings)
                return toy.train(run, buffer)

        whole = train(None)
        expected = (tmp_path / "train_log.jsonl").read_text().count("\n")
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                train({"name": name}, fillings=1)
        pieces = train({"name": name})
        for key, sae in whole.saes.items():
            for parameter, value in sae.state_dict().items():
                assert torch.equal(pieces.saes[key].state_dict()[parameter], value)
        assert pieces.log.n_steps == whole.log.n_steps and pieces.log.shortened is None
        assert (tmp_path / "train_log.jsonl").read_text().count("\n") == expected
        assert {k: v["fvu"] for k, v in pieces.log.last.items()} == {
            k: v["fvu"] for k, v in whole.log.last.items()
        }
        cached = train({"name": name}, fillings=0)  # nothing left to do
        assert torch.equal(cached.saes[2, 1].W_dec, whole.saes[2, 1].W_dec)


def test_a_reduced_count_of_tokens_is_reused_on_resume(
    toy, tmp_path: Path, own_cache: Path, monkeypatch, capsys
) -> None:
    """A slow first attempt shortens training; the next one doesn't decide anew."""
    changes = {**toy.PLAN["run_1"], "budget_minutes": 1e-6}
    monkeypatch.setitem(toy.PLAN, "run_1", changes)
    written = startup.check_complete
    monkeypatch.setattr(
        startup, "check_complete", lambda folder: written(folder) if STAGE.prefix else 1 / 0
    )
    assert run_command(toy, tmp_path / "run_1") == 1
    said = words(capsys.readouterr().err)
    assert said["cause"].startswith("ZeroDivisionError")
    assert "it goes on from what is kept (activations, training, " in said["to do"]
    monkeypatch.setattr(startup, "check_complete", written)
    replace(monkeypatch, "steps_in_budget", lambda *_: pytest.fail("decided anew"))
    assert run_command(toy, tmp_path / "run_1") == 0
    info = json.loads((tmp_path / "run_1" / "final_info.json").read_text())
    assert info["layer_0"]["means"]["training_tokens"] == 2048
    assert "shortened to 50%" in (tmp_path / "run_1" / "warnings.json").read_text()


def test_a_state_that_can_not_be_saved_costs_the_saving_alone(own_cache: Path, capsys) -> None:
    """As where an edit comes to it late in a training: what was saved before is there."""
    checkpoints = Checkpoints({"a": 1})
    checkpoints.save(STATE, 0.5, trainers={(2, 0): {"queue": collections.deque([1])}})
    with open(__file__) as file:
        checkpoints.save(STATE | {"number": 9}, 0.75, trainers={(2, 0): {"queue": file}})
    assert "training can't be kept in" in (out := capsys.readouterr().out)
    assert "trainers[2, 0]['queue'] is a TextIOWrapper" in out
    assert checkpoints.load()["number"] == 0.1
    new = {(2, 0): {"queue": collections.deque()}}
    checkpoints.restore(trainers=new)
    assert new[2, 0]["queue"] == collections.deque([1])
    checkpoints.close()
