"""The nearest documents of every query, and which of them answer it.

All pairs are compared, or an inverted file is searched whose recall is measured; documents of one text answer alike.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import faiss
import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from nearfar.arguments import array, number, whole_number
from nearfar.batching.neighbors import SearchResult
from nearfar.data.items import Column
from nearfar.errors import NearfarError

__all__ = [
    "Answers",
    "Positives",
    "SparseMatrix",
    "groups_of",
    "nearest_documents",
    "no_text",
    "pairs_of",
    "plain_text",
    "text_numbers",
    "unit_rows",
]


#: queries per call: bounds the 64-bit answers that FAISS gives
_BLOCK = 8192
#: queries on which recall is measured
_SAMPLE = 1000
#: pairs from which on an index is tried before all of them are compared
_PAIRS = 2_500_000_000
#: standard errors by which the measured recall must exceed what is wanted
_MARGIN = 2.0


def unit_rows(name: str, vectors: object) -> NDArray[np.float32]:
    """Vectors (n, d) as float32 of unit length; rows of zeros stay zero, a number that is not finite is refused."""
    given = array(name, vectors, "vectors (rows, dimensions)", "fiu")
    if given.ndim != 2 or not given.shape[1]:
        raise NearfarError(f"{name} are {given.shape}; vectors (rows, dimensions) are needed")
    rows = np.array(given, dtype=np.float32, order="C")
    bad = ~np.isfinite(rows).all(1)
    if bad.any():
        raise NearfarError(
            f"{name}: {int(bad.sum())} rows hold numbers that are not finite (first: row {int(bad.argmax())})"
        )
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1.0), dtype=np.float32)


def nearest_documents(
    queries: Float[np.ndarray, "n d"],
    corpus: Float[np.ndarray, "m d"],
    k: int,
    min_recall: float = 0.99,
    seed: int = 0,
) -> SearchResult:
    """The ``k`` documents of highest dot product for each query, best first, and how they were found.

    Up to 2.5 · 10⁹ pairs all are compared. Above, an inverted file is tried: its probes are doubled until the recall on
    1,000 sampled queries lies two standard errors above ``min_recall``, and what is stated was measured on 1,000
    others; where that would cost as much as all pairs, these are compared. ``indices`` (n, k) are −1 where there is
    nothing more.

    >>> nearest = nearest_documents(np.eye(2, dtype=np.float32), np.eye(3, 2, dtype=np.float32), 2)
    >>> nearest.indices.tolist(), nearest.recall
    ([[0, 1], [1, 0]], 1.0)
    """
    queries, corpus = np.ascontiguousarray(queries, np.float32), np.ascontiguousarray(corpus, np.float32)
    k, min_recall = whole_number("k", k, 1), number("min_recall", min_recall, 0, 1)
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1] != corpus.shape[1]:
        raise NearfarError(
            f"queries are {queries.shape} and the corpus {corpus.shape}; both need the same dimensions (columns)"
        )
    k = min(k, len(corpus))
    if not len(queries) or not k:
        raise NearfarError(f"{len(queries)} queries and {len(corpus)} documents: nothing can be searched")
    if len(queries) * len(corpus) > _PAIRS and min_recall < 1 and len(queries) > 2 * _SAMPLE:
        nearest = _inverted(queries, corpus, k, min_recall, seed)
        if nearest is not None:
            return nearest
    flat = faiss.IndexFlatIP(corpus.shape[1])
    flat.add(corpus)
    return _search(flat, queries, k)


def _search(index: faiss.Index, queries: NDArray[np.float32], k: int) -> SearchResult:
    indices, values = np.empty((len(queries), k), np.int32), np.empty((len(queries), k), np.float32)
    for begin in range(0, len(queries), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        values[block], indices[block] = index.search(queries[block], k)
    return SearchResult(indices, values, True, "flat", 1.0)


def _recall(tried: SearchResult, truth: SearchResult) -> tuple[float, float]:
    """Mean recall and its standard error; a tie with the last true one is as good as that."""
    share = ((tried.similarities >= truth.similarities[:, -1:] - 1e-6) & (tried.indices >= 0)).mean(1)
    return float(share.mean()), float(share.std(ddof=1) / np.sqrt(len(share)))


def _inverted(
    queries: NDArray[np.float32], corpus: NDArray[np.float32], k: int, min_recall: float, seed: int
) -> SearchResult | None:
    """None where all pairs are as cheap."""
    m, d = corpus.shape
    cells = max(1, min(int(2 * np.sqrt(m)), m // 39))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.seed, index.cp.max_points_per_centroid = 10, 1 + seed % 2**31, 64
    index.cp.min_points_per_centroid = 1
    index.train(corpus)
    index.add(corpus)
    sample = np.random.default_rng(seed).choice(len(queries), 2 * _SAMPLE, replace=False)
    first, second = queries[sample[:_SAMPLE]], queries[sample[_SAMPLE:]]
    flat = faiss.IndexFlatIP(d)
    flat.add(corpus)
    began = time.perf_counter()
    truth = _search(flat, first, k)
    all_pairs = time.perf_counter() - began
    probes = min(8, cells)
    while True:
        index.nprobe = probes
        began = time.perf_counter()
        recall, error = _recall(_search(index, first, k), truth)
        cost = time.perf_counter() - began
        if recall - _MARGIN * error >= min_recall:
            recall, _ = _recall(_search(index, second, k), _search(flat, second, k))
            if recall >= min_recall:
                break
        if cost > 0.5 * all_pairs or probes == cells:
            return None
        probes = min(2 * probes, cells)
    if cost > all_pairs:
        return None
    nearest = _search(index, queries, k)
    short = np.flatnonzero((nearest.indices < 0).any(1))
    if len(short):  # too few documents in the probed cells: rare, and answered exactly
        better = _search(flat, queries[short], k)
        nearest.indices[short], nearest.similarities[short] = better.indices, better.similarities
    nearest.exact, nearest.recall, nearest.queries = False, recall, _SAMPLE
    nearest.index = f"IVF, {cells} cells, {probes} probes"
    return nearest


class _Entries(Protocol):
    """Rows and columns of what a sparse matrix holds."""

    @property
    def row(self) -> np.ndarray: ...

    @property
    def col(self) -> np.ndarray: ...


@runtime_checkable
class SparseMatrix(Protocol):
    """A sparse matrix or array of SciPy."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def tocoo(self) -> _Entries: ...


