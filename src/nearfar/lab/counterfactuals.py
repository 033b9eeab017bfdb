"""Counterfactuals: which ones apply to a run, and the effect of each on frozen batches.

A counterfactual changes options of the run's configuration, the rows of the batch, or both; the rest stays as it is.
Which ones apply follows from the options of the run's system and their values; the others are refused, with the reason.
An effect compares losses with their own levels, and gradients with the run's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from nearfar.config.samplers import sampler_choices
from nearfar.lab.batch_evaluation import BatchEvaluation, cosine, norm
from nearfar.metrics import few_runs
from nearfar.training.batches import LIKELY_FALSE_NEGATIVE

__all__ = ["Counterfactual", "Effect", "Mean", "Refused", "effect_of", "standard"]


@dataclass(frozen=True)
class Counterfactual:
    """A name, the ``overrides`` (``key=value``) of the run's configuration, and the rows it is evaluated on.

    ``batch``: "same" rows as the run's; its "own", those that its sampler draws under the overrides; "double", the
    run's batch and the one after it. ``note`` describes it.
    """

    name: str
    overrides: tuple[str, ...] = ()
    batch: Literal["same", "own", "double"] = "same"
    note: str = ""


@dataclass(frozen=True)
class Refused:
    """A counterfactual that does not apply to a run, and why."""

    name: str
    reason: str


def standard(config: DictConfig, temperature: float | None = None) -> list[Counterfactual | Refused]:
    """The counterfactuals that apply to a run of this configuration, and those that do not, with the reason.

    ``temperature``: at which the loss really stands (a learned one is not that of the configuration).

    >>> options = OmegaConf.create({"seed": 0, "batch_size": 8, "mask_duplicates": True, "temperature": 0.1})
    >>> for each in standard(options):
    ...     print(each.name, "|", " ".join(each.overrides) if isinstance(each, Counterfactual) else each.reason)
    other rows | seed=1
    false negatives removed | the system has no option false_negative_threshold
    duplicates masked | already so: mask_duplicates=true
    temperature halved | temperature=0.05
    temperature doubled | temperature=0.2
    different sampler | the system has no choice of samplers
    batch doubled | batch_size=16
    different direction | the loss has no option symmetric
    """
    return [
        *_rows(config),
        *_masks(config),
        *_temperatures(config, temperature),
        *_samplers(config),
        *_sizes(config),
        *_directions(config),
    ]


def _rows(config: DictConfig) -> Iterator[Counterfactual]:
    yield Counterfactual(
        "other rows",
        (f"seed={int(config.get('seed', 0)) + 1}",),
        "own",
        "only the draw of the rows: how alike two batches of the same kind are",
    )


def _masks(config: DictConfig) -> Iterator[Counterfactual | Refused]:
    name, key = "false negatives removed", "false_negative_threshold"
    if key not in config:
        yield Refused(name, f"the system has no option {key}")
    elif config[key] is not None:
        yield Refused(name, f"already so: {key}={config[key]}")
    else:
        note = "pairs whose reference similarity is this high are no negatives"
        yield Counterfactual(name, (f"{key}={LIKELY_FALSE_NEGATIVE}",), note=note)
    name, key = "duplicates masked", "mask_duplicates"
    if key not in config:
        yield Refused(name, f"the system has no option {key}")
    elif config[key]:
        yield Refused(name, f"already so: {key}=true")
    else:
        yield Counterfactual(name, (f"{key}=true",), note="copies of a row's partner are no negatives of it")


def _temperatures(config: DictConfig, temperature: float | None) -> Iterator[Counterfactual | Refused]:
    if "temperature" not in config:
        yield Refused("different temperature", "the system has no option temperature")
        return
    now = float(config.temperature) if temperature is None else temperature
    fixed = ("learn_temperature=false",) if config.get("learn_temperature") else ()
    for word, factor in (("halved", 0.5), ("doubled", 2.0)):
        overrides = (f"temperature={now * factor:.6g}", *fixed)
        yield Counterfactual(f"temperature {word}", overrides, note=f"now {now:.3g}")


def _samplers(config: DictConfig) -> Iterator[Counterfactual | Refused]:
    sampler = config.get("sampler")
    if not OmegaConf.is_dict(sampler) or "name" not in sampler:
        yield Refused("different sampler", "the system has no choice of samplers")
        return
    for name, choice in sampler_choices(str(config.get("system"))).items():
        if name == sampler.name or not (choice.composes_hard_batches or name == "random"):
            continue
        begun = choice.composes_hard_batches and config.get("curriculum_epoch")
        overrides = (f"sampler={name}", "curriculum_epoch=0") if begun else (f"sampler={name}",)
        yield Counterfactual(
            f"{name} batches", overrides, "own", "as many rows, chosen by a different sampler"
        )


def _sizes(config: DictConfig) -> Iterator[Counterfactual | Refused]:
    if "batch_size" not in config:
        yield Refused("batch doubled", "the system has no option batch_size")
        return
    note = "the batch and the one after it"
    yield Counterfactual("batch doubled", (f"batch_size={2 * int(config.batch_size)}",), "double", note)


def _directions(config: DictConfig) -> Iterator[Counterfactual | Refused]:
    loss = config.get("loss")
    if not OmegaConf.is_dict(loss) or "symmetric" not in loss:
        yield Refused("different direction", "the loss has no option symmetric")
    elif loss.symmetric:
        yield Counterfactual(
            "one direction", ("loss.symmetric=false",), note="queries choose among keys alone"
        )
    else:
        yield Counterfactual(
            "both directions", ("loss.symmetric=true",), note="keys choose among queries as well"
        )


RECORDED = ("uniform_level", "floor", "p_positive", "hardest_share")
GRADIENTS = ("gradient_cosine", "gradient_ratio", "embedding_cosine")


@dataclass(frozen=True)
class Mean:
    """A mean over the batches with its 95 % interval (t); one batch has none."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float | None], bound: float = math.inf) -> Mean | None:
        """None where a batch has no such number, or one that is not finite; the interval stays within ± ``bound``."""
        if any(v is None or not math.isfinite(v) for v in values):
            return None
        numbers = np.asarray(values, dtype=np.float64)
        if len(numbers) < 2:
            return cls(float(numbers[0]))
        low, high = few_runs(numbers)
        return cls(float(numbers.mean()), max(low, -bound), min(high, bound))


