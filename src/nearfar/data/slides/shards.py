"""Slides into WebDataset shards: a sample for each spot, the same bytes for the same input, resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from nearfar.data.cache import content_key
from nearfar.data.files import Json, read_names
from nearfar.data.rejections import Rejections
from nearfar.data.slides.folder import Rejected, SlideFolder, Spots
from nearfar.data.slides.image import Box, codec
from nearfar.data.slides.shard_index import ShardIndex, SlideEntry
from nearfar.data.slides.slide import Slide, SlideCounts, find_slides
from nearfar.data.slides.splits import (
    check_splits,
    draw_splits,
    patients_of,
    read_split_files,
    write_split_files,
)
from nearfar.data.slides.tissue import (
    RULE,
    GeneSums,
    Values,
    common_genes,
    neighbor_scale,
    normalized,
    spatial_neighbors,
    variable_genes,
)
from nearfar.errors import NearfarError

__all__ = ["ShardOptions", "Watch", "WriteResult", "choose_genes", "survey", "usable", "write_shards"]


@dataclass(frozen=True)
class ShardOptions:
    """How slides become shards.

    Attributes:
        patch: side of the square that is cut around a spot, in pixels of the source.
        patch_um: the same in micrometres, instead of ``patch``; slides must say how large a pixel is.
        pixels: side of the stored patch; None: as it was cut (224 with ``patch_um``).
        quality: of the jpg, 1 to 100.
        genes: how many genes, the most variable within the training slides; or a file that names them; None: all that
            every slide has.
        values: "log1p": normalised, ready for training; "counts": as measured, for readers that choose genes and
            normalise for themselves (leaving slides out in turn).
        target_sum: counts of a spot after normalisation.
        min_counts: spots with fewer counts are rejected.
        neighbors: nearest spots of the same slide that are written to each.
        spots_per_shard: largest number of samples in a tar file.
        val, test, val_fraction, test_fraction, split_by, seed: see `slide_splits.draw_splits`; without any of them the
            ``*_samples.txt`` of the source are taken, and without those all slides train.
        patients: see `slide_splits.patients_of`.

    Raises:
        NearfarError: a value out of its range, or two that contradict each other.
    """

    patch: int = 224
    patch_um: float | None = None
    pixels: int | None = None
    quality: int = 90
    genes: int | Path | None = 2000
    values: Values = "log1p"
    target_sum: float = 1e4
    min_counts: int = 10
    neighbors: int = 6
    spots_per_shard: int = 4096
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    val_fraction: float = 0.0
    test_fraction: float = 0.0
    split_by: Literal["slide", "patient"] = "slide"
    seed: int = 0
    patients: str | None = None

    def __post_init__(self) -> None:
        for name in ("patch", "neighbors", "spots_per_shard", "min_counts"):
            if getattr(self, name) < 1:
                raise NearfarError(f"{name}={getattr(self, name)}: 1 or more is needed.")
        if self.patch_um is not None and not self.patch_um > 0:
            raise NearfarError(f"patch_um={self.patch_um}: a side of more than 0 micrometres is needed.")
        if isinstance(self.genes, int) and self.genes < 1:
            raise NearfarError(f"genes={self.genes}: at least one gene is needed.")
        if not 1 <= self.quality <= 100:
            raise NearfarError(f"quality={self.quality}: 1 to 100 is needed; 90 is usual.")
        if not self.target_sum > 0:
            raise NearfarError(f"target_sum={self.target_sum}: more than 0 is needed; 10000 is usual.")
        if self.values not in ("log1p", "counts"):
            raise NearfarError(f"values={self.values!r}; it is 'log1p' or 'counts'.")
        if self.split_by not in ("slide", "patient"):
            raise NearfarError(f"split_by={self.split_by!r}; it is 'slide' or 'patient'.")
        if self.stored < 8:
            raise NearfarError(f"pixels={self.stored}: a patch of 8 pixels or more is needed.")
        if self.patch_um is None and self.stored > self.patch:
            raise NearfarError(
                f"pixels={self.stored} is more than is cut (patch={self.patch}): that adds no detail. Lower pixels."
            )

    @property
    def stored(self) -> int:
        """Side of the stored patch."""
        return self.pixels or (self.patch if self.patch_um is None else 224)

    @property
    def splits_given(self) -> bool:
        """Whether these options state splits."""
        return bool(self.val or self.test or self.val_fraction or self.test_fraction)

    def field(self, name: str, pixel_size: float | None) -> int:
        """Side of what is cut from a slide, in its pixels."""
        if self.patch_um is None:
            return self.patch
        if pixel_size is None:
            raise NearfarError(
                f"slide {name} does not say how large a pixel is: give patch= in pixels, not patch_um=."
            )
        side = round(self.patch_um / pixel_size)
        if side < self.stored:
            raise NearfarError(
                f"slide {name}: {self.patch_um:g} µm are {side} pixels of {pixel_size:.3g} µm, fewer than pixels="
                f"{self.stored}: lower pixels, or raise patch_um."
            )
        return side

    def of_patches(self) -> Json:
        """What decides which spots can be used and what their patches are."""
        wanted = ("patch", "patch_um", "min_counts")
        return {name: value for name, value in asdict(self).items() if name in wanted}

    def of_samples(self) -> Json:
        """What else decides the bytes of the shards, the genes apart."""
        wanted = ("quality", "values", "target_sum", "neighbors", "spots_per_shard")
        return self.of_patches() | {"pixels": self.stored} | {name: getattr(self, name) for name in wanted}


_VERSION = 2  # of the sums; part of their key


def survey(
    folder: SlideFolder,
    slides: Mapping[str, Slide],
    hashes: Mapping[str, list[str]],
    options: ShardOptions,
    watch: Callable[[str, int, int], None],
) -> tuple[dict[str, GeneSums], dict[str, Rejected]]:
    """For each slide the sums of its genes over the spots that can be used, and the spots that cannot."""
    sums, rejected = {}, {}
    for at, (name, slide) in enumerate(slides.items()):
        watch("counts", at, len(slides))
        key = content_key("sums", _VERSION, hashes[name], options.of_patches(), options.target_sum)
        read = folder.read_sums(name, key)
        if read is None:
            counts, _, _ = usable(slide, options)
            read = _sums(counts, options.target_sum), counts.rejected
            folder.write_sums(name, key, *read)
        sums[name], rejected[name] = read
    watch("counts", len(slides), len(slides))
    return sums, rejected


def usable(slide: Slide, options: ShardOptions) -> tuple[SlideCounts, list[Box], int]:
    """The spots of a slide that have counts and a picture, what is cut around each, and its side."""
    counts = slide.read_counts()
    totals = counts.totals()
    enough = totals >= options.min_counts
    reason = f"fewer than {options.min_counts} counts"
    counts = counts.keep(enough, reason, [f"{total:g} counts" for total in totals.tolist()])
    side = options.field(slide.name, counts.pixel_size)
    boxes = slide.boxes(counts, side)
    inside, details = slide.check_boxes(counts, boxes)
    kept = counts.keep(inside, "no picture", details)
    return kept, [box for box, is_inside in zip(boxes, inside.tolist(), strict=True) if is_inside], side


def _sums(counts: SlideCounts, target_sum: float) -> GeneSums:
    """Sums over a slide, some spots at a time: dense, a Visium slide has 300 MB."""
    genes = sorted(set(counts.genes))
    totals, n = counts.totals(), len(counts.spots)
    total, squares = np.zeros(len(genes)), np.zeros(len(genes))
    for start in range(0, n, 256):
        rows = np.arange(start, min(start + 256, n))
        part = SlideCounts([""] * len(rows), counts.positions[rows], counts.genes, counts.counts[rows])
        own = GeneSums.of(normalized(part.columns(genes), totals[rows], target_sum), genes)
        total, squares = total + own.total, squares + own.squares
    return GeneSums(genes, n, total, squares)


def choose_genes(
    sums: Mapping[str, GeneSums], train: Sequence[str], options: ShardOptions
) -> tuple[list[str], str]:
    """The genes of the shards, and how they were chosen."""
    common = common_genes({name: slide.genes for name, slide in sums.items()})
    if options.genes is None:
        return common, f"all {len(common)} that every slide has"
    if isinstance(options.genes, Path):
        genes = read_names(options.genes, "gene")
        missing = sorted(set(genes) - set(common))
        if missing:
            raise NearfarError(
                f"{options.genes}: {len(missing)} of {len(genes)} genes are not in every slide, first "
                f"{', '.join(missing[:5])}."
            )
        return genes, f"as listed in {options.genes.name}"
    genes = variable_genes({name: sums[name] for name in train}, options.genes, common)
    return genes, (
        f"{len(genes)} of {len(common)} that every slide has, of the largest variance of log1p expression within the "
        f"{len(train)} training slides"
    )


VERSION = 2  # of what a slide is made into; part of every slide's key
#: progress: "counts" with the slides read and all slides, then "shards" with the spots written and all spots
Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class WriteResult:
    """The result of writing: the index, which slides were written and which were kept, and rejected spots."""

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
) -> WriteResult:
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
    stated: dict[str, str | None] = {name: slide.patient() for name, slide in slides.items()}
    patients = patients_of(stated, options.patients)
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
            progress = partial(_report_progress, watch, done, total)
            entry = _write_slide(folder, slides[name], patients[name], genes, options, key, progress)
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
    return WriteResult(index, splits, written, kept, dropped, _tally(rejected), remarks)


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
    listed = {} if options.splits_given else read_split_files(source)
    if listed:
        check_splits(listed, slides, patients if options.split_by == "patient" else None, str(source))
        if not listed.get("train"):
            raise NearfarError(f"{source}/train_samples.txt lists no slide to train on.")
        return {name: listed.get(name, []) for name in ("train", "val", "test")}
    return draw_splits(
        slides,
        patients,
        val=options.val,
        test=options.test,
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        by=options.split_by,
        seed=options.seed,
    )


def _report_progress(watch: Watch, before: int, total: int, spots: int) -> None:
    watch("shards", before + spots, total)


def _by_reason(rejected: Rejected) -> dict[str, int]:
    counts: dict[str, int] = {}
    for _, reason, _ in rejected:
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def _tally(rejected: Mapping[str, Rejected]) -> Rejections:
    rejections = Rejections()
    for slide, spots in rejected.items():
        for spot, reason, detail in spots:
            rejections.add(reason, value=f"{slide}/{spot}", detail=detail)
    return rejections


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
