"""Reviews with their aspect labels, checked, without duplicates, and split by groups."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from nearfar.data.files import Json
from nearfar.data.items import Items
from nearfar.data.rejections import Rejections
from nearfar.data.reviews.labels import POLARITIES
from nearfar.errors import NearfarError

__all__ = ["Records", "hold_out", "repeats", "separate", "split_layout", "text_key"]


def text_key(text: str) -> str:
    """The key under which two texts count as the same: letter case, blanks and the form of accents are ignored.

    >>> text_key("Pin  TRÂU\\n") == text_key("pin trâu")
    True
    """
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


@dataclass
class Records:
    """The reviews of one source: ``labels[i]`` maps aspects, in the spelling of the source, to codes.

    ``rejections`` counts rejected rows, ``unread`` labels and columns that could not be read in rows that were kept;
    ``notes`` are remarks on how the file was read.
    """

    source: str
    texts: list[str]
    labels: list[dict[str, int]]
    ids: list[str]
    n_rows: int
    layout: str
    rejections: Rejections = field(default_factory=Rejections)
    unread: Rejections = field(default_factory=Rejections)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, chosen: Sequence[int]) -> Records:
        """The chosen reviews, in that order."""
        return Records(
            self.source,
            [self.texts[i] for i in chosen],
            [self.labels[i] for i in chosen],
            [self.ids[i] for i in chosen],
            self.n_rows,
            self.layout,
            self.rejections,
            self.unread,
            self.notes,
        )

    def items(self, aspects: Sequence[str]) -> Items:
        """The reviews as items with the columns ``text`` and ``codes``; ids are made unique by the file's name."""
        ids = [f"{Path(self.source).name}:{each}" for each in self.ids]
        return Items(ids, {"text": self.texts, "codes": self.codes(aspects)}, self.source)

    def codes(self, aspects: Sequence[str]) -> Int[ndarray, "n a"]:
        """Codes (n, A) in the order of ``aspects``; letter case is ignored, unlabelled is 0."""
        place = {aspect.casefold(): i for i, aspect in enumerate(aspects)}
        codes = np.zeros((len(self), len(aspects)), dtype=np.int64)
        for row, labels in enumerate(self.labels):
            for aspect, code in labels.items():
                if (column := place.get(aspect.casefold())) is not None:
                    codes[row, column] = code
        return codes

    def source_layout(self) -> Json:
        """The entry of the source in ``dataset_layout.json``."""
        return {
            "path": self.source,
            "layout": self.layout,
            "rows": self.n_rows,
            "taken": len(self),
            "reading": self.notes,
            "rejections": self.rejections.as_dict(),
            "unread_labels": self.unread.as_dict(),
        }


def split_layout(items: Items, aspects: Sequence[str]) -> dict[str, object]:
    """Counts and hash of a split, for ``dataset_layout.json``."""
    codes = items.array("codes")
    counts = {
        aspect: {name: int((codes[:, a] == kind).sum()) for kind, name in enumerate(POLARITIES, start=1)}
        for a, aspect in enumerate(aspects)
    }
    return {
        "rows": len(items),
        "source": items.source,
        "texts": len({text_key(text) for text in items.texts("text")}),
        "mentions": counts,
        "unknown_labels": int((codes < 0).sum()),
        "label_combinations": len(Counter(map(tuple, codes.tolist()))),
        "split_hash": items.hash,
    }


def separate(parts: dict[str, Items]) -> dict[str, int]:
    """Remove texts that occur in several splits from ``parts``, in place: from train if val or test has them, from val
    if test has them. Of copies in train with the same labels one is kept. Copies within val and within test are kept.

    Returns the number of removed rows by reason.
    """
    keys = {name: [text_key(text) for text in items.texts("text")] for name, items in parts.items()}
    left_out: dict[str, int] = {}
    for name, others in (("train", ("val", "test")), ("val", ("test",))):
        if name not in parts:
            continue
        taken = set().union(*(keys[other] for other in others if other in keys))
        crossing = np.array([key in taken for key in keys[name]], dtype=bool)
        repeated = np.zeros(len(crossing), dtype=bool)
        if name == "train":
            seen: set[tuple[str, bytes]] = set()
            codes = parts[name].array("codes")
            for i, key in enumerate(keys[name]):
                content = (key, codes[i].tobytes())
                repeated[i] = content in seen
                seen.add(content)
        for words, which in (
            (f"{name}, its text also stands in {' or '.join(o for o in others if o in keys)}", crossing),
            (f"{name}, the same text and labels again", repeated & ~crossing),
        ):
            if which.any():
                left_out[words] = int(which.sum())
        kept = np.flatnonzero(~crossing & ~repeated)
        if not len(kept):
            raise NearfarError(
                f"every text of {name} also stands in a different split: nothing is left of it."
            )
        parts[name] = parts[name].take(kept)
        keys[name] = [keys[name][i] for i in kept]
    return left_out


def hold_out(items: Items, fraction: float, name: str, seed: int) -> tuple[Items, Items]:
    """Two parts that share no text, drawn by ``seed``; copies of a text stay together."""
    keys = [text_key(text) for text in items.texts("text")]
    distinct = sorted(set(keys))
    out = max(1, round(fraction * len(distinct)))
    if len(distinct) - out < 2:
        raise NearfarError(
            f"{items.source} has {len(distinct)} different texts: too few to hold {out} of them out as {name}."
        )
    drawn: Int[ndarray, " n"] = np.random.default_rng([seed, len(distinct)]).permutation(len(distinct))[:out]
    chosen = {distinct[i] for i in drawn}
    held_out = np.array([key in chosen for key in keys])
    return items.take(np.flatnonzero(~held_out)), items.take(np.flatnonzero(held_out))


def repeats(
    codes: Int[ndarray, "n a"], pairs: Int[ndarray, "k 2"], frequency: float, most: int, seed: int = 0
) -> Int[ndarray, " n"]:
    """Copies of each review: at least 1, at most ``most``; labels of less than the share ``frequency`` are rare.

    >>> codes = np.array([[3]] * 99 + [[2]])
    >>> repeats(codes, np.array([[0, 3], [0, 2]]), frequency=0.16, most=10)[-2:].tolist()
    [1, 4]
    """
    wanted = np.ones(len(codes))
    for aspect, polarity in pairs:
        has_label = codes[:, aspect] == polarity
        share = has_label.mean()
        if share > 0:
            wanted[has_label] = np.maximum(wanted[has_label], np.sqrt(frequency / share))
    rounded = np.floor(wanted + np.random.default_rng(seed).random(len(codes))).astype(np.int64)
    return np.clip(rounded, 1, most)
