"""COCO boxes: nobody has said how two objects are placed, so that a rule over their boxes says it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np

from nearfar.data.cache import content_key
from nearfar.data.coco import CocoSplit, read_coco
from nearfar.data.rejections import Rejections
from nearfar.systems.relations.readers.common import Places
from nearfar.systems.relations.records import Box, Triple

__all__ = ["geometric_relation", "read"]

#: pairs taken of one picture: a street with forty people has 780
PAIRS_PER_IMAGE = 12
_SMALLEST = 16.0  # pixels of a box's shorter side


def read(path: Path, split: str | None, rejections: Rejections, places: Places) -> Iterator[Triple]:
    """Pairs of boxes whose places the rule can tell, at most 12 of a picture; crowds and tiny boxes are left out.

    Each two boxes are taken once; which is the subject, and which pairs are taken where there are many, their place in
    the file decides.
    """
    found = read_coco(path, places.images, folder=places.folder)
    rejections.extend(found.rejections)
    places.remarks += found.remarks()
    row = 0
    for position, picture in enumerate(found.images):
        at = _usable(found, position)
        told = []
        for a, b in combinations(at, 2):
            first, second = (a, b) if (a + b) % 2 else (b, a)
            boxes = _corners(found, first), _corners(found, second)
            relation = geometric_relation(*boxes)
            if relation is not None:
                told.append((first, second, boxes, relation))
        told.sort(key=lambda pair: content_key(picture.name, int(pair[0]), int(pair[1])))
        for first, second, boxes, relation in told[:PAIRS_PER_IMAGE]:
            row += 1
            names = [found.categories[int(found.label[i])] for i in (first, second)]
            size = (float(picture.width), float(picture.height))
            yield Triple(
                picture.name, names[0], boxes[0], relation, names[1], boxes[1], row, size, split, picture.path
            )


def geometric_relation(subject: Box, object_: Box) -> str | None:
    """What the places of two boxes are called; None where boxes alone do not say it.

    "inside": nine tenths of the subject lie in the object, which is at least twice as large. Other boxes that overlap
    by more than a tenth of the smaller have no name. Of the rest those that are further apart in height than in
    breadth are "above" or "below"; side by side they are "next to" up to a gap of half their mean width, and
    "left of" or "right of" beyond; neither above nor beside each other they are "near" up to such a gap.

    >>> geometric_relation((0, 0, 10, 10), (0, 30, 10, 60)), geometric_relation((0, 0, 10, 10), (12, 2, 22, 12))
    ('above', 'next to')
    >>> geometric_relation((0, 0, 10, 10), (5, 5, 15, 15)) is None
    True
    """
    a, b = np.array(subject), np.array(object_)
    sides = [box[2:] - box[:2] for box in (a, b)]
    areas = [float(side.prod()) for side in sides]
    reach = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])  # below 0: a gap
    shared = float(np.maximum(reach, 0).prod())
    if shared >= 0.9 * areas[0] and areas[1] >= 2 * areas[0]:
        return "inside"
    if shared > 0.1 * min(areas):
        return None
    half = (sides[0] + sides[1]) / 4
    across, down = ((b[:2] + b[2:] - a[:2] - a[2:]) / 2).tolist()
    if reach[0] > 0 and reach[0] >= reach[1]:
        return "above" if down > 0 else "below"
    if reach[1] > 0:
        if -reach[0] <= half[0]:
            return "next to"
        return "left of" if across > 0 else "right of"
    return "near" if (-reach <= half).all() else None


def _usable(found: CocoSplit, position: int) -> list[int]:
    at = range(len(found.boxes))[found.of_image(position)]
    return [i for i in at if not found.crowd[i] and found.boxes[i, 2:].min() >= _SMALLEST]


def _corners(found: CocoSplit, i: int) -> Box:
    left, top, width, height = found.boxes[i].tolist()
    return left, top, left + width, top + height
