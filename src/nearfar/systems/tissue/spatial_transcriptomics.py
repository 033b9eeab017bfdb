"""The original Spatial Transcriptomics layout: a picture, a table of counts and a table of spots for each slide.

As in her2st (Andersson et al. 2021): ``counts/B4.tsv.gz`` has a row for each spot, named ``XxY`` after its place in the
array, and a column for each gene; ``spots/B4.tsv`` has the columns x, y (the place in the array), pixel_x, pixel_y and
selected; ``images/B4.jpg`` is the picture. The names of that set's own folders are understood as well.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nearfar.data.tables import read_table
from nearfar.errors import NearfarError
from nearfar.systems.tissue.patches import Box
from nearfar.systems.tissue.slide_image import IMAGE_ENDINGS, Pictures, boxes_inside, open_image
from nearfar.systems.tissue.slides import Slide, SlideCounts, by_stem

__all__ = ["SpatialTranscriptomicsSlide", "slides_of"]

COUNTS = ("counts", "count-matrices", "ST-cnts")
SPOTS = ("spots", "spot-selections", "ST-spotfiles")
IMAGES = ("images", "images/HE", "ST-imgs")
PITCH = 200.0  # micrometres from spot to spot
_COLUMNS = {
    "x": ["x"],
    "y": ["y"],
    "pixel_x": ["pixel_x"],
    "pixel_y": ["pixel_y"],
    "selected": ["selected"],
}


def slides_of(folder: Path) -> list[Slide] | None:
    """The slides of a folder in this layout, None for another layout.

    Raises:
        NearfarError: a slide with counts and no spots, or the other way round.
    """
    counts_at, spots_at = _first(folder, COUNTS), _first(folder, SPOTS)
    if counts_at is None or spots_at is None:
        return None
    counts = by_stem(counts_at, (".tsv.gz", ".tsv"))
    spots = by_stem(spots_at, (".tsv.gz", ".tsv"), tail="_selection")
    images_at = [folder / name for name in IMAGES if (folder / name).is_dir()]
    images = {name: path for at in images_at for name, path in by_stem(at, IMAGE_ENDINGS).items()}
    for missing, there, where in (
        (sorted(counts.keys() - spots.keys()), counts_at, spots_at),
        (sorted(spots.keys() - counts.keys()), spots_at, counts_at),
    ):
        if missing:
            raise NearfarError(
                f"{', '.join(missing[:5])}: in {there}, but not in {where}. A slide needs a table of the same name in "
                "both."
            )
    if not counts:
        raise NearfarError(f"{counts_at} holds no *.tsv or *.tsv.gz.")
    return [
        SpatialTranscriptomicsSlide(name, counts[name], spots[name], images.get(name))
        for name in sorted(counts)
    ]


@dataclass
class SpatialTranscriptomicsSlide(Slide):
    """One slide of that layout."""

    name: str
    counts: Path
    spots: Path
    image: Path | None

    def files(self) -> list[Path]:
        return [self.counts, self.spots, *([self.image] if self.image else [])]

    def read_counts(self) -> SlideCounts:
        from scipy.sparse import csr_matrix, vstack

        places = self._places()
        genes: list[str] = []
        names: list[str] = []
        rows = []
        rejected: list[tuple[str, str, str]] = []
        for number, line in enumerate(_lines(self.counts), 1):
            if number == 1:
                genes = line.split("\t")[1:]
                continue
            name, _, rest = line.partition("\t")
            if not name and not rest:
                continue
            values = _numbers(rest)
            if values is None or len(values) != len(genes) or not (values >= 0).all():
                there = (
                    "a field is no number"
                    if values is None
                    else f"{len(values)} fields for {len(genes)} genes"
                )
                if values is not None and len(values) == len(genes):
                    there = "a count below 0 or not a number"
                rejected.append((name, "unreadable counts", f"line {number}: {there}"))
            elif name in names:
                rejected.append((name, "spot named twice", f"line {number}"))
            else:
                names.append(name)
                rows.append(csr_matrix(values))
        if not genes or not names:
            raise NearfarError(
                f"{self.counts}: no usable row. Expected: a header with the genes, then a line for each spot, its name "
                "(such as 10x14) and a count for each gene, separated by tabs."
            )
        found = SlideCounts(names, np.zeros((len(names), 2)), genes, vstack(rows, format="csr"), rejected)
        known = np.array([name in places for name in names])
        found = found.keep(known, "no place", [f"{self.spots.name} does not have the spot"] * len(names))
        selected = np.array([places[name][2] for name in found.spots], bool)
        found = found.keep(selected, "not selected", [f"selected is 0 in {self.spots.name}"] * len(selected))
        found.rejected += [
            (name, "no counts", f"{self.counts.name} does not have the spot")
            for name in places
            if name not in names and places[name][2]
        ]
        found.positions = np.array([places[name][:2] for name in found.spots], np.float64).reshape(-1, 2)
        found.pixel_size = _pixel_size(found.positions)
        return found

    def check_boxes(self, counts: SlideCounts, boxes: Sequence[Box]) -> tuple[np.ndarray, list[str]]:
        return boxes_inside(self.image, boxes)

    def open_pictures(self) -> AbstractContextManager[Pictures]:
        assert self.image is not None
        return open_image(self.image)

    def _places(self) -> dict[str, tuple[float, float, bool]]:
        """x and y in pixels, and whether a spot is selected, by its name."""
        table = read_table(self.spots, _COLUMNS, optional=["selected"])
        found: dict[str, tuple[float, float, bool]] = {}
        for at, row in enumerate(table.rows):
            try:
                x, y = (float(table[name][at]) for name in ("x", "y"))
                place = float(table["pixel_x"][at]), float(table["pixel_y"][at])
                used = float(table["selected"][at]) != 0 if "selected" in table else True
            except ValueError as error:
                raise NearfarError(f"{self.spots}, line {row}: {error}.") from None
            if not np.isfinite(place).all():
                continue
            found[f"{x:g}x{y:g}"] = (*place, used)
        return found


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _lines(path: Path) -> Iterator[str]:
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else open(path, encoding="utf-8-sig") as stream
        ):
            for line in stream:
                yield line.rstrip("\r\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise NearfarError(f"{path} cannot be read: {error}. Is it complete?") from None


def _numbers(text: str) -> np.ndarray | None:
    """The values of a line; numpy's parser is ten times as fast as splitting."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # of text that is no number
        try:
            return np.fromstring(text, np.float32, sep="\t")
        except (ValueError, DeprecationWarning):
            return None


def _pixel_size(positions: np.ndarray) -> float | None:
    """Micrometres per pixel, from the median distance of a spot to the next."""
    from nearfar.systems.tissue.neighborhood import neighbor_scale

    pitch = neighbor_scale(positions, 1) if len(positions) > 1 else 0.0
    return PITCH / pitch if pitch > 0 else None
