"""Pictures at one size: against Pillow, whatever they come as, and what is no picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nearfar.data.picture_arrays import PictureArrays, check_picture_values
from nearfar.errors import NearfarError

RNG = np.random.default_rng(0)

pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    for i, (height, width) in enumerate([(8, 8), (5, 9), (40, 20)]):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(RNG.integers(256, size=(height, width, 3), dtype=np.uint8)).save(paths[-1])
    Image.fromarray(RNG.integers(256, size=(6, 7), dtype=np.uint8)).save(tmp_path / "grey.png")
    return [*paths, tmp_path / "grey.png"]


def test_files_are_resized_as_pillow_does(files: list[Path]) -> None:
    pictures = PictureArrays([*files[:2], str(files[2]), files[3]], (8, 8))
    whole = pictures.whole()
    assert whole.shape == (4, 8, 8, 3)
    assert whole.dtype == np.uint8
    for path, picture in zip(files, whole, strict=True):
        image = Image.open(path).convert("RGB").resize((8, 8), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(picture, np.asarray(image))
    np.testing.assert_array_equal(pictures.part(1, 3), whole[1:3])
    np.testing.assert_array_equal(PictureArrays(files, (8, 8)).whole(), whole)  # from the cache


def test_arrays_are_left_alone_where_they_fit() -> None:
    grey = RNG.integers(256, size=(3, 4, 6), dtype=np.uint8)
    colour = np.repeat(grey[..., None], 3, axis=3)
    assert PictureArrays(colour, None).whole() is colour
    for values in (grey, grey[..., None], list(grey), list(colour)):
        np.testing.assert_array_equal(PictureArrays(values, (4, 6)).whole(), colour)
    grown = PictureArrays(grey, (8, 8)).whole()
    for before, after in zip(grey, grown, strict=True):
        image = Image.fromarray(before).resize((8, 8), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(after, np.asarray(image)[..., None].repeat(3, 2))


def test_an_array_mapped_from_disk(tmp_path: Path) -> None:
    colour = RNG.integers(256, size=(30, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", colour)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    pictures = PictureArrays(mapped, None)
    assert pictures.whole() is mapped
    assert pictures.key == PictureArrays(colour, (4, 4)).key
    np.testing.assert_array_equal(pictures.part(28, 40), colour[28:])


def test_the_key_follows_content_and_size(files: list[Path], tmp_path: Path) -> None:
    key = PictureArrays(files, (8, 8)).key
    (tmp_path / "elsewhere").mkdir()
    copies = [tmp_path / "elsewhere" / path.name for path in files]
    for path, copy in zip(files, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    assert PictureArrays(copies, (8, 8)).key == key
    assert PictureArrays(files, (8, 9)).key != key
    assert PictureArrays(files[::-1], (8, 8)).key != key
    Image.new("RGB", (4, 4)).save(copies[2])
    assert PictureArrays(copies, (8, 8)).key != key
    x = RNG.integers(256, size=(5, 4, 4, 3), dtype=np.uint8)
    y = x.copy()
    y[4, 3, 3, 2] ^= 1
    assert PictureArrays(x, None).key != PictureArrays(y, None).key


def test_reasons_for_files_that_are_no_pictures(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.png").write_text("<html>not found</html>")
    (tmp_path / "cut.png").write_bytes(files[2].read_bytes()[:300])
    values = [files[0], tmp_path / "empty.png", tmp_path / "page.png", tmp_path / "cut.png", "", tmp_path]
    values += [tmp_path / "none.png", 7, None, np.zeros((3, 3)), np.zeros((3, 3), np.uint8)]
    reasons = check_picture_values(values)
    wanted = (
        None, "empty", "text", "cannot be read", "neither", "a folder", "no such file", "neither", "neither",
        "float64", None,
    )  # fmt: skip
    for reason, part in zip(reasons, wanted, strict=True):
        assert (reason is None) == (part is None)
        assert part is None or (reason is not None and part in reason)
        assert str(tmp_path) not in (reason or "")
    assert check_picture_values(np.zeros((2, 3, 3), np.uint8)) == [None, None]
    with pytest.raises(NearfarError, match=r"none\.png: no such file"):
        _ = PictureArrays([files[0], tmp_path / "none.png"], (8, 8)).key
    with pytest.raises(NearfarError, match=r"empty\.png is empty"):
        PictureArrays([tmp_path / "empty.png"], (8, 8)).whole()


def test_wrong_arrays() -> None:
    for array, message in (
        (np.zeros((2, 3, 8, 8), np.uint8), "Colours come last"),
        (np.zeros((2, 8, 8, 3)), r"astype\('uint8'\)"),
        (np.zeros((2, 8), np.uint8), r"uint8 \(2, 8\)"),
        (np.zeros((2, 0, 8), np.uint8), "is needed"),
    ):
        with pytest.raises(NearfarError, match=message):
            PictureArrays(array, (8, 8))
    with pytest.raises(NearfarError, match="pictures in files differ"):
        PictureArrays(["a.png"], None)
    with pytest.raises(NearfarError, match="3 is no picture"):
        PictureArrays([3], (8, 8))


def test_parts_follow_the_content_and_not_the_count() -> None:
    pictures = RNG.integers(256, size=(3000, 2, 3), dtype=np.uint8)
    pictures[500:900] = pictures[500]  # equal ones, none or all of which could end a part
    parts = PictureArrays(pictures, (2, 3)).parts(64)
    assert [start for start, *_ in parts] == [0, *(stop for _, stop, _ in parts[:-1])]
    assert parts[-1][1] == 3000
    sizes = [stop - start for start, stop, _ in parts]
    assert min(sizes[:-1]) >= 16
    assert max(sizes) <= 256
    some = np.r_[0:1200, 1700:3000]
    known = {key for *_, key in parts}
    new = [
        stop - start
        for start, stop, key in PictureArrays(pictures[some], (2, 3)).parts(64)
        if key not in known
    ]
    assert sum(new) < 400  # of 2500: what is around the gap
    other = {key for *_, key in PictureArrays(pictures, (4, 4)).parts(64)}
    assert not known & other
    assert PictureArrays(pictures[:0], (2, 3)).parts() == []
