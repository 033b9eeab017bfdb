"""Who belongs to whom: the positives of every query, tile by tile.

A target answers one question of the kernel: which positions of this tile are positives, and what do they weigh? What
it needs to know of the whole batch it keeps in O(batch). Weights need not add up to 1; the kernel does that.

``binary``: all weights are equal. ``single``: each query has at most one positive. ``symmetric``: for queries that are
their own keys, i weighs for j what j weighs for i. ``turned`` is the target of the keys as queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfar.contrast.patches import Diagonal, Entries, Patch, Rectangle
from nearfar.contrast.precision import full_precision
from nearfar.contrast.workspace import Workspace
from nearfar.errors import NearfarError

__all__ = ["Columns", "LabelOverlap", "Nobody", "OwnPair", "SameClass", "SparseWeights", "Target", "Weights"]


class Target(Protocol):
    """What the kernel asks of a target."""

    shape: tuple[int, int]
    binary: bool
    single: bool
    symmetric: bool

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        """The positives among these rows and columns, in coordinates of the tile; ``space`` lends buffers for
        weights."""

    def turned(self) -> Target:
        """The target of the columns as queries."""

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        """Which queries have a positive, itself not counted where ``without_self``."""


class OwnPair:
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


class SameClass:
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
        # Numbers of the classes, in their order: of any type of label, there is one after the last.
        every = labels if self.symmetric else torch.cat([labels, key_labels])
        codes = torch.unique(every, return_inverse=True)[1]
        self.labels = codes[: len(labels)]
        self.key_labels = self.labels if self.symmetric else codes[len(labels) :]
        # On a device, knowing the ranges would mean waiting for it at every tile.
        self._ordered = (
            labels.device.type == "cpu" and _ascending(self.labels) and _ascending(self.key_labels)
        )
        # As floats, exact up to 16 million classes, they compare into floats, and quickly.
        self._codes = self.labels.float()
        self._key_codes = self._codes if self.symmetric else self.key_labels.float()

    def turned(self) -> SameClass:
        return SameClass(self.key_labels, self.labels)

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        classes, counts = torch.unique(self.key_labels, return_counts=True)
        where = torch.searchsorted(classes, self.labels).clamp(max=len(classes) - 1)
        return (classes[where] == self.labels) & (counts[where] > int(without_self))

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        labels, key_labels = self.labels[rows], self.key_labels[columns]
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
        mine, theirs = self._codes[rows][r], self._key_codes[columns][c]
        same = _room(space, mine, "same", len(mine), len(theirs))
        torch.eq(mine.unsqueeze(1), theirs, out=same)
        return (Rectangle(r, c, same),)


class LabelOverlap:
    """Positives weigh what their labels have in common.

    ``jaccard`` (default): labels of both / labels of either, for multi-hot rows (n, labels). Otherwise the dot
    product of the rows plus ``offset``, for rules that are sums over labels.

    >>> labels = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    >>> LabelOverlap(labels).patches(slice(0, 1), slice(0, 3))[0].weight
    tensor([[1.0000, 0.5000, 0.0000]])
    """

    binary = single = False

    def __init__(
        self, labels: Float[Tensor, "n labels"], *, jaccard: bool = True, offset: float = 0.0
    ) -> None:
        if labels.ndim != 2:
            raise NearfarError(f"labels are {tuple(labels.shape)}; a matrix (rows, labels) is needed")
        self.shape = (len(labels), len(labels))
        self._rows, self._jaccard, self._offset = labels.to(torch.float32), jaccard, offset
        self._sizes = self._rows.sum(1)
        self.symmetric = True

    def turned(self) -> LabelOverlap:
        return self

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        if not self._jaccard and self._offset > 0:
            return torch.full(
                (len(self._rows),), len(self._rows) > int(without_self), device=self._rows.device
            )
        shared = (self._rows > 0).sum(0) > int(without_self)
        return ((self._rows > 0) & shared).any(1)

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        mine, theirs = self._rows[rows], self._rows[columns]
        weight = _room(space, mine, "overlap", len(mine), len(theirs))
        with full_precision(mine.device):
            torch.mm(mine, theirs.T, out=weight)
        if self._jaccard:
            union = _room(space, mine, "union", len(mine), len(theirs))
            torch.add(self._sizes[rows, None], self._sizes[None, columns], out=union).sub_(weight)
            weight.div_(union.clamp_(min=1e-3))  # rows without labels: 0 / 0
        elif self._offset:
            weight.add_(self._offset)
        return (Rectangle(slice(0, weight.shape[0]), slice(0, weight.shape[1]), weight),)


class SparseWeights:
    """A few weighted positives for each row: spatial neighbours, mined positives.

    ``index`` (n, k) holds columns, -1 for none; ``weight`` (n, k) what they weigh, 0 or more. An entry named twice
    weighs the sum, or ``most`` if that is less. For both directions of a pair of views, column i has the positives of
    row i (``weight_back``).

    >>> target = SparseWeights(torch.tensor([[1], [-1]]), torch.tensor([[0.5], [0.5]]), m=2)
    >>> patch = target.patches(slice(0, 2), slice(0, 2))[0]
    >>> patch.row.tolist(), patch.column.tolist(), patch.weight.tolist(), patch.weight_back.tolist()
    ([0, 1], [1, 0], [0.5, 0.0], [0.0, 0.5])
    """

    binary = single = False

    def __init__(
        self, index: Int[Tensor, "n k"], weight: Float[Tensor, "n k"], m: int, most: float | None = None
    ) -> None:
        n = len(index)
        self.shape = (n, m)
        if index.device.type == "cpu" and index.numel():
            if int(index.max()) >= m:
                raise NearfarError(
                    f"index holds {int(index.max())}, but there are {m} columns; -1 stands for none"
                )
            if not bool((weight >= 0).all()):
                raise NearfarError(
                    "weight must be numbers that are 0 or more; some are below 0 or not a number"
                )
        # One pass scores both directions, so that an entry of one of them stands in the list of both.
        row = torch.arange(n, device=index.device).unsqueeze(1).expand_as(index)
        there = (index >= 0) & (weight > 0)
        row, column, value = row[there], index[there].long(), weight[there].detach().to(torch.float32)
        # With more keys than queries, or fewer, some point back to nobody.
        backward = (column < n) & (row < m)
        positions = torch.cat([row * m + column, (column * m + row)[backward]])
        keys, where = torch.unique(positions, return_inverse=True)
        ahead, back = where[: len(value)], where[len(value) :]
        self._row, self._column = keys // m, keys % m
        self._weight = value.new_zeros(len(keys)).index_add_(0, ahead, value)
        self._back = value.new_zeros(len(keys)).index_add_(0, back, value[backward])
        if most is not None:
            self._weight, self._back = self._weight.clamp(max=most), self._back.clamp(max=most)
        self._starts = torch.searchsorted(self._row, torch.arange(n + 1, device=row.device)).tolist()
        self.symmetric = n == m

    def turned(self) -> SparseWeights:
        if not self.symmetric:
            raise NearfarError(
                f"sparse weights of {self.shape} pairs have no second direction: it takes as many keys"
            )
        return self  # by definition, see above

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        there = (self._weight > 0) & ~(without_self & (self._row == self._column))
        return torch.zeros(self.shape[0], device=there.device).index_add_(0, self._row, there.float()) > 0

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        part = slice(self._starts[rows.start], self._starts[rows.stop])
        column = self._column[part]
        here = ((column >= columns.start) & (column < columns.stop)).nonzero().squeeze(1)
        if not len(here):
            return ()
        return (
            Entries(
                self._row[part][here] - rows.start,
                column[here] - columns.start,
                (rows.stop - rows.start, columns.stop - columns.start),
                self._weight[part][here],
                self._back[part][here],
            ),
        )


class Columns:
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


class Nobody:
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


class Weights:
    """Any weights: a matrix (n, m) of numbers that are 0 or more. The only target that stores all pairs.

    The columns as queries have the weights of the transposed matrix.

    >>> Weights(torch.eye(2)).patches(slice(0, 1), slice(0, 2))[0].weight
    tensor([[1., 0.]])
    """

    binary = single = symmetric = False

    def __init__(self, matrix: Float[Tensor, "n m"]) -> None:
        if matrix.ndim != 2:
            raise NearfarError(f"weights are {tuple(matrix.shape)}; a matrix (queries, keys) is needed")
        if matrix.device.type == "cpu" and not bool((matrix >= 0).all()):
            raise NearfarError("weights must be numbers that are 0 or more; some are below 0 or not a number")
        self.shape, self.matrix = (matrix.shape[0], matrix.shape[1]), matrix.detach()

    def turned(self) -> Weights:
        return Weights(self.matrix.T)

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        there = self.matrix > 0
        if without_self:
            there = there.clone().fill_diagonal_(False)
        return there.any(1)

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        weight = self.matrix[rows, columns]
        return (Rectangle(slice(0, weight.shape[0]), slice(0, weight.shape[1]), weight),)


def _room(space: Workspace | None, like: Tensor, name: str, rows: int, columns: int) -> Tensor:
    # Buffers have the dtype of the embeddings, which may be float64.
    return (
        like.new_empty(rows, columns)
        if space is None or space.dtype != like.dtype
        else space(name, rows, columns)
    )


def _ascending(labels: Tensor) -> bool:
    return bool((labels[1:] >= labels[:-1]).all())
