"""What training changed, in a sentence: the score before it, the score now, the interval on the difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict

from nearfar.data.files import Json
from nearfar.doctor.cells import estimate_of
from nearfar.terminal import metric_words, short_number

__all__ = ["Gain", "gain_sentence", "monitored_gain"]


class Gain(TypedDict):
    """The change of a metric from before training, with its interval and what it means."""

    value: float
    low: float
    high: float
    verdict: NotRequired[str]
    paired: NotRequired[bool]


def monitored_gain(
    gain: Mapping[str, Mapping[str, Gain]], monitor: str | None
) -> tuple[str, str, Gain] | None:
    """Split, metric and change of the monitored metric, on test where that has one; None where there is none.

    >>> gain = {"val": {"MRR": {"value": 0.2}}, "test": {"MRR": {"value": 0.1}, "R@1": {"value": 0.3}}}
    >>> monitored_gain(gain, "MRR")
    ('test', 'MRR', {'value': 0.1})
    """
    for split in ("test", *gain):
        change = gain.get(split, {}).get(str(monitor))
        if isinstance(change, Mapping):
            return split, str(monitor), change
    return None


def gain_sentence(metrics: Json) -> str | None:
    """The sentence of what ``metrics.json`` holds (``monitor``, ``splits``, ``before_training``, ``gain``); None where
    the score before training is not known.

    >>> change = {"value": 0.10, "low": 0.09, "high": 0.11, "verdict": "better", "paired": True}
    >>> splits, before = {"val": {"MRR": {"value": 0.63}}}, {"val": {"MRR": {"value": 0.53}}}
    >>> about = {"monitor": "MRR", "splits": splits, "before_training": before, "gain": {"val": {"MRR": change}}}
    >>> print(gain_sentence(about))
    MRR on val was 0.530 before training and is 0.630: paired difference +0.100 [+0.090, +0.110], better
    """
    known = monitored_gain(metrics.get("gain") or {}, metrics.get("monitor"))
    if known is None:
        return None
    split, name, change = known
    before, now = (_value(metrics, where, split, name) for where in ("before_training", "splits"))
    if before is None or now is None:
        return None
    value, low, high = (f"{float(change[key]):+.3f}" for key in ("value", "low", "high"))
    how = "paired difference" if change.get("paired", True) else "difference, not paired,"
    return (
        f"{metric_words(name)} on {split} was {short_number(before)} before training and is {short_number(now)}: "
        f"{how} {value} [{low}, {high}], {change.get('verdict')}"
    )


def _value(metrics: Json, where: str, split: str, name: str) -> float | None:
    """An estimate's value; None where the file does not hold one, as of a metric that was not measured."""
    estimates = metrics.get(where)
    known = estimates.get(split) if isinstance(estimates, Mapping) else None
    estimate = known.get(name) if isinstance(known, Mapping) else None
    value = estimate_of(estimate, name).get("value") if isinstance(estimate, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
