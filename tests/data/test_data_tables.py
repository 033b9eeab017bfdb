"""Reading tables: what comes out of good files, and what is said about bad ones."""

from __future__ import annotations

import csv
import gzip
import json
import os
import zipfile
from pathlib import Path

import pytest

from nearfar.data.rejections import Rejections
from nearfar.data.splits import data_paths
from nearfar.data.tables import open_table, read_table
from nearfar.errors import NearfarError

WANTED = {"smiles": ["smiles", "canonical_smiles"], "text": ["description", "text"], "id": ["cid", "id"]}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **overrides: str):
    return read_table(path, WANTED, overrides, optional=("id",))


def test_tsv_prose_with_quotes_stays_one_row_per_line(tmp_path):
    lines = ["CID\tSMILES\tdescription", '1\tC\tA "gas.', '2\tCC\t"Ethane" is said', '3\tCCC\tA 3" tube']
    table = read(write(tmp_path, "a.txt", "\n".join(lines)))
    assert table["id"] == ["1", "2", "3"]
    assert table["text"] == ['A "gas.', '"Ethane" is said', 'A 3" tube']
    assert table.rows == [2, 3, 4]


def test_tsv_field_quoted_as_a_whole_is_unquoted(tmp_path):
    table = read(write(tmp_path, "a.tsv", 'smiles\ttext\nC\t"a ""light"" gas"\n'))
    assert table["text"] == ['a "light" gas']


def test_odd_line_separators_inside_prose_do_not_end_a_row(tmp_path):
    table = read(write(tmp_path, "a.tsv", "smiles\ttext\r\nC\tone\u2028two\x0cthree\r\nCC\tb\r\n"))
    assert table["text"] == ["one\u2028two\x0cthree", "b"]


@pytest.mark.parametrize("bom", [b"\xef\xbb\xbf", b""])
def test_byte_order_mark(tmp_path, bom):
    table = read(write(tmp_path, "a.csv", bom + b"SMILES,text\nC,gas\n"))
    assert table.used["smiles"] == "SMILES"
    assert table["smiles"] == ["C"]


def test_utf16_is_understood(tmp_path):
    assert read(write(tmp_path, "a.tsv", "smiles\ttext\nC\tα\n".encode("utf-16")))["text"] == ["α"]


def test_csv_quotes_line_breaks_and_doubled_quotes(tmp_path):
    content = 'id,smiles,text\n1,C,"a, b"\n2,CC,"two\nlines, ""quoted"""\n3,CCC,plain\n'
    table = read(write(tmp_path, "a.csv", content))
    assert table["text"] == ["a, b", 'two\nlines, "quoted"', "plain"]
    assert table.rows == [2, 3, 5]
    assert len(table.rejections) == 0


def test_csv_broken_quote_costs_one_row(tmp_path):
    rows = [f"{i},C,row {i}" for i in range(600)]
    rows[5] = '5,C,"never closed'
    rows[300] = '300,C,"text" and more'
    table = read(write(tmp_path, "a.csv", "\n".join(["id,smiles,text", *rows])))
    assert len(table) == 598
    assert table.rejections.counts == {"broken quoting": 2}
    assert [kept.row for kept in table.rejections.first["broken quoting"]] == [7, 302]
    assert "5" not in table["id"]
    assert "6" in table["id"]


def test_wrong_number_of_fields_and_blank_lines_are_counted(tmp_path):
    table = read(write(tmp_path, "a.tsv", "id\tsmiles\ttext\n1\tC\ta\n2\tCC\n\n4\tCCC\tb\tc\n5\tO\td\n\n\n"))
    assert table["id"] == ["1", "5"]
    assert table.rejections.counts == {"wrong number of fields": 2, "blank line": 1}
    assert table.n_rows == 5
    assert table.rejections.first["wrong number of fields"][0].row == 3


