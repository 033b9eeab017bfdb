"""What happened when hard batches began."""

from __future__ import annotations

from itertools import pairwise

from nearfar.doctor.phases import STILL, metric_margin, monitor, switch_epoch
from nearfar.doctor.rule import Evidence, Remedy, Rule, TooLittle
from nearfar.doctor.rules._remedies import lower_learning_rate, short
from nearfar.doctor.series import mean
from nearfar.doctor.signals import Signals

__all__ = ["RULES"]

#: rise of the loss at the switch, as a share of itself, that is more than epoch means scatter by
LOSS_RISES = 0.02
#: fall of the metric, as a share of itself, that counts, over the last of this many epochs
METRIC_FALLS, EPOCHS = 0.02, 2
#: what the system's notes start from where the run does not say
RATIO, NEIGHBORS = 0.6, 50


def _switch(signals: Signals) -> tuple[int, float, float, float, list[float], float, str]:
    """Epoch, loss before and after, metric before and in each epoch after, what it must move by, and its name."""
    start = switch_epoch(signals)
    if start is None:
        raise TooLittle("the log shows no switch from random to hard batches")
    losses = (signals.series("train_loss").finite() or signals.series("loss").finite()).by_epoch()
    metric = monitor(signals)
    values = metric.by_epoch()
    before_loss = [losses[epoch] for epoch in losses if epoch < start][-1:]
    after_loss = [losses[epoch] for epoch in losses if epoch >= start]
    before = [values[epoch] for epoch in values if epoch < start][-1:]
    after = [values[epoch] for epoch in values if epoch >= start]
    if not (before_loss and after_loss and before and after):
        raise TooLittle(f"loss and metric are not logged both before and after the switch at epoch {start}")
    margin = metric_margin(before[0], list(values.values()))
    return start, before_loss[0], max(after_loss[:2]), before[0], after, margin, metric.name


def _sentence(
    start: int, loss: tuple[float, float], metric: tuple[float, float], name: str, last: int
) -> Evidence:
    return Evidence(
        f"At the switch (epoch {start}) the loss went from {loss[0]:.3f} to {loss[1]:.3f}, and {name} from "
        f"{abs(metric[0]):.3f} (epoch {start - 1}) to {abs(metric[1]):.3f} (epoch {last}).",
        {
            "switch_epoch": float(start),
            "loss_before": loss[0],
            "loss_after": loss[1],
            "metric_before": abs(metric[0]),
            "metric_after": abs(metric[1]),
        },
    )


def _healthy(signals: Signals) -> Evidence | None:
    start, loss, risen, before, after, margin, name = _switch(signals)
    level = mean(after[-EPOCHS:])
    if risen <= loss * (1 + LOSS_RISES) or level <= before + margin:
        return None
    return _sentence(start, (loss, risen), (before, level), name, start + len(after) - 1)


def _diverging(signals: Signals) -> Evidence | None:
    start, loss, risen, before, after, margin, name = _switch(signals)
    if len(after) < EPOCHS:
        raise TooLittle(f"{len(after)} epoch after the switch at epoch {start}; two are needed")
    level, every = mean(after[-EPOCHS:]), max(after[-EPOCHS:])
    course = [before, *after][-EPOCHS - 1 :]
    # Falling epoch after epoch is no scatter, which the bends of a short curve would be taken for.
    steadily = all(later < earlier for earlier, later in pairwise(course))
    margin = METRIC_FALLS * abs(before) if steadily else max(METRIC_FALLS * abs(before), margin)
    fallen = before - level > margin and every < before - STILL * abs(before)
    if risen <= loss * (1 + LOSS_RISES) or not fallen:
        return None
    return _sentence(start, (loss, risen), (before, level), name, start + len(after) - 1)


def _remedies(signals: Signals) -> Remedy:
    ratio = signals.series("hard_ratio").finite()
    now = ratio.values[-1] if ratio else signals.number("hard_ratio") or RATIO
    near = signals.series("hardness_k").finite()
    k = near.values[-1] if near else signals.number("hardness_k") or NEIGHBORS
    start = (switch_epoch(signals) or 6) - 1
    rate = lower_learning_rate(signals)
    lower = max(0.1, round(now * 2 / 3, 1))
    then = (f"hardness_k={short(2 * k)}", *([rate] if rate else []), f"curriculum_epoch={2 * start}")
    return Remedy(
        f"hard_ratio={short(lower)}",
        f"In this order: lower hard_ratio ({short(now)} to {short(lower)}), raise hardness_k ({short(k)} to "
        f"{short(2 * k)}), divide the learning rate by 3; then move the curriculum later (epoch {start} to "
        f"{2 * start}).",
        then,
    )


_NEEDS = tuple(
    (loss, metric, phase)
    for loss in ("train_loss", "loss")
    for metric in ("val/*",)
    for phase in ("random_phase", "curriculum_epoch", "hard_ratio", "sampler")
)
_LOOKS = "`train_loss` (or `loss`) and the monitored `val/*` before and after `random_phase` ends, by epoch"

RULES = (
    Rule(
        "curriculum-diverging", "warning", "Since hard batches began the loss is higher and the metric falls.", _NEEDS,
        _diverging, looks_at=_LOOKS,
        threshold=f"loss up by {LOSS_RISES:.0%}; the metric of the last {EPOCHS} epochs below its level "
        f"before the switch by {METRIC_FALLS:.0%} and (unless it falls epoch by epoch) three times its "
        f"scatter, each by {STILL:.0%}",
        cause="The negatives are harder than the model can use: false negatives among them, too many at "
        "once, or too early.",
        remedy=_remedies, source="Robinson et al. 2021, hard negatives; Qu et al. 2021, RocketQA: unfiltered ones hurt",
    ),
    Rule(
        "curriculum-healthy", "note", "The loss rose when hard batches began and the metric goes on rising: healthy.",
        _NEEDS, _healthy, looks_at=_LOOKS, threshold=f"loss up by {LOSS_RISES:.0%}; metric above its level "
        f"before by {STILL:.0%} and three times its scatter",
        cause="Harder candidates cost more; the loss of a different composition has a different scale.",
        remedy=lambda signals: Remedy("", "Nothing to do."),
        source="losses of batches composed otherwise are not comparable; the metric is",
    ),
)  # fmt: skip
