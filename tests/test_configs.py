"""Every experiment composes with every group, and every mistake on the command line gets an answer."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import OmegaConf

from nearfar.config import registry
from nearfar.config.compose import (
    changed_values,
    compose_config,
    expand,
    merge_overrides,
    override_config,
    quote_paths,
    read_config,
    register_configs,
    saved_values,
)
from nearfar.config.options import group, option, option_table, to_dict, variants_of
from nearfar.config.registry import _REGISTERED, Registration, options_class
from nearfar.config.tables import markdown_table, option_rows
from nearfar.config.training import RunOptions
from nearfar.configs import experiments
from nearfar.errors import NearfarError
from nearfar.launch import check_runs, choose_folder, run_name, with_saved_overrides
from nearfar.systems import check_config, systems
from nearfar.training.run_folder import RunFolder

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
REQUIRED = {"fine_tune": ["init_from=runs/some"], "tissue_sections": ["data.dir=shards"]}


#: groups of encoders are files, the others are declared with the options of each system
FILES = [
    (folder.name, file.name[:-5])
    for folder in resources.files("nearfar.configs").iterdir()
    if folder.is_dir() and folder.name.endswith("_encoder")
    for file in folder.iterdir()
    if file.name.endswith(".yaml")
]


def declared_choices() -> Iterator[tuple[str, dict[str, str]]]:
    """Every choice of every group of a system, one of each group at a time: composing takes a tenth of a second."""
    for system in systems():
        groups = {group: list(variants) for group, variants in variants_of(options_class(system)).items()}
        if (
            "loss" in groups
        ):  # balanced batches are not for items of several classes, the second loss of labels
            groups["loss"] = groups["loss"][1:] + groups["loss"][:1]
        for choices in zip_longest(*groups.values()):
            yield (
                system,
                {group: choice for group, choice in zip(groups, choices, strict=True) if choice is not None},
            )


DECLARED = list(declared_choices())


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments())
def test_every_experiment_composes_and_is_described(name: str) -> None:
    config = compose_config([f"experiment={name}", *REQUIRED.get(name, [])])
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert len(experiments()[name]) > 20


@pytest.mark.slow
@pytest.mark.parametrize(("group", "choice"), FILES)
def test_every_encoder_composes(group: str, choice: str) -> None:
    config = compose_config(["experiment=relations", f"{group}={choice}"])
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "choices"), DECLARED, ids=["-".join([name, *each.values()]) for name, each in DECLARED]
)
def test_every_choice_is_read_as_it_was_declared(system: str, choices: dict[str, str]) -> None:
    """Composed by Hydra, read and checked, a group is the dataclass that its system declares."""
    experiment = {"tissue": "medium_spatial"}.get(system, system)
    needed = {"her2st": ["data.dir=shards"], "supcon": ["positives=topic"] if system == "pairs" else []}
    overrides = [f"experiment={experiment}", *(f"{group}={choice}" for group, choice in choices.items())]
    overrides += [more for choice in choices.values() for more in needed.get(choice, [])]
    options = read_config(compose_config(overrides))
    for group_, choice in choices.items():
        declared = variants_of(options_class(system))[group_][choice]
        assert {**to_dict(getattr(options, group_)), "dir": None} == {**declared, "dir": None}


@dataclass
class OtherLoss:
    """A loss of a system outside, by a name that nearfar has as well."""

    name: Literal["infonce"] = option("infonce", "the loss")
    margin: float = option(0.1, "how far", least=0)


@dataclass
class OtherOptions(RunOptions):
    """Options of a system outside."""

    system: str = "other"
    loss: OtherLoss = group(infonce=OtherLoss())


def test_systems_may_mean_different_options_by_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_REGISTERED, "other", Registration("none:None", f"{__name__}:OtherOptions"))
    loaded = registry.load_part
    monkeypatch.setattr(
        registry, "load_part", lambda place: OtherOptions if "Other" in place else loaded(place)
    )
    read_config(compose_config(["experiment=molecules"]))
    with pytest.raises(
        NearfarError, match=r"loss=infonce has different options in the systems molecules, other"
    ):
        register_configs("molecules", "other")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=molecules", "data=csv"], "there is no such data of molecules; known: molecules"),
        (
            ["experiment=pairs", "data=new/pairs.csv"],
            r"data=new/pairs.csv: a file .* by data.train= or .* or data.dir=",
        ),
        (
            ["experiment=pairs", "text_encoder=/models/own"],
            r"text_encoder=/models/own: a .* by text_encoder.model=",
        ),
        (["experiment=fair_detection", "data=pictures"], "there is no such data of fair_detection"),
        (
            ["experiment=relations", "loss.sum=inside"],
            "loss.sum belongs to loss=supcon or loss=supcon_inside",
        ),
        (["experiment=molecules", "sampler=null"], "sampler=null: one of the sampler group is needed"),
    ],
)
def test_choices_are_those_of_the_system(overrides: list[str], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        compose_config(overrides)


def test_an_option_that_must_be_given_within_a_group() -> None:
    with pytest.raises(NearfarError, match=r"data\.dir must be given: add data\.dir=VALUE"):
        read_config(compose_config(["experiment=tissue_sections"]))


@pytest.mark.slow
def test_the_notes_names_stand_for_ours() -> None:
    options = read_config(compose_config(["experiment=fair_detection", "lr_g=0.5", "max_norm=2.0"]))
    assert (options.lr, options.trainer.gradient_clip) == (0.5, 2.0)
    again = read_config(override_config(options, ["lr=0.01"]))
    assert again.lr == 0.01, "a saved run holds our names alone"
    with pytest.raises(NearfarError, match=r"lr_g=0\.5 and lr=0\.1: they are one option"):
        read_config(compose_config(["experiment=fair_detection", "lr_g=0.5", "lr=0.1"]))
    with pytest.raises(NearfarError, match="they are one option"):
        read_config(
            compose_config(["experiment=medium_spatial", "local_loss=false", "trainer.local_loss=true"])
        )


@pytest.mark.parametrize("system", systems())
def test_every_option_is_described(system: str) -> None:
    for name, each in option_table(options_class(system)).items():
        assert each.help, name
        assert str(each.rule), name


@pytest.mark.slow
def test_a_choice_is_whole_and_an_option_of_a_different_one_is_named() -> None:
    with pytest.raises(
        NearfarError,
        match=r"sampler\.neighbors has no effect with sampler\.name=random; it belongs to sampler=hard or sampler=par",
    ):
        read_config(compose_config(["experiment=molecules", "sampler=hard", "sampler.name=random"]))
    with pytest.raises(NearfarError, match="there is no option 'image_encoder'"):
        read_config(compose_config(["experiment=molecules", "image_encoder=small"]))


def test_a_run_of_an_earlier_version_goes_on_with_the_same_configuration() -> None:
    """Tissue's ``local_loss`` was false where it is null now, and ``memory`` came later."""
    now = read_config(compose_config(["experiment=medium_spatial"]))
    earlier = to_dict(now) | {"local_loss": False, "gather_with_grad": True}
    assert changed_values(earlier, now)
    assert changed_values(saved_values(earlier), now) == {}
    assert changed_values(saved_values(earlier | {"dropout": 0.5}), now) == {"dropout": [0.5, 0.2]}
    foreign = {"system": "not installed", "lr": 3}
    assert saved_values(foreign) is foreign


