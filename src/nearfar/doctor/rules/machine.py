"""What the machine and the way of running add: batch statistics and gradients of several processes."""

from __future__ import annotations

import math

from nearfar.doctor.rule import Evidence, Rule
from nearfar.doctor.rules._remedies import advice, fixed
from nearfar.doctor.signals import Signals

__all__ = ["RULES"]

#: rows per process below which batch statistics cost accuracy (a point at 8, four at 4, eleven at 2)
SMALL_BATCH = 16
#: distance of a gradient ratio from 1 that is more than rounding and a different order of sums
RATIO = 0.05


def _small_batch(signals: Signals) -> Evidence | None:
    layers = signals.number("batchnorm")
    rows = signals.number("rows") or signals.number("batch_size")
    if not layers or rows is None or rows >= SMALL_BATCH:
        return None
    return Evidence(
        f"{layers:.0f} BatchNorm layers take their statistics from {rows:.0f} rows.",
        {"batchnorm": layers, "rows": rows},
    )


def _gradient(signals: Signals) -> Evidence | None:
    ratio = signals.number("gradient_ratio")
    if ratio is None or not math.isfinite(ratio) or abs(ratio - 1) <= RATIO:
        return None
    guesses = []
    for name, words in (("world_size", "processes"), ("accumulate", "accumulated batches")):
        count = signals.number(name)
        if count is None or count <= 1:
            continue
        if abs(ratio / count - 1) <= RATIO:
            guesses.append(f"the number of {words}, {count:.0f}: summed where it should be averaged")
        elif abs(ratio * count - 1) <= RATIO:
            guesses.append(f"1 / the number of {words}, {count:.0f}: averaged twice")
    guess = f", {guesses[0]}" if guesses else ""
    return Evidence(
        f"The gradient is {ratio:.3g} times that of one process{guess}.", {"gradient_ratio": ratio}
    )


RULES = (
    Rule(
        "gradient-scale", "error", "Several processes do not give the gradient of "
        "one.", (("gradient_ratio",),), _gradient,
        looks_at="`gradient_ratio`", threshold=f"more than {RATIO:.0%} off 1",
        cause="Features gathered without their gradient, or a loss scaled by the number of processes or of "
        "accumulated batches.",
        remedy=advice("Wrap the loss with nearfar.training.distributed and certify it with nearfar verify ddp."),
        source="DistributedDataParallel averages gradients; a loss over gathered rows needs their sum",
    ),
    Rule(
        "batchnorm-small-batch", "warning", "Batch normalisation on tiny batches.",
        (("batchnorm", "rows"), ("batchnorm", "batch_size")), _small_batch,
        looks_at="`batchnorm` layers beside `rows` (or `batch_size`) of one process",
        threshold=f"fewer than {SMALL_BATCH} rows",
        cause="Mean and variance of a few rows are noise, and rows learn of each other through them.",
        remedy=fixed("batch_size=32", "Take larger batches, or LayerNorm or GroupNorm instead."),
        source="Wu and He 2018, Group Normalization: error rises from 16 rows downwards",
    ),
)  # fmt: skip
