"""Choosing a text encoder by name, reading a saved one, and embedding texts through the cache."""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nearfar.data.cache import cache_dir, cached_array, content_key
from nearfar.errors import NearfarError, nearest_name
from nearfar.models.text.ngram import NgramTextEncoder
from nearfar.models.text.pretrained import MiniLMTextEncoder
from nearfar.models.text.protocol import TextEncoder, read_spec
from nearfar.models.text.transformer import TransformerTextEncoder

__all__ = ["TEXT_ENCODERS", "build_text_encoder", "embed_texts", "load_text_encoder", "save_text_encoder"]

TEXT_ENCODERS: dict[str, type[NgramTextEncoder] | type[TransformerTextEncoder]] = {
    "ngram": NgramTextEncoder,
    "transformer": TransformerTextEncoder,
    "minilm": MiniLMTextEncoder,
}


def build_text_encoder(kind: str = "ngram", **options: Any) -> TextEncoder:
    """The text encoder called ``kind`` (``ngram``, ``transformer``, ``minilm``) with its options.

    >>> build_text_encoder("ngram", dims=64).description
    'TF-IDF over character 3–5-grams, truncated SVD to 64 dimensions (not fitted yet)'
    >>> build_text_encoder("ngrams")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: text_encoder='ngrams' is unknown; did you mean 'ngram'?
    >>> build_text_encoder("ngram", dim=64)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: text_encoder=ngram has no option 'dim'; did you mean 'dims'?
    """
    encoder_class = _encoder_class(kind)
    known = list(inspect.signature(encoder_class).parameters)
    for option in options:
        if option not in known:
            raise NearfarError(f"text_encoder={kind} has no option {option!r}; {nearest_name(option, known)}")
    encoder: TextEncoder = encoder_class(**options)
    return encoder


def load_text_encoder(folder: str | Path) -> TextEncoder:
    """The encoder that ``encoder.save(folder)`` wrote, ready to embed new texts."""
    encoder: TextEncoder = _encoder_class(read_spec(folder)["kind"]).load(folder)
    return encoder


def save_text_encoder(encoder: TextEncoder, folder: str | Path) -> None:
    """``encoder.save(folder)``, its bytes shared with every other run that uses the same encoder.

    The files are kept in the cache under the encoder's fingerprint and linked into ``folder``, so that a sweep of
    twenty runs does not hold twenty copies; where links are impossible they are copied. Of a pretrained model name and
    options are kept, which are those of this encoder alone: equal weights may lie in different folders.
    """
    if isinstance(encoder, TransformerTextEncoder):
        encoder.save(folder)
        return
    folder = Path(folder)
    kept = cache_dir() / "text-encoders" / content_key(encoder.fingerprint())[:32]
    try:
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=kept.parent, prefix=".writing-"))
            encoder.save(temporary)
            try:
                temporary.rename(kept)
            except OSError:  # another process was faster
                shutil.rmtree(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for file in kept.iterdir():
            (folder / file.name).unlink(missing_ok=True)
            os.link(file, folder / file.name)
    except OSError:
        encoder.save(folder)


def embed_texts(encoder: TextEncoder, texts: Sequence[str], cache: bool = True) -> Float[np.ndarray, "n d"]:
    """``encoder.encode(texts)``, kept under a hash of the encoder's fingerprint and the texts.

    Raises:
        NearfarError: an empty text (readers reject those before they get here), or vectors that are not
        finite.
    """
    for position, text in enumerate(texts):
        if not text.strip():
            raise NearfarError(f"Text {position} of {len(texts)} is empty; an empty text has no embedding.")
    key = ["text embeddings", encoder.fingerprint(), list(texts)]
    vectors = cached_array("text-embeddings", key, lambda: encoder.encode(texts), enabled=cache)
    if not np.isfinite(vectors).all():
        raise NearfarError(f"{encoder.name} gave embeddings that are not finite.")
    return vectors


def _encoder_class(kind: str) -> type[NgramTextEncoder] | type[TransformerTextEncoder]:
    if kind not in TEXT_ENCODERS:
        raise NearfarError(f"text_encoder={kind!r} is unknown; {nearest_name(str(kind), TEXT_ENCODERS)}")
    return TEXT_ENCODERS[kind]
