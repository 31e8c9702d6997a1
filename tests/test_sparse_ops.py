"""Every fast form against its plain one: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sparse_ops
from sparse_ops import Codes, fast_if_gradients_match, gradients_match

N_TOKENS, D_IN, N_FEATURES = 40, 6, 50
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))]  # fmt: skip


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the features is few, of tens as of thousands."""
    monkeypatch.setattr(sparse_ops, "MAX_DENSITY", 0.125)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def weights(device: str = "cpu", bias: float = -4.0) -> list[Tensor]:
    """W_enc, b_enc, b_dec of an encoder that has few features active, on some tokens none."""
    shift_F = torch.full((N_FEATURES,), bias, dtype=torch.float64)
    W_enc, b_enc = random(D_IN, N_FEATURES, seed=1), random(N_FEATURES, seed=2) + shift_F
    parameters = W_enc, b_enc, random(D_IN, seed=3)
    return [parameter.to(device).requires_grad_() for parameter in parameters]


def inputs(device: str = "cpu") -> Tensor:
    return random(N_TOKENS, D_IN, seed=4).to(device)


def positive(pre_BF: Tensor) -> Tensor:
    return pre_BF > 0


def both_layouts() -> tuple[Codes, Codes]:
    """The same codes, dense and sparse, each with a graph of its own: `acts` are leaves."""
    W_enc, b_enc, b_dec = weights()
    b_enc.data[0] = -1e3  # feature 0 never fires: rows of the sparse layout end in its index
    codes = sparse_ops.preactivations(inputs(), W_enc, b_enc, b_dec, positive)
    sparse = codes.map(torch.relu)
    assert sparse.indices is not None and (sparse.n_active() == 0).any()
    dense = Codes(sparse.dense().detach().requires_grad_())
    acts = sparse.acts.detach().requires_grad_()
    return dense, Codes(acts, sparse.indices, sparse.n_features)


