"""SAE-Bench's sparse probing against stock SAE-Bench, and what is kept of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

import experiment
from bench.common import run_on, settings_of
from harness.console import Progress
from harness.evaluation.probe_features import mean_activations, regrouped
from harness.evaluation.probe_texts import known_to_stock, read_probe_texts
from harness.evaluation.probing import all_dimensions, probing_config, sparse_probing
from harness.fingerprint import result_key
from harness.language_model import load_language_model
from harness.observation import OBSERVED
from harness.probe_sets import own_sets, probe_names
from harness.store import store_dir
from tests.conftest import ROOT, Calls, replace

CPU = torch.device("cpu")
SOURCE = (ROOT / "experiment.py").read_text()


def stock_probing(settings, sae, model, artifacts: Path) -> tuple[dict, dict]:
    """`run_eval_single_sae` twice: the first call also probes the language model."""
    from sae_bench.evals.sparse_probing import main as stock
    from sae_bench.sae_bench_utils import general_utils

    sae = general_utils.load_and_format_sae("", sae, "cpu")[1]
    config = probing_config(settings)
    load = torch.load
    torch.load = lambda path: load(path, weights_only=False)  # its own file, just written
    try:
        first, second = (
            stock.run_eval_single_sae(config, sae, model, "cpu", str(artifacts), True)[0]
            for _ in range(2)
        )
    finally:
        torch.load = load
    return first, second


def test_a_run_s_accuracies_are_stock_sae_bench_s_on_the_stored_sae(
    toy, toy_run: Path, tmp_path: Path
) -> None:
    """SAELens reads the SAE back; SAE-Bench, called directly, finds what the run reported."""
    settings = settings_of("run_1", "tinylm")
    model = load_language_model(settings.model).bridge()
    info = json.loads((toy_run / "final_info.json").read_text())
    for layer in settings.layers:
        sae = SAE.load_from_disk(toy_run / "sae" / f"layer_{layer}" / "seed_0")
        means = info[f"layer_{layer}"]["means"]
        first, second = stock_probing(settings, sae, model, tmp_path / f"artifacts_{layer}")
        detail = json.loads(
            next((toy_run / "eval_results" / "sparse_probing").glob(f"layer_{layer}_seed_0_c*"))
            .read_text()
        )["eval_result_details"]  # fmt: skip
        assert [entry.pop("dataset_name") for entry in detail] == [
            f"{name}_results" for name in probe_names(settings)
        ]
        for at, name in enumerate(probe_names(settings)):
            for metric, value in second[f"{name}_results"].items():
                if metric.startswith("sae_"):
                    assert detail[at][metric] == value, (name, metric)
        for metric, value in first[f"{probe_names(settings)[0]}_results"].items():
            if metric.startswith("llm_"):
                assert detail[0][metric] == value, metric
        for k in settings.probe_ks:
            metric = f"sae_top_{k}_test_accuracy"
            assert means[metric] == pytest.approx(second[metric], abs=1e-12)


def test_probing_s_files_have_sae_bench_s_own_form(toy, toy_run: Path) -> None:
    from pydantic import TypeAdapter
    from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput

    settings = settings_of("run_1", "tinylm")
    files = sorted((toy_run / "eval_results" / "sparse_probing").glob("*.json"))
    assert len(files) == 2 * len(settings.layers)  # each layer, and its untrained baseline
    for file in files:
        output = TypeAdapter(SparseProbingEvalOutput).validate_json(file.read_text())
        assert output.sae_cfg_dict["d_sae"] == settings.d_sae


def test_the_untrained_sae_is_probed_too(toy, toy_run: Path) -> None:
    settings = settings_of("run_1", "tinylm")
    info = json.loads((toy_run / "final_info.json").read_text())
    for layer in settings.layers:
        means = info[f"layer_{layer}"]["means"]
        for which in ("all", *(f"top_{k}" for k in settings.probe_ks)):
            assert 0 <= means[f"untrained_{which}_test_accuracy"] <= 1


def test_no_figure_of_more_dimensions_than_there_are(toy, toy_run: Path) -> None:
    """The toy's language model has 32 dimensions, and its SAEs have 64 features.

    SAE-Bench's own files stay as they are.
    """
    settings = settings_of("run_1", "tinylm")
    assert max(settings.probe_ks) == 50
    for layer in settings.layers:
        means = json.loads((toy_run / "final_info.json").read_text())[f"layer_{layer}"]["means"]
        assert "sae_top_50_test_accuracy" in means and "llm_top_20_test_accuracy" in means
        assert "llm_top_50_test_accuracy" not in means


def test_a_probe_of_all_dimensions_chooses_nothing_on_the_test_set() -> None:
    """On noise it tells nothing; SAE-Bench's, which keeps the best epoch, seems to."""
    import experiment

    def noise(seed: int) -> tuple[dict, dict]:
        draw = torch.Generator().manual_seed(seed)
        return tuple(
            {label: torch.randn(n, 40, generator=draw) for label in ("first", "second")}
            for n in (60, 25)
        )

    theirs, ours = [], []
    for seed in range(12):
        torch.manual_seed(seed)
        theirs += experiment.probe(noise(seed), "sae", ())["sae_test_accuracy"].values()
        ours += all_dimensions(noise(seed), seed).values()
    assert sum(theirs) / len(theirs) > 0.55
    assert sum(ours) / len(ours) == pytest.approx(0.5, abs=0.03)


