"""From the command line to runs: Hydra composes the configuration, this file names the run and starts it.

Every override is checked before any work: a misspelt option is answered with the nearest name, and a sweep of
twenty runs does not fail at its nineteenth because of a typo.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nearfar.configs import experiments
from nearfar.errors import NearfarError, nearest_name
from nearfar.training.resume import Resume, changed_values, flatten
from nearfar.training.run_folder import RunFolder

__all__ = ["compose_config", "launch", "run_one", "with_saved_overrides"]

CONFIGS = "nearfar.configs"
NOT_IN_NAME = ("experiment", "name", "runs_dir", "exists", "resume_from", "logger")


# -- overrides -----------------------------------------------------------------------------------------------
def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise NearfarError(
            f"'{error.override}' is not of the form key=value. Quote a value with spaces, commas or brackets: "
            "'key=\"a, b\"'."
        ) from None


def _first_values(overrides: Sequence[str]) -> list[str]:
    """A sweep's overrides with the first of each one's values."""
    single = []
    for parsed in _parse(overrides):
        if parsed.is_sweep_override():
            single.append(f"{parsed.get_key_element()}={next(iter(parsed.sweep_string_iterator()))}")
        else:
            single.append(str(parsed.input_line))
    return single


def merge_overrides(earlier: Sequence[str], later: Sequence[str]) -> list[str]:
    """Overrides of a saved run followed by new ones; the later wins.

    >>> merge_overrides(["experiment=molecules", "lr=0.1"], ["lr=0.2", "epochs=3"])
    ['experiment=molecules', 'lr=0.2', 'epochs=3']
    """
    merged: dict[str, str] = {}
    for text in [*earlier, *later]:
        merged[text.split("=")[0].lstrip("+~")] = text
    return list(merged.values())


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """The configuration that these overrides compose, with every mistake answered by the nearest name."""
    values = dict(text.split("=", 1) for text in overrides if "=" in text)
    known = experiments()
    if "experiment" not in values:
        raise NearfarError(
            "say which experiment to run: experiment=NAME, with NAME one of " + ", ".join(known)
        )
    if values["experiment"] not in known:
        name = values["experiment"]
        raise NearfarError(f"experiment={name}: there is no such experiment; {nearest_name(name, known)}")
    try:
        with initialize_config_module(CONFIGS, version_base="1.3"):
            return compose("train", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise NearfarError(_explain(error, overrides)) from None


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = str(error)
    misspelt = re.search(r"Could not override '([^']+)'", text)
    if misspelt:
        key = misspelt.group(1)
        groups = [
            f.name for f in resources.files(CONFIGS).iterdir() if f.is_dir() and not f.name.startswith("_")
        ]
        base = [o for o in overrides if o.split("=")[0].lstrip("+~") in groups]
        try:
            with initialize_config_module(CONFIGS, version_base="1.3"):
                keys = list(flatten(compose("train", overrides=base)))
        except (HydraException, OmegaConfBaseException):
            keys = []
        return f"there is no option '{key}': {nearest_name(key, [*keys, *groups])}"
    choice = re.search(r"Could not find '([^/']+)/([^']+)'", text)
    if choice:
        group, name = choice.groups()
        folder = resources.files(CONFIGS).joinpath(group)
        if folder.is_dir():
            names = [f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml")]
            return f"{group}={name}: there is no such {group}; {nearest_name(name, names)}"
    override = re.search(r"Could not override '?([\w/]+)'?\.?\s*No match", text)
    if override:
        return f"there is no group '{override.group(1)}' to override: {text.splitlines()[0]}"
    return text.strip()


# -- naming --------------------------------------------------------------------------------------------------
def run_name(overrides: Sequence[str], name: str | None, sweep: bool, swept: Sequence[str] = ()) -> str:
    """What a run is called: its name or experiment, and in a sweep (or without a name) what was overridden.

    A named sweep names its runs after the ``swept`` keys alone: the others are the same for all of them.

    >>> run_name(["experiment=molecules", "seed=1", "data.train=/some/where/train.tsv"], None, False)
    'molecules/seed=1,data.train=train'
    >>> run_name(["experiment=molecules"], "first", False)
    'first'
    >>> run_name(["experiment=molecules", "lr=0.1", "epochs=3"], "grid", True, swept=["lr"])
    'grid/lr=0.1'
    """
    values = dict(text.lstrip("+").split("=", 1) for text in overrides if "=" in text)
    parts = []
    for key, value in values.items():
        if (
            key in NOT_IN_NAME
            or key.startswith(("trainer.", "hydra"))
            or (name and swept and key not in swept)
        ):
            continue
        value = value.strip("'\"")
        if "/" in value:
            value = Path(value).stem
        parts.append(f"{key}={value}")
    details = re.sub(r"[^\w=,.+-]+", "_", ",".join(parts))
    if len(details) > 120:
        details = f"{details[:110]}-{hashlib.sha256(details.encode()).hexdigest()[:8]}"
    if name and not sweep:
        return name
    return f"{name or values['experiment']}/{details or 'default'}"


def _free(path: Path) -> Path:
    number = 2
    while path.with_name(f"{path.name}-{number}").exists():
        number += 1
    return path.with_name(f"{path.name}-{number}")


def choose_folder(
    config: DictConfig, overrides: Sequence[str], sweep: bool, swept: Sequence[str] = ()
) -> tuple[RunFolder, Resume | None]:
    """The folder of a run, and the run it continues, by ``exists`` and ``resume_from``."""
    resume = Resume.find(config.resume_from, config) if config.resume_from else None
    if resume is not None and resume.exact and config.name is None:
        return resume.folder, resume
    path = Path(config.runs_dir) / run_name(overrides, config.name, sweep, swept)
    folder = RunFolder(path)
    if not folder.started:
        return folder, resume
    if config.exists == "number":
        return RunFolder(_free(path)), resume
    if config.exists == "replace":
        return folder, resume
    if config.exists != "skip":
        raise NearfarError(f"exists={config.exists}: choose number, skip or replace.")
    changed = changed_values(folder.config(), config)
    if changed:
        keys = ", ".join(changed)
        raise NearfarError(
            f"{path} is a run with another configuration ({keys}); use exists=number or a name=."
        )
    if not folder.finished and (folder.checkpoints / "last.ckpt").exists():
        return folder, Resume.find(str(path), config)
    return folder, resume


# -- running -------------------------------------------------------------------------------------------------
def run_one(
    config: DictConfig, overrides: Sequence[str], sweep: bool, console: Any, swept: Sequence[str] = ()
) -> RunFolder:
    """Carry out one composed configuration."""
    from nearfar.lab.report import write_report
    from nearfar.systems import build_system
    from nearfar.training.fit import fit

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    folder, resume = choose_folder(config, overrides, sweep, swept)
    if config.exists == "skip" and folder.finished and resume is None:
        say(f"{folder}: finished before, kept")
        return folder
    say(f"run {folder}")
    with open_dict(config):
        config.overrides = [
            o for o in overrides if not o.startswith(("resume_from=", "start_epoch=", "exists="))
        ]
    system = build_system(config)
    system.prepare(say)
    fit(system, config, folder, resume, say, console)
    report = write_report(folder)
    from nearfar.lab.table import metrics_table

    console.print(metrics_table(folder))
    say(f"report: {report}")
    return folder


def launch(arguments: Sequence[str], console: Any, report_error: Callable[[Exception], int]) -> None:
    """``nearfar train …``: check the overrides, then let Hydra run the job or the sweep."""
    import hydra

    flags = [a for a in arguments if a.startswith("-")]
    overrides = [a for a in arguments if not a.startswith("-")]
    taken = _flag_values(arguments)
    overrides = [o for o in overrides if o not in taken]
    overrides = with_saved_overrides(overrides)
    sweep = "-m" in flags or "--multirun" in flags
    compose_config(_first_values(overrides) if sweep else [str(o.input_line) for o in _parse(overrides)])

    swept = [str(o.key_or_group) for o in _parse(overrides) if o.is_sweep_override()]

    def job(config: DictConfig) -> str:
        from hydra.core.hydra_config import HydraConfig

        task = list(HydraConfig.get().overrides.task)
        try:
            return str(run_one(config, task, sweep, console, swept))
        except Exception as error:
            code = report_error(error)
            raise SystemExit(code) from None

    extra = [a for a in arguments if a.startswith("-") or a in taken]
    sys.argv = ["nearfar train", *extra, *overrides]
    hydra.main(version_base="1.3", config_path="pkg://" + CONFIGS, config_name="train")(job)()


def _flag_values(arguments: Sequence[str]) -> list[str]:
    """Words that belong to one of Hydra's flags, such as ``job`` in ``--cfg job``."""
    with_value = ("--cfg", "-c", "--package", "-p", "--info", "-i")
    return [arguments[i + 1] for i, a in enumerate(arguments[:-1]) if a in with_value]


