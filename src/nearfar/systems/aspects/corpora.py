"""Corpora in formats of their own: the XML of SemEval and MAMS, and the text files of VLSP-2018."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nearfar.data.delimited import decode, text_lines
from nearfar.data.rejections import Rejections
from nearfar.data.table_formats import content_of
from nearfar.errors import NearfarError
from nearfar.systems.aspects.labels import UNKNOWN, parse_field, polarity_code

__all__ = ["Sentence", "read_vlsp", "read_xml", "starts_vlsp"]

_NO_TARGET = ("", "NULL")


@dataclass
class Sentence:
    """A text, its labels (aspect, code), its id, and its line or place in the file.

    ``words`` are the words of polarities that could not be read, by aspect.
    """

    text: str
    labels: list[tuple[str, int]]
    identity: str
    number: int
    words: dict[str, str] = field(default_factory=dict)


# -- XML -----------------------------------------------------------------------------------------------------
def read_xml(path: Path, what: str | None = None) -> tuple[list[Sentence], str, Rejections]:
    """Sentences of SemEval-2014 and MAMS (aspectTerms, aspectCategories) or of SemEval-2015 and 2016 (Opinions).

    Args:
        path: the file; entities, which can fill the memory or name other files, are refused.
        what: what counts as the aspect, ``category`` or ``term``; null: the category, where the file has any.

    Returns:
        Sentences, how they were read, what was turned away (sentences that are out of scope).

    Raises:
        NearfarError: no XML, another kind of XML, none of what was asked for.
    """
    root = _parsed(path)
    nodes = list(_sentences(root))
    if not nodes:
        raise NearfarError(
            f"{path}: no <sentence> with a <text>, as SemEval and MAMS have (its root is <{root.tag}>)."
        )
    kinds = {"category": 0, "term": 0}
    for node in nodes:
        for kind, _, _ in _labels(node):
            kinds[kind] += 1
    asked = {
        "category": "category",
        "aspectcategory": "category",
        "term": "term",
        "aspectterm": "term",
        "target": "term",
    }
    chosen = "category" if kinds["category"] else "term"
    if what is not None:
        key = what.lower().replace("_", "")
        if key not in asked:
            raise NearfarError(f"data.aspect_column={what}: of XML it is category or term.")
        chosen = asked[key]
    if not kinds[chosen]:
        raise NearfarError(f"{path} labels no {chosen} in its {len(nodes)} sentences.")
    rejections = Rejections()
    sentences = []
    for number, node in enumerate(nodes, start=1):
        if (node.get("OutOfScope") or "").lower() == "true":
            rejections.add("out of scope", number, _text(node))
            continue
        labels, words = [], {}
        for kind, aspect, polarity in _labels(node):
            if kind == chosen:
                code = polarity_code(polarity) or UNKNOWN
                labels.append((aspect, code))
                if code == UNKNOWN:
                    words[aspect] = polarity or "empty"
        sentences.append(Sentence(_text(node), labels, node.get("id") or str(number), number, words))
    other = "term" if chosen == "category" else "category"
    layout = f"XML, by aspect {chosen}"
    if kinds[other]:
        layout += f" ({kinds[other]} labels by {other} not used: data.aspect_column={other})"
    return sentences, layout, rejections


def _parsed(path: Path) -> Any:
    try:
        from defusedxml.common import DefusedXmlException
        from defusedxml.ElementTree import ParseError, fromstring
    except ImportError:
        raise NearfarError(f"{path}: XML is read by defusedxml: pip install 'nearfar[aspects]'.") from None
    try:
        return fromstring(content_of(path))
    except ParseError as error:
        raise NearfarError(f"{path} cannot be read as XML: {error}.") from None
    except DefusedXmlException as error:
        raise NearfarError(
            f"{path} declares entities, which are not read: {type(error).__name__}. Take its <!DOCTYPE …> out."
        ) from None
    except (ValueError, LookupError, RecursionError) as error:
        raise NearfarError(f"{path} cannot be read as XML: {error}.") from None


def _sentences(root: Any) -> Iterator[Any]:
    """The nodes that hold a text and its labels: sentences, or whole reviews where only those are labelled."""
    reviews = list(root.iter("Review"))
    if reviews and not any(True for node in root.iter("sentence") if node.find("Opinions") is not None):
        yield from (review for review in reviews if review.find("Opinions") is not None)
        return
    yield from (node for node in root.iter("sentence") if node.find("text") is not None)


def _text(node: Any) -> str:
    return " ".join(" ".join("".join(text.itertext()).split()) for text in node.iter("text")).strip()


def _labels(node: Any) -> Iterator[tuple[str, str, str]]:
    """(kind, aspect, polarity) for each label of a sentence."""
    for label in node.iter():
        polarity = (label.get("polarity") or "").strip()
        if label.tag == "aspectTerm":
            yield "term", (label.get("term") or "").strip(), polarity
        elif label.tag == "aspectCategory":
            yield "category", (label.get("category") or "").strip(), polarity
        elif label.tag == "Opinion":
            if category := (label.get("category") or "").strip():
                yield "category", category, polarity
            if (target := (label.get("target") or "").strip()) not in _NO_TARGET:
                yield "term", target, polarity


# -- VLSP ----------------------------------------------------------------------------------------------------
_NUMBER = re.compile(r"#\s*\d+")


def starts_vlsp(path: Path) -> bool:
    """Whether a text file begins with a line ``#1``."""
    if path.suffix.lower() != ".txt":
        return False
    with path.open("rb") as file:
        head = file.read(4096).decode("utf-8-sig", errors="replace")
    lines = [line.strip() for line in text_lines(head) if line.strip()]
    return bool(lines) and _NUMBER.fullmatch(lines[0]) is not None


def read_vlsp(
    path: Path, encoding: str | None = None, words: Mapping[str, int] | None = None
) -> tuple[list[Sentence], Rejections]:
    """Blocks of a line ``#1``, the text, and a line of ``{ENTITY#ATTRIBUTE, polarity}`` labels.

    Raises:
        NearfarError: bytes of another encoding.
    """
    lines = text_lines(decode(path, content_of(path), encoding, "data.encoding"))
    starts = [i for i, line in enumerate(lines) if _NUMBER.fullmatch(line.strip())]
    rejections, sentences = Rejections(), []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        block = [line.strip() for line in lines[start + 1 : end] if line.strip()]
        labelled = bool(block) and block[-1].startswith("{")
        if len(block) < 1 + labelled or not block:
            rejections.add("empty text", start + 1, lines[start])
            continue
        found, unread = parse_field(block[-1], words) if labelled else ({}, [])
        text = " ".join(block[:-1] if labelled else block)
        bad = {aspect: ", ".join(unread) for aspect, code in found.items() if code == UNKNOWN}
        sentences.append(Sentence(text, list(found.items()), lines[start].strip(), start + 1, bad))
    return sentences, rejections
