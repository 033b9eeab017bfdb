"""What could be otherwise in one batch of a run: the list of counterfactuals, and which of them a run can be asked.

A counterfactual changes options of the run's configuration, the rows of the batch, or both; the rest stays as it is.
What applies follows from the options that the run's system has and from their values. What does not is refused, with
the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import OmegaConf

from nearfar.training.batches import LIKELY_FALSE_NEGATIVE

__all__ = ["Counterfactual", "Refused", "standard"]

#: samplers that a run with a choice of them is asked about
SAMPLERS = ("random", "hard", "partition")


@dataclass(frozen=True)
class Counterfactual:
    """A name, the ``overrides`` (``key=value``) of the run's configuration, and the rows it is evaluated on.

    ``batch``: "same" rows as the run's; its "own", those that its sampler draws under the overrides; "double", the
    run's batch and the one after it. ``note`` says what it is for.
    """

    name: str
    overrides: tuple[str, ...] = ()
    batch: Literal["same", "own", "double"] = "same"
    note: str = ""


@dataclass(frozen=True)
class Refused:
    """A counterfactual that a run cannot be asked, and why."""

    name: str
    reason: str


def standard(config: Any, temperature: float | None = None) -> list[Counterfactual | Refused]:
    """Every counterfactual that a run of this configuration can be asked, and those it cannot with the reason.

    ``temperature``: at which the loss really stands (a learned one is not that of the configuration).

    >>> options = OmegaConf.create({"seed": 0, "batch_size": 8, "mask_duplicates": True, "temperature": 0.1})
    >>> for each in standard(options):
    ...     print(each.name, "|", " ".join(each.overrides) if isinstance(each, Counterfactual) else each.reason)
    other rows | seed=1
    false negatives removed | the system has no option false_negative_threshold
    duplicates masked | already so: mask_duplicates=true
    temperature halved | temperature=0.05
    temperature doubled | temperature=0.2
    another sampler | the system has no choice of samplers
    batch doubled | batch_size=16
    another direction | the loss has no option symmetric
    """
    return [
        *_rows(config),
        *_masks(config),
        *_temperatures(config, temperature),
        *_samplers(config),
        *_sizes(config),
        *_directions(config),
    ]


def _rows(config: Any) -> Iterator[Counterfactual]:
    yield Counterfactual(
        "other rows",
        (f"seed={int(config.get('seed', 0)) + 1}",),
        "own",
        "nothing changed but the draw of the rows: what two batches of one kind have in common",
    )


def _masks(config: Any) -> Iterator[Counterfactual | Refused]:
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


def _temperatures(config: Any, temperature: float | None) -> Iterator[Counterfactual | Refused]:
    if "temperature" not in config:
        yield Refused("another temperature", "the system has no option temperature")
        return
    now = float(config.temperature) if temperature is None else temperature
    fixed = ("learn_temperature=false",) if config.get("learn_temperature") else ()
    for word, factor in (("halved", 0.5), ("doubled", 2.0)):
        overrides = (f"temperature={now * factor:.6g}", *fixed)
        yield Counterfactual(f"temperature {word}", overrides, note=f"now {now:.3g}")


def _samplers(config: Any) -> Iterator[Counterfactual | Refused]:
    sampler = config.get("sampler")
    if not OmegaConf.is_dict(sampler) or "name" not in sampler:
        yield Refused("another sampler", "the system has no choice of samplers")
        return
    for name in SAMPLERS:
        if name == sampler.name:
            continue
        hard = name != "random" and config.get("curriculum_epoch")
        overrides = (f"sampler={name}", "curriculum_epoch=0") if hard else (f"sampler={name}",)
        yield Counterfactual(f"{name} batches", overrides, "own", "as many rows, chosen by another sampler")


def _sizes(config: Any) -> Iterator[Counterfactual | Refused]:
    if "batch_size" not in config:
        yield Refused("batch doubled", "the system has no option batch_size")
        return
    note = "the batch and the one after it"
    yield Counterfactual("batch doubled", (f"batch_size={2 * int(config.batch_size)}",), "double", note)


def _directions(config: Any) -> Iterator[Counterfactual | Refused]:
    loss = config.get("loss")
    if not OmegaConf.is_dict(loss) or "symmetric" not in loss:
        yield Refused("another direction", "the loss has no option symmetric")
    elif loss.symmetric:
        yield Counterfactual(
            "one direction", ("loss.symmetric=false",), note="queries choose among keys alone"
        )
    else:
        yield Counterfactual(
            "both directions", ("loss.symmetric=true",), note="keys choose among queries as well"
        )
