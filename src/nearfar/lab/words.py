"""Names and numbers as people read them, for tables, charts and sentences."""

from __future__ import annotations

from collections.abc import Mapping

from nearfar.metrics import Estimate

__all__ = ["by_question", "interval_words", "metric_words", "short_number"]


def short_number(value: float) -> str:
    """Three decimals; two digits for small numbers such as a chance level, which 0.000 would hide.

    >>> [short_number(value) for value in (0.5861, 0.000385, 0.0, 1300.5)]
    ['0.586', '0.00038', '0.000', '1300.5']
    """
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2g}" if 0 < abs(value) < 0.005 else f"{value:.3f}"


def metric_words(metric: str, separator: str = " ") -> str:
    """A metric's name as people read it.

    >>> metric_words("text_to_molecule/median_rank", " · ")
    'text → molecule · median rank'
    """
    return metric.replace("_to_", " → ").replace("/", separator).replace("_", " ")


def by_question(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, Estimate]]:
    """Estimates by the question that their protocol states, "" where it states none.

    Numbers that answer different questions, such as a probe's accuracy and pair retrieval, stand in no column together.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for name, estimate in estimates.items():
        found.setdefault(str(estimate.protocol.get("question", "")), {})[name] = estimate
    return found


def interval_words(low: float, high: float) -> str:
    """``[0.31, 0.36]`` with the decimals of ``short_number``."""
    return f"[{short_number(low)}, {short_number(high)}]"
