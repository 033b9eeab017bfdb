"""Texts as words or pieces of words: vocabularies, bounded batches of tokens, word vectors from files."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray
from torch import Tensor

from nearfar.data.files import Json
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from scipy import sparse

__all__ = [
    "PADDING",
    "UNKNOWN",
    "TokenBatch",
    "TokenTable",
    "WordVocabulary",
    "context_vectors",
    "split_words",
    "word_pieces",
]


@dataclass
class TokenBatch:
    """Padded tokens: every feature is (b, t, …), 0 where ``mask`` (b, t) is false."""

    features: dict[str, Shaped[Tensor, "b t ..."]]
    mask: Bool[Tensor, "b t"]

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, name: str) -> Tensor:
        return self.features[name]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in self.features.items()}
        return TokenBatch(moved, self.mask.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenBatch:
        pinned = {name: x.pin_memory() for name, x in self.features.items()}
        return TokenBatch(pinned, self.mask.pin_memory())

    def split(self, rows: int) -> list[TokenBatch]:
        """Parts of at most ``rows`` texts, padded as far as each part needs."""
        parts = []
        for start in range(0, len(self), rows):
            mask = self.mask[start : start + rows]
            longest = max(1, int(mask.sum(1).max()))
            chosen = {name: x[start : start + rows, :longest] for name, x in self.features.items()}
            parts.append(TokenBatch(chosen, mask[:, :longest]))
        return parts


class TokenTable:
    """The tokens of all texts of a split.

    ``features``: arrays (tokens, …) by name; ``lengths``: tokens of each text (a text has at least one).

    >>> table = TokenTable({"id": np.array([5, 6, 7])}, [2, 1])
    >>> batch = table.batch([1, 0])
    >>> batch["id"].tolist(), batch.mask.tolist()
    ([[7, 0], [5, 6]], [[True, False], [True, True]])
    """

    def __init__(
        self,
        features: Mapping[str, Shaped[ndarray, "tokens ..."]],
        lengths: Sequence[int] | Int[ndarray, " n"],
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if not len(self.lengths) or self.lengths.min() < 1:
            raise NearfarError("every text has at least one token; give an empty one a token of its own")
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.features = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in features.items()}
        for name, x in self.features.items():
            if len(x) != self.starts[-1]:
                raise NearfarError(f"feature {name} has {len(x)} rows for {self.starts[-1]} tokens")

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, positions: Sequence[int] | Int[Tensor, " b"]) -> TokenBatch:
        """The texts at these positions, padded to the longest of them."""
        chosen = np.asarray(positions, dtype=np.int64)
        lengths = self.lengths[chosen]
        place = np.arange(int(lengths.max()))
        mask = place < lengths[:, None]
        index = torch.from_numpy(np.where(mask, self.starts[chosen][:, None] + place, 0))
        present = torch.from_numpy(mask)
        features = {}
        for name, x in self.features.items():
            padded = x[index]
            padded[~present] = 0
            features[name] = padded
        return TokenBatch(features, present)


PADDING, UNKNOWN = 0, 1  # rows of the embedding; words begin after them

_TONES = "\u0300\u0301\u0303\u0309\u0323"  # grave, acute, tilde, hook, dot below: the tones of Vietnamese
_TOKEN = re.compile(r"(?P<number>\d+(?:[.,/:]\d+)*)|(?P<word>[^\W\d_]+)|(?P<sign>[^\w\s]|_)(?P=sign)*")
_LONG = re.compile(r"(\w)\1{2,}|(\w)\2+\b")  # three of a letter anywhere, two at the end


def split_words(text: str, most: int | None = None) -> list[str]:
    """The words, numbers and signs of a text in lower case, at most ``most`` of them.

    Repeated letters and signs are shortened; a number becomes ``0`` to ``000`` by its digits, or ``0.0`` with a
    separator (price, date, size).

    >>> split_words("Máy đẹpppp quáá!!! Pin 88%, giá 7.990.000đ 👍")
    ['máy', 'đẹp', 'quá', '!!', 'pin', '00', '%', ',', 'giá', '0.0', 'đ', '👍']
    """
    words = []
    for match in _TOKEN.finditer(unicodedata.normalize("NFC", text).lower()):
        token = match.group()
        if match["number"]:
            token = "0" * min(len(token), 3) if token.isdigit() else "0.0"
        elif match["word"]:
            token = _LONG.sub(lambda run: run[1] or run[2], token)
        else:
            token = token[:2]
        words.append(token)
        if len(words) == most:
            break
    return words


@lru_cache(maxsize=100_000)
def spelling(word: str) -> str:
    """The word with its tone marks at the end, wherever they stood.

    >>> spelling("hòa") == spelling("hoà"), spelling("ma") == spelling("má")
    (True, False)
    """
    letters = unicodedata.normalize("NFD", word)
    tones = "".join(c for c in letters if c in _TONES)
    return unicodedata.normalize("NFC", "".join(c for c in letters if c not in _TONES)) + tones


def word_pieces(word: str, shortest: int = 2, longest: int = 5) -> list[str]:
    """Character n-grams of a `spelling` between ``<`` and ``>``, and of the word without marks (after ``~``).

    The first is the whole word without marks. Bojanowski et al. (2017) sum such pieces (fastText).

    >>> word_pieces("tốt", 3, 4)[:4]
    ['~tot', '~<to', '~tot', '~ot>']
    """
    spelled = spelling(word)
    bare = "".join(c for c in unicodedata.normalize("NFD", spelled) if not unicodedata.combining(c))
    bare = bare.replace("đ", "d")
    pieces = [f"~{bare}"]
    for form, mark in ((bare, "~"), (spelled, "")) if bare != spelled else ((bare, "~"),):
        inside = f"<{form}>"
        for n in range(shortest, longest + 1):
            pieces += [mark + inside[i : i + n] for i in range(len(inside) - n + 1)]
    return pieces


class WordVocabulary:
    """The words and pieces of the training texts, by falling count.

    ``rows`` gives a text as rows of the word embedding (2, 3, … ; 1 is an unknown word), ``pieces_of`` the pieces of
    a word as numbers from 1 on. An unknown word has its pieces still.

    >>> vocabulary = WordVocabulary.fit(["pin tốt", "pin tot"], min_piece_count=1)
    >>> vocabulary.rows("pin rất tốt")
    [2, 1, 4]
    >>> len(vocabulary.words), len(set(vocabulary.pieces_of("tốt")) & set(vocabulary.pieces_of("tôt"))) > 5
    (3, True)
    """

    def __init__(
        self, words: Sequence[str], pieces: Sequence[str], spans: tuple[int, int], most: int
    ) -> None:
        self.words = list(words)
        self.pieces = list(pieces)
        self.spans = spans
        self.most = most
        self._row = {word: row for row, word in enumerate(self.words, UNKNOWN + 1)}
        self._piece = {piece: number for number, piece in enumerate(self.pieces, 1)}

    @classmethod
    def fit(
        cls,
        texts: Iterable[str],
        *,
        spans: tuple[int, int] | None = (2, 5),
        most: int = 128,
        min_count: int = 1,
        min_piece_count: int = 2,
    ) -> WordVocabulary:
        """The vocabulary of these texts.

        Args:
            texts: training texts.
            spans: shortest and longest piece; None for the word without marks as the only piece.
            most: words read of a text.
            min_count: a word that comes less often is unknown.
            min_piece_count: a piece stands in so many different words.
        """
        counts = Counter(spelling(word) for text in texts for word in split_words(text, most))
        if not counts:
            raise NearfarError("the training texts have not a single word")
        shortest, longest = spans or (1, 0)
        pieces = Counter(piece for word in counts for piece in set(word_pieces(word, shortest, longest)))
        return cls(
            [
                word
                for word, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
                if n >= min_count
            ],
            sorted(piece for piece, n in pieces.items() if n >= min_piece_count),
            (shortest, longest),
            most,
        )

    def tokens(self, text: str) -> list[str]:
        """The spelled words of a text; one empty word where there is none."""
        return [spelling(word) for word in split_words(text, self.most)] or [""]

    def rows(self, text: str) -> list[int]:
        """The rows of a text's words in the embedding."""
        return [self.row(word) for word in self.tokens(text)]

    def row(self, word: str) -> int:
        """The row of a spelled word."""
        return self._row.get(word, UNKNOWN)

    def pieces_of(self, word: str) -> list[int]:
        """The known pieces of a spelled word, each once, in order."""
        rows = (self._piece.get(piece) for piece in word_pieces(word, *self.spans)) if word else ()
        return list(dict.fromkeys(number for number in rows if number is not None))

    def to_dict(self) -> dict[str, object]:
        """What ``from_dict`` reads, for JSON."""
        return {"words": self.words, "pieces": self.pieces, "spans": list(self.spans), "most": self.most}

    @classmethod
    def from_dict(cls, kept: Json) -> WordVocabulary:
        """The vocabulary that ``to_dict`` gave."""
        shortest, longest = kept["spans"]
        return cls(kept["words"], kept["pieces"], (int(shortest), int(longest)), int(kept["most"]))


