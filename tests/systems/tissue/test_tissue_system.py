"""The tissue system end to end on generated slides: encoders, losses, samplers, resume, processes, bad input."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from nearfar.config.compose import compose_config, flatten
from nearfar.errors import NearfarError
from nearfar.lab.report import write_report
from nearfar.launch import run_one, with_saved_overrides
from nearfar.systems import build_system, check_config
from nearfar.systems.tissue.system import TissueSystem
from nearfar.towers import load_tower
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.fit import fit
from nearfar.training.run_folder import RunFolder
from processes import run_until_killed, together
from run_files import assert_same_training

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "data.slides=4",
    "data.side=8",
    "data.generated_genes=40",
    "image_encoder=colors",
    "epochs=2",
    "batch_size=32",
    "hidden=16",
    "embedding_dim=8",
    "retrieve=10",
    "variable_genes=20",
    "expressed_genes=5",
    "bootstrap=100",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
    "trainer.log_every=2",
]


pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


def overrides(*more: str) -> list[str]:
    every = ["experiment=medium_spatial", *SMALL, *more]
    return list({o.split("=")[0]: o for o in every}.values())  # later ones win, as on the command line


def run(tmp_path: Path, *more: str) -> RunFolder:
    every = overrides(f"runs_dir={tmp_path}", *more)
    return run_one(compose_config(every), every, False, QUIET)


def prepared(*more: str) -> Any:
    system = build_system(compose_config(overrides(*more)))
    system.prepare(lambda _: None)
    return system


def test_the_two_experiments_differ_in_the_loss_alone() -> None:
    spatial, normal = (
        flatten(compose_config([f"experiment=medium_{name}"])) for name in ("spatial", "normal")
    )
    assert {key for key in spatial if spatial[key] != normal.get(key)} == {"loss.name"}
    assert (spatial["loss.name"], normal["loss.name"]) == ("spatial", "clip")
    assert spatial.keys() == normal.keys()


@pytest.mark.parametrize(
    "options",
    [
        ["loss=spatial", "sampler=spatial"],
        ["loss=clip", "sampler=random", "image_encoder=small", "image_encoder.features=32", "epochs=1"],
        ["neighbors=mask", "sampler=spatial", "sampler.tile_size=16", "image_encoder=small", "image_frozen=true",
         "image_encoder.features=16"],
        ["neighbors=positive", "sampler=balanced", "gene_encoder=sentence", "sentence_genes=8"],
    ],
    ids=["spatial", "clip", "mask", "sentences"],
)  # fmt: skip
def test_a_run_from_slides_to_report(tmp_path: Path, options: list[str]) -> None:
    folder = run(tmp_path, "name=run", *options)
    metrics = folder.read_json("metrics.json")
    test, val = metrics["splits"]["test"], metrics["splits"]["val"]
    assert test["image_to_gene/R@10"]["protocol"]["gallery"] == test["gene_to_image/MRR"]["n"] == 64
    assert test["image_to_gene/R@10"]["chance"] == pytest.approx(10 / 64)
    assert test["vicinity/image_to_gene/R@1"]["chance"] > 4 / 64
    for name in ("gene_pearson/variable", "ridge/gene_pearson/variable", "information"):
        assert val[name]["low"] < val[name]["value"] < val[name]["high"]
    with np.load(folder.path / "per_item.npz") as arrays:
        for name, estimate in test.items():
            if f"test/{name}" in arrays:
                assert arrays[f"test/{name}"].mean() == pytest.approx(estimate["value"], abs=1e-5)
    plans = [r for r in folder.log() if r["kind"] == "plan"]
    assert all(0 < p["neighbors_in_batch"] <= 1 for p in plans)
    inert = "loss=clip" in options or "neighbors=mask" in options
    assert all((p["neighbor_mass"] == 0) == inert for p in plans)
    assert (folder.path / "genes.txt").read_text().split() == [f"gene{i}" for i in range(1, 41)]
    if not inert:
        page = write_report(folder).read_text()
        assert "A gene over a slide" in page
        assert "ridge on colour" in page


def test_several_slides_have_their_own_galleries(tmp_path: Path) -> None:
    folder = run(tmp_path, "name=run", "data.hold_out=[slide2,slide4]", "data.val=slide1", "data.slides=5")
    test = folder.read_json("metrics.json")["splits"]["test"]
    own = test["own_slide/image_to_gene/R@5"]
    assert own["protocol"]["gallery"] == 64
    assert own["chance"] == pytest.approx(5 / 64)
    assert test["image_to_gene/R@5"]["protocol"]["gallery"] == 128
    by_slide = folder.read_json("metrics.json")["slides"]["image_to_gene/R@5"]
    assert by_slide.keys() == {"slide2", "slide4"}
    assert own["value"] == pytest.approx(np.mean(list(by_slide.values())))
    layout = folder.read_json("dataset_layout.json")["splits"]
    assert layout["train"]["slides"] == {"slide3": 64, "slide5": 64}


def test_it_learns_what_is_there(tmp_path: Path) -> None:
    folder = run(
        tmp_path, "name=run", "epochs=20", "lr=0.003", "hidden=64", "embedding_dim=32", "data.side=10"
    )
    test = folder.read_json("metrics.json")["splits"]["test"]
    assert test["image_to_gene/MRR"]["low"] > 2 * test["image_to_gene/MRR"]["chance"]
    assert test["gene_pearson/variable"]["low"] > 0.1
    assert test["information"]["value"] > 0.3


def test_a_spatial_target_in_random_batches_is_found_inert(tmp_path: Path) -> None:
    options = [
        "data.slides=6",
        "data.side=10",
        "batch_size=4",
        "epochs=1",
        "bootstrap=0",
        "trainer.log_every=1",
    ]
    inert = run(tmp_path, "name=random", "sampler=random", *options)
    (plan,) = (r for r in inert.log() if r["kind"] == "plan")
    n = 576  # spots of four slides; about six neighbours, three others in the batch
    assert plan["neighbors_in_batch"] == pytest.approx(6 * 3 / n, rel=0.5)
    assert plan["neighbor_mass"] < 0.01
    assert "target-inert" in {f["id"] for f in inert.read_json("doctor.json")["findings"]}
    system = prepared("sampler=spatial", *options)
    messages: list[str] = []
    assert system.on_epoch(0, system.build_sampler(), messages.append)["neighbors_in_batch"] > 0.9
    assert not any("inert" in line for line in messages)
    system = prepared("sampler=random", *options)
    system.on_epoch(0, system.build_sampler(), messages.append)
    assert "all but inert" in messages[-1]


def test_the_share_of_neighbours_is_counted_as_the_loss_counts_it() -> None:
    system = prepared("sampler=spatial")
    sampler = system.build_sampler()
    messages: list[str] = []
    record = system.on_epoch(0, sampler, messages.append)
    model, shares, masses = system.build_model(), [], []
    for positions in sampler:
        batch = system.dataset("train").__getitems__(positions)
        logs = system.training_step(model, batch).logs()
        shares += [logs["rows_with_neighbors"]] * len(positions)
        inside = torch.isin(batch.tensor("neighbors"), batch.positions)
        weight = 0.5 * (batch.tensor("alpha") * inside).sum(1)
        masses += (weight / (1 + weight)).tolist()
    assert record["neighbors_in_batch"] == pytest.approx(np.mean(shares))
    assert record["neighbor_mass"] == pytest.approx(np.mean(masses), rel=1e-5)
    assert f"{record['neighbors_in_batch']:.2%}" in messages[0]


def test_a_temperature_that_does_not_learn_is_that_of_the_options() -> None:
    learning, fixed = prepared(), prepared("learn_temperature=false", "temperature=0.2")
    learned, other = learning.build_model(), fixed.build_model()
    other.load_state_dict(fixed.read_weights(learned.state_dict()))
    assert fixed.scale(other).item() == pytest.approx(5.0)
    assert learning.scale(learned).item() == pytest.approx(1 / 0.07)
    learned.load_state_dict(learning.read_weights(other.state_dict()))
    assert learning.scale(learned).item() == pytest.approx(1 / 0.07)


def test_batches_hold_spots_as_they_are_and_their_neighbours() -> None:
    system = prepared("image_encoder=small", "augment=false", "image_encoder.features=16")
    train = system.data.splits["train"]
    batch = system.dataset("train").__getitems__([3, 30, 4])
    assert list(batch) == ["image", "gene", "neighbors", "alpha"]
    np.testing.assert_array_equal(batch["image"].numpy().transpose(0, 2, 3, 1), train.patches[[3, 30, 4]])
    for name, wanted in (("gene", train.expression), ("neighbors", train.neighbors), ("alpha", train.alpha)):
        np.testing.assert_array_equal(batch[name], wanted[[3, 30, 4]])
    assert system.splits["train"]["slide"][0] == train.slide_names[0]


def test_patches_are_turned_in_training_alone() -> None:
    system = prepared("image_encoder=small", "image_encoder.features=16")
    patches = system.data.splits["train"].patches[:9].transpose(0, 3, 1, 2)
    batch = system.dataset("train").__getitems__(list(range(9)))["image"].numpy()
    turned = 0
    for patch, seen in zip(patches, batch, strict=True):
        ways = [np.rot90(each, k, (1, 2)) for each in (patch, patch[:, :, ::-1]) for k in range(4)]
        assert any(np.array_equal(way, seen) for way in ways)
        turned += not np.array_equal(patch, seen)
    assert turned > 3
    held_out = system.dataset("val").__getitems__([0])["image"].numpy()
    np.testing.assert_array_equal(held_out[0], system.data.splits["val"].patches[0].transpose(2, 0, 1))
    assert prepared("image_encoder=colors").augment() is None
    oblong = system.data.splits["train"]
    system.data.splits["train"] = replace(oblong, patches=oblong.patches[:, :16])
    with pytest.raises(NearfarError, match=r"no squares\. Set augment=false"):
        system.augment()


def earlier_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names of the model that tissue had before it shared one with other systems."""
    names = {
        "towers.image.mean": "image_features.mean",
        "towers.image.sd": "image_features.sd",
        "towers.gene.": "gene_features.",
        "towers.image.": "encoder.encoder.",
        "heads.": "",
    }

    def earlier(key: str) -> str:
        return next((old + key.removeprefix(new) for new, old in names.items() if key.startswith(new)), key)

    return {earlier(key): value for key, value in weights.items()}


