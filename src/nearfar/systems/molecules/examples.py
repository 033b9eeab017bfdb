"""Examples for the report: texts with the molecules found for them, drawn."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from nearfar.systems.molecules.records import MoleculeSplit
from nearfar.systems.molecules.smiles import quiet_rdkit
from nearfar.training.examples import retrieval_examples

__all__ = ["draw", "molecule_examples"]


def draw(smiles: str, width: int = 220, height: int = 160) -> str:
    """A molecule as an SVG element.

    >>> draw("CCO").startswith("<svg")
    True
    """
    from rdkit import Chem
    from rdkit.Chem.Draw import rdMolDraw2D

    with quiet_rdkit():
        molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        return ""
    drawer = rdMolDraw2D.MolDraw2DSVG(width, height)
    options: Any = drawer.drawOptions()  # RDKit's stubs give its fields the wrong types
    options.clearBackground = False
    options.bondLineWidth = 1
    with quiet_rdkit():
        rdMolDraw2D.PrepareAndDrawMolecule(drawer, molecule)
    drawer.FinishDrawing()
    text: str = drawer.GetDrawingText()
    return text[text.index("<svg") :].strip()


def molecule_examples(
    split: MoleculeSplit, texts: Float[Tensor, "n d"], molecules: Float[Tensor, "n d"]
) -> list[dict[str, Any]]:
    """Texts with the molecules found for them: right, nearly, wrong."""

    def shown(position: int) -> dict[str, Any]:
        smiles = split.smiles[position]
        return {"text": split.texts[position], "smiles": smiles, "svg": draw(smiles)}

    return retrieval_examples(texts, molecules, shown, shown)
