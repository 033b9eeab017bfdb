"""A thousand queries in a gallery of a million vectors by a new process, and the recall of what it answers.

The gallery is filled first, in this process, in chunks of 4,096 rows with two columns; that is timed too. Then a new
process starts Python, opens the store, reads the queries, searches the 10 nearest of each, with ids and columns, and
ends: its whole wall time counts. Before it, the files of the store are put out of the page cache where the system
allows that (``--warm``: they are left in it). Recall is the share of the exact 10 nearest, for the same queries.

Vectors are those of items with two views: latent vectors of 32 numbers around 5,000 centres, each view a network of its
own noise above the same one, so that queries are no copies of gallery rows (cosine with their own item about .8).
``--plain`` takes points at random on the sphere instead, in which no index can be both fast and right.

    OMP_NUM_THREADS=2 python benchmarks/search.py                      # FAISS file, 1,000,000 x 256
    OMP_NUM_THREADS=2 python benchmarks/search.py --store lance
    python benchmarks/search.py --rows 100000 --store postgres         # a server that this script starts
    python benchmarks/search.py --rows 100000 --indexes                # inverted file against HNSW: build, recall, time
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

D, K, QUERIES, CHUNK = 256, 10, 1000, 4096

SEARCH = """
import json, sys, time
began = time.perf_counter()
import numpy as np
from nearfar.serving.stores import open_store
place, queries, where, output = sys.argv[1:]
store = open_store(place)
opened = time.perf_counter()
answers = store.search(np.load(queries), 10, where or None)
done = time.perf_counter()
ids = [[int(i) for i in answer.ids] for answer in answers]
assert all(answer.rows[0]["lang"] for answer in answers)
with open(output, "w") as file:
    json.dump({"open": opened - began, "search": done - opened, "ids": ids}, file)
"""


class Views:
    """Two views of the same items, made on demand."""

    def __init__(self, plain: bool) -> None:
        generator = np.random.default_rng(0)
        self.plain = plain
        self.centres = generator.standard_normal((5000, 32)).astype(np.float32)
        self.first = (generator.standard_normal((32, 256)) / 6).astype(np.float32)
        self.second = (generator.standard_normal((256, D)) / 16).astype(np.float32)

    def rows(self, start: int, n: int, view: int) -> np.ndarray:
        latent = np.random.default_rng([1, start])
        noise = np.random.default_rng([2, view, start])
        if self.plain:
            x = latent.standard_normal((n, D)) + view * 0.75 * noise.standard_normal((n, D))
        else:
            z = self.centres[latent.integers(0, 5000, n)] + 0.6 * latent.standard_normal((n, 32))
            x = np.tanh(z @ self.first) @ self.second
            x += 0.35 * x.std() * noise.standard_normal((n, D))
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@contextlib.contextmanager
def place_of(kind: str, folder: Path) -> Iterator[str]:
    if kind == "postgres":
        import pgserver

        server = pgserver.get_server(folder / "postgres", cleanup_mode="delete")
        yield server.get_uri()
        server.cleanup()
    else:
        yield str(folder / "rows.faiss") if kind == "faiss" else f"{kind}:{folder / 'rows'}"


def fill(place: str, views: Views, n: int) -> None:
    from nearfar.serving.stores import create_store

    began = time.perf_counter()
    with create_store(place, D, {"lang": "text", "price": "number"}) as store:
        for start in range(0, n, CHUNK):
            size = min(CHUNK, n - start)
            ids = [str(i) for i in range(start, start + size)]
            columns = {"lang": ["de" if i % 10 else "en" for i in range(size)], "price": list(range(size))}
            store.add(ids, views.rows(start, size, 0), columns)
        added = time.perf_counter()
        sample = np.concatenate(
            [views.rows(start, CHUNK, 1)[:32] for start in range(CHUNK, 9 * CHUNK, CHUNK)]
        )
        store.finish(sample if n > 9 * CHUNK else None, "queries like these")
        print(f"filled: {added - began:.1f} s for rows, {time.perf_counter() - added:.1f} s to finish")
        print(store.description)


def evict(folder: Path) -> None:
    """Put files out of the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def exact(views: Views, n: int, queries: np.ndarray) -> np.ndarray:
    """The 10 nearest by comparing everything."""
    scores = np.full((len(queries), 0), 0, np.float32)
    ids = np.zeros((len(queries), 0), np.int64)
    for start in range(0, n, CHUNK):
        rows = views.rows(start, min(CHUNK, n - start), 0)
        scores = np.concatenate([scores, queries @ rows.T], axis=1)
        ids = np.concatenate([ids, np.tile(np.arange(start, start + len(rows)), (len(queries), 1))], axis=1)
        best = np.argpartition(-scores, K - 1, axis=1)[:, :K]
        scores, ids = np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)
    return ids


