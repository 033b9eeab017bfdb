"""Labels in every form as codes that the splits share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nearfar.data.classes import class_codes, item_labels
from nearfar.errors import NearfarError


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a", " a ", "b;a ;a", None, "", "nan"], [("a",), ("a",), ("b", "a"), (), (), ()]),
        ([["a", "b"], [], ("b",), np.array(["c"])], [("a", "b"), (), ("b",), ("c",)]),
        (np.array([3, -1, 10]), [("3",), (), ("10",)]),
        (np.array([3.0, np.nan, -1.0]), [("3",), (), ()]),
        ([True, 0, np.int64(4)], [("True",), ("0",), ("4",)]),
    ],
)
def test_labels_of_items(values: Any, expected: list[tuple[str, ...]]) -> None:
    assert item_labels(values) == expected


def test_a_cell_may_be_one_label_whatever_is_in_it() -> None:
    assert item_labels(["a;b", "c"], separator=None) == [("a;b",), ("c",)]
    assert item_labels(["a|b"], separator="|") == [("a", "b")]


def test_what_is_no_class() -> None:
    with pytest.raises(NearfarError, match=r"price: 2\.5 is no class"):
        item_labels(np.array([1.0, 2.5]), "price")
    with pytest.raises(NearfarError, match="is no class"):
        item_labels([{"a": 1}])


def test_codes_are_shared_and_numbers_are_ordered_by_size() -> None:
    classes = class_codes(
        {"train": [("10",), ("9",), ()], "val": [("10",)], "test": [("8",), ("11",), ("9",), ()]}, False
    )
    assert classes.names == ["9", "10", "8", "11"]
    assert classes.known == 2
    assert {split: codes.tolist() for split, codes in classes.codes.items()} == {
        "train": [1, 0, -1],
        "val": [1],
        "test": [2, 3, 0, -1],
    }
    assert classes.counts.tolist() == [1, 1]
    assert [classes.lacking(split) for split in ("train", "val", "test")] == [0, 0, 2]


def test_several_labels() -> None:
    labels = {"train": [("b", "a"), ("a",), ()], "val": [("c",), ("c", "a"), ()]}
    classes = class_codes(labels, True)
    assert classes.codes["train"].tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert classes.codes["val"].tolist() == [[0, 0, 1], [1, 0, 1], [0, 0, 0]]
    assert classes.counts.tolist() == [2, 1]
    assert classes.lacking("val") == 1
    with pytest.raises(NearfarError, match="the labels b, a, and one each is needed"):
        class_codes(labels, False)
