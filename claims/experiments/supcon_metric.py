"""Does supervised contrastive learning fail for lack of positives, or does the metric measure something else?

Two views of labelled items, five classes of unequal size, batches of 24. Exact-pair retrieval looks for an item's own
partner among the batch; a loss that makes all items of a class alike, and whose own pair is left out, is trained to
discard just that. A linear probe measures the class. Both numbers are measured for InfoNCE, for the supervised loss
reported to fail (sum inside the logarithm, own pair left out), for the usual one, and for an encoder that knows the
class and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from claims.pairs import mix
from claims.training import encoder, fit, probe
from nearfar.batching import RandomBatchSampler
from nearfar.losses import InfoNCELoss, SupConLoss
from nearfar.metrics import RecallAtK

#: shares of the classes
CLASSES = (0.488, 0.186, 0.153, 0.110, 0.063)

QUANTITIES = {
    "pair_infonce": "exact-pair retrieval in the batch (chance 1 / batch), InfoNCE",
    "pair_supcon": "the same, supervised loss reported to fail",
    "pair_usual": "the same, usual supervised loss",
    "pair_class_only": "the same, an encoder that gives the class and nothing else",
    "pair_difference": "supervised loss reported to fail minus InfoNCE, exact-pair retrieval",
    "probe_infonce": "accuracy of a linear probe, InfoNCE",
    "probe_untrained": "the same, before training",
    "probe_difference": "supervised loss reported to fail minus InfoNCE, accuracy of a linear probe",
    "probe_difference_usual": "usual supervised loss minus InfoNCE, accuracy of a linear probe",
    "positives": "positives per anchor that the supervised loss saw, own pair left out",
}


@dataclass
class _Views:
    first: Tensor
    second: Tensor
    label: Tensor


def run(
    seed: int,
    *,
    items: int = 2400,
    test: int = 1200,
    dims: int = 16,
    within: float = 1.5,
    noise: float = 1.0,
    batch_size: int = 24,
    epochs: int = 6,
    lr: float = 1e-3,
) -> dict[str, float]:
    """Train each loss on the same batches and ask both questions of each."""
    data = _labelled_views(seed, items + test, dims, within, noise)
    supcon = SupConLoss(0.07, sum="inside", own_pair=False)
    usual, infonce = SupConLoss(0.07), InfoNCELoss(0.07)
    positives: list[float] = []

    def failing(a: Tensor, b: Tensor, label: Tensor) -> Tensor:
        value = supcon(a, label, other=b)
        positives.append(supcon.record.positives_per_row if supcon.record else 0.0)
        return value

    losses: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "infonce": lambda a, b, label: infonce(a, b),
        "supcon": failing,
        "usual": lambda a, b, label: usual(a, label, other=b),
    }
    pair, accuracy = {}, {"untrained": _probe(_encoders(seed, data, dims), data, items)}
    for name, loss in losses.items():
        models = _encoders(seed, data, dims)
        _train(
            models, data, loss, RandomBatchSampler(items, batch_size, seed=seed, drop_last=True), epochs, lr
        )
        with torch.no_grad():
            pair[name] = _pair(models[0](data.first[items:]), models[1](data.second[items:]), batch_size)
        accuracy[name] = _probe(models, data, items)
    known = nn.functional.one_hot(data.label[items:]).float()
    return {
        **{f"pair_{name}": value for name, value in pair.items()},
        "pair_class_only": _pair(known, known, batch_size),
        "pair_difference": pair["supcon"] - pair["infonce"],
        "probe_infonce": accuracy["infonce"],
        "probe_untrained": accuracy["untrained"],
        "probe_difference": accuracy["supcon"] - accuracy["infonce"],
        "probe_difference_usual": accuracy["usual"] - accuracy["infonce"],
        "positives": sum(positives) / len(positives),
    }


def _encoders(seed: int, data: _Views, dims: int) -> nn.ModuleList:
    return nn.ModuleList([encoder(2 * seed + side, data.first.shape[1], dims) for side in (0, 1)])


def _train(
    models: nn.ModuleList,
    data: _Views,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    sampler: RandomBatchSampler,
    epochs: int,
    lr: float,
) -> None:
    optimizer = torch.optim.Adam(models.parameters(), lr=lr)

    def of_batch(batch: Tensor) -> Tensor:
        return loss(models[0](data.first[batch]), models[1](data.second[batch]), data.label[batch])

    for _ in range(epochs):
        fit(models, sampler, of_batch, optimizer)


def _labelled_views(seed: int, n: int, dims: int, within: float, noise: float) -> _Views:
    g = torch.Generator().manual_seed(seed)
    label = torch.multinomial(torch.tensor(CLASSES), n, replacement=True, generator=g)
    centres = torch.randn(len(CLASSES), dims, generator=g)
    content = (centres[label] + within * torch.randn(n, dims, generator=g)) / dims**0.5
    first, second = (mix(content, 2 * dims, noise, g) for _ in range(2))
    return _Views(first, second, label)


def _pair(first: Tensor, second: Tensor, batch_size: int) -> float:
    """Share of rows whose own partner is the nearest in their batch; ties count by expectation."""
    a, b = (nn.functional.normalize(rows, dim=-1).split(batch_size) for rows in (first, second))
    whole = [(x, y) for x, y in zip(a, b, strict=True) if len(x) == batch_size]
    return float(sum(RecallAtK(1)(x @ y.T) for x, y in whole) / len(whole))


@torch.no_grad()
def _probe(models: nn.ModuleList, data: _Views, items: int) -> float:
    models.eval()
    both = (models[0](data.first), models[1](data.second))
    features = torch.cat([nn.functional.normalize(rows, dim=-1) for rows in both], 1)
    return probe(features[:items], data.label[:items], features[items:], data.label[items:])
