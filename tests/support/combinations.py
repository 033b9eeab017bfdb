"""Parameters of tests in all combinations, of which a quick run takes those that hold every pair of values."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest


def combined(step: int, *, slow: Iterable[object] = (), **axes: Iterable[object]) -> pytest.MarkDecorator:
    """``pytest.mark.parametrize`` with every combination of the values of ``axes``; all but one in ``step`` are slow.

    Quick are those whose positions on the axes add up to a multiple of ``step``, as in a Latin square. So where there
    are three axes or more, each of at least ``step`` values, every two values of different axes meet in a quick test.
    Values in ``slow`` are in no quick test.

    >>> mark = combined(2, a="xy", b="xy", c="xy")
    >>> [each.id for each in mark.args[1] if not each.marks]
    ['x-x-x', 'x-y-y', 'y-x-y', 'y-y-x']
    """
    lists = [list(values) for values in axes.values()]
    assert len(lists) > 2
    assert min(map(len, lists)) >= step
    left_out, parameters = set(slow), []
    for positions in itertools.product(*(range(len(values)) for values in lists)):
        chosen = [values[at] for values, at in zip(lists, positions, strict=True)]
        marks = [pytest.mark.slow] if sum(positions) % step or not left_out.isdisjoint(chosen) else []
        parameters.append(pytest.param(*chosen, id="-".join(map(str, chosen)), marks=marks))
    return pytest.mark.parametrize(tuple(axes), parameters)
