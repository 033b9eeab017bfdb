"""Pictures: networks with packaged weights, any vision model of transformers, a small network, colour statistics."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.data.batch import Inputs, Pixels, Rows
from nearfar.data.cache import cached_array, caching
from nearfar.data.files import Json, read_text
from nearfar.data.items import Column
from nearfar.data.mapped import mapped_arrays
from nearfar.data.picture_arrays import PictureArrays, check_picture_values, decode_pictures
from nearfar.errors import NearfarError, nearest_name
from nearfar.models.image import IMAGE_ENCODERS, ImageEncoder, build_image_encoder
from nearfar.models.image.build import (
    has_image_encoder,
    load_image_encoder,
    save_architecture,
    save_image_encoder,
)
from nearfar.models.image.colors import NAMES, color_statistics
from nearfar.models.views import PassThrough, Standardize
from nearfar.towers.base import (
    BATCH,
    AsItIs,
    Backbone,
    GraphInput,
    Tower,
    TowerGraph,
    read_tower_spec,
    write_tower_spec,
)

__all__ = ["IMAGE_TOWERS", "ImageTower"]

IMAGE_TOWERS = (*IMAGE_ENCODERS, "colors")
_NETWORKS = {"efficientnet": "EfficientNet-lite0", "mobilenet": "MobileNetV2", "small": "six convolutions"}
#: of pretrained weights, where no learning rate is given
_RATES = {"efficientnet": 1e-4, "mobilenet": 1e-4, "transformers": 2e-5, "lora": 2e-4}
_SIZE = 96  # pixels, unless stated
_LEAST = 32  # pixels, below which the networks have nothing left at their last layer
_KIND = "image-features"  # the folder of the cache
_VERSION = 1  # of how features are computed; part of the cache key
_CHUNK = 64  # pictures at a time through a frozen network
_NETWORK = "network"  # the folder of a copy of the frozen network
_MOMENTS_CHUNK = 4096  # rows of features whose mean and spread are summed at a time

Moments = tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]


class ImageTower(Tower):
    """Pictures to vectors.

    Values are paths of picture files, or an array of uint8, (n, h, w) or (n, h, w, 3), which may be mapped from disk.

    Args:
        encoder: "efficientnet" (EfficientNet-lite0, ImageNet weights in a package), "mobilenet" (MobileNetV2,
            likewise), "transformers" (any vision model, a hub name or folder as ``model``), "small" (six convolutions,
            trained here from nothing), "colors" (42 statistics of colours, no network).
        model: of transformers; None takes microsoft/resnet-18.
        pretrained: trained weights, or an error that says where to get them; None means trained ones where there are
            any. False takes random ones.
        train: "frozen": features as they are, and no head above them; "head": the same with a trained head; "full":
            all weights; "lora": adapters of rank ``lora_rank`` in the linear layers of a transformers model. None:
            "head" for trained weights and colours, "full" for random ones.
        size: pixels of each side that whole pictures are brought to (bilinear; sides are not kept in proportion), at
            least 32. None: 96, except that "small" and "colors" read arrays at their own size. "own": every array at
            its own size; networks bring smaller ones to 32.
        standardize: features that are not trained have mean 0 and variance 1 over the training rows.
        lr: learning rate of the network; None: 1e-4 for trained weights of convolutions, 2e-5 for those of
            transformers, 2e-4 for adapters, else that of the run.
        lora_rank: rank of the adapters.
        gradient_checkpointing: keep fewer activations and compute them again (slower, less memory); transformers.
        seed: of random weights that are not trained.
        device: where features that are not trained are computed.
        options: those of the encoder: ``features`` of "small", ``revision`` of "transformers".

    Features of a network that is not trained are computed once and kept, by the content of pictures and weights; so
    are the pixels of files. Both are mapped from disk: memory does not grow with the number of pictures. Features are
    kept in parts as well (`PictureArrays.parts`): a set that shares pictures with an earlier one, as the folds of a
    cross-validation do, computes only what is new.

    >>> tower = ImageTower("colors").fit(np.arange(4 * 32 * 32, dtype=np.uint8).reshape(4, 32, 32))
    >>> tower.build().width, tower.description
    (42, '42 statistics of colours, no network; pictures at 32 × 32 pixels; frozen, standardised by the training rows')
    >>> ImageTower("small", train="lora")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: train=lora: encoder=small is trained by train=full or train=head or train=frozen.
    """

    kind = "image"
    models = ("model",)

    def __init__(
        self,
        encoder: str = "efficientnet",
        model: str | None = None,
        pretrained: bool | None = None,
        train: Backbone | None = None,
        size: int | Literal["own"] | None = None,
        standardize: bool = True,
        lr: float | None = None,
        lora_rank: int = 8,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        if encoder not in IMAGE_TOWERS:
            raise NearfarError(f"encoder={encoder!r} is unknown; {nearest_name(str(encoder), IMAGE_TOWERS)}")
        self.encoder_kind, self.model, self.encoder_options = encoder, model, options
        self.pretrained = self._weights(pretrained)
        self.train = self._trained(train)
        self._check_options(size, lr, lora_rank, seed, device)
        for name, value in (
            ("standardize", standardize),
            ("gradient_checkpointing", gradient_checkpointing),
        ):
            if not isinstance(value, bool):
                raise NearfarError(f"{name}={value}: true or false is needed.")
        if gradient_checkpointing and (encoder != "transformers" or self.frozen):
            raise NearfarError(
                "gradient_checkpointing=true is for a trained encoder=transformers (train=full or train=lora)."
            )
        self.given = {"pretrained": pretrained, "lr": lr}
        self.lr = lr
        if lr is None and self.pretrained and not self.frozen:
            self.lr = _RATES["lora" if self.train == "lora" else encoder]
        self.size, self.standardize, self.seed, self.device = size, standardize, seed, device
        self.lora_rank, self.gradient_checkpointing = lora_rank, gradient_checkpointing
        self._network: ImageEncoder | None = None
        self._about = ""  # the network as it describes itself, once it was read
        self._moments: Moments | None = None
        self._decoded: dict[str, np.ndarray] = {}
        self._fitted: tuple[Column, np.ndarray] | None = (
            None  # training values and features, not to be hashed again
        )
        self._width = 0
        self._pixels: tuple[int, int] | None = None
        self._saved: Path | None = None
        self._expected: str | None = None  # fingerprint of the frozen network that a run was trained on
        self._copy: Path | None = (
            None  # of the frozen network, which is read instead of that of package or hub
        )

    # -- options -------------------------------------------------------------------------------------------------
    def _weights(self, pretrained: bool | None) -> bool:
        """Whether trained weights are meant."""
        encoder = self.encoder_kind
        if pretrained is not None and not isinstance(pretrained, bool):
            raise NearfarError(f"pretrained={pretrained}: true, false or null is needed.")
        if encoder == "colors" and (pretrained or self.encoder_options):
            what = "pretrained" if pretrained else next(iter(self.encoder_options))
            raise NearfarError(f"encoder=colors is no network and has no {what}: leave it out.")
        if encoder == "small" and pretrained:
            raise NearfarError(
                "encoder=small has no trained weights: leave pretrained out, or take encoder=efficientnet, mobilenet "
                "or transformers."
            )
        if self.model is not None and (encoder != "transformers" or not isinstance(self.model, str)):
            raise NearfarError(
                f"model={self.model}: the name of a transformers model or a folder; it needs encoder=transformers."
            )
        if encoder != "colors":
            own = inspect.signature(IMAGE_ENCODERS[encoder]).parameters
            known = [name for name in own if name not in ("name", "pretrained", "frozen")]
            for option in self.encoder_options:
                if option not in known:
                    names = [*inspect.signature(type(self)).parameters, *known]
                    raise NearfarError(
                        f"encoder={encoder} has no option {option!r}; {nearest_name(option, names)}"
                    )
        return encoder not in ("small", "colors") if pretrained is None else pretrained

    def _trained(self, train: Backbone | None) -> Backbone:
        if train is None:
            return "head" if self.pretrained or self.encoder_kind == "colors" else "full"
        if train not in get_args(Backbone):
            raise NearfarError(f"train={train!r} is unknown; {nearest_name(str(train), get_args(Backbone))}")
        able = {"colors": ("head", "frozen"), "transformers": ("full", "head", "frozen", "lora")}
        ways = able.get(self.encoder_kind, ("full", "head", "frozen"))
        if train not in ways:
            listed = " or ".join(f"train={each}" for each in ways)
            raise NearfarError(f"train={train}: encoder={self.encoder_kind} is trained by {listed}.")
        return train

    @staticmethod
    def _check_options(size: object, lr: object, lora_rank: object, seed: object, device: str) -> None:
        whole = isinstance(size, int) and not isinstance(size, bool) and size >= _LEAST
        if not (size is None or size == "own" or whole):
            raise NearfarError(
                f"size={size}: at least {_LEAST} pixels, 'own' for arrays at their size, or null for the usual one."
            )
        if lr is not None and (isinstance(lr, bool) or not isinstance(lr, int | float) or not lr > 0):
            raise NearfarError(f"lr={lr}: a learning rate above 0, or null for the usual one.")
        for name, value, least in (("lora_rank", lora_rank, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise NearfarError(f"{name}={value}: a whole number from {least} on is needed.")
        try:
            torch.device(device)
        except (RuntimeError, TypeError):
            raise NearfarError(f"device={device}: no such device; cpu or cuda is usual.") from None

    @property
    def frozen(self) -> bool:
        """Whether the encoder's features are computed once and kept."""
        return self.train in ("frozen", "head")

    @property
    def description(self) -> str:
        rate = "" if self.lr is None else f" at a learning rate of {self.lr:g}"
        how = {
            "frozen": "frozen",
            "head": "frozen",
            "full": f"all weights trained{rate}",
            "lora": f"adapters of rank {self.lora_rank} trained{rate}",
        }[self.train]
        if self.frozen and self.standardize:
            how += ", standardised by the training rows"
        if self.gradient_checkpointing:
            how += ", gradient checkpointing"
        pixels = "" if self._pixels is None else f"; pictures at {self._pixels[0]} × {self._pixels[1]} pixels"
        return f"{self._about or self._name()}{pixels}; {how}"

    def _name(self) -> str:
        """The network before its weights were read."""
        if self.encoder_kind == "colors":
            return f"{len(NAMES)} statistics of colours, no network"
        name = _NETWORKS.get(self.encoder_kind) or self.model or "microsoft/resnet-18"
        weights = "trained weights" if self.pretrained else "random weights, never trained on any picture"
        return f"{name} ({weights})"

    @property
    def options(self) -> Json:
        return {
            "encoder": self.encoder_kind,
            "model": self.model,
            "train": self.train,
            "size": self.size,
            "standardize": self.standardize,
            "lora_rank": self.lora_rank,
            "gradient_checkpointing": self.gradient_checkpointing,
            "seed": self.seed,
            "device": self.device,
            **self.given,
            **self.encoder_options,
        }

    # -- reading -------------------------------------------------------------------------------------------------
    def check(self, values: Column) -> list[str | None]:
        """Files that are not there, damaged or no pictures; each is decoded in full, once for its content."""
        if caching():
            return check_picture_values(values)
        # Values that are seen once are decoded once: `read`, which follows, takes what is kept here.
        reasons, self._decoded = decode_pictures(values, self._size_of(values))
        return reasons

    def fit(self, values: Column) -> ImageTower:
        """The size of the training pictures, which later ones are brought to; of features that are not trained, mean
        and spread."""
        self._pixels = None
        self._pixels = self._size_of(values)
        if self.frozen:
            features = self._features(values)
            self._fitted = (values, features)
            self._width = int(features.shape[1])
            self._moments = _moments(features)
        return self

    def read(self, values: Column) -> Inputs:
        """Features of an encoder that is not trained, else pixels."""
        if self.frozen:
            known, features = self._fitted or (None, None)
            return Rows(features if features is not None and values is known else self._features(values))
        return Pixels(
            PictureArrays(values, self._size_of(values), None if caching() else self._decoded).whole()
        )

    def _size_of(self, values: Column) -> tuple[int, int]:
        if self._pixels is not None:
            return self._pixels
        if isinstance(self.size, int):
            return self.size, self.size
        array = isinstance(values, np.ndarray) and values.ndim > 2
        if self.size == "own" and not array:
            raise NearfarError(
                "size=own is for one array of pictures; files differ in size: state it, as size=96."
            )
        if array and (self.size == "own" or self.encoder_kind in ("small", "colors")):
            assert isinstance(values, np.ndarray)
            height, width = values.shape[1:3]
            least = 1 if self.encoder_kind == "colors" else _LEAST
            return max(least, height), max(least, width)
        return _SIZE, _SIZE

    def _features(self, values: Column) -> Float[np.ndarray, "n d"]:
        """Features of pictures by the encoder before any training, mapped from the cache."""
        pictures = PictureArrays(values, self._size_of(values), None if caching() else self._decoded)
        network = None if self.encoder_kind == "colors" else self._frozen_network()
        width = len(NAMES) if network is None else network.width
        if not len(pictures):
            return np.zeros((0, width), np.float32)
        what = "colors" if network is None else network.fingerprint()

        def of_part(start: int, stop: int) -> np.ndarray:
            chunks = [pictures.part(at, min(at + _CHUNK, stop)) for at in range(start, stop, _CHUNK)]
            rows = [
                color_statistics(each) if network is None else _embedded(network, each, self.device)
                for each in chunks
            ]
            features = np.concatenate(rows)
            if not np.isfinite(features).all():
                raise NearfarError(f"{self._name()} gave features that are not finite.")
            return features

        if not caching():  # a hash of every picture would cost more than it saves
            return of_part(0, len(pictures))

        def fill(arrays: dict[str, np.ndarray]) -> None:
            for start, stop, key in pictures.parts():
                part = [_VERSION, what, key]
                arrays["features"][start:stop] = cached_array(_KIND, part, partial(of_part, start, stop))

        layout = {"features": ((len(pictures), width), np.float32)}
        return mapped_arrays(_KIND, [_VERSION, what, pictures.key], layout, fill)["features"]

    def _frozen_network(self) -> ImageEncoder:
        if self._network is None:
            if self._copy is not None:
                network = load_image_encoder(self._copy, **self.encoder_options)
            else:
                network = self._build(frozen=True, seed=self.seed, pretrained=self.pretrained)
            if self._expected is not None and network.fingerprint() != self._expected:
                raise NearfarError(
                    f"{self._about} has other weights than those that this tower was saved with: install the version "
                    "of then, or train anew."
                )
            self._network = network
        return self._network

    def _build(self, frozen: bool, seed: int | None, pretrained: bool) -> ImageEncoder:
        model = self.model
        if self._saved is not None and not frozen and self.encoder_kind == "transformers":
            model, options = str(self._saved), {}
        else:
            options = self.encoder_options
        try:
            network = build_image_encoder(
                self.encoder_kind, model, pretrained, seed=seed, frozen=frozen, **options
            )
        except NearfarError as error:
            raise NearfarError(_plain(error)) from None
        if self._saved is None:
            self._about = network.description.replace("; frozen)", ")").replace("; trainable)", ")")
        return network

    # -- training ------------------------------------------------------------------------------------------------
    def build(self) -> nn.Module:
        """The network that is trained; for one that is not what standardises its features, or passes them on."""
        if not self.frozen:
            return self._trainable()
        if not self._width:
            raise NearfarError("an image tower was not fitted: call fit(training values) or load it.")
        if not self.standardize:
            return PassThrough(self._width)
        if self._moments is None:  # loaded: the run's checkpoint has them
            return Standardize(torch.zeros(1, self._width))
        mean, spread = (torch.from_numpy(part) for part in self._moments)
        return Standardize(torch.stack([mean - spread, mean + spread]))  # two rows of this mean and spread

    def _trainable(self) -> ImageEncoder:
        network = self._build(False, None, self.pretrained and self._saved is None)
        inner: Any = getattr(network, "network", network)
        if self.gradient_checkpointing:
            if not getattr(inner, "supports_gradient_checkpointing", False):
                raise NearfarError(
                    f"gradient_checkpointing=true: {self._name()} does not support it; leave it out."
                )
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.train == "lora":
            from nearfar.models.hub import add_adapters

            network.network = add_adapters(inner, self.lora_rank, self._name())
        return network

    def reference(self, values: Column) -> Float[np.ndarray, "n d"] | None:
        """Standardised features before any training; None for a network that starts from random weights."""
        if not self.pretrained and self.encoder_kind != "colors":
            return None
        features = self._features(values)
        mean, spread = self._moments if self._moments is not None else _moments(features)
        spread = np.where(spread <= 1e-6 * np.maximum(1.0, np.abs(mean)), 1.0, spread)
        scaled: Float[np.ndarray, "n d"] = (features - mean.astype(np.float32)) / spread.astype(np.float32)
        return scaled

    # -- on disk -------------------------------------------------------------------------------------------------
    def save(self, folder: Path) -> None:
        more: Json = {"width": self._width, "pixels": self._pixels, "about": self._about}
        if self.frozen and self.encoder_kind != "colors":
            more["fingerprint"] = self._frozen_network().fingerprint()
        if not self.frozen and self.encoder_kind == "transformers":
            self._save_architecture(folder / "model")
        write_tower_spec(folder, self, **more)

    def _save_architecture(self, folder: Path) -> None:
        """Configuration and colours of a transformers model, from which its network is built without the hub."""
        save_architecture(self._architecture(), folder)

    def save_networks(self, folder: Path) -> None:
        """The frozen network with its weights."""
        if self.frozen and self.encoder_kind != "colors":
            save_image_encoder(self._frozen_network(), folder / _NETWORK)

    def graph(self) -> TowerGraph:
        """Pixels as uint8, red first, through the network, or as they are where the network is the trained module."""
        if self.encoder_kind == "colors":
            raise NearfarError(
                "statistics of colours are computed by NumPy and are no graph of tensors; train with "
                "image_encoder=efficientnet or a different network"
            )
        if self._pixels is None:
            raise NearfarError("an image tower was not fitted: call fit(training values) or load it.")
        height, width = self._pixels
        network = self._frozen_network() if self.frozen else self._architecture()

        def tensors(values: Column) -> dict[str, np.ndarray]:
            pictures = PictureArrays(values, (height, width)).whole()
            return {"pixels": np.ascontiguousarray(np.asarray(pictures).transpose(0, 3, 1, 2))}

        return TowerGraph(
            [GraphInput("pixels", "uint8", (BATCH, 3, height, width), "pictures in RGB, 0 to 255")],
            copy.deepcopy(network).cpu() if self.frozen else AsItIs(),
            tensors,
            {
                "kind": self.kind,
                "height": height,
                "width": width,
                "colours": "RGB",
                "mean": network.mean.flatten().tolist(),
                "std": network.std.flatten().tolist(),
                "steps": [
                    "decode the picture, turn it upright (EXIF), to RGB; transparent pixels on white",
                    f"resize it to {height} × {width} (height, width) by Pillow's BILINEAR, sides not kept in "
                    "proportion, unless it has that size",
                    "axes in the order colour, row, column; uint8",
                    "nothing more: the graph divides by 255, subtracts the mean and divides by the std",
                ],
            },
        )

    def _architecture(self) -> ImageEncoder:
        """A network of this kind, for its colours."""
        with torch.random.fork_rng(devices=[]):
            return self._build(False, None, self.pretrained and self._saved is None)

    @classmethod
    def load(cls, folder: Path) -> ImageTower:
        spec = read_tower_spec(folder)
        tower = cls(**spec["options"])
        tower._width = int(spec.get("width", 0))
        tower._about = str(spec.get("about", ""))
        if spec.get("pixels") is not None:
            tower._pixels = (int(spec["pixels"][0]), int(spec["pixels"][1]))
        if tower.frozen:
            if has_image_encoder(folder / _NETWORK):
                tower._copy = folder / _NETWORK  # whose hash the exported folder has
            else:
                tower._expected = spec.get("fingerprint")
        else:
            tower._saved = folder / "model"
            if tower.encoder_kind == "transformers":
                read_text(
                    tower._saved / "config.json"
                )  # an error that names the file, before any model is read
        return tower


@torch.no_grad()
def _embedded(network: ImageEncoder, pictures: np.ndarray, device: str) -> Float[np.ndarray, "k d"]:
    # Colours stay last in memory, where convolutions on a CPU take two thirds of the time.
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    rows: Tensor = network.to(device, memory_format=torch.channels_last)(pixels.to(device))  # type: ignore[call-overload]
    return rows.float().cpu().numpy()


def _moments(rows: Float[np.ndarray, "n d"]) -> Moments:
    """Mean and standard deviation of each column in double precision, some rows at a time."""
    parts = [rows[start : start + _MOMENTS_CHUNK] for start in range(0, len(rows), _MOMENTS_CHUNK)]
    mean = sum(part.sum(0, dtype=np.float64) for part in parts) / max(1, len(rows))
    squares = sum((np.square(part - mean)).sum(0) for part in parts) / max(1, len(rows))
    return np.asarray(mean), np.sqrt(squares)


def _plain(error: NearfarError) -> str:
    """The message with the names that options have here."""
    text = str(error).replace("image_encoder.name=", "model=").replace("image_encoder.", "")
    return text.replace("image_encoder=", "encoder=")
