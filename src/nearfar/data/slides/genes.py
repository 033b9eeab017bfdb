"""Normalised expression, and the genes that vary most over chosen slides, from sums that each slide keeps of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from nearfar.errors import NearfarError

__all__ = ["GeneSums", "common_genes", "normalized", "variable_genes"]


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
