"""What a metric returns: a value with its interval, its sample size, and what guessing would have scored.

A bare number misleads in four ways: it hides how few items stand behind it, that ten of ten candidates are
always among the first ten, that the gallery of the other paper was smaller, and that the split was different
one. An ``Estimate`` carries all four, and ``comparable`` refuses when they differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nearfar.arguments import any_number, flag, instance, mapping, shown, text, whole_number
from nearfar.data.files import Json
from nearfar.directions import lower_is_better
from nearfar.errors import NearfarError

__all__ = ["Estimate", "comparable"]

# How the interval was computed does not change what was measured.
_NOT_IDENTITY = frozenset({"interval", "confidence", "resamples", "seed"})


@dataclass(frozen=True)
class Estimate:
    """A measured value and everything needed to judge it.

    ``low`` and ``high`` bound the interval, ``chance`` is what guessing scores in expectation (NaN where that is
    unknown), ``n`` counts the items behind the value, ``trivial`` says that the value could not have been different
    (``k`` reaches the gallery), ``metric`` names it, and ``protocol`` states how it was measured: ``gallery`` (number
    of candidates), ``split`` (hash of the item ids, see ``split_hash``), ``direction``, the ``interval`` method, its
    ``confidence``, and what else a metric needs.

    ``higher_is_better`` says which way the metric is better, by default by its name
    (``nearfar.directions.lower_is_better``); ``unit`` what its value counts, such as "nats", empty for shares and
    scores without one. Everything that compares or ranks asks these.

    ``control`` marks what no claim rests on, such as a majority answer, an untrained model or shuffled labels: it is
    measured to judge a result by. ``nearfar compare`` shows controls apart and does not count them among its tests.

    ``str`` gives the value, interval, chance level and sizes; a float format gives the numbers alone.

    >>> e = Estimate(0.586, 0.569, 0.603, 10 / 3300, 3300, False, "R@10", {"gallery": 3300})
    >>> print(e)
    R@10 .586 [.57, .60] (chance .003, gallery 3300, n 3300)
    >>> f"{e:.3f}"
    '0.586 [0.569, 0.603]'
    >>> Estimate.from_dict(e.to_dict()) == e
    True
    """

    value: float
    low: float
    high: float
    chance: float
    n: int
    trivial: bool
    metric: str
    protocol: Mapping[str, Any] = field(default_factory=dict, hash=False)
    higher_is_better: bool | None = None
    unit: str = ""
    control: bool = False

    def __post_init__(self) -> None:
        # Plain numbers, of whatever type they came: what is written to a file has no others.
        for name in ("value", "low", "high", "chance"):
            object.__setattr__(self, name, any_number(name, getattr(self, name)))
        object.__setattr__(self, "n", whole_number("n", self.n, 0))
        object.__setattr__(self, "trivial", flag("trivial", self.trivial))
        text("metric", self.metric)
        mapping("protocol", self.protocol)
        text("unit", self.unit)
        if self.higher_is_better is None:
            object.__setattr__(self, "higher_is_better", not lower_is_better(self.metric))
        object.__setattr__(self, "higher_is_better", flag("higher_is_better", self.higher_is_better))
        object.__setattr__(self, "control", flag("control", self.control))

    def __str__(self) -> str:
        notes = [] if math.isnan(self.chance) else [f"chance {_number(self.chance, None)}"]
        if "gallery" in self.protocol:
            notes.append(f"gallery {self.protocol['gallery']}")
        notes.append(f"n {self.n}")
        if self.protocol.get("without_relevant"):
            notes.append(f"{self.protocol['without_relevant']} queries without relevant item left out")
        if self.trivial:
            notes.append("trivial")
        decimals = _decimals(self.low, self.high)
        value = _number(self.value, max(decimals + 1, 3) if abs(self.value) < 1 else decimals + 1)
        interval = f"[{_number(self.low, decimals)}, {_number(self.high, decimals)}]"
        return f"{self.metric} {value} {interval} ({', '.join(notes)})"

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(self)
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def to_dict(self) -> dict[str, object]:
        """A mapping that strict JSON can hold: NaN and infinities become the texts that ``float`` reads."""
        return {
            "metric": self.metric,
            "value": _to_json(self.value),
            "low": _to_json(self.low),
            "high": _to_json(self.high),
            "chance": _to_json(self.chance),
            "n": self.n,
            "trivial": self.trivial,
            "protocol": dict(self.protocol),
            "higher_is_better": self.higher_is_better,
            "unit": self.unit,
            "control": self.control,
        }

    @classmethod
    def from_dict(cls, record: Json) -> Estimate:
        """The estimate that ``to_dict`` wrote; a missing field is an error that names it."""
        if not isinstance(record, Mapping):
            raise NearfarError(f"record is {shown(record)}; the mapping that to_dict gives is needed")
        required = ("value", "low", "high", "chance", "n", "trivial", "metric")
        missing = [name for name in required if name not in record]
        if missing:
            raise NearfarError(
                f"not the record of an estimate: {', '.join(missing)} missing in {dict(record)!r}"
            )
        return cls(
            value=_from_json("value", record["value"]),
            low=_from_json("low", record["low"]),
            high=_from_json("high", record["high"]),
            chance=_from_json("chance", record["chance"]),
            n=record["n"],
            trivial=record["trivial"],
            metric=record["metric"],
            protocol=dict(mapping("protocol", record.get("protocol", {}))),
            higher_is_better=record.get("higher_is_better"),  # runs of version 0.1 do not say it
            unit=record.get("unit", ""),
            control=record.get("control", False),
        )


def comparable(a: Estimate, b: Estimate) -> str | None:
    """Why ``a`` and ``b`` must not be compared, or ``None`` if they may be.

    Comparable estimates have the same metric, chance level and stated split and otherwise the same protocol (the
    method and level of the interval may differ), and neither is trivial. An unstated split is not the same
    split.

    >>> protocol = {"gallery": 100, "split": "5f0c"}
    >>> a = Estimate(0.5, 0.4, 0.6, 0.01, 100, False, "R@1", protocol)
    >>> comparable(a, a) is None
    True
    >>> comparable(a, Estimate(0.9, 0.8, 1.0, 0.1, 100, False, "R@1", {**protocol, "gallery": 10}))
    'gallery differs: 100 and 10'
    """
    instance("a", a, Estimate)
    instance("b", b, Estimate)
    if a.metric != b.metric:
        return f"metric differs: {a.metric} and {b.metric}"
    for key in sorted((set(a.protocol) | set(b.protocol)) - _NOT_IDENTITY):
        if a.protocol.get(key) != b.protocol.get(key):
            return f"{key} differs: {a.protocol.get(key)} and {b.protocol.get(key)}"
    if a.protocol.get("split") is None:
        return "neither states its split; pass split=split_hash(ids) to the metric"
    if a.n != b.n:
        return f"number of items differs: {a.n} and {b.n}"
    unknown = math.isnan(a.chance) and math.isnan(b.chance)
    if not unknown and not math.isclose(a.chance, b.chance, rel_tol=1e-6, abs_tol=1e-12):
        return f"chance level differs: {a.chance:g} and {b.chance:g}; they stand against different baselines"
    if a.trivial or b.trivial:
        return f"{a.metric} is trivial here: the cut-off reaches the gallery, and every model scores the same"
    return None


def _to_json(number: float) -> float | str:
    json_number = float(number)
    return json_number if math.isfinite(json_number) else json.dumps(json_number)


def _from_json(name: str, number: object) -> float:
    """A number, or the text that ``to_dict`` makes of NaN and the infinities."""
    if isinstance(number, str) and number in ("NaN", "nan", "Infinity", "-Infinity", "inf", "-inf"):
        return float(number)
    return any_number(name, number)


def _decimals(low: float, high: float) -> int:
    """As many decimals as the width of the interval supports: one significant digit of it."""
    width = high - low
    if low.is_integer() and high.is_integer():
        return 0
    if not math.isfinite(width) or width <= 0.0:
        return 3
    least = 2 if max(abs(low), abs(high)) <= 1.0 else 0
    return min(max(math.ceil(-math.log10(width)), least), 6)


def _number(number: float, decimals: int | None) -> str:
    """A number as tables print it: no zero before the point, three to four significant digits of a chance."""
    if not math.isfinite(number):
        return str(number)
    spec = (".2g" if abs(number) < 1 else ".5g") if decimals is None else f".{decimals}f"
    text = format(number, spec)
    if text.startswith("0."):
        return text[1:]
    return "-" + text[2:] if text.startswith("-0.") else text
