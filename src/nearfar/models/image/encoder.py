"""What every image encoder has in common: pixels in, features or a map of them out, and a name for the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from nearfar.errors import NearfarError

__all__ = ["STRIDES", "ImageEncoder"]

STRIDES = (16, 32)
_VERSION = 1  # of what an encoder computes around its network; part of every cache key


class ImageEncoder(nn.Module):
    """A convolutional network over pixels, without its classifier.

    Pixels are (n, 3, h, w), red first, uint8 or floats from 0 to 1; normalising them is the encoder's affair.
    ``encoder(pixels)`` gives (n, ``width``) features, the mean of the last map over positions, and
    ``encoder.feature_map(pixels, stride)`` the maps before it: (n, ``channels[stride]``, ⌈h/stride⌉, ⌈w/stride⌉).

    Args:
        name: of the architecture, for ``description``.
        origin: where the weights come from, as in "ImageNet weights, FILE"; None where they are random.
        channels: of the maps at stride 16 and 32.
        mean, std: what the network was trained to see subtracted and divided by, for each colour, of pixels in [0, 1].
        frozen: no gradient, and batch statistics stay as loaded whatever ``train()`` asks.

    A network defines ``stages``.
    """

    kind: str

    def __init__(
        self,
        name: str,
        origin: str | None,
        channels: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        frozen: bool,
    ) -> None:
        super().__init__()
        self.name = name
        self.origin = origin
        self.channels = dict(zip(STRIDES, channels, strict=True))
        self.frozen = frozen
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def stages(self, x: Float[Tensor, "n 3 h w"], stride: int) -> Float[Tensor, "n c hs ws"]:
        """The network over normalised pixels, up to the map at this stride."""
        raise NotImplementedError

    def continued(self, early: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d hs ws"]:
        """The map at stride 32 from that at stride 16, so that the first half of a network can be computed once."""
        raise NearfarError(
            f"image_encoder={self.kind} cannot be cut at stride 16: its first half cannot be kept. Take efficientnet, "
            "mobilenet or small."
        )

    @property
    def pretrained(self) -> bool:
        """Whether the network started from trained weights."""
        return self.origin is not None

    @property
    def width(self) -> int:
        """How many features a picture gets."""
        return self.channels[32]

    @property
    def description(self) -> str:
        """What is really used: architecture, where the weights come from, whether they train, features."""
        weights = self.origin or "random weights, never trained on any picture"
        return f"{self.name} ({weights}; {'frozen' if self.frozen else 'trainable'}), {self.width} features"

    def fingerprint(self) -> str:
        """Names what this encoder computes: its code's version, its normalisation and every weight as it is now."""
        digest = hashlib.sha256(f"{type(self).__name__} {_VERSION} {self.name}\n".encode())
        tensors = {**self.state_dict(), "mean": self.mean, "std": self.std}
        for key in sorted(tensors):
            value = tensors[key].detach().cpu().contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
        return f"{self.kind}-{digest.hexdigest()[:32]}"

    def forward(self, pixels: Shaped[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        """One row of features for each picture."""
        return self.feature_map(pixels, 32).mean((2, 3))

    def feature_map(self, pixels: Shaped[Tensor, "n 3 h w"], stride: int = 32) -> Float[Tensor, "n c hs ws"]:
        """Features where they are in the picture, one position for ``stride`` × ``stride`` pixels."""
        if stride not in self.channels:
            raise NearfarError(f"stride={stride}: an image encoder has maps at strides 16 and 32")
        return self.stages(self.normalized(pixels), stride)

    def normalized(self, pixels: Shaped[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """Checked pixels as the network was trained to see them."""
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise NearfarError(
                f"pixels have shape {tuple(pixels.shape)}, but (n, 3, height, width) is needed"
            )
        if min(pixels.shape[2:]) < 32:
            height, width = pixels.shape[2:]
            raise NearfarError(
                f"pictures of {height} × {width} pixels: an image encoder needs at least 32 × 32"
            )
        if pixels.dtype == torch.uint8:
            pixels = pixels.to(self.mean.dtype) / 255
        elif not pixels.is_floating_point():
            raise NearfarError(f"pixels are {pixels.dtype}: uint8, or floats from 0 to 1, are needed")
        elif pixels.numel() and not 0 <= float(pixels.detach().min()) <= float(pixels.detach().max()) <= 1:
            low, high = float(pixels.min()), float(pixels.max())
            raise NearfarError(
                f"pixels range from {low:.3g} to {high:.3g}: floats from 0 to 1 are needed "
                "(the encoder normalises them)"
            )
        return (pixels - self.mean) / self.std

    def train(self, mode: bool = True) -> ImageEncoder:
        """Training mode, unless the encoder is frozen: then its batch norms go on using what they were loaded with."""
        return super().train(mode and not self.frozen)

    def finish(self) -> ImageEncoder:
        """Freeze, if that was asked; called by a subclass once its weights are there."""
        if self.frozen:
            self.requires_grad_(False)
            self.eval()
        return self
