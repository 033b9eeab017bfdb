"""InfoNCE, exact and finite: every row knows its partner and is told apart from the other rows."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfar.errors import NearfarError

__all__ = ["info_nce", "info_nce_with_record", "unit_rows"]


def info_nce(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    *,
    temperature: float = 0.07,
    scale: float | Float[Tensor, ""] | None = None,
    symmetric: bool = True,
    normalize: bool = True,
    mask: Bool[Tensor, "n m"] | None = None,
) -> Float[Tensor, ""]:
    """The mean cross-entropy of picking ``b[i]`` for ``a[i]`` among all rows of ``b`` (van den Oord 2018).

    ``symmetric=True`` averages both directions, as CLIP does; with ``symmetric=False``, ``b`` may have more
    rows than ``a``, and those beyond are further negatives. Scores are cosines (dot products with
    ``normalize=False``) divided by ``temperature``, or times ``scale``, which may be a tensor that learns.
    ``mask`` is true where a pair is *left out*, such as a duplicate that is no real negative; a row's own
    partner always stays in.

    Half precision inputs are scored in float32, and the result is float32 then; the gradient is that of the
    exact, max-shifted log-softmax. One row alone has loss 0. Range: 0 to infinity, guessing is ln(number of
    candidates).

    >>> round(info_nce(torch.eye(4), torch.eye(4), temperature=1.0).item(), 4)
    0.7437
    >>> info_nce(torch.ones(4, 2), torch.ones(4, 2)).exp().round().item()
    4.0
    """
    return info_nce_with_record(a, b, temperature, scale, symmetric, normalize, mask)[0]


def info_nce_with_record(
    a: Tensor,
    b: Tensor,
    temperature: float,
    scale: float | Tensor | None,
    symmetric: bool,
    normalize: bool,
    mask: Tensor | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " fields"]]:
    """The loss and, detached, the numbers of a ``nearfar.losses.Record`` in the order of its fields."""
    _check(a, b, temperature, symmetric, mask)
    n, m = len(a), len(b)
    # Autocast would take the product in half precision, where scores of 1/0.001 have steps of a half.
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.to(dtype), b.to(dtype)
        if normalize:
            a, b = unit_rows(a), unit_rows(b)
        factor = torch.as_tensor(1.0 / temperature if scale is None else scale, dtype=dtype, device=a.device)
        logits = (factor * a) @ b.T
        if mask is not None:
            own = torch.eye(n, m, dtype=torch.bool, device=a.device)
            logits = logits.masked_fill(mask.to(a.device) & ~own, -torch.inf)
        positive = logits.diagonal()
        log_sums = [torch.logsumexp(logits, 1)] + ([torch.logsumexp(logits, 0)] if symmetric else [])
        loss = torch.stack([(log_sum - positive).mean() for log_sum in log_sums]).mean()
        with torch.no_grad():
            record = _record(
                logits.detach(), positive.detach(), [s.detach() for s in log_sums], factor.detach()
            )
    return loss, record


def unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows brought to unit length, without overflow or underflow on the way; rows of zeros stay zero.

    Their gradient is finite too: that of the identity.

    >>> unit_rows(torch.tensor([[3e30, 4e30], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    # Unit rows do not change with the length of x, so that the largest entry may count as a constant.
    largest = x.detach().abs().amax(dim=1, keepdim=True)
    empty = largest == 0
    x = x / largest.masked_fill(empty, 1.0)
    return x * x.square().sum(1, keepdim=True).masked_fill(empty, 1.0).rsqrt()


def _record(logits: Tensor, positive: Tensor, log_sums: list[Tensor], factor: Tensor) -> Tensor:
    negatives = logits.clone()
    negatives.diagonal().fill_(-torch.inf)
    left_in = logits != -torch.inf
    candidates, hardest = [], []
    for axis in (1, 0)[: len(log_sums)]:
        candidates.append(left_in.sum(axis).to(logits.dtype))
        hardest.append((negatives.amax(axis) - torch.logsumexp(negatives, axis)).exp())
    counts = torch.cat(candidates)
    shares = torch.cat(hardest).nanmean().nan_to_num(0.0)  # NaN: a row without negatives has no hardest one
    zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
    return torch.stack(
        [
            counts.mean(),
            zero + 1.0,
            zero,
            torch.stack([(positive - log_sum).exp().mean() for log_sum in log_sums]).mean(),
            shares,
            counts.log().mean(),
            zero,
            factor,
        ]
    )


def _check(a: Tensor, b: Tensor, temperature: float, symmetric: bool, mask: Tensor | None) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or len(a) == 0:
        raise NearfarError(
            f"a is {tuple(a.shape)} and b is {tuple(b.shape)}; InfoNCE takes two matrices (rows, "
            "dimensions) with the same dimensions and at least one row"
        )
    if len(a) != len(b) and (symmetric or len(b) < len(a)):
        raise NearfarError(
            f"a has {len(a)} rows and b {len(b)}; row i of b is the partner of row i of a, and only with "
            "symmetric=False may b have further rows as negatives"
        )
    if not temperature > 0:
        raise NearfarError(f"temperature is {temperature}, but it must be above 0; 0.05 to 0.1 is usual")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (len(a), len(b))):
        raise NearfarError(
            f"mask is {tuple(mask.shape)} {mask.dtype}; it takes Boolean ({len(a)}, {len(b)}), true where "
            "a pair is left out"
        )
