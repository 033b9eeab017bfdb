"""The options of the tissue system: their ranges, and which of them go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from nearfar.errors import NearfarError
from nearfar.losses.spatial import check_spatial_options
from nearfar.models.image import check_image_encoder
from nearfar.models.text import build_text_encoder
from nearfar.systems.tissue.features import ImageFeatures
from nearfar.training.batches import SPATIAL_SAMPLERS
from nearfar.training.options import SHARE, Choice, Number, Rule, Switch, Text, check_learning_options, option

__all__ = ["check_options", "slide_names"]

OPTIONS: dict[str, Rule] = {
    "temperature": Number(1e-4),
    "learn_temperature": Switch(),
    "max_scale": Number(1e-3),
    "neighbors": Choice(("soft", "positive", "mask", "none")),
    "neighbor_alpha_scale": Number(0.0),
    "temp_reg_weight": Number(0.0),
    "local_loss": Switch(),
    "gather_with_grad": Switch(),
    "image_pixels": Number(32, whole=True, optional=True),
    "augment": Switch(),
    "gene_encoder": Choice(("mlp", "sentence")),
    "sentence_genes": Number(1, whole=True),
    "embedding_dim": Number(1, whole=True),
    "hidden": Number(1, whole=True),
    "dropout": SHARE,
    "retrieve": Number(1, whole=True),
    "variable_genes": Number(1, whole=True),
    "expressed_genes": Number(1, whole=True),
    "sampler.name": Choice(SPATIAL_SAMPLERS),
    "loss.name": Choice(("clip", "spatial")),
    "image_encoder.kind": Text(),
    "text_encoder.kind": Text(),
    "data.dir": Text(optional=True, number=True),
    "data.genes": Number(1, whole=True),
    "data.neighbors": Number(1, whole=True),
    "data.patch": Number(8, whole=True),
    "data.slides": Number(3, whole=True),
    "data.side": Number(4, whole=True),
    "data.signal": Number(0.0, 1.0),
    "data.noise": Number(0.0),
    "data.generated_genes": Number(6, whole=True),
    "data.generated_seed": Number(0, 2**32 - 1, whole=True),
}


def check_options(config: Any) -> None:
    """Raise ``NearfarError`` for the first option that is of the wrong type, out of range, or without effect."""
    check_learning_options(config, OPTIONS)
    check_spatial_options(config.neighbor_alpha_scale, config.temp_reg_weight, config.neighbors)
    if config.temperature * config.max_scale < 1:
        raise NearfarError(
            f"temperature={config.temperature} means a scale of {1 / config.temperature:.4g}, beyond "
            f"max_scale={config.max_scale}: start warmer, or raise max_scale."
        )
    _check_encoders(config)
    if config.sampler.name == "spatial":
        tile = config.sampler.get("tile_size")
        Number(1, whole=True, optional=True).check("sampler.tile_size", tile)
        if tile is not None and tile > config.batch_size:
            raise NearfarError(f"sampler.tile_size={tile} is larger than batch_size={config.batch_size}.")
    for name in ("data.hold_out", "data.val"):
        slide_names(option(config, name), name)


def _check_encoders(config: Any) -> None:
    """No weights are read and nothing is fitted here: encoders look at their options alone."""
    if config.image_frozen is not None:
        Switch().check("image_frozen", config.image_frozen)
    features = ImageFeatures.from_config(config)
    if features.kind == "colors":
        if config.image_frozen is False or config.image_pixels is not None:
            raise NearfarError(
                "image_encoder=colors has no network: leave image_frozen and image_pixels null."
            )
    else:
        check_image_encoder(features.kind, **features.options)
    encoder = OmegaConf.to_container(config.text_encoder, resolve=True)
    assert isinstance(encoder, dict)
    build_text_encoder(**{str(key): value for key, value in encoder.items()})


def slide_names(value: Any, name: str) -> tuple[str, ...]:
    """Names of slides, given as one or as a list; none for null.

    >>> slide_names("B4", "data.hold_out"), slide_names(None, "data.val"), slide_names(["C2", 3], "data.val")
    (('B4',), (), ('C2', '3'))
    """
    if value is None:
        return ()
    given = [value] if isinstance(value, (str, int)) or not isinstance(value, Sequence) else list(value)
    for each in given:
        Text(number=True).check(name, each)
    names = tuple(str(each) for each in given)
    if len(set(names)) != len(names):
        raise NearfarError(f"{name}={list(names)}: a slide is named twice.")
    return names
