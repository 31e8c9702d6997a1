"""What can be looked at of each feature: features/layer_L.json.gz, of a run's first seed.

Densities, histograms and the strongest contexts are gathered in the passes of core evaluation's
sparsity batches, and kept with its results. What a feature does to logits and what lies near it
follow from the weights. How strongly it tells a class comes from sparse probing's means.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.errors import first_line
from harness.evaluation.logit_lens import logit_lens, nearest, token_strings
from harness.interfaces import RunLike, SAELike, SettingsLike
from harness.ledger import LEDGER
from harness.observation import unwatched
from harness.ranks import RANKS
from harness.store import write_whole

N_CONTEXTS, BEFORE, AFTER = 5, 12, 6  # of a feature; tokens that are shown around its peak there
N_LOGITS, N_NEAREST, N_PROBED = 10, 5, 5
PER_DECADE, MOST_BINS = 8, 32  # of the histograms
GRID = [float(f"{10 ** (n / PER_DECADE):.3g}") for n in range(-64, 65)]  # edges of their bins
FORGIVEN: tuple[type[Exception], ...] = (Exception,)  # an edit may break this, which is no score


def shown_saes(saes: Collection[str], settings: SettingsLike) -> dict[str, int]:
    """Names of the SAEs that are shown, those of the first seed, and their layers."""
    names = {f"layer_{layer}_seed_{settings.seeds[0]}": layer for layer in settings.layers}
    return {name: layer for name, layer in names.items() if name in saes}


@contextlib.contextmanager
def forgiven(layer: int) -> Iterator[None]:
    """Inside, what fails is a warning, and the run goes on; but for a disk that is full."""
    try:
        yield
    except OSError:
        raise
    except FORGIVEN as error:
        warn(layer, in_words(error))


def warn(layer: int, why: str) -> None:
    """Warns that features of a layer can't be looked at."""
    LEDGER.warns(
        f"features of layer {layer} can't be looked at, features/layer_{layer}.json.gz is missing "
        f"or not whole: {why}"
    )


def in_words(error: Exception) -> str:
    """An error's kind and text."""
    return f"{type(error).__name__}: {first_line(error)}"


