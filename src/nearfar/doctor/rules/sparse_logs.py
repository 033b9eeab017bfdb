"""What a loss or a gradient norm tell alone, in a log that has little else."""

from __future__ import annotations

import math

import numpy as np

from nearfar.doctor.levels import levels
from nearfar.doctor.phases import metric_learns, monitor
from nearfar.doctor.rule import Evidence, Rule, TooLittle
from nearfar.doctor.rules._remedies import advice
from nearfar.doctor.series import Series, level_noise, mean
from nearfar.doctor.signals import Signals

__all__ = ["RULES", "other_logarithm"]

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
#: the same of the losses of epochs with each other, of which random orders have none; and that in standard errors of 0
ALIKE_EPOCHS, SURE = 0.6, 6.0
#: squared differences of steps, as a share of the squared steps: of independent values 3, of a smooth course about 0
ROUGH = 0.5
#: a loss that no choice among candidates has, and no mean of cosines either
NEGATIVE = -1.5
#: first loss, beside that of guessing, from which logits are far too large; and alone, as guessing among e^20 costs
TIMES_GUESSING, ABOVE_ANY = 3.0, 20.0
#: growth of the gradient norm over the run, and from its third quarter to its last; its rank correlation with time
GRADIENT_GROWS, STILL_GROWS, STEADILY = 4.0, 0.95, 0.8
#: values of a period that have to differ, and values of the log in which a period is looked for
LEAST_DIFFERENT, MOST_VALUES = 5, 20_000
LEAST_VALUES = 8
#: values that a loss has to stand still for, and how high, for it to be said of one at no usual logarithm
MANY_VALUES, MANY_LOG = 20, math.log(8)
LEAST_SCORES = 4


def _loss(signals: Signals) -> Series:
    return (signals.series("loss") or signals.series("train_loss")).finite()


def other_logarithm(signals: Signals) -> bool:
    """Whether a loss, of which only the size of the batch is known, stands where guessing among a different number of
    candidates does: all processes' rows, a queue, or a question about each pair."""
    known, at = levels(signals), _stands_at(signals)
    if [level.assumed for level in known] != ["ln(batch_size)"] or at is None:
        return False
    question = at[1] == 2 and signals.text("loss_kind") != "softmax"
    return question or at[0] > known[0].uniform.mean() + 3 * AT_LOGARITHM


def _at_logarithm(signals: Signals) -> Evidence | None:
    try:
        if levels(signals) and not other_logarithm(signals):
            return None  # what guessing costs is known, and the rules on the loss judge it
    except TooLittle:
        pass
    loss = _loss(signals)
    if len(loss) < LEAST_VALUES:
        raise TooLittle(f"only {len(loss)} logged values of the loss")
    if metric_learns(signals):
        return None  # what stands still is the loss alone
    at = _stands_at(signals)
    if at is None:
        return _unmoved(signals)
    level, nearest, known = at
    if nearest == 2:
        what = (
            "as a yes-or-no question is guessed: a sigmoid or binary cross-entropy for each pair, or one negative for "
            "each query"
        )
    else:
        what = (
            f"as one of {nearest:,} candidates{known} is guessed: the rows of a batch times the processes that share "
            "them, or a queue of negatives"
        )
    return Evidence(
        f"The loss stands at {level:.4g} throughout; ln {nearest:,} is {math.log(nearest):.4f}, {what}.",
        {"loss": level, "candidates": float(nearest), "logarithm": math.log(nearest)},
    )


def _level(loss: Series) -> float | None:
    """Where a loss stands that has not moved over the log; None where it has."""
    level = mean(loss.tail(0.75).values)
    quarters = [mean(part.tolist()) for part in np.array_split(loss.numbers, 4)]
    return None if max(quarters) - min(quarters) > NOT_MOVED or level <= 0.1 else level


def _unmoved(signals: Signals) -> Evidence | None:
    """A loss that has not moved, at the logarithm of a number that may be that of the candidates or not."""
    loss, metric = _loss(signals), monitor(signals)
    level = _level(loss)
    if level is None or len(loss) < MANY_VALUES or not MANY_LOG < level < math.log(_POWERS[-1]):
        return None
    still = [series.tail(least=1).mean() <= 1e-6 for series in signals.named("*/moved").values()]
    if (
        (still and all(still))
        or _nothing_to_learn(signals)
        or (len(loss) >= 3 * LEAST_VALUES and _periodic(signals))
    ):
        return None  # which says why
    scores = len(metric) >= LEAST_SCORES
    if scores and mean(metric.values[-2:]) > metric.values[0] + 3 * level_noise(metric.values):
        return None
    number = math.exp(level)
    beside = f"; {metric.name} does not rise either" if scores else ""
    return Evidence(
        f"The loss stands at {level:.4g} throughout, which guessing among {number:,.0f} candidates costs{beside}. "
        "Whether a query has as many, the log does not say.",
        {"loss": level, "candidates": number},
        severity="warning" if scores else "note",
        title="The loss has not moved over the whole log.",
    )


