"""What the molecule encoder reads: graphs, fingerprints or both, always made in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nearfar.errors import NearfarError
from nearfar.systems.molecules.dataset import MoleculeDataset
from nearfar.systems.molecules.fingerprint import FingerprintSpec, compute_fingerprints
from nearfar.systems.molecules.graph import GraphTable
from nearfar.systems.molecules.records import MoleculeSplit

__all__ = ["MoleculeFeatures"]


@dataclass(frozen=True)
class MoleculeFeatures:
    """Which features a molecule encoder needs, and a dataset made of them."""

    graphs: bool
    fingerprint: FingerprintSpec | None

    @classmethod
    def from_config(cls, config: Any) -> MoleculeFeatures:
        """From ``molecule_encoder`` and the ``fingerprint`` options, which are checked in any case."""
        kinds = config.fingerprints
        if isinstance(kinds, str):
            kinds = [kinds]
        if not isinstance(kinds, Sequence) or not all(isinstance(kind, str) for kind in kinds):
            raise NearfarError(f"fingerprints={kinds}: a list of names is needed, such as [morgan, maccs].")
        spec = FingerprintSpec(
            kinds=tuple(kinds),
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

    def dataset(self, split: MoleculeSplit, text: np.ndarray, **options: Any) -> MoleculeDataset:
        """The dataset of a split with its text embeddings; ``options`` are those of ``MoleculeDataset``."""
        graphs, fingerprints = self.compute(split.smiles)
        return MoleculeDataset(split, text, graphs=graphs, fingerprints=fingerprints, **options)

    def compute(self, smiles: Sequence[str]) -> tuple[GraphTable | None, np.ndarray | None]:
        """Graphs and fingerprints of molecules, from the cache where they are there."""
        graphs = GraphTable.from_smiles(smiles) if self.graphs else None
        fingerprints = compute_fingerprints(smiles, self.fingerprint) if self.fingerprint else None
        return graphs, fingerprints
