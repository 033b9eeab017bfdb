"""Rows per second of ``nearfar embed --engine ray`` against a plain pool of processes, after the start.

    OMP_NUM_THREADS=1 python benchmarks/ray_embedding.py [--rows 20000] [--workers 2] [--rounds 3]

Both have the same encoders, the same chunks and the same work; the plain pool is ``multiprocessing.Pool.imap``, which
neither restarts nor bounds what it reads ahead. Timed from the first chunk that is done to the last, so that imports
and loading are left out. By turns; the ratio is the median over rounds. Vectors are compared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

import nearfar
from nearfar.cluster import connect
from nearfar.config.compose import compose_config
from nearfar.data.chunks import NewData
from nearfar.launch import run_one
from nearfar.serving.ray_pool import RayPool
from nearfar.serving.stream import _Vectors
from nearfar.systems import check_config

CHUNK = 512
_worker: Any = None


def train(folder: Path) -> Path:
    """A run of n-grams that was trained for one step."""
    small = folder / "small.csv"
    small.write_text("\n".join(["text,other", *(f"word{i},term{i}" for i in range(64))]))
    given = [
        "experiment=pairs",
        f"runs_dir={folder}",
        f"data.train={small}",
        "views=[text,other]",
        "batch_size=8",
    ]
    given += [
        "text_encoder=ngram",
        "epochs=1",
        "bootstrap=0",
        "name=run",
    ]
    given += ["trainer.probe_rows=0", "trainer.accelerator=cpu", "trainer.max_steps=1"]
    with open(os.devnull, "w") as nowhere:
        run_one(check_config(compose_config(given)), given, False, Console(file=nowhere))
    return folder / "run"


def start(run: Path, work: Any) -> None:
    global _worker
    trained = nearfar.load(run, "cpu")
    _worker = lambda items: work(trained, items)  # noqa: E731


def call(items: Any) -> Any:
    return None, _worker(items)


def plain(run: Path, work: Any, chunks: Iterator[Any], workers: int) -> Iterator[Any]:
    with multiprocessing.get_context("spawn").Pool(workers, start, (run, work)) as pool:
        yield from pool.imap(call, chunks)


def rate(results: Iterator[Any]) -> tuple[float, list[Any]]:
    """Rows per second from the first chunk that is done."""
    tables = [next(results)[1]]
    began = time.perf_counter()
    tables += [table for _, table in results]
    seconds = time.perf_counter() - began
    return sum(table.num_rows for table in tables[1:]) / seconds, tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name, connect("this benchmark", cpus=arguments.workers):
        run = train(Path(name))
        words = [f"word{i}" for i in range(3000)]
        table = Path(name) / "new.csv"
        table.write_text(
            "\n".join(
                ["text", *(" ".join(rng.choice(words, rng.integers(4, 30))) for _ in range(arguments.rows))]
            )
        )
        trained = nearfar.load(run, "cpu")
        work, source = _Vectors(("text",), None, table), NewData(table, rows=CHUNK)
        rates: dict[str, list[float]] = {"plain": [], "ray": []}
        for turn in range(arguments.rounds):
            tables = {}
            for way in sorted(rates, reverse=bool(turn % 2)):
                chunks = trained.new_items(source)
                if way == "plain":
                    results = plain(run, work, chunks, arguments.workers)
                else:
                    results = RayPool(trained, "cpu", arguments.workers).map(work, chunks)
                value, tables[way] = rate(results)
                rates[way].append(value)
                print(f"round {turn + 1}, {way}: {value:,.0f} rows a second", flush=True)
            assert all(a.equals(b) for a, b in zip(*tables.values(), strict=True))
        for way, values in rates.items():
            print(f"{way}: {median(values):,.0f} rows a second ({', '.join(f'{v:,.0f}' for v in values)})")
        ratios = [b / a for a, b in zip(rates["plain"], rates["ray"], strict=True)]
        print(f"ray / plain: {median(ratios):.3f}")


if __name__ == "__main__":
    main()
