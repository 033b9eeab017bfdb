"""Molecule-text pairs from files of structures, checked row by row: tables with SMILES, ``.smi`` lists, SDF."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from nearfar.data.cache import cached_arrays
from nearfar.data.delimited import decode, text_lines
from nearfar.data.items import Items
from nearfar.data.molecules.smiles import (
    canonical_smiles,
    examine_structures,
    parse_smiles,
    quiet_rdkit,
    rdkit_version,
    sanitization_problem,
)
from nearfar.data.rejections import Rejections
from nearfar.data.table_formats import JSON_SUFFIXES, PARQUET_SUFFIXES, content_of, full_suffix
from nearfar.data.tables import (
    TABLE_SUFFIXES,
    RawTable,
    Table,
    choose_columns,
    column_key,
    delimited_table,
    is_placeholder,
    open_table,
    require_file,
    unknown_suffix,
)
from nearfar.errors import NearfarError

__all__ = [
    "COLUMNS",
    "STRUCTURE_SUFFIXES",
    "is_headless",
    "is_ring",
    "pairs_of",
    "read_records",
    "read_structures",
    "scaffolds_of",
    "text_key",
]


_SMI_SUFFIXES = (".smi", ".smiles", ".ism", ".can", ".cxsmiles")
_SDF_SUFFIXES = (".sdf", ".sd")
STRUCTURE_SUFFIXES = TABLE_SUFFIXES + _SMI_SUFFIXES + _SDF_SUFFIXES
_REFUSED = (
    ".mol",
    ".mol2",
    ".pdb",
    ".cif",
    ".mmcif",
    ".cml",
    ".xyz",
    ".cdx",
    ".cdxml",
    ".rxn",
    ".rdf",
    ".inchi",
)
_LINE = re.compile(r"(\S+(?:\s+\|[^|]*\|)?)\s*(.*)")
_FIELD = re.compile(r">.*?<(.+)>")
_VERSION = 1  # of the reading of molfiles; part of the cache key


def read_structures(
    path: str | Path,
    columns: Mapping[str, Sequence[str]],
    overrides: Mapping[str, str | None],
    optional: Collection[str] = (),
    naming: str = "data.{name}_column=NAME",
    encoding: str | None = None,
    encoding_option: str = "",
) -> Table:
    """The wanted columns of a file of structures, among them ``smiles``; arguments as of `read_table`.

    A text file or a spreadsheet whose first line holds a molecule where a header would stand has no header: its columns
    are called 1, 2, …, and with two of them the one that is no SMILES is the text. Of an SDF the structure comes from
    the molfile, the other columns are its data fields and ``title line``.

    Raises:
        NearfarError: what `read_table` raises, a format that is not read, no header and more than two columns.
    """
    path = Path(path)
    require_file(path)
    suffix = full_suffix(path)

    def choose(header: Sequence[str]) -> dict[str, int]:
        return choose_columns(path, header, columns, overrides, optional, naming)

    if suffix in _REFUSED:
        raise NearfarError(
            f"{path}: {suffix} is not read. Convert it to .sdf or .smi, with RDKit or Open Babel "
            f"(obabel {path.name} -O {path.name.split('.')[0]}.sdf)."
        )
    if suffix in _SDF_SUFFIXES:
        raw = _read_sdf(path, decode(path, content_of(path), encoding, encoding_option))
        wanted = {**columns, "smiles": ("molfile",)}
        return raw.take(
            choose_columns(path, raw.header, wanted, overrides, optional, naming, "Its data fields are")
        )
    if suffix in _SMI_SUFFIXES:
        raw = _read_smi(path, decode(path, content_of(path), encoding, encoding_option), columns)
    elif suffix in TABLE_SUFFIXES:
        raw = open_table(path, encoding, encoding_option, lambda header: sorted(set(choose(header).values())))
        if suffix in JSON_SUFFIXES + PARQUET_SUFFIXES:
            return raw.take(choose(raw.header))
        if len(raw.header) == 1 and len(raw.header[0].split()) > 1 and _starts_a_list(raw.header[0], columns):
            raw = _read_smi(path, decode(path, content_of(path), encoding, encoding_option), columns)
    else:
        raise unknown_suffix(path, STRUCTURE_SUFFIXES)
    position = _molecule_in_header(raw, columns)
    if position is None:
        return raw.take(choose(raw.header))
    used = _numbered(raw, position, columns, overrides, optional, naming)
    bare = raw.without_header()
    words = [f"column {used[name] + 1} is the {word}" for name, word in _ROLES.items() if name in used]
    bare.notes.append(f"no header line: {', '.join(words)}")
    return bare.take(used)


def is_headless(
    path: Path, columns: Mapping[str, Sequence[str]], encoding: str | None = None, most: int = 1 << 24
) -> bool:
    """Whether a text table or spreadsheet has a molecule where a header would stand; not asked of files above ``most``
    bytes.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "pairs.csv"
    >>> _ = path.write_text("CCO,ethanol\\nCC,ethane\\n")
    >>> is_headless(path, {"smiles": ["smiles"], "text": ["name"]})
    True
    """
    suffix = full_suffix(path) if path.is_file() else ""
    if (
        suffix not in TABLE_SUFFIXES
        or suffix in JSON_SUFFIXES + PARQUET_SUFFIXES
        or path.stat().st_size > most
    ):
        return False
    raw = open_table(path, encoding, "--encoding")
    listed = len(raw.header) == 1 and len(raw.header[0].split()) > 1
    return _molecule_in_header(raw, columns) is not None or (
        listed and parse_smiles(raw.header[0].split()[0])[0] is not None
    )


_ROLES = {"smiles": "structure", "text": "text", "id": "id"}


def _is_header(name: str, columns: Mapping[str, Sequence[str]]) -> bool:
    known = {column_key(alias) for aliases in columns.values() for alias in aliases if not alias.isdigit()}
    return column_key(name) in known


def _starts_a_list(line: str, columns: Mapping[str, Sequence[str]]) -> bool:
    """Whether a line is ``SMILES name``, as a header or with a molecule in its place."""
    first = line.split()[0]
    return (
        column_key(first) in {column_key(a) for a in columns["smiles"]} or parse_smiles(first)[0] is not None
    )


def _molecule_in_header(raw: RawTable, columns: Mapping[str, Sequence[str]]) -> int | None:
    """The column whose header is a molecule like the values below it, where no header has a usual name."""
    if any(_is_header(name, columns) for name in raw.header):
        return None
    for position, name in enumerate(raw.header):
        if parse_smiles(name)[0] is not None:
            below = [row[position] for row in raw.rows[:50]]
            if sum(parse_smiles(value)[0] is not None for value in below) >= 0.8 * len(below):
                return position
    return None


def _numbered(
    raw: RawTable,
    molecule: int,
    columns: Mapping[str, Sequence[str]],
    overrides: Mapping[str, str | None],
    optional: Collection[str],
    naming: str,
) -> dict[str, int]:
    """Which column is what in a file without a header."""
    shown = ", ".join(f"{i + 1} {name!r}" for i, name in enumerate(raw.header[:8]))
    bare = f"{raw.path} has no header line: its first line is {shown}"
    used = {"smiles": molecule}
    others = [i for i in range(len(raw.header)) if i != molecule]
    if len(others) == 1:
        used["text"] = others[0]
    for name in columns:
        given = overrides.get(name)
        if given is None:
            continue
        if not given.isdigit() or not 1 <= int(given) <= len(raw.header):
            option = naming.format(name=name)
            raise NearfarError(
                f"{bare}. {option.replace('NAME', given)} is no column of it: leave the option out, or give "
                f"the number of a column, such as {option.replace('NAME', str(used.get(name, 0) + 1))}."
            )
        used[name] = int(given) - 1
    if "text" not in used and "text" not in optional:
        if not others:
            raise NearfarError(f"{bare}, and no text beside it. A second column with the texts is needed.")
        longest = max(others, key=lambda i: sum(len(row[i]) for row in [raw.header, *raw.rows[:100]]))
        option = naming.format(name="text").replace("NAME", str(longest + 1))
        raise NearfarError(f"{bare}. Give the number of the column with the texts, such as {option}.")
    return used


# -- lists of SMILES -----------------------------------------------------------------------------------------
def _read_smi(path: Path, text: str, columns: Mapping[str, Sequence[str]]) -> RawTable:
    """Lines of a SMILES, a blank or tab, and a name; with or without a header line.

    The first line is the header of the table that comes back, whatever it holds: see `_molecule_in_header`.
    """
    lines = text_lines(text)
    rejections = Rejections()
    numbered = []
    for number, line in enumerate(lines, start=1):
        if line.lstrip().startswith("#") and not _is_header(line.split()[0], columns):
            rejections.add("comment line", number, line)
        elif not line.strip():
            rejections.add("blank line", number)
        else:
            numbered.append((number, line))
    if not numbered:
        raise NearfarError(f"{path} holds nothing but blank lines.")
    header_line, first = numbered[0]
    if "\t" in first or ("," in first and parse_smiles(first.split()[0])[0] is None):
        return delimited_table(path, text, ".tsv")
    head = first.split()
    named = _is_header(head[0], columns)
    width = len(head) if named else 1 + any(_LINE.fullmatch(line.strip())[2] for _, line in numbered)  # type: ignore[index]
    rows = []
    for _, content in numbered:
        match = _LINE.fullmatch(content.strip())
        assert match is not None
        rest = match[2].split(None, width - 2) if width > 1 else []
        rows.append([match[1], *rest, *[""] * (width - 1 - len(rest))])
    header = head if named else rows[0]
    numbers = [number for number, _ in numbered[1:]]
    n_rows = len(numbers) + len(rejections)
    return RawTable(path, header, rows[1:], numbers, n_rows, header_line, rejections)


# -- SDF -----------------------------------------------------------------------------------------------------
def _read_sdf(path: Path, text: str) -> RawTable:
    """The records of an SDF: canonical SMILES by RDKit, data fields, title line; numbered from 1."""
    records: list[list[str]] = [[]]
    for line in text_lines(text):
        if line.startswith("$$$$"):
            records.append([])
        else:
            records[-1].append(line)
    if not any(line.strip() for line in records[-1]):
        records.pop()
        cut = False
    else:  # without $$$$: whole, if a blank line ends its last data field
        after = text[len(text.rstrip()) :].replace("\r\n", "\n")
        cut = any(_FIELD.match(line) for line in records[-1]) and len(re.findall(r"[\r\n]", after)) < 2
    if not records:
        raise NearfarError(f"{path} holds no record: each ends with a line $$$$.")
    blocks, fields = zip(*(_parts(record) for record in records), strict=True)
    header = ["molfile", *dict.fromkeys(name for each in fields for name in each), "title line"]
    rejections = Rejections()
    rows, numbers = [], []
    for number, (record, values, (smiles, problem)) in enumerate(
        zip(records, fields, _molfiles(blocks), strict=True), start=1
    ):
        title = record[0].strip() if record else ""
        if cut and number == len(records):
            rejections.add("record cut off", number, title, "the file ends inside a data field")
            continue
        if problem:
            rejections.add("unreadable molfile", number, title, problem)
            continue
        rows.append([smiles, *(values.get(name, "") for name in header[1:-1]), title])
        numbers.append(number)
    return RawTable(path, header, rows, numbers, len(records), 0, rejections)


def _parts(record: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The molfile of a record, and its data fields; a text with blank lines stays whole."""
    end = next((i for i, line in enumerate(record) if line.startswith("M  END")), None)
    start = next((i for i, line in enumerate(record) if _FIELD.match(line)), len(record))
    values: dict[str, list[str]] = {}
    name = ""
    for line in record[start if end is None else end + 1 :]:
        if match := _FIELD.match(line):
            name = match[1]
            values[name] = []
        elif name:
            values[name].append(line)
    block = record[: start if end is None else end + 1]
    return "\n".join(block), {name: "\n".join(lines).strip() for name, lines in values.items()}


