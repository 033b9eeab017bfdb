"""Counting and ranks against explicit float64 loops, and the cases in which other metrics mislead."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.metrics import Ranks, rank_kernel, retrieval_metrics, retrieval_ranks


def pairs(n: int, m: int, d: int, seed: int = 0, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n, d, generator=generator)
    keys = torch.randn(m, d, generator=generator) * noise
    keys[: min(n, m)] += queries[: min(n, m)]
    return queries, keys


def loop_counts(queries, keys, relevant, normalize=True):
    """(better, tied, relevant_tied) by one float64 dot product at a time."""
    q, k = queries.double(), keys.double()
    if normalize:
        q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
    rows = []
    for i in range(len(q)):
        score = [float((q[i] * k[j]).sum()) for j in range(len(k))]
        if not relevant[i]:
            continue
        best = max(score[j] for j in relevant[i])
        level = [abs(s - best) < 2.0**-51 * q.shape[1] * max(1.0, abs(best)) for s in score]
        better = sum(s > best and not t for s, t in zip(score, level, strict=True))
        tied = sum(t and j not in relevant[i] for j, t in enumerate(level))
        rows.append((better, tied, sum(level[j] for j in relevant[i])))
    return np.array(rows)


def as_rows(ranks: Ranks) -> np.ndarray:
    return np.stack([ranks.better, ranks.tied, ranks.relevant_tied], 1)


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_counts_equal_a_float64_loop_in_both_directions(dtype, normalize):
    queries, keys = pairs(60, 60, 8)
    keys[7], keys[30], queries[5] = keys[3], 3 * keys[3], queries[9]
    queries, keys = queries.to(dtype), keys.to(dtype)
    diagonal = [[i] for i in range(60)]
    forward, backward = retrieval_ranks(queries, keys, both=True, normalize=normalize, tile=(17, 23))
    np.testing.assert_array_equal(as_rows(forward), loop_counts(queries, keys, diagonal, normalize))
    np.testing.assert_array_equal(as_rows(backward), loop_counts(keys, queries, diagonal, normalize))
    assert forward.tied.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lists", "matrix", "sparse", "scipy", "labels"])
@pytest.mark.parametrize("dense", [True, False])
def test_several_relevant_items_in_every_form(form, dense, monkeypatch):
    queries, keys = pairs(40, 50, 4, seed=1)
    labels = (torch.arange(40) % 13, torch.arange(50) % 12)  # label 12 has queries but no key
    matrix = labels[0][:, None] == labels[1][None, :]
    keys[20], keys[32] = keys[8], keys[8]  # relevant to the same queries, and level
    keys[21] = keys[9]
    lists = [row.nonzero().flatten().tolist() for row in matrix]
    relevant = {
        "lists": lists,
        "matrix": matrix,
        "sparse": matrix.to_sparse(),
        "scipy": pytest.importorskip("scipy.sparse").coo_matrix(matrix.numpy()),
        "labels": tuple(part.tolist() for part in labels),
    }[form]
    if not dense:  # few relevant pairs take the float32 pass; make this relevance take it as well
        original = rank_kernel._count_sparse
        monkeypatch.setattr(rank_kernel, "_count_dense", original)
    forward, backward = retrieval_ranks(queries, keys, relevant, both=True, tile=(16, 16))
    expected = loop_counts(queries, keys, lists)
    np.testing.assert_array_equal(as_rows(forward), expected)
    columns = [matrix[:, j].nonzero().flatten().tolist() for j in range(50)]
    np.testing.assert_array_equal(as_rows(backward), loop_counts(keys, queries, columns))
    assert forward.without_relevant == 3
    assert forward.queries.tolist() == [i for i in range(40) if i % 13 != 12]
    assert (forward.relevant_tied > 1).any()


def test_index_of_the_relevant_key_and_none():
    queries, keys = pairs(6, 9, 4)
    ranks = retrieval_ranks(queries, keys, torch.tensor([0, 8, -1, 3, 3, 2]))
    np.testing.assert_array_equal(as_rows(ranks), loop_counts(queries, keys, [[0], [8], [], [3], [3], [2]]))
    assert ranks.without_relevant == 1


def test_duplicates_of_the_positive_can_be_declared_relevant():
    keys = torch.eye(6)[[0, 0, 1, 2, 3, 4]]
    queries = keys.clone()
    unaware = retrieval_metrics(queries, keys, ks=(1,))["R@1"].value
    aware = retrieval_metrics(queries, keys, (["a", "a", "b", "c", "d", "e"],) * 2, ks=(1,))["R@1"].value
    assert unaware == pytest.approx(5 / 6)
    assert aware == 1.0


@pytest.mark.slow
def test_a_thousand_duplicated_rows_score_chance_among_themselves():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2500, 96, generator=generator)
    same = torch.randperm(2500, generator=generator)[:1000]
    keys[same] = keys[same[0]].clone()
    with pytest.warns(UserWarning, match="2500 of 2500 queries stand in their own gallery"):
        ranks = retrieval_ranks(keys, keys)
    assert (ranks.better == 0).all()
    np.testing.assert_array_equal(np.sort(ranks.tied), [0] * 1500 + [999] * 1000)
    assert ranks.hits(10)[ranks.tied > 0] == pytest.approx(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("n", [10, 700])
def test_collapsed_embeddings_score_exactly_chance(n):
    for collapsed in (torch.ones(n, 32), torch.zeros(n, 32), 0.1 * torch.ones(n, 32).half()):
        for scores in retrieval_metrics(collapsed, collapsed.clone(), both=True):
            for estimate in scores.values():
                assert estimate.value == pytest.approx(estimate.chance, abs=1e-12), estimate


@pytest.mark.slow
def test_collapse_up_to_rounding_is_near_chance():
    generator = torch.Generator().manual_seed(0)
    rows = torch.ones(600, 64) + 1e-4 * torch.randn(600, 64, generator=generator)
    other = torch.ones(600, 64) + 1e-4 * torch.randn(600, 64, generator=generator)
    ranks = retrieval_ranks(rows, other)
    expected = loop_counts(rows[:40], other, [[i] for i in range(40)])
    np.testing.assert_array_equal(as_rows(ranks)[:40], expected)
    assert retrieval_metrics(rows, other)["R@10"].value < 0.06


def test_near_ties_are_ordered_as_in_float64():
    """Keys that differ by less than a float32 product can tell apart."""
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(50, 256, generator=generator).double()
    keys = queries + torch.randn(50, 256, generator=generator).double()
    keys[1::2] = keys[::2] + 1e-9 * torch.randn(25, 256, generator=generator).double()
    queries[1::2] = queries[::2]
    ranks = retrieval_ranks(queries, keys, both=True)
    for one, (a, b) in zip(ranks, ((queries, keys), (keys, queries)), strict=True):
        np.testing.assert_array_equal(as_rows(one), loop_counts(a, b, [[i] for i in range(50)]))
    assert set(ranks[0].better[:2]) == {0, 1}


def test_autocast_and_coarser_products_change_nothing():
    queries, keys = pairs(300, 300, 32)
    expected = as_rows(retrieval_ranks(queries, keys))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(as_rows(retrieval_ranks(queries, keys)), expected)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        np.testing.assert_array_equal(as_rows(retrieval_ranks(queries, keys)), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_both_directions_equal_two_calls_with_swapped_roles():
    queries, keys = pairs(130, 130, 16, noise=2.0)
    forward, backward = retrieval_ranks(queries, keys, both=True)
    np.testing.assert_array_equal(as_rows(forward), as_rows(retrieval_ranks(queries, keys)))
    np.testing.assert_array_equal(as_rows(backward), as_rows(retrieval_ranks(keys, queries)))
    assert (forward.direction, backward.direction) == ("queries to keys", "keys to queries")


def test_sign_scale_and_dtype_of_rows():
    queries, keys = pairs(90, 90, 8)
    expected = as_rows(retrieval_ranks(queries, keys))
    np.testing.assert_array_equal(as_rows(retrieval_ranks(-queries, -keys)), expected)
    scaled = retrieval_ranks(1e18 * queries, (1e-18 * keys).numpy())
    np.testing.assert_array_equal(as_rows(scaled), expected)
    reversed_ = retrieval_ranks(queries, -keys)
    assert (reversed_.better == 89 - retrieval_ranks(queries, keys).better).all()


def all_orders(better: int, tied: int, relevant: int) -> list[int]:
    """Rank of the best relevant key in every order of the tie."""
    kinds = [0] * tied + [1] * relevant
    return [better + 1 + order.index(1) for order in permutations(kinds)]


@pytest.mark.parametrize(
    ("better", "tied", "relevant"), [(0, 0, 1), (2, 3, 1), (1, 3, 2), (0, 4, 3), (3, 0, 2)]
)
def test_metrics_are_expectations_over_the_orders_of_a_tie(better, tied, relevant):
    gallery = 9
    column = lambda x: np.array([x])  # noqa: E731
    ranks = Ranks(column(better), column(tied), column(relevant), column(relevant), column(0), gallery)
    places = np.array(all_orders(better, tied, relevant))
    for k in range(1, 12):
        assert ranks.hits(k)[0] == pytest.approx(np.mean(places <= k), abs=1e-12)
    assert ranks.reciprocal()[0] == pytest.approx(np.mean(1 / places), abs=1e-12)
    assert ranks.expected()[0] == pytest.approx(places.mean(), abs=1e-12)
    counts = np.bincount(places - 1, minlength=gallery) / len(places)
    np.testing.assert_allclose(ranks.distribution(), counts, atol=1e-12)
    assert ranks.median() == pytest.approx(np.median(places))


@pytest.mark.slow
def test_chance_is_the_mean_over_random_embeddings():
    values: dict[str, list[float]] = {}
    chance = {}
    relevant = [[i, (i + 1) % 30, (i + 2) % 30][: 1 + i % 3] for i in range(30)]
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        queries, keys = torch.randn(2, 30, 6, generator=generator)
        for name, estimate in retrieval_metrics(queries, keys, relevant, bootstrap=0).items():
            values.setdefault(name, []).append(estimate.value)
            chance[name] = estimate.chance
    for name in ("R@1", "R@5", "R@10", "MRR", "median_rank"):
        error = np.std(values[name]) / np.sqrt(len(values[name]))
        assert abs(np.mean(values[name]) - chance[name]) < 4 * error + (
            0.5 if name == "median_rank" else 0
        ), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 2), torch.ones(4, 2)), "cannot be paired by position"),
        ((torch.ones(3, 2), torch.ones(3, 5)), "2 dimensions and keys 5"),
        ((torch.ones(3), torch.ones(3, 5)), "matrix"),
        ((torch.ones(0, 2), torch.ones(0, 2)), "matrix"),
        ((torch.ones(3, 2), torch.ones(3, 2), torch.tensor([0, 1, 7])), "names key 7"),
        ((torch.ones(3, 2), torch.ones(3, 2), [[0], [1]]), "lists the keys of 2 queries"),
        ((torch.ones(3, 2), torch.ones(3, 2), [-1, -1, -1]), "no query has a relevant key"),
        ((torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 3)), "not understood"),
        ((torch.ones(3, 2), torch.ones(3, 2), ([1, 2], [1, 2, 3])), "tuple states labels"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(NearfarError, match=message):
        retrieval_ranks(*arguments)


def test_rows_with_nan_are_named():
    rows = torch.ones(12, 3)
    rows[4, 1], rows[9, 0] = torch.nan, torch.inf
    with pytest.raises(NearfarError, match=r"keys hold NaN or infinite numbers in 2 of 12 rows: 4, 9"):
        retrieval_ranks(torch.ones(12, 3), rows)
