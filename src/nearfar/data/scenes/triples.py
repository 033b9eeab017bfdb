"""Pairs of objects with their relation: names of relations, checks of triples from all readers, columns of pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from nearfar.data.files import Json
from nearfar.data.images import Box, Photo
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "ALL10",
    "NAMES",
    "SPATIAL",
    "TOP5",
    "VISUAL",
    "Pairs",
    "Triple",
    "boxed_pairs",
    "chosen_relations",
    "collect_pairs",
    "relation_of",
    "table",
]


TOP5 = ("on", "above", "under", "next to", "below")
ALL10 = (*TOP5, "left of", "right of", "near", "inside", "outside")

#: relation → its synonyms. Names of an action (`sit on`, `ride`) are not spatial relations alone, and not here.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "on": ("on top of", "on the top of", "atop", "upon"),
    "above": ("over",),
    "under": ("underneath",),
    "next to": ("beside", "adjacent to", "by", "alongside"),
    "below": ("beneath",),
    "left of": ("on the left of", "to the left of", "on left of"),
    "right of": ("on the right of", "to the right of", "on right of"),
    "near": ("near to", "close to", "nearby"),
    "inside": ("in", "inside of", "within"),
    "outside": ("outside of",),
}
_OF = {name: relation for relation, names in SYNONYMS.items() for name in (relation, *names)}


def relation_of(predicate: str, synonyms: bool = True) -> str | None:
    """The relation that a predicate names, None if it names none of the ten.

    Case, underscores and repeated blanks are ignored; without ``synonyms`` the ten names alone are known.

    >>> relation_of("On_the left  of"), relation_of("beneath"), relation_of("wear")
    ('left of', 'below', None)
    >>> relation_of("beneath", synonyms=False) is None
    True
    """
    name = " ".join(str(predicate).replace("_", " ").lower().split())
    return _OF.get(name) if synonyms else (name if name in ALL10 else None)


def table() -> list[tuple[str, str]]:
    """(predicate, relation) for every known name, in order of the relations."""
    return [(name, relation) for relation, names in SYNONYMS.items() for name in (relation, *names)]


def chosen_relations(option: object) -> tuple[str, ...]:
    """The classes of the option ``relations``: "top5", "all10", or a list of names of the ten.

    >>> chosen_relations(["under", "on"])
    ('under', 'on')
    >>> chosen_relations("top6")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: relations=top6: top5, all10 or a list such as [on,under] is needed.
    """
    if isinstance(option, str):
        if option not in ("top5", "all10"):
            raise NearfarError(f"relations={option}: top5, all10 or a list such as [on,under] is needed.")
        return TOP5 if option == "top5" else ALL10
    if not isinstance(option, Iterable):
        raise NearfarError(f"relations={option}: top5, all10 or a list such as [on,under] is needed.")
    names: Sequence[str] = [str(name) for name in option]
    for name in names:
        if name not in ALL10:
            raise NearfarError(f"relations: there is no relation '{name}'; {nearest_name(name, ALL10)}")
    if len(set(names)) != len(names) or len(names) < 2:
        raise NearfarError(f"relations={list(names)}: at least two relations, each once, are needed.")
    return tuple(names)


#: columns of pairs as items: the geometry of both boxes, the pixels in them, the names of both objects
SPATIAL, VISUAL, NAMES = "spatial", "visual", "names"

T = TypeVar("T")
_TOLERANCE = 2.0  # pixels by which a box may cross the border of a picture without being counted


class Triple(NamedTuple):
    """One annotated relation of a file; ``row`` is its position there, for messages."""

    image: str
    subject: str
    subject_box: Box
    predicate: str
    object: str
    object_box: Box
    row: int
    size: tuple[float, float] | None = None  # width, height where the file states them
    split: str | None = None
    photo: Path | None = None  # where the reader knows which file the picture is


@dataclass(frozen=True)
class Pairs:
    """Columns of usable pairs, in the order of their source.

    ``group`` is equal for rows with the same two boxes of one picture, which may be annotated with two relations.
    ``size_known`` is False where neither a photo nor the file states the size of the picture: then ``size`` is the
    extent of its boxes, a lower bound.
    """

    ids: list[str]
    image: list[str]
    subject: list[str]
    object: list[str]
    relation: list[str]
    subject_box: Float[ndarray, "n 4"]
    object_box: Float[ndarray, "n 4"]
    size: Float[ndarray, "n 2"]
    size_known: Bool[ndarray, " n"]
    group: Int[ndarray, " n"]
    declared: list[str | None]  # the split that the source states
    photos: Mapping[str, Photo] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_photo(self) -> Bool[ndarray, " n"]:
        """Whether each pair has a photo."""
        return np.array([image in self.photos for image in self.image], dtype=bool)

    def take(self, positions: Sequence[int] | Int[ndarray, " m"]) -> Pairs:
        """Some of the pairs."""
        at = np.asarray(positions, dtype=np.int64)

        def chosen(column: list[T]) -> list[T]:
            return [column[i] for i in at]

        image = chosen(self.image)
        kept = set(image)
        return Pairs(
            chosen(self.ids),
            image,
            chosen(self.subject),
            chosen(self.object),
            chosen(self.relation),
            self.subject_box[at],
            self.object_box[at],
            self.size[at],
            self.size_known[at],
            self.group[at],
            chosen(self.declared),
            {name: photo for name, photo in self.photos.items() if name in kept},
        )

    def counts(self) -> dict[str, int]:
        """How many pairs of each relation."""
        return dict(Counter(self.relation).most_common())

    def content(self) -> list[Any]:
        """Everything that training can depend on, for hashes."""
        photos = sorted((name, photo.key()) for name, photo in self.photos.items())
        boxes = [self.subject_box, self.object_box, self.size]
        return [self.ids, self.subject, self.object, self.relation, *boxes, photos]


def collect_pairs(
    triples: Iterable[Triple],
    photos: Mapping[str, Photo],
    relations: Sequence[str],
    *,
    synonyms: bool,
    rejections: Rejections,
    notes: Json,
    photos_required: bool = False,
) -> Pairs:
    """The pairs whose boxes and relation can be used; all others are counted in ``rejections``.

    A row is rejected for a predicate that is none of the ten relations (or none of ``relations``), a box without area
    or outside the picture, a repetition of an earlier row and, with ``photos_required``, a missing photo.
    Boxes that cross the border are cut at it, and ``notes`` counts those that cross it by more than 2 pixels.
    """
    rows = list(triples)
    extent = _extents(rows, photos)
    wanted = set(relations)
    named: list[tuple[Triple, str]] = []
    for row in rows:
        relation = relation_of(row.predicate, synonyms)
        if relation is None:
            rejections.add("no spatial relation", row.row, row.predicate)
        elif relation not in wanted:
            rejections.add("relation not chosen", row.row, row.predicate)
        else:
            named.append((row, relation))
    kept = _with_boxes(named, photos, extent, rejections, notes, photos_required)
    if not kept:
        raise NearfarError(f"no pair with a usable relation and boxes is left; {rejections.summary()}.")
    return _columns(kept, photos, extent)


def boxed_pairs(
    rows: Sequence[Triple],
    photos: Mapping[str, Photo],
    rejections: Rejections,
    notes: Json,
    photos_required: bool = False,
) -> tuple[Pairs, list[int]] | None:
    """The pairs whose boxes can be used, whatever their predicates, as `collect_pairs` checks them, and their rows;
    None: there are none."""
    extent = _extents(rows, photos)
    named = [(row, row.predicate) for row in rows]
    kept = _with_boxes(named, photos, extent, rejections, notes, photos_required, once=False)
    return (_columns(kept, photos, extent), [row.row for row, *_ in kept]) if kept else None


def _with_boxes(
    rows: Sequence[tuple[Triple, str]],
    photos: Mapping[str, Photo],
    extent: Mapping[str, tuple[tuple[float, float], bool]],
    rejections: Rejections,
    notes: Json,
    photos_required: bool,
    once: bool = True,
) -> list[tuple[Triple, str, Box, Box]]:
    """Rows of two usable boxes, with the boxes cut at the border; each ``once``, or as often as it stands there."""
    kept: list[tuple[Triple, str, Box, Box]] = []
    seen: set[tuple[str, Box, Box, str]] = set()
    for row, relation in rows:
        shown = " ".join(part for part in (row.subject, row.predicate, row.object) if part)
        if photos_required and row.image not in photos:
            rejections.add("missing photo", row.row, row.image)
            continue
        (width, height), known = extent[row.image]
        boxes = []
        for box in (row.subject_box, row.object_box):
            problem, inside = _fit(box, width, height)
            if problem:
                rejections.add(
                    problem, row.row, shown, f"box {_shown(box)} in {width:g} × {height:g} ({row.image})"
                )
                break
            if known and max(abs(a - b) for a, b in zip(box, inside, strict=True)) > _TOLERANCE:
                notes["boxes_cut_at_border"] = notes.get("boxes_cut_at_border", 0) + 1
            boxes.append(inside)
        if len(boxes) < 2:
            continue
        key = (row.image, boxes[0], boxes[1], relation)
        if once and key in seen:
            rejections.add("repeated", row.row, shown, row.image)
            continue
        seen.add(key)
        kept.append((row, relation, boxes[0], boxes[1]))
    return kept


def _extents(
    rows: Sequence[Triple], photos: Mapping[str, Photo]
) -> dict[str, tuple[tuple[float, float], bool]]:
    """Width and height of every picture, and whether they are known; else they are the extent of its boxes."""
    known: dict[str, tuple[tuple[float, float], bool]] = {}
    reach: dict[str, list[float]] = {}
    for row in rows:
        if row.image not in known:
            photo = photos.get(row.image)
            if photo is not None:
                known[row.image] = (photo.size(), True)
            elif row.size is not None and min(row.size) > 0:
                known[row.image] = (row.size, True)
        if row.image not in known:
            far = reach.setdefault(row.image, [1.0, 1.0])
            for box in (row.subject_box, row.object_box):
                if np.isfinite(box).all():
                    far[0], far[1] = max(far[0], box[2]), max(far[1], box[3])
    return known | {name: ((far[0], far[1]), False) for name, far in reach.items()}


def _fit(box: Box, width: float, height: float) -> tuple[str, Box]:
    """The problem of a box ("" for none), and its part inside the picture."""
    if not np.isfinite(box).all():
        return "box is no numbers", box
    left, top, right, bottom = (float(value) for value in box)
    if left >= right or top >= bottom:
        return "box without area", box
    inside = (max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        return "box outside the picture", box
    return "", inside


def _shown(box: Box) -> str:
    return "(" + ", ".join(f"{value:g}" for value in box) + ")"


def _columns(
    kept: Sequence[tuple[Triple, str, Box, Box]],
    photos: Mapping[str, Photo],
    extent: Mapping[str, tuple[tuple[float, float], bool]],
) -> Pairs:
    pairs: dict[tuple[str, Box, Box], int] = {}
    count: Counter[str] = Counter()
    ids, group = [], []
    for row, _, first, second in kept:
        group.append(pairs.setdefault((row.image, first, second), len(pairs)))
        ids.append(f"{row.image}#{count[row.image]}")
        count[row.image] += 1
    images = [row.image for row, *_ in kept]
    used = set(images)
    return Pairs(
        ids,
        images,
        [row.subject for row, *_ in kept],
        [row.object for row, *_ in kept],
        [relation for _, relation, *_ in kept],
        np.array([first for _, _, first, _ in kept], dtype=np.float64),
        np.array([second for *_, second in kept], dtype=np.float64),
        np.array([extent[image][0] for image in images], dtype=np.float64),
        np.array([extent[image][1] for image in images], dtype=bool),
        np.array(group, dtype=np.int64),
        [row.split for row, *_ in kept],
        {name: photo for name, photo in photos.items() if name in used},
    )
