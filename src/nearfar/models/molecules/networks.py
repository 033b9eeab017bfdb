"""Networks over molecules: a perceptron over fingerprints, and a transformer along the bonds of graphs."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar.errors import NearfarError
from nearfar.models.molecules.graph import ATOM_SIZES, BOND_SIZES, GraphBatch, MoleculeField

__all__ = ["FingerprintEncoder", "GraphTransformer", "MoleculeEncoder"]


class FingerprintEncoder(nn.Module):
    """Fingerprints (counts, bits or squashed descriptors) to vectors by a multilayer perceptron.

    Args:
        in_dim: length of a fingerprint.
        hidden: width of the hidden layers.
        out_dim: length of a molecule's vector.
        layers: linear layers, at least 1.
        dropout: after every hidden layer.
        input_dropout: share of the substructures hidden from the network in every step.

    Counts enter as sign(x) · log(1 + |x|), so that a chain of forty atoms does not drown the rest; bits are
    only scaled. Input dropout hides substructures at random, so that no single one may carry a molecule: on a
    few thousand molecules it helps in both directions of retrieval (docs/experiments/molecules.md).

    >>> encoder = FingerprintEncoder(2048, hidden=64, out_dim=16)
    >>> encoder(torch.ones(3, 2048)).shape
    torch.Size([3, 16])
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int = 1024,
        out_dim: int = 512,
        layers: int = 2,
        dropout: float = 0.4,
        input_dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise NearfarError(f"FingerprintEncoder: layers must be at least 1, got {layers}.")
        for name, p in (("dropout", dropout), ("input_dropout", input_dropout)):
            if not 0 <= p < 1:
                raise NearfarError(f"FingerprintEncoder: {name} is a probability from 0 to below 1, got {p}.")
        modules: list[nn.Module] = [nn.Dropout(input_dropout)]
        width = in_dim
        for _ in range(layers - 1):
            modules += [nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(dropout)]
            width = hidden
        self.in_dim, self.width = in_dim, out_dim
        self.network = nn.Sequential(*modules, nn.Linear(width, out_dim))

    def forward(self, fingerprint: Float[Tensor, "molecules in"]) -> Float[Tensor, "molecules out"]:
        if fingerprint.shape[-1] != self.in_dim:
            raise NearfarError(
                f"The fingerprint encoder takes {self.in_dim} numbers per molecule, not "
                f"{fingerprint.shape[-1]}; the model was made for other fingerprint options."
            )
        return self.network(torch.sign(fingerprint) * torch.log1p(fingerprint.abs()))


_DEGREES = 9  # distinguished numbers of bonds of an atom; more than 8 count as 8


