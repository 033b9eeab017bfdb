"""Parameters of tests in those combinations that hold every pair of values."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest


def combined(step: int, *, slow: Iterable[object] = (), **axes: Iterable[object]) -> pytest.MarkDecorator:
    """``pytest.mark.parametrize`` with one in ``step`` of the combinations of the values of ``axes``.

    Taken are those whose positions on the axes add up to a multiple of ``step``, as in a Latin square. So where there
    are three axes or more, each of at least ``step`` values, every two values of different axes meet in a test. Those
    with a value in ``slow`` are slow.

    >>> mark = combined(2, a="xy", b="xy", c="xy")
    >>> [each.id for each in mark.args[1]]
    ['x-x-x', 'x-y-y', 'y-x-y', 'y-y-x']
    """
    lists = [list(values) for values in axes.values()]
    assert len(lists) > 2
    assert min(map(len, lists)) >= step
    late, parameters = set(slow), []
    for positions in itertools.product(*(range(len(values)) for values in lists)):
        if sum(positions) % step:
            continue
        chosen = [values[at] for values, at in zip(lists, positions, strict=True)]
        marks = [] if late.isdisjoint(chosen) else [pytest.mark.slow]
        parameters.append(pytest.param(*chosen, id="-".join(map(str, chosen)), marks=marks))
    return pytest.mark.parametrize(tuple(axes), parameters)
