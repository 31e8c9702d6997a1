"""What a result depends on: the keys of the store, and that no edit gets figures of before it."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import experiment
from harness import call_graph
from harness.call_graph import files_of, hash_definitions, own_files, reachable_code
from harness.errors import ExperimentError
from harness.evaluation.core import shared_core_evals
from harness.evaluation.probe_features import probing_features
from harness.evaluation.probing import drawn_from
from harness.fingerprint import environment_fingerprint, result_key
from harness.identity import remember_libraries
from harness.observation import OBSERVED
from harness.start import ENVIRON_AT_START, SOURCES_AT_START
from harness.startup import Run, perform
from harness.text import TokenStream
from tests.conftest import ROOT, replace, run_command

SOURCE = (ROOT / "experiment.py").read_text()
CPU = torch.device("cpu")
LR = next(line for line in SOURCE.splitlines() if line.startswith("    lr: "))  # a setting


def edited(*changes: tuple[str, str], source: str = SOURCE) -> str:
    """experiment.py with changes, each of a passage that stands in it once."""
    for old, new in changes:
        assert source.count(old) == 1, (source.count(old), old)
        source = source.replace(old, new)
    return source


def forget_imported() -> None:
    """Takes edited modules out of the process: what they hold is looked at in each run."""
    for name in [name for name in sys.modules if name.startswith("edited_experiment_")]:
        del sys.modules[name]


def import_text(source: str, folder: Path) -> ModuleType:
    """An edited experiment.py as a module of a name of its own."""
    name = f"edited_experiment_{len(list(folder.glob('*.py')))}"  # in what a run saves
    (folder / f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModuleType]:
    folder = tmp_path_factory.mktemp("edited")
    return functools.cache(lambda source: import_text(source, folder))


@pytest.fixture(scope="module")
def seen(toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a rehearsal of experiment.py as it is observes, by kind."""
    folder = tmp_path_factory.mktemp("seen")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        replace(monkeypatch, "perform", stop_after_rehearsal(perform))
        assert run_command(toy, folder / "run_try") == 1
    record = OBSERVED.record()
    assert {"training", "activations", "core evaluation", "sparse probing"} <= record["ran"].keys()
    return record


@pytest.fixture
def observed(seen: dict[str, Any]) -> None:
    """The same is taken to have been seen of the edited ones."""
    OBSERVED.restore(seen)
    remember_libraries()  # as they are without what `toy` replaces


def stop_after_rehearsal(perform: Callable[..., None]) -> Callable[..., None]:
    def performed(main: Any, run: Run, *whole: bool) -> None:
        if run.keeps:
            raise ExperimentError("enough")
        perform(main, run, *whole)

    return performed


def a_run(module: ModuleType, source: str, **changes: Any) -> Run:
    settings = dataclasses.replace(module.Settings(), **changes)
    return Run(settings, types.SimpleNamespace(), source=source)


def of_training(module: ModuleType, source: str, **changes: Any) -> dict[str, Any]:
    objects = dict(train=module.train, start=module.new_trainers, buffer=module.ActivationBuffer)
    return result_key("training", a_run(module, source, **changes), objects, with_callers=True)


def of_evaluation(module: ModuleType, source: str, sae: Any = None, **changes: Any) -> list[dict]:
    """The keys of core evaluation and of sparse probing."""
    run = a_run(module, source, **changes)
    if sae is None:
        sae = an_sae(experiment)
        sae.__class__ = module.CustomSAE
    parts = {
        "core evaluation": (module.core_metrics, shared_core_evals),
        "sparse probing": (module.probe, probing_features, drawn_from),
    }
    named = {kind: dict(zip("abc", roots)) for kind, roots in parts.items()}
    return [result_key(kind, run, roots | {"SAE": sae}) for kind, roots in named.items()]


def an_sae(module: ModuleType) -> Any:
    torch.manual_seed(0)
    stats = module.ActivationStats(torch.zeros(32), 1.0)
    return module.new_sae(module.Settings(), 2, 0, stats, {}, 4)


# ------------------------------------------------------------------------ edits of one place


