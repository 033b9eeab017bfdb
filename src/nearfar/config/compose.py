"""From overrides to a configuration: parsed, expanded, composed by Hydra, and explained where they are wrong.

The defaults of options and the variants of groups are those that dataclasses declare (``nearfar.config.options``); what
is left to files are experiments, which choose among them, and the groups of encoders.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import is_dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nearfar.config.options import (
    Option,
    default_values,
    open_options,
    option_table,
    read_options,
    to_dict,
    variants_of,
)
from nearfar.config.registry import config_packages, options_class, role_of, systems
from nearfar.config.training import RunOptions
from nearfar.configs import experiments
from nearfar.data.files import Json
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "CONFIGS",
    "changed_values",
    "compose_config",
    "expand",
    "flatten",
    "group_choices",
    "merge_overrides",
    "override_config",
    "parse",
    "path_options",
    "quote_paths",
    "read_config",
    "register_configs",
    "saved_values",
    "searchpath",
    "system_of",
    "with_open_keys",
]

CONFIGS = "nearfar.configs"

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
            f"'{error.override}' is not of the form key=value. Close every bracket, and quote a value with "
            "spaces, commas or brackets: 'key=\"a, b\"'."
        ) from None


def quote_paths(overrides: Sequence[str]) -> list[str]:
    """Quote values that are paths on this machine: ``resume_from=runs/a/seed=1,lr=2`` is neither a sweep nor a mistake.

    >>> quote_paths(["lr=0.1", "resume_from=no/such,path"])
    ['lr=0.1', 'resume_from=no/such,path']
    """
    keys = {
        key for name in systems() for key, each in option_table(options_class(name)).items() if each.place
    }
    quoted = []
    for text in overrides:
        key, _, value = text.partition("=")
        # A bare number stays one: options that take a path read its digits, and a count must not become text.
        number = value.isdecimal() and str(int(value)) == value
        if key in keys and value and not number and value[0] not in "'\"":
            place = Path(value).expanduser()
            if _exists(place):
                text = f"{key}='" + str(place).replace("\\", "\\\\").replace("'", "\\'") + "'"
        quoted.append(text)
    return quoted


def path_options(options: RunOptions) -> dict[str, Path]:
    """The options that are paths of this machine, and these paths.

    Whether a text means a path is a matter of its option: of ``data.val``, molecules have a file and tissue a slide.
    Models are hub names or folders. So a file of the working folder that happens to be called like a slide or a model
    changes nothing.
    """
    paths = {}
    values = flatten(to_dict(options))
    for key, each in _own_table(options).items():
        value = values.get(key)
        if each.place is None or value is None or isinstance(value, bool) or value == "":
            continue
        path = Path(str(value)).expanduser()
        if path.is_dir() if each.place == "model" else _exists(path):
            paths[key] = path
    return paths


def _own_table(options: RunOptions) -> Mapping[str, Option]:
    """The options of the variants that were chosen, so that a count of scenes is not read as a file of pictures."""
    table: dict[str, Option] = {}
    chosen = {name: type(value) for name, value in vars(options).items() if is_dataclass(value)}
    for key, each in option_table(type(options)).items():
        if key.split(".")[0] not in chosen:
            table[key] = each
    for name, cls in chosen.items():
        table |= {f"{name}.{key}": each for key, each in option_table(cls).items()}
    return table


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
    >>> merge_overrides(["sampler=hard", "sampler.order=greedy"], ["sampler=random"])
    ['sampler=random']
    """
    chosen = {text.split("=")[0] for text in later}
    # A group that is chosen anew brings its own options.
    kept = [
        text
        for text in earlier
        if text.split("=")[0].split(".")[0] not in chosen or "." not in text.split("=")[0]
    ]
    return list({text.split("=")[0].lstrip("+~"): text for text in [*kept, *later]}.values())


def searchpath() -> list[str]:
    """The override by which Hydra sees the configurations of systems outside nearfar; none where there are none."""
    packages = config_packages()
    return [f"hydra.searchpath=[{','.join('pkg://' + package for package in packages)}]"] if packages else []


