"""Which batches are small: calls cost more there than products, and one matrix of all pairs is the quickest way."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.normalize import ORDINARY
from nearfar.contrast.tiles import KEPT, bounded

__all__ = ["SmallBatch", "small_batch"]


class SmallBatch(NamedTuple):
    """The scale, its value, and the lengths of the rows of ``a`` and ``b`` where they are to be normalised."""

    scale: float | Tensor
    value: float
    lengths: tuple[Float[Tensor, "n 1"], Float[Tensor, "m 1"]] | None


def small_batch(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"] | None,
    scale: float | Tensor,
    normalize: bool,
    any_logit: bool = False,
) -> SmallBatch | None:
    """None where the pairs are many, or a short way would not be exact: on another device or in half precision, for
    rows that are zero or far out of scale, and (but for ``any_logit``) for logits whose exponentials, or the quotients
    of these, are out of range. Whatever is wrong with the arguments is left to the long way to say.
    """
    b = a if b is None else b
    if (
        a.ndim != 2
        or b.ndim != 2
        or a.dtype != b.dtype
        or a.dtype not in (torch.float32, torch.float64)
        or a.shape[1] != b.shape[1]
        or a.shape[1] == 0
        or not 0 < len(a) * len(b) <= KEPT
        or a.device.type != "cpu"
        or b.device.type != "cpu"
    ):
        return None
    if isinstance(scale, Tensor) and scale.numel() != 1:
        return None
    value = scale.detach().item() if isinstance(scale, Tensor) else float(scale)
    lengths: list[Tensor] = []
    largest = 1.0 if normalize else 1.001
    with torch.inference_mode():
        for x in (a,) if b is a else (a, b):
            length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            shortest, longest = (end.item() for end in torch.aminmax(length))
            if not (shortest > ORDINARY and longest < 1.0 / ORDINARY):  # NaN is neither
                return None
            largest *= 1.001 if normalize else longest ** (2 if b is a else 1)
            lengths.append(length)
    if not (0 < value < math.inf and (any_logit or bounded(2 * value * largest, len(a), len(b), a.dtype))):
        return None
    if isinstance(scale, Tensor):
        scale = scale.reshape(()).to(a)
    return SmallBatch(scale, value, (lengths[0], lengths[-1]) if normalize else None)
