"""Metrics over several and graded relevant keys: trec_eval without ties, every order of every tie with them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.metrics import (
    comparable,
    map_at_r,
    mean_interval,
    rank_estimates,
    retrieval_metrics,
    retrieval_ranks,
    score_retrieval,
    split_hash,
)
from nearfar.metrics.intervals import mean_intervals
from nearfar.metrics.retrieval_inputs import read_inputs
from nearfar.metrics.retrieval_scores import count_places, read_metrics

ALL = [
    "nDCG", "nDCG@1", "nDCG@3", "MAP", "MAP@3", "MAP@R", "recall@1", "recall@3", "precision@1", "precision@3",
    "R-precision", "hit@1", "hit@3", "R@2", "MRR", "MRR@2", "mean_rank",
]  # fmt: skip


def graded(
    n: int, m: int, most: int, seed: int = 0, grades: tuple[int, ...] = (1, 2, 3)
) -> list[dict[int, int]]:
    rng = np.random.default_rng(seed)
    return [
        {
            int(j): int(rng.choice(grades))
            for j in rng.choice(m, size=rng.integers(1, most + 1), replace=False)
        }
        for _ in range(n)
    ]


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def of_order(name: str, order: list[int], grades: dict[int, int], gain: str = "linear") -> float:
    """One metric of one ranking, by its definition."""
    kind, _, cut = name.partition("@")
    number = len(grades)
    k = number if cut == "R" or kind == "R-precision" else int(cut) if cut else len(order)
    hits = [j in grades for j in order]
    if kind == "nDCG":
        gains = {j: g if gain == "linear" else 2.0**g - 1 for j, g in grades.items()}
        found = sum(gains.get(j, 0) / math.log2(i + 2) for i, j in enumerate(order[:k]))
        best = sum(g / math.log2(i + 2) for i, g in enumerate(sorted(gains.values(), reverse=True)[:k]))
        return found / best
    if kind == "MAP":
        return sum(sum(hits[: i + 1]) / (i + 1) for i in range(min(k, len(order))) if hits[i]) / number
    if kind in ("recall", "R-precision"):
        return sum(hits[:k]) / number
    if kind == "precision":
        return sum(hits[:k]) / k
    if kind in ("hit", "R"):
        return float(any(hits[:k]))
    first = hits.index(True) + 1
    return float(first) if kind == "mean_rank" else (1 / first if first <= k else 0.0)


def every_order(scores: np.ndarray, candidates: list[int]) -> list[list[int]]:
    levels = sorted({scores[j] for j in candidates}, reverse=True)
    ties = [[j for j in candidates if scores[j] == level] for level in levels]
    return [
        [j for tie in choice for j in tie]
        for choice in itertools.product(*(list(itertools.permutations(tie)) for tie in ties))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("gain", ["linear", "exponential"])
def test_expectations_are_means_over_every_order_of_every_tie(leave_one_out, gain):
    x = torch.randint(-1, 2, (7, 2), generator=torch.Generator().manual_seed(4)).float()
    relevant = [
        {j: g for j, g in row.items() if not leave_one_out or j != i} or {(i + 1) % 7: 1}
        for i, row in enumerate(graded(7, 7, 4))
    ]
    scored = {
        ties: score_retrieval(
            x, x.clone(), relevant, ALL, normalize=False, leave_one_out=leave_one_out, ties=ties, gain=gain
        )
        for ties in ("expected", "optimistic", "pessimistic")
    }
    products = (x.double() @ x.double().T).numpy()
    for i in range(7):
        candidates = [j for j in range(7) if not leave_one_out or j != i]
        orders = every_order(products[i], candidates)
        guesses = every_order(np.zeros(7), candidates)
        for name in ALL:
            of_each = [of_order(name, order, relevant[i], gain) for order in orders]
            ends = min(of_each), max(of_each)
            assert scored["expected"][name][i] == pytest.approx(np.mean(of_each), abs=1e-12), name
            high, low = ends if name == "mean_rank" else ends[::-1]
            assert scored["optimistic"][name][i] == pytest.approx(high, abs=1e-12), name
            assert scored["pessimistic"][name][i] == pytest.approx(low, abs=1e-12), name
            if i < 2 and (gain == "linear" or name.startswith("nDCG")):
                chance = np.mean([of_order(name, order, relevant[i], gain) for order in guesses])
                assert scored["expected"].chances[name][i] == pytest.approx(chance, abs=1e-12), name


@pytest.mark.slow
def test_trec_eval_without_ties():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    queries, keys, relevant = rows(60, 8, 0), rows(300, 8, 1), graded(60, 300, 12)
    ks = (1, 5, 20, 500)
    names = ["nDCG", "MAP", "MRR", "R-precision"]
    names += [f"{kind}@k" for kind in ("nDCG", "MAP", "recall", "precision", "hit")]
    scores = score_retrieval(queries, keys, relevant, names, ks, normalize=False)
    cut = ",".join(map(str, ks))
    asked = {"ndcg", "map", "recip_rank", "Rprec"}
    asked |= {f"{kind}.{cut}" for kind in ("ndcg_cut", "map_cut", "recall", "P", "success")}
    qrels = {str(i): {str(j): grade for j, grade in row.items()} for i, row in enumerate(relevant)}
    products = (queries.double() @ keys.double().T).numpy()
    run = {str(i): {str(j): float(s) for j, s in enumerate(row)} for i, row in enumerate(products)}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, asked).evaluate(run)
    named = {"nDCG": "ndcg", "MAP": "map", "MRR": "recip_rank", "R-precision": "Rprec"}
    cuts = {"nDCG": "ndcg_cut", "MAP": "map_cut", "recall": "recall", "precision": "P", "hit": "success"}
    named |= {f"{ours}@{k}": f"{other}_{k}" for ours, other in cuts.items() for k in ks}
    assert set(named) == set(scores)
    for ours, other in named.items():
        expected = [theirs[str(i)][other] for i in range(60)]
        np.testing.assert_allclose(scores[ours], expected, rtol=0, atol=1e-9, err_msg=ours)


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("pairs", [None, 7, 100])
def test_tiles_and_blocks_do_not_change_the_scores(both, pairs):
    queries, keys, relevant = rows(40, 5, 0), rows(70, 5, 1), graded(40, 70, 6)
    keys[10:30] = keys[3]  # a tie of 21
    options = {"normalize": True, "leave_one_out": False, "query_ids": None, "key_ids": None}
    inputs = read_inputs(queries, keys, relevant, **options)
    ways = [
        count_places(inputs, ALL, (1,), both=both, ties="expected", gain="linear", tile=tile, pairs=more)
        for tile, more in (((256, 1024), None), ((7, 16), pairs))
    ]
    for one, other in zip(*ways, strict=True):
        np.testing.assert_array_equal(one.queries, other.queries)
        for name in ALL:
            np.testing.assert_allclose(one[name], other[name], atol=1e-12, err_msg=name)
            np.testing.assert_allclose(one.chances[name], other.chances[name], atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("few", [0, 32])
def test_counts_agree_with_a_loop_in_float64(few, monkeypatch):
    """Many relevant keys, duplicates, and scores that float32 cannot tell apart; classes and leave one out."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(90, 6, generator=generator).double()
    x[20:40] = x[5]
    x[40:60] = x[60:80] + 1e-9 * torch.randn(20, 6, generator=generator).double()
    labels = torch.randint(0, 2 if few == 0 else 9, (90,), generator=generator)
    scores = score_retrieval(
        x, x.clone(), (labels, labels), ["MAP", "recall@10", "hit@1"], leave_one_out=True, tile=(32, 40)
    )
    unit = torch.nn.functional.normalize(x)
    products = unit @ unit.T
    for at, i in enumerate(scores.queries):
        others = [j for j in range(90) if j != i]
        right = [j for j in others if labels[j] == labels[i]]
        level = {j: products[i, j].item() for j in others}
        width = 2.0**-51 * 6
        average = inside = 0.0
        for j in right:
            above = [o for o in others if level[o] > level[j] + width]
            tie = [o for o in others if abs(level[o] - level[j]) <= width]
            c, s = sum(o in right for o in above), len(above)
            r, t = sum(o in right for o in tie), len(tie)
            inside += min(max((10 - s) / t, 0.0), 1.0)
            for place in range(t):  # this key at each place of the tie
                more = 1 + place * (r - 1) / (t - 1) if t > 1 else 1
                average += (c + more) / (s + place + 1) / t
        assert scores["MAP"][at] == pytest.approx(average / len(right), abs=1e-10)
        assert scores["recall@10"][at] == pytest.approx(inside / len(right), abs=1e-12)


