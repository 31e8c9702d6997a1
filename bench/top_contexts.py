"""What do features fire on? The strongest contexts of ten features of a run, drawn at random.

    python bench/top_contexts.py run_try [--layer 14] [--n 10] [--contexts 400]

Reads a run's SAE of its first seed with SAELens, passes its core text through the language model,
and prints for each feature the part of the tokens on which it fires and its five strongest places,
each in another context, the token in brackets. Features are drawn (seed 0) from those that fire.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from sae_lens import SAE
from torch import Tensor

from harness.language_model import LanguageModel, load_language_model
from harness.text import TokenStream, documents
from harness.tokenizer import counted

BEFORE, AFTER, PLACES = 10, 4, 5  # tokens around a place, and places of a feature


@torch.no_grad()
def strongest(
    sae: SAE, lm: LanguageModel, tokens_NL: Tensor, layer: int, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each context the largest activations and where they are, (N, F); the density, (F,)."""
    values, places, n_fired, n_counted = [], [], 0, 0
    for tokens_BL in tokens_NL.split(8):
        counts_BL = counted(tokens_BL, lm.special_token_ids, first)
        (x_BLD,) = lm.activations(tokens_BL, (layer,))
        f_BLF = sae.encode(x_BLD) * counts_BL[..., None]
        largest = f_BLF.max(dim=1)
        values.append(largest.values)
        places.append(largest.indices)
        n_fired = n_fired + (f_BLF > 0).sum((0, 1))
        n_counted += int(counts_BL.sum())
    return torch.cat(values), torch.cat(places), n_fired / n_counted


def around(tokens_L: Tensor, at: int, tokenizer: Any) -> str:
    """The tokens around a place, which stands in brackets."""
    parts = tokens_L[max(at - BEFORE, 0) : at], tokens_L[[at]], tokens_L[at + 1 : at + 1 + AFTER]
    return "{}[{}]{}".format(*(tokenizer.decode(part) for part in parts)).replace("\n", "⏎")


def main() -> None:
    """Reads the flags, prints the features."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder that a run has left")
    parser.add_argument("--layer", type=int, help="by default the middle one")
    parser.add_argument("--n", type=int, default=10, help="features")
    parser.add_argument("--contexts", type=int, default=400)
    args = parser.parse_args()
    settings = json.loads((args.run / "config.json").read_text())["settings"]
    layers, seed = settings["layers"], settings["seeds"][0]
    layer = layers[len(layers) // 2] if args.layer is None else args.layer
    lm = load_language_model(settings["model"], hook=settings["hook"])
    sae = SAE.load_from_disk(args.run / f"sae/layer_{layer}/seed_{seed}")
    with TokenStream(documents(settings["core_text"], "heldout"), lm.tokenizer,
                     settings["context"]) as stream:  # fmt: skip
        tokens_NL = stream.contexts(args.contexts)
    found = strongest(sae, lm, tokens_NL, layer, settings["first_positions"])
    values_NF, places_NF, density_F = found
    alive = density_F.nonzero()[:, 0]
    drawn = alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(0))]
    print(f"{args.run.name}, layer {layer}: {len(alive)} of {len(density_F)} features fire on "
          f"{tokens_NL.numel()} tokens")  # fmt: skip
    for feature in sorted(drawn[: args.n].tolist()):
        print(f"\nfeature {feature}, on {float(density_F[feature]):.2%} of tokens")
        for value, context in zip(*values_NF[:, feature].topk(PLACES)):
            if value > 0:
                at = int(places_NF[context, feature])
                print(f"  {value:6.2f}  {around(tokens_NL[context], at, lm.tokenizer)}")


if __name__ == "__main__":
    main()
