"""Numbers of one training batch that a loss cannot know: copies and likely false negatives in it, and its groups."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfar.arguments import check_dense, entries, numbers, whole_numbers
from nearfar.contrast import Mask, as_mask, unit_rows
from nearfar.errors import NearfarError

__all__ = ["batch_signals", "group_signals"]


# Rows whose pairs with all columns are looked at together.
_TILE = 1024


@torch.no_grad()
def batch_signals(
    copies: Mask | Bool[Tensor, "n m"] | None = None,
    likely: Mask | Bool[Tensor, "n m"] | None = None,
    left_out: Mask | Bool[Tensor, "n m"] | None = None,
) -> dict[str, float]:
    """Which negatives of a batch are none: pairs (query, key) other than (i, i) that are not ``left_out`` of the loss.

    ``copies`` are pairs with the same content (``DuplicateMask``): ``duplicate_keys`` is the share of rows that have
    such a copy of their positive among their negatives. ``likely`` are pairs too similar to be negatives
    (``SimilarityMask`` of reference embeddings): ``false_negative_share`` is their share of the negatives, 0 where all
    are left out. ``left_out`` is the mask that the loss was given.

    What is not given has no field. No matrix of all pairs is stored.

    >>> from nearfar.contrast import DuplicateMask
    >>> texts = DuplicateMask(torch.tensor([4, 7, 4, 9]))
    >>> batch_signals(copies=texts), batch_signals(copies=texts, left_out=texts)
    ({'duplicate_keys': 0.5}, {'duplicate_keys': 0.0})
    """
    masks = {name: _mask(name, m) for name, m in (("copies", copies), ("likely", likely)) if m is not None}
    if not masks:
        return {}
    shape = next(iter(masks.values())).shape
    outside = None if left_out is None else _mask("left_out", left_out)
    for name, mask in {**masks, "left_out": outside}.items():
        if mask is not None and mask.shape != shape:
            raise NearfarError(
                f"{name} is for {mask.shape} pairs and a different mask for {shape}; both need one batch"
            )
    n, m = shape
    counts = {"copies": 0, "likely": 0, "negatives": 0}
    for start in range(0, n, _TILE):
        rows, columns = slice(start, min(start + _TILE, n)), slice(0, m)
        tiles = {name: mask.tile(rows, columns) for name, mask in masks.items()}
        device = next(iter(tiles.values())).device
        own = torch.arange(rows.start, rows.stop, device=device)[:, None] == torch.arange(m, device=device)
        negative = ~own if outside is None else ~(own | outside.tile(rows, columns))
        counts["negatives"] += int(negative.sum())
        if "copies" in tiles:
            counts["copies"] += int((tiles["copies"] & negative).any(1).sum())
        if "likely" in tiles:
            counts["likely"] += int((tiles["likely"] & negative).sum())
    signals = {}
    if "copies" in masks:
        signals["duplicate_keys"] = counts["copies"] / max(n, 1)
    if "likely" in masks:
        signals["false_negative_share"] = counts["likely"] / max(counts["negatives"], 1)
    return signals


@torch.no_grad()
def group_signals(
    groups: Sequence[object] | Tensor | np.ndarray,
    scores: Float[Tensor, " n"] | np.ndarray | None = None,
    anchors: Tensor | np.ndarray | None = None,
    features: Float[Tensor, "n d"] | np.ndarray | None = None,
) -> dict[str, float]:
    """How the groups of a batch differ: ``groups`` holds the name (or number) of each row's group.

    ``group_share/NAME``: share of the batch. With ``anchors`` (positions, or a Boolean for each row)
    ``anchor_share/NAME``: share of the anchors; without any anchor it is left out. With ``scores``
    ``score/NAME``: mean score of the group. With ``features`` ``feature_gap``: distance between the groups' mean unit
    features, 0 to 2, of more than two groups the largest; with one group it is left out.

    >>> group_signals(["f", "m", "m", "m"], scores=np.array([0.25, 0.5, 0.5, 0.5]), anchors=np.array([0, 1]))
    {'group_share/f': 0.25, 'group_share/m': 0.75, 'anchor_share/f': 0.5, 'anchor_share/m': 0.5,
     'score/f': 0.25, 'score/m': 0.5}
    >>> round(group_signals([0, 1], features=torch.tensor([[3.0, 0.0], [0.0, 5.0]]))["feature_gap"], 3)
    1.414
    """
    dimensions = getattr(groups, "ndim", 1)
    labels = entries("groups", groups) if dimensions == 1 else []
    n = len(labels)
    if not n or any(isinstance(label, (list, tuple, dict, set)) for label in labels):
        raise NearfarError("groups hold one name or number for each row of a batch, and at least one")
    names = [str(label) for label in labels]
    members = {name: torch.tensor([other == name for other in names]) for name in sorted(set(names))}
    signals = {f"group_share/{name}": int(rows.sum()) / n for name, rows in members.items()}
    if anchors is not None:
        chosen = _anchors(_tensor("anchors", anchors), n)
        if len(chosen):
            signals |= {
                f"anchor_share/{name}": float(rows[chosen].double().mean()) for name, rows in members.items()
            }
    if scores is not None:
        values = torch.from_numpy(numbers("scores", scores, finite=False))
        if values.shape != (n,):
            raise NearfarError(
                f"scores have shape {tuple(values.shape)}; one for each of the {n} rows of groups is needed"
            )
        signals |= {f"score/{name}": float(values[rows].mean()) for name, rows in members.items()}
    if features is not None:
        x = torch.from_numpy(numbers("features", features, finite=False))
        if x.ndim != 2 or len(x) != n:
            raise NearfarError(
                f"features have shape {tuple(x.shape)}; one row for each of the {n} rows of groups is needed"
            )
        means = [unit_rows(x)[rows].mean(0) for rows in members.values()]
        gaps = [float(torch.linalg.vector_norm(a - b)) for a, b in combinations(means, 2)]
        if gaps:
            signals["feature_gap"] = max(gaps)
    return signals


def _mask(name: str, mask: Mask | Tensor | np.ndarray) -> Mask:
    try:
        return as_mask(torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask)
    except (NearfarError, TypeError) as error:
        raise NearfarError(f"{name}: {error}") from None


def _tensor(name: str, values: object) -> Tensor:
    if isinstance(values, Tensor):
        check_dense(name, values)
        return values.detach().cpu()
    boolean = isinstance(values, np.ndarray) and values.dtype == bool
    boolean = boolean or (
        isinstance(values, list) and bool(values) and all(isinstance(v, bool) for v in values)
    )
    return torch.tensor(values) if boolean else torch.from_numpy(whole_numbers(name, values))


def _anchors(anchors: Tensor, n: int) -> Tensor:
    """Positions of the anchors."""
    if anchors.dtype == torch.bool and anchors.shape == (n,):
        return anchors.nonzero().flatten()
    whole = not (anchors.is_floating_point() or anchors.is_complex() or anchors.dtype == torch.bool)
    positions = anchors.long() if whole or not anchors.numel() else anchors
    if (
        anchors.ndim != 1
        or positions.dtype != torch.int64
        or bool(((positions < 0) | (positions >= n)).any())
    ):
        raise NearfarError(
            f"anchors are {tuple(anchors.shape)} {anchors.dtype}; they are positions in the {n} rows of "
            "groups, or a Boolean for each row"
        )
    return positions
