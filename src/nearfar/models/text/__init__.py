"""Text encoders whose weights stay frozen: ``ngram`` (no weights needed), ``transformer``, ``minilm``."""

from __future__ import annotations

from nearfar.models.text.ngram import NgramTextEncoder
from nearfar.models.text.pretrained import (
    TEXT_ENCODERS,
    MiniLMTextEncoder,
    build_text_encoder,
    embed_texts,
    load_text_encoder,
    save_text_encoder,
)
from nearfar.models.text.protocol import TextEncoder
from nearfar.models.text.transformer import TransformerTextEncoder

__all__ = [
    "TEXT_ENCODERS",
    "MiniLMTextEncoder",
    "NgramTextEncoder",
    "TextEncoder",
    "TransformerTextEncoder",
    "build_text_encoder",
    "embed_texts",
    "load_text_encoder",
    "save_text_encoder",
]
