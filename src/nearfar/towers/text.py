"""Texts: n-grams, networks over words that are trained here, MiniLM, and any model of the transformers library."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearfar.data.batch import Inputs, Rows
from nearfar.data.files import Json, read_text
from nearfar.data.items import Column
from nearfar.errors import NearfarError, nearest_name
from nearfar.models.hub import add_adapters, merge_adapters
from nearfar.models.text import TextEncoder, embed_texts, load_text_encoder, save_text_encoder
from nearfar.models.text.ngram import NgramTextEncoder
from nearfar.models.text.pretrained import MiniLMTextEncoder
from nearfar.models.text.trainable import WordTextEncoder
from nearfar.models.text.transformer import TransformerTextEncoder
from nearfar.models.text.words import TokenBatch, TokenTable
from nearfar.models.views import PassThrough
from nearfar.towers.base import (
    BATCH,
    Backbone,
    GraphInput,
    Tower,
    TowerGraph,
    read_tower_spec,
    write_tower_spec,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TEXT_ENCODERS", "PooledText", "PooledTransformer", "TextTower"]

TEXT_ENCODERS: dict[str, Callable[..., TextEncoder | WordTextEncoder]] = {
    "ngram": NgramTextEncoder,
    "words": WordTextEncoder,
    "minilm": MiniLMTextEncoder,
    "transformer": TransformerTextEncoder,
}
#: what each encoder can train, its default first
_TRAINS: dict[str, tuple[Backbone, ...]] = {
    "ngram": ("head", "frozen"),
    "words": ("full",),
    "minilm": ("head", "frozen", "full", "lora"),
    "transformer": ("head", "frozen", "full", "lora"),
}
_RATES = {"full": 2e-5, "lora": 2e-4}  # of pretrained weights, where none is given


class TextTower(Tower):
    """Texts to vectors.

    Args:
        encoder: "ngram" (TF-IDF of character n-grams, fitted on the training texts; Deerwester et al. 1990 for the
            truncated SVD), "words" (words and their pieces, an LSTM and convolutions, trained here from nothing),
            "minilm" (all-MiniLM-L6-v2, weights in a package), "transformer" (a hub name or folder, as ``model``).
        train: "frozen": the encoder's vectors as they are, and no head above them; "head": the same with a trained
            head; "full": all weights; "lora": adapters of rank ``lora_rank``. "words" is always trained in full.
        lr: learning rate of the encoder's weights; None: 2e-5 for pretrained ones (adapters: 2e-4), else the run's.
        lora_rank: rank of the adapters.
        gradient_checkpointing: keep fewer activations and compute them again (slower, less memory).
        states: for systems that attend to tokens: ``read`` gives tokens and the module that is built has
            ``states(tokens)``, (b, t, ``width``), also where the network is frozen.
        options: those of the encoder, such as ``model``, ``pooling`` and ``max_length`` of a transformer, ``dims`` of
            n-grams.

    Weights are read when they are first needed. Where they are not to be had, the error says why and what works
    without them; a different encoder is never used instead.

    >>> TextTower("ngram", dims=64).description
    'TF-IDF over character 3–5-grams, truncated SVD to 64 dimensions (not fitted yet); frozen'
    >>> TextTower("minilm", dims=64)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: encoder=minilm has no option 'dims'; ...
    """

    kind = "text"
    models = ("model",)

    def __init__(
        self,
        encoder: str = "ngram",
        train: Backbone | None = None,
        lr: float | None = None,
        lora_rank: int = 8,
        gradient_checkpointing: bool = False,
        states: bool = False,
        **options: Any,
    ) -> None:
        if encoder not in TEXT_ENCODERS:
            raise NearfarError(f"encoder={encoder!r} is unknown; {nearest_name(str(encoder), TEXT_ENCODERS)}")
        known = list(inspect.signature(TEXT_ENCODERS[encoder]).parameters)
        for name in options:
            if name not in known:
                raise NearfarError(f"encoder={encoder} has no option {name!r}; {nearest_name(name, known)}")
        if train is None:
            train = _TRAINS[encoder][0]
        if train not in get_args(Backbone):
            raise NearfarError(f"train={train!r} is unknown; {nearest_name(str(train), get_args(Backbone))}")
        if train not in _TRAINS[encoder]:
            able = " or ".join(f"train={each}" for each in _TRAINS[encoder])
            raise NearfarError(f"train={train}: encoder={encoder} is trained by {able}.")
        if lr is not None and (isinstance(lr, bool) or not isinstance(lr, int | float) or lr <= 0):
            raise NearfarError(f"lr={lr}: a learning rate above 0, or null for the usual one.")
        self.encoder_kind, self.train = encoder, train
        self.given_lr = lr
        pretrained = encoder in ("minilm", "transformer")
        self.lr = lr if lr is not None else (_RATES.get(train) if pretrained else None)
        self.lora_rank, self.gradient_checkpointing = lora_rank, gradient_checkpointing
        if states and encoder == "ngram":
            raise NearfarError("encoder=ngram gives a vector for each text and has no states of tokens.")
        self.states = states
        self.encoder_options = options
        try:
            self.encoder = TEXT_ENCODERS[encoder](**options)
        except NearfarError as error:
            raise NearfarError(_plain(error)) from None
        self._saved: Path | None = None

    @property
    def frozen(self) -> bool:
        """Whether the encoder's weights stay as they are."""
        return self.train in ("frozen", "head")

    @property
    def computed_once(self) -> bool:
        """Whether the encoder's vectors are computed once and kept."""
        return self.frozen and not self.states

    @property
    def description(self) -> str:
        text = str(self.encoder.description).replace(" (frozen)", "")
        if self.states and self.encoder_kind != "words":
            text = f"{self.encoder.name}, states of at most {self.transformer.max_length} tokens"
        rate = "" if self.lr is None else f" at a learning rate of {self.lr:g}"
        checkpointed = ", gradient checkpointing" if self.gradient_checkpointing else ""
        how = {
            "frozen": "frozen",
            "head": "frozen",
            "full": f"all weights trained{rate}",
            "lora": f"adapters of rank {self.lora_rank} trained{rate}",
        }[self.train]
        return f"{text}; {how}{checkpointed}"

    @property
    def options(self) -> Json:
        return {
            "encoder": self.encoder_kind,
            "train": self.train,
            "lr": self.given_lr,
            "lora_rank": self.lora_rank,
            "gradient_checkpointing": self.gradient_checkpointing,
            "states": self.states,
            **self.encoder_options,
        }

    def check(self, values: Column) -> list[str | None]:
        return [None if isinstance(value, str) and value.strip() else "empty text" for value in values]

    def fit(self, values: Column) -> TextTower:
        """N-grams and vocabularies are learned from the training texts; pretrained models have nothing to learn."""
        try:
            self.encoder.fit([str(value) for value in values])
        except NearfarError as error:
            raise NearfarError(_plain(error)) from None
        return self

    def read(self, values: Column) -> Inputs:
        texts = [str(value) for value in values]
        if isinstance(self.encoder, WordTextEncoder):
            return self.encoder.tokenize(texts)
        if self.computed_once:
            return Rows(embed_texts(self.encoder, texts))
        tokenizer, _ = self.parts()
        length = int(self.transformer.max_length)
        rows = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        flat = np.fromiter((token for row in rows for token in row), dtype=np.int64)
        return TokenTable({"id": flat}, [len(row) for row in rows])

    def build(self) -> nn.Module:
        """The trained network; for a frozen encoder what passes its vectors on."""
        if self.computed_once:
            return PassThrough(self._width())
        if isinstance(self.encoder, WordTextEncoder):
            return PooledText(self.encoder.build())
        tokenizer, network = self.parts()
        trained: Any = copy.deepcopy(network).cpu()
        if self.frozen:
            return PooledTransformer(
                trained.requires_grad_(False),
                self._pad(tokenizer),
                self.transformer.pooling,
                frozen=True,
            )
        trained.requires_grad_(True)
        if self.gradient_checkpointing:
            trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained.train()
        if self.train == "lora":
            trained = add_adapters(trained, self.lora_rank, self.encoder.name)
        return PooledTransformer(trained, self._pad(tokenizer), self.transformer.pooling)

    @property
    def reads_reference(self) -> bool:
        return self.computed_once

    def reference(self, values: Column) -> Float[np.ndarray, "n d"] | None:
        """The vectors of the encoder before any training; None for a network that starts from nothing."""
        if isinstance(self.encoder, WordTextEncoder):
            return None
        return embed_texts(self.encoder, [str(value) for value in values])

    def save(self, folder: Path) -> None:
        if isinstance(self.encoder, WordTextEncoder):
            self.encoder.save(folder / "encoder")
        elif self.frozen:
            save_text_encoder(self.encoder, folder / "encoder")
        else:
            tokenizer, network = self.parts()
            tokenizer.save_pretrained(folder / "model")
            network.config.save_pretrained(folder / "model")
        write_tower_spec(folder, self)

    def save_networks(self, folder: Path) -> None:
        """Of a frozen pretrained encoder tokenizer and weights."""
        if self.frozen and self.encoder_kind in ("minilm", "transformer"):
            self.transformer.save_network(folder / "encoder")

    def graph(self) -> TowerGraph:
        """Token numbers and their mask, as a tokenizer of transformers gives them, through a pretrained network.

        ``NearfarError`` for n-grams and for networks over words, whose inputs only nearfar makes.
        """
        if self.encoder_kind == "ngram":
            raise NearfarError(
                "character n-grams are counted by scikit-learn and are no graph of tensors; train with "
                "text_encoder=minilm or a transformer"
            )
        if self.encoder_kind == "words":
            raise NearfarError(
                "this network reads words and their pieces by a vocabulary of its own, and its graph depends on the "
                "words of a batch; train with text_encoder=minilm or a transformer"
            )
        tokenizer, network = self.parts()
        length = int(self.transformer.max_length)
        names = ("input_ids", "attention_mask")
        about = ("numbers of the tokens", "1 for a token, 0 for padding")

        def tensors(values: Column) -> dict[str, np.ndarray]:
            tokens = tokenizer(
                [str(value) for value in values],
                padding=True, truncation=True, max_length=length, return_tensors="np",
            )  # fmt: skip
            return {name: np.asarray(tokens[name], dtype=np.int64) for name in names}

        def save(folder: Path) -> None:
            tokenizer.save_pretrained(str(folder / "tokenizer"))

        recipe = {
            "kind": self.kind,
            "tokenizer": "tokenizer",
            "max_length": length,
            "padding": {
                "side": tokenizer.padding_side,
                "token": tokenizer.pad_token,
                "id": self._pad(tokenizer),
            },
            "steps": [
                f"tokenise the texts by the tokenizer in the folder 'tokenizer', at most {length} tokens each",
                "pad the texts of a batch to the longest of them",
            ],
        }
        field = _FrozenPooled(self.transformer, network) if self.computed_once else _Tokens()
        return TowerGraph(
            [
                GraphInput(name, "int64", (BATCH, "tokens"), what)
                for name, what in zip(names, about, strict=True)
            ],
            field,
            tensors,
            recipe,
            save,
            {"tokens": (2, min(length, getattr(network.config, "max_position_embeddings", length)))},
        )

    @staticmethod
    def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
        return int(tokenizer.pad_token_id or 0)

    @classmethod
    def load(cls, folder: Path) -> TextTower:
        tower = cls(**read_tower_spec(folder)["options"])
        if tower.frozen:
            tower.encoder = load_text_encoder(folder / "encoder")
        elif tower.encoder_kind == "words":
            tower.encoder = WordTextEncoder.load(folder / "encoder")
        else:
            tower._saved = folder / "model"
            read_text(tower._saved / "config.json")  # an error that names the file, before any model is read
        return tower

    def _width(self) -> int:
        if isinstance(self.encoder, NgramTextEncoder):
            return int(self.encoder.encode(["a"]).shape[1])
        return int(self.parts()[1].config.hidden_size)

    @property
    def transformer(self) -> TransformerTextEncoder:
        """The encoder, of a kind that is a model of transformers."""
        assert isinstance(self.encoder, TransformerTextEncoder)
        return self.encoder

    def parts(self) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        """Tokenizer and pretrained network; of a loaded tower its architecture, whose weights the run holds."""
        if self._saved is not None:
            from transformers import AutoConfig, AutoModel, AutoTokenizer

            own = {"trust_remote_code": False}  # nothing that a saved folder names is run
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(self._saved), **own)
            network = AutoModel.from_config(AutoConfig.from_pretrained(str(self._saved), **own), **own)
            return tokenizer, network
        try:
            tokenizer, network = self.transformer.parts()
        except NearfarError as error:
            raise NearfarError(_plain(error)) from None
        return tokenizer, network


