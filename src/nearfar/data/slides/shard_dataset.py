"""Shards as a tissue: decoded once into memory-mapped arrays that are kept by content, then read from there."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nearfar.data.cache import content_key
from nearfar.data.mapped import mapped_arrays
from nearfar.data.slides.folder import SlideFolder
from nearfar.data.slides.image import decode_jpeg
from nearfar.data.slides.shard_index import (
    ArrayReader,
    ShardFile,
    ShardIndex,
    SlideEntry,
    read_index,
    samples,
)
from nearfar.data.slides.tissue import Tissue, normalized, spatial_neighbors, variable_genes
from nearfar.errors import NearfarError, nearest_name

__all__ = ["read_shards"]

_VERSION = 1  # of what is kept; part of the cache key
_ROWS = 256  # of expression normalised at a time
#: kind and shape of the arrays of a slide's table, of n spots with k neighbours each
_TABLE: dict[str, tuple[str | int, ...]] = {
    "ids": ("U", "n"),
    "positions": ("f", "n", 2),
    "neighbors": ("i", "n", "k"),
    "alpha": ("f", "n", "k"),
    "totals": ("f", "n"),
}


def read_shards(
    folder: str | Path,
    slides: Sequence[str] | None = None,
    *,
    genes: int | Sequence[str] | None = None,
    genes_of: Sequence[str] | None = None,
    neighbors: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tissue:
    """The spots of a folder of shards, expression as log1p.

    The first call reads the shards, compares each with its hash, decodes the patches and writes arrays to the cache
    (`nearfar.data.mapped`); later calls with the same slides and genes map those.

    Args:
        folder: what `nearfar data shards` wrote.
        slides: which of its slides; None takes all.
        genes: names of genes, or how many, the most variable within ``genes_of``; None takes all that are stored.
        genes_of: training slides. Needed where ``genes`` is a number: genes chosen with test slides would leak.
        neighbors: nearest spots of each; None takes those that the shards state, a different number computes them.
        progress: called with the number of spots of each shard that was read.

    Raises:
        NearfarError: no finished shards, a slide or gene that is not there, a damaged shard (which one).
    """
    index = read_index(folder)
    names = [slide.name for slide in index.slides] if slides is None else list(dict.fromkeys(slides))
    entries = sorted((index.entry(name) for name in names), key=lambda entry: entry.name)
    if not entries:
        raise NearfarError(f"{folder}: spots of no slide are asked for; name one or more slides.")
    tables = [_table(index, entry) for entry in entries]
    columns = _columns(index, genes, genes_of)
    chosen = [index.genes[column] for column in columns.tolist()]
    key = [_VERSION, index.content, [entry.name for entry in entries], chosen]
    n, pixels = sum(entry.spots for entry in entries), index.patch["pixels"]
    layout = {"patches": ((n, pixels, pixels, 3), np.uint8), "expression": ((n, len(chosen)), np.float32)}
    totals = np.concatenate([table["totals"] for table in tables])
    _check_sizes(index, entries)
    arrays = mapped_arrays(
        "tissue", key, layout, lambda into: _decode_all(index, entries, columns, totals, into, progress)
    )
    k = neighbors or index.neighbors["k"]
    if k != index.neighbors["k"]:
        for table in tables:
            table["neighbors"], table["alpha"] = spatial_neighbors(table["positions"], k)
    first = np.cumsum([0, *(entry.spots for entry in entries)]).tolist()
    near = [
        np.where(table["neighbors"] >= 0, table["neighbors"] + start, -1)
        for table, start in zip(tables, first, strict=False)
    ]
    return Tissue(
        ids=[
            f"{entry.name}/{spot}"
            for entry, table in zip(entries, tables, strict=True)
            for spot in table["ids"].tolist()
        ],
        slides=np.repeat(np.arange(len(entries)), [entry.spots for entry in entries]),
        slide_names=[entry.name for entry in entries],
        positions=np.concatenate([table["positions"] for table in tables]),
        neighbors=np.concatenate(near),
        alpha=np.concatenate([table["alpha"] for table in tables]),
        genes=chosen,
        patients=[entry.patient for entry in entries],
        totals=totals,
        content=content_key(key, k),
        expression=arrays["expression"],
        patches=arrays["patches"],
    )


def _columns(
    index: ShardIndex, genes: int | Sequence[str] | None, genes_of: Sequence[str] | None
) -> np.ndarray:
    """Columns of the chosen genes, in the order of ``genes``."""
    place = {gene: at for at, gene in enumerate(index.genes)}
    if genes is None:
        return np.arange(len(index.genes))
    if isinstance(genes, int):
        if not genes_of:
            raise NearfarError(
                f"{genes} variable genes are asked for; say of which training slides (genes_of)."
            )
        folder, sums = SlideFolder(index.folder), {}
        for name in genes_of:
            read = folder.read_sums(index.entry(name).name)
            if read is None:
                raise NearfarError(
                    f"{index.folder}/slides lacks the sums of slide {name}. Write the shards anew."
                )
            sums[name] = read[0]
        genes = variable_genes(sums, genes, index.genes)
    for gene in genes:
        if gene not in place:
            raise NearfarError(f"{index.folder} has no gene {gene!r}; {nearest_name(gene, place)}")
    return np.array([place[gene] for gene in genes])


def _table(index: ShardIndex, entry: SlideEntry) -> dict[str, np.ndarray]:
    """What a slide's table says of its spots."""
    path = index.folder / entry.table.name
    data = _checked(index, entry.table)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            # WriteResult as they are: what is packed could be of any size once it is unpacked.
            if any(member.file_size > len(data) for member in members.infolist()):
                raise ValueError("a part claims to be larger than the file")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            table = {name: arrays[name] for name in _TABLE}
        for name, (kind, *shape) in _TABLE.items():
            wanted = tuple(
                {"n": entry.spots, "k": index.neighbors["k"]}.get(str(side), side) for side in shape
            )
            if table[name].dtype.kind != kind or table[name].shape != wanted:
                raise ValueError(
                    f"{name} is {table[name].dtype} {table[name].shape} where {wanted} is needed"
                )
            if kind == "f" and not np.isfinite(table[name]).all():
                raise ValueError(f"{name} holds what is no number")
        near = table["neighbors"]
        if near.size and (near.min() < -1 or near.max() >= entry.spots):
            raise ValueError("a neighbour is no spot of the slide")
    except Exception as error:  # zipfile, zlib and numpy raise whatever the damage leads to
        raise NearfarError(f"{path} cannot be read: {error}. Write the shards anew.") from None
    return table


