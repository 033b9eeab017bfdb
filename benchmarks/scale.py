"""What neighbours, samplers and mining cost from 10⁴ to millions of rows: seconds of a core for each row, and memory.

Vectors (float16, d = 128): n/1000 clusters in topics, in a cluster 12 dimensions of variation (.7) and noise in all
dimensions (.1): centres are the mean of a topic's and their own, times √2. Each size runs in a process of its own, with
one thread; memory is sampled: "own" is what the process allocates, "mapped" are pages of files, which the system takes
back when it needs them.

    python benchmarks/scale.py                                     # 10⁴, 10⁵, 10⁶ rows
    python benchmarks/scale.py --rows 5000000 --folder /data/tmp   # 25 minutes of a core, 8 GB of disk
    python benchmarks/scale.py --overlapping                       # harder: the vectors of benchmarks/samplers.py
    python benchmarks/scale.py --stream                            # windows of a stream beside the sampler in memory
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_BLOCK = 1 << 17


def clusters(n: int, d: int, seed: int = 0) -> Iterator[np.ndarray]:
    """The vectors described above, in blocks, float16."""
    rng = np.random.default_rng(seed)
    count = max(4, n // 1000)
    topics = rng.standard_normal((max(2, int(count**0.5)), d))
    centres = (topics[rng.integers(len(topics), size=count)] + rng.standard_normal((count, d))) / 2**0.5
    spread = rng.standard_normal((12, d)) / 12**0.5
    for begin in range(0, n, _BLOCK):
        size = min(_BLOCK, n - begin)
        x = centres[rng.integers(count, size=size)] + 0.7 * rng.standard_normal((size, 12)) @ spread
        yield (x + 0.1 * rng.standard_normal((size, d))).astype(np.float16)


def overlapping(n: int, d: int, seed: int = 0) -> Iterator[np.ndarray]:
    """The vectors of ``benchmarks/samplers.py``: centres in 12 dimensions, so that clusters overlap the more the more
    there are, and the nearest neighbours differ by noise in all dimensions."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(50, n // 1000), 12))
    wide = rng.standard_normal((12, d))
    for begin in range(0, n, _BLOCK):
        size = min(_BLOCK, n - begin)
        x = centres[rng.integers(len(centres), size=size)] + 0.7 * rng.standard_normal((size, 12))
        yield (np.tanh(x @ wide) + 0.1 * rng.standard_normal((size, d))).astype(np.float16)


class Memory:
    """The most memory between entering and leaving, in GB: of the process's own, and of mapped files."""

    def __enter__(self) -> Memory:
        self.own = self.mapped = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.own = max(self.own, int(lines["RssAnon"].split()[0]) / 1e6)
            self.mapped = max(self.mapped, int(lines["RssFile"].split()[0]) / 1e6)


def one(n: int, d: int, k: int, folder: Path, kind: str) -> dict[str, Any]:
    """One size."""
    from nearfar.batching import (
        HardNegativeSampler,
        PartitionBatchSampler,
        RandomBatchSampler,
        measure_hardness,
        nearest_neighbors_on_disk,
    )
    from nearfar.data.vector_shards import write_shards

    files = write_shards({"clusters": clusters, "overlapping": overlapping}[kind](n, d), folder / "shards")
    row: dict[str, Any] = {"rows": n, "dims": d, "k": k, "vectors": kind}
    with Memory() as memory:
        began, cpu = time.perf_counter(), time.process_time()
        near = nearest_neighbors_on_disk(files, k, folder / "near")
        row |= {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        row |= {
            "us": row["cpu"] / n * 1e6,
            "index": near.index,
            "recall": near.recall,
            "steps": near.head["seconds"],
        }
    row["neighbors_gb"] = (memory.own, memory.mapped)
    size = 1024 if n >= 100_000 else 128
    samplers = {
        "random": RandomBatchSampler(n, size),
        "hard": HardNegativeSampler(near, size, hard_ratio=1.0),
        "partition": PartitionBatchSampler(near, size),
    }
    for name, sampler in samplers.items():
        sampler.plan() if n <= 100_000 else None  # compiled code is loaded
        with Memory() as memory:
            cpu = time.process_time()
            plan = sampler.plan()
            planned = time.process_time() - cpu
        report = measure_hardness(plan, near, sample=20_000)
        row[name] = {
            "us": planned / n * 1e6, "gb": (memory.own, memory.mapped), "hardness": report.neighbors,
            "last_to_first": report.last_to_first,
        }  # fmt: skip
        del plan
    queries = np.load(files[0], mmap_mode="r")[:10_000].astype(np.float32)
    with Memory() as memory:
        cpu = time.process_time()
        near.search(queries, k)
        row["search_us"] = (time.process_time() - cpu) / len(queries) * 1e6
    row["search_gb"] = (memory.own, memory.mapped)
    return row


def table(rows: list[dict[str, Any]]) -> None:
    """The cost curve."""
    print("| rows | µs of a core for each row | recall | index | own / mapped GB | hard: µs, hardness, last/first | "
          "partition | search, µs for each query |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        plans = [
            f"{p['us']:.2f}, {p['hardness']:.1f}, {p['last_to_first']:.2f}"
            for p in (r["hard"], r["partition"])
        ]
        print(
            f"| {r['rows']:,} | {r['us']:.0f} | {r['recall']:.3f} | {r['index']} | "
            f"{r['neighbors_gb'][0]:.1f} / {r['neighbors_gb'][1]:.1f} | {plans[0]} | {plans[1]} | "
            f"{r['search_us']:.0f} |",
            flush=True,
        )


def main() -> None:
    """Parse the command line, measure each size in its own process, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dims", type=int, default=128)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="where files of a size are kept while it is measured")
    parser.add_argument("--overlapping", action="store_true")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    kind = "overlapping" if args.overlapping else "clusters"
    if args.one:
        (args.one / "row.json").write_text(json.dumps(one(args.rows[0], args.dims, args.k, args.one, kind)))
        return
    rows = []
    for n in args.rows:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            line = [sys.executable, __file__, "--rows", str(n), "--dims", str(args.dims), "--k", str(args.k)]
            line += ["--one", folder] + (["--overlapping"] if args.overlapping else [])
            subprocess.run(line, check=True)
            rows.append(json.loads((Path(folder) / "row.json").read_text()))
            print(json.dumps(rows[-1]), flush=True)
    table(rows)


if __name__ == "__main__":
    main()
