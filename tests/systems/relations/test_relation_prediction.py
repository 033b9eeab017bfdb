"""Relations of new pairs: what a run said of its test pairs, files of boxes in every form, older runs, bad input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import nearfar
from nearfar.config.compose import compose_config
from nearfar.data.chunks import NewData
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.metrics.classification import probabilities
from nearfar.serving import Trained
from nearfar.serving.export import export_run
from nearfar.serving.stream import embed_file, predict_file
from nearfar.systems import build_system
from nearfar.systems.relations.evaluation import Predictions
from nearfar.systems.relations.probe import FUSED, Predictor
from nearfar.towers import load_tower
from nearfar.training.run_folder import RunFolder
from tiny_relations import write_vrd

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "experiment=relations",
    "data=vrd",
    "image_encoder=small",
    "image_encoder.features=32",
    "crop_size=32",
    "epochs=2",
    "batch_size=8",
    "visual_hidden=32",
    "embedding_dim=16",
    "bootstrap=100",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures, thirty of them with a photo."""
    return write_vrd(tmp_path_factory.mktemp("vrd") / "data", 40, 30)


def train(place: Path, folder: Path, *more: str) -> RunFolder:
    every = [*SMALL, f"data.dir={folder}", f"runs_dir={place}", "name=run", *more]
    every = list({o.split("=")[0]: o for o in every}.values())
    return run_one(compose_config(every), every, False, QUIET)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> RunFolder:
    return train(tmp_path_factory.mktemp("runs"), folder, "categories=true")


@pytest.fixture(scope="module")
def trained(run: RunFolder) -> Trained:
    return nearfar.load(run.path, device="cpu")


def keys(images: Any, first: Any, second: Any) -> list[tuple[str, ...]]:
    return [
        (image, str([float(v) for v in a]), str([float(v) for v in b]))
        for image, a, b in zip(images, first, second, strict=True)
    ]


def own_pairs(run: RunFolder, split: str) -> tuple[list[tuple[str, ...]], Predictions]:
    """The pairs of a split, and what the run said of them."""
    from nearfar.config.compose import read_config

    system = build_system(read_config(run.config(), saved=True))
    pairs = system.load_data(lambda _: None).splits[split]  # type: ignore[attr-defined]
    said = Predictions.load(run.path, split)
    assert pairs.ids == list(said.ids)
    return keys(pairs.image, pairs.subject_box, pairs.object_box), said


