"""Molecules as graphs, fingerprints or both: whole splits in flat arrays, batches by index arithmetic, augmentation.

A graph has 9 atom and 3 bond features, the set that the Open Graph Benchmark made common (Hu et al., 2020). Two indices
of every feature are reserved: one for values outside the table, one that augmentation writes over masked atoms and
bonds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from nearfar.data.batch import Batch, Draw
from nearfar.data.cache import cached_arrays
from nearfar.data.molecules.smiles import parse_smiles, quiet_rdkit, rdkit_version
from nearfar.errors import NearfarError
from nearfar.models.molecules.fingerprint import FingerprintSpec, compute_fingerprints

if TYPE_CHECKING:
    from rdkit.Chem import Mol
    from torch_geometric.data import Data

__all__ = [
    "ATOM_SIZES",
    "BOND_SIZES",
    "GraphBatch",
    "GraphTable",
    "MoleculeField",
    "MoleculeMasking",
    "Molecules",
    "mask_atoms",
    "mask_bonds",
]


_VERSION = 1  # of the features; part of the cache key

# The values of each feature by their RDKit names; position is the index, then "other", then "masked".
_ATOM_VALUES: dict[str, tuple[object, ...]] = {
    "atomic number": tuple(range(1, 119)),
    "chirality": ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW", "CHI_OTHER"),
    "degree": tuple(range(11)),
    "formal charge": tuple(range(-5, 6)),
    "hydrogens": tuple(range(9)),
    "radical electrons": tuple(range(5)),
    "hybridisation": ("SP", "SP2", "SP3", "SP3D", "SP3D2"),
    "aromatic": (False, True),
    "in ring": (False, True),
}
_BOND_VALUES: dict[str, tuple[object, ...]] = {
    "bond type": ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC"),
    "stereo": ("STEREONONE", "STEREOZ", "STEREOE", "STEREOCIS", "STEREOTRANS", "STEREOANY"),
    "conjugated": (False, True),
}
ATOM_SIZES: tuple[int, ...] = tuple(len(values) + 2 for values in _ATOM_VALUES.values())
"""Number of indices of each of the 9 atom features; the last is "masked", the one before "other"."""
BOND_SIZES: tuple[int, ...] = tuple(len(values) + 2 for values in _BOND_VALUES.values())
"""Number of indices of each of the 3 bond features; the last is "masked", the one before "other"."""


@dataclass
class GraphBatch:
    """Some graphs as one disconnected graph. Every bond stands in ``edge_index`` in both directions."""

    x: Int[Tensor, "atoms 9"]
    edge_index: Int[Tensor, "2 edges"]
    edge_attr: Int[Tensor, "edges 3"]
    batch: Int[Tensor, " atoms"]
    num_graphs: int

    def __len__(self) -> int:
        return self.num_graphs

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GraphBatch:
        return self.apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> GraphBatch:
        return self.apply(Tensor.pin_memory)

    def apply(self, move: Callable[[Tensor], Tensor]) -> GraphBatch:
        """The batch with ``move`` applied to every tensor."""
        x, edge_index, edge_attr, batch = map(move, (self.x, self.edge_index, self.edge_attr, self.batch))
        return GraphBatch(x, edge_index, edge_attr, batch, self.num_graphs)

    def split(self, molecules: int) -> list[GraphBatch]:
        """Parts of ``molecules`` graphs each; atoms and edges lie in the order of their molecules."""
        first = torch.arange(0, self.num_graphs, molecules, device=self.x.device)
        atoms = torch.searchsorted(self.batch, first)
        edges = torch.searchsorted(self.batch[self.edge_index[0]], first)
        starts = torch.stack([first, atoms, edges], dim=1).tolist()
        ends = [*starts[1:], [self.num_graphs, len(self.x), len(self.edge_attr)]]
        return [
            GraphBatch(
                x=self.x[atom:last_atom],
                edge_index=self.edge_index[:, edge:last_edge] - atom,
                edge_attr=self.edge_attr[edge:last_edge],
                batch=self.batch[atom:last_atom] - molecule,
                num_graphs=last - molecule,
            )
            for (molecule, atom, edge), (last, last_atom, last_edge) in zip(starts, ends, strict=True)
        ]


@dataclass(frozen=True)
class GraphTable:
    """All graphs of a split in flat arrays: atoms of molecule i are ``atom_ptr[i]:atom_ptr[i + 1]``.

    Edges keep atom numbers within their molecule and both directions of a bond; 100,000 drug-like molecules
    take about 70 MB.

    >>> table = GraphTable.from_smiles(["CCO", "[Na+].[Cl-]"], cache=False)
    >>> batch = table.batch([1, 0])
    >>> batch.x.shape, batch.edge_index.tolist(), batch.batch.tolist()
    (torch.Size([5, 9]), [[2, 3, 3, 4], [3, 2, 4, 3]], [0, 0, 1, 1, 1])
    """

    atoms: UInt8[np.ndarray, "atoms 9"]
    atom_ptr: Int[np.ndarray, " boundaries"]
    edges: Int[np.ndarray, "edges 2"]
    bonds: UInt8[np.ndarray, "edges 3"]
    edge_ptr: Int[np.ndarray, " boundaries"]

    @classmethod
    def from_smiles(cls, smiles: Sequence[str], cache: bool = True) -> GraphTable:
        """Featurise molecules (kept in the cache by content); an unparsable SMILES is an error.

        Readers reject unparsable rows before they get here, so that positions stay aligned with the split.
        """
        key = ["molecule graphs", _VERSION, rdkit_version(), list(smiles)]
        return cls(**cached_arrays("molecule-graphs", key, lambda: _featurise_all(smiles), cache))

    def __len__(self) -> int:
        return len(self.atom_ptr) - 1

    def batch(self, positions: Sequence[int] | np.ndarray | Tensor) -> GraphBatch:
        """The graphs at ``positions``, in that order, without a loop over molecules."""
        chosen = np.asarray(positions, dtype=np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"positions must lie in 0..{len(self) - 1}")
        atom_rows, atom_counts, offsets = _ranges(self.atom_ptr, chosen)
        edge_rows, edge_counts, _ = _ranges(self.edge_ptr, chosen)
        # np.take copies rows three times faster than self.edges[edge_rows] would.
        edges = np.take(self.edges, edge_rows, axis=0).T.astype(np.int64, order="C")
        edges += np.repeat(offsets, edge_counts)
        return GraphBatch(
            x=torch.from_numpy(np.take(self.atoms, atom_rows, axis=0).astype(np.int64)),
            edge_index=torch.from_numpy(edges),
            edge_attr=torch.from_numpy(np.take(self.bonds, edge_rows, axis=0).astype(np.int64)),
            batch=torch.from_numpy(np.repeat(np.arange(len(chosen)), atom_counts)),
            num_graphs=len(chosen),
        )

    def to_data(self, position: int) -> Data:
        """One molecule as ``torch_geometric.data.Data``, for use with PyTorch Geometric's own tools."""
        from torch_geometric.data import Data

        one = self.batch([position])
        return Data(x=one.x, edge_index=one.edge_index, edge_attr=one.edge_attr, num_nodes=len(one.x))


