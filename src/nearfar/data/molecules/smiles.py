"""Parsing of SMILES with RDKit: canonical forms, scaffolds, groups for splits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from nearfar.data.cache import cached_arrays
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from rdkit.Chem import Mol

__all__ = [
    "Structure",
    "assign_groups",
    "canonical_smiles",
    "examine_structures",
    "parse_smiles",
    "quiet_rdkit",
    "rdkit_version",
    "sanitization_problem",
    "scaffold_key",
]


_INCHIKEY = re.compile(r"[A-Z]{14}-[A-Z]{10}-[A-Z]")
_SELFIES = re.compile(r"(\[[^\[\]]+\]){2,}")
_SELFIES_WORD = re.compile(r"\[(?:[=#/\\]?Branch|[=#/\\]?Ring|[=#]|C\]\[C\])")


@contextmanager
def quiet_rdkit() -> Iterator[None]:
    """RDKit writes a line to stderr for each odd molecule; here problems are returned, not printed."""
    from rdkit import rdBase

    with rdBase.BlockLogs():
        yield


def rdkit_version() -> str:
    """Part of every cache key: canonical forms and fingerprints may change from release to release."""
    from rdkit import __version__

    return str(__version__)


def parse_smiles(smiles: str) -> tuple[Mol | None, str]:
    """``(molecule, "")``, or ``(None, reason)`` if ``smiles`` is not a valid molecule.

    An InChI is read as well. Atom maps are taken off: they number the atoms of a reaction and are no part of the
    structure, so that a molecule with maps is the same as the one without.

    >>> parse_smiles("CCO")[0].GetNumAtoms()
    3
    >>> parse_smiles("C(C)(C)(C)(C)C")[1]
    'Explicit valence for atom # 0 C, 5, is greater than permitted'
    >>> parse_smiles("C1CC")[1]
    'SMILES syntax error: unclosed ring'
    >>> canonical_smiles(parse_smiles("[CH3:1][CH2:2][OH:3]")[0])
    'CCO'
    >>> canonical_smiles(parse_smiles("InChI=1S/C2H6O/c1-2-3/h3H,2H2,1H3")[0])
    'CCO'
    """
    from rdkit import Chem

    text = smiles.strip()
    if not text:
        return None, "empty SMILES"
    if (other := _other_notation(text)) is not None:
        return None, other
    with quiet_rdkit():
        if text.startswith("InChI="):
            molecule = Chem.MolFromInchi(text)
            return (molecule, "") if molecule is not None else (None, "InChI that RDKit cannot read")
        molecule = Chem.MolFromSmiles(text)
        if molecule is not None:
            return (_without_maps(molecule), "") if molecule.GetNumAtoms() else (None, "no atoms")
        raw = Chem.MolFromSmiles(text, sanitize=False)
        if raw is None:
            return None, "SMILES syntax error" + _syntax_hint(text)
        return None, sanitization_problem(raw)


def sanitization_problem(molecule: Mol) -> str:
    """RDKit's reason why it cannot sanitise a molecule that was read without checks."""
    from rdkit import Chem

    problems = Chem.DetectChemistryProblems(molecule)
    return str(problems[0].Message()) if problems else "RDKit cannot sanitise it"


def _without_maps(molecule: Mol) -> Mol:
    from rdkit import Chem

    mapped = [atom for atom in molecule.GetAtoms() if atom.GetAtomMapNum()]
    if not mapped:
        return molecule
    for atom in mapped:
        atom.SetAtomMapNum(0)
    # Hydrogens written out for the maps' sake, and centres that maps alone made different, go with a second parsing.
    return Chem.MolFromSmiles(Chem.MolToSmiles(molecule)) or molecule


def _other_notation(text: str) -> str | None:
    """The notation of a text that is no SMILES (a reaction, an InChIKey, SELFIES); None where it may be one."""
    if re.sub("->|<-", "", text.split(" |")[0]).count(">") >= 2:  # arrows are dative bonds
        return "a reaction, not a molecule"
    if _INCHIKEY.fullmatch(text):
        return "an InChIKey, from which no structure can be had"
    if _SELFIES.fullmatch(text) and _SELFIES_WORD.search(text):
        return "SELFIES, not SMILES"
    return None


def canonical_smiles(molecule: Mol) -> str:
    """RDKit's canonical SMILES with stereochemistry: equal exactly for equal structures."""
    from rdkit import Chem

    return str(Chem.MolToSmiles(molecule))


def _syntax_hint(text: str) -> str:
    """The usual syntax errors by name; RDKit itself checks the grammar."""
    for opening, closing, word in (("(", ")", "parentheses"), ("[", "]", "brackets")):
        if text.count(opening) != text.count(closing):
            return f": unbalanced {word}"
    if any(character.isspace() for character in text):
        return ": blank inside"
    outside = "".join(part.split("]")[-1] for part in text.split("["))
    if "%" not in outside and any(outside.count(digit) % 2 for digit in "0123456789"):
        return ": unclosed ring"
    return ""


def scaffold_key(molecule: Mol) -> str:
    """The group of a molecule: ``ring:SCAFFOLD``, or ``chain:PATTERN`` if it has no ring.

    For a salt or mixture the largest scaffold with a ring counts, so that a drug and its salt with a different
    ring stay together. Stereochemistry is ignored.

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


def _functional_pattern(molecule: Mol) -> str:
    """Heteroatoms and unsaturated carbons, counted up to 3 of each kind; saturated carbon is ignored.

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

    The shares are met as nearly as whole groups allow and never exceeded, except that a wanted split gets at
    least one group (the smallest), if a group is left for train.

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
