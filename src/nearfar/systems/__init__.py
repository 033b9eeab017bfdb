"""Complete systems, one folder each, and their registrations; packages outside register theirs by an entry point."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from nearfar.errors import NearfarError, nearest_name

if TYPE_CHECKING:
    from nearfar.training.system import System

__all__ = [
    "Registration",
    "build_system",
    "check_config",
    "config_packages",
    "reevaluator",
    "register",
    "systems",
    "trained",
]

ENTRY_POINTS = "nearfar.systems"


@dataclass(frozen=True)
class Registration:
    """Where the parts of a system are, as ``module:name``; each is imported when it is needed, and not before.

    ``system``: the class. ``options``: the function that checks its options, which should be light: a whole sweep is
    checked before it starts. ``trained``: the class that loads a trained run, to embed and to search.
    ``reevaluator``: the module that evaluates finished runs again (``rescore``, ``pool``). ``configs``: the package
    that holds its YAML files in the folders ``system``, ``data`` and ``experiment``. ``extra``: what to install for it.

    A package outside offers one by an entry point in the group ``nearfar.systems``::

        [project.entry-points."nearfar.systems"]
        crystals = "crystals.nearfar:REGISTRATION"
    """

    system: str
    options: str
    trained: str | None = None
    reevaluator: str | None = None
    configs: str | None = None
    extra: str | None = None


def _own(name: str, kind: str, **more: str) -> Registration:
    package = f"nearfar.systems.{name}"
    return Registration(
        f"{package}.system:{kind}", f"{package}.options:check_options", extra=f"nearfar[{name}]", **more
    )


_REGISTERED: dict[str, Registration] = {
    "aspects": _own("aspects", "AspectSystem"),
    "detector": _own("detector", "DetectorSystem"),
    "fair_detection": _own("fair_detection", "FairDetectionSystem"),
    "molecules": _own(
        "molecules", "MoleculeSystem", trained="nearfar.systems.molecules.search:TrainedMolecules"
    ),
    "relations": _own("relations", "RelationSystem", reevaluator="nearfar.systems.relations.evaluation"),
    "tissue": _own("tissue", "TissueSystem"),
}


def register(name: str, registration: Registration) -> None:
    """Register a system in this process, as an entry point does for every process."""
    _REGISTERED[name] = registration


@cache
def _installed() -> dict[str, Registration]:
    installed: dict[str, Registration] = {}
    for point in entry_points(group=ENTRY_POINTS):
        registration = point.load()
        if not isinstance(registration, Registration):
            raise NearfarError(
                f"entry point '{point.name}' of {ENTRY_POINTS} ({point.value}) is a {type(registration).__name__}; "
                "it has to be a nearfar.systems.Registration. Mend that package, or uninstall it."
            )
        if point.name in _REGISTERED:
            raise NearfarError(
                f"entry point '{point.name}' of {ENTRY_POINTS} ({point.value}) has the name of a system that nearfar "
                "brings along; rename it in that package, or uninstall it."
            )
        installed[point.name] = registration
    return installed


def systems() -> Mapping[str, Registration]:
    """Every registered system by name."""
    return {**_installed(), **_REGISTERED}


def config_packages() -> list[str]:
    """The packages outside nearfar that hold configurations of registered systems."""
    return [each.configs for each in systems().values() if each.configs]


def _registration(name: str) -> Registration:
    known = systems()
    if name not in known:
        raise NearfarError(f"there is no system '{name}': {nearest_name(str(name), known)}")
    return known[name]


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def build_system(config: Any) -> System:
    """The system that ``config.system`` names, built from its configuration."""
    registration = _registration(config.system)
    try:
        system: System = _load(registration.system)(config)
    except ModuleNotFoundError as error:
        missing = f"system '{config.system}' needs {error.name}, which is not installed."
        if registration.extra:
            missing += f" Install it with: pip install '{registration.extra}'"
        raise NearfarError(missing) from None
    return system


def check_config(config: Any) -> None:
    """Raise ``NearfarError`` for the first option, of training or of the system, that cannot be."""
    from nearfar.training.options import check_training_options

    registration = _registration(config.system)
    check_training_options(config)
    if config.needs_init_from and not (config.init_from or config.resume_from):
        raise NearfarError(
            "this experiment starts from a trained model: give init_from=RUN (a run or a checkpoint)."
        )
    _load(registration.options)(config)


def reevaluator(run: Any, what: str) -> Any:
    """The module that evaluates finished runs of ``run``'s system again; ``what`` is the word for it in messages."""
    from nearfar.training.run_folder import RunFolder

    folder = RunFolder(run)
    if not folder.finished:
        raise NearfarError(f"{folder}: no finished run is here.")
    name = str(folder.config().system)
    module = _registration(name).reevaluator
    if module is None:
        able = ", ".join(known for known, each in systems().items() if each.reevaluator)
        raise NearfarError(f"{folder}: {what} is for runs of {able}, and this is one of '{name}'.")
    return importlib.import_module(module)


def trained(run: Any) -> Any:
    """A trained run, ready to embed and search."""
    from nearfar.training.checkpoint import find_checkpoint
    from nearfar.training.run_folder import RunFolder

    name = RunFolder.of(find_checkpoint(run, prefer="best")).config().system
    place = _registration(name).trained
    if place is None:
        raise NearfarError(f"{run}: runs of system '{name}' cannot be searched.")
    return _load(place)(run)
