"""Average precision and recall of detections as COCO defines them, their gap between two groups, with intervals.

Detections and true boxes of a picture are matched once. What is left, hits and misses in the order of their scores,
gives AP and AR as a function of how often each picture counts: a resample is a row of weights, and nothing is matched
again. The matching follows the COCO evaluator (Lin et al., 2014); ``nearfar.metrics.detection_evaluator`` asks a
maintained one for the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from numpy.typing import NDArray

from nearfar.errors import NearfarError
from nearfar.metrics import arguments
from nearfar.metrics.arguments import described, instance, numbers, real, text, whole_numbers
from nearfar.metrics.estimate import Estimate
from nearfar.metrics.intervals import bootstrap_levels, check_confidence, normal_quantile

__all__ = [
    "IOUS",
    "Boxes",
    "Change",
    "DetectionEvidence",
    "box_overlap",
    "detection_change",
    "detection_estimates",
    "detection_evidence",
]


IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100  # detections of a picture and class that count
_LEAST_IOU = 1e-10
_CELLS = 1 << 22  # of weights times detections at a time


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
class _Ranking:
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
        there = positives > 0
        weights, positives = weights[there], positives[there, None]
        each = weights[:, self.picture]
        for t, (hit, ignored) in enumerate(zip(self.hit, self.ignored, strict=True)):
            # Recall moves at hits alone, and the best precision from a hit on is that of a hit: they are enough.
            kept = each * ~ignored if ignored.any() else each
            at = np.flatnonzero(hit)
            precision[there, t], recall[there, t] = _area(kept.cumsum(axis=1)[:, at], each[:, at], positives)
        return precision, recall


def _area(
    found: Float[ndarray, "r h"], hits: Float[ndarray, "r h"], positives: Float[ndarray, "r 1"]
) -> tuple[Float[ndarray, " r"], Float[ndarray, " r"]]:
    """The mean over 101 recalls of the best precision at that recall or a larger one, and the largest recall."""
    if not hits.shape[1]:
        return np.zeros(len(hits)), np.zeros(len(hits))
    right = hits.cumsum(axis=1)
    recall = right / positives
    exact = np.divide(right, found, out=np.zeros_like(right), where=found > 0)
    best = np.maximum.accumulate(exact[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(RECALLS, recall, side="right")
    new = np.diff(reached, axis=1, prepend=0)
    return (new * best).sum(axis=1) / len(RECALLS), recall[:, -1]


@dataclass(frozen=True)
class _Evidence:
    """Rankings of the classes that have true boxes."""

    rankings: list[_Ranking] = field(default_factory=list)

    def scores(self, weights: Float[ndarray, "r n"]) -> dict[str, NDArray[np.float64]]:
        """AP, AP50, AP75 and AR, each a mean over the classes that are there."""
        parts = [ranking.curves(weights) for ranking in self.rankings]
        if not parts:
            nothing = np.full(len(weights), np.nan)
            return dict.fromkeys(("AP", "AP50", "AP75", "AR"), nothing)
        precision = _mean_of_classes(np.stack([p for p, _ in parts]))
        recall = _mean_of_classes(np.stack([r for _, r in parts]))
        return {
            "AP": precision.mean(axis=1),
            "AP50": precision[:, 0],
            "AP75": precision[:, 5],
            "AR": recall.mean(axis=1),
        }


def _mean_of_classes(values: Float[ndarray, "k r t"]) -> Float[ndarray, "r t"]:
    there = ~np.isnan(values)
    count = there.sum(axis=0)
    total = np.where(there, values, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


@dataclass(frozen=True)
class DetectionEvidence:
    """What the matching left of n pictures: all that AP and AR need.

    ``strata``: the group of each picture, −1 for none; resamples keep their sizes. ``groups``: names of the two groups,
    or nothing; the gap is the score of the second less that of the first.
    """

    n: int
    strata: Int[ndarray, " n"]
    groups: tuple[str, ...]
    whole: _Evidence
    parts: dict[str, _Evidence]

    def statistics(self, weights: Float[ndarray, "r n"] | None = None) -> dict[str, NDArray[np.float64]]:
        """``AP``, ``AP50``, ``AP75``, ``AR``, the same with ``/GROUP`` and with ``/gap``, for each row of weights.

        A weight says how often a picture counts; without weights there is one row, in which each counts once.
        A number that no picture supports is NaN.
        """
        if weights is None:
            weights = np.ones((1, self.n))
        weights = numbers("weights", weights)
        if weights.ndim != 2 or weights.shape[1] != self.n:
            raise NearfarError(f"weights have shape {weights.shape}: (rows, {self.n} pictures) is needed")
        detections = max(1, max((len(r.picture) for r in self.whole.rankings), default=1))
        rows = max(1, _CELLS // detections)
        parts = [self._rows(weights[start : start + rows]) for start in range(0, max(1, len(weights)), rows)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _rows(self, weights: Float[ndarray, "r n"]) -> dict[str, NDArray[np.float64]]:
        found = self.whole.scores(weights)
        names = list(found)
        for group, evidence in self.parts.items():
            found |= {f"{name}/{group}": value for name, value in evidence.scores(weights).items()}
        if self.groups:
            low, high = self.groups
            found |= {f"{name}/gap": found[f"{name}/{high}"] - found[f"{name}/{low}"] for name in names}
        return found

    def resamples(self, rows: int, seed: int = 0) -> Float[ndarray, "r n"]:
        """Weights of bootstrap resamples of the pictures, each group among itself."""
        rows = arguments.whole("rows", rows)
        rng = np.random.default_rng(arguments.whole("seed", seed))
        weights = np.zeros((rows, self.n))
        for stratum in np.unique(self.strata):
            members = np.flatnonzero(self.strata == stratum)
            k = len(members)
            weights[:, members] = rng.multinomial(k, np.full(k, 1 / k), size=rows)
        return weights

    def item_values(self) -> dict[str, NDArray[np.float64]]:
        """For each statistic a value of every picture, of which it is the mean: what the jackknife leaves.

        v = θ + (n − 1) (θ − θ without the picture), moved so that the mean is θ; they are what
        ``Evaluation.per_item`` takes, as those of ``nearfar.metrics.item_values``. Statistics that do not exist are
        left out.
        """
        whole = self.statistics()
        without = self.statistics(1.0 - np.eye(self.n)) if self.n > 1 else whole
        found = {}
        for name, theta in whole.items():
            pull = theta[0] - without[name]
            pull = np.where(np.isfinite(pull), pull, 0.0)
            if np.isfinite(theta[0]):
                found[name] = theta[0] + (self.n - 1) * (pull - pull.mean())
        return found


def detection_evidence(
    found: Boxes,
    true: Boxes,
    n: int,
    groups: Sequence[str] = (),
) -> DetectionEvidence:
    """Match the detections of n pictures with the true boxes, once.

    The score of a group is that of the pictures with a true box of it, where boxes of others count neither as found nor
    as missed. Where each picture has one group, that is COCO's AP over the group's pictures.

    Args:
        found: detections; the 100 best of each picture and class count.
        true: true boxes; a class that has none is left out.
        n: how many pictures, those without boxes among them.
        groups: names of the two values of ``true.group``.

    >>> square = np.array([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    >>> zero, both = np.zeros(2, int), np.arange(2)
    >>> true = Boxes(square, zero, both)
    >>> found = Boxes(square + [[0], [4]], zero, both, scores=np.array([0.9, 0.8]))
    >>> scores = detection_evidence(found, true, 2).statistics()
    >>> float(scores["AP50"][0]), float(scores["AR"][0])
    (0.504..., 0.5)
    """
    instance("found", found, Boxes)
    instance("true", true, Boxes)
    n = arguments.whole("n", n, 1)
    if (
        isinstance(groups, (str, bytes))
        or not isinstance(groups, Sequence)
        or not all(isinstance(g, str) for g in groups)
    ):
        raise NearfarError(f"groups is {described(groups)}; two names are needed, or none")
    if found.scores is None:
        raise NearfarError("detections need scores")
    for name, boxes in (("found", found), ("true", true)):
        if len(boxes) and not 0 <= int(boxes.picture.min()) <= int(boxes.picture.max()) < n:
            raise NearfarError(f"{name}.picture must lie between 0 and {n - 1}")
    if groups and (len(set(groups)) != 2 or true.group is None):
        raise NearfarError(f"groups={tuple(groups)}: two names, and true boxes with a group, are needed")
    everything = np.zeros(len(true), bool) if true.crowd is None else true.crowd
    whole = _match(found, true, n, everything)
    parts, strata = {}, np.full(n, -1)
    if groups:
        assert true.group is not None
        for position, name in enumerate(groups):
            other = true.group != position
            inside = np.zeros(n, bool)
            inside[true.picture[~other]] = True
            parts[name] = _match(
                _in(found, inside), _in(true, inside), n, (everything | other)[inside[true.picture]]
            )
            mixed = np.zeros(n, bool)
            mixed[true.picture[other]] = True
            strata[inside & ~mixed] = position
    return DetectionEvidence(n, strata, tuple(groups), whole, parts)


def _in(boxes: Boxes, inside: Bool[ndarray, " n"]) -> Boxes:
    keep = inside[boxes.picture]
    optional = [None if v is None else v[keep] for v in (boxes.scores, boxes.crowd, boxes.group)]
    return Boxes(boxes.boxes[keep], boxes.labels[keep], boxes.picture[keep], *optional)


def _match(found: Boxes, true: Boxes, n: int, ignored: Bool[ndarray, " m"]) -> _Evidence:
    rankings = []
    for label in np.unique(true.labels[~ignored]):
        a, b = np.flatnonzero(found.labels == label), np.flatnonzero(true.labels == label)
        rankings.append(_rank(found, true, n, ignored, a, b))
    return _Evidence(rankings)


def _rank(
    found: Boxes,
    true: Boxes,
    n: int,
    ignored: Bool[ndarray, " m"],
    a: Int[ndarray, " i"],
    b: Int[ndarray, " j"],
) -> _Ranking:
    """Detections ``a`` and true boxes ``b`` of one class, picture by picture, then in the order of their scores."""
    assert found.scores is not None
    a = a[np.lexsort((np.arange(len(a)), -found.scores[a], found.picture[a]))]  # in a picture: best first
    b = b[np.argsort(true.picture[b], kind="stable")]
    starts_a, starts_b = (
        np.searchsorted(boxes.picture[rows], np.arange(n + 1)) for boxes, rows in ((found, a), (true, b))
    )
    crowd = np.zeros(len(true), bool) if true.crowd is None else true.crowd
    kept, hits, ignores = [], [], []
    for i in range(n):
        mine = a[starts_a[i] : starts_a[i + 1]][:MOST]
        if not len(mine):
            continue
        theirs = b[starts_b[i] : starts_b[i + 1]]
        hit, ignore = _match_picture(found.boxes[mine], true.boxes[theirs], ignored[theirs], crowd[theirs])
        kept.append(mine)
        hits.append(hit)
        ignores.append(ignore)
    positives = np.bincount(true.picture[b[~ignored[b]]], minlength=n).astype(np.float64)
    if not kept:
        none = np.zeros((len(IOUS), 0), bool)
        return _Ranking(np.zeros(0, np.int64), none, none, positives)
    every = np.concatenate(kept)
    order = np.argsort(-found.scores[every], kind="stable")
    return _Ranking(
        found.picture[every][order],
        np.concatenate(hits, axis=1)[:, order],
        np.concatenate(ignores, axis=1)[:, order],
        positives,
    )


def _match_picture(
    found: Float[ndarray, "k 4"],
    true: Float[ndarray, "m 4"],
    ignored: Bool[ndarray, " m"],
    crowd: Bool[ndarray, " m"],
) -> tuple[Bool[ndarray, "t k"], Bool[ndarray, "t k"]]:
    """At each IoU the detections, best first, each take the free true box they fit best; then an ignored one."""
    hit = np.zeros((len(IOUS), len(found)), bool)
    ignore = hit.copy()
    if not len(true):
        return hit, ignore
    overlap = box_overlap(found, true, crowd)
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
    found: Float[ndarray, "k 4"], true: Float[ndarray, "m 4"], crowd: Bool[ndarray, " m"] | None = None
) -> Float[ndarray, "k m"]:
    """IoU of boxes given by their corners; of a crowd, the share of the detection inside it."""
    found, true = (numbers(name, boxes) for name, boxes in (("found", found), ("true", true)))
    for name, boxes in (("found", found), ("true", true)):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise NearfarError(f"{name} has shape {boxes.shape}: (boxes, 4) is needed")
    crowd = np.zeros(len(true), bool) if crowd is None else numbers("crowd", crowd) != 0
    if crowd.shape != (len(true),):
        raise NearfarError(f"crowd has shape {crowd.shape}: one for each of {len(true)} true boxes is needed")
    low = np.maximum(found[:, None, :2], true[None, :, :2])
    high = np.minimum(found[:, None, 2:], true[None, :, 2:])
    shared = (high - low).clip(min=0).prod(axis=2)
    own, theirs = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (found, true))
    union = np.where(crowd, own[:, None], own[:, None] + theirs - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def detection_estimates(
    evidence: DetectionEvidence,
    *,
    split: str | None = None,
    chance: Mapping[str, float] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    protocol: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Estimate], dict[str, NDArray[np.float64]]]:
    """Every statistic of ``evidence`` as an estimate, and the values of its pictures.

    Intervals resample pictures, each group among itself, and are bias-corrected and accelerated; ``resamples=0`` takes
    the normal interval of the pictures' values. ``chance``: what an answer without a look at the picture scores, by the
    names of the statistics; 0 where it is not given, as for a gap.
    """
    check_confidence(confidence)
    instance("evidence", evidence, DetectionEvidence)
    for name, mapping in (("chance", chance), ("protocol", protocol)):
        if mapping is not None:
            instance(name, mapping, Mapping)
    if split is not None:
        text("split", split)
    resamples, seed = arguments.whole("resamples", resamples), arguments.whole("seed", seed)
    values = evidence.item_values()
    drawn = evidence.statistics(evidence.resamples(resamples, seed)) if resamples else {}
    size = {None: evidence.n} | {
        name: int((evidence.strata == i).sum()) for i, name in enumerate(evidence.groups)
    }
    estimates = {}
    for name, items in values.items():
        theta = float(items.mean())
        low, high, method = _interval(theta, items, drawn.get(name), evidence, confidence)
        group = name.split("/")[1] if "/" in name and not name.endswith("/gap") else None
        stated = {"split": split, "interval": method, "confidence": confidence, "detections": 100}
        estimates[name] = Estimate(
            theta,
            low,
            high,
            real(f"chance[{name!r}]", (chance or {}).get(name, 0.0)),
            size[group],
            False,
            name,
            stated | dict(protocol or {}),
        )
    return estimates, values


def _interval(
    value: float,
    items: NDArray[np.float64],
    drawn: NDArray[np.float64] | None,
    evidence: DetectionEvidence,
    confidence: float,
) -> tuple[float, float, str]:
    pull = items - value
    drawn = None if drawn is None else drawn[np.isfinite(drawn)]
    if drawn is None or len(drawn) < 100:
        spread = normal_quantile(0.5 + confidence / 2) * _error(pull, evidence)
        return value - spread, value + spread, "normal, jackknife over pictures"
    low, high = np.quantile(drawn, bootstrap_levels(drawn, value, pull, confidence))
    return float(low), float(high), "bootstrap over pictures (BCa)"


def _error(pull: NDArray[np.float64], evidence: DetectionEvidence) -> float:
    """Standard error of a mean of values whose groups have fixed sizes."""
    total = 0.0
    for stratum in np.unique(evidence.strata):
        part = pull[evidence.strata == stratum]
        if len(part) > 1:
            total += float(part.var(ddof=1)) * len(part)
    return total**0.5 / evidence.n


@dataclass(frozen=True)
class Change:
    """A difference, after less before, with its interval, and how much of the start it is (NaN from 0)."""

    before: float
    after: float
    value: float
    low: float
    high: float
    relative: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, Any]:
        """For ``metrics.json``."""
        return {**vars(self), "distinguishable": self.distinguishable}


def detection_change(
    before: DetectionEvidence,
    after: DetectionEvidence,
    metric: str = "AP",
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Change]:
    """How ``metric`` changed from one set of detections to another on the same pictures, with paired intervals.

    Both are resampled alike. Among the results are ``metric`` itself and, with groups, each group's (``AP/GROUP``), and
    the two parts that make up the groups' changes Δ₁ and Δ₂: the ``common mode`` (Δ₁ + Δ₂)/2, in which both move alike,
    and the gap mode Δ₂ − Δ₁, the change of the signed gap (``AP/gap``). For a gap that may have either sign,
    ``gap size`` is the change of its absolute value.

    Raises:
        NearfarError: the two are of other pictures or groups.
    """
    check_confidence(confidence)
    instance("before", before, DetectionEvidence)
    instance("after", after, DetectionEvidence)
    text("metric", metric)
    resamples, seed = arguments.whole("resamples", resamples), arguments.whole("seed", seed)
    same = (
        before.n == after.n and before.groups == after.groups and np.array_equal(before.strata, after.strata)
    )
    if not same:
        raise NearfarError(
            "the two sets of detections are of other pictures or groups: they cannot be paired"
        )
    weights = before.resamples(resamples, seed)
    whole = [_modes(e.statistics(), metric, e.groups) for e in (before, after)]
    drawn = [_modes(e.statistics(weights), metric, e.groups) for e in (before, after)]
    without = [_modes(e.statistics(1.0 - np.eye(e.n)), metric, e.groups) for e in (before, after)]
    changes = {}
    for name in whole[0]:
        a, b = (float(w[name][0]) for w in whole)
        differences = drawn[1][name] - drawn[0][name]
        differences = differences[np.isfinite(differences)]
        pull = (b - a) - (without[1][name] - without[0][name])
        pull = np.where(np.isfinite(pull), pull - np.nanmean(pull), 0.0)
        if len(differences) < 100:
            low = high = float("nan")
        else:
            levels = bootstrap_levels(differences, b - a, pull, confidence)
            low, high = (float(v) for v in np.quantile(differences, levels))
        changes[name] = Change(a, b, b - a, low, high, (b - a) / a if a else float("nan"))
    return changes


def _modes(
    statistics: Mapping[str, NDArray[np.float64]], metric: str, groups: tuple[str, ...]
) -> dict[str, NDArray[np.float64]]:
    if metric not in statistics or "/" in metric:
        raise NearfarError(f"metric={metric}: AP, AP50, AP75 or AR is needed")
    found = {metric: statistics[metric]}
    if groups:
        low, high = (statistics[f"{metric}/{name}"] for name in groups)
        found |= {f"{metric}/{name}": statistics[f"{metric}/{name}"] for name in groups}
        found |= {
            f"{metric}/gap": high - low,
            "gap size": np.abs(high - low),
            "common mode": (low + high) / 2,
        }
    return found
