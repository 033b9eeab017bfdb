"""SMILES in, molecules out; and when a SMILES is no molecule, the reason in RDKit's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["canonical_smiles", "parse_smiles", "quiet_rdkit", "rdkit_version"]


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

    >>> parse_smiles("CCO")[0].GetNumAtoms()
    3
    >>> parse_smiles("C(C)(C)(C)(C)C")[1]
    'Explicit valence for atom # 0 C, 5, is greater than permitted'
    >>> parse_smiles("C1CC")[1]
    'SMILES syntax error: unclosed ring'
    """
    from rdkit import Chem

    text = smiles.strip()
    if not text:
        return None, "empty SMILES"
    with quiet_rdkit():
        molecule = Chem.MolFromSmiles(text)
        if molecule is not None:
            return (molecule, "") if molecule.GetNumAtoms() else (None, "no atoms")
        raw = Chem.MolFromSmiles(text, sanitize=False)
        if raw is None:
            return None, "SMILES syntax error" + _syntax_hint(text)
        problems = Chem.DetectChemistryProblems(raw)
        return None, problems[0].Message() if problems else "RDKit cannot sanitise it"


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
