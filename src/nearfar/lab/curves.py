"""What is drawn of a training, as numbers: the static report draws it as SVG, the board in the browser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypedDict, cast

from nearfar.data.files import Json
from nearfar.terminal import metric_words
from nearfar.training.run_folder import RunFolder

__all__ = [
    "Curves",
    "Line",
    "PlanRecord",
    "hardness_curves",
    "of_kind",
    "plans_in",
    "plans_of",
    "training_curves",
]

#: positions and values of a line
Line = tuple[Sequence[float], Sequence[float]]
#: signals that a probe records of a view: field, title, unit
VIEW_SIGNALS = (
    ("effective_rank", "Effective rank of the embeddings", "dimensions"),
    ("mean_cosine", "Mean cosine of different rows", "cosine (1: collapsed)"),
)


@dataclass(frozen=True)
class Curves:
    """Lines by name over one axis; ``levels`` are dashed horizontals such as the chance level.

    >>> Curves("Loss", {"training": ([1, 2], [4.1, 3.9])}, "step", "nats", {"guessing": 4.2}).to_dict()["levels"]
    {'guessing': 4.2}
    """

    title: str
    series: Mapping[str, Line]
    xlabel: str
    ylabel: str
    levels: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> Json:
        """Plain data."""
        return asdict(self)


class PlanRecord(TypedDict, total=False):
    """What a run logs of the batches of an epoch; hardness is by quarter of the epoch."""

    epoch: int
    sampler: str
    random_phase: bool
    hardness: list[float]
    hardness_random: float
    last_to_first: float | None
    nominal_hard: float | None
    realised_hard: list[float] | None
    false_negatives: float


def of_kind(records: Iterable[Json], kind: str) -> list[Json]:
    """The records of one kind, oldest first."""
    return [record for record in records if record.get("kind") == kind]


def plans_in(records: Iterable[Json]) -> list[PlanRecord]:
    """The plans in a log whose hardness was measured, oldest first."""
    return [cast(PlanRecord, record) for record in of_kind(records, "plan") if record.get("hardness")]


def plans_of(run: RunFolder) -> list[PlanRecord]:
    """The plans in a run's log whose hardness was measured, oldest first."""
    return plans_in(run.log())


def series_of(records: Sequence[Json], field: str, x: str = "step") -> Line:
    """A field over the records that have it."""
    points = [
        (record[x], record[field]) for record in records if record.get(field) is not None and x in record
    ]
    return [at for at, _ in points], [value for _, value in points]


def training_curves(
    records: Iterable[Json], monitor: str | None = None, chance: float | None = None
) -> list[Curves]:
    """Loss between guessing and floor, validation above chance, realised hardness, health of the embeddings.

    Args:
        records: of a run's log, finished or not.
        monitor: the metric that chooses the best epoch; None: as the log says.
        chance: its chance level on validation; None: as the log says.
    """
    records = list(records)
    for start in of_kind(records, "start"):
        monitor = monitor or start.get("monitor")
        chance = (start.get("chance") or {}).get(monitor) if chance is None else chance
    steps, epochs, probes = (of_kind(records, kind) for kind in ("step", "epoch", "probe"))
    curves = []
    if steps:
        levels = {}
        if steps[-1].get("uniform_level") is not None:
            levels["guessing (ln of the candidates)"] = steps[-1]["uniform_level"]
        if steps[-1].get("floor") is not None:
            levels["floor of the loss"] = steps[-1]["floor"]
        loss = {
            "training": series_of(steps, "loss"),
            "validation, random batches": series_of(probes, "val_loss"),
            "training, random batches": series_of(probes, "train_loss_same_composition"),
        }
        if not loss["validation, random batches"][0]:
            del loss["training, random batches"]
        curves.append(_drawn("Training loss", loss, "optimiser step", "loss (nats)", levels))
    curves.append(_validation(of_kind(records, "start"), epochs, monitor, chance))
    if plans := plans_in(records):
        curves.append(hardness_curves({"realised": plans}, plans[0].get("hardness_random")))
    curves += _health(probes)
    return [each for each in curves if each is not None]


def _drawn(
    title: str,
    series: Mapping[str, Line],
    xlabel: str,
    ylabel: str,
    levels: Mapping[str, float] | None = None,
) -> Curves | None:
    """Curves of the lines that have any point; None where none has."""
    lines = {name: line for name, line in series.items() if line[0]}
    return Curves(title, lines, xlabel, ylabel, dict(levels or {})) if lines else None


def _validation(
    start: Sequence[Json], epochs: Sequence[Json], monitor: str | None, chance: float | None
) -> Curves | None:
    measured = [each | {"epoch": 0} for each in start if each.get("val")] + [
        e for e in epochs if e.get("val")
    ]
    names = list(measured[0]["val"]) if measured else []
    shown = [name for name in names if name == monitor or name.endswith(("MRR", "R@10"))] or names[:3]
    series = {
        metric_words(n): series_of([e["val"] | {"epoch": e["epoch"]} for e in measured], n, "epoch")
        for n in shown
    }
    levels = (
        {f"chance, {metric_words(monitor)}": chance} if monitor is not None and chance is not None else {}
    )
    return _drawn("Validation", series, "epoch", "value", levels)


def hardness_curves(plans: Mapping[str, Sequence[PlanRecord]], random_level: float | None) -> Curves:
    """Realised hardness by quarter of every epoch, one line per arm.

    ``plans[arm]`` are the ``plan`` records of a run's log.
    """
    series = {}
    for arm, records in plans.items():
        x = [
            record["epoch"] - 1 + (q + 0.5) / 4 for record in records for q in range(len(record["hardness"]))
        ]
        series[arm] = (x, [value for record in records for value in record["hardness"]])
    return Curves(
        "Realised hardness through the epochs",
        series,
        "epoch (four quarters each)",
        "near neighbours in one batch",
        {"random batches": random_level} if random_level is not None else {},
    )


def _health(probes: Sequence[Json]) -> list[Curves | None]:
    if not probes:
        return []
    curves = []
    views = [key.rsplit("/", 1)[0] for key in probes[-1] if key.endswith("/effective_rank")]
    for name, title, unit in VIEW_SIGNALS:
        lines = {view: series_of(probes, f"{view}/{name}") for view in views}
        levels = {}
        if name == "effective_rank" and views and probes[-1].get(f"{views[0]}/rank_limit"):
            limit = probes[-1][f"{views[0]}/rank_limit"]
            # Far from its limit the curve would lie flat on the axis.
            top = max((max(y) for _, y in lines.values() if y), default=0.0)
            levels = {"most that is possible": limit} if top > 0.25 * limit else {}
        curves.append(_drawn(title, lines, "optimiser step", unit, levels))
    pair = {"alignment of partners": series_of(probes, "alignment")}
    pair |= {f"uniformity, {view}": series_of(probes, f"{view}/uniformity") for view in views}
    pair["gap between the views"] = series_of(probes, "modality_gap")
    title = "Alignment, uniformity, gap (lower: nearer, more spread)"
    curves.append(_drawn(title, pair, "optimiser step", ""))
    return curves
