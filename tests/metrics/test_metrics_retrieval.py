"""Estimates of retrieval: outside oracles, trivial cut-offs, intervals that cover."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.metrics import (
    Estimate,
    Ranks,
    RecallAtK,
    bootstrap_mean,
    comparable,
    few_runs,
    mean_interval,
    retrieval_metrics,
    retrieval_ranks,
    split_hash,
    wilson,
)
from nearfar.metrics.intervals import median_places, order_statistics, t_quantile


def embeddings(n: int, d: int = 12, noise: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n, d, generator=generator)
    return queries, queries + noise * torch.randn(n, d, generator=generator)


@pytest.mark.slow
def test_values_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    queries, keys = embeddings(80)
    cosine = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(keys).T
    scores = retrieval_metrics(queries, keys, ks=(1, 5, 10))
    for k in (1, 5, 10):
        expected = metrics.top_k_accuracy_score(np.arange(80), cosine.numpy(), k=k)
        assert scores[f"R@{k}"].value == pytest.approx(expected)
    mrr = metrics.label_ranking_average_precision_score(np.eye(80), cosine.numpy())  # one relevant: MRR
    assert scores["MRR"].value == pytest.approx(mrr)


@pytest.mark.slow
def test_median_rank_agrees_with_numpy():
    for n in (31, 32):
        queries, keys = embeddings(n)
        ranks = retrieval_ranks(queries, keys)
        assert retrieval_metrics(queries, keys)["median_rank"].value == np.median(ranks.better + 1)


def test_a_gallery_of_ten_makes_recall_at_ten_trivial():
    queries, keys = embeddings(10)
    scores = retrieval_metrics(queries, keys, ks=(1, 9, 10, 50))
    assert [scores[f"R@{k}"].trivial for k in (1, 9, 10, 50)] == [False, False, True, True]
    assert scores["R@10"].value == scores["R@10"].chance == scores["R@50"].value == 1.0
    assert scores["R@1"].chance == pytest.approx(0.1)
    assert scores["MRR"].chance == pytest.approx(sum(1 / r for r in range(1, 11)) / 10)
    assert scores["median_rank"].chance == 5.5
    assert "trivial" in str(scores["R@10"])


def test_recall_is_trivial_when_so_many_are_relevant_that_none_can_miss():
    relevant = torch.ones(4, 6, dtype=torch.bool)
    relevant[:, 0] = False
    generator = torch.Generator().manual_seed(0)
    scores = retrieval_metrics(
        torch.randn(4, 3, generator=generator), torch.randn(6, 3, generator=generator), relevant, ks=(1, 2)
    )
    assert (scores["R@1"].trivial, scores["R@2"].trivial) == (False, True)
    assert scores["R@1"].chance == pytest.approx(5 / 6)


def test_one_row():
    scores = retrieval_metrics(torch.ones(1, 4), torch.ones(1, 4), ks=(1,))
    for estimate in scores.values():
        assert estimate.value == estimate.chance == 1.0
        assert estimate.trivial
        assert estimate.low <= 1.0 <= estimate.high


@pytest.mark.slow
def test_protocol_states_what_was_measured():
    queries, keys = embeddings(40)
    split = split_hash(range(40))
    forward, backward = retrieval_metrics(queries, keys, both=True, split=split)
    assert forward["R@1"].protocol["gallery"] == 40
    assert forward["R@1"].protocol["split"] == split
    assert forward["R@1"].protocol["direction"] == "queries to keys"
    assert backward["R@1"].protocol["direction"] == "keys to queries"
    assert comparable(forward["R@1"], retrieval_metrics(keys, queries, split=split)["R@1"]) is None
    assert "direction differs" in (comparable(forward["R@1"], backward["R@1"]) or "")


def test_half_precision_is_accumulated_in_float32():
    queries, keys = embeddings(200, d=64)
    full = retrieval_metrics(queries.half().float(), keys.half().float())
    half = retrieval_metrics(queries.half(), keys.half())
    assert {name: e.value for name, e in half.items()} == {name: e.value for name, e in full.items()}


def test_results_repeat_and_leave_the_global_generators_alone():
    queries, keys = embeddings(100)
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = retrieval_metrics(queries, keys), retrieval_metrics(queries, keys)
    assert first == second
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_bad_cut_offs(k):
    with pytest.raises(NearfarError, match="cut-off"):
        retrieval_metrics(torch.ones(3, 2), torch.ones(3, 2), ks=(k,))
    with pytest.raises(NearfarError, match="cut-off"):
        RecallAtK(k)


def test_recall_at_k_of_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 40, generator=generator)
    expected = np.mean([int((row > row[i]).sum()) < 5 for i, row in enumerate(logits)])
    assert RecallAtK(5)(logits).item() == pytest.approx(expected)
    for changed in (logits - 100, 0.01 * logits, logits.double()):
        assert RecallAtK(5)(changed).item() == pytest.approx(expected)
    assert RecallAtK(5)(logits).shape == ()
    targets = torch.randint(0, 40, (40,), generator=generator)
    reordered = logits.clone()
    reordered[torch.arange(40), targets] = logits.diagonal()
    reordered[torch.arange(40), torch.arange(40)] = logits[torch.arange(40), targets]
    assert RecallAtK(5)(reordered, targets).item() == pytest.approx(expected)


def test_recall_at_k_clamps_counts_ties_and_estimates():
    assert RecallAtK(100)(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).item() == 1.0
    assert RecallAtK(3)(torch.full((10, 10), -5.0)).item() == pytest.approx(0.3)
    assert RecallAtK(1)(torch.tensor([[2.0]])).item() == 1.0
    estimate = RecallAtK(3).estimate(torch.full((10, 12), -5.0))
    assert estimate.value == pytest.approx(estimate.chance) == pytest.approx(0.25)
    assert (estimate.trivial, estimate.protocol["gallery"], estimate.metric) == (False, 12, "R@3")
    assert RecallAtK(12).estimate(torch.zeros(10, 12)).trivial


@pytest.mark.slow
def test_recall_at_k_of_one_labelled_batch():
    """Rows of the same label are right, a row is no candidate of itself; against a loop, with ties."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 3, (30, 3), generator=generator).float()
    labels = torch.randint(0, 12, (30,), generator=generator)
    scores, right = x @ x.T, labels[:, None] == labels
    values = []
    for i in range(30):
        others = [j for j in range(30) if j != i]
        wanted = [j for j in others if labels[j] == labels[i]]
        if wanted:
            best = max(scores[i, j] for j in wanted)
            better = sum(bool(scores[i, j] > best) for j in others)
            level = [j for j in others if scores[i, j] == best]
            hit = sum(j in wanted for j in level) / len(level)
            values.append(0.0 if better else hit)
    recall = RecallAtK(1)
    assert recall(scores, right, leave_one_out=True).item() == pytest.approx(np.mean(values))
    assert recall(scores, right.numpy(), leave_one_out=True).item() == pytest.approx(np.mean(values))
    estimate = recall.estimate(scores, right, leave_one_out=True)
    assert estimate.value == pytest.approx(np.mean(values))
    assert (estimate.n, estimate.protocol["gallery"]) == (len(values), 29)
    assert estimate.protocol["without_relevant"] == 30 - len(values)
    flat = torch.zeros(12, 12)
    same = torch.arange(12)[:, None] // 3 == torch.arange(12) // 3
    assert recall(flat, same, leave_one_out=True).item() == pytest.approx(2 / 11)
    after = (torch.arange(12) + 1) % 12
    assert recall(flat, after, leave_one_out=True).item() == pytest.approx(1 / 11)
    assert recall.estimate(flat, after, leave_one_out=True).chance == pytest.approx(1 / 11)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "leave_one_out takes the diagonal away"),
        (torch.tensor([0, 0, 1]), "own column"),
        (torch.eye(3, dtype=torch.bool), "nothing to score"),
        (np.array([True, False, True]), "targets"),
        ([0.5, 1.0, 2.0], "targets holds fractions"),
    ],
)
def test_recall_at_k_of_one_set_refuses(targets, message):
    with pytest.raises(NearfarError, match=message):
        RecallAtK(1)(torch.ones(3, 3), targets, leave_one_out=True)


