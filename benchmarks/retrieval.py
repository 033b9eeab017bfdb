"""Time and memory of ``retrieval_metrics`` beside the straightforward way, each in a process of its own.

    python benchmarks/retrieval.py --items 20000 --dimensions 256 --threads 2
    python benchmarks/retrieval.py --items 20000 --relevant 5 --ways nearfar "nearfar nDCG"
    python benchmarks/retrieval.py --items 10000 --gallery 1000000 --dimensions 128 --ways "nearfar nDCG" --repeats 1

The straightforward way is the one in common use: all similarities as one matrix, an argsort of every row and
column, and the place of the diagonal. ``nearfar`` is R@k, MRR and the median rank; ``nearfar nDCG`` is nDCG@10, MAP and
recall@10. With ``--gallery`` there are more keys than queries, and one direction. Memory is the growth of the
process's peak over what it held with the inputs, and its peak in all. Repeats alternate between the ways; the table
shows the least and the median time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time


def inputs(arguments: argparse.Namespace):
    """Queries, keys, and for each query the positions of its keys."""
    import torch

    items, dimensions = arguments.items, arguments.dimensions
    gallery = arguments.gallery or items
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(items, dimensions, generator=generator)
    keys = torch.randn(gallery, dimensions, generator=generator)
    keys[:items].mul_(3).add_(queries)
    if arguments.duplicates:
        keys[: gallery // 2] = keys[0].clone()
    if arguments.relevant == 1 and gallery == items:
        return queries, keys, None
    relevant = (torch.arange(items)[:, None] + torch.arange(arguments.relevant)) % gallery
    return queries, keys, relevant.numpy()


def nearfar_way(queries, keys, relevant) -> float:
    from nearfar.metrics import retrieval_metrics

    both = len(queries) == len(keys)
    scores = retrieval_metrics(queries, keys, relevant, both=both)
    return (scores[0] if both else scores)["MRR"].value


def graded_way(queries, keys, relevant) -> float:
    from nearfar.metrics import retrieval_metrics

    both = len(queries) == len(keys)
    names = ["nDCG@10", "MAP", "recall@10"]
    scores = retrieval_metrics(queries, keys, relevant, metrics=names, both=both)
    return (scores[0] if both else scores)["nDCG@10"].value


def full_matrix_way(queries, keys, relevant) -> float:
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


WAYS = {"nearfar": nearfar_way, "nearfar nDCG": graded_way, "full matrix": full_matrix_way}


def measure(way: str, arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.set_num_threads(arguments.threads)
    queries, keys, relevant = inputs(arguments)
    # imports, thread pools, compiled loops
    WAYS[way](queries[:64], keys[:64], None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    value = WAYS[way](queries, keys, relevant)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = {"memory": (peak - before) / 1024, "peak": peak / 1024}
    return {"wall": wall, "cpu": cpu, "value": value, **memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--gallery", type=int, help="so many keys, and one direction")
    parser.add_argument("--relevant", type=int, default=1, help="relevant keys of each query")
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--duplicates", action="store_true", help="half of the keys are one key")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "full matrix" in arguments.ways and (arguments.gallery or arguments.relevant > 1):
        arguments.ways.remove("full matrix")  # it is of the diagonal alone
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
    for _ in range(arguments.repeats):
        for way, results in runs.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--one", way]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    gallery = arguments.gallery or arguments.items
    directions = "one direction" if arguments.gallery else "both directions"
    print(f"{arguments.items} × {gallery} × {arguments.dimensions}, {directions}", end=", ")
    print(f"{arguments.relevant} relevant, {arguments.threads} threads, {arguments.repeats} repeats")
    print(
        f"{'way':<13} {'least s':>8} {'median s':>9} {'cpu s':>7} {'memory MB':>10} {'peak MB':>8} {'value':>9}"
    )
    for way, results in runs.items():
        walls, cpus = [r["wall"] for r in results], [r["cpu"] for r in results]
        memory, peak = (statistics.median(r[name] for r in results) for name in ("memory", "peak"))
        print(
            f"{way:<13} {min(walls):8.2f} {statistics.median(walls):9.2f} {min(cpus):7.2f} {memory:10.0f} "
            f"{peak:8.0f} {results[0]['value']:9.6f}"
        )


if __name__ == "__main__":
    main()
