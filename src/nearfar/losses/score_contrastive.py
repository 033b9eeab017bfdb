"""Contrast by score as modules."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from nearfar.errors import NearfarError
from nearfar.functional.arguments import check_flags, check_temperature, check_words, number
from nearfar.functional.score_contrastive import (
    Middle,
    ScoreSplit,
    check_split_options,
    score_contrastive_step,
)
from nearfar.losses.base import ContrastiveLoss
from nearfar.losses.record import Record

__all__ = ["AdaptiveScoreContrastiveLoss", "BidirectionalScoreContrastiveLoss"]


class AdaptiveScoreContrastiveLoss(ContrastiveLoss):
    """Pull the rows of a batch that score low (anchors) towards those that score high (positives).

    Called with embeddings (n, d) and scores (n,). By default the lowest and highest 40 % of the batch, at least two
    each; with ``threshold`` those below and above a fixed score. ``nearfar.functional.adaptive_score_contrastive``
    has the definitions.

    A batch without anchors or without positives gives 0 without a gradient, and says so: ``record.extra["anchors"]``
    is 0. With a fixed threshold below all scores that is every batch. ``record.extra`` also holds the number of
    positives, the realised share of the middle, the rows whose score is missing (NaN: neither anchor nor positive),
    and the score gap between positives and anchors.

    Floor 0; guessing gives ln(candidates / positives).

    >>> import torch
    >>> loss = AdaptiveScoreContrastiveLoss()
    >>> value = loss(torch.eye(7), torch.linspace(0, 1, 7))
    >>> loss.record.extra["anchors"], round(loss.record.extra["middle_share"], 2)
    (2.0, 0.43)
    >>> fixed = AdaptiveScoreContrastiveLoss(threshold=0.5)
    >>> fixed(torch.eye(7), torch.linspace(0.9, 1, 7)).item(), fixed.record.extra["anchors"]
    (0.0, 0.0)
    """

    #: weights of anchors -> positives and of positives among themselves
    _weights = (1.0, 0.0)

    def __init__(
        self,
        temperature: float = 0.1,
        top_k_percent: float = 0.4,
        bottom_k_percent: float = 0.4,
        min_samples: int = 2,
        middle: Middle = "ignore",
        detach_positives: bool = False,
        threshold: float | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)
        check_words(middle=middle)
        check_flags(detach_positives=detach_positives, normalize=normalize)
        if middle not in ("ignore", "negatives"):
            raise NearfarError(f"middle is {middle!r}; it is 'ignore' or 'negatives'")
        check_split_options(top_k_percent, bottom_k_percent, min_samples, threshold)
        self.options = (top_k_percent, bottom_k_percent, min_samples, threshold)
        self.middle, self.detach_positives, self.normalize = middle, detach_positives, normalize
        self._split: tuple[ScoreSplit, Tensor] | None = None

    def forward(self, z: Float[Tensor, "n d"], scores: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        self._split = None
        loss, self._step, split = score_contrastive_step(
            z, scores, self.options, self.temperature, self.middle, self.detach_positives, self.normalize,
            self._weights
        )  # fmt: skip
        self._split = (split, scores.detach())
        return loss

    @property
    def record(self) -> Record | None:
        if self._step is None and self._split is not None:
            n = float(len(self._split[1]))
            return Record(0.0, 0.0, 0.0, n, 0.0, 0.0, 0.0, 0.0, 1 / self.temperature, True, self._extra())
        return super().record

    def _extra(self) -> dict[str, float]:
        if self._split is None:
            return {}
        split, scores = self._split
        gap = (
            (scores[split.positives].mean() - scores[split.anchors].mean()).item()
            if len(split.anchors)
            else 0.0
        )
        return {
            "anchors": float(len(split.anchors)),
            "positives": float(len(split.positives)),
            "middle_share": len(split.middle) / max(1, len(scores)),
            "scores_missing": float(scores.isnan().sum()),
            "score_gap": gap,
        }

    def extra_repr(self) -> str:
        top, bottom, least, threshold = self.options
        return (
            f"temperature={self.temperature}, top_k_percent={top}, bottom_k_percent={bottom}, min_samples={least}, "
            f"threshold={threshold}, middle={self.middle!r}, detach_positives={self.detach_positives}"
        )


class BidirectionalScoreContrastiveLoss(AdaptiveScoreContrastiveLoss):
    """``AdaptiveScoreContrastiveLoss`` and, in part, the positives pulled to each other.

    The first counts ``anchor_weight``, the second ``positive_weight``: it holds together what the anchors are pulled
    to. The record is that of the anchors.

    >>> import torch
    >>> loss = BidirectionalScoreContrastiveLoss()
    >>> z, scores = torch.eye(7), torch.linspace(0, 1, 7)
    >>> bool(loss(z, scores) > AdaptiveScoreContrastiveLoss()(z, scores))
    True
    """

    def __init__(
        self,
        temperature: float = 0.1,
        top_k_percent: float = 0.4,
        bottom_k_percent: float = 0.4,
        min_samples: int = 2,
        middle: Middle = "ignore",
        detach_positives: bool = False,
        threshold: float | None = None,
        anchor_weight: float = 1.0,
        positive_weight: float = 0.3,
        normalize: bool = True,
    ) -> None:
        super().__init__(
            temperature,
            top_k_percent,
            bottom_k_percent,
            min_samples,
            middle,
            detach_positives,
            threshold,
            normalize,
        )
        self._weights = (
            number("anchor_weight", anchor_weight, 0),
            number("positive_weight", positive_weight, 0),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, anchor_weight={self._weights[0]}, positive_weight={self._weights[1]}"
