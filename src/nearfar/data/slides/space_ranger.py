"""What Space Ranger writes (``outs/``): counts, places and pictures of 10x Visium, from version 1 to Visium HD.

A folder of outputs holds counts (``filtered_feature_bc_matrix.h5`` or the folder of that name; ``raw_…`` where that is
missing) beside ``spatial/`` with places (``tissue_positions_list.csv`` without a header, ``tissue_positions.csv``,
``tissue_positions.parquet``), ``scalefactors_json.json`` and two small pictures. The source is such a folder, one that
holds it as ``outs/``, or a folder of several of these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nearfar.data.slides.image import (
    IMAGE_ENDINGS,
    Box,
    Pictures,
    boxes_inside,
    check_size,
    open_image,
    picture_size,
)
from nearfar.data.slides.slide import Slide, SlideCounts, by_stem, no_counts, whole_counts
from nearfar.data.slides.space_ranger_matrix import read_matrix, read_matrix_folder
from nearfar.errors import NearfarError

__all__ = ["SpaceRangerSlide", "slides_of"]

SPOT_DIAMETER = 55.0  # micrometres
MATRICES = ("filtered_feature_bc_matrix", "filtered_gene_bc_matrices", "raw_feature_bc_matrix")
#: best first: a newer Space Ranger writes the later ones no more
POSITIONS = (
    "tissue_positions.parquet",
    "tissue_positions.csv",
    "tissue_positions_list.csv",
    "tissue_positions.csv.gz",
    "tissue_positions_list.csv.gz",
)
_COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")


def slides_of(folder: Path) -> list[Slide] | None:
    """The slides of a folder in this layout, None for a different layout.

    Raises:
        NearfarError: bins of several sizes, of which one has to be named.
    """
    single = _outputs(folder)
    slides: list[Slide] = []
    halves: list[str | None] = []
    if single is not None:
        slides = [_slide(_name(single), single, folder)]
    else:
        halves = [_half(folder)]
        for sample in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
            outputs = _outputs(sample)
            if outputs is not None:
                slides.append(_slide(sample.name, outputs, folder))
            else:
                halves.append(_half(sample))
    tables = sorted(folder.glob("*.h5ad"))
    half = next((each for each in halves if each is not None), None)
    if half is not None and (slides or not tables):
        raise NearfarError(f"{half} Copy the missing part, or take that folder away.")
    if slides and tables:
        raise NearfarError(
            f"{folder} holds outputs of Space Ranger and {tables[0].name}: which of them are the slides? Put each "
            "kind into a folder of its own."
        )
    return slides or None


def _outputs(folder: Path) -> Path | None:
    """Where under a sample's folder counts and ``spatial/`` lie side by side."""
    for at in (folder, folder / "outs"):
        if (at / "spatial").is_dir() and _matrix(at) is not None:
            return at
    for at in (folder, folder / "outs"):
        if not (at / "binned_outputs").is_dir():
            continue
        bins = [each for each in sorted((at / "binned_outputs").iterdir()) if (each / "spatial").is_dir()]
        if len(bins) > 1:
            raise NearfarError(
                f"{at / 'binned_outputs'} holds the same section in bins of {len(bins)} sizes "
                f"({', '.join(each.name for each in bins)}): name one as the source, such as {bins[-1]}. Of several "
                "samples, put links to one folder of bins each, called after the samples, into one folder."
            )
        if bins and _matrix(bins[0]) is not None:
            return bins[0]
    return None


def _half(folder: Path) -> str | None:
    """What is missing of a folder of outputs that has one part of the two; None where there is none of it."""
    for at in (folder / "outs", folder):
        if (at / "spatial").is_dir():
            return f"{at} has spatial/, but no {MATRICES[0]}.h5 (or folder of that name) beside it."
        if at.is_dir() and (matrix := _matrix(at)) is not None:
            return f"{at} has {matrix.name}, but no folder spatial/ beside it."
    return None


def _matrix(at: Path) -> Path | None:
    """The counts of a folder of outputs; names may begin with the sample's, as those of files to download do."""
    for name in MATRICES:
        for tail in (f"{name}.h5", name):
            if (at / tail).exists():
                return at / tail
            prefixed = sorted(at.glob(f"*_{tail}"))
            if len(prefixed) == 1:
                return prefixed[0]
    return None


def _name(outputs: Path) -> str:
    """The sample's name: of the folder itself, or above it where that is Space Ranger's own name."""
    at = outputs.resolve()
    while at.name in ("outs", "binned_outputs") or re.fullmatch(r"square_\d+um", at.name):
        at = at.parent
    return at.name or "slide"


