"""The files of a folder of shards, slide by slide: what is finished stays, what is half written is done again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int64, Shaped, UInt8

from nearfar.data.cache import content_key
from nearfar.data.files import write_arrays, write_atomically, write_json, write_text
from nearfar.data.slides.image import codec, encode_jpeg
from nearfar.data.slides.shard_index import (
    ShardFile,
    ShardIndex,
    ShardWriter,
    SlideEntry,
    check_inside,
    npy,
)
from nearfar.data.slides.splits import check_splits, write_split_files
from nearfar.data.slides.tissue import GeneSums, Tissue, neighbor_scale, normalized
from nearfar.errors import NearfarError

__all__ = ["Rejected", "SlideFolder", "Spots", "write_tissue"]

_LONGEST = 80  # letters of a slide's name: a member of a tar file has 100, with number and ending

#: spot, reason and detail of spots that were left out
Rejected = Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Spots:
    """The spots of a slide as they are written; ``neighbors`` are positions on the slide, -1 for none."""

    slide: str
    patient: str
    names: list[str]
    positions: Float[np.ndarray, "n 2"]
    neighbors: Int64[np.ndarray, "n k"]
    alpha: Float32[np.ndarray, "n k"]
    expression: Shaped[np.ndarray, "n g"]
    totals: Float[np.ndarray, " n"]
    sigma: float
    pixel_size: float | None = None
    side: int | None = None
    rejected: dict[str, int] = field(default_factory=dict)


class SlideFolder:
    """A folder of shards that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self, slides: Sequence[str]) -> None:
        """Make the folder and take away what a killed process left half written.

        Raises:
            NearfarError: slides whose files would have one name, or a folder that has shards of other slides.
        """
        stems: dict[str, str] = {}
        for name in slides:
            if stems.setdefault(_stem(name), name) != name:
                raise NearfarError(
                    f"slides {stems[_stem(name)]!r} and {name!r} would share files; rename one."
                )
            if len(_stem(name)) > _LONGEST:
                raise NearfarError(
                    f"slide {name[:40]!r}… has a name of {len(name)} letters, and {_LONGEST} fit into a tar "
                    "file: rename it."
                )
        if self.path.exists() and not self.path.is_dir():
            raise NearfarError(f"{self.path} is a file; name a folder for the shards.")
        check_inside(self.path, self.path / "slides")
        (self.path / "slides").mkdir(parents=True, exist_ok=True)
        existing = {path.stem for path in (self.path / "slides").glob("*.json")}
        other = sorted(existing - stems.keys())
        if other:
            raise NearfarError(
                f"{self.path} has shards of other slides ({', '.join(other[:5])}): take a different one, or remove it."
            )
        for path in [*self.path.glob(".*.tmp"), *(self.path / "slides").glob(".*.tmp")]:
            path.unlink()

    def finished(self, slide: str, key: str) -> SlideEntry | None:
        """The entry of a slide that was written from the same input, and whose shards are all there."""
        try:
            saved = json.loads(self._entry(slide).read_text(encoding="utf-8"))
            entry = SlideEntry.from_dict(saved)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        whole = all(_size(self.path / file.name) == file.bytes for file in [*entry.shards, entry.table])
        return entry if entry.key == key and whole else None

    def write(
        self,
        spots: Spots,
        patch: Callable[[int], UInt8[np.ndarray, "p p 3"]],
        quality: int,
        spots_per_shard: int,
        key: str,
    ) -> SlideEntry:
        """Write the shards of a slide, then the entry that says that they are finished.

        Args:
            patch: the patch of a spot by its position on the slide, asked for in order.
        """
        # While shards of a slide are replaced, neither it nor the folder counts as finished.
        self._entry(spots.slide).unlink(missing_ok=True)
        (self.path / "index.json").unlink(missing_ok=True)
        stem = _stem(spots.slide)
        n = len(spots.names)
        shards = []
        for number, start in enumerate(range(0, n, spots_per_shard)):
            path = self.path / f"{stem}-{number:04d}.tar"
            rows = range(start, min(start + spots_per_shard, n))

            def fill(file: object, rows: range = rows) -> None:
                writer = ShardWriter(file)  # type: ignore[arg-type]
                for row in rows:
                    parts = {"jpg": encode_jpeg(patch(row), quality), "npy": npy(spots.expression[row])}
                    writer.add(f"{stem}-{row:06d}", parts | {"json": _facts(spots, row)})
                writer.close()

            write_atomically(path, fill)
            shards.append(self._file(path, len(rows)))
        self._remove_shards(stem, but={shard.name for shard in shards})
        table = self._write_table(spots)
        entry = SlideEntry(
            spots.slide, spots.patient, n, shards, table, spots.sigma, spots.pixel_size, spots.side, spots.rejected, key
        )  # fmt: skip
        write_json(self._entry(spots.slide), entry.as_dict(), indent=1)
        return entry

    def discard(self, slide: str) -> None:
        """Take away what an earlier call wrote of a slide that has no usable spot any more."""
        if self._entry(slide).exists():
            self._entry(slide).unlink()
            (self.path / "index.json").unlink(missing_ok=True)
            (self.path / "slides" / f"{_stem(slide)}.spots.npz").unlink(missing_ok=True)
            self._remove_shards(_stem(slide))

    def _remove_shards(self, stem: str, but: Collection[str] = ()) -> None:
        """Shards of an earlier writing; the digits tell those of A from those of a slide called A-1."""
        for path in self.path.glob(f"{stem}-*.tar"):
            if re.fullmatch(re.escape(stem) + r"-\d{4,}\.tar", path.name) and path.name not in but:
                path.unlink()

    def read_sums(self, slide: str, key: str | None = None) -> tuple[GeneSums, Rejected] | None:
        """Sums of a slide's genes and its rejected spots; None if there are none (or none of this ``key``)."""
        check_inside(self.path, self._sums(slide))
        try:
            with np.load(self._sums(slide), allow_pickle=False) as arrays:
                if key is not None and str(arrays["key"]) != key:
                    return None
                sums = GeneSums(
                    arrays["genes"].tolist(), int(arrays["spots"]), arrays["total"], arrays["squares"]
                )
                if not sums.total.shape == sums.squares.shape == (len(sums.genes),):
                    return None
                return sums, [(str(a), str(b), str(c)) for a, b, c in arrays["rejected"].tolist()]
        except (
            Exception
        ):  # zipfile, zlib and numpy raise whatever the damage leads to; sums are then computed anew
            return None

    def write_sums(self, slide: str, key: str, sums: GeneSums, rejected: Rejected) -> None:
        """Keep both for the next call, and for readers that choose genes."""
        arrays = {
            "key": np.array(key),
            "genes": np.array(sums.genes, np.str_),
            "spots": np.array(sums.spots),
            "total": sums.total,
            "squares": sums.squares,
            "rejected": np.array(rejected, np.str_).reshape(-1, 3),
        }
        write_arrays(self._sums(slide), arrays)

    def write_rejected(self, rejected: Mapping[str, Rejected]) -> None:
        """``rejected.tsv``: every spot that was left out, and why."""
        lines = ["slide\tspot\treason\tdetail\n"]
        for slide, spots in rejected.items():
            # A name out of a file may hold a tab or a line end.
            lines += [
                "\t".join(re.sub(r"[\t\r\n]", " ", part) for part in (slide, *spot)) + "\n" for spot in spots
            ]
        write_text(self.path / "rejected.tsv", "".join(lines))

    def _write_table(self, spots: Spots) -> ShardFile:
        """What the samples say of their spots, once more as arrays: readers need not parse a text for each spot."""
        path = self.path / "slides" / f"{_stem(spots.slide)}.spots.npz"
        arrays = {
            "ids": np.array(spots.names, np.str_),
            "positions": np.asarray(spots.positions, np.float64),
            "neighbors": np.asarray(spots.neighbors, np.int64),
            "alpha": np.asarray(spots.alpha, np.float32),
            "totals": np.asarray(spots.totals, np.float64),
        }
        write_arrays(path, arrays)
        return self._file(path, len(spots.names))

    def _file(self, path: Path, rows: int) -> ShardFile:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return ShardFile(path.relative_to(self.path).as_posix(), rows, path.stat().st_size, digest)

    def _entry(self, slide: str) -> Path:
        return self.path / "slides" / f"{_stem(slide)}.json"

    def _sums(self, slide: str) -> Path:
        return self.path / "slides" / f"{_stem(slide)}.genes.npz"


