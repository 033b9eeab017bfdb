"""Overrides of the command line: parsed, expanded, composed into a configuration, explained where they are wrong."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nearfar.configs import experiments
from nearfar.errors import NearfarError, nearest_name
from nearfar.systems import config_packages
from nearfar.training.checkpoint import find_checkpoint, flatten
from nearfar.training.run_folder import RunFolder

__all__ = [
    "CONFIGS",
    "PATHS",
    "compose_config",
    "expand",
    "merge_overrides",
    "parse",
    "path_options",
    "quote_paths",
    "searchpath",
    "single_config",
    "with_saved_overrides",
]

CONFIGS = "nearfar.configs"
#: options whose value may be a path (`path_options` says where it is one) and hold what Hydra's grammar reads as syntax
PATHS = (
    "resume_from",
    "init_from",
    "data.train",
    "data.val",
    "data.test",
    "data.dir",
    "data.images",
    "text_encoder.model",
    "image_encoder.name",
)

#: in a configuration, ``${given:${data.dir},1,2}`` is 1 where the option has a value and 2 where it has none
OmegaConf.register_new_resolver(
    "given", lambda value, then, otherwise: otherwise if value is None else then, replace=True
)


def parse(overrides: Sequence[str]) -> list[Override]:
    """Read ``key=value`` texts by Hydra's grammar; one that does not fit is an error that says how to quote it."""
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise NearfarError(
            f"'{error.override}' is not of the form key=value. Quote a value with spaces, commas or brackets: "
            "'key=\"a, b\"'."
        ) from None


def quote_paths(overrides: Sequence[str]) -> list[str]:
    """Quote values that are paths on this machine: ``resume_from=runs/a/seed=1,lr=2`` is neither a sweep nor a mistake.

    >>> quote_paths(["lr=0.1", "resume_from=no/such,path"])
    ['lr=0.1', 'resume_from=no/such,path']
    """
    quoted = []
    for text in overrides:
        key, _, value = text.partition("=")
        path = Path(value).expanduser() if value else None
        # A bare number stays one: options that take a path read its digits, and a count must not become text.
        number = value.isdecimal() and str(int(value)) == value
        if key in PATHS and path is not None and not number and value[0] not in "'\"" and _exists(path):
            text = f"{key}='" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
        quoted.append(text)
    return quoted


def path_options(config: DictConfig) -> dict[str, Path]:
    """The options of a configuration that are paths of this machine, and these paths.

    Whether an option means a path is a matter of its system and data. ``data.val`` and ``data.test`` are files beside a
    ``data.train``; without one they name slides. Numbers in them count pictures. Models are hub names or folders. So a
    file of the working folder that happens to be called like a slide or a model changes nothing.

    >>> path_options(OmegaConf.create({"data": {"dir": "/", "val": "/"}}))
    {'data.dir': PosixPath('/')}
    >>> sorted(path_options(OmegaConf.create({"data": {"train": "/", "val": "/", "test": 800}})))
    ['data.train', 'data.val']
    """
    paths = {}
    for key in PATHS:
        value = OmegaConf.select(config, key)
        if value is None or isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            continue
        split = key in ("data.train", "data.val", "data.test")
        if split and (isinstance(value, int) or OmegaConf.select(config, "data.train") is None):
            continue
        path = Path(str(value)).expanduser()
        model = key in ("text_encoder.model", "image_encoder.name")
        if path.is_dir() if model else _exists(path):
            paths[key] = path
    return paths


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for one
        return False


