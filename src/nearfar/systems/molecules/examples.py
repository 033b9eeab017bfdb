"""Examples for the report: texts with the molecules found for them, drawn."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.systems.molecules.records import MoleculeSplit
from nearfar.systems.molecules.smiles import quiet_rdkit

__all__ = ["draw", "retrieval_examples"]

#: how many hits are shown, and examples of each kind
HITS, EXAMPLES = 5, 3


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


def retrieval_examples(
    split: MoleculeSplit, texts: Float[Tensor, "n d"], molecules: Float[Tensor, "n d"], seed: int = 0
) -> list[dict[str, Any]]:
    """Texts whose molecule came first (right), up to tenth (nearly) and later (wrong), chosen by ``seed``."""
    texts = torch.nn.functional.normalize(texts.float(), dim=1)
    molecules = torch.nn.functional.normalize(molecules.float(), dim=1)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    wanted = {"right": EXAMPLES, "nearly": EXAMPLES, "wrong": EXAMPLES}
    found: list[dict[str, Any]] = []
    for query in order[:2000].tolist():
        scores = molecules @ texts[query]
        # Ties count by expectation, as in the metrics: among equal scores nothing says which comes first.
        equal = int((scores == scores[query]).sum())
        rank = 1 + int((scores > scores[query]).sum()) + (equal - 1) / 2
        kind = "right" if rank == 1 else "nearly" if rank <= 10 else "wrong"
        if not wanted[kind]:
            continue
        wanted[kind] -= 1
        best = scores.topk(min(HITS, len(scores))).indices.tolist()
        found.append(
            {
                "kind": kind,
                "query": {"text": split.texts[query], "svg": draw(split.smiles[query])},
                "rank": int(rank) if rank == int(rank) else rank,
                "gallery": len(split),
                "items": [
                    {
                        "rank": place + 1,
                        "score": float(scores[item]),
                        "correct": item == query,
                        "text": split.texts[item],
                        "smiles": split.smiles[item],
                        "svg": draw(split.smiles[item]),
                    }
                    for place, item in enumerate(best)
                ],
            }
        )
        if not any(wanted.values()):
            break
    kinds = ("right", "nearly", "wrong")
    return sorted(found, key=lambda example: kinds.index(example["kind"]))