@pytest.mark.parametrize("tile", [(256, 1024), (50, 70)])
@pytest.mark.parametrize("collapsed", [False, True])
def test_more_relevant_keys_than_are_compared_one_by_one(tile, collapsed):
    generator = torch.Generator().manual_seed(1)
    queries, keys = rows(40, 5, 0), rows(500, 5, 1)
    keys[100:200] = keys[7]
    if collapsed:  # scores that only float64 tells apart
        keys = keys[:1] + 1e-9 * keys.double()
        queries = queries.double()
    relevant = torch.rand(40, 500, generator=generator) < 0.4
    scores = score_retrieval(queries, keys, relevant, ["MAP", "recall@50", "nDCG"], tile=tile)
    unit = [torch.nn.functional.normalize(x.double()) for x in (queries, keys)]
    products, width = unit[0] @ unit[1].T, 2.0**-51 * 5
    for i in range(40):
        right = products[i][relevant[i]]
        above = (products[i][None, :] > right[:, None] + width).sum(1).double()
        tie = ((products[i][None, :] - right[:, None]).abs() <= width).sum(1).double()
        inside = ((50 - above) / tie).clamp(0, 1).sum() / len(right)
        assert scores["recall@50"][i] == pytest.approx(inside.item(), abs=1e-9)
        sums = torch.cat(
            [torch.zeros(1).double(), (1 / torch.log2(torch.arange(2.0, 502).double())).cumsum(0)]
        )
        gain = ((sums[(above + tie).long()] - sums[above.long()]) / tie).sum() / sums[len(right)]
        assert scores["nDCG"][i] == pytest.approx(gain.item(), abs=1e-9)


