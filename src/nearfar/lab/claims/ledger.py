"""The ledger: claims as YAML with their condition and prediction, their experiments, and the verdict on an interval.

An experiment is a module of the folder ``claims/experiments`` in a clone, called by its name in the ledger. It has
``run(seed, *, option=…)``, which returns a number (or a ``Share``) for each quantity, and ``QUANTITIES``, which
describes each one. ``run`` without a ``seed`` is a computation without chance. Experiments that share options take them
as one dataclass, ``run(seed, settings)``, whose fields are then the options.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, get_type_hints

from nearfar.data.files import Json, read_yaml
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "KINDS",
    "OPEN",
    "REFUTED",
    "SUPPORTED",
    "Claim",
    "Condition",
    "Experiment",
    "Prediction",
    "Share",
    "choose",
    "claims_folder",
    "combine",
    "load",
    "names",
    "read_ledger",
]


class Share(NamedTuple):
    """So many hits among ``n`` independent draws; pooled over seeds, with Wilson's interval."""

    hits: int
    n: int


@dataclass(frozen=True)
class Experiment:
    """What a module offers: its function, its options with their defaults, and a description of each quantity."""

    name: str
    run: Callable[..., Mapping[str, float | Share]]
    options: dict[str, object]
    seeded: bool
    quantities: Mapping[str, str]

    def check_options(self, options: Mapping[str, object], where: str) -> None:
        """Raise for an option that ``run`` does not take."""
        for name in options:
            if name not in self.options:
                raise NearfarError(
                    f"{where}: experiment '{self.name}' has no option '{name}'; {nearest_name(name, self.options)}"
                )

    def check_quantities(self, wanted: list[str], where: str) -> None:
        """Raise for a quantity that ``run`` does not give."""
        for name in wanted:
            if name not in self.quantities:
                raise NearfarError(
                    f"{where}: experiment '{self.name}' gives no '{name}'; {nearest_name(name, self.quantities)}"
                )


def claims_folder() -> Path:
    """The folder ``claims`` of the clone that nearfar is installed from, or of the clone in the working directory.

    Raises ``NearfarError`` where there is neither: the experiments are research and not part of the package.
    """
    import nearfar

    for clone in (Path(nearfar.__file__).resolve().parents[2], Path.cwd()):
        if (clone / "claims" / "statements").is_dir() and (clone / "src" / "nearfar").is_dir():
            return clone / "claims"
    raise NearfarError(
        "the ledger of claims and its experiments are not part of the installed package: they are the folder claims/ "
        "of nearfar's repository. Clone it, and run nearfar claims in the clone."
    )


def names() -> list[str]:
    """Every experiment, without loading any."""
    return sorted(module.name for module in pkgutil.iter_modules([str(claims_folder() / "experiments")]))


def load(name: str) -> Experiment:
    """Import an experiment.

    >>> load("loss_ceiling").seeded, load("small_k").seeded
    (False, True)
    """
    clone = str(claims_folder().parent)
    if clone not in sys.path:
        sys.path.append(clone)
    module = importlib.import_module(f"claims.experiments.{name}")
    run = module.run
    parameters = inspect.signature(run).parameters
    options = {key: one.default for key, one in parameters.items() if key not in ("seed", "settings")}
    if "settings" in parameters:
        settings = get_type_hints(run)["settings"]
        options = {field.name: field.default for field in fields(settings) if field.init}

        def run(seed: int, **values: object) -> Mapping[str, float | Share]:
            result: Mapping[str, float | Share] = module.run(seed, settings(**values))
            return result

    return Experiment(name, run, options, "seed" in parameters, module.QUANTITIES)


SUPPORTED, REFUTED, OPEN = "supported", "refuted", "not distinguishable"

#: what a condition is called in the ledger, and how many numbers it takes
KINDS = {"greater_than": 1, "less_than": 1, "between": 2, "outside": 2}


