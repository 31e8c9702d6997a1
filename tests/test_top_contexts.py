"""bench/top_contexts.py: what is printed of a run's features is what they fire on."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from sae_lens import SAE

from bench import top_contexts
from harness.language_model import load_language_model
from harness.text import TokenStream
from tests.conftest import SOURCES


def test_the_strongest_places_of_features_are_shown(
    toy, toy_run: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(top_contexts, "documents", lambda name, split: lambda: iter(SOURCES))
    given = [str(toy_run), "--layer", "2", "--contexts", "12", "--n", "64"]
    monkeypatch.setattr(sys, "argv", ["top_contexts.py", *given])
    top_contexts.main()
    head, *features = capsys.readouterr().out.split("\n\nfeature ")
    (counts,) = re.findall(r": (\d+) of 64 features fire on (\d+) tokens", head)
    n_alive, n_tokens = map(int, counts)
    assert n_alive == len(features) > 1 and n_tokens == 12 * 32

    lm = load_language_model(toy.PROFILES["tinylm"]["model"])
    sae = SAE.load_from_disk(toy_run / "sae/layer_2/seed_0")
    with TokenStream(lambda: iter(SOURCES), lm.tokenizer, 32) as stream:
        tokens_NL = stream.contexts(12)
    f_NLF = sae.encode(lm.activations(tokens_NL, (2,))[0]).detach()
    f_NLF[torch.isin(tokens_NL, torch.tensor(sorted(lm.special_token_ids)))] = 0
    for shown in features:
        feature, density, *lines = re.split(r", on |% of tokens\n", shown.rstrip())
        places_NL = f_NLF[..., int(feature)]
        (largest, *_) = lines[0].splitlines()
        assert float(density) == round(100 * float((places_NL[:, 1:] > 0).float().mean()), 2)
        assert float(largest.split()[0]) == round(float(places_NL[:, 1:].max()), 2)
        context, at = divmod(int(places_NL[:, 1:].argmax()), 31)
        token = lm.tokenizer.decode(tokens_NL[context, [at + 1]]).replace("\n", "⏎")
        assert f"[{token}]" in lines[0]
