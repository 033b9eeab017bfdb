"""Probes of frozen embeddings: classes by the nearest training items or logistic regression, numbers by these or ridge
regression.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.arguments import choice, whole_number
from nearfar.errors import NearfarError

__all__ = [
    "LinearProbe",
    "Votes",
    "nearest_classes",
    "nearest_votes",
    "retrieved_expression",
    "ridge_predictions",
]


_TILE = 1 << 24  # similarities in memory at a time
_PARTS = ("mean", "spread", "weight", "bias")
_ITERATIONS = 200  # of L-BFGS at most; the loss is convex, and stops changing well before


@dataclass(frozen=True)
class Votes:
    """What the nearest training items of each query say.

    ``classes`` (m,) is the class that most of them have, ``shares`` (m,) which part of them has it; ``nearest`` (m, k)
    are their positions, nearest first, and ``similarities`` (m, k) cosines, or with ``metric="euclidean"`` distances
    below 0.
    """

    classes: Int[Tensor, " m"]
    shares: Float[Tensor, " m"]
    nearest: Int[Tensor, "m k"]
    similarities: Float[Tensor, "m k"]


def nearest_classes(
    train: Float[Tensor, "n d"],
    codes: Int[Tensor, " n"],
    queries: Float[Tensor, "m d"],
    k: int = 5,
    metric: Literal["cosine", "euclidean"] = "cosine",
) -> Int[Tensor, " m"]:
    """The class that most of the ``k`` nearest training items have; of classes with as many votes, that of the nearest.

    ``k`` beyond the training items takes all of them.

    >>> train, codes = torch.tensor([[0.0], [0.1], [1.0]]), torch.tensor([4, 4, 7])
    >>> nearest_classes(train, codes, torch.tensor([[0.04], [2.0]]), k=1, metric="euclidean")
    tensor([4, 7])
    """
    return nearest_votes(train, codes, queries, k, metric).classes


@torch.no_grad()
def nearest_votes(
    train: Float[Tensor, "n d"],
    codes: Int[Tensor, " n"],
    queries: Float[Tensor, "m d"],
    k: int = 5,
    metric: Literal["cosine", "euclidean"] = "cosine",
) -> Votes:
    """The vote of `nearest_classes`, and who voted.

    >>> train, codes = torch.tensor([[0.0], [0.1], [1.0]]), torch.tensor([4, 4, 7])
    >>> votes = nearest_votes(train, codes, torch.tensor([[0.6]]), k=3, metric="euclidean")
    >>> votes.classes.tolist(), votes.shares.tolist(), votes.nearest.tolist()
    ([4], [0.6666666865348816], [[2, 1, 0]])
    """
    k = min(whole_number("k", k, 1), len(train))
    choice("metric", metric, ("cosine", "euclidean"))
    _check(train, codes, queries)
    train, queries = train.float(), queries.float()
    if metric == "cosine":
        train, queries = F.normalize(train, dim=1), F.normalize(queries, dim=1)
        half = torch.zeros(len(train))
    else:
        centre = train.mean(0)  # distances stay, and rounding is less
        train, queries = train - centre, queries - centre
        half = train.square().sum(1) / 2
    classes = int(codes.max()) + 1
    # A vote weighs a little more the nearer it is, by less than one vote in all.
    weights = 1 + torch.arange(k, 0, -1) / (2.0 * k * k)
    predicted, shares, nearest, similarities = [], [], [], []
    for part in queries.split(max(1, _TILE // len(train))):
        scores, at = (part @ train.T - half.to(part)).topk(k, dim=1)
        votes = torch.zeros(len(part), classes).scatter_add_(1, codes[at], weights.expand(len(part), -1))
        winner = votes.argmax(1)
        if metric == "euclidean":
            scores = -(part.square().sum(1, keepdim=True) - 2 * scores).clamp(min=0).sqrt()
        predicted.append(winner)
        shares.append((codes[at] == winner[:, None]).float().mean(1))
        nearest.append(at)
        similarities.append(scores)
    if not predicted:
        return Votes(
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0),
            torch.zeros(0, k, dtype=torch.int64),
            torch.zeros(0, k),
        )
    return Votes(torch.cat(predicted), torch.cat(shares), torch.cat(nearest), torch.cat(similarities))


class LinearProbe:
    """Multinomial logistic regression over frozen features, the same on every run: a convex loss, minimised by L-BFGS.

    Features are standardised by the training rows. The loss is Σ cross-entropy + ``penalty``/2 · ‖weights‖², as in
    scikit-learn with C = 1 / penalty; nothing is drawn.

    >>> rows = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    >>> LinearProbe(rows, torch.tensor([0, 0, 1, 1])).classes(torch.tensor([[1.5], [3.5]]))
    tensor([0, 1])
    """

    def __init__(self, rows: Float[Tensor, "n d"], codes: Int[Tensor, " n"], penalty: float = 1.0) -> None:
        _check(rows, codes, rows[:0])
        rows = rows.float()
        self.mean = rows.mean(0)
        spread = rows.std(0, correction=0)
        self.spread = torch.where(spread > 1e-6 * self.mean.abs().clamp(min=1.0), spread, 1.0)
        with torch.inference_mode(False), torch.enable_grad():  # embeddings of an evaluation are made without
            x = ((rows - self.mean) / self.spread).clone()
            self.weight, self.bias = _minimised(x, codes.clone(), penalty)

    @torch.no_grad()
    def logits(self, rows: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        """Logits of every class; their softmax over classes are probabilities."""
        x = (rows.float() - self.mean) / self.spread
        return F.linear(x, self.weight, self.bias)

    def classes(self, rows: Float[Tensor, "m d"]) -> Int[Tensor, " m"]:
        """The most probable class of each row."""
        return self.logits(rows).argmax(1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` makes the same probe of."""
        return {name: getattr(self, name).numpy() for name in _PARTS}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> LinearProbe:
        """The probe whose `to_arrays` these are, without fitting.

        Raises:
            NearfarError: arrays that are no probe's.
        """
        probe = cls.__new__(cls)
        for name in _PARTS:
            if name not in arrays or arrays[name].dtype != np.float32:
                raise NearfarError(
                    f"the '{name}' of a linear probe is missing, or no array of float32 numbers"
                )
            setattr(probe, name, torch.from_numpy(np.array(arrays[name])))
        d = probe.mean.shape
        classes = len(probe.bias)
        if (
            len(d) != 1
            or probe.spread.shape != d
            or probe.weight.shape != (classes, *d)
            or probe.bias.ndim != 1
        ):
            shapes = ", ".join(f"{name} {tuple(getattr(probe, name).shape)}" for name in _PARTS)
            raise NearfarError(f"the parts of a linear probe do not fit each other: {shapes}")
        return probe


