"""The fair-detection system end to end on small generated scenes: training, outputs, resume, controls, bad input."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from nearfar.config.compose import compose_config
from nearfar.data.detection import targets_of
from nearfar.errors import NearfarError
from nearfar.lab.compare import compare_runs
from nearfar.lab.report import write_report
from nearfar.launch import run_one
from nearfar.systems import build_system, check_config
from nearfar.systems.fair_detection.evaluation import clean_pixels
from nearfar.systems.fair_detection.system import FairDetectionSystem
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.run_folder import RunFolder
from processes import run_until_killed

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
    "trainer.log_every=1",
    "device=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
]


pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


def overrides(tmp_path: Path, *more: str) -> list[str]:
    every = [*SMALL, f"runs_dir={tmp_path}", *more]
    return list({text.split("=")[0]: text for text in every}.values())


def run(tmp_path: Path, *more: str) -> RunFolder:
    every = overrides(tmp_path, *more)
    return run_one(compose_config(every), every, False, QUIET)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(tmp_path_factory.mktemp("runs"), "name=whole", "epochs=3")


def test_outputs_are_those_of_the_page(whole: RunFolder) -> None:
    layout = whole.read_json("dataset_layout.json")
    assert {name: part["rows"] for name, part in layout["splits"].items()} == {
        "train": 28,
        "val": 16,
        "test": 20,
    }
    assert {layout["lower_group"], layout["upper_group"]} == {"faint", "clear"}
    steps = [record for record in whole.log() if record["kind"] == "step"]
    assert len(steps) == 3 * 4
    fields = "loss_contrastive loss_wasserstein loss_det n_positive n_anchor score_gap score_f score_m"
    for record in steps:
        assert all(np.isfinite(record[name]) for name in [*fields.split(), "delta_linf", "delta_l2"])
        assert record["n_positive"] == record["n_anchor"] == 2
        assert 0 <= record["delta_linf"] <= record["epsilon"] + 1e-6
        assert 3 / 7 - 1e-9 <= record["group_share/faint"] <= 4 / 7 + 1e-9, "groups are balanced"
        assert record["contrastive/share"] + record["wasserstein/share"] + record[
            "detection/share"
        ] == pytest.approx(1)
        parts = [record[f"{name}/weighted"] for name in ("contrastive", "wasserstein", "detection")]
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert [record["epsilon"] for record in whole.log() if record["kind"] == "plan"] == pytest.approx(
        [0.05, 0.05625, 0.0625]
    )
    assert sorted(path.name for path in whole.checkpoints.iterdir()) == [
        "best.ckpt", *(f"epoch_000{i}.ckpt" for i in (1, 2, 3)), "last.ckpt"
    ]  # fmt: skip
    assert steps[-1]["delta_l2"] > 0


def test_the_result_is_judged_by_group(whole: RunFolder) -> None:
    metrics = whole.read_json("metrics.json")
    test = metrics["splits"]["test"]
    lower, upper = (whole.read_json("dataset_layout.json")[name] for name in ("lower_group", "upper_group"))
    for kind in ("", "clean/", "random/"):
        gap = test[f"{kind}AP/{upper}"]["value"] - test[f"{kind}AP/{lower}"]["value"]
        assert test[f"{kind}AP/gap"]["value"] == pytest.approx(gap)
    assert metrics["monitor"] == "AP/gap_closed"
    change = metrics["change"]["AP"]
    for group in (lower, upper):
        assert change[group] == pytest.approx(
            test[f"AP/{group}"]["value"] - test[f"clean/AP/{group}"]["value"]
        )
    assert metrics["comparison"]["AP gap"]["before"] == pytest.approx(test["clean/AP/gap"]["value"])
    assert metrics["modes"]["AP"]["gap size"]["before"] == pytest.approx(abs(test["clean/AP/gap"]["value"]))
    assert metrics["verdict"]["reached"] in (True, False)
    assert metrics["baselines"]["AP"] == pytest.approx(test["AP"]["chance"])
    findings = {finding["id"] for finding in whole.read_json("doctor.json")["findings"]}
    assert ("gain-in-noise" in findings) == any(
        difference["low"] <= 0 <= difference["high"] for difference in metrics["comparison"].values()
    )
    report = write_report(whole).read_text()
    assert report.count("data:image/jpeg") == 2
    assert "The gap between the groups" in report
    with np.load(whole.path / "per_item.npz") as items:
        assert float(items["test/AP/gap_closed"].mean()) == pytest.approx(
            test["AP/gap_closed"]["value"], abs=1e-6
        )


def test_every_epoch_can_be_resumed_from(whole: RunFolder, tmp_path: Path) -> None:
    """From the state after the first epoch: the rest, bit for bit, though the state of a later epoch lies beside it."""
    first = whole.checkpoints / "epoch_0001.ckpt"
    assert Checkpoint.load(first).epoch == 1
    saved = overrides(whole.path.parent, "name=whole", "epochs=3")
    again = [*saved, f"resume_from='{first}'", "name=again", f"runs_dir={tmp_path}"]
    again = list({text.split("=")[0]: text for text in again}.values())
    folder = run_one(compose_config(again), again, False, QUIET)
    a, b = Checkpoint.load(whole.path), Checkpoint.load(folder.path)
    assert a.step == b.step == 12
    assert all(torch.equal(a.model[name], b.model[name]) for name in a.model)
    assert a.best == b.best
    assert whole.read_json("metrics.json")["splits"] == folder.read_json("metrics.json")["splits"]


def _killed(every: list[str], steps: int) -> None:
    """Train in this child process and kill it, hard, in step ``steps``."""
    step, count = FairDetectionSystem.training_step, 0

    def dying(self: Any, model: Any, batch: Any) -> Any:
        nonlocal count
        if model.training:
            if count == steps:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
        return step(self, model, batch)

    FairDetectionSystem.training_step = dying  # type: ignore[method-assign]
    run_one(compose_config(every), every, False, QUIET)


def test_a_killed_run_resumes_bit_for_bit(whole: RunFolder, tmp_path: Path) -> None:
    """Score queues, batch statistics and the bound are part of the state."""
    every = overrides(tmp_path, "name=killed", "epochs=3", "trainer.checkpoint_steps=1")
    run_until_killed(_killed, every, 7)
    killed = RunFolder(tmp_path / "killed")
    assert Checkpoint.load(killed.path).step in (6, 7)
    again = [text for text in every if not text.startswith("name=")] + [f"resume_from='{killed}'"]
    assert run_one(compose_config(again), again, False, QUIET).path == killed.path
    a, b = Checkpoint.load(whole.path), Checkpoint.load(killed.path)
    assert [name for name in a.model if not torch.equal(a.model[name], b.model[name])] == []
    assert {"wasserstein.lower_queue", "epsilon", "head.layers.1.running_mean"} <= a.model.keys()


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunFolder]:
    """A run of one epoch with a control, trained for the first that asks for it."""
    place = tmp_path_factory.mktemp("controls")
    return functools.cache(lambda control: run(place, f"name={control}", f"control={control}", "epochs=1"))


@pytest.mark.parametrize("control", ["none", "random", "detection", "wasserstein", "contrastive"])
def test_controls(controlled: Callable[[str], RunFolder], control: str) -> None:
    folder = controlled(control)
    test = folder.read_json("metrics.json")["splits"]["test"]
    steps = [record for record in folder.log() if record["kind"] == "step"]
    if control == "none":
        assert test["AP"]["value"] == test["clean/AP"]["value"]
        assert test["AP/gap_closed"]["value"] == 0.0
        assert all(record["delta_linf"] == 0 for record in steps)
    elif control == "random":
        assert all(0.04 < record["delta_linf"] <= 0.05 + 1e-6 for record in steps)
    else:
        assert all(record[f"{control}/share"] == pytest.approx(1) for record in steps)


def test_runs_with_other_controls_are_compared(controlled: Callable[[str], RunFolder]) -> None:
    made = compare_runs(
        [controlled(control).path for control in ("detection", "none")], baseline="control=none"
    )
    differences = next(iter(made.differences.values()))
    assert "AP/gap_closed" in differences
    assert not [why for why in made.refused if "gap_closed" in why]


@pytest.mark.parametrize(
    "options",
    [
        ["bidirectional=true", "head_norm=layer", "middle=negatives"],
        ["threshold=0.5"],
        ["score_queue=0", "wasserstein_form=interpolated", "detach_positives=true"],
    ],
    ids=["bidirectional", "threshold", "no queue"],
)
def test_other_options_train(tmp_path: Path, options: list[str]) -> None:
    folder = run(tmp_path, "name=run", "epochs=1", *options)
    steps = [record for record in folder.log() if record["kind"] == "step"]
    assert all(np.isfinite(record["loss"]) for record in steps)
    if "threshold=0.5" in options:
        low = [record for record in steps if record["score_m"] < 0.4]
        assert all(record["n_anchor"] == record["n_positive"] == 0 for record in low)


# -- data and bad input --------------------------------------------------------------------------------------
def coco_folder(folder: Path, groups: list[str | None]) -> Path:
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    boxes = []
    for i, group in enumerate(groups, 1):
        pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 50, "height": 40})
        if group is not None:
            images[-1]["sex"] = group
        boxes.append({"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 20, 30], "iscrowd": 0})
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "person"}]}
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def prepared(tmp_path: Path, groups: list[str | None], *more: str) -> Any:
    folder = coco_folder(tmp_path / "data", groups)
    every = overrides(
        tmp_path,
        f"data.dir={folder}",
        "data.group_key=sex",
        "data.image_size=32",
        "data.val_fraction=0.3",
        "detector_training.photos.image_encoder.kind=small",
        "detector_training.photos.image_encoder.pretrained=false",
        "detector_training.photos.epochs=1",
        "detector_training.photos.frozen_epochs=0",
        "detector_training.photos.width=16",
        "detector_training.photos.heads=2",
        "detector_training.photos.queries=4",
        "detector_training.photos.batch_size=4",
        "detector_training.photos.check_evaluator=false",
        *more,
    )
    system: Any = build_system(compose_config(every))
    messages: list[str] = []
    system.prepare(messages.append)
    return system, messages


@pytest.mark.parametrize(
    ("given", "rate"),
    [([], 1e-3), (["data.dir=pictures"], 1e-4), (["data.train=a.json"], 1e-4), (["lr_g=0.5"], 0.5)],
)
def test_scenes_and_photos_have_their_own_learning_rate(given: list[str], rate: float) -> None:
    config = check_config(compose_config(["experiment=fair_detection", *given]))
    assert config.lr == rate


def test_ones_own_pictures(tmp_path: Path) -> None:
    system, messages = prepared(tmp_path, ["f", "m"] * 12 + [None], "lower_group=m")
    assert system.groups == ("m", "f")
    assert any("pictures without a group or a box to find are left out" in line for line in messages)
    sizes = {name: len(split) for name, split in system.splits.items()}
    assert sum(sizes.values()) == 24
    assert not set(system.splits["val"].ids) & (
        set(system.splits["train"].ids) | set(system.splits["test"].ids)
    )
    batch = system.dataset("train").__getitems__([0, 1, 2])
    assert clean_pixels(batch).shape == (3, 3, 32, 32)
    torch.testing.assert_close(targets_of(batch)[0].boxes, torch.tensor([[0.3, 0.5, 0.4, 0.75]]))
    groups = [system.splits["train"].groups[image.group] for image in system.splits["train"].images[:3]]
    assert batch.tensor("lower").tolist() == [int(group == "m") for group in groups]


def test_files_by_name_and_pictures_elsewhere(tmp_path: Path) -> None:
    system, _ = prepared(
        tmp_path,
        ["f", "m"] * 12,
        "data.dir=null",
        f"data.train={tmp_path}/data/train.json",
        f"data.images={tmp_path}/data/images",
    )
    assert sum(len(split) for split in system.splits.values()) == 24
    assert system.layout()["leaks"] == {}


def test_an_unknown_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NearfarError, match="lower_group=women: there is no such group"):
        prepared(tmp_path, ["f", "m"] * 12, "lower_group=women")


def test_three_groups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NearfarError, match=r"needs exactly two values.*data\.groups=\[A,B\]"):
        prepared(tmp_path, ["f", "m", "x"] * 8)
    system, messages = prepared(tmp_path / "again", ["f", "m", "x"] * 8, "data.groups=[m,f]")
    assert sum(len(split) for split in system.splits.values()) == 16, "the advice works"
    assert any("sex of neither group: x 8" in line for line in messages)


def test_pictures_of_both_groups_are_called_so(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "data", [None] * 12)
    content = json.loads((folder / "train.json").read_text())
    content["annotations"] = [
        {**box, "id": 2 * box["id"] + k, "bbox": [5 + 20 * k, 5, 15, 30], "sex": "fm"[k]}
        for box in content["annotations"]
        for k in (0, 1)
    ]
    (folder / "train.json").write_text(json.dumps(content))
    config = compose_config(
        overrides(tmp_path, f"data.dir={folder}", "data.group_key=sex", "data.image_size=32")
    )
    with pytest.raises(NearfarError, match="with boxes of both, a picture belongs to neither"):
        build_system(config).load_data(lambda line: None)
