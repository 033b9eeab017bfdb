"""The embedded set: 71,347 real compounds with their names, out of the package ``chemicals`` (MIT).

It needs no download. Each compound becomes a pair: its structure, and a sentence made of its names. That is
an easier text than curated prose, and a systematic name determines the structure: results on this set say how
well names find molecules, not how well descriptions do.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.data.cache import cached_arrays
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError
from nearfar.systems.molecules.names import describe
from nearfar.systems.molecules.records import Records
from nearfar.systems.molecules.scaffold import scaffold_key
from nearfar.systems.molecules.smiles import canonical_smiles, parse_smiles, rdkit_version

__all__ = ["embedded_records"]

_VERSION = 1  # of the selection and of the texts; part of the cache key
_FILE = "Identifiers/chemical identifiers pubchem large.tsv"
_SMALLEST, _LARGEST = 4, 100  # heavy atoms
_FIELDS = ("ids", "smiles", "texts", "scaffolds")


def embedded_records(n: int | None = None, seed: int = 0, synonyms: int = 4, cache: bool = True) -> Records:
    """``n`` compounds (``None``: all usable ones), drawn in an order that ``seed`` fixes.

    Left out, and counted: no carbon, fewer than 4 or more than 100 heavy atoms, no name made of words, the
    same structure as an earlier compound, a structure that RDKit cannot parse.

    Raises:
        NearfarError: the package ``chemicals`` is missing, or it has fewer than ``n`` usable compounds.
    """
    path = _path()
    if n is not None and n < 10:
        raise NearfarError(f"The embedded set needs at least 10 molecules to be split, {n} were asked for.")
    size = path.stat().st_size
    key = ["embedded molecules", _VERSION, rdkit_version(), size, n, seed, synonyms, _SMALLEST, _LARGEST]
    arrays = cached_arrays("molecule-sets", key, lambda: _pack(_select(path, n, seed, synonyms)), cache)
    records = _unpack(arrays)
    if n is not None and len(records) < n:
        raise NearfarError(
            f"The embedded set has {len(records)} usable molecules, {n} were asked for; "
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


def _select(path: Path, n: int | None, seed: int, synonyms: int) -> Records:
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    order = np.random.default_rng(seed).permutation(len(lines))
    records = Records("chemicals: " + path.name)
    structures: set[str] = set()
    examined = 0
    for position in order.tolist():
        if n is not None and len(records) == n:
            break
        examined += 1
        fields = lines[position].split("\t")
        _consider(records, structures, position + 1, fields, synonyms)
    records.notes = {"compounds_in_package": len(lines), "compounds_examined": examined, "seed": seed}
    return records


def _consider(records: Records, structures: set[str], row: int, fields: Sequence[str], synonyms: int) -> None:
    """Add one compound, or count why not."""
    rejections: Rejections = records.rejections
    if len(fields) < 9:
        rejections.add("wrong number of fields", row, "\t".join(fields))
        return
    identity, _cas, formula, _mass, smiles, _inchi, inchikey, *names = fields
    molecule, reason = parse_smiles(smiles)
    if molecule is None:
        rejections.add("unparsable SMILES", row, smiles, reason)
        return
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
        records.add(identity, canonical, text, scaffold_key(molecule))


def _pack(records: Records) -> dict[str, np.ndarray]:
    extra = {
        "source": records.source,
        "notes": records.notes,
        "rejections": records.rejections.as_dict(),
    }
    arrays = {name: _bytes("\n".join(getattr(records, name))) for name in _FIELDS}
    return arrays | {"extra": _bytes(json.dumps(extra))}


def _unpack(arrays: dict[str, np.ndarray]) -> Records:
    extra: dict[str, Any] = json.loads(arrays["extra"].tobytes())
    columns = {name: arrays[name].tobytes().decode().split("\n") for name in _FIELDS}
    return Records(
        extra["source"],
        **columns,
        rejections=Rejections.from_dict(extra["rejections"]),
        notes=extra["notes"],
    )


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)
