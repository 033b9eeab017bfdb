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


def stream_hardness(n: int, d: int, kind: str) -> None:
    """Batches of windows beside those of the sampler in memory: the cosine in a batch above that of random ones."""
    from nearfar.batching import (
        HardNegativeSampler,
        PartitionBatchSampler,
        RandomBatchSampler,
        StreamBatches,
        in_batch_similarity,
        nearest_neighbors,
    )

    x = np.concatenate(list({"clusters": clusters, "overlapping": overlapping}[kind](n, d))).astype(
        np.float32
    )
    near = nearest_neighbors(x, 100)
    rows = [{"id": i, "vector": row} for i, row in enumerate(x)]
    size = 64
    chance = in_batch_similarity(x, RandomBatchSampler(n, size).plan().batches()).mean()
    for name, sampler, options in (
        ("hard, ratio .5", HardNegativeSampler, {"hard_ratio": 0.5}),
        ("hard, ratio 1", HardNegativeSampler, {"hard_ratio": 1.0}),
        ("hard, ratio 1, groups of 16", HardNegativeSampler, {"hard_ratio": 1.0, "group_size": 16}),
        ("partition", PartitionBatchSampler, {}),
    ):
        memory = in_batch_similarity(x, sampler(near, size, **options).plan().batches()).mean() - chance
        line = []
        for share in (20, 10, 5):
            stream = StreamBatches(rows, size, "vector", window=n // share, sampler=sampler, **options)
            ids = [[record["id"] for record in batch] for batch in stream]
            line.append(f"{(in_batch_similarity(x, ids).mean() - chance) / memory:.2f}")
        print(f"| {kind} | {name} | {chance:.3f} | {memory:+.3f} | {' | '.join(line)} |", flush=True)


def stream_speed(n: int, d: int, folder: Path) -> None:
    """Seconds of a core for each record, plain and in windows: texts of Parquet, and pictures of WebDataset shards."""
    import io

    import pyarrow
    import pyarrow.parquet
    import webdataset
    from PIL import Image

    from nearfar.batching import StreamBatches
    from nearfar.data.record_streams import FileRecords

    x = np.concatenate(list(clusters(n, d))).astype(np.float32)
    rng = np.random.default_rng(0)
    words = np.array(["near", "far", "batch", "loss", "view", "tower", "item", "pair"])
    texts = [" ".join(words[rng.integers(8, size=40)]) for _ in range(n)]
    table = pyarrow.table({"text": texts, "vector": list(x)})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=10_000)
    with webdataset.ShardWriter(str(folder / "%03d.tar"), maxcount=1000, verbose=0) as writer:
        for i in range(min(n, 2000)):
            smooth = Image.fromarray(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)).resize((224, 224))
            file = io.BytesIO()
            smooth.save(file, "jpeg", quality=90)
            writer.write({"__key__": f"{i:06}", "jpg": file.getvalue(), "npy": x[i]})

    def picture(record: Any) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(record["jpg"])).resize((128, 128)))

    cases = (
        ("Parquet, texts of 40 words", [folder / "rows.parquet"], "vector", None, "text"),
        ("shards, JPEG 224 to 128", sorted(folder.glob("*.tar")), "npy", picture, "npy"),
    )
    for name, files, field, decode, key in cases:
        window = 4096 if decode is None else 1024
        seconds = []
        for _ in range(2):
            cpu, rows = time.process_time(), 0
            for record in FileRecords(files).start(0):
                decode(record) if decode else record["text"]
                rows += 1
            plain = time.process_time() - cpu
            cpu = time.process_time()
            stream = StreamBatches(files, 64, field, window=window, key=key, decode=decode)
            got = sum(len(batch) for batch in stream)
            seconds.append((plain / rows * 1e6, (time.process_time() - cpu) / got * 1e6))
        plain, windows = min(each[0] for each in seconds), min(each[1] for each in seconds)
        print(f"| {name} | {window:,} | {plain:.0f} | {windows:.0f} | {plain / windows:.2f} |", flush=True)


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
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    kind = "overlapping" if args.overlapping else "clusters"
    if args.one:
        (args.one / "row.json").write_text(json.dumps(one(args.rows[0], args.dims, args.k, args.one, kind)))
        return
    if args.stream:
        print("| vectors | sampler | cosine of random batches | in memory | window 1/20 | 1/10 | 1/5 |")
        print("|---|---|---|---|---|---|---|")
        for each in ("clusters", "overlapping"):
            stream_hardness(50_000, 64, each)
        print(
            "\n| records | window | plain, µs of a core | windows | plain / windows |\n|---|---|---|---|---|"
        )
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            stream_speed(20_000, 128, Path(folder))
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
