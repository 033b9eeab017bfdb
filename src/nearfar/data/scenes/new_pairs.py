"""Pairs of objects in new pictures: boxes of a COCO file, a detector's results, a table, or annotated relations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.data.cache import without_cache
from nearfar.data.chunks import NewData, read_chunks
from nearfar.data.coco_files import NoBoxError, box_of, picture_files
from nearfar.data.coco_rows import row_key
from nearfar.data.files import Json, read_data_json
from nearfar.data.images import Box, Crops, Photo
from nearfar.data.items import Column, Items
from nearfar.data.picture_files import PictureFiles
from nearfar.data.rejections import Rejections
from nearfar.data.scenes.readers import (
    Places,
    scene_graph_triples,
    spatialsense_triples,
    stated_size,
    vrd_triples,
)
from nearfar.data.scenes.relation_data import usable_photos
from nearfar.data.scenes.triples import NAMES, SPATIAL, VISUAL, Pairs, Triple, boxed_pairs
from nearfar.errors import NearfarError

__all__ = ["PAIR_HEADERS", "items_of", "read_pairs"]

#: boxes of a detector's results with lower scores are left out, unless ``min_score`` says otherwise
MIN_SCORE = 0.5
_SIDES = ("left", "top", "right", "bottom")
_IMAGE = ("image", "file_name", "filename", "image_path", "picture", "photo")
#: columns of a table with a pair in each row, and the headers under which they may stand
PAIR_HEADERS: dict[str, Sequence[str]] = {
    "image": _IMAGE,
    "subject": ("subject", "subject_name"),
    "object": ("object", "object_name"),
    **{f"{which}_box": (f"{which}_box", f"{which}_bbox") for which in ("subject", "object")},
    **{f"{which}_{side}": (f"{which}_{side}",) for which in ("subject", "object") for side in _SIDES},
}
#: and with a box in each row
_BOX_HEADERS: dict[str, Sequence[str]] = {
    "image": _IMAGE,
    "name": ("name", "category", "label", "class"),
    "score": ("score", "confidence"),
    "box": ("box", "bbox"),
    **{side: (side,) for side in (*_SIDES, "width", "height")},
}


@dataclass
class _Object:
    """An object of a picture, with the row of its source."""

    name: str
    box: Box
    row: int


@dataclass
class _Picture:
    """What a source says of one picture: its objects, of which each two are a pair, or pairs that it names."""

    name: str
    size: tuple[float, float] | None = None
    photo: Path | None = None
    objects: list[_Object] = field(default_factory=list)
    named: list[Triple] = field(default_factory=list)
    #: of named pairs what a table calls them, by their rows
    ids: dict[int, str] = field(default_factory=dict)

    def triples(self) -> list[Triple]:
        """Every ordered pair of the objects, or the named ones."""
        return self.named or [
            Triple(self.name, a.name, a.box, "", b.name, b.box, a.row, self.size, None, self.photo)
            for a, b in permutations(self.objects, 2)
        ]


def read_pairs(
    source: NewData, *, photos: bool, required: bool, names: bool, min_score: float = MIN_SCORE
) -> Iterator[Items]:
    """The pairs of a source in chunks of about ``source.rows``, whole pictures each.

    ``.json`` is a COCO file (with or without its pictures' sizes), COCO results (a detector's boxes with scores; rows
    have ``file_name`` and ``category``, or ``source.images`` is the COCO file that says what their ids mean), or a file
    of relations as VRD, SpatialSense and scene graphs have them, whose pairs are then the named ones. Anything else is
    a table: with a pair in each row, or with a box in each row.

    Args:
        photos: the run sees pixels.
        required: pairs without a photo are rejected; else their boxes alone are used.
        names: the run reads the names of objects.
        min_score: of boxes that have a score.

    Raises:
        NearfarError: no such file, no pairs in it, none of its pictures where the run sees pixels.
    """
    path = Path(source.path).expanduser()
    if not path.is_file():
        hint = " Boxes are needed, not pictures alone: a COCO file, a detector's results or a table."
        raise NearfarError(f"{path} is a folder.{hint}" if path.is_dir() else f"{path}: no such file.")
    unread = Rejections()  # of the reading, until a chunk takes them
    images = _images_folder(source)
    if path.suffix.lower() == ".json":
        pictures = _of_json(path, source, min_score, unread)
    else:
        pictures = _of_table(path, source, min_score, unread, names)
    files = picture_files(path, images) if photos else None
    if files is not None:
        files.endings = True
    count, every = 0, Rejections()
    for number, some in enumerate(_chunks(pictures, source.rows)):
        if number == 0 and files is not None:
            _require_photos(some, files, path, source)
        own = Rejections()
        own.extend(unread)
        unread.clear()
        items = _items(some, path, files, required, own, photos, names)
        count += len(items)
        every.extend(own)
        yield items
    if len(unread) and count:
        yield Items([], {}, str(path), rejections=unread)
    every.extend(unread)
    if not count:
        few = f"{every.summary()}." if len(every) else "no picture in it has two boxes."
        low = any(reason.startswith("score below") for reason in every.counts)
        raise NearfarError(
            f"{path}: there is no pair: {few}"
            + " --set min_score=0.1 takes boxes of lower scores, too." * low
        )


def _images_folder(source: NewData) -> Path | None:
    """The folder of pictures; that of the COCO file, where ``source.images`` names one."""
    if source.images is None:
        return None
    images = Path(source.images).expanduser()
    if images.is_file():
        return None
    if not images.is_dir():
        raise NearfarError(f"{images}: no such folder of pictures.")
    return images


def _chunks(pictures: Iterator[_Picture], rows: int) -> Iterator[list[_Picture]]:
    some: list[_Picture] = []
    pairs = 0
    for picture in pictures:
        own = len(picture.named) or len(picture.objects) * (len(picture.objects) - 1)
        if some and pairs + own > rows:
            yield some
            some, pairs = [], 0
        some.append(picture)
        pairs += own
    if some:
        yield some


def _require_photos(pictures: Sequence[_Picture], files: PictureFiles, path: Path, source: NewData) -> None:
    """An error where a run sees pixels and no photo at all is to be had: a folder was forgotten."""
    for picture in pictures:
        if picture.photo is not None or files.find(picture.name).path is not None:
            return
    raise NearfarError(
        f"{path}: none of its first {len(pictures)} pictures was found below {files.folder}, such as "
        f"{pictures[0].name}, and this run sees pixels. Name the folder of the pictures with --images FOLDER."
    )


def _items(
    pictures: Sequence[_Picture],
    path: Path,
    files: PictureFiles | None,
    required: bool,
    rejections: Rejections,
    photos: bool,
    names: bool,
) -> Items:
    ids = {row: name for picture in pictures for row, name in picture.ids.items()}
    triples = [triple for picture in pictures for triple in picture.triples()]
    notes: Json = {}
    known: Mapping[str, Photo] = {}
    if files is not None:
        with without_cache():  # pictures that are seen once
            known = usable_photos(triples, files, rejections, notes)
    usable = boxed_pairs(triples, known, rejections, notes, required)
    if usable is None:
        return Items([], {}, str(path), rejections=rejections, notes=notes)
    pairs, rows = usable
    items = items_of(pairs, str(path), photos=photos, names=names)
    if ids:
        items.ids = [ids[row] for row in rows]
    items.rows, items.rejections, items.notes = rows, rejections, notes
    return items


def items_of(pairs: Pairs, source: str, *, photos: bool, names: bool) -> Items:
    """Pairs with a column for each view, and what is told of them beside their relation."""
    boxes = np.concatenate([pairs.subject_box, pairs.object_box, pairs.size], axis=1)
    subjects, objects = pairs.subject_box.tolist(), pairs.object_box.tolist()
    columns: dict[str, Column] = {SPATIAL: boxes}
    if photos:
        crops: list[Crops | None] = []
        for image, first, second in zip(pairs.image, subjects, objects, strict=True):
            photo = pairs.photos.get(image)
            crops.append(None if photo is None else Crops(photo, (tuple(first), tuple(second))))
        columns[VISUAL] = crops
    if names:
        columns[NAMES] = list(zip(pairs.subject, pairs.object, strict=True))
    columns |= {
        "image": pairs.image,
        "subject": pairs.subject,
        "object": pairs.object,
        "subject_box": subjects,
        "object_box": objects,
    }
    return Items(pairs.ids, columns, source, pairs.image)


# -- JSON ----------------------------------------------------------------------------------------------------
def _of_json(path: Path, source: NewData, min_score: float, rejections: Rejections) -> Iterator[_Picture]:
    content = read_data_json(path)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return iter(_of_coco(path, content, rejections))
    first = next((row for row in content if isinstance(row, dict)), {}) if isinstance(content, list) else {}
    if "bbox" in first and ("image_id" in first or "file_name" in first):
        return iter(_of_results(path, content, source, min_score, rejections))
    places = Places()
    readers: tuple[tuple[bool, Callable[..., Iterator[Triple]]], ...] = (
        ("relationships" in first, scene_graph_triples),
        ("annotations" in first, spatialsense_triples),
        (isinstance(content, dict) and _is_vrd(content), vrd_triples),
    )
    for fits, reader in readers:
        if fits:
            return _named(reader(path, None, rejections, places))
    raise NearfarError(
        f"{path}: neither a COCO file (an object with images, annotations and categories), nor COCO results (a list "
        "of rows with image_id, category_id, bbox and score), nor relations as VRD, SpatialSense or scene graphs have "
        "them."
    )


def _is_vrd(content: Mapping[str, object]) -> bool:
    rows = next((rows for rows in content.values() if isinstance(rows, list) and rows), None)
    return rows is not None and isinstance(rows[0], dict) and "predicate" in rows[0]


def _named(triples: Iterator[Triple]) -> Iterator[_Picture]:
    """Pairs that a file names, by picture."""
    pictures: dict[str, _Picture] = {}
    for triple in triples:
        pictures.setdefault(triple.image, _Picture(triple.image)).named.append(triple)
    return iter(pictures.values())


def _of_coco(path: Path, content: Mapping[str, object], rejections: Rejections) -> list[_Picture]:
    pictures = _coco_pictures(content, rejections)
    if not pictures:
        raise NearfarError(f"{path} lists no pictures: its 'images' are empty, or without id and file_name.")
    names = _coco_names(content)
    for number, row in enumerate(_rows(content, "annotations"), 1):
        if _is_crowd(row):
            rejections.add("box around a crowd", number, row.get("bbox"))
            continue
        picture = pictures.get(row_key(row.get("image_id")) or "")
        _add_box(picture, names.get(row_key(row.get("category_id")) or ""), row, number, rejections)
    if not any(picture.objects for picture in pictures.values()):
        raise NearfarError(
            f"{path} has pictures and no boxes that can be used ({rejections.summary()}): give annotations, or a "
            "detector's results, as nearfar predict of a detector writes them."
        )
    return list(pictures.values())


def _rows(content: Mapping[str, object], name: str) -> list[Json]:
    rows = content.get(name)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _coco_pictures(content: Mapping[str, object], rejections: Rejections) -> dict[str, _Picture]:
    pictures: dict[str, _Picture] = {}
    for number, row in enumerate(_rows(content, "images"), 1):
        key, name = row_key(row.get("id")), row.get("file_name")
        if key is None or not isinstance(name, str) or not name.strip():
            rejections.add("picture without id or file_name", number, row.get("id"))
            continue
        try:
            size = stated_size(row)
        except (TypeError, ValueError):
            size = None
        pictures.setdefault(key, _Picture(name, size))
    return pictures


def _coco_names(content: Mapping[str, object]) -> dict[str, str]:
    names = {}
    for row in _rows(content, "categories"):
        key = row_key(row.get("id"))
        if key is not None:
            names[key] = str(row.get("name", key)).strip()
    return names


def _is_crowd(row: Mapping[str, object]) -> bool:
    return row.get("iscrowd") in (1, "1", True)


def _add_box(
    picture: _Picture | None, name: str | None, row: Mapping[str, object], number: int, rejections: Rejections
) -> None:
    shown = row.get("bbox")
    if picture is None:
        rejections.add("box of a picture that is not there", number, shown, f"image_id {row.get('image_id')}")
        return
    if name is None:
        rejections.add("unknown category", number, shown, f"category_id {row.get('category_id')}")
        return
    try:
        (left, top, width, height), _ = box_of(row)
    except NoBoxError as error:
        rejections.add(str(error), number, shown, f"picture {picture.name}")
        return
    if not (width > 0 and height > 0):
        rejections.add("box without area", number, shown, f"picture {picture.name}")
        return
    picture.objects.append(_Object(name, (left, top, left + width, top + height), number))


def _of_results(
    path: Path, rows: list[object], source: NewData, min_score: float, rejections: Rejections
) -> list[_Picture]:
    """A detector's boxes; what ids of pictures and categories mean is in the rows, or in a COCO file."""
    about = Path(source.images).expanduser() if source.images is not None else None
    by_id: dict[str, _Picture] = {}
    names: dict[str, str] = {}
    if about is not None and about.is_file():
        content = read_data_json(about)
        if not isinstance(content, dict):
            raise NearfarError(f"{about}: a COCO file is an object with images and categories.")
        by_id, names = _coco_pictures(content, rejections), _coco_names(content)
    pictures: dict[str, _Picture] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            rejections.add("no object of JSON", number, row)
            continue
        score = _number(row.get("score"))
        if score is not None and score < min_score:
            rejections.add(f"score below {min_score:g}", number, row.get("bbox"))
            continue
        key, file = row_key(row.get("image_id")), row.get("file_name")
        category = row_key(row.get("category_id"))
        if key in by_id:
            picture = by_id[key]
        elif isinstance(file, str) and file.strip():
            picture = pictures.get(file) or _Picture(file)
        else:
            raise NearfarError(
                f"{path}, row {number}: which picture image_id {row.get('image_id')!r} is, is not said. Name the COCO "
                "file that lists the pictures with --images FILE.json, or give rows with file_name."
            )
        name = row.get("category")
        known = str(name) if name is not None else names.get(category or "")
        _add_box(picture, known or category, row, number, rejections)
        pictures.setdefault(picture.name, picture)
    return list(pictures.values())


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


