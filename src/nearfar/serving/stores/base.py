"""What a store of vectors does: rows by id with columns, nearest rows, filters; exact, or with measured recall.

A store is a place: a folder ``NAME.faiss``, ``lance:FOLDER``, ``qdrant:FOLDER`` or ``qdrant+http(s)://HOST:PORT``,
``postgresql://…``. All but the first may end in ``#NAME``, the name of the table (``nearfar`` without).
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float

from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.serving.stores.filters import Condition, Kind, Value, parse_where

if TYPE_CHECKING:
    from nearfar.data.items import Column

__all__ = [
    "Matches",
    "VectorStore",
    "column_kind",
    "field_names",
    "plain_column",
    "plain_value",
    "table_name",
    "without_password",
]

Row = dict[str, Value | None]
Columns = dict[str, list[Value | None]]
#: the default name of a table or collection
TABLE = "nearfar"
_SAMPLE = 256  # queries by which recall is measured
_TOP = 10  # … of so many nearest rows
_RECALL = 0.95  # what an approximate search has to reach on these
_EXACT_INTEGER = 2**53  # beyond, a number is no longer every integer


class Matches(NamedTuple):
    """The nearest rows of one query, nearest first: cosines (m,), ids and the columns of each; m ≤ k."""

    scores: Float[np.ndarray, " m"]
    ids: list[str]
    rows: list[Row]


class Head(TypedDict):
    """What a store keeps of itself beside its rows."""

    dim: int
    columns: dict[str, Kind]
    about: Json
    index: Json | None


class VectorStore(ABC):
    """Vectors of ``dim`` numbers by id, with columns to show and to filter by.

    ``create`` makes an empty store, ``open`` reads one. ``add`` is an upsert by id, so that a fill that was
    interrupted may repeat its last chunk. ``finish`` makes a large store fast: from ``approximate_from`` rows on an
    approximate index is built, whose recall is measured and stated; below, and with ``exact=True``, every row is
    compared.

    Vectors are normalised, and scores are cosines; a vector of zeros has cosine 0 with everything. Rows of the same
    score are in the order of their ids. ``about`` is what the caller notes of the store, such as the model that made
    the vectors.
    """

    #: how a place of this kind is written, for messages
    form: ClassVar[str]
    #: rows from which on an approximate index is built; None: never by this library
    approximate_from: ClassVar[int | None]
    #: what the approximate index is called, and the name of what is raised until its recall suffices
    method: ClassVar[tuple[str, str]] = ("", "")

    def __init__(
        self,
        place: str,
        dim: int,
        kinds: Mapping[str, Kind],
        about: Mapping[str, object],
        index: Json | None = None,
    ) -> None:
        self.place, self.dim = place, dim
        self.kinds: dict[str, Kind] = dict(kinds)
        self.fields = field_names(self.kinds)
        self.about: Json = dict(about)
        #: facts of the approximate index: ``effort``, ``recall``, ``queries``, ``of``, ``rows``; None: search is exact
        self.index: Json | None = index

    # -- to define -------------------------------------------------------------------------------------------
    @classmethod
    @abstractmethod
    def exists(cls, place: str) -> bool:
        """Whether there is a store, or the beginning of one, at this place."""

    @classmethod
    @abstractmethod
    def create(
        cls, place: str, dim: int, kinds: Mapping[str, Kind], about: Mapping[str, object]
    ) -> VectorStore:
        """A new, empty store; what was at this place before is replaced."""

    @classmethod
    @abstractmethod
    def open(cls, place: str) -> VectorStore:
        """The store at this place."""

    @abstractmethod
    def _upsert(self, ids: list[str], vectors: np.ndarray, columns: Columns) -> None:
        """Write rows of distinct ids, and ``about``; what the store can do at once, it does at once."""

    @abstractmethod
    def _save_head(self) -> None:
        """Write ``about`` and ``index``."""

    @abstractmethod
    def _search(
        self, vectors: np.ndarray, k: int, where: Sequence[Condition], effort: int | None
    ) -> list[Matches]:
        """The nearest rows of unit vectors; ``effort`` None: compare all rows."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _count(self, where: Sequence[Condition]) -> int:
        """How many rows pass the conditions, of which there is at least one."""

    @classmethod
    def require(cls) -> None:
        """Import what this store is made with; ``ModuleNotFoundError`` where it is not installed."""

    def _sample(self, n: int) -> np.ndarray:
        """Vectors (m, dim) of rows drawn at random."""
        return np.zeros((0, self.dim), np.float32)

    def _build(self, rows: int) -> tuple[Json, int, int]:
        """Build the approximate index: what to note of it, and the least and the largest effort of a search."""
        raise NotImplementedError

    def _exact_is_faster(self, queries: int, effort: int, share: float) -> bool:
        """Whether so many queries are compared with this share of the rows in less time than the index takes."""
        return False

    def _forget_index(self) -> None:
        """Remove an approximate index."""

    def close(self) -> None:
        """Let go of files and connections."""

    # -- rows ------------------------------------------------------------------------------------------------
    def add(
        self,
        ids: Sequence[str],
        vectors: Float[np.ndarray, "n d"],
        columns: Mapping[str, Column] | None = None,
        about: Mapping[str, object] | None = None,
    ) -> None:
        """Write rows; a row whose id the store has is replaced, and of an id that comes twice the later row counts.

        Args:
            ids: texts, of rows.
            vectors: (n, dim), of any length; finite.
            columns: the values of every column of the store; None and NaN are missing.
            about: merged into ``about`` together with the rows.

        Raises:
            NearfarError: numbers that are not finite, columns or values that do not fit the store.
        """
        ids = [str(identity) for identity in ids]
        rows = self._checked(ids, vectors)
        given = dict(columns or {})
        if set(given) != set(self.kinds):
            differing = ", ".join(sorted(set(given) ^ set(self.kinds)))
            raise NearfarError(f"{self.shown}: its columns and those of the rows to add differ: {differing}.")
        values = {name: self._column(name, ids, given[name]) for name in self.kinds}
        last = {identity: at for at, identity in enumerate(ids)}
        if len(last) < len(ids):
            kept = sorted(last.values())
            ids, rows = [ids[i] for i in kept], rows[kept]
            values = {name: [column[i] for i in kept] for name, column in values.items()}
        self.about |= dict(about or {})
        if ids:
            self._upsert(ids, rows, values)
        else:
            self._save_head()

    def note(self, **about: object) -> None:
        """Change what is noted of the store."""
        self.about |= about
        self._save_head()

    def _checked(self, ids: Sequence[str], vectors: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(vectors, dtype=np.float32)
        if rows.ndim != 2 or len(rows) != len(ids):
            raise NearfarError(
                f"{self.shown}: vectors of shape {rows.shape} were given for {len(ids)} ids; ({len(ids)}, "
                f"{self.dim}) is expected."
            )
        rows = self._units(rows)
        for identity in ids:
            if not identity:
                raise NearfarError(f"{self.shown}: an id is empty.")
        return rows

    def _units(self, vectors: np.ndarray) -> np.ndarray:
        if vectors.shape[1] != self.dim:
            raise NearfarError(
                f"{self.shown} holds vectors of {self.dim} numbers, and these have {vectors.shape[1]}: it was filled "
                "by a different model. Name a different place, or fill it anew."
            )
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise NearfarError(f"{self.shown}: vector {bad[0]} holds numbers that are not finite.")
        # in float64: the squares of large float32 numbers overflow
        norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))[:, None]
        return np.ascontiguousarray(vectors / np.where(norms > 0, norms, 1.0), dtype=np.float32)

    def _column(self, name: str, ids: Sequence[str], values: Column) -> list[Value | None]:
        if len(values) != len(ids):
            raise NearfarError(f"{self.shown}: column '{name}' has {len(values)} values for {len(ids)} rows.")
        plain = values.tolist() if isinstance(values, np.ndarray) else values
        try:
            return [stored(value, self.kinds[name]) for value in plain]
        except ValueError:
            for identity, value in zip(ids, plain, strict=True):
                try:
                    stored(value, self.kinds[name])
                except ValueError as error:
                    raise NearfarError(f"{self.shown}: '{name}' of the row '{identity}' {error}.") from None
            raise

    # -- search ----------------------------------------------------------------------------------------------
    def search(
        self,
        vectors: Float[np.ndarray, "q d"],
        k: int = 10,
        where: str | Sequence[str] | None = None,
        exact: bool = False,
    ) -> list[Matches]:
        """The ``k`` rows of largest cosine for each query, among those that pass the filter (`parse_where`).

        Args:
            vectors: (q, dim), of any length.
            k: how many rows; fewer come only where fewer pass the filter.
            where: the filter; None: all rows.
            exact: compare with every row, also where there is an approximate index.

        Raises:
            NearfarError: k below 1, a filter that cannot be read, vectors of a different length or that are not finite.
        """
        if k < 1:
            raise NearfarError(f"k={k}: at least one row is needed.")
        rows = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
        rows = self._units(rows)
        conditions = parse_where(where, self.kinds)
        effort, share = (None, 1.0) if exact else self._effort(conditions)
        if effort is not None and self._exact_is_faster(len(rows), effort, share):
            effort = None
        answers = self._search(rows, k, conditions, effort)
        if effort is not None:
            short = [i for i, matches in enumerate(answers) if len(matches.ids) < k]
            if short:  # too few rows where the index looked: rare, and answered exactly
                for i, better in zip(short, self._search(rows[short], k, conditions, None), strict=True):
                    answers[i] = better
        return [_in_order(matches) for matches in answers]

    def count(self, where: str | Sequence[str] | None = None) -> int:
        """How many rows pass a filter."""
        conditions = parse_where(where, self.kinds)
        return self._count(conditions) if conditions else len(self)

    def _effort(self, where: Sequence[Condition]) -> tuple[int | None, float]:
        """How far the index looks, and the share of the rows that pass: farther where these are few, since the nearest
        of them are farther away. None: all rows are compared."""
        if self.index is None:
            return None, 1.0
        effort, most, share = int(self.index["effort"]), int(self.index["most"]), 1.0
        if where:
            share = max(1, self._count(where)) / max(1, len(self))
            effort = int(np.ceil(effort / share))
        return (effort if effort < most else None), share

    def recall(
        self, vectors: Float[np.ndarray, "q d"], k: int = _TOP, where: str | Sequence[str] | None = None
    ) -> float:
        """The share of the exact ``k`` nearest rows that the search by the index gives for these queries; else 1.

        A row that scores as high as the k-th of the exact search counts as one of them.
        """
        if self.index is None or not len(vectors):
            return 1.0
        rows, conditions = self._units(np.asarray(vectors, np.float32)), parse_where(where, self.kinds)
        truth = self._search(rows, k, conditions, None)
        return _recall(self._search(rows, k, conditions, self._effort(conditions)[0]), truth)

    def finish(self, queries: Float[np.ndarray, "q d"] | None = None, of: str = "") -> None:
        """After the last row: build the index that a large store needs, and measure its recall.

        The effort of a search is doubled until the recall of the 10 nearest reaches .95. ``queries`` are vectors like
        those that will be asked for (256 suffice), and ``of`` says what they are; without, rows of the store are
        taken.
        """
        rows = len(self)
        if self.approximate_from is None or rows < self.approximate_from:
            if self.index is not None:
                self._forget_index()
                self.index = None
                self._save_head()
            return
        if self.index is not None and self.index.get("rows") == rows and queries is None:
            return
        facts, effort, most = self._build(rows)
        own = queries is None
        # A row finds itself, which proves nothing: it is asked for one more, and leaves itself out.
        sample = self._sample(_SAMPLE) if queries is None else self._units(np.asarray(queries, np.float32))
        sample = sample[:_SAMPLE]
        truth = self._search(sample, _TOP + own, [], None)
        while True:
            recall = _recall(self._search(sample, _TOP + own, [], effort), truth, first=int(own))
            if recall >= _RECALL or effort >= most:
                break
            effort = min(2 * effort, most)
        measured = {"effort": effort, "most": most, "recall": recall, "queries": len(sample), "k": _TOP}
        self.index = facts | measured | {"rows": rows, "of": of or "rows of the store"}
        self._save_head()

    # -- description -----------------------------------------------------------------------------------------
    @property
    def shown(self) -> str:
        """The place without a password."""
        return without_password(self.place)

    @property
    def description(self) -> str:
        """Place, size, and how it is searched: exactly, or approximately and with which recall."""
        size = f"{self.shown}: {len(self):,} vectors of {self.dim} numbers"
        if self.index is None:
            return f"{size}, compared one by one (exact)"
        facts, (kind, knob) = self.index, self.method
        return (
            f"{size}, {kind} ({knob} {facts['effort']}): recall@{facts['k']} {facts['recall']:.3f}, measured with "
            f"{facts['queries']} {facts['of']}"
        )

    def __enter__(self) -> VectorStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def without_password(place: str) -> str:
    """A place as messages show it.

    >>> without_password("postgresql://me:secret@host/db?password=x#cats")
    'postgresql://me:***@host/db?password=***#cats'
    """
    place = re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", place)
    return re.sub(r"(password=)[^&#]*", r"\1***", place, flags=re.IGNORECASE)


