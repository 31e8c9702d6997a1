"""The whole command on a toy model: what it trains, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import types
from pathlib import Path

import pytest
import torch

from harness.console import STAGE
from harness.errors import ExperimentError
from harness.language_model import load_language_model
from harness.settings import choose_profile
from harness.startup import Run
from harness.text import TokenStream, documents
from harness.training import steps_in_budget
from tests.conftest import ROOT, run_command, settings_of
from tests.test_command import run_expecting_failure, words


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_same_command_same_weights_and_a_complete_run_is_set_aside(
    toy, toy_run: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    out_dir = tmp_path / "run_1"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # trained, not kept
    assert run_command(toy, out_dir) == 0
    weights = "sae/layer_2/seed_0/sae_weights.safetensors"
    first = (toy_run / weights).read_bytes()
    assert (out_dir / weights).read_bytes() == first
    info = (out_dir / "final_info.json").read_bytes()
    capfd.readouterr()
    assert run_command(toy, out_dir) == 0
    assert "set aside as" in capfd.readouterr().out
    assert (tmp_path / "run_1.1" / "final_info.json").read_bytes() == info
    assert (out_dir / weights).read_bytes() == first


def test_seeds_share_text_and_differ_in_weights_and_order(toy, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(toy.PLAN, "run_1", {"seeds": (0, 1), "layers": (2,)})
    settings = settings_of(toy, "run_1")
    lm = load_language_model(settings.model)
    read = []

    class Counting(TokenStream):
        def contexts(self, n: int) -> torch.Tensor:
            read.append(n)
            return super().contexts(n)

    def trained(seeds: tuple[int, ...]):
        run = Run(dataclasses.replace(settings, seeds=seeds), lm, out_dir=tmp_path)
        with Counting(documents("toy", "train"), lm.tokenizer, settings.context) as stream:
            return toy.train(run, toy.ActivationBuffer(run, stream))

    both = trained((0, 1))
    n_read = sum(read)
    alone = trained((1,))
    assert sum(read) == 2 * n_read  # two seeds cost no more text than one
    assert torch.equal(both.saes[2, 1].W_dec, alone.saes[2, 1].W_dec)
    assert not torch.allclose(both.saes[2, 0].W_dec, both.saes[2, 1].W_dec)
    log = lines_of(tmp_path / "train_log.jsonl")
    assert {record["seed"] for record in log} == {1}


def test_activations_are_scaled_to_d(toy, tmp_path: Path) -> None:
    """E‖s x‖² = D on the first tokens, and b_dec starts at their scaled mean."""
    settings = settings_of(toy, "run_1")
    run = Run(settings, load_language_model(settings.model), out_dir=tmp_path)
    tokenizer = run.language_model.tokenizer
    with TokenStream(documents("toy", "train"), tokenizer, settings.context) as stream:
        acts_LND = toy.ActivationBuffer(run, stream).next_tokens(settings.buffer_tokens)
    with TokenStream(documents("toy", "train"), tokenizer, settings.context) as stream:
        result = toy.train(run, toy.ActivationBuffer(run, stream))
    for layer, acts_ND in zip(settings.layers, acts_LND):
        scale = result.saes[layer, 0].norm_scaling_factor
        assert float((scale * acts_ND).pow(2).sum(1).mean()) == pytest.approx(32, rel=1e-4)
        assert torch.allclose(result.stats[layer][0], acts_ND.mean(0), atol=1e-4)


@pytest.mark.parametrize("name", ["run_2", "run_5", "run_6", "run_7", "run_9", "run_10", "relu"])
def test_planned_runs_train_as_the_plan_says(
    toy, toy_run: Path, tmp_path: Path, name: str
) -> None:
    """Constants stay constant in the log; without curriculum there is no k_t."""
    settings = settings_of(toy, name)
    if name == "relu":  # γ is no constant, and no gradient moves it
        settings = dataclasses.replace(settings, activation="relu")
    lm = load_language_model(settings.model)
    run = Run(settings, lm, out_dir=tmp_path, runs=toy_run.parent)
    with TokenStream(documents("toy", "train"), lm.tokenizer, settings.context) as stream:
        result = toy.train(run, toy.ActivationBuffer(run, stream))
    log = [record for record in lines_of(tmp_path / "train_log.jsonl") if record["layer"] == 2]
    info = json.loads((toy_run / "final_info.json").read_text())["layer_2"]["means"]
    expected = {
        "run_2": {"tau_sel": 0.3, "tau_pen": 0.1},
        "run_5": {},
        "run_6": {"tau_sel": 0.3, "tau_pen": 0.1, "gamma": 0.15},
        "run_7": {},
        "run_9": {metric: info[metric] for metric in ("tau_sel", "tau_pen", "gamma")},
        "run_10": {"tau_sel": 0.3, "tau_pen": 0.15, "gamma": 0.0},
        "relu": {},
    }[name]
    for metric, theta in (("tau_sel", "theta_1"), ("tau_pen", "theta_2"), ("gamma", "theta_3")):
        values = {record[metric] for record in log}
        if metric in expected:
            assert len(values) == 1
            assert values.pop() == pytest.approx(expected[metric])
            assert {record[theta] for record in log} == {None}
        else:
            assert len(values) == len(log)
    no_curriculum = name in ("run_5", "run_6", "run_7")
    assert {record["k_t"] is None for record in log} == {no_curriculum}
    by_threshold = result.saes[2, 0].threshold is not None
    assert by_threshold == (name == "run_10")
    assert (result.saes[2, 0].k is None) == (no_curriculum or by_threshold or name == "relu")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"k_min": 65}, "k_min must be at most d_sae = 64, but is 65"),
        ({"k_min": 0}, "k_min must be greater than 0, but is 0"),
        ({"k_min": "16"}, "k_min must be a whole number, but is '16'"),
        ({"training_tokens": -5}, "training_tokens must be greater than 0, but is -5"),
        ({"training_tokens": 100}, "training_tokens must be at least batch = 128, but is 100"),
        ({"layers": (0, 4)}, "layers must be below 4, the number of blocks"),
        ({"layers": ()}, "layers must be one or more, all different, but is \\(\\)"),
        ({"seeds": (1, 1)}, "seeds must be one or more, all different"),
        ({"tau_sel": -0.3}, "tau_sel must be None or greater than 0"),
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"loss_variant": "other"}, "loss_variant must be 'contrastive' or 'as_written'"),
        ({"gamma": -0.1}, "gamma must be None or greater than or equal to 0"),
        ({"activation": "batch"}, "activation must be 'topk', 'jumprelu' or 'relu'"),
        (
            {"activation": "jumprelu", "curriculum": False},
            "activation must be 'topk' where nothing is selected",
        ),
        ({"kmin": 3}, "run_3: PLAN or PROFILES sets what Settings has no field for .*'kmin'"),
        ({"device": "cuda"}, "needs a CUDA GPU, and none is available"),
        (
            {"constants_from_run": "run_77"},
            "needs the final values in .*run 'run_77' first|run run_77 first",
        ),
        ({"model": "no/such-model"}, "the language model 'no/such-model' can't be loaded"),
        ({"probe_sets": ()}, "probe_sets must be one or more data sets"),
        ({"probe_ks": (1, 2, 5, 100)}, "probe_ks must be at most d_sae = 64, with 1, 2 and 5"),
        ({"context": 2}, "context must be greater than or equal to 3, but is 2"),
        ({"training_tokens": 4096.0}, "training_tokens must be a whole number, but is 4096.0"),
        ({"layers": (0, -1)}, r"layers must be greater than or equal to 0, but is -1 \(of \(0, "),
        ({"curriculum": 1}, "curriculum must be True or False, but is 1"),
    ],
)
def test_impossible_settings_are_one_sentence(
    toy, tmp_path: Path, monkeypatch, capfd, changes, says
) -> None:
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setitem(toy.PLAN, "run_3", changes)
    assert re.search(says, run_expecting_failure(toy, capfd, tmp_path / "run_3"))
    assert not (tmp_path / "run_3").exists()


def test_a_profile_may_have_a_run_of_the_plan_otherwise() -> None:
    """What the profile sets is for all runs; under a run's name, for that one, above the plan."""
    import experiment

    profiles = {"small": {"lr": 1e-4, "k_min": 8, "run_3": {"k_min": 4, "batch": 64}}}
    plan = {"run_2": {"k_min": 2}, "run_3": {"k_min": 2, "batch": 32, "seeds": (1,)}}
    made = types.SimpleNamespace(Settings=experiment.Settings, PROFILES=profiles, PLAN=plan)
    of = functools.partial(settings_of, made, profile="small")
    assert {s.lr for s in map(of, ("run_try", "run_2", "run_3"))} == {1e-4}
    assert [of(name).k_min for name in ("run_try", "run_2", "run_3")] == [8, 2, 4]
    assert (of("run_3").batch, of("run_3").seeds, of("run_2").batch) == (64, (1,), 512)


