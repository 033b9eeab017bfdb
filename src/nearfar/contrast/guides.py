"""Negatives judged by a guide: scores of a second, frozen model, compared with those of each query's own positive.

A fixed threshold leaves out what is similar; a guide leaves out what is as good an answer as the positive is, to this
query. So its masks differ between the directions: query i of the first is compared with the score of its own pair,
and so is key j as a query of the second.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfar.arguments import choice, number
from nearfar.contrast.masks import ROUNDING, Mask, as_mask, join_masks
from nearfar.contrast.numerics import unit_rows
from nearfar.errors import NearfarError

__all__ = ["MARGINS", "GuideMask", "NegativeWeights", "guide_threshold"]

MARGINS = ("absolute", "relative")


def guide_threshold(
    own: Float[Tensor, " n"], margin: float = 0.0, kind: Literal["absolute", "relative"] = "absolute"
) -> Float[Tensor, " n"]:
    """From which score on a negative is too good, given the score of the own positive.

    "absolute": own - margin. "relative": own - margin · |own|, which lies below the positive also where scores are
    negative; own · (1 - margin) would lie above it there, and leave true negatives in alone.

    >>> guide_threshold(torch.tensor([0.8, -0.5]), 0.1, "relative")
    tensor([ 0.7200, -0.5500])
    """
    return own - margin * own.abs() if kind == "relative" else own - margin


class GuideMask:
    """Leaves out a negative whose score by a guide reaches that of the query's own positive (GISTEmbed, Solatorio 2024,
    arXiv:2402.16829).

    Query i and key j are left out where g_ij ≥ g_ii - margin, g being the cosines of the guide's vectors of queries
    (n, g) and of keys (m, g); row i of both is a pair, and further keys are negatives of all. ``margin`` above 0 also
    leaves out what is nearly as good, below 0 it spares what is hardly better. ``kind="relative"`` takes it as a share
    of the positive's score (see ``guide_threshold``).

    With ``softness`` above 0 nothing is left out; a negative counts by the weight
    sigmoid((g_ii - margin - g_ij) / softness), a half at the threshold. Towards softness 0 that is the mask.

    Directed: with the keys as queries, j is compared with its own pair's score. ``keys=None``: the queries are the
    keys, and each row's own positive has cosine 1.

    >>> queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> guide = GuideMask(queries, torch.tensor([[0.8, 0.6], [1.0, 0.0]]))  # key 1 answers query 0 better than key 0
    >>> guide.tile(slice(0, 1), slice(0, 2)), guide.tile(slice(1, 2), slice(0, 2))
    (tensor([[True, True]]), tensor([[True, True]]))
    >>> guide.transposed().tile(slice(0, 1), slice(0, 2))  # of key 0 as a query, query 1 is a negative
    tensor([[ True, False]])
    """

    symmetric = False
    directed = True

    def __init__(
        self,
        queries: Float[Tensor, "n g"],
        keys: Float[Tensor, "m g"] | None = None,
        margin: float = 0.0,
        kind: Literal["absolute", "relative"] = "absolute",
        softness: float = 0.0,
    ) -> None:
        keys = queries if keys is None else keys
        for name, vectors in (("queries", queries), ("keys", keys)):
            if not isinstance(vectors, Tensor) or vectors.ndim != 2 or vectors.is_complex():
                what = tuple(vectors.shape) if isinstance(vectors, Tensor) else f"a {type(vectors).__name__}"
                raise NearfarError(
                    f"{name}, the guide's vectors, is {what}; the mask takes a tensor (rows, dimensions)"
                )
        if queries.shape[1] != keys.shape[1] or len(keys) < len(queries):
            raise NearfarError(
                f"the guide's vectors of queries are {tuple(queries.shape)} and of keys {tuple(keys.shape)}; row i of "
                "both is a pair, and both have the same number of columns"
            )
        choice("kind", kind, MARGINS)
        self.margin, self.kind = number("margin", margin), kind
        self.softness = number("softness", softness, 0.0)
        wide = torch.promote_types(queries.dtype, torch.float32)
        self._queries, self._keys = (unit_rows(x.detach().to(wide)) for x in (queries, keys))
        self._prepare()

    def _prepare(self) -> None:
        self.shape = (len(self._queries), len(self._keys))
        self.soft = self.softness > 0
        with torch.autocast(self._queries.device.type, enabled=False):
            own = (self._queries * self._keys[: len(self._queries)]).sum(1)
        self.threshold = guide_threshold(own, self.margin, self.kind)

    def _above(self, rows: slice, columns: slice) -> Float[Tensor, "r c"]:
        with torch.autocast(self._queries.device.type, enabled=False):
            return self._queries[rows] @ self._keys[columns].T - self.threshold[rows].unsqueeze(1)

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        above = self._above(rows, columns)
        return torch.zeros_like(above, dtype=torch.bool) if self.soft else above >= -ROUNDING

    def weights(self, rows: slice, columns: slice) -> Float[Tensor, "r c"]:
        """By how much each pair counts as a negative, 0 to 1."""
        above = self._above(rows, columns)
        return torch.sigmoid(above / -self.softness) if self.soft else (above < -ROUNDING).to(above)

    def transposed(self) -> GuideMask:
        """Of the keys as queries; they need a partner each."""
        if self.shape[0] != self.shape[1]:
            raise NearfarError(
                f"a guide of {self.shape[0]} queries and {self.shape[1]} keys: keys beyond the queries have no pair of "
                "their own to be compared with; symmetric=False is for one direction"
            )
        turned = GuideMask.__new__(GuideMask)
        turned.margin, turned.kind, turned.softness = self.margin, self.kind, self.softness
        turned._queries, turned._keys = self._keys, self._queries
        turned._prepare()
        return turned

    def beyond(self, others: Float[Tensor, "n k g"]) -> NegativeWeights:
        """The same of further negatives, k for each query, by the guide's vectors of them."""
        with torch.autocast(self._queries.device.type, enabled=False):
            unit = torch.nn.functional.normalize(others.detach().to(self._queries), dim=-1)
            above = torch.einsum("nd,nkd->nk", self._queries, unit) - self.threshold.unsqueeze(1)
        weights = torch.sigmoid(above / -self.softness) if self.soft else (above < -ROUNDING).to(above)
        return NegativeWeights(weights)

    def __or__(self, other: Mask | Tensor) -> Mask:
        joined = join_masks([self, as_mask(other)])
        assert joined is not None
        return joined

    __ror__ = __or__


