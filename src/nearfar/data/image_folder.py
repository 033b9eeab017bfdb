"""Folders of pictures, whose folders are the classes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from nearfar.data.column_kinds import PICTURE_SUFFIXES
from nearfar.data.files import Json
from nearfar.data.items import Column, Items
from nearfar.data.picture_files import walk_files
from nearfar.errors import NearfarError

__all__ = ["image_folder_items"]


def image_folder_items(folder: Path) -> Items:
    """The pictures below a folder: ``image`` (path), ``label``, the folder directly below ``folder`` that they are in.

    Where they lie deeper (``folder/genus/species/a.png``), ``folder`` is the whole of it, ``genus/species``. A picture
    beside the folders of classes has no label. Ids are the paths below ``folder``. Hidden files are passed over, links
    are followed once; files that are no pictures by their endings are counted in the notes. Nothing is opened.

    Raises:
        NearfarError: no picture.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("cat/1.png", "dog/2.jpg", "dog/read.me"):
    ...     (root / name).parent.mkdir(exist_ok=True)
    ...     (root / name).touch()
    >>> items = image_folder_items(root)
    >>> items.ids, items["label"], items.notes
    (['cat/1.png', 'dog/2.jpg'], ['cat', 'dog'], {'files that are no pictures': {'.me': 1}})
    """
    others: Counter[str] = Counter()
    paths: list[Path] = []
    for path in walk_files(folder):
        if path.suffix.lower() in PICTURE_SUFFIXES:
            paths.append(path)
        else:
            others[path.suffix.lower() or "without ending"] += 1
    if not paths:
        held = ", ".join(f"{count} {ending}" for ending, count in others.most_common(8)) or "no file at all"
        raise NearfarError(
            f"{folder} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES)[:6])}, …) and nothing else that is read; "
            f"below it: {held}."
        )
    inner = [path.relative_to(folder) for path in paths]
    labels = [place.parts[0] if len(place.parts) > 1 else None for place in inner]
    columns: dict[str, Column] = {"image": [str(path) for path in paths], "label": labels}
    if any(len(place.parts) > 2 for place in inner):
        columns["folder"] = [place.parent.as_posix() if len(place.parts) > 1 else None for place in inner]
    notes: Json = {}
    if others:
        notes["files that are no pictures"] = dict(others)
    without = labels.count(None)
    if 0 < without < len(labels):
        notes["pictures outside the folders of classes"] = without
    ids = [place.as_posix() for place in inner]
    return Items(ids, columns, str(folder), rows=list(range(1, len(ids) + 1)), notes=notes)
