"""Training watched in W&B or TensorBoard: the same values, by their own readers; nothing ends."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import pytest

from harness import preflight, tracking
from harness.errors import ExperimentError
from harness.preflight import tracker
from harness.settings import sweep
from harness.steps import shown
from harness.tracking import TRACKER
from tests.conftest import run_command


def logged_by_wandb(folder: Path) -> dict[int, dict[str, float]]:
    """By step, the values in the file that W&B has written offline: records in a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("*.wandb")
    data, at, whole, found = path.read_bytes(), 7, b"", {}  # 7: its own header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's end has no room for a header
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # it is all there; else its first or a middle part
            record, whole = Record.FromString(whole), b""
            if record.HasField("history"):
                values = {".".join(item.nested_key) or item.key: json.loads(item.value_json)
                          for item in record.history.item}  # fmt: skip
                found.setdefault(int(values["_step"]), {}).update(values)
    return found


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_what_is_watched_is_the_training_log(kind, toy, tmp_path, own_cache, monkeypatch) -> None:
    if importlib.util.find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SAE_TRACK", kind)
    assert run_command(toy, tmp_path / "run_try") == 0
    lines = [json.loads(line) for line in (tmp_path / "run_try" / "train_log.jsonl").open()]
    assert len(lines) > 3
    if kind == "wandb":
        found = logged_by_wandb(own_cache / "wandb")
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events, found = EventAccumulator(str(own_cache / "tensorboard" / "run_try")), {}
        for tag in events.Reload().Tags()["scalars"]:
            for event in events.Scalars(tag):
                found.setdefault(event.step, {})[tag] = event.value
    for line in lines:
        place = f"layer_{line['layer']}/seed_{line['seed']}"
        for name in ("fvu", "l0", "dead_fraction", "tau_sel", "lr"):
            assert found[line["step"]][f"{place}/{name}"] == pytest.approx(line[name], rel=1e-6)
    info = json.loads((tmp_path / "run_try" / "final_info.json").read_text())
    layer = next(name for name in info if name.startswith("layer"))
    last = found[max(found)]
    assert last[f"final/{layer}/l0"] == pytest.approx(info[layer]["means"]["l0"], rel=1e-6)


def test_a_tracker_that_fails_ends_no_run(toy, tmp_path, own_cache, monkeypatch, capfd) -> None:
    calls = []

    def start(name, config):
        def log(values, step):
            calls.append(step)
            raise OSError("the server is gone")

        return log, lambda: calls.append("end")

    monkeypatch.setitem(tracking.STARTS, "wandb", start)
    monkeypatch.setenv("SAE_TRACK", "wandb")
    assert run_command(toy, tmp_path / "run_try") == 0
    out = capfd.readouterr().out
    assert out.count("the run goes on without: the server is gone") == 1
    assert calls[1:] == ["end"] and TRACKER.log is None


@pytest.mark.parametrize("kind, sentence", [
    ("tensorbord", "SAE_TRACK must be one of '', 'wandb', 'tensorboard', but is 'tensorbord'"),
    ("wandb", "track='wandb' takes the package wandb, which is not installed: `pip install wandb`"),
])  # fmt: skip
def test_a_tracker_that_is_not_there_is_told_at_the_start(kind, sentence, toy, monkeypatch) -> None:
    monkeypatch.setenv("SAE_TRACK", kind)
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match=sentence):
        tracker(toy.Settings())
    monkeypatch.setenv("SAE_TRACK", "")
    assert tracker(toy.Settings()) == ""


def test_a_sweep_is_a_run_per_value() -> None:
    assert sweep("k", k_min=(8, 16)) == {
        "run_k_8": {"description": "k_min 8", "k_min": 8},
        "run_k_16": {"description": "k_min 16", "k_min": 16},
    }
    pairs = sweep("two", {"seeds": (0, 1, 2)}, lr=(1e-3, 5e-4), k_min=(8,))
    assert list(pairs) == ["run_two_0.001_8", "run_two_0.0005_8"]
    assert pairs["run_two_0.001_8"] == {
        "description": "lr 0.001, k_min 8", "seeds": (0, 1, 2), "lr": 1e-3, "k_min": 8,
    }  # fmt: skip


def test_progress_says_what_an_sae_has_come_to() -> None:
    records = [{"fvu": 0.271, "l0": 31.6, "dead_fraction": 0.08}, {"fvu": 0.3, "l0": 32.0}]
    assert shown(records[:1]) == "fvu 0.27, L0 32, dead 0.08"
    assert shown(records) == "fvu 0.27/0.30, L0 32/32"  # another project's trainer
