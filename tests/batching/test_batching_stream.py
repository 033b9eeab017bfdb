"""Hard batches from streams: every record once, duplicates counted, exact state, several ranks, real readers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from nearfar.batching import (
    HardNegativeSampler,
    PartitionBatchSampler,
    RandomBatchSampler,
    StreamBatches,
    in_batch_similarity,
    nearest_neighbors,
)
from nearfar.batching.stream_window import window_neighbors
from nearfar.data.record_streams import FileRecords, open_stream
from nearfar.errors import NearfarError

N, D, BATCH, WINDOW = 1030, 8, 16, 256


def vectors(n=N, seed=0, cluster=50):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n // cluster, D))
    return (centres[rng.integers(len(centres), size=n)] + 0.3 * rng.standard_normal((n, D))).astype(
        np.float32
    )


ROWS = [{"id": i, "vector": row} for i, row in enumerate(vectors())]


def ids(stream):
    return [[record["id"] for record in batch] for batch in stream]


def build(source=ROWS, **options):
    return StreamBatches(source, BATCH, "vector", **{"window": WINDOW, "neighbors": 30, **options})


def parquet(folder, rows=ROWS, files=3):
    import pyarrow
    import pyarrow.parquet

    paths = []
    for at, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        table = {"id": part, "vector": [rows[i]["vector"].tolist() for i in part]}
        paths.append(folder / f"{at}.parquet")
        pyarrow.parquet.write_table(pyarrow.table(table), paths[-1], row_group_size=100)
    return paths


def shards(folder, rows=ROWS):
    import webdataset

    with webdataset.ShardWriter(str(folder / "%03d.tar"), maxcount=400, verbose=0) as writer:
        for row in rows:
            writer.write(
                {"__key__": f"{row['id']:06}", "json": {"id": row["id"]}, "npy": row["vector"], "txt": "né"}
            )
    return sorted(folder.glob("*.tar"))


@pytest.mark.parametrize("sampler", [HardNegativeSampler, PartitionBatchSampler])
@pytest.mark.parametrize("n", [N, 40, 256, 384, 385])
def test_every_record_comes_once(sampler, n):
    stream = build(ROWS[:n], sampler=sampler)
    first, second = ids(stream), ids(stream)
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(n))
        assert all(len(batch) == BATCH for batch in epoch[:-2])
    assert first != second
    assert (stream.epoch, stream.duplicates) == (1, 0)


def test_batches_are_those_of_a_sampler_in_memory_over_the_window():
    near = nearest_neighbors(np.stack([row["vector"] for row in ROWS[:WINDOW]]), 30)
    sampler = HardNegativeSampler(near, BATCH, hard_ratio=1.0, seed=5)
    wanted = [batch.tolist() for batch in sampler.plan(0).batches()]
    assert ids(build(hard_ratio=1.0, seed=5))[: len(wanted)] == wanted


@pytest.mark.slow
def test_a_window_of_a_tenth_is_nearly_as_hard():
    x = vectors(4000, cluster=400)  # a tenth of a neighbourhood still fills a batch
    rows = [{"id": i, "vector": row} for i, row in enumerate(x)]
    near = nearest_neighbors(x, 100)
    memory = HardNegativeSampler(near, 32, hard_ratio=1.0).plan().batches()
    chance = in_batch_similarity(x, RandomBatchSampler(4000, 32).plan().batches()).mean()
    window = ids(StreamBatches(rows, 32, "vector", window=400, neighbors=30, hard_ratio=1.0))
    gain = in_batch_similarity(x, window).mean() - chance
    assert gain > 0.8 * (in_batch_similarity(x, memory).mean() - chance)


def test_duplicates_are_left_out_of_a_window_and_counted():
    rows = [{**ROWS[i], "text": f"t{i % 100}"} for i in range(400)]
    same = [ROWS[i % 150] for i in range(300)]
    stream = build(same, window=160)
    seen = [i for batch in ids(stream) for i in batch]
    assert sorted(seen) == list(range(150))
    assert stream.duplicates == 150
    by_text = build(rows, window=96, key="text")
    texts = [[record["text"] for record in batch] for batch in by_text]
    assert sum(map(len, texts)) + by_text.duplicates == 400
    assert len({t for batch in texts[:6] for t in batch}) == 96


def draw(rows, **options):
    """How many records came, and how many were duplicates."""
    rng = np.random.default_rng(0)
    stream = StreamBatches(
        rows, BATCH, lambda some: rng.standard_normal((len(some), D)), window=96, neighbors=10, **options
    )
    return sum(map(len, stream)), stream.duplicates


def contents():
    """Kinds of records, of which each differs from all others of its kind, and again with contents that are equal."""
    from PIL import Image

    def picture(i):
        return Image.new("L" if i // 2 % 2 else "P", (4, 4) if i % 2 else (2, 8), i // 4)

    def inner(i):
        return np.r_[np.zeros(1000), i, np.zeros(1000)]

    return {
        "a long tensor": lambda i: torch.from_numpy(inner(i)),
        "a tensor with near numbers": lambda i: torch.tensor([1.0 + i * 5e-7]),
        "a half tensor": lambda i: torch.tensor([i], dtype=torch.int16).view(torch.bfloat16),
        "arrays in dictionaries": lambda i: {"p": [inner(i), {"q": None}]},
        "pictures": picture,
        "arrays of objects": lambda i: np.array([f"a{i}", None], dtype=object),
        "shapes": lambda i: np.zeros((i + 1, 128 - i) if i < 64 else (1, i + 1, 1), [np.int32, np.float32][i % 2]),
        "long lists": lambda i: inner(i).tolist(),
        "lists of lists": lambda i: [["a"] * i, ["a"] * (128 - i)],
    }  # fmt: skip


@pytest.mark.parametrize("kind", contents())
def test_records_are_equal_where_all_that_they_hold_is(kind):
    make = contents()[kind]
    assert draw([{"x": make(i)} for i in range(128)]) == (128, 0)
    assert draw([{"x": make(i // 2), "__key__": str(i)} for i in range(128)]) == (64, 64)


def test_what_cannot_be_compared_asks_for_a_key():
    class Clip:
        pass

    rows = [{"x": {"clip": Clip()}, "id": i // 2} for i in range(64)]
    with pytest.raises(NearfarError, match=r"field 'x'\.clip holds a .*Clip.* say with key="):
        draw(rows)
    assert draw(rows, key="id") == (32, 32)
    assert draw(rows, key=lambda record: [record["id"]]) == (32, 32)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_records_without_a_key_are_no_duplicates(missing):
    rows = [{"k": missing if i % 2 else f"u{i // 4}", "id": i} for i in range(64)]
    assert draw(rows, key="k") == (48, 16)
    assert draw(rows, key=lambda record: record["k"]) == (48, 16)
    assert draw([{**row, "other": None} for row in rows], key=["k", "other"]) == (48, 16)
    with pytest.raises(NearfarError, match="'ke', which a record lacks; did you mean 'key'"):
        draw([{"key": 1}], key="ke")


@pytest.mark.parametrize("tail", [1, 47, 48, 200])
def test_equal_records_at_the_end_join_the_last_window(tail):
    rows = [{"id": i} for i in range(96)]
    assert draw([*rows, *rows[:1] * tail]) == (96, tail)
    assert draw([*rows, *[{"id": 96}] * tail]) == (97, tail - 1)


@pytest.mark.slow
@pytest.mark.parametrize("again", [1, 3])
def test_a_state_at_the_end_of_an_epoch_goes_on_with_the_next(again):
    stream = build()
    list(stream)
    state = stream.state_dict()
    second, third = ids(stream), ids(stream)
    for _ in range(again):  # a state of a pass without a batch is as good
        stream = build()
        stream.load_state_dict(state)
        assert ids(stream) == []
        state = json.loads(json.dumps(stream.state_dict()))
    assert (ids(stream), ids(stream)) == (second, third)
    assert stream.epoch == 2


KINDS = ("a list", "parquet", "shards", "hugging face", "with a shuffle buffer")


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    import datasets

    paths, tar = parquet(tmp_path_factory.mktemp("p")), shards(tmp_path_factory.mktemp("w"))
    made = datasets.Dataset.from_dict(
        {"id": [row["id"] for row in ROWS], "vector": [row["vector"].tolist() for row in ROWS]}
    )
    return {
        "a list": lambda: ROWS,
        "parquet": lambda: FileRecords(paths, seed=3),
        "shards": lambda: FileRecords(tar),
        "hugging face": lambda: made.to_iterable_dataset(num_shards=3),
        "with a shuffle buffer": lambda: made.to_iterable_dataset(num_shards=3).shuffle(
            seed=1, buffer_size=100
        ),
    }


def identity(record):
    return record["json"]["id"] if "json" in record else record["id"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_in_mid_stream_goes_on_bit_for_bit(kind, readers):
    def fresh():
        field = "npy" if kind == "shards" else "vector"
        return StreamBatches(
            readers[kind](),
            BATCH,
            field,
            window=WINDOW,
            neighbors=30,
            collate=lambda some: list(map(identity, some)),
        )

    first = fresh()
    list(first)  # an epoch is over
    whole = list(first)
    assert sorted(i for batch in whole for i in batch) == list(range(N))
    # what is a matter of windows is the same whatever reads the records
    for stop in (0, 5, 16, 20, len(whole) - 1, len(whole)) if kind == "a list" else (5, 16, len(whole)):
        stream = fresh()
        stream.set_epoch(1)
        drawn = iter(stream)
        for _ in range(stop):
            next(drawn)
        state = json.loads(json.dumps(stream.state_dict()))
        drawn.close()
        again = fresh()
        again.load_state_dict(state)
        assert json.loads(json.dumps(again.state_dict())) == state
        assert list(again) == whole[stop:]
    later = fresh()  # batches that a loader drew ahead do not count
    later.set_epoch(1)
    drawn = iter(later)
    for _ in range(20):
        next(drawn)
    state = later.state_dict(position=15)
    drawn.close()
    again.load_state_dict(state)
    assert list(again) == whole[15:]


@pytest.mark.slow
def test_ranks_share_every_step():
    alone = ids(build(window=512, world_size=1))
    ranks = [ids(build(world_size=2, rank=rank, window=512)) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    assert [len(batch) for batch in ranks[0]] == [len(batch) for batch in ranks[1]]
    assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(N))
    assert sum(map(len, alone)) == N


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_of_torch(workers, readers):
    stream = build(
        readers["parquet"](), decode=lambda record: {"id": record["id"], "x": torch.tensor(record["vector"])},
        collate=torch.utils.data.default_collate, threads=2,
    )  # fmt: skip
    whole = [batch["id"].tolist() for batch in DataLoader(stream, batch_size=None, num_workers=workers)]
    assert sorted(i for batch in whole for i in batch) == list(range(N))
    again = build(readers["parquet"](), collate=lambda some: [record["id"] for record in some])
    again.load_state_dict(stream.state_dict(position=10))
    assert list(again) == whole[10:]


@pytest.mark.slow
def test_a_pass_ends_when_a_newer_one_begins():
    stream = build()
    older = iter(stream)
    next(older)
    newer = iter(stream)
    assert len([next(newer), *newer]) == len(ids(build()))
    with pytest.raises(NearfarError, match="ended when a newer one began"):
        next(older)


@pytest.mark.slow
def test_more_workers_are_refused():
    with pytest.raises(NearfarError, match="num_workers=2: each worker would read the whole stream"):
        list(DataLoader(build(), batch_size=None, num_workers=2))


@pytest.mark.slow
def test_a_pipeline_of_webdataset_is_a_source(tmp_path):
    import webdataset

    files = shards(tmp_path, ROWS[:300])
    pipeline = webdataset.WebDataset([str(file) for file in files], shardshuffle=False).decode()
    stream = StreamBatches(pipeline, BATCH, "npy", window=100, neighbors=30)
    assert sorted(int(record["__key__"]) for batch in stream for record in batch) == list(range(300))


@pytest.mark.slow
def test_files_are_read_from_any_place(tmp_path):
    import pickle
    import tarfile

    for records in (
        FileRecords(parquet(tmp_path), columns=["id"], seed=1),
        FileRecords(shards(tmp_path), ["json"]),
    ):
        whole = list(records.start(2))
        orders = {tuple(map(identity, records.start(epoch))) for epoch in range(3)}
        assert len(orders) > 1  # files come in a different order in different epochs
        assert set(whole[0]) <= {"id", "json", "__key__"}
        for stop in (0, 1, 343, 344, N):
            part = records.start(2)
            for _ in range(stop):
                next(part)
            place = records.place()
            assert list(records.start(2, place)) == whole[stop:]
    for file in (tmp_path / "0.parquet", tmp_path / "000.tar"):
        with pytest.raises(NearfarError, match=r"did you mean '(id|json)'\?"):
            list(FileRecords([file], ["ids" if file.suffix == ".parquet" else "jsn"]).start(0))
    bad = tmp_path / "bad.tar"
    with tarfile.open(bad, "w") as archive:
        for name, data in (("a.pkl", pickle.dumps(1)), ("a.json", b"{"), ("a.txt", b"x")):
            (tmp_path / name).write_bytes(data)
            archive.add(tmp_path / name, name)
    records = FileRecords([bad])
    assert list(records.start(0)) == [{"__key__": "a", "json": None, "txt": "x"}]
    assert records.refused == {"pkl: a pickle, which runs code": 1, "json: cannot be decoded": 1}
    bad.write_bytes(bad.read_bytes()[:600])
    with pytest.raises(NearfarError, match="is damaged after"):
        list(records.start(0))


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(NearfarError, match="source is a generator"):
        build(row for row in ROWS)
    with pytest.raises(NearfarError, match="Parquet files and WebDataset"):
        open_stream(str(tmp_path / "a.csv"))
    with pytest.raises(NearfarError, match=r"a window of 256 records are \(256,\)"):
        next(iter(StreamBatches(ROWS, BATCH, "other", window=WINDOW)))
    with pytest.raises(NearfarError, match="curriculum_epoch"):
        build(curriculum_epoch=1)
    with pytest.raises(NearfarError, match="rank 2 does not exist"):
        build(rank=2, world_size=2)
    with pytest.raises(NearfarError, match="sampler is not"):
        build(sampler=RandomBatchSampler)
    for name, value in {"window": 1, "neighbors": 0, "threads": 0, "seed": -1, "drop_last": "no"}.items():
        with pytest.raises(NearfarError, match=name):
            build(**{name: value})
    stream = build()
    with pytest.raises(NearfarError, match=r"different options .*window: saved 256, here 512"):
        build(window=512).load_state_dict(stream.state_dict())
    with pytest.raises(NearfarError, match="not the state of StreamBatches"):
        stream.load_state_dict({"epoch": 1})
    state = stream.state_dict() | {
        "position": 30,
        "window": {"number": 1, "first": 16, "place": 5000, "removed": 0},
    }
    stream.load_state_dict(state)
    with pytest.raises(NearfarError, match="ended after 1030 records"):
        next(iter(stream))


# -- neighbours of a window ------------------------------------------------------------------------------------
def points(n, d=24, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((30, d))[rng.integers(30, size=n)] + 0.4 * rng.standard_normal((n, d))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(1024, 5), (3000, 32), (2100, 250)])
def test_neighbours_of_a_window_are_nearly_those_of_all_pairs(n, k):
    x = points(n)
    near = window_neighbors(x, k, seed=1)
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    product = z @ z.T
    np.fill_diagonal(product, -np.inf)
    assert (near.indices != np.arange(n)[:, None]).all()
    assert all(len(set(row)) == k for row in near.indices.tolist())
    assert np.abs(near.similarities - np.take_along_axis(product, near.indices, 1)).max() < 1e-5
    assert (np.diff(near.similarities, axis=1) <= 0).all()
    best = np.sort(product, axis=1)[:, -k:].mean()
    assert near.similarities.mean() > 0.97 * best
    assert np.array_equal(near.indices, window_neighbors(x, k, seed=1).indices)


def test_windows_of_equal_and_of_few_different_vectors_have_neighbours():
    x = points(2000)
    x[100:1900] = x[0]  # most in one cell, and many centres that are equal
    for rows in (x, np.ones((1500, 4)), points(1500, d=1)):
        near = window_neighbors(rows, 20)
        assert (near.indices >= 0).all()
        assert (near.indices != np.arange(len(rows))[:, None]).all()
    with pytest.raises(NearfarError, match="all zero"):
        window_neighbors(np.zeros((2000, 3)), 5)


def test_lists_of_numbers_in_parquet_are_arrays(tmp_path):
    import pyarrow
    import pyarrow.parquet

    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    lists = values.tolist()
    fixed = pyarrow.array([*lists[:3], None], pyarrow.list_(pyarrow.float32(), 3))
    columns = {
        "fixed": fixed,
        "lists": [None, *lists[1:]],
        "ragged": [*lists[:2], [], [1.0]],
        "gaps": [[None, 1.0, 2.0], *lists[1:]],
        "whole": [[1, 2]] * 4,
        "text": ["a", None, "c", "d"],
    }
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    wanted = table.to_pylist()
    records = FileRecords([tmp_path / "t.parquet"])
    for skipped in range(4):
        got = list(records.start(0, [0, skipped]))
        assert len(got) == 4 - skipped
        for record, row in zip(got, wanted[skipped:], strict=True):
            for name in ("fixed", "lists", "ragged", "gaps"):
                assert isinstance(record[name], np.ndarray) == (row[name] is not None)
                if row[name] is not None:
                    np.testing.assert_array_equal(record[name], np.array(row[name], float))
            assert (record["whole"], record["text"]) == (row["whole"], row["text"])
