"""What a counterfactual does to frozen batches: losses beside their own levels, gradients beside the run's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nearfar.lab.counterfactuals import Counterfactual
from nearfar.lab.one_batch import Outcome, cosine, norm
from nearfar.metrics import few_runs

__all__ = ["Effect", "Mean", "effect_of"]

RECORDED = ("uniform_level", "floor", "p_positive", "hardest_share")
GRADIENTS = ("gradient_cosine", "gradient_ratio", "embedding_cosine")


@dataclass(frozen=True)
class Mean:
    """A mean over the batches with its 95 % interval (t); one batch has none."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float | None], bound: float = math.inf) -> Mean | None:
        """None where a batch has no such number, or one that is not finite; the interval stays within ± ``bound``."""
        if any(v is None or not math.isfinite(v) for v in values):
            return None
        numbers = np.asarray(values, dtype=np.float64)
        if len(numbers) < 2:
            return cls(float(numbers[0]))
        low, high = few_runs(numbers)
        return cls(float(numbers.mean()), max(low, -bound), min(high, bound))


@dataclass(frozen=True)
class Effect:
    """What a counterfactual does, as means over the batches; None where there is no such number.

    ``change``: of the loss, None where the two are not comparable as losses, and ``not_comparable`` says why.
    ``above_guessing_change``: of loss − uniform level, None where floors differ as well. ``gradient_cosine``, and
    ``gradient_ratio`` of the norms (counterfactual over run): of the gradients of the parameters, over those that both
    train. ``embedding_cosine``: of the gradients of the embeddings of the rows that both batches begin with.
    ``inert``: nothing differs in any bit. ``per_batch``: the numbers of each batch.
    """

    counterfactual: Counterfactual
    loss: Mean | None
    uniform_level: Mean | None
    floor: Mean | None
    p_positive: Mean | None
    hardest_share: Mean | None
    change: Mean | None
    above_guessing_change: Mean | None
    not_comparable: str
    gradient_cosine: Mean | None
    gradient_ratio: Mean | None
    embedding_cosine: Mean | None
    inert: bool
    per_batch: list[dict[str, float | None]]


def effect_of(
    each: Counterfactual, base: Sequence[Outcome], found: Sequence[Outcome], same_rows: Sequence[bool]
) -> Effect:
    """Compare the ``found`` outcomes of a counterfactual with those of the run, batch by batch.

    ``same_rows``: whether a batch begins with the rows of the run's.
    """
    numbers: list[dict[str, float | None]] = []
    for a, b, same in zip(base, found, same_rows, strict=True):
        row: dict[str, float | None] = {"loss": b.loss, "above_guessing": b.above_guessing}
        row |= {name: b.record.get(name) for name in RECORDED}
        row["gradient_cosine"] = cosine(a.parameters, b.parameters)
        row["gradient_ratio"] = _ratio(a, b)
        row["embedding_cosine"] = cosine(a.embeddings, b.embeddings) if same and a.embeddings else None
        numbers.append(row)
    reason, change, above = _changes(base, found)
    means = {
        name: Mean.of([row[name] for row in numbers], 1.0 if name.endswith("cosine") else math.inf)
        for name in ("loss", *RECORDED, *GRADIENTS)
    }
    inert = all(same_rows) and all(_identical(a, b) for a, b in zip(base, found, strict=True))
    return Effect(
        each,
        change=change,
        above_guessing_change=above,
        not_comparable=reason,
        inert=inert,
        per_batch=numbers,
        **means,
    )


def _ratio(a: Outcome, b: Outcome) -> float | None:
    """The norm of b's gradient over that of a's."""
    both = sorted(a.parameters.keys() & b.parameters.keys())
    below, above = (norm({name: each.parameters[name] for name in both}) for each in (a, b))
    return above / below if below else None


def _identical(a: Outcome, b: Outcome) -> bool:
    same_names = a.parameters.keys() == b.parameters.keys()
    return (
        same_names
        and a.loss == b.loss
        and all(torch.equal(g, b.parameters[n]) for n, g in a.parameters.items())
    )


def _changes(base: Sequence[Outcome], found: Sequence[Outcome]) -> tuple[str, Mean | None, Mean | None]:
    """Why two losses are not comparable ("" if they are), the change of the loss, and of loss − uniform level."""
    pairs = list(zip(base, found, strict=True))
    change = Mean.of([b.loss - a.loss for a, b in pairs])
    if change is None:
        return "a loss is not finite", None, None
    for name, words in (("floor", "its floor is"), ("uniform_level", "guessing costs")):
        levels = [(a.record.get(name), b.record.get(name)) for a, b in pairs]
        if any(level is None for both in levels for level in both):
            return f"the system logs no {name}", None, None
        differ = [
            (a, b) for a, b in levels if not math.isclose(a or 0.0, b or 0.0, rel_tol=1e-7, abs_tol=1e-9)
        ]
        if differ:
            a, b = np.mean(np.asarray(levels, dtype=np.float64), axis=0)
            above = Mean.of([(b.above_guessing or 0.0) - (a.above_guessing or 0.0) for a, b in pairs])
            reason = f"{words} {b - a:+.2g} nats ({b:.4g} instead of {a:.4g})"
            return reason, None, above if name == "uniform_level" else None
    above = Mean.of([(b.above_guessing or 0.0) - (a.above_guessing or 0.0) for a, b in pairs])
    return "", change, above