@dataclass(frozen=True)
class Effect:
    """The effect of a counterfactual, as means over the batches; None where it has no such number.

    ``change``: of the loss, None where the two are not comparable as losses, and ``not_comparable`` says why.
    ``above_guessing_change``: of loss − uniform level, None where floors differ as well. ``gradient_cosine``, and
    ``gradient_ratio`` of the norms (counterfactual over run): of the gradients of the parameters, over those that both
    train. ``embedding_cosine``: of the gradients of the embeddings of the rows that both batches begin with.
    ``inert``: nothing differs in any bit. ``per_batch``: the numbers of each batch.
    """

    counterfactual: Counterfactual
    loss: Mean | None
    uniform_level: Mean | None
    floor: Mean | None
    p_positive: Mean | None
    hardest_share: Mean | None
    change: Mean | None
    above_guessing_change: Mean | None
    not_comparable: str
    gradient_cosine: Mean | None
    gradient_ratio: Mean | None
    embedding_cosine: Mean | None
    inert: bool
    per_batch: list[dict[str, float | None]]


def effect_of(
    each: Counterfactual,
    base: Sequence[BatchEvaluation],
    changed: Sequence[BatchEvaluation],
    same_rows: Sequence[bool],
) -> Effect:
    """Compare the batches of a counterfactual (``changed``) with those of the run (``base``), one by one.

    ``same_rows``: whether a batch begins with the rows of the run's.
    """
    numbers: list[dict[str, float | None]] = []
    for a, b, same in zip(base, changed, same_rows, strict=True):
        row: dict[str, float | None] = {"loss": b.loss, "above_guessing": b.above_guessing}
        row |= {name: b.record.get(name) for name in RECORDED}
        row["gradient_cosine"] = cosine(a.parameters, b.parameters)
        row["gradient_ratio"] = _ratio(a, b)
        row["embedding_cosine"] = cosine(a.embeddings, b.embeddings) if same and a.embeddings else None
        numbers.append(row)
    reason, change, above = _changes(base, changed)
    means = {
        name: Mean.of([row[name] for row in numbers], 1.0 if name.endswith("cosine") else math.inf)
        for name in ("loss", *RECORDED, *GRADIENTS)
    }
    inert = all(same_rows) and all(_identical(a, b) for a, b in zip(base, changed, strict=True))
    return Effect(
        each,
        change=change,
        above_guessing_change=above,
        not_comparable=reason,
        inert=inert,
        per_batch=numbers,
        **means,
    )


def _ratio(a: BatchEvaluation, b: BatchEvaluation) -> float | None:
    """The norm of b's gradient over that of a's."""
    both = sorted(a.parameters.keys() & b.parameters.keys())
    below, above = (norm({name: each.parameters[name] for name in both}) for each in (a, b))
    return above / below if below else None


def _identical(a: BatchEvaluation, b: BatchEvaluation) -> bool:
    same_names = a.parameters.keys() == b.parameters.keys()
    return (
        same_names
        and a.loss == b.loss
        and all(torch.equal(g, b.parameters[n]) for n, g in a.parameters.items())
    )


def _changes(
    base: Sequence[BatchEvaluation], changed: Sequence[BatchEvaluation]
) -> tuple[str, Mean | None, Mean | None]:
    """Why two losses are not comparable ("" if they are), the change of the loss, and of loss − uniform level."""
    pairs = list(zip(base, changed, strict=True))
    change = Mean.of([b.loss - a.loss for a, b in pairs])
    if change is None:
        return "a loss is not finite", None, None
    for name, words in (("floor", "its floor is"), ("uniform_level", "guessing costs")):
        levels = [(a.record.get(name), b.record.get(name)) for a, b in pairs]
        if any(level is None for both in levels for level in both):
            return f"the system logs no {name}", None, None
        differ = [
            (a, b) for a, b in levels if not math.isclose(a or 0.0, b or 0.0, rel_tol=1e-7, abs_tol=1e-9)
        ]
        if differ:
            a, b = np.mean(np.asarray(levels, dtype=np.float64), axis=0)
            above = Mean.of([(b.above_guessing or 0.0) - (a.above_guessing or 0.0) for a, b in pairs])
            reason = f"{words} {b - a:+.2g} nats ({b:.4g} instead of {a:.4g})"
            return reason, None, above if name == "uniform_level" else None
    above = Mean.of([(b.above_guessing or 0.0) - (a.above_guessing or 0.0) for a, b in pairs])
    return "", change, above
