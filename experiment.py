"""Train a parametric contrastive sparse autoencoder (SAE), score it with SAE-Bench, record it.

    python experiment.py --out_dir=run_i

configuration -> language model -> activation buffer -> trainer -> evaluation -> records.
Edit anything here; `harness/` holds the plumbing that nobody edits. In names of tensors,
B is tokens or batch, L sequence, D model dimension, F features, K selected features, N rows.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import harness.reads  # isort: skip (first: it sees what is read) # noqa: F401

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from sae_bench.custom_saes.base_sae import BaseSAE
from torch import Tensor, nn

from harness.evaluation.core import core_evaluation, mean_l0
from harness.evaluation.export import export_saes
from harness.evaluation.extra import extra_evaluations
from harness.evaluation.probing import sparse_probing
from harness.generators import seed_generators
from harness.gpu import compiled
from harness.language_model import hook_name
from harness.machine import in_order, trim_memory
from harness.peers import TUNED, peer_trainers
from harness.records import check_results, write_records
from harness.settings import checked, must_hold, sweep  # noqa: F401 (for PLAN)
from harness.startup import Run, launch
from harness.steps import replace_entries, take_steps
from harness.text import TokenStream, documents
from harness.tokenizer import counted
from harness.training import ActivationCache, ActivationStats, TrainingLog
from sparse_ops import Codes, fast_if_gradients_match, on_gpu, preactivations

# ---- SETTINGS AND PLAN: edit these directly -----------------------------------------------------

Part = Annotated[float, Field(ge=0, le=1)]  # of training
Rate = Annotated[float, Field(gt=0, le=1)]


@checked
class Settings:
    """Everything a run depends on, each with what it can be. `PROFILES` and `PLAN` override it."""

    description: str = "defaults"  # what the run tests, for tables and figures

    # The language model and its text.
    model: str = "tinylm"  # a Hugging Face name or folder; "tinylm": the built-in model
    lm_dtype: Literal["float32", "bfloat16"] = "float32"  # of the language model in evaluation
    train_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of training's matrix products
    layers: tuple[NonNegativeInt, ...] = (1, 2, 4)  # SAEs read blocks.L.hook_{hook}
    hook: Literal["resid_post", "resid_mid", "mlp_out", "attn_out"] = "resid_post"
    context: Annotated[int, Field(ge=3)] = 128  # tokens per context, BOS first
    first_positions: PositiveInt = 1  # of each context, that never count: attention sinks
    training_text: str = "tinylm"  # a data set, folder or file of texts; "tinylm": its corpus
    device: Literal["auto", "cpu", "cuda"] = "auto"

    # The SAE and its loss (docs/method.md, The loss).
    trainer: Literal["contrastive", "standard", "topk", "batchtopk", "jumprelu", "jumprelu_tanh",
                     "gated", "matryoshka_batchtopk"] = "contrastive"  # all others: SAELens'
    sparsity_coefficient: PositiveFloat | tuple[PositiveFloat, ...] | None = None  # or by layer
    d_sae: PositiveInt = 1024  # F, the number of features
    loss_variant: Literal["contrastive", "as_written"] = "contrastive"  # or as first written down
    tau_sel: PositiveFloat | None = None  # selection temperature; None: learned in (0.1, 0.5)
    tau_pen: PositiveFloat | None = None  # penalty temperature; None: learned in (0.05, 0.25)
    gamma: NonNegativeFloat | None = None  # loss weight; None: learned in (0, 0.3)
    constants_from_run: str | None = None  # fix all three at this run's final values, by layer
    reg_lambda: NonNegativeFloat = 0.01  # λ of L_reg, on the learned θ
    activation: Literal["topk", "jumprelu", "relu"] = "topk"  # docs/method.md, The SAE
    threshold_rate: Rate = 0.05  # jumprelu: by which the threshold follows k, per step
    gamma_rate: Rate = 0.01  # relu: by which θ3 follows k, per step
    theta_rule: Literal["descent", "ascent"] = "descent"  # of L_pen, by the learned θ
    density_penalty: NonNegativeFloat = 0.0  # φ: selected features cost as often as they fire
    curriculum: bool = True  # False: no selection, all active features reconstruct (k_min = 1)
    k_min: PositiveInt = 16  # features selected per token at the end of the curriculum; SAELens' k
    k_start_factor: PositiveFloat = 2.0  # the curriculum starts at k_start = k_start_factor · k_min
    curriculum_fraction: Part = 0.1  # part of training after which k_t = k_min

    # Training.
    seeds: tuple[NonNegativeInt, ...] = (0,)  # each sets initialization and the order of the tokens
    training_tokens: PositiveInt = 1_200_000
    budget_minutes: PositiveFloat | None = None  # training is shortened once to what fits into it
    batch: PositiveInt = 512  # tokens per step
    lr: PositiveFloat = 1.5e-3  # learning rate of weights and biases
    lr_warmup: Part = 0.2  # part of training over which it rises from 0, while θ settles
    lr_decay: Part = 0.2  # part of training, at the end, over which it falls to 0
    theta_lr: PositiveFloat = 1e-2  # learning rate of θ: no warm-up, no decay
    dead_feature_window: PositiveInt = 10_000  # tokens without firing that make a feature dead
    resample: bool = True  # bring dead features back, until the learning rate decays
    resample_every: PositiveInt = 1  # steps between two looks for them
    buffer_tokens: PositiveInt = 262_144  # activations per layer held, and shuffled, at once
    harvest_contexts: PositiveInt = 16  # contexts per forward pass of the language model
    log_every: PositiveInt = 20  # steps between lines of train_log.jsonl
    track: Literal["", "wandb", "tensorboard"] = ""  # where these lines are logged, too; SAE_TRACK

    # Evaluation, by SAE-Bench.
    core_text: str = "tinylm"  # as training_text; "tinylm": its held-out text
    core_prompts: PositiveInt = 16  # contexts per batch
    core_reconstruction_batches: PositiveInt = 10
    core_sparsity_batches: PositiveInt = 40
    probe_sets: tuple[str, ...] = ("tinylm/B",)  # data sets; "tinylm/A": for choosing, B: to report
    probe_train: Annotated[int, Field(ge=4)] = 300  # SAE-Bench's probe_train_set_size
    probe_test: Annotated[int, Field(ge=4)] = 200  # half of it, as of probe_train, per class
    probe_ks: tuple[PositiveInt, ...] = (1, 2, 5, 10, 20, 50)
    probe_llm_batch: PositiveInt = 32
    probe_sae_batch: PositiveInt = 125
    probe_seed: NonNegativeInt = 42
    extra_evals: tuple[str, ...] = ()  # SAE-Bench's: sae_probes, absorption, scr, tpp, autointerp
    sae_probes_sets: tuple[str, ...] = ()  # data sets of sae_probes; none: all 113, for hours
    compare_to: str = "run_1"  # the run that the verdict compares this one to

    def __post_init__(self) -> None:
        """What a field's own type can't say."""
        selects = self.curriculum and self.loss_variant == "contrastive"
        batch, different = f"at least batch = {self.batch}", "one or more, all different"
        must_hold(self, {
            "layers": (0 < len(self.layers) == len({*self.layers}), different),
            "seeds": (0 < len(self.seeds) == len({*self.seeds}), different),
            "k_min": (self.k_min <= self.d_sae, f"at most d_sae = {self.d_sae}"),
            "training_tokens": (self.training_tokens >= self.batch, batch),
            "buffer_tokens": (self.buffer_tokens >= self.batch, batch),
            "activation": (selects or self.activation == "topk",
                           "'topk' where nothing is selected (curriculum, loss_variant)"),
            "probe_sets": (self.probe_sets, "one or more data sets"),
            "probe_ks": ({1, 2, 5} <= {*self.probe_ks} and max(self.probe_ks) <= self.d_sae,
                         f"at most d_sae = {self.d_sae}, with 1, 2 and 5 among them"),
        })  # fmt: skip


GPU = torch.cuda.is_available()
PROFILES: dict[str, dict[str, Any]] = {  # under a run's name: what that run has otherwise there
    "tinylm": dict(trainers=TUNED),  # the defaults above, and SAELens' trainers' own
    "smollm2": dict(model="smollm2", training_text="smollm2", core_text="smollm2",  # of packages
        first_positions=2, layers=(9, 14, 19), d_sae=4608, k_min=32, lr=1e-3, theta_lr=5e-2,
        training_tokens=4_000_000 if GPU else 400_000, buffer_tokens=131_072, core_prompts=8,
        dead_feature_window=60_000, core_reconstruction_batches=2, core_sparsity_batches=20,
        run_10=dict(lr=1.5e-3, dead_feature_window=60_000),
        probe_sets=("smollm2/B",), **{f"run_{i}": dict(seeds=(0, 1, 2)) for i in (2, 3, 6, 9)}),
    "gemma-2-2b": dict(
        model="google/gemma-2-2b", lm_dtype="bfloat16", layers=(5, 12, 19), budget_minutes=110.0,
        training_text="monology/pile-uncopyrighted", training_tokens=50_000_000, d_sae=2304,
        k_min=64, k_start_factor=4.0, curriculum_fraction=0.3, batch=2048, lr=3e-4, lr_warmup=0.02,
        dead_feature_window=2_500_000, resample_every=20, harvest_contexts=64, log_every=100,
        core_text="Skylion007/openwebtext", core_reconstruction_batches=200,
        core_sparsity_batches=2000, probe_train=4000, probe_test=1000,
        probe_sets=(*(f"LabHC/bias_in_bios_class_set{n}" for n in (1, 2, 3)),
            *(f"canrager/amazon_reviews_mcauley_1and5{of}" for of in ("", "_sentiment")),
            "codeparrot/github-code", "fancyzhx/ag_news", "Helsinki-NLP/europarl")),
}  # fmt: skip

THREE, FIVE = (0, 1, 2), (0, 1, 2, 3, 4)  # seeds

# --out_dir=run_3 runs PLAN["run_3"]; PLAN |= sweep("k", k_min=(8, 16)) adds run_k_8 and run_k_16.
PLAN: dict[str, dict[str, Any]] = {
    "run_1": dict(description="the full method", seeds=FIVE),
    "run_2": dict(description="fixed temperatures", tau_sel=0.3, tau_pen=0.1, seeds=FIVE),
    "run_3": dict(description="fixed loss weight", gamma=0.15, seeds=FIVE),
    "run_4": dict(description="stronger regularization", reg_lambda=0.1, seeds=THREE),
    "run_5": dict(description="no curriculum", curriculum=False, seeds=THREE),
    "run_6": dict(description="full ablation", tau_sel=0.3, tau_pen=0.1, gamma=0.15,
                  curriculum=False, seeds=FIVE),
    "run_7": dict(description="the loss as first written", loss_variant="as_written",
                  curriculum=False, seeds=THREE),
    "run_8": dict(description="adaptation of the selection alone", tau_pen=0.15, gamma=0.15,
                  seeds=THREE),
    "run_9": dict(description="adaptation against its end point", constants_from_run="run_1",
                  seeds=FIVE),
    # Found on tinylm; smollm2 has an lr and a dead_feature_window of its own; elsewhere a guess.
    "run_10": dict(description="best form found: threshold, cost by frequency",
                   activation="jumprelu", tau_sel=0.3, tau_pen=0.15, gamma=0.0,
                   density_penalty=0.01, k_start_factor=1.0, lr=6e-3, lr_warmup=0.05,
                   dead_feature_window=30_000, seeds=FIVE),
}  # fmt: skip

# ---- THE METHOD: the SAE, its loss, its curriculum ----------------------------------------------

# The scalars that can be learned, low + width · σ(θ): name, θ, low, width.
LEARNED_SCALARS = {
    "tau_sel": ("theta_1", 0.1, 0.4),
    "tau_pen": ("theta_2", 0.05, 0.2),
    "gamma": ("theta_3", 0.0, 0.3),
}


class CustomSAE(BaseSAE):
    """The parametric contrastive SAE.

        f     = ReLU((x − b_dec) W_enc + b_enc)                  features, (…, F)
        x̂     = Σ_{i ∈ S} f_i W_dec[i] + b_dec                   reconstruction, (…, D)
        τ_sel = 0.1 + 0.4 σ(θ1),  τ_pen = 0.05 + 0.2 σ(θ2),  γ = 0.3 σ(θ3)

    S holds the `k` largest features of x, or those above `threshold`; without either there is no
    selection and S holds all active ones. W_enc is (D, F), W_dec (F, D) with rows of unit norm.

    Args:
        d_in, d_sae: D and F. hook_layer: the layer that it reads.
        k: features that `encode` keeps of each token, or None.
        by_threshold: `encode` keeps what is above `threshold`, a number that `Trainer` moves.
        fixed: values of tau_sel, tau_pen or gamma that are constants; the others are learned.
        norm_scaling_factor: s with E‖s x‖² = D, by which training multiplies activations.
    """

    def __init__(
        self, d_in: int, d_sae: int, model_name: str, hook_layer: int,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
        k: int | None = None, fixed: dict[str, float] | None = None,
        norm_scaling_factor: float = 1.0, by_threshold: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(d_in, d_sae, model_name, hook_layer, torch.device(device), dtype)
        self.k = k
        self.fixed = dict(fixed or {})
        self.norm_scaling_factor = norm_scaling_factor
        for name, (theta, _, _) in LEARNED_SCALARS.items():
            zero = torch.zeros((), device=device, dtype=dtype)
            self.register_parameter(theta, None if name in self.fixed else nn.Parameter(zero))
        zero = torch.zeros((), device=device, dtype=dtype) if by_threshold else None
        self.register_buffer("threshold", zero)
        self.cfg.architecture = "parametric_contrastive"
        self.cfg.activation_fn_str = "jumprelu" if by_threshold else "relu" if k is None else "topk"
        self.cfg.apply_b_dec_to_input = True

    def scalar(self, name: str) -> Tensor:
        """tau_sel, tau_pen or gamma: differentiable in its θ unless it is fixed."""
        if name in self.fixed:
            return self.W_enc.new_full((), self.fixed[name])
        theta, low, width = LEARNED_SCALARS[name]
        return low + width * torch.sigmoid(getattr(self, theta))

    def thetas(self) -> list[nn.Parameter]:
        """The learned θ that gradients move."""
        thetas = [getattr(self, theta) for theta, *_ in LEARNED_SCALARS.values()]
        return [theta for theta in thetas if theta is not None and theta.requires_grad]

    @torch.no_grad()
    def learned_scalars(self) -> dict[str, Tensor | None]:
        """tau_sel, tau_pen, gamma, their w = γ τ_pen, and the θ (None where there is none)."""
        record = {name: self.scalar(name) for name in LEARNED_SCALARS}
        record["w"] = record["gamma"].double() * record["tau_pen"].double()
        thetas = {theta: getattr(self, theta) for theta, *_ in LEARNED_SCALARS.values()}
        return record | {name: None if p is None else p.clone() for name, p in thetas.items()}

    @torch.no_grad()
    def initialize(self, seed: int, mean_D: Tensor) -> None:
        """W_dec rows random of unit norm, W_enc = W_decᵀ, b_enc = 0, b_dec = `mean_D`."""
        generator = torch.Generator().manual_seed(seed)
        W_dec = torch.randn(self.W_dec.shape, generator=generator)
        self.W_dec.copy_(W_dec / W_dec.norm(dim=1, keepdim=True))
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.b_dec.copy_(mean_D)

    def preactivations(self, x: Tensor, sparse: bool = False) -> Codes:
        """(x − b_dec) W_enc + b_enc, of all features of x (…, D).

        With `sparse`, of the active ones of x (B, D) alone, where they are few.
        """
        # Where nothing is penalised, what the threshold leaves out does not enter the loss.
        above = self.threshold if self.fixed.get("gamma") == 0 else None

        def active(pre_BF: Tensor) -> Tensor:
            acts_BF = self.activation_fn(pre_BF)
            return acts_BF != 0 if above is None else acts_BF > above

        return preactivations(x, self.W_enc, self.b_enc, self.b_dec, active if sparse else None)

    def activation_fn(self, pre: Tensor) -> Tensor:
        """The feature of a preactivation: elementwise, rising, linear in the scale of its input."""
        return torch.relu(pre)

    def encode(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, F): the features, of which the selected are kept."""
        pre = self.preactivations(x)
        f = pre.map(self.activation_fn)
        if self.k is None and self.threshold is None:
            return f.acts
        # The k largest before the activation, as in SAELens: bfloat16 has ties, and zeros change
        # who wins them.
        by = pre if self.threshold is None else f
        return f.only(select(by, self.k, self.threshold)).acts

    def decode(self, feature_acts: Tensor | Codes) -> Tensor:
        """(…, F) -> (…, D)."""
        codes = feature_acts if isinstance(feature_acts, Codes) else Codes(feature_acts)
        return codes.decode(self.W_dec) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, D): the reconstruction."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Rows of W_dec back to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Takes from W_dec's gradient what would only change the norm of its rows."""
        grad = self.W_dec.grad
        grad.addcmul_((grad * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)

    @torch.no_grad()
    def fold_activation_norm_scaling(self) -> CustomSAE:
        """The same SAE for activations in raw units.

        f is linear in the scale: with b_enc, b_dec and threshold divided by it, raw activations
        give features and reconstructions in raw units. A ValueError where `activation_fn` isn't.
        """
        s, x = self.norm_scaling_factor, torch.linspace(-4, 4, 99)
        if not torch.allclose(self.activation_fn(s * x), s * self.activation_fn(x), atol=1e-5):
            raise ValueError("activation_fn(s x) is not s activation_fn(x): fold s otherwise here")
        raw = copy.deepcopy(self)
        for shifted in (raw.b_enc, raw.b_dec, raw.threshold):
            if shifted is not None:
                shifted.div_(s)
        raw.norm_scaling_factor = 1.0
        return raw


def select(f: Codes, k: int | None, threshold: Tensor | None = None) -> Tensor:
    """S: the k largest features of each token, as places; those above a threshold, as a mask."""
    return f.largest(k) if threshold is None else f.above(threshold)


@dataclass
class Loss:
    """The loss of one batch, its parts as they enter it (scalars), and what the parts came from."""

    total: Tensor
    reconstruction: Tensor
    penalty: Tensor  # γ L_pen
    reg: Tensor  # L_reg
    density: Tensor  # φ L_density
    selected: Codes  # the features that reconstruct
    unselected: Codes  # those that are penalised
    residual_BD: Tensor  # x − x̂


def contrastive_loss(
    sae: CustomSAE, x_BD: Tensor, k: int | None, reg_lambda: float,
    loss_variant: str = "contrastive", sparse: bool = False, cost_F: Tensor | None = None,
) -> Loss:  # fmt: skip
    """The loss on a batch of scaled activations (docs/method.md, The loss).

        L_pen = τ_pen · mean over tokens of Σ_{i ∉ S} tanh(f_i / τ_sel)
        L_reg = λ Σ over the learned θ of θ²
        loss  = mean over tokens of ‖x − x̂‖² / D  +  γ L_pen  +  L_reg  [+  φ L_density]
        L_density = mean over tokens of Σ_{i ∈ S} p_i f_i,  p_i the part of tokens with i in S

    Args:
        x_BD: (B, D), with E‖x‖² = D.
        k: S is the k largest features, or those above the SAE's threshold. None: no selection;
            every active feature reconstructs, all but the strongest are penalised.
        loss_variant: "as_written" is the method as first written down, an ablation: no selection,
            tanh(f / τ_sel) averaged over tokens and features alike, reconstruction mean ‖x − x̂‖.
        sparse: f or S holds the active features alone, where few (`Codes`). Sums over features
            are right in both layouts, means are not: `f.dense()` is always (B, F).
        cost_F: φ p, constants; None: no L_density.
    """
    tau_sel, tau_pen, gamma = (sae.scalar(name) for name in LEARNED_SCALARS)
    f = sae.preactivations(x_BD, sparse).map(sae.activation_fn)
    if loss_variant == "as_written":
        selected, unselected = f, f
    elif k is None:
        selected, unselected = f, f.without(f.largest(1))
    else:
        selected, unselected = f.split(select(f, k, sae.threshold), sparse)
    residual_BD = x_BD - sae.decode(selected)
    # A division would have a backward of twice the passes.
    saturated = unselected.map(lambda acts: torch.tanh(acts * (1 / tau_sel)))
    penalty = gamma * tau_pen * saturated.sum_over_features().mean()
    if loss_variant == "as_written":
        reconstruction, penalty = residual_BD.norm(dim=-1).mean(), penalty / sae.cfg.d_sae
    else:
        reconstruction = residual_BD.pow(2).mean()
    reg = reg_lambda * sum((theta**2 for theta in sae.thetas()), torch.zeros_like(gamma))
    density = torch.zeros_like(gamma)
    if cost_F is not None:
        density = selected.weighted(cost_F).sum_over_features().mean()
    total = reconstruction + penalty + reg + density
    return Loss(total, reconstruction, penalty, reg, density, selected, unselected, residual_BD)


def k_at(settings: Settings, progress: float) -> int | None:
    """k_t, from k_start log-linearly to k_min; None: no selection. `progress`: part of training."""
    if not settings.curriculum or settings.loss_variant == "as_written":
        return None
    k_min, fraction = settings.k_min, settings.curriculum_fraction
    if progress >= fraction:
        return k_min
    k_start = min(round(settings.k_start_factor * k_min), settings.d_sae)
    k, step = k_start * (k_min / k_start) ** (progress / fraction), max(1, k_min // 32)
    return k_min + step * round((k - k_min) / step)  # in steps: on a GPU each k takes a graph


def lr_factor(progress: float, warmup: float, decay: float) -> float:
    """The learning rate's factor: up to 1 over `warmup`, down to 0 over the last `decay`."""
    rise = progress / warmup if progress < warmup else 1.0
    fall = (1.0 - progress) / decay if progress > 1.0 - decay else 1.0
    return min(rise, fall)


# ---- THE ACTIVATION BUFFER ----------------------------------------------------------------------


class ActivationBuffer:
    """Activations of the run's layers in the order of the text, of the tokens that count."""

    def __init__(self, run: Run, stream: TokenStream) -> None:
        self.lm, self.stream, s = run.language_model, stream, run.settings
        self.layers, self.contexts, self.first = s.layers, s.harvest_contexts, s.first_positions
        self.cache = ActivationCache(run, stream, self.harvest)
        self.leftover_LND: Tensor | None = None  # harvested, not yet handed out

    def harvest(self, n_passes: int) -> list[Tensor]:
        """The activations of the next forward passes, (layers, N, D) of each."""
        passes = self.stream.contexts(n_passes * self.contexts).split(self.contexts)

        def one_pass(tokens_BL: Tensor) -> Tensor:
            keep_BL = counted(tokens_BL, self.lm.special_token_ids, self.first)
            acts = self.lm.activations(tokens_BL, self.layers)
            return torch.stack([acts_BLD[keep_BL.to(acts_BLD.device)] for acts_BLD in acts])

        return in_order(one_pass, passes, self.lm.hf.device, of_all_ranks=True)

    def next_tokens(self, n: int, advance: Callable[[int], None] = lambda n: None) -> Tensor:
        """The activations of the next n tokens: (layers, n, D), on the model's device.

        `advance` is called with the number of tokens that forward passes have added.
        """
        hf, have = self.lm.hf, 0
        shape = (len(self.layers), n, self.lm.d_model)
        taken_LND = torch.empty(shape, device=hf.device, dtype=hf.dtype)
        parts = [] if self.leftover_LND is None else [self.leftover_LND]
        while have < n:
            if not parts:
                per_pass = self.contexts * (self.stream.context - self.first)
                n_passes = max(1, (n - have) // per_pass)
                parts = self.cache.passes(n_passes)
                advance(sum(part.shape[1] for part in parts))
            part = parts.pop(0).to(hf.device)
            taken_LND[:, have : have + part.shape[1]] = part[:, : n - have]
            rest = part[:, n - have :]
            have += part.shape[1]
        self.leftover_LND = torch.cat([rest, *(part.to(hf.device) for part in parts)], dim=1)
        return taken_LND

    def state_dict(self) -> dict[str, Any]:
        """Where the text stands, and what is harvested and not handed out."""
        return {"cache": self.cache.state_dict(), "leftover": self.leftover_LND}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another buffer on the same text stood."""
        self.cache.load_state_dict(state["cache"])
        leftover = state["leftover"]
        self.leftover_LND = None if leftover is None else leftover.to(self.lm.hf.device)


# ---- TRAINING -----------------------------------------------------------------------------------


Key = tuple[int, int]  # layer and seed
sae_name = "layer_{}_seed_{}".format  # of layer and seed: what an SAE is called in results


class Schedule(NamedTuple):
    """All that a step is given beside its batch: what depends on how far training is."""

    lr: float | Tensor  # of weights and biases
    k: int | None  # k_t
    resample: bool  # look for dead features


class Trainer:
    """One SAE, in float32, and what its training needs; `autocast`: products in bfloat16.

    On a GPU a step is captured as a graph (`harness.gpu`): there it reads no value back, no shape
    depends on the data, and what changes is changed in place.
    """

    def __init__(self, sae: CustomSAE, settings: Settings, seed: int, autocast: bool = False):
        self.sae, self.settings, self.autocast = sae, settings, autocast
        self.dual = sae.theta_3 if settings.activation == "relu" else None  # it holds L0 at k
        if self.dual is not None:
            self.dual.requires_grad_(False)
        groups = [{"params": [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec], "lr": settings.lr}]
        if sae.thetas():
            groups.append({"params": sae.thetas(), "lr": settings.theta_lr})
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=on_gpu(sae.W_enc))
        self.n_forward_passes_since_fired = torch.zeros_like(sae.b_enc, dtype=torch.int64)
        # How often each feature fires, over the last 50 steps or so, where that has a cost.
        self.firing_rate_F = torch.zeros_like(sae.b_enc)
        self.generator = torch.Generator(sae.W_enc.device).manual_seed(seed)
        self.threshold_started = False
        self.fast: tuple[str, ...] | None = ()  # the forms in which the loss is found right

    def dead(self) -> Tensor:
        """(F,) bool: features that reconstructed nothing for `dead_feature_window` tokens."""
        n_tokens_F = self.n_forward_passes_since_fired * self.settings.batch
        return n_tokens_F >= self.settings.dead_feature_window

    def at(self, step: int, n_steps: int) -> Schedule:
        """What step number `step` of `n_steps` is given."""
        s, progress = self.settings, step / n_steps
        resample = s.resample and progress < 1 - s.lr_decay and step % s.resample_every == 0
        lr = s.lr * lr_factor(progress, s.lr_warmup, s.lr_decay)
        return Schedule(lr, k_at(s, progress), resample)

    def step(self, x_BD: Tensor, at: Schedule, log: bool) -> tuple[Tensor, dict | None]:
        """One step on raw activations (B, D); the loss, and the step's record if `log`."""
        settings, sae = self.settings, self.sae
        x_BD = x_BD.to(sae.W_enc.dtype) * sae.norm_scaling_factor
        self.start_threshold(x_BD, at.k)
        cost_F = settings.density_penalty * self.firing_rate_F if settings.density_penalty else None
        k = None if settings.activation == "relu" else at.k
        given = k, settings.reg_lambda, settings.loss_variant

        def loss_of(fast: bool) -> Loss:
            loss = compiled(contrastive_loss, x_BD.device) if fast else contrastive_loss
            return loss(sae, x_BD, *given, fast, cost_F)

        with torch.autocast(x_BD.device.type, torch.bfloat16, enabled=self.autocast):
            loss, self.fast = fast_if_gradients_match(self.fast, loss_of, [*sae.parameters()])
        self.optimizer.zero_grad()
        loss.total.backward()
        if settings.theta_rule == "ascent":  # L_reg is still descended
            for theta in sae.thetas():
                theta.grad.neg_().add_(theta.detach(), alpha=4 * settings.reg_lambda)
        sae.remove_parallel_gradient()
        self.optimizer.param_groups[0]["lr"] = at.lr
        record = self.record(loss, x_BD, at) if log else None
        self.optimizer.step()
        sae.normalize_decoder()
        self.hold_l0(loss, at.k)
        self.n_forward_passes_since_fired.add_(1).masked_fill_(loss.selected.fired(), 0)
        if cost_F is not None:
            self.firing_rate_F.lerp_(loss.selected.counts() / len(x_BD), 0.02)
        if at.resample:
            self.resample(loss.residual_BD.detach())
        return loss.total.detach(), record

    @torch.no_grad()
    def start_threshold(self, x_BD: Tensor, k: int | None) -> None:
        """Before the first step: k features per token of this batch are above the threshold."""
        if self.sae.threshold is None or self.threshold_started:
            return
        self.threshold_started = True
        acts_N = self.sae.preactivations(x_BD).map(self.sae.activation_fn).acts.flatten()
        largest = acts_N.kthvalue(max(len(acts_N) - k * len(x_BD), 1)).values
        self.sae.threshold.copy_(largest.clamp(min=1e-6))

    @torch.no_grad()
    def hold_l0(self, loss: Loss, k: int | None) -> None:
        """Moves the multiplier of the constraint L0 = k: up while L0 is too high, else down.

        It is the threshold, or θ3 where all active features reconstruct.
        """
        if self.sae.threshold is None and self.dual is None:
            return
        excess = (loss.selected.n_active().sum() / len(loss.residual_BD) / k - 1).clamp(max=1.0)
        if self.dual is not None:
            self.dual.add_(self.settings.gamma_rate * excess).clamp_(-6, 6)  # σ: 0.002, 0.998
        else:
            self.sae.threshold.mul_(torch.exp(self.settings.threshold_rate * excess))

    @torch.no_grad()
    def resample(self, residual_BD: Tensor) -> None:
        """Points dead features at what badly reconstructed tokens lack, x − x̂.

        After Bricken et al. 2023 ("Towards Monosemanticity", appendix, neuron resampling), with
        tokens drawn in proportion to their squared loss; but at every step, as features die. Where
        L0 is held they get the others' mean bias: without one they are active on many tokens, and
        what holds L0 rises and silences others, which are resampled in turn.
        """
        sae, dead_F, n_at_once = self.sae, self.dead(), len(residual_BD)
        if not on_gpu(dead_F) and not (n_at_once := min(int(dead_F.sum()), n_at_once)):
            return
        at_N = (~dead_F).byte().argsort(stable=True)[:n_at_once]  # dead ones first
        dead_N, odds_B = dead_F[at_N], residual_BD.pow(2).sum(-1).pow(2)
        # As torch.multinomial draws without replacement.
        odds_B = odds_B / torch.empty_like(odds_B).exponential_(generator=self.generator)
        directions_ND = residual_BD[odds_B.topk(len(at_N)).indices]
        directions_ND = directions_ND / directions_ND.norm(dim=1, keepdim=True)
        encoder_DN = directions_ND.T * sae.W_enc.norm(dim=0).mean()
        bias = torch.zeros_like(sae.b_enc[0])
        if self.settings.activation != "topk":
            bias = sae.b_enc.where(~dead_F, 0.0).sum() / (~dead_F).sum().clamp(min=1)
        replace_entries(self.optimizer, sae.W_dec, (at_N,), dead_N[:, None], directions_ND)
        replace_entries(self.optimizer, sae.W_enc, (slice(None), at_N), dead_N, encoder_DN)
        replace_entries(self.optimizer, sae.b_enc, (at_N,), dead_N, bias)
        passes_N = self.n_forward_passes_since_fired[at_N]
        self.n_forward_passes_since_fired[at_N] = torch.where(dead_N, 0, passes_N)

    @torch.no_grad()
    def record(self, loss: Loss, x_BD: Tensor, at: Schedule) -> dict[str, Any]:
        """What train_log.jsonl says of this batch, before its step: numbers, or tensors of one."""
        parts = ["reconstruction", "penalty", "reg"]
        parts += ["density"] if self.settings.density_penalty else []
        threshold, variance = self.sae.threshold, (x_BD - x_BD.mean(0)).pow(2).sum()
        return {
            "loss": loss.total,
            **{f"loss_{part}": getattr(loss, part) for part in parts},
            **self.sae.learned_scalars(),
            "k_t": at.k,
            **({} if threshold is None else {"threshold": threshold.clone()}),
            "l0": loss.selected.n_active().float().mean(),
            "fvu": loss.residual_BD.pow(2).sum() / variance,
            "dead_fraction": self.dead().float().mean(),
            "lr": at.lr,
        }


def new_sae(
    settings: Settings, layer: int, seed: int, stats: ActivationStats, fixed: dict[str, float],
    k: int | None, by_threshold: bool = False,
) -> CustomSAE:  # fmt: skip
    """An initialized SAE for a layer's activations, on their device. See `CustomSAE`."""
    mean_D, factor = stats
    shape = (len(mean_D), settings.d_sae, settings.model, layer, mean_D.device)
    options = dict(fixed=fixed, norm_scaling_factor=factor, by_threshold=by_threshold)
    seed_generators(layer, seed)  # for what an edit may draw without a generator of its own
    sae = CustomSAE(*shape, k=None if by_threshold else k, **options)
    sae.initialize(seed, mean_D * factor)
    sae.cfg.hook_name = hook_name(settings.hook, layer)
    sae.cfg.context_size = settings.context
    sae.cfg.dataset_path = settings.training_text
    return sae


def new_trainers(run: Run, stats: dict[int, ActivationStats], fixed: dict) -> dict[Key, Any]:
    """A trainer per layer and seed. See `ActivationStats`, `constants` and `Trainer`."""
    if run.settings.trainer != "contrastive":
        return peer_trainers(run, stats, fixed)
    s, by_threshold = run.settings, run.settings.activation == "jumprelu"
    k = None if s.activation == "relu" else k_at(s, progress=1.0)
    trainers = {}
    for (layer, seed), values in fixed.items():
        sae = new_sae(s, layer, seed, stats[layer], values, k, by_threshold)
        trainers[layer, seed] = Trainer(sae, s, seed, run.train_dtype == "bfloat16")
    return trainers


@dataclass
class Training:
    """What training leaves. Keys are (layer, seed), or the layer alone."""

    saes: dict[Key, CustomSAE]
    stats: dict[int, ActivationStats]
    log: TrainingLog


def train(run: Run, buffer: ActivationBuffer) -> Training:
    """Trains an SAE per layer and seed, all on the same text and the same forward passes.

    With `budget_minutes`, the total is reduced once, after 5% of it, if training and evaluation
    would not fit. Goes on from what an earlier attempt has saved, to the same weights.
    """
    s, device, fixed = run.settings, buffer.lm.hf.device, run.constants(tuple(LEARNED_SCALARS))
    shuffles = {seed: torch.Generator().manual_seed(seed) for seed in s.seeds}
    stats: dict[int, ActivationStats] = {}
    trainers: dict[Key, Any] = {}
    checkpoints = run.checkpoints(train=train, buffer=buffer, constants=fixed)
    saved = checkpoints.load() or {}
    path = run.out_dir / "train_log.jsonl"
    with checkpoints, TrainingLog(s, path, saved.get("log"), given=run) as log:
        if saved:
            stats = {at: ActivationStats(m.to(device), f) for at, (m, f) in saved["stats"].items()}
            trainers = new_trainers(run, stats, fixed)
            checkpoints.restore(trainers=trainers, shuffles=shuffles)
            buffer.load_state_dict(saved["buffer"])
        while steps := log.next_steps():
            with log.timing("seconds_harvest"):
                acts_LND = None  # not two fillings at once
                trim_memory()
                acts_LND = buffer.next_tokens(len(steps) * s.batch, log.progress.advance)
            with log.timing("seconds_training"):
                if not trainers:
                    stats = {at: ActivationStats.of(a_ND) for at, a_ND in zip(s.layers, acts_LND)}
                    trainers = new_trainers(run, stats, fixed)
                take_steps(s, trainers, acts_LND, shuffles, steps, log)
            if decided := log.is_budget_due():
                raw = {k: t.sae.fold_activation_norm_scaling() for k, t in trainers.items()}
                log.fit_budget(run.evaluation_seconds(raw))
            if decided or checkpoints.due() or log.part == 1:
                state = {
                    "log": log.state(),
                    "stats": {layer: tuple(values) for layer, values in stats.items()},
                    "buffer": buffer.state_dict(),
                }
                checkpoints.save(state, log.part, trainers=trainers, shuffles=shuffles)
    return Training({key: trainer.sae for key, trainer in trainers.items()}, stats, log)


# ---- EVALUATION, by SAE-Bench -------------------------------------------------------------------


def core_metrics(sae: Any, store: Any, model: Any, config: Any, ignored: set) -> tuple[dict, dict]:
    """SAE-Bench's core evaluation of one SAE: scalars by group, and metrics by feature.

    The batches of `store` and the passes of `model` are shared by all SAEs. `features` has a list
    over the features by name, such as feature_density. A number added to a group of `scalars` goes
    to final_info.json. (`multiple_evals` loads the model by name and swallows every exception.)
    """
    from sae_bench.evals.core import main as core

    scalars, features = core.run_evals(sae, store, model, config, ignore_tokens=ignored)
    scalars["misc_metrics"] = core.calculate_misc_metrics(features)
    return scalars, features


def probe(acts: tuple[dict[str, Tensor], ...], who: str, ks: tuple[int, ...]) -> dict[str, dict]:
    """SAE-Bench's probes on mean activations, in SAE-Bench's order: {metric: {class: accuracy}}.

    Args:
        acts: of the train and of the test texts, {class: (N, D or F)}.
        who: "sae" or "llm", as the metrics' names begin.
    """
    from sae_bench.evals.sparse_probing import probe_training

    accuracies = {}
    on_all = dict(use_sklearn=False, batch_size=250, epochs=100, lr=1e-2)
    for k in (None, *ks):
        name, options = (f"top_{k}_", {"select_top_k": k}) if k else ("", on_all)
        _, by_class = probe_training.train_probe_on_activations(*acts, **options)
        accuracies[f"{who}_{name}test_accuracy"] = by_class
    return accuracies


def evaluate(run: Run, training: Training) -> tuple[dict[str, dict], dict[str, float]]:
    """Scores every SAE and an untrained one: {kind: {name: results}}, and each kind's seconds.

    The untrained SAE has the same initialization, width and L0 (it keeps as many features per
    token as the trained one has active). Its name ends in "_untrained".
    """
    s, saes = run.settings, {}
    n_batches = s.core_reconstruction_batches + s.core_sparsity_batches
    trained = {key: sae.fold_activation_norm_scaling() for key, sae in training.saes.items()}
    with run.stage("core evaluation", n_batches, "batches") as timed:
        l0 = mean_l0(trained, run.sae_bench_model, s)
        for (layer, seed), sae in trained.items():
            k = min(max(round(l0[layer, seed]), 1), s.d_sae)
            untrained = new_sae(s, layer, seed, training.stats[layer], {}, k)
            name = sae_name(layer, seed)
            saes |= {name: sae, f"{name}_untrained": untrained.fold_activation_norm_scaling()}
        core = core_evaluation(run, saes, core_metrics, timed.advance)
    seconds = {"seconds_core": timed.seconds()}
    n_probed = len(run.probe_texts) * len(saes)
    with run.stage("sparse probing", n_probed, "SAEs x sets") as timed:
        probing = sparse_probing(run, saes, probe, timed)
    seconds["seconds_sparse_probing"] = timed.seconds()
    extra, seconds_extra = extra_evaluations(run, saes)
    scores = {"core": core, "probing": probing, "extra": extra}
    check_results(saes, scores, s, run.out_dir)
    return scores, seconds | seconds_extra


# ---- RECORDS ------------------------------------------------------------------------------------

SHOWN = (  # in the block that a run's output ends with
    "l0", "fvu", "ce_loss_score", "frac_alive", "sae_top_1_test_accuracy",
    "sae_top_5_test_accuracy", "untrained_top_5_test_accuracy", "llm_top_5_test_accuracy",
    *LEARNED_SCALARS)  # fmt: skip


def figures_of(key: Key, training: Training, scores: dict[str, dict]) -> dict[str, float]:
    """The figures of one SAE, for final_info.json."""
    name, last = sae_name(*key), training.log.last[key]
    core, probing = scores["core"], scores["probing"]
    untrained = probing[f"{name}_untrained"]
    figures = core[name] | probing[name] | scores["extra"][name]
    figures |= {f"untrained_{m[4:]}": v for m, v in untrained.items() if m.startswith("sae_")}
    for metric in ("l0", "ce_loss_score", "fvu"):
        figures[f"untrained_{metric}"] = core[f"{name}_untrained"][metric]
    own = (*LEARNED_SCALARS, "w", "dead_fraction", *(m for m in last if m.startswith("loss")))
    return figures | {metric: last[metric] for metric in own if metric in last}


# ---- MAIN ---------------------------------------------------------------------------------------


def main(run: Run) -> None:
    """Trains the SAEs on the language model's activations, scores them, records what came out."""
    texts = documents(run.settings.training_text, "train")
    with TokenStream(texts, run.language_model.tokenizer, run.settings.context) as stream:
        training = train(run, ActivationBuffer(run, stream))
    export_saes(run, training.saes)
    scores, seconds = evaluate(run, training)
    figures = {key: figures_of(key, training, scores) for key in training.saes}
    write_records(run, figures, SHOWN, training.log, seconds)


if __name__ == "__main__":
    sys.exit(launch(main, Settings, PROFILES, PLAN, core_metrics, probe))
