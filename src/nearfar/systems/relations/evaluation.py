"""Metrics of predictions: accuracy of probes and controls, pair retrieval, cross-validation, re-scoring of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from nearfar.data.files import write_arrays
from nearfar.data.scenes.triples import chosen_relations
from nearfar.errors import NearfarError
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
from nearfar.metrics.count_metrics import Statistic
from nearfar.systems.relations.probe import FUSED
from nearfar.training.run_folder import RunFolder

__all__ = [
    "PAIR",
    "Predictions",
    "Scores",
    "confusion",
    "differences",
    "pair_retrieval",
    "pool",
    "rescore",
    "score_predictions",
]


@dataclass(frozen=True)
class Predictions:
    """Pairs, their true relation, and by metric the classifier's scores of every class."""

    ids: Sequence[str]
    image: Sequence[str]
    truth: Int[ndarray, " n"]
    has_pixels: Bool[ndarray, " n"]  # whether there is a photo, and pixels are a view
    relations: Sequence[str]
    scores: Mapping[str, Float[ndarray, "n classes"]]

    def __len__(self) -> int:
        return len(self.ids)

    def classes(self, among: Sequence[int] | None = None) -> dict[str, Int[ndarray, " n"]]:
        """The class with the highest score, by metric; ``among``: of these classes alone."""
        classes = {}
        for metric, scores in self.scores.items():
            if among is None:
                classes[metric] = scores.argmax(axis=1)
            else:
                classes[metric] = np.asarray(among)[scores[:, list(among)].argmax(axis=1)]
        return classes

    def save(self, path: Path) -> None:
        """Write a compressed ``.npz``."""
        arrays = {f"scores/{metric}": scores.astype(np.float32) for metric, scores in self.scores.items()}
        texts = {"ids": self.ids, "image": self.image, "relations": self.relations}
        arrays |= {name: np.asarray(list(column), dtype=np.str_) for name, column in texts.items()}
        write_arrays(path, {"truth": self.truth, "seen": self.has_pixels, **arrays}, compressed=True)

    @classmethod
    def load(cls, run: Path, split: str) -> Predictions:
        """The predictions of a finished run."""
        path = run / f"predictions_{split}.npz"
        if not path.is_file():
            raise NearfarError(
                f"{path}: there are no predictions; is {run} a finished run of the relation system?"
            )
        with np.load(path, allow_pickle=False) as entry:
            return cls(
                entry["ids"].tolist(),
                entry["image"].tolist(),
                entry["truth"],
                entry["seen"],
                entry["relations"].tolist(),
                {name[7:]: entry[name] for name in entry.files if name.startswith("scores/")},
            )

    @classmethod
    def pooled(cls, parts: Sequence[Predictions]) -> Predictions:
        """Several test sets joined to one; only metrics that all of them have."""
        metrics = [name for name in parts[0].scores if all(name in part.scores for part in parts)]
        if len({tuple(part.relations) for part in parts}) != 1:
            raise NearfarError("these runs have different relations; they cannot be pooled")
        ids = [name for part in parts for name in part.ids]
        if len(set(ids)) != len(ids):
            raise NearfarError("these test sets share pairs: they are not the folds of one cross-validation")
        return cls(
            ids,
            [image for part in parts for image in part.image],
            np.concatenate([part.truth for part in parts]),
            np.concatenate([part.has_pixels for part in parts]),
            parts[0].relations,
            {name: np.concatenate([part.scores[name] for part in parts]) for name in metrics},
        )


PAIR = "pair_retrieval/R@1"


@dataclass
class Scores:
    """Estimates and, by metric, the value of every picture, in the order of ``images``."""

    images: list[str]
    estimates: dict[str, Estimate]
    per_image: dict[str, Float[ndarray, " images"]]

    def difference(self, metric: str, other: str) -> Difference:
        """Of two metrics of the same pictures, paired, with an interval over pictures."""
        return paired_difference(self.per_image[metric][None], self.per_image[other][None], metric=metric)


def score_predictions(
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
) -> Scores:
    """Accuracy of every classifier in ``predicted`` (metric name → classes).

    Args:
        constant: the most frequent relation of the training pairs; how often it is right is the chance level.
        detailed: metrics for which macro F1 and the F1 of every relation are added.
        split: hash of the split.
        bootstrap: resamples of pictures; 0 for none.
        rows: score these pairs alone; pictures without any of them do not count.
    """
    kept = np.ones(len(truth), bool) if rows is None else rows
    names = list(dict.fromkeys(images))
    constant_hits = (truth == constant) & kept
    protocol = {"pairs": int(kept.sum()), "interval_over": "pictures", "relations": list(relations)}
    majority = float(constant_hits.sum() / max(kept.sum(), 1))
    result = Scores(names, {}, {})

    def add(metric: str, counts: ndarray, statistic: Statistic, chance: float) -> None:
        _, sums = by_group(counts.astype(np.float64), images)
        estimate = count_estimate(
            sums, statistic, metric, chance=chance, split=split, protocol=protocol, resamples=bootstrap
        )
        control = metric.removeprefix("with_photo/").split("/")[0] in (*CONTROLS, "majority")
        result.estimates[metric] = replace(estimate, control=control)
        result.per_image[metric] = item_values(sums, statistic)

    for metric, classes in predicted.items():
        hits = (classes == truth) & kept
        add(metric, np.stack([hits, kept], axis=1), share, majority)
        if metric in detailed:
            stem = metric.removesuffix("/accuracy")
            table = _per_class(classes, truth, len(relations), kept)
            always = _per_class(np.full_like(truth, constant), truth, len(relations), kept).sum(axis=0)
            occurring = np.flatnonzero(
                table.sum(axis=(0, 2)) > 0
            )  # a relation that neither occurs nor is predicted has no F1
            add(
                f"{stem}/macro_F1",
                table[:, occurring],
                f1_macro,
                float(f1_macro(always[occurring].astype(float))),
            )
            for c in occurring.tolist():
                by_chance = float(f1_micro(always[[c]].astype(float)))
                add(f"{stem}/F1_{relations[c].replace(' ', '_')}", table[:, [c]], f1_micro, by_chance)
    return result


