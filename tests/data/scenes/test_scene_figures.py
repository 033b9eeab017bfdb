"""Generated scenes: what tells the groups apart, and the COCO files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfar.config.compose import compose_config
from nearfar.data.scenes.figures import make_scene
from nearfar.systems import check_config
from nearfar.systems.detector.data import folder_of_scenes


def config(*overrides: str) -> Any:
    return check_config(compose_config(["experiment=fair_detection", *overrides]))


# -- scenes --------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_only_the_contrast_tells_the_groups_apart() -> None:
    clear, faint = (make_scene(np.random.default_rng(7), 64, 0.3, left) for left in (1.0, 0.35))
    assert clear[1] == faint[1], "the same figure in the same place"
    spread = [float(np.std(picture, (0, 1)).mean()) for picture in (clear[0], faint[0])]
    assert spread[1] / spread[0] == pytest.approx(0.35, abs=0.02)
    excess = {}
    for haze in (1.0, 0.35):
        contrasts = []
        for seed in range(20):
            picture, (left, top, width, height) = make_scene(np.random.default_rng(seed), 64, 0.3, haze)
            # The trunk: the middle of the box a third from its top.
            row, column = int(top + 0.35 * height), int(left + 0.5 * width)
            inside = picture[row - 1 : row + 2, column - 1 : column + 2].mean((0, 1)) / 255
            contrasts.append(np.abs(inside - np.median(picture, (0, 1)) / 255).mean())
        excess[haze] = np.median(contrasts)
    assert 0.2 < excess[1.0] < 0.4
    assert excess[0.35] / excess[1.0] == pytest.approx(0.35, abs=0.05)


@pytest.mark.slow
def test_scenes_are_coco_files_and_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path))
    data = config("data.scenes.train=20", "data.scenes.val=8", "data.scenes.test=10").data.scenes
    data.image_size = 32
    folder = folder_of_scenes(data)
    train = json.loads((folder / "train.json").read_text())
    assert sum(image["visibility"] == "faint" for image in train["images"]) == 5
    test = json.loads((folder / "test.json").read_text())
    assert sum(image["visibility"] == "faint" for image in test["images"]) == 5
    assert all((folder / "images" / image["file_name"]).is_file() for image in test["images"])
    before = (folder / "test.json").stat().st_mtime_ns
    assert folder_of_scenes(data) == folder
    assert (folder / "test.json").stat().st_mtime_ns == before
    data.contrast = 0.5
    assert folder_of_scenes(data) != folder
    assert {path.name[0] for path in folder.parent.iterdir()} & {"."} == set(), "nothing half-drawn is left"
