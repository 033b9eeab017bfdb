"""What a report shows of an aspect run beside the estimates: baselines, confusions, calibration, the worst reviews."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from nearfar.metrics import Estimate
from nearfar.metrics.classification import calibration_counts, class_counts
from nearfar.systems.aspects.labels import POLARITIES, LabelScheme
from nearfar.training.sections import Section, Table

__all__ = ["baseline_section", "calibration_section", "confusion_section", "hardest_section"]

#: reviews shown with the largest loss, and characters of each
HARDEST, LONGEST = 20, 400
_CLASSES = ("not mentioned", *POLARITIES)


def baseline_section(
    estimates: Mapping[str, Estimate], linear: Mapping[str, Estimate], name: str, aspects: tuple[str, ...]
) -> Section:
    """Every metric of the run beside the linear model and the best constant answer, overall and per aspect."""
    rows = [
        [
            metric.replace("/", " · ").replace("_", " "),
            *_cells(found),
            *_cells(linear.get(metric)),
            found.chance,
        ]
        for metric, found in estimates.items()
        if metric.count("/") < 2
    ]
    columns = ["", "this run", "95 % interval", name, "95 % interval", "constant"]
    per_aspect = []
    for aspect in aspects:
        cells: list[object] = [aspect]
        for kind in ("aspect", "sentiment"):
            metric = f"{kind}/F1/{aspect}"
            beside = linear.get(metric)
            cells += [
                estimates[metric].value,
                None if beside is None else beside.value,
                estimates[metric].chance,
            ]
        per_aspect.append(cells)
    heads = [
        f"{kind} F1{what}" for kind in ("aspect", "sentiment") for what in ("", f", {name}", ", constant")
    ]
    return Section(
        "Beside the baselines",
        f"{name} was fitted on the same training reviews and answers the same rows. Constant: the best answer that is "
        "the same for every review. The metric called misleading is high for whoever says neutral.",
        [
            Table(columns, rows),
            Table(
                ["aspect", *heads], per_aspect, caption="F1 of single aspects; sentiment over its polarities"
            ),
        ],
    )


def _cells(found: Estimate | None) -> list[object]:
    return [None, None] if found is None else [found.value, f"[{found.low:.3f}, {found.high:.3f}]"]


def confusion_section(truth: Int[ndarray, "n a"], found: Int[ndarray, "n a"], scheme: LabelScheme) -> Section:
    """What was said of what was so: all aspects together, then what each aspect is taken for."""
    known = truth >= 0
    size = scheme.classes
    together = np.zeros((size, size), dtype=np.int64)
    np.add.at(together, (truth[known], found[known]), 1)
    rows = [[f"truly {_CLASSES[i]}", *together[i].tolist()] for i in range(size)]
    tables = [
        Table(["", *_CLASSES], rows, caption="all aspects together; columns: what was said", shaded=True)
    ]
    counts = class_counts(truth, found, size).sum(axis=0)
    each = []
    for a, aspect in enumerate(scheme.aspects):
        mentioned = truth[:, a] > 0
        said = found[:, a]
        missed = int((mentioned & (said == 0)).sum())
        wrong = int((mentioned & (said > 0) & (said != truth[:, a])).sum())
        invented = int(((truth[:, a] == 0) & (said > 0)).sum())
        recalls = [_share(counts[a, k, 0], counts[a, k, 0] + counts[a, k, 2]) for k in range(1, size)]
        each.append([aspect, int(mentioned.sum()), missed, invented, wrong, *recalls])
    columns = [
        "aspect",
        "mentioned",
        "missed",
        "invented",
        "wrong polarity",
        *(f"{p} found" for p in POLARITIES),
    ]
    tables.append(Table(columns, each, caption="the last three: share of the reviews with that polarity"))
    return Section("Confusions", "", tables)


def calibration_section(truth: Int[ndarray, "n a"], probabilities: Float[ndarray, "n a c"]) -> Section:
    """How often what was most probable was right, by how probable it was."""
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
    found: Int[ndarray, "n a"],
    scheme: LabelScheme,
) -> Section:
    """The reviews with the largest loss, and what was wrong: mistakes of the model, and labels that may be mistakes."""
    known = truth >= 0
    true = np.take_along_axis(probabilities, np.maximum(truth, 0)[..., None], axis=-1)[..., 0]
    loss = np.where(known, -np.log(np.maximum(true, 1e-12)), 0.0).sum(axis=1)
    rows = []
    for i in np.argsort(-loss, kind="stable")[:HARDEST]:
        wrong = np.flatnonzero(known[i] & (truth[i] != found[i]))
        said = "; ".join(_wrong(scheme.aspects[a], truth[i, a], found[i, a], true[i, a]) for a in wrong)
        text = texts[i] if len(texts[i]) <= LONGEST else texts[i][:LONGEST] + "…"
        rows.append([text, loss[i], said or "nothing, by a narrow margin"])
    return Section(
        "Reviews with the largest loss",
        "Cross-entropy over all aspects, in nats. Some are mistakes of the model, some of the labels.",
        [Table(["review", "loss", "wrong: label → answer (probability of the label)"], rows)],
    )


def _wrong(aspect: str, truth: int, found: int, probability: float) -> str:
    return f"{aspect}: {_CLASSES[truth]} → {_CLASSES[found]} ({probability:.2g})"


def _share(a: float, b: float) -> float | None:
    return float(a / b) if b else None
