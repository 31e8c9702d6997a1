"""Edits of many kinds, each with the store of a run before it and with an empty one: the same.

The latter runs without a rehearsal, which is to leave no trace.

The edits were made up without a look at how keys are made. BEFORE computes what experiment.py does,
by many ways along which a figure can come about; an edit changes one number somewhere along them.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch

from tests import forked, gemma_fixture
from tests.conftest import ROOT, add_runs, copy_project
from tests.test_loop import NEWS, PILE, SIZES, sha256

TINY = SIZES | dict(
    layers=(2,), d_sae=32, training_tokens=1024, buffer_tokens=512, harvest_contexts=4,
    core_prompts=2, core_reconstruction_batches=1, core_sparsity_batches=1, probe_train=16,
    probe_test=10,
)  # fmt: skip
KINDS = ("training", "activations", "core evaluation", "sparse probing", "core passes",
         "probing passes", "language model probes")  # fmt: skip

# What stands above the class of the SAE. Each 1.0 is one of the places that an edit changes.
WAYS = '''
import contextvars
import functools
import importlib
import json
import os
import sys
from pathlib import Path
from typing import ClassVar

import numpy
from safetensors.torch import load_file

import plain_helper
from bench import mine
from package_of_mine import parts

VAR = contextvars.ContextVar("VAR", default=1.0)
VAR.set(1.0)  # by a context variable
TOTAL = [1.0]
TOTAL[0] = 1.0  # by an item set at the top
REGISTRY = {}
STATE = {"main": 1.0}


def registered(function):
    REGISTRY[function.__name__] = function
    return function


@registered
def by_registry(sae):
    return 1.0  # by a registry


def by_setattr(sae):
    return 1.0  # by setattr in a loop


def by_partial(sae, factor=2.0):
    return factor


def made(factor):
    def inner(sae):
        return factor

    return inner


def by_docstring(sae):
    """1.0"""
    return float(by_docstring.__doc__)


def by_file(sae):
    with open("scale" + ".json") as file:
        return json.load(file)["scale"]


def by_numpy(sae):
    return float(numpy.loadtxt("scale" + ".txt"))


def by_variable(sae):
    return float(os.environ["SCALE_" + "ONE"]) * float(os.getenv("SCALE" + "_TWO", "1.0"))


def by_safetensors(sae):
    return float(load_file(f"warm/layer_{sae.cfg.hook_layer}.safetensors")["scale"])


def by_bytes(sae):
    return float(os.environb.get(b"SCALE" + b"_THREE", b"1.0"))


def by_argument(sae):
    return 1.5 if "./" in sys.argv[-1] else 1.0


def by_module(sae):
    return importlib.import_module("hidden" + "_helper").FACTOR


def by_bench(sae):
    return mine.scale() * mine.FACTOR


def by_package(sae):
    return parts.scale(plain_helper.FACTOR)


class Meta(type):
    factor = 1.0  # by a metaclass


class Holder(metaclass=Meta):
    value: ClassVar[float] = 1.0  # by a class value

    def __getattr__(self, name):
        return 1.0  # by __getattr__

    @property
    def prop(self):
        return 1.0  # by a property

    def __call__(self, sae):
        return self.value * self.prop * self.anything * type(self).factor


class Called:
    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, sae):
        return self.factor


TABLE = {"lambda": lambda sae: 1.0}  # by a lambda in a table
FACTORS = [
    functools.partial(by_partial, factor=1.0),  # by a partial
    made(1.0),  # by a closure
    Called(1.0),  # by a slot
    Holder(),
    by_docstring,
    by_file,
    by_numpy,
    by_variable,
    by_safetensors,
    by_bytes,
    by_argument,
    by_module,
    by_bench,
    by_package,
    lambda sae: TABLE["lambda"](sae),
    lambda sae: REGISTRY["by_" + "registry"](sae),
    lambda sae: getattr(sae, "way_" + "set")(),
    lambda sae: getattr(plain_helper, "by_computed" + "_name")(sae),
    lambda sae: VAR.get() * TOTAL[0] * STATE["main"],
    lambda sae: plain_helper.Base.known["Known"](),
    lambda sae: sae._hidden * float(sae.not_saved) * sae.cfg.mine,
]


def product(sae):
    result = 1.0
    for factor in FACTORS:
        result *= factor(sae)
    return result


'''
AFTER_CLASS = '''
for name, function in {"way_set": by_setattr}.items():
    setattr(CustomSAE, name, function)


class Known(plain_helper.Base):
    def __call__(self):
        return 1.0  # by __init_subclass__


class OwnBuffer(ActivationBuffer):
    def __init__(self, run, stream):
        super().__init__(run, stream)
        self.strength = 1.0  # on the buffer

    def harvest(self, n_passes):
        return [acts * self.strength for acts in super().harvest(n_passes)]


class OwnTrainer(Trainer):
    def step(self, x_BD, at, log):
        self.count = getattr(self, "count", 0) + 1
        return super().step(x_BD * 1.0, at, log)  # in the trainer


'''
HEAD = "# ---- THE METHOD"
UNREHEARSED = """
import runpy
import harness.reads
import harness.startup

