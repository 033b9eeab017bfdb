"""Splits by scaffold: no ring system of the test set has been seen in training.

Molecules with rings are grouped by their Bemis–Murcko scaffold (Bemis and Murcko, 1996). Acyclic molecules
have none; they are grouped by their functional pattern, so that a homologous series (butanoic acid, pentanoic
acid, …) stays on one side. Whole groups go to train, val or test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from nearfar.errors import NearfarError
from nearfar.systems.molecules.smiles import quiet_rdkit

__all__ = ["assign_groups", "scaffold_key"]


def scaffold_key(molecule: Any) -> str:
    """The group of a molecule: ``ring:SCAFFOLD``, or ``chain:PATTERN`` if it has no ring.

    Of a salt or mixture the largest ring-bearing scaffold counts, so that a drug and its salt with another
    ring stay together. Stereochemistry plays no part.

    >>> from rdkit import Chem
    >>> [scaffold_key(Chem.MolFromSmiles(smiles)) for smiles in ("CC(=O)Oc1ccccc1C(=O)O", "CCCC(=O)O")]
    ['ring:c1ccccc1', 'chain:COO']
    """
    from rdkit.Chem.Scaffolds import MurckoScaffold

    if molecule.GetRingInfo().NumRings():
        with quiet_rdkit():
            scaffold = MurckoScaffold.MurckoScaffoldSmiles(mol=molecule, includeChirality=False)
        if scaffold:
            return "ring:" + max(scaffold.split("."), key=lambda part: (len(part), part))
    return "chain:" + _functional_pattern(molecule)


def _functional_pattern(molecule: Any) -> str:
    """Heteroatoms and unsaturated carbons, counted up to 3 of each kind; saturated carbon does not matter.

    >>> from rdkit import Chem
    >>> _functional_pattern(Chem.MolFromSmiles("CCCCCC")), _functional_pattern(Chem.MolFromSmiles("C=CCBr"))
    ('alkane', 'BrCC')
    """
    counts: dict[str, int] = {}
    for atom in molecule.GetAtoms():
        if atom.GetSymbol() != "C" or str(atom.GetHybridization()) in ("SP", "SP2"):
            counts[atom.GetSymbol()] = min(3, counts.get(atom.GetSymbol(), 0) + 1)
    return "".join(symbol * counts[symbol] for symbol in sorted(counts)) or "alkane"


def assign_groups(
    keys: Sequence[str],
    fractions: tuple[float, float] = (0.1, 0.1),
    seed: int = 0,
    largest: float = 0.1,
) -> Int[np.ndarray, " n"]:
    """Assign whole groups of equal keys to train (0), val (1) and test (2).

    Args:
        keys: the group of each item.
        fractions: shares of val and test wanted; the rest is train.
        seed: groups are taken in an order drawn from it (it does not depend on the order of the items).
        largest: groups larger than this share of val (or test) enter it last, and only while there is room,
            so that one benzene scaffold does not become the whole test set.

    The shares are met as nearly as whole groups allow and never passed, except that a wanted split gets at
    least one group (the smallest), if that leaves train another.

    >>> assign_groups(["a", "a", "b", "c"], fractions=(0.0, 0.5), largest=1.0).tolist()
    [0, 0, 2, 2]
    """
    val, test = fractions
    if min(val, test) < 0 or val + test >= 1:
        raise NearfarError(f"Shares of val and test must be ≥ 0 and leave a train set; got {val} and {test}.")
    names, group = np.unique(np.asarray(keys, dtype=object).astype(str), return_inverse=True)
    sizes = np.bincount(group, minlength=len(names))
    order = sorted(range(len(names)), key=lambda g: hashlib.sha256(f"{seed} {names[g]}".encode()).digest())
    split_of_group = np.zeros(len(names), dtype=np.int64)
    targets = {code: share * len(keys) for code, share in ((1, val), (2, test)) if share > 0}
    filled = dict.fromkeys(targets, 0)

    def put(g: int, code: int) -> None:
        split_of_group[g] = code
        filled[code] += sizes[g]

    def room(g: int, limit: float) -> int:
        """The split that is furthest from its target among those that can take group g; 0: none."""
        able = [
            code
            for code, target in targets.items()
            if filled[code] + sizes[g] <= target + 0.5 and sizes[g] <= max(1.0, limit * target)
        ]
        return max(able, key=lambda code: (1 - filled[code] / targets[code], code), default=0)

    by_size = sorted(order, key=lambda g: sizes[g])  # stable: equal sizes stay in the drawn order
    for candidates, limit in ((order, largest), (by_size, 1.0)):
        for g in candidates:
            if split_of_group[g] == 0 and (code := room(g, limit)):
                put(g, code)
    for code in targets:
        rest = [g for g in by_size if split_of_group[g] == 0]
        if filled[code] == 0 and len(rest) > 1:
            put(rest[0], code)
    return split_of_group[group]
