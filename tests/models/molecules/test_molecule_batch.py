"""Batches of molecules: aligned with their split, taken apart without loss, masked as the draw says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("rdkit")

from nearfar.data.batch import Batch, Draw, ItemDataset, Rows
from nearfar.errors import NearfarError
from nearfar.models.molecules.fingerprint import FingerprintSpec, compute_fingerprints
from nearfar.models.molecules.graph import (
    ATOM_SIZES,
    BOND_SIZES,
    GraphBatch,
    GraphTable,
    MoleculeField,
    MoleculeMasking,
    Molecules,
)

SMILES = ["CCO", "c1ccccc1C(=O)O", "[Na+].[Cl-]", "C", "C/C=C/C", "N[C@@H](C)C(=O)[O-]", "CC(C)(C)C", "O"]
SPEC = FingerprintSpec(n_bits=64)


def molecules(graphs: bool = True, fingerprints: bool = True) -> Molecules:
    return Molecules.from_smiles(SMILES, graphs, SPEC if fingerprints else None, cache=False)


def same_graph(one: GraphBatch, other: GraphBatch) -> bool:
    names = ("x", "edge_index", "edge_attr", "batch")
    return one.num_graphs == other.num_graphs and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in names
    )


def test_a_batch_holds_the_molecules_at_its_positions():
    batch = molecules().batch(torch.tensor([5, 0, 2]))
    assert len(batch) == len(batch.graph) == 3
    for row, position in enumerate([5, 0, 2]):
        alone = GraphTable.from_smiles([SMILES[position]], cache=False).batch([0])
        assert torch.equal(batch.graph.x[batch.graph.batch == row], alone.x)
        expected = compute_fingerprints([SMILES[position]], SPEC, cache=False)[0]
        np.testing.assert_array_equal(batch.fingerprint[row].numpy(), expected)
    assert batch.fingerprint.dtype == torch.float32
    moved = batch.to("meta")
    assert moved.graph.x.device.type == moved.fingerprint.device.type == "meta"


@pytest.mark.parametrize(("graphs", "fingerprints"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_the_parts_of_a_batch_are_batches_of_its_parts(graphs, fingerprints, rows):
    every = molecules(graphs, fingerprints)
    order = torch.tensor([3, 1, 2, 0, 7, 6, 5, 4])
    parts = every.batch(order).split(rows)
    assert [len(part) for part in parts] == [len(some) for some in order.split(rows)]
    for part, some in zip(parts, order.split(rows), strict=True):
        own = every.batch(some)
        assert (part.graph is None) == (own.graph is None) == (not graphs)
        assert own.graph is None or same_graph(part.graph, own.graph)
        assert own.fingerprint is None or torch.equal(part.fingerprint, own.fingerprint)


def slow_masking(graph: GraphBatch, atoms: float, bonds: float, generator: torch.Generator) -> GraphBatch:
    """One atom and one bond at a time, with the draws of ``torch.rand`` in their order."""
    x, edges = graph.x.clone(), graph.edge_attr.clone()
    for i, value in enumerate(torch.rand(len(x), generator=generator).tolist() if atoms else []):
        if value < np.float32(atoms):
            x[i] = torch.tensor([size - 1 for size in ATOM_SIZES])
    for i, value in enumerate(torch.rand(len(edges) // 2, generator=generator).tolist() if bonds else []):
        if value < np.float32(bonds):
            edges[2 * i : 2 * i + 2] = torch.tensor([size - 1 for size in BOND_SIZES])
    return GraphBatch(x, graph.edge_index, edges, graph.batch, graph.num_graphs)


@pytest.mark.parametrize(("atoms", "bonds"), [(0.3, 0.0), (0.0, 0.3), (0.3, 0.4)])
def test_masking_follows_its_draw_alone(atoms, bonds):
    dataset = ItemDataset(
        {"molecules": molecules(), "x": Rows(np.arange(8))},
        MoleculeMasking("molecules", atoms, bonds),
        seed=4,
    )

    def draw(epoch: int, positions: list[int]) -> GraphBatch:
        dataset.set_epoch(epoch)
        batch = dataset.__getitems__(positions)
        assert batch.tensor("x").tolist() == positions
        return batch["molecules"].graph

    positions = [6, 1, 5, 0]
    first = draw(3, positions)
    torch.rand(7)  # the global generator plays no part
    draw(4, [2, 3])
    assert same_graph(first, draw(3, positions))
    assert not same_graph(first, draw(4, positions))
    plain = molecules().batch(torch.tensor(positions)).graph
    assert same_graph(first, slow_masking(plain, atoms, bonds, Draw(4, 3, 6).torch()))
    dataset.seed = 5
    assert not same_graph(first, draw(3, positions))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_change_nothing(workers):
    dataset = ItemDataset({"m": molecules()}, MoleculeMasking("m", 0.3, 0.3))
    options = {"batch_sampler": [[0, 1, 2], [3, 4], [5, 6, 7]], "collate_fn": lambda batch: batch}
    parallel = torch.utils.data.DataLoader(dataset, num_workers=workers, persistent_workers=True, **options)
    plain = torch.utils.data.DataLoader(dataset, **options)
    for epoch in (0, 1):  # the epoch must reach processes that are already running
        dataset.set_epoch(epoch)
        for one, other in zip(plain, parallel, strict=True):
            assert same_graph(one["m"].graph, other["m"].graph)


def test_messages():
    with pytest.raises(NearfarError, match="graphs, fingerprints or both"):
        Molecules()
    with pytest.raises(NearfarError, match="8 graphs and 2 fingerprints"):
        Molecules(GraphTable.from_smiles(SMILES, cache=False), np.zeros((2, 4), np.uint8))
    with pytest.raises(NearfarError, match="below 1"):
        MoleculeMasking("m", atoms=1.0)
    masking, prints = MoleculeMasking("m", 0.1), molecules(graphs=False).batch(torch.tensor([0]))
    for field in (prints, torch.zeros(1)):
        with pytest.raises(NearfarError, match="'m' of this batch has none"):
            masking(Batch(torch.tensor([0]), {"m": field}), Draw(0, 0, 0))
    assert len(MoleculeField(None, None)) == 0
