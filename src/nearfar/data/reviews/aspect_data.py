"""The data of the aspect system: read or generated, split so that no text is in two splits; and new reviews."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Unpack

import numpy as np

from nearfar.data.chunks import NewData, read_chunks
from nearfar.data.delimited import decode
from nearfar.data.files import Json
from nearfar.data.items import Items
from nearfar.data.rejections import Rejections
from nearfar.data.reviews.corpora import CORPORA, CORPUS_SUFFIXES, Sentence, corpus_kind, read_texts
from nearfar.data.reviews.labels import NEGATIVE, NEUTRAL, POLARITIES, POSITIVE, LabelScheme, code_words
from nearfar.data.reviews.readers import Reading, read_records
from nearfar.data.reviews.records import Records, hold_out, separate, split_layout, text_key
from nearfar.data.splits import check_disjoint
from nearfar.data.table_formats import content_of, full_suffix
from nearfar.data.tables import is_placeholder
from nearfar.errors import NearfarError, nearest_name

__all__ = ["AspectData", "embedded_records", "load_embedded", "load_files", "read_reviews", "usable_reviews"]


_THINGS = {
    "BATTERY": ("the battery", "battery life", "a full charge"),
    "CAMERA": ("the camera", "every photo", "the lens"),
    "DESIGN": ("the case", "the look of it", "the back cover"),
    "PERFORMANCE": ("the processor", "gaming", "switching apps"),
    "PRICE": ("the price", "what it costs", "the discount"),
    "SCREEN": ("the screen", "the display", "touch"),
    "SERVICE": ("the shop", "the staff", "delivery"),
}
_SAYINGS = {
    POSITIVE: ("is great", "is better than expected", "is not bad at all", "is what I wanted"),
    NEUTRAL: ("is average", "is neither good nor bad", "is as expected", "is all right"),
    NEGATIVE: ("is bad", "could be better", "is not great", "is not what I wanted"),
}
_OWN_SAYINGS = {
    "BATTERY": {POSITIVE: "lasts two days", NEUTRAL: "lasts a day", NEGATIVE: "drains by noon"},
    "CAMERA": {POSITIVE: "came out sharp", NEUTRAL: "is usable by day", NEGATIVE: "came out blurred"},
    "DESIGN": {POSITIVE: "feels solid", NEUTRAL: "looks like any other", NEGATIVE: "scratches at once"},
    "PERFORMANCE": {POSITIVE: "runs smoothly", NEUTRAL: "takes a moment", NEGATIVE: "lags and freezes"},
    "PRICE": {POSITIVE: "is a bargain", NEUTRAL: "is in the usual range", NEGATIVE: "is too high"},
    "SCREEN": {POSITIVE: "shows rich colours", NEUTRAL: "is readable indoors", NEGATIVE: "flickers"},
    "SERVICE": {POSITIVE: "was friendly", NEUTRAL: "took the stated time", NEGATIVE: "never answered"},
}
_BETWEEN = ("", "", ", to be honest,", " of this phone", " for me")
_JOINS = (", ", ". ", " and ", " but ", "; ", "... ")
_FILLERS = (
    "bought it last week",
    "second phone of this kind",
    "writing after a month",
    "ok",
    "for my mother",
    "hm",
)


def embedded_records(n: int = 4000, seed: int = 0) -> tuple[Records, list[str]]:
    """``n`` different generated reviews and their aspects; the same for the same ``n`` and ``seed``."""
    rng = np.random.default_rng(seed)
    aspects = sorted(_THINGS)
    share = np.linspace(1.0, 0.2, len(aspects))
    texts: dict[str, dict[str, int]] = {}
    while len(texts) < n:
        count = 1 + int(rng.integers(4))
        chosen = rng.choice(len(aspects), size=count, replace=False, p=share / share.sum())
        labels: dict[str, int] = {}
        parts = [_one(rng, _FILLERS)] if rng.random() < 0.5 else []
        for a in chosen:
            aspect = aspects[a]
            code = int(rng.choice([POSITIVE, NEUTRAL, NEGATIVE], p=[0.55, 0.1, 0.35]))
            thing, between, saying = (_one(rng, some) for some in (_THINGS[aspect], _BETWEEN, _SAYINGS[code]))
            if rng.random() < 0.5:
                saying = _OWN_SAYINGS[aspect][code]
            parts.append(f"{thing}{between} {saying}")
            labels[aspect] = code
        text = parts[0]
        for part in parts[1:]:
            text += _one(rng, _JOINS) + part
        texts.setdefault(text, labels)
    return (
        Records(
            "embedded",
            list(texts),
            list(texts.values()),
            [str(i) for i in range(n)],
            n,
            "generated",
        ),
        aspects,
    )


def _one(rng: np.random.Generator, some: tuple[str, ...]) -> str:
    return some[int(rng.integers(len(some)))]


@dataclass(frozen=True)
class AspectData:
    """The splits of one experiment, items with the columns ``text`` and ``codes`` (n, A), their aspects and sources.

    ``tune`` is the part of train on which thresholds are chosen if results are reported on val; None where val serves
    for that, or where no thresholds are chosen. ``reported`` is "test", or "val" without a test file.
    """

    scheme: LabelScheme
    train: Items
    val: Items | None
    test: Items | None
    tune: Items | None
    sources: list[Json]
    notes: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, Items]:
        """The splits that exist, by name."""
        by_name = {"train": self.train, "val": self.val, "test": self.test, "tune": self.tune}
        return {name: split for name, split in by_name.items() if split is not None}

    @property
    def reported(self) -> str:
        """The split on which results are reported."""
        return "test" if self.test is not None else "val"

    @property
    def threshold_split(self) -> str | None:
        """The split on which thresholds are chosen, never the reported one; None for no such split."""
        if self.test is not None and self.val is not None:
            return "val"
        return "tune" if self.tune is not None else None

    def layout(self) -> dict[str, object]:
        """The content of ``dataset_layout.json``: aspects, sources with rejections, counts, hashes, leaks."""
        aspects = self.scheme.aspects
        texts = {
            name: [text_key(text) for text in items.texts("text")] for name, items in self.splits.items()
        }
        return {
            "system": "aspects",
            "aspects": list(aspects),
            "pairs": self.scheme.pair_names,
            "sources": self.sources,
            "splits": {name: split_layout(items, aspects) for name, items in self.splits.items()},
            "reported": self.reported,
            "thresholds_on": self.threshold_split,
            "repeats_left_out": self.left_out,
            "notes": self.notes,
            "leaks": check_disjoint(texts, what="text", on_leak="count"),
        }

    def summary(self) -> str:
        """A few lines for a log: reviews of each split, rejected rows and labels, the reported split."""
        lines = [f"aspects: {', '.join(self.scheme.aspects)}; {len(self.scheme.pairs)} aspect-polarity pairs"]
        for name, split in self.splits.items():
            mentions = int((split.array("codes") > 0).sum())
            lines.append(f"{name}: {len(split)} reviews, {mentions} mentions of aspects ({split.source})")
        for source in self.sources:
            lines += [f"{source['path']}: {note}" for note in source["reading"]]
            for what in ("rejections", "unread_labels"):
                rejections = Rejections.from_dict(source[what])
                if len(rejections):
                    text = rejections.summary() if what == "rejections" else _unread_words(rejections)
                    lines.append(f"{source['path']}: {text}")
        for where, count in self.left_out.items():
            lines.append(f"left out of {where}: {count}")
        return "\n".join([*lines, *self.notes.values()])


def _unread_words(unread: Rejections) -> str:
    return (
        unread.summary().replace("rows rejected", "labels not read").replace("row rejected", "label not read")
    )


def load_files(
    paths: Mapping[str, Path | None],
    *,
    polarities: Mapping[object, object] | None = None,
    aspects: Sequence[str] | None = None,
    min_mentions: int = 5,
    val_fraction: float = 0.1,
    tune_fraction: float = 0.1,
    seed: int = 0,
    **reading: Unpack[Reading],
) -> AspectData:
    """Reviews from files: see `read_records` for the formats of files.

    Args:
        paths: the files of "train", "val" and "test"; without val a part of train is held out, without test
            results are reported on val.
        polarities: what words or numbers mean, see `code_words`.
        aspects: their names; where null, what train mentions at least ``min_mentions`` times.
        tune_fraction: without a test file, the share of train held out for choosing thresholds (0: none are chosen).
        seed: of the hold-out.
        reading: columns and encoding, as of `read_records`.

    Raises:
        NearfarError: what `read_records` raises, an aspect that train lacks, too few reviews, no label to learn from.
    """
    words = code_words(polarities)
    train_path = paths["train"]
    assert train_path is not None
    read = {"train": read_records(train_path, aspects=aspects, polarities=words, **reading)}
    names = aspects if aspects is not None else _aspects(read["train"], min_mentions)
    columns = list(names) if read["train"].layout == "one column per aspect" else None
    for name in ("val", "test"):
        if (path := paths.get(name)) is not None:
            read[name] = read_records(path, aspects=columns, polarities=words, **reading)
    notes: dict[str, str] = {}
    for name, records in read.items():
        _count_unknown(name, records, names)
        if records.layout == "label field" and (bare := _without_polarity(records, names)):
            notes["no polarity"] = f"mentioned without polarity, taken as neutral: {', '.join(bare)}"
    return _assemble(read, names, notes, val_fraction, tune_fraction, seed)


def load_embedded(n: int = 4000, seed: int = 0) -> AspectData:
    """Generated reviews for a first run without data, split 8 : 1 : 1; scores on them mean nothing for real reviews."""
    records, aspects = embedded_records(n, seed)
    order = np.random.default_rng(seed).permutation(len(records))
    tenth = max(1, len(order) // 10)
    parts = {"test": order[:tenth], "val": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    read = {name: records.take(sorted(parts[name].tolist())) for name in ("train", "val", "test")}
    notes = {"data": f"{len(records)} generated reviews (seed {seed}): they show how it works, and no result"}
    return _assemble(read, aspects, notes, 0.1, 0.0, seed)


def _aspects(records: Records, least: int) -> list[str]:
    """Aspects that are mentioned often enough, under their most frequent spelling, in alphabetical order."""
    spellings: dict[str, Counter[str]] = {}
    for labels in records.labels:
        for aspect, code in labels.items():
            if code > 0:
                spellings.setdefault(aspect.casefold(), Counter())[aspect] += 1
    counts = {spelling.most_common(1)[0][0]: spelling.total() for spelling in spellings.values()}
    kept = [aspect for aspect, count in counts.items() if count >= least]
    if not counts:
        unread = f"; {_unread_words(records.unread)}" if len(records.unread) else ""
        raise NearfarError(
            f"{records.source}: none of its {len(records)} reviews has a label that can be read{unread}."
        )
    if not kept:
        top = max(counts, key=lambda aspect: counts[aspect])
        raise NearfarError(
            f"{records.source} mentions none of its {len(counts)} aspects {least} times; the commonest, {top!r}, comes "
            f"{counts[top]} times. data.min_mentions={counts[top]} keeps it."
        )
    return sorted(kept)


def _count_unknown(split: str, records: Records, aspects: Sequence[str]) -> None:
    known = {aspect.casefold() for aspect in aspects}
    reason = (
        "aspect that is rare or was not chosen" if split == "train" else "aspect that is not one of train's"
    )
    for row, labels in zip(records.ids, records.labels, strict=True):
        for aspect in labels:
            if aspect.casefold() not in known:
                near = nearest_name(aspect, aspects).rstrip(".")
                line = int(row) if row.isdecimal() and row.isascii() and len(row) < 19 else None
                records.unread.add(f"{reason} ({split})", line, aspect, near)


def _without_polarity(records: Records, aspects: Sequence[str]) -> list[str]:
    codes = records.codes(aspects)
    return [name for a, name in enumerate(aspects) if set(np.unique(codes[:, a])) == {0, 2}]


def _read_words(records: Records) -> str:
    words = [*records.notes, records.rejections.summary()]
    return "; ".join([*words, _unread_words(records.unread)] if len(records.unread) else words) + "."


def _unknown_to_train(scheme: LabelScheme, parts: Mapping[str, Items | None]) -> dict[str, str]:
    """Notes on labels missing from train: aspects without a mention, and pairs that only val or test have."""
    mentioned = {a for a, _ in scheme.pairs}
    notes = {}
    if never := [name for a, name in enumerate(scheme.aspects) if a not in mentioned]:
        notes["never in train"] = f"train never mentions {', '.join(never)}: nothing can be learned of it"
    for split, part in parts.items():
        if part is None:
            continue
        codes = part.array("codes")
        counts = {
            f"{name} {POLARITIES[kind - 1]}": count
            for a, name in enumerate(scheme.aspects)
            for kind in range(1, scheme.classes)
            if (a, kind) not in scheme.pairs and (count := int((codes[:, a] == kind).sum()))
        }
        if counts:
            shown = ", ".join(f"{pair} {count}" for pair, count in list(counts.items())[:8])
            more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
            notes[f"unknown to train ({split})"] = (
                f"{split} has {sum(counts.values())} labels of {len(counts)} aspect-polarity pairs that train never "
                f"has, and that no model can learn from it: {shown}{more}"
            )
    return notes


def _assemble(
    read: dict[str, Records],
    aspects: Sequence[str],
    notes: dict[str, str],
    val_fraction: float,
    tune_fraction: float,
    seed: int,
) -> AspectData:
    parts = {name: records.items(aspects) for name, records in read.items()}
    sources = [records.source_layout() for records in read.values()]
    left_out = separate(parts)
    train = parts["train"]
    if "val" not in parts:
        train, parts["val"] = hold_out(train, val_fraction, "val", seed)
        notes["val"] = (
            f"no val file: {len(parts['val'])} of {len(train) + len(parts['val'])} training reviews were held out "
            f"(fraction {val_fraction:g}, seed {seed})"
        )
    tune = None
    if "test" in parts:
        notes["reported"] = f"results are on {Path(parts['test'].source).name} (test)"
        notes["thresholds"] = "epoch and thresholds are chosen on val"
    else:
        notes["reported"] = (
            f"no test file: results are on val ({Path(parts['val'].source).name}), "
            "by which the best epoch is chosen too"
        )
        if tune_fraction:
            train, tune = hold_out(train, tune_fraction, "tune", seed)
            notes["thresholds"] = (
                f"thresholds are chosen on {len(tune)} training reviews that were held out (fraction {tune_fraction:g})"
            )
        else:
            notes["thresholds"] = "no thresholds are chosen: no split is left for it (data.tune_fraction=0)"
    scheme = LabelScheme.of(aspects, train.array("codes"))
    if not scheme.pairs:
        raise NearfarError(
            f"{train.source}: the {len(train)} reviews left for training mention none of the aspects "
            f"({', '.join(aspects[:12])}): there is no label to learn from. See what was read: "
            f"{_read_words(read['train'])}"
        )
    notes |= _unknown_to_train(scheme, {"val": parts["val"], "test": parts.get("test")})
    return AspectData(scheme, train, parts["val"], parts.get("test"), tune, sources, notes, left_out)


def read_reviews(source: NewData, headers: Sequence[str], id_headers: Sequence[str] = ()) -> Iterator[Items]:
    """Reviews of a user's file, in chunks, as items with the column ``text``; labels are neither needed nor read.

    A table has them in a column with one of ``headers``, best first, or in its only one; XML of SemEval or MAMS and
    text corpora such as VLSP are read whole. Empty texts, and words for a missing one, are counted as rejections.
    """
    path = Path(source.path).expanduser()
    suffix = full_suffix(path) if path.is_file() else ""
    if suffix == ".xml" or (suffix in CORPUS_SUFFIXES and _is_corpus(path, source.encoding)):
        sentences, rejections = _sentences(path, suffix, source.encoding)
        whole = Items(
            [each.identity for each in sentences],
            {"text": [each.text for each in sentences]},
            str(path),
            rows=[each.number for each in sentences],
        )
        for start in range(0, max(1, len(whole)), source.rows):
            chunk = whole.take(range(start, min(start + source.rows, len(whole))))
            yield usable_reviews(replace(chunk, rejections=rejections if start == 0 else Rejections()))
        return
    for items in read_chunks(source, {"text": headers}, ids=id_headers):
        yield usable_reviews(items)


def usable_reviews(items: Items) -> Items:
    """Without reviews whose text is empty or only says that it is missing, as training leaves them out."""
    texts = items["text"]
    wrong = [
        "empty text" if text is None or not str(text).strip() or is_placeholder(str(text)) else None
        for text in (texts.tolist() if isinstance(texts, np.ndarray) else texts)
    ]
    kept = items.rejecting("text", wrong)
    return replace(kept, columns={**kept.columns, "text": [str(text) for text in kept["text"]]})


def _is_corpus(path: Path, encoding: str | None) -> bool:
    return bool(corpus_kind(decode(path, content_of(path), encoding, "--encoding")))


def _sentences(path: Path, suffix: str, encoding: str | None) -> tuple[list[Sentence], Rejections]:
    """Each text of a file once, whatever it is labelled with."""
    if suffix == ".xml":
        sentences, rejections = read_texts(path)
    else:
        text = decode(path, content_of(path), encoding, "--encoding")
        sentences, rejections = CORPORA[corpus_kind(text)](text, None)
    seen: dict[str, Sentence] = {}
    for sentence in sentences:
        seen.setdefault(" ".join(sentence.text.split()) or str(sentence.number), sentence)
    return list(seen.values()), rejections
