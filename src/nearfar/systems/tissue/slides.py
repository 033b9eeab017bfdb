"""A slide as it comes from a laboratory: counts at spots and a picture, whatever files they are in."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nearfar.errors import NearfarError
from nearfar.systems.tissue.patches import Box, box_around
from nearfar.systems.tissue.slide_image import Pictures

__all__ = ["Slide", "SlideCounts", "by_stem", "find_slides"]


@dataclass
class SlideCounts:
    """What was measured on a slide.

    Attributes:
        spots: the name of every spot, each once.
        positions: (n, 2) x and y in pixels of the picture.
        genes: names of the columns; a name may stand twice, its columns are then added.
        counts: (n, g) a scipy CSR matrix of counts, 0 or more.
        rejected: spot, reason and detail of what cannot be used, the same spots being left out above.
        pixel_size: micrometres per pixel, None where nothing says so.
    """

    spots: list[str]
    positions: Float[np.ndarray, "n 2"]
    genes: list[str]
    counts: Any
    rejected: list[tuple[str, str, str]] = field(default_factory=list)
    pixel_size: float | None = None

    def keep(self, kept: np.ndarray, reason: str, details: Sequence[str]) -> SlideCounts:
        """Without the spots where ``kept`` is False; ``details`` are those of all spots."""
        gone = [(self.spots[at], reason, details[at]) for at in np.flatnonzero(~kept).tolist()]
        left = self.rows(np.flatnonzero(kept))
        left.rejected = left.rejected + gone
        return left

    def rows(self, rows: np.ndarray) -> SlideCounts:
        """The spots at some positions; the others are spots of a different slide, and not rejected."""
        return SlideCounts(
            [self.spots[at] for at in rows.tolist()],
            self.positions[rows],
            self.genes,
            self.counts[rows],
            self.rejected,
            self.pixel_size,
        )

    def columns(self, genes: Sequence[str]) -> Float[np.ndarray, "n g"]:
        """Counts of ``genes``, in that order, as a dense float32 array."""
        from scipy.sparse import csr_matrix

        place = {gene: at for at, gene in enumerate(genes)}
        to = np.array([place.get(gene, -1) for gene in self.genes])
        used = np.flatnonzero(to >= 0)
        spread = csr_matrix(
            (np.ones(len(used), np.float32), (used, to[used])), shape=(len(self.genes), len(genes))
        )
        return np.asarray((self.counts @ spread).toarray(), np.float32)

    def totals(self) -> Float[np.ndarray, " n"]:
        """All counts of each spot."""
        return np.asarray(self.counts.sum(axis=1), np.float64).ravel()


class Slide(ABC):
    """A slide's files. Nothing is read before it is asked for, and the picture only while it is open."""

    name: str

    @abstractmethod
    def files(self) -> list[Path]:
        """All files that the slide is read from: their content decides whether shards are up to date."""

    @abstractmethod
    def read_counts(self) -> SlideCounts:
        """Counts and places of the spots; unusable spots are rejected, not raised."""

    @abstractmethod
    def check_boxes(self, counts: SlideCounts, boxes: Sequence[Box]) -> tuple[np.ndarray, list[str]]:
        """For each spot, whether its picture can be cut, and if not, why; from the heads of files alone."""

    @abstractmethod
    def open_pictures(self) -> AbstractContextManager[Pictures]:
        """The picture, in memory or open until the context ends."""

    def remarks(self) -> list[str]:
        """What its user should know of how it is read, a sentence each."""
        return []

    def patient(self) -> str | None:
        """Whom the slide is from, where its own files say so."""
        return None

    def boxes(self, counts: SlideCounts, field: float) -> list[Box]:
        """The squares of ``field`` pixels around the spots."""
        return [box_around(x, y, field) for x, y in counts.positions.tolist()]


def by_stem(folder: Path, endings: Sequence[str], tail: str = "") -> dict[str, Path]:
    """Files of a folder by their name without ``tail`` and ending.

    Raises:
        NearfarError: two files of one name.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((end for end in endings if path.name.lower().endswith(end)), None)
        if ending is None or path.name.startswith(".") or not path.is_file():
            continue
        name = re.sub(f"({tail})$", "", path.name[: -len(ending)]) if tail else path.name[: -len(ending)]
        if name in found:
            raise NearfarError(
                f"{folder}: {found[name].name} and {path.name} are both of slide {name}; keep one."
            )
        found[name] = path
    return found


def find_slides(source: str | Path) -> list[Slide]:
    """The slides in a folder, of whichever layout it has, by name.

    Raises:
        NearfarError: no such folder, an unknown layout (with what is expected), a slide that lacks a file.
    """
    from nearfar.systems.tissue import space_ranger, spatial_transcriptomics, visium

    folder = Path(source)
    if not folder.is_dir():
        raise NearfarError(f"{folder}: no such folder.")
    for layout in (spatial_transcriptomics, space_ranger, visium):
        slides: list[Slide] | None = layout.slides_of(folder)
        if slides is not None:
            names = [slide.name for slide in slides]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise NearfarError(
                    f"{folder}: two slides would be called {', '.join(twice[:5])}; rename one."
                )
            return slides
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise NearfarError(
        f"{folder} has none of the layouts that are read; in it: {there}. Expected: counts/*.tsv[.gz], spots/*.tsv and "
        "images/*.jpg (Spatial Transcriptomics); filtered_feature_bc_matrix.h5 (or the folder of that name) beside "
        "spatial/, or folders with outs/ that have them (Space Ranger); st/*.h5ad with patches/*.h5 or wsis/*.tif "
        "(HEST-1k); or *.h5ad with pictures of the same names beside them (Visium). Unpack *.gz and *.zip first."
    )
