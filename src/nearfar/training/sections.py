"""What a system shows of its results beside the estimates: tables and pictures, kept with the run.

``sections.json`` holds them, pictures included, so that ``nearfar report RUN`` can draw the page anew without the
data that they came from.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nearfar.errors import NearfarError
from nearfar.training.run_folder import RunFolder

__all__ = ["Picture", "Section", "Table", "read_sections", "write_sections"]

#: how the bytes of a picture begin, and what it then is
_KINDS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png"}


@dataclass(frozen=True)
class Table:
    """Rows below the names of their columns; numbers are rounded when shown, ``None`` is shown as a dash.

    ``shaded``: cells of numbers are tinted by their size, row by row (a confusion table).
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    shaded: bool = False

    def __post_init__(self) -> None:
        wrong = [i for i, row in enumerate(self.rows) if len(row) != len(self.columns)]
        if wrong:
            raise NearfarError(
                f"table '{self.caption}': row {wrong[0]} has {len(self.rows[wrong[0]])} cells, and there are "
                f"{len(self.columns)} columns"
            )


@dataclass(frozen=True)
class Picture:
    """A picture, as the bytes of a JPEG or PNG file or as the text of an ``<svg>`` element drawn by us.

    >>> Picture("<svg></svg>").source
    '<svg></svg>'
    >>> Picture(b"GIF89a").source
    Traceback (most recent call last):
    nearfar.errors.NearfarError: a picture begins with b'GIF8': neither JPEG nor PNG
    """

    data: bytes | str
    caption: str = ""

    @property
    def source(self) -> str:
        """The SVG element, or the address of the picture as ``<img src=…>`` takes it."""
        if isinstance(self.data, str):
            return self.data
        for start, kind in _KINDS.items():
            if self.data.startswith(start):
                return f"data:{kind};base64,{base64.b64encode(self.data).decode()}"
        raise NearfarError(f"a picture begins with {self.data[:4]!r}: neither JPEG nor PNG")


@dataclass(frozen=True)
class Section:
    """A part of the report under a title of its own: a paragraph, tables, pictures."""

    title: str
    lead: str = ""
    tables: Sequence[Table] = field(default_factory=tuple)
    pictures: Sequence[Picture] = field(default_factory=tuple)


def write_sections(folder: RunFolder, sections: Sequence[Section]) -> None:
    """Write ``sections.json``; nothing where there are none."""
    content = [
        {
            "title": section.title,
            "lead": section.lead,
            "tables": [asdict(table) for table in section.tables],
            "pictures": [{"source": p.source, "caption": p.caption} for p in section.pictures],
        }
        for section in sections
    ]
    if content:
        folder.write_json("sections.json", content)


def read_sections(folder: RunFolder) -> list[dict[str, Any]]:
    """What ``write_sections`` wrote."""
    if not (folder.path / "sections.json").exists():
        return []
    found: list[dict[str, Any]] = folder.read_json("sections.json")
    return found
