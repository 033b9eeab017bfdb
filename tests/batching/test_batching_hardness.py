"""Hardness: what is asked for is realised, stays level, is measured right, and misalignment shows."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from nearfar.batching import (
    HardNegativeSampler,
    Neighbors,
    PartitionBatchSampler,
    RandomBatchSampler,
    check_harder_than_random,
    in_batch_similarity,
    measure_hardness,
    nearest_neighbors,
    verify_sampler,
)
from nearfar.errors import NearfarError


@pytest.fixture(scope="module")
def clustered():
    rng = np.random.default_rng(0)
    return np.repeat(rng.standard_normal((40, 16)), 50, 0) + 0.6 * rng.standard_normal((2000, 16))


@pytest.fixture(scope="module")
def near(clustered):
    return nearest_neighbors(clustered, 50)


@pytest.mark.slow
def test_hardness_is_what_an_explicit_count_gives(clustered, near):
    plan = HardNegativeSampler(near, 16, 0.5, 30, world_size=2).plan()
    threshold = 0.8
    z = clustered / np.linalg.norm(clustered, axis=1, keepdims=True)
    inside, pairs, false, hit, items = 0, 0, 0, 0, 0
    for batch in plan.batches():
        for i in batch:
            inside += len(set(batch) & set(near.indices[i, :30]))
            close = sum(z[i] @ z[j] >= threshold for j in batch if j != i and j in near.indices[i])
            false += close
            hit += close > 0
            pairs += len(batch) - 1
            items += 1
    report = measure_hardness(plan, near, k=30, threshold=threshold)
    assert report.neighbors == pytest.approx(inside / items)
    assert report.false_negatives == pytest.approx(false / pairs)
    assert report.anchors_hit == pytest.approx(hit / items)
    assert report.random == pytest.approx(30 * pairs / items / 1999)
    assert np.mean(report.neighbors_by_quarter) == pytest.approx(report.neighbors, rel=0.02)
    random = measure_hardness(RandomBatchSampler(2000, 16).plan(), near, k=30)
    assert random.neighbors == pytest.approx(random.random, rel=0.2)
    assert random.hard_share is None


@pytest.mark.parametrize("order", ["level", "greedy"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_a_group_is_a_pivot_and_its_neighbours(near, order, group_size):
    sampler = HardNegativeSampler(near, 16, 0.5, 20, order=order, group_size=group_size)
    plan = sampler.plan()
    group = group_size or 16
    want = group // 2
    for begin in range(0, 400, group):  # the first groups: nothing has run out yet
        items, hard = plan.order[begin : begin + group], plan.hard[begin : begin + group]
        assert hard[:want].all()
        assert not hard[want:].any()
        for at in range(1, want):  # a neighbour of the pivot or, with "level", of one drawn before it
            lists = near.indices[items[: 1 if order == "greedy" else at], :20]
            assert items[at] in lists


@pytest.mark.slow
def test_neighbours_are_drawn_uniformly(near):
    sampler = HardNegativeSampler(near, 20, 0.25, 40)
    rank = np.zeros(40)
    for epoch in range(60):
        for batch in sampler.plan(epoch).batches()[::7]:
            pivot = near.indices[batch[0], :40].tolist()
            for item in batch[1:5]:
                if item in pivot:
                    rank[pivot.index(item)] += 1
    expected = rank.sum() / 40
    assert rank.sum() > 2500
    assert ((rank - expected) ** 2 / expected).sum() < 90  # chi-square with 39 degrees of freedom, far tail


@pytest.mark.slow
def test_greedy_runs_out_of_neighbours_and_level_does_not():
    points = np.random.default_rng(0).standard_normal((4000, 64))
    near = nearest_neighbors(points, 100)
    for k, ratio, last in ((100, 0.5, 0.42), (30, 0.8, 0.25), (10, 0.5, 0.1)):
        greedy = HardNegativeSampler(near, 32, ratio, k, order="greedy").realised_hardness()
        level = HardNegativeSampler(near, 32, ratio, k).realised_hardness()
        assert greedy.hard_share_by_quarter[-1] < last
        assert greedy.neighbors_by_quarter[-1] < 0.8 * greedy.neighbors_by_quarter[0]
        assert min(level.hard_share_by_quarter) > round(32 * ratio) / 32 - 0.01
        assert min(level.neighbors_by_quarter) > 0.9 * max(level.neighbors_by_quarter)
    assert greedy.hard_share == pytest.approx(0.19, abs=0.02)  # asked for: 0.5


@pytest.mark.parametrize("batch_size", [20, 100])
def test_partition_is_hard_and_level(near, batch_size):
    ratios = []
    for epoch in range(4):
        report = PartitionBatchSampler(near, batch_size).realised_hardness(epoch)
        assert report.neighbors > 10 * report.random
        ratios.append(report.last_to_first)
    assert 0.85 < np.mean(ratios) < 1.15
    assert min(report.neighbors_by_quarter) > 0.9 * max(report.neighbors_by_quarter)
    hard = HardNegativeSampler(near, batch_size, 1.0, 50, group_size=20).realised_hardness()
    assert report.neighbors > hard.neighbors


def test_partitions_differ_between_epochs(near):
    sampler = PartitionBatchSampler(near, 20)
    a, b = sampler.plan(0).labels(), sampler.plan(1).labels()
    kept = np.mean([(b[a == label][:, None] == b[a == label]).mean() for label in range(100)])
    assert kept < 0.7


def test_hard_ratio_zero_is_random_and_one_is_all_hard(near):
    assert list(HardNegativeSampler(near, 16, 0.0, 50, seed=4)) == list(RandomBatchSampler(2000, 16, seed=4))
    assert HardNegativeSampler(near, 16, 1.0, 50).realised_hardness().hard_share > 0.99


def test_curriculum_begins_with_the_random_sampler_and_says_when_it_ends(near, caplog):
    sampler = HardNegativeSampler(near, 16, 0.5, 50, curriculum_epoch=2, seed=7)
    random = RandomBatchSampler(2000, 16, seed=7)
    with caplog.at_level(logging.INFO, "nearfar.batching"):
        for epoch in range(2):
            assert list(sampler) == list(random)
            assert "first hard one" not in caplog.text
            assert sampler.realised_hardness().hard_share is None, epoch
        assert list(sampler) != list(random)
    assert "epoch 2: 2 epochs of random batches are over" in caplog.text
    assert "hard share 0.50 asked" in caplog.text
    assert sampler.realised_hardness().hard_share == pytest.approx(0.5, abs=0.01)


def test_options_follow_a_schedule(near):
    sampler = HardNegativeSampler(near, 20, 0.3, 50)
    shares = []
    for ratio, k in ((0.3, 50), (0.6, 30), (0.8, 30)):
        sampler.hard_ratio, sampler.hardness_k = ratio, k
        len(list(sampler))
        shares.append(sampler.realised_hardness().hard_share)
    assert shares == pytest.approx([0.3, 0.6, 0.8], abs=0.01)
    with pytest.raises(NearfarError, match="hardness_k=51, but only 50"):
        sampler.hardness_k = 51
    with pytest.raises(NearfarError, match=r"hard_ratio is 1\.5"):
        sampler.hard_ratio = 1.5
    with pytest.raises(NearfarError, match="did you mean 'greedy'"):
        HardNegativeSampler(near, 20, 0.5, 50, order="gredy")
    with pytest.raises(NearfarError, match="larger than a batch"):
        PartitionBatchSampler(near, 20, group_size=21)


@pytest.mark.parametrize("make", ["level", "greedy", "partition"])
def test_likely_false_negatives_are_kept_apart(make):
    rng = np.random.default_rng(0)
    points = rng.standard_normal((600, 12))
    points[:60] = points[60:120] + 0.01 * rng.standard_normal((60, 12))  # near-duplicates
    points[120:124] = points[124]  # and a family of exact ones
    near = nearest_neighbors(points, 30)

    def sampler(threshold):
        options = {"false_negative_threshold": threshold}
        if make == "partition":
            return PartitionBatchSampler(near, 20, **options)
        return HardNegativeSampler(near, 20, 0.6, 30, order=make, **options)

    plain = sampler(None).realised_hardness(threshold=0.99)
    kept = sampler(0.99).realised_hardness()
    assert plain.anchors_hit > 0.03
    assert kept.false_negatives == kept.anchors_hit == 0.0
    assert kept.neighbors > 0.8 * plain.neighbors


def test_duplicates_beyond_number_of_batches_stay_complete():
    points = np.repeat(np.eye(3), 30, 0)
    near = nearest_neighbors(points, 40)
    for sampler in (
        PartitionBatchSampler(near, 10, 5, false_negative_threshold=0.95),
        HardNegativeSampler(near, 10, 0.5, 40, false_negative_threshold=0.95),
        HardNegativeSampler(near, 10, 1.0, 40),
        PartitionBatchSampler(near, 10, false_negative_threshold=0.95),
    ):
        assert sorted(i for batch in sampler for i in batch) == list(range(90))


def test_a_filter_needs_similarities(near):
    with pytest.raises(NearfarError, match="needs similarities"):
        PartitionBatchSampler(near.indices, 20, false_negative_threshold=0.9)
    rising = Neighbors(near.indices, near.similarities[:, ::-1])
    with pytest.raises(NearfarError, match="fall along each row"):
        PartitionBatchSampler(rising, 20, false_negative_threshold=0.9)


def test_in_batch_similarity_equals_the_loop(clustered):
    batches = [[0, 1, 2, 70], [5, 900], [3]]
    z = clustered / np.linalg.norm(clustered, axis=1, keepdims=True)
    expected = [np.mean([z[i] @ z[j] for i in b for j in b if i != j]) for b in batches[:2]]
    assert in_batch_similarity(clustered, batches) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_misaligned_neighbours_are_detected(clustered, near):
    sampler = HardNegativeSampler(near, 20, 0.5, 50, curriculum_epoch=3)
    check = check_harder_than_random(sampler, clustered)
    assert check.harder
    assert 0 < check.low < check.difference < check.high
    other = np.random.default_rng(1).permutation(len(clustered))
    with pytest.raises(NearfarError, match="not harder than random"):
        check_harder_than_random(sampler, clustered[other])
    misaligned = Neighbors(nearest_neighbors(clustered[other], 50).indices)
    for wrong in (PartitionBatchSampler(misaligned, 20), HardNegativeSampler(misaligned, 20, 0.7, 50)):
        assert not check_harder_than_random(wrong, clustered, raises=False).harder
        found = check_harder_than_random(wrong, clustered, raises=False)
        assert found.aligned is False
        assert "a different order" in found.advice
    assert not check_harder_than_random(RandomBatchSampler(2000, 20), clustered, raises=False).harder
    with pytest.raises(NearfarError, match="1999 embeddings"):
        check_harder_than_random(sampler, clustered[:-1])
    with pytest.raises(NearfarError, match="too few"):
        check_harder_than_random(RandomBatchSampler(2000, 2000), clustered)


@pytest.mark.slow
def test_batches_no_harder_for_another_reason_than_the_order(clustered, near):
    # Nearly all items in one batch: chance holds as near ones, in whatever order the list is.
    sampler = HardNegativeSampler(near, 1000, 0.05, 50)
    found = check_harder_than_random(sampler, clustered, raises=False)
    assert not found.harder
    assert found.aligned
    assert found.batches > 2  # of several epochs
    with pytest.raises(NearfarError, match="the right order"):
        check_harder_than_random(sampler, clustered)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_self_test_passes_and_shows_its_rows(seed):
    verdict = verify_sampler(seed)
    assert verdict.passed, str(verdict)
    rows = {row.name: row for row in verdict.rows}
    assert rows["random"].same_pairs == pytest.approx(rows["random"].chance, abs=0.03)
    assert rows["partition"].same_pairs > 0.8
    assert np.array(rows["random"].clusters).sum() == 100
    assert "misaligned" in str(verdict)


def test_hard_and_easy_batches_are_evenly_placed():
    from nearfar.batching.hard_negative import building_sequence, even_out

    values = np.random.default_rng(0).exponential(20.0, 200)
    tenth = 10 * np.arange(200) // 200
    order = even_out(values, tenth, np.random.default_rng(1))
    assert sorted(order) == list(range(200))
    means = values[order].reshape(10, 20).mean(1)
    assert np.ptp(means) < 0.05 * values.mean() < 0.3 * np.ptp(values.reshape(10, 20).mean(1))
    batch = np.repeat(np.arange(64), 4).astype(np.int32)
    sequence = building_sequence(batch, np.random.default_rng(0))
    assert sorted(sequence) == list(range(256))
    for stage in batch[sequence].reshape(4, 64):  # each batch gets one group per stage, early ones everywhere
        assert sorted(stage) == list(range(64))
        assert 24 < stage[:32].mean() < 39
