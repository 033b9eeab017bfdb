"""Rankings of other tools against qrels: scored alone, or compared query by query as runs are."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nearfar.data.files import Json, write_atomically
from nearfar.data.rankings import RankedLists, read_beir, read_qrels, read_ranking
from nearfar.errors import NearfarError, nearest_name
from nearfar.metrics import Estimate, describe_ranking, items_needed, score_ranking
from nearfar.metrics.intervals import normal_quantile
from nearfar.metrics.ranking_scores import RANKING_METRICS
from nearfar.metrics.retrieval_scores import RetrievalScores
from nearfar.terminal import metric_words
from nearfar.training.run_folder import RunFolder

if TYPE_CHECKING:  # scoring needs no extra; comparing does
    from nearfar.lab.compare import Arm, Comparison

__all__ = [
    "RANKING_METRICS",
    "Judged",
    "RankingOptions",
    "ScoredRanking",
    "compare_rankings",
    "describe_rankings",
    "score_file",
    "write_scores",
]

#: the share of cases in which the stated number of queries would tell a difference
POWER = 0.8
MISSING = ("refuse", "zero", "skip")


@dataclass(frozen=True)
class RankingOptions:
    """How rankings are read and scored: see ``score_ranking`` and ``read_ranking``."""

    metrics: Sequence[str] = RANKING_METRICS
    documents: int | None = None
    missing: str = "refuse"
    ties: str = "expected"
    gain: str = "linear"
    by: str = "score"
    part: str | None = None
    split: str = "test"
    bootstrap: int = 1000


@dataclass
class Judged:
    """Qrels, and the ids of the collection's documents where they are known."""

    qrels: RankedLists
    documents: Collection[str] | int | None = None

    @classmethod
    def read(cls, path: Path, options: RankingOptions) -> Judged:
        """Of a file, or of a folder of BEIR's with its collection."""
        documents: Collection[str] | int | None = options.documents
        if path.is_dir() and (path / "corpus.jsonl").is_file():
            data = read_beir(path, options.split, texts=False)
            qrels = data.qrels
            documents = set(data.documents) if documents is None else documents
        else:
            qrels = read_qrels(path, options.split if path.is_dir() else None)
        return cls(qrels, documents)


@dataclass
class ScoredRanking:
    """A ranking's estimates, the scores of its queries, and what a reader has to know of it."""

    name: str
    scores: RetrievalScores
    estimates: dict[str, Estimate]
    notes: list[str] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        """The scored queries."""
        return list(self.scores.queries)

    def to_dict(self) -> Json:
        """As JSON takes it: estimates, and each query's score under each metric."""
        per_query = {
            name: dict(zip(self.ids, column.tolist(), strict=True)) for name, column in self.scores.items()
        }
        estimates = {name: estimate.to_dict() for name, estimate in self.estimates.items()}
        return {"ranking": self.name, "estimates": estimates, "per_query": per_query, "notes": self.notes}


def score_file(path: Path, judged: Judged, options: RankingOptions, name: str | None = None) -> ScoredRanking:
    """Read a ranking and score it; queries that are judged and not ranked score 0 unless ``missing`` is "skip"."""
    ranking = read_ranking(path, options.part, options.by)
    return _scored(ranking, judged, options, name or path.name)


def _scored(ranking: RankedLists, judged: Judged, options: RankingOptions, name: str) -> ScoredRanking:
    scores = score_ranking(
        ranking,
        judged.qrels,
        options.metrics,
        documents=judged.documents,
        missing="skip" if options.missing == "skip" else "zero",
        ties=options.ties,
        gain=options.gain,
    )
    notes = describe_ranking(ranking, judged.qrels, judged.documents)
    return ScoredRanking(name, scores, scores.estimates(bootstrap=options.bootstrap), notes)


