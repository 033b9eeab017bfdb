"""Colours of a picture as numbers, without a network: the least that an image encoder has to beat."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from nearfar.errors import NearfarError

__all__ = ["NAMES", "color_statistics"]

#: stains of H&E in optical density, red, green, blue (Ruifrok and Johnston 2001): haematoxylin, eosin, what is left
_STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CHANNELS = ("red", "green", "blue", "haematoxylin", "eosin", "residual")
_CHUNK = 256  # pictures at a time: some tens of megabytes at 224 pixels
NAMES = tuple(
    f"{channel} {what}"
    for channel in _CHANNELS
    for what in ("mean", "sd", *(f"q{q:.2f}" for q in _QUANTILES))
)


def color_statistics(pictures: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 42"]:
    """Mean, standard deviation and five quantiles of red, green, blue and of three stain densities, for each picture.

    Densities are the optical density unmixed by the stain vectors of Ruifrok and Johnston (2001). Turning or mirroring
    a picture changes nothing.

    >>> pink = np.full((1, 8, 8, 3), (240, 150, 200), np.uint8)
    >>> color = dict(zip(NAMES, color_statistics(pink)[0].astype(float).round(2).tolist()))
    >>> color["red mean"], color["green sd"], color["eosin mean"] > color["haematoxylin mean"]
    (0.94, 0.0, True)
    """
    if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
        raise NearfarError(
            f"pictures are {pictures.dtype} {pictures.shape}; (n, height, width, 3) of uint8 is needed"
        )
    unmix = np.linalg.inv(_STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True)).astype(np.float32)
    statistics = np.empty((len(pictures), len(NAMES)), np.float32)
    for start in range(0, len(pictures), _CHUNK):
        part = pictures[start : start + _CHUNK]
        color = part.reshape(len(part), -1, 3).astype(np.float32)
        density = -np.log10((color + 1) / 256) @ unmix
        values = np.concatenate([color / 255, density], axis=2)  # (n, pixels, 6)
        moments = np.stack([values.mean(1), values.std(1)], axis=2)
        ordered = np.quantile(values, _QUANTILES, axis=1).transpose(1, 2, 0)
        statistics[start : start + len(part)] = np.concatenate([moments, ordered], axis=2).reshape(
            len(part), -1
        )
    return statistics
