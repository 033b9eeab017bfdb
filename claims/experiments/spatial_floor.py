"""Can a spatial loss and CLIP be compared by their values?

The least that a loss can reach is the entropy of its target: 0 for CLIP, more for a target with mass on neighbours.
"""

from __future__ import annotations

import torch

from nearfar.losses import SpatialLoss

QUANTITIES = {
    "floor_clip": "least value of CLIP, nats",
    "floor_spatial": "least value of the spatial loss with all neighbours in the batch, nats",
    "floor_difference": "the latter minus the former",
}


def run(*, neighbors: int = 6, alpha_scale: float = 0.5) -> dict[str, float]:
    """A ring of spots in which each has ``neighbors`` neighbours of equal weight, all of them in the batch.

    >>> round(run()["floor_difference"], 2)
    1.23
    """
    n = 2 * neighbors + 1
    index = (torch.arange(n)[:, None] + torch.arange(1, neighbors + 1)) % n
    alpha = torch.full((n, neighbors), 1 / neighbors)
    floors = {}
    for name, kind in (("spatial", "soft"), ("clip", "none")):
        loss = SpatialLoss(alpha_scale, temp_reg_weight=0.0, neighbors="soft" if kind == "soft" else "none")
        loss(torch.eye(n), torch.eye(n), 10.0, index, alpha)
        assert loss.record is not None
        floors[f"floor_{name}"] = loss.record.floor
    return floors | {"floor_difference": floors["floor_spatial"] - floors["floor_clip"]}
