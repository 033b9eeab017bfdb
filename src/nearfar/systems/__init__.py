"""Complete systems, one folder each: ``data.py``, ``model.py``, ``system.py``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nearfar.errors import NearfarError, nearest_name

if TYPE_CHECKING:
    from nearfar.training.system import System

__all__ = ["OPTIONS", "SYSTEMS", "TRAINED", "build_system", "check_config", "judged_again", "trained"]

SYSTEMS = {
    "aspects": "nearfar.systems.aspects.system:AspectSystem",
    "detector": "nearfar.systems.detector.system:DetectorSystem",
    "fair_detection": "nearfar.systems.fair_detection.system:FairDetectionSystem",
    "molecules": "nearfar.systems.molecules.system:MoleculeSystem",
    "relations": "nearfar.systems.relations.system:RelationSystem",
    "tissue": "nearfar.systems.tissue.system:TissueSystem",
}


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


#: system → the module that judges its finished runs again: ``rescore``, ``pool``
JUDGED_AGAIN = {"relations": "nearfar.systems.relations.rescored"}
#: system → what loads a trained run of it
TRAINED = {"molecules": "nearfar.systems.molecules.search:TrainedMolecules"}
#: system → what checks its options; light, so that a whole sweep is checked before it starts
OPTIONS = {
    "aspects": "nearfar.systems.aspects.options:check_options",
    "detector": "nearfar.systems.detector.options:check_options",
    "fair_detection": "nearfar.systems.fair_detection.options:check_options",
    "molecules": "nearfar.systems.molecules.options:check_options",
    "relations": "nearfar.systems.relations.options:check_options",
    "tissue": "nearfar.systems.tissue.options:check_options",
}


def check_config(config: Any) -> None:
    """Raise ``NearfarError`` for the first option, of training or of the system, that cannot be."""
    from nearfar.training.options import check_training_options

    if config.system not in OPTIONS:
        raise NearfarError(
            f"there is no system '{config.system}': {nearest_name(str(config.system), OPTIONS)}"
        )
    check_training_options(config)
    if config.needs_init_from and not (config.init_from or config.resume_from):
        raise NearfarError(
            "this experiment starts from a trained model: give init_from=RUN (a run or a checkpoint)."
        )
    module, name = OPTIONS[config.system].split(":")
    getattr(importlib.import_module(module), name)(config)


def judged_again(run: Any, what: str) -> Any:
    """The module that judges finished runs of ``run``'s system again; ``what`` is the word for it in messages."""
    from nearfar.training.run_folder import RunFolder

    folder = RunFolder(run)
    if not folder.finished:
        raise NearfarError(f"{folder}: no finished run is here.")
    system = str(folder.config().system)
    if system not in JUDGED_AGAIN:
        raise NearfarError(
            f"{folder}: {what} is for runs of {', '.join(JUDGED_AGAIN)}, and this is one of '{system}'."
        )
    return importlib.import_module(JUDGED_AGAIN[system])


def trained(run: Any) -> Any:
    """A trained run, ready to embed and search."""
    from nearfar.training.checkpoint import find_checkpoint
    from nearfar.training.run_folder import RunFolder

    system = RunFolder.of(find_checkpoint(run, prefer="best")).config().system
    if system not in TRAINED:
        raise NearfarError(f"{run}: runs of system '{system}' cannot be searched.")
    module, name = TRAINED[system].split(":")
    return getattr(importlib.import_module(module), name)(run)
