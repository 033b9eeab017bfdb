"""What the report shows of a split: probes beside their controls, the confusion table, pairs with their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nearfar.systems.relations.evaluation import PAIR, Judged, confusion
from nearfar.systems.relations.pictures import examples
from nearfar.systems.relations.predictions import Predictions
from nearfar.systems.relations.records import Pairs
from nearfar.systems.relations.rescored import FUSED, differences
from nearfar.training.sections import Section, Table

__all__ = ["sections"]


def sections(pairs: Pairs, found: Predictions, judged: Judged) -> list[Section]:
    """Sections for ``report.html``."""
    relations = list(found.relations)
    said = found.said()[FUSED]
    shown = [
        Section(
            "Is it the views, or the boxes alone?",
            "The same probe on the fused embedding and on what it is made of. Differences are paired, and their "
            "intervals are over pictures.",
            [_controls(judged, prefix) for prefix in _kinds(judged)] + [_differences(judged)],
        ),
        Section(
            "Which relation is taken for which",
            "Rows are what is true, columns what the fused probe said.",
            [_confusion(found.truth, said, relations)],
        ),
    ]
    if PAIR in judged.estimates:
        e = judged.estimates[PAIR]
        row = [
            "own partner is nearest",
            e.value,
            e.low,
            e.high,
            e.chance,
            e.protocol["gallery"],
            e.protocol["pairs"],
        ]
        shown.append(
            Section(
                "Pair retrieval: another question",
                "Which of a batch of pairs of boxes belongs to these crops? An encoder that knows the relation and "
                "nothing else is bad at this, so that its number stands in no column with the probe's.",
                [Table(["", "share", "low", "high", "chance", "candidates", "pairs"], [row])],
            )
        )
    pictures = examples(pairs, found.truth, said, tuple(relations))
    shown.append(
        Section(
            "Pairs", "Subject red, object blue; up to two right and two wrong of each relation.", (), pictures
        )
    )
    return shown


def _kinds(judged: Judged) -> list[str]:
    return [prefix for prefix in ("", "with_photo/") if f"{prefix}{FUSED}" in judged.estimates]


def _controls(judged: Judged, prefix: str) -> Table:
    names = {
        "fused embedding, RBF-SVM": FUSED,
        "fused embedding, linear": "linear_probe/accuracy",
        "untrained encoder": "untrained/accuracy",
        "raw features": "raw_features/accuracy",
        "boxes alone": "spatial_only/accuracy",
        "numbers of the boxes, nothing learned": "numbers_only/accuracy",
        "pixels alone": "visual_only/accuracy",
        "names alone": "categories_only/accuracy",
    }
    rows: list[list[Any]] = []
    for words, metric in names.items():
        e = judged.estimates.get(f"{prefix}{metric}")
        if e is not None:
            rows.append([words, e.value, e.low, e.high])
    e = judged.estimates[f"{prefix}{FUSED}"]
    rows.append(["always the most frequent relation", e.chance, None, None])
    which = "pairs with a photo" if prefix else "all pairs"
    return Table(["", "accuracy", "low", "high"], rows, f"{which}: {e.protocol['pairs']} in {e.n} pictures")


def _differences(judged: Judged) -> Table:
    rows = [
        [f"fused − {row['minus']}", row["pairs"], row["difference"], row["low"], row["high"], row["verdict"]]
        for prefix in _kinds(judged)
        for row in differences(judged, prefix)
    ]
    return Table(["", "pairs", "difference in accuracy", "low", "high", "the fused probe is"], rows)


def _confusion(truth: np.ndarray, said: np.ndarray, relations: Sequence[str]) -> Table:
    table = confusion(said, truth, len(relations))
    rows = [[name, *counts.tolist()] for name, counts in zip(relations, table, strict=True)]
    return Table(["true ↓ said →", *relations], rows, shaded=True)
