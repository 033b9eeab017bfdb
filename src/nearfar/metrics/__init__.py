"""Metrics that cannot mislead: each is an ``Estimate`` with interval, sample size and chance level."""

from __future__ import annotations

from nearfar.metrics.batch_signals import batch_signals, group_signals
from nearfar.metrics.comparison import (
    Difference,
    compare,
    holm,
    items_needed,
    paired_difference,
    seeds_interval,
)
from nearfar.metrics.count_metrics import by_group, count_estimate, f1_macro, f1_micro, item_values, share
from nearfar.metrics.embedding_health import (
    alignment,
    effective_rank,
    embedding_health,
    hubness,
    mean_cosine,
    modality_gap,
    uniformity,
    variance,
)
from nearfar.metrics.estimate import Estimate, comparable, split_hash
from nearfar.metrics.intervals import bootstrap_mean, few_runs, mean_interval, wilson
from nearfar.metrics.precision_at_r import map_at_r
from nearfar.metrics.ranking_scores import describe_ranking, score_ranking
from nearfar.metrics.ranks import Ranks
from nearfar.metrics.retrieval import RecallAtK, rank_estimates, retrieval_metrics, retrieval_ranks
from nearfar.metrics.retrieval_scores import RetrievalScores, score_retrieval

__all__ = [
    "Difference",
    "Estimate",
    "Ranks",
    "RecallAtK",
    "RetrievalScores",
    "alignment",
    "batch_signals",
    "bootstrap_mean",
    "by_group",
    "comparable",
    "compare",
    "count_estimate",
    "describe_ranking",
    "effective_rank",
    "embedding_health",
    "f1_macro",
    "f1_micro",
    "few_runs",
    "group_signals",
    "holm",
    "hubness",
    "item_values",
    "items_needed",
    "map_at_r",
    "mean_cosine",
    "mean_interval",
    "modality_gap",
    "paired_difference",
    "rank_estimates",
    "retrieval_metrics",
    "retrieval_ranks",
    "score_ranking",
    "score_retrieval",
    "seeds_interval",
    "share",
    "split_hash",
    "uniformity",
    "variance",
    "wilson",
]
