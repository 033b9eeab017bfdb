"""Whether the weights that are trained are trained: gradients that reach them, an optimiser that holds them, a learning
rate that is left."""

from __future__ import annotations

import numpy as np

from nearfar.doctor.phases import metric_learns
from nearfar.doctor.rule import Evidence, Rule, TooLittle
from nearfar.doctor.rules._remedies import advice, learning_rate_gone
from nearfar.doctor.signals import Signals

__all__ = ["RULES"]

#: share of the weights without a gradient from which it is no pooler that nobody uses, but a tower
A_TOWER = 0.25
#: looks at the weights in the last quarter of which none may have moved
LEAST_LOOKS = 8
#: share of its first level that a loss has fallen to, where the run has learned something before
FELL = 0.8


def _unmoved(signals: Signals) -> Evidence | None:
    unmoved, trained = _last(signals, "weights_unmoved"), _last(signals, "weights_trained")
    if not unmoved:
        return None
    names = signals.text("weights_unmoved_names")
    of = f" of {trained:.0f}" if trained else ""
    return Evidence(
        f"{unmoved:.0f}{of} weights had gradients and have not changed since the start{f': {names}' if names else ''}.",
        {"weights_unmoved": unmoved},
    )


def _without(signals: Signals) -> Evidence | None:
    without, trained = _last(signals, "weights_without_gradient"), _last(signals, "weights_trained")
    if not without:
        return None
    names = signals.text("weights_without_gradient_names")
    of = f" of {trained:.0f}" if trained else ""
    return Evidence(
        f"{without:.0f}{of} weights had no gradient in any logged step{f': {names}' if names else ''}.",
        {"weights_without_gradient": without},
        severity="warning" if trained and without >= A_TOWER * trained else None,
    )


def _last(signals: Signals, name: str) -> float:
    series = signals.series(name).finite()
    return series.values[-1] if series else 0.0


def _stopped(signals: Signals) -> Evidence | None:
    moved = signals.series("weights_moved").finite()
    if len(moved) < LEAST_LOOKS:
        raise TooLittle(f"{LEAST_LOOKS} looks at the weights are needed, and there are {len(moved)}")
    if moved.tail().numbers.max() > 0 or moved.numbers.max() <= 0:
        return None  # what never moved is named by its weights
    last = int(np.flatnonzero(moved.numbers > 0)[-1])
    return Evidence(
        f"No weight has changed after step {moved.points[last].step:g}, in {len(moved) - 1 - last} looks of "
        f"{len(moved)}.",
        {"last_step": moved.points[last].step},
        severity="note" if metric_learns(signals) else None,
    )


def _gone(signals: Signals) -> Evidence | None:
    rate = signals.series("lr").finite()
    if len(rate) < LEAST_LOOKS:
        raise TooLittle(f"{LEAST_LOOKS} logged learning rates are needed, and there are {len(rate)}")
    since = learning_rate_gone(signals)
    if since is None:
        return None
    peak, late = float(rate.numbers.max()), float(rate.numbers[-1])
    loss = signals.series("loss").finite()
    fell = (
        len(loss) >= LEAST_LOOKS
        and loss.tail().mean() < FELL * loss.numbers[: len(loss) // LEAST_LOOKS].mean()
    )
    text = (
        f"The learning rate is 0 in all of {len(rate)} logged values."
        if peak <= 0
        else f"The learning rate had a peak of {peak:.3g}, is next to nothing from step {since:g} on, and {late:.3g} "
        "at the end."
    )
    return Evidence(
        text,
        {"lr": late, "peak": peak, "from": since},
        severity="note" if metric_learns(signals) else "warning" if fell else None,
    )


RULES = (
    Rule(
        "weights-unmoved", "warning", "Weights with a gradient do not move: the optimiser lacks them.",
        (("weights_unmoved",),), _unmoved,
        looks_at="`weights_unmoved`, at the end", threshold="one weight",
        cause="The optimiser was made before a part of the model was added, or of a part of it; or updates are smaller "
        "than weights in 16 bits are rounded to.",
        remedy=advice("Give the optimiser all parameters (a projection head, both towers, a learned temperature). What "
                      "is frozen on purpose needs `requires_grad_(False)`, which saves its gradients too."),
        source="an optimiser changes what it was given",
    ),
    Rule(
        "weights-without-gradient", "note", "Weights that are to be trained get no gradient.",
        (("weights_without_gradient",),), _without,
        looks_at="`weights_without_gradient`, at the end",
        threshold=f"one weight; a warning from {A_TOWER:.0%} of them",
        cause="A part that the loss does not use (a note where it is small, such as the pooler of a text encoder); a "
        "tower under `no_grad` or `.detach()`; rows gathered from all processes without a gradient.",
        remedy=advice("Look for `.detach()`, `no_grad`, `.data` and `torch.tensor(...)` between the tower and the "
                      "loss; gather with a gradient (`torch.distributed.nn.functional.all_gather`), and certify the "
                      "loss by `nearfar.verify.loss`."),
        source="torch.distributed.all_gather returns tensors without a history",
    ),
    Rule(
        "weights-stopped", "error", "The weights have stopped moving.", (("weights_moved",),), _stopped,
        looks_at="`weights_moved`, last quarter", threshold="0 throughout, and more before; a note where the metric "
        "had risen before",
        cause="A learning rate that a schedule has brought to nothing, gradients that are not finite so that steps are "
        "skipped, or updates smaller than the rounding of the weights.",
        remedy=advice("Log `lr`: a schedule that is meant to be stepped once an epoch and is stepped every batch is at "
                      "its end within the first epoch."),
        source="weights that are trained change",
    ),
    Rule(
        "learning-rate-gone", "error", "The learning rate is nothing for most of the run.", (("lr",),), _gone,
        looks_at="`lr` over the log",
        threshold="below 1e-4 of its peak in the second half of the log, or more of it; or 0 throughout; a note where "
        f"the metric had risen before, a warning where the loss had fallen below {FELL:.0%} of its first level",
        cause="A schedule that is meant to be stepped once an epoch is stepped every batch, or was given fewer steps "
        "than the run has (T_max, total_steps, num_training_steps).",
        remedy=advice("Count how often `scheduler.step()` is called, and give the schedule the steps of the whole "
                      "run."),
        source="a schedule ends where its steps end",
    ),
)  # fmt: skip