harness.startup.rehearse = lambda main, run: run
runpy.run_path("experiment.py", run_name="__main__")
"""
def database(value: float) -> bytes:
    with contextlib.closing(sqlite3.connect(":memory:")) as made:
        made.execute("create table t (x)")
        made.execute("insert into t values (?)", (value,))
        return made.serialize()


DATABASES = {value: database(value) for value in (1.0, 1.5)}
FILES = {
    "plain_helper.py": '''FACTOR = 1.0


def by_computed_name(sae):
    return 1.0


class Base:
    known = {}

    def __init_subclass__(cls):
        Base.known[cls.__name__] = cls()
''',
    "hidden_helper.py": "FACTOR = 1.0\n",
    "package_of_mine/__init__.py": "",
    "package_of_mine/parts.py": "def scale(x):\n    return x * 1.0\n",
    "bench/mine.py": (
        "FACTOR = 1.0\n\n\ndef scale():\n    return float(open('mi' + 'ne.txt').read())\n"
    ),
    "mine.txt": "1.0",
    "mine.db": DATABASES[1.0],
    "late.txt": "1.0",
    "late_helper.py": "FACTOR = 1.0\n",
    "scale.json": '{"scale": 1.0}',
    "scale.txt": "1.0",
    **{f"warm/layer_{layer}.safetensors": safetensors.torch.save({"scale": torch.tensor(1.0)})
       for layer in (1, 2)},
}
STEPPED = "        sae.normalize_decoder()\n        self.hold_l0(loss, at.k)\n"
STEP = "        return super().step("
FIGURES = '    figures = core[name] | probing[name] | scores["extra"][name]\n'
ENCODE = "    def encode(self, x: Tensor) -> Tensor:\n"
INIT = '        self.cfg.architecture = "parametric_contrastive"\n'
EVALUATE = "        core = core_evaluation(run, saes, core_metrics, timed.advance)\n"
MAIN = "        training = train(run, ActivationBuffer(run, stream))\n"
EXPORT = "    export_saes(run, training.saes)\n"
METRICS = '    scalars["misc_metrics"] = core.calculate_misc_metrics(features)\n'
Pairs = tuple[tuple[str, str], ...]


def replaced(text: str, pairs: Pairs) -> str:
    for old, new in pairs:
        assert text.count(old) == 1, (text.count(old), old)
        text = text.replace(old, new)
    return text


BEFORE = replaced((ROOT / "experiment.py").read_text(), (
    (HEAD, f"{WAYS}{HEAD}"),
    (ENCODE, f"{ENCODE}        return self.as_ever(x) * product(self)\n\n"
             "    def as_ever(self, x: Tensor) -> Tensor:\n"),
    (INIT, f'{INIT}        self._hidden = 1.0  # on the SAE\n'
           '        not_saved = torch.tensor(1.0)  # in a buffer that is not saved\n'
           '        self.register_buffer("not_saved", not_saved, persistent=False)\n'
           '        self.cfg.mine = 1.0  # in the SAE\'s cfg\n'),
    ("\n\nclass ActivationBuffer:", "\n\nclass ActivationBuffer:"),
    ("\n\ndef new_sae(", f"\n{AFTER_CLASS}\ndef new_sae("),
    ("] = Trainer(sae,", "] = OwnTrainer(sae,"),
    (MAIN, '        STATE["main"] = 1.0  # in a global that main sets\n'
           + MAIN.replace("ActivationBuffer", "OwnBuffer")),
    (METRICS, f'{METRICS}    scalars["misc_metrics"]["mine"] = 1.0  # in core_metrics\n'
              '    drawn = float(torch.rand(())) + numpy.random.rand()  # by whoever is computed\n'
              '    scalars["misc_metrics"]["drawn"] = drawn\n'),
    (EXPORT, '    for sae in training.saes.values():\n'
             '        sae.W_dec.data.mul_(1.0)  # weights in place, in main\n'
             + EXPORT),
))  # fmt: skip


class Edit(NamedTuple):
    """What is changed between two runs: code, files, environment variables, the plan's line.

    Attributes:
        before: what the code of the run before differs in from `BEFORE`.
    """

    code: Pairs = ()
    files: dict[str, str | bytes] = {}
    variables: dict[str, str] = {}
    plan: dict[str, object] = {}
    argument: str = "--out_dir=run_a"
    no_effect: bool = False
    before: Pairs = ()


def number(comment: str) -> Edit:
    """The 1.0 in the line of this comment becomes 1.5."""
    (line,) = (line for line in BEFORE.splitlines() if line.endswith(f"# {comment}"))
    return Edit(((line, line.replace("1.0", "1.5", 1)),))


def file(name: str) -> Edit:
    if name.endswith(".safetensors"):
        return Edit(files={name: safetensors.torch.save({"scale": torch.tensor(1.5)})})
    return Edit(files={name: FILES[name].replace("1.0", "1.5")})


def way(expression: str) -> Pairs:
    """One more factor, which an expression gives."""
    return (("    by_docstring,\n", f"    by_docstring,\n    lambda sae: float({expression}),\n"),)


def top(module: str) -> Pairs:
    """One more import."""
    return (("import contextvars\n", f"import {module}\nimport contextvars\n"),)


def late(expression: str, after: int = 3) -> Pairs:
    """A factor from the fourth step on, to which the rehearsal doesn't come."""
    factor = f"        if self.count > {after}:\n            x_BD = x_BD * float({expression})\n"
    return ((STEP, factor + STEP),)


