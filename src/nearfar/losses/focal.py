"""Focal loss, written in the margin of the true class, where it is smooth and finite for every focus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from nearfar.arguments import any_number, choice, flag, shown, whole_number
from nearfar.errors import NearfarError
from nearfar.labels import MISSING, whole_labels
from nearfar.losses.arguments import check_tensors
from nearfar.losses.base import LossTraits

__all__ = [
    "Focal",
    "FocalLoss",
    "FocalRecord",
    "check_alpha",
    "check_options",
    "focal_alpha",
    "focal_loss",
    "focal_step",
]


REDUCTIONS = ("weighted_mean", "mean", "sum", "none")

#: class weights: one for each class, or one for each aspect and class
Alpha = Tensor | Sequence[float] | Sequence[Sequence[float]]


def focal_loss(
    logits: Float[Tensor, "*rows c"],
    labels: Int[Tensor, "*rows"],
    *,
    gamma: float = 2.0,
    alpha: Alpha | None = None,
    reduction: str = "weighted_mean",
    ignore_index: int = -100,
) -> Float[Tensor, ""] | Float[Tensor, "*rows"]:
    """The focal loss of Lin et al. (2017): α_y (1 − p)^γ (−log p), with p the probability of the true class y.

    ``logits`` (..., C), ``labels`` (...) with classes 0 to C − 1. With three axes or more, the last but one is the
    aspect: one question of its own, such as the sentiment towards the camera. ``alpha`` has a weight for each class,
    (C,), or for each aspect and class, (A, C); none counts as 1.

    ``reduction`` "weighted_mean": Σ α_y (1 − p)^γ (−log p) / Σ α_y for each aspect, then the mean over aspects, so
    that γ = 0 is ``torch.nn.functional.cross_entropy(..., weight=alpha)`` and the level of α cancels. "mean" divides
    by the number of labels instead; "sum"; "none" gives each label's own, 0 where there is no label.

    A label equal to ``ignore_index``, −1 or NaN is none: it counts in no sum, and its logits may be anything. An aspect
    without labels (or with α = 0 for all of them) is left out of the mean over aspects; without any label the value is
    0, with gradient 0.

    Half precision is computed in float32, and the result is float32 then. Value and gradient are finite for every
    γ ≥ 0 and p from 0 to 1. Range 0 to infinity, floor 0; guessing gives (1 − 1/C)^γ ln C for α = 1.

    Raises ``NearfarError`` for shapes that do not fit and, on the CPU, for labels that are no class and logits that
    are not finite; elsewhere that check would wait for the device.

    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> labels = torch.tensor([0, 2])
    >>> round(focal_loss(logits, labels).item(), 4)
    0.4872
    >>> plain = focal_loss(logits, labels, gamma=0.0, alpha=[1.0, 1.0, 3.0])
    >>> weight = torch.tensor([1.0, 1.0, 3.0])
    >>> torch.allclose(plain, torch.nn.functional.cross_entropy(logits, labels, weight=weight))
    True
    """
    return focal_step(logits, labels, gamma, alpha, reduction, ignore_index)[0]


class Focal(NamedTuple):
    """What a ``nearfar.losses.focal.FocalRecord`` is made of, detached; the value is Σ share · (1 − p)^γ (−log p).

    ``margin``: log((1 − p) / p). ``share``: what the label's own loss is multiplied with in the value.
    """

    margin: Float[Tensor, "*rows"]
    share: Float[Tensor, "*rows"]
    labelled: Bool[Tensor, "*rows"]
    value: Float[Tensor, ""] | Float[Tensor, "*rows"]
    gamma: float
    classes: int


def focal_step(
    logits: Tensor,
    labels: Tensor,
    gamma: float = 2.0,
    alpha: Alpha | None = None,
    reduction: str = "weighted_mean",
    ignore_index: int = -100,
) -> tuple[Tensor, Focal]:
    """``focal_loss``, and what its record is made of."""
    check_options(gamma, reduction)
    check_tensors(logits=logits)
    ignore_index = whole_number("ignore_index", ignore_index)
    check_tensors(labels=labels)
    if labels.dtype == torch.bool:
        raise NearfarError("labels are torch.bool; integer classes are needed (labels.long())")
    labels = _checked(logits, whole_labels(labels), ignore_index)
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labelled = _labelled(labels, ignore_index)
        known = labels.masked_fill(~labelled, 0).unsqueeze(-1)
        scores = scores.masked_fill(~labelled.unsqueeze(-1), 0.0)
        others = torch.logsumexp(scores.scatter(-1, known, -torch.inf), -1)
        margin = others - scores.gather(-1, known).squeeze(-1)
        losses = focal_of_margin(margin, gamma)
        weight = labelled.to(scores.dtype)
        if alpha is not None:
            by_class = check_alpha(alpha, tuple(logits.shape)).to(scores)
            weight = weight * by_class.expand(scores.shape).gather(-1, known).squeeze(-1)
        share = _share(weight, labelled, reduction)
        value = weight * losses if reduction == "none" else (share * losses).sum()
    return value, Focal(margin.detach(), share, labelled, value.detach(), gamma, logits.shape[-1])


def focal_of_margin(margin: Float[Tensor, "*rows"], gamma: float) -> Float[Tensor, "*rows"]:
    """(1 − p)^γ (−log p) for margin = log((1 − p) / p).

    In p the derivative of (1 − p)^γ is infinite at p = 1 for γ < 1, and 1 − p loses its digits on the way there; in
    the margin all of it is σ(margin)^γ softplus(margin), without an edge.

    >>> [round(value, 4) for value in focal_of_margin(torch.tensor([-1000.0, 0.0, 1000.0]), 0.5).tolist()]
    [0.0, 0.4901, 1000.0]
    """
    losses = torch.logaddexp(margin, margin.new_zeros(()))
    return losses if gamma == 0 else losses * torch.exp(gamma * logsigmoid(margin))


def focal_alpha(
    counts: Tensor | Sequence[float] | Sequence[Sequence[float]], normalized: bool = False
) -> Float[Tensor, "*aspects c"]:
    """Class weights from class counts (C,) or, for each aspect, (A, C): N / n_class, rare classes weigh more.

    N is the number of labels (of the aspect). ``normalized=True`` gives N / (C · n_class), which is 1 throughout where
    all classes are as frequent; "weighted_mean" is the same with both, "mean" and "sum" are not.

    Raises ``NearfarError`` for a class that never occurs, for it would weigh infinitely.

    >>> focal_alpha([80, 20])
    tensor([1.2500, 5.0000])
    >>> focal_alpha([[80, 20], [50, 50]], normalized=True)
    tensor([[0.6250, 2.5000],
            [1.0000, 1.0000]])
    """
    flag("normalized", normalized)
    table = _weights("counts", counts)
    if table.ndim not in (1, 2) or table.shape[-1] < 2:
        raise NearfarError(
            f"counts have shape {tuple(table.shape)}; one count for each class, (classes,) with at least two, or "
            "(aspects, classes) is needed"
        )
    numbers = table.tolist() if table.ndim == 2 else [table.tolist()]
    weights = []
    for aspect, row in enumerate(numbers):
        where = f" of aspect {aspect}" if table.ndim == 2 else ""
        for name, count in enumerate(row):
            if not (count >= 0 and math.isfinite(count)):
                raise NearfarError(f"class {name}{where} has count {count}; counts are numbers above 0")
            if count == 0:
                raise NearfarError(
                    f"class {name}{where} has count 0, so that its weight would be infinite; count on the training "
                    "set, leave the class out, or give it a weight by hand"
                )
        total = sum(row) / (len(row) if normalized else 1)
        weights.append([total / count for count in row])
    return torch.tensor(weights if table.ndim == 2 else weights[0], device=table.device)


def _share(weight: Tensor, labelled: Tensor, reduction: str) -> Tensor:
    """What each label's own loss is multiplied with in the value."""
    if reduction == "sum":
        return weight
    if reduction in ("mean", "none"):
        return weight / labelled.sum().clamp(min=1)
    axes = tuple(range(weight.ndim - 1)) if weight.ndim > 1 else tuple(range(weight.ndim))
    total = weight.sum(axes) if axes else weight
    nonempty = total > 0
    return weight / torch.where(nonempty, total, 1.0) / nonempty.sum().clamp(min=1)


