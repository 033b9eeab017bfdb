"""Values as vectors without any model: the baseline that embeddings stand beside."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.data.files import Json
from nearfar.data.items import Column
from nearfar.data.picture_arrays import PictureArrays
from nearfar.towers import build_tower

__all__ = ["raw_values"]

_SIDE = 32  # pixels of a picture's sides, at most


def raw_values(kind: str, values: Mapping[str, Column]) -> tuple[str, dict[str, Float[Tensor, "n d"]]] | None:
    """The values of each split as vectors, and what these are called; None of other kinds of views.

    ``pixels`` of pictures (``kind`` image) from 0 to 1, at 32 × 32 at most, of grey ones one number each; ``tfidf`` of
    texts, fitted on those of ``train``; ``numbers``, standardised by those of ``train``.

    >>> name, rows = raw_values("vector", {"train": np.array([[0.0], [2.0]]), "test": np.array([[4.0]])})
    >>> name, rows["test"].tolist()
    ('numbers', [[3.0]])
    """
    if kind == "image":
        return "pixels", {name: _pixels(part) for name, part in values.items()}
    if kind not in ("text", "vector"):
        return None
    options: Json = {"encoder": "ngram", "dims": 512} if kind == "text" else {}
    tower = build_tower(kind, "the baseline", **options).fit(values["train"])
    rows = {name: torch.from_numpy(np.asarray(tower.reference(part))) for name, part in values.items()}
    return "tfidf" if kind == "text" else "numbers", rows


def _pixels(values: Column) -> Float[Tensor, "n d"]:
    side = (_SIDE, _SIDE)
    if isinstance(values, np.ndarray) and max(values.shape[1:3]) <= _SIDE:
        side = (int(values.shape[1]), int(values.shape[2]))
    whole = PictureArrays(values, side).whole()
    grey = bool((whole == whole[..., :1]).all())
    rows = np.array(whole[..., 0] if grey else whole).reshape(len(whole), -1)
    return torch.from_numpy(rows).float() / 255
