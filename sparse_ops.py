"""Products with codes of which almost all are zero: torch and numpy, a plain form beside each.

`Codes` are what an encoder makes of a batch, in one of two layouts: all features of each token, or
the few that are active. What is written with its methods is right in both. Where most are active,
those that are selected may still be few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# The sparse layout is taken where at most this part of the features is in it: it is faster then.
MAX_DENSITY = 0.08


def on_gpu(x: Tensor) -> bool:
    """Whether what x computes is launched on a GPU: then no shape may depend on values."""
    return x.device.type == "cuda"


@dataclass(frozen=True)
class Codes:
    """Features of a batch of tokens: all F of each, or M of each and which features these are.

    Dense layout: `acts` (…, F), `indices` None. Sparse layout: `acts` and `indices` (B, M), M the
    most features that a token has active; a token with fewer has zeros at the end of its row,
    whatever their index. So functions of single features have to leave zero at zero, and a mean
    over M means nothing: for a term that needs each feature there is `dense()`.
    """

    acts: Tensor
    indices: Tensor | None = None
    n_features: int = 0  # F, in the sparse layout

    def dense(self) -> Tensor:
        """(…, F): all features."""
        if self.indices is None:
            return self.acts
        all_BF = self.acts.new_zeros(len(self.acts), self.n_features)
        return all_BF.scatter_add(-1, self.indices, self.acts)

    def map(self, function: Callable[[Tensor], Tensor]) -> Codes:
        """An elementwise function of each feature that leaves zero at zero: relu, tanh."""
        return replace(self, acts=function(self.acts))

    def weighted(self, weight_F: Tensor) -> Codes:
        """Each feature times its weight, (F,)."""
        at = weight_F if self.indices is None else weight_F[self.indices]
        return replace(self, acts=self.acts * at)

    def largest(self, k: int) -> Tensor:
        """(…, k) int64: the places of the k largest entries of each row; on a GPU their mask."""
        acts = self.acts.detach()
        places = acts.topk(min(k, acts.shape[-1]), dim=-1, sorted=False).indices
        if not on_gpu(acts):
            return places
        # A mask saves writing by places, which takes a sort where it has to be reproducible.
        return torch.zeros_like(acts, dtype=torch.bool).scatter(-1, places, True)

    def above(self, threshold: Tensor | float) -> Tensor:
        """Bool, of the shape of `acts`: the entries above a number."""
        return self.acts.detach() > threshold

    def only(self, chosen: Tensor) -> Codes:
        """The chosen entries, and zeros in the place of the others: Σ_{i ∈ S}.

        Args:
            chosen: what `largest` or `above` return: places in each row, or a mask.
        """
        acts = self.acts
        if chosen.dtype == torch.bool:
            return replace(self, acts=torch.where(chosen, acts, 0.0))
        values = acts.gather(-1, chosen)
        return replace(self, acts=torch.zeros_like(acts).scatter(-1, chosen, values))

    def without(self, chosen: Tensor) -> Codes:
        """Zeros in the place of the chosen entries, and the others: Σ_{i ∉ S}."""
        if chosen.dtype == torch.bool:
            return replace(self, acts=torch.where(chosen, 0.0, self.acts))
        return replace(self, acts=self.acts.scatter(-1, chosen, 0.0))

    def split(self, chosen: Tensor, sparse: bool = False) -> tuple[Codes, Codes]:
        """`only` and `without`, faster: codes that add to these.

        With `sparse`, the chosen places of the dense layout are in the sparse one, where they are
        few.
        """
        if sparse and self.indices is None and are_few(chosen, self.acts):
            values, second = _Split.apply(self.acts, chosen, True)
            return Codes(values, chosen, self.acts.shape[-1]), replace(self, acts=second)
        first, second = _Split.apply(self.acts, chosen, False)
        return replace(self, acts=first), replace(self, acts=second)

    def sum_over_features(self) -> Tensor:
        """(…,): a sum per token."""
        return self.acts.sum(-1)

    def n_active(self) -> Tensor:
        """(…,) int64: how many features of each token are positive. Their mean is L0."""
        return (self.acts > 0).sum(-1)

    def fired(self) -> Tensor:
        """(F,) bool: the features that are positive for some token of the batch."""
        if self.indices is None:
            return self.acts.detach().amax(0) > 0
        fired_F = torch.zeros(self.n_features, dtype=torch.bool, device=self.acts.device)
        fired_F[self.indices[self.acts > 0]] = True
        return fired_F

    def counts(self) -> Tensor:
        """(F,) int64: for how many tokens each is positive; if dense, ten times as slow."""
        if self.indices is None:
            return (self.acts > 0).sum(0)
        return torch.bincount(self.indices[self.acts > 0], minlength=self.n_features)

    def decode(self, W_dec: Tensor) -> Tensor:
        """(…, D): the sum of W_dec's rows (F, D), each times its feature."""
        if self.indices is None:
            return self.acts @ W_dec
        return sparse_decode(self.acts, self.indices, W_dec)


