"""A small convolutional network that is trained from scratch: the embedded default needs no weights."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from nearfar.errors import NearfarError
from nearfar.models.image.encoder import ImageEncoder

__all__ = ["SmallImageEncoder"]


class SmallImageEncoder(ImageEncoder):
    """Five 3 × 3 convolutions of stride 2 with batch norm and ReLU, then one of stride 1: 0.4 million weights.

    Args:
        features: channels of the last map and length of the vectors; the maps before it have a sixteenth, an eighth,
            a quarter, a half of it and all of it.
        pretrained: there are no trained weights, so that only False can be asked for.
        frozen: leave it as it is initialised: a control, "what does an untrained network give?".

    >>> import torch
    >>> encoder = SmallImageEncoder(features=64)
    >>> encoder(torch.zeros(2, 3, 64, 96)).shape, encoder.feature_map(torch.zeros(2, 3, 64, 96), 16).shape
    (torch.Size([2, 64]), torch.Size([2, 32, 4, 6]))
    """

    kind = "small"

    def __init__(self, features: int = 256, pretrained: bool = False, frozen: bool = False) -> None:
        if pretrained:
            raise NearfarError(
                "image_encoder=small has no trained weights: set image_encoder.pretrained=false, or take "
                "image_encoder=efficientnet, mobilenet or transformers."
            )
        if not isinstance(features, int) or isinstance(features, bool) or features < 16 or features % 16:
            raise NearfarError(f"image_encoder.features={features}: a multiple of 16 is needed.")
        super().__init__("six convolutions", None, (features // 2, features), (0.5,) * 3, (0.25,) * 3, frozen)
        widths = [3] + [features // k for k in (16, 8, 4, 2)]
        self.to_16 = nn.Sequential(*(_conv(a, b, 2) for a, b in pairwise(widths)))
        self.to_32 = nn.Sequential(_conv(widths[-1], features, 2), _conv(features, features, 1))
        self.finish()

    def stages(self, x: Float[Tensor, "n 3 h w"], stride: int) -> Float[Tensor, "n c hs ws"]:
        early = self.to_16(x)
        return early if stride == 16 else self.continued(early)

    def continued(self, early: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d hs ws"]:
        return self.to_32(early)


def _conv(channels: int, out: int, stride: int) -> nn.Sequential:
    layer = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(out), nn.ReLU(inplace=True))
