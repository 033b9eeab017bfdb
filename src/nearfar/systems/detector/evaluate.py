"""Boxes of a split as the metrics take them: true ones, found ones, and one box that is the same for every picture."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from nearfar.data.coco import CocoSplit
from nearfar.metrics.detection import Boxes
from nearfar.systems.detector.data import relative_boxes

__all__ = ["constant_boxes", "found_boxes", "true_boxes"]


def true_boxes(split: CocoSplit) -> Boxes:
    """The true boxes of a split, crowds and groups with them, in pixels of its pictures."""
    corners = np.concatenate([split.boxes[:, :2], split.boxes[:, :2] + split.boxes[:, 2:]], axis=1)
    return Boxes(corners, split.label, split.image, crowd=split.crowd, group=split.group)


def found_boxes(split: CocoSplit, outputs: Mapping[str, Tensor]) -> Boxes:
    """What was found in each picture of a split: ``boxes`` (n, q, 4) as shares of it, ``scores`` and ``labels``."""
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
