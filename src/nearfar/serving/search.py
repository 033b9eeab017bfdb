"""Search with a trained run: which tower reads the query, which view is searched, and hits that show what they are."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from nearfar.data.chunks import NewData, read_chunks
from nearfar.data.items import Column, Items
from nearfar.errors import NearfarError
from nearfar.serving.fill import Advance, Say, file_source, open_gallery, value_store
from nearfar.serving.stores import Matches, VectorStore, is_place, open_store
from nearfar.towers.build import PICTURES

if TYPE_CHECKING:
    from rich.table import Table

    from nearfar.serving.trained import Trained

__all__ = ["Hit", "Hits", "gallery_of", "hits_page", "query_view", "read_queries", "search"]

_SIDE = 190  # pixels of a picture of a hit
_LETTERS = 160  # of a text of a hit on a page
_CELL = 60  # … in the terminal
_MOLECULE_SIGNS = frozenset("=#()[]@/\\+0123456789")


@dataclass(frozen=True)
class Hit:
    """One answer: its cosine with the query, its id, and the columns of the gallery.

    >>> hit = Hit(1, 0.5, "a", {"text": "near"})
    >>> hit["text"], hit.score
    ('near', 0.5)
    """

    rank: int
    score: float
    id: str
    row: Mapping[str, object]

    def __getitem__(self, column: str) -> object:
        if column not in self.row:
            raise NearfarError(
                f"the gallery has no column '{column}'; it has {', '.join(self.row) or 'none'}"
            )
        return self.row[column]


@dataclass
class Hits(Sequence[Hit]):
    """The answers to one query, best first. A notebook shows them with texts, pictures and molecules.

    ``view`` is that of the query, ``target`` the one that was searched, ``kinds`` are those of views among the columns,
    ``how`` says over how many rows, and whether all were compared.
    """

    query: object
    hits: list[Hit]
    view: str = ""
    target: str = ""
    kinds: Mapping[str, str] = field(default_factory=dict)
    how: str = ""

    def __len__(self) -> int:
        return len(self.hits)

    @overload
    def __getitem__(self, at: int) -> Hit: ...

    @overload
    def __getitem__(self, at: slice) -> list[Hit]: ...

    def __getitem__(self, at: int | slice) -> Hit | list[Hit]:
        return self.hits[at]

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    @property
    def columns(self) -> list[str]:
        """The columns of the gallery: the view that was searched, the other views, everything else."""
        names = list(self.hits[0].row) if self.hits else []
        first = [name for name in names if name == self.target]
        views = [name for name in names if name in self.kinds and name not in first]
        return [*first, *views, *(name for name in names if name not in (*first, *views))]

    @property
    def title(self) -> str:
        """The query and the two views."""
        return f"{_query_text(self.query)} · {self.view} → {self.target}"

    def table(self, columns: int = 4) -> Table:
        """A table for the terminal, with the first columns."""
        from rich.markup import escape
        from rich.table import Table

        shown = self.columns[:columns]
        table = Table(title=escape(self.title), title_justify="left", title_style="")
        # What may not be broken keeps its width; were no column to give way, Rich would narrow these to nothing.
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("cosine", justify="right", no_wrap=True)
        table.add_column("id", overflow="ellipsis", no_wrap=True)
        for name in shown:
            table.add_column(escape(name), overflow="ellipsis")
        for hit in self.hits:
            cells = [hit.id, *(_cell(hit.row[name]) for name in shown)]
            # Escaped, because Rich takes [nH] for a style and leaves it out.
            table.add_row(str(hit.rank), f"{hit.score:.3f}", *(escape(cell) for cell in cells))
        return table

    def _repr_html_(self) -> str:
        cards = "".join(self._card(hit) for hit in self.hits) or "<p>no row passes the filter</p>"
        asked = (
            _shown(self.query, self.kinds.get(self.view, "text"))
            if self.kinds.get(self.view) != "text"
            else ""
        )
        return (
            f'<section class="nearfar-hits" style="font:13px/1.4 system-ui,sans-serif">'
            f'<h2 style="font-size:15px;margin:16px 0 2px">{html.escape(self.title)}</h2>'
            f'<p style="margin:0 0 8px;opacity:.7">{html.escape(self.how)}</p>{asked}'
            f'<div style="display:flex;flex-wrap:wrap;gap:8px">{cards}</div></section>'
        )

    def _card(self, hit: Hit) -> str:
        parts = [
            f'<div style="display:flex;gap:6px"><b>{hit.rank}.</b><span>{hit.score:.3f}</span>'
            f'<span style="opacity:.7;overflow-wrap:anywhere">{html.escape(hit.id)}</span></div>'
        ]
        others = []
        for name in self.columns:
            value = hit.row[name]
            if value is None:
                continue
            if name in self.kinds:
                parts.append(_shown(value, self.kinds[name]))
            else:
                others.append(f"{html.escape(name)} {html.escape(_cell(value))}")
        if others:
            parts.append(f'<div style="opacity:.7;overflow-wrap:anywhere">{" · ".join(others)}</div>')
        style = "width:200px;border:1px solid #8884;border-radius:6px;padding:8px;box-sizing:border-box"
        return f'<div style="{style}">{"".join(parts)}</div>'


def _query_text(query: object) -> str:
    if isinstance(query, (str, Path)):
        text = " ".join(str(query).split())
        return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
    return f"{np.asarray(query).size} numbers"


def _cell(value: object) -> str:
    """A value in a cell: on one line, and cut."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if text.startswith("data:image/"):
        return "(picture)"
    text = " ".join(text.split())
    return text if len(text) <= _CELL else text[: _CELL - 1] + "…"


