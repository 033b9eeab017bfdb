"""Columns of numbers, and vectors that somebody computed before: read as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from nearfar.data.batch import Rows
from nearfar.data.files import Json
from nearfar.data.items import Column
from nearfar.errors import NearfarError
from nearfar.models.views import PassThrough, Standardize
from nearfar.towers.base import (
    BATCH,
    AsItIs,
    GraphInput,
    Tower,
    TowerGraph,
    read_tower_spec,
    write_tower_spec,
)

__all__ = ["Scaler", "VectorTower"]


@dataclass(frozen=True)
class Scaler:
    """Mean and standard deviation of the training rows, by which later rows are standardised in double precision.

    For towers that read standardised numbers, which nothing trained comes before. Columns that never change are 0.

    >>> scaler = Scaler.of(np.array([[1.0, 5.0], [3.0, 5.0], [np.nan, np.nan]]))
    >>> scaler(np.array([[3.0, 5.0]])).tolist()
    [[1.0, 0.0]]
    """

    mean: Float[np.ndarray, " d"]
    spread: Float[np.ndarray, " d"]

    @classmethod
    def of(cls, rows: Float[np.ndarray, "n d"]) -> Scaler:
        """Of the rows without NaN; of none, nothing is moved."""
        kept = rows[~np.isnan(rows).any(axis=1)].astype(np.float64)
        if not len(kept):
            return cls(np.zeros(rows.shape[1]), np.ones(rows.shape[1]))
        spread = kept.std(axis=0)
        return cls(kept.mean(axis=0), np.where(spread > 1e-9, spread, np.inf))

    def __call__(self, rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        return np.asarray((rows - self.mean) / self.spread, dtype=np.float32)

    def to_dict(self) -> dict[str, list[float | None]]:
        """For JSON; the spread of a column that never changes is None."""
        return {
            "mean": self.mean.tolist(),
            "spread": [None if np.isinf(each) else float(each) for each in self.spread],
        }

    @classmethod
    def from_dict(cls, saved: Json) -> Scaler:
        """What ``to_dict`` gave."""
        spread = [np.inf if each is None else each for each in saved["spread"]]
        return cls(np.array(saved["mean"], dtype=np.float64), np.array(spread, dtype=np.float64))


class VectorTower(Tower):
    """Numbers of each item: a column of numbers, a list of them in each row, or an array of features.

    Args:
        standardize: mean 0 and variance 1 of every number over the training rows. Leave it on for numbers of different
            units; embeddings of a trained network may go without.

    >>> import torch
    >>> tower = VectorTower().fit(np.array([[0.0, 5.0], [2.0, 5.0]]))
    >>> tower.build()(tower.read([[2.0, 6.0]]).batch(torch.tensor([0]))).tolist()
    [[1.0, 1.0]]
    """

    kind = "vector"

    def __init__(self, standardize: bool = True) -> None:
        if not isinstance(standardize, bool):
            raise NearfarError(f"standardize={standardize}: true or false is needed.")
        self.standardize = standardize
        self._train: np.ndarray | None = None
        self._width = 0

    @property
    def description(self) -> str:
        how = ", standardised by the training rows" if self.standardize else ""
        return f"columns of numbers{how} " + (f"({self._width})" if self._width else "(not fitted yet)")

    @property
    def options(self) -> Json:
        return {"standardize": self.standardize}

    def check(self, values: Column) -> list[str | None]:
        """Values of a length that differs from that of the most, that are no numbers, or not finite."""
        if isinstance(values, np.ndarray) and values.dtype.kind in "fiu":
            finite = np.asarray(np.isfinite(values.reshape(len(values), -1)).all(axis=1))
            return [None if each else "number that is not finite" for each in finite]
        reasons: list[str | None] = []
        lengths: dict[int, int] = {}
        rows: list[np.ndarray | None] = []
        for value in values:
            try:
                row = np.asarray(value, dtype=np.float64).reshape(-1)
            except (TypeError, ValueError):
                rows.append(None)
                continue
            rows.append(row)
            lengths[row.size] = lengths.get(row.size, 0) + 1
        usual = max(lengths, key=lambda size: lengths[size]) if lengths else 0
        for row_ in rows:
            if row_ is None:
                reasons.append("no number")
            elif row_.size != usual:
                reasons.append(f"not {usual} numbers")
            else:
                reasons.append(None if np.isfinite(row_).all() else "number that is not finite")
        return reasons

    def fit(self, values: Column) -> VectorTower:
        """Length, mean and spread of the training values."""
        self._train = self.matrix(values)
        self._width = self._train.shape[1]
        return self

    def read(self, values: Column) -> Rows:
        matrix = self.matrix(values)
        if self._width and matrix.shape[1] != self._width:
            raise NearfarError(
                f"vectors have {matrix.shape[1]} numbers; those of training have {self._width}"
            )
        return Rows(matrix)

    def build(self) -> nn.Module:
        """Standardisation by the training rows, whose mean and spread are kept with the weights of the run."""
        if not self._width:
            raise NearfarError("a vector tower was not fitted: call fit(training values) or load it.")
        if not self.standardize:
            return PassThrough(self._width)
        train = self._train if self._train is not None else np.zeros((1, self._width), np.float32)
        return Standardize(torch.from_numpy(train))

    def reference(self, values: Column) -> Float[np.ndarray, "n d"]:
        matrix = self.matrix(values)
        if not self.standardize or self._train is None:
            return matrix
        spread = self._train.std(0)
        return ((matrix - self._train.mean(0)) / np.where(spread > 1e-9, spread, 1.0)).astype(np.float32)

    def graph(self) -> TowerGraph:
        """The numbers as they are; standardising them is part of the trained module."""
        if not self._width:
            raise NearfarError("a vector tower was not fitted: call fit(training values) or load it.")
        numbers = GraphInput(
            "values", "float32", (BATCH, self._width), "the numbers of each item, not standardised"
        )
        return TowerGraph(
            [numbers],
            AsItIs(),
            lambda values: {"values": self.matrix(values)},
            {
                "kind": self.kind,
                "steps": [f"the {self._width} numbers of an item in one row, in the order of training"],
            },
        )

    def save(self, folder: Path) -> None:
        write_tower_spec(folder, self, width=self._width)

    @classmethod
    def load(cls, folder: Path) -> VectorTower:
        spec = read_tower_spec(folder)
        tower = cls(**spec["options"])
        tower._width = int(spec.get("width", 0))
        return tower

    @staticmethod
    def matrix(values: Column) -> Float[np.ndarray, "n d"]:
        """Values as rows of float32, (n, d); a view of an array that has this form already."""
        try:
            matrix = np.asarray(values, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise NearfarError(f"these values are no rows of numbers of one length ({error})") from None
        return np.ascontiguousarray(matrix.reshape(len(matrix), -1))
