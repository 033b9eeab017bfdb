"""What Space Ranger writes (``outs/``): counts, places and pictures of 10x Visium, from version 1 to Visium HD.

A folder of outputs holds counts (``filtered_feature_bc_matrix.h5`` or the folder of that name with Matrix Market and
two lists; ``raw_…`` where that is missing) beside ``spatial/`` with places (``tissue_positions_list.csv`` without a
header, ``tissue_positions.csv``, ``tissue_positions.parquet``), ``scalefactors_json.json`` and two small pictures. The
source is such a folder, one that holds it as ``outs/``, or a folder of several of these.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nearfar.data.slides.h5ad import check_node
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
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import h5py
    from scipy.sparse import csr_matrix

__all__ = ["SpaceRangerSlide", "read_matrix", "read_matrix_folder", "slides_of"]


EXPRESSION = "Gene Expression"
#: a CSR matrix (spots, genes), the barcodes and the names of the genes
Matrix = tuple["csr_matrix", list[str], list[str]]


def read_matrix(path: Path) -> Matrix:
    """``filtered_feature_bc_matrix.h5`` of Space Ranger 1 and later, or the older layout with a group for each genome.

    Features of other kinds than gene expression (antibodies) are left out.

    Raises:
        NearfarError: no such file, damage, several genomes.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            group = _group(file, path)
            newer = "features" in group
            names = group["features/name"] if newer else group["gene_names"]
            parts = {name: group[name] for name in ("barcodes", "data", "indices", "indptr", "shape")}
            for name, node in {**parts, "names": names}.items():
                check_node(node, name, path)
                if not isinstance(node, h5py.Dataset):
                    raise NearfarError(f"{path}: '{name}' is no array.")
            genes, barcodes = _texts(names), _texts(parts["barcodes"])
            kinds = (
                _texts(group["features/feature_type"])
                if newer and "feature_type" in group["features"]
                else None
            )
            shape = np.asarray(parts["shape"]).tolist()
            arrays = [np.asarray(parts[name]) for name in ("data", "indices", "indptr")]
    except NearfarError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise NearfarError(
            f"{path} cannot be read as counts of Space Ranger: {error}. Is it complete?"
        ) from None
    if shape != [len(genes), len(barcodes)]:
        raise NearfarError(
            f"{path}: the matrix is {shape}, with {len(genes)} genes and {len(barcodes)} spots."
        )
    return _finished(path, arrays, barcodes, genes, kinds)


def read_matrix_folder(folder: Path) -> Matrix:
    """A folder with ``matrix.mtx``, ``barcodes.tsv`` and ``features.tsv`` (or ``genes.tsv``), each perhaps ``.gz``."""
    from scipy.io import mminfo, mmread

    below = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    if not list(folder.glob("*matrix.mtx*")) and len(below) == 1:
        folder = below[0]  # a genome's own folder, of version 2 and before
    path = _file(folder, ("matrix.mtx.gz", "matrix.mtx"))
    barcodes = [line.split("\t")[0] for line in _lines(_file(folder, ("barcodes.tsv.gz", "barcodes.tsv")))]
    listed = _file(folder, ("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv"))
    rows = [line.split("\t") for line in _lines(listed)]
    genes = [row[1] if len(row) > 1 else row[0] for row in rows]
    kinds = [row[2] for row in rows] if rows and all(len(row) > 2 for row in rows) else None
    try:
        high, wide, entries, *_ = mminfo(str(path))
        if (high, wide) != (len(genes), len(barcodes)):
            raise NearfarError(
                f"{path} is {high} × {wide}, with {len(genes)} lines in {listed.name} and {len(barcodes)} barcodes."
            )
        if entries > max(path.stat().st_size, 64) * 1100 // 4:  # an entry has 4 characters at least
            raise NearfarError(f"{path} claims {entries:,} entries, more than it can hold: it is damaged.")
        matrix = mmread(str(path)).tocsc()
    except NearfarError:
        raise
    except (OSError, EOFError, ValueError, TypeError, zlib.error, OverflowError, RuntimeError) as error:
        raise NearfarError(f"{path} cannot be read as Matrix Market: {error}. Is it complete?") from None
    return _finished(path, [matrix.data, matrix.indices, matrix.indptr], barcodes, genes, kinds)


def _group(file: h5py.File, path: Path) -> h5py.Group:
    if "matrix" in file:
        return file["matrix"]
    genomes = [name for name, node in file.items() if hasattr(node, "keys") and "gene_names" in node]
    if len(genomes) != 1:
        words = (
            f"{len(genomes)} genomes ({', '.join(genomes[:5])}), and one is read" if genomes else "no matrix"
        )
        raise NearfarError(f"{path} holds {words}; in it: {', '.join(file) or 'nothing'}.")
    return file[genomes[0]]


def _finished(
    path: Path, arrays: Sequence[np.ndarray], barcodes: list[str], genes: list[str], kinds: list[str] | None
) -> Matrix:
    """The matrix with spots as rows, checked, gene expression alone."""
    from scipy.sparse import csr_matrix

    try:
        counts = csr_matrix(tuple(arrays), shape=(len(barcodes), len(genes)))
        counts.check_format(full_check=True)
    except ValueError as error:
        raise NearfarError(f"{path} is damaged: {error}.") from None
    if kinds is not None and len(kinds) == len(genes):
        kept = [at for at, kind in enumerate(kinds) if kind == EXPRESSION]
        if not kept and genes:
            raise NearfarError(
                f"{path} has no feature of the kind {EXPRESSION!r}, but {', '.join(sorted(set(kinds))[:5])}."
            )
        if len(kept) < len(genes):
            counts, genes = counts[:, kept], [genes[at] for at in kept]
    return counts, barcodes, genes


def _file(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
        prefixed = [path for path in sorted(folder.glob(f"*{name}")) if path.is_file()]
        if len(prefixed) == 1:
            return prefixed[0]
    content = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise NearfarError(f"{folder} has no {names[0]}; it holds {content}.")


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise NearfarError(f"{path} cannot be read: {error}. Is it complete?") from None
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _texts(node: h5py.Dataset) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in np.asarray(node).tolist()]


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
