"""Running sums of one direction's queries over the tiles, and the record of a step that follows from them.

Debiased sums are made of them: hard negatives weighted up, the share of false ones taken off. They need one positive
for each query. The kernel gives log-sums at one or two scales, and the rest is done once for each query, so that tiles,
masks, further negatives, parts of a batch and several processes work as elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfar.contrast.positives import MASKED_LOGIT, PositiveLogits, is_unmasked
from nearfar.contrast.tiles import Setting, finite, rest_share, tiny, top_of_powers, total_of

__all__ = [
    "Direction",
    "RunningSums",
    "Statistics",
    "Step",
    "count_negatives",
    "debiased_losses",
    "hard_weighted_rest",
]


@dataclass
class Statistics:
    """Numbers of each query that carry no gradient; the record of a step is made from them.

    ``hardest``: largest logit of the rest. ``candidates``, ``positives``: counts. ``mass``: Σ W of the positives,
    ``floor``: the least its loss can be. ``left_out``: how many negatives a mask leaves out; where it has weights of
    negatives, what these lack of 1, summed, and ``candidates`` then counts by weight. A plain number stands for all
    queries alike. ``clamped``: whose debiased sum stands at its least.
    """

    hardest: Float[Tensor, " n"]
    candidates: Float[Tensor, " n"] | float
    positives: Float[Tensor, " n"] | float
    mass: Float[Tensor, " n"] | float
    floor: Float[Tensor, " n"] | float
    left_out: Float[Tensor, " n"] | float = 0.0
    clamped: Bool[Tensor, " n"] | None = None


class RunningSums:
    """Sums of the queries in the rows (``axis`` 1: along them) or in the columns (``axis`` 0).

    The first tile that covers all queries sets a sum, others are added to it; so one tile costs no more than its sums.
    """

    def __init__(self, n: int, others: int, like: Tensor, setting: Setting) -> None:
        self.n, self.others, self.setting, self._like = n, others, setting, like
        self._tiny = tiny(like)
        self._parts: dict[tuple[str, int, int], Tensor] = {}
        # Of the rest, of the positives, of the positives by weight; each is set by the first tile that has any.
        self.top: Any = None
        self.total: Any = None
        self.moment: Any = None
        self.left: Tensor | None = None
        self.positive_top: Any = None
        self.positive_total: Any = None
        self.positive_moment: Tensor | None = None
        self.positives: Tensor | None = None
        self.weighted: Tensor | None = None
        self.weighted_top: Tensor | None = None
        self.mass: Tensor | None = None
        self.w_log_w: Tensor | None = None
        self.heaviest: Tensor | None = None

    # -- sums ------------------------------------------------------------------------------------------------
    def _at(self, name: str, at: slice, start: float) -> Tensor:
        part = self._parts.get((name, at.start, at.stop))
        if part is None:
            values = getattr(self, name)
            if values is None:
                values = torch.full((self.n,), start, dtype=self._like.dtype, device=self._like.device)
                setattr(self, name, values)
            part = self._parts[name, at.start, at.stop] = values[at]
        return part

    def sum_of(self, name: str) -> Tensor:
        """One of the sums, of all queries; 0 where no tile had any."""
        return self._at(name, slice(0, self.n), 0.0)

    def top_of(self, name: str) -> Tensor:
        """One of the maxima, of all queries; -inf where no tile had any."""
        return self._at(name, slice(0, self.n), -torch.inf)

    def _is_first(self, name: str, at: slice) -> bool:
        return at.start == 0 and at.stop == self.n and getattr(self, name) is None

    def _add(self, name: str, at: slice, values: Tensor) -> None:
        if self._is_first(name, at):
            setattr(self, name, values)
        else:
            self._at(name, at, 0.0).add_(values)

    def _raise(self, name: str, at: slice, values: Tensor) -> None:
        if self._is_first(name, at):
            setattr(self, name, values)
        else:
            now = self._at(name, at, -torch.inf)
            torch.maximum(now, values, out=now)

    def _join(
        self, top: str, total: str, at: slice, new_top: Tensor, new_total: Tensor, *moment: Any
    ) -> None:
        """Add sums that were taken with a different shift; ``moment``: the name and values of a sum shifted alike."""
        names, values = [total, *moment[:1]], [new_total, *moment[1:]]
        if self._is_first(top, at):
            setattr(self, top, new_top)
            for name, value in zip(names, values, strict=True):
                setattr(self, name, value)
            return
        now = self._at(top, at, -torch.inf)
        joined = torch.maximum(now, new_top)
        shift = finite(joined)
        old, new = torch.exp(now - shift), torch.exp(new_top - shift)
        for name, value in zip(names, values, strict=True):
            self._at(name, at, 0.0).mul_(old).add_(value * new)
        now.copy_(joined)

    # -- one tile --------------------------------------------------------------------------------------------
    def add_positives(self, block: PositiveLogits, at: slice, axis: int) -> None:
        """Take in the positives of a tile; ``at`` are the patch's queries."""
        setting, patch = self.setting, block.patch
        if setting.target.single:
            self._raise("positive_top", at, block.logits)
            return
        self._add("positives", at, patch.sum(block.counts(axis), axis))
        self._add_powers("positive", block, axis, at, None)
        opposite = block.opposite_only(axis)
        if opposite is not None:
            self._add_opposite(block, opposite, axis, at)
        if not setting.has_excess:
            return
        if not setting.target.binary:
            self._add("mass", at, patch.sum(block.weights(axis), axis))
        if setting.inside:
            self._add_powers("weighted", block, axis, at, block.weights(axis))
            self._raise("heaviest", at, patch.amax(block.weights(axis), axis))
            return
        self._add("weighted", at, patch.sum(block.weighted_logits(axis), axis))
        if not setting.target.binary:
            self._add("w_log_w", at, patch.sum(block.w_log_w(axis), axis))

    def _add_powers(
        self, name: str, block: PositiveLogits, axis: int, at: slice, weight: Tensor | None
    ) -> None:
        patch, total = block.patch, "weighted" if name == "weighted" else "positive_total"
        if self.setting.bounded:
            powers = block.powers(axis)
            if weight is not None:
                powers = torch.mul(powers, weight, out=block.buffer("weighted"))
            self._add(total, at, patch.sum(powers, axis))
            if self.setting.expected and weight is None:
                self._add("positive_moment", at, patch.sum(powers * block.finite(), axis))
            return
        logits = block.own(axis) if weight is None else block.own(axis) + weight.log()
        top = patch.amax(logits, axis)
        powers = torch.exp(logits - patch.spread(finite(top), axis))
        more: tuple[str, Tensor] | tuple[()] = ()
        if self.setting.expected and weight is None:
            more = ("positive_moment", patch.sum(powers * block.finite(), axis))
        self._join(f"{name}_top", total, at, top, patch.sum(powers, axis), *more)

    def _add_opposite(self, block: PositiveLogits, opposite: Tensor, axis: int, at: slice) -> None:
        """Positives of the other direction alone are a part of the rest that is not in the tile."""
        patch, setting = block.patch, self.setting
        if setting.mask is not None:
            self._add("left", at, patch.sum(opposite, axis))
        logits = torch.add(block.logits, opposite - 1, alpha=-MASKED_LOGIT)
        top = patch.amax(logits, axis)
        powers = torch.exp(logits if setting.bounded else logits - patch.spread(finite(top), axis))
        total = patch.sum(powers, axis)
        moment = ("moment", patch.sum(powers * block.finite(), axis)) if setting.expected else ()
        if not setting.bounded:
            self._join("top", "total", at, top, total, *moment)
            return
        self._add("total", at, total)
        self._raise("top", at, top.exp())
        if moment:
            self._add(*moment[:1], at, *moment[1:])

    def add_rest(self, powers: Tensor, at: slice, axis: int, weighted: Tensor | None) -> None:
        """Take in the rest of a tile, exponentials as they are; ``weighted`` by the logits where that is wanted."""
        self._add("total", at, total_of(powers, axis))
        self._raise("top", at, top_of_powers(powers, axis))
        if weighted is not None:
            self._add("moment", at, total_of(weighted, axis))

    def add_shifted_rest(
        self,
        powers: Tensor,
        at: slice,
        axis: int,
        weighted: Tensor | None,
        top: Tensor,
        factor: Tensor | None = None,
    ) -> None:
        """The same of exponentials from which the largest logit, ``top``, is taken off, or is so by ``factor``."""
        sums = [total_of(x, axis) for x in (powers, weighted) if x is not None]
        total, *moment = sums if factor is None else [x.mul_(factor) for x in sums]
        self._join("top", "total", at, top, total, *(["moment", *moment] if moment else []))

    def count(self, logits: Tensor, at: slice, axis: int, weights: Tensor | None = None) -> None:
        """Count the candidates that a mask has left in the rest, by their weights where it has any."""
        left = is_unmasked(logits).to(logits.dtype)
        self._add("left", at, (left if weights is None else left.mul_(weights)).sum(axis))

    # -- all tiles -------------------------------------------------------------------------------------------
    def results(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """``rest``, ``positive``, ``excess``, ``expected`` of each query."""
        setting, binary = self.setting, self.setting.target.binary
        rest = self.total.log() if setting.bounded else self.total.log().add_(self.top)
        if setting.target.single:
            none = self.positive_top is None  # and stays so: a record asks
            positive = torch.full_like(rest, -torch.inf) if none else self.positive_top
        else:
            positive = self.sum_of("positive_total").log()
            if not setting.bounded:
                top = self.top_of("positive_top")
                positive = torch.where(positive > -torch.inf, positive + top, -torch.inf)
        excess = expected = None
        if setting.has_excess:
            positives = self.sum_of("positives")
            mean = self.sum_of("weighted")
            if setting.inside:
                mean = mean.log()
                if not setting.bounded:
                    mean = mean + self.top_of("weighted_top")
            else:
                mean = mean / (positives if binary else self.sum_of("mass")).clamp(min=self._tiny)
            excess = torch.where(positives > 0, positive - mean, 0.0)
        if setting.expected:
            share = rest_share(rest, positive)
            if setting.target.single:
                ours = finite(positive)
            else:
                ours = self.sum_of("positive_moment") / self.sum_of("positive_total").clamp(min=self._tiny)
            expected = share * (self.moment / self.total.clamp(min=self._tiny)) + (1 - share) * ours
        return rest, positive, excess, expected

    def statistics(self) -> Statistics:
        """What the record needs."""
        target = self.setting.target
        hardest = self.top.log() if self.setting.bounded else self.top
        if target.single:
            count = 0.0 if self.positive_top is None else 1.0
            candidates = float(self.others) if self.left is None else self.left + count
            return Statistics(hardest, candidates, count, count, 0.0, float(self.others) - candidates)
        positives = self.sum_of("positives")
        candidates = float(self.others) if self.left is None else self.left + positives
        mass = positives if target.binary else self.sum_of("mass")
        if self.setting.inside:
            floor: Tensor | float = 0.0
            if not target.binary:
                floor = -self.top_of("heaviest").clamp(min=self._tiny).log()
        elif target.binary:
            floor = positives.clamp(min=1).log()
        else:
            floor = mass.clamp(min=self._tiny)
            floor = floor.log() - self.sum_of("w_log_w") / floor
        return Statistics(hardest, candidates, positives, mass, floor, float(self.others) - candidates)


@dataclass(frozen=True)
class Direction:
    """The queries of one direction: loss, log-sum of the rest, and what the kernel counted."""

    losses: Float[Tensor, " n"]
    rest: Float[Tensor, " n"]
    statistics: Statistics


@dataclass(frozen=True)
class Step:
    """One call: its value, its directions, the scale it used, and whether weights stood inside the logarithm.

    The directions are looked at when the record is read: what it needs beyond the loss is computed then.
    """

    value: Float[Tensor, ""]
    directions: Callable[[], Sequence[Direction]]
    scale: Tensor | float
    inside: bool = False

    @classmethod
    def of(
        cls, value: Tensor, losses: list[Tensor], sums: Sequence[Any], scale: Tensor, inside: bool
    ) -> Step:
        """From the kernel's sums."""
        directions = [
            Direction(each.detach(), direction.rest.detach(), direction.statistics)
            for each, direction in zip(losses, sums, strict=True)
        ]
        return cls(value.detach(), partial(list, directions), scale.detach(), inside)

    def numbers(self) -> Float[Tensor, " numbers"]:
        """The fields of a ``nearfar.losses.Record`` in their order, on the device."""
        with torch.no_grad():
            parts = torch.stack([_direction(direction, self.inside) for direction in self.directions()])
            means, least = parts.mean(0), parts[:, 2].amin()
            scale = torch.as_tensor(self.scale).to(means)
            finite = self.value.isfinite().to(means.dtype)
            return torch.cat([means[:2], least[None], means[3:-2], scale[None], means[-2:], finite[None]])


def _direction(direction: Direction, inside: bool) -> Float[Tensor, " numbers"]:
    """Candidates, positives (mean, least), rows without, p, hardest share, uniform level, floor, the rows that have
    no negative, and the negatives that a mask leaves out."""
    losses, statistics = direction.losses, direction.statistics
    like = torch.zeros_like(losses)
    candidates, positives = like + statistics.candidates, like + statistics.positives
    valid = positives > 0
    count = valid.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return torch.where(valid, values, 0.0).sum() / count

    guess = candidates.clamp(min=1).log()
    if inside:
        guess = guess - (like + statistics.mass).clamp(min=1e-38).log()
    has_rest = direction.rest > -torch.inf
    share = torch.where(has_rest, (statistics.hardest - direction.rest).exp(), 0.0)
    return torch.stack(
        [
            candidates.mean(),
            positives.mean(),
            positives.amin(),
            (~valid).sum().to(losses.dtype),
            mean(torch.exp(-losses)),
            share.sum() / has_rest.sum().clamp(min=1),
            mean(guess),
            mean(like + statistics.floor),
            (~has_rest).sum().to(losses.dtype),
            (like + statistics.left_out).mean(),
        ]
    )


def count_negatives(rest: Float[Tensor, " n"], statistics: Statistics) -> Float[Tensor, " n"]:
    """Negatives of each query, by weight where a mask has weights."""
    like = torch.zeros_like(rest)
    return (like + statistics.candidates - statistics.positives).clamp(min=0.0).detach()


def hard_weighted_rest(
    sharp: Float[Tensor, " n"], mild: Float[Tensor, " n"], count: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """log of N · Σ_j exp((1 + β) s_j) / Σ_j exp(β s_j) (Robinson et al. 2021), from the logarithms of both sums.

    N times the mean of exp(s) over negatives drawn with probability ∝ exp(β s); for β = 0 the plain sum.

    >>> s = torch.tensor([[0.0, 2.0]])
    >>> rest = hard_weighted_rest((2 * s).logsumexp(1), s.logsumexp(1), torch.tensor([2.0]))
    >>> bool(rest > s.logsumexp(1))
    True
    """
    present = (count > 0) & (sharp > -torch.inf) & (mild > -torch.inf)
    sharp, mild = (torch.where(present, each, 0.0) for each in (sharp, mild))
    return torch.where(present, sharp - mild + torch.where(present, count, 1.0).log(), -torch.inf)


def debiased_losses(
    rest: Float[Tensor, " n"],
    positive: Float[Tensor, " n"],
    count: Float[Tensor, " n"],
    scale: Float[Tensor, ""],
    tau_plus: float,
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """log(1 + G / exp(s⁺)) with G = max((Σ_j exp(s_j) - N τ⁺ exp(s⁺)) / (1 - τ⁺), N exp(-scale)) (Chuang et al. 2020),
    and of which queries G stands at its least.

    Of N negatives drawn from everything a share τ⁺ are positives in truth, which the second term takes off; the
    least is what N negatives at cosine -1 have. 0 for a query without negatives.

    >>> rest, positive = torch.tensor([5.0]).log(), torch.tensor([1.0]).log()
    >>> loss, least = debiased_losses(rest, positive, torch.tensor([2.0]), torch.tensor(1.0), 0.5)
    >>> round(loss.exp().item(), 3), least.item()  # 1 + (5 - 2 · .5 · 1) / .5
    (9.0, False)
    """
    present = (count > 0) & (rest > -torch.inf)
    count = torch.where(present, count, 1.0)
    odds = torch.where(present, rest - positive, 0.0)  # logarithm of Σ exp(s_j) / exp(s⁺)
    drawn = count * tau_plus
    # Where the difference is small, it is taken of numbers: that of their logarithms would have no digits. Where the
    # sum is far above, its exponential may be out of range.
    near = odds < drawn.log() + 1.0
    low = torch.where(near, odds, 0.0).exp()
    close = torch.log1p(torch.relu(low - drawn) / (1.0 - tau_plus))
    high = torch.where(near, drawn.log() + 2.0, odds)
    estimate = high + torch.log1p(-drawn * torch.exp(-high)) - math.log1p(-tau_plus)
    far = torch.nn.functional.softplus(estimate, threshold=50.0)
    value = torch.where(near, close, far)
    least = torch.nn.functional.softplus(count.log() - scale - positive, threshold=50.0)
    clamped = value.detach() < least.detach()
    value = torch.where(clamped, least, value)
    return torch.where(present, value, 0.0), clamped & present
