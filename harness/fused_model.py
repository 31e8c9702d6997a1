"""Forward passes of Gemma-2 and of Llama's kind on a CPU, fused: the same activations sooner."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from harness.compiled_model import CompiledLanguageModel
from harness.identity import AS_LOADED, changed
from harness.language_model import LanguageModel


class FusedLanguageModel:
    """The same passes on a CPU, faster; see `LanguageModel`, which is the plain reference.

    Matrices are laid out once as oneDNN multiplies them. Queries, keys and values are one product,
    and GELU or SiLU and the product with the gate part of others. The residual stream is float32
    whatever the precision of the products. Gemma-2 also norms what attention and MLP put out, and
    caps scores: in the form softmax(c tanh(s / c)) = softmax(2 c σ(2 s / c)), since torch's σ takes
    a sixth of the time of its tanh.
    """

    def __init__(self, plain: LanguageModel, contexts: int, context: int) -> None:
        """Args: contexts, context: the shape of the passes that are to be fast."""
        self.plain, self.hf, self.name, self.d_model = plain, plain.hf, plain.name, plain.d_model
        self.tokenizer, self.special_token_ids = plain.tokenizer, plain.special_token_ids
        self.blocks, dtype, config = [], plain.hf.dtype, plain.hf.config
        self.gemma, self.edited = config.model_type == "gemma2", False

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
            norms = [block.input_layernorm, block.post_attention_layernorm]
            if self.gemma:
                norms += [block.pre_feedforward_layernorm, block.post_feedforward_layernorm]
            gains: list[Tensor | None] = [
                float(self.gemma) + norm.weight.detach().float() for norm in norms
            ]
            if not self.gemma:  # before attention and MLP, nothing of what they put out
                gains = [gains[0], None, gains[1], None]
            self.blocks.append((matrices, gains))
        self.width, half = attention.head_dim, attention.head_dim // 2
        at_L = torch.arange(context)
        angles = plain.hf.model.rotary_emb(torch.empty(1, 1, dtype=dtype), at_L[None])
        self.cos_L1H, self.sin_L1H = (part[0, :, None, :half].clone() for part in angles)
        far_LL = at_L[:, None] - at_L  # from the query back to the key
        self.masks = []
        for kind in config.layer_types if self.gemma else ["full_attention"] * len(self.blocks):
            window = config.sliding_window if kind == "sliding_attention" else context
            seen_LL = (far_LL >= 0) & (far_LL < window)
            self.masks.append(torch.zeros(context, context).masked_fill_(~seen_LL, -math.inf))

    def activations(self, tokens_BL: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """See `LanguageModel.activations`."""
        if self.edited or tokens_BL.shape[1] != len(self.masks[0]):
            return self.plain.activations(tokens_BL, layers)
        found: dict[int, Tensor] = {}
        with torch.no_grad():
            x_BLD = self.hf.model.embed_tokens(tokens_BL).float()
            for at in range(max(layers) + 1):
                x_BLD = self.block(at, x_BLD)
                if at in layers:
                    found[at] = x_BLD.to(self.hf.dtype)
        return [found[layer] for layer in layers]

    def look(self) -> None:
        """Leaves passes to the plain form where the model isn't as it was loaded.

        What an edit does to its weights, or hooks, is not in what was laid out.
        """
        self.edited = self in AS_LOADED and bool(changed(self))

    def block(self, at: int, x_BLD: Tensor) -> Tensor:
        """The residual stream behind a block, in float32, from the one before it."""
        (qkv, out, gate, up, down), gains = self.blocks[at]
        gating = ("gelu", [], "tanh") if self.gemma else ("swish", [], "")
        product = torch.ops.mkldnn._linear_pointwise

        def normed(x_ND: Tensor, gain_D: Tensor) -> Tensor:
            return (x_ND * self.rms(x_ND)).mul_(gain_D).to(self.hf.dtype)

        def added(x_ND: Tensor, y_ND: Tensor, gain_D: Tensor | None) -> Tensor:
            if gain_D is None:
                return x_ND + y_ND
            y_ND = y_ND.float()
            return torch.addcmul(x_ND, y_ND.mul_(self.rms(y_ND)), gain_D)

        x_ND = x_BLD.flatten(0, 1)
        qkv_NH = product(normed(x_ND, gains[0]), qkv, None, "none", [], "")
        y_ND = self.attended(qkv_NH.view(*x_BLD.shape[:2], -1, self.width), self.masks[at])
        x_ND = added(x_ND, product(y_ND, out, None, "none", [], ""), gains[1])
        y_ND = normed(x_ND, gains[2])
        h_NM = product(y_ND, gate, None, *gating)
        h_NM = product.binary(y_ND, h_NM, up, None, "mul")
        x_ND = added(x_ND, product(h_NM, down, None, "none", [], ""), gains[3])
        return x_ND.view(x_BLD.shape)

    def rms(self, x_ND: Tensor) -> Tensor:
        """(N, 1): one divided by the root of the mean square."""
        norm_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
        return (norm_N1.square_() / x_ND.shape[-1]).add_(self.hf.config.rms_norm_eps).rsqrt_()

    def attended(self, qkv_BLHW: Tensor, mask_LL: Tensor) -> Tensor:
        """What the heads put out, (B · L, heads · W), of queries, keys and values, head by head."""
        config, (n_contexts, length, _, width) = self.hf.config, qkv_BLHW.shape
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

        def by_head(part_BLHW: Tensor, rows: int) -> Tensor:
            """(B, L, heads, W) -> (B · kv_heads, rows, W)."""
            return part_BLHW.transpose(1, 2).reshape(n_contexts * kv_heads, rows, width)

        qk_BLHW, v_BLHW = qkv_BLHW.split([heads + kv_heads, kv_heads], dim=2)
        turned_BLHW, group = self.turned(qk_BLHW), heads // kv_heads * length
        q = by_head(turned_BLHW[:, :, :heads], group)
        k = by_head(turned_BLHW[:, :, heads:], length)
        scores = torch.bmm(q, k.transpose(1, 2)).float().view(-1, length, length)
        scale = width**-0.5
        if self.gemma:
            cap = config.attn_logit_softcapping
            scores.mul_(2 / cap / math.sqrt(config.query_pre_attn_scalar)).sigmoid_()
            scale = 2 * cap
        torch.add(mask_LL, scores, alpha=scale, out=scores)
        weights = scores.softmax(-1).to(v_BLHW.dtype).view(-1, group, length)
        mixed_BHLW = torch.bmm(weights, by_head(v_BLHW, length)).view(
            n_contexts, heads, length, width
        )
        return mixed_BHLW.transpose(1, 2).reshape(n_contexts * length, heads * width)

    def turned(self, qk_BLHW: Tensor) -> Tensor:
        """The rotary embedding of queries and keys: two halves of a head are a plane's axes."""
        n_contexts, length, heads, width = qk_BLHW.shape
        a, b = qk_BLHW[..., : width // 2], qk_BLHW[..., width // 2 :]
        turned_BLHW = qk_BLHW.new_empty(n_contexts, heads, length, width).transpose(1, 2)
        for goal, one, other, sign in (
            (turned_BLHW[..., : width // 2], a, b, -1), (turned_BLHW[..., width // 2 :], b, a, 1)
        ):  # fmt: skip
            torch.mul(one, self.cos_L1H, out=goal)
            goal.addcmul_(other, self.sin_L1H, value=sign)
        return turned_BLHW


def for_harvest(
    lm: LanguageModel, dtype: str, contexts: int, context: int
) -> LanguageModel | FusedLanguageModel | CompiledLanguageModel:
    """The language model in the precision and the form in which its passes take least time.

    On a GPU the compiled form. On a CPU the fused one, where oneDNN has what it needs and the model
    is small enough to be held twice. Either where its activations are as near to the model's as
    the plain form's: a context is passed through each.
    """
    plain = lm.cast(dtype)
    config, on_gpu = plain.hf.config, plain.hf.device.type == "cuda"
    small = sum(parameter.nbytes for parameter in plain.hf.parameters()) < 1e9
    known = has_known_blocks(config, context)
    if plain.hook != "resid_post" or not on_gpu and not (small and known):
        return plain
    last = (config.num_hidden_layers - 1,)
    # Not the first ones: those may be reserved, never trained and all alike.
    random = torch.Generator().manual_seed(0)
    shape = (contexts if on_gpu else 1, context)  # a compiler makes code for a shape
    tokens_BL = torch.randint(3, config.vocab_size, shape, generator=random)
    exact_BLD = lm.activations(tokens_BL, last)[0]
    try:
        given = (plain, context) if on_gpu else (plain, contexts, context)
        fused = (CompiledLanguageModel if on_gpu else FusedLanguageModel)(*given)
        fused_BLD = fused.activations(tokens_BL, last)[0]
    except (AttributeError, RuntimeError):  # an operator or compiler that isn't there
        return plain
    allowed = 1e-4
    if dtype != "float32":
        allowed = max(2e-2, 1.1 * _error(plain.activations(tokens_BL, last)[0], exact_BLD))
    return fused if _error(fused_BLD, exact_BLD) < allowed else plain


def has_known_blocks(config: Any, context: int) -> bool:
    """Whether a model's blocks are those that `FusedLanguageModel` computes."""
    if config.model_type == "gemma2":
        gelu = config.hidden_activation == "gelu_pytorch_tanh"
        return gelu and bool(config.attn_logit_softcapping) and not config.attention_bias
    biases = (getattr(config, f"{of}_bias", False) for of in ("attention", "mlp"))
    window = getattr(config, "sliding_window", None)
    whole = window is None or window >= context
    kind = config.model_type in ("llama", "mistral")
    return kind and whole and config.hidden_act == "silu" and not any(biases)


def _error(found_BLD: Tensor, exact_BLD: Tensor) -> float:
    """The mean of the tokens' relative errors: a Llama's first is a hundred times as large."""
    error_BL = (found_BLD.double() - exact_BLD.double()).norm(dim=-1)
    return float((error_BL / exact_BLD.double().norm(dim=-1)).mean())