def changed_in_one_place() -> list[tuple[str, str]]:
    """(function, experiment.py with one constant of the function changed)."""
    lines = SOURCE.splitlines(keepends=True)
    tree, found = ast.parse(SOURCE), []
    methods = [
        (f"{node.name}.{part.name}", part)
        for node in tree.body if isinstance(node, ast.ClassDef)
        for part in node.body if isinstance(part, ast.FunctionDef)
    ]  # fmt: skip
    functions = [(node.name, node) for node in tree.body if isinstance(node, ast.FunctionDef)]
    for name, node in methods + functions:
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
            new.insert(first.lineno - 1, f"{indent}print(7)\n")
        found.append((name, "".join(new)))
    return found


# `core_metrics` and `probe` are of it: main gives them to `train`, whose budget times them.
NOT_OF_TRAINING = {"evaluate", "core_metrics", "probe", "figures_of"}


def test_a_constant_in_any_function_changes_the_keys_that_hang_on_it(load, observed) -> None:
    """Of training: all but evaluation's and records'. Of evaluation: its own and the SAE's."""
    training = of_training(experiment, SOURCE)["code of"]
    core, probing = (key["code of"] for key in of_evaluation(experiment, SOURCE))
    cases = [(n, text) for n, text in changed_in_one_place() if not n.startswith("Settings.")]
    assert len(cases) > 30 and NOT_OF_TRAINING <= {name for name, _ in cases}
    for name, text in cases:
        module = load(text)
        changed = of_training(module, text)["code of"]
        differing = {n for n in changed | training if changed.get(n) != training.get(n)}
        differing -= {"the order of statements"}
        assert differing == ({name} - NOT_OF_TRAINING), name
        now_core, now_probing = (key["code of"] for key in of_evaluation(module, text))
        assert (now_core != core) == (name in core), name
        assert (now_probing != probing) == (name in probing), name
    for method in ("encode", "decode", "fold_activation_norm_scaling"):
        assert f"CustomSAE.{method}" in core.keys() & probing.keys()
    others = {"contrastive_loss", "Trainer.step", "train", "evaluate", "new_sae", "main"}
    assert not (others | {"probe"}) & core.keys() and "core_metrics" in core
    assert not (others | {"core_metrics"}) & probing.keys() and "probe" in probing


@pytest.mark.parametrize(
    "old, new, anew",
    [
        ("# Unselected", "", False),
        ('    """Rows of W_dec back to unit norm."""', '    """Other words."""', False),
        ('"run_4": dict(', '"run_44": dict(k_min=3), "run_4": dict(', False),
        ('"smollm2": dict(', '"mine": dict(k_min=3), "smollm2": dict(', False),
        (LR, LR.replace("1.5e-3", "1.6e-3"), False),  # the setting is in the key
        (LR, "    lr: Any = 1.5e-3", False),
        ("\nSHOWN = (", "\nSHOWN = ('l1',) + (", False),
        ("\nSHOWN = (", "\ntorch.manual_seed(3)\nSHOWN = (", True),  # does something
        ("\nSHOWN = (", "\nSHOWN = torch.manual_seed(3)\nX = (", True),
        ("    return min(rise, fall)", "    return min(rise, fall, len(SHOWN))", True),
        ("import copy\n", "import copy\nimport csv\n", False),
        ("import copy\n", "import copy\nimport markupsafe\n", True),  # in doubt
        ("\nSHOWN = (", "\nX = CustomSAE.encode = None\nSHOWN = (", True),
        ("\nSHOWN = (", "\ndef f(x=print(1)):\n    pass\n\n\nSHOWN = (", True),
        ("\nSHOWN = (", "\nclass X:\n    print(1)\n\n\nSHOWN = (", True),
        ("\nSHOWN = (", "\ndef unused(x=1):\n    print(x)\n\n\nSHOWN = (", False),
        (LR, f"    aux = 1.0\n{LR}", True),
        ("    k_start = min(", '    PROFILES["tinylm"]\n    k_start = min(', True),
        ("    k_start = min(", '    globals()["figures_of"]\n    k_start = min(', True),
        ("texts = documents(run.settings.training_text",
         "texts = SHOWN(run.settings.training_text", True),
        ("    export_saes(run, training.saes)\n",
         "    export_saes(run, training.saes)\n    print(SHOWN)\n", False),
        ("sys.exit(launch(", "torch.set_num_threads(3)\n    sys.exit(launch(", True),
    ],
)  # fmt: skip
def test_what_else_trains_anew(load, observed, old: str, new: str, anew: bool) -> None:
    if old == "# Unselected":
        text = SOURCE.replace("\n\n\n", "\n\n\n# a comment\n", 3)
    else:
        text = edited((old, new))
    changed = of_training(load(text), text)["code of"]
    assert (changed != of_training(experiment, SOURCE)["code of"]) == anew


