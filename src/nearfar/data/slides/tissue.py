"""Spots of one or several slides: patches, expression, and their spatial neighbours with Gaussian weights.

Expression is normalised; the genes that vary most over chosen slides follow from sums that each slide keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt8
from numpy.typing import ArrayLike, NDArray

from nearfar.data.cache import content_key
from nearfar.data.items import Column, Items
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "RULE",
    "GeneSums",
    "Tissue",
    "Values",
    "common_genes",
    "items_of",
    "joined",
    "neighbor_scale",
    "normalized",
    "spatial_neighbors",
    "variable_genes",
]


def normalized(
    counts: Float[np.ndarray, "n g"], totals: Float[np.ndarray, " n"], target_sum: float
) -> Float32[np.ndarray, "n g"]:
    """log(1 + counts / total · target_sum): counts as if every spot had ``target_sum`` of them.

    ``totals`` are over all genes that were measured, also those that have no column. No other spot enters, so that
    no split influences a different one.

    >>> normalized(np.array([[1.0, 0.0]]), np.array([4.0]), 4.0).round(3).tolist()
    [[0.6930000185966492, 0.0]]
    """
    scale = np.asarray(target_sum / np.maximum(totals, 1e-12), np.float32)
    return np.log1p(np.asarray(counts, np.float32) * scale[:, None])


@dataclass(frozen=True)
class GeneSums:
    """Sums over the spots of one slide of each gene's normalised expression and its square."""

    genes: Sequence[str]
    spots: int
    total: Float[np.ndarray, " g"]
    squares: Float[np.ndarray, " g"]

    @classmethod
    def of(cls, expression: Float[np.ndarray, "n g"], genes: Sequence[str]) -> GeneSums:
        """Sums of a slide; nothing varies over a slide without spots."""
        values = np.asarray(expression, np.float64)
        return cls(list(genes), len(values), values.sum(0), (values**2).sum(0))


def common_genes(slides: Mapping[str, Sequence[str]]) -> list[str]:
    """The genes that every slide has, in alphabetical order.

    Raises:
        NearfarError: none is common, with the slide that shares least with the others.
    """
    every = [set(genes) for genes in slides.values()]
    common = sorted(set.intersection(*every)) if every else []
    if not common:
        names = list(slides)
        shared = [sum(len(own & other) for other in every) - len(own) for own in every]
        least = names[int(np.argmin(shared))]
        raise NearfarError(
            f"no gene is named in all {len(names)} slides; {least} shares least with the others. Are genes named by "
            f"symbol here and by Ensembl id there? First of {least}: {', '.join(list(slides[least])[:3])}."
        )
    return common


def variable_genes(sums: Mapping[str, GeneSums], count: int, among: Sequence[str] | None = None) -> list[str]:
    """The ``count`` genes of the largest variance within the slides, in alphabetical order.

    The variance is around the mean of the own slide, pooled over spots: a gene that merely differs from slide to slide,
    as preparation makes it, does not count as variable. Take ``sums`` of training slides alone.

    Raises:
        NearfarError: no slide, or fewer genes in all slides than asked for.

    >>> first = GeneSums.of(np.array([[0.0, 5.0, 1.0], [2.0, 5.0, 2.0]]), ["a", "b", "c"])
    >>> other = GeneSums.of(np.array([[1.0, 9.0, 1.0], [3.0, 9.0, 2.0]]), ["a", "b", "c"])
    >>> variable_genes({"S": first, "T": other}, 1), variable_genes({"S": first}, 2)
    (['a'], ['a', 'c'])
    """
    if not sums:
        raise NearfarError("variable genes of no slide are asked for; name training slides.")
    genes = common_genes(
        {name: slide.genes for name, slide in sums.items()} | ({} if among is None else {"": among})
    )
    if count > len(genes):
        raise NearfarError(
            f"{count} genes are asked for, but the slides have {len(genes)} in common: take fewer, or genes=all."
        )
    around = np.zeros(len(genes))
    for slide in sums.values():
        place = {gene: at for at, gene in enumerate(slide.genes)}
        own = np.array([place[gene] for gene in genes])
        around += slide.squares[own] - slide.total[own] ** 2 / max(slide.spots, 1)
    # Sums of float64 differ in the last bits with the order of slides; ties go by name.
    order = np.argsort(-np.round(around, 6), kind="stable")[:count]
    return sorted(genes[at] for at in order.tolist())


