"""Products with codes of which almost all are zero: torch alone, a plain reference beside each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FEW = 0.125


class Few(NamedTuple):
    """The positive entries of a (B, F) matrix, in its order, and their places in a (B, M) one."""

    rows: Tensor
    columns: Tensor
    places: Tensor
    widest: int  # M, the most in a row


def few_active(pre_BF: Tensor, above: float | Tensor = 0.0) -> Few | None:
    """Where preactivations are above a number; None if there are many, or on a GPU (unmeasured)."""
    import numpy as np
    if pre_BF.device.type != "cpu":
        return None
    n_rows, width = pre_BF.shape
    active_BF = pre_BF.detach() > above
    if active_BF.count_nonzero() > FEW * active_BF.numel():
        return None
    flat = torch.from_numpy(np.flatnonzero(active_BF.numpy()))  # torch's nonzero takes 4 times it
    rows = flat // width
    counts_B = torch.bincount(rows, minlength=n_rows)
    places = torch.arange(len(rows)) - (counts_B.cumsum(0) - counts_B)[rows]
    return Few(rows, flat - rows * width, places, max(int(counts_B.max()), 1))


def active_values(
    pre_BF: Tensor, few: Few, centred_BD: Tensor, bias_F: Tensor, W_enc: Tensor
) -> tuple[Tensor, Tensor]:
    """What `few` names of pre_BF = centred_BD @ W_enc + bias_F: (B, M) values, (B, M) columns.

    Rows with fewer than M end in zeros. Gradients of W_enc and bias_F are sums over these entries.
    """
    shape, at = (len(pre_BF), few.widest), (few.rows, few.places)
    columns_BM = torch.zeros(shape, dtype=torch.int64).index_put(at, few.columns)
    values_BM = pre_BF.new_zeros(shape).index_put(at, pre_BF[few.rows, few.columns])
    return gradients_by_index()[0].apply(values_BM, few, centred_BD, bias_F, W_enc), columns_BM


@functools.cache
def gradients_by_index() -> tuple[type, type]:
    """Two functions that return their first argument; what they are for is their backward pass."""
    class OfEncoder(torch.autograd.Function):
        """See `active_values`."""

        @staticmethod
        def forward(
            ctx: Any, values_BM: Tensor, few: Few, centred_BD: Tensor, bias_F: Tensor, W_enc: Tensor
        ) -> Tensor:
            ctx.few, ctx.centred_BD, ctx.n_features = few, centred_BD, len(bias_F)
            return values_BM.view_as(values_BM)

        @staticmethod
        def backward(ctx: Any, grad_BM: Tensor) -> tuple[Tensor | None, ...]:
            few, n_features = ctx.few, ctx.n_features
            grad = grad_BM[few.rows, few.places]
            sums_FD = weighted_sums(few.columns, grad, few.rows, ctx.centred_BD, n_features)
            bias_F = torch.bincount(few.columns, weights=grad, minlength=n_features)
            return None, None, None, bias_F.to(grad.dtype), sums_FD.T

    class OfDecoder(torch.autograd.Function):
        """See `sum_of_rows`."""

        @staticmethod
        def forward(
            ctx: Any, out_BD: Tensor, indices: Tensor, values: Tensor, rows: Tensor, W_dec: Tensor
        ) -> Tensor:
            ctx.save_for_backward(indices, values, rows)
            ctx.n_features = len(W_dec)
            return out_BD.view_as(out_BD)

        @staticmethod
        def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
            indices, values, rows = ctx.saved_tensors
            sums_FD = weighted_sums(indices, values, rows, grad_BD, ctx.n_features)
            return grad_BD, None, None, None, sums_FD

    return OfEncoder, OfDecoder


def weighted_sums(groups: Tensor, weights: Tensor, rows: Tensor, table: Tensor, n: int) -> Tensor:
    """(n, D): by group, the sum of weight * table[row] over the entries that are in the group.

    Args:
        groups, weights, rows: (N,) each. table: (·, D).
    """
    import numpy as np
    # numpy's stable sort of 16-bit numbers is a radix sort, ten times as fast as torch's.
    narrow = np.uint16 if n <= 2**16 else np.int32
    order = torch.from_numpy(np.argsort(groups.numpy().astype(narrow), kind="stable"))
    counts = torch.bincount(groups, minlength=n)
    return torch.nn.functional.embedding_bag(
        rows[order], table, counts.cumsum(0) - counts, mode="sum",
        per_sample_weights=weights[order],
    )  # fmt: skip


def same_by_index(loss: Callable[[bool], Any], parameters: list[nn.Parameter]) -> bool:
    """Whether a loss has the gradients with features by index that it has with all of them.

    An edit may be written for all of them alone: a mean over features, say.

    Args:
        loss: by whether features go by index, what has the loss as its `total`.
    """
    def gradients(by_index: bool) -> list[Tensor]:
        return torch.autograd.grad(loss(by_index).total, parameters, materialize_grads=True)

    pairs = zip(gradients(True), gradients(False))
    return all(float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-9 for a, b in pairs)


def by_index_if_same(
    trainer: Any, loss: Callable[[bool], Any], parameters: list[nn.Parameter]
) -> Any:
    """The loss with features by index, or with all of them where that has other gradients.

    The first loss that goes by index decides; `trainer.by_index` says how: None, not yet known.

    Args:
        loss: see `same_by_index`; its `indices_BM` is None where features don't go by index.
    """
    found = loss(trainer.by_index is not False)
    if found.indices_BM is not None and trainer.by_index is None:
        with torch.autocast(parameters[0].device.type, enabled=False):
            trainer.by_index = same_by_index(loss, parameters)
        if not trainer.by_index:
            print("contrastive_loss has other gradients with features by index: all are used")
            return loss(False)
    return found


def sum_of_rows(values_BM: Tensor, indices_BM: Tensor, W_dec: Tensor) -> Tensor:
    """(B, D): Σ_m values[b, m] · W_dec[indices[b, m]], over the values that are not zero."""
    used_BM = values_BM.detach() != 0
    counts_B = used_BM.sum(1)
    indices, values = indices_BM[used_BM], values_BM[used_BM]
    out_BD = torch.nn.functional.embedding_bag(
        indices, W_dec.detach(), counts_B.cumsum(0) - counts_B, mode="sum",
        per_sample_weights=values,
    )  # fmt: skip

    # embedding_bag's own gradient of its rows is slower.
    rows = torch.repeat_interleave(counts_B)
    return gradients_by_index()[1].apply(out_BD, indices, values.detach(), rows, W_dec)
