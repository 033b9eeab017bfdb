"""Slides as ``h5ad`` files beside a picture: Visium, and the layout of HEST-1k (Jaume et al. 2024).

``st/NAME.h5ad`` (or ``NAME.h5ad``) holds counts, names of spots and genes, and in ``obsm/spatial`` x and y in pixels of
the full picture. The picture is ``wsis/NAME.tif`` (``images/``, or beside the h5ad; any usual format), or
``patches/NAME.h5`` holds the patches themselves (``img``, ``barcode``), as in HEST-1k at 0.5 micrometres per pixel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.errors import NearfarError
from nearfar.systems.tissue.h5ad import read_h5ad
from nearfar.systems.tissue.patches import Box, box_around, cut
from nearfar.systems.tissue.slide_image import (
    IMAGE_ENDINGS,
    Pictures,
    boxes_inside,
    open_image,
    pixel_size_of,
)
from nearfar.systems.tissue.slides import Slide, SlideCounts, by_stem

__all__ = ["VisiumSlide", "slides_of"]

PATCH_PIXEL_SIZE = 0.5  # micrometres, of the patches of HEST-1k
SPOT_DIAMETER = 55.0  # micrometres, of Visium


def slides_of(folder: Path) -> list[Slide] | None:
    """The slides of a folder in this layout, None for another layout."""
    at = folder / "st" if (folder / "st").is_dir() else folder
    tables = by_stem(at, (".h5ad",))
    if not tables:
        return None
    images = {
        name: path
        for where in (folder, folder / "images", folder / "wsis")
        if where.is_dir()
        for name, path in by_stem(where, IMAGE_ENDINGS).items()
    }
    patches = by_stem(folder / "patches", (".h5",)) if (folder / "patches").is_dir() else {}
    notes = by_stem(folder / "metadata", (".json",)) if (folder / "metadata").is_dir() else {}
    return [
        VisiumSlide(name, path, images.get(name), patches.get(name), notes.get(name))
        for name, path in sorted(tables.items())
    ]


@dataclass
class VisiumSlide(Slide):
    """One slide of that layout. Where there are both, ``patches`` are read and not ``image``."""

    name: str
    table: Path
    image: Path | None = None
    patches: Path | None = None
    notes: Path | None = None

    def files(self) -> list[Path]:
        picture = self.patches or self.image
        return [path for path in (self.table, picture, self.notes) if path is not None]

    def read_counts(self) -> SlideCounts:
        found, diameter = read_h5ad(self.table)
        said = self._notes().get("pixel_size_um_estimated") or self._notes().get("pixel_size_um_embedded")
        if self.patches is not None:
            found.pixel_size = PATCH_PIXEL_SIZE  # of what patches are cut from
        elif said:
            found.pixel_size = float(said)
        elif diameter:
            found.pixel_size = SPOT_DIAMETER / diameter
        elif self.image is not None:
            found.pixel_size = pixel_size_of(self.image)
        return found

    def patient(self) -> str | None:
        notes = self._notes()
        said, study = notes.get("patient"), notes.get("dataset_title")
        if said in (None, "", "nan"):
            return None
        return f"{study}: {said}" if study else str(said)  # every study of HEST-1k has a "Patient 1"

    def boxes(self, counts: SlideCounts, field: float) -> list[Box]:
        if self.patches is None:
            return super().boxes(counts, field)
        with _opened(self.patches) as held:
            height, width = held["img"].shape[1:3]
        return [box_around(width / 2, height / 2, field)] * len(counts.spots)

    def check_boxes(self, counts: SlideCounts, boxes: Sequence[Box]) -> tuple[np.ndarray, list[str]]:
        if self.patches is None:
            return boxes_inside(self.image, boxes)
        with _opened(self.patches) as held:
            rows = _rows(held)
            height, width = held["img"].shape[1:3]
        if boxes and (min(boxes[0]) < 0 or boxes[0][2] > width or boxes[0][3] > height):
            side = boxes[0][2] - boxes[0][0]
            raise NearfarError(
                f"{self.patches} holds patches of {width} × {height} pixels, from which {side} cannot be cut; "
                "take --patch (or --patch-um) smaller."
            )
        kept = np.array([spot in rows for spot in counts.spots], bool)
        return kept, [f"{self.patches.name} has no patch of the spot"] * len(kept)

    def open_pictures(self) -> AbstractContextManager[Pictures]:
        if self.patches is not None:
            return _PatchFile.opened(self.patches)
        assert self.image is not None
        return open_image(self.image)

    def _notes(self) -> dict[str, Any]:
        if self.notes is None:
            return {}
        try:
            found = json.loads(self.notes.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise NearfarError(f"{self.notes} cannot be read: {error}.") from None
        return found if isinstance(found, dict) else {}


class _PatchFile:
    """Patches that lie ready in an HDF5 file, one read at a time."""

    def __init__(self, held: Any) -> None:
        self.images, self.rows = held["img"], _rows(held)

    def patch(self, spot: str, box: Box, pixels: int) -> np.ndarray:
        return cut(np.asarray(self.images[self.rows[spot]])[..., :3], box, pixels)

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Pictures]:
        with _opened(path) as held:
            yield cls(held)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import h5py

    try:
        held = h5py.File(path, "r")
    except OSError as error:
        raise NearfarError(f"{path} cannot be read as HDF5: {error}.") from None
    with held:
        for key in ("img", "barcode"):
            if key not in held:
                raise NearfarError(f"{path} has no dataset '{key}'; it holds {', '.join(held) or 'nothing'}.")
        if held["img"].ndim != 4 or held["img"].dtype != np.uint8 or held["img"].shape[3] < 3:
            raise NearfarError(
                f"{path}: 'img' is {held['img'].dtype} {held['img'].shape}; (n, h, w, 3) of uint8 is needed."
            )
        yield held


def _rows(held: Any) -> dict[str, int]:
    names = np.asarray(held["barcode"]).ravel().tolist()
    return {name.decode() if isinstance(name, bytes) else str(name): at for at, name in enumerate(names)}
