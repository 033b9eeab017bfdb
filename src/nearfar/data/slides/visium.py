"""Slides as ``h5ad`` files beside a picture: Visium, and the layout of HEST-1k (Jaume et al. 2024).

``st/NAME.h5ad`` (or ``NAME.h5ad``) holds counts, names of spots and genes, and in ``obsm/spatial`` x and y in pixels of
the full picture. The picture is ``wsis/NAME.tif`` (``images/``, or beside the h5ad; any usual format), or
``patches/NAME.h5`` holds the patches themselves (``img``, ``barcode``), as in HEST-1k at 0.5 micrometres per pixel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nearfar.data.files import Json
from nearfar.data.slides.h5ad import check_node, declared_size, read_h5ad, read_sections, reading
from nearfar.data.slides.image import (
    IMAGE_ENDINGS,
    Box,
    Pictures,
    box_around,
    boxes_inside,
    check_size,
    cut,
    open_image,
    pixel_size_of,
)
from nearfar.data.slides.slide import Section, Slide, SlideCounts, by_stem
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import h5py

__all__ = ["VisiumSlide", "slides_of"]

PATCH_PIXEL_SIZE = 0.5  # micrometres, of the patches of HEST-1k
SPOT_DIAMETER = 55.0  # micrometres, of Visium


def slides_of(folder: Path) -> list[Slide] | None:
    """The slides of a folder in this layout, None for a different layout."""
    at = folder / "st" if (folder / "st").is_dir() else folder
    tables = by_stem(at, (".h5ad",))
    packed = sorted(by_stem(at, (".h5ad.gz",)).keys() - tables.keys())
    if packed:
        raise NearfarError(
            f"{at}: {', '.join(packed[:5])} is packed (.h5ad.gz): unpack it first, with gunzip."
        )
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
        slide
        for name, path in sorted(tables.items())
        for slide in _slides_of_file(name, path, images, patches, notes)
    ]


def _slides_of_file(
    name: str,
    path: Path,
    images: Mapping[str, Path],
    patches: Mapping[str, Path],
    notes: Mapping[str, Path],
) -> list[VisiumSlide]:
    """The slide of a file, or one for each section that it holds, each with a picture of its own.

    Raises:
        NearfarError: several sections, and a picture of none of them.
    """
    sections = read_sections(path)
    if len(sections) == 1:
        return [VisiumSlide(name, path, images.get(name), patches.get(name), notes.get(name), sections[0])]
    slides = []
    for section in sections:
        own = f"{name}-{section.value}"
        image = next(
            (images[each] for each in (own, f"{name}_{section.value}", str(section.value)) if each in images),
            None,
        )
        slides.append(
            VisiumSlide(
                own,
                path,
                image,
                patches.get(own, patches.get(name)),
                notes.get(own, notes.get(name)),
                section,
            )
        )
    if all(slide.image is None and slide.patches is None for slide in slides):
        column = sections[0].column
        shown = ", ".join(str(section.value) for section in sections[:5])
        raise NearfarError(
            f"{path} holds {len(sections)} sections by obs['{column}'] ({shown}{', …' if len(sections) > 5 else ''}), "
            f"and each needs a picture of its own beside the file: {slides[0].name}.png and so on (any usual format)."
            + (
                f" {images[name].name} cannot be the picture of all of them; if it is, remove obs['{column}'] from the "
                "file (and what uns['spatial'] says of the other libraries)."
                if name in images
                else ""
            )
        )
    return slides


@dataclass
class VisiumSlide(Slide):
    """One slide of that layout. Where there are both, ``patches`` are read and not ``image``."""

    name: str
    table: Path
    image: Path | None = None
    patches: Path | None = None
    notes: Path | None = None
    section: Section = field(default_factory=Section)

    def files(self) -> list[Path]:
        picture = self.patches or self.image
        return [path for path in (self.table, picture, self.notes) if path is not None]

    def read_counts(self) -> SlideCounts:
        spots, diameter = read_h5ad(self.table, self.section)
        stated = self._notes().get("pixel_size_um_estimated") or self._notes().get("pixel_size_um_embedded")
        if self.patches is not None:
            spots.pixel_size = PATCH_PIXEL_SIZE  # of what patches are cut from
        elif stated:
            spots.pixel_size = self._number(stated)
        elif diameter:
            spots.pixel_size = SPOT_DIAMETER / diameter
        elif self.image is not None:
            spots.pixel_size = pixel_size_of(self.image)
        return spots

    def patient(self) -> str | None:
        notes = self._notes()
        patient, study = notes.get("patient"), notes.get("dataset_title")
        if patient in (None, "", "nan"):
            return None
        return f"{study}: {patient}" if study else str(patient)  # every study of HEST-1k has a "Patient 1"

    def boxes(self, counts: SlideCounts, field: float) -> list[Box]:
        if self.patches is None:
            return super().boxes(counts, field)
        with _opened(self.patches) as file:
            height, width = file["img"].shape[1:3]
        return [box_around(width / 2, height / 2, field)] * len(counts.spots)

    def check_boxes(self, counts: SlideCounts, boxes: Sequence[Box]) -> tuple[np.ndarray, list[str]]:
        if self.patches is None:
            if self.image is not None:
                check_size(
                    self.image,
                    declared_size(self.table, self.section),
                    f"uns['spatial'] of {self.table.name}",
                )
            return boxes_inside(self.image, boxes)
        with _opened(self.patches) as file:
            rows = _rows(file)
            height, width = file["img"].shape[1:3]
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

    def _number(self, value: str | float) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not (np.isfinite(number) and number > 0):
            raise NearfarError(f"{self.notes}: a pixel of {value!r} micrometres; a number above 0 is needed.")
        return number

    def _notes(self) -> Json:
        if self.notes is None:
            return {}
        try:
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise NearfarError(f"{self.notes} cannot be read: {error}.") from None
        return notes if isinstance(notes, dict) else {}


class _PatchFile:
    """Patches that lie ready in an HDF5 file, one read at a time."""

    def __init__(self, file: h5py.File, path: Path) -> None:
        self.images, self.rows, self.path = file["img"], _rows(file), path

    def patch(self, spot: str, box: Box, pixels: int) -> np.ndarray:
        try:
            pixels_there = np.asarray(self.images[self.rows[spot]])
        except (OSError, RuntimeError, ValueError) as error:
            raise NearfarError(
                f"{self.path}: the patch of spot {spot} cannot be read ({error}). Is the file complete?"
            ) from None
        return cut(pixels_there[..., :3], box, pixels)

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Pictures]:
        with _opened(path) as file:
            yield cls(file, path)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise NearfarError(f"{path} cannot be read as HDF5: {error}.") from None
    with file:
        with reading(path, "img and barcode"):
            for key in ("img", "barcode"):
                if key not in file:
                    raise NearfarError(
                        f"{path} has no dataset '{key}'; it holds {', '.join(file) or 'nothing'}."
                    )
                check_node(file[key], key, path)
                if not isinstance(file[key], h5py.Dataset):
                    raise NearfarError(f"{path}: '{key}' is no array but a group.")
            if file["img"].ndim != 4 or file["img"].dtype != np.uint8 or file["img"].shape[3] < 3:
                raise NearfarError(
                    f"{path}: 'img' is {file['img'].dtype} {file['img'].shape}; (n, h, w, 3) of uint8 is needed."
                )
            if file["barcode"].size != len(file["img"]):
                raise NearfarError(
                    f"{path} holds {len(file['img'])} patches and {file['barcode'].size} barcodes: one each is needed."
                )
        yield file


def _rows(file: h5py.File) -> dict[str, int]:
    with reading(Path(file.filename), "barcode"):
        names = np.asarray(file["barcode"]).ravel().tolist()
    return {name.decode() if isinstance(name, bytes) else str(name): at for at, name in enumerate(names)}
