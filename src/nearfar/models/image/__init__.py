"""Image encoders: ``mobilenet`` and ``efficientnet`` (weights in packages), ``transformers``, ``small``."""

from __future__ import annotations

from nearfar.models.image.build import (
    IMAGE_ENCODERS,
    TransformersImageEncoder,
    build_image_encoder,
    check_image_encoder,
)
from nearfar.models.image.encoder import ImageEncoder
from nearfar.models.image.networks import EfficientNetImageEncoder, MobileNetImageEncoder, SmallImageEncoder

__all__ = [
    "IMAGE_ENCODERS",
    "EfficientNetImageEncoder",
    "ImageEncoder",
    "MobileNetImageEncoder",
    "SmallImageEncoder",
    "TransformersImageEncoder",
    "build_image_encoder",
    "check_image_encoder",
]
