"""Detectors (pixels in, scored boxes out), their loss by bipartite matching, and trained DETRs of transformers."""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar.data.detection import Target
from nearfar.errors import NearfarError, nearest_name
from nearfar.models.hub import commit_in_cache, no_progress_bar, why_unreachable

if TYPE_CHECKING:
    pass

__all__ = [
    "Detections",
    "Detector",
    "DetectorOutput",
    "Match",
    "SetLoss",
    "Target",
    "TransformersDetector",
    "corners",
    "generalized_iou",
    "iou",
    "to_centre",
]


def corners(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """(centre x, centre y, width, height) → (left, top, right, bottom).

    >>> corners(torch.tensor([0.5, 0.5, 0.5, 1.0]))
    tensor([0.2500, 0.0000, 0.7500, 1.0000])
    """
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def to_centre(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """(left, top, right, bottom) → (centre x, centre y, width, height)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def iou(a: Float[Tensor, "*n 4"], b: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Area of the intersection over area of the union of boxes given by their corners; shapes broadcast.

    >>> iou(torch.tensor([0.0, 0.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, 3.0, 1.0]))
    tensor(0.3333)
    """
    shared, union = _areas(a, b)
    return shared / union.clamp(min=_TINY)


def generalized_iou(a: Float[Tensor, "*n 4"], b: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """IoU less the share of the smallest common box that neither covers (Rezatofighi et al., 2019); −1 to 1.

    It has a gradient for boxes that are apart, where the IoU is flat.

    >>> generalized_iou(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([2.0, 0.0, 3.0, 1.0]))
    tensor(-0.3333)
    """
    shared, union = _areas(a, b)
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = around.clamp(min=0).prod(-1).clamp(min=_TINY)
    return shared / union.clamp(min=_TINY) - (hull - union) / hull


_TINY = 1e-9  # boxes are given as shares of the picture: no box of a person is that small


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shared = (
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    )
    own = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1) + (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    return shared, own - shared


@dataclass
class Match:
    """Pairs of one picture: query ``queries[i]`` belongs to the true box ``targets[i]``."""

    queries: Int[Tensor, " m"]
    targets: Int[Tensor, " m"]


class SetLoss(nn.Module):
    """A loss of all queries' classes, and L1 and generalised IoU of the matched boxes.

    Queries and true boxes are paired so that the sum of −p(class)·``class_cost`` + L1·``l1_weight`` −
    GIoU·``giou_weight`` is least. Box terms are sums over pairs divided by the number of true boxes in the batch.
    Earlier layers get the same loss, each with its own pairs, and all are added up; a layer whose output has a
    ``repeat`` gives that many queries to each true box.

    Args:
        class_cost, l1_weight, giou_weight: see above.
        class_weight: of the classes' loss.
        nothing_weight: of queries without a partner, which should say "nothing", in the weighted mean of the
            cross-entropy.
        quality: None takes that cross-entropy. A number γ takes Σ |t − p|^γ · cross-entropy over the number of true
            boxes, where a matched query should give its class the IoU t it has reached, and all others 0, so that
            scores rank boxes by how well they fit (the quality focal loss of Li et al., 2020, over a softmax).

    The defaults are those of DETR.
    """

    def __init__(
        self,
        class_cost: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        nothing_weight: float = 0.1,
        class_weight: float = 1.0,
        quality: float | None = None,
    ) -> None:
        super().__init__()
        self.class_cost, self.l1_weight, self.giou_weight = class_cost, l1_weight, giou_weight
        self.nothing_weight, self.class_weight, self.quality = nothing_weight, class_weight, quality

    def forward(self, output: DetectorOutput, targets: Sequence[Target]) -> Float[Tensor, ""]:
        _check(output, targets)
        parts = [self._layer(layer, targets) for layer in (*output.earlier, output)]
        return torch.stack(parts).sum()

    def _layer(self, output: DetectorOutput, targets: Sequence[Target]) -> Float[Tensor, ""]:
        targets = [t.repeated(output.repeat) for t in targets]
        matches = self.match(output, targets)
        picture = torch.cat([torch.full_like(m.queries, i) for i, m in enumerate(matches)])
        query = torch.cat([m.queries for m in matches])
        label = torch.cat([t.labels[m.targets] for t, m in zip(targets, matches, strict=True)])
        true = corners(torch.cat([t.boxes[m.targets] for t, m in zip(targets, matches, strict=True)]))
        boxes = output.boxes[picture, query]
        predicted = corners(boxes)
        count = max(1, sum(len(t.labels) for t in targets))
        l1 = (boxes - to_centre(true)).abs().sum() / count
        giou = (1 - generalized_iou(predicted, true)).sum() / count
        if self.quality is None:
            classes = self._cross_entropy(output.logits, picture, query, label)
        else:
            reached = iou(predicted, true).detach()
            classes = _quality_loss(output.logits, picture, query, label, reached, self.quality) / count
        return self.class_weight * classes + self.l1_weight * l1 + self.giou_weight * giou

    def _cross_entropy(
        self, logits: Tensor, picture: Tensor, query: Tensor, label: Tensor
    ) -> Float[Tensor, ""]:
        nothing = logits.shape[-1] - 1
        wanted = torch.full(logits.shape[:2], nothing, device=label.device)
        wanted[picture, query] = label
        weight = torch.ones(nothing + 1, device=label.device, dtype=logits.dtype)
        weight[-1] = self.nothing_weight
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight)

    @torch.no_grad()
    def match(self, output: DetectorOutput, targets: Sequence[Target]) -> list[Match]:
        """For each picture the pairs that cost least together: as many as it has true boxes, or queries if fewer."""
        from scipy.optimize import linear_sum_assignment

        _check(output, targets)
        probabilities = output.logits.float().softmax(-1)
        matches = []
        for p, boxes, target in zip(probabilities, output.boxes.float(), targets, strict=True):
            true = target.boxes.to(boxes.dtype)
            cost = (
                -self.class_cost * p[:, target.labels]
                + self.l1_weight * torch.cdist(boxes, true, p=1)
                - self.giou_weight * generalized_iou(corners(boxes)[:, None], corners(true)[None])
            )
            if not bool(cost.isfinite().all()):
                raise NearfarError(
                    "queries cannot be matched: a box or a logit is not finite. The training diverged (lower lr), or "
                    "the pixels were not finite."
                )
            rows, columns = linear_sum_assignment(cost.cpu().numpy())
            matches.append(
                Match(
                    torch.as_tensor(rows, device=boxes.device), torch.as_tensor(columns, device=boxes.device)
                )
            )
        return matches


def _quality_loss(
    logits: Tensor, picture: Tensor, query: Tensor, label: Tensor, reached: Tensor, gamma: float
) -> Float[Tensor, ""]:
    wanted = torch.zeros_like(logits)
    wanted[..., -1] = 1
    wanted[picture, query, -1] = 1 - reached
    wanted[picture, query, label] = reached
    far = (logits.softmax(-1)[..., -1] - wanted[..., -1]).abs().pow(gamma)
    return (far * -(wanted * logits.log_softmax(-1)).sum(-1)).sum()


def _check(output: DetectorOutput, targets: Sequence[Target]) -> None:
    if len(targets) != len(output.logits):
        raise NearfarError(f"{len(targets)} targets for {len(output.logits)} pictures: one Target each.")
    classes = output.logits.shape[-1] - 1
    for i, target in enumerate(targets):
        if len(target.labels) and not 0 <= int(target.labels.min()) <= int(target.labels.max()) < classes:
            raise NearfarError(
                f"target {i} has labels {sorted(set(target.labels.tolist()))}, but the detector has {classes} classes "
                "(labels count from 0)."
            )


@dataclass
class DetectorOutput:
    """What a detector says about n pictures with q queries each.

    ``logits``: over c classes and, last, "nothing". ``boxes``: centre x, centre y, width, height as shares of the
    picture. ``features``: embeddings of the last layer. ``earlier``: outputs of earlier layers, for auxiliary losses;
    empty for a detector that does not hand them out. ``repeat``: how many queries learn from one true box.
    """

    logits: Float[Tensor, "n q c+1"]
    boxes: Float[Tensor, "n q 4"]
    features: Float[Tensor, "n q d"]
    earlier: list[DetectorOutput] = field(default_factory=list)
    repeat: int = 1

    def probabilities(self) -> Float[Tensor, "n q c"]:
        """Probability of each class; what is left to 1 is that of "nothing"."""
        return self.logits.softmax(-1)[..., :-1]

    def __len__(self) -> int:
        return len(self.logits)


@dataclass
class Detections:
    """Scored boxes of one picture, best first: ``boxes`` (left, top, right, bottom) in pixels, ``labels`` positions in
    ``Detector.classes``."""

    boxes: Float[Tensor, "k 4"]
    scores: Float[Tensor, " k"]
    labels: Int[Tensor, " k"]

    def __len__(self) -> int:
        return len(self.scores)


class Detector(nn.Module, ABC):
    """A detector of the DETR family.

    Args:
        classes: names of what it finds; a label is a position in it.
        width: d, the length of a query's embedding.
        description: what is really used, with the origin of the weights.
        loss: its set loss; that of DETR where None.

    A network defines ``forward``; pixels are (n, 3, h, w), floats from 0 to 1, and gradients reach them.
    """

    def __init__(
        self, classes: Sequence[str], width: int, description: str, loss: SetLoss | None = None
    ) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.width = width
        self.description = description
        self.loss = SetLoss() if loss is None else loss

    @abstractmethod
    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> DetectorOutput:
        """Boxes, logits and embeddings of all queries."""

    def label(self, name: str) -> int:
        """The position of the class called ``name``."""
        if name not in self.classes:
            raise NearfarError(f"the detector has no class {name!r}; {nearest_name(name, self.classes)}")
        return self.classes.index(name)

    def set_loss(self, output: DetectorOutput, targets: Sequence[Target]) -> Float[Tensor, ""]:
        """The loss the detector is trained with, from best-matched pairs of queries and true boxes."""
        return self.loss(output, targets)

    def match(self, output: DetectorOutput, targets: Sequence[Target]) -> list[Match]:
        """For each picture the pairs of queries and true boxes that cost least together."""
        return self.loss.match(output, targets)

    def detections(
        self, output: DetectorOutput, sizes: Sequence[tuple[int, int]], score_threshold: float = 0.0
    ) -> list[Detections]:
        """Each query's best class, for pictures of ``sizes`` = (height, width) pixels; boxes are cut at the edges."""
        if len(sizes) != len(output):
            raise NearfarError(f"{len(sizes)} sizes for {len(output)} pictures: one (height, width) each.")
        results = []
        scores, labels = output.probabilities().max(-1)
        for score, label, box, (height, width) in zip(
            scores, labels, corners(output.boxes).clamp(0, 1), sizes, strict=True
        ):
            order = score.argsort(descending=True, stable=True)
            order = order[score[order] >= score_threshold]
            scale = torch.tensor([width, height, width, height], device=box.device, dtype=box.dtype)
            results.append(Detections(box[order] * scale, score[order], label[order]))
        return results

    def freeze(self) -> Detector:
        """No gradient for any weight, eval mode for good; gradients still reach the pixels."""
        self.requires_grad_(False)
        self.frozen = True
        return self.eval()

    frozen = False

    def train(self, mode: bool = True) -> Detector:
        """Training mode, unless the detector is frozen."""
        return super().train(mode and not self.frozen)


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
