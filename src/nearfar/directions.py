"""Which way a metric is better, by its name: for whoever does not say it, such as the logs of other trainers."""

from __future__ import annotations

import re

__all__ = ["lower_is_better"]

#: words that name a cost; between letters they are part of a different word (`effective_rank`, `piece`, `terror`)
_COSTS = (
    "median_rank",
    "mean_rank",
    "loss",
    "error",
    "ece",
    "mse",
    "rmse",
    "mae",
    "distance",
    "gap",
    "perplexity",
    "brier",
)
_LOWER = re.compile(rf"(?<![a-z])(?:{'|'.join(_COSTS)})(?![a-z])", re.IGNORECASE)


def lower_is_better(metric: str) -> bool:
    """Whether a metric of this name is better when it is lower.

    >>> lower_is_better("text_to_molecule/median_rank"), lower_is_better("AP/gap"), lower_is_better("calibration_error")
    (True, True, True)
    >>> lower_is_better("MRR"), lower_is_better("effective_rank")
    (False, False)
    """
    return _LOWER.search(metric) is not None
