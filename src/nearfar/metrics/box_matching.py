"""Boxes of pictures, and the matching of detections with true boxes that average precision is counted from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from nearfar.arguments import numbers, whole_numbers
from nearfar.errors import NearfarError

__all__ = ["IOUS", "Boxes", "Ranking", "box_overlap", "rank_detections"]


IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100  # detections of a picture and class that count
_LEAST_IOU = 1e-10


@dataclass(frozen=True)
class Boxes:
    """Boxes of a split: (left, top, right, bottom) in pixels, labels, and which picture each is in.

    True boxes may be ``crowd`` (a detection inside one is neither right nor wrong) and have a ``group`` (−1: none);
    detections have ``scores``.
    """

    boxes: Float[ndarray, "m 4"]
    labels: Int[ndarray, " m"]
    picture: Int[ndarray, " m"]
    scores: Float[ndarray, " m"] | None = None
    crowd: Bool[ndarray, " m"] | None = None
    group: Int[ndarray, " m"] | None = None

    def __post_init__(self) -> None:
        boxes = numbers("boxes", self.boxes, finite=False)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            if boxes.size:
                raise NearfarError(f"boxes have shape {boxes.shape}: (boxes, 4) is needed")
            boxes = np.zeros((0, 4))
        m = len(boxes)
        object.__setattr__(self, "boxes", boxes)
        for name in ("labels", "picture", "scores", "crowd", "group"):
            values = getattr(self, name)
            if values is None and name in ("scores", "crowd", "group"):
                continue
            if name == "scores":
                values = numbers(name, values, finite=False)
            elif name == "crowd":
                values = numbers(name, values)
                if not ((values == 0) | (values == 1)).all():
                    raise NearfarError("crowd holds other values than True and False")
                values = values.astype(bool)
            else:
                values = whole_numbers(name, values)
            object.__setattr__(self, name, values)
            if values.shape != (m,):
                raise NearfarError(f"{name} have shape {values.shape}: one for each of {m} boxes is needed")
        every = [self.boxes] if self.scores is None else [self.boxes, self.scores]
        if not all(np.isfinite(array).all() for array in every):
            raise NearfarError("boxes and scores must be finite: did the detector diverge?")

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class Ranking:
    """One class's detections in the order of their scores: whose picture, and at each IoU whether right or ignored."""

    picture: Int[ndarray, " d"]
    hit: Bool[ndarray, "t d"]
    ignored: Bool[ndarray, "t d"]
    positives: Float[ndarray, " n"]

    def curves(self, weights: Float[ndarray, "r n"]) -> tuple[Float[ndarray, "r t"], Float[ndarray, "r t"]]:
        """Average precision and largest recall at each IoU; NaN where no picture with a true box counts."""
        precision = np.full((len(weights), len(self.hit)), np.nan)
        recall = precision.copy()
        positives = weights @ self.positives
        counted = positives > 0
        weights, positives = weights[counted], positives[counted, None]
        each = weights[:, self.picture]
        for t, (hit, ignored) in enumerate(zip(self.hit, self.ignored, strict=True)):
            # Recall moves at hits alone, and the best precision from a hit on is that of a hit: they are enough.
            kept = each * ~ignored if ignored.any() else each
            at = np.flatnonzero(hit)
            precision[counted, t], recall[counted, t] = _area(
                kept.cumsum(axis=1)[:, at], each[:, at], positives
            )
        return precision, recall


