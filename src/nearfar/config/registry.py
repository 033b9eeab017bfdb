"""The registered systems: where their parts are. Packages outside register theirs by an entry point."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from nearfar.config.options import Role, option_table
from nearfar.config.training import RunOptions
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "Registration",
    "config_packages",
    "load_part",
    "options_class",
    "register",
    "registration",
    "role_of",
    "systems",
]

ENTRY_POINTS = "nearfar.systems"


@dataclass(frozen=True)
class Registration:
    """Where the parts of a system are, as ``module:name``; each is imported when it is needed, and not before.

    ``system``: the class. ``options``: its options, a dataclass below ``nearfar.config.RunOptions`` in a module that
    imports nothing heavy: a whole sweep is composed and checked before it starts. ``reevaluator``: the module that
    evaluates finished runs again (``rescore``, ``pool``). ``configs``: the package that holds its YAML files, in the
    folder ``experiment`` above all. ``extra``: what to install for it.

    A package outside offers one by an entry point in the group ``nearfar.systems``::

        [project.entry-points."nearfar.systems"]
        crystals = "crystals.nearfar:REGISTRATION"
    """

    system: str
    options: str
    reevaluator: str | None = None
    configs: str | None = None
    extra: str | None = None


def _own(name: str, prefix: str, **more: str) -> Registration:
    package = f"nearfar.systems.{name}"
    return Registration(
        f"{package}.system:{prefix}System",
        f"{package}.options:{prefix}Options",
        # pip before 23.3, which comes with Python 3.11, knows no extra with an underscore in a built package
        extra=f"nearfar[{name.replace('_', '-')}]",
        **more,
    )


_REGISTERED: dict[str, Registration] = {
    "aspects": _own("aspects", "Aspect"),
    "augmented": _own("augmented", "Augmented"),
    "detector": _own("detector", "Detector"),
    "fair_detection": _own("fair_detection", "FairDetection"),
    "labels": _own("labels", "Label"),
    "molecules": _own("molecules", "Molecule"),
    "pairs": _own("pairs", "Pair"),
    "relations": _own("relations", "Relation", reevaluator="nearfar.systems.relations.evaluation"),
    "tissue": _own("tissue", "Tissue"),
}


def register(name: str, registration: Registration) -> None:
    """Register a system in this process, as an entry point does for every process."""
    _REGISTERED[name] = registration


@cache
def _installed() -> dict[str, Registration]:
    installed: dict[str, Registration] = {}
    for point in entry_points(group=ENTRY_POINTS):
        try:
            loaded = point.load()
        except (ImportError, AttributeError) as error:
            raise NearfarError(
                f"entry point '{point.name}' of {ENTRY_POINTS} ({point.value}) cannot be imported ({error}). Mend that "
                "package, or uninstall it."
            ) from error
        if not isinstance(loaded, Registration):
            raise NearfarError(
                f"entry point '{point.name}' of {ENTRY_POINTS} ({point.value}) is a {type(loaded).__name__}; "
                "it has to be a nearfar.systems.Registration. Mend that package, or uninstall it."
            )
        if point.name in _REGISTERED:
            raise NearfarError(
                f"entry point '{point.name}' of {ENTRY_POINTS} ({point.value}) has the name of a system that nearfar "
                "brings along; rename it in that package, or uninstall it."
            )
        installed[point.name] = loaded
    return installed


def systems() -> Mapping[str, Registration]:
    """Every registered system by name."""
    return {**_installed(), **_REGISTERED}


def registration(name: str) -> Registration:
    """The registration of a system; ``NearfarError`` with the nearest name for one that is unknown."""
    known = systems()
    if name not in known:
        raise NearfarError(f"there is no system '{name}': {nearest_name(str(name), known)}")
    return known[name]


def load_part(place: str) -> Any:
    """What ``module:name`` names."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def options_class(system: str) -> type[RunOptions]:
    """The dataclass of a system's options."""
    place = registration(system).options
    loaded = load_part(place)
    if not (isinstance(loaded, type) and issubclass(loaded, RunOptions)):
        raise NearfarError(
            f"system '{system}': its options ({place}) have to be a dataclass below nearfar.config.RunOptions."
        )
    return loaded


def config_packages() -> list[str]:
    """The packages outside nearfar that hold configurations of registered systems."""
    return [each.configs for each in systems().values() if each.configs]


def role_of(key: str, system: str | None = None) -> Role:
    """What a different value of an option means for comparing runs; ``result`` for an option that is unknown.

    A run of a system that is not installed is read as if its options meant what those of the same name do elsewhere.

    >>> role_of("seed"), role_of("trainer.threads"), role_of("runs_dir"), role_of("lr")
    ('repeat', 'repeat', 'place', 'result')
    """
    known = systems()
    classes: list[type[RunOptions]] = [RunOptions, *map(options_class, known)]
    if system and system in known:
        classes = [options_class(system)]
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        for cls in classes:
            if (each := option_table(cls).get(".".join(parts[:end]))) is not None:
                return each.role
    return "result"
