"""Classes of new items: what a run says of its test rows, several labels, unseen classes, galleries, wrong input."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import nearfar
from nearfar.cli import app
from nearfar.config.compose import compose_config
from nearfar.data.chunks import NewData
from nearfar.errors import NearfarError
from nearfar.lab.ensemble import write_ensemble
from nearfar.launch import run_one
from nearfar.metrics import retrieval_ranks
from nearfar.serving.export import export_run
from nearfar.training.run_folder import RunFolder

pytest.importorskip("sklearn")
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "epochs=2",
    "batch_size=16",
    "embedding_dim=8",
    "bootstrap=100",
    "lr=0.01",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
    "trainer.eval_batch_size=16",
]

pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    return path


def numbers(count: int = 150, classes: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of six numbers about the centre of their class, with much noise: many are told wrong."""
    random, centres = np.random.default_rng(seed), np.random.default_rng(9).normal(size=(classes, 6))
    rows = []
    for i in range(count):
        x = centres[i % classes] + 1.5 * random.normal(size=6)
        rows.append({"id": f"{seed}-{i}", "x": [round(float(v), 4) for v in x], "label": f"c{i % classes}"})
    return rows


def run(place: Path, *more: str) -> RunFolder:
    every = ["experiment=labels", *SMALL, f"runs_dir={place / 'runs'}", "name=run", *more]
    every = list({text.split("=")[0]: text for text in every}.values())
    return run_one(compose_config(every), every, False, QUIET)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("data")
    test = numbers(70, 4, 1)
    test[3]["label"] = "new"  # a class that training lacks
    return {
        "train": write_table(place / "train.jsonl", numbers()),
        "test": write_table(place / "test.jsonl", test),
    }


def data(files: dict[str, Path]) -> list[str]:
    return [f"data.train={files['train']}", f"data.test={files['test']}"]


@pytest.fixture(scope="module", params=["supcon", "cross_entropy"])
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, files: dict[str, Path]
) -> RunFolder:
    return run(tmp_path_factory.mktemp("runs"), *data(files), f"loss={request.param}")


def test_in_the_precision_of_the_run(files: dict[str, Path], tmp_path: Path) -> None:
    place = run(tmp_path, *data(files), "trainer.precision=bf16-mixed")
    trained = nearfar.load(place.path, device="cpu")
    items = next(trained.new_items(files["test"]))
    assert trained.outputs(items)["x"].dtype == torch.bfloat16
    assert_as_judged(trained.predict(files["test"]), place, labels_of(files["test"]))


def labels_of(file: Path) -> list[str]:
    return [json.loads(line)["label"] for line in file.read_text().splitlines()]


def assert_as_judged(predictions: Any, place: RunFolder, labels: list[str]) -> None:
    """Each item is right or wrong as the run counted it."""
    per_item, metrics = np.load(place.path / "per_item.npz"), place.read_json("metrics.json")
    assert per_item["test/ids"].tolist() == predictions.ids
    for name in ("knn", "probe"):
        right = np.array([a == b for a, b in zip(predictions[name], labels, strict=True)])
        np.testing.assert_array_equal(right, per_item[f"test/{name}/accuracy"])
        assert right.mean() == metrics["splits"]["test"][f"{name}/accuracy"]["value"]
        assert 0.2 < right.mean() < 1


def test_predictions_are_what_the_evaluation_counted(finished: RunFolder, files: dict[str, Path]) -> None:
    trained = nearfar.load(finished.path, device="cpu")
    predictions = trained.predict(files["test"])
    assert_as_judged(predictions, finished, labels_of(files["test"]))
    classes = sorted(set(labels_of(files["train"])))
    for at, row in enumerate(predictions):
        shares = [row[f"probe/p({name})"] for name in classes]
        assert sum(shares) == pytest.approx(1)
        assert row["probe/probability"] == max(shares)
        assert classes[int(np.argmax(shares))] == row["probe"]
        votes = [json_row["label"] for json_row in training_rows(files, row["knn/nearest"])]
        assert votes.count(row["knn"]) / len(votes) == pytest.approx(row["knn/share"])
        assert votes.count(row["knn"]) == max(votes.count(name) for name in votes)
        assert sorted(row["knn/cosine"], reverse=True) == row["knn/cosine"]
        assert predictions.ids[at] == row["id"]


def training_rows(files: dict[str, Path], ids: list[str]) -> list[dict[str, Any]]:
    known = {row["id"]: row for row in map(json.loads, files["train"].read_text().splitlines())}
    return [known[identity] for identity in ids]