@pytest.mark.parametrize("damage", ["missing", "flipped byte", "package"])
def test_missing_or_damaged_tinylm_files(
    toy, tmp_path: Path, monkeypatch, capfd, damage: str
) -> None:
    from tinylm import corpus

    monkeypatch.setitem(toy.PLAN, "run_3", {"model": "tinylm"})
    shutil.copytree(ROOT / "tinylm", tmp_path / "tinylm")
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    for constant in ("HERE", "MANIFEST", "SUMS"):
        moved = tmp_path / "tinylm" / getattr(corpus, constant).relative_to(ROOT / "tinylm")
        monkeypatch.setattr(corpus, constant, moved)
    weights = tmp_path / "tinylm" / "model.safetensors"
    if damage == "missing":
        weights.unlink()
        expected = "model.safetensors, found nothing: bring it back with `git checkout -- tinylm`"
    elif damage == "flipped byte":
        content = bytearray(weights.read_bytes())
        content[1_000_000] ^= 1
        weights.write_bytes(content)
        expected = "model.safetensors as in SHA256SUMS, found other contents"
    else:
        stock = corpus._root
        monkeypatch.setattr(corpus, "_root", lambda p: None if p == "sympy" else stock(p))
        expected = "sympy==1.14.0"
    assert expected in run_expecting_failure(toy, capfd, tmp_path / "run_3")
    assert not (tmp_path / "run_3").exists()


