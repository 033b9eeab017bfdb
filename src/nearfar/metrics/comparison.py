"""Is one way better than the other? A paired difference, its interval, and a verdict that may be neither.

Two trainings differ by their seeds and are tested on a sample of items, and both could have fallen otherwise.
An interval over items alone calls one lucky seed a better method; an interval over seeds alone forgets that
the test set is a sample. The interval here covers both, and there are few seeds. With the variance of the mean split
into what the seeds show (A, with S − 1 degrees of freedom) and the rest (B, many degrees), no single t quantile is
right: Satterthwaite's covers as little as 87 % with two seeds and 92 % with three, and adding the two squares up to
98.7 %. Here the half-width is

    h = (w t_{S−1} + (1 − w) t_{n−1}) √(A + B),   w = A² / (A² + ((S − 1) B / 2)²),

which has the right quantile where one source rules and turns from one to the other fast enough: 93.8 to 97.2 % over
two to ten seeds and every ratio of A to B (``benchmarks/interval_coverage.py``). The form is that of Cochran and Cox
(1950), whose w = A / (A + B) covers up to 97.8 %; the squares and the factor were found by search
(``benchmarks/interval_methods.py``).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike, NDArray

from nearfar.arguments import any_number, choice, flag, instance, number, numbers, shown, text, whole_number
from nearfar.directions import lower_is_better
from nearfar.errors import NearfarError
from nearfar.metrics.estimate import Estimate, comparable
from nearfar.metrics.intervals import (
    check_confidence,
    mean_interval,
    normal_quantile,
    score_interval,
    score_variance,
    t_quantile,
)

__all__ = [
    "Difference",
    "Spread",
    "compare",
    "holm",
    "items_needed",
    "paired_difference",
    "seeds_interval",
    "spread_of_difference",
]


@dataclass(frozen=True)
class Spread:
    """What is known of the error of a mean over ``seeds`` × ``n`` scores.

    ``of_seeds`` is A and ``beside`` is B of the module's text; ``of_items`` is the variance of the mean over items.
    """

    seeds: int
    n: int
    of_items: float
    of_seeds: float = 0.0
    beside: float = 0.0

    def half_width(self, level: float) -> float:
        """h, for an interval whose upper end has this ``level`` (.975 for 95 %)."""
        of_many = t_quantile(level, self.n - 1)
        a, b = self.of_seeds, self.beside
        if self.seeds == 1 or a == 0.0:
            return of_many * math.sqrt(self.of_items)
        weight = a**2 / (a**2 + ((self.seeds - 1) / 2 * b) ** 2)
        half = (weight * t_quantile(level, self.seeds - 1) + (1 - weight) * of_many) * math.sqrt(a + b)
        # Two seeds may agree by luck: the interval is never narrower than one standard error of the items.
        return max(half, math.sqrt(self.of_items))

    def p_value(self, value: float) -> float:
        """One minus the confidence at which the interval around ``value`` begins to touch 0.

        >>> round(Spread(seeds=1, n=1000, of_items=0.01).p_value(0.1962), 3)
        0.05
        """
        low, high = 0.0, 1.0  # of log10 p: from 1 down to 1e-12
        if abs(value) <= self.half_width(0.5):
            return 1.0
        for _ in range(25):
            middle = 0.5 * (low + high)
            if self.half_width(1 - 0.5 * 10 ** (-12 * middle)) < abs(value):
                low = middle
            else:
                high = middle
        return float(10 ** (-12 * low))


def seeds_interval(scores: Float[ndarray, "seeds n"], confidence: float = 0.95) -> tuple[float, float, str]:
    """The interval of the mean of scores (S, n) over seeds and items, and the method used.

    Scores within [0, 1] have an interval within [0, 1], bent as Wilson's is, so that it also covers where nearly
    all are hits; for one seed it is that of ``mean_interval``. Other scores have mean ± h.

    >>> import numpy as np
    >>> hits = np.ones((5, 40))
    >>> hits[0, 0] = hits[3, 7] = 0.0
    >>> low, high, method = seeds_interval(hits)
    >>> round(low, 2), round(high, 3), method
    (0.95, 0.998, 'seeds and items')
    """
    check_confidence(confidence)
    scores = numbers("scores", scores)
    if scores.ndim != 2 or 0 in scores.shape:
        raise NearfarError(f"scores have shape {scores.shape}; they are (seeds, items)")
    seeds, n = scores.shape
    if n < 2:
        raise NearfarError(f"scores are of {n} item, which gives no interval; score at least two")
    level = 0.5 + confidence / 2
    bounded = bool(((scores >= 0.0) & (scores <= 1.0)).all())
    if seeds == 1 and bounded:
        return mean_interval(scores[0], confidence)
    mean = float(scores.mean())
    of_items = scores.mean(axis=0)
    most = mean * (1 - mean)
    if bounded and most <= 0.0:  # all hits, or all misses: nothing says how the items would vary
        return (*score_interval(mean, t_quantile(level, n - 1) ** 2 / n), "seeds and items")
    # Several seeds show of every item how it varies: the number of items counts, not that of the differing ones.
    items = score_variance(of_items, n) * most / n if bounded else float(of_items.var(ddof=1)) / n
    half = _spread(scores, items).half_width(level)
    ends = score_interval(mean, half**2 / most) if bounded else (mean - half, mean + half)
    return (*ends, "seeds and items" if seeds > 1 else "items")


def spread_of_difference(differences: Float[ndarray, "seeds n"], scale: float) -> Spread:
    """The error of the mean of differences (S, n) between two arms.

    Where most items do not differ, the few that do show too little of the variance: with two items in a hundred that
    differ, 13 % of samples show none, and the interval would be [0, 0]. Two further items are counted in, in
    proportion to the share that does not differ, of the size of the differences seen, or of ``scale`` if there
    are none (after Bonett and Price 2012, whose items also move the middle).
    """
    of_items = differences.mean(axis=0)
    n = of_items.size
    differing = of_items[of_items != 0.0]
    unseen = 2.0 * (1.0 - differing.size / n)
    size = float((differing**2).mean()) if differing.size else scale**2
    total = float(((of_items - of_items.mean()) ** 2).sum()) + unseen * size
    return _spread(differences, total / (n + unseen - 1) / (n + unseen))


def _spread(scores: Float[ndarray, "seeds n"], of_items: float) -> Spread:
    """The parts of the error, of which that over items is given."""
    seeds, n = scores.shape
    if seeds == 1:
        return Spread(seeds, n, of_items)
    rows, columns = scores.mean(axis=1), scores.mean(axis=0)
    rest = scores - rows[:, None] - columns[None, :] + scores.mean()
    shared = float((rest**2).sum()) / ((seeds - 1) * (n - 1)) / (seeds * n)
    return Spread(seeds, n, of_items, float(rows.var(ddof=1)) / seeds, max(of_items - shared, 0.0))


Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Difference:
    """A difference ``a − b`` with its interval.

    ``n`` counts items and ``seeds`` trainings of each side; ``per_seed`` holds the mean difference of each
    seed, ``relative`` is the difference as a share of b's mean (NaN where that is 0), ``scope`` says what the
    interval speaks of, and ``verdict`` is "better", "worse" or "not distinguishable", said of a. ``spread``
    is what the interval was made from.
    """

    value: float
    low: float
    high: float
    n: int
    seeds: int
    per_seed: tuple[float, ...]
    verdict: str
    relative: float
    metric: str
    confidence: float
    scope: str
    spread: Spread | None = None

    def __post_init__(self) -> None:
        for name in ("value", "low", "high", "relative"):
            object.__setattr__(self, name, any_number(name, getattr(self, name)))
        for name in ("n", "seeds"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 0))
        per_seed = numbers("per_seed", self.per_seed, finite=False)
        if per_seed.ndim != 1:
            raise NearfarError(f"per_seed has shape {per_seed.shape}; one number for each seed is needed")
        object.__setattr__(self, "per_seed", tuple(per_seed.tolist()))
        choice("verdict", self.verdict, ("better", "worse", "not distinguishable"))
        text("metric", self.metric)
        text("scope", self.scope)
        object.__setattr__(self, "confidence", check_confidence(self.confidence))
        if self.spread is not None:
            instance("spread", self.spread, Spread)

    def __str__(self) -> str:
        relative = "" if math.isnan(self.relative) else f", {self.relative:+.1%}"
        trainings = f"{self.seeds} {'seed' if self.seeds == 1 else 'seeds'}, " if self.seeds else ""
        return (
            f"{self.metric} difference {self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]{relative}: "
            f"{self.verdict} ({trainings}n {self.n}; interval over {self.scope})"
        )

    def to_dict(self) -> dict[str, object]:
        """The fields as strict JSON takes them; an undefined relative difference becomes ``None``."""
        fields = {name: value for name, value in asdict(self).items() if name != "spread"}
        return fields | {"relative": None if math.isnan(self.relative) else self.relative}

    @property
    def p(self) -> float:
        """One minus the confidence at which the interval begins to touch 0; NaN of unpaired differences."""
        return math.nan if self.spread is None else self.spread.p_value(self.value)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    confidence: float = 0.95,
    metric: str = "score",
    higher_is_better: bool | None = None,
) -> Difference:
    """The mean of ``a − b`` for scores (S, n) of the same S seeds on the same n items; (n,) is one seed.

    The interval covers both sources of chance, seeds and items; how, and how often it covers the truth, says
    ``nearfar.metrics.comparison``. It is wide with two seeds because two seeds say little.

    With one seed the interval covers items only, and ``scope`` says so. Raises ``NearfarError`` for shapes
    that differ, fewer than two items, or scores that are not finite. ``higher_is_better`` is by default what the
    name of the ``metric`` says (``Estimate.higher_is_better`` where there is an estimate).

    >>> generator = np.random.default_rng(0)
    >>> base = generator.random((3, 400))
    >>> gain = base + 0.05 + 0.02 * generator.standard_normal((3, 400))
    >>> paired_difference(gain, base).verdict
    'better'
    >>> paired_difference(base, base[:, ::-1]).verdict
    'not distinguishable'
    """
    check_confidence(confidence)
    text("metric", metric)
    if higher_is_better is None:
        higher_is_better = not lower_is_better(metric)
    flag("higher_is_better", higher_is_better)
    first, second = _scores(a, "a"), _scores(b, "b")
    if first.shape != second.shape:
        raise NearfarError(
            f"a has shape {first.shape} and b {second.shape} (seeds, items); a paired difference needs the "
            "same seeds on the same items, in the same order"
        )
    differences = first - second
    seeds, n = differences.shape
    if n < 2:
        raise NearfarError(f"a and b are of {n} item, which gives no interval; score at least two")
    value = float(differences.mean())
    per_seed = differences.mean(axis=1)
    low, high = min(float(first.min()), float(second.min())), max(float(first.max()), float(second.max()))
    scale = 1.0 if low >= 0.0 and high <= 1.0 else high - low
    spread = spread_of_difference(differences, scale)
    half = spread.half_width(0.5 + confidence / 2)
    base = float(second.mean())
    return Difference(
        value=value,
        low=value - half,
        high=value + half,
        n=n,
        seeds=seeds,
        per_seed=tuple(per_seed.tolist()),
        verdict=_verdict(value - half, value + half, higher_is_better),
        relative=value / base if base else math.nan,
        metric=metric,
        confidence=confidence,
        scope="seeds and items"
        if seeds > 1
        else "items only: one seed cannot show what a different one would give",
        spread=spread,
    )


def items_needed(difference: Difference, power: float = 0.8) -> int | None:
    """How many items would tell this difference from 0 in ``power`` of all cases, at its level of confidence.

    Takes the difference and the spread of items as they were seen: n = ((z₁₋α/₂ + z_power) σ / d)². It is an estimate
    from the same items, and as uncertain as they are. ``None`` for a difference of 0. Several seeds vary besides the
    items, and unpaired differences have no spread: both raise ``NearfarError``.

    >>> a, b = np.random.default_rng(0).random((2, 400))
    >>> d = paired_difference(0.9 * b + 0.1 * a + 0.02, b)
    >>> d.verdict, items_needed(d), items_needed(paired_difference(b, b))
    ('better', 26, None)
    """
    instance("difference", difference, Difference)
    power = number("power", power)
    if not 0.0 < power < 1.0:
        raise NearfarError(f"power is {power}; a share between 0 and 1 is needed, such as 0.8")
    spread = difference.spread
    if spread is None or spread.seeds != 1:
        raise NearfarError(
            "difference is of several seeds, or unpaired; the number of items is known for paired scores of one run "
            "each"
        )
    if difference.value == 0.0:
        return None
    together = normal_quantile(0.5 + difference.confidence / 2) + normal_quantile(power)
    return max(2, math.ceil(spread.of_items * spread.n * (together / difference.value) ** 2))


def holm(differences: Mapping[Key, Difference], confidence: float = 0.95) -> dict[Key, str]:
    """Verdicts that hold for all of several differences at once, by Holm's step-down rule (1979).

    The chance that any of them is "better" or "worse" without a true difference is at most 1 − ``confidence``,
    however they depend on each other. The smallest p must be below (1 − confidence) / N, the next below
    (1 − confidence) / (N − 1), and so on; the first that is not ends it.

    >>> base = np.random.default_rng(0).random((3, 400))
    >>> noise = 0.02 * np.random.default_rng(1).standard_normal((3, 400))
    >>> holm({"a": paired_difference(base + 0.05 + noise, base), "b": paired_difference(base + noise, base)})
    {'a': 'better', 'b': 'not distinguishable'}
    """
    check_confidence(confidence)
    if not isinstance(differences, Mapping):
        raise NearfarError(
            f"differences is {shown(differences)}; a mapping of names to differences is needed"
        )
    for key, difference in differences.items():
        instance(f"differences[{key!r}]", difference, Difference)
    p = {key: difference.p for key, difference in differences.items()}
    unknown = [str(key) for key, value in p.items() if math.isnan(value)]
    if unknown:
        raise NearfarError(f"no p of {', '.join(unknown)}: Holm's rule needs paired differences")
    verdicts = dict.fromkeys(differences, "not distinguishable")
    ordered = sorted(differences, key=lambda key: p[key])
    for left, key in zip(range(len(ordered), 0, -1), ordered, strict=True):
        if p[key] > (1 - confidence) / left:
            break
        verdicts[key] = differences[key].verdict
    return verdicts


def compare(a: Estimate, b: Estimate) -> Difference:
    """The difference of two estimates on the same items, when only their intervals are known.

    Refuses with the reason when metric, split, gallery or a different part of the protocol differ (see
    ``comparable``). The interval combines the two one-sided widths (Zou and Donner 2008). It takes the two as
    independent, which for the same items is cautious; ``paired_difference`` on per-query scores is sharper.

    >>> protocol = {"gallery": 100, "split": "5f0c", "confidence": 0.95}
    >>> a = Estimate(0.62, 0.58, 0.66, 0.01, 600, False, "R@1", protocol)
    >>> b = Estimate(0.50, 0.46, 0.54, 0.01, 600, False, "R@1", protocol)
    >>> print(compare(a, b))
    R@1 difference +0.1200 [+0.0634, +0.1766], +24.0%: better (n 600; interval over items only, unpaired)
    """
    reason = comparable(a, b)  # which checks that both are estimates
    if reason is None and a.protocol.get("confidence") != b.protocol.get("confidence"):
        reason = f"confidence differs: {a.protocol.get('confidence')} and {b.protocol.get('confidence')}"
    if reason is not None:
        raise NearfarError(f"{a.metric} and {b.metric} are not compared: {reason}")
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Difference(
        value=value,
        low=low,
        high=high,
        n=a.n,
        seeds=0,
        per_seed=(),
        verdict=_verdict(low, high, bool(a.higher_is_better)),
        relative=value / b.value if b.value else math.nan,
        metric=a.metric,
        confidence=float(a.protocol.get("confidence", 0.95)),
        scope="items only, unpaired",
    )


def _scores(scores: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.atleast_2d(numbers(name, scores, finite=False))
    if array.ndim != 2 or array.size == 0:
        raise NearfarError(
            f"{name} has shape {array.shape}; scores are (seeds, items), or (items,) for one seed"
        )
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise NearfarError(
            f"{name} holds {bad} scores that are not finite; leave out the item in both or mend it"
        )
    return array


def _verdict(low: float, high: float, higher_is_better: bool) -> str:
    if low <= 0.0 <= high:
        return "not distinguishable"
    return "better" if (low > 0.0) == higher_is_better else "worse"
