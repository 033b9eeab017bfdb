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

from nearfar.data.slides.image import IMAGE_ENDINGS, Box, Pictures, boxes_inside, open_image
from nearfar.data.slides.slide import Slide, SlideCounts, by_stem
from nearfar.data.tables import read_table
from nearfar.errors import NearfarError

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
    """The slides of a folder in this layout, None for a different layout.

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
    for missing, present, where in (
        (sorted(counts.keys() - spots.keys()), counts_at, spots_at),
        (sorted(spots.keys() - counts.keys()), spots_at, counts_at),
    ):
        if missing:
            raise NearfarError(
                f"{', '.join(missing[:5])}: in {present}, but not in {where}. A slide needs a table of the same name "
                "in both."
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
        genes = self._genes()
        names: list[str] = []
        seen: set[str] = set()  # every spot that has a row, whatever became of it
        rows = []
        rejected: list[tuple[str, str, str]] = []
        for number, line in enumerate(_lines(self.counts), 1):
            name, _, rest = line.partition("\t")
            if number == 1 or (not name and not rest):
                continue
            values = _numbers(rest)
            wrong = _what_is_wrong(values, len(genes))
            if wrong is not None or values is None:
                rejected.append((name, "unreadable counts", f"line {number}: {wrong}"))
            elif (values != np.round(values)).any():
                at = int(np.argmax(values != np.round(values)))
                raise NearfarError(
                    f"{self.counts}, line {number}: {values[at]:.6g} of {genes[at]} is no count. Normalised values "
                    "cannot be turned back: give the counts as they were measured."
                )
            elif name in seen:
                rejected.append((name, "spot named twice", f"line {number}"))
            else:
                names.append(name)
                rows.append(csr_matrix(values))
            seen.add(name)
        if not genes or not seen:
            raise NearfarError(
                f"{self.counts}: no usable row. Expected: a header with the genes, then a line for each spot, its name "
                "(such as 10x14) and a count for each gene, separated by tabs."
            )
        counts = vstack(rows, format="csr") if rows else csr_matrix((0, len(genes)), dtype=np.float32)
        spots = SlideCounts(names, np.zeros((len(names), 2)), genes, counts, rejected)
        known = [isinstance(places.get(name), tuple) for name in names]
        missing = f"{self.spots.name} does not have the spot"
        spots = spots.keep(
            np.array(known, bool), "no place", [str(places.get(name, missing)) for name in names]
        )
        own = [places[name] for name in spots.spots]
        selected = np.array([place[2] for place in own], bool)
        spots = spots.keep(selected, "not selected", [f"selected is 0 in {self.spots.name}"] * len(selected))
        spots.rejected += [
            (name, "no counts", f"{self.counts.name} does not have the spot")
            for name, place in places.items()
            if name not in seen and (isinstance(place, str) or place[2])
        ]
        spots.positions = np.array([places[name][:2] for name in spots.spots], np.float64).reshape(-1, 2)
        spots.pixel_size = _pixel_size(spots.positions)
        return spots

    def _genes(self) -> list[str]:
        """The header, without the cell above the names of spots; R writes none there."""
        lines = _lines(self.counts)
        header = next(lines, "").split("\t")
        fields = [line.count("\t") for line, _ in zip(lines, range(20), strict=False)]
        usual = max(sorted(set(fields)), key=fields.count) if fields else -1
        return header if header[0] and usual == len(header) else header[1:]

    def check_boxes(self, counts: SlideCounts, boxes: Sequence[Box]) -> tuple[np.ndarray, list[str]]:
        return boxes_inside(self.image, boxes)

    def open_pictures(self) -> AbstractContextManager[Pictures]:
        assert self.image is not None
        return open_image(self.image)

    def _places(self) -> dict[str, tuple[float, float, bool] | str]:
        """x and y in pixels, and whether a spot is selected, by its name; for a place that cannot be used, why."""
        table = read_table(
            self.spots, _COLUMNS, optional=["selected"], naming="the header '{name}', in the file itself"
        )
        places: dict[str, tuple[float, float, bool] | str] = {}
        for at, row in enumerate(table.rows):
            try:
                x, y = (float(table[name][at]) for name in ("x", "y"))
                place = float(table["pixel_x"][at]), float(table["pixel_y"][at])
            except ValueError as error:
                raise NearfarError(f"{self.spots}, line {row}: {error}.") from None
            used = self._selected(table["selected"][at], row) if "selected" in table else True
            name = f"{x:g}x{y:g}"
            if not np.isfinite(place).all():
                places[name] = f"its place in {self.spots.name}, line {row}, is not finite"
            elif name in places and places[name] != (*place, used):
                places[name] = f"{self.spots.name} has two places of the spot"
            else:
                places[name] = (*place, used)
        return places

    def _selected(self, text: str, row: int) -> bool:
        word = text.strip().strip('"').lower()
        if word in ("true", "t", "false", "f"):
            return word.startswith("t")
        try:
            return float(word) != 0
        except ValueError:
            raise NearfarError(
                f"{self.spots}, line {row}: selected is {text!r}; 0 and 1, or TRUE and FALSE, are read."
            ) from None


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


def _what_is_wrong(values: np.ndarray | None, genes: int) -> str | None:
    """Why the values of a line cannot be counts of so many genes; None where they can."""
    if values is None:
        return "a field is no number"
    if len(values) != genes:
        return f"{len(values)} fields for {genes} genes"
    if not ((values >= 0) & np.isfinite(values)).all():
        return "a count below 0 or not a number"
    return None


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
    from nearfar.data.slides.tissue import neighbor_scale

    pitch = neighbor_scale(positions, 1) if len(positions) > 1 else 0.0
    return PITCH / pitch if pitch > 0 else None
