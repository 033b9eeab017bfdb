"""The command `nearfar mine`: embeddings or a run in, tables that pairs read out."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.systems import check_config

NOUNS = ["river", "stone", "cloud", "forest", "harbour", "candle", "ladder", "mirror"]
PLACES = ["near the hill", "far from the town", "under the bridge", "above the sea", "behind the mill"]
N = len(NOUNS) * len(PLACES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of questions and answers, and embeddings of both by two models."""
    path = tmp_path_factory.mktemp("mining")
    with (path / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", "answer", "topic"])
        for i, noun in enumerate(NOUNS):
            for j, place in enumerate(PLACES):
                asked = f"where is the {noun}" if j < 2 else f"what of the {noun} {place}"  # asked twice
                writer.writerow([f"n{i * len(PLACES) + j}", asked, f"the {noun} lies {place}", noun])
    rng = np.random.default_rng(0)
    topics = np.repeat(rng.normal(size=(len(NOUNS), 8)), len(PLACES), axis=0)
    for name, noise in (("vectors", 0.6), ("guide", 0.3)):
        sides = {
            view: (topics + noise * rng.normal(size=(N, 8))).astype(np.float32)
            for view in ("question", "answer")
        }
        table = {"id": [f"n{i}" for i in range(N)], "row": list(range(N))}
        table |= {view: [row.tolist() for row in rows] for view, rows in sides.items()}
        pyarrow.parquet.write_table(pyarrow.table(table), path / f"{name}.parquet")
    return path


def mine(*arguments: object) -> str:
    outcome = CliRunner().invoke(
        app,
        ["mine", *map(str, arguments), "--queries", "question", "--corpus", "answer"],
        catch_exceptions=False,
    )
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_embeddings_with_their_table(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "mined.csv"
    said = mine(
        *(
            folder / "vectors.parquet",
            "--data",
            folder / "data.csv",
            "-o",
            output,
            "--scores",
            "--label",
            "topic",
        ),
        *("--per-query", 2, "--margin", 0.05, "--mark", tmp_path / "mark.csv"),
    )
    table = rows(output)
    assert list(table[0]) == ["question", "answer", "negative_1", "negative_2", "margin_1", "margin_2"]
    assert "false negatives by label" in said
    assert "false negatives by text: 0.00%" in said
    assert "negatives.answer=[negative_1,negative_2] margins.answer=[margin_1,margin_2]" in said.replace(
        "\n", ""
    )
    given = {row["answer"]: row["question"] for row in rows(folder / "data.csv")}
    for row in table:
        assert given[row["answer"]] == row["question"]
        for name in ("negative_1", "negative_2"):
            assert given[row[name]] != row["question"]  # an answer of the same question is none
        assert float(row["margin_1"]) >= 0.05 - 1e-4
    marked = rows(tmp_path / "mark.csv")
    assert len(marked) == 50
    for i, row in enumerate(marked):
        row["false_negative"] = "yes" if i % 2 else "no"
    with (tmp_path / "mark.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, marked[0])
        writer.writeheader()
        writer.writerows(marked)
    said = mine(folder / "vectors.parquet", "-o", tmp_path / "ids.csv", "--marked", tmp_path / "mark.csv")
    assert "false negatives by hand: 50.00%" in said
    assert rows(tmp_path / "ids.csv")[0]["question"].startswith("n")  # ids, without the table


def test_a_guide_lowers_the_share_of_false_negatives(folder: Path, tmp_path: Path) -> None:
    shares = []
    for more in ((), ("--guide", folder / "guide.parquet", "--guide-margin", 0.3)):
        said = mine(
            *(
                folder / "vectors.parquet",
                "--data",
                folder / "data.csv",
                "--label",
                "topic",
                "--form",
                "triplet",
            ),
            *("-o", tmp_path / "mined.jsonl", *more),
        )
        (line,) = [line for line in said.splitlines() if "by label" in line]
        shares.append(float(line.split(":")[1].split("%")[0]))
    assert shares[1] < shares[0]


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    vectors = folder / "vectors.parquet"
    for arguments, message in (
        ((vectors, "-o", tmp_path / "mined.png"), "a table is written as"),
        ((vectors, "--margin", 0.1, "--relative-margin", 0.1), "give one"),
        ((vectors, "--label", "topic"), "a column of --data"),
        ((vectors, "--form", "tuple", "-o", tmp_path / "m.csv"), "form"),
        ((tmp_path, "-o", tmp_path / "m.csv"), "name the table"),
    ):
        with pytest.raises(NearfarError, match=message):
            mine(*arguments)
    other = tmp_path / "other.csv"
    other.write_text("id,question,answer\nx,a,b\n")
    with pytest.raises(NearfarError, match="embedded rows are not in it"):
        mine(vectors, "--data", other, "-o", tmp_path / "m.csv")


@pytest.mark.slow
@pytest.mark.usefixtures("module_cache")
def test_a_run_mines_its_table_and_trains_on_what_it_mined(folder: Path, tmp_path: Path) -> None:
    small = [
        *(
            "text_encoder.dims=16",
            "text_encoder.min_df=1",
            "text_encoder.max_df=1.0",
            "embedding_dim=8",
            "epochs=1",
        ),
        *(
            "batch_size=8",
            "bootstrap=0",
            "trainer.accelerator=cpu",
            "trainer.threads=1",
            "trainer.probe_rows=8",
        ),
        *("views=[question,answer]", f"runs_dir={tmp_path}", "experiment=pairs"),
    ]
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    overrides = [*small, f"data.train={folder / 'data.csv'}", "name=first"]
    run = run_one(check_config(compose_config(overrides)), overrides, False, quiet)
    assert run is not None
    output = tmp_path / "mined.csv"
    said = mine(
        run.path, "--data", folder / "data.csv", "-o", output, "--scores", "--per-query", 2, "--device", "cpu"
    )
    assert f"{N} queries" in said
    overrides = [
        *small, f"data.train={output}", "name=second", "negatives.answer=[negative_1,negative_2]",
        "margins.answer=[margin_1,margin_2]",
    ]  # fmt: skip
    again = run_one(check_config(compose_config(overrides)), overrides, False, quiet)
    assert again is not None
    assert again.read_json("metrics.json")["splits"]
