"""Sums and maxima of a tile along one side, shifts of its exponentials, and two elementwise steps in one pass.

Beyond its matrix products, a loss costs the memory it reads and the number of calls it makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from nearfar.contrast.positives import MASKED_LOGIT, is_unmasked

__all__ = [
    "common_shift",
    "finite",
    "rest_share",
    "times",
    "times_sum",
    "tiny",
    "top_of",
    "top_of_powers",
    "total_of",
    "within",
]


def times_sum(
    x: Float[Tensor, "r c"],
    rows: Float[Tensor, "r 1"],
    columns: Float[Tensor, " c"],
    out: Float[Tensor, "r c"],
) -> Float[Tensor, "r c"]:
    """``x * (rows + columns)``, which may overwrite ``x``.

    PyTorch has this for the squared error, whose derivative is 2 · (input - target) · upstream.

    >>> x = torch.ones(2, 3)
    >>> times_sum(x, torch.tensor([[10.0], [20.0]]), torch.tensor([1.0, 2.0, 3.0]), out=x)
    tensor([[11., 12., 13.],
            [21., 22., 23.]])
    """
    torch.ops.aten.mse_loss_backward.grad_input(x, rows * 0.5, columns * -0.5, 0, grad_input=out)
    return out


def times(
    x: Float[Tensor, "r d"],
    y: Float[Tensor, "d c"],
    factor: float,
    plus: Float[Tensor, ""] | None = None,
    out: Float[Tensor, "r c"] | None = None,
) -> Float[Tensor, "r c"]:
    """``factor * (x @ y) + plus``.

    >>> times(torch.ones(1, 2), torch.ones(2, 1), 3.0)
    tensor([[6.]])
    """
    if plus is not None:
        return torch.addmm(plus, x, y, alpha=factor, out=out)
    # With beta = 0, what would be added is not looked at.
    return torch.addmm(x[:, :1] if out is None else out, x, y, beta=0, alpha=factor, out=out)


#: how far maxima may lie apart for a single shift
MAX_SHIFT_SPREAD = 50.0


def tiny(like: Tensor) -> float:
    """Keeps a division from 0/0: below every sum of exponentials that is not 0."""
    return torch.finfo(like.dtype).tiny


def total_of(tile: Float[Tensor, "r c"], axis: int) -> Tensor:
    """Sums along the rows (``axis`` 1) or the columns (0)."""
    strips = _strips(tile, axis)
    return tile.sum(axis) if strips is None else strips.sum(1).sum(0)


def top_of(tile: Shaped[Tensor, "r c"], axis: int) -> Tensor:
    """Maxima along the rows (``axis`` 1) or the columns (0)."""
    strips = _strips(tile, axis)
    return tile.amax(axis) if strips is None else strips.amax(1).amax(0)


def top_of_powers(powers: Float[Tensor, "r c"], axis: int) -> Tensor:
    """The same of exponentials, which are never below 0: those compare as the whole numbers that their bits make, and
    quicker, since a maximum of floats looks for NaN at every step."""
    if powers.dtype != torch.float32:
        return top_of(powers, axis)
    return top_of(powers.view(torch.int32), axis).view(torch.float32)


def _strips(tile: Tensor, axis: int) -> Tensor | None:
    """Down long columns, a tile is read in strips of rows: in one go, which is a column after the other for the memory,
    it takes half as long again."""
    rows, columns = tile.shape
    return tile.view(16, -1, columns) if axis == 0 and rows >= 256 and rows % 16 == 0 else None


def common_shift(tops: Iterable[Tensor]) -> float | None:
    """One shift for all exponentials of a tile, if these lie so close together that it is as good for each as its own;
    None if not, where a query has no logit at all, and on a different device, which would have to be waited for.

    The least of them then is e^-50, and what a sum loses below the smallest number, e^-37 of it or less, is less than
    its last digit.

    >>> common_shift([torch.tensor([40.0, 70.0])]), common_shift([torch.tensor([10.0, 70.0])])
    (70.0, None)
    """
    highest, lowest = -math.inf, math.inf
    for top in tops:
        if top.device.type != "cpu":
            return None
        least, most = (end.item() for end in torch.aminmax(top))
        highest, lowest = max(highest, most), min(lowest, least)
    return (
        highest if highest >= lowest > 0.5 * MASKED_LOGIT and highest - lowest <= MAX_SHIFT_SPREAD else None
    )


def rest_share(rest: Tensor, positive: Tensor) -> Tensor:
    """The probability of the rest; 0 where there is none."""
    return torch.sigmoid(torch.where(rest > -torch.inf, rest - positive, -torch.inf))


def within(outer: slice, inner: slice) -> slice:
    """``inner``, counted from the start of ``outer``, in the coordinates of ``outer``.

    >>> within(slice(10, 20), slice(2, 5))
    slice(12, 15, None)
    """
    return slice(outer.start + inner.start, outer.start + inner.stop)


def finite(top: Tensor) -> Tensor:
    """A shift to subtract: 0 where there was nothing to take the maximum of."""
    return torch.where(is_unmasked(top), top, 0.0)
