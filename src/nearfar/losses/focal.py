"""Focal loss as a module; ``nearfar.functional.focal_loss`` is the function behind it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from nearfar.arguments import whole_number
from nearfar.functional.focal import Alpha, Focal, check_alpha, check_options, focal_of_margin, focal_step

__all__ = ["FocalLoss", "FocalRecord"]


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
    def of(cls, found: Focal) -> FocalRecord:
        """Read a call off its device."""
        labelled = found.labelled.cpu()
        margin, share = found.margin.cpu().double()[labelled], found.share.cpu().double()
        guess = focal_of_margin(margin.new_tensor(math.log(found.classes - 1)), found.gamma) * share.sum()
        aspects = share.flatten(0, -2).sum(0) if share.ndim > 1 else share.sum()
        return cls(
            labels=float(labelled.sum()),
            labels_left_out=float((~labelled).sum()),
            aspects_left_out=float((aspects == 0).sum()),
            p_true=torch.sigmoid(-margin).mean().item() if len(margin) else 0.0,
            hardest_share=_hardest_share(margin, share[labelled], found.gamma),
            uniform_level=guess.item(),
            floor=0.0,
            finite=bool(found.value.isfinite().all()),
        )

    def to_dict(self) -> dict[str, float]:
        """The fields as a mapping, as the log of a run takes them."""
        return asdict(self)


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
        self._found: Focal | None = None

    @property
    def record(self) -> FocalRecord | None:
        return None if self._found is None else FocalRecord.of(self._found)

    def forward(
        self, logits: Float[Tensor, "*rows c"], labels: Int[Tensor, "*rows"]
    ) -> Float[Tensor, ""] | Float[Tensor, "*rows"]:
        self._found = None  # a call that fails leaves no record
        value, self._found = focal_step(
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