@pytest.mark.slow
def test_one_relevant_key_gives_the_ranks_of_today():
    queries, keys = rows(80, 6, 0), rows(80, 6, 1)
    keys[:30] = keys[2]
    today = retrieval_metrics(queries, keys, both=True)
    for one, other in zip(
        today, retrieval_metrics(queries, keys, metrics=["R@k", "MRR", "median_rank"], both=True), strict=True
    ):
        assert list(one) == list(other)
        for name in one:
            assert other[name].value == pytest.approx(one[name].value)
            assert other[name].chance == pytest.approx(one[name].chance)
            assert (other[name].low, other[name].high) == pytest.approx((one[name].low, one[name].high))
            assert other[name].protocol == one[name].protocol
    scores = score_retrieval(queries, keys, metrics=["MAP", "MRR"])
    np.testing.assert_allclose(scores["MAP"], scores["MRR"])
    np.testing.assert_allclose(scores["MRR"], retrieval_ranks(queries, keys).reciprocal())


def test_map_at_r_of_a_labelled_set():
    x, labels = rows(50, 4, 0), torch.arange(50) // 5
    ours = retrieval_metrics(x, x.clone(), (labels, labels), metrics="MAP@R", leave_one_out=True)["MAP@R"]
    other = map_at_r(x, labels)
    assert (ours.value, ours.chance) == pytest.approx((other.value, other.chance))


