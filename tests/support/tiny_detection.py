"""Small pictures with one bright rectangle each, in COCO format: enough to train a detector on in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


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
