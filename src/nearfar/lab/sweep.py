"""A sweep: its axes, its cells, and the best of them with the bias of choosing the best of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nearfar.config.compose import flatten
from nearfar.lab.compare import Comparison
from nearfar.lab.groups import Arm
from nearfar.metrics.intervals import normal_quantile
from nearfar.terminal import metric_words

__all__ = ["Cell", "Sheet", "Sweep", "expected_lead", "sweep_of"]

#: with fewer arms than this, nothing was swept
LEAST = 3


@dataclass(frozen=True)
class Cell:
    """One arm of a sweep and its values on the axes, as they are written on the command line."""

    arm: Arm
    values: dict[str, str]


@dataclass(frozen=True)
class Sheet:
    """Cells that differ in one or two numeric axes alone; ``title`` says what they have in common.

    ``y`` is None where one axis varies.
    """

    title: str
    x: str
    y: str | None
    cells: dict[tuple[float, float], Arm]


@dataclass(frozen=True)
class Sweep:
    """``best`` is the best arm beside the baseline, chosen on the split ``chosen_on``; ``verdict`` says it in words."""

    axes: list[str]
    cells: list[Cell]
    sheets: list[Sheet]
    best: Arm | None
    chosen_on: str
    verdict: str


def expected_lead(arms: int, error: float) -> float:
    """By how much the best of ``arms`` leads the truth if all are equal and each has this standard ``error``.

    Blom's (1958) approximation of the largest of so many normal numbers.

    >>> round(expected_lead(12, 0.01), 4), expected_lead(1, 0.01)
    (0.0164, 0.0)
    """
    return error * normal_quantile((arms - 0.375) / (arms + 0.25)) if arms > 1 else 0.0


def sweep_of(comparison: Comparison) -> Sweep | None:
    """The arms of a comparison as a sweep, or None where there are fewer than three."""
    arms = comparison.arms
    if len(arms) < LEAST or not arms[0].config:  # rankings of other tools have no options
        return None
    values = {arm.label: dict(part.split("=", 1) for part in arm.parts) for arm in arms}
    axes = list(dict.fromkeys(key for arm in arms for key in values[arm.label]))
    cells = [Cell(arm, {axis: values[arm.label].get(axis, "") for axis in axes}) for arm in arms]
    best, chosen_on = _best(comparison)
    verdict = _verdict(comparison, best, chosen_on) if best is not None else ""
    return Sweep(axes, cells, _sheets(arms, axes), best, chosen_on, verdict)


def _sheets(arms: Sequence[Arm], axes: Sequence[str]) -> list[Sheet]:
    configs = {arm.label: flatten(arm.config) for arm in arms}
    numbers: dict[str, set[float]] = {}
    for axis in axes:
        column = [configs[arm.label].get(axis) for arm in arms]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
            numbers[axis] = {float(value) for value in column if value is not None}
    across = sorted((a for a in numbers if len(numbers[a]) > 1), key=lambda a: -len(numbers[a]))[:2]
    groups: dict[tuple[str, ...], list[Arm]] = {}
    for arm in arms:
        common = tuple(part for part in arm.parts if part.split("=", 1)[0] not in across)
        groups.setdefault(common, []).append(arm)
    sheets = []
    for common, members in groups.items():
        varying = [a for a in across if len({configs[m.label][a] for m in members}) > 1]
        if not varying:
            continue
        x, y = varying[0], varying[1] if len(varying) > 1 else None
        cells = {}
        for member in members:
            own = configs[member.label]
            cells[float(own[x]), float(own[y]) if y else 0.0] = member
        sheets.append(Sheet(", ".join(common), x, y, cells))
    return sheets


def _best(comparison: Comparison) -> tuple[Arm | None, str]:
    """Chosen on validation where the comparison is on test: the test figure is then not biased by the choice."""
    others = [
        arm
        for arm in comparison.arms
        if arm is not comparison.baseline and comparison.monitor in comparison.differences.get(arm.label, {})
    ]
    if not others:
        return None, comparison.split
    splits = [run.read_json("metrics.json")["splits"] for arm in comparison.arms for run in arm.runs.values()]
    chosen_on = (
        "val" if all(comparison.monitor in each.get("val", {}) for each in splits) else comparison.split
    )

    def score(arm: Arm) -> float:
        every = [run.read_json("metrics.json")["splits"][chosen_on] for run in arm.runs.values()]
        return float(np.mean([float(metrics[comparison.monitor]["value"]) for metrics in every]))

    return max(others, key=score), chosen_on


def _verdict(comparison: Comparison, best: Arm, chosen_on: str) -> str:
    name, base = metric_words(comparison.monitor), comparison.baseline.label
    monitored = {
        arm: differences[comparison.monitor]
        for arm, differences in comparison.differences.items()
        if comparison.monitor in differences
    }
    d, count = monitored[best.label], len(monitored)
    text = (
        f"Best of {count} beside {base}, by {name} on {chosen_on}: {best.label}. On {comparison.split} it is "
        f"{d.verdict if d.verdict == 'not distinguishable' else d.verdict + ' than the baseline'}"
        f"{' from the baseline' if d.verdict == 'not distinguishable' else ''}: {d.value:+.3f} "
        f"[{d.low:+.3f}, {d.high:+.3f}]."
    )
    if count == 1:
        return text
    if chosen_on != comparison.split:
        return text + (
            f" It was chosen on {chosen_on}, so the items of {comparison.split} did not favour it; its seeds may have: "
            "train it and the baseline on new seeds to be sure."
        )
    error = float(np.median([(each.high - each.low) / 2 for each in monitored.values()])) / 1.96
    lead = expected_lead(count, error)
    together = comparison.together[best.label][comparison.monitor]
    return text + (
        f" It was chosen on the split it is judged by: the best of {count} equal arms leads by about {lead:.3f} by "
        f"chance. With all differences judged together (Holm) it is {together}. Evaluate it on a different split or on "
        "new seeds before you trust the number."
    )
