"""The options of the molecule system and their ranges."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from nearfar.data.splits import Encoding
from nearfar.errors import NearfarError
from nearfar.models.text import build_text_encoder
from nearfar.schedules import Constant, Linear, Piecewise, Step, schedule
from nearfar.systems.molecules.dataset import MoleculeFeatures
from nearfar.systems.molecules.model import MOLECULE_ENCODERS, TEXT_HEADS
from nearfar.training.batches import SAMPLERS
from nearfar.training.options import (
    FILE,
    SHARE,
    Choice,
    Number,
    Rule,
    Switch,
    Text,
    check_learning_options,
    option,
)

__all__ = ["check_options"]


OPTIONS: dict[str, Rule] = {
    "temperature": Number(1e-4),
    "learn_temperature": Switch(),
    "molecule_encoder": Choice(MOLECULE_ENCODERS),
    "text_head": Choice(TEXT_HEADS),
    "layers": Number(1, whole=True),
    "heads": Number(1, whole=True),
    "hidden": Number(1, whole=True),
    "dropout": SHARE,
    "embedding_dim": Number(1, whole=True),
    "fingerprint_hidden": Number(1, whole=True),
    "fingerprint_dropout": SHARE,
    "input_dropout": SHARE,
    "fingerprint_bits": Number(8, 2**20, whole=True),
    "fingerprint_radius": Number(0, 100, whole=True),
    "fingerprint_chirality": Switch(),
    "curriculum_epoch": Number(0, whole=True),
    "group_size": Number(2, whole=True, optional=True),
    "false_negative_threshold": Number(optional=True),
    "mask_duplicates": Switch(),
    "memory": Number(0, whole=True),
    "augment_atoms": SHARE,
    "augment_bonds": SHARE,
    "sampler.name": Choice(SAMPLERS),
    "loss.name": Choice(("infonce",)),
    "loss.symmetric": Switch(),
    "data.train": FILE,
    "data.val": FILE,
    "data.test": FILE,
    "data.dir": FILE,
    "data.smiles_column": Text(optional=True, number=True),
    "data.text_column": Text(optional=True, number=True),
    "data.id_column": Text(optional=True, number=True),
    "data.encoding": Encoding(),
    "data.val_fraction": Number(0, 1, inside=True),
    "data.val_split": Choice(("scaffold", "random")),
    "data.embedded_size": Number(10, whole=True, optional=True),
    "data.split_seed": Number(0, 2**32 - 1, whole=True),
    "text_encoder.kind": Text(),
}


def check_options(config: Any) -> None:
    """Raise ``NearfarError`` for the first option that is of the wrong type, out of range, or without effect."""
    check_learning_options(config, OPTIONS)
    MoleculeFeatures.from_config(config)
    # No weights are read and nothing is fitted here: the encoder looks at its options alone.
    encoder = OmegaConf.to_container(config.text_encoder, resolve=True)
    assert isinstance(encoder, dict)
    build_text_encoder(**{str(key): value for key, value in encoder.items()})
    if config.molecule_encoder != "fingerprint" and config.hidden % config.heads:
        raise NearfarError(f"hidden={config.hidden} must be a multiple of heads={config.heads}.")
    if config.learn_temperature and config.temperature < 0.01:
        raise NearfarError(
            f"temperature={config.temperature}: a learned temperature is held at .01 or more; start there or higher."
        )
    _check_batches(config)
    threshold = config.false_negative_threshold
    if threshold is not None and not -1 < threshold <= 1:
        raise NearfarError(
            f"false_negative_threshold={threshold}: a cosine between -1 and 1 is needed (.95 is usual)."
        )
    if (config.augment_atoms or config.augment_bonds) and config.molecule_encoder == "fingerprint":
        raise NearfarError(
            "augment_atoms and augment_bonds act on graphs; molecule_encoder=fingerprint has none."
        )


def _check_batches(config: Any) -> None:
    """``hard_ratio``, ``hardness_k``, the curriculum and the order of hard batches."""
    for value in _values("hard_ratio", config):
        if not 0 <= value <= 1:
            raise NearfarError(
                f"hard_ratio={config.hard_ratio}: a share of the batch between 0 and 1 is needed."
            )
    for value in _values("hardness_k", config):
        if value < 1:
            raise NearfarError(f"hardness_k={config.hardness_k}: at least one neighbour is needed.")
    if any(value != int(value) for value in _named_values(schedule(config.hardness_k))):
        raise NearfarError(f"hardness_k={config.hardness_k}: a whole number of neighbours is needed.")
    if "order" in config.sampler:
        Choice(("level", "greedy")).check("sampler.order", config.sampler.order)
    if config.sampler.name in ("hard", "partition") and config.curriculum_epoch >= config.epochs:
        raise NearfarError(
            f"curriculum_epoch={config.curriculum_epoch} of epochs={config.epochs}: no batch would ever be hard. "
            "Lower curriculum_epoch, or take sampler=random."
        )


def _values(name: str, config: Any) -> list[float]:
    """A schedule's value in every epoch."""
    spec = option(config, name)
    try:
        rule = schedule(spec)
        return [float(rule(epoch, config.epochs)) for epoch in range(config.epochs)]
    except (TypeError, ValueError) as error:
        raise NearfarError(f"{name}={spec}: {error}") from None


def _named_values(rule: Any) -> tuple[float, ...]:
    """The values that a schedule was given, without those between them."""
    match rule:
        case Constant(value):
            return (value,)
        case Linear(start, end):
            return (start, end)
        case Step(values):
            return values
        case Piecewise(points):
            return tuple(value for _, value in points)
    return ()
