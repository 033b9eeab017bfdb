"""The relation system end to end, on tiny photos and on boxes alone: training, resume, probes, re-scoring, folds."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from nearfar.batching import BalancedBatchSampler, RandomBatchSampler
from nearfar.config.compose import compose_config, expand
from nearfar.contrast import NoPositivesWarning
from nearfar.data.images import Crops
from nearfar.errors import NearfarError
from nearfar.lab.ensemble import cross_validate
from nearfar.lab.report import write_report
from nearfar.launch import run_one
from nearfar.systems import build_system, check_config
from nearfar.systems.relations.data import JITTERED, BatchesBySort
from nearfar.systems.relations.evaluation import (
    Predictions,
    confusion,
    pair_retrieval,
    rescore,
    score_predictions,
)
from nearfar.systems.relations.probe import has_pixels
from nearfar.towers.boxes import spatial_numbers
from nearfar.towers.object_pairs import CropTower, NamesTower
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.run_folder import RunFolder
from tiny_relations import write_vrd

pytest.importorskip("PIL")
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "data=vrd",
    "image_encoder=small",
    "image_encoder.features=32",
    "crop_size=32",
    "epochs=2",
    "batch_size=8",
    "visual_hidden=32",
    "embedding_dim=16",
    "bootstrap=100",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures, thirty of them with a photo."""
    return write_vrd(tmp_path_factory.mktemp("vrd") / "data", 40, 30)


def run(tmp_path: Path, folder: Path, *overrides: str) -> RunFolder:
    every = [
        "experiment=relations",
        *SMALL,
        f"data.dir={folder}",
        f"runs_dir={tmp_path}",
        "name=run",
        *overrides,
    ]
    every = list({o.split("=")[0]: o for o in every}.values())
    return run_one(compose_config(every), every, False, QUIET)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "sampler"), [("infonce", "random"), ("supcon", "balanced"), ("supcon_inside", "random")]
)
def test_every_loss_and_every_sampler(tmp_path: Path, folder: Path, loss: str, sampler: str) -> None:
    run_folder = run(tmp_path, folder, f"loss={loss}", f"sampler={sampler}", "epochs=1", "categories=true")
    metrics = run_folder.read_json("metrics.json")
    test = metrics["splits"]["test"]
    for name in ("probe", "untrained", "raw_features", "spatial_only", "visual_only", "categories_only"):
        estimate = test[f"{name}/accuracy"]
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
        assert estimate["chance"] == metrics["baselines"]["probe/accuracy"]
        assert estimate["protocol"]["interval_over"] == "pictures"
        assert estimate["control"] is (name != "probe")
    pair = test["pair_retrieval/R@1"]
    assert pair["chance"] == 1 / pair["protocol"]["gallery"]
    assert "with_photo/probe/accuracy" in test
    layout = run_folder.read_json("dataset_layout.json")
    assert "random weights" in layout["encoders"]["visual"]
    assert (
        layout["rejections"]["by_reason"]["relation not chosen"]
        if "relation not chosen" in str(layout)
        else True
    )
    if loss == "infonce":
        page = write_report(run_folder).read_text()
        assert "Confusion of relations" in page
        assert "data:image/jpeg;base64" in page


@pytest.mark.slow
def test_boxes_that_tell_the_relation_are_learned(tmp_path: Path, folder: Path) -> None:
    test = run(tmp_path, folder, "data.photos=none").read_json("metrics.json")["splits"]["test"]
    assert test["probe/accuracy"]["low"] > test["probe/accuracy"]["chance"] + 0.2
    assert "pair_retrieval/R@1" not in test  # boxes alone have no second view
    assert "visual_only/accuracy" not in test


@pytest.mark.slow
@pytest.mark.parametrize("photos", ["optional", "none"])
def test_killed_run_resumes_bit_for_bit(tmp_path: Path, folder: Path, photos: str) -> None:
    """With dropout, jittered boxes and, for some pairs, pixels."""
    options = ["epochs=2", f"data.photos={photos}", "probe_rows=50", "monitor_rows=50"]
    whole = run(tmp_path, folder, *options, "name=whole")
    steps = Checkpoint.load(whole.path).step
    cut = run(tmp_path, folder, *options, "name=cut", f"trainer.max_steps={steps // 2 + 1}")
    resumed = run(
        tmp_path, folder, *options, f"resume_from={cut.path}", "trainer.max_steps=null", "name=again"
    )
    a, b = Checkpoint.load(whole.path), Checkpoint.load(resumed.path)
    assert a.step == b.step
    assert all(torch.equal(a.model[key], b.model[key]) for key in a.model)
    first, second = (f.read_json("metrics.json")["splits"] for f in (whole, resumed))
    assert first == second