# -- tables --------------------------------------------------------------------------------------------------
def _of_table(
    path: Path, source: NewData, min_score: float, rejections: Rejections, names: bool
) -> Iterator[_Picture]:
    """A pair in each row where columns are called after subject and object, else a box in each row.

    Pairs are handed out chunk by chunk; boxes of one picture may stand anywhere, so that all are read first.
    """
    headers: dict[str, Sequence[str]] = {**PAIR_HEADERS, **_BOX_HEADERS}
    pictures: dict[str, _Picture] = {}
    for items in read_chunks(source, headers):
        rejections.extend(items.rejections)
        if "image" not in items:
            raise NearfarError(
                f"{path} has no column with the names of pictures (image). Name it with --column image=HEADER."
            )
        as_pairs = "subject_box" in items or "subject_left" in items
        wanted = ("subject", "object") if as_pairs else ("name",)
        missing = [name for name in wanted if name not in items]
        if names and missing:
            raise NearfarError(
                f"{path} has no column '{missing[0]}', and this run reads the names of objects. Name it with --column "
                f"{missing[0]}=HEADER."
            )
        rows = items.rows or list(range(1, len(items) + 1))
        for at, row in enumerate(rows):
            image = items["image"][at]
            if image is None:
                rejections.add("row without a picture", row)
                continue
            shown = Path(str(image))
            picture = pictures.get(str(image))
            if picture is None:
                is_file = shown.is_file()
                picture = _Picture(shown.name if is_file else str(image), photo=shown if is_file else None)
                pictures[str(image)] = picture
            try:
                if as_pairs:
                    _add_pair(picture, items, at, row)
                else:
                    _add_object(picture, items, at, row, min_score, rejections)
            except NearfarError as error:
                rejections.add(str(error), row, str(image))
        if as_pairs:
            yield from _distinct(pictures)
            pictures = {}
    yield from _distinct(pictures)


