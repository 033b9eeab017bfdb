"""Boxes of new photos: AP of the written COCO results is that of the run, every kind of input, bad pictures."""

from __future__ import annotations

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

import nearfar
from nearfar.config.compose import compose_config
from nearfar.data.chunks import NewData
from nearfar.data.coco import read_coco
from nearfar.data.coco_results import category_ids
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.metrics.detection import Boxes, detection_evidence, true_boxes
from nearfar.serving import Trained
from nearfar.serving.export import export_run
from nearfar.serving.stream import embed_file, predict_file
from nearfar.systems import build_system
from nearfar.systems.detector.model import build_detector, load_frozen, save_frozen
from nearfar.training.run_folder import RunFolder
from tiny_detection import write

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "experiment=detector",
    "epochs=2",
    "batch_size=8",
    "width=16",
    "heads=2",
    "layers=1",
    "queries=5",
    "frozen_epochs=0",
    "data.image_size=64",
    "data.group_key=sex",
    "bootstrap=100",
    "image_encoder=small",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
]

pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for split, n in (("train", 40), ("val", 12), ("test", 16)):
        write(path, split, n)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> RunFolder:
    every = [*SMALL, f"data.dir={folder}", f"runs_dir={tmp_path_factory.mktemp('runs')}", "name=run"]
    return run_one(compose_config(every), every, False, QUIET)


@pytest.fixture(scope="module")
def trained(run: RunFolder) -> Trained:
    return nearfar.load(run.path, device="cpu")


def results_ap(results: Path, coco: Path) -> dict[str, float]:
    """AP and AR of a file of COCO results, read as any tool reads it."""
    split = read_coco(coco, group_key="sex")
    rows = json.loads(results.read_text())
    content = json.loads(coco.read_text())
    place = {row["id"]: split.ids.index(row["file_name"]) for row in content["images"]}
    label = {row["id"]: split.categories.index(row["name"]) for row in content["categories"]}
    boxes = np.array([row["bbox"] for row in rows])
    boxes[:, 2:] += boxes[:, :2]
    predicted = Boxes(
        boxes,
        np.array([label[row["category_id"]] for row in rows]),
        np.array([place[row["image_id"]] for row in rows]),
        scores=np.array([row["score"] for row in rows]),
    )
    evidence = detection_evidence(predicted, true_boxes(split), len(split), split.groups)
    return {name: float(value[0]) for name, value in evidence.statistics().items()}


def test_written_results_score_what_the_run_scored(run: RunFolder, folder: Path, tmp_path: Path) -> None:
    for split in ("val", "test"):
        output = tmp_path / f"{split}.json"
        written = predict_file(nearfar.load(run.path, "cpu"), NewData(folder / f"{split}.json"), output)
        said = run.read_json("metrics.json")["splits"][split]
        rows = json.loads(output.read_text())
        assert written.rows == len(rows) == 5 * (12 if split == "val" else 16)
        got = results_ap(output, folder / f"{split}.json")
        assert said["AP"]["value"] > 0
        for name, estimate in said.items():
            assert got[name] == pytest.approx(estimate["value"], abs=1e-9), name
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_results_are_those_that_other_tools_read(trained: Trained, folder: Path, tmp_path: Path) -> None:
    coco = pytest.importorskip("faster_coco_eval")
    predict_file(trained, NewData(folder / "test.json"), tmp_path / "out.json")
    truth = coco.COCO(str(folder / "test.json"))
    evaluator = coco.COCOeval_faster(truth, truth.loadRes(str(tmp_path / "out.json")), "bbox")
    evaluator.run()
    said = RunFolder(trained.path).read_json("metrics.json")["splits"]["test"]["AP"]["value"]
    assert evaluator.stats[0] == pytest.approx(said, abs=1e-6)


