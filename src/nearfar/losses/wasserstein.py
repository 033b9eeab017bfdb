"""How far one group's scores lie below those of a second: the one-sided Wasserstein distance of their quantiles."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.arguments import choice, flag, whole_number
from nearfar.errors import NearfarError
from nearfar.losses.arguments import check_tensors
from nearfar.losses.base import LossTraits

__all__ = [
    "FORMS",
    "Quantiles",
    "WassersteinGapLoss",
    "WassersteinRecord",
    "check_form",
    "check_scores",
    "quantiles",
    "wasserstein_gap",
]


FORMS = ("exact", "interpolated")


def wasserstein_gap(
    lower_scores: Float[Tensor, " n"],
    upper_scores: Float[Tensor, " m"],
    *,
    form: str = "exact",
    detach_upper: bool = True,
) -> Float[Tensor, ""]:
    """∫ max(0, F_upper⁻¹(u) − F_lower⁻¹(u)) du over u from 0 to 1: what must be added to the lower scores.

    The one-sided part of the 1-Wasserstein distance (Villani 2003, section 2.2), which takes |·| instead: only
    quantiles at which the lower group lies below count, and with ``detach_upper`` only the lower group moves, so that
    the gap closes upwards.

    ``form="exact"`` integrates the two step functions of the samples, of any sizes, without an error: sorting is all
    the work. ``"interpolated"`` sorts, interpolates the shorter one linearly, end to end, to the length of the longer
    one, and takes the mean; kept for comparison, it is the same where n = m.

    Each lower score has as gradient minus the share of u at which it is the quantile and lies below. Where the two are
    equal the gradient is 0. Half precision is computed in float32. A group without scores has no quantiles: the gap is
    then 0, with gradient 0 (``WassersteinGapLoss().record`` counts such groups).

    Range 0 to infinity, in units of the scores; invariant to a common shift. Samples of equal distributions have a gap
    above 0, the larger the smaller they are. Raises ``NearfarError`` for scores that are not one axis of floating
    numbers and, on the CPU, that are not finite.

    >>> lower, upper = torch.tensor([0.1, 0.4, 0.7]), torch.tensor([0.6, 0.3])
    >>> round(wasserstein_gap(lower, upper).item(), 4)  # thirds against halves
    0.1
    >>> wasserstein_gap(upper + 1.0, lower).item()
    0.0
    """
    check_form(form)
    flag("detach_upper", detach_upper)
    check_tensors(lower_scores=lower_scores, upper_scores=upper_scores)
    check_scores(lower_scores, "lower_scores", lower_scores.device.type == "cpu")
    check_scores(upper_scores, "upper_scores", upper_scores.device.type == "cpu")
    return quantiles(lower_scores, upper_scores.detach() if detach_upper else upper_scores, form).gap()


class Quantiles(NamedTuple):
    """Both quantile functions on one grid: what ``width`` of (0, 1) has which two values."""

    width: Float[Tensor, " k"]
    lower: Float[Tensor, " k"]
    upper: Float[Tensor, " k"]

    def gap(self) -> Float[Tensor, ""]:
        """The integral of upper − lower where that is above 0."""
        return (self.width * torch.relu(self.upper - self.lower)).sum()


def quantiles(lower: Float[Tensor, " n"], upper: Float[Tensor, " m"], form: str = "exact") -> Quantiles:
    """The quantile functions of two samples; without any width where a sample is empty."""
    dtype = torch.promote_types(torch.promote_types(lower.dtype, upper.dtype), torch.float32)
    n, m = len(lower), len(upper)
    if n == 0 or m == 0:
        # Empty, but of the graph: the loss of such a batch can be summed and sent backward like any other.
        nothing = lower[:0].to(dtype), upper[:0].to(dtype)
        return Quantiles(nothing[0].detach(), *nothing)
    low, high = lower.to(dtype).sort().values, upper.to(dtype).sort().values
    if form == "interpolated":
        low, high = _stretch(low, max(n, m)), _stretch(high, max(n, m))
        return Quantiles(torch.full_like(low, 1.0 / len(low)).detach(), low, high)
    # In units of 1 / (n m) both grids are whole numbers, so that steps that meet do so exactly.
    device = lower.device
    ends = torch.cat([torch.arange(1, n + 1, device=device) * m, torch.arange(1, m + 1, device=device) * n])
    ends = ends.sort().values
    width = torch.diff(ends, prepend=ends.new_zeros(1)).to(dtype) / (n * m)
    last = ends - 1
    return Quantiles(width, low[last // m], high[last // n])


def _stretch(values: Float[Tensor, " n"], length: int) -> Float[Tensor, " length"]:
    """Sorted values interpolated linearly, end to end."""
    n = len(values)
    if n == length:
        return values
    if n == 1:
        return values.expand(length)
    place = torch.arange(length, device=values.device) * (n - 1)
    left = (place // (length - 1)).clamp(max=n - 2)
    along = (place - left * (length - 1)).to(values.dtype) / (length - 1)
    return torch.lerp(values[left], values[left + 1], along)


def check_form(form: str) -> None:
    """``NearfarError`` unless the form is known."""
    choice("form", form, FORMS)


def check_scores(scores: Tensor, name: str, values: bool) -> None:
    """``NearfarError`` unless these are scores; ``values`` asks for finite ones, which waits for the device."""
    check_tensors(**{name: scores})
    if scores.ndim != 1 or not scores.is_floating_point():
        raise NearfarError(
            f"{name} are {tuple(scores.shape)} {scores.dtype}; one axis of floating scores is needed (flatten them)"
        )
    finite = scores.detach().isfinite() if values else None
    if finite is not None and not bool(finite.all()):
        at = int((~finite).nonzero()[0])
        raise NearfarError(
            f"{name}[{at}] is {scores[at].item()}; scores are finite numbers. Find out where it was made: a mean over "
            "nothing, such as over no matched queries, is the usual cause"
        )


@dataclass(frozen=True)
class WassersteinRecord:
    """What a ``WassersteinGapLoss`` saw in its last call.

    ``gap``: the value. ``reverse_gap``: the same the other way round; gap − reverse_gap is the difference of the
    means, and their sum the 1-Wasserstein distance. ``lower_scores``, ``upper_scores``: scores of the batch;
    ``lower_queued``, ``upper_queued``: earlier ones that joined them. ``groups_missing``: groups (0, 1 or 2) without
    a score in the batch. ``floor``: the least the loss can be, 0.
    """

    gap: float
    reverse_gap: float
    lower_scores: float
    upper_scores: float
    lower_queued: float
    upper_queued: float
    groups_missing: float
    floor: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields as a mapping, as the log of a run takes them, and ``loss_kind``."""
        return asdict(self) | WassersteinGapLoss.traits.to_dict()


