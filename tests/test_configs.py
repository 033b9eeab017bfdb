"""Every experiment composes with every group, and every mistake on the command line gets an answer."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nearfar.configs import experiments
from nearfar.errors import NearfarError
from nearfar.launch import (
    _first_values,
    choose_folder,
    compose_config,
    merge_overrides,
    run_name,
    with_saved_overrides,
)
from nearfar.training.run_folder import RunFolder

REQUIRED = {"fine_tune": ["init_from=runs/some"]}


def groups() -> list[tuple[str, str]]:
    root = resources.files("nearfar.configs")
    return [
        (folder.name, file.name[:-5])
        for folder in root.iterdir()
        if folder.is_dir() and folder.name not in ("experiment", "__pycache__")
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    ]


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_composes_and_is_described(name: str) -> None:
    config = compose_config([f"experiment={name}", *REQUIRED.get(name, [])])
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert len(experiments()[name]) > 20


@pytest.mark.parametrize(("group", "choice"), groups())
def test_every_choice_composes(group: str, choice: str) -> None:
    config = compose_config(["experiment=molecules", f"{group}={choice}"])
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=molecules", "hard_rato=0.4"], "did you mean 'hard_ratio'"),
        (["experiment=molecules", "data.trian=x"], "did you mean 'data.train'"),
        (["experiment=molecules", "sampler=hrad"], "sampler=hrad.*did you mean 'hard'"),
        (["experiment=molecuels"], "did you mean 'molecules'"),
        (["experiment=molecules", "samplr=hard"], "did you mean 'sampler'"),
        (["sampler=hard"], "say which experiment"),
    ],
)
def test_misspelt_options_are_answered_with_the_nearest_name(overrides: list[str], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        compose_config(overrides)


def test_a_value_that_cannot_be_parsed() -> None:
    with pytest.raises(NearfarError, match="key=value"):
        _first_values(["lr=[1"])


def test_first_values_of_a_sweep() -> None:
    sweep = [
        "experiment=molecules",
        "seed=0,1",
        "sampler=hard,random",
        "lr=1e-3",
        "hardness_k=range(10,30,10)",
    ]
    assert _first_values(sweep) == [
        "experiment=molecules",
        "seed=0",
        "sampler=hard",
        "lr=1e-3",
        "hardness_k=10",
    ]


def test_names_are_short_and_distinct() -> None:
    many = ["experiment=molecules"] + [f"option_{i}=value_{i}" for i in range(30)]
    name = run_name(many, None, True)
    assert len(name) < 150
    assert name != run_name([*many[:-1], "option_29=other"], None, True)
    assert run_name(["experiment=molecules"], None, True) == "molecules/default"


def folder_with(path: Path, config: object, finished: bool) -> RunFolder:
    folder = RunFolder(path)
    folder.write_text("config.yaml", OmegaConf.to_yaml(config))
    if finished:
        folder.write_json("metrics.json", {})
    return folder


def test_a_run_is_never_overwritten_in_silence(tmp_path: Path) -> None:
    overrides = ["experiment=molecules", "name=first", f"runs_dir={tmp_path}"]
    config = compose_config(overrides)
    assert choose_folder(config, overrides, False)[0].path == tmp_path / "first"
    folder_with(tmp_path / "first", config, finished=True)
    assert choose_folder(config, overrides, False)[0].path == tmp_path / "first-2"
    config.exists = "skip"
    assert choose_folder(config, overrides, False)[0].path == tmp_path / "first"
    config.lr = 0.5
    with pytest.raises(NearfarError, match=r"another configuration.*lr"):
        choose_folder(config, overrides, False)
    config.exists = "perhaps"
    with pytest.raises(NearfarError, match="number, skip or replace"):
        choose_folder(config, overrides, False)


def test_resume_takes_the_overrides_of_the_saved_run(tmp_path: Path) -> None:
    overrides = ["experiment=cold_start", "lr=0.002", "name=first"]
    config = compose_config(overrides)
    OmegaConf.set_struct(config, False)
    config.overrides = overrides
    folder = folder_with(tmp_path / "first", config, finished=False)
    folder.checkpoints.mkdir()
    (folder.checkpoints / "last.ckpt").touch()
    resumed = with_saved_overrides([f"resume_from={folder.path}", "epochs=40"])
    assert resumed == ["experiment=cold_start", "lr=0.002", f"resume_from={folder.path}", "epochs=40"]
    assert merge_overrides(["a=1"], ["a=2"]) == ["a=2"]
