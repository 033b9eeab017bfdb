from __future__ import annotations

import csv
import os

import pytest
from rich.console import Console
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.lab.explain_run import explain_run
from nearfar.launch import run_one
from nearfar.systems import check_config
from nearfar.training.run_folder import RunFolder

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
        *("trainer.threads=1", "trainer.probe_rows=0", "data.val_fraction=0.2", "data.group_column=title"),
    ]
    folder = run_one(check_config(compose_config(overrides)), overrides, False, QUIET)
    assert folder is not None
    return folder


def test_rows_with_the_same_title_are_left_out(run: RunFolder) -> None:
    (explained,) = explain_run(run.path, 1, rows=None, k=12).values()
    assert len(explained) == 12
    titles = [row.shown.partition(": ")[2] for row in explained]
    for row, title in zip(explained, titles, strict=True):
        assert row.masked == titles.count(title) - 1
        assert all(other.why == "same title" for other in row.left_out)
        assert row.positives[0].position == row.position
    assert any(row.masked for row in explained)


def test_the_command(run: RunFolder) -> None:
    done = CliRunner().invoke(app, ["doctor", str(run.path), "--batch", "2", "--rows", "2"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "title → text" in done.output
    assert "12 queries among 12 keys at temperature" in done.output
    assert done.output.count("p(positive)") == 2
    with pytest.raises(NearfarError, match=r"has the batches 1 to \d"):
        explain_run(run.path, 99)
