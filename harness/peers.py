"""SAELens' trainers on the batches of this project's, and their SAEs in raw units.

A `PeerTrainer` takes the steps that `experiment.Trainer` takes, with SAELens' SAETrainer and its
loss, optimizer and schedules. What it trains is then a run's SAE like any other: scored, recorded,
compared, saved, resumed and exported (docs/method.md, Other trainers).
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from sae_bench.custom_saes.base_sae import BaseSAE
from torch import Tensor

from harness.interfaces import RunLike, SettingsLike
from harness.language_model import hook_name

Key = tuple[int, int]  # layer and seed


class Peer(NamedTuple):
    """One of SAELens' methods.

    Args:
        kind: SAELens' name of it.
        penalty: the part of the loss that L0 follows from, "l1" or "l0"; None: L0 is k.
        rise: part of training over which that part's coefficient rises from 0.
        options: of SAELens' configuration, where they are not its defaults.
    """

    kind: str
    penalty: str | None = None
    rise: float = 0.1
    options: dict[str, Any] = {}


TANH = {  # Anthropic's loss, which SAELens advises where training is short, as it has it there
    "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True,
    "jumprelu_bandwidth": 2.0, "jumprelu_init_threshold": 0.1, "pre_act_loss_coefficient": 3e-6,
}  # fmt: skip
PEERS = {  # by the setting `trainer`
    "standard": Peer("standard", "l1"),
    "topk": Peer("topk"),
    "batchtopk": Peer("batchtopk"),
    "jumprelu": Peer("jumprelu", "l0"),
    "jumprelu_tanh": Peer("jumprelu", "l0", 1.0, TANH),
    "gated": Peer("gated", "l1"),
    "matryoshka_batchtopk": Peer("matryoshka_batchtopk"),
}
# Of the nested SAEs of Matryoshka, in F/32: those with which SAE-Bench's own were trained.
WIDTHS = (1, 3, 7, 15, 32)


def tuned(lr: float, *coefficients: float) -> dict[str, Any]:
    """What a peer has otherwise than this project's trainer."""
    given = {"sparsity_coefficient": coefficients} if coefficients else {}
    return {"lr": lr, "lr_warmup": 0.05, "dead_feature_window": 100_000, **given}


# On tinylm, at its layers 1, 2 and 4: of five learning rates the one with the lowest FVU at L0 16,
# and the coefficients that give L0 16 (bench/quality.py, seeds 100 and 0).
TUNED = {
    "standard": tuned(6e-3, 0.851, 1.633, 2.001),
    "topk": tuned(3e-3),
    "batchtopk": tuned(3e-3),
    "jumprelu": tuned(4.5e-3, 0.32, 0.695, 0.836),
    "jumprelu_tanh": tuned(6e-3, 0.373, 0.441, 0.424),
    "gated": tuned(4.5e-3, 1.089, 1.77, 2.08),
    "matryoshka_batchtopk": tuned(3e-3),
}


class SAELensSAE(BaseSAE):
    """An SAE of SAELens', for raw activations, in the form that SAE-Bench evaluates.

    Args:
        stored: it; its weights are this one's, under their names there.
        settings: of the run. layer: the layer that it reads.
    """

    def __init__(self, stored: Any, settings: SettingsLike, layer: int) -> None:
        d_sae, d_in = stored.W_dec.shape
        where = stored.W_dec.device, stored.W_dec.dtype
        super().__init__(d_in, d_sae, settings.model, layer, *where)
        # Not as a module of this one: each weight would be there twice.
        self.__dict__["stored"] = stored.requires_grad_(False)
        for name, weights in stored.named_parameters():
            setattr(self, name, weights)
        self.cfg.hook_name = hook_name(settings.hook, layer)
        self.cfg.architecture = stored.cfg.architecture()
        self.cfg.context_size = settings.context
        self.cfg.dataset_path = settings.training_text

    def to(self, *where: Any, **named: Any) -> SAELensSAE:
        """As torch has it. SAELens' remembers beside its weights what it casts its input to."""
        if hasattr(self, "stored"):  # not while this is made
            self.stored.to(*where, **named)
        return super().to(*where, **named)

    def encode(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, F)."""
        return self.stored.encode(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """(…, F) -> (…, D)."""
        return self.stored.decode(feature_acts)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, D): the reconstruction."""
        return self.decode(self.encode(x))


