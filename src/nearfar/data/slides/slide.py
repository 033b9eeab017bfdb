"""A slide whatever files it is in: molecule counts at spots and a picture; several sections of one file are several
slides.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from nearfar.data.slides.image import Box, Pictures, box_around
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

__all__ = [
    "Section",
    "Slide",
    "SlideCounts",
    "by_stem",
    "check_one_section",
    "find_slides",
    "no_counts",
    "rows_of",
    "sections_of",
    "slides_in",
    "whole_counts",
]


def no_counts(matrix: csr_matrix) -> str | None:
    """Why the values of a scipy sparse matrix are no counts; None where they are.

    >>> from scipy.sparse import csr_matrix
    >>> no_counts(csr_matrix([[0, 3]])), no_counts(csr_matrix([[0, 1.37]])), no_counts(csr_matrix([[-1, 2]]))
    (None, '1.37 is no whole number', '-1 is below 0')
    """
    values = matrix.data
    if values.dtype.kind not in "biuf":
        return f"{values.dtype} is no number"
    for wrong, words in (
        (~np.isfinite(values), "is no number"),
        (values < 0, "is below 0"),
        (values != np.round(values), "is no whole number"),
    ):
        if wrong.any():
            return f"{values[np.argmax(wrong)]:.6g} {words}"
    return None


def whole_counts(matrix: csr_matrix) -> csr_matrix:
    """The matrix as CSR of float32, each place once."""
    from scipy.sparse import csr_matrix

    counts = csr_matrix(matrix, dtype=np.float32)
    counts.sum_duplicates()
    return counts


#: columns that name the section of a spot, surest first
COLUMNS = (
    "library_id", "library_key", "library", "sample_id", "sample", "sample_name", "section_id", "section", "slide_id",
    "slide", "capture_area", "batch",
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """The spots of which ``column`` is ``value``; without a column all spots.

    ``first``: spots of which the column says nothing are counted as rejected with this section.
    """

    column: str | None = None
    value: str | None = None
    first: bool = True


def sections_of(
    obs: pd.DataFrame, libraries: Sequence[str], path: Path, single: bool = True
) -> list[Section]:
    """The sections of a file.

    The column is the one whose values are the names of ``libraries`` (of ``uns['spatial']``), however it is called;
    where there are none, the first of the usual names that holds several values.

    Raises:
        NearfarError: several libraries and no column that tells them apart, or two columns that differ.

    >>> import pandas as pd
    >>> obs = pd.DataFrame({"where": ["a", "b", "a"], "batch": [0, 0, 1]})
    >>> [section.value for section in sections_of(obs, ["a", "b"], Path("s.h5ad"))]
    ['a', 'b']
    >>> [section.value for section in sections_of(obs, [], Path("s.h5ad"))]
    ['0', '1']
    """
    usual = sorted(
        (name for name in obs.columns if str(name).lower() in COLUMNS),
        key=lambda name: COLUMNS.index(str(name).lower()),
    )
    rest = [name for name in obs.columns if name not in usual]
    naming = [name for name in [*usual, *rest] if _names_of(obs[name], libraries)]
    if len(libraries) > 1:
        if not naming:
            raise NearfarError(
                f"{path} holds {len(libraries)} libraries ({', '.join(libraries[:5])}), and no column of obs says "
                "which spot is of which: write obs['library_id'] with these names, or a file for each library."
            )
        values = [_texts(obs[name]) for name in naming]
        if any(each != values[0] for each in values[1:]):
            raise NearfarError(
                f"{path}: obs['{naming[0]}'] and obs['{naming[1]}'] both name libraries, and differ: remove one."
            )
        return _sections_by(obs, naming[0])
    for name in usual:
        count = obs[name].nunique()
        if 1 < count <= max(len(obs) // 2, 2):
            return _sections_by(obs, name)
    if not single:
        raise NearfarError(
            f"{path} says that it holds several sections (uns['spatial']['is_single'] is False), and no column of obs "
            "says which spot is of which: write obs['library_id'], or a file for each section."
        )
    return [Section(None, libraries[0] if libraries else None)]


def rows_of(section: Section, obs: pd.DataFrame) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Which spots are of a section, and which are of none that is known and counted with this one."""
    if section.column is None:
        return np.ones(len(obs), bool), np.zeros(len(obs), bool)
    texts = _texts(obs[section.column])
    own = np.array([text == section.value for text in texts], bool)
    unknown = np.array([section.first and text is None for text in texts], bool)
    return own, unknown


