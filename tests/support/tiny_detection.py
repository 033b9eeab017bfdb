"""Small pictures with one bright rectangle each, in COCO format: enough to train a detector on in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nearfar.metrics.detection import Boxes, detection_evidence

#: two groups, as `evidence` has them
GROUPS = ("faint", "clear")


def write(folder: Path, split: str, n: int, seed: int = 0) -> None:
    """Pictures of 64 × 48 pixels with one bright rectangle each, of two groups in turn."""
    rng = np.random.default_rng([seed, n])
    (folder / "images").mkdir(exist_ok=True, parents=True)
    images, annotations = [], []
    for i in range(1, n + 1):
        pixels = rng.integers(90, 120, (48, 64, 3)).astype(np.uint8)
        w, h = rng.integers(14, 30, 2)
        x, y = rng.integers(0, 64 - w), rng.integers(0, 48 - h)
        pixels[y : y + h, x : x + w] = [230, 40, 40]
        name = f"{split}{i}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": i, "file_name": name, "width": 64, "height": 48, "sex": "fm"[i % 2]})
        box = [int(v) for v in (x, y, w, h)]
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    (folder / f"{split}.json").write_text(json.dumps(content))


def detections(n: int, quality: np.ndarray, seed: int = 0) -> tuple[Boxes, Boxes]:
    """One true box a picture, groups in turn; a found one that is off the more, the lower its quality."""
    rng = np.random.default_rng(seed)
    true = np.tile([10.0, 10.0, 50.0, 50.0], (n, 1))
    shift = 20 * (1 - quality)[:, None] * rng.uniform(0.3, 1, (n, 1))
    zero, each = np.zeros(n, int), np.arange(n)
    predicted = Boxes(true + shift, zero, each, scores=rng.uniform(size=n))
    return predicted, Boxes(true, zero, each, group=each % 2)


def evidence(n: int, faint: float, clear: float) -> Any:
    predicted, true = detections(n, np.where(np.arange(n) % 2 == 0, faint, clear))
    return detection_evidence(predicted, true, n, GROUPS)
