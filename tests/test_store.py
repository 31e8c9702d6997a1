"""What is kept from run to run, under which key, and what is refused: in one process."""

from __future__ import annotations

import ast
import collections
import contextlib
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import experiment
from harness.command import Attempt, main
from harness.console import Progress, redirect_output
from harness.errors import ExperimentError, error_context
from harness.evaluation.core import check_core, save_core
from harness.fingerprint import (
    activations_key,
    environment_fingerprint,
    evaluation_keys,
    hash_definitions,
    own_modules,
    training_key,
)
from harness.start import ENVIRONMENT
from harness.store import TensorCache, cached, evict, read_state, store_dir, write_state
from harness.text import TokenStream, documents
from harness.training import SAVE_EVERY, SAVE_SHARE, Checkpoints
from tests.conftest import ROOT, replace
from tests.test_run import words

SOURCE = (ROOT / "experiment.py").read_text()
NOT_TRAINING = ("EVALUATION", "RECORDS")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "parametric-sae"


def run(toy, out_dir: Path) -> int:
    return main(toy.run, [f"--out_dir={out_dir}"])


# ------------------------------------------------------------------------------- the key


def changed_in_one_place() -> list[tuple[str, str, str]]:
    """(section, function, experiment.py with one constant of the function changed)."""
    lines = SOURCE.splitlines(keepends=True)
    found = []
    sections = [
        (number, lines[number][2:].split()[0].rstrip(":,"))
        for number in range(1, len(lines) - 1)
        if lines[number - 1].startswith("# ===") and lines[number + 1].startswith("# ===")
    ]
    tree = ast.parse(SOURCE)
    methods = [
        (f"{node.name}.{part.name}", part)
        for node in tree.body if isinstance(node, ast.ClassDef)
        for part in node.body if isinstance(part, ast.FunctionDef)
    ]  # fmt: skip
    functions = [(node.name, node) for node in tree.body if isinstance(node, ast.FunctionDef)]
    for name, node in methods + functions:
        section = [title for at, title in sections if at < node.lineno][-1]
        docstring = ast.get_docstring(node) is not None
        constants = [
            constant
            for statement in node.body[docstring:]
            for constant in ast.walk(statement)
            if isinstance(constant, ast.Constant) and type(constant.value) in (int, float)
        ]
        new = list(lines)
        if constants:
            at = constants[0]
            line = new[at.lineno - 1].encode()
            line = line[: at.col_offset] + b"7" + line[at.end_col_offset :]
            new[at.lineno - 1] = line.decode()
        else:  # a statement more, where there is nothing to change
            first = node.body[docstring]
            indent = " " * first.col_offset
            new.insert(first.lineno - 1, f"{indent}unused = 7\n")
        found.append((section, name, "".join(new)))
    return found


def test_a_constant_in_any_function_changes_the_keys_that_hang_on_it() -> None:
    """Of training: all but those of evaluation and records. Of evaluation: all but records'."""
    training = hash_definitions(SOURCE, NOT_TRAINING)[0]
    evaluation = hash_definitions(SOURCE, NOT_TRAINING[1:])[0]
    cases = changed_in_one_place()
    assert len(cases) > 40
    seen = set()
    for section, name, text in cases:
        seen.add(section)
        changed = hash_definitions(text, NOT_TRAINING)[0]
        if section in NOT_TRAINING:
            assert changed == training, name
        else:
            differing = {n for n in changed | training if changed.get(n) != training.get(n)}
            assert differing == {name}, (name, differing)
        changed = hash_definitions(text, NOT_TRAINING[1:])[0]
        assert (changed == evaluation) == (section == "RECORDS"), name
    assert {"THE", "TRAINING", "EVALUATION", "RECORDS", "MAIN"} <= seen


