"""SAELens' trainers in the place of this project's, and every SAE in the form that SAELens stores.

A `PeerTrainer` takes the steps that `experiment.Trainer` takes, on the same batches: it gives
`experiment.train` another method and changes nothing else. `exported` brings any SAE into raw
units with decoder rows of unit norm, as SAELens stores and reads it: what is compared has gone
the same way.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from sae_bench.custom_saes.base_sae import BaseSAE
from torch import Tensor

from experiment import CustomSAE, Settings
from harness.evaluation.export import write_as_saelens


class PeerTrainer:
    """SAELens' SAETrainer behind the interface of `experiment.Trainer`.

    The SAE starts as SAELens starts it, but for b_dec, which is the mean of the first activations
    as this project's is. The learning rate rises over `warmup` of the training and falls to 0
    over the last `settings.lr_decay`.

    Args:
        kind: SAELens' name of the method, "topk" and so on.
        scale: s with E‖s x‖² = D.
        dead_window: tokens without firing after which a feature counts as dead.
        options: of SAELens' configuration of the method.
    """

    def __init__(
        self,
        kind: str,
        settings: Settings,
        seed: int,
        mean_D: Tensor,
        scale: float,
        autocast: bool,
        lr: float,
        warmup: float = 0.05,
        dead_window: int = 100_000,
        **options: Any,
    ) -> None:
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.registry import get_sae_training_class
        from sae_lens.training.sae_trainer import SAETrainer

        sae_class, config_class = get_sae_training_class(kind)
        torch.manual_seed(seed)
        shape = dict(d_in=len(mean_D), d_sae=settings.d_sae, device=str(mean_D.device))
        self.sae = sae_class(config_class(**shape, **options))
        self.sae.b_dec.data.copy_(mean_D * scale)
        self.sae.norm_scaling_factor = scale  # as a CustomSAE has it
        n_steps = settings.training_tokens // settings.batch
        config = SAETrainerConfig(
            total_training_samples=n_steps * settings.batch,
            train_batch_size_samples=settings.batch,
            lr=lr, lr_end=0.0, lr_warm_up_steps=round(warmup * n_steps),
            lr_decay_steps=round(settings.lr_decay * n_steps),
            dead_feature_window=max(dead_window // settings.batch, 1),
            device=str(mean_D.device), autocast=autocast, logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        self.trainer = SAETrainer(config, self.sae, data_provider=iter(()))

    def at(self, step: int, n_steps: int) -> None:
        """SAELens' trainer has its own."""

    def step(self, x_BD: Tensor, at: None, log: bool) -> tuple[Tensor, dict | None]:
        """One step on raw activations (B, D); the loss, and the step's record if `log`."""
        x_BD = x_BD.float() * self.sae.norm_scaling_factor
        out = self.trainer.step(x_BD)
        self.trainer.n_training_steps += 1
        if not log:
            return out.loss.detach(), None
        error = (out.sae_out.detach().float() - x_BD).pow(2).sum()
        return out.loss.detach(), {
            "loss": float(out.loss.detach()),
            "l0": float((out.feature_acts.detach() > 0).sum(-1).float().mean()),
            "fvu": float(error / (x_BD - x_BD.mean(0)).pow(2).sum()),
            "lr": self.trainer.optimizer.param_groups[0]["lr"],
        }


class Exported(BaseSAE):
    """An SAE that SAELens has read from a disk, in the form that SAE-Bench evaluates."""

    def __init__(self, stored: Any, settings: Settings, layer: int) -> None:
        d_sae, d_in = stored.W_dec.shape
        where = stored.W_dec.device, stored.W_dec.dtype
        super().__init__(d_in, d_sae, settings.model, layer, *where)
        self.stored = stored
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            if getattr(stored, name) is not None:
                getattr(self, name).data = getattr(stored, name).data
        if hasattr(stored, "b_mag"):  # a gated SAE has two biases for b_enc; SAE-Bench asks for one
            self.b_mag = stored.b_mag
        self.cfg.architecture = stored.cfg.architecture()
        self.cfg.context_size = settings.context
        self.cfg.dataset_path = settings.training_text

    def encode(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, F)."""
        return self.stored.encode(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """(…, F) -> (…, D)."""
        return self.stored.decode(feature_acts)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, D): the reconstruction."""
        return self.decode(self.encode(x))


@torch.no_grad()
def exported(sae: Any, settings: Settings, layer: int) -> Exported:
    """An SAE as it comes back from SAELens' files: in raw units, decoder rows of unit norm.

    Features of scaled activations are s times those of raw ones, and so are their thresholds.

    Args:
        sae: this project's, or a training SAE of SAELens' whose `scale` is s, by which training
            multiplied the activations.
    """
    from sae_lens import SAE

    with tempfile.TemporaryDirectory() as folder:
        if isinstance(sae, CustomSAE):
            kind = {"relu": "standard"}.get(sae.cfg.activation_fn_str, sae.cfg.activation_fn_str)
            raw = sae.fold_activation_norm_scaling()
            return Exported(
                write_as_saelens(raw, settings, Path(folder), kind, sae.k), settings, layer
            )
        copy.deepcopy(sae).save_inference_model(folder)
        stored = SAE.load_from_disk(folder)
    norms_F = stored.W_dec.norm(dim=1)
    if not torch.allclose(norms_F, torch.ones_like(norms_F), atol=1e-6):
        stored.fold_W_dec_norm()
    for name in ("b_enc", "b_dec", "threshold", "b_gate", "b_mag"):
        if getattr(stored, name, None) is not None:
            getattr(stored, name).data.div_(sae.norm_scaling_factor)
    return Exported(stored, settings, layer)
