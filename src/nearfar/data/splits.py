"""Splits that can be named and trusted: an order-free hash of ids, and a check that nothing is shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any, Literal

from nearfar.errors import NearfarError
from nearfar.ids import plain_ids
from nearfar.metrics.estimate import split_hash

__all__ = ["check_disjoint", "split_hash"]


def check_disjoint(
    splits: Mapping[str, Iterable[str]],
    what: str = "id",
    on_leak: Literal["count", "error"] = "error",
    keep: int = 3,
) -> dict[str, dict[str, Any]]:
    """Look for values that stand in two splits: the leak that makes a test score look better than it is.

    Values are compared as ids are (`nearfar.ids`): 1 and "1" differ, containers and integer widths do not.

    Args:
        splits: the ids (or canonical structures, or texts) of each split.
        what: the word for one value in messages.
        on_leak: ``"error"`` raises, ``"count"`` returns what was found for the caller to warn about.
        keep: how many shared values to show per pair of splits.

    Returns:
        for each pair with an overlap, ``"train/test"`` → ``{"shared": distinct values, "rows": rows of the
        second split that hold one, "first": the first few}``; empty if the splits are disjoint.

    >>> check_disjoint({"train": ["1", "2"], "test": ["2", "2", "3"]}, on_leak="count")
    {'train/test': {'shared': 1, 'rows': 2, 'first': ['2']}}
    >>> check_disjoint({"train": ["1", "2"], "test": ["2", "3"]})
    Traceback (most recent call last):
    nearfar.errors.NearfarError: Split leak: train and test share 1 id (1 row of test): 2. ...
    """
    values = {name: plain_ids(items, f"{what}s of {name}") for name, items in splits.items()}
    leaks: dict[str, dict[str, Any]] = {}
    for first, second in combinations(values, 2):
        shared = set(values[first]) & set(values[second])
        if shared:
            rows = sum(value in shared for value in values[second])
            leaks[f"{first}/{second}"] = {
                "shared": len(shared),
                "rows": rows,
                "first": sorted(map(str, shared))[:keep],
            }
    if leaks and on_leak == "error":
        parts = []
        for pair, leak in leaks.items():
            first, second = pair.split("/")
            parts.append(
                f"{first} and {second} share {_count(leak['shared'], what)} "
                f"({_count(leak['rows'], 'row')} of {second}): {', '.join(leak['first'])}"
            )
        raise NearfarError(
            "Split leak: " + "; ".join(parts) + ". Remove the shared rows from one of the splits."
        )
    return leaks


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")
