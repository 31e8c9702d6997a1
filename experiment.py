"""Train a parametric contrastive sparse autoencoder (SAE), score it with SAE-Bench, record it.

    python experiment.py --out_dir=run_i

configuration -> language model -> activation buffer -> trainer -> evaluation -> records.
Edit anything here; `harness.py` holds the plumbing that nobody edits. In names of tensors,
B is tokens or batch, L sequence, D model dimension, F features, K selected features, N rows.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when the libraries start: the same seed on the same machine gives the same weights.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from sae_bench.custom_saes.base_sae import BaseSAE
from torch import Tensor, nn

import harness
from harness import ExperimentError

# =============================================================================================
# SETTINGS AND PLAN: edit these directly
# =============================================================================================


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on. `PROFILES` and `PLAN` below override these defaults."""

    description: str = "defaults"  # what the run tests, for tables and figures

    # The language model and its text.
    model: str = "tinylm"  # a Hugging Face name or folder; "tinylm": the built-in model
    lm_dtype: str = "float32"  # the precision of the language model in evaluation
    train_dtype: str = "auto"  # of training's matrix products; "auto": what the hardware has
    layers: tuple[int, ...] = (1, 2, 4)  # SAEs read blocks.L.hook_resid_post
    context: int = 128  # tokens per context, BOS first
    training_text: str = "tinylm"  # a data set with a "text" column; "tinylm": its corpus
    device: str = "auto"  # "auto", "cpu" or "cuda"

    # The SAE and its loss (DESIGN: the method).
    d_sae: int = 1024  # F, the number of features
    form: str = "contrastive"  # "contrastive", or "as_written": the loss as first written down
    tau_sel: float | None = None  # selection temperature; None: learned in (0.1, 0.5)
    tau_pen: float | None = None  # penalty temperature; None: learned in (0.05, 0.25)
    gamma: float | None = None  # loss weight; None: learned in (0, 0.3)
    fix_at: str | None = None  # fix all three at the final values of this run, layer by layer
    reg_lambda: float = 0.01  # λ of L_reg, on the learned θ
    curriculum: bool = True  # False: no selection, all active features reconstruct (k_min = 1)
    k_min: int = 16  # features selected per token at the end of the curriculum
    k_start_factor: float = 2.0  # the curriculum starts at k_start = k_start_factor · k_min
    curriculum_fraction: float = 0.1  # part of training after which k_t = k_min

    # Training.
    seeds: tuple[int, ...] = (0,)  # each sets initialization and the order of the tokens
    training_tokens: int = 1_200_000
    budget_minutes: float | None = None  # training is shortened once if the command would take more
    batch: int = 512  # tokens per step
    lr: float = 1.5e-3  # Adam's learning rate for weights and biases
    lr_warmup: float = 0.2  # part of training over which it rises from 0, while θ settles
    lr_decay: float = 0.2  # part of training, at the end, over which it falls to 0
    theta_lr: float = 1e-2  # Adam's learning rate for θ: no warm-up, no decay
    dead_after: int = 10_000  # tokens without firing after which a feature counts as dead
    resample: bool = True  # bring dead features back, until the learning rate decays
    buffer_tokens: int = 262_144  # activations per layer held, and shuffled, at once
    harvest_contexts: int = 16  # contexts per forward pass of the language model
    log_every: int = 20  # steps between lines of train_log.jsonl

    # Evaluation, by SAE-Bench.
    core_text: str = "tinylm"  # a data set with a "text" column; "tinylm": its held-out text
    core_prompts: int = 16  # contexts per batch
    core_reconstruction_batches: int = 10
    core_sparsity_batches: int = 40
    probe_sets: tuple[str, ...] = ("tinylm/B",)  # data sets; "tinylm/A": for choosing, B: to report
    probe_train: int = 300  # SAE-Bench's probe_train_set_size: half of it per class
    probe_test: int = 200
    probe_ks: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    probe_llm_batch: int = 32
    probe_sae_batch: int = 125
    probe_seed: int = 42
    compare_to: str = "run_1"  # the run that the verdict compares this one to


PROFILES: dict[str, dict[str, Any]] = {
    "tinylm": {},  # the defaults above
    "gemma-2-2b": dict(
        model="google/gemma-2-2b",
        lm_dtype="bfloat16",
        layers=(5, 12, 19),
        training_text="monology/pile-uncopyrighted",
        d_sae=2304,  # 16384 is the next step up
        k_min=64,
        k_start_factor=4.0,
        curriculum_fraction=0.3,
        training_tokens=50_000_000,
        budget_minutes=110.0,
        batch=2048,
        lr=3e-4,
        lr_warmup=0.02,
        dead_after=2_500_000,
        harvest_contexts=64,
        log_every=100,
        core_text="Skylion007/openwebtext",
        core_reconstruction_batches=200,
        core_sparsity_batches=2000,
        probe_sets=(
            "LabHC/bias_in_bios_class_set1",
            "LabHC/bias_in_bios_class_set2",
            "LabHC/bias_in_bios_class_set3",
            "canrager/amazon_reviews_mcauley_1and5",
            "canrager/amazon_reviews_mcauley_1and5_sentiment",
            "codeparrot/github-code",
            "fancyzhx/ag_news",
            "Helsinki-NLP/europarl",
        ),
        probe_train=4000,
        probe_test=1000,
    ),
}

