"""The loss between queries and true boxes: match first, then classify and fit (Carion et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar.errors import NearfarError
from nearfar.models.detection.boxes import corners, generalized_iou, iou, to_centre

if TYPE_CHECKING:
    from nearfar.models.detection.detector import DetectorOutput

__all__ = ["Match", "SetLoss", "Target"]


@dataclass
class Target:
    """The true boxes of one picture: centre x, centre y, width, height as shares of it, and their labels."""

    labels: Int[Tensor, " k"]
    boxes: Float[Tensor, "k 4"]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        return Target(
            self.labels.to(device, non_blocking=non_blocking),
            self.boxes.to(device, non_blocking=non_blocking),
        )

    def repeated(self, times: int) -> Target:
        """Each true box ``times`` times."""
        return Target(self.labels.repeat(times), self.boxes.repeat(times, 1))


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
        found = corners(boxes)
        count = max(1, sum(len(t.labels) for t in targets))
        l1 = (boxes - to_centre(true)).abs().sum() / count
        giou = (1 - generalized_iou(found, true)).sum() / count
        if self.quality is None:
            classes = self._cross_entropy(output.logits, picture, query, label)
        else:
            reached = iou(found, true).detach()
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
        found = []
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
            found.append(
                Match(
                    torch.as_tensor(rows, device=boxes.device), torch.as_tensor(columns, device=boxes.device)
                )
            )
        return found


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
