"""Augmentation of pictures against loops over pictures and pixels, and what it is drawn from."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nearfar.data.augment import (
    Augmentation,
    AugmentedViews,
    ColorJitter,
    GaussianBlur,
    Greyscale,
    HorizontalFlip,
    RandomCrop,
    SquareSymmetries,
    simclr_augmentation,
    square_symmetries,
)
from nearfar.data.batch import Draw, ItemDataset, Pixels
from nearfar.errors import NearfarError

GREY = np.array([0.299, 0.587, 0.114])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(40, 3, 9, 12, generator=torch.Generator().manual_seed(0))


def bilinear(picture: np.ndarray, y: float, x: float) -> np.ndarray:
    """The colour at a place in pixels, whose middles are at whole numbers; beyond the margin that of the margin."""
    height, width = picture.shape[1:]
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = min(int(y), height - 2), min(int(x), width - 2)
    down, across = y - top, x - left
    upper = (1 - across) * picture[:, top, left] + across * picture[:, top, left + 1]
    lower = (1 - across) * picture[:, top + 1, left] + across * picture[:, top + 1, left + 1]
    return (1 - down) * upper + down * lower


@pytest.mark.slow
def test_crops_against_a_loop_over_pixels(pixels: torch.Tensor) -> None:
    crop = RandomCrop((0.1, 0.9), (0.5, 2.0))
    cropped = crop(pixels[:5], rng()).numpy()
    boxes = crop.boxes(5, (9, 12), rng()).double().numpy()
    for picture, (left, top, width, height), result in zip(pixels.numpy(), boxes, cropped, strict=False):
        for row in range(9):
            for column in range(12):
                y = (top + height * (row + 0.5) / 9) * 9 - 0.5
                x = (left + width * (column + 0.5) / 12) * 12 - 0.5
                np.testing.assert_allclose(result[:, row, column], bilinear(picture, y, x), atol=1e-5)


def test_boxes_lie_inside_and_have_the_areas_that_were_asked_for() -> None:
    boxes = RandomCrop((0.3, 0.5), (0.9, 1 / 0.9)).boxes(4000, (20, 30), rng()).double()
    left, top, width, height = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert (left + width).max() <= 1 + 1e-6
    assert (top + height).max() <= 1 + 1e-6
    area = width * height
    assert area.min() >= 0.3 - 1e-6
    assert area.max() <= 0.5 + 1e-6
    assert area.mean() == pytest.approx(0.4, abs=0.005)
    ratio = width * 30 / (height * 20)
    assert ratio.min() >= 0.9 - 1e-6
    assert ratio.max() <= 1 / 0.9 + 1e-6
    assert ratio.log().mean() == pytest.approx(0, abs=0.005)
    whole = RandomCrop((1.0, 1.0), (1.0, 1.0))(pixels := torch.rand(2, 3, 8, 8), rng())
    torch.testing.assert_close(whole, pixels)


def test_flips(pixels: torch.Tensor) -> None:
    flipped = HorizontalFlip(0.5)(pixels, rng())
    chosen = rng().random(40) < 0.5
    assert 0 < chosen.sum() < 40
    for before, after, flip in zip(pixels, flipped, chosen, strict=True):
        assert torch.equal(after, before.flip(2) if flip else before)
    assert torch.equal(HorizontalFlip(0)(pixels, rng()), pixels)
    assert torch.equal(HorizontalFlip(1)(pixels, rng()), pixels.flip(3))


def test_colours_against_a_loop_over_pictures(pixels: torch.Tensor) -> None:
    jitter = ColorJitter(0.6, 0.5, 0.8, 0.0, probability=0.7)
    factors = jitter.factors(40, rng())
    changed = jitter(pixels, rng()).double().numpy()
    same = 0
    for picture, (brightness, contrast, saturation, hue), result in zip(
        pixels.double().numpy(), factors, changed, strict=True
    ):
        assert hue == 0
        same += (brightness, contrast, saturation) == (1, 1, 1)
        picture = picture * brightness
        mean = np.einsum("chw,c->", picture, GREY) / (9 * 12)
        picture = contrast * picture + (1 - contrast) * mean
        grey = np.einsum("chw,c->hw", picture, GREY)
        picture = saturation * picture + (1 - saturation) * grey
        np.testing.assert_allclose(result, np.clip(picture, 0, 1), atol=1e-5)
    assert 0 < same < 40


def test_hue_is_turned_about_the_greys(pixels: torch.Tensor) -> None:
    jitter = ColorJitter(0, 0, 0, 0.1, probability=1)
    turns = jitter.factors(40, rng())[:, 3]
    muted = 0.5 + (pixels - 0.5) * 0.2  # so that nothing is cut off
    changed = jitter(muted, rng()).double().numpy()
    for picture, turn, result in zip(muted.double().numpy(), turns, changed, strict=True):
        for row, column in ((0, 0), (4, 7), (8, 11)):
            y, i, q = colorsys.rgb_to_yiq(*picture[:, row, column])
            angle = 2 * np.pi * turn
            i, q = np.cos(angle) * i - np.sin(angle) * q, np.sin(angle) * i + np.cos(angle) * q
            expected = colorsys.yiq_to_rgb(y, i, q)
            np.testing.assert_allclose(
                result[:, row, column], expected, atol=0.01
            )  # its matrix has two digits
        np.testing.assert_allclose(
            np.einsum("chw,c->hw", result, GREY), np.einsum("chw,c->hw", picture, GREY), atol=1e-5
        )
    greys = torch.rand(5, 1, 4, 4).expand(-1, 3, -1, -1).contiguous()
    torch.testing.assert_close(ColorJitter(0, 0, 0.9, 0.5, 1)(greys, rng()), greys)


def test_greyscale(pixels: torch.Tensor) -> None:
    changed = Greyscale(0.4)(pixels, rng()).numpy()
    chosen = rng().random(40) < 0.4
    for before, after, grey in zip(pixels.numpy(), changed, chosen, strict=True):
        expected = np.broadcast_to(np.einsum("chw,c->hw", before, GREY), (3, 9, 12)) if grey else before
        np.testing.assert_allclose(after, expected, atol=1e-6)


def test_blur_against_scipy() -> None:
    pixels = torch.rand(30, 3, 25, 31, generator=torch.Generator().manual_seed(0))
    blurred = GaussianBlur((0.3, 1.5), 0.5)(pixels, rng()).double().numpy()
    random = rng()
    sigmas, chosen = random.uniform(0.3, 1.5, size=30), random.random(30) < 0.5
    for before, after, sigma, blur in zip(pixels.double().numpy(), blurred, sigmas, chosen, strict=True):
        if not blur:
            np.testing.assert_array_equal(after, before)
            continue

        def smooth(x: np.ndarray, sigma: float = sigma) -> np.ndarray:
            return gaussian_filter(x, sigma, mode="constant", truncate=12, axes=(-2, -1))

        # away from the margin, and there divided by the share of weights inside
        np.testing.assert_allclose(after, smooth(before) / smooth(np.ones_like(before)), atol=2e-5)
    tiny = GaussianBlur((1e-3, 1e-3), 1)(pixels, rng())
    torch.testing.assert_close(tiny, pixels)


def test_symmetries_against_a_loop() -> None:
    entropy = np.random.SeedSequence((3, 2, 7))  # what runs of tissue have always drawn from
    earlier = np.random.default_rng(entropy).integers(8, size=9)
    np.testing.assert_array_equal(Draw(3, 2, 7).numpy().integers(8, size=9), earlier)
    pixels = torch.randint(0, 256, (50, 3, 6, 6), dtype=torch.uint8)
    ways = rng().integers(8, size=50)
    turned = SquareSymmetries()(pixels, rng())
    for before, after, way in zip(pixels, turned, ways, strict=True):
        picture = before.flip(2) if way >= 4 else before
        assert torch.equal(after, picture.rot90(int(way) % 4, (1, 2)))
    assert (
        len({tuple(square_symmetries(pixels[:1], np.array([k])).flatten().tolist()) for k in range(8)}) == 8
    )
    with pytest.raises(NearfarError, match="no squares"):
        square_symmetries(pixels[:, :, :5], ways)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_types_and_ranges_stay(dtype: torch.dtype) -> None:
    pixels = torch.rand(16, 3, 32, 32, dtype=torch.float64)
    pixels = (pixels * 255).round().to(dtype) if dtype == torch.uint8 else pixels.to(dtype)
    before = pixels.clone()
    augmentation = simclr_augmentation(jitter=1.0, blur=0.5, side=32)
    changed = augmentation(pixels, rng())
    assert (changed.dtype, changed.shape) == (dtype, pixels.shape)
    assert torch.equal(pixels, before)
    assert changed.min() >= 0
    assert changed.max() <= (255 if dtype == torch.uint8 else 1)
    assert torch.equal(augmentation(pixels, rng()), changed)
    assert not torch.equal(augmentation(pixels, rng(1)), changed)
    assert augmentation(pixels[:0], rng()).shape == (0, 3, 32, 32)


def test_two_views_follow_from_seed_epoch_and_first_position() -> None:
    pictures = rng().integers(256, size=(20, 32, 32, 3), dtype=np.uint8)
    augment = AugmentedViews({"a": "image", "b": "image"}, simclr_augmentation())

    def batch(seed: int, epoch: int, positions: list[int]) -> Any:
        data = ItemDataset({"image": Pixels(pictures)}, augment=augment, seed=seed)
        data.set_epoch(epoch)
        return data.__getitems__(positions)

    once = batch(0, 2, [5, 3])
    assert torch.equal(once["image"], Pixels(pictures).batch(torch.tensor([5, 3])))
    assert not torch.equal(once["a"], once["b"])
    again = batch(0, 2, [5, 3])
    assert torch.equal(once["a"], again["a"])
    assert torch.equal(once["b"], again["b"])
    for other in (batch(1, 2, [5, 3]), batch(0, 3, [5, 3])):
        assert not torch.equal(once["a"], other["a"])
    torch.manual_seed(5)
    assert torch.equal(batch(0, 2, [5, 3])["a"], once["a"])  # no other generator plays a part


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomCrop((0.5, 0.2)), "the least comes first"),
        (lambda: RandomCrop((0, 1)), "above 0"),
        (lambda: RandomCrop((0.5, 1.5)), "at most 1"),
        (lambda: RandomCrop(0.5), "two numbers"),  # type: ignore[arg-type]
        (lambda: HorizontalFlip(1.5), "probability is 1.5"),
        (lambda: ColorJitter(hue=0.7), "hue is 0.7"),
        (lambda: ColorJitter(contrast=-1), "contrast is -1"),
        (lambda: GaussianBlur((0, 1)), "above 0"),
        (lambda: simclr_augmentation(crop=0), "crop is 0"),
        (lambda: simclr_augmentation(grey=2), "probability is 2"),
        (lambda: Augmentation([])(torch.zeros(3, 4, 4), rng()), "is needed"),
        (lambda: Augmentation([])(torch.zeros(1, 3, 4, 4, dtype=torch.int64), rng()), "int64"),
    ],
)
def test_wrong_arguments(make: Any, message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        make()
