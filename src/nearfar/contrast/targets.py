"""Targets: which keys are the positives of each query, tile by tile, and what each positive weighs.

A target answers one question of the kernel: which positions of this tile are positives, and with what weight? What it
needs to know of the whole batch it keeps in O(batch). Weights need not add up to 1; the kernel normalises them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfar.contrast.numerics import full_precision
from nearfar.contrast.positives import Diagonal, Entries, Patch, Rectangle, Workspace, buffer_for
from nearfar.errors import NearfarError

__all__ = [
    "Columns",
    "LabelOverlap",
    "NoPositives",
    "OwnPair",
    "SameClass",
    "SparseWeights",
    "Target",
    "Weights",
]


class Target(Protocol):
    """Who belongs to whom, and how much: what the kernel asks of a target.

    A target of one's own derives from it, sets ``shape`` (queries, keys) and writes ``patches``; the rest has defaults.
    The flags promise more, and make it faster. ``binary``: all weights are equal. ``single``: each query has at most
    one positive. ``symmetric``: for queries that are their own keys, i weighs for j what j weighs for i.
    docs/losses.md has an example.
    """

    shape: tuple[int, int]
    binary: bool = False
    single: bool = False
    symmetric: bool = False
    #: whether every query is sure to have a positive, where itself counts as one
    every_row_has_positive: bool = False
    #: up to so many pairs, the matrix of all weights is quicker than a walk over tiles
    dense_limit: int = 1 << 20

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        """The positives among these rows and columns, in coordinates of the tile: usually one ``Rectangle`` with a new
        tensor of weights, 0 where there is no positive. ``space`` lends buffers for them."""

    def entries(self, rows: slice, both: bool) -> Entries | None:
        """Positives of these rows that stand alone and are in no patch, rows counted from the first of them; with
        ``both`` also those of the columns as queries."""
        return None

    def dense(self, like: Tensor) -> Float[Tensor, "n m"]:
        """All weights, 0 where there is no positive, as numbers like ``like`` of its own memory: for few rows."""
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

    def _like(self) -> Tensor:
        """No numbers, of the device where the weights are and as wide as they are."""
        n, m = self.shape
        known = [each.weight for each in self.patches(slice(0, n), slice(0, m)) if each.weight is not None]
        return known[0].new_empty(0) if known else torch.empty(0, dtype=torch.float64)

    def transposed(self) -> Target:
        """The target of the columns as queries, which a loss of both directions needs."""
        raise NearfarError(
            f"{type(self).__name__} has one direction only: write transposed(), the target with the keys as queries"
        )

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        """Which queries have a positive, itself not counted where ``without_self``. The default looks at all pairs."""
        weight = self.dense(self._like())
        if without_self:
            weight = weight.clone().fill_diagonal_(0.0)
        return (weight > 0).any(1)

    def listed(
        self, rows: slice, without_self: bool
    ) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"], Float[Tensor, " p"]]:
        """All positives of these rows: row, counted from the first of them, column, and weight."""
        weight = self.dense(self._like())[rows]
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

    def transposed(self) -> OwnPair:
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
        for given, name in ((labels, "labels"), (key_labels, "key_labels")):
            if given.ndim != 1 or given.dtype.is_floating_point or given.dtype.is_complex:
                raise NearfarError(
                    f"{name} are {tuple(given.shape)} {given.dtype}; one whole number for each row is needed"
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

    @property
    def _compared(self) -> tuple[Tensor, Tensor]:
        """What is compared pair by pair. On a device the labels themselves: to number the classes, the host would wait
        for it."""
        on_cpu = self._given[0].device.type == "cpu"
        return self._codes if on_cpu else self._given

    @cached_property
    def _ordered(self) -> bool:
        """On a device, knowing the ranges would mean waiting for it at every tile."""
        return self._given[0].device.type == "cpu" and all(map(_ascending, self._classes))

    def transposed(self) -> SameClass:
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
        mine, theirs = self._compared[0][rows], self._compared[1][columns]
        r, c = slice(0, len(mine)), slice(0, len(theirs))
        if self._ordered:
            labels, key_labels = self._classes[0][rows], self._classes[1][columns]
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
        mine, theirs = mine[r], theirs[c]
        like = mine if mine.is_floating_point() or space is None else mine.new_empty(0, dtype=space.dtype)
        like = like if like.is_floating_point() else like.float()
        same = buffer_for(space, like, "same", len(mine), len(theirs))
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

    def transposed(self) -> Target:
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


class NoPositives(Target):
    """No positives at all: further candidates, such as a memory of earlier batches."""

    binary = single = True
    symmetric = False

    def __init__(self, n: int, m: int) -> None:
        self.shape = (n, m)

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        return ()

    def transposed(self) -> NoPositives:
        return NoPositives(self.shape[1], self.shape[0])

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        return torch.zeros(self.shape[0], dtype=torch.bool)


def _without_self(row: Tensor, column: Tensor, rows: slice, without_self: bool) -> tuple[Tensor, Tensor]:
    if not without_self:
        return row, column
    others = row + rows.start != column
    return row[others], column[others]


def _ascending(labels: Tensor) -> bool:
    return bool((labels[1:] >= labels[:-1]).all())


class LabelOverlap(Target):
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
        dtype = labels.dtype if labels.dtype.is_floating_point else torch.float32
        self._rows, self._jaccard, self._offset = labels.to(dtype), jaccard, offset
        self._sizes = self._rows.sum(1).clamp_(min=1e-3)  # rows without labels: 0 / 0
        self.symmetric = True

    def transposed(self) -> LabelOverlap:
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
        weight = buffer_for(space, mine, "overlap", len(mine), len(theirs))
        with full_precision(mine.device):
            torch.mm(mine, theirs.T, out=weight)
        if self._jaccard:
            union = buffer_for(space, mine, "union", len(mine), len(theirs))
            torch.add(self._sizes[rows, None], self._sizes[None, columns], out=union).sub_(weight)
            weight.div_(union)
        elif self._offset:
            weight.add_(self._offset)
        return (Rectangle(slice(0, weight.shape[0]), slice(0, weight.shape[1]), weight),)

    def dense(self, like: Tensor) -> Float[Tensor, "n n"]:
        with full_precision(like.device):
            weight = torch.mm(self._rows, self._rows.T)
        if self._jaccard:
            weight /= (self._sizes.unsqueeze(1) + self._sizes).sub_(weight)
        elif self._offset:
            weight += self._offset
        return weight.to(like.dtype)


class SparseWeights(Target):
    """A few weighted positives for each row: spatial neighbours, mined positives.

    ``index`` (n, k) holds columns, -1 for none; ``weight`` (n, k) what they weigh, 0 or more. An entry named twice
    weighs the sum, or ``most`` if that is less; ``own`` is added to what column i weighs for row i. For both
    directions of a pair of views, column i has the positives of row i (``weight_back``). ``checked``: the caller has
    looked at the ranges already, ``complete``: and has seen no -1.

    >>> target = SparseWeights(torch.tensor([[1], [-1]]), torch.tensor([[0.5], [0.5]]), m=2)
    >>> entries = target.entries(slice(0, 2), both=True)
    >>> entries.row.tolist(), entries.column.tolist(), entries.weight.tolist(), entries.weight_back.tolist()
    ([0, 1], [1, 0], [0.5, 0.0], [0.0, 0.5])
    """

    binary = single = symmetric = False
    dense_limit = 1 << 17  # most of the matrix is 0, and a walk over tiles does nothing for that

    def __init__(
        self,
        index: Int[Tensor, "n k"],
        weight: Float[Tensor, "n k"],
        m: int,
        most: float | None = None,
        own: float = 0.0,
        checked: bool = False,
        complete: bool = False,
    ) -> None:
        self.shape = (len(index), m)
        self.every_row_has_positive = own > 0 and len(index) <= m
        if index.device.type == "cpu" and index.numel() and not checked:
            if int(index.max()) >= m:
                raise NearfarError(
                    f"index holds {int(index.max())}, but there are {m} columns; -1 stands for none"
                )
            if not weight.amin().item() >= 0:  # nor is NaN
                raise NearfarError(
                    "weight must be numbers that are 0 or more; some are below 0 or not a number"
                )
        self._index, self._weight, self._most, self._own = index, weight.detach(), most, own
        self._complete = complete

    def transposed(self) -> SparseWeights:
        if self.shape[0] != self.shape[1]:
            raise NearfarError(
                f"sparse weights of {self.shape} pairs have no second direction: it takes as many keys"
            )
        return self  # by definition, see above

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        own = torch.arange(self.shape[0], device=self._index.device)
        present = (
            (self._index >= 0) & (self._weight > 0) & ~(without_self & (self._index == own.unsqueeze(1)))
        )
        return present.any(1) | ((own < self.shape[1]) & (self._own > 0 and not without_self))

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        return ()

    def entries(self, rows: slice, both: bool) -> Entries:
        n, m = self.shape
        each = torch.arange(n, device=self._index.device)
        present = (self._index >= 0) & (self._weight > 0)
        row, column = each.unsqueeze(1).expand_as(self._index)[present], self._index[present].long()
        value = self._weight[present]
        if self._own > 0:
            each = each[:m]
            row, column = torch.cat([each, row]), torch.cat([each, column])
            value = torch.cat([torch.full_like(each, self._own, dtype=value.dtype), value])
        if not both:
            ahead = (row >= rows.start) & (row < rows.stop)
            row, column, value = row[ahead] - rows.start, column[ahead], value[ahead]
            keys, where = torch.unique(row * m + column, return_inverse=True)
            return Entries(keys // m, keys % m, (rows.stop - rows.start, m), self._sum(keys, where, value))
        # One pass scores both directions, so that an entry of one of them stands in the list of both.
        keys, where = torch.unique(torch.cat([row * m + column, column * m + row]), return_inverse=True)
        weight, back = (self._sum(keys, part, value) for part in where.split(len(value)))
        return Entries(keys // m, keys % m, (n, m), weight, back)

    def dense(self, like: Tensor) -> Float[Tensor, "n m"]:
        matrix = torch.zeros(self.shape, dtype=like.dtype, device=like.device)
        if self._complete:
            matrix.scatter_add_(1, self._index.long(), self._weight.to(like.dtype))
        else:
            weight = self._weight * (self._index >= 0)
            matrix.scatter_add_(1, self._index.clamp(min=0).long(), weight.to(like.dtype))
        if self._own > 0:
            matrix.diagonal().add_(self._own)
        return matrix if self._most is None else matrix.clamp_(max=self._most)

    def _sum(self, keys: Tensor, where: Tensor, value: Tensor) -> Tensor:
        summed = value.new_zeros(len(keys)).index_add_(0, where, value)
        return summed if self._most is None else summed.clamp_(max=self._most)


class Weights(Target):
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

    def transposed(self) -> Weights:
        return Weights(self.matrix.T)

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        present = self.matrix > 0
        if without_self:
            present = present.clone().fill_diagonal_(False)
        return present.any(1)

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        weight = self.matrix[rows, columns]
        return (Rectangle(slice(0, weight.shape[0]), slice(0, weight.shape[1]), weight),)

    def dense(self, like: Tensor) -> Float[Tensor, "n m"]:
        return self.matrix.to(like, copy=True)
