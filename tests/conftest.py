"""A Gemma-2 model of toy size, with text and labelled tasks, for tests that take seconds."""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["SAE_PROFILE"] = "tinylm"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as experiment.py has it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Its threads spin while they wait: a toy run took twice the time. They change no bit (the golden
# run passes with and without).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is to run behind it
    signal.signal(signal.SIGINT, signal.default_int_handler)

SOURCES = [inspect.getsource(module) for module in (argparse, ast, inspect, random)]
OWN_MODULES = ("harness", "sparse_ops", "experiment", "bench", "tests", "test_")  # how names begin
TOY_TASKS = {
    "toy/modules": dict(zip(("argparse", "ast", "inspect", "random"), SOURCES)),
    "toy/halves": {"first": SOURCES[0], "second": SOURCES[2]},
}


LONGEST = (
    "loop", "gemma", "fingerprint", "checkpoints", "golden", "run", "plot", "records", "tinylm",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: of two workers, none ends long after the other."""
    order = {f"test_{name}.py": at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Tests keep what outlives a run in a folder of their own."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def strict():
    """What a run forgives, since it is no score, is an error here."""
    from harness.evaluation import features

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(features, "FORGIVEN", ())
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What outlives a run in this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "parametric-sae"


@pytest.fixture(scope="session")
def hf_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face's caches of the commands that `tests.forked` starts from then on."""
    from tests import forked

    folder = tmp_path_factory.mktemp("hf")
    forked.start_server(folder)
    return folder


def toy_config(vocab_size: int, n_layers: int):
    """A Gemma-2 configuration of d_model 32."""
    from transformers import Gemma2Config

    return Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=16,
        max_position_embeddings=256,
        initializer_range=0.2,
    )


def write_toy_model(folder: Path) -> Path:
    """A folder in Hugging Face's form: 4 layers, d_model 32, a tokenizer of 300 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<eos>", "<bos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SOURCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        padding_side="right",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = toy_config(vocab_size=300, n_layers=4)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy") / "toy-gemma-2")


@pytest.fixture(scope="session")
def toy_lm(toy_model: Path):

    from harness.language_model import load_language_model

    return load_language_model(str(toy_model))


@pytest.fixture(scope="module")
def toy(toy_model: Path):
    """`experiment` set to toy sizes: the whole command runs in seconds. Returns the module."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield set_to_toy_sizes(toy_model, monkeypatch)


@pytest.fixture(scope="module")
def toy_run(toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete toy run_1."""
    out_dir = tmp_path_factory.mktemp("runs") / "run_1"
    assert run_command(toy, out_dir) == 0
    return out_dir


class Calls(list):
    """Counts calls, and is in no key: see `harness.identity`."""

    def key_parts(self) -> None:
        """Nothing."""


def run_command(experiment, out_dir: Path | str, *arguments: str) -> int:
    """The command, in this process: its exit status."""
    from harness.startup import launch

    plan = experiment.main, experiment.Settings, experiment.PROFILES, experiment.PLAN
    functions = experiment.core_metrics, experiment.probe
    return launch(*plan, *functions, [f"--out_dir={out_dir}", *arguments])


def cut_off(buffer, fillings: int | None) -> None:
    """Has a buffer interrupt training, as Ctrl-C does, after so many fillings; None: never."""
    next_tokens, left = buffer.next_tokens, [fillings]

    def cut(*arguments):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] = None if left[0] is None else left[0] - 1
        return next_tokens(*arguments)

    buffer.next_tokens = cut


def settings_of(experiment, name: str, profile: str = "tinylm"):
    """The settings of a run, as the command makes them."""
    from harness.settings import settings_of_run

    parts = experiment.Settings, experiment.PROFILES[profile], experiment.PLAN
    return settings_of_run(name, *parts)


def edit(path: Path, old: str, new: str) -> None:
    """Puts `new` in the place of `old`, which must stand in the file once."""
    text = path.read_text()
    assert text.count(old) == 1, (old, text.count(old))
    path.write_text(text.replace(old, new))


def add_runs(path: Path, runs: dict[str, dict]) -> None:
    """Adds runs to the beginning of PLAN in an experiment.py, as a user does: a line for each."""
    text = path.read_text()
    (plan,) = [
        node.value for node in ast.parse(text).body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == "PLAN"
    ]  # fmt: skip
    lines = text.splitlines(keepends=True)
    assert lines[plan.lineno - 1].endswith("{\n")
    lines[plan.lineno:plan.lineno] = [f"    {name!r}: {runs[name]!r},\n" for name in runs]
    path.write_text("".join(lines))


def weights_of(sae) -> list:
    """W_enc, W_dec, b_enc, b_dec."""
    return [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec]


def copy_project(folder: Path) -> None:
    """Copies what the command runs into a folder; the built-in language model stays here."""
    for file in ("experiment.py", "sparse_ops.py"):
        shutil.copy(ROOT / file, folder)
    shutil.copytree(ROOT / "harness", folder / "harness", ignore=shutil.ignore_patterns("*.pyc"))


def replace(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Sets what the harness calls `name` in every module of the project that has it.

    A module that imported the name has a reference of its own: to set one leaves the others.
    """
    rooms = [m for n, m in sys.modules.items() if n.split(".")[0] in ("harness", "sparse_ops")]
    (replaced,) = {id(getattr(room, name)) for room in rooms if hasattr(room, name)}
    for module in [m for n, m in sys.modules.items() if n.startswith(OWN_MODULES)]:
        if id(getattr(module, name, None)) == replaced:
            monkeypatch.setattr(module, name, value)


def set_to_toy_sizes(toy_model: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    import experiment

    def load(name: str, n_train: int, n_test: int, seed: int) -> tuple[dict, dict]:
        draw = random.Random(seed)
        train, test = {}, {}
        for label, text in TOY_TASKS[name].items():
            starts = draw.sample(range(0, len(text) - 200, 50), (n_train + n_test) // 2)
            passages = [text[start : start + 200] for start in starts]
            train[label], test[label] = passages[: n_train // 2], passages[n_train // 2 :]
        return train, test

    for name, classes in TOY_TASKS.items():
        monkeypatch.setitem(dataset_info.chosen_classes_per_dataset, name, list(classes))
    monkeypatch.setattr(dataset_utils, "get_multi_label_train_test_data", load)
    text = datasets.Dataset.from_dict({"text": SOURCES})
    replace(monkeypatch, "documents", lambda name, split: lambda: iter(SOURCES))
    replace(monkeypatch, "core_text", lambda settings: text)
    replace(monkeypatch, "hub_problem", lambda kind, name: None)  # all is in memory
    toy_settings = dict(
        model=str(toy_model),
        layers=(0, 2),
        context=32,
        training_text="toy",
        d_sae=64,
        k_min=4,
        training_tokens=4096,
        batch=128,
        buffer_tokens=1024,
        harvest_contexts=8,
        dead_feature_window=512,
        log_every=4,
        core_text="toy",
        core_prompts=4,
        core_reconstruction_batches=2,
        core_sparsity_batches=4,
        probe_sets=tuple(TOY_TASKS),
        probe_train=40,
        probe_test=20,
        probe_llm_batch=8,
        probe_sae_batch=15,
    )
    monkeypatch.setitem(experiment.PROFILES, "tinylm", toy_settings)
    for name, changes in experiment.PLAN.items():  # one seed, where the plan asks for more
        monkeypatch.setitem(experiment.PLAN, name, {**changes, "seeds": (0,)})
    return experiment