def test_what_checks_the_settings_trains_nothing_anew(load, observed) -> None:
    """The values that it lets pass are in the key; what training computes from them is code."""
    method = "    def __post_init__(self) -> None:\n"
    rule = '    @model_validator(mode="after")\n    def rule(self):\n        return self\n\n'
    imported = "import torch\n", "import torch\nfrom pydantic import model_validator\n"
    more = edited((method, f"{method}        assert self.probe_ks and self.core_prompts\n"))
    assert of_training(load(more), more) == of_training(experiment, SOURCE)
    before, after = edited(imported), edited(imported, (method, rule + method))
    assert of_training(load(after), after) == of_training(load(before), before)
    text = edited(
        (method, f"    @property\n    def half(self):\n        return self.lr / 2\n\n{method}")
    )
    assert of_training(load(text), text) != of_training(experiment, SOURCE)


def test_code_of_the_evaluation_that_training_calls_is_in_its_key(load, observed) -> None:
    """Directly, or by way of another function."""
    text = edited(("    return min(rise, fall)", "    return figures_of(rise, fall)"))
    parts = of_training(load(text), text)["code of"]
    assert "figures_of" in parts and "sae_name" in parts
    again = edited(("untrained_{m[4:]}", "untrained_{m[5:]}"), source=text)
    assert of_training(load(again), again)["code of"] != parts


def test_settings_in_the_key(load, observed) -> None:
    """Training's; those of the evaluation alone are not, unless training's code names them."""
    same = of_training(experiment, SOURCE)
    for changes in ({"probe_ks": (1, 2, 5)}, {"core_prompts": 8}, {"compare_to": "run_2"},
                    {"description": "other"}, {"track": "wandb"}):  # fmt: skip
        assert of_training(experiment, SOURCE, **changes) == same
    for changes in ({"lr": 1e-3}, {"seeds": (1,)}, {"gamma": 0.1}):
        assert of_training(experiment, SOURCE, **changes) != same
    uses = edited(("x_BD = x_BD.to(sae.W_enc.dtype) * sae.norm_scaling_factor",
                   "x_BD = x_BD[: settings.core_prompts] * sae.norm_scaling_factor"))  # fmt: skip
    module = load(uses)
    assert of_training(module, uses) != of_training(module, uses, core_prompts=8)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert of_training(experiment, SOURCE) != same
    torch.set_num_threads(threads)


def test_the_keys_of_evaluations(load, observed) -> None:
    """An edit of one part of the evaluation leaves the other's; untrained SAEs outlive an edit
    of the loss, whose SAEs have other weights."""

    def keys(*changes: tuple[str, str]) -> list[dict]:
        text = edited(*changes)
        return of_evaluation(load(text), text)

    sae = an_sae(experiment)
    core, probing = of_evaluation(experiment, SOURCE)
    assert of_evaluation(experiment, SOURCE, lr=1.0, batch=64, seeds=(3,)) == [core, probing]
    assert keys(("residual_BD.pow(2).mean()", "1")) == [core, probing]
    of_one = dict(changed_in_one_place())
    for name in ("core_metrics", "probe", "CustomSAE.encode"):
        one = of_evaluation(load(of_one[name]), of_one[name])
        assert (one[0] == core) == (name == "probe"), name
        assert (one[1] == probing) == (name == "core_metrics"), name
    for changes in ({"probe_ks": (1, 2, 5)}, {"core_prompts": 8}, {"context": 64}):
        assert of_evaluation(experiment, SOURCE, **changes) != [core, probing]
    other = copy.deepcopy(sae)
    other.cutoff = 0.1  # no parameter, and yet a part of what an edited SAE computes with
    assert of_evaluation(experiment, SOURCE, other)[0] != core
    other = copy.deepcopy(sae)
    # On the one object, not its class.
    other.encode = functools.partial(experiment.lr_factor, warmup=3)
    changed = of_evaluation(experiment, SOURCE, other)
    assert "lr_factor" in changed[0]["code of"] and "lr_factor" not in core["code of"]


