"""What a feature's decoder row says by itself: the tokens that it raises, and its neighbours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.model_checks import blocks_of, decoder

AT_ONCE = 2**25  # numbers of a product of matrices: 128 MiB
ROWS_AT_ONCE = 2**12
Ranked = tuple[Tensor, Tensor]  # values and what they belong to, (F, n) each, the first one first


def final_norm(hf: nn.Module, name: str) -> nn.Module | None:
    """The norm between a model's last block and its unembedding; None where there is none."""
    blocks, found = blocks_of(hf, name), None
    for parent in decoder(hf).modules():
        if any(child is blocks for child in parent.children()):
            for child in parent.children():
                named = "norm" in type(child).__name__.lower()
                if named and gain_of(child, hf.config.hidden_size) is not None:
                    found = child  # the last one: some have another behind the embedding
    return found


@torch.no_grad()
def gain_of(norm: nn.Module, width: int) -> tuple[Tensor, bool] | None:
    """What a norm multiplies each dimension by, (D,), and whether it takes the mean off before.

    Found by trying, since models write it otherwise: Gemma's is 1 + weight. None: it isn't one that
    divides by a length and multiplies.
    """
    like = next(norm.parameters(), torch.zeros(()))
    sign_D = torch.ones(width, dtype=like.dtype, device=like.device)
    sign_D[1::2] = -1
    inputs_ND = torch.stack([sign_D, -sign_D, 8 * sign_D, sign_D + 1])
    try:
        plus_D, minus_D, larger_D, shifted_D = norm(inputs_ND).float()
    except (RuntimeError, TypeError, ValueError):
        return None
    near = dict(rtol=0.02, atol=0.02 * float(plus_D.abs().max()))
    if not torch.allclose(plus_D, larger_D, **near):
        return None
    return (plus_D - minus_D) / 2 * sign_D.float(), torch.allclose(plus_D, shifted_D, **near)


@torch.no_grad()
def logit_lens(
    hf: nn.Module, name: str, W_FD: Tensor, n_known: int, n: int
) -> tuple[dict[str, Ranked], str]:
    """The n tokens whose logits a feature's decoder row raises most, and lowers most.

    The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens") of decoder rows, as in
    Bricken et al. 2023 ("Towards Monosemanticity", logit weights): the row times the gain of the
    final norm, which takes off its mean before where it is a layer norm, times the unembedding.
    The norm's division is left out, as it depends on the rest of the stream. Centred: less the mean
    over the vocabulary, which changes no probability.

    Args:
        W_FD: decoder rows. n_known: how many token ids the tokenizer knows.
    Returns:
        values and token ids by "raises" and "lowers", nothing where the model has no unembedding
        of that width; and in words what they come through.
    """
    unembedding = hf.get_output_embeddings()
    if unembedding is None or unembedding.weight.shape[1] != W_FD.shape[1]:
        return {}, "none: the language model has no unembedding of the SAE's width"
    U_VD, norm = unembedding.weight[:n_known], final_norm(hf, name)
    rows_FD, through = W_FD.detach().float().to(U_VD.device), "the unembedding alone"
    if norm is not None:
        gain_D, centres = gain_of(norm, W_FD.shape[1])
        rows_FD = rows_FD - rows_FD.mean(1, keepdim=True) if centres else rows_FD
        rows_FD, through = rows_FD * gain_D, "the final norm's gain and the unembedding"
    parts = [extremes(rows_RD, U_VD, n) for rows_RD in rows_FD.split(ROWS_AT_ONCE)]
    found = {kind: tuple(torch.cat(part) for part in zip(*(p[kind] for p in parts)))
             for kind in parts[0]}  # fmt: skip
    return found, through


def extremes(rows_RD: Tensor, U_VD: Tensor, n: int) -> dict[str, Ranked]:
    """Of rows the n largest, "raises", and smallest, "lowers", centred products with words.

    Some words at a time: all products may be 16384 times 256000.
    """
    mean_R1 = rows_RD @ U_VD.mean(0, dtype=torch.float32)[:, None]
    n_words, found = max(n, AT_ONCE // ROWS_AT_ONCE), {}
    for start in range(0, len(U_VD), n_words):
        logits_RN = rows_RD @ U_VD[start : start + n_words].float().T - mean_R1
        for kind in ("raises", "lowers"):
            largest = kind == "raises"
            values, at = logits_RN.topk(min(n, logits_RN.shape[1]), largest=largest)
            at += start
            if kind in found:
                values, at = (torch.cat(both, 1) for both in zip(found[kind], (values, at)))
                values, of = values.topk(n, largest=largest)
                at = at.gather(1, of)
            found[kind] = values, at
    return found


@torch.no_grad()
def nearest(W_FD: Tensor, n: int) -> Ranked:
    """Cosines with the n features whose decoder rows are nearest, and their numbers."""
    unit_FD = F.normalize(W_FD.detach().float(), dim=1)
    numbers_F, found = torch.arange(len(unit_FD), device=unit_FD.device), []
    for numbers_R in numbers_F.split(max(1, AT_ONCE // len(unit_FD))):
        cosines_RF = unit_FD[numbers_R] @ unit_FD.T
        cosines_RF.scatter_(1, numbers_R[:, None], -2.0)  # not itself
        found.append(cosines_RF.topk(min(n, len(unit_FD) - 1)))
    values, at = zip(*found)
    return torch.cat(values), torch.cat(at)


# A byte-level vocabulary writes a byte as a character: itself where it can be seen, else from 256.
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNSEEN = [byte for byte in range(256) if byte not in SEEN]
BYTES = {chr(byte): byte for byte in SEEN} | {chr(256 + n): byte for n, byte in enumerate(UNSEEN)}


def token_strings(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Tokens as they stand in a text: with the space before a word, and specials by name.

    Of a token that is a part of a character its bytes, such as \\xe2\\x80.
    """
    options = dict(skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # Behind another one, since some tokenizers drop the space that a text begins with.
    other = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before, strings = tokenizer.decode(other, **options), []
    for token in ids:
        string = tokenizer.decode([*other, token], **options)
        if not string.startswith(before):
            string = before + tokenizer.decode([token], **options)
        string = string[len(before) :]
        if not string or "\ufffd" in string:
            string = spelled_out(tokenizer.convert_ids_to_tokens(token))
        strings.append(string)
    return strings


def spelled_out(token: str | None) -> str:
    """A token as text; of a byte-level vocabulary, bytes that are no character as \\xe2."""
    if token is None:  # a row of the embedding that stands for nothing
        return ""
    if all(character in BYTES for character in token):
        return bytes(BYTES[c] for c in token).decode("utf-8", errors="backslashreplace")
    return token
