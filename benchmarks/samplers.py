"""Planning time and hardness of the samplers, side by side with k-means and (where installed) METIS.

Vectors: max(50, n/1000) Gaussian centres in 12 dimensions, each item 0.7 sigma around one, times a random
12 x d matrix, tanh, plus 0.1 noise, unit length. Hardness: how many of an item's 100 nearest neighbours share
its batch of 1,024.

    python benchmarks/samplers.py                      # 100,000 items, d = 64
    python benchmarks/samplers.py --items 1000000 --dims 32 --neighbors neighbours.npy
    python benchmarks/samplers.py --depletion          # the numbers of the notes: N = 4000, B = 32

`--neighbors` keeps the neighbour list between runs: searching takes longer than everything that is measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nearfar.batching import (
    BalancedBatchSampler,
    HardNegativeSampler,
    Layout,
    Neighbors,
    PartitionBatchSampler,
    Plan,
    RandomBatchSampler,
    measure_hardness,
    nearest_neighbors,
)


def clustered_vectors(n: int, d: int, seed: int = 0) -> np.ndarray:
    """The vectors described above, (n, d) float32."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(50, n // 1000), 12))
    x = centres[rng.integers(len(centres), size=n)] + 0.7 * rng.standard_normal((n, 12))
    y = (np.tanh(x @ rng.standard_normal((12, d))) + 0.1 * rng.standard_normal((n, d))).astype(np.float32)
    return y / np.linalg.norm(y, axis=1, keepdims=True)


def report(name: str, seconds: float, plans: list[Plan], near: Neighbors) -> None:
    """One row: time to plan, and hardness averaged over the plans."""
    found = [measure_hardness(plan, near) for plan in plans]
    level = [r.last_to_first for r in found]
    share = found[0].hard_share
    print(
        f"{name:38} {seconds:8.4f}  {np.mean([r.neighbors for r in found]):8.2f}  {np.mean(level):6.2f} "
        f"{min(level):6.2f}  {'' if share is None else f'{share:.3f}':>6}",
        flush=True,
    )


def best_of(work: Callable[[], object], repeats: int) -> float:
    """The least of several timings: the machine may be shared."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def balanced_plan(label: np.ndarray, batch_size: int) -> Plan:
    """Clusters of any size cut into batches in cluster order: what k-means needs to become a sampler."""
    return Plan(Layout(len(label), batch_size), np.argsort(label, kind="stable").astype(np.int32))


def compare(vectors: np.ndarray, near: Neighbors, batch_size: int, epochs: int) -> None:
    """The table of samplers and alternatives."""
    n, k = near.n, min(100, near.k)
    print(f"{n} items, {near.k} neighbours ({near.index}, recall {near.recall}), batches of {batch_size}")
    print(f"{'':38} {'seconds':>8}  {'hardness':>8}  {'last/first tenth':>13}  {'hard':>6}")
    print(f"{'':38} {'to plan':>8}  {'':8}  {'mean':>6} {'least':>6}  {'share':>6}")
    samplers = {
        "random": lambda: RandomBatchSampler(n, batch_size),
        "balanced, classes of 2": lambda: BalancedBatchSampler(
            np.arange(n) % (n // 2), batch_size, repeat=True
        ),
        "hard, level, ratio 0.5, groups of 64": lambda: HardNegativeSampler(near, batch_size, 0.5, k),
        "hard, level, ratio 1, groups of 64": lambda: HardNegativeSampler(near, batch_size, 1.0, k),
        "hard, greedy, ratio 1, groups of 64": lambda: HardNegativeSampler(
            near, batch_size, 1.0, k, order="greedy", group_size=64
        ),
        "partition": lambda: PartitionBatchSampler(near, batch_size),
        "partition, groups of 64": lambda: PartitionBatchSampler(near, batch_size, group_size=64),
    }
    for name, make in samplers.items():
        began = time.perf_counter()
        sampler = make()
        built = time.perf_counter() - began
        next(iter(sampler))  # compiled here, or read from the cache
        seconds = best_of(lambda s=sampler: next(iter(s)), 2 * epochs)
        report(name, seconds, [sampler.plan(epoch) for epoch in range(epochs)], near)
        if built > 0.01:
            print(f"{'  construction':38} {built:8.4f}")
    alternatives(vectors, near, batch_size)


def alternatives(vectors: np.ndarray, near: Neighbors, batch_size: int) -> None:
    """k-means on the vectors, METIS on the neighbour graph."""
    import faiss

    n, parts = near.n, -(-near.n // batch_size)
    began = time.perf_counter()
    means = faiss.Kmeans(vectors.shape[1], parts, niter=10, spherical=True, seed=1)
    means.train(vectors)
    label = means.index.search(vectors, 1)[1][:, 0]
    report(
        "k-means (10 rounds), cut into batches",
        time.perf_counter() - began,
        [balanced_plan(label, batch_size)],
        near,
    )
    try:
        import pymetis
    except ImportError:
        print("METIS: pymetis is not installed")
        return
    if n > 200_000:
        print("METIS: left out above 200,000 items (minutes)")
        return
    began = time.perf_counter()
    width = min(10, near.k)
    rows = np.repeat(np.arange(n), width)
    columns = near.indices[:, :width].ravel()
    pairs = np.unique(np.concatenate([rows * n + columns, columns.astype(np.int64) * n + rows]))
    starts = np.searchsorted(pairs, np.arange(n + 1) * n)
    _, label = pymetis.part_graph(parts, pymetis.CSRAdjacency(starts, pairs % n))
    seconds = time.perf_counter() - began
    report("METIS on 10 neighbours, cut", seconds, [balanced_plan(np.asarray(label), batch_size)], near)


def depletion() -> None:
    """Realised hard share per quarter of an epoch, N = 4000, B = 32, unclustered vectors."""
    near = nearest_neighbors(np.random.default_rng(0).standard_normal((4000, 64)), 100)
    print(f"{'k':>4} {'ratio':>6} {'order':>8}  realised per quarter          mean")
    for k, ratio in ((100, 0.5), (30, 0.8), (10, 0.5)):
        for order in ("greedy", "level"):
            r = HardNegativeSampler(near, 32, ratio, k, order=order).realised_hardness(sample=None)
            quarters = "  ".join(f"{share:.2f}" for share in r.hard_share_by_quarter or [])
            print(f"{k:4} {ratio:6} {order:>8}  {quarters}        {r.hard_share:.2f}")


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dims", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--neighbors", type=Path, help="indices as .npy: read if there, written otherwise")
    parser.add_argument("--depletion", action="store_true")
    args = parser.parse_args()
    if args.depletion:
        depletion()
        return
    vectors = clustered_vectors(args.items, args.dims)
    if args.neighbors and args.neighbors.exists():
        near = Neighbors(np.load(args.neighbors))
    else:
        began = time.perf_counter()
        near = nearest_neighbors(vectors, 100, min_recall=0.95)
        print(f"neighbour search: {time.perf_counter() - began:.1f} s")
        if args.neighbors:
            np.save(args.neighbors, near.indices)
    compare(vectors, near, args.batch_size, args.epochs)


if __name__ == "__main__":
    main()
