"""New slides and patches for a trained run: shards, folders of slides, h5ad files, or patches as pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from nearfar.data.chunks import NewData
from nearfar.data.column_kinds import PICTURE_SUFFIXES
from nearfar.data.files import Json
from nearfar.data.items import Column, Items
from nearfar.data.rejections import Rejections
from nearfar.data.slides.h5ad import has_places, read_expression
from nearfar.data.slides.image import Box, decode_jpeg, encode_jpeg
from nearfar.data.slides.shard_index import read_index
from nearfar.data.slides.slide import Slide, SlideCounts, slides_in
from nearfar.data.slides.tissue import normalized
from nearfar.errors import NearfarError

__all__ = ["LACKING", "NEW_OPTIONS", "Reading", "read_slides"]

#: how new slides may be read
NEW_OPTIONS = {
    "missing_genes": "refuse or zero: what becomes of genes of the run that the data lacks; by default refuse",
    "patch": "side of the square around a spot, in pixels; by default as the training slides were cut",
    "patch_um": "the same in micrometres",
    "min_counts": "spots with fewer counts are left out; by default none is",
}
#: the notes of items that say why a view is not there, and that one is not though it might be
LACKING, REFUSED = "lacking", "refused"
_MEMORY = 2**28  # bytes of the patches of a chunk
_TARGET_SUM = 1e4


@dataclass(frozen=True)
class Reading:
    """How the slides of a run were read, so that new ones are read alike.

    Attributes:
        genes: of the run, in order.
        size: (height, width) of the patches.
        patch: as the index of the shards states it (``field``, ``jpg_quality``); empty for generated slides.
        expression: the same (``target_sum``).
        batch: rows that are evaluated at once; chunks are multiples of it.
    """

    genes: Sequence[str]
    size: tuple[int, int]
    patch: Json
    expression: Json
    batch: int = 512

    @property
    def target_sum(self) -> float:
        """Counts of a spot after normalisation."""
        return float(self.expression.get("target_sum") or _TARGET_SUM)

    def field(self, source: NewData, slide: str, pixel_size: float | None) -> int:
        """Side of what is cut from a slide, in its pixels."""
        if "patch" in source.options:
            return int(source.number("patch", 0, 1, 1e5))
        if "patch_um" in source.options:
            micrometres = source.number("patch_um", 0, 1e-3, 1e6)
        else:
            amount, _, unit = str(self.patch.get("field") or "").partition(" ")
            if not re.fullmatch(r"\d+(\.\d*)?(e[+-]?\d+)?", amount):
                raise NearfarError(
                    "the run was trained on generated slides, which do not say how much of a slide a patch shows: give "
                    "--set patch=PIXELS, or --set patch_um=MICROMETRES."
                )
            if unit == "pixels":
                return int(float(amount))
            micrometres = float(amount)
        if pixel_size is None:
            raise NearfarError(
                f"slide {slide} does not say how large a pixel is, and patches of the run show {micrometres:g} "
                "micrometres: give --set patch=PIXELS."
            )
        return max(1, round(micrometres / pixel_size))

    def rows(self, source: NewData) -> int:
        """Spots of a chunk."""
        most = max(1, min(source.rows, _MEMORY // (3 * self.size[0] * self.size[1])))
        return most if most < self.batch else most // self.batch * self.batch

    def lacking_genes(self, names: Sequence[str], source: NewData) -> str:
        """Why expression of the genes ``names`` cannot be taken for that of the run; empty where it can."""
        here = set(names)
        missing = [gene for gene in self.genes if gene not in here]
        zero = source.choice("missing_genes", "refuse", ("refuse", "zero")) == "zero"
        if not missing or (zero and len(missing) < len(self.genes)):
            return ""
        listed = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        return (
            f"{len(missing)} of the {len(self.genes)} genes of the run are missing ({listed}). Are genes named by "
            "symbol here and by Ensembl id there? --set missing_genes=zero takes 0 for what was not measured."
        )


def read_slides(source: NewData, reading: Reading) -> Iterator[Items] | None:
    """The spots of a source in chunks; None for a source that holds no slides, but perhaps patches as pictures.

    Columns are ``image`` (the patch of each spot), ``gene`` (log1p expression of the run's genes, in its order; NaN for
    a spot without counts), ``slide`` and ``position``. Where a view cannot be had, the note ``lacking`` says why.

    Args:
        source: a folder of shards, of slides in any layout that ``nearfar data shards`` reads, or an h5ad file with its
            picture beside it, or without one.
        reading: of the run.
    """
    path = Path(source.path).expanduser()
    source.choice("missing_genes", "refuse", ("refuse", "zero"))
    if path.is_dir() and (path / "index.json").is_file():
        return _of_shards(path, source, reading)
    if path.is_dir():
        slides = slides_in(path)
        return None if slides is None else _of_slides(path, slides, source, reading)
    if path.suffix.lower() == ".h5ad" and path.is_file():
        slides = _slides_of_file(path)
        return (
            _of_expression(path, source, reading)
            if slides is None
            else _of_slides(path, slides, source, reading)
        )
    if path.suffix.lower() in PICTURE_SUFFIXES or path.is_file():
        return None
    raise NearfarError(f"{path}: no such file or folder.")


def _slides_of_file(path: Path) -> list[Slide] | None:
    """The slides of one h5ad file; None where it says of no spot where it lies."""
    if not has_places(path):
        return None
    from nearfar.data.slides.visium import VisiumSlide, slides_of

    folder = path.parent.parent if path.parent.name == "st" else path.parent
    every = slides_of(folder) or []
    return [slide for slide in every if isinstance(slide, VisiumSlide) and slide.table == path] or None


# -- slides --------------------------------------------------------------------------------------------------
def _of_slides(path: Path, slides: Sequence[Slide], source: NewData, reading: Reading) -> Iterator[Items]:
    for slide in slides:
        yield from _of_slide(path, slide, source, reading)


def _of_slide(path: Path, slide: Slide, source: NewData, reading: Reading) -> Iterator[Items]:
    counts = slide.read_counts()
    least = source.number("min_counts", 0, 0, 1e9)
    totals = counts.totals()
    counts = counts.keep(
        totals >= least, f"fewer than {least:g} counts", [f"{total:g} counts" for total in totals.tolist()]
    )
    lacking: dict[str, str] = {}
    if why := reading.lacking_genes(counts.genes, source):
        lacking["gene"] = f"slide {slide.name}: {why}"
    boxes: list[Box] = []
    if _has_picture(slide):
        side = reading.field(source, slide.name, counts.pixel_size)
        boxes = slide.boxes(counts, side)
        inside, details = slide.check_boxes(counts, boxes)
        boxes = [box for box, kept in zip(boxes, inside.tolist(), strict=True) if kept]
        counts = counts.keep(inside, "no picture", details)
    else:
        lacking["image"] = f"slide {slide.name} has no picture"
    notes = _notes(lacking)
    rejections = Rejections()
    for spot, reason, detail in counts.rejected:
        rejections.add(reason, None, f"{slide.name}/{spot}", detail)
    if not counts.spots:
        yield Items([], {}, str(path), rejections=rejections, notes=notes)
        return
    rows = reading.rows(source)

    def chunk(start: int, patch: Callable[[int], np.ndarray] | None) -> Items:
        some = np.arange(start, min(start + rows, len(counts.spots)))
        columns: dict[str, Column] = {}
        if patch is not None:
            columns["image"] = np.stack([patch(row) for row in some.tolist()])
        if "gene" not in lacking:
            columns["gene"] = _expression(counts, some, reading)
        columns["slide"] = [slide.name] * len(some)
        columns["position"] = counts.positions[some]
        columns["spot"] = [counts.spots[row] for row in some.tolist()]
        ids = [f"{slide.name}/{counts.spots[row]}" for row in some.tolist()]
        own = rejections if start == 0 else Rejections()
        return Items(ids, columns, str(path), rows=(some + 1).tolist(), rejections=own, notes=notes)

    starts = range(0, len(counts.spots), rows)
    if not boxes:
        yield from (chunk(start, None) for start in starts)
        return
    quality = reading.patch.get("jpg_quality")
    pixels = reading.size[0]
    with slide.open_pictures() as pictures:

        def patch(row: int) -> np.ndarray:
            whole = pictures.patch(counts.spots[row], boxes[row], pixels)
            # Training patches are what jpg has left of them.
            return whole if quality is None else decode_jpeg(encode_jpeg(whole, int(quality)))

        yield from (chunk(start, patch) for start in starts)


def _notes(lacking: Mapping[str, str]) -> Json:
    """Notes of what is not there.

    Raises:
        NearfarError: nothing is.
    """
    if len(lacking) == 2:
        raise NearfarError(". ".join(lacking.values()))
    return {LACKING: dict(lacking)} | ({REFUSED: lacking["gene"]} if "gene" in lacking else {})


def _has_picture(slide: Slide) -> bool:
    """Whether a slide has a picture; of layouts that always have one, True."""
    return any(getattr(slide, name, True) is not None for name in ("image", "patches"))


def _expression(counts: SlideCounts, some: np.ndarray, reading: Reading) -> Float[np.ndarray, "k g"]:
    """log1p expression of the run's genes; genes that are missing are 0, spots without any count NaN."""
    part = SlideCounts([""] * len(some), counts.positions[some], counts.genes, counts.counts[some])
    totals = part.totals()
    values = normalized(part.columns(list(reading.genes)), totals, reading.target_sum)
    values[totals <= 0] = np.nan
    return values


