"""A text encoder that is trained with its task, from the words of the training texts alone.

Words and their pieces pass a bidirectional LSTM and convolutions. `benchmarks/aspect_encoders.py` measures it beside
other kinds of encoder on Vietnamese phone reviews.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearfar.data.cache import cached_arrays
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.models.projection import Dropout
from nearfar.models.text.protocol import check_number, read_spec, write_spec
from nearfar.models.text.words import (
    PADDING,
    UNKNOWN,
    TokenBatch,
    TokenTable,
    WordVocabulary,
    context_vectors,
)

__all__ = ["BidirectionalLSTM", "RecurrentTextEncoder", "WordEmbedding", "WordTextEncoder", "word_windows"]


class WordEmbedding(nn.Module):
    """A word's vector: its own row plus the sum of its pieces' rows over the root of their number.

    Each distinct word of a batch is computed once. A word that training did not see (row 1) is the sum of its pieces,
    which come with the tokens. In training, a word loses its own row with probability ``word_dropout``, so
    that pieces learn to stand alone, and a token its whole vector.

    Args:
        pieces: for each row of the word embedding the numbers of its pieces (from 1 on).
        piece_count: highest number of a piece.
        dims: length of the vectors.
        dropout: of entries, per distinct word and again per token.
    """

    starts: Tensor
    counts: Tensor
    numbers: Tensor

    def __init__(
        self,
        pieces: Sequence[Sequence[int]],
        piece_count: int,
        dims: int,
        dropout: float = 0.2,
        word_dropout: float = 0.05,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(len(pieces), dims, padding_idx=PADDING)
        self.pieces = nn.EmbeddingBag(piece_count + 1, dims, mode="sum", padding_idx=0)
        for table in (self.words, self.pieces):
            nn.init.normal_(table.weight, 0.0, 0.5)
        self._blank()
        counts = torch.tensor([len(row) for row in pieces])
        # The vocabulary is kept beside the weights, so these are no part of the state.
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)
        numbers = torch.tensor([number for row in pieces for number in row], dtype=torch.int64)
        self.register_buffer("numbers", numbers, persistent=False)
        self.dropout = Dropout(dropout)
        self.word_dropout = word_dropout

    @torch.no_grad()
    def begin_with(self, words: Float[Tensor, "words d"], pieces: Float[Tensor, "pieces d"]) -> None:
        """Take these vectors instead of random ones."""
        self.words.weight.copy_(words)
        self.pieces.weight.copy_(pieces)
        self._blank()

    @torch.no_grad()
    def _blank(self) -> None:
        self.words.weight[: UNKNOWN + 1] = 0
        self.pieces.weight[0] = 0

    def forward(self, tokens: TokenBatch) -> Float[Tensor, "b t d"]:
        distinct, place = torch.unique(tokens["word"], return_inverse=True)
        vectors = self._distinct(distinct)[place]
        unknown = tokens["word"] == UNKNOWN
        if bool(unknown.any()):
            vectors = vectors.clone()
            vectors[unknown] = self._unknown(tokens["pieces"][unknown]).to(vectors.dtype)
        if self.training and self.word_dropout:
            vectors = vectors * self._kept(tokens.mask.shape, vectors)
        return self.dropout(vectors) * tokens.mask[..., None]

    def _distinct(self, rows: Int[Tensor, " u"]) -> Float[Tensor, "u d"]:
        counts = self.counts[rows]
        first = counts.cumsum(0) - counts
        index = torch.repeat_interleave(self.starts[rows] - first, counts)
        index = index + torch.arange(len(index), device=rows.device)
        own = self.words(rows)
        if self.training and self.word_dropout:
            own = own * self._kept(rows.shape, own)
        sums = self.pieces(self.numbers[index], first)
        return self.dropout(own + sums * counts.clamp(min=1).rsqrt()[:, None])

    def _unknown(self, pieces: Int[Tensor, "n p"]) -> Float[Tensor, "n d"]:
        count = (pieces > 0).sum(1).clamp(min=1)
        return self.pieces(pieces.long()) * count.rsqrt()[:, None]

    def _kept(self, shape: torch.Size, like: Tensor) -> Tensor:
        return (torch.rand(shape, device=like.device) >= self.word_dropout)[..., None].to(like.dtype)


class BidirectionalLSTM(nn.Module):
    """An LSTM from each end of a text; (b, t, d) → (b, t, 2 · units), 0 behind the end.

    Padding stands on the right, so the backward half reads each text flipped about its own middle and no packing is
    needed: on a processor four times as fast as packed sequences, and exact.

    >>> lstm = BidirectionalLSTM(4, 3)
    >>> lstm(torch.ones(1, 2, 4), torch.tensor([[True, False]])).shape
    torch.Size([1, 2, 6])
    """

    def __init__(self, dims: int, units: int) -> None:
        super().__init__()
        self.forward_half = nn.LSTM(dims, units, batch_first=True)
        self.backward_half = nn.LSTM(dims, units, batch_first=True)

    def forward(self, x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t e"]:
        rows, places = mask.shape
        place = torch.arange(places, device=mask.device)
        last = mask.sum(1, keepdim=True) - 1
        flipped = torch.where(place <= last, last - place, place)
        flipped = (flipped + torch.arange(rows, device=mask.device)[:, None] * places).flatten()
        ahead = self.forward_half(x)[0]
        back = self.backward_half(x.flatten(0, 1)[flipped].view_as(x))[0]
        back = back.flatten(0, 1)[flipped].view_as(ahead)
        return torch.cat([ahead, back], dim=-1) * mask[..., None]


class RecurrentTextEncoder(nn.Module):
    """States (b, t, width) of the words of each text, and their mean (b, width).

    The states of the LSTM stand beside what a convolution of each width makes of them: what a word means in its
    sentence, and what it says with its neighbours. Results do not depend on the padding.

    Args:
        embedding: vectors (b, t, d) of a `TokenBatch`.
        dims: their length d.
        hidden: states of the LSTM, both directions together; the convolutions share as many again.
        widths: words that a convolution sees; none for the LSTM alone.
        layers: LSTMs on top of one another.
        dropout: of the LSTMs' states.
    """

    def __init__(
        self,
        embedding: nn.Module,
        dims: int,
        hidden: int = 384,
        widths: Sequence[int] = (1, 3),
        layers: int = 1,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        units = hidden // 2
        self.lstms = nn.ModuleList(
            BidirectionalLSTM(dims if i == 0 else 2 * units, units) for i in range(layers)
        )
        self.dropout = Dropout(dropout)
        self.widths = list(widths)
        channels = hidden // len(widths) if widths else 0
        self.convolutions = nn.ModuleList(nn.Linear(width * 2 * units, channels) for width in widths)
        self.width = 2 * units + channels * len(widths)

    def forward(self, tokens: TokenBatch) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
        states = self.embedding(tokens)
        for lstm in self.lstms:
            states = self.dropout(lstm(states, tokens.mask))
        windows = [
            F.gelu(c(word_windows(states, w))) for w, c in zip(self.widths, self.convolutions, strict=True)
        ]
        states = torch.cat([*windows, states], dim=-1) * tokens.mask[..., None]
        return states, states.sum(1) / tokens.mask.sum(1, keepdim=True).clamp(min=1)


def word_windows(x: Float[Tensor, "b t d"], width: int) -> Float[Tensor, "b t e"]:
    """Each state with its neighbours, ``width`` in all, and zeros beyond the ends; of an even width one more before.

    A linear layer over these is a convolution; as one product of matrices it is the faster one on a processor.

    >>> word_windows(torch.tensor([[[1.0], [2.0], [3.0]]]), 3).tolist()
    [[[0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 0.0]]]
    """
    if width == 1:
        return x
    places = x.shape[1]
    padded = F.pad(x, (0, 0, width // 2, (width - 1) // 2))
    return torch.cat([padded[:, k : k + places] for k in range(width)], dim=-1)


_VERSION = 2  # of the vectors' computation; part of the cache key
_VOCABULARY_FILE = "vocabulary.json"
_SCALE = 0.7  # root mean square of the first vectors' entries


class WordTextEncoder:
    """Words with their character n-grams, a bidirectional LSTM and convolutions over its states.

    ``fit`` learns the vocabulary and, with ``vectors``, first vectors of words and pieces from the contexts in which
    they stand; ``tokenize`` makes a `TokenTable` of texts; ``build`` gives a fresh `RecurrentTextEncoder` to be
    trained. ``save`` keeps options and vocabulary; the weights belong to the checkpoint of the run.

    Args:
        dims: length of the word vectors.
        hidden: states of the LSTM, both directions together.
        widths: words that the convolutions over the states see.
        layers: LSTMs on top of one another.
        pieces: shortest and longest character n-gram; None for whole words alone.
        min_count: a word that comes less often in training is unknown.
        max_length: words read of a text.
        dropout: of entries of the word vectors and of the states.
        word_dropout: share of the words without their own vector, and of the tokens without any.
        vectors: begin with vectors learned from the training texts instead of random ones.

    >>> encoder = WordTextEncoder(dims=8, hidden=8, vectors=False).fit(["pin trâu", "màn hình đẹp"])
    >>> tokens = encoder.tokenize(["pin đẹp lắm"]).batch([0])
    >>> states, pooled = encoder.build()(tokens)
    >>> states.shape, pooled.shape
    (torch.Size([1, 3, 16]), torch.Size([1, 16]))
    """

    kind = "words"

    def __init__(
        self,
        dims: int = 128,
        hidden: int = 384,
        widths: Sequence[int] = (1, 3),
        layers: int = 1,
        pieces: tuple[int, int] | None = (2, 5),
        min_count: int = 1,
        max_length: int = 128,
        dropout: float = 0.2,
        word_dropout: float = 0.05,
        vectors: bool = True,
        cache: bool = True,
    ) -> None:
        for name, value in (
            ("dims", dims),
            ("layers", layers),
            ("min_count", min_count),
            ("max_length", max_length),
        ):
            check_number(name, value, 1)
        check_number("hidden", hidden, 2 * max(1, len(widths)))
        for name, share in (("dropout", dropout), ("word_dropout", word_dropout)):
            check_number(name, share, 0, 0.99, whole=False)
        for width in widths:
            check_number("widths", width, 1)
        if hidden % 2:
            raise NearfarError(
                f"text_encoder.hidden={hidden}: an even number is needed, half for each direction."
            )
        if pieces is not None:
            if len(pieces) != 2 or not 1 <= pieces[0] <= pieces[1]:
                raise NearfarError(
                    f"text_encoder.pieces={pieces}: the shortest and the longest n-gram are needed, such as [2, 5]; "
                    "null switches them off."
                )
            pieces = (int(pieces[0]), int(pieces[1]))
        self.options: Json = {
            "dims": dims,
            "hidden": hidden,
            "widths": list(widths),
            "layers": layers,
            "pieces": None if pieces is None else list(pieces),
            "min_count": min_count,
            "max_length": max_length,
            "dropout": dropout,
            "word_dropout": word_dropout,
            "vectors": vectors,
        }
        self._cache = cache
        self._vocabulary: WordVocabulary | None = None
        self._first: dict[str, np.ndarray] | None = None

    @property
    def name(self) -> str:
        return "words"

    @property
    def description(self) -> str:
        o = self.options
        convolutions = (
            f", convolutions over {' and '.join(map(str, o['widths']))} words" if o["widths"] else ""
        )
        network = f"{o['dims']}-d words and pieces, bidirectional LSTM of {o['hidden']} states{convolutions}"
        if self._vocabulary is None:
            return f"{network} (not fitted yet)"
        return f"{network}; {len(self._vocabulary.words)} words and {len(self._vocabulary.pieces)} pieces"

    @property
    def vocabulary(self) -> WordVocabulary:
        """The words and pieces that ``fit`` found."""
        if self._vocabulary is None:
            raise NearfarError("text_encoder=words was not fitted: call fit(training_texts) or load it.")
        return self._vocabulary

    def fit(self, texts: Sequence[str]) -> WordTextEncoder:
        """Learn vocabulary and first vectors from the training texts, without labels (vectors kept in the cache)."""
        o = self.options
        self._vocabulary = WordVocabulary.fit(
            texts,
            spans=None if o["pieces"] is None else tuple(o["pieces"]),
            most=o["max_length"],
            min_count=o["min_count"],
        )
        if o["vectors"]:
            key = [_VERSION, o["dims"], self._vocabulary.to_dict(), list(texts)]
            self._first = cached_arrays("word-vectors", key, lambda: self._learn(texts), self._cache)
        return self

    def tokenize(self, texts: Sequence[str]) -> TokenTable:
        """Texts as rows of the embedding; where a word is unknown, with the numbers of its pieces."""
        vocabulary = self.vocabulary
        words = [vocabulary.tokens(text) for text in texts]
        rows = np.array([vocabulary.row(word) for text in words for word in text], dtype=np.int64)
        unknown = [
            vocabulary.pieces_of(word) for text in words for word in text if vocabulary.row(word) == UNKNOWN
        ]
        pieces = np.zeros((len(rows), max([1, *map(len, unknown)])), dtype=np.int32)
        for place, numbers in zip(np.flatnonzero(rows == UNKNOWN), unknown, strict=True):
            pieces[place, : len(numbers)] = numbers
        return TokenTable({"word": rows, "pieces": pieces}, [len(text) for text in words])

    def build(self) -> RecurrentTextEncoder:
        """A fresh network, initialised from torch's generator; first vectors where ``fit`` learned them."""
        o, vocabulary = self.options, self.vocabulary
        pieces: list[list[int]] = [[], [], *map(vocabulary.pieces_of, vocabulary.words)]
        embedding = WordEmbedding(pieces, len(vocabulary.pieces), o["dims"], o["dropout"], o["word_dropout"])
        if self._first is not None:
            words, parts = (torch.from_numpy(self._first[name]) * _SCALE for name in ("words", "pieces"))
            embedding.begin_with(words, parts)
        return RecurrentTextEncoder(embedding, o["dims"], o["hidden"], o["widths"], o["layers"], o["dropout"])

    def save(self, folder: str | Path) -> None:
        """Write options and vocabulary; the network's weights are kept by the run."""
        write_spec(folder, {"kind": self.kind, "options": self.options, "vocabulary": _VOCABULARY_FILE})
        kept = json.dumps(self.vocabulary.to_dict(), ensure_ascii=False)
        (Path(folder) / _VOCABULARY_FILE).write_text(kept + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> WordTextEncoder:
        """The encoder that ``save`` wrote. Its ``build`` awaits the weights of the run: it begins at random."""
        encoder = cls(**read_spec(folder)["options"])
        path = Path(folder) / _VOCABULARY_FILE
        try:
            encoder._vocabulary = WordVocabulary.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise NearfarError(f"{folder} holds no vocabulary ({_VOCABULARY_FILE} is missing).") from None
        except (ValueError, KeyError, TypeError) as error:
            raise NearfarError(f"{path} is damaged: {error}.") from None
        return encoder

    def _learn(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        words, pieces = context_vectors(self.vocabulary, texts, self.options["dims"])
        return {"words": words, "pieces": pieces}
