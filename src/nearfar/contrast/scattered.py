"""Positives that stand alone: collected on the walk over tiles, and scored once at its end.

A few entries in each tile would cost a few dozen small calls in each tile. So a tile only hands its entries over
(forward) or is handed their derivatives (backward), one call each; what the kernel does with positives is done with
all of them together, as if they stood in one tile as large as the matrix.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.patches import HIDDEN, Entries
from nearfar.contrast.taken import Taken
from nearfar.contrast.targets import Target

__all__ = ["Scattered"]


class Scattered:
    """Entries of an (n, m) matrix in the order of a walk over its tiles, and their logits once it has passed.

    >>> entries = Entries(torch.tensor([0, 1]), torch.tensor([1, 0]), (2, 2), torch.ones(2))
    >>> found, tile = Scattered(entries, (1, 2), torch.empty(0)), torch.tensor([[5.0, 6.0]])
    >>> found.take(0, tile), found.logits[0].item(), tile[0, 1].item() < -1e29
    (None, 6.0, True)
    """

    @classmethod
    def of(
        cls, target: Target, offset: int, both: bool, size: tuple[int, int], queries: Float[Tensor, "n d"]
    ) -> Scattered | None:
        """Those of the queries, which are rows of the target from ``offset`` on; None where it has none."""
        entries = target.entries(slice(offset, offset + len(queries)), both)
        return None if entries is None else cls(entries, size, queries)

    def __init__(self, entries: Entries, size: tuple[int, int], like: Tensor) -> None:
        height, width = size
        m = entries.shape[1]
        row, column = entries.row, entries.column
        across = -(-m // width)
        number = row.div(height, rounding_mode="floor") * across + column.div(width, rounding_mode="floor")
        number, order = torch.sort(number, stable=True)
        row, column = row[order], column[order]
        weight, back = (None if w is None else w[order] for w in (entries.weight, entries.weight_back))
        self.patch = Entries(row, column, entries.shape, weight, back)
        left = column - column % width
        # In the memory of its tile, whose rows are as long as it is wide: the last one may be narrower.
        self._places = row % height * (m - left).clamp(max=width) + (column - left)
        ends = torch.arange(-(-entries.shape[0] // height) * across + 1, device=row.device)
        self._starts = torch.searchsorted(number, ends).tolist()
        self.logits = like.new_empty(len(row))
        self._open: Tensor | None = None

    def take(self, number: int, tile: Float[Tensor, "r c"]) -> None:
        """Note down the logits of a tile, the ``number``-th of the walk, and hide them there."""
        part, places = self._of(number)
        if len(places):
            flat = tile.view(-1)
            torch.index_select(flat, 0, places, out=self.logits[part])
            flat.index_fill_(0, places, HIDDEN)

    def leave_out(self, number: int, mask: Float[Tensor, "r c"]) -> None:
        """Note down where a mask (1 where a pair is left out) leaves the other direction's positives out."""
        if self._open is None:
            self._open = torch.ones_like(self.logits)
        part, places = self._of(number)
        if len(places):
            self._open[part] = 1.0 - mask.flatten()[places]

    def put(self, number: int, tile: Float[Tensor, "r c"], values: Float[Tensor, " e"]) -> None:
        """Write what belongs to the entries of a tile."""
        part, places = self._of(number)
        if len(places):
            tile.view(-1).index_copy_(0, places, values[part])

    def taken(self, holds_self: bool) -> Taken:
        """All entries as positives of one tile."""
        return Taken(self.patch, self.logits, holds_self, self._open)

    def _of(self, number: int) -> tuple[slice, Tensor]:
        part = slice(self._starts[number], self._starts[number + 1])
        return part, self._places[part]