def test_neighbours_are_those_of_the_embeddings(finished: RunFolder, files: dict[str, Path]) -> None:
    trained = nearfar.load(finished.path, device="cpu")
    train = [json.loads(line) for line in files["train"].read_text().splitlines()]
    held = np.load(finished.path / "class_rows.npz")
    used = [row for row in train if row["id"] in set(held["ids"].tolist())]
    assert 0 < len(used) < len(train)  # without those of validation
    rows = trained.embed(np.array([row["x"] for row in used], np.float32))
    test = [json.loads(line)["x"] for line in files["test"].read_text().splitlines()]
    cosines = trained.embed(np.array(test, np.float32)) @ rows.T
    predictions = trained.predict(files["test"])
    for at, order in enumerate(np.argsort(-cosines, axis=1)[:, :5]):
        np.testing.assert_allclose(predictions["knn/cosine"][at], cosines[at][order], atol=1e-5)
        assert set(predictions["knn/nearest"][at]) == {used[i]["id"] for i in order}
    # the evaluation's R@1 is that of these vectors
    codes = np.unique(labels_of(files["test"]), return_inverse=True)[1]
    vectors = trained.embed(np.array(test, np.float32))
    ranks = retrieval_ranks(vectors, vectors, (codes, codes), leave_one_out=True)
    value = finished.read_json("metrics.json")["splits"]["test"]["R@1"]["value"]
    assert ranks.hits(1).mean() == pytest.approx(value)


def test_the_command_lists_what_cannot_be_read(
    finished: RunFolder, files: dict[str, Path], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.csv"
    rows = [json.loads(line) for line in files["test"].read_text().splitlines()]
    with mine.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["id", "measured"])
        out.writerows([[row["id"], json.dumps(row["x"])] for row in rows])
        out.writerow(["empty", ""])
    target = tmp_path / "predictions.csv"
    arguments = ["predict", str(finished.path), str(mine), "-o", str(target), "--column", "x=measured"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "1 row rejected" in result.output
    written = list(csv.DictReader(target.open()))
    direct = nearfar.load(finished.path, device="cpu").predict(files["test"])
    for name in ("knn", "probe"):
        assert [row[name] for row in written] == direct[name]
    assert [json.loads(row["knn/nearest"]) for row in written] == direct["knn/nearest"]


def test_the_run_keeps_arrays_alone(finished: RunFolder, tmp_path: Path, files: dict[str, Path]) -> None:
    place = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "copy")))
    (place.path / "class_rows.npz").unlink()
    trained = nearfar.load(place.path, device="cpu")
    assert trained.embed(np.zeros((1, 6), np.float32)).shape == (1, 8)
    with pytest.raises(NearfarError, match=r"not evaluated to its end.*resume_from=RUN"):
        trained.predict(files["test"])
    arrays = dict(np.load(finished.path / "class_rows.npz"))
    for wrong in (
        {"codes": arrays["codes"] + 9},
        {"rows": arrays["rows"][:3]},
        {"probe/weight": arrays["probe/weight"][:, :2]},
        {"probe/bias": arrays["probe/bias"][:2], "probe/weight": arrays["probe/weight"][:2]},
        {"names": np.array([object()], dtype=object)},
    ):
        np.savez(place.path / "class_rows.npz", allow_pickle=True, **(arrays | wrong))
        with pytest.raises(NearfarError, match=r"class_rows\.npz"):
            nearfar.load(place.path, device="cpu")


def test_a_gallery_of_ones_own_votes(finished: RunFolder, files: dict[str, Path], tmp_path: Path) -> None:
    trained = nearfar.load(finished.path, device="cpu")
    rows = [row | {"kind": "even" if i % 2 else "odd"} for i, row in enumerate(numbers(40, 2, 3))]
    gallery = write_table(tmp_path / "gallery.jsonl", rows)
    source = NewData(gallery, {"label": "kind"})
    predictions = trained.predict(files["test"], gallery=source, k=3)
    assert set(predictions["knn"]) == {"even", "odd"}
    assert set(predictions["probe"]) <= {"even", "odd"}
    assert {len(ids) for ids in predictions["knn/nearest"]} == {3}
    assert {name for ids in predictions["knn/nearest"] for name in ids} <= {row["id"] for row in rows}
    bare = write_table(tmp_path / "bare.jsonl", [{"id": row["id"], "x": row["x"]} for row in rows])
    with pytest.raises(NearfarError, match=r"no column 'label'.*--gallery-column label=HEADER"):
        trained.predict(files["test"], gallery=bare)


def test_classes_that_were_never_seen(files: dict[str, Path], tmp_path: Path) -> None:
    place = run(tmp_path, f"data.train={files['train']}", "unseen_classes=0.5")
    trained = nearfar.load(place.path, device="cpu")
    names = trained.system.class_names()  # type: ignore[attr-defined]
    assert len(names.names) == len(names.unseen) == 2
    predictions = trained.predict(files["test"])  # a class is one of training, whatever the item is
    assert set(predictions["knn"]) | set(predictions["probe"]) <= set(names.names)
    new = [
        row
        for row in map(json.loads, files["train"].read_text().splitlines())
        if row["label"] in names.unseen
    ]
    gallery = write_table(tmp_path / "new.jsonl", new)
    assert set(trained.predict(files["test"], gallery=gallery)["knn"]) <= set(names.unseen)


