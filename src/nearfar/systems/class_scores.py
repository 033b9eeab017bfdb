"""Scores of embeddings by labels: retrieval with each item left out, the vote of training items, a linear probe.

Values as vectors without any model: the baseline that embeddings stand beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfar.data.files import Json
from nearfar.data.items import Column
from nearfar.data.picture_arrays import PictureArrays
from nearfar.metrics import Estimate, mean_interval, rank_estimates, retrieval_ranks
from nearfar.metrics.precision_at_r import average_precision_at_r, map_estimate
from nearfar.models.probes import LinearProbe, nearest_classes
from nearfar.towers import build_tower

__all__ = ["KNN", "PROBE", "Scores", "answer_scores", "raw_values", "retrieval_scores"]


KNN, PROBE = "knn/accuracy", "probe/accuracy"

Scores = tuple[dict[str, Estimate], dict[str, np.ndarray]]
"""Estimates by name, and the score of every item under those metrics that all items have."""


def retrieval_scores(
    rows: Float[Tensor, "n d"],
    codes: Int[Tensor, " n"] | Int[Tensor, "n c"],
    *,
    purity: bool,
    bootstrap: int,
    split: str,
) -> Scores:
    """``R@1`` with each item left out of its gallery, and with ``purity`` also ``MAP@R``.

    ``codes`` are classes, −1 where missing, or of several labels an item rows of 0 and 1; those of the same class, or
    with a label in common, are answers of each other. ``split`` names the items.
    """
    estimates: dict[str, Estimate] = {}
    per_item: dict[str, np.ndarray] = {}
    if not _any_pair(codes):
        return estimates, per_item
    relevant: object = (codes, codes) if codes.ndim == 1 else _in_common(codes)
    ranks = retrieval_ranks(rows, rows, relevant, leave_one_out=True)
    estimates["R@1"] = rank_estimates(ranks, (1,), bootstrap=bootstrap, split=split)["R@1"]
    if len(ranks.queries) == len(rows):
        per_item["R@1"] = ranks.hits(1)
    if purity:
        scores, chances = average_precision_at_r(rows, codes)
        estimates["MAP@R"] = map_estimate(scores, chances, bootstrap=bootstrap, split=split)
        if not np.isnan(scores).any():
            per_item["MAP@R"] = scores
    return estimates, per_item


def answer_scores(
    rows: Float[Tensor, "n d"],
    codes: Int[Tensor, " n"],
    train: Float[Tensor, "m d"],
    known: Int[Tensor, " m"],
    probe: LinearProbe,
    *,
    k: int,
    metric: Literal["cosine", "euclidean"],
    split: str,
) -> Scores:
    """Accuracy of the vote of the ``k`` nearest training items and of a probe that was fitted on them.

    ``codes`` are the classes of ``rows``, −1 where missing, ``known`` those of ``train``.
    """
    estimates: dict[str, Estimate] = {}
    per_item: dict[str, np.ndarray] = {}
    judged = (codes >= 0).numpy()
    common = int(np.bincount(known.numpy()).argmax())
    chance = float((codes[judged] == common).float().mean())
    answers: dict[str, tuple[Tensor, Json]] = {
        KNN: (nearest_classes(train, known, rows, k, metric), {"k": k, "similarity": metric}),
        PROBE: (probe.classes(rows), {"penalty": 1.0}),
    }
    for name, (answer, about) in answers.items():
        right = (answer == codes).numpy()
        estimates[name] = _share(right[judged], name, chance, split, about)
        if judged.all():
            per_item[name] = right.astype(np.float64)
    return estimates, per_item


def _in_common(codes: Tensor) -> Bool[np.ndarray, "n n"]:
    """Which items have a label in common."""
    several = codes.float()
    return (several @ several.T > 0).numpy()


def _any_pair(codes: Tensor) -> bool:
    """Whether two items have a label in common."""
    if codes.ndim == 2:
        return bool((codes.sum(0) > 1).any())
    known = codes[codes >= 0]
    return len(known) > len(torch.unique(known))


def _share(
    right: Bool[np.ndarray, " n"], metric: str, chance: float, split: str, about: Mapping[str, object]
) -> Estimate:
    """An accuracy; chance is that of always guessing the commonest class of training."""
    value = right.astype(np.float64)
    low, high, method = mean_interval(value)
    protocol = {**about, "split": split, "confidence": 0.95, "interval": method}
    return Estimate(float(value.mean()), low, high, chance, len(value), False, metric, protocol)


_SIDE = 32  # pixels of a picture's sides, at most


def raw_values(kind: str, values: Mapping[str, Column]) -> tuple[str, dict[str, Float[Tensor, "n d"]]] | None:
    """The values of each split as vectors, and what these are called; None of other kinds of views.

    ``pixels`` of pictures (``kind`` image) from 0 to 1, at 32 × 32 at most, of grey ones one number each; ``tfidf`` of
    texts, fitted on those of ``train``; ``numbers``, standardised by those of ``train``.

    >>> name, rows = raw_values("vector", {"train": np.array([[0.0], [2.0]]), "test": np.array([[4.0]])})
    >>> name, rows["test"].tolist()
    ('numbers', [[3.0]])
    """
    if kind == "image":
        return "pixels", {name: _pixels(part) for name, part in values.items()}
    if kind not in ("text", "vector"):
        return None
    options: Json = {"encoder": "ngram", "dims": 512} if kind == "text" else {}
    tower = build_tower(kind, "the baseline", **options).fit(values["train"])
    rows = {name: torch.from_numpy(np.asarray(tower.reference(part))) for name, part in values.items()}
    return "tfidf" if kind == "text" else "numbers", rows


def _pixels(values: Column) -> Float[Tensor, "n d"]:
    side = (_SIDE, _SIDE)
    if isinstance(values, np.ndarray) and max(values.shape[1:3]) <= _SIDE:
        side = (int(values.shape[1]), int(values.shape[2]))
    whole = PictureArrays(values, side).whole()
    grey = bool((whole == whole[..., :1]).all())
    rows = np.array(whole[..., 0] if grey else whole).reshape(len(whole), -1)
    return torch.from_numpy(rows).float() / 255
