"""SAEs in SAELens' form, and whether it computes what they do."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from harness.console import STAGE
from harness.errors import ExperimentError
from harness.evaluation.core import check_finite
from harness.interfaces import RunLike, SAELike, SettingsLike
from harness.ledger import LEDGER
from harness.ranks import RANKS
from harness.store import write_atomic, write_json
from harness.tokenizer import counted


def export_saes(run: RunLike, saes: dict[tuple[int, int], SAELike]) -> None:
    """Writes each SAE, folded, as SAELens stores it, with θ and what follows in theta.json.

    Args:
        saes: by layer and seed, as they were trained.
    """
    for (layer, seed), sae in saes.items():
        theta = {**sae.learned_scalars(), "scale": sae.norm_scaling_factor}
        raw, folder = sae.fold_activation_norm_scaling(), f"sae/layer_{layer}/seed_{seed}"
        export_to_saelens(run, raw, run.out_dir / folder, theta=theta)


def export_to_saelens(
    run: RunLike,
    sae: SAELike,
    folder: Path,
    kind: str | None = None,
    k: int | None = None,
    theta: dict[str, Any] | None = None,
) -> None:
    """Writes an SAE as SAELens stores it: `sae_lens.SAE.load_from_disk(folder)` reads it.

    Where SAELens' form computes something else, as with an edited `encode`, no such SAE is written,
    but the weights in a file of another name, and a note that says so.

    Args:
        kind: None: what it is by itself; see `kind_of`.
        theta: what else belongs to it, for theta.json beside it.
        See `write_as_saelens` for the others.
    """
    if not RANKS.first:
        return
    STAGE.begin("export")
    if kind is None:
        kind, k = kind_of(sae)
    begins = run.language_model.tokenizer.bos_token_id is not None
    stored = write_as_saelens(sae, run.settings, folder, kind, k, begins)
    if not gives_same(sae, stored, some_activations(run, sae.cfg.hook_layer)):
        why = (f"SAELens' {kind} SAE with these weights gives other features or reconstructions "
               "than encode and decode")  # fmt: skip
        LEDGER.warns(f"sae/ holds weights.safetensors, which SAELens does not read: {why}")
        shutil.rmtree(folder)
        folder.mkdir()
        weights = {name: t.detach().clone().contiguous() for name, t in sae.state_dict().items()}
        save_file(weights, folder / "weights.safetensors")
        note = "These weights belong to CustomSAE of the run's experiment.py. They are not written"
        write_atomic(folder / "README.txt", f"{note} as an SAE of SAELens, since {why} there.\n")
    if theta is not None:
        numbers = {key: v.item() if isinstance(v, torch.Tensor) else v for key, v in theta.items()}
        write_json(folder / "theta.json", numbers)


def kind_of(sae: Any) -> tuple[str, int | None]:
    """SAELens' name of an SAE's form, and the features that it keeps of each token, or None."""
    if hasattr(sae, "stored"):
        return sae.stored.cfg.architecture(), None
    if sae.threshold is not None:
        return "jumprelu", None
    return ("standard", None) if sae.k is None else ("topk", sae.k)


def write_as_saelens(
    sae: SAELike, settings: SettingsLike, folder: Path, kind: str, k: int | None = None,
    prepend_bos: bool = True,
) -> Any:  # fmt: skip
    """Writes an SAE's weights in SAELens' form; the SAE that SAELens reads back.

    Args:
        sae: for raw activations. Its state_dict has what the kind needs: W_enc (D, F), W_dec
            (F, D), b_enc (F,), b_dec (D,), and for "jumprelu" threshold, (F,) or a number. One of
            SAELens' own trainers has `stored`, which is written as it is.
        kind: "topk", "jumprelu" or "standard".
        k: features that a "topk" SAE keeps of each token.
        prepend_bos: whether its contexts begin with a token of their own.
    Raises:
        ExperimentError: SAELens reads back other weights.
    """
    from sae_lens import SAE
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    metadata = SAEMetadata(
        model_name=settings.model,
        hook_name=sae.cfg.hook_name,
        hook_layer=sae.cfg.hook_layer,
        context_size=settings.context,
        prepend_bos=prepend_bos,
        dataset_path=settings.training_text,
    )
    shape: dict[str, Any] = dict(d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, metadata=metadata)
    weights = sae.state_dict()
    check_finite(f"the SAE for {folder}", weights)
    if hasattr(sae, "stored"):
        stored: Any = copy.deepcopy(sae.stored)
        for name, value in metadata.items():  # beside what it says of its training
            stored.cfg.metadata[name] = value
    elif kind == "jumprelu":
        stored = JumpReLUSAE(JumpReLUSAEConfig(**shape))
    elif kind == "topk":
        # SAEDashboard asks for it, and with decoder rows of unit norm it changes nothing.
        unit = bool(((sae.W_dec.norm(dim=1) - 1).abs() < 1e-4).all())
        stored = TopKSAE(TopKSAEConfig(k=k, rescale_acts_by_decoder_norm=unit, **shape))
    else:
        stored = StandardSAE(StandardSAEConfig(**shape))
    for name, tensor in stored.state_dict().items():
        tensor.copy_(weights[name])
    stored.save_model(folder)
    read = SAE.load_from_disk(folder)
    back = read.state_dict()
    if any(not torch.equal(back[name].cpu(), t.cpu()) for name, t in stored.state_dict().items()):
        raise ExperimentError(
            f"the SAE in {folder} is not read back by SAELens as it was written: look at the disk, "
            "and at the versions in constraints.txt"
        )
    return read


def check_published(name: str, sae: SAELike, folder: Path) -> None:
    """Holds an SAE that was scored against the weights that stand in the folder of its export.

    Raises:
        ExperimentError: they differ: it was changed after the export.
    """
    scored = sae.state_dict()
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as published:
            for weights in published.keys():
                tensor, written = scored[weights].cpu(), published.get_tensor(weights)
                # A threshold is one number in an SAE, and one of each feature there.
                if not torch.equal(written.to(tensor.dtype), tensor.expand_as(written)):
                    raise ExperimentError(
                        f"{name} must be scored as it is published, but its {weights} is another "
                        "than in sae/: change an SAE before export in main, not in evaluate"
                    )


def some_activations(run: RunLike, layer: int, n_texts: int = 8) -> torch.Tensor:
    """Of the tokens that count of the first probing texts, (N, D)."""
    train, _ = next(iter(run.probe_texts.values()))
    tokens_BL = next(iter(train.values()))["input_ids"][:n_texts]
    lm, s = run.language_model, run.settings
    acts_BLD = lm.activations(tokens_BL, (layer,))[0]
    return acts_BLD[counted(tokens_BL, lm.special_token_ids, s.first_positions)]


@torch.no_grad()
def gives_same(sae: SAELike, stored: Any, x_ND: torch.Tensor) -> bool:
    """Whether two SAEs give the same features and reconstructions of 98 in 100 tokens.

    A near tie in topk may be broken otherwise.
    """
    found = []
    for one in (sae, stored):
        acts_NF = one.encode(x_ND.to(one.b_dec.device, one.b_dec.dtype))
        found.append((acts_NF.float().cpu(), one.decode(acts_NF).float().cpu()))
    same_N = torch.ones(len(x_ND), dtype=torch.bool)
    for ours, theirs in zip(*found):
        same_N &= (ours - theirs).norm(dim=1) <= 1e-3 * ours.norm(dim=1) + 1e-6
    return float(same_N.float().mean()) >= 0.98
