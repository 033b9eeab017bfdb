"""Corpora in formats of their own: the XML of SemEval and MAMS, and the text files of VLSP, PyABSA and ASTE."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nearfar.data.delimited import text_lines
from nearfar.data.rejections import Rejections
from nearfar.data.reviews.labels import (
    UNKNOWN,
    mostly_polarities,
    parse_field,
    polarities_advice,
    polarity_code,
)
from nearfar.data.reviews.records import Records
from nearfar.data.table_formats import content_of
from nearfar.data.tables import is_placeholder
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

__all__ = [
    "CORPORA",
    "CORPUS_SUFFIXES",
    "Sentence",
    "corpus_kind",
    "group_sentences",
    "read_texts",
    "read_three_lines",
    "read_tuples",
    "read_vlsp",
    "read_xml",
    "require_polarities",
]

_NO_TARGET = ("", "NULL")


@dataclass
class Sentence:
    """A text, its labels (aspect, code), its id, and its line or position in the file.

    ``words`` are the words for polarities that could not be read, by aspect.
    """

    text: str
    labels: list[tuple[str, int]]
    identity: str
    number: int
    words: dict[str, str] = field(default_factory=dict)


def require_polarities(
    path: Path, sentences: Sequence[Sentence], words: Mapping[str, int] | None = None
) -> None:
    """Raise ``NearfarError`` where most labels have unknown words or numbers for polarities."""
    codes = [code for sentence in sentences for _, code in sentence.labels]
    unknown = [word for sentence in sentences for word in sentence.words.values()]
    if codes and not mostly_polarities(codes):
        common = [word for word, _ in Counter(unknown).most_common(12)]
        shown = ", ".join(map(repr, common))
        raise NearfarError(
            f"{path}: most of its labels have no polarity that is known ({shown}). "
            + polarities_advice(common, words)
        )


def group_sentences(
    path: Path,
    sentences: Sequence[Sentence],
    layout: str,
    rejections: Rejections,
    n_rows: int | None = None,
    unread: Rejections | None = None,
) -> Records:
    """Reviews from sentences or rows of single labels: those with the same text are one review.

    Args:
        path, layout: of the file, for messages and ``dataset_layout.json``.
        rejections: what was rejected so far; sentences without a text are added.
        n_rows: rows of the file; null: sentences and rejections.
        unread: labels that could not be read so far; unknown and contradicting ones are added.

    Raises:
        NearfarError: no sentence has a text.
    """
    unread = Rejections() if unread is None else unread
    records = Records(
        str(path), [], [], [], n_rows or len(sentences) + len(rejections), layout, rejections, unread
    )
    place: dict[str, int] = {}
    taken: set[str] = set()
    repeated = 0
    for sentence in sentences:
        text = sentence.text
        if not text.strip() or is_placeholder(text):
            rejections.add("empty text", sentence.number, text)
            continue
        key = " ".join(text.split())
        if key not in place:
            place[key] = len(records.texts)
            identity = sentence.identity if sentence.identity not in taken else str(sentence.number)
            taken.add(identity)
            records.texts.append(text)
            records.labels.append({})
            records.ids.append(identity)
        labels = records.labels[place[key]]
        for aspect, code in sentence.labels:
            name = next((a for a in labels if a.casefold() == aspect.casefold()), aspect)
            before = labels.get(name)
            repeated += before is not None and before == code
            if code == UNKNOWN and sentence.words.get(aspect):
                unread.add(
                    "polarity that is none", sentence.number, f"{aspect}: {sentence.words.get(aspect)}"
                )
            if before is not None and before != code:  # one label is lost, whether it is this one or the last
                unread.add("contradicting labels of one text and aspect", sentence.number, aspect)
            labels[name] = code if before in (None, code) else UNKNOWN
    if not records.texts:
        raise NearfarError(f"{path}: none of its {records.n_rows} rows is usable; {rejections.summary()}.")
    mentions = sum(len(labels) for labels in records.labels)
    note = f"{layout}: {len(sentences)} rows became {len(records)} reviews with {mentions} labels"
    records.notes.append(note + (f"; {repeated} repeat a label" if repeated else ""))
    return records


# -- XML -----------------------------------------------------------------------------------------------------
def read_xml(
    path: Path, what: str | None = None, words: Mapping[str, int] | None = None
) -> tuple[list[Sentence], str, Rejections]:
    """Sentences of SemEval-2014 and MAMS (aspectTerms, aspectCategories) or of SemEval-2015 and 2016 (Opinions).

    Args:
        path: the file; entities, which can fill the memory or name other files, are refused.
        what: what counts as the aspect, ``category`` or ``term``; null: the category, where the file has any.
        words: codes of further words for polarities.

    Returns:
        Sentences, their layout in words, and the rejected sentences (those out of scope).

    Raises:
        NearfarError: no XML, a different kind of XML, no label of the chosen kind.
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
    names = {
        "category": "category",
        "aspectcategory": "category",
        "term": "term",
        "aspectterm": "term",
        "target": "term",
    }
    chosen = "category" if kinds["category"] else "term"
    if what is not None:
        key = what.lower().replace("_", "")
        if key not in names:
            raise NearfarError(f"data.aspect_column={what}: of XML it is category or term.")
        chosen = names[key]
    if not kinds[chosen]:
        raise NearfarError(f"{path} labels no {chosen} in its {len(nodes)} sentences.")
    rejections = Rejections()
    sentences = []
    for number, node in enumerate(nodes, start=1):
        if (node.get("OutOfScope") or "").lower() == "true":
            rejections.add("out of scope", number, _text(node))
            continue
        labels, bad = [], {}
        for kind, aspect, polarity in _labels(node):
            if kind == chosen:
                code = polarity_code(polarity, words) or UNKNOWN
                labels.append((aspect, code))
                if code == UNKNOWN:
                    bad[aspect] = polarity or "empty"
        sentences.append(Sentence(_text(node), labels, node.get("id") or str(number), number, bad))
    other = "term" if chosen == "category" else "category"
    layout = f"XML, by aspect {chosen}"
    if kinds[other]:
        layout += f" ({kinds[other]} labels by {other} not used: data.aspect_column={other})"
    return sentences, layout, rejections


