"""Detached numbers of one call of a loss. A record is made from them when somebody asks; until then nothing waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.sums import Statistics

__all__ = ["Direction", "Step"]


@dataclass(frozen=True)
class Direction:
    """The queries of one direction: loss, log-sum of the rest, and what the kernel counted."""

    losses: Float[Tensor, " n"]
    rest: Float[Tensor, " n"]
    statistics: Statistics


@dataclass(frozen=True)
class Step:
    """One call: its value, its directions, the scale it used, and whether weights stood inside the logarithm.

    The directions are looked at when somebody asks for the record: what it needs beyond the loss is computed then.
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
            return torch.cat([means[:2], least[None], means[3:-1], scale[None], means[-1:], finite[None]])


def _direction(direction: Direction, inside: bool) -> Float[Tensor, " numbers"]:
    """Candidates, positives (mean, least), rows without, p, hardest share, uniform level, floor, and the rows that
    have no negative."""
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
        ]
    )
