"""Checks of options before any work: their types, ranges and choices, and those of the training itself.

A table names every option with its rule. A run that is going to fail should fail while its user still looks at it,
and a value that would be ignored is as wrong as one that cannot be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from nearfar.errors import NearfarError, nearest_name
from nearfar.schedules import learning_rate_factor
from nearfar.training import ranks

__all__ = [
    "FILE",
    "LEARNING",
    "SHARE",
    "Choice",
    "Number",
    "Rule",
    "Switch",
    "Text",
    "check_learning_options",
    "check_table",
    "check_training_options",
    "option",
    "processes_to_start",
]


class Rule(Protocol):
    """What an option may be; ``check`` raises ``NearfarError`` for anything else."""

    def check(self, name: str, value: Any) -> None: ...


@dataclass(frozen=True)
class Number:
    """A finite number between ``least`` and ``most`` (without the ends themselves where ``inside``).

    >>> Number(1, whole=True).check("epochs", 2.0)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: epochs=2.0: a whole number is needed.
    """

    least: float | None = None
    most: float | None = None
    whole: bool = False
    inside: bool = False
    optional: bool = False

    def check(self, name: str, value: Any) -> None:
        if value is None and self.optional:
            return
        kinds = int if self.whole else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
            wanted = "a whole number" if self.whole else "a finite number"
            raise NearfarError(f"{name}={_shown(value)}: {wanted}{' or null' * self.optional} is needed.")
        low = -math.inf if self.least is None else self.least
        high = math.inf if self.most is None else self.most
        if not (low < value < high if self.inside else low <= value <= high):
            raise NearfarError(f"{name}={value} is out of range: {self._range()}.")

    def _range(self) -> str:
        if self.most is None:
            return f"at least {self.least:.10g}"
        return f"{self.least:.10g} to {self.most:.10g}" + " without the ends" * self.inside


@dataclass(frozen=True)
class Choice:
    """One of some names.

    >>> Choice(("number", "skip", "replace")).check("exists", "repalce")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: exists=repalce: no such choice; did you mean 'replace'?
    """

    names: Sequence[str]

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in self.names:
            raise NearfarError(
                f"{name}={_shown(value)}: no such choice; {nearest_name(str(value), self.names)}"
            )


@dataclass(frozen=True)
class Switch:
    """True or false."""

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise NearfarError(f"{name}={_shown(value)}: true or false is needed.")


@dataclass(frozen=True)
class Text:
    """Text that is not empty; ``number`` lets a bare number stand for its digits, as in a file called 123."""

    optional: bool = False
    number: bool = False

    def check(self, name: str, value: Any) -> None:
        if value is None and self.optional:
            return
        digits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if digits and self.number:
            return
        if not isinstance(value, str):
            quoted = f" Quote a name of digits: {name}='\"{value}\"'." if digits else ""
            raise NearfarError(f"{name}={_shown(value)}: text is needed.{quoted}")
        if not value.strip():
            null = f"; {name}=null leaves it out" if self.optional else ""
            raise NearfarError(f"{name} is empty{null}.")


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def option(config: Any, name: str) -> Any:
    """The value under a dotted name; ``NearfarError`` where it is not given, cannot be resolved or was deleted."""
    value = config
    parts = name.split(".")
    for i, part in enumerate(parts):
        if i and not isinstance(value, Mapping) and not hasattr(value, "items"):
            group = ".".join(parts[:i])
            raise NearfarError(
                f"{group}={_shown(value)}: a group of options is needed here ({name} is one of them)."
            )
        try:
            value = value[part]
        except MissingMandatoryValue:
            raise NearfarError(f"{name} must be given: add {name}=VALUE.") from None
        except InterpolationResolutionError as error:
            raise NearfarError(f"{name}: {str(error).splitlines()[0]}.") from None
        except (OmegaConfBaseException, KeyError):
            raise NearfarError(
                f"the option {name} is missing: it was deleted, or its group is null."
            ) from None
    return value


def check_table(config: Any, table: Mapping[str, Rule]) -> None:
    """Check every option of ``table``; the first that breaks its rule is an error."""
    for name, rule in table.items():
        rule.check(name, option(config, name))


#: a file or folder that need not be given, and a share that leaves something, such as a dropout
FILE, SHARE = Text(optional=True, number=True), Number(0.0, 0.99)

#: loggers beside the run's own log
LOGGERS = ("tensorboard", "mlflow", "wandb")

#: what every system that learns by epochs has
LEARNING: dict[str, Rule] = {
    "seed": Number(0, 2**32 - 1, whole=True),
    "epochs": Number(1, 100_000, whole=True),
    "batch_size": Number(2, whole=True),
    "lr": Number(0.0),
    "weight_decay": Number(0.0),
    "lr_schedule": Text(),
    "warmup": SHARE,
    "bootstrap": Number(0, whole=True),
}


def check_learning_options(config: Any, table: Mapping[str, Rule]) -> None:
    """Check ``LEARNING`` and the ``table`` of a system; raise ``NearfarError`` for the first option that is wrong."""
    check_table(config, LEARNING | dict(table))
    learning_rate_factor(config.lr_schedule, warmup=config.warmup)
    if 0 < config.bootstrap < 100:
        raise NearfarError(
            f"bootstrap={config.bootstrap}: the ends of an interval need at least 100 resamples; "
            "0 asks for intervals without resampling."
        )


TRAINING: dict[str, Rule] = {
    "system": Text(),
    "name": Text(optional=True),
    "runs_dir": Text(),
    "exists": Choice(("number", "skip", "replace")),
    "resume_from": Text(optional=True),
    "init_from": Text(optional=True),
    "needs_init_from": Switch(),
    "start_epoch": Number(0, whole=True, optional=True),
    "patience": Number(1, whole=True, optional=True),
    "min_epochs": Number(1, whole=True),
    "trainer.accelerator": Choice(("auto", "cpu", "gpu", "cuda", "mps")),
    "trainer.precision": Choice(("32-true", "16-mixed", "bf16-mixed")),
    "trainer.accumulate": Number(1, whole=True),
    "trainer.cached_chunk": Number(1, whole=True, optional=True),
    "trainer.local_loss": Switch(),
    "trainer.gather_with_grad": Switch(),
    "trainer.ring": Switch(),
    "trainer.gradient_clip": Number(0, optional=True),
    "trainer.deterministic": Switch(),
    "trainer.threads": Number(1, whole=True, optional=True),
    "trainer.workers": Number(0, whole=True),
    "trainer.eval_batch_size": Number(1, whole=True),
    "trainer.log_every": Number(1, whole=True),
    "trainer.probe_every": Number(1, whole=True, optional=True),
    "trainer.probe_rows": Number(0, whole=True),
    "trainer.checkpoint_minutes": Number(0),
    "trainer.checkpoint_steps": Number(1, whole=True, optional=True),
    "trainer.checkpoint_epochs": Number(1, whole=True, optional=True),
    "trainer.max_steps": Number(1, whole=True, optional=True),
}


def check_training_options(config: Any) -> None:
    """Raise ``NearfarError`` for the first wrong option among those that every run has, whatever its system."""
    check_table(config, TRAINING)
    if config.start_epoch is not None and config.resume_from is None:
        raise NearfarError(
            f"start_epoch={config.start_epoch} counts the epochs of a resumed run: it needs resume_from=RUN."
        )
    chunk, size = config.trainer.cached_chunk, config.get("batch_size")
    devices = option(config, "trainer.devices")
    _check_device(config.trainer, devices)
    processes = max(ranks.count(), devices if isinstance(devices, int) else 1)
    rows = -(-size // processes) if isinstance(size, int) else None
    if chunk is not None and rows is not None and chunk >= rows:
        each = f" and {processes} processes" if processes > 1 else ""
        raise NearfarError(
            f"trainer.cached_chunk={chunk} with batch_size={size}{each}: the batch is one chunk, which costs a second "
            "forward pass and saves nothing. Raise batch_size, lower trainer.cached_chunk, or set it to null."
        )
    if rows is not None and processes > 1 and size < processes:
        raise NearfarError(
            f"batch_size={size} is that of all {processes} processes together: each needs a row. Raise it, or "
            "lower trainer.devices."
        )
    if config.trainer.ring and (config.trainer.local_loss or not config.trainer.gather_with_grad):
        raise NearfarError(
            "trainer.ring=true computes own rows with exact gradients; leave the other options out."
        )
    _check_logger(option(config, "logger"))


def processes_to_start(settings: Any) -> int:
    """How many processes ``trainer.devices`` stands for on this machine: as it says, or one for each GPU (auto)."""
    if settings.devices != "auto":
        return int(settings.devices)
    if settings.accelerator in ("cpu", "mps") or not torch.cuda.is_available():
        return 1
    return max(1, torch.cuda.device_count())


def _check_logger(names: Any) -> None:
    if names is None:
        return
    for name in [names] if isinstance(names, str) or not isinstance(names, Sequence) else names:
        if name not in LOGGERS:
            raise NearfarError(
                f"logger={_shown(name)}: there is no such logger; {nearest_name(str(name), LOGGERS)}"
            )


def _check_device(settings: Any, devices: Any) -> None:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = {"auto": True, "cpu": True, "gpu": cuda or mps, "cuda": cuda, "mps": mps}
    accelerator = settings.accelerator
    if not there[accelerator]:
        raise NearfarError(
            f"trainer.accelerator={accelerator}: PyTorch sees no such device here; take auto or cpu."
        )
    on_cpu = accelerator == "cpu" or not (cuda or mps)
    whole = isinstance(devices, int) and not isinstance(devices, bool) and devices >= 1
    if not whole and devices != "auto":
        raise NearfarError(
            f"trainer.devices={_shown(devices)}: the number of processes on this machine, or auto, is needed "
            "(CUDA_VISIBLE_DEVICES chooses among GPUs)."
        )
    processes = max(devices if whole else 1, ranks.on_this_machine())
    gpus = torch.cuda.device_count() if cuda and accelerator != "mps" else 1
    if processes > gpus and not on_cpu:
        raise NearfarError(
            f"{processes} processes on this machine, and PyTorch sees {gpus} GPU(s): each takes one. Lower "
            "trainer.devices, or take trainer.accelerator=cpu."
        )
    if ranks.count() > 1 and devices not in (1, "auto", ranks.on_this_machine()):
        raise NearfarError(
            f"trainer.devices={devices}, but {ranks.on_this_machine()} processes were started on this machine; leave "
            "it out, then their number counts."
        )
    if settings.precision == "16-mixed" and on_cpu:
        # Lightning would go on in bf16-mixed with no more than a warning.
        raise NearfarError("trainer.precision=16-mixed needs a GPU; on the CPU take 32-true or bf16-mixed.")
