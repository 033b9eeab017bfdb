"""Predictions that compare items: for each view of an item its nearest values of another view, and the partner's rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from nearfar.errors import NearfarError
from nearfar.metrics import Ranks, retrieval_ranks

__all__ = ["ViewComparison", "nearest_keys"]

_TILE = 1 << 24  # similarities in memory at a time


@torch.no_grad()
def nearest_keys(
    queries: Float[Tensor, "m d"], keys: Float[Tensor, "n d"], k: int
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Cosines and positions of the ``k`` keys (or all, if there are fewer) nearest to each query, nearest first.

    >>> cosines, at = nearest_keys(torch.tensor([[3.0, 0.1]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), k=5)
    >>> at.tolist()
    [[1, 0]]
    """
    k = min(k, len(keys))
    unit = normalize(keys.float(), dim=1)
    cosines, positions = [torch.zeros(0, k)], [torch.zeros(0, k, dtype=torch.int64)]
    for part in normalize(queries.float(), dim=1).split(max(1, _TILE // max(1, len(keys)))):
        values, at = (part @ unit.T).topk(k, dim=1)
        cosines.append(values)
        positions.append(at)
    return torch.cat(cosines), torch.cat(positions)


class ViewComparison:
    """What is known of the items that others are compared with, and the comparison.

    ``add`` takes the items in parts: their ids, the embeddings of each view, which of them have it, and perhaps what
    makes two items answers of each other (`None`: an item answers itself alone). The embeddings are held in memory.

    `of_all` compares the items that were added with each other; `of_others` compares further items with them.

    >>> comparison = ViewComparison([("text", "picture")], k=1)
    >>> comparison.add(["a", "b"], {"text": torch.eye(2), "picture": torch.tensor([[1.0, 0.1], [0.8, 1.0]])})
    >>> columns = next(comparison.of_all(rows=10))
    >>> columns["text_to_picture/nearest"], columns["text_to_picture/rank"], columns["picture_to_text/MRR"]
    ([['a'], ['b']], [1.0, 1.0], [1.0, 1.0])
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], k: int = 10) -> None:
        if k < 1:
            raise NearfarError(f"k={k}: at least one answer is needed.")
        self.pairs, self.k = list(pairs), k
        self.ids: list[str] = []
        self._rows: dict[str, list[Tensor]] = {}
        self._present: dict[str, list[np.ndarray]] = {}
        self._answers: list[Any] = []

    def add(
        self,
        ids: Sequence[str],
        outputs: Mapping[str, Float[Tensor, "n d"]],
        present: Mapping[str, Bool[np.ndarray, " n"]] | None = None,
        answers: Sequence[Any] | None = None,
    ) -> None:
        """Further items to compare with. A view that is not among ``outputs`` none of them has."""
        n = len(ids)
        for view in dict.fromkeys(view for pair in self.pairs for view in pair):
            rows = outputs.get(view)
            here = np.zeros(n, bool) if rows is None else (present or {}).get(view, np.ones(n, bool))
            self._present.setdefault(view, []).append(np.asarray(here))
            if rows is not None:
                at = torch.from_numpy(np.flatnonzero(here))
                self._rows.setdefault(view, []).append(rows[at].detach().float().cpu())
        self.ids.extend(ids)
        if answers is not None:
            self._answers.extend(answers)

    def __len__(self) -> int:
        return len(self.ids)

    def _whole(self, view: str) -> tuple[Float[Tensor, "n d"], Int[np.ndarray, " n"]]:
        """The embeddings of a view, and the positions of the items that have it."""
        parts = self._rows.get(view, [])
        if len(parts) > 1:  # joined once
            parts[:] = [torch.cat(parts)]
        present = np.concatenate(self._present.get(view, [np.zeros(0, bool)]))
        return (parts[0] if parts else torch.zeros(0, 1)), np.flatnonzero(present)

    def directions(self) -> list[tuple[str, str]]:
        """Query and key of every comparison for which there are keys."""
        both = [direction for first, second in self.pairs for direction in ((first, second), (second, first))]
        return [(query, key) for query, key in both if len(self._whole(key)[0])]

    # -- with each other -------------------------------------------------------------------------------------
    def of_all(self, rows: int) -> Iterator[dict[str, list[Any]]]:
        """Columns for the items that were added, ``rows`` at a time.

        For each direction, such as ``text_to_picture``: ``/nearest`` and ``/cosine`` are the ids and cosines of the k
        nearest items of the other view; ``/rank`` is the expected rank of the item's own partner (or with answers: of
        its best answer) among the items that have both views, ``/R@1`` and ``/MRR`` what it contributes to these
        metrics. Their means are the metrics that the run's evaluation gives of the same items.
        """
        ranks = self._own_ranks()
        for start in range(0, len(self), rows):
            stop = min(start + rows, len(self))
            columns: dict[str, list[Any]] = {}
            for query, key in self.directions():
                name = f"{query}_to_{key}"
                vectors, at = self._whole(query)
                first, last = np.searchsorted(at, (start, stop))
                columns |= self._nearest(
                    name, key, vectors[first:last], at[first:last] - start, stop - start
                )
                if name in ranks:
                    columns |= {
                        f"{name}/{metric}": _or_none(values[start:stop])
                        for metric, values in ranks[name].items()
                    }
            yield columns

    def _own_ranks(self) -> dict[str, dict[str, Float[np.ndarray, " n"]]]:
        """By direction rank and contributions of every item, NaN where it has no partner."""
        known: dict[str, dict[str, np.ndarray]] = {}
        for first, second in self.pairs:
            (queries, a), (keys, b) = self._whole(first), self._whole(second)
            both = np.intersect1d(a, b)
            if len(both) < 2:
                continue
            answers = [self._answers[i] for i in both] if self._answers else None
            relevant = None if answers is None else (answers, answers)
            of_first, of_second = (
                torch.from_numpy(np.searchsorted(own, both)) for own in (a, b)
            )
            ranks = retrieval_ranks(queries[of_first], keys[of_second], relevant, both=True)
            for name, direction in zip((f"{first}_to_{second}", f"{second}_to_{first}"), ranks, strict=True):
                known[name] = _contributions(direction, both, len(self))
        return known

    # -- with others -----------------------------------------------------------------------------------------
    def of_others(
        self,
        ids: Sequence[str],
        outputs: Mapping[str, Float[Tensor, "m d"]],
        present: Mapping[str, Bool[np.ndarray, " m"]] | None = None,
    ) -> dict[str, list[Any]]:
        """The same columns for other items. The partner of one is the item of the same id, where there is such."""
        columns: dict[str, list[Any]] = {}
        for query, key in self.directions():
            if query not in outputs:
                continue
            name = f"{query}_to_{key}"
            here = (present or {}).get(query, np.ones(len(ids), bool))
            at = np.flatnonzero(here)
            vectors = outputs[query][torch.from_numpy(at)].detach().float().cpu()
            columns |= self._nearest(name, key, vectors, at, len(ids))
            keys, owners = self._whole(key)
            place = {self.ids[owner]: i for i, owner in enumerate(owners.tolist())}
            partners = [place.get(ids[i], -1) for i in at.tolist()]
            if max(partners, default=-1) >= 0:
                ranks = _contributions(retrieval_ranks(vectors, keys, partners), at, len(ids))
                columns |= {f"{name}/{metric}": _or_none(values) for metric, values in ranks.items()}
        if not columns:
            queries = " or ".join(dict.fromkeys(query for query, _ in self.directions()))
            raise NearfarError(
                f"these items have no view that could be compared with those of the gallery; {queries} is needed."
            )
        return columns

    def _nearest(
        self, name: str, key: str, vectors: Tensor, at: Int[np.ndarray, " q"], n: int
    ) -> dict[str, list[Any]]:
        keys, owners = self._whole(key)
        cosines, positions = nearest_keys(vectors, keys, self.k)
        nearest: list[Any] = [None] * n
        similar: list[Any] = [None] * n
        for i, row, values in zip(at.tolist(), positions.tolist(), cosines.tolist(), strict=True):
            nearest[i] = [self.ids[owners[each]] for each in row]
            similar[i] = values
        return {f"{name}/nearest": nearest, f"{name}/cosine": similar}


def _contributions(ranks: Ranks, at: Int[np.ndarray, " q"], n: int) -> dict[str, Float[np.ndarray, " n"]]:
    """Expected rank, R@1 and reciprocal rank of the queries, which are the items ``at`` of n; NaN of the others."""
    numbers = {"rank": ranks.expected(), "R@1": ranks.hits(1), "MRR": ranks.reciprocal()}
    columns = {}
    for name, values in numbers.items():
        columns[name] = np.full(n, np.nan)
        columns[name][at[ranks.queries]] = values
    return columns


def _or_none(values: Float[np.ndarray, " n"]) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]