@dataclass(frozen=True)
class Condition:
    """What must be true of one quantity.

    ``kind``: "greater_than" or "less_than" a limit, which itself does not count; "between" two limits, which do;
    "outside" is the opposite of "between".

    >>> above = Condition("greater_than", (0.0,))
    >>> above.judge(0.1, 0.3), above.judge(-0.1, 0.3), above.judge(-0.3, 0.0)
    ('supported', 'not distinguishable', 'refuted')
    >>> print(Condition("between", (0.11, 0.18)))
    0.11 to 0.18
    """

    kind: str
    limits: tuple[float, ...]

    @classmethod
    def read(cls, content: object, where: str) -> Condition:
        """The condition of a ledger, such as ``{between: [0.11, 0.18]}``; ``where`` begins the error."""
        if not isinstance(content, Mapping) or len(content) != 1:
            raise NearfarError(
                f"{where} is {content!r}; write one condition, such as {{greater_than: 0}} or "
                "{between: [0.11, 0.18]}."
            )
        kind, limits = next(iter(content.items()))
        if kind not in KINDS:
            raise NearfarError(f"{where}: there is no condition '{kind}'; {nearest_name(str(kind), KINDS)}")
        numbers = limits if isinstance(limits, list) else [limits]
        if len(numbers) != KINDS[kind] or not all(map(_is_number, numbers)):
            wanted = "one number" if KINDS[kind] == 1 else "two numbers, such as [0.11, 0.18]"
            raise NearfarError(f"{where}: {kind} takes {wanted}, not {limits!r}.")
        if sorted(numbers) != numbers:
            raise NearfarError(f"{where}: {kind} {numbers} holds nothing; the lower limit comes first.")
        return cls(kind, tuple(map(float, numbers)))

    def judge(self, low: float, high: float) -> str:
        """Whether every, no, or some number from ``low`` to ``high`` fulfils the condition."""
        if math.isnan(low) or math.isnan(high):
            return OPEN
        first, last = self.limits[0], self.limits[-1]
        if self.kind == "greater_than":
            every, none = low > first, high <= first
        elif self.kind == "less_than":
            every, none = high < first, low >= first
        else:
            every, none = first <= low and high <= last, high < first or low > last
            if self.kind == "outside":
                every, none = none, every
        return SUPPORTED if every else REFUTED if none else OPEN

    def __str__(self) -> str:
        first, last = (f"{limit:g}".replace("-", "−") for limit in (self.limits[0], self.limits[-1]))
        words = {"greater_than": f"> {first}", "less_than": f"< {first}", "between": f"{first} to {last}"}
        return words.get(self.kind, f"outside {first} to {last}")


def combine(verdicts: Iterable[str]) -> str:
    """The verdict on all conditions together: one that is refuted refutes, and only all of them support.

    >>> combine(["supported", "not distinguishable"]), combine(["refuted", "not distinguishable"])
    ('not distinguishable', 'refuted')
    """
    every = set(verdicts)
    if REFUTED in every:
        return REFUTED
    return SUPPORTED if every == {SUPPORTED} else OPEN


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


Criterion = Mapping[str, Condition]

#: verdicts of an analysis on paper
CODES = ("OK", "WRONG", "ARTEFACT", "UNTESTED", "NOISE", "DOUBTFUL")
ALWAYS = ("id", "statement", "source", "check")
TESTED = ("experiment", "criterion", "prediction")
OPTIONAL = ("row", "options", "quick", "seeds", "needs")


@dataclass(frozen=True)
class Prediction:
    """What was expected before the experiment ran: in words, and as conditions that can fail."""

    words: str
    criterion: Criterion


@dataclass(frozen=True)
class Claim:
    """A statement and how it is tested.

    ``check``: the verdict code of an analysis on paper, and its reason. ``experiment``: a module of
    ``claims/experiments``, called with ``options`` (``quick`` replaces some of them in a quick run) for
    ``seeds`` seeds; 0 for a computation without chance. ``criterion``: the condition on each quantity that must hold
    for the statement to be true. A claim without experiment says in ``waits_for`` what it needs; one with an experiment
    on real data waits where ``needs``, a folder below ``NEARFAR_DATA``, is missing. ``row`` is its place
    in the notes it comes from, ``group`` the file it stands in.
    """

    id: str
    statement: str
    source: str
    check: tuple[str, str]
    group: str
    row: str = ""
    experiment: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    quick: Mapping[str, object] = field(default_factory=dict)
    seeds: int = 0
    criterion: Criterion = field(default_factory=dict)
    prediction: Prediction | None = None
    waits_for: str = ""

    @property
    def quantities(self) -> list[str]:
        """The quantities of claim and prediction, in that order."""
        predicted = self.prediction.criterion if self.prediction else {}
        return list(dict.fromkeys([*self.criterion, *predicted]))


def read_ledger(files: Sequence[Path] | None = None) -> list[Claim]:
    """The claims of ``files``, by default of those of the clone, checked.

    Raises ``NearfarError`` with file and claim for what is missing, unknown, or no condition.

    >>> "small-k-is-harder" in [claim.id for claim in read_ledger()]
    True
    """
    if files is None:
        # Experiments first: what waits for something is read last.
        ledger = sorted((claims_folder() / "statements").glob("*.yaml"))
        files = sorted(ledger, key=lambda file: (file.name == "waiting.yaml", file.name != "measured.yaml"))
    claims: dict[str, Claim] = {}
    for file in files:
        name, entries = str(file), read_yaml(file)
        if not isinstance(entries, list) or not entries:
            raise NearfarError(f"{name} holds no list of claims; each begins with '- id: NAME'.")
        for at, entry in enumerate(entries, 1):
            claim = _claim(entry, name, at)
            if claim.id in claims:
                raise NearfarError(
                    f"{name}: there are two claims '{claim.id}'; give one of them a different id."
                )
            claims[claim.id] = claim
    return list(claims.values())


