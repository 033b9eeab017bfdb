"""Options as tables: for ``nearfar options`` and for the pages of the docs, which a test holds against them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from nearfar.config.compose import group_choices
from nearfar.config.options import GroupOf, declared_groups, option_table, to_dict
from nearfar.config.registry import options_class
from nearfar.config.training import RunOptions

__all__ = ["OptionRow", "markdown_table", "option_rows", "options_table"]


class OptionRow(NamedTuple):
    """An option, its default, the values it may have, and what it does."""

    name: str
    default: str
    values: str
    help: str


def option_rows(cls: type, base: type | None = None) -> list[OptionRow]:
    """The options of a dataclass in the order of their declaration, without those of ``base`` with the same default.

    >>> rows = option_rows(RunOptions)
    >>> next(row for row in rows if row.name == "patience")[1:3]
    ('null', 'at least 1, or null')
    """
    inherited = {row.name: row for row in option_rows(base)} if base is not None else {}
    groups = declared_groups(cls)
    rows: list[OptionRow] = []
    for name, each in option_table(cls).items():
        head = name.split(".")[0]
        if head in groups and not any(row.name == head for row in rows):
            rows.append(_group_row(head, groups[head]))
        tag = name in (f"{head}.name", f"{head}.kind", f"{head}.layout") and head in groups
        if name == "system" or tag or (each.place == "model" and head in groups and groups[head].raw):
            continue
        if groups.get(name) and groups[name].raw:
            continue
        if name.count(".") > 1:  # options of a part that has a page of its own
            deep = ".".join(name.split(".")[:2]) + ".*"
            if not any(row.name == deep for row in rows):
                rows.append(OptionRow(deep, "", "", "options of that part, by their own names"))
            continue
        values = str(each.rule) + (", or null" if getattr(each.rule, "optional", False) else "")
        row = OptionRow(name, written(each.default), values, each.help)
        if inherited.get(name) != row:
            rows.append(row)
    return rows


def _group_row(name: str, group: GroupOf) -> OptionRow:
    names = group.names or sorted(group_choices().get(name, ()))
    return OptionRow(name, group.default, ", ".join(names), group.help)


def written(value: object) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping) or is_dataclass(value):
        plain = value if isinstance(value, Mapping) else to_dict(value)
        return "{" + ", ".join(f"{key}: {written(each)}" for key, each in plain.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(written, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def markdown_table(rows: Sequence[OptionRow]) -> str:
    """The rows as a table of Markdown."""
    lines = ["| option | default | values | what it does |", "|---|---|---|---|"]
    for row in rows:
        cells = (f"`{row.name}`", f"`{row.default}`", row.values, row.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def options_table(system: str) -> Iterator[Table]:
    """The options of a system, and those that every run has, as tables of the terminal."""
    cls = options_class(system)
    for title, rows in (
        (f"{system}: {(cls.__doc__ or '').strip().splitlines()[0]}", option_rows(cls, RunOptions)),
        ("every run", option_rows(RunOptions)),
    ):
        table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
        for column in ("option", "default", "values", "what it does"):
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        yield table
