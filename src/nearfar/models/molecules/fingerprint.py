"""Molecules as numbers: properties of a structure and hashed fingerprints of its neighbourhoods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped, UInt8

from nearfar.data.cache import cached_array
from nearfar.data.files import Json
from nearfar.data.molecules.smiles import parse_smiles, quiet_rdkit, rdkit_version
from nearfar.errors import NearfarError, nearest_name

if TYPE_CHECKING:
    from rdkit.Chem import Mol

__all__ = [
    "FINGERPRINT_KINDS",
    "PROPERTY_NAMES",
    "FingerprintSpec",
    "compute_fingerprints",
    "functional_group_names",
    "functional_groups",
    "molecule_properties",
]


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


def molecule_properties(molecule: Mol) -> UInt8[np.ndarray, " properties"]:
    """The properties of an RDKit molecule as whole numbers, cut at 0 and 255.

    >>> from rdkit import Chem
    >>> values = molecule_properties(Chem.MolFromSmiles("N[C@@H](C)C(=O)[O-]"))
    >>> by_name = dict(zip(PROPERTY_NAMES, values.tolist(), strict=True))
    >>> [by_name[name] for name in ("atoms of element 6", "hydrogens", "net negative charge", "S centres")]
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


def functional_groups(molecule: Mol) -> UInt8[np.ndarray, " groups"]:
    """How often each of RDKit's 85 functional groups occurs in a molecule, cut at 255.

    >>> from rdkit import Chem
    >>> counts = functional_groups(Chem.MolFromSmiles("COC(=O)c1ccccc1O"))
    >>> by_name = dict(zip(functional_group_names(), counts.tolist(), strict=True))
    >>> [by_name[name] for name in ("fr_ester", "fr_phenol", "fr_nitro")]
    [1, 1, 0]
    """
    counts = [count(molecule) for count in _group_counters().values()]
    return np.minimum(np.array(counts), 255).astype(np.uint8)


@cache
def _group_counters() -> dict[str, Callable[[Mol], int]]:
    from rdkit.Chem import Fragments

    return {name: getattr(Fragments, name) for name in sorted(vars(Fragments)) if name.startswith("fr_")}


_VERSION = 1  # part of the cache key

FINGERPRINT_KINDS: dict[str, str] = {
    "morgan": "circular substructures (ECFP; Rogers and Hahn, 2010)",
    "feature_morgan": "circular substructures of pharmacophoric atom classes (FCFP)",
    "atom_pairs": "pairs of atoms with their distance (Carhart et al., 1985)",
    "torsions": "topological torsions: paths of four atoms (Nilakantan et al., 1987)",
    "paths": "RDKit's path fingerprint",
    "maccs": "166 structural keys (MACCS)",
    "properties": "counts of elements, charges, rings, stereo labels",
    "functional_groups": "how often each functional group occurs",
    "descriptors": "RDKit's 2D descriptors, squashed to about -3..3",
}


@dataclass(frozen=True)
class FingerprintSpec:
    """Which fingerprints are concatenated to the vector of a molecule.

    ``counts`` keeps how often a substructure occurs (cut at 255) instead of whether; MACCS keys are always
    bits. ``chirality`` distinguishes enantiomers in the circular and pair kinds.

    >>> FingerprintSpec(("morgan", "maccs"), n_bits=1024).dim
    1191
    """

    kinds: tuple[str, ...] = ("morgan",)
    radius: int = 2
    n_bits: int = 2048
    counts: bool = True
    chirality: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds))
        if not self.kinds:
            raise NearfarError("fingerprint.kinds is empty; " + nearest_name("", FINGERPRINT_KINDS) + ".")
        for kind in self.kinds:
            if kind not in FINGERPRINT_KINDS:
                raise NearfarError(
                    f"fingerprint {kind!r} is unknown; {nearest_name(kind, FINGERPRINT_KINDS)}"
                )
        if len(set(self.kinds)) < len(self.kinds):
            raise NearfarError(f"fingerprint.kinds names a kind twice: {', '.join(self.kinds)}.")
        if self.radius < 0 or self.n_bits < 8:
            raise NearfarError(
                "fingerprint: radius must be 0 or more and n_bits at least 8, "
                f"got {self.radius} and {self.n_bits}."
            )

    @property
    def dim(self) -> int:
        """Length of the vector."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each part, in the order in which they stand."""
        special = {"maccs": 167, "properties": len(PROPERTY_NAMES)}
        if "functional_groups" in self.kinds:
            special["functional_groups"] = len(functional_group_names())
        if "descriptors" in self.kinds:
            special["descriptors"] = len(_descriptor_names())
        return {kind: special.get(kind, self.n_bits) for kind in self.kinds}

    def describe(self) -> Json:
        """How the vector of a molecule is made, as plain values: each part with its length and RDKit's function."""
        size = f"fpSize={self.n_bits}"
        chiral = f"{size}, includeChirality={self.chirality}"
        radius = f"radius={self.radius}, {chiral}"
        features = "atomInvariantsGenerator=GetMorganFeatureAtomInvGen()"
        by = {
            "morgan": f"rdFingerprintGenerator.GetMorganGenerator({radius})",
            "feature_morgan": f"rdFingerprintGenerator.GetMorganGenerator({radius}, {features})",
            "atom_pairs": f"rdFingerprintGenerator.GetAtomPairGenerator({chiral})",
            "torsions": f"rdFingerprintGenerator.GetTopologicalTorsionGenerator({chiral})",
            "paths": f"rdFingerprintGenerator.GetRDKitFPGenerator({size})",
            "maccs": "rdMolDescriptors.GetMACCSKeysFingerprint",
            "properties": "nearfar.models.molecules.fingerprint.molecule_properties",
            "functional_groups": "rdkit.Chem.Fragments, each function whose name begins with fr_, by name, cut at 255",
            "descriptors": "sign(x) · log(1 + |x|) / 3 of rdkit.Chem.Descriptors.CalcMolDescriptors, without Ipc",
        }
        counted = "GetCountFingerprintAsNumPy, cut at 255" if self.counts else "GetFingerprintAsNumPy"
        names = {"properties": PROPERTY_NAMES}
        if "functional_groups" in self.kinds:
            names["functional_groups"] = functional_group_names()
        return {
            "rdkit": rdkit_version(),
            "parts": [
                {
                    "kind": kind,
                    "length": length,
                    "by": f"{by[kind]}.{counted}" if by[kind].startswith("rdFinger") else by[kind],
                    **({"names": list(names[kind])} if kind in names else {}),
                }
                for kind, length in self.sizes.items()
            ],
            "steps": [
                "read the SMILES with RDKit",
                "compute the parts and put them one after the other, as float32",
            ],
        }


