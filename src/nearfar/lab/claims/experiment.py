"""Experiments: modules of the folder ``claims/experiments`` in a clone, called by their names in the ledger.

A module has ``run(seed, *, option=…)``, which returns a number (or a ``Share``) for each quantity, and ``QUANTITIES``,
which describes each one. ``run`` without a ``seed`` is a computation without chance. Experiments that share options
take them as one dataclass, ``run(seed, settings)``, whose fields are then the options.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, get_type_hints

from nearfar.errors import NearfarError, nearest_name

__all__ = ["Experiment", "Share", "claims_folder", "load", "names"]


class Share(NamedTuple):
    """So many hits among ``n`` independent draws; pooled over seeds, with Wilson's interval."""

    hits: int
    n: int


@dataclass(frozen=True)
class Experiment:
    """What a module offers: its function, its options with their defaults, and a description of each quantity."""

    name: str
    run: Callable[..., Mapping[str, float | Share]]
    options: dict[str, object]
    seeded: bool
    quantities: Mapping[str, str]

    def check_options(self, options: Mapping[str, object], where: str) -> None:
        """Raise for an option that ``run`` does not take."""
        for name in options:
            if name not in self.options:
                raise NearfarError(
                    f"{where}: experiment '{self.name}' has no option '{name}'; {nearest_name(name, self.options)}"
                )

    def check_quantities(self, wanted: list[str], where: str) -> None:
        """Raise for a quantity that ``run`` does not give."""
        for name in wanted:
            if name not in self.quantities:
                raise NearfarError(
                    f"{where}: experiment '{self.name}' gives no '{name}'; {nearest_name(name, self.quantities)}"
                )


def claims_folder() -> Path:
    """The folder ``claims`` of the clone that nearfar is installed from, or of the clone in the working directory.

    Raises ``NearfarError`` where there is neither: the experiments are research and not part of the package.
    """
    import nearfar

    for clone in (Path(nearfar.__file__).resolve().parents[2], Path.cwd()):
        if (clone / "claims" / "statements").is_dir() and (clone / "src" / "nearfar").is_dir():
            return clone / "claims"
    raise NearfarError(
        "the ledger of claims and its experiments are not part of the installed package: they are the folder claims/ "
        "of nearfar's repository. Clone it, and run nearfar claims in the clone."
    )


def names() -> list[str]:
    """Every experiment, without loading any."""
    return sorted(module.name for module in pkgutil.iter_modules([str(claims_folder() / "experiments")]))


def load(name: str) -> Experiment:
    """Import an experiment.

    >>> load("loss_ceiling").seeded, load("small_k").seeded
    (False, True)
    """
    clone = str(claims_folder().parent)
    if clone not in sys.path:
        sys.path.append(clone)
    module = importlib.import_module(f"claims.experiments.{name}")
    run = module.run
    parameters = inspect.signature(run).parameters
    options = {key: one.default for key, one in parameters.items() if key not in ("seed", "settings")}
    if "settings" in parameters:
        settings = get_type_hints(run)["settings"]
        options = {field.name: field.default for field in fields(settings) if field.init}

        def run(seed: int, **values: object) -> Mapping[str, float | Share]:
            result: Mapping[str, float | Share] = module.run(seed, settings(**values))
            return result

    return Experiment(name, run, options, "seed" in parameters, module.QUANTITIES)
