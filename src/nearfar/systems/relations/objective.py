"""The loss of a batch: every two views of a pair are brought together, as the named loss understands it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import combinations
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from nearfar.contrast import DuplicateMask, NoPositivesWarning
from nearfar.errors import NearfarError, nearest_name
from nearfar.losses import InfoNCELoss, SupConLoss
from nearfar.systems.relations.dataset import RelationBatch

__all__ = ["LOSSES", "ViewLoss"]

LOSSES = ("infonce", "supcon", "supcon_inside")


class ViewLoss(nn.Module):
    """A contrastive loss between all views that a pair has.

    "infonce"        a pair's own partner against all others of the batch, in both directions unless ``symmetric`` is
                     false. Rows that are the same
                     two boxes (an annotator gave them two relations) are no negatives of each other.
    "supcon"         all pairs of the same relation are positives, sum outside the logarithm (Khosla et al. 2020).
    "supcon_inside"  the variant of which the notes say that it fails: cross-modal, sum inside the logarithm, a pair's
                     own partner taken out.

    Each two views are contrasted over the rows that have both. A row with boxes alone (no photo, no names) has the
    boxes as another annotator would have drawn them for its second view ("jittered"). Terms are weighted by their
    rows; rows that have no company are left out and counted. ``sum``: of a supervised loss, where it is to be another
    than the name says. ``repeated=False`` says that no two rows are the same two boxes, and saves looking.
    """

    def __init__(
        self,
        name: str = "infonce",
        temperature: float = 0.07,
        symmetric: bool = True,
        repeated: bool = True,
        sum: Literal["outside", "inside"] | None = None,
    ) -> None:
        super().__init__()
        self.repeated = repeated
        if name not in LOSSES:
            raise NearfarError(f"loss={name}: {nearest_name(str(name), LOSSES)}")
        self.name = name
        self.contrast: InfoNCELoss | SupConLoss
        if name == "infonce":
            self.contrast = InfoNCELoss(temperature, symmetric=symmetric)
        else:
            inside = name == "supcon_inside"
            self.contrast = SupConLoss(
                temperature, sum=sum or ("inside" if inside else "outside"), own_pair=not inside
            )
        self.seen: dict[str, Any] = {}

    def forward(self, views: Mapping[str, Tensor], batch: RelationBatch) -> Float[Tensor, ""]:
        terms = list(_terms(views, batch))
        total = sum(len(batch) if rows is None else len(rows) for *_, rows in terms)
        loss = views["spatial"].sum() * 0.0
        self.seen = {"rows_contrasted": total, "terms": len(terms)}
        if not terms:
            warnings.warn(
                "no two rows of this batch have two views in common: the loss is 0 and nothing is learned. Take "
                "larger batches, or set box_jitter=0.05, which gives every pair a second view.",
                NoPositivesWarning,
                stacklevel=2,
            )
        for first, second, rows in terms:
            count = len(batch) if rows is None else len(rows)
            if rows is None:
                a, b, label, group = views[first], views[second], batch.label, batch.group
            else:
                a, b = views[first][rows], views[second][rows]
                label, group = batch.label[rows], batch.group[rows]
            loss = loss + self._of(a, b, label, group) * (count / total)
        return loss

    def _of(self, a: Tensor, b: Tensor, label: Tensor, group: Tensor) -> Tensor:
        if isinstance(self.contrast, SupConLoss):
            value: Tensor = self.contrast(a, label, other=b)
            return value
        found: Tensor = self.contrast(a, b, DuplicateMask(group) if self.repeated else None)
        return found

    def record(self) -> dict[str, float]:
        """The record of the last term that was computed, and how many rows and terms there were."""
        found = {} if self.contrast.record is None else dict(self.contrast.record.to_dict())
        return found | {name: float(value) for name, value in self.seen.items()}


def _terms(views: Mapping[str, Tensor], batch: RelationBatch) -> list[tuple[str, str, Tensor | None]]:
    """Two views and the rows that have both; None for all rows. Terms of fewer than two rows are left out."""
    whole = bool(batch.seen.all())
    names = [name for name in ("visual", "spatial", "names") if name in views]
    terms: list[tuple[str, str, Tensor | None]] = []
    for first, second in combinations(names, 2):
        if "visual" in (first, second) and not whole:
            rows = batch.seen.nonzero()[:, 0]
            if len(rows) > 1:
                terms.append((first, second, rows))
        else:
            terms.append((first, second, None))
    if "jittered" in views:
        rows = (~batch.seen).nonzero()[:, 0]
        if len(rows) > 1:
            terms.append(("spatial", "jittered", rows))
    return terms