class NegativeWeights:
    """By how much each pair counts as a negative: a matrix (queries, keys) of numbers from 0, left out, to 1.

    The sum over negatives is Σ_j w_ij exp(s_ij) then. Positives count in full whatever stands at their place.
    ``back`` (queries, keys) are the weights of the same pairs for the keys as queries, where they are not the same.

    >>> half = NegativeWeights(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    >>> half.weights(slice(0, 2), slice(1, 2)), half.tile(slice(0, 2), slice(0, 1))
    (tensor([[0.5000],
            [1.0000]]), tensor([[False],
            [ True]]))
    """

    symmetric = False
    soft = True

    def __init__(self, matrix: Float[Tensor, "n m"], back: Float[Tensor, "n m"] | None = None) -> None:
        for name, weights in (("matrix", matrix), ("back", matrix if back is None else back)):
            if not isinstance(weights, Tensor) or weights.ndim != 2 or not weights.is_floating_point():
                what = (
                    f"{tuple(weights.shape)} {weights.dtype}"
                    if isinstance(weights, Tensor)
                    else f"a {type(weights).__name__}"
                )
                raise NearfarError(f"{name} is {what}; a matrix of numbers (queries, keys) is needed")
            if weights.device.type == "cpu" and not bool(((weights >= 0) & (weights <= 1)).all()):
                raise NearfarError(
                    f"{name} must be numbers from 0 (left out) to 1 (a negative in full); some are not"
                )
        if back is not None and back.shape != matrix.shape:
            raise NearfarError(
                f"back is {tuple(back.shape)} and matrix {tuple(matrix.shape)}; both need one shape"
            )
        self.shape, self._matrix = (matrix.shape[0], matrix.shape[1]), matrix.detach()
        self._back = None if back is None else back.detach()
        self.directed = back is not None

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        return self._matrix[rows, columns] == 0

    def weights(self, rows: slice, columns: slice) -> Float[Tensor, "r c"]:
        """Those of some rows and columns."""
        return self._matrix[rows, columns]

    def transposed(self) -> NegativeWeights:
        """Of the keys as queries."""
        if self._back is None:
            return NegativeWeights(self._matrix.T)
        return NegativeWeights(self._back.T, self._matrix.T)

    def __or__(self, other: Mask | Tensor) -> Mask:
        joined = join_masks([self, as_mask(other)])
        assert joined is not None
        return joined

    __ror__ = __or__
