"""Metrics of sums: F1, accuracy over pictures, whatever is a function of counts added over items.

F1 is no mean of scores of items, but it is a function of sums over them, θ(Σ cᵢ). Its first-order expansion gives
every item a value,

    vᵢ = θ + n ∇θ · (cᵢ − c̄),

whose mean is θ exactly and whose spread is what the item contributes to the error (the infinitesimal jackknife, Jaeckel
1972). With these as ``per_item`` scores all that compares means compares such metrics, paired and over seeds. Where
items come in groups that share their luck, as the pairs of one picture do, the group is the item: add its counts up
first (``by_group``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike, NDArray

from nearfar.arguments import entries, flag, function, mapping, number, numbers, text, whole_number
from nearfar.errors import NearfarError
from nearfar.metrics.estimate import Estimate
from nearfar.metrics.intervals import bootstrap_levels, check_confidence, score_interval, t_quantile, wilson

__all__ = ["Statistic", "by_group", "count_estimate", "f1_macro", "f1_micro", "item_values", "share"]


#: sums (…, m), or (…, classes, m), to one number each; vectorised over the leading axes
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
#: with fewer items that count at all, resampling is too coarse
_ENOUGH = 30


def share(sums: Float[ndarray, "*rows 2"]) -> Float[ndarray, "*rows"]:
    """The first sum as a share of the second: accuracy from (right, all), precision from (true, found). 0 of 0 is 0.

    >>> float(share(np.array([3.0, 4.0])))
    0.75
    """
    sums = _sums(sums, 2)
    return _ratio(sums[..., 0], sums[..., 1])


def f1_micro(sums: Float[ndarray, "*rows classes 3"]) -> Float[ndarray, "*rows"]:
    """F1 of true positives, false positives and false negatives, added over the classes.

    >>> float(f1_micro(np.array([[3.0, 1.0, 1.0], [1.0, 0.0, 2.0]])))
    0.666...
    """
    return _f1(_sums(sums, 3, classes=True).sum(axis=-2))


def f1_macro(sums: Float[ndarray, "*rows classes 3"]) -> Float[ndarray, "*rows"]:
    """The mean over the classes of their F1; a class that is neither there nor found scores 0.

    >>> float(f1_macro(np.array([[3.0, 1.0, 1.0], [1.0, 0.0, 2.0]])))
    0.625
    """
    return np.asarray(_f1(_sums(sums, 3, classes=True)).mean(axis=-1))


def _sums(sums: ArrayLike, kinds: int, classes: bool = False) -> NDArray[np.float64]:
    array = numbers("sums", sums)
    if array.ndim < 1 + classes or array.shape[-1] != kinds or (classes and not array.shape[-2]):
        wanted = f"(…, classes, {kinds})" if classes else f"(…, {kinds})"
        raise NearfarError(f"sums have shape {array.shape}; {wanted} is needed")
    return array


def _f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    true, false, missed = sums[..., 0], sums[..., 1], sums[..., 2]
    return _ratio(2 * true, 2 * true + false + missed)


def _ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b != 0)


def by_group(
    counts: Float[ndarray, "n ..."], groups: Sequence[Hashable]
) -> tuple[list[Hashable], Float[ndarray, "groups ..."]]:
    """The groups in order of their first items, and the sum of each one's counts.

    >>> by_group(np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]), ["a", "b", "a"])
    (['a', 'b'], array([[2., 2.], [0., 1.]]))
    """
    counts = numbers("counts", counts)
    groups = entries("groups", groups)
    if not counts.ndim or len(groups) != len(counts):
        raise NearfarError(
            f"counts have shape {counts.shape} and groups {len(groups)} entries: one group for each row"
        )
    lacking = [i for i, group in enumerate(groups) if group is None or group != group]
    if lacking:
        raise NearfarError(
            f"groups has no name in {len(lacking)} of {len(groups)} rows, the first is row {lacking[0]}; give "
            "each such row a group of its own, or leave it out"
        )
    try:
        names = list(dict.fromkeys(groups))
    except TypeError:
        raise NearfarError(
            "groups holds lists or other values that are no names; numbers or texts are needed"
        ) from None
    place = {name: i for i, name in enumerate(names)}
    sums = np.zeros((len(names), *counts.shape[1:]))
    np.add.at(sums, [place[group] for group in groups], counts)
    return names, sums


def item_values(counts: Float[ndarray, "n ..."], statistic: Statistic) -> Float[ndarray, " n"]:
    """A value of every item, of which ``statistic`` of the sums is the mean: what ``Evaluation.per_item`` takes.

    They may lie outside the range of the statistic: a value says how an item pulls, not how well it did.

    >>> hits = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])  # for a share: the hits themselves
    >>> np.abs(item_values(hits, share)).round(6).tolist()
    [1.0, 0.0, 1.0, 1.0]
    """
    counts = _checked(counts)
    function("statistic", statistic)
    n, mean = len(counts), counts.mean(axis=0)
    flat = mean.ravel()
    # Central differences on the means: θ is homogeneous of degree 0 (a ratio), so that means serve as sums do.
    step = 1e-4 * np.maximum(np.abs(flat), 1.0 / n)
    moved = np.repeat(flat[None], 2 * flat.size, axis=0)
    index = np.arange(flat.size)
    moved[index, index] += step
    moved[flat.size + index, index] -= step
    values = _values(statistic, moved.reshape(-1, *mean.shape) * n, (len(moved),))
    slope = (values[: flat.size] - values[flat.size :]) / (2 * step)
    influence: NDArray[np.float64] = (counts - mean).reshape(n, -1) @ slope
    # Differences leave a mean of 1e-9 or so, and the mean is to be the statistic.
    return influence - influence.mean() + float(_values(statistic, counts.sum(axis=0), ()))


def _values(statistic: Statistic, sums: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """What the function that the user gave makes of sums, checked: it meets them here first."""
    try:
        values = np.asarray(statistic(sums), dtype=np.float64)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise NearfarError(
            f"statistic fails for sums of these counts, of shape {sums.shape}: {type(error).__name__}: {error}"
        ) from error
    if values.shape != shape:
        raise NearfarError(
            f"statistic gives {values.shape} for sums of these counts, of shape {sums.shape}; one number for "
            f"each set of sums, {shape}, is needed"
        )
    return values


def count_estimate(
    counts: Float[ndarray, "n ..."],
    statistic: Statistic,
    metric: str,
    *,
    chance: float,
    split: str | None = None,
    protocol: Mapping[str, object] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    trivial: bool = False,
) -> Estimate:
    """``statistic`` of the sums of ``counts``, as an estimate whose interval resamples items.

    For statistics between 0 and 1 that do not change when all counts are doubled. The interval is bias-corrected and
    accelerated (Efron 1987). Where fewer than 30 items have a count that is not 0, or with ``resamples=0``, it has
    the width that the items' values give, bent as Wilson's is so that it stays within [0, 1].

    ``chance`` is what guessing, or the best constant answer, scores on these items.

    >>> counts = np.array([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]])
    >>> print(count_estimate(counts, f1_micro, "F1", chance=0.5))
    F1 .667 [.11, .97] (chance .5, n 4)
    """
    check_confidence(confidence)
    counts = _checked(counts)
    function("statistic", statistic)
    text("metric", metric)
    chance, trivial = number("chance", chance), flag("trivial", trivial)
    if split is not None:
        text("split", split)
    if protocol is not None:
        mapping("protocol", protocol)
    if 0 < whole_number("resamples", resamples, 0) < 100:
        raise NearfarError(
            f"resamples is {resamples}; the ends of an interval need at least 100, and 0 means none"
        )
    seed = whole_number("seed", seed, 0)
    value = float(_values(statistic, counts.sum(axis=0), ()))
    if not 0.0 <= value <= 1.0:
        raise NearfarError(f"{metric} is {value}: count_estimate is for statistics between 0 and 1")
    n = len(counts)
    low, high, method = _interval(counts, statistic, value, confidence, resamples, seed)
    stated = {"split": split, "interval": method, "confidence": confidence} | dict(protocol or {})
    return Estimate(value, low, high, chance, n, trivial, metric, stated)


def _interval(
    counts: NDArray[np.float64],
    statistic: Statistic,
    value: float,
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float, str]:
    n = len(counts)
    counted = int(np.count_nonzero(counts.reshape(n, -1).any(axis=1)))
    if not counted:
        return 0.0, 1.0, "none: nothing was counted"
    if n == 1:
        return 0.0, 1.0, "none: one item"
    values = item_values(counts, statistic)
    variance = float(values.var(ddof=1))
    if not 0.0 < value < 1.0 or variance <= 0.0:
        return (*wilson(value, counted, confidence), "Wilson, items that count")
    if resamples and counted >= _ENOUGH:
        drawn = _resampled(counts, statistic, resamples, seed)
        levels = bootstrap_levels(drawn, value, values - value, confidence)
        low, high = np.quantile(drawn, levels)
        return float(low), float(high), "bootstrap (BCa)"
    half = t_quantile(0.5 + confidence / 2, max(counted - 1, 1)) ** 2 * variance / n
    return (*score_interval(value, half / (value * (1 - value))), "bent normal")


def _resampled(
    counts: NDArray[np.float64], statistic: Statistic, resamples: int, seed: int
) -> NDArray[np.float64]:
    n = len(counts)
    rng = np.random.default_rng(seed)
    flat = counts.reshape(n, -1)
    drawn = []
    rows = max((1 << 21) // n, 1)  # 16 MB of weights at a time
    for start in range(0, resamples, rows):
        times = rng.multinomial(n, np.full(n, 1.0 / n), size=min(rows, resamples - start))
        sums = times.astype(np.float64) @ flat
        drawn.append(np.asarray(statistic(sums.reshape(-1, *counts.shape[1:]))))
    return np.concatenate(drawn)


def _checked(counts: ArrayLike) -> NDArray[np.float64]:
    array = numbers("counts", counts, finite=False)
    if array.ndim < 2 or not len(array):
        raise NearfarError(
            f"counts have shape {array.shape}: one row of counts for each of some items is needed"
        )
    if not np.isfinite(array).all():
        raise NearfarError(f"counts: {int((~np.isfinite(array)).sum())} counts are not finite")
    return array