def _shown(value: object, kind: str) -> str:
    """A value as HTML: a drawn molecule, a picture made anew from its file, or its text; everything is escaped."""
    if kind == "molecule" and isinstance(value, str):
        from nearfar.systems.molecules.system import draw

        return (
            draw(value, _SIDE, 140)
            + f'<div style="overflow-wrap:anywhere;opacity:.7">{_letters(value)}</div>'
        )
    if kind == "image":
        address = _picture_address(value)
        if address is not None:
            style = f"max-width:100%;max-height:{_SIDE}px;display:block"
            return f'<img alt="" style="{style}" src="{html.escape(address)}">'
        return f"<div>(no picture at {_letters(value)})</div>"
    if isinstance(value, (str, float, bool)):
        return f'<div style="overflow-wrap:anywhere">{_letters(value)}</div>'
    return ""


def _letters(value: object) -> str:
    text = str(value)
    return html.escape(text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…")


def _picture_address(value: object) -> str | None:
    """A picture as a data address: of a file or an array, or as it was kept; None where there is none."""
    import base64

    from nearfar.data.images import thumbnail

    start = "data:image/png;base64,"
    if isinstance(value, str) and value.startswith(start):
        return value
    try:
        return start + base64.b64encode(thumbnail(value, _SIDE)).decode()
    except (NearfarError, OSError, ValueError, TypeError):
        return None


def hits_page(answers: Iterable[Hits]) -> str:
    """A page of its own with the hits of every query."""
    body = "".join(answer._repr_html_() for answer in answers)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>nearfar search</title><style>:root{color-scheme:light dark}body{margin:16px}"
        f"svg{{background:#fff;border-radius:4px;max-width:100%}}</style><body>{body}</body></html>\n"
    )


# -- queries -------------------------------------------------------------------------------------------------
def query_view(trained: Trained, queries: Column, tower: str | None = None) -> str:
    """The view whose tower reads the queries: the one that is named, the only one, or the one that they look like.

    Names of picture files are pictures; what reads as a SMILES, has no blank and is no word is a molecule; other
    texts go to the only view of texts.

    Raises:
        NearfarError: several views could be meant, or a picture is not there.
    """
    if tower is not None or len(trained.views) < 2:
        return trained.view_of(queries, tower)
    by_kind: dict[str, list[str]] = {}
    for view in trained.views:
        by_kind.setdefault(trained.kind(view), []).append(view)
    plain = [str(query) for query in queries] if not isinstance(queries, np.ndarray) else []
    if plain and all(isinstance(query, (str, Path)) for query in queries):
        pictures = "image" in by_kind and all(text.lower().endswith(PICTURES) for text in plain)
        missing = next((text for text in plain if pictures and not Path(text).is_file()), None)
        if missing is not None:
            words = f" To search by these words: --tower {by_kind['text'][0]}." if "text" in by_kind else ""
            raise NearfarError(f"{missing}: no such picture.{words}")
        molecules = "molecule" in by_kind and all(map(_is_smiles, plain))
        kind = "image" if pictures else "molecule" if molecules else "text"
        if len(by_kind.get(kind, ())) == 1:
            return by_kind[kind][0]
    return trained.view_of(queries)


def _is_smiles(text: str) -> bool:
    if not text or any(sign.isspace() for sign in text):
        return False
    if not (text.isupper() or _MOLECULE_SIGNS & set(text)):
        return False
    from nearfar.data.molecules.smiles import parse_smiles

    return parse_smiles(text)[0] is not None


