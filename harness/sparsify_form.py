"""SAEs in the form of EleutherAI's sparsify (eai-sparsify 1.3.3), which delphi reads, too.

    f = TopK(ReLU((x − b_dec) encoder.weightᵀ + encoder.bias)),    x̂ = Σ f_i W_dec[i] + b_dec

That is SAELens' "topk" with W_enc the other way round. sparsify has no threshold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from harness.errors import ExperimentError
from harness.language_model import language_model_config
from harness.model_checks import blocks_of
from harness.store import write_json


def hookpoints(run: Path, folders: list[str], settings: dict[str, Any]) -> dict[str, str]:
    """By folder below sae/, where sparsify looks for that SAE: layers.4, by its module's name.

    With several seeds seed_0/layers.4, so that what lies in seed_0 is what sparsify expects.

    Raises:
        ExperimentError: sparsify has no SAE of that kind, or reads other activations.
    """
    why = None
    for at in folders:
        kind = json.loads((run / "sae" / at / "cfg.json").read_text())["architecture"]
        if kind != "topk":
            why = f"has SAEs that keep the k largest features alone, and sae/{at} is {kind!r}"
    if settings.get("hook", "resid_post") != "resid_post":
        why = f"reads what a module puts out, and hook is {settings['hook']!r}"
    if why:
        raise ExperimentError(
            f"{run.resolve().name} can't be published in sparsify's form, which {why}: leave FORM "
            "out, for SAELens' form"
        )
    blocks, several = blocks_name(settings["model"]), len(settings["seeds"]) > 1
    found = {}
    for at in folders:
        layer, seed = at.split("/")
        module = f"{blocks}.{layer.removeprefix('layer_')}"
        found[at] = f"{seed}/{module}" if several else module
    return found


def blocks_name(model: str) -> str:
    """What a language model's list of blocks is called, beneath its base model: "layers"."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(language_model_config(model))
    blocks = blocks_of(hf, model)
    return next(name for name, part in hf.base_model.named_modules() if part is blocks)


def write_as_sparsify(source: Path, folder: Path) -> dict[str, Any]:
    """Writes an SAE that lies in SAELens' "topk" form; its cfg.json there.

    Args:
        source: a folder that `SAE.load_from_disk` reads.
    """
    from sae_lens import SAE

    sae = SAE.load_from_disk(source)
    folder.mkdir(parents=True)
    weights = {
        "encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec, "b_dec": sae.b_dec,
    }  # fmt: skip
    weights = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "sae.safetensors")
    unit = bool(((sae.W_dec.norm(dim=1) - 1).abs() < 1e-4).all())
    write_json(folder / "cfg.json", {
        "activation": "topk", "k": sae.cfg.k, "num_latents": sae.cfg.d_sae, "d_in": sae.cfg.d_in,
        "normalize_decoder": unit, "multi_topk": False, "skip_connection": False,
        "transcode": False,
    })  # fmt: skip
    return sae.cfg.to_dict()
