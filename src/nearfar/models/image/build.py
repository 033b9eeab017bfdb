"""Choosing an image encoder by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from nearfar.errors import NearfarError, nearest_name
from nearfar.models.image.encoder import ImageEncoder
from nearfar.models.image.hub import TransformersImageEncoder
from nearfar.models.image.networks import EfficientNetImageEncoder, MobileNetImageEncoder, SmallImageEncoder

__all__ = ["IMAGE_ENCODERS", "build_image_encoder", "check_image_encoder"]

IMAGE_ENCODERS: dict[str, Callable[..., ImageEncoder]] = {
    "mobilenet": MobileNetImageEncoder,
    "efficientnet": EfficientNetImageEncoder,
    "transformers": TransformersImageEncoder,
    "small": SmallImageEncoder,
}


def check_image_encoder(kind: str, **options: object) -> None:
    """Raise ``NearfarError`` for an unknown kind or option; reads no weights."""
    if kind not in IMAGE_ENCODERS:
        raise NearfarError(f"image_encoder={kind!r} is unknown; {nearest_name(str(kind), IMAGE_ENCODERS)}")
    known = [*inspect.signature(IMAGE_ENCODERS[kind]).parameters, "name", "seed"]
    for option, value in options.items():
        if option not in known:
            raise NearfarError(
                f"image_encoder={kind} has no option {option!r}; {nearest_name(option, known)}"
            )
        if option in ("pretrained", "frozen") and not isinstance(value, bool):
            raise NearfarError(f"image_encoder.{option}={value}: true or false is needed.")
    if kind != "transformers" and options.get("name") is not None:
        raise NearfarError(
            f"image_encoder={kind} is one network: image_encoder.name is for transformers models."
        )


def build_image_encoder(
    kind: str = "efficientnet",
    name: str | None = None,
    pretrained: bool | None = None,
    *,
    seed: int | None = None,
    **options: object,
) -> ImageEncoder:
    """The image encoder called ``kind`` with its options.

    Args:
        kind: "mobilenet" or "efficientnet" (weights from registry packages), "transformers" (a hub name or a
            folder), "small" (trained from scratch).
        name: of a transformers model; null takes microsoft/resnet-18.
        pretrained: trained weights, or an error that says where to get them; None means trained ones, except for
            "small", which has none. Nothing is ever taken instead without being asked for.
        seed: of random weights; None draws them from PyTorch's generator.
        options: ``frozen`` (False), and what the class of that kind takes.

    >>> build_image_encoder("small", seed=0).description
    'six convolutions (random weights, never trained on any picture; trainable), 256 features'
    >>> build_image_encoder("mobilnet")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: image_encoder='mobilnet' is unknown; did you mean 'mobilenet'?
    """
    if pretrained is None:
        pretrained = kind != "small"
    check_image_encoder(kind, name=name, pretrained=pretrained, **options)
    if name is not None:
        options["name"] = name
    if seed is None or pretrained:
        encoder: ImageEncoder = IMAGE_ENCODERS[kind](pretrained=pretrained, **options)
        return encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = IMAGE_ENCODERS[kind](pretrained=False, **options)
    return encoder
