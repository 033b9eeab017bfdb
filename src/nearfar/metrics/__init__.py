"""Metrics that cannot mislead: each is an ``Estimate`` with interval, sample size and chance level."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearfar.ids import split_hash
from nearfar.lazy import lazy_names
from nearfar.metrics.comparison import (
    Difference,
    compare,
    holm,
    items_needed,
    paired_difference,
    seeds_interval,
)
from nearfar.metrics.count_metrics import by_group, count_estimate, f1_macro, f1_micro, item_values, share
from nearfar.metrics.estimate import Estimate, comparable
from nearfar.metrics.intervals import bootstrap_mean, few_runs, mean_interval, wilson

if TYPE_CHECKING:
    from nearfar.metrics.embeddings import alignment as alignment
    from nearfar.metrics.embeddings import effective_rank as effective_rank
    from nearfar.metrics.embeddings import embedding_health as embedding_health
    from nearfar.metrics.embeddings import hubness as hubness
    from nearfar.metrics.embeddings import mean_cosine as mean_cosine
    from nearfar.metrics.embeddings import modality_gap as modality_gap
    from nearfar.metrics.embeddings import uniformity as uniformity
    from nearfar.metrics.embeddings import variance as variance
    from nearfar.metrics.in_batch import batch_signals as batch_signals
    from nearfar.metrics.in_batch import group_signals as group_signals
    from nearfar.metrics.precision_at_r import map_at_r as map_at_r
    from nearfar.metrics.ranking_scores import describe_ranking as describe_ranking
    from nearfar.metrics.ranking_scores import score_ranking as score_ranking
    from nearfar.metrics.ranks import Ranks as Ranks
    from nearfar.metrics.retrieval import RecallAtK as RecallAtK
    from nearfar.metrics.retrieval import rank_estimates as rank_estimates
    from nearfar.metrics.retrieval import retrieval_metrics as retrieval_metrics
    from nearfar.metrics.retrieval import retrieval_ranks as retrieval_ranks
    from nearfar.metrics.retrieval_scores import RetrievalScores as RetrievalScores
    from nearfar.metrics.retrieval_scores import score_retrieval as score_retrieval

# Resolved on first use: what needs PyTorch takes seconds to load, and reading and comparing runs needs none of it.
_HOME = {
    "Ranks": "ranks",
    "RecallAtK": "retrieval",
    "RetrievalScores": "retrieval_scores",
    "alignment": "embeddings",
    "batch_signals": "in_batch",
    "describe_ranking": "ranking_scores",
    "effective_rank": "embeddings",
    "embedding_health": "embeddings",
    "group_signals": "in_batch",
    "hubness": "embeddings",
    "map_at_r": "precision_at_r",
    "mean_cosine": "embeddings",
    "modality_gap": "embeddings",
    "rank_estimates": "retrieval",
    "retrieval_metrics": "retrieval",
    "retrieval_ranks": "retrieval",
    "score_ranking": "ranking_scores",
    "score_retrieval": "retrieval_scores",
    "uniformity": "embeddings",
    "variance": "embeddings",
}
__all__ = [
    "Difference",
    "Estimate",
    "bootstrap_mean",
    "by_group",
    "comparable",
    "compare",
    "count_estimate",
    "f1_macro",
    "f1_micro",
    "few_runs",
    "holm",
    "item_values",
    "items_needed",
    "mean_interval",
    "paired_difference",
    "seeds_interval",
    "share",
    "split_hash",
    "wilson",
    *_HOME,
]

__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
