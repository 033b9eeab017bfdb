"""Can a projection head with batch normalisation be trained in batches of seven, and what does it then say of a row?

Features of rows that score high and of rows that score low differ in one direction, beside noise. A head is trained to
pull low rows to high ones, once with batch and once with layer normalisation. Afterwards the loss is taken of the same
new batches in evaluation mode, where batch normalisation uses its running statistics.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nearfar.losses import AdaptiveScoreContrastiveLoss
from nearfar.models import ProjectionHead

QUANTITIES = {
    "loss_batch": "loss of new batches, in evaluation mode, after training with batch normalisation",
    "loss_layer": "the same with layer normalisation",
    "ratio": "the first over the second",
    "wobble_batch": "1 − cosine of a row's embeddings in two batches, in training mode, batch normalisation",
    "wobble_layer": "the same with layer normalisation",
}


def run(
    seed: int,
    *,
    steps: int = 300,
    batch_size: int = 7,
    width: int = 256,
    separation: float = 1.0,
    new_batches: int = 200,
) -> dict[str, float]:
    """Train both heads on the same batches; ``new_batches`` measure them."""
    g = torch.Generator().manual_seed(seed)
    direction = normalize(torch.randn(width, generator=g), dim=0)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        scores = torch.rand(n, generator=g)
        noise = torch.randn(n, width, generator=g) / width**0.5
        return noise + separation * (scores - 0.5)[:, None] * direction, scores

    training = [draw(batch_size) for _ in range(steps)]
    new = [draw(batch_size) for _ in range(new_batches)]
    row = draw(1)[0]
    values = {}
    for norm in ("batch", "layer"):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = ProjectionHead(width, 512, 128, norm=norm)
        loss, optimizer = AdaptiveScoreContrastiveLoss(), torch.optim.AdamW(head.parameters(), lr=1e-4)
        for features, scores in training:
            optimizer.zero_grad()
            loss(head(features), scores).backward()
            optimizer.step()
        with torch.no_grad():
            embedded = [normalize(head(torch.cat([row, x[1:]]))[0], dim=0) for x, _ in new]
            values[f"wobble_{norm}"] = float(1 - torch.stack([a @ b for a, b in pairwise(embedded)]).mean())
            head.eval()
            values[f"loss_{norm}"] = float(torch.stack([loss(head(x), s) for x, s in new]).mean())
    return values | {"ratio": values["loss_batch"] / values["loss_layer"]}
