"""Molecule-text pairs as arrays, computed once for each split, and the batches taken from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.errors import NearfarError
from nearfar.models.molecules.fingerprint import FingerprintSpec, compute_fingerprints
from nearfar.models.molecules.graph import GraphBatch, GraphTable, mask_atoms, mask_bonds
from nearfar.systems.molecules.options import MoleculeOptions
from nearfar.systems.molecules.records import MoleculeSplit

__all__ = ["MoleculeBatch", "MoleculeDataset", "MoleculeFeatures"]


@dataclass
class MoleculeBatch:
    """One batch: ``positions`` in the split, text vectors, and molecules as graph, fingerprint or both."""

    positions: Int[Tensor, " b"]
    text: Float[Tensor, "b d"]
    graph: GraphBatch | None
    fingerprint: Float[Tensor, "b f"] | None
    structure_group: Int[Tensor, " b"]
    text_group: Int[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MoleculeBatch:
        return self.apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MoleculeBatch:
        return self.apply(Tensor.pin_memory)

    def split(self, rows: int) -> list[MoleculeBatch]:
        """The batch in parts of ``rows`` rows, the last one perhaps shorter."""
        parts = [
            part.split(rows) for part in (self.positions, self.text, self.structure_group, self.text_group)
        ]
        count = len(parts[0])
        graphs = [None] * count if self.graph is None else self.graph.split(rows)
        fingerprints = [None] * count if self.fingerprint is None else self.fingerprint.split(rows)
        return [
            MoleculeBatch(positions, text, graph, fingerprint, structure_group, text_group)
            for positions, text, structure_group, text_group, graph, fingerprint in zip(
                *parts, graphs, fingerprints, strict=True
            )
        ]

    def apply(self, move: Callable[[Tensor], Tensor]) -> MoleculeBatch:
        """The batch with ``move`` applied to every tensor."""
        return MoleculeBatch(
            move(self.positions),
            move(self.text),
            None if self.graph is None else self.graph.apply(move),
            None if self.fingerprint is None else move(self.fingerprint),
            move(self.structure_group),
            move(self.text_group),
        )


class MoleculeDataset(Dataset[MoleculeBatch]):
    """A split with everything a batch needs; ``__getitems__`` gives a whole `MoleculeBatch`.

    Use it with ``DataLoader(dataset, batch_sampler=…, collate_fn=MoleculeDataset.collate)``.

    Args:
        split: the pairs; all other arguments follow its order, one row for each pair.
        text: (n, d) frozen text embeddings.
        graphs: the graphs, if the molecule encoder reads graphs.
        fingerprints: (n, f) fingerprints, if it reads those; batches hold them as float32.
        mask_atoms, mask_bonds: probability that augmentation hides an atom or a bond (0: off).
        seed: of the augmentation.

    Augmentation depends only on (seed, epoch, first position of the batch): it is the same in every worker
    process and in a resumed run. Call ``set_epoch`` before each
    epoch; the epoch lies in shared memory, so that persistent workers see it too.
    """

    def __init__(
        self,
        split: MoleculeSplit,
        text: Float[np.ndarray, "n d"] | Float[Tensor, "n d"],
        graphs: GraphTable | None = None,
        fingerprints: Shaped[np.ndarray, "n f"] | None = None,
        mask_atoms: float = 0.0,
        mask_bonds: float = 0.0,
        seed: int = 0,
    ) -> None:
        if graphs is None and fingerprints is None:
            raise NearfarError("A molecule dataset needs graphs, fingerprints or both.")
        for name, part in (("text embeddings", text), ("graphs", graphs), ("fingerprints", fingerprints)):
            if part is not None and len(part) != len(split):
                raise NearfarError(f"{name}: {len(part)} rows for the {len(split)} pairs of {split.name}.")
        for name, p in (("mask_atoms", mask_atoms), ("mask_bonds", mask_bonds)):
            if not 0 <= p < 1:
                raise NearfarError(f"{name} is a probability below 1, got {p}.")
        if (mask_atoms or mask_bonds) and graphs is None:
            raise NearfarError(
                "mask_atoms and mask_bonds act on graphs; this dataset has fingerprints alone."
            )
        self.split = split
        self.text = torch.as_tensor(text, dtype=torch.float32)
        self.graphs = graphs
        self.fingerprints = None if fingerprints is None else torch.from_numpy(fingerprints)
        self.mask_atoms = mask_atoms
        self.mask_bonds = mask_bonds
        self.seed = seed
        self._structure_group = torch.from_numpy(split.structure_group)
        self._text_group = torch.from_numpy(split.text_group)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.split)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's augmentation."""
        self._epoch.fill_(epoch)

    @staticmethod
    def collate(batch: MoleculeBatch) -> MoleculeBatch:
        """The loader's ``collate_fn``: the batch is whole already."""
        return batch

    def __getitem__(self, position: int) -> MoleculeBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> MoleculeBatch:
        chosen = torch.as_tensor(positions, dtype=torch.int64)
        graph = None
        if self.graphs is not None:
            graph = self._augment(self.graphs.batch(chosen.numpy()), chosen)
        return MoleculeBatch(
            positions=chosen,
            text=self.text[chosen],
            graph=graph,
            fingerprint=None if self.fingerprints is None else self.fingerprints[chosen].float(),
            structure_group=self._structure_group[chosen],
            text_group=self._text_group[chosen],
        )

    def _augment(self, graph: GraphBatch, chosen: Tensor) -> GraphBatch:
        if not (self.mask_atoms or self.mask_bonds) or not len(chosen):
            return graph
        entropy = np.random.SeedSequence((self.seed, self.epoch, int(chosen[0])))
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
        if self.mask_atoms:
            graph = mask_atoms(graph, self.mask_atoms, generator)
        return mask_bonds(graph, self.mask_bonds, generator) if self.mask_bonds else graph


