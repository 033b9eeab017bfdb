"""Two views of spots in a tissue, whose neighbours are partly positives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.contrast import (
    IndexMask,
    Mask,
    OwnPair,
    SparseWeights,
    Step,
    Target,
    computing_dtype,
    dense_own_pairs,
    dense_softmax,
    log_sums,
    softmax_loss,
    uncompiled,
)
from nearfar.errors import NearfarError
from nearfar.losses.arguments import (
    any_number,
    check_flags,
    check_matrices,
    check_part,
    check_tensors,
    check_words,
    number,
    ready,
)
from nearfar.losses.base import ContrastiveLoss, LossTraits, Requires
from nearfar.losses.info_nce import at_clamp, clamp_scale

__all__ = ["SpatialLoss", "SpatialOptions", "spatial", "spatial_step"]


Neighbors = Literal["soft", "positive", "mask", "none"]


@dataclass(eq=False, repr=False)
class SpatialOptions:
    """The options of the spatial loss, for function and module; ``spatial`` describes them."""

    neighbor_alpha_scale: float = 0.5
    temp_reg_weight: float = 0.05
    neighbors: Neighbors = "soft"
    max_scale: float | None = None
    normalize: bool = True

    def check(self) -> None:
        """``NearfarError`` for options that cannot be; ``max_scale`` is checked where it is used."""
        check_spatial_options(self.neighbor_alpha_scale, self.temp_reg_weight, self.neighbors)
        check_flags(normalize=self.normalize)


def spatial(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    logit_scale: float | Float[Tensor, ""] | Float[Tensor, "1"],
    neighbor_index: Int[Tensor, "n k"],
    neighbor_alpha: Float[Tensor, "n k"],
    *,
    neighbor_alpha_scale: float = 0.5,
    temp_reg_weight: float = 0.05,
    neighbors: Neighbors = "soft",
    max_scale: float | None = None,
    normalize: bool = True,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
) -> Float[Tensor, ""]:
    """CLIP with soft targets: a spot's partner, and in part the partners of its neighbours that are in the batch.

    Row i of the target is q_i = L1-normalised(e_i + c Σ_j α_ij e_j), with c = ``neighbor_alpha_scale``, for both
    directions. ``neighbor_index`` holds positions *in the batch*, -1 for none; ``neighbor_alpha`` their weights α, 0
    or more. The loss is the mean cross-entropy of both directions plus ``temp_reg_weight`` · g², where g = E_p[x] -
    E_q[x], x the cosines, averaged over rows and directions: the derivative of that cross-entropy by the scale.

    ``neighbors``: "soft" as above; "positive": neighbours weigh as much as the partner; "mask": they are no
    candidates, in either direction; "none": CLIP. ``logit_scale`` is the scale itself, ``max_scale`` clamps it.

    Floor: the mean entropy of q, 0 where no neighbour is in the batch (then the target does nothing:
    ``record.extra["rows_with_neighbors"]`` of ``SpatialLoss`` says for which share of the rows it does). Guessing
    gives ln(n). The regulariser is not in floor and guess.

    >>> index, alpha = torch.tensor([[1], [0], [-1]]), torch.ones(3, 1)
    >>> round(spatial(torch.eye(3), torch.eye(3), 10.0, index, alpha).item(), 3)
    2.225
    """
    options = SpatialOptions(neighbor_alpha_scale, temp_reg_weight, neighbors, max_scale, normalize)
    return spatial_step(image, text, logit_scale, neighbor_index, neighbor_alpha, options, rows, tile)[0]


@uncompiled
def spatial_step(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    neighbor_index: Tensor,
    neighbor_alpha: Tensor,
    options: SpatialOptions,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, ""], Step, Callable[[], float]]:
    """``spatial``, what its record is made of, and what tells the share of rows that have a neighbour in the batch."""
    options.check()
    neighbors, temp_reg_weight, normalize = options.neighbors, options.temp_reg_weight, options.normalize
    factor = clamp_scale(logit_scale, options.max_scale)
    if not isinstance(factor, Tensor):
        factor = any_number("logit_scale", factor)
    check_matrices(image=image, text=text)
    check_part(rows, tile)
    n = len(image)
    if len(text) != n:
        raise NearfarError(f"image has {n} rows and text {len(text)}; row i of both is the same spot")
    index, alpha, complete = _check(neighbor_index, neighbor_alpha, n)
    index, alpha = index.to(image.device), alpha.to(image.device, computing_dtype(image, text))
    reached = partial(_reached, index, alpha)
    target: Target = OwnPair(n)
    mask = None
    if neighbors == "soft":
        target = SparseWeights(
            index, alpha * options.neighbor_alpha_scale, n, own=1.0, checked=True, complete=complete
        )
    elif neighbors == "positive":
        target = SparseWeights(
            index, (alpha > 0).to(alpha.dtype), n, most=1.0, own=1.0, checked=True, complete=complete
        )
    elif neighbors == "mask":
        mask = IndexMask(torch.where(alpha > 0, index, -1))
    if rows is None and tile is None:
        small = _small(image, text, factor, target, mask, temp_reg_weight, normalize)
        if small is not None:
            return *small, reached
    a, b, scale = ready(image, text, factor, None if normalize else False, ("image", "text"), "logit_scale")
    if temp_reg_weight == 0:
        both = softmax_loss(
            a, b, scale, target, both=True, mask=mask, normalize=normalize, rows=rows, tile=tile
        )
        return *both, reached
    if rows is not None:
        raise NearfarError(
            "the regulariser of SpatialLoss squares a mean over the whole batch, so that parts of a batch do not add "
            "up to it: with rows= (local_loss) set temp_reg_weight=0"
        )
    sums = log_sums(a, b, scale, target, both=True, mask=mask, expected=True, normalize=normalize, tile=tile)
    losses = [direction.losses() for direction in sums]
    # positive - excess is the mean logit under the target
    under_target = [s.positive if s.excess is None else s.positive - s.excess for s in sums]
    gap = torch.stack([s.mean_logit() - q for s, q in zip(sums, under_target, strict=True)]).mean() / scale
    cross_entropy = torch.stack(losses).mean()
    loss = cross_entropy + temp_reg_weight * gap.square()
    return loss, Step.of(loss, losses, sums, scale, False), reached


def _small(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    target: Target,
    mask: Mask | None,
    temp_reg_weight: float,
    normalize: bool,
) -> tuple[Float[Tensor, ""], Step] | None:
    """The same for a small batch, and None for others."""
    if target.single and temp_reg_weight == 0:
        return dense_own_pairs(a, b, scale, True, normalize, mask)
    if mask is not None:
        return None
    small = dense_softmax(a, b, scale, target, both=True, normalize=normalize, expected=temp_reg_weight != 0)
    if small is None:
        return None
    loss, gap, step = small
    if gap is None:
        return loss, step
    loss = loss + temp_reg_weight * (gap / scale).square()
    return loss, replace(step, value=loss.detach())


def _reached(index: Tensor, alpha: Tensor) -> float:
    """The share of rows that have a neighbour in the batch; computed when the record is read."""
    if not index.shape[1]:
        return 0.0
    return ((index >= 0) & (alpha > 0)).any(1).float().mean().item()


def check_spatial_options(neighbor_alpha_scale: float, temp_reg_weight: float, neighbors: str) -> None:
    """``NearfarError`` for options that cannot be."""
    number("neighbor_alpha_scale", neighbor_alpha_scale, least=0)
    number("temp_reg_weight", temp_reg_weight, least=0)
    check_words(neighbors=neighbors)
    if neighbors not in ("soft", "positive", "mask", "none"):
        raise NearfarError(f"neighbors is {neighbors!r}; it is 'soft', 'positive', 'mask' or 'none'")


def _check(index: Tensor, alpha: Tensor, n: int) -> tuple[Tensor, Tensor, bool]:
    """The same, and whether it is known that no position is missing (-1)."""
    check_tensors(neighbor_index=index, neighbor_alpha=alpha)
    if index.ndim != 2 or len(index) != n or alpha.shape != index.shape:
        raise NearfarError(
            f"neighbor_index is {tuple(index.shape)} and neighbor_alpha {tuple(alpha.shape)}; both are ({n}, k): for "
            "each row of the batch the positions of its neighbours in the batch, -1 for none, and their weights"
        )
    if alpha.is_complex() or alpha.dtype == torch.bool:
        raise NearfarError(f"neighbor_alpha is {alpha.dtype}; weights are numbers, 0 or more")
    if index.dtype.is_floating_point or index.dtype == torch.bool or index.is_complex():
        raise NearfarError(f"neighbor_index is {index.dtype}; positions in the batch are whole numbers")
    complete = False
    if index.device.type == "cpu" and index.numel():
        low, high = (end.item() for end in torch.aminmax(index))
        if high >= n or low < -1:
            raise NearfarError(
                f"neighbor_index holds {high if high >= n else low}, but the batch has {n} rows: it takes positions in "
                "the batch, not in the data set, and -1 for none"
            )
        complete = low >= 0
        if not complete:  # what stands beside no neighbour weighs nothing, NaN included
            alpha = alpha.masked_fill(index < 0, 0)
        least, most = (end.item() for end in torch.aminmax(alpha))
        if not (least >= 0 and most < torch.inf):  # NaN is neither
            raise NearfarError(
                "neighbor_alpha must be finite, 0 or more; some are below 0, infinite or not a number"
            )
    elif index.numel():
        alpha = alpha.masked_fill(index < 0, 0)
    return index, alpha, complete


@dataclass(eq=False, repr=False)
class SpatialLoss(SpatialOptions, ContrastiveLoss):
    """CLIP whose targets share some mass with the spatial neighbours in the batch.

    Called with both views, the scale (already exponentiated) and, for each row, the positions of its neighbours *in
    the batch* (-1 for none) and their weights. ``nearfar.losses.spatial`` has the definitions and the other ways
    to treat ``neighbors``: "positive", "mask", "none".

    ``record.extra["rows_with_neighbors"]`` is the share of rows that have a neighbour in the batch at all: at 0 the
    target is inert and this is CLIP. ``record.floor`` is the mean entropy of the targets.

    >>> import torch
    >>> loss = SpatialLoss()
    >>> value = loss(torch.eye(3), torch.eye(3), 10.0, torch.tensor([[1], [0], [-1]]), torch.ones(3, 1))
    >>> round(loss.record.extra["rows_with_neighbors"], 2), round(loss.record.floor, 2)
    (0.67, 0.42)
    """

    traits: ClassVar[LossTraits] = LossTraits(
        "softmax",
        "weights",
        rows=("image", "text", "neighbor_index", "neighbor_alpha"),
        positions=("neighbor_index",),
        numbers=("logit_scale",),
        local=(Requires("temp_reg_weight", (0,), "its regulariser squares a mean over the whole batch"),),
    )

    def __post_init__(self) -> None:
        self._reached: Callable[[], float] | None = None
        clamp_scale(1.0, self.max_scale)
        self.check()

    def forward(
        self,
        image: Float[Tensor, "n d"],
        text: Float[Tensor, "n d"],
        logit_scale: float | Float[Tensor, ""] | Float[Tensor, "1"],
        neighbor_index: Int[Tensor, "n k"],
        neighbor_alpha: Float[Tensor, "n k"],
        rows: slice | None = None,
    ) -> Float[Tensor, ""]:
        value, step, self._reached = spatial_step(
            image, text, logit_scale, neighbor_index, neighbor_alpha, self, rows
        )
        return self.keep(value, step, self.neighbors == "mask")

    def _extra(self) -> dict[str, float]:
        reached = {} if self._reached is None else {"rows_with_neighbors": self._reached()}
        return reached | at_clamp(self._step, self.max_scale)