def compare_rankings(
    paths: Sequence[Path], judged: Judged, options: RankingOptions, baseline: str | None = None
) -> Comparison:
    """Each ranking's paired differences from the first (or ``baseline``), query by query.

    Rankings of different queries are refused with their names, unless ``missing`` says that a query that is not ranked
    scores 0 ("zero"), or that only queries which all rankings have are compared ("skip").
    """
    from nearfar.lab.compare import Mean, compare_arms

    if options.missing not in MISSING:
        raise NearfarError(f"--missing is {options.missing!r}; it is refuse, zero or skip")
    if len(paths) < 2:
        raise NearfarError("a comparison needs at least two rankings; one alone is scored by: nearfar score")
    rankings = [read_ranking(path, options.part, options.by) for path in paths]
    if options.missing == "skip":
        common = set.intersection(*(set(each) for each in rankings))
        qrels = {q: grades for q, grades in judged.qrels.lists.items() if q in common}
        left_out = [q for q in judged.qrels if q not in common]
        judged = Judged(RankedLists(qrels, judged.qrels.source, judged.qrels.rejections), judged.documents)
    else:
        left_out = []
    names = _names(paths)
    scoring = options
    if options.missing == "refuse":  # each on its own queries, which are then compared
        scoring = RankingOptions(**{**options.__dict__, "missing": "skip"})
    scored = [_scored(each, judged, scoring, name) for each, name in zip(rankings, names, strict=True)]
    arms = [_arm(each, path) for each, path in zip(scored, paths, strict=True)]
    base = arms[0]
    if baseline is not None:
        matches = [arm for arm in arms if baseline in (arm.label, Path(arm.label).stem)]
        if len(matches) != 1:
            raise NearfarError(f"no ranking is called '{baseline}': {nearest_name(baseline, names)}")
        base = matches[0]
    comparison = compare_arms(arms, base, judged.qrels.source, next(iter(scored[0].scores)))
    for arm in arms:
        if arm.label in comparison.refused:
            comparison.refused[arm.label] += (
                ". --missing zero counts a query that is not ranked as 0, --missing skip compares those that all rank."
            )
        comparison.summary[arm.label] = {
            name: Mean(each.value, each.low, each.high, str(each.protocol["interval"]))
            for name, each in arm.estimates[0].items()
        }
        if arm.label in comparison.differences:
            comparison.needed[arm.label] = {
                name: items_needed(difference, POWER)
                for name, difference in comparison.differences[arm.label].items()
            }
    comparison.notes = list(dict.fromkeys(note for each in scored for note in each.notes))
    if left_out:
        comparison.notes.insert(
            0,
            f"{len(left_out)} judged queries are not in all rankings and left out ({', '.join(left_out[:5])}).",
        )
    return comparison


def _names(paths: Sequence[Path]) -> list[str]:
    """The files' names, with folders where two are called the same."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise NearfarError(f"{twice} is given twice: a ranking does not differ from itself.")
    return names


def _arm(scored: ScoredRanking, path: Path) -> Arm:
    from omegaconf import OmegaConf

    from nearfar.lab.compare import Arm

    order = np.argsort(np.array(scored.ids))
    per_item = {name: column[order] for name, column in scored.scores.items()}
    return Arm(
        [scored.name],
        {0: RunFolder(path)},
        OmegaConf.create({}),
        estimates={0: scored.estimates},
        per_item={0: per_item},
        ids=np.array(scored.ids)[order],
    )


def describe_rankings(comparison: Comparison) -> list[str]:
    """The verdict by the first metric, what so many queries can tell, and what is to know of each ranking."""
    paragraphs = []
    monitor, base = comparison.monitor, comparison.baseline.label
    words = metric_words(monitor)
    for label, differences in comparison.differences.items():
        d = differences.get(monitor)
        if d is None:
            continue
        numbers = f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"
        if d.verdict == "not distinguishable":
            text = f"{label} is not distinguishable from {base} by {words}: {numbers} covers 0."
        else:
            text = f"{label} is {d.verdict} than {base} by {words}: {numbers} excludes 0."
        together = normal_quantile(0.5 + d.confidence / 2) + normal_quantile(POWER)
        assert d.spread is not None
        least = together * math.sqrt(d.spread.of_items)
        needed = comparison.needed.get(label, {}).get(monitor)
        text += f" {d.n} queries tell a difference of {least:.4f} in {POWER:.0%} of cases".replace("%", " %")
        text += "." if needed is None else f"; this one would take about {needed:,}."
        if comparison.judged_together > 1:
            remaining = [m for m, v in comparison.together[label].items() if v != "not distinguishable"]
            text += f" Judged together with all {comparison.judged_together} differences (Holm), "
            text += f"{', '.join(map(metric_words, remaining)) or 'none'} still differ{'s' * (len(remaining) < 2)}."
        paragraphs.append(text)
    if paragraphs:
        paragraphs.append(
            "The interval is over queries. Each ranking is of one model: one that was trained again may rank otherwise."
        )
    return [*paragraphs, *comparison.notes]


def write_scores(scored: Sequence[ScoredRanking], path: Path) -> Path:
    """Write estimates and scores of single queries as JSON."""
    if path.suffix != ".json":
        raise NearfarError(f"--output {path}: scores are written as .json")
    text = json.dumps([each.to_dict() for each in scored], indent=2, ensure_ascii=False)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path
