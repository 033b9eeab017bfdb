"""A weighted, scheduled sum of losses that can say how much of the gradient each of them contributes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.arguments import any_number, number, shown
from nearfar.errors import NearfarError, nearest_name
from nearfar.schedules import Constant, Schedule, schedule

__all__ = ["GradientShares", "Objective", "ObjectiveRecord"]


@dataclass(frozen=True)
class GradientShares:
    """What each term's gradient contributes on some tensors, g_k being that of the unweighted term.

    ``shares``: ‖w_k g_k‖ / Σ_j ‖w_j g_j‖, by name; all 0 where no term has a gradient. ``cosines``: between w_j g_j
    and w_k g_k, for pairs of terms that both have one: −1 is a tug of war, 0 is no concern of each other.
    ``connected``: whether the tensors take part in the term at all, for the terms whose weight is not 0.
    """

    shares: dict[str, float]
    cosines: dict[tuple[str, str], float]
    connected: dict[str, bool]

    def to_dict(self) -> dict[str, float]:
        """Flat, as the log of a run takes it: ``NAME/share``, ``NAME/connected`` and ``NAME/cosine/OTHER``."""
        flat = {f"{name}/share": share for name, share in self.shares.items()}
        flat |= {f"{name}/connected": float(yes) for name, yes in self.connected.items()}
        return flat | {f"{a}/cosine/{b}": cosine for (a, b), cosine in self.cosines.items()}


@dataclass(frozen=True)
class ObjectiveRecord:
    """The numbers of one step: values, weights and, where they were asked for, shares of the gradient."""

    total: float
    raw: dict[str, float]
    weights: dict[str, float]
    gradient: GradientShares | None = field(default=None)

    def to_dict(self) -> dict[str, float]:
        """Flat, as the log of a run takes it: ``total``, ``NAME/raw``, ``NAME/weight``, ``NAME/weighted`` and, where
        the gradient was measured, ``NAME/share``, ``NAME/connected`` and ``NAME/cosine/OTHER``.
        """
        flat = {"total": self.total}
        for name, weight in self.weights.items():
            if name in self.raw:
                flat[f"{name}/raw"] = self.raw[name]
                flat[f"{name}/weighted"] = weight * self.raw[name] if weight else 0.0
            flat[f"{name}/weight"] = weight
        return flat if self.gradient is None else flat | self.gradient.to_dict()


class Objective(nn.Module):
    """total = Σ_k w_k(t) · value_k, for terms that have names.

    ``terms`` maps each name to its weight: a number, or whatever ``nearfar.schedules.schedule`` takes, such as
    ``"linear 0 -> 1"`` or ``{"kind": "piecewise", "points": [[0, 0], [3, 1]]}``. It has neither parameters nor state:
    the place in the run is an argument, so that a resumed run has the same weights.

    Called with the values (0-d tensors by name) and, where a weight is scheduled, ``position`` (epochs from 0, or any
    other unit) and ``total`` of the run, it returns the sum, a 0-d tensor. ``record`` holds the ``ObjectiveRecord`` of
    that call (None before the first); reading it waits for the device.

    The size of a loss says nothing about its pull. ``on``, a tensor or several that take part (an embedding, a
    parameter, ``model.parameters()``), measures each term's share of the gradient there: see ``measure_shares``.

    A term of weight 0 is not in the sum, and its value may be left out. Where all weights are 0 the sum is 0, with
    gradient 0.

    Raises ``NearfarError`` for names that are missing or unknown, for values that are no 0-d tensors and, on the CPU,
    for values that are not finite.

    >>> objective = Objective({"contrastive": 0.3, "focal": "linear 0.5 -> 0.7"})
    >>> z = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> values = {"contrastive": (z**2).sum(), "focal": (3 * z).sum()}
    >>> total = objective(values, position=0, total=10, on=z)
    >>> round(total.item(), 4)
    6.0
    >>> {name: round(value, 3) for name, value in objective.record.to_dict().items() if "share" in name}
    {'contrastive/share': 0.387, 'focal/share': 0.613}
    """

    def __init__(self, terms: Mapping[str, object]) -> None:
        super().__init__()
        if not isinstance(terms, Mapping):
            raise NearfarError(
                f"terms is {shown(terms)}; a mapping of names to weights is needed, such as {{'contrastive': 1.0}}"
            )
        if not terms:
            raise NearfarError(
                "an objective has no terms; give names and weights, such as {'contrastive': 1.0}"
            )
        self.terms: dict[str, Schedule] = {}
        for name, weight in terms.items():
            if not isinstance(name, str) or not name or "/" in name:
                raise NearfarError(
                    f"a term is named {name!r}; names are texts without '/', which divides log keys"
                )
            try:
                self.terms[name] = schedule(weight)
            except NearfarError as error:
                raise NearfarError(f"the weight of term {name!r}: {error}") from error
        self._seen: tuple[list[str], Tensor, dict[str, float], GradientShares | None] | None = None

    @property
    def record(self) -> ObjectiveRecord | None:
        if self._seen is None:
            return None
        names, values, weights, gradient = self._seen
        total, *raw = values.tolist()
        return ObjectiveRecord(total, dict(zip(names, raw, strict=True)), dict(weights), gradient)

    def weights(self, position: float | None = None, total: float | None = None) -> dict[str, float]:
        """The weight of each term at a place of the run; numbers need no position.

        >>> Objective({"a": 1, "b": "0 -> 1"}).weights(position=5, total=10)
        {'a': 1.0, 'b': 1.0}
        """
        by_name = {}
        for name, weight in self.terms.items():
            if position is None and not isinstance(weight, Constant):
                raise NearfarError(
                    f"the weight of term {name!r} changes over the run; pass position= (and total=), such as the epoch"
                )
            place = 0.0 if position is None else number("position", position, 0)
            length = None if total is None else number("total", total, above=0)
            value = any_number(f"the weight of term {name!r}", weight(place, length))
            if not math.isfinite(value):
                raise NearfarError(f"the weight of term {name!r} is {value} at position {position}")
            by_name[name] = value
        return by_name

    def forward(
        self,
        values: Mapping[str, Float[Tensor, ""]],
        position: float | None = None,
        total: float | None = None,
        on: Tensor | Iterable[Tensor] | None = None,
    ) -> Float[Tensor, ""]:
        self._seen = None  # a call that fails leaves no record
        weights = self.weights(position, total)
        self._check(values, weights)
        gradient = None if on is None else _measure(values, weights, on)
        names = [name for name in self.terms if name in values]
        exact = {
            name: values[name].to(torch.promote_types(values[name].dtype, torch.float32)) for name in names
        }
        parts = [weights[name] * exact[name] for name in names if weights[name] != 0.0]
        # All weights 0: still of the graph, for the loop goes backward as in any other step.
        result = torch.stack(parts or [0.0 * exact[name] for name in names]).sum()
        seen = torch.stack([result.detach(), *(value.detach() for value in exact.values())])
        self._seen = (names, seen, weights, gradient)
        return result

    def measure_shares(
        self,
        values: Mapping[str, Float[Tensor, ""]],
        on: Tensor | Iterable[Tensor],
        position: float | None = None,
        total: float | None = None,
    ) -> GradientShares:
        """Each term's share of the gradient on ``on`` (of several tensors, as if they were one vector).

        Call it before ``backward()``. It costs one backward pass from each term of weight ≠ 0 down to ``on``: an
        embedding is cheap, the first layer is not, so ask every so many steps. It leaves no trace: no ``.grad`` is
        touched, the graph stays, and the later ``backward()`` gives the same bits.

        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> shares = Objective({"fit": 1.0, "decay": 0.5}).measure_shares({"fit": w[0], "decay": -2 * w[0]}, on=w)
        >>> shares.shares, shares.cosines
        ({'fit': 0.5, 'decay': 0.5}, {('fit', 'decay'): -1.0})
        """
        weights = self.weights(position, total)
        self._check(values, weights)
        return _measure(values, weights, on)

    def _check(self, values: Mapping[str, Tensor], weights: dict[str, float]) -> None:
        if not isinstance(values, Mapping):
            raise NearfarError(f"values is {shown(values)}; a mapping of names to 0-d tensors is needed")
        for name in values:
            if name not in self.terms:
                raise NearfarError(
                    f"values: there is no term {name!r}: {nearest_name(str(name), self.terms)}"
                )
        for name, weight in weights.items():
            if name not in values and (weight != 0.0 or not values):
                raise NearfarError(
                    f"values: the value of term {name!r} (weight {weight:g}) is missing; given: "
                    f"{', '.join(values) or 'none'}"
                )
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.ndim != 0 or not value.is_floating_point():
                what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else shown(value)
                raise NearfarError(
                    f"values: the value of term {name!r} is {what}; a 0-d floating tensor is needed (.mean())"
                )
            if value.device.type == "cpu" and not bool(value.detach().isfinite()):
                raise NearfarError(
                    f"values: the value of term {name!r} is {value.item()}; the step must not be taken. Look at what "
                    "went into this loss, and at the learning rate"
                )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={weight}" for name, weight in self.terms.items())


def _measure(
    values: Mapping[str, Tensor], weights: dict[str, float], on: Tensor | Iterable[Tensor]
) -> GradientShares:
    if not isinstance(on, Iterable) or isinstance(on, (str, Mapping)):
        raise NearfarError(
            f"on is {shown(on)}; a tensor or several are needed, such as an embedding or parameters"
        )
    tensors = [on] if isinstance(on, Tensor) else list(on)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise NearfarError(
                f"on holds {shown(tensor)}; tensors are needed, such as an embedding or parameters"
            )
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    if not wanted:
        raise NearfarError(
            "on= holds no tensor that requires a gradient, so that there is none to share; pass the embedding that the "
            "losses were computed from, or parameters, with gradients enabled"
        )
    active = {name: weight for name, weight in weights.items() if weight != 0.0}
    directions: dict[str, Tensor] = {}
    norms = dict.fromkeys(weights, 0.0)
    connected = {}
    for name, weight in active.items():
        gradient = _gradient(name, values[name], wanted)
        connected[name] = gradient is not None
        if gradient is None:
            continue
        # Divided by its largest entry, no square of it is out of range.
        largest = gradient.abs().amax().item() if gradient.numel() else 0.0
        if not math.isfinite(largest):
            raise NearfarError(
                f"the gradient of term {name!r} is not finite although its value is; look for a square root or a "
                "logarithm at 0, or half precision, between this loss and what on= holds"
            )
        if largest == 0.0:
            continue
        direction = gradient.div_(largest)
        norm = torch.linalg.vector_norm(direction).item()
        norms[name] = abs(weight) * largest * norm
        directions[name] = direction.mul_(math.copysign(1.0, weight) / norm)
    whole = sum(norms.values())
    shares = {name: norm / whole if whole else 0.0 for name, norm in norms.items()}
    cosines = {
        (a, b): max(-1.0, min(1.0, torch.dot(directions[a], directions[b]).item()))
        for a, b in combinations(directions, 2)
    }
    return GradientShares(shares, cosines, connected)


def _gradient(name: str, value: Tensor, tensors: list[Tensor]) -> Tensor | None:
    """One vector, zero where a tensor takes no part; None where none does."""
    if not value.requires_grad:
        return None
    try:
        gradients = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise NearfarError(
            f"the graph of term {name!r} has been freed; measure the gradient before backward()"
        ) from error
    if all(part is None for part in gradients):
        return None
    parts = [
        torch.zeros_like(tensor) if part is None else part
        for part, tensor in zip(gradients, tensors, strict=True)
    ]
    flat = [(part.to_dense() if part.layout != torch.strided else part).flatten() for part in parts]
    return torch.cat([part.to(torch.promote_types(part.dtype, torch.float32)) for part in flat])
