"""Which weights a training moves: those that the optimiser lacks, and those that no gradient reaches, by name."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nearfar.data.files import Json

__all__ = ["WeightMovement"]

#: a gradient below this share of the largest is rounding, such as that of a bias before a BatchNorm
ROUNDING = 1e-6
#: gradients that a weight has had before it is said not to move: a step may be skipped, as GradScaler does
ENOUGH = 3
NAMED = 6


@dataclass
class WeightMovement:
    """Looks at one element of each weight that is trained, that with the largest gradient, from one look to the next.

    An optimiser that holds a weight changes that element. It is chosen anew at each look, so that the rows of a table
    of embeddings that no batch used say nothing. Weights without a gradient are looked at where they are largest, as
    those of a moving average move without one. Each look costs about as much as the gradient norm.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> optimizer = torch.optim.SGD(model[0].parameters(), 0.1)      # without the second layer
    >>> movement = WeightMovement(model)
    >>> for _ in range(5):
    ...     model.zero_grad(); model(torch.ones(3, 4)).square().sum().backward()
    ...     _ = movement.look(); optimizer.step()
    >>> movement.summary()["weights_unmoved"], movement.summary()["weights_unmoved_names"]
    (2, '1.weight, 1.bias')
    """

    model: nn.Module
    _moved: set[str] = field(default_factory=set)
    _looks: dict[str, int] = field(default_factory=dict)
    _graded: dict[str, int] = field(default_factory=dict)
    _seen: dict[str, tuple[Tensor, Tensor, bool]] = field(default_factory=dict)
    _had_gradient: dict[str, bool] = field(default_factory=dict)

    def look(self) -> Json:
        """After the backward pass and before the optimiser's step: ``weights_moved``, the share of the weights with a
        gradient that have changed since the last look; {} at the first."""
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        trained = {n: (_flat(p.detach()), p.grad) for n, p in named.items() if _flat(p.detach()).numel()}
        with torch.no_grad():
            changed = self._changed(trained)
            with_gradient = self._take(trained)
        share: Json = {}
        judged = [name for name in changed if self._had_gradient[name]]
        if judged:
            share["weights_moved"] = sum(changed[name] for name in judged) / len(judged)
        self._moved |= {name for name, is_changed in changed.items() if is_changed}
        for name in trained:
            self._looks[name] = self._looks.get(name, 0) + 1
            self._graded[name] = self._graded.get(name, 0) + with_gradient[name]
        return share

    def summary(self) -> Json:
        """How many weights are trained, have a gradient and do not move, and have none, with names; {} before
        ``ENOUGH`` looks."""
        if max(self._looks.values(), default=0) <= ENOUGH:
            return {}
        # the gradient of the last look has not been followed by a second one
        unmoved = [n for n, count in self._graded.items() if count > ENOUGH and n not in self._moved]
        without = [n for n, count in self._graded.items() if count == 0 and n not in self._moved]
        return {
            "weights_trained": len(self._graded),
            "weights_unmoved": len(unmoved),
            "weights_without_gradient": len(without),
        } | {
            f"{what}_names": _listed(names)
            for what, names in (("weights_unmoved", unmoved), ("weights_without_gradient", without))
            if names
        }

    def _changed(self, trained: dict[str, tuple[Tensor, Tensor | None]]) -> dict[str, bool]:
        known = {
            n: seen
            for n, seen in self._seen.items()
            if n in trained and seen[1].device == trained[n][0].device
        }
        self._had_gradient = {name: graded for name, (_, _, graded) in known.items()}
        now = [trained[name][0][at] != value for name, (at, value, _) in known.items()]
        return {name: bool(changed) for name, changed in zip(known, _numbers(now), strict=True)}

    def _take(self, trained: dict[str, tuple[Tensor, Tensor | None]]) -> dict[str, bool]:
        at, sizes = {}, {}
        for name, (weight, gradient) in trained.items():
            if gradient is None:
                at[name] = self._seen[name][0] if name in self._seen else weight.abs().argmax()
                continue
            dense = gradient.coalesce().to_dense() if gradient.is_sparse else gradient
            size = _flat(dense).abs()
            at[name] = size.argmax()
            sizes[name] = size[at[name]].float()
        values = dict(zip(sizes, _numbers(list(sizes.values())), strict=True))
        largest = max(values.values(), default=0.0)
        graded = {name: values.get(name, 0.0) > ROUNDING * largest for name in trained}
        self._seen = {n: (at[n], weight[at[n]].clone(), graded[n]) for n, (weight, _) in trained.items()}
        return graded


def _flat(weight: Tensor) -> Tensor:
    """This process's part of a weight, as one row."""
    own = weight.to_local() if hasattr(weight, "to_local") else weight
    return own.reshape(-1)


def _numbers(values: list[Tensor]) -> list[float]:
    """Numbers of tensors, device by device, so that there is one copy from each."""
    result: list[float] = [0.0] * len(values)
    for device in {value.device for value in values}:
        places = [i for i, value in enumerate(values) if value.device == device]
        copied = torch.stack([values[i].reshape(()) for i in places]).tolist()
        for place, number in zip(places, copied, strict=True):
            result[place] = number
    return result


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
