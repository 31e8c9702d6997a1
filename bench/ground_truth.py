"""How many true features are found: this SAE and SAELens' trainers on synthetic activations.

    python bench/ground_truth.py [--minutes 150] [--stages sweep,range,seeds] [--methods …]

SAELens' synthetic model has 512 true features in 128 dimensions, 8 of them active at a time:
Zipfian frequencies (0.8; from 0.3 to 0.01), correlations of rank 16, and 32 parents with 3 children
each, which fire only when it does. Every method learns 512 features from the same 1.2 M
activations, at the model's own L0. Stages, the sweep of learning rates, the choice by FVU (not by
what is to be found out) and the resuming are bench/quality.py's; seeds 0 to 2 draw a model each.
Each SAE is a line of bench/ground_truth.jsonl.

The figures are SAELens' (`eval_sae_on_synthetic_data`): mean correlation coefficient of decoder
rows and true features, matched one to one by absolute cosine; uniqueness, the number of different
true features that are some latent's nearest, per latent; precision and recall of latents as
detectors of their nearest true feature, 0 for a dead one; dead latents; L0 beside the true L0.
"untrained" is this project's SAE before its first step.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

import experiment
from bench import quality
from bench.common import exported, run_on
from bench.figures import ground_truth_table
from bench.quality import OURS, UNTRAINED, Cell
from experiment import Settings
from harness.machine import make_reproducible

FILE = ROOT / "bench" / "ground_truth.jsonl"
STAGES, SEEDS = ("sweep", "range", "seeds"), experiment.THREE
N_FEATURES, WIDTH = 512, 128
# What a threshold loses true features by: when silent ones come back. SAELens' trainers count a
# feature as dead after 100,000 tokens.
FORMS = {
    f"{quality.UNWEIGHTED}, dead after 10,000": {"dead_feature_window": 10_000},
    f"{quality.UNWEIGHTED}, dead after 100,000": {"dead_feature_window": 100_000},
    f"{quality.UNWEIGHTED}, k of each token": {"activation": "topk"},
}
# JumpReLU (tanh) has no L0 near the true one: between two coefficients it falls from 50 to 7.
METHODS = (
    {name: m for name, m in quality.METHODS.items() if name != "JumpReLU (tanh)"}
    | {"BatchTopK, dead after 10,000": quality.Method("batchtopk", options={"dead_window": 10_000})}
    | {
        name: quality.Method(None, "k_min", options=quality.UNWEIGHTED_OPTIONS | changes)
        for name, changes in FORMS.items()
    }
)
SAMPLES = 50_000  # that the figures are of
LEARNING_RATES = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
# Where penalties give the true L0 here: between which values, and the values of `range`.
PENALTIES = {
    "Standard": ((2.5, 5.0), (2.5, 3.5, 5.0)),
    "JumpReLU": ((0.35, 1.0), (0.3, 0.5, 0.8)),
    "Gated": ((2.2, 4.5), (2.0, 3.0, 4.5)),
}


@functools.lru_cache(maxsize=1)
def synthetic_model(seed: int) -> Any:
    """SAELens' SyntheticModel: Zipfian frequencies, correlations, a hierarchy, superposition.

    Its seed is not the SAE's: SAE and model draw directions in the same way, and from one seed an
    untrained SAE is the dictionary of true features.
    """
    from sae_lens import synthetic

    return synthetic.SyntheticModel(
        synthetic.SyntheticModelConfig(
            num_features=N_FEATURES,
            hidden_dim=WIDTH,
            firing_probability=synthetic.ZipfianFiringProbabilityConfig(
                exponent=0.8, max_prob=0.3, min_prob=0.01
            ),
            hierarchy=synthetic.HierarchyConfig(
                total_root_nodes=32, branching_factor=3, max_depth=1, compensate_probabilities=True
            ),
            correlation=synthetic.LowRankCorrelationConfig(rank=16, correlation_scale=0.1),
            mean_firing_magnitudes=1.0,
            std_firing_magnitudes=0.3,
            seed=1_000 + seed,
        )
    )


@functools.lru_cache(maxsize=1)
def activations(seed: int, n: int) -> Tensor:
    """The first n activations of a seed's model: (n, D)."""
    model = synthetic_model(seed)
    torch.manual_seed(seed)
    return torch.cat([model.sample(min(16_384, n - at)) for at in range(0, n, 16_384)])


