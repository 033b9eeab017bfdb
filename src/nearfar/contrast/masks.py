"""Candidates that are left out, or count less, tile by tile: no matrix of all pairs is stored.

A mask is true where a pair is *left out* of the candidates. Positives always stay in. Masks join with ``|``.

Two things more a mask may say of itself, and the plain ones do not. ``directed``: what it leaves out depends on who
asks; ``tile`` is about the queries in its rows, and ``transposed()`` gives the mask of the keys as queries. ``soft``:
``weights(rows, columns)`` gives numbers from 0 to 1 by which the negatives that are left in count. Both are in
``nearfar.contrast.guides``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfar.arguments import number
from nearfar.contrast.numerics import unit_rows
from nearfar.errors import NearfarError
from nearfar.labels import apart, whole_labels

__all__ = [
    "DenseMask",
    "DuplicateMask",
    "IndexMask",
    "Mask",
    "PairMask",
    "SimilarityMask",
    "as_mask",
    "checked_mask",
    "is_directed",
    "is_soft",
    "join_masks",
    "joined_parts",
    "mask_weights",
    "transposed_mask",
]

# The cosine of a row with its own copy misses 1 by a few roundings of float32.
ROUNDING = 1e-6


class Mask(Protocol):
    """Pairs (query, key) that are no candidates."""

    shape: tuple[int, int]
    symmetric: bool  # (i, j) is left out exactly where (j, i) is

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        """True where a pair of these rows and columns is left out."""


class _Joined:
    """What one mask or the other leaves out."""

    def __init__(self, one: Mask, other: Mask) -> None:
        if one.shape != other.shape:
            raise NearfarError(f"masks of {one.shape} and {other.shape} pairs cannot be joined")
        self.shape, self.parts = one.shape, (one, other)
        self.symmetric = one.symmetric and other.symmetric
        self.directed, self.soft = is_directed(one) or is_directed(other), is_soft(one) or is_soft(other)

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        one, other = (part.tile(rows, columns) for part in self.parts)
        return one | other

    def weights(self, rows: slice, columns: slice) -> Float[Tensor, "r c"]:
        """The product of what both say; 0 where one of them leaves a pair out."""
        one, other = (mask_weights(part, rows, columns) for part in self.parts)
        return one * other

    def transposed(self) -> _Joined:
        one, other = (transposed_mask(part) for part in self.parts)
        return _Joined(one, other)

    def __or__(self, other: Mask | Tensor) -> _Joined:
        return _Joined(self, as_mask(other))

    __ror__ = __or__


class DenseMask:
    """A matrix that is there already.

    >>> DenseMask(torch.eye(3, dtype=torch.bool)).tile(slice(0, 2), slice(1, 3))
    tensor([[False, False],
            [ True, False]])
    """

    symmetric = False  # may be so, but looking costs more than it saves

    def __init__(self, matrix: Bool[Tensor, "n m"], name: str = "mask") -> None:
        if matrix.ndim != 2 or matrix.dtype != torch.bool:
            raise NearfarError(
                f"{name} is {tuple(matrix.shape)} {matrix.dtype}; it takes a Boolean matrix (queries, keys), true "
                "where a pair is left out"
            )
        self.shape, self._matrix = (matrix.shape[0], matrix.shape[1]), matrix

    @property
    def matrix(self) -> Bool[Tensor, "n m"]:
        """All of it."""
        return self._matrix

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        return self._matrix[rows, columns]

    def __or__(self, other: Mask | Tensor) -> _Joined:
        return _Joined(self, as_mask(other))

    __ror__ = __or__


class DuplicateMask:
    """Leaves out pairs of equal labels, such as the ids of their texts; ``key_labels`` if the keys have others.

    A missing label (−1, NaN) is equal to no other, so that its row stays a negative.

    >>> DuplicateMask(torch.tensor([7, 3, 7])).tile(slice(0, 1), slice(0, 3))
    tensor([[ True, False,  True]])
    """

    def __init__(self, labels: Int[Tensor, " n"], key_labels: Int[Tensor, " m"] | None = None) -> None:
        key_labels = labels if key_labels is None else key_labels
        given = {"labels": whole_labels(labels), "key_labels": whole_labels(key_labels, "key_labels")}
        for name, values in given.items():
            if values.ndim != 1:
                raise NearfarError(
                    f"{name} have shape {tuple(values.shape)}; the mask takes one for each row"
                )
        self.shape = (len(labels), len(key_labels))
        self.symmetric = key_labels is labels
        self._labels = apart(given["labels"])
        self._key_labels = self._labels if self.symmetric else apart(given["key_labels"], len(labels))

    @property
    def numbers(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
        """A number for each query and each key, equal where a pair is left out."""
        return self._labels, self._key_labels

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        return self._labels[rows, None] == self._key_labels[None, columns]

    def __or__(self, other: Mask | Tensor) -> _Joined:
        return _Joined(self, as_mask(other))

    __ror__ = __or__


class SimilarityMask:
    """Leaves out pairs of a cosine of ``threshold`` or more between reference embeddings, such as frozen texts.

    >>> SimilarityMask(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), 0.9).tile(slice(0, 1), slice(0, 3))
    tensor([[ True,  True, False]])
    """

    symmetric = True

    def __init__(self, reference: Float[Tensor, "n d"], threshold: float = 0.95) -> None:
        if not isinstance(reference, Tensor) or reference.ndim != 2 or reference.is_complex():
            what = (
                tuple(reference.shape) if isinstance(reference, Tensor) else f"a {type(reference).__name__}"
            )
            raise NearfarError(
                f"reference, the text embeddings, is {what}; the mask takes a tensor (rows, dimensions)"
            )
        if not -1.0 <= number("threshold", threshold) <= 1.0:
            raise NearfarError(f"threshold is {threshold}, but it is a cosine: -1 to 1, usually 0.9 to 0.99")
        self.shape, self._threshold = (len(reference), len(reference)), threshold
        wide = torch.promote_types(reference.dtype, torch.float32)
        self._unit = unit_rows(reference.detach().to(wide))

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        with torch.autocast(self._unit.device.type, enabled=False):
            return self._unit[rows] @ self._unit[columns].T >= self._threshold - ROUNDING

    def __or__(self, other: Mask | Tensor) -> _Joined:
        return _Joined(self, as_mask(other))

    __ror__ = __or__


class IndexMask:
    """Leaves out the listed columns of each row, and the same pairs the other way round: spatial neighbours.

    ``index`` (n, k) holds positions in the batch, -1 for none.

    >>> IndexMask(torch.tensor([[1], [-1], [-1]])).tile(slice(0, 3), slice(0, 2))
    tensor([[False,  True],
            [ True, False],
            [False, False]])
    """

    symmetric = True

    def __init__(self, index: Int[Tensor, "n k"]) -> None:
        if (
            not isinstance(index, Tensor)
            or index.ndim != 2
            or index.is_floating_point()
            or index.is_complex()
        ):
            what = (
                f"{tuple(index.shape)} {index.dtype}"
                if isinstance(index, Tensor)
                else f"a {type(index).__name__}"
            )
            raise NearfarError(
                f"index is {what}; whole positions in the batch are needed, a tensor (rows, k)"
            )
        n = len(index)
        self.shape = (n, n)
        if index.device.type == "cpu" and index.numel() and int(index.max()) >= n:
            raise NearfarError(
                f"index holds {int(index.max())}, but there are {n} rows: it takes positions in the batch, -1 for none"
            )
        given = index >= 0
        row = torch.arange(n, device=index.device).unsqueeze(1).expand_as(index)[given]
        keys = torch.unique(torch.cat([row * n + index[given], index[given] * n + row]))
        self._row, self._column = keys // n, keys % n
        self._starts = torch.searchsorted(self._row, torch.arange(n + 1, device=index.device)).tolist()

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        part = slice(self._starts[rows.start], self._starts[rows.stop])
        row, column = self._row[part] - rows.start, self._column[part] - columns.start
        width = columns.stop - columns.start
        here = (column >= 0) & (column < width)
        out = torch.zeros(rows.stop - rows.start, width, dtype=torch.bool, device=row.device)
        out[row[here], column[here]] = True
        return out

    def __or__(self, other: Mask | Tensor) -> _Joined:
        return _Joined(self, as_mask(other))

    __ror__ = __or__


class PairMask:
    """Leaves out pairs of items that are listed, wherever both are in the batch: false negatives that somebody marked.

    ``items`` (n,) are numbers of the rows' items, ``others`` (n, k) the items that are no negatives of each row (-1:
    none); a pair that one of its items lists is left out for both.

    >>> mask = PairMask(torch.tensor([7, 8, 9]), torch.tensor([[9], [-1], [-1]]))
    >>> mask.tile(slice(0, 3), slice(0, 3)).long()
    tensor([[0, 0, 1],
            [0, 0, 0],
            [1, 0, 0]])
    """

    symmetric = True

    def __init__(self, items: Int[Tensor, " n"], others: Int[Tensor, "n k"]) -> None:
        for name, given in (("items", items), ("others", others)):
            if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
                what = given.dtype if isinstance(given, Tensor) else f"a {type(given).__name__}"
                raise NearfarError(f"{name} is {what}; a tensor of whole numbers of items is needed")
        if items.ndim != 1 or others.ndim != 2 or len(items) != len(others):
            raise NearfarError(
                f"items is {tuple(items.shape)} and others {tuple(others.shape)}; (n,) and (n, k) are expected"
            )
        self.shape = (len(items), len(items))
        self._items, self._others = items, others

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        forth, back = self._lists(rows, columns), self._lists(columns, rows)
        return forth | back.T

    def _lists(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        items = self._items[columns]
        listed = torch.zeros(len(self._others[rows]), len(items), dtype=torch.bool, device=items.device)
        for column in self._others[rows].T:  # no (r, k, c): lists are short, and tiles are not
            listed |= column[:, None] == items[None]
        return listed


class _TransposedMask:
    """A mask seen from the keys."""

    def __init__(self, mask: Mask) -> None:
        self.shape, self.symmetric, self._mask = (mask.shape[1], mask.shape[0]), mask.symmetric, mask

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        return self._mask.tile(columns, rows).T


def is_directed(mask: object) -> bool:
    """Whether a mask leaves out other pairs for the keys as queries than for the queries."""
    return bool(getattr(mask, "directed", False))


def is_soft(mask: object) -> bool:
    """Whether a mask has weights of the negatives that it leaves in."""
    return bool(getattr(mask, "soft", False))


def mask_weights(mask: Mask, rows: slice, columns: slice) -> Float[Tensor, "r c"]:
    """By how much each pair counts as a negative, from 0, left out, to 1."""
    if is_soft(mask):
        weights: Tensor = mask.weights(rows, columns)  # type: ignore[attr-defined]
        return weights
    return (~mask.tile(rows, columns)).to(torch.float32)


def transposed_mask(mask: Mask) -> Mask:
    """The mask of the keys as queries."""
    if is_directed(mask) or is_soft(mask):
        turned: Mask = mask.transposed()  # type: ignore[attr-defined]
        return turned
    return mask if mask.symmetric else _TransposedMask(mask)


def join_masks(masks: Sequence[Mask]) -> Mask | None:
    """What any of them leaves out; None where there are none."""
    joined: Mask | None = None
    for mask in masks:
        joined = mask if joined is None else _Joined(joined, mask)
    return joined


def joined_parts(mask: Mask) -> list[Mask]:
    """The masks that a mask joins; itself where it joins none.

    >>> len(joined_parts(DuplicateMask(torch.tensor([7, 3])) | torch.eye(2, dtype=torch.bool)))
    2
    """
    if not isinstance(mask, _Joined):
        return [mask]
    return [part for each in mask.parts for part in joined_parts(each)]


def checked_mask(mask: Mask | Tensor, n: int, m: int, name: str = "mask") -> Mask:
    """A mask for n queries and m keys; ``NearfarError``, which calls it ``name``, if it is for others."""
    mask = as_mask(mask, name)
    if tuple(mask.shape) != (n, m):
        raise NearfarError(
            f"{name} is for {mask.shape} pairs, but there are {(n, m)}; it is true where a pair is left out"
        )
    return mask


def as_mask(mask: Mask | Tensor, name: str = "mask") -> Mask:
    """A Boolean matrix as a mask; a mask as it is."""
    if isinstance(mask, Tensor):
        return DenseMask(mask, name)
    # NumPy's arrays and pandas' tables have shapes too, and even a method of the name.
    if not (hasattr(mask, "tile") and hasattr(mask, "symmetric")) or isinstance(mask, type):
        raise NearfarError(
            f"{name} is a {type(mask).__name__}; a Boolean tensor or a mask of nearfar.losses is needed, true where a "
            "pair is left out"
        )
    return mask
