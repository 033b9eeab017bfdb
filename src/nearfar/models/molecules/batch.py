"""Molecules as graphs, fingerprints or both: the arrays of a split, the rows of a batch, and their augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from nearfar.data.batch import Batch, Draw
from nearfar.errors import NearfarError
from nearfar.models.molecules.fingerprint import FingerprintSpec, compute_fingerprints
from nearfar.models.molecules.graph import GraphBatch, GraphTable, mask_atoms, mask_bonds

__all__ = ["MoleculeField", "MoleculeMasking", "Molecules"]


@dataclass(frozen=True)
class MoleculeField:
    """The molecules of a batch: their graphs, their fingerprints as float32, or both, as the encoder reads them."""

    graph: GraphBatch | None
    fingerprint: Float[Tensor, "b f"] | None

    def __len__(self) -> int:
        part = self.graph if self.fingerprint is None else self.fingerprint
        return 0 if part is None else len(part)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MoleculeField:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MoleculeField:
        return self._each(Tensor.pin_memory)

    def split(self, rows: int) -> list[MoleculeField]:
        """Parts of ``rows`` molecules, the last one perhaps smaller."""
        count = -(-len(self) // rows)
        graphs = [None] * count if self.graph is None else self.graph.split(rows)
        fingerprints = [None] * count if self.fingerprint is None else self.fingerprint.split(rows)
        return [MoleculeField(graph, own) for graph, own in zip(graphs, fingerprints, strict=True)]

    def _each(self, move: Callable[[Tensor], Tensor]) -> MoleculeField:
        return MoleculeField(
            None if self.graph is None else self.graph.apply(move),
            None if self.fingerprint is None else move(self.fingerprint),
        )


class Molecules:
    """The molecules of a split: graphs, fingerprints or both, computed once and kept in the cache by content.

    >>> spec = FingerprintSpec(n_bits=64)
    >>> molecules = Molecules.from_smiles(["CCO", "CCN"], graphs=True, fingerprint=spec, cache=False)
    >>> batch = molecules.batch(torch.tensor([1]))
    >>> len(batch), batch.graph.x.shape, batch.fingerprint.shape
    (1, torch.Size([3, 9]), torch.Size([1, 64]))
    """

    def __init__(
        self, graphs: GraphTable | None = None, fingerprints: Shaped[np.ndarray, "n f"] | None = None
    ) -> None:
        sizes = {len(part) for part in (graphs, fingerprints) if part is not None}
        if not sizes:
            raise NearfarError("molecules need graphs, fingerprints or both")
        if len(sizes) > 1:
            assert graphs is not None
            assert fingerprints is not None
            raise NearfarError(f"there are {len(graphs)} graphs and {len(fingerprints)} fingerprints")
        self.graphs = graphs
        self.fingerprints = None if fingerprints is None else torch.from_numpy(fingerprints)
        self._size = sizes.pop()

    @classmethod
    def from_smiles(
        cls, smiles: Sequence[str], graphs: bool, fingerprint: FingerprintSpec | None, cache: bool = True
    ) -> Molecules:
        """Featurise molecules; an unparsable SMILES is an error that names it."""
        return cls(
            GraphTable.from_smiles(smiles, cache) if graphs else None,
            compute_fingerprints(smiles, fingerprint, cache) if fingerprint else None,
        )

    def __len__(self) -> int:
        return self._size

    def batch(self, positions: Int[Tensor, " b"]) -> MoleculeField:
        """The molecules at these positions, in this order."""
        return MoleculeField(
            None if self.graphs is None else self.graphs.batch(positions.numpy()),
            None if self.fingerprints is None else self.fingerprints.index_select(0, positions).float(),
        )


@dataclass(frozen=True)
class MoleculeMasking:
    """Augmentation of a batch's field ``view``: atoms and bonds are hidden with these probabilities (0: off).

    A hidden atom or bond has the masked index in all its features; fingerprints stay as they are.
    """

    view: str
    atoms: float = 0.0
    bonds: float = 0.0

    def __post_init__(self) -> None:
        for name, p in (("atoms", self.atoms), ("bonds", self.bonds)):
            if not 0 <= p < 1:
                raise NearfarError(f"masking of {name} is a probability from 0 to below 1, got {p}.")

    def __call__(self, batch: Batch, draw: Draw) -> Batch:
        molecules = batch[self.view]
        if not isinstance(molecules, MoleculeField) or molecules.graph is None:
            raise NearfarError(f"masking acts on graphs, and '{self.view}' of this batch has none.")
        graph, generator = molecules.graph, draw.torch()
        if self.atoms:
            graph = mask_atoms(graph, self.atoms, generator)
        if self.bonds:
            graph = mask_bonds(graph, self.bonds, generator)
        return batch.replaced(**{self.view: MoleculeField(graph, molecules.fingerprint)})