def test_every_kind_of_input_gives_the_same_boxes(trained: Trained, folder: Path, tmp_path: Path) -> None:
    names = [f"test{i}.png" for i in (3, 1, 2)]
    photos = tmp_path / "photos" / "deep"
    photos.mkdir(parents=True)
    for name in names:
        shutil.copy(folder / "images" / name, photos / name)
    of_folder = trained.predict(tmp_path / "photos")
    assert list(dict.fromkeys(of_folder["image"])) == [f"deep/{name}" for name in sorted(names)]
    by_name: dict[str, list[float]] = {}
    for image, left in zip(of_folder["image"], of_folder["left"], strict=True):
        by_name.setdefault(Path(image).name, []).append(left)
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "table.csv").write_text("id,file_name\n" + "".join(f"{n},{n}\n" for n in names))
    content = {"images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(names)]}
    (tmp_path / "pictures.json").write_text(json.dumps(content))
    arrays = [np.asarray(Image.open(photos / name)) for name in names]
    every = {
        "list": trained.predict(NewData(tmp_path / "list.txt", images=photos)),
        "table": trained.predict(NewData(tmp_path / "table.csv", images=photos)),
        "coco": trained.predict(NewData(tmp_path / "pictures.json", images=photos)),
        "paths": trained.predict([photos / name for name in names]),
        "arrays": trained.predict(arrays),
        "one chunk each": trained.predict(NewData(tmp_path / "list.txt", images=photos, rows=1)),
    }
    for kind, got in every.items():
        lefts: dict[str, list[float]] = {}
        for image, left in zip(got["image"], got["left"], strict=True):
            lefts.setdefault(image, []).append(left)
        for name, values in zip(names, lefts.values(), strict=True):
            np.testing.assert_allclose(values, by_name[name], atol=1e-4, err_msg=kind)
    assert sorted(set(every["coco"]["image_id"])) == [10, 11, 12]
    assert trained.predict(photos / names[0])["left"] == pytest.approx(by_name[names[0]], abs=1e-4)
    scores = every["list"]["score"]
    few = trained.predict(
        NewData(tmp_path / "list.txt", images=photos, options={"min_score": str(max(scores))})
    )
    assert few["score"] == [max(scores)]


def test_an_exported_folder_predicts_the_same(
    trained: Trained, run: RunFolder, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    export_run(run.path, tmp_path / "model")
    again = nearfar.load(tmp_path / "model", "cpu").predict(folder / "test.json")
    assert again.columns == trained.predict(folder / "test.json").columns


def test_a_table_has_a_row_for_each_box(trained: Trained, folder: Path, tmp_path: Path) -> None:
    written = predict_file(trained, NewData(folder / "test.json"), tmp_path / "boxes.csv")
    lines = (tmp_path / "boxes.csv").read_text().splitlines()
    head = "id,row,image,image_id,category,category_id,score,left,top,width,height"
    assert lines[0] == head
    assert len(lines) == 1 + written.rows == 1 + 5 * 16
    row = dict(zip(head.split(","), lines[1].split(","), strict=True))
    assert row["id"] == row["image"] == "test1.png"
    assert row["category"] == "person"


def test_bad_pictures_are_counted_with_reasons(trained: Trained, folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(folder / "images", photos)
    (photos / "test1.png").write_bytes((photos / "test1.png").read_bytes()[:60])
    (photos / "test2.png").write_text("<html>")
    (photos / "notes.txt").write_text("no picture")
    got = trained.predict(photos)
    assert got.rejections.counts == {"unreadable picture": 2}
    assert "test1.png" in got.rejections.summary()
    (tmp_path / "list.txt").write_text("test1.png\ngone.png\ntest3.png\n")
    listed = trained.predict(NewData(tmp_path / "list.txt", images=photos))
    assert set(listed["image"]) == {"test3.png"}
    assert sum(listed.rejections.counts.values()) == 2
    rows = [
        {"id": 1, "file_name": "test3.png", "width": 640, "height": 48},
        {"id": 2, "file_name": "gone.png"},
        {"file_name": "test4.png"},
        {"id": 4, "file_name": "test4.png", "width": 64, "height": 48},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"images": rows}))
    of_coco = trained.predict(NewData(tmp_path / "a.json", images=photos))
    assert set(of_coco["image_id"]) == {4}
    assert of_coco.rejections.counts == {
        "picture of a different size": 1, "missing picture": 1, "picture without id or file_name": 1
    }  # fmt: skip


def test_bad_input(trained: Trained, folder: Path, tmp_path: Path) -> None:
    def fails(data: Any, message: str) -> None:
        with pytest.raises(NearfarError, match=message):
            trained.predict(data)

    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no picture, at any depth; it is empty")
    (tmp_path / "empty" / "a.txt").write_text("x")
    fails(tmp_path / "empty", r"holds no picture.*in it: a\.txt")
    fails(tmp_path / "nowhere", "no such file or folder")
    (tmp_path / "a.json").write_text(json.dumps({"images": []}))
    fails(tmp_path / "a.json", "lists no pictures")
    (tmp_path / "b.json").write_text("[1]")
    fails(tmp_path / "b.json", "a list 'images'")
    (tmp_path / "c.json").write_text("{")
    fails(tmp_path / "c.json", "not valid JSON")
    fails(NewData(folder / "images", options={"min_score": "2"}), "min_score=2: a number from 0 to 1")
    fails([folder / "images" / "test1.png", "gone.png"], "value 1 cannot be read")
    fails([np.zeros((4, 4), np.uint8)], r"value 0 cannot be read.*\(height, width, 3\)")
    with pytest.raises(NearfarError, match="embeds nothing; it predicts: nearfar predict"):
        trained.embed(["a"])
    with pytest.raises(NearfarError, match="embeds nothing; it predicts: nearfar predict"):
        embed_file(trained, NewData(folder / "images"), tmp_path / "v.npz")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    with pytest.raises(NearfarError, match="no row can be used"):
        predict_file(trained, NewData(tmp_path / "bad"), tmp_path / "out.json")


def test_categories_have_the_ids_of_the_file() -> None:
    assert category_ids(["Cat", "dog"], {"cat": 3, "bird": 9}) == {"Cat": 3, "dog": 10}
    assert category_ids(["cat"], {"cat": "a"}) == {"cat": "a"}


def test_a_frozen_detector_is_kept_as_plain_arrays(tmp_path: Path) -> None:
    config: Any = build_system(compose_config([*SMALL, "data.dir=x"])).config
    detector = build_detector(config, ["cat", "dog"])
    detector.moved.fill_(True)
    detector.freeze()
    save_frozen(detector, tmp_path)
    loaded = load_frozen(tmp_path)
    pixels = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(pixels).boxes, detector(pixels).boxes)
    assert loaded.classes == detector.classes
    assert loaded.description == detector.description
    assert b"pickle" not in (tmp_path / "weights.npz").read_bytes()[:2000]
    arrays = dict(np.load(tmp_path / "weights.npz"))
    arrays["size"] = np.zeros(3, np.float32)
    np.savez(tmp_path / "weights.npz", **arrays)
    with pytest.raises(NearfarError, match="not those of the detector described"):
        load_frozen(tmp_path)
