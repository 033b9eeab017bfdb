"""Judgments and rankings as retrieval tools write them: TREC files, tables, JSON, BEIR's folders, mteb's predictions.

Every line that cannot be used is counted, with the first of each reason and its line number. Ids are texts: in a file
there is no difference between 1 and "1".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from nearfar.arguments import shown
from nearfar.data.files import read_json
from nearfar.data.rejections import Rejections
from nearfar.data.table_formats import content_of, full_suffix
from nearfar.data.tables import read_table, require_file
from nearfar.errors import NearfarError, nearest_name

__all__ = ["QREL_HEADERS", "BeirFolder", "RankedLists", "read_beir", "read_qrels", "read_ranking"]

#: query id → document id → grade, or score
Lists: TypeAlias = Mapping[str, Mapping[str, float]]

_COLUMNS = {
    "query": ["query_id", "query", "qid", "q_id", "topic", "topic_id"],
    "document": [
        "doc_id",
        "document_id",
        "docid",
        "docno",
        "corpus_id",
        "document",
        "doc",
        "did",
        "pid",
        "passage_id",
    ],
}
_SCORES = ["score", "similarity", "sim"]
_GRADES = ["relevance", "grade", "rel", "score", "label", "judgment", "judgement"]
_RANKS = ["rank", "position", "place"]
#: headers of a table of judgments: of queries, of documents, of grades, best first
QREL_HEADERS = (_COLUMNS["query"], _COLUMNS["document"], _GRADES)
_TABLES = (".csv", ".tsv", ".tab", ".parquet", ".pq", ".jsonl", ".ndjson", ".xlsx")


@dataclass
class RankedLists(Mapping[str, Mapping[str, float]]):
    """For each query its documents with their grades (qrels) or scores (a ranking), and what was turned away.

    >>> lists = RankedLists.of({"q1": {"d1": 2, "d2": 0}, 7: ["d3"]}, "qrels")
    >>> lists["7"], lists.source, len(lists.rejections)
    ({'d3': 1.0}, 'qrels', 0)
    """

    lists: dict[str, dict[str, float]]
    source: str
    rejections: Rejections = field(default_factory=Rejections)

    def __getitem__(self, query: str) -> dict[str, float]:
        return self.lists[query]

    def __iter__(self) -> Iterator[str]:
        return iter(self.lists)

    def __len__(self) -> int:
        return len(self.lists)

    @property
    def entries(self) -> int:
        """Documents over all queries."""
        return sum(map(len, self.lists.values()))

    @classmethod
    def of(cls, value: object, name: str) -> RankedLists:
        """From a dictionary {query: {document: number}}, or {query: documents} that count 1; ids become texts."""
        if isinstance(value, RankedLists):
            return value
        if not isinstance(value, Mapping):
            raise NearfarError(
                f"{name} is {shown(value)}; a dictionary {{query: {{document: number}}}} is needed, or what "
                "read_qrels and read_ranking give"
            )
        made = cls({}, name)
        for query, documents in value.items():
            own = made.lists.setdefault(_id(query, name), {})
            if isinstance(documents, (list, tuple, set, frozenset)):
                documents = dict.fromkeys(documents, 1.0)
            if not isinstance(documents, Mapping):
                raise NearfarError(
                    f"{name}[{query!r}] is {shown(documents)}; a dictionary {{document: number}} is needed"
                )
            for document, number in documents.items():
                plain = getattr(number, "item", lambda number=number: number)()
                if isinstance(plain, str) or not isinstance(plain, (int, float)) or not math.isfinite(plain):
                    raise NearfarError(
                        f"{name}[{query!r}][{document!r}] is {shown(number)}; a finite number is needed"
                    )
                own[_id(document, name)] = float(plain)
        return made


def _id(value: object, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise NearfarError(f"{name} holds the id {shown(value)}; ids are texts or whole numbers")
    return str(value)


def read_qrels(path: str | Path, part: str | None = None) -> RankedLists:
    """Judgments: of each query the documents with their grades; those above 0 are relevant.

    Args:
        path: a TREC file (``query iteration document grade``), a table with columns query_id, doc_id and relevance
            (BEIR's names and others are known), JSON ``{query: {document: grade}}``, or a folder of BEIR's.
        part: the split of a folder of BEIR's, by default test.

    Raises:
        NearfarError: no such file, no usable line, a form that is not known.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "qrels.txt"
    >>> _ = file.write_text("q1 0 d1 2\\nq1 0 d2 0\\nq2 0 d9\\nq2 0 d3 1\\nq2 0 d3 1\\n")
    >>> qrels = read_qrels(file)
    >>> qrels.lists, qrels.rejections.counts
    ({'q1': {'d1': 2.0, 'd2': 0.0}, 'q2': {'d3': 1.0}}, {'not 4 columns': 1, 'document twice': 1})
    """
    path = Path(path)
    if path.is_dir():
        file = path / "qrels" / f"{part or 'test'}.tsv"
        if not file.is_file():
            known = sorted(each.stem for each in (path / "qrels").glob("*.tsv"))
            raise NearfarError(
                f"{path}: no qrels/{part or 'test'}.tsv in it, as BEIR lays a folder out"
                + (f"; there are {', '.join(known)}: name one as the split" if known else "")
            )
        path = file
    return _read(path, part, "qrels")


def read_ranking(path: str | Path, part: str | None = None, by: str = "score") -> RankedLists:
    """A ranking: of each query the documents with their scores, higher ones first.

    Args:
        path: a TREC run (``query Q0 document rank score tag``), a table with columns query_id, doc_id and score, JSON
            ``{query: {document: score}}``, or the predictions that mteb writes into its ``prediction_folder``.
        part: subset and split of mteb's file, as ``default/test``; needed where it holds several.
        by: "score", as trec_eval, or "rank": by the column of places, where scores are missing or rounded.

    Raises:
        NearfarError: no such file, no usable line, a form that is not known.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.run"
    >>> _ = file.write_text("q1 Q0 d1 1 7.5 a\\nq1 Q0 d2 2 x a\\n")
    >>> ranking = read_ranking(file)
    >>> ranking.lists, ranking.rejections.summary()
    ({'q1': {'d1': 7.5}}, "1 row rejected: score is no number 1 (first: row 2 'x')")
    """
    if by not in ("score", "rank"):
        raise NearfarError(f"by is {by!r}; it is score or rank")
    return _read(Path(path), part, "ranking", by)


def _read(path: Path, part: str | None, what: str, by: str = "score") -> RankedLists:
    require_file(path)
    suffix = full_suffix(path)
    if suffix == ".json":
        made = _from_json(path, part, what)
    elif suffix in _TABLES and not _is_trec(path, suffix, what):
        made = _from_table(path, what, by)
    else:
        made = _from_trec(path, what, by)
    if not made.entries:
        raise NearfarError(f"{path}: no usable line; {made.rejections.summary()}")
    return made


class _Taker:
    """Takes (query, document, number) one by one and counts what cannot be used."""

    def __init__(self, path: Path, what: str) -> None:
        self.made = RankedLists({}, str(path))
        self.number = "score" if what == "ranking" else "grade"
        self.judged = what == "qrels"

    def take(self, query: str, document: str, text: str, row: int | None, sign: float = 1.0) -> None:
        """One line's entry."""
        rejections = self.made.rejections
        if not query or not document:
            rejections.add("no id", row)
            return
        try:
            value = sign * float(text)
        except ValueError:
            rejections.add(f"{self.number} is no number", row, text)
            return
        if not math.isfinite(value):
            rejections.add(f"{self.number} is not finite", row, text)
            return
        own = self.made.lists.setdefault(query, {})
        if document in own:
            if own[document] == value:
                rejections.add("document twice", row, f"{query} {document}")
            else:
                rejections.add(f"document twice, with different {self.number}s", row, f"{query} {document}")
                # the better place of a ranking counts, as it would in a list that is read from its top
                own[document] = own[document] if self.judged else max(own[document], value)
            return
        own[document] = value


def _from_trec(path: Path, what: str, by: str) -> RankedLists:
    taker = _Taker(path, what)
    columns = 4 if what == "qrels" else 6
    for row, line in enumerate(content_of(path).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = line.decode("utf-8").split()
        except UnicodeDecodeError:
            taker.made.rejections.add("not UTF-8", row)
            continue
        if len(fields) != columns:
            taker.made.rejections.add(f"not {columns} columns", row, " ".join(fields))
        elif what == "qrels":
            taker.take(fields[0], fields[2], fields[3], row)
        elif by == "rank":
            taker.take(fields[0], fields[2], fields[3], row, -1.0)
        else:
            taker.take(fields[0], fields[2], fields[4], row)
    if not taker.made.entries:
        form = "query iteration document grade" if what == "qrels" else "query Q0 document rank score tag"
        raise NearfarError(
            f"{path}: no usable line; {taker.made.rejections.summary()}. A TREC {what} has lines of {columns} columns, "
            f"{form}; tables with a header are called .csv, .tsv, .jsonl or .parquet"
        )
    return taker.made


def _is_trec(path: Path, suffix: str, what: str) -> bool:
    """Whether a text file without a header is called .tsv or .tab: columns of numbers, as MS MARCO's qrels."""
    if suffix not in (".tsv", ".tab"):
        return False
    first = next((line for line in content_of(path).splitlines() if line.strip()), b"").split()
    if len(first) != (4 if what == "qrels" else 6):
        return False
    try:
        float(first[3 if what == "qrels" else 4])
    except ValueError:
        return False
    return True


def _from_table(path: Path, what: str, by: str) -> RankedLists:
    number = _GRADES if what == "qrels" else _SCORES if by == "score" else _RANKS
    table = read_table(
        path, {**_COLUMNS, "number": number}, naming="a header such as query_id, doc_id, " + number[0]
    )
    taker = _Taker(path, what)
    sign = -1.0 if by == "rank" else 1.0
    for query, document, text, row in zip(
        table["query"], table["document"], table["number"], table.rows, strict=True
    ):
        taker.take(query.strip(), document.strip(), text, row, sign)
    taker.made.rejections.extend(table.rejections)
    return taker.made


def _from_json(path: Path, part: str | None, what: str) -> RankedLists:
    content = read_json(path)
    if isinstance(content, list):
        return _from_table(path, what, "score")
    if not isinstance(content, dict):
        raise NearfarError(f"{path}: a JSON object {{query: {{document: number}}}} is expected")
    content.pop("mteb_model_meta", None)
    parts = {
        f"{subset}/{split}": lists
        for subset, splits in content.items()
        if isinstance(splits, dict)
        for split, lists in splits.items()
        if isinstance(lists, dict) and any(isinstance(each, dict) for each in lists.values())
    }
    if parts:
        if part is None and len(parts) > 1:
            raise NearfarError(
                f"{path} holds {', '.join(parts)}: say which one, as part={next(iter(parts))!r}"
            )
        chosen = next(iter(parts)) if part is None else part
        if chosen not in parts:
            raise NearfarError(f"{path} has no part {chosen!r}: {nearest_name(chosen, list(parts))}")
        content = parts[chosen]
    if "scores" in content and "task_name" in content:
        raise NearfarError(
            f"{path} holds mteb's means of a task, not what was ranked for each query: evaluate with "
            "mteb.evaluate(…, prediction_folder=FOLDER) and give FOLDER's …_predictions.json"
        )
    taker = _Taker(path, what)
    for query, documents in content.items():
        if isinstance(documents, list) and what == "qrels":
            documents = dict.fromkeys(map(str, documents), 1.0)
        if not isinstance(documents, dict):
            taker.made.rejections.add("no documents with numbers", None, query)
            continue
        taker.made.lists.setdefault(str(query), {})
        for document, number in documents.items():
            plain = isinstance(number, (int, float)) and not isinstance(number, bool)
            taker.take(str(query), str(document), str(number) if plain else shown(number), None)
    return taker.made


# -- BEIR ----------------------------------------------------------------------------------------------------------
@dataclass
class BeirFolder:
    """A data set in BEIR's layout: documents and queries by id, judgments of one split.

    A document's text is its title and text with a space between, as BEIR's own models take it.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    qrels: RankedLists
    rejections: Rejections = field(default_factory=Rejections)


def read_beir(folder: str | Path, split: str = "test", texts: bool = True) -> BeirFolder:
    """Read ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/SPLIT.tsv``; queries are those that the split judges.

    With ``texts=False`` documents and queries have empty texts: ids alone, as scoring a ranking needs them.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "qrels").mkdir()
    >>> _ = (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "Tea", "text": "A drink."}\\n')
    >>> _ = (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "what is tea?"}\\n')
    >>> _ = (folder / "qrels" / "test.tsv").write_text("query-id\\tcorpus-id\\tscore\\nq1\\td1\\t1\\n")
    >>> data = read_beir(folder)
    >>> data.documents, data.queries, data.qrels.lists
    ({'d1': 'Tea A drink.'}, {'q1': 'what is tea?'}, {'q1': {'d1': 1.0}})
    """
    folder = Path(folder)
    qrels = read_qrels(folder, split)
    rejections = Rejections()
    rejections.extend(qrels.rejections.named("qrels: "))
    documents = _texts(folder / "corpus.jsonl", "corpus: ", rejections, lambda _: texts)
    queries = _texts(folder / "queries.jsonl", "queries: ", rejections, qrels.lists.__contains__)
    kept = {name: text for name, text in queries.items() if name in qrels.lists}
    return BeirFolder(documents, kept, qrels, rejections)


def _texts(path: Path, prefix: str, rejections: Rejections, wanted: Callable[[str], bool]) -> dict[str, str]:
    from nearfar.data.files import parse_json

    require_file(path)
    texts: dict[str, str] = {}
    for row, line in enumerate(content_of(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError:
            rejections.add(f"{prefix}no JSON", row)
            continue
        name = record.get("_id") if isinstance(record, dict) else None
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            rejections.add(f"{prefix}no _id", row)
        elif str(name) in texts:
            rejections.add(f"{prefix}id twice", row, str(name))
        else:
            parts = (record.get("title"), record.get("text")) if wanted(str(name)) else ()
            texts[str(name)] = " ".join(part for part in parts if isinstance(part, str) and part).strip()
    return texts
