"""Values that change over training, as pure functions of the position.

Nothing here counts steps: the same epoch gives the same value, so that a resumed run continues where it was
and a table of the whole run can be printed before it starts. Numbers are finite; they may be NumPy's or a 0-d
tensor's, and texts, since YAML reads 1e-4 as one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from nearfar.arguments import choice, flag, number, shown
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "Constant",
    "Linear",
    "Piecewise",
    "Schedule",
    "Step",
    "learning_rate_factor",
    "schedule",
]


class Schedule(Protocol):
    """A value for every position (in epochs, from 0, fractions allowed) of a run of ``total`` epochs."""

    def __call__(self, epoch: float, total: float | None = None) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The same value throughout.

    >>> Constant(0.5)(epoch=7)
    0.5
    """

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _number(self.value, "value"))

    def __call__(self, epoch: float, total: float | None = None) -> float:
        _check_position(epoch, total)
        return self.value


@dataclass(frozen=True)
class Linear:
    """From ``start`` in the first epoch to ``end`` in the last one, epoch ``total − 1``, and constant after.

    >>> [round(Linear(0.3, 0.8)(epoch, total=6), 2) for epoch in range(7)]
    [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8]
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _number(self.start, "start"))
        object.__setattr__(self, "end", _number(self.end, "end"))

    def __call__(self, epoch: float, total: float | None = None) -> float:
        last = _check_position(epoch, total, needs_total="linear") - 1
        if epoch >= last:
            return self.end if last > 0 else self.start
        return self.start + (self.end - self.start) * float(epoch) / last


@dataclass(frozen=True)
class Step:
    """One value after the other, each for an equal share of the run.

    >>> [Step((0.3, 0.6, 0.8))(epoch, total=6) for epoch in range(6)]
    [0.3, 0.3, 0.6, 0.6, 0.8, 0.8]
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        values = tuple(_number(value, "values") for value in _listed("values", self.values, "numbers"))
        if not values:
            raise NearfarError("a step schedule has no values; give at least one")
        object.__setattr__(self, "values", values)

    def __call__(self, epoch: float, total: float | None = None) -> float:
        length = _check_position(epoch, total, needs_total="step")
        return self.values[min(math.floor(epoch * len(self.values) / length), len(self.values) - 1)]


@dataclass(frozen=True)
class Piecewise:
    """Values fixed at certain epochs, and between them either a line or the last value ("linear" or "step").

    Before the first point its value holds, after the last one the last.

    >>> rising = Piecewise([(0, 0.25), (5, 0.5), (10, 0.75)])
    >>> rising(2.5), rising(20)
    (0.375, 0.75)
    >>> Piecewise([(0, 0.3), (5, 0.6)], interpolation="step")(4.9)
    0.3
    """

    points: Sequence[tuple[float, float]]
    interpolation: str = "linear"

    def __post_init__(self) -> None:
        choice("interpolation", self.interpolation, ["linear", "step"])
        points = tuple(_point(point) for point in _listed("points", self.points, "pairs (epoch, value)"))
        if not points:
            raise NearfarError("a piecewise schedule has no points; give pairs (epoch, value)")
        if any(after[0] <= before[0] for before, after in pairwise(points)):
            raise NearfarError(f"the epochs of the points must rise, but they are {[at for at, _ in points]}")
        object.__setattr__(self, "points", points)

    def __call__(self, epoch: float, total: float | None = None) -> float:
        _check_position(epoch, total)
        before = [point for point in self.points if point[0] <= epoch]
        if not before:
            return self.points[0][1]
        at, value = before[-1]
        epoch = float(epoch)
        if self.interpolation == "step" or len(before) == len(self.points):
            return value
        next_at, next_value = self.points[len(before)]
        share = (epoch - at) / (next_at - at)
        return (1 - share) * value + share * next_value


@dataclass(frozen=True)
class _Whole:
    """A schedule whose values are rounded to whole numbers (half up, so that a table by hand agrees)."""

    inner: Schedule

    def __call__(self, epoch: float, total: float | None = None) -> int:
        return math.floor(number("the value of the schedule", self.inner(epoch, total)) + 0.5)


def schedule(spec: object, *, integer: bool = False) -> Schedule:
    """The schedule that ``spec`` describes; ``integer=True`` rounds its values (``hardness_k``).

    A number is constant. ``"0.3 -> 0.6 -> 0.8"`` takes equal parts of the run in steps, ``"linear 0.3 ->
    0.8"`` goes evenly. A mapping has ``kind`` (constant, linear, step, piecewise) and the fields of that
    class. A schedule is returned as it is.

    >>> hardness_k = schedule("100 -> 30", integer=True)
    >>> hardness_k(0, total=20), hardness_k(19, total=20)
    (100, 30)
    >>> schedule({"kind": "piecewise", "points": [[0, 0.3], [10, 0.8]]})(5)
    0.55
    >>> schedule("liner 0.3 -> 0.8")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: schedule 'liner 0.3 -> 0.8': 'liner' is no kind, did you mean 'linear'?
    """
    built = _read(spec)
    return _Whole(built) if flag("integer", integer) else built


