"""Boxes as tensors: two ways to write one, and how far two overlap."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["corners", "generalized_iou", "iou", "to_centre"]


def corners(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """(centre x, centre y, width, height) → (left, top, right, bottom).

    >>> corners(torch.tensor([0.5, 0.5, 0.5, 1.0]))
    tensor([0.2500, 0.0000, 0.7500, 1.0000])
    """
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def to_centre(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """(left, top, right, bottom) → (centre x, centre y, width, height)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def iou(a: Float[Tensor, "*n 4"], b: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Area of the intersection over area of the union of boxes given by their corners; shapes broadcast.

    >>> iou(torch.tensor([0.0, 0.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, 3.0, 1.0]))
    tensor(0.3333)
    """
    shared, union = _areas(a, b)
    return shared / union.clamp(min=_TINY)


def generalized_iou(a: Float[Tensor, "*n 4"], b: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """IoU less the share of the smallest common box that neither covers (Rezatofighi et al., 2019); −1 to 1.

    It has a gradient for boxes that are apart, where the IoU is flat.

    >>> generalized_iou(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([2.0, 0.0, 3.0, 1.0]))
    tensor(-0.3333)
    """
    shared, union = _areas(a, b)
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = around.clamp(min=0).prod(-1).clamp(min=_TINY)
    return shared / union.clamp(min=_TINY) - (hull - union) / hull


_TINY = 1e-9  # boxes are given as shares of the picture: no box of a person is that small


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shared = (
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    )
    own = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1) + (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    return shared, own - shared
