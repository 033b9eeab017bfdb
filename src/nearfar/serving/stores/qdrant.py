"""A store in Qdrant: a folder of its local mode, or a server by its address."""

from __future__ import annotations

import io
import os
import pickle
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.serving.stores.base import Columns, Head, Matches, VectorStore, table_name
from nearfar.serving.stores.filters import Condition, Kind

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models

__all__ = ["QdrantStore"]

_SPACE = uuid.UUID(
    "5a8c1c5e-6a53-4a0c-9f0e-6e6561726661"
)  # point ids are UUIDs, made of the row's id in this space
_ROWS = 256  # rows sent at once
_QUERIES = 64


class QdrantStore(VectorStore):
    """``qdrant:FOLDER`` (local mode: exact, meant for up to some ten thousand rows) or ``qdrant+http(s)://HOST:PORT``.

    The collection is ``nearfar``, or what follows a ``#``; a server's key stands in the environment variable
    ``QDRANT_API_KEY``. A server builds its own index (HNSW); from ``approximate_from`` rows on its recall is measured
    here.
    """

    form: ClassVar[str] = "qdrant:FOLDER or qdrant+http://HOST:PORT"
    approximate_from: ClassVar[int | None] = 20_000
    method: ClassVar[tuple[str, str]] = ("HNSW of the server", "ef")

    def __init__(self, place: str, client: QdrantClient, head: Head) -> None:
        super().__init__(place, head["dim"], head["columns"], head["about"], head["index"])
        self._client = client
        self._name = table_name(place)[1]
        if place.startswith("qdrant:"):
            self.approximate_from = None  # type: ignore[misc]  # local mode compares all rows

    @classmethod
    def require(cls) -> None:
        import qdrant_client  # noqa: F401

    @classmethod
    def exists(cls, place: str) -> bool:
        where, name = table_name(place)
        if where.startswith("qdrant:"):
            folder = where.removeprefix("qdrant:")
            return os.path.isdir(os.path.join(folder, "collection", name))
        client = _connect(place)
        try:
            with _errors(place):
                return bool(client.collection_exists(name))
        finally:
            client.close()

    @classmethod
    def create(
        cls, place: str, dim: int, kinds: Mapping[str, Kind], about: Mapping[str, object]
    ) -> QdrantStore:
        from qdrant_client import models

        client, name = _connect(place), table_name(place)[1]
        head: Head = {"dim": dim, "columns": dict(kinds), "about": dict(about), "index": None}
        try:
            with _errors(place):
                if client.collection_exists(name):
                    client.delete_collection(name)
                vectors = models.VectorParams(size=dim, distance=models.Distance.DOT)
                client.create_collection(name, vectors_config=vectors, metadata={"nearfar": head})
            return cls(place, client, head)
        except BaseException:
            client.close()
            raise

    @classmethod
    def open(cls, place: str) -> QdrantStore:
        if not cls.exists(place):
            where, name = table_name(place)
            raise NearfarError(f"{where} holds no collection '{name}'.")
        client, name = _connect(place), table_name(place)[1]
        try:
            with _errors(place):
                metadata = client.get_collection(name).config.metadata or {}
            head = metadata.get("nearfar")
            if not (isinstance(head, dict) and {"dim", "columns", "about", "index"} <= head.keys()):
                raise NearfarError(
                    f"{place}: the collection '{name}' was not filled by nearfar; name a different one, with #NAME."
                )
            return cls(place, client, cast(Head, head))
        except BaseException:
            client.close()
            raise

    def _save_head(self) -> None:
        head = {"dim": self.dim, "columns": self.kinds, "about": self.about, "index": self.index}
        with _errors(self.place):
            self._client.update_collection(self._name, metadata={"nearfar": head})

    def _upsert(self, ids: list[str], vectors: np.ndarray, columns: Columns) -> None:
        from qdrant_client import models

        fields = {self.fields[name]: values for name, values in columns.items()}
        with _errors(self.place):
            for begin in range(0, len(ids), _ROWS):
                points = [
                    models.PointStruct(
                        id=str(uuid.uuid5(_SPACE, ids[i])),
                        vector=vectors[i].tolist(),
                        payload={"id": ids[i]} | {f: v[i] for f, v in fields.items() if v[i] is not None},
                    )
                    for i in range(begin, min(begin + _ROWS, len(ids)))
                ]
                self._client.upsert(self._name, points, wait=True)
        self._save_head()

    def __len__(self) -> int:
        with _errors(self.place):
            return int(self._client.count(self._name, exact=True).count)

    def _count(self, where: Sequence[Condition]) -> int:
        with _errors(self.place):
            return int(self._client.count(self._name, count_filter=self._filter(where), exact=True).count)

    def _filter(self, where: Sequence[Condition]) -> models.Filter:
        from qdrant_client import models

        must: list[models.Condition] = []
        must_not: list[models.Condition] = []
        for each in where:
            # what a condition's values are follows from its kind, see `Condition`
            key, values = self.fields[each.column], list(cast(Any, each.values))
            if each.operator in ("in", "not in"):
                if each.kind == "text":
                    some: list[models.Condition] = [
                        models.FieldCondition(key=key, match=models.MatchAny(any=values))
                    ]
                elif each.kind == "boolean":
                    some = [
                        models.FieldCondition(key=key, match=models.MatchValue(value=value))
                        for value in values
                    ]
                else:  # a number is equal where it lies between equal bounds
                    some = [
                        models.FieldCondition(key=key, range=models.Range(gte=value, lte=value))
                        for value in values
                    ]
                if each.operator == "in":
                    must.append(models.Filter(should=some))
                else:
                    missing = models.IsEmptyCondition(is_empty=models.PayloadField(key=key))
                    must_not += [*some, missing]
            else:
                name = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}[each.operator]
                must.append(models.FieldCondition(key=key, range=models.Range(**{name: values[0]})))
        return models.Filter(must=must, must_not=must_not)

    def _search(
        self, vectors: np.ndarray, k: int, where: Sequence[Condition], effort: int | None
    ) -> list[Matches]:
        from qdrant_client import models

        parameters = None  # local mode is always exact
        if not self.place.startswith("qdrant:"):
            parameters = models.SearchParams(exact=effort is None, hnsw_ef=effort)
        condition = self._filter(where) if where else None
        answers = []
        with _errors(self.place):
            for begin in range(0, len(vectors), _QUERIES):
                requests = [
                    models.QueryRequest(
                        query=vector.tolist(), limit=k, filter=condition, params=parameters, with_payload=True
                    )
                    for vector in vectors[begin : begin + _QUERIES]
                ]
                for answer in self._client.query_batch_points(self._name, requests):
                    points = answer.points
                    answers.append(
                        Matches(
                            np.array([point.score for point in points], np.float32),
                            [str((point.payload or {})["id"]) for point in points],
                            [
                                {n: (point.payload or {}).get(f) for n, f in self.fields.items()}
                                for point in points
                            ],
                        )
                    )
        return answers

    def _sample(self, n: int) -> np.ndarray:
        from qdrant_client import models

        with _errors(self.place):
            query = models.SampleQuery(sample=models.Sample.RANDOM)
            points = self._client.query_points(self._name, query=query, limit=n, with_vectors=True).points
        return np.array([point.vector for point in points], np.float32).reshape(-1, self.dim)

    def _build(self, rows: int) -> tuple[Json, int, int]:
        return {}, 64, 4096  # the server builds it by itself

    def close(self) -> None:
        self._client.close()


