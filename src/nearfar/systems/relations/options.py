"""The options of the relation system: their ranges, and what would have no effect."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from nearfar.errors import NearfarError
from nearfar.models.image import check_image_encoder
from nearfar.models.text import build_text_encoder
from nearfar.systems.relations.dataset import SAMPLERS
from nearfar.systems.relations.features import SPATIAL
from nearfar.systems.relations.model import LOSSES
from nearfar.systems.relations.records import chosen_relations
from nearfar.training.options import FILE, SHARE, Choice, Number, Rule, Switch, Text, check_learning_options

__all__ = ["check_options"]

OPTIONS: dict[str, Rule] = {
    "temperature": Number(1e-3),
    "spatial": Choice(SPATIAL),
    "pixels": Switch(),
    "categories": Switch(),
    "keep_inputs": Switch(),
    "crop_size": Number(32, 1024, whole=True),
    "visual_hidden": Number(1, whole=True),
    "embedding_dim": Number(1, whole=True),
    "visual_dropout": SHARE,
    "spatial_dropout": SHARE,
    "box_jitter": Number(0.0, 0.45),
    "probe_rows": Number(10, whole=True),
    "monitor_rows": Number(10, whole=True),
    "sampler.name": Choice(SAMPLERS),
    "loss.name": Choice(LOSSES),
    "data.layout": Choice(("composed", "vrd", "scene_graph", "spatialsense", "coco")),
    "data.train": FILE,
    "data.val": FILE,
    "data.test": FILE,
    "data.dir": FILE,
    "data.images": FILE,
    "data.photos": Choice(("optional", "required", "none")),
    "data.synonyms": Switch(),
    "data.val_fraction": Number(0, 1, inside=True),
    "data.test_fraction": Number(0, 1),
    "data.split_seed": Number(0, 2**32 - 1, whole=True),
    "data.folds": Number(2, whole=True, optional=True),
    "data.fold": Number(0, whole=True),
    "data.size": Number(10, whole=True),
    "image_encoder.kind": Text(),
    "text_encoder.kind": Text(),
}


def check_options(config: Any) -> None:
    """Raise ``NearfarError`` for the first option that is of the wrong type, out of range, or without effect."""
    check_learning_options(config, OPTIONS)
    chosen_relations(config.relations)
    if "symmetric" in config.loss:
        Switch().check("loss.symmetric", config.loss.symmetric)
    if "sum" in config.loss:
        Choice(("outside", "inside")).check("loss.sum", config.loss.sum)
    check_image_encoder(**_group(config.image_encoder))
    # No weights are read and nothing is fitted here: the encoder looks at its options alone.
    build_text_encoder(**_group(config.text_encoder))
    data = config.data
    if data.val_fraction + data.test_fraction >= 1:
        raise NearfarError(
            f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction} leave nothing to "
            "train on."
        )
    if data.folds is not None and data.fold >= data.folds:
        raise NearfarError(f"data.fold={data.fold}: the folds are numbered 0 to {data.folds - 1}.")
    if data.folds is not None and data.layout == "composed":
        raise NearfarError("data.folds: scenes hold kinds of things out of training, which folds would undo.")
    if not config.pixels and data.photos == "required":
        raise NearfarError("data.photos=required, but pixels=false looks at none.")
    if (
        not config.pixels
        and not config.categories
        and not config.box_jitter
        and config.loss.name == "infonce"
    ):
        raise NearfarError(
            "pixels=false, categories=false and box_jitter=0 leave the boxes as the only view: there is nothing to "
            "contrast. Set box_jitter=0.05 or categories=true."
        )


def _group(options: Any) -> dict[str, Any]:
    found = OmegaConf.to_container(options, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}