BY_TYPE = (
    (HEAD, "@functools.singledispatch\ndef of_type(value):\n    return 1.0\n\n\n"
           f"@of_type.register\ndef of_int(value: int):\n    return value / 3\n\n\n{HEAD}"),
    *way("of_type(3) * of_type('x')"),
)  # fmt: skip
LOADED = '''
import harness.startup

as_ever = harness.startup.load_language_model


def loaded(*given):
    lm = as_ever(*given)
    lm.hf.model.norm.weight.data.mul_(FACTOR)
    lm.hf.model.layers[0].mlp.down_proj.weight.data.mul_(FACTOR)
    return lm


harness.startup.load_language_model = loaded
'''
OTHER_TEXT = ('    with TokenStream(texts, ', "    words = texts\n"
              "    texts = lambda: (text.upper() for text in words())\n"
              "    with TokenStream(texts, ")
NUMBERS = (
    "by a context variable", "by an item set at the top", "by a registry",
    "by setattr in a loop", "by a metaclass", "by a class value",
    "by __getattr__", "by a property", "by a lambda in a table", "by a partial", "by a closure",
    "by a slot", "by __init_subclass__", "on the buffer", "in the trainer", "on the SAE",
    "in a buffer that is not saved", "in the SAE's cfg", "in a global that main sets",
    "in core_metrics", "weights in place, in main",
)  # fmt: skip
EDITS: dict[str, Edit] = {
    **{comment: number(comment) for comment in NUMBERS},
    "code in a string": Edit((("    return 1.0 #", "    return 1.5 #"),), before=(
        (HEAD, f'exec("def by_exec(sae):\\n    return 1.0 #")\n\n{HEAD}'),
        ("    by_docstring,\n", "    by_docstring,\n    lambda sae: by_exec(sae),\n"))),
    "a name looked up in globals()": Edit((("return 1.0  # looked up", "return 1.5"),), before=(
        (HEAD, f"def looked_up(sae):\n    return 1.0  # looked up\n\n\n{HEAD}"),
        ("    by_docstring,\n",
         "    by_docstring,\n    lambda sae: globals()['looked' + '_up'](sae),\n"))),
    "a docstring that is data": Edit((('    """1.0"""', '    """1.5"""'),)),
    **{f"the file {name}": file(name) for name in FILES
       if not any(part in name for part in ("__init__", "layer_1", "late", ".db"))},
    "whether a file is there": Edit(
        files={"flag.txt": ""}, before=way("1.5 if os.path.exists('flag' + '.txt') else 1.0")),
    "whether a file is there, by pathlib": Edit(
        files={"flag.txt": ""}, before=way("1.5 if Path('flag' + '.txt').is_file() else 1.0")),
    "whether a file may be read": Edit(
        files={"flag.txt": ""}, before=way("1.5 if os.access('flag' + '.txt', os.R_OK) else 1.0")),
    "what a folder lists": Edit(
        files={"warm/other.txt": ""}, before=way("len(os.listdir('wa' + 'rm')) / 2")),
    "what a pattern finds": Edit(
        files={"found/other.txt": "1"},
        before=way("1.0 + sum(path.stat().st_size for path in Path('fou' + 'nd').glob('*'))")),
    "the size of a file": Edit(
        files={"late.txt": "1.00"}, before=way("os.path.getsize('la' + 'te.txt') / 3")),
    "a copy of all environment variables": Edit(
        variables={"SCALE_FIVE": "1.5"},
        before=late("{**os.environ}.get('SCALE_' + 'FIVE', 1.0)", after=0)),
    "a file, in a thread": Edit(files={"late.txt": "1.5"}, before=top("concurrent.futures") + way(
        "concurrent.futures.ThreadPoolExecutor(1).submit(Path(''.join(('la', 'te.txt'))).read_text)"
        ".result()")),
    "a file of code that is read": Edit(
        files={"late_helper.py": "FACTOR = 1.5\n"},
        before=way("open(''.join(('late_', 'helper.py'))).read().split()[-1]")),
    "a module by pkgutil": Edit(
        files={"late_helper.py": "FACTOR = 1.5\n"}, before=top("pkgutil") + way(
            "pkgutil.resolve_name(''.join(('late_', 'helper')) + ':FACTOR')")),
    "a database": Edit(
        files={"mine.db": DATABASES[1.5]}, before=top("sqlite3") + way(
            "sqlite3.connect(''.join(('mine', '.db'))).execute('select x from t').fetchone()[0]")),
    "a variable, by a library": Edit(variables={"SCALE_SIX": "1.5"}, before=top("string") + way(
        "string.Template('$SCALE_SIX').safe_substitute(os.environ).replace('$SCALE_SIX', '1')")),
    "a file, after the rehearsal": Edit(
        files={"late.txt": "1.5"}, before=late("open('la' + 'te.txt').read()")),
    "a variable, after the rehearsal": Edit(
        variables={"LATER": "1.5"}, before=late("os.environ.get('LA' + 'TER', 1.0)")),
    "a module, after the rehearsal": Edit(
        files={"late_helper.py": "FACTOR = 1.5\n"},
        before=late("importlib.import_module('late' + '_helper').FACTOR")),
    "an environment variable": Edit(variables={"SCALE_ONE": "1.5"}),
    "an environment variable that was not set": Edit(variables={"SCALE_TWO": "1.5"}),
    "an environment variable, of bytes": Edit(variables={"SCALE_THREE": "1.5"}),
    "the command's argument": Edit(argument="--out_dir=./run_a"),
    "an environment variable, in a loop over all": Edit(
        variables={"SCALE_FOUR": "1.5"},
        before=(("    by_docstring,\n",
                 "    by_docstring,\n    lambda sae: float({name: value for name, value in "
                 "os.environ.items()}.get('SCALE_FOUR', 1.0)),\n"),)),
    "the order of two statements": Edit((
        ("TOTAL = [1.0]\nTOTAL[0] = 1.0  # by an item set at the top\n",
         "TOTAL = [1.0]\nTOTAL[0] = 1.5\nTOTAL[0] = 1.0  # by an item set at the top\n"
         "TOTAL[0] = TOTAL[0]\nTOTAL[0] *= 1.5\n"),)),
    "the language model's loader": Edit(((HEAD, f"FACTOR = 1.5\n{LOADED}\n{HEAD}"),)),
    "the language model's weights, in main": Edit((
        ('        STATE["main"]',
         "        run.sae_bench_model.blocks[0].mlp.out.weight.data.mul_(1.5)\n"
         '        STATE["main"]'),)),
    "a hook on the language model, in main": Edit((
        ('        STATE["main"]',
         '        run.sae_bench_model.add_perma_hook("blocks.0.hook_resid_post",\n'
         '                                           lambda acts, hook: acts * 1.5)\n'
         '        STATE["main"]'),)),
    "another text": Edit((OTHER_TEXT,)),
    "another context": Edit((("tokenizer, run.settings.context)", "tokenizer, 16)"),)),
    "a patch of SAE-Bench, in evaluate": Edit((
        (EVALUATE, "        from sae_bench.evals.core import main as core_main\n"
         "        misc = core_main.calculate_misc_metrics\n"
         "        core_main.calculate_misc_metrics = lambda features: {\n"
         "            name: 1.5 * value for name, value in misc(features).items()}\n"
         + EVALUATE),)),
    "a patch of torch, in main": Edit((
        ('        STATE["main"]',
         "        relu = torch.relu\n        torch.relu = lambda x: 1.5 * relu(x)\n"
         '        STATE["main"]'),)),
    "a wrapped method, in evaluate": Edit((
        (EVALUATE, "        for sae in saes.values():\n"
         "            larger = lambda encode, x: 1.5 * encode(x)\n"
         "            sae.encode = functools.partial(larger, sae.encode)\n"
         + EVALUATE),)),
    "changed settings, in evaluate": Edit((
        (EVALUATE, "        import dataclasses\n"
         "        s = dataclasses.replace(s, core_sparsity_batches=2)\n"
         "        run = dataclasses.replace(run, settings=s)\n" + EVALUATE),)),
    "the default precision": Edit(((HEAD, f"torch.set_default_dtype(torch.float64)\n\n{HEAD}"),)),
    "another function under the same name, in main": Edit((
        ('        STATE["main"]',
         "        global made\n        FACTORS[1] = made(1.5)\n        STATE[\"main\"]"),)),
    "another initialization": Edit((
        ("    sae.initialize(seed, mean_D * factor)\n",
         "    sae.initialize(seed, mean_D * factor)\n"
         "    sae.b_enc.data.add_(0.1 * torch.randn(settings.d_sae))\n"),)),
    "the probes' learning rate": Edit((("epochs=100, lr=1e-2", "epochs=100, lr=1e-3"),)),
    **{f"the setting {name}": Edit(plan={name: value}) for name, value in {
        "layers": (1,), "context": 16, "k_min": 3, "lr": 3e-3, "seeds": (1,), "probe_seed": 7,
        "probe_train": 20, "probe_test": 12, "core_sparsity_batches": 2, "core_prompts": 3,
        "buffer_tokens": 256, "density_penalty": 0.1, "tau_pen": 0.2,
        }.items()},
    "a comment, and an unused import": Edit(
        (("import copy\n", "import copy\nimport csv  # of no use\n"),), no_effect=True),
    "what training leaves on the SAE, in the records": Edit(
        (("    train_again = 1\n", "    train_again = 2\n"),), no_effect=True, before=(
        (STEPPED, f"        sae.seen = getattr(sae, 'seen', 0.0) + float(loss.total)\n{STEPPED}"),
        (FIGURES, f"{FIGURES}    figures['seen'] = training.saes[key].seen\n"),
        ("\nSHOWN = (", "\ndef of_no_use():\n    train_again = 1\n\n\nSHOWN = ("))),
    "a field of Training, in the records": Edit(
        (("    train_again = 1\n", "    train_again = 2\n"),), no_effect=True, before=(
        ("    log: TrainingLog\n", "    log: TrainingLog\n    seen: dict | None = None\n"),
        (STEPPED, f"        self.seen = getattr(self, 'seen', 0.0) + float(loss.total)\n{STEPPED}"),
        ("for key, trainer in trainers.items()}, stats, log)",
         "for key, trainer in trainers.items()}, stats, log,\n"
         "                    {key: trainer.seen for key, trainer in trainers.items()})"),
        (FIGURES, f"{FIGURES}    figures['seen'] = training.seen[key]\n"),
        ("\nSHOWN = (", "\ndef of_no_use():\n    train_again = 1\n\n\nSHOWN = ("))),
    "a function for each type": Edit(
        (("    train_again = 1\n", "    train_again = 2\n"),), no_effect=True, before=(
        *BY_TYPE,
        ("\nSHOWN = (", "\ndef of_no_use():\n    train_again = 1\n\n\nSHOWN = ("))),
    "a function for each type, one of them": Edit((("value / 3", "value / 2"),), before=BY_TYPE),
    "global names of odd kinds": Edit(
        (("    train_again = 1\n", "    train_again = 2\n"),), no_effect=True, before=(
        (HEAD, f"ALL, TANH = (..., slice(None)), numpy.tanh\n\n{HEAD}"),
        ("    by_docstring,\n", "    by_docstring,\n"
         "    lambda sae: float(TANH(100.0)) * len(ALL),\n"),
        ("\nSHOWN = (", "\ndef of_no_use():\n    train_again = 1\n\n\nSHOWN = ("))),
    "the records": Edit((("SHOWN = (", "OF_NO_USE = 3\nSHOWN = ("),), no_effect=True),
}  # fmt: skip


