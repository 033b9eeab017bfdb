"""How far one group's scores lie below another's: the one-sided Wasserstein distance of their quantiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.arguments import choice, flag
from nearfar.errors import NearfarError
from nearfar.functional.arguments import check_tensors

__all__ = ["FORMS", "Quantiles", "check_form", "check_scores", "quantiles", "wasserstein_gap"]

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
