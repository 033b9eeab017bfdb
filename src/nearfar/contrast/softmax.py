"""Softmax losses over a target: the kernel's sums, further negatives, the mean over rows, the numbers of the
record."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.kernel import LogSums
from nearfar.contrast.masks import Mask, checked_mask, turned
from nearfar.contrast.patches import HIDDEN, is_shown
from nearfar.contrast.precision import full_precision
from nearfar.contrast.query_losses import Sums, as_recorded, each_alone, partners
from nearfar.contrast.step import Step
from nearfar.contrast.sums import Statistics
from nearfar.contrast.targets import Nobody, Target
from nearfar.contrast.tiles import Setting, bounded, tile_size
from nearfar.errors import NearfarError

__all__ = ["Extra", "NoPositivesWarning", "log_sums", "softmax_loss"]


class NoPositivesWarning(UserWarning):
    """No row of a batch has a positive, so that its loss is 0 and teaches nothing."""


def log_sums(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"] | None,
    scale: Tensor,
    target: Target,
    *,
    both: bool = False,
    mask: Mask | None = None,
    without_self: bool = False,
    offset: int = 0,
    inside: bool = False,
    expected: bool = False,
    unit: bool = False,
    normalize: bool = False,
    tile: tuple[int, int] | None = None,
) -> list[Sums]:
    """The kernel's sums for the queries ``a`` against the keys ``b`` and, with ``both``, for the keys as queries.

    ``b=None``: the queries are the keys, each without itself where ``without_self``. Query 0 is row ``offset`` of the
    target and the mask. ``normalize`` brings rows to unit length, with less memory than ``unit_rows`` before it;
    ``unit`` promises that they are. ``tile`` sets the tile by hand; by default it is chosen by size.

    Each list element is one direction. Differentiable once, in ``a``, ``b`` and ``scale``; memory is O(n + m) beside
    the gradients.
    """
    n, m = len(a), len(a if b is None else b)
    if both and target.shape[0] != target.shape[1] and target.single:
        raise NearfarError(
            f"{target.shape[0]} queries and {target.shape[1]} keys: in both directions each needs its partner; "
            "both=False is for one"
        )
    twin = b is None and target.symmetric and (mask is None or mask.symmetric) and offset == 0
    size = tile_size(n, m, a.device, twin, tile)
    setting = Setting(
        target=target,
        mask=mask,
        offset=offset,
        without_self=without_self,
        normalize=normalize,
        both=both,
        twin=twin,
        inside=inside,
        expected=expected,
        bounded=_bounded(a, b, scale, unit or normalize),
        size=size,
        keep=size == (n, m),
    )
    found: list[Statistics] = []
    flat = LogSums.apply(a, a if b is None else b, scale, setting, found)
    return [Sums(*(*flat[4 * i : 4 * i + 4], statistics)) for i, statistics in enumerate(found)]


def _bounded(a: Tensor, b: Tensor | None, scale: Tensor, unit: bool) -> bool:
    if a.device.type != "cpu" and scale.device.type != "cpu":
        return False  # to look would mean to wait for the device; the running maximum is right everywhere
    with torch.no_grad():
        largest = abs(scale.item()) * 1.001
        if not unit:
            if a.device.type != "cpu":
                return False
            longest = torch.linalg.vector_norm(a, dim=1).amax().item()
            largest *= longest * (longest if b is None else torch.linalg.vector_norm(b, dim=1).amax().item())
    return bounded(largest, len(a), len(a if b is None else b), a.dtype)


@dataclass(frozen=True)
class Extra:
    """Further negatives of one direction's queries: rows (q, d) for all, or (n, k, d) for each query its own."""

    keys: Float[Tensor, "q d"] | Float[Tensor, "n k d"]
    mask: Mask | None = None


