"""Metrics that cannot mislead: each is an ``Estimate`` with interval, sample size and chance level."""

from __future__ import annotations

from nearfar.metrics.comparison import Difference, compare, paired_difference
from nearfar.metrics.estimate import Estimate, comparable, split_hash
from nearfar.metrics.intervals import bootstrap_mean, few_runs, mean_interval, wilson
from nearfar.metrics.ranks import Ranks
from nearfar.metrics.recall import RecallAtK
from nearfar.metrics.retrieval import rank_estimates, retrieval_metrics, retrieval_ranks

__all__ = [
    "Difference",
    "Estimate",
    "Ranks",
    "RecallAtK",
    "bootstrap_mean",
    "comparable",
    "compare",
    "few_runs",
    "mean_interval",
    "paired_difference",
    "rank_estimates",
    "retrieval_metrics",
    "retrieval_ranks",
    "split_hash",
    "wilson",
]
