"""SAEDashboard takes exported SAEs as they are; skipped where it isn't installed (docs/use.md)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sae_lens import SAE

from bench.common import run_on, settings_of
from harness.evaluation.export import export_to_saelens
from tests.test_core import probing_texts

N_FEATURES = 6


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "standard"])
def test_its_runner_shows_the_features_of_every_form(toy, toy_lm, tmp_path, kind: str) -> None:
    pytest.importorskip("sae_dashboard.sae_vis_runner")
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner

    settings = dataclasses.replace(settings_of("run_1", "tinylm"), layers=(2,))
    tokens_NL = torch.randint(3, 300, (16, 32), generator=torch.Generator().manual_seed(1))
    x_NLD = toy_lm.activations(tokens_NL, (2,))[0]
    stats, k = (x_NLD.mean((0, 1)), 1.0), None if kind == "standard" else 4
    sae = toy.new_sae(settings, 2, 0, stats, {}, None if kind == "jumprelu" else k,
                      by_threshold=kind == "jumprelu")  # fmt: skip
    if kind == "jumprelu":
        sae.threshold.fill_(2.0)
    run = run_on(toy_lm, settings, probe_texts=probing_texts(toy_lm))
    export_to_saelens(run, sae, tmp_path, kind, k=k)
    stored = SAE.load_from_disk(tmp_path)
    config = SaeVisConfig(stored.cfg.metadata.hook_name, range(N_FEATURES), minibatch_size_tokens=8)
    shown = SaeVisRunner(config).run(stored, toy_lm.bridge(), tokens_NL).feature_data_dict
    acts_NLF, alive = sae.encode(x_NLD).detach(), 0
    for feature in range(N_FEATURES):
        acts_NL = acts_NLF[..., feature]
        title = shown[feature].acts_histogram_data.title
        assert title.endswith(f"DENSITY = {float((acts_NL > 0).float().mean()):.3%}")
        top = shown[feature].sequence_data.seq_group_data[0].seq_data
        if acts_NL[:, 12:-12].any():  # it shows what has so many tokens beside
            alive += 1
            peak = float(acts_NL[top[0].original_index].max())
            assert max(top[0].feat_acts) == pytest.approx(peak, rel=1e-4) and peak > 0
        raised = (sae.W_dec[feature] @ toy_lm.hf.lm_head.weight.T).argmax()
        assert shown[feature].logits_table_data.top_token_ids[0] == int(raised)
    assert alive > 2