def _per_class(
    classes: Int[ndarray, " n"], truth: Int[ndarray, " n"], count: int, kept: Bool[ndarray, " n"]
) -> Int[ndarray, "n classes 3"]:
    """For every pair and class: true positive, false positive, missed."""
    predicted, actual = (values[:, None] == np.arange(count) for values in (classes, truth))
    return (
        np.stack([predicted & actual, predicted & ~actual, ~predicted & actual], axis=2) & kept[:, None, None]
    )


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
    """R@1 within batches: how often a pair's own second view is the nearest; mean of both directions.

    Batches are random but the same at every call; an incomplete last batch is left out, so that chance is always 1/B.
    Ties count by expectation. Fewer rows than ``batch_size`` are one smaller batch; None below two rows.
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
    """How often relation j (column) was predicted for a pair of relation i (row).

    >>> confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    table = np.zeros((count, count), dtype=np.int64)
    np.add.at(table, (truth, classes), 1)
    return table


CONTROLS = ("spatial_only", "visual_only", "categories_only", "raw_features", "numbers_only", "untrained")


def rescore(
    run: str | Path, relations: str | Sequence[str] = "top5", split: str | None = None
) -> dict[str, Estimate]:
    """An older model evaluated on the pairs of some of its relations, without training.

    "all classes": predictions stay as they are, and a class outside ``relations`` is wrong. "these classes": the best
    of ``relations`` alone, which is the baseline for a new model on these relations.

    Raises ``NearfarError`` for a run of a different system, or relations that it does not know.
    """
    folder = RunFolder(Path(run))
    split = split or ("test" if (folder.path / "predictions_test.npz").exists() else "val")
    predictions = Predictions.load(folder.path, split)
    wanted = chosen_relations(relations)
    unknown = [name for name in wanted if name not in predictions.relations]
    if unknown:
        raise NearfarError(
            f"{folder}: the model does not know {', '.join(unknown)}; it knows {', '.join(predictions.relations)}."
        )
    among = [list(predictions.relations).index(name) for name in wanted]
    rows = np.isin(predictions.truth, among)
    if not rows.any():
        raise NearfarError(f"{folder}: no pair of {split} has one of {', '.join(wanted)}.")
    kept = predictions.truth[rows]
    images = [image for image, row in zip(predictions.image, rows, strict=True) if row]
    constant = int(np.bincount(kept).argmax())
    estimates: dict[str, Estimate] = {}
    for words, choice in (("all_classes", None), ("these_classes", among)):
        fused = {
            metric: classes[rows]
            for metric, classes in predictions.classes(choice).items()
            if metric == FUSED
        }
        renamed = {
            f"{metric.removesuffix('/accuracy')}_{words}/accuracy": classes
            for metric, classes in fused.items()
        }
        estimates |= score_predictions(renamed, kept, images, predictions.relations, constant).estimates
    return estimates


def pool(runs: Sequence[Path], bootstrap: int = 1000) -> tuple[Scores, list[dict[str, object]]]:
    """Cross-validation: every pair is scored by the model whose training did not have its picture.

    Returns the scores, and paired differences of the fused probe from each control, on all pairs and on those with a
    photo.
    """
    predictions = Predictions.pooled([Predictions.load(path, "test") for path in runs])
    constant = int(np.bincount(predictions.truth).argmax())
    classes = predictions.classes() | {"majority/accuracy": np.full_like(predictions.truth, constant)}
    pooled = score_predictions(
        classes,
        predictions.truth,
        predictions.image,
        predictions.relations,
        constant,
        detailed=(FUSED,),
        bootstrap=bootstrap,
    )
    kinds: list[tuple[str, Scores]] = [("", pooled)]
    if predictions.has_pixels.any() and not predictions.has_pixels.all():
        renamed = {f"with_photo/{metric}": classes for metric, classes in classes.items()}
        with_photo = score_predictions(
            renamed,
            predictions.truth,
            predictions.image,
            predictions.relations,
            constant,
            rows=predictions.has_pixels,
            bootstrap=bootstrap,
        )
        pooled.estimates |= with_photo.estimates
        pooled.per_image |= with_photo.per_image
        kinds.append(("with_photo/", pooled))
    return pooled, [row for prefix, part in kinds for row in differences(part, prefix)]


def differences(scores: Scores, prefix: str = "") -> list[dict[str, object]]:
    """The fused probe minus each control on the same pairs."""
    rows: list[dict[str, object]] = []
    for control in (*CONTROLS, "majority"):
        metric, other = f"{prefix}{FUSED}", f"{prefix}{control}/accuracy"
        if other not in scores.per_image:
            continue
        difference = scores.difference(metric, other)
        rows.append(
            {
                "pairs": "with a photo" if prefix else "all",
                "minus": control.replace("_", " "),
                "difference": difference.value,
                "low": difference.low,
                "high": difference.high,
                "verdict": difference.verdict,
            }
        )
    return rows
