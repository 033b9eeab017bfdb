"""How often each kind of interval that nearfar prints covers the truth, at 95 %.

    python benchmarks/interval_coverage.py                 # every kind, some ten minutes on one core
    python benchmarks/interval_coverage.py --repeats 400   # a look

Each line is one setting: the share of draws whose interval covers, and the mean width. Shares of hits are not drawn
but summed over all outcomes. The functions are those of ``nearfar.metrics``; nothing is computed a second way here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from nearfar.metrics import (
    Estimate,
    Ranks,
    compare,
    few_runs,
    mean_interval,
    paired_difference,
    rank_estimates,
    wilson,
)
from nearfar.metrics.comparison import seeds_interval
from nearfar.metrics.ranks import Places
from nearfar.metrics.retrieval_scores import read_metrics, score_of_places

#: kind, setting, coverage, mean width
Row = tuple[str, str, float, float]
Interval = tuple[float, float]


def drawn(repeats: int, truth: float, interval: Callable[[], Interval]) -> tuple[float, float]:
    ends = np.array([interval() for _ in range(repeats)])
    return float(np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))), float(
        np.mean(ends[:, 1] - ends[:, 0])
    )


def binomial(n: int, p: float) -> np.ndarray:
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    log_mass = log_factorial[n] - log_factorial - log_factorial[::-1] + k * np.log(p) + (n - k) * np.log1p(-p)
    return np.exp(log_mass)


def shares() -> Iterator[Row]:
    """R@k and accuracies: exactly, at single p and as the mean and the least over bands of p."""
    for n in (20, 50, 125, 1000):
        ends = np.array([wilson(k / n, n) for k in range(n + 1)])

        def at(p: float, n: int = n, ends: np.ndarray = ends) -> tuple[float, float]:
            mass = binomial(n, p)
            inside = (ends[:, 0] <= p) & (p <= ends[:, 1])
            return float(mass[inside].sum()), float(mass @ (ends[:, 1] - ends[:, 0]))

        for p in (0.01, 0.5, 0.9, 0.99, 0.999):
            yield ("share", f"n={n} p={p}", *at(p))
        for low, high in ((0.3, 0.7), (0.85, 0.95), (0.97, 0.995)):
            found = np.array([at(p) for p in np.linspace(low, high, 201)])
            note = f"n={n} p={low}…{high} (least {found[:, 0].min():.3f}, most {found[:, 0].max():.3f})"
            yield ("share, mean over a band", note, float(found[:, 0].mean()), float(found[:, 1].mean()))


#: mean and spread of the log rank
DIFFICULTY = {
    0.05: (3.5, 1.8),
    0.2: (2.2, 1.8),
    0.5: (0.69, 1.6),
    0.9: (-1.2, 1.5),
    0.97: (-2.2, 1.53),
    0.99: (-2.8, 1.5),
}
GALLERY = 3000
POPULATION = 100_000


def some_ranks(rng: np.random.Generator, r1: float, n: int) -> np.ndarray:
    middle, spread = DIFFICULTY[r1]
    return np.floor(np.exp(middle + spread * rng.standard_normal(n))).clip(1, GALLERY)


def reciprocal_ranks(rng: np.random.Generator, repeats: int) -> Iterator[Row]:
    for r1 in DIFFICULTY:
        truth = float((1 / some_ranks(rng, r1, 2_000_000)).mean())
        for n in (20, 50, 125, 1000):
            for name, resamples in (("MRR", 1000), ("MRR, no bootstrap", 0)):

                def interval(r1: float = r1, n: int = n, resamples: int = resamples) -> Interval:
                    return mean_interval(1 / some_ranks(rng, r1, n), resamples=resamples)[:2]

                yield (
                    name,
                    f"R@1={r1} n={n}",
                    *drawn(repeats if n < 1000 else repeats // 2, truth, interval),
                )


#: metrics over several relevant keys
SEVERAL = ["nDCG@10", "MAP", "recall@10", "precision@10", "R-precision", "mean_rank"]


def several_relevant(rng: np.random.Generator, repeats: int) -> Iterator[Row]:
    """One to six graded relevant keys a query, whose ranks share the query's difficulty."""
    for r1 in (0.05, 0.5, 0.97):
        middle, spread = DIFFICULTY[r1]
        number = rng.integers(1, 7, POPULATION)
        query = np.repeat(np.arange(POPULATION), number)
        hard = middle + 0.8 * spread * rng.standard_normal(POPULATION)
        rank = np.exp(hard[query] + 0.6 * spread * rng.standard_normal(len(query))).clip(0, GALLERY - 7)
        rank = np.floor(rank).astype(int)[np.lexsort((rank, query))]  # irrelevant keys above each, rising
        ones = np.ones_like(rank)
        places = Places(
            np.concatenate([[0], np.cumsum(number)]),
            rank,
            0 * ones,
            ones,
            np.full(POPULATION, GALLERY),
            rng.integers(1, 4, len(query)).astype(float),
        )
        scores = score_of_places(places, read_metrics(SEVERAL, ()))
        truth = {name: float(column.mean()) for name, column in scores.items()}
        for n in (20, 50, 125, 1000):
            inside, width = dict.fromkeys(SEVERAL, 0), dict.fromkeys(SEVERAL, 0.0)
            times = repeats if n < 1000 else repeats // 2
            for _ in range(times):
                some = rng.integers(0, POPULATION, n)
                drawn_scores = replace(
                    scores,
                    queries=some,
                    ranks=None,
                    scores={name: column[some] for name, column in scores.items()},
                    chances={name: scores.chances[name][some] for name in scores},
                )
                for name, estimate in drawn_scores.estimates().items():
                    inside[name] += estimate.low <= truth[name] <= estimate.high
                    width[name] += estimate.high - estimate.low
            for name in SEVERAL:
                yield (
                    name,
                    f"R@1={r1} mean {truth[name]:.3g} n={n}",
                    inside[name] / times,
                    width[name] / times,
                )


