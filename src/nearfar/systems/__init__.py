"""Complete systems, one folder each: built from typed options, and found by their registrations."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nearfar.config.compose import read_config
from nearfar.config.registry import Registration, load_part, register, registration, systems
from nearfar.config.training import RunOptions
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from types import ModuleType

    from nearfar.training.system import System

__all__ = ["Registration", "build_system", "check_config", "reevaluator", "register", "systems"]


def check_config(config: RunOptions | Mapping[str, object], *, saved: bool = False) -> RunOptions:
    """The typed options of a composed configuration; ``NearfarError`` for the first that cannot be, on this machine.

    ``saved``: the configuration is that of a run, perhaps of an earlier version (``nearfar.config.read_options``).
    """
    from nearfar.training.fabric import check_devices

    options = read_config(config, saved=saved)
    if not saved:
        check_devices(options)
        if options.needs_init_from and not (options.init_from or options.resume_from):
            raise NearfarError(
                "this experiment starts from a trained model: give init_from=RUN (a run or a checkpoint)."
            )
    return options


def build_system(config: RunOptions | Mapping[str, object], *, saved: bool = False) -> System:
    """The system that ``config.system`` names, built from its options, or from a configuration that holds them."""
    options = read_config(config, saved=saved)
    registered = registration(options.system)
    try:
        system: System = load_part(registered.system)(options)
    except ModuleNotFoundError as error:
        missing = f"system '{options.system}' needs {error.name}, which is not installed."
        if registered.extra:
            missing += f" Install it with: pip install '{registered.extra}'"
        raise NearfarError(missing) from None
    return system


def reevaluator(run: str | os.PathLike[str], what: str) -> ModuleType:
    """The module that evaluates finished runs of ``run``'s system again; ``what`` is the word for it in messages."""
    from nearfar.training.run_folder import RunFolder

    folder = RunFolder(run)
    if not folder.finished:
        raise NearfarError(f"{folder}: no finished run is here.")
    name = str(folder.config().system)
    module = registration(name).reevaluator
    if module is None:
        able = ", ".join(known for known, each in systems().items() if each.reevaluator)
        raise NearfarError(f"{folder}: {what} is for runs of {able}, and this is one of '{name}'.")
    return importlib.import_module(module)
