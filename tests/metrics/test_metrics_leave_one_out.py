"""Retrieval inside one labelled set: no query is a candidate of itself; what happens without the option is said."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.errors import NearfarError
from nearfar.metrics import Ranks, comparable, rank_kernel, retrieval_metrics, retrieval_ranks, split_hash


def rows_of(n: int, d: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def loop(queries, keys, relevant, own):
    """{query: (better, tied, relevant_tied, relevant, candidates)}, one float64 product at a time."""
    q, k = (torch.nn.functional.normalize(x.double(), dim=1) for x in (queries, keys))
    counted = {}
    for i in range(len(q)):
        others = [j for j in range(len(k)) if j not in own(i)]
        wanted = [j for j in others if relevant(i, j)]
        if not wanted:
            continue
        score = {j: float((q[i] * k[j]).sum()) for j in others}
        best = max(score[j] for j in wanted)
        level = {j: abs(score[j] - best) < 2.0**-51 * q.shape[1] for j in others}
        counted[i] = (
            sum(score[j] > best and not level[j] for j in others),
            sum(level[j] and j not in wanted for j in others),
            sum(level[j] for j in wanted),
            len(wanted),
            len(others),
        )
    return counted


def as_table(ranks: Ranks) -> dict[int, tuple[int, ...]]:
    columns = (ranks.better, ranks.tied, ranks.relevant_tied, ranks.relevant, ranks.of_each())
    return dict(zip(ranks.queries.tolist(), zip(*(c.tolist() for c in columns), strict=True), strict=True))


@pytest.mark.slow
def test_random_vectors_score_chance_and_no_more():
    """The example of one labelled set: 4 of 49 others are right, and the best of them is found by luck."""
    label = np.repeat(np.arange(10), 5)
    values = []
    for seed in range(60):
        x = rows_of(50, 16, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scores = retrieval_metrics(x, x, (label, label), ks=(1, 5), leave_one_out=True, bootstrap=0)
        assert scores["R@1"].chance == pytest.approx(4 / 49)
        values.append(scores["R@1"].value)
    assert abs(np.mean(values) - 4 / 49) < 4 * np.std(values) / np.sqrt(60)


@pytest.mark.slow
def test_the_case_that_users_met():
    torch.manual_seed(0)
    x, label = torch.randn(50, 16), np.repeat(np.arange(10), 5)
    s = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T
    s.fill_diagonal_(-9)
    expected = (label[s.argmax(1)] == label).mean()
    matrix = torch.tensor(label[:, None] == label)
    without = matrix.clone().fill_diagonal_(False)
    for relevant in ((label, label), matrix, without, matrix.tolist(), without.to_sparse()):
        estimate = retrieval_metrics(x, x, relevant, ks=(1,), leave_one_out=True)["R@1"]
        assert estimate.value == pytest.approx(expected)
        assert (estimate.protocol["gallery"], estimate.protocol["leave_one_out"], estimate.n) == (
            49,
            True,
            50,
        )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["labels", "matrix"])
@pytest.mark.parametrize("dense", [None, True, False])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_counts_equal_a_loop_in_both_directions(form, dense, data):
    n = data.draw(st.integers(3, 25), "n")
    labels = np.array(data.draw(st.lists(st.integers(-1, 4), min_size=n, max_size=n), "labels"))
    chosen = data.draw(st.lists(st.integers(-1, n - 1), min_size=1, max_size=n + 4), "own positions")
    keys = rows_of(n, 4, data.draw(st.integers(0, 5)))
    keys[n // 2] = keys[0]  # a copy: level with the query itself
    other = rows_of(len(chosen), 4, 9)
    queries = torch.stack([keys[own] if own >= 0 else other[i] for i, own in enumerate(chosen)])
    own_labels = np.array([labels[own] if own >= 0 else 0 for own in chosen])
    matrix = (own_labels[:, None] == labels) & (own_labels[:, None] != -1)
    relevant = (own_labels, labels) if form == "labels" else matrix
    ways = {"_count_dense": rank_kernel._count_dense, "_count_sparse": rank_kernel._count_sparse}
    expected = loop(queries, keys, lambda i, j: matrix[i, j], lambda i: {chosen[i]})
    if not expected:
        with pytest.raises(NearfarError, match="no query has a relevant key"):
            retrieval_ranks(queries, keys, relevant, leave_one_out=chosen)
        return
    with pytest.MonkeyPatch.context() as patch:
        if dense is not None:
            for name in ways:
                patch.setattr(rank_kernel, name, ways["_count_dense" if dense else "_count_sparse"])
        forward, backward = retrieval_ranks(
            queries, keys, relevant, both=True, leave_one_out=chosen, tile=(5, 7)
        )
    assert as_table(forward) == expected
    assert forward.without_relevant == len(chosen) - len(expected)
    assert backward.leave_one_out
    back = loop(
        keys, queries, lambda i, j: matrix[j, i], lambda i: {j for j, o in enumerate(chosen) if o == i}
    )
    assert as_table(backward) == back


@pytest.mark.slow
def test_chance_of_mixed_galleries_is_the_mean_over_random_embeddings():
    """Half of the queries are keys, and those have one candidate less."""
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    own = [0, 3, 5, -1, -1]
    query_labels = [0, 1, 2, 1, 0]
    values, chance = [], None
    for seed in range(200):
        keys, extra = rows_of(8, 6, seed), rows_of(5, 6, 1000 + seed)
        queries = torch.stack([keys[o] if o >= 0 else extra[i] for i, o in enumerate(own)])
        scores = retrieval_metrics(
            queries, keys, (query_labels, labels), ks=(1, 3), leave_one_out=own, bootstrap=0
        )
        values.append([scores[name].value for name in ("R@1", "R@3", "MRR")])
        chance = [scores[name].chance for name in ("R@1", "R@3", "MRR")]
    assert scores["R@1"].protocol["gallery"] == 8
    error = np.std(values, axis=0) / np.sqrt(len(values))
    assert (np.abs(np.mean(values, axis=0) - chance) < 4 * error).all()
    expected = np.mean([2 / 7, 1 / 7, 2 / 7, 2 / 8, 3 / 8])
    assert chance[0] == pytest.approx(expected)


def test_collapsed_sets_score_chance():
    x, label = torch.ones(40, 8), np.repeat(np.arange(8), 5)
    for estimate in retrieval_metrics(x, x, (label, label), leave_one_out=True).values():
        assert estimate.value == pytest.approx(estimate.chance), estimate


def test_single_members_of_a_class_and_missing_labels_are_left_out_and_counted():
    label = [0, 0, 1, 2, 2, None, None, float("nan"), -1]
    x = rows_of(9)
    ranks = retrieval_ranks(x, x, (label, label), leave_one_out=True)
    assert ranks.queries.tolist() == [0, 1, 3, 4]
    assert (ranks.without_relevant, ranks.without_label, ranks.gallery) == (5, 4, 8)  # they stay candidates
    estimate = retrieval_metrics(x, x, (label, label), leave_one_out=True)["R@1"]
    assert estimate.protocol["without_label"] == 4
    assert "5 queries without relevant item left out" in str(estimate)


def test_every_key_relevant_makes_it_trivial():
    x = rows_of(6)
    scores = retrieval_metrics(x, x, ([1] * 6, [1] * 6), ks=(1, 5), leave_one_out=True)
    assert all(e.trivial and e.value == e.chance == 1.0 for e in scores.values())


def test_ids_say_which_key_the_query_is():
    """As ArguAna has it: arguments among arguments, the counter-argument is wanted, the argument itself is not."""
    names = ["a", "b", "c", "d", "e"]
    x = rows_of(5)
    qrels = {"b": {"c": 1}, "d": {"a": 1, "e": 0}}
    wanted = ["d", "b"]
    queries = x[[3, 1]]
    by_id = retrieval_ranks(queries, x, qrels, leave_one_out=True, query_ids=wanted, key_ids=names)
    by_place = retrieval_ranks(queries, x, [0, 2], leave_one_out=[3, 1])
    assert as_table(by_id) == as_table(by_place)
    assert by_id.gallery == 4
    with pytest.raises(NearfarError, match="'1' are different ids"):
        retrieval_ranks(queries, x, [0, 2], leave_one_out=True, query_ids=[3, 1], key_ids=names)


def test_both_protocols_are_never_compared():
    x, y, label = rows_of(30), rows_of(30, seed=1), np.arange(30) // 3
    split = split_hash(range(30))
    with_itself = retrieval_metrics(x, y, (label, label), split=split)["R@1"]
    alone = retrieval_metrics(x, y, (label, label), split=split, leave_one_out=True)["R@1"]
    assert "gallery differs" in (comparable(with_itself, alone) or "")
    padded = retrieval_metrics(
        x, torch.cat([y, y[:1]]), (label, [*label, 99]), split=split, leave_one_out=range(30)
    )
    assert "leave_one_out differs" in (comparable(with_itself, padded["R@1"]) or "")
    assert "leave_one_out" not in with_itself.protocol


def warned(*arguments, **options) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        retrieval_metrics(*arguments, ks=(1,), **options)
    return " ".join(str(w.message) for w in caught)


LABEL = np.arange(40) // 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_queries_in_their_own_gallery_are_warned_of(dtype):
    x = rows_of(40).to(dtype)
    same = torch.tensor(LABEL[:, None] == LABEL).fill_diagonal_(False)
    for relevant in ((LABEL, LABEL), same):
        for keys in (x, x.clone()):
            message = warned(x, keys, relevant)
            assert "40 of 40 queries" in message
            assert "leave_one_out=True" in message
    assert "R@1 is 1 whatever the model" in warned(x, x)
    assert "query 0 is key 7" not in warned(x[7:9], x, (LABEL[7:9], LABEL), leave_one_out=[7, 8])
    part = warned(x[[7, 30]], x, (LABEL[[7, 30]], LABEL))
    assert "2 of 2 queries" in part
    assert "query 0 and key 7" in part
    one = torch.cat([rows_of(5, seed=3).to(dtype), x[11:12]])
    assert "1 of 6 queries" in warned(one, x, ([0] * 6, LABEL))


def test_embedded_twice_is_still_the_same_set():
    x = rows_of(40)
    again = x + 1e-6 * rows_of(40, seed=2)
    assert "equal but for rounding" in warned(x, again, (LABEL, LABEL))
    assert "equal but for rounding" in warned(x, torch.nn.functional.normalize(x), (LABEL, LABEL))
    assert "equal but for rounding" in warned(x.half(), x, (LABEL, LABEL))


def test_wrong_positions_are_warned_of():
    x = rows_of(40)
    order = torch.arange(39, -1, -1)
    label = torch.tensor(LABEL)
    message = warned(x[order], x, (label[order], label), leave_one_out=True)
    assert "query 0 is key 39" in message
    assert not warned(x[order], x, (label[order], label), leave_one_out=order)
    assert not warned(x, x + 0.5 * rows_of(40, seed=4), (LABEL, LABEL), leave_one_out=True)
    x[5] = x[4]  # a photo that is twice in the set
    assert not warned(x, x, (LABEL, LABEL), leave_one_out=True)


@pytest.mark.slow
def test_no_false_alarms():
    text, image = rows_of(40), rows_of(40) + 0.1 * rows_of(40, seed=5)
    assert not warned(text, image)
    assert not warned(text.sign(), text.sign())  # codes that different items share
    assert not warned(torch.eye(8), torch.eye(8)[[0, 0, 2, 3, 4, 5, 6, 7]])
    assert not warned(torch.zeros(6, 4), torch.zeros(6, 4))
    assert not warned(torch.full((6, 4), 0.3), torch.full((6, 4), 0.3))  # two collapsed models
    ramp = torch.arange(1.0, 5.0).expand(6, 4)
    assert not warned(ramp + 1e-6 * rows_of(6, 4), ramp + 1e-6 * rows_of(6, 4, seed=1))
    with_empty = text.clone()
    with_empty[3] = image[3] = 0.0  # a text and a picture that could not be read
    assert not warned(with_empty, image)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (rows_of(3), rows_of(4), [1, 2, 3]),
            {"leave_one_out": True},
            "3 queries and 4 keys.*leave_one_out=positions",
        ),
        ((rows_of(3), rows_of(3)), {"leave_one_out": True}, "takes that key away"),
        ((rows_of(3), rows_of(3), [1, 1, 0]), {"leave_one_out": True}, "query 1 names itself"),
        ((rows_of(3), rows_of(3), ([1, 2, 3], [1, 2, 3])), {"leave_one_out": True}, "other than itself"),
        ((rows_of(9), rows_of(9), [1, 2] + [1] * 7), {"leave_one_out": True}, "9 queries name 2 keys"),
        ((rows_of(3), rows_of(3), [1, 2, 0]), {"leave_one_out": [0, 1]}, "leave_one_out has shape"),
        ((rows_of(3), rows_of(3), [1, 2, 0]), {"leave_one_out": [0, 1, 3]}, "positions from 0 to 3"),
        (
            (rows_of(3), rows_of(3), [1, 2, 0]),
            {"leave_one_out": [True, True, False]},
            "leave_one_out holds Booleans",
        ),
        ((rows_of(3), rows_of(3), [1, 2, 0]), {"leave_one_out": "yes"}, "leave_one_out holds text"),
        ((rows_of(3), rows_of(3), [1, 2, 0]), {"leave_one_out": None}, "leave_one_out"),
    ],
)
def test_bad_requests_are_named(arguments, options, message):
    with pytest.raises(NearfarError, match=message):
        retrieval_ranks(*arguments, **options)


def test_positions_that_look_like_labels_go_in_as_lists():
    """What the error says to do."""
    x, place = rows_of(9), [1, 2] + [1] * 7
    ranks = retrieval_ranks(x, x, [[p] for p in place], leave_one_out=True)
    expected = loop(x, x, lambda i, j: j == place[i], lambda i: {i})
    assert as_table(ranks) == expected
    label = [0] * 5 + [1] * 4
    assert as_table(retrieval_ranks(x, x, (label, label), leave_one_out=True)) == loop(
        x, x, lambda i, j: label[i] == label[j], lambda i: {i}
    )


@pytest.mark.slow
def test_tiles_give_what_the_whole_matrix_gives():
    x, label = rows_of(3000, 16), np.arange(3000) // 3
    ranks = retrieval_ranks(x, x, (label, label), leave_one_out=True, tile=(64, 128))
    s = torch.nn.functional.normalize(x.double()) @ torch.nn.functional.normalize(x.double()).T
    s.fill_diagonal_(-torch.inf)
    same = torch.tensor(label[:, None] == label).fill_diagonal_(False)
    best = s.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
    np.testing.assert_array_equal(ranks.better, ((s > best) & ~same).sum(1).numpy())
