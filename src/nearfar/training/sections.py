"""Sections of a run's report: tables, pictures and examples that a system adds."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from jaxtyping import Float

from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.training.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Picture", "Section", "Table", "read_sections", "retrieval_examples", "write_sections"]


#: how many hits are shown, examples of each kind, and queries looked at for them
HITS, EXAMPLES, LOOKED_AT = 5, 3, 2000
KINDS = ("right", "nearly", "wrong")


def retrieval_examples(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "n d"],
    query: Callable[[int], Json],
    item: Callable[[int], Json],
    seed: int = 0,
) -> list[Json]:
    """Queries whose partner came first (right), up to tenth (nearly) and later (wrong), chosen by ``seed``.

    ``query`` and ``item`` say what is shown of a position: a ``text``, perhaps an ``svg``.

    >>> import torch
    >>> rows = torch.eye(3)
    >>> examples = retrieval_examples(rows, rows, lambda i: {"text": f"q{i}"}, lambda i: {"text": f"k{i}"})
    >>> examples[0]["kind"], examples[0]["rank"], examples[0]["gallery"], examples[0]["items"][0]["correct"]
    ('right', 1, 3, True)
    """
    import torch
    from torch.nn.functional import normalize

    queries, keys = normalize(queries.float(), dim=1), normalize(keys.float(), dim=1)
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed))
    wanted = dict.fromkeys(KINDS, EXAMPLES)
    examples: list[Json] = []
    for at in order[:LOOKED_AT].tolist():
        scores = keys @ queries[at]
        # Ties count by expectation, as in the metrics: among equal scores nothing says which comes first.
        equal = int((scores == scores[at]).sum())
        rank = 1 + int((scores > scores[at]).sum()) + (equal - 1) / 2
        kind = "right" if rank == 1 else "nearly" if rank <= 10 else "wrong"
        if not wanted[kind]:
            continue
        wanted[kind] -= 1
        best = scores.topk(min(HITS, len(scores))).indices.tolist()
        examples.append(
            {
                "kind": kind,
                "query": query(at),
                "rank": int(rank) if rank == int(rank) else rank,
                "gallery": len(keys),
                "items": [
                    {"rank": place + 1, "score": float(scores[hit]), "correct": hit == at, **item(hit)}
                    for place, hit in enumerate(best)
                ],
            }
        )
        if not any(wanted.values()):
            break
    return sorted(examples, key=lambda example: KINDS.index(example["kind"]))


#: how the bytes of a picture begin, and what it then is
_KINDS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png"}


@dataclass(frozen=True)
class Table:
    """Rows below the names of their columns; numbers are rounded when shown, ``None`` is shown as a dash.

    ``shaded``: cells of numbers are tinted by their size, row by row (a confusion table).
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
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


def read_sections(folder: RunFolder) -> list[Json]:
    """What ``write_sections`` wrote."""
    if not (folder.path / "sections.json").exists():
        return []
    sections: list[Json] = folder.read_json("sections.json")
    return sections
