"""Nearest items and ranks of new pairs: what a run says of its test rows, missing views, galleries, wrong files."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import nearfar
from nearfar.cli import app
from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.lab.ensemble import write_ensemble
from nearfar.launch import run_one
from nearfar.systems import check_config
from nearfar.training.run_folder import RunFolder

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    *("text_encoder.dims=16", "text_encoder.min_df=1", "text_encoder.max_df=1.0", "embedding_dim=8"),
    *(
        "epochs=2",
        "batch_size=16",
        "bootstrap=0",
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        "trainer.evaluate_start=false",
        "report=false",
    ),
    *("trainer.probe_rows=16", "trainer.eval_batch_size=16", "data.id_column=key"),
]
pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]
NOUNS = ["river", "stone", "cloud", "forest", "harbour", "candle", "ladder", "mirror", "needle", "orchard"]
PLACES = ["near the hill", "far from the town", "under the bridge", "above the sea", "behind the mill"]
HEADER = ["key", "title", "text", "price", "topic"]


def rows(seed: int, count: int = 50) -> list[list[str]]:
    """Titles, texts that hold some of their words, prices; topics; the last two rows lack a text and a price."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        noun, place = str(random.choice(NOUNS)), str(random.choice(PLACES))
        other = str(random.choice(NOUNS))
        made.append(
            [f"k{seed}-{i}", f"{noun} {place} {i}", f"of a {noun} or {other} {place}", f"{i % 17}.5", noun]
        )
    made[-1][2], made[-2][3] = "", ""
    return made


def write(path: Path, header: list[str], content: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *content])
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("data")
    return {
        name: write(place / f"{name}.csv", HEADER, rows(seed))
        for seed, name in enumerate(("train", "val", "test"))
    }


def train(files: dict[str, Path], place: Path, *more: str) -> RunFolder:
    overrides = ["experiment=pairs", *(f"data.{name}={file}" for name, file in files.items())]
    overrides += [f"runs_dir={place}", *SMALL, *more]
    folder = run_one(check_config(compose_config(overrides)), overrides, False, QUIET)
    assert folder is not None
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, files: dict[str, Path]) -> RunFolder:
    return train(files, tmp_path_factory.mktemp("runs"), "views=[title,text]")


def assert_as_judged(predictions: Any, place: RunFolder, directions: list[str]) -> None:
    """R@1 and MRR of the ranks are those of the run, item by item where it kept them."""
    metrics, per_item = (
        place.read_json("metrics.json")["splits"]["test"],
        np.load(place.path / "per_item.npz"),
    )
    for name in directions:
        judged = [at for at, rank in enumerate(predictions[f"{name}/rank"]) if rank is not None]
        for metric in ("R@1", "MRR"):
            values = np.array([predictions[f"{name}/{metric}"][at] for at in judged])
            assert len(values) == metrics[f"{name}/{metric}"]["n"]
            assert values.mean() == metrics[f"{name}/{metric}"]["value"]
            key = f"test/{name}/{metric}"
            if key in per_item and len(per_item[key]) == len(judged):
                np.testing.assert_array_equal(values.astype(np.float32), per_item[key])
        ranks = [predictions[f"{name}/rank"][at] for at in judged]
        # Among tied keys a rank is an expectation, and the median is that over their orders.
        apart = 1 if any(rank % 1 for rank in ranks) else 0
        assert abs(np.median(ranks) - metrics[f"{name}/median_rank"]["value"]) <= apart
        assert max(ranks) > 1


def test_ranks_are_those_of_the_evaluation(finished: RunFolder, files: dict[str, Path]) -> None:
    trained = nearfar.load(finished.path, device="cpu")
    predictions = trained.predict(files["test"])
    assert predictions.ids == [f"k2-{i}" for i in range(50)]
    assert_as_judged(predictions, finished, ["title_to_text", "text_to_title"])
    ids = np.load(finished.path / "per_item.npz")["test/ids"].tolist()
    assert ids == predictions.ids[:49]  # the row without a text has no partner
    last = predictions.ids.index("k2-49")
    assert predictions["title_to_text/rank"][last] is None
    assert len(predictions["title_to_text/nearest"][last]) == 10
    assert predictions["text_to_title/nearest"][last] is None
    content = rows(2)
    titles, texts = (
        trained.embed([row[at] for row in content if row[at]], tower)
        for at, tower in ((1, "title"), (2, "text"))
    )
    cosines = titles @ texts.T
    for i in range(50):
        np.testing.assert_allclose(
            predictions["title_to_text/cosine"][i], np.sort(cosines[i])[::-1][:10], atol=1e-5
        )
        if predictions["title_to_text/rank"][i] == 1:
            assert predictions["title_to_text/nearest"][i][0] == f"k2-{i}"