@pytest.mark.slow
def test_compose_scenes_run(tmp_path: Path) -> None:
    every = [
        "experiment=relations",
        *SMALL[1:],
        "data.size=40",
        f"runs_dir={tmp_path}",
        "name=run",
        "relations=all10",
    ]
    finished = run_one(compose_config(every), every, False, QUIET)
    layout = finished.read_json("dataset_layout.json")
    assert "composed scenes" in layout["source"]
    assert layout["splits"]["test"]["images"] == 10


@pytest.mark.slow
def test_rescoring_an_older_model(tmp_path: Path, folder: Path) -> None:
    finished = run(tmp_path, folder, "relations=all10")
    kept = Predictions.load(finished.path, "test")
    scores = rescore(finished.path, ["on", "under"])
    rows = np.isin(kept.truth, [0, 2])
    fused = kept.scores["probe/accuracy"][rows]
    expected = np.mean(fused.argmax(1) == kept.truth[rows])
    assert scores["probe_all_classes/accuracy"].value == pytest.approx(expected)
    among = np.array([0, 2])[fused[:, [0, 2]].argmax(1)]
    assert scores["probe_these_classes/accuracy"].value == pytest.approx(np.mean(among == kept.truth[rows]))
    assert scores["probe_these_classes/accuracy"].value >= scores["probe_all_classes/accuracy"].value
    with pytest.raises(NearfarError, match="no relation 'wear'"):
        rescore(finished.path, ["on", "wear"])
    five = run(tmp_path, folder, "name=five")
    with pytest.raises(NearfarError, match="does not know left of"):
        rescore(five.path, ["on", "left of"])


@pytest.mark.slow
def test_cross_validation_judges_every_pair_once(tmp_path: Path, folder: Path) -> None:
    def train(arguments: list[str]) -> None:
        for overrides in expand([a for a in arguments if not a.startswith("-")]):
            run_one(compose_config(overrides), overrides, True, QUIET, swept=["data.fold"])

    overrides = [
        "experiment=relations",
        *SMALL,
        "epochs=1",
        f"data.dir={folder}",
        f"runs_dir={tmp_path}",
        "name=cv",
    ]
    overrides = list({o.split("=")[0]: o for o in overrides}.values())
    result = cross_validate(overrides, 2, train)
    assert result.estimates["probe/accuracy"].protocol["pairs"] == 120 - 0 - sum(1 for _ in ()) - _left_out(
        result.runs[0]
    )
    assert result.estimates["probe/accuracy"].n == 40
    minus = {(row["pairs"], row["minus"]) for row in result.differences}
    assert {("all", "visual only"), ("with a photo", "majority"), ("all", "untrained")} <= minus
    first = next(row for row in result.differences if row["minus"] == "visual only" and row["pairs"] == "all")
    e = result.estimates
    assert first["difference"] == pytest.approx(
        e["probe/accuracy"].value - e["visual_only/accuracy"].value, abs=1e-6
    )
    with pytest.raises(NearfarError, match="leave them out"):
        cross_validate([*overrides, "data.fold=1"], 2, train)
    with pytest.raises(NearfarError, match="at least two"):
        cross_validate(overrides, 1, train)


def _left_out(run: Path) -> int:
    layout = json.loads((run / "dataset_layout.json").read_text())
    return int(layout["rejections"]["total"])


@pytest.mark.slow
def test_untrained_infonce_starts_near_ln_b(folder: Path) -> None:
    """3.18 for 24 pairs; the notes' 1.46 was a batch of four."""
    overrides = [
        "experiment=relations",
        *SMALL,
        f"data.dir={folder}",
        "data.photos=required",
        "embedding_dim=256",
    ]
    system: Any = build_system(compose_config(list({o.split("=")[0]: o for o in overrides}.values())))
    system.prepare(lambda _: None)
    torch.manual_seed(0)
    model = system.build_model().eval()
    batch = system.dataset("train").__getitems__(list(range(24)))
    with torch.no_grad():
        assert system.training_step(model, batch).loss.item() == pytest.approx(math.log(24), abs=0.25)


# -- parts -------------------------------------------------------------------------------------------------------------
def prepared(folder: Path, *overrides: str) -> Any:
    every = ["experiment=relations", *SMALL, f"data.dir={folder}", *overrides]
    system: Any = build_system(compose_config(list({o.split("=")[0]: o for o in every}.values())))
    system.prepare(lambda _: None)
    return system