def median_ranks(rng: np.random.Generator, repeats: int) -> Iterator[Row]:
    for r1, middle in ((0.05, 3.5), (0.2, 2.2)):
        truth = float(np.floor(np.exp(middle)))
        for n in (11, 20, 50, 125, 1000):

            def interval(r1: float = r1, n: int = n) -> Interval:
                found = Ranks.of(
                    (some_ranks(rng, r1, n) - 1).astype(int).tolist(), tied=[0] * n, gallery=GALLERY
                )
                estimate = rank_estimates(found, (1,), bootstrap=0)["median_rank"]
                return estimate.low, estimate.high

            yield ("median rank", f"median {truth:g} n={n}", *drawn(repeats, truth, interval))


def runs(rng: np.random.Generator, repeats: int) -> Iterator[Row]:
    """t over seeds or slides: normal, and shares near 1 whose logit varies."""
    for seeds in (2, 3, 5, 10):
        normal = drawn(repeats, 0.4, lambda s=seeds: few_runs(0.4 + 0.02 * rng.standard_normal(s)))  # type: ignore[misc]
        yield ("t over runs", f"normal, {seeds} runs", *normal)

        def near_one(k: int) -> np.ndarray:
            return 1 / (1 + np.exp(-(3.5 + 0.3 * rng.standard_normal(k))))

        truth = float(near_one(2_000_000).mean())
        yield (
            "t over runs",
            f"shares near .97, {seeds} runs",
            *drawn(repeats, truth, lambda s=seeds: few_runs(near_one(s))),
        )  # type: ignore[misc]


def differences(rng: np.random.Generator, repeats: int) -> Iterator[Row]:
    """Normal seed, item and remaining effects; the seed effect as a multiple of the items' standard error."""
    for seeds in (1, 2, 3, 5, 10):
        for n in (20, 125, 1000) if seeds in (2, 3) else (125,):
            for of_item, rest in ((0.5, 0.8), (0.1, 0.8), (0.8, 0.1)):
                error = ((of_item**2 + rest**2 / seeds) / n) ** 0.5
                for times in (0, 0.3, 1, 3, 10) if seeds > 1 else (0,):

                    def interval(s=seeds, n=n, i=of_item, r=rest, a=times * error) -> Interval:  # type: ignore[no-untyped-def]
                        scores = a * rng.standard_normal((s, 1)) + i * rng.standard_normal((1, n))
                        scores = scores + r * rng.standard_normal((s, n)) + 5
                        found = paired_difference(scores, np.full_like(scores, 5.0))
                        return found.low, found.high

                    note = f"n={n} item:rest {of_item}:{rest} seed effect {times} standard errors"
                    yield (f"difference, {seeds} seed(s)", note, *drawn(repeats, 0.0, interval))


