"""How healthy a space of embeddings is: directions in use, spread, distance of two views, hubs.

A loss can fall while the space behind it shrinks to a few directions, or while two views lie in two separate cones.
These numbers show it. All of them are computed in float64 on the CPU, from inputs of any precision, and draw nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nearfar.arguments import check_dense, flag, number, numbers, shown, whole_number
from nearfar.contrast import unit_rows
from nearfar.errors import NearfarError

__all__ = [
    "alignment",
    "effective_rank",
    "embedding_health",
    "hubness",
    "mean_cosine",
    "modality_gap",
    "uniformity",
    "variance",
]


Rows = Float[Tensor, "_ d"] | np.ndarray

#: neighbours by whose lists hubs are found, as in the paper
HUB_NEIGHBORS = 10
# Squared singular values come from a Gram matrix: below this share of the whole their root is rounding.
_GRAM_ROUNDING = 3e-8
# Cosines in float64 of equal rows differ by less, those of different float32 rows by more.
_TIE = 1e-12
# Rows whose products with all others are in memory at once.
_TILE = 1024


def effective_rank(embeddings: Rows, center: bool = True) -> float:
    """How many directions the rows of (n, d) ``embeddings`` really use: exp of the entropy of their singular values.

    With singular values σ and p = σ / Σσ it is exp(−Σ p ln p): k for k equal directions, between 1 and min(n − 1, d)
    where the rows are centred first (``center``), min(n, d) where they are not. Singular values below the rounding of
    the input's precision count as 0, and a space in which nothing is left has rank 0: one row, or equal rows.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    >>> round(effective_rank(torch.eye(5), center=False), 6), round(effective_rank(torch.eye(5)), 6)
    (5.0, 4.0)
    >>> line = torch.linspace(-1, 1, 9)[:, None] * torch.ones(9, 3)
    >>> round(effective_rank(line), 6), effective_rank(torch.ones(9, 3))
    (1.0, 0.0)
    """
    flag("center", center)
    x = _rows(embeddings)
    return _effective_rank(x - x.mean(0) if center else x, _whole(x), _precision(embeddings))


def variance(embeddings: Rows) -> float:
    """How far the directions of the rows are spread: 1 as on the whole sphere, 0 where all point the same way.

    Rows are brought to unit length; the value is the variance of a dimension (over n rows, not n − 1), averaged over
    the d dimensions, times d. That is 1 − |mean direction|², if no row is zero.

    >>> round(variance(torch.eye(4)), 6), variance(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    (0.75, 0.0)
    """
    return _variance(_unit(embeddings))


def mean_cosine(embeddings: Rows) -> float:
    """Mean cosine of all pairs of different rows, −1 / (n − 1) to 1; near 0 in a space that is used.

    >>> mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))
    0.3333333333333333
    """
    return _mean_cosine(_pairable(_unit(embeddings)))


def uniformity(embeddings: Rows, t: float = 2.0) -> float:
    """log of the mean of exp(−t |x − y|²) over different rows at unit length: −4t to 0, lower is more evenly spread.

    0 is collapse; with t = 2, many directions of a high-dimensional sphere come to −4.

    Source: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", ICML 2020.

    >>> round(uniformity(torch.eye(6)), 6), uniformity(torch.ones(6, 3))
    (-4.0, 0.0)
    """
    t = number("t", t)
    if not t > 0:
        raise NearfarError(f"t is {t}; uniformity takes a number above 0, usually 2")
    return _uniformity(_pairable(_unit(embeddings)), t)


def alignment(queries: Rows, keys: Rows, alpha: float = 2.0) -> float:
    """Mean |x − y|^α of partners, row i of ``queries`` and of ``keys``, at unit length: 0 (the same) to 2^α.

    With α = 2 it is 2 − 2 · (mean cosine of partners).

    Source: Wang and Isola, ICML 2020, as `uniformity`.

    >>> alignment(torch.eye(3), torch.eye(3)), round(alignment(torch.eye(2), torch.eye(2).flip(0)), 6)
    (0.0, 2.0)
    """
    alpha = number("alpha", alpha)
    if not alpha > 0:
        raise NearfarError(f"alpha is {alpha}; alignment takes a number above 0, usually 2")
    return _alignment(*_partners(_unit(queries, "queries"), _unit(keys, "keys")), alpha)


def modality_gap(queries: Rows, keys: Rows) -> float:
    """Distance between the mean directions of two views, 0 to 2. Two views can be aligned in rank and lie far apart.

    Source: Liang, Zhang, Kwon, Yeung and Zou, "Mind the Gap: Understanding the Modality Gap in Multi-modal Contrastive
    Representation Learning", NeurIPS 2022.

    >>> gap = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    >>> round(modality_gap(*gap), 4), modality_gap(gap[0], gap[0])
    (1.4142, 0.0)
    """
    return _modality_gap(_unit(queries, "queries"), _unit(keys, "keys"))


def hubness(queries: Rows, keys: Rows, k: int = HUB_NEIGHBORS) -> float:
    """Skewness of how often a key is among the ``k`` nearest keys of a query, by cosine.

    Near 0 all keys are retrieved about equally often; well above 1 a few keys, the hubs, are near everyone and crowd
    out the right ones. Keys that tie for the last places share them. Without differences it is 0: where all keys are
    equal, and where ``k`` reaches their number.

    Source: Radovanović, Nanopoulos and Ivanović, "Hubs in Space: Popular Nearest Neighbors in High-Dimensional Data",
    JMLR 2010.

    >>> keys = torch.eye(4)
    >>> hubness(keys, keys, k=1), round(hubness(torch.tensor([[2.0, 1, 0, 0]] * 5), keys, k=1), 3)
    (0.0, 1.155)
    """
    k = whole_number("k", k, 1)
    return _hubness(_unit(queries, "queries"), _unit(keys, "keys"), k)


def embedding_health(
    views: Mapping[str, Rows], pairs: Sequence[tuple[str, str]] | None = None, k: int = HUB_NEIGHBORS
) -> dict[str, float]:
    """All of the above for the ``views`` of the same items, by name, as the log of a run has them.

    Rows are brought to unit length first, as the losses do. For each view V: ``V/effective_rank`` (centred),
    ``V/rank_limit``, min(n − 1, d), the most that can be; ``V/dimensions``, d; ``V/variance``; ``V/uniformity``;
    ``V/mean_cosine``. For a pair of views, queries and keys: ``alignment``, ``modality_gap`` and ``hubness``.

    ``pairs``: names of queries and keys whose rows are partners; by default all views with equally many rows of equal
    length, in their order. With several pairs their numbers are called ``QUERIES-KEYS/alignment`` and so on. What needs
    two rows, or more keys than ``k``, is left out where there are fewer.

    Raises ``NearfarError`` for a view that is no matrix or not finite, and for pairs that are none.

    >>> generator = torch.Generator().manual_seed(0)
    >>> texts = torch.randn(64, 8, generator=generator)
    >>> images = texts + torch.randn(64, 8, generator=generator)
    >>> health = embedding_health({"texts": texts, "images": images})
    >>> {name: round(value, 2) for name, value in health.items() if not name.startswith("images")}
    {'texts/effective_rank': 7.89, 'texts/rank_limit': 8.0, 'texts/dimensions': 8.0, 'texts/variance': 0.97,
     'texts/uniformity': -3.05, 'texts/mean_cosine': 0.02, 'alignment': 0.73, 'modality_gap': 0.13, 'hubness': 0.29}
    """
    if not isinstance(views, Mapping):
        raise NearfarError(
            f"views is a {type(views).__name__}; a mapping of names to rows is needed, such as {{'texts': rows}}"
        )
    k = whole_number("k", k, 1)
    units = {name: _unit(view, f"views: {name}") for name, view in views.items()}
    health: dict[str, float] = {}
    for name, x in units.items():
        n, d = x.shape
        values = {"effective_rank": _effective_rank(x - x.mean(0), _whole(x), _precision(views[name]))}
        values |= {"rank_limit": float(min(n - 1, d)), "dimensions": float(d), "variance": _variance(x)}
        if n > 1:
            values |= {"uniformity": _uniformity(x, 2.0), "mean_cosine": _mean_cosine(x)}
        health |= {f"{name}/{key}": value for key, value in values.items()}
    if pairs is not None and (
        isinstance(pairs, (str, bytes, Mapping))
        or not isinstance(pairs, Sequence)
        or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs)
    ):
        raise NearfarError(
            f"pairs is {shown(pairs)}; a list of pairs of names is needed, [('texts', 'images')]"
        )
    if pairs is None:
        pairs = [(a, b) for a, b in combinations(units, 2) if units[a].shape == units[b].shape]
    for pair in pairs:
        for name in pair:
            if name not in units:
                raise NearfarError(f"pairs name the view {name!r}; there are {', '.join(units) or 'none'}")
        queries, keys = _partners(units[pair[0]], units[pair[1]], pair)
        values = {"alignment": _alignment(queries, keys, 2.0), "modality_gap": _modality_gap(queries, keys)}
        if len(keys) > k:
            values["hubness"] = _hubness(queries, keys, k)
        prefix = "" if len(pairs) == 1 else f"{pair[0]}-{pair[1]}/"
        health |= {prefix + key: value for key, value in values.items()}
    return health


# -- of rows that are ready ----------------------------------------------------------------------------------
def _whole(x: Float64[Tensor, "n d"]) -> float:
    """The sum of all squares."""
    flat = x.flatten()
    return float(flat @ flat)


def _effective_rank(x: Float64[Tensor, "n d"], whole: float, rounding: float) -> float:
    """``whole``: sum of squares before centring, by which rounding is judged."""
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    values = values[values > max(rounding, _GRAM_ROUNDING) * whole**0.5]
    if not len(values):
        return 0.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def _variance(x: Float64[Tensor, "n d"]) -> float:
    return float(_whole(x - x.mean(0)) / len(x))


def _mean_cosine(x: Float64[Tensor, "n d"]) -> float:
    n = len(x)
    return float((x.sum(0).square().sum() - _whole(x)) / (n * (n - 1)))


def _uniformity(x: Float64[Tensor, "n d"], t: float) -> float:
    n, total = len(x), 0.0
    squares = x.square().sum(1)
    for rows, products in _products(x, x):
        distances = (squares[rows, None] + squares - 2 * products).clamp_(min=0)
        total += float(distances.mul_(-t).exp_().sum())
    # Each row's distance to itself is 0 and counts 1.
    return math.log((total - n) / (n * (n - 1)))


def _alignment(x: Float64[Tensor, "n d"], y: Float64[Tensor, "n d"], alpha: float) -> float:
    return float(torch.linalg.vector_norm(x - y, dim=1).pow(alpha).mean())


def _modality_gap(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"]) -> float:
    if x.shape[1] != y.shape[1]:
        raise NearfarError(f"queries have {x.shape[1]} dimensions and keys {y.shape[1]}; both need one space")
    return float(torch.linalg.vector_norm(x.mean(0) - y.mean(0)))


def _hubness(queries: Float64[Tensor, "n d"], keys: Float64[Tensor, "m d"], k: int) -> float:
    if queries.shape[1] != keys.shape[1]:
        raise NearfarError(
            f"queries have {queries.shape[1]} dimensions and keys {keys.shape[1]}; both need one space"
        )
    if k >= len(keys):
        return 0.0
    counts = torch.zeros(len(keys), dtype=torch.float64)
    for _, cosines in _products(queries, keys):
        last = cosines.topk(k, dim=1).values[:, -1:]
        nearer = cosines > last + _TIE
        level = (cosines - last).abs() <= _TIE
        free = (k - nearer.sum(1)) / level.sum(1)
        counts += nearer.sum(0) + (level * free[:, None]).sum(0)
    apart = counts - counts.mean()
    spread = apart.square().mean().sqrt()
    return float(apart.pow(3).mean() / spread**3) if spread > 1e-9 * k else 0.0


def _products(
    x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"]
) -> Iterator[tuple[slice, Float64[Tensor, "r m"]]]:
    for start in range(0, len(x), _TILE):
        rows = slice(start, min(start + _TILE, len(x)))
        yield rows, x[rows] @ y.T


# -- making them ready ---------------------------------------------------------------------------------------
def _rows(embeddings: Rows, name: str = "embeddings") -> Float64[Tensor, "n d"]:
    x = _tensor(embeddings, name)
    if x.ndim != 2 or 0 in x.shape or not x.is_floating_point():
        raise NearfarError(
            f"{name} are {tuple(x.shape)} {x.dtype}; a matrix of floating point (rows, dimensions) is needed"
        )
    check_dense(name, x)
    x = x.cpu().double()
    if not bool(x.isfinite().all()):
        bad = (~x.isfinite().all(dim=1)).nonzero().flatten().tolist()
        raise NearfarError(f"{name} are not finite in {len(bad)} of {len(x)} rows, first in row {bad[0]}")
    return x


def _tensor(embeddings: Tensor | np.ndarray, name: str) -> Tensor:
    """A tensor of the precision that came in; lists and tables are float64."""
    if isinstance(embeddings, Tensor):
        return embeddings.detach()
    if (
        isinstance(embeddings, np.ndarray)
        and embeddings.dtype.kind in "biuf"
        and embeddings.dtype.itemsize <= 8
    ):
        return torch.from_numpy(np.array(embeddings, embeddings.dtype.newbyteorder("=")))
    return torch.from_numpy(numbers(name, embeddings, finite=False))


def _unit(embeddings: Rows, name: str = "embeddings") -> Float64[Tensor, "n d"]:
    return unit_rows(_rows(embeddings, name))


def _pairable(x: Float64[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
    if len(x) < 2:
        raise NearfarError("there is one row, and so no pair of different rows; give at least two")
    return x


def _partners(
    x: Float64[Tensor, "n d"], y: Float64[Tensor, "n d"], names: tuple[str, str] = ("queries", "keys")
) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "n d"]]:
    if x.shape != y.shape:
        raise NearfarError(
            f"{names[0]} are {tuple(x.shape)} and {names[1]} {tuple(y.shape)}; partners are rows of equal "
            "position and length"
        )
    return x, y


def _precision(embeddings: Rows) -> float:
    return torch.finfo(_tensor(embeddings, "embeddings").dtype).eps