def test_three_views_some_of_them_missing(files: dict[str, Path], tmp_path: Path) -> None:
    place = train(files, tmp_path, "views=[title,text,price]", "anchor=title")
    predictions = nearfar.load(place.path, device="cpu").predict(files["test"], k=2)
    names = ["title_to_text", "text_to_title", "title_to_price", "price_to_title"]
    assert {name.split("/")[0] for name in predictions.columns} == set(names)
    assert_as_judged(predictions, place, names)


def test_answers_by_a_column(files: dict[str, Path], tmp_path: Path) -> None:
    place = train(files, tmp_path, "views=[title,text]", "loss=supcon", "positives=topic")
    predictions = nearfar.load(place.path, device="cpu").predict(files["test"])
    assert_as_judged(predictions, place, ["title_to_text", "text_to_title"])


def test_shared_towers_and_other_losses(files: dict[str, Path], tmp_path: Path) -> None:
    place = train(files, tmp_path, "views=[title,text]", "share=true", "loss=siglip")
    predictions = nearfar.load(place.path, device="cpu").predict(files["test"])
    assert_as_judged(predictions, place, ["title_to_text", "text_to_title"])


def test_an_ensemble_compares_by_the_mean_cosine(
    finished: RunFolder, files: dict[str, Path], tmp_path: Path
) -> None:
    other = train(files, tmp_path, "views=[title,text]", "seed=1", "embedding_dim=6")
    made = write_ensemble([finished.path, other.path], tmp_path / "both")
    predictions = nearfar.load(made.path, device="cpu").predict(files["test"])
    assert_as_judged(predictions, made, ["title_to_text", "text_to_title"])


def test_the_command_with_a_gallery(finished: RunFolder, files: dict[str, Path], tmp_path: Path) -> None:
    content = rows(2)
    questions = write(
        tmp_path / "questions.csv", ["key", "heading"], [[row[0], row[1]] for row in content[:5]]
    )
    articles = write(tmp_path / "articles.csv", ["key", "body"], [[row[0], row[2]] for row in content])
    target = tmp_path / "answers.jsonl"
    arguments = [
        "predict",
        str(finished.path),
        str(questions),
        "-o",
        str(target),
        "--column",
        "title=heading",
    ]
    arguments += ["--gallery", str(articles), "--gallery-column", "text=body", "--k", "3", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in target.read_text().splitlines()]
    direct = nearfar.load(finished.path, device="cpu").predict(files["test"], k=3)
    assert [row["id"] for row in written] == [f"k2-{i}" for i in range(5)]
    for row, nearest, rank in zip(
        written, direct["title_to_text/nearest"], direct["title_to_text/rank"], strict=False
    ):
        assert row["title_to_text/nearest"] == nearest
        assert row["title_to_text/rank"] == rank  # the gallery has the same texts, and the partner by its id
    assert "text_to_title/nearest" not in written[0]


def test_the_command_in_parts_is_resumed(finished: RunFolder, files: dict[str, Path], tmp_path: Path) -> None:
    from nearfar.data.chunks import NewData
    from nearfar.serving.stream import predict_file

    trained = nearfar.load(finished.path, device="cpu")
    source = NewData(files["test"], rows=16)
    asked = []
    compare = trained.system.comparison

    def killed(gallery: bool, k: int | None = None) -> Any:
        comparison = compare(gallery, k)
        of_all = comparison.of_all

        def counted(start: int, stop: int) -> Any:
            asked.append((start, stop))
            if len(asked) == 3:
                raise KeyboardInterrupt
            return of_all(start, stop)

        comparison.of_all = counted
        return comparison

    trained.system.comparison = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        predict_file(trained, source, tmp_path / "out.jsonl")
    written = predict_file(trained, source, tmp_path / "out.jsonl")
    assert written.resumed == 2
    assert asked == [(0, 16), (16, 32), (32, 48), (32, 48), (48, 50)]
    nearest = [
        json.loads(line)["title_to_text/rank"] for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ]
    whole = trained.predict(files["test"])
    assert nearest == whole["title_to_text/rank"]


def test_files_that_do_not_fit(finished: RunFolder, tmp_path: Path) -> None:
    trained = nearfar.load(finished.path, device="cpu")
    one = write(tmp_path / "one.csv", ["key", "title"], [["a", "river near the hill"], ["b", " "]])
    with pytest.raises(NearfarError, match=r"one view alone.*--gallery FILE"):
        trained.predict(one)
    other = write(tmp_path / "other.csv", ["key", "name", "words"], [["a", "x", "y"]])
    with pytest.raises(NearfarError, match=r"no column 'title' or 'text'.*'key', 'name', 'words'"):
        trained.predict(other)
    gallery = write(tmp_path / "gallery.csv", ["key", "text"], [["x", "of a river"], ["y", "N/A"], ["z", ""]])
    counted = trained.predict(one, gallery=gallery).rejections.counts
    assert counted == {"no value": 1, "gallery: no value": 2}
    predictions = trained.predict(one, gallery={"text": ["of a river", "of a stone"]}, k=1)
    assert predictions.ids == ["a"]
    assert len(predictions.rejections) == 1
    assert predictions["title_to_text/nearest"] == [["0"]]
