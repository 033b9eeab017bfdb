"""Whether an empty cell of the loss is a step at which nothing was measured, or a loss that was not a number.

``pandas`` has NaN for both, and JSON null for NaN. The row decides: what else it holds, and where else that stands.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from nearfar.doctor.cells import Cell
from nearfar.doctor.fields import FIELDS
from nearfar.doctor.log_tables import Columns

__all__ = ["LOSSES", "settle_gaps"]

#: fields in which a NaN is a finding
LOSSES = ("loss", "train_loss")
#: fields that say where a row stands, not what was measured there
_PLACE = ("step", "epoch", "seconds", "time")
#: share of rows without a number from which a loss is one that is logged now and then
SPARSE = 0.2


def settle_gaps(log: Columns, null_is_nan: bool) -> list[str]:
    """Turn each doubtful cell into a NaN that was logged or an empty one, and say in sentences what was assumed.

    In a log of records (``null_is_nan``) None is as doubtful as NaN; in a column it is empty.
    """
    assumptions = []
    for name, (rows, _, cells) in log.fields.items():
        null = cells == Cell.NULL
        nan = cells == Cell.NAN
        doubtful = nan | null if null_is_nan else nan
        if not null_is_nan:
            cells[null] = Cell.EMPTY
        if name not in LOSSES:
            cells[nan | null] = Cell.EMPTY
            continue
        if not doubtful.any():
            continue
        logged = _logged(log, name, rows, cells, doubtful)
        cells[doubtful & ~logged] = Cell.EMPTY
        cells[logged] = Cell.WRITTEN_NAN
        empty = int((doubtful & ~logged).sum())
        if empty:
            cell = "cell" if empty == 1 else "cells"
            assumptions.append(f"{empty} empty {cell} of '{name}' taken as not measured")
        if name in log.table and logged.any():
            assumptions.append(
                f"{int(logged.sum())} NaN of '{name}' taken as values of the loss, not as empty cells, by what else "
                "their rows hold"
            )
    return assumptions


def _logged(
    log: Columns,
    name: str,
    rows: NDArray[np.int64],
    cells: NDArray[np.uint8],
    doubtful: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Which doubtful cells are values: those in rows that hold what stands beside the loss elsewhere, and, unless the
    loss is logged only now and then, those in rows that nothing else explains."""
    measured = np.zeros(log.length, bool)
    measured[rows[cells == Cell.NUMBER]] = True
    last = int(np.flatnonzero(measured).max(initial=-1))
    beside, elsewhere = np.zeros(log.length, bool), np.zeros(log.length, bool)
    for other, (where, _, contents) in _others(log, name).items():
        here = np.zeros(log.length, bool)
        here[where[np.isin(contents, (Cell.NUMBER, Cell.WRITTEN_NAN))]] = True
        if here.all():  # what stands in every row explains none of them
            continue
        known = here[: last + 1]
        with_loss = (
            bool(measured[: last + 1][known].mean() >= 0.5) if known.any() else other in FIELDS["step"]
        )
        (beside if with_loss else elsewhere).__ior__(here)
    for where_text in (log.texts, log.lists):
        for other, entries in where_text.items():
            here = np.zeros(log.length, bool)
            here[[row for row, _ in entries]] = True
            if not here.all() and not measured[here].any() and other not in _PLACE:
                elsewhere |= here
    place = rows
    unexplained = doubtful & ~beside[place] & ~elsewhere[place]
    if name in log.table:
        unexplained &= _dense(rows, measured, unexplained, last)
    return (doubtful & beside[place]) | unexplained


def _others(
    log: Columns, name: str
) -> Mapping[str, tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.uint8]]]:
    return {other: column for other, column in log.fields.items() if other != name and other not in _PLACE}


def _dense(
    rows: NDArray[np.int64], measured: NDArray[np.bool_], unexplained: NDArray[np.bool_], last: int
) -> NDArray[np.bool_]:
    """For a table that has rows without a loss for no reason in the row: which cells are values all the same.

    Where such rows are few, all of them. Where they are many, the loss is logged now and then, and only what comes
    after its last value, and is more than twice as long as any gap before, is a loss that broke.
    """
    inner = unexplained & (rows < last)
    numbers = int(measured.sum())
    if inner.sum() <= SPARSE * (inner.sum() + numbers):
        return np.ones(len(rows), bool)
    longest = int(np.diff(np.flatnonzero(measured)).max(initial=1)) - 1
    after = unexplained & (rows > last)
    return after if after.sum() > 2 * longest else np.zeros(len(rows), bool)
