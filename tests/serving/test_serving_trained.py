"""A trained run as a tool: loading, embedding, streamed files and what happens when a command is killed."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import nearfar
from nearfar.cli import app
from nearfar.config.compose import compose_config
from nearfar.data.chunks import NewData
from nearfar.data.items import Items
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.serving import Trained
from nearfar.serving.stream import embed_file
from nearfar.systems import build_system, check_config
from nearfar.training.checkpoint import Checkpoint, find_checkpoint
from nearfar.training.run_folder import RunFolder
from nearfar.training.state import initial_model, load_weights

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
NOUNS = ["river", "stone", "cloud", "forest", "harbour", "candle", "ladder", "mirror", "needle", "orchard"]
PLACES = ["near the hill", "far from the town", "under the bridge", "above the sea"]
pytestmark = [pytest.mark.usefixtures("module_cache")]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "title", "text", "price"])
        for i, noun in enumerate(NOUNS):
            for j, place in enumerate(PLACES):
                writer.writerow(
                    [f"{noun}{j}", f"{noun} {place}", f"of a {noun} that lies {place}", 10 * i + j]
                )
    return path


@pytest.fixture(scope="module")
def run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    overrides = [
        *(
            "experiment=pairs",
            f"data.train={table}",
            f"runs_dir={tmp_path_factory.mktemp('runs')}",
            "name=own",
        ),
        *(
            "views=[title,text,price]",
            "text_encoder.dims=16",
            "text_encoder.min_df=1",
            "text_encoder.max_df=1.0",
        ),
        *(
            "epochs=1",
            "batch_size=8",
            "embedding_dim=8",
            "bootstrap=0",
            "trainer.accelerator=cpu",
            "memory=16",
        ),
        *("trainer.threads=1", "report=false", "trainer.probe_rows=0", "towers.text.encoder=words"),
    ]
    folder = run_one(check_config(compose_config(overrides)), overrides, False, QUIET)
    assert folder is not None
    return folder


@pytest.fixture(scope="module")
def trained(run: RunFolder) -> Trained:
    return nearfar.load(run.path, device="cpu")


@pytest.mark.slow
def test_embeddings_are_those_of_the_run(run: RunFolder, table: Path, trained: Trained) -> None:
    """Of every view the vectors that the run's own evaluation computes; of a batch size that differs, the same."""
    system: Any = build_system(run.config(), saved=True)
    system.prepare(lambda _: None)
    model = initial_model(system, 0)
    path = find_checkpoint(run.path, prefer="best")
    load_weights(model, Checkpoint.load(path), system, str(path))
    model.eval()
    data = system.datasets["val"]
    with torch.no_grad():
        expected = system.embed(model, data.__getitems__(list(range(len(data)))))
    assert trained.views == ["title", "text", "price"]
    assert [trained.kind(view) for view in trained.views] == ["text", "text", "vector"]
    for view in trained.views:
        values = system.splits["val"][view]
        rows = trained.embed(values, view, batch_size=3)
        own = torch.nn.functional.normalize(expected[view].float(), dim=1).numpy()
        assert rows.shape == (len(data), trained.dim) == (len(data), 8)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, own, atol=1e-6)
    assert trained.embed([], "text").shape == (0, 8)


@pytest.mark.slow
def test_nothing_of_new_values_is_kept(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))
    nearfar.load(run.path).embed(["a river near the hill"] * 300, "title")
    assert not list((tmp_path / "cache").rglob("*.npz"))


@pytest.mark.slow
def test_wrong_values_and_towers_are_named(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(
        NearfarError, match=r"embeds title, text, price: say which is meant, as tower='title'"
    ):
        trained.embed(["a river"])
    assert trained.embed([[3.0], [4.0]]).shape == (2, 8)  # numbers: one tower reads them
    with pytest.raises(NearfarError, match=r"no view 'titel': did you mean 'title'"):
        trained.embed(["a"], "titel")
    with pytest.raises(NearfarError, match=r"value 1 \('  '\) cannot be embedded as 'text': empty text"):
        trained.embed(["a river", "  "], "text")
    with pytest.raises(NearfarError, match="takes a list"):
        trained.embed("a river", "text")
    with pytest.raises(NearfarError, match="device='cuda:99' cannot be used here"):
        nearfar.load(trained.path, device="cuda:99")
    with pytest.raises(NearfarError, match="no such run"):
        nearfar.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NearfarError, match="no checkpoint in this folder"):
        nearfar.load(tmp_path / "empty")