def _area(
    kept: Float[ndarray, "r h"], hits: Float[ndarray, "r h"], positives: Float[ndarray, "r 1"]
) -> tuple[Float[ndarray, " r"], Float[ndarray, " r"]]:
    """The mean over 101 recalls of the best precision at that recall or a larger one, and the largest recall."""
    if not hits.shape[1]:
        return np.zeros(len(hits)), np.zeros(len(hits))
    right = hits.cumsum(axis=1)
    recall = right / positives
    exact = np.divide(right, kept, out=np.zeros_like(right), where=kept > 0)
    best = np.maximum.accumulate(exact[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(RECALLS, recall, side="right")
    new = np.diff(reached, axis=1, prepend=0)
    return (new * best).sum(axis=1) / len(RECALLS), recall[:, -1]


def rank_detections(
    detections: Boxes,
    true: Boxes,
    n: int,
    ignored: Bool[ndarray, " m"],
    a: Int[ndarray, " i"],
    b: Int[ndarray, " j"],
) -> Ranking:
    """Detections ``a`` and true boxes ``b`` of one class, picture by picture, then in the order of their scores."""
    assert detections.scores is not None
    a = a[
        np.lexsort((np.arange(len(a)), -detections.scores[a], detections.picture[a]))
    ]  # in a picture: best first
    b = b[np.argsort(true.picture[b], kind="stable")]
    starts_a, starts_b = (
        np.searchsorted(boxes.picture[rows], np.arange(n + 1)) for boxes, rows in ((detections, a), (true, b))
    )
    crowd = np.zeros(len(true), bool) if true.crowd is None else true.crowd
    kept, hits, ignores = [], [], []
    for i in range(n):
        mine = a[starts_a[i] : starts_a[i + 1]][:MOST]
        if not len(mine):
            continue
        theirs = b[starts_b[i] : starts_b[i + 1]]
        hit, ignore = _match_picture(
            detections.boxes[mine], true.boxes[theirs], ignored[theirs], crowd[theirs]
        )
        kept.append(mine)
        hits.append(hit)
        ignores.append(ignore)
    positives = np.bincount(true.picture[b[~ignored[b]]], minlength=n).astype(np.float64)
    if not kept:
        none = np.zeros((len(IOUS), 0), bool)
        return Ranking(np.zeros(0, np.int64), none, none, positives)
    every = np.concatenate(kept)
    order = np.argsort(-detections.scores[every], kind="stable")
    return Ranking(
        detections.picture[every][order],
        np.concatenate(hits, axis=1)[:, order],
        np.concatenate(ignores, axis=1)[:, order],
        positives,
    )


def _match_picture(
    detections: Float[ndarray, "k 4"],
    true: Float[ndarray, "m 4"],
    ignored: Bool[ndarray, " m"],
    crowd: Bool[ndarray, " m"],
) -> tuple[Bool[ndarray, "t k"], Bool[ndarray, "t k"]]:
    """At each IoU the detections, best first, each take the free true box they fit best; then an ignored one."""
    hit = np.zeros((len(IOUS), len(detections)), bool)
    ignore = hit.copy()
    if not len(true):
        return hit, ignore
    overlap = box_overlap(detections, true, crowd)
    least = np.minimum(IOUS, 1 - _LEAST_IOU)[:, None]
    taken = np.zeros((len(IOUS), len(true)), bool)
    rows = np.arange(len(IOUS))
    for k in np.flatnonzero(overlap.max(axis=1) >= IOUS[0] - 1e-9):
        fits = (overlap[k] >= least) & (~taken | crowd)
        # Where two fit equally well the evaluator takes the later one.
        own = np.where(fits & ~ignored, overlap[k], -1.0)[:, ::-1]
        other = np.where(fits & ignored, overlap[k], -1.0)[:, ::-1]
        last = len(true) - 1
        first, second = last - own.argmax(axis=1), last - other.argmax(axis=1)
        hit[:, k] = own.max(axis=1) >= 0
        ignore[:, k] = ~hit[:, k] & (other.max(axis=1) >= 0)
        chosen = np.where(hit[:, k], first, second)
        matched = hit[:, k] | ignore[:, k]
        taken[rows[matched], chosen[matched]] = True
    return hit, ignore


def box_overlap(
    detections: Float[ndarray, "k 4"], true: Float[ndarray, "m 4"], crowd: Bool[ndarray, " m"] | None = None
) -> Float[ndarray, "k m"]:
    """IoU of boxes given by their corners; of a crowd, the share of the detection inside it."""
    detections, true = (numbers(name, boxes) for name, boxes in (("detections", detections), ("true", true)))
    for name, boxes in (("detections", detections), ("true", true)):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise NearfarError(f"{name} has shape {boxes.shape}: (boxes, 4) is needed")
    crowd = np.zeros(len(true), bool) if crowd is None else numbers("crowd", crowd) != 0
    if crowd.shape != (len(true),):
        raise NearfarError(f"crowd has shape {crowd.shape}: one for each of {len(true)} true boxes is needed")
    low = np.maximum(detections[:, None, :2], true[None, :, :2])
    high = np.minimum(detections[:, None, 2:], true[None, :, 2:])
    shared = (high - low).clip(min=0).prod(axis=2)
    own, theirs = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (detections, true))
    union = np.where(crowd, own[:, None], own[:, None] + theirs - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