def differing_hits(rng: np.random.Generator, repeats: int) -> Iterator[Row]:
    """Hits of two arms that differ on few items: gained on a share ``up``, lost on a share ``down``."""
    for n in (50, 125, 1000):
        for up, down in ((0.25, 0.25), (0.1, 0.05), (0.05, 0.05), (0.1, 0.0), (0.03, 0.01), (0.02, 0.0)):

            def interval(n: int = n, up: float = up, down: float = down) -> Interval:
                u = rng.random(n)
                a, b = (u >= down) * 1.0, (u >= up + down) * 1.0 + (u < down)
                found = paired_difference(a, b)
                return found.low, found.high

            note = f"n={n} +{up} -{down} ({(up + down) * n:.3g} items differ)"
            yield ("difference of hits, 1 seed", note, *drawn(2 * repeats, up - down, interval))


def unpaired(rng: np.random.Generator, repeats: int) -> Iterator[Row]:
    """``compare`` of two shares: on items of their own, for which it is made, and on the same items."""
    protocol = {"gallery": 1000, "split": "items", "confidence": 0.95}

    def estimate(hits: np.ndarray) -> Estimate:
        low, high, _ = mean_interval(hits)
        return Estimate(float(hits.mean()), low, high, 0.001, hits.size, False, "R@1", protocol)

    for shared in (0.0, 0.8):
        for n in (50, 125, 1000):
            for p, q in ((0.5, 0.5), (0.9, 0.8), (0.97, 0.95)):

                def interval(n: int = n, p: float = p, q: float = q, shared: float = shared) -> Interval:
                    same = rng.random(n) < shared
                    u, v = rng.random(n), rng.random(n)
                    found = compare(estimate((u < p) * 1.0), estimate((np.where(same, u, v) < q) * 1.0))
                    return found.low, found.high

                name = "unpaired difference" + (", same items" if shared else "")
                yield (name, f"n={n} {p} − {q}", *drawn(repeats, p - q, interval))


def means_over_seeds(rng: np.random.Generator, repeats: int) -> Iterator[Row]:
    """Hits whose logit has a seed effect, an item effect and a mean; the arms' table of a comparison."""
    normal = np.random.default_rng(1).standard_normal(2_000_000)
    for seeds in (2, 3, 5):
        for n in (50, 125, 1000):
            for middle in (0.0, 2.2, 4.6):
                for of_seed in (0.0, 0.3, 1.0):
                    spread = (of_seed**2 + 1.5**2) ** 0.5
                    truth = float((1 / (1 + np.exp(-(middle + spread * normal)))).mean())

                    def interval(s=seeds, n=n, m=middle, a=of_seed) -> Interval:  # type: ignore[no-untyped-def]
                        logit = m + a * rng.standard_normal((s, 1)) + 1.5 * rng.standard_normal((1, n))
                        return seeds_interval((rng.random((s, n)) < 1 / (1 + np.exp(-logit))) * 1.0)[:2]

                    note = f"n={n} share {truth:.3f} seed effect {of_seed} on the logit"
                    yield (f"mean over {seeds} seeds", note, *drawn(repeats, truth, interval))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--only", help="one of the functions here, such as several_relevant")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    rng = np.random.default_rng(0)
    kinds = (
        reciprocal_ranks,
        several_relevant,
        median_ranks,
        runs,
        differences,
        differing_hits,
        unpaired,
        means_over_seeds,
    )
    rows: list[Row] = []
    sources = [(shares.__name__, shares()), *((kind.__name__, kind(rng, repeats)) for kind in kinds)]
    for source in (rows_of for name, rows_of in sources if arguments.only in (None, name)):
        for row in source:
            print(f"{row[0]:28} {row[2]:.3f}  width {row[3]:8.4f}  {row[1]}", flush=True)
            rows.append(row)
    print(f"\n{'kind':28} settings   mean  least   most  within 93–97 %")
    for kind in dict.fromkeys(row[0] for row in rows):
        found = np.array([row[2] for row in rows if row[0] == kind])
        inside = int(((found >= 0.93) & (found <= 0.97)).sum())
        ends = f"{found.mean():.3f}  {found.min():.3f}  {found.max():.3f}"
        print(f"{kind:28} {len(found):8d}  {ends}  {inside}/{len(found)}")


if __name__ == "__main__":
    main()