class FeatureGatherer:
    """What is shown of an SAE's features, gathered batch by batch on its device.

    It holds some numbers of each feature, and of its `N_CONTEXTS` strongest contexts the tokens and
    activations around the peak; no batch's activations outlive `add`.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self.n_tokens = 0
        self.seen: dict[bytes, int] = {}  # contexts, by their tokens: a short text comes again
        self.top: dict[str, Tensor] = {}  # of the K strongest contexts of each feature, K first

    def add(self, acts_BLF: Tensor, tokens_BL: Tensor, counts_BL: Tensor) -> None:
        """Adds a batch: what `encode` gave, and which of the tokens count."""
        if self.problem is None:
            try:
                self._add(acts_BLF, tokens_BL, counts_BL)
            except FORGIVEN as error:
                self.problem = in_words(error)

    def _add(self, acts_BLF: Tensor, tokens_BL: Tensor, counts_BL: Tensor) -> None:
        acts_BLF = acts_BLF.float().clamp(min=0).mul_(counts_BL[..., None])
        if not self.top:
            self._start(acts_BLF)
        self.n_tokens += int(counts_BL.sum())
        self.sum_F += acts_BLF.sum((0, 1))
        acts_X, n_features = acts_BLF.flatten(), acts_BLF.shape[-1]
        at_N = acts_X.nonzero()[:, 0]
        bins_N = torch.bucketize(acts_X[at_N], self.grid, right=True)
        bins_N += at_N % n_features * (len(GRID) + 1)
        counts_X = torch.bincount(bins_N, minlength=self.counts_FX.numel())
        self.counts_FX += counts_X.view_as(self.counts_FX)
        self._add_contexts(acts_BLF, tokens_BL)

    def _start(self, acts_BLF: Tensor) -> None:
        n_features, device = acts_BLF.shape[-1], acts_BLF.device
        shape, window = (N_CONTEXTS, n_features), (BEFORE + 1 + AFTER,)
        self.grid = torch.tensor(GRID, device=device)
        self.sum_F = torch.zeros(n_features, dtype=torch.float64, device=device)
        counts = n_features, len(GRID) + 1
        self.counts_FX = torch.zeros(counts, dtype=torch.int64, device=device)
        ints = {"passage": shape, "at": shape, "tokens": shape + window}
        self.top = {name: torch.full(of, -1, device=device) for name, of in ints.items()}
        self.top["peak"] = torch.zeros(shape, device=device)
        self.top["acts"] = torch.zeros(shape + window, device=device)

    def _add_contexts(self, acts_BLF: Tensor, tokens_BL: Tensor) -> None:
        """Merges a batch's contexts, of each its strongest place, into the K strongest."""
        n_known, numbers = len(self.seen), []
        for row in tokens_BL.cpu().numpy():
            context = hashlib.sha256(row.tobytes()).digest()
            again = context in self.seen
            numbers.append(-1 if again else self.seen.setdefault(context, len(self.seen)))
        if len(self.seen) == n_known:
            return
        passage_B = torch.tensor(numbers, device=acts_BLF.device)
        peak_BF = acts_BLF.amax(1).masked_fill((passage_B < 0)[:, None], 0.0)
        both = torch.cat([self.top["peak"], peak_BF])
        self.top["peak"], from_KF = both.topk(N_CONTEXTS, dim=0)
        kept_KF = from_KF.clamp(max=N_CONTEXTS - 1)
        for name in ("passage", "at", "tokens", "acts"):
            old = self.top[name]
            kept = kept_KF if old.dim() == 2 else kept_KF[..., None].expand_as(old)
            self.top[name] = old.gather(0, kept)
        new = (from_KF >= N_CONTEXTS).nonzero(as_tuple=True)
        row_N, feature_N = from_KF[new] - N_CONTEXTS, new[1]
        at_N = acts_BLF[row_N, :, feature_N].argmax(1)
        place_NW = at_N[:, None] + torch.arange(-BEFORE, AFTER + 1, device=at_N.device)
        inside_NW = (place_NW >= 0) & (place_NW < tokens_BL.shape[1])
        place_NW = place_NW.clamp(0, tokens_BL.shape[1] - 1)
        tokens_NW = tokens_BL.to(at_N.device)[row_N[:, None], place_NW]
        self.top["tokens"][new] = tokens_NW.where(inside_NW, -1)
        acts_NW = acts_BLF[row_N[:, None], place_NW, feature_N[:, None]]
        self.top["acts"][new] = acts_NW * inside_NW
        self.top["passage"][new], self.top["at"][new] = passage_B[row_N], at_N.clamp(max=BEFORE)

    def gathered(self) -> dict[str, Any]:
        """All of it as JSON, or the "problem" that it ran into.

        Returns:
            n_tokens, edges, and of each feature density, mean, max, histogram and contexts, as in
            features/layer_L.json.gz, but with token ids.
        """
        if self.problem is None and not self.top:
            self.problem = "core_metrics decodes nothing in the sparsity batches"
        if self.problem is not None:
            return {"problem": self.problem}
        edges, counts_FX = trimmed(self.counts_FX.cpu().numpy())
        n_active_F = counts_FX.sum(1)
        top = {name: tensor.transpose(0, 1).tolist() for name, tensor in self.top.items()}
        features = []
        for i, (total, n_active) in enumerate(zip(self.sum_F.tolist(), n_active_F.tolist())):
            contexts = []
            for place in range(sum(peak > 0 for peak in top["peak"][i])):
                tokens, acts = top["tokens"][i][place], top["acts"][i][place]
                contexts.append({
                    "tokens": [token for token in tokens if token >= 0],
                    "acts": [short(act) for act, token in zip(acts, tokens) if token >= 0],
                    "at": top["at"][i][place],
                    "passage": top["passage"][i][place],
                })  # fmt: skip
            features.append({
                "density": short(n_active / self.n_tokens),
                "mean": short(total / max(n_active, 1)),
                "max": short(top["peak"][i][0]),
                "histogram": counts_FX[i].tolist(),
                "contexts": contexts,
            })  # fmt: skip
        return {"n_tokens": self.n_tokens, "edges": edges, "features": features}


def short(number: float) -> float:
    """Three significant digits."""
    return float(f"{number:.3g}") if number else 0


def trimmed(counts_FX: np.ndarray) -> tuple[list[float], np.ndarray]:
    """The bins of the grid that hold something, at most `MOST_BINS`: edges, and counts (F, n).

    What lies below the first edge is counted in the first bin, and above the last in the last.
    """
    occupied = counts_FX[:, 1:-1].sum(0).nonzero()[0]
    last = occupied[-1] if len(occupied) else 0
    first = max(occupied[0] if len(occupied) else 0, last - MOST_BINS + 1)
    counts = counts_FX[:, first + 1 : last + 2].copy()
    counts[:, 0] += counts_FX[:, : first + 1].sum(1)
    counts[:, -1] += counts_FX[:, last + 2 :].sum(1)
    return GRID[first : last + 2], counts