def _connect(place: str) -> QdrantClient:
    from qdrant_client import QdrantClient

    where = table_name(place)[0]
    with _errors(place), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(insecure connection|Local mode is not recommended).*")
        if where.startswith("qdrant+"):
            return QdrantClient(url=where.removeprefix("qdrant+"), api_key=os.environ.get("QDRANT_API_KEY"))
        with _no_code_in_pickles():
            return QdrantClient(path=where.removeprefix("qdrant:"), force_disable_check_same_thread=True)


@contextmanager
def _errors(place: str) -> Iterator[None]:
    """What the client raises, as a message that says where."""
    import httpx
    from qdrant_client.http.exceptions import ApiException

    try:
        yield
    except NearfarError:
        raise
    except (
        ApiException,
        httpx.HTTPError,
        RuntimeError,
        ValueError,
        OSError,
        KeyError,
        pickle.PickleError,
    ) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise NearfarError(
            f"{place}: Qdrant could not do this ({first}). Is a server running there, or a different process using the "
            "folder?"
        ) from None


# -- local mode keeps its points as pickles ------------------------------------------------------------------
_PATCHING = threading.Lock()
_ALLOWED = {("qdrant_client.http.models.models", "PointStruct")}


class _PointsAlone(pickle.Unpickler):
    """Reads pickles that hold points of plain values, and refuses to load anything else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a point names {module}.{name}, and only plain values may stand there")


class _Pickle:
    """What Qdrant's local mode needs of the module ``pickle``, reading with `_PointsAlone`."""

    dumps = staticmethod(pickle.dumps)

    @staticmethod
    def loads(data: bytes) -> object:
        return _PointsAlone(io.BytesIO(data)).load()


@contextmanager
def _no_code_in_pickles() -> Iterator[None]:
    """While a folder is opened: its pickles may hold points alone. Loading an ordinary pickle runs what is in it."""
    from qdrant_client.local import persistence

    with _PATCHING:
        if getattr(persistence, "pickle", None) is not pickle:
            raise NearfarError(
                "this version of qdrant-client reads its folders in a way that nearfar does not know to be safe; "
                "take a server (qdrant+http://…), or a store in a folder NAME.faiss."
            )
        persistence.pickle = _Pickle
        try:
            yield
        finally:
            persistence.pickle = pickle