def read_texts(path: Path) -> tuple[list[Sentence], Rejections]:
    """The sentences of such a file without their labels, which new ones do not have."""
    root, rejections = _parsed(path), Rejections()
    nodes = list(_sentences(root))
    if not nodes:  # sentences of reviews none of which is labelled
        nodes = [node for node in root.iter("sentence") if node.find("text") is not None]
    if not nodes:
        raise NearfarError(
            f"{path}: no <sentence> with a <text>, as SemEval and MAMS have (its root is <{root.tag}>)."
        )
    sentences = []
    for number, node in enumerate(nodes, start=1):
        if (node.get("OutOfScope") or "").lower() == "true":
            rejections.add("out of scope", number, _text(node))
        else:
            sentences.append(Sentence(_text(node), [], node.get("id") or str(number), number))
    return sentences, rejections


def _parsed(path: Path) -> Element:
    """The root of an XML file."""
    try:
        from defusedxml.common import DefusedXmlException
        from defusedxml.ElementTree import ParseError, fromstring
    except ImportError:
        raise NearfarError(f"{path}: XML is read by defusedxml: pip install 'nearfar[aspects]'.") from None
    try:
        root: Element = fromstring(content_of(path))
        return root
    except ParseError as error:
        raise NearfarError(f"{path} cannot be read as XML: {error}.") from None
    except DefusedXmlException as error:
        raise NearfarError(
            f"{path} declares entities, which are not read: {type(error).__name__}. Take its <!DOCTYPE …> out."
        ) from None
    except (ValueError, LookupError, RecursionError) as error:
        raise NearfarError(f"{path} cannot be read as XML: {error}.") from None


def _sentences(root: Element) -> Iterator[Element]:
    """The nodes with a text and its labels: sentences, or whole reviews where only those are labelled."""
    reviews = list(root.iter("Review"))
    if reviews and not any(True for node in root.iter("sentence") if node.find("Opinions") is not None):
        yield from (review for review in reviews if review.find("Opinions") is not None)
        return
    yield from (node for node in root.iter("sentence") if node.find("text") is not None)


def _text(node: Element) -> str:
    return " ".join(" ".join("".join(text.itertext()).split()) for text in node.iter("text")).strip()


def _labels(node: Element) -> Iterator[tuple[str, str, str]]:
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


# -- text ----------------------------------------------------------------------------------------------------
CORPUS_SUFFIXES = (".txt", ".raw", ".seg", ".dat", ".apc")
_NUMBER = re.compile(r"#\s*\d+")
_TUPLES = "####"
_PLACE = "$T$"


def corpus_kind(text: str) -> str:
    """The key of `CORPORA` whose form the first lines of a text have; "" for none."""
    head = [line.strip() for line in text_lines(text[:20_000]) if line.strip()]
    if head and _NUMBER.fullmatch(head[0]):
        return VLSP
    if head and _TUPLES in head[0] and head[0].partition(_TUPLES)[2].startswith("["):
        return TUPLES
    return THREE_LINES if len(head) >= 3 and _PLACE in head[0] and _PLACE not in head[1] + head[2] else ""


