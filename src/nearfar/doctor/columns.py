"""Anyone's own log: a mapping of fields to series of one length, with what is known of the run mixed in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nearfar.doctor.fields import CONTEXT, OF_AN_EPOCH, is_field, matches
from nearfar.doctor.numbers import is_sequence, number, plain
from nearfar.errors import NearfarError

__all__ = ["columns_to_rows"]

_PLACE = ("step", "epoch")
#: lists that are no series
_NAMES = ("loss_weight_names",)


def columns_to_rows(columns: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Records and context of a mapping of series; a single number is a constant.

    Series have one length, with None where nothing was measured. Where ``epoch`` says which epoch each row belongs to,
    fields of an epoch (plans, probes, validation metrics) may instead have one value per epoch. A log whose rows all
    hold such fields and no ``epoch`` has one row per epoch.

    >>> columns_to_rows({"loss": [4.1, 3.9], "candidates": 64, "sampler": "random"})
    ([{'loss': 4.1, 'candidates': 64.0}, {'loss': 3.9, 'candidates': 64.0}], {'sampler': 'random'})
    """
    columns = {str(name): plain(value) for name, value in columns.items()}
    context: dict[str, Any] = {}
    series: dict[str, list[Any]] = {}
    constants: dict[str, Any] = {}
    if isinstance(columns.get("val"), Mapping):
        columns |= {f"val/{name}": plain(value) for name, value in columns.pop("val").items()}
    for name, value in columns.items():
        if is_sequence(value) and name not in _NAMES:
            series[name] = list(value)
            continue
        if name in CONTEXT:
            context[name] = value
        if isinstance(value, str) and name in CONTEXT:
            continue
        if is_field(name):
            constants[name] = number(value, name, "the log")
        elif name not in CONTEXT:
            constants[name] = value
    lengths = {name: len(values) for name, values in series.items()}
    length = _length(series, lengths)
    rows: list[dict[str, Any]] = [{} for _ in range(length)]
    by_epoch = _epochs(series, length)
    for name, values in series.items():
        if len(values) == length:
            for row, value in zip(rows, values, strict=True):
                if value is not None:
                    row[name] = value
        else:
            for at, value in zip(by_epoch, values, strict=True):
                rows[at][name] = value
    for row in rows:
        row |= {name: value for name, value in constants.items() if value is not None}
    if "epoch" not in series and any(_of_an_epoch(name) and None not in v for name, v in series.items()):
        for at, row in enumerate(rows):
            row["epoch"] = at + 1
    return rows, context


def _of_an_epoch(name: str) -> bool:
    return any(matches(pattern, name) for pattern in OF_AN_EPOCH)


def _epochs(series: Mapping[str, list[Any]], length: int) -> list[int]:
    """The last row of each epoch, to which fields of an epoch belong; the first for plans would do as well."""
    epochs = series.get("epoch")
    if epochs is None or len(epochs) != length:
        return []
    return [at for at in range(length) if at + 1 == length or epochs[at + 1] != epochs[at]]


def _length(series: Mapping[str, list[Any]], lengths: Mapping[str, int]) -> int:
    if not series:
        return 1
    long = {name: n for name, n in lengths.items() if not _of_an_epoch(name)} or dict(lengths)
    length = next((long[name] for name in ("loss", *_PLACE) if name in long), next(iter(long.values())))
    allowed = {length}
    epochs = len(_epochs(series, length)) if lengths.get("epoch") == length else length
    for name, n in lengths.items():
        if n in allowed or (_of_an_epoch(name) and n == epochs):
            continue
        other = next(k for k, v in lengths.items() if v == length)
        hint = "; with 'epoch' for each row, fields of an epoch may have one value per epoch"
        raise NearfarError(
            f"series of different lengths: '{other}' has {length} values, '{name}' has {n}. Write None where "
            f"nothing was measured{hint if _of_an_epoch(name) else ''}"
        )
    return length