def _checked(index: ShardIndex, file: ShardFile) -> bytes:
    """The bytes of a file, if they are those that were written."""
    path = index.folder / file.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NearfarError(f"{path} cannot be read: {error}.") from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise NearfarError(
            f"{path} is not what was written: its hash differs. Copy it again, or write it anew."
        )
    return data


def _check_sizes(index: ShardIndex, entries: Sequence[SlideEntry]) -> None:
    """Nothing is reserved for arrays, and no file is read, of a size that the samples cannot have."""
    pixels, genes = index.patch["pixels"], len(index.genes)
    most = 4 * pixels**2 + 8 * genes + 2**16 + 512 * index.neighbors["k"]  # of a sample, with room to spare
    for entry in entries:
        for shard in entry.shards:
            # Three members of two blocks at least; what flat colour takes as jpg is a 400th of its pixels.
            least = shard.samples * max(6 * 512, 3 * pixels**2 // 1000)
            if not least <= shard.bytes <= shard.samples * most + 2**16:
                raise NearfarError(
                    f"{index.folder / shard.name} has {shard.bytes:,} bytes, which {shard.samples} samples of {pixels} "
                    f"× {pixels} pixels and {genes} genes cannot have. Write the shards anew."
                )


def _decode_all(
    index: ShardIndex,
    entries: Sequence[SlideEntry],
    columns: np.ndarray,
    totals: np.ndarray,
    into: dict[str, np.ndarray],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Decode the shards of some slides into the arrays ``patches`` and ``expression``, several at a time."""
    jobs, at = [], 0
    for entry in entries:
        for shard in entry.shards:
            jobs.append((shard, slice(at, at + shard.samples)))
            at += shard.samples
    use = None if np.array_equal(columns, np.arange(len(index.genes))) else columns

    def work(job: tuple[ShardFile, slice]) -> int:
        shard, rows = job
        _decode(index, shard, use, totals[rows], into["patches"][rows], into["expression"][rows])
        return shard.samples

    # Hashing and decoding let go of the interpreter's lock, so that threads use several cores.
    with ThreadPoolExecutor(max(1, min(len(jobs), os.cpu_count() or 1, 8))) as pool:
        for count in pool.map(work, jobs):
            if progress is not None:
                progress(count)


def _decode(
    index: ShardIndex,
    shard: ShardFile,
    columns: np.ndarray | None,
    totals: np.ndarray,
    patches: np.ndarray,
    expression: np.ndarray,
) -> None:
    path = index.folder / shard.name
    read, row, key = ArrayReader((len(index.genes),)), 0, "(the first)"
    data = memoryview(_checked(index, shard))
    try:
        for name, parts in samples(data, str(path)):
            key = name
            if row == shard.samples:
                raise ValueError(f"the index knows of {row} samples")
            decode_jpeg(parts["jpg"], patches[row])
            values = read(parts["npy"])
            if not np.isfinite(values).all():
                raise ValueError("expression holds what is no number")
            expression[row] = values if columns is None else values[columns]
            row += 1
    except (
        KeyError,
        ValueError,
        TypeError,
        OSError,
        IndexError,
        SyntaxError,
        RecursionError,
        MemoryError,
    ) as error:
        if isinstance(error, NearfarError):
            raise
        raise NearfarError(f"{path}: sample {key} cannot be read ({error}). Write the shards anew.") from None
    if row != shard.samples:
        raise NearfarError(f"{path} holds {row} samples and not {shard.samples}. Write the shards anew.")
    if index.expression["values"] == "counts":
        for start in range(0, row, _ROWS):
            part = slice(start, start + _ROWS)
            expression[part] = normalized(expression[part], totals[part], index.expression["target_sum"])
