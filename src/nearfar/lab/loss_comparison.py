"""Training losses of two arms: a difference where they measure the same, else why they do not.

A loss is a number of nats against a number of candidates. With different candidates, floor, temperature or composition
of the batches it is a different quantity, and the lower one is not the better one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nearfar.config.compose import flatten
from nearfar.config.registry import role_of
from nearfar.data.files import Json
from nearfar.lab.groups import Arm
from nearfar.metrics import few_runs
from nearfar.training.run_folder import RunFolder

__all__ = ["LossComparison", "compare_losses"]


#: levels that a step records of its loss, and their names in a sentence
LEVELS = {
    "candidates": "number of candidates",
    "uniform_level": "level of guessing",
    "floor": "floor",
    "scale": "temperature",
}
#: how far levels may differ that are means over a batch
CLOSE = 0.01


@dataclass(frozen=True)
class LossComparison:
    """Mean training losses of the last epoch, and why their difference means nothing (or its interval over seeds)."""

    base: float | None
    arm: float | None
    reason: str | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.base is None or self.arm is None:
            return f"training losses are not compared: {self.reason}"
        both = f"training losses {self.arm:.3f} and {self.base:.3f}"
        if self.reason:
            return f"{both} are not compared: {self.reason}"
        if self.low is None:
            return f"{both}: difference {self.arm - self.base:+.3f}, one seed, so without interval"
        return (
            f"{both}: difference {self.arm - self.base:+.3f} [{self.low:+.3f}, {self.high:+.3f}] over seeds"
        )


def compare_losses(base: Arm, arm: Arm) -> LossComparison:
    """The losses of ``arm`` beside those of ``base``, over the seeds they have in common."""
    common = sorted(set(base.runs) & set(arm.runs))
    if not common:
        return LossComparison(None, None, "no seed in common")
    first, second = ([_last(side.runs[seed]) for seed in common] for side in (base, arm))
    if any(loss is None for loss, _ in [*first, *second]):
        return LossComparison(None, None, "a run has no finished epoch in its log")
    ours, theirs = (np.array([loss for loss, _ in side], dtype=float) for side in (second, first))
    reason = _why_not(base, arm, first[0][1], second[0][1])
    bounds: tuple[float | None, float | None] = (None, None)
    if reason is None and len(common) > 1:
        bounds = few_runs(ours - theirs)
    return LossComparison(float(theirs.mean()), float(ours.mean()), reason, *bounds)


def _last(run: RunFolder) -> tuple[float | None, Json]:
    """The mean loss of the last epoch and the record of the last logged step."""
    loss, step = None, {}
    for record in run.log():
        if record.get("kind") == "epoch" and record.get("train_loss") is not None:
            loss = float(record["train_loss"])
        elif record.get("kind") == "step":
            step = record
    return loss, step


def _why_not(base: Arm, arm: Arm, first: Json, second: Json) -> str | None:
    a, b = flatten(base.config), flatten(arm.config)
    # The sampler first: its options follow from it.
    for key in sorted(set(a) | set(b), key=lambda key: (not key.startswith("sampler"), key)):
        if a.get(key) == b.get(key):
            continue
        role = role_of(key, a.get("system"))
        if role == "loss":
            return f"different loss ({key}: {b.get(key)} and {a.get(key)})"
        if role == "batches":
            return f"batches composed differently ({key}: {b.get(key)} and {a.get(key)})"
    for name, words in LEVELS.items():
        x, y = first.get(name), second.get(name)
        if (x is None) != (y is None):
            return f"only one of them states its {words}"
        if x is not None and y is not None and abs(x - y) > CLOSE * max(abs(x), abs(y)):
            return f"different {words}: {y:.4g} and {x:.4g}"
    return None
