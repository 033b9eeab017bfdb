"""AP, AR and their gap between two groups with intervals, and what a change of the detector did to each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import NearfarError
from nearfar.metrics import arguments
from nearfar.metrics.arguments import instance, real, text
from nearfar.metrics.detection import DetectionEvidence
from nearfar.metrics.estimate import Estimate
from nearfar.metrics.intervals import bootstrap_levels
from nearfar.metrics.quantiles import check_confidence, normal_quantile

__all__ = ["Change", "detection_change", "detection_estimates"]


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
