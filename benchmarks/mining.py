"""Hard negatives for many queries: time, memory and the recall that is stated, beside the exact answer on a sample.

    python benchmarks/mining.py                                  # 5,000 x 5,000 x 384, a check
    python benchmarks/mining.py --rows 100000 --threads 2        # the bar: under 2 minutes at recall .99

Vectors lie around 2,000 centres, as those of texts do; ``--scattered`` takes none, where an index is of no use.
"""

from __future__ import annotations

import argparse
import resource
import time

import faiss
import numpy as np

from nearfar.mining import mine_negatives


def vectors(rows: int, dim: int, centres: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents, and a query near each."""
    rng = np.random.default_rng(seed)
    middle = rng.standard_normal((centres, dim), dtype=np.float32)
    corpus = 0.7 * rng.standard_normal((rows, dim), dtype=np.float32)
    if centres > 1:
        corpus += middle[rng.integers(centres, size=rows)]
    return corpus + 0.5 * rng.standard_normal((rows, dim), dtype=np.float32), corpus


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--ranks", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recall", type=float, default=0.99)
    parser.add_argument("--scattered", action="store_true")
    given = parser.parse_args()
    faiss.omp_set_num_threads(given.threads)
    queries, corpus = vectors(given.rows, given.dim, 1 if given.scattered else 2000, 0)
    began = time.perf_counter()
    mined = mine_negatives(
        queries, corpus, per_query=5, rank_range=(0, given.ranks), margin=0.05, min_recall=given.recall
    )
    seconds = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = f"{given.rows:,} x {given.rows:,} x {given.dim}, {given.threads} threads"
    print(f"{size}: {seconds:.1f} s, {memory:.2f} GiB at most")
    print("\n".join(mined.summary()))
    sample = np.random.default_rng(1).choice(given.rows, min(500, given.rows), replace=False)
    exact = mine_negatives(
        queries[sample], corpus, sample, per_query=5, rank_range=(0, given.ranks), margin=0.05, min_recall=1.0
    )
    pairs = zip(mined.negatives[sample], exact.negatives, strict=True)
    same = np.mean([np.isin(truth, ours).mean() for ours, truth in pairs])
    print(f"of {len(sample)} queries, {same:.2%} of the negatives are those of an exact search")


if __name__ == "__main__":
    main()
