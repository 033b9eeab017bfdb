"""Which batches were meant to be hard, when they began, how the metric went meanwhile, and what training changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

from nearfar import directions
from nearfar.data.files import Json
from nearfar.doctor.series import Series, estimate_of, level_noise, mean
from nearfar.doctor.signals import Signals
from nearfar.terminal import metric_words, short_number

__all__ = [
    "Gain",
    "gain_sentence",
    "hard_epochs",
    "main_metric",
    "means_hard",
    "metric_learns",
    "metric_margin",
    "metric_rises",
    "monitor",
    "monitored_gain",
    "switch_epoch",
]


#: a metric that moved by less than this share of itself did not move, however little it scatters
STILL = 0.01
#: how much a score rises, and how many times the first it is, where the model has learned beyond doubt
LEARNED, TIMES_FIRST = 0.05, 2.0
_PREFERRED = ("MRR", "mAP", "AP", "NDCG", "F1", "accuracy", "acc", "R@1", "recall@1")


def means_hard(signals: Signals) -> bool:
    """Whether batches were meant to be hard.

    The log says so by ``composes_hard_batches``, or by ``random_phase``, which only samplers of hard batches have. Of a
    log with neither: by the sampler's name or the share of hard items; an option that a sampler ignores says nothing.
    A log of hardness that says nothing of the sampler is taken as one of hard batches.
    """
    stated = _stated(signals)
    if stated is not None:
        return stated
    sampler = signals.text("sampler")
    if sampler is not None:
        return _named_hard(sampler) or bool(signals.series("random_phase"))
    shares = [signals.number(name) for name in ("nominal_hard", "hard_ratio")]
    known = [share for share in shares if share is not None]
    return max(known) > 0 if known else signals.has("hardness")


def _stated(signals: Signals) -> bool | None:
    """What the log or, without it, the context says of the sampler."""
    by_epoch = signals.series("composes_hard_batches")
    if by_epoch:
        return bool(by_epoch.values[-1] > 0.5)
    value = signals.number("composes_hard_batches")
    return None if value is None else value > 0.5


def _named_hard(sampler: str) -> bool:
    return "hard" in sampler.lower()


def switch_epoch(signals: Signals) -> int | None:
    """The first epoch of hard batches after random ones; None without such a switch in the log."""
    last = signals.last_epoch or 0
    phases = signals.series("random_phase").by_epoch()
    if phases:
        hard = [epoch for epoch, random in phases.items() if random < 0.5]
        random = [epoch for epoch, value in phases.items() if value >= 0.5]
        return min(hard) if hard and random and min(random) < min(hard) else None
    composed = _composed(signals)
    hard = [epoch for epoch, is_hard in composed.items() if is_hard]
    if hard and min(composed) < min(hard):
        return min(hard)
    unknown = _stated(signals) is None and signals.text("sampler") is None
    may_be_hard = unknown or means_hard(signals)
    ratios = signals.series("hard_ratio").by_epoch()
    if ratios and next(iter(ratios.values())) == 0 and may_be_hard:
        return next((epoch for epoch, ratio in ratios.items() if ratio > 0), None)
    start = signals.number("curriculum_epoch")
    if not start or not may_be_hard or last <= start:
        return None
    return int(start) + 1


def _composed(signals: Signals) -> dict[int, bool]:
    """Whether the sampler of an epoch composes hard batches, by epoch, as far as the log says it."""
    stated = signals.series("composes_hard_batches").by_epoch()
    if stated:
        return {epoch: value > 0.5 for epoch, value in stated.items()}
    return {epoch: _named_hard(sampler) for epoch, sampler in signals.texts("sampler").items()}


def hard_epochs(signals: Signals, epoch: int | None) -> bool:
    """Whether the batches of an epoch were meant to be hard."""
    if not means_hard(signals):
        return False
    phases = signals.series("random_phase").by_epoch()
    if epoch in phases:
        return phases[epoch] < 0.5
    composed = _composed(signals)
    if epoch in composed and not composed[epoch]:
        return False
    return not _before_curriculum(signals, epoch)


def _before_curriculum(signals: Signals, epoch: int | None) -> bool:
    return epoch is not None and epoch <= (signals.number("curriculum_epoch") or 0.0)


def lower_is_better(signals: Signals, metric: str) -> bool:
    """Whether a metric is better when it is lower: by its final estimates, which say so, or else by its name."""
    for estimates in signals.mapping("metrics").values():
        estimate = estimates.get(metric) if isinstance(estimates, Mapping) else None
        stated = estimate.get("higher_is_better") if isinstance(estimate, Mapping) else None
        if isinstance(stated, bool):
            return not stated
    return directions.lower_is_better(metric)


def monitor(signals: Signals) -> Series:
    """The validation metric that matters, as a series that rises when it gets better; empty where there is none."""
    metrics = signals.named("val/*")
    name = main_metric(signals, list(metrics))
    if name is None:
        return Series("")
    series = metrics[name]
    if lower_is_better(signals, name):
        return series.having(-series.numbers, name)
    return series.having(series.numbers, name)


def main_metric(signals: Signals, names: Sequence[str]) -> str | None:
    """The metric that the run watches or, where it does not say, the usual one among ``names``."""
    watched = (signals.text("monitor") or "").removeprefix("val/")
    if watched in names:
        return watched
    candidates = [metric for metric in names if not lower_is_better(signals, metric)] or list(names)
    ranked = [m for wanted in _PREFERRED for m in candidates if m.lower().endswith(wanted.lower())]
    return (ranked or candidates or [None])[0]  # type: ignore[list-item]


def metric_rises(signals: Signals, since: int) -> bool:
    """Whether the metric stands higher than at epoch ``since``, by more than it scatters."""
    values = monitor(signals).by_epoch()
    before = values.get(since)
    after = [value for epoch, value in values.items() if epoch > since]
    if before is None or not after:
        return False
    return mean(after[-2:]) > before + metric_margin(before, list(values.values()))


def metric_learns(signals: Signals) -> bool:
    """Whether the metric has risen so far that the model has learned, whatever its loss says."""
    metric = monitor(signals)
    if len(metric) < 3 or metric.numbers.min() < 0:
        return False
    first, late = metric.values[0], mean(metric.values[-2:])
    return late > first + max(LEARNED, 3 * level_noise(metric.values)) and late >= TIMES_FIRST * first


def metric_margin(before: float, values: Sequence[float]) -> float:
    """How much a mean of two epochs must differ from one before to have moved: a share of it, and three times the
    scatter, which such a difference exceeds by chance in one of a hundred runs.
    """
    return max(STILL * abs(before), 3 * level_noise(values))


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
