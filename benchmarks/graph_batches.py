"""Batches of molecule graphs: GraphTable's index arithmetic beside torch_geometric's Batch.from_data_list.

    OMP_NUM_THREADS=1 python benchmarks/graph_batches.py [--molecules 5000] [--repeats 7]

Both make the same tensors (checked first) from molecules that are featurised beforehand; the time is that of
assembling one epoch of batches, the median over the repeats, the two taking turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Batch

from nearfar.data.molecules.pairs import load_embedded
from nearfar.models.molecules.graph import GraphTable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--molecules", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    smiles = load_embedded(options.molecules).splits["train"].texts("molecule")
    started = time.perf_counter()
    table = GraphTable.from_smiles(smiles, cache=False)
    seconds = time.perf_counter() - started
    print(f"featurised {len(table)} molecules in {seconds:.2f} s ({1e3 * seconds / len(table):.3f} ms each)")
    graphs = [table.to_data(i) for i in range(len(table))]
    stored = sum(a.nbytes for a in (table.atoms, table.atom_ptr, table.edges, table.bonds, table.edge_ptr))
    print(f"table: {stored / 2**20:.1f} MiB, {stored / len(table):.0f} bytes per molecule")

    order = np.random.default_rng(0).permutation(len(table))
    print(f"\n{'batch':>6} {'GraphTable':>12} {'from_data_list':>15} {'ratio':>7}   (ms per batch, median)")
    for size in (32, 64, 256, 1024):
        batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        ours, theirs = table.batch(batches[0]), from_list(graphs, batches[0])
        for name in ("x", "edge_index", "edge_attr", "batch"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(options.repeats):
            times["ours"].append(per_batch(table.batch, batches))
            times["theirs"].append(per_batch(lambda chosen: from_list(graphs, chosen), batches))
        a, b = (1e3 * statistics.median(times[name]) for name in ("ours", "theirs"))
        print(f"{size:>6} {a:>12.3f} {b:>15.3f} {b / a:>6.1f}×")


def from_list(graphs: list[Any], chosen: np.ndarray) -> Any:
    return Batch.from_data_list([graphs[i] for i in chosen])


def per_batch(make: Callable[[np.ndarray], Any], batches: list[np.ndarray]) -> float:
    started = time.perf_counter()
    for chosen in batches:
        make(chosen)
    return (time.perf_counter() - started) / len(batches)


if __name__ == "__main__":
    main()
