"""The nearest neighbours of more items than memory holds: an index on disk, built and searched a stretch at a time."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import faiss
import numpy as np

from nearfar.arguments import choice, number, whole_number
from nearfar.batching.base import as_ids, digest
from nearfar.batching.disk_search import (
    POINTS,
    RefinedIndex,
    Stretch,
    cell_centres,
    checked_rows,
    close_index,
    flat_head,
    lists_of,
    nearest_stored,
    stored_vectors,
)
from nearfar.batching.mapped_neighbors import HEAD, MappedNeighbors, as_folder
from nearfar.batching.neighbors import SearchResult
from nearfar.batching.pieces import Pool, in_processes, on_ray
from nearfar.cluster import connect
from nearfar.data.files import make_folder, write_json
from nearfar.data.vector_shards import VectorShards
from nearfar.errors import NearfarError
from nearfar.ids import Ids

__all__ = ["nearest_neighbors_on_disk"]

log = logging.getLogger("nearfar.batching")

_CELL = 1000  # rows of a cell: the work of a query does not grow with the number of items
_SAMPLE_BYTES = 2 << 30
_PIECE_BYTES = 256 << 20  # float32 rows in memory at once
_STRETCH = 65_536  # queries that are searched, and recorded as done, together
_MEASURED = 500  # queries of each of the two samples
_ALL_PAIRS = 256  # rows up to which all are compared with all, or 4 k: an index would miss some of so few
_FLAT_CELLS = 8192  # beyond, the cell of a row is looked up in a graph of centres
_WORK = "unfinished"
_FILES = ("positions.npy", "codes.faiss", "vectors.faiss", "indices.npy", "similarities.npy", "ids.npy")


def nearest_neighbors_on_disk(
    vectors: object,
    k: int,
    folder: str | Path,
    *,
    metric: str = "cosine",
    min_recall: float = 0.95,
    processes: int = 1,
    engine: str = "processes",
    seed: int = 0,
    ids: Ids | None = None,
) -> MappedNeighbors:
    """The ``k`` nearest neighbours of every row of ``vectors`` among the others, for 10⁵ to 10⁸ rows, in files.

    ``vectors`` are ``.npy`` shards (float16 or float32, mapped), a folder of them, or an array (n, d). Cells of about
    1,000 rows are learned on a sample. Processes add shards to copies of the index, FAISS merges them on disk, and
    vectors are put in the order of the cells. A query looks into its nearest cells by 4-bit product codes, and the best
    4 k are compared exactly (float16). Cells are added until the recall, measured against all pairs on 500 queries,
    lies two standard errors above ``min_recall``; the ``recall`` that is stated comes from 500 others. Where it cannot
    be reached, a warning says what was. Up to 256 rows, or 4 k, all pairs are compared.

    Memory: about 40 bytes for each row and process, a sample of at most 2 GB, and stretches; disk: 2 d + 6 k + d / 4
    bytes for each row, and d / 4 + 8 more while it is built. Threads are FAISS's (``OMP_NUM_THREADS``). A call that was
    stopped goes on where it was when it is repeated; with finished lists in the folder, it is refused.

    ``engine="ray"``: pieces are added and searched by tasks on a Ray cluster whose nodes see the same files; a piece
    whose node is lost is made again. This process merges, sorts, and writes the lists.

    Errors: rows that are not finite, of zeros (cosine), or with products beyond float16 (dot); too few rows; no room
    on the disk.

    >>> import tempfile
    >>> rng = np.random.default_rng(0)
    >>> points = rng.standard_normal((20, 16))[rng.integers(20, size=1000)] + 0.3 * rng.standard_normal((1000, 16))
    >>> near = nearest_neighbors_on_disk(points, 10, tempfile.mkdtemp())
    >>> near.n, near.k, near.recall > 0.95, near.indices[[0]].shape
    (1000, 10, True, (1, 10))
    """
    choice("metric", metric, ("cosine", "dot"))
    choice("engine", engine, ("processes", "ray"))
    min_recall = number("min_recall", min_recall, above=0, most=1)
    processes, seed = whole_number("processes", processes, 1), whole_number("seed", seed, 0)
    if engine == "ray" and processes > 1:
        raise NearfarError(
            f"processes={processes} are of this machine: with engine=ray there are as many as the cluster has CPUs. "
            "Leave processes out, or take engine=processes"
        )
    source = VectorShards.of(vectors)
    k = whole_number("k", k, 1)
    if k > source.n - 1:
        raise NearfarError(
            f"k={k} neighbours were asked for, but each of {source.n} items has only {source.n - 1} others"
        )
    if source.n > np.iinfo(np.int32).max:
        raise NearfarError(f"{source.n} items do not fit the 32-bit positions of a plan")
    if source.held is not None and (processes > 1 or engine == "ray"):
        how = "engine='ray'" if engine == "ray" else f"processes={processes}"
        raise NearfarError(
            f"with {how} processes read shards by themselves, and an array was given: write it with numpy.save and "
            "give the file"
        )
    names = None if ids is None else as_ids(ids, source.n)
    local = in_processes(processes)
    pool = on_ray if engine == "ray" else local
    build = _Build(source, k, as_folder(folder).absolute(), metric, min_recall, seed, pool, local)
    if build.searched:  # and stopped before all files were in place
        build.finish(names)
        return MappedNeighbors(build.folder)
    with connect("engine='ray'") if engine == "ray" else nullcontext():
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
    build.describe(probes, refine, recall, queries)
    build.finish(names)
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
        seed: int,
        pool: Pool,
        local: Pool,
    ) -> None:
        self.source, self.k, self.folder, self.metric = source, k, folder, metric
        self.min_recall, self.seed, self.pool, self.local = min_recall, seed, pool, local
        self.work = folder / _WORK
        self.width = -(-source.dim // 4) * 4
        self.piece = max(1, _PIECE_BYTES // (4 * self.width))
        self.cells = max(1, round(source.n / _CELL))
        self.exact = source.n <= max(_ALL_PAIRS, 4 * k)
        make_folder(folder)
        if (folder / HEAD).exists():
            raise NearfarError(
                f"{folder} holds neighbours already: open them with MappedNeighbors, or name a new folder"
            )
        some = np.unique(np.linspace(0, source.n - 1, 256).astype(np.int64))
        key = {
            "n": source.n, "k": k, "metric": metric, "min_recall": min_recall, "seed": seed, "version": 2,
            "vectors": digest(source.take(some)), "state": source.state(),
        }  # fmt: skip
        known = self._read("key.json") or {}
        self.build = known.pop("build", uuid4().hex)
        if known != key:
            if any(folder.iterdir()) and not self.work.is_dir():
                raise NearfarError(
                    f"{folder} holds something else than neighbours; name a new folder, which is made"
                )
            shutil.rmtree(self.work, ignore_errors=True)
            make_folder(self.work)
            self.build = uuid4().hex
            write_json(self.work / "key.json", {**key, "build": self.build})
        self.seconds: dict[str, float] = self._read("seconds.json") or {}
        need = source.n * (2 * self.width + 6 * k + self.width // 2 + 24)
        own = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(folder).free + own
        if need > free:
            raise NearfarError(
                f"{folder}: about {need / 1e9:.1f} GB are needed on disk, and {free / 1e9:.1f} GB are free; name "
                "a folder with more room, or ask for a smaller k"
            )

    @property
    def searched(self) -> bool:
        """Whether the lists are complete, and files only need to be put in place."""
        return (self.work / HEAD).is_file()

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
        size = min(n, max(POINTS * self.cells, 1 << 14), _SAMPLE_BYTES // (4 * width))
        rows = np.sort(np.random.default_rng(self.seed).choice(n, size, replace=False))
        sample = checked_rows(self.source.take(rows), rows, width, self.metric)
        centres = cell_centres(sample, self.cells, self.metric == "cosine", self.seed)
        flat: faiss.IndexFlatIP | faiss.IndexHNSWFlat
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
            self._remove_parts()
            return
        tasks = [
            (self.source, self.work, at, span, self.metric)
            for at, span in enumerate(self.source.pieces(self.piece))
        ]
        for _ in self.pool(_add_piece, tasks):
            pass
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
        self._remove_parts()

    def _remove_parts(self) -> None:
        for file in (*self.work.glob("part-*"), self.work / "codes.ivfdata"):
            file.unlink(missing_ok=True)

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
            file.write(flat_head(len(rank), self.width))
            offset = file.tell()
            file.truncate(offset + len(rank) * self.width * 2)
        tasks = [
            (self.source, self.work, offset, span, self.metric) for span in self.source.pieces(self.piece)
        ]
        for _ in self.local(_sort_piece, tasks):  # all write into one file
            pass
        (self.work / "rank.npy").unlink()
        half.rename(path)

    def tune(self) -> tuple[int, int, float, int]:
        """Cells looked into, candidates compared for each neighbour, and the recall with them."""
        known = self._read("tuned.json")
        if known is not None:
            return int(known[0]), int(known[1]), float(known[2]), int(known[3])
        n, k = self.source.n, self.k
        if self.exact:
            return self.cells, 1, 1.0, n
        vectors = stored_vectors(self.work, n, self.width)
        size = max(1, min(_MEASURED, n // 2))
        drawn = np.random.default_rng([self.seed, 1]).choice(n, 2 * size, replace=False)
        samples = [np.sort(drawn[:size]), np.sort(drawn[size:])]
        queries = [vectors[own].astype(np.float32) for own in samples]
        both = nearest_stored(vectors, np.concatenate(queries), k, np.concatenate(samples))
        truth = [
            SearchResult(both.indices[part], both.similarities[part], True, "flat", 1.0)
            for part in (slice(0, size), slice(size, None))
        ]
        index = RefinedIndex(self.work)
        index.tune(queries[0], truth[0], self.min_recall, samples[0])
        recall, _ = index.recall(queries[1], truth[1], samples[1])
        if recall < self.min_recall:
            warnings.warn(
                f"the neighbours of {n} items are found with recall {recall:.3f} on {size} queries, below "
                f"min_recall={self.min_recall:g}, with {index.probes} of {index.cells} cells and {index.refine:g} "
                "candidates for each neighbour compared exactly",
                stacklevel=4,
            )
        tuned = (index.probes, int(index.refine), recall, size)
        write_json(self.work / "tuned.json", list(tuned))
        return tuned

    def search(self, probes: int, refine: int) -> None:
        """The lists, a stretch at a time, written here alone; each that is done has a mark."""
        n, k = self.source.n, self.k
        if not (self.work / "done").is_dir():
            for name, dtype in (("indices", np.int32), ("similarities", np.float16)):
                np.lib.format.open_memmap(self.work / f"{name}.npy", "w+", dtype, (n, k))
            make_folder(self.work / "done")
        begins = [begin for begin in range(0, n, _STRETCH) if not (self.work / "done" / str(begin)).exists()]
        tasks = [
            Stretch(
                self.work,
                self.build,
                n,
                self.width,
                k,
                probes,
                refine,
                self.metric,
                self.exact,
                begin,
                min(begin + _STRETCH, n),
            )
            for begin in begins
        ]
        files = [
            np.load(self.work / f"{name}.npy", mmap_mode="r+", allow_pickle=False)
            for name in ("indices", "similarities")
        ]
        try:
            for at, lists in self.pool(lists_of, tasks):
                stretch = tasks[at]
                for file, part in zip(files, lists, strict=True):
                    file[stretch.begin : stretch.end] = part
                    file.flush()
                (self.work / "done" / str(stretch.begin)).touch()
        finally:
            close_index()

    def describe(self, probes: int, refine: int, recall: float, queries: int) -> None:
        """The head, beside the files that are not in place yet."""
        codes: Any = faiss.read_index(str(self.work / "codes.faiss"), faiss.IO_FLAG_SKIP_IVF_DATA)
        how = f"IVF-PQ, {codes.nlist} cells, {probes} probes, best {refine} k compared exactly"
        head = {
            "format": 1, "n": self.source.n, "dim": self.source.dim, "width": self.width, "k": self.k,
            "metric": self.metric, "index": "all pairs" if self.exact else how, "recall": recall, "queries": queries,
            "probes": probes, "refine": refine, "exact": self.exact,
            "offset": len(flat_head(self.source.n, self.width)), "seconds": self.seconds,
        }  # fmt: skip
        write_json(self.work / HEAD, head)

    def finish(self, names: np.ndarray | None) -> None:
        """Files into place; the head comes last, and says that all is there. What was stopped is done again."""
        for folder in (self.work, self.folder):  # of a call that was stopped, with different ids
            (folder / "ids.npy").unlink(missing_ok=True)
        if names is not None:
            plain = names if names.dtype.kind in "iuU" else names.astype(str)
            np.save(self.work / "ids.npy", plain, allow_pickle=False)
        for name in _FILES:
            if (self.work / name).is_file():
                (self.work / name).replace(self.folder / name)
        (self.work / HEAD).replace(self.folder / HEAD)
        shutil.rmtree(self.work, ignore_errors=True)


# -- pieces, each by itself, in this process or in others ------------------------------------------------------
def _add_piece(task: tuple[VectorShards, Path, int, tuple[int, int], str]) -> None:
    source, work, number_, (begin, end), metric = task
    path = _part(work, number_)
    if path.is_file():
        return
    index = faiss.read_index(str(work / "template.faiss"))
    rows = checked_rows(source.read(begin, end), np.arange(begin, end), index.d, metric)
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
    rows = checked_rows(source.read(begin, end), np.arange(begin, end), width, metric)
    for low in range(0, len(order), 65_536):
        some = order[low : low + 65_536]
        vectors[to[some]] = rows[some]
    vectors.flush()


# -- files -----------------------------------------------------------------------------------------------------
def _part(work: Path, number_: int) -> Path:
    return work / f"part-{number_:05}.faiss"


def _write_index(index: faiss.Index, path: Path) -> None:
    half = path.with_name(f"{path.stem}.{uuid4().hex}.half")  # a piece may be made by two nodes at once
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
