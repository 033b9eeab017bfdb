"""Slides into WebDataset shards: a sample for each spot, the same bytes for the same input, going on where it stopped.

A folder of shards has ``SLIDE-0000.tar`` …, ``index.json``, ``train_samples.txt``, ``val_samples.txt``,
``test_samples.txt``, ``rejected.tsv`` (every spot that was left out) and ``slides/`` with what each slide says of
itself: the entry that makes it finished, and sums of its genes, from which variable genes of any slides are chosen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from nearfar.data.cache import content_key
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError
from nearfar.systems.tissue.genes import normalized
from nearfar.systems.tissue.neighborhood import RULE, neighbor_scale, spatial_neighbors
from nearfar.systems.tissue.patches import codec
from nearfar.systems.tissue.shard_index import ShardIndex, SlideEntry
from nearfar.systems.tissue.shard_options import ShardOptions
from nearfar.systems.tissue.slide_folder import Rejected, SlideFolder, Spots
from nearfar.systems.tissue.slide_splits import (
    check_splits,
    divide,
    patients_of,
    read_split_files,
    write_split_files,
)
from nearfar.systems.tissue.slide_survey import choose_genes, survey, usable
from nearfar.systems.tissue.slides import Slide, find_slides

__all__ = ["Watch", "Written", "write_shards"]

VERSION = 2  # of what a slide is made into; part of every slide's key
#: told of progress: "counts" and slides that were read of all slides, "shards" and spots that were written of all spots
Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Written:
    """What came of writing: the index, which slides were written and which were there, and rejected spots."""

    index: ShardIndex
    splits: dict[str, list[str]]
    written: list[str]
    kept: list[str]
    dropped: list[str]
    rejections: Rejections
    remarks: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A few lines for a terminal."""
        slides = self.index.slides
        spots, files = sum(s.spots for s in slides), sum(len(s.shards) for s in slides)
        size = sum(f.bytes for s in slides for f in s.shards) / 1e6
        pixels = self.index.patch["pixels"]
        lines = [
            f"{spots:,} spots of {len(slides)} slide(s) in {files} shard(s), {size:,.1f} MB: patches of "
            f"{pixels} × {pixels} pixels, {len(self.index.genes):,} genes",
            f"written: {', '.join(self.written) or 'nothing'}; kept as they were: {', '.join(self.kept) or 'none'}",
            "; ".join(f"{name}: {len(names)} slide(s)" for name, names in self.splits.items()),
        ]
        if len(self.rejections):
            lines.append(self.rejections.summary() + "; all of them are in rejected.tsv")
        lines += [f"slide {name} has no usable spot and is left out" for name in self.dropped]
        return "\n".join([*lines, *self.remarks])


