"""What the notebooks of this folder share: toy pairs, the doctor on both runs, and their curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nearfar.doctor import Diagnosis, diagnose

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nearfar.doctor import Finding

__all__ = ["Run", "Shown", "show", "toy_pairs"]


def toy_pairs(
    rows: int = 512, noise: float = 0.0, text_width: int = 16, image_width: int = 24, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Texts, 16 numbers each, and what pictures show of them: 24 numbers that hold the same, and noise."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(rows, text_width, generator=generator)
    image = text @ torch.randn(text_width, image_width, generator=generator)
    return text, image + noise * torch.randn(rows, image_width, generator=generator)


@dataclass
class Run:
    """The log of a run: a dictionary for each step or epoch, and what holds for the whole run."""

    log: list[dict[str, Any]] = field(default_factory=list)
    context: dict[str, Any] = field(default_factory=dict)

    def add(self, **fields: Any) -> None:
        self.log.append(fields)

    def diagnose(self) -> Diagnosis:
        return diagnose(self.log, self.context)

    def series(self, name: str) -> list[float]:
        """The values of a field; dots stand for a metric of validation."""
        values = [entry.get(name, entry.get("val", {}).get(name)) for entry in self.log]
        return [float(value) for value in values if value is not None]


@dataclass
class Shown:
    """What `show` has compared."""

    finding: Finding
    broken: Run
    repaired: Run
    curve: str
    levels: Mapping[str, float]

    def figure(self) -> Figure:
        """The curve of both runs beside what guessing costs or gives."""
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(6, 2.4), layout="constrained")
        for name, run, color in (("broken", self.broken, "#c0392b"), ("repaired", self.repaired, "#2471a3")):
            values = run.series(self.curve)
            axes.plot(
                range(1, len(values) + 1),
                values,
                label=name,
                color=color,
                marker="." if len(values) < 12 else "",
            )
        for name, level in self.levels.items():
            axes.axhline(level, color="#7f8c8d", linestyle=":", label=name)
        axes.set_xlabel("log entry")
        axes.set_ylabel(self.curve)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return figure


def show(
    broken: Run, repaired: Run, finding: str, curve: str = "loss", levels: Mapping[str, float] | None = None,
    still: Sequence[str] = (),
) -> Shown:  # fmt: skip
    """Print what the doctor says; the fault must be named in the broken run, and nothing found in the repaired one.

    Args:
        finding: the id that names the fault.
        curve: the field that is drawn.
        levels: lines of the drawing, such as what guessing costs.
        still: findings of the repaired run that are no fault.
    """
    diagnosis, after = broken.diagnose(), repaired.diagnose()
    print("broken:  ", diagnosis.verdict)
    print("repaired:", after.verdict)
    assert finding in diagnosis.ids, f"{finding} is not named: {diagnosis.ids}"
    others = [each.id for each in after.of("warning", "error") if each.id not in still]
    assert finding not in after.ids, f"{finding} is still named"
    assert not others, f"the repaired run has findings: {others}"
    named = next(each for each in diagnosis if each.id == finding)
    print(named)
    return Shown(named, broken, repaired, curve, dict(levels or {}))
