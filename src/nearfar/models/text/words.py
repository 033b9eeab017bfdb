"""Words of informal text and their pieces: spelling made uniform, without a dictionary of any language.

People who write on a phone double letters, leave diacritics out, and place a Vietnamese tone mark on either vowel
("hòa", "hoà"). Here a word is spelled with its tone mark at the end, and its pieces are those of that spelling and
those of the letters without any mark, so that "tốt", "tôt" and "tot" have much in common. Numbers keep their shape.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from nearfar.errors import NearfarError

__all__ = ["PADDING", "UNKNOWN", "WordVocabulary", "split_words", "word_pieces"]

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
    found = []
    for match in _TOKEN.finditer(unicodedata.normalize("NFC", text).lower()):
        token = match.group()
        if match["number"]:
            token = "0" * min(len(token), 3) if token.isdigit() else "0.0"
        elif match["word"]:
            token = _LONG.sub(lambda run: run[1] or run[2], token)
        else:
            token = token[:2]
        found.append(token)
        if len(found) == most:
            break
    return found


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
        found = (self._piece.get(piece) for piece in word_pieces(word, *self.spans)) if word else ()
        return list(dict.fromkeys(number for number in found if number is not None))

    def to_dict(self) -> dict[str, Any]:
        """What ``from_dict`` reads, for JSON."""
        return {"words": self.words, "pieces": self.pieces, "spans": list(self.spans), "most": self.most}

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> WordVocabulary:
        """The vocabulary that ``to_dict`` gave."""
        shortest, longest = kept["spans"]
        return cls(kept["words"], kept["pieces"], (int(shortest), int(longest)), int(kept["most"]))
