"""A classifier on the parts of an embedding, side by side: a support vector machine or least squares, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from nearfar.errors import NearfarError

__all__ = ["Blocks", "PartsProbe", "sample_rows"]

#: parts of the embedding of items by name, (n, d) each; a row of NaN is a part that this item lacks
Blocks = Mapping[str, Float[ndarray, "n d"]]
#: of the RBF kernel, where every part has variance 1 in all; on the annotations of VRD .3 to .7 scored the same
GAMMA = 0.5
#: of the support vector machine; 1 to 10 scored the same
COST = 3.0
#: of the linear classifier, as a share of the rows
RIDGE = 1e-3


@dataclass
class _Part:
    """How a part is centred and scaled."""

    name: str
    mean: Float[ndarray, " d"]
    scale: float


class PartsProbe:
    """A classifier on the concatenated parts of an embedding.

    Every part is centred and scaled to a variance of 1 in all, whatever its length, so that 256 coordinates of an
    embedding do not drown 29 numbers of the boxes. A part that a pair lacks is 0, the mean; parts that few training
    pairs have weigh less, by the root of their share. With kind "rbf" the classifier is a support vector machine with
    a Gaussian kernel (γ = 0.5, C = 3), with "linear" least squares on one-hot labels with a ridge: fixed, so
    that nothing is tuned on test.

    A fitted probe is arrays alone, which ``arrays`` gives and ``of_arrays`` takes; scores are computed from them, in a
    run as later.

    >>> rows = np.array([[0.0], [0.1], [1.0], [1.1]])
    >>> probe = PartsProbe("linear").fit({"x": rows}, np.array([0, 0, 1, 1]))
    >>> probe.predict({"x": np.array([[-1.0], [2.0]])})
    array([0, 1])
    >>> again = PartsProbe.of_arrays("linear", probe.parts, probe.arrays())
    >>> bool((again.scores({"x": rows}, 2) == probe.scores({"x": rows}, 2)).all())
    True
    """

    def __init__(self, kind: str = "rbf") -> None:
        if kind not in ("rbf", "linear"):
            raise NearfarError(f"probe={kind}: rbf or linear")
        self.kind = kind
        self._parts: list[_Part] = []
        #: of a support vector machine the parts of its support vectors
        self._support: Blocks = {}
        self._weights: Float[ndarray, "m outputs"] = np.zeros((0, 0))
        self._offsets: Float[ndarray, " outputs"] = np.zeros(0)

    @property
    def parts(self) -> list[str]:
        """The names of the parts, in order."""
        return [part.name for part in self._parts]

    @property
    def highest(self) -> int:
        """The highest class that can be predicted."""
        return int(self._classes.max())

    def fit(self, blocks: Blocks, label: Int[ndarray, " n"]) -> PartsProbe:
        """Fit on training pairs that have any of the parts; a single class is always predicted."""
        present = _present(blocks)
        if present.any() and not present.all():
            blocks, label = {name: rows[present] for name, rows in blocks.items()}, label[present]
        self._parts = [_part(name, rows) for name, rows in blocks.items()]
        self._classes = np.unique(label)
        if len(self._classes) == 1:
            return self
        rows = self.rows(blocks)
        if self.kind == "rbf":
            from sklearn.svm import SVC

            machine = SVC(C=COST, kernel="precomputed", cache_size=500).fit(_gaussian(rows, rows), label)
            self._support = {name: part[machine.support_] for name, part in blocks.items()}
            self._weights = _pair_weights(machine.dual_coef_, machine.n_support_)
            self._offsets = np.atleast_1d(machine.intercept_).astype(np.float64)
        else:
            from sklearn.linear_model import RidgeClassifier

            classifier = RidgeClassifier(alpha=RIDGE * len(rows)).fit(rows, label)
            self._weights = np.atleast_2d(classifier.coef_).T.astype(np.float64)
            self._offsets = np.atleast_1d(classifier.intercept_).astype(np.float64)
        return self

    def scores(self, blocks: Blocks, count: int) -> Float[ndarray, "n count"]:
        """The score of each of ``count`` classes; −∞ for classes without a training pair."""
        n = len(next(iter(blocks.values())))
        scores = np.full((n, count), -np.inf)
        if len(self._classes) == 1:
            scores[:, self._classes] = 0.0
            return scores
        rows = self.rows(blocks)
        inputs = _gaussian(rows, self.rows(self._support)) if self.kind == "rbf" else rows
        values = inputs @ self._weights + self._offsets
        if values.shape[1] == 1:
            scores[:, self._classes] = np.concatenate([-values, values], axis=1)
        else:
            k = len(self._classes)
            scores[:, self._classes] = _votes(values, k) if self.kind == "rbf" else values
        return scores

    def predict(self, blocks: Blocks) -> Int[ndarray, " n"]:
        """The class of every pair."""
        return self.scores(blocks, self.highest + 1).argmax(axis=1)

    def rows(self, blocks: Blocks) -> Float[ndarray, "n d"]:
        """The classifier's input."""
        return np.concatenate(
            [np.nan_to_num((blocks[part.name] - part.mean) * part.scale) for part in self._parts], axis=1
        )

    def arrays(self) -> dict[str, ndarray]:
        """The fitted probe; support vectors are kept as the parts that they were given as."""
        of_parts = {f"mean/{part.name}": part.mean for part in self._parts}
        of_parts |= {f"support/{name}": rows for name, rows in self._support.items()}
        scale = np.array([part.scale for part in self._parts])
        return of_parts | {
            "scale": scale, "classes": self._classes, "weights": self._weights, "offsets": self._offsets
        }  # fmt: skip

    @classmethod
    def of_arrays(cls, kind: str, parts: Sequence[str], arrays: Mapping[str, ndarray]) -> PartsProbe:
        """The probe whose ``arrays`` these are.

        Raises:
            NearfarError: an array that is missing, or of a shape that does not fit.
        """
        probe = cls(kind)
        try:
            scale, classes = arrays["scale"], arrays["classes"]
            probe._parts = [
                _Part(name, arrays[f"mean/{name}"], float(each))
                for name, each in zip(parts, scale, strict=True)
            ]
            probe._weights, probe._offsets = arrays["weights"], arrays["offsets"]
            if kind == "rbf" and len(classes) > 1:
                probe._support = {name: arrays[f"support/{name}"] for name in parts}
        except (KeyError, ValueError) as error:
            raise NearfarError(f"this is no probe ({error}): a file was edited or damaged.") from None
        k = len(classes)
        outputs = 0 if k == 1 else 1 if k == 2 else k * (k - 1) // 2 if kind == "rbf" else k
        inputs = sum(len(part.mean) for part in probe._parts)
        if k > 1 and kind == "rbf":
            inputs = len(next(iter(probe._support.values())))
        fits = classes.dtype.kind == "i" and probe._offsets.shape == (outputs,)
        if not k or not fits or (k > 1 and probe._weights.shape != (inputs, outputs)):
            raise NearfarError(
                "this is no probe (its arrays do not fit together): a file was edited or damaged."
            )
        probe._classes = classes
        return probe


