"""The walk over tiles that forward and backward share: product, excluded pairs, positives set apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.masks import Mask
from nearfar.contrast.patches import HIDDEN, Rectangle
from nearfar.contrast.taken import Overlay, Taken
from nearfar.contrast.targets import Target
from nearfar.contrast.workspace import Workspace

__all__ = ["Setting", "Tile", "tiles"]

#: rows × columns of a tile: large enough for the matrix product, small enough for the cache
TILE = (1024, 1024)
#: of queries that are their own keys: smaller, as tiles on the diagonal do half their work for nothing
TWIN_TILE = 512
#: up to this many pairs, one tile is the whole matrix, and backward finds it where forward left it
KEPT = 1 << 20


@dataclass(frozen=True)
class Setting:
    """What one call computes, apart from its tensors.

    ``offset``: query 0 is row ``offset`` of the target (and key ``offset`` is the same item, for ``without_self``).
    ``both``: the keys are queries too. ``twin``: queries and keys are the same rows; only tiles on and above the
    diagonal are computed. ``bounded``: no logit is so large that its exponential overflows, so that no shift is
    needed. ``inside``: weights of the positives stand inside the logarithm. ``expected``: the mean logit under the
    softmax is wanted.
    """

    target: Target
    mask: Mask | None
    offset: int
    without_self: bool
    both: bool
    twin: bool
    inside: bool
    expected: bool
    bounded: bool
    size: tuple[int, int]
    keep: bool

    @property
    def has_excess(self) -> bool:
        """Whether the positives' own term is anything but zero, see ``kernel``."""
        return not (self.target.single or (self.inside and self.target.binary))


class Tile(NamedTuple):
    """Logits of some queries and keys. Left-out pairs and positives are hidden; ``taken`` are the positives."""

    rows: slice
    columns: slice
    queries: Float[Tensor, "r d"]
    keys: Float[Tensor, "c d"]
    logits: Float[Tensor, "r c"]
    taken: list[Taken]
    #: its columns are queries in their own right (false on the diagonal of twins, where the rows say it all)
    back: bool


def bounded(largest_logit: float, n: int, m: int, dtype: torch.dtype) -> bool:
    """Whether sums of exponentials stay in range without a shift: up to about 78 in float32.

    A constant shift fails silently beyond: the sums of some rows underflow to 0. CLIP's scale of 100 is beyond.

    >>> bounded(14.3, 8192, 8192, torch.float32), bounded(100.0, 8192, 8192, torch.float32)
    (True, False)
    """
    return largest_logit + math.log(max(n, m, 2)) < math.log(torch.finfo(dtype).max) - 1.0


def tiles(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], scale: Tensor, setting: Setting, space: Workspace
) -> Iterator[Tile]:
    """All tiles, one after the other in the same buffer; rows change last."""
    n, m = len(a), len(b)
    height, width = setting.size
    columns = [slice(left, min(left + width, m)) for left in range(0, m, width)]
    keys = b.split(width)
    for top, queries in zip(range(0, n, height), a.split(height), strict=True):
        rows = slice(top, top + len(queries))
        own = slice(rows.start + setting.offset, rows.stop + setting.offset)
        scaled = queries * scale
        for k in range(top // width if setting.twin else 0, len(columns)):
            logits = space("logits", len(queries), len(keys[k]))
            torch.mm(scaled, keys[k].T, out=logits)
            taken = _take(logits, own, columns[k], setting, space)
            if setting.mask is not None:
                logits.add_(setting.mask.tile(own, columns[k]).to(logits.dtype), alpha=HIDDEN)
            back = setting.both or (setting.twin and columns[k].start > top)
            yield Tile(rows, columns[k], queries, keys[k], logits, taken, back)


def _take(logits: Tensor, own: slice, columns: slice, setting: Setting, space: Workspace) -> list[Taken]:
    """Hide each row's own place, where it is no candidate, and set the positives apart."""
    first, last = max(own.start, columns.start), min(own.stop, columns.stop)
    others = None
    if setting.without_self and first < last:
        place = (
            slice(first - own.start, last - own.start),
            slice(first - columns.start, last - columns.start),
        )
        logits[place].diagonal().fill_(HIDDEN)
        others = space("others", *logits.shape).fill_(1.0)
        others[place].diagonal().zero_()
    taken: list[Taken] = []
    for number, patch in enumerate(setting.target.patches(own, columns, space)):
        if isinstance(patch, Rectangle) and setting.bounded and not setting.expected:
            taken.append(Overlay(patch, logits, others, f"block {number}", space))
        else:
            taken.append(Taken(patch, patch.take(logits), others is not None))
    return taken
