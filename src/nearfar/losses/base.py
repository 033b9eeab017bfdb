"""What the losses have in common: what a loss says of itself, and the record of its last call, read off the device only
when it is looked at.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

from torch import Tensor, nn

from nearfar.contrast import Step

__all__ = [
    "ContrastiveLoss",
    "LossTraits",
    "NoNegativesWarning",
    "PairArguments",
    "Record",
    "Requires",
    "traits_of",
]

#: "softmax": a choice among candidates, so that guessing costs ln(candidates); "sigmoid": a question about each pair
Kind = Literal["softmax", "sigmoid", "other"]
#: what makes two rows positives of each other: being views of one item, one class, labels in common, given weights (a
#: graph, neighbours), high scores; "" for losses without positives
PositivesBy = Literal["pair", "class", "overlap", "weights", "scores", ""]


@dataclass(frozen=True)
class Requires:
    """The values of an option with which several processes can share a loss, and why others do not do."""

    option: str
    values: tuple[object, ...]
    reason: str


@dataclass(frozen=True)
class LossTraits:
    """What a loss says of itself, in its own file: the log, the doctor and several processes go by it.

    ``kind`` and ``positives_by`` stand in the record of every step (``loss_kind``, ``positives_by``).

    The arguments of a call: ``rows`` (n, …) have a row for each item of the batch, and row i of all of them is the same
    item (``aligned=False``: each has rows of its own). ``positions`` are those of ``rows`` that hold positions in
    the batch. ``further`` have rows of their own beside the batch, such as those of a memory. ``pairs`` (n, n) are
    about pairs of rows of the whole batch. ``numbers`` are one number. Anything else is passed on as it is.

    Several processes can always gather the rows and compute the whole loss in each. ``local``: each can compute the
    part of its own rows, given by the argument ``rows`` of ``forward``, and the parts add up. ``ring``: rows pass from
    process to process, and the loss has ``pair_arguments``. Both are None where that cannot be, and otherwise what the
    options must be, () for any.

    >>> from nearfar.losses import InfoNCELoss
    >>> traits = InfoNCELoss.traits
    >>> traits.kind, traits.positives_by, traits.rows, traits.pairs
    ('softmax', 'pair', ('a', 'b'), ('mask',))
    """

    kind: Kind = "other"
    positives_by: PositivesBy = ""
    rows: tuple[str, ...] = ()
    aligned: bool = True
    positions: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    local: tuple[Requires, ...] | None = None
    ring: tuple[Requires, ...] | None = None

    def to_dict(self) -> dict[str, str]:
        """What a log says of the loss: ``loss_kind`` and, where it has positives, ``positives_by``."""
        named: dict[str, str] = {"loss_kind": self.kind}
        if self.positives_by:
            named["positives_by"] = self.positives_by
        return named


#: what arguments of these names are, where a loss does not say it
_FURTHER = ("negatives", "memory", "memory_labels")
_PAIRS = ("mask", "positives")
_NOT_ROWS = ("negatives_mask", "rows", "tile")
_NUMBERS = ("scale", "logit_scale", "logit_bias")


def traits_of(loss: nn.Module) -> LossTraits:
    """The traits of a loss; of a module that states none, what the names of its arguments mean in the losses here.

    >>> class Theirs(nn.Module):
    ...     def forward(self, z, labels, mask=None, scale=1.0): ...
    >>> traits_of(Theirs()).rows, traits_of(Theirs()).pairs, traits_of(Theirs()).local
    (('z', 'labels'), ('mask',), None)
    """
    traits = getattr(loss, "traits", None)
    if isinstance(traits, LossTraits):
        return traits
    names = tuple(inspect.signature(loss.forward).parameters)

    def those(known: Collection[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name in known)

    return LossTraits(
        rows=tuple(name for name in names if name not in (*_FURTHER, *_PAIRS, *_NOT_ROWS, *_NUMBERS)),
        # A loss of single rows, such as the distance of two sets of scores, takes as many as it is given.
        aligned="rows" in names,
        positions=tuple(getattr(loss, "positions", ())),
        further=those(_FURTHER),
        pairs=those(_PAIRS),
        numbers=those(_NUMBERS),
        local=(Requires("reduction", ("mean", "sum"), ONE_VALUE_EACH),) if "rows" in names else None,
    )


#: why a loss without a mean over rows cannot be put together from parts
ONE_VALUE_EACH = "it has one value for each row"


class PairArguments(NamedTuple):
    """The arguments of a softmax over pairs: row i of ``a`` belongs to row i of ``b``."""

    a: Tensor
    b: Tensor
    scale: float | Tensor
    both: bool
    normalize: bool


@dataclass(frozen=True)
class Record:
    """Means over the rows of a step, and over both directions where there are two.

    ``candidates``: rows each query chose from, its positives included. ``positives_per_row``, ``positives_min``, and
    ``rows_without_positives``, which are left out of the loss. ``p_positive``: mean of exp(-loss), the probability
    given to the positive; of several, their geometric mean (sum outside the logarithm) or all of it (sum inside; of
    weighted ones, the mean weight of what is drawn).
    ``hardest_share``: how much of the push away from negatives goes to the hardest one (1: all of it; 1 / number of
    negatives: spread evenly; 0 where there is no negative). ``uniform_level``: the loss of guessing, when all
    candidates score alike. ``floor``: the least the loss can reach. ``scale``: 1 / temperature, as it was used.
    ``finite``: false where the loss is infinite or not a number. ``rows_without_negatives``: rows that have
    none, since a mask leaves out all others or all are positives. ``masked_per_row``: negatives of a query that a mask
    leaves out; where it has weights of negatives, what these lack of 1, summed (``candidates`` then counts by weight).

    ``extra`` holds further numbers of a certain loss; ``to_dict`` puts them beside the others. ``traits`` say which
    kind of loss it is.
    """

    candidates: float
    positives_per_row: float
    positives_min: float
    rows_without_positives: float
    p_positive: float
    hardest_share: float
    uniform_level: float
    floor: float
    scale: float
    finite: bool = True
    extra: dict[str, float] = field(default_factory=dict)
    rows_without_negatives: float = 0.0
    masked_per_row: float = 0.0
    traits: LossTraits | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, step: Step, traits: LossTraits | None = None, /, **extra: float) -> Self:
        """Read a step off its device."""
        *numbers, alone, masked, finite = step.numbers().tolist()
        return cls(*numbers, bool(finite), extra, alone, masked, traits)  # type: ignore[call-arg]

    def numbers(self) -> dict[str, float]:
        """All numbers by name, those of ``extra`` among them."""
        own = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in ("extra", "traits")
        }
        return own | self.extra

    def to_dict(self) -> dict[str, Any]:
        """What the log of a step takes: the numbers, and in words ``loss_kind`` and ``positives_by``."""
        return self.numbers() | ({} if self.traits is None else self.traits.to_dict())


class NoNegativesWarning(UserWarning):
    """A mask leaves rows of a batch no negative: they take part in the loss and teach nothing."""


class ContrastiveLoss(nn.Module):
    """A loss without weights of its own that remembers what it saw last.

    ``record`` is the ``Record`` of the last call, None before the first. Reading it waits for the device; a step whose
    record is not read does not.

    A subclass states its ``traits`` and returns ``self.keep(value, step)`` from ``forward``. Its options are the fields
    of a dataclass, ``@dataclass(eq=False, repr=False)``, and ``__post_init__`` checks them. docs/losses.md has one in
    20 lines.
    """

    traits: ClassVar[LossTraits]

    _step: Step | None = None
    _masked = False  # whether a mask was given in the last call
    _looked = _warned = False

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        # The fields of a dataclass are set before its __post_init__ could make it a module.
        loss = super().__new__(cls)
        nn.Module.__init__(loss)
        return loss

    def __setattr__(self, name: str, value: Any) -> None:
        if name in getattr(self, "__dataclass_fields__", ()):
            object.__setattr__(self, name, value)  # an option: not even a Parameter is a weight there
        else:
            super().__setattr__(name, value)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        # A call that fails leaves no record, least of all that of the call before.
        self._step, self._masked = None, False
        value = super().__call__(*args, **kwargs)
        if self._masked and not self._looked and isinstance(value, Tensor) and value.device.type == "cpu":
            self._looked = True  # once; later, and on a device, whoever reads the record hears of it
            self._warn_of(self._read(), 3)
        return value

    def keep(self, value: Tensor, step: Step, masked: bool = False) -> Tensor:
        """The value, once ``step`` is kept for the record; ``masked``: whether a mask was given."""
        self._step, self._masked = step, masked
        return value

    @property
    def record(self) -> Record | None:
        record = self._read()
        self._warn_of(record, 3)
        return record

    def _read(self) -> Record | None:
        if self._step is None:
            return None
        return Record.of(self._step, getattr(self, "traits", None), **self._extra())

    def _warn_of(self, record: Record | None, level: int) -> None:
        """Warn once that a mask leaves rows without a negative."""
        if self._masked and record is not None and record.rows_without_negatives and not self._warned:
            self._warned = True
            warnings.warn(
                f"mask leaves {record.rows_without_negatives:g} rows of a batch no negative: their loss says nothing, "
                "and nothing is learned from them. Leave out fewer pairs (a higher threshold), or take larger or more "
                "varied batches; record.rows_without_negatives counts such rows in every step",
                NoNegativesWarning,
                stacklevel=level,
            )

    def _extra(self) -> dict[str, float]:
        """Numbers of this loss alone."""
        return {}

    def pair_arguments(self, arguments: Mapping[str, object]) -> PairArguments:
        """Of a loss with a ``ring`` version: its pairs, from the arguments of a call by name."""
        raise NotImplementedError(f"{type(self).__name__} states a ring version and has no pair_arguments")

    def extra_repr(self) -> str:
        if not is_dataclass(self):
            return ""
        return ", ".join(f"{each.name}={getattr(self, each.name)!r}" for each in fields(self))
