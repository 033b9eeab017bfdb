"""Positives on their own, with what both directions need of them computed once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nearfar.contrast.patches import HIDDEN, Patch, Positions, Rectangle, is_shown
from nearfar.contrast.workspace import Workspace

__all__ = ["Lifted", "Overlay", "Taken"]


class Taken:
    """Positives and the logits at their positions, hidden where there is none after all.

    What the methods give has the form of these logits. ``axis`` is 1 for queries in the rows, 0 for queries in the
    columns; only weights that differ between them are computed twice.
    """

    def __init__(
        self, patch: Positions, logits: Tensor, holds_self: bool, is_open: Tensor | None = None
    ) -> None:
        self.patch, self.logits, self._holds_self = patch, logits, holds_self
        self._known: dict[str, Tensor] = {}
        self._open = is_open  # 0 where a mask leaves a pair out: that holds for strangers, not for positives

    def strangers(self, axis: int) -> Tensor | None:
        """1 where a position is a positive of the other direction's query alone, and so belongs to the rest here."""
        if self.patch.weight_back is None:
            return None

        def others() -> Tensor:
            there = is_shown(self.logits).to(self.logits.dtype) - self.counts(axis)
            return there if self._open is None else there * self._open

        return self._once("strangers", axis, others)

    def own(self, axis: int) -> Tensor:
        """The logits, hidden where there is no positive of the queries."""
        if self.patch.weight_back is None:
            return self.logits
        return self._once("own", axis, lambda: torch.add(self.logits, self.counts(axis) - 1, alpha=-HIDDEN))

    def counts(self, axis: int) -> Tensor:
        """1 where there is a positive, else 0."""

        def member() -> Tensor:
            weight = self._weight(axis)
            there = torch.ones_like(self.logits) if weight is None else weight.sign().to(self.logits.dtype)
            return self._shown(there)

        return self._once("counts", axis, member)

    def weights(self, axis: int) -> Tensor:
        """The weights, 0 where there is no positive."""
        weight = self._weight(axis)
        if weight is None:
            return self.counts(axis)
        return self._once("weights", axis, lambda: self._shown(weight.to(self.logits.dtype)))

    def finite(self) -> Tensor:
        """The logits, 0 where they are hidden."""
        if self.patch.weight is None and not self._holds_self:
            return self.logits
        return self._once("finite", 1, lambda: self._shown(self.logits))

    def held(self, axis: int) -> Tensor:
        """Weight times logit."""
        return self.finite() if self._weight(axis) is None else self.weights(axis) * self.finite()

    def powers(self, axis: int) -> Tensor:
        """Exponentials of the positives' logits, for logits that are in range; 0 where there is none."""
        return self._once("powers", axis, lambda: self.own(axis).exp())

    def w_log_w(self, axis: int) -> Tensor:
        """Weight times its logarithm, 0 for 0."""

        def compute() -> Tensor:
            weight = self.weights(axis)
            return torch.clamp(weight, min=1e-30, out=self.room("w_log_w")).log_().mul_(weight)

        return self._once("w_log_w", axis, compute)

    def room(self, name: str) -> Tensor:
        """A buffer in the form of the logits."""
        return torch.empty_like(self.logits)

    def _once(self, name: str, axis: int, compute: Callable[[], Tensor]) -> Tensor:
        key = f"{name} {axis}" if self.patch.weight_back is not None else name
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def _weight(self, axis: int) -> Tensor | None:
        return self.patch.weight if axis == 1 or self.patch.weight_back is None else self.patch.weight_back

    def _shown(self, values: Tensor) -> Tensor:
        if self.patch.weight is None and not self._holds_self:
            return values
        return values * is_shown(self.logits).to(values.dtype)


class Lifted(Taken):
    """Positives taken out of a tile."""

    patch: Patch

    def leave(self, powers: Tensor) -> None:
        """See that only the rest is left in the exponentials of the tile. Hidden logits have none."""

    def put(self, tile: Tensor, values: Tensor) -> None:
        """Write values to the positions of a tile that has none there."""
        self.patch.put(tile, values)


class Overlay(Lifted):
    """Positives that stay in the tile: a block whose exponentials are in range, split by multiplying with 0 and 1.

    Hiding many logits would cost more than the matrix product: exponentials far out of range, and choices by a
    Boolean, run element by element. Buffers, because fresh memory for every step of every tile costs as much as the
    step.
    """

    def __init__(
        self, patch: Rectangle, tile: Tensor, own: Tensor | None, name: str, space: Workspace
    ) -> None:
        self._space, self._name = space, name
        super().__init__(patch, tile[patch.rows, patch.columns], own is not None)
        weight = patch.weight
        if weight is None or own is not None or weight.dtype != tile.dtype:
            weight = (
                self.room("weight").copy_(weight) if weight is not None else self.room("weight").fill_(1.0)
            )
            if own is not None:
                weight.mul_(own[patch.rows, patch.columns])
        self._known["weights"] = weight

    def counts(self, axis: int) -> Tensor:
        return self._once("counts", 1, lambda: torch.sign(self.weights(1), out=self.room("counts")))

    def weights(self, axis: int) -> Tensor:
        return self._known["weights"]

    def finite(self) -> Tensor:
        return self.logits

    def held(self, axis: int) -> Tensor:
        return self._once("held", 1, lambda: torch.mul(self.weights(1), self.logits, out=self.room("held")))

    def powers(self, axis: int) -> Tensor:
        return self._once(
            "powers", 1, lambda: torch.exp(self.logits, out=self.room("powers")).mul_(self.counts(1))
        )

    def leave(self, powers: Tensor) -> None:
        view = powers[self.patch.rows, self.patch.columns]
        view.addcmul_(view, self.counts(1), value=-1)  # x - x and x - 0: nothing is rounded

    def put(self, tile: Tensor, values: Tensor) -> None:
        tile[self.patch.rows, self.patch.columns].add_(values)

    def room(self, name: str) -> Tensor:
        rows, columns = self.patch.rows, self.patch.columns
        return self._space(f"{self._name} {name}", rows.stop - rows.start, columns.stop - columns.start)