def write_shards(
    source: str | Path, output: str | Path, options: ShardOptions | None = None, watch: Watch | None = None
) -> Written:
    """Write the slides of a folder as shards.

    Slides that were finished by an earlier call with the same files and options are kept, all others are written anew.
    One slide's picture is in memory at a time.

    Raises:
        NearfarError: an unknown layout, broken files, a slide or patient in two splits, no usable spot, an ``output``
            that holds shards of other slides.
    """
    options, watch = options or ShardOptions(), watch or (lambda *_: None)
    slides = {slide.name: slide for slide in find_slides(source)}
    folder = SlideFolder(Path(output))
    folder.prepare(list(slides))
    said: dict[str, str | None] = {name: slide.patient() for name, slide in slides.items()}
    patients = patients_of(said, options.patients)
    hashes = {name: [_sha256(path) for path in slide.files()] for name, slide in slides.items()}
    sums, rejected = survey(folder, slides, hashes, options, watch)
    dropped = [name for name, slide in sums.items() if not slide.spots]
    for name in dropped:
        folder.discard(name)
        del sums[name]
    if not sums:
        why = _tally(rejected)
        raise NearfarError(
            f"{source}: of {len(slides)} slides none has a spot that can be used: "
            f"{why.summary() if len(why) else 'their files hold no spots'}."
        )
    splits = _splits(Path(source), list(sums), patients, options)
    genes, how = choose_genes(sums, splits["train"], options)
    expression = {"values": options.values, "target_sum": options.target_sum, "genes": how}
    written: list[str] = []
    kept: list[str] = []
    entries = []
    done, total = 0, sum(slide.spots for slide in sums.values())
    for name in sums:
        parts = [VERSION, hashes[name], options.of_samples(), genes, patients[name], codec()]
        key = content_key("shards", *parts)
        entry = folder.finished(name, key)
        (written if entry is None else kept).append(name)
        if entry is None:
            told = partial(_told, watch, done, total)
            entry = _write_slide(folder, slides[name], patients[name], genes, options, key, told)
        done += entry.spots
        watch("shards", done, total)
        entries.append(entry)
    patch = {
        "pixels": options.stored,
        "field": f"{options.patch} pixels"
        if options.patch_um is None
        else f"{options.patch_um:g} micrometres",
        "jpg_quality": options.quality,
        "encoder": codec(),
    }
    index = ShardIndex(folder.path, genes, expression, patch, {"k": options.neighbors, "rule": RULE}, entries)
    write_split_files(folder.path, splits)
    folder.write_rejected(rejected)
    index.write(splits)
    remarks = [f"slide {name}: {remark}" for name in sums for remark in slides[name].remarks()]
    return Written(index, splits, written, kept, dropped, _tally(rejected), remarks)


def _write_slide(
    folder: SlideFolder,
    slide: Slide,
    patient: str,
    genes: list[str],
    options: ShardOptions,
    key: str,
    watch: Callable[[int], None],
) -> SlideEntry:
    counts, boxes, side = usable(slide, options)
    totals = counts.totals()
    expression = counts.columns(genes)
    if options.values == "log1p":
        expression = normalized(expression, totals, options.target_sum)
    elif expression.max(initial=0) < 2**16 and (expression == np.round(expression)).all():
        expression = expression.astype(np.uint16)
    neighbors, alpha = spatial_neighbors(counts.positions, options.neighbors)
    sigma = neighbor_scale(counts.positions, options.neighbors)
    spots = Spots(
        slide.name, patient, counts.spots, counts.positions, neighbors, alpha, expression, totals, sigma,
        counts.pixel_size, side, _by_reason(counts.rejected),
    )  # fmt: skip
    with slide.open_pictures() as pictures:

        def patch(row: int) -> np.ndarray:
            watch(row)
            return pictures.patch(counts.spots[row], boxes[row], options.stored)

        return folder.write(spots, patch, options.quality, options.spots_per_shard, key)


def _splits(
    source: Path, slides: list[str], patients: Mapping[str, str], options: ShardOptions
) -> dict[str, list[str]]:
    found = {} if options.splits_given else read_split_files(source)
    if found:
        check_splits(found, slides, patients if options.split_by == "patient" else None, str(source))
        if not found.get("train"):
            raise NearfarError(f"{source}/train_samples.txt lists no slide to train on.")
        return {name: found.get(name, []) for name in ("train", "val", "test")}
    return divide(
        slides,
        patients,
        val=options.val,
        test=options.test,
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        by=options.split_by,
        seed=options.seed,
    )


def _told(watch: Watch, before: int, total: int, spots: int) -> None:
    watch("shards", before + spots, total)


def _by_reason(rejected: Rejected) -> dict[str, int]:
    found: dict[str, int] = {}
    for _, reason, _ in rejected:
        found[reason] = found.get(reason, 0) + 1
    return found


def _tally(rejected: Mapping[str, Rejected]) -> Rejections:
    found = Rejections()
    for slide, spots in rejected.items():
        for spot, reason, detail in spots:
            found.add(reason, value=f"{slide}/{spot}", detail=detail)
    return found


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
