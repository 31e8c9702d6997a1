"""Training watched in W&B or TensorBoard: the same values, by their own readers; nothing ends."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from harness import preflight, tracking
from harness.curves import ASIDE
from harness.errors import ExperimentError
from harness.preflight import tracker
from harness.settings import settings_of_run, sweep
from harness.steps import shown
from harness.tracking import TRACKER
from tests.conftest import ROOT, run_command


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

        (folder,) = (own_cache / "tensorboard" / "tinylm" / "run_try").iterdir()
        events, found = EventAccumulator(str(folder)), {}
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


def test_a_training_that_is_reused_is_shown_whole(toy, tmp_path, own_cache, monkeypatch) -> None:
    """One that goes on, or is done already: a tracker begins anew, with all records so far."""
    logged, names = [], []

    def start(name, config):
        names.append(name)
        return lambda values, step: logged.append((step, {*values})), lambda: None

    monkeypatch.setitem(tracking.STARTS, "wandb", start)
    monkeypatch.setattr(tracking, "lacks_login", lambda: False)
    monkeypatch.setenv("SAE_TRACK", "wandb")
    assert run_command(toy, tmp_path / "run_try") == 0
    first = logged.copy()
    logged.clear()
    assert run_command(toy, tmp_path / "run_try") == 0
    assert len(first) > 3 and logged == first
    assert names == ["tinylm/run_try"] * 2


def test_a_tracker_that_fails_ends_no_run(toy, tmp_path, own_cache, monkeypatch, capfd) -> None:
    calls = []

    def start(name, config):
        def log(values, step):
            calls.append(step)
            raise OSError("the server is gone")

        return log, lambda: calls.append("end")

    monkeypatch.setitem(tracking.STARTS, "wandb", start)
    monkeypatch.setattr(tracking, "lacks_login", lambda: False)
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


@pytest.mark.parametrize("mode, key, lacks", [
    ("online", None, True), ("online", "a" * 40, False), ("offline", None, False),
    ("disabled", None, False),
])  # fmt: skip
def test_wandb_asks_for_no_key_in_the_middle_of_a_run(
    mode, key, lacks, toy, tmp_path, monkeypatch
) -> None:
    """In a process of its own, on a terminal, where W&B would ask and wait."""
    code = """if True:
        from types import SimpleNamespace
        from harness import tracking
        from harness.errors import ExperimentError
        from harness.preflight import tracker
        try:
            print("found", tracker(SimpleNamespace(track="wandb")))
        except ExperimentError as error:
            print("refused", error)
            try:
                tracking.start_wandb("x", {})
            except Exception as error:
                print("not asked", error)
        """
    environment = {**os.environ, "HOME": str(tmp_path), "WANDB_MODE": mode, "TERM": "xterm"}
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_CONFIG_DIR"):
        environment.pop(name, None)
    environment |= {"WANDB_API_KEY": key} if key else {}
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, stdin=theirs, stderr=theirs,
            stdout=subprocess.PIPE, text=True, timeout=120,
        )  # fmt: skip
    finally:
        os.close(theirs)
        os.close(ours)
    said = done.stdout.splitlines()
    if lacks:
        assert "track='wandb' needs an API key of W&B, and there is none: `wandb login`" in said[-2]
        assert said[-1].startswith("not asked")
    else:
        assert said == ["found wandb"]


def test_a_sweep_is_a_run_per_value() -> None:
    assert sweep("k", k_min=(8, 16)) == {
        "run_k_8": {"description": "k_min 8", "k_min": 8},
        "run_k_16": {"description": "k_min 16", "k_min": 16},
    }
    pairs = sweep("two", {"seeds": (0, 1, 2)}, lr=(1e-3, 5e-4), k_min=(8,))
    assert list(pairs) == ["run_two_0p001_8", "run_two_0p0005_8"]
    assert pairs["run_two_0p001_8"] == {
        "description": "lr 0.001, k_min 8", "seeds": (0, 1, 2), "lr": 1e-3, "k_min": 8,
    }  # fmt: skip
    assert list(sweep("k", k_min=range(8, 24, 8))) == ["run_k_8", "run_k_16"]


def test_no_run_of_a_sweep_is_taken_for_one_that_was_set_aside() -> None:
    """Of numbers with a point, too: run_3.1 is on no curve and in no figure."""
    values = dict(sparsity_coefficient=(0.5, (0.5, 1.25), 2.0, 1e-5), core_text=("texts.2", "a"))
    names = [*sweep("c", **values)]
    assert len(names) == 8 and not any(ASIDE.search(name) for name in names)


def test_a_sweeps_names_are_those_of_folders() -> None:
    assert sweep("l", layers=((1,), (1, 2)), core_text=("alice/a text",), tau_sel=(None,)) == {
        f"run_l_{layers}_alice-a-text_None": {
            "description": f"layers {value}, core_text alice/a text, tau_sel None",
            "layers": value, "core_text": "alice/a text", "tau_sel": None,
        }
        for layers, value in (("1", (1,)), ("1-2", (1, 2)))
    }  # fmt: skip


@pytest.mark.parametrize("values, sentence", [
    ({"k_min": 8}, "k_min must be a tuple of values, but is 8: write k_min=(8,)"),
    ({"hook": "mlp_out"}, "hook must be a tuple of values, but is 'mlp_out': write hook=("),
    ({}, "must have one or more values of one or more fields, but has {}"),
    ({"k_min": ()}, "must have one or more values of one or more fields, but has {'k_min': ()}"),
    ({"lr": (1e-3, 0.001)}, "the names of runs must differ, but two would be run_s_0p001"),
    ({"lr": (0.12345678, 0.12345679)}, "must differ, but two would be run_s_0p123457"),
])  # fmt: skip
def test_a_sweep_that_would_lose_runs_is_refused(values, sentence) -> None:
    with pytest.raises(ExperimentError) as refused:
        sweep("s", **values)
    assert sentence in str(refused.value)


def test_a_plans_line_that_is_no_dict_is_told(toy) -> None:
    with pytest.raises(ExperimentError, match=r"PLAN\['run_2'\] must be a dict of .* a comma too"):
        settings_of_run("run_2", toy.Settings, {}, {"run_2": (dict(k_min=8),)})
    with pytest.raises(ExperimentError, match="run_2: lr must be a finite number, but is inf"):
        settings_of_run("run_2", toy.Settings, {}, {"run_2": dict(lr=float("inf"))})


def test_progress_says_what_an_sae_has_come_to() -> None:
    records = [{"layer": 1, "fvu": 0.271, "l0": 31.6, "dead_fraction": 0.08},
               {"layer": 2, "fvu": 0.3, "l0": 32.0}]  # fmt: skip
    assert shown(records[:1]) == "fvu 0.27, L0 32, dead 0.08"
    assert shown(records) == "fvu 0.27/0.30, L0 32/32"  # another project's trainer
    seeds = [{"layer": layer, "l0": layer + seed} for seed in range(5) for layer in (10, 20)]
    assert shown(seeds) == "L0 12/22"  # of each layer the mean: fifteen numbers fit no line