def check_options(gamma: float, reduction: str) -> None:
    """``NearfarError`` unless γ is 0 or more and the reduction is known."""
    gamma = any_number("gamma", gamma)
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise NearfarError(f"gamma is {gamma}, but it must be 0 (cross-entropy) or more; 2 is usual")
    choice("reduction", reduction, REDUCTIONS)


def check_alpha(alpha: Alpha, shape: tuple[int, ...] | None = None) -> Tensor:
    """Class weights as a tensor; with ``shape``, checked against logits of that shape; on the CPU, their values."""
    weights = _weights("alpha", alpha)
    if not weights.is_floating_point():
        weights = weights.to(torch.get_default_dtype())
    if weights.ndim not in (1, 2) or weights.numel() == 0:
        raise NearfarError(
            f"alpha has shape {tuple(weights.shape)}; it has a weight for each class, (C,), or for each aspect and "
            "class, (A, C). The 0.25 of a two-class paper is [0.75, 0.25]"
        )
    wanted = None if shape is None else (shape[-1:] if weights.ndim == 1 else shape[-2:])
    if wanted is not None and (weights.shape != wanted or (weights.ndim == 2 and len(shape or ()) < 3)):
        raise NearfarError(
            f"alpha is {tuple(weights.shape)} and logits are {shape}; (C,) or, for logits (..., A, C), (A, C) is needed"
        )
    if weights.device.type == "cpu" and not bool(((weights >= 0) & weights.isfinite()).all()):
        raise NearfarError(
            f"alpha is {weights.tolist()}; weights are finite and 0 or more. See focal_alpha(counts)"
        )
    return weights