def check_one_section(obs: pd.DataFrame, depths: np.ndarray | None, path: Path) -> None:
    """``NearfarError`` for spots of one slide that lie in several: at several depths, or twice on the array.

    A place of the array that spots share by chance, or a column that is the same for all, says nothing.
    """
    evidence = None
    if depths is not None and len(np.unique(depths[np.isfinite(depths)])) > 1:
        evidence = "obsm['spatial'] has places at several depths (its third column)"
    elif {"array_row", "array_col"} <= set(obs.columns):
        grid = obs[["array_row", "array_col"]].dropna()
        grid = grid[~grid.index.duplicated()]  # of these the second is rejected by its name
        if grid.nunique().min() > 1 and grid.duplicated().mean() > 0.05:
            evidence = "spots stand on the same places of the array (array_row, array_col)"
    if evidence:
        raise NearfarError(
            f"{path} holds several sections and does not say which spot is of which: {evidence}. Write "
            "obs['library_id'], or a file for each section."
        )


def _sections_by(obs: pd.DataFrame, column: str) -> list[Section]:
    values = sorted({text for text in _texts(obs[column]) if text is not None})
    return [Section(column, value, at == 0) for at, value in enumerate(values)]


def _texts(values: pd.Series) -> list[str | None]:
    return [
        None if gone else str(value)
        for value, gone in zip(values.tolist(), values.isna().tolist(), strict=True)
    ]


def _names_of(values: pd.Series, libraries: Sequence[str]) -> bool:
    """Whether a column holds names of libraries and nothing else."""
    if not libraries or values.dtype.kind in "fc":
        return False
    present = {str(value) for value in values.dropna().unique().tolist()}
    return bool(present) and present <= set(libraries)


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
    counts: csr_matrix
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
    """A slide's files. Files are read on demand, the picture only while it is open."""

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
        """Notes for the user on how the slide is read, a sentence each."""
        return []

    def patient(self) -> str | None:
        """The patient of the slide, where its own files state it."""
        return None

    def boxes(self, counts: SlideCounts, field: float) -> list[Box]:
        """The squares of ``field`` pixels around the spots."""
        return [box_around(x, y, field) for x, y in counts.positions.tolist()]


def by_stem(folder: Path, endings: Sequence[str], tail: str = "") -> dict[str, Path]:
    """Files of a folder by their name without ``tail`` and ending.

    Raises:
        NearfarError: two files of one name.
    """
    paths: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((end for end in endings if path.name.lower().endswith(end)), None)
        if ending is None or path.name.startswith(".") or not path.is_file():
            continue
        name = re.sub(f"({tail})$", "", path.name[: -len(ending)]) if tail else path.name[: -len(ending)]
        if name in paths:
            raise NearfarError(
                f"{folder}: {paths[name].name} and {path.name} are both of slide {name}; keep one."
            )
        paths[name] = path
    return paths


def find_slides(source: str | Path) -> list[Slide]:
    """The slides in a folder, of whichever layout it has, by name.

    Raises:
        NearfarError: no such folder, an unknown layout (with what is expected), a slide that lacks a file.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise NearfarError(f"{folder}: no such folder.")
    slides = slides_in(folder)
    if slides is not None:
        return slides
    content = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise NearfarError(
        f"{folder} has none of the layouts that are read; in it: {content}. Expected: counts/*.tsv[.gz], spots/*.tsv "
        "and images/*.jpg (Spatial Transcriptomics); filtered_feature_bc_matrix.h5 (or the folder of that name) beside "
        "spatial/, or folders with outs/ that have them (Space Ranger); st/*.h5ad with patches/*.h5 or wsis/*.tif "
        "(HEST-1k); or *.h5ad with pictures of the same names beside them (Visium). Unpack *.gz and *.zip first."
    )


def slides_in(folder: Path) -> list[Slide] | None:
    """The slides in a folder, by name; None where it has none of the layouts.

    Raises:
        NearfarError: a slide that lacks a file, two slides of one name.
    """
    from nearfar.data.slides import space_ranger, spatial_transcriptomics, visium

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
    return None
