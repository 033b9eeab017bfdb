"""A run's configuration with some of its values changed, as its own record has it.

``nearfar train`` composes a configuration from files, which may have changed since a run was trained. What is to differ
from a run in one value alone starts from the configuration that the run saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nearfar.errors import NearfarError, nearest_name
from nearfar.training.checkpoint import NOT_PART_OF_A_RUN, flatten

__all__ = ["override_config"]

CONFIGS = "nearfar.configs"


def override_config(config: Any, overrides: Sequence[str]) -> Any:
    """A copy of ``config`` under ``overrides``, each ``key=value`` with the value in YAML.

    A key is an option that is there (``lr``, ``loss.symmetric``), or a group by the name of one of its files
    (``sampler=hard``). Ranges are not checked: ``nearfar.systems.check_config`` does that.

    Options of the trainer that came after the run was trained get their defaults.

    Raises ``NearfarError`` for another form, for an unknown key or choice, and for a key that says where a run lies.

    >>> config = OmegaConf.create({"lr": 0.1, "sampler": {"name": "random"}})
    >>> changed = override_config(config, ["lr=0.2", "sampler=hard"])
    >>> changed.lr, changed.sampler.name, config.lr
    (0.2, 'hard', 0.1)
    """
    copy = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    if "trainer" in copy:
        copy.trainer = OmegaConf.merge(_file("trainer", "default"), copy.trainer)
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key:
            raise NearfarError(f"'{text}' is not of the form key=value.")
        if key.split(".")[0] in (*NOT_PART_OF_A_RUN, "experiment"):
            raise NearfarError(
                f"'{text}': {key} is no part of what a run computes; give an option such as lr."
            )
        if key not in (known := flatten(copy)):
            _choose(copy, key, text, known)
        else:
            OmegaConf.update(copy, key, _value(text))
    if "overrides" in copy:
        merged = {text.partition("=")[0]: text for text in [*map(str, copy.overrides), *overrides]}
        copy.overrides = list(merged.values())
    return copy


def _value(text: str) -> Any:
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text.partition('=')[2]}"]))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise NearfarError(f"'{text}': the value cannot be read ({str(error).splitlines()[0]}).") from None
    assert isinstance(content, dict)
    return content["value"]


def _file(group: str, name: str) -> Any:
    return OmegaConf.create(resources.files(CONFIGS).joinpath(group, f"{name}.yaml").read_text())


def _choose(config: Any, key: str, text: str, known: dict[str, Any]) -> None:
    """Put the file that ``text`` names in place of the group ``key``."""
    folder = resources.files(CONFIGS).joinpath(key)
    if not OmegaConf.is_dict(config.get(key) if "." not in key else None) or not folder.is_dir():
        groups = [name for name in config if OmegaConf.is_dict(config[name])]
        raise NearfarError(f"there is no option '{key}': {nearest_name(key, [*known, *groups])}")
    name = str(_value(text))
    files = {
        file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")
    }
    if name not in files:
        raise NearfarError(f"{text}: there is no such {key}; {nearest_name(name, files)}")
    config[key] = OmegaConf.create(files[name].read_text())
