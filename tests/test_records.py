"""What a run leaves, and results that can't be right."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import math
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from harness.console import STAGE
from harness.errors import ExperimentError
from harness.evaluation.core import check_core, save_core
from harness.provenance import git_state, write_code
from harness.records import against_given_baseline, by_layer, pack, results_line
from harness.verdict import PRIMARY
from tests.conftest import ROOT, replace, run_command, settings_of
from tests.test_command import words

SCALARS = {
    "l0", "mse", "cossim", "ce_loss_score", "kl_div_score", "frac_alive", "explained_variance",
    "fvu", "tau_sel", "tau_pen", "gamma", "w", "loss", "loss_reconstruction", "loss_penalty",
    "loss_reg", "training_tokens", "n_seeds", "seconds_total", "llm_test_accuracy", "dead_fraction",
    "mse_per_token",
    *(f"{who}_{which}_test_accuracy" for which in ("top_1", "top_2", "top_5", "top_20", "all")
      for who in ("sae", "llm", "untrained")),
}  # fmt: skip


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_final_info_is_flat_finite_and_has_a_value_per_seed(toy, toy_run: Path) -> None:
    info = json.loads((toy_run / "final_info.json").read_text())
    assert list(info) == ["layer_0", "layer_2", "verdict"]
    for layer in ("layer_0", "layer_2"):
        assert set(info[layer]) == {"means", "stderrs", "final_info_dict"}
        means, values = info[layer]["means"], info[layer]["final_info_dict"]
        assert SCALARS <= set(means)
        for metric, mean in means.items():
            assert isinstance(mean, float) and math.isfinite(mean), metric
            assert values[metric] == [mean] and info[layer]["stderrs"][metric] == 0
    top = [info[f"layer_{at}"]["means"][f"sae_top_{k}_test_accuracy"] for at in (0, 2)
           for k in (1, 2, 5)]  # fmt: skip
    assert info["verdict"]["means"][PRIMARY] == pytest.approx(sum(top) / 6)
    assert json.loads((toy_run / "warnings.json").read_text()) is not None


def test_every_recorded_figure_is_explained(toy, toy_run: Path) -> None:
    """In docs/metrics.md, under its name, without the number k and whose it is."""
    page = (ROOT / "docs" / "metrics.md").read_text().split("## One SAE")[0]
    cells = re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)  # the first of each row
    explained = set(re.findall(r"`(\w+)`", " ".join(cells)))
    info = json.loads((toy_run / "final_info.json").read_text())
    for metric in {metric for entry in info.values() for metric in entry["means"]}:
        probe = re.sub(r"^(sae|untrained|llm)_top_\d+_", "sae_top_5_", metric)
        plain = re.sub(r"^(sae|untrained|llm|normalized)_|_reference$", "", metric)
        assert {probe, plain} & explained, metric


def test_config_names_what_the_results_depend_on(toy, toy_run: Path) -> None:
    config = json.loads((toy_run / "config.json").read_text())
    assert config["profile"] == "tinylm" and config["settings"]["k_min"] == 4
    for file in ("experiment.py",):
        code = (toy_run / file).read_bytes()
        assert code == (ROOT / file).read_bytes()
        assert config["sha256"][file] == hashlib.sha256(code).hexdigest()
    assert config["versions"]["torch"] == torch.__version__
    assert {"threads", "dtype", "hardware", "deterministic", "model"} <= set(config)


def test_train_log_has_a_line_per_step_layer_and_seed(toy, toy_run: Path) -> None:
    settings = settings_of(toy, "run_1")
    log = lines_of(toy_run / "train_log.jsonl")
    steps = sorted({record["step"] for record in log})
    assert steps == [0, 4, 8, 12, 16, 20, 24, 28, 31]
    assert len(log) == 2 * len(steps)
    for record in log:
        assert record["tokens"] == record["step"] * settings.batch
        assert record["k_t"] == toy.k_at(settings, record["step"] / 32)
        assert record["l0"] <= record["k_t"]
        assert record["w"] == pytest.approx(record["gamma"] * record["tau_pen"])
        assert record["loss"] == pytest.approx(
            sum(record[f"loss_{part}"] for part in ("reconstruction", "penalty", "reg")), rel=1e-5
        )
        assert record["tau_sel"] == pytest.approx(
            0.1 + 0.4 / (1 + math.exp(-record["theta_1"])), rel=1e-5
        )
    last = [record for record in log if record["layer"] == 2][-1]
    info = json.loads((toy_run / "final_info.json").read_text())
    assert info["layer_2"]["means"]["tau_sel"] == last["tau_sel"]


def test_output_ends_with_the_block_of_figures(toy, tmp_path: Path, capfd) -> None:
    assert run_command(toy, tmp_path / "run_try") == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    before, block = captured.out.split("---\n")
    assert before.startswith("profile: tinylm on cpu\nrun_try: not in PLAN, defaults\n")
    values = dict(line.split(": ", 1) for line in block.strip().splitlines())
    assert {"run", "profile", "layer_0_fvu", "layer_2_l0", "seconds_total", "peak_memory_gb",
            PRIMARY, "verdict"} <= set(values)  # fmt: skip
    assert block.strip().splitlines()[-1].startswith("verdict: not comparable (no complete")
    config = json.loads((tmp_path / "run_try" / "config.json").read_text())
    name, commit, primary, l0, word, description = values["results.tsv"].split("\t")
    assert (name, word, description) == ("run_try", "not comparable", "defaults")
    assert commit.rstrip("+") == (config["git"]["commit"] or "-")[:7]
    l0s = [float(values[f"layer_{layer}_l0"]) for layer in (0, 2)]
    assert primary == values[PRIMARY] and float(l0) == pytest.approx(sum(l0s) / 2, abs=0.06)


def test_the_line_for_a_table_of_results_is_one_line() -> None:
    """Whatever a description holds; a commit that is not what ran has a mark."""
    settings = {"description": "two\tcolumns\nand lines"}
    means = {PRIMARY: 0.70874, "l0": 15.31}
    for git, shown in (
        ({"commit": "0123456789", "dirty": False}, "0123456"),
        ({"commit": "0123456789", "dirty": True}, "0123456+"),
        ({"commit": None, "dirty": True}, "-"),
    ):
        config = {"git": git, "settings": settings}
        line = results_line("run_2", config, means, "no difference (-0.01 [-0.05, +0.02])")
        assert line == (
            f"results.tsv: run_2\t{shown}\t0.7087\t15.3\tno difference\ttwo columns and lines"
        )


def test_the_language_model_s_probes_are_held_against_the_given_baseline() -> None:
    import experiment

    settings = settings_of(experiment, "run_1", "gemma-2-2b")
    settings = dataclasses.replace(settings, layers=(5, 12))
    given = json.loads((ROOT / "run_0" / "final_info.json").read_text())["layer_5"]["means"]
    ours = {metric: [value + 0.008] for metric, value in given.items()}
    ours["llm_top_1_test_accuracy"][0] = 0.6843 + 0.015
    layers = {"layer_5": ours, "layer_12": ours}
    line, warnings = against_given_baseline(settings, layers)
    assert "+0.0150 (layer_5 llm_top_1_test_accuracy)" in line and warnings == []
    ours["llm_test_accuracy"][0] = 0.9393 - 0.012
    _, (warning,) = against_given_baseline(settings, layers)
    assert "llm_test_accuracy is 0.9273, but 0.9393" in warning
    for other in (dict(layers=(12,)), dict(probe_train=1000), dict(model="tinylm")):
        changed = dataclasses.replace(settings, **other)
        found = {f"layer_{layer}": ours for layer in changed.layers}
        assert against_given_baseline(changed, found) == ("", [])


def test_an_untrained_sae_is_no_result(toy, tmp_path, own_cache, monkeypatch, capsys) -> None:
    """How the given baseline came about: found in the rehearsal."""
    monkeypatch.setattr(toy.Trainer, "resample", lambda *_: None)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: None)
    assert run_command(toy, tmp_path / "run_1") == 1
    said = words(capsys.readouterr().err)
    assert said["during"].startswith("rehearsal: ")
    assert "no training step was done" in said["cause"]


def test_silent_sae_and_results_of_another_layer(
    toy, toy_lm, tmp_path, own_cache, monkeypatch, capsys
) -> None:
    encode = toy.CustomSAE.encode
    monkeypatch.setattr(toy.CustomSAE, "encode", lambda sae, x: 0 * encode(sae, x))
    assert run_command(toy, tmp_path / "run_1") == 1
    said = words(capsys.readouterr().err)
    assert "core evaluation of layer_0_seed_0: " in said["cause"]
    monkeypatch.setattr(toy.CustomSAE, "encode", encode)

    new = toy.new_sae

    def at_layer_0(*arguments):
        sae = new(*arguments)
        sae.cfg.hook_layer, sae.cfg.hook_name = 0, "blocks.0.hook_resid_post"
        return sae

    monkeypatch.setattr(toy, "new_sae", at_layer_0)
    assert run_command(toy, tmp_path / "run_1") == 1
    said = words(capsys.readouterr().err)
    assert "layer_2_seed_0: expected {'layer': 2," in said["cause"]
    assert "must not be recorded as another's" in said["cause"]
    monkeypatch.setattr(toy, "new_sae", new)

    save = save_core
    replace(monkeypatch, "save_core", lambda name, *rest: name == "layer_2_seed_0"
                        or save(name, *rest))  # fmt: skip
    assert run_command(toy, tmp_path / "run_1") == 1
    cause = words(capsys.readouterr().err)["cause"]
    assert "core evaluation of layer_2_seed_0 left no result" in cause


def test_garbage_from_an_edited_evaluation_is_not_recorded(
    toy, tmp_path, own_cache, monkeypatch, capsys
) -> None:
    """Nor is a run complete that wrote no final_info.json."""
    score = toy.sparse_probing

    def garbage(*arguments):
        found = score(*arguments)
        for metrics in found.values() if not STAGE.prefix else ():
            metrics["sae_top_5_test_accuracy"] = -1.0
        return found

    monkeypatch.setattr(toy, "sparse_probing", garbage)
    assert run_command(toy, tmp_path / "run_1") == 1
    cause = words(capsys.readouterr().err)["cause"]
    assert cause.startswith("layer_0: sae_top_5_test_accuracy is -1.0, which can't be right")
    assert not (tmp_path / "run_1" / "final_info.json").exists()
    monkeypatch.setattr(toy, "write_records", lambda *_: None)
    assert run_command(toy, tmp_path / "run_1") == 1
    said = words(capsys.readouterr().err)
    assert "the run ended, but there is no run_1/final_info.json" in said["cause"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({(2, 1): {"l0": 1.0}}, "fvu must be a number for every seed, but is 'None' for layer 2"),
        ({(0, 0): {"l0": 1.0, "fvu": "low"}}, "but is 'low' for layer 0, seed 0: record it for"),
        ({(0, 0): {"l0": 1.0, "fvu": torch.ones(2)}}, r"but is 'tensor\(\[1., 1.\]\)' for"),
        ({(7, 0): {"l0": 1.0, "fvu": 1.0}}, "must be given figures of these layers and seeds"),
        ({(2, 1): None}, "must be given figures of these layers and seeds"),
    ],
)
def test_a_figure_is_there_for_every_seed_or_for_none(toy, changes: dict, says: str) -> None:
    settings = dataclasses.replace(settings_of(toy, "run_1"), seeds=(1, 0))
    figures = {(at, seed): {"l0": at + seed, "fvu": 0.5} for seed in (0, 1) for at in (2, 0)}
    layers = by_layer(figures, settings)
    assert list(layers) == ["layer_0", "layer_2"] and layers["layer_2"]["l0"] == [3, 2]
    figures = {key: row for key, row in (figures | changes).items() if row is not None}
    with pytest.raises(ExperimentError, match=says):
        by_layer(figures, settings)


@pytest.mark.parametrize("edit", ["nan", "return"])
def test_weights_that_are_no_numbers_and_an_early_return_are_told_as_what_they_are(
    toy, tmp_path, own_cache, monkeypatch, capsys, edit: str
) -> None:
    export, begin = toy.export_saes, toy.main

    def with_nan(run, saes):
        saes[0, 0].W_dec.data[3, 4] = float("nan")
        export(run, saes)

    if edit == "nan":
        monkeypatch.setattr(toy, "export_saes", with_nan)
        says = "1 of the 2048 values of W_dec are not finite after training: look at what writes it"
    else:  # not in the rehearsal
        monkeypatch.setattr(toy, "main", lambda run: begin(run) if STAGE.prefix else None)
        says = "the run ended, but there is no run_1/final_info.json: look for a return before"
    assert run_command(toy, tmp_path / "run_1") == 1
    assert says in words(capsys.readouterr().err)["cause"]


def test_a_packed_run_has_what_is_committed(toy_run: Path, tmp_path: Path) -> None:
    """SAE-Bench's files, core's of the first seed's trained SAEs alone, θ and the log."""
    packed = []
    for name in ("run_1", "run_2"):
        run = Path(shutil.copytree(toy_run, tmp_path / name))
        for file in run.glob("eval_results/core/*_seed_0_*.json"):  # a second seed
            shutil.copy(file, file.with_name(file.name.replace("seed_0", "seed_10")))
        pack(str(run))
        packed.append((run / "eval_results.tar.xz").read_bytes())
    assert packed[0] == packed[1]
    log = (run / "train_log.jsonl").read_bytes()
    assert lzma.decompress((run / "train_log.jsonl.xz").read_bytes()) == log
    with tarfile.open(run / "eval_results.tar.xz") as archive:
        names = archive.getnames()
    layers = json.loads((run / "config.json").read_text())["settings"]["layers"]
    core = [name for name in names if "/core/" in name]
    assert sorted(core) == [
        f"eval_results/core/layer_{layer}_seed_0_custom_sae_eval_results.json"
        for layer in sorted(layers)
    ]
    assert {f"sae/layer_{layer}/seed_0/theta.json" for layer in layers} <= {*names}
    probing = [name for name in names if "/sparse_probing/" in name]
    assert len(probing) == 2 * len(layers)  # of the untrained ones, too


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_core_scalars_that_cannot_be(value: float) -> None:
    with pytest.raises(ExperimentError, match="mse is .*, which can't be right"):
        check_core("layer_2", {"l0": 4.0, "mse": value})
    with pytest.raises(ExperimentError, match="L0 is 0, no feature is active"):
        check_core("layer_2", {"l0": 0.0, "mse": 1.0})


def test_a_commit_s_files_are_its_own_whatever_their_names_and_line_ends(
    tmp_path: Path, monkeypatch
) -> None:
    """A file name that isn't ASCII, and a checkout with CRLF, are no change."""
    replace(monkeypatch, "HERE", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y.z"]
    (tmp_path / "größe.py").write_text("X = 1\n")
    (tmp_path / "windows.py").write_bytes(b"X = 1\r\nY = 2\r\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    texts = {file: (tmp_path / file).read_text() for file in ("größe.py", "windows.py")}
    assert git_state(texts)["dirty"] is False
    assert git_state(texts | {"größe.py": "X = 2\n"})["dirty"] is True
    write_code({"a.py": "1", "/elsewhere/b.py": "2"}, tmp_path / "code.zip")
    assert zipfile.ZipFile(tmp_path / "code.zip").namelist() == ["elsewhere/b.py", "a.py"]