def _slide(name: str, outputs: Path, source: Path) -> SpaceRangerSlide:
    """A slide with the full picture, where there is one: beside the outputs, or called after the sample."""
    above = outputs.parent if outputs.name == "outs" else outputs
    full: Path | None = None
    for at in (source / "images", source / "wsis", source, above / "images", above, outputs):
        full = full or (by_stem(at, IMAGE_ENDINGS).get(name) if at.is_dir() else None)
    if full is None:
        own = {path for at in {above, outputs} for path in by_stem(at, IMAGE_ENDINGS).values()}
        if len(own) > 1:
            shown = ", ".join(sorted(path.name for path in own)[:5])
            raise NearfarError(
                f"{above}: which of {shown} is the full picture? Call it {name} (with its ending)."
            )
        full = next(iter(own), None)
    matrix = _matrix(outputs)
    assert matrix is not None
    return SpaceRangerSlide(name, outputs, matrix, full)


@dataclass
class SpaceRangerSlide(Slide):
    """One folder of outputs; without the full picture patches are cut from Space Ranger's small one."""

    name: str
    outputs: Path
    matrix: Path
    full: Path | None = None

    @cached_property
    def positions(self) -> Path:
        """The table of places."""
        at = self.outputs / "spatial"
        path = next((at / name for name in POSITIONS if (at / name).is_file()), None)
        if path is None:
            content = ", ".join(sorted(each.name for each in at.iterdir())[:8]) or "nothing"
            raise NearfarError(f"{at} has none of {', '.join(POSITIONS[:3])}; it holds {content}.")
        return path

    @cached_property
    def scales(self) -> Mapping[str, object]:
        """``scalefactors_json.json``; empty where there is none."""
        path = self.outputs / "spatial" / "scalefactors_json.json"
        if not path.is_file():
            return {}
        try:
            scales = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise NearfarError(f"{path} cannot be read: {error}. Copy it again.") from None
        if not isinstance(scales, dict):
            raise NearfarError(f"{path} holds no scale factors by name. Copy it again.")
        return scales

    @cached_property
    def picture(self) -> tuple[Path | None, float]:
        """What patches are cut from, and its pixels per pixel of the full picture."""
        if self.full is not None:
            return self.full, 1.0
        for kind in ("hires", "lowres"):
            for ending in (".png", ".jpg", ".jpeg", ".tif", ".tiff"):
                path = self.outputs / "spatial" / f"tissue_{kind}_image{ending}"
                if path.is_file():
                    scale = self._scale(f"tissue_{kind}_scalef")
                    if scale is None:
                        raise NearfarError(
                            f"{self.outputs / 'spatial'}: without tissue_{kind}_scalef in "
                            f"scalefactors_json.json nobody knows where spots lie in {path.name}. Copy that file, or "
                            f"put the full picture beside the outputs as {self.name}.tif (or any usual format)."
                        )
                    return path, scale
        return None, 1.0

    def files(self) -> list[Path]:
        inside = (
            sorted(path for path in self.matrix.iterdir() if path.is_file())
            if self.matrix.is_dir()
            else [self.matrix]
        )
        scales = self.outputs / "spatial" / "scalefactors_json.json"
        picture, _ = self.picture
        more = [path for path in (scales if scales.is_file() else None, picture) if path is not None]
        return [*inside, self.positions, *more]

    def remarks(self) -> list[str]:
        picture, scale = self.picture
        if picture is None or self.full is not None:
            return []
        diameter = self._scale("spot_diameter_fullres")
        spot = f": a spot has {diameter * scale:.0f} of its pixels" if diameter else ""
        return [
            f"patches are cut from the small picture {picture.name}{spot}; put the full one beside the outputs as "
            f"{self.name}.tif (or any usual format)"
        ]

    def read_counts(self) -> SlideCounts:
        read = read_matrix_folder if self.matrix.is_dir() else read_matrix
        counts, barcodes, genes = read(self.matrix)
        wrong = no_counts(counts)
        if wrong is not None:
            raise NearfarError(
                f"{self.matrix} holds no counts ({wrong}): normalised values cannot be turned back; take the file that "
                "Space Ranger wrote."
            )
        places = self._places()
        _, scale = self.picture
        spots = SlideCounts(barcodes, np.zeros((len(barcodes), 2)), genes, whole_counts(counts))
        first = dict(zip(reversed(barcodes), reversed(range(len(barcodes))), strict=True))
        own = np.array([first[spot] == at for at, spot in enumerate(barcodes)], bool)
        spots = spots.keep(own, "spot named twice", ["a later row of the same name"] * len(own))
        known = np.array([name in places for name in spots.spots], bool)
        spots = spots.keep(known, "no place", [f"{self.positions.name} does not have the spot"] * len(known))
        where = np.array([places[name] for name in spots.spots], np.float64).reshape(-1, 3)
        spots.positions = where[:, :2] * scale
        finite = np.asarray(np.isfinite(spots.positions).all(1))
        spots = spots.keep(
            finite, "no place", [f"its place in {self.positions.name} is no number"] * len(finite)
        )
        inside = where[finite, 2] != 0
        spots = spots.keep(inside, "not selected", ["in_tissue is 0"] * len(inside))
        spots.rejected += [
            (name, "no counts", f"{self.matrix.name} does not have the spot")
            for name, place in places.items()
            if name not in first and place[2]
        ]
        size = self._scale("microns_per_pixel")
        diameter = self._scale("spot_diameter_fullres")
        if size is None and diameter is not None:
            size = SPOT_DIAMETER / diameter
        spots.pixel_size = None if size is None else size / scale
        return spots

    def check_boxes(self, counts: SlideCounts, boxes: Sequence[Box]) -> tuple[np.ndarray, list[str]]:
        picture, _ = self.picture
        if picture is not None and self.full is not None:
            check_size(picture, self._full_size(), str(self.outputs / "spatial"))
        return boxes_inside(picture, boxes)

    def open_pictures(self) -> AbstractContextManager[Pictures]:
        picture, _ = self.picture
        assert picture is not None
        return open_image(picture)

    def _full_size(self) -> tuple[int, int] | None:
        """(height, width) of the full picture, by the small one and its scale."""
        small, scale = SpaceRangerSlide(self.name, self.outputs, self.matrix).picture
        if small is None:
            return None
        try:
            height, width = picture_size(small)
        except NearfarError:
            return None  # nothing is cut from it
        return round(height / scale), round(width / scale)

    def _scale(self, name: str) -> float | None:
        value = self.scales.get(name)
        if value is None:
            return None
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0
        if not (np.isfinite(number) and number > 0):
            raise NearfarError(
                f"{self.outputs / 'spatial' / 'scalefactors_json.json'}: {name} is {value!r}; a number above 0 is "
                "needed."
            )
        return number

    def _places(self) -> dict[str, tuple[float, float, float]]:
        """x and y in pixels of the full picture, and whether a spot lies in tissue, by barcode."""
        import pandas as pd

        path = self.positions
        try:
            if path.suffix == ".parquet":
                table = pd.read_parquet(path)
            else:
                table = pd.read_csv(path, header=None, dtype=str, encoding="utf-8-sig")
                header = str(table.iloc[0, 0]).strip().lower() == "barcode"
                names = [str(name).strip() for name in table.iloc[0]] if header else list(_COLUMNS)
                if len(names) != table.shape[1]:
                    raise NearfarError(
                        f"{path} has {table.shape[1]} columns; Space Ranger writes {len(_COLUMNS)}: "
                        f"{', '.join(_COLUMNS)}."
                    )
                table.columns = pd.Index(names)
                table = table.iloc[1:] if header else table
        except NearfarError:
            raise
        except Exception as error:  # pandas and pyarrow raise whatever the damage leads to
            raise NearfarError(
                f"{path} cannot be read: {str(error).splitlines()[0]}. Is it complete?"
            ) from None
        missing = [name for name in _COLUMNS if name not in table and not name.startswith("array")]
        if missing:
            raise NearfarError(
                f"{path} has no column {', '.join(missing)}; its header has {', '.join(map(str, table.columns))}."
            )
        numbers = [
            pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64)
            for name in ("pxl_col_in_fullres", "pxl_row_in_fullres", "in_tissue")
        ]
        places: dict[str, tuple[float, float, float]] = {}
        for name, x, y, inside in zip(
            table["barcode"].astype(str).tolist(), *(each.tolist() for each in numbers), strict=True
        ):
            if name in places and places[name] != (x, y, inside):
                raise NearfarError(f"{path} has two places of spot {name}; remove one.")
            if inside not in (0.0, 1.0):
                raise NearfarError(f"{path}: in_tissue of spot {name} is not 0 or 1. Copy the file again.")
            places[name] = (x, y, inside)
        return places
