"""One view and labels, end to end on small tables and folders: losses, unseen classes, baselines, wrong data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from nearfar.config.compose import compose_config, read_config
from nearfar.errors import NearfarError
from nearfar.lab.report import write_report
from nearfar.launch import run_one
from nearfar.metrics import map_at_r, retrieval_metrics
from nearfar.models.probes import LinearProbe, nearest_classes
from nearfar.systems import build_system
from nearfar.training.run_folder import RunFolder

pytest.importorskip("sklearn")
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "epochs=2",
    "batch_size=16",
    "embedding_dim=8",
    "bootstrap=100",
    "lr=0.01",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
]

pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    return path


def numbers(count: int = 200, classes: int = 5, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of six numbers about the centre of their class, and two that say nothing and are large."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(classes, 6))
    rows = []
    for i in range(count):
        label = i % classes
        x = [*(centres[label] + 0.5 * random.normal(size=6)), *(3 * random.normal(size=2))]
        rows.append({"id": f"{seed}-{i}", "x": [round(float(v), 4) for v in x], "label": f"c{label}"})
    return rows


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "numbers.jsonl", numbers())


def overrides(*more: str) -> list[str]:
    every = ["experiment=labels", *SMALL, *more]
    return list({text.split("=")[0]: text for text in every}.values())


def run(tmp_path: Path, *more: str) -> RunFolder:
    every = overrides(f"runs_dir={tmp_path / 'runs'}", "name=run", *more)
    return run_one(compose_config(every), every, False, QUIET)


def prepared(*more: str) -> Any:
    system = build_system(compose_config(overrides(*more)))
    system.prepare(lambda line: None)
    return system


@pytest.mark.parametrize("loss", ["supcon", "multilabel", "cross_entropy"])
def test_every_loss_learns_and_stands_beside_its_baselines(loss: str, table: Path, tmp_path: Path) -> None:
    more = ["epochs=20", "data.test_fraction=0.3", "trainer.evaluate_start=true"]
    folder = run(tmp_path, f"data.train={table}", f"loss={loss}", *more)
    metrics = folder.read_json("metrics.json")
    test = metrics["splits"]["test"]
    names = ["R@1", "MAP@R"] + (["knn/accuracy", "probe/accuracy"] if loss != "multilabel" else [])
    for name in names:
        for stem in ("", "numbers/"):
            estimate = test[f"{stem}{name}"]
            assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
            assert estimate["control"] is bool(stem)
        assert metrics["baselines"]["test"][name]["value"] == test[f"numbers/{name}"]["value"]
        start = metrics["before_training"]["test"][name]["value"]
        raw = test[f"numbers/{name}"]["value"]
        for difference, other in (
            (metrics["comparison"][f"{name} against numbers"], raw),
            (metrics["gain"]["test"][name], start),
        ):
            assert difference["value"] == pytest.approx(test[name]["value"] - other, abs=1e-6)
    assert metrics["gain"]["test"]["MAP@R"]["low"] > 0
    assert ("probe/accuracy" in test) == (loss != "multilabel")
    layout = folder.read_json("dataset_layout.json")
    assert (
        layout["classes"] == {"classes": 5, "smallest": 25, "largest": 30}
        or layout["classes"]["classes"] == 5
    )
    if loss == "supcon":
        assert "Beside the baselines" in write_report(folder).read_text()


def test_scores_are_those_of_the_embeddings(table: Path) -> None:
    system = prepared(f"data.train={table}", "data.test_fraction=0.3")
    torch.manual_seed(0)
    model = system.build_model().eval()
    with torch.inference_mode():
        system.before_evaluation(model, "test", True)
        test = system.datasets["test"].__getitems__(range(len(system.datasets["test"])))
        outputs = system.embed(model, test)
    evaluation = system.evaluate(outputs, "test", True)
    rows = outputs["x"].clone()
    codes = {name: torch.from_numpy(system.classes.codes[name]) for name in ("train", "test")}
    with torch.no_grad():
        train_rows = system.datasets["train"].__getitems__(range(len(system.datasets["train"])))
        train = model.encode("x", train_rows["x"])
    expected = {
        "R@1": retrieval_metrics(rows, rows, (codes["test"], codes["test"]), (1,), leave_one_out=True)[
            "R@1"
        ].value,
        "MAP@R": map_at_r(rows, codes["test"]).value,
        "knn/accuracy": float((nearest_classes(train, codes["train"], rows) == codes["test"]).float().mean()),
        "probe/accuracy": float(
            (LinearProbe(train, codes["train"]).classes(rows) == codes["test"]).float().mean()
        ),
    }
    for name, value in expected.items():
        assert evaluation.estimates[name].value == pytest.approx(value)
        assert np.mean(evaluation.per_item[name]) == pytest.approx(value)
    labels = np.array([system.classes.names[i] for i in codes["test"]])
    common = np.bincount(codes["train"]).argmax()
    chance = (labels == system.classes.names[common]).mean()
    assert evaluation.estimates["knn/accuracy"].chance == pytest.approx(chance)


def test_classes_that_were_never_seen(table: Path, tmp_path: Path) -> None:
    system = prepared(f"data.train={table}", "unseen_classes=0.4")
    own = {name: set(items["label"]) for name, items in system.splits.items()}
    assert len(own["test"]) == 2
    assert not own["test"] & (own["train"] | own["val"])
    assert len(system.splits["test"]) == 80  # all of their items
    assert not system.votes("test")
    assert system.votes("val")
    test = run(tmp_path, f"data.train={table}", "unseen_classes=true").read_json("metrics.json")["splits"][
        "test"
    ]
    assert "R@1" in test
    assert "knn/accuracy" not in test
    apart = write_table(
        tmp_path / "test.jsonl", [row | {"label": "new" + row["label"]} for row in numbers(60, 3, 1)]
    )
    system = prepared(f"data.train={table}", f"data.test={apart}", "unseen_classes=true")
    assert set(system.splits["test"]["label"]) == {"newc0", "newc1", "newc2"}
    same = write_table(tmp_path / "same.jsonl", numbers(60, 3, 1))
    with pytest.raises(NearfarError, match="3 classes of test are in training or validation, too"):
        prepared(f"data.train={table}", f"data.test={same}", "unseen_classes=true")
    with pytest.raises(NearfarError, match="two are needed on either side"):
        prepared(f"data.train={table}", "unseen_classes=0.9")
    for value in ("2", "0", "some"):
        with pytest.raises(NearfarError, match="a share of the classes"):
            read_config(compose_config(overrides(f"unseen_classes={value}")))


def test_pictures_in_folders_by_class(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for i in range(48):
        colour = [(200, 40, 40), (40, 200, 40), (40, 40, 200)][i % 3]
        folder = tmp_path / "photos" / ["red", "green", "blue"][i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(np.array(colour) + random.normal(0, 30, (40, 36, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "photos" / "red" / "broken.png").write_bytes(b"no picture")
    folder = run(
        tmp_path, f"data.dir={tmp_path / 'photos'}", "image_encoder=small", "image_encoder.features=32",
        "tower.size=32", "sampler=balanced", "data.test_fraction=0.3", "epochs=3",
    )  # fmt: skip
    layout = folder.read_json("dataset_layout.json")
    rejected = {
        k: v for part in layout["splits"].values() for k, v in part["rejections"]["by_reason"].items()
    }
    assert any("no picture" in reason for reason in rejected)
    test = folder.read_json("metrics.json")["splits"]["test"]
    assert test["probe/accuracy"]["value"] > 0.9
    assert "pixels/knn/accuracy" in test
    assert "32 × 32 pixels" in str(layout["views"])


def test_texts_with_several_labels(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = {"war": ["tank", "army"], "love": ["kiss", "heart"], "space": ["star", "rocket"]}
    rows = []
    for i in range(120):
        genres = [genre for genre in words if random.random() < 0.5]
        text = " ".join(random.choice(words[g]) for g in genres for _ in range(3)) or "nothing at all"
        rows.append({"plot": f"{text} {i}", "genres": "; ".join(genres)})
    table = write_table(tmp_path / "films.jsonl", rows)
    more = [
        f"data.train={table}",
        "view=plot",
        "label=genres",
        "text_encoder.min_df=1",
        "data.test_fraction=0.3",
    ]
    system = prepared(*more, "loss=multilabel")
    missing = sum(row["genres"] == "" for row in rows)
    assert sum(len(items) for items in system.splits.values()) == 120 - missing
    counted = sum(len(items.rejections) for items in system.splits.values())
    assert counted == missing
    for loss in ("multilabel", "cross_entropy"):
        metrics = run(tmp_path / loss, *more, f"loss={loss}", "trainer.evaluate_start=true").read_json(
            "metrics.json"
        )
        test = metrics["splits"]["test"]
        assert {"R@1", "MAP@R", "tfidf/R@1"} <= set(test)
        assert "MAP@R" in metrics["gain"]["test"]
        assert "probe/accuracy" not in test
    with pytest.raises(NearfarError, match="one each is needed: take loss=multilabel"):
        prepared(*more)
    with pytest.raises(NearfarError, match="unseen_classes is for items with one label"):
        prepared(*more, "loss=multilabel", "unseen_classes=0.4")
    whole = prepared(*more, "data.separator=null")  # every set of genres is a class of its own
    assert any(";" in name for name in whole.classes.names)


def test_missing_labels_and_small_classes(tmp_path: Path) -> None:
    rows = numbers(60, 3)
    rows[0]["label"], rows[1]["label"], rows[2]["label"] = None, "", "alone"
    test = numbers(12, 4, 5)  # a class more than training has
    lines: list[str] = []
    system = build_system(
        compose_config(
            overrides(
                f"data.train={write_table(tmp_path / 'a.jsonl', rows)}",
                f"data.test={write_table(tmp_path / 'b.jsonl', test)}",
                "data.val_fraction=0.1",
            )
        )
    )
    system.prepare(lines.append)
    text = "\n".join(lines)
    assert sum(len(items.rejections) for items in system.splits.values()) == 2
    assert "3 items of classes that training lacks" in text
    if "alone" in set(system.splits["train"]["label"]):
        assert "1 classes have one training item" in text


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (
            lambda row: row | {"label": "one"},
            [],
            "every training item has the label 'one'.*experiment=augmented",
        ),
        (lambda row: row | {"label": row["id"]}, [], "each its own: no two belong together"),
        (lambda row: {"x": row["x"], "id": row["id"]}, [], "say which holds the labels"),
        (lambda row: row | {"y": row["x"]}, [], "say which is embedded, view=NAME"),
        (lambda row: row, ["view=xx"], "view=xx: .* no such column; did you mean 'x'"),
        (lambda row: row, ["label=labl"], "label=labl: .* no such column; did you mean 'label'"),
        (lambda row: row | {"label": "" if row["id"] != "0-0" else "a"}, [], "no item of .* has a label"),
        (lambda row: row, ["tower.standardise=true"], "did you mean 'standardize'"),
    ],
)
def test_wrong_data(change: Any, more: list[str], message: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "x.jsonl", [change(row) for row in numbers(40)])
    with pytest.raises(NearfarError, match=message):
        prepared(f"data.train={table}", *more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["sampler=balanced", "loss=multilabel"], "take sampler=random"),
        (["memory=10"], "memory: experiment=labels keeps none"),
        (["view=a", "label=a"], "are one column"),
        (["learn_temperature=true"], "does not learn"),
        (["tower=image"], "options of the tower"),
        (["knn=0"], "knn=0"),
    ],
)
def test_wrong_options(more: list[str], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        read_config(compose_config(overrides(*more)))