def _add_pair(picture: _Picture, items: Items, at: int, row: int) -> None:
    first, second = (_box_at(items, at, f"{which}_") for which in ("subject", "object"))
    subject, other = (str(_value(items, name, at) or "") for name in ("subject", "object"))
    picture.named.append(
        Triple(picture.name, subject, first, "", other, second, row, None, None, picture.photo)
    )
    picture.ids[row] = items.ids[at]


def _add_object(
    picture: _Picture, items: Items, at: int, row: int, min_score: float, rejections: Rejections
) -> None:
    score = _number(_value(items, "score", at))
    if score is not None and score < min_score:
        rejections.add(f"score below {min_score:g}", row)
        return
    picture.objects.append(_Object(str(_value(items, "name", at) or ""), _box_at(items, at, ""), row))


def _distinct(pictures: Mapping[str, _Picture]) -> Iterator[_Picture]:
    """Pictures by their file names; by whole paths where several have one name."""
    counts: dict[str, int] = {}
    for picture in pictures.values():
        counts[picture.name] = counts.get(picture.name, 0) + 1
    for path, picture in pictures.items():
        if counts[picture.name] > 1:
            picture.name = path
            picture.named = [triple._replace(image=path) for triple in picture.named]
        yield picture


def _value(items: Items, name: str, at: int) -> Any:
    return items[name][at] if name in items else None


def _box_at(items: Items, at: int, prefix: str) -> Box:
    """The box of a row: a list of four, or a column for each side; width and height stand for right and bottom."""
    whole = _value(items, f"{prefix}box", at)
    values = (
        list(whole)
        if whole is not None and not isinstance(whole, str)
        else [_number(_value(items, prefix + side, at)) for side in _SIDES]
    )
    numbers = [_number(value) for value in values]
    if not prefix and len(numbers) == 4 and numbers[2] is None and numbers[3] is None:
        width, height = (_number(_value(items, side, at)) for side in ("width", "height"))
        left, top = numbers[:2]
        if None not in (left, top, width, height):
            numbers[2:] = [left + width, top + height]  # type: ignore[operator]
    if len(numbers) != 4 or any(number is None or not np.isfinite(number) for number in numbers):
        raise NearfarError("box that is no four numbers")
    left, top, right, bottom = (float(number) for number in numbers if number is not None)
    return left, top, right, bottom
