"""What every retrieval metric reads: embeddings of two sides, who is relevant to whom, cut-offs, intervals.

Queries that are themselves among the keys cost a pass over them.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nearfar.arguments import flag, text, whole_number, whole_numbers
from nearfar.errors import NearfarError
from nearfar.metrics.intervals import check_confidence
from nearfar.metrics.rank_kernel import Side
from nearfar.metrics.relevance import ItemIds, Relevance
from nearfar.metrics.relevance_forms import read_relevance

__all__ = [
    "Embeddings",
    "LeaveOneOut",
    "RetrievalInputs",
    "check_cutoffs",
    "check_interval_options",
    "check_tile",
    "equal_keys",
    "read_inputs",
    "warn_of_own_keys",
]


# Cosines of one item embedded twice: other batches and half precision change the last digits, and no more.
_SAME = 1 - 1e-5
# Numbers looked at together.
_PART = 1 << 20
# Columns by which equal rows are looked for, and rows from which "most" is judged.
_COLUMNS = 32
_ROWS = 512


def warn_of_own_keys(
    queries: Tensor, keys: Tensor, own: Int64[Tensor, " n"] | None, by_position: bool
) -> None:
    """Warn where queries stand in their own gallery and are not left out.

    Such a query is equal to a key bit for bit, or, with as many queries as keys, most are equal to the key at their
    position but for rounding. Rows that different items share say nothing and do not count: collapsed ones, and codes
    with one magnitude (one-hot rows, signs, zeros).
    """
    message = _own_keys(queries, keys, own, by_position)
    if message is not None:
        warnings.warn(message, stacklevel=4)


def _own_keys(queries: Tensor, keys: Tensor, own: Tensor | None, by_position: bool) -> str | None:
    n = len(queries)
    if _one_memory(queries, keys) and own is None:
        first, number, how = (0, 0), n, "the same tensor"
    else:
        place = equal_keys(queries, keys)
        if own is not None:
            # One that is its own key is left out; a different key that is equal to it may be a copy. Only where the
            # stated key is a different row altogether do the positions look wrong.
            inside = own >= 0
            at_own = inside & (place >= 0)
            at_own[inside] &= (queries[inside] == keys[own[inside]]).all(1)
            place = torch.where(at_own | ~inside, -1, place)
        at = (place >= 0).nonzero().flatten()
        at = at[_telling(queries[at])]
        if len(at):
            first, number, how = (int(at[0]), int(place[at[0]])), len(at), "equal bit for bit"
        elif own is None and _most_near_own(queries, keys):
            first, number, how = (0, 0), n, "equal but for rounding"
        else:
            return None
    if own is not None:
        return (
            f"leave_one_out: {number} of {n} queries are not the keys that are left out for them, but equal to "
            f"others: query {first[0]} is key {first[1]}. Pass their positions, leave_one_out=positions, or "
            "query_ids= and key_ids="
        )
    outcome = (
        "with relevant=None each query's one relevant key is itself, and R@1 is 1 whatever the model"
        if by_position
        else "each finds itself first, as a hit or as a wrong key"
    )
    return (
        f"{number} of {n} queries stand in their own gallery: query {first[0]} and key {first[1]} are {how}. "
        f"So {outcome}. Within one set of items state relevant= (such as labels, as a tuple) and pass "
        "leave_one_out=True; for queries that are part of the keys their positions, leave_one_out=positions, "
        "or query_ids= and key_ids="
    )


def equal_keys(queries: Tensor, keys: Tensor) -> Int64[Tensor, " n"]:
    """For each query the position of a key that is equal to it in every number, −1 where there is none.

    >>> equal_keys(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
    tensor([-1,  1])
    """
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    of_queries, of_keys = _codes(queries, keys, dtype)
    ordered, order = of_keys.sort(stable=True)
    at = torch.searchsorted(ordered, of_queries).clamp(max=len(keys) - 1)
    candidates = (ordered[at] == of_queries).nonzero().flatten()
    place = torch.full((len(queries),), -1, device=queries.device)
    for part in candidates.split(max(_PART // queries.shape[1], 1)):
        key = order[at[part]]
        same = (queries[part].to(dtype) == keys[key].to(dtype)).all(1)
        place[part[same]] = key[same]
    if len(queries) == len(keys):  # of several equal keys the one at the query's position is named
        for rows in (place >= 0).nonzero().flatten().split(max(_PART // queries.shape[1], 1)):
            same = (queries[rows].to(dtype) == keys[rows].to(dtype)).all(1)
            place[rows[same]] = rows[same]
    return place


def _codes(
    queries: Tensor, keys: Tensor, dtype: torch.dtype
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " m"]]:
    """A number for each row that equal rows share, and different ones hardly ever: of some columns if those tell."""
    d = queries.shape[1]
    if d > 2 * _COLUMNS:
        some = torch.linspace(0, d - 1, _COLUMNS, device=keys.device).long()
        few = _codes_of(queries[:, some], dtype), _codes_of(keys[:, some], dtype)
        if 2 * len(few[1].unique()) > len(keys):
            return few
    return _codes_of(queries, dtype), _codes_of(keys, dtype)


def _codes_of(rows: Tensor, dtype: torch.dtype) -> Int64[Tensor, " n"]:
    d = rows.shape[1]
    generator = torch.Generator().manual_seed(0)
    factors = (torch.randint(-(2**62), 2**62, (d,), generator=generator) * 2 + 1).to(rows.device)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[torch.finfo(dtype).bits // 8]
    codes = []
    for part in rows.split(max(_PART // d, 1)):
        whole = (part.to(dtype) + 0.0).contiguous().view(bits)  # adding 0 makes −0 and 0 one number
        codes.append((whole.to(torch.int64) * factors).sum(1))
    return torch.cat(codes)


def _telling(rows: Tensor) -> Bool[Tensor, " k"]:
    """Which rows only one item can be expected to have."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.bool, device=rows.device)
    collapsed = len(rows) > 1 and bool((rows == rows[0]).all())
    return _several_magnitudes(rows) & (not collapsed)


def _most_near_own(queries: Tensor, keys: Tensor) -> bool:
    """Whether most rows point where the other side's row at their position does, and few where its neighbour does."""
    n = len(queries)
    if n != len(keys) or n < 2:
        return False
    rows = torch.linspace(0, n - 1, min(n, _ROWS), device=queries.device).long()
    a, b, c = (
        torch.nn.functional.normalize(x.double(), dim=1)
        for x in (queries[rows], keys[rows], keys[(rows + 1) % n])
    )
    near, beside = (int(((a * x).sum(1) > _SAME).sum()) for x in (b, c))
    telling = int(_several_magnitudes(queries[rows]).sum())
    return 2 * near > len(rows) and 4 * beside < len(rows) and 2 * telling > len(rows)


def _several_magnitudes(rows: Tensor) -> Bool[Tensor, " k"]:
    size = rows.abs().float()
    return size.masked_fill(size == 0, torch.inf).amin(1) < size.amax(1)


def _one_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.device == b.device
    )