def test_semicolon_csv(tmp_path):
    assert read(write(tmp_path, "a.csv", "smiles;text\nC;a, b\n"))["text"] == ["a, b"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"CID": [702.0, None], "SMILES": ["CCO", "C"], "Text": ["alcohol", None], "extra": [1, 2]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    table = read(tmp_path / "a.parquet")
    assert table.columns == {"smiles": ["CCO", "C"], "text": ["alcohol", ""], "id": ["702", ""]}
    with pytest.raises(NearfarError, match=r"cannot be read as Parquet"):
        read(write(tmp_path, "b.parquet", "not parquet"))


def test_override_and_alias_order(tmp_path):
    path = write(tmp_path, "a.csv", "Canonical SMILES,smiles,notes,text\nCO,OC,methanol,x\n")
    assert read(path)["smiles"] == ["OC"]
    table = read(path, smiles="canonical_smiles", text="Notes")
    assert (table["smiles"], table["text"]) == (["CO"], ["methanol"])
    assert "id" not in table


def test_missing_column_names_what_is_there(tmp_path):
    path = write(tmp_path, "a.csv", "smile,descriptio,key\nC,a,b\n")
    with pytest.raises(NearfarError) as error:
        read(path)
    for words in ("'smile'", "'descriptio'", "did you mean 'smile'?", "smiles_column=", "a.csv"):
        assert words in str(error.value)
    with pytest.raises(NearfarError, match=r"no column 'descr'.*did you mean 'descriptio'"):
        read(path, smiles="smile", text="descr")


def test_ambiguous_columns(tmp_path):
    path = write(tmp_path, "a.csv", "Smiles,SMILES,text\nC,CC,a\n")
    with pytest.raises(NearfarError, match="2 columns that could be smiles"):
        read(path)
    assert read(path, smiles="SMILES")["smiles"] == ["CC"]


@pytest.mark.slow
def test_bad_files(tmp_path):
    cases = {
        "empty.tsv": (b"", "is empty"),
        "blank.tsv": (b"\n\n  \n", "nothing but blank lines"),
        "header.tsv": (b"smiles\ttext\n", "has a header but no rows"),
        "latin.csv": ("smiles,text\nC,gas\nC,Säure\n".encode("latin-1"), "line 3: byte 0xe4"),
        "short.tsv": (b"smiles\ttext\nC\nCC\n", "none of its 2 rows is usable; 2 rows rejected"),
        "table.xlsx": (b"PK", "cannot be read as a spreadsheet"),
        "table.doc": (b"x", "cannot tell the format"),
    }
    for name, (content, words) in cases.items():
        path = write(tmp_path, name, content)
        with pytest.raises(NearfarError, match=words) as error:
            read(path)
        assert name in str(error.value)
    with pytest.raises(NearfarError, match=r"is a folder, not a file; it holds blank.tsv"):
        read(tmp_path)
    with pytest.raises(NearfarError, match=r"no file .*emty.tsv; did you mean 'empty.tsv'"):
        read(tmp_path / "emty.tsv")
    with pytest.raises(NearfarError, match="does not exist"):
        read(tmp_path / "nowhere" / "a.tsv")


PAIRS = [("C", "plain"), ("CC", "two\nlines, and a comma"), ("CCC", 'a "quoted" word'), ("CO", "tab\tinside")]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.txt"])
@pytest.mark.parametrize("mark", ["\t", ",", ";", "|"])
def test_what_a_library_writes_is_read_whole_whatever_the_delimiter(tmp_path, name, mark):
    with (tmp_path / name).open("w", newline="") as file:
        csv.writer(file, delimiter=mark).writerows([("smiles", "text"), *PAIRS])
    table = read(tmp_path / name)
    assert list(zip(table["smiles"], table["text"], strict=True)) == PAIRS
    assert len(table.rejections) == 0
    assert table.n_rows == 4


def test_how_an_ambiguous_file_was_read_is_said(tmp_path):
    rows = "".join(f'C{"C" * i}\t"text {i},\nsecond half"\n' for i in range(5))
    (note,) = read(write(tmp_path, "a.tsv", "smiles\ttext\n" + rows)).notes
    assert "quotation marks enclose fields (5 rows span several lines)" in note
    stray = "".join(f'C{"C" * i}\t"text" {i} of 3"\n' for i in range(5))
    table = read(write(tmp_path, "b.tsv", "smiles\ttext\n" + stray))
    assert table["text"][0] == '"text" 0 of 3"'
    assert table.notes == []


def test_a_quote_that_is_closed_rows_later_takes_no_rows_with_it(tmp_path):
    rows = [f"{i},C,row {i}" for i in range(30)]
    rows[5], rows[20] = '5,C,"never closed', '20,C,a tube of 3"'
    table = read(write(tmp_path, "a.csv", "\n".join(["id,smiles,text", *rows])))
    assert table.rejections.counts == {"broken quoting": 1}
    assert len(table) == 29


def test_a_very_long_field(tmp_path):
    text = "word, " * 50_000 + "\nend"
    table = read(write(tmp_path, "a.csv", f'smiles,text\nC,"{text}"\n'))
    assert table["text"] == [text]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("sep=;\nsmiles;text\nC;a, b\n", ["a, b"]),
        ("# made by X, in 2020\n# v2\nsmiles,text\nC,gas\n", ["gas"]),
        ("#smiles,text\nC,#1 gas\n", ["#1 gas"]),
        ("smiles,text\rC,gas\rCC,b\r", ["gas", "b"]),
        ("smiles,text,,\nC,gas,,\n", ["gas"]),
        ("smiles,text\nC,gas,,\n", ["gas"]),
        ("smiles,text\nC,ga\0s\nCC,b\n", ["b"]),
    ],
)
def test_oddities_of_exporters(tmp_path, content, texts):
    assert read(write(tmp_path, "a.csv", content))["text"] == texts


