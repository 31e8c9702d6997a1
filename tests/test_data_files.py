"""Files from outside are data: no code of theirs runs unasked, and damage is one sentence."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import random
import shutil
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from huggingface_hub import constants

import experiment
from harness.errors import ExperimentError
from harness.evaluation.core import core_store, core_text, prepare_for_sae_bench
from harness.evaluation.probe_texts import probe_tokens, read_probe_texts
from harness.language_model import load_language_model
from harness.store import sha256_file
from harness.text import load_dataset, streamed_texts
from tests import gemma_fixture
from tests.conftest import settings_of

CPU = torch.device("cpu")
SCRIPT = """import datasets
from pathlib import Path

Path({marker!r}).touch()


class Own(datasets.GeneratorBasedBuilder):
    def _info(self):
        features = datasets.Features({{"text": datasets.Value("string")}})
        return datasets.DatasetInfo(features=features)

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator(name="train")]

    def _generate_examples(self):
        yield 0, {{"text": "a text"}}
"""


def shard(form: str, column: str = "text", n: int = 60, seed: int = 0) -> bytes:
    """A file of a text data set: rows of random words."""
    draw = random.Random(seed)
    rows = [{column: " ".join(f"{draw.randrange(16**6):06x}" for _ in range(30))} for _ in range(n)]
    if form == "parquet":
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    kind, _, compression = form.partition(".")
    lines = [row[column] if kind == "txt" else json.dumps(row) for row in rows]
    content = "".join(line + "\n" for line in lines).encode()
    compress = {"": bytes, "gz": gzip.compress, "zst": zstandard.compress}[compression]
    return compress(content)


def write_shards(folder: Path, form: str, *contents: bytes) -> None:
    folder.mkdir()
    for at, content in enumerate(contents):
        (folder / f"train-{at:05d}.{form}").write_bytes(content)


# ------------------------------------------------------------------------------- weights


def test_weights_in_a_pickle_are_refused(toy_model: Path, toy_lm, tmp_path: Path) -> None:
    """Though transformers would read them."""
    folder = tmp_path / "pickled"
    shutil.copytree(toy_model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(toy_lm.hf.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ExperimentError, match="must have its weights as safetensors, .*convert"):
        load_language_model(str(folder))


# ------------------------------------------------------------------------------- loading scripts


@pytest.fixture()
def own_script(tmp_path: Path, monkeypatch) -> Path:
    """A data set "own" with a loading script; the file that appears when the script runs."""
    (tmp_path / "own").mkdir()
    marker = tmp_path / "ran"
    (tmp_path / "own" / "own.py").write_text(SCRIPT.format(marker=str(marker)))
    monkeypatch.chdir(tmp_path)
    return marker


def test_a_script_of_any_other_data_set_does_not_run(own_script: Path, monkeypatch) -> None:
    """Not even where `datasets` holds it, allowed once, and would run it from then on."""
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(own_script.parent / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    datasets.load_dataset("own", split="train", streaming=True, trust_remote_code=True)
    for module in [name for name in sys.modules if name.startswith("datasets_modules")]:
        del sys.modules[module]
    own_script.unlink()
    with pytest.raises(ExperimentError, match="'own' must load without code .* Parquet or JSON"):
        next(streamed_texts("own"))
    assert not own_script.exists()


def test_a_named_data_set_runs_its_script_and_says_so(
    toy_lm, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Of SAE-Bench's own loaders and of the evaluation's text; one of a folder by its SHA-256."""
    from sae_bench.sae_bench_utils import dataset_utils

    monkeypatch.chdir(tmp_path)
    gemma_fixture.write_github_code(Path("codeparrot/github-code"))
    gemma_fixture.write_openwebtext(Path("Skylion007/openwebtext"))
    stock, modules = dataset_utils.load_dataset, datasets.config.HF_MODULES_CACHE
    settings = dataclasses.replace(
        settings_of(experiment, "run_1", "gemma-2-2b"), probe_train=40, probe_test=20, context=32
    )
    train, _ = probe_tokens("codeparrot/github-code", toy_lm.tokenizer, CPU, settings)
    assert list(train) == ["C", "Python", "HTML", "Java", "PHP"]
    assert len(list(core_text(settings))) == 150
    said = capsys.readouterr().out
    for name in ("codeparrot/github-code", "Skylion007/openwebtext"):
        digest = sha256_file(Path(name, f"{name.split('/')[1]}.py"))
        assert f"the data set {name} runs its own loading script, of SHA-256 {digest}\n" in said
    assert (dataset_utils.load_dataset, datasets.config.HF_MODULES_CACHE) == (stock, modules)