def main(arguments: argparse.Namespace) -> None:
    views, n = Views(arguments.plain), arguments.rows
    blocks = np.random.default_rng(5).integers(0, max(1, n // CHUNK), QUERIES)
    queries = np.stack(
        [views.rows(int(b) * CHUNK, min(CHUNK, n), 1)[i % CHUNK] for i, b in enumerate(blocks)]
    )
    truth = exact(views, n, queries)
    with tempfile.TemporaryDirectory() as name, place_of(arguments.store, Path(name)) as place:
        folder = Path(name)
        np.save(folder / "queries.npy", queries)
        fill(place, views, n)
        for where in ("", "lang=en"):
            for run in range(arguments.repeats):
                if not arguments.warm:
                    evict(folder)
                began = time.perf_counter()
                command = [sys.executable, "-c", SEARCH, place, str(folder / "queries.npy"), where]
                subprocess.run([*command, str(folder / "out.json")], check=True)
                wall = time.perf_counter() - began
                answer = json.loads((folder / "out.json").read_text())
                recall = ""
                if not where:
                    share = np.mean(
                        [len(set(a) & set(b)) / K for a, b in zip(answer["ids"], truth, strict=True)]
                    )
                    recall = f", recall@10 {share:.4f}"
                print(
                    f"{where or 'no filter':10} run {run + 1}: {wall:.2f} s in all (open {answer['open']:.2f}, search "
                    f"{answer['search']:.2f}){recall}; load {os.getloadavg()[0]:.1f}"
                )


def indexes(arguments: argparse.Namespace) -> None:
    """Build time, size, recall and time of a query of an inverted file and of HNSW."""
    import faiss

    views, n = Views(arguments.plain), arguments.rows
    rows = np.concatenate([views.rows(start, min(CHUNK, n - start), 0) for start in range(0, n, CHUNK)])
    queries = views.rows(0, CHUNK, 1)[:QUERIES]
    truth = exact(views, n, queries)

    def report(name: str, search: object, built: float) -> None:
        began = time.perf_counter()
        _, ids = search(queries)  # type: ignore[operator]
        seconds = time.perf_counter() - began
        recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(ids, truth, strict=True)])
        print(
            f"{name:28} built in {built:7.1f} s, recall@10 {recall:.3f}, {1e3 * seconds / QUERIES:.2f} ms a query"
        )

    began = time.perf_counter()
    flat = faiss.IndexFlatIP(D)
    flat.add(rows)
    report("flat", partial(flat.search, k=K), time.perf_counter() - began)
    for factor in (2, 4, 8):
        began = time.perf_counter()
        cells = int(factor * np.sqrt(n))
        inverted = faiss.IndexIVFFlat(faiss.IndexFlatIP(D), D, cells, faiss.METRIC_INNER_PRODUCT)
        inverted.cp.niter, inverted.cp.max_points_per_centroid = 10, 64
        inverted.train(rows)
        inverted.add(rows)
        built = time.perf_counter() - began
        for probes in (8, 16, 32, 64, 128):
            inverted.nprobe = probes
            report(f"{cells} cells, {probes} probes", partial(inverted.search, k=K), built)
    for m, construction in ((16, 64),):
        began = time.perf_counter()
        graph = faiss.IndexHNSWFlat(D, m, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = construction
        graph.add(rows)
        built = time.perf_counter() - began
        for ef in (32, 128, 512):
            graph.hnsw.efSearch = ef
            report(f"HNSW m {m}, ef {construction}/{ef}", partial(graph.search, k=K), built)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--store", choices=("faiss", "lance", "qdrant", "postgres"), default="faiss")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--indexes", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    (indexes if given.indexes else main)(given)
