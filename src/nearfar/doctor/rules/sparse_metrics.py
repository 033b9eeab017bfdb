"""What a metric tells alone, or beside a loss, in a log that has little else."""

from __future__ import annotations

import math
import re

import numpy as np

from nearfar.doctor.phases import (
    lower_is_better,
    main_metric,
    means_hard,
    metric_learns,
    monitor,
    switch_epoch,
)
from nearfar.doctor.rule import Evidence, Remedy, Rule, TooLittle
from nearfar.doctor.rules._remedies import advice, lower_learning_rate
from nearfar.doctor.series import level_noise, mean
from nearfar.doctor.signals import Signals

__all__ = ["RULES", "no_room"]

#: share of the first score that a metric has lost when training has made it worse, beside three times its scatter
WORSE = 0.05
#: a metric that stands below this and has not risen by this share from the first half of its scores to the second
LOW, RISEN = 0.1, 0.25
#: of a score this low, the share that it has to lose to have fallen
FALLEN = 0.3
#: scores of a metric that say something, and those that say that it is flat
LEAST_SCORES, FLAT_SCORES = 4, 5
#: a score of finding one's own, from which a loss this near to guessing (nats), among so many, has no room to fall
#: where its last two quarters differ by no more than this
FOUND, NEAR_GUESSING, MANY, STANDS = 0.5, 1.3, 16, 0.1
#: share of the way from guessing to 0 that a loss with next to no room has come
STAYED = 0.05
#: metrics whose chance level their definition has, and how near to it they are at chance: half of all triplets are
#: ordered rightly by guessing, and no correlation is 0 (the accuracy of triplets has the same name as that
#: of pairs, which has an F1 beside it)
_CHANCES = (
    (re.compile(r"(?<![a-z])(?:auc|auroc|roc_auc)(?![a-z])|triplet", re.IGNORECASE), 0.5, 0.05),
    (re.compile(r"(?<![a-z])(?:spearman|pearson|kendall|mcc)(?![a-z])", re.IGNORECASE), 0.0, 0.1),
)
#: a share that is logged in percent
_SHARE = re.compile(r"(?<![a-z])(?:r|recall|hits?|top|acc|accuracy|mrr|map|ndcg|precision|p)(?:[@_-]?\d|$|[@_-])",
                    re.IGNORECASE)  # fmt: skip
_FIRST = re.compile(
    r"(?:^|[/_ .-])(?:(?:r|recall|hits?|top|acc|accuracy)(?:@|_at_|[_-])?1|mrr(?:@\d+)?)$", re.IGNORECASE
)


def _falling(signals: Signals) -> Evidence | None:
    metric = monitor(signals)
    if len(metric) < LEAST_SCORES:
        raise TooLittle(f"{LEAST_SCORES} scores of validation are needed, and there are {len(metric)}")
    first, late = metric.values[0], mean(metric.values[-2:])
    fall, margin = first - late, max(WORSE * abs(first), 3 * level_noise(metric.values))
    rose = float(metric.numbers.max()) > first + margin / 2
    low = metric.numbers.min() >= 0 and metric.numbers.max() < LOW
    if low and fall <= FALLEN * first:
        return None  # this low a score scatters; whether it rises is a different question
    if fall <= margin or rose or switch_epoch(signals) is not None:
        return None  # what rose before it fell is judged as overfitting, or as a curriculum
    loss = (signals.series("loss") or signals.series("train_loss")).finite()
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


def _flat(signals: Signals) -> Evidence | None:
    metric = monitor(signals)
    name = metric.name
    if any(name in each for each in signals.mapping("metrics").values()) or name in signals.mapping(
        "estimates"
    ):
        return None  # its chance level is known, and judged
    values = metric.numbers
    if len(values) < FLAT_SCORES:
        raise TooLittle(f"{FLAT_SCORES} scores of validation are needed, and there are {len(values)}")
    if lower_is_better(signals, name) or float(np.ptp(values)) <= 1e-12:
        return None
    of_triplets = name.endswith("cosine_accuracy") and not signals.has(
        f"val/{name.removesuffix('accuracy')}f1"
    )
    known = next(
        ((at, near) for names, at, near in _CHANCES if names.search("triplet" if of_triplets else name)), None
    )
    if known is not None:
        chance, low = known
        at_chance = float(np.abs(values - chance).max()) < low
        beside = f"; chance is {chance:g}"
    else:
        percent = values.max() > 1 and _SHARE.search(name) is not None
        at_chance, beside = values.min() >= 0 and values.max() < LOW * (100 if percent else 1), ""
    if not at_chance:
        return None
    half = len(values) // 2
    first, late = float(values[:half].mean()), float(values[half:].mean())
    rise = late - first
    if rise > max(
        RISEN * first if known is None else low / 2, 3 * level_noise(metric.values) / math.sqrt(half)
    ):
        return None
    return Evidence(
        f"{name} is {first:.3g} in the first {half} evaluations and {late:.3g} in the other {len(values) - half}"
        f"{beside}.",
        {"first": first, "last": late},
        title=None if known is None else "The metric stays at chance.",
    )