_WINDOW = 5  # words to either side; a word at distance k counts 1 / k
_CONTEXTS = 3000  # the most frequent words serve as contexts
_SMOOTHING = 0.75  # power of the contexts' frequencies
_PRIOR = 5.0  # a row of total count n keeps n / (n + 5) of its information: rare words say little


def context_vectors(
    vocabulary: WordVocabulary, texts: Sequence[str], dims: int
) -> tuple[Float[ndarray, "words d"], Float[ndarray, "pieces d"]]:
    """Vectors of words and of pieces by a truncated SVD of positive pointwise mutual information.

    Levy and Goldberg (2014) show that skip-gram factorises this matrix; with a few thousand texts the factorisation
    needs a few seconds. The row of a piece is the sum of the rows of its words: it lies in the space of the words, and
    so does an unknown word made of pieces. Entries of words have a root mean square of 1;
    dimensions beyond the number of contexts are 0. Row 0 of the pieces and rows 0 and 1 of the words are 0.

    >>> vocabulary = WordVocabulary.fit(["pin trâu", "pin khỏe", "màn hình đẹp"], min_piece_count=1)
    >>> words, pieces = context_vectors(vocabulary, ["pin trâu", "pin khỏe", "màn hình đẹp"], 2)
    >>> words.shape == (8, 2), len(pieces) == len(vocabulary.pieces) + 1
    (True, True)
    """
    from scipy import sparse

    words = len(vocabulary.words) + UNKNOWN + 1
    together = _cooccurrence([np.asarray(vocabulary.rows(text)) for text in texts], words)
    pieces_of_words = [vocabulary.pieces_of(word) for word in vocabulary.words]
    columns = np.repeat(np.arange(UNKNOWN + 1, words), [len(row) for row in pieces_of_words])
    rows = np.asarray([piece for row in pieces_of_words for piece in row], dtype=np.int64)
    members = sparse.csr_matrix(
        (np.ones(len(rows)), (rows, columns)), shape=(len(vocabulary.pieces) + 1, words)
    )
    frequency = np.asarray(together.sum(axis=0)).ravel()
    contexts = np.argsort(-frequency, kind="stable")[:_CONTEXTS]
    contexts = contexts[frequency[contexts] > 0]
    shape = (words + len(vocabulary.pieces) + 1, dims)
    vectors = np.zeros(shape, dtype=np.float32)
    if len(contexts):
        counts = sparse.vstack([together, members @ together]).tocsc()[:, contexts].tocoo()
        information = _positive_information(counts, frequency[contexts] ** _SMOOTHING)
        axes = _axes(information[:words], dims)
        vectors[:, : axes.shape[1]] = information @ axes
        vectors /= max(float(np.sqrt((vectors[:words] ** 2).mean())), 1e-9)
    vectors[: UNKNOWN + 1] = 0
    vectors[words] = 0
    return vectors[:words], vectors[words:]