def _weights(name: str, values: object) -> Tensor:
    """Numbers by class as a tensor."""
    try:
        table = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise NearfarError(
            f"{name} is {shown(values)}; a number for each class, or for each aspect and class, is needed ({error})"
        ) from None
    if table.is_complex() or table.dtype == torch.bool:
        raise NearfarError(f"{name} holds {table.dtype}; numbers are needed")
    return table


def _labelled(labels: Tensor, ignore_index: int) -> Tensor:
    """Which labels count; nothing waits for a device."""
    labelled = labels != ignore_index
    return labelled if ignore_index == MISSING else labelled & (labels != MISSING)


def _checked(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """The labels, int64 (in uint8 no negative ``ignore_index`` is one); ``NearfarError`` for what does not fit."""
    if logits.ndim == 0 or logits.shape[-1] < 2 or labels.shape != logits.shape[:-1]:
        raise NearfarError(
            f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}; logits (..., C) with at least two "
            "classes and labels of the same shape without the last axis are needed"
        )
    if not logits.is_floating_point():
        raise NearfarError(f"logits are {logits.dtype}; floating logits and integer classes are needed")
    if logits.device.type != "cpu":
        return labels
    labelled = _labelled(labels, ignore_index)
    wrong = labelled & ((labels < 0) | (labels >= logits.shape[-1]))
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise NearfarError(
            f"label {labels[tuple(at)].item()} {_place(at)} is no class: they are 0 to {logits.shape[-1] - 1}, and "
            f"{ignore_index} (ignore_index), -1 or NaN where there is no label"
        )
    if not bool(logits.detach().isfinite().all()):
        wrong = labelled & ~logits.detach().isfinite().all(-1)
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            raise NearfarError(
                f"logits {_place(at)} are not finite: {logits.detach()[tuple(at)].tolist()}. Look at the step before: "
                "a learning rate too high or half precision is the usual cause"
            )
    return labels


def _place(at: list[int]) -> str:
    if len(at) < 2:
        return f"of row {at[0]}" if at else "(a single one)"
    return f"of row {at[0]}, position {at[1:] if len(at) > 2 else at[1]},"


