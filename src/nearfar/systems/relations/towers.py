"""The towers of a pair of objects beside that of its boxes: the pixels of both crops, and both names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import nn

from nearfar.data.batch import Rows
from nearfar.data.cache import cached_arrays
from nearfar.data.images import crop, stack
from nearfar.errors import NearfarError
from nearfar.models.image import ImageEncoder, build_image_encoder
from nearfar.models.text import embed_texts
from nearfar.models.views import PassThrough
from nearfar.systems.relations.records import Box, Photo
from nearfar.towers.base import Tower, read_tower_spec, write_tower_spec
from nearfar.towers.text import TextTower
from nearfar.towers.vector import Scaler

__all__ = ["CropTower", "Crops", "NamesTower"]

_VERSION = 1  # of how crops are cut; part of every cache key
_BATCH = 64
_MANY = 50  # pictures whose features take long enough to say so


@dataclass(frozen=True)
class Crops:
    """A value of the view of pixels: a photo, and the boxes of subject and object in it."""

    photo: Photo
    boxes: tuple[Box, Box]


class CropTower(Tower):
    """Features of both crops side by side by a frozen image encoder, standardised by the training rows.

    Args:
        encoder: options of the image encoder, as ``image_encoder`` has them.
        size: width and height of a crop in pixels.
        say: announces that features are computed, which takes a while.

    Features are computed once and kept by picture: the key is its content, its boxes, the encoder's weights and
    the size of the crops.
    """

    kind = "crops"
    models = ("name",)

    def __init__(self, encoder: dict[str, Any], size: int, say: Callable[[str], None] | None = None) -> None:
        self.encoder_options, self.size, self.say = dict(encoder), size, say
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
    def options(self) -> dict[str, Any]:
        return {"encoder": self.encoder_options, "size": self.size}

    def fit(self, values: Sequence[Crops] | np.ndarray) -> CropTower:
        """Mean and spread of the features of the training pairs."""
        self.scaler = Scaler.of(self.features(values))
        return self

    def features(self, values: Sequence[Crops] | np.ndarray) -> Float[ndarray, "n 2*width"]:
        """Features of subject and object, not standardised.

        Raises ``NearfarError`` for a photo that cannot be read; those of ``nearfar.systems.relations.data`` were
        decoded before.
        """
        boxes: dict[int, dict[Box, int]] = {}
        photos: dict[int, Photo] = {}
        for value in values:
            photos[id(value.photo)] = value.photo
            own = boxes.setdefault(id(value.photo), {})
            for box in value.boxes:
                own.setdefault(box, len(own))
        features = {
            photo: self._of_picture(photos[photo], list(own), len(photos)) for photo, own in boxes.items()
        }
        rows = np.zeros((len(values), 2 * self.encoder.width), dtype=np.float32)
        for row, value in zip(rows, values, strict=True):
            own = boxes[id(value.photo)]
            row[:] = features[id(value.photo)][[own[box] for box in value.boxes]].reshape(-1)
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

    def read(self, values: Sequence[Crops] | np.ndarray) -> Rows:
        if self.scaler is None:
            raise NearfarError("a tower of crops was not fitted: call fit(training values) or load it.")
        return Rows(self.scaler(self.features(values)))

    def build(self) -> nn.Module:
        return PassThrough(2 * self.encoder.width)

    def save(self, folder: Path) -> None:
        more = {"fingerprint": self.encoder.fingerprint(), "about": self.encoder.description}
        write_tower_spec(folder, self, scaler=None if self.scaler is None else self.scaler.to_dict(), **more)

    @classmethod
    def load(cls, folder: Path) -> CropTower:
        spec = read_tower_spec(folder)
        tower = cls(**spec["options"])
        tower.scaler = None if spec.get("scaler") is None else Scaler.from_dict(spec["scaler"])
        if tower.encoder.fingerprint() != spec.get("fingerprint"):
            raise NearfarError(
                f"{folder}: {spec.get('about')} has other weights than those that this tower was saved with: install "
                "the version of then, or train anew."
            )
        return tower


class NamesTower(TextTower):
    """The names of subject and object by a frozen text encoder, their vectors side by side.

    A value is two texts. The encoder is fitted on the distinct names of the training pairs.
    """

    kind = "names"

    def check(self, values: Sequence[Any] | np.ndarray) -> list[str | None]:
        """Empty names."""
        return [None if all(str(name).strip() for name in pair) else "empty name" for pair in values]

    def fit(self, values: Sequence[Any] | np.ndarray) -> NamesTower:
        super().fit(_distinct(values))
        return self

    def read(self, values: Sequence[Any] | np.ndarray) -> Rows:
        names = _distinct(values)
        place = {name: i for i, name in enumerate(names)}
        vectors = embed_texts(self.encoder, names)
        at = np.array([[place[str(name)] for name in pair] for pair in values], dtype=np.int64).reshape(-1, 2)
        return Rows(vectors[at].reshape(len(at), -1).astype(np.float32))

    def build(self) -> nn.Module:
        return PassThrough(2 * self._width())

    def reference(self, values: Sequence[Any] | np.ndarray) -> Float[ndarray, "n d"]:
        return self.read(values).values.numpy()


def _distinct(values: Sequence[Any] | np.ndarray) -> list[str]:
    return sorted({str(name) for pair in values for name in pair})
