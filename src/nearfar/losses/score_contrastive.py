"""Contrast by score: rows a model scores low are pulled towards rows it scores high."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

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
    renamed,
)
from nearfar.losses.base import ContrastiveLoss, LossTraits, Record

__all__ = [
    "AdaptiveScoreContrastiveLoss",
    "BidirectionalScoreContrastiveLoss",
    "ScoreSplit",
    "adaptive_score_contrastive",
    "bidirectional_score_contrastive",
    "score_contrastive_step",
    "split_scores",
]


Middle = Literal["ignore", "negatives"]
#: earlier names of arguments, accepted with a warning for one version
OLD_NAMES = {"top_k_percent": "top_fraction", "bottom_k_percent": "bottom_fraction"}


@dataclass(eq=False, repr=False)
class SplitOptions:
    """What all losses by score share, for functions and modules; ``adaptive_score_contrastive`` describes it."""

    temperature: float = 0.1
    top_fraction: float = 0.4
    bottom_fraction: float = 0.4
    min_samples: int = 2
    middle: Middle = "ignore"
    detach_positives: bool = False
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Options are checked where they are used; the modules, which inherit them, check at once."""

    def check_split(self) -> None:
        """``NearfarError`` for options of the split that cannot be."""
        for share, name in (
            (self.top_fraction, "top_fraction"),
            (self.bottom_fraction, "bottom_fraction"),
        ):
            if not 0 < number(name, share) <= 1:
                raise NearfarError(f"{name} is {share}, but it is a share of the batch: above 0, at most 1")
        if whole_number("min_samples", self.min_samples) < 1:
            raise NearfarError(f"min_samples is {self.min_samples}, but it must be 1 or more")
        if self.threshold is not None:
            number("threshold", self.threshold)

    def split(self, scores: Float[Tensor, " n"]) -> ScoreSplit:
        """Who is anchor and who is positive."""
        self.check_split()
        check_scores(scores)
        min_samples = self.min_samples
        order = torch.sort(scores.detach(), stable=True).indices  # NaN comes last
        missing = int(scores.detach().isnan().sum())
        order, unknown = order[: len(scores) - missing], order[len(scores) - missing :]
        n = len(order)
        if self.threshold is not None:
            high = int((scores > self.threshold).sum())
            low = n - high
        else:
            high = max(min_samples, int(n * self.top_fraction + 1e-9))
            low = max(min_samples, int(n * self.bottom_fraction + 1e-9))
            if high + low > n:
                high, low = n // 2, n - n // 2
        if n < 2 * min_samples or min(high, low) < min_samples:
            return ScoreSplit(order[:0], order[:0], torch.cat([order, unknown]))
        middle = torch.cat([order[low : n - high], unknown]) if missing else order[low : n - high]
        return ScoreSplit(order[:low], order[n - high :], middle)


@dataclass(eq=False, repr=False)
class ScoreOptions(SplitOptions):
    """The options of ``adaptive_score_contrastive``."""

    normalize: bool = True

    #: what anchors pulled to positives count, and positives pulled to each other
    anchor_weight: ClassVar[float] = 1.0
    positive_weight: ClassVar[float] = 0.0


@dataclass(eq=False, repr=False)
class BidirectionalScoreOptions(SplitOptions):
    """The options of ``bidirectional_score_contrastive``."""

    anchor_weight: float = 1.0
    positive_weight: float = 0.3
    normalize: bool = True


def check_score_options(options: ScoreOptions | BidirectionalScoreOptions) -> None:
    """``NearfarError`` for options that cannot be; the temperature is checked where it is used."""
    check_words(middle=options.middle)
    check_flags(detach_positives=options.detach_positives, normalize=options.normalize)
    if options.middle not in ("ignore", "negatives"):
        raise NearfarError(f"middle is {options.middle!r}; it is 'ignore' or 'negatives'")
    options.check_split()
    number("anchor_weight", options.anchor_weight, least=0)
    number("positive_weight", options.positive_weight, least=0)


class ScoreSplit(NamedTuple):
    """Positions in the batch: ``anchors`` score low, ``positives`` high, ``middle`` is neither."""

    anchors: Int[Tensor, " k"]
    positives: Int[Tensor, " k"]
    middle: Int[Tensor, " k"]


