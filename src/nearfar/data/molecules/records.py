"""Molecule-text pairs of one source, checked row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nearfar.data.items import Items
from nearfar.data.molecules.smiles import examine_structures
from nearfar.data.molecules.structure_files import read_structures
from nearfar.data.tables import is_placeholder
from nearfar.errors import NearfarError

__all__ = ["COLUMNS", "is_ring", "pairs_of", "read_records", "scaffolds_of", "text_key"]

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


def pairs_of(
    ids: list[str], smiles: list[str], texts: list[str], scaffolds: list[str], source: str = "pairs"
) -> Items:
    """Molecules and texts as items: columns ``molecule`` (canonical SMILES) and ``text``; groups are scaffolds."""
    return Items(ids, {"molecule": smiles, "text": texts}, source, groups=scaffolds)


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
) -> Items:
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
    rejections = table.rejections
    ids = table["id"] if "id" in table else [f"row{row}" for row in table.rows]
    structures = examine_structures(table["smiles"], cache)
    pairs: dict[tuple[str, str], int] = {}
    used: list[int] = []
    texts: list[str] = []
    for position, row in enumerate(table.rows):
        raw, text, structure = (
            table["smiles"][position],
            " ".join(table["text"][position].split()),
            structures[position],
        )
        if not raw.strip() or (structure.problem and is_placeholder(raw)):
            rejections.add("empty SMILES", row, ids[position])
        elif not text:
            rejections.add("empty text", row, raw)
        elif is_placeholder(text):
            rejections.add("no text", row, raw, f"only {text!r}")
        elif structure.problem:
            rejections.add("unparsable SMILES", row, raw, structure.problem)
        elif (pair := (structure.canonical, text_key(text))) in pairs:
            detail = f"same structure and text as row {pairs[pair]}"
            rejections.add("repeated row", row, raw, detail)
        else:
            pairs[pair] = row
            used.append(position)
            texts.append(text)
    if not used:
        raise NearfarError(
            f"{path}: none of its {table.n_rows} rows is a molecule with a text; {rejections.summary()}."
        )
    names, repeated = _unique([ids[i].strip() or f"row{table.rows[i]}" for i in used])
    items = pairs_of(
        names,
        [structures[i].canonical for i in used],
        texts,
        [structures[i].scaffold for i in used],
        str(path),
    )
    items.rows = [table.rows[i] for i in used]
    items.rejections = rejections
    items.notes = {
        "path": str(path),
        "rows_in_file": table.n_rows,
        "rows_used": len(used),
        "columns": table.used,
        "ids_made_unique": repeated,
        "reading": table.notes,
    }
    return items


def text_key(text: str) -> str:
    """The key under which two texts count as the same: the words without letter case and blanks."""
    return " ".join(text.split()).casefold()


def scaffolds_of(items: Items) -> list[str]:
    """The scaffold of each item, as `scaffold_key` names it."""
    return [] if items.groups is None else [str(group) for group in items.groups]


def is_ring(scaffold: str) -> bool:
    """Whether a group of `scaffold_key` is a ring scaffold and not a pattern of a molecule without a ring."""
    return scaffold.startswith("ring:")


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