def _in_order(matches: Matches) -> Matches:
    order = sorted(range(len(matches.ids)), key=lambda i: (-matches.scores[i], matches.ids[i]))
    return Matches(
        np.asarray([matches.scores[i] for i in order], np.float32),
        [matches.ids[i] for i in order],
        [matches.rows[i] for i in order],
    )


def _recall(answers: Sequence[Matches], truth: Sequence[Matches], first: int = 0) -> float:
    """Mean share of true rows, those of rank ``first`` and later; a tie with the last of them is as good as it."""
    shares = []
    for answer, true in zip(answers, truth, strict=True):
        k = len(true.ids)
        if k <= first:
            continue
        edge = min(true.scores) - 1e-6
        hits = sum(score >= edge for score in answer.scores)
        shares.append((min(hits, k) - first) / (k - first))
    return float(np.mean(shares)) if shares else 1.0


# -- columns -------------------------------------------------------------------------------------------------
def column_kind(values: Iterable[object] | np.ndarray) -> Kind:
    """What a column holds: numbers or Booleans where every value that is not missing is one, and texts otherwise.

    Whole numbers too large to be told apart as float64 are texts.

    >>> column_kind([1, 2.5, None]), column_kind(["1", "2"]), column_kind([True]), column_kind([2**60])
    ('number', 'text', 'boolean', 'text')
    """
    plain = values.tolist() if isinstance(values, np.ndarray) else list(values)
    present = [value for value in plain if value is not None and value == value]
    if present and all(isinstance(value, bool) for value in present):
        return "boolean"
    numbers = present and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in present)
    if numbers and all(not isinstance(v, int) or abs(v) <= _EXACT_INTEGER for v in present):
        return "number"
    return "text"


