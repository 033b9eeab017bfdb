"""A few hundred small molecules with descriptions, made by rule: enough to train on in a second."""

from __future__ import annotations

from itertools import product
from pathlib import Path

CORES = {
    "C": "methane",
    "CC": "ethane",
    "CCCC": "butane",
    "CCCCCC": "hexane",
    "c1ccccc1": "benzene",
    "C1CCCCC1": "cyclohexane",
    "c1ccncc1": "pyridine",
    "C1CCOC1": "oxolane",
    "c1ccc2ccccc2c1": "naphthalene",
    "C1CCNCC1": "piperidine",
    "c1ccsc1": "thiophene",
    "C1CC1": "cyclopropane",
}
GROUPS = {
    "O": "alcohol",
    "N": "amine",
    "C(=O)O": "carboxylic acid",
    "Cl": "chloride",
    "Br": "bromide",
    "C#N": "nitrile",
    "C=O": "aldehyde",
    "S": "thiol",
    "OC": "methyl ether",
    "C(N)=O": "amide",
}


#: a group as it is written in front of a core
BEFORE = {"C(=O)O": "OC(=O)", "C#N": "N#C", "C=O": "O=C", "OC": "CO", "C(N)=O": "NC(=O)"}


def pairs() -> list[tuple[str, str]]:
    """(SMILES, text) of every core with every group, and of four cores with two groups."""
    found = []
    for (core, name), (group, a) in product(CORES.items(), GROUPS.items()):
        found.append((core + group, f"the {a} of {name}"))
    for core, name in list(CORES.items())[:4]:
        for (first, a), (second, b) in product(GROUPS.items(), GROUPS.items()):
            if a < b:
                found.append((BEFORE.get(first, first) + core + second, f"a {name} that is both {a} and {b}"))
    return found


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    """A TSV as ChEBI-20 lays it out."""
    lines = ["CID\tSMILES\tdescription"] + [f"{i}\t{s}\t{t}" for i, (s, t) in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def split_files(folder: Path) -> list[str]:
    """Overrides for train, val and test files written to ``folder``."""
    rows = pairs()
    parts = {"train": [r for i, r in enumerate(rows) if i % 5 > 1]}
    parts |= {"val": rows[0::5], "test": rows[1::5]}
    return [f"data.{name}={write(folder / f'{name}.tsv', part)}" for name, part in parts.items()]
