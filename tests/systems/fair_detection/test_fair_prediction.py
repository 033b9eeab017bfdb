"""Boxes of new photos by a fair-detection run: AP of the written results is that of the run; the detector is kept."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import nearfar
from nearfar.config.compose import compose_config, read_config
from nearfar.data.cache import cache_dir
from nearfar.data.chunks import NewData
from nearfar.data.coco import read_coco
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.metrics.detection import Boxes, detection_evidence, true_boxes
from nearfar.serving.export import export_run
from nearfar.serving.stream import predict_file
from nearfar.systems.detector.data import folder_of_scenes
from nearfar.training.run_folder import RunFolder

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
TRAINED = "detector_training.scenes"
SMALL = [
    "experiment=fair_detection",
    "data.scenes.train=28",
    "data.scenes.val=16",
    "data.scenes.test=20",
    "data.scenes.image_size=32",
    "data.scenes.faint_share=0.4",
    f"{TRAINED}.epochs=1",
    f"{TRAINED}.batch_size=8",
    f"{TRAINED}.queries=4",
    f"{TRAINED}.width=16",
    f"{TRAINED}.heads=2",
    f"{TRAINED}.layers=1",
    f"{TRAINED}.image_encoder.features=16",
    f"{TRAINED}.check_evaluator=false",
    "epochs=2",
    "generator.channels=8",
    "generator.levels=2",
    "head_hidden=8",
    "head_dim=4",
    "lr_g=0.003",
    "bootstrap=100",
    "pictures=2",
    "device=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
]

pytest.importorskip("safetensors")
pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    every = [*SMALL, f"runs_dir={tmp_path_factory.mktemp('runs')}", "name=run"]
    return run_one(compose_config(every), every, False, QUIET)


def test_file(run: RunFolder) -> Path:
    """The COCO file of the run's test pictures."""
    config = read_config(run.config(), saved=True)
    return folder_of_scenes(config.used_data) / "test.json"  # type: ignore[attr-defined]


test_file.__test__ = False  # type: ignore[attr-defined]


def scored(results: Path, coco: Path, groups: tuple[str, str]) -> dict[str, float]:
    split = read_coco(coco, group_key="visibility", groups=groups)
    rows = json.loads(results.read_text())
    place = {row["id"]: split.ids.index(row["file_name"]) for row in json.loads(coco.read_text())["images"]}
    boxes = np.array([row["bbox"] for row in rows])
    boxes[:, 2:] += boxes[:, :2]
    predicted = Boxes(
        boxes,
        np.zeros(len(rows), int),
        np.array([place[row["image_id"]] for row in rows]),
        scores=np.array([row["score"] for row in rows]),
    )
    evidence = detection_evidence(predicted, true_boxes(split), len(split), groups)
    return {name: float(value[0]) for name, value in evidence.statistics().items()}


def test_written_results_score_what_the_run_scored(run: RunFolder, tmp_path: Path) -> None:
    trained = nearfar.load(run.path, device="cpu")
    layout = run.read_json("dataset_layout.json")
    groups = (layout["lower_group"], layout["upper_group"])
    predict_file(trained, NewData(test_file(run)), tmp_path / "out.json")
    got = scored(tmp_path / "out.json", test_file(run), groups)
    said = run.read_json("metrics.json")["splits"]["test"]
    compared = [name for name in said if name in got]
    assert {"AP", "AR", f"AP/{groups[0]}", "AP/gap"} <= set(compared)
    for name in compared:
        assert got[name] == pytest.approx(said[name]["value"], abs=1e-9), name
    rows = json.loads((tmp_path / "out.json").read_text())
    assert {row["category"] for row in rows} == {"person"}
    written = predict_file(trained, NewData(test_file(run).parent, rows=7), tmp_path / "out.csv")
    assert written.rows == 4 * (28 + 16 + 20)
    with pytest.raises(NearfarError, match="embeds nothing"):
        trained.embed([1])


def test_the_detector_is_kept_with_the_run(run: RunFolder, tmp_path: Path) -> None:
    """Predictions need neither the data nor the cache; a run of before the detector was kept needs both."""
    photos = tmp_path / "photos"
    shutil.copytree(test_file(run).parent, photos)
    expected = nearfar.load(run.path, "cpu").predict(photos)["score"]
    export_run(run.path, tmp_path / "model")
    assert nearfar.load(tmp_path / "model", "cpu").predict(photos)["score"] == expected
    old = tmp_path / "old"
    shutil.copytree(run.path, old)
    shutil.rmtree(old / "detector")
    (old / "fair_detection.json").unlink()
    assert nearfar.load(old, "cpu").predict(photos)["score"] == expected
    cache, away = cache_dir(), tmp_path / "away"
    shutil.move(cache, away)
    try:
        assert nearfar.load(run.path, "cpu").predict(photos)["score"] == expected
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        shutil.move(away, cache)
    layout = json.loads((old / "dataset_layout.json").read_text())
    (old / "dataset_layout.json").write_text(json.dumps(layout | {"data_hash": "0" * 16}))
    with pytest.raises(NearfarError, match=r"did not keep the detector.*has changed since"):
        nearfar.load(old, "cpu")
    arrays = dict(np.load(run.path / "detector" / "weights.npz"))
    arrays["size"] = arrays["size"] + 1
    np.savez(tmp_path / "weights.npz", **arrays)
    shutil.copytree(run.path, tmp_path / "other")
    shutil.copy(tmp_path / "weights.npz", tmp_path / "other" / "detector" / "weights.npz")
    with pytest.raises(NearfarError, match="has other weights than those"):
        nearfar.load(tmp_path / "other", "cpu")