@pytest.mark.slow
@pytest.mark.parametrize("options", [["categories=true"], ["data.photos=none"], ["keep_inputs=false"]])
def test_prediction_is_what_the_evaluation_said(tmp_path: Path, folder: Path, options: list[str]) -> None:
    run = train(tmp_path, folder, *options)
    pairs, said = own_pairs(run, "test")
    output = tmp_path / "out.jsonl"
    written = predict_file(
        nearfar.load(run.path, device="cpu"), NewData(folder / "annotations.json", images=folder), output
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert written.rows == len(rows) >= len(pairs)
    got = dict(
        zip(
            keys(*([row[name] for row in rows] for name in ("image", "subject_box", "object_box"))),
            rows,
            strict=True,
        )
    )
    classes = said.classes()[FUSED]
    assert [got[pair]["relation"] for pair in pairs] == [said.relations[i] for i in classes]
    if "photo" in rows[0]:
        assert [got[pair]["photo"] for pair in pairs] == said.has_pixels.tolist()
        assert 0 < said.has_pixels.sum() < len(pairs)
    hits = np.mean([got[p]["relation"] == said.relations[t] for p, t in zip(pairs, said.truth, strict=True)])
    test = run.read_json("metrics.json")["splits"]["test"]
    assert hits == pytest.approx(test[FUSED]["value"])
    predictor = Predictor.load(run.path)
    assert predictor is not None
    shares = probabilities(said.scores[FUSED].astype(float), predictor.temperature)
    for pair, share in zip(pairs, shares, strict=True):
        row = got[pair]
        of_row = [row[f"p({relation})"] for relation in said.relations]
        np.testing.assert_allclose(of_row, share, atol=1e-5)
        assert sum(of_row) == pytest.approx(1)
        assert row["probability"] == max(of_row)


@pytest.mark.slow
def test_scores_of_the_same_pairs_are_equal_to_the_last_bit(run: RunFolder) -> None:
    """The test split again, in the batches of the evaluation."""
    from nearfar.config.compose import read_config

    system = build_system(read_config(run.config(), saved=True))
    system.prepare(lambda _: None)
    trained = nearfar.load(run.path, device="cpu")
    items = system.splits["test"]  # type: ignore[attr-defined]
    columns = trained.system.predictions(trained.outputs(items), items)
    said = Predictions.load(run.path, "test")
    assert columns["relation"] == [said.relations[i] for i in said.classes()[FUSED]]
    shares = np.stack([columns[f"p({relation})"] for relation in said.relations], axis=1)
    temperature = trained.system.predictor.temperature  # type: ignore[attr-defined]
    np.testing.assert_allclose(
        shares, probabilities(said.scores[FUSED].astype(np.float64), temperature), atol=2e-6
    )


def write_coco(path: Path, folder: Path) -> dict[str, Any]:
    """Two pictures with three boxes and one, a picture of none, and rows that are wrong."""
    content = {
        "images": [
            {"id": 1, "file_name": "0.jpg", "width": 240, "height": 240},
            {"id": 2, "file_name": "1.jpg"},
            {"id": 3, "file_name": "2.jpg"},
        ],
        "categories": [{"id": 7, "name": "cup"}, {"id": 8, "name": "table"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 40, 40]},
            {"id": 2, "image_id": 1, "category_id": 8, "bbox": [10, 60, 40, 40]},
            {"id": 3, "image_id": 1, "category_id": 7, "bbox": [100, 60, 40, 40]},
            {"id": 4, "image_id": 2, "category_id": 7, "bbox": [10, 10, 40, 40]},
            {"id": 5, "image_id": 2, "category_id": 8, "bbox": [500, 10, 40, 40]},
            {"id": 6, "image_id": 9, "category_id": 8, "bbox": [5, 10, 40, 40]},
            {"id": 7, "image_id": 1, "category_id": 5, "bbox": [5, 10, 40, 40]},
            {"id": 8, "image_id": 1, "category_id": 7, "bbox": [5, 10, 0, 40]},
            {"id": 9, "image_id": 1, "category_id": 7, "bbox": [5, "x", 3, 40]},
        ],
    }
    path.write_text(json.dumps(content))
    return content


@pytest.mark.slow
def test_every_ordered_pair_of_a_coco_file(trained: Trained, folder: Path, tmp_path: Path) -> None:
    content = write_coco(tmp_path / "boxes.json", folder)
    predictions = trained.predict(NewData(tmp_path / "boxes.json", images=folder / "images"))
    assert predictions["image"] == ["0.jpg"] * 6
    boxes = {
        (str(a), str(b)) for a, b in zip(predictions["subject_box"], predictions["object_box"], strict=True)
    }
    assert len(boxes) == 6
    assert all(a != b for a, b in boxes)
    assert set(zip(predictions["subject"], predictions["object"], strict=True)) == {
        ("cup", "table"), ("table", "cup"), ("cup", "cup")
    }  # fmt: skip
    reasons = predictions.rejections.counts
    assert reasons["box outside the picture"] == 2, "both pairs of the box that lies outside"
    for reason in ("box of a picture that is not there", "unknown category", "box without area"):
        assert reasons[reason] == 1
    # Results of a detector, with and without what their ids mean.
    rows = [row | {"score": 0.9 - 0.5 * (row["id"] == 3)} for row in content["annotations"][:4]]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    of_results = trained.predict(NewData(tmp_path / "results.json", images=write_about(tmp_path, folder)))
    assert len(of_results) == 2
    assert of_results.rejections.counts == {"score below 0.5": 1}
    more = NewData(tmp_path / "results.json", images=tmp_path / "images.json", options={"min_score": "0.4"})
    assert trained.predict(more)["relation"] == predictions["relation"]
    named = [
        {"file_name": "0.jpg", "image_id": 5, "category": "cup" if row["category_id"] == 7 else "table"}
        | {"bbox": row["bbox"], "score": 1}
        for row in rows[:3]
    ]
    (tmp_path / "named.json").write_text(json.dumps(named))
    again = trained.predict(NewData(tmp_path / "named.json", images=folder / "images"))
    assert again["relation"] == predictions["relation"]
    with pytest.raises(NearfarError, match=r"which picture image_id 1 is.*--images FILE.json"):
        trained.predict(NewData(tmp_path / "results.json", images=folder / "images"))


