"""Complete systems, one folder each: ``data.py``, ``model.py``, ``system.py``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nearfar.errors import NearfarError, nearest_name

if TYPE_CHECKING:
    from nearfar.training.system import System

__all__ = ["SYSTEMS", "TRAINED", "build_system", "trained"]

SYSTEMS = {"molecules": "nearfar.systems.molecules.system:MoleculeSystem"}


def build_system(config: Any) -> System:
    """The system that ``config.system`` names, built from its configuration."""
    if config.system not in SYSTEMS:
        raise NearfarError(f"there is no system '{config.system}': {nearest_name(config.system, SYSTEMS)}")
    module, name = SYSTEMS[config.system].split(":")
    try:
        system: System = getattr(importlib.import_module(module), name)(config)
    except ModuleNotFoundError as error:
        raise NearfarError(
            f"system '{config.system}' needs {error.name}, which is not installed. "
            f"Install it with: pip install 'nearfar[{config.system}]'"
        ) from None
    return system


#: system → what loads a trained run of it
TRAINED = {"molecules": "nearfar.systems.molecules.search:TrainedMolecules"}


def trained(run: Any) -> Any:
    """A trained run, ready to embed and search."""
    from nearfar.training.checkpoint import find_checkpoint
    from nearfar.training.run_folder import RunFolder

    path = find_checkpoint(run, prefer="best")
    folder = RunFolder(path.parent.parent if path.parent.name == "checkpoints" else path.parent)
    system = folder.config().system
    if system not in TRAINED:
        raise NearfarError(f"{run}: runs of system '{system}' cannot be searched.")
    module, name = TRAINED[system].split(":")
    return getattr(importlib.import_module(module), name)(run)