def _molfiles(blocks: Sequence[str]) -> list[tuple[str, str]]:
    """The canonical SMILES of each molfile, or why there is none; kept in the cache by content."""

    def compute() -> dict[str, np.ndarray]:
        rows = "\n".join("\t".join(_examine_molfile(block)) for block in blocks)
        return {"rows": np.frombuffer(rows.encode(), dtype=np.uint8)}

    key = ["molfiles", _VERSION, rdkit_version(), list(blocks)]
    packed = cached_arrays("molfiles", key, compute)["rows"].tobytes().decode()
    return [(smiles, problem) for smiles, problem in (row.split("\t") for row in packed.split("\n"))]


def _examine_molfile(block: str) -> tuple[str, str]:
    from rdkit import Chem

    with quiet_rdkit():
        molecule = Chem.MolFromMolBlock(block)
        if molecule is not None:
            return (canonical_smiles(molecule), "") if molecule.GetNumAtoms() else ("", "no atoms")
        raw = Chem.MolFromMolBlock(block, sanitize=False)
    problem = "no molfile that RDKit can read" if raw is None else sanitization_problem(raw)
    return "", " ".join(problem.split())


COLUMNS: Mapping[str, Sequence[str]] = {
    "smiles": ("smiles", "canonical_smiles", "isomeric_smiles", "mol", "structure", "inchi", "molecule"),
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