def test_a_saved_run_of_a_different_version() -> None:
    """Options that came later have their defaults, and those that are gone are named."""
    config = compose_config(["experiment=molecules", "lr=0.5"])
    saved = OmegaConf.to_container(config)
    assert isinstance(saved, dict)
    del saved["memory"]
    with pytest.raises(NearfarError, match="the option memory is missing"):
        read_config(saved)
    saved["gone"] = 3
    with pytest.warns(UserWarning, match="does not have: gone"):
        options = read_config(saved, saved=True)
    assert options == read_config(config)


@pytest.mark.slow
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
        list(expand(["lr=[1"]))
    with pytest.raises(NearfarError, match="list the values"):
        list(expand(["sampler=glob(*)"]))


def test_a_sweep_is_expanded_in_full() -> None:
    sweep = ["experiment=molecules", "seed=0,1", "sampler=hard,random", "hardness_k=range(10,30,10)"]
    runs = list(expand(sweep))
    assert len(runs) == 8
    assert runs[0] == ["experiment=molecules", "seed=0", "sampler=hard", "hardness_k=10"]
    assert runs[-1] == ["experiment=molecules", "seed=1", "sampler=random", "hardness_k=20"]


@pytest.mark.slow
def test_a_typo_in_any_run_of_a_sweep_stops_it_before_the_first() -> None:
    with pytest.raises(NearfarError, match="did you mean 'hard'"):
        check_runs(["experiment=molecules", "sampler=random,hrd"], sweep=True)
    with pytest.raises(NearfarError, match=r"hard_ratio=1\.5"):
        check_runs(["experiment=molecules", "sampler=hard", "hard_ratio=0.3,1.5,0.5"], sweep=True)
    with pytest.raises(NearfarError, match="add -m"):
        check_runs(["experiment=molecules", "seed=0,1"], sweep=False)


