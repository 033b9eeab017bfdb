"""What a loss, a gradient norm or a metric tell alone, in a log that has little else."""

from __future__ import annotations

import math

import numpy as np

from nearfar.doctor.levels import levels
from nearfar.doctor.phases import monitor, switch_epoch
from nearfar.doctor.rule import Evidence, Remedy, Rule, TooLittle
from nearfar.doctor.rules._remedies import advice, lower_learning_rate
from nearfar.doctor.series import Series, level_noise, mean
from nearfar.doctor.signals import Signals

__all__ = ["RULES"]

#: distance from the logarithm of a whole number, in nats, at which a loss stands there
AT_LOGARITHM = 0.01
#: the most that quarters of the log may differ from each other, where the loss has not moved
NOT_MOVED = 0.03
#: numbers of candidates that are looked for: two, and powers of two, as batches and queues are
_POWERS = (2, *(2**k for k in range(3, 21)))
#: a gradient norm, and a loss, that are nothing
NO_GRADIENT, NO_LOSS = 1e-9, 1e-6
#: correlation of a loss with itself an epoch earlier, its course taken away, from which it repeats
REPEATS = 0.97
#: share of the first score that a metric has lost when training has made it worse, beside three times its scatter
WORSE = 0.05
#: values of a period that have to differ, and values of the log in which a period is looked for
LEAST_DIFFERENT, MOST_VALUES = 5, 20_000
LEAST_VALUES = 8
LEAST_SCORES = 4


def _loss(signals: Signals) -> Series:
    return (signals.series("loss") or signals.series("train_loss")).finite()


def _at_logarithm(signals: Signals) -> Evidence | None:
    try:
        if levels(signals):
            return None  # what guessing costs is known, and the rules on the loss judge it
    except TooLittle:
        pass
    loss = _loss(signals)
    if len(loss) < LEAST_VALUES:
        raise TooLittle(f"only {len(loss)} logged values of the loss")
    level = mean(loss.tail(0.75).values)
    quarters = [mean(part.tolist()) for part in np.array_split(loss.numbers, 4)]
    if max(quarters) - min(quarters) > NOT_MOVED or level <= 0.1:
        return None
    numbers = dict.fromkeys(_POWERS, "")
    batch, ranks = signals.number("batch_size"), signals.number("world_size") or 1.0
    if batch:
        numbers |= {
            round(batch): "the batch",
            round(batch * ranks): "the batch of all processes",
            round(2 * batch): "both views of the batch",
            round(2 * batch) - 1: "both views of the batch without the query itself",
        }
    nearest = min(numbers, key=lambda n: abs(level - math.log(n)))
    if abs(level - math.log(nearest)) > max(AT_LOGARITHM, 2 * loss.tail(0.75).error()):
        return None
    if nearest == 2:
        what = (
            "as a yes-or-no question is guessed: a sigmoid or binary cross-entropy for each pair, or one negative for "
            "each query"
        )
    else:
        known = f" ({numbers[nearest]})" if numbers[nearest] else ""
        what = (
            f"as one of {nearest:,} candidates{known} is guessed: the rows of a batch times the processes that share "
            "them, or a queue of negatives"
        )
    return Evidence(
        f"The loss stands at {level:.4g} throughout; ln {nearest:,} is {math.log(nearest):.4f}, {what}.",
        {"loss": level, "candidates": float(nearest), "logarithm": math.log(nearest)},
    )


def _nothing_to_learn(signals: Signals) -> Evidence | None:
    candidates, loss = signals.series("candidates").finite(), _loss(signals)
    if candidates and candidates.numbers.max() == 1:
        return Evidence(
            "Each query has 1 candidate, its own positive: the loss is 0 whatever the model does.",
            {"candidates": 1.0},
            title="There is one candidate: nothing can be told apart.",
        )
    gradient = signals.series("gradient_norm").finite()
    if len(gradient) >= LEAST_SCORES and float(np.abs(gradient.numbers).max()) <= NO_GRADIENT:
        return Evidence(
            f"The gradient norm is {float(np.abs(gradient.numbers).max()):.2g} in all {len(gradient)} logged steps.",
            {"gradient_norm": float(np.abs(gradient.numbers).max())},
            title="No gradient reaches the weights.",
        )
    positives = any(signals.has(name) for name in ("anchors", "positives_per_row", "rows_without_positives"))
    if not positives and len(loss) >= LEAST_SCORES and float(np.abs(loss.numbers).max()) <= NO_LOSS:
        return Evidence(
            f"The loss is 0 in all {len(loss)} logged values.",
            {"loss": float(np.abs(loss.numbers).max())},
            title="The loss is 0 from the first step: there is nothing to tell apart.",
        )
    if not (gradient or candidates or loss):
        raise TooLittle("neither loss nor gradient norm has finite values")
    return None


