"""The whole command on a toy model: what it leaves, what it prints, and how it fails."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from harness.command import LAST_WORDS, main
from harness.console import Progress, redirect_output
from harness.language_model import load_language_model
from harness.machine import choose_train_dtype, in_threads
from harness.records import against_given_baseline, read_reference
from harness.store import write_json
from harness.text import TokenStream, documents
from harness.training import fit_budget
from harness.verdict import PRIMARY, verdict
from tests.conftest import ROOT, replace

SCALARS = {
    "l0", "mse", "cossim", "ce_loss_score", "kl_div_score", "frac_alive", "explained_variance",
    "fvu", "tau_sel", "tau_pen", "gamma", "w", "loss", "loss_reconstruction", "loss_penalty",
    "loss_reg", "training_tokens", "n_seeds", "seconds_total", "llm_test_accuracy", "dead_fraction",
    *(f"{who}_top_{k}_test_accuracy" for k in (1, 2, 5, 10, 20, 50)
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
    settings = toy.settings_of("run_1", "tinylm")
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


def test_same_command_same_weights_and_a_complete_run_is_set_aside(
    toy, toy_run: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    out_dir = tmp_path / "run_1"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # trained, not kept
    assert main(toy.run, [f"--out_dir={out_dir}"]) == 0
    weights = "sae/layer_2/seed_0/sae_weights.safetensors"
    first = (toy_run / weights).read_bytes()
    assert (out_dir / weights).read_bytes() == first
    info = (out_dir / "final_info.json").read_bytes()
    capfd.readouterr()
    assert main(toy.run, [f"--out_dir={out_dir}"]) == 0
    assert "set aside as" in capfd.readouterr().out
    assert (tmp_path / "run_1.1" / "final_info.json").read_bytes() == info
    assert (out_dir / weights).read_bytes() == first


def test_seeds_share_text_and_differ_in_weights_and_order(toy, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(toy.PLAN, "run_1", {"seeds": (0, 1), "layers": (2,)})
    settings = toy.settings_of("run_1", "tinylm")
    lm = load_language_model(settings.model)
    read = []

    class Counting(TokenStream):
        def contexts(self, n: int) -> torch.Tensor:
            read.append(n)
            return super().contexts(n)

    def trained(seeds: tuple[int, ...]):
        import dataclasses

        s = dataclasses.replace(settings, seeds=seeds)
        stream = Counting(documents("toy", "train"), lm.tokenizer, s.context)
        buffer = toy.ActivationBuffer(lm, stream, s.layers, s.harvest_contexts)
        fixed = {(2, seed): {} for seed in seeds}
        return toy.train(s, buffer, fixed, tmp_path / "log.jsonl")

    both = trained((0, 1))
    n_read = sum(read)
    alone = trained((1,))
    assert sum(read) == 2 * n_read  # two seeds cost no more text than one
    assert torch.equal(both.saes[2, 1].W_dec, alone.saes[2, 1].W_dec)
    assert not torch.allclose(both.saes[2, 0].W_dec, both.saes[2, 1].W_dec)
    log = lines_of(tmp_path / "log.jsonl")
    assert {record["seed"] for record in log} == {1}


def test_activations_are_scaled_to_d(toy) -> None:
    """E‖s x‖² = D on the first tokens, and b_dec starts at their scaled mean."""
    settings = toy.settings_of("run_1", "tinylm")
    lm = load_language_model(settings.model)

    def buffer():
        stream = TokenStream(
            documents("toy", "train"), lm.tokenizer, settings.context
        )
        return toy.ActivationBuffer(lm, stream, settings.layers, settings.harvest_contexts)

    acts_LND = buffer().take(settings.buffer_tokens)
    fixed = {(layer, 0): {} for layer in settings.layers}
    result = toy.train(settings, buffer(), fixed, Path(os.devnull))
    for layer, acts_ND in zip(settings.layers, acts_LND):
        scale = result.saes[layer, 0].norm_scaling_factor
        assert float((scale * acts_ND).pow(2).sum(1).mean()) == pytest.approx(32, rel=1e-4)
        assert torch.allclose(result.mean[layer], acts_ND.mean(0), atol=1e-4)


@pytest.mark.parametrize("name", ["run_2", "run_5", "run_6", "run_7", "run_9", "run_10"])
def test_planned_runs_train_as_the_plan_says(toy, toy_run: Path, name: str) -> None:
    """Constants stay constant in the log; without curriculum there is no k_t."""
    settings = toy.settings_of(name, "tinylm")
    lm = load_language_model(settings.model)
    stream = TokenStream(documents("toy", "train"), lm.tokenizer, settings.context)
    buffer = toy.ActivationBuffer(lm, stream, settings.layers, settings.harvest_contexts)
    fixed = toy.constants(settings, toy_run.parent / name)
    log_path = toy_run.parent / f"{name}.jsonl"
    result = toy.train(settings, buffer, fixed, log_path)
    log = [record for record in lines_of(log_path) if record["layer"] == 2]
    info = json.loads((toy_run / "final_info.json").read_text())["layer_2"]["means"]
    expected = {
        "run_2": {"tau_sel": 0.3, "tau_pen": 0.1},
        "run_5": {},
        "run_6": {"tau_sel": 0.3, "tau_pen": 0.1, "gamma": 0.15},
        "run_7": {},
        "run_9": {metric: info[metric] for metric in ("tau_sel", "tau_pen", "gamma")},
        "run_10": {"tau_sel": 0.3, "tau_pen": 0.15, "gamma": 0.0},
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
    assert (result.saes[2, 0].k is None) == (no_curriculum or by_threshold)


# ------------------------------------------------------------------------------- the last words


def run_expecting_failure(toy, capfd, out_dir: Path, *arguments: str) -> str:
    """The cause that a run names which must fail."""
    status = main(toy.run, [f"--out_dir={out_dir}", *arguments])
    assert status == 1
    return words(capfd.readouterr().err)["cause"]


def words(error: str) -> dict[str, str]:
    """The last words on standard error: failed during, at, cause, to do and log."""
    assert "Traceback" not in error and len(error) <= LAST_WORDS
    first, *lines = error.strip().splitlines()
    assert first.startswith("experiment.py failed during "), error
    return {"during": first.removeprefix("experiment.py failed during ")} | dict(
        line.split(": ", 1) for line in lines
    )


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"k_min": 65}, "k_min must be at most d_sae = 64, but is 65"),
        ({"k_min": 0}, "k_min must be a count above 0, but is 0"),
        ({"k_min": "16"}, "k_min must be a count above 0, but is '16'"),
        ({"training_tokens": -5}, "training_tokens must be a count above 0, but is -5"),
        ({"training_tokens": 100}, "training_tokens must be at least one batch of 128"),
        ({"layers": (0, 4)}, "layers must be below 4, the number of blocks"),
        ({"layers": ()}, "layers must be different, 0 or above"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"tau_sel": -0.3}, "tau_sel must be None or above 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"loss_variant": "other"}, "loss_variant must be 'contrastive' or 'as_written'"),
        ({"gamma": -0.1}, "gamma must be None, or 0 or above"),
        ({"activation": "batch"}, "activation must be 'topk' or 'jumprelu'"),
        (
            {"activation": "jumprelu", "curriculum": False},
            "activation must be 'topk' where nothing is selected",
        ),
        ({"kmin": 3}, "PLAN.'run_3'. sets what Settings has no field for .*'kmin'"),
        ({"device": "cuda"}, "needs a CUDA GPU, and none is available"),
        ({"constants_from_run": "run_77"}, "needs the final values in .*run 'run_77' first|run run_77 first"),
        ({"model": "no/such-model"}, "the language model 'no/such-model' can't be loaded"),
        ({"probe_sets": ("tinylm/C",)}, "probe_sets must be one or more data sets; of tinylm"),
        ({"probe_ks": (1, 2, 5, 100)}, "probe_ks must be between 1 and d_sae"),
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
    assert "SAE_PROFILE must be tinylm or gemma-2-2b, but is 'gpt2'" in says
    if not torch.cuda.is_available():
        monkeypatch.setenv("SAE_PROFILE", "gemma-2-2b")
        says = run_expecting_failure(toy, capfd, tmp_path / "run_1")
        assert "SAE_PROFILE=tinylm make run OUT=run_try" in says


def test_unknown_argument_and_missing_out_dir(toy, tmp_path: Path, capfd) -> None:
    says = run_expecting_failure(toy, capfd, tmp_path / "run_1", "--lr=1")
    assert "--lr=1" in says and "no other argument" in says
    assert main(toy.run, []) == 1
    assert "--out_dir" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_in_a_finalizer_ends_the_run(
    tmp_path: Path, monkeypatch, capfd, number: signal.Signals
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Dying:
        def __del__(self) -> None:  # what is raised in here, Python prints and forgets
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    def run(out_dir: Path, log: Path) -> None:
        thing = Dying()
        del thing
        time.sleep(20)

    began = time.monotonic()
    assert main(run, [f"--out_dir={tmp_path / 'run_x'}"]) == 128 + number
    assert time.monotonic() - began < 10
    assert f"({number.name})" in capfd.readouterr().err


def test_out_dir_that_cannot_be_written(toy, tmp_path: Path, capfd) -> None:
    (tmp_path / "file").write_text("mine")
    says = run_expecting_failure(toy, capfd, tmp_path / "file" / "run_1")
    assert "must be a folder that can be written" in says
    says = run_expecting_failure(toy, capfd, tmp_path / "file")
    assert "must be a folder that can be written" in says
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failure_loses_nothing_that_existed(toy, tmp_path: Path, monkeypatch, capfd) -> None:
    out_dir = tmp_path / "run_3"
    out_dir.mkdir()
    (out_dir / "final_info.json").write_text("{}")
    monkeypatch.setitem(toy.PLAN, "run_3", {"k_min": -1})
    run_expecting_failure(toy, capfd, out_dir)
    assert (out_dir / "final_info.json").read_text() == "{}"


def test_an_unexpected_error_names_itself_and_its_log(toy, tmp_path: Path, monkeypatch, capfd):
    def breaks(*_: object) -> None:
        raise RuntimeError("the edit was wrong")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(toy, "train", breaks)
    assert main(toy.run, [f"--out_dir={tmp_path / 'run_1'}"]) == 1
    said = words(capfd.readouterr().err)
    assert said["during"] == "rehearsal: train"
    assert re.match(r"experiment.py, line \d+, in train_score_record: .* in breaks$", said["at"])
    assert said["cause"] == "RuntimeError: the edit was wrong"
    assert said["to do"].startswith("mend it, and give the same command again")
    assert "in breaks" in Path(said["log"]).read_text()
    assert not (tmp_path / "run_1").exists()


def test_the_real_command_in_a_subprocess(tmp_path: Path) -> None:
    """As a driver runs it: standard error in a pipe, its end read."""
    result = subprocess.run(
        [sys.executable, "experiment.py", "--out_dir", str(tmp_path / "run_1"), "extra"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 1 and result.stdout == ""
    assert words(result.stderr)["cause"] == (
        "unrecognized arguments: extra; "
        "the command is `python experiment.py --out_dir=run_i`, no other argument"
    )


# ------------------------------------------------------------------------------- the output


def test_output_ends_with_the_block_of_figures(toy, tmp_path: Path, capfd) -> None:
    assert main(toy.run, [f"--out_dir={tmp_path / 'run_try'}"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    before, block = captured.out.split("---\n")
    assert before.startswith("profile: tinylm on cpu\nrun_try: not in PLAN, defaults\n")
    values = dict(line.split(": ", 1) for line in block.strip().splitlines())
    assert {"run", "profile", "layer_0_fvu", "layer_2_l0", "seconds_total", "peak_memory_gb",
            PRIMARY, "verdict"} <= set(values)  # fmt: skip
    assert block.strip().splitlines()[-1].startswith("verdict: not comparable (there is no")


def test_progress_in_a_pipe_is_plain_lines(capsys) -> None:
    progress = Progress("stage", 100, "tokens", every=0.0)
    progress.advance(50, "fvu 0.5")
    progress.close()
    out = capsys.readouterr().out
    assert re.fullmatch(r"stage:  50%, \d+ s left, fvu 0\.5\nstage: done in \d+ s, fvu 0\.5\n", out)


def test_threads_take_the_parts_of_a_key_in_order_with_a_share_of_the_cores() -> None:
    torch.set_num_threads(2)
    seen: dict[str, list] = {"a": [], "b": [], "c": []}

    def work(key: str, part: int) -> tuple[str, int]:
        seen[key].append((part, torch.get_num_threads()))
        return key, part

    results = list(in_threads(work, ["a", "b", "c"], [0, 1, 2, 3], torch.device("cpu")))
    assert all(result == (key, part) for key, part, result in results)
    assert sorted(results) == [(k, p, (k, p)) for k in "abc" for p in range(4)]
    assert all(calls == [(part, 1) for part in range(4)] for calls in seen.values())
    assert torch.get_num_threads() == 2

    def broken(key: str, part: int) -> None:
        if (key, part) == ("b", 1):
            raise RuntimeError("step failed")

    with pytest.raises(RuntimeError, match="step failed"):
        list(in_threads(broken, ["a", "b", "c"], [0, 1, 2, 3], torch.device("cpu")))
    assert torch.get_num_threads() == 2


def test_train_dtype_is_what_the_hardware_multiplies(toy, monkeypatch) -> None:
    settings = toy.settings_of("run_1", "tinylm")
    amx = {"avx512_bf16": True, "amx_bf16": True}
    for name, capabilities, expected in (
        ("AMD EPYC", {"avx512_bf16": True}, "bfloat16"),
        ("AMD EPYC", {}, "float32"),
        ("Intel(R) Xeon(R) Processor", {"avx512_bf16": True}, "float32"),
        ("Intel(R) Xeon(R) Processor", amx, "bfloat16"),
    ):
        replace(monkeypatch, "processor_name", lambda name=name: name)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert choose_train_dtype(settings, torch.device("cpu")) == expected
    forced = dataclasses.replace(settings, train_dtype="bfloat16")
    assert choose_train_dtype(forced, torch.device("cpu")) == "bfloat16"


def test_progress_is_shown_while_libraries_are_quiet(tmp_path: Path, capfd) -> None:
    log = tmp_path / "log"
    log.touch()
    with redirect_output(log):
        progress = Progress("stage", 10, "batches", every=0.0)
        print("noise")
        progress.advance(4, "halfway")
        progress.close()
    out = capfd.readouterr().out
    assert "stage:  40%" in out and "halfway" in out and "noise" not in out
    assert "noise" in log.read_text() and "stage" not in log.read_text()


def test_quiet_catches_python_and_c_output(tmp_path: Path, capfd) -> None:
    log = tmp_path / "log"
    with redirect_output(log):
        print("from python")
        os.write(2, b"from c\n")
        print("an error", file=sys.stderr)
    print("after")
    captured = capfd.readouterr()
    assert captured.out == "after\n" and captured.err == ""
    assert {"from python", "from c", "an error"} <= set(log.read_text().splitlines())


def test_records_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "final_info.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["final_info.json"]


# ------------------------------------------------------------------------------- the verdict


def of(primary: list[float], l0: float = 16.0, first_seed: int = 0) -> dict[str, list[float]]:
    seeds = [float(first_seed + i) for i in range(len(primary))]
    return {"seed": seeds, PRIMARY: primary, "l0": [l0] * len(primary)}


@pytest.mark.parametrize(
    "run, reference, word",
    [
        (of([0.80, 0.81, 0.82]), of([0.70, 0.71, 0.73]), "better"),
        (of([0.70, 0.71, 0.73]), of([0.80, 0.81, 0.82]), "worse"),
        (of([0.70, 0.75, 0.72]), of([0.71, 0.73, 0.72]), "no difference"),
        (of([0.80, 0.81]), of([0.70, 0.71]), "not comparable (2 seeds shared"),
        (of([0.80, 0.81, 0.82], 20.0), of([0.70, 0.71, 0.73]), "not comparable (+0.0967"),
        (of([0.80, 0.81, 0.82], 19.1), of([0.70, 0.71, 0.73]), "better"),
        (of([0.80, 0.81, 0.82], 16.0, 1), of([0.70, 0.71, 0.73]), "not comparable (2 seeds"),
        (of([0.80, 0.81, 0.82]), None, "not comparable (there is no complete run_1"),
    ],
)
def test_verdict(run, reference, word) -> None:
    sentence, numbers = verdict(run, reference, "run_1")
    assert sentence.startswith(word)
    assert all(math.isfinite(value) for value in numbers.values())
    assert numbers[PRIMARY] == pytest.approx(sum(run[PRIMARY]) / len(run[PRIMARY]))


def test_verdict_interval_worked_out_by_hand() -> None:
    """Differences 0.10, 0.10, 0.09: mean 0.0966667, sd 0.0057735, t(0.975, 2) = 4.3027."""
    _, numbers = verdict(of([0.80, 0.81, 0.82]), of([0.70, 0.71, 0.73]), "run_1")
    half = 4.302653 * 0.00577350 / math.sqrt(3)
    assert numbers["difference"] == pytest.approx(0.0966667, abs=1e-6)
    assert numbers["ci95_low"] == pytest.approx(0.0966667 - half, abs=1e-6)
    assert numbers["ci95_high"] == pytest.approx(0.0966667 + half, abs=1e-6)


def test_verdict_reads_only_runs_of_the_same_profile_and_task_set(toy, toy_run: Path) -> None:
    settings = toy.settings_of("run_2", "tinylm")
    found = read_reference(settings, toy_run.parent / "run_2", "tinylm")
    assert found["seed"] == [0.0] and len(found[PRIMARY]) == 1
    assert read_reference(settings, toy_run.parent / "run_2", "gemma-2-2b") is None
    assert read_reference(settings, toy_run, "tinylm") is None  # itself
    import dataclasses

    other = dataclasses.replace(settings, probe_sets=("toy/halves",))
    assert read_reference(other, toy_run.parent / "run_2", "tinylm") is None


@pytest.mark.parametrize(
    ("stage", "setting"),
    [("train", "harvest_contexts"), ("core evaluation", "core_prompts"), ("start-up", "d_sae")],
)
def test_out_of_memory_names_the_setting_to_lower(
    tmp_path: Path, monkeypatch, capsys, stage, setting
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(out_dir: Path, log: Path) -> None:
        Progress.stage(stage)
        torch.empty(2**50)

    assert main(run, [f"--out_dir={tmp_path / 'run_1'}"]) == 1
    said = words(capsys.readouterr().err)
    assert said["during"] == stage and "out of memory" in said["cause"]
    assert setting in said["to do"]


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
        assert main(toy.run, [f"--out_dir={tmp_path / 'run_1'}"]) == 1
        cause = words(capsys.readouterr().err)["cause"]
        assert said in cause and "'toy/modules'" in cause


def test_a_budget_shortens_training_once_and_the_schedules_still_end(
    toy, tmp_path: Path, monkeypatch, capsys
) -> None:
    run_1 = {**toy.PLAN["run_1"], "budget_minutes": 1e-6}
    monkeypatch.setitem(toy.PLAN, "run_1", run_1)
    out_dir = tmp_path / "run_1"
    assert main(toy.run, [f"--out_dir={out_dir}"]) == 0
    out = capsys.readouterr().out
    assert out.count("training is shortened to 50% of training_tokens") == 2  # then, and at the end
    info = json.loads((out_dir / "final_info.json").read_text())
    assert info["layer_0"]["means"]["training_tokens"] == 2048
    last = lines_of(out_dir / "train_log.jsonl")[-1]
    assert last["k_t"] == 4 and last["lr"] < 0.5 * toy.settings_of("run_1", "tinylm").lr
    assert "shortened to 50%" in json.loads((out_dir / "warnings.json").read_text())[0]


def test_the_steps_that_fit_a_budget() -> None:
    hour = 3600.0
    # 5% took 6 minutes: 120 for all, and 20 of evaluation.
    assert fit_budget(1000, 50, 360.0, 1200.0, 2.5 * hour) == (1000, None)
    steps, reason = fit_budget(1000, 50, 360.0, 1200.0, 110 * 60.0)
    assert steps == 750 and "shortened to 75%" in reason and "120 minutes" in reason
    assert fit_budget(1000, 50, 360.0, 2 * hour, hour)[0] == 100  # twice what is done


def test_the_language_model_s_probes_are_held_against_the_given_baseline() -> None:
    import experiment

    settings = experiment.settings_of("run_1", "gemma-2-2b")
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