def test_unknown_profile_and_gemma_without_gpu(toy, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("SAE_PROFILE", "gpt2")
    says = run_expecting_failure(toy, capfd, tmp_path / "run_1")
    assert "SAE_PROFILE must be tinylm or smollm2 or gemma-2-2b, but is 'gpt2'" in says
    if not torch.cuda.is_available():
        monkeypatch.setenv("SAE_PROFILE", "gemma-2-2b")
        says = run_expecting_failure(toy, capfd, tmp_path / "run_1")
        assert "SAE_PROFILE=tinylm make run OUT=run_try" in says


def test_a_run_in_a_profiles_folder_is_of_that_profile(tmp_path: Path, monkeypatch) -> None:
    chosen = functools.partial(choose_profile, ("tinylm", "smollm2"), home=tmp_path)
    monkeypatch.delenv("SAE_PROFILE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen(tmp_path / "smollm2") == "smollm2"
    assert chosen(tmp_path) == "tinylm"
    assert chosen(tmp_path / "elsewhere" / "smollm2") == "tinylm"
    monkeypatch.setenv("SAE_PROFILE", "smollm2")
    assert chosen(tmp_path) == "smollm2"
    with pytest.raises(ExperimentError, match="in tinylm/ is of that profile.*is 'smollm2'"):
        chosen(tmp_path / "tinylm")


def test_probing_data_that_does_not_fit_stops_the_run_before_training(
    toy, tmp_path: Path, monkeypatch, capsys
) -> None:
    from sae_bench.sae_bench_utils import dataset_utils

    monkeypatch.setattr(toy, "train", lambda *_: pytest.fail("training began"))
    for error, said in (
        (KeyError("hard_text"), "has no 'hard_text', which SAE-Bench reads"),
        (ValueError("Cannot take a larger sample"), "too few rows for probe_train = 40"),
    ):
        def load(*_, raised=error):
            raise raised

        monkeypatch.setattr(dataset_utils, "get_multi_label_train_test_data", load)
        assert run_command(toy, tmp_path / "run_1") == 1
        cause = words(capsys.readouterr().err)["cause"]
        assert said in cause and "'toy/modules'" in cause


def test_a_budget_shortens_training_once_and_the_schedules_still_end(
    toy, tmp_path: Path, monkeypatch, capsys
) -> None:
    run_1 = {**toy.PLAN["run_1"], "budget_minutes": 1e-6}
    monkeypatch.setitem(toy.PLAN, "run_1", run_1)
    out_dir = tmp_path / "run_1"
    assert run_command(toy, out_dir) == 0
    out = capsys.readouterr().out
    assert out.count("training is shortened to 50% of training_tokens") == 2  # then, and at the end
    info = json.loads((out_dir / "final_info.json").read_text())
    assert info["layer_0"]["means"]["training_tokens"] == 2048
    last = lines_of(out_dir / "train_log.jsonl")[-1]
    assert last["k_t"] == 4 and last["lr"] < 0.5 * settings_of(toy, "run_1").lr
    assert "shortened to 50%" in json.loads((out_dir / "warnings.json").read_text())[0]


def test_the_steps_that_fit_a_budget() -> None:
    hour = 3600.0
    # 5% took 6 minutes: 120 for all, and 20 of evaluation.
    assert steps_in_budget(1000, 50, 360.0, 1200.0, 2.5 * hour) == (1000, None)
    steps, reason = steps_in_budget(1000, 50, 360.0, 1200.0, 110 * 60.0)
    assert steps == 750 and "shortened to 75%" in reason and "120 minutes" in reason
    assert steps_in_budget(1000, 50, 360.0, 2 * hour, hour)[0] == 100  # twice what is done


def test_a_loss_that_is_not_finite_stops_the_run(
    toy, tmp_path: Path, own_cache: Path, monkeypatch, capsys
) -> None:
    """With step, layer, the last finite values, and the batch that did it."""
    loss, calls = toy.contrastive_loss, []

    def breaks(sae, x_BD, *rest):
        found = loss(sae, x_BD, *rest)
        if sae.cfg.hook_layer == 2 and not STAGE.prefix:
            calls.append(x_BD)
            if len(calls) == 14:  # the first step asks for it three times: see `sparse_ops`
                found.total = found.total * torch.nan
        return found

    monkeypatch.setattr(toy, "contrastive_loss", breaks)
    assert run_command(toy, tmp_path / "run_1") == 1
    said = words(capsys.readouterr().err)
    assert said["during"] == "train (layer 2, seed 0)"
    assert "the loss is nan at step 11 (1408 tokens)" in said["cause"]
    before = r"the loss of the step before: \d\.\d+; the last record: step 8, loss \d"
    assert re.search(before, said["cause"])
    path = re.search(r"its batch is in (\S+)", said["cause"])[1]
    from safetensors.torch import load_file

    settings = settings_of(toy, "run_1")
    (x_BD,) = load_file(path).values()
    assert x_BD.shape == (settings.batch, 32)
    scale = calls[13].norm() / x_BD.float().norm()
    assert torch.allclose(x_BD.float() * scale, calls[13], rtol=1e-3)
    assert not (tmp_path / "run_1" / "final_info.json").exists()
