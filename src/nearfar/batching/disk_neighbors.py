"""The nearest neighbours of more items than memory holds: an index on disk, built and searched a stretch at a time."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
from numpy.typing import NDArray

from nearfar.arguments import choice, number, whole_number
from nearfar.batching.base import as_ids, digest
from nearfar.batching.mapped_neighbors import HEAD, MappedNeighbors, as_folder, open_refined, padded
from nearfar.batching.neighbors import _MARGIN, SearchResult, _recall, _without_self
from nearfar.data.vector_shards import VectorShards
from nearfar.data.writing import make_folder, write_json
from nearfar.errors import NearfarError
from nearfar.ids import Ids

__all__ = ["nearest_neighbors_on_disk"]

log = logging.getLogger("nearfar.batching")

_CELL = 1000  # rows of a cell: the work of a query does not grow with the number of items
_POINTS = 64  # rows of the sample for each cell
_SAMPLE_BYTES = 2 << 30
_PIECE_BYTES = 256 << 20  # float32 rows in memory at once
_STRETCH = 65_536  # queries that are searched, and recorded as done, together
_QUERIES = 8192  # of one search: bounds the candidates
_MEASURED = 500  # queries of each of the two samples
_FLAT_CELLS = 8192  # beyond, the cell of a row is looked up in a graph of centres
_REFINE, _MOST_REFINE = 2, 32  # candidates for each neighbour that are compared exactly
_FIRST_PROBES = 4
_WORK = "unfinished"


def nearest_neighbors_on_disk(
    vectors: object,
    k: int,
    folder: str | Path,
    *,
    metric: str = "cosine",
    min_recall: float = 0.95,
    processes: int = 1,
    seed: int = 0,
    ids: Ids | None = None,
) -> MappedNeighbors:
    """The ``k`` nearest neighbours of every row of ``vectors`` among the others, for 10⁵ to 10⁸ rows, in files.

    ``vectors`` are ``.npy`` shards (float16 or float32, mapped), a folder of them, or an array (n, d). Cells of about
    1,000 rows are learned on a sample. Processes add shards to copies of the index, FAISS merges them on disk, and
    vectors are put in the order of the cells. A query looks into its nearest cells by 4-bit product codes, and the best
    4 k are compared exactly (float16). Cells are added until the recall, measured against all pairs on 500 queries,
    lies two standard errors above ``min_recall``; the ``recall`` that is stated comes from 500 others. Where it cannot
    be reached, a warning says what was.

    Memory: about 40 bytes for each row and process, a sample of at most 2 GB, and stretches; disk: 2 d + 6 k + d / 4
    bytes for each row, and d / 4 + 8 more while it is built. Threads are FAISS's (``OMP_NUM_THREADS``). A call that was
    stopped goes on where it was when it is repeated; with finished lists in the folder, it is refused.

    Errors: rows that are not finite, of zeros (cosine), or beyond float16; too few rows; no room on the disk.

    >>> import tempfile
    >>> rng = np.random.default_rng(0)
    >>> points = rng.standard_normal((20, 16))[rng.integers(20, size=1000)] + 0.3 * rng.standard_normal((1000, 16))
    >>> near = nearest_neighbors_on_disk(points, 10, tempfile.mkdtemp())
    >>> near.n, near.k, near.recall > 0.95, near.indices[[0]].shape
    (1000, 10, True, (1, 10))
    """
    choice("metric", metric, ("cosine", "dot"))
    min_recall = number("min_recall", min_recall, above=0, most=1)
    processes, seed = whole_number("processes", processes, 1), whole_number("seed", seed, 0)
    source = VectorShards.of(vectors)
    k = whole_number("k", k, 1)
    if k > source.n - 1:
        raise NearfarError(
            f"k={k} neighbours were asked for, but each of {source.n} items has only {source.n - 1} others"
        )
    if source.n > np.iinfo(np.int32).max:
        raise NearfarError(f"{source.n} items do not fit the 32-bit positions of a plan")
    if processes > 1 and source.held is not None:
        raise NearfarError(
            f"processes={processes} read shards by themselves, and an array was given: write it with numpy.save and "
            "give the file"
        )
    names = None if ids is None else as_ids(ids, source.n)
    build = _Build(source, k, as_folder(folder), metric, min_recall, processes, seed)
    with build.clock("train"):
        build.train()
    with build.clock("add"):
        build.add()
    with build.clock("sort"):
        build.sort()
    with build.clock("measure"):
        probes, refine, recall, queries = build.tune()
    with build.clock("search"):
        build.search(probes, refine)
    build.finish(probes, refine, recall, queries, names)
    return MappedNeighbors(build.folder)


class _Build:
    """The steps, each of which leaves files and is passed over where they are there."""

    def __init__(
        self,
        source: VectorShards,
        k: int,
        folder: Path,
        metric: str,
        min_recall: float,
        processes: int,
        seed: int,
    ) -> None:
        self.source, self.k, self.folder, self.metric = source, k, folder, metric
        self.min_recall, self.processes, self.seed = min_recall, processes, seed
        self.work = folder / _WORK
        self.width = -(-source.dim // 4) * 4
        self.piece = max(1, _PIECE_BYTES // (4 * self.width))
        self.cells = max(1, round(source.n / _CELL))
        make_folder(folder)
        if (folder / HEAD).exists():
            raise NearfarError(
                f"{folder} holds neighbours already: open them with MappedNeighbors, or name a new folder"
            )
        some = np.unique(np.linspace(0, source.n - 1, 256).astype(np.int64))
        key = {
            "n": source.n, "k": k, "metric": metric, "min_recall": min_recall, "seed": seed, "version": 1,
            "vectors": digest(source.take(some)),
        }  # fmt: skip
        known = self._read("key.json")
        if known != key:
            if any(folder.iterdir()) and not self.work.is_dir():
                raise NearfarError(
                    f"{folder} holds something else than neighbours; name a new folder, which is made"
                )
            shutil.rmtree(self.work, ignore_errors=True)
            make_folder(self.work)
            write_json(self.work / "key.json", key)
        self.seconds: dict[str, float] = self._read("seconds.json") or {}
        need = source.n * (2 * self.width + 6 * k + self.width // 2 + 24)
        there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(folder).free + there
        if need > free:
            raise NearfarError(
                f"{folder}: about {need / 1e9:.1f} GB are needed on disk, and {free / 1e9:.1f} GB are free; name "
                "a folder with more room, or ask for a smaller k"
            )

    def _read(self, name: str) -> Any:
        path = self.work / name
        return json.loads(path.read_text()) if path.is_file() else None

    @contextmanager
    def clock(self, step: str) -> Iterator[None]:
        """Seconds of a step, over all tries."""
        began = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - began
        write_json(self.work / "seconds.json", self.seconds)
        log.info("%s: %.1f s", step, self.seconds[step])

    def train(self) -> None:
        """Centres of cells and the codebook, on a sample; near cells have near numbers."""
        path = self.work / "template.faiss"
        if path.is_file():
            return
        n, width = self.source.n, self.width
        size = min(n, max(_POINTS * self.cells, 1 << 14), _SAMPLE_BYTES // (4 * width))
        rows = np.sort(np.random.default_rng(self.seed).choice(n, size, replace=False))
        sample = _rows(self.source.take(rows), rows, width, self.metric)
        centres = _centres(sample, self.cells, self.metric == "cosine", self.seed)
        flat: Any
        if len(centres) <= _FLAT_CELLS:
            flat = faiss.IndexFlatIP(width)
        else:
            flat = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
            flat.hnsw.efConstruction, flat.hnsw.efSearch = 80, 64
        flat.add(centres)
        parts = max(m for m in range(1, min(width // 2, 64) + 1) if width % m == 0)
        index = faiss.IndexIVFPQ(flat, width, len(centres), parts, 4, faiss.METRIC_INNER_PRODUCT)
        index.by_residual = False
        index.pq.cp.seed, index.pq.cp.min_points_per_centroid = 1 + self.seed % 2**31, 1
        some = sample[:: max(1, len(sample) // 32_768)]
        index.train(
            np.resize(some, (max(len(some), 16), width))
        )  # a codebook has 16 entries, whatever there is
        _write_index(index, path)

    def add(self) -> None:
        """Codes of every row: shards by processes, merged on disk; then the index in the order of its cells."""
        if (self.work / "codes.faiss").is_file():
            return
        tasks = [
            (self.source, self.work, at, span, self.metric)
            for at, span in enumerate(self.source.pieces(self.piece))
        ]
        _in_processes(_add_piece, tasks, self.processes)
        from faiss.contrib.ondisk import merge_ondisk

        index: Any = faiss.read_index(str(self.work / "template.faiss"))
        files = [str(_part(self.work, at)) for at in range(len(tasks))]
        with _quiet():
            merge_ondisk(index, files, str(self.work / "codes.ivfdata"))
        positions = np.empty(self.source.n, np.int32)
        at = 0
        lists = index.invlists
        for cell in range(index.nlist):
            size = lists.list_size(cell)
            if size:  # rows are numbered in the order of the cells from here on
                ids = faiss.rev_swig_ptr(lists.get_ids(cell), size)
                positions[at : at + size] = ids
                ids[:] = np.arange(at, at + size)
                at += size
        assert at == self.source.n
        np.save(self.work / "positions.npy", positions, allow_pickle=False)
        _write_index(cast(Any, faiss).IndexIVFPQFastScan(index), self.work / "codes.faiss")
        del lists, index
        for file in (*files, str(self.work / "codes.ivfdata")):
            Path(file).unlink(missing_ok=True)

    def sort(self) -> None:
        """Vectors in the order of the cells, as float16, in a file that both FAISS and NumPy map."""
        path = self.work / "vectors.faiss"
        if path.is_file():
            return
        positions = np.load(self.work / "positions.npy", allow_pickle=False)
        rank = np.empty(len(positions), np.int32)
        rank[positions] = np.arange(len(positions), dtype=np.int32)
        np.save(self.work / "rank.npy", rank, allow_pickle=False)
        half = self.work / "vectors.half"
        with half.open("wb") as file:
            file.write(_flat_head(len(rank), self.width))
            offset = file.tell()
            file.truncate(offset + len(rank) * self.width * 2)
        tasks = [
            (self.source, self.work, offset, span, self.metric) for span in self.source.pieces(self.piece)
        ]
        _in_processes(_sort_piece, tasks, self.processes)
        (self.work / "rank.npy").unlink()
        half.rename(path)

    def tune(self) -> tuple[int, int, float, int]:
        """Cells looked into, candidates compared for each neighbour, and the recall with them."""
        known = self._read("tuned.json")
        if known is not None:
            return int(known[0]), int(known[1]), float(known[2]), int(known[3])
        n, k = self.source.n, self.k
        vectors = _mapped_vectors(self.work, n, self.width)
        size = max(1, min(_MEASURED, n // 2))
        drawn = np.random.default_rng([self.seed, 1]).choice(n, 2 * size, replace=False)
        samples = [np.sort(drawn[:size]), np.sort(drawn[size:])]
        truths = _truth(vectors, np.concatenate(samples), k, max(1, self.piece // 4))
        truth = [
            SearchResult(truths.indices[part], truths.similarities[part], True, "flat", 1.0)
            for part in (slice(0, size), slice(size, None))
        ]
        index, codes = open_refined(self.work, 1, _REFINE)
        cells = codes.nlist
        probes, refine, before = min(_FIRST_PROBES, cells), _REFINE, 0.0
        while True:
            codes.nprobe, index.k_factor = probes, refine
            recall, error = _recall_of(index, vectors, samples[0], truth[0], k)
            log.info("%d of %d cells, %d candidates for each: recall %.4f", probes, cells, refine, recall)
            if recall - _MARGIN * error >= self.min_recall:
                break
            # More cells, as long as they help; where the codes are too coarse, more candidates.
            if probes < cells and (recall - before > 0.002 or refine >= _MOST_REFINE):
                probes = min(math.ceil(probes * 2**0.5), cells)
            elif refine < _MOST_REFINE:
                refine *= 2
            else:
                break
            before = recall
        recall, _ = _recall_of(index, vectors, samples[1], truth[1], k)
        if recall < self.min_recall:
            warnings.warn(
                f"the neighbours of {n} items are found with recall {recall:.3f} on {size} queries, below "
                f"min_recall={self.min_recall:g}, with {probes} of {cells} cells and {refine} candidates for each "
                "neighbour compared exactly",
                stacklevel=4,
            )
        tuned = (probes, refine, recall, size)
        write_json(self.work / "tuned.json", list(tuned))
        return tuned

    def search(self, probes: int, refine: int) -> None:
        """The lists, a stretch at a time; each that is done has a mark."""
        n, k = self.source.n, self.k
        if not (self.work / "done").is_dir():
            for name, dtype in (("indices", np.int32), ("similarities", np.float16)):
                np.lib.format.open_memmap(self.work / f"{name}.npy", "w+", dtype, (n, k))
            make_folder(self.work / "done")
        spans = [(begin, min(begin + _STRETCH, n)) for begin in range(0, n, _STRETCH)]
        left = [span for span in spans if not (self.work / "done" / str(span[0])).exists()]
        tasks = [(self.work, n, self.width, k, probes, refine, self.metric, span) for span in left]
        try:
            _in_processes(_search_stretch, tasks, self.processes)
        finally:
            _opened.cache_clear()

    def finish(
        self, probes: int, refine: int, recall: float, queries: int, names: NDArray[Any] | None
    ) -> None:
        """Files into place; the head comes last, and says that all is there."""
        if names is not None:
            plain = names if names.dtype.kind in "iuU" else names.astype(str)
            np.save(self.work / "ids.npy", plain, allow_pickle=False)
        for path in sorted(self.work.iterdir()):
            if path.suffix in (".npy", ".faiss") and path.name != "template.faiss":
                path.replace(self.folder / path.name)
        codes: Any = faiss.read_index(str(self.folder / "codes.faiss"), faiss.IO_FLAG_SKIP_IVF_DATA)
        cells = codes.nlist
        head = {
            "format": 1, "n": self.source.n, "dim": self.source.dim, "width": self.width, "k": self.k,
            "metric": self.metric, "index": f"IVF-PQ, {cells} cells, {probes} probes, best {refine} k compared exactly",
            "recall": recall, "queries": queries, "probes": probes, "refine": refine, "exact": False,
            "offset": len(_flat_head(self.source.n, self.width)), "seconds": self.seconds,
        }  # fmt: skip
        write_json(self.folder / HEAD, head)
        shutil.rmtree(self.work, ignore_errors=True)


# -- pieces, each by itself, in this process or in others ------------------------------------------------------
def _in_processes(function: Callable[[Any], None], tasks: Sequence[Any], processes: int) -> None:
    if processes == 1 or len(tasks) < 2:
        for task in tasks:
            function(task)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    threads = max(1, faiss.omp_get_max_threads() // processes)
    context = multiprocessing.get_context("spawn")  # FAISS's threads do not survive a fork
    with ProcessPoolExecutor(
        min(processes, len(tasks)), context, faiss.omp_set_num_threads, (threads,)
    ) as pool:
        for _ in pool.map(function, tasks):
            pass


def _add_piece(task: tuple[VectorShards, Path, int, tuple[int, int], str]) -> None:
    source, work, number_, (begin, end), metric = task
    path = _part(work, number_)
    if path.is_file():
        return
    index = faiss.read_index(str(work / "template.faiss"))
    rows = _rows(source.read(begin, end), np.arange(begin, end), index.d, metric)
    index.add_with_ids(rows, np.arange(begin, end))
    _write_index(index, path)


def _sort_piece(task: tuple[VectorShards, Path, int, tuple[int, int], str]) -> None:
    source, work, offset, (begin, end), metric = task
    rank = np.load(work / "rank.npy", mmap_mode="r", allow_pickle=False)
    path = work / "vectors.half"
    width = -(-source.dim // 4) * 4
    vectors = np.memmap(path, np.float16, "r+", offset, (len(rank), width))
    to = np.asarray(rank[begin:end])
    order = np.argsort(to)  # neighbours on disk are written together
    rows = _rows(source.read(begin, end), np.arange(begin, end), width, metric)
    for low in range(0, len(order), 65_536):
        some = order[low : low + 65_536]
        vectors[to[some]] = rows[some]
    vectors.flush()


@lru_cache(maxsize=1)
def _opened(work: Path, probes: int, refine: int) -> Any:
    return open_refined(work, probes, refine)[0]


def _search_stretch(task: tuple[Path, int, int, int, int, int, str, tuple[int, int]]) -> None:
    work, n, width, k, probes, refine, metric, (begin, end) = task
    index = _opened(work, probes, refine)
    vectors = _mapped_vectors(work, n, width)
    indices = np.load(work / "indices.npy", mmap_mode="r+", allow_pickle=False)
    values = np.load(work / "similarities.npy", mmap_mode="r+", allow_pickle=False)
    for low in range(begin, end, _QUERIES):
        own = np.arange(low, min(low + _QUERIES, end))
        nearest = index.search(vectors[own].astype(np.float32), k + 1)
        similarity, row = _without_self(nearest[0], nearest[1], own)
        similarity = np.where(row < 0, -np.inf, similarity)
        if metric == "cosine":
            similarity = np.minimum(similarity, 1.0)
        indices[own[0] : own[-1] + 1], values[own[0] : own[-1] + 1] = row, similarity
    indices.flush()
    values.flush()
    (work / "done" / str(begin)).touch()


# -- rows, centres, truth --------------------------------------------------------------------------------------
def _rows(
    given: NDArray[np.float32], positions: NDArray[np.int64], width: int, metric: str
) -> NDArray[np.float32]:
    """Checked rows of unit length (cosine), with columns of zeros up to ``width``; as float16 would hold them."""
    length = np.sqrt(np.einsum("nd,nd->n", given, given, dtype=np.float64))
    largest = np.abs(given).max(axis=1, initial=0.0) if metric == "dot" else None
    bad = ~np.isfinite(length) if largest is None else ~(np.isfinite(length) & (largest < 65_504))
    if bad.any():
        raise NearfarError(
            f"{int(bad.sum())} of the vectors {positions[0]} to {positions[-1]} are not finite, or beyond float16 "
            f"(65,504); first is number {positions[bad.argmax()]}. Look at what made them before searching neighbours"
        )
    if metric == "cosine":
        if (length == 0).any():
            zero = length == 0
            raise NearfarError(
                f"{int(zero.sum())} of the vectors {positions[0]} to {positions[-1]} are all zero, first is number "
                f"{positions[zero.argmax()]}: they have no direction, so no cosine; drop these items (an empty text?) "
                "or use metric='dot'"
            )
        given = (given / length[:, None]).astype(np.float32)
    return padded(given, width).astype(np.float16).astype(np.float32)


def _centres(sample: NDArray[np.float32], cells: int, spherical: bool, seed: int) -> NDArray[np.float32]:
    """k-means in two levels, so that its work for each row grows with the root of the number of cells.

    Groups of cells stand in a chain of near ones: cells with near numbers are near each other.
    """

    def means(rows: NDArray[np.float32], k: int, points: int) -> Any:
        model = faiss.Kmeans(
            rows.shape[1], k, niter=8, spherical=spherical, seed=1 + seed % 2**31, min_points_per_centroid=1,
            max_points_per_centroid=points,
        )  # fmt: skip
        model.train(np.ascontiguousarray(rows))
        return model

    groups = max(1, round(cells**0.5))
    if groups == 1:
        return np.asarray(means(sample, min(cells, len(sample)), _POINTS).centroids)
    first = means(sample, groups, 1024)
    _, of = first.index.search(sample, 1)
    size = np.bincount(of[:, 0], minlength=groups)
    order = np.argsort(of[:, 0], kind="stable")
    ends = np.cumsum(size)
    centres = []
    for group in _chain(first.centroids):
        if size[group]:
            share = max(1, min(int(size[group]), round(cells * size[group] / len(sample))))
            rows = sample[order[ends[group] - size[group] : ends[group]]]
            centres.append(means(rows, share, _POINTS).centroids)
    return np.concatenate(centres)


def _chain(points: NDArray[np.float32]) -> list[int]:
    """An order in which each point is followed by the nearest of those that are left."""
    near = points @ points.T
    order, left = [0], np.ones(len(points), bool)
    left[0] = False
    while left.any():
        order.append(int(np.argmax(np.where(left, near[order[-1]], -np.inf))))
        left[order[-1]] = False
    return order


def _truth(vectors: NDArray[np.float16], own: NDArray[np.int64], k: int, block: int) -> SearchResult:
    """The true neighbours of some stored rows, against all of them in blocks."""
    best = faiss.ResultHeap(len(own), k + 1, keep_max=True)
    queries = vectors[own].astype(np.float32)
    for begin in range(0, len(vectors), block):
        part = vectors[begin : begin + block].astype(np.float32)
        similarity, row = faiss.knn(queries, part, min(k + 1, len(part)), metric=faiss.METRIC_INNER_PRODUCT)
        best.add_result(similarity, row + begin)
    best.finalize()
    similarity, row = _without_self(best.D, best.I, own)
    return SearchResult(row.astype(np.int32), similarity, True, "flat", 1.0)


def _recall_of(
    index: Any, vectors: NDArray[np.float16], own: NDArray[np.int64], truth: SearchResult, k: int
) -> tuple[float, float]:
    nearest = index.search(vectors[own].astype(np.float32), k + 1)
    similarity, row = _without_self(nearest[0], nearest[1], own)
    return _recall(row.astype(np.int32), truth, similarity)


# -- files -----------------------------------------------------------------------------------------------------
def _part(work: Path, number_: int) -> Path:
    return work / f"part-{number_:05}.faiss"


def _write_index(index: Any, path: Path) -> None:
    half = path.with_suffix(".half")
    faiss.write_index(index, str(half))
    half.rename(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """FAISS prints the size of a file that it makes on standard output, which is the answer of a command."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _flat_head(n: int, width: int) -> bytes:
    """What FAISS writes before the rows of a flat float16 index: the rows themselves are written by others."""
    index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index.is_trained, index.ntotal = True, n
    empty = bytes(faiss.serialize_index(index))
    return empty[:-8] + np.uint64(n * width * 2).tobytes()


def _mapped_vectors(work: Path, n: int, width: int) -> NDArray[np.float16]:
    offset = len(_flat_head(n, width))
    return np.asarray(np.memmap(work / "vectors.faiss", np.float16, "r", offset, (n, width)))
