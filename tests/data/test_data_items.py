"""Items: columns, missing values, splits by groups, numbers of equal values, hashes."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from nearfar.data.items import Items, hold_out, shared_values, value_groups
from nearfar.errors import NearfarError


def items() -> Items:
    return Items(
        ["a", "b", "c", "d"],
        {"word": ["Near", None, "far", " near"], "x": np.array([[1.0], [2.0], [np.nan], [4.0]])},
        rows=[2, 3, 5, 6],
        groups=["p", "p", "q", "r"],
    )


def test_taking_items_takes_every_column_group_and_row() -> None:
    part = items().take([3, 0])
    assert part.ids == ["d", "a"]
    assert part["word"] == [" near", "Near"]
    assert part["x"].tolist() == [[4.0], [1.0]]  # type: ignore[union-attr]
    assert (part.groups, part.rows) == (["r", "p"], [6, 2])


def test_rejected_items_are_counted_with_their_row_and_value() -> None:
    part = items().rejecting("word", [None, "no word", None, "odd"])
    assert part.ids == ["a", "c"]
    assert part.rejections.counts == {"no word": 1, "odd": 1}
    assert part.rejections.first["odd"][0].row == 6
    assert part.rejections.first["odd"][0].value == "near"
    assert len(part.rejecting("word", [None, "late"]).rejections) == 3


def test_equal_values_have_equal_numbers_across_splits() -> None:
    groups = value_groups({"train": items(), "val": Items(["e"], {"word": ["FAR"]})}, "word")
    assert groups["train"].tolist() == [0, -1, 1, 0]
    assert groups["val"].tolist() == [1]


def test_pictures_in_arrays_are_equal_byte_by_byte() -> None:
    pixels = np.zeros((3, 2, 2), np.uint8)
    pixels[1, 0, 0] = 1
    assert value_groups({"train": Items(["1", "2", "3"], {"image": pixels})}, "image")["train"].tolist() == [
        0,
        1,
        0,
    ]


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_in_one_part_and_every_item_is_in_exactly_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(12, size=100)
    whole = Items([str(i) for i in range(100)], {"n": np.arange(100)}, groups=groups)
    parts = hold_out(whole, {"val": 0.2, "test": 0.3}, seed)
    assert sorted(int(i) for part in parts.values() for i in part.ids) == list(range(100))
    assert all(part.ids == sorted(part.ids, key=int) for part in parts.values())
    owners = [set(np.asarray(part.groups).tolist()) for part in parts.values()]
    assert all(not a & b for a, b in combinations(owners, 2))
    assert hold_out(whole, {"val": 0.2, "test": 0.3}, seed)["val"].ids == parts["val"].ids


def test_what_cannot_be_split_or_looked_up_is_an_error() -> None:
    one = Items(["1", "2"], {}, groups=["g", "g"])
    with pytest.raises(NearfarError, match="2 items in 1 groups leave train empty"):
        hold_out(one, {"val": 0.5})
    with pytest.raises(NearfarError, match="lies between 0 and 1"):
        hold_out(items(), {"val": 1.0})
    with pytest.raises(NearfarError, match="column 'word' has 1 values for 2 ids"):
        Items(["1", "2"], {"word": ["a"]})
    with pytest.raises(NearfarError, match="did you mean 'word'"):
        items()["wrod"]


def test_the_content_hash_sees_values_ids_and_order() -> None:
    base = items().content_hash()
    assert items().content_hash() == base
    assert items().take([0, 1, 3, 2]).content_hash() != base
    other = items()
    other.columns["word"] = ["Near", None, "far", "near"]
    assert other.content_hash() != base
    assert other.content_hash("x") == items().content_hash("x")
    assert other.hash == items().take([3, 2, 1, 0]).hash  # of ids, without their order


def test_what_splits_share_is_counted_by_view_and_as_whole_items() -> None:
    train = Items(["1", "2", "3"], {"a": ["x", "y", "z"], "b": ["p", "q", None]})
    val = Items(["4", "5", "6"], {"a": ["X", "new", "y"], "b": ["other", "q", "q"]})
    splits = {"train": train, "val": val, "test": Items(["7"], {"a": ["only"], "b": [None]})}
    groups = {view: value_groups(splits, view) for view in "ab"}
    assert shared_values(groups, {name: items.ids for name, items in splits.items()}) == {
        "train/val": {
            "a": {"shared": 2, "rows": 2, "first": ["4", "6"]},
            "b": {"shared": 1, "rows": 2, "first": ["5", "6"]},
            "item": {"shared": 1, "rows": 1, "first": ["6"]},
        }
    }
