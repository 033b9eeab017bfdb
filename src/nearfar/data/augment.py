"""Pictures changed at random, a whole batch at a time: crops, flips, colours, blur, the symmetries of a square.

Every change takes a batch of pixels (b, 3, h, w), floats from 0 to 1, and a NumPy generator, draws what it needs for
each picture, and gives pixels of the same shape. `Augmentation` puts them in a row, and `AugmentedViews` makes the
views of a batch: SimCLR (Chen et al. 2020) sees a picture twice. All that is drawn follows from a `Draw`: (seed, epoch,
first position of the batch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from nearfar.arguments import number
from nearfar.data.batch import Batch, Draw
from nearfar.errors import NearfarError

__all__ = [
    "Augmentation",
    "AugmentedViews",
    "Change",
    "ColorJitter",
    "GaussianBlur",
    "Greyscale",
    "HorizontalFlip",
    "RandomCrop",
    "SquareSymmetries",
    "simclr_augmentation",
    "square_symmetries",
]

_GREY = (0.299, 0.587, 0.114)  # how bright red, green and blue look (ITU-R BT.601)


class Change(Protocol):
    """One random change of pictures."""

    def __call__(
        self, pixels: Float[Tensor, "b 3 h w"], random: np.random.Generator
    ) -> Float[Tensor, "b 3 h w"]: ...


@dataclass(frozen=True)
class RandomCrop:
    """A part of the picture, brought to the size of the whole (bilinear): "random resized crop" (Szegedy et al. 2015).

    Args:
        scale: least and largest share of the area, drawn uniformly.
        ratio: least and largest width / height in pixels, drawn uniformly in its logarithm.

    Sides longer than the picture's are cut to these, and the place is uniform among those inside the picture. A part is
    never larger than what it is brought to, so that nothing has to be averaged.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        _range("scale", self.scale, 0.0, 1.0)
        _range("ratio", self.ratio, 0.0, math.inf)

    def boxes(self, count: int, size: tuple[int, int], random: np.random.Generator) -> Float[Tensor, "b 4"]:
        """Left, top, width and height of ``count`` parts, as shares of a picture of ``size`` = (height, width)."""
        area = random.uniform(*self.scale, size=count)
        low, high = (math.log(each) for each in self.ratio)
        ratio = np.exp(random.uniform(low, high, size=count)) * size[0] / size[1]
        width, height = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
        left, top = (random.random(count) * (1 - side) for side in (width, height))
        return torch.from_numpy(np.stack([left, top, width, height], axis=1)).float()

    def __call__(
        self, pixels: Float[Tensor, "b 3 h w"], random: np.random.Generator
    ) -> Float[Tensor, "b 3 h w"]:
        height, width = pixels.shape[2:]
        boxes = self.boxes(len(pixels), (height, width), random).to(pixels.device)
        # The middles of the new pixels, in the coordinates of grid_sample: the picture reaches from −1 to 1.
        x, y = ((2 * torch.arange(side, device=pixels.device) + 1) / side for side in (width, height))
        across = 2 * boxes[:, :1] - 1 + boxes[:, 2:3] * x
        down = 2 * boxes[:, 1:2] - 1 + boxes[:, 3:4] * y
        shape = (len(pixels), height, width)
        grid = torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], dim=3)
        return F.grid_sample(
            pixels, grid.to(pixels.dtype), mode="bilinear", padding_mode="border", align_corners=False
        )