def expand(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of every run of a sweep.

    >>> list(expand(["lr=1", "seed=0,1"]))
    [['lr=1', 'seed=0'], ['lr=1', 'seed=1']]
    """
    choices = []
    for parsed in parse(overrides):
        if parsed.is_sweep_override():
            try:
                values = list(parsed.sweep_string_iterator())
            except HydraException:
                raise NearfarError(
                    f"'{parsed.input_line}': list the values, such as {parsed.key_or_group}=a,b or range(1,4)."
                ) from None
            choices.append([f"{parsed.get_key_element()}={value}" for value in values])
        else:
            choices.append([str(parsed.input_line)])
    for combination in itertools.product(*choices):
        yield list(combination)


def merge_overrides(earlier: Sequence[str], later: Sequence[str]) -> list[str]:
    """Overrides of a saved run followed by new ones; the later wins.

    >>> merge_overrides(["experiment=molecules", "lr=0.1"], ["lr=0.2", "epochs=3"])
    ['experiment=molecules', 'lr=0.2', 'epochs=3']
    """
    return list({text.split("=")[0].lstrip("+~"): text for text in [*earlier, *later]}.values())


def searchpath() -> list[str]:
    """The override by which Hydra sees the configurations of systems outside nearfar; none where there are none."""
    packages = config_packages()
    return [f"hydra.searchpath=[{','.join('pkg://' + package for package in packages)}]"] if packages else []


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """The configuration that these overrides compose, with every mistake answered by the nearest name."""
    values = dict(text.split("=", 1) for text in overrides if "=" in text)
    known = experiments(config_packages())
    if "experiment" not in values:
        raise NearfarError(
            "say which experiment to run: experiment=NAME, with NAME one of " + ", ".join(known)
        )
    if values["experiment"] not in known:
        name = values["experiment"]
        raise NearfarError(f"experiment={name}: there is no such experiment; {nearest_name(name, known)}")
    for text in overrides:
        if text[0] in "+~" and not text.lstrip("+~").startswith("hydra"):
            raise NearfarError(
                f"'{text}': options are fixed; write {text.lstrip('+~')} to set one that exists."
            )
    try:
        with initialize_config_module(CONFIGS, version_base="1.3"):
            return compose("train", overrides=[*overrides, *searchpath()])
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group set to null
        raise NearfarError(_explain(error, overrides)) from None


def single_config(arguments: Sequence[str]) -> DictConfig:
    """Compose and check the one configuration of ``key=value`` arguments; flags and sweeps are refused."""
    from nearfar.systems import check_config

    for argument in arguments:
        if argument.startswith("-"):
            raise NearfarError(f"{argument} has no meaning here; give key=value options only.")
    runs = list(expand(with_saved_overrides(quote_paths(arguments))))
    if len(runs) > 1:
        raise NearfarError(f"these options are a sweep of {len(runs)} runs; give one value each.")
    config = compose_config(runs[0])
    check_config(config)
    return config


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
                keys = list(flatten(compose("train", overrides=[*base, *searchpath()])))
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
    return text.strip()


def with_saved_overrides(overrides: Sequence[str]) -> list[str]:
    """Put the overrides of the run that ``resume_from`` names before the ones given now."""
    values = dict(text.split("=", 1) for text in overrides if "=" in text)
    source = values.get("resume_from", "")
    if not source or source == "null":
        return list(overrides)
    (parsed,) = parse([f"resume_from={source}"])
    if parsed.is_sweep_override():
        raise NearfarError("resume_from takes one run; start a sweep for each of them.")
    folder = RunFolder.of(find_checkpoint(str(parsed.value())))
    saved = OmegaConf.to_container(folder.config())
    assert isinstance(saved, Mapping)
    earlier = [str(o) for o in saved.get("overrides", [])]
    experiment = next((o for o in earlier if o.startswith("experiment=")), None)
    if experiment and values.get("experiment") not in (None, experiment.split("=", 1)[1]):
        system_now = compose_config([f"experiment={values['experiment']}"]).system
        if saved.get("system") != system_now:
            raise NearfarError(
                f"resume_from={source}: that run belongs to system '{saved.get('system')}', "
                f"experiment={values['experiment']} is of system '{system_now}'. Take weights alone with init_from=."
            )
    # Names and places of the earlier run are its own.
    earlier = [o for o in earlier if o.split("=")[0] not in ("name", "runs_dir")]
    return merge_overrides(earlier, overrides)