class PooledText(nn.Module):
    """A trained text network, tokens to one vector for each text; ``states`` gives those of the tokens."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.width = int(network.width)  # type: ignore[arg-type]

    def states(self, tokens: TokenBatch) -> Float[Tensor, "b t d"]:
        """The last states of the tokens, padding included."""
        states: Tensor = self.network(tokens)[0]
        return states

    def forward(self, tokens: TokenBatch) -> Float[Tensor, "b d"]:
        pooled: Tensor = self.network(tokens)[1]
        return pooled


class _Tokens(nn.Module):
    """Token numbers and their mask as the tokens of a batch."""

    def forward(self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"]) -> TokenBatch:
        return TokenBatch({"id": input_ids}, attention_mask.bool())


class _FrozenPooled(nn.Module):
    """The vectors that a frozen encoder has of tokens."""

    def __init__(self, encoder: TransformerTextEncoder, network: nn.Module) -> None:
        super().__init__()
        self.encoder, self.network = encoder, copy.deepcopy(network).cpu()

    def forward(
        self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"]
    ) -> Float[Tensor, "b d"]:
        return self.encoder.pooled(self.network, {"input_ids": input_ids, "attention_mask": attention_mask})


class PooledTransformer(nn.Module):
    """A transformer over tokens, pooled to one vector for each text.

    Texts of similar length are computed together: padded to the longest of a batch, most tokens would be padding.
    """

    def __init__(self, network: Any, pad: int, pooling: str, frozen: bool = False) -> None:
        super().__init__()
        self.network, self.pad, self.pooling, self.frozen = network, pad, pooling, frozen
        self.width = int(network.config.hidden_size)
        self.train(self.training)

    def train(self, mode: bool = True) -> PooledTransformer:
        """Frozen weights also have no dropout."""
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self

    def states(self, tokens: TokenBatch) -> Float[Tensor, "b t d"]:
        """The last states of the tokens, padding included."""
        return self._states(tokens["id"], tokens.mask)

    def _states(self, ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        padded = ids.masked_fill(~mask, self.pad)
        hidden: Tensor = self.network(input_ids=padded, attention_mask=mask.long()).last_hidden_state
        return hidden

    def merged(self) -> PooledTransformer:
        """A copy whose adapters are part of the weights that they adapt."""
        return PooledTransformer(merge_adapters(self.network), self.pad, self.pooling, self.frozen)

    def forward(self, tokens: TokenBatch) -> Float[Tensor, "b d"]:
        if torch.compiler.is_compiling():  # a graph has no groups that depend on the texts
            return self._pooled(tokens["id"], tokens.mask)
        lengths = tokens.mask.sum(1)
        order = torch.argsort(lengths, stable=True)
        parts = []
        for rows, longest in length_groups(lengths[order].tolist()):
            at = order[rows]
            parts.append(self._pooled(tokens["id"][at, :longest], tokens.mask[at, :longest]))
        return torch.cat(parts)[torch.argsort(order)]

    def _pooled(self, ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b d"]:
        hidden = self._states(ids, mask)
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def length_groups(lengths: Sequence[int], least: int = 16, padding: float = 1.2) -> list[tuple[slice, int]]:
    """Consecutive rows of rising length that are computed together, and the length that each group is padded to.

    A group has at least ``least`` rows (the last perhaps fewer), and no more as soon as a longer text would pad it by
    the factor ``padding``.

    >>> length_groups([2, 2, 2, 9], least=2)
    [(slice(0, 3, None), 2), (slice(3, 4, None), 9)]
    """
    groups, start = [], 0
    for at in range(1, len(lengths) + 1):
        full = at - start >= least
        if at == len(lengths) or (full and lengths[at] * (at - start) > padding * sum(lengths[start:at])):
            groups.append((slice(start, at), max(1, lengths[at - 1])))
            start = at
    return groups


def _plain(error: NearfarError) -> str:
    """The message with the names that options have here."""
    return str(error).replace("text_encoder.", "").replace("text_encoder=", "encoder=")
