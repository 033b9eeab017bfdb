"""What every verb prints with: a console, unwrapped lines, and errors as messages where the user can mend them."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["console", "report_error", "say"]


def console(stderr: bool = False) -> Any:
    """A Rich console for standard output or error."""
    from rich.console import Console

    made = Console(stderr=stderr)
    # A table for a file or a pipe need not fit eighty columns.
    return made if made.is_terminal else Console(stderr=stderr, width=120)


def say(out: Any, text: str, **options: Any) -> None:
    """Print a line as it is, not wrapped: a path or an override cut over two lines cannot be copied."""
    out.print(text, markup=False, highlight=False, soft_wrap=True, **options)


#: packages that come with an extra, by the name under which they are imported
OPTIONAL = {
    "molecules": (
        "chemicals",
        "hydra",
        "jinja2",
        "lightning",
        "markupsafe",
        "matplotlib",
        "omegaconf",
        "pandas",
        "pyarrow",
        "rdkit",
        "scipy",
        "sklearn",
        "torch_geometric",
        "transformers",
    ),
    "tissue": ("h5py", "openslide", "simplejpeg"),
    "loggers": ("mlflow", "tensorboard", "wandb"),
}


def mendable(error: Exception) -> str | None:
    """What the user can do about an error, or None where a traceback says more."""
    from nearfar.errors import NearfarError

    if isinstance(error, NearfarError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        for extra, packages in OPTIONAL.items():
            if package in packages:
                return (
                    f"this needs {package}, which is not installed. "
                    f"Install it with: pip install 'nearfar[{extra}]'"
                )
    return None


def report_error(error: Exception, shown: bool = True) -> int:
    """Print an error the user can mend as a message, any other with its traceback; return the exit code.

    ``shown=False``: another process has said it, and the exit code is all that is wanted.
    """
    out = console(stderr=True)
    if type(error).__name__ == "Interrupted":
        if shown:
            say(out, f"stopped; the run is saved. Go on with: nearfar train 'resume_from={error}'")
        return 130
    message = mendable(error)
    if message is not None and not os.environ.get("NEARFAR_TRACEBACK"):
        if shown:
            say(out, "error", style="bold red", end=" ")
            say(out, message)
        return 2
    if shown:
        import traceback

        traceback.print_exception(error)
    return 1
