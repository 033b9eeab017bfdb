"""Which batches were meant to be hard, when they began, and how the metric that matters went meanwhile."""

from __future__ import annotations

import re

from nearfar.doctor.series import Point, Series, level_noise, mean
from nearfar.doctor.signals import Signals

__all__ = ["hard_epochs", "lower_is_better", "means_hard", "metric_rises", "monitor", "switch_epoch"]

HARD_SAMPLERS = ("hard", "partition")
#: a metric that moved by less than this share of itself did not move, however little it scatters
STILL = 0.01
_LOWER = re.compile(r"rank|loss|error|ece|\bmse\b|\bmae\b|distance|\bgap\b|perplexity", re.IGNORECASE)
_PREFERRED = ("MRR", "mAP", "AP", "NDCG", "F1", "accuracy", "acc", "R@1", "recall@1")


def means_hard(signals: Signals) -> bool:
    """Whether the sampler is one that is to make batches hard; an option that another sampler ignores says nothing."""
    sampler = signals.text("sampler")
    if sampler is not None:
        return sampler in HARD_SAMPLERS
    return any((signals.number(name) or 0.0) > 0 for name in ("nominal_hard", "hard_ratio"))


def switch_epoch(signals: Signals) -> int | None:
    """The first epoch of hard batches after random ones; None without such a switch in the log."""
    last = signals.last_epoch or 0
    phases = signals.series("random_phase").by_epoch()
    if phases:
        hard = [epoch for epoch, random in phases.items() if random < 0.5]
        random = [epoch for epoch, value in phases.items() if value >= 0.5]
        return min(hard) if hard and random and min(random) < min(hard) else None
    start = signals.number("curriculum_epoch")
    if not start or signals.text("sampler") not in (None, *HARD_SAMPLERS) or last <= start:
        return None
    return int(start) + 1


def hard_epochs(signals: Signals, epoch: int | None) -> bool:
    """Whether the batches of an epoch were meant to be hard."""
    if not means_hard(signals):
        return False
    phases = signals.series("random_phase").by_epoch()
    if epoch in phases:
        return phases[epoch] < 0.5
    start = signals.number("curriculum_epoch") or 0.0
    return epoch is None or epoch > start


def lower_is_better(metric: str) -> bool:
    """Whether a metric of this name is better when it is lower.

    >>> lower_is_better("text_to_molecule/median_rank"), lower_is_better("MRR")
    (True, False)
    """
    return _LOWER.search(metric) is not None


def monitor(signals: Signals) -> Series:
    """The validation metric that matters, as a series that rises when it gets better; empty where there is none."""
    found = signals.named("val/*")
    name = signals.text("monitor")
    name = name.removeprefix("val/") if name else None
    if name not in found:
        candidates = [metric for metric in found if not lower_is_better(metric)] or list(found)
        ranked = [m for wanted in _PREFERRED for m in candidates if m.lower().endswith(wanted.lower())]
        if not candidates:
            return Series("")
        name = (ranked or candidates)[0]
    series = found[name]
    if lower_is_better(name):
        return Series(name, tuple(Point(p.row, p.step, p.epoch, -p.value) for p in series.points))
    return Series(name, series.points)


def metric_rises(signals: Signals, since: int) -> bool:
    """Whether the metric stands higher than at epoch ``since``, by more than it scatters."""
    values = monitor(signals).by_epoch()
    before = values.get(since)
    after = [value for epoch, value in values.items() if epoch > since]
    if before is None or not after:
        return False
    return mean(after[-2:]) > before + max(STILL * abs(before), level_noise(list(values.values())))
