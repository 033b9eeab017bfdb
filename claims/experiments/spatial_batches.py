"""Do spatial targets do anything when the sampler does not bring neighbours into the batch?

Spots on a square grid, whose content varies smoothly from place to place. A spatial target gives some of its mass to
the neighbours of a spot, as far as they are in the batch: random batches hold few of them, compact batches (tiles of
the grid) nearly all. The loss with neighbours against the same loss without, from the same start, on the same batches.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from claims.pairs import mix
from claims.training import encoder, fit
from nearfar.batching import BatchSampler, RandomBatchSampler, SpatialBatchSampler, positions_in_batch
from nearfar.losses import SpatialLoss
from nearfar.metrics import retrieval_ranks

QUANTITIES = {
    "effect_random": "R@10 with neighbours in the target minus without, random batches",
    "effect_compact": "the same, compact batches",
    "reached_random": "share of rows with a neighbour in the batch, random batches",
    "reached_compact": "the same, compact batches",
    "mass_random": "mean share of the target's mass on neighbours, random batches",
    "mass_compact": "the same, compact batches",
    "recall_random": "R@10 without neighbours in the target, random batches",
    "recall_compact": "the same, compact batches",
}
SCALE = 14.3  # 1 / temperature, CLIP's at the start
STEPS = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]])


def run(
    seed: int,
    *,
    side: int = 64,
    tile: int = 8,
    dims: int = 16,
    smooth: int = 5,
    noise: float = 0.5,
    alpha_scale: float = 0.5,
    epochs: int = 6,
    lr: float = 1e-3,
) -> dict[str, float]:
    """Train four encoders: random or compact batches, with or without neighbours; test on a new slide."""
    image, text = two_slides(side, dims, smooth, noise, torch.Generator().manual_seed(seed))
    near = grid_neighbors(side)
    place, size = torch.cartesian_prod(torch.arange(side), torch.arange(side)), tile * tile
    samplers: dict[str, BatchSampler] = {
        "random": RandomBatchSampler(len(place), size, seed=seed),
        "compact": SpatialBatchSampler(place, None, size, size, seed=seed),
    }
    values: dict[str, float] = {}

    def trained(batches: str, kind: Literal["soft", "none"]) -> tuple[float, float, float]:
        """R@10 on the other slide; share of rows with a neighbour in the batch; mass that a target gives them."""
        model = nn.ModuleList([encoder(2 * seed + at, image.shape[-1], dims) for at in (0, 1)])
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        loss = SpatialLoss(alpha_scale, temp_reg_weight=0.0, neighbors=kind)
        reached: list[float] = []
        mass: list[float] = []

        def of_batch(batch: Tensor) -> Tensor:
            index = positions_in_batch(near[batch], batch)
            alpha = torch.full(index.shape, 1 / len(STEPS))
            taken = alpha_scale * (alpha * (index >= 0)).sum(1)
            reached.append(float((taken > 0).float().mean()))
            mass.append(float((taken / (1 + taken)).mean()))
            return loss(model[0](image[0, batch]), model[1](text[0, batch]), SCALE, index, alpha)

        sampler = samplers[batches]
        for epoch in range(epochs):  # the same batches with and without neighbours
            sampler.set_epoch(epoch)
            fit(model, sampler, of_batch, optimizer)
        with torch.no_grad():
            ranks = retrieval_ranks(model[0](image[1]), model[1](text[1]))
        return float(ranks.hits(10).mean()), sum(reached) / len(reached), sum(mass) / len(mass)

    for batches in samplers:
        with_neighbors, reached, mass = trained(batches, "soft")
        without, _, _ = trained(batches, "none")
        values |= {
            f"effect_{batches}": with_neighbors - without,
            f"reached_{batches}": reached,
            f"mass_{batches}": mass,
            f"recall_{batches}": without,
        }
    return values


def grid_neighbors(side: int) -> Tensor:
    """Four neighbours of each spot, -1 beyond the edge."""
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 1, 2)
    other = at + STEPS
    inside = ((other >= 0) & (other < side)).all(-1)
    return torch.where(inside, other[..., 0] * side + other[..., 1], -1)


def two_slides(side: int, dims: int, smooth: int, noise: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Image and text of a slide to train on and one to test on, (2, spots, features)."""
    field = torch.randn(2, dims, side + smooth - 1, side + smooth - 1, generator=g)
    field = (
        nn.functional.avg_pool2d(field, smooth, 1) * smooth
    )  # unit variance, correlated over ``smooth`` spots
    content = field.flatten(2).transpose(1, 2).reshape(2 * side * side, dims) / dims**0.5
    return tuple(mix(content, 2 * dims, noise, g).view(2, side * side, -1) for _ in range(2))  # type: ignore[return-value]
