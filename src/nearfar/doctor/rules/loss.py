"""The loss between its floor and guessing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from nearfar.doctor.levels import Level, levels
from nearfar.doctor.phases import hard_epochs, metric_learns, metric_rises, monitor, switch_epoch
from nearfar.doctor.rule import Evidence, Remedy, Rule, TooLittle
from nearfar.doctor.rules._remedies import (
    advice,
    learning_rate_gone,
    lower_learning_rate,
    peak_learning_rate,
)
from nearfar.doctor.rules.sparse_logs import other_logarithm
from nearfar.doctor.rules.sparse_metrics import no_room
from nearfar.doctor.series import LAST_PART, mean
from nearfar.doctor.signals import Signals

__all__ = ["RULES"]

#: share of the way from guessing to the floor below which nothing was learned: a run that learns at all passes a
#: twentieth of it within its first epochs
AT_CHANCE = 0.05
#: the same below 0, from which the loss is worse than guessing: a collapsed encoder scores within a few
#: hundredths of it
ABOVE_CHANCE = -0.03
#: a level with a standard error above this share of the way is not known well enough to be judged
TOO_NOISY = 0.025
#: temperatures at which logits of cosines lie within 4 of each other, and at which they lie 100 and more apart
BLUNT, SHARP = 0.5, 0.01
#: share of the way by which a loss whose logits are bounded lies below guessing
BELOW = 0.005
#: learning rates below this move no encoder from its start
STANDSTILL = 1e-6
#: change over the run, as a share of the way, that is none
STILL = 0.02
LEARNS_TITLE = "The loss stays near guessing, although the metric rises."
UNMOVED_TITLE = "The loss is worse than guessing, and has not moved since the start."
ONE_BATCH = "First overfit one batch: if its loss does not fall, the pairs or the gradient are wrong."
#: nats above the floor at which the targets have 95 % of the probability that they ask for
AT_FLOOR = -math.log(0.95)
#: share of the log at the floor from which a run spent its time there
LONG_AT_FLOOR = 0.5
#: share of the gradient and of the weights at which a term has a voice and does not use it
SILENT_SHARE, HEAVY_WEIGHT = 0.05, 0.2
#: epochs of hard batches that may lie above their own guessing level, which random batches set
HARD_AT_FIRST = 1
CHANCE_NEEDS = (
    ("loss", "uniform_level"), ("loss", "candidates"), ("loss", "batch_size"), ("train_loss", "uniform_level"),
    ("train_loss", "candidates"), ("train_loss", "batch_size"), ("*/raw", "*/uniform_level"),
    ("*/raw", "uniform_level"), ("*/raw", "candidates"), ("*/value", "uniform_level"),
)  # fmt: skip


def _hard_and_learning(signals: Signals) -> bool:
    """Whether the last batches were hard on purpose and the metric gains by them: their loss has no common level."""
    last = signals.last_epoch
    if last is None or not hard_epochs(signals, last):
        return False
    start = switch_epoch(signals)
    if start is not None and last < start + HARD_AT_FIRST:
        return True  # the first epoch of hard batches says nothing yet
    metric = monitor(signals).by_epoch()
    since = (start - 1) if start is not None else min(metric, default=0)
    return metric_rises(signals, since)


def _at_chance(signals: Signals) -> Evidence | None:
    planned = signals.number("epochs")
    if signals.last_epoch == 1 and planned is not None and planned > 1:
        raise TooLittle(f"only the first of {planned:.0f} epochs was logged")
    noisy = 0
    known = levels(signals)
    if other_logarithm(signals):
        return None  # which is judged there
    blunt = no_room(signals) is not None and metric_learns(signals)
    for level in known:
        whole = level.way()
        late = level.settled(whole)
        if not late or late.mean() - 2 * late.error() > AT_CHANCE:
            continue  # on its way, whatever it scatters
        # A run at chance is there throughout: where the last quarter scatters too much, more of it is as good.
        shares = [s for s in (LAST_PART, 0.5, 0.75, 1.0) if level.settled(whole, s).error() <= TOO_NOISY]
        if not shares:
            noisy += 1
            continue
        way = level.settled(whole, shares[0])
        # What is not worse than guessing by two standard errors is as good.
        none = way.mean() + 2 * way.error() >= ABOVE_CHANCE and way.mean() <= AT_CHANCE
        if blunt and way.mean() > max(BELOW, 2 * way.error()):
            continue  # below guessing by all that bounded logits allow
        if none and not _hard_and_learning(signals):
            evidence = _evidence(level, shares[0])
            return (
                replace(evidence, title=LEARNS_TITLE, severity="warning")
                if metric_learns(signals)
                else evidence
            )
    if noisy == len(known):
        raise TooLittle("the loss scatters too much for its level to be known; log more steps")
    return None


def _above_chance(signals: Signals) -> Evidence | None:
    if other_logarithm(signals):
        return None
    for level in levels(signals):
        way = level.settled(level.way())
        if way and way.epochs[-1] <= 1 and len(np.unique(way.epochs)) == 1:
            raise TooLittle("only the first epoch was logged, in which a loss may lie above guessing")
        if way and way.mean() + 2 * way.error() < ABOVE_CHANCE and not _hard_and_learning(signals):
            evidence = _evidence(level, LAST_PART)
            return replace(evidence, title=UNMOVED_TITLE) if _unmoved(level) else evidence
    return None


def _unmoved(level: Level) -> bool:
    """Whether the loss ends where it began: it never learned, rather than learned the wrong thing."""
    way = level.way()
    count = len(way.tail())
    first, last = way.part(slice(0, count)), way.tail()
    return abs(last.mean() - first.mean()) <= max(STILL, 2 * math.hypot(first.error(), last.error()))


def _evidence(level: Level, share: float) -> Evidence:
    loss, uniform = level.settled(level.loss, share), level.settled(level.uniform, share)
    way = level.settled(level.way(), share)
    what = "loss" if level.name == "loss" else f"term {level.name}"
    basis = f", taken as {level.assumed}" if level.assumed else ""
    worse = loss.mean() - uniform.mean()
    stands = (
        f"{worse:.3f} nats less"
        if way.mean() < ABOVE_CHANCE
        else f"{way.mean():+.0%} of the way to the floor"
    )
    return Evidence(
        f"Mean {what} {loss.mean():.3f} in {loss.where_text()}; guessing costs {uniform.mean():.3f}{basis} ({stands}).",
        {"loss": loss.mean(), "uniform_level": uniform.mean(), "way": way.mean(), "way_error": way.error()},
    )


def _at_floor(signals: Signals) -> Evidence | None:
    for level in levels(signals, by_floor=True):
        way, above = level.way(), level.above_floor()
        if not level.contrast:
            continue
        late, room = above.tail(), level.uniform.tail().mean() - level.floor.tail().mean()
        if room <= AT_FLOOR or late.mean() > AT_FLOOR or level.settled(way).mean() <= AT_CHANCE:
            continue
        share = mean([float(value <= AT_FLOOR) for value in above.values])
        floor = level.floor.tail().mean()
        what = "loss" if level.name == "loss" else f"term {level.name}"
        return Evidence(
            f"The {what} is {level.loss.tail().mean():.3f} in {late.where_text()}, {late.mean():.3f} above "
            f"its floor of {floor:.3f}; {share:.0%} of the log lies there.",
            {
                "loss": level.loss.tail().mean(),
                "floor": floor,
                "above_floor": late.mean(),
                "share_at_floor": share,
            },
            severity="warning" if share >= LONG_AT_FLOOR and floor > AT_FLOOR else None,
        )
    return None


def _chance_remedy(signals: Signals) -> Remedy:
    rate = lower_learning_rate(signals)
    if metric_learns(signals):
        return Remedy(
            "temperature=0.07", "Logits have little room: lower the temperature, or judge by the metric."
        )
    if (signals.number("temperature") or 0.0) >= BLUNT:
        return Remedy(
            "temperature=0.07",
            "At this temperature all candidates score nearly alike.",
            (rate,) if rate else (),
        )
    if learning_rate_gone(signals) is not None:
        return Remedy("", "Mend the schedule of the learning rate first, of which nothing is left.")
    if 0.0 < peak_learning_rate(signals) < STANDSTILL:
        return Remedy("lr=0.001", "At this learning rate nothing moves.")
    return Remedy(rate, f"{ONE_BATCH} Then divide the learning rate by 3.")


def _above_remedy(signals: Signals) -> Remedy:
    rate = lower_learning_rate(signals)
    if 0.0 < peak_learning_rate(signals) < STANDSTILL:
        return Remedy("lr=0.001", "At this learning rate nothing moves.")
    if 0.0 < (signals.number("temperature") or 1.0) <= SHARP:
        return Remedy(
            "temperature=0.07", "At this temperature one wrong candidate costs all.", (rate,) if rate else ()
        )
    words = "ivide the learning rate by 3, then raise the temperature."
    unmoved = any(_unmoved(level) for level in levels(signals))
    return Remedy(rate, f"{ONE_BATCH} Then d{words}" if unmoved else f"D{words}", ("temperature=0.1",))


def _floor_remedy(signals: Signals) -> Remedy:
    floor = signals.number("floor") or 0.0
    several = (signals.number("positives_per_row") or 1.0) > 1.5
    if floor > AT_FLOOR:
        return Remedy(
            "", "Do not wait for a lower loss: the targets allow none. Judge by metrics, give the term less weight, or "
            "change the target."
        )  # fmt: skip
    if several:
        return Remedy("loss.sum=outside", "Ask for all positives instead of the nearest one.")
    return Remedy(
        "sampler=hard", "Give it batches that still teach: harder or larger ones.", ("batch_size=512",)
    )


def _saturated(signals: Signals) -> Evidence | None:
    shares = {name: series.tail().mean() for name, series in signals.named("*/share").items()}
    weights = {name: abs(series.tail().mean()) for name, series in signals.named("*/weight").items()}
    total = sum(weights.values())
    if not sum(shares.values()):
        raise TooLittle("no term has a gradient where the shares were measured")
    for name in shares:
        # A single logged weight is a share of itself only if it says so.
        part = (
            weights.get(name, 0.0) / total if len(weights) > 1 and total else min(weights.get(name, 0.0), 1.0)
        )
        if name in weights and part > HEAVY_WEIGHT and shares[name] < SILENT_SHARE:
            where = signals.series(f"{name}/share").tail().where_text()
            return Evidence(
                f"Term {name} has {part:.0%} of the weight and {shares[name]:.1%} of the gradient in {where}.",
                {"share": shares[name], "weight_share": part},
                title=f"The term '{name}' is saturated: it weighs much and moves little.",
            )
    return None


RULES = (
    Rule(
        "loss-at-chance", "error", "The loss stays at chance: nothing is learned.", CHANCE_NEEDS, _at_chance,
        looks_at="`loss` beside `uniform_level`, ln(`candidates`) or ln(`batch_size`), last quarter, first "
        "epoch left out",
        threshold=f"{ABOVE_CHANCE:.0%} to {AT_CHANCE:.0%} of the way from guessing to the floor",
        cause="Pairs that do not belong together (one side shuffled or indexed in a different order), a "
        "collapsed encoder, frozen weights, or a learning rate that is far too high or too low.",
        remedy=_chance_remedy,
        source="a scorer that ranks all candidates alike has the loss ln(candidates) (van den Oord et al. 2018)",
    ),
    Rule(
        "loss-above-chance", "warning", "The loss is worse than guessing after the first epoch.", CHANCE_NEEDS,
        _above_chance,
        looks_at="the same; silent while hard batches are new, or raise the metric",
        threshold=f"below {ABOVE_CHANCE:.0%} of the way, by two standard errors",
        cause="Confident and wrong: the learning rate is too high for the weights it started from, the "
        "temperature too low, or the positives are not the right ones. Where the loss has not moved at all: no "
        "gradient reaches the weights, as an untrained encoder lies somewhat above guessing at low temperatures.",
        remedy=_above_remedy,
        source="a constant scorer has ln(candidates), so that more is worse than knowing nothing",
    ),
    Rule(
        "loss-at-floor", "note", "The loss is at its floor: these batches have nothing left to teach.",
        (*CHANCE_NEEDS, ("*/raw", "*/floor"), ("loss", "floor")), _at_floor,
        looks_at="`loss` − `floor` (0 where no floor is logged), last quarter",
        threshold=f"{AT_FLOOR:.2f} nats, the targets having 95 % of their probability; a warning where a "
        f"floor above 0 is kept for {LONG_AT_FLOOR:.0%} of the log",
        cause="The targets are met as far as they can be. The size of such a loss is its floor, not room to improve.",
        remedy=_floor_remedy, source="cross-entropy is at least the entropy of its target (Gibbs)",
    ),
    Rule(
        "term-saturated", "warning", "A term of the objective weighs much and moves little.",
        (("*/share", "*/weight"),), _saturated,
        looks_at="`*/share` of the gradient beside `*/weight`, last quarter",
        threshold=f"share below {SILENT_SHARE:.0%} at more than {HEAVY_WEIGHT:.0%} of the weight",
        cause="The term is at its floor, or its gradient is far smaller than its value makes it look.",
        remedy=advice("Drop the term or its weight, or change its target; its value says nothing about its pull."),
        source="weight is not influence: what moves the model is ‖w∇L‖ (Chen et al. 2018, GradNorm)",
    ),
)  # fmt: skip