def with_saved_overrides(overrides: Sequence[str]) -> list[str]:
    """Put the overrides of the run that ``resume_from`` names before the ones given now."""
    values = dict(text.split("=", 1) for text in overrides if "=" in text)
    source = values.get("resume_from", "").strip("'\"")
    if not source or source == "null":
        return list(overrides)
    from nearfar.training.checkpoint import find_checkpoint

    path = find_checkpoint(source)
    folder = RunFolder(path.parent.parent if path.parent.name == "checkpoints" else path.parent)
    saved = OmegaConf.to_container(folder.config())
    assert isinstance(saved, dict)
    earlier = [str(o) for o in saved.get("overrides", [])]
    experiment = next((o for o in earlier if o.startswith("experiment=")), None)
    if experiment and values.get("experiment") not in (None, experiment.split("=", 1)[1]):
        system_before = saved.get("system")
        system_now = compose_config([f"experiment={values['experiment']}"]).system
        if system_before != system_now:
            raise NearfarError(
                f"resume_from={source}: that run belongs to system '{system_before}', "
                f"experiment={values['experiment']} is of system '{system_now}'. Take weights alone with init_from=."
            )
    # Names and places of the earlier run are its own.
    earlier = [o for o in earlier if o.split("=")[0] not in ("name", "runs_dir")]
    return merge_overrides(earlier, overrides)
