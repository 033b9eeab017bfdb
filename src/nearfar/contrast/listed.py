"""Logits of a list of pairs, a part at a time: one dot product for each, or a tile of all where most are listed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.contrast.precision import full_precision, no_second_derivative

__all__ = ["listed_logits"]

#: numbers of a part: of the rows that are taken out for it, or of its tile
PART = 1 << 20
#: a product of all pairs costs as much as taking out so many of them
DENSE = 1 / 16


def listed_logits(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
    row: Int[Tensor, " p"],
    column: Int[Tensor, " p"],
) -> Float[Tensor, " p"]:
    """``queries[row[k]] · keys[column[k]]`` for each k; ``row`` ascends, and no pair is named twice.

    Memory is O(pairs), not O(pairs · dimensions).

    >>> listed_logits(torch.eye(2), torch.ones(2, 2), torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]))
    tensor([1., 1., 1.])
    """
    return _Listed.apply(queries, keys, row, column)


class _Listed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, row: Tensor, column: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys, row, column)
        logits = queries.new_empty(len(row))
        with full_precision(queries.device):
            for part, block in _parts(queries, keys, row):
                if block is None:
                    logits[part] = torch.linalg.vecdot(queries[row[part]], keys[column[part]])
                else:
                    logits[part] = (queries[block] @ keys.T)[row[part] - block.start, column[part]]
        return logits

    @staticmethod
    def backward(ctx: Any, by_logits: Tensor) -> Any:
        no_second_derivative()
        queries, keys, row, column = ctx.saved_tensors
        by_queries, by_keys = torch.zeros_like(queries), torch.zeros_like(keys)
        with full_precision(queries.device):
            for part, block in _parts(queries, keys, row):
                if block is None:
                    factor = by_logits[part].unsqueeze(1)
                    by_queries.index_add_(0, row[part], keys[column[part]].mul_(factor))
                    by_keys.index_add_(0, column[part], queries[row[part]].mul_(factor))
                    continue
                tile = queries.new_zeros(block.stop - block.start, len(keys))
                tile[row[part] - block.start, column[part]] = by_logits[part]
                torch.mm(tile, keys, out=by_queries[block])
                by_keys.addmm_(tile.T, queries[block])
        return by_queries, by_keys, None, None


def _parts(queries: Tensor, keys: Tensor, row: Tensor) -> Iterator[tuple[slice, slice | None]]:
    """Parts of the list and, where these are dense, the queries that each is about."""
    n, m = len(queries), len(keys)
    if len(row) < DENSE * n * m:
        size = max(1, PART // max(1, queries.shape[1]))
        for start in range(0, len(row), size):
            yield slice(start, min(start + size, len(row))), None
        return
    height = max(1, PART // max(1, m))
    starts = list(range(0, n, height))
    ends = torch.searchsorted(row, torch.tensor([*starts[1:], n], device=row.device)).tolist()
    for top, first, last in zip(starts, [0, *ends], ends, strict=False):
        yield slice(first, last), slice(top, min(top + height, n))
