"""Rankings against qrels: trec_eval without ties, every order with them, what is missing, and the power."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nearfar.errors import NearfarError
from nearfar.metrics import comparable, describe_ranking, items_needed, paired_difference, score_ranking

METRICS = ["nDCG", "nDCG@5", "MAP", "MAP@5", "MRR", "R-precision", "recall@5", "precision@5", "hit@1"]
THEIRS = ["ndcg", "ndcg_cut_5", "map", "map_cut_5", "recip_rank", "Rprec", "recall_5", "P_5", "success_1"]


def made(queries: int = 40, documents: int = 200, depth: int = 50, seed: int = 0):
    rng = np.random.default_rng(seed)
    qrels, ranking = {}, {}
    for i in range(queries):
        judged = rng.choice(documents, 20, replace=False)
        qrels[f"q{i}"] = {f"d{j}": int(g) for j, g in zip(judged, rng.integers(0, 4, 20), strict=True)}
        listed = rng.choice(documents, depth, replace=False)
        gain = np.array([qrels[f"q{i}"].get(f"d{j}", 0) for j in listed])
        scores = np.round(gain * rng.random(depth) + rng.standard_normal(depth), 6)
        ranking[f"q{i}"] = {f"d{j}": float(s) for j, s in zip(listed, scores, strict=True)}
    return ranking, qrels


def test_trec_eval():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    ranking, qrels = made()
    scores = score_ranking(ranking, qrels, METRICS)
    asked = {"ndcg", "map", "recip_rank", "Rprec", "ndcg_cut.5", "map_cut.5", "recall.5", "P.5", "success.1"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, asked).evaluate(ranking)
    for ours, other in zip(METRICS, THEIRS, strict=True):
        expected = [theirs[q][other] for q in scores.queries]
        np.testing.assert_allclose(scores[ours], expected, rtol=0, atol=1e-9, err_msg=ours)


def test_ties_are_means_over_every_order():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    listed = {"a": 2.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0, "f": 0.0}
    qrels = {"q": {"a": 0, "b": 2, "d": 1, "f": 1, "x": 3}}
    asked = {"ndcg", "map", "recip_rank", "Rprec", "ndcg_cut.5", "map_cut.5", "recall.5", "P.5", "success.1"}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, asked)
    every = []
    for order in itertools.permutations("bcde"):
        run = {"q": {d: 10.0 - i for i, d in enumerate(("a", *order, "f"))}}
        every.append(evaluator.evaluate(run)["q"])
    for ties, of in (("expected", np.mean), ("optimistic", max), ("pessimistic", min)):
        scores = score_ranking({"q": listed}, qrels, METRICS, ties=ties)
        for ours, other in zip(METRICS, THEIRS, strict=True):
            assert scores[ours][0] == pytest.approx(of([each[other] for each in every]), abs=1e-12), ours


@pytest.mark.slow
def test_chance_is_a_random_order_of_the_collection():
    ranking, qrels = made(queries=3, documents=60, depth=10)
    scores = score_ranking(ranking, qrels, ["nDCG@10", "recall@5", "MAP"], documents=60)
    rng = np.random.default_rng(0)
    guesses = [
        score_ranking(
            {q: {f"d{j}": float(s) for j, s in enumerate(rng.random(60))} for q in qrels},
            qrels,
            ["nDCG@10", "recall@5", "MAP"],
        )
        for _ in range(200)
    ]
    for name in scores:
        assert scores.chances[name].mean() == pytest.approx(
            np.mean([each[name].mean() for each in guesses]), abs=0.02
        )
    assert scores.estimates()["MAP"].protocol["gallery"] == 60
    unknown = score_ranking(ranking, qrels, ["MAP"]).estimates()["MAP"]
    assert math.isnan(unknown.chance)
    assert "chance" not in str(unknown)
    assert comparable(unknown, unknown) is None
    assert not unknown.trivial


def test_queries_that_are_missing_on_either_side():
    qrels = {"q1": {"d1": 1}, "q2": {"d2": 1}, "q3": {"d3": 0}, "q4": {"d4": 1}}
    ranking = {"q1": {"d1": 2.0}, "q2": {"d9": 1.0}, "q3": {"d3": 1.0}, "q9": {"d1": 1.0}}
    zero = score_ranking(ranking, qrels, "MRR")
    assert zero.queries == ["q1", "q2", "q4"]
    assert zero["MRR"].tolist() == [1.0, 0.0, 0.0]
    assert zero.protocol["without_relevant"] == 1
    skip = score_ranking(ranking, qrels, "MRR", missing="skip")
    assert skip.queries == ["q1", "q2"]
    assert "differs" in (comparable(zero.estimates()["MRR"], skip.estimates()["MRR"]) or "")
    text = "\n".join(describe_ranking(ranking, qrels, {"d1", "d2", "d3", "d9"}))
    for words in (
        "ranking: 4 queries, 1 documents each",
        "1 of 3 judged queries are not ranked (q4)",
        "1 of 4 ranked queries are not judged (q9)",
        "1 of 4 judged queries have no relevant document",
        "67 % of the first 10",
        "2 of 3 relevant documents are not listed",
        "1 judged documents are not in the collection (d4)",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("ranking", "qrels", "options", "words"),
    [
        ({"a": {"d": 1}}, {"q": {"d": 1}}, {}, "no query in common: 'a' … and 'q' …"),
        ({"q": {"d": 1}}, {"q": {"d": 0}}, {}, "no query that is ranked has a relevant document"),
        ({"q": {"d": 1}}, {"q": {"d": 1}}, {"metrics": "mean_rank"}, "lists are cut off"),
        ({"q": {"d": 1, "e": 2}}, {"q": {"d": 1}}, {"documents": 1}, "more than the 1 that there are"),
        ({"q": {"d": math.nan}}, {"q": {"d": 1}}, {}, "a finite number is needed"),
        ({"q": ["d"]}, {"q": {"d": 1}}, {"missing": "maybe"}, "missing is 'maybe'"),
        ({1.5: {"d": 1}}, {"q": {"d": 1}}, {}, "ids are texts or whole numbers"),
    ],
)
def test_what_is_refused(ranking, qrels, options, words):
    with pytest.raises(NearfarError, match=words):
        score_ranking(ranking, qrels, **options)


@pytest.mark.slow
def test_so_many_items_tell_the_difference_in_four_of_five_cases():
    rng = np.random.default_rng(0)
    population = rng.normal(0.02, 0.15, 100_000)
    pilot = paired_difference(population, np.zeros(100_000))
    n = items_needed(pilot)
    assert n == pytest.approx(((1.96 + 0.8416) * 0.15 / 0.02) ** 2, rel=0.05)
    told = [paired_difference(rng.choice(population, n), np.zeros(n)).verdict == "better" for _ in range(500)]
    assert 0.75 < np.mean(told) < 0.85
    seeds = paired_difference(rng.random((2, 30)), rng.random((2, 30)))
    with pytest.raises(NearfarError, match="several seeds"):
        items_needed(seeds)