@renamed(**OLD_NAMES)
def split_scores(
    scores: Float[Tensor, " n"],
    *,
    top_fraction: float = 0.4,
    bottom_fraction: float = 0.4,
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
    options = SplitOptions(
        top_fraction=top_fraction,
        bottom_fraction=bottom_fraction,
        min_samples=min_samples,
        threshold=threshold,
    )
    return options.split(scores)


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


@renamed(**OLD_NAMES)
def adaptive_score_contrastive(
    z: Float[Tensor, "n d"],
    scores: Float[Tensor, " n"],
    *,
    temperature: float = 0.1,
    top_fraction: float = 0.4,
    bottom_fraction: float = 0.4,
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
    options = ScoreOptions(
        temperature,
        top_fraction,
        bottom_fraction,
        min_samples,
        middle,
        detach_positives,
        threshold,
        normalize,
    )
    return score_contrastive_step(z, scores, options)[0]


@renamed(**OLD_NAMES)
def bidirectional_score_contrastive(
    z: Float[Tensor, "n d"],
    scores: Float[Tensor, " n"],
    *,
    temperature: float = 0.1,
    top_fraction: float = 0.4,
    bottom_fraction: float = 0.4,
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
    options = BidirectionalScoreOptions(
        temperature, top_fraction, bottom_fraction, min_samples, middle, detach_positives, threshold,
        anchor_weight, positive_weight, normalize,
    )  # fmt: skip
    return score_contrastive_step(z, scores, options)[0]


@uncompiled
def score_contrastive_step(
    z: Tensor, scores: Tensor, options: ScoreOptions | BidirectionalScoreOptions
) -> tuple[Float[Tensor, ""], Step | None, ScoreSplit]:
    """The loss, what its record is made of (None where there are no anchors), and the split."""
    check_score_options(options)
    check_matrices(z=z)
    normalize = options.normalize
    first, _, scale = ready(z, None, 1.0 / check_temperature(options.temperature), normalize, ("z", "z"))
    check_tensors(scores=scores)
    if scores.shape != (len(z),):
        raise NearfarError(f"scores are {tuple(scores.shape)} for {len(z)} rows of z; one for each is needed")
    split = options.split(scores)
    if not len(split.anchors):
        return first[:0].sum(), None, split
    anchors, positives = first[split.anchors], first[split.positives]
    targets = positives.detach() if options.detach_positives else positives
    rest = [first[split.middle]] if options.middle == "negatives" else []
    low, high = len(anchors), len(positives)
    keys = torch.cat([anchors, targets, *rest])
    target = Columns(low, len(keys), slice(low, low + high))
    pull, step = softmax_loss(anchors, keys, scale, target, without_self=True, inside=True, unit=normalize)
    loss = options.anchor_weight * pull
    if options.positive_weight and high > 1:
        keys = torch.cat([targets, anchors, *rest])
        target = Columns(high, len(keys), slice(0, high))
        among, _ = softmax_loss(
            positives, keys, scale, target, without_self=True, inside=True, unit=normalize
        )
        loss = loss + options.positive_weight * among
    return loss, step, split


class AdaptiveScoreContrastiveLoss(ScoreOptions, ContrastiveLoss):
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

    traits: ClassVar[LossTraits] = LossTraits("softmax", "scores", rows=("z", "scores"))

    def __post_init__(self) -> None:
        self._split: tuple[ScoreSplit, Tensor] | None = None
        self.temperature = check_temperature(self.temperature)
        check_score_options(self)

    def forward(self, z: Float[Tensor, "n d"], scores: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        self._split = None
        loss, self._step, split = score_contrastive_step(z, scores, self)
        self._split = (split, scores.detach())
        return loss

    @property
    def record(self) -> Record | None:
        if self._step is None and self._split is not None:
            n = float(len(self._split[1]))
            empty = Record(0.0, 0.0, 0.0, n, 0.0, 0.0, 0.0, 0.0, 1 / self.temperature, traits=self.traits)
            return replace(empty, extra=self._extra())
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


class BidirectionalScoreContrastiveLoss(BidirectionalScoreOptions, AdaptiveScoreContrastiveLoss):
    """``AdaptiveScoreContrastiveLoss`` and, in part, the positives pulled to each other.

    The first counts ``anchor_weight``, the second ``positive_weight``: it holds together what the anchors are pulled
    to. The record is that of the anchors.

    >>> import torch
    >>> loss = BidirectionalScoreContrastiveLoss()
    >>> z, scores = torch.eye(7), torch.linspace(0, 1, 7)
    >>> bool(loss(z, scores) > AdaptiveScoreContrastiveLoss()(z, scores))
    True
    """


# After the definitions: what checks shapes in the tests wraps a class last, and knows the present names alone.
for kind in (AdaptiveScoreContrastiveLoss, BidirectionalScoreContrastiveLoss):
    renamed(**OLD_NAMES)(kind)