def agree(
    fast: tuple[Tensor, ...], plain: tuple[Tensor, ...], of: list[Tensor], of_plain: list[Tensor]
) -> None:
    """Values are the same, and the gradients of a random weighting of them."""
    gradients = []
    for results, leaves in ((fast, of), (plain, of_plain)):
        total = sum(
            (result * random(*result.shape, seed=9 + n).to(result.device)).sum()
            for n, result in enumerate(results)
        )
        gradients.append(torch.autograd.grad(total, leaves))
    for one, other in zip([*fast, *gradients[0]], [*plain, *gradients[1]]):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    assert any(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("active", [None, positive])
def test_preactivations_are_the_plain_product_and_its_gradients(active, device) -> None:
    x, fast, plain = inputs(device), weights(device), weights(device)
    codes = sparse_ops.preactivations(x, *fast, active)
    assert (codes.indices is None) == (active is None or device == "cuda")
    plain_BF = sparse_ops.preactivations_reference(x, *plain)
    agree((codes.map(torch.relu).dense(),), (torch.relu(plain_BF),), fast, plain)


def test_only_what_is_asked_for_is_gathered() -> None:
    x, parameters = inputs(), weights()
    pre_BF = sparse_ops.preactivations_reference(x, *parameters)
    codes = sparse_ops.preactivations(x, *parameters, lambda pre: pre > 1.0)
    expected_BF = torch.where(pre_BF > 1.0, pre_BF, 0.0)
    assert torch.allclose(codes.dense(), expected_BF, rtol=1e-12)
    assert codes.acts.shape == (N_TOKENS, int((pre_BF > 1.0).sum(1).max()))


@pytest.mark.parametrize("bias, sparse", [(-4.0, True), (0.0, False), (-1e3, True)])
def test_the_layout_is_sparse_where_few_are_active_and_if_none_is(bias, sparse) -> None:
    codes = sparse_ops.preactivations(inputs(), *weights(bias=bias), positive)
    active_BF = sparse_ops.preactivations_reference(inputs(), *weights(bias=bias)) > 0
    assert (codes.indices is not None) == sparse
    assert (float(active_BF.double().mean()) <= sparse_ops.MAX_DENSITY) == sparse
    assert codes.map(torch.relu).n_active().equal(active_BF.sum(1))


@pytest.mark.parametrize(
    "function",
    [
        lambda codes: codes.map(torch.tanh).sum_over_features(),
        lambda codes: codes.weighted(random(N_FEATURES, seed=5)).sum_over_features(),
        lambda codes: codes.decode(random(N_FEATURES, D_IN, seed=6)),
        lambda codes: codes.only(codes.largest(2)).dense(),
        lambda codes: codes.without(codes.largest(2)).dense(),
        lambda codes: codes.only(codes.above(0.7)).dense(),
        lambda codes: codes.without(codes.above(0.7)).dense(),
    ],
)
def test_both_layouts_give_the_same(function: Callable[[Codes], Tensor]) -> None:
    dense, sparse = both_layouts()
    one, other = function(dense), function(sparse)
    assert torch.allclose(one, other, rtol=1e-12, atol=1e-12) and one.any()
    (dense_BF,), (sparse_BM,) = (
        torch.autograd.grad((result * random(*result.shape, seed=9)).sum(), codes.acts)
        for result, codes in ((one, dense), (other, sparse))
    )
    nonzero = sparse.acts > 0  # what stands behind a row's end has no feature
    assert torch.allclose(dense_BF.gather(1, sparse.indices)[nonzero], sparse_BM[nonzero])


def test_both_layouts_count_the_same() -> None:
    dense, sparse = both_layouts()
    f_BF = dense.acts
    for codes in (dense, sparse):
        assert torch.equal(codes.fired(), (f_BF > 0).any(0)) and not codes.fired().all()
        assert torch.equal(codes.counts(), (f_BF > 0).sum(0))
        assert torch.equal(codes.n_active(), (f_BF > 0).sum(1))
        assert torch.equal(codes.dense(), f_BF)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("choose", [lambda c: c.largest(3), lambda c: c.above(0.5)])
def test_split_is_only_and_without(choose, device, sparse, monkeypatch) -> None:
    monkeypatch.setattr(sparse_ops, "MAX_DENSITY", 0.5)
    fast, plain = (
        random(N_TOKENS, N_FEATURES, seed=7).to(device).requires_grad_() for _ in range(2)
    )
    chosen = choose(Codes(fast))
    codes = Codes(fast).split(chosen, sparse)
    alone = sparse and chosen.dtype != torch.bool and device == "cpu"
    assert (codes[0].indices is not None) is alone and codes[1].indices is None
    parts = [part.dense() for part in codes]
    plain_parts = [Codes(plain).only(chosen).acts, Codes(plain).without(chosen).acts]
    agree(tuple(parts), tuple(plain_parts), [fast], [plain])
    assert torch.equal(parts[0] + parts[1], fast)
    mask = torch.zeros_like(fast, dtype=torch.bool)
    mask = chosen if chosen.dtype == torch.bool else mask.scatter(1, chosen, True)
    assert torch.equal(parts[0], fast * mask) and 0 < mask.sum() < mask.numel() / 2


def test_largest_are_the_largest_and_never_more_than_there_are() -> None:
    acts = torch.tensor([[0.1, 0.5, 0.3], [0.0, 0.2, 0.9]])
    assert Codes(acts).only(Codes(acts).largest(1)).acts.tolist() == [
        [0.0, acts[0, 1], 0.0], [0.0, 0.0, acts[1, 2]]
    ]  # fmt: skip
    first, second = Codes(acts).split(Codes(acts).largest(7), sparse=True)
    assert torch.equal(first.acts, acts) and not second.acts.any()


def test_sparse_decode_is_the_plain_sum_and_its_gradients() -> None:
    dense, sparse = both_layouts()
    fast, plain = (random(N_FEATURES, D_IN, seed=6).requires_grad_() for _ in range(2))
    acts, same = sparse.acts, sparse.acts.detach().clone().requires_grad_()
    agree(
        (sparse_ops.sparse_decode(acts, sparse.indices, fast),),
        (sparse_ops.sparse_decode_reference(same, sparse.indices, plain),),
        [fast], [plain],
    )  # fmt: skip
    reference = sparse_ops.sparse_decode_reference(same, sparse.indices, plain)
    assert torch.allclose(reference, dense.acts @ plain)


@pytest.mark.parametrize("n_groups", [7, 2**16 + 5])
def test_weighted_sums(n_groups) -> None:
    """Group 0 has no entry; above 2^16 groups are sorted as 32-bit numbers."""
    generator = torch.Generator().manual_seed(0)
    groups, rows = (torch.randint(1, high, (100,), generator=generator) for high in (n_groups, 9))
    groups[0] = n_groups - 1
    weights_N, table = random(100), random(9, D_IN)
    plain = torch.zeros(n_groups, D_IN, dtype=torch.float64)
    plain.index_add_(0, groups, weights_N[:, None] * table[rows])
    found = sparse_ops.weighted_sums(groups, weights_N, rows, table, n_groups)
    assert torch.allclose(found, plain) and found.shape == plain.shape


BOTH = ("selected and unselected",)


class Result:
    def __init__(self, selected: Codes, unselected: Codes, total: Tensor) -> None:
        self.selected, self.unselected, self.total = selected, unselected, total


def a_loss(
    parameters: list[Tensor], edit: Callable[[Codes], Tensor], calls: list[bool]
) -> Callable[[bool], Result]:
    def loss(sparse: bool) -> Result:
        calls.append(sparse)
        codes = sparse_ops.preactivations(inputs(), *parameters, positive if sparse else None)
        f = codes.map(torch.relu)
        return Result(f, f, f.map(torch.tanh).sum_over_features().mean() + edit(f))

    return loss


@pytest.mark.parametrize(
    "edit, right",
    [
        (lambda f: 0.1 * f.sum_over_features().pow(2).mean(), True),
        (lambda f: 0.1 * f.dense().mean(0).pow(2).sum(), True),
        (lambda f: f.acts.mean(), False),  # over M features, not F
        (lambda f: torch.exp(f.acts).sum(-1).mean(), False),  # 1 for each that isn't active
    ],
)
def test_the_first_sparse_loss_decides_whether_the_layout_is_right(edit, right, capsys) -> None:
    calls: list[bool] = []
    parameters = weights()
    loss = a_loss(parameters, edit, calls)
    assert gradients_match(loss, parameters) == right
    calls.clear()
    found, allowed = fast_if_gradients_match((), loss, parameters)
    assert allowed == (BOTH if right else None) and (found.selected.indices is not None) is right
    assert ("has other gradients" in capsys.readouterr().out) == (not right)
    calls.clear()
    found, allowed = fast_if_gradients_match(allowed, loss, parameters)
    assert calls == [right] and allowed == (BOTH if right else None)  # it is asked once
    assert torch.equal(found.total, loss(right).total)


def test_a_loss_that_never_was_sparse_has_decided_nothing() -> None:
    parameters = weights(bias=1.0)
    loss = a_loss(parameters, lambda f: f.acts.mean(), [])
    found, allowed = fast_if_gradients_match((), loss, parameters)
    assert allowed == () and found.selected.indices is None


@pytest.mark.parametrize("bias, edit", [
    (1.0, lambda selected, unselected: selected.acts.mean()),
    (-1.0, lambda selected, unselected: unselected.acts.mean()),
    (1.0, lambda selected, unselected: (selected.acts * unselected.acts).sum()),
])  # fmt: skip
def test_what_is_selected_is_sparse_by_itself_and_each_layout_is_tried(
    bias, edit, capsys, monkeypatch
) -> None:
    """An edit that is wrong, or fails, in one of them is served with all features."""
    monkeypatch.setattr(sparse_ops, "MAX_DENSITY", 0.5)

    def loss_with(parameters: list[Tensor], edited: bool) -> Callable[[bool], Result]:
        def loss(sparse: bool) -> Result:
            codes = sparse_ops.preactivations(inputs(), *parameters, positive if sparse else None)
            f = codes.map(torch.relu)
            selected, unselected = f.split(f.largest(3), sparse)
            total = (selected.sum_over_features() + unselected.sum_over_features()).mean()
            total = total + edit(selected, unselected) if edited else total
            return Result(selected, unselected, total)

        return loss

    layouts = {1.0: ("selected",), -1.0: BOTH}
    parameters, others = weights(bias=bias), weights(bias=-bias)
    found, right = fast_if_gradients_match((), loss_with(others, False), others)
    assert right == layouts[-bias]
    found, right = fast_if_gradients_match(right, loss_with(parameters, False), parameters)
    assert right == (*layouts[-bias], *layouts[bias]) and not capsys.readouterr().out
    edited = loss_with(parameters, True)
    found, right = fast_if_gradients_match(layouts[-bias], edited, parameters)
    assert right is None and "the plain one is taken" in capsys.readouterr().out
    assert found.selected.indices is None and found.unselected.indices is None


def test_a_loss_that_fails_in_every_layout_fails() -> None:
    def loss(sparse: bool) -> Result:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        fast_if_gradients_match((), loss, [])