def infonce(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
    logits = (a @ b.T).double() / 0.07
    target = torch.arange(len(a))
    both = [torch.nn.functional.cross_entropy(x, target) for x in (logits, logits.T)]
    return float(sum(both).detach() / 2)


@pytest.mark.slow
def test_loss_weighs_terms_by_their_rows(folder: Path) -> None:
    """Pairs with a photo: crops and boxes; the others: their boxes twice, once with edges moved."""
    system = prepared(folder, "visual_dropout=0", "spatial_dropout=0")
    model, pixels = system.build_model().train(), has_pixels(system.dataset("train"))
    at = [*np.flatnonzero(pixels)[::3][:4].tolist(), *np.flatnonzero(~pixels)[::3][:2].tolist()]
    batch = system.dataset("train").__getitems__(at)
    assert len(set(batch.tensor("group").tolist())) == 6
    views = system.encode(model, batch)
    assert not views["visual"][4:].any()
    expected = infonce(views["visual"][:4], views["spatial"][:4]) * 4 / 6
    expected += infonce(views["spatial"][4:], views[JITTERED][4:]) * 2 / 6
    output = system.loss_of(model, views, batch)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.logs()["rows_contrasted"] == 6
    one_way = prepared(folder, "loss.symmetric=false")
    assert one_way.loss_of(model, views, batch).loss.item() != pytest.approx(expected, rel=1e-3)
    assert JITTERED not in system.encode(model.eval(), batch)


def test_boxes_are_moved_by_their_share_in_the_same_way_for_the_same_batch(folder: Path) -> None:
    system = prepared(folder, "data.photos=none", "box_jitter=0.1", "spatial=raw")
    train, pairs = system.dataset("train"), system.data.train
    at = [5, 3, 11]
    rng = np.random.default_rng([0, 0, 5])
    moved = []
    for boxes in (pairs.subject_box[at], pairs.object_box[at]):
        edges = boxes.copy()
        steps = rng.uniform(-1, 1, (3, 4))
        for row in range(3):
            width, height = boxes[row, 2] - boxes[row, 0], boxes[row, 3] - boxes[row, 1]
            for edge, side in enumerate((width, height, width, height)):
                edges[row, edge] += 0.1 * side * steps[row, edge]
        moved.append(edges)
    every = spatial_numbers(pairs.subject_box, pairs.object_box, pairs.size)
    numbers = slice(
        7
    )  # both boxes of these pairs have one area, so that the last number, its ratio, is always 1
    expected = ((spatial_numbers(*moved, pairs.size[at]) - every.mean(0))[:, numbers]) / every[
        :, numbers
    ].std(0)
    jittered = train.__getitems__(at).tensor(JITTERED)
    np.testing.assert_allclose(jittered[:, numbers], expected, rtol=1e-4, atol=1e-5)
    assert not jittered[:, 7].any()
    train.set_epoch(1)
    assert not np.allclose(train.__getitems__(at).tensor(JITTERED)[:, numbers], expected, rtol=1e-3)
    assert JITTERED not in system.dataset("test").__getitems__(at)


@pytest.mark.slow
def test_two_relations_of_one_pair_are_no_negatives(folder: Path) -> None:
    system = prepared(folder, "data.photos=required", "loss=infonce")
    model = system.build_model().eval()
    batch = system.dataset("train").__getitems__([0, 1, 2, 3])
    views = system.encode(model, batch)
    system._repeated = True
    apart = system.loss_of(model, views, batch.replaced(group=torch.arange(4))).loss.item()
    assert system.loss_of(model, views, batch.replaced(group=torch.tensor([0, 0, 1, 2]))).loss.item() < apart
    assert apart == pytest.approx(infonce(views["visual"], views["spatial"]), rel=1e-5)


@pytest.mark.slow
def test_towers_read_crops_and_names(tmp_path: Path, folder: Path) -> None:
    """The features of each crop alone, the vectors of each name alone; a loaded tower reads the same."""
    system = prepared(folder, "categories=true")
    train = system.splits["train"]
    tower, seen = system.towers["visual"], [value for value in train["visual"] if value is not None][:9]
    assert isinstance(tower, CropTower)
    rows = tower.features(seen)
    for row, value in zip(rows, seen, strict=True):
        for half, box in zip((row[:32], row[32:]), value.boxes, strict=True):
            alone = tower.features([Crops(value.photo, (box, box))])[0, :32]
            np.testing.assert_allclose(half, alone, rtol=1e-4, atol=1e-6)
    tower.save(tmp_path / "crops")
    assert np.array_equal(CropTower.load(tmp_path / "crops").read(seen).values, tower.read(seen).values)
    names = system.towers["names"]
    assert isinstance(names, NamesTower)
    vectors = names.read([("cup", "dog"), ("dog", "cup")]).values
    width = vectors.shape[1] // 2
    assert torch.equal(vectors[0, :width], vectors[1, width:])
    assert names.build().width == 2 * width
    assert names.check([("cup", " "), ("a", "b")]) == ["empty name", None]
    names.save(tmp_path / "names")
    assert torch.equal(NamesTower.load(tmp_path / "names").read([("cup", "dog")]).values, vectors[:1])
    with pytest.raises(NearfarError, match="was not fitted"):
        CropTower({"kind": "small"}, 32).read(seen)


@pytest.mark.slow
def test_hard_batches_and_a_memory(tmp_path: Path, folder: Path) -> None:
    """What the mechanism has beyond this system's own: neighbours by the boxes, earlier pairs as negatives."""
    options = ["sampler=hard", "hardness_k=20", "memory=32", "learn_temperature=true", "trainer.log_every=1"]
    finished = run(tmp_path, folder, *options)
    steps = [json.loads(line) for line in (finished.path / "train_log.jsonl").read_text().splitlines()]
    assert max(step.get("memory_age", 0) for step in steps) > 0
    assert any(step.get("hardness") for step in steps)
    assert finished.read_json("dataset_layout.json")["neighbors"]["of"] == "spatial"


@pytest.mark.slow
def test_a_checkpoint_of_before_the_towers_loads(tmp_path: Path, folder: Path) -> None:
    old = run(tmp_path, folder, "epochs=1", "name=old")
    for path in (old.path / "checkpoints").iterdir():
        checkpoint = Checkpoint.load(path)
        checkpoint.model = {name.removeprefix("heads."): value for name, value in checkpoint.model.items()}
        assert "visual.0.weight" in checkpoint.model
        checkpoint.save(path)
    again = run(tmp_path, folder, "epochs=1", "lr=0", "name=again", f"init_from={old.path}")
    weights = Checkpoint.load(again.path).model
    assert torch.equal(weights["heads.visual.0.weight"], checkpoint.model["visual.0.weight"])
    resumed = run(tmp_path, folder, "epochs=2", "name=resumed", f"resume_from={old.path}")
    assert Checkpoint.load(resumed.path).epoch == 2


@pytest.mark.slow
def test_batches_hold_one_sort(folder: Path) -> None:
    seen = np.arange(50) % 5 == 0
    sampler = BatchesBySort(seen, 8, seed=3)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert sum(len(set(seen[batch])) > 1 for batch in batches) <= 1
    sampler.set_epoch(0)
    half = list(sampler)[:3]
    other = BatchesBySort(seen, 8, seed=3)
    iterator = iter(other)
    assert [next(iterator) for _ in range(3)] == half
    again = BatchesBySort(seen, 8, seed=3)
    again.load_state_dict(other.state_dict())
    assert list(again) == batches[3:]
    with pytest.raises(NearfarError, match="marked"):
        BatchesBySort(~seen, 8, seed=3).load_state_dict(other.state_dict())
    kinds = {"data.photos=none": RandomBatchSampler, "seed=1": BatchesBySort}
    for override, kind in kinds.items():
        assert isinstance(prepared(folder, override).build_sampler(), kind)
    assert isinstance(prepared(folder, "sampler=balanced").build_sampler(), BalancedBatchSampler)


def test_scores_count_pairs_and_resample_pictures() -> None:
    truth = np.array([0, 0, 1, 1, 2, 0])
    predicted = np.array([0, 1, 1, 1, 2, 0])
    images = ["a", "a", "b", "b", "c", "c"]
    scores = score_predictions(
        {"probe/accuracy": predicted},
        truth,
        images,
        ("x", "y", "z"),
        0,
        detailed=("probe/accuracy",),
        bootstrap=0,
    )
    e = scores.estimates["probe/accuracy"]
    assert (e.value, e.chance, e.n, e.protocol["pairs"]) == (pytest.approx(5 / 6), 0.5, 3, 6)
    assert scores.estimates["probe/F1_y"].value == pytest.approx(0.8)
    assert scores.estimates["probe/macro_F1"].value == pytest.approx((0.8 + 0.8 + 1) / 3)
    assert scores.per_image["probe/accuracy"].mean() == pytest.approx(5 / 6)
    some = score_predictions(
        {"p": predicted},
        truth,
        images,
        ("x", "y", "z"),
        0,
        rows=np.array([1, 1, 0, 0, 0, 0], bool),
        bootstrap=0,
    )
    assert some.estimates["p"].value == 0.5
    assert confusion(predicted, truth, 3).tolist() == [[2, 1, 0], [0, 2, 0], [0, 0, 1]]


@pytest.mark.slow
def test_pair_retrieval_and_its_chance() -> None:
    g = torch.Generator().manual_seed(0)
    views, images = torch.randn(50, 8, generator=g), [f"{i // 2}" for i in range(50)]
    rows = np.ones(50, bool)
    right = pair_retrieval(views, views, rows, images, 8)
    assert right is not None
    assert (right[0].value, right[0].chance, right[0].protocol["pairs"]) == (1, 1 / 8, 48)
    # All alike: every order is as likely, and the score is the chance. An encoder of two classes is little better.
    alike = pair_retrieval(torch.ones(50, 8), torch.ones(50, 8), rows, images, 8)
    assert alike is not None
    assert alike[0].value == pytest.approx(1 / 8)
    classes = torch.eye(2)[torch.arange(50) % 2]
    collapsed = pair_retrieval(classes, classes, rows, images, 8)
    assert collapsed is not None
    assert collapsed[0].value < 0.4
    assert pair_retrieval(views, views, np.arange(50) < 1, images, 8) is None
    few = pair_retrieval(views, views, np.arange(50) < 5, images, 8)
    assert few is not None
    assert few[0].protocol["gallery"] == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["relations=top6"], "top5, all10 or a list"),
        (["relations=[on,abov]"], "did you mean 'above'"),
        (["spatial=rw"], "did you mean 'raw'"),
        (["loss.name=supcn"], "did you mean 'supcon'"),
        (["sampler=spatial"], "no such sampler of relations"),
        (["loss=supcon", "memory=64"], "memory=64 is for loss=infonce"),
        (["loss=supcon", "learn_temperature=true"], "learn_temperature=True is for loss=infonce"),
        (["batch_size=5000"], "is larger than the training set"),
        (["image_encoder.kind=smal"], "did you mean 'small'"),
        (["data.val_fraction=0.6", "data.test_fraction=0.5"], "leave nothing to train on"),
        (["data.folds=3", "data.fold=3"], "numbered 0 to 2"),
        (["pixels=false", "box_jitter=0"], "the only view"),
        (["pixels=false", "data.photos=required"], "looks at none"),
        (["data.photos=none", "box_jitter=0"], "no training pair has a second view"),
        (["bootstrap=10"], "at least 100 resamples"),
        (["trainer.cached_chunk=0"], "out of range"),
    ],
)
def test_bad_options_say_what_to_do(tmp_path: Path, folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        run(tmp_path, folder, *overrides)


@pytest.mark.slow
def test_damaged_photos_cost_their_pixels_alone(tmp_path: Path) -> None:
    folder = write_vrd(tmp_path / "data", 40, 30)
    data = (folder / "images" / "3.jpg").read_bytes()
    (folder / "images" / "3.jpg").write_bytes(data[: len(data) // 2])
    layout = run(tmp_path, folder, "epochs=1").read_json("dataset_layout.json")
    assert layout["rejections"]["by_reason"]["damaged photo"] == 1
    assert sum(split["images"] for split in layout["splits"].values()) == 40


@pytest.mark.slow
def test_the_sum_of_a_supervised_loss_is_an_option_of_its_own(folder: Path) -> None:
    """What the doctor prescribes where a sum inside the logarithm asks for the nearest positive alone."""

    def contrast(*overrides: str) -> Any:
        system: Any = build_system(compose_config(["experiment=relations", *overrides]))
        return system.loss.contrast

    assert contrast("loss=supcon").sum == "outside"
    inside, mended = contrast("loss=supcon_inside"), contrast("loss=supcon_inside", "loss.sum=outside")
    assert (inside.sum, mended.sum) == ("inside", "outside")
    assert not mended.own_pair
    with pytest.raises(NearfarError, match=r"loss\.sum=both: no such choice"):
        check_config(compose_config(["experiment=relations", "loss=supcon", "loss.sum=both"]))


@pytest.mark.slow
def test_pairs_with_boxes_alone_and_no_jitter_are_announced(tmp_path: Path, folder: Path) -> None:
    said: list[str] = []
    every = ["experiment=relations", *SMALL, f"data.dir={folder}", "box_jitter=0"]
    system: Any = build_system(compose_config(every))
    system.prepare(said.append)
    assert any("nothing is learned from them" in line for line in said)
    at = np.flatnonzero(~has_pixels(system.dataset("train")))[:4].tolist()
    with pytest.warns(NoPositivesWarning, match="no two rows"):
        assert system.training_step(system.build_model(), system.dataset("train").__getitems__(at)).loss == 0
