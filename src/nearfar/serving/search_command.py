"""The command ``nearfar search``: hits in the terminal, in a table, on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nearfar.data.chunks import NewData
from nearfar.data.files import Json, write_atomically
from nearfar.data.items import Column, Items
from nearfar.errors import NearfarError
from nearfar.serving.search import Hits, gallery_of, hits_page, query_view, read_queries, search
from nearfar.serving.stream import TABLE_ENDINGS, require_writable, write_rows
from nearfar.serving.trained import Trained, load
from nearfar.terminal import console as terminal_console
from nearfar.terminal import progress_bar, say

if TYPE_CHECKING:
    from rich.console import Console

    from nearfar.serving.stores import VectorStore

__all__ = ["Asked", "run_search"]

_SHOWN = 10  # queries of a file whose hits are printed
_ON_PAGE = 200  # … and put on a page
_AT_ONCE = 1024  # queries that are searched together
_JUDGED = 32  # queries with which recall is measured, where there are so many


@dataclass(frozen=True)
class Asked:
    """What is asked for: one query, or a file of them and their column."""

    query: str | None
    file: NewData | None = None
    column: str | None = None

    def check(self) -> None:
        if (self.query is None) == (self.file is None):
            raise NearfarError("give a query, or a file of them with --queries FILE.")
        if self.query is not None and not self.query.strip():
            raise NearfarError("the query is empty: give a text, the path of a picture, or a SMILES.")


def run_search(
    run: Path,
    asked: Asked,
    source: NewData | None,
    console: Console,
    *,
    place: str | None,
    where: Sequence[str],
    tower: str | None,
    target: str | None,
    k: int,
    output: Path | None,
    page: Path | None,
    exact: bool,
    refill: bool,
    device: str,
) -> None:
    """Search and show; every mistake that can be told before the work is told then."""
    asked.check()
    if k < 1:
        raise NearfarError(f"-k {k}: at least one answer is needed.")
    if page is not None:
        require_writable(page, "hits.html")
    if output is not None:
        require_writable(output, "hits.csv")
        if output.suffix.lower() not in TABLE_ENDINGS:
            raise NearfarError(f"{output}: hits are written as {', '.join(TABLE_ENDINGS)}.")
    trained = load(run, device)
    items, view = _queries(trained, asked, tower, console)
    with progress_bar(None) as advance:
        store = gallery_of(
            trained,
            source,
            target,
            view,
            place=place,
            refill=refill,
            say=lambda text: say(terminal_console(stderr=True), text, style="dim"),
            advance=advance,
        )
    with store:
        _announce(trained, store, items, view, k, where, exact, console)
        answers: list[Hits] = []
        values = items[view]
        for start in range(0, len(items), _AT_ONCE):
            some = values[start : start + _AT_ONCE]
            answers += search(trained, some, store, k, view=view, where=where, exact=exact)
    for answer in answers[:_SHOWN]:
        console.print(answer.table(), soft_wrap=False)
    if len(answers) > _SHOWN:
        more = "" if output is not None else "; write all hits with -o hits.csv"
        say(console, f"… and {len(answers) - _SHOWN:,} more queries{more}")
    if output is not None:
        write_rows(_rows(items, answers), output)
        say(console, f"hits: {output}")
    if page is not None:
        content = hits_page(answers[:_ON_PAGE])
        write_atomically(page, lambda file: file.write(content.encode()))
        say(console, f"page: {page}")


def _queries(trained: Trained, asked: Asked, tower: str | None, console: Console) -> tuple[Items, str]:
    if asked.file is not None:
        items, view = read_queries(trained, asked.file, asked.column, tower)
        if len(items.rejections):
            say(console, f"{asked.file.path}: {items.rejections.summary()}")
        return items, view
    assert asked.query is not None
    view = query_view(trained, [asked.query], tower)
    if tower is None and trained.kind(view) == "molecule" and len(trained.views) > 1:
        say(
            console,
            f"the query reads as a molecule; to search by its words, say --tower {_other(trained, view)}",
        )
    return Items(["query"], {view: [asked.query]}), view


def _other(trained: Trained, view: str) -> str:
    return next((each for each in trained.views if trained.kind(each) == "text"), view)


def _announce(
    trained: Trained,
    store: VectorStore,
    items: Items,
    view: str,
    k: int,
    where: Sequence[str],
    exact: bool,
    console: Console,
) -> None:
    """What is searched, and what the answers cannot be."""
    say(console, store.description)
    rows = store.count(list(where) or None)
    if where:
        say(console, f"{rows:,} of {len(store):,} rows pass the filter")
    if rows < k:
        say(console, f"-k {k}: there are {rows:,} rows to show" if rows else "there is no row to show")
    values = items[view]
    if len(items) == 1 and _means_nothing(trained, view, values):
        say(console, "no word of this query occurs in the training texts: the order below means nothing")
    if len(items) >= _JUDGED and store.index is not None and not exact:
        chosen = np.linspace(0, len(items) - 1, _JUDGED).astype(int).tolist()
        sample = trained.vectors([values[i] for i in chosen], view)
        recall = store.recall(sample, min(k, 100), list(where) or None)
        say(
            console,
            f"recall@{min(k, 100)} {recall:.3f} on {_JUDGED} of these queries; --exact compares all rows",
        )


def _means_nothing(trained: Trained, view: str, values: Column) -> bool:
    """Whether a text has no n-gram that its encoder was fitted to: it is then the same vector as any such text."""
    tower = trained.system.towers[view]
    if trained.kind(view) != "text" or not tower.reads_reference:
        return False
    vectors = tower.reference(values)
    return vectors is not None and not np.any(vectors)


def _rows(items: Items, answers: Sequence[Hits]) -> list[Json]:
    """A row for each hit: the query's id, the hit's rank, cosine, id and columns."""
    rows = []
    for identity, answer in zip(items.ids, answers, strict=True):
        for hit in answer:
            own = {f"gallery_{name}" if name in _TAKEN else name: value for name, value in hit.row.items()}
            rows.append({"query": identity, "rank": hit.rank, "cosine": hit.score, "id": hit.id, **own})
    return rows


_TAKEN = ("query", "rank", "cosine", "id")
