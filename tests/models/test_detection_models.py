"""Overlaps, matching and the set loss against loops and transformers; frozen detectors."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.models.detection import DetectorOutput, SetLoss, Target
from nearfar.models.detection.detector import corners, generalized_iou, iou, to_centre
from nearfar.models.detection.network import SmallDetector
from nearfar.models.image import build_image_encoder
from nearfar.systems import check_config
from tiny_detection import write

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
    "report=false",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for split, n in (("train", 40), ("val", 12), ("test", 16)):
        write(path, split, n)
    return path


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
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def options(folder: Path, **changes: Any) -> Any:
    overrides = [f"data.{name}={value}" for name, value in changes.items()]
    return check_config(
        compose_config(["experiment=detector", f"data.dir={folder}", *SMALL, *overrides])
    ).data
