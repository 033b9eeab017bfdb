"""Exact neighbour search side by side with scikit-learn and a blocked product with top-k; the index's recall.

    python benchmarks/neighbors.py                     # 10,000 x 384, k = 100
    python benchmarks/neighbors.py --approximate       # 100,000 x 64, clustered and not, recall by probes

The blocked product is what sentence-transformers' semantic search does, without its Python lists of
dictionaries; that search itself is timed where the package is installed.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import torch
from samplers import clustered_vectors

from nearfar.batching import nearest_neighbors


def blocked_top_k(x: torch.Tensor, k: int, block: int = 1024) -> np.ndarray:
    """Blocks of the similarity matrix, then ``topk``."""
    found = [torch.topk(x[at : at + block] @ x.T, k + 1, dim=1).indices for at in range(0, len(x), block)]
    return torch.cat(found)[:, 1:].numpy()


def sklearn_search(x: np.ndarray, k: int) -> np.ndarray:
    """scikit-learn's brute force on unit vectors: Euclidean order is cosine order."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(x).kneighbors(return_distance=False)


def sentence_transformers_search(x: np.ndarray, k: int) -> np.ndarray:
    """sentence-transformers' semantic search."""
    from sentence_transformers.util import semantic_search

    t = torch.from_numpy(x)
    return np.array([[hit["corpus_id"] for hit in hits[1:]] for hits in semantic_search(t, t, top_k=k + 1)])


def row(
    name: str, work: Callable[[], np.ndarray], truth: np.ndarray | None, repeats: int
) -> np.ndarray | None:
    """Time a search and count its agreement with the first one."""
    seconds = []
    try:
        for _ in range(repeats):
            began = time.perf_counter()
            found = work()
            seconds.append(time.perf_counter() - began)
    except ImportError as error:
        print(f"{name:34} {error}")
        return None
    same = (
        1.0 if truth is None else np.mean([np.isin(a, b).mean() for a, b in zip(found, truth, strict=True)])
    )
    print(f"{name:34} {min(seconds):8.2f} {np.median(seconds):8.2f}  {same:9.4f}", flush=True)
    return found


def exact(n: int, d: int, k: int, repeats: int) -> None:
    """The table of exact searches."""
    x = np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    print(f"{n} x {d}, k = {k}, {torch.get_num_threads()} threads")
    print(f"{'':34} {'least s':>8} {'median s':>8}  {'agreement':>9}")
    truth = row("nearest_neighbors", lambda: nearest_neighbors(x, k, exact=True).indices, None, repeats)
    row("blocked product + topk (torch)", lambda: blocked_top_k(torch.from_numpy(x), k), truth, repeats)
    row("scikit-learn", lambda: sklearn_search(x, k), truth, repeats)
    row("sentence-transformers", lambda: sentence_transformers_search(x, k), truth, 1)
    tracemalloc.start()
    nearest_neighbors(x, k, exact=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"memory: {peak / 2**20:.0f} MiB of arrays at peak; the answer has {n * k * 8 / 2**20:.0f}, the "
          f"n x n matrix would have {n * n * 4 / 2**20:.0f} MiB")  # fmt: skip


def approximate(n: int, d: int, k: int) -> None:
    """What the index does on vectors with and without clusters."""
    for name, x in (
        ("clustered", clustered_vectors(n, d)),
        ("unclustered", np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)),
    ):
        began = time.perf_counter()
        near = nearest_neighbors(x, k)
        print(
            f"{name:12} {n} x {d}, k = {k}: {time.perf_counter() - began:.1f} s, {near.index}, "
            f"recall {near.recall:.4f}, exact {near.exact}",
            flush=True,
        )


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int)
    parser.add_argument("--dims", type=int)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--approximate", action="store_true")
    args = parser.parse_args()
    if args.approximate:
        approximate(args.items or 100_000, args.dims or 64, args.k)
    else:
        exact(args.items or 10_000, args.dims or 384, args.k, args.repeats)


if __name__ == "__main__":
    main()
