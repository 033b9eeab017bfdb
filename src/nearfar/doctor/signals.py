"""What a run showed: every field of its log as a series, and what is known of the run as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nearfar.doctor.columns import columns_to_rows
from nearfar.doctor.fields import CONTEXT, TEXTS, is_field, matches
from nearfar.doctor.numbers import is_sequence, number, numbers, plain
from nearfar.doctor.series import Point, Series
from nearfar.errors import NearfarError, nearest_name

__all__ = ["Signals"]

#: fields whose null stands for NaN, since that is how a run's log writes one
_NAN_IF_NULL = ("loss", "train_loss")
#: fields of a view, as a log of one view alone may call them
_OF_A_VIEW = ("effective_rank", "rank_limit", "dimensions", "variance", "uniformity", "mean_cosine")
_PLACE = ("kind", "epoch", "step", "val", "estimates")


class Signals:
    """The records of a run, by field.

    ``records`` are the objects of a ``train_log.jsonl``, oldest first: mappings with ``kind``, ``epoch`` (from 1; a
    log that counts from 0 is read as one) and ``step``, all three optional, and numbers; ``context`` is what does not
    change during the run. ``nearfar.doctor.fields`` lists both. NaN and infinities may be numbers or the texts "NaN",
    "Infinity", "-Infinity".

    Raises ``NearfarError`` for records that are no mappings and for known fields that are not numeric. Text in an
    unknown field is nobody's signal and is left out.

    >>> run = Signals([{"step": 10, "loss": 4.2}, {"step": 20, "loss": "NaN"}], {"batch_size": 64})
    >>> run.series("loss").values, run.number("batch_size")
    ((4.2, nan), 64.0)
    """

    def __init__(
        self, records: Iterable[Mapping[str, Any]], context: Mapping[str, Any] | None = None
    ) -> None:
        self.context: dict[str, Any] = dict(context or {})
        self._points: dict[str, list[Point]] = {}
        self._lists: dict[str, list[tuple[int | None, tuple[float, ...]]]] = {}
        self._texts: dict[str, list[tuple[int | None, str]]] = {}
        self.unread = 0  # lines of the log that were no records
        records = list(records)
        self._first = _first_epoch(records)
        for row, record in enumerate(records):
            if not isinstance(record, Mapping):
                raise NearfarError(
                    f"record {row + 1} of the log is {type(record).__name__}, not a mapping of fields to numbers"
                )
            self._take(row, record)
        self._check_known()

    @classmethod
    def of(cls, source: Any, context: Mapping[str, Any] | None = None) -> Signals:
        """From any of the forms that ``diagnose`` takes."""
        if context is not None and not isinstance(context, Mapping):
            raise NearfarError(
                f"context is {type(context).__name__}; a mapping such as {{'batch_size': 64}} is needed"
            )
        if isinstance(source, Signals):
            return source.knowing(context)
        if hasattr(source, "__fspath__") or isinstance(source, str):
            from nearfar.doctor.run import read_run

            return read_run(source).knowing(context)
        if hasattr(source, "to_dict") and hasattr(
            source, "columns"
        ):  # a pandas table, which nothing here imports
            source = source.to_dict("list")
        if isinstance(source, Mapping):
            rows, found = columns_to_rows(source)
            return cls(rows, found | dict(context or {}))
        if is_sequence(source):
            return cls(source, context)
        raise NearfarError(
            f"signals are {type(source).__name__}; give a run folder, a list of log records, or a mapping of "
            "fields to series of numbers"
        )

    def knowing(self, context: Mapping[str, Any] | None) -> Signals:
        """The same run, with ``context`` beside (and over) what is known of it."""
        if not context:
            return self
        other = Signals((), self.context | dict(context))
        other._points, other._lists, other._texts = self._points, self._lists, self._texts
        other.unread = self.unread
        return other

    # -- reading -------------------------------------------------------------------------------------------
    def series(self, name: str) -> Series:
        """A field over the run; empty where the log lacks it."""
        return Series(name, tuple(self._points.get(name, ())))

    def lists(self, name: str) -> list[tuple[int | None, tuple[float, ...]]]:
        """A field that may be a list, such as quarters of an epoch: (epoch, values) for each record that has it."""
        if name in self._lists:
            return self._lists[name]
        return [(point.epoch, (point.value,)) for point in self._points.get(name, ())]

    def named(self, pattern: str) -> dict[str, Series]:
        """The series of a field like ``*/share``, by what stands for the star; without NaN and infinities."""
        before, after = pattern.split("*")
        found = {}
        for name in self._points:
            if matches(pattern, name) and "/cosine/" not in name:
                found[name[len(before) : len(name) - len(after)]] = self.series(name).finite()
        return {name: series for name, series in found.items() if series}

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
        return {epoch: text for epoch, text in self._texts.get(name, ()) if epoch is not None}

    def mapping(self, name: str) -> Mapping[str, Any]:
        """A mapping of the context; empty where it is not known."""
        value = self.context.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise NearfarError(
                f"context['{name}'] is {type(value).__name__}; a mapping is needed: {CONTEXT[name]}"
            )
        return value

    def has(self, pattern: str) -> bool:
        """Whether log or context hold a field."""
        known = self.context.get(pattern)
        if known is not None and not (isinstance(known, Mapping) and not known):
            return True
        if pattern in self._texts:
            return True
        return any(matches(pattern, name) for name in (*self._points, *self._lists))

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of all series."""
        return tuple(self._points) + tuple(self._lists)

    @property
    def last_epoch(self) -> int | None:
        """The last epoch that the log speaks of."""
        found = [p.epoch for points in self._points.values() for p in points[-1:] if p.epoch is not None]
        return max(found, default=None)

    # -- building ------------------------------------------------------------------------------------------
    def _take(self, row: int, record: Mapping[str, Any]) -> None:
        where = f"record {row + 1} of the log"
        step = number(record.get("step"), "step", where)
        epoch = number(record.get("epoch"), "epoch", where)
        at = None if epoch is None or not math.isfinite(epoch) else math.floor(epoch) + 1 - self._first
        place = (row, float(row + 1) if step is None else step, at)
        for name, value in record.items():
            if name in _PLACE:
                continue
            if name in _NAN_IF_NULL and value is None:
                value = math.nan
            self._put(str(name), value, place, where)
        for name, value in _mapping(record.get("val"), "val", where).items():
            self._put(f"val/{name}", value, place, where)
        if record.get("estimates"):
            self.context.setdefault("estimates", {})
            self.context["estimates"] = {**self.context["estimates"], **record["estimates"]}

    def _put(self, name: str, value: Any, place: tuple[int, float, int | None], where: str) -> None:
        points = self._points.get(name)
        if points is not None and type(value) is float:  # nearly every value of a log
            points.append(Point(*place, value))
            return
        value = plain(value)
        if value is None:
            return
        if name in _OF_A_VIEW:
            name = f"embeddings/{name}"
        if name in TEXTS or (isinstance(value, str) and name in CONTEXT and not is_field(name)):
            if isinstance(value, str):
                self._texts.setdefault(name, []).append((place[2], value))
            return
        if is_sequence(value):
            if is_field(name):
                self._lists.setdefault(name, []).append((place[2], numbers(value, name, where)))
            return
        if isinstance(value, (Mapping, str)) and not is_field(name):
            try:
                found = number(value, name, where)
            except NearfarError:
                return
        else:
            found = number(value, name, where)
        if found is not None:
            self._points.setdefault(name, []).append(Point(*place, found))

    def _check_known(self) -> None:
        names = (*self._points, *self._lists, *self.context)
        if names and not any(is_field(name) or name in CONTEXT for name in names):
            offer = nearest_name(names[0], ["loss", "candidates", "uniform_level", "batch_size", "val/MRR"])
            raise NearfarError(
                f"none of the fields is one the doctor knows: {', '.join(map(str, names[:5]))} ({offer}); "
                "docs/doctor.md lists them all"
            )

    # -- comparing -----------------------------------------------------------------------------------------
    def paired(self, first: Series, second: str, combine: Callable[[float, float], float]) -> Series:
        """``combine`` of two fields where they stand in one record; elsewhere with the mean of the second."""
        other = self.series(second).finite()
        by_row = {point.row: point.value for point in other.points}
        middle = other.mean()
        return Series(
            first.name,
            tuple(
                Point(p.row, p.step, p.epoch, combine(p.value, by_row.get(p.row, middle)))
                for p in first.points
            ),
        )


def _first_epoch(records: Iterable[Any]) -> int:
    """0 for a log that counts the epochs of its training from 0, as many loops do; otherwise 1."""
    for record in records:
        trains = isinstance(record, Mapping) and any(
            record.get(name) is not None for name in ("loss", "train_loss")
        )
        epoch = number(record.get("epoch"), "epoch", "the log") if trains else None
        if epoch is not None and 0 <= epoch < 1:
            return 0
    return 1


def _mapping(value: Any, name: str, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise NearfarError(
            f"{where}: {name} is {type(value).__name__}; a mapping of metrics to numbers is needed"
        )
    return value
