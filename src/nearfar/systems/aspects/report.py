"""Sections of the report of an aspect run: baselines, confusions, calibration, the reviews with the largest loss."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from nearfar.data.reviews.labels import POLARITIES, LabelScheme
from nearfar.metrics import Estimate
from nearfar.metrics.classification import calibration_counts, class_counts
from nearfar.training.sections import Section, Table

__all__ = ["baseline_section", "calibration_section", "confusion_section", "hardest_section"]

#: reviews shown with the largest loss, and characters of each
HARDEST, LONGEST = 20, 400
_CLASSES = ("not mentioned", *POLARITIES)


def baseline_section(
    estimates: Mapping[str, Estimate], linear: Mapping[str, Estimate], name: str, aspects: tuple[str, ...]
) -> Section:
    """Every metric of the run, the linear model and the best constant answer, overall and per aspect."""
    rows = [
        [
            metric.replace("/", " · ").replace("_", " "),
            *_cells(estimate),
            *_cells(linear.get(metric)),
            estimate.chance,
        ]
        for metric, estimate in estimates.items()
        if metric.count("/") < 2
    ]
    columns = ["", "this run", "95 % interval", name, "95 % interval", "constant"]
    per_aspect = []
    for aspect in aspects:
        cells: list[object] = [aspect]
        for kind in ("aspect", "sentiment"):
            metric = f"{kind}/F1/{aspect}"
            baseline = linear.get(metric)
            cells += [
                estimates[metric].value,
                None if baseline is None else baseline.value,
                estimates[metric].chance,
            ]
        per_aspect.append(cells)
    heads = [
        f"{kind} F1{what}" for kind in ("aspect", "sentiment") for what in ("", f", {name}", ", constant")
    ]
    return Section(
        "Beside the baselines",
        f"{name} was fitted on the same training reviews and answers the same rows. Constant: the best answer that is "
        "the same for every review. The metric called misleading is high for a model that always answers neutral.",
        [
            Table(columns, rows),
            Table(
                ["aspect", *heads], per_aspect, caption="F1 of single aspects; sentiment over its polarities"
            ),
        ],
    )


def _cells(estimate: Estimate | None) -> list[object]:
    return (
        [None, None] if estimate is None else [estimate.value, f"[{estimate.low:.3f}, {estimate.high:.3f}]"]
    )


def confusion_section(
    truth: Int[ndarray, "n a"], answers: Int[ndarray, "n a"], scheme: LabelScheme
) -> Section:
    """Confusion tables: all aspects together, then counts of mistakes and recall by aspect."""
    known = truth >= 0
    size = scheme.classes
    together = np.zeros((size, size), dtype=np.int64)
    np.add.at(together, (truth[known], answers[known]), 1)
    rows = [[f"truly {_CLASSES[i]}", *together[i].tolist()] for i in range(size)]
    tables = [Table(["", *_CLASSES], rows, caption="all aspects together; columns: the answers", shaded=True)]
    counts = class_counts(truth, answers, size).sum(axis=0)
    each = []
    for a, aspect in enumerate(scheme.aspects):
        mentioned = truth[:, a] > 0
        answer = answers[:, a]
        missed = int((mentioned & (answer == 0)).sum())
        wrong = int((mentioned & (answer > 0) & (answer != truth[:, a])).sum())
        invented = int(((truth[:, a] == 0) & (answer > 0)).sum())
        recalls = [_share(counts[a, k, 0], counts[a, k, 0] + counts[a, k, 2]) for k in range(1, size)]
        each.append([aspect, int(mentioned.sum()), missed, invented, wrong, *recalls])
    columns = [
        "aspect",
        "mentioned",
        "missed",
        "invented",
        "wrong polarity",
        *(f"{p} recall" for p in POLARITIES),
    ]
    tables.append(
        Table(columns, each, caption="recall: share of the reviews with that polarity that are answered so")
    )
    return Section("Confusions", "", tables)


def calibration_section(truth: Int[ndarray, "n a"], probabilities: Float[ndarray, "n a c"]) -> Section:
    """Accuracy of the most probable class by its probability."""
    right = probabilities.argmax(axis=-1) == truth
    sums = calibration_counts(probabilities.max(axis=-1), right, truth >= 0, bins=10).sum(axis=0)
    rows = [
        [f"{b / 10:.1f} to {(b + 1) / 10:.1f}", int(n), confidence / n, hits / n]
        for b, (n, confidence, hits) in enumerate(sums)
        if n
    ]
    return Section(
        "Calibration",
        "Decisions about all aspects by the probability of their most probable class.",
        [Table(["probability", "decisions", "mean probability", "right"], rows)],
    )


def hardest_section(
    texts: list[str],
    truth: Int[ndarray, "n a"],
    probabilities: Float[ndarray, "n a c"],
    answers: Int[ndarray, "n a"],
    scheme: LabelScheme,
) -> Section:
    """The reviews with the largest loss and their wrong answers: mistakes of the model, or of the labels."""
    known = truth >= 0
    true = np.take_along_axis(probabilities, np.maximum(truth, 0)[..., None], axis=-1)[..., 0]
    loss = np.where(known, -np.log(np.maximum(true, 1e-12)), 0.0).sum(axis=1)
    rows = []
    for i in np.argsort(-loss, kind="stable")[:HARDEST]:
        wrong = np.flatnonzero(known[i] & (truth[i] != answers[i]))
        mistakes = "; ".join(_wrong(scheme.aspects[a], truth[i, a], answers[i, a], true[i, a]) for a in wrong)
        text = texts[i] if len(texts[i]) <= LONGEST else texts[i][:LONGEST] + "…"
        rows.append([text, loss[i], mistakes or "nothing, by a narrow margin"])
    return Section(
        "Reviews with the largest loss",
        "Cross-entropy over all aspects, in nats. Some are mistakes of the model, some of the labels.",
        [Table(["review", "loss", "wrong: label → answer (probability of the label)"], rows)],
    )


def _wrong(aspect: str, truth: int, answer: int, probability: float) -> str:
    return f"{aspect}: {_CLASSES[truth]} → {_CLASSES[answer]} ({probability:.2g})"


def _share(a: float, b: float) -> float | None:
    return float(a / b) if b else None
