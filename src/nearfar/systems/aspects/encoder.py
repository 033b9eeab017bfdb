"""The text encoders that are trained with the aspects, by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from nearfar.errors import NearfarError, nearest_name
from nearfar.models.text.pretrained import PretrainedTextModel
from nearfar.models.text.protocol import read_spec
from nearfar.models.text.trainable import WordTextEncoder

__all__ = ["ENCODERS", "build_encoder", "load_encoder"]

ENCODERS: dict[str, type[Any]] = {"words": WordTextEncoder, "pretrained": PretrainedTextModel}


def build_encoder(kind: str, **options: Any) -> Any:
    """The encoder called ``kind`` with its options: ``fit(texts)``, ``tokenize(texts)``, ``build()``, ``save(folder)``.

    >>> build_encoder("words", dims=16, hidden=16).kind
    'words'
    >>> build_encoder("words", dim=16)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: text_encoder=words has no option 'dim'; did you mean 'dims'?
    """
    if kind not in ENCODERS:
        raise NearfarError(
            f"text_encoder={kind}: no encoder of that kind is trained with the aspects; {nearest_name(kind, ENCODERS)}"
        )
    known = list(inspect.signature(ENCODERS[kind]).parameters)
    for option in options:
        if option not in known:
            raise NearfarError(f"text_encoder={kind} has no option {option!r}; {nearest_name(option, known)}")
    return ENCODERS[kind](**options)


def load_encoder(folder: str | Path) -> Any:
    """The encoder that a run saved."""
    kind = str(read_spec(folder)["kind"])
    if kind not in ENCODERS:
        raise NearfarError(
            f"{folder}: an encoder of kind '{kind}' is not one that is trained with the aspects."
        )
    return ENCODERS[kind].load(folder)
