from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.lab.explain_run import explain_run
from nearfar.launch import run_one
from nearfar.systems import check_config
from nearfar.training.run_folder import RunFolder
from tiny_runs import train

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
pytestmark = [pytest.mark.usefixtures("module_cache")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Titles that come twice, each with two texts."""
    path = tmp_path_factory.mktemp("data") / "train.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "title", "text"])
        for i in range(40):
            writer.writerow(
                [f"i{i}", f"thing number{i // 2} of wood", f"it tells of number{i // 2} in part{i % 2} once"]
            )
    overrides = [
        *(
            "experiment=pairs",
            f"data.train={path}",
            f"runs_dir={tmp_path_factory.mktemp('runs')}",
            "name=own",
        ),
        *("views=[title,text]", "text_encoder.dims=16", "text_encoder.min_df=1", "text_encoder.max_df=1.0"),
        *("epochs=2", "batch_size=12", "embedding_dim=8", "bootstrap=0", "trainer.accelerator=cpu"),
        *(
            "trainer.threads=1",
            "report=false",
            "trainer.probe_rows=0",
            "data.val_fraction=0.2",
            "data.group_column=title",
        ),
    ]
    folder = run_one(check_config(compose_config(overrides)), overrides, False, QUIET)
    assert folder is not None
    return folder


@pytest.mark.slow
def test_rows_with_the_same_title_are_left_out(run: RunFolder) -> None:
    (explained,) = explain_run(run.path, 1, rows=None, k=12).values()
    assert len(explained) == 12
    titles = [row.shown.partition(": ")[2] for row in explained]
    for row, title in zip(explained, titles, strict=True):
        assert row.masked == titles.count(title) - 1
        assert all(other.why == "same title" for other in row.left_out)
        assert row.positives[0].position == row.position
    assert any(row.masked for row in explained)


@pytest.mark.slow
def test_the_page_has_texts_and_pictures(tmp_path: Path) -> None:
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "photo", "title"])
        for i in range(24):
            Image.new("RGB", (8, 8), (10 * i, 255 - 10 * i, 90)).save(tmp_path / f"{i}.png")
            writer.writerow([f"i{i}", f"{i}.png", f"<b>thing</b> number{i // 2} of wood"])
    overrides = [
        *(
            "experiment=pairs",
            f"data.train={tmp_path / 'train.csv'}",
            f"runs_dir={tmp_path}",
            "name=own",
            "epochs=1",
        ),
        *("views=[photo,title]", "image_encoder=colors", "text_encoder.dims=8", "text_encoder.min_df=1"),
        *(
            "text_encoder.max_df=1.0",
            "batch_size=8",
            "embedding_dim=4",
            "bootstrap=0",
            "trainer.accelerator=cpu",
        ),
        *("trainer.threads=1", "report=false", "trainer.probe_rows=0", "data.val_fraction=0.2"),
    ]
    folder = run_one(check_config(compose_config(overrides)), overrides, False, QUIET)
    assert folder is not None
    page = tmp_path / "batch.html"
    command = ["doctor", str(folder.path), "--batch", "1", "--rows", "3", "--html", str(page)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (done.output, done.exception)
    text = page.read_text()
    assert text.count('class="card example"') == 3
    assert "data:image/png;base64," in text
    assert "&lt;b&gt;thing&lt;/b&gt;" in text
    assert "<b>thing" not in text
    assert "<b>negative</b>" in text
    (explained,) = explain_run(folder.path, 1, rows=3).values()
    assert text.count("likely a positive: ") == explained.likely_false
    page.write_text("mine")
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, NearfarError)
    assert "not a page of nearfar" in str(done.exception)


@pytest.mark.slow
def test_molecules_are_drawn(tmp_path: Path) -> None:
    page = tmp_path / "batch.html"
    explain_run(train("molecules", tmp_path), 1, rows=2, page=page)
    assert "data:image/svg+xml;base64," in page.read_text()


@pytest.mark.slow
def test_a_page_is_of_a_batch(run: RunFolder, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", str(run.path), "--html", str(tmp_path / "x.html")])
    assert "name one, --batch N" in str(done.exception)


@pytest.mark.slow
def test_the_command(run: RunFolder) -> None:
    done = CliRunner().invoke(app, ["doctor", str(run.path), "--batch", "2", "--rows", "2"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "title → text" in done.output
    assert "12 queries among 12 keys at temperature" in done.output
    assert done.output.count("p(positive)") == 2
    with pytest.raises(NearfarError, match=r"has the batches 1 to \d"):
        explain_run(run.path, 99)
