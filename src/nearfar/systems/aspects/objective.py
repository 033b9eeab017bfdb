"""The objective: focal loss of every aspect, and optionally a contrastive loss of the reviews."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar.data.reviews.labels import NEGATIVE, NEUTRAL, POSITIVE, UNKNOWN, LabelScheme
from nearfar.losses import FocalLoss, MultiLabelSupConLoss, Objective
from nearfar.losses.focal import focal_alpha
from nearfar.schedules import Schedule

__all__ = ["ALPHAS", "CONTRASTS", "AspectObjective", "class_weights"]

#: weight of a term: a number or a schedule over epochs
Weight = float | str | Mapping[str, object] | Schedule
CONTRASTS = ("none", "jaccard", "legacy")
ALPHAS = ("none", "counts", "sqrt")


def class_weights(codes: Int[Tensor, "n a"], classes: int, kind: str) -> Float[Tensor, "a c"] | None:
    """Weights of the classes of each aspect from their counts: N / n ("counts"), its root ("sqrt"), or None ("none").

    A class without a row counts as one: no row has its weight.

    >>> class_weights(torch.tensor([[0], [0], [0], [2]]), 3, "counts")
    tensor([[1.6667, 5.0000, 5.0000]])
    """
    if kind == "none":
        return None
    counts = torch.stack([(codes == kind_).sum(0) for kind_ in range(classes)], dim=1).clamp(min=1)
    weights = focal_alpha(counts.double())
    return (weights if kind == "counts" else weights.sqrt()).float()


class AspectObjective(nn.Module):
    """focal_weight · focal + contrastive_weight · contrastive.

    Args:
        scheme: aspects and pairs.
        alpha: (A, C) weights of the classes, see `class_weights`.
        focal_weight, contrastive_weight: of the terms; numbers or schedules over epochs.
        gamma: focus of the focal loss; 0 is cross-entropy.
        contrastive: "jaccard" (reviews are positives by their common aspect-polarity pairs), "legacy" (the reference's
            rule, in which absent counts as neutral), or "none".
        temperature: of the contrastive term.
        reduction: of the focal loss, see `FocalLoss`.
    """

    _aspects: Tensor
    _polarities: Tensor

    def __init__(
        self,
        scheme: LabelScheme,
        alpha: Float[Tensor, "a c"] | None = None,
        *,
        focal_weight: Weight = 0.7,
        contrastive_weight: Weight = 0.3,
        gamma: float = 2.0,
        contrastive: str = "jaccard",
        temperature: float = 0.1,
        reduction: str = "weighted_mean",
    ) -> None:
        super().__init__()
        self.focal = FocalLoss(gamma, alpha, reduction, ignore_index=UNKNOWN)
        terms = {"focal": focal_weight}
        self.contrast: MultiLabelSupConLoss | None = None
        if contrastive != "none":
            weights = cast(Literal["jaccard", "legacy"], contrastive)
            self.contrast = MultiLabelSupConLoss(temperature, weights=weights)
            terms["contrastive"] = contrastive_weight
        self.objective = Objective(terms)
        pairs = torch.tensor(scheme.pairs, dtype=torch.int64).reshape(-1, 2)
        self.register_buffer("_aspects", pairs[:, 0], persistent=False)
        self.register_buffer("_polarities", pairs[:, 1], persistent=False)
        self.values: dict[str, Tensor] = {}
        self._place: tuple[float, float] = (0.0, 1.0)

    def forward(
        self,
        logits: Float[Tensor, "b a c"],
        projection: Float[Tensor, "b d"] | None,
        codes: Int[Tensor, "b a"],
        epoch: int = 0,
        epochs: int = 1,
    ) -> Float[Tensor, ""]:
        """The weighted sum; ``projection`` is not needed without a contrastive term."""
        self._place = (float(epoch), float(epochs))
        self.values = {"focal": self.focal(logits, codes)}
        if self.contrast is not None:
            assert projection is not None
            self.values["contrastive"] = self.contrast(projection, self._targets(codes))
        return self.objective(self.values, *self._place)

    def shares(self, on: Sequence[Tensor]) -> dict[str, float]:
        """Each term's share of the gradient with respect to ``on``; call it before the backward pass."""
        return self.objective.measure_shares(self.values, list(on), *self._place).to_dict()

    def record(self) -> dict[str, float]:
        """Numbers of the last call for the log: terms, focal loss, contrastive loss."""
        assert self.objective.record is not None
        numbers = self.objective.record.to_dict()
        if self.focal.record is not None:
            names = ("loss_kind", "uniform_level", "floor", "p_true", "hardest_share", "labels")
            focal = self.focal.record.to_dict()
            numbers |= {f"focal/{name}": focal[name] for name in names}
        if self.contrast is not None and self.contrast.record is not None:
            record = self.contrast.record.to_dict()
            numbers |= record | {"contrastive/loss_kind": record["loss_kind"]}
        return numbers

    def _targets(self, codes: Int[Tensor, "b a"]) -> Int[Tensor, "b k"]:
        assert self.contrast is not None
        if self.contrast.weights == "jaccard":
            return (codes[:, self._aspects] == self._polarities).long()
        legacy = torch.zeros_like(codes)  # absent, neutral and unknown share a code
        legacy[codes == NEGATIVE] = NEGATIVE
        legacy[codes == POSITIVE] = POSITIVE
        assert NEUTRAL not in (NEGATIVE, POSITIVE)
        return legacy