class Edits:
    """Runs experiment.py before and after an edit, in folders of their own."""

    def __init__(self, place: Path, model: Path, hf_home: Path) -> None:
        self.place, self.model, self.hf_home = place, model, hf_home
        gemma_fixture.write_pile(place / "data" / PILE)
        gemma_fixture.write_ag_news(place / "data" / NEWS)

    def start(
        self, name: str, edit: Edit, store: Path | None, rehearsed: bool = True
    ) -> tuple[Path, forked.Forked]:
        """In a folder of its own, or in that of a run before, which goes: its rehearsal counts."""
        folder = self.place / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        copy_project(folder)
        for top in {PILE, NEWS}:
            (folder / top).parent.mkdir(exist_ok=True)
            (folder / top).symlink_to(self.place / "data" / top)
        for path, text in (FILES | edit.files).items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(text if isinstance(text, bytes) else text.encode())
        code = replaced(replaced(BEFORE, edit.before), edit.code)
        (folder / "experiment.py").write_text(code)
        add_runs(folder / "experiment.py", {"run_a": TINY | {"model": str(self.model)} | edit.plan})
        if store:
            shutil.copytree(store, folder / "cache")
        variables = {"SCALE_ONE": "1.0"} | edit.variables
        environment = forked.environment(
            self.hf_home, SAE_PROFILE="tinylm", XDG_CACHE_HOME=str(folder / "cache"), **variables
        )
        (folder / "unrehearsed.py").write_text(UNREHEARSED)
        script = "experiment.py" if rehearsed else "unrehearsed.py"
        return folder, forked.Forked(folder, script, edit.argument, environment=environment)

    def finish(self, folder: Path, process: forked.Forked) -> tuple[dict, str]:
        """Figures and digests of weights; and what was printed."""
        out, error = process.communicate(180)
        assert process.returncode == 0, out + error
        info = json.loads((folder / "run_a" / "final_info.json").read_text())
        figures = {
            f"{key} {metric}": value
            for key, entry in info.items() for metric, value in entry["means"].items()
            if not metric.startswith("seconds")
        }  # fmt: skip
        for path in sorted((folder / "run_a" / "sae").rglob("*.safetensors")):
            figures[str(path.relative_to(folder))] = sha256(path)
        return figures, out


