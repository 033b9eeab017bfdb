"""False negatives that were planted are listed first; what is marked is left out of the next run's loss."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.lab.suspicious_negatives import suspicious_negatives
from nearfar.launch import run_one
from nearfar.losses import InfoNCELoss, PairMask
from nearfar.losses.views import ViewContext, ViewLoss
from nearfar.systems import build_system, check_config
from nearfar.systems.pairs.false_negatives import read_excluded
from nearfar.training.run_folder import RunFolder
from tiny_runs import train

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
pytestmark = [pytest.mark.usefixtures("module_cache")]
TOPICS = ["amber", "basalt", "cedar", "dolphin", "ember", "falcon", "garnet", "hazel", "iris", "jasmine"]


def overrides(folder: Path, *more: str) -> list[str]:
    return [
        *(
            "experiment=pairs",
            f"data.train={folder / 'train.csv'}",
            f"runs_dir={folder / 'runs'}",
            "epochs=8",
        ),
        *("views=[title,text]", "text_encoder.dims=24", "text_encoder.min_df=1", "text_encoder.max_df=1.0"),
        *(
            "share=true",
            "head=linear",
            "batch_size=20",
            "embedding_dim=16",
            "lr=0.01",
        ),
        *(
            "bootstrap=0",
            "trainer.accelerator=cpu",
            "trainer.threads=1",
            "report=false",
            "trainer.probe_rows=0",
        ),
        *("data.val_fraction=0.2", *more),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty titles, four of each of ten topics; items 4k and 4k + 1 answer each other's title in other words."""
    place = tmp_path_factory.mktemp("audit")
    with (place / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "title", "text"])
        for i in range(40):
            topic, kind = TOPICS[i // 4], "stone" if i % 4 < 2 else f"kind{i}"
            writer.writerow(
                [f"i{i}", f"{topic} {kind} number{i}", f"all of {topic} {kind}, told by voice{i}"]
            )
    return place


@pytest.fixture(scope="module")
def run(module_cache: None, folder: Path) -> RunFolder:
    every = overrides(folder, "name=first")
    done = run_one(check_config(compose_config(every)), every, False, QUIET)
    assert done is not None
    return done


@pytest.mark.slow
def test_planted_pairs_come_first_and_are_left_out_when_marked(
    run: RunFolder, folder: Path, tmp_path: Path
) -> None:
    table, page = tmp_path / "exclude.csv", tmp_path / "page.html"
    shown = CliRunner().invoke(
        app,
        ["doctor", str(run.path), "--false-negatives", "-o", str(table), "--html", str(page), "--rows", "30"],
    )
    assert shown.exit_code == 0, shown.exception
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert 0 < len(rows) <= 30
    excess = [float(row["score"]) - float(row["positive_score"]) for row in rows]
    assert excess == sorted(excess, reverse=True) or np.allclose(
        excess, sorted(excess, reverse=True), atol=2e-4
    )
    pairs = [tuple(sorted((row["query_id"], row["negative_id"]))) for row in rows]
    assert len(set(pairs)) == len(pairs)
    planted = [
        i
        for i, (a, b) in enumerate(pairs)
        if abs(int(a[1:]) - int(b[1:])) == 1 and min(int(a[1:]), int(b[1:])) % 4 == 0
    ]
    others = [i for i in range(len(pairs)) if i not in planted]
    assert planted
    assert np.mean(planted) < np.mean(others)
    text = page.read_text()
    assert rows[0]["negative"] in text
    assert "own partner" in text

    for i, row in enumerate(rows):
        row["false_negative"] = "yes" if i in planted else "0"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(NearfarError, match="is there already, and may be marked"):
        suspicious_negatives(run.path, table)

    system = build_system(check_config(compose_config(overrides(folder, f"exclude={table}"))))
    said: list[str] = []
    system.prepare(said.append)
    assert any(f"{len(planted)} pairs are no negatives" in line for line in said)
    ids = list(system.splits["train"].ids)  # type: ignore[attr-defined]
    batch = system.datasets["train"].__getitems__(list(range(len(ids))))  # type: ignore[attr-defined]
    context = system.context({}, batch)  # type: ignore[attr-defined]
    mask = context.mask("title", "text").tile(slice(None), slice(None))
    expected = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for i in planted:
        a, b = (ids.index(each) for each in pairs[i])
        expected[a, b] = expected[b, a] = True
    assert torch.equal(mask & ~torch.eye(len(ids), dtype=torch.bool), expected)


@pytest.mark.slow
def test_a_run_with_excluded_pairs_trains(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("query_id,negative_id\ni0,i1\ni4,i5\ni0,nobody\n")
    every = overrides(
        folder, f"exclude={tmp_path / 'own.csv'}", "name=excluded", "epochs=1", "trainer.log_every=1"
    )
    done = run_one(check_config(compose_config(every)), every, False, QUIET)
    assert done is not None
    log = [json.loads(line) for line in (done.path / "train_log.jsonl").read_text().splitlines()]
    assert max(row["masked_per_row"] for row in log if "masked_per_row" in row) > 0


def test_pair_mask_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    items = torch.randperm(50, generator=generator)[:17]
    others = torch.randint(-1, 50, (17, 4), generator=generator)
    expected = torch.zeros(17, 17, dtype=torch.bool)
    for i in range(17):
        for j in range(17):
            listed = [int(items[j]) in others[i].tolist(), int(items[i]) in others[j].tolist()]
            expected[i, j] = any(listed)
    mask = PairMask(items, others)
    assert torch.equal(mask.tile(slice(0, 17), slice(0, 17)), expected)
    assert torch.equal(mask.tile(slice(3, 9), slice(5, 17)), expected[3:9, 5:17])
    a, b = torch.randn(2, 17, 6, generator=generator, dtype=torch.float64)
    whole = InfoNCELoss(0.2)(a, b, mask=expected)
    assert torch.allclose(InfoNCELoss(0.2)(a, b, mask=mask), whole)
    context = ViewContext(items=items, excluded=others)
    assert torch.allclose(
        ViewLoss(temperature=0.2)({"x": a, "y": b}, context),
        InfoNCELoss(0.2, symmetric=True)(a, b, mask=expected),
    )
    some = torch.tensor([2, 5, 11])
    part = context.rows(some).mask("x", "y")
    assert part is not None
    assert torch.equal(part.tile(slice(0, 3), slice(0, 3)), expected[some][:, some])
    with pytest.raises(NearfarError, match=r"\(n,\) and \(n, k\)"):
        PairMask(items, others[:3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "no column 'query_id'"),
        ("query_id,negative_id\nx,y\n", "no pair of training items; leave"),
        ("query_id,negative_id,false_negative\na,b,0\n", "marked in its column false_negative"),
        ("query_id,negative_id,false_negative\na,b,perhaps\n", "row 1 has 'perhaps'; 1 or yes"),
    ],
)
def test_tables_that_say_nothing(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(NearfarError, match=message):
        read_excluded(tmp_path / "t.csv", ["a", "b"], lambda line: None)


def test_both_ways_and_what_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "query_id,negative_id,false_negative\na,c,yes\nc,a,1\nb,c,x\na,a,y\na,z,yes\nb,a,\nb,a,no\n"
    )
    said: list[str] = []
    assert read_excluded(tmp_path / "t.csv", ["a", "b", "c"], said.append).tolist() == [
        [2, -1],
        [2, -1],
        [0, 1],
    ]
    assert said == [
        "exclude: 1 of 5 pairs name items that are not in training; they have no effect",
        "exclude: 2 pairs are no negatives of each other",
    ]


@pytest.mark.slow
def test_a_run_in_which_nothing_is_trained_is_refused(folder: Path) -> None:
    every = overrides(folder, "name=nothing", "head=none", "bootstrap=0")
    every = list({text.split("=")[0]: text for text in every}.values())
    with pytest.raises(NearfarError, match=r"nothing is trained: .*head=linear"):
        run_one(check_config(compose_config(every)), every, False, QUIET)


@pytest.mark.slow
def test_what_cannot_be_audited(tmp_path: Path) -> None:
    labels = train("labels", tmp_path)
    with pytest.raises(NearfarError, match="the loss of 'labels' is not one between views"):
        suspicious_negatives(labels, tmp_path / "a.csv")
    with pytest.raises(NearfarError, match="a table is written as"):
        suspicious_negatives(labels, tmp_path / "a.txt")
    refused = CliRunner().invoke(app, ["doctor", str(labels), "-o", "a.csv"])
    assert "--output is the table of --false-negatives" in str(refused.exception)
    with pytest.raises(NearfarError, match="exclude and memory"):
        check_config(compose_config(["experiment=pairs", "exclude=a.csv", "memory=10"]))
