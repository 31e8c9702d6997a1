"""Whether a model is what it has to be: blocks that pass on one stream, causal, with weights."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import ExperimentError
from harness.steering import Steering

# How far the bridge may be from the model itself, as a part of a tensor's length.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.2}


def decoder(hf: nn.Module) -> nn.Module:
    """A model without its head."""
    return hf.get_decoder()


def blocks_of(hf: nn.Module, name: str) -> nn.ModuleList:
    """The blocks, in the order of the layers: the list of as many as config.json says."""
    n_layers = getattr(hf.config, "num_hidden_layers", None)
    for module in decoder(hf).modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise ExperimentError(
        f"the language model {name!r} must have its blocks in one list, as many as the "
        f"num_hidden_layers of its config.json, {n_layers}, but {type(hf).__name__} has none: "
        "choose another"
    )


@torch.no_grad()
def check_blocks(hf: nn.Module, blocks: nn.ModuleList, name: str) -> bool:
    """Tries passes over a few tokens. Returns whether one can begin behind a block.

    Raises:
        ExperimentError: the blocks don't pass on one residual stream, or it is not causal.
    """
    if hf.device.type == "meta":  # shapes alone
        return True
    tokens_BL = two_endings(hf)
    layers, n_layers, d_model = range(len(blocks)), len(blocks), hf.config.hidden_size
    with Steering(layers) as steering:
        logits = hf(input_ids=tokens_BL, use_cache=False).logits
    streams = [steering.found.get(layer) for layer in layers]
    shape = (*tokens_BL.shape, d_model)
    if steering.passed != [*layers] or any(x is None or x.shape != shape for x in streams):
        raise ExperimentError(
            f"the language model {name!r} must pass on one residual stream (tokens, "
            f"{d_model}) through {n_layers} blocks, one after another, but "
            f"{type(hf).__name__} does otherwise: choose another"
        )
    check_causal(hf, name, streams[-1])
    middle = n_layers // 2
    with contextlib.suppress(Exception):  # of a block that gives more than the stream
        with Steering(at=middle, stream_BLD=streams[middle], late=True):
            again = hf(input_ids=tokens_BL, use_cache=False).logits
        return torch.equal(again, logits)
    return False


def two_endings(hf: nn.Module) -> Tensor:
    """(2, 4) token ids, which differ in the last."""
    tokens_BL = (torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]]) + 3) % hf.config.vocab_size
    return tokens_BL.to(hf.device)


def check_causal(hf: nn.Module, name: str, out_BLX: Tensor) -> None:
    """ExperimentError where what it computes of `two_endings` differs before they do."""
    one, other = out_BLX[:, :-1].float()
    if float((one - other).norm()) > 0.1 * ROUNDING[hf.dtype] * float(one.norm()):
        raise ExperimentError(
            f"the language model {name!r} must be causal, but what {type(hf).__name__} computes of "
            "a token depends on later ones, as an encoder's does: choose a model that predicts the "
            "next token"
        )


@torch.no_grad()
def check_weights(name: str, report: dict[str, Any], hf: nn.Module) -> None:
    """ExperimentError where the weights' file isn't what config.json describes.

    transformers gives what it doesn't find random values, and leaves out what it doesn't know.

    Args:
        report: `from_pretrained`'s, with output_loading_info. hf: what was loaded.
    """
    found = {
        "lacks": report["missing_keys"],
        "has in another shape": {key for key, *_ in report["mismatched_keys"]},
        "also has": report["unexpected_keys"],
    }
    if not any(found.values()):
        return
    check_causal(hf, name, hf.eval()(input_ids=two_endings(hf), use_cache=False).logits)
    parts = [
        f"{what} {min(keys)}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for what, keys in found.items() if keys
    ]  # fmt: skip
    raise ExperimentError(
        f"the weights of the language model {name!r} must be those that its config.json describes, "
        f"but the file {', '.join(parts)}: fetch the model again, or correct its config.json"
    )
