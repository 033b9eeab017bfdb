"""The correlation of predicted with measured numbers, column by column, averaged over columns and over groups of items.

Expression of genes is judged so (Xie et al., NeurIPS 2023): each gene is correlated over the spots of a slide, and the
correlations are averaged over genes, then over slides.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from nearfar.errors import NearfarError
from nearfar.metrics.estimate import Estimate
from nearfar.metrics.intervals import bootstrap_levels, few_runs, t_quantile

__all__ = ["correlation_values", "pearson", "pearson_estimate"]


def pearson(
    predicted: Float[np.ndarray, "n g"], measured: Float[np.ndarray, "n g"]
) -> Float[np.ndarray, " g"]:
    """Correlation of each gene over the spots: 0 where the prediction is constant, NaN where the measurement is.

    >>> pearson(np.array([[1.0, 1], [2, 1], [3, 1]]), np.array([[2.0, 1], [4, 2], [6, 3]])).round(6).tolist()
    [1.0, 0.0]
    """
    a, b = _standardised(predicted), _standardised(measured)
    r: NDArray[np.float64] = np.mean(a * b, axis=0)
    r[~b.any(axis=0)] = np.nan
    return r


def correlation_values(
    predicted: Float[np.ndarray, "n g"], measured: Float[np.ndarray, "n g"], slides: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], dict[int, float]]:
    """A value for every spot whose mean is the mean correlation, and the mean correlation of each slide.

    A correlation is no mean, but to first order spot i pulls it by a_i b_i − r (a_i² + b_i²) / 2, a and b standardised
    (its influence function; Devlin et al. 1975). With these as scores of items, models are compared in pairs. All
    slides have the same weight, whatever the number of their spots. On each slide, genes that are constant there are
    left out.
    """
    values, by_slide = np.empty(len(predicted)), {}
    names = np.unique(slides)
    for slide in names.tolist():
        own = np.flatnonzero(slides == slide)
        a, b = _standardised(predicted[own]), _standardised(measured[own])
        varies = b.any(axis=0)
        if not varies.any():
            raise NearfarError(
                f"slide {slide}: no gene varies over its {len(own)} spots, so that nothing correlates."
            )
        a, b = a[:, varies], b[:, varies]
        r = np.mean(a * b, axis=0)
        by_slide[slide] = float(r.mean())
        pull = a * b - r * (a**2 + b**2) / 2
        # The mean of a² + b² is 2, but 1 where the prediction is constant; there r is 0 and nothing pulls.
        values[own] = (r.mean() + pull.mean(axis=1)) * len(predicted) / (len(names) * len(own))
    return values, by_slide


def pearson_estimate(
    predicted: Float[np.ndarray, "n g"],
    measured: Float[np.ndarray, "n g"],
    slides: Int[np.ndarray, " n"],
    metric: str,
    *,
    split: str,
    protocol: dict[str, object],
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Estimate, Float[np.ndarray, " n"], dict[int, float]]:
    """The mean correlation, the values of the spots behind it, and that of each slide.

    The interval is over slides (t) where there are several; of one slide it is over its spots, resampled (BCa), as if
    they were independent. Spots side by side are not, so different slides can differ by more.
    """
    values, by_slide = correlation_values(predicted, measured, slides)
    value = float(np.mean(list(by_slide.values())))
    if len(by_slide) > 1:
        low, high = few_runs(list(by_slide.values()), confidence)
        method = "t over slides"
    elif resamples:
        drawn = _resampled(predicted, measured, resamples, seed)
        low, high = np.quantile(drawn, bootstrap_levels(drawn, value, values - value, confidence)).tolist()
        method = "bootstrap over spots (BCa)"
    else:
        half = (
            t_quantile(0.5 + confidence / 2, len(values) - 1) * float(values.std(ddof=1)) / len(values) ** 0.5
        )
        low, high, method = value - half, value + half, "normal over spots"
    stated = {"genes": predicted.shape[1], "slides": len(by_slide), "split": split, "interval": method}
    stated |= {"confidence": confidence} | protocol
    return (
        Estimate(value, max(low, -1.0), min(high, 1.0), 0.0, len(values), False, metric, stated),
        values,
        by_slide,
    )


def _resampled(
    predicted: NDArray[np.float64], measured: NDArray[np.float64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """The mean correlation of spots drawn with replacement, from weighted sums."""
    a, b = _standardised(predicted), _standardised(measured)
    a, b = a[:, b.any(axis=0)], b[:, b.any(axis=0)]
    n = len(a)
    moments = np.concatenate([a, b, a * a, b * b, a * b], axis=1)
    rng = np.random.default_rng(seed)
    correlations = []
    rows = max((1 << 22) // moments.shape[1], 1)  # 32 MB of sums at a time
    for start in range(0, resamples, rows):
        weight = rng.multinomial(n, np.full(n, 1 / n), size=min(rows, resamples - start)) / n
        ma, mb, aa, bb, ab = np.split(weight @ moments, 5, axis=1)
        spread = (aa - ma**2) * (bb - mb**2)
        r = np.divide(
            ab - ma * mb, np.sqrt(np.maximum(spread, 0)), out=np.zeros_like(ab), where=spread > 1e-12
        )
        correlations.append(r.mean(axis=1))
    return np.concatenate(correlations)


def _standardised(x: Float[np.ndarray, "n g"]) -> Float[np.ndarray, "n g"]:
    """Mean 0 and variance 1 over the spots; all zeros where a column is constant."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=0)
    sd = centred.std(axis=0)
    varies = sd > 1e-9 * np.maximum(1.0, np.abs(x).max(axis=0, initial=0.0))
    return np.divide(centred, sd, out=np.zeros_like(centred), where=varies)
