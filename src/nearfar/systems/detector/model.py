"""The detector that a configuration describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from nearfar.models.detection import SetLoss
from nearfar.models.detection.network import SmallDetector
from nearfar.models.image import ImageEncoder, build_image_encoder

__all__ = ["build_detector", "build_encoder", "encoder_options"]


def encoder_options(config: Any) -> dict[str, Any]:
    """The options of the image encoder, as ``build_image_encoder`` takes them."""
    found = OmegaConf.to_container(config.image_encoder, resolve=True)
    assert isinstance(found, dict)
    return {str(name): value for name, value in found.items()}


def build_encoder(config: Any, trained: bool | None = None) -> ImageEncoder:
    """The image encoder; ``trained=False`` leaves its weights random, for those of a run to be put in."""
    options = encoder_options(config)
    return build_image_encoder(**(options if trained is None else options | {"pretrained": trained}))


def build_detector(config: Any, classes: Sequence[str], trained: bool | None = None) -> SmallDetector:
    """The network with the options of ``config``, freshly initialised around the image encoder."""
    loss = SetLoss(
        class_cost=config.class_cost,
        class_weight=config.class_weight,
        l1_weight=config.l1_weight,
        giou_weight=config.giou_weight,
        quality=config.quality,
    )
    return SmallDetector(
        build_encoder(config, trained),
        classes,
        queries=config.queries,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        dropout=config.dropout,
        loss=loss,
    )