def test_the_keys_of_activations(load, observed, toy_lm) -> None:
    """An edit of the loss or of its settings leaves them, one of the buffer or its text doesn't."""

    def key(source: str = SOURCE, **changes: Any) -> dict | None:
        module = load(source)
        run = dataclasses.replace(a_run(module, source, **changes), language_model=toy_lm)
        texts = functools.partial(iter, ["text"])
        stream = TokenStream(texts, toy_lm.tokenizer, run.settings.context)
        objects = {"harvest": module.ActivationBuffer(run, stream).harvest}
        return result_key("activations", run, objects, with_callers=True)

    same = key()
    assert key(lr=1.0, batch=64, seeds=(3,), training_tokens=2_000_000, d_sae=64) == same
    assert key(edited(("residual_BD.pow(2).mean()", "residual_BD.abs().mean()"))) == same
    assert key(edited(("keep_BL = counted", "keep_BL = ~counted"))) != same
    texts = 'texts = documents(run.settings.training_text, "train")\n'
    assert key(edited((texts, texts + "    texts = list(texts)\n"))) != same
    for changes in ({"layers": (1,)}, {"context": 64}, {"harvest_contexts": 4}):
        assert key(**changes) != same


# ------------------------------------------------------------------------ files and variables


def test_a_module_of_one_s_own_and_numeric_variables_are_in_the_key(
    tmp_path: Path, monkeypatch, load
) -> None:
    """Also one that another imports; but for docstrings and comments."""
    replace(monkeypatch, "HERE", tmp_path)
    (tmp_path / "losses.py").write_text("import parts\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "tanh.py").write_text('"""Words."""\nX = 1\n')
    source = "import numpy\ndef f():\n    from losses import huber\n"
    settings = experiment.Settings()

    def files() -> dict[str, str]:
        call_graph.files_of.cache_clear()
        return hash_definitions(source, settings).files

    first = files()
    assert set(first) == set(own_files(source)) == {"losses.py", "parts/tanh.py"}
    (tmp_path / "parts" / "tanh.py").write_text('"""Other words."""\nX = 1  # one\n')
    assert files() == first
    (tmp_path / "parts" / "tanh.py").write_text("X = 2\n")
    assert files() != first
    monkeypatch.undo()
    call_graph.files_of.cache_clear()
    text = SOURCE + '\nX = float(os.environ.get("FACTOR", 1)) + len(os.environ["PLACE"])\n'
    reads = hash_definitions(text, settings)
    assert {"harness/store.py", "tinylm/corpus.py", "sparse_ops.py"} <= set(reads.files)
    before = environment_fingerprint(settings, reads, CPU)
    # A training goes on on another card of the same kind, which the key names by itself.
    for name in ("OMP_SCHEDULE", "FACTOR", "PLACE", "OTHER", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setitem(ENVIRON_AT_START, name, "3")
        after = environment_fingerprint(settings, reads, CPU)
        assert (after == before) == (name in ("OTHER", "CUDA_VISIBLE_DEVICES")), name
        before = after


def test_a_module_elsewhere_on_the_path_and_what_it_takes_from_experiment(
    tmp_path: Path, monkeypatch, load
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_losses.py").write_text(
        "from experiment import figures_of\nhuber = lambda x, s: x * s.core_prompts\n"
    )
    call_graph.files_of.cache_clear()
    assert "figures_of" not in of_evaluation(experiment, SOURCE)[0]["code of"]
    text = edited(("import copy\n", "import copy\nimport my_losses\n"))
    monkeypatch.setattr(experiment, "__file__", "elsewhere")
    code = reachable_code(text, [load(text).lr_factor], load(text).Settings())
    assert str(tmp_path / "my_losses.py") in code.files and ".core_prompts" in code.names
    # As a script, experiment.py is also what the module's import means.
    monkeypatch.setitem(SOURCES_AT_START, ROOT / "experiment.py", text)
    code = reachable_code(text, [load(text).lr_factor], load(text).Settings())
    assert {"figures_of", "lr_factor"} <= set(code.parts)
    assert "contrastive_loss" not in code.parts
    call_graph.files_of.cache_clear()


def test_of_the_harness_only_what_is_reached_counts(observed, monkeypatch) -> None:
    """An edit of how records are printed trains nothing anew, one of the training's log does."""
    same = of_training(experiment, SOURCE), of_evaluation(experiment, SOURCE)

    def with_harness(file: str, old: str, new: str) -> tuple:
        text = SOURCES_AT_START[ROOT / "harness" / file]
        new_text = edited((old, new), source=text)
        monkeypatch.setitem(SOURCES_AT_START, ROOT / "harness" / file, new_text)
        found = of_training(experiment, SOURCE), of_evaluation(experiment, SOURCE)
        monkeypatch.setitem(SOURCES_AT_START, ROOT / "harness" / file, text)
        return tuple(a == b for a, b in zip(found, same))

    def before(file: str, definition: str, line: str) -> tuple[bool, bool]:
        return with_harness(file, definition, f"{line}\n{definition}")

    assert before("provenance.py", "def write_config(", "X = 1") == (True, True)
    assert before("records.py", "def final_values(", "@print") == (False, True)
    assert before("training.py", "class TrainingLog:", "@print") == (False, True)
    assert before("evaluation/core.py", "def shared_core_evals(", "X = print()")[1] is False
    assert before("machine.py", "def processor_name(", "X = print()") == (False, False)


def test_the_runs_in_a_profiles_folder_are_no_code() -> None:
    """Their experiment.py are records: in no key, and in no list of the code that ran."""
    runs = [*ROOT.glob("smollm2/run_*/experiment.py")]
    assert runs and not {*runs} & {*files_of("smollm2"), *SOURCES_AT_START}
    assert ROOT / "smollm2" / "weights.py" in {*files_of("smollm2")} & SOURCES_AT_START.keys()


def test_a_hook_on_the_language_model_is_in_the_keys_of_its_passes(toy_lm) -> None:
    run, model = a_run(experiment, SOURCE), toy_lm.bridge()

    def key() -> dict[str, Any]:
        return result_key("core passes", run, {"language model": model})

    same = key()
    assert key() == same
    handle = model.register_forward_hook(lambda module, given, out: 2 * out)
    changed = key()
    handle.remove()
    assert "tests/test_fingerprint.py" in changed["file"]
    assert key() == same


# ------------------------------------------------------------------------ what names can't say

SMALL = '''
import contextlib
import functools
from dataclasses import dataclass

import torch


def one(x):
    return x


def two(x):
    return one(x)


def three(x):
    return x


def traced(f):
    @functools.wraps(f)
    def inner(*given):
        return f(*given)

    return inner


@traced
def decorated(x):
    return x


def with_default(x, act=two):
    return act(x)


TABLE = {"two": two}
PARTIAL = functools.partial(two)
FEW = [two, lambda x: three(x)]


def maker(f):
    def made(x):
        return f(x)

    return made


class Base:
    factor = 2.0

    def encode(self, x):
        return x


class Sub(Base):
    def decode(self, x):
        return super().encode(x)


class Further(Sub):
    pass


class Other:
    def unlike(self, x):
        return three(x)


class Called:
    def __init__(self, f):
        self.f = f

    def __call__(self, x):
        return self.f(x)


def by_attribute(x):
    return x.unlike()


def by_string(x):
    return getattr(x, "unlike")()


def by_table(x):
    return TABLE["two"](x) + PARTIAL(x)


def in_doubt(name):
    return globals()[name]


@contextlib.contextmanager
def managed():
    yield three


Made = type("Made", (Base,), {"decode": three})
'''


def made_by_exec(module: ModuleType) -> Any:
    exec("def executed(x):\n    return x", vars(module))
    return module.executed


@pytest.mark.parametrize(
    "roots, found",
    [
        (lambda m: [m.one], {"one"}),
        (lambda m: [m.two], {"two", "one"}),
        (lambda m: [m.Sub], {"Sub", "Sub.decode"}),
        (lambda m: [m.Sub()], {"Sub", "Sub.decode"}),
        (lambda m: [m.Sub().decode], {"Sub", "Sub.decode"}),
        (lambda m: [m.Further()], {"Further", "Sub", "Sub.decode"}),
        (lambda m: [functools.partial(max, key=functools.partial(m.Other))],
         {"Other", "Other.unlike", "three"}),
        (lambda m: [m.with_default], {"with_default", "two", "one"}),
        (lambda m: [m.by_table], {"by_table", "TABLE", "PARTIAL", "two", "one"}),
        (lambda m: [m.FEW], {"FEW", "two", "one", "three"}),
        (lambda m: [m.by_attribute], {"by_attribute", "Other", "Other.unlike", "three"}),
        (lambda m: [m.by_string], {"by_string", "Other", "Other.unlike", "three"}),
        (lambda m: [m.maker(m.with_default)], {"maker", "with_default", "two", "one"}),
        (lambda m: [m.Called(m.with_default)],
         {"Called", "Called.__init__", "Called.__call__", "with_default", "two", "one"}),
        (lambda m: [torch.no_grad()(m.with_default)], {"with_default", "two", "one"}),
        (lambda m: [functools.lru_cache(m.with_default)], {"with_default", "two", "one"}),
        (lambda m: [m.managed], {"managed", "three"}),
        (lambda m: [m.in_doubt], None),
        (lambda m: [m.Made], {"Made", "Base", "three"}),
        (lambda m: [made_by_exec(m)], None),
        (lambda m: [type("Base", (), {"factor": 3.0, "__module__": m.__name__})], None),
    ],
)  # fmt: skip
def test_what_a_key_that_starts_from_objects_covers(
    load, roots: Callable[[ModuleType], list], found: set[str] | None
) -> None:
    """None: everything of the file. What does something when it is read always counts."""
    module = load(SMALL)
    everything = {p for p in hash_definitions(SMALL, experiment.Settings()).parts}
    always = set(reachable_code(SMALL, [torch.relu]).parts)
    assert "decorated" in always and "with_default" not in always
    parts = set(reachable_code(SMALL, roots(module)).parts)
    assert parts == (everything if found is None else found | always)


@pytest.mark.parametrize(("line", "counts"), [
    ('PLAN |= sweep("k", k_min=(8, 16))', False),
    ('PLAN["run_11"] = dict(lr=1e-3, seeds=THREE)', False),
    ('PROFILES["tinylm"]["lr"] = 1e-3', False),
    ('PLAN |= {"run_11": seed_generators("plan")}', True),  # whatever that does
    ('PLAN[seed_generators("plan")] = dict(lr=1e-3)', True),
    ("Settings.lr = 1e-3", True),
])  # fmt: skip
def test_a_line_for_the_plan_is_no_code(load, line: str, counts: bool) -> None:
    before = reachable_code(SOURCE, [load(SOURCE).probe]).parts
    source = edited(("\n# ---- THE METHOD", f"\n{line}\n\n# ---- THE METHOD"))
    after = reachable_code(source, [load(source).probe]).parts
    assert (after != before) == counts


@pytest.mark.parametrize("line", ['PLAN |= {"run_1": dict(lr=1e-3)}',
                                  'PLAN["run_1"]["lr"] = 1e-3'])  # fmt: skip
def test_a_line_for_the_plan_counts_for_what_reads_the_plan_alone(load, line: str) -> None:
    """Not for a rehearsal either."""
    reads = edited(("    accuracies = {}\n", "    accuracies = {}\n    PLAN['run_1']\n"))
    for source, counts in ((reads, True), (SOURCE, False)):
        more = source.replace("\n# ---- THE METHOD", f"\n{line}\n\n# ---- THE METHOD", 1)
        parts = [(reachable_code(text, [load(text).probe]).parts,
                  hash_definitions(text, experiment.Settings()).parts)
                 for text in (source, more)]  # fmt: skip
        assert [one != other for one, other in zip(*parts)] == [counts, counts]


@pytest.mark.parametrize("root", ["CustomSAE", None, 3.0])
def test_a_root_whose_code_is_nowhere_is_an_error(root: object) -> None:
    with pytest.raises(ExperimentError, match="must start from functions, classes or objects"):
        reachable_code(SOURCE, [root])


def test_a_class_that_no_file_defines_is_an_error() -> None:
    names: dict[str, Any] = {"__name__": "nowhere"}
    exec("class Mine:\n    def encode(self, x):\n        return x", names)
    with pytest.raises(ExperimentError, match="the code of .*Mine.* is found in no file"):
        reachable_code(SOURCE, [names["Mine"]])


# ------------------------------------------------------------------------ from end to end

VARIANT = """
class Variant(CustomSAE):
    @decorator
    def encode(self, x, last=by_default):
        x = SEVERAL[0](PARTIAL(TABLE["plain"](super().encode(x))))
        return last(x) * 1.0  # in the subclass of the SAE
"""
WAYS = """
def by_dict(x):
    return x * 1.0  # by a dict


def by_partial(factor, x):
    return x * factor * 1.0  # by a partial


def by_default(x):
    return x * 1.0  # by a default


def by_list(x):
    return x * 1.0  # by a list


def decorator(function):
    def inner(*given):
        return function(*given) * 1.0  # by a decorator

    return inner


TABLE = {"plain": by_dict}
PARTIAL = functools.partial(by_partial, 1.0)
SEVERAL = [lambda x: by_list(x)]
"""
BUFFER = """
class Own(ActivationBuffer):
    def harvest(self, n_passes):
        return [acts * 1.0 for acts in super().harvest(n_passes)]  # in the subclass of the buffer
"""
TRAINER = """
class Eager(Trainer):
    def step(self, x_BD, at, log):
        return super().step(x_BD * 1.0, at, log)  # in the subclass of the trainer
"""
DOUBLES = """
class Variant(CustomSAE):
    def encode(self, x):
        return super().encode(x) * 2.0
"""
HERE = "\n\ndef new_sae("  # where classes are put
USE_VARIANT = ("    sae = CustomSAE(*shape", "    sae = Variant(*shape")
USE_BUFFER = ("train(run, ActivationBuffer(run, stream)", "train(run, Own(run, stream)")
USE_TRAINER = ("] = Trainer(sae,", "] = Eager(sae,")


def with_subclass(use: tuple[str, str], code: str) -> str:
    """experiment.py that uses a subclass."""
    code = re.sub(r"1\.0(.*)  # in .*", r"2.0\1", code)
    return edited(use, (HERE, f"\n{code}{HERE}"))


def everything_once() -> str:
    """experiment.py that computes the same by all the ways along which edits follow; renamed."""
    def wrapped(head: str, value: str) -> tuple[str, str]:
        inner = head.replace("def ", "def as_ever_")
        return head, f"{head}        return {value}\n\n{inner}"

    code = "\n".join((WAYS, VARIANT, BUFFER, TRAINER))
    text = edited(
        ("import copy\n", "import copy\nimport functools\n"), USE_VARIANT, USE_BUFFER, USE_TRAINER,
        wrapped("    def encode(self, x: Tensor) -> Tensor:\n",
                "self.as_ever_encode(x) * 1.0  # in the SAE"),
        wrapped("    def harvest(self, n_passes: int) -> list[Tensor]:\n",
                "[acts * 1.0 for acts in self.as_ever_harvest(n_passes)]  # in the buffer"),
        (HERE, f"\n{code}{HERE}"),
    )  # fmt: skip
    for old, new in (("CustomSAE", "ContrastiveSAE"), ("ActivationBuffer", "Harvester")):
        text = re.sub(rf"\b{old}\b", new, text)
    return text


ONCE = everything_once()


def doubled(comment: str) -> str:
    """`ONCE` with the 1.0 of one line, that of this comment, made 2.0."""
    (line,) = (line for line in ONCE.splitlines() if line.endswith(f"  # {comment}"))
    return edited((line, line.replace("1.0", "2.0", 1)), source=ONCE)


TEXTS = ('texts = documents(run.settings.training_text, "train")\n',
         'texts = documents(run.settings.training_text, "train")\n'
         "    texts = (lambda given: lambda: map(str.upper, given()))(texts)\n")  # fmt: skip


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict, Path]]:
    """Runs an edited experiment.py with a copy of a store: what it leaves, and its store."""
    sizes = toy.PROFILES["tinylm"] | dict(
        layers=(2,), seeds=(0,), d_sae=32, training_tokens=1024, buffer_tokens=512, core_prompts=2,
        core_reconstruction_batches=1, core_sparsity_batches=1, probe_sets=("toy/halves",),
        probe_ks=(1, 2, 5),
    )  # fmt: skip

    @functools.cache
    def run_once(source: str, store: Path | None = None) -> tuple[dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp("run")
        forget_imported()
        module = import_text(source, folder)  # anew: it imports what `toy` has replaced
        if store:
            shutil.copytree(store, folder / "cache")
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            monkeypatch.setitem(module.PROFILES, "tinylm", sizes)
            assert run_command(module, folder / "run_try") == 0
        info = json.loads((folder / "run_try" / "final_info.json").read_text())
        figures = {m: v for m, v in info["layer_2"]["means"].items() if not m.startswith("seconds")}
        for path in sorted((folder / "run_try" / "sae").rglob("*.safetensors")):
            figures[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return figures, folder / "cache"

    return run_once


EDITS = {
    "evaluation": {
        "a subclass with another encode, chosen in new_sae":
            (SOURCE, with_subclass(USE_VARIANT, DOUBLES)),
        **{c: (ONCE, doubled(c)) for c in (
            "by a dict", "by a partial", "by a default", "by a list", "by a decorator",
            "in the SAE", "in the subclass of the SAE")},
    },
    "activations": {
        "a subclass of the buffer with another harvest":
            (SOURCE, with_subclass(USE_BUFFER, BUFFER)),
        **{c: (ONCE, doubled(c)) for c in ("in the buffer", "in the subclass of the buffer")},
    },
    "training": {
        "a variant chosen in new_trainers": (SOURCE, with_subclass(USE_TRAINER, TRAINER)),
        "in the subclass of the trainer": (ONCE, doubled("in the subclass of the trainer")),
    },
    "text": {"the text, filtered in main": (SOURCE, edited(TEXTS))},
}  # fmt: skip


@pytest.mark.parametrize("kind, name", [(k, name) for k, names in EDITS.items() for name in names])
def test_an_edit_never_gets_figures_of_before_it(run, kind: str, name: str) -> None:
    """With the store of the run before, the figures and weights are those of an empty store.

    The edits of a kind come to the same, one by way of another; so the first with an empty store
    says for all what is right.
    """
    before, after = EDITS[kind][name]
    figures_before, store = run(before)
    right, _ = run(next(iter(EDITS[kind].values()))[1])
    found, _ = run(after, store)
    assert right != figures_before, "the edit changes nothing"
    assert found == right


def test_the_same_code_gets_everything_from_the_store(run, capsys) -> None:
    """By a comment and a docstring no figure is made anew."""
    method = "    def normalize_decoder(self)"
    # Neither is the text of experiment.py itself, which a key of a test holds beside it.
    figures, store = run(edited((method, f"    # a word\n{method}")))
    assert run(ONCE)[0] == figures
    again = edited((method, f"    # words\n{method}"))
    capsys.readouterr()
    assert run(again, store)[0] == figures
    said = capsys.readouterr().out
    for what in ("training", "core evaluation", "sparse probing"):
        assert f"{what}: kept, as" in said, said


def test_what_wraps_main_is_in_the_key_of_training(load) -> None:
    wrapped = edited(
        ("sys.exit(launch(main,", "sys.exit(launch(passed(main),"),
        ("\nSHOWN = (", "\ndef passed(function):\n    return function\n\n\nSHOWN = ("),
    )
    other = edited(("    return function\n", "    return function or 1\n"), source=wrapped)
    keys = [of_training(load(text), text)["code of"] for text in (wrapped, other)]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    "old, new, other",
    [
        ("\nSHOWN = (", "\nCustomSAE.strength, OTHER = 2.0, 1\nSHOWN = (", "3.0, 1"),
        ("    texts = documents(", "    global X\n    X = 2.0, 1\n    texts = documents(", "3, 1"),
    ],
)
def test_values_set_on_the_way_are_in_the_key_of_training(load, old, new, other) -> None:
    texts = [edited((old, value)) for value in (new, new.replace("2.0, 1", other))]
    keys = [of_training(load(text), text)["code of"] for text in texts]
    assert keys[0] != keys[1]
