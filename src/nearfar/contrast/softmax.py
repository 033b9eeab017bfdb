"""Softmax losses over a target: from the kernel's sums to the loss of each query, the mean over rows, and the record.

The denominator of a positive holds "all" candidates (InfoNCE, SupCon), its "own" negatives and itself (NT-Xent with
several positives), or the "negatives" alone (decoupled contrastive learning).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.contrast.fused import fused_blocks, fused_results
from nearfar.contrast.kernel import LogSums
from nearfar.contrast.masks import Mask, checked_mask, is_directed, is_soft, mask_weights, transposed_mask
from nearfar.contrast.numerics import Context, full_precision, no_second_derivative
from nearfar.contrast.positives import MASKED_LOGIT, is_unmasked
from nearfar.contrast.running_sums import (
    Statistics,
    Step,
    count_negatives,
    debiased_losses,
    hard_weighted_rest,
)
from nearfar.contrast.targets import NoPositives, Target
from nearfar.contrast.tiles import Setting, bounded, tile_size
from nearfar.errors import NearfarError

__all__ = [
    "Extra",
    "NoPositivesWarning",
    "Sums",
    "as_recorded",
    "each_alone",
    "listed_logits",
    "log_sums",
    "partners",
    "softmax_loss",
]


#: numbers of a part: of the rows that are taken out for it, or of its tile
PART = 1 << 20
#: a product of all pairs costs as much as taking out so many of them
DENSE = 1 / 16


def listed_logits(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
    row: Int[Tensor, " p"],
    column: Int[Tensor, " p"],
) -> Float[Tensor, " p"]:
    """``queries[row[k]] · keys[column[k]]`` for each k; ``row`` ascends, and no pair is named twice.

    Memory is O(pairs), not O(pairs · dimensions).

    >>> listed_logits(torch.eye(2), torch.ones(2, 2), torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]))
    tensor([1., 1., 1.])
    """
    return _Listed.apply(queries, keys, row, column)


class _Listed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, queries: Tensor, keys: Tensor, row: Tensor, column: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys, row, column)
        logits = queries.new_empty(len(row))
        with full_precision(queries.device):
            for part, block in _parts(queries, keys, row):
                if block is None:
                    logits[part] = torch.linalg.vecdot(queries[row[part]], keys[column[part]])
                else:
                    logits[part] = (queries[block] @ keys.T)[row[part] - block.start, column[part]]
        return logits

    @staticmethod
    def backward(ctx: Context, by_logits: Tensor) -> tuple[Tensor | None, ...]:
        no_second_derivative()
        queries, keys, row, column = ctx.saved_tensors
        by_queries, by_keys = torch.zeros_like(queries), torch.zeros_like(keys)
        with full_precision(queries.device):
            for part, block in _parts(queries, keys, row):
                if block is None:
                    factor = by_logits[part].unsqueeze(1)
                    by_queries.index_add_(0, row[part], keys[column[part]].mul_(factor))
                    by_keys.index_add_(0, column[part], queries[row[part]].mul_(factor))
                    continue
                tile = queries.new_zeros(block.stop - block.start, len(keys))
                tile[row[part] - block.start, column[part]] = by_logits[part]
                torch.mm(tile, keys, out=by_queries[block])
                by_keys.addmm_(tile.T, queries[block])
        return by_queries, by_keys, None, None


def _parts(queries: Tensor, keys: Tensor, row: Tensor) -> Iterator[tuple[slice, slice | None]]:
    """Parts of the list and, where these are dense, the queries that each is about."""
    n, m = len(queries), len(keys)
    if len(row) < DENSE * n * m:
        size = max(1, PART // max(1, queries.shape[1]))
        for start in range(0, len(row), size):
            yield slice(start, min(start + size, len(row))), None
        return
    height = max(1, PART // max(1, m))
    starts = list(range(0, n, height))
    ends = torch.searchsorted(row, torch.tensor([*starts[1:], n], device=row.device)).tolist()
    for top, first, last in zip(starts, [0, *ends], ends, strict=False):
        yield slice(first, last), slice(top, min(top + height, n))


class Sums(NamedTuple):
    """What the kernel says of each query of one direction; ``nearfar.contrast.kernel`` defines the fields."""

    rest: Float[Tensor, " n"]
    positive: Float[Tensor, " n"]
    excess: Float[Tensor, " n"] | None
    expected: Float[Tensor, " n"] | None
    statistics: Statistics

    def mean_logit(self) -> Float[Tensor, " n"]:
        """The mean logit under the softmax, which ``expected=True`` asks for."""
        if self.expected is None:
            raise NearfarError("the mean logit was not computed: call log_sums with expected=True")
        return self.expected

    def losses(self, denominator: str = "all") -> Float[Tensor, " n"]:
        """The loss of each query; 0, without a gradient, where it has no positive.

        Of the ``denominator`` "negatives" also where it has no negative: nothing is there to be told apart from.
        """
        gap = self.rest - self.positive
        if denominator == "negatives":
            counted = (self.rest > -torch.inf) & (torch.zeros_like(gap) + self.statistics.positives > 0)
            value = torch.where(counted, gap, 0.0)
            return value if self.excess is None else value + torch.where(counted, self.excess, 0.0)
        if not isinstance(self.statistics.positives, float):
            gap = torch.where(self.statistics.positives > 0, gap, -torch.inf)
        # Beyond the threshold softplus gives its argument: at 50 that is exact in float64 too.
        value = torch.nn.functional.softplus(gap, threshold=50.0)
        return value if self.excess is None else value + self.excess


def partners(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], scale: Tensor) -> Sums:
    """The sums of queries whose only candidate in the batch is their partner."""
    with full_precision(a.device):
        logits = torch.linalg.vecdot(a, b) * scale
    nothing = torch.full_like(logits, -torch.inf).detach()
    return Sums(nothing, logits, None, None, Statistics(nothing, 1.0, 1.0, 1.0, 0.0))


def each_alone(
    sums: Sums,
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
    scale: Tensor,
    positives: tuple[Int[Tensor, " p"], Int[Tensor, " p"], Float[Tensor, " p"]],
) -> Float[Tensor, " n"]:
    """The loss of queries each of whose positives is told apart from the negatives on its own: their weighted mean."""
    row, column, weight = (each.to(queries.device) for each in positives)
    logits = listed_logits(queries, keys, row, column) * scale
    each = torch.nn.functional.softplus(sums.rest[row] - logits, threshold=50.0)
    weight, nothing = weight.to(each), torch.zeros_like(sums.rest)
    mass = nothing.index_add(0, row, weight)
    return nothing.index_add(0, row, each * weight / mass[row])


def as_recorded(sums: Sums, denominator: str, inside: bool, scale: Tensor, unit: bool) -> Sums:
    """The sums with the candidates and the floor of their denominator.

    Told apart from negatives alone, no loss is below that of a positive at cosine 1 and negatives at -1.
    """
    if denominator == "all":
        return sums
    old, like = sums.statistics, torch.zeros_like(sums.rest)
    positives = like + old.positives
    negatives = old.candidates - positives
    if denominator == "own":
        return sums._replace(statistics=replace(old, candidates=negatives + 1.0, floor=0.0))
    floor = negatives.log() - (2.0 * scale.detach().to(like) if unit else torch.inf)
    if inside:
        floor = floor - (like + old.mass).log()
    floor = torch.where((negatives > 0) & (positives > 0), floor, 0.0)
    return sums._replace(statistics=replace(old, candidates=negatives, floor=floor))


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
    half: bool = False,
) -> list[Sums]:
    """The kernel's sums for the queries ``a`` against the keys ``b`` and, with ``both``, for the keys as queries.

    ``b=None``: the queries are the keys, each without itself where ``without_self``. Query 0 is row ``offset`` of the
    target and the mask. ``normalize`` brings rows to unit length, with less memory than ``unit_rows`` before it;
    ``unit`` promises that they are. ``tile`` sets the tile by hand; by default it is chosen by size. ``half`` promises
    that the rows came in bfloat16, which a fused kernel (``nearfar.contrast.fused``) then multiplies as such.

    Each list element is one direction. Differentiable once, in ``a``, ``b`` and ``scale``; memory is O(n + m) beside
    the gradients.
    """
    n, m = len(a), len(a if b is None else b)
    if both and target.shape[0] != target.shape[1] and target.single:
        raise NearfarError(
            f"{target.shape[0]} queries and {target.shape[1]} keys: in both directions each needs its partner; "
            "both=False is for one"
        )
    if is_soft(mask) and (not target.single or expected):
        raise NearfarError(
            f"a {type(mask).__name__} has weights of negatives, which go with one positive for each query (InfoNCE); "
            "leave pairs out altogether with a mask, such as a GuideMask of softness 0"
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
        bounded=not is_soft(mask)
        and _bounded(a, b, scale, unit or normalize),  # weights may be as small as they like
        size=size,
        keep=size == (n, m),
    )
    keys = a if b is None else b
    blocks = fused_blocks(setting, a, keys, half) if tile is None else None
    if blocks is not None:
        return [Sums(*each) for each in fused_results(a, keys, scale, setting, half, blocks)]
    per_query: list[Statistics] = []
    flat = LogSums.apply(a, keys, scale, setting, per_query)
    return [Sums(*(*flat[4 * i : 4 * i + 4], statistics)) for i, statistics in enumerate(per_query)]


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
    tau_plus: float = 0.0,
    beta: float = 0.0,
    half: bool = False,
) -> tuple[Float[Tensor, ""] | Float[Tensor, " queries"], Step]:
    """The mean loss of the queries that have a positive, averaged over both directions where there are two.

    ``extras`` are further negatives of the first and the second direction; ``in_batch=False`` makes them the only ones
    beside the own partner (of ``OwnPair``). ``rows`` names the only queries of this call: the value is then the sum
    over them divided by the number of valid rows of the whole batch, so that the parts of a batch add up to it.

    ``denominator``: a positive is told apart from "all" candidates, from the negatives and itself, each on its "own"
    (sum outside), or from the "negatives" alone. ``reduction`` "sum" adds up, "none" gives the loss of each query;
    both still average over directions. ``beta`` above 0 weighs negatives by exp(β s), at the price of a second pass,
    and ``tau_plus`` above 0 takes off the share of them that is thought to be positives (both in
    ``nearfar.contrast.running_sums``, for one positive for each query). The other arguments are those of ``log_sums``.
    The ``Step`` holds what a record is made of.
    """
    n, keys = len(a), a if b is None else b
    if target.shape != (n, len(keys)):
        raise NearfarError(f"the target is for {target.shape} pairs, but there are {(n, len(keys))}")
    mask = None if mask is None else checked_mask(mask, *target.shape)
    if rows is not None and not isinstance(rows, slice):
        raise NearfarError(f"rows is a {type(rows).__name__}; a slice is needed, such as slice(0, 16)")
    if normalize and (denominator == "own" or not in_batch or any(extra is not None for extra in extras)):
        raise NearfarError("scores beside the kernel go with rows that are at unit length already: unit=True")
    options: _SumOptions = {
        "without_self": without_self, "inside": inside, "unit": unit, "normalize": normalize, "tile": tile,
        "half": half,
    }  # fmt: skip
    part = slice(0, n) if rows is None else slice(*rows.indices(n))
    if rows is not None and (part.step != 1 or part.start >= part.stop):
        raise NearfarError(f"rows is {rows}; at least one row, without steps, is needed")
    if (tau_plus or beta) and (not target.single or inside):
        raise NearfarError("tau_plus and beta are for one positive for each query (InfoNCE)")

    def at(factor: Tensor) -> list[_DirectionSums]:
        directions = _compute_directions(
            a, b, factor, target, both, mask, None if rows is None else part, in_batch, options
        )
        for k, extra in enumerate(extras[: len(directions)]):
            if extra is not None:
                own, queries = directions[k].sums, directions[k].queries
                joined = _with_extra(own, queries, extra, factor, unit, part.start)
                directions[k] = directions[k]._replace(sums=joined)
        return directions

    directions = at(scale * (1.0 + beta)) if beta else at(scale)
    if beta:
        milder = at(scale * beta)
        directions = [
            one._replace(sums=_hard_weighted(one.sums, other.sums, beta))
            for one, other in zip(directions, milder, strict=True)
        ]
    losses, sums = [], []
    for k, direction in enumerate(directions):
        own = direction.sums
        if tau_plus:
            count = count_negatives(own.rest, own.statistics)
            each, clamped = debiased_losses(own.rest, own.positive, count, scale, tau_plus)
            own = own._replace(statistics=replace(own.statistics, clamped=clamped))
            losses.append(each)
        elif denominator == "own":
            positives = (target.transposed() if k else target).listed(part, without_self)
            losses.append(each_alone(own, direction.queries, direction.keys, scale, positives))
        else:
            losses.append(own.losses(denominator))
        sums.append(as_recorded(own, denominator, inside, scale, unit or normalize))
    means = [each.sum() / direction.valid for each, direction in zip(losses, directions, strict=True)]
    mean = means[0] if len(means) == 1 else (means[0] + means[1]) * 0.5
    # What goes to the record as p(positive) is a probability, also where the loss is none.
    recorded = losses if denominator != "negatives" else [each.losses() for each in sums]
    step = Step.of(mean, recorded, sums, scale, inside)
    if reduction == "mean":
        return mean, step
    each_row = losses[0] if len(losses) == 1 else (losses[0] + losses[1]) * 0.5
    return each_row.sum() if reduction == "sum" else each_row, step


def _hard_weighted(sharp: Sums, mild: Sums, beta: float) -> Sums:
    """The sums of weighted negatives from those at (1 + beta) and at beta times the scale.

    In the record, the hardest one has its share of the weighted sum.
    """
    known = sharp.statistics
    rest = hard_weighted_rest(sharp.rest, mild.rest, count_negatives(sharp.rest, known))
    shift = torch.where(rest > -torch.inf, rest - sharp.rest, 0.0).detach()
    return sharp._replace(
        rest=rest,
        positive=sharp.positive / (1.0 + beta),
        statistics=replace(known, hardest=known.hardest + shift),
    )


class _SumOptions(TypedDict):
    """What ``log_sums`` is given for every direction alike."""

    without_self: bool
    inside: bool
    unit: bool
    normalize: bool
    tile: tuple[int, int] | None
    half: bool


class _DirectionSums(NamedTuple):
    """One direction: the sums of its queries, their keys, and how many rows of the whole batch count."""

    sums: Sums
    queries: Tensor
    keys: Tensor
    valid: Tensor | float


def _compute_directions(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    target: Target,
    both: bool,
    mask: Mask | None,
    rows: slice | None,
    in_batch: bool,
    options: _SumOptions,
) -> list[_DirectionSums]:
    keys = a if b is None else b
    sides = [(a, keys), (keys, a)][: 1 + both]
    directions = []
    if not in_batch:
        part = slice(0, len(a)) if rows is None else rows
        alone = partners(a[part], keys[part], scale)
        for query, key in sides:
            directions.append(_DirectionSums(alone, query[part], key, float(len(a))))
    elif rows is None and not (both and is_directed(mask)):
        both_ways = log_sums(a, b, scale, target, both=both, mask=mask, **options)
        for sums, (query, key) in zip(both_ways, sides, strict=True):
            directions.append(_DirectionSums(sums, query, key, _valid(sums.statistics)))
    else:
        for k, (query, key) in enumerate(sides):
            some = slice(0, len(query)) if rows is None else rows
            towards = target.transposed() if k else target
            left_out = transposed_mask(mask) if k and mask is not None else mask
            (sums,) = log_sums(query[some], key, scale, towards, mask=left_out, offset=some.start, **options)
            valid = _count(towards.has_positives(options["without_self"]), 5)
            directions.append(_DirectionSums(sums, query[some], key, valid))
    return directions


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
        candidates: Tensor | float = float(keys.shape[1])
        if extra.mask is not None:
            weights = mask_weights(extra.mask, part, slice(0, keys.shape[1])).to(logits)
            weighted = logits + weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
            logits, candidates = weighted.masked_fill(weights == 0, -torch.inf), weights.sum(1)
        rest, hardest = torch.logsumexp(logits, 1), logits.detach().amax(1)
    else:
        no_positives = NoPositives(offset + n, len(keys))
        (further,) = log_sums(queries, keys, scale, no_positives, mask=extra.mask, offset=offset, unit=unit)
        rest, hardest, candidates = further.rest, further.statistics.hardest, further.statistics.candidates
    statistics = replace(
        old,
        hardest=torch.maximum(old.hardest, hardest),
        candidates=old.candidates + candidates,
        left_out=old.left_out + (float(keys.shape[-2]) - candidates),
    )
    # Not of -inf and -inf, a row all of whose negatives are left out: that has a gradient of NaN.
    joined = torch.logsumexp(torch.stack([sums.rest, rest]).clamp(min=MASKED_LOGIT), 0)
    joined = torch.where(is_unmasked(joined), joined, -torch.inf)
    return sums._replace(rest=joined, statistics=statistics)
