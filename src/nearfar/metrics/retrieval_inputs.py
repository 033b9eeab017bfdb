"""What every retrieval metric reads: embeddings of two sides, who is relevant to whom, cut-offs, intervals."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from nearfar.arguments import flag, text, whole_number, whole_numbers
from nearfar.errors import NearfarError
from nearfar.metrics.intervals import check_confidence
from nearfar.metrics.own_gallery import warn_of_own_keys
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
    "read_inputs",
]

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
