"""Search with a trained run: galleries that are kept, checked and gone on with; hits that show what they are."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import nearfar
from nearfar.cli import app
from nearfar.config.compose import compose_config
from nearfar.data.chunks import NewData
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.serving import Trained
from nearfar.serving.fill import file_source, open_gallery
from nearfar.serving.search import Hit, Hits, hits_page, query_view
from nearfar.serving.stores import open_store
from nearfar.serving.stores.faiss_file import FaissStore
from nearfar.systems import check_config
from nearfar.training.run_folder import RunFolder

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 30), "blue": (20, 40, 220), "white": (240, 240, 240)}
THINGS = ["boat", "house", "kite", "lamp", "door", "sail"]
pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of names, photos, prices and shelves, and the photos beside it."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    with (folder / "things.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "name", "photo", "price", "shelf"])
        for i, (colour, rgb) in enumerate(COLOURS.items()):
            for j, thing in enumerate(THINGS):
                pixels = np.clip(np.array(rgb) + generator.integers(-9, 9, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{colour}_{thing}.png")
                writer.writerow(
                    [
                        f"{colour}{j}",
                        f"a {colour} {thing} <{i}>",
                        f"{colour}_{thing}.png",
                        10 * i + j,
                        f"s{j}",
                    ]
                )
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    runs = tmp_path_factory.mktemp("runs")
    overrides = ["experiment=pairs", f"data.train={data / 'things.csv'}", f"runs_dir={runs}", "name=own"]
    overrides += [
        "views=[name,photo]",
        "image_encoder=colors",
        "text_encoder.dims=8",
        "text_encoder.min_df=1",
    ]
    overrides += [
        "text_encoder.max_df=1.0",
        "epochs=8",
        "lr=0.01",
        "batch_size=8",
        "embedding_dim=8",
        "bootstrap=0",
    ]
    overrides += ["trainer.accelerator=cpu", "trainer.threads=1", "report=false", "trainer.probe_rows=0"]
    folder = run_one(check_config(compose_config(overrides)), overrides, False, QUIET)
    assert folder is not None
    return folder


@pytest.fixture
def trained(run: RunFolder, tmp_path: Path) -> Trained:
    """The run in a folder of its own, so that galleries of one test are none of another."""
    shutil.copytree(run.path, tmp_path / "own")
    return nearfar.load(tmp_path / "own", device="cpu")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def nearest(trained: Trained, query: Any, view: str, values: list[Any], target: str) -> list[int]:
    """The search written out."""
    scores = trained.embed(values, target) @ trained.embed([query], view)[0]
    return np.argsort(-scores, kind="stable").tolist()


def galleries(trained: Trained) -> list[Path]:
    return sorted((trained.path / "galleries").glob("*"))


def search(trained: Trained, *arguments: object) -> str:
    done = CliRunner().invoke(app, ["search", str(trained.path), *map(str, arguments)])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def refusal(trained: Trained, *arguments: object) -> str:
    done = CliRunner().invoke(app, ["search", str(trained.path), *map(str, arguments)])
    assert isinstance(done.exception, NearfarError), (done.output, done.exception)
    return str(done.exception)


# -- what is searched ----------------------------------------------------------------------------------------
def test_the_own_data_is_searched_by_text_and_by_picture(trained: Trained, data: Path) -> None:
    rows = rows_of(data / "things.csv")
    photos = [str(data / row["photo"]) for row in rows]
    hits = trained.search("a red boat", k=5)
    best = nearest(trained, "a red boat", "name", photos, "photo")
    assert [hit.id for hit in hits] == [rows[i]["id"] for i in best[:5]]
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    vectors = trained.embed([hit["photo"] for hit in hits], "photo")
    np.testing.assert_allclose(
        [h.score for h in hits], vectors @ trained.embed(["a red boat"], "name")[0], atol=1e-5
    )
    assert {hit["split"] for hit in trained.search("a red boat", k=24)} == {"train", "val"}
    names = trained.search(photos[3], k=24)
    assert (names.view, names.target) == ("photo", "name")
    best = nearest(trained, photos[3], "photo", [row["name"] for row in rows], "name")
    assert [hit["name"] for hit in names] == [rows[i]["name"] for i in best]
    both = trained.search(["a red boat", "a blue kite"], k=3)
    assert [h.id for h in both[0]] == [h.id for h in hits[:3]]
    assert len(galleries(trained)) == 2
    with pytest.raises(NearfarError, match="no column 'colour'"):
        hits[0]["colour"]


def test_a_gallery_is_embedded_once(trained: Trained, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = data / "things.csv"
    first = trained.search("a red boat", table, k=4)
    own = trained.search("a red boat", k=4)
    embedded: list[int] = []
    original = Trained.vectors

    def counted(self: Trained, values: Any, view: str, **more: Any) -> np.ndarray:
        embedded.append(len(values))
        return original(self, values, view, **more)

    monkeypatch.setattr(Trained, "vectors", counted)
    again = nearfar.load(trained.path, device="cpu")
    assert list(again.search("a red boat", table, k=4)) == list(first)
    assert list(again.search("a red boat", k=4)) == list(own)
    assert embedded == [1, 1]
    assert list(first[0].row) == ["name", "photo", "price", "shelf"]


def test_lists_stores_and_places_are_galleries(trained: Trained, data: Path, tmp_path: Path) -> None:
    rows = rows_of(data / "things.csv")
    names = [row["name"] for row in rows]
    photo = data / "blue_lamp.png"
    hits = trained.search(str(photo), names, k=3)
    assert [hit.id for hit in hits] == [
        str(i) for i in nearest(trained, str(photo), "photo", names, "name")[:3]
    ]
    assert hits[0]["name"] == names[int(hits[0].id)]
    place = str(tmp_path / "shop.faiss")
    open_gallery(trained, file_source(trained, NewData(data / "things.csv")), "photo", place=place).close()
    by_place = trained.search("a red boat", place, k=3)
    with open_store(place) as store:
        for _ in range(2):  # a store of one's own stays open
            assert list(trained.search("a red boat", store, k=3)) == list(by_place)
    assert list(by_place) == list(trained.search("a red boat", data / "things.csv", k=3))
    with pytest.raises(NearfarError, match="holds no store"):
        trained.search("a red boat", str(tmp_path / "nowhere.faiss"))
    with pytest.raises(NearfarError, match="the gallery is empty"):
        trained.search("a red boat", [])
    with pytest.raises(NearfarError, match="no such file or folder"):
        trained.search("a red boat", tmp_path / "nowhere.csv")


def test_filters(trained: Trained, data: Path) -> None:
    rows = rows_of(data / "things.csv")
    cheap = {row["id"] for row in rows if int(row["price"]) < 12 and row["shelf"] in ("s1", "s3")}
    hits = trained.search("a red boat", data / "things.csv", k=24, where="price<12,shelf in s1,s3")
    assert {hit.id for hit in hits} == cheap
    own = trained.search("a red boat", k=24, where="split=val")
    assert 0 < len(own) < 24
    with pytest.raises(NearfarError, match="did you mean 'price'"):
        trained.search("a red boat", data / "things.csv", where="prize<3")


def test_changed_or_missing_data_is_not_searched_as_the_own(
    run: RunFolder, data: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(data, tmp_path / "data"))
    folder = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    folder.write_text("config.yaml", (run.path / "config.yaml").read_text().replace(str(data), str(copied)))
    trained = nearfar.load(folder.path, device="cpu")
    assert len(trained.search("a red boat", k=30)) == 24
    lines = (copied / "things.csv").read_text().splitlines()
    (copied / "things.csv").write_text(
        "\n".join([*lines[:-1], "w9,a white moon,white_boat.png,99,s9"]) + "\n"
    )
    with pytest.raises(NearfarError, match=r"data files have changed.*--gallery FILE"):
        trained.search("a red boat")
    assert len(trained.search("a red boat", copied / "things.csv", k=30)) == 24
    (copied / "things.csv").unlink()
    with pytest.raises(NearfarError, match=r"cannot be read again.*no such file.*--gallery FILE"):
        trained.search("a red boat")


def test_relative_paths_of_the_own_data_are_watched(
    run: RunFolder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    folder = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    text = (run.path / "config.yaml").read_text()
    folder.write_text("config.yaml", text.replace(str(data / "things.csv"), "things.csv"))
    trained = nearfar.load(folder.path, device="cpu")
    assert len(trained.search("a red boat", k=30)) == 24
    with (tmp_path / "things.csv").open("a") as file:
        file.write("w9,a white moon,white_boat.png,99,s9\n")
    with pytest.raises(NearfarError, match="data files have changed"):
        trained.search("a red boat")


def test_a_table_that_changed_is_embedded_anew_and_its_old_gallery_goes(
    trained: Trained, tmp_path: Path
) -> None:
    table = tmp_path / "names.csv"
    table.write_text("id,name\na,a red boat\nb,a blue kite\n")
    assert len(trained.search("a red boat", table)) == 2
    table.write_text("id,name\na,a red boat\nb,a blue kite\nc,a green door\n")
    assert len(trained.search("a red boat", table)) == 3
    assert len(galleries(trained)) == 1


def test_a_fill_that_was_killed_goes_on(
    trained: Trained, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = file_source(trained, NewData(data / "things.csv", rows=5))
    whole = trained.search("a red boat", data / "things.csv", k=24)
    shutil.rmtree(trained.path / "galleries")
    original, calls = FaissStore.add, []

    def killed(self: FaissStore, *arguments: Any, **more: Any) -> None:
        calls.append(len(arguments[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(self, *arguments, **more)

    monkeypatch.setattr(FaissStore, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        open_gallery(trained, source, "photo")
    calls[:] = [0] * 10
    said: list[str] = []
    with open_gallery(trained, source, "photo", say=said.append) as store:
        assert len(store) == 24
        assert calls[10:] == [5, 5, 4]
        hits = store.search(trained.embed(["a red boat"], "name"), 24)[0]
        assert hits.ids == [hit.id for hit in whole]
    assert "goes on after 10 rows" in said[0]


# -- what is refused -----------------------------------------------------------------------------------------
def test_a_store_of_something_else_is_refused(
    trained: Trained, run: RunFolder, data: Path, tmp_path: Path
) -> None:
    place = str(tmp_path / "shop.faiss")
    table = data / "things.csv"
    search(trained, "a red boat", "--gallery", table, "--store", place)
    assert "not of 'name'" in refusal(trained, "a red boat", "--store", place, "--target", "name")
    other = tmp_path / "names.csv"
    other.write_text("name\na moon\n")
    message = refusal(trained, "a red boat", "--gallery", other, "--store", place)
    assert f"holds {table}, and not {other}" in message
    assert "--refill" in message
    with open_store(place) as store:
        store.note(weights="others")
    assert "filled by a different model" in refusal(trained, "a red boat", "--store", place)
    assert "a moon" in search(trained, "a red boat", "--gallery", other, "--store", place, "--refill")


def test_what_cannot_be_asked_says_what_to_do(trained: Trained, data: Path, tmp_path: Path) -> None:
    table = data / "things.csv"
    assert "the query is empty" in refusal(trained, "  ")
    assert "give a query" in refusal(trained)
    assert "give a query" in refusal(trained, "a boat", "--queries", table)
    assert "at least one answer" in refusal(trained, "a boat", "-k", "0")
    assert "has no view 'nam'" in refusal(trained, "a boat", "--tower", "nam")
    assert "has no view 'phot'" in refusal(trained, "a boat", "--target", "phot")
    assert "is a folder; name the file" in refusal(trained, "a boat", "--html", tmp_path)
    assert "hits are written as" in refusal(trained, "a boat", "-o", tmp_path / "hits.pdf")
    assert "cannot be read as 'photo'" in refusal(trained, "a boat", "--tower", "photo")
    names = tmp_path / "names.csv"
    names.write_text("name\na moon\n")
    message = refusal(trained, "a boat", "--gallery", names, "--target", "photo")
    assert "no column of 'photo' to search" in message
    assert "--column photo=HEADER" in message
    names.write_text("word\na moon\n")
    assert "has no column 'name'" in refusal(trained, "a boat", "--gallery", names)
    assert "a moon" in search(trained, "a boat", "--gallery", names, "--column", "name=word")


def test_rows_that_cannot_be_searched_are_counted(trained: Trained, data: Path, tmp_path: Path) -> None:
    table = tmp_path / "photos.csv"
    lines = [
        "id,photo,price",
        f"a,{data / 'red_boat.png'},3",
        f"a,{data / 'red_kite.png'},4",
        "b,missing.png,5",
        "c,,6",
    ]
    table.write_text("\n".join(lines) + "\n")
    done = CliRunner().invoke(app, ["search", str(trained.path), "a red boat", "--gallery", str(table)])
    assert done.exit_code == 0, done.exception
    assert "2 rows rejected" in done.output
    assert "a#2" in done.output
    assert "-k 10: there are 2 rows to show" in done.output


# -- many queries, tables and pages --------------------------------------------------------------------------
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_queries_of_a_file(trained: Trained, data: Path, tmp_path: Path, ending: str) -> None:
    import pyarrow.json
    import pyarrow.parquet

    queries = tmp_path / "queries.txt"
    queries.write_text("a red boat\na blue kite\n" * 6)
    output = tmp_path / f"hits{ending}"
    shown = search(trained, "--queries", queries, "-k", "2", "-o", output, "--gallery", data / "things.csv")
    assert "and 2 more queries" in shown
    if ending == ".csv":
        rows: list[dict[str, Any]] = list(rows_of(output))
    elif ending == ".jsonl":
        rows = pyarrow.json.read_json(output).to_pylist()
    else:
        rows = pyarrow.parquet.read_table(output).to_pylist()
    assert len(rows) == 24
    expected = trained.search("a red boat", data / "things.csv", k=2)
    assert [row["id"] for row in rows[:2]] == [hit.id for hit in expected]
    assert list(rows[0]) == ["query", "rank", "cosine", "id", "name", "photo", "price", "shelf"]
    table = tmp_path / "queries.csv"
    table.write_text("id,words\nq1,a red boat\nq2,\n")
    shown = search(trained, "--queries", table, "--query-column", "words", "-o", tmp_path / "one.csv")
    assert "no query 1" in shown
    assert {row["query"] for row in rows_of(tmp_path / "one.csv")} == {"q1"}


def test_pages_show_pictures_and_escape_texts(trained: Trained, data: Path, tmp_path: Path) -> None:
    page = tmp_path / "hits.html"
    search(trained, "<b>a red boat", "--html", page, "-k", "3", "--gallery", data / "things.csv")
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3
    assert "<b>a red boat" not in text
    assert "&lt;b&gt;a red boat" in text
    assert "&lt;0&gt;" in text or "&lt;1&gt;" in text or "&lt;2&gt;" in text or "&lt;3&gt;" in text
    search(trained, data / "red_boat.png", "--html", page, "-k", "3", "--gallery", data / "things.csv")
    assert page.read_text().count("data:image/png;base64,") == 4  # that of the query, too


def test_a_text_without_a_known_word_is_said(trained: Trained) -> None:
    assert "the order below means nothing" in search(trained, "§§§§")
    assert "the order below" not in search(trained, "a red boat")


def test_hits_of_hostile_columns_are_escaped() -> None:
    row = {
        "name": "<script>alert(1)</script>",
        "photo": '"><img src=x onerror=alert(1)>',
        "x": "</div><script>",
        "y": 1.5,
    }
    kinds = {"name": "text", "photo": "image"}
    hits = Hits("<script>", [Hit(1, 0.5, "<i>", row)], "name", "photo", kinds, "<how>")
    shown = hits_page([hits])
    assert "<script>" not in shown.replace("<style>", "")
    assert "<img src=x" not in shown
    assert "<i>" not in shown
    console = Console(width=200, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(Hits("[red]q", [Hit(1, 0.5, "[bold]id", {"a": "c1cc[nH]c1"})], "a", "a", {}).table())
    text = console.export_text()
    assert "[red]q" in text
    assert "[bold]id" in text
    assert "c1cc[nH]c1" in text


def test_which_view_a_query_is(trained: Trained, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = str(data / "red_boat.png")
    assert query_view(trained, [photo]) == "photo"
    with pytest.raises(NearfarError, match=r"nowhere.png: no such picture.*--tower name"):
        query_view(trained, ["nowhere.png"])
    assert query_view(trained, ["nowhere.png"], "name") == "name"
    assert query_view(trained, [photo], "name") == "name"
    kinds = {"molecule": "molecule", "text": "text"}
    monkeypatch.setattr(Trained, "views", ["molecule", "text"])
    monkeypatch.setattr(Trained, "kind", lambda self, view: kinds[view])
    for smiles in ("CC(=O)O", "c1ccccc1O", "CCO"):
        assert query_view(trained, [smiles]) == "molecule", smiles
    for text in ("ethanol", "a C compound", "pH 7", "an acid (weak)", "Cocoa", "(=", "NASA"):
        assert query_view(trained, [text]) == "text", text