class PeerSAE:
    """What `experiment.CustomSAE` has and SAELens' training SAEs, which it is mixed into, lack.

    Args:
        norm_scaling_factor: s with E‖s x‖² = D, by which training multiplies activations.
        density_penalty: φ of the density penalty; 0: SAELens' loss as it is.
    """

    def prepare(
        self, settings: SettingsLike, layer: int, norm_scaling_factor: float,
        density_penalty: float,
    ) -> None:  # fmt: skip
        """Sets what SAELens' own constructor is not given."""
        self.settings, self.layer = settings, layer
        self.norm_scaling_factor, self.density_penalty = norm_scaling_factor, density_penalty
        # How often each feature fires, over the last 50 steps or so.
        zeros_F = self.W_dec.new_zeros(len(self.W_dec))
        self.register_buffer("firing_rate_F", zeros_F, persistent=False)

    def calculate_aux_loss(
        self, step_input: Any, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """SAELens' parts of the loss beside the error, and the density penalty.

        The latter is D times as large as in this project's loss, which divides the error by D.
        """
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        if self.density_penalty:
            weight_F = self.density_penalty * self.cfg.d_in * self.firing_rate_F
            losses["density"] = (feature_acts * weight_F).sum(-1).mean()
            fired_F = (feature_acts.detach() > 0).float().mean(0)
            self.firing_rate_F.lerp_(fired_F, 0.02)
        return losses

    def learned_scalars(self) -> dict[str, Tensor | None]:
        """None of this project's."""
        return {}

    @torch.no_grad()
    def fold_activation_norm_scaling(self) -> SAELensSAE:
        """The SAE that SAELens would save, for raw activations, decoder rows of unit norm.

        Features of scaled activations are s times those of raw ones, and so are biases and
        thresholds. BatchTopK's SAEs become JumpReLU's.
        """
        from sae_lens import SAE

        weights = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        copy_of = copy.deepcopy(self)  # it may write to what it is asked of
        copy_of.process_state_dict_for_saving_inference(weights)
        given = self.cfg.get_inference_sae_cfg_dict() | {"device": "meta"}  # no weights drawn
        stored = SAE.from_dict(given)
        stored.load_state_dict(weights, assign=True)
        stored.to(device=self.W_dec.device)
        norms_F = stored.W_dec.norm(dim=1)
        if not torch.allclose(norms_F, torch.ones_like(norms_F), atol=1e-6):
            stored.fold_W_dec_norm()
        for name in ("b_enc", "b_dec", "threshold", "b_gate", "b_mag"):
            if getattr(stored, name, None) is not None:
                getattr(stored, name).data.div_(self.norm_scaling_factor)
        return SAELensSAE(stored, self.settings, self.layer)


@functools.cache
def peer_class(kind: str) -> tuple[type, type]:
    """SAELens' class of training SAEs of a kind with what a run asks of one, and its settings'."""
    from sae_lens.registry import get_sae_training_class

    base, config_class = get_sae_training_class(kind)
    return type(base)(f"Peer{base.__name__}", (PeerSAE, base), {}), config_class


def options_of(settings: SettingsLike, layer: int) -> dict[str, Any]:
    """SAELens' options that a run's settings stand for, but for the schedule of a coefficient."""
    kind, penalty, _, options = PEERS[settings.trainer]
    given = settings.sparsity_coefficient
    if isinstance(given, tuple):
        given = given[settings.layers.index(layer)]
    if penalty is None:
        options = options | {"k": settings.k_min}
    elif given is not None:
        options = options | {f"{penalty}_coefficient": given}
    if kind == "matryoshka_batchtopk":
        widths = {max(settings.d_sae * width // WIDTHS[-1], 1) for width in WIDTHS}
        options = options | {"matryoshka_widths": sorted(widths)}
    return options


class PeerTrainer:
    """SAELens' SAETrainer behind the interface of `experiment.Trainer`.

    The SAE starts as SAELens starts it, but for b_dec, which is the mean of the first activations
    as this project's is. The learning rate rises over `lr_warmup` of the training and falls to 0
    over the last `lr_decay`.

    Args:
        mean_D: of the layer's raw activations. scale: s with E‖s x‖² = D.
        autocast: products in bfloat16.
    """

    def __init__(
        self, settings: SettingsLike, layer: int, seed: int, mean_D: Tensor, scale: float,
        autocast: bool = False,
    ) -> None:  # fmt: skip
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.settings, self.n_steps = settings, settings.training_tokens // settings.batch
        sae_class, config_class = peer_class(PEERS[settings.trainer].kind)
        torch.manual_seed(seed)
        where = {"device": mean_D.device.type}  # another rank that goes on has another number
        shape = dict(d_in=len(mean_D), d_sae=settings.d_sae, **where)
        self.sae = sae_class(config_class(**shape, **options_of(settings, layer)))
        self.sae.prepare(settings, layer, scale, settings.density_penalty)
        self.sae.b_dec.data.copy_(mean_D * scale)
        config = SAETrainerConfig(
            total_training_samples=self.n_steps * settings.batch,
            train_batch_size_samples=settings.batch,
            lr=settings.lr, lr_end=0.0, autocast=autocast, **where,
            dead_feature_window=max(settings.dead_feature_window // settings.batch, 1),
            logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        self.trainer = SAETrainer(config, self.sae, data_provider=iter(()))
        self.optimizer = self.trainer.optimizer
        self.set_schedules(self.n_steps)

    def set_schedules(self, n_steps: int, done: int = 0) -> None:
        """SAELens' schedules for a training of `n_steps`, as they stand after `done` of them."""
        from sae_lens.training.optim import get_lr_scheduler

        s, trainer = self.settings, self.trainer
        self.n_steps = n_steps
        warmup = round(s.lr_warmup * n_steps)
        decay = min(round(s.lr_decay * n_steps), n_steps - warmup)
        trainer.lr_scheduler = get_lr_scheduler(
            "constant", lr=s.lr, optimizer=self.optimizer, warm_up_steps=warmup, decay_steps=decay,
            training_steps=n_steps, lr_end=0.0, num_cycles=1,
        )  # fmt: skip
        with warnings.catch_warnings():  # of steps of the schedule alone
            warnings.simplefilter("ignore")
            for _ in range(done):
                trainer.lr_scheduler.step()
        for coefficient in trainer.coefficient_schedulers.values():
            coefficient.warm_up_steps = round(PEERS[s.trainer].rise * n_steps)
            coefficient.load_state_dict({"current_step": done})  # and its value follows

    def at(self, step: int, n_steps: int) -> None:
        """Nothing: SAELens' schedules are its own. A training cut short gets shorter ones."""
        if n_steps != self.n_steps:
            self.set_schedules(n_steps, step)

    def step(self, x_BD: Tensor, at: None, log: bool) -> tuple[Tensor, dict | None]:
        """One step on raw activations (B, D); the loss, and the step's record if `log`.

        Both are SAELens' divided by D, as this project's loss is.
        """
        x_BD = x_BD.float() * self.sae.norm_scaling_factor
        lr = self.optimizer.param_groups[0]["lr"]
        out = self.trainer.step(x_BD)
        self.trainer.n_training_steps += 1
        loss = out.loss.detach() / x_BD.shape[1]
        return loss, self.record(loss, out, x_BD, lr) if log else None

    @torch.no_grad()
    def record(self, loss: Tensor, out: Any, x_BD: Tensor, lr: float) -> dict[str, Any]:
        """What train_log.jsonl says of this batch: numbers, or tensors of one.

        Args:
            out: what SAELens' step returned, of the weights before it.
        """
        parts: dict[str, Tensor] = {}
        for name, value in out.losses.items():
            part = part_of_loss(name)
            parts[part] = parts.get(part, 0) + value.detach() / x_BD.shape[1]
        error = (out.sae_out.float() - x_BD).pow(2).sum()
        threshold = getattr(self.sae, "topk_threshold", None)
        return {
            "loss": loss,
            **parts,
            **({} if threshold is None else {"threshold": threshold.clone()}),
            "l0": (out.feature_acts > 0).sum(-1).float().mean(),
            "fvu": error / (x_BD - x_BD.mean(0)).pow(2).sum(),
            "dead_fraction": self.trainer.dead_neurons.float().mean(),
            "lr": lr,
        }


def part_of_loss(name: str) -> str:
    """What the log calls a part of SAELens' loss; the nested errors of Matryoshka are one."""
    known = {"mse_loss": "loss_reconstruction", "auxiliary_reconstruction_loss": "loss_auxiliary",
             "l1_loss": "loss_sparsity", "l0_loss": "loss_sparsity"}  # fmt: skip
    if name.startswith("inner_mse_loss"):
        return "loss_nested"
    return known.get(name, f"loss_{name.removesuffix('_loss')}")


def peer_trainers(
    run: RunLike, stats: dict[int, Any], keys: Iterable[Key]
) -> dict[Key, PeerTrainer]:
    """A trainer of the run's `trainer` per layer and seed.

    Args:
        stats: by layer, the mean of its activations (D,) and the factor that scales them.
    """
    autocast = run.train_dtype == "bfloat16"
    return {(layer, seed): PeerTrainer(run.settings, layer, seed, *stats[layer], autocast)
            for layer, seed in keys}  # fmt: skip
