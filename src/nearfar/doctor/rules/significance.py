"""Whether a gain is one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nearfar.doctor.phases import lower_is_better, monitored_gain
from nearfar.doctor.rule import Evidence, Rule, TooLittle
from nearfar.doctor.rules._remedies import advice
from nearfar.doctor.series import estimate_of, mean, number, numbers, plain
from nearfar.doctor.signals import Signals
from nearfar.errors import NearfarError

__all__ = ["RULES"]

#: change of the gap, as a share of the groups' common change, below which the gain is common
COMMON = 0.5
#: standard deviations of single runs that a difference must exceed where only their scatter is known
SPREAD = 2.0


def _common(signals: Signals) -> Evidence | None:
    judged = 0
    for metric, groups in signals.mapping("change").items():
        groups = plain(groups)
        if not isinstance(groups, Mapping):
            raise NearfarError(
                f"context['change']['{metric}'] is {type(groups).__name__}; {{group: difference}} is needed"
            )
        changes = {str(g): estimate_of(value, metric)["value"] for g, value in groups.items() if g != "gap"}
        if len(changes) < 2 or None in changes.values():
            continue
        judged += 1
        common, gap = mean(list(changes.values())), max(changes.values()) - min(changes.values())
        if min(changes.values()) * max(changes.values()) <= 0 or gap > COMMON * abs(common):
            continue
        listed = ", ".join(f"{group} {value:+.4f}" for group, value in changes.items())
        return Evidence(
            f"{metric}: {listed}; the change that all share is {common:+.4f}, the gap moves by {gap:.4f}.",
            {"common": common, "gap": gap} | {f"change/{group}": value for group, value in changes.items()},
        )
    if not judged:
        raise TooLittle("changes of two groups are needed")
    return None


def _interval(metric: str, difference: object) -> tuple[float, float, float, str] | None:
    """Value, interval and what it is over; from an interval, from seeds, or from the scatter of single runs."""
    given = plain(difference)
    if isinstance(given, (list, tuple)):
        given = {"per_seed": given}
    if not isinstance(given, Mapping):
        return None
    if given.get("low") is not None and given.get("high") is not None:
        low, high = (number(given[key], metric, "context['comparison']") for key in ("low", "high"))
        value = number(given.get("value"), metric, "context['comparison']")
        assert low is not None
        assert high is not None
        return (low + high) / 2 if value is None else value, low, high, "its interval"
    if given.get("sd") is not None and given.get("value") is not None:
        value, sd = (number(given[key], metric, "context['comparison']") for key in ("value", "sd"))
        assert value is not None
        assert sd is not None
        return (
            value,
            value - SPREAD * sd,
            value + SPREAD * sd,
            f"{SPREAD:g} standard deviations of single runs",
        )
    return _over_seeds(metric, given)


def _over_seeds(metric: str, given: Mapping[str, object]) -> tuple[float, float, float, str] | None:
    from nearfar.metrics.intervals import t_quantile  # loads PyTorch with its floor

    where = f"context['comparison']['{metric}']"
    if given.get("per_seed") is not None:
        each = numbers(list(plain(given["per_seed"])), "per_seed", where)
        n, value = len(each), mean(each)
        if n < 2:
            return None
        error, free = _deviation(each) / math.sqrt(n), n - 1.0
    elif given.get("values") is not None and given.get("baseline") is not None:
        ours = numbers(list(plain(given["values"])), "values", where)
        theirs = numbers(list(plain(given["baseline"])), "baseline", where)
        if len(ours) == len(theirs):
            return _over_seeds(metric, {"per_seed": [a - b for a, b in zip(ours, theirs, strict=True)]})
        if min(len(ours), len(theirs)) < 2:
            return None
        value = mean(ours) - mean(theirs)
        parts = _deviation(ours) ** 2 / len(ours), _deviation(theirs) ** 2 / len(theirs)
        error = math.sqrt(sum(parts))
        # Welch and Satterthwaite; equal values have no scatter to speak of.
        below = parts[0] ** 2 / (len(ours) - 1) + parts[1] ** 2 / (len(theirs) - 1)
        n, free = len(ours) + len(theirs), (sum(parts) ** 2 / below if below else math.inf)
    else:
        return None
    half = t_quantile(0.975, free) * error
    return value, value - half, value + half, f"the 95 % interval over {n} seeds"


def _deviation(values: tuple[float, ...]) -> float:
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))


def _gain(signals: Signals) -> Evidence | None:
    known = monitored_gain(signals.mapping("gain"), signals.text("monitor"))
    if known is None:
        raise TooLittle("the monitored metric has no difference from before training")
    split, name, change = known
    value, low, high = (float(change[key]) for key in ("value", "low", "high"))
    if not low <= 0 <= high and (value > 0) != lower_is_better(signals, name):
        return None
    before, now = (
        estimate_of(signals.mapping(where).get(split, {}).get(name), name)["value"]
        for where in ("before_training", "metrics")
    )
    worse = not low <= 0 <= high
    beside = "" if before is None or now is None else f" was {before:.4g} before training and is {now:.4g};"
    return Evidence(
        f"{name} on {split}{beside} the difference is {value:+.4f} [{low:+.4f}, {high:+.4f}].",
        {"difference": value, "low": low, "high": high},
        severity="error" if worse else None,
        title="The model is worse than before training." if worse else None,
    )


def _noise(signals: Signals) -> Evidence | None:
    judged = 0
    comparison = signals.mapping("comparison")
    # One difference alone needs no name.
    if "low" in comparison or "per_seed" in comparison or "values" in comparison:
        comparison = {"the metric": comparison}
    for metric, difference in comparison.items():
        interval = _interval(metric, difference)
        if interval is None:
            continue
        judged += 1
        value, low, high, over = interval
        if low <= 0 <= high:
            return Evidence(
                f"{metric}: {value:+.4f}, and {over} is [{low:+.4f}, {high:+.4f}], which covers 0.",
                {"difference": value, "low": low, "high": high},
            )
    if not judged:
        raise TooLittle(
            "a difference with an interval, with two seeds, or with the scatter of runs is needed"
        )
    return None


RULES = (
    Rule(
        "training-no-gain", "warning", "Training changed nothing that could be told from chance.", (("gain",),), _gain,
        looks_at="`gain` of the monitored metric, on test where there is one",
        threshold="the 95 % interval of the difference covers 0; an error where the model became worse",
        cause="What is trained does not serve what is measured; the learning rate is far too low or too high; what was "
        "pretrained was as good already; or there are too few items to see a change.",
        remedy=advice("See what else is found. Where nothing is: more items to measure on, more epochs, a different "
                      "learning rate; where the model became worse, use it as it was."),
        source="a score says nothing of training without the score before it",
    ),
    Rule(
        "common-mode-gain", "warning", "All groups changed alike: this is no change of the "
        "gap.", (("change",),), _common,
        looks_at="`change`: each group's difference", threshold=f"same sign, and the gap moves by at most "
        f"{COMMON:g} of the common change",
        cause="What was changed helps (or hurts) everybody; nothing in it knows the groups.",
        remedy=advice("Report common mode and gap apart, each with an interval."),
        source="an AP gap of .1063 that became .1049 while both groups gained .009",
    ),
    Rule(
        "gain-in-noise", "warning", "The difference lies within its noise.", (("comparison",),), _noise,
        looks_at="`comparison`: interval, values by seed (t interval), or scatter of single runs",
        threshold=f"the 95 % interval covers 0; {SPREAD:g} standard deviations",
        cause="Too few seeds or items for a difference of this size, or none is there.",
        remedy=advice("Run more seeds and pair them (nearfar compare); until then neither is better."),
        source="Bouthillier et al. 2021, accounting for variance in machine learning benchmarks",
    ),
)  # fmt: skip