class WassersteinGapLoss(nn.Module):
    """Raise the lower group's scores to the upper group's, quantile by quantile, and never the other way round.

    ``form``: "exact" integral of the two step functions, or "interpolated", see
    ``nearfar.functional.wasserstein_gap``. ``detach_upper=True`` moves the lower group alone. Called with two vectors
    of scores it returns a 0-d tensor; ``record`` holds the ``WassersteinRecord`` of that call (None before the
    first).

    A few scores of one distribution never have the same quantiles as a few others, so that the gap of equal groups is
    far above 0. With ``queue_size`` (256 is usual) up to that many earlier scores of each group, detached, join the
    batch's. In training mode each call reads the queue and then appends to it; in ``eval()`` it is neither read nor
    written, and the value depends on the arguments alone. Content, pointer and fill level are in ``state_dict``.

    The gradient is that of the value: with n scores and k queued ones, each score stands for 1 / (n + k) of the
    distribution, so that gradients are n / (n + k) of what they are without a queue. ``rescale_gradient=True``
    multiplies them by (n + k) / n: no longer the derivative of the value, but an estimate of the gap's derivative in
    which all scores, the queued ones too, move with the model; its size does not change while the queue fills.

    A batch without one of the groups gives 0 with gradient 0, unless the queue stands in for the missing one;
    ``record.groups_missing`` says so either way.

    Raises ``NearfarError`` for scores that are not one axis of floating numbers, and for such that are not finite (on
    the CPU, and with a queue everywhere, for one NaN would stay in it).

    >>> loss = WassersteinGapLoss(queue_size=256)
    >>> women, men = torch.tensor([0.5, 0.7, 0.6], requires_grad=True), torch.tensor([0.9, 0.6, 0.8, 0.7])
    >>> value = loss(women, men)
    >>> round(value.item(), 4), round(loss.record.reverse_gap, 4)
    (0.15, 0.0)
    >>> value = loss(women, men)  # the same scores, now with the first three and four beside them
    >>> round(value.item(), 4), loss.record.lower_queued, loss.record.upper_queued
    (0.15, 3.0, 4.0)
    """

    traits: ClassVar[LossTraits] = LossTraits("other", rows=("lower_scores", "upper_scores"), aligned=False)

    lower_queue: Tensor
    upper_queue: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(
        self,
        form: str = "exact",
        queue_size: int = 0,
        detach_upper: bool = True,
        rescale_gradient: bool = False,
    ) -> None:
        super().__init__()
        check_form(form)
        try:
            queue_size = whole_number("queue_size", queue_size, 0)
        except NearfarError as error:
            raise NearfarError(f"{error}: a number of scores, 0 for no queue") from None
        self.form, self.queue_size = form, queue_size
        self.detach_upper = flag("detach_upper", detach_upper)
        self.rescale_gradient = flag("rescale_gradient", rescale_gradient)
        if queue_size:
            self.register_buffer("lower_queue", torch.zeros(queue_size))
            self.register_buffer("upper_queue", torch.zeros(queue_size))
            self.register_buffer("pointer", torch.zeros(2, dtype=torch.long))
            self.register_buffer("filled", torch.zeros(2, dtype=torch.long))
        self._seen: tuple[Tensor, tuple[int, int, int, int]] | None = None

    @property
    def record(self) -> WassersteinRecord | None:
        """The record of the last call. Reading it waits for the device."""
        if self._seen is None:
            return None
        gaps, sizes = self._seen
        gap, reverse = gaps.tolist()
        lower, upper, lower_queued, upper_queued = map(float, sizes)
        missing = float((lower == 0) + (upper == 0))
        return WassersteinRecord(gap, reverse, lower, upper, lower_queued, upper_queued, missing)

    def forward(
        self, lower_scores: Float[Tensor, " n"], upper_scores: Float[Tensor, " m"]
    ) -> Float[Tensor, ""]:
        self._seen = None  # a call that fails leaves no record
        queued = bool(self.queue_size) and self.training
        batch = {"lower_scores": lower_scores, "upper_scores": upper_scores}
        check_tensors(**batch)
        for name, scores in batch.items():
            check_scores(scores, name, queued or scores.device.type == "cpu")
        current = (lower_scores, upper_scores.detach() if self.detach_upper else upper_scores)
        # Reads the device: but so did whoever picked the rows of each group.
        earlier = self.filled.tolist() if queued else [0, 0]
        lower, upper = (self._joined(group, earlier[group], current[group]) for group in (0, 1))
        both = quantiles(lower, upper, self.form)
        value = both.gap()
        with torch.no_grad():
            reverse = (both.width * torch.relu(both.lower - both.upper)).sum()
            self._seen = (
                torch.stack([value.detach(), reverse]),
                (len(lower_scores), len(upper_scores), *earlier),
            )
            if queued:
                self._push(0, lower_scores)
                self._push(1, upper_scores)
        return value

    def _joined(self, group: int, earlier: int, scores: Tensor) -> Tensor:
        """The batch's scores and the queued ones, which carry no gradient."""
        if not earlier:
            return scores
        if self.rescale_gradient and len(scores):
            still = scores.detach()
            scores = still + (scores - still) * ((len(scores) + earlier) / len(scores))
        return torch.cat([scores, self._queue(group)[:earlier]])

    def _push(self, group: int, scores: Tensor) -> None:
        """Append to the ring; of more than it holds, the last."""
        latest, queue = scores.detach()[-self.queue_size :], self._queue(group)
        places = (self.pointer[group] + torch.arange(len(latest), device=queue.device)) % self.queue_size
        queue[places] = latest.to(queue)
        self.pointer[group] = (self.pointer[group] + len(latest)) % self.queue_size
        self.filled[group] = (self.filled[group] + len(latest)).clamp(max=self.queue_size)

    def _queue(self, group: int) -> Tensor:
        return self.upper_queue if group else self.lower_queue

    def extra_repr(self) -> str:
        return (
            f"form={self.form!r}, queue_size={self.queue_size}, detach_upper={self.detach_upper}, "
            f"rescale_gradient={self.rescale_gradient}"
        )
