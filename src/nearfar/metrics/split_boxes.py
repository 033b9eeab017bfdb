"""Boxes of a split of pictures, as the metrics of detection take them: true ones, predicted ones, a constant one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from nearfar.data.coco import CocoSplit
from nearfar.data.true_boxes import relative_boxes
from nearfar.metrics.detection import Boxes

__all__ = ["constant_boxes", "detection_boxes", "ordered", "predicted_boxes", "true_boxes"]


def true_boxes(split: CocoSplit) -> Boxes:
    """The true boxes of a split, crowds and groups with them, in pixels of its pictures."""
    corners = np.concatenate([split.boxes[:, :2], split.boxes[:, :2] + split.boxes[:, 2:]], axis=1)
    return Boxes(corners, split.label, split.image, crowd=split.crowd, group=split.group)


def predicted_boxes(split: CocoSplit, outputs: Mapping[str, Tensor]) -> Boxes:
    """Predicted boxes of each picture of a split: ``boxes`` (n, q, 4) as shares of it, ``scores`` and ``labels``."""
    boxes = outputs["boxes"].double().numpy()
    n, q = boxes.shape[:2]
    return Boxes(
        (boxes * _sides(split)[:, None]).reshape(n * q, 4),
        outputs["labels"].numpy().reshape(-1),
        np.repeat(np.arange(n), q),
        scores=outputs["scores"].double().numpy().reshape(-1),
    )


def constant_boxes(train: CocoSplit, split: CocoSplit) -> Boxes:
    """The mean training box, of the commonest class, in every picture of ``split``, all scored alike."""
    label = int(np.bincount(train.label).argmax())
    parts = [relative_boxes(train, i) for i in range(len(train))]
    mean = np.concatenate([boxes[labels == label] for boxes, labels in parts]).mean(axis=0)
    n = len(split)
    return Boxes(mean * _sides(split), np.full(n, label), np.arange(n), scores=np.ones(n))


def _sides(split: CocoSplit) -> np.ndarray:
    return np.array([[i.width, i.height, i.width, i.height] for i in split.images], np.float64)


def ordered(true: Boxes, names: tuple[str, ...], groups: tuple[str, str]) -> Boxes:
    """The same boxes with their groups as positions in ``groups`` instead of ``names``."""
    assert true.group is not None
    place = np.array([groups.index(name) for name in names] + [-1])
    return replace(true, group=place[true.group])


def detection_boxes(detections: Tensor, split: CocoSplit) -> Boxes:
    """Detections (n, queries, 6) of a split: corners as shares of the picture, score, position of the category."""
    parts = {
        "boxes": detections[..., :4],
        "scores": detections[..., 4:5],
        "labels": detections[..., 5:].long(),
    }
    return predicted_boxes(split, parts)