@pytest.mark.slow
def test_a_newer_format_is_refused_and_version_01_is_read(run: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    about = json.loads((copy / "environment.json").read_text())
    assert about["format"] == 2
    (copy / "environment.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(NearfarError, match=r"format 99.*formats up to 2"):
        nearfar.load(copy)
    del about["format"]
    (copy / "environment.json").write_text(json.dumps(about))
    assert nearfar.load(copy).views == ["title", "text", "price"]


def test_describe_says_what_it_is(trained: Trained) -> None:
    about = trained.describe()
    assert about["system"] == "pairs"
    assert about["views"]["price"]["kind"] == "vector"
    assert about["dim"] == 8
    assert about["results"]["monitor"] == "title_to_text/MRR"
    json.dumps(about)


# -- files ---------------------------------------------------------------------------------------------------
def answer(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=True)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def refusal(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert isinstance(done.exception, NearfarError), (done.output, done.exception)
    return str(done.exception)


@pytest.mark.slow
def test_a_file_is_embedded_with_views_that_some_rows_lack(
    run: RunFolder, trained: Trained, tmp_path: Path
) -> None:
    data = tmp_path / "new.csv"
    data.write_text(
        "id,Title,body,cost\na,a river,of a stone,3\nb,,of a cloud,\nc,,,\nd,a mirror,,nonsense\n"
    )
    columns = ["--column", "text=body", "--column", "price=cost"]
    shown = answer("embed", run.path, data, "-o", tmp_path / "out.parquet", *columns)
    assert "3 rows (title, text, price)" in shown
    for words in ("no value 1 (first: row 4 'c')", "price: no number 1 (first: row 5 'nonsense')"):
        assert words in shown, shown
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert table["id"] == ["a", "b", "d"]
    assert table["row"] == [2, 3, 5]
    assert [value is None for value in table["title"]] == [False, True, False]
    assert [value is None for value in table["price"]] == [False, True, True]
    np.testing.assert_allclose(table["text"][1], trained.embed(["of a cloud"], "text")[0], atol=1e-6)
    answer("embed", run.path, data, "-o", tmp_path / "out.npz", *columns, "--tower", "title")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["ids", "rows", "title"]
        assert np.isnan(arrays["title"]).all(axis=1).tolist() == [False, True, False]
        assert arrays["ids"].tolist() == ["a", "b", "d"]


@pytest.mark.slow
def test_what_cannot_be_embedded_or_written_is_said(run: RunFolder, tmp_path: Path) -> None:
    data = tmp_path / "new.csv"
    data.write_text("id,title\na,a river\n")
    out = tmp_path / "out.parquet"
    assert "is a folder; name the file" in refusal("embed", run.path, data, "-o", tmp_path)
    assert "written as .parquet or .npz" in refusal("embed", run.path, data, "-o", tmp_path / "x.csv")
    assert "no column of 'text'" in refusal("embed", run.path, data, "-o", out, "--tower", "text")
    assert "NAME=HEADER is needed" in refusal("embed", run.path, data, "-o", out, "--column", "title")
    assert "no view 'body'" in refusal("embed", run.path, data, "-o", out, "--tower", "body")
    data.write_text("id,title,text\na,,\n")
    assert "no row can be used; 1 row rejected: no value 1" in refusal("embed", run.path, data, "-o", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.csv"]


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".parquet", ".npz"])
def test_a_killed_command_goes_on_and_gives_the_same(
    trained: Trained, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    source = NewData(table, rows=7)
    whole = embed_file(trained, source, tmp_path / f"whole{ending}")
    assert whole.rows == 40
    calls: list[int] = []
    vectors = Trained.vectors

    def counted(self: Trained, values: Any, view: str, **more: Any) -> Any:
        calls.append(len(values))
        if len(calls) == 8:  # in the third chunk of three views
            raise Killed
        return vectors(self, values, view, **more)

    monkeypatch.setattr(Trained, "vectors", counted)
    output = tmp_path / f"out{ending}"
    with pytest.raises(Killed):
        embed_file(trained, source, output)
    assert not output.exists()
    written = embed_file(trained, source, output)
    assert (written.resumed, written.rows) == (2, 40)
    assert sum(calls) == 7 + 3 * 40 + 7  # of the third chunk one view was computed, and one begun
    assert output.read_bytes() == (tmp_path / f"whole{ending}").read_bytes()
    assert not output.with_name(output.name + ".parts").exists()


@pytest.mark.slow
def test_parts_of_different_data_are_not_used(
    trained: Trained, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.csv"
    shutil.copy(table, own)
    output = tmp_path / "out.parquet"
    real = Trained.new_items

    def cut(self: Trained, data: Any) -> Iterator[Items]:
        yield from list(real(self, data))[:2]
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trained, "new_items", cut)
        with pytest.raises(Killed):
            embed_file(trained, NewData(own, rows=7), output)
    own.write_text(own.read_text().replace("river", "brook"))
    assert embed_file(trained, NewData(own, rows=7), output).resumed == 0
    (tmp_path / "out.parquet.parts").mkdir()
    (tmp_path / "out.parquet.parts" / "mine.txt").write_text("mine")
    with pytest.raises(NearfarError, match="in the way"):
        embed_file(trained, NewData(own), output)
    assert (tmp_path / "out.parquet.parts" / "mine.txt").exists()


@pytest.mark.parametrize("name", ["part-000001.parquet", "part-000001.json"])
@pytest.mark.parametrize("kept", [None, 60])
def test_a_damaged_part_is_made_anew(
    trained: Trained, table: Path, tmp_path: Path, name: str, kept: int | None
) -> None:
    source, output = NewData(table, rows=7), tmp_path / "out.parquet"
    embed_file(trained, source, tmp_path / "whole.parquet")
    done: list[int] = []

    def cut(rows: int) -> None:
        done.append(rows)
        if len(done) == 3:
            raise Killed

    with pytest.raises(Killed):
        embed_file(trained, source, output, advance=cut)
    part = tmp_path / "out.parquet.parts" / name
    content = part.read_bytes()
    part.unlink()
    if kept is not None:
        part.write_bytes(content[: min(kept, len(content) - 1)])
    assert embed_file(trained, source, output).resumed == 1
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


# -- pictures ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of two dozen small pictures, dark and light ones, with a name for each."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    rows = ["image,name"]
    for i in range(24):
        kind, level = ("dark", 40) if i % 2 else ("light", 200)
        pixels = np.random.default_rng(i).integers(0, 56, (20, 24, 3)) + level
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
        rows.append(f"{i:02d}.png,{kind} picture of {NOUNS[i % 10]}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["small", "colors"])
def test_pictures_in_files_are_decoded_once(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    from nearfar.data import picture_arrays

    table = pictures / "table.csv"
    overrides = [
        *("experiment=pairs", f"data.train={table}", f"runs_dir={tmp_path}", "name=own", "epochs=1"),
        *(
            "batch_size=8",
            "embedding_dim=4",
            "bootstrap=0",
            "trainer.accelerator=cpu",
            "trainer.threads=1",
            "report=false",
        ),
        *("trainer.probe_rows=0", f"image_encoder={encoder}", "text_encoder.dims=8", "text_encoder.min_df=1"),
    ]
    folder = run_one(check_config(compose_config(overrides)), overrides, False, QUIET)
    assert folder is not None
    trained = nearfar.load(folder.path, "cpu")
    files = sorted(pictures.glob("[0-9]*.png"))
    expected = trained.embed([picture_arrays.read_image(path) for path in files], "image")
    read: list[str] = []
    real = picture_arrays.read_image
    monkeypatch.setattr(picture_arrays, "read_image", lambda path: read.append(str(path)) or real(path))
    assert np.array_equal(trained.embed(files), expected)
    assert sorted(read) == sorted(map(str, files))
    read.clear()
    (pictures / "broken.png").write_bytes(files[0].read_bytes()[:100])
    more = pictures / "more.csv"
    more.write_text(table.read_text() + "broken.png,a picture that is cut off\nnone.png,\n")
    written = embed_file(trained, NewData(more), tmp_path / "out.npz")
    assert len(read) == 1 + len(files)
    assert (written.rows, sorted(written.rejections.counts)[-1]) == (25, "no such picture")
    with np.load(tmp_path / "out.npz") as kept:
        assert np.array_equal(kept["image"][:24], expected)
        assert np.isnan(kept["image"][24]).all()
