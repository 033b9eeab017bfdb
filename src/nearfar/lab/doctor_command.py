"""A diagnosis in the terminal: the verdict first, then each finding with what to do, then what could not be judged."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nearfar.doctor import Diagnosis, Finding, Unjudged, diagnose, read_run
from nearfar.terminal import say
from nearfar.training.run_folder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["command", "examine", "print_diagnosis"]

#: a value in quotes that it does not need, which the shell's own would make unreadable
_QUOTED = re.compile(r"^([^=]+=)'([\w./:@-]+)'$")
_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}


def examine(run: Path, warn: Callable[[str], None] = print) -> Diagnosis:
    """Diagnose a run folder and write its ``doctor.json``; where that cannot be written, ``warn`` gets the reason."""
    signals = read_run(run)
    diagnosis = diagnose(signals)
    folder = run.parent if run.name == "train_log.jsonl" else run
    try:
        RunFolder(folder).write_json("doctor.json", diagnosis.to_dict())
    except OSError as error:
        warn(f"doctor.json was not written: {error}")
    return diagnosis


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
    for finding in diagnosis:
        say(console, "")
        _print_finding(finding, run, console)
    say(console, "")
    say(
        console,
        f"next   nearfar doctor {shlex.quote(str(run))} --what-if   the same batches under other options",
    )
    say(console, f"       nearfar doctor {shlex.quote(str(run))} --try 100   whether a change helps")
    if diagnosis.unjudged:
        say(console, "")
        say(console, "Not judged:", style="bold")
        for reason, ids in _by_reason(diagnosis.unjudged).items():
            say(console, f"  {', '.join(ids)}: {reason}", style="dim")


def _style(diagnosis: Diagnosis) -> str:
    if not diagnosis.judged:
        return "bold yellow"
    return "bold green" if diagnosis.healthy else "bold red"


def _print_finding(finding: Finding, run: Path, console: Console) -> None:
    say(console, finding.severity, style=_STYLES[finding.severity], end=" ")
    say(console, f"{finding.id}: {finding.title}", style="bold")
    say(console, f"  seen   {finding.evidence['text']}")
    say(console, f"  cause  {finding.cause}")
    say(console, f"  do     {finding.advice}")
    if finding.override:
        say(console, f"  try    {command([finding.override], run)}", style="green")
    if finding.then:
        say(console, f"  then   {', then '.join(finding.then)}")
    say(console, f"  source {finding.source}", style="dim")


def _by_reason(unjudged: Iterable[Unjudged]) -> dict[str, list[str]]:
    ids: dict[str, list[str]] = {}
    for rule in unjudged:
        ids.setdefault(rule.reason, []).append(rule.id)
    return ids