class _Split(torch.autograd.Function):
    """`Codes.split`: a backward of one pass, where autograd's has four."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, chosen: Tensor, sparse: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(chosen)
        ctx.sparse, codes = sparse, Codes(acts)
        first = acts.gather(-1, chosen) if sparse else codes.only(chosen).acts
        return first, codes.without(chosen).acts

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, None, None]:
        (chosen,) = ctx.saved_tensors
        if chosen.dtype == torch.bool:
            return torch.where(chosen, first, second), None, None
        values = first if ctx.sparse else first.gather(-1, chosen)
        return second.scatter(-1, chosen, values), None, None


def are_few(places: Tensor, acts: Tensor) -> bool:
    """Whether places in rows are a small part of them, on a CPU."""
    if places.dtype == torch.bool or acts.dim() != 2 or on_gpu(acts):
        return False
    return places.shape[-1] <= MAX_DENSITY * acts.shape[-1]


# ------------------------------------------------------------------------------------ encoding


def preactivations(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    active: Callable[[Tensor], Tensor] | None = None,
) -> Codes:
    """(x − b_dec) W_enc + b_enc: of all features, or of the active ones alone where they are few.

    b_dec gets its gradient through a term that is zero, a product with a vector where
    (x − b_dec) W_enc would need one with a matrix. x gets none.

    Args:
        x: (…, D), or (B, D) with `active`. W_enc: (D, F).
        active: from preactivations (B, F) to a mask of those that are wanted; None: all are.
    """
    shift_F = (b_dec.detach() - b_dec) @ W_enc.detach()
    centred, bias_F = x.to(W_enc.dtype) - b_dec.detach(), b_enc + shift_F
    pre = centred @ W_enc + bias_F
    if active is not None and (nonzero := nonzero_codes(active(pre.detach()))):
        return gather_active(pre.detach(), nonzero, centred, bias_F, W_enc)
    return Codes(pre)


def preactivations_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """What `preactivations` computes, in the dense layout."""
    return (x - b_dec) @ W_enc + b_enc


class Nonzero(NamedTuple):
    """The N marked entries of a (B, F) matrix, in its order, and their places in a (B, M) one."""

    rows: Tensor
    columns: Tensor
    places: Tensor
    widest: int  # M, the most in a row


def nonzero_codes(active_BF: Tensor) -> Nonzero | None:
    """Where a mask is true; None if it is in many places, or on a GPU (unmeasured)."""
    if on_gpu(active_BF):
        return None
    mask_BF = active_BF.numpy()  # numpy counts and finds in a quarter of torch's time
    if np.count_nonzero(mask_BF) > MAX_DENSITY * mask_BF.size:
        return None
    n_rows, width = mask_BF.shape
    flat = torch.from_numpy(np.flatnonzero(mask_BF))
    rows = flat // width
    counts_B = torch.bincount(rows, minlength=n_rows)
    places = torch.arange(len(rows)) - (counts_B.cumsum(0) - counts_B)[rows]
    return Nonzero(rows, flat - rows * width, places, max(int(counts_B.max()), 1))


def gather_active(
    pre_BF: Tensor, nonzero: Nonzero, centred_BD: Tensor, bias_F: Tensor, W_enc: Tensor
) -> Codes:
    """The entries that `nonzero` names of pre_BF = centred_BD @ W_enc + bias_F.

    Gradients of W_enc and bias_F are sums over these entries; centred_BD gets none.
    """
    shape, at = (len(pre_BF), nonzero.widest), (nonzero.rows, nonzero.places)
    indices = torch.zeros(shape, dtype=torch.int64).index_put(at, nonzero.columns)
    acts = pre_BF.new_zeros(shape).index_put(at, pre_BF[nonzero.rows, nonzero.columns])
    acts = _EncoderGradient.apply(acts, nonzero, centred_BD, bias_F, W_enc)
    return Codes(acts, indices, len(bias_F))


class _EncoderGradient(torch.autograd.Function):
    """Returns its first argument; its backward is that of `gather_active`."""

    @staticmethod
    def forward(
        ctx: Any, acts: Tensor, nonzero: Nonzero, centred_BD: Tensor, bias_F: Tensor, W_enc: Tensor
    ) -> Tensor:
        ctx.nonzero, ctx.centred_BD, ctx.n_features = nonzero, centred_BD, len(bias_F)
        return acts.view_as(acts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        nonzero, n_features = ctx.nonzero, ctx.n_features
        grad_N = grad[nonzero.rows, nonzero.places]
        sums_FD = weighted_sums(nonzero.columns, grad_N, nonzero.rows, ctx.centred_BD, n_features)
        bias_F = torch.bincount(nonzero.columns, weights=grad_N, minlength=n_features)
        return None, None, None, bias_F.to(grad.dtype), sums_FD.T


# ------------------------------------------------------------------------------------ decoding


def sparse_decode(acts: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """(B, D): Σ_m acts[b, m] · W_dec[indices[b, m]], over the acts that are not zero.

    Args:
        acts, indices: (B, M). W_dec: (F, D).
    """
    nonzero = acts.detach() != 0
    counts_B = nonzero.sum(1)
    indices_N, acts_N = indices[nonzero], acts[nonzero]
    out_BD = torch.nn.functional.embedding_bag(
        indices_N, W_dec.detach(), counts_B.cumsum(0) - counts_B, mode="sum",
        per_sample_weights=acts_N,
    )  # fmt: skip
    rows_N = torch.repeat_interleave(counts_B)
    return _DecoderGradient.apply(out_BD, indices_N, acts_N.detach(), rows_N, W_dec)


def sparse_decode_reference(acts: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """What `sparse_decode` computes."""
    return (acts[..., None] * W_dec[indices]).sum(1)


class _DecoderGradient(torch.autograd.Function):
    """Returns its first argument; gives W_dec its gradient, faster than embedding_bag's own."""

    @staticmethod
    def forward(
        ctx: Any, out_BD: Tensor, indices_N: Tensor, acts_N: Tensor, rows_N: Tensor, W_dec: Tensor
    ) -> Tensor:
        ctx.save_for_backward(indices_N, acts_N, rows_N)
        ctx.n_features = len(W_dec)
        return out_BD.view_as(out_BD)

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        indices_N, acts_N, rows_N = ctx.saved_tensors
        sums_FD = weighted_sums(indices_N, acts_N, rows_N, grad_BD, ctx.n_features)
        return grad_BD, None, None, None, sums_FD


