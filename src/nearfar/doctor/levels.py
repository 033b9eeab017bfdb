"""Where a loss stands between its floor and guessing: the scale on which losses can be read at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nearfar.doctor.rule import TooLittle
from nearfar.doctor.series import LAST_PART, Series
from nearfar.doctor.signals import Signals

__all__ = ["Level", "by_class", "levels", "terms"]

# A log that has loss_kind and positives_by says itself what its loss is; of others the name of the loss does.
#: losses that are no softmax over candidates: guessing does not cost ln(candidates)
_OTHER = ("siglip", "focal", "wasserstein", "score", "triplet", "margin", "bce", "mse", "vicreg", "barlow", "byol",
          "simsiam", "cosine", "detection")  # fmt: skip
#: what an objective's contrastive term may be called, where the log does not say whose candidates it has
_CONTRASTIVE = ("contrast", "nce", "clip", "supcon", "spatial", "pair")
#: losses whose positives are rows of one class
_BY_CLASS = ("supcon", "multi", "label", "class")
#: fewer logged steps than this are no level
LEAST_STEPS = 5
LEAST_EPOCHS = 2


@dataclass(frozen=True)
class Level:
    """A loss beside what guessing costs and its floor, over the run (the last two as series over the same rows).

    ``name`` is "loss", or that of an objective's term. ``assumed`` says what guessing was taken to cost where the log
    does not hold it. ``contrast`` says whether it is a choice among candidates, whose distance from the floor is read
    in nats.
    """

    name: str
    loss: Series
    uniform: Series
    floor: Series
    assumed: str
    contrast: bool

    def way(self) -> Series:
        """How far from guessing (0) to the floor (1) the loss has come; below 0 it is worse than guessing."""
        room = self.uniform.numbers - self.floor.numbers
        known = room > 0
        with np.errstate(invalid="ignore"):  # where guessing is not known, its level is infinite
            way = (self.uniform.numbers - self.loss.numbers)[known] / room[known]
        return self.loss.part(known).having(way, self.name)

    def above_floor(self) -> Series:
        """Nats above the floor."""
        return self.loss.having(self.loss.numbers - self.floor.numbers, self.name)

    def settled(self, series: Series, share: float = LAST_PART) -> Series:
        """The last part of a series over these rows, the first epoch left out where there are more."""
        if (series.last_epoch() or 1) > 1:
            series = series.part(~(series.epochs <= 1))  # those of no epoch stay
        return series.tail(share)


def by_class(signals: Signals) -> bool | None:
    """Whether rows with labels in common are positives; None where the log says nothing of its loss."""
    positives_by = signals.text("positives_by")
    if positives_by is not None:
        return positives_by in ("class", "overlap")
    name = _loss_name(signals)
    return any(word in name for word in _BY_CLASS) if name else None


def _loss_name(signals: Signals) -> str:
    return (signals.text("loss") or signals.text("loss_name") or "").lower()


def _guesses_among_candidates(signals: Signals, prefix: str) -> bool:
    """Whether guessing costs ln(candidates), as far as the log says."""
    kind = signals.text(f"{prefix}loss_kind")
    if kind is not None:
        return kind == "softmax" and signals.text(f"{prefix}positives_by") != "scores"
    return not (any(word in _loss_name(signals) for word in _OTHER) or signals.has("anchors"))


def terms(signals: Signals) -> list[str]:
    """The terms of an objective, by the weights in the log."""
    return list(signals.named("*/weight"))


def levels(signals: Signals, by_floor: bool = False) -> list[Level]:
    """Every loss whose place between floor and guessing is known; ``by_floor``: also those of which the floor alone is.

    Raises ``TooLittle`` where the log has too few values or does not say what guessing costs.
    """
    names = terms(signals)
    every = [level for name in names or ["loss"] if (level := _level(signals, name, names, by_floor))]
    if not every:
        raise TooLittle(
            "no loss whose chance level is known: log uniform_level or candidates with it, or state batch_size"
        )
    enough = [
        level
        for level in every
        if len(level.loss) >= (LEAST_EPOCHS if _per_epoch(level.loss) else LEAST_STEPS)
    ]
    if not enough:
        raise TooLittle(f"only {max(len(level.loss) for level in every)} logged values of the loss")
    return enough


def _per_epoch(loss: Series) -> bool:
    return not np.isnan(loss.epochs).any() and len(np.unique(loss.epochs)) == len(loss)


def _level(signals: Signals, name: str, names: list[str], by_floor: bool) -> Level | None:
    if names:
        loss = signals.series(f"{name}/raw") or signals.series(f"{name}/value")
        own = _contrastive(signals, names)
        prefixes = [f"{name}/"] + ([""] if own == [name] else [])
    else:
        loss, prefixes = signals.series("loss").finite(), [""]
        epochs = signals.series("train_loss").finite()
        # A short run logs few steps, but the mean of every epoch.
        if len(loss) < LEAST_STEPS and len(epochs) >= LEAST_EPOCHS:
            loss = epochs
    loss = loss.finite()
    for prefix in prefixes:
        guess = _uniform(signals, loss, prefix)
        floor = _floor(signals, loss, prefix)
        if guess is None and by_floor and floor:
            guess = _constant(loss, math.inf), ""
        if loss and guess is not None:
            uniform, assumed = guess
            choice = any(signals.has(f"{prefix}{field}") for field in ("candidates", "p_positive"))
            contrast = choice or bool(assumed) or (bool(floor) and floor.mean() > 0)
            return Level(name, loss, uniform, floor if floor else _constant(loss, 0.0), assumed, contrast)
    return None


def _contrastive(signals: Signals, names: list[str]) -> list[str]:
    """The terms of an objective that may be what the record beside them describes."""
    kinds = {name: signals.text(f"{name}/loss_kind") for name in names}
    if any(kinds.values()):
        return [name for name, kind in kinds.items() if kind not in (None, "other")]
    return [name for name in names if any(word in name.lower() for word in _CONTRASTIVE)]


def _uniform(signals: Signals, loss: Series, prefix: str) -> tuple[Series, str] | None:
    known = _beside(signals, loss, f"{prefix}uniform_level")
    if known:
        return known, ""
    if not _guesses_among_candidates(signals, prefix):
        return None
    candidates = _beside(signals, loss, f"{prefix}candidates")
    if candidates and candidates.numbers.min() > 1:
        return candidates.having(np.log(candidates.numbers), "uniform_level"), "ln(candidates)"
    size = signals.number("batch_size") or signals.number("rows")
    if prefix or size is None or size <= 1 or signals.number("memory"):
        return None  # with a memory there are more candidates than the batch has, and not in every direction
    size *= signals.number("world_size") or 1.0
    return _constant(loss, math.log(size)), "ln(batch_size)"


def _floor(signals: Signals, loss: Series, prefix: str) -> Series:
    known = _beside(signals, loss, f"{prefix}floor")
    name, positives_by = (signals.text("loss") or "").lower(), signals.text("positives_by")
    one_class = "supcon" in name and "multi" not in name if positives_by is None else positives_by == "class"
    if known or prefix or not one_class or "inside" in name:
        return known
    positives = _beside(signals, loss, "positives_per_row")
    return positives.having(np.log(np.maximum(positives.numbers, 1.0)), "floor")


def _beside(signals: Signals, loss: Series, name: str) -> Series:
    if not signals.series(name).finite():
        return Series(name)
    return signals.paired(loss, name, lambda _, other: other)


def _constant(loss: Series, value: float) -> Series:
    return loss.having(value, "")
