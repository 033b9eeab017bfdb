"""Contrast by score: rows a model scores low are pulled towards rows it scores high."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.arguments import whole_number
from nearfar.contrast import Columns, Step, softmax_loss, uncompiled
from nearfar.errors import NearfarError
from nearfar.losses.arguments import (
    check_flags,
    check_matrices,
    check_temperature,
    check_tensors,
    check_words,
    number,
    ready,
)
from nearfar.losses.base import ContrastiveLoss, Record

__all__ = [
    "AdaptiveScoreContrastiveLoss",
    "BidirectionalScoreContrastiveLoss",
    "ScoreSplit",
    "adaptive_score_contrastive",
    "bidirectional_score_contrastive",
    "check_split_options",
    "score_contrastive_step",
    "split_scores",
]


Middle = Literal["ignore", "negatives"]


class ScoreSplit(NamedTuple):
    """Positions in the batch: ``anchors`` score low, ``positives`` high, ``middle`` is neither."""

    anchors: Int[Tensor, " k"]
    positives: Int[Tensor, " k"]
    middle: Int[Tensor, " k"]


def split_scores(
    scores: Float[Tensor, " n"],
    *,
    top_k_percent: float = 0.4,
    bottom_k_percent: float = 0.4,
    min_samples: int = 2,
    threshold: float | None = None,
) -> ScoreSplit:
    """Who is anchor and who is positive, by rank or, with ``threshold``, by a fixed score.

    By rank: the floor(n · share) highest are positives, the lowest anchors, at least ``min_samples`` of each; where
    the two would overlap, the n // 2 highest and the n - n // 2 lowest. Below 2 · ``min_samples`` rows there are
    neither. By threshold: positives score above it, anchors do not; fewer than ``min_samples`` on a side means
    neither. Ties are broken by position. A row whose score is missing (NaN) is in the middle, and n counts the others;
    on a device, counting them waits for it.

    >>> split_scores(torch.tensor([0.9, 0.1, 0.5, 0.8, 0.2])).anchors.tolist()
    [1, 4]
    >>> split_scores(torch.tensor([0.9, 0.95, 0.99, 0.97]), threshold=0.5).anchors.tolist()
    []
    """
    check_split_options(top_k_percent, bottom_k_percent, min_samples, threshold)
    check_scores(scores)
    order = torch.sort(scores.detach(), stable=True).indices  # NaN comes last
    missing = int(scores.detach().isnan().sum())
    order, unknown = order[: len(scores) - missing], order[len(scores) - missing :]
    n = len(order)
    if threshold is not None:
        high = int((scores > threshold).sum())
        low = n - high
    else:
        high = max(min_samples, int(n * top_k_percent + 1e-9))
        low = max(min_samples, int(n * bottom_k_percent + 1e-9))
        if high + low > n:
            high, low = n // 2, n - n // 2
    if n < 2 * min_samples or min(high, low) < min_samples:
        return ScoreSplit(order[:0], order[:0], torch.cat([order, unknown]))
    middle = torch.cat([order[low : n - high], unknown]) if missing else order[low : n - high]
    return ScoreSplit(order[:low], order[n - high :], middle)


def check_scores(scores: Tensor) -> None:
    """``NearfarError`` unless these are scores, one axis of them; on the CPU none may be infinite."""
    check_tensors(scores=scores)
    if scores.ndim != 1 or scores.is_complex() or scores.dtype == torch.bool:
        raise NearfarError(
            f"scores are {tuple(scores.shape)} {scores.dtype}; one number for each row is needed"
        )
    if scores.device.type == "cpu" and bool(scores.detach().isinf().any()):
        where = scores.detach().isinf().nonzero().flatten().tolist()
        raise NearfarError(
            f"scores are not finite in row {', '.join(map(str, where[:5]))}: they cannot be ranked. NaN stands for a "
            "score that is missing"
        )


def check_split_options(
    top_k_percent: float, bottom_k_percent: float, min_samples: int, threshold: float | None
) -> None:
    """``NearfarError`` for options that cannot be."""
    for share, name in ((top_k_percent, "top_k_percent"), (bottom_k_percent, "bottom_k_percent")):
        if not 0 < number(name, share) <= 1:
            raise NearfarError(f"{name} is {share}, but it is a share of the batch: above 0, at most 1")
    if whole_number("min_samples", min_samples) < 1:
        raise NearfarError(f"min_samples is {min_samples}, but it must be 1 or more")
    if threshold is not None:
        number("threshold", threshold)


def adaptive_score_contrastive(
    z: Float[Tensor, "n d"],
    scores: Float[Tensor, " n"],
    *,
    temperature: float = 0.1,
    top_k_percent: float = 0.4,
    bottom_k_percent: float = 0.4,
    min_samples: int = 2,
    middle: Middle = "ignore",
    detach_positives: bool = False,
    threshold: float | None = None,
    normalize: bool = True,
) -> Float[Tensor, ""]:
    """Mean over anchors i of log Σ_c exp(s_ic) - log Σ_p exp(s_ip): low scores are pulled to high ones.

    Positives p and anchors are chosen by ``split_scores``; candidates c are both, without i. ``middle="negatives"``
    adds the rows between as candidates, and those whose score is missing (NaN). ``detach_positives`` lets anchors move
    to positives, not positives to anchors. No gradient goes to ``scores``. The sum over positives stands inside the
    logarithm: the nearest positive alone can satisfy an anchor.

    0, without a gradient, where there are no anchors or positives; ``AdaptiveScoreContrastiveLoss`` says so in its
    record. Floor 0; guessing gives ln(candidates / positives).

    >>> z, scores = torch.eye(4), torch.tensor([0.9, 0.8, 0.2, 0.1])
    >>> round(adaptive_score_contrastive(z, scores).exp().item(), 4)  # three candidates, two of them positives
    1.5
    """
    options = (top_k_percent, bottom_k_percent, min_samples, threshold)
    return score_contrastive_step(
        z, scores, options, temperature, middle, detach_positives, normalize, (1.0, 0.0)
    )[0]


def bidirectional_score_contrastive(
    z: Float[Tensor, "n d"],
    scores: Float[Tensor, " n"],
    *,
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
) -> Float[Tensor, ""]:
    """``adaptive_score_contrastive`` and, in part, the positives pulled to each other.

    The value is ``anchor_weight`` times the first plus ``positive_weight`` times the second. The second term has the
    positives as queries, the other positives as their positives and the same candidates: it holds together what the
    anchors are pulled to.

    >>> z, scores = torch.eye(4), torch.tensor([0.9, 0.8, 0.2, 0.1])
    >>> one = adaptive_score_contrastive(z, scores)
    >>> torch.isclose(bidirectional_score_contrastive(z, scores, positive_weight=0.0), one)
    tensor(True)
    """
    options = (top_k_percent, bottom_k_percent, min_samples, threshold)
    weights = (anchor_weight, positive_weight)
    return score_contrastive_step(
        z, scores, options, temperature, middle, detach_positives, normalize, weights
    )[0]


@uncompiled
def score_contrastive_step(
    z: Tensor,
    scores: Tensor,
    options: tuple[float, float, int, float | None],
    temperature: float,
    middle: str,
    detach_positives: bool,
    normalize: bool,
    weights: tuple[float, float],
) -> tuple[Float[Tensor, ""], Step | None, ScoreSplit]:
    """The loss, what its record is made of (None where nobody is pulled), and the split."""
    check_words(middle=middle)
    check_flags(detach_positives=detach_positives, normalize=normalize)
    if middle not in ("ignore", "negatives"):
        raise NearfarError(f"middle is {middle!r}; it is 'ignore' or 'negatives'")
    check_matrices(z=z)
    first, _, scale = ready(z, None, 1.0 / check_temperature(temperature), normalize, ("z", "z"))
    check_tensors(scores=scores)
    for name, weight in zip(("anchor_weight", "positive_weight"), weights, strict=True):
        number(name, weight, least=0)
    if scores.shape != (len(z),):
        raise NearfarError(f"scores are {tuple(scores.shape)} for {len(z)} rows of z; one for each is needed")
    top, bottom, least, threshold = options
    split = split_scores(
        scores, top_k_percent=top, bottom_k_percent=bottom, min_samples=least, threshold=threshold
    )
    if not len(split.anchors):
        return first[:0].sum(), None, split
    anchors, positives = first[split.anchors], first[split.positives]
    held = positives.detach() if detach_positives else positives
    rest = [first[split.middle]] if middle == "negatives" else []
    low, high = len(anchors), len(positives)
    keys = torch.cat([anchors, held, *rest])
    target = Columns(low, len(keys), slice(low, low + high))
    pull, step = softmax_loss(anchors, keys, scale, target, without_self=True, inside=True, unit=normalize)
    loss = weights[0] * pull
    if weights[1] and high > 1:
        keys = torch.cat([held, anchors, *rest])
        target = Columns(high, len(keys), slice(0, high))
        among, _ = softmax_loss(
            positives, keys, scale, target, without_self=True, inside=True, unit=normalize
        )
        loss = loss + weights[1] * among
    return loss, step, split


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