def _checked(trained: Trained, queries: Column, view: str) -> None:
    for at, query in enumerate(queries):
        if isinstance(query, str) and not query.strip():
            which = "the query is empty" if len(queries) == 1 else f"query {at + 1} is empty"
            raise NearfarError(f"{which}: give a text, the path of a picture, or a SMILES.")
    for query, reason in zip(queries, trained.check(queries, view), strict=True):
        if reason is not None:
            others = [each for each in trained.views if each != view]
            advice = (
                f" To search by {' or '.join(others)}, say so with --tower {others[0]}." if others else ""
            )
            raise NearfarError(
                f"the query {_query_text(query)!r} cannot be read as '{view}' ({trained.kind(view)}): {reason}.{advice}"
            )


def read_queries(
    trained: Trained, data: NewData, column: str | None = None, tower: str | None = None
) -> tuple[Items, str]:
    """The queries of a file, and their view: a text a line, or the column of the view in a table.

    Raises:
        NearfarError: no such column, a query that cannot be read (which, and why), no query.
    """
    if tower is None and len(trained.views) > 1:
        texts = [view for view in trained.views if trained.kind(view) == "text"]
        if len(texts) != 1:
            raise NearfarError(
                f"{data.path}: say which view the queries are with --tower: {', '.join(trained.views)}."
            )
        tower = texts[0]
    view = trained.view_of((), tower)
    known: Mapping[str, Sequence[str]] = getattr(trained.system, "view_headers", dict)()
    headers = known.get(view, [view])
    named = {} if column is None else {view: column}
    parts = list(read_chunks(replace(data, columns=named), {view: [*headers, "query"]}))
    ids, values = [], []
    for part in parts:
        present = np.flatnonzero(part.present(view))
        for row in sorted(set(range(len(part))) - set(present.tolist())):
            part.rejections.add("no query", part.rows[row] if part.rows else None, part.ids[row])
        some = part.take(present)
        ids += some.ids
        values += list(some[view])
    if not values:
        raise NearfarError(f"{data.path} holds no query.")
    columns = np.stack(values) if isinstance(values[0], np.ndarray) else values
    items = Items(ids, {view: columns}, str(data.path))
    for part in parts:
        items.rejections.extend(part.rejections)
    return items, view


# -- search --------------------------------------------------------------------------------------------------
#: what is searched: a store, its place, a file or folder, a list of values; None: the data that the run was trained on
Searched = VectorStore | NewData | str | Path | Column | None


def gallery_of(
    trained: Trained,
    gallery: Searched = None,
    target: str | None = None,
    query: str | None = None,
    *,
    place: str | None = None,
    refill: bool = False,
    say: Say = lambda _: None,
    advance: Advance = lambda _: None,
) -> VectorStore:
    """What is searched, as a store: a list of values, a table or folder, a store or its place, None: the run's data.

    Other arguments and errors are those of `open_gallery`.
    """
    if isinstance(gallery, VectorStore):
        return gallery
    if isinstance(gallery, str) and is_place(gallery):
        place, gallery = gallery, None
        if not refill:
            open_store(place).close()  # an error where there is none
    source = None
    if isinstance(gallery, NewData):
        source = file_source(trained, gallery)
    elif isinstance(gallery, (str, Path)):
        source = file_source(trained, NewData(Path(gallery)))
    elif gallery is not None:
        if not len(gallery):
            raise NearfarError("the gallery is empty: there is nothing to search in.")
        return value_store(trained, gallery, query_view(trained, gallery, target))
    return open_gallery(
        trained, source, target, query=query, place=place, refill=refill, say=say, advance=advance
    )


def search(
    trained: Trained,
    queries: Column,
    store: VectorStore,
    k: int = 10,
    *,
    view: str,
    where: str | Sequence[str] | None = None,
    exact: bool = False,
) -> list[Hits]:
    """The ``k`` rows of a store nearest to each query, which the tower of ``view`` reads; see `Trained.search`."""
    if k < 1:
        raise NearfarError(f"k={k}: at least one answer is needed.")
    _checked(trained, queries, view)
    vectors = trained.vectors(queries, view)
    kinds = {view: trained.kind(view)} | dict(store.about.get("kinds", {}))
    target = str(store.about.get("view", "store"))
    how = _how(store, exact)
    answers = store.search(vectors, k, where, exact)
    return [
        Hits(query, _hits(matches), view, target, kinds, how)
        for query, matches in zip(queries, answers, strict=True)
    ]


def _hits(matches: Matches) -> list[Hit]:
    rows = zip(matches.scores.tolist(), matches.ids, matches.rows, strict=True)
    return [Hit(rank, score, identity, row) for rank, (score, identity, row) in enumerate(rows, start=1)]


def _how(store: VectorStore, exact: bool) -> str:
    source = store.about.get("source", store.shown)
    rows = f"{len(store):,} rows of {source}"
    if exact or store.index is None:
        return f"{rows}, all compared"
    facts = store.index
    return (
        f"{rows}, by an index: recall@{facts['k']} {facts['recall']:.3f} on {facts['queries']} {facts['of']}"
    )