# The base name of --out_dir selects the run: `--out_dir=run_3` runs PLAN["run_3"].
PLAN: dict[str, dict[str, Any]] = {
    "run_1": dict(description="the full method"),
    "run_2": dict(description="fixed temperatures", tau_sel=0.3, tau_pen=0.1),
    "run_3": dict(description="fixed loss weight", gamma=0.15),
    "run_4": dict(description="stronger regularization", reg_lambda=0.1),
    "run_5": dict(description="no curriculum", curriculum=False),
    "run_6": dict(
        description="full ablation", tau_sel=0.3, tau_pen=0.1, gamma=0.15, curriculum=False
    ),
    "run_7": dict(description="the loss as first written", form="as_written", curriculum=False),
    "run_8": dict(description="adaptation of the selection alone", tau_pen=0.15, gamma=0.15),
    "run_9": dict(description="adaptation against its end point", fix_at="run_1"),
    # run_10, the best form found, joins the plan when it is found.
}

# =============================================================================================
# THE METHOD: the SAE, its loss, its curriculum
# =============================================================================================

# The parameters that can be learned: name, θ, lower bound, width of the range.
BOUNDED = {
    "tau_sel": ("theta_1", 0.1, 0.4),
    "tau_pen": ("theta_2", 0.05, 0.2),
    "gamma": ("theta_3", 0.0, 0.3),
}


class CustomSAE(BaseSAE):
    """The parametric contrastive SAE.

        f     = ReLU((x − b_dec) W_enc + b_enc)                  features, (…, F)
        x̂     = Σ_{i ∈ S} f_i W_dec[i] + b_dec                   reconstruction, (…, D)
        τ_sel = 0.1 + 0.4 σ(θ1),  τ_pen = 0.05 + 0.2 σ(θ2),  γ = 0.3 σ(θ3)

    S holds the `k` largest features of x; with k = None there is no selection and S holds all
    active ones. W_enc is (D, F), W_dec (F, D) with rows of unit norm.

    Args:
        d_in, d_sae: D and F.
        model_name, hook_layer: the residual stream it reads: blocks.{hook_layer}.hook_resid_post.
        k: features kept by `encode`, or None.
        fixed: values of tau_sel, tau_pen or gamma that are constants; the others are learned.
        scale: s with E‖s x‖² = D: training multiplies activations by it. See `folded`.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        model_name: str,
        hook_layer: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        k: int | None = None,
        fixed: dict[str, float] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(d_in, d_sae, model_name, hook_layer, torch.device(device), dtype)
        self.k = k
        self.fixed = dict(fixed or {})
        self.scale = scale
        for name, (theta, _, _) in BOUNDED.items():
            zero = torch.zeros((), device=device, dtype=dtype)
            self.register_parameter(theta, None if name in self.fixed else nn.Parameter(zero))
        self.cfg.architecture = "parametric_contrastive"
        self.cfg.activation_fn_str = "relu" if k is None else "topk"
        self.cfg.apply_b_dec_to_input = True

    def bounded(self, name: str) -> Tensor:
        """tau_sel, tau_pen or gamma: a scalar; differentiable in its θ unless it is fixed."""
        if name in self.fixed:
            return self.W_enc.new_tensor(self.fixed[name])
        theta, low, width = BOUNDED[name]
        return low + width * torch.sigmoid(getattr(self, theta))

    def thetas(self) -> list[nn.Parameter]:
        """The learned θ."""
        return [getattr(self, t) for n, (t, _, _) in BOUNDED.items() if n not in self.fixed]

    def adaptive(self) -> dict[str, float | None]:
        """tau_sel, tau_pen, gamma, their w = γ τ_pen, and the θ (None where there is none)."""
        values = {name: self.bounded(name).item() for name in BOUNDED}
        thetas = {t: getattr(self, t) for t, _, _ in BOUNDED.values()}
        return {
            **values,
            "w": values["gamma"] * values["tau_pen"],
            **{name: None if theta is None else theta.item() for name, theta in thetas.items()},
        }

    def weights(self) -> list[nn.Parameter]:
        """W_enc, W_dec, b_enc, b_dec."""
        return [self.W_enc, self.W_dec, self.b_enc, self.b_dec]

    @torch.no_grad()
    def initialize(self, seed: int, mean_D: Tensor) -> None:
        """W_dec rows random of unit norm, W_enc = W_decᵀ, b_enc = 0, b_dec = `mean_D`."""
        generator = torch.Generator().manual_seed(seed)
        W_dec = torch.randn(self.W_dec.shape, generator=generator)
        self.W_dec.copy_(W_dec / W_dec.norm(dim=1, keepdim=True))
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.b_dec.copy_(mean_D)

    def preactivations(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, F): what the ReLU is applied to, (x − b_dec) W_enc + b_enc.

        b_dec gets its gradient through a term that is zero, a product with a vector where
        (x − b_dec) W_enc would need one with a matrix. x gets none.
        """
        centred = x.to(self.W_enc.dtype) - self.b_dec.detach()
        shift_F = (self.b_dec.detach() - self.b_dec) @ self.W_enc.detach()
        return centred @ self.W_enc + (self.b_enc + shift_F)

    def encode(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, F): the features, of which the k largest are kept."""
        pre = self.preactivations(x)
        if self.k is None:
            return torch.relu(pre)
        # In SAELens' order: bfloat16 has ties, which topk breaks otherwise among activations.
        values, indices = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, indices, torch.relu(values))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """(…, F) -> (…, D)"""
        return feature_acts @ self.W_dec + self.b_dec

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
    def folded(self) -> CustomSAE:
        """The same SAE for activations in raw units.

        f is linear in the scale: with b_enc/s and b_dec/s in place of b_enc and b_dec, W_enc and
        W_dec unchanged, raw activations give features and reconstructions in raw units.
        """
        raw = copy.deepcopy(self)
        raw.b_enc.div_(self.scale)
        raw.b_dec.div_(self.scale)
        raw.scale = 1.0
        return raw


def select(f_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest features of each row, and the rest: two tensors of f's shape that add to f."""
    values, indices = f_BF.topk(k, dim=-1, sorted=False)
    selected = torch.zeros_like(f_BF).scatter_(-1, indices, values)
    return selected, f_BF.scatter(-1, indices, 0.0)


