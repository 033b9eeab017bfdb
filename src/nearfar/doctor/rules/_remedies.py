"""Overrides computed from what a run was trained with."""

from __future__ import annotations

from collections.abc import Callable

from nearfar.doctor.rule import Remedy
from nearfar.doctor.signals import Signals

__all__ = ["advice", "fixed", "lower_learning_rate", "peak_learning_rate", "scaled", "short"]


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


def lower_learning_rate(signals: Signals) -> str:
    """A third of the peak learning rate."""
    peak = peak_learning_rate(signals)
    return f"lr={short(peak / 3)}" if peak else ""
