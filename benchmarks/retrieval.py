"""Time and memory of ``retrieval_metrics`` beside the straightforward way, each in a process of its own.

    python benchmarks/retrieval.py --items 20000 --dimensions 256 --threads 2

The straightforward way is the one in common use: all similarities as one matrix, an argsort of every row and
column, and the place of the diagonal. Memory is the growth of the process's peak over what it held with the
inputs. Repeats alternate between the ways; the table shows the least and the median time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time


def inputs(items: int, dimensions: int, duplicates: bool):
    import torch

    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(items, dimensions, generator=generator)
    keys = torch.randn(items, dimensions, generator=generator).mul_(3).add_(queries)
    if duplicates:
        keys[: items // 2] = keys[0].clone()
    return queries, keys


def nearfar_way(queries, keys) -> float:
    from nearfar.metrics import retrieval_metrics

    return retrieval_metrics(queries, keys, both=True)[0]["MRR"].value


def full_matrix_way(queries, keys) -> float:
    import torch

    queries, keys = torch.nn.functional.normalize(queries), torch.nn.functional.normalize(keys)
    scores = queries @ keys.T
    own = torch.arange(len(queries))[:, None]
    means = []
    for matrix in (scores, scores.T):
        place = (torch.argsort(matrix, descending=True) == own).nonzero()[:, 1]
        means.append((1 / (place + 1.0)).mean().item())
        assert all((place < k).float().mean() <= 1 for k in (1, 5, 10))
    return means[0]


WAYS = {"nearfar": nearfar_way, "full matrix": full_matrix_way}


def measure(way: str, arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.set_num_threads(arguments.threads)
    queries, keys = inputs(arguments.items, arguments.dimensions, arguments.duplicates)
    WAYS[way](queries[:64], keys[:64])  # imports and thread pools
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    value = WAYS[way](queries, keys)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"wall": wall, "cpu": cpu, "memory": (peak - before) / 1024, "value": value}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--duplicates", action="store_true", help="half of the keys are one key")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
    for _ in range(arguments.repeats):
        for way, results in runs.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--one", way]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    print(f"{arguments.items} × {arguments.items} × {arguments.dimensions}, both directions", end=", ")
    print(f"{arguments.threads} threads, {arguments.repeats} repeats")
    print(f"{'way':<12} {'least s':>8} {'median s':>9} {'cpu s':>7} {'memory MB':>10} {'MRR':>9}")
    for way, results in runs.items():
        walls, cpus = [r["wall"] for r in results], [r["cpu"] for r in results]
        memory = statistics.median(r["memory"] for r in results)
        print(
            f"{way:<12} {min(walls):8.2f} {statistics.median(walls):9.2f} {min(cpus):7.2f} {memory:10.0f} "
            f"{results[0]['value']:9.6f}"
        )


if __name__ == "__main__":
    main()