@dataclass(frozen=True)
class Positives:
    """The documents that answer each query, as sparse data: query i has list ``of[i]``, and list j is
    ``documents[starts[j]:starts[j + 1]]``.

    ``own``: the document of each query that is its own answer (n,), whatever else answers it; None: all are.

    >>> sparse = Positives.given([[4], [], [2, 3]], 3, 5)
    >>> [each.tolist() for each in sparse.among(np.array([0, 2]))]
    [[0, 1, 1], [4, 2, 3]]
    """

    of: NDArray[np.integer]
    starts: NDArray[np.int64]
    documents: NDArray[np.integer]
    own: NDArray[np.integer] | None = None

    @classmethod
    def given(cls, positives: Answers, n: int, m: int) -> Positives:
        """From what `mine_negatives_on_disk` takes."""
        if isinstance(positives, Positives):
            return positives
        if isinstance(positives, (str, Path)):
            positives = _stored(Path(positives).expanduser())
        if isinstance(positives, SparseMatrix):
            if positives.shape != (n, m):
                raise NearfarError(
                    f"positives are {positives.shape}, and there are {n} queries and {m} documents"
                )
            sparse = positives.tocoo()
            positives = np.stack([sparse.row, sparse.col], 1)
        if isinstance(positives, np.ndarray) and positives.ndim == 2:
            row, column = _listed(positives, n, m)
        else:
            if isinstance(positives, (list, tuple)) and _like_pairs(positives, n):
                warnings.warn(
                    "positives are taken as lists of documents, two of each query; if they are meant as pairs of a "
                    "query and a document, give np.array(positives), of shape (p, 2)",
                    stacklevel=3,
                )
            row, column = pairs_of(positives, n, m)
        starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n))])
        return cls(np.arange(n), starts, column.astype(np.int32))

    @classmethod
    def same_query(cls, numbers: NDArray[np.integer], own: NDArray[np.integer] | None = None) -> Positives:
        """Document ``own[i]`` (None: i) answers query i and every query of the same text, by the numbers of texts."""
        own = np.arange(len(numbers), dtype=np.int32) if own is None else own
        order = np.argsort(numbers, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(numbers))])
        return cls(numbers, starts, own[order].astype(np.int32), own)

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many documents answer each query, (n,)."""
        return np.asarray((self.starts[1:] - self.starts[:-1])[self.of])

    def among(self, queries: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places among these queries, and the documents that answer them."""
        lists = self.of[queries]
        count = self.starts[lists + 1] - self.starts[lists]
        row = np.repeat(np.arange(len(queries)), count)
        first = np.repeat(self.starts[lists] - (np.cumsum(count) - count), count)
        return row, self.documents[first + np.arange(len(row))].astype(np.int64)


