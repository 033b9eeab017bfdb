"""Filters by column: ``price<10``, ``lang=de``, ``kind in a,b``. One parser; each store translates the conditions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nearfar.errors import NearfarError, nearest_name

__all__ = ["Condition", "Kind", "Value", "parse_where"]

#: what a column of a store holds
Kind = Literal["text", "number", "boolean"]
Value = str | float | bool
Operator = Literal["in", "not in", "<", "<=", ">", ">="]

_OPERATORS: dict[str, Operator] = {
    "=": "in", "==": "in", "!=": "not in", "<>": "not in", "in": "in", "not in": "not in",
    "<": "<", "<=": "<=", ">": ">", ">=": ">=",
}  # fmt: skip
_REST = r"\s*(?P<op><=|>=|!=|<>|==|=|<|>|\s(?:not\s+in|in)\s)\s*(?P<value>.*)"
_PIECE = re.compile(rf"""\s*(?P<column>"(?:[^"]|"")*"|[^=<>!"]+?){_REST}""", re.IGNORECASE | re.DOTALL)
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Condition:
    """One condition on a column. A row that lacks the value fails it, also where it says ``!=`` or ``not in``.

    ``values`` has the column's kind: several for ``in`` and ``not in``, one for the operators of order.
    """

    column: str
    kind: Kind
    operator: Operator
    values: tuple[Value, ...]

    def __str__(self) -> str:
        shown = [
            str(value).lower()
            if self.kind == "boolean"
            else f"{value:g}"
            if self.kind == "number"
            else str(value)
            for value in self.values
        ]
        if self.operator in ("in", "not in") and len(shown) == 1:
            return f"{self.column} {'=' if self.operator == 'in' else '!='} {shown[0]}"
        return f"{self.column} {self.operator} {', '.join(shown)}"


def parse_where(where: str | Sequence[str] | None, kinds: Mapping[str, Kind]) -> list[Condition]:
    """The conditions of a filter, all of which a row has to meet.

    ``column=value``, ``!=``, ``<``, ``<=``, ``>``, ``>=``, ``column in a,b`` and ``column not in a,b``; several are
    joined by commas, or given as several texts. Texts are compared exactly; order is for columns of numbers. A value or
    a name that holds a comma or a sign of the grammar stands in double quotes (a quote in it is doubled).

    Args:
        where: the filter; None: no condition.
        kinds: the columns that there are, and what they hold.

    Raises:
        NearfarError: an unknown column (with the nearest name), no operator, no value, a value of a different kind.

    >>> kinds = {"lang": "text", "price": "number"}
    >>> [str(condition) for condition in parse_where('lang in de,"en, GB",price<9.5', kinds)]
    ['lang in de, en, GB', 'price < 9.5']
    >>> parse_where("pirce<3", kinds)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: filter 'pirce<3': the gallery has no column 'pirce'; did you mean 'price'?
    """
    if where is None:
        return []
    texts = [where] if isinstance(where, str) else list(where)
    return [condition for text in texts for condition in _conditions(text, kinds)]


def _conditions(text: str, kinds: Mapping[str, Kind]) -> list[Condition]:
    conditions: list[tuple[str, Operator, list[str]]] = []
    for piece in _pieces(text):
        match = _match(piece, kinds)
        if match is not None:
            operator = _OPERATORS[" ".join(match["op"].lower().split())]
            conditions.append((_unquoted(match["column"]), operator, [match["value"]]))
            listed = match["op"].strip().lower() not in ("=", "==", "!=", "<>")
            open_list = operator in ("in", "not in") and listed
        elif conditions and open_list:
            conditions[-1][2].append(piece)
        else:
            raise NearfarError(
                f"filter {text!r}: {piece.strip()!r} is no condition. Write COLUMN=VALUE, COLUMN<VALUE or COLUMN in "
                "A,B; a value that holds a comma stands in double quotes."
            )
    if not conditions:
        raise NearfarError(
            f"filter {text!r} holds no condition. Write COLUMN=VALUE, or leave the filter out."
        )
    return [_condition(text, column, operator, values, kinds) for column, operator, values in conditions]


def _match(piece: str, columns: Iterable[str]) -> re.Match[str] | None:
    """The parts of a condition; a name of a column may hold words and signs of the grammar."""
    for column in sorted(columns, key=len, reverse=True):
        if piece.strip().startswith(column):
            match = re.fullmatch(
                rf"\s*(?P<column>{re.escape(column)}){_REST}", piece, re.IGNORECASE | re.DOTALL
            )
            if match is not None:
                return match
    return _PIECE.fullmatch(piece)


def _pieces(text: str) -> list[str]:
    """The parts between commas that stand outside of quotes."""
    pieces, start, inside = [], 0, False
    for at, sign in enumerate(text):
        if sign == '"':
            inside = not inside
        elif sign == "," and not inside:
            pieces.append(text[start:at])
            start = at + 1
    if inside:
        raise NearfarError(f"filter {text!r}: a double quote is not closed.")
    pieces.append(text[start:])
    return pieces if text.strip() else []


def _unquoted(text: str) -> str:
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1].replace('""', '"')
    return text


def _condition(
    text: str, column: str, operator: Operator, raw: Sequence[str], kinds: Mapping[str, Kind]
) -> Condition:
    if column not in kinds:
        known = nearest_name(column, kinds) if kinds else "it has no columns to filter by"
        raise NearfarError(f"filter {text!r}: the gallery has no column '{column}'; {known}")
    kind = kinds[column]
    if operator not in ("in", "not in") and kind != "number":
        raise NearfarError(
            f"filter {text!r}: the column '{column}' holds {_plural(kind)}, and {operator} compares numbers. Use = , "
            "!= or in."
        )
    values = []
    for value in raw:
        if not value.strip():
            raise NearfarError(f"filter {text!r}: a value of '{column}' is empty; an empty text is \"\".")
        values.append(_value(text, column, _unquoted(value), kind))
    return Condition(column, kind, operator, tuple(dict.fromkeys(values)))


def _value(text: str, column: str, value: str, kind: Kind) -> Value:
    if kind == "text":
        return value
    if kind == "boolean":
        if value.lower() in _BOOLEANS:
            return _BOOLEANS[value.lower()]
    else:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    wanted = "a number" if kind == "number" else "true or false"
    raise NearfarError(
        f"filter {text!r}: the column '{column}' holds {_plural(kind)}, and {value!r} is not {wanted}."
    )


def _plural(kind: Kind) -> str:
    return {"text": "texts", "number": "numbers", "boolean": "true or false"}[kind]