@pytest.mark.parametrize("loss", ["multilabel", "cross_entropy"])
def test_several_labels_an_item(loss: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = {"war": ["tank", "army"], "love": ["kiss", "heart"], "space": ["star", "rocket"]}
    rows = []
    for i in range(120):
        genres = [genre for genre in words if random.random() < 0.5] or ["war"]
        text = " ".join(random.choice(words[g]) for g in genres for _ in range(3))
        rows.append({"id": str(i), "plot": f"{text} {i}", "genres": "; ".join(genres)})
    table = write_table(tmp_path / "films.jsonl", rows)
    place = run(
        tmp_path, f"data.train={table}", "view=plot", "label=genres", "text_encoder.min_df=1", f"loss={loss}"
    )
    predictions = nearfar.load(place.path, device="cpu").predict(["kiss heart kiss", "tank rocket"])
    assert "probe" not in predictions.columns
    genres = {row["id"]: row["genres"].split("; ") for row in rows}
    for row in predictions:
        voted = [genres[identity] for identity in row["knn/nearest"]]
        shares = {name: sum(name in each for each in voted) / 5 for name in words}
        assert dict(part.rsplit(":", 1) for part in row["knn/labels"].split(";")) == {
            name: f"{share:g}" for name, share in shares.items() if share
        }
        assert set(row["knn"].split(";")) - {""} == {name for name, share in shares.items() if share >= 0.5}


def test_pictures_by_folder(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 24)):
        for i in range(count):
            colour = [(200, 90, 90), (90, 200, 90), (90, 90, 200)][i % 3]
            folder = tmp_path / split / ["red", "green", "blue"][i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(np.array(colour) + random.normal(0, 90, (12, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "test" / "red" / "broken.png").write_bytes(b"no picture")
    place = run(
        tmp_path, f"data.train={tmp_path / 'train'}", f"data.test={tmp_path / 'test'}", "tower.size=32",
        "image_encoder=small", "image_encoder.features=16",
    )  # fmt: skip
    predictions = nearfar.load(place.path, device="cpu").predict(tmp_path / "test")
    per_item = np.load(place.path / "per_item.npz")
    assert per_item["test/ids"].tolist() == predictions.ids
    assert len(predictions.rejections) == 1
    assert "broken.png" in predictions.rejections.summary()
    labels = [Path(identity).parent.name for identity in predictions.ids]
    for name in ("knn", "probe"):
        right = np.array([a == b for a, b in zip(predictions[name], labels, strict=True)])
        np.testing.assert_array_equal(right, per_item[f"test/{name}/accuracy"])
    assert torch.get_default_dtype() == torch.float32


def test_an_ensemble_votes_by_all_embeddings(
    finished: RunFolder, files: dict[str, Path], tmp_path: Path
) -> None:
    loss = f"loss={finished.config().loss.name}"
    other = run(tmp_path, *data(files), loss, "seed=1", "embedding_dim=6")
    made = write_ensemble([finished.path, other.path], tmp_path / "both")
    trained = nearfar.load(made.path, device="cpu")
    assert trained.dim == 14
    predictions = trained.predict(files["test"])
    assert_as_judged(predictions, made, labels_of(files["test"]))
    assert max(row[0] for row in predictions["knn/cosine"]) <= 1 + 1e-5
    export_run(made.path, tmp_path / "out", "safetensors")
    assert nearfar.load(tmp_path / "out", device="cpu").predict(files["test"]).columns == predictions.columns


def test_an_exported_folder_predicts_the_same(
    finished: RunFolder, files: dict[str, Path], tmp_path: Path
) -> None:
    trained = nearfar.load(finished.path, device="cpu")
    export_run(finished.path, tmp_path / "out", "safetensors")
    exported = nearfar.load(tmp_path / "out", device="cpu").predict(files["test"])
    assert exported.columns == trained.predict(files["test"]).columns


def test_a_run_that_goes_on_forgets_the_items_of_its_earlier_end(
    finished: RunFolder, files: dict[str, Path], tmp_path: Path
) -> None:
    trained = nearfar.load(finished.path, device="cpu")
    trained.system.save_assets(tmp_path)  # as an export does: with everything that predictions need
    assert (tmp_path / "class_rows.npz").is_file()
    again: Any = nearfar.load(finished.path, device="cpu").system
    again._known = None  # as before its evaluation
    again.save_assets(tmp_path)
    assert not (tmp_path / "class_rows.npz").exists()
    assert (tmp_path / "classes.json").is_file()
