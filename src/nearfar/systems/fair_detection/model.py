"""What is trained: the generator of the perturbation and the projection head; and the scores that the gap remembers."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.losses import WassersteinGapLoss
from nearfar.models import ProjectionHead
from nearfar.systems.fair_detection.generator import PerturbationGenerator

__all__ = ["FairModel"]


class FairModel(nn.Module):
    """Generator, head and score queues; the frozen detector is no part of it, nor of its checkpoints.

    Args:
        width: length of the detector's query embeddings.
        channels, levels: of the generator.
        head_norm: "batch" or "layer": what normalises the head's hidden layer. Batches of seven make poor statistics.
        head_hidden, head_dim: sizes of the head.
        queue, form, rescale_gradient: see ``WassersteinGapLoss``.

    ``epsilon``, the bound of the perturbation, is a buffer: a checkpoint is evaluated with the bound of its epoch.

    >>> model = FairModel(width=256)
    >>> model.perturbation(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 3, 32, 32])
    """

    epsilon: Tensor

    def __init__(
        self,
        width: int,
        *,
        channels: int = 16,
        levels: int = 3,
        head_norm: str = "batch",
        head_hidden: int = 512,
        head_dim: int = 128,
        queue: int = 256,
        form: str = "exact",
        rescale_gradient: bool = True,
    ) -> None:
        super().__init__()
        self.generator = PerturbationGenerator(channels, levels)
        self.head = ProjectionHead(width, head_hidden, head_dim, norm=head_norm)
        self.wasserstein = WassersteinGapLoss(form, queue, rescale_gradient=rescale_gradient)
        self.register_buffer("epsilon", torch.tensor(0.0))

    @classmethod
    def from_config(cls, config: Any, width: int) -> FairModel:
        """As a system's configuration describes it."""
        return cls(
            width,
            channels=config.generator.channels,
            levels=config.generator.levels,
            head_norm=config.head_norm,
            head_hidden=config.head_hidden,
            head_dim=config.head_dim,
            queue=config.score_queue,
            form=config.wasserstein_form,
            rescale_gradient=config.rescale_gradient,
        )

    def perturbation(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """δ for pictures with values from 0 to 1, within the present bound."""
        return self.generator(pixels, 1.0) * self.epsilon
