"""Aspects and polarities: parsing of labels, and the codes that stand for them.

A review has one code per aspect: 0 not mentioned, 1 negative, 2 neutral, 3 positive, −1 unknown (a label that could not
be read). An aspect that files mention without polarity, such as UIT-ViSFD's ``{OTHERS}``, is neutral where it
is mentioned: it has a single pair.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from nearfar.errors import NearfarError

__all__ = [
    "ABSENT",
    "NEGATIVE",
    "NEUTRAL",
    "POLARITIES",
    "POSITIVE",
    "UNKNOWN",
    "LabelScheme",
    "code_words",
    "mostly_polarities",
    "parse_field",
    "polarities_advice",
    "polarity_code",
]

UNKNOWN, ABSENT, NEGATIVE, NEUTRAL, POSITIVE = -1, 0, 1, 2, 3
POLARITIES = ("negative", "neutral", "positive")

_WORDS = {
    "": ABSENT, "none": ABSENT, "nan": ABSENT, "null": ABSENT, "absent": ABSENT, "not mentioned": ABSENT,
    "n/a": ABSENT, "na": ABSENT, "<na>": ABSENT, "-": ABSENT,
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
        pairs = [(a, k) for a in range(len(aspects)) for k in kinds if bool((codes[:, a] == k).any())]
        return cls(tuple(aspects), tuple(pairs))

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


def polarity_code(word: str, words: Mapping[str, int] | None = None) -> int:
    """The code of a cell or of the part behind ``#``; `UNKNOWN` for a word that is no polarity.

    ``words`` are codes of further words, by `code_words`; they go before the usual ones.

    >>> [polarity_code(word) for word in ("Positive", " neg ", "", "mixed", "1")]
    [3, 1, 0, -1, -1]
    >>> polarity_code("1.0", code_words({1: "positive"}))
    3
    """
    key = _word_key(word)
    if words is not None and key in words:
        return words[key]
    return _WORDS.get(key, UNKNOWN)


def code_words(given: Mapping[object, object] | None) -> dict[str, int]:
    """The option ``data.polarities``, such as ``{1: positive, 2: negative, 3: neutral, 0: none}``, as codes of words.

    Raises ``NearfarError`` for a meaning that is none of positive, negative, neutral and none.
    """
    meanings = {"none": ABSENT, "negative": NEGATIVE, "neutral": NEUTRAL, "positive": POSITIVE}
    codes = {}
    for word, meaning in (given or {}).items():
        name = "none" if meaning is None else str(meaning).strip().lower()
        if name not in meanings:
            raise NearfarError(
                f"data.polarities: {word} means {meaning!r}; known: positive, negative, neutral, none (not mentioned)."
            )
        codes[_word_key(str(word))] = meanings[name]
    return codes


def polarities_advice(values: Iterable[str], given: Mapping[str, int] | None = None) -> str:
    """The option that gives values a meaning, ready to be copied; ``given`` are the words that have one already.

    >>> polarities_advice(["0", "1", "1.0", "-1"])[:62]
    "Say what each means, such as 'data.polarities={-1: negative, 0"
    """
    words = list(dict.fromkeys(_word_key(value) for value in values if _word_key(value) not in _WORDS))
    plain = [word for word in words if re.fullmatch(r"[-\w][-\w ]*", word)][:12]
    if not plain:
        return "Words such as positive, negative and neutral are needed."
    if all(re.fullmatch(r"-?\d+", word) for word in plain):
        plain.sort(key=int)
        usual = _USUAL_CODES.get(tuple(plain)) or _by_rank(len(plain))
    else:
        usual = [_guess(word) for word in plain]
    meanings = dict(zip(plain, usual, strict=True))
    meanings |= {word: ("none", *POLARITIES)[code] for word, code in (given or {}).items()}
    option = ", ".join(f"{word}: {meaning}" for word, meaning in meanings.items())
    return (
        f"Say what each means, such as 'data.polarities={{{option}}}', with the meanings that the description of "
        "the data gives (positive, negative, neutral, or none for not mentioned)."
    )


_USUAL_CODES: dict[tuple[str, ...], Sequence[str]] = {
    ("-1", "0", "1"): ("negative", "neutral", "positive"),
    ("0", "1", "2"): ("negative", "neutral", "positive"),
    ("0", "1", "2", "3"): ("none", "positive", "negative", "neutral"),  # VLSP-2018 as a table
}


def _by_rank(n: int) -> list[str]:
    return ["negative" if 2 * i + 1 < n else "neutral" if 2 * i + 1 == n else "positive" for i in range(n)]


_LIKE = {
    "positive": ("pos", "good", "great", "happy", "satisf", "like", "gut", "bon", "bueno", "tốt", "tích"),
    "negative": (
        "neg",
        "bad",
        "poor",
        "unhappy",
        "dissat",
        "dislike",
        "schlecht",
        "mal",
        "tệ",
        "tiêu",
        "xấu",
    ),
}


def _guess(word: str) -> str:
    """A first guess for the example in a message; the user decides what a word means."""
    return next((meaning for meaning, heads in _LIKE.items() if word.startswith(heads)), "neutral")


def _word_key(word: str) -> str:
    key = " ".join(word.split()).lower()
    number = re.fullmatch(r"([+-]?)0*(\d+)(?:\.0*)?", key)
    return key if number is None else number[1].replace("+", "") * (number[2] != "0") + number[2]


#: share of the filled cells that must be polarities for a column to count as an aspect
ASPECT_SHARE = 0.5


def mostly_polarities(codes: Iterable[int]) -> bool:
    """Whether more than half of the labels that are given (not `ABSENT`) have a known polarity.

    >>> mostly_polarities([POSITIVE, UNKNOWN, NEGATIVE, ABSENT]), mostly_polarities([ABSENT])
    (True, False)
    """
    filled = [code for code in codes if code != ABSENT]
    return bool(filled) and sum(code != UNKNOWN for code in filled) > ASPECT_SHARE * len(filled)


def parse_field(field: str, words: Mapping[str, int] | None = None) -> tuple[dict[str, int], list[str]]:
    """The labels of a field, and the parts of it that could not be read.

    Read are ``{ASPECT#Polarity};…``, ``{ENTITY#ATTRIBUTE, polarity}, …`` of VLSP, the same without braces where
    semicolons separate, and lists or dictionaries in JSON or as Python prints them. An aspect that occurs twice
    with different polarities is unknown; in braces without ``#`` it is neutral.

    >>> parse_field("{CAMERA#Positive};{OTHERS};{PRICE#so-so};")
    ({'CAMERA': 3, 'OTHERS': 2, 'PRICE': -1}, ['PRICE#so-so'])
    >>> parse_field("{ROOMS#CLEANLINESS, positive}, {SERVICE#GENERAL, negative}")
    ({'ROOMS#CLEANLINESS': 3, 'SERVICE#GENERAL': 1}, [])
    >>> parse_field("[('food', 'positive')]"), parse_field('{"food": "negative"}')
    (({'food': 3}, []), ({'food': 1}, []))
    """
    pairs, unread = _pairs(field, words)
    labels: dict[str, int] = {}
    spelling: dict[str, str] = {}
    for aspect, code, label in pairs:
        name = spelling.setdefault(aspect.casefold(), aspect)
        if not aspect:
            unread.append(label)
            continue
        if code in (UNKNOWN, ABSENT) or labels.get(name, code) != code:
            unread.append(label)
            code = UNKNOWN
        labels[name] = code
    return labels, unread


def _pairs(field: str, words: Mapping[str, int] | None) -> tuple[list[tuple[str, int, str]], list[str]]:
    """(aspect, code, original spelling) for each label of a field, and the rest of the field."""
    if (literal := _literal(field)) is not None:
        pairs = [
            (aspect.strip(), polarity_code(polarity, words), f"{aspect}, {polarity}")
            for aspect, polarity in literal
        ]
        # An aspect that a dictionary names with no polarity is not mentioned.
        return [pair for pair in pairs if pair[1] != ABSENT], []
    pairs, unread = [], []
    for part in _LABEL.sub("", field).replace(",", ";").split(";"):
        aspect, code = _split_label(part, words)
        if code > ABSENT and aspect:  # without braces only what is surely a label
            pairs.append((aspect, code, part.strip()))
        elif part.strip():
            unread.append(part.strip())
    for label in _LABEL.findall(field):
        aspect, code = _split_label(label, words)
        if not any(mark in label for mark in "#,"):
            aspect, code = label.strip(), NEUTRAL
        pairs.append((aspect, code, label.strip()))
    return pairs, unread


def _split_label(label: str, words: Mapping[str, int] | None) -> tuple[str, int]:
    """Aspect and code: the polarity follows the last separator behind which there is one."""
    for mark in (",", "#", ":"):
        aspect, separator, polarity = (part.strip() for part in label.rpartition(mark))
        if separator and polarity_code(polarity, words) != UNKNOWN:
            return aspect, polarity_code(polarity, words)
    return label.partition("#")[0].partition(",")[0].strip(), UNKNOWN


def _literal(field: str) -> list[tuple[str, str]] | None:
    """Pairs of a list or dictionary in JSON or Python's notation; ``None`` where the field is none."""
    text = field.strip()
    if not (text.startswith("[") or re.match(r"\{\s*['\"]", text)) or len(text) > 100_000:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)  # literals alone: nothing is run
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    items = list(value.items()) if isinstance(value, dict) else value
    if isinstance(value, dict) and (pair := _named_pair(value)) is not None:
        items = [pair]
    pairs = []
    for item in items if isinstance(items, (list, tuple, set)) else []:
        pair = _named_pair(item) if isinstance(item, dict) else item
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            return None
        pairs.append(("" if pair[0] is None else str(pair[0]), "" if pair[1] is None else str(pair[1])))
    return pairs


_ASPECT_KEYS = ("aspect", "category", "term", "target", "aspect_category", "aspect_term")
_POLARITY_KEYS = ("polarity", "sentiment", "label", "opinion")


def _named_pair(item: Mapping[object, object]) -> tuple[object, object] | None:
    keys = {str(key).strip().lower(): key for key in item}
    aspect = next((keys[name] for name in _ASPECT_KEYS if name in keys), None)
    polarity = next((keys[name] for name in _POLARITY_KEYS if name in keys), None)
    return None if aspect is None or polarity is None else (item[aspect], item[polarity])