def test_recall_at_k_refuses():
    with pytest.raises(NearfarError, match="NaN in 1 of 2 rows"):
        RecallAtK(1)(torch.tensor([[1.0, 0.0], [torch.nan, 0.0]]))
    with pytest.raises(NearfarError, match="diagonal"):
        RecallAtK(1)(torch.ones(3, 2))
    with pytest.raises(NearfarError, match="columns between 0 and 1"):
        RecallAtK(1)(torch.ones(3, 2), torch.tensor([0, 1, 2]))


def test_estimate_survives_json_and_pickle_with_nan():
    estimate = Estimate(math.nan, -math.inf, math.inf, 0.5, 3, False, "AUROC", {"gallery": 4, "split": None})
    text = json.dumps(estimate.to_dict(), allow_nan=False)
    back = Estimate.from_dict(json.loads(text))
    assert math.isnan(back.value)
    assert (back.low, back.high, back.protocol) == (-math.inf, math.inf, estimate.protocol)
    assert str(pickle.loads(pickle.dumps(estimate))) == str(estimate)
    assert isinstance(hash(estimate), int)
    with pytest.raises(NearfarError, match="chance missing"):
        Estimate.from_dict({k: v for k, v in estimate.to_dict().items() if k != "chance"})


def test_split_hash_knows_sets():
    assert split_hash([3, 1, 2]) == split_hash((1, 2, 3))
    assert len({split_hash(ids) for ids in ([1, 2], ["1", "2"], [1, 2, 3], ["12"], [])}) == 5


