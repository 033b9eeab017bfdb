"""What neighbours, samplers and mining cost from 10⁴ to millions of rows: seconds of a core for each row, and memory.

Vectors (float16, d = 128): n/1000 clusters in topics, in a cluster 12 dimensions of variation (.7) and noise in all
dimensions (.1): centres are the mean of a topic's and their own, times √2. Each size runs in a process of its own, with
one thread; memory is sampled: "own" is what the process allocates, "mapped" are pages of files, which the system takes
back when it needs them.

    python benchmarks/scale.py                                     # 10⁴, 10⁵, 10⁶ rows
    python benchmarks/scale.py --rows 5000000 --folder /data/tmp   # 30 minutes of a core, 9 GB of disk
    python benchmarks/scale.py --overlapping                       # harder: the vectors of benchmarks/samplers.py
    python benchmarks/scale.py --stream                            # windows of a stream; needs nearfar[minilm]
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


def mine(queries: int, folder: Path) -> dict[str, Any]:
    """Mining from the index of a size: documents moved by noise are its queries, every third has two answers."""
    from nearfar.batching import MappedNeighbors
    from nearfar.data.vector_shards import VectorShards, write_shards
    from nearfar.mining import mine_negatives_on_disk

    documents = VectorShards.of(folder / "shards")
    n = min(queries, documents.n)
    rng = np.random.default_rng(3)

    def moved() -> Iterator[np.ndarray]:
        for begin, end in documents.pieces(_BLOCK):
            if begin < n:
                rows = documents.read(begin, min(end, n))
                yield rows + 0.1 * rng.standard_normal(rows.shape)

    write_shards(moved(), folder / "queries")
    near = MappedNeighbors(folder / "near")
    own = np.arange(n)
    second = np.concatenate([near.indices[part, 0] for part in np.array_split(own[::3], -(-n // _BLOCK))])
    pairs = np.concatenate([np.stack([own, own], 1), np.stack([own[::3], second], 1)])
    with Memory() as memory:
        began, cpu = time.perf_counter(), time.process_time()
        mined = mine_negatives_on_disk(
            folder / "queries",
            near,
            folder / "mined.parquet",
            pairs,
            margin=0.05,
            query_texts=(f"query {i}" for i in range(n)),
            corpus_texts=(f"document {i}" for i in range(documents.n)),
        )
        row = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    print("\n".join(mined.summary()), file=sys.stderr)
    return row | {
        "queries": n, "us": row["cpu"] / n * 1e6, "recall": mined.recall, "index": mined.index, "rows": mined.rows,
        "gb": (memory.own, memory.mapped),
    }  # fmt: skip


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
    print("\n| documents | queries mined | µs of a core for each query | recall | own / mapped GB |")
    print("|---|---|---|---|---|")
    for r in rows:
        m = r["mining"]
        memory = f"{m['gb'][0]:.1f} / {m['gb'][1]:.1f}"
        print(
            f"| {r['rows']:,} | {m['queries']:,} | {m['us']:.0f} | {m['recall']:.3f} | {memory} |", flush=True
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


def tokenizer() -> Any:
    """The WordPiece tokenizer of MiniLM, and a function that makes texts of 40 words of its vocabulary."""
    from nearfar.models.text.pretrained import MiniLMTextEncoder

    pieces, _ = MiniLMTextEncoder().parts()
    words = sorted(word for word in pieces.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    rng = np.random.default_rng(0)
    rng.shuffle(words)
    share = 1 / np.arange(1, len(words) + 1)

    def texts(n: int) -> list[str]:
        drawn = rng.choice(len(words), size=(n, 40), p=share / share.sum())
        return [" ".join(words[i] for i in row) for row in drawn]

    return pieces, texts


def stream_speed(n: int, d: int, folder: Path) -> None:
    """Microseconds for each record, plain and in windows, of cores and of a clock: texts, bare and tokenised,
    and pictures of WebDataset shards. The plain loop reads, decodes and collates in one thread, as a worker does."""
    import io
    import itertools

    import pyarrow
    import pyarrow.parquet
    import webdataset
    from PIL import Image

    from nearfar.batching import StreamBatches
    from nearfar.data.record_streams import FileRecords

    pieces, texts = tokenizer()
    x = np.concatenate(list(clusters(n, d))).astype(np.float32)
    rng = np.random.default_rng(0)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts(n), "vector": list(x)}), folder / "rows.parquet", row_group_size=10_000
    )
    with webdataset.ShardWriter(str(folder / "%03d.tar"), maxcount=1000, verbose=0) as writer:
        for i in range(min(n, 3000)):
            smooth = Image.fromarray(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)).resize((224, 224))
            file = io.BytesIO()
            smooth.save(file, "jpeg", quality=90)
            writer.write({"__key__": f"{i:06}", "jpg": file.getvalue(), "npy": x[i]})

    def picture(record: Any) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(record["jpg"])).resize((128, 128)))

    def tokens(records: list[Any]) -> Any:
        given = [record["text"] for record in records]
        return pieces(given, padding=True, truncation=True, max_length=128, return_tensors="pt")

    def batched(files: list[Path], decode: Any, collate: Any) -> Iterator[Any]:
        records = FileRecords(files).start(0)
        while some := list(itertools.islice(records, 64)):
            if decode:
                some = [decode(record) for record in some]
            yield collate(some) if collate else some

    rows, shards = [folder / "rows.parquet"], sorted(folder.glob("*.tar"))
    for name, files, field, decode, collate, key, window, count in (
        ("Parquet, texts of 40 words", rows, "vector", None, None, "text", 4096, n),
        ("the same, tokenised (WordPiece)", rows, "vector", None, tokens, "text", 4096, n),
        ("shards, JPEG 224 to 128", shards, "npy", picture, None, "npy", 1024, min(n, 3000)),
    ):
        best = [[float("inf")] * 2, [float("inf")] * 2]
        for turn in range(6):
            way = turn % 2
            cpu, began = time.process_time(), time.perf_counter()
            if way:
                options = {"window": window, "key": key, "decode": decode, "collate": collate}
                drawn: Any = StreamBatches(files, 64, field, **options)
            else:
                drawn = batched(files, decode, collate)
            for _ in drawn:
                pass
            spent = (time.process_time() - cpu, time.perf_counter() - began)
            best[way] = [min(a, b / count * 1e6) for a, b in zip(best[way], spent, strict=True)]
        (cpu, clock), (cpu_windows, clock_windows) = best
        print(
            f"| {name} | {window:,} | {cpu:.0f} | {cpu_windows:.0f} | {cpu / cpu_windows:.2f} | {clock:.0f} | "
            f"{clock_windows:.0f} | {clock / clock_windows:.2f} |",
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
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--queries", type=int, default=1_000_000, help="of mining, at most")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mine", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    kind = "overlapping" if args.overlapping else "clusters"
    if args.one:
        (args.one / "row.json").write_text(json.dumps(one(args.rows[0], args.dims, args.k, args.one, kind)))
        return
    if args.mine:
        (args.mine / "mined.json").write_text(json.dumps(mine(args.queries, args.mine)))
        return
    if args.stream:
        print("| vectors | sampler | cosine of random batches | in memory | window 1/20 | 1/10 | 1/5 |")
        print("|---|---|---|---|---|---|---|")
        stream_hardness(50_000, 64, "clusters")
        stream_hardness(20_000, 64, "overlapping")
        print("\n| records | window | plain, µs of a core | windows | ratio | plain, µs | windows | ratio |")
        print("|---|---|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            stream_speed(16_384, 128, Path(folder))
        return
    rows = []
    for n in args.rows:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            line = [sys.executable, __file__, "--rows", str(n), "--dims", str(args.dims), "--k", str(args.k)]
            line += ["--one", folder] + (["--overlapping"] if args.overlapping else [])
            subprocess.run(line, check=True)
            rows.append(json.loads((Path(folder) / "row.json").read_text()))
            line = [sys.executable, __file__, "--queries", str(args.queries), "--mine", folder]
            subprocess.run(line, check=True)
            rows[-1]["mining"] = json.loads((Path(folder) / "mined.json").read_text())
            print(json.dumps(rows[-1]), flush=True)
    table(rows)


if __name__ == "__main__":
    main()
