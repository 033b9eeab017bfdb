"""A softmax loss for any target: what a loss of one's own calls, and those here that need nothing else.

A target says which keys are the positives of each query and what they weigh (``nearfar.contrast.targets``); value,
gradients and record follow from it.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from nearfar.contrast import Mask, Step, Target, dense_softmax, softmax_loss, uncompiled
from nearfar.errors import NearfarError
from nearfar.losses.arguments import (
    any_number,
    check_flags,
    check_matrices,
    check_part,
    check_sum,
    check_temperature,
    ready,
)

__all__ = ["target_loss"]


@uncompiled
def target_loss(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"] | None,
    target: Target,
    *,
    temperature: float = 0.1,
    scale: float | Float[Tensor, ""] | None = None,
    sum: Literal["outside", "inside"] = "outside",
    both: bool = False,
    without_self: bool | None = None,
    normalize: bool = True,
    mask: Bool[Tensor, "n m"] | Mask | None = None,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, ""], Step]:
    """Mean over queries i of log Σ_c exp(s_ic) − Σ_p Q_ip s_ip, Q being the weights of ``target``, Σ_p Q_ip = 1.

    ``a`` (n, d) are the queries and ``b`` (m, d) the keys. ``b=None``: the queries are the keys, each without itself
    (``without_self=False`` keeps it). ``both`` averages with the keys as queries of ``target.transposed()``.
    ``sum="inside"`` is log Σ_c exp(s_ic) − log Σ_p W_ip exp(s_ip), with the weights W as they are. ``scale``
    replaces 1 / temperature and may be a tensor that learns. ``mask`` leaves out candidates that are no positives;
    ``rows`` makes only those rows queries, and such parts add up to the whole loss. Queries without a positive are
    left out of the mean.

    Returns the loss and the ``Step`` that its record is made of. Small batches are computed on one matrix of logits,
    others tile by tile, in O(n + m) memory beside the gradients. Range: the mean entropy of Q (sum outside) to
    infinity; guessing gives ln(candidates). Raises ``NearfarError`` for arguments that do not fit together.

    >>> import torch
    >>> from nearfar.contrast import Weights
    >>> after = Weights(torch.diag(torch.ones(3), 1))  # the next row is a row's positive; the last has none
    >>> value, step = target_loss(torch.eye(4), None, after, temperature=1.0)
    >>> round(value.exp().item(), 4)  # three candidates, all alike
    3.0
    """
    check_matrices(**{"a": a} if b is None else {"a": a, "b": b})
    if not hasattr(target, "patches"):
        raise NearfarError(
            f"target is a {type(target).__name__}; a nearfar.losses.Target is needed, which says who belongs to whom"
        )
    pairs = (len(a), len(a if b is None else b))
    if tuple(target.shape) != pairs:
        raise NearfarError(f"the target is for {target.shape} pairs, but there are {pairs}")
    if scale is None:
        scale = 1.0 / check_temperature(temperature)
    elif not isinstance(scale, Tensor):
        scale = any_number("scale", scale)
    inside = check_sum(sum)
    alone = b is None if without_self is None else without_self
    check_flags(both=both, without_self=alone, normalize=normalize)
    check_part(rows, tile)
    if mask is None and rows is None and tile is None:
        small = dense_softmax(
            a, b, scale, target, both=both, without_self=alone, inside=inside, normalize=normalize
        )
        if small is not None:
            return small[0], small[2]
    queries, keys, factor = ready(a, b, scale, None if normalize else False)
    return softmax_loss(
        queries,
        None if b is None else keys,
        factor,
        target,
        both=both,
        mask=mask,
        without_self=alone,
        inside=inside,
        normalize=normalize,
        rows=rows,
        tile=tile,
    )
