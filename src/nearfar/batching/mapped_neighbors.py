"""Neighbour lists beyond memory: files that are mapped, behind the interface of `Neighbors`."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import faiss
import numpy as np
from numpy.typing import DTypeLike, NDArray

from nearfar.arguments import number, whole_number
from nearfar.batching.base import digest
from nearfar.batching.disk_search import QUERIES, RefinedIndex, nearest_stored, padded, stored_vectors
from nearfar.batching.neighbors import Neighbors, SearchResult
from nearfar.data.files import Json, Maybe, read_json
from nearfar.errors import NearfarError
from nearfar.ids import Ids, canonical_ids

__all__ = ["HEAD", "MappedNeighbors", "UnitVectors", "as_folder"]

HEAD = "neighbors.json"
_FORMAT = 1
_SHAPE: dict[str, object] = {
    "format": int, "n": int, "dim": int, "width": int, "k": int, "metric": str, "index": str, "recall": Maybe(float),
    "queries": int, "probes": int, "refine": int, "offset": int, "exact": bool, "seconds": dict,
}  # fmt: skip
_ROWS = 65_536  # rows looked at together


class _ByItem:
    """Lists in the order of the items, read from lists in the order of the file as they are asked for."""

    def __init__(self, owner: MappedNeighbors, stored: np.ndarray, named: bool) -> None:
        self._owner, self._stored, self._named = owner, stored, named
        self.shape, self.dtype, self.ndim = stored.shape, np.dtype(np.int32 if named else np.float32), 2

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, which: object) -> np.ndarray:
        given = which if isinstance(which, tuple) else (which,)
        if len(given) > 2 or any(each is None for each in given):
            raise IndexError(f"lists have rows and columns, and {len(given)} indices were given: {which!r}")
        rows, columns = (*given, slice(None), slice(None))[:2]
        if isinstance(rows, slice) or rows is Ellipsis:
            taken = np.asarray(self._stored[self._owner.rank[rows]])[:, columns]
        else:  # two arrays are pairs of rows and columns, as NumPy has it
            taken = np.asarray(self._stored[self._owner.rank[rows], columns])
        if self._named:
            taken = np.where(taken < 0, np.int32(-1), self._owner.positions[taken.clip(0)])
        return taken.astype(self.dtype)[()]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


class UnitVectors:
    """Vectors of unit length in a file, rounded to float16: ``vectors[items]`` are rows by position, (m, d) float32."""

    def __init__(self, stored: NDArray[np.float16], rank: NDArray[np.int32], normalise: bool) -> None:
        self._stored, self._rank, self._normalise = stored, rank, normalise
        self.shape = stored.shape

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, items: NDArray[np.integer]) -> NDArray[np.float32]:
        rows = np.asarray(self._stored[self._rank[items]], np.float32)
        if self._normalise:
            rows /= np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
        return rows


class MappedNeighbors(Neighbors):
    """The lists of `nearest_neighbors_on_disk`, mapped from its folder: as `Neighbors`, and samplers take them as such.

    ``indices[rows]`` and ``similarities[rows]`` (float16 on disk) give the lists of items by position, as arrays of a
    `Neighbors` do; the whole of them is read only where it is asked for. On disk, near items stand near each other:
    row r of ``stored`` belongs to item ``positions[r]`` and names rows; samplers plan from stretches of it, with memory
    that is bounded by a stretch and about 20 bytes for each item. ``search`` finds the nearest items of new vectors.

    >>> import tempfile
    >>> from nearfar.batching import nearest_neighbors_on_disk
    >>> points = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    >>> folder = tempfile.mkdtemp()
    >>> near = nearest_neighbors_on_disk(points, 5, folder)
    >>> again = MappedNeighbors(folder)
    >>> again.indices[[7]].tolist() == near.indices[[7]].tolist(), again.recall >= 0.95
    (True, True)
    """

    folder: Path
    head: Json
    stored: NDArray[np.int32]
    stored_similarities: NDArray[np.float16]
    positions: NDArray[np.int32]

    def __init__(self, folder: str | Path) -> None:
        self._open(as_folder(folder), None, None)

    def _open(self, folder: Path, positions: NDArray[np.int32] | None, ids: np.ndarray | None) -> None:
        if not (folder / HEAD).is_file():
            raise NearfarError(
                f"the folder {folder} holds no finished neighbours ({HEAD} is missing); make them with "
                "nearest_neighbors_on_disk, which goes on where it was stopped"
            )
        head = cast("Json", read_json(folder / HEAD, _SHAPE))
        if head["format"] != _FORMAT:
            raise NearfarError(f"{folder}: format {head['format']}; this nearfar reads format {_FORMAT}")
        n, k = head["n"], head["k"]
        stored = self._map(folder / "indices.npy", (n, k), np.int32)
        values = self._map(folder / "similarities.npy", (n, k), np.float16)
        if positions is None:
            positions = np.array(self._map(folder / "positions.npy", (n,), np.int32))
            if len(positions) and (np.sort(positions) != np.arange(n)).any():
                raise NearfarError(f"{folder / 'positions.npy'} does not name every item once; it is damaged")
        if ids is None and (folder / "ids.npy").is_file():
            ids = np.load(folder / "ids.npy", allow_pickle=False)
        fields = {
            "folder": folder, "head": head, "stored": stored, "stored_similarities": values, "positions": positions,
            "ids": ids, "indices": _ByItem(self, stored, True), "similarities": _ByItem(self, values, False),
            "metric": head["metric"], "exact": head["exact"], "index": head["index"], "recall": head["recall"],
            "queries": head["queries"], "_rank": None, "_index": None, "_directions": None,
        }  # fmt: skip
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # Neighbors are frozen

    @staticmethod
    def _map(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise NearfarError(f"{path} cannot be read ({error}); make the neighbours anew") from None
        if mapped.shape != shape or mapped.dtype != dtype:
            raise NearfarError(
                f"{path} holds {mapped.dtype} {mapped.shape}, not {np.dtype(dtype)} {shape}; it is damaged"
            )
        return np.asarray(mapped)

    def __getstate__(self) -> Json:
        ids = None if (self.folder / "ids.npy").is_file() else self.ids
        return {"folder": self.folder, "positions": self.positions, "ids": ids}

    def __setstate__(self, state: Json) -> None:
        self._open(state["folder"], state["positions"], state["ids"])

    @property
    def rank(self) -> NDArray[np.int32]:
        """The row of each item in the files, (n,)."""
        if self._rank is None:  # type: ignore[attr-defined]
            rank = np.empty(self.n, np.int32)
            rank[self.positions] = np.arange(self.n, dtype=np.int32)
            object.__setattr__(self, "_rank", rank)
        return cast("NDArray[np.int32]", self._rank)  # type: ignore[attr-defined]

    def local(self, begin: int, end: int, k: int) -> NDArray[np.int32]:
        """The lists of stored rows ``begin`` to ``end``, in memory, counted from ``begin``; what lies outside is
        below 0 or at least ``end - begin``, and stands for nobody."""
        some = self.stored[begin:end, :k]
        return np.where(some < 0, np.int32(-1), some - np.int32(begin)).astype(np.int32, order="C")

    def count_inside(
        self, items: NDArray[np.int32], k: int, close: NDArray[np.int32], label: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        inside, false = np.zeros(len(items), np.int32), np.zeros(len(items), np.int32)
        place = np.arange(self.k)
        for begin in range(0, len(items), _ROWS // 4):
            some = items[begin : begin + _ROWS // 4]
            near = self.indices[some]
            same = (near >= 0) & (label[near.clip(0)] == label[some][:, None])
            inside[begin : begin + len(some)] = same[:, :k].sum(1)
            false[begin : begin + len(some)] = (same & (place < close[some][:, None])).sum(1)
        return inside, false

    def held(self) -> Neighbors:
        """The same lists in memory, n · k · 8 bytes."""
        return Neighbors(
            self.indices[:],
            self.stored_similarities[self.rank].astype(np.float32),
            self.ids,
            self.metric,
            self.exact,
            self.index,
            self.recall,
            self.queries,
        )

    def aligned_to(self, ids: Ids) -> MappedNeighbors:
        """The same lists for the same items in the order of ``ids``; the files stay as they are."""
        if self.ids is None:
            raise NearfarError(
                "these neighbours carry no ids to align by; pass ids= to nearest_neighbors_on_disk"
            )
        wanted = canonical_ids(ids)
        new, old = np.argsort(wanted, kind="stable"), np.argsort(self.ids, kind="stable")
        if len(wanted) != self.n or (wanted[new] != self.ids[old]).any():
            raise NearfarError(
                f"the {len(wanted)} ids are not those of the {self.n} items of {self.folder}; compute the neighbours "
                "of exactly these items"
            )
        if (wanted[new][1:] == wanted[new][:-1]).any():
            raise NearfarError("ids repeat, so that an order of them does not say which item is meant")
        target = np.empty(self.n, np.int32)
        target[old] = new
        moved = object.__new__(MappedNeighbors)
        moved._open(self.folder, target[self.positions], wanted)
        return moved

    def too_close(self, threshold: float | None) -> NDArray[np.int32]:
        if threshold is None:
            return np.zeros(self.n, np.int32)
        threshold = number("threshold", threshold, infinite=True)
        count = np.zeros(self.n, np.int32)
        for begin in range(0, self.n, _ROWS):
            block = slice(begin, begin + _ROWS)
            near = (self.stored_similarities[block].astype(np.float32) >= threshold) & (
                self.stored[block] >= 0
            )
            count[self.positions[block]] = near.sum(1)
        return count

    def fingerprint(self) -> str:
        return digest(self.stored, self.positions, *([] if self.ids is None else [self.ids]))

    @property
    def directions(self) -> UnitVectors:
        """The vectors that the lists are of, at unit length: ``directions[items]``, mapped."""
        if self._directions is None:  # type: ignore[attr-defined]
            stored = stored_vectors(self.folder, self.n, self.head["width"])[:, : self.head["dim"]]
            object.__setattr__(self, "_directions", UnitVectors(stored, self.rank, self.metric == "dot"))
        return cast(UnitVectors, self._directions)  # type: ignore[attr-defined]

    def search(self, queries: NDArray[np.floating], k: int) -> SearchResult:
        """The ``k`` nearest items of new vectors (m, d), as `nearfar.mining.nearest_documents` gives them.

        The index, its probes and its re-ranking are those of the lists, whose ``recall`` was measured at their ``k``,
        or those of `tune_search`.
        """
        rows = self._queries(queries)
        k = min(whole_number("k", k, 1), self.n)
        if self.exact:
            stored = stored_vectors(self.folder, self.n, self.head["width"])
            best = nearest_stored(stored, self._wide(rows), k)
            return SearchResult(
                self.positions[best.indices], best.similarities, True, "all pairs", 1.0, len(rows)
            )
        index, recall, queried = self._search_index()
        refine = index.refine
        # As many candidates are compared exactly as for the lists, though fewer may be asked for.
        index.refine = refine * max(1.0, self.k / k)
        indices, values = np.empty((len(rows), k), np.int32), np.empty((len(rows), k), np.float32)
        try:
            for begin in range(0, len(rows), QUERIES):
                part = slice(begin, begin + QUERIES)
                similarity, row = index.search(self._wide(rows[part]), k)
                values[part] = np.where(row < 0, -np.inf, similarity)
                indices[part] = np.where(row < 0, -1, self.positions[row.clip(0)])
        finally:
            index.refine = refine
        how = f"IVF-PQ, {index.cells} cells, {index.probes} probes, best {refine:g} k compared exactly"
        return SearchResult(indices, values, self.exact, how, recall or 0.0, queried)

    def tune_search(
        self, queries: NDArray[np.floating], k: int, min_recall: float = 0.95, seed: int = 0
    ) -> tuple[float, int]:
        """Widen ``search`` until the recall at ``k`` on these queries lies two standard errors above ``min_recall``.

        Queries of a different kind than the items, such as questions among answers, need wider searches. Half of them
        choose how wide, the recall on the others is returned, with their number; all items are compared with them,
        which takes their number times n products.
        """
        rows = self._queries(queries)
        k = min(whole_number("k", k, 1), self.n)
        if len(rows) < 2:
            raise NearfarError(
                f"{len(rows)} queries: half of them choose, half of them measure; at least 2 are needed"
            )
        if self.exact:
            return 1.0, len(rows)
        index = self._search_index()[0]
        order = np.random.default_rng(seed).permutation(len(rows))
        halves = [self._wide(rows[part]) for part in np.array_split(order, 2)]
        stored = stored_vectors(self.folder, self.n, self.head["width"])
        truth = nearest_stored(stored, np.concatenate(halves), k)
        first, second = (
            SearchResult(truth.indices[part], truth.similarities[part], True, "flat", 1.0)
            for part in (slice(0, len(halves[0])), slice(len(halves[0]), None))
        )
        index.tune(halves[0], first, min_recall)
        recall, _ = index.recall(halves[1], second)
        object.__setattr__(self, "_index", (index, recall, len(halves[1])))
        return recall, len(halves[1])

    def _search_index(self) -> tuple[RefinedIndex, float | None, int]:
        """The index, the recall that was measured of it, and on how many queries."""
        if self._index is None:  # type: ignore[attr-defined]
            index = RefinedIndex(self.folder, self.head["probes"], self.head["refine"])
            object.__setattr__(self, "_index", (index, self.recall, self.queries))
        return cast("tuple[RefinedIndex, float | None, int]", self._index)  # type: ignore[attr-defined]

    def _queries(self, queries: NDArray[np.floating]) -> NDArray[np.float32]:
        rows = np.ascontiguousarray(queries, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.head["dim"]:
            raise NearfarError(f"queries are {rows.shape}; (m, {self.head['dim']}) are needed")
        return rows

    def _wide(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        wide = padded(rows, self.head["width"])
        if self.metric == "cosine":
            faiss.normalize_L2(wide)
        return wide


def as_folder(given: object) -> Path:
    """A path, or the text of one."""
    if not isinstance(given, (str, Path)):
        raise NearfarError(f"folder is a {type(given).__name__}; give the path of one")
    return Path(given).expanduser()
