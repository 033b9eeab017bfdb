"""Any transformers model as an encoder that is trained on: PhoBERT, ViSoBERT, XLM-R by name, or a folder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.errors import NearfarError
from nearfar.models.text.protocol import check_number, read_spec, write_spec
from nearfar.models.text.tokens import TokenBatch, TokenTable
from nearfar.models.text.transformer import TransformerTextEncoder

__all__ = ["PretrainedTextModel"]


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
        found = tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        flat = np.fromiter((token for row in found for token in row), dtype=np.int64)
        return TokenTable({"id": flat}, [len(row) for row in found])

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