def plain_value(text: object) -> object:
    """A text of a table as the number or Boolean that it states, or as it is; other values as they are.

    A number with a leading zero, such as a postal code, is a text.

    >>> [plain_value(text) for text in ("12", "-0.5e3", "007", "TRUE", "nan", "1_000", None)]
    [12.0, -500.0, '007', True, 'nan', '1_000', None]
    """
    if not isinstance(text, str):
        return text
    if _NUMBER.fullmatch(text):
        number = float(text)
        exact = abs(number) <= _EXACT_INTEGER or "." in text or "e" in text.lower()
        return number if math.isfinite(number) and exact else text
    return {"true": True, "false": False}.get(text.lower(), text)


_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*)?(\.[0-9]+)?([eE][+-]?[0-9]+)?(?<=[0-9])")


def plain_column(values: Iterable[object] | np.ndarray) -> list[object]:
    """A column of a table as numbers or Booleans where all of its texts state such, and as it is otherwise.

    >>> plain_column(["1", None, "2.5"]), plain_column(["1", "x"])
    ([1.0, None, 2.5], ['1', 'x'])
    """
    given = values.tolist() if isinstance(values, np.ndarray) else list(values)
    plain = [plain_value(value) for value in given]
    return plain if column_kind(plain) != "text" else given


