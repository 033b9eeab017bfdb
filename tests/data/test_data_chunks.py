from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from nearfar.data import chunks
from nearfar.data.chunks import NewData, read_chunks
from nearfar.data.items import Items
from nearfar.errors import NearfarError

TEXTS = [
    "plain",
    'with "quotes" inside',
    "a comma, here",
    "two\nlines",
    "N/A",
    "",
    "tab\tbed",
    "über €",
    "last",
]


def rows(n: int) -> list[tuple[str, str]]:
    return [
        (f"i{at}", TEXTS[at % len(TEXTS)] + (f" {at}" if TEXTS[at % len(TEXTS)] not in ("", "N/A") else ""))
        for at in range(n)
    ]


def write(path: Path, kind: str, n: int) -> Path:
    import csv

    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps({"id": i, "text": t}) + "\n" for i, t in rows(n))
        else:
            table = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            table.writerows([("id", "text"), *rows(n)])
    return path


def told(parts: list[Items]) -> list[tuple[str, str | None, int]]:
    return [
        (identity, value, row)
        for items in parts
        for identity, value, row in zip(items.ids, items["text"], items.rows or [], strict=True)
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.csv.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_stream_reads_what_a_whole_file_reads(
    name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / name, name.split(".")[1], 200)
    whole = list(read_chunks(NewData(path), {"text": ["text"]}))
    assert len(whole) == 1
    monkeypatch.setattr(chunks, "WHOLE", 0)
    monkeypatch.setattr(chunks, "_HEAD", 30)
    parts = list(read_chunks(NewData(path, rows=size), {"text": ["text"]}))
    assert told(parts) == told(whole)
    assert len(parts) > 1
    if "jsonl" not in name:
        assert told(whole)[3][:2] == ("i3", "two\nlines 3")
        assert told(whole)[4][:2] == ("i4", None)


def test_broken_rows_of_a_stream_are_counted_with_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["id,text", *(f"i{at},text {at}" for at in range(50))]
    lines[10], lines[33] = "i9,one,too many", ""
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines) + "\n")
    expected = next(iter(read_chunks(NewData(path), {"text": ["text"]}))).rejections.as_dict()
    monkeypatch.setattr(chunks, "WHOLE", 0)
    monkeypatch.setattr(chunks, "_HEAD", 5)
    first: dict[str, int] = {}
    for items in read_chunks(NewData(path, rows=8), {"text": ["text"]}):
        for reason, kept in items.rejections.first.items():
            first[reason] = int(kept[0].row or 0)
    assert first == {"wrong number of fields": 11, "blank line": 34}
    assert {reason: kept[0]["row"] for reason, kept in expected["first"].items()} == first  # type: ignore[attr-defined]


def test_json_lines_may_lack_fields_and_hold_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"id": 1, "text": "a"}\n{"id": 2}\nnonsense\n{"text": "d", "more": 1}\n{"id": 5, "text": "e"}\n'
    )
    monkeypatch.setattr(chunks, "WHOLE", 0)
    parts = list(read_chunks(NewData(path, rows=2), {"text": ["text"]}))
    assert told(parts) == [("1", "a", 1), ("2", None, 2), ("row4", "d", 4), ("5", "e", 5)]
    assert sum(len(items.rejections) for items in parts) == 1