def write_about(tmp_path: Path, folder: Path) -> Path:
    """A COCO file of pictures alone, beside which the pictures lie."""
    content = json.loads((tmp_path / "boxes.json").read_text())
    path = tmp_path / "images.json"
    path.write_text(
        json.dumps({name: content[name] for name in ("images", "categories")} | {"annotations": []})
    )
    shutil.copytree(folder / "images", tmp_path / "images")
    return path


@pytest.mark.slow
def test_tables_of_pairs_and_of_boxes(trained: Trained, folder: Path, tmp_path: Path) -> None:
    boxes = {"cup": (10, 10, 50, 50), "table": (10, 60, 50, 100)}
    head = ["image", "name", "left", "top", "right", "bottom"]
    lines = [",".join(head)]
    lines += [",".join(map(str, ["0.jpg", name, *box])) for name, box in boxes.items()]
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    of_boxes = trained.predict(NewData(tmp_path / "boxes.csv", images=folder / "images"))
    assert list(zip(of_boxes["subject"], of_boxes["object"], strict=True)) == [
        ("cup", "table"), ("table", "cup")
    ]  # fmt: skip
    row = {
        "image": "0.jpg", "subject": "cup", "subject_box": boxes["cup"], "object": "table",
        "object_box": boxes["table"],
    }  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"subject_box": [1, 2]}) + "\n"
    )
    of_pairs = trained.predict(NewData(tmp_path / "pairs.jsonl", images=folder / "images"))
    assert of_pairs["relation"] == of_boxes["relation"][:1]
    rows = "".join(json.dumps(row | {"id": f"pair {i}"}) + "\n" for i in range(5))
    rows += json.dumps(row | {"id": "pair 5", "object_box": [900, 10, 950, 20]}) + "\n"
    (tmp_path / "many.jsonl").write_text(rows)
    many = NewData(tmp_path / "many.jsonl", images=folder / "images", rows=2)
    chunks = list(trained.new_items(many))
    assert [items.ids for items in chunks] == [["pair 0", "pair 1"], ["pair 2", "pair 3"], ["pair 4"]]
    assert [items.rows for items in chunks] == [[1, 2], [3, 4], [5]]
    assert [len(items.rejections) for items in chunks] == [0, 0, 1]
    np.testing.assert_allclose(of_pairs["probability"], of_boxes["probability"][:1], atol=1e-6)
    assert len(of_pairs.rejections) == 1
    values = trained.predict(
        {
            "spatial": np.array([[*boxes["cup"], *boxes["table"], 240, 240]], float),
            "visual": [(folder / "images" / "0.jpg", boxes["cup"], boxes["table"])],
            "names": [("cup", "table")],
        }
    )
    np.testing.assert_allclose(values["probability"], of_pairs["probability"], atol=1e-6)


def test_views_are_embedded(trained: Trained, run: RunFolder, folder: Path, tmp_path: Path) -> None:
    assert trained.views == ["spatial", "visual", "names"]
    write_coco(tmp_path / "boxes.json", folder)
    written = embed_file(
        trained, NewData(tmp_path / "boxes.json", images=folder / "images"), tmp_path / "v.npz"
    )
    with np.load(tmp_path / "v.npz") as arrays:
        assert written.rows == len(arrays["ids"]) == 6
        np.testing.assert_allclose(np.linalg.norm(arrays["names"], axis=1), 1, rtol=1e-5)
        assert arrays["visual"].shape == (6, 16)
    picture = np.asarray(Image.open(folder / "images" / "0.jpg"))
    value = {"photo": picture, "first": (10, 10, 50, 50), "second": (10, 60, 50, 100)}
    assert trained.embed([value], tower="visual").shape == (1, 16)
    with pytest.raises(NearfarError, match="box outside the photo"):
        trained.embed([(picture, (10, 10, 50, 50), (900, 60, 950, 100))], tower="visual")
    assert trained.check([("cup", "table"), "cup", ("cup", "")], "names") == [
        None,
        "not two names",
        "empty name",
    ]
    for view in ("spatial", "visual", "names"):
        assert load_tower(run.path / "towers" / view).options == trained.system.towers[view].options