@pytest.fixture(scope="module")
def edits(toy_model: Path, hf_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Edits:
    """With the run before all edits complete."""
    made = Edits(tmp_path_factory.mktemp("edits"), toy_model, hf_home)
    made.figures, _ = made.finish(*made.start("project", Edit(), None))
    (made.place / "project" / "cache").rename(made.place / "store")
    return made


@pytest.fixture(scope="module")
def reused() -> Iterator[dict[str, list[str]]]:
    """By edit, what was reused; printed at the end."""
    found: dict[str, list[str]] = {}
    yield found
    share = sum(map(len, found.values())) / max(len(found) * 4, 1)
    print(f"\n{len(found)} edits; of training, core evaluation, sparse probing and activations "
          f"{share:.0%} reused")  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_no_edit_gets_figures_of_before_it(edits: Edits, reused: dict, name: str) -> None:
    number = list(EDITS).index(name)
    store, figures = edits.place / "store", edits.figures
    if EDITS[name].before:
        store = edits.place / f"{number}-store"
        folder, process = edits.start("project", Edit(EDITS[name].before), None)
        figures, _ = edits.finish(folder, process)
        (folder / "cache").rename(store)
    both = [edits.start(place, EDITS[name], given, given is not None)
            for place, given in (("project", store), ("empty", None))]  # fmt: skip
    (found, out), (right, _) = (edits.finish(*one) for one in both)
    kept = [line.split(":")[0] for line in out.splitlines() if re.search(": kept, as", line)]
    reused[name] = [kind for kind in kept if kind in KINDS]
    assert (right == figures) == EDITS[name].no_effect, "what the edit is to change"
    assert found == right
    if EDITS[name].no_effect:
        assert {"training", "core evaluation", "sparse probing"} <= {*kept}
    if EDITS[name].before:
        shutil.rmtree(store)


LEFT = {
    "NORM changes while": (
        (HEAD, f"NORM = {{}}\n\n{HEAD}"),
        (STEP, f'        NORM["w"] = 1.0 + float(self.sae.W_enc.norm())\n{STEP}'),
        ("    by_docstring,\n", '    by_docstring,\n    lambda sae: NORM.get("w", 1.0),\n'),
    ),
    "EVER, NUMBERS changes while": (
        ("import json\n", "import itertools\nimport json\n"),
        (HEAD, f"NUMBERS, EVER = itertools.count(1), itertools.cycle([1.0])\n\n{HEAD}"),
        (STEP, f"        next(NUMBERS)\n        x_BD = x_BD * next(EVER)\n{STEP}"),
        (FIGURES, f"{FIGURES}    figures['number'] = next(NUMBERS)\n"),
    ),
    "training starts a process": (
        ("import json\n", "import json\nimport multiprocessing\n"),
        (HEAD, f"def read(path):\n    return float(open(path).read())\n\n\n{HEAD}"),
        (STEP, "        with multiprocessing.get_context('fork').Pool(1) as pool:\n"
               f"            x_BD = x_BD * pool.map(read, ['scale.txt'])[0]\n{STEP}"),
    ),
    "training starts 'cat', and": (
        ("import json\n", "import json\nimport subprocess\n"),
        (STEP, "        scale = float(subprocess.check_output(['cat', 'scale.txt']))\n"
               f"        x_BD = x_BD * scale\n{STEP}"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", LEFT)
def test_what_no_key_can_hold_is_not_kept(edits: Edits, why: str) -> None:
    """What a computation leaves in globals would be lost, and what a program reads is not seen."""
    folder, process = edits.start("project", Edit(before=LEFT[why]), None)
    first, out = edits.finish(folder, process)
    assert f"since {why}" in out
    (folder / "cache").rename(edits.place / "left")
    folder, process = edits.start("project", Edit(before=LEFT[why]), edits.place / "left")
    found, out = edits.finish(folder, process)
    assert found == first and not re.search("training: kept", out)
    assert why in (folder / "run_a" / "warnings.json").read_text()
    shutil.rmtree(edits.place / "left")


def test_what_is_scored_is_what_is_published(edits: Edits) -> None:
    """An SAE that is changed behind its export ends the run, in the rehearsal."""
    changed = "        for sae in saes.values():\n            sae.b_enc.data -= 0.3\n"
    folder, process = edits.start("changed", Edit(((EVALUATE, changed + EVALUATE),)), None)
    _, error = process.communicate(180)
    assert process.returncode == 1 and "failed during rehearsal" in error
    assert "must be scored as it is published, but its b_enc is another" in error, error