@dataclass(frozen=True)
class HorizontalFlip:
    """Left and right exchanged, with this ``probability``."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        number("probability", self.probability, least=0, most=1)

    def __call__(
        self, pixels: Float[Tensor, "b 3 h w"], random: np.random.Generator
    ) -> Float[Tensor, "b 3 h w"]:
        rows = _chosen(self.probability, pixels, random)
        return pixels.index_copy(0, rows, pixels.index_select(0, rows).flip(3))


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue changed in this order, with this ``probability``.

    Args:
        brightness: b multiplies by a factor drawn from [max(0, 1 − b), 1 + b].
        contrast: likewise, of the distance to the picture's mean grey.
        saturation: likewise, of the distance of each pixel to its own grey.
        hue: h turns the hue by an angle drawn from ±h full turns (0 to .5), about the axis of greys in YIQ.

    Every picture is changed by one linear map of its colours; what leaves 0 to 1 is cut off once, at the end.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    probability: float = 0.8

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            number(name, getattr(self, name), least=0)
        number("hue", self.hue, least=0, most=0.5)
        number("probability", self.probability, least=0, most=1)

    def factors(self, count: int, random: np.random.Generator) -> Float[np.ndarray, "b 4"]:
        """Brightness, contrast and saturation as factors, hue in turns, of ``count`` pictures; 1, 1, 1, 0 changes
        nothing."""
        parts = [
            random.uniform(max(0.0, 1 - each), 1 + each, size=count)
            for each in (self.brightness, self.contrast, self.saturation)
        ]
        drawn = np.stack([*parts, random.uniform(-self.hue, self.hue, size=count)], axis=1)
        left_alone = random.random(count) >= self.probability
        drawn[left_alone] = (1, 1, 1, 0)
        return drawn

    def __call__(
        self, pixels: Float[Tensor, "b 3 h w"], random: np.random.Generator
    ) -> Float[Tensor, "b 3 h w"]:
        factors = self.factors(len(pixels), random)
        changed = np.flatnonzero(np.any(factors != (1, 1, 1, 0), axis=1))
        rows = torch.from_numpy(changed).to(pixels.device)
        chosen = pixels.index_select(0, rows).flatten(2)
        drawn = torch.from_numpy(factors[changed]).to(pixels.device, pixels.dtype)
        brightness, contrast, saturation, hue = drawn[:, :, None, None].unbind(1)
        grey = pixels.new_tensor(_GREY)
        one = torch.eye(3, dtype=pixels.dtype, device=pixels.device)
        saturate = saturation * one + (1 - saturation) * grey  # each row of the second: the grey of a colour
        colours = _hue_rotation(hue) @ saturate * (brightness * contrast)
        # A grey, which neither saturation nor hue changes.
        shift = (1 - contrast) * brightness * (chosen.mean(2) @ grey)[:, None, None]
        mapped = torch.baddbmm(shift, colours, chosen).clamp_(0, 1)
        return pixels.index_copy(0, rows, mapped.view(-1, *pixels.shape[1:]))


@dataclass(frozen=True)
class Greyscale:
    """Colours lost, with this ``probability``; three equal colours stay."""

    probability: float = 0.2

    def __post_init__(self) -> None:
        number("probability", self.probability, least=0, most=1)

    def __call__(
        self, pixels: Float[Tensor, "b 3 h w"], random: np.random.Generator
    ) -> Float[Tensor, "b 3 h w"]:
        rows = _chosen(self.probability, pixels, random)
        red, green, blue = pixels.index_select(0, rows).unbind(1)
        grey = _GREY[0] * red + _GREY[1] * green + _GREY[2] * blue
        return pixels.index_copy(0, rows, grey[:, None].expand(-1, 3, -1, -1))


@dataclass(frozen=True)
class GaussianBlur:
    """A Gaussian blur, with this ``probability``.

    Args:
        sigma: least and largest standard deviation in pixels, drawn uniformly. SimCLR takes .1 to 2 at 224 pixels, and
            does not blur pictures of 32.

    At the margin the weights of the pixels that are there are brought to a sum of 1.
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    probability: float = 0.5

    def __post_init__(self) -> None:
        _range("sigma", self.sigma, 0.0, math.inf)
        number("probability", self.probability, least=0, most=1)

    def __call__(
        self, pixels: Float[Tensor, "b 3 h w"], random: np.random.Generator
    ) -> Float[Tensor, "b 3 h w"]:
        drawn = random.uniform(*self.sigma, size=len(pixels))
        rows = _chosen(self.probability, pixels, random)
        sigma = torch.from_numpy(drawn).to(pixels.device, pixels.dtype)[rows]
        height, width = pixels.shape[2:]
        # Two products for each picture, its colours side by side: faster than any convolution of that width.
        lines = pixels.index_select(0, rows).view(-1, 3 * height, width) @ _blur_weights(width, sigma).mT
        columns = lines.view(-1, 3, height, width).transpose(1, 2).reshape(-1, height, 3 * width)
        blurred = (_blur_weights(height, sigma) @ columns).view(-1, height, 3, width).transpose(1, 2)
        return pixels.index_copy(0, rows, blurred)


