"""How does supervised contrastive learning depend on the number of positives per anchor?

Batches of one size hold ever fewer classes with ever more items of each, so that an anchor has 1, 2, 4 or 8 positives
and the number of candidates stays. Judged by a linear probe on unseen items.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from claims.pairs import mix
from claims.training import encoder, fit, probe
from nearfar.batching import BalancedBatchSampler
from nearfar.errors import NearfarError
from nearfar.losses import SupConLoss

QUANTITIES = {
    "accuracy_fewest": "accuracy of a linear probe with the fewest positives",
    "accuracy_most": "the same with the most",
    "loss_from_few": "the latter minus the former",
    "slope": "accuracy gained by each doubling of the positives, least squares",
    "largest_step": "largest gain from one number of positives to the next",
    "realised_fewest": "positives per anchor that the loss saw, fewest",
    "realised_most": "the same, most",
    "untrained": "accuracy of a linear probe before training",
}


def run(
    seed: int,
    *,
    classes: int = 60,
    per_class: int = 36,
    test: int = 1800,
    dims: int = 16,
    within: float = 0.8,
    noise: float = 0.5,
    positives: Sequence[int] = (1, 2, 4, 8),
    batch_size: int = 90,
    epochs: int = 15,
    lr: float = 1e-3,
) -> dict[str, float]:
    """Train once for each number of positives, on equally many batches of the same size."""
    needed = -(-batch_size // (min(positives) + 1))
    if needed > classes:
        raise NearfarError(
            f"{min(positives)} positives per anchor in a batch of {batch_size} take {needed} classes, not {classes}"
        )
    g = torch.Generator().manual_seed(seed)
    items = classes * per_class
    label = torch.cat([torch.arange(items) % classes, torch.randint(classes, (test,), generator=g)])
    centres = torch.randn(classes, dims, generator=g)
    content = (centres[label] + within * torch.randn(len(label), dims, generator=g)) / dims**0.5
    view = mix(content, 2 * dims, noise, g)

    def accuracy(model: torch.nn.Module) -> float:
        with torch.no_grad():
            features = torch.nn.functional.normalize(model(view), dim=-1)
        return probe(features[:items], label[:items], features[items:], label[items:])

    def trained(number: int) -> tuple[float, float]:
        """Accuracy, and the positives per anchor that the loss saw."""
        model, loss = encoder(seed, view.shape[1], dims), SupConLoss(0.1)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        sampler = BalancedBatchSampler(label[:items], batch_size, number + 1, seed=seed, drop_last=True)
        counts: list[float] = []

        def of_batch(batch: Tensor) -> Tensor:
            value = loss(model(view[batch]), label[batch])
            counts.append(loss.record.positives_per_row if loss.record else 0.0)
            return value

        for _ in range(epochs):
            fit(model, sampler, of_batch, optimizer)
        return accuracy(model), sum(counts) / len(counts)

    untrained = accuracy(encoder(seed, view.shape[1], dims))
    accuracies, seen = zip(*map(trained, positives), strict=True)
    slope = np.polyfit(np.log2(np.array(positives, dtype=float)), accuracies, 1)[0]
    return {
        "accuracy_fewest": accuracies[0],
        "accuracy_most": accuracies[-1],
        "loss_from_few": accuracies[-1] - accuracies[0],
        "slope": float(slope),
        "largest_step": float(np.diff(accuracies).max()),
        "realised_fewest": seen[0],
        "realised_most": seen[-1],
        "untrained": untrained,
    }
