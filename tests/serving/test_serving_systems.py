"""Every system behind the server: what it says it can do, it does, and predictions are those of the model itself."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from served import serving
from tiny_runs import train

pytest.importorskip("fastapi", reason="needs the extra serve")

from nearfar.serving.fill import own_source
from nearfar.serving.gallery import Gallery
from nearfar.serving.server import build_app
from nearfar.serving.trained import load

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("module_cache")]
REVIEWS = ["the battery lasts and the camera is poor", "a fine screen", "nothing to say"]


def encoded(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def close(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, (int, float)):
        return abs(first - second) < 1e-4
    if isinstance(first, list):
        return len(first) == len(second) and all(map(close, first, second))
    return bool(first == second)


def test_aspects(tmp_path: Path) -> None:
    trained = load(train("aspects", tmp_path), device="cpu")
    with serving(build_app(trained, Gallery.open(trained, own_source(trained)))) as ask:
        assert ask("/describe")[1]["predicts"] == {"text": "text"}
        status, answer, _ = ask("/predict", {"values": [*REVIEWS, ""]})
        assert (status, answer["rows"][3], answer["problems"][0]["where"]) == (200, None, "values.3")
        for row, expected in zip(answer["rows"][:3], trained.predict(REVIEWS), strict=True):
            assert all(close(value, row[name]) for name, value in expected.items() if name != "id")
        status, answer, _ = ask("/search", {"query": REVIEWS[0], "k": 3})
        assert (status, len(answer["hits"])) == (200, 3)
        assert answer["hits"][0]["shown"]["text"]["text"]
        for wrong in (
            {"columns": {"review": ["a"]}},
            {"columns": {"text": []}},
            {},
            {"values": ["a"], "columns": {"text": ["a"]}},
        ):
            assert ask("/predict", wrong)[0] == 422


def test_labels(tmp_path: Path) -> None:
    trained = load(train("labels", tmp_path), device="cpu")
    pictures = [np.random.default_rng(i).integers(0, 256, (28, 28, 3), dtype=np.uint8) for i in range(3)]
    with serving(build_app(trained, Gallery.open(trained, own_source(trained)))) as ask:
        (view,) = ask("/describe")[1]["predicts"]
        status, answer, _ = ask(
            "/predict", {"columns": {view: [{"image": encoded(each)} for each in pictures]}}
        )
        assert status == 200
        for row, expected in zip(answer["rows"], trained.predict(pictures), strict=True):
            assert row["knn"] == expected["knn"]
            assert close(expected["knn/share"], row["knn/share"])
        _, page, _ = ask("/gallery?count=1")
        assert ask("/" + page["items"][0]["shown"][view]["url"])[2]["content-type"] == "image/png"
        assert ask("/search", {"item": 0, "tower": view, "k": 1})[1]["hits"][0]["position"] == 0


def test_relations(tmp_path: Path) -> None:
    trained = load(train("relations", tmp_path, "categories=true"), device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    pair = {
        "image": encoded(pixels),
        "first": [10, 10, 60, 50],
        "second": [50, 40, 110, 80],
        "names": ["cup", "table"],
    }
    with serving(build_app(trained, Gallery.open(trained, own_source(trained)))) as ask:
        about = ask("/describe")[1]
        assert (about["predicts"], about["named_pairs"]) == ({"pair": "pair"}, True)
        status, answer, _ = ask("/predict", {"values": [pair]})
        assert status == 200
        kinds = {trained.kind(view): view for view in trained.views}
        columns = {
            kinds["crops"]: [(pixels, (10, 10, 60, 50), (50, 40, 110, 80))],
            kinds["boxes"]: [[10, 10, 60, 50, 50, 40, 110, 80, 120, 90]],
            kinds["names"]: [("cup", "table")],
        }
        (expected,) = trained.predict(columns)
        assert answer["rows"][0]["relation"] == expected["relation"]
        assert close(expected["probability"], answer["rows"][0]["probability"])
        for wrong, reason in (
            ({**pair, "names": None}, "names of both objects"),
            ({**pair, "first": [60, 10, 10, 50]}, "without area"),
            ({**pair, "first": [1, 2, 3]}, "at least 4"),
            ({**pair, "first": ["/etc/passwd", 2, 3, 4]}, "number"),
            ({**pair, "image": "/etc/passwd"}, "base64"),
            ({"photo": "/etc/passwd", "first": [0, 0, 1, 1], "second": [0, 0, 1, 1]}, "Extra inputs"),
        ):
            status, answer, _ = ask("/predict", {"values": [wrong]})
            assert status == 422, reason
            assert reason in str(answer)
        status, answer, _ = ask(
            "/search", {"item": 0, "tower": kinds["crops"], "target": kinds["crops"], "k": 2}
        )
        shown = answer["hits"][0]["shown"][kinds["crops"]]
        assert len(shown["boxes"]) == 2
        assert ask("/" + shown["url"])[2]["content-type"] == "image/png"


def test_tissue(tmp_path: Path) -> None:
    trained = load(train("tissue", tmp_path), device="cpu")
    with serving(build_app(trained, Gallery.open(trained, own_source(trained)))) as ask:
        about = ask("/describe")[1]
        assert about["predicts"] == {"image": "picture"}
        assert len(about["slides"]) == 4
        slide = ask(f"/gallery/slide?name={about['slides'][0]}")[1]
        assert len(slide["positions"]) == len(slide["x"]) > 30
        _, page, _ = ask(f"/gallery?start={slide['positions'][5]}&count=1")
        (item,) = page["items"]
        assert (item["spot"]["slide"], item["spot"]["x"]) == (about["slides"][0], slide["x"][5])
        assert "most expressed" in item["shown"]["gene"]["text"]
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        status, answer, _ = ask("/predict", {"values": [{"image": encoded(pixels)}]})
        assert status == 200
        (expected,) = trained.predict({"image": [pixels]})
        assert all(close(value, answer["rows"][0][name]) for name, value in expected.items() if name != "id")
        status, answer, _ = ask("/search", {"item": 5, "tower": "image", "target": "gene", "k": 4})
        assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("system", ["detector", "fair_detection"])
def test_detectors(tmp_path: Path, system: str) -> None:
    trained = load(train(system, tmp_path), device="cpu")
    pictures = [np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8) for i in range(3)]
    with serving(build_app(trained)) as ask:
        about = ask("/describe")[1]
        assert (about["views"], about["searches"], about["predicts"]) == ({}, [], {"image": "picture"})
        status, answer, _ = ask("/predict", {"values": [{"image": encoded(each)} for each in pictures]})
        assert (status, len(answer["rows"])) == (200, 3)
        expected = list(trained.predict(pictures))
        assert sum(len(row["boxes"]) for row in answer["rows"]) == len(expected)
        boxes = [box for row in answer["rows"] for box in row["boxes"]]
        for box, row in zip(boxes, expected, strict=True):
            assert close(row["score"], box["score"])
            assert close(
                [row["left"], row["top"], row["left"] + row["width"], row["top"] + row["height"]], box["box"]
            )
        assert ask("/predict", {"values": ["/etc/passwd"]})[0] == 422
        for path in ("/embed", "/search"):
            body: dict[str, Any] = {"values": ["a"]} if path == "/embed" else {"query": "a"}
            status, answer, _ = ask(path, body)
            assert (status, "embeds nothing" in answer["error"]) == (422, True)


@pytest.mark.parametrize("system", ["molecules", "pairs", "augmented"])
def test_what_embeds_and_searches_only(tmp_path: Path, system: str) -> None:
    trained = load(train(system, tmp_path), device="cpu")
    with serving(build_app(trained, Gallery.open(trained, own_source(trained)))) as ask:
        about = ask("/describe")[1]
        for view, target in about["searches"]:
            status, answer, _ = ask("/search", {"item": 1, "tower": view, "target": target, "k": 2})
            assert (status, len(answer["hits"])) == (200, 2)
            for shown in answer["hits"][0]["shown"].values():
                if shown["url"]:
                    assert ask("/" + shown["url"])[2]["content-type"] in ("image/png", "image/svg+xml")
        if system == "molecules":
            status, answer, _ = ask("/search", {"query": "CCO", "tower": "molecule", "k": 1})
            assert status == 200
            status, answer, _ = ask("/search", {"query": "no molecule", "tower": "molecule", "k": 1})
            assert (status, "unparsable" in answer["error"]) == (422, True)