def test_parquet_is_read_by_chunks_with_vectors_and_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    vectors = np.arange(20.0, dtype=np.float32).reshape(10, 2)
    table = {"id": [f"i{at}" for at in range(10)], "v": vectors.tolist(), "price": list(range(10))}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    parts = list(read_chunks(NewData(path, {"x": "v"}, rows=4), {"x": ["x"], "text": ["text"]}))
    assert [len(items) for items in parts] == [4, 4, 2]
    assert np.array_equal(np.concatenate([items["x"] for items in parts]), vectors)
    assert [row for items in parts for row in items.rows or ()] == list(range(1, 11))
    assert parts[2].ids == ["i8", "i9"]
    assert "price" not in parts[0]
    kept = next(iter(read_chunks(NewData(path, {"x": "v"}, others=True), {"x": ["x"]})))
    assert list(kept.columns) == ["x", "id", "price"] or list(kept.columns) == ["x", "price"]


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,body\n1,x\n")
    wanted = {"text": ["text"], "picture": ["picture"]}
    with pytest.raises(NearfarError, match=r"no column 'text' or 'picture'.*'body'.*--column text=HEADER"):
        list(read_chunks(NewData(path), wanted))
    with pytest.raises(NearfarError, match=r"no column 'bodi'.*did you mean 'body'"):
        list(read_chunks(NewData(path, {"text": "bodi"}), wanted))
    with pytest.raises(NearfarError, match="a column for 'txt' was named"):
        list(read_chunks(NewData(path, {"txt": "body"}), wanted))
    with pytest.raises(NearfarError, match=r"no column 'key'.*--id-column"):
        list(read_chunks(NewData(path, {"text": "body"}, id_column="key"), wanted))
    only = list(read_chunks(NewData(path), {"text": ["text"]}))  # one column, and one that is wanted
    assert told(only) == [("1", "x", 2)]


def test_lines_of_a_text_file_and_encodings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first sentence\n\nsecond one\n")
    assert told(list(read_chunks(NewData(path), {"text": ["text"]})))[1][1] == "second one"
    latin = tmp_path / "b.csv"
    latin.write_bytes("id,text\n1,caf\xe9\n2,b\n".encode("cp1252"))
    for limit in (chunks.WHOLE, 0):
        monkeypatch.setattr(chunks, "WHOLE", limit)
        with pytest.raises(NearfarError, match="--encoding"):
            list(read_chunks(NewData(latin), {"text": ["text"]}))
        good = list(read_chunks(NewData(latin, encoding="cp1252"), {"text": ["text"]}))
        assert told(good)[0][1] == "café"


def test_ids_need_not_differ_and_empty_sources_say_so(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\nsame,x\nsame,y\n,z\n")
    assert [each[0] for each in told(list(read_chunks(NewData(path), {"text": ["text"]})))] == [
        "same",
        "same",
        "row4",
    ]
    path.write_text("id,text\n")
    assert sum(len(items) for items in read_chunks(NewData(path), {"text": ["text"]})) == 0
    with pytest.raises(NearfarError, match="There is no file"):
        list(read_chunks(NewData(tmp_path / "no.csv"), {"text": ["text"]}))
    with pytest.raises(NearfarError, match="at least one is needed"):
        list(read_chunks(NewData(path, rows=0), {"text": ["text"]}))


def test_columns_that_are_taken_along_and_usual_names_of_ids(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("Review ID,word,topic\nr1,near,a\nr2,far,\n")
    source = NewData(file)
    (items,) = read_chunks(source, {"word": ["word"]}, {"label": ["label", "topic"]}, ["key", "review_id"])
    assert (items.ids, items["word"], items["label"]) == (["r1", "r2"], ["near", "far"], ["a", None])
    (items,) = read_chunks(source, {"word": ["word"]}, {"label": ["label"]})
    assert (items.ids, list(items.columns)) == (["row2", "row3"], ["word"])
    with pytest.raises(NearfarError, match="no column 'text'"):  # one that is taken along is not enough
        list(read_chunks(source, {"text": ["text"]}, {"topic": ["topic"]}))
    (items,) = read_chunks(source, {"text": ["text"]}, {"topic": ["topic"]}, ["review_id"])
    assert items["text"] == ["near", "far"]  # the only column that is neither ids nor taken along
    (items,) = read_chunks(NewData(file, {"label": "topic"}), {"word": ["word"]}, {"label": ["label"]})
    assert items["label"] == ["a", None]
    with pytest.raises(NearfarError, match="'nothing' was named"):
        list(read_chunks(NewData(file, {"nothing": "word"}), {"word": ["word"]}, {"label": ["label"]}))