def _cooccurrence(texts: Sequence[ndarray], words: int) -> sparse.csr_matrix:
    """(words, words), symmetric: how often two words stand near each other, weighted by 1 / distance."""
    from scipy import sparse

    total = sparse.csr_matrix((words, words), dtype=np.float64)
    for distance in range(1, _WINDOW + 1):
        long = [text for text in texts if len(text) > distance]
        if not long:
            break
        left = np.concatenate([text[:-distance] for text in long])
        right = np.concatenate([text[distance:] for text in long])
        known = (left > UNKNOWN) & (right > UNKNOWN)
        weights = np.full(int(known.sum()), 1 / distance)
        pairs = sparse.csr_matrix((weights, (left[known], right[known])), shape=(words, words))
        total = total + pairs + pairs.T
    return total.tocsr()


def _positive_information(counts: sparse.coo_matrix, contexts: ndarray) -> sparse.csr_matrix:
    from scipy import sparse

    rows = np.asarray(counts.sum(axis=1)).ravel()
    share = contexts / contexts.sum()
    value = np.log(counts.data / (rows[counts.row] * share[counts.col]))
    value = np.maximum(value, 0) * rows[counts.row] / (rows[counts.row] + _PRIOR)
    return sparse.csr_matrix((value, (counts.row, counts.col)), shape=counts.shape)


def _axes(matrix: sparse.csr_matrix, dims: int) -> Float[ndarray, "contexts d"]:
    """Right singular vectors over the root of their singular values, so that rows times these are U √S."""
    from sklearn.utils.extmath import randomized_svd

    dims = min(dims, *matrix.shape)
    _, values, axes = randomized_svd(matrix, dims, n_iter=3, random_state=0)
    real = values > values[0] * 1e-6
    axes = axes[real] / np.sqrt(values[real])[:, None]
    return np.asarray(axes.T)
