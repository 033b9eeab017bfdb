"""What every text encoder can do, and how a fitted one is kept beside a run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from nearfar.data.files import Json
from nearfar.errors import NearfarError

__all__ = ["TextEncoder", "check_number", "read_spec", "write_spec"]

SPEC_FILE = "text_encoder.json"


@runtime_checkable
class TextEncoder(Protocol):
    """Turns texts into vectors; its weights are frozen once ``fit`` has run.

    ``kind`` is the word that chooses it, ``name`` what it really is (a model name, or ``ngram``),
    ``description`` one sentence for the log and for ``dataset_layout.json``.
    """

    kind: str

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    def fit(self, texts: Sequence[str]) -> TextEncoder:
        """Learn from the *training* texts alone, without labels; nothing to do for a pretrained model."""
        ...

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """One float32 row for each text."""
        ...

    def fingerprint(self) -> str:
        """Names all that ``encode`` depends on (options, weights, version): the key of cached embeddings."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write what is needed to embed new texts later; ``load_text_encoder`` reads it."""
        ...


def check_number(option: str, value: float, least: float, most: float = math.inf, whole: bool = True) -> None:
    """Raise ``NearfarError`` unless ``text_encoder.option`` is a (whole) number from ``least`` to ``most``."""
    numeric = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not numeric or not least <= value <= most or not math.isfinite(value):
        wanted = "a whole number" if whole else "a number"
        bounds = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise NearfarError(f"text_encoder.{option}={value}: {wanted} {bounds} is needed.")


def write_spec(folder: str | Path, spec: dict[str, object]) -> None:
    """Write the JSON part of an encoder; it holds ``kind`` and ``options``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SPEC_FILE).write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")


def read_spec(folder: str | Path) -> Json:
    """Read what ``write_spec`` wrote."""
    path = Path(folder) / SPEC_FILE
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NearfarError(f"{folder} holds no saved text encoder ({SPEC_FILE} is missing).") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NearfarError(f"{path} is damaged: {error}.") from None
    if not isinstance(spec, dict) or "kind" not in spec:
        raise NearfarError(f"{path} does not describe a text encoder.")
    return spec
