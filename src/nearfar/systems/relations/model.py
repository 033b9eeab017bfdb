"""The views of a pair in one space (pixels of both crops, box geometry, names) and the loss between every two views."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import combinations, pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from nearfar.contrast import DuplicateMask, NoPositivesWarning
from nearfar.errors import NearfarError, nearest_name
from nearfar.losses import InfoNCELoss, SupConLoss
from nearfar.models.projection import Dropout
from nearfar.systems.relations.dataset import RelationBatch
from nearfar.systems.relations.options import RelationOptions

__all__ = ["LOSSES", "RelationModel", "ViewLoss"]


class RelationModel(nn.Module):
    """A head for each view. Embeddings are not normalised; the losses normalise them.

    Args:
        numbers: how many numbers describe the boxes: k → 64 → 128 → ``dim``, ReLU, ``spatial_dropout``.
        visual: length of the frozen features of both crops: v → ``hidden`` → ``dim``, ReLU, ``dropout``; None for a
            model without pixels.
        names: length of the vectors of both names: t → ``dim`` → ``dim``; None for none.

    >>> model = RelationModel(numbers=8, visual=1024)
    >>> sum(p.numel() for p in model.visual.parameters())
    656128
    """

    def __init__(
        self,
        numbers: int,
        visual: int | None = None,
        names: int | None = None,
        *,
        hidden: int = 512,
        dim: int = 256,
        dropout: float = 0.4,
        spatial_dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.spatial = _layers((numbers, 64, 128, dim), spatial_dropout)
        self.visual = None if visual is None else _layers((visual, hidden, dim), dropout)
        self.names = None if names is None else _layers((names, dim, dim), dropout)

    @classmethod
    def from_config(
        cls, config: RelationOptions, numbers: int, visual: int | None, names: int | None
    ) -> RelationModel:
        """From the options of the system, by their names."""
        return cls(
            numbers,
            visual,
            names,
            hidden=config.visual_hidden,
            dim=config.embedding_dim,
            dropout=config.visual_dropout,
            spatial_dropout=config.spatial_dropout,
        )

    def forward(self, batch: RelationBatch) -> dict[str, Float[Tensor, "b d"]]:
        """The embeddings of a batch: "spatial" and, if any, "visual" (0 without a photo), "names", "jittered"."""
        views = {"spatial": self.spatial(batch.numbers)}
        if self.visual is not None:
            if batch.visual is None:
                raise NearfarError("this model needs pixels, and the batch has none")
            embedded = self.visual(batch.visual)
            views["visual"] = (
                embedded if bool(batch.has_pixels.all()) else embedded * batch.has_pixels[:, None]
            )
        if self.names is not None:
            if batch.names is None:
                raise NearfarError("this model needs names, and the batch has none")
            views["names"] = self.names(batch.names)
        if batch.jittered is not None and self.training:
            views["jittered"] = self.spatial(batch.jittered)
        return views


def _layers(sizes: tuple[int, ...], dropout: float) -> nn.Sequential:
    """Linear maps with ReLU and dropout between them."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        if i:
            layers += [nn.ReLU(), Dropout(dropout)]
        layers.append(nn.Linear(a, b))
    return nn.Sequential(*layers)


LOSSES = ("infonce", "supcon", "supcon_inside")


class ViewLoss(nn.Module):
    """A contrastive loss between all views that a pair has.

    "infonce"        a pair's own partner against all others of the batch, in both directions unless ``symmetric`` is
                     false. Rows with the same two boxes (annotated with two relations) are no negatives of each other.
    "supcon"         all pairs of the same relation are positives, sum outside the logarithm (Khosla et al. 2020).
    "supcon_inside"  a variant that the notes report to fail: cross-modal, sum inside the logarithm, a pair's own
                     partner left out.

    Each two views are contrasted over the rows that have both. The second view of a row with boxes alone (no photo,
    no names) are its boxes with random jitter ("jittered"), like those of a different annotator. Terms are weighted by
    their rows. ``sum``: of a supervised loss, where it differs from that of the name. ``repeated=False``: no two rows
    have the same two boxes, and no mask is needed.
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
        self.counts: dict[str, int] = {}

    def forward(self, views: Mapping[str, Tensor], batch: RelationBatch) -> Float[Tensor, ""]:
        terms = list(_terms(views, batch))
        total = sum(len(batch) if rows is None else len(rows) for *_, rows in terms)
        loss = views["spatial"].sum() * 0.0
        self.counts = {"rows_contrasted": total, "terms": len(terms)}
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
        loss: Tensor = self.contrast(a, b, DuplicateMask(group) if self.repeated else None)
        return loss

    def record(self) -> dict[str, float]:
        """The record of the last term, and the numbers of rows and terms."""
        numbers = {} if self.contrast.record is None else dict(self.contrast.record.to_dict())
        return numbers | {name: float(value) for name, value in self.counts.items()}


def _terms(views: Mapping[str, Tensor], batch: RelationBatch) -> list[tuple[str, str, Tensor | None]]:
    """Two views and the rows that have both; None for all rows. Terms of fewer than two rows are left out."""
    whole = bool(batch.has_pixels.all())
    names = [name for name in ("visual", "spatial", "names") if name in views]
    terms: list[tuple[str, str, Tensor | None]] = []
    for first, second in combinations(names, 2):
        if "visual" in (first, second) and not whole:
            rows = batch.has_pixels.nonzero()[:, 0]
            if len(rows) > 1:
                terms.append((first, second, rows))
        else:
            terms.append((first, second, None))
    if "jittered" in views:
        rows = (~batch.has_pixels).nonzero()[:, 0]
        if len(rows) > 1:
            terms.append(("spatial", "jittered", rows))
    return terms