@dataclass
class Loss:
    """The loss of one batch, its parts as they enter it (scalars), and what the parts came from."""

    total: Tensor
    reconstruction: Tensor
    penalty: Tensor  # γ L_pen
    reg: Tensor
    used_BF: Tensor  # the features that reconstruct
    residual_BD: Tensor  # x − x̂


def contrastive_loss(
    sae: CustomSAE, x_BD: Tensor, k: int | None, reg_lambda: float, form: str = "contrastive"
) -> Loss:
    """The loss on a batch of scaled activations (DESIGN, the method).

        L_pen = τ_pen · mean over tokens of Σ_{i ∉ S} tanh(f_i / τ_sel)
        L_reg = λ Σ over the learned θ of θ²
        loss  = mean over tokens of ‖x − x̂‖² / D  +  γ L_pen  +  L_reg

    Args:
        x_BD: (B, D), with E‖x‖² = D.
        k: S is the k largest features, which alone reconstruct and are not penalised. None: no
            selection; every active feature reconstructs, all but the strongest are penalised.
        form: "as_written" is the method as it was first written down, kept as an ablation: no
            selection, tanh(f / τ_sel) averaged over tokens and features alike, and the
            reconstruction loss is mean ‖x − x̂‖.
    """
    tau_sel, tau_pen, gamma = (sae.bounded(name) for name in BOUNDED)
    f_BF = torch.relu(sae.preactivations(x_BD))
    if form == "as_written":
        used_BF, penalised_BF = f_BF, f_BF
    elif k is None:
        used_BF, penalised_BF = f_BF, select(f_BF, 1)[1]
    else:
        used_BF, penalised_BF = select(f_BF, k)
    residual_BD = x_BD - sae.decode(used_BF)
    saturated_BF = torch.tanh(penalised_BF / tau_sel)
    if form == "as_written":
        reconstruction = residual_BD.norm(dim=-1).mean()
        penalty = gamma * tau_pen * saturated_BF.mean()
    else:
        reconstruction = residual_BD.pow(2).mean()
        penalty = gamma * tau_pen * saturated_BF.sum(-1).mean()
    reg = reg_lambda * sum((theta**2 for theta in sae.thetas()), torch.zeros_like(gamma))
    total = reconstruction + penalty + reg
    return Loss(total, reconstruction, penalty, reg, used_BF, residual_BD)


def curriculum_k(progress: float, k_start: int, k_min: int, fraction: float) -> int:
    """k_t: from k_start log-linearly down to k_min over the first `fraction` of training.

    Args:
        progress: tokens seen / tokens in all, from 0 to 1.
    """
    if progress >= fraction:
        return k_min
    return round(k_start * (k_min / k_start) ** (progress / fraction))


def lr_factor(progress: float, warmup: float, decay: float) -> float:
    """The learning rate's factor: up to 1 over `warmup`, down to 0 over the last `decay`."""
    rise = progress / warmup if progress < warmup else 1.0
    fall = (1.0 - progress) / decay if progress > 1.0 - decay else 1.0
    return min(rise, fall)


# =============================================================================================
# THE LANGUAGE MODEL AND ITS ACTIVATIONS
# =============================================================================================


