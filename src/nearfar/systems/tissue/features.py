"""What the towers read of a spot: pixels or frozen image features, expression or the embedding of a gene sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import nn

from nearfar.data.cache import cached_array
from nearfar.models.image import build_image_encoder
from nearfar.systems.tissue.colors import color_statistics
from nearfar.systems.tissue.records import Tissue

__all__ = ["ImageFeatures", "Resized", "color_features", "gene_sentences"]

_VERSION = 1  # of how features are computed; part of the cache key
_CHUNK = 64  # patches at a time through a frozen network


class Resized(nn.Module):
    """An image encoder over patches that are brought to ``pixels`` × ``pixels`` first (None leaves them)."""

    def __init__(self, encoder: nn.Module, pixels: int | None) -> None:
        super().__init__()
        self.encoder, self.pixels = encoder, pixels
        self.width = int(encoder.width)  # type: ignore[arg-type]

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        if self.pixels is not None and patches.shape[2:] != (self.pixels, self.pixels):
            if patches.dtype == torch.uint8:
                patches = patches.float() / 255
            size = (self.pixels, self.pixels)
            patches = nn.functional.interpolate(patches, size, mode="bilinear", antialias=True).clamp(0, 1)
        found: torch.Tensor = self.encoder(patches)
        return found


@dataclass(frozen=True)
class ImageFeatures:
    """How patches are read: ``frozen`` once, into features that are kept by content, or by a network that trains."""

    kind: str
    options: dict[str, Any]
    frozen: bool
    pixels: int | None

    @classmethod
    def from_config(cls, config: Any) -> ImageFeatures:
        """From ``image_encoder``, ``image_frozen`` and ``image_pixels``."""
        options = {str(key): value for key, value in config.image_encoder.items() if key != "kind"}
        kind, frozen = config.image_encoder.kind, config.image_frozen
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

    def read(self, tissue: Tissue, seed: int) -> tuple[Any, str]:
        """What a dataset takes as images, frozen features or the patches themselves, and a phrase that says what it is.

        Features are kept slide by slide, so that another division into splits computes none anew.
        """
        encoder = self.encoder(seed)
        if encoder is None:
            return color_features(tissue), "42 colour and stain statistics of a patch, no network"
        network: Any = encoder.encoder
        if not self.frozen:
            return tissue.patches, network.description
        key = ["image features", _VERSION, network.fingerprint(), self.pixels]
        return _by_slide(tissue, key, lambda patches: _computed(encoder, patches)), network.description


def color_features(tissue: Tissue) -> Float[np.ndarray, "n 42"]:
    """``color_statistics`` of every spot, kept by content."""
    return _by_slide(tissue, ["color statistics", _VERSION], color_statistics)


def _by_slide(
    tissue: Tissue, key: list[Any], compute: Callable[[Any], np.ndarray]
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
    found = []
    for row, best in zip(expression, order, strict=True):
        found.append(" ".join(names[best[row[best] > 0]]) or "none")
    return found
