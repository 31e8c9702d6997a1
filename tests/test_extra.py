"""SAE-Bench's evaluation on sae-probes' data sets: stock's figures, kept, in stock's form."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch

from bench.common import run_on, settings_of
from harness.errors import ExperimentError
from harness.evaluation.core import prepare_for_sae_bench
from harness.evaluation.extra import check_extra_evals, extra_evaluations
from harness.partials import scratch_dir
from tests.conftest import ROOT, Calls, run_command

SMALLEST = "95_toxic_is"


@pytest.fixture()
def scored(toy, toy_lm, own_cache, tmp_path: Path):
    """A run that asks for one data set, and two SAEs of it."""
    settings = dataclasses.replace(
        settings_of("run_1", "tinylm"), layers=(2,), extra_evals=("sae_probes",),
        sae_probes_sets=(SMALLEST,),
    )  # fmt: skip
    run = run_on(toy_lm, settings, sae_bench_model=toy_lm.bridge(), out_dir=tmp_path,
                 source=(ROOT / "experiment.py").read_text(), keeps=True)  # fmt: skip
    stats = torch.zeros(32), 1.0
    names = ("layer_2_seed_0", "layer_2_seed_0_untrained")
    return run, {n: toy.new_sae(settings, 2, at, stats, {}, 4) for at, n in enumerate(names)}


def stock_evaluation(run, saes, folder: Path) -> dict[str, dict]:
    """Stock SAE-Bench called directly, given the model where it would load one by its name."""
    from sae_bench.evals.sparse_probing_sae_probes import eval_config, main
    from sae_probes.constants import DATA_PATH
    from sae_probes.generate_model_activations import generate_single_dataset_activations

    acts = folder / "acts"
    model = copy.deepcopy(run.sae_bench_model)
    place = DATA_PATH / "cleaned_data" / f"{SMALLEST}.csv.zst"
    hooks, name = ["blocks.2.hook_resid_post"], run.settings.model
    generate_single_dataset_activations(
        model, name, place, hooks, acts, "cpu", max_seq_len=model.cfg.n_ctx
    )
    config = eval_config.SparseProbingSaeProbesEvalConfig(
        model_name=name, dataset_names=[SMALLEST], results_path=str(folder / "results"),
        model_cache_path=str(acts),
    )  # fmt: skip
    ready = [(name, prepare_for_sae_bench(sae, run.settings)) for name, sae in saes.items()]
    return main.run_eval(config, ready, "cpu", str(folder / "out"))


def test_figures_and_files_are_stock_sae_bench_s(scored, tmp_path: Path) -> None:
    from pydantic import TypeAdapter
    from sae_bench.evals.sparse_probing_sae_probes import eval_output

    run, saes = scored
    tokenizer = run.sae_bench_model.tokenizer
    before = tokenizer(["a", "a b c"], padding=False)["input_ids"], tokenizer.truncation_side
    figures, seconds = extra_evaluations(run, saes)
    after = tokenizer(["a", "a b c"], padding=False)["input_ids"], tokenizer.truncation_side
    assert before == after and 0 < seconds["seconds_sae_probes"]
    stock = stock_evaluation(run, saes, tmp_path / "stock")
    form = TypeAdapter(eval_output.SparseProbingSaeProbesEvalOutput)
    for name in saes:
        file = f"eval_results/sparse_probing_sae_probes/{name}_custom_sae_eval_results.json"
        text = (tmp_path / file).read_text()
        assert form.validate_json(text).sae_cfg_dict["d_sae"] == 64
        assert str(tmp_path) not in json.dumps(json.loads(text)["eval_config"]["results_path"])
        ours, theirs = json.loads(text), json.loads(json.dumps(stock[f"{name}_custom_sae"]))
        for part in ("eval_result_metrics", "eval_result_details", "sae_metrics_by_k"):
            assert ours[part] == theirs[part] and ours[part]
    first, other = (stock[f"{name}_custom_sae"]["eval_result_metrics"] for name in saes)
    own = figures["layer_2_seed_0"]
    assert own["sae_probes_top_5_test_accuracy"] == first["sae"]["sae_top_5_test_accuracy"]
    assert own["sae_probes_llm_test_auc"] == first["llm"]["llm_test_auc"]
    assert own["sae_probes_untrained_top_1_test_f1"] == other["sae"]["sae_top_1_test_f1"]


def test_a_kill_costs_the_sae_that_it_came_in(scored, monkeypatch) -> None:
    evals = importlib.import_module("sae_probes.run_sae_evals")
    baselines = importlib.import_module("sae_probes.run_baselines")
    run, saes = scored
    calls, stock = Calls(), evals.run_sae_eval

    def evaluate(*arguments, **options) -> bool:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return stock(*arguments, **options)

    def baseline(hook, dataset, method, model_name, results_path, **_) -> None:
        path = baselines.get_baseline_save_path(dataset, hook, method, model_name, results_path)
        path.write_text('[{"test_acc": 0.5}]')

    monkeypatch.setattr(evals, "run_sae_eval", evaluate)
    monkeypatch.setattr(baselines, "run_baseline_dataset_layer", baseline)  # the slowest part
    with pytest.raises(KeyboardInterrupt):
        extra_evaluations(run, saes)
    figures, _ = extra_evaluations(run, saes)
    assert len(calls) == 3 and extra_evaluations(run, saes)[0] == figures
    assert len(calls) == 3
    with torch.no_grad():
        saes["layer_2_seed_0"].b_enc += 1
    assert extra_evaluations(run, saes)[0] != figures and len(calls) == 4


def test_a_data_set_that_is_none_is_told_at_the_start(scored) -> None:
    run, _ = scored
    check_extra_evals(run.settings)
    wrong = dataclasses.replace(run.settings, sae_probes_sets=("toxic",))
    with pytest.raises(ExperimentError, match=r"100_news_fake, .* but one is 'toxic': choose amo"):
        check_extra_evals(wrong)
    check_extra_evals(dataclasses.replace(wrong, extra_evals=()))


def test_scratch_folders_stand_in_each_other() -> None:
    """A rehearsal has one, and the evaluation within it."""
    with scratch_dir() as outer:
        with scratch_dir() as inner:
            assert inner != outer
        assert outer.is_dir() and not inner.exists()


def test_nothing_is_done_where_it_is_not_asked_for(scored) -> None:
    run, saes = scored
    silent = dataclasses.replace(run.settings, extra_evals=())
    assert extra_evaluations(dataclasses.replace(run, settings=silent), saes) == (
        {name: {} for name in saes}, {},
    )  # fmt: skip


def test_a_run_records_its_means_and_a_second_one_repeats_nothing(
    toy, tmp_path: Path, monkeypatch, capsys
) -> None:
    asked = dict(layers=(2,), training_tokens=1024, probe_sets=("toy/halves",),
                 extra_evals=("sae_probes",), sae_probes_sets=(SMALLEST,))  # fmt: skip
    monkeypatch.setitem(toy.PLAN, "run_1", asked)
    records = []
    for name in ("first", "second"):
        assert run_command(toy, tmp_path / name / "run_1") == 0
        records.append(json.loads((tmp_path / name / "run_1" / "final_info.json").read_text()))
        out = capsys.readouterr().out
        assert "seconds_sae_probes: " in out
    assert "sae_probes: kept, as all that it depends on is unchanged; not repeated" in out
    first, second = (record["layer_2"]["means"] for record in records)
    metrics = [metric for metric in first if metric.startswith("sae_probes_")]
    assert len(metrics) == 3 * 3 * 2 + 3
    assert [first[metric] for metric in metrics] == [second[metric] for metric in metrics]
