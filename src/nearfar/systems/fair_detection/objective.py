"""The three losses of a batch: contrast by score, the gap of the groups' scores, and detection itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.losses import AdaptiveScoreContrastiveLoss, BidirectionalScoreContrastiveLoss, Objective
from nearfar.models.detection import Detector, DetectorOutput, Match, Target
from nearfar.models.perturbation import FairModel
from nearfar.systems.fair_detection.options import FairDetectionOptions, term_weights

__all__ = ["FairObjective", "Losses", "picture_scores"]


def picture_scores(
    output: DetectorOutput, targets: Sequence[Target], matches: Sequence[Match]
) -> Float[Tensor, " n"]:
    """Score of each picture: the mean over matched queries of the probability of the true class.

    A picture without true boxes has the score 0; the data of this system has none.
    """
    probabilities = output.probabilities()
    scores = []
    for of_picture, target, match in zip(probabilities, targets, matches, strict=True):
        true = of_picture[match.queries, target.labels[match.targets]]
        scores.append(true.mean() if len(true) else of_picture.sum() * 0.0)
    return torch.stack(scores)


@dataclass
class Losses:
    """The losses by name, and the scores and features that they were computed from."""

    values: dict[str, Tensor]
    scores: Float[Tensor, " n"]
    features: Float[Tensor, "n d"]


class FairObjective:
    """λ_c · w(t) · contrastive + λ_w · wasserstein + β(t) · detection.

    A loss of weight 0 is computed for the log all the same where it costs nothing more: all three come from one pass of
    the detector.
    """

    def __init__(self, config: FairDetectionOptions) -> None:
        kind = BidirectionalScoreContrastiveLoss if config.bidirectional else AdaptiveScoreContrastiveLoss
        self.contrastive = kind(
            config.temperature,
            config.top_fraction,
            config.bottom_fraction,
            config.min_samples,
            config.middle,
            config.detach_positives,
            config.threshold,
        )
        self.sum = Objective(term_weights(config))

    def __call__(
        self,
        model: FairModel,
        detector: Detector,
        output: DetectorOutput,
        targets: Sequence[Target],
        lower: Int[Tensor, " n"],
    ) -> Losses:
        """``lower``: 1 for pictures of the group with the lower AP, 0 for the others."""
        scores = picture_scores(output, targets, detector.match(output, targets))
        features = output.features.mean(dim=1)
        is_lower = lower.bool()
        values = {
            "contrastive": self.contrastive(model.head(features), scores),
            "wasserstein": model.wasserstein(scores[is_lower], scores[~is_lower]),
            "detection": detector.set_loss(output, targets),
        }
        return Losses(values, scores, features)

    def anchors(self, scores: Float[Tensor, " n"]) -> Int[Tensor, " k"]:
        """Positions of the anchors among these scores."""
        return self.contrastive.split(scores).anchors

    def record(self) -> dict[str, float]:
        """Numbers of the last batch under the names of the system's page."""
        record = self.contrastive.record
        assert record is not None
        extra = record.extra
        return {
            "n_anchor": extra["anchors"],
            "n_positive": extra["positives"],
            "middle_share": extra["middle_share"],
            "score_gap": extra["score_gap"],
        }
