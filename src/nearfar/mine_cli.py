"""The command that mines hard negatives from embeddings, or with a trained run, and measures how many are false."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import typer

from nearfar import terminal

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from nearfar.data.items import Items

mine_app = typer.Typer()

_VECTORS = (".parquet", ".npz", ".npy")


class _Rules(TypedDict):
    per_query: int
    rank_range: tuple[int, int]
    margin: float | None
    margin_kind: Literal["absolute", "relative"]
    min_score: float | None
    max_score: float | None
    strategy: Literal["top", "random"]
    seed: int


@dataclass
class _Side:
    """Rows of one view: their ids and vectors, and what stands in the cells of a table."""

    ids: list[str]
    vectors: np.ndarray
    values: Sequence[object]

    def take(self, rows: list[int]) -> _Side:
        """Some of the rows."""
        return _Side([self.ids[i] for i in rows], self.vectors[rows], [self.values[i] for i in rows])


@mine_app.command(
    epilog=terminal.example(
        "nearfar mine vectors.parquet --queries question --corpus answer --data train.csv -o mined.csv"
    )
)
def mine(
    source: Annotated[
        Path, typer.Argument(help="A run, or embeddings: the .parquet or .npz that nearfar embed writes.")
    ],
    queries: Annotated[str, typer.Option(help="The view whose values are queries.")],
    corpus: Annotated[str, typer.Option(help="The view whose values answer them: row i answers row i.")],
    data: Annotated[
        Path | None,
        typer.Option(help="The table with the values of both views. Of a run: what is embedded and mined."),
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option(
            help="Embeddings of a corpus of its own, of which --qrels says what answers what; or the folder that "
            "nearfar neighbors wrote of them: millions of rows."
        ),
    ] = None,
    documents_data: Annotated[
        Path | None, typer.Option(help="The table with the values of --documents.")
    ] = None,
    qrels: Annotated[
        Path | None,
        typer.Option(help="Judgments by id (TREC, table, JSON, a BEIR folder): grades above 0 are answers."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a BEIR folder's judgments: test, train, …")] = None,
    cross_encoder: Annotated[
        Path | None,
        typer.Option(
            help="Scores of pairs by id (query_id, doc_id, score; or a TREC run): they replace cosines in margins, "
            "bounds and order."
        ),
    ] = None,
    candidates: Annotated[
        Path | None,
        typer.Option(help="Write the pairs that a cross-encoder is to score, and mine nothing."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="What to write: .csv, .tsv, .jsonl, .parquet.")
    ] = Path("mined.csv"),
    form: Annotated[str, typer.Option(help="n-tuple, triplet, labeled-pair or labeled-list.")] = "n-tuple",
    per_query: Annotated[int, typer.Option(help="Negatives of each query.")] = 3,
    rank_from: Annotated[int, typer.Option(help="The first rank that is taken; 0 is the nearest.")] = 0,
    rank_to: Annotated[int, typer.Option(help="The rank before which taking ends.")] = 100,
    margin: Annotated[
        float | None, typer.Option(help="A negative lies this far below the own positive, in cosine.")
    ] = None,
    relative_margin: Annotated[
        float | None, typer.Option(help="The same as a share of the positive's |cosine|.")
    ] = None,
    max_score: Annotated[float | None, typer.Option(help="The largest cosine of a negative.")] = None,
    min_score: Annotated[float | None, typer.Option(help="The least cosine of a negative.")] = None,
    guide: Annotated[
        Path | None,
        typer.Option(
            help="A second model's embeddings of the same rows: what it takes for answers is left out."
        ),
    ] = None,
    guide_margin: Annotated[
        float, typer.Option(help="Of the guide: leave out what is this near, too.")
    ] = 0.0,
    label: Annotated[
        str | None,
        typer.Option(help="A column of --data: equal labels are answers, which measures false negatives."),
    ] = None,
    scores: Annotated[
        bool, typer.Option("--scores", help="Write margins (n-tuple, triplet), or scores, beside the texts.")
    ] = False,
    random: Annotated[
        bool, typer.Option("--random", help="Any of those that pass, not the hardest.")
    ] = False,
    mark: Annotated[
        Path | None,
        typer.Option(help="Also write a sample of negatives to be marked by hand, such as mark.csv."),
    ] = None,
    marked: Annotated[
        Path | None, typer.Option(help="A sample that was marked: say its share of false negatives.")
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(
            help="Recall of the search, at least (.99; of a folder .95); measured where it is not exact."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the search, of --random and of --mark.")] = 0,
    id_column: Annotated[str | None, typer.Option(help="The column of ids in --data.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …; auto takes a GPU where there is one.")] = "auto",
) -> None:
    """Mine hard negatives: near a query, and no answer of it.

    Rows with the same query share their answers; the query's own text and copies of its answers are no negatives. How
    many of the rest are false negatives is measured by everything that is known: labels, texts, a guide, a marked
    sample. The table is read by experiment=pairs (negatives=) and by sentence-transformers.
    """
    from nearfar.data.rankings import read_qrels
    from nearfar.errors import NearfarError
    from nearfar.mining import (
        measure_false_negatives,
        mine_negatives,
        mined_table,
        read_marked,
        sample_to_mark,
    )
    from nearfar.mining.tables import ScoredPairs, column_names
    from nearfar.serving.stream import TABLE_ENDINGS, write_rows

    console = terminal.console()
    for path in (output, mark, candidates):
        if path is not None and path.suffix.lower() not in TABLE_ENDINGS:
            raise NearfarError(f"{path}: a table is written as {', '.join(TABLE_ENDINGS)}.")
    names = column_names((queries, corpus), form, per_query, scores)
    if margin is not None and relative_margin is not None:
        raise NearfarError("--margin and --relative-margin both say how far a negative lies below; give one.")
    if label is not None and (
        data is None or (qrels is not None and documents is not None and documents_data is None)
    ):
        raise NearfarError("--label is a column of --data (and of --documents-data); give that, too.")
    if documents is not None and qrels is None and not documents.is_dir():
        raise NearfarError(
            "--documents is a corpus of its own: say with --qrels which of them answer which query."
        )
    if documents is not None and guide is not None:
        raise NearfarError(
            "--guide has vectors of the same rows in both views, and --documents has rows of its own: write the pairs "
            "with --candidates, score them by the second model, and give its scores with --cross-encoder."
        )
    rules: _Rules = {
        "per_query": per_query,
        "rank_range": (rank_from, rank_to),
        "margin": margin if relative_margin is None else relative_margin,
        "margin_kind": "absolute" if relative_margin is None else "relative",
        "min_score": min_score,
        "max_score": max_score,
        "strategy": "random" if random else "top",
        "seed": seed,
    }
    if documents is not None and documents.is_dir():
        refused = {"--cross-encoder": cross_encoder, "--candidates": candidates, "--mark": mark}
        _on_disk(
            source,
            documents,
            output,
            [name for name, value in refused.items() if value is not None],
            marked,
            views=(queries, corpus),
            data=data,
            documents_data=documents_data,
            qrels=qrels,
            split=split,
            label=label,
            id_column=id_column,
            form=form,
            scores=scores,
            min_recall=0.95 if recall is None else recall,
            **rules,
        )
        return
    paired = documents is None
    if documents is None:
        first, second = _sides(source, queries, corpus, data, id_column, device)
    else:
        first = _side(source, queries, data, id_column)
        second = _side(documents, corpus, documents_data, id_column)
    texts = (list(first.values), list(second.values))
    positives = _same_query(texts[0]) if paired else [[] for _ in first.ids]
    if qrels is not None:
        judged = read_qrels(qrels, split)
        if judged.rejections.total:
            terminal.say(console, f"{qrels}: {judged.rejections.summary()}")
        for line in _add_judged(positives, judged, first.ids, second.ids):
            terminal.say(console, line)
        answered = [at for at, own in enumerate(positives) if own]
        first, positives = first.take(answered), [positives[at] for at in answered]
        texts = ([texts[0][at] for at in answered], texts[1])
    known = None if guide is None else _guide(guide, queries, corpus, first.ids)
    pairs = ScoredPairs(first.ids, second.ids)
    if cross_encoder is not None:
        pairs.read(cross_encoder)
    rescore = pairs.record if candidates is not None else None if cross_encoder is None else pairs.look_up
    mined = mine_negatives(
        first.vectors,
        second.vectors,
        positives,
        **rules,
        query_texts=texts[0],
        corpus_texts=texts[1],
        rescore=rescore,
        guide=known,
        guide_margin=guide_margin,
        min_recall=0.99 if recall is None else recall,
    )
    if candidates is not None:
        rows = pairs.rows(first.values, second.values)
        write_rows(rows, candidates)
        terminal.say(
            console,
            f"{candidates}: {len(rows)} pairs, answers among them; add a column 'score' by a cross-encoder, and mine "
            f"with --cross-encoder {candidates}",
        )
        return
    for line in mined.summary():
        terminal.say(console, line)
    labels = None
    if label is not None and data is not None:
        own = list(_aligned(data, [label], first.ids, id_column)[label])
        theirs = documents_data
        labels = (
            own,
            own if theirs is None else list(_aligned(theirs, [label], second.ids, id_column)[label]),
        )
    shares = measure_false_negatives(mined, labels=labels, texts=texts, guide=known)
    for share in [*shares, *([] if marked is None else [read_marked(_columns(marked))])]:
        terminal.say(console, str(share))
    columns = mined_table(
        # Rows with the same query have the same negatives; each row keeps its own answer.
        mined.with_pairs(mined.pairs[0] == mined.pairs[1]) if paired else mined,
        first.values,
        second.values,
        form,  # type: ignore[arg-type]
        names=names,
        scores=scores,
    )
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    write_rows(rows, output)
    _say_how_to_train(console, output, len(rows), list(columns), form)
    if mark is not None:
        drawn = sample_to_mark(mined, first.values, second.values, seed=seed)
        write_rows(
            [dict(zip(drawn, cells, strict=True)) for cells in zip(*drawn.values(), strict=True)], mark
        )
        terminal.say(
            console, f"{mark}: {len(drawn['query'])} negatives to be marked; read it with --marked {mark}"
        )


def _say_how_to_train(console: Console, output: Path, rows: int, columns: Sequence[str], form: str) -> None:
    terminal.say(console, f"{output}: {rows} rows ({', '.join(columns)})")
    if form == "n-tuple":
        negatives = ",".join(name for name in columns if name.startswith("negative_"))
        gaps = ",".join(name for name in columns if name.startswith("margin_"))
        queries, corpus = columns[:2]
        terminal.say(
            console,
            f"nearfar train experiment=pairs data.train={output} views=[{queries},{corpus}] "
            f"negatives.{corpus}=[{negatives}]" + (f" margins.{corpus}=[{gaps}]" if gaps else ""),
        )


def _on_disk(
    source: Path, folder: Path, output: Path, refused: list[str], marked: Path | None, **options: Any
) -> None:
    """Mine from the folder that ``nearfar neighbors`` wrote."""
    from nearfar.batching import MappedNeighbors
    from nearfar.errors import NearfarError
    from nearfar.mining import read_marked
    from nearfar.mining.from_files import mine_files

    if refused:
        raise NearfarError(
            f"{', '.join(refused)}: with a folder as --documents nothing is held in memory that they need; mine in "
            "memory with embeddings as --documents, or in Python with mine_negatives_on_disk, which takes rescore= and "
            "guide=."
        )
    if source.suffix.lower() not in _VECTORS and not (source.is_dir() and any(source.glob("*.npy"))):
        raise NearfarError(
            f"{source}: with a folder as --documents the queries are embeddings ({', '.join(_VECTORS)}, a folder of "
            ".npy shards); nearfar embed writes them."
        )
    console = terminal.console()
    near = MappedNeighbors(folder)
    with terminal.progress_bar(None) as advance:
        mined, notes = mine_files(source, near, output, advance=advance, **options)
    for line in [*notes, *mined.summary(), *([] if marked is None else [str(read_marked(_columns(marked)))])]:
        terminal.say(console, line)
    _say_how_to_train(console, output, mined.rows, mined.columns, options["form"])


def _side(path: Path, view: str, data: Path | None, id_column: str | None) -> _Side:
    """One view of embeddings with rows of their own; ids are the values where there is no table."""
    import numpy as np

    from nearfar.errors import NearfarError

    if path.suffix.lower() not in _VECTORS:
        raise NearfarError(
            f"{path}: with --documents both sides are embeddings ({', '.join(_VECTORS)}); nearfar embed writes them."
        )
    items = _whole(path, [view])
    ids = list(map(str, items.ids))
    values = ids if data is None else list(_aligned(data, [view], ids, id_column)[view])
    return _Side(ids, np.asarray(items[view], dtype=np.float32), values)


def _sides(
    source: Path, queries: str, corpus: str, data: Path | None, id_column: str | None, device: str
) -> tuple[_Side, _Side]:
    """The rows of both views of one table."""
    import numpy as np

    from nearfar.errors import NearfarError

    if source.suffix.lower() in _VECTORS:
        known = _whole(source, [queries, corpus])
        ids = list(map(str, known.ids))
        shown = known if data is None else _aligned(data, [queries, corpus], ids, id_column)
        cells = [ids if data is None else list(shown[view]) for view in (queries, corpus)]
        vectors = [np.asarray(known[view], dtype=np.float32) for view in (queries, corpus)]
        return _Side(ids, vectors[0], cells[0]), _Side(ids, vectors[1], cells[1])
    if data is None:
        raise NearfarError(f"{source} is a run: name the table that it embeds with --data TABLE.")
    from nearfar.data.chunks import NewData
    from nearfar.serving import load

    trained = load(source, device)
    ids, values, parts = [], ([], []), ([], [])  # type: ignore[var-annotated]
    with terminal.progress_bar(None) as advance:
        for items in trained.new_items(NewData(data, id_column=id_column)):
            for view in (queries, corpus):
                if view not in items:
                    raise NearfarError(f"{data} has no column of the view '{view}' of {source}.")
            both = np.flatnonzero(items.present(queries) & items.present(corpus))
            ids += [str(items.ids[i]) for i in both.tolist()]
            for k, view in enumerate((queries, corpus)):
                some = [items[view][i] for i in both.tolist()]
                values[k].extend(some)
                parts[k].append(trained.vectors(some, view))
            advance(len(items))
    if not ids:
        raise NearfarError(f"{data}: no row has both '{queries}' and '{corpus}'.")
    return _Side(ids, np.concatenate(parts[0]), values[0]), _Side(ids, np.concatenate(parts[1]), values[1])


def _whole(path: Path, views: Sequence[str]) -> Items:
    """Embeddings of rows that have every view."""
    import numpy as np

    from nearfar.data.sources import read_items

    items = read_items(path, list(views), naming="--queries {name}")
    present = np.logical_and.reduce([items.present(view) for view in views])
    return items.take(present.nonzero()[0])


def _aligned(path: Path, columns: Sequence[str], ids: Sequence[str], id_column: str | None) -> Items:
    """Rows of a table in the order of ids."""
    from nearfar.data.sources import read_items
    from nearfar.errors import NearfarError

    items = read_items(path, list(columns), id_column=id_column, id_naming="--id-column NAME")
    place = {name: at for at, name in enumerate(items.ids)}
    missing = [name for name in ids if name not in place]
    if missing:
        raise NearfarError(
            f"{path}: {len(missing)} of {len(ids)} embedded rows are not in it (first: {missing[0]!r}); give the table "
            "that was embedded, with --id-column where its ids have a different name."
        )
    return items.take([place[name] for name in ids])


def _guide(path: Path, queries: str, corpus: str, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    items = _aligned(path, [queries, corpus], ids, None)
    return items.array(queries), items.array(corpus)


def _same_query(texts: Sequence[object]) -> list[list[int]]:
    """The rows that answer each query: those with the same text, and itself alone where there is none."""
    from nearfar.mining.candidates import groups_of

    numbers = groups_of(texts, [], len(texts), 0)[0]
    assert numbers is not None
    rows: dict[int, list[int]] = {}
    for i, number in enumerate(numbers.tolist()):
        rows.setdefault(number, []).append(i)
    return [list(rows[number]) for number in numbers.tolist()]


def _add_judged(
    positives: list[list[int]],
    qrels: Mapping[str, Mapping[str, float]],
    queries: Sequence[str],
    documents: Sequence[str],
) -> list[str]:
    """Add the answers that judgments name to those of each query; says what has no vector, and who has no answer."""
    from nearfar.errors import NearfarError

    place, missing, judged = {name: at for at, name in enumerate(documents)}, 0, 0
    for own, query in zip(positives, queries, strict=True):
        named = [document for document, grade in qrels.get(query, {}).items() if grade > 0]
        judged += bool(named)
        missing += sum(document not in place for document in named)
        own.extend(sorted({place[document] for document in named if document in place} - set(own)))
    if not judged:
        raise NearfarError(
            f"no query has an answer in the qrels, which go by the ids of the embeddings (first query here: "
            f"'{queries[0]}', in the qrels: '{next(iter(qrels), '')}')."
        )
    lines = [f"{judged} of {len(queries)} queries have answers in the qrels"]
    if missing:
        lines.append(
            f"{missing} answers have no vector: documents whose ids are not among the embeddings; nothing is compared "
            "with them"
        )
    alone = sum(not own for own in positives)
    if alone:
        lines.append(f"{alone} queries have no answer and are left out")
    return lines


def _columns(path: Path) -> dict[str, list[object]]:
    from nearfar.data.sources import read_items

    items = read_items(path, ["false_negative"])
    return {"false_negative": list(items["false_negative"])}
