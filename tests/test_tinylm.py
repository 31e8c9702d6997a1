"""The built-in language model: corpus, tokenizer, weights, labelled tasks, training script."""

import json
import math
import re
import shutil
from importlib import metadata
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinylm import corpus, tasks, train


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(corpus.HERE)


@pytest.fixture(scope="module")
def model():
    from transformers import Gemma2ForCausalLM

    return Gemma2ForCausalLM.from_pretrained(corpus.HERE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def heldout_stream(tokenizer):
    return train.token_stream(tokenizer, "heldout")


# ---- corpus --------------------------------------------------------------------------------------


def test_installed_packages_agree_with_the_manifest():
    corpus.check_packages()
    entries = corpus.manifest_entries()
    assert len(entries) > 5000
    assert {e.split for e in entries} == set(corpus.SPLITS)
    assert {e.package for e in entries} == set(corpus.PACKAGES)


def test_every_file_is_in_one_split_and_none_is_a_copy():
    entries = corpus.manifest_entries()
    assert len({e.path for e in entries}) == len({e.sha256 for e in entries}) == len(entries)
    assert all(e.split == corpus._split_of(e.path) for e in entries)


def test_no_generated_or_platform_dependent_file_in_the_manifest():
    paths = [e.path for e in corpus.manifest_entries()]
    assert not [p for p in paths if re.search(r"_pb2|graph_objs|/_?version\.py|__config__", p)]
    families = [p.split("/")[2] for p in paths if p.startswith("transformers/models/")]
    assert len(families) == len(set(families)) > 100
    text = next(corpus.documents("train"))
    assert corpus._is_prose_or_code(text)
    assert not corpus._is_prose_or_code("# This file was automatically generated\n" + text)
    assert not corpus._is_prose_or_code("table = [\n" + "    0.25, 1.5e-3, 17,\n" * 50 + "]\n")


def test_heldout_and_probing_files_share_at_most_30_percent_of_their_lines_with_training():
    seen = set().union(*map(corpus.long_lines, corpus.documents("train")))
    for split in ("heldout", "probe_train", "probe_test"):
        shares = [corpus.overlap(corpus.long_lines(text), seen)
                  for text in corpus.documents(split)]
        assert len(shares) > 100
        assert max(shares) <= 0.3
        assert max(shares) > 0.05  # some lines are shared: the measure does see them
    assert corpus.overlap({"a", "b", "c", "d"}, {"a", "x"}) == 0.25
    assert corpus.long_lines("  " + "x" * 25 + "  \n" + "y" * 24 + "\n") == {"x" * 25}


def test_documents_start_with_many_packages_and_come_in_a_fixed_order():
    first = list(islice(corpus.files("train"), 100))
    assert len({entry.package for entry, _ in first}) >= 10
    assert [text for _, text in first] == list(islice(corpus.documents("train"), 100))
    with pytest.raises(ValueError, match="expected a split of train, heldout"):
        next(corpus.documents("test"))


def test_a_missing_package_is_named_with_its_version(monkeypatch):
    installed = metadata.distribution

    def without_patsy(name):  # 26 files: less than 0.5% of all
        if name == "patsy":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "distribution", without_patsy)
    corpus._root.cache_clear()
    try:
        pattern = r"patsy==\d.* not installed.*pip install -r requirements\.txt"
        with pytest.raises(corpus.CorpusError, match=pattern):
            next(corpus.documents("heldout"))
        with pytest.raises(corpus.CorpusError, match=pattern):
            corpus.check_packages()
    finally:
        corpus._root.cache_clear()


def write_other_hashes(path, n, package=None):
    """The manifest, with the hashes of n files (of a package) changed; returns their paths."""
    entries = corpus.manifest_entries()
    changed = [e.path for e in entries if package in (None, e.package)][:n]
    path.write_text("".join(
        "\t".join(e._replace(sha256="0" * 64) if e.path in set(changed) else e) + "\n"
        for e in entries))
    return changed


def test_files_that_differ_are_left_out_and_too_many_are_an_error(tmp_path, monkeypatch):
    n_files = len(corpus.manifest_entries())
    few, many = tmp_path / "few.tsv", tmp_path / "many.tsv"
    changed = write_other_hashes(few, int(0.005 * n_files))
    write_other_hashes(many, int(0.005 * n_files) + 1, "networkx")
    monkeypatch.setattr(corpus, "MANIFEST", few)
    corpus.check_packages()
    assert changed[0] not in {entry.path for entry, _ in islice(corpus.files("train"), 50)}
    monkeypatch.setattr(corpus, "MANIFEST", many)
    with pytest.raises(corpus.CorpusError, match=r"networkx==\d[\d.]* \(\d+ files; version"):
        corpus.check_packages()
    with pytest.raises(corpus.CorpusError, match="networkx"):
        list(corpus.documents("train"))


