"""What every detector here has in common: pixels in, a set of scored boxes out, and a loss against true boxes.

A detector of the DETR family (Carion et al., 2020) answers with a fixed number of *queries*: each has a box, logits
over the classes and "nothing", and an embedding. Training pairs queries and true boxes one to one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar.errors import NearfarError, nearest_name
from nearfar.models.detection.boxes import corners
from nearfar.models.detection.set_loss import Match, SetLoss, Target

__all__ = ["Detections", "Detector", "DetectorOutput", "Match", "Target"]


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
        found = []
        scores, labels = output.probabilities().max(-1)
        for score, label, box, (height, width) in zip(
            scores, labels, corners(output.boxes).clamp(0, 1), sizes, strict=True
        ):
            order = score.argsort(descending=True, stable=True)
            order = order[score[order] >= score_threshold]
            scale = torch.tensor([width, height, width, height], device=box.device, dtype=box.dtype)
            found.append(Detections(box[order] * scale, score[order], label[order]))
        return found

    def freeze(self) -> Detector:
        """No gradient for any weight, eval mode for good; gradients still reach the pixels."""
        self.requires_grad_(False)
        self.frozen = True
        return self.eval()

    frozen = False

    def train(self, mode: bool = True) -> Detector:
        """Training mode, unless the detector is frozen."""
        return super().train(mode and not self.frozen)
