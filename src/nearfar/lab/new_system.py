"""A folder with a system of one's own: an installable package that trains at once, and is made to be changed."""

from __future__ import annotations

import importlib.util
import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template

from nearfar.config.registry import config_packages, systems
from nearfar.configs import experiments
from nearfar.errors import NearfarError

__all__ = ["check_system_name", "write_system"]

_NAME = r"[a-z][a-z0-9]*(_[a-z0-9]+)*"
#: what is written, and the file of ``templates/new_system`` it is made from; ``$name`` is the system's name
_FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "$name/__init__.py": "package.py.txt",
    "$name/options.py": "options.py.txt",
    "$name/system.py": "system.py.txt",
    "$name/sample.csv": "sample.csv",
    "$name/configs/__init__.py": "configs.py.txt",
    "$name/configs/experiment/$name.yaml": "experiment.yaml.txt",
    "tests/test_$name.py": "test.py.txt",
}


def write_system(name: str, folder: str | Path | None = None) -> Path:
    """Write the package of a system called ``name``: reader, options, towers, experiment, sample data and a test.

    Args:
        name: of the system, its package, its experiment and its entry point.
        folder: where it is written; None: a folder called ``name`` in the working directory. It must be empty or not
            be there: nothing is overwritten.

    Raises:
        NearfarError: what `check_system_name` raises; a folder that holds something, or cannot be written.

    >>> import tempfile
    >>> folder = write_system("colors", Path(tempfile.mkdtemp()) / "colors")
    >>> sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))[:3]
    ['colors/__init__.py', 'colors/configs/__init__.py', 'colors/options.py']
    """
    place = Path(name if folder is None else folder).expanduser()
    if place.exists() and not place.is_dir():
        raise NearfarError(f"{place} is a file; name a folder with --output.")
    if place.is_dir() and any(place.iterdir()):
        raise NearfarError(
            f"{place} is not empty, and nothing is overwritten; name a new folder with --output."
        )
    check_system_name(name)
    values = {"name": name, "prefix": "".join(part.capitalize() for part in name.split("_"))}
    templates = resources.files("nearfar.lab").joinpath("templates", "new_system")
    try:
        for target, source in _FILES.items():
            path = place / Template(target).substitute(values)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8", newline="\n") as file:
                file.write(
                    Template(templates.joinpath(source).read_text(encoding="utf-8")).substitute(values)
                )
    except OSError as error:
        raise NearfarError(
            f"{place} cannot be written ({error}); name a different folder with --output."
        ) from None
    return place


def check_system_name(name: str) -> None:
    """``NearfarError`` unless ``name`` can be that of a new system: a package that is not there yet, and free.

    >>> check_system_name("crystals")
    >>> check_system_name("My-Crystals")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: 'My-Crystals' cannot be ...: ... digits and single underscores, such as my_crystals.
    >>> check_system_name("pairs")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: there is a system called 'pairs' already; choose a different name, such as my_pairs.
    """
    if not re.fullmatch(_NAME, name):
        better = "_".join(re.findall(r"[a-z0-9]+", name.lower()))
        better = better if re.fullmatch(_NAME, better) else "crystals"
        raise NearfarError(
            f"{name!r} cannot be the name of a system and of its package: it begins with a small letter, and consists "
            f"of small letters, digits and single underscores, such as {better}."
        )
    different = f"choose a different name, such as my_{name}."
    if name in systems():
        raise NearfarError(f"there is a system called '{name}' already; {different}")
    if name in experiments(config_packages()):
        raise NearfarError(f"there is an experiment called '{name}' already; {different}")
    if keyword.iskeyword(name):
        raise NearfarError(f"'{name}' is a word of Python itself; {different}")
    if name in ("tests", "src") or _is_module(name):
        raise NearfarError(f"'{name}' is the name of a Python module that is there already; {different}")


def _is_module(name: str) -> bool:
    """Whether ``import name`` gives something other than a folder that happens to lie here."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