def _ranges(pointer: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Concatenated rows of the chosen segments, their lengths, and the start of each in the result."""
    start = pointer[chosen]
    counts = pointer[chosen + 1] - start
    offsets = np.cumsum(counts) - counts
    rows = np.repeat(start - offsets, counts) + np.arange(counts.sum())
    return rows, counts, offsets


def mask_atoms(graph: GraphBatch, p: float, generator: torch.Generator) -> GraphBatch:
    """Each atom, with probability ``p``, gets the masked index in all 9 features; the bonds stay."""
    hidden = torch.rand(len(graph.x), generator=generator) < p
    masked = torch.tensor(ATOM_SIZES) - 1
    x = torch.where(hidden.unsqueeze(1).to(graph.x.device), masked.to(graph.x.device), graph.x)
    return GraphBatch(x, graph.edge_index, graph.edge_attr, graph.batch, graph.num_graphs)


def mask_bonds(graph: GraphBatch, p: float, generator: torch.Generator) -> GraphBatch:
    """Each bond, with probability ``p``, gets the masked index in all 3 features, in both directions."""
    # A table writes both directions of a bond next to each other, so edges 2i and 2i + 1 share a draw.
    hidden = (torch.rand(graph.edge_attr.shape[0] // 2, generator=generator) < p).repeat_interleave(2)
    masked = torch.tensor(BOND_SIZES) - 1
    device = graph.edge_attr.device
    edge_attr = torch.where(hidden.unsqueeze(1).to(device), masked.to(device), graph.edge_attr)
    return GraphBatch(graph.x, graph.edge_index, edge_attr, graph.batch, graph.num_graphs)


def _index(values: tuple[object, ...]) -> dict[object, int]:
    return {value: position for position, value in enumerate(values)}


def _featurise_all(smiles: Sequence[str]) -> dict[str, np.ndarray]:
    look_up = _Lookup()
    atoms, bonds = bytearray(), bytearray()
    edges: list[int] = []
    atom_counts, edge_counts = [0], [0]
    with quiet_rdkit():
        for position, text in enumerate(smiles):
            molecule, reason = parse_smiles(text)
            if molecule is None:
                raise NearfarError(f"Molecule {position} ({text!r}) cannot be featurised: {reason}.")
            n_atoms, n_edges = look_up.append(molecule, atoms, edges, bonds)
            atom_counts.append(n_atoms)
            edge_counts.append(n_edges)
    local = np.array(edges, dtype=np.int32).reshape(-1, 2)
    small = local.size == 0 or local.max() <= np.iinfo(np.uint16).max
    return {
        "atoms": np.frombuffer(bytes(atoms), dtype=np.uint8).reshape(-1, len(ATOM_SIZES)),
        "atom_ptr": np.cumsum(atom_counts, dtype=np.int64),
        "edges": local.astype(np.uint16) if small else local,
        "bonds": np.frombuffer(bytes(bonds), dtype=np.uint8).reshape(-1, len(BOND_SIZES)),
        "edge_ptr": np.cumsum(edge_counts, dtype=np.int64),
    }


class _Lookup:
    """Indices of feature values. RDKit enumerations are looked up as objects: names are slow to make."""

    def __init__(self) -> None:
        from rdkit import Chem

        enums = {
            "chirality": Chem.ChiralType,
            "hybridisation": Chem.HybridizationType,
            "bond type": Chem.BondType,
            "stereo": Chem.BondStereo,
        }
        self.tables: dict[str, dict[object, int]] = {}
        for name, values in (_ATOM_VALUES | _BOND_VALUES).items():
            enum = enums.get(name)
            self.tables[name] = _index(tuple(getattr(enum, str(v)) for v in values) if enum else values)

    def append(self, molecule: Mol, atoms: bytearray, edges: list[int], bonds: bytearray) -> tuple[int, int]:
        """Add one molecule's rows to the flat arrays; returns its atoms and directed edges."""
        t = self.tables
        number, chirality, degree, charge = (
            t["atomic number"],
            t["chirality"],
            t["degree"],
            t["formal charge"],
        )
        hydrogens, radicals, hybrid = t["hydrogens"], t["radical electrons"], t["hybridisation"]
        other_atom = [size - 2 for size in ATOM_SIZES]
        other_bond = [size - 2 for size in BOND_SIZES]
        for atom in molecule.GetAtoms():
            atoms += bytes(
                (
                    number.get(atom.GetAtomicNum(), other_atom[0]),
                    chirality.get(atom.GetChiralTag(), other_atom[1]),
                    degree.get(atom.GetTotalDegree(), other_atom[2]),
                    charge.get(atom.GetFormalCharge(), other_atom[3]),
                    hydrogens.get(atom.GetTotalNumHs(), other_atom[4]),
                    radicals.get(atom.GetNumRadicalElectrons(), other_atom[5]),
                    hybrid.get(atom.GetHybridization(), other_atom[6]),
                    atom.GetIsAromatic(),
                    atom.IsInRing(),
                )
            )
        for bond in molecule.GetBonds():
            row = bytes(
                (
                    t["bond type"].get(bond.GetBondType(), other_bond[0]),
                    t["stereo"].get(bond.GetStereo(), other_bond[1]),
                    bond.GetIsConjugated(),
                )
            )
            begin, end = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
            edges += (begin, end, end, begin)
            bonds += row + row
        return molecule.GetNumAtoms(), 2 * molecule.GetNumBonds()


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
