"""Reading pictures: every mode, the camera's orientation, damaged files; crops and resizes."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nearfar.data import images
from nearfar.data.images import check_image, crop, image_size, read_image, resize, stack
from nearfar.errors import NearfarError

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def picture() -> np.ndarray:
    """Large flat fields, so that JPEG keeps their colours: red, green above blue, grey."""
    out = np.zeros((32, 48, 3), np.uint8)
    out[:16, :24], out[:16, 24:] = (200, 30, 30), (30, 200, 30)
    out[16:, :24], out[16:, 24:] = (30, 30, 200), (120, 120, 120)
    return out


def near(a: np.ndarray, b: np.ndarray, most: float = 3) -> bool:
    return a.shape == b.shape and np.abs(a.astype(int) - b).mean() < most


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "webp", "tiff"])
def test_formats(tmp_path: Path, picture: np.ndarray, ending: str) -> None:
    path = tmp_path / f"p.{ending}"
    Image.fromarray(picture).save(path, **({"quality": 95} if ending in ("jpg", "webp") else {}))
    assert near(read_image(path), picture, 6)
    assert image_size(path) == (32, 48)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path: Path, picture: np.ndarray, orientation: int) -> None:
    # How a camera held in that position stores the scene, so that showing it upright undoes it.
    stored = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, 1),
        7: np.rot90(picture, 2).transpose(1, 0, 2),
        8: np.rot90(picture, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "p.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    np.testing.assert_array_equal(read_image(path), picture)
    assert image_size(path) == check_image(path) == picture.shape[:2]


def test_modes(tmp_path: Path, picture: np.ndarray) -> None:
    image = Image.fromarray(picture)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert near(read_image(tmp_path / "cmyk.jpg"), picture, 6)
    image.convert("L").save(tmp_path / "grey.jpg")
    grey = read_image(tmp_path / "grey.jpg")
    assert (grey == grey[..., :1]).all()
    image.quantize(16).save(tmp_path / "palette.gif")
    assert near(read_image(tmp_path / "palette.gif"), picture)
    image.convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(read_image(tmp_path / "bits.png"))) <= {0, 255}
    deep = (picture[..., 0].astype(np.uint16) << 8) + 77
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png")[..., 1], picture[..., 0])
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tiff")
    for look in (read_image, check_image):
        with pytest.raises(NearfarError, match=r"float.tiff holds 32-bit values"):
            look(tmp_path / "float.tiff")
    image.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (48, 32))] * 3)
    assert near(read_image(tmp_path / "moving.gif"), picture)


def test_transparent_pixels_lie_on_white(tmp_path: Path, picture: np.ndarray) -> None:
    alpha = np.full((32, 48, 1), 255, np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 0, 51
    Image.fromarray(np.concatenate([picture, alpha], 2)).save(tmp_path / "p.png")
    share = alpha / 255
    expected = picture * share + 255 * (1 - share)
    assert np.abs(read_image(tmp_path / "p.png") - expected).max() <= 1


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "webp", "bmp"])
def test_damaged_files_are_named(tmp_path: Path, ending: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"whole.{ending}"
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    for share in (0.5, 0.05, 0.0):
        cut = tmp_path / f"cut.{ending}"
        cut.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(NearfarError, match=f"cut.{ending}"):
            read_image(cut)
    text = tmp_path / f"text.{ending}"
    text.write_text("<html>404 Not Found</html>")
    with pytest.raises(NearfarError, match="is no picture"):
        read_image(text)
    with pytest.raises(NearfarError, match="no such file"):
        read_image(tmp_path / "nowhere.jpg")


@pytest.mark.slow
def test_large_files_are_no_bombs_and_the_limit_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Image.MAX_IMAGE_PIXELS
    Image.new("1", (14_000, 14_000)).save(tmp_path / "slide.png")
    assert image_size(tmp_path / "slide.png") == (14_000, 14_000)
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000_000)
    with pytest.raises(NearfarError, match="14000 × 14000 pixels, more than 1,000,000"):
        read_image(tmp_path / "slide.png")
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "webp", "tiff", "avif"])
def test_a_whole_decode_says_what_reading_says(tmp_path: Path, ending: str) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)
    path = tmp_path / f"p.{ending}"
    try:
        Image.fromarray(picture).save(path)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {ending}")
    data = path.read_bytes()
    assert check_image(path) == (24, 40)

    def readable(look: Callable[[Path], object]) -> bool:
        try:
            look(path)
        except NearfarError:  # anything else fails the test
            return False
        return True

    for cut in np.linspace(1, len(data) - 1, 25).astype(int):
        path.write_bytes(data[:cut])
        assert readable(check_image) == readable(read_image)
    for _ in range(25):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(0, len(data), 5)] = rng.integers(0, 256, 5)
        path.write_bytes(damaged.tobytes())
        assert readable(check_image) == readable(read_image)


def test_a_bomb_is_refused_by_its_head_and_no_format_starts_a_program(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    (tmp_path / "p.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    for look in (check_image, image_size, read_image):
        with pytest.raises(NearfarError, match=r"bomb\.png claims 100000 × 100000 pixels"):
            look(tmp_path / "bomb.png")
        with pytest.raises(NearfarError, match=r"p\.jpg is no picture"):
            look(tmp_path / "p.jpg")


def test_crop_is_the_mean_over_what_a_pixel_covers() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop(pixels, (2, 1, 10, 7), (6, 8)), pixels[1:7, 2:10])
    np.testing.assert_array_equal(resize(pixels, (12, 16)), pixels)
    # Outside the picture there is nothing: the part inside is what is resized.
    np.testing.assert_array_equal(crop(pixels, (-5, -5, 8, 6), (6, 8)), pixels[:6, :8])
    flat = np.full((12, 16, 3), 77, np.uint8)
    assert (crop(flat, (0.5, 0.5, 3.25, 9.75), (128, 128)) == 77).all()
    with pytest.raises(NearfarError, match="covers nothing"):
        crop(pixels, (16, 0, 20, 5), (8, 8))
    with pytest.raises(NearfarError, match="covers nothing"):
        crop(pixels, (5, 5, 5, 9), (8, 8))
    with pytest.raises(NearfarError, match="covers nothing"):
        crop(pixels, (5, 5, float("nan"), 9), (8, 8))


def test_stack_wants_one_size() -> None:
    a = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert (stack([a, a])[1, 2] == a[..., 2]).all()
    with pytest.raises(NearfarError, match="one size"):
        stack([a, a[:1]])
    with pytest.raises(NearfarError, match="none"):
        stack([])


@pytest.mark.slow
@pytest.mark.data
def test_every_photo_at_hand() -> None:
    data = os.environ.get("NEARFAR_DATA")
    if not data or not (Path(data) / "vrd" / "images").is_dir():
        pytest.skip("NEARFAR_DATA is not set")
    photos = sorted((Path(data) / "vrd" / "images").iterdir())
    assert photos
    for path in photos:
        assert read_image(path).shape[:2] == image_size(path)
