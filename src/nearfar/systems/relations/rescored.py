"""A trained run judged again: on some of its relations (re-scoring), or on the test sets of all folds together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.errors import NearfarError
from nearfar.metrics import Estimate
from nearfar.systems.relations.blocks import FUSED
from nearfar.systems.relations.evaluation import Judged, judge
from nearfar.systems.relations.names import chosen_relations
from nearfar.systems.relations.predictions import Predictions
from nearfar.training.run_folder import RunFolder

__all__ = ["pool", "rescore"]

CONTROLS = ("spatial_only", "visual_only", "categories_only", "raw_features", "numbers_only", "untrained")


def rescore(run: str | Path, relations: Any = "top5", split: str | None = None) -> dict[str, Estimate]:
    """An older model on the pairs of some of its relations: what fewer classes are worth without any training.

    "all classes": the classes to choose from stay what they were, and one outside ``relations`` is wrong. "these
    classes": the best of ``relations`` alone. A new model on these relations has to beat the second.

    Raises ``NearfarError`` for a run of another system, or relations that it does not know.
    """
    folder = RunFolder(Path(run))
    split = split or ("test" if (folder.path / "predictions_test.npz").exists() else "val")
    found = Predictions.load(folder.path, split)
    wanted = chosen_relations(relations)
    unknown = [name for name in wanted if name not in found.relations]
    if unknown:
        raise NearfarError(
            f"{folder}: the model does not know {', '.join(unknown)}; it knows {', '.join(found.relations)}."
        )
    among = [list(found.relations).index(name) for name in wanted]
    rows = np.isin(found.truth, among)
    if not rows.any():
        raise NearfarError(f"{folder}: no pair of {split} has one of {', '.join(wanted)}.")
    kept = found.truth[rows]
    images = [image for image, row in zip(found.image, rows, strict=True) if row]
    constant = int(np.bincount(kept).argmax())
    out: dict[str, Estimate] = {}
    for words, choice in (("all_classes", None), ("these_classes", among)):
        said = {metric: classes[rows] for metric, classes in found.said(choice).items() if metric == FUSED}
        renamed = {
            f"{metric.removesuffix('/accuracy')}_{words}/accuracy": classes
            for metric, classes in said.items()
        }
        out |= judge(renamed, kept, images, found.relations, constant).estimates
    return out


def pool(runs: Sequence[Path], bootstrap: int = 1000) -> tuple[Judged, list[dict[str, Any]]]:
    """Cross-validation: every pair judged by the model that did not see its picture; with differences, paired.

    Returns what was judged, and rows of differences of the fused probe from each control, on all pairs and on those
    with a photo.
    """
    found = Predictions.pooled([Predictions.load(path, "test") for path in runs])
    constant = int(np.bincount(found.truth).argmax())
    said = found.said() | {"majority/accuracy": np.full_like(found.truth, constant)}
    judged = judge(
        said, found.truth, found.image, found.relations, constant, detailed=(FUSED,), bootstrap=bootstrap
    )
    kinds: list[tuple[str, Judged]] = [("", judged)]
    if found.seen.any() and not found.seen.all():
        some = {f"with_photo/{metric}": classes for metric, classes in said.items()}
        here = judge(
            some, found.truth, found.image, found.relations, constant, rows=found.seen, bootstrap=bootstrap
        )
        judged.estimates |= here.estimates
        judged.per_image |= here.per_image
        kinds.append(("with_photo/", judged))
    return judged, [row for prefix, part in kinds for row in differences(part, prefix)]


def differences(judged: Judged, prefix: str = "") -> list[dict[str, Any]]:
    """The fused probe minus each control on the same pairs."""
    rows = []
    for control in (*CONTROLS, "majority"):
        metric, other = f"{prefix}{FUSED}", f"{prefix}{control}/accuracy"
        if other not in judged.per_image:
            continue
        found = judged.difference(metric, other)
        rows.append(
            {
                "pairs": "with a photo" if prefix else "all",
                "minus": control.replace("_", " "),
                "difference": found.value,
                "low": found.low,
                "high": found.high,
                "verdict": found.verdict,
            }
        )
    return rows