# -- expression alone ----------------------------------------------------------------------------------------
def _of_expression(path: Path, source: NewData, reading: Reading) -> Iterator[Items]:
    counts = read_expression(path)
    lacking = {
        "image": f"{path} does not say where its spots lie (obsm['spatial']), so that no patch is theirs"
    }
    if why := reading.lacking_genes(counts.genes, source):
        lacking["gene"] = f"{path}: {why}"
    notes = _notes(lacking)
    rejections = Rejections()
    for spot, reason, detail in counts.rejected:
        rejections.add(reason, None, spot, detail)
    rows = reading.rows(source)
    for start in range(0, max(1, len(counts.spots)), rows):
        some = np.arange(start, min(start + rows, len(counts.spots)))
        names = [counts.spots[row] for row in some.tolist()]
        columns: dict[str, Column] = {} if why else {"gene": _expression(counts, some, reading)}
        columns["spot"] = names
        yield Items(names, columns, str(path), rows=(some + 1).tolist(), rejections=rejections, notes=notes)
        rejections = Rejections()


# -- shards --------------------------------------------------------------------------------------------------
def _of_shards(path: Path, source: NewData, reading: Reading) -> Iterator[Items]:
    from nearfar.data.slides.shard_dataset import read_shards

    index = read_index(path)
    _check_alike(path, index.patch, index.expression, reading)
    why = reading.lacking_genes(index.genes, source)
    notes = _notes({"gene": f"{path}: {why}"} if why else {})
    rows = reading.rows(source)
    for entry in index.slides:
        known = [gene for gene in reading.genes if gene in set(index.genes)]
        tissue = read_shards(path, [entry.name], genes=known or index.genes[:1])
        place = {gene: column for column, gene in enumerate(tissue.genes)}
        for start in range(0, len(tissue), rows):
            part = slice(start, min(start + rows, len(tissue)))
            columns: dict[str, Column] = {"image": tissue.patches[part]}
            if not why:
                values = np.zeros((part.stop - start, len(reading.genes)), np.float32)
                for column, gene in enumerate(reading.genes):
                    if gene in place:
                        values[:, column] = tissue.expression[part, place[gene]]
                columns["gene"] = values
            columns["slide"] = [entry.name] * (part.stop - start)
            columns["position"] = tissue.positions[part]
            ids = list(tissue.ids[part])
            columns["spot"] = [name.removeprefix(f"{entry.name}/") for name in ids]
            yield Items(ids, columns, str(path), rows=list(range(part.start + 1, part.stop + 1)), notes=notes)


def _check_alike(path: Path, patch: Json, expression: Json, reading: Reading) -> None:
    """``NearfarError`` for shards whose field or normalisation is not that of the run."""
    given, trained = patch.get("field"), reading.patch.get("field")
    if trained is not None and given != trained:
        raise NearfarError(
            f"{path}: patches show {given}, and those that the run was trained on show {trained}. Write the shards "
            "anew with the --patch (or --patch-um) of then."
        )
    target = expression.get("target_sum")
    if expression.get("values") == "log1p" and reading.expression and target != reading.target_sum:
        raise NearfarError(
            f"{path}: expression is normalised to {target:g} counts, and that of the run to {reading.target_sum:g}. "
            "Write the shards anew with the --target-sum of then."
        )
