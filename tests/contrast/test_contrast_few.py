"""Few rows by one matrix, against the walk over tiles, which other tests hold against loops in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nearfar.contrast import (
    LabelOverlap,
    SameClass,
    SparseWeights,
    Target,
    Weights,
    dense_sigmoid,
    dense_softmax,
    softmax_loss,
    unit_rows,
)
from nearfar.contrast.dense import small_batch
from nearfar.contrast.numerics import through_length_, unit_and_length
from nearfar.functional import siglip, spatial

N, D = 9, 4
LABELS = torch.tensor([3, 0, 1, 3, 0, 7, 1, -2, 3])
TWO_LABELS = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1, 1])
INDEX = torch.tensor([[1, 2], [0, -1], [-1, -1], [4, 4], [3, 8], [-1, 6], [7, 0], [6, -1], [2, 8]])
ALPHA = torch.tensor(
    [
        [0.5, 0.1],
        [1.0, 9.0],
        [1.0, 1.0],
        [0.2, 0.3],
        [0.0, 1.0],
        [1.0, 2.0],
        [1.0, 0.5],
        [1.0, 1.0],
        [1.0, 1.0],
    ],
    dtype=torch.float64,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets() -> dict[str, Target]:
    hot = (draw(N, 5, seed=3) > 0.4).double()
    matrix = draw(N, N, seed=4).clamp(min=0)
    return {
        "classes with lonely rows": SameClass(LABELS),
        "two classes": SameClass(TWO_LABELS),
        "overlap": LabelOverlap(hot),
        "sparse": SparseWeights(INDEX, ALPHA, N),
        "sparse, at most 1": SparseWeights(INDEX, ALPHA, N, most=1.0),
        "any weights": Weights(matrix),
    }


def parts(value: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("name", targets())
@pytest.mark.parametrize(("both", "without_self", "inside"), list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("normalize", [True, False])
def test_one_matrix_is_the_walk_over_tiles(
    name: str, both: bool, without_self: bool, inside: bool, normalize: bool
) -> None:
    a, b = (draw(N, D, seed=seed).requires_grad_() for seed in (1, 2))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    options = {"both": both, "without_self": without_self, "inside": inside}
    few = dense_softmax(a, b, scale, targets()[name], normalize=normalize, **options)
    assert few is not None
    value, step = softmax_loss(a, b, scale, targets()[name], normalize=normalize, tile=(4, 5), **options)
    torch.testing.assert_close(few[0], value, rtol=1e-12, atol=1e-12)
    for found, exact in zip(parts(few[0], a, b, scale), parts(value, a, b, scale), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(few[2].numbers(), step.numbers(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, target in targets().items() if target.symmetric])
def test_rows_that_are_their_own_keys(name: str) -> None:
    z = draw(N, D, seed=1).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    few = dense_softmax(z, None, scale, targets()[name], without_self=True)
    assert few is not None
    value, step = softmax_loss(
        z, None, scale, targets()[name], without_self=True, normalize=True, tile=(4, 4)
    )
    for found, exact in zip(parts(few[0], z, scale), parts(value, z, scale), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(few[2].numbers(), step.numbers(), rtol=1e-9, atol=1e-12)


def test_a_matrix_of_the_users_stays_as_it_is() -> None:
    matrix = torch.ones(N, N, dtype=torch.float64)
    dense_softmax(draw(N, D), None, 3.0, Weights(matrix), without_self=True)
    assert (matrix == 1).all()


def test_digits_near_convergence() -> None:
    # Two rows of one class, far from the two of the other: the loss is 2 exp(-20) and its gradient as small.
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 1e-3]])
    exact, fine = (x.clone().requires_grad_() for x in (z.double(), z))
    pairs = torch.tensor([0, 0, 1, 1])
    for x in (exact, fine):
        few = dense_softmax(x, None, 10.0, SameClass(pairs), without_self=True)
        assert few is not None
        few[0].backward()
    assert exact.grad is not None
    assert fine.grad is not None
    assert few[0].item() == pytest.approx(2 * math.exp(-20.0), rel=1e-3)
    torch.testing.assert_close(fine.grad.double(), exact.grad, rtol=1e-3, atol=1e-13)


@pytest.mark.parametrize("weight", [0.05, 3.0])
def test_the_gap_of_the_regulariser(weight: float) -> None:
    a, b = (draw(N, D, seed=seed).requires_grad_() for seed in (1, 2))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    index, alpha = INDEX.clone(), ALPHA
    few = spatial(a, b, scale, index, alpha, temp_reg_weight=weight)
    tiled = spatial(a, b, scale, index, alpha, temp_reg_weight=weight, tile=(4, 5))
    for found, exact in zip(parts(few, a, b, scale), parts(tiled, a, b, scale), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    zero = parts(0.0 * spatial(a, b, scale, index, alpha), a, b, scale)
    assert all((x == 0).all() for x in zero)  # an objective's term of weight 0 must not turn into NaN


@pytest.mark.parametrize(
    ("change", "scale"),
    [
        (lambda x: x.half(), 3.0),
        (lambda x: x * torch.tensor([0.0] + [1.0] * (N - 1)).unsqueeze(1), 3.0),
        (lambda x: x * 1e30, 3.0),
        (lambda x: x.index_fill(0, torch.tensor([2]), torch.nan), 3.0),
        (lambda x: x, 100.0),
        (lambda x: x, math.inf),
        (lambda x: x, math.nan),
        (lambda x: x, -1.0),
        (lambda x: x[:0], 3.0),
        (lambda x: x.expand(300, N, D).reshape(-1, D), 3.0),
    ],
    ids=["half", "zero row", "huge", "nan", "sharp", "inf", "nan scale", "negative", "no rows", "many"],
)
def test_what_is_not_small(change, scale: float) -> None:
    x = change(draw(N, D).float())
    assert small_batch(x, None, scale, normalize=True) is None
    assert dense_sigmoid(x, x, -1.0 if scale > 50 else scale, torch.tensor(-1.0), True) is None


def test_nothing_has_a_positive() -> None:
    assert dense_softmax(draw(N, D), None, 3.0, SameClass(torch.arange(N)), without_self=True) is None


@pytest.mark.parametrize("normalize", [True, False])
def test_siglip_by_one_matrix(normalize: bool) -> None:
    a, b = (draw(N, D, seed=seed).requires_grad_() for seed in (1, 2))
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (120.0, -10.0))
    few = siglip(a, b, scale, bias, normalize=normalize)
    tiled = siglip(a, b, scale, bias, normalize=normalize, tile=(4, 5))
    torch.testing.assert_close(few, tiled, rtol=1e-12, atol=1e-12)
    for found, exact in zip(parts(few, a, b, scale, bias), parts(tiled, a, b, scale, bias), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [5, 1024, 1500])
def test_derivatives_through_lengths(rows: int) -> None:
    x, by_unit = draw(rows, D, seed=1).requires_grad_(), draw(rows, D, seed=2)
    unit, length = unit_and_length(x.detach())
    exact = torch.autograd.grad(torch.nn.functional.normalize(x), x, by_unit * 7)[0]
    torch.testing.assert_close(torch.autograd.grad(unit_rows(x), x, by_unit * 7)[0], exact)
    factor = torch.tensor(7.0, dtype=torch.float64)
    for rows_given, are_unit in ((unit, True), (x.detach(), False)):
        found = by_unit.clone()
        total = through_length_(found, rows_given, length, factor, are_unit)
        torch.testing.assert_close(found, exact)
        torch.testing.assert_close(total, (unit * by_unit).sum())
