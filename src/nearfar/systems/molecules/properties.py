"""What names speak of beside substructures: elements, charges, rings, stereo labels, all as counts.

Circular fingerprints see neighbourhoods and miss totals: how many carbons, which net charge, how many
centres are R.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import UInt8

__all__ = ["PROPERTY_NAMES", "functional_group_names", "functional_groups", "molecule_properties"]

_ELEMENTS = (6, 7, 8, 16, 15, 9, 17, 35, 53, 5, 14, 33, 34)
_RINGS = (3, 4, 5, 6, 7, 8)
PROPERTY_NAMES: tuple[str, ...] = (
    *(f"atoms of element {number}" for number in _ELEMENTS),
    "atoms of other elements",
    "hydrogens",
    "heavy atoms",
    "isotope labels",
    "radical electrons",
    "pieces",
    "positive atoms",
    "negative atoms",
    "net positive charge",
    "net negative charge",
    *(f"rings of {size}" for size in _RINGS),
    "larger rings",
    "rings",
    "aromatic rings",
    "aromatic heterocycles",
    "aliphatic rings",
    "spiro atoms",
    "bridgehead atoms",
    "R centres",
    "S centres",
    "stereo centres",
    "E double bonds",
    "Z double bonds",
    "single bonds",
    "double bonds",
    "triple bonds",
    "rotatable bonds",
    "hydrogen-bond donors",
    "hydrogen-bond acceptors",
    "mass / 10",
    "polar surface / 4",
    "10 · logP, where positive",
    "-10 · logP, where negative",
    "100 · share of sp3 carbon",
)
"""What each number of `molecule_properties` counts."""


def molecule_properties(molecule: Any) -> UInt8[np.ndarray, " properties"]:
    """The properties of an RDKit molecule as whole numbers, cut at 0 and 255.

    >>> from rdkit import Chem
    >>> values = molecule_properties(Chem.MolFromSmiles("N[C@@H](C)C(=O)[O-]"))
    >>> found = dict(zip(PROPERTY_NAMES, values.tolist(), strict=True))
    >>> [found[name] for name in ("atoms of element 6", "hydrogens", "net negative charge", "S centres")]
    [3, 6, 1, 1]
    """
    from rdkit import Chem
    from rdkit.Chem import rdMolDescriptors

    atoms = list(molecule.GetAtoms())
    elements = Counter(atom.GetAtomicNum() for atom in atoms)
    charges = [atom.GetFormalCharge() for atom in atoms]
    rings = Counter(len(ring) for ring in molecule.GetRingInfo().AtomRings())
    labels = Counter(atom.GetProp("_CIPCode") for atom in atoms if atom.HasProp("_CIPCode"))
    # SMILES reading marks double bonds E or Z; CIS and TRANS come from other readers.
    stereo = Counter(bond.GetStereo() for bond in molecule.GetBonds())
    bonds = Counter(bond.GetBondType() for bond in molecule.GetBonds())
    log_p = rdMolDescriptors.CalcCrippenDescriptors(molecule)[0]
    values = [
        *(elements[number] for number in _ELEMENTS),
        sum(count for number, count in elements.items() if number not in _ELEMENTS and number != 1),
        elements[1] + sum(atom.GetTotalNumHs() for atom in atoms),
        molecule.GetNumHeavyAtoms(),
        sum(atom.GetIsotope() > 0 for atom in atoms),
        sum(atom.GetNumRadicalElectrons() for atom in atoms),
        len(Chem.GetMolFrags(molecule)),
        sum(charge > 0 for charge in charges),
        sum(charge < 0 for charge in charges),
        max(sum(charges), 0),
        max(-sum(charges), 0),
        *(rings[size] for size in _RINGS),
        sum(count for size, count in rings.items() if size > _RINGS[-1]),
        sum(rings.values()),
        rdMolDescriptors.CalcNumAromaticRings(molecule),
        rdMolDescriptors.CalcNumAromaticHeterocycles(molecule),
        rdMolDescriptors.CalcNumAliphaticRings(molecule),
        rdMolDescriptors.CalcNumSpiroAtoms(molecule),
        rdMolDescriptors.CalcNumBridgeheadAtoms(molecule),
        labels["R"],
        labels["S"],
        sum(atom.GetChiralTag() != Chem.ChiralType.CHI_UNSPECIFIED for atom in atoms),
        stereo[Chem.BondStereo.STEREOE],
        stereo[Chem.BondStereo.STEREOZ],
        bonds[Chem.BondType.SINGLE],
        bonds[Chem.BondType.DOUBLE],
        bonds[Chem.BondType.TRIPLE],
        rdMolDescriptors.CalcNumRotatableBonds(molecule),
        rdMolDescriptors.CalcNumHBD(molecule),
        rdMolDescriptors.CalcNumHBA(molecule),
        rdMolDescriptors.CalcExactMolWt(molecule) / 10,
        rdMolDescriptors.CalcTPSA(molecule) / 4,
        10 * log_p,
        -10 * log_p,
        100 * rdMolDescriptors.CalcFractionCSP3(molecule),
    ]
    return np.clip(np.rint(np.nan_to_num(values)), 0, 255).astype(np.uint8)


def functional_group_names() -> tuple[str, ...]:
    """What each number of `functional_groups` counts, by RDKit's names ("fr_ester", "fr_phenol", …)."""
    return tuple(_group_counters())


def functional_groups(molecule: Any) -> UInt8[np.ndarray, " groups"]:
    """How often each of RDKit's 85 functional groups occurs in a molecule, cut at 255.

    >>> from rdkit import Chem
    >>> counts = functional_groups(Chem.MolFromSmiles("COC(=O)c1ccccc1O"))
    >>> found = dict(zip(functional_group_names(), counts.tolist(), strict=True))
    >>> [found[name] for name in ("fr_ester", "fr_phenol", "fr_nitro")]
    [1, 1, 0]
    """
    counts = [count(molecule) for count in _group_counters().values()]
    return np.minimum(np.array(counts), 255).astype(np.uint8)


@cache
def _group_counters() -> dict[str, Callable[[Any], int]]:
    from rdkit.Chem import Fragments

    return {name: getattr(Fragments, name) for name in sorted(vars(Fragments)) if name.startswith("fr_")}
