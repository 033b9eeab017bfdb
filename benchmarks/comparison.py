"""How often the interval of ``paired_difference`` covers the truth, by seeds and sizes of effects.
effects.

    python benchmarks/comparison.py --repeats 20000

Scores are normal: seed effects (same for all items), item effects (same for all seeds), and the rest. Since
the interval depends on the scores only through four sums, those are drawn directly, which gives the same
intervals as ``paired_difference`` and lets every setting be repeated often. The columns besides it show two
other intervals: Satterthwaite's single t for the summed variance, and items only, as a paired test on one
table of scores has it.
"""

from __future__ import annotations

import argparse

import numpy as np

from nearfar.metrics.quantiles import t_quantile


def coverage(rng, seeds: int, items: int, of_seed: float, of_item: float, rest: float, repeats: int):
    column = of_seed * rng.standard_normal((repeats, seeds))
    column += rest * rng.standard_normal((repeats, seeds)) / items**0.5
    mean = column.mean(1) + of_item * rng.standard_normal(repeats) / items**0.5
    v_seeds = column.var(1, ddof=1) / seeds
    scale = (of_item**2 + rest**2 / seeds) / items
    v_items = scale * rng.chisquare(items - 1, repeats) / (items - 1)
    free = (seeds - 1) * (items - 1)
    v_rest = rest**2 * rng.chisquare(free, repeats) / free / (seeds * items)
    t_s, t_i = t_quantile(0.975, seeds - 1), t_quantile(0.975, items - 1)
    own = np.sqrt(np.maximum(t_s**2 * v_seeds + t_i**2 * (v_items - v_rest), t_i**2 * v_items))
    total = v_seeds + v_items
    degrees = total**2 / (v_seeds**2 / (seeds - 1) + v_items**2 / (items - 1))
    single = np.array([t_quantile(0.975, round(float(df), 1)) for df in degrees]) * np.sqrt(total)
    items_only = t_i * np.sqrt(v_items)
    return [
        (float(np.mean(np.abs(mean) <= half)), float(np.median(half))) for half in (own, single, items_only)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=300)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    print("coverage (median half-width) at 95 %")
    print(
        f"{'seeds':>5} {'seed':>5} {'item':>5} {'rest':>5}   {'nearfar':>16} {'one t':>16} {'items only':>16}"
    )
    least = 1.0
    for seeds in (2, 3, 5, 10):
        for of_item, rest in ((0.5, 0.8), (0.1, 0.8), (0.8, 0.1)):
            for of_seed in (0.0, 0.02, 0.05, 0.1, 0.3):
                results = coverage(rng, seeds, arguments.items, of_seed, of_item, rest, arguments.repeats)
                cells = " ".join(f"{share:8.3f} ({half:5.3f})" for share, half in results)
                print(f"{seeds:5d} {of_seed:5.2f} {of_item:5.2f} {rest:5.2f}   {cells}")
                least = min(least, results[0][0])
    print(f"least coverage of paired_difference: {least:.3f}")


if __name__ == "__main__":
    main()
