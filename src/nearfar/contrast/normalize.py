"""Rows of unit length, and the check that there is something to bring to unit length."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.errors import NearfarError

__all__ = ["embeddings", "unit_rows"]


def unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows brought to unit length, without overflow or underflow on the way; rows of zeros stay zero.

    Their gradient is finite too: that of the identity.

    >>> unit_rows(torch.tensor([[3e30, 4e30], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    if x.device.type == "cpu" and x.numel() <= _FEW and x.numel():
        # Few and ordinary rows: two operations of PyTorch are quicker than careful ones.
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        shortest, longest = torch.aminmax(length.detach())
        if shortest > _ORDINARY and longest < 1.0 / _ORDINARY:
            return x / length
    return _UnitRows.apply(x)


_FEW, _ORDINARY = 1 << 17, 1e-15


class _UnitRows(torch.autograd.Function):
    """Keeps the result and the lengths, where plain operations would keep every step between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        largest = x.abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)
        largest = torch.where(largest == 0, 1.0, largest)
        unit = x / largest
        length = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
        length = torch.where(length == 0, 1.0, length)
        unit.div_(length)
        ctx.save_for_backward(unit, length.mul_(largest))
        return unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        (gradient,) = gradients
        along = torch.linalg.vecdot(unit, gradient).unsqueeze(1)
        return (
            torch.addcmul(gradient, unit, along, value=-1).div_(length)
            if not torch.is_grad_enabled()
            else (gradient - unit * along) / length
        )


def embeddings(x: Tensor, name: str, normalize: bool, dtype: torch.dtype) -> Float[Tensor, "n d"]:
    """``x`` in the precision of the computation and, if wanted, at unit length.

    Raises ``NearfarError`` where it is no matrix and, on the CPU, where a row is not finite. Elsewhere the look would
    make every step wait for the device: the loss is NaN there, and its record says so.
    """
    if x.ndim != 2 or not x.dtype.is_floating_point:
        raise NearfarError(
            f"{name} is {tuple(x.shape)} {x.dtype}; a loss takes a matrix of floating point (rows, dimensions)"
        )
    # A sum is finite only if all its terms are, but a sum of finite terms may overflow: then look closer.
    if x.device.type == "cpu" and not x.detach().sum(dtype=torch.float64).isfinite():
        bad = (~x.detach().isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
            raise NearfarError(
                f"{name} is not finite in {len(bad)} of {len(x)} rows (row {shown}): look at what the encoder gives "
                "for them; a learning rate too high or a row of missing input are the usual reasons"
            )
    x = x.to(dtype)
    return unit_rows(x) if normalize else x
