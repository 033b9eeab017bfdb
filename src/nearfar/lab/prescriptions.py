"""What the doctor prescribed to a run: the overrides in its ``doctor.json``, the gravest finding first."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from nearfar.training.run_folder import RunFolder

__all__ = ["Prescription", "prescriptions"]

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Prescription:
    """The overrides (``key=value``) that a finding asks to try."""

    finding: str
    severity: str
    overrides: tuple[str, ...]


def prescriptions(folder: RunFolder) -> list[Prescription]:
    """Every prescription of ``doctor.json``; none where the doctor has not been asked, or found nothing to change."""
    if not (folder.path / "doctor.json").exists():
        return []
    content = folder.read_json("doctor.json")
    findings = content.get("findings", []) if isinstance(content, Mapping) else content
    found = []
    for each in findings:
        override = each.get("override")
        overrides = shlex.split(override) if isinstance(override, str) else list(override or ())
        overrides = [text for text in map(str, overrides) if "=" in text]
        if overrides:
            found.append(Prescription(str(each["id"]), str(each.get("severity", "note")), tuple(overrides)))
    return sorted(
        found, key=lambda p: SEVERITIES.index(p.severity) if p.severity in SEVERITIES else len(SEVERITIES)
    )