@pytest.mark.slow
def test_collapsed_embeddings_score_chance_between_the_two_ends():
    x = torch.ones(40, 4)
    relevant = graded(40, 40, 5)

    middle = retrieval_metrics(x, x.clone(), relevant, metrics=ALL)
    high = retrieval_metrics(x, x.clone(), relevant, metrics=ALL, ties="optimistic")
    low = retrieval_metrics(x, x.clone(), relevant, metrics=ALL, ties="pessimistic")
    for name, estimate in middle.items():
        assert estimate.value == pytest.approx(estimate.chance), name
        assert high[name].chance == pytest.approx(estimate.chance)
        assert high[name].protocol["ties"] == "optimistic"
    assert high["nDCG"].value == high["MAP"].value == 1.0
    assert low["nDCG@3"].value == low["recall@3"].value == 0.0
    assert high["mean_rank"].value == 1.0
    assert "ties differs" in (comparable(high["MAP"], middle["MAP"]) or "")


@pytest.mark.slow
def test_ids_and_grades_of_qrels():
    queries, keys = rows(3, 4, 0), rows(4, 4, 1)
    qrels = {"q0": {"d1": 2, "d3": 0, "d0": 1}, "q1": ["d2"], "q2": {"d3": 0}}
    ids = {"query_ids": ["q0", "q1", "q2"], "key_ids": ["d0", "d1", "d2", "d3"]}
    by_id = score_retrieval(queries, keys, qrels, ["nDCG", "MAP"], **ids)
    by_place = score_retrieval(queries, keys, [{1: 2, 3: 0, 0: 1}, {2: 1}, {}], ["nDCG", "MAP"])
    assert by_id.queries.tolist() == by_place.queries.tolist() == [0, 1]
    for name in by_id:
        np.testing.assert_array_equal(by_id[name], by_place[name])
    flat = score_retrieval(queries, keys, [{1: 1, 0: 1}, {2: 1}, {}], ["nDCG", "MAP"])
    np.testing.assert_array_equal(flat["MAP"], by_id["MAP"])
    assert flat["nDCG"][0] != by_id["nDCG"][0]
    assert by_id.protocol["without_relevant"] == 1
    listed = [{"d1": 2, "d3": 0, "d0": 1}, {"d2": 1}, {}]
    by_rows = score_retrieval(queries, keys, listed, ["nDCG"], key_ids=ids["key_ids"])
    np.testing.assert_array_equal(by_rows["nDCG"], by_id["nDCG"])
    for wrong, words in (
        ([{"d1": 2}, {}, {}], "without ids a row of grades is"),
        ([{9: 2}, {}, {}], "names key 9"),
        ([{1: math.nan}, {}, {}], "grades are numbers"),
        ([{1: math.inf}, {}, {}], "grades are numbers"),
    ):
        with pytest.raises(NearfarError, match=words):
            score_retrieval(queries, keys, wrong, ["nDCG"])
    with pytest.raises(NearfarError, match="2\\^grade"):
        score_retrieval(queries, keys, [{1: 2000}, {1: 1}, {0: 2}], ["nDCG"], gain="exponential")


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (["nDGC@10"], "did you mean 'nDCG'"),
        (["recall"], "recall needs a cut-off"),
        (["mean_rank@3"], "has no cut-off"),
        (["MAP@0"], "at least 1"),
        ([], "names none"),
        ([3], "metrics holds 3"),
        ({"MAP": 1}, "metrics is"),
    ],
)
def test_wrong_names_of_metrics(metrics, words):
    with pytest.raises(NearfarError, match=words):
        retrieval_metrics(rows(3, 2, 0), rows(3, 2, 1), metrics=metrics)


