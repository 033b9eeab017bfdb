"""``index.json`` of a folder of shards: what is in them, how it was made, and by which hashes it is known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nearfar.data.cache import content_key
from nearfar.errors import NearfarError, nearest_name
from nearfar.systems.tissue.slide_splits import check_splits, read_split_files
from nearfar.training.run_folder import write_atomically

__all__ = ["FORMAT", "ShardFile", "ShardIndex", "SlideEntry", "read_index", "read_splits", "write_json"]

FORMAT = "shards_v1"


@dataclass(frozen=True)
class ShardFile:
    """A file of a slide, as seen from the folder, and how many spots are in it."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SlideEntry:
    """One slide: its shards, the table of its spots (ids, places, neighbours), σ in pixels, and what was left out.

    ``key`` names the files and options that it was made from; ``rejected`` counts spots by reason.
    """

    name: str
    patient: str
    spots: int
    shards: list[ShardFile]
    table: ShardFile
    sigma: float
    pixel_size: float | None
    side: int | None
    rejected: dict[str, int]
    key: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> SlideEntry:
        files = {
            "shards": [ShardFile(**each) for each in saved["shards"]],
            "table": ShardFile(**saved["table"]),
        }
        return cls(**{**saved, **files})


@dataclass(frozen=True)
class ShardIndex:
    """All slides of a folder.

    Attributes:
        folder: where the shards are.
        genes: the columns of every sample's expression.
        expression: ``values`` ("log1p" or "counts"), ``target_sum``, and how the genes were chosen.
        patch: ``pixels``, and the field that they show.
        neighbors: ``k`` and the rule.
        slides: their entries, in the order of names.
    """

    folder: Path
    genes: list[str]
    expression: dict[str, Any]
    patch: dict[str, Any]
    neighbors: dict[str, Any]
    slides: list[SlideEntry] = field(default_factory=list)

    @property
    def content(self) -> str:
        """The hash of everything that the shards hold."""
        return content_key(
            FORMAT,
            self.genes,
            self.expression,
            [[s.name, *(f.sha256 for f in [*s.shards, s.table])] for s in self.slides],
        )

    def entry(self, name: str) -> SlideEntry:
        """A slide by name."""
        for slide in self.slides:
            if slide.name == name:
                return slide
        names = [slide.name for slide in self.slides]
        raise NearfarError(f"{self.folder} has no slide {name!r}; {nearest_name(name, names)}")

    def write(self, splits: Mapping[str, Sequence[str]]) -> Path:
        """Write ``index.json``; the splits are the ones at the time of writing, the split files decide."""
        path = self.folder / "index.json"
        write_json(
            path,
            {
                "format": FORMAT,
                "content": self.content,
                "spots": sum(slide.spots for slide in self.slides),
                "patch": self.patch,
                "expression": self.expression,
                "neighbors": self.neighbors,
                "splits": {name: list(slides) for name, slides in splits.items()},
                "slides": [slide.as_dict() for slide in self.slides],
                "genes": self.genes,
            },
        )
        return path


def write_json(path: Path, content: Any) -> None:
    """JSON that is the same for the same content, written atomically."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_index(folder: str | Path) -> ShardIndex:
    """The index of a folder of shards.

    Raises:
        NearfarError: no index (shards that are not finished, or another folder), another format, missing shards or such
            of another size than the index says.
    """
    folder = Path(folder)
    path = folder / "index.json"
    if not path.is_file():
        unfinished = (folder / "slides").is_dir()
        raise NearfarError(
            f"{folder} has no index.json: "
            + (
                "its shards are not finished; run nearfar data shards again, it goes on where it stopped."
                if unfinished
                else "no shards were written there; see nearfar data shards --help."
            )
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved.get("format") != FORMAT:
            raise NearfarError(f"{path}: format {saved.get('format')!r}; this version reads {FORMAT}.")
        slides = [SlideEntry.from_dict(each) for each in saved["slides"]]
        parts = {name: saved[name] for name in ("genes", "expression", "patch", "neighbors")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, NearfarError):
            raise
        raise NearfarError(f"{path} is damaged: {error}. Write the shards anew.") from None
    for slide in slides:
        for shard in [*slide.shards, slide.table]:
            at = folder / shard.name
            size = at.stat().st_size if at.is_file() else None
            if size != shard.bytes:
                there = "is missing" if size is None else f"has {size} bytes, {shard.bytes} were written"
                raise NearfarError(f"{at} {there}. Copy the shards again, or write them anew.")
    return ShardIndex(folder=folder, slides=slides, **parts)


def read_splits(folder: str | Path) -> dict[str, list[str]]:
    """The slides of each split as the ``*_samples.txt`` of a folder of shards list them; empty splits are left out.

    Raises:
        NearfarError: a slide in two splits, or one that has no shards.
    """
    index = read_index(folder)
    splits = read_split_files(Path(folder))
    check_splits(splits, [slide.name for slide in index.slides], where=str(folder))
    return {name: slides for name, slides in splits.items() if slides}