#: documents that answer queries, in every form that is taken
Answers: TypeAlias = Positives | SparseMatrix | Sequence[object] | np.ndarray | str | Path | None


def pairs_of(positives: Column | None, n: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Queries and documents of all positives, by query."""
    if positives is None:
        if n != m:
            raise NearfarError(
                f"{n} queries and {m} documents: without positives document i answers query i; give them"
            )
        every = np.arange(n)
        return every, every
    if len(positives) != n:
        raise NearfarError(f"positives are of {len(positives)} queries, but there are {n}")
    if isinstance(positives, np.ndarray) and positives.ndim == 1 and positives.dtype != object:
        row, column = (
            np.arange(n),
            array("positives", positives, "positions of documents", "iu").astype(np.int64),
        )
    else:
        lists = [
            np.atleast_1d(np.asarray(each if each is not None else [], dtype=object)) for each in positives
        ]
        row = np.repeat(np.arange(n), [len(each) for each in lists])
        flat = [value for each in lists for value in each.tolist()]
        column = np.array(
            [whole_number("an entry of positives", value, -1) for value in flat], dtype=np.int64
        )
    known = column >= 0  # -1: none
    row, column = row[known], column[known]
    if len(column) and int(column.max()) >= m:
        raise NearfarError(
            f"positives name document {int(column.max())}, but there are {m}: positions count from 0"
        )
    return _once(row, column, m)


def groups_of(
    queries: Column | None, corpus: Column | None, n: int, m: int
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """Numbers that are equal where texts are, but for spaces; texts that are missing are not."""
    if queries is None and corpus is None:
        return None, None
    if queries is None or corpus is None:
        raise NearfarError("query_texts and corpus_texts are compared with each other: give both, or neither")
    if len(queries) != n or len(corpus) != m:
        raise NearfarError(
            f"query_texts are {len(queries)} and corpus_texts {len(corpus)}; {n} and {m}, one for each, are needed"
        )
    numbers: dict[object, int] = {}
    out = []
    for texts in (queries, corpus):
        keys = (object() if no_text(text) else plain_text(text) for text in texts)
        out.append(np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64))
    return out[0], out[1]


def no_text(text: object) -> bool:
    """Whether there is no text: None, NaN, pandas' NA; such are not equal to each other.

    >>> [no_text(text) for text in (None, float("nan"), "", "None")]
    [True, True, False, False]
    """
    if isinstance(text, (float, np.floating)):
        return bool(text != text)
    return text is None or type(text).__name__ in ("NAType", "NaTType")


def plain_text(text: object) -> str:
    """What is compared of a text: all but its spaces.

    >>> plain_text(" a  b")
    'a b'
    """
    return " ".join(str(text).split())


def _listed(pairs: np.ndarray, n: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Checked pairs, by query; those of one query keep their order."""
    pairs = array("positives", pairs, "positions of queries and documents (p, 2)", "iu")
    if pairs.shape[1] != 2:
        raise NearfarError(f"positives are {pairs.shape}; pairs (p, 2) of a query and a document are needed")
    for name, values, count in (("query", pairs[:, 0], n), ("document", pairs[:, 1], m)):
        if len(values) and not (int(values.min()) >= 0 and int(values.max()) < count):
            raise NearfarError(
                f"positives name {name} {int(values.max() if values.max() >= count else values.min())}, but there are "
                f"{count}: positions count from 0"
            )
    order = np.argsort(pairs[:, 0], kind="stable")
    return _once(np.asarray(pairs[order, 0], np.int64), np.asarray(pairs[order, 1], np.int64), m)


def _once(
    row: NDArray[np.int64], column: NDArray[np.int64], m: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each pair once, in the order in which they stand."""
    first = np.sort(np.unique(row * m + column, return_index=True)[1])
    return (row, column) if len(first) == len(row) else (row[first], column[first])


def _stored(path: Path) -> np.ndarray:
    """Positions of answers from a ``.npy`` file."""
    if path.suffix.lower() != ".npy":
        raise NearfarError(
            f"positives={path}: pairs of positions are read from .npy; judgments by id are read by nearfar mine "
            "--qrels"
        )
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        raise NearfarError(
            f"{path} holds no array of whole numbers; write pairs of positions (p, 2) with numpy.save"
        ) from None
    except OSError as error:
        raise NearfarError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(stored, np.ndarray):  # an archive of several
        raise NearfarError(f"{path} holds several arrays; one of pairs of positions (p, 2) is needed")
    return stored


def _like_pairs(positives: Sequence[object], n: int) -> bool:
    """Whether a list that has an entry for each query reads as pairs of a query and a document, in order, too."""
    if len(positives) != n or not all(
        isinstance(each, (list, tuple)) and len(each) == 2 for each in positives
    ):
        return False
    first = [each[0] for each in positives if isinstance(each, (list, tuple))]
    return first == list(range(n))


def text_numbers(
    queries: Iterable[object] | None, corpus: Iterable[object] | None, n: int, m: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """Numbers that are equal where texts are, but for spaces, by 64 bits of their hash; None where there are none.

    Texts that are missing are not equal to each other.

    >>> queries, corpus = text_numbers(["a  b", "c"], ["c", "a b", "d"], 2, 3)
    >>> (queries[:, None] == corpus).tolist()
    [[False, True, False], [True, False, False]]
    """
    if queries is None and corpus is None:
        return None
    if queries is None or corpus is None:
        raise NearfarError("query_texts and corpus_texts are compared with each other: give both, or neither")
    keys = np.concatenate([np.fromiter(map(_hash, each), np.uint64) for each in (queries, corpus)])
    if len(keys) != n + m:
        raise NearfarError(f"{len(keys)} texts of queries and corpus; {n} and {m}, one for each, are needed")
    distinct, inverse = np.unique(keys, return_inverse=True)
    numbers, missing = inverse.astype(np.int32), keys == _NONE
    numbers[missing] = len(distinct) + np.arange(missing.sum(), dtype=np.int32)
    return numbers[:n], numbers[n:]


#: in place of the hash of a text that is missing
_NONE = 0


def _hash(text: object) -> int:
    if no_text(text):
        return _NONE
    return int.from_bytes(hashlib.blake2b(plain_text(text).encode(), digest_size=8).digest(), "little") or 1
