"""Molecules given as SMILES: by their fingerprints, their graphs, or both."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.data.batch import Augment
from nearfar.data.files import Json
from nearfar.data.items import Column
from nearfar.data.molecules.smiles import examine_structures
from nearfar.errors import NearfarError, nearest_name
from nearfar.models.molecules.fingerprint import FingerprintSpec, compute_fingerprints
from nearfar.models.molecules.graph import MoleculeField, MoleculeMasking, Molecules
from nearfar.models.molecules.networks import FingerprintEncoder, GraphTransformer, MoleculeEncoder
from nearfar.towers.base import BATCH, GraphInput, Tower, TowerGraph

__all__ = ["MOLECULE_ENCODERS", "MoleculeTower"]

MoleculeEncoderKind = Literal["fingerprint", "graph", "both"]
MOLECULE_ENCODERS: tuple[MoleculeEncoderKind, ...] = ("fingerprint", "graph", "both")
#: parts of a fingerprint by default: for molecules and their descriptions better than circular substructures alone
#: (docs/experiments/molecules.md)
FINGERPRINTS = ("morgan", "maccs", "properties", "functional_groups")


class MoleculeTower(Tower):
    """Molecules as SMILES (an InChI is read, too): a perceptron over fingerprints, a graph transformer, or their sum.

    Args:
        encoder: ``fingerprint``, ``graph`` or ``both``.
        width: length of a molecule's vector.
        hidden, layers, heads, dropout: of the graph transformer.
        fingerprints: the parts of the fingerprint, one or several of ``FINGERPRINT_KINDS``.
        bits, radius: of circular substructures; ``bits`` also of the other hashed parts.
        chirality: mirror images have different fingerprints.
        fingerprint_hidden, fingerprint_layers, fingerprint_dropout: of the network over fingerprints.
        input_dropout: share of a fingerprint's entries that are hidden while training.
        mask_atoms, mask_bonds: share of a graph's atoms and bonds whose features are hidden while training.

    Similar molecules, for hard batches and likely false negatives, are those with similar fingerprints, whatever the
    encoder reads.

    >>> MoleculeTower(encoder="graph", fingerprints="maccs").description
    'graph (9 atom and 3 bond features)'
    >>> MoleculeTower(encoder="fingerprint", fingerprints="maccs").check(["CCO", "C1CC"])
    [None, 'unparsable SMILES']
    """

    kind = "molecule"

    def __init__(
        self,
        encoder: MoleculeEncoderKind = "fingerprint",
        *,
        width: int = 512,
        hidden: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
        fingerprints: str | Sequence[str] = FINGERPRINTS,
        bits: int = 2048,
        radius: int = 2,
        chirality: bool = True,
        fingerprint_hidden: int = 1024,
        fingerprint_layers: int = 2,
        fingerprint_dropout: float = 0.4,
        input_dropout: float = 0.2,
        mask_atoms: float = 0.0,
        mask_bonds: float = 0.0,
    ) -> None:
        if encoder not in MOLECULE_ENCODERS:
            raise NearfarError(f"encoder={encoder}: {nearest_name(str(encoder), MOLECULE_ENCODERS)}")
        self._options: Json = {
            "encoder": encoder,
            "width": width,
            "hidden": hidden,
            "layers": layers,
            "heads": heads,
            "dropout": dropout,
            "fingerprints": [fingerprints] if isinstance(fingerprints, str) else list(fingerprints),
            "bits": bits,
            "radius": radius,
            "chirality": chirality,
            "fingerprint_hidden": fingerprint_hidden,
            "fingerprint_layers": fingerprint_layers,
            "fingerprint_dropout": fingerprint_dropout,
            "input_dropout": input_dropout,
            "mask_atoms": mask_atoms,
            "mask_bonds": mask_bonds,
        }
        for name in ("width", "hidden", "layers", "heads", "fingerprint_hidden", "fingerprint_layers"):
            _check(name, self._options[name], int, 1)
        for name in ("dropout", "fingerprint_dropout", "input_dropout", "mask_atoms", "mask_bonds"):
            _check(name, self._options[name], float, 0, below=1)
        _check("bits", bits, int, 8)
        _check("radius", radius, int, 0)
        if not isinstance(chirality, bool):
            raise NearfarError(f"chirality={chirality}: true or false is needed.")
        self.encoder = encoder
        self.reads_graphs = encoder in ("graph", "both")
        if self.reads_graphs and hidden % heads:
            raise NearfarError(f"hidden={hidden} must be a multiple of heads={heads}.")
        if (mask_atoms or mask_bonds) and not self.reads_graphs:
            raise NearfarError(
                "mask_atoms and mask_bonds act on graphs, and encoder=fingerprint has none; take encoder=graph or both."
            )
        self.fingerprint = FingerprintSpec(
            tuple(self._options["fingerprints"]), radius=radius, n_bits=bits, chirality=chirality
        )

    @property
    def options(self) -> Json:
        return dict(self._options)

    @property
    def description(self) -> str:
        parts = ["graph (9 atom and 3 bond features)"] if self.reads_graphs else []
        if self.encoder != "graph":
            spec = self.fingerprint
            parts.append(f"fingerprint ({' + '.join(spec.kinds)}, {spec.dim} numbers)")
        return " and ".join(parts)

    def check(self, values: Column) -> list[str | None]:
        """Values that are empty, or no molecule that RDKit reads."""
        _require("rdkit")
        texts = [str(value) for value in values]
        return [
            None if not each.problem else "unparsable SMILES" if text.strip() else "empty SMILES"
            for text, each in zip(texts, examine_structures(texts), strict=True)
        ]

    def read(self, values: Column) -> Molecules:
        """Graphs, fingerprints or both; a value that is no molecule is an error that names it."""
        _require("rdkit")
        spec = None if self.encoder == "graph" else self.fingerprint
        return Molecules.from_smiles([str(value) for value in values], self.reads_graphs, spec)

    def build(self) -> MoleculeEncoder:
        graph = fingerprint = None
        own = self._options
        if self.reads_graphs:
            _require("torch_geometric")
            graph = GraphTransformer(own["hidden"], own["layers"], own["heads"], own["width"], own["dropout"])
        if self.encoder != "graph":
            _require("rdkit")
            fingerprint = FingerprintEncoder(
                self.fingerprint.dim,
                own["fingerprint_hidden"],
                own["width"],
                own["fingerprint_layers"],
                own["fingerprint_dropout"],
                own["input_dropout"],
            )
        return MoleculeEncoder(graph, fingerprint)

    def graph(self) -> TowerGraph:
        """Fingerprints through their network; ``NearfarError`` for a network over atoms and bonds."""
        if self.reads_graphs:
            raise NearfarError(
                "a network over atoms and bonds gathers and scatters along the bonds of each molecule, which is no "
                "graph over tensors of one form; train with molecule_encoder=fingerprint"
            )
        spec = self.fingerprint

        def tensors(values: Column) -> dict[str, np.ndarray]:
            counts = compute_fingerprints([str(value) for value in values], spec)
            return {"fingerprint": counts.astype(np.float32)}

        return TowerGraph(
            [
                GraphInput(
                    "fingerprint", "float32", (BATCH, spec.dim), "the parts one after the other, as numbers"
                )
            ],
            _Fingerprint(),
            tensors,
            {"kind": self.kind, **spec.describe()},
        )

    def keys(self, values: Column) -> list[str]:
        """Canonical SMILES, whose letter case means something."""
        _require("rdkit")
        texts = [str(value) for value in values]
        return [each.canonical or text for text, each in zip(texts, examine_structures(texts), strict=True)]

    def augment(self, view: str) -> Augment | None:
        """Masking of atoms and bonds in the batches' field ``view``; None where nothing is masked."""
        atoms, bonds = self._options["mask_atoms"], self._options["mask_bonds"]
        return MoleculeMasking(view, atoms, bonds) if atoms or bonds else None

    def reference(self, values: Column) -> Float[np.ndarray, "n d"]:
        """Fingerprints through sign(x) · log(1 + |x|), as the network reads them."""
        _require("rdkit")
        counts = compute_fingerprints([str(value) for value in values], self.fingerprint)
        squashed = np.log1p(np.abs(counts), dtype=np.float32)
        return squashed if counts.dtype == np.uint8 else np.copysign(squashed, counts)


class _Fingerprint(nn.Module):
    """A fingerprint as the molecules of a batch."""

    def forward(self, fingerprint: Float[Tensor, "b f"]) -> MoleculeField:
        return MoleculeField(None, fingerprint)


def _check(name: str, value: float, of: type, least: float, below: float | None = None) -> None:
    """Raise unless ``value`` is a number of that kind, from ``least`` and, where it is given, below ``below``."""
    numeric = isinstance(value, int if of is int else (int, float)) and not isinstance(value, bool)
    if numeric and value >= least and (below is None or value < below):
        return
    wanted = "a whole number" if of is int else "a number"
    bounds = f"of at least {least:g}" if below is None else f"from {least:g} to below {below:g}"
    raise NearfarError(f"{name}={value}: {wanted} {bounds} is needed.")


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise NearfarError(
            f"a molecule tower needs {package}, which is not installed: pip install 'nearfar[molecules]'."
        )
