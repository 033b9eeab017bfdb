"""Does a low training loss on repeated rows leave nothing to improve?

A classifier is trained on rows that are repeated until its training loss is as low as the notes' 0.076. How well it
does on other rows, and what twice as many *different* rows would have given, says how much was left.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from claims.training import encoder, fit
from nearfar.batching import LengthBatchSampler

QUANTITIES = {
    "train_loss": "cross-entropy on the repeated training rows, nats",
    "test_loss": "the same on other rows",
    "test_error": "share of other rows that are classified wrongly",
    "gain": "what twice as many different rows take from that error",
}


def run(
    seed: int,
    *,
    rows: int = 400,
    repeats: int = 2,
    test: int = 4000,
    dims: int = 32,
    classes: int = 3,
    noise: float = 2.0,
    target: float = 0.076,
    most_epochs: int = 300,
) -> dict[str, float]:
    """Draw rows around class means and train to ``target`` on ``rows`` of them, each ``repeats`` times an epoch."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, dims, generator=g) * dims**-0.5 * 2

    def draw(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(classes, (n,), generator=g)
        return means[labels] + noise * torch.randn(n, dims, generator=g) / 2, labels

    (x, y), (more_x, more_y), other = draw(rows), draw(rows), draw(test)
    loss, test_loss, error = _train(seed, x, y, other, repeats, target, most_epochs)
    both = torch.cat([x, more_x]), torch.cat([y, more_y])
    _, _, less = _train(seed, *both, other, max(1, repeats // 2), target, most_epochs)
    return {"train_loss": loss, "test_loss": test_loss, "test_error": error, "gain": error - less}


def _train(
    seed: int,
    x: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    other: tuple[Tensor, Tensor],
    repeats: int,
    target: float,
    most_epochs: int,
) -> tuple[float, float, float]:
    model = encoder(seed, x.shape[1], int(y.max()) + 1)
    counts = torch.full((len(x),), repeats).numpy()
    sampler = LengthBatchSampler(torch.ones(len(x)).numpy(), 32, repeats=counts, window=1, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    cross_entropy = torch.nn.functional.cross_entropy
    mean = float("inf")
    for epoch in range(most_epochs):
        sampler.set_epoch(epoch)
        values = fit(model, sampler, lambda batch: cross_entropy(model(x[batch]), y[batch]), optimizer)
        mean = sum(values) / len(values)
        if mean <= target:
            break
    model.eval()
    with torch.no_grad():
        logits = model(other[0])
    error = float((logits.argmax(1) != other[1]).double().mean())
    return mean, float(cross_entropy(logits, other[1])), error
