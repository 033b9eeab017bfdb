"""What a run showed: every field of its log as a series, and what is known of the run as a whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from nearfar.arguments import shown
from nearfar.data.files import Json
from nearfar.doctor.fields import CONTEXT, NUMBERS, TEXTS, is_field, matches
from nearfar.doctor.log_tables import LOSSES, Columns, read_columns, read_records, settle_gaps, table_columns
from nearfar.doctor.series import Cell, Series, is_series, number, plain
from nearfar.errors import NearfarError, nearest_name

__all__ = ["Signals"]


class Signals:
    """The records of a run, by field.

    ``records`` are the objects of a ``train_log.jsonl``, oldest first: mappings with ``kind``, ``epoch`` (from 1; a
    log that counts from 0 is read as one) and ``step``, all three optional, and numbers; ``context`` is what does not
    change during the run. ``nearfar.doctor.fields`` lists both. NaN and infinities may be numbers or the texts "NaN",
    "Infinity", "-Infinity".

    Raises ``NearfarError`` for records that are no mappings and for known fields that are not numeric. Text in an
    unknown field is left out.

    >>> run = Signals([{"step": 10, "loss": 4.2}, {"step": 20, "loss": "NaN"}], {"batch_size": 64})
    >>> run.series("loss").values, run.number("batch_size")
    ((4.2, nan), 64.0)
    """

    def __init__(
        self, records: Iterable[Mapping[str, object]], context: Mapping[str, object] | None = None
    ) -> None:
        if isinstance(records, (str, bytes, Mapping)) or not is_series(records):
            raise NearfarError(
                f"records is {type(records).__name__}; a list of mappings of fields to numbers is needed. "
                "Signals.of takes folders, tables and mappings of series"
            )
        _check_context(context)
        self._take(read_records(records), context, null_is_nan=True)

    @classmethod
    def of(
        cls,
        source: object,
        context: Mapping[str, object] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> Signals:
        """From any of the forms that ``diagnose`` takes."""
        _check_context(context)
        if isinstance(source, Signals):
            return source.knowing(context)
        if hasattr(source, "__fspath__") or isinstance(source, str):
            from nearfar.doctor.run import is_run, read_run

            if is_run(source):
                return read_run(source).knowing(context)
            return cls._of_log(Path(os.fspath(source)), names).knowing(context)
        table = table_columns(source)
        if table is None and hasattr(source, "name") and is_series(source):
            if source.name is None:
                raise NearfarError(
                    "signals are a series without a name; pass a mapping that names it, such as {'loss': series}"
                )
            table = {str(source.name): source}
        columns = source if table is None else table
        read = cls.__new__(cls)
        if isinstance(columns, Mapping):
            log = read_columns(columns)
            read._take(log, log.context | dict(context or {}), null_is_nan=False, ordered=True)
            return read
        if is_series(source) and (isinstance(source, Iterator) or hasattr(source, "__len__")):
            read._take(read_records(cast(Iterable[object], source)), context, null_is_nan=True, ordered=True)
            return read
        raise NearfarError(
            f"signals are {type(source).__name__}; give a run folder, a list of log records, or a mapping of "
            "fields to series of numbers"
        )

    @classmethod
    def _of_log(cls, path: Path, names: Mapping[str, str] | None) -> Signals:
        """The log of any trainer, under the doctor's names."""
        from nearfar.doctor.logs import map_names, read_log

        log = read_log(path)
        every = dict.fromkeys(name for record in log.records for name in record if name)
        watched = (names or {}).get("monitor")
        given = {field: name for field, name in (names or {}).items() if field != "monitor"}
        mapped = map_names(every, given, log.validation)
        if watched is not None:
            log.context["monitor"] = _metric_named(watched, mapped.used)
        if not any(field not in ("step", "epoch") for field in mapped.used):
            raise NearfarError(
                f"{log.path} ({log.kind}): none of its names is one that the doctor knows: "
                f"{', '.join(list(every)[:12])}. Say which is the loss: --map loss=NAME."
            )
        field_of = {name: field for field, name in mapped.used.items()}
        if field_of.get("train_loss") == "loss" and _once_an_epoch(log.records, mapped.used.get("epoch")):
            mapped.used["train_loss"] = mapped.used.pop("loss")
            field_of["train_loss"] = "train_loss"
        for name in [name for name in mapped.used if name in NUMBERS and not is_field(name)]:
            values = {
                str(record[mapped.used[name]]) for record in log.records if record.get(mapped.used[name])
            }
            if len(values) == 1:  # of the run as a whole
                log.context[name] = number(values.pop(), name, str(log.path))
            del field_of[mapped.used[name]]
        records = [
            {field_of[name]: value for name, value in record.items() if name in field_of}
            for record in log.records
        ]
        read = cls.__new__(cls)
        read._take(read_records(filter(None, records)), log.context, null_is_nan=True, ordered=True)
        read.unread, read.foreign = log.unread, True
        known = ", ".join(
            f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in log.context.items()
        )
        stated = [f"known of the run: {known}"] if known else []
        read.read_as = [f"{log.kind}: {log.path}", *mapped.lines(), *stated, *log.notes]
        return read

    def knowing(self, context: Mapping[str, object] | None) -> Signals:
        """The same run, with ``context`` beside (and over) what is known of it."""
        if not context:
            return self
        other = Signals.__new__(Signals)
        other.__dict__ |= self.__dict__
        other.context = self.context | dict(context)
        return other

    # -- reading -------------------------------------------------------------------------------------------
    def series(self, name: str) -> Series:
        """A field over the run; empty where the log lacks it."""
        if name not in self._fields:
            return Series(name)
        rows, numbers = self._fields[name]
        return Series.of(name, rows, self._steps[rows], self._epochs[rows], numbers)

    def lists(self, name: str) -> list[tuple[int | None, tuple[float, ...]]]:
        """A field that may be a list, such as quarters of an epoch: (epoch, values) for each record that has it."""
        if name in self._lists:
            return [(self._epoch(row), values) for row, values in self._lists[name]]
        return [(point.epoch, (point.value,)) for point in self.series(name).points]

    def named(self, pattern: str) -> dict[str, Series]:
        """The series of a field like ``*/share``, by what stands for the star; without NaN and infinities."""
        before, after = pattern.split("*")
        matching = {}
        for name in self._fields:
            if matches(pattern, name) and "/cosine/" not in name:
                matching[name[len(before) : len(name) - len(after)]] = self.series(name).finite()
        return {name: series for name, series in matching.items() if series}

    def number(self, name: str) -> float | None:
        """What the context says of ``name`` or, without it, the mean of the series' last part."""
        value = plain(self.context.get(name))
        if isinstance(value, (int, float)):
            return float(value)
        series = self.series(name).finite()
        return series.tail().mean() if series else None

    def text(self, name: str) -> str | None:
        """What context or log say in words; of a log, the last."""
        value = self.context.get(name)
        if isinstance(value, str):
            return value
        return self._texts[name][-1][1] if name in self._texts else None

    def texts(self, name: str) -> dict[int, str]:
        """What the log says in words, by epoch: {} where it says nothing or names no epochs."""
        by_epoch = ((self._epoch(row), text) for row, text in self._texts.get(name, ()))
        return {epoch: text for epoch, text in by_epoch if epoch is not None}

    def mapping(self, name: str) -> Json:
        """A mapping of the context; empty where it is not known."""
        value = self.context.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise NearfarError(
                f"context['{name}'] is {type(value).__name__}; a mapping is needed: {CONTEXT[name]}"
            )
        return dict(value)

    def has(self, pattern: str) -> bool:
        """Whether log or context hold a field."""
        known = self.context.get(pattern)
        if known is not None and not (isinstance(known, Mapping) and not known):
            return True
        if pattern in self._texts:
            return True
        if "*" not in pattern:  # asked hundreds of times, of logs that may have thousands of fields
            return pattern in self._fields or pattern in self._lists
        return any(matches(pattern, name) for name in (*self._fields, *self._lists))

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of all series."""
        return tuple(self._fields) + tuple(self._lists)

    @property
    def last_epoch(self) -> int | None:
        """The last epoch that the log speaks of."""
        last = [self._epoch(int(rows[-1])) for rows, _ in self._fields.values()]
        return max((epoch for epoch in last if epoch is not None), default=None)

    # -- building ------------------------------------------------------------------------------------------
    def _take(
        self, log: Columns, context: Mapping[str, object] | None, null_is_nan: bool, ordered: bool = False
    ) -> None:
        """Keep what was measured; ``ordered``: bring rows that do not come in the order of their steps into it."""
        self.context: Json = dict(log.context) | dict(context or {})
        self.unread = 0  # lines of the log that were no records
        self.foreign = False  # of a trainer that has no options of `nearfar train`
        self.read_as: list[str] = []  # of the log of a different trainer: what was taken for what, in lines
        first = _first_epoch(log)
        #: what was taken for granted in reading, in sentences
        self.assumed = settle_gaps(log, null_is_nan)
        place = np.arange(log.length)
        steps, epochs = _placed(log, "step"), np.floor(_placed(log, "epoch"))
        order = _order(steps, epochs) if ordered else None
        self._steps = np.where(np.isnan(steps), place + 1.0, steps)
        self._epochs = np.where(np.isfinite(epochs), epochs + 1 - first, np.nan)
        if order is not None:
            self._steps, self._epochs = self._steps[order], self._epochs[order]
            place = np.argsort(order)
            self.assumed.append("rows brought into the order of their steps")
        self._fields: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        for name, (rows, numbers, cells) in log.fields.items():
            kept = cells != Cell.EMPTY
            if name not in ("step", "epoch") and kept.any():
                rows, numbers = place[rows[kept]], numbers[kept]
                if order is not None:
                    by_place = np.argsort(rows)
                    rows, numbers = rows[by_place], numbers[by_place]
                self._fields[name] = rows, numbers
        self._lists = {
            name: sorted((int(place[row]), values) for row, values in entries)
            for name, entries in log.lists.items()
        }
        self._texts = {
            name: sorted((int(place[row]), text) for row, text in entries)
            for name, entries in log.texts.items()
        }
        self._check_known()

    def _epoch(self, row: int) -> int | None:
        epoch = self._epochs[row]
        return None if np.isnan(epoch) else int(epoch)

    def _check_known(self) -> None:
        names = (*self._fields, *self._lists, *self.context)
        if names and not any(is_field(name) or name in CONTEXT for name in names):
            offer = nearest_name(names[0], ["loss", "candidates", "uniform_level", "batch_size", "val/MRR"])
            raise NearfarError(
                f"none of the fields is one the doctor knows: {', '.join(map(str, names[:5]))} ({offer}); "
                "docs/doctor.md lists them all"
            )

    # -- comparing -----------------------------------------------------------------------------------------
    def paired(
        self,
        first: Series,
        second: str,
        combine: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
    ) -> Series:
        """``combine`` of two fields, as arrays, where they stand in one record; elsewhere with the mean of the
        second."""
        other = self.series(second).finite()
        beside = np.full(len(self._steps), other.mean())
        beside[other.rows] = other.numbers
        return first.having(combine(first.numbers, beside[first.rows]))


def _metric_named(name: str, used: Mapping[str, str]) -> str:
    """The metric that a log calls ``name``, or that is shown as it, without its ``val/``."""
    metrics = {field[4:]: of_log for field, of_log in used.items() if field.startswith("val/")}
    for metric, of_log in metrics.items():
        if name in (metric, of_log, f"val/{metric}"):
            return metric
    raise NearfarError(f"--map monitor={name}: no metric of the log; {nearest_name(name, list(metrics))}")


def _once_an_epoch(records: Iterable[Mapping[str, object]], epoch: str | None) -> bool:
    """Whether each epoch has one value of ``train_loss``."""
    if epoch is None:
        return False
    epochs = [record.get(epoch) for record in records if record.get("train_loss") not in (None, "")]
    return len(epochs) > 1 and None not in epochs and len(set(map(str, epochs))) == len(epochs)


def _check_context(context: object) -> None:
    if context is not None and not isinstance(context, Mapping):
        raise NearfarError(
            f"context is {type(context).__name__}; a mapping such as {{'batch_size': 64}} is needed"
        )
    for name, value in (context or {}).items():
        value = plain(value)
        wrong = name in NUMBERS and value is not None and not isinstance(value, (int, float))
        if wrong or (isinstance(value, str) and name not in CONTEXT and name not in TEXTS and is_field(name)):
            raise NearfarError(f"context['{name}'] is {shown(value)}; a number is needed")


def _placed(log: Columns, name: str) -> NDArray[np.float64]:
    """What each row says of its step or epoch; NaN where it says nothing."""
    placed = np.full(log.length, np.nan)
    if name in log.fields:
        rows, numbers, _ = log.fields[name]
        placed[rows] = numbers
    return placed


def _first_epoch(log: Columns) -> int:
    """0 for a log that counts the epochs of its training from 0, as many loops do; otherwise 1."""
    epochs = _placed(log, "epoch")
    for name in LOSSES:
        if name in log.fields:
            rows, _, cells = log.fields[name]
            trained = epochs[rows[(cells != Cell.EMPTY) & (cells != Cell.NULL)]]
            if ((trained >= 0) & (trained < 1)).any():
                return 0
    return 1


def _order(steps: NDArray[np.float64], epochs: NDArray[np.float64]) -> NDArray[np.int64] | None:
    """The order of the rows by epoch and step; None where they have it, or their places do not say."""
    known = np.isfinite(steps).all() and len(steps) > 0
    if np.isfinite(epochs).all() and known:
        order = np.lexsort((steps, epochs))
    elif known and len(np.unique(steps)) == len(steps):  # otherwise they may count anew in each epoch
        order = np.argsort(steps, kind="stable")
    elif np.isfinite(epochs).all() and len(np.unique(epochs)) == len(epochs):
        order = np.argsort(epochs, kind="stable")
    else:
        return None
    return None if (np.diff(order) > 0).all() else order