Embeddings = Float[Tensor, "_ d"] | np.ndarray
#: query i is key i, or the position of each query among the keys
LeaveOneOut = bool | Sequence[int] | np.ndarray | Tensor

DIRECTIONS = ("queries to keys", "keys to queries")


@dataclass(frozen=True)
class RetrievalInputs:
    """Two checked sides, the relevance of one to the other, and how they are compared."""

    queries: Side
    keys: Side
    relevance: Relevance
    normalized: bool
    leave_one_out: bool


def read_inputs(
    queries: Embeddings,
    keys: Embeddings,
    relevant: object,
    *,
    normalize: bool,
    leave_one_out: LeaveOneOut,
    query_ids: Sequence[Hashable] | None,
    key_ids: Sequence[Hashable] | None,
) -> RetrievalInputs:
    """Checked arguments of ``retrieval_metrics``; called by public functions themselves, where warnings point to."""
    flag("normalize", normalize)
    sides = Side(queries, "queries", normalize), Side(keys, "keys", normalize)
    if sides[0].rows.shape[1] != sides[1].rows.shape[1]:
        raise NearfarError(
            f"queries have {sides[0].rows.shape[1]} dimensions and keys {sides[1].rows.shape[1]}; a similarity "
            "needs both in one space"
        )
    if sides[0].rows.device != sides[1].rows.device:
        raise NearfarError(
            f"queries are on {sides[0].rows.device} and keys on {sides[1].rows.device}; move one of them"
        )
    ids = ItemIds(len(sides[0]), len(sides[1]), query_ids, key_ids)
    own = ids.own(leave_one_out)
    relevance = read_relevance(relevant, ids, sides[0].rows.device, own)
    if not bool(relevance.counts()[0].any()):
        raise NearfarError(
            "no query has a relevant key"
            + ("" if own is None else " other than itself, which leave_one_out takes away")
            + ", so that there is nothing to score; check relevant="
        )
    warn_of_own_keys(sides[0].rows, sides[1].rows, relevance.own, relevant is None)
    return RetrievalInputs(*sides, relevance, normalize, own is not None)


def check_cutoffs(ks: Iterable[int] | int) -> tuple[int, ...]:
    """Cut-offs as whole numbers, each once."""
    if isinstance(ks, (str, bytes, Mapping)):
        raise NearfarError(f"ks is {ks!r}; cut-offs are whole numbers, such as ks=(1, 5, 10)")
    if isinstance(ks, (Tensor, np.ndarray)):
        ks = whole_numbers("ks", ks).ravel().tolist()
    wanted = tuple(ks) if isinstance(ks, Iterable) else (ks,)
    return tuple(dict.fromkeys(whole_number("ks: a cut-off", k, 1) for k in wanted))


def check_tile(tile: tuple[int, int]) -> tuple[int, int]:
    """A pair of whole numbers (queries, keys)."""
    if not isinstance(tile, (tuple, list)) or len(tile) != 2:
        raise NearfarError(f"tile is {tile!r}; it is a pair of whole numbers (queries, keys)")
    return whole_number("tile: the number of queries", tile[0], 1), whole_number(
        "tile: the number of keys", tile[1], 1
    )


def check_interval_options(
    confidence: float, bootstrap: int, seed: int, split: str | None
) -> tuple[float, int, int, str | None]:
    """Level, resamples, seed and the name of the split."""
    level, resamples = check_confidence(confidence), whole_number("bootstrap", bootstrap, 0)
    if 0 < resamples < 100:
        raise NearfarError(
            f"bootstrap is {bootstrap}; the ends of an interval need at least 100, and 0 means none"
        )
    return level, resamples, whole_number("seed", seed, 0), None if split is None else text("split", split)
