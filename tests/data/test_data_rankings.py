"""Qrels and rankings in every form that is read, and what is turned away with its line."""

from __future__ import annotations

import gzip
import json

import pytest

from nearfar.data.rankings import RankedLists, read_beir, read_qrels, read_ranking
from nearfar.errors import NearfarError

QRELS = {"q1": {"d1": 2.0, "d2": 0.0}, "q2": {"d3": 1.0}}
RANKING = {"q1": {"d2": 3.5, "d1": -1.0}, "q2": {"d3": 0.25}}


def trec_qrels() -> str:
    return "".join(f"{q} 0 {d} {g:g}\n" for q, ds in QRELS.items() for d, g in ds.items())


def trec_run() -> str:
    lines = []
    for q, ds in RANKING.items():
        lines += [f"{q} Q0 {d} {i} {s} tag\n" for i, (d, s) in enumerate(ds.items(), 1)]
    return "".join(lines)


def rows(lists, number):
    return [{"query_id": q, "doc_id": d, number: value} for q, ds in lists.items() for d, value in ds.items()]


def table(lists, number, mark):
    lines = [mark.join(("query-id", "corpus-id", number))]
    return "\n".join([*lines, *(mark.join(map(str, each.values())) for each in rows(lists, number))]) + "\n"


@pytest.mark.slow
def test_every_form_gives_the_same(tmp_path):
    pd = pytest.importorskip("pandas")
    (tmp_path / "a.run").write_text(trec_run())
    (tmp_path / "a.tsv").write_text(trec_run().replace(" ", "\t"))
    (tmp_path / "b.tsv").write_text(table(RANKING, "score", "\t"))
    (tmp_path / "a.csv").write_text(table(RANKING, "score", ","))
    (tmp_path / "a.json").write_text(json.dumps(RANKING))
    (tmp_path / "b.json").write_text(json.dumps(rows(RANKING, "score")))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows(RANKING, "score"))))
    (tmp_path / "mteb.json").write_text(
        json.dumps({"mteb_model_meta": {"model_name": "m"}, "default": {"test": RANKING}})
    )
    with gzip.open(tmp_path / "a.run.gz", "wt") as file:
        file.write(trec_run())
    pd.DataFrame(rows(RANKING, "score")).to_parquet(tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        ranking = read_ranking(path)
        assert ranking.lists == RANKING, path
        assert not len(ranking.rejections)
        assert ranking.source == str(path)
    assert RankedLists.of(RANKING, "ranking").lists == RANKING


def test_every_form_of_qrels(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(table(QRELS, "score", "\t"))
    (tmp_path / "qrels.txt").write_text("\ufeff" + trec_qrels())
    (tmp_path / "qrels.tsv").write_text(trec_qrels().replace(" ", "\t"))
    (tmp_path / "qrels.json").write_text(json.dumps(QRELS))
    (tmp_path / "relevance.csv").write_text(table(QRELS, "relevance", ","))
    for name in ("qrels.txt", "qrels.tsv", "qrels.json", "relevance.csv", "."):
        assert read_qrels(tmp_path / name).lists == QRELS, name
    with pytest.raises(NearfarError, match=r"no qrels/dev.tsv.*there are test"):
        read_qrels(tmp_path, "dev")


def test_lines_that_cannot_be_used_are_counted_with_their_numbers(tmp_path):
    path = tmp_path / "a.run"
    path.write_bytes(
        b"q1 Q0 d1 1 2.5 t\nq1 Q0 d2 2\n\nq1 Q0 d3 3 high t\nq1 Q0 d4 4 nan t\nq1 Q0 d1 5 2.5 t\n"
        b"q1 Q0 d1 6 3.5 t\nq1 Q0 d\xff 7 1 t\n"
    )
    ranking = read_ranking(path)
    assert ranking.lists == {"q1": {"d1": 3.5}}
    assert ranking.rejections.counts == {
        "not 6 columns": 1,
        "score is no number": 1,
        "score is not finite": 1,
        "document twice": 1,
        "document twice, with different scores": 1,
        "not UTF-8": 1,
    }
    assert ranking.rejections.first["not 6 columns"][0].row == 2
    assert ranking.rejections.first["not UTF-8"][0].row == 8


def test_places_instead_of_scores(tmp_path):
    path = tmp_path / "a.run"
    path.write_text("q Q0 d1 2 0 t\nq Q0 d2 1 0 t\n")
    assert read_ranking(path).lists == {"q": {"d1": 0.0, "d2": 0.0}}
    assert read_ranking(path, by="rank").lists == {"q": {"d1": -2.0, "d2": -1.0}}
    (tmp_path / "a.csv").write_text("qid,docno,rank\nq,d1,2\nq,d2,1\n")
    assert read_ranking(tmp_path / "a.csv", by="rank").lists == {"q": {"d1": -2.0, "d2": -1.0}}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.run", "q1 d1 3\n", "lines of 6 columns, query Q0 document rank score tag"),
        ("a.csv", "a,b,c\n1,2,3\n", "query_id"),
        ("a.json", "[1, 2", "not valid JSON"),
        ("a.json", '{"q": 3}', "no usable line"),
        ("a.json", json.dumps({"a": {"test": RANKING}, "b": {"test": RANKING}}), "say which one"),
        ("a.json", json.dumps({"task_name": "T", "scores": {"test": [{}]}}), "prediction_folder"),
    ],
)
def test_what_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(NearfarError, match=words):
        read_ranking(tmp_path / name)
    with pytest.raises(NearfarError, match="There is no file"):
        read_ranking(tmp_path / "none.run")


def test_one_of_several_parts(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"en": {"test": RANKING}, "de": {"test": {"q9": {"d": 1}}}}))
    assert read_ranking(path, "de/test").lists == {"q9": {"d": 1.0}}
    with pytest.raises(NearfarError, match="no part 'fr/test'"):
        read_ranking(path, "fr/test")


def test_a_folder_of_beir(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    (tmp_path / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "A", "text": "b"}\n{"_id": "d1"}\nbroken\n{"text": "c"}\n{"_id": 7, "text": "d"}\n'
    )
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "x"}\n{"_id": "q2", "text": "y"}\n')
    data = read_beir(tmp_path, "dev")
    assert data.documents == {"d1": "A b", "7": "d"}
    assert data.queries == {"q1": "x"}
    assert data.qrels.lists == {"q1": {"d1": 1.0}}
    assert data.rejections.counts == {"corpus: id twice": 1, "corpus: no JSON": 1, "corpus: no _id": 1}
    assert set(read_beir(tmp_path, "dev", texts=False).documents) == {"d1", "7"}
