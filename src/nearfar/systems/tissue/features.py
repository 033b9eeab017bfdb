"""Inputs of the towers: pixels, frozen image features or colour statistics of a patch; gene sentences of a spot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import nn

from nearfar.data.cache import cached_array
from nearfar.data.files import Json
from nearfar.models.image import ImageEncoder, build_image_encoder
from nearfar.models.image.colors import color_statistics
from nearfar.systems.tissue.options import TissueOptions
from nearfar.systems.tissue.records import Tissue

__all__ = [
    "ImageFeatures",
    "Resized",
    "color_features",
    "gene_sentences",
    "ridge_predictions",
]


def ridge_predictions(
    train: Float[np.ndarray, "n d"],
    values: Float[np.ndarray, "n g"],
    test: Float[np.ndarray, "m d"],
    penalty: float = 1.0,
) -> Float[np.ndarray, "m g"]:
    """Ridge regression of ``values`` on ``train``, for the rows of ``test``.

    Features are standardised by the training rows; the penalty on squared weights is ``penalty`` per hundred rows.

    >>> x = np.arange(6.0)[:, None]
    >>> ridge_predictions(x, 2 * x + 1, np.array([[10.0]]), penalty=1e-9).round(3)
    array([[21.]])
    """
    mean, sd = train.mean(0), train.std(0)
    sd = np.where(sd > 1e-8 * np.maximum(1.0, np.abs(mean)), sd, 1.0)
    x, centre = (train - mean) / sd, values.mean(0)
    gram = x.T @ x + penalty * len(x) / 100 * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (values - centre))
    predicted: Float[np.ndarray, "m g"] = (test - mean) / sd @ weights + centre
    return predicted


_VERSION = 1  # of how features are computed; part of the cache key
_CHUNK = 64  # patches at a time through a frozen network


class Resized(nn.Module):
    """An image encoder over patches that are brought to ``pixels`` × ``pixels`` first (None leaves them)."""

    def __init__(self, encoder: ImageEncoder, pixels: int | None) -> None:
        super().__init__()
        self.encoder, self.pixels = encoder, pixels
        self.width = int(encoder.width)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        if self.pixels is not None and patches.shape[2:] != (self.pixels, self.pixels):
            if patches.dtype == torch.uint8:
                patches = patches.float() / 255
            size = (self.pixels, self.pixels)
            patches = nn.functional.interpolate(patches, size, mode="bilinear", antialias=True).clamp(0, 1)
        features: torch.Tensor = self.encoder(patches)
        return features


@dataclass(frozen=True)
class ImageFeatures:
    """How patches are read: ``frozen`` once, into features that are kept by content, or by a network that trains."""

    kind: str
    options: Json
    frozen: bool
    pixels: int | None

    @classmethod
    def from_config(cls, config: TissueOptions) -> ImageFeatures:
        """From ``image_encoder``, ``image_frozen`` and ``image_pixels``."""
        options = dict(config.image_encoder)
        kind, frozen = str(options.pop("kind")), config.image_frozen
        if frozen is None:
            frozen = kind == "colors" or bool(options.get("pretrained", kind != "small"))
        return cls(kind, options, frozen, config.image_pixels)

    def encoder(self, seed: int | None = None) -> Resized | None:
        """A new encoder; None for colour statistics."""
        if self.kind == "colors":
            return None
        return Resized(
            build_image_encoder(self.kind, seed=seed, frozen=self.frozen, **self.options), self.pixels
        )

    def read(self, tissue: Tissue, seed: int) -> tuple[np.ndarray, str]:
        """The images of a dataset, frozen features or the patches themselves, and their description.

        Features are kept slide by slide, so that different splits reuse them.
        """
        encoder = self.encoder(seed)
        if encoder is None:
            return color_features(tissue), "42 colour and stain statistics of a patch, no network"
        network = encoder.encoder
        if not self.frozen:
            return tissue.patches, network.description
        key = ["image features", _VERSION, network.fingerprint(), self.pixels]
        return _by_slide(tissue, key, lambda patches: _computed(encoder, patches)), network.description


def color_features(tissue: Tissue) -> Float[np.ndarray, "n 42"]:
    """``color_statistics`` of every spot, kept by content."""
    return _by_slide(tissue, ["color statistics", _VERSION], color_statistics)


def _by_slide(
    tissue: Tissue, key: list[object], compute: Callable[[np.ndarray], np.ndarray]
) -> Float[np.ndarray, "n f"]:
    """Features of the patches of each slide, kept under the hash of just these patches."""
    parts = []
    for slide in range(len(tissue.slide_names)):
        rows = tissue.rows_of(slide)  # side by side, so that a slice is read and no copy made of a memory map
        patches = np.asarray(tissue.patches[rows[0] : rows[-1] + 1])
        parts.append(cached_array("image-features", [*key, patches], partial(compute, patches)))
    return np.concatenate(parts)


@torch.no_grad()
def _computed(encoder: Resized, patches: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n f"]:
    encoder.eval()
    parts = []
    for start in range(0, len(patches), _CHUNK):
        part = np.ascontiguousarray(np.asarray(patches[start : start + _CHUNK]).transpose(0, 3, 1, 2))
        parts.append(encoder(torch.from_numpy(part)).numpy())
    return np.concatenate(parts)


def gene_sentences(expression: Float[np.ndarray, "n g"], genes: Sequence[str], count: int) -> list[str]:
    """For each spot the names of its ``count`` most expressed genes, highest first, equal ones in order.

    Expression as text (Cell2Sentence, Levine et al. 2023). A spot without any expressed gene gets the word "none".

    >>> gene_sentences(np.array([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]]), ["TP53", "ERBB2", "KRT8"], 2)
    ['ERBB2 KRT8', 'none']
    """
    order = np.argsort(-expression, axis=1, kind="stable")[:, :count]
    names = np.asarray(genes)
    sentences = []
    for row, best in zip(expression, order, strict=True):
        sentences.append(" ".join(names[best[row[best] > 0]]) or "none")
    return sentences
