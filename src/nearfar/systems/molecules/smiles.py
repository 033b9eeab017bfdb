"""SMILES or InChI in, molecules out; and when a text is no molecule, the reason in RDKit's words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["canonical_smiles", "parse_smiles", "quiet_rdkit", "rdkit_version", "sanitization_problem"]

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


def parse_smiles(smiles: str) -> tuple[Any, str]:
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


def sanitization_problem(molecule: Any) -> str:
    """Why a molecule that was read without checks is none, in RDKit's words."""
    from rdkit import Chem

    problems = Chem.DetectChemistryProblems(molecule)
    return str(problems[0].Message()) if problems else "RDKit cannot sanitise it"


def _without_maps(molecule: Any) -> Any:
    from rdkit import Chem

    mapped = [atom for atom in molecule.GetAtoms() if atom.GetAtomMapNum()]
    if not mapped:
        return molecule
    for atom in mapped:
        atom.SetAtomMapNum(0)
    # Hydrogens written out for the maps' sake, and centres that maps alone made different, go with a second parsing.
    return Chem.MolFromSmiles(Chem.MolToSmiles(molecule)) or molecule


def _other_notation(text: str) -> str | None:
    """What a text is that looks like a SMILES, or stands where one should, and is none."""
    if re.sub("->|<-", "", text.split(" |")[0]).count(">") >= 2:  # arrows are dative bonds
        return "a reaction, not a molecule"
    if _INCHIKEY.fullmatch(text):
        return "an InChIKey, from which no structure can be had"
    if _SELFIES.fullmatch(text) and _SELFIES_WORD.search(text):
        return "SELFIES, not SMILES"
    return None


def canonical_smiles(molecule: Any) -> str:
    """RDKit's canonical SMILES with stereochemistry: equal exactly for equal structures."""
    from rdkit import Chem

    return str(Chem.MolToSmiles(molecule))


def _syntax_hint(text: str) -> str:
    """The usual slips, named; the grammar itself is RDKit's business."""
    for opening, closing, word in (("(", ")", "parentheses"), ("[", "]", "brackets")):
        if text.count(opening) != text.count(closing):
            return f": unbalanced {word}"
    if any(character.isspace() for character in text):
        return ": blank inside"
    outside = "".join(part.split("]")[-1] for part in text.split("["))
    if "%" not in outside and any(outside.count(digit) % 2 for digit in "0123456789"):
        return ": unclosed ring"
    return ""