def no_room(signals: Signals) -> Evidence | None:
    """Evidence that a loss stays near guessing because its logits are bounded, while what is looked for is found."""
    try:
        return _no_room(signals)
    except TooLittle:
        return None


def _no_room(signals: Signals) -> Evidence | None:
    positives = signals.number("positives_per_row")
    if (
        signals.text("loss_kind") in ("sigmoid", "other")
        or signals.text("positives_by") not in (None, "pair")
        or (positives is not None and positives > 1.5)
        or means_hard(signals)
    ):
        return None
    scores = {
        name: series.values[-1] for name, series in signals.named("val/*").items() if _FIRST.search(name)
    }
    loss = (signals.series("loss") or signals.series("train_loss")).finite()
    candidates = signals.number("candidates") or signals.number("batch_size")
    if not scores or not loss or not candidates:
        raise TooLittle(
            "a score of finding one's own (R@1, MRR), the loss, and the size of the batch are needed"
        )
    name = main_metric(signals, list(scores)) or next(iter(scores))
    finds = scores[name] >= FOUND or metric_learns(signals)
    guess, late = math.log(candidates) if candidates >= MANY else 0.0, loss.tail()
    quarters = [float(part.mean()) for part in np.array_split(loss.numbers, 4)] if len(loss) >= 8 else []
    if not quarters or abs(quarters[2] - quarters[3]) > STANDS:
        return None  # it may fall further
    if not finds or not guess - NEAR_GUESSING < late.mean() < guess:
        return None
    return Evidence(
        f"The loss is {late.mean():.3f} in {late.where_text()}, where guessing among {candidates:.0f} costs "
        f"{guess:.3f}, and {name} is {scores[name]:.3f}.",
        {"loss": late.mean(), "guessing": guess, "score": scores[name]},
        severity="warning" if late.mean() > (1 - STAYED) * guess else None,
    )


RULES = (
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
        remedy=advice("Evaluate the model that is trained, and compute its embeddings anew each time. Where the loss "
                      "stands still as well, see whether the optimiser holds the weights, and log `lr`: a schedule "
                      "that is stepped every batch may have ended."),
        source="weights that move change some rank among many",
    ),
    Rule(
        "metric-flat", "warning", "The metric is low and does not rise.", (("val/*",),), _flat,
        looks_at="the monitored metric, where its chance level is not logged",
        threshold=f"below {LOW:g} (10 in percent; AUC and triplets within 0.05 of 0.5, correlations within 0.1 of 0) "
        f"in all of {FLAT_SCORES} or more evaluations; the mean of the second half is not "
        f"{RISEN:.0%} above that of the first, nor three standard errors",
        cause="What is learned does not carry over: pairs that do not belong together (shuffled, or shifted by one), "
        "a model that learns its rows by heart, a way around the task where the loss falls nevertheless (batch "
        "statistics that give the pair away), an evaluation whose queries and keys stand in different orders.",
        remedy=advice("Look at ten pairs as the loop hands them to the loss, and evaluate on training rows: where that "
                      "is low as well, the pairs or the evaluation are wrong."),
        source="a score at its chance level is that of no model at all",
    ),
    Rule(
        "logits-flat", "note", "The loss is nearly that of guessing, and the metric is not: logits have no room.",
        (("val/*", "loss", "candidates"), ("val/*", "loss", "batch_size"), ("val/*", "train_loss", "batch_size")),
        _no_room,
        looks_at="`loss` beside R@1 or MRR, of a loss with one positive for each query, in random batches",
        threshold=f"the loss within {NEAR_GUESSING:g} nats of ln(candidates), {MANY} or more of them, its last quarter "
        f"within {STANDS:g} of the third, and a score of {FOUND:g} or more, or twice the first; a warning where the "
        f"loss has come less than {STAYED:.0%} of the way",
        cause="The differences of the logits are bounded: a temperature of 1, or a softmax applied twice "
        "(cross_entropy has its own).",
        remedy=advice("Divide cosines by a temperature of .05 to .1, and give cross_entropy logits and no "
                      "probabilities. A loss with several positives for each query is a different case: log "
                      "positives_per_row."),
        source="with logits in [−1, 1] the loss is at least ln(1 + (n − 1) e^−2)",
    ),
)  # fmt: skip
