"""What a split needs to know of each structure: its canonical form, its scaffold group, or why it is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nearfar.data.cache import cached_arrays
from nearfar.systems.molecules.scaffold import scaffold_key
from nearfar.systems.molecules.smiles import canonical_smiles, parse_smiles, rdkit_version

__all__ = ["Structure", "examine_structures"]

_VERSION = 2  # part of the cache key


class Structure(NamedTuple):
    """``canonical`` and ``scaffold`` are empty where ``problem`` says why the SMILES is no molecule."""

    canonical: str
    scaffold: str
    problem: str


def examine_structures(smiles: Sequence[str], cache: bool = True) -> list[Structure]:
    """One `Structure` for each SMILES; kept in the cache by content, since parsing dominates a second run.

    >>> examine_structures(["OCC", "C1CC"], cache=False)
    [Structure(canonical='CCO', scaffold='chain:O', problem=''),
     Structure(canonical='', scaffold='', problem='SMILES syntax error: unclosed ring')]
    """
    key = ["structures", _VERSION, rdkit_version(), list(smiles)]

    def compute() -> dict[str, np.ndarray]:
        rows = ["\t".join(_examine(text)) for text in smiles]
        return {"rows": np.frombuffer("\n".join(rows).encode(), dtype=np.uint8)}

    if not smiles:
        return []
    packed = cached_arrays("molecule-structures", key, compute, cache)["rows"].tobytes().decode()
    return [Structure(*row.split("\t")) for row in packed.split("\n")]


def _examine(text: str) -> Structure:
    molecule, problem = parse_smiles(text)
    if molecule is None:
        return Structure("", "", " ".join(problem.split()))
    return Structure(canonical_smiles(molecule), scaffold_key(molecule), "")