@pytest.mark.slow
def test_an_exported_folder_predicts_the_same(
    trained: Trained, run: RunFolder, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    export_run(run.path, tmp_path / "model")
    assert (tmp_path / "model" / "towers" / "visual" / "network").is_dir(), "the frozen encoder comes along"
    write_coco(tmp_path / "boxes.json", folder)
    source = NewData(tmp_path / "boxes.json", images=folder / "images")
    assert nearfar.load(tmp_path / "model", "cpu").predict(source).columns == trained.predict(source).columns


@pytest.mark.slow
def test_runs_without_probe_or_towers(run: RunFolder, folder: Path, tmp_path: Path) -> None:
    """The probe is fitted anew from the run's data, and so are towers; where the data has changed, that is said."""
    old = tmp_path / "old"
    shutil.copytree(run.path, old)
    shutil.rmtree(old / "probe")
    pairs, said = own_pairs(run, "test")

    def relations(path: Path) -> dict[tuple[str, ...], str]:
        got = nearfar.load(path, "cpu").predict(NewData(folder / "annotations.json", images=folder))
        named = keys(got["image"], got["subject_box"], got["object_box"])
        return dict(zip(named, got["relation"], strict=True))

    expected = [said.relations[i] for i in said.classes()[FUSED]]
    predicted = relations(old)
    assert [predicted[pair] for pair in pairs] == expected
    shutil.rmtree(old / "towers")
    predicted = relations(old)
    assert [predicted[pair] for pair in pairs] == expected
    moved = folder.with_name("elsewhere")
    folder.rename(moved)
    try:
        with pytest.raises(NearfarError, match=r"earlier version, which did not keep.*no such folder"):
            nearfar.load(old, "cpu")
    finally:
        moved.rename(folder)
    layout = json.loads((old / "dataset_layout.json").read_text())
    (old / "dataset_layout.json").write_text(json.dumps(layout | {"data_hash": "0" * 16}))
    with pytest.raises(NearfarError, match="has changed since"):
        nearfar.load(old, "cpu")


def test_bad_input(trained: Trained, folder: Path, tmp_path: Path) -> None:
    def fails(content: Any, message: str, name: str = "a.json", images: Path | None = None) -> None:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(NearfarError, match=message):
            trained.predict(NewData(tmp_path / name, images=images or folder / "images"))

    coco = write_coco(tmp_path / "boxes.json", folder)
    fails("{", "not valid JSON")
    fails({"a": 1}, "neither a COCO file")
    fails(coco | {"images": []}, "lists no pictures")
    fails(coco | {"annotations": []}, "has pictures and no boxes")
    fails(coco | {"annotations": coco["annotations"][:1]}, "no picture in it has two boxes")
    fails("image,left\n0.jpg,3\n", "no column 'name', and this run reads the names", "b.csv")
    fails("name,left\ncup,3\n", "no column with the names of pictures", "c.csv")
    (tmp_path / "empty").mkdir()
    fails(coco, "none of its first 3 pictures was found.*--images FOLDER", images=tmp_path / "empty")
    low = [{"file_name": "0.jpg", "image_id": 1, "category": "cup", "bbox": [1, 1, 20, 20], "score": 0.1}]
    fails(low, r"there is no pair: .*score below 0\.5.*--set min_score", "low.json")
    with pytest.raises(NearfarError, match="Boxes are needed, not pictures alone"):
        trained.predict(folder)
    with pytest.raises(NearfarError, match="read without an option 'min_scor': did you mean 'min_score'"):
        trained.predict(NewData(tmp_path / "boxes.json", options={"min_scor": "1"}))
    broken = tmp_path / "broken"
    shutil.copytree(folder / "images", broken)
    (broken / "0.jpg").write_bytes(b"nothing")
    (tmp_path / "d.json").write_text(json.dumps(coco))
    predictions = trained.predict(NewData(tmp_path / "d.json", images=broken))
    assert predictions.rejections.counts["damaged photo"] == 1
    assert predictions["photo"] == [False] * 6, "pairs of such a picture are predicted from their boxes"
