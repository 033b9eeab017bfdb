"""The data of the molecule system: from files or the embedded set to splits that are counted and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nearfar.data.rejections import Rejections
from nearfar.data.splits import check_disjoint
from nearfar.errors import NearfarError, nearest_name
from nearfar.systems.molecules.dataset import MoleculeBatch, MoleculeDataset
from nearfar.systems.molecules.embedded import embedded_records
from nearfar.systems.molecules.records import MoleculeSplit, Records, make_splits, read_records
from nearfar.systems.molecules.scaffold import assign_groups

__all__ = [
    "MoleculeBatch",
    "MoleculeData",
    "MoleculeDataset",
    "MoleculeSplit",
    "load_embedded",
    "load_files",
]

HoldOut = Literal["scaffold", "random"]


@dataclass(frozen=True)
class MoleculeData:
    """The splits of one experiment and how they came about."""

    train: MoleculeSplit
    val: MoleculeSplit | None
    test: MoleculeSplit | None
    sources: list[dict[str, Any]]
    notes: dict[str, str] = field(default_factory=dict)
    leaks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, MoleculeSplit]:
        """The splits that exist, by name."""
        there = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in there.items() if split is not None}

    def layout(self) -> dict[str, Any]:
        """The content of ``dataset_layout.json``: sources with rejections, counts, hashes, leaks."""
        return {
            "system": "molecules",
            "sources": self.sources,
            "splits": {name: split.layout() for name, split in self.splits.items()},
            "notes": self.notes,
            "shared_scaffolds": _shared_scaffolds(self.splits),
            "leaks": self.leaks,
        }

    def summary(self) -> str:
        """A few lines for a log: pairs of each split, rows that were rejected, leaks between splits."""
        lines = []
        for name, split in self.splits.items():
            counts = split.layout()
            lines.append(
                f"{name}: {len(split)} pairs, {counts['structures']} structures, {counts['texts']} texts, "
                f"{counts['scaffolds']} ring scaffolds ({split.source})"
            )
        lines += self.notes.values()
        for source in self.sources:
            lines += [f"{source['split']}: {source['path']}: {note}" for note in source.get("reading", ())]
            rejections = Rejections.from_dict(source["rejections"])
            # What was left out of the embedded set is its own selection, and no row of the user's.
            if "path" in source and len(rejections):
                lines.append(f"{source['split']}: {source['path']}: {rejections.summary()}")
        for pair, leak in self.leaks.items():
            if "structure" in leak:
                shared = ", ".join(f"{found['shared']} {what}s" for what, found in leak.items())
                lines.append(f"split leak: {pair.replace('/', ' and ')} share {shared}")
        return "\n".join(lines)


def load_embedded(
    n: int | None = None,
    seed: int = 0,
    fractions: tuple[float, float] = (0.1, 0.1),
    synonyms: int = 4,
    cache: bool = True,
) -> MoleculeData:
    """Real compounds and their names from the package ``chemicals``, split by scaffold.

    Args:
        n: how many compounds (at least 10); ``None`` takes all usable ones, 67,556.
        seed: fixes which compounds and which scaffolds go where.
        fractions: shares of val and test.
        synonyms: names after the first in each text.

    No ring scaffold of val or test is in train, and no functional pattern of their acyclic molecules.
    """
    records = embedded_records(n, seed, synonyms, cache)
    split = assign_groups(records.scaffolds, fractions, seed)
    parts = {
        name: records.take(np.flatnonzero(split == code).tolist())
        for code, name in enumerate(("train", "val", "test"))
    }
    for name, part in parts.items():
        if not part:
            raise NearfarError(
                f"The embedded set of {len(records)} molecules leaves the {name} split empty at fractions "
                f"{fractions}: raise data.embedded_size or the fraction."
            )
    notes = {
        "split": f"by Bemis–Murcko scaffold (acyclic molecules by functional pattern), seed {seed}, "
        f"val {fractions[0]:g} and test {fractions[1]:g} of the rows",
        "texts": f"at most {1 + synonyms} names of the compound; no registry numbers, formula or SMILES",
    }
    return _assemble({**parts}, [_source_layout(records)], notes, on_leak="error")


def load_files(
    train: str | Path,
    val: str | Path | None = None,
    test: str | Path | None = None,
    *,
    smiles_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    encoding: str | None = None,
    val_fraction: float = 0.1,
    val_split: HoldOut = "scaffold",
    seed: int = 0,
    on_leak: Literal["count", "error"] = "count",
    cache: bool = True,
) -> MoleculeData:
    """Pairs from files with structures and texts: tables (ChEBI-20: ``description``), lists of SMILES, SDF.

    Args:
        train, val, test: one file per split. Without ``val`` a part of train is held out; without ``test``
            there is none, and the layout says so.
        smiles_column, text_column, id_column: headers, where the usual ones do not fit. Without ids a row is
            named after its line. In a file without a header line they are numbers of columns.
        encoding: of text files; null: UTF-8, or UTF-16 with its mark.
        val_fraction, val_split: how much of train is held out, and whether by whole scaffolds (harder, and
            nearer to new chemistry) or at random (nearer to a random test file).
        on_leak: what to do if two splits share a structure: count (``layout`` and ``summary`` tell), or raise.
        cache: keep parsed structures for the next run.

    Raises:
        NearfarError: an unreadable file, a missing column, no usable row (see `read_records`), a leak.
    """
    if val_split not in ("scaffold", "random"):
        raise NearfarError(f"data.val_split={val_split!r}: {nearest_name(val_split, ('scaffold', 'random'))}")
    if val is None and not 0 < val_fraction < 1:
        raise NearfarError(f"data.val_fraction must lie between 0 and 1, got {val_fraction}.")
    paths = {"train": train, "val": val, "test": test}
    read = {
        name: read_records(path, smiles_column, text_column, id_column, cache, encoding=encoding)
        for name, path in paths.items()
        if path is not None
    }
    sources = [{"split": name, **_source_layout(records)} for name, records in read.items()]
    notes: dict[str, str] = {}
    if val is None:
        read["train"], read["val"] = _hold_out(read["train"], val_fraction, val_split, seed)
        notes["val"] = (
            f"no val file: {len(read['val'])} of the {len(read['train']) + len(read['val'])} training rows "
            f"were held out by {val_split} (fraction {val_fraction:g}, seed {seed})"
        )
    if test is None:
        notes["test"] = "no test file: there is no test split, results are on val"
    return _assemble({name: read.get(name) for name in ("train", "val", "test")}, sources, notes, on_leak)


def _hold_out(records: Records, fraction: float, how: HoldOut, seed: int) -> tuple[Records, Records]:
    # A random hold-out, too, moves all rows of one structure together: else val would repeat train.
    keys = records.scaffolds if how == "scaffold" else records.smiles
    held = assign_groups(keys, (fraction, 0.0), seed) == 1
    if held.all() or not held.any():
        raise NearfarError(
            f"{records.source}: {len(records)} rows in {len(set(keys))} groups leave no validation split at "
            f"data.val_fraction={fraction:g}. Give a file with data.val=, raise data.val_fraction or set "
            "data.val_split=random."
        )
    return records.take(np.flatnonzero(~held).tolist()), records.take(np.flatnonzero(held).tolist())


def _assemble(
    parts: Mapping[str, Records | None],
    sources: list[dict[str, Any]],
    notes: dict[str, str],
    on_leak: Literal["count", "error"],
) -> MoleculeData:
    splits = make_splits(parts)
    leaks: dict[str, dict[str, Any]] = {}
    checks = {
        "id": {name: split.ids for name, split in splits.items()},
        "structure": {name: split.smiles for name, split in splits.items()},
        "text": {name: split.texts for name, split in splits.items()},
    }
    for what, values in checks.items():
        # Two compounds may share a text, and files without an id column number their rows alike: only shared
        # structures are a leak that may stop a run.
        stop = on_leak if what == "structure" else "count"
        for pair, leak in check_disjoint(values, what, on_leak=stop).items():
            leaks.setdefault(pair, {})[what] = leak
    return MoleculeData(splits["train"], splits.get("val"), splits.get("test"), sources, notes, leaks)


def _source_layout(records: Records) -> dict[str, Any]:
    return {"source": records.source, **records.notes, "rejections": records.rejections.as_dict()}


def _shared_scaffolds(splits: Mapping[str, MoleculeSplit]) -> dict[str, int]:
    """For each split beside train: its rows whose ring scaffold is also in train."""
    known = {key for key in splits["train"].scaffolds if key.startswith("ring:")}
    return {
        name: sum(key in known for key in split.scaffolds)
        for name, split in splits.items()
        if name != "train"
    }
