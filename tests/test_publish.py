"""A run as a folder for the Hugging Face hub, and the pages that say how its SAEs are used."""

from __future__ import annotations

import getpass
import inspect
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, constants
from huggingface_hub.utils import validate_repo_id
from sae_lens import SAE
from safetensors.torch import load_file

from harness import publish as room
from harness.errors import ExperimentError
from harness.privacy import scrubbed
from harness.publish import main, publish
from harness.start import VARIABLES
from tests.conftest import ROOT

REPO, MODEL = "alice/run_1", "alice/toy-gemma-2"
SAES = ("layer_0/seed_0", "layer_2/seed_0")


@pytest.fixture(scope="module")
def published(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(toy_run, REPO, MODEL, tmp_path_factory.mktemp("published"))


@pytest.fixture
def hub(published: Path, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return put_on_hub(tmp_path, monkeypatch, {REPO: published, MODEL: toy_model})


def put_on_hub(cache: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> Path:
    """The hub's cache, as it is once these repositories were downloaded."""
    for name, folder in folders.items():
        into = cache / f"models--{name.replace('/', '--')}"
        (into / "refs").mkdir(parents=True)
        (into / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, into / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def edited(toy_run: Path, folder: Path, **changes) -> Path:
    """A copy of a run; `settings` and other parts of its config.json are changed."""
    shutil.copytree(toy_run, folder)
    config = json.loads((folder / "config.json").read_text())
    for part, change in changes.items():
        config[part] = {**config.get(part, {}), **change}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def blocks(page: Path) -> list[str]:
    """The Python code of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def run_blocks(page: Path) -> dict:
    """Runs the Python code of a page from top to bottom; the names that it leaves."""
    names: dict = {}
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), names)
    return names


def test_the_folder_holds_what_the_hub_is_to_have(published: Path) -> None:
    found = {file.relative_to(published).as_posix() for file in published.rglob("*")}
    files = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
    expected = {f"{name}/{file}" for name in SAES for file in files}
    assert found == expected | {*SAES, "layer_0", "layer_2", "README.md"}


@pytest.mark.parametrize("name", SAES)
def test_saelens_gets_the_sae_of_the_run(hub: Path, published: Path, toy_run, name: str) -> None:
    """Bit for bit, from the folder and by the hub's name."""
    own = SAE.load_from_disk(toy_run / "sae" / name)
    from_hub, cfg, log_sparsity = SAE.from_pretrained_with_cfg_and_sparsity(REPO, name)
    for sae in (SAE.load_from_disk(published / name), from_hub):
        for key, tensor in own.state_dict().items():
            assert torch.equal(sae.state_dict()[key], tensor), key
        x_ND = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(sae.encode(x_ND), own.encode(x_ND))
        assert torch.equal(sae(x_ND), own(x_ND))
    scored = toy_run / "eval_results" / "core"
    (file,) = scored.glob(f"{name.replace('/', '_')}_custom_sae_*.json")
    rows = json.loads(file.read_text())["eval_result_details"]
    density_F = torch.tensor([row["feature_density"] for row in rows])
    assert 0 < density_F.max() <= 1
    assert torch.allclose(log_sparsity, torch.log10(density_F + 1e-10))


def test_cfg_says_what_the_sae_is_for(published: Path) -> None:
    cfg = json.loads((published / "layer_2/seed_0/cfg.json").read_text())
    metadata = cfg["metadata"]
    assert metadata["model_name"] == MODEL
    assert metadata["hook_name"] == "blocks.2.hook_resid_post"
    assert metadata["context_size"] == 32
    assert metadata["dataset_path"] == "toy"
    assert metadata["prepend_bos"] is True
    assert metadata["exclude_special_tokens"] is True
    assert metadata["seqpos_slice"] == [1, None]  # which SAELens makes a slice of


def test_the_front_matter_is_what_the_hub_asks_for(published: Path) -> None:
    """As far as that can be seen without the hub: `ModelCard.validate` asks it."""
    content = ModelCard.load(published / "README.md").content
    front = yaml.safe_load(content.split("---")[1])
    assert front["library_name"] == "saelens"
    assert {"sparse-autoencoder", "saelens", "topk"} <= {*front["tags"]}
    assert front["base_model"] == MODEL
    validate_repo_id(front["base_model"])
    assert front["datasets"] == ["toy"]
    assert "license" not in front  # nobody knows that of alice's model
    ModelCardData(**front)


@pytest.mark.parametrize(("model", "licence", "base"), [
    ("tinylm", "mit", None),
    ("smollm2", "apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ("google/gemma-2-2b", "gemma", "google/gemma-2-2b"),
    ("openai-community/gpt2", None, "openai-community/gpt2"),
])  # fmt: skip
def test_a_language_model_has_its_licence_and_a_name_that_others_have(
    toy_run: Path, tmp_path: Path, model: str, licence: str | None, base: str | None
) -> None:
    run = edited(toy_run, tmp_path / "run_2", settings={"model": model, "training_text": "tinylm"})
    folder = publish(run, into=tmp_path / "published")
    front = ModelCard.load(folder / "README.md").data
    assert (front.license, front.base_model, front.datasets) == (licence, base, None)
    metadata = json.loads((folder / "layer_2/seed_0/cfg.json").read_text())["metadata"]
    assert metadata["model_name"] == (base or "tinylm (the folder tinylm of this repository)")
    assert metadata["dataset_path"].startswith("Python source")
    assert "tokens of Python source" in (folder / "README.md").read_text()
    for file in ("model.safetensors", "config.json", "tokenizer.json", "manifest.tsv"):
        copy = folder / "tinylm" / file
        assert copy.exists() == (model == "tinylm")
        assert not copy.exists() or copy.read_bytes() == (ROOT / "tinylm" / file).read_bytes()


def test_every_figure_of_the_card_stands_in_the_records(toy_run: Path, tmp_path: Path) -> None:
    """With two seeds: means with their standard errors."""
    run = edited(toy_run, tmp_path / "run_2", settings={"seeds": [0, 1]})
    info = json.loads((run / "final_info.json").read_text())
    for n, entry in enumerate(info.values()):
        for m, metric in enumerate(entry["final_info_dict"]):
            entry["means"][metric] += (n + 1) * m / 700  # no two alike
            entry["stderrs"][metric] = (n + 1) * (m + 1) / 900
            entry["final_info_dict"][metric] *= 2
    (run / "final_info.json").write_text(json.dumps(info))
    for name in SAES:
        shutil.copytree(run / "sae" / name, run / "sae" / name.replace("seed_0", "seed_1"))
    text = (publish(run, REPO, MODEL, tmp_path / "published") / "README.md").read_text()
    columns = {"l0": 1, "fvu": 3, "ce_loss_score": 3, "dead_fraction": 3}
    who = {"SAE": "sae", "untrained SAE": "untrained", "language model": "llm"}
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0] in ("0", "2")]
    assert len(rows) == 2 + 6
    for layer, *cells in rows:
        entry = info[f"layer_{layer}"]
        reader = ""
        if cells[0] in who:
            reader = who[cells.pop(0)]
            metrics = {f"{reader}_top_{k}_test_accuracy": 3 for k in (1, 2, 5)}
        else:
            metrics = columns
        error = "" if reader == "llm" else " ± {:.{}f}"  # there is but one language model
        assert cells == [
            f"{entry['means'][metric]:.{digits}f}" + error.format(entry["stderrs"][metric], digits)
            for metric, digits in metrics.items()
        ]
    means, primary = info["layer_0"]["means"], "mean_topk_probe_accuracy"
    for metric in ("training_tokens", "total_tokens_eval_reconstruction",
                   "total_tokens_eval_sparsity_variance"):  # fmt: skip
        assert f" {int(means[metric]):,} tokens" in text
    overall = info["verdict"]
    assert f"{overall['means'][primary]:.4f} ± {overall['stderrs'][primary]:.4f}" in text


def test_the_card_names_the_code_and_the_warnings(toy_run: Path, tmp_path: Path) -> None:
    run = edited(
        toy_run, tmp_path / "run_2", git={"commit": "c0ffee", "dirty": True},
        settings={"core_text": "smollm2"},
    )  # fmt: skip
    (run / "warnings.json").write_text(json.dumps(["layer_0: the codes are dense"]))
    text = (publish(run, REPO, MODEL, tmp_path / "published") / "README.md").read_text()
    config = json.loads((run / "config.json").read_text())
    assert "commit `c0ffee`, with changes that are in no commit" in text
    assert config["sha256"]["experiment.py"] in text
    assert f"SAE-Bench {config['versions']['sae-bench']}" in text
    assert "- layer_0: the codes are dense" in text
    (shown,) = re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert json.loads(shown) == config["settings"] | {"model": MODEL}
    assert "docs/method.md" in text
    assert "tokens of held-out texts of sae-probes" in text


def test_nothing_of_the_machine_is_published(
    toy_run: Path, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths, the user's name, tokens: where a run can have them, they are not in the folder."""
    monkeypatch.setattr(getpass, "getuser", lambda: "mallory")
    monkeypatch.setattr(platform, "node", lambda: "node7.lab")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/mallory stone"))
    text = tmp_path / "mallory-notes.jsonl"
    text.write_text('{"text": "x"}\n')
    token = "hf_" + "abcdefghijklmnop"
    said = (f"{toy_model}, ~/diary, '/home/mallory stone/run', file:///data/x, {token} by mallory, "
            f"{text.name}: row 3, secret.csv is short, on node7.lab")  # fmt: skip
    run = edited(
        toy_run, tmp_path / "run_2", texts={str(text): {}},
        settings={"model": str(toy_model), "description": said, "training_text": str(text),
                  "core_text": "/data/secret", "probe_sets": [str(text), "secret.csv"]},
    )  # fmt: skip
    (run / "warnings.json").write_text(json.dumps([said]))
    for cfg in run.glob("sae/*/*/cfg.json"):  # as SAELens may have written one
        content = json.loads(cfg.read_text())
        content["metadata"] |= {"model_name": str(toy_model), "checkpoint_path": str(tmp_path)}
        cfg.write_text(json.dumps(content))
    folder = publish(run, REPO, MODEL, tmp_path / "published")
    names = ("mallory", "stone", "secret", "node7", "/home", "/data", "diary", str(tmp_path),
             str(ROOT), str(toy_model), str(toy_run), token, *tmp_path.parts[2:-1])  # fmt: skip
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) == 7
    for file in files:
        content = file.read_bytes()
        for name in names:
            assert name.encode() not in content, (file.name, name)
    card = (folder / "README.md").read_text()
    assert "[path]" in card and "[user]" in card and "[token]" in card
    assert "local texts that are not published" in card
    assert "a local set that is not published" in card


def test_what_is_no_path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "root")  # in a container: nobody's name
    said = "either/or, 1 / 2, https://example.org/a/b, blocks.2/x of and/or/else, <b>x</b>, a root"
    assert scrubbed(said) == said


def test_a_card_says_what_is_penalised(toy_run: Path, tmp_path: Path) -> None:
    """Without a selection S holds all active features, and all but the strongest are penalised."""
    said = "penalty on active features that are not in S"
    text = (publish(toy_run, REPO, MODEL, tmp_path / "published") / "README.md").read_text()
    assert said in text
    for name, settings, s_holds in (
        ("run_5", {"curriculum": False}, "all active features.\n"),
        ("run_11", {"activation": "relu"}, "all active features, and training moves `gamma` "),
    ):
        run = edited(toy_run, tmp_path / name, settings=settings)
        for cfg in run.glob("sae/*/*/cfg.json"):
            content = json.loads(cfg.read_text()) | {"architecture": "standard"}
            del content["k"], content["rescale_acts_by_decoder_norm"]
            cfg.write_text(json.dumps(content))
        text = (publish(run, REPO, MODEL, tmp_path / "published") / "README.md").read_text()
        assert said not in text
        assert f"S holds {s_holds}" in text
        assert "penalty on all active features but a token's strongest" in text


def no_weights(run: Path) -> None:
    shutil.rmtree(run / "sae")


def other_weights(run: Path) -> None:
    (run / "sae/layer_2/seed_0/weights.safetensors").touch()


def no_info(run: Path) -> None:
    (run / "final_info.json").unlink()


def cut_weights(run: Path) -> None:
    path = run / "sae/layer_2/seed_0/sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def no_settings(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({"run": config["run"]}))


def broken_info(run: Path) -> None:
    (run / "final_info.json").write_text("{")


def a_file_in_the_way(run: Path) -> None:
    (run.parent / "published").write_text("")


def threshold(run: Path) -> None:
    path = run / "sae/layer_2/seed_0/cfg.json"
    path.write_text(path.read_text().replace('"topk"', '"jumprelu"'))


def other_hook(run: Path) -> None:
    path = run / "config.json"
    path.write_text(path.read_text().replace('"resid_post"', '"mlp_out"'))


def other_settings(run: Path) -> None:
    path = run / "config.json"
    path.write_text(path.read_text().replace('"lr":', '"rate":'))


@pytest.mark.parametrize(("change", "given", "words"), [
    (no_weights, {}, "no weights in sae/layer_0/seed_0, as runs that are committed have none: "
                     "train it again, make run OUT=run_1 PROFILE=tinylm, and then make publish "
                     "RUN=run_1"),
    (other_weights, {}, "SAELens' form of layer_2/seed_0 would compute something else"),
    (no_info, {}, "/run_2' is none (it has no final_info.json): make publish RUN=run_11"),
    (broken_info, {}, "is none (final_info.json can't be read: "),
    (cut_weights, {}, "run_2 can't be published, as sae/layer_2/seed_0 is damaged ("),
    (no_settings, {}, "the card needs 'settings' of its settings or figures, and they have none"),
    (a_file_in_the_way, {}, "run_2 can't be published, as a file can't be read or written ("),
    (other_settings, {}, "the card needs 'lr' of its settings or figures, and they have none"),
    (threshold, {"form": "sparsify"}, "can't be published in sparsify's form, which has SAEs that "
                                      "keep the k largest features alone, and sae/layer_2/seed_0 "
                                      "is 'jumprelu': leave FORM out"),
    (other_hook, {"form": "sparsify"}, "reads what a module puts out, and hook is 'mlp_out'"),
    (None, {"model": None}, "can't be published, as it reads a language model in a folder of this"),
    (None, {"repo": "saes"}, "'saes' is none (it has no owner)"),
    (None, {"model": "run_2/sae"}, "'run_2/sae' is none (a folder of that name lies here)"),
    (None, {"repo": "a/b/c"}, "'a/b/c' is none"),
    (None, {"model": "no name/x"}, "'no name/x' is none"),
])  # fmt: skip
def test_refusals_are_one_sentence(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change, given: dict, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = edited(toy_run, tmp_path / "run_2")
    if change:
        change(run)
    with pytest.raises(ExperimentError) as refused:
        publish(run, **{"repo": REPO, "model": MODEL, **given}, into=tmp_path / "published")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("published/*"))


def test_a_changed_tinylm_is_refused(toy_run: Path, tmp_path: Path) -> None:
    run = edited(
        toy_run, tmp_path / "run_2", settings={"model": "tinylm"},
        sha256={"tinylm/model.safetensors": "0" * 64},
    )  # fmt: skip
    with pytest.raises(ExperimentError, match="tinylm/model.safetensors must be the file that the"):
        publish(run, into=tmp_path / "published")
    assert not list(tmp_path.glob("published/*"))


def test_the_command_says_how_to_upload(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """One line, of the hub's own command; a folder of before is kept; refusals have status 1."""
    from huggingface_hub.cli.upload import upload

    monkeypatch.setattr(publish, "__defaults__", (None, None, tmp_path, "saelens"))
    monkeypatch.chdir(tmp_path)
    main([str(toy_run), "--repo", REPO, "--model", MODEL])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"hf upload {REPO} run_1 ."
    assert [*inspect.signature(upload).parameters][:3] == ["repo_id", "local_path", "path_in_repo"]
    (tmp_path / "run_1" / "README.md").write_text("edited")
    main([str(toy_run), "--model", MODEL])
    said = capsys.readouterr().out
    assert said.endswith(f"hf upload {room.PLACEHOLDER}/run_1 run_1 .\n")
    assert "set aside as run_1.1" in said
    assert (tmp_path / "run_1.1" / "README.md").read_text() == "edited"
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path), "--model", MODEL])
    assert "make publish RUN=run_11" in str(refused.value.code)


