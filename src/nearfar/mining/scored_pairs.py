"""Pairs for a cross-encoder: which of them are to be scored, and their scores by id."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nearfar.data.rankings import read_ranking
from nearfar.errors import NearfarError

__all__ = ["ScoredPairs"]


@dataclass
class ScoredPairs:
    """Scores of pairs that a file has by id, or the pairs that are still to be scored."""

    queries: list[str]
    documents: list[str]
    known: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    asked: list[tuple[int, int]] = field(default_factory=list)

    def read(self, path: Path) -> None:
        """Take the scores of a file (`nearfar.data.rankings.read_ranking`), which goes by ids."""
        self.known = read_ranking(path)
        if not any(query in self.known for query in self.queries):
            raise NearfarError(
                f"{path} has scores of {len(self.known)} queries, none of which is one of these (first here: "
                f"'{self.queries[0]}', there: '{next(iter(self.known))}'): it goes by the ids of the embeddings."
            )

    def look_up(self, query: np.ndarray, document: np.ndarray) -> list[float]:
        """The known scores of pairs of positions, NaN where there is none: a ``rescore``."""
        none: dict[str, float] = {}
        return [
            self.known.get(self.queries[i], none).get(self.documents[j], math.nan)
            for i, j in zip(query.tolist(), document.tolist(), strict=True)
        ]

    def record(self, query: np.ndarray, document: np.ndarray) -> np.ndarray:
        """Note the pairs that are asked for, and give each 0: a ``rescore``."""
        self.asked += zip(query.tolist(), document.tolist(), strict=True)
        return np.zeros(len(query))

    def rows(self, queries: Sequence[object], documents: Sequence[object]) -> list[dict[str, object]]:
        """A row for each pair that was asked for, by id, with the values of both."""
        return [
            {
                "query_id": self.queries[i],
                "doc_id": self.documents[j],
                "query": queries[i],
                "document": documents[j],
            }
            for i, j in sorted(set(self.asked))
        ]