#: the definition, as the index of shards states it
RULE = (
    "the k nearest spots of the same slide; weight exp(-d^2 / (2 sigma^2)) divided by the sum over them; "
    "sigma: median of all distances of the slide's spots to their k nearest"
)
_SPARE = 8  # further candidates, among which equal distances are put in order


def spatial_neighbors(
    positions: Float[ArrayLike, "n 2"], k: int = 6
) -> tuple[Int64[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """The ``k`` nearest spots of each spot of one slide, nearest first, and their weights α.

    α_ij = exp(−d_ij² / 2σ²), divided by its sum over the k nearest, σ the median of all distances to the k nearest. Of
    spots equally far away the one that comes first is taken. A slide of fewer than k + 1 spots has -1 and weight 0 in
    the places that are left.

    Raises:
        NearfarError: places that are no (n, 2) or not finite, k below 1.

    >>> index, alpha = spatial_neighbors([[0, 0], [1, 0], [0, 2]], k=1)
    >>> index.ravel().tolist(), alpha.ravel().tolist()
    ([1, 0, 0], [1.0, 1.0, 1.0])
    >>> spatial_neighbors([[0, 0], [1, 0]], k=2)[0].tolist()
    [[1, -1], [0, -1]]
    """
    index, distance = _nearest(positions, k)
    n, width = len(index), index.shape[1]
    sigma = _sigma(distance)
    # Only differences of the exponents matter: a spot far from all others must not divide 0 by 0.
    beyond = distance**2 - distance[:, :1] ** 2
    weight = np.exp(-0.5 * beyond / sigma**2) if sigma > 0 else np.ones_like(distance)
    weight /= weight.sum(axis=1, keepdims=True)
    neighbors = np.full((n, k), -1, np.int64)
    alpha = np.zeros((n, k), np.float32)
    neighbors[:, :width], alpha[:, :width] = index, weight
    return neighbors, alpha


def neighbor_scale(positions: Float[ArrayLike, "n 2"], k: int = 6) -> float:
    """σ of a slide: the median of all distances of its spots to their k nearest; 0 for a single spot.

    >>> neighbor_scale([[0, 0], [1, 0], [0, 2]], k=1)
    1.0
    """
    return _sigma(_nearest(positions, k)[1])


def _sigma(distance: NDArray[np.float64]) -> float:
    return float(np.median(distance)) if distance.size else 0.0


def _nearest(positions: ArrayLike, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Indices and distances, (n, min(k, n - 1))."""
    places = np.asarray(positions, np.float64)
    if places.ndim != 2 or places.shape[1] != 2 or not np.isfinite(places).all():
        raise NearfarError(
            f"positions of shape {places.shape}: finite x and y of each spot, (n, 2), are needed."
        )
    if k < 1:
        raise NearfarError(f"neighbors={k}: at least one neighbour is needed.")
    n = len(places)
    count = min(k, n - 1)
    if count < 1:
        return np.empty((n, 0), np.int64), np.empty((n, 0))
    from scipy.spatial import cKDTree

    distance, index = cKDTree(places).query(places, min(n, count + 1 + _SPARE))
    distance[
        index == np.arange(n)[:, None]
    ] = -1.0  # the spot itself comes first, also among spots in one place
    # Distances that are equal on paper differ in the last bits: on a grid the order of the spots decides.
    rounded = np.round(distance, 6)
    order = np.lexsort((index, rounded), axis=1)[:, 1 : count + 1]
    nearest = np.take_along_axis(index, order, axis=1).astype(np.int64)
    return nearest, np.take_along_axis(distance, order, axis=1)


#: what expression holds: counts of molecules, or log(1 + counts per so many counts of the spot)
Values = Literal["counts", "log1p"]


@dataclass(frozen=True)
class Tissue:
    """The spots of one or several slides, in the order of the slides.

    Attributes:
        ids: a name for every spot, each once.
        slides: (n,) which of ``slide_names`` a spot lies on, never falling.
        slide_names: the slides, in order.
        positions: (n, 2) x and y on the slide.
        neighbors: (n, k) positions in this tissue of the spots nearest to each on its slide, -1 for none.
        alpha: (n, k) their weights, 0 or more, each row of sum 1 (0 without neighbours).
        expression: (n, g) float32, see ``values``; may be memory-mapped.
        genes: what the columns of ``expression`` are.
        patches: (n, h, w, 3) what is seen at each spot; may be memory-mapped.
        patients: the patient of each slide; None: every slide is of a different patient.
        values: "log1p" or "counts".
        totals: (n,) counts of a spot over all genes that were measured, those left out as well; None: not known.
        content: a hash of all this, by which results are kept (`nearfar.data.cache`); computed where it is not given.

    >>> spot = np.zeros((2, 4, 4, 3), np.uint8)
    >>> near, alpha = np.array([[1], [0]]), np.ones((2, 1), np.float32)
    >>> expression = np.eye(2, dtype=np.float32)
    >>> one = Tissue(["a", "b"], np.zeros(2, int), ["S"], np.eye(2), near, alpha, expression, ["g", "h"], spot)
    >>> two = joined([one, replace(one, ids=["c", "d"], slide_names=["T"])])
    >>> two.neighbors.ravel().tolist(), two.select(["T"]).neighbors.ravel().tolist()
    ([1, 0, 3, 2], [1, 0])
    """

    ids: Sequence[str]
    slides: Int64[np.ndarray, " n"]
    slide_names: Sequence[str]
    positions: Float[np.ndarray, "n 2"]
    neighbors: Int64[np.ndarray, "n k"]
    alpha: Float32[np.ndarray, "n k"]
    expression: Float32[np.ndarray, "n g"]
    genes: Sequence[str]
    patches: UInt8[np.ndarray, "n h w 3"]
    patients: Sequence[str] | None = None
    values: Values = "log1p"
    totals: Float[np.ndarray, " n"] | None = None
    content: str = ""

    def __post_init__(self) -> None:
        n = len(self.ids)
        for name in ("slides", "positions", "neighbors", "alpha", "expression", "patches", "totals"):
            part = getattr(self, name)
            if part is not None and len(part) != n:
                raise NearfarError(f"{name}: {len(part)} rows for {n} spots.")
        if self.patients is not None and len(self.patients) != len(self.slide_names):
            raise NearfarError(f"{len(self.patients)} patients for {len(self.slide_names)} slides: one each.")
        if self.expression.shape[1] != len(self.genes):
            raise NearfarError(
                f"{self.expression.shape[1]} columns of expression for {len(self.genes)} genes."
            )
        if self.neighbors.shape != self.alpha.shape:
            raise NearfarError(
                f"neighbors are {self.neighbors.shape} and alpha {self.alpha.shape}: a weight each."
            )
        if len(self.slides) and np.diff(self.slides).min(initial=0) < 0:
            raise NearfarError("spots must stand in the order of their slides; sort them by slide.")
        if not self.content:
            parts = [list(self.ids), self.slides, list(self.slide_names), self.positions, self.neighbors]
            parts += [self.alpha, self.expression, list(self.genes), self.patches, self.values]
            object.__setattr__(self, "content", content_key(*parts))

    def __len__(self) -> int:
        return len(self.ids)

    def rows_of(self, slide: int) -> NDArray[np.int64]:
        """Where the spots of a slide stand."""
        return np.flatnonzero(self.slides == slide)

    def select(self, names: Sequence[str]) -> Tissue:
        """The spots of some slides, in the order of this tissue. Neighbours lie on the own slide, so none is lost.

        Arrays stay memory-mapped where the slides stand side by side, and are copied otherwise.

        Raises:
            NearfarError: a slide that is not there, or none asked for.
        """
        for name in names:
            if name not in self.slide_names:
                raise NearfarError(f"there is no slide {name!r}; {nearest_name(name, self.slide_names)}")
        kept = [at for at, name in enumerate(self.slide_names) if name in set(names)]
        if not kept:
            raise NearfarError("spots of no slide are asked for; name one or more slides.")
        rows = np.flatnonzero(np.isin(self.slides, kept))
        place = np.full(len(self) + 1, -1, np.int64)  # the last stands for "no neighbour"
        place[rows] = np.arange(len(rows))
        # A run of rows is a view, so that nothing is read from a memory map before it is used.
        run = len(rows) > 0 and int(rows[-1]) - int(rows[0]) + 1 == len(rows)
        part: slice | NDArray[np.int64] = slice(int(rows[0]), int(rows[-1]) + 1) if run else rows
        chosen = [self.slide_names[at] for at in kept]
        return replace(
            self,
            ids=[self.ids[row] for row in rows.tolist()],
            slides=np.searchsorted(np.array(kept), self.slides[rows]).astype(np.int64),
            slide_names=chosen,
            positions=self.positions[part],
            neighbors=place[self.neighbors[rows]],
            alpha=self.alpha[part],
            expression=self.expression[part],
            patches=self.patches[part],
            patients=None if self.patients is None else [self.patients[at] for at in kept],
            totals=None if self.totals is None else self.totals[part],
            content=content_key(self.content, chosen),
        )


def joined(parts: Sequence[Tissue]) -> Tissue:
    """Tissues of the same genes, patch size and number of neighbours as one.

    Raises:
        NearfarError: nothing to join, parts that do not fit, a slide or a spot that two of them hold.
    """
    if not parts:
        raise NearfarError("there is no tissue to join.")
    first = parts[0]
    for part in parts[1:]:
        for what in ("genes", "values"):
            if getattr(part, what) != getattr(first, what):
                raise NearfarError(
                    f"slides {', '.join(first.slide_names)} and {', '.join(part.slide_names)} differ in their {what}."
                )
        for what in ("patches", "neighbors"):
            if getattr(part, what).shape[1:] != getattr(first, what).shape[1:]:
                raise NearfarError(
                    f"{what} of slides {', '.join(first.slide_names)} and {', '.join(part.slide_names)} differ in "
                    "shape."
                )
    names = [name for part in parts for name in part.slide_names]
    ids = [spot for part in parts for spot in part.ids]
    for what, all_names in (("slide", names), ("spot", ids)):
        if len(set(all_names)) != len(all_names):
            twice = sorted(name for name in set(all_names) if all_names.count(name) > 1)[:3]
            raise NearfarError(f"{what} {', '.join(twice)} stands in two of the tissues that are joined.")
    spots = np.cumsum([0, *(len(part) for part in parts)])
    slides = np.cumsum([0, *(len(part.slide_names) for part in parts)])

    def each(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    return Tissue(
        ids=ids,
        slides=np.concatenate([p.slides + at for p, at in zip(parts, slides, strict=False)]).astype(np.int64),
        slide_names=names,
        positions=each("positions"),
        neighbors=np.concatenate(
            [np.where(p.neighbors >= 0, p.neighbors + at, -1) for p, at in zip(parts, spots, strict=False)]
        ),
        alpha=each("alpha"),
        expression=each("expression"),
        genes=first.genes,
        patches=each("patches"),
        patients=[who for part in parts for who in part.patients or part.slide_names],
        values=first.values,
        totals=None if any(part.totals is None for part in parts) else each("totals"),
        content=content_key("joined", [part.content for part in parts]),
    )


def items_of(tissue: Tissue, source: str) -> Items:
    """The spots as items: what is seen at each (``image``) and expressed there (``gene``), kept together by slide."""
    slides = [tissue.slide_names[slide] for slide in tissue.slides.tolist()]
    columns: dict[str, Column] = {
        "image": tissue.patches,
        "gene": tissue.expression,
        "slide": slides,
        "position": tissue.positions,
    }
    return Items(list(tissue.ids), columns, source, groups=slides)