def softmax_loss(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"] | None,
    scale: Tensor,
    target: Target,
    *,
    both: bool = False,
    mask: Mask | Tensor | None = None,
    extras: Sequence[Extra | None] = (),
    without_self: bool = False,
    inside: bool = False,
    unit: bool = False,
    normalize: bool = False,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
    in_batch: bool = True,
    denominator: str = "all",
    reduction: str = "mean",
) -> tuple[Float[Tensor, ""] | Float[Tensor, " n"], Step]:
    """The mean loss of the queries that have a positive, averaged over both directions where there are two.

    ``extras`` are further negatives of the first and the second direction; ``in_batch=False`` makes them the only ones
    beside the own partner (of ``OwnPair``). ``rows`` names the only queries of this call: the value is then the sum
    over them divided by the number of valid rows of the whole batch, so that the parts of a batch add up to it.

    ``denominator``: a positive is told apart from "all" candidates, from the negatives and itself, each on its "own"
    (sum outside), or from the "negatives" alone. ``reduction`` "sum" adds up, "none" gives the loss of each query;
    both still average over directions. The other arguments are those of ``log_sums``. The ``Step`` holds what a
    record is made of.
    """
    n, keys = len(a), a if b is None else b
    if target.shape != (n, len(keys)):
        raise NearfarError(f"the target is for {target.shape} pairs, but there are {(n, len(keys))}")
    mask = None if mask is None else checked_mask(mask, *target.shape)
    if rows is not None and not isinstance(rows, slice):
        raise NearfarError(f"rows is a {type(rows).__name__}; a slice is needed, such as slice(0, 16)")
    if normalize and (denominator == "own" or not in_batch or any(extra is not None for extra in extras)):
        raise NearfarError("scores beside the kernel go with rows that are at unit length already: unit=True")
    options: dict[str, Any] = {
        "without_self": without_self, "inside": inside, "unit": unit, "normalize": normalize, "tile": tile,
    }  # fmt: skip
    part = slice(0, n) if rows is None else slice(*rows.indices(n))
    if rows is not None and (part.step != 1 or part.start >= part.stop):
        raise NearfarError(f"rows is {rows}; at least one row, without steps, is needed")
    asked = _asked(a, b, scale, target, both, mask, None if rows is None else part, in_batch, options)
    losses, sums = [], []
    for k, direction in enumerate(asked):
        found, extra = direction.sums, extras[k] if k < len(extras) else None
        if extra is not None:
            found = _with_extra(found, direction.queries, extra, scale, unit, part.start)
        if denominator == "own":
            positives = (target.turned() if k else target).listed(part, without_self)
            losses.append(each_alone(found, direction.queries, direction.keys, scale, positives))
        else:
            losses.append(found.losses(denominator))
        sums.append(as_recorded(found, denominator, inside, scale, unit or normalize))
    means = [each.sum() / direction.valid for each, direction in zip(losses, asked, strict=True)]
    mean = means[0] if len(means) == 1 else (means[0] + means[1]) * 0.5
    # What goes to the record as p(positive) is a probability, also where the loss is none.
    recorded = losses if denominator != "negatives" else [each.losses() for each in sums]
    step = Step.of(mean, recorded, sums, scale, inside)
    if reduction == "mean":
        return mean, step
    each_row = losses[0] if len(losses) == 1 else (losses[0] + losses[1]) * 0.5
    return each_row.sum() if reduction == "sum" else each_row, step


class _Asked(NamedTuple):
    """One direction: the sums of its queries, their keys, and how many rows of the whole batch count."""

    sums: Sums
    queries: Tensor
    keys: Tensor
    valid: Tensor | float


def _asked(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    target: Target,
    both: bool,
    mask: Mask | None,
    rows: slice | None,
    in_batch: bool,
    options: dict[str, Any],
) -> list[_Asked]:
    keys = a if b is None else b
    sides = [(a, keys), (keys, a)][: 1 + both]
    asked = []
    if not in_batch:
        part = slice(0, len(a)) if rows is None else rows
        alone = partners(a[part], keys[part], scale)
        for query, key in sides:
            asked.append(_Asked(alone, query[part], key, float(len(a))))
    elif rows is None:
        found = log_sums(a, b, scale, target, both=both, mask=mask, **options)
        for sums, (query, key) in zip(found, sides, strict=True):
            asked.append(_Asked(sums, query, key, _valid(sums.statistics)))
    else:
        for k, (query, key) in enumerate(sides):
            towards = target.turned() if k else target
            left_out = turned(mask) if k and mask is not None else mask
            (sums,) = log_sums(query[rows], key, scale, towards, mask=left_out, offset=rows.start, **options)
            valid = _count(towards.has_positives(options["without_self"]), 5)
            asked.append(_Asked(sums, query[rows], key, valid))
    return asked


def _valid(statistics: Statistics) -> Tensor | float:
    positives = statistics.positives
    if isinstance(positives, float):
        return float(len(statistics.hardest))
    return _count(positives > 0, 6)


def _count(valid: Tensor, level: int) -> Tensor:
    """How many rows have a positive; a warning where none has."""
    count = valid.sum()
    if count.device.type == "cpu" and not count:
        warnings.warn(
            "no row of this batch has a positive: the loss is 0 and nothing is learned from it. Put items that belong "
            "together into one batch (a class-balanced sampler, larger batches, two views of each item)",
            NoPositivesWarning,
            stacklevel=level,
        )
    return count.clamp(min=1)


def _with_extra(sums: Sums, queries: Tensor, extra: Extra, scale: Tensor, unit: bool, offset: int) -> Sums:
    keys, n, old = extra.keys, len(queries), sums.statistics
    if keys.shape[-2] == 0:
        return sums
    if keys.ndim == 3:
        part = slice(offset, offset + n)
        with full_precision(keys.device):
            logits = torch.einsum("nd,nkd->nk", queries, keys[part]) * scale
        if extra.mask is not None:
            logits = logits.masked_fill(extra.mask.tile(part, slice(0, keys.shape[1])), -torch.inf)
        rest, hardest = torch.logsumexp(logits, 1), logits.detach().amax(1)
        candidates: Tensor | float = (logits.detach() > -torch.inf).sum(1).to(logits.dtype)
    else:
        nobody = Nobody(offset + n, len(keys))
        (found,) = log_sums(queries, keys, scale, nobody, mask=extra.mask, offset=offset, unit=unit)
        rest, hardest, candidates = found.rest, found.statistics.hardest, found.statistics.candidates
    statistics = replace(
        old, hardest=torch.maximum(old.hardest, hardest), candidates=old.candidates + candidates
    )
    # Not of -inf and -inf, a row all of whose negatives are left out: that has a gradient of NaN.
    joined = torch.logsumexp(torch.stack([sums.rest, rest]).clamp(min=HIDDEN), 0)
    joined = torch.where(is_shown(joined), joined, -torch.inf)
    return sums._replace(rest=joined, statistics=statistics)