def read_vlsp(text: str, words: Mapping[str, int] | None = None) -> tuple[list[Sentence], Rejections]:
    """Blocks of a line ``#1``, the text, and a line of ``{ENTITY#ATTRIBUTE, polarity}`` labels (VLSP-2018).

    >>> sentences, rejections = read_vlsp("#1\\nPhòng sạch\\n{ROOMS#CLEANLINESS, positive}\\n\\n#2\\n")
    >>> sentences[0].labels, rejections.counts
    ([('ROOMS#CLEANLINESS', 3)], {'empty text': 1})
    """
    lines = text_lines(text)
    starts = [i for i, line in enumerate(lines) if _NUMBER.fullmatch(line.strip())]
    rejections, sentences = Rejections(), []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        block = [line.strip() for line in lines[start + 1 : end] if line.strip()]
        labelled = bool(block) and block[-1].startswith("{")
        if not block[: len(block) - labelled]:
            rejections.add("empty text", start + 1, lines[start])
            continue
        labels, unread = parse_field(block[-1], words) if labelled else ({}, [])
        bad = {aspect: ", ".join(unread) for aspect, code in labels.items() if code == UNKNOWN}
        review = " ".join(block[: len(block) - labelled])
        sentences.append(Sentence(review, list(labels.items()), lines[start].strip(), start + 1, bad))
    return sentences, rejections


def read_three_lines(text: str, words: Mapping[str, int] | None = None) -> tuple[list[Sentence], Rejections]:
    """Three lines a label: the text with ``$T$`` for the aspect term, the term, the polarity (``.raw``, PyABSA).

    >>> sentences, _ = read_three_lines("the $T$ is good\\nfood\\npositive\\n")
    >>> sentences[0].text, sentences[0].labels
    ('the food is good', [('food', 3)])
    """
    numbered = [(i, line.strip()) for i, line in enumerate(text_lines(text), start=1) if line.strip()]
    rejections, sentences = Rejections(), []
    position = 0
    while position < len(numbered):
        number, line = numbered[position]
        block = [content for _, content in numbered[position : position + 3]]
        if _PLACE not in line or len(block) < 3 or any(_PLACE in content for content in block[1:]):
            rejections.add("no block of three lines", number, line)
            position += 1
            continue
        code = polarity_code(block[2], words) or UNKNOWN
        bad = {block[1]: block[2]} if code == UNKNOWN else {}
        review = line.replace(_PLACE, block[1])
        sentences.append(Sentence(review, [(block[1], code)], str(number), number, bad))
        position += 3
    return sentences, rejections


def read_tuples(text: str, words: Mapping[str, int] | None = None) -> tuple[list[Sentence], Rejections]:
    """Lines ``text####[…]`` of triplets and quadruples: ASTE with places of words, ASQP with a category.

    >>> sentences, _ = read_tuples("the food is good####[([1], [3], 'POS')]")
    >>> sentences[0].labels
    [('food', 3)]
    """
    rejections, sentences = Rejections(), []
    for number, line in enumerate(text_lines(text), start=1):
        review, _, literal = line.partition(_TUPLES)
        try:
            pairs = [_tuple_label(item, review.split()) for item in ast.literal_eval(literal.strip())]
        except (ValueError, SyntaxError, TypeError, IndexError, RecursionError, MemoryError):
            rejections.add("no labels behind ####", number, line)
            continue
        labels = [(aspect, polarity_code(word, words) or UNKNOWN) for aspect, word in pairs]
        bad = {
            aspect: word for (aspect, word), (_, code) in zip(pairs, labels, strict=True) if code == UNKNOWN
        }
        sentences.append(Sentence(review.strip(), labels, str(number), number, bad))
    return sentences, rejections


def _tuple_label(item: Sequence[str | list[int]], review: Sequence[str]) -> tuple[str, str]:
    """Aspect and polarity of a triplet (places of the term, places of the opinion, polarity) or a quadruple (term,
    category, polarity, opinion)."""
    if len(item) == 3 and not isinstance(item[0], str):
        return " ".join(review[place] for place in item[0]), str(item[2])
    if len(item) in (3, 4):
        return str(item[1]), str(item[2])
    raise ValueError(item)


VLSP, THREE_LINES, TUPLES = "blocks of VLSP-2018", "three lines a label with $T$", "lines text####[tuples]"
CORPORA: dict[str, Callable[[str, Mapping[str, int] | None], tuple[list[Sentence], Rejections]]] = {
    VLSP: read_vlsp,
    THREE_LINES: read_three_lines,
    TUPLES: read_tuples,
}
"""Readers of the text corpora, by the form of their files."""
