"""The detector that a configuration describes, and a frozen detector by name: a run, a transformers folder or a hub
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import cast

import torch

from nearfar.config.compose import read_config
from nearfar.config.options import read_options, to_dict
from nearfar.data.files import read_arrays, read_json, write_arrays, write_json
from nearfar.errors import NearfarError
from nearfar.models.detection import Detector, SetLoss
from nearfar.models.detection.network import SmallDetector
from nearfar.models.image import ImageEncoder, build_image_encoder
from nearfar.systems.detector.options import DetectorOptions, DetectorRecipe
from nearfar.training.checkpoint import Checkpoint, find_checkpoint
from nearfar.training.run_folder import RunFolder

__all__ = [
    "build_detector",
    "build_encoder",
    "detector_of_run",
    "load_detector",
    "load_frozen",
    "save_frozen",
]


def build_encoder(config: DetectorRecipe, trained: bool | None = None) -> ImageEncoder:
    """The image encoder; ``trained=False`` leaves its weights random, for those of a run to be put in."""
    options = config.image_encoder
    return build_image_encoder(**(options if trained is None else options | {"pretrained": trained}))


def build_detector(
    config: DetectorRecipe, classes: Sequence[str], trained: bool | None = None
) -> SmallDetector:
    """The network with the options of ``config``, freshly initialised around the image encoder."""
    loss = SetLoss(
        class_cost=config.class_cost,
        class_weight=config.class_weight,
        l1_weight=config.l1_weight,
        giou_weight=config.giou_weight,
        quality=config.quality,
    )
    detector = SmallDetector(
        build_encoder(config, trained),
        classes,
        queries=config.queries,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        dropout=config.dropout,
        loss=loss,
    )
    recipe = to_dict(config)
    detector.recipe = {each.name: recipe[each.name] for each in fields(DetectorRecipe)}
    return detector


def load_detector(name: str | Path) -> Detector:
    """The detector called ``name``, frozen.

    A folder with ``config.yaml`` or a ``.ckpt`` file is a run of ``experiment=detector`` and loads its best checkpoint;
    anything else is a DETR of the transformers library, by folder or hub name (``facebook/detr-resnet-50``).
    """
    path = Path(name)
    if path.suffix == ".ckpt" or (path / "config.yaml").exists():
        return detector_of_run(path)
    from nearfar.models.detection.detector import TransformersDetector

    return TransformersDetector(str(name)).freeze()


def detector_of_run(run: str | Path) -> Detector:
    """The detector that a run of ``experiment=detector`` has trained (its best checkpoint), frozen."""
    path = find_checkpoint(run, prefer="best")
    folder = RunFolder.of(path)
    state = Checkpoint.load(path)
    if state.system != "detector":
        raise NearfarError(f"{run}: a run of system '{state.system}', not of 'detector'.")
    if not (folder.path / "detector.json").exists():
        raise NearfarError(f"{folder.path}: detector.json is missing; was the folder copied without it?")
    about, options = folder.read_json("detector.json"), read_config(folder.config(), saved=True)
    detector = build_detector(cast(DetectorOptions, options), about["classes"], trained=False)
    detector.load_state_dict(state.model)
    detector.description = about["description"]
    detector.freeze()
    return detector


def save_frozen(detector: SmallDetector, folder: Path) -> None:
    """Write a frozen detector: its options and classes as JSON, its weights as plain arrays (16 MB, as a rule)."""
    about = {
        "classes": list(detector.classes), "description": detector.description, "recipe": detector.recipe
    }  # fmt: skip
    weights = {name: value.detach().cpu().numpy() for name, value in detector.state_dict().items()}
    write_arrays(folder / "weights.npz", weights)
    write_json(folder / "detector.json", about, indent=1)


def load_frozen(folder: Path) -> SmallDetector:
    """The detector that `save_frozen` wrote.

    Raises:
        NearfarError: files that are missing, damaged, or do not fit together.
    """
    about = read_json(folder / "detector.json", {"classes": [str], "description": str, "recipe": dict})
    recipe = read_options(DetectorRecipe, about["recipe"], saved=True)
    detector = build_detector(recipe, about["classes"], trained=False)
    detector.freeze()
    weights = {name: torch.from_numpy(value) for name, value in read_arrays(folder / "weights.npz").items()}
    try:
        detector.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise NearfarError(
            f"{folder}: the weights are not those of the detector described ({first})."
        ) from None
    detector.description = about["description"]
    return detector
