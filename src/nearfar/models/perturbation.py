"""Bounded perturbations of pictures by a light U-Net, with the head and the queues of the losses that train it."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.errors import NearfarError
from nearfar.losses import WassersteinGapLoss
from nearfar.models.projection import ProjectionHead

__all__ = ["FairModel", "PerturbationGenerator", "perturbed"]


class PerturbationGenerator(nn.Module):
    """δ = ε · tanh(u(x)), u a U-Net (Ronneberger et al. 2015) on pixels from 0 to 1; every |δ| is at most ε.

    Four pixels that form a square are twelve channels of one place, at the input and at the output (Shi et al. 2016):
    no detail is lost, and a layer costs a quarter. ``channels`` of the first level double with each of the
    ``levels`` − 1 halvings that follow. Group norm, so that a picture's perturbation does not depend on its batch.
    Pictures of any size: their edges are repeated up to the next multiple of 2^levels, and the result is cut.

    The last layer starts at 0: before training nothing is changed, and the first step departs from the clean picture.

    >>> generator = PerturbationGenerator(channels=8, levels=3)
    >>> generator(torch.rand(2, 3, 30, 45), epsilon=0.05).abs().max()
    tensor(0., grad_fn=...)
    """

    def __init__(self, channels: int = 16, levels: int = 3) -> None:
        super().__init__()
        if channels < 8 or channels % 8:
            raise NearfarError(f"generator.channels={channels}: a multiple of 8 is needed.")
        if not 1 <= levels <= 6:
            raise NearfarError(f"generator.levels={levels} is out of range: 1 to 6.")
        widths = [channels * 2**level for level in range(levels)]
        self.start = _block(12, channels)
        self.down = nn.ModuleList(_block(a, b, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_block(a + b, a) for a, b in reversed(list(pairwise(widths))))
        self.end = nn.Conv2d(channels, 12, 1)
        nn.init.zeros_(self.end.weight)
        assert self.end.bias is not None
        nn.init.zeros_(self.end.bias)
        self.multiple = 2**levels

    def forward(self, pixels: Float[Tensor, "n 3 h w"], epsilon: float) -> Float[Tensor, "n 3 h w"]:
        height, width = pixels.shape[-2:]
        x = F.pixel_unshuffle(_padded(pixels - 0.5, self.multiple), 2)
        x = x.contiguous(memory_format=torch.channels_last)  # a quarter faster on a CPU
        maps = [self.start(x)]
        for block in self.down:
            maps.append(block(maps[-1]))
        x = maps.pop()
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([maps.pop(), x], dim=1))
        return epsilon * torch.tanh(F.pixel_shuffle(self.end(x), 2)[..., :height, :width])


def perturbed(pixels: Float[Tensor, "n 3 h w"], delta: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """The perturbed picture, with values that a picture can have: clamped to 0 … 1.

    >>> perturbed(torch.tensor([0.25, 0.875]), torch.tensor([0.25, 0.25]))
    tensor([0.5000, 1.0000])
    """
    return (pixels + delta).clamp(0.0, 1.0)


def _padded(pixels: Tensor, multiple: int) -> Tensor:
    height, width = pixels.shape[-2:]
    down, right = -height % multiple, -width % multiple
    return F.pad(pixels, (0, right, 0, down), mode="replicate") if down or right else pixels


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, 1, bias=False),
        nn.GroupNorm(out // 8, out),
        nn.ReLU(inplace=True),
        nn.Conv2d(out, out, 3, 1, 1, bias=False),
        nn.GroupNorm(out // 8, out),
        nn.ReLU(inplace=True),
    )


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

    def perturbation(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """δ for pictures with values from 0 to 1, within the present bound."""
        return self.generator(pixels, 1.0) * self.epsilon