def choose(claims: Sequence[Claim], wanted: Iterable[str]) -> list[Claim]:
    """The claims named by id, row of the notes, or group; all of them where none is named.

    >>> [claim.id for claim in choose(read_ledger(), ["S2-5"])]
    ['small-k-is-harder']
    """
    words = list(wanted)
    names = {name for claim in claims for name in (claim.id, claim.row, claim.group) if name}
    for word in words:
        if word not in names:
            raise NearfarError(f"there is no claim '{word}': {nearest_name(word, names)}")
    return [c for c in claims if not words or {c.id, c.row, c.group} & set(words)]


def _claim(entry: object, file: str, at: int) -> Claim:
    where = f"{file}, claim {at}"
    if not isinstance(entry, Mapping):
        raise NearfarError(f"{where} is {entry!r}; a claim is a list of fields, beginning with 'id: NAME'.")
    where = f"{file}, claim '{entry.get('id', at)}'"
    waits = "waits_for" in entry
    if waits and "experiment" in entry:
        raise NearfarError(f"{where} has an experiment and waits_for; leave one of the two out.")
    required = ALWAYS + (("waits_for",) if waits else TESTED)
    allowed = (*required, "row", "prediction") if waits else required + OPTIONAL
    for name in required:
        if entry.get(name) in (None, "", {}):
            raise NearfarError(f"{where} has no '{name}'; it needs {', '.join(required)}.")
    for name in entry:
        if name not in allowed:
            raise NearfarError(f"{where}: there is no field '{name}'; {nearest_name(str(name), allowed)}")
    check = entry["check"]
    if not isinstance(check, Mapping) or set(check) != {"verdict", "found"} or check["verdict"] not in CODES:
        raise NearfarError(
            f"{where}: check is {check!r}; it takes verdict (one of {', '.join(CODES)}) and found, in words."
        )
    texts = {name: str(entry[name]).strip() for name in ("id", "statement", "source")}
    common: Json = {
        **texts,
        "row": str(entry.get("row", "")),
        "check": (check["verdict"], str(check["found"]).strip()),
        "group": Path(file).stem,
    }
    if waits:
        words = entry.get("prediction", "")
        if not isinstance(words, str):
            raise NearfarError(f"{where}: while it waits, prediction is words alone, not {words!r}.")
        return Claim(
            **common, waits_for=str(entry["waits_for"]), prediction=Prediction(words, {}) if words else None
        )
    known = names()
    if entry["experiment"] not in known:
        raise NearfarError(
            f"{where}: there is no experiment '{entry['experiment']}'; {nearest_name(str(entry['experiment']), known)}"
        )
    prediction = entry["prediction"]
    if not isinstance(prediction, Mapping) or set(prediction) != {"words", "criterion"}:
        raise NearfarError(f"{where}: prediction is {prediction!r}; it takes words and criterion.")
    seeds = entry.get("seeds", 0)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 0 or seeds == 1:
        raise NearfarError(
            f"{where}: seeds is {seeds!r}; give the number of seeds, at least 2 for an interval, or 0 where nothing "
            "is left to chance."
        )
    return Claim(
        **common,
        waits_for=_missing(entry.get("needs"), where),
        experiment=entry["experiment"],
        options=_mapping(entry.get("options", {}), f"{where}: options"),
        quick=_mapping(entry.get("quick", {}), f"{where}: quick"),
        seeds=seeds,
        criterion=_criterion(entry["criterion"], f"{where}: criterion"),
        prediction=Prediction(
            str(prediction["words"]).strip(), _criterion(prediction["criterion"], f"{where}: prediction")
        ),
    )


def _missing(folder: object, where: str) -> str:
    """What a claim on real data waits for; "" where the folder exists, or none is needed."""
    if folder is None:
        return ""
    if not isinstance(folder, str) or not folder:
        raise NearfarError(f"{where}: needs is {folder!r}; give the name of a folder below NEARFAR_DATA.")
    data = os.environ.get("NEARFAR_DATA")
    return (
        ""
        if data and (Path(data) / folder).is_dir()
        else f"real data: the folder {folder} below NEARFAR_DATA"
    )


def _mapping(content: object, where: str) -> dict[str, object]:
    if not isinstance(content, Mapping):
        raise NearfarError(f"{where} is {content!r}; write name: value for each.")
    return dict(content)


def _criterion(content: object, where: str) -> dict[str, Condition]:
    if not isinstance(content, Mapping) or not content:
        raise NearfarError(
            f"{where} is {content!r}; write a condition for each quantity: {{gain: {{greater_than: 0}}}}."
        )
    for name in content:
        if not isinstance(name, str):
            raise NearfarError(
                f"{where}: a quantity is called {name!r}; YAML reads on, off, yes and no as truth: put it in quotes."
            )
    return {name: Condition.read(value, f"{where} on '{name}'") for name, value in content.items()}
