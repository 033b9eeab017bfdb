"""Reading tables: what comes out of good files, and what is said about bad ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nearfar.data.rejections import Rejections
from nearfar.data.tables import read_table
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
