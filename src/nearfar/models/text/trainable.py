"""A text encoder that is trained with its task, from the words of the training texts alone.

`benchmarks/aspect_encoders.py` measures it beside other kinds of encoder on Vietnamese phone reviews.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from nearfar.data.cache import cached_arrays
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.models.text.protocol import check_number, read_spec, write_spec
from nearfar.models.text.recurrent import RecurrentTextEncoder, WordEmbedding
from nearfar.models.text.words import UNKNOWN, TokenTable, WordVocabulary, context_vectors

__all__ = ["WordTextEncoder"]

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