def stored(value: Any, kind: Kind) -> Value | None:
    """A value as a column of this kind keeps it; None for what is missing; ``ValueError`` for what does not fit.

    >>> stored(3, "number"), stored(float("nan"), "number"), stored(["a"], "text")
    (3.0, None, '["a"]')
    """
    if value is None or value != value:
        return None
    if kind == "boolean":
        if not isinstance(value, bool):
            raise ValueError(f"is {str(value)[:40]!r}, and the column holds true or false")
        return value
    if kind == "number":
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"is {str(value)[:40]!r}, and the column holds numbers") from None
        if not math.isfinite(number):
            raise ValueError("is infinite")
        return number
    if isinstance(value, (list, tuple, dict)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character, which is no text") from None
    return text


_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,47}")
_RESERVED = {"id", "vector"}


def field_names(columns: Iterable[str]) -> dict[str, str]:
    """For each column the name under which a database keeps it: its own where that is a plain word, else a number.

    >>> field_names(["lang", "Preis in €", "id", "Lang"])
    {'lang': 'lang', 'Preis in €': 'column_1', 'id': 'column_2', 'Lang': 'column_3'}
    """
    names: dict[str, str] = {}
    taken = set(_RESERVED)
    for number, column in enumerate(columns):
        plain = _PLAIN.fullmatch(column) and column.lower() not in taken
        name = column if plain and not column.lower().startswith("column_") else f"column_{number}"
        names[column] = name
        taken.add(name.lower())
    return names


def table_name(place: str) -> tuple[str, str]:
    """A place without its table, and the table.

    >>> table_name("lance:folder#molecules"), table_name("lance:folder")
    (('lance:folder', 'molecules'), ('lance:folder', 'nearfar'))
    """
    where, _, table = place.partition("#")
    table = table or TABLE
    if not _PLAIN.fullmatch(table):
        raise NearfarError(
            f"{table!r} is no name of a table: it is made of letters, digits and _, begins with a letter, and has at "
            "most 48 characters."
        )
    return where, table