class GraphTransformer(nn.Module):
    """Molecules as graphs to vectors: attention along bonds, then over the atoms of each molecule.

    An atom starts as the sum of the embeddings of its nine features and of its degree. Every layer lets it
    attend to its neighbours, where the bond is part of key and value (pre-normalised, with a residual). The
    molecule is read off twice: as an attention-weighted mean, which says what is there, and as a sum, which
    says how much of it: a mean alone cannot tell hexadecanoic from octadecanoic acid.

    Args:
        dim: width, a multiple of ``heads``.
        layers, heads: of the graph attention.
        out_dim: length of a molecule's vector.
        dropout: on attention weights, after every layer and in the output network.

    A molecule's vector depends neither on the order of its atoms nor, in eval mode, on the other molecules of
    the batch. A molecule without bonds is served by its own atoms alone.

    >>> from nearfar.models.molecules.graph import GraphTable
    >>> molecules = GraphTable.from_smiles(["CCO", "[Na+].[Cl-]"], cache=False)
    >>> GraphTransformer(dim=32, layers=2, heads=2, out_dim=8)(molecules.batch([0, 1])).shape
    torch.Size([2, 8])
    """

    def __init__(
        self, dim: int = 128, layers: int = 4, heads: int = 4, out_dim: int = 256, dropout: float = 0.1
    ) -> None:
        super().__init__()
        from torch_geometric.nn import TransformerConv

        if dim % heads:
            raise NearfarError(
                f"The graph transformer's width {dim} must be a multiple of its {heads} heads."
            )
        self.width = out_dim
        self.atoms = CategoricalSum(ATOM_SIZES, dim)
        self.degree = nn.Embedding(_DEGREES, dim)
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for _ in range(layers):
            conv = TransformerConv(dim, dim // heads, heads=heads, edge_dim=dim, dropout=dropout)
            conv.lin_edge = BondTable(dim)
            self.convs.append(conv)
            self.norms.append(nn.LayerNorm(dim))
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, heads)
        self.dropout = nn.Dropout(dropout)
        self.activation = nn.GELU()
        self.readout = nn.Sequential(
            nn.LayerNorm(2 * dim),
            nn.Linear(2 * dim, 2 * dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * dim, out_dim),
        )

    def forward(self, graph: GraphBatch) -> Float[Tensor, "molecules out"]:
        edge_index = graph.edge_index
        bonds = bond_codes(graph.edge_attr)
        degree = torch.bincount(edge_index[1], minlength=len(graph.x)).clamp(max=_DEGREES - 1)
        atoms = self.atoms(graph.x) + self.degree(degree)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            atoms = atoms + self.dropout(self.activation(conv(norm(atoms), edge_index, bonds)))
        return self.readout(self._pool(self.norm(atoms), graph.batch, graph.num_graphs))

    def _pool(
        self, atoms: Float[Tensor, "atoms dim"], molecule: Int[Tensor, " atoms"], count: int
    ) -> Float[Tensor, "molecules 2*dim"]:
        """Attention-weighted mean (each head weighs its share of the width) beside a sum."""
        from torch_geometric.utils import scatter, softmax

        weight = softmax(self.gate(atoms), molecule, num_nodes=count)
        heads = atoms.unflatten(1, (weight.shape[1], atoms.shape[1] // weight.shape[1]))
        weighted = (heads * weight.unsqueeze(-1)).flatten(1)
        mean = scatter(weighted, molecule, dim=0, dim_size=count, reduce="sum")
        # Divided by the root of a usual size, so that both halves start at the same order of magnitude.
        total = scatter(atoms, molecule, dim=0, dim_size=count, reduce="sum") / math.sqrt(30)
        return torch.cat([mean, total], dim=1)


class CategoricalSum(nn.Module):
    """Sum of one embedding per categorical column, looked up in a single table."""

    offsets: Tensor

    def __init__(self, sizes: tuple[int, ...], dim: int) -> None:
        super().__init__()
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.register_buffer("offsets", starts, persistent=False)
        self.table = nn.EmbeddingBag(sum(sizes), dim, mode="sum")
        nn.init.normal_(self.table.weight, std=1 / math.sqrt(len(sizes)))

    def forward(self, values: Int[Tensor, "n columns"]) -> Float[Tensor, "n dim"]:
        return self.table(values + self.offsets)


class BondTable(nn.Module):
    """Vectors of bonds by their code. There are fewer kinds of bond than bonds, so each kind is made once.

    It stands where ``TransformerConv`` has a linear map of edge vectors and costs a look-up instead of a
    product.
    """

    kinds: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        axes = [torch.arange(size) for size in BOND_SIZES]
        self.register_buffer("kinds", torch.cartesian_prod(*axes), persistent=False)
        self.features = CategoricalSum(BOND_SIZES, dim)

    def forward(self, codes: Int[Tensor, " edges"]) -> Float[Tensor, "edges dim"]:
        return self.features(self.kinds).index_select(0, codes)


def bond_codes(bonds: Int[Tensor, "edges 3"]) -> Int[Tensor, " edges"]:
    """The kind of each bond as one number: its position in the product of the three features.

    >>> bond_codes(torch.tensor([[0, 0, 1], [0, 1, 0]])).tolist()
    [1, 4]
    """
    _, second, third = BOND_SIZES
    return (bonds[:, 0] * second + bonds[:, 1]) * third + bonds[:, 2]


class MoleculeEncoder(nn.Module):
    """A batch's molecules to vectors, by a network over their graphs, one over their fingerprints, or the sum of both.

    >>> encoder = MoleculeEncoder(None, FingerprintEncoder(64, hidden=32, out_dim=16))
    >>> encoder(MoleculeField(None, torch.ones(3, 64))).shape, encoder.width
    (torch.Size([3, 16]), 16)
    """

    def __init__(self, graph: GraphTransformer | None, fingerprint: FingerprintEncoder | None) -> None:
        super().__init__()
        widths = {network.width for network in (graph, fingerprint) if network is not None}
        if len(widths) != 1:
            raise NearfarError(
                f"the networks over graphs and fingerprints give vectors of {sorted(widths)} numbers; one length is "
                "needed"
            )
        self.graph, self.fingerprint = graph, fingerprint
        self.width = widths.pop()

    def forward(self, molecules: MoleculeField) -> Float[Tensor, "molecules width"]:
        parts: list[Tensor] = []
        if self.graph is not None:
            if molecules.graph is None:
                raise NearfarError("this molecule encoder reads graphs, and the batch has none.")
            parts.append(self.graph(molecules.graph))
        if self.fingerprint is not None:
            if molecules.fingerprint is None:
                raise NearfarError("this molecule encoder reads fingerprints, and the batch has none.")
            parts.append(self.fingerprint(molecules.fingerprint))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
