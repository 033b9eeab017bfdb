"""Runs whose hard batches come from lists on disk: `sampler.neighbors`."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from nearfar.batching import (
    HardNegativeSampler,
    MappedNeighbors,
    Neighbors,
    PartitionBatchSampler,
    nearest_neighbors_on_disk,
)
from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.systems import build_system, check_config
from nearfar.training import batches
from nearfar.training.run_folder import RunFolder

N = 120


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listed")
    for name, rows in (("train", N), ("val", 30)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "title", "text"])
            writer.writerows(
                [f"{name}{i}", f"title number {i}", f"text of {i} and {i % 7}"] for i in range(rows)
            )
    return folder


@pytest.fixture(scope="module")
def near(table: Path) -> MappedNeighbors:
    """Lists of the training rows, in a different order than theirs."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((10, 12))[np.arange(N) % 10] + 0.3 * rng.standard_normal((N, 12))
    ids = [f"train{i}" for i in range(N)][::-1]
    return nearest_neighbors_on_disk(vectors[::-1].copy(), 20, table / "near", ids=ids)


def options(table: Path, folder: Path, *more: str) -> list[str]:
    where = [
        f"data.train={table / 'train.csv'}",
        f"data.val={table / 'val.csv'}",
        f"runs_dir={folder}",
        "name=run",
    ]
    sized = ["views=[title,text]", "batch_size=20", "epochs=2", "bootstrap=0", "hardness_k=20"]
    towers = [
        "towers.title.encoder=words",
        "towers.text.encoder=words",
    ]  # which have no vectors before training
    trainer = ["trainer.accelerator=cpu", "trainer.probe_rows=0"]
    return ["experiment=pairs", *where, *sized, *towers, *trainer, *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "kind"), [("hard", HardNegativeSampler), ("partition", PartitionBatchSampler)]
)
def test_batches_are_those_of_the_same_lists_in_memory(table, near, tmp_path, sampler, kind):
    given = options(table, tmp_path, f"sampler={sampler}", f"sampler.neighbors={near.folder}")
    system = build_system(check_config(compose_config(given)))
    said: list[str] = []
    system.prepare(said.append)
    built = system.build_sampler()
    moved = near.aligned_to(system.splits["train"].ids)
    lists = Neighbors(moved.indices[:], moved.similarities[:])
    wanted = kind(lists, 20, **({"hardness_k": 20} if sampler == "hard" else {}), seed=system.config.seed)
    for epoch in range(2):
        assert np.array_equal(built.plan(epoch).order, wanted.plan(epoch).order)
    cluster = np.arange(N) % 10
    assert (cluster[moved.indices[:, 0]] == cluster).mean() > 0.9  # by id: the files have the rows backwards
    assert any("by id" in line and "recall" in line for line in said)


@pytest.mark.slow
def test_a_run_trains_on_them(table, near, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "STRETCH_BYTES", 100)  # as if they were too long for memory
    given = options(table, tmp_path, "sampler=hard", f"sampler.neighbors={near.folder}")
    run_one(check_config(compose_config(given)), given, False, Console(quiet=True))
    run = RunFolder(tmp_path / "run")
    epochs = [record for record in run.log() if record["kind"] == "plan"]
    assert len(epochs) == 2
    assert all(np.mean(each["hardness"]) > 1.5 * each["hardness_random"] for each in epochs)
    layout = run.read_json("dataset_layout.json")["neighbors"]
    assert (layout["of"], layout["k"], layout["recall"]) == ("sampler.neighbors", 20, near.recall)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "k", "message"),
    [
        (100, 20, "lists of 100 rows, and the training set has 120. List the neighbours"),
        (
            N,
            10,
            "lists 10 of each row: set hardness_k=10 or less, or list more with nearfar neighbors --k 20",
        ),
        (-N, 20, r"lists of other rows: 1 of 120 training rows are not among them \(first: 'train0'\)"),
    ],
)
def test_lists_of_other_rows_are_refused(table, tmp_path, rows, k, message):
    ids = (
        [f"train{i}" for i in range(abs(rows))]
        if rows > 0
        else ["train", *(f"train{i}" for i in range(1, N))]
    )
    vectors = np.random.default_rng(0).standard_normal((abs(rows), 8))
    folder = nearest_neighbors_on_disk(vectors, k, tmp_path / "near", ids=ids).folder
    given = options(table, tmp_path, "sampler=hard", f"sampler.neighbors={folder}")
    system = build_system(check_config(compose_config(given)))
    with pytest.raises(NearfarError, match=message):
        system.prepare(lambda text: None)
