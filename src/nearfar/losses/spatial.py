"""The spatial loss as a module."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from nearfar.functional.arguments import check_flags
from nearfar.functional.info_nce import clamp_scale
from nearfar.functional.spatial import Neighbors, check_spatial_options, spatial_step
from nearfar.losses.base import ContrastiveLoss
from nearfar.losses.info_nce import at_clamp

__all__ = ["SpatialLoss"]


class SpatialLoss(ContrastiveLoss):
    """CLIP whose targets share some mass with the spatial neighbours in the batch.

    Called with both views, the scale (already exponentiated) and, for each row, the positions of its neighbours *in
    the batch* (-1 for none) and their weights. ``nearfar.functional.spatial`` has the definitions and the other ways
    to treat ``neighbors``: "positive", "mask", "none".

    ``record.extra["rows_with_neighbors"]`` is the share of rows that have a neighbour in the batch at all: at 0 the
    target is inert and this is CLIP. ``record.floor`` is the mean entropy of the targets.

    >>> import torch
    >>> loss = SpatialLoss()
    >>> value = loss(torch.eye(3), torch.eye(3), 10.0, torch.tensor([[1], [0], [-1]]), torch.ones(3, 1))
    >>> round(loss.record.extra["rows_with_neighbors"], 2), round(loss.record.floor, 2)
    (0.67, 0.42)
    """

    positions = ("neighbor_index",)

    def __init__(
        self,
        neighbor_alpha_scale: float = 0.5,
        temp_reg_weight: float = 0.05,
        neighbors: Neighbors = "soft",
        max_scale: float | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        clamp_scale(1.0, max_scale)
        check_flags(normalize=normalize)
        check_spatial_options(neighbor_alpha_scale, temp_reg_weight, neighbors)
        self.neighbor_alpha_scale, self.temp_reg_weight = neighbor_alpha_scale, temp_reg_weight
        self.neighbors, self.max_scale, self.normalize = neighbors, max_scale, normalize
        self._reached: Callable[[], float] | None = None

    def forward(
        self,
        image: Float[Tensor, "n d"],
        text: Float[Tensor, "n d"],
        logit_scale: float | Float[Tensor, ""],
        neighbor_index: Int[Tensor, "n k"],
        neighbor_alpha: Float[Tensor, "n k"],
        rows: slice | None = None,
    ) -> Float[Tensor, ""]:
        loss, self._step, self._reached = spatial_step(
            image, text, logit_scale, neighbor_index, neighbor_alpha, self.neighbor_alpha_scale, self.temp_reg_weight,
            self.neighbors, self.max_scale, self.normalize, rows,
        )  # fmt: skip
        self._masked = self.neighbors == "mask"
        return loss

    def _extra(self) -> dict[str, float]:
        reached = {} if self._reached is None else {"rows_with_neighbors": self._reached()}
        return reached | at_clamp(self._step, self.max_scale)

    def extra_repr(self) -> str:
        return (
            f"neighbor_alpha_scale={self.neighbor_alpha_scale}, temp_reg_weight={self.temp_reg_weight}, "
            f"neighbors={self.neighbors!r}, max_scale={self.max_scale}"
        )
