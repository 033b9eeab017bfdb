"""Molecule-text pairs of one source, checked row by row, and the splits made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int

from nearfar.data.rejections import Rejections
from nearfar.data.splits import split_hash
from nearfar.data.tables import is_placeholder
from nearfar.errors import NearfarError
from nearfar.models.molecules.smiles import examine_structures
from nearfar.systems.molecules.structure_files import read_structures

__all__ = ["COLUMNS", "MoleculeSplit", "Records", "read_records"]

COLUMNS: Mapping[str, Sequence[str]] = {
    "smiles": ("smiles", "canonical_smiles", "isomeric_smiles", "mol", "structure", "inchi"),
    "text": (
        *("description", "text", "caption", "name", "sentence"),
        *("definition", "iupac_name", "pubchem_iupac_name", "chebi_name", "generic_name", "common_name"),
    ),
    "id": (
        *("cid", "id", "chebi_id", "chebi", "molecule_id", "key"),
        *("pubchem_compound_cid", "chembl_id", "drugbank_id", "zinc_id"),
    ),
}
"""Headers that are recognised, best first; letter case does not matter."""


@dataclass(frozen=True)
class MoleculeSplit:
    """The molecules and texts of one split; position i of every field is the same pair.

    ``smiles`` are canonical. ``structure_group`` and ``text_group`` are equal exactly where the structure or
    the text (apart from letter case and blanks) is, across all splits of the data: two items of one group are
    no negatives of each other. ``scaffolds`` are the group keys of `scaffold_key`.
    """

    name: str
    ids: list[str]
    smiles: list[str]
    texts: list[str]
    structure_group: Int[np.ndarray, " n"]
    text_group: Int[np.ndarray, " n"]
    scaffolds: list[str]
    source: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def hash(self) -> str:
        """A hash of the ids that ignores their order: two estimates are comparable only if it is the same."""
        return split_hash(self.ids)

    def layout(self) -> dict[str, object]:
        """Counts for ``dataset_layout.json``."""
        rings = [key for key in self.scaffolds if key.startswith("ring:")]
        return {
            "source": self.source,
            "rows": len(self),
            "split_hash": self.hash,
            "structures": len(set(self.structure_group.tolist())),
            "texts": len(set(self.text_group.tolist())),
            "scaffolds": len(set(rings)),
            "rows_without_ring": len(self) - len(rings),
        }


@dataclass
class Records:
    """Accepted rows of one source, before they become splits."""

    source: str
    ids: list[str] = field(default_factory=list)
    smiles: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    scaffolds: list[str] = field(default_factory=list)
    rejections: Rejections = field(default_factory=Rejections)
    notes: dict[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, identity: str, smiles: str, text: str, scaffold: str) -> None:
        """Append one pair; ``smiles`` is canonical."""
        self.ids.append(identity)
        self.smiles.append(smiles)
        self.texts.append(text)
        self.scaffolds.append(scaffold)

    def take(self, positions: Sequence[int]) -> Records:
        """The rows at ``positions``; rejections and notes stay with the whole."""
        return Records(
            self.source,
            [self.ids[i] for i in positions],
            [self.smiles[i] for i in positions],
            [self.texts[i] for i in positions],
            [self.scaffolds[i] for i in positions],
        )


def read_records(
    path: str | Path,
    smiles_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    cache: bool = True,
    *,
    columns: Mapping[str, Sequence[str]] = COLUMNS,
    naming: str = "data.{name}_column=NAME",
    encoding: str | None = None,
    encoding_option: str = "data.encoding",
) -> Records:
    """Read pairs from a file of structures (`read_structures`); rows that cannot be used are counted with their reason.

    Rejected: an empty SMILES or text, a text that only says that it is missing (``N/A``, ``nan``), a SMILES that is no
    molecule, a row that repeats an earlier structure *and* text. The same structure with a different text, or the
    same text for a different structure, is kept and marked by groups. A repeated id gets a suffix (``702#2``), so that
    ids are unique. ``columns`` are the headers to look for; ``naming`` is how a message asks for a different one (see
    `read_table`).

    Raises:
        NearfarError: as `read_structures`, and where no row is left.
    """
    overrides = {"smiles": smiles_column, "text": text_column, "id": id_column}
    table = read_structures(path, columns, overrides, ("id",), naming, encoding, encoding_option)
    records = Records(str(path), rejections=table.rejections)
    ids = table["id"] if "id" in table else [f"row{row}" for row in table.rows]
    structures = examine_structures(table["smiles"], cache)
    pairs: dict[tuple[str, str], int] = {}
    for position, row in enumerate(table.rows):
        raw, text, structure = (
            table["smiles"][position],
            " ".join(table["text"][position].split()),
            structures[position],
        )
        if not raw.strip() or (structure.problem and is_placeholder(raw)):
            records.rejections.add("empty SMILES", row, ids[position])
        elif not text:
            records.rejections.add("empty text", row, raw)
        elif is_placeholder(text):
            records.rejections.add("no text", row, raw, f"only {text!r}")
        elif structure.problem:
            records.rejections.add("unparsable SMILES", row, raw, structure.problem)
        elif (pair := (structure.canonical, text_key(text))) in pairs:
            detail = f"same structure and text as row {pairs[pair]}"
            records.rejections.add("repeated row", row, raw, detail)
        else:
            pairs[pair] = row
            records.add(ids[position].strip() or f"row{row}", structure.canonical, text, structure.scaffold)
    if not records:
        raise NearfarError(
            f"{path}: none of its {table.n_rows} rows is a molecule with a text; "
            f"{records.rejections.summary()}."
        )
    records.ids, repeated = _unique(records.ids)
    records.notes = {
        "path": str(path),
        "rows_in_file": table.n_rows,
        "rows_used": len(records),
        "columns": table.used,
        "ids_made_unique": repeated,
        "reading": table.notes,
    }
    return records


def text_key(text: str) -> str:
    """The key under which two texts count as the same: the words without letter case and blanks."""
    return " ".join(text.split()).casefold()


def make_splits(parts: Mapping[str, Records | None]) -> dict[str, MoleculeSplit]:
    """Splits with group labels that are consistent across splits (0, 1, … in order of first appearance)."""
    structures: dict[str, int] = {}
    texts: dict[str, int] = {}
    splits = {}
    for name, part in parts.items():
        if part is not None:
            splits[name] = MoleculeSplit(
                name,
                part.ids,
                part.smiles,
                part.texts,
                _labels(part.smiles, structures),
                _labels((text_key(text) for text in part.texts), texts),
                part.scaffolds,
                part.source,
            )
    return splits


def _labels(values: Iterable[str], seen: dict[str, int]) -> np.ndarray:
    return np.array([seen.setdefault(value, len(seen)) for value in values], dtype=np.int64)


def _unique(ids: Sequence[str]) -> tuple[list[str], int]:
    """Ids, with a suffix where one repeats, and the number of repeated ids."""
    taken = set(ids)
    seen: dict[str, int] = {}
    out = []
    for identity in ids:
        seen[identity] = seen.get(identity, 0) + 1
        name = identity
        while seen[identity] > 1 and name in taken:
            name = f"{identity}#{seen[identity]}"
            seen[identity] += name in taken
        taken.add(name)
        out.append(name)
    return out, len(ids) - len(set(ids))