@dataclass(frozen=True)
class SquareSymmetries:
    """One of the 8 symmetries of a square (four turns, each mirrored or not), for pictures that have no upright."""

    def __call__(
        self, pixels: Float[Tensor, "b 3 h w"], random: np.random.Generator
    ) -> Float[Tensor, "b 3 h w"]:
        return square_symmetries(pixels, random.integers(8, size=len(pixels)))


def square_symmetries(
    pixels: Shaped[Tensor, "b c s s"], ways: Int[np.ndarray, " b"]
) -> Shaped[Tensor, "b c s s"]:
    """Every picture turned ``way`` mod 4 times by a right angle, counter-clockwise, from 4 on after being mirrored.

    >>> square_symmetries(torch.arange(4.0).view(1, 1, 2, 2), np.array([5]))[0, 0].tolist()
    [[0.0, 2.0], [1.0, 3.0]]
    """
    if pixels.shape[2] != pixels.shape[3]:
        raise NearfarError(
            f"pictures of {pixels.shape[2]} × {pixels.shape[3]} pixels cannot be turned: they are no squares."
        )
    draw = torch.from_numpy(ways)
    turned = pixels.clone()
    for way in range(1, 8):
        own = (draw == way).nonzero().flatten()
        if len(own):
            part = pixels[own].flip(3) if way >= 4 else pixels[own]
            turned[own] = part.rot90(way % 4, (2, 3))
    return turned


class Augmentation:
    """Changes in a row, over pictures of uint8 or floats from 0 to 1, which come back in the type they had.

    >>> pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    >>> augmentation = Augmentation([RandomCrop(), HorizontalFlip()])
    >>> once, again = (augmentation(pixels, Draw(seed=0, epoch=1, first=0).numpy()) for _ in range(2))
    >>> once.dtype, bool((once == again).all()), bool((once == pixels).all())
    (torch.uint8, True, False)
    """

    def __init__(self, changes: Sequence[Change]) -> None:
        self.changes = list(changes)

    def __call__(
        self, pixels: Shaped[Tensor, "b 3 h w"], random: np.random.Generator
    ) -> Shaped[Tensor, "b 3 h w"]:
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise NearfarError(
                f"pixels have shape {tuple(pixels.shape)}, but (b, 3, height, width) is needed"
            )
        whole = pixels.dtype == torch.uint8
        if not whole and not pixels.is_floating_point():
            raise NearfarError(f"pixels are {pixels.dtype}: uint8, or floats from 0 to 1, are needed")
        changed = pixels.float() / 255 if whole else pixels
        for change in self.changes:
            changed = change(changed, random)
        return (changed * 255).round_().to(torch.uint8) if whole else changed

    def __repr__(self) -> str:
        return f"Augmentation({self.changes})"