#: (group, variant) that are in Hydra's store
_STORED: set[tuple[str, str]] = set()
#: the options whose defaults are in Hydra's store, by system
_DEFAULTS: dict[str, type] = {}


def register_configs(*chosen: str) -> None:
    """Give Hydra the defaults of every registered system, and the variants of the groups of the ``chosen`` ones.

    Hydra has one place for ``loss=infonce``, and two systems may mean different options by it. So the variants of a
    system are there while its configurations are composed, and no others: a sweep over experiments of two systems
    whose variants differ is refused.
    """
    store = ConfigStore.instance()
    for group, name in _STORED:
        store.repo[group].pop(f"{name}.yaml", None)
    _STORED.clear()
    for system in systems():
        cls = options_class(system)
        if _DEFAULTS.get(system) is not cls:
            store.store(group="system", name=system, node=default_values(cls), package="_global_")
            _DEFAULTS[system] = cls
    stored: dict[tuple[str, str], Mapping[str, object]] = {}
    for system in chosen:
        for group, variants in variants_of(options_class(system)).items():
            for name, values in variants.items():
                if stored.setdefault((group, name), values) != values:
                    raise NearfarError(
                        f"{group}={name} has different options in the systems {', '.join(chosen)}: sweep over one "
                        "system at a time."
                    )
                store.store(group=group, name=name, node=dict(values))
    _STORED.update(stored)


def system_of(overrides: Sequence[str]) -> str | None:
    """The system that overrides choose, by ``system=`` or by the experiment; None where it cannot be told."""
    values = dict(text.split("=", 1) for text in overrides if "=" in text)
    name = values.get("system") or _system_of_experiment(values.get("experiment", ""))
    return name if name in systems() else None


def _system_of_experiment(name: str) -> str | None:
    for package in (CONFIGS, *config_packages()):
        file = resources.files(package).joinpath("experiment", f"{name}.yaml")
        if not file.is_file():
            continue
        content = _parsed(file.read_text(encoding="utf-8"))
        if "system" in content:
            return str(content["system"])
        for entry in content.get("defaults", []):
            if isinstance(entry, str):
                parent = _system_of_experiment(entry.rsplit("/", 1)[-1])
                if parent is not None:
                    return parent
            elif (key := next(iter(entry))).split()[-1].strip("/") == "system":
                return str(entry[key])
    return None


@lru_cache(maxsize=256)
def _parsed(text: str) -> dict[Any, Any]:
    """A file of configuration, which takes ten milliseconds and is asked for several times."""
    content = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(content, dict)
    return content


