"""Tables as items: what a column is, ids and groups, and rows that are rejected."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nearfar.data.column_kinds import stack_vectors
from nearfar.data.sources import read_items
from nearfar.errors import NearfarError


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)
    return path


# -- names of columns ----------------------------------------------------------------------------------------
def test_columns_keep_the_names_they_were_asked_by(tmp_path):
    file = write(tmp_path, "a.csv", "ID,The Word,n\nx,near,1\ny,far,2\n")
    items = read_items(file, ["the_word"])
    assert items.columns == {"the_word": ["near", "far"]}
    assert items.ids == ["x", "y"]
    assert items.rows == [2, 3]


def test_all_columns_where_none_is_named(tmp_path):
    items = read_items(write(tmp_path, "a.tsv", "id\tword\nx\tnear\n"))
    assert items.columns == {"id": ["x"], "word": ["near"]}


def test_numbers_are_columns_of_a_file_without_a_header(tmp_path):
    items = read_items(write(tmp_path, "a.tsv", "n1\tnear\nn2\tfar\n"), [2], id_column=1)
    assert items.columns == {"2": ["near", "far"]}
    assert items.ids == ["n1", "n2"]
    assert items.rows == [1, 2]
    assert "no header line" in items.notes["reading"][0]


def test_a_header_that_is_a_number_is_a_header(tmp_path):
    items = read_items(write(tmp_path, "a.csv", "1,2\nnear,far\n"), ["2"])
    assert items.columns == {"2": ["far"]}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            ["wrod"],
            r"no column 'wrod'. Its header line has 'id', 'word'; did you mean 'word'\?.*views.a=wrod",
        ),
        (["word", "9"], r"no column '9'.*by number \(1, 2, …\)"),
        (["3"], "no column '3'"),
    ],
)
def test_a_missing_column_is_named_with_what_there_is(tmp_path, wanted, message):
    file = write(tmp_path, "a.csv", "id,word\nx,near\n")
    with pytest.raises(NearfarError, match=message):
        read_items(file, wanted, naming="views.a={name}")


def test_a_missing_id_or_group_column_names_its_own_option(tmp_path):
    file = write(tmp_path, "a.csv", "id,word\nx,near\n")
    with pytest.raises(NearfarError, match=r"no column 'key'.*id_column=NAME"):
        read_items(file, ["word"], id_column="key")
    with pytest.raises(NearfarError, match=r"no column 'patient'.*group_column=NAME"):
        read_items(file, ["word"], group_column="patient")


def test_two_columns_of_one_name(tmp_path):
    file = write(tmp_path, "a.csv", "word,word\nnear,far\n")
    with pytest.raises(NearfarError, match="several columns called 'word'"):
        read_items(file)


# -- missing values ------------------------------------------------------------------------------------------
def test_missing_values_are_none_and_words_for_it_are_noted(tmp_path):
    items = read_items(write(tmp_path, "a.csv", "word,text\nnear,N/A\n ,b \nfar,\nnan,c\n"))
    assert items["word"] == ["near", None, "far", None]
    assert items["text"] == [None, "b", None, "c"]
    assert items.notes["words for missing"] == {"word": {"nan": 1}, "text": {"N/A": 1}}
    assert len(items.rejections) == 0


def test_a_broken_row_costs_one_row(tmp_path):
    items = read_items(write(tmp_path, "a.tsv", "id\tword\na\tnear\nb\nc\tfar\n"))
    assert items.ids == ["a", "c"]
    assert items.rows == [2, 4]
    assert items.layout()["rejections"]["by_reason"] == {"wrong number of fields": 1}


def test_a_header_alone(tmp_path):
    with pytest.raises(NearfarError, match="no rows"):
        read_items(write(tmp_path, "a.tsv", "id\tword\n"))


# -- ids and groups ------------------------------------------------------------------------------------------
def test_rows_are_numbered_where_there_is_no_id(tmp_path):
    items = read_items(write(tmp_path, "a.csv", "word\nnear\nfar\n"))
    assert items.ids == ["row2", "row3"]


def test_a_column_called_id_that_repeats_is_none_unless_it_was_asked_for(tmp_path):
    file = write(tmp_path, "a.csv", "id,word\na,near\na,far\nb,next\n")
    items = read_items(file)
    assert items.ids == ["row2", "row3", "row4"]
    assert "row numbers" in items.notes["ids"]
    with pytest.raises(
        NearfarError, match=r"1 of 3 values of the id column 'id'.*first: row 3.*group column"
    ):
        read_items(file, id_column="id")


def test_few_repeated_ids_are_rejected(tmp_path):
    lines = [f"{i},w{i}" for i in range(30)] + ["3,again", ",none"]
    items = read_items(write(tmp_path, "a.csv", "\n".join(["key,word", *lines])), ["word"], id_column="key")
    assert len(items) == 30
    assert items.rejections.counts == {"repeated id": 1, "no id": 1}
    first = items.rejections.first["repeated id"][0]
    assert (first.row, first.value, first.detail) == (32, "3", "column 'key'")


def test_groups_and_rows_without_one(tmp_path):
    file = write(tmp_path, "a.csv", "word,patient\na,p\nb,p\nc,\nd,\n")
    items = read_items(file, ["word"], group_column="patient")
    assert list(items.columns) == ["word"]
    assert items.groups[0] == items.groups[1] == "p"
    assert len(set(items.groups)) == 3


# -- vectors -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["[1, 2.5, -3e1]", "[1 2.5  -3e1]"])
def test_lists_of_numbers_in_text_are_vectors(tmp_path, text):
    items = read_items(write(tmp_path, "a.tsv", f"w\tv\na\t{text}\nb\t{text}\nc\t\n"))
    assert items["v"].dtype == np.float32
    np.testing.assert_array_equal(items["v"][:2], [[1, 2.5, -30]] * 2)
    assert items.present("v").tolist() == [True, True, False]


def test_vectors_of_mixed_lengths_are_rejected_by_row(tmp_path):
    rows = [{"w": f"t{i}", "v": [i, 1.0]} for i in range(20)] + [{"w": "odd", "v": [1, 2, 3]}]
    file = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    items = read_items(file)
    assert items["v"].shape == (20, 2)
    assert items.rejections.counts == {"not 2 numbers": 1}
    assert items.rejections.first["not 2 numbers"][0].row == 21


def test_vectors_without_a_usual_length_stay_lists(tmp_path):
    file = write(tmp_path, "a.jsonl", '{"v": [1]}\n{"v": [1, 2]}\n{"v": [3, 4, 5]}\n')
    values = read_items(file)["v"]
    assert [list(value) for value in values] == [[1], [1, 2], [3, 4, 5]]


def test_a_vector_that_cannot_be_read_is_rejected(tmp_path):
    rows = ["[1, 2]"] * 20 + ["[1, x]"]
    items = read_items(write(tmp_path, "a.tsv", "\n".join(["v", *rows])))
    assert len(items) == 20
    assert items.rejections.first["no list of numbers"][0].value == "[1, x]"


def test_lists_of_words_are_joined(tmp_path):
    file = write(tmp_path, "a.jsonl", '{"names": ["a", "b"]}\n{"names": []}\n{"names": ["c"]}\n')
    items = read_items(file)
    assert items["names"] == ["a; b", None, "c"]
    assert items.notes["lists joined by '; '"] == ["names"]


def test_text_in_brackets_stays_text(tmp_path):
    items = read_items(write(tmp_path, "a.tsv", "t\n[laughs]\n[sighs]\n"))
    assert items["t"] == ["[laughs]", "[sighs]"]


def test_stacked_vectors_of_nothing():
    assert stack_vectors([None, None]) == ([None, None], None)


def test_columns_side_by_side_are_a_vector(tmp_path):
    file = write(tmp_path, "a.csv", "id,f1,F2,f10\na,1,2,3\nb,4,,6\nc,7,x,9\n")
    items = read_items(file, ["f*", "f1"])
    np.testing.assert_array_equal(items["f*"], [[1, 2, 3], [4, np.nan, 6]])
    assert items["f1"] == ["1", "4"]
    assert items.present("f*").tolist() == [True, False]
    assert items.rejections.counts == {"no number in 'F2'": 1}
    with pytest.raises(NearfarError, match=r"no column 'g\*'"):
        read_items(file, ["g*"])
    with pytest.raises(NearfarError, match=r"the columns 'i\*' are to be numbers side by side"):
        read_items(file, ["i*"])
    file = parquet(tmp_path / "a.parquet", x1=[1, 2], x2=[0.5, 1.5], t=["a", "b"])
    assert read_items(file, ["x*", "t"])["x*"].tolist() == [[1, 0.5], [2, 1.5]]


# -- one text a line -----------------------------------------------------------------------------------------
def test_a_text_file_without_columns_is_a_text_a_line(tmp_path):
    file = write(tmp_path, "a.txt", "First, a line.\n\nSecond; another, longer\nThird\n")
    items = read_items(file, ["text"])
    assert items["text"] == ["First, a line.", "Second; another, longer", "Third"]
    assert items.ids == ["row1", "row3", "row4"]
    assert items.rejections.counts == {"blank line": 1}
    table = write(tmp_path, "b.txt", "id\ttext\n1\ta\n")
    assert read_items(table, ["text"])["text"] == ["a"]


# -- pictures ------------------------------------------------------------------------------------------------
def test_pictures_are_sought_beside_the_table_and_in_images(tmp_path):
    beside, below = picture(tmp_path / "a.png"), picture(tmp_path / "images" / "sub" / "b.jpg")
    elsewhere = picture(tmp_path / "other" / "c.PNG")
    file = write(
        tmp_path, "t/../a.csv", f"image\na.png\nsub\\b.jpg\n/home/me/images/sub/b.jpg\n{elsewhere}\n"
    )
    paths = read_items(file, ["image"])["image"]
    assert [Path(path).resolve() for path in paths] == [beside, below, below, elsewhere]
    assert all(isinstance(path, str) for path in paths)


def test_a_missing_picture_is_rejected_with_its_row(tmp_path):
    picture(tmp_path / "a.png")
    items = read_items(write(tmp_path, "a.csv", "image,t\na.png,x\nb.png,y\n,z\n"))
    assert items["t"] == ["x", "z"]
    assert items["image"][1] is None
    first = items.rejections.first["no such picture"][0]
    assert (first.row, first.value, first.detail) == (3, "b.png", "column 'image'")


def test_no_picture_at_all_is_an_error_only_where_it_was_asked_for(tmp_path):
    file = write(tmp_path, "a.csv", "image,t\na.png,x\n")
    with pytest.raises(NearfarError, match=r"none of the 1 pictures.*sought in .*images"):
        read_items(file, ["image"])
    items = read_items(file)
    assert items["image"] == ["a.png"]
    assert items.notes["pictures that are not here"] == ["image"]


def test_addresses_of_pictures_are_not_loaded(tmp_path):
    file = write(tmp_path, "a.csv", "image\nhttps://host/a.png\n")
    with pytest.raises(NearfarError, match="holds addresses"):
        read_items(file, ["image"])


# -- arrays --------------------------------------------------------------------------------------------------
def test_npy_is_a_column_of_vectors(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(3, 2))
    items = read_items(tmp_path / "x.npy")
    assert items.ids == ["row1", "row2", "row3"]
    np.testing.assert_array_equal(items["vector"], [[0, 1], [2, 3], [4, 5]])


def test_npz_has_a_column_for_each_array(tmp_path):
    np.savez(
        tmp_path / "x.npz", a=np.arange(4.0).reshape(2, 2), id=np.array(["p", "q"]), label=np.array([3, 4])
    )
    items = read_items(tmp_path / "x.npz")
    assert items.ids == ["p", "q"]
    assert list(items.columns) == ["a", "label"]
    with pytest.raises(NearfarError, match=r"no column 'b'. Its arrays are 'a', 'id', 'label'"):
        read_items(tmp_path / "x.npz", ["b"])


def test_arrays_of_different_lengths_or_objects(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(3), b=np.zeros(2))
    with pytest.raises(NearfarError, match=r"different numbers of rows \(a 3, b 2\)"):
        read_items(tmp_path / "x.npz")
    assert len(read_items(tmp_path / "x.npz", ["a"])) == 3
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object))
    with pytest.raises(NearfarError, match="cannot be read as an array"):
        read_items(tmp_path / "o.npy")
    np.savez(tmp_path / "o.npz", a=np.array([{}], dtype=object))
    with pytest.raises(NearfarError, match="objects"):
        read_items(tmp_path / "o.npz")


# -- Parquet -------------------------------------------------------------------------------------------------
def parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_columns_keep_their_types(tmp_path):
    file = parquet(
        tmp_path / "a.parquet",
        id=["a", "b"],
        text=["near", None],
        whole=pa.array([1, 2], pa.int32()),
        holes=pa.array([1, None]),
        real=pa.array([0.5, None]),
        flag=[True, False],
        vector=pa.array([[1.0, 2.0], [3.0, None]], pa.list_(pa.float32())),
        fixed=pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2)),
        words=[["x", "y"], []],
        kind=pa.array(["u", "v"]).dictionary_encode(),
        day=pa.array([0, 1], pa.date32()),
    )
    items = read_items(file)
    assert items.ids == ["a", "b"]
    assert items["text"] == ["near", None]
    assert items["whole"].dtype == np.int32
    assert items["holes"] == [1, None]
    np.testing.assert_array_equal(items["real"], [0.5, np.nan])
    assert items["flag"].tolist() == [True, False]
    np.testing.assert_array_equal(items["vector"], [[1, 2], [3, np.nan]])
    assert items["fixed"].dtype == np.int64
    assert items["words"] == ["x; y", None]
    assert items["kind"] == ["u", "v"]
    assert items["day"] == ["1970-01-01", "1970-01-02"]


def test_parquet_vectors_of_mixed_lengths(tmp_path):
    file = parquet(tmp_path / "a.parquet", v=[[1.0, 2.0]] * 3000 + [[1.0]], t=["x"] * 3001)
    items = read_items(file, ["v"])
    assert items["v"].shape == (3000, 2)
    assert items.rejections.first["not 2 numbers"][0].row == 3001


def test_parquet_missing_column(tmp_path):
    file = parquet(tmp_path / "a.parquet", text=["x"])
    with pytest.raises(NearfarError, match=r"no column 'txt'. Its columns are 'text'; did you mean 'text'"):
        read_items(file, ["txt"])


def test_pictures_in_parquet_go_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))
    data = picture(tmp_path / "a.png").read_bytes()
    file = parquet(
        tmp_path / "a.parquet",
        image=[{"bytes": data, "path": "x.png"}, None],
        raw=pa.array([data, data]),
        sound=pa.array([b"RIFX", b"x"]),
    )
    items = read_items(file)
    assert Path(items["image"][0]).read_bytes() == data
    assert items["image"][1] is None
    assert items["raw"] == [items["image"][0]] * 2
    assert "sound" not in items
    assert list(items.notes.values()) == [["sound"]]
    with pytest.raises(NearfarError, match="bytes that are no picture"):
        read_items(file, ["sound"])
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "a.png"))
    with pytest.raises(NearfarError, match="set NEARFAR_CACHE"):
        read_items(file, ["image"])


def test_a_damaged_parquet_file(tmp_path):
    file = parquet(tmp_path / "a.parquet", text=["x" * 50] * 100)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(NearfarError, match="cannot be read as Parquet"):
        read_items(file)
