"""Neighbours on disk against the full product, and the plans that are made from stretches of them."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from nearfar.batching import (
    HardNegativeSampler,
    MappedNeighbors,
    Neighbors,
    PartitionBatchSampler,
    disk_neighbors,
    disk_search,
    measure_hardness,
    nearest_neighbors,
    nearest_neighbors_on_disk,
    stretches,
)
from nearfar.batching.pieces import in_processes
from nearfar.data.vector_shards import VectorShards, shards_of_table, write_shards
from nearfar.errors import NearfarError

N, D, K = 5000, 18, 20


def clustered(n=N, d=D, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(3, n // 100), d))
    return (centres[rng.integers(len(centres), size=n)] + 0.5 * rng.standard_normal((n, d))).astype(
        np.float16
    )


@pytest.fixture(scope="module")
def vectors():
    return clustered()


@pytest.fixture(scope="module")
def shards(vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for at, (begin, end) in enumerate([(0, 1), (1, 1700), (1700, 1700), (1700, N)]):
        np.save(folder / f"{at}.npy", vectors[begin:end])
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_cells():
    """As many cells as a hundred times as many rows would have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_neighbors, "_CELL", 50)
        yield


@pytest.fixture(scope="module")
def near(shards, tmp_path_factory):
    ids = [f"item {i}" for i in range(N)]
    return nearest_neighbors_on_disk(shards, K, tmp_path_factory.mktemp("near") / "new", ids=ids)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_lists_are_those_of_all_pairs_up_to_the_recall_that_is_stated(metric, vectors, tmp_path):
    near = nearest_neighbors_on_disk(vectors, K, tmp_path / "new", metric=metric)
    x = vectors.astype(np.float64)
    if metric == "cosine":
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    product = x @ x.T
    np.fill_diagonal(product, -np.inf)
    edge = np.sort(product, axis=1)[:, -K]
    indices, values = near.indices[:], near.similarities[:]
    assert (indices != np.arange(N)[:, None]).all()
    assert all(len(set(row)) == K for row in indices.tolist())
    true = np.take_along_axis(product, indices, 1)
    found = (true >= edge[:, None] - 1e-3 * np.abs(edge[:, None])).mean()  # vectors are float16
    assert found >= 0.95
    assert abs(found - near.recall) < 0.03
    assert (np.diff(values, axis=1) <= 0).all()
    assert np.abs(values - true).max() <= 2e-3 * np.abs(true).max()
    assert (near.metric, near.exact, near.queries) == (metric, False, 500)


@pytest.mark.slow
def test_shards_processes_and_cells_in_a_graph_give_as_good_lists(
    shards, vectors, near, tmp_path, monkeypatch
):
    monkeypatch.setattr(disk_neighbors, "_PIECE_BYTES", 1000 * 4 * 20)
    many = nearest_neighbors_on_disk(shards, K, tmp_path / "many", processes=2)
    same = np.mean([len(set(a) & set(b)) for a, b in zip(many.indices[:], near.indices[:], strict=True)]) / K
    assert same > 0.98
    monkeypatch.setattr(disk_neighbors, "_FLAT_CELLS", 2)
    graph = nearest_neighbors_on_disk(vectors, K, tmp_path / "graph")
    assert graph.recall >= 0.95


