"""Spots of one or several slides: what is seen, what is measured, and who lies beside whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt8
from numpy.typing import NDArray

from nearfar.data.splits import split_hash
from nearfar.errors import NearfarError, nearest_name

__all__ = ["Tissue", "Values"]

#: what expression holds: counts of molecules, or log(1 + counts per ``target_sum`` counts of the spot)
Values = Literal["counts", "log1p"]


@dataclass(frozen=True)
class Tissue:
    """The spots of one or several slides, in the order of the slides.

    Attributes:
        ids: ``SLIDE/SPOT`` of every spot, each once.
        slides: (n,) which of ``slide_names`` a spot lies on, rising.
        slide_names: the slides, in order.
        patients: whom each slide is from, one name for each slide.
        positions: (n, 2) x and y on the slide, in pixels of its image.
        neighbors: (n, k) positions in this tissue of the spots nearest to each on its slide, -1 for none.
        alpha: (n, k) their weights, 0 or more, each row of sum 1 (or 0 without neighbours).
        expression: (n, g) float32, see ``values``; may be memory-mapped.
        patches: (n, h, w, 3) what is seen at each spot; may be memory-mapped.
        genes: what the columns of ``expression`` are.
        values: "counts" or "log1p".
        totals: (n,) counts of each spot over all genes that were measured, those left out as well.
        content: a hash of everything above, by which results are kept (`nearfar.data.cache`).
    """

    ids: Sequence[str]
    slides: Int64[np.ndarray, " n"]
    slide_names: Sequence[str]
    patients: Sequence[str]
    positions: Float[np.ndarray, "n 2"]
    neighbors: Int64[np.ndarray, "n k"]
    alpha: Float32[np.ndarray, "n k"]
    expression: Float32[np.ndarray, "n g"]
    patches: UInt8[np.ndarray, "n h w 3"]
    genes: Sequence[str]
    values: Values
    totals: Float[np.ndarray, " n"]
    content: str

    def __post_init__(self) -> None:
        n = len(self.ids)
        for name in ("slides", "positions", "neighbors", "alpha", "expression", "patches", "totals"):
            if len(getattr(self, name)) != n:
                raise NearfarError(f"{name}: {len(getattr(self, name))} rows for {n} spots.")
        if len(self.patients) != len(self.slide_names):
            raise NearfarError(f"{len(self.patients)} patients for {len(self.slide_names)} slides: one each.")
        if self.expression.shape[1] != len(self.genes):
            raise NearfarError(
                f"{self.expression.shape[1]} columns of expression for {len(self.genes)} genes."
            )
        if self.neighbors.shape != self.alpha.shape:
            raise NearfarError(
                f"neighbors are {self.neighbors.shape} and alpha {self.alpha.shape}: one weight each."
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def split_hash(self) -> str:
        """The hash of the ids, by which estimates know that they are about the same spots."""
        return split_hash(self.ids)

    def of_slides(self, names: Sequence[str]) -> Tissue:
        """The spots of some slides, in the order of this tissue. Neighbours lie on the own slide, so none is lost.

        Arrays stay memory-mapped where the slides stand side by side, and are copied otherwise.

        Raises:
            NearfarError: a slide that is not there, or none asked for.
        """
        for name in names:
            if name not in self.slide_names:
                raise NearfarError(f"there is no slide {name!r}; {nearest_name(name, self.slide_names)}.")
        kept = [at for at, name in enumerate(self.slide_names) if name in set(names)]
        if not kept:
            raise NearfarError("a tissue of no slide is asked for; name one or more.")
        rows = np.flatnonzero(np.isin(self.slides, kept))
        place = np.full(len(self), -1, np.int64)
        place[rows] = np.arange(len(rows))
        beside = self.neighbors[rows]
        # A run of rows is a view, so that nothing is read from a memory map before it is used.
        run = len(rows) > 0 and int(rows[-1]) - int(rows[0]) + 1 == len(rows)
        part: Any = slice(int(rows[0]), int(rows[-1]) + 1) if run else rows
        return replace(
            self,
            ids=[self.ids[row] for row in rows.tolist()],
            slides=np.searchsorted(np.array(kept), self.slides[rows]).astype(np.int64),
            slide_names=[self.slide_names[at] for at in kept],
            patients=[self.patients[at] for at in kept],
            positions=self.positions[part],
            neighbors=np.where(beside >= 0, place[beside], -1),
            alpha=self.alpha[part],
            expression=self.expression[part],
            patches=self.patches[part],
            totals=self.totals[part],
            content=f"{self.content}:{','.join(self.slide_names[at] for at in kept)}",
        )

    def with_expression(
        self, expression: Float32[np.ndarray, "n g"], genes: Sequence[str], values: Values
    ) -> Tissue:
        """The same spots with other columns or another measure of expression."""
        from nearfar.data.cache import content_key

        content = content_key(self.content, list(genes), values)
        return replace(self, expression=expression, genes=list(genes), values=values, content=content)

    def rows_of(self, slide: int) -> NDArray[np.int64]:
        """Where the spots of a slide stand."""
        return np.flatnonzero(self.slides == slide)
