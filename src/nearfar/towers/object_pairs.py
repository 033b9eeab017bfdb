"""Two objects in a photo beside the geometry of their boxes: the pixels of both crops, and both names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import nn

from nearfar.data.batch import Rows
from nearfar.data.cache import cached_arrays
from nearfar.data.files import Json
from nearfar.data.images import Box, Crops, File, Photo, crop, stack
from nearfar.data.items import Column
from nearfar.errors import NearfarError
from nearfar.models.image import ImageEncoder, build_image_encoder
from nearfar.models.image.build import has_image_encoder, load_image_encoder, save_image_encoder
from nearfar.models.views import PassThrough
from nearfar.towers.base import Tower, TowerGraph, read_tower_spec, write_tower_spec
from nearfar.towers.text import TextTower
from nearfar.towers.vector import Scaler

__all__ = ["CropTower", "NamesTower"]

_VERSION = 1  # of how crops are cut; part of every cache key
_NETWORK = "network"  # the folder of a copy of the encoder
_NAMES = ("kind", "name", "pretrained", "revision")  # options of an encoder that its copy states itself
_BATCH = 64
_MANY = 50  # pictures whose features take long enough to say so


class CropTower(Tower):
    """Features of both crops side by side by a frozen image encoder, standardised by the training rows.

    A value is a `Crops`, or what it can be made of.

    Args:
        encoder: options of the image encoder, as ``image_encoder=`` has them; None: EfficientNet-lite0.
        size: width and height of a crop in pixels.

    Features are computed once and kept by picture: the key is its content, its boxes, the encoder's weights and
    the size of the crops.

    >>> tower = CropTower({"kind": "small", "features": 16}, 32)
    >>> tower.build().width
    32
    """

    kind = "crops"
    #: announces that features are computed, which takes a while
    say: Callable[[str], None] | None = None

    def __init__(self, encoder: Json | None = None, size: int = 128) -> None:
        if encoder is not None and (not isinstance(encoder, Mapping) or "kind" not in encoder):
            raise NearfarError(
                f"encoder={encoder}: options of an image encoder are needed, such as encoder.kind=efficientnet."
            )
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise NearfarError(f"size={size}: a whole number of pixels from 1 on is needed.")
        self.encoder_options, self.size = dict(encoder or {"kind": "efficientnet"}), size
        self.train = "head"
        self.scaler: Scaler | None = None
        self._encoder: ImageEncoder | None = None

    @property
    def encoder(self) -> ImageEncoder:
        """The frozen encoder; its weights are read when they are first needed."""
        if self._encoder is None:
            self._encoder = build_image_encoder(**self.encoder_options, frozen=True, seed=0)
        return self._encoder

    @property
    def description(self) -> str:
        return f"crops of {self.size} × {self.size} through {self.encoder.description}"

    @property
    def options(self) -> Json:
        return {"encoder": self.encoder_options, "size": self.size}

    def check(self, values: Column) -> list[str | None]:
        """Photos that cannot be read, boxes without area, or outside the photo."""
        sizes: dict[object, tuple[float, float] | str] = {}
        return [_problem(value, sizes) for value in values]

    def fit(self, values: Column) -> CropTower:
        """Mean and spread of the features of the training pairs."""
        self.scaler = Scaler.of(self.features(values))
        return self

    def features(self, values: Column) -> Float[ndarray, "n 2*width"]:
        """Features of the first and the second crop, not standardised.

        Raises:
            NearfarError: a photo that cannot be read.
        """
        pairs = [Crops.of(value) for value in values]
        boxes: dict[object, dict[Box, int]] = {}
        photos: dict[object, Photo] = {}
        for pair in pairs:
            photos[_same(pair.photo)] = pair.photo
            own = boxes.setdefault(_same(pair.photo), {})
            for box in pair.boxes:
                own.setdefault(box, len(own))
        features = {
            photo: self._of_picture(photos[photo], list(own), len(photos)) for photo, own in boxes.items()
        }
        rows = np.zeros((len(pairs), 2 * self.encoder.width), dtype=np.float32)
        for row, pair in zip(rows, pairs, strict=True):
            own = boxes[_same(pair.photo)]
            row[:] = features[_same(pair.photo)][[own[box] for box in pair.boxes]].reshape(-1)
        return rows

    def _of_picture(self, photo: Photo, boxes: list[Box], pictures: int) -> Float[ndarray, "boxes width"]:
        def compute() -> dict[str, np.ndarray]:
            if self.say is not None and pictures > _MANY:
                self.say(
                    f"features of the crops in {pictures} pictures: the first time this takes a while; they are kept"
                )
                self.say = None
            return {"features": self._encoded(photo, boxes)}

        key = [_VERSION, self.encoder.fingerprint(), self.size, photo.key(), np.array(boxes)]
        return cached_arrays("relation-features", key, compute)["features"]

    @torch.no_grad()
    def _encoded(self, photo: Photo, boxes: list[Box]) -> Float[ndarray, "boxes width"]:
        pixels = photo.read()
        crops = stack([crop(pixels, box, (self.size, self.size)) for box in boxes])
        parts = [
            self.encoder(torch.from_numpy(crops[at : at + _BATCH])) for at in range(0, len(crops), _BATCH)
        ]
        return torch.cat(parts).float().numpy()

    def read(self, values: Column) -> Rows:
        if self.scaler is None:
            raise NearfarError("a tower of crops was not fitted: call fit(training values) or load it.")
        return Rows(self.scaler(self.features(values)))

    def build(self) -> nn.Module:
        return PassThrough(2 * self.encoder.width)

    def save(self, folder: Path) -> None:
        more = {"fingerprint": self.encoder.fingerprint(), "about": self.encoder.description}
        write_tower_spec(folder, self, scaler=None if self.scaler is None else self.scaler.to_dict(), **more)

    def save_networks(self, folder: Path) -> None:
        """The frozen encoder with its weights."""
        save_image_encoder(self.encoder, folder / _NETWORK)

    @classmethod
    def load(cls, folder: Path) -> CropTower:
        spec = read_tower_spec(folder)
        tower = cls(**spec["options"])
        tower.scaler = None if spec.get("scaler") is None else Scaler.from_dict(spec["scaler"])
        if has_image_encoder(folder / _NETWORK):
            own = {name: value for name, value in tower.encoder_options.items() if name not in _NAMES}
            tower._encoder = load_image_encoder(folder / _NETWORK, **own)
        elif tower.encoder.fingerprint() != spec.get("fingerprint"):
            raise NearfarError(
                f"{folder}: {spec.get('about')} has other weights than those that this tower was saved with: install "
                "the version of then, or train anew."
            )
        return tower


class NamesTower(TextTower):
    """Two names by a frozen text encoder, their vectors side by side.

    A value is two texts. The encoder is fitted on the distinct names of the training pairs. Its options are those of
    `TextTower` with ``train`` "head" or "frozen".
    """

    kind = "names"

    def graph(self) -> TowerGraph:
        raise NearfarError(
            "two names are embedded apart and put side by side, which is not written as one graph"
        )

    def check(self, values: Column) -> list[str | None]:
        """Values that are no two texts, and empty names."""
        return [_names_problem(pair) for pair in values]

    def fit(self, values: Column) -> NamesTower:
        super().fit(_distinct(values))
        return self

    def read(self, values: Column) -> Rows:
        names = _distinct(values)
        place = {name: i for i, name in enumerate(names)}
        vectors = super().reference(names)
        assert vectors is not None
        at = np.array([[place[name] for name in pair] for pair in _pairs(values)], np.int64).reshape(-1, 2)
        return Rows(vectors[at].reshape(len(at), -1).astype(np.float32))

    def build(self) -> nn.Module:
        return PassThrough(2 * self._width())

    def reference(self, values: Column) -> Float[ndarray, "n d"]:
        return self.read(values).values.numpy()


def _same(photo: Photo) -> object:
    """What is equal where two photos are the same."""
    return photo.path if isinstance(photo, File) else id(photo)


def _names_problem(value: object) -> str | None:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        return "not two names"
    return None if all(str(name).strip() for name in value) else "empty name"


def _problem(value: object, sizes: dict[object, tuple[float, float] | str]) -> str | None:
    """Why a value is no photo with two boxes; each photo is decoded once."""
    try:
        crops = Crops.of(value)
    except NearfarError as error:
        return str(error)
    key = _same(crops.photo)
    if key not in sizes:
        try:
            height, width = crops.photo.read().shape[:2]
            sizes[key] = (float(width), float(height))
        except NearfarError as error:
            sizes[key] = str(error)
    size = sizes[key]
    if isinstance(size, str):
        return size
    for left, top, right, bottom in crops.boxes:
        if not np.isfinite([left, top, right, bottom]).all() or left >= right or top >= bottom:
            return "box without area"
        if right <= 0 or bottom <= 0 or left >= size[0] or top >= size[1]:
            return "box outside the photo"
    return None


def _distinct(values: Column) -> list[str]:
    return sorted({name for pair in _pairs(values) for name in pair})


def _pairs(values: Column) -> list[list[str]]:
    return [[str(name) for name in cast(Sequence[object], pair)] for pair in values]
