"""Which of the terms that the spatial loss adds to CLIP raises its training loss: cap, regulariser or neighbours?

The two-slide setting of ``spatial_batches`` with random batches, as in the notes, and with the learned scale of a
pretrained CLIP, 100, at the start. Each term is added alone; all arms are measured by the loss of CLIP itself, at the
scale at which the arm was trained, so that only what was learned differs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from claims.experiments.spatial_batches import STEPS, grid_neighbors, two_slides
from claims.training import encoder, fit
from nearfar.batching import RandomBatchSampler, positions_in_batch
from nearfar.losses import ClipLoss, SpatialLoss
from nearfar.metrics import retrieval_ranks

ARMS: dict[str, dict[str, Any]] = {
    "clip": {"neighbor_alpha_scale": 0.0, "temp_reg_weight": 0.0},
    "cap": {"neighbor_alpha_scale": 0.0, "temp_reg_weight": 0.0, "max_scale": 40.0},
    "reg": {"neighbor_alpha_scale": 0.0, "temp_reg_weight": 0.05},
    "neighbors": {"neighbor_alpha_scale": 0.5, "temp_reg_weight": 0.0},
    "all": {"neighbor_alpha_scale": 0.5, "temp_reg_weight": 0.05, "max_scale": 40.0},
}
QUANTITIES = {
    f"{what}_{arm}": f"{words} of the last epoch with {arm} minus plain CLIP"
    for arm in ARMS
    if arm != "clip"
    for what, words in {
        "loss": "training loss of CLIP, nats,",
        "recall": "R@10 on the other slide after training",
    }.items()
} | {
    "reached": "share of rows with a neighbour in the batch",
    "largest_other": "largest |loss| of reg and neighbors",
}
START = 100.0  # the learned scale of a pretrained CLIP


def run(
    seed: int,
    *,
    side: int = 48,
    batch: int = 32,
    dims: int = 16,
    smooth: int = 5,
    noise: float = 0.5,
    epochs: int = 3,
    lr: float = 1e-3,
) -> dict[str, float]:
    """Train each arm from the same start on the same batches."""
    image, text = two_slides(side, dims, smooth, noise, torch.Generator().manual_seed(seed))
    near = grid_neighbors(side)
    results = {
        name: _trained(image, text, near, options, seed, batch, dims, epochs, lr)
        for name, options in ARMS.items()
    }
    values = {"reached": results["clip"][2]}
    for name, (loss, recall, _) in results.items():
        if name != "clip":
            values |= {
                f"loss_{name}": loss - results["clip"][0],
                f"recall_{name}": recall - results["clip"][1],
            }
    return values | {"largest_other": max(abs(values["loss_reg"]), abs(values["loss_neighbors"]))}


def _trained(
    image: Tensor,
    text: Tensor,
    near: Tensor,
    options: dict[str, Any],
    seed: int,
    batch: int,
    dims: int,
    epochs: int,
    lr: float,
) -> tuple[float, float, float]:
    """CLIP's loss in the last epoch, R@10 on the other slide, share of rows with a neighbour in the batch."""
    model = nn.ModuleList([encoder(2 * seed + at, image.shape[-1], dims) for at in (0, 1)])
    log_scale = nn.Parameter(torch.tensor(math.log(START)))
    optimizer = torch.optim.Adam([*model.parameters(), log_scale], lr=lr)
    loss, plain = SpatialLoss(**options), ClipLoss(max_scale=options.get("max_scale"))
    values: list[float] = []
    reached: list[float] = []

    def of_batch(rows: Tensor) -> Tensor:
        a, b = model[0](image[0, rows]), model[1](text[0, rows])
        index = positions_in_batch(near[rows], rows)
        with torch.no_grad():
            values.append(float(plain(a, b, log_scale.exp())))
        reached.append(float((index >= 0).any(1).float().mean()))
        value: Tensor = loss(a, b, log_scale.exp(), index, torch.full(index.shape, 1 / len(STEPS)))
        return value

    sampler = RandomBatchSampler(len(near), batch, seed=seed)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        fit(model, sampler, of_batch, optimizer)
    with torch.no_grad():
        ranks = retrieval_ranks(model[0](image[1]), model[1](text[1]))
    last = values[-len(sampler) :]
    return sum(last) / len(last), float(ranks.hits(10).mean()), sum(reached) / len(reached)