def test_names_of_metrics():
    names = read_metrics(["ndcg", "NDCG@k", "p@5", "MAP@r", "Mrr@10", "hit@1", "hit@1"], (1, 3))
    assert list(map(str, names)) == [
        "nDCG", "nDCG@1", "nDCG@3", "precision@5", "MAP@R", "MRR@10", "hit@1"
    ]  # fmt: skip


@pytest.mark.slow
def test_estimates_state_how_they_were_measured():
    queries, keys = rows(50, 4, 0), rows(60, 4, 1)
    relevant = graded(50, 60, 4)
    split = split_hash(range(50))
    estimates = retrieval_metrics(queries, keys, relevant, metrics=ALL, split=split, gain="exponential")
    assert estimates["nDCG"].protocol["gain"] == "exponential"
    assert "gain" not in estimates["MAP"].protocol
    assert estimates["MAP"].protocol["gallery"] == 60
    assert estimates["mean_rank"].higher_is_better is False
    assert estimates["mean_rank"].unit == "rank"
    linear = retrieval_metrics(queries, keys, relevant, metrics="nDCG", split=split)["nDCG"]
    assert "gain differs" in (comparable(linear, estimates["nDCG"]) or "")
    everything = retrieval_metrics(
        queries, keys, relevant, metrics=["recall@100", "precision@60", "mean_rank"]
    )
    assert everything["recall@100"].trivial
    assert everything["precision@60"].trivial
    assert not everything["mean_rank"].trivial
    for estimate in estimates.values():
        assert estimate.low <= estimate.value <= estimate.high


def test_an_unknown_score_is_named():
    scores = score_retrieval(rows(3, 2, 0), rows(3, 2, 1), metrics=["MAP"])
    with pytest.raises(NearfarError, match="was not scored"):
        scores["MPA"]
    assert "MAP" in scores
    assert "nDCG" not in scores


def test_intervals_of_several_scores_are_those_of_each():
    rng = np.random.default_rng(0)
    columns = [
        rng.random(500),
        rng.random(500) ** 3,
        (rng.random(500) < 0.3) * 1.0,
        rng.integers(0, 5, 500) / 4,
    ]
    together = mean_intervals(columns)
    for of_all, column in zip(together, columns, strict=True):
        alone = mean_interval(column)
        assert of_all[2] == alone[2]
        assert of_all[:2] == pytest.approx(alone[:2], abs=1e-12)


def test_ranks_with_a_cut_off():
    ranks = retrieval_ranks(torch.ones(1, 2), torch.ones(6, 2), [[0, 3]])
    places = [first + 1 for a, b in itertools.permutations(range(6), 2) for first in [min(a, b)]]
    assert ranks.reciprocal(3)[0] == pytest.approx(np.mean([1 / p if p <= 3 else 0 for p in places]))
    assert rank_estimates(ranks, bootstrap=0)["MRR"].value == pytest.approx(np.mean(1 / np.array(places)))


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say():
    """Queries of differing difficulty drawn anew: the mean over all of them is inside in 93 to 97 of a hundred."""
    names = ["nDCG@10", "MAP", "recall@10", "precision@10", "R-precision", "mean_rank"]
    rng = np.random.default_rng(0)
    queries, keys, relevant = rows(6000, 8, 0), rows(200, 8, 1), graded(6000, 200, 6)
    queries = queries * 0.2 + torch.stack(
        [keys[list(row)].mean(0) * float(rng.random() * 2) for row in relevant]
    )
    scores = score_retrieval(queries, keys, relevant, names)
    covered = dict.fromkeys(names, 0)
    for _ in range(800):
        some = rng.integers(0, 6000, 200)
        columns = {
            which: {name: getattr(scores, which)[name][some] for name in names}
            for which in ("scores", "chances")
        }
        for name, estimate in replace(scores, queries=some, **columns).estimates(bootstrap=500).items():
            covered[name] += bool(estimate.low <= scores[name].mean() <= estimate.high)
    assert all(0.93 * 800 <= count <= 0.97 * 800 for count in covered.values()), covered