def _periodic(signals: Signals) -> Evidence | None:
    loss = _loss(signals)
    values = loss.numbers[-MOST_VALUES:]
    n = len(values)
    if n < 3 * LEAST_VALUES:
        raise TooLittle(f"{3 * LEAST_VALUES} logged values of the loss are needed, and there are {n}")
    if len(np.unique(values)) < LEAST_DIFFERENT:
        return None  # of a loss printed with few digits the same values come again by chance
    again = np.flatnonzero(np.isclose(values[1 : n // 3 + 1], values[0], rtol=1e-6, atol=1e-9)) + 1
    for lag in again[:50].tolist():
        if len(np.unique(values[:lag])) >= LEAST_DIFFERENT and np.allclose(
            values[lag:], values[:-lag], rtol=1e-6
        ):
            return Evidence(
                f"The same {lag} values of the loss come again, digit for digit, {n // lag} times.",
                {"period": float(lag), "times": float(n // lag)},
                title="The loss repeats exactly: the same batches, and weights that do not change.",
            )
    lag, strength = _repeats(values)
    if strength < REPEATS:
        return None
    return Evidence(
        f"The loss repeats itself every {lag} logged values (correlation {strength:.2f}, its course taken away).",
        {"period": float(lag), "correlation": strength},
        severity="note",
        title="Each epoch has the same batches in the same order.",
    )


def _repeats(values: np.ndarray) -> tuple[int, float]:
    """The period of a series that comes at least three times, and the least correlation of any two of its times."""
    n = len(values)
    steps = np.diff(values)  # of a course that bends slowly little is left in differences
    steps = steps - steps.mean()
    spectrum = np.fft.rfft(steps, 2 * n)
    alike = np.fft.irfft(np.abs(spectrum) ** 2)[: n // 3 + 1]
    lags = np.argsort(-alike[LEAST_DIFFERENT:])[:10] + LEAST_DIFFERENT
    best, strength = 0, 0.0
    for lag in lags.tolist():
        whole = values[n % lag :].reshape(-1, lag)
        own = whole - whole.mean(axis=1, keepdims=True)
        slope = np.linspace(-1, 1, lag)
        own = own - (own @ slope / (slope @ slope))[:, None] * slope
        size = np.linalg.norm(own, axis=1)
        if (size < 1e-9).any():
            continue
        unit = own / size[:, None]
        least = float((unit @ unit.T).min())
        if least > strength:
            best, strength = lag, least
    return best, strength


def _falling(signals: Signals) -> Evidence | None:
    metric = monitor(signals)
    if len(metric) < LEAST_SCORES:
        raise TooLittle(f"{LEAST_SCORES} scores of validation are needed, and there are {len(metric)}")
    first, late = metric.values[0], mean(metric.values[-2:])
    fall, margin = first - late, max(WORSE * abs(first), 3 * level_noise(metric.values))
    rose = float(metric.numbers.max()) > first + margin / 2
    if fall <= margin or rose or switch_epoch(signals) is not None:
        return None  # what rose before it fell is judged as overfitting, or as a curriculum
    loss = _loss(signals)
    falls = len(loss) > 3 and loss.tail().mean() < loss.part(slice(0, max(1, len(loss) // 4))).mean()
    beside = "; the training loss went on falling" if falls else ""
    return Evidence(
        f"{metric.name} was {abs(first):.3f} at the first evaluation and is {abs(late):.3f} in the last two of "
        f"{len(metric)}{beside}.",
        {"first": first, "last": late, "falls": fall},
    )


def _falling_remedy(signals: Signals) -> Remedy:
    return Remedy(
        lower_learning_rate(signals),
        "Take the first checkpoint meanwhile. Divide the learning rate by 10, look for false negatives in the batches, "
        "and check that what is trained on resembles what is evaluated.",
    )


def _constant(signals: Signals) -> Evidence | None:
    known = {name: series for name, series in signals.named("val/*").items() if len(series) >= LEAST_SCORES}
    if not known:
        raise TooLittle(f"{LEAST_SCORES} scores of validation are needed")
    still = {
        name: series.values[0]
        for name, series in known.items()
        if float(np.ptp(series.numbers)) <= 1e-12 and 0 < abs(series.values[0]) < 1
    }
    if not still or len(still) < len(known):
        return None
    listed = ", ".join(f"{name} {value:.4g}" for name, value in list(still.items())[:4])
    count = len(next(iter(known.values())))
    return Evidence(f"All of {count} evaluations are the same to the last digit: {listed}.", still)


RULES = (
    Rule(
        "loss-at-logarithm", "warning", "The loss stands at the logarithm of a number of candidates: it guesses.",
        (("loss",), ("train_loss",)), _at_logarithm,
        looks_at="`loss`, where no chance level is known",
        threshold=f"within {AT_LOGARITHM} nats of ln 2, ln 8, ln 16, … ln 1,048,576 or ln(batch), quarters of the log "
        f"within {NOT_MOVED} of each other",
        cause="All candidates score alike: frozen weights or a detached side, pairs that do not belong together, a "
        "collapsed encoder, a learning rate that is far too high or too low.",
        remedy=advice("Overfit one batch: if its loss does not fall, the pairs or the gradient are wrong. Log the "
                      "number of candidates, and this is judged with certainty."),
        source="a scorer that ranks all candidates alike has the loss ln(candidates) (van den Oord et al. 2018)",
    ),
    Rule(
        "nothing-to-learn", "error", "Nothing can be learned.",
        (("candidates",), ("gradient_norm",), ("loss",), ("train_loss",)), _nothing_to_learn,
        looks_at="`candidates`, `gradient_norm`, `loss`",
        threshold=f"one candidate; a gradient norm of at most {NO_GRADIENT:g}, or a loss of at most {NO_LOSS:g}, in "
        "every logged step",
        cause="A batch of one row for each process without a gather, a loss whose embeddings were detached, weights "
        "that are frozen, or an optimiser that was given none of them.",
        remedy=advice("Check that the batch has several rows for each loss call, that embeddings require gradients "
                      "(`embedding.requires_grad`), and that the optimiser holds the encoder's parameters."),
        source="the softmax of one candidate is 1, and its gradient 0",
    ),
    Rule(
        "loss-periodic", "error", "The loss repeats.", (("loss",), ("train_loss",)), _periodic,
        looks_at="`loss`",
        threshold=f"a period that comes three times: exactly, or with a correlation of {REPEATS} (a note) once each "
        "period's own course is taken away",
        cause="Exactly: weights that do not change, and the same batches again. Nearly: the order of the batches is "
        "not shuffled anew, so that each row meets the same negatives in every epoch.",
        remedy=advice("Call `sampler.set_epoch(epoch)` before each epoch, or shuffle; where values repeat digit for "
                      "digit, see whether the optimiser holds the weights and steps at all."),
        source="negatives of a batch are the rows that share it",
    ),
    Rule(
        "metric-falling", "warning", "Training makes the metric worse than it was at the first evaluation.",
        (("val/*",),), _falling,
        looks_at="the monitored metric, of which no score is above the first",
        threshold=f"the mean of the last two scores {WORSE:.0%} below the first, and three times the scatter",
        cause="A learning rate that destroys what the weights knew, false negatives that push apart what belongs "
        "together, or training data unlike the evaluation's.",
        remedy=_falling_remedy,
        source="what was pretrained is forgotten at high learning rates (McCloskey and Cohen 1989)",
    ),
    Rule(
        "metric-constant", "warning", "The metrics of validation never change.", (("val/*",),), _constant,
        looks_at="every `val/*`",
        threshold=f"{LEAST_SCORES} scores or more that are the same to the last digit, of all metrics",
        cause="The evaluation uses a copy of the model that is not trained, cached embeddings, or weights that do not "
        "move.",
        remedy=advice("Evaluate the model that is trained, and compute its embeddings anew each time."),
        source="weights that move change some rank among many",
    ),
)  # fmt: skip
