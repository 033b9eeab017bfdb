"""Stores of vectors: one interface, from a file beside the run to a server.

>>> import tempfile
>>> import numpy as np
>>> store = create_store(f"{tempfile.mkdtemp()}/words.faiss", dim=2, kinds={"lang": "text"})
>>> store.add(["near", "nah"], np.array([[1.0, 0.0], [0.6, 0.8]]), {"lang": ["en", "de"]})
>>> [matches.ids for matches in store.search(np.array([[1.0, 0.1]]), k=2)]
[['near', 'nah']]
>>> store.search(np.array([[1.0, 0.1]]), k=2, where="lang=de")[0].rows
[{'lang': 'de'}]
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from nearfar.errors import NearfarError
from nearfar.serving.stores.base import Matches, VectorStore, column_kind, plain_column, plain_value
from nearfar.serving.stores.filters import Condition, Kind, parse_where

__all__ = [
    "Condition",
    "Kind",
    "Matches",
    "VectorStore",
    "column_kind",
    "create_store",
    "is_place",
    "open_store",
    "parse_where",
    "plain_column",
    "plain_value",
    "store_exists",
]

#: how a place begins, the class of its store, and the package and extra that it needs
_STORES = {
    "lance:": ("nearfar.serving.stores.lance:LanceStore", "lancedb", "lance"),
    "qdrant:": ("nearfar.serving.stores.qdrant:QdrantStore", "qdrant-client", "qdrant"),
    "qdrant+http://": ("nearfar.serving.stores.qdrant:QdrantStore", "qdrant-client", "qdrant"),
    "qdrant+https://": ("nearfar.serving.stores.qdrant:QdrantStore", "qdrant-client", "qdrant"),
    "postgresql://": ("nearfar.serving.stores.postgres:PostgresStore", "psycopg", "postgres"),
    "postgres://": ("nearfar.serving.stores.postgres:PostgresStore", "psycopg", "postgres"),
}


def _class_of(place: str) -> type[VectorStore]:
    if place.rstrip("/").endswith(".faiss"):
        name, package, extra = "nearfar.serving.stores.faiss_file:FaissStore", "faiss", ""
    else:
        start = next(
            (start for start in sorted(_STORES, key=len, reverse=True) if place.startswith(start)), None
        )
        if start is None or place == start:
            raise NearfarError(
                f"{place!r} is no place of a store. Write FOLDER.faiss, lance:FOLDER, qdrant:FOLDER, "
                "qdrant+http://HOST:PORT or postgresql://USER@HOST/DATABASE."
            )
        name, package, extra = _STORES[start]
    module, attribute = name.split(":")
    try:
        loaded: type[VectorStore] = getattr(importlib.import_module(module), attribute)
        loaded.require()
    except ModuleNotFoundError as error:
        raise NearfarError(
            f"{place.split(':')[0]}: this store needs {error.name or package}, which is not installed. Install it "
            f"with: pip install 'nearfar[{extra}]'"
        ) from None
    return loaded


def is_place(text: str) -> bool:
    """Whether a text is written as the place of a store, and not as that of a table.

    >>> is_place("lance:gallery"), is_place("gallery.faiss"), is_place("gallery.csv")
    (True, True, False)
    """
    return text.startswith(tuple(_STORES)) or text.rstrip("/").endswith(".faiss")


def store_exists(place: str) -> bool:
    """Whether there is a store at this place."""
    return _class_of(place).exists(place)


def open_store(place: str) -> VectorStore:
    """The store at a place; ``NearfarError`` where there is none, or it is damaged."""
    return _class_of(place).open(place)


def create_store(
    place: str, dim: int, kinds: Mapping[str, Kind] | None = None, about: Mapping[str, object] | None = None
) -> VectorStore:
    """A new, empty store at a place; a store that was there before is replaced.

    Args:
        place: ``FOLDER.faiss``, ``lance:FOLDER``, ``qdrant:FOLDER``, ``qdrant+http(s)://HOST:PORT`` or
        ``postgresql://…``;
            all but the first may end in ``#TABLE``.
        dim: length of the vectors.
        kinds: the columns, and whether each holds ``text``, ``number`` or ``boolean``.
        about: what the caller notes of the store, as JSON can hold it.
    """
    return _class_of(place).create(place, dim, kinds or {}, about or {})