def weighted_sums(
    groups_N: Tensor, weights_N: Tensor, rows_N: Tensor, table: Tensor, n_groups: int
) -> Tensor:
    """(n_groups, D): by group, the sum of weight · table[row] over the entries that are in it.

    Args:
        table: (·, D).
    """
    # numpy's stable sort of 16-bit numbers is a radix sort, ten times as fast as torch's.
    narrow = np.uint16 if n_groups <= 2**16 else np.int32
    order_N = torch.from_numpy(np.argsort(groups_N.numpy().astype(narrow), kind="stable"))
    counts = torch.bincount(groups_N, minlength=n_groups)
    return torch.nn.functional.embedding_bag(
        rows_N[order_N], table, counts.cumsum(0) - counts, mode="sum",
        per_sample_weights=weights_N[order_N],
    )  # fmt: skip


# ------------------------------------------------------------------------- the check at run time


def not_fast(why: str) -> None:
    """Says that a loss is taken in its plain form."""
    print(f"contrastive_loss in its fast form {why}: the plain one is taken", flush=True)


def gradients_match(loss: Callable[[bool], Any], parameters: list[nn.Parameter]) -> bool:
    """Whether a loss and its gradients are the same in both forms.

    An edit may be written for the plain form alone: a mean over features, say.

    Args:
        loss: from whether the fast form may be taken to what has the loss as its `total`.
    """

    parameters = [parameter for parameter in parameters if parameter.requires_grad]

    def total_and_gradients(fast: bool) -> list[Tensor]:
        total = loss(fast).total
        gradients = torch.autograd.grad(total, parameters, materialize_grads=True)
        return [total.detach(), *gradients]

    pairs = zip(total_and_gradients(True), total_and_gradients(False))
    return all(float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-9 for a, b in pairs)


def fast_if_gradients_match(
    right: tuple[str, ...] | None, loss: Callable[[bool], Any], parameters: list[nn.Parameter]
) -> tuple[Any, tuple[str, ...] | None]:
    """The loss in its fast form if that has the gradients of the plain one, and `right`.

    On a CPU the fast form has sparse layouts, where these are faster; on a GPU it is compiled.

    Args:
        right: the forms that were found right; each is tried when the loss first takes it. None:
            one was wrong, and the plain one is taken ever after.
        loss: see `gradients_match`; its `selected` and `unselected` are `Codes`.
    """
    if right is None:
        return loss(False), None
    compiles = bool(parameters) and on_gpu(parameters[0])
    # Codes of both layouts in one expression, say; or whatever a compiler raises.
    expected = (Exception,) if compiles else (RuntimeError, IndexError)
    try:
        found = loss(True)
    except expected as error:
        found = loss(False)
        not_fast(f"fails ({str(error).partition(chr(10))[0]})")
        return found, None
    parts = ["selected", "unselected"]
    parts = [part for part in parts if getattr(found, part).indices is not None]
    form = "compiled" if compiles else " and ".join(parts)
    if form and form not in right:
        with torch.autocast(parameters[0].device.type, enabled=False):
            match = gradients_match(loss, parameters)
        if not match:
            not_fast("has other gradients")
            return loss(False), None
        right = (*right, form)
    return found, right
