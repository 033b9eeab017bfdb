"""How often intervals of AP, and of the gap in AP between two groups, hold the true value.

Pictures are simulated: one true box each and three detections around it, those of group a with more noise. The true
value is that of 8,000 pictures. Of many samples of few pictures: the share of intervals that hold it, for three kinds
of interval, and how much higher AP is on average than its true value.

    python benchmarks/detection_intervals.py                        # 250 samples of 80 pictures, 120 of 195
"""

from __future__ import annotations

import argparse

import numpy as np

from nearfar.metrics.detection import Boxes, DetectionEvidence, detection_estimates, detection_evidence

NAMES = ("AP", "AP/a", "AP/gap")


def evidence(seed: int, n: int, noise: float = 6.0, more: float = 8.0) -> DetectionEvidence:
    """One sample of n pictures, of groups a and b in turn."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 100, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(30, 90, (n, 2))], axis=1)
    group = np.arange(n) % 2
    spread = noise + more * (group == 0)
    found = boxes[:, None] + rng.normal(0, 1, (n, 3, 4)) * spread[:, None, None]
    found[..., 2:] = np.maximum(found[..., 2:], found[..., :2] + 1)
    zero, where = np.zeros(n, int), np.arange(n)
    detections = Boxes(found.reshape(-1, 4), zero.repeat(3), where.repeat(3), scores=rng.random(3 * n))
    return detection_evidence(detections, Boxes(boxes, zero, where, group=group), n, ("a", "b"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--samples", type=int, nargs=2, default=(250, 120), help="of 80 and of 195 pictures")
    arguments = parser.parse_args()
    truth = {name: float(value[0]) for name, value in evidence(99, 8000).statistics().items()}
    for n, samples in zip((80, 195), arguments.samples, strict=True):
        held = {kind: dict.fromkeys(NAMES, 0) for kind in ("BCa", "percentile", "jackknife")}
        excess = dict.fromkeys(NAMES, 0.0)
        for seed in range(samples):
            sample = evidence(seed, n)
            bca, _ = detection_estimates(sample, resamples=arguments.resamples, seed=seed)
            normal, _ = detection_estimates(sample, resamples=0)
            drawn = sample.statistics(sample.resamples(arguments.resamples, seed))
            for name in NAMES:
                low, high = np.quantile(drawn[name], [0.025, 0.975])
                held["BCa"][name] += bca[name].low <= truth[name] <= bca[name].high
                held["jackknife"][name] += normal[name].low <= truth[name] <= normal[name].high
                held["percentile"][name] += bool(low <= truth[name] <= high)
                excess[name] += bca[name].value - truth[name]
        for name in NAMES:
            shares = ", ".join(f"{kind} {counts[name] / samples:.3f}" for kind, counts in held.items())
            print(
                f"{n} pictures, {name}: {shares}; {excess[name] / samples:+.4f} on average ({samples} samples)"
            )


if __name__ == "__main__":
    main()
