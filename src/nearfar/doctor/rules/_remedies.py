"""Overrides computed from what a run was trained with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nearfar.doctor.rule import Remedy
from nearfar.doctor.signals import Signals

__all__ = [
    "advice",
    "fixed",
    "learning_rate_gone",
    "lower_learning_rate",
    "peak_learning_rate",
    "scaled",
    "short",
]


#: share of its peak below which a learning rate is nothing; a cosine is there for the last hundredth of its steps
GONE = 1e-4


def short(value: float) -> str:
    """A number as an override takes it: at most two digits that matter.

    >>> short(0.4), short(1e-3 / 3), short(100.0)
    ('0.4', '0.00033', '100')
    """
    return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"


def fixed(override: str, advice: str) -> Callable[[Signals], Remedy]:
    """The same for every run."""
    return lambda signals: Remedy(override, advice)


def advice(text: str) -> Callable[[Signals], Remedy]:
    """What no option mends."""
    return lambda signals: Remedy("", text)


def scaled(signals: Signals, name: str, factor: float) -> str:
    """``name=value`` with the run's own value times ``factor``; "" where the value is not known."""
    value = signals.number(name)
    return f"{name}={short(value * factor)}" if value else ""


def peak_learning_rate(signals: Signals) -> float:
    """The highest learning rate, 0 where it is not known."""
    if signals.context.get("lr") is not None:
        return signals.number("lr") or 0.0
    return max(signals.series("lr").finite().values, default=0.0)


def learning_rate_gone(signals: Signals) -> float | None:
    """The step from which a logged learning rate is next to nothing to the end, half of the log or more; None: it is
    not."""
    rate = signals.series("lr").finite()
    if len(rate) < 8:
        return None
    at = rate.numbers > GONE * rate.numbers.max()
    last = int(np.flatnonzero(at)[-1]) if at.any() else -1
    if len(rate) - 1 - last < len(rate) / 2:
        return None
    return rate.points[last + 1].step


def lower_learning_rate(signals: Signals) -> str:
    """A third of the peak learning rate; "" where it is not known, or nothing is left of it."""
    peak = 0.0 if learning_rate_gone(signals) is not None else peak_learning_rate(signals)
    return f"lr={short(peak / 3)}" if peak else ""
