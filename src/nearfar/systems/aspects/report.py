"""Answers of an aspect run: those for new reviews, and the sections of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from nearfar.data.files import Json, Maybe, read_json, write_json
from nearfar.data.reviews.labels import POLARITIES, LabelScheme
from nearfar.errors import NearfarError
from nearfar.metrics import Estimate
from nearfar.metrics.aspect_scores import Decision, polarity_weights
from nearfar.metrics.classification import calibration_counts, class_counts
from nearfar.training.sections import Section, Table

__all__ = [
    "SCHEME_FILE",
    "answer_columns",
    "baseline_section",
    "calibration_section",
    "confusion_section",
    "hardest_section",
    "read_decision",
    "read_scheme",
    "write_scheme",
]


SCHEME_FILE = "aspects.json"
_DECISION = {"kind": str, "thresholds": {str: float}, "polarity_weights": Maybe({str: [float]})}


def answer_columns(
    scheme: LabelScheme, decision: Decision, probabilities: Float[ndarray, "n a c"]
) -> dict[str, list[object]]:
    """The aspects of each review and their polarity as columns of a table.

    ``aspects`` lists what is mentioned, as in ``BATTERY#Positive;CAMERA#Negative``. For each aspect follow ``polarity``
    (empty where it is not mentioned), the probability that it is ``mentioned``, and those of ``negative``, ``neutral``
    and ``positive``, which add up to that of the mention. What counts as mentioned, and which polarity is answered, is
    ``decision``'s: an answer need not be the most probable.

    >>> scheme = LabelScheme.of(["CAMERA"], np.array([[3], [1]]))
    >>> columns = answer_columns(scheme, Decision.plain(1), np.array([[[0.25, 0.25, 0.0, 0.5]], [[0.75, 0, 0, 0.25]]]))
    >>> columns["aspects"], columns["CAMERA polarity"], columns["CAMERA mentioned"], columns["CAMERA positive"]
    (['CAMERA#Positive', ''], ['positive', ''], [0.75, 0.25], [0.5, 0.25])
    """
    codes = decision.codes(probabilities)
    words = np.array(["", *POLARITIES], dtype=object)[codes]
    columns: dict[str, list[object]] = {
        "aspects": [
            ";".join(
                f"{name}#{word.capitalize()}" for name, word in zip(scheme.aspects, row, strict=True) if word
            )
            for row in words
        ]
    }
    for a, name in enumerate(scheme.aspects):
        columns[f"{name} polarity"] = words[:, a].tolist()
        columns[f"{name} mentioned"] = (1.0 - probabilities[:, a, 0]).tolist()
        for kind, polarity in enumerate(POLARITIES, start=1):
            columns[f"{name} {polarity}"] = probabilities[:, a, kind].tolist()
    return columns


def write_scheme(folder: Path, scheme: LabelScheme, decision: Decision) -> None:
    """Write aspects, their pairs with polarities, thresholds and weights of polarities to ``aspects.json``."""
    kept = {
        "aspects": list(scheme.aspects),
        "pairs": scheme.pair_names,
        "decision": decision.to_dict(scheme.aspects),
    }
    write_json(folder / SCHEME_FILE, kept)


def read_scheme(folder: Path, logit_adjustment: float) -> tuple[LabelScheme, Decision]:
    """The aspects of a run and its decision.

    A run of version 0.1 has them in ``dataset_layout.json`` and ``metrics.json``. One that was never evaluated has
    chosen no thresholds: an aspect is then mentioned from a probability of one half on; ``logit_adjustment`` weighs
    the polarities by their counts in training, as the run would have.
    """
    if (folder / SCHEME_FILE).is_file():
        kept = read_json(folder / SCHEME_FILE, {"aspects": [str], "pairs": [str], "decision": _DECISION})
        scheme = _scheme(kept["aspects"], kept["pairs"], folder / SCHEME_FILE)
        return scheme, _decision(kept["decision"], scheme.aspects, folder / SCHEME_FILE)
    path = folder / "dataset_layout.json"
    if not path.is_file():
        raise NearfarError(
            f"{folder}: neither {SCHEME_FILE} nor dataset_layout.json is here, which name the aspects of this model. "
            "Copy the whole folder of the run."
        )
    shape = {"aspects": [str], "pairs": [str], "splits": {str: dict}}
    layout = read_json(path, shape)
    scheme = _scheme(layout["aspects"], layout["pairs"], path)
    decision = read_decision(folder, scheme)
    if decision is None:
        mentions = layout["splits"].get("train", {}).get("mentions", {})
        try:
            counts = [[int(mentions[name][word]) for word in POLARITIES] for name in scheme.aspects]
        except (KeyError, TypeError, ValueError):
            raise NearfarError(f"{path}: the mentions of its training reviews are missing.") from None
        weights = polarity_weights(np.array(counts, dtype=np.int64), logit_adjustment)
        decision = Decision.plain(len(scheme.aspects), weights)
    return scheme, decision


def read_decision(folder: Path, scheme: LabelScheme) -> Decision | None:
    """The decision in the ``metrics.json`` of a run or an ensemble; None where it has none yet."""
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    return _decision(read_json(path, {"decision": _DECISION})["decision"], scheme.aspects, path)


def _scheme(aspects: Sequence[str], pairs: Sequence[str], path: Path) -> LabelScheme:
    place = {name: a for a, name in enumerate(aspects)}
    numbers = []
    for pair in pairs:
        name, _, word = pair.rpartition(" ")
        if name not in place or word not in POLARITIES:
            raise NearfarError(f"{path}: the pair {pair!r} is of none of its aspects.")
        numbers.append((place[name], 1 + POLARITIES.index(word)))
    return LabelScheme(tuple(aspects), tuple(numbers))


def _decision(kept: Json, aspects: Sequence[str], path: Path) -> Decision:
    weights = kept.get("polarity_weights")
    for what, given in (("thresholds", kept["thresholds"]), ("polarity_weights", weights)):
        if given is not None and set(given) != set(aspects):
            raise NearfarError(f"{path}: its {what} are not those of the aspects {', '.join(aspects)}.")
    if weights is not None and any(len(weights[name]) != len(POLARITIES) for name in aspects):
        raise NearfarError(f"{path}: polarity_weights has to hold {len(POLARITIES)} numbers for each aspect.")
    return Decision(
        kept["kind"],
        tuple(float(kept["thresholds"][name]) for name in aspects),
        str(kept.get("chosen_on") or ""),
        None if weights is None else tuple(tuple(map(float, weights[name])) for name in aspects),
    )


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
