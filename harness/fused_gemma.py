"""Gemma-2's forward pass on a CPU with fused products: the same activations in less time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.language_model import LanguageModel


class FusedLanguageModel:
    """The same passes on a CPU, faster; see `LanguageModel`, which is the plain reference.

    Matrices are laid out once as oneDNN multiplies them. Queries, keys and values are one product,
    and GELU and the product with the gate part of others. The residual stream is float32 whatever
    the precision of the products. Scores are capped in the form softmax(c tanh(s / c)) =
    softmax(2 c σ(2 s / c)), since torch's σ takes a sixth of the time of its tanh.
    """

    def __init__(self, plain: LanguageModel, contexts: int, context: int) -> None:
        """Args: contexts, context: the shape of the passes that are to be fast."""
        self.plain, self.hf, self.name, self.d_model = plain, plain.hf, plain.name, plain.d_model
        self.tokenizer, self.special_token_ids = plain.tokenizer, plain.special_token_ids
        self.blocks, dtype = [], plain.hf.dtype

        def laid_out(*weights: Tensor) -> Tensor:
            weight = torch.cat([weight.detach() for weight in weights])
            return torch.ops.mkldnn._reorder_linear_weight(weight, contexts * context)

        for block in plain.hf.model.layers:
            attention, mlp = block.self_attn, block.mlp
            matrices = (
                laid_out(*(getattr(attention, f"{x}_proj").weight for x in "qkv")),
                laid_out(attention.o_proj.weight),
                *(laid_out(getattr(mlp, f"{x}_proj").weight) for x in ("gate", "up", "down")),
            )
            gains = [
                1 + norm.weight.detach().float()
                for norm in (
                    block.input_layernorm, block.post_attention_layernorm,
                    block.pre_feedforward_layernorm, block.post_feedforward_layernorm,
                )
            ]  # fmt: skip
            self.blocks.append((matrices, gains))
        half = plain.hf.config.head_dim // 2
        at_L = torch.arange(context)
        angles = plain.hf.model.rotary_emb(torch.empty(1, 1, dtype=dtype), at_L[None])
        self.cos_L1H, self.sin_L1H = (part[0, :, None, :half].clone() for part in angles)
        far_LL = at_L[:, None] - at_L  # from the query back to the key
        self.masks = []
        for kind in plain.hf.config.layer_types:
            window = plain.hf.config.sliding_window if kind == "sliding_attention" else context
            seen_LL = (far_LL >= 0) & (far_LL < window)
            self.masks.append(torch.zeros(context, context).masked_fill_(~seen_LL, -math.inf))

    def activations(self, tokens_BL: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """See `LanguageModel.activations`."""
        (n_contexts, length), config = tokens_BL.shape, self.hf.config
        if length != len(self.masks[0]):
            return self.plain.activations(tokens_BL, layers)
        heads, kv_heads, width = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )  # fmt: skip
        half, cap, dtype = width // 2, config.attn_logit_softcapping, self.hf.dtype
        product = torch.ops.mkldnn._linear_pointwise

        def rms(x_ND: Tensor) -> Tensor:
            norm_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
            return (norm_N1.square_() / x_ND.shape[-1]).add_(config.rms_norm_eps).rsqrt_()

        def by_head(part_BLHW: Tensor, rows: int) -> Tensor:
            """(B, L, heads, W) -> (B · kv_heads, rows, W)."""
            return part_BLHW.transpose(1, 2).reshape(n_contexts * kv_heads, rows, width)

        found: dict[int, Tensor] = {}
        with torch.no_grad():
            x_ND = self.hf.model.embed_tokens(tokens_BL).flatten(0, 1).float()
            for at, ((qkv, out, gate, up, down), gains) in enumerate(self.blocks):
                y_ND = (x_ND * rms(x_ND)).mul_(gains[0]).to(dtype)
                qkv_BLHW = product(y_ND, qkv, None, "none", [], "").view(
                    n_contexts, length, heads + 2 * kv_heads, width
                )
                # Rotary embedding of queries and keys: two halves of a head are a plane's axes.
                qk_BLHW, v_BLHW = qkv_BLHW.split([heads + kv_heads, kv_heads], dim=2)
                a, b = qk_BLHW[..., :half], qk_BLHW[..., half:]
                turned_BHLW = qk_BLHW.new_empty(n_contexts, heads + kv_heads, length, width)
                turned_BLHW = turned_BHLW.transpose(1, 2)
                for goal, one, other, sign in (
                    (turned_BLHW[..., :half], a, b, -1), (turned_BLHW[..., half:], b, a, 1)
                ):  # fmt: skip
                    torch.mul(one, self.cos_L1H, out=goal)
                    goal.addcmul_(other, self.sin_L1H, value=sign)
                group = heads // kv_heads * length
                q = by_head(turned_BLHW[:, :, :heads], group)
                k = by_head(turned_BLHW[:, :, heads:], length)
                scores = torch.bmm(q, k.transpose(1, 2)).float().view(-1, length, length)
                scores.mul_(2 / cap / math.sqrt(config.query_pre_attn_scalar)).sigmoid_()
                torch.add(self.masks[at], scores, alpha=2 * cap, out=scores)
                weights = scores.softmax(-1).to(dtype).view(-1, group, length)
                mixed_BHLW = torch.bmm(weights, by_head(v_BLHW, length)).view(
                    n_contexts, heads, length, width
                )
                y_ND = mixed_BHLW.transpose(1, 2).reshape(len(x_ND), heads * width)
                y_ND = product(y_ND, out, None, "none", [], "").float()
                x_ND = torch.addcmul(x_ND, y_ND.mul_(rms(y_ND)), gains[1])
                y_ND = (x_ND * rms(x_ND)).mul_(gains[2]).to(dtype)
                h_NM = product(y_ND, gate, None, "gelu", [], "tanh")
                h_NM = product.binary(y_ND, h_NM, up, None, "mul")
                y_ND = product(h_NM, down, None, "none", [], "").float()
                x_ND.addcmul_(y_ND.mul_(rms(y_ND)), gains[3])
                if at in layers:
                    found[at] = x_ND.to(dtype).view(n_contexts, length, -1)
                if at == max(layers):
                    break
        return [found[layer] for layer in layers]


def for_harvest(
    lm: LanguageModel, dtype: str, contexts: int, context: int
) -> LanguageModel | FusedLanguageModel:
    """The language model in the precision and the form in which its passes take least time.

    On a CPU the fused form, where oneDNN has what it needs, the model is small enough to be held
    twice, and its activations are those of the plain form: a context is passed through both.
    """
    plain = lm.cast(dtype)
    config = plain.hf.config
    small = sum(parameter.nbytes for parameter in plain.hf.parameters()) < 1e9
    gemma = config.model_type == "gemma2" and config.attn_logit_softcapping
    if plain.hf.device.type != "cpu" or not small or not gemma or plain.hook != "resid_post":
        return plain
    last = (config.num_hidden_layers - 1,)
    tokens_BL = torch.arange(context)[None] % config.vocab_size
    try:
        fused = FusedLanguageModel(plain, contexts, context)
        found, expected = (form.activations(tokens_BL, last)[0] for form in (fused, plain))
    except (AttributeError, RuntimeError):  # an operator that this build of torch doesn't have
        return plain
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    return fused if error < (1e-5 if dtype == "float32" else 2e-2) else plain