def class_differences(train: dict[str, Tensor]) -> dict[str, list[float]]:
    """By class and feature, the mean activation in its texts less that in the other classes'.

    By the size of this SAE-Bench selects what it probes (`get_top_k_mean_diff_mask`), with as many
    of the others' texts as the class has, drawn at random, where this takes all.

    Args:
        train: {class: (N, F)}.
    """
    found = {}
    for label, acts_NF in train.items():
        others_NF = torch.cat([acts for other, acts in train.items() if other != label])
        difference_F = acts_NF.float().mean(0) - others_NF.float().mean(0)
        found[label] = [short(value) for value in difference_F.tolist()]
    return found


@unwatched()
def write_features(run: RunLike, sae: SAELike, gathered: dict[str, Any]) -> None:
    """Writes features/layer_L.json.gz of a folded SAE, or warns of why it can't.

    Args:
        gathered: see `FeatureGatherer.gathered`.
    """
    layer = sae.cfg.hook_layer
    if run.training_pass is not None or not RANKS.first:  # where nobody looks at them
        return
    if "problem" in gathered:
        warn(layer, gathered["problem"])
        return
    with forgiven(layer):
        lm, settings = run.language_model, run.settings
        features, tokens, through = with_weights(lm, sae, gathered["features"])
        record = {
            "version": 1, "model": settings.model, "hook_name": sae.cfg.hook_name, "layer": layer,
            "seed": settings.seeds[0], "d_sae": len(features), "n_tokens": gathered["n_tokens"],
            "lens": through, "tokens": token_strings(lm.tokenizer, tokens),
            "edges": gathered["edges"], "probed": [], "features": features,
        }  # fmt: skip
        write_record(run.out_dir, layer, record)


def with_weights(
    lm: Any, sae: SAELike, gathered: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[int], str]:
    """Features with what follows from the weights, their tokens as places in a list of ids.

    Returns:
        the features, that list, and what `logit_lens` says.
    """
    lens, through = logit_lens(lm.hf, lm.name, sae.W_dec, len(lm.tokenizer), N_LOGITS)
    cosines_FN, near_FN = (part.tolist() for part in nearest(sae.W_dec, N_NEAREST))
    logits = {kind: [part.tolist() for part in parts] for kind, parts in lens.items()}
    places: dict[int, int] = {}

    def place(token: int) -> int:
        return places.setdefault(token, len(places))

    features = []
    for i, feature in enumerate(gathered):
        contexts = [
            context | {"tokens": [place(token) for token in context["tokens"]]}
            for context in feature["contexts"]
        ]
        row = feature | {"contexts": contexts, "raises": [], "lowers": []}
        for kind, (values, at) in logits.items():
            row[kind] = [[place(token), short(v)] for v, token in zip(values[i], at[i])]
        row["nearest"] = [[j, short(v)] for v, j in zip(cosines_FN[i], near_FN[i])]
        features.append(row | {"probe": []})
    return features, [*places], through


def path_of(out_dir: Path, layer: int) -> Path:
    """Where the features of a layer are."""
    return out_dir / "features" / f"layer_{layer}.json.gz"


def write_record(out_dir: Path, layer: int, record: dict[str, Any]) -> None:
    """Writes the features of a layer: the same bytes for the same record."""
    path = path_of(out_dir, layer)
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    packed = gzip.compress(text.encode(), compresslevel=6, mtime=0)
    write_whole(path.parent, lambda file: file.write(packed), lambda _: path.name)


@unwatched()
def add_probing(out_dir: Path, layer: int, told: dict[str, dict[str, list[float]]]) -> None:
    """Adds to the features of a layer, where they are, which classes each tells.

    Args:
        told: by data set, what `class_differences` returns.
    """
    path = path_of(out_dir, layer)
    if not path.exists():
        return
    with forgiven(layer):
        record = json.loads(gzip.decompress(path.read_bytes()))
        record["probed"] = [f"{name}: {label}" for name, of in told.items() for label in of]
        values_CF = [(value_F, len(of)) for of in told.values() for value_F in of.values()]
        for i, feature in enumerate(record["features"]):
            # Of two classes the one that it tells: the other's value is the same, with a minus.
            values = [(at, value_F[i]) for at, (value_F, n_classes) in enumerate(values_CF)
                      if value_F[i] > 0 or n_classes > 2 and value_F[i]]  # fmt: skip
            feature["probe"] = sorted(values, key=lambda pair: -abs(pair[1]))[:N_PROBED]
        write_record(out_dir, layer, record)
