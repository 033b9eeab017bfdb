"""Aspects and polarities: how files write them, and the codes they become.

A review has one code per aspect: 0 not mentioned, 1 negative, 2 neutral, 3 positive, −1 not known (what stood there
could not be read). An aspect that files mention without polarity, such as UIT-ViSFD's ``{OTHERS}``, is neutral where it
is mentioned: it has a single pair.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray

__all__ = [
    "ABSENT",
    "NEGATIVE",
    "NEUTRAL",
    "POLARITIES",
    "POSITIVE",
    "UNKNOWN",
    "LabelScheme",
    "parse_field",
    "polarity_code",
]

UNKNOWN, ABSENT, NEGATIVE, NEUTRAL, POSITIVE = -1, 0, 1, 2, 3
POLARITIES = ("negative", "neutral", "positive")

_WORDS = {
    "": ABSENT, "none": ABSENT, "nan": ABSENT, "null": ABSENT, "absent": ABSENT, "not mentioned": ABSENT,
    "negative": NEGATIVE, "neg": NEGATIVE, "tiêu cực": NEGATIVE,
    "neutral": NEUTRAL, "neu": NEUTRAL, "trung tính": NEUTRAL,
    "positive": POSITIVE, "pos": POSITIVE, "tích cực": POSITIVE,
}  # fmt: skip
_LABEL = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class LabelScheme:
    """The aspects of a data set, and the pairs (aspect, polarity) that its training rows hold.

    >>> scheme = LabelScheme.of(["CAMERA", "OTHERS"], np.array([[3, 2], [1, 0]]))
    >>> scheme.pair_names
    ['CAMERA negative', 'CAMERA positive', 'OTHERS neutral']
    """

    aspects: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, aspects: Sequence[str], codes: Int[ndarray, "n a"]) -> LabelScheme:
        """The pairs are those that occur in ``codes``."""
        kinds = range(1, len(POLARITIES) + 1)
        there = [(a, k) for a in range(len(aspects)) for k in kinds if bool((codes[:, a] == k).any())]
        return cls(tuple(aspects), tuple(there))

    @property
    def classes(self) -> int:
        """Classes of each aspect: not mentioned, and the polarities."""
        return 1 + len(POLARITIES)

    @property
    def pair_array(self) -> Int[ndarray, "k 2"]:
        """The pairs as rows (aspect, code)."""
        return np.array(self.pairs, dtype=np.int64).reshape(-1, 2)

    @property
    def pair_names(self) -> list[str]:
        """``CAMERA negative`` and so on."""
        return [f"{self.aspects[a]} {POLARITIES[k - 1]}" for a, k in self.pairs]


def polarity_code(word: str) -> int:
    """The code of a cell or of the part behind ``#``; `UNKNOWN` for a word that is no polarity.

    >>> [polarity_code(word) for word in ("Positive", " neg ", "", "mixed")]
    [3, 1, 0, -1]
    """
    return _WORDS.get(" ".join(word.split()).lower(), UNKNOWN)


def parse_field(field: str) -> tuple[dict[str, int], list[str]]:
    """The labels of a field ``{ASPECT#Polarity};…``, and what in it could not be read.

    An aspect that stands twice with two polarities is not known; without ``#`` it is neutral.

    >>> parse_field("{CAMERA#Positive};{OTHERS};{PRICE#so-so};")
    ({'CAMERA': 3, 'OTHERS': 2, 'PRICE': -1}, ['PRICE#so-so'])
    """
    found: dict[str, int] = {}
    unread = [rest for part in _LABEL.sub("", field).split(";") if (rest := part.strip())]
    for label in _LABEL.findall(field):
        aspect, mark, polarity = (part.strip() for part in label.partition("#"))
        code = polarity_code(polarity) if mark else NEUTRAL
        if not aspect:
            unread.append(label)
            continue
        if code in (UNKNOWN, ABSENT) or found.get(aspect, code) != code:
            unread.append(label)
            code = UNKNOWN
        found[aspect] = code
    return found, unread