@dataclass(frozen=True)
class FocalRecord:
    """What a focal loss saw in its last call.

    ``labels``: how many counted. ``labels_left_out``: equal to ``ignore_index``, or missing. ``aspects_left_out``:
    aspects without a label. ``p_true``: mean probability of the true class. ``hardest_share``: share of the gradient
    on the logits that comes from the tenth of the labels with the lowest probability (0.1: spread evenly; 1: all).
    ``uniform_level``: the loss of guessing, all classes alike. ``floor``: the least the loss can be, 0. ``finite``:
    false where the loss is infinite or not a number.

    With reduction "none", the level and the share are those of the mean.
    """

    labels: float
    labels_left_out: float
    aspects_left_out: float
    p_true: float
    hardest_share: float
    uniform_level: float
    floor: float
    finite: bool

    @classmethod
    @torch.no_grad()
    def of(cls, step: Focal) -> FocalRecord:
        """Read a call off its device."""
        labelled = step.labelled.cpu()
        margin, share = step.margin.cpu().double()[labelled], step.share.cpu().double()
        guess = focal_of_margin(margin.new_tensor(math.log(step.classes - 1)), step.gamma) * share.sum()
        aspects = share.flatten(0, -2).sum(0) if share.ndim > 1 else share.sum()
        return cls(
            labels=float(labelled.sum()),
            labels_left_out=float((~labelled).sum()),
            aspects_left_out=float((aspects == 0).sum()),
            p_true=torch.sigmoid(-margin).mean().item() if len(margin) else 0.0,
            hardest_share=_hardest_share(margin, share[labelled], step.gamma),
            uniform_level=guess.item(),
            floor=0.0,
            finite=bool(step.value.isfinite().all()),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a mapping, as the log of a run takes them, and ``loss_kind``."""
        return asdict(self) | FocalLoss.traits.to_dict()


class FocalLoss(nn.Module):
    """Classification that turns to what is still wrong: α_y (1 − p)^γ (−log p) (Lin et al. 2017).

    ``gamma``: focus, 0 is (weighted) cross-entropy. ``alpha``: a weight for each class (C,), or each aspect and class
    (A, C); see ``focal_alpha``. ``reduction``: "weighted_mean" divides by Σ α_y for each aspect and averages the
    aspects, "mean" divides by the number of labels, "sum", "none". ``ignore_index``: a label that is none, as −1 is.

    Called with logits (..., C) and labels (...) it returns a 0-d tensor ("none": one of the labels' shape). With logits
    (B, A, C), A counts aspects. ``record`` holds the ``FocalRecord`` of that call (None before the first); reading it
    waits for the device. ``alpha`` moves with the module, and is an option, not state: no checkpoint holds it.

    Floor 0; guessing gives ``record.uniform_level``. ``nearfar.functional.focal_loss`` has definition and errors.

    >>> loss = FocalLoss(gamma=2.0, alpha=[1.0, 4.0, 2.0])
    >>> logits = torch.zeros(5, 11, 3)  # five reviews, eleven aspects, three polarities
    >>> labels = torch.full((5, 11), -100)
    >>> labels[:, :4] = torch.tensor([0, 1, 2, 1])
    >>> value = loss(logits, labels)
    >>> round(value.item(), 4), round(loss.record.uniform_level, 4)
    (0.4883, 0.4883)
    >>> loss.record.labels, loss.record.aspects_left_out
    (20.0, 7.0)
    """

    traits: ClassVar[LossTraits] = LossTraits("other", rows=("logits", "labels"))

    alpha: Tensor | None

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: Alpha | None = None,
        reduction: str = "weighted_mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_options(gamma, reduction)
        self.gamma, self.reduction = float(gamma), reduction
        self.ignore_index = whole_number("ignore_index", ignore_index)
        weights = None if alpha is None else check_alpha(alpha).clone()
        self.register_buffer("alpha", weights, persistent=False)
        self._step: Focal | None = None

    @property
    def record(self) -> FocalRecord | None:
        return None if self._step is None else FocalRecord.of(self._step)

    def forward(
        self, logits: Float[Tensor, "*rows c"], labels: Int[Tensor, "*rows"]
    ) -> Float[Tensor, ""] | Float[Tensor, "*rows"]:
        self._step = None  # a call that fails leaves no record
        value, self._step = focal_step(
            logits, labels, self.gamma, self.alpha, self.reduction, self.ignore_index
        )
        return value

    def extra_repr(self) -> str:
        shape = None if self.alpha is None else tuple(self.alpha.shape)
        return f"gamma={self.gamma}, alpha={shape}, reduction={self.reduction!r}, ignore_index={self.ignore_index}"


def _hardest_share(margin: Tensor, share: Tensor, gamma: float) -> float:
    """By closed form: a label's gradient has the length (in L1) 2 · share · d/dmargin, with d/dmargin =
    σ^γ (γ p softplus + σ), σ = 1 − p. In logarithms, for near convergence it underflows.
    """
    log_rest = logsigmoid(margin)
    slope = gamma * torch.sigmoid(-margin) * -logsigmoid(-margin) + torch.sigmoid(margin)
    pull = gamma * log_rest + slope.log() + share.log()
    if not bool((pull > -torch.inf).any()):
        return 0.0
    hardest = margin.topk(math.ceil(len(margin) / 10)).indices
    return (pull[hardest].logsumexp(0) - pull.logsumexp(0)).exp().item()
