"""The slides of an experiment, read or generated, split by slide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nearfar.data.cache import content_key
from nearfar.data.files import Json
from nearfar.data.slides.generated import generated_tissue
from nearfar.data.slides.tissue import Tissue
from nearfar.errors import NearfarError, nearest_name
from nearfar.systems.tissue.options import TissueData as DataOptions
from nearfar.systems.tissue.options import slide_names

__all__ = ["TissueData", "load_data", "resolve_splits"]


@dataclass(frozen=True)
class TissueData:
    """The splits of one experiment, all with the same genes, and their source."""

    splits: dict[str, Tissue]
    source: str
    notes: Mapping[str, object] = field(default_factory=dict)
    #: what the index of the shards says of ``patch`` and ``expression``; empty for generated slides
    reading: Mapping[str, Json] = field(default_factory=dict)

    @property
    def genes(self) -> list[str]:
        """The genes of every split, in order."""
        return list(self.splits["train"].genes)

    def hash_of(self, *names: str) -> str:
        """Names the content of splits (of all without names): sixteen hexadecimal digits."""
        return content_key(*(self.splits[name].content for name in names or self.splits))[:16]

    def layout(self) -> Json:
        """The content of ``dataset_layout.json``."""
        return {
            "system": "tissue",
            "source": self.source,
            "splits": {
                name: {
                    "rows": len(tissue),
                    "slides": dict(zip(tissue.slide_names, np.bincount(tissue.slides).tolist(), strict=True)),
                    "patients": sorted(set(tissue.patients or ())),
                    "split_hash": self.hash_of(name),
                }
                for name, tissue in self.splits.items()
            },
            "genes": len(self.genes),
            "neighbors": int(self.splits["train"].neighbors.shape[1]),
            "patch": list(self.splits["train"].patches.shape[1:3]),
            "notes": dict(self.notes),
            "leaks": {},
            "data_hash": self.hash_of(),
        }

    def summary(self) -> str:
        """A line for each split."""
        lines = []
        for name, tissue in self.splits.items():
            slides = ", ".join(tissue.slide_names[:8]) + (", …" if len(tissue.slide_names) > 8 else "")
            lines.append(f"{name}: {len(tissue)} spots of {len(tissue.slide_names)} slide(s) ({slides})")
        return "\n".join([*lines, f"{len(self.genes)} genes, {self.source}"])


def load_data(options: DataOptions, say: Callable[[str], None]) -> TissueData:
    """The splits that ``data`` asks for: slides in a folder of shards, or generated ones."""
    if options.dir is None:
        say("data: generated slides; give data.dir= for your own")
        tissue = generated_tissue(
            options.slides,
            options.side,
            options.signal,
            options.noise,
            genes=options.generated_genes,
            patch=options.patch,
            neighbors=options.neighbors,
            seed=options.generated_seed,
        )
        tests = max(1, options.slides // 4)
        names = list(tissue.slide_names)
        usual = {"train": names[: -tests - 1], "val": names[-tests - 1 : -tests], "test": names[-tests:]}
        splits = resolve_splits(names, options, usual, "the generated tissue")
        notes: dict[str, object] = {"signal": options.signal, "noise": options.noise}
        return TissueData(_of_slides(tissue, splits), "generated slides", notes)
    folder = Path(str(options.dir)).expanduser()
    if not folder.is_dir():
        raise NearfarError(f"data.dir={folder}: no such folder.")
    from nearfar.data.slides.shard_dataset import read_shards
    from nearfar.data.slides.shard_index import read_index, read_splits

    index = read_index(folder)
    names = [slide.name for slide in index.slides]
    splits = resolve_splits(names, options, read_splits(folder), str(folder))
    # Each by itself: a split then has a memory map of its own, wherever its slides stand in the folder.
    parts = {
        name: read_shards(
            folder, slides, genes=options.genes, genes_of=splits["train"], neighbors=options.neighbors
        )
        for name, slides in splits.items()
    }
    notes = {"genes": f"{len(parts['train'].genes)} most variable over the training slides"}
    reading = {"patch": index.patch, "expression": index.expression}
    return TissueData(parts, f"shards in {folder.name}", notes, reading)


def _of_slides(tissue: Tissue, splits: Mapping[str, Sequence[str]]) -> dict[str, Tissue]:
    return {name: tissue.select(slides) for name, slides in splits.items()}


def resolve_splits(
    slides: Sequence[str], options: DataOptions, otherwise: Mapping[str, Sequence[str]], where: str
) -> dict[str, list[str]]:
    """The slides of every split: as ``hold_out`` and ``val`` name them, or else as ``otherwise`` says.

    An unknown slide or one in two splits is an error, and so are no slides to train on, or none to validate or test on.
    """
    named = {
        "val": slide_names(options.val, "data.val"),
        "test": slide_names(options.hold_out, "data.hold_out"),
    }
    for key, names in (("data.hold_out", named["test"]), ("data.val", named["val"])):
        for name in names:
            if name not in slides:
                raise NearfarError(f"{key}={name}: {where} has no such slide; {nearest_name(name, slides)}")
    both = sorted(set(named["test"]) & set(named["val"]))
    if both:
        raise NearfarError(f"slide {', '.join(both)} is in data.hold_out and in data.val: one split each.")
    splits = {name: list(members) for name, members in otherwise.items() if members}
    if named["test"] or named["val"]:
        taken = {*named["test"], *named["val"]}
        splits = {"train": [name for name in slides if name not in taken]}
        splits |= {name: list(members) for name, members in named.items() if members}
    if not splits.get("test") and not splits.get("val"):
        raise NearfarError(
            f"{where} says nothing of splits: name the slides to test on, data.hold_out=SLIDE, of {', '.join(slides)}."
        )
    if not splits.get("train"):
        raise NearfarError("no slide is left to train on: data.hold_out and data.val take all of them.")
    return splits
