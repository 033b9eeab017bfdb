"""A diagnosis in the terminal: the verdict first, then each finding with what to do, then what could not be judged."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nearfar.doctor import Diagnosis, Finding, Unjudged, diagnose, read_run
from nearfar.doctor.run import WATCHED, is_run
from nearfar.errors import NearfarError
from nearfar.terminal import say
from nearfar.training.run_folder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["command", "examine", "print_diagnosis", "read_names"]

#: a value in quotes that it does not need, which the shell's own would make unreadable
_QUOTED = re.compile(r"^([^=]+=)'([\w./:@-]+)'$")
_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}


def examine(
    run: Path, warn: Callable[[str], None] = print, names: Mapping[str, str] | None = None
) -> Diagnosis:
    """Diagnose a run folder and write its ``doctor.json``; where that cannot be written, ``warn`` gets the reason.

    Of the log of a different trainer nothing is written; ``names`` says what its names mean.
    """
    if not is_run(run):
        return diagnose(run, names=names)
    if names:
        raise NearfarError(f"{run} is a run of nearfar, whose names are known: leave --map out.")
    diagnosis = diagnose(read_run(run))
    folder = run.parent if run.name == "train_log.jsonl" else run
    try:
        RunFolder(folder).write_json("doctor.json", diagnosis.to_dict())
    except OSError as error:
        warn(f"doctor.json was not written: {error}")
    return diagnosis


def read_names(given: Iterable[str] | None) -> dict[str, str]:
    """What ``--map FIELD=NAME`` says.

    >>> read_names(["loss=train/contrast"])
    {'loss': 'train/contrast'}
    """
    names = {}
    for each in given or ():
        field, separator, name = each.partition("=")
        if not (separator and field and name):
            raise NearfarError(f"--map {each}: FIELD=NAME is needed, such as --map loss=train/contrast.")
        names[field] = name
    return names


def command(overrides: Iterable[str], run: Path) -> str:
    """The overrides as a command: the run's own ones, from its configuration, and then these, which win.

    >>> command(["hard_ratio=0.4"], Path("no/such/run"))
    'nearfar train experiment=NAME hard_ratio=0.4'
    """
    new = [part for text in overrides for part in text.split()]
    keys = {part.split("=")[0] for part in new}
    kept = [part for part in _own_overrides(run) if part.split("=")[0].lstrip("+~") not in keys]
    return shlex.join(["nearfar", "train", *(kept or ["experiment=NAME"]), *new])


def _own_overrides(run: Path) -> list[str]:
    folder = RunFolder(run)
    if not folder.started:
        return []
    overrides = [str(part) for part in folder.config(fields={}).get("overrides") or []]
    return [_QUOTED.sub(r"\1\2", part) for part in overrides if not part.startswith("name=")]


def print_diagnosis(diagnosis: Diagnosis, run: Path, console: Console) -> None:
    """Print it; lines are not wrapped, so that commands can be copied."""
    say(console, f"{run}: {diagnosis.verdict}", style=_style(diagnosis))
    if diagnosis.gain:
        say(console, f"  {diagnosis.gain}")
    for line in diagnosis.read_as:
        say(console, f"  {line}", style="dim")
    watched = (
        is_run(run) and RunFolder(run).started and RunFolder(run).config(fields={}).get("system") == WATCHED
    )
    foreign = bool(diagnosis.read_as) or watched
    for finding in diagnosis:
        say(console, "")
        _print_finding(finding, None if foreign else run, console)
    if foreign and diagnosis.worth_logging:
        say(console, "")
        listed = [f"{name} ({', '.join(rules)})" for name, rules in diagnosis.worth_logging.items()]
        say(console, f"worth logging  {'; '.join(listed)}")
        if not watched:
            say(
                console,
                "  nearfar.integrations.pytorch.Monitor logs these, and which weights move, in ten lines",
            )
    if not foreign:
        path = shlex.quote(str(run))
        say(console, "")
        say(console, f"next   nearfar doctor {path} --what-if   the same batches under other options")
        say(console, f"       nearfar doctor {path} --try 100   whether a change helps")
    if diagnosis.unjudged:
        say(console, "")
        say(console, "Not judged:", style="bold")
        for reason, ids in _by_reason(diagnosis.unjudged).items():
            say(console, f"  {', '.join(ids)}: {reason}", style="dim")


def _style(diagnosis: Diagnosis) -> str:
    if not diagnosis.judged:
        return "bold yellow"
    return "bold green" if diagnosis.healthy else "bold red"


def _print_finding(finding: Finding, run: Path | None, console: Console) -> None:
    """``run`` None: of a different trainer, which has no overrides."""
    say(console, finding.severity, style=_STYLES[finding.severity], end=" ")
    say(console, f"{finding.id}: {finding.title}", style="bold")
    say(console, f"  seen   {finding.evidence['text']}")
    say(console, f"  cause  {finding.cause}")
    say(console, f"  do     {finding.advice}")
    if finding.override and run is not None:
        say(console, f"  try    {command([finding.override], run)}", style="green")
    if finding.then and run is not None:
        say(console, f"  then   {', then '.join(finding.then)}")
    say(console, f"  source {finding.source}", style="dim")


def _by_reason(unjudged: Iterable[Unjudged]) -> dict[str, list[str]]:
    ids: dict[str, list[str]] = {}
    for rule in unjudged:
        ids.setdefault(rule.reason, []).append(rule.id)
    return ids