@pytest.mark.parametrize("encoder", ["colors", "small"])
def test_weights_of_earlier_versions_are_read(encoder: str) -> None:
    system = prepared(f"image_encoder={encoder}")
    model = system.build_model()
    earlier = earlier_names(model.state_dict())
    assert {key.split(".")[0] for key in earlier} == {
        "image_features" if encoder == "colors" else "encoder", "image", "gene_features", "gene", "log_scale",
    }  # fmt: skip
    other = system.build_model()
    other.load_state_dict(system.read_weights(earlier))
    assert all(torch.equal(other.state_dict()[key], value) for key, value in model.state_dict().items())
    assert system.read_weights(model.state_dict()).keys() == model.state_dict().keys()


def test_towers_are_saved_with_the_run(tmp_path: Path) -> None:
    options = ["gene_encoder=sentence", "sentence_genes=8", "epochs=1", "bootstrap=0"]
    folder, system = run(tmp_path, "name=run", *options).path, prepared(*options)
    towers = {view: load_tower(folder / "towers" / view) for view in ("image", "gene")}
    model = system.build_model()
    model.load_state_dict(system.read_weights(Checkpoint.load(folder).model))
    test = system.data.splits["test"]
    batch = system.dataset("test").__getitems__([5, 2])
    for view, values in (("image", test.patches), ("gene", test.expression)):
        rows = towers[view].read(values).batch(torch.tensor([5, 2]))
        torch.testing.assert_close(rows, batch[view], rtol=1e-5, atol=1e-5)


