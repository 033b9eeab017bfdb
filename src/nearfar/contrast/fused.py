"""Two elementwise steps in one pass: what a tile costs beyond its products is the memory it is read from."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["times_sum"]


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
