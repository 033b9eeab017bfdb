"""A small detector that learns from about a thousand pictures: every place proposes, a few queries decide.

The maps of its encoder's first half can be computed once for views of all pictures and kept in the cache.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nearfar.data.cache import cached_arrays
from nearfar.data.coco import CocoSplit
from nearfar.data.detection import KeptView, Target, View, show
from nearfar.data.files import Json
from nearfar.models.detection.detector import Detector, DetectorOutput, SetLoss, corners
from nearfar.models.image import ImageEncoder

__all__ = ["SmallDetector", "cached_maps", "fold_batch_norms", "pictures_hash"]


def fold_batch_norms(module: nn.Module) -> int:
    """Fold each batch norm that stands right after a convolution in the same module; returns how many.

    For modules that apply their children in the order in which they were defined, as the image encoders do. The module
    must be in eval mode, and keeps the same outputs within rounding; its weights have other names afterwards.

    >>> import torch
    >>> layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> _ = layer[1].running_mean.fill_(0.5)
    >>> pixels = torch.rand(1, 3, 8, 8)
    >>> before = layer(pixels)
    >>> fold_batch_norms(layer), bool(torch.allclose(layer(pixels), before, atol=1e-6))
    (1, True)
    """
    folded = 0
    last: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and last is not None and isinstance(last[1], nn.Conv2d):
            setattr(module, last[0], fuse_conv_bn_eval(last[1], child))
            setattr(module, name, nn.Identity())
            folded, last = folded + 1, None
        else:
            folded += fold_batch_norms(child)
            last = (name, child)
    return folded


GRID = 5  # points of a box along each side that a query looks at
PROPOSALS_PER_BOX = 6  # places that learn from one true box


class SmallDetector(Detector):
    """An image encoder, a mixed map at stride 16, proposals, and a decoder of a few layers.

    Args:
        encoder: pictures to maps; the batch norms of a trained one keep the statistics they came with.
        classes: see `Detector`.
        queries: how many proposals are looked at.
        width: d, a multiple of 4 and of ``heads``.
        layers: of the decoder.
        heads: of its attention.
        dropout: in the decoder.
        loss: see `Detector`.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        classes: Sequence[str],
        queries: int = 20,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        loss: SetLoss | None = None,
    ) -> None:
        super().__init__(classes, width, f"{layers} decoder layers over {encoder.description}", loss)
        self.encoder = encoder
        #: the options that it was built with, where they are known
        self.recipe: Json = {}
        self.queries = queries
        self.narrow_16 = nn.Conv2d(encoder.channels[16], width, 1)
        self.narrow_32 = nn.Conv2d(encoder.channels[32], width, 1)
        self.mix = nn.Sequential(_Mixer(width), _Mixer(width))
        self.norm = nn.LayerNorm(width)
        self.propose = _Head(width, len(self.classes))
        self.size = nn.Parameter(torch.zeros(2))
        self.content = nn.Linear(width, width)
        self.layers = nn.ModuleList(_Layer(width, heads, dropout) for _ in range(layers))
        #: whether the encoder's first half has learned, so that maps kept of it are stale
        self.moved: Tensor
        self.register_buffer("moved", torch.tensor(False))
        self.heads = nn.ModuleList(_Head(width, len(self.classes)) for _ in range(layers))
        self.train()

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> DetectorOutput:
        return self.decode(self.early(pixels))

    def early(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c hs ws"]:
        """The encoder's map at stride 16."""
        # Colours last in memory: a quarter faster on a CPU.
        return self.encoder.feature_map(pixels.contiguous(memory_format=torch.channels_last), 16)

    def decode(self, early: Float[Tensor, "n c hs ws"]) -> DetectorOutput:
        """Everything after ``early``."""
        early = early.contiguous(memory_format=torch.channels_last)
        late = self.encoder.continued(early)
        mixed = self.narrow_16(early) + F.interpolate(
            self.narrow_32(late), size=early.shape[2:], mode="bilinear", align_corners=False
        )
        mixed = self.norm(self.mix(mixed).permute(0, 2, 3, 1))
        n, h, w, d = mixed.shape
        places = _places(h, w, mixed)
        memory = mixed.flatten(1, 2)
        where = sine(places[:, :2], d)
        anchors = torch.cat([_logit(places), self.size.expand(h * w, 2)], dim=1)
        proposals = self.propose(memory, anchors.expand(n, -1, -1), PROPOSALS_PER_BOX)
        best = proposals.logits.softmax(-1)[..., -1].topk(min(self.queries, h * w), largest=False)[1]
        rows = torch.arange(n, device=best.device)[:, None]
        boxes, content = proposals.boxes[rows, best].detach(), self.content(memory[rows, best])
        earlier = [proposals]
        for layer, head in zip(self.layers, self.heads, strict=True):
            content = layer(content, boxes, memory, where, mixed)
            output = head(content, _logit(boxes))
            boxes = output.boxes.detach()
            earlier.append(output)
        return DetectorOutput(output.logits, output.boxes, output.features, earlier[:-1])

    def freeze(self) -> SmallDetector:
        """See `Detector.freeze`; the encoder's batch norms are folded into its convolutions, a quarter faster again."""
        super().freeze()
        fold_batch_norms(self.encoder)
        self.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self.requires_grad_(False)

    def train(self, mode: bool = True) -> SmallDetector:
        """Training mode; the statistics of a trained encoder stay, because a few pictures would spoil them."""
        super().train(mode)
        if self.encoder.pretrained:
            self.encoder.eval()
        return self


class _Mixer(nn.Module):
    """A look at the neighbours, channel by channel, then across channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Float[Tensor, "n d h w"]) -> Float[Tensor, "n d h w"]:
        near = self.norm(self.near(x).permute(0, 2, 3, 1))
        return x + self.across(near).permute(0, 3, 1, 2)


class _Head(nn.Module):
    """Logits, and a box relative to a reference, of each embedding."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, classes + 1)
        last = nn.Linear(width, 4)
        self.box = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)
        with torch.no_grad():
            last.weight.zero_()
            last.bias.zero_()
            self.classify.bias.zero_()
            self.classify.bias[-1] = 3.0  # nearly every query says "nothing"

    def forward(self, x: Tensor, reference: Tensor, repeat: int = 1) -> DetectorOutput:
        return DetectorOutput(self.classify(x), (self.box(x) + reference).sigmoid(), x, repeat=repeat)


