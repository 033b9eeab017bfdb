"""A few dozen pairs with photos in each layout, made by rule: enough to train on in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

PREDICATES = ["on", "wear", "above", "beneath", "next to", "under", "on the left of"]
OBJECTS = ["cup", "table", "lamp", "dog"]


def rows(n: int = 40, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """VRD annotations: three relations a picture, placed so that boxes tell them apart."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[dict[str, Any]]] = {}
    for picture in range(n):
        relations = []
        for predicate in rng.permutation([0, 0, 2, 3, 4, 5])[:3].tolist():
            x, y, w, h = (int(v) for v in rng.integers([80, 90, 30, 30], [110, 110, 50, 50]))
            far = {0: (0, -h), 2: (0, -h - 35), 3: (0, h + 35), 4: (w + 5, 0), 5: (0, h // 2)}[predicate]
            x2, y2 = x + far[0] + int(rng.integers(-4, 5)), max(y + far[1], 0)
            relations.append(
                {
                    "predicate": predicate,
                    "subject": {"category": int(rng.integers(4)), "bbox": [y2, y2 + h, x2, x2 + w]},
                    "object": {"category": int(rng.integers(4)), "bbox": [y, y + h, x, x + w]},
                }
            )
        found[f"{picture}.jpg"] = relations
    return found


def write_photo(path: Path, seed: int, size: tuple[int, int] = (240, 240)) -> None:
    """Coloured noise in large patches."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (size[0] // 20, size[1] // 20, 3), dtype=np.uint8)
    Image.fromarray(patches.repeat(20, 0).repeat(20, 1)).save(path)


def write_vrd(folder: Path, n: int = 40, photos: int | None = None) -> Path:
    """A VRD folder; photos of the first ``photos`` pictures (all by default)."""
    (folder / "images").mkdir(parents=True)
    (folder / "annotations.json").write_text(json.dumps(rows(n)))
    (folder / "predicates.json").write_text(json.dumps(PREDICATES))
    (folder / "objects.json").write_text(json.dumps(OBJECTS))
    for i in range(n if photos is None else photos):
        write_photo(folder / "images" / f"{i}.jpg", i)
    return folder
