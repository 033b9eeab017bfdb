"""Classes of new items by a model that no label has taught: as the run judged them, and without any labels."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import nearfar
from nearfar.config.compose import compose_config
from nearfar.data.embedded import digit_items
from nearfar.data.items import hold_out
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.training.run_folder import RunFolder

pytest.importorskip("sklearn")
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "epochs=1",
    "batch_size=64",
    "embedding_dim=8",
    "hidden=16",
    "bootstrap=100",
    "data.limit=128",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
]

pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


def run(tmp_path: Path, *more: str) -> RunFolder:
    every = ["experiment=augmented", *SMALL, f"runs_dir={tmp_path / 'runs'}", "name=run", *more]
    every = list({text.split("=")[0]: text for text in every}.values())
    return run_one(compose_config(every), every, False, QUIET)


@pytest.mark.parametrize(
    "more",
    [
        ["loss=simclr", "image_encoder=small", "image_encoder.features=32"],
        ["loss=moco", "loss.queue=128", "image_encoder=small", "image_encoder.features=32"],
        ["image_encoder=colors", "judged=embedding"],  # no pixels: two passes under dropout
    ],
)
def test_predictions_are_what_the_evaluation_counted(more: list[str], tmp_path: Path) -> None:
    place = run(tmp_path, *more)
    test = hold_out(digit_items(), {"val": 0.1, "test": 0.2}, 0)["test"]
    trained = nearfar.load(place.path, device="cpu")
    state = torch.get_rng_state()
    predictions = trained.predict(test)
    assert torch.equal(torch.get_rng_state(), state)  # new items are not seen twice under dropout
    per_item, metrics = (
        np.load(place.path / "per_item.npz"),
        place.read_json("metrics.json")["splits"]["test"],
    )
    assert per_item["test/ids"].tolist() == predictions.ids
    labels = [str(label) for label in test["label"]]
    for name in ("knn", "probe"):
        right = np.array([a == b for a, b in zip(predictions[name], labels, strict=True)])
        np.testing.assert_array_equal(right, per_item[f"test/{name}/accuracy"])
        assert right.mean() == metrics[f"{name}/accuracy"]["value"]
    assert trained.dim == trained.embed(test["image"][:2]).shape[1]
    assert (trained.dim == 8) == ("judged=embedding" in more)


def test_without_labels_there_are_no_classes_until_a_gallery_has_some(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = {"space": ["star", "rocket", "moon"], "sea": ["boat", "wave", "fish"]}
    rows = []
    for i in range(80):
        topic = sorted(words)[i % 2]
        rows.append({"id": f"t{i}", "text": " ".join(random.choice(words[topic], 6)), "topic": topic})
    table = tmp_path / "texts.jsonl"
    table.write_text("".join(json.dumps({"id": row["id"], "text": row["text"]}) + "\n" for row in rows))
    place = run(
        tmp_path, f"data.train={table}", "text_encoder=ngram", "text_encoder.dims=8", "text_encoder.min_df=1",
        "batch_size=16", "data.limit=null",
    )  # fmt: skip
    assert not (place.path / "class_rows.npz").exists()
    trained = nearfar.load(place.path, device="cpu")
    with pytest.raises(NearfarError, match=r"no classes.*no column of labels.*label=NAME.*--gallery FILE"):
        trained.predict(["star and moon"])
    gallery = tmp_path / "gallery.jsonl"
    gallery.write_text("".join(json.dumps({**row, "label": row["topic"]}) + "\n" for row in rows[:40]))
    predictions = trained.predict(["star star moon rocket", "fish wave boat boat"], gallery=gallery)
    assert predictions["knn"] == predictions["probe"] == ["space", "sea"]
    assert {name for near in predictions["knn/nearest"] for name in near} <= {row["id"] for row in rows[:40]}
