"""COCO-format files: pictures, boxes, categories, and a group attribute with two values on pictures or boxes.

What is broken costs one picture or one box: it is counted in `Rejections`, with its id, and reading goes on. Pictures
are named by their file name, because ids of different files count from 1 alike.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from nearfar.data.cache import content_key
from nearfar.data.coco_rows import (
    Categories,
    CocoImage,
    attribute,
    group_position,
    group_values,
    is_key,
    usable_boxes,
    usable_pictures,
    with_groups,
)
from nearfar.data.rejections import Rejections
from nearfar.data.splits import split_hash
from nearfar.errors import NearfarError, nearest_name

__all__ = ["CocoImage", "CocoSplit", "coco_files", "read_coco"]

_SPLITS = {"train": ("train",), "val": ("val", "valid", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class CocoSplit:
    """The usable pictures and boxes of one file. Boxes are in the order of their pictures.

    ``boxes``: left, top, width, height in pixels, inside the picture. ``image``: whose box it is, as position in
    ``images``. ``label``: position in ``categories``. ``group``: position in ``groups``, −1 where the box has neither
    value; its own attribute counts before that of its picture. ``crowd``: boxes around many objects (``iscrowd``).
    ``clipped``: boxes that reached beyond the edge and were cut there. ``left_out``: boxes of categories that were not
    asked for.
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

    def __len__(self) -> int:
        """How many pictures."""
        return len(self.images)

    @property
    def ids(self) -> list[str]:
        """The pictures' names."""
        return [image.name for image in self.images]

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

    def layout(self) -> dict[str, Any]:
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
            "group_key": self.group_key,
            "groups": {
                name: {"images": pictures[i], "boxes": boxes[i]} for i, name in enumerate(self.groups)
            },
            "rejections": self.rejections.as_dict(),
            "hash": self.hash,
            "content": self.content,
        }


