"""What colour alone says of a patch: the quick image features, and the baseline that a network has to beat."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from nearfar.errors import NearfarError

__all__ = ["NAMES", "color_statistics", "ridge_predictions"]

#: stains of H&E in optical density, red, green, blue (Ruifrok and Johnston 2001): haematoxylin, eosin, what is left
_STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CHANNELS = ("red", "green", "blue", "haematoxylin", "eosin", "residual")
_CHUNK = 256  # patches at a time: some tens of megabytes at 224 pixels
NAMES = tuple(
    f"{channel} {what}"
    for channel in _CHANNELS
    for what in ("mean", "sd", *(f"q{q:.2f}" for q in _QUANTILES))
)


def color_statistics(patches: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 42"]:
    """Mean, standard deviation and five quantiles of red, green, blue and of three stain densities, for each patch.

    Densities are the optical density unmixed by the stain vectors of Ruifrok and Johnston (2001). Turning or mirroring
    a patch changes nothing.

    >>> pink = np.full((1, 8, 8, 3), (240, 150, 200), np.uint8)
    >>> found = dict(zip(NAMES, color_statistics(pink)[0].astype(float).round(2).tolist()))
    >>> found["red mean"], found["green sd"], found["eosin mean"] > found["haematoxylin mean"]
    (0.94, 0.0, True)
    """
    if patches.ndim != 4 or patches.shape[3] != 3 or patches.dtype != np.uint8:
        raise NearfarError(
            f"patches are {patches.dtype} {patches.shape}; (n, height, width, 3) of uint8 is needed"
        )
    unmix = np.linalg.inv(_STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True)).astype(np.float32)
    found = np.empty((len(patches), len(NAMES)), np.float32)
    for start in range(0, len(patches), _CHUNK):
        part = patches[start : start + _CHUNK]
        color = part.reshape(len(part), -1, 3).astype(np.float32)
        density = -np.log10((color + 1) / 256) @ unmix
        values = np.concatenate([color / 255, density], axis=2)  # (n, pixels, 6)
        moments = np.stack([values.mean(1), values.std(1)], axis=2)
        ordered = np.quantile(values, _QUANTILES, axis=1).transpose(1, 2, 0)
        found[start : start + len(part)] = np.concatenate([moments, ordered], axis=2).reshape(len(part), -1)
    return found


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