@pytest.fixture()
def hub(tmp_path: Path, monkeypatch) -> dict:
    """A hub of data sets with scripts: {"newest": a commit, "loads": [what was asked for]}."""
    state = {"newest": "1" * 40, "loads": []}

    class Info:
        sha = property(lambda self: state["newest"])

    def dataset_info(self, name: str) -> Info:
        if state["newest"] is None:
            raise ConnectionError("no network")
        return Info()

    def load(name: str, **options):
        state["loads"].append((options["trust_remote_code"], options.get("revision")))
        if not options["trust_remote_code"]:
            raise ValueError("set the option `trust_remote_code=True` to remove this error.")
        return datasets.Dataset.from_dict({"text": ["a text"]})

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return state


def test_a_script_runs_at_the_revision_of_its_first_use(hub, capsys) -> None:
    first = hub["newest"]
    for newest in (first, "2" * 40, None):
        hub["newest"] = newest
        load_dataset("Skylion007/openwebtext", split="train", trust_remote_code=True)
    assert hub["loads"] == [(False, None), (True, first)] * 3
    line = f"the data set Skylion007/openwebtext runs its own loading script, at revision {first}\n"
    assert capsys.readouterr().out == line * 3


def test_without_the_hub_the_revision_is_that_of_the_local_cache(hub, tmp_path: Path) -> None:
    hub["newest"] = None
    with pytest.raises(ConnectionError):
        load_dataset("codeparrot/github-code")
    refs = tmp_path / "hub" / "datasets--codeparrot--github-code" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("3" * 40)
    load_dataset("codeparrot/github-code")
    assert hub["loads"][-1] == (True, "3" * 40)


# ------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("form", ["jsonl.zst", "txt.zst", "jsonl.gz", "parquet"])
def test_a_text_cut_short_is_one_sentence(form: str, tmp_path: Path, monkeypatch) -> None:
    """The first of two files is half there: the text must not pass for a shorter one."""
    content = shard(form)
    write_shards(tmp_path / "own", form, content[: len(content) // 2], content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExperimentError, match="'own' must .* whole files.*fetch its") as caught:
        list(streamed_texts("own"))
    assert "\n" not in str(caught.value)


@pytest.fixture()
def core(toy_lm, tmp_path: Path, monkeypatch):
    """A function that makes the store of the evaluation text "own"; its settings."""
    settings = dataclasses.replace(
        settings_of(experiment, "run_1", "tinylm"), context=32, core_text="own"
    )
    model = toy_lm.bridge()
    sae = prepare_for_sae_bench(experiment.CustomSAE(32, 64, "toy", 0, k=4), settings)
    monkeypatch.chdir(tmp_path)
    return lambda: core_store(settings, model, sae), settings


def test_the_evaluation_reads_what_saelens_reads_by_the_name(core, tmp_path: Path) -> None:
    """In the same order of files."""
    from sae_lens.training.activations_store import ActivationsStore

    contents = [shard("jsonl.zst", n=3, seed=at) for at in range(8)]
    write_shards(tmp_path / "own", "jsonl.zst", *contents)
    ours = core[0]()
    stock = ActivationsStore(  # as from_sae makes it, of the name
        model=ours.model, dataset="own", streaming=True, hook_name=ours.hook_name,
        hook_head_index=None, context_size=32, d_in=32, n_batches_in_buffer=8,
        total_training_tokens=10**9, store_batch_size_prompts=8, train_batch_size_tokens=4096,
        prepend_bos=True, normalize_activations="none", device=CPU, dtype="float32",
    )  # fmt: skip
    stock.shuffle_input_dataset(seed=42)
    for _ in range(3):
        assert torch.equal(ours.get_batch_tokens(8), stock.get_batch_tokens(8))


def test_an_evaluation_text_without_text_column_is_one_sentence(
    core, toy_lm, tmp_path: Path
) -> None:
    """Before training, and in the evaluation itself."""
    make_store, settings = core
    write_shards(tmp_path / "own", "jsonl", shard("jsonl", column="tokens"))
    expected = r"'own' must have a column 'text', but has \['tokens'\]: "
    with pytest.raises(ExperimentError, match=expected):
        read_probe_texts(settings, toy_lm.tokenizer, CPU)
    with pytest.raises(ExperimentError, match=expected):
        make_store()


def test_an_evaluation_text_broken_further_on_is_one_sentence(core, tmp_path: Path) -> None:
    content = shard("jsonl.gz")
    write_shards(tmp_path / "own", "jsonl.gz", content, content[: len(content) // 2])
    store = core[0]()
    with pytest.raises(ExperimentError, match="'own' must be a data set with whole files"):
        for _ in range(100):
            store.get_batch_tokens(8)