def _minimised(
    x: Float[Tensor, "n d"], codes: Int[Tensor, " n"], penalty: float
) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"]]:
    classes = int(codes.max()) + 1
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), codes)
        value = value + penalty / (2 * len(x)) * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def _check(rows: Tensor, codes: Tensor, queries: Tensor) -> None:
    if rows.ndim != 2 or not len(rows) or queries.ndim != 2 or rows.shape[1] != queries.shape[1]:
        raise NearfarError(
            f"rows are {tuple(rows.shape)} and queries {tuple(queries.shape)}: (n, d) and (m, d) of one length are "
            "needed"
        )
    if codes.shape != rows.shape[:1] or codes.dtype != torch.int64 or int(codes.min()) < 0:
        raise NearfarError(
            f"codes are {tuple(codes.shape)} {codes.dtype}: the class of each of {len(rows)} rows, a whole number from "
            "0, is needed"
        )


def ridge_predictions(
    train: Float[np.ndarray, "n d"],
    values: Float[np.ndarray, "n g"],
    test: Float[np.ndarray, "m d"],
    penalty: float = 1.0,
) -> Float[np.ndarray, "m g"]:
    """Ridge regression of ``values`` on ``train``, for the rows of ``test``.

    Features are standardised by the training rows; the penalty on squared weights is ``penalty`` per hundred rows.

    >>> x = np.arange(6.0)[:, None]
    >>> ridge_predictions(x, 2 * x + 1, np.array([[10.0]]), penalty=1e-9).round(3)
    array([[21.]])
    """
    mean, sd = train.mean(0), train.std(0)
    sd = np.where(sd > 1e-8 * np.maximum(1.0, np.abs(mean)), sd, 1.0)
    x, centre = (train - mean) / sd, values.mean(0)
    gram = x.T @ x + penalty * len(x) / 100 * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (values - centre))
    predicted: Float[np.ndarray, "m g"] = (test - mean) / sd @ weights + centre
    return predicted


_ROWS = 4096  # queries at a time: their similarities to all training spots are what memory goes into


def retrieved_expression(
    images: Float[Tensor, "m d"],
    genes: Float[Tensor, "n d"],
    expression: Float[np.ndarray, "n g"],
    k: int,
) -> Float[np.ndarray, "m g"]:
    """Mean ``expression`` of the ``k`` training spots whose embeddings ``genes`` are nearest to a patch's, by cosine.

    >>> means = retrieved_expression(torch.eye(2), torch.eye(2), np.array([[1.0], [3.0]]), k=1)
    >>> means.tolist()
    [[1.0], [3.0]]
    """
    if not 1 <= k <= len(genes):
        raise NearfarError(
            f"retrieve={k}: there are {len(genes)} training spots to average over; take 1 to that many."
        )
    images, genes = (torch.nn.functional.normalize(x.float(), dim=1) for x in (images, genes))
    means = np.empty((len(images), expression.shape[1]))
    for start in range(0, len(images), _ROWS):
        part = images[start : start + _ROWS]
        nearest = (part @ genes.T).topk(k, dim=1).indices.numpy()
        # One matrix product instead of a gather of (rows, k, genes).
        weight = np.zeros((len(part), len(genes)), expression.dtype)
        np.put_along_axis(weight, nearest, 1.0 / k, axis=1)
        means[start : start + len(part)] = weight @ expression
    return means