def _pair_weights(dual: Float[ndarray, "k1 m"], counts: Int[ndarray, " k"]) -> Float[ndarray, "m pairs"]:
    """The weight of every support vector in the decision between each two classes.

    libsvm keeps of a vector of class i one coefficient for each other class j: in row j − 1 where i < j, else in row j.
    """
    k = len(counts)
    if k == 2:
        return np.asarray(dual.T, np.float64)
    ends = np.cumsum([0, *counts])
    weights = np.zeros((int(ends[-1]), k * (k - 1) // 2))
    for at, (i, j) in enumerate(combinations(range(k), 2)):
        first, second = slice(ends[i], ends[i + 1]), slice(ends[j], ends[j + 1])
        weights[first, at], weights[second, at] = dual[j - 1, first], dual[i, second]
    return weights


def _votes(values: Float[ndarray, "n pairs"], k: int) -> Float[ndarray, "n k"]:
    """Of decisions between each two classes: how many each class wins, and by how much, as a fraction below a half.

    As scikit-learn's ``decision_function_shape="ovr"``.
    """
    won, sums = np.zeros((len(values), k)), np.zeros((len(values), k))
    for at, (i, j) in enumerate(combinations(range(k), 2)):
        sums[:, i] += values[:, at]
        sums[:, j] -= values[:, at]
        won[:, i] += values[:, at] >= 0
        won[:, j] += values[:, at] < 0
    return won + sums / (3 * (np.abs(sums) + 1))


def _gaussian(a: Float[ndarray, "n d"], b: Float[ndarray, "m d"]) -> Float[ndarray, "n m"]:
    """exp(−γ |x − y|²), from one matrix product: many times faster than row by row where rows are long."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * (a @ b.T)
    return np.exp(-GAMMA * np.maximum(squares, 0)).astype(np.float64)


def _present(blocks: Blocks) -> Bool[ndarray, " n"]:
    """Which pairs have any of the parts."""
    present: Bool[ndarray, " n"] = np.any([~np.isnan(rows).any(axis=1) for rows in blocks.values()], axis=0)
    return present


def _part(name: str, rows: Float[ndarray, "n d"]) -> _Part:
    present = ~np.isnan(rows).any(axis=1)
    if not present.any():
        return _Part(name, np.zeros(rows.shape[1]), 0.0)
    kept = rows[present].astype(np.float64)
    variance = float(kept.var(axis=0).sum())
    share = float(present.mean())
    return _Part(name, kept.mean(axis=0), float(np.sqrt(share / variance)) if variance > 1e-12 else 0.0)


def sample_rows(label: Int[ndarray, " n"], most: int, seed: int = 0) -> Int[ndarray, " m"]:
    """Positions of at most ``most`` rows, in order: all, or a random sample determined by n and ``seed``."""
    if len(label) <= most:
        return np.arange(len(label))
    return np.sort(np.random.default_rng([seed, len(label)]).choice(len(label), most, replace=False))
