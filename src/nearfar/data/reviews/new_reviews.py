"""New reviews without labels, for a trained run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nearfar.data.chunks import NewData, read_chunks
from nearfar.data.delimited import decode
from nearfar.data.items import Items
from nearfar.data.rejections import Rejections
from nearfar.data.reviews.corpora import CORPORA, CORPUS_SUFFIXES, Sentence, corpus_kind, read_texts
from nearfar.data.table_formats import content_of, full_suffix
from nearfar.data.tables import is_placeholder

__all__ = ["read_reviews", "usable_reviews"]


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
