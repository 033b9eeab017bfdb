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
from nearfar.contrast.patches import Patch
from nearfar.contrast.targets import Target

__all__ = ["LEAST", "Setting", "Tile", "Workspace", "tiles"]

#: rows × columns of a tile: large enough for the matrix product, small enough for the cache
TILE = (1024, 1024)
#: of queries that are their own keys: smaller, as tiles on the diagonal do half their work for nothing
TWIN_TILE = 512
#: stands for -inf where -inf times 0 must be 0
LEAST = -1e30
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
    """Logits of some queries and keys. Left-out pairs and positives are -inf; ``taken`` are the positives' logits."""

    rows: slice
    columns: slice
    queries: Float[Tensor, "r d"]
    keys: Float[Tensor, "c d"]
    logits: Float[Tensor, "r c"]
    taken: list[tuple[Patch, Tensor]]
    #: its columns are queries in their own right (false on the diagonal of twins, where the rows say it all)
    back: bool


class Workspace:
    """Buffers the size of a tile, used again for each."""

    def __init__(self, like: Tensor, size: tuple[int, int]) -> None:
        self._like, self._length = like, size[0] * size[1]
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Float[Tensor, "r c"]:
        if name not in self._buffers:
            self._buffers[name] = self._like.new_empty(self._length)
        return self._buffers[name][: rows * columns].view(rows, columns)


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
            if setting.without_self:
                _leave_out_self(logits, own, columns[k])
            taken = [(patch, patch.take(logits)) for patch in setting.target.patches(own, columns[k])]
            if setting.mask is not None:
                logits.masked_fill_(setting.mask.tile(own, columns[k]), -torch.inf)
            back = setting.both or (setting.twin and columns[k].start > top)
            yield Tile(rows, columns[k], queries, keys[k], logits, taken, back)


def _leave_out_self(logits: Tensor, own: slice, columns: slice) -> None:
    first, last = max(own.start, columns.start), min(own.stop, columns.stop)
    if first < last:
        logits[
            first - own.start : last - own.start, first - columns.start : last - columns.start
        ].diagonal().fill_(-torch.inf)
