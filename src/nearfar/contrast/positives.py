"""Positives of a tile: their positions and weights, and their logits, which the kernel computes with separately.

The kernel takes the positives' logits out of a tile and puts their gradient back. Three shapes are enough for every
target: a diagonal (own partners), a rectangle (classes, overlaps, explicit weights) and, of the whole matrix, single
entries (sparse neighbours). Buffers come from a ``Workspace`` and are used again for every tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "MASKED_LOGIT",
    "Diagonal",
    "Entries",
    "ExtractedPositives",
    "InPlacePositives",
    "Patch",
    "Positions",
    "PositiveLogits",
    "Rectangle",
    "Workspace",
    "buffer_for",
    "is_unmasked",
]


class Workspace:
    """Hands out buffers by name, no larger than a tile, with the content of their last use.

    >>> import torch
    >>> space = Workspace(torch.empty(0), (4, 4))
    >>> space("logits", 2, 3).data_ptr() == space("logits", 4, 4).data_ptr()
    True
    """

    def __init__(self, like: Tensor, size: tuple[int, int]) -> None:
        self._like, self._length = like, size[0] * size[1]
        self.dtype = like.dtype
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int, int], Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Float[Tensor, "r c"]:
        view = self._views.get((name, rows, columns))
        if view is None:
            if name not in self._buffers:
                self._buffers[name] = self._like.new_empty(self._length)
            view = self._views[name, rows, columns] = self._buffers[name][: rows * columns].view(
                rows, columns
            )
        return view


def buffer_for(
    space: Workspace | None, like: Tensor, name: str, rows: int, columns: int
) -> Float[Tensor, "r c"]:
    """A buffer for numbers like ``like``; fresh memory where those of the workspace are of a different dtype."""
    if space is None or space.dtype != like.dtype:
        return like.new_empty(rows, columns)
    return space(name, rows, columns)


#: a logit that takes no part: its exponential is 0, and 0 times it is 0, as 0 times -inf would not be
MASKED_LOGIT = -1e30


def is_unmasked(logits: Tensor) -> Tensor:
    """Which logits take part."""
    return logits > 0.5 * MASKED_LOGIT


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
        view.fill_(MASKED_LOGIT)
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
            view.fill_(MASKED_LOGIT)
            return values
        values = torch.add(view, self.members - 1, alpha=-MASKED_LOGIT)
        view.add_(self.members, alpha=MASKED_LOGIT)
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


class PositiveLogits:
    """Positives and the logits at their positions, hidden where there is none after all.

    What the methods give has the form of these logits. ``axis`` is 1 for queries in the rows, 0 for queries in the
    columns; only weights that differ between them are computed twice.
    """

    def __init__(
        self, patch: Positions, logits: Tensor, holds_self: bool, is_open: Tensor | None = None
    ) -> None:
        self.patch, self.logits, self._holds_self = patch, logits, holds_self
        self._known: dict[str, Tensor] = {}
        self._open = is_open  # 0 where a mask leaves a pair out: that holds for opposite, not for positives

    def opposite_only(self, axis: int) -> Tensor | None:
        """1 where a position is a positive of the other direction's query alone, and so belongs to the rest here."""
        if self.patch.weight_back is None:
            return None

        def others() -> Tensor:
            present = is_unmasked(self.logits).to(self.logits.dtype) - self.counts(axis)
            return present if self._open is None else present * self._open

        return self._once("opposite", axis, others)

    def own(self, axis: int) -> Tensor:
        """The logits, hidden where there is no positive of the queries."""
        if self.patch.weight_back is None:
            return self.logits
        return self._once(
            "own", axis, lambda: torch.add(self.logits, self.counts(axis) - 1, alpha=-MASKED_LOGIT)
        )

    def counts(self, axis: int) -> Tensor:
        """1 where there is a positive, else 0."""

        def member() -> Tensor:
            weight = self._weight(axis)
            present = torch.ones_like(self.logits) if weight is None else weight.sign().to(self.logits.dtype)
            return self._shown(present)

        return self._once("counts", axis, member)

    def weights(self, axis: int) -> Tensor:
        """The weights, 0 where there is no positive."""
        weight = self._weight(axis)
        if weight is None:
            return self.counts(axis)
        return self._once("weights", axis, lambda: self._shown(weight.to(self.logits.dtype)))

    def finite(self) -> Tensor:
        """The logits, 0 where they are hidden."""
        if self.patch.weight is None and not self._holds_self:
            return self.logits
        return self._once("finite", 1, lambda: self._shown(self.logits))

    def weighted_logits(self, axis: int) -> Tensor:
        """Weight times logit."""
        return self.finite() if self._weight(axis) is None else self.weights(axis) * self.finite()

    def powers(self, axis: int) -> Tensor:
        """Exponentials of the positives' logits, for logits that are in range; 0 where there is none."""
        return self._once("powers", axis, lambda: self.own(axis).exp())

    def w_log_w(self, axis: int) -> Tensor:
        """Weight times its logarithm, 0 for 0."""

        def compute() -> Tensor:
            weight = self.weights(axis)
            return torch.clamp(weight, min=1e-30, out=self.buffer("w_log_w")).log_().mul_(weight)

        return self._once("w_log_w", axis, compute)

    def buffer(self, name: str) -> Tensor:
        """A buffer in the form of the logits."""
        return torch.empty_like(self.logits)

    def _once(self, name: str, axis: int, compute: Callable[[], Tensor]) -> Tensor:
        key = f"{name} {axis}" if self.patch.weight_back is not None else name
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def _weight(self, axis: int) -> Tensor | None:
        return self.patch.weight if axis == 1 or self.patch.weight_back is None else self.patch.weight_back

    def _shown(self, values: Tensor) -> Tensor:
        if self.patch.weight is None and not self._holds_self:
            return values
        return values * is_unmasked(self.logits).to(values.dtype)


