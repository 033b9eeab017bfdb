"""A small encoder, trained: the loop that the experiments share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from claims.pairs import Pairs
from nearfar.batching import BatchSampler, HardNegativeSampler, RandomBatchSampler, nearest_neighbors
from nearfar.losses import InfoNCELoss, SimilarityMask
from nearfar.metrics import retrieval_ranks
from nearfar.models import ProjectionHead

__all__ = ["encoder", "fit", "fit_pairs", "mrr", "probe", "random_and_hard"]


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


def fit_pairs(
    model: nn.Module,
    pairs: Pairs,
    sampler: BatchSampler,
    epochs: int,
    *,
    lr: float = 2e-3,
    temperature: float = 0.07,
    mask_from: float | None = None,
    after: Callable[[int, float], Any] = lambda epoch, loss: None,
) -> None:
    """Train an encoder of views towards frozen texts with InfoNCE.

    ``mask_from``: negatives whose text has at least this cosine with the anchor's are left out. ``after`` is called
    with the number of epochs done and the mean loss of the last.
    """
    contrast, optimizer = InfoNCELoss(temperature), torch.optim.Adam(model.parameters(), lr=lr)

    def loss(batch: Tensor) -> Tensor:
        text = pairs.text[batch]
        mask = None if mask_from is None else SimilarityMask(text, mask_from)
        return contrast(model(pairs.view[batch]), text, mask=mask)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        values = fit(model, sampler, loss, optimizer)
        after(epoch + 1, sum(values) / len(values))


@torch.no_grad()
def mrr(model: nn.Module, pairs: Pairs) -> float:
    """Mean reciprocal rank of each text's view among all views; chance is about ln(n) / n."""
    model.eval()
    return float(retrieval_ranks(pairs.text, model(pairs.view)).reciprocal().mean())


def random_and_hard(
    seed: int,
    pairs: Pairs,
    unseen: Pairs,
    *,
    batch_size: int,
    hard_ratio: float,
    hardness_k: int,
    epochs: int,
    temperature: float = 0.07,
) -> tuple[float, float]:
    """MRR after random batches and after batches of which ``hard_ratio`` are hard, from the same start."""
    samplers: list[BatchSampler] = [
        RandomBatchSampler(len(pairs), batch_size, seed=seed),
        HardNegativeSampler(
            nearest_neighbors(pairs.text, hardness_k), batch_size, hard_ratio, hardness_k, seed=seed
        ),
    ]
    reached = []
    for sampler in samplers:
        model = encoder(seed, pairs.view.shape[1], pairs.text.shape[1])
        fit_pairs(model, pairs, sampler, epochs, temperature=temperature)
        reached.append(mrr(model, unseen))
    return reached[0], reached[1]


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
