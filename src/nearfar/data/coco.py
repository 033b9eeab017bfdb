"""COCO-format files: pictures, boxes, categories, and a group attribute with two values on pictures or boxes.

What is broken costs one picture or one box: it is counted in `Rejections`, with its id, and reading goes on. Pictures
are named by their file name, because ids of different files count from 1 alike.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from nearfar.data.cache import content_key
from nearfar.data.coco_files import (
    JsonObject,
    NoBoxError,
    box_of,
    check_units,
    coco_files,
    picture_files,
    too_small_for,
)
from nearfar.data.coco_rows import (
    Categories,
    CocoImage,
    Pictures,
    attribute,
    group_position,
    group_values,
    row_key,
    usable_boxes,
    usable_pictures,
    with_groups,
)
from nearfar.data.files import Json
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError, nearest_name
from nearfar.ids import split_hash

__all__ = ["CocoImage", "CocoSplit", "coco_files", "read_coco"]


@dataclass(frozen=True)
class CocoSplit:
    """The usable pictures and boxes of one file. Boxes are in the order of their pictures.

    ``boxes``: left, top, width, height in pixels, inside the picture. ``image``: whose box it is, as position in
    ``images``. ``label``: position in ``categories``. ``group``: position in ``groups``, −1 where the box has neither
    value; its own attribute counts before that of its picture. ``crowd``: boxes around many objects (``iscrowd``).
    ``clipped``: boxes that reached beyond the edge and were cut there. ``left_out``: boxes of categories that were not
    asked for. ``outlines``: boxes around polygons, of annotations without one. ``other_groups``: boxes and pictures
    with a value of the attribute that is neither of the two. ``several_files``: pictures whose name other files have,
    too.
    """

    source: Path
    images: list[CocoImage]
    categories: tuple[str, ...]
    boxes: Float[np.ndarray, "m 4"]
    image: Int[np.ndarray, " m"]
    label: Int[np.ndarray, " m"]
    group: Int[np.ndarray, " m"]
    crowd: Bool[np.ndarray, " m"]
    groups: tuple[str, ...] = ()
    group_key: str | None = None
    rejections: Rejections = field(default_factory=Rejections)
    clipped: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    outlines: int = 0
    other_groups: Mapping[str, int] = field(default_factory=dict)
    several_files: int = 0
    first_of_several: str = ""

    def __len__(self) -> int:
        """How many pictures."""
        return len(self.images)

    @property
    def ids(self) -> list[str]:
        """The pictures' names."""
        return [image.name for image in self.images]

    @property
    def files(self) -> list[str]:
        """The pictures' files, each by one path however it was reached: names of two splits may be alike."""
        return [os.path.realpath(image.path) for image in self.images]

    @property
    def hash(self) -> str:
        """Names the set of pictures, in whatever order; boxes have no part in it (see ``content``)."""
        return split_hash(self.ids)

    @property
    def content(self) -> str:
        """Names pictures, boxes, labels and groups, in order: sixteen hexadecimal digits."""
        pictures = [[i.name, i.width, i.height, i.group] for i in self.images]
        arrays = [self.boxes, self.image, self.label, self.group, self.crowd]
        return content_key(pictures, self.categories, self.groups, *arrays)[:16]

    def of_image(self, position: int) -> slice:
        """Which boxes belong to a picture.

        >>> image = [CocoImage("a", Path("a"), 9, 9), CocoImage("b", Path("b"), 9, 9)]
        >>> zero, none = np.zeros(3, int), np.zeros(3, bool)
        >>> split = CocoSplit(Path("x"), image, ("cat",), np.ones((3, 4)), np.array([0, 1, 1]), zero, zero, none)
        >>> split.of_image(1)
        slice(1, 3, None)
        """
        start, end = np.searchsorted(self.image, [position, position + 1])
        return slice(int(start), int(end))

    def take(self, positions: Sequence[int] | Int[np.ndarray, " k"]) -> CocoSplit:
        """Some pictures with their boxes, in the order given."""
        parts = [np.arange(len(self.boxes))[self.of_image(int(p))] for p in positions]
        boxes = np.concatenate([*parts, np.zeros(0, int)]).astype(np.int64)
        return replace(
            self,
            images=[self.images[int(p)] for p in positions],
            boxes=self.boxes[boxes],
            image=np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
            label=self.label[boxes],
            group=self.group[boxes],
            crowd=self.crowd[boxes],
        )

    def remarks(self) -> list[str]:
        """Sentences on what was chosen among several, made of something else, or left out; not on rejections."""
        sentences = []
        if self.outlines:
            sentences.append(f"{self.outlines} boxes are those around polygons, for want of a bbox")
        if self.several_files:
            sentences.append(
                f"{self.several_files} pictures have files of one name in several folders (first: "
                f"{self.first_of_several}); data.images=FOLDER chooses"
            )
        if self.left_out:
            sentences.append(f"boxes of other categories, left out: {_listed(self.left_out)}")
        if self.other_groups:
            sentences.append(f"{self.group_key} of neither group: {_listed(self.other_groups)}")
        return sentences

    def layout(self) -> Json:
        """What ``dataset_layout.json`` holds of it."""
        pictures = Counter(image.group for image in self.images)
        boxes = Counter(self.group.tolist())
        return {
            "path": str(self.source),
            "images": len(self),
            "boxes": len(self.boxes),
            "categories": {
                name: int((self.label == i).sum())
                for i, name in enumerate(self.categories)
                if (self.label == i).any()
            },
            "crowds": int(self.crowd.sum()),
            "clipped": self.clipped,
            "left_out": dict(self.left_out),
            "outlines": self.outlines,
            "pictures_of_several_files": self.several_files,
            "other_groups": dict(self.other_groups),
            "group_key": self.group_key,
            "groups": {
                name: {"images": pictures[i], "boxes": boxes[i]} for i, name in enumerate(self.groups)
            },
            "rejections": self.rejections.as_dict(),
            "hash": self.hash,
            "content": self.content,
        }