class SyntheticBuffer:
    """Activations of a synthetic model in the place of `experiment.ActivationBuffer`."""

    def __init__(self, acts_ND: Tensor) -> None:
        self.acts_ND, self.taken = acts_ND, 0
        where = types.SimpleNamespace(device=acts_ND.device, dtype=acts_ND.dtype)
        self.lm = types.SimpleNamespace(hf=where)

    def next_tokens(self, n: int, advance: Callable[[int], None] = lambda n: None) -> Tensor:
        """The next n activations: (1, n, D)."""
        self.taken += n
        advance(n)
        return self.acts_ND[None, self.taken - n : self.taken]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a training takes seconds, and isn't saved."""
        return {}


def figures(sae: Any, model: Any, seed: int) -> dict[str, float]:
    """SAELens' figures of an exported SAE on the model's own features, and FVU."""
    from sae_lens import synthetic

    torch.manual_seed(10_000 + seed)
    found = synthetic.eval_sae_on_synthetic_data(
        sae.stored, model.feature_dict, model.activation_generator, SAMPLES, batch_size=10_000
    )
    return {
        "true_l0": found.true_l0,
        "l0": found.sae_l0,
        "fvu": 1 - found.explained_variance,
        "mcc": found.mcc,
        "uniqueness": found.uniqueness,
        "precision": found.classification.precision,
        "recall": found.classification.recall,
        "f1": found.classification.f1_score,
        "dead": found.dead_latents / N_FEATURES,
    }


def run_cell(cell: Cell, base: Settings, folder: Path) -> list[dict[str, Any]]:
    """Trains, exports and scores a cell's SAE: its row, and the untrained one's."""
    settings = quality.settings_for(cell, METHODS[cell.method], base)
    model = synthetic_model(cell.seed)
    buffer: Any = SyntheticBuffer(activations(cell.seed, settings.training_tokens))
    run = run_on(buffer.lm, settings, out_dir=folder, runs=folder)
    training = experiment.train(run, buffer)
    kinds = {cell.method: exported(training.saes[0, cell.seed], settings, 0)}
    if cell.stage == "seeds" and cell.method == OURS:
        (kinds[UNTRAINED],) = quality.untrained(training, settings).values()
    return [
        dataclasses.asdict(
            dataclasses.replace(
                cell, method=name, options={} if name == UNTRAINED else cell.options
            )
        )
        | {"layer": 0, "of_layer": cell.sparsity[0]}
        | figures(stored, model, cell.seed)
        | quality.machine()
        for name, stored in kinds.items()
    ]


def true_l0() -> int:
    """The L0 that every method is asked for: the sweep's model's own, to the nearest integer."""
    torch.manual_seed(0)
    acts = synthetic_model(quality.SWEEP_SEED).activation_generator.sample(SAMPLES)
    return round(float((acts > 0).sum(-1).float().mean()))


def main() -> int:
    """Makes what is missing, as long as there is time, and prints the table."""
    arguments = quality.arguments_of(__doc__.split("\n")[0], STAGES, METHODS, FILE)
    results = quality.Results(arguments.file)
    k = true_l0()
    base = dataclasses.replace(
        Settings(), layers=(0,), d_sae=N_FEATURES, k_min=k, model="synthetic"
    )
    methods = {}
    for name, method in arguments.methods.items():
        near, values = PENALTIES.get(name, (None, ()))
        methods[name] = dataclasses.replace(method, near=near, values=values)
    cells = {
        "sweep": lambda: quality.sweep_cells(methods, base, LEARNING_RATES),
        "range": lambda: quality.range_cells(methods, base, results),
        "seeds": lambda: quality.seed_cells(methods, base, results, SEEDS),
    }
    make_reproducible()
    with tempfile.TemporaryDirectory() as folder:
        quality.make_missing(
            cells, arguments.stages, lambda cell: run_cell(cell, base, Path(folder)), results,
            arguments.minutes,
        )  # fmt: skip
    print(ground_truth_table(results.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
