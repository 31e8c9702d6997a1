"""What is kept from run to run, under which key, and what is refused: in one process."""

from __future__ import annotations

import ast
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

import experiment
from harness.checkpoints import Checkpoints
from harness.fingerprint import (
    activations_key,
    environment_fingerprint,
    evaluation_keys,
    hash_definitions,
    own_modules,
    training_key,
)
from harness.start import ENVIRON_AT_START as ENVIRONMENT
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
    edited = SOURCE.replace("core.calculate_misc_metrics(features)", "{}")
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

    def lengths(names: list[str]) -> dict[str, list]:
        asked.append(names)
        return {name: [len(name), (1, 2)] for name in names}

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
        monkeypatch.setattr(Run, "activations_key", lambda *_: key)
        texts = documents("toy", "train")
        with TokenStream(texts, toy_lm.tokenizer, settings.context) as stream:
            buffer = toy.ActivationBuffer(Run(settings, toy_lm), stream)
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
