"""From the names of a compound to a readable text that does not spell the structure in another notation.

The names of a public compound list mix words ("behenic acid"), systematic names and registry numbers.
Numbers say nothing, and formulae, SMILES or InChI would turn retrieval into string matching: they stay out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["describe", "is_name"]

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
