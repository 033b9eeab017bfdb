"""A trained DETR of the transformers library, by hub name or folder."""

from __future__ import annotations

import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearfar.errors import NearfarError
from nearfar.models.detection.detector import Detector, DetectorOutput, SetLoss
from nearfar.models.hub import commit_in_cache, no_progress_bar, why_unreachable

if TYPE_CHECKING:
    pass

__all__ = ["TransformersDetector"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_KINDS = ("detr", "table-transformer")
_WITHOUT_TIMM = "no_timm"  # a branch of facebook's DETR models whose backbone is the library's own


class TransformersDetector(Detector):
    """DETR (Carion et al., 2020) with its published weights and its set loss.

    Args:
        name: a name on the hub, such as ``facebook/detr-resnet-50``, or a folder with the model.
        revision: a branch, tag or commit of a hub model. None takes ``main``, or, where timm is not installed and the
            name begins with ``facebook/detr``, the branch ``no_timm`` with the same weights.
        size: pixels that the shorter side of a picture is resized to; None takes pictures as they come. DETR was
            trained at 800.

    Colours are normalised as the model's preprocessor says. Models with a sigmoid over the classes (Conditional DETR,
    Deformable DETR, …) have no "nothing" and are refused.
    """

    def __init__(self, name: str, revision: str | None = None, size: int | None = None) -> None:
        if revision is None:
            no_timm = importlib.util.find_spec("timm") is None and name.startswith("facebook/detr")
            revision = _WITHOUT_TIMM if no_timm else "main"
        network, colours = _load(name, revision)
        config = network.config
        names = [str(config.id2label[i]) for i in sorted(config.id2label)]
        loss = SetLoss(
            class_cost=config.class_cost,
            l1_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
            nothing_weight=config.eos_coefficient,
        )
        where = "" if Path(name).is_dir() else f", revision {revision}"
        super().__init__(names, config.d_model, f"{name} (trained weights{where})", loss)
        self.network = network
        self.size = size
        self.mean: Tensor
        self.std: Tensor
        for key, value in zip(("mean", "std"), colours, strict=True):
            self.register_buffer(key, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> DetectorOutput:
        if self.size is not None:
            factor = self.size / min(pixels.shape[2:])
            shape = [round(side * factor) for side in pixels.shape[2:]]
            pixels = F.interpolate(pixels, shape, mode="bilinear", antialias=True).clamp(0, 1)
        output = self.network(pixel_values=(pixels - self.mean) / self.std)
        return DetectorOutput(output.logits, output.pred_boxes, output.last_hidden_state)


def _load(name: str, revision: str) -> tuple[Any, tuple[tuple[float, ...], tuple[float, ...]]]:
    try:
        from transformers import AutoConfig, AutoModelForObjectDetection
        from transformers.image_processing_base import ImageProcessingMixin
    except ImportError as error:
        raise NearfarError(
            f"detector={name} needs transformers ({error}): pip install 'nearfar[detector]'."
        ) from None
    cause = why_unreachable(name, revision)
    if cause is not None:
        raise _unavailable(name, cause)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        if config.model_type not in _KINDS:
            raise NearfarError(
                f"detector={name} is a model of type {config.model_type}; {' and '.join(_KINDS)} have the softmax over "
                'classes and "nothing" that is needed here.'
            )
        local = Path(name).is_dir() or bool(commit_in_cache(name, revision))
        with no_progress_bar() if local else nullcontext():
            network = AutoModelForObjectDetection.from_pretrained(name, revision=revision)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, NearfarError):
            raise
        raise _unavailable(name, " ".join(str(error).split())[:300]) from error
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name, revision=revision)
        colours = (tuple(settings["image_mean"]), tuple(settings["image_std"]))
    except (OSError, KeyError, TypeError, json.JSONDecodeError):
        colours = _IMAGENET
    return network.float(), colours


def _unavailable(name: str, cause: str) -> NearfarError:
    return NearfarError(
        f"The detector {name!r} is not to be had: {cause}. Without a network train one (nearfar train "
        "experiment=detector data.dir=FOLDER) and give its run, or give a folder with a downloaded model. A model that "
        "asks for timm needs pip install timm, or the same model without it (for facebook/detr-…: revision no_timm)."
    )