def killed_after(every: list[str], step: int) -> None:
    count, training_step = 0, TissueSystem.training_step

    def dying(self: Any, model: Any, batch: Any) -> Any:
        nonlocal count
        if count == step and model.training:
            os.kill(os.getpid(), signal.SIGKILL)
        count += model.training
        return training_step(self, model, batch)

    TissueSystem.training_step = dying  # type: ignore[method-assign]
    run_one(compose_config(every), every, False, QUIET)


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """With turned patches, dropout and tiles, killed in the middle of an epoch."""
    options = ["image_encoder=small", "image_encoder.features=16", "epochs=3", "trainer.checkpoint_steps=1"]
    whole = run(tmp_path, "name=whole", *options)
    every = overrides(f"runs_dir={tmp_path}", "name=killed", *options)
    run_until_killed(killed_after, every, 6)
    killed = RunFolder(tmp_path / "killed")
    assert 0 < Checkpoint.load(killed.path).step < Checkpoint.load(whole.path).step
    resumed = with_saved_overrides([f"resume_from={killed.path}"])
    run_one(compose_config(resumed), resumed, False, QUIET)
    a, b = Checkpoint.load(whole.path), Checkpoint.load(killed.path)
    assert a.step == b.step
    assert all(torch.equal(a.model[key], b.model[key]) for key in a.model)
    assert whole.read_json("metrics.json")["splits"] == killed.read_json("metrics.json")["splits"]
    other = run(tmp_path, "name=other", *options, "seed=1", "epochs=1")  # the comparison can fail
    assert any(
        not torch.equal(a.model[key], value) for key, value in Checkpoint.load(other.path).model.items()
    )


