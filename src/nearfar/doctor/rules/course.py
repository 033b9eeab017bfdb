"""How training went: a loss that broke, epochs that made things worse."""

from __future__ import annotations

import numpy as np

from nearfar.doctor.phases import monitor, switch_epoch
from nearfar.doctor.rule import Evidence, Remedy, Rule, TooLittle
from nearfar.doctor.rules._remedies import advice, fixed, lower_learning_rate
from nearfar.doctor.series import level_noise, mean
from nearfar.doctor.signals import Signals

__all__ = ["RULES"]

#: fall of the metric, and rise of the validation loss, from which later epochs are worse than earlier ones
OVERFIT_METRIC, OVERFIT_LOSS = 0.05, 0.1
#: growth of the batch, steadiness before it, scores before it, and the metric's gain that is one
GROWS, STEADY, BEFORE_GROWTH, GAINED = 1.5, 1.1, 2, 0.05
#: fall of the training loss in the second half of a run, as a share of itself, that is one
FALLS = 0.02


def _non_finite(signals: Signals) -> Evidence | None:
    bad = {}
    for name in ("loss", "train_loss"):
        series = signals.series(name)
        bad[name] = series.part(~np.isfinite(series.numbers))
    flags = signals.series("finite")
    bad["finite"] = flags.part(flags.numbers < 0.5)
    worst = max(bad.values(), key=len)
    if not worst:
        return None
    first, whole = worst.part(slice(0, 1)).points[0], len(signals.series(worst.name))
    epoch = "" if first.epoch is None else f" (epoch {first.epoch})"
    basis = "".join(f" ({text})" for text in signals.assumed if f"'{worst.name}'" in text)
    return Evidence(
        f"{len(worst)} of {whole} logged values of the loss are not finite, first at step {first.step:g}{epoch}"
        f"{basis}.",
        {"not_finite": float(len(worst)), "of": float(whole), "first_step": first.step},
    )


def _finite_remedy(signals: Signals) -> Remedy:
    lower = lower_learning_rate(signals)
    if (signals.text("precision") or "").startswith(("16", "fp16", "float16")):
        return Remedy(
            "trainer.precision=32-true", "Train in 32 bits, or in bf16-mixed.", (lower,) if lower else ()
        )
    return Remedy(
        lower, "Divide the learning rate by 3, clip gradients, and look at the input of the first bad step."
    )


def _overfits(signals: Signals) -> Evidence | None:
    metric = monitor(signals)
    # A different composition since a switch: neither loss nor metric can be told from it.
    values = {} if switch_epoch(signals) is not None else metric.by_epoch()
    loss = signals.series("val_loss").finite()
    train = (signals.series("train_loss_same_composition") or signals.series("train_loss")).finite()
    falling = len(train) > 2 and train.tail(least=2).mean() < (1 - FALLS) * train.values[len(train) // 2]
    if len(loss) >= 5 and falling:
        least, late = min(loss.points, key=lambda p: p.value), loss.tail(least=2)
        rise = late.mean() - least.value
        if rise > max(OVERFIT_LOSS * abs(least.value), 3 * level_noise(loss.values)):
            return Evidence(
                f"Validation loss {late.mean():.3f} in {late.where_text()}, {rise:.3f} above its least, "
                f"{least.value:.3f} at step {least.step:g}; the training loss went on falling.",
                {"val_loss": late.mean(), "least_val_loss": least.value, "least_step": least.step},
            )
    if len(values) >= 5 and falling:
        best = max(values, key=lambda epoch: values[epoch])
        late_mean = mean(list(values.values())[-2:])
        fall = values[best] - late_mean
        if fall > max(OVERFIT_METRIC * abs(values[best]), 3 * level_noise(list(values.values()))):
            return Evidence(
                f"{metric.name} was {abs(values[best]):.3f} at epoch {best} and is {abs(late_mean):.3f} at "
                "the end; the training loss went on falling.",
                {"best": values[best], "best_epoch": float(best), "last": late_mean},
            )
    return None


def _larger_batch(signals: Signals) -> Evidence | None:
    metric = monitor(signals)
    values = metric.by_epoch()
    for name in ("candidates", "batch_size", "rows"):
        if sizes := signals.series(name).finite().by_epoch():
            break
    else:
        sizes = {}
    if len(sizes) < 2 or len(values) < 2 * BEFORE_GROWTH:
        raise TooLittle(
            f"sizes of batches by epoch, and {2 * BEFORE_GROWTH} scores of validation, are needed"
        )
    if switch_epoch(signals) is not None:
        return None  # the batches changed in a different way, too
    epochs = sorted(set(sizes) & set(values))
    for at in range(BEFORE_GROWTH, len(epochs)):
        before, grown = [sizes[epoch] for epoch in epochs[:at]], sizes[epochs[at]]
        if max(before) > STEADY * min(before) or grown < GROWS * max(before):
            continue
        last, first = values[epochs[at - 1]], values[epochs[at]]
        earlier = last - values[epochs[at - 2]]
        margin = max(GAINED * abs(last), 3 * level_noise(list(values.values())))
        if first - last <= margin + 2 * max(earlier, 0.0):
            return None
        return Evidence(
            f"{metric.name} rose from {abs(last):.3f} to {abs(first):.3f} in epoch {epochs[at]}, in which batches grew "
            f"from {max(before):.0f} to {grown:.0f} {name.replace('batch_size', 'rows')}; in the epoch before it had "
            f"changed by {earlier:+.3f}.",
            {"before": last, "after": first, "from": max(before), "to": grown},
        )
    return None


RULES = (
    Rule(
        "non-finite-loss", "error", "The loss is not a finite number.",
        (("loss",), ("train_loss",), ("finite",)), _non_finite,
        looks_at="`loss`, `train_loss`, `finite`", threshold="any value",
        cause="Overflow in half precision, a learning rate that is too high, or inputs that are not finite. "
        "From the first such step on the weights are lost.",
        remedy=_finite_remedy, source="IEEE 754: NaN stays NaN",
    ),
    Rule(
        "overfitting", "note", "Later epochs are worse than earlier ones on validation.",
        (("val_loss", "train_loss"), ("val_loss", "train_loss_same_composition"), ("val/*", "train_loss")), _overfits,
        looks_at="`val_loss` and the monitored metric beside the training loss",
        threshold=f"metric {OVERFIT_METRIC:.0%}, loss {OVERFIT_LOSS:.0%} worse than the best, and three times "
        "the scatter, while the training loss falls",
        cause="The model learns its training rows by heart.",
        remedy=fixed("patience=5", "Stop early, or regularise: input dropout, augmentation, more data."),
        source="Prechelt 1998, Early stopping — but when?",
    ),
    Rule(
        "batch-explains-gain", "note", "The metric rose when the batch grew.",
        (("val/*", "candidates"), ("val/*", "batch_size"), ("val/*", "rows")), _larger_batch,
        looks_at="the monitored metric in the epoch in which `candidates` (or `rows`, `batch_size`) grow",
        threshold=f"batches {GROWS:g} times as large as in all {BEFORE_GROWTH} or more epochs before; a gain of more "
        f"than {GAINED:.0%}, three times the scatter, and twice the gain of the epoch before",
        cause="A larger batch has harder negatives and a smoother gradient: what else was changed at that point need "
        "not have helped.",
        remedy=advice("Compare with a run of the small batch throughout, and with one of the large batch alone, before "
                      "the gain is laid to anything else."),
        source="Chen et al. 2020, SimCLR: the batch alone is worth several points",
    ),
)  # fmt: skip
