"""Pairs of items that somebody marked as no negatives of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from nearfar.data.sources import read_items
from nearfar.errors import NearfarError
from nearfar.mining.false_negatives import is_marked

__all__ = ["read_excluded"]


def read_excluded(path: Path, ids: Sequence[str], say: Callable[[str], None]) -> Int[np.ndarray, "n k"]:
    """For each item the numbers of those that are no negatives of it, −1 behind the last.

    The table has the columns ``query_id`` and ``negative_id``; where it has a column ``false_negative``, the rows count
    that are marked in it (1, yes), otherwise all. Both items of a pair leave each other out. Rows of items that are
    not in training are counted and said.

    Raises:
        NearfarError: a file that cannot be read, a column that is missing, a mark that is no mark, or no pair at all.
    """
    table = read_items(path)
    for name in ("query_id", "negative_id"):
        if name not in table:
            raise NearfarError(
                f"exclude={path}: there is no column '{name}'; it has {', '.join(table.columns) or 'none'}."
            )
    rows = range(len(table))
    if "false_negative" in table:
        present = table.present("false_negative")
        marks = table["false_negative"]
        rows = [i for i in rows if present[i] and is_marked(marks[i], f"exclude={path}, row {i + 1}")]  # type: ignore[assignment]
    number = {str(identity): i for i, identity in enumerate(ids)}
    pairs: set[tuple[int, int]] = set()
    unknown = 0
    for i in rows:
        first, second = (number.get(str(table[name][i])) for name in ("query_id", "negative_id"))
        if first is None or second is None:
            unknown += 1
        elif first != second:
            pairs |= {(first, second), (second, first)}
    if unknown:
        say(
            f"exclude: {unknown} of {len(rows)} pairs name items that are not in training; they have no effect"
        )
    if not pairs:
        marked = (
            " that is marked in its column false_negative (1 or yes)" if "false_negative" in table else ""
        )
        raise NearfarError(f"exclude={path}: it has no pair of training items{marked}; leave exclude out.")
    say(f"exclude: {len(pairs) // 2} pairs are no negatives of each other")
    lists: list[list[int]] = [[] for _ in ids]
    for first, second in sorted(pairs):
        lists[first].append(second)
    width = max(map(len, lists))
    return np.array([each + [-1] * (width - len(each)) for each in lists], dtype=np.int64)