def test_comparable_gives_the_reason():
    protocol = {"gallery": 100, "split": "x"}
    base = Estimate(0.5, 0.4, 0.6, 0.01, 100, False, "R@1", protocol)

    def other(**changes):
        return Estimate(**{**base.__dict__, **changes})

    assert comparable(base, other(value=0.9, protocol={**protocol, "interval": "Wilson"})) is None
    assert "metric differs" in (comparable(base, other(metric="R@5")) or "")
    assert "split differs: x and y" in (comparable(base, other(protocol={**protocol, "split": "y"})) or "")
    assert "gallery differs" in (comparable(base, other(protocol={**protocol, "gallery": 10})) or "")
    assert "items differs" in (comparable(base, other(n=90)) or "")
    assert "trivial" in (comparable(other(trivial=True), other(trivial=True)) or "")
    unstated = other(protocol={"gallery": 100})
    assert "states its split" in (comparable(unstated, unstated) or "")


@pytest.mark.slow
def test_quantiles_and_intervals_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for df in (0.5, 1, 1.7, 2, 10.3, 500, 1e6):
        for p in (0.001, 0.2, 0.5, 0.975, 0.9999):
            assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-7, abs=1e-12)
    for hits, n in ((0, 5), (3, 9), (50, 50), (200, 900)):
        expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    values = [0.3, 0.35, 0.34, 0.31]
    expected_t = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert few_runs(values) == pytest.approx(expected_t)
    assert few_runs([0.3]) == (-math.inf, math.inf)
    scores = np.random.default_rng(0).random(60) ** 3
    reference = stats.bootstrap(
        (scores,), np.mean, n_resamples=20000, method="BCa", rng=np.random.default_rng(1)
    )
    own = bootstrap_mean(scores, resamples=20000)
    assert own == pytest.approx(tuple(reference.confidence_interval), abs=0.003)
    for n in (6, 25, 100):
        low, high = order_statistics(n)
        assert stats.binom.cdf(low - 1, n, 0.5) <= 0.025 < stats.binom.cdf(low, n, 0.5)
        assert high == n + 1 - low


def test_the_interval_follows_the_data():
    assert mean_interval(np.ones(50))[2] == "Wilson"
    assert mean_interval(np.r_[np.ones(45), np.zeros(5)])[2] == "Wilson"
    graded = np.random.default_rng(0).random(200)
    assert mean_interval(graded)[2] == "bootstrap (BCa)"
    assert mean_interval(graded, resamples=0)[2] == "Wilson, effective n"
    assert mean_interval(graded[:40])[2] == "Wilson, effective n"
    assert mean_interval(np.array([0.3])) == (0.0, 1.0, "none: one item")


def test_graded_scores_vary_less_than_hits():
    graded = np.random.default_rng(0).random(40)
    low, high, _ = mean_interval(graded)
    widest = wilson(float(graded.mean()), 40)
    assert widest[0] < low < graded.mean() < high < widest[1]
    # Without variation nothing says how much there is: as wide as for hits.
    low, high, _ = mean_interval(np.full(40, 0.25))
    assert high - low > 0.97 * np.subtract(*wilson(0.25, 40)[::-1])


def test_the_median_is_bounded_between_places():
    for n in (6, 11, 100, 3000):
        low, high = median_places(n)
        first, last = order_statistics(n)
        assert first <= low < first + 1
        assert low + high == pytest.approx(n + 1)
        assert last - 1 < high <= last
    assert median_places(4) == (0.0, 5.0)
    ranks = Ranks.of([0, 2, 9], tied=[0, 0, 0], gallery=10)
    assert ranks.at_place(2) == 3.0
    assert ranks.at_place(2.5) == 6.5


@pytest.mark.slow
@pytest.mark.parametrize(("n", "difficulty"), [(40, 8.0), (150, 2.0)])
def test_intervals_cover_the_truth(n, difficulty):
    """Reciprocal ranks of a population whose mean is known; 95 % within what 400 samples can tell."""
    rng = np.random.default_rng(0)
    population = 1 / (1 + np.floor(difficulty * rng.pareto(0.5, 100_000)))
    inside = 0
    for seed in range(400):
        low, high, _ = mean_interval(rng.choice(population, n), resamples=500, seed=seed)
        inside += low <= population.mean() <= high
    assert inside / 400 > 0.92


def test_resampled_means_do_not_depend_on_chunks(monkeypatch):
    from nearfar.metrics import intervals

    scores = np.random.default_rng(0).random(300)
    whole = bootstrap_mean(scores)
    monkeypatch.setattr(intervals, "_CHUNK", 1000)
    pieces = bootstrap_mean(scores)
    assert pieces == pytest.approx(whole, abs=0.02)  # other draws, same distribution