@pytest.mark.parametrize(("name", "on_hub"), [
    ("run_3.1", "run_3.1"), ("run lr 1e-3", "run-lr-1e-3"), ("run_ä--b..", "run_-b"), ("'", "run"),
])  # fmt: skip
def test_what_the_command_prints_can_be_given_to_a_shell(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, name: str, on_hub: str
) -> None:
    monkeypatch.setattr(publish, "__defaults__", (None, None, tmp_path / "published", "saelens"))
    monkeypatch.chdir(tmp_path)
    run = edited(toy_run, tmp_path / name)
    main([str(run), "--model", MODEL])
    again, _, upload = capsys.readouterr().out.splitlines()[-3:]
    assert shlex.split(upload) == ["hf", "upload", f"your-name/{on_hub}", f"published/{name}", "."]
    validate_repo_id(f"your-name/{on_hub}")
    assert shlex.split(again.split(", ")[-1])[2:] == [f"RUN={name}", f"REPO=alice/{on_hub}"]
    assert f'from_pretrained("your-name/{on_hub}"' in (
        tmp_path / "published" / name / "README.md"
    ).read_text()


def test_a_run_in_its_profiles_folder_keeps_that(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tinylm/run_1 and run_1 are two runs: neither sets the other aside, or is trained as it."""
    run = edited(toy_run, tmp_path / "tinylm" / "run_1")
    monkeypatch.chdir(tmp_path)
    folder = publish(run, REPO, MODEL, tmp_path / "published")
    assert folder == tmp_path / "published" / "tinylm" / "run_1"
    no_weights(run)
    with pytest.raises(ExperimentError, match="again, make run OUT=tinylm/run_1, and then make pu"):
        publish(run, REPO, MODEL, tmp_path / "published")


def test_files_are_for_all_and_one_without_densities_is_told(
    toy_run: Path, tmp_path: Path, capsys
) -> None:
    run = edited(toy_run, tmp_path / "run_2")
    shutil.rmtree(run / "eval_results")
    folder = publish(run, REPO, MODEL, tmp_path / "published")
    assert "layer_0/seed_0 has no sparsity.safetensors" in capsys.readouterr().out
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_half_made(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, number: int
) -> None:
    monkeypatch.setattr(publish, "__defaults__", (None, None, tmp_path / "published", "saelens"))
    left = tmp_path / "published" / ".partial-1-1"  # by a kill
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    monkeypatch.setattr(room, "card", lambda published: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        main([str(toy_run), "--repo", REPO, "--model", MODEL])
    assert ended.value.code == 128 + number
    assert "nothing is published" in capsys.readouterr().err
    assert not list((tmp_path / "published").iterdir())
    assert signal.getsignal(signal.SIGTERM) is not room.ended


@pytest.fixture(scope="module")
def sparsified(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(toy_run, REPO, MODEL, tmp_path_factory.mktemp("published"), form="sparsify")


def activations(n: int = 50) -> torch.Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(0))


def test_sparsify_s_form_computes_what_saelens_form_does(sparsified: Path, toy_run: Path) -> None:
    """By its formula, written out; each folder is one of its own loader's, named by the module."""
    assert sparsified.name == "run_1_sparsify"
    found = {file.relative_to(sparsified).as_posix() for file in sparsified.rglob("*.*")}
    files = ("cfg.json", "sae.safetensors")
    assert found - {"layers.0", "layers.2"} == {
        "README.md", *(f"layers.{layer}/{file}" for layer in (0, 2) for file in files),
    }  # fmt: skip
    for layer in (0, 2):
        folder = sparsified / f"layers.{layer}"
        cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / files[1])
        assert (cfg["activation"], cfg["transcode"], cfg["d_in"]) == ("topk", False, 32)
        assert w["encoder.weight"].shape == w["W_dec"].shape == (cfg["num_latents"], 32)
        x_ND = activations()
        pre_NF = torch.relu((x_ND - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
        top = pre_NF.topk(cfg["k"], dim=-1)
        acts_NF = torch.zeros_like(pre_NF).scatter(-1, top.indices, top.values)
        own = SAE.load_from_disk(toy_run / f"sae/layer_{layer}/seed_0")
        assert torch.allclose(acts_NF, own.encode(x_ND), atol=1e-4) and acts_NF.any()
        assert torch.allclose(acts_NF @ w["W_dec"] + w["b_dec"], own(x_ND), atol=1e-4)


def test_sparsify_s_own_loader_reads_it(sparsified: Path, toy_run: Path) -> None:
    sparsify = pytest.importorskip("sparsify", reason="takes the package eai-sparsify")
    saes = sparsify.SparseCoder.load_many(str(sparsified), local=True)
    assert list(saes) == ["layers.0", "layers.2"]
    for layer in (0, 2):
        own, x_ND = SAE.load_from_disk(toy_run / f"sae/layer_{layer}/seed_0"), activations()
        out = saes[f"layers.{layer}"](x_ND)
        acts_NF = torch.zeros(50, own.cfg.d_sae).scatter(-1, out.latent_indices, out.latent_acts)
        assert torch.allclose(acts_NF, own.encode(x_ND), atol=1e-4)
        assert torch.allclose(out.sae_out, own(x_ND), atol=1e-4)


def test_the_card_of_sparsify_s_form_does_what_it_says(
    sparsified: Path, toy_run: Path, toy_model: Path, tmp_path: Path, streams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    front = ModelCard.load(sparsified / "README.md").data
    assert front.library_name == "sparsify" and front.base_model == MODEL
    assert "Each lies in `layers.L`." in (sparsified / "README.md").read_text()
    pytest.importorskip("sparsify", reason="takes the package eai-sparsify")
    put_on_hub(tmp_path, monkeypatch, {REPO: sparsified, MODEL: toy_model})
    names = run_blocks(sparsified / "README.md")
    x_BLD = streams(names["tokens"], 0)
    expected = SAE.load_from_disk(toy_run / "sae" / SAES[0]).encode(x_BLD)
    found = torch.zeros_like(expected).scatter(-1, names["features"], names["values"])
    assert torch.allclose(found, expected, atol=1e-4) and found.any()


def test_seeds_have_a_folder_each_in_sparsify_s_form(toy_run: Path, tmp_path: Path) -> None:
    run = edited(toy_run, tmp_path / "run_2", settings={"seeds": [0, 1]})
    for name in SAES:
        shutil.copytree(run / "sae" / name, run / "sae" / name.replace("seed_0", "seed_1"))
    folder = publish(run, REPO, MODEL, tmp_path / "published", form="sparsify")
    places = {cfg.parent.relative_to(folder).as_posix() for cfg in folder.rglob("cfg.json")}
    assert places == {f"seed_{seed}/layers.{layer}" for seed in (0, 1) for layer in (0, 2)}
    assert "Each lies in `seed_S/layers.L`." in (folder / "README.md").read_text()


@pytest.fixture
def streams(toy_lm):
    """By text and layer, what the toy model has there, computed by transformers."""
    def stream(tokens: torch.Tensor, layer: int) -> torch.Tensor:
        return toy_lm.activations(tokens, (layer,))[0]

    return stream


def check_edits(names: dict, streams, layer: int, strength: float) -> None:
    """What the lines of a page have computed: features, and logits after a change of one."""
    sae, tokens, feature = names["sae"], names["tokens"], names["feature"]
    x_BLD = streams(tokens, layer)
    features = sae.encode(x_BLD).detach()
    assert torch.allclose(names["features"], features, atol=1e-4)
    assert feature == int(features[0, 1:].sum(0).argmax()) and features[..., feature].any()
    moved = {"steered": strength, "ablated": -features[..., feature, None]}
    lm, hook = names["lm"], names["hook"]
    for name, amount in moved.items():
        put = x_BLD + amount * sae.W_dec[feature]
        expected = lm.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook, put=put: put)])
        assert torch.allclose(names[name], expected, atol=1e-3), name
        assert not torch.allclose(names[name], names["logits"], atol=1e-2), name