class ActivationBuffer:
    """Activations of several layers in corpus order, BOS, EOS and padding left out."""

    def __init__(
        self,
        lm: harness.LanguageModel,
        stream: harness.TokenStream,
        layers: tuple[int, ...],
        contexts: int,
    ) -> None:
        self.lm, self.stream, self.layers, self.contexts = lm, stream, layers, contexts
        self._rest: Tensor | None = None  # harvested, not yet handed out

    def take(self, n: int, advance: Callable[[int], None] = lambda n: None) -> Tensor:
        """The activations of the next n tokens: (layers, n, D), on the model's device.

        Args:
            advance: called with the number of tokens of each forward pass.
        """
        parts = [] if self._rest is None else [self._rest]
        have = sum(part.shape[1] for part in parts)
        special = torch.tensor(sorted(self.lm.special_ids))

        def harvest(index: int, passes: tuple[Tensor, ...]) -> Tensor:
            keep_BL = ~torch.isin(passes[index], special)
            acts = self.lm.activations(passes[index], self.layers)
            return torch.stack([acts_BLD[keep_BL.to(acts_BLD.device)] for acts_BLD in acts])

        while have < n:
            n_passes = max(1, (n - have) // (self.contexts * (self.stream.context - 1)))
            passes = self.stream.contexts(n_passes * self.contexts).split(self.contexts)
            found, indices, device = {}, list(range(n_passes)), self.lm.hf.device
            for index, _, part in harness.in_threads(harvest, indices, [passes], device):
                found[index] = part
                advance(part.shape[1])
            parts += [found[index] for index in indices]
            have = sum(part.shape[1] for part in parts)
        everything = torch.cat(parts, dim=1)
        self._rest = everything[:, n:].clone()
        return everything[:, :n]


# =============================================================================================
# TRAINING
# =============================================================================================


class Trainer:
    """One SAE and what its training needs: Adam with a group for θ, and the count of dead features.

    Args:
        sae: initialized, on its device, in float32.
        settings: the run's.
        autocast: matrix products in bfloat16.
    """

    def __init__(
        self, sae: CustomSAE, settings: Settings, seed: int, autocast: bool = False
    ) -> None:
        self.sae, self.settings, self.autocast = sae, settings, autocast
        groups = [{"params": sae.weights(), "lr": settings.lr}]
        if sae.thetas():
            groups.append({"params": sae.thetas(), "lr": settings.theta_lr})
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self.steps_since_active = torch.zeros(
            sae.cfg.d_sae, dtype=torch.int64, device=sae.W_enc.device
        )
        self.generator = torch.Generator().manual_seed(seed)

    def dead(self) -> Tensor:
        """(F,) bool: features that have not reconstructed anything for `dead_after` tokens."""
        return self.steps_since_active * self.settings.batch >= self.settings.dead_after

    def step(self, x_BD: Tensor, progress: float, log: bool) -> dict[str, float] | None:
        """One step on raw activations (B, D); its record if `log`."""
        settings, sae = self.settings, self.sae
        x_BD = x_BD.to(sae.W_enc.dtype) * sae.scale
        k = k_at(settings, progress)
        with torch.autocast(x_BD.device.type, torch.bfloat16, enabled=self.autocast):
            loss = contrastive_loss(sae, x_BD, k, settings.reg_lambda, settings.form)
        self.optimizer.zero_grad()
        loss.total.backward()
        sae.remove_parallel_gradient()
        lr = settings.lr * lr_factor(progress, settings.lr_warmup, settings.lr_decay)
        self.optimizer.param_groups[0]["lr"] = lr
        record = self.record(loss, x_BD, k, lr) if log else None
        self.optimizer.step()
        sae.normalize_decoder()
        fired_F = (loss.used_BF > 0).any(0)
        self.steps_since_active = torch.where(fired_F, 0, self.steps_since_active + 1)
        if settings.resample and progress < 1 - settings.lr_decay:
            self.resample(loss.residual_BD.detach())
        return record

    @torch.no_grad()
    def resample(self, residual_BD: Tensor) -> None:
        """Points dead features at what badly reconstructed tokens lack, x − x̂.

        After Bricken et al. 2023 ("Towards Monosemanticity", appendix, neuron resampling), with
        tokens drawn in proportion to their squared loss; but at every step, as features die.
        """
        dead_N = self.dead().nonzero()[:, 0]
        if not len(dead_N):
            return
        odds_B = residual_BD.pow(2).sum(-1).pow(2).cpu()
        dead_N = dead_N[: len(odds_B)]
        rows_N = torch.multinomial(odds_B, len(dead_N), generator=self.generator)
        directions_ND = residual_BD[rows_N.to(residual_BD.device)]
        directions_ND = directions_ND / directions_ND.norm(dim=1, keepdim=True)
        sae = self.sae
        sae.W_dec[dead_N] = directions_ND
        sae.W_enc[:, dead_N] = directions_ND.T * sae.W_enc.norm(dim=0).mean()
        sae.b_enc[dead_N] = 0.0
        for parameter, index in (
            (sae.W_dec, (dead_N,)), (sae.W_enc, (slice(None), dead_N)), (sae.b_enc, (dead_N,))
        ):  # fmt: skip
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[parameter][moment][index] = 0.0
        self.steps_since_active[dead_N] = 0

    @torch.no_grad()
    def record(self, loss: Loss, x_BD: Tensor, k: int | None, lr: float) -> dict[str, Any]:
        """What train_log.jsonl says of this batch, before its step."""
        sae = self.sae
        error = loss.residual_BD.pow(2).sum()
        spread = (x_BD - x_BD.mean(0)).pow(2).sum()
        return {
            "loss": float(loss.total),
            "loss_reconstruction": float(loss.reconstruction),
            "loss_penalty": float(loss.penalty),
            "loss_reg": float(loss.reg),
            **sae.adaptive(),
            "k_t": k,
            "l0": float((loss.used_BF > 0).sum(-1).float().mean()),
            "fvu": float(error / spread),
            "dead_fraction": float(self.dead().float().mean()),
            "lr": lr,
        }


def k_at(settings: Settings, progress: float) -> int | None:
    """k_t of a run at this point of its training; None where it selects nothing."""
    if not settings.curriculum or settings.form == "as_written":
        return None
    k_start = min(round(settings.k_start_factor * settings.k_min), settings.d_sae)
    return curriculum_k(progress, k_start, settings.k_min, settings.curriculum_fraction)


def sae_name(layer: int, seed: int) -> str:
    """What an SAE is called in files of results."""
    return f"layer_{layer}_seed_{seed}"


def new_sae(
    settings: Settings,
    layer: int,
    seed: int,
    mean_D: Tensor,
    scale: float,
    fixed: dict[str, float],
    k: int | None,
) -> CustomSAE:
    """An initialized SAE for activations whose raw mean is `mean_D`, on its device."""
    shape = (len(mean_D), settings.d_sae, settings.model, layer, mean_D.device)
    sae = CustomSAE(*shape, k=k, fixed=fixed, scale=scale)
    sae.initialize(seed, mean_D * scale)
    sae.cfg.context_size = settings.context
    sae.cfg.dataset_path = settings.training_text
    return sae


@dataclass
class Training:
    """What training leaves. Keys are (layer, seed), or the layer alone."""

    saes: dict[tuple[int, int], CustomSAE]
    mean: dict[int, Tensor]  # the raw mean of the first activations, (D,)
    last: dict[tuple[int, int], dict[str, Any]]  # the last line of the log
    tokens: int
    seconds: dict[str, float]
    shortened: str | None  # why it took fewer tokens than the settings say


def start_trainers(
    settings: Settings, acts_LND: Tensor, fixed: dict[tuple[int, int], dict[str, float]]
) -> tuple[dict[tuple[int, int], Trainer], dict[int, Tensor]]:
    """A trainer per layer and seed, scaled and centred by the first activations; their means.

    Where the activations are in bfloat16, so are the trainers' matrix products.
    """
    trainers, means = {}, {}
    for layer, acts_ND in zip(settings.layers, acts_LND):
        total_D, squares = torch.zeros_like(acts_ND[0], dtype=torch.float64), 0.0
        for part_ND in acts_ND.split(8192):  # float64 in parts: all of it would take gigabytes
            total_D += part_ND.double().sum(0)
            squares += float(part_ND.double().pow(2).sum())
        means[layer] = (total_D / len(acts_ND)).float()
        scale = math.sqrt(acts_ND.numel() / squares)
        for seed in settings.seeds:
            at_the_end = k_at(settings, progress=1.0)
            sae = new_sae(
                settings, layer, seed, means[layer], scale, fixed[layer, seed], at_the_end
            )
            autocast = acts_LND.dtype == torch.bfloat16
            trainers[layer, seed] = Trainer(sae, settings, seed, autocast)
    return trainers, means


def train(
    settings: Settings,
    buffer: ActivationBuffer,
    fixed: dict[tuple[int, int], dict],
    log: Path,
    evaluation_seconds: Callable[[dict[tuple[int, int], CustomSAE]], float] = lambda saes: 0.0,
) -> Training:
    """Trains an SAE per layer and seed, all on the same text and the same forward passes.

    Learning rate and k_t are functions of tokens / total. With `budget_minutes`, the total is
    reduced once, after 5% of it, if training and evaluation would not fit.

    Args:
        fixed: by layer and seed, the constants among tau_sel, tau_pen and gamma.
        log: train_log.jsonl.
        evaluation_seconds: estimates how long the evaluation of these SAEs will take.
    """
    n_steps = settings.training_tokens // settings.batch
    portion = max(settings.buffer_tokens // settings.batch, 1)  # steps per filling of the buffer
    trainers: dict[tuple[int, int], Trainer] = {}
    last: dict[tuple[int, int], dict[str, Any]] = {}
    shuffles = {seed: torch.Generator().manual_seed(seed) for seed in settings.seeds}
    seconds = {"seconds_harvest": 0.0, "seconds_training": 0.0}
    n_saes = len(settings.layers) * len(settings.seeds)
    # A token counts when it is read, and when an SAE learns from it.
    total = (1 + n_saes) * n_steps * settings.batch
    progress = harness.Progress("train", total, "tokens read or learned")
    shortened, timed, done = None, settings.budget_minutes is None, 0
    with log.open("w", encoding="utf-8") as log_file:
        while done < n_steps:
            steps = range(done, min(done + portion, n_steps))
            started = time.monotonic()
            acts_LND = buffer.take(len(steps) * settings.batch, progress.advance)
            seconds["seconds_harvest"] += time.monotonic() - started
            started = time.monotonic()
            if not trainers:
                trainers, means = start_trainers(settings, acts_LND, fixed)
            orders = {
                seed: torch.randperm(acts_LND.shape[1], generator=generator)
                for seed, generator in shuffles.items()
            }
            records = take_steps(settings, trainers, acts_LND, orders, steps, n_steps, progress)
            for record in records:
                last[record["layer"], record["seed"]] = record
                log_file.write(json.dumps(record) + "\n")
            log_file.flush()
            seconds["seconds_training"] += time.monotonic() - started
            done = steps.stop
            if not timed and done >= 0.05 * n_steps:
                timed, spent = True, progress.seconds()
                evaluation = evaluation_seconds({key: t.sae for key, t in trainers.items()})
                n_steps, shortened = harness.fit_budget(
                    n_steps, done, spent, evaluation, settings.budget_minutes * 60
                )
                progress.total = (1 + n_saes) * n_steps * settings.batch
    progress.close()
    saes = {key: trainer.sae for key, trainer in trainers.items()}
    return Training(saes, means, last, n_steps * settings.batch, seconds, shortened)


def take_steps(
    settings: Settings,
    trainers: dict[tuple[int, int], Trainer],
    acts_LND: Tensor,
    orders: dict[int, Tensor],
    steps: range,
    n_steps: int,
    progress: harness.Progress,
) -> list[dict[str, Any]]:
    """Every trainer's steps on one filling of the buffer; their records, in order of steps.

    On a CPU trainers run side by side, each on its own cores: a step's operations are too small
    to be worth sharing. What a trainer computes does not depend on when the others run.

    Args:
        orders: by seed, the order in which the tokens of the buffer are drawn.
        steps: the steps to take, of n_steps in all.
    """

    def some_steps(key: tuple[int, int], part: range) -> list[dict[str, Any]]:
        layer, seed = key
        acts_ND = acts_LND[settings.layers.index(layer)]
        records = []
        for step in part:
            start = (step - steps.start) * settings.batch
            rows = orders[seed][start : start + settings.batch].to(acts_ND.device)
            logging = step % settings.log_every == 0 or step == n_steps - 1
            record = trainers[key].step(acts_ND[rows], step / n_steps, logging)
            if record:
                tokens = step * settings.batch
                where = {"step": step, "tokens": tokens, "layer": layer, "seed": seed}
                speed = {"tokens_per_second": tokens / progress.seconds()}
                records.append(where | record | speed)
        return records

    records: list[dict[str, Any]] = []
    fvu: dict[tuple[int, int], float] = {}
    parts = [range(i, min(i + 32, steps.stop)) for i in range(steps.start, steps.stop, 32)]
    for key, part, found in harness.in_threads(some_steps, list(trainers), parts, acts_LND.device):
        records += found
        if found:
            fvu[key] = found[-1]["fvu"]
        note = "fvu " + "/".join(f"{fvu[key]:.2f}" for key in trainers if key in fvu)
        progress.advance(len(part) * settings.batch, note)
    place = {key: index for index, key in enumerate(trainers)}
    return sorted(records, key=lambda r: (r["step"], place[r["layer"], r["seed"]]))


# =============================================================================================
# EVALUATION, by SAE-Bench
# =============================================================================================


def core_evaluation(
    saes: dict[str, CustomSAE],
    model: Any,
    settings: Settings,
    out_dir: Path,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, dict[str, float]]:
    """SAE-Bench's core evaluation of folded SAEs: by name, its scalars by their names, and fvu.

    Calls `run_evals`: `multiple_evals` loads the model by name and swallows every exception.
    Writes eval_results/core/….json in SAE-Bench's own form.

    Raises:
        ExperimentError: a scalar is not finite, or is the -1 that stands for NaN.
    """
    from sae_bench.evals.core import main as core

    ready = {name: harness.formatted(sae, settings) for name, sae in saes.items()}
    results = harness.run_core(ready, model, settings, advance)
    found: dict[str, dict[str, float]] = {}
    for name, (scalars, features, fvu) in results.items():
        scalars["misc_metrics"] = core.calculate_misc_metrics(features)
        flat = {metric: value for group in scalars.values() for metric, value in group.items()}
        found[name] = flat | {"fvu": fvu}
        for metric, value in found[name].items():
            if not math.isfinite(value) or value == -1:
                raise ExperimentError(
                    f"core evaluation of {name}: {metric} is {value}, which can't be right; "
                    "look at the SAE's weights and at the evaluation text"
                )
        harness.save_core(name, ready[name], scalars, features, settings, out_dir)
    return found


def sparse_probing(
    saes: dict[str, CustomSAE],
    texts: dict[str, list[dict]],
    model: Any,
    settings: Settings,
    out_dir: Path,
    progress: harness.Progress,
) -> dict[str, dict[str, float]]:
    """SAE-Bench's sparse probing of folded SAEs: by name, sae_… and llm_… mean accuracies.

    Stock SAE-Bench draws all probes of an SAE from one generator, seeded once. This keeps a
    generator state per SAE, so that an SAE's figures are those of a stock call that finds the
    activations stored (the second call of `run_eval_single_sae`). The language model's probes
    begin at the seed for each data set and are kept from run to run: no SAE changes them. Writes
    eval_results/sparse_probing/….json in SAE-Bench's own form.

    Args:
        texts: by data set, the token ids of the train and the test split.
    """
    torch.manual_seed(settings.probe_seed)
    seeded = torch.get_rng_state()
    states = dict.fromkeys(saes, seeded)
    per_class: dict[str, dict] = {name: {} for name in saes}
    ready = {name: harness.formatted(sae, settings) for name, sae in saes.items()}
    for dataset, split in texts.items():
        (llm_train, sae_train), (llm_test, sae_test) = (
            harness.pooled_features(tokens, model, ready, settings) for tokens in split
        )
        llm = {}
        for layer in settings.layers:
            torch.set_rng_state(seeded)
            key = harness.llm_probes_key(dataset, layer, split, settings)
            acts = llm_train[layer], llm_test[layer], "llm", settings.probe_ks
            llm[layer] = harness.kept("llm_probes", key, harness.probe, *acts)
        for name, sae in ready.items():
            torch.set_rng_state(states[name])
            results = harness.probe(sae_train[name], sae_test[name], "sae", settings.probe_ks)
            states[name] = torch.get_rng_state()
            # SAE-Bench's order: the SAE's full probe, the language model's, the SAE's top k.
            full = {"sae_test_accuracy": results.pop("sae_test_accuracy")}
            per_class[name][f"{dataset}_results"] = full | llm[sae.cfg.hook_layer] | results
            progress.advance(1, dataset)
    return {
        name: harness.save_probing(name, ready[name], per_class[name], settings, out_dir)
        for name in saes
    }


def evaluate(
    settings: Settings,
    training: Training,
    texts: dict[str, list[dict]],
    model: Any,
    out_dir: Path,
    log: Path,
) -> tuple[dict[str, dict[str, dict]], dict[str, float]]:
    """Scores every SAE and its untrained twin: {kind: {name: results}}, and each kind's seconds.

    The twin has the same initialization, width and L0 (it keeps as many features per token as
    the trained SAE has active), and was never trained. Its name ends in "_untrained".
    """
    seconds = {}
    started = time.monotonic()
    n_batches = settings.core_reconstruction_batches + settings.core_sparsity_batches
    progress = harness.Progress("core evaluation", n_batches, "batches")
    trained = {key: sae.folded() for key, sae in training.saes.items()}
    with harness.quiet(log):
        l0 = harness.mean_l0(trained, model, settings)
        saes = {}
        for (layer, seed), sae in trained.items():
            k = min(max(round(l0[layer, seed]), 1), settings.d_sae)
            scale = training.saes[layer, seed].scale
            twin = new_sae(settings, layer, seed, training.mean[layer], scale, {}, k)
            name = sae_name(layer, seed)
            saes |= {name: sae, f"{name}_untrained": twin.folded()}
        core = core_evaluation(saes, model, settings, out_dir, progress.advance)
    progress.close()
    seconds["seconds_core"] = time.monotonic() - started
    started = time.monotonic()
    progress = harness.Progress("sparse probing", len(texts) * len(saes), "SAEs x sets")
    with harness.quiet(log):
        probing = sparse_probing(saes, texts, model, settings, out_dir, progress)
    progress.close()
    seconds["seconds_sparse_probing"] = time.monotonic() - started
    return {"core": core, "probing": probing}, seconds


# =============================================================================================
# RECORDS
# =============================================================================================


def layer_metrics(
    settings: Settings, layer: int, training: Training, evaluation: dict[str, dict]
) -> dict[str, list[float]]:
    """{metric: a value per seed} of one layer, for final_info.json."""
    per_seed: dict[str, list[float]] = {}
    for seed in settings.seeds:
        name, twin = sae_name(layer, seed), f"{sae_name(layer, seed)}_untrained"
        last = training.last[layer, seed]
        row = evaluation["core"][name] | evaluation["probing"][name]
        for metric, value in evaluation["probing"][twin].items():
            if metric.startswith("sae_"):
                row[f"untrained_{metric.removeprefix('sae_')}"] = value
        for metric in ("l0", "ce_loss_score", "fvu"):
            row[f"untrained_{metric}"] = evaluation["core"][twin][metric]
        row |= {m: last[m] for m in (*BOUNDED, "w", "dead_fraction")}
        row |= {m: value for m, value in last.items() if m.startswith("loss")}
        row["training_tokens"] = training.tokens
        row["n_seeds"] = len(settings.seeds)
        for metric, value in row.items():
            per_seed.setdefault(metric, []).append(float(value))
    return per_seed


SHOWN = (
    "l0", "fvu", "ce_loss_score", "frac_alive", "sae_top_1_test_accuracy",
    "sae_top_5_test_accuracy", "untrained_top_5_test_accuracy", "llm_top_5_test_accuracy",
    "tau_sel", "tau_pen", "gamma",
)  # fmt: skip


def write_records(
    settings: Settings,
    profile: str,
    training: Training,
    evaluation: dict[str, dict],
    seconds: dict[str, float],
    out_dir: Path,
) -> None:
    """Writes warnings.json and, last, final_info.json; prints the closing block."""
    layers = {
        f"layer_{layer}": layer_metrics(settings, layer, training, evaluation)
        | {stage: [value] * len(settings.seeds) for stage, value in seconds.items()}
        for layer in settings.layers
    }
    overall = {
        "seed": [float(seed) for seed in settings.seeds],
        "primary": harness.primary_metric(layers.values()),
        "l0": [harness.mean(values) for values in zip(*(m["l0"] for m in layers.values()))],
    }
    reference = harness.read_reference(settings, out_dir, profile)
    sentence, numbers = harness.verdict(overall, reference, settings.compare_to)
    info = {name: harness.summarize(metrics) for name, metrics in layers.items()}
    info["verdict"] = harness.summarize(overall)
    info["verdict"]["means"] |= numbers
    warnings = harness.odd_results(layers, settings.d_sae)
    if training.shortened:
        warnings.insert(0, training.shortened)
    baseline, differing = harness.against_given_baseline(settings, layers)
    warnings += differing
    notes = [baseline] if baseline else []
    harness.write_json(out_dir / "warnings.json", warnings)
    harness.write_json(out_dir / "final_info.json", info)

    harness.print_closing_block(
        out_dir, profile, info, SHOWN, seconds, warnings, notes, sentence
    )


# =============================================================================================
# MAIN
# =============================================================================================


def choose_profile() -> str:
    """SAE_PROFILE, or gemma-2-2b where CUDA is available, tinylm elsewhere."""
    profile = os.environ.get("SAE_PROFILE")
    if not profile:
        return "gemma-2-2b" if torch.cuda.is_available() else "tinylm"
    if profile not in PROFILES:
        raise ExperimentError(
            f"SAE_PROFILE must be {' or '.join(PROFILES)}, but is {profile!r}: change or unset it"
        )
    return profile


def settings_of(name: str, profile: str) -> Settings:
    """The settings of the run called `name`, checked.

    Raises:
        ExperimentError: a field that doesn't exist, or a value that can't be.
    """
    chosen = PROFILES[profile] | PLAN.get(name, {})
    try:
        s = Settings(**chosen)
    except TypeError as error:
        raise ExperimentError(
            f"PLAN[{name!r}] sets what Settings has no field for ({error}): "
            "see the list at the top of experiment.py"
        ) from error
    counts = (
        "k_min d_sae training_tokens batch buffer_tokens harvest_contexts log_every dead_after "
        "core_prompts core_reconstruction_batches core_sparsity_batches probe_train "
        "probe_test probe_llm_batch probe_sae_batch"
    )
    rules: list[tuple[str, Callable[[Any], bool], str]] = [
        *((field, lambda v: v >= 1 and v == int(v), "a count above 0") for field in counts.split()),
        *((field, lambda v: v > 0, "above 0") for field in ("lr", "theta_lr", "k_start_factor")),
        *(
            (field, lambda v: 0 <= v <= 1, "between 0 and 1")
            for field in ("curriculum_fraction", "lr_warmup", "lr_decay")
        ),
        *((field, lambda v: v >= 0, "0 or above") for field in ("reg_lambda",)),
        *(
            (field, lambda v: v is None or v > 0, "None or above 0")
            for field in (*BOUNDED, "budget_minutes")
        ),
        ("k_min", lambda v: v <= s.d_sae, f"at most d_sae = {s.d_sae}"),
        ("context", lambda v: v >= 2, "at least 2"),
        ("probe_train", lambda v: v >= 4, "at least 4: two texts of a class"),
        ("probe_test", lambda v: v >= 4, "at least 4: two texts of a class"),
        ("training_tokens", lambda v: v >= s.batch, f"at least one batch of {s.batch}"),
        ("buffer_tokens", lambda v: v >= s.batch, f"at least one batch of {s.batch}"),
        ("form", lambda v: v in ("contrastive", "as_written"), "'contrastive' or 'as_written'"),
        ("resample", lambda v: isinstance(v, bool), "True or False"),
        ("curriculum", lambda v: isinstance(v, bool), "True or False"),
        ("device", lambda v: v in ("auto", "cpu", "cuda"), "'auto', 'cpu' or 'cuda'"),
        ("lm_dtype", lambda v: v in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
        (
            "train_dtype",
            lambda v: v in ("auto", "float32", "bfloat16"),
            "'auto', 'float32' or 'bfloat16'",
        ),
        ("seeds", lambda v: v and len(set(v)) == len(v) and min(v) >= 0, "different, 0 or above"),
        ("layers", lambda v: v and len(set(v)) == len(v) and min(v) >= 0, "different, 0 or above"),
        (
            "probe_sets",
            lambda v: v and all(n in ("tinylm/A", "tinylm/B") or n[:7] != "tinylm/" for n in v),
            "one or more data sets; of tinylm, 'tinylm/A' or 'tinylm/B'",
        ),
        (
            "probe_ks",
            lambda v: set(harness.PRIMARY_KS) <= set(v) and 1 <= min(v) <= max(v) <= s.d_sae,
            "between 1 and d_sae, with 1, 2 and 5 among them",
        ),
    ]
    harness.check(name, s, rules)
    return s


def constants(settings: Settings, out_dir: Path) -> dict[tuple[int, int], dict[str, float]]:
    """By layer and seed: which of tau_sel, tau_pen and gamma are constants, and their values.

    With `fix_at`, all of them, at the final values that another run has for the layer and seed.
    """
    given = {n: getattr(settings, n) for n in BOUNDED if getattr(settings, n) is not None}
    keys = [(layer, seed) for layer in settings.layers for seed in settings.seeds]
    if settings.fix_at is None:
        return dict.fromkeys(keys, given)
    return harness.final_values(out_dir.parent / settings.fix_at, keys, tuple(BOUNDED))


def run(out_dir: Path, log: Path) -> None:
    """One experiment, from its settings to its records."""
    began = time.monotonic()
    name = out_dir.name
    profile = choose_profile()
    settings = settings_of(name, profile)
    device = harness.choose_device(settings, profile)
    print(f"profile: {profile} on {device}")
    if name not in PLAN:
        print(f"{name}: not in PLAN, defaults")
    fixed = constants(settings, out_dir)
    with harness.quiet(log):
        needs = harness.preflight(settings, device)
    print("\n".join(needs), end="\n" if needs else "")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # no result depends on it
    torch.backends.cudnn.benchmark = False
    with harness.quiet(log):
        lm = harness.load_language_model(settings.model, settings.lm_dtype, device)
    n_layers = lm.hf.config.num_hidden_layers
    if max(settings.layers) >= n_layers:
        raise ExperimentError(
            f"{name}: layers must be below {n_layers}, the number of blocks of {settings.model}, "
            f"but are {settings.layers}: change them at the top of experiment.py"
        )
    if moved := harness.prepare_out_dir(out_dir):
        print(moved)
    train_dtype = harness.choose_train_dtype(settings, device)
    harness.write_config(settings, profile, device, train_dtype, out_dir)

    texts = harness.documents(settings.training_text, "train")
    with harness.quiet(log):
        probe_texts = harness.read_probe_texts(settings, lm.tokenizer, device)
    stream = harness.TokenStream(texts, lm.tokenizer, settings.context)
    buffer = ActivationBuffer(
        lm.cast(train_dtype), stream, settings.layers, settings.harvest_contexts
    )

    def evaluation_seconds(saes: dict) -> float:
        with harness.quiet(log):
            return harness.evaluation_seconds(saes, lm, probe_texts, settings)

    training = train(settings, buffer, fixed, out_dir / "train_log.jsonl", evaluation_seconds)
    for (layer, seed), sae in training.saes.items():
        folder = out_dir / "sae" / f"layer_{layer}" / f"seed_{seed}"
        harness.export(sae, settings, folder)
    with harness.quiet(log):
        model = lm.hooked()
    evaluation, seconds = evaluate(settings, training, probe_texts, model, out_dir, log)
    seconds = training.seconds | seconds | {"seconds_total": time.monotonic() - began}
    write_records(settings, profile, training, evaluation, seconds, out_dir)


if __name__ == "__main__":
    sys.exit(harness.main(run))