@pytest.mark.parametrize(
    "old, new, anew",
    [
        ("# Unselected", "", False),
        ('    """Rows of W_dec back to unit norm."""', '    """Other words."""', False),
        ('"run_4": dict(', '"run_44": dict(k_min=3), "run_4": dict(', False),
        ("lr: float = 1.5e-3  #", "lr: float = 1.6e-3  #", False),  # the setting is in the key
        ("SHOWN = (\n", "SHOWN = (\n    'l1',\n", False),
        ("SHOWN = (\n", "torch.manual_seed(3)\nSHOWN = (\n", True),  # does something
        ("SHOWN = (\n", "SHOWN = torch.manual_seed(3)\nX = (\n", True),
        ("    return min(rise, fall)", "    return min(rise, fall, len(SHOWN))", True),
        ("import copy\n", "import copy\nimport csv\n", True),  # in doubt
        ("SHOWN = (\n", "X = CustomSAE.encode = None\nSHOWN = (\n", True),
        ("SHOWN = (\n", "def f(x=print(1)):\n    pass\n\n\nSHOWN = (\n", True),
        ("SHOWN = (\n", "class X:\n    print(1)\n\n\nSHOWN = (\n", True),
        ("SHOWN = (\n", "def f(x=1):\n    print(x)\n\n\nSHOWN = (\n", False),
        ("    lr: float = 1.5e-3  #", "    aux = 1.0\n    lr: float = 1.5e-3  #", True),
        ("    k_start = min(", '    PROFILES["tinylm"]\n    k_start = min(', True),
        ("    k_start = min(", '    globals()["layer_metrics"]\n    k_start = min(', True),
        ("texts = documents(settings.training_text", "texts = SHOWN(settings.training_text",
         True),
    ],
)
def test_what_else_trains_anew(old: str, new: str, anew: bool) -> None:
    if old == "# Unselected":
        text = SOURCE.replace("\n\n\n", "\n\n\n# a comment\n", 3)
    else:
        assert SOURCE.count(old) == 1
        text = SOURCE.replace(old, new)
    parts = hash_definitions(SOURCE, NOT_TRAINING)[0]
    assert (hash_definitions(text, NOT_TRAINING)[0] != parts) == anew


def test_code_of_the_evaluation_that_training_calls_is_in_its_key() -> None:
    """Directly, or by way of another function of an excluded section."""
    text = SOURCE.replace("    return min(rise, fall)", "    return layer_metrics(rise, fall)")
    parts = hash_definitions(text, NOT_TRAINING)[0]
    assert "layer_metrics" in parts and "sae_name" in parts
    again = text.replace('row["training_tokens"] = training.tokens', "pass")
    assert again != text and hash_definitions(again, NOT_TRAINING)[0] != parts


def test_settings_in_the_key() -> None:
    """Training's; those of the evaluation alone are not, unless training's code names them."""
    settings = experiment.settings_of("run_1", "tinylm")
    cpu = torch.device("cpu")

    def key(source: str = SOURCE, **changes) -> dict:
        s = dataclasses.replace(settings, **changes)
        return training_key(s, source, {}, "float32", cpu)

    same = key()
    for changes in ({"probe_ks": (1, 2, 5)}, {"core_prompts": 8}, {"compare_to": "run_2"},
                    {"description": "other"}):  # fmt: skip
        assert key(**changes) == same
    for changes in ({"lr": 1e-3}, {"seeds": (1,)}, {"lm_dtype": "bfloat16"}, {"gamma": 0.1}):
        assert key(**changes) != same
    uses = SOURCE.replace("x_BD = x_BD.to(sae.W_enc.dtype) * sae.norm_scaling_factor",
                          "x_BD = x_BD[: settings.core_prompts] * sae.norm_scaling_factor")  # fmt: skip
    assert uses != SOURCE and key(uses) != key(uses, core_prompts=8)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert key() != same
    torch.set_num_threads(threads)
    assert training_key(settings, SOURCE, {}, "bfloat16", cpu) != same