def test_a_damaged_or_missing_shipped_file_is_named(tmp_path, monkeypatch):
    corpus.verify_files()
    for name in (*corpus.SHIPPED, "SHA256SUMS"):
        shutil.copy(corpus.HERE / name, tmp_path)
    monkeypatch.setattr(corpus, "HERE", tmp_path)
    monkeypatch.setattr(corpus, "SUMS", tmp_path / "SHA256SUMS")
    monkeypatch.setattr(corpus, "MANIFEST", tmp_path / "manifest.tsv")
    corpus.verify_files()
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(corpus.CorpusError, match="model.safetensors.*git checkout -- tinylm"):
        corpus.verify_files()
    shutil.copy(tmp_path / "config.json", weights)
    (tmp_path / "config.json").unlink()
    with pytest.raises(corpus.CorpusError, match="config.json, found nothing"):
        corpus.verify_files()
    (tmp_path / "manifest.tsv").write_text("sympy\ttrain\n")
    with pytest.raises(corpus.CorpusError, match="line 1 of"):
        next(corpus.documents("train"))


# ---- tokenizer and weights -----------------------------------------------------------------------


def test_tokenizer_puts_bos_first_and_gives_the_text_back(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 4096
    assert tokenizer.padding_side == "right"
    text = 'def f(x):\n    return x["é"] + 1234  # ½\n\n\nclass A:\n\tpass\n'
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 2 and 2 not in ids[1:]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"])[1:] == list("1234")
    batch = tokenizer(["x", text], padding=True)
    assert batch["input_ids"][0][-1] == 0 and batch["attention_mask"][0][-1] == 0


def test_tokenizer_needs_a_third_of_a_token_per_byte(tokenizer, heldout_stream):
    n_bytes = sum(len(text.encode()) for text in corpus.documents("heldout"))
    # A text that speaks of "<pad>" gets the token, which counts as no byte.
    assert 0 <= n_bytes - train.token_bytes(tokenizer)[heldout_stream].sum() < 100
    assert n_bytes / len(heldout_stream) > 3


def test_token_losses_are_those_of_hugging_face(model, heldout_stream):
    tokens = train.context_batch(heldout_stream, np.array([0, 7]), 200)  # beyond the window of 128
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
        ours = train.token_losses(model, tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(ours.flatten(), expected, atol=1e-4, rtol=1e-4)


def test_shipped_weights_reach_the_recorded_heldout_loss(model, tokenizer, heldout_stream):
    record = json.loads((corpus.HERE / "heldout.json").read_text())
    of_128 = record["contexts"][0]
    assert of_128["context"] == 128 and of_128["bits_per_byte"] <= 1.3
    assert of_128["nats_per_token"] < 0.6 * record["unigram"]["nats_per_token"]
    figures = train.heldout_figures(model, tokenizer, heldout_stream, 128, 20_000)
    assert abs(figures["bits_per_byte"] - of_128["bits_per_byte"]) < 0.1
    (table,) = re.findall(r"\| 128 \| ([\d.]+) \| ([\d.]+) \|", (corpus.HERE / "README.md")
                          .read_text())
    assert [float(x) for x in table] == pytest.approx(
        [of_128["bits_per_byte"], of_128["nats_per_token"]], abs=1e-3)


def small_model(**changes):
    return train.new_model(train.model_config(
        64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, query_pre_attn_scalar=16, intermediate_size=64, sliding_window=8, **changes),
        seed=0)


def test_bits_per_byte_of_a_model_that_knows_nothing():
    class Letters:  # token i stands for i bytes
        all_special_tokens = ("",)

        def __len__(self):
            return 64

        def convert_ids_to_tokens(self, ids):
            return ["x" * i for i in ids]

    nothing = small_model()
    torch.nn.init.zeros_(nothing.model.embed_tokens.weight)  # all logits 0: uniform over 64
    stream = np.tile(np.array([2, 4], dtype=np.uint16), 300)  # three bytes a token
    figures = train.heldout_figures(nothing, Letters(), stream, 16)
    assert figures["nats_per_token"] == pytest.approx(math.log(64))
    assert figures["bits_per_byte"] == pytest.approx(6 / 3)
    assert figures["tokens"] == 600
    assert train.unigram_nats(stream, stream, 64) == pytest.approx(-math.log(301 / 664))


# ---- tasks ---------------------------------------------------------------------------------------


def test_task_sets_are_two_disjoint_sets_of_three():
    assert {name: len(members) for name, members in tasks.TASK_SETS.items()} == {"A": 3, "B": 3}
    used = [name for members in tasks.TASK_SETS.values() for name in members]
    assert len(set(used)) == 6 and set(used) <= set(tasks.TASKS)
    assert all(tasks.CLASSES[name] == tuple(tasks.TASKS[name]) for name in used)


@pytest.mark.parametrize("name", [n for members in tasks.TASK_SETS.values() for n in members])
def test_task_has_equal_classes_and_train_and_test_of_different_files(name):
    train_set, test_set = tasks.load_task(name, 120, 60, seed=42)
    assert tuple(train_set) == tuple(test_set) == tasks.CLASSES[name]
    everything = []
    for texts, n, split in ((train_set, 60, "probe_train"), (test_set, 30, "probe_test")):
        sources = [(entry.path, text) for entry, text in corpus.files(split)]
        for label, passages in texts.items():
            assert len(passages) == n
            assert all(300 <= len(p) <= 480 for p in passages)
            imports = re.compile(r"^[ \t]*(?:import|from [\w.]+ import) ", re.M)
            assert not [p for p in passages if imports.search(p)]
            everything += passages
            kind = tasks.TASKS[name][label]
            if kind.part in ("any", "code"):  # comments and docstrings lose their marks
                of_class = [text for path, text in sources if re.match(kind.paths, path)]
                assert all(any(p in text for text in of_class) for p in passages[:10])
    assert len(set(everything)) == len(everything)
    again = tasks.load_task(name, 120, 60, seed=42)
    assert again == (train_set, test_set)
    assert tasks.load_task(name, 120, 60, seed=43)[0] != train_set


def test_parts_of_a_file():
    text = ('"""Module."""\n# one\nx = """\n# not a comment\n"""\n\n\ndef f():\n    """Doc\n    '
            'string."""\n    # two\n    return 1  # three\n')
    assert tasks._parts(text) == [
        "docstring", "comment", "code", "code", "code", "", "", "code", "docstring", "docstring",
        "comment", "code", ""]


def test_asking_for_too_many_passages_or_another_task_is_an_error():
    with pytest.raises(corpus.CorpusError, match=r"expected 1 to \d+ probe_train passages of cla"):
        tasks.load_task("package", 1_000_000, 100, seed=42)
    with pytest.raises(corpus.CorpusError, match="found a demand for 0"):
        tasks.load_task("package", 100, 1, seed=42)
    with pytest.raises(ValueError, match="expected a task of package"):
        tasks.load_task("colour", 100, 100, seed=42)


# ---- training ------------------------------------------------------------------------------------

STREAM = np.random.default_rng(0).integers(3, 64, 4000).astype(np.uint16)
SMALL = dict(batch=4, micro_batch=2, context=16, compile_it=False)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_interrupted_training_gives_the_weights_of_an_uninterrupted_one(tmp_path):
    whole, parts = small_model(), small_model()
    log = train.train(whole, STREAM, tmp_path / "whole", 10 * 64, **SMALL)
    assert log[-1]["step"] == 10 and log[-1]["tokens"] == 640
    train.train(parts, STREAM, tmp_path / "parts", 10 * 64, stop_after=4, **SMALL)
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == 4
    fresh = small_model()
    resumed = train.train(fresh, STREAM, tmp_path / "parts", 10 * 64, **SMALL)
    assert [line["step"] for line in resumed] == [line["step"] for line in log]
    expected = weights(whole)
    for name, value in weights(fresh).items():
        torch.testing.assert_close(value, expected[name], atol=0, rtol=0)


def test_longer_training_goes_on_from_before_the_decay(tmp_path, capsys):
    train.train(small_model(), STREAM, tmp_path, 10 * 64, **SMALL)
    before = torch.load(tmp_path / "before_decay.pt", weights_only=True)
    assert before["step"] == 8  # of 10: more than 70% of the way
    capsys.readouterr()
    log = train.train(small_model(), STREAM, tmp_path, 20 * 64, **SMALL)
    assert "at step 8," in capsys.readouterr().out
    assert [line["step"] for line in log] == list(range(1, 21))


def test_training_lowers_the_loss_of_a_pattern(tmp_path):
    stream = np.tile(np.arange(3, 35, dtype=np.uint16), 400)
    log = train.train(small_model(), stream, tmp_path, 60 * 64, **SMALL)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    factors = [train.lr_factor(p) for p in (0, 0.01, 0.02, 0.5, 0.7, 0.85, 1.0, 1.2)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0, 0])


def test_a_pass_over_the_stream_takes_every_block_once():
    stream = np.arange(3, 3 + 15 * 40 + 16)
    batches = [train.training_batch(stream, step, 4, 16, seed=0) for step in range(30)]
    assert all((b[:, 0] == train.BOS).all() and b.shape == (4, 16) for b in batches)
    first = torch.cat(batches[:10])[:, 1:]
    assert sorted(first.flatten().tolist()) == list(range(3, 3 + 15 * 40))
    # Each pass has its own order.
    assert not torch.equal(batches[0], batches[10]) and not torch.equal(batches[10], batches[20])


def test_tokenizer_training_gives_the_special_tokens_and_the_size():
    small = train.train_tokenizer(islice(corpus.documents("heldout"), 20), vocabulary=400)
    assert len(small) == 400
    assert small.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<eos>", "<bos>"]
    assert small.padding_side == "right"
    assert small.backend_tokenizer.encode("x").ids[0] == 2