def learning_rate_factor(
    name: str = "constant", *, warmup: float = 0.0, final: float = 0.0
) -> Callable[[int, int], float]:
    """A function (step, total steps) → factor of the learning rate: "constant", "cosine" or "linear".

    The factor rises to 1 over the first share ``warmup`` (0 to below 1) of the steps, and then stays, or
    falls to ``final`` at the end. The first step's factor is above 0, so that no batch is wasted.

    >>> factor = learning_rate_factor("cosine", warmup=0.1)
    >>> [round(factor(step, 100), 3) for step in (0, 9, 10, 55, 100)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    choice("the name of the learning-rate schedule", name, _DECAYS)
    warmup, final = _number(warmup, "warmup"), _number(final, "final")
    if not 0.0 <= warmup < 1.0:
        raise NearfarError(f"warmup is {warmup}, but it is a share of the steps from 0 to below 1")
    decay = _DECAYS[name]

    def factor(step: float, total: float) -> float:
        step, total = number("step", step), number("total", total)
        if total < 1 or step < 0:
            raise NearfarError(
                f"step is {step:g} and total {total:g}: steps count from 0, and a run has at least one"
            )
        rising = math.ceil(warmup * total)
        if step < rising:
            return (step + 1) / rising
        along = min((step - rising) / max(total - rising, 1), 1.0)
        return final + (1.0 - final) * decay(along)

    return factor


_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda along: 1.0,
    "cosine": lambda along: 0.5 * (1.0 + math.cos(math.pi * along)),
    "linear": lambda along: 1.0 - along,
}
_KINDS: dict[str, Callable[..., Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "step": Step,
    "piecewise": Piecewise,
}


def _read(spec: object) -> Schedule:
    if isinstance(spec, str):
        return _read_text(spec)
    if isinstance(spec, Mapping):
        fields = {str(key): value for key, value in spec.items()}
        kind = str(fields.pop("kind", ""))
        if kind not in _KINDS:
            raise NearfarError(f"spec: a schedule's kind is {kind!r}: {nearest_name(kind, _KINDS)}")
        try:
            return _KINDS[kind](**fields)
        except TypeError as error:
            raise NearfarError(f"the {kind} schedule does not take {shown(fields)}: {error}") from error
        except NearfarError as error:
            raise NearfarError(f"the {kind} schedule: {error}") from None
    if callable(spec) and not isinstance(spec, type):
        return spec
    try:
        return Constant(number("spec", spec))
    except NearfarError:
        raise NearfarError(
            f"spec is {shown(spec)}, which is no schedule; give a finite number, such as 0.5, '0.3 -> 0.6 -> 0.8', or "
            "a mapping with kind"
        ) from None


def _read_text(text: str) -> Schedule:
    match = re.fullmatch(r"\s*([A-Za-z_]+)?\s*(.*?)\s*", text)
    word, numbers = (match.group(1), match.group(2)) if match else (None, text)
    if word is not None and word not in ("constant", "linear", "step"):
        hint = nearest_name(word, ["constant", "linear", "step"])
        raise NearfarError(f"schedule {text!r}: {word!r} is no kind, {hint}")
    values = tuple(_of_text(part.strip(), text) for part in re.split(r"->|→", numbers))
    if word == "linear":
        if len(values) != 2:
            raise NearfarError(
                f"schedule {text!r}: linear goes from one number to another, as in 'linear 0.3 -> 0.8'"
            )
        return Linear(*values)
    if word == "constant" and len(values) != 1:
        raise NearfarError(f"schedule {text!r}: constant takes one number")
    return Step(values) if len(values) > 1 else Constant(values[0])


def _of_text(part: str, text: str) -> float:
    try:
        return number("", part, text=True)
    except NearfarError:
        raise NearfarError(
            f"schedule {text!r}: {part!r} is no number that is finite; write for example '0.3 -> 0.6 -> 0.8'"
        ) from None


def _number(value: object, name: str) -> float:
    """A finite number, as a text too: YAML 1.1 reads 1e-4 as one."""
    return number(name, value, text=True)


def _listed(name: str, values: object, what: str) -> list[object]:
    if (
        isinstance(values, (str, bytes, Mapping, set))
        or not isinstance(values, Iterable)
        or getattr(values, "ndim", 1) == 0
    ):
        raise NearfarError(f"{name} is {shown(values)}; a list of {what} is needed")
    return list(values)


def _point(point: object) -> tuple[float, float]:
    pair = _listed("points", point, "pairs (epoch, value)")
    if len(pair) != 2:
        raise NearfarError(f"points hold {shown(point)}; each is a pair (epoch, value)")
    return _number(pair[0], "the epoch of one of the points"), _number(
        pair[1], "the value of one of the points"
    )


def _check_position(epoch: float, total: float | None, needs_total: str | None = None) -> float:
    if not number("epoch", epoch) >= 0:
        raise NearfarError(f"a schedule starts at epoch 0, but was asked for epoch {epoch}")
    if total is None:
        if needs_total is not None:
            raise NearfarError(f"a {needs_total} schedule needs the length of the run; call it with total=")
        return math.inf
    length = number("total", total)
    if not length > 0:
        raise NearfarError(f"the total is {total} epochs, but a run has more than 0")
    return length