def with_open_keys(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra takes them: ``text_encoder.dims=64`` may be an option that the group's file does not list.

    The arguments of an encoder are checked by its class, which knows them all, so that Hydra need not.
    """
    system = system_of(overrides)
    names = open_options(options_class(system)) if system else set()
    return [
        f"++{text}" if "." in (key := text.split("=")[0]) and key.split(".")[0] in names else text
        for text in overrides
    ]


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """The configuration that these overrides compose, with every mistake answered by the nearest name.

    Its values are not checked: ``read_config`` does that.
    """
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
        return _compose("train", system_of(overrides), with_open_keys(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group set to null
        raise NearfarError(_explain(error, overrides)) from None


def _compose(name: str, system: str | None, overrides: Sequence[str] = ()) -> DictConfig:
    """What Hydra composes. Composing takes a third of a second, so that configurations which differ in values alone,
    such as the seeds of a sweep, are composed once; their values are then set, as Hydra would.
    """
    parsed = parse(overrides)
    groups = group_choices(system)
    values = [
        each
        for each in parsed
        if each.type in (OverrideType.CHANGE, OverrideType.FORCE_ADD)
        and each.key_or_group.split(".")[0] != "hydra"  # whose node is gone from what was composed
        and each.key_or_group not in groups
    ]
    # files of other packages may be changed at any time; what Hydra refuses, it shall refuse itself
    if not config_packages() and not any(each.is_sweep_override() or each.package for each in parsed):
        with suppress(OmegaConfBaseException, HydraException):
            choices = tuple(str(each.input_line) for each in parsed if each not in values)
            options: Hashable = options_class(system) if system else None  # type: ignore[assignment]  # a class is one
            config = deepcopy(_composed(name, system, choices, options))
            for each in values:
                OmegaConf.update(
                    config, each.key_or_group, each.value(), merge=True, force_add=each.is_force_add()
                )
            return config
    return _compose_by_hydra(name, system, overrides)


@lru_cache(maxsize=64)
def _composed(name: str, system: str | None, choices: Sequence[str], options: Hashable) -> DictConfig:
    return _compose_by_hydra(name, system, choices)


def _compose_by_hydra(name: str, system: str | None, overrides: Sequence[str]) -> DictConfig:
    register_configs(*([system] if system else []))
    with initialize_config_module(CONFIGS, version_base="1.3"):
        return compose(name, overrides=[*overrides, *searchpath()])


def read_config(config: RunOptions | Mapping[str, object], *, saved: bool = False) -> RunOptions:
    """The typed options of a composed configuration, or of that of a ``saved`` run; every value is checked."""
    if isinstance(config, RunOptions):
        return config
    return read_options(options_class(str(config.get("system"))), config, saved=saved)


def group_choices(system: str | None = None) -> dict[str, list[str]]:
    """The groups of options and the names one may choose in each, by a system or, without one, by any."""
    groups: dict[str, list[str]] = {}
    for package in (CONFIGS, *config_packages()):
        for folder in resources.files(package).iterdir():
            if folder.is_dir() and not folder.name.startswith("_") and folder.name != "hydra":
                files = [file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml")]
                groups.setdefault(folder.name, []).extend(files)
    groups.setdefault("system", []).extend(systems())
    for name in [system] if system else systems():
        for group, variants in variants_of(options_class(name)).items():
            known = groups.setdefault(group, [])
            known.extend(variant for variant in variants if variant not in known)
    return groups


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text, system = str(error), system_of(overrides)
    groups = group_choices(system)
    of = f" of {system}" if system else ""
    misspelt = re.search(r"Could not override '([^']+)'", text)
    if misspelt:
        key = misspelt.group(1)
        keys = option_table(options_class(system)) if system else {}
        group, _, name = key.partition(".")
        if name and key in keys:
            owners = [
                f"{group}={variant}"
                for variant, values in variants_of(options_class(str(system))).get(group, {}).items()
                if name in values
            ]
            if owners:
                return f"{key} belongs to {' or '.join(owners)}: choose that, or leave {key} out."
        return (
            f"there is no option '{key}'{of}: {nearest_name(key, [*(k for k in keys if k != key), *groups])}"
        )
    choice = re.search(r"Could not find '([^/']+)/([^']+)'", text)
    if choice and (group := choice.group(1)) in groups:
        name = choice.group(2)
        table = option_table(options_class(system)) if system else {}
        places = [f"{key}=" for key, each in table.items() if key.startswith(f"{group}.") and each.place]
        if places and (Path(name).suffix or "/" in name or _exists(Path(name))):
            return f"{group}={name}: a file or folder is given by {' or '.join(places)}"
        return f"{group}={name}: there is no such {group}{of}; {nearest_name(name, groups[group])}"
    if "Config group override" in text:
        for each in overrides:
            key, _, value = each.partition("=")
            if key in groups and value not in groups[key]:
                return f"{each}: one of the {key} group is needed; {nearest_name(value, groups[key])}"
    return text.strip()


# -- configurations of runs ----------------------------------------------------------------------------------
def flatten(config: RunOptions | Mapping[str, object], prefix: str = "") -> Json:
    """Nested configuration to dotted keys.

    >>> flatten({"lr": 0.1, "data": {"train": None}})
    {'lr': 0.1, 'data.train': None}
    """
    flat: Json = {}
    for key, value in (to_dict(config) if is_dataclass(config) else config).items():
        if isinstance(value, Mapping) or hasattr(value, "items"):
            flat |= flatten(cast(Mapping[str, object], value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = (
                list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
            )
    return flat


def saved_values(config: Mapping[str, object]) -> Mapping[str, object]:
    """The configuration of a saved run as this version would save it: later options filled in, aliases resolved.

    One that this version cannot read, such as that of a system that is not installed, stays as it is: what differs is
    then told by the values that it holds.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever loads the run is warned
            return to_dict(read_config(config, saved=True))
    except NearfarError:
        return config


def changed_values(
    before: RunOptions | Mapping[str, object], after: RunOptions | Mapping[str, object]
) -> dict[str, list[object]]:
    """The keys whose value differs, with both values; keys that do not belong to the computation left out.

    >>> changed_values({"lr": 0.1, "name": "a"}, {"lr": 0.2, "name": "b"})
    {'lr': [0.1, 0.2]}
    """
    old, new = flatten(before), flatten(after)
    system = new.get("system")
    return {
        key: [old.get(key), new.get(key)]
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and role_of(key, system) != "place"
    }


def override_config(config: RunOptions | DictConfig | Json, overrides: Sequence[str]) -> DictConfig:
    """A copy of a run's configuration under ``overrides``, each ``key=value`` with the value in YAML.

    ``nearfar train`` composes a configuration from files, which may have changed since a run was trained. What is to
    differ from a run in one value alone starts from the configuration that the run saved.

    A key is an option (``lr``, ``loss.symmetric``), or a group by the name of a variant (``sampler=hard``). Ranges are
    not checked: ``read_config`` does that.

    Raises ``NearfarError`` for a different form, an unknown key or choice, or a key that says where a run lies.

    >>> config = {"system": "", "lr": 0.1, "sampler": {"name": "random"}}
    >>> changed = override_config(config, ["lr=0.2", "sampler=hard"])
    >>> changed.lr, changed.sampler.name, config["lr"]
    (0.2, 'hard', 0.1)
    """
    plain = (
        to_dict(config)
        if is_dataclass(config)
        else OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    )
    copy = OmegaConf.create(plain)
    assert isinstance(copy, DictConfig)
    system = str(copy.get("system"))
    known = {**(option_table(options_class(system)) if system in systems() else {}), **flatten(copy)}
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key:
            raise NearfarError(f"'{text}' is not of the form key=value.")
        if key == "experiment" or role_of(key, system) == "place":
            raise NearfarError(
                f"'{text}': {key} is no part of what a run computes; give an option such as lr."
            )
        if key in copy and OmegaConf.is_dict(copy[key]):
            copy[key] = _variant(key, text, system if system in systems() else None)
        elif key in known:
            OmegaConf.update(copy, key, _yaml_value(text), force_add=True)
        else:
            groups = [str(name) for name in copy if OmegaConf.is_dict(copy[name])]
            raise NearfarError(f"there is no option '{key}': {nearest_name(key, [*known, *groups])}")
    if "overrides" in copy:
        merged = {text.partition("=")[0]: text for text in [*map(str, copy.overrides), *overrides]}
        copy.overrides = list(merged.values())
    return copy


def _yaml_value(text: str) -> object:
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text.partition('=')[2]}"]))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise NearfarError(f"'{text}': the value cannot be read ({str(error).splitlines()[0]}).") from None
    assert isinstance(content, dict)
    return content["value"]


def _variant(group: str, text: str, system: str | None) -> DictConfig:
    """The variant of a group that ``sampler=hard`` names."""
    name, known = str(_yaml_value(text)), group_choices(system).get(group)
    if known is None:
        raise NearfarError(
            f"'{text}': {group} is a section of options; give one of them, {group}.OPTION=VALUE."
        )
    if name not in known:
        raise NearfarError(f"{text}: there is no such {group}; {nearest_name(name, known)}")
    # A system that is not registered is looked up by what any system means.
    owners = (
        [system] if system else [s for s in systems() if name in variants_of(options_class(s)).get(group, {})]
    )
    variant: DictConfig = _compose(f"{group}/{name}", owners[0] if owners else None)[group]
    return variant