@pytest.mark.slow
def test_goes_on_where_it_was_stopped(shards, near, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_neighbors, "_STRETCH", 1024)
    search, calls = disk_neighbors.lists_of, []

    def stopped(stretch):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(stretch.begin)
        return search(stretch)

    monkeypatch.setattr(disk_neighbors, "lists_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        nearest_neighbors_on_disk(shards, K, tmp_path)
    with pytest.raises(NearfarError, match="goes on where it was stopped"):
        MappedNeighbors(tmp_path)
    again = []
    monkeypatch.setattr(
        disk_neighbors, "lists_of", lambda each: again.append((each.begin, each.end)) or search(each)
    )
    monkeypatch.setattr(disk_neighbors._Build, "train", lambda self: (self.work / "codes.faiss").stat())
    finished = nearest_neighbors_on_disk(shards, K, tmp_path)
    assert again == [(begin, min(begin + 1024, N)) for begin in range(2048, N, 1024)]
    assert np.array_equal(finished.indices[:], near.indices[:])
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stop", range(7))
def test_goes_on_where_putting_files_in_place_was_stopped(stop, tmp_path, monkeypatch):
    replace, calls = Path.replace, []

    def stopped(path, target):
        if Path(target).parent == tmp_path / "new":
            calls.append(path.name)
            if len(calls) == stop + 1:
                raise KeyboardInterrupt
        return replace(path, target)

    x = clustered(300)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            nearest_neighbors_on_disk(x, 5, tmp_path / "new", ids=[f"a{i}" for i in range(300)])
    again = nearest_neighbors_on_disk(x, 5, tmp_path / "new", ids=np.arange(300) + 7)
    assert again.ids.tolist() == list(range(7, 307))
    assert overlap(again, x) > 0.95
    assert {path.name for path in again.folder.iterdir()} == {*disk_neighbors._FILES, "neighbors.json"}


def overlap(near, x):
    truth = nearest_neighbors(x.astype(np.float32), near.k, exact=True).indices
    return np.mean([len({*a} & {*b}) for a, b in zip(near.indices[:], truth, strict=True)]) / near.k


@pytest.mark.slow
@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("changes", [False, True])
def test_vectors_that_changed_after_a_stop_are_read_again(files, changes, tmp_path, monkeypatch):
    x = clustered(600)
    source, file = x, tmp_path / "x.npy"
    if files:
        np.save(file, x)
        source = file

    def stopped(stretch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk_neighbors, "lists_of", stopped)
        with pytest.raises(KeyboardInterrupt):
            nearest_neighbors_on_disk(source, 5, tmp_path / "new")
    built = (tmp_path / "new" / "unfinished" / "codes.faiss").stat().st_mtime_ns
    (tmp_path / "new" / "unfinished" / "part-00000.faiss").touch()  # of a stop while files were removed
    if changes:
        x[1] = -x[1]  # not among the 256 that are looked at
        if files:
            np.save(file, x)
    near = nearest_neighbors_on_disk(source, 5, tmp_path / "new")
    assert overlap(near, x) > 0.95
    assert ((near.folder / "codes.faiss").stat().st_mtime_ns != built) == changes
    assert not list(near.folder.glob("part-*"))


@pytest.mark.slow
def test_a_process_that_outlives_a_build_searches_the_new_index(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_neighbors, "close_index", lambda: None)
    widths = set()
    for x in (clustered(600), clustered(600)[np.random.default_rng(1).permutation(600)]):
        near = nearest_neighbors_on_disk(x, 5, tmp_path / "new", min_recall=0.1)
        assert overlap(near, x) > 0.5
        widths.add((near.head["probes"], near.head["refine"]))
        shutil.rmtree(tmp_path / "new")
    assert len(widths) == 1  # else it would be a different index anyhow
    disk_search.close_index()


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 5, 40, 256])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.filterwarnings("error")
def test_of_few_rows_all_pairs_are_compared(n, metric, tmp_path):
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal((n, 16)).astype(np.float16).astype(np.float32)
        for k in {1, n - 1}:
            near = nearest_neighbors_on_disk(x, k, tmp_path / f"{seed}-{k}", metric=metric)
            wanted = nearest_neighbors(x, k, metric=metric)
            assert (near.recall, near.exact, near.queries, near.index) == (1.0, True, n, "all pairs")
            assert np.abs(near.similarities[:] - wanted.similarities).max() < 2e-3 * max(
                1, np.abs(wanted.similarities).max()
            )
            assert (near.indices[:] == wanted.indices).mean() > 0.95
            own = near.search(x, 1)
            assert own.exact
            if metric == "cosine":
                assert own.indices.ravel().tolist() == list(range(n))
            assert near.tune_search(x, 1) == (1.0, n)


@pytest.mark.slow
def test_products_beyond_float16_are_refused_and_the_advice_works(tmp_path):
    x = clustered(300).astype(np.float32) * 100
    with pytest.raises(
        NearfarError, match=r"product of vector \d+ with itself .* here at most 0\.1"
    ) as error:
        nearest_neighbors_on_disk(x, 5, tmp_path / "a", metric="dot")
    largest = int((x**2).sum(1).argmax())
    assert f"vector {largest} " in str(error.value)
    assert np.isfinite(nearest_neighbors_on_disk(x / 10, 5, tmp_path / "b", metric="dot").similarities).all()
    x[7] = 1e-9
    with pytest.raises(NearfarError, match=r"are zero as float16.* first is number 7"):
        nearest_neighbors_on_disk(x / 10, 5, tmp_path / "c", metric="dot")


