"""Numbers of a split: what the probes say, beside controls and the majority, and pair retrieval by itself.

The two questions were mixed up before. *Probe accuracy* asks for the relation (chance: the most frequent one);
*pair retrieval* asks which of B pairs of boxes a pair of crops belongs to (chance 1/B), and an encoder that knows the
relation and nothing else is bad at it. Intervals of both are over pictures, whose pairs share their luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from nearfar.metrics import (
    Difference,
    Estimate,
    by_group,
    count_estimate,
    f1_macro,
    f1_micro,
    item_values,
    paired_difference,
    retrieval_ranks,
    share,
)

__all__ = ["Judged", "confusion", "judge", "pair_retrieval"]

PAIR = "pair_retrieval/R@1"


@dataclass
class Judged:
    """Estimates and, by metric, the value of every picture, in the order of ``images``."""

    images: list[str]
    estimates: dict[str, Estimate]
    per_image: dict[str, Float[ndarray, " images"]]

    def difference(self, metric: str, other: str) -> Difference:
        """Of two metrics of the same pictures, paired, with an interval over pictures."""
        return paired_difference(self.per_image[metric][None], self.per_image[other][None], metric=metric)


def judge(
    predicted: Mapping[str, Int[ndarray, " n"]],
    truth: Int[ndarray, " n"],
    images: Sequence[str],
    relations: Sequence[str],
    constant: int,
    *,
    detailed: Sequence[str] = (),
    split: str = "",
    bootstrap: int = 1000,
    rows: Bool[ndarray, " n"] | None = None,
) -> Judged:
    """Accuracy of every classifier in ``predicted`` (metric name → classes).

    Args:
        constant: the most frequent relation of the training pairs; how often it is right is the chance level.
        detailed: metrics for which macro F1 and the F1 of every relation come along.
        split: hash of the split.
        bootstrap: resamples of pictures; 0 for none.
        rows: judge these pairs alone; pictures without any count nothing.
    """
    kept = np.ones(len(truth), bool) if rows is None else rows
    names = list(dict.fromkeys(images))
    constant_hits = (truth == constant) & kept
    protocol = {"pairs": int(kept.sum()), "interval_over": "pictures", "relations": list(relations)}
    majority = float(constant_hits.sum() / max(kept.sum(), 1))
    found = Judged(names, {}, {})

    def add(metric: str, counts: ndarray, statistic: Any, chance: float) -> None:
        _, sums = by_group(counts.astype(np.float64), images)
        found.estimates[metric] = count_estimate(
            sums, statistic, metric, chance=chance, split=split, protocol=protocol, resamples=bootstrap
        )
        found.per_image[metric] = item_values(sums, statistic)

    for metric, classes in predicted.items():
        hits = (classes == truth) & kept
        add(metric, np.stack([hits, kept], axis=1), share, majority)
        if metric in detailed:
            stem = metric.removesuffix("/accuracy")
            table = _per_class(classes, truth, len(relations), kept)
            always = _per_class(np.full_like(truth, constant), truth, len(relations), kept).sum(axis=0)
            there = np.flatnonzero(
                table.sum(axis=(0, 2)) > 0
            )  # a relation that is neither there nor said has no F1
            add(f"{stem}/macro_F1", table[:, there], f1_macro, float(f1_macro(always[there].astype(float))))
            for c in there.tolist():
                by_chance = float(f1_micro(always[[c]].astype(float)))
                add(f"{stem}/F1_{relations[c].replace(' ', '_')}", table[:, [c]], f1_micro, by_chance)
    return found


def _per_class(
    classes: Int[ndarray, " n"], truth: Int[ndarray, " n"], count: int, kept: Bool[ndarray, " n"]
) -> Int[ndarray, "n classes 3"]:
    """For every pair and class: true positive, false positive, missed."""
    said, there = (values[:, None] == np.arange(count) for values in (classes, truth))
    return np.stack([said & there, said & ~there, ~said & there], axis=2) & kept[:, None, None]


def pair_retrieval(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "n d"],
    rows: Bool[ndarray, " n"],
    images: Sequence[str],
    batch_size: int,
    *,
    split: str = "",
    bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[Estimate, Float[ndarray, " images"]] | None:
    """Is a pair's own second view the nearest of a batch? Mean of both directions, ties by expectation.

    Batches are random but the same at every call; what does not fill one is left out, so that the chance is 1/B
    throughout. Where there are fewer rows than ``batch_size`` they are one smaller batch; None below two rows.
    """
    at = np.flatnonzero(rows)
    size = min(batch_size, len(at))
    if size < 2:
        return None
    order = np.random.default_rng([seed, len(at)]).permutation(at)
    hits = np.zeros((len(rows), 2))
    for start in range(0, len(at) - size + 1, size):
        batch = torch.from_numpy(order[start : start + size])
        both = retrieval_ranks(first[batch], second[batch], both=True)
        hits[batch.numpy(), 0] = np.mean([ranks.hits(1) for ranks in both], axis=0)
        hits[batch.numpy(), 1] = 1
    _, sums = by_group(hits, list(images))
    protocol = {
        "gallery": size,
        "pairs": int(hits[:, 1].sum()),
        "interval_over": "pictures",
        "question": "which pair",
    }
    estimate = count_estimate(
        sums, share, PAIR, chance=1 / size, split=split, protocol=protocol, resamples=bootstrap
    )
    return estimate, item_values(sums, share)


def confusion(
    classes: Int[ndarray, " n"], truth: Int[ndarray, " n"], count: int
) -> Int[ndarray, "classes classes"]:
    """How often a pair of relation i (row) was called j (column).

    >>> confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    table = np.zeros((count, count), dtype=np.int64)
    np.add.at(table, (truth, classes), 1)
    return table
