"""Molecule-text pairs: from files, from the pairs that come with the package, named molecules; and their splits."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from nearfar.data.cache import cached_arrays
from nearfar.data.files import Json
from nearfar.data.items import Items
from nearfar.data.molecules.smiles import (
    assign_groups,
    canonical_smiles,
    parse_smiles,
    rdkit_version,
    scaffold_key,
)
from nearfar.data.molecules.structure_files import is_ring, pairs_of, read_records, scaffolds_of, text_key
from nearfar.data.rejections import Rejections
from nearfar.data.splits import check_disjoint
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "MoleculeData",
    "describe",
    "embedded_records",
    "is_name",
    "load_embedded",
    "load_files",
]


_CAS = re.compile(r"\d{2,7}-\d{2}-\d")
_ANNOTATION = re.compile(r"\s*[\[(](?:(?:\d+ci,?\s*)+|usan|inn|ban|jan|nf|usp|iso|mi|hsdb|mart\.?|van)[\])]")
_WORD = re.compile(r"[a-z]{3,}")
# A few letters and a number, a long hexadecimal number, an InChIKey, a ten-letter substance code.
_CODE = re.compile(
    r"[a-z]{1,8}[- ]?\d{3,}[\w-]*|[0-9a-f]{8}-[0-9a-f-]+|.*[a-z]{14}-[a-z]{10}-[a-z]|"
    r"(?=(?:\D*\d){2})[a-z0-9]{8,12}"
)
_FORMULA = re.compile(r"(?:[a-z]{1,2}\d+){2,}[a-z0-9.+-]*")
# Prefixes of registries and vendors, whose entries look like words with a number.
_REGISTRY = re.compile(
    r"(?:agn-pc|einecs|elincs|unii|zinc|chebi|chembl|mfcd|nsc|brn|hsdb|ccris|caswell|epa pesticide|ai3|"
    r"dtxsid|schembl|drugbank|hmdb|kegg|pubchem|molport|stk|ctk|ac1|gtpl|bidd|lmfa|smr|ncgc|cpd|sbb|wln|ec |"
    r"un |tox21|bspbio|spectrum|prestwick|kbio|divk|inchi|aids|oprea|cambridge|maybridge|mls|albb|akos|bas |"
    r"cas[- ]|usaf|fema|ins no|e number|sdccgmls|upcmld|doi)[\s:#.-]*[\w./-]*\d[\w./:-]*"
)


def is_name(text: str, formula: str = "", smiles: str = "") -> bool:
    """Whether ``text`` is a name made of words and not a number, a code or a notation of the structure.

    >>> [is_name(t) for t in ("behenic acid", "112-85-6", "agn-pc-02k8uy", "nsc 32364", "c8h17o2", "l639")]
    [True, False, False, False, False, False]
    """
    lower = text.strip().lower()
    if not _WORD.search(lower) or ";" in lower or _CAS.search(lower) or len(lower) > 250:
        return False
    if lower in (formula.lower(), smiles.lower()) or _FORMULA.fullmatch(lower):
        return False
    if "=" in lower or lower.startswith("rcra "):  # a condensed formula, a waste number
        return False
    if _CODE.fullmatch(lower) or _REGISTRY.match(lower):
        return False
    letters = sum(character.isalpha() for character in lower)
    return letters >= len(lower) / 3


def describe(names: Sequence[str], formula: str = "", smiles: str = "", synonyms: int = 4) -> str:
    """A sentence from the names of one compound, the systematic one first; empty if none is a name.

    Names that differ in punctuation or word order alone count as one. At most ``synonyms`` follow the first.

    >>> describe(["docosanoic acid", "behenic acid", "112-85-6", "docosanoic  acid", "n-docosanoic acid"])
    'Docosanoic acid, also known as behenic acid; n-docosanoic acid.'
    """
    chosen: list[str] = []
    seen: set[str] = set()
    for position, raw in enumerate(names):
        # Only a systematic name may hold semicolons: it lists the parts of a salt.
        name = _clean(raw.replace(";", " and ") if position == 0 else raw)
        key = "".join(sorted(character for character in name if character.isalnum()))
        if is_name(name, formula, smiles) and key not in seen:
            seen.add(key)
            chosen.append(name)
        if len(chosen) > synonyms:
            break
    if not chosen:
        return ""
    first = chosen[0][:1].upper() + chosen[0][1:]
    return first + (", also known as " + "; ".join(chosen[1:]) if chosen[1:] else "") + "."


def _clean(name: str) -> str:
    """Lower case, without registry remarks; Greek letters written ``.alpha.`` lose their dots."""
    name = _ANNOTATION.sub("", name.strip().lower())
    name = re.sub(r"\.(alpha|beta|gamma|delta|omega|epsilon)\.", r"\1", name)
    return " ".join(name.split())


_VERSION = 1  # of the selection and of the texts; part of the cache key
_FILE = "Identifiers/chemical identifiers pubchem large.tsv"
_SMALLEST, _LARGEST = 4, 100  # heavy atoms
_FIELDS = ("ids", "smiles", "texts", "scaffolds")


def embedded_records(n: int | None = None, seed: int = 0, synonyms: int = 4, cache: bool = True) -> Items:
    """``n`` compounds (``None``: all usable ones), drawn in an order that ``seed`` fixes.

    Left out, and counted: no carbon, fewer than 4 or more than 100 heavy atoms, no name made of words, the
    same structure as an earlier compound, a structure that RDKit cannot parse.

    Raises:
        NearfarError: the package ``chemicals`` is missing, or it has fewer than ``n`` usable compounds.
    """
    path = _path()
    if n is not None and n < 10:
        raise NearfarError(f"The embedded set needs at least 10 molecules to be split, got {n}.")
    size = path.stat().st_size
    key = ["embedded molecules", _VERSION, rdkit_version(), size, n, seed, synonyms, _SMALLEST, _LARGEST]
    arrays = cached_arrays("molecule-sets", key, lambda: _pack(_select(path, n, seed, synonyms)), cache)
    records = _unpack(arrays)
    if n is not None and len(records) < n:
        raise NearfarError(
            f"The embedded set has {len(records)} usable molecules, fewer than {n}; "
            "data.embedded_size=null takes them all."
        )
    return records


def _path() -> Path:
    spec = importlib.util.find_spec("chemicals")  # importing the package would cost seconds
    path = Path(spec.origin).parent / _FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise NearfarError(
            "The embedded molecules come with the package chemicals, which is not installed: "
            "pip install 'nearfar[molecules]', or give files of your own with data.train=FILE."
        )
    return path


@dataclass(frozen=True)
class _Chosen:
    """The compounds that are taken, a list of texts for each of ``_FIELDS``, and what is said of their choice."""

    columns: dict[str, list[str]]
    source: str
    notes: dict[str, int]
    rejections: Json


def _select(path: Path, n: int | None, seed: int, synonyms: int) -> _Chosen:
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    order = np.random.default_rng(seed).permutation(len(lines))
    columns: dict[str, list[str]] = {name: [] for name in _FIELDS}
    rejections = Rejections()
    structures: set[str] = set()
    examined = 0
    for position in order.tolist():
        if n is not None and len(columns["ids"]) == n:
            break
        examined += 1
        fields = lines[position].split("\t")
        if (compound := _usable(fields, structures, position + 1, synonyms, rejections)) is not None:
            for name, value in zip(_FIELDS, compound, strict=True):
                columns[name].append(value)
    notes = {"compounds_in_package": len(lines), "compounds_examined": examined, "seed": seed}
    return _Chosen(columns, "chemicals: " + path.name, notes, rejections.as_dict())


def _usable(
    fields: Sequence[str], structures: set[str], row: int, synonyms: int, rejections: Rejections
) -> tuple[str, str, str, str] | None:
    """Id, canonical SMILES, text and scaffold of a compound; None where it is left out, which is counted."""
    if len(fields) < 9:
        rejections.add("wrong number of fields", row, "\t".join(fields))
        return None
    identity, _cas, formula, _mass, smiles, _inchi, inchikey, *names = fields
    molecule, reason = parse_smiles(smiles)
    if molecule is None:
        rejections.add("unparsable SMILES", row, smiles, reason)
        return None
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    heavy = sum(number > 1 for number in numbers)
    if 6 not in numbers:
        rejections.add("no carbon atom", row, smiles)
    elif heavy < _SMALLEST:
        rejections.add(f"fewer than {_SMALLEST} heavy atoms", row, smiles)
    elif heavy > _LARGEST:
        rejections.add(f"more than {_LARGEST} heavy atoms", row, smiles)
    elif not (text := describe(names, formula, smiles, synonyms)):
        rejections.add("no name made of words", row, smiles, "; ".join(names[:4]))
    elif inchikey in structures:
        rejections.add("structure seen before (InChIKey)", row, smiles, inchikey)
    elif (canonical := canonical_smiles(molecule)) in structures:
        rejections.add("structure seen before (canonical SMILES)", row, smiles, canonical)
    else:
        structures.update((inchikey, canonical))
        return identity, canonical, text, scaffold_key(molecule)
    return None


def _pack(chosen: _Chosen) -> dict[str, np.ndarray]:
    extra = {"source": chosen.source, "notes": chosen.notes, "rejections": chosen.rejections}
    arrays = {name: _bytes("\n".join(chosen.columns[name])) for name in _FIELDS}
    return arrays | {"extra": _bytes(json.dumps(extra))}


def _unpack(arrays: dict[str, np.ndarray]) -> Items:
    extra: Json = json.loads(arrays["extra"].tobytes())
    ids, smiles, texts, scaffolds = (arrays[name].tobytes().decode().split("\n") for name in _FIELDS)
    items = pairs_of(ids, smiles, texts, scaffolds, extra["source"])
    items.rejections = Rejections.from_dict(extra["rejections"])
    items.notes = extra["notes"]
    return items


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


HoldOut = Literal["scaffold", "random"]


@dataclass(frozen=True)
class MoleculeData:
    """The splits of one experiment (train, and val and test as far as there are), their sources, and leaks."""

    splits: dict[str, Items]
    sources: list[Json]
    notes: dict[str, str] = field(default_factory=dict)
    leaks: dict[str, Json] = field(default_factory=dict)

    def layout(self) -> dict[str, object]:
        """The content of ``dataset_layout.json``: sources with rejections, counts, hashes, leaks."""
        return {
            "system": "molecules",
            "sources": self.sources,
            "splits": {name: _counts(split) for name, split in self.splits.items()},
            "notes": self.notes,
            "shared_scaffolds": _shared_scaffolds(self.splits),
            "leaks": self.leaks,
        }

    def summary(self) -> str:
        """A few lines for a log: pairs of each split, rows that were rejected, leaks between splits."""
        lines = []
        for name, split in self.splits.items():
            counts = _counts(split)
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
                shared = ", ".join(f"{counts['shared']} {what}s" for what, counts in leak.items())
                lines.append(f"split leak: {pair.replace('/', ' and ')} share {shared}")
        return "\n".join(lines)


def _counts(split: Items) -> dict[str, object]:
    """Counts of a split for ``dataset_layout.json``."""
    rings = [key for key in scaffolds_of(split) if is_ring(key)]
    return {
        "source": split.source,
        "rows": len(split),
        "split_hash": split.hash,
        "structures": len(set(split["molecule"])),
        "texts": len({text_key(text) for text in split.texts("text")}),
        "scaffolds": len(set(rings)),
        "rows_without_ring": len(split) - len(rings),
    }


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
    split = assign_groups(scaffolds_of(records), fractions, seed)
    parts = {
        name: records.take(np.flatnonzero(split == code))
        for code, name in enumerate(("train", "val", "test"))
    }
    for name, part in parts.items():
        if not len(part):
            raise NearfarError(
                f"The embedded set of {len(records)} molecules leaves the {name} split empty at fractions "
                f"{fractions}: raise data.embedded_size or the fraction."
            )
    notes = {
        "split": f"by Bemis–Murcko scaffold (acyclic molecules by functional pattern), seed {seed}, "
        f"val {fractions[0]:g} and test {fractions[1]:g} of the rows",
        "texts": f"at most {1 + synonyms} names of the compound; no registry numbers, formula or SMILES",
    }
    return _assemble(parts, [_source_layout(records)], notes, on_leak="error")


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
            there is none, and the layout notes it.
        smiles_column, text_column, id_column: headers, where the usual ones do not fit. Without ids a row is
            named after its line. In a file without a header line they are numbers of columns.
        encoding: of text files; null: UTF-8, or UTF-16 with its mark.
        val_fraction, val_split: how much of train is held out, and whether by whole scaffolds (harder, and
            nearer to new chemistry) or at random (nearer to a random test file).
        on_leak: what to do if two splits share a structure: count (in ``layout`` and ``summary``), or raise.
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
    return _assemble(
        {name: read[name] for name in ("train", "val", "test") if name in read}, sources, notes, on_leak
    )


def _hold_out(records: Items, fraction: float, how: HoldOut, seed: int) -> tuple[Items, Items]:
    # A random hold-out, too, moves all rows of one structure together: else val would repeat train.
    keys = scaffolds_of(records) if how == "scaffold" else records.texts("molecule")
    held_out = assign_groups(keys, (fraction, 0.0), seed) == 1
    if held_out.all() or not held_out.any():
        raise NearfarError(
            f"{records.source}: {len(records)} rows in {len(set(keys))} groups leave no validation split at "
            f"data.val_fraction={fraction:g}. Give a file with data.val=, raise data.val_fraction or set "
            "data.val_split=random."
        )
    return records.take(np.flatnonzero(~held_out)), records.take(np.flatnonzero(held_out))


def _assemble(
    splits: dict[str, Items],
    sources: list[dict[str, object]],
    notes: dict[str, str],
    on_leak: Literal["count", "error"],
) -> MoleculeData:
    leaks: dict[str, Json] = {}
    checks = {
        "id": {name: split.ids for name, split in splits.items()},
        "structure": {name: split.texts("molecule") for name, split in splits.items()},
        "text": {name: split.texts("text") for name, split in splits.items()},
    }
    for what, values in checks.items():
        # Two compounds may share a text, and files without an id column number their rows alike: only shared
        # structures are a leak that may stop a run.
        stop = on_leak if what == "structure" else "count"
        for pair, leak in check_disjoint(values, what, on_leak=stop).items():
            leaks.setdefault(pair, {})[what] = leak
    return MoleculeData(splits, sources, notes, leaks)


def _source_layout(records: Items) -> dict[str, object]:
    return {"source": records.source, **records.notes, "rejections": records.rejections.as_dict()}


def _shared_scaffolds(splits: Mapping[str, Items]) -> dict[str, int]:
    """For each split beside train: its rows whose ring scaffold is also in train."""
    known = {key for key in scaffolds_of(splits["train"]) if is_ring(key)}
    return {
        name: sum(key in known for key in scaffolds_of(split))
        for name, split in splits.items()
        if name != "train"
    }