@pytest.mark.parametrize(
    "options",
    [
        ["neighbors=soft"],
        ["local_loss=true", "temp_reg_weight=0", "neighbors=positive"],
        ["loss=clip", "local_loss=true"],
    ],
    ids=["spatial", "local", "clip"],
)
def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path: Path, options: list[str]) -> None:
    """Neighbours of a spot may be encoded by the other process; uneven batches, every step looked at."""
    shared = ["dropout=0.0", "batch_size=31", "trainer.log_every=1", "trainer.probe_rows=0", *options]
    run(tmp_path, "name=one", *shared)
    every = overrides(f"runs_dir={tmp_path}", "name=two", *shared)
    config = check_config(compose_config(every))
    config.trainer.devices = 2
    assert together(train_in_two, config, tmp_path / "two") == [None, None]
    assert_same_training(tmp_path / "one", tmp_path / "two")
    last = [r for r in RunFolder(tmp_path / "two").log() if r["kind"] == "step"][-1]
    assert last["world_size"] == 2


def train_in_two(config: Any, folder: Path) -> None:
    system = build_system(config)
    system.prepare(lambda _: None)
    fit(system, config, RunFolder(folder), say=lambda _: None)


def test_options_of_several_processes_are_named_only_where_they_are_set(tmp_path: Path) -> None:
    for options, expected in ((["local_loss=true"], "local_loss has no effect"), ([], None)):
        config = check_config(compose_config(overrides("epochs=1", *options)))
        assert (config.trainer.local_loss, config.trainer.gather_with_grad) == (bool(options), True)
        lines: list[str] = []
        system = build_system(config)
        system.prepare(lines.append)
        fit(system, config, RunFolder(tmp_path / str(len(options))), say=lines.append)
        stated = [line for line in lines if "local_loss" in line or "gather_with_grad" in line]
        assert [line.rpartition(": ")[2] for line in stated] == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            "data.hold_out=slide9",
            "data.hold_out=slide9: the generated tissue has no such slide; did you mean 'slide",
        ),
        ("data.dir=/no/such/folder", "no such folder"),
        ("retrieve=0", "retrieve=0 is out of range"),
        ("loss.name=spatail", "did you mean 'spatial'"),
        ("sampler=hard", "sampler=hard: there is no such sampler of tissue"),
        ("sampler.tile_size=64", "tile_size=64 is larger than batch_size=32"),
        ("temperature=0.001", "a scale of 1000, beyond max_scale=40"),
        ("image_pixels=64", "image_encoder=colors has no network"),
        ("batch_size=1000", "larger than the training set of 128"),
        ("bootstrap=10", "at least 100 resamples"),
        ("neighbors=near", "neighbors=near: no such choice"),
        ("data.signal=2.0", "data.signal=2.0 is out of range"),
        ("image_encoder.kind=resnet", "image_encoder='resnet' is unknown"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, change: str, named: str) -> None:
    with pytest.raises(NearfarError) as error:
        run(tmp_path, "name=bad", change)
    assert named in str(error.value)


def test_a_slide_in_two_splits_is_an_error() -> None:
    for options, named in [
        (["data.hold_out=slide1", "data.val=slide1"], "slide1 is in data.hold_out and in data.val"),
        (["data.hold_out=[slide1,slide1]"], "named twice"),
        (["data.hold_out=[slide1,slide2,slide3,slide4]"], "no slide is left to train on"),
    ]:
        with pytest.raises(NearfarError, match=named):
            prepared(*options)


def test_options_are_checked_without_any_data() -> None:
    config = compose_config(overrides())
    check_config(config)
    OmegaConf.update(config, "hidden", 2.5)
    with pytest.raises(NearfarError, match=r"hidden=2\.5: a whole number"):
        check_config(config)