def read_coco(
    path: str | Path,
    images: str | Path | None = None,
    *,
    categories: Sequence[str] | None = None,
    missing_categories: Literal["error", "allow"] = "error",
    group_key: str | None = None,
    groups: Sequence[str] | None = None,
    folder: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> CocoSplit:
    """Read a COCO-format file and decode each of its pictures once.

    Args:
        path: the JSON file with ``images``, ``annotations`` and ``categories``.
        images: the folder of the pictures; None looks where exporters put them (`picture_files`).
        categories: names of the categories to keep, which then have this order; None keeps all, in the file's order.
            The case of letters does not count.
        missing_categories: whether some of them, but not all, may be missing in the file.
        group_key: the name of an attribute with two values, on a box or a picture, at its top level or under
            ``attributes``.
        groups: the two values; None takes those that occur, sorted.
        folder: the data folder, below which pictures are sought; None: that of the file.
        say: is told what takes long.

    Rejected and counted are pictures that are missing, unreadable, of a different size than the file says, without an
    id of their own, or of a name that several files have; and boxes that are no four finite numbers, without area,
    outside their picture, of an unknown category, of a picture that is not there, or there a second time. An annotation
    without a box has that around its polygons. Ids and numbers may be in quotes, sizes may be missing.

    Raises:
        NearfarError: an unreadable file, one without the three lists, no usable picture or box, boxes in other units,
            an unknown category, an id of two categories, a group attribute without exactly two values.
    """
    path = Path(path)
    content = _load(path)
    rejections = Rejections()
    names = _categories(path, content, categories, missing_categories == "allow")
    files = picture_files(
        path, None if images is None else Path(images), None if folder is None else Path(folder)
    )
    pictures = usable_pictures(content["images"], files, rejections, say)
    if not pictures.rows:
        elsewhere = {"missing picture", "several pictures of one name", "picture of a different size"}
        hint = f" Pictures were sought in {files.folder}: name their folder with data.images=FOLDER."
        raise NearfarError(
            f"{path}: none of its {len(content['images'])} pictures is usable; {rejections.summary()}."
            + hint * bool(elsewhere & rejections.counts.keys())
        )
    rows = content["annotations"]
    tiny = _check_boxes(path, rows, pictures, rejections)
    kept = usable_boxes(rows, pictures, names, rejections, group_key, tiny)
    if not kept.boxes:
        others = f" Left out as other categories: {_listed(kept.left_out)}." if kept.left_out else ""
        raise NearfarError(
            f"{path}: none of its {len(content['annotations'])} boxes is usable; {rejections.summary()}.{others}"
        )
    order = sorted(range(len(kept.boxes)), key=lambda i: kept.image[i])
    values = group_values(path, group_key, groups, pictures.rows, kept.raw)
    own = [attribute(kept.raw[i], group_key) for i in order]
    of_image = [attribute(raw, group_key) for raw, _ in pictures.rows.values()]
    image = np.array([kept.image[i] for i in order], np.int64)
    group = [
        group_position(values, of_image[position] if value is None else value)
        for value, position in zip(own, image.tolist(), strict=True)
    ]
    return CocoSplit(
        source=path,
        images=with_groups(
            [picture for _, picture in pictures.rows.values()], of_image, values, image, group
        ),
        categories=tuple(names.wanted),
        boxes=np.array([kept.boxes[i] for i in order], np.float64),
        image=image,
        label=np.array([kept.label[i] for i in order], np.int64),
        group=np.array(group, np.int64),
        crowd=np.array([kept.crowd[i] for i in order]),
        groups=values,
        group_key=group_key,
        rejections=rejections,
        clipped=kept.clipped,
        left_out=dict(kept.left_out),
        outlines=kept.outlines,
        other_groups=Counter(v for v in (*own, *of_image) if v is not None and v not in values),
        several_files=pictures.several_files,
        first_of_several=pictures.first_of_several,
    )


def _load(path: Path) -> JsonObject:
    if not path.is_file():
        raise NearfarError(f"There is no file {path}.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise NearfarError(f"{path} is no JSON file, or is cut off: {error}.") from None
    if not isinstance(content, dict):
        raise NearfarError(f"{path}: a COCO file is an object with images, annotations and categories.")
    for name in ("images", "annotations", "categories"):
        rows = content.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            present = ", ".join(sorted(content)[:8]) or "nothing"
            raise NearfarError(
                f"{path} has no list of objects '{name}', which a COCO file needs. It has {present}."
            )
    return content


def _categories(path: Path, content: JsonObject, wanted: Sequence[str] | None, some: bool) -> Categories:
    rows, by_id = content["categories"], dict[str, str]()
    for row in rows:
        key, name = row_key(row.get("id")), row.get("name")
        if key is None:
            continue
        text = key if name is None else str(name).strip()
        if by_id.setdefault(key, text) != text:
            raise NearfarError(
                f"{path}: the category id {key} is both '{by_id[key]}' and '{text}'. Give each its own."
            )
    if not by_id:
        raise NearfarError(
            f"{path}: its list of categories names none; rows such as {{'id': 1, 'name': 'person'}} are needed, with "
            "the ids that category_id refers to."
        )
    used = {row_key(row.get("category_id")) for row in content["annotations"]}
    parents = {str(row.get("supercategory")).strip() for row in rows}
    # Exporters list the project itself as a category of no box, above all others.
    names = list(dict.fromkeys(name for key, name in by_id.items() if key in used or name not in parents))
    if wanted is None:
        return Categories(by_id, names)
    plain = {name.casefold(): name for name in wanted}
    known = {
        key: plain.get(name.casefold(), name) if name not in wanted else name for key, name in by_id.items()
    }
    missing = [name for name in wanted if name not in known.values()]
    if missing and not (some and len(missing) < len(wanted)):
        raise NearfarError(
            f"{path} has no category {missing[0]!r}; {nearest_name(missing[0], names)}. data.category=NAME chooses "
            "one, data.category=null takes all."
        )
    return Categories(known, list(wanted))


def _check_boxes(path: Path, rows: list[JsonObject], pictures: Pictures, rejections: Rejections) -> set[int]:
    """Look at all boxes together, before any is cut at an edge.

    A file with boxes in other units is refused; a picture that is too small for its boxes, where no size is stated, is
    rejected. Returns the positions of annotations whose box lies within the first pixel.
    """
    at, boxes, keys = [], [], []
    for position, row in enumerate(rows):
        if pictures.of(row) is not None:
            try:
                box, _ = box_of(row)
            except NoBoxError:
                continue
            at.append(position)
            boxes.append(box)
            keys.append(pictures.key(row) or "")
    sizes = [(image.width, image.height) for image in (pictures.rows[key][1] for key in keys)]
    tiny = {at[i] for i in np.flatnonzero(check_units(path, boxes, sizes)) if min(boxes[i][2:]) > 0}
    corners: dict[str, list[list[float]]] = {}
    for key, (left, top, width, height) in zip(keys, boxes, strict=True):
        if not pictures.rows[key][0].get("width") or not pictures.rows[key][0].get("height"):
            corners.setdefault(key, []).append([left, top, left + width, top + height])
    for key, own in corners.items():
        image = pictures.rows[key][1]
        if too_small_for(own, image.width, image.height):
            far = max(box[2] for box in own), max(box[3] for box in own)
            detail = f"{image.width} × {image.height}, and its boxes reach to {far[0]:g}, {far[1]:g}"
            rejections.add("picture that is too small for its boxes", None, image.name, detail)
            pictures.left_out.add(key)
            del pictures.rows[key]
    return tiny


def _listed(counts: Mapping[str, int]) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count}" for name, count in most[:8]) + " …" * (len(most) > 8)
