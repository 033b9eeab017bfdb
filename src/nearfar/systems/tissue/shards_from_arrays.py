"""A tissue that is in memory as shards, such as a generated one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nearfar.data.cache import content_key
from nearfar.errors import NearfarError
from nearfar.systems.tissue.genes import GeneSums, normalized
from nearfar.systems.tissue.records import Tissue, neighbor_scale
from nearfar.systems.tissue.shard_index import ShardIndex
from nearfar.systems.tissue.slide_folder import SlideFolder, Spots
from nearfar.systems.tissue.slide_image import codec
from nearfar.systems.tissue.slide_splits import check_splits, write_split_files

__all__ = ["write_tissue"]

_VERSION = 1  # part of every slide's key


def write_tissue(
    tissue: Tissue,
    output: str | Path,
    splits: Mapping[str, Sequence[str]] | None = None,
    *,
    quality: int = 90,
    target_sum: float = 1e4,
    spots_per_shard: int = 4096,
) -> ShardIndex:
    """Write a tissue that is in memory as shards; without ``splits`` all its slides train.

    Patches lose a little, as jpg does; everything else is kept. ``target_sum`` states how "log1p" expression was
    normalised, or is to be. Returns the index.
    """
    folder = SlideFolder(Path(output))
    folder.prepare(list(tissue.slide_names))
    divided = {name: list(slides) for name, slides in (splits or {"train": tissue.slide_names}).items()}
    check_splits(divided, list(tissue.slide_names))
    if tissue.patches.shape[1] != tissue.patches.shape[2]:
        raise NearfarError(f"patches of {tissue.patches.shape[1:3]} pixels: squares are needed.")
    entries = []
    for at, name in enumerate(tissue.slide_names):
        rows = tissue.rows_of(at)
        first = int(rows[0]) if len(rows) else 0
        patches, near = tissue.patches[rows], tissue.neighbors[rows]
        expression = np.asarray(tissue.expression[rows])
        totals = expression.sum(1) if tissue.totals is None else tissue.totals[rows]
        key = content_key("tissue", _VERSION, tissue.content, name, quality, spots_per_shard, codec())
        entry = folder.finished(name, key)
        if entry is None:
            spots = Spots(
                slide=name,
                patient=name if tissue.patients is None else tissue.patients[at],
                names=[tissue.ids[row] for row in rows.tolist()],
                positions=tissue.positions[rows],
                neighbors=np.where(near >= 0, near - first, -1),
                alpha=tissue.alpha[rows],
                expression=expression,
                totals=totals,
                sigma=neighbor_scale(tissue.positions[rows], tissue.neighbors.shape[1]),
            )
            values = normalized(expression, totals, target_sum) if tissue.values == "counts" else expression
            folder.write_sums(name, key, GeneSums.of(values, tissue.genes), [])
            entry = folder.write(spots, patches.__getitem__, quality, spots_per_shard, key)
        entries.append(entry)
    index = ShardIndex(
        folder.path,
        list(tissue.genes),
        {"values": tissue.values, "target_sum": target_sum, "genes": "as in the tissue that was written"},
        {"pixels": tissue.patches.shape[1], "field": "not known", "jpg_quality": quality, "encoder": codec()},
        {"k": tissue.neighbors.shape[1], "rule": "as in the tissue that was written"},
        entries,
    )
    write_split_files(folder.path, divided)
    folder.write_rejected({})
    index.write(divided)
    return index