class _Layer(nn.Module):
    """Queries look at each other, at all places, and at points inside their boxes."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.position = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.among = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.around = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.squeeze = nn.Linear(width, width // 4)
        self.within = nn.Linear(width // 4 * GRID * GRID, width)
        self.think = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, boxes: Tensor, memory: Tensor, where: Tensor, mixed: Tensor) -> Tensor:
        own = self.position(sine(boxes, 2 * x.shape[-1]))
        q = x + own
        x = self.norms[0](x + self.dropout(self.among(q, q, x, need_weights=False)[0]))
        looked = self.around(x + own, memory + where, memory, need_weights=False)[0]
        x = self.norms[1](x + self.dropout(looked))
        x = self.norms[2](x + self.dropout(self.within(inside(self.squeeze(mixed), boxes))))
        return self.norms[3](x + self.dropout(self.think(x)))


def inside(mixed: Float[Tensor, "n h w d"], boxes: Float[Tensor, "n q 4"]) -> Float[Tensor, "n q points"]:
    """The map at ``GRID`` × ``GRID`` points of each box, from its edge to its other edge."""
    n, q = boxes.shape[:2]
    steps = torch.linspace(0, 1, GRID, device=boxes.device, dtype=boxes.dtype)
    left, top, right, bottom = corners(boxes)[..., None].unbind(-2)
    x = (left + (right - left) * steps)[:, :, None, :].expand(n, q, GRID, GRID)
    y = (top + (bottom - top) * steps)[:, :, :, None].expand(n, q, GRID, GRID)
    points = torch.stack([x, y], dim=-1) * 2 - 1
    sampled = F.grid_sample(
        mixed.permute(0, 3, 1, 2), points.flatten(2, 3), padding_mode="border", align_corners=False
    )
    return sampled.permute(0, 2, 3, 1).flatten(2)


def sine(values: Float[Tensor, "*n k"], width: int) -> Float[Tensor, "*n width"]:
    """Each of k numbers in [0, 1] as ``width // k`` sines and cosines of growing wavelength."""
    k = values.shape[-1]
    half = width // k // 2
    rate = 2 * math.pi * 100 ** (torch.arange(half, device=values.device, dtype=values.dtype) / half) / 10
    angle = values[..., None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def _places(h: int, w: int, like: Tensor) -> Float[Tensor, "hw 2"]:
    y = (torch.arange(h, device=like.device, dtype=like.dtype) + 0.5) / h
    x = (torch.arange(w, device=like.device, dtype=like.dtype) + 0.5) / w
    return torch.stack([x.repeat(h), y.repeat_interleave(w)], dim=1)


def _logit(values: Tensor) -> Tensor:
    return values.clamp(1e-3, 1 - 1e-3).logit()


_VERSION = 1  # of cached maps; part of their key
_ROWS = 16  # pictures that go through the encoder at a time


def cached_maps(
    split: CocoSplit,
    encoder: ImageEncoder,
    size: int,
    views: int,
    view: View | None,
    seed: int,
    say: Callable[[str], None],
) -> list[KeptView]:
    """For each view the map at stride 16 of every picture, and the true boxes in it.

    The first view is the picture itself, in single precision; the others are drawn from (``seed``, view, position) and
    kept in half precision. They lie in the cache under everything they depend on, pictures and weights included.
    """
    pictures = pictures_hash(split)
    print_ = encoder.fingerprint()
    kept: list[KeptView] = []
    for number in range(views):
        drawn = None if number == 0 else view
        key = [_VERSION, pictures, split.content, print_, size, number, vars(drawn) if drawn else None, seed]

        def compute(number: int = number, drawn: View | None = drawn) -> dict[str, np.ndarray]:
            start = time.monotonic()
            arrays_of_view = _compute(split, size, encoder, number, drawn, seed)
            say(
                f"view {number + 1} of {views}: maps of {len(split)} pictures in {time.monotonic() - start:.0f} s"
            )
            return arrays_of_view

        arrays = cached_arrays("detector_maps", key, compute)
        kept.append((torch.from_numpy(arrays["maps"]), _unpacked(arrays)))
    return kept


def pictures_hash(split: CocoSplit) -> str:
    """Names the bytes of all pictures, in order."""
    digest = hashlib.sha256()
    for image in split.images:
        known = image.digest or hashlib.sha256(image.path.read_bytes()).hexdigest()
        digest.update(bytes.fromhex(known))
    return digest.hexdigest()


def _compute(
    split: CocoSplit, size: int, encoder: ImageEncoder, number: int, view: View | None, seed: int
) -> dict[str, np.ndarray]:
    maps, targets = [], []
    for start in range(0, len(split), _ROWS):
        positions = range(start, min(start + _ROWS, len(split)))
        shown = [show(split, i, size, view, (seed, number, i)) for i in positions]
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in shown]))
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # as the detector has them
        targets += [target for _, target in shown]
        with torch.no_grad():
            features = encoder.feature_map(pixels, 16)
        maps.append((features if number == 0 else features.half()).numpy())
    return {
        "maps": np.concatenate(maps),
        "boxes": np.concatenate([t.boxes.numpy() for t in targets]),
        "labels": np.concatenate([t.labels.numpy() for t in targets]),
        "counts": np.array([len(t.labels) for t in targets]),
    }


def _unpacked(arrays: dict[str, np.ndarray]) -> list[Target]:
    counts = arrays["counts"].tolist()
    labels, boxes = (torch.from_numpy(arrays[name]).split(counts) for name in ("labels", "boxes"))
    return [Target(label, box) for label, box in zip(labels, boxes, strict=True)]
