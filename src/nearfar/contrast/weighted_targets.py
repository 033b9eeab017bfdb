"""Targets whose positives weigh differently: labels in common, sparse neighbours, any matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfar.contrast.patches import Entries, Patch, Rectangle
from nearfar.contrast.precision import full_precision
from nearfar.contrast.targets import Target
from nearfar.contrast.workspace import Workspace, room_for
from nearfar.errors import NearfarError

__all__ = ["LabelOverlap", "SparseWeights", "Weights"]


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
        weight = room_for(space, mine, "overlap", len(mine), len(theirs))
        with full_precision(mine.device):
            torch.mm(mine, theirs.T, out=weight)
        if self._jaccard:
            union = room_for(space, mine, "union", len(mine), len(theirs))
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
    directions of a pair of views, column i has the positives of row i (``weight_back``). ``checked``: somebody has
    looked at the ranges already, ``complete``: and has seen no -1.

    >>> target = SparseWeights(torch.tensor([[1], [-1]]), torch.tensor([[0.5], [0.5]]), m=2)
    >>> found = target.entries(slice(0, 2), both=True)
    >>> found.row.tolist(), found.column.tolist(), found.weight.tolist(), found.weight_back.tolist()
    ([0, 1], [1, 0], [0.5, 0.0], [0.0, 0.5])
    """

    binary = single = symmetric = False
    few_pairs = 1 << 17  # most of the matrix is 0, and a walk over tiles does nothing for that

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
        self.everybody = own > 0 and len(index) <= m
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

    def turned(self) -> SparseWeights:
        if self.shape[0] != self.shape[1]:
            raise NearfarError(
                f"sparse weights of {self.shape} pairs have no second direction: it takes as many keys"
            )
        return self  # by definition, see above

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        own = torch.arange(self.shape[0], device=self._index.device)
        there = (self._index >= 0) & (self._weight > 0) & ~(without_self & (self._index == own.unsqueeze(1)))
        return there.any(1) | ((own < self.shape[1]) & (self._own > 0 and not without_self))

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        return ()

    def entries(self, rows: slice, both: bool) -> Entries:
        n, m = self.shape
        each = torch.arange(n, device=self._index.device)
        there = (self._index >= 0) & (self._weight > 0)
        row, column = each.unsqueeze(1).expand_as(self._index)[there], self._index[there].long()
        value = self._weight[there]
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
        found = value.new_zeros(len(keys)).index_add_(0, where, value)
        return found if self._most is None else found.clamp_(max=self._most)


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

    def dense(self, like: Tensor) -> Float[Tensor, "n m"]:
        return self.matrix.to(like, copy=True)