def test_paths_that_look_like_syntax_are_quoted(tmp_path: Path) -> None:
    odd = tmp_path / "sampler=hard,seed=1 (copy)"
    odd.mkdir()
    (quoted,) = quote_paths([f"init_from={odd}"])
    assert compose_config(["experiment=molecules", quoted]).init_from == str(odd)


def test_fine_tune_asks_for_a_model() -> None:
    with pytest.raises(NearfarError, match="give init_from=RUN"):
        check_config(compose_config(["experiment=fine_tune"]))


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


@pytest.mark.slow
def test_a_run_is_never_overwritten_in_silence(tmp_path: Path) -> None:
    overrides = ["experiment=molecules", "name=first", f"runs_dir={tmp_path}"]
    config = compose_config(overrides)
    assert choose_folder(config, overrides, False)[0].path == tmp_path / "first"
    folder_with(tmp_path / "first", config, finished=True)
    assert choose_folder(config, overrides, False)[0].path == tmp_path / "first-2"
    config.exists = "skip"
    assert choose_folder(config, overrides, False)[0].path == tmp_path / "first"
    config.lr = 0.5
    with pytest.raises(NearfarError, match=r"a different configuration.*lr"):
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


@pytest.mark.skipif(not PYPROJECT.exists(), reason="installed without its sources")
def test_every_system_has_an_extra_that_is_tested() -> None:
    """An error that names an extra (``nearfar.systems.build_system``) must name one that there is."""
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    names = {system.replace("_", "-") for system in systems()}
    assert names <= set(extras)
    assert names <= set(re.findall(r"[\w-]+", extras["dev"][0]))


PAGES = {"": "docs/options.md"} | {system: f"docs/systems/{system}.md" for system in systems()}


@pytest.mark.parametrize("system", PAGES)
def test_the_tables_of_the_docs_are_those_of_the_options(system: str) -> None:
    """NEARFAR_WRITE_DOCS=1 writes them."""
    page = PYPROJECT.parent / PAGES[system]
    begin = f"<!-- options: {system} -->" if system else "<!-- options -->"
    before, rest = page.read_text().split(begin)
    _, after = rest.split("<!-- end -->", 1)
    rows = option_rows(options_class(system), RunOptions) if system else option_rows(RunOptions)
    text = f"{before}{begin}\n\n{markdown_table(rows)}\n\n<!-- end -->{after}"
    if os.environ.get("NEARFAR_WRITE_DOCS"):
        page.write_text(text)
    assert page.read_text() == text, "write them anew: NEARFAR_WRITE_DOCS=1 pytest tests/test_configs.py"


@pytest.mark.slow
def test_options_of_hydra_are_left_to_hydra() -> None:
    plain, more = (
        compose_config(["experiment=molecules", *given]) for given in ([], ["++hydra.verbose=true"])
    )
    assert more == plain