def test_other_formats_give_the_same_table(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    rows = [("smiles", "text"), *PAIRS]
    plain = "".join(f'{s},"{t.replace(chr(34), chr(34) * 2)}"\n' for s, t in rows)
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.create_sheet("notes").append(["read me"])
    book.save(tmp_path / "a.xlsx")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(plain.encode()))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("inside.csv", plain)
    objects = [{"smiles": s, "text": t} for s, t in PAIRS]
    columns = {name: {str(i): row[name] for i, row in enumerate(objects)} for name in ("smiles", "text")}
    split = {"columns": ["smiles", "text"], "index": [0], "data": [list(row) for row in PAIRS]}
    for name, value in {"list.json": objects, "columns.json": columns, "split.json": split}.items():
        write(tmp_path, name, json.dumps(value))
    write(tmp_path, "a.jsonl", "\n".join(json.dumps(item) for item in objects) + "\nnot json\n[1]\n")
    for path in sorted(tmp_path.iterdir()):
        table = read(path)
        assert list(zip(table["smiles"], table["text"], strict=True)) == PAIRS, path.name
    assert read(tmp_path / "a.jsonl").rejections.counts == {"no JSON": 1, "no JSON object": 1}
    assert "sheet 'Sheet' was read, and none of 'notes'" in read(tmp_path / "a.xlsx").notes


def test_the_encoding_that_an_error_advises_works(tmp_path):
    path = write(tmp_path, "a.csv", "smiles,text\nC,Säure\n".encode("cp1252"))
    with pytest.raises(NearfarError, match=r"data.encoding=cp1252, by which it reads '.*Säure"):
        open_table(path, encoding_option="data.encoding")
    assert open_table(path, "cp1252").column(1) == ["Säure"]
    wide = write(tmp_path, "b.csv", "smiles,text\nC,gas\n".encode("utf-16-le"))
    with pytest.raises(NearfarError, match=r"data.encoding=utf-16-le"):
        open_table(wide, encoding_option="data.encoding")
    assert open_table(wide, "utf-16-le").column(1) == ["gas"]
    with pytest.raises(NearfarError, match="no such encoding"):
        open_table(path, "base64")


def test_files_that_are_not_what_they_are_called(tmp_path):
    cases = {
        "a.csv": (gzip.compress(b"smiles,text\n"), "packed with gzip.*call it a.csv.gz"),
        "b.csv": (b"PK\x03\x04", "spreadsheet or a zip"),
        "c.csv.gz": (b"smiles,text\n", "cannot be read"),
        "d.csv.gz": (gzip.compress(b"smiles,text\n" * 100)[:30], "cannot be read"),
        "e.json": (b"[" * 100_000, "nested too deeply"),
        "f.json": (b"3", "a table is a list of objects"),
        "g.pkl": (b"x", "Loading a pickle runs what is in it"),
        "h.zip": (b"x", "cannot be read as a zip archive"),
    }
    for name, (content, words) in cases.items():
        with pytest.raises(NearfarError, match=words):
            read(write(tmp_path, name, content))


def test_two_files_for_one_split_are_refused(tmp_path):
    from omegaconf import OmegaConf

    for name in ("train.csv", "train.parquet"):
        write(tmp_path, name, "x")
    data = OmegaConf.create({"dir": str(tmp_path), "train": None, "val": None, "test": None})
    with pytest.raises(NearfarError, match=r"2 files for train \(train.csv, train.parquet\): say which"):
        data_paths(data)


def test_rejections_keep_the_first_and_count_all():
    seen = Rejections(keep=2)
    for row in range(10):
        seen.add("empty text", row, "x" * 500)
    other = Rejections()
    other.add("empty text", 99)
    other.add("unparsable SMILES", 3, "C1", "unclosed ring")
    seen.extend(other)
    saved = seen.as_dict()
    assert saved["total"] == 12 == len(seen) == seen.total
    assert saved["by_reason"] == {"empty text": 11, "unparsable SMILES": 1}
    assert [kept["row"] for kept in saved["first"]["empty text"]] == [0, 1]
    assert len(saved["first"]["empty text"][0]["value"]) <= 120
    assert Rejections.from_dict(saved, keep=2) == seen


@pytest.mark.data
def test_real_chebi_file_has_exactly_its_rows():
    folder = os.environ.get("NEARFAR_DATA")
    path = Path(folder or "") / "chebi20" / "validation.txt"
    if not folder or not path.exists():
        pytest.skip("NEARFAR_DATA has no chebi20")
    table = read(path)
    assert len(table) == 3301
    assert table.n_rows == 3301
    assert len(table.rejections) == 0
    assert all(value.isdigit() for value in table["id"])
    assert all(len(text) > 20 for text in table["text"])
