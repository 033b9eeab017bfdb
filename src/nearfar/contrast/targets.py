"""Who belongs to whom: the positives of every query, tile by tile.

A target answers one question of the kernel: which positions of this tile are positives, and what do they weigh? What
it needs to know of the whole batch it keeps in O(batch). Weights need not add up to 1; the kernel does that.

``binary``: all weights are equal. ``single``: each query has at most one positive. ``symmetric``: for queries that are
their own keys, i weighs for j what j weighs for i. ``turned`` is the target of the keys as queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfar.contrast.patches import Diagonal, Entries, Patch, Rectangle
from nearfar.contrast.workspace import Workspace, room_for
from nearfar.errors import NearfarError

__all__ = ["Columns", "Nobody", "OwnPair", "SameClass", "Target"]


class Target(Protocol):
    """What the kernel asks of a target."""

    shape: tuple[int, int]
    binary: bool
    single: bool
    symmetric: bool
    #: whether every query is sure to have a positive, where itself counts as one
    everybody: bool = False
    #: up to so many pairs, the matrix of all weights is quicker than a walk over tiles
    few_pairs: int = 1 << 20

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        """The positives among these rows and columns, in coordinates of the tile; ``space`` lends buffers for
        weights."""

    def entries(self, rows: slice, both: bool) -> Entries | None:
        """Positives of these rows that stand alone and are in no patch, rows counted from the first of them; with
        ``both`` also those of the columns as queries."""
        return None

    def dense(self, like: Tensor) -> Float[Tensor, "n m"]:
        """All weights, 0 where there is no positive, as numbers like ``like`` that nobody else holds: for few rows."""
        n, m = self.shape
        patches = self.patches(slice(0, n), slice(0, m))
        if len(patches) == 1 and patches[0].weight is not None and patches[0].weight.shape == (n, m):
            return patches[0].weight.to(like.dtype)
        matrix = torch.zeros(n, m, dtype=like.dtype, device=like.device)
        for patch in patches:
            block = matrix[patch.rows, patch.columns]
            weight = torch.ones_like(block) if patch.weight is None else patch.weight.to(like.dtype)
            patch.put(matrix, weight.diagonal() if isinstance(patch, Diagonal) else weight)
        return matrix

    def turned(self) -> Target:
        """The target of the columns as queries."""

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        """Which queries have a positive, itself not counted where ``without_self``."""

    def listed(
        self, rows: slice, without_self: bool
    ) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"], Float[Tensor, " p"]]:
        """All positives of these rows: row, counted from the first of them, column, and weight."""
        weight = self.dense(torch.empty(0, dtype=torch.float64))[rows]
        row, column = weight.nonzero(as_tuple=True)
        row, column = _without_self(row, column, rows, without_self)
        return row, column, weight[row, column]


class OwnPair(Target):
    """Row i belongs to column i: InfoNCE, CLIP, SigLIP. Columns beyond the rows are negatives only.

    >>> OwnPair(4).patches(slice(0, 2), slice(2, 4)), len(OwnPair(4).patches(slice(2, 4), slice(2, 4)))
    ((), 1)
    """

    binary = single = True
    symmetric = False

    def __init__(self, n: int, m: int | None = None) -> None:
        self.shape = (n, n if m is None else m)

    def turned(self) -> OwnPair:
        return OwnPair(self.shape[1], self.shape[0])

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        return torch.arange(self.shape[0]) < self.shape[1]

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        first, last = max(rows.start, columns.start), min(rows.stop, columns.stop)
        if first >= last:
            return ()
        return (
            Diagonal(
                slice(first - rows.start, last - rows.start),
                slice(first - columns.start, last - columns.start),
            ),
        )


class SameClass(Target):
    """All rows of the query's class are its positives: SupCon. ``key_labels`` if the keys are other rows.

    Rows in the order of their labels are fastest: most tiles then hold no positive at all.

    >>> target = SameClass(torch.tensor([0, 0, 1]))
    >>> [patch.weight for patch in target.patches(slice(0, 3), slice(2, 3))]
    [None]
    """

    binary = True
    single = False

    def __init__(self, labels: Int[Tensor, " n"], key_labels: Int[Tensor, " m"] | None = None) -> None:
        key_labels = labels if key_labels is None else key_labels
        for found, name in ((labels, "labels"), (key_labels, "key_labels")):
            if found.ndim != 1 or found.dtype.is_floating_point or found.dtype.is_complex:
                raise NearfarError(
                    f"{name} are {tuple(found.shape)} {found.dtype}; one whole number for each row is needed"
                )
        self.shape = (len(labels), len(key_labels))
        self.symmetric = key_labels is labels
        self._given = (labels, key_labels)

    @cached_property
    def _classes(self) -> tuple[Tensor, Tensor]:
        """Numbers of the classes, in their order: of any type of label, there is one after the last."""
        labels, key_labels = self._given
        if self.symmetric:
            codes = torch.unique(labels, return_inverse=True)[1]
            return codes, codes
        codes = torch.unique(torch.cat([labels, key_labels]), return_inverse=True)[1]
        return codes[: len(labels)], codes[len(labels) :]

    @cached_property
    def _codes(self) -> tuple[Tensor, Tensor]:
        """The same as floats, exact up to 16 million classes: they compare into floats, and quickly."""
        labels, key_labels = self._classes
        codes = labels.float()
        return codes, codes if self.symmetric else key_labels.float()

    @cached_property
    def _ordered(self) -> bool:
        """On a device, knowing the ranges would mean waiting for it at every tile."""
        labels, key_labels = self._classes
        return labels.device.type == "cpu" and _ascending(labels) and _ascending(key_labels)

    def turned(self) -> SameClass:
        labels, key_labels = self._given
        return SameClass(key_labels, None if self.symmetric else labels)

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        labels, key_labels = self._classes
        classes, counts = torch.unique(key_labels, return_counts=True)
        where = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
        return (classes[where] == labels) & (counts[where] > int(without_self))

    def listed(
        self, rows: slice, without_self: bool
    ) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"], Float[Tensor, " p"]]:
        labels, key_labels = self._classes
        labels, (ordered, order) = labels[rows], torch.sort(key_labels, stable=True)
        first = torch.searchsorted(ordered, labels)
        counts = torch.searchsorted(ordered, labels, right=True) - first
        row = torch.arange(len(labels), device=labels.device).repeat_interleave(counts)
        place = torch.arange(len(row), device=labels.device) - (counts.cumsum(0) - counts)[row]
        row, column = _without_self(row, order[first[row] + place], rows, without_self)
        return row, column, torch.ones_like(row, dtype=torch.float32)

    def dense(self, like: Tensor) -> Float[Tensor, "n m"]:
        labels, key_labels = self._given
        same = torch.empty(self.shape, dtype=like.dtype, device=like.device)
        return torch.eq(labels.unsqueeze(1), key_labels, out=same)

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        labels, key_labels = self._classes[0][rows], self._classes[1][columns]
        r, c = slice(0, len(labels)), slice(0, len(key_labels))
        if self._ordered:
            low = max(int(labels[0]), int(key_labels[0]))
            high = min(int(labels[-1]), int(key_labels[-1]))
            if low > high:
                return ()
            ends = torch.tensor([low, high + 1], dtype=labels.dtype)
            r = slice(*torch.searchsorted(labels, ends).tolist())
            c = slice(*torch.searchsorted(key_labels, ends).tolist())
            if r.start == r.stop or c.start == c.stop:
                return ()
            if low == high:
                return (Rectangle(r, c),)
        mine, theirs = self._codes[0][rows][r], self._codes[1][columns][c]
        same = room_for(space, mine, "same", len(mine), len(theirs))
        torch.eq(mine.unsqueeze(1), theirs, out=same)
        return (Rectangle(r, c, same),)


class Columns(Target):
    """The same columns are the positives of every query: anchors that are pulled towards a chosen set.

    >>> Columns(2, 6, slice(4, 6)).patches(slice(0, 2), slice(3, 6))[0].columns
    slice(1, 3, None)
    """

    binary = True
    single = symmetric = False

    def __init__(self, n: int, m: int, positives: slice) -> None:
        self.shape, self.positives = (n, m), positives

    def turned(self) -> Target:
        raise NearfarError("a chosen set of columns is a target of one direction only")

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        count = max(0, self.positives.stop - self.positives.start)
        own = torch.arange(self.shape[0])
        inside = (own >= self.positives.start) & (own < self.positives.stop)
        return count - (inside & without_self).int() > 0

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        first, last = max(columns.start, self.positives.start), min(columns.stop, self.positives.stop)
        if first >= last:
            return ()
        return (
            Rectangle(slice(0, rows.stop - rows.start), slice(first - columns.start, last - columns.start)),
        )


class Nobody(Target):
    """No positives at all: further candidates, such as a memory of earlier batches."""

    binary = single = True
    symmetric = False

    def __init__(self, n: int, m: int) -> None:
        self.shape = (n, m)

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        return ()

    def turned(self) -> Nobody:
        return Nobody(self.shape[1], self.shape[0])

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        return torch.zeros(self.shape[0], dtype=torch.bool)


def _without_self(row: Tensor, column: Tensor, rows: slice, without_self: bool) -> tuple[Tensor, Tensor]:
    if not without_self:
        return row, column
    others = row + rows.start != column
    return row[others], column[others]


def _ascending(labels: Tensor) -> bool:
    return bool((labels[1:] >= labels[:-1]).all())