def compute_fingerprints(
    smiles: Sequence[str], spec: FingerprintSpec | None = None, cache: bool = True
) -> Shaped[np.ndarray, "n d"]:
    """(n, spec.dim): uint8, or float32 where descriptors are among the kinds; kept in the cache by content.

    An unparsable SMILES is an error: readers reject such rows before they get here.

    >>> compute_fingerprints(["CCO", "c1ccccc1"], FingerprintSpec(n_bits=64), cache=False).sum(1).tolist()
    [6, 18]
    """
    spec = spec or FingerprintSpec()
    key = ["fingerprints", _VERSION, rdkit_version(), asdict(spec), list(smiles)]
    return cached_array("fingerprints", key, lambda: _compute(smiles, spec), enabled=cache)


def _compute(smiles: Sequence[str], spec: FingerprintSpec) -> np.ndarray:
    dtype = np.float32 if "descriptors" in spec.kinds else np.uint8
    out = np.zeros((len(smiles), spec.dim), dtype=dtype)
    parts: list[tuple[slice, Callable[[Mol], np.ndarray]]] = []
    start = 0
    for kind, size in spec.sizes.items():
        parts.append((slice(start, start + size), _function(kind, spec)))
        start += size
    with quiet_rdkit():
        for row, text in enumerate(smiles):
            molecule, reason = parse_smiles(text)
            if molecule is None:
                raise NearfarError(f"Molecule {row} ({text!r}) has no fingerprint: {reason}.")
            for where, function in parts:
                out[row, where] = function(molecule)
    return out


def _function(kind: str, spec: FingerprintSpec) -> Callable[[Mol], np.ndarray]:
    """The function that computes the part ``kind`` of a molecule's vector."""
    from rdkit.Chem import rdFingerprintGenerator as generators
    from rdkit.Chem import rdMolDescriptors

    if kind == "maccs":
        return lambda molecule: np.array(rdMolDescriptors.GetMACCSKeysFingerprint(molecule), dtype=np.uint8)
    if kind == "properties":
        return molecule_properties
    if kind == "functional_groups":
        return functional_groups
    if kind == "descriptors":
        return _descriptors
    bits, chiral = spec.n_bits, spec.chirality
    if kind == "morgan":
        generator = generators.GetMorganGenerator(radius=spec.radius, fpSize=bits, includeChirality=chiral)
    elif kind == "feature_morgan":
        invariants = generators.GetMorganFeatureAtomInvGen()
        generator = generators.GetMorganGenerator(
            radius=spec.radius, fpSize=bits, includeChirality=chiral, atomInvariantsGenerator=invariants
        )
    elif kind == "atom_pairs":
        generator = generators.GetAtomPairGenerator(fpSize=bits, includeChirality=chiral)
    elif kind == "torsions":
        generator = generators.GetTopologicalTorsionGenerator(fpSize=bits, includeChirality=chiral)
    else:
        generator = generators.GetRDKitFPGenerator(fpSize=bits)
    if spec.counts:
        return lambda molecule: np.minimum(generator.GetCountFingerprintAsNumPy(molecule), 255)
    return lambda molecule: generator.GetFingerprintAsNumPy(molecule)


def _descriptor_names() -> list[str]:
    from rdkit.Chem import Descriptors

    # Ipc grows exponentially with the molecule and would drown the rest; its average form stays.
    return [name for name, _ in Descriptors.descList if name != "Ipc"]


def _descriptors(molecule: Mol) -> np.ndarray:
    """2D descriptors through sign(x) · log(1 + |x|) / 3, which needs no statistics of a training set."""
    from rdkit.Chem import Descriptors

    values = Descriptors.CalcMolDescriptors(molecule, missingVal=0.0)
    raw = np.array([values[name] for name in _descriptor_names()], dtype=np.float64)
    raw = np.nan_to_num(raw, nan=0.0, posinf=0.0, neginf=0.0)
    return (np.sign(raw) * np.log1p(np.abs(raw)) / 3).astype(np.float32)
