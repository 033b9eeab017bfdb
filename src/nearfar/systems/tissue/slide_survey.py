"""What slides hold before any picture is opened: spots that can be used, spots that cannot, and the genes to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from nearfar.data.cache import content_key
from nearfar.errors import NearfarError
from nearfar.systems.tissue.genes import GeneSums, common_genes, normalized, read_genes, variable_genes
from nearfar.systems.tissue.patches import Box
from nearfar.systems.tissue.shard_options import ShardOptions
from nearfar.systems.tissue.slide_folder import Rejected, SlideFolder
from nearfar.systems.tissue.slides import Slide, SlideCounts

__all__ = ["choose_genes", "survey", "usable"]

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
    return kept, [box for box, there in zip(boxes, inside.tolist(), strict=True) if there], side


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
        genes = read_genes(options.genes)
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
