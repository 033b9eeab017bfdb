"""Average precision and recall of detections as COCO defines them, their gap between two groups, with intervals.

Detections and true boxes of a picture are matched once. What is left, hits and misses in the order of their scores,
gives AP and AR as a function of how often each picture counts: a resample is a row of weights, and nothing is matched
again. The matching follows the COCO evaluator (Lin et al., 2014); ``nearfar.metrics.detection_evaluator`` asks a
maintained one for the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from numpy.typing import NDArray
from torch import Tensor

from nearfar.arguments import any_number, instance, mapping, numbers, shown, text, whole_number
from nearfar.data.coco import CocoSplit
from nearfar.data.detection import relative_boxes
from nearfar.errors import NearfarError
from nearfar.metrics.box_matching import IOUS, Boxes, Ranking, box_overlap, rank_detections
from nearfar.metrics.estimate import Estimate
from nearfar.metrics.intervals import bootstrap_levels, check_confidence, normal_quantile

__all__ = [
    "IOUS",
    "Boxes",
    "Change",
    "DetectionEvidence",
    "box_overlap",
    "constant_boxes",
    "detection_boxes",
    "detection_change",
    "detection_estimates",
    "detection_evidence",
    "gap_closed",
    "ordered",
    "predicted_boxes",
    "true_boxes",
]


_CELLS = 1 << 22  # of weights times detections at a time


@dataclass(frozen=True)
class _Evidence:
    """Rankings of the classes that have true boxes."""

    rankings: list[Ranking] = field(default_factory=list)

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
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
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
        statistics = self.whole.scores(weights)
        names = list(statistics)
        for group, evidence in self.parts.items():
            statistics |= {f"{name}/{group}": value for name, value in evidence.scores(weights).items()}
        if self.groups:
            low, high = self.groups
            statistics |= {
                f"{name}/gap": statistics[f"{name}/{high}"] - statistics[f"{name}/{low}"] for name in names
            }
        return statistics

    def resamples(self, rows: int, seed: int = 0) -> Float[ndarray, "r n"]:
        """Weights of bootstrap resamples of the pictures, each group among itself."""
        rows = whole_number("rows", rows, 0)
        rng = np.random.default_rng(whole_number("seed", seed, 0))
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
        values = {}
        for name, theta in whole.items():
            pull = theta[0] - without[name]
            pull = np.where(np.isfinite(pull), pull, 0.0)
            if np.isfinite(theta[0]):
                values[name] = theta[0] + (self.n - 1) * (pull - pull.mean())
        return values


def detection_evidence(
    detections: Boxes,
    true: Boxes,
    n: int,
    groups: Sequence[str] = (),
) -> DetectionEvidence:
    """Match the detections of n pictures with the true boxes, once.

    The score of a group is that of the pictures with a true box of it, where boxes of others count neither as hits nor
    as misses. Where each picture has one group, that is COCO's AP over the group's pictures.

    Args:
        detections: detections; the 100 best of each picture and class count.
        true: true boxes; a class that has none is left out.
        n: how many pictures, those without boxes among them.
        groups: names of the two values of ``true.group``.

    >>> square = np.array([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    >>> zero, both = np.zeros(2, int), np.arange(2)
    >>> true = Boxes(square, zero, both)
    >>> detections = Boxes(square + [[0], [4]], zero, both, scores=np.array([0.9, 0.8]))
    >>> scores = detection_evidence(detections, true, 2).statistics()
    >>> float(scores["AP50"][0]), float(scores["AR"][0])
    (0.504..., 0.5)
    """
    instance("detections", detections, Boxes)
    instance("true", true, Boxes)
    n = whole_number("n", n, 1)
    if (
        isinstance(groups, (str, bytes))
        or not isinstance(groups, Sequence)
        or not all(isinstance(g, str) for g in groups)
    ):
        raise NearfarError(f"groups is {shown(groups)}; two names are needed, or none")
    if detections.scores is None:
        raise NearfarError("detections need scores")
    for name, boxes in (("detections", detections), ("true", true)):
        if len(boxes) and not 0 <= int(boxes.picture.min()) <= int(boxes.picture.max()) < n:
            raise NearfarError(f"{name}.picture must lie between 0 and {n - 1}")
    if groups and (len(set(groups)) != 2 or true.group is None):
        raise NearfarError(f"groups={tuple(groups)}: two names, and true boxes with a group, are needed")
    everything = np.zeros(len(true), bool) if true.crowd is None else true.crowd
    whole = _match(detections, true, n, everything)
    parts, strata = {}, np.full(n, -1)
    if groups:
        assert true.group is not None
        for position, name in enumerate(groups):
            other = true.group != position
            inside = np.zeros(n, bool)
            inside[true.picture[~other]] = True
            parts[name] = _match(
                _in(detections, inside), _in(true, inside), n, (everything | other)[inside[true.picture]]
            )
            mixed = np.zeros(n, bool)
            mixed[true.picture[other]] = True
            strata[inside & ~mixed] = position
    return DetectionEvidence(n, strata, tuple(groups), whole, parts)


def _in(boxes: Boxes, inside: Bool[ndarray, " n"]) -> Boxes:
    keep = inside[boxes.picture]
    optional = [None if v is None else v[keep] for v in (boxes.scores, boxes.crowd, boxes.group)]
    return Boxes(boxes.boxes[keep], boxes.labels[keep], boxes.picture[keep], *optional)


def _match(detections: Boxes, true: Boxes, n: int, ignored: Bool[ndarray, " m"]) -> _Evidence:
    rankings = []
    for label in np.unique(true.labels[~ignored]):
        a, b = np.flatnonzero(detections.labels == label), np.flatnonzero(true.labels == label)
        rankings.append(rank_detections(detections, true, n, ignored, a, b))
    return _Evidence(rankings)


def detection_estimates(
    evidence: DetectionEvidence,
    *,
    split: str | None = None,
    chance: Mapping[str, float] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    protocol: Mapping[str, object] | None = None,
) -> tuple[dict[str, Estimate], dict[str, NDArray[np.float64]]]:
    """Every statistic of ``evidence`` as an estimate, and the values of its pictures.

    Intervals resample pictures, each group among itself, and are bias-corrected and accelerated; ``resamples=0`` takes
    the normal interval of the pictures' values. ``chance``: what an answer without a look at the picture scores, by the
    names of the statistics; 0 where it is not given, as for a gap.
    """
    check_confidence(confidence)
    instance("evidence", evidence, DetectionEvidence)
    for name, values in (("chance", chance), ("protocol", protocol)):
        if values is not None:
            mapping(name, values)
    if split is not None:
        text("split", split)
    resamples, seed = whole_number("resamples", resamples, 0), whole_number("seed", seed, 0)
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
            any_number(f"chance[{name!r}]", (chance or {}).get(name, 0.0)),
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

    def as_dict(self) -> dict[str, object]:
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
    """How ``metric`` changed between two sets of detections on the same pictures, with paired intervals.

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
    resamples, seed = whole_number("resamples", resamples, 0), whole_number("seed", seed, 0)
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
    modes = {metric: statistics[metric]}
    if groups:
        low, high = (statistics[f"{metric}/{name}"] for name in groups)
        modes |= {f"{metric}/{name}": statistics[f"{metric}/{name}"] for name in groups}
        modes |= {
            f"{metric}/gap": high - low,
            "gap size": np.abs(high - low),
            "common mode": (low + high) / 2,
        }
    return modes


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


def gap_closed(
    clean: DetectionEvidence,
    perturbed: DetectionEvidence,
    metric: str = "AP",
    resamples: int = 0,
    split: str | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[Estimate, NDArray[np.float64]]:
    """By how much the gap became smaller, less what either group lost for it; and a value of every picture.

        |gap on clean pictures| − |gap on perturbed ones| − Σ_group max(0, its score on clean ones − on perturbed ones)

    Raising the group behind by x gives x, lowering the group ahead gives 0, and so does raising both alike. No
    perturbation gives 0, which is the chance level. The epoch is chosen by this number.
    """
    lower, upper = clean.groups

    def parts(weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
        a, b = clean.statistics(weights), perturbed.statistics(weights)
        gain = np.abs(a[f"{metric}/gap"]) - np.abs(b[f"{metric}/gap"])
        for group in (lower, upper):
            gain = gain - np.maximum(0.0, a[f"{metric}/{group}"] - b[f"{metric}/{group}"])
        return gain

    value = float(parts(None)[0])
    without = parts(1.0 - np.eye(clean.n))
    pull = np.where(np.isfinite(without), (clean.n - 1) * (value - without), 0.0)
    items = value + pull - pull.mean()
    if resamples:
        drawn = parts(clean.resamples(resamples, seed))
        drawn = drawn[np.isfinite(drawn)]
        low, high = np.quantile(drawn, bootstrap_levels(drawn, value, items - value, confidence))
        method = "bootstrap over pictures (BCa), paired"
    else:
        spread = normal_quantile(0.5 + confidence / 2) * float(items.std(ddof=1)) / clean.n**0.5
        low, high, method = value - spread, value + spread, "normal, jackknife over pictures"
    protocol = {"split": split, "interval": method, "confidence": confidence, "detections": 100}
    name = f"{metric}/gap_closed"
    return Estimate(value, float(low), float(high), 0.0, clean.n, False, name, protocol), items
