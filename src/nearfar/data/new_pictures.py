"""New pictures for a trained run: from a folder, a list, a table or a COCO file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from nearfar.data.cache import without_cache
from nearfar.data.chunks import NewData, read_chunks
from nearfar.data.coco_files import picture_files
from nearfar.data.coco_rows import row_key
from nearfar.data.column_kinds import PICTURE_SUFFIXES
from nearfar.data.files import Json, read_data_json
from nearfar.data.images import Photo, as_photo
from nearfar.data.items import Items
from nearfar.data.picture_files import check_pictures, walk_files
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError

__all__ = ["NEW_OPTIONS", "pictures_of", "read_pictures", "size_of"]

#: how new pictures may be read
NEW_OPTIONS = {"min_score": "boxes with lower scores are left out; by default none is"}
_HEADERS = {"image": ("image", "file_name", "filename", "image_path", "picture", "photo", "text")}
#: the note of items that says how they were read
NOTE = "detector"


class _Sought(NamedTuple):
    """A picture of a source: its name there, its id, its file, its stated size, the row it stands in."""

    name: str
    id: Any
    path: Path | None
    reason: str = ""
    detail: str = ""
    size: tuple[int, int] | None = None
    row: int | None = None


def read_pictures(source: NewData) -> Iterator[Items]:
    """Pictures in chunks of ``source.rows``, each decoded once: those that cannot be read are rejections.

    ``source.path`` is a folder with pictures at any depth, one picture, a text file with a name on each line, a table
    with a column ``image``, or a COCO file, of which ``images`` and perhaps ``categories`` are read.

    Columns are ``photo``, ``image`` (the name), ``image_id`` (that of the COCO file, else numbers from 1 on), ``width``
    and ``height``.

    Raises:
        NearfarError: nothing there, no picture in it, a file that is none of these.
    """
    path = Path(source.path).expanduser()
    about: Json = {"min_score": source.number("min_score", 0.0, 0, 1)}
    unread = Rejections()
    if path.suffix.lower() == ".json" and path.is_file():
        sought, about["category_ids"] = _of_coco(path, source.images)
    elif path.is_dir():
        sought = _of_folder(path)
    elif path.suffix.lower() in PICTURE_SUFFIXES and path.is_file():
        sought = iter([_Sought(path.name, 1, path)])
    elif path.is_file():
        sought = _of_table(path, source, unread)
    else:
        raise NearfarError(f"{path}: no such file or folder.")
    seen = 0
    while some := list(islice(sought, source.rows)):
        seen += len(some)
        items = _checked(some, str(path), about)
        items.rejections.extend(unread)
        unread.clear()
        yield items
    if not seen:
        raise NearfarError(_nothing(path) if not len(unread) else f"{path}: {unread.summary()}.")
    if len(unread):
        yield Items([], {}, str(path), rejections=unread)


def _nothing(path: Path) -> str:
    if not path.is_dir():
        return f"{path} names no picture."
    others = sorted(each.name for each in path.iterdir() if not each.name.startswith("."))
    listed = f"in it: {', '.join(others[:5])}" if others else "it is empty"
    return f"{path} holds no picture, at any depth; {listed}. Pictures end in {', '.join(sorted(PICTURE_SUFFIXES))}."


def _of_folder(folder: Path) -> Iterator[_Sought]:
    paths = (path for path in walk_files(folder) if path.suffix.lower() in PICTURE_SUFFIXES)
    for number, path in enumerate(paths, 1):
        yield _Sought(path.relative_to(folder).as_posix(), number, path)


def _of_table(path: Path, source: NewData, unread: Rejections) -> Iterator[_Sought]:
    """The pictures of a table; rows that cannot be read at all are counted in ``unread``."""
    folder = Path(source.images).expanduser() if source.images is not None else path.parent
    number = 0
    for items in read_chunks(source, _HEADERS):
        unread.extend(items.rejections)
        rows = items.rows or list(range(1, len(items) + 1))
        for value, row in zip(items["image"], rows, strict=True):
            number += 1
            if value is None:
                yield _Sought("", number, None, "row without a picture", row=row)
                continue
            whole = folder / str(value)  # an absolute path stays as it is
            inside = whole.is_relative_to(folder)
            name = whole.relative_to(folder).as_posix() if inside else str(value)
            yield _Sought(name, number, whole, row=row)


def _of_coco(path: Path, images: Path | None) -> tuple[Iterator[_Sought], Json]:
    content = read_data_json(path)
    rows = content.get("images") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise NearfarError(
            f"{path}: a COCO file is an object with a list 'images'; a folder of pictures will do, too."
        )
    if not rows:
        raise NearfarError(f"{path} lists no pictures: its 'images' are empty.")
    folder = None if images is None else Path(images).expanduser()
    if folder is not None and not folder.is_dir():
        raise NearfarError(f"{folder}: no such folder of pictures.")
    files = picture_files(path, folder)
    categories = content.get("categories")
    ids = {
        str(row.get("name")).strip(): row.get("id")
        for row in (categories if isinstance(categories, list) else ())
        if isinstance(row, dict) and row_key(row.get("id")) is not None
    }

    def sought() -> Iterator[_Sought]:
        for number, row in enumerate(rows, 1):
            name = row.get("file_name") if isinstance(row, dict) else None
            if not isinstance(name, str) or not name.strip() or row_key(row.get("id")) is None:
                yield _Sought(str(name), None, None, "picture without id or file_name", row=number)
                continue
            size = _stated(row)
            file = files.find(name, size)
            yield _Sought(name, row["id"], file.path, file.reason, file.detail, size, number)

    return sought(), ids


def _stated(row: Json) -> tuple[int, int] | None:
    try:
        width, height = int(float(row["width"])), int(float(row["height"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (width, height) if min(width, height) > 0 else None


def _checked(some: Sequence[_Sought], source: str, about: Mapping[str, object]) -> Items:
    """The pictures that can be read; the others are counted."""
    rejections = Rejections()
    on_disk = [each for each in some if each.path is not None]
    for each in some:
        if each.path is None:
            rejections.add(each.reason, each.row, each.name, each.detail)
    kept, sizes = [], []
    with without_cache():  # pictures that are seen once
        checked = check_pictures([each.path for each in on_disk if each.path])
    for each, seen in zip(on_disk, checked, strict=True):
        if seen.problem:
            missing = each.path is not None and not each.path.is_file()
            rejections.add(
                "missing picture" if missing else "unreadable picture", each.row, each.name, seen.problem
            )
        elif each.size is not None and each.size != (seen.width, seen.height):
            detail = f"{seen.width} × {seen.height} in truth, {each.size[0]} × {each.size[1]} in the file"
            rejections.add("picture of a different size", each.row, each.name, detail)
        else:
            kept.append(each)
            sizes.append((seen.width, seen.height))
    rows = [each.row if each.row is not None else int(each.id) for each in kept]
    return Items(
        [each.name for each in kept],
        {
            "photo": [as_photo(each.path) for each in kept],
            "image": [each.name for each in kept],
            "image_id": [each.id for each in kept],
            "width": [width for width, _ in sizes],
            "height": [height for _, height in sizes],
        },
        source,
        rows=rows,
        rejections=rejections,
        notes={NOTE: dict(about)},
    )


def pictures_of(values: Sequence[object]) -> Items:
    """Pictures in memory, or by their paths, as items.

    Raises:
        NearfarError: a value that is no picture, named by its position.
    """
    photos: list[Photo] = []
    sizes = []
    for position, value in enumerate(values):
        try:
            photo = as_photo(value)
            height, width = photo.read().shape[:2]
        except NearfarError as error:
            raise NearfarError(f"value {position} cannot be read: {error}") from None
        photos.append(photo)
        sizes.append((width, height))
    names = [str(value) if isinstance(value, (str, Path)) else str(at) for at, value in enumerate(values)]
    return Items(
        names,
        {
            "photo": photos,
            "image": names,
            "image_id": list(range(1, len(names) + 1)),
            "width": [width for width, _ in sizes],
            "height": [height for _, height in sizes],
        },
        "the values",
    )


def size_of(items: Items) -> Float[np.ndarray, "n 4"]:
    """Width, height, width, height of every picture."""
    width, height = (np.asarray(items[name], np.float64) for name in ("width", "height"))
    return np.stack([width, height, width, height], axis=1)
