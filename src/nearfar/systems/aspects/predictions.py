"""Aspects of new reviews: what a run keeps for them beside its encoder, and its answers as columns of a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from nearfar.data.files import Json, Maybe, read_json
from nearfar.data.reviews.labels import POLARITIES, LabelScheme
from nearfar.data.writing import write_json
from nearfar.errors import NearfarError
from nearfar.metrics.aspect_scores import Decision, polarity_weights

__all__ = [
    "SCHEME_FILE",
    "answer_columns",
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
