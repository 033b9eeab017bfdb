"""Indexes of FAISS over unit vectors: flat or an inverted file, filled in blocks, searched, and compared whole."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import faiss

__all__ = ["Vectors", "build_index", "cells_for", "compare_all", "read_index", "search_index", "write_index"]

#: vectors that are copied into a new index: an array, or an index that gives them back
Vectors: TypeAlias = "np.ndarray | faiss.Index"

_BLOCK = 65_536  # rows that are copied at once
_PRODUCT = 16_384  # rows of one matrix product
_POINTS = 40  # rows for each cell, from which its centre is learned


# -- making --------------------------------------------------------------------------------------------------
def cells_for(rows: int) -> int:
    """Into how many cells an inverted file of so many rows is divided."""
    return max(1, min(int(4 * np.sqrt(rows)), rows // _POINTS))


def build_index(
    sources: Sequence[tuple[Vectors, int]], kept: Bool[np.ndarray, " n"], dim: int, cells: int | None
) -> faiss.Index:
    """An index of the rows that are ``kept`` of the ``sources``, vectors with their number, which follow each other.

    ``cells``: of an inverted file, whose centres are learned from a sample of these rows; None: a flat index.
    """
    import faiss

    flat = faiss.IndexFlatIP(dim)
    index: faiss.Index = flat
    if cells is not None:
        rows = int(kept.sum())
        index = faiss.IndexIVFFlat(flat, dim, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.niter, index.cp.seed, index.cp.max_points_per_centroid = 8, 1, _POINTS
        index.cp.min_points_per_centroid = 1
        wanted = np.sort(np.random.default_rng(0).choice(rows, min(rows, _POINTS * cells), replace=False))
        index.train(np.concatenate([*_blocks(sources, kept, wanted)]))
    for block in _blocks(sources, kept, None):
        index.add(block)
    return index


def _blocks(
    sources: Sequence[tuple[Vectors, int]], kept: Bool[np.ndarray, " n"], wanted: Int[np.ndarray, " k"] | None
) -> Iterator[Float32[np.ndarray, "rows d"]]:
    """The vectors of the rows that are kept, in order, by blocks; of ``wanted`` positions among these alone."""
    chosen = np.flatnonzero(kept)
    if wanted is not None:
        chosen = chosen[wanted]
    start = 0
    for vectors, n in sources:
        inside = chosen[(chosen >= start) & (chosen < start + n)] - start
        for begin in range(0, n, _BLOCK):
            some = inside[(inside >= begin) & (inside < begin + _BLOCK)] - begin
            if len(some):
                size = min(_BLOCK, n - begin)
                block = (
                    vectors[begin : begin + size]
                    if isinstance(vectors, np.ndarray)
                    else vectors.reconstruct_n(begin, size)
                )
                yield np.ascontiguousarray(np.asarray(block)[some], dtype=np.float32)
        start += n


# -- files ---------------------------------------------------------------------------------------------------
def write_index(index: faiss.Index, file: IO[bytes]) -> None:
    """Write an index to an open file."""
    faiss: Any = importlib.import_module("faiss")  # whose types are those of C++
    faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def read_index(
    path: Path, dim: int, rows: int, cells: bool, damaged: Callable[[str], NearfarError]
) -> faiss.Index:
    """An index of ``rows`` vectors of ``dim`` numbers, memory-mapped; ``cells``: it is an inverted file."""
    import faiss

    # each flag maps one kind of index; the wrong one reads it into memory
    flag = faiss.IO_FLAG_MMAP if cells else getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
    try:
        index = faiss.read_index(str(path), flag)
    except RuntimeError as error:
        raise damaged(f"{path.name} cannot be read ({str(error).splitlines()[0][:120]})") from None
    if index.d != dim or index.ntotal != rows or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise damaged(f"{path.name} does not hold the vectors that it should")
    return index


# -- searching -----------------------------------------------------------------------------------------------
def search_index(
    index: faiss.Index,
    vectors: Float[np.ndarray, "q d"],
    k: int,
    passing: Bool[np.ndarray, " n"] | None,
    cells: int | None,
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """Scores and positions (−1: none) of the nearest rows among those ``passing``, nearest first.

    ``cells``: how many of an inverted file are looked at; None of a flat index.
    """
    faiss: Any = importlib.import_module("faiss")
    options = {}
    if passing is not None:
        options["sel"] = faiss.IDSelectorBitmap(np.packbits(passing, bitorder="little"))
    parameters = faiss.SearchParameters(**options)
    if cells is not None:
        parameters = faiss.SearchParametersIVF(nprobe=cells, **options)
    return index.search(vectors, k, params=parameters)


def compare_all(
    index: faiss.Index, vectors: Float[np.ndarray, "q d"], k: int, passing: Bool[np.ndarray, " n"] | None
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """Scores and positions of the nearest rows in all cells: a matrix product for each block of cells."""
    faiss: Any = importlib.import_module("faiss")
    lists, best = faiss.downcast_index(index).invlists, faiss.ResultHeap(len(vectors), k, keep_max=True)
    ids: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    waiting = 0
    for cell in range(lists.nlist):
        size = int(lists.list_size(cell))
        if size:
            own = faiss.rev_swig_ptr(lists.get_ids(cell), size)
            codes = faiss.rev_swig_ptr(lists.get_codes(cell), size * index.d * 4)
            some = codes.view(np.float32).reshape(size, index.d)
            if passing is not None:
                own, some = own[passing[own]], some[passing[own]]
            ids.append(own)
            rows.append(some)
            waiting += len(own)
        if waiting and (waiting >= _PRODUCT or cell == lists.nlist - 1):
            positions = np.concatenate(ids)
            scores, at = faiss.knn(
                vectors, np.concatenate(rows), min(k, waiting), metric=faiss.METRIC_INNER_PRODUCT
            )
            best.add_result(scores, positions[at])
            ids, rows, waiting = [], [], 0
    best.finalize()
    return best.D, best.I
