"""A tiny finished run of every system, trained in seconds, and values that each of its views reads.

Equal runs are trained once for a whole session of tests, whichever file and process asks first: each asks for a copy.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console

import tiny_aspects
import tiny_molecules
import tiny_relations
from nearfar.config.compose import compose_config
from nearfar.launch import run_one

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
COMMON = [
    "epochs=1",
    "bootstrap=100",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "report=false",
    "trainer.probe_rows=16",
]
SMALL = {
    "aspects": [
        *("gamma=2", "contrastive=jaccard", "batch_size=32", "projection_dim=8", "text_encoder.dims=16"),
        *("text_encoder.hidden=16", "text_encoder.vectors=false"),
    ],
    "augmented": [
        *(
            "batch_size=64",
            "embedding_dim=8",
            "hidden=16",
            "image_encoder=small",
            "image_encoder.features=32",
        ),
        "data.limit=128",
    ],
    "detector": [
        *("batch_size=8", "width=16", "heads=2", "layers=1", "queries=5", "frozen_epochs=0"),
        *("data.image_size=64", "image_encoder=small"),
    ],
    "fair_detection": [
        *("data.scenes.train=28", "data.scenes.val=16", "data.scenes.test=20", "data.scenes.image_size=32"),
        *("data.scenes.faint_share=0.4", "generator.channels=8", "generator.levels=2", "head_hidden=8"),
        *("head_dim=4", "pictures=2", "detector_training.scenes.epochs=1"),
        *("detector_training.scenes.batch_size=8", "detector_training.scenes.queries=4"),
        *("detector_training.scenes.width=16", "detector_training.scenes.heads=2"),
        *("detector_training.scenes.layers=1", "detector_training.scenes.image_encoder.features=16"),
        "detector_training.scenes.check_evaluator=false",
    ],
    "labels": [
        *(
            "batch_size=64",
            "embedding_dim=8",
            "hidden=16",
            "image_encoder=small",
            "image_encoder.features=32",
        ),
        "data.limit=128",
    ],
    "molecules": [
        *("batch_size=16", "hidden=16", "layers=2", "heads=2", "embedding_dim=16", "fingerprint_hidden=32"),
        *("fingerprint_bits=128", "hardness_k=20", "text_encoder.dims=32"),
    ],
    "pairs": [
        *("text_encoder.dims=16", "text_encoder.min_df=1", "text_encoder.max_df=1.0", "embedding_dim=8"),
        *("batch_size=16", "views=[title,price]"),
    ],
    "relations": [
        *("data=vrd", "image_encoder=small", "image_encoder.features=32", "crop_size=32", "batch_size=8"),
        *("visual_hidden=32", "embedding_dim=16"),
    ],
    "tissue": [
        *("data.slides=4", "data.side=8", "data.generated_genes=40", "batch_size=32", "hidden=16"),
        *("embedding_dim=8", "retrieve=10", "variable_genes=20", "expressed_genes=5"),
        *("image_encoder=small", "image_encoder.features=16"),
    ],
}
EXPERIMENTS = {"tissue": "medium_normal"}
NOUNS = ["river", "stone", "cloud", "forest", "harbour", "candle", "ladder", "mirror", "needle", "orchard"]
PLACES = ["near the hill", "far from the town", "under the bridge", "above the sea", "behind the mill"]
#: options that belong to an encoder of a different kind
_ENCODERS = ("text_encoder", "image_encoder")


def train(system: str, folder: Path, *more: str, name: str = "run") -> Path:
    """The folder of a finished run of a system, below ``folder``; its data lie elsewhere and are not to be changed.

    ``more`` may name files below ``folder``: then the run is trained there, and for this test alone.
    """
    place = folder / "runs" / name
    if any(str(folder) in text for text in more):
        return _trained(system, folder, place, more)
    key = hashlib.sha256(json.dumps([system, name, *more]).encode()).hexdigest()[:16]
    shared = Path(os.environ["NEARFAR_TEST_SESSION"]) / key
    with FileLock(f"{shared}.lock"):
        if not (shared / "finished").exists():
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir(parents=True)
            _trained(system, shared, shared / "runs" / name, more)
            (shared / "finished").touch()
    shutil.rmtree(place, ignore_errors=True)  # a second run of the same name takes the place of the first
    shutil.copytree(shared / "runs" / name, place)
    return place


def _trained(system: str, folder: Path, place: Path, more: Sequence[str]) -> Path:
    chosen = {text.split("=")[0] for text in more}
    small = [
        text
        for text in SMALL[system]
        if not any(encoder in chosen and text.startswith(encoder) for encoder in _ENCODERS)
    ]
    every = [
        f"experiment={EXPERIMENTS.get(system, system)}",
        *COMMON,
        *small,
        *data(system, folder),
        f"runs_dir={place.parent}",
        f"name={place.name}",
        *more,
    ]
    if system == "fair_detection":
        every = [text for text in every if not text.startswith("trainer.accelerator")] + ["device=cpu"]
    every = list({text.split("=")[0]: text for text in every}.values())
    run = run_one(compose_config(every), every, False, QUIET)
    assert run is not None
    assert Path(run.path) == place
    return place


def data(system: str, folder: Path) -> list[str]:
    """Overrides that name data of a system, written below ``folder`` once."""
    place = folder / f"data of {system}"
    fresh = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    match system:
        case "aspects":
            return [f"data.dir={tiny_aspects.split_folder(place, 120)}"]
        case "molecules":
            return tiny_molecules.split_files(place)
        case "relations":
            return [f"data.dir={tiny_relations.write_vrd(place / 'vrd', 16) if fresh else place / 'vrd'}"]
        case "pairs":
            return [f"data.train={write_titles(place / 'train.csv')}"]
        case "detector":
            for split, count in (("train", 24), ("val", 8), ("test", 8)):
                write_boxes(place, split, count)
            return [f"data.dir={place}"]
        case _:
            return []


def write_titles(path: Path) -> Path:
    """Fifty titles with texts and prices."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["title", "text", "price"])
        for i, noun in enumerate(NOUNS):
            for j, place in enumerate(PLACES):
                writer.writerow([f"{noun} {place}", f"it tells of a {noun} that lies {place}", 10 * i + j])
    return path