def test_the_lines_of_the_card_do_what_they_say(hub: Path, published: Path, streams) -> None:
    names = run_blocks(published / "README.md")
    check_edits(names, streams, 0, names["strength"])
    for code in blocks(published / "README.md"):
        assert len([line for line in code.splitlines() if "import" not in line and line]) <= 5


def test_a_card_of_tinylm_loads_it_from_its_own_repository(
    toy_run: Path, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams
) -> None:
    """With the toy model in the place of tinylm, whose SAEs these are."""
    run = edited(toy_run, tmp_path / "run_1", settings={"model": "tinylm"})
    folder = publish(run, REPO, into=tmp_path / "published")
    (folder / "tinylm" / "model.safetensors").unlink()
    shutil.copytree(toy_model, folder / "tinylm", dirs_exist_ok=True)
    put_on_hub(tmp_path / "hub", monkeypatch, {REPO: folder})
    names = run_blocks(folder / "README.md")
    check_edits(names, streams, 0, names["strength"])


IMPORTING = """
import os
before = dict(os.environ)
import experiment
changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
print(*changed)
"""


def test_a_notebook_that_imports_the_experiment_keeps_its_environment() -> None:
    """But for what libraries set of themselves: scikit-learn KMP_…, torch its cache's folder."""
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", IMPORTING], cwd=ROOT, env=own, text=True,
                          capture_output=True, check=True)  # fmt: skip
    changed = {*done.stdout.split()}
    assert not {name for name in changed if not name.startswith(("KMP_", "TORCHINDUCTOR_"))}


def test_the_page_of_uses_is_true(
    toy_run: Path, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams
) -> None:
    """docs/use.md from top to bottom, in a folder with the names that it uses."""
    (tmp_path / "run_10" / "sae" / "layer_4").mkdir(parents=True)
    (tmp_path / "run_10/sae/layer_4/seed_0").symlink_to(toy_run / "sae/layer_2/seed_0")
    (tmp_path / "tinylm").symlink_to(toy_model)
    monkeypatch.chdir(tmp_path)
    names = run_blocks(ROOT / "docs" / "use.md")
    check_edits(names, streams, 2, names["strength"])
    assert torch.allclose(names["inside"], names["ablated"], atol=1e-3)
    assert torch.allclose(names["seen"]["features"], names["features"], atol=1e-4)
    assert torch.allclose(names["steered_too"], names["steered"], atol=1e-3)
    votes = names["model"].lm_head(names["direction"])
    assert torch.allclose(votes, names["votes"], atol=1e-3)
    with names["bridge"].hooks(fwd_hooks=[(names["hook"], names["steer"])]):
        passed_over = names["bridge"](names["tokens"])  # as the page warns
    assert torch.allclose(passed_over, names["logits"], atol=1e-4)