def test_processes_of_this_machine_and_a_cluster_exclude_each_other(tmp_path):
    with pytest.raises(
        NearfarError, match=r"processes=3 are of this machine: with engine=ray .* Leave processes out"
    ):
        nearest_neighbors_on_disk(clustered(300), 5, tmp_path, processes=3, engine="ray")


@pytest.mark.slow
def test_a_killed_process_is_said():
    with pytest.raises(NearfarError, match="2 processes was killed: perhaps memory"):
        list(in_processes(2)(os._exit, [1, 1, 1]))


def test_rows_of_shards_are_taken_by_position(tmp_path):
    x = np.arange(40, dtype=np.float32).reshape(10, 4)
    files = write_shards(iter(np.split(x, [3, 4, 9])), tmp_path / "s", rows=3)
    for shards in (VectorShards.of(files), VectorShards.of(x)):
        for rows in ([0, 0, 2], [0, 2, 2], [3, 3], [], range(10), [1, 8, 9, 9]):
            at = np.array(rows, np.int64)
            assert np.array_equal(shards.take(at), x[at])
        for rows in ([9, 10], [-1, 3], [3, 1]):
            with pytest.raises(NearfarError, match="rising ones from 0 to 9"):
                shards.take(np.array(rows))
    for scale, what in ((1e6, "holds numbers beyond float16"), (1e-12, "is zero as float16")):
        with pytest.raises(NearfarError, match=f"row 0 {what}.*Multiply all"):
            write_shards(iter([(x + 1) * scale]), tmp_path / "t")
    with pytest.raises(NearfarError, match="row 13 is zero"):
        write_shards(iter([x, np.zeros((3, 4)), np.full((1, 4), 1e-9)]), tmp_path / "t")


def test_shards_of_a_table_that_stays_as_it_is_are_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def state(values):
        if values is not None:
            table = pyarrow.table({"id": [1, 2], "v": values, "w": values[::-1]})
            pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
        shards_of_table(tmp_path / "t.parquet", "v", tmp_path / "s", "--view NAME")
        return VectorShards.of(tmp_path / "s").state()

    first = state([[1.0, 2.0], [3.0, 4.0]])
    assert state(None) == first
    assert state([[1.0, 2.0], [3.0, 5.0]]) != first


def test_is_read_as_a_list_in_memory_is(near):
    held = Neighbors(near.indices[:], near.similarities[:], near.ids, recall=near.recall)
    for other in (MappedNeighbors(near.folder), pickle.loads(pickle.dumps(near))):
        assert (other.n, other.k, other.recall, other.fingerprint()) == (
            N,
            K,
            near.recall,
            near.fingerprint(),
        )
        assert np.array_equal(np.asarray(other.indices), held.indices)
    assert np.array_equal(near.indices[[3, 5], :2], held.indices[[3, 5], :2])
    pairs, mask = (np.array([3, 9, 3]), np.array([0, -1, 4])), np.arange(N) % 7 == 0
    for which in (
        *(
            pairs,
            (4, 2),
            (pairs[0][:, None], pairs[1]),
            (..., 3),
            (..., pairs[1]),
            5,
            mask,
            (mask, 1),
            (mask, slice(3)),
        ),
        *(
            np.s_[2:9, ::2],
            np.s_[2:9, 1],
            np.s_[::-1000],
            (slice(4), pairs[1]),
            (pairs[0], ...),
            -1,
            [],
            (pairs[0],),
        ),
    ):
        for lists, wanted in ((near.indices, held.indices), (near.similarities, held.similarities)):
            assert lists[which].shape == wanted[which].shape
            assert np.array_equal(lists[which], wanted[which])
    with pytest.raises(IndexError, match="rows and columns"):
        near.indices[1, 2, 3]
    assert np.array_equal(near.too_close(0.9), held.too_close(0.9))
    near.check_ids([f"item {i}" for i in range(N)])
    back = [f"item {i}" for i in range(N)][::-1]
    moved, wanted = near.aligned_to(back), held.aligned_to(back)
    assert np.array_equal(moved.indices[:], wanted.indices)
    assert moved.ids.tolist() == back
    plan = HardNegativeSampler(held, 50, hardness_k=K).plan()
    assert measure_hardness(plan, near, threshold=0.9) == measure_hardness(plan, held, threshold=0.9)
    with pytest.raises(NearfarError, match="exactly these items"):
        near.aligned_to(back[:-1])