def test_a_probe_of_all_dimensions_is_sae_bench_s_of_k_on_all_of_them() -> None:
    """scikit-learn's on the same texts; it draws nothing from the generator of the others."""
    from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations

    draw = torch.Generator().manual_seed(0)
    acts = tuple(
        {label: torch.randn(n, 30, generator=draw) + 0.3 * shift
         for shift, label in enumerate("abc")}
        for n in (100, 60)
    )  # fmt: skip
    torch.manual_seed(7)
    before = torch.get_rng_state()
    ours = all_dimensions(acts, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    _, stock = train_probe_on_activations(*acts)
    assert ours == pytest.approx(stock, abs=0.5 / 120)
    assert ours == all_dimensions(acts, 3) and 0.5 < min(ours.values())


@pytest.mark.parametrize("sizes, size", [([3, 3, 1], 5), ([4, 2], 2), ([2], 5), ([3, 3], 3)])
def test_regrouped_batches_hold_the_same_rows_in_order(sizes: list[int], size: int) -> None:
    rows = torch.arange(sum(sizes))[:, None]
    out = list(regrouped(([part, -part] for part in rows.split(sizes)), size))
    assert all(torch.equal(first, -second) for first, second in out)
    assert torch.equal(torch.cat([first for first, _ in out]), rows)
    assert [len(first) for first, _ in out] == [len(part) for part in rows.split(size)]


@pytest.mark.parametrize("together", [False, True])
def test_only_tokens_that_count_are_encoded_and_features_are_stock_s(together: bool) -> None:
    """Bit for bit; also of an SAE whose features depend on what else it gets: of all tokens."""
    from sae_bench.sae_bench_utils.activation_collection import get_sae_meaned_activations

    class Own(experiment.CustomSAE):
        n_rows = 0

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            self.n_rows += x[..., 0].numel()
            acts = super().encode(x)
            return acts - acts.mean() if together else acts

    settings = dataclasses.replace(settings_of("run_1", "tinylm"), probe_sae_batch=4)
    draw = torch.Generator().manual_seed(0)
    sae = Own(32, 96, "toy", 0, k=5)
    sae.initialize(0, torch.randn(32, generator=draw))
    sae.cfg.hook_layer = 0
    ends_N1 = torch.randint(1, 20, (8, 1), generator=draw)
    x_NLD = torch.randn(8, 20, 32, generator=draw) * (torch.arange(20) < ends_N1)[..., None]
    stock = get_sae_meaned_activations({"": x_NLD}, sae, 4)[""]
    sae.n_rows, found = 0, []
    for x_BLD in (x_NLD[:4], x_NLD[4:]):
        found.append(mean_activations({0: x_BLD}, {"a": sae}, settings)["a"])
    assert torch.equal(torch.cat(found), stock)
    first, others = ((x[..., 0] != 0).sum() for x in (x_NLD[:4], x_NLD[4:]))
    assert sae.n_rows == first + 80 + (80 if together else others)


@pytest.fixture()
def scored(toy, toy_lm, tmp_path: Path, monkeypatch):
    """A run at toy sizes with a store of its own, and what probes an SAE in it.

    The latter takes a run and whether it keeps what it may, and returns the accuracies of an SAE
    that is another one each time, but for its figures.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = settings_of("run_1", "tinylm")
    settings = dataclasses.replace(settings, layers=(2,), probe_ks=(1, 2, 5), probe_train=20)
    run = run_on(
        toy_lm, settings, sae_bench_model=toy_lm.bridge(), out_dir=tmp_path, source=SOURCE,
        probe_texts=read_probe_texts(settings, toy_lm.tokenizer, CPU),
    )  # fmt: skip
    sae = toy.new_sae(settings, 2, 0, (torch.zeros(32), 1.0), {}, 4)

    numbers = iter(range(100))

    def score(run=run, keeps=True) -> dict:
        sae.another = next(numbers)
        run = dataclasses.replace(run, keeps=keeps)
        return sparse_probing(run, {"sae": sae}, toy.probe, Progress("probing", 2, "SAEs"))["sae"]

    return run, score


def test_the_language_model_s_probes_are_computed_once(toy, scored, monkeypatch) -> None:
    """The second run reads them; the figures are the same, and an SAE's own are not touched."""
    run, score = scored
    calls = Calls()
    stock = toy.probe

    def probe(acts, who, ks):
        calls.append(who)
        return stock(acts, who, ks)

    monkeypatch.setattr(toy, "probe", probe)

    def probes_of(*arguments) -> tuple[dict, list[str]]:
        calls.clear()
        return score(*arguments), list(calls)

    first, called = probes_of()
    assert called == ["llm", "sae", "llm", "sae"]
    assert probes_of() == (first, ["sae", "sae"])
    for file in store_dir().joinpath("language_model_probes").iterdir():
        file.write_text(file.read_text().replace("0.", "1.", 1))
    assert probes_of() == (first, ["llm", "sae", "llm", "sae"])  # damage is found
    other, called = probes_of(
        dataclasses.replace(run, settings=dataclasses.replace(run.settings, probe_seed=43))
    )
    assert other != first and called == ["llm", "sae", "llm", "sae"]


def test_a_kill_costs_the_probes_of_the_sae_that_it_came_in(toy, scored) -> None:
    run, _ = scored
    stats = torch.zeros(32), 1.0
    saes = {name: toy.new_sae(run.settings, 2, seed, stats, {}, 4)
            for seed, name in enumerate("abc")}  # fmt: skip
    probed = Calls()

    def score(keeps: bool, killed_at: int | None = None) -> dict:
        at = Calls([killed_at])

        def probe(acts, who, ks):
            if who == "sae":
                probed.append(who)
                if [len(probed)] == at:
                    raise KeyboardInterrupt
            return toy.probe(acts, who, ks)

        probed.clear()
        of_run = dataclasses.replace(run, keeps=keeps)
        return sparse_probing(of_run, saes, probe, Progress("probing", 6, "SAEs"))

    undisturbed = score(False)
    for killed_at in (3, 3):  # at c on the first set; then, with c left, at b on the second
        with pytest.raises(KeyboardInterrupt):
            score(True, killed_at)
    assert score(True) == undisturbed and len(probed) == 2


def test_an_edit_of_probe_leaves_no_language_model_s_probes_in_use(
    scored, tmp_path, monkeypatch
) -> None:
    run, _ = scored
    monkeypatch.setitem(OBSERVED.ran, "language model probes", {})
    monkeypatch.setitem(OBSERVED.settings, "language model probes", set())

    def key(old: str, new: str) -> dict:
        """Of experiment.py with a passage changed, as a module of its own."""
        source = SOURCE.replace(old, new)
        module = f"edited_{len(list(tmp_path.glob('edited_*')))}"
        path = tmp_path / f"{module}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
        edited = dataclasses.replace(run, source=source)
        return result_key("language model probes", edited, {"probe": sys.modules[module].probe})

    same = key("", "")
    for old, new, matters in (
        ("epochs=100", "epochs=50", True),
        ("core.calculate_misc_metrics(features)", "{}", False),
        ("clamp(max=1.0)", "clamp(max=2.0)", False),  # the trainer's
    ):
        assert SOURCE.count(old) == 1 and (key(old, new) != same) == matters, old


def test_the_language_model_s_passes_are_made_once(scored, monkeypatch) -> None:
    """Another SAE's evaluation reads them; a damaged one is made again; a rehearsal keeps none."""
    run, score = scored
    model = run.sae_bench_model
    calls, activations = Calls(), model.plain.activations
    monkeypatch.setattr(
        model.plain, "activations", lambda *a: (calls.append(1), activations(*a))[1]
    )

    def passes_of(keep: bool = True) -> tuple[dict, int]:
        calls.clear()
        return score(keeps=keep), len(calls)

    anew, n_passes = passes_of(keep=False)
    assert n_passes > 10 and not store_dir().joinpath("probing_passes").exists()
    assert passes_of() == (anew, n_passes)
    assert passes_of() == (anew, 0)
    file = min(store_dir().glob("probing_passes/*/*"))
    *rest, last = file.read_bytes()
    file.write_bytes(bytes([*rest, last ^ 1]))
    assert passes_of() == (anew, 1)
    replace(monkeypatch, "ACTIVATIONS_GB", 1e-6)
    assert passes_of() == (anew, n_passes)


def test_the_estimate_of_an_evaluation_draws_nothing_from_the_training_s_generator(
    toy, scored
) -> None:
    run, _ = scored
    saes = {(2, 0): toy.new_sae(run.settings, 2, 0, (torch.zeros(32), 1.0), {}, 4)}
    before = torch.get_rng_state()
    run = dataclasses.replace(run, core_metrics=toy.core_metrics, probe=toy.probe)
    seconds = run.evaluation_seconds(saes)
    assert 0 < seconds < 600 and torch.equal(torch.get_rng_state(), before)


def test_tinylm_s_accuracies_are_stock_sae_bench_s(tmp_path: Path) -> None:
    """On the shipped model and its tasks, exactly."""
    import experiment

    settings = dataclasses.replace(
        settings_of("run_1", "tinylm"), layers=(2,), probe_train=24, probe_test=12,
        probe_ks=(1, 2, 5),
    )  # fmt: skip
    lm = load_language_model("tinylm")
    model = lm.bridge()
    stats = torch.randn(256, generator=torch.Generator().manual_seed(0)), 1.0
    sae = experiment.new_sae(settings, 2, 0, stats, {}, 16)
    texts = read_probe_texts(settings, lm.tokenizer, CPU)
    run = run_on(lm, settings, sae_bench_model=model, probe_texts=texts, out_dir=tmp_path)
    ours = sparse_probing(
        run, {"sae": sae}, experiment.probe, Progress("sparse probing", 3, "SAEs")
    )
    with known_to_stock(own_sets(settings)):
        first, second = stock_probing(settings, sae, model, tmp_path / "artifacts")
    for k in settings.probe_ks:
        metric = f"sae_top_{k}_test_accuracy"
        assert ours["sae"][metric] == second[metric]
    (file,) = (tmp_path / "eval_results" / "sparse_probing").glob("*.json")
    detail = json.loads(file.read_text())["eval_result_details"][0]
    for metric, value in first[f"{detail['dataset_name']}"].items():
        if metric.startswith("llm_"):
            assert detail[metric] == value, metric