@dataclass(frozen=True)
class MoleculeFeatures:
    """Which features a molecule encoder needs, and a dataset made of them."""

    graphs: bool
    fingerprint: FingerprintSpec | None

    @classmethod
    def from_config(cls, config: MoleculeOptions) -> MoleculeFeatures:
        """From ``molecule_encoder`` and the ``fingerprint`` options."""
        kinds = config.fingerprints
        spec = FingerprintSpec(
            kinds=(kinds,) if isinstance(kinds, str) else tuple(kinds),
            radius=config.fingerprint_radius,
            n_bits=config.fingerprint_bits,
            chirality=config.fingerprint_chirality,
        )
        reads = config.molecule_encoder
        return cls(reads in ("graph", "both"), spec if reads in ("fingerprint", "both") else None)

    @property
    def fingerprint_dim(self) -> int | None:
        """Length of the fingerprint vector, None without one."""
        return self.fingerprint.dim if self.fingerprint else None

    @property
    def description(self) -> str:
        """One phrase for ``dataset_layout.json``."""
        parts = ["graph (9 atom and 3 bond features)"] if self.graphs else []
        if self.fingerprint:
            parts.append(
                f"fingerprint ({' + '.join(self.fingerprint.kinds)}, {self.fingerprint.dim} numbers)"
            )
        return " and ".join(parts)

    def dataset(
        self,
        split: MoleculeSplit,
        text: np.ndarray,
        mask_atoms: float = 0.0,
        mask_bonds: float = 0.0,
        seed: int = 0,
    ) -> MoleculeDataset:
        """The dataset of a split with its text embeddings; arguments as of `MoleculeDataset`."""
        graphs, fingerprints = self.compute(split.smiles)
        return MoleculeDataset(split, text, graphs, fingerprints, mask_atoms, mask_bonds, seed)

    def compute(self, smiles: Sequence[str]) -> tuple[GraphTable | None, np.ndarray | None]:
        """Graphs and fingerprints of molecules, from the cache where it has them."""
        graphs = GraphTable.from_smiles(smiles) if self.graphs else None
        fingerprints = compute_fingerprints(smiles, self.fingerprint) if self.fingerprint else None
        return graphs, fingerprints