class ExtractedPositives(PositiveLogits):
    """Positives taken out of a tile."""

    patch: Patch

    def remove_from(self, powers: Tensor) -> None:
        """See that only the rest is left in the exponentials of the tile. Hidden logits have none."""

    def put(self, tile: Tensor, values: Tensor) -> None:
        """Write values to the positions of a tile that has none there."""
        self.patch.put(tile, values)


class InPlacePositives(ExtractedPositives):
    """Positives that stay in the tile: a block whose exponentials are in range, split by multiplying with 0 and 1.

    Hiding many logits would cost more than the matrix product: exponentials far out of range, and choices by a
    Boolean, run element by element. Buffers, because fresh memory for every step of every tile costs as much as the
    step.
    """

    def __init__(
        self, patch: Rectangle, tile: Tensor, own: Tensor | None, name: str, space: Workspace
    ) -> None:
        self._space, self._name = space, name
        super().__init__(patch, tile[patch.rows, patch.columns], own is not None)
        weight = patch.weight
        if weight is None or own is not None or weight.dtype != tile.dtype:
            weight = (
                self.buffer("weight").copy_(weight)
                if weight is not None
                else self.buffer("weight").fill_(1.0)
            )
            if own is not None:
                weight.mul_(own[patch.rows, patch.columns])
        self._known["weights"] = weight

    def counts(self, axis: int) -> Tensor:
        return self._once("counts", 1, lambda: torch.sign(self.weights(1), out=self.buffer("counts")))

    def weights(self, axis: int) -> Tensor:
        return self._known["weights"]

    def finite(self) -> Tensor:
        return self.logits

    def weighted_logits(self, axis: int) -> Tensor:
        return self._once(
            "weighted logits",
            1,
            lambda: torch.mul(self.weights(1), self.logits, out=self.buffer("weighted logits")),
        )

    def powers(self, axis: int) -> Tensor:
        return self._once(
            "powers", 1, lambda: torch.exp(self.logits, out=self.buffer("powers")).mul_(self.counts(1))
        )

    def remove_from(self, powers: Tensor) -> None:
        view = powers[self.patch.rows, self.patch.columns]
        view.addcmul_(view, self.counts(1), value=-1)  # x - x and x - 0: nothing is rounded

    def put(self, tile: Tensor, values: Tensor) -> None:
        tile[self.patch.rows, self.patch.columns].add_(values)

    def buffer(self, name: str) -> Tensor:
        rows, columns = self.patch.rows, self.patch.columns
        return self._space(f"{self._name} {name}", rows.stop - rows.start, columns.stop - columns.start)
