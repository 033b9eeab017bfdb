"""Every wrong value is answered with a NearfarError before any work, and every right one passes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from nearfar.config.compose import compose_config, flatten
from nearfar.config.samplers import Items
from nearfar.configs import experiments
from nearfar.data.splits import data_paths
from nearfar.errors import NearfarError
from nearfar.systems import check_config
from nearfar.systems.molecules.system import molecule_tower
from nearfar.training import ranks
from nearfar.training.batches import build_sampler
from nearfar.training.fabric import processes_to_start

HARD = "sampler=hard"


check = check_config


def composed(*overrides: str) -> Any:
    return compose_config(["experiment=molecules", *overrides])


#: what an experiment asks its user for
ASKED = {"fine_tune": ["init_from=runs/first"], "tissue_sections": ["data.dir=shards"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments())
def test_every_experiment_passes(name: str) -> None:
    check_config(compose_config([f"experiment={name}", *ASKED.get(name, [])]))


BAD = {
    "trainer.precision=foo": "no such choice; known: 16-mixed, 32-true, bf16-mixed",
    "trainer.precision=16": "no such choice",
    "trainer.devices=x": "the number of processes on this machine, or auto, is needed",
    "trainer.devices=0": "the number of processes",
    "trainer.devices=true": "the number of processes",
    "trainer.devices=[0,1]": "the number of processes",
    "trainer.local_loss=1": "true or false is needed",
    "trainer.accelerator=gpux": "did you mean 'gpu'",
    "trainer.accelerator=null": "no such choice",
    "trainer.accumulate=0": "out of range: at least 1",
    "trainer.accumulate=abc": "trainer.accumulate=abc: a whole number is needed",
    "trainer.eval_batch_size=0": "out of range",
    "trainer.log_every=0": "out of range",
    "trainer.log_every=null": "log_every=null: a whole number is needed",
    "trainer.checkpoint_minutes=abc": "a finite number is needed",
    "trainer.checkpoint_minutes=-1": "out of range",
    "trainer.checkpoint_steps=0": "out of range",
    "trainer.max_steps=0": "out of range",
    "trainer.max_steps=2.5": "a whole number or null is needed",
    "trainer.threads=abc": "a whole number or null is needed",
    "trainer.threads=0": "out of range",
    "trainer.workers=-1": "out of range",
    "trainer.gradient_clip=abc": "a finite number or null is needed",
    "trainer.deterministic=maybe": "true or false is needed",
    "patience=abc": "patience=abc: a whole number or null is needed",
    "patience=-1": "patience=-1 is out of range",
    "min_epochs=abc": "min_epochs=abc: a whole number is needed",
    "min_epochs=null": "min_epochs=null: a whole number is needed",
    "exists=repalce": "did you mean 'replace'",
    "start_epoch=1": "needs resume_from",
    "start_epoch=abc": "a whole number or null is needed",
    "logger=[tensorboard,wandbb]": "did you mean 'wandb'",
    "logger=3": "there is no such logger",
    "name=2024": "text is needed. Quote a name of digits",
    "runs_dir=''": "runs_dir is empty",
    "init_from=???": "init_from must be given",
    "lr=${nothing}": "lr: ",
    "seed=-1": "out of range",
    "seed=1.5": "a whole number is needed",
    "bootstrap=abc": "a whole number is needed",
    "bootstrap=5": "at least 100 resamples",
    "epochs=2.0": "epochs=2.0: a whole number is needed",
    "epochs=nan": "a whole number is needed",
    "epochs=true": "a whole number is needed",
    "lr=nan": "a finite number is needed",
    "lr=inf": "a finite number is needed",
    "lr_schedule=null": "lr_schedule=null: text is needed",
    "lr_schedule=cosin": "did you mean 'cosine'",
    "warmup=1": "out of range",
    "learn_temperature=maybe": "true or false is needed",
    "learn_temperature=1": "true or false is needed",
    "mask_duplicates=maybe": "true or false is needed",
    "fingerprint_chirality=maybe": "true or false is needed",
    "fingerprints=3": "a list of names is needed",
    "fingerprints=[morgan,3]": "a list of names is needed",
    "fingerprints=morgn": "did you mean 'morgan'",
    "fingerprints=[]": "is empty",
    "false_negative_threshold=abc": "a finite number or null is needed",
    "false_negative_threshold=-1": "a cosine",
    "group_size=0": "out of range: at least 2",
    "group_size=abc": "a whole number or null is needed",
    "hardness_k=1.5": "a whole number of neighbours",
    "hardness_k='100 -> 30.5'": "a whole number of neighbours",
    "hardness_k=null": "hardness_k=None",
    "hard_ratio=half": "hard_ratio=half",
    "hard_ratio={kind:constant,value:abc}": "hard_ratio=",
    "hard_ratio={kind:piecewise,points:[[0]]}": "hard_ratio=",
    "loss.name=foo": "known: infonce",
    "loss.symmetric=maybe": "true or false is needed",
    "sampler.name=hrad": "did you mean 'hard'",
    "data.val_fraction=abc": "a finite number is needed",
    "data.val_fraction=1": "without the ends",
    "data.val_split=scafold": "did you mean 'scaffold'",
    "data.embedded_size=abc": "a whole number or null is needed",
    "data.embedded_size=5": "out of range: at least 10",
    "data.split_seed=abc": "a whole number is needed",
    "data.train=": "data.train is empty; data.train=null",
    "data.train=[a,b]": "text is needed",
    "data.smiles_column=true": "text is needed",
    "text_encoder.kind=3": "Quote a name of digits",
    "text_encoder.kind=null": "text is needed",
    "text_encoder.kind=ngrm": "did you mean 'ngram'",
    "text_encoder.dims=abc": "text_encoder.dims=abc: a whole number",
    "text_encoder.chars=3": "the shortest and the longest",
    "text_encoder.chars=[3,5,7]": "the shortest and the longest",
    "text_encoder.words=[a,b]": "the shortest and the longest",
    "text_encoder.singular_power=abc": "text_encoder.singular_power=abc: a number",
    "text_encoder.min_df=abc": "text_encoder.min_df=abc: a whole number",
    "text_encoder.max_df=1.5": "from 0 to 1",
    "text_encoder.max_features=0": "text_encoder.max_features=0",
}


@pytest.fixture(scope="module")
def plain() -> Any:
    return composed()


@pytest.mark.parametrize("override", BAD)
def test_one_bad_value(plain: Any, override: str) -> None:
    # Parsed and set as Hydra does it, without composing the same files a hundred times.
    parsed = OverridesParser.create().parse_override(override)
    config = copy.deepcopy(plain)
    OmegaConf.update(config, parsed.key_or_group, parsed.value())
    with pytest.raises(NearfarError) as error:
        check(config)
    assert BAD[override] in str(error.value)
    assert type(error.value) is NearfarError


TOGETHER = [
    (["text_encoder=transformer", "text_encoder.max_length=abc"], "text_encoder.max_length=abc"),
    (["text_encoder=transformer", "text_encoder.pooling=3"], "pooling=3 is unknown"),
    (["text_encoder=transformer", "text_encoder.model=null"], "text_encoder.model=None"),
    ([HARD, "sampler.order=lvel"], "did you mean 'level'"),
    ([HARD, "curriculum_epoch=4", "epochs=4"], "no batch would ever be hard"),
    (["sampler=partition", "curriculum_epoch=9", "epochs=4"], "no batch would ever be hard"),
    (["learn_temperature=true", "temperature=0.005"], "a learned temperature"),
    (["molecule_encoder=graph", "hidden=15", "heads=4"], "multiple of heads"),
    (["molecule_encoder=graph", "fingerprint_chirality=3"], "true or false is needed"),
    (["molecule_encoder=graph", "fingerprints=morgn"], "did you mean 'morgan'"),
    (["data.val=val.tsv", "data.split_seed=abc"], "a whole number is needed"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "message"), TOGETHER)
def test_values_that_are_bad_together(overrides: list[str], message: str) -> None:
    config = composed(*overrides)
    with pytest.raises(NearfarError, match=message):
        check(config)


GOOD = [
    ["patience=3", "min_epochs=2", "logger=tensorboard", "exists=skip", "name=first"],
    ["logger=[tensorboard,mlflow]", "trainer.devices=auto", "trainer.accelerator=cpu"],
    ["trainer.precision=bf16-mixed", "trainer.gradient_clip=0", "trainer.threads=2", "trainer.workers=3"],
    ["trainer.gradient_clip=null", "trainer.checkpoint_steps=5", "trainer.checkpoint_minutes=0"],
    ["resume_from=runs/some", "start_epoch=0"],
    ["fingerprints=morgan", "false_negative_threshold=1", "bootstrap=0", "lr=1", "warmup=0"],
    [HARD, "sampler.order=greedy", "hard_ratio='linear 0.3 -> 0.8'", "hardness_k='linear 100 -> 30'"],
    ["sampler=partition", "group_size=2", "curriculum_epoch=3", "epochs=4"],
    ["hardness_k={kind:piecewise,points:[[0,100],[10,30]]}"],
    ["data.train=123", "data.embedded_size=null", "data.val_split=random"],
    ["text_encoder.words=[1,2]", "text_encoder.chars=null", "text_encoder.max_df=1"],
    ["text_encoder.max_features=null", "text_encoder.singular_power=0"],
    ["text_encoder=minilm"],
    ["text_encoder=transformer", "text_encoder.model=some/folder", "text_encoder.pooling=mean"],
]


@pytest.mark.parametrize("overrides", GOOD, ids=lambda o: o[0])
def test_good_values_pass(overrides: list[str]) -> None:
    check(composed(*overrides))


@pytest.mark.slow
def test_no_option_is_without_a_rule() -> None:
    """A list of lists is no value of any option: what takes it is not checked at all."""
    config = composed("sampler=hard")
    assert len(flatten(config)) > 70
    for name in flatten(config):
        spoilt = copy.deepcopy(config)
        OmegaConf.update(spoilt, name, [["nonsense"]])
        with pytest.raises(NearfarError) as error:
            check(spoilt)
        assert type(error.value) is NearfarError, name


@pytest.mark.slow
def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for accelerator in ("gpu", "cuda", "mps"):
        with pytest.raises(NearfarError, match="sees no such device"):
            check(composed(f"trainer.accelerator={accelerator}"))
    with pytest.raises(NearfarError, match="16-mixed needs a GPU"):
        check(composed("trainer.precision=16-mixed"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check(composed("trainer.precision=16-mixed", "trainer.accelerator=gpu"))
    for devices, processes in (("auto", 2), (2, 2), (1, 1)):
        config = check(composed(f"trainer.devices={devices}"))
        assert processes_to_start(config.trainer) == processes
    with pytest.raises(NearfarError, match=r"3 processes on this machine, and PyTorch sees 2 GPU"):
        check(composed("trainer.devices=3"))
    on_cpu = check(composed("trainer.devices=auto", "trainer.accelerator=cpu"))
    assert processes_to_start(on_cpu.trainer) == 1
    check(composed("trainer.devices=3", "trainer.accelerator=cpu"))
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "on_this_machine", lambda: 2)
    check(composed("trainer.devices=2"))
    check(composed())
    with pytest.raises(NearfarError, match=r"trainer.devices=3, but 2 processes were started"):
        check(composed("trainer.devices=3", "trainer.accelerator=cpu"))


def test_a_deleted_option_is_missed() -> None:
    config = composed()
    OmegaConf.set_struct(config, False)
    del config["lr"]
    with pytest.raises(NearfarError, match="the option lr is missing"):
        check(config)


@pytest.mark.parametrize("group", ["trainer", "data", "text_encoder", "sampler", "loss"])
def test_a_group_that_is_null(group: str) -> None:
    config = composed()
    config[group] = None
    with pytest.raises(NearfarError, match=f"{group}=null: a group of options is needed here"):
        check(config)


@pytest.mark.slow
def test_chirality_reaches_the_fingerprint() -> None:
    pytest.importorskip("rdkit")
    pair = ["C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O"]
    for chirality in ("true", "false"):
        config = composed(f"fingerprint_chirality={chirality}", "fingerprints=[morgan]")
        tower = molecule_tower(check(config))
        assert tower.fingerprint.chirality is (chirality == "true")
        left, right = tower.reference(pair)
        assert np.array_equal(left, right) is (chirality == "false")
    assert "fingerprint" not in molecule_tower(check(composed("molecule_encoder=graph"))).description


def test_sampler_by_name_alone_has_an_order() -> None:
    from nearfar.batching import nearest_neighbors

    config = check(composed("sampler.name=hard", "batch_size=8", "hardness_k=20"))
    points = np.random.default_rng(0).standard_normal((64, 4))
    assert build_sampler(config, Items(64, nearest_neighbors(points, 20))).order == "level"


def test_paths_of_digits_and_folders_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NearfarError, match=r"data.train=123: no such file"):
        data_paths(composed("data.train=123").data)
    with pytest.raises(NearfarError, match=r"data.dir=7: no such folder"):
        data_paths(composed("data.dir=7").data)
    (tmp_path / "123").touch()
    assert data_paths(composed("data.train=123").data)["train"] == Path("123")
