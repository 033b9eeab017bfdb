"""The boxes that a detector finds, as rows of a table and as COCO results."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.data.files import make_folder
from nearfar.data.items import Items
from nearfar.data.new_pictures import NOTE, size_of

__all__ = ["CocoResults", "box_rows", "category_ids"]


def box_rows(
    boxes: Float[Tensor, "n q 4"],
    scores: Float[Tensor, "n q"],
    labels: Int[Tensor, "n q"],
    classes: Sequence[str],
    items: Items,
) -> dict[str, list[object]]:
    """A row for each box, in pixels of its picture; best first, picture by picture.

    Args:
        boxes: corners as shares of the picture.
        scores: of each box, 0 to 1.
        labels: positions in ``classes``; a box of −1 is of no class, and left out.
        items: the pictures, as `read_pictures` gives them.
    """
    about = items.notes.get(NOTE, {})
    ids = category_ids(classes, about.get("category_ids", {}))
    least = float(about.get("min_score", 0.0))
    corners = boxes.double().numpy() * size_of(items)[:, None]
    names = (
        "item",
        "image",
        "image_id",
        "category",
        "category_id",
        "score",
        "left",
        "top",
        "width",
        "height",
    )
    columns: dict[str, list[object]] = {name: [] for name in names}
    for at, (own, score, label) in enumerate(
        zip(corners, scores.double().numpy(), labels.numpy(), strict=True)
    ):
        for q in np.argsort(-score, kind="stable").tolist():
            if score[q] < least or label[q] < 0:
                continue
            left, top, right, bottom = own[q].tolist()
            name = classes[int(label[q])]
            row = (at, items["image"][at], items["image_id"][at], name, ids[name], float(score[q]))
            for column, value in zip(names, (*row, left, top, right - left, bottom - top), strict=True):
                columns[column].append(value)
    return columns


def category_ids(classes: Sequence[str], given: Mapping[str, object]) -> dict[str, object]:
    """An id for each class: that of the COCO file, else a number that it does not use.

    >>> category_ids(["cat", "dog"], {}), category_ids(["cat", "dog"], {"dog": 18})
    ({'cat': 1, 'dog': 2}, {'cat': 19, 'dog': 18})
    """
    if not given:
        return {name: at for at, name in enumerate(classes, 1)}
    plain = {name.casefold(): value for name, value in given.items()}
    numbers = [value for value in given.values() if isinstance(value, int)]
    free = max(numbers, default=0) + 1
    ids: dict[str, object] = {}
    for name in classes:
        if name.casefold() in plain:
            ids[name] = plain[name.casefold()]
        else:
            ids[name], free = free, free + 1
    return ids


class CocoResults:
    """Writes boxes as COCO results: a list of ``image_id``, ``category_id``, ``bbox`` and ``score``.

    Each row also has ``file_name`` and ``category``, which readers of COCO results pass over. The file appears when it
    is whole.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        make_folder(output.parent)
        handle, name = tempfile.mkstemp(
            dir=output.parent, prefix=f".{output.name}.{os.getpid()}.", suffix=".tmp"
        )
        self.temporary, self.count = Path(name), 0
        self.file = os.fdopen(handle, "w", encoding="utf-8")
        self.file.write("[")

    def write(
        self, items: Items, columns: Mapping[str, Sequence[object]], outputs: Mapping[str, Tensor]
    ) -> None:
        """The rows of `box_rows`."""
        names = ("image_id", "category_id", "left", "top", "width", "height", "score", "image", "category")
        for image, category, *box, score, file, name in zip(*(columns[each] for each in names), strict=True):
            row = {
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "score": score,
                "file_name": file,
                "category": name,
            }
            self.file.write((",\n" if self.count else "\n") + json.dumps(row, ensure_ascii=False))
            self.count += 1

    def close(self) -> None:
        """Bring the whole file into its place."""
        self.file.write("\n]\n")
        self.file.close()
        os.chmod(self.temporary, 0o644)
        os.replace(self.temporary, self.output)