class AugmentedViews:
    """The ``augment=`` of an `ItemDataset`: fields of a batch, each an augmentation of its own of some field.

    ``views`` names for each new field the field that it is made of. They are drawn one after another, so that two views
    of one field differ.

    >>> batch = Batch(torch.arange(2), {"image": torch.rand(2, 3, 8, 8)})
    >>> twice = AugmentedViews({"first": "image", "second": "image"}, Augmentation([RandomCrop()]))
    >>> views = twice(batch, Draw(0, 0, 0))
    >>> list(views), bool((views.tensor("first") == views.tensor("second")).all())
    (['image', 'first', 'second'], False)
    """

    def __init__(self, views: Mapping[str, str], augmentation: Augmentation) -> None:
        self.views, self.augmentation = dict(views), augmentation

    def __call__(self, batch: Batch, draw: Draw) -> Batch:
        random = draw.numpy()
        made = {new: self.augmentation(batch.tensor(source), random) for new, source in self.views.items()}
        return batch.replaced(**made)


def simclr_augmentation(
    crop: float = 0.2,
    flip: float = 0.5,
    jitter: float = 0.5,
    grey: float = 0.2,
    blur: float = 0.0,
    side: int = 224,
) -> Augmentation:
    """The changes of SimCLR (Chen et al. 2020), each left out at 0.

    Args:
        crop: least share of the area in `RandomCrop`; 1 leaves pictures whole.
        flip: probability that left and right are exchanged.
        jitter: strength s of `ColorJitter`, with probability .8: brightness, contrast and saturation .8 s, hue .2 s.
        grey: probability of `Greyscale`.
        blur: probability of `GaussianBlur`, of .1 to 2 pixels at a ``side`` of 224 and in proportion at others.
        side: pixels of a picture's side.

    >>> simclr_augmentation(crop=0.3, jitter=0, grey=0)
    Augmentation([RandomCrop(scale=(0.3, 1.0), ratio=(0.75, 1.3333333333333333)), HorizontalFlip(probability=0.5)])
    """
    number("crop", crop, above=0, most=1)
    number("jitter", jitter, least=0)
    changes: list[Change] = []
    if crop < 1:
        changes.append(RandomCrop((crop, 1.0)))
    if flip:
        changes.append(HorizontalFlip(flip))
    if jitter:
        changes.append(ColorJitter(0.8 * jitter, 0.8 * jitter, 0.8 * jitter, min(0.5, 0.2 * jitter)))
    if grey:
        changes.append(Greyscale(grey))
    if blur:
        changes.append(GaussianBlur((0.1 * side / 224, 2 * side / 224), blur))
    return Augmentation(changes)


def _chosen(probability: float, pixels: Tensor, random: np.random.Generator) -> Int[Tensor, " k"]:
    """The positions of pictures that are changed."""
    return torch.from_numpy(np.flatnonzero(random.random(len(pixels)) < probability)).to(pixels.device)


def _hue_rotation(turns: Float[Tensor, "b 1 1"]) -> Float[Tensor, "b 3 3"]:
    """Colours turned about the axis of greys: a rotation of I and Q of the YIQ colour space."""
    to_yiq = torch.tensor(
        [_GREY, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)],
        dtype=turns.dtype,
        device=turns.device,
    )
    angle = 2 * math.pi * turns[:, 0, 0]
    rotation = torch.eye(3, dtype=turns.dtype, device=turns.device).repeat(len(turns), 1, 1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -angle.sin(), angle.sin()
    return torch.linalg.inv(to_yiq) @ rotation @ to_yiq


def _blur_weights(side: int, sigma: Float[Tensor, " b"]) -> Float[Tensor, "b side side"]:
    """Weights of all pixels of a line in each blurred one."""
    at = torch.arange(side, device=sigma.device, dtype=sigma.dtype)
    exponent = -((at[:, None] - at).square() / (2 * sigma.square()[:, None, None]))
    # e⁻³⁰ changes no pixel, and smaller numbers, down to denormal ones, take a CPU several times as long.
    return torch.softmax(exponent.clamp(min=-30), dim=2)


def _range(name: str, values: tuple[float, float], above: float, at_most: float) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 2:
        raise NearfarError(f"{name}={values!r}: two numbers are needed, the least and the largest.")
    for value in values:
        number(name, value, above=above, most=at_most)
    if values[0] > values[1]:
        raise NearfarError(f"{name}={tuple(values)}: the least comes first.")
