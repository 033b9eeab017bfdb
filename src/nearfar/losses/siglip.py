"""SigLIP as a module."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from nearfar.contrast import Mask
from nearfar.functional.arguments import check_flags
from nearfar.functional.siglip import siglip_step
from nearfar.losses.base import ContrastiveLoss

__all__ = ["SigLipLoss"]


class SigLipLoss(ContrastiveLoss):
    """Is this pair a pair? Asked of every pair of the batch with a sigmoid (Zhai et al. 2023).

    Called with both views, the scale (already exponentiated; they start at 10) and a bias (they start at -10).
    ``nearfar.functional.siglip`` has the definition.

    Floor 0. ``record.uniform_level`` is the loss of the best constant answer, about ln(n) + 1; ``record.p_positive``
    the geometric mean probability that a pair's row is answered right throughout.

    >>> import torch
    >>> loss = SigLipLoss()
    >>> value = loss(torch.eye(4), torch.eye(4), 10.0, -10.0)
    >>> round(value.item(), 2), round(loss.record.uniform_level, 2)
    (0.69, 2.25)
    """

    def __init__(self, normalize: bool = True) -> None:
        super().__init__()
        check_flags(normalize=normalize)
        self.normalize = normalize

    def forward(
        self,
        a: Float[Tensor, "n d"],
        b: Float[Tensor, "n d"],
        logit_scale: float | Float[Tensor, ""],
        logit_bias: float | Float[Tensor, ""] = 0.0,
        mask: Bool[Tensor, "n n"] | Mask | None = None,
        rows: slice | None = None,
    ) -> Float[Tensor, ""]:
        loss, self._step = siglip_step(a, b, logit_scale, logit_bias, self.normalize, mask, rows)
        self._masked = mask is not None
        return loss

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"
