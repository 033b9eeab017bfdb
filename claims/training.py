"""A small encoder, trained: the loop that the experiments share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar.models import ProjectionHead

__all__ = ["encoder", "fit", "probe"]


def encoder(seed: int, inputs: int, outputs: int, hidden: int = 128) -> ProjectionHead:
    """A two-layer encoder whose weights ``seed`` determines; the global generator stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ProjectionHead(inputs, hidden, outputs)


def fit(
    models: nn.Module,
    batches: Iterable[list[int]],
    loss: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
) -> list[float]:
    """One pass over the batches; returns the loss of each."""
    models.train()
    values = []
    for batch in batches:
        value = loss(torch.as_tensor(batch))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


def probe(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test_features: Float[Tensor, "m d"],
    test_labels: Int[Tensor, " m"],
    ridge: float = 1e-3,
) -> float:
    """Accuracy of a linear classifier on frozen features: least squares to one-hot labels, ridge, closed form.

    >>> probe(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3))
    1.0
    """

    def with_bias(rows: Tensor) -> Tensor:
        return torch.cat([rows.double(), torch.ones(len(rows), 1, dtype=torch.double)], 1)

    x = with_bias(features)
    wanted = nn.functional.one_hot(labels).double()
    penalty = ridge * len(x) * torch.eye(x.shape[1], dtype=torch.double)
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ wanted)
    return float(((with_bias(test_features) @ weights).argmax(1) == test_labels).double().mean())