@pytest.mark.slow
def test_search_finds_what_is_near_new_vectors(near, vectors):
    found = near.search(vectors[:200].astype(np.float32), 5)
    assert (found.indices[:, 0] == np.arange(200)).mean() > 0.98
    truth = nearest_neighbors(vectors, 4, exact=True).indices[:200]
    assert np.mean([len({*a} & {*b}) for a, b in zip(found.indices, truth, strict=True)]) > 0.93 * 4
    with pytest.raises(NearfarError, match=r"\(m, 18\)"):
        near.search(np.zeros((2, 3)), 5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (HardNegativeSampler, {"hard_ratio": 1.0}),
        (HardNegativeSampler, {"hard_ratio": 0.5, "world_size": 2}),
        (PartitionBatchSampler, {}),
        (PartitionBatchSampler, {"group_size": 16, "drop_last": True}),
    ],
)
def test_plans_from_stretches_are_level_and_nearly_as_hard(near, kind, options, count, monkeypatch):
    monkeypatch.setattr(stretches, "STRETCH_BYTES", -(-N * K * 4 // count))
    held = Neighbors(near.indices[:], near.similarities[:], near.ids)
    sampler, memory = (kind(each, 50, seed=3, **options) for each in (near, held))
    plans = [sampler.plan(epoch) for epoch in (0, 1)]
    for plan in plans:
        assert len(np.unique(plan.order)) == plan.layout.total
        assert np.array_equal(np.diff(plan.layout.starts), np.diff(memory.layout.starts))
    assert not np.array_equal(plans[0].order, plans[1].order)
    assert np.array_equal(plans[0].order, kind(near, 50, seed=3, **options).plan().order)
    reports, wanted = (
        [measure_hardness(each.plan(epoch), near) for epoch in range(6)] for each in (sampler, memory)
    )
    hardness, whole = (np.mean([r.neighbors for r in each]) for each in (reports, wanted))
    assert hardness > (0.95 if count == 1 else 0.9) * whole
    quarters = np.mean([r.neighbors_by_quarter for r in reports], axis=0)
    assert quarters.min() > 0.85 * quarters.max()  # level: the last is as hard as the first
    if kind is HardNegativeSampler:
        assert reports[0].hard_share == pytest.approx(wanted[0].hard_share, abs=0.03)


def test_a_state_from_the_middle_goes_on(near, monkeypatch):
    monkeypatch.setattr(stretches, "STRETCH_BYTES", N * K)
    first = HardNegativeSampler(near, 64, hard_ratio=0.5)
    drawn = iter(first)
    seen = [next(drawn) for _ in range(11)]
    state = first.state_dict()
    second = HardNegativeSampler(MappedNeighbors(near.folder), 64, hard_ratio=0.5)
    second.load_state_dict(state)
    assert sorted(i for batch in [*seen, *second] for i in batch) == list(range(N))


@pytest.mark.parametrize("kind", [HardNegativeSampler, PartitionBatchSampler])
def test_likely_false_negatives_stay_apart_across_stretches(near, kind, monkeypatch):
    monkeypatch.setattr(stretches, "STRETCH_BYTES", N * K)
    threshold = float(np.quantile(near.similarities[:, :2], 0.9))
    plain, filtered = (
        measure_hardness(kind(near, 50, false_negative_threshold=t).plan(), near, threshold=threshold)
        for t in (None, threshold)
    )
    assert plain.false_negatives > 0.001
    assert filtered.false_negatives < 0.05 * plain.false_negatives


def test_wrong_vectors_folders_and_sizes(near, vectors, shards, tmp_path, monkeypatch):
    bad = vectors.copy()
    bad[4321, 3] = np.nan
    with pytest.raises(NearfarError, match="first is number 4321"):
        nearest_neighbors_on_disk(bad, 5, tmp_path / "nan")
    bad[4321] = 0
    with pytest.raises(NearfarError, match="first is number 4321: they have no direction"):
        nearest_neighbors_on_disk(bad, 5, tmp_path / "zero")
    with pytest.raises(NearfarError, match="beyond float16"):
        nearest_neighbors_on_disk(vectors.astype(np.float32) * 1e6, 5, tmp_path / "large", metric="dot")
    with pytest.raises(NearfarError, match="holds neighbours already"):
        nearest_neighbors_on_disk(shards, K, near.folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(NearfarError, match="something else"):
        nearest_neighbors_on_disk(shards, K, tmp_path / "other")
    with pytest.raises(NearfarError, match="4999 others"):
        nearest_neighbors_on_disk(shards, N, tmp_path / "k")
    with pytest.raises(NearfarError, match="read shards by themselves"):
        nearest_neighbors_on_disk(vectors, K, tmp_path / "p", processes=2)
    with pytest.raises(NearfarError, match=r"holds no \.npy file"):
        nearest_neighbors_on_disk(tmp_path / "other", K, tmp_path / "none")
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    with pytest.raises(NearfarError, match="as in the first shard"):
        nearest_neighbors_on_disk([shards / "0.npy", tmp_path / "a.npy"], 1, tmp_path / "dims")
    with pytest.raises(NearfarError, match="needs the lists in memory"):
        HardNegativeSampler(near, 10, order="greedy")
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(disk_neighbors.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(NearfarError, match="GB are needed on disk"):
        nearest_neighbors_on_disk(shards, K, tmp_path / "full")


@pytest.mark.slow
def test_a_recall_that_cannot_be_reached_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_search, "_MOST_REFINE", 2)
    x = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float16)
    with pytest.warns(UserWarning, match=r"recall 0\.\d+ on 500 queries, below min_recall=1"):
        near = nearest_neighbors_on_disk(x, 10, tmp_path / "new", min_recall=1.0)
    assert 0.3 < near.recall < 1
    few = nearest_neighbors_on_disk(x[:3], 2, tmp_path / "few")  # the least there can be
    assert np.sort(few.indices[:], axis=1).tolist() == [[1, 2], [0, 2], [0, 1]]


def test_damaged_files_are_refused(tmp_path, vectors):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        near = nearest_neighbors_on_disk(vectors[:300], 5, tmp_path)
    np.save(near.folder / "positions.npy", np.zeros(300, np.int32))
    with pytest.raises(NearfarError, match="every item once"):
        MappedNeighbors(tmp_path)
    (tmp_path / "indices.npy").write_bytes(b"no array")
    with pytest.raises(NearfarError, match="make the neighbours anew"):
        MappedNeighbors(tmp_path)


@pytest.mark.slow
def test_the_command(shards, vectors, tmp_path):
    import pyarrow
    import pyarrow.parquet

    from nearfar.cli import app

    done = CliRunner().invoke(app, ["neighbors", str(shards), "-o", str(tmp_path / "a"), "--k", "10"])
    assert done.exit_code == 0, done.output
    assert "10 neighbours of 5,000 rows" in " ".join(done.output.split())
    lists = pyarrow.FixedSizeListArray.from_arrays(vectors[:1000].astype(np.float32).ravel(), D)
    table = pyarrow.table({"id": [f"n{i}" for i in range(1000)], "text": lists})
    pyarrow.parquet.write_table(table, tmp_path / "v.parquet", row_group_size=300)
    line = [
        "neighbors",
        str(tmp_path / "v.parquet"),
        "--view",
        "text",
        "-o",
        str(tmp_path / "b"),
        "--k",
        "10",
    ]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    near = MappedNeighbors(tmp_path / "b")
    assert near.ids.tolist() == [f"n{i}" for i in range(1000)]
    truth = nearest_neighbors(vectors[:1000], 10).indices
    assert np.mean([len({*a} & {*b}) for a, b in zip(near.indices[:], truth, strict=True)]) > 9.4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "v.parquet"]
    done = CliRunner().invoke(app, line)
    assert isinstance(done.exception, NearfarError)
    assert "holds neighbours already" in str(done.exception)
    (tmp_path / "c.vectors").mkdir()
    (tmp_path / "c.vectors" / "words.npy").write_text("mine")
    done = CliRunner().invoke(app, [*line[:5], str(tmp_path / "c"), *line[6:]])
    assert "it holds words.npy" in str(done.exception), "a folder that was there is nobody's to remove"
    assert (tmp_path / "c.vectors" / "words.npy").read_text() == "mine"
    assert not (tmp_path / "b.vectors").exists()
