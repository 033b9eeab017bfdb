"""Do targets with mass on spatial neighbours do anything, and does it depend on what neighbours share?

Generated slides (`nearfar.data.slides.generated`) whose neighbouring spots are strangers (signal 0) or nearly the
same (signal 1). The loss of CLIP and the spatial loss train on the same batches from the same start, random batches
and tiles; both are tested on other slides.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from claims.training import encoder, fit
from nearfar.batching import (
    BatchSampler,
    RandomBatchSampler,
    SpatialBatchSampler,
    positions_in_batch,
    weight_in_batch,
)
from nearfar.data.slides.generated import generated_tissue
from nearfar.data.slides.tissue import Tissue
from nearfar.losses import SpatialLoss
from nearfar.metrics import retrieval_ranks
from nearfar.metrics.correlation import pearson
from nearfar.models import ProjectionHead
from nearfar.models.image.colors import color_statistics
from nearfar.models.probes import retrieved_expression

QUANTITIES = {
    "reached_random": "share of rows with a spatial neighbour in their batch, random batches",
    "reached_tiles": "the same, tiles",
    **{
        f"{metric}_{batches}_{signal}": f"{words}, spatial loss minus CLIP, {batches}, {shared}"
        for metric, words in {
            "r1": "R@1", "r5": "R@5", "r10": "R@10", "pearson": "correlation of retrieved expression",
        }.items()
        for batches in ("random", "tiles")
        for signal, shared in {"none": "neighbours are strangers", "strong": "neighbours are nearly the same"}.items()
    },
}  # fmt: skip
SIGNALS = {"none": 0.0, "strong": 1.0}
SCALE = 14.3  # 1 / temperature, CLIP's at the start
RETRIEVED = 30


def run(
    seed: int,
    *,
    slides: int = 5,
    side: int = 20,
    genes: int = 60,
    batch: int = 8,
    alpha_scale: float = 2.0,
    epochs: int = 3,
    lr: float = 2e-3,
) -> dict[str, float]:
    """Eight small models: two signals, two samplers, two losses; two of the slides are for the test."""
    values: dict[str, float] = {}
    for name, signal in SIGNALS.items():
        tissue = generated_tissue(slides, side, signal, 0.3, genes=genes, seed=seed)
        train, test = (tissue.select(tissue.slide_names[part]) for part in (slice(0, -2), slice(-2, None)))
        samplers: dict[str, BatchSampler] = {
            "random": RandomBatchSampler(len(train), batch, seed=seed),
            "tiles": SpatialBatchSampler(train.positions, train.slides, batch, batch, seed=seed),
        }
        for batches, sampler in samplers.items():
            reached = weight_in_batch(sampler.plan(0), train.neighbors) > 0
            values[f"reached_{batches}"] = float(reached.mean())
            scores = [
                _trained(train, test, sampler, kind, alpha_scale, epochs, lr, seed)
                for kind in ("none", "soft")
            ]
            for metric in scores[0]:
                values[f"{metric}_{batches}_{name}"] = scores[1][metric] - scores[0][metric]
    return values


def _trained(
    train: Tissue,
    test: Tissue,
    sampler: BatchSampler,
    kind: Literal["soft", "none"],
    alpha_scale: float,
    epochs: int,
    lr: float,
    seed: int,
) -> dict[str, float]:
    images, genes = (_standardised(train, test, view) for view in ("images", "genes"))
    model = nn.ModuleList([encoder(2 * seed + at, x[0].shape[1], 32) for at, x in enumerate((images, genes))])
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    loss = SpatialLoss(alpha_scale, temp_reg_weight=0.0, neighbors=kind)
    near, alpha = torch.from_numpy(train.neighbors), torch.from_numpy(np.asarray(train.alpha))

    def of_batch(rows: Tensor) -> Tensor:
        index = positions_in_batch(near[rows], rows)
        value: Tensor = loss(model[0](images[0][rows]), model[1](genes[0][rows]), SCALE, index, alpha[rows])
        return value

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        fit(model, sampler, of_batch, optimizer)
    return _scores(model[0], model[1], images, genes, train, test)


@torch.no_grad()
def _scores(
    image: ProjectionHead | nn.Module,
    gene: ProjectionHead | nn.Module,
    images: tuple[Tensor, Tensor],
    genes: tuple[Tensor, Tensor],
    train: Tissue,
    test: Tissue,
) -> dict[str, float]:
    seen = image(images[1])
    ranks = retrieval_ranks(seen, gene(genes[1]))
    predicted = retrieved_expression(seen, gene(genes[0]), train.expression, min(RETRIEVED, len(train)))
    values = {f"r{k}": float(ranks.hits(k).mean()) for k in (1, 5, 10)}
    return values | {"pearson": float(np.nanmean(pearson(predicted, test.expression)))}


def _standardised(train: Tissue, test: Tissue, view: str) -> tuple[Tensor, Tensor]:
    """Colour statistics, or expression, of both tissues, by mean and spread of the training spots."""
    parts = [color_statistics(t.patches) if view == "images" else t.expression for t in (train, test)]
    mean, sd = parts[0].mean(0), parts[0].std(0)
    first, second = (
        torch.from_numpy(((x - mean) / np.where(sd > 0, sd, 1)).astype(np.float32)) for x in parts
    )
    return first, second