def coco_files(folder: str | Path) -> dict[str, Path]:
    """The files of a data folder by split: ``train.json``, ``val.json``, ``instances_train2017.json`` and the like, in
    the folder or in its ``annotations``.

    Raises:
        NearfarError: no such folder, no file for ``train``, two files for one split.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NearfarError(f"data.dir={folder}: no such folder.")
    there = sorted([*folder.glob("*.json"), *folder.glob("annotations/*.json")])
    found = {
        split: [path for path in there if any(word in _words(path) for word in words)]
        for split, words in _SPLITS.items()
    }
    for split, paths in found.items():
        if len(paths) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in paths)
            raise NearfarError(
                f"data.dir={folder}: several files could be {split}: {names}. Keep one of them there."
            )
    if not found["train"]:
        names = ", ".join(path.name for path in there) or "no .json file"
        raise NearfarError(f"data.dir={folder}: there is no train.json (COCO format). In it: {names}.")
    return {split: paths[0] for split, paths in found.items() if paths}


def _words(path: Path) -> list[str]:
    """``instances_train2017`` → instances, train."""
    return path.stem.lower().replace("validation", "val").replace("-", "_").rstrip("0123456789").split("_")


def read_coco(
    path: str | Path,
    images: str | Path | None = None,
    *,
    categories: Sequence[str] | None = None,
    group_key: str | None = None,
    groups: Sequence[str] | None = None,
) -> CocoSplit:
    """Read a COCO-format file and look at the head of each of its pictures.

    Args:
        path: the JSON file with ``images``, ``annotations`` and ``categories``.
        images: the folder of the pictures; None looks into ``images``, a folder called as the file, and the file's own
            folder, and takes the first that holds one of them.
        categories: names of the categories to keep, which then have this order; None keeps all, in the file's order.
        group_key: the name of an attribute with two values, on a box or a picture, at its top level or under
            ``attributes``.
        groups: the two values; None takes those that occur, sorted.

    Rejected and counted are pictures that are missing, unreadable, of another size than the file says or without an id
    of their own; and boxes that are no four finite numbers, without area, outside their picture, of an unknown category
    or of a picture that is not there.

    Raises:
        NearfarError: an unreadable file, one without the three lists, no usable picture or box, an unknown category, a
            group attribute without exactly two values.
    """
    path = Path(path)
    content = _load(path)
    rejections = Rejections()
    names = _categories(path, content["categories"], categories)
    root = _root(path, images, content["images"])
    pictures = dict(usable_pictures(content["images"], root, rejections))
    if not pictures:
        raise NearfarError(
            f"{path}: none of its {len(content['images'])} pictures is usable; {rejections.summary()}. Pictures were "
            f"sought in {root}."
        )
    kept = usable_boxes(content["annotations"], pictures, names, categories is not None, rejections)
    if not kept.boxes:
        raise NearfarError(
            f"{path}: none of its {len(content['annotations'])} boxes is usable; {rejections.summary()}."
        )
    order = sorted(range(len(kept.boxes)), key=lambda i: kept.image[i])
    values = group_values(path, group_key, groups, pictures, kept.raw)
    own = [attribute(kept.raw[i], group_key) for i in order]
    of_image = [attribute(raw, group_key) for raw, _ in pictures.values()]
    image = np.array([kept.image[i] for i in order], np.int64)
    group = [
        group_position(values, of_image[position] if value is None else value)
        for value, position in zip(own, image.tolist(), strict=True)
    ]
    return CocoSplit(
        source=path,
        images=with_groups([picture for _, picture in pictures.values()], of_image, values, image, group),
        categories=tuple(names.wanted),
        boxes=np.array([kept.boxes[i] for i in order], np.float64),
        image=image,
        label=np.array([kept.label[i] for i in order], np.int64),
        group=np.array(group, np.int64),
        crowd=np.array([bool(kept.raw[i].get("iscrowd", 0)) for i in order]),
        groups=values,
        group_key=group_key,
        rejections=rejections,
        clipped=kept.clipped,
        left_out=dict(kept.left_out),
    )


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise NearfarError(f"There is no file {path}.")
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NearfarError(f"{path} is no JSON file, or is cut off: {error}.") from None
    if not isinstance(content, dict):
        raise NearfarError(f"{path}: a COCO file is an object with images, annotations and categories.")
    for name in ("images", "annotations", "categories"):
        rows = content.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            there = ", ".join(sorted(content)) or "nothing"
            raise NearfarError(
                f"{path} has no list of objects '{name}', which a COCO file needs. It has {there}."
            )
    return content


def _categories(path: Path, rows: list[dict[str, Any]], wanted: Sequence[str] | None) -> Categories:
    by_id = {row.get("id"): str(row.get("name", row.get("id"))) for row in rows if is_key(row.get("id"))}
    names = list(dict.fromkeys(by_id.values()))
    for name in wanted or ():
        if name not in names:
            raise NearfarError(f"{path} has no category {name!r}; {nearest_name(name, names)}")
    return Categories(by_id, names if wanted is None else list(wanted))


def _root(path: Path, images: str | Path | None, rows: list[dict[str, Any]]) -> Path:
    if images is not None:
        if not Path(images).is_dir():
            raise NearfarError(f"{images}: no such folder of pictures.")
        return Path(images)
    base = path.parent.parent if path.parent.name == "annotations" else path.parent
    name = "_".join(path.stem.split("_")[1:]) or path.stem  # instances_train2017 → train2017
    tried = list(dict.fromkeys([base / "images", base / path.stem, base / name, base]))
    for folder in tried:
        if any((folder / str(row.get("file_name", ""))).is_file() for row in rows[:20]):
            return folder
    raise NearfarError(
        f"{path}: its pictures are not to be found. Sought in {', '.join(map(str, tried))}; the first is called "
        f"{rows[0].get('file_name') if rows else 'nothing: the list of images is empty'}."
    )
