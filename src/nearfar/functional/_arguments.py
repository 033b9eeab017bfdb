"""Arguments that the softmax losses share: embeddings, scale, further negatives."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nearfar.contrast import Extra, Mask, checked_mask, computing_dtype, embeddings
from nearfar.errors import NearfarError

__all__ = ["Negatives", "Ready", "check_temperature", "extras_of", "ready", "scale_of"]

#: further negatives: rows for the first direction, or a pair of rows for both
Negatives = Tensor | tuple[Tensor | None, Tensor | None]


class Ready(NamedTuple):
    """Embeddings in the precision of the computation, at unit length if wanted, and the scale beside them."""

    a: Tensor
    b: Tensor
    scale: Tensor


def ready(
    a: Tensor, b: Tensor | None, scale: float | Tensor, normalize: bool, names: tuple[str, str] = ("a", "b")
) -> Ready:
    """Check and prepare embeddings; without ``b`` the first stands for both."""
    dtype = computing_dtype(a) if b is None else computing_dtype(a, b)
    first = embeddings(a, names[0], normalize, dtype)
    second = first if b is None else embeddings(b, names[1], normalize, dtype)
    if len(first) == 0:
        raise NearfarError(f"{names[0]} has no rows; a loss needs at least one row")
    if first.shape[1] != second.shape[1]:
        raise NearfarError(
            f"{names[0]} is {tuple(a.shape)} and {names[1]} is {tuple(second.shape)}; both need the same dimensions "
            "(columns): end both encoders with a projection to one size"
        )
    return Ready(first, second, scale_of(scale, first))


def scale_of(scale: float | Tensor, like: Tensor) -> Tensor:
    """A scale as a 0-d tensor beside the embeddings; its gradient goes through."""
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise NearfarError(f"scale has shape {tuple(scale.shape)}; one number is needed, 1 / temperature")
        value = scale.detach().item() if scale.device.type == "cpu" else 1.0
        scale = scale.reshape(()).to(like)
    else:
        value = float(scale)
        # On the CPU, wherever the embeddings are: what depends on its size is then known without waiting for a device.
        scale = torch.tensor(value, dtype=like.dtype)
    if not (value > 0 and math.isfinite(value)):
        raise NearfarError(
            f"scale is {value}, but it must be a finite number above 0: it is 1 / temperature, such as 14.3. Of a "
            "learned log scale, pass the exponential"
        )
    return scale


def check_temperature(temperature: float) -> float:
    """The temperature as a number; ``NearfarError`` unless it is above 0."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise NearfarError(f"temperature is {temperature}, but it must be above 0; 0.05 to 0.1 is usual")
    return float(temperature)


def extras_of(
    negatives: Negatives | None,
    masks: Mask | Tensor | tuple[Mask | Tensor | None, ...] | None,
    ready: Ready,
    both: bool,
    normalize: bool,
) -> list[Extra | None]:
    """Further negatives of each direction, prepared like the embeddings."""
    if negatives is None:
        return []
    rows = negatives if isinstance(negatives, tuple) else (negatives, None)
    left_out = masks if isinstance(masks, tuple) else (masks, None)
    if rows[1] is not None and not both:
        raise NearfarError(
            "two sets of further negatives were given, but symmetric=False has one direction only"
        )
    extras: list[Extra | None] = []
    for keys, mask in zip(rows, left_out, strict=True):
        if keys is None:
            extras.append(None)
            continue
        flat = keys.reshape(-1, keys.shape[-1]) if keys.ndim == 3 else keys
        flat = embeddings(flat, "negatives", normalize, ready.a.dtype)
        if flat.shape[1] != ready.a.shape[1] or (keys.ndim == 3 and len(keys) != len(ready.a)):
            raise NearfarError(
                f"negatives are {tuple(keys.shape)}; (further rows, {ready.a.shape[1]}) or, for each query its own, "
                f"({len(ready.a)}, k, {ready.a.shape[1]}) is needed"
            )
        checked = None if mask is None else checked_mask(mask, len(ready.a), keys.shape[-2])
        extras.append(Extra(flat.reshape(keys.shape), checked))
    return extras
