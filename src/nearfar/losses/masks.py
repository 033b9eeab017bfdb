"""Pairs of a batch that are no real negatives, as masks for a loss: true means left out."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfar.contrast import unit_rows
from nearfar.errors import NearfarError
from nearfar.labels import apart, whole_labels
from nearfar.losses.arguments import check_tensors, number

__all__ = ["duplicate_mask", "false_negative_mask"]

# The cosine of a row with its own copy misses 1 by a few roundings of float32.
_ROUNDING = 1e-6


@torch.no_grad()
def false_negative_mask(text: Float[Tensor, "n d"], threshold: float = 0.95) -> Bool[Tensor, "n n"]:
    """True where two different rows have texts of cosine ``threshold`` or more: likely the same meaning.

    A negative that says the same as the positive teaches the wrong thing. The diagonal is false: a row's own
    partner is always a candidate.

    >>> false_negative_mask(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), 1.0)
    tensor([[False,  True, False],
            [ True, False, False],
            [False, False, False]])
    """
    check_tensors(text=text)
    if text.ndim != 2 or text.is_complex():
        raise NearfarError(
            f"text embeddings have shape {tuple(text.shape)}; the mask takes numbers (rows, dimensions)"
        )
    if not -1.0 <= number("threshold", threshold) <= 1.0:
        raise NearfarError(f"threshold is {threshold}, but it is a cosine: -1 to 1, usually 0.9 to 0.99")
    with torch.autocast(text.device.type, enabled=False):
        unit = unit_rows(text.to(torch.promote_types(text.dtype, torch.float32)))
        return (unit @ unit.T >= threshold - _ROUNDING).fill_diagonal_(False)


@torch.no_grad()
def duplicate_mask(labels: Int[Tensor, " n"]) -> Bool[Tensor, "n n"]:
    """True where two different rows have the same label, such as the id of their text; a label that is missing (−1,
    NaN) is that of no other row.

    >>> duplicate_mask(torch.tensor([7, 3, 7]))[0]
    tensor([False, False,  True])
    """
    labels = whole_labels(labels)
    if labels.ndim != 1:
        raise NearfarError(f"labels have shape {tuple(labels.shape)}; the mask takes one label for each row")
    labels = apart(labels)
    return (labels[:, None] == labels[None, :]).fill_diagonal_(False)
