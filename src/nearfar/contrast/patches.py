"""Where positives stand and what they weigh.

The kernel takes their logits out of a tile, works on them apart, and puts their gradient back. Three shapes are
enough for every target: a diagonal (own partners), a rectangle (classes, overlaps, explicit weights) and, of the whole
matrix, single entries (sparse neighbours).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["HIDDEN", "Diagonal", "Entries", "Patch", "Positions", "Rectangle", "is_shown"]

#: a logit that takes no part: its exponential is 0, and 0 times it is 0, as 0 times -inf would not be
HIDDEN = -1e30


def is_shown(logits: Tensor) -> Tensor:
    """Which logits take part."""
    return logits > 0.5 * HIDDEN


class Positions(Protocol):
    """Some positions of a matrix, with one value each.

    ``weight`` holds the weights of the queries in the rows, ``weight_back`` those of the queries in the columns; None
    stands for 1 everywhere, or for the same as the rows'. A position may weigh nothing in one of the directions.
    """

    @property
    def weight(self) -> Tensor | None: ...

    @property
    def weight_back(self) -> Tensor | None: ...

    def spread(self, vector: Float[Tensor, " r"], axis: int) -> Tensor:
        """One number per row (``axis`` 1) or column (0) of the patch, repeated for its positions."""

    def sum(self, values: Tensor, axis: int) -> Tensor:
        """Sums along the rows (``axis`` 1) or the columns (0)."""

    def amax(self, values: Tensor, axis: int) -> Tensor:
        """Maxima along the rows (``axis`` 1) or the columns (0); hidden or -inf where there is no position."""


class Patch(Positions, Protocol):
    """Positions of a tile."""

    @property
    def rows(self) -> slice: ...

    @property
    def columns(self) -> slice: ...

    def take(self, tile: Float[Tensor, "r c"]) -> Tensor:
        """The values at the positions, copied; they are hidden in the tile from now on."""

    def put(self, tile: Float[Tensor, "r c"], values: Tensor) -> None:
        """Write values to the positions."""


@dataclass(frozen=True)
class Diagonal:
    """One position in each row and column, side by side: row ``rows.start + i``, column ``columns.start + i``."""

    rows: slice
    columns: slice
    weight: Tensor | None = None
    weight_back: Tensor | None = None

    def take(self, tile: Float[Tensor, "r c"]) -> Tensor:
        view = tile[self.rows, self.columns].diagonal()
        values = view.clone()
        view.fill_(HIDDEN)
        return values

    def put(self, tile: Float[Tensor, "r c"], values: Tensor) -> None:
        tile[self.rows, self.columns].diagonal().copy_(values)

    def spread(self, vector: Tensor, axis: int) -> Tensor:
        return vector

    def sum(self, values: Tensor, axis: int) -> Tensor:
        return values

    def amax(self, values: Tensor, axis: int) -> Tensor:
        return values


@dataclass(frozen=True)
class Rectangle:
    """A block of the tile. Positions of weight 0 are no positives: their values are hidden, and they stay in the tile.

    Of a query in the rows and one in the columns, each weighs for the other the same.
    """

    rows: slice
    columns: slice
    weight: Tensor | None = None
    weight_back: None = None

    @cached_property
    def members(self) -> Tensor:
        """1 where there is a positive, else 0. As numbers: choosing by a Boolean is ten times slower on a CPU."""
        assert self.weight is not None
        return self.weight.sign()

    def take(self, tile: Float[Tensor, "r c"]) -> Tensor:
        view = tile[self.rows, self.columns]
        if self.weight is None:
            values = view.clone()
            view.fill_(HIDDEN)
            return values
        values = torch.add(view, self.members - 1, alpha=-HIDDEN)
        view.add_(self.members, alpha=HIDDEN)
        return values

    def put(self, tile: Float[Tensor, "r c"], values: Tensor) -> None:
        view = tile[self.rows, self.columns]
        if self.weight is None:
            view.copy_(values)
        else:
            view.add_(values)  # what is not taken has value 0 here, what was taken is 0 there

    def spread(self, vector: Tensor, axis: int) -> Tensor:
        return vector.unsqueeze(axis)

    def sum(self, values: Tensor, axis: int) -> Tensor:
        return values.sum(axis)

    def amax(self, values: Tensor, axis: int) -> Tensor:
        return values.amax(axis)


@dataclass(frozen=True)
class Entries:
    """Single positions ``row[e]``, ``column[e]`` of a matrix, none of them twice.

    They are no patch of a tile: ``scattered`` collects them over all tiles and scores them together.
    """

    row: Int[Tensor, " e"]
    column: Int[Tensor, " e"]
    shape: tuple[int, int]
    weight: Tensor | None = None
    weight_back: Tensor | None = None

    def spread(self, vector: Tensor, axis: int) -> Tensor:
        return vector[self.row if axis == 1 else self.column]

    def sum(self, values: Tensor, axis: int) -> Tensor:
        line, size = (self.row, self.shape[0]) if axis == 1 else (self.column, self.shape[1])
        return values.new_zeros(size).index_add_(0, line, values)

    def amax(self, values: Tensor, axis: int) -> Tensor:
        line, size = (self.row, self.shape[0]) if axis == 1 else (self.column, self.shape[1])
        return values.new_full((size,), -torch.inf).scatter_reduce_(0, line, values, "amax")
