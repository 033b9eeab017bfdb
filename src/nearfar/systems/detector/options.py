"""The options of the detector system and their ranges."""

from __future__ import annotations

from typing import Any

from nearfar.errors import NearfarError
from nearfar.models.image import check_image_encoder
from nearfar.systems.detector.model import encoder_options
from nearfar.training.options import FILE, SHARE, Choice, Number, Rule, Switch, Text, check_learning_options

__all__ = ["DATA", "check_data", "check_options"]

DATA: dict[str, Rule] = {
    "data.kind": Choice(("coco", "scenes")),
    "data.category": Text(optional=True, number=True),
    "data.group_key": Text(optional=True),
    "data.image_size": Number(32, 4096, whole=True),
    "data.val_fraction": Number(0, 1, inside=True),
    "data.split_seed": Number(0, 2**32 - 1, whole=True),
}
OPTIONS: dict[str, Rule] = {
    "frozen_epochs": Number(0, whole=True),
    "views": Number(1, 1000, whole=True),
    "encoder_lr": Number(0.0),
    "queries": Number(1, whole=True),
    "width": Number(4, whole=True),
    "layers": Number(1, whole=True),
    "heads": Number(1, whole=True),
    "dropout": SHARE,
    "class_cost": Number(0.0),
    "class_weight": Number(0.0),
    "l1_weight": Number(0.0),
    "giou_weight": Number(0.0),
    "quality": Number(0.0, optional=True),
    "crop": Number(0.05, 1.0),
    "colours": Number(0.0, 0.9),
    "check_evaluator": Switch(),
    "sampler.name": Choice(("random", "balanced")),
    **DATA,
}


def check_options(config: Any) -> None:
    """Raise ``NearfarError`` for the first option that is of the wrong type, out of range, or without effect."""
    check_learning_options(config, OPTIONS)
    check_data(config.data)
    options = encoder_options(config)
    check_image_encoder(**options)
    if config.width % 4 or config.width % config.heads:
        raise NearfarError(f"width={config.width} must be a multiple of 4 and of heads={config.heads}.")
    if config.frozen_epochs:
        _check_frozen(config, options)
    if config.trainer.cached_chunk is not None:
        raise NearfarError(
            "trainer.cached_chunk: a detector's rows have losses of their own; set it to null."
        )


def _check_frozen(config: Any, options: dict[str, Any]) -> None:
    if config.frozen_epochs > config.epochs:
        raise NearfarError(
            f"frozen_epochs={config.frozen_epochs} of epochs={config.epochs}: there are not so many; lower it."
        )
    if options["kind"] == "small" or options.get("pretrained") is False:
        raise NearfarError(
            f"frozen_epochs={config.frozen_epochs}: the first half of an encoder with random weights must learn; set "
            "frozen_epochs=0."
        )
    if options["kind"] == "transformers":
        raise NearfarError(
            "frozen_epochs: image_encoder=transformers cannot be cut at stride 16; set frozen_epochs=0, or take "
            "image_encoder=efficientnet."
        )
    if config.init_from:
        raise NearfarError(
            "init_from brings an encoder of its own, and kept maps are those of the untrained one: set frozen_epochs=0."
        )


def check_data(data: Any) -> None:
    """The files, where they are named, and the names of the groups."""
    for name in ("dir", "train", "val", "test", "images") if data.kind == "coco" else ():
        FILE.check(f"data.{name}", data[name])
    groups = data.groups
    if groups is not None and (isinstance(groups, str) or len(set(groups)) != 2):
        raise NearfarError(f"data.groups={groups}: two names are needed, as in data.groups=[female,male].")
    if groups is not None and data.group_key is None:
        raise NearfarError("data.groups names values of an attribute: say which with data.group_key=NAME.")
