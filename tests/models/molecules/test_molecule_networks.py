"""Networks over molecules: what a molecule's vector may depend on, and that everything learns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nearfar.errors import NearfarError

pytest.importorskip("torch_geometric")
pytest.importorskip("rdkit")

from nearfar.models.molecules.graph import ATOM_SIZES, BOND_SIZES, GraphBatch, GraphTable, MoleculeField
from nearfar.models.molecules.networks import (
    BondTable,
    FingerprintEncoder,
    GraphTransformer,
    MoleculeEncoder,
    bond_codes,
)

# Rings, stereo centres, a salt in two pieces, a single atom, a double bond with geometry, a charge.
SMILES = ["CCO", "c1ccccc1C(=O)O", "[Na+].[Cl-]", "C", "C/C=C/C", "N[C@@H](C)C(=O)[O-]", "CC(C)(C)C", "O"]


@pytest.fixture(scope="module")
def table() -> GraphTable:
    return GraphTable.from_smiles(SMILES, cache=False)


def seeded(make):
    """The network that ``make`` builds, from fixed weights, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


@pytest.fixture(scope="module")
def network() -> GraphTransformer:
    return seeded(lambda: GraphTransformer(dim=32, layers=3, heads=4, out_dim=16)).eval()


def molecules_of(table: GraphTable, positions: list[int]) -> MoleculeField:
    generator = torch.Generator().manual_seed(1)
    fingerprints = torch.randint(0, 4, (len(table), 40), generator=generator).float()
    return MoleculeField(table.batch(positions), fingerprints[positions])


def encoder_of(kind: str) -> MoleculeEncoder:
    graph = GraphTransformer(16, 2, 2, 16) if kind != "fingerprint" else None
    return MoleculeEncoder(graph, FingerprintEncoder(40, 64, 16) if kind != "graph" else None)


def permuted(graph: GraphBatch, seed: int) -> GraphBatch:
    """The same molecules with all atoms renumbered (also across molecules) and all bonds shuffled."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(graph.x), generator=generator)
    place = torch.argsort(order)
    bonds = torch.randperm(graph.edge_index.shape[1], generator=generator)
    return GraphBatch(
        graph.x[order],
        place[graph.edge_index[:, bonds]],
        graph.edge_attr[bonds],
        graph.batch[order],
        graph.num_graphs,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_order_of_atoms_and_bonds_does_not_matter(network, table, seed):
    graph = table.batch(range(len(table)))
    torch.testing.assert_close(network(permuted(graph, seed)), network(graph), atol=2e-6, rtol=1e-5)


def test_a_molecule_does_not_depend_on_its_batch_mates(network, table):
    together = network(table.batch(range(len(table))))
    for i in range(len(table)):
        torch.testing.assert_close(network(table.batch([i]))[0], together[i], atol=2e-6, rtol=1e-5)


def test_single_atoms_and_no_bonds_at_all(network, table):
    alone = [SMILES.index("C"), SMILES.index("O")]
    out = network(table.batch(alone))
    assert torch.isfinite(out).all()
    assert not torch.allclose(out[0], out[1])


def test_empty_batch(network, table):
    assert network(table.batch([])).shape == (0, 16)


def test_graphs_that_must_differ():
    pairs = [("CCCCCCCC", "CCCCCCCCCC"), ("C/C=C/C", "C/C=C\\C"), ("CC(=O)O", "CC(=O)[O-]"), ("CCO", "CCN")]
    flat = list(itertools.chain(*pairs))
    network = seeded(lambda: GraphTransformer(dim=32, layers=3, heads=4, out_dim=16)).eval()
    out = network(GraphTable.from_smiles(flat, cache=False).batch(range(len(flat))))
    for i in range(len(pairs)):
        assert (out[2 * i] - out[2 * i + 1]).abs().max() > 1e-3, pairs[i]


def test_bond_table_is_the_sum_of_three_embeddings():
    table = seeded(lambda: BondTable(8))
    bonds = torch.cartesian_prod(*(torch.arange(size) for size in BOND_SIZES))
    weight, starts = table.features.table.weight, np.cumsum([0, *BOND_SIZES[:-1]])
    expected = sum(weight[bonds[:, column] + int(starts[column])] for column in range(3))
    torch.testing.assert_close(table(bond_codes(bonds)), expected)


def test_largest_feature_values_are_in_the_tables(network):
    x = torch.tensor([ATOM_SIZES, ATOM_SIZES]) - 1
    graph = GraphBatch(
        x,
        torch.tensor([[0, 1], [1, 0]]),
        torch.tensor([BOND_SIZES, BOND_SIZES]) - 1,
        torch.zeros(2, dtype=torch.long),
        1,
    )
    assert torch.isfinite(network(graph)).all()


@pytest.mark.parametrize("kind", ["graph", "fingerprint", "both"])
def test_gradients_reach_every_parameter(table, kind):
    encoder = seeded(lambda: encoder_of(kind))
    vectors = encoder(molecules_of(table, list(range(len(table)))))
    assert vectors.shape == (len(table), encoder.width)
    targets = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(2))
    torch.nn.functional.cross_entropy(vectors @ targets.T, torch.arange(len(table))).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # A bias of the attention's keys shifts all scores of an atom alike, so softmax takes it out exactly;
        # so does the bias of the pooling gate.
        if not name.endswith(("lin_key.bias", "gate.bias")):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["graph", "fingerprint", "both"])
def test_state_dict_round_trip(table, kind):
    first, second = seeded(lambda: encoder_of(kind)).eval(), encoder_of(kind).eval()
    second.load_state_dict(first.state_dict())
    batch = molecules_of(table, [2, 0, 5])
    assert torch.equal(first(batch), second(batch))


def test_both_is_the_sum_of_the_two_encoders(table):
    encoder = seeded(lambda: encoder_of("both")).eval()
    batch = molecules_of(table, [0, 1, 4])
    torch.testing.assert_close(
        encoder(batch), encoder.graph(batch.graph) + encoder.fingerprint(batch.fingerprint)
    )


def test_fingerprints_enter_through_a_signed_logarithm():
    encoder = seeded(lambda: FingerprintEncoder(5, 8, 3)).eval()
    values = torch.tensor([[0.0, 1.0, 255.0, -2.0, 0.5]])
    squashed = torch.tensor([[0.0, np.log(2), np.log(256), -np.log(3), np.log(1.5)]], dtype=torch.float32)
    torch.testing.assert_close(encoder(values), encoder.network(squashed))


def test_input_dropout_acts_in_training_alone():
    encoder = seeded(lambda: FingerprintEncoder(64, 8, 3, dropout=0.0, input_dropout=0.5))
    values = torch.ones(1, 64)
    assert not torch.equal(encoder(values), encoder(values))
    encoder.eval()
    assert torch.equal(encoder(values), encoder(values))


def test_messages(table):
    with pytest.raises(NearfarError, match="multiple"):
        GraphTransformer(dim=30, heads=4)
    with pytest.raises(NearfarError, match="40 numbers"):
        FingerprintEncoder(40)(torch.zeros(2, 41))
    with pytest.raises(NearfarError, match=r"vectors of \[8, 16\] numbers"):
        MoleculeEncoder(GraphTransformer(16, 1, 2, 16), FingerprintEncoder(40, 8, 8))
    batch, encoder = molecules_of(table, [0, 1]), encoder_of("both")
    with pytest.raises(NearfarError, match="reads graphs"):
        encoder(MoleculeField(None, batch.fingerprint))
    with pytest.raises(NearfarError, match="reads fingerprints"):
        encoder(MoleculeField(batch.graph, None))