def write_boxes(folder: Path, split: str, count: int) -> None:
    """Pictures of 64 × 48 pixels with one bright rectangle each, and a COCO file."""
    from PIL import Image

    rng = np.random.default_rng([count, len(split)])
    (folder / "images").mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(1, count + 1):
        pixels = rng.integers(90, 120, (48, 64, 3)).astype(np.uint8)
        w, h = (int(v) for v in rng.integers(14, 30, 2))
        x, y = int(rng.integers(0, 64 - w)), int(rng.integers(0, 48 - h))
        pixels[y : y + h, x : x + w] = [230, 40, 40]
        Image.fromarray(pixels).save(folder / "images" / f"{split}{i}.png")
        images.append({"id": i, "file_name": f"{split}{i}.png", "width": 64, "height": 48})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [x, y, w, h]})
    categories = [{"id": 1, "name": "person"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{split}.json").write_text(json.dumps(content))


def values_of(tower: Any, folder: Path, count: int = 7) -> Sequence[Any] | np.ndarray:
    """Values that a tower reads, made by rule for its kind; photos are written to ``folder``."""
    rng = np.random.default_rng(3)
    match tower.kind:
        case "text":
            return [f"the {NOUNS[i % 10]} lies {PLACES[i % 5]}" for i in range(count)]
        case "names":
            return [(NOUNS[i % 10], NOUNS[(i + 1) % 10]) for i in range(count)]
        case "molecule":
            return [pair[0] for pair in tiny_molecules.pairs()[:count]]
        case "image":
            return rng.integers(0, 256, (count, 40, 40, 3), dtype=np.uint8)
        case "boxes" | "crops":
            corners = rng.integers(0, 60, (count, 2, 2)).astype(float)
            boxes = np.concatenate([corners, corners + 40], axis=2)
            if tower.kind == "boxes":
                return np.concatenate([boxes.reshape(count, 8), np.full((count, 2), 120.0)], axis=1)
            tiny_relations.write_photo(folder / "photo.png", 5, (120, 120))
            return [(str(folder / "photo.png"), first, second) for first, second in boxes.tolist()]
        case _:
            width = int(tower.build().width)
            return rng.normal(size=(count, width)).astype(np.float32)


def tiny_bert(folder: Path, layers: int = 2) -> Path:
    """A BERT of a few layers with random weights and a tokenizer over letters, as a folder that transformers reads."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=160,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return folder
