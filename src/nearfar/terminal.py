"""What every verb prints with: a console, unwrapped lines, names and numbers, errors as messages the user can mend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

__all__ = [
    "console",
    "example",
    "interval_words",
    "metric_words",
    "progress_bar",
    "report_error",
    "say",
    "short_number",
    "visible",
]

#: characters that steer a terminal or reverse the order of what is read; names and data are shown and steer nothing
_STEERING = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (
        *(code for code in range(0x20) if chr(code) not in "\n\t"),
        *range(0x7F, 0xA0),
        *(0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),
    )
}


def visible(text: str) -> str:
    """Text with every character that steers a terminal written out: escape sequences, carriage returns, bidi marks.

    >>> print(visible("a\\x1b[31mred"))
    a\\x1b[31mred
    """
    return text.translate(_STEERING)


@cache
def _console_class() -> type[Console]:
    """Rich's console, whose own colours and cursor movements pass while those inside a text are written out."""
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

    return SafeConsole


@contextmanager
def progress_bar(total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on the error output while rows are worked on, and a function that advances it; ``total`` None: a count."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.completed:,} rows"),)
    known = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *(columns if total is None else known), console=console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("rows", total=total)
        yield lambda rows: bar.advance(task, rows)


def console(stderr: bool = False) -> Console:
    """A Rich console for standard output or error, which no name or text can steer."""
    out = _console_class()(stderr=stderr)
    # A table for a file or a pipe need not fit eighty columns.
    return out if out.is_terminal else _console_class()(stderr=stderr, width=120)


def say(out: Console, text: str, style: str | None = None, end: str = "\n") -> None:
    """Print a line as it is, not wrapped: a path or an override cut over two lines cannot be copied."""
    out.print(text, style=style, end=end, markup=False, highlight=False, soft_wrap=True)


def short_number(value: float) -> str:
    """Three decimals; two digits for small numbers such as a chance level, which 0.000 would hide.

    >>> [short_number(value) for value in (0.5861, 0.000385, 0.0, 1300.5)]
    ['0.586', '0.00038', '0.000', '1300.5']
    """
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2g}" if 0 < abs(value) < 0.005 else f"{value:.3f}"


def metric_words(metric: str, separator: str = " ") -> str:
    """A metric's name for a reader.

    >>> metric_words("text_to_molecule/median_rank", " · ")
    'text → molecule · median rank'
    """
    return metric.replace("_to_", " → ").replace("/", separator).replace("_", " ")


def interval_words(low: float, high: float) -> str:
    """``[0.31, 0.36]`` with the decimals of ``short_number``."""
    return f"[{short_number(low)}, {short_number(high)}]"


def example(command: str) -> str:
    """The last lines of a verb's ``--help``: a command that can be copied.

    >>> example("nearfar train views=[a,b]")
    'Example: [bold]nearfar train views=\\\\[a,b][/bold]'
    """
    return f"Example: [bold]{command.replace('[', chr(92) + '[')}[/bold]"


#: packages that come with an extra, by the name under which they are imported
OPTIONAL = {
    "train": (
        "hydra",
        "jinja2",
        "lightning",
        "lightning_fabric",
        "markupsafe",
        "matplotlib",
        "omegaconf",
        "scipy",
    ),
    "molecules": (
        "chemicals",
        "pandas",
        "pyarrow",
        "rdkit",
        "sklearn",
        "torch_geometric",
        "transformers",
    ),
    "tissue": ("anndata", "h5py", "openslide", "simplejpeg"),
    "board": ("plotly",),
    "serve": ("fastapi", "httptools", "pydantic", "starlette", "uvicorn"),
    "loggers": ("mlflow", "tensorboard", "wandb"),
}


def mendable(error: Exception) -> str | None:
    """What the user can do about an error, or None where a traceback is more useful."""
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

    ``shown=False``: a different process has printed it, and only the exit code is needed.
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
