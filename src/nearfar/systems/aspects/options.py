"""The options of the aspect system and their ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nearfar.data.splits import Encoding
from nearfar.errors import NearfarError
from nearfar.systems.aspects.labels import code_words
from nearfar.systems.aspects.objective import ALPHAS, CONTRASTS
from nearfar.systems.aspects.scores import KINDS
from nearfar.training.options import FILE, SHARE, Choice, Number, Rule, Text, check_learning_options, option

__all__ = ["check_options", "encoder_options"]


OPTIONS: dict[str, Rule] = {
    "gamma": Number(0.0),
    "alpha": Choice(ALPHAS),
    "reduction": Choice(("weighted_mean", "mean")),
    "contrastive": Choice(CONTRASTS),
    "temperature": Number(1e-4),
    "projection_dim": Number(1, whole=True),
    "head_dropout": SHARE,
    "balance": Choice(("none", "oversample")),
    "oversample_frequency": Number(0, 1, inside=True),
    "oversample_most": Number(1, whole=True),
    "thresholds": Choice(KINDS),
    "logit_adjustment": Number(0.0, 2.0),
    "sampler.name": Choice(("random",)),
    "data.train": FILE,
    "data.val": FILE,
    "data.test": FILE,
    "data.dir": FILE,
    "data.text_column": Text(optional=True, number=True),
    "data.label_column": Text(optional=True, number=True),
    "data.id_column": Text(optional=True, number=True),
    "data.aspect_column": Text(optional=True, number=True),
    "data.polarity_column": Text(optional=True, number=True),
    "data.encoding": Encoding(),
    "data.min_mentions": Number(1, whole=True),
    "data.val_fraction": Number(0, 1, inside=True),
    "data.tune_fraction": Number(0, 0.9),
    "data.split_seed": Number(0, 2**32 - 1, whole=True),
    "data.embedded_size": Number(50, whole=True, optional=True),
    "text_encoder.kind": Text(),
}


def check_options(config: Any) -> None:
    """Raise ``NearfarError`` for the first option that is of the wrong type, out of range, or without effect."""
    check_learning_options(config, OPTIONS)
    for name in ("focal_weight", "contrastive_weight"):
        _check_weight(name, option(config, name))
    aspects = config.data.aspects
    if aspects is not None and (isinstance(aspects, str) or not isinstance(aspects, Sequence) or not aspects):
        raise NearfarError(f"data.aspects={aspects}: a list of names is needed, such as [Battery,Camera].")
    if aspects is not None and len({str(a).casefold() for a in aspects}) < len(aspects):
        raise NearfarError(f"data.aspects={list(aspects)}: an aspect is named twice.")
    _check_polarities(config.data.polarities)
    from nearfar.systems.aspects.model import build_encoder

    build_encoder(**encoder_options(config))


def _check_polarities(given: Any) -> None:
    if given is None:
        return
    if not isinstance(given, Mapping | DictConfig):
        raise NearfarError(
            f"data.polarities={given}: what words or numbers mean is needed, such as "
            "'data.polarities={1: positive, 2: negative, 3: neutral, 0: none}'."
        )
    code_words(dict(given.items()))


def encoder_options(config: Any) -> dict[str, Any]:
    """The group ``text_encoder`` as keyword arguments."""
    found = OmegaConf.to_container(config.text_encoder, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _check_weight(name: str, value: Any) -> None:
    from nearfar.losses import Objective

    try:
        weights = Objective({name: value}).weights(position=0.0, total=1.0)
    except NearfarError as error:
        raise NearfarError(f"{name}={value}: {error}") from None
    if weights[name] < 0:
        raise NearfarError(f"{name}={value}: a weight of at least 0 is needed.")