def _stands_at(signals: Signals) -> tuple[float, int, str] | None:
    """The level of a loss that has not moved, the usual number whose logarithm it is, and what has that number."""
    loss = _loss(signals)
    level = _level(loss) if len(loss) >= LEAST_VALUES else None
    if level is None:
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
    return level, nearest, f" ({numbers[nearest]})" if numbers[nearest] else ""


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
    if _smooth(values[n // 2 :]):
        return None
    lag, strength = _repeats(values)
    if strength < REPEATS:
        return _alike_epochs(loss)
    return Evidence(
        f"The loss repeats itself every {lag} logged values (correlation {strength:.2f}, its course taken away).",
        {"period": float(lag), "correlation": strength},
        severity="note",
        title="Each epoch has the same batches in the same order.",
    )


def _alike_epochs(loss: Series) -> Evidence | None:
    """Epochs whose losses rise and fall at the same places; their order may be known where few values are logged."""
    epochs: dict[float, list[float]] = {}
    for epoch, value in zip(loss.epochs.tolist(), loss.numbers.tolist(), strict=True):
        epochs.setdefault(epoch, []).append(value)
    if len(epochs) > 4:
        del epochs[min(epochs)]  # in which the loss falls steeply
    sizes = [len(values) for values in epochs.values()]
    length = max(set(sizes), key=sizes.count)
    whole = np.array([values for epoch, values in epochs.items() if len(values) == length and epoch == epoch])
    if len(whole) < 3 or length < LEAST_DIFFERENT:
        return None
    course = np.vander(np.linspace(-1, 1, length), 4 if length > 2 * LEAST_DIFFERENT else 2)
    own = whole - whole @ np.linalg.pinv(course).T @ course.T
    norms = np.linalg.norm(own, axis=1, keepdims=True)
    if (norms < 1e-9).any():
        return None
    alike = (own / norms) @ (own / norms).T
    pairs = alike[np.triu_indices(len(whole), 1)]
    strength = float(pairs.mean())
    free = length - course.shape[1]
    if strength < ALIKE_EPOCHS or strength * math.sqrt(free * len(pairs)) < SURE:
        return None
    return Evidence(
        f"The losses of {len(whole)} epochs rise and fall at the same places (mean correlation {strength:.2f} of "
        f"{length} values each, their course taken away).",
        {"period": float(length), "correlation": strength},
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


def _smooth(values: np.ndarray) -> bool:
    """Whether values bend rather than jump, as those of a running mean: batches differ from one to the next."""
    steps = np.diff(values)
    steps = steps - steps.mean()
    return float(np.square(np.diff(steps)).sum()) < ROUGH * float(np.square(steps).sum())


def _negative(signals: Signals) -> Evidence | None:
    if signals.text("loss_kind") == "other":
        return None
    loss = _loss(signals)
    if len(loss) < LEAST_SCORES:
        raise TooLittle(f"only {len(loss)} logged values of the loss")
    level, metric = loss.tail().mean(), monitor(signals)
    if level > NEGATIVE:
        return None
    if len(metric) > 2:
        first, late = metric.values[0], mean(metric.values[-2:])
        if late > first + max(0.01 * abs(first), 3 * level_noise(metric.values)):
            return None
    severity = "warning" if len(metric) > 2 else "note"
    beside = f"; {metric.name} does not rise" if len(metric) > 2 else ""
    return Evidence(
        f"The loss is {level:.3g} in {loss.tail().where_text()}{beside}.",
        {"loss": level},
        severity=severity,  # type: ignore[arg-type]
    )


def _starts_high(signals: Signals) -> Evidence | None:
    if signals.text("loss_kind") in ("other", "sigmoid"):
        return None
    loss = _loss(signals)
    if not loss:
        raise TooLittle("the loss has no finite value")
    first = mean(loss.values[: max(1, min(3, len(loss) // 20))])
    batch = signals.number("candidates") or signals.number("batch_size")
    guess = signals.number("uniform_level") or (math.log(batch) if batch and batch > 1 else None)
    if first <= ABOVE_ANY or (guess is not None and first <= TIMES_GUESSING * guess):
        return None
    known = (
        f", and guessing costs about {guess:.2f}"
        if guess is not None
        else f"; guessing among e^{first:.0f} would cost it"
    )
    return Evidence(f"The first logged loss is {first:.3g}{known}.", {"loss": first})


def _gradient_grows(signals: Signals) -> Evidence | None:
    gradient = signals.series("gradient_norm").finite()
    if len(gradient) < 2 * LEAST_VALUES:
        raise TooLittle(f"{2 * LEAST_VALUES} logged gradient norms are needed, and there are {len(gradient)}")
    values = gradient.numbers
    scale = signals.series("scale").finite()
    if scale and scale.values[0] > 0:  # gradients grow in proportion to it
        values = values / np.maximum(
            1.0, np.interp(gradient.steps, scale.steps, scale.numbers) / scale.values[0]
        )
    quarters = [float(part.mean()) for part in np.array_split(values, 4)]
    first = float(values[: max(2, len(values) // 50)].mean())
    order = np.argsort(np.argsort(values, kind="stable"))
    steady = float(np.corrcoef(order, np.arange(len(values)))[0, 1])
    grows = quarters[3] >= GRADIENT_GROWS * first and quarters[3] >= STILL_GROWS * quarters[2]
    if first <= 0 or not grows or steady < STEADILY:
        return None
    return Evidence(
        f"The gradient norm is {quarters[3] / first:.1f} times what it was in the first steps, and has grown since.",
        {"times": quarters[3] / first, "correlation": steady},
    )


RULES = (
    Rule(
        "loss-at-logarithm", "warning", "The loss stands at the logarithm of a number of candidates: it guesses.",
        (("loss",), ("train_loss",)), _at_logarithm,
        looks_at="`loss`, where no chance level is known, or only ln(batch)",
        threshold=f"within {AT_LOGARITHM} nats of ln 2, ln 8, ln 16, … ln 1,048,576 or ln(batch), quarters of the log "
        f"within {NOT_MOVED} of each other; a note at any other level above ln 8 over {MANY_VALUES} values or more, a "
        "warning where the metric does not rise either",
        cause="All candidates score alike: frozen weights or a detached side, pairs that do not belong together, a "
        "collapsed encoder, a learning rate that is far too high or too low.",
        remedy=advice("Overfit one batch: if its loss does not fall, the pairs or the gradient are wrong. Log the "
                      "number of candidates (`candidates`, or `batch_size` once), and this is judged with certainty."),
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
        f"period's own course is taken away; or a mean correlation of {ALIKE_EPOCHS} of the losses of all epochs, "
        f"{SURE:g} standard errors from 0 (a note)",
        cause="Exactly: weights that do not change, and the same batches again. Nearly: the order of the batches is "
        "not shuffled anew, so that each row meets the same negatives in every epoch.",
        remedy=advice("Call `sampler.set_epoch(epoch)` before each epoch, or shuffle; where values repeat digit for "
                      "digit, see whether the optimiser holds the weights and steps at all."),
        source="negatives of a batch are the rows that share it",
    ),
    Rule(
        "negative-loss", "warning", "The loss is negative.", (("loss",), ("train_loss",)), _negative,
        looks_at="`loss`, beside the monitored metric",
        threshold=f"below {NEGATIVE:g} in the last quarter, while the metric does not rise; without a metric a note",
        cause="No choice among candidates costs less than 0. The sign of the loss or of the logits is turned, so that "
        "partners are driven apart; or the loss is of a different kind (decoupled, a uniformity, a score).",
        remedy=advice("Check the sign: cross-entropy of the similarities, not of distances, and not negated. A loss "
                      "that may be negative is told by loss_kind=other."),
        source="−log p is at least 0",
    ),
    Rule(
        "loss-starts-high", "note", "The loss begins far above guessing.", (("loss",), ("train_loss",)), _starts_high,
        looks_at="the first values of `loss`, beside what guessing costs",
        threshold=f"above {ABOVE_ANY:g}, and {TIMES_GUESSING:g} times guessing where that is known",
        cause="Logits are huge before anything is learned: embeddings that are not normalised, a temperature that "
        "divides too much; or the loss is a sum over rows.",
        remedy=advice("Normalise the embeddings, and begin with a temperature of .05 to .1; take the mean over rows."),
        source="unit vectors at temperature τ have logits of at most 1/τ",
    ),
    Rule(
        "gradient-grows", "warning", "The gradient grows throughout.", (("gradient_norm",),), _gradient_grows,
        looks_at="`gradient_norm`, divided by the growth of `scale` where that is logged",
        threshold=f"{GRADIENT_GROWS:g} times the first in the last quarter, which is {STILL_GROWS:g} times the third; "
        f"rank correlation with time {STEADILY:g}",
        cause="Gradients are never set to 0, so that each step follows the sum of all before it; weights that no "
        "optimiser holds (nothing zeroes theirs); a temperature that sharpens without a clamp; or training diverges.",
        remedy=advice("Call `optimizer.zero_grad()` in every step, see that the optimiser holds the weights of the "
                      "model that is trained, clamp the temperature, and lower the learning rate."),
        source="PyTorch adds gradients up until they are zeroed",
    ),
)  # fmt: skip
