"""The filter that users write: what it means, and what is said about one that means nothing."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import NearfarError
from nearfar.serving.stores import column_kind, parse_where
from nearfar.serving.stores.base import field_names, table_name, without_password

KINDS: dict[str, Any] = {"lang": "text", "price": "number", "new": "boolean", "a in b": "text", "a": "text"}


def parsed(where: Any) -> list[tuple[str, str, tuple[Any, ...]]]:
    return [(each.column, each.operator, each.values) for each in parse_where(where, KINDS)]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, []),
        ([], []),
        ("lang=de", [("lang", "in", ("de",))]),
        (" lang == de ", [("lang", "in", ("de",))]),
        ("lang<>de", [("lang", "not in", ("de",))]),
        ("price<=1e3", [("price", "<=", (1000.0,))]),
        ("price>-2", [("price", ">", (-2.0,))]),
        ("new=Yes,new!=0", [("new", "in", (True,)), ("new", "not in", (False,))]),
        ("lang IN a, b ,price<3", [("lang", "in", ("a", "b")), ("price", "<", (3.0,))]),
        ("lang not  in a,a", [("lang", "not in", ("a",))]),
        ('lang="a, b",price=1', [("lang", "in", ("a, b",)), ("price", "in", (1.0,))]),
        ('lang in "x=1","say ""hi"""', [("lang", "in", ("x=1", 'say "hi"'))]),
        ("lang=a=b", [("lang", "in", ("a=b",))]),
        ('lang=""', [("lang", "in", ("",))]),
        ("lang=in a box", [("lang", "in", ("in a box",))]),
        ("a in b=c", [("a in b", "in", ("c",))]),
        ("a in b", [("a", "in", ("b",))]),
        ('"a in b" in c,d', [("a in b", "in", ("c", "d"))]),
        (["lang=de", "price<3"], [("lang", "in", ("de",)), ("price", "<", (3.0,))]),
    ],
)
def test_meaning(where: Any, expected: list[Any]) -> None:
    assert parsed(where) == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("lnag=de", "did you mean 'lang'"),
        ("price<cheap", "'cheap' is not a number"),
        ("price<nan", "'nan' is not a number"),
        ("new=perhaps", "is not true or false"),
        ("lang<3", "holds texts, and < compares numbers"),
        ("lang", "is no condition"),
        ("lang=de,en", "'en' is no condition"),
        ("lang=", "a value of 'lang' is empty"),
        ("lang in ", "a value of 'lang' is empty"),
        ("", "holds no condition"),
        ('lang="de', "a double quote is not closed"),
        ("price<3,", "is no condition"),
    ],
)
def test_what_means_nothing(where: str, message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        parse_where(where, KINDS)


def test_a_gallery_without_columns() -> None:
    with pytest.raises(NearfarError, match="no columns to filter by"):
        parse_where("a=1", {})


@pytest.mark.slow
@given(st.text(max_size=20))
def test_a_quoted_text_is_that_text(text: str) -> None:
    quoted = '"' + text.replace('"', '""') + '"'
    assert parsed(f"lang={quoted},price<3") == [("lang", "in", (text,)), ("price", "<", (3.0,))]


@pytest.mark.slow
@given(st.text(max_size=30))
def test_any_text_is_a_filter_or_an_error(text: str) -> None:
    with suppress(NearfarError):
        assert parse_where(text, KINDS)


def test_kinds_of_columns() -> None:
    assert column_kind([None, float("nan")]) == "text"
    assert column_kind([1, "2"]) == "text"
    assert column_kind([True, 1]) == "text"
    assert column_kind([None, 2, 0.5]) == "number"
    assert column_kind([None, False]) == "boolean"


@pytest.mark.slow
@given(st.lists(st.text(max_size=60), unique=True, max_size=8))
def test_names_in_a_database_are_plain_and_distinct(columns: list[str]) -> None:
    names = field_names(columns)
    assert list(names) == columns
    folded = [name.lower() for name in names.values()]
    assert len(set(folded)) == len(folded)
    assert all(
        name.isascii() and name.isidentifier() and name.lower() not in ("id", "vector")
        for name in names.values()
    )


def test_places_in_messages() -> None:
    assert without_password("postgresql://me:a@b@host/db") == "postgresql://me:***@host/db"
    assert (
        without_password("postgresql:///db?user=me&password=s3&x=1")
        == "postgresql:///db?user=me&password=***&x=1"
    )
    assert table_name("lance:a/b#cats") == ("lance:a/b", "cats")
    for wrong in ("lance:x#1cat", "lance:x#a;b", "lance:x#" + "a" * 60):
        with pytest.raises(NearfarError, match="is no name of a table"):
            table_name(wrong)