def _facts(spots: Spots, row: int) -> bytes:
    """What a sample says of its spot beside patch and expression."""
    near = [
        (at, weight)
        for at, weight in zip(spots.neighbors[row].tolist(), spots.alpha[row], strict=True)
        if at >= 0
    ]
    facts = {
        "id": spots.names[row],
        "slide": spots.slide,
        "patient": spots.patient,
        "x": float(spots.positions[row, 0]),
        "y": float(spots.positions[row, 1]),
        "total": float(spots.totals[row]),
        "neighbors": [spots.names[at] for at, _ in near],
        "alpha": [float(f"{weight:.9g}") for _, weight in near],  # nine digits give the float32 back
    }
    return json.dumps(facts, ensure_ascii=False, separators=(",", ":")).encode()


def _stem(name: str) -> str:
    """The name of a slide as part of a file's: WebDataset ends a key at the first dot."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


_VERSION = 1  # part of every slide's key


def write_tissue(
    tissue: Tissue,
    output: str | Path,
    splits: Mapping[str, Sequence[str]] | None = None,
    *,
    quality: int = 90,
    target_sum: float = 1e4,
    spots_per_shard: int = 4096,
) -> ShardIndex:
    """Write a tissue that is in memory as shards; without ``splits`` all its slides train.

    Patches lose a little, as jpg does; everything else is kept. ``target_sum`` states how "log1p" expression was
    normalised, or is to be. Returns the index.
    """
    folder = SlideFolder(Path(output))
    folder.prepare(list(tissue.slide_names))
    split_slides = {name: list(slides) for name, slides in (splits or {"train": tissue.slide_names}).items()}
    check_splits(split_slides, list(tissue.slide_names))
    if tissue.patches.shape[1] != tissue.patches.shape[2]:
        raise NearfarError(f"patches of {tissue.patches.shape[1:3]} pixels: squares are needed.")
    entries = []
    for at, name in enumerate(tissue.slide_names):
        rows = tissue.rows_of(at)
        first = int(rows[0]) if len(rows) else 0
        patches, near = tissue.patches[rows], tissue.neighbors[rows]
        expression = np.asarray(tissue.expression[rows])
        totals = expression.sum(1) if tissue.totals is None else tissue.totals[rows]
        key = content_key("tissue", _VERSION, tissue.content, name, quality, spots_per_shard, codec())
        entry = folder.finished(name, key)
        if entry is None:
            spots = Spots(
                slide=name,
                patient=name if tissue.patients is None else tissue.patients[at],
                names=[tissue.ids[row] for row in rows.tolist()],
                positions=tissue.positions[rows],
                neighbors=np.where(near >= 0, near - first, -1),
                alpha=tissue.alpha[rows],
                expression=expression,
                totals=totals,
                sigma=neighbor_scale(tissue.positions[rows], tissue.neighbors.shape[1]),
            )
            values = normalized(expression, totals, target_sum) if tissue.values == "counts" else expression
            folder.write_sums(name, key, GeneSums.of(values, tissue.genes), [])
            entry = folder.write(spots, patches.__getitem__, quality, spots_per_shard, key)
        entries.append(entry)
    index = ShardIndex(
        folder.path,
        list(tissue.genes),
        {"values": tissue.values, "target_sum": target_sum, "genes": "as in the tissue that was written"},
        {"pixels": tissue.patches.shape[1], "field": "not known", "jpg_quality": quality, "encoder": codec()},
        {"k": tissue.neighbors.shape[1], "rule": "as in the tissue that was written"},
        entries,
    )
    write_split_files(folder.path, split_slides)
    folder.write_rejected({})
    index.write(split_slides)
    return index