def test_a_module_of_one_s_own_and_numeric_variables_are_in_the_key(tmp_path, monkeypatch) -> None:
    """Also one that another imports; but for docstrings and comments."""
    replace(monkeypatch, "HERE", tmp_path)
    (tmp_path / "losses.py").write_text("import parts\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "tanh.py").write_text('"""Words."""\nX = 1\n')
    source = "import numpy\ndef f():\n    from losses import huber\n"
    first = own_modules(source)
    assert set(first) == {"losses.py", "parts/tanh.py"}
    (tmp_path / "parts" / "tanh.py").write_text('"""Other words."""\nX = 1  # one\n')
    own_modules.cache_clear()
    assert own_modules(source) == first
    (tmp_path / "parts" / "tanh.py").write_text("X = 2\n")
    own_modules.cache_clear()
    assert own_modules(source) != first
    monkeypatch.undo()
    own_modules.cache_clear()
    settings = experiment.settings_of("run_1", "tinylm")
    before = environment_fingerprint(settings, SOURCE, torch.device("cpu"))
    assert {"harness/store.py", "tinylm/corpus.py"} <= set(before["file"])
    monkeypatch.setitem(ENVIRONMENT, "OMP_SCHEDULE", "dynamic")
    assert environment_fingerprint(settings, SOURCE, torch.device("cpu")) != before
    monkeypatch.undo()
    reads = SOURCE + '\nX = float(os.environ.get("FACTOR", 1)) + len(os.environ["PLACE"])\n'
    before = environment_fingerprint(settings, reads, torch.device("cpu"))
    for name in ("FACTOR", "PLACE", "OTHER"):
        monkeypatch.setitem(ENVIRONMENT, name, "3")
        after = environment_fingerprint(settings, reads, torch.device("cpu"))
        assert (after == before) == (name == "OTHER"), name
        before = after


def test_the_keys_of_evaluations() -> None:
    """An edit of one part of the evaluation leaves the other's; untrained twins outlive an edit
    of the loss, whose SAEs have other weights."""
    settings = experiment.settings_of("run_1", "tinylm")
    torch.manual_seed(0)
    sae = experiment.new_sae(settings, 2, 0, torch.zeros(32), 1.0, {}, 4)

    def keys(source: str = SOURCE, sae=sae, **changes) -> list[dict]:
        s = dataclasses.replace(settings, **changes)
        return [
            evaluation_keys({"sae": sae}, s, source, [root])["sae"]
            for root in ("core_evaluation", "sparse_probing")
        ]

    core, probing = keys()
    assert keys(lr=1.0, batch=64, seeds=(3,)) == [core, probing]
    assert keys(SOURCE.replace("residual_BD.pow(2).mean()", "1")) == [core, probing]
    edited = SOURCE.replace("progress.advance(len(saes), dataset)", "progress.advance(1, dataset)")
    assert keys(edited)[0] == core and keys(edited)[1] != probing
    edited = SOURCE.replace("flat | {", "flat | {'more': 1} | {")
    assert keys(edited)[0] != core and keys(edited)[1] == probing
    edited = SOURCE.replace("torch.relu(values)", "values")
    assert keys(edited)[0] != core and keys(edited)[1] != probing
    for changes in ({"probe_ks": (1, 2, 5)}, {"core_prompts": 8}, {"context": 64}):
        assert keys(**changes) != [core, probing]
    other = experiment.new_sae(settings, 2, 0, torch.zeros(32), 1.0, {}, 4)
    other.cutoff = 0.1  # no parameter, and yet a part of what an edited SAE computes with
    assert keys(sae=other)[0] != core


# ------------------------------------------------------------------------------- the store


STATE = {
    "a": torch.arange(6).reshape(2, 3).T, "pairs": {(2, 0): {"x": torch.zeros(())}, 7: [1, (2,)]},
    "text": None, "number": 0.1, "random": torch.Generator().get_state(),
}  # fmt: skip


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    write_state(STATE, tmp_path / "state")
    back = read_state(tmp_path / "state")
    assert list(back) == list(STATE) and back["number"] == 0.1 and back["text"] is None
    assert torch.equal(back["a"], STATE["a"]) and torch.equal(back["random"], STATE["random"])
    assert back["pairs"][7] == [1, (2,)] and back["pairs"][2, 0]["x"].shape == ()


@pytest.mark.parametrize("damage", ["cut short", "a byte flipped", "emptied"])
def test_a_damaged_checkpoint_is_set_aside_and_never_read(
    own_cache: Path, capsys, damage: str
) -> None:
    checkpoints = Checkpoints({"a": 1})
    checkpoints.save(lambda: STATE, 0.25)
    checkpoints.save(lambda: STATE | {"number": 0.2}, 0.5)
    (path,) = checkpoints.folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "a byte flipped":
        content[-5] ^= 1
    path.write_bytes(content[: {"cut short": len(content) - 3, "emptied": 0}.get(damage)])
    checkpoints.close()
    again = Checkpoints({"a": 1})
    assert again.load() is None
    out = capsys.readouterr().out
    assert f"{path} is damaged: set aside as {path.name}.damaged, and made again" in out
    again.save(lambda: STATE | {"number": 0.3}, 1.0)
    assert again.load()["number"] == 0.3
    again.close()


def test_only_one_process_saves_a_training_and_others_may_read_it(own_cache: Path, capsys) -> None:
    first, second = Checkpoints({"a": 1}), Checkpoints({"a": 1})
    assert "another process is at the same one" in capsys.readouterr().out
    first.save(lambda: STATE, 0.5)
    second.save(lambda: STATE | {"number": 9}, 0.75)
    assert second.load()["number"] == 0.1
    first.close()
    second.close()


def test_saving_keeps_to_its_share_of_the_time(own_cache: Path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoints = Checkpoints({"a": 1})
    now[0] = SAVE_EVERY - 1
    assert not checkpoints.due()
    now[0] += 1
    assert checkpoints.due()

    def write(state: dict, path: Path) -> None:
        path.touch()
        now[0] += 10

    replace(monkeypatch, "write_state", write)
    checkpoints.save(lambda: STATE, 0.5)
    now[0] += 10 / SAVE_SHARE - 1
    assert not checkpoints.due()
    now[0] += 1
    assert checkpoints.due()
    checkpoints.close()


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
    busy.save(lambda: STATE, 0.5)
    (path,) = busy.folder.glob("*.safetensors")
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


def test_trained_halfway_by_threads_the_rest_comes_out_the_same(
    toy, toy_lm, tmp_path: Path, own_cache: Path, monkeypatch
) -> None:
    """After each filling of the buffer, in every form; the text starts again meanwhile."""
    replace(monkeypatch, "SAVE_EVERY", 0.0)
    replace(monkeypatch, "SAVE_SHARE", 1e9)
    for name in ("run_1", "run_6", "run_10"):
        settings = dataclasses.replace(
            toy.settings_of(name, "tinylm"), seeds=(0, 1), training_tokens=49_152,
            buffer_tokens=12_288,
        )  # fmt: skip
        fixed = toy.constants(settings, tmp_path / name)

        def train(checkpoints, fillings=None, settings=settings, fixed=fixed):
            stream = TokenStream(
                documents("toy", "train"), toy_lm.tokenizer, settings.context
            )
            buffer = toy.ActivationBuffer(toy_lm, stream, settings.layers, 8)
            take, left = buffer.take, [fillings]

            def cut_off(*arguments):
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] = None if left[0] is None else left[0] - 1
                return take(*arguments)

            buffer.take = cut_off
            try:
                return toy.train(
                    settings, buffer, fixed, tmp_path / "log.jsonl", checkpoints=checkpoints
                )
            finally:
                stream.close()

        whole = train(None)
        expected = (tmp_path / "log.jsonl").read_text().count("\n")
        checkpoints = Checkpoints({"name": name})
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                train(checkpoints, fillings=1)
        pieces = train(checkpoints)
        for key, sae in whole.saes.items():
            for parameter, value in sae.state_dict().items():
                assert torch.equal(pieces.saes[key].state_dict()[parameter], value)
        assert pieces.tokens == whole.tokens and pieces.shortened is None
        assert (tmp_path / "log.jsonl").read_text().count("\n") == expected
        assert {k: v["fvu"] for k, v in pieces.last.items()} == {
            k: v["fvu"] for k, v in whole.last.items()
        }
        cached = train(checkpoints, fillings=0)  # nothing left to do
        assert torch.equal(cached.saes[2, 1].W_dec, whole.saes[2, 1].W_dec)
        checkpoints.close()


def test_a_reduced_count_of_tokens_is_reused_on_resume(
    toy, tmp_path: Path, own_cache: Path, monkeypatch, capsys
) -> None:
    """A slow first attempt shortens training; the next one doesn't decide anew."""
    changes = {**toy.PLAN["run_1"], "budget_minutes": 1e-6}
    monkeypatch.setitem(toy.PLAN, "run_1", changes)
    evaluate = toy.evaluate
    monkeypatch.setattr(
        toy, "evaluate",
        lambda s, *rest: evaluate(s, *rest) if Progress.prefix else 1 / 0,
    )  # fmt: skip
    assert run(toy, tmp_path / "run_1") == 1
    said = words(capsys.readouterr().err)
    assert said["cause"].startswith("ZeroDivisionError")
    assert "it goes on from what is kept (activations, training)" in said["to do"]
    monkeypatch.setattr(toy, "evaluate", evaluate)
    replace(monkeypatch, "fit_budget", lambda *_: pytest.fail("decided anew"))
    assert run(toy, tmp_path / "run_1") == 0
    info = json.loads((tmp_path / "run_1" / "final_info.json").read_text())
    assert info["layer_0"]["means"]["training_tokens"] == 2048
    assert "shortened to 50%" in (tmp_path / "run_1" / "warnings.json").read_text()


def test_activations_are_harvested_once(toy, toy_lm, tmp_path, own_cache, monkeypatch) -> None:
    """Another training of the same text reads them; a longer one harvests the rest; a damaged
    file is made again, and what follows it."""
    settings = toy.settings_of("run_1", "tinylm")
    n_passes = [0]
    activations = toy_lm.activations

    def counted(*arguments):
        n_passes[0] += 1
        return activations(*arguments)

    monkeypatch.setattr(toy_lm, "activations", counted)

    def taken(amounts: list[int], key: dict | None, state: dict | None = None):
        n_passes[0] = 0
        texts = documents("toy", "train")
        stream = TokenStream(texts, toy_lm.tokenizer, settings.context)
        buffer = toy.ActivationBuffer(toy_lm, stream, settings.layers, 8, key)
        if state:
            buffer.load_state_dict(state)
        with contextlib.closing(stream):
            acts = torch.cat([buffer.take(n) for n in amounts], dim=1)
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
    second = sorted((own_cache / "store" / "activations").rglob("*.safetensors"))[1]
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    mended, n_mended, _ = taken([9000], {"a": 1})
    assert torch.equal(mended, expected) and n_mended == 40 - 8
    assert second.exists() and second.with_name(f"{second.name}.damaged").exists()
    assert taken([9000], {"a": 2})[1] == 40


def test_tensors_are_written_while_work_goes_on(own_cache: Path, monkeypatch, capsys) -> None:
    """Whole once `flush` returns; a disk that is full is said once, and costs the keeping alone."""
    write, begun, go_on = write_state, threading.Event(), threading.Event()

    def slowly(state: object, path: Path) -> None:
        begun.set()
        assert go_on.wait(10)
        write(state, path)

    replace(monkeypatch, "write_state", slowly)
    files = TensorCache("things", {"of": 1})
    files.keep("a", {"x": torch.arange(4)})  # returns at once
    assert begun.wait(10) and files.find("a") is None
    go_on.set()
    files.keep("b", {"x": torch.arange(5)})
    files.flush()
    again = TensorCache("things", {"of": 1})
    assert [len(again.find(name)["x"]) for name in "ab"] == [4, 5]

    def full(state: object, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    replace(monkeypatch, "write_state", full)
    for name in "cd":
        files.keep(name, {"x": torch.arange(4)})
    files.flush()
    assert capsys.readouterr().out.count("things can't be kept in") == 1
    assert files.find("a") is None and not list(own_cache.rglob("partial-*"))

    def broken(state: object, path: Path) -> None:
        raise TypeError("a state that is none")

    replace(monkeypatch, "write_state", broken)
    again.keep("e", {"x": torch.arange(4)})
    with pytest.raises(TypeError, match="a state that is none"):
        again.flush()


def test_the_keys_of_activations(toy, toy_lm, monkeypatch) -> None:
    """An edit of the loss or of its settings leaves them, one of the buffer doesn't."""
    settings = experiment.settings_of("run_1", "tinylm")

    def key(source: str = SOURCE, **changes) -> dict:
        s = dataclasses.replace(settings, **changes)
        return activations_key(s, source, "float32", toy_lm)

    same = key()
    assert key(lr=1.0, batch=64, seeds=(3,), training_tokens=2_000_000, d_sae=64) == same
    assert key(SOURCE.replace("residual_BD.pow(2).mean()", "residual_BD.abs().mean()")) == same
    assert key(SOURCE.replace("keep_BL = ~torch.isin", "keep_BL = torch.isin")) != same
    for changes in ({"layers": (1,)}, {"context": 64}, {"harvest_contexts": 4}):
        assert key(**changes) != same
    assert key(training_tokens=10**9) is None


# ------------------------------------------------------------------ numbers that can't be right


def test_a_loss_that_is_not_finite_stops_the_run(
    toy, tmp_path: Path, own_cache: Path, monkeypatch, capsys
) -> None:
    """With step, layer, the last finite values, and the batch that did it."""
    loss, calls = toy.contrastive_loss, []

    def breaks(sae, x_BD, *rest):
        found = loss(sae, x_BD, *rest)
        if sae.cfg.hook_layer == 2 and not Progress.prefix:
            calls.append(x_BD)
            if len(calls) == 12:
                found.total = found.total * torch.nan
        return found

    monkeypatch.setattr(toy, "contrastive_loss", breaks)
    assert run(toy, tmp_path / "run_1") == 1
    said = words(capsys.readouterr().err)
    assert said["during"] == "train (layer 2, seed 0)"
    assert "the loss is nan at step 11 (1408 tokens)" in said["cause"]
    before = r"the loss of the step before: \d\.\d+; the last record: step 8, loss \d"
    assert re.search(before, said["cause"])
    path = re.search(r"its batch is in (\S+)", said["cause"])[1]
    from safetensors.torch import load_file

    settings = toy.settings_of("run_1", "tinylm")
    (x_BD,) = load_file(path).values()
    assert x_BD.shape == (settings.batch, 32)
    scale = calls[11].norm() / x_BD.float().norm()
    assert torch.allclose(x_BD.float() * scale, calls[11], rtol=1e-3)
    assert not (tmp_path / "run_1" / "final_info.json").exists()


def test_an_untrained_sae_is_no_result(toy, tmp_path, own_cache, monkeypatch, capsys) -> None:
    """How the given baseline came about: found in the rehearsal."""
    monkeypatch.setattr(toy.Trainer, "resample", lambda *_: None)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: None)
    assert run(toy, tmp_path / "run_1") == 1
    said = words(capsys.readouterr().err)
    assert said["during"].startswith("rehearsal: ")
    assert "no training step was done" in said["cause"]


def test_silent_sae_and_results_of_another_layer(
    toy, toy_lm, tmp_path, own_cache, monkeypatch, capsys
) -> None:
    encode = toy.CustomSAE.encode
    monkeypatch.setattr(toy.CustomSAE, "encode", lambda sae, x: 0 * encode(sae, x))
    assert run(toy, tmp_path / "run_1") == 1
    said = words(capsys.readouterr().err)
    assert "core evaluation of layer_0_seed_0: " in said["cause"]
    monkeypatch.setattr(toy.CustomSAE, "encode", encode)

    new = toy.new_sae

    def at_layer_0(*arguments):
        sae = new(*arguments)
        sae.cfg.hook_layer, sae.cfg.hook_name = 0, "blocks.0.hook_resid_post"
        return sae

    monkeypatch.setattr(toy, "new_sae", at_layer_0)
    assert run(toy, tmp_path / "run_1") == 1
    said = words(capsys.readouterr().err)
    assert "layer_2_seed_0: expected {'layer': 2," in said["cause"]
    assert "must not be recorded as another's" in said["cause"]
    monkeypatch.setattr(toy, "new_sae", new)

    save = save_core
    replace(monkeypatch, "save_core", lambda name, *rest: name == "layer_2_seed_0"
                        or save(name, *rest))  # fmt: skip
    assert run(toy, tmp_path / "run_1") == 1
    cause = words(capsys.readouterr().err)["cause"]
    assert "core evaluation of layer_2_seed_0 left no result" in cause


def test_garbage_from_an_edited_evaluation_is_not_recorded(
    toy, tmp_path, own_cache, monkeypatch, capsys
) -> None:
    """Nor is a run complete that wrote no final_info.json."""
    score = toy.sparse_probing

    def garbage(*arguments):
        found = score(*arguments)
        for metrics in found.values() if not Progress.prefix else ():
            metrics["sae_top_5_test_accuracy"] = -1.0
        return found

    monkeypatch.setattr(toy, "sparse_probing", garbage)
    assert run(toy, tmp_path / "run_1") == 1
    cause = words(capsys.readouterr().err)["cause"]
    assert cause.startswith("layer_0: sae_top_5_test_accuracy is -1.0, which can't be right")
    assert not (tmp_path / "run_1" / "final_info.json").exists()
    monkeypatch.setattr(toy, "write_records", lambda *_: None)
    assert run(toy, tmp_path / "run_1") == 1
    said = words(capsys.readouterr().err)
    assert "the run ended, but there is no run_1/final_info.json" in said["cause"]


def test_a_state_that_can_not_be_saved_costs_the_saving_alone(
    toy, tmp_path, own_cache, monkeypatch, capsys
) -> None:
    """What an edit adds to a trainer as a number is saved with it; another thing is named."""
    begin = toy.Trainer.__init__

    def more(trainer, *arguments):
        begin(trainer, *arguments)
        trainer.queue = collections.deque()

    monkeypatch.setattr(toy.Trainer, "__init__", more)
    assert run(toy, tmp_path / "run_1") == 0
    assert "training can't be kept in" in (out := capsys.readouterr().out)
    assert "Trainer.queue is a deque" in out


def test_folders_that_are_no_run_s_are_left_alone(toy, tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    cases = {
        tmp_path: "holds other files",
        ROOT / "tinylm": "holds other files",
        ROOT / "run_0": "the given baseline",
        ROOT: "of the run's own",
    }
    for folder, says in cases.items():
        assert run(toy, folder) == 1
        assert says in words(capsys.readouterr().err)["cause"]


def test_nobody_listens(tmp_path: Path, own_cache: Path) -> None:
    """`python experiment.py … | head -1` ends in last words, or goes on; never in silence."""
    code = """if True:
        import sys
        from harness.command import main
        from harness.console import quiet, say
        def run(out_dir, log):
            with quiet(log):
                say("x" * 100000)
                raise ValueError("the cause")
        sys.exit(main(run, ["--out_dir=run_x"]))"""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=write,
                          stderr=subprocess.PIPE, text=True)  # fmt: skip
    os.close(write)
    assert words(done.stderr.split("Exception ignored")[0])["cause"] == "ValueError: the cause"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_core_scalars_that_cannot_be(value: float) -> None:
    with pytest.raises(ExperimentError, match="mse is .*, which can't be right"):
        check_core("layer_2", {"l0": 4.0, "mse": value})
    with pytest.raises(ExperimentError, match="L0 is 0, no feature is active"):
        check_core("layer_2", {"l0": 0.0, "mse": 1.0})


# ------------------------------------------------------------------------------- the last words


def test_last_words_fit_whatever_was_said_before(tmp_path: Path, own_cache, capfd) -> None:
    def noisy(out_dir: Path, log: Path) -> None:
        with redirect_output(log):
            for n in range(1000):
                os.write(2, b"\rLoading checkpoint shards: %d" % n)
        with error_context("layer 7"), error_context("tinylm/B/subject"):
            raise ValueError("beginning " + 5000 * "noise\n" + " the end; hf_abcdefghijk")

    assert main(noisy, [f"--out_dir={tmp_path / 'run_1'}"]) == 1
    error = capfd.readouterr().err
    assert len(error) <= 1500 and "Loading" not in error and "hf_a" not in error
    said = words(error)
    assert said["during"] == "start-up (layer 7, tinylm/B/subject)"
    assert said["cause"].startswith("ValueError: beginning noise")
    assert said["cause"].endswith("the end; [token]")
    assert "Loading checkpoint shards: 999" in Path(said["log"]).read_text()


def test_sys_exit_in_the_middle_is_a_failure(tmp_path: Path, own_cache: Path, capsys) -> None:
    assert main(lambda out_dir, log: exit(0), [f"--out_dir={tmp_path / 'run_1'}"]) == 1
    assert "SystemExit" in words(capsys.readouterr().err)["cause"]
    with pytest.raises(SystemExit):
        main(lambda out_dir, log: None, ["--help"])


def test_the_next_start_tells_of_a_death_without_a_word(
    tmp_path: Path, own_cache: Path, monkeypatch, capsys
) -> None:
    """Read from what a killed process leaves: the record of its attempt as it last stood."""
    out_dir, log = tmp_path / "run_1", tmp_path / "log"

    def dies() -> None:
        attempt = Attempt(out_dir, log)
        Progress.stage("core evaluation")
        record = json.loads(attempt.path.read_text())
        assert record["stage"] == "core evaluation" and record["memory_gb"] > 0.05
        attempt.over.set()  # no heartbeat any more
        os.close(attempt.lock)
        record |= {"machine_gb": 15.5, "total_gb": 16.0, "seconds": 312.0}
        attempt.path.write_text(json.dumps(record))
        Attempt.current = None

    dies()
    dies()
    assert main(lambda out_dir, log: None, [f"--out_dir={out_dir}"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the last attempt at run_1, of ")
    assert "ended without a word, as 1 before it: killed during core evaluation, after 312" in line
    assert "the machine 15.5 of 16.0; if it was for want of memory, lower core_prompts" in line
    assert str(log) in line
    assert main(lambda out_dir, log: None, [f"--out_dir={out_dir}"]) == 0
    assert capsys.readouterr().err == ""
