"""The same numbers from a maintained COCO evaluator (``faster-coco-eval``), to check our own against."""

from __future__ import annotations

import numpy as np

from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.metrics.detection import Boxes

__all__ = ["check_evidence", "evaluator_scores"]

_SIDE = 100_000  # of pictures for the evaluator, which only looks at boxes
_ELSEWHERE = 1e12  # an area out of every range: the evaluator ignores a box of it


def evaluator_scores(detections: Boxes, true: Boxes, n: int, group: int | None = None) -> dict[str, float]:
    """``AP``, ``AP50``, ``AP75``, ``AR`` of faster-coco-eval; with ``group`` of the pictures with a box of that group,
    where boxes of others are ignored. NaN where there is no true box."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise NearfarError(
            "the COCO evaluator needs faster-coco-eval: pip install 'nearfar[detector]'."
        ) from None
    pictures = range(n) if group is None else sorted(_pictures_of(true, group))
    names = ("AP", "AP50", "AP75", "AR")
    if not len(true) or not pictures:
        return dict.fromkeys(names, float("nan"))
    truth = COCO(_dataset(true, detections, n, group), print_function=_silent)
    evaluator = COCOeval_faster(truth, truth.loadRes(_results(detections)), "bbox", print_function=_silent)
    evaluator.params.imgIds = [picture + 1 for picture in pictures]
    evaluator.params.areaRng = [[0, _ELSEWHERE / 10]]
    evaluator.params.areaRngLbl = ["all"]
    evaluator.evaluate()
    evaluator.accumulate()
    precision, recall = (evaluator.eval[name] for name in ("precision", "recall"))
    last = (0, -1)  # the only range of areas, the most detections
    return {
        "AP": _mean(precision[(..., *last)]),
        "AP50": _mean(precision[(0, slice(None), slice(None), *last)]),
        "AP75": _mean(precision[(5, slice(None), slice(None), *last)]),
        "AR": _mean(recall[(..., *last)]),
    }


def check_evidence(
    detections: Boxes,
    true: Boxes,
    n: int,
    groups: tuple[str, ...],
    own: dict[str, float],
    tolerance: float = 1e-9,
) -> float:
    """The largest difference between ``own`` scores, by the names of ``DetectionEvidence``, and the evaluator's.

    Raises:
        NearfarError: one differs by more than ``tolerance``: a defect here, or a different definition there.
    """
    theirs = evaluator_scores(detections, true, n)
    for position, name in enumerate(groups):
        scores = evaluator_scores(detections, true, n, position)
        theirs |= {f"{metric}/{name}": value for metric, value in scores.items()}
    far = 0.0
    for name, value in theirs.items():
        if np.isnan(value) and np.isnan(own[name]):
            continue
        far = max(far, abs(own[name] - value))
        if not abs(own[name] - value) <= tolerance:
            raise NearfarError(
                f"{name} is {own[name]:.9f} here and {value:.9f} by faster-coco-eval. Please report this; "
                "check_evaluator=false goes on without the check."
            )
    return far


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else float("nan")


def _pictures_of(true: Boxes, group: int) -> set[int]:
    assert true.group is not None
    return set(true.picture[true.group == group].tolist())


def _dataset(true: Boxes, detections: Boxes, n: int, group: int | None) -> Json:
    labels = np.unique(np.concatenate([true.labels, detections.labels])).tolist()
    other = np.zeros(len(true), bool) if group is None or true.group is None else true.group != group
    crowd = np.zeros(len(true), bool) if true.crowd is None else true.crowd
    return {
        "images": [{"id": i + 1, "width": _SIDE, "height": _SIDE} for i in range(n)],
        "categories": [{"id": label + 1, "name": str(label)} for label in labels],
        "annotations": [
            {
                "id": k + 1,  # 0 would count as unmatched
                "image_id": int(true.picture[k]) + 1,
                "category_id": int(true.labels[k]) + 1,
                "bbox": _with_size(true.boxes[k]),
                "area": _ELSEWHERE if other[k] else 1.0,
                "iscrowd": int(crowd[k]),
            }
            for k in range(len(true))
        ],
    }


def _results(detections: Boxes) -> list[Json]:
    assert detections.scores is not None
    return [
        {
            "image_id": int(detections.picture[k]) + 1,
            "category_id": int(detections.labels[k]) + 1,
            "bbox": _with_size(detections.boxes[k]),
            "score": float(detections.scores[k]),
        }
        for k in range(len(detections))
    ]


def _with_size(box: np.ndarray) -> list[float]:
    left, top, right, bottom = (float(value) for value in box)
    return [left, top, right - left, bottom - top]


def _silent(*_: object, **__: object) -> None:
    pass
