"""Names and overlaps of splits; the content-addressed cache under damage, races and unwritable folders."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest

from nearfar.data.cache import cache_dir, cached_array, cached_arrays, content_key
from nearfar.data.splits import check_disjoint
from nearfar.errors import NearfarError
from nearfar.ids import split_hash


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_split_hash_depends_on_members_alone():
    ids = [f"m{i}" for i in range(100)]
    assert split_hash(ids) == split_hash(reversed(ids))
    assert split_hash(ids) != split_hash(ids[1:])
    assert split_hash(["a", "a"]) != split_hash(["a"])
    assert len(split_hash(ids)) == 16


def test_check_disjoint():
    assert check_disjoint({"train": ["a"], "val": ["b"], "test": ["c"]}) == {}
    splits = {"train": ["a", "b"], "val": ["c"], "test": ["b", "a", "b"]}
    found = check_disjoint(splits, "structure", on_leak="count")
    assert found == {"train/test": {"shared": 2, "rows": 3, "first": ["a", "b"]}}
    with pytest.raises(NearfarError, match=r"train and test share 2 structures \(3 rows of test\): a, b"):
        check_disjoint(splits, "structure")


def test_content_key_tells_contents_apart():
    keys = [
        content_key(["a", "bc"]),
        content_key(["ab", "c"]),
        content_key(["abc"]),
        content_key(b"abc"),
        content_key("abc"),
        content_key(1),
        content_key(1.0),
        content_key(True),
        content_key(None),
        content_key(np.arange(3)),
        content_key(np.arange(3, dtype=np.int32)),
        content_key(np.arange(3).reshape(3, 1)),
        content_key([[1], 2]),
        content_key([1, [2]]),
    ]
    assert len(set(keys)) == len(keys)
    assert content_key(np.arange(6)[::2]) == content_key(np.array([0, 2, 4]))
    with pytest.raises(TypeError, match="cache key"):
        content_key(object())


def test_second_call_reads_and_other_content_computes(cache):
    calls = []

    def compute():
        calls.append(1)
        return {"x": np.eye(2, dtype=np.float32), "n": np.array(7)}

    first = cached_arrays("things", ["key", 1], compute)
    second = cached_arrays("things", ["key", 1], compute)
    cached_arrays("things", ["key", 2], compute)
    cached_arrays("things", ["key", 1], compute, enabled=False)
    assert len(calls) == 3
    assert second["x"].dtype == np.float32
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert cache_dir() == cache
    assert len(list((cache / "things").glob("*.npz"))) == 2
    assert not list((cache / "things").glob(".writing*"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "garbage", "empty"])
def test_damaged_entry_is_computed_anew_with_a_warning(cache, damage):
    value = np.arange(5000)
    cached_array("things", "k", lambda: value)
    (path,) = (cache / "things").glob("*.npz")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0xFF
    path.write_bytes({"truncate": data[:1000], "flip": data, "garbage": b"x" * 300, "empty": b""}[damage])
    with pytest.warns(UserWarning, match="damaged"):
        again = cached_array("things", "k", lambda: value)
    np.testing.assert_array_equal(again, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(cached_array("things", "k", lambda: value * 0), value)


def test_unwritable_cache_costs_a_warning_not_the_run(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("NEARFAR_CACHE", str(blocked))
    with pytest.warns(UserWarning, match=r"not written|damaged"):
        assert cached_array("things", "k", lambda: np.ones(2)).sum() == 2


def test_an_error_while_computing_leaves_nothing_behind(cache):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached_array("things", "k", fail)
    assert not list(cache.rglob("*.npz"))


@pytest.mark.slow
def test_two_processes_at_once(cache):
    code = (
        "import numpy as np\nfrom nearfar.data.cache import cached_array\n"
        "for i in range(60):\n"
        "    a = cached_array('race', i % 7, lambda: np.full(20000, i % 7))\n"
        "    assert (a == i % 7).all()\n"
    )
    runs = [subprocess.Popen([sys.executable, "-W", "error", "-c", code]) for _ in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert len(list((cache / "race").iterdir())) == 7
