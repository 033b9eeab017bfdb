"""``nearfar doctor RUN --what-if``: loss and gradient of a run's batches under its own options and under changed ones.

A loss falls when a mask removes candidates, and that is no gain: the loss of guessing falls too. So every loss is shown
with its own uniform level and floor, and two losses are subtracted only where these are equal. Cosines of gradients can
always be compared: near 1 the change would move the weights as the run does. Where a change draws other rows as well,
compare its cosine with that of other rows under the run's own options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from nearfar.config.compose import override_config, read_config
from nearfar.errors import NearfarError
from nearfar.lab.batch_evaluation import BatchEvaluator, run_arithmetic
from nearfar.lab.counterfactuals import Counterfactual, Effect, Refused, effect_of, standard
from nearfar.lab.trial import prescriptions
from nearfar.systems import build_system
from nearfar.training.checkpoint import Checkpoint, find_checkpoint
from nearfar.training.run_folder import RunFolder
from nearfar.training.system import System

__all__ = ["WhatIf", "what_if"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class WhatIf:
    """The ``baseline`` (the run as it is), the ``effects`` of counterfactuals, and those that were ``refused``.

    ``batches`` of ``rows`` rows each, of epoch ``epoch`` (from 1), under checkpoint ``checkpoint`` at ``step``.
    """

    run: str
    checkpoint: str
    step: int
    epoch: int
    batches: int
    rows: int
    training: bool
    temperature: float | None
    baseline: Effect
    effects: list[Effect]
    refused: list[Refused]

    def to_dict(self) -> dict[str, object]:
        """As ``what_if.json`` holds it."""
        return asdict(self)


@dataclass(frozen=True)
class _Frozen:
    """Batches of one configuration at one epoch, and what evaluates them."""

    evaluator: BatchEvaluator
    batches: list[list[int]]


def what_if(
    run: str | Path,
    *,
    checkpoint: str = "last",
    batches: int = 8,
    overrides: Sequence[Sequence[str]] = (),
    counterfactuals: Sequence[Counterfactual | Refused] | None = None,
    training: bool = True,
    say: Say = lambda _: None,
    write: bool = True,
) -> WhatIf:
    """Evaluate batches of a run under counterfactuals, and write ``what_if.json`` into its folder.

    ``batches`` full batches, evenly spaced over the epoch at which the checkpoint ("last", "best") stands, are
    evaluated under the run's configuration and under each of ``counterfactuals`` (the ``standard`` ones and the
    prescriptions of ``doctor.json`` by default). ``overrides`` adds one more for each of its items, a list of
    ``key=value`` with batches of its own sampler. ``training=False`` switches dropout off.

    Nothing is trained; ``what_if.json`` is the only file that is written. Keeps one gradient for each batch in memory.
    Intervals are over batches, under the weights of this one checkpoint.

    Raises ``NearfarError`` for what is no run, for data that changed since, and for wrong arguments. A counterfactual
    that fails is listed as refused, with the reason.
    """
    if batches < 1:
        raise NearfarError(f"batches={batches}: at least one batch is needed, two for an interval.")
    if checkpoint not in ("last", "best"):
        raise NearfarError(f"checkpoint={checkpoint}: it is last or best.")
    path = find_checkpoint(run, prefer=checkpoint)
    folder = RunFolder.of(path)
    config, state = folder.config(), Checkpoint.load(path)
    epoch = max(0, min(state.epoch, int(config.epochs) - 1))

    def frozen(overrides: Sequence[str]) -> _Frozen:
        changed = read_config(override_config(config, overrides), saved=True)
        system = build_system(changed)
        system.prepare(lambda _: None)
        data_hash = system.layout()["data_hash"]
        if data_hash != state.data_hash:
            raise NearfarError(
                f"{folder}: the data differ from those the run was trained on (split hash {state.data_hash}, now "
                f"{data_hash})."
            )
        chunk = changed.trainer.cached_chunk
        evaluator = BatchEvaluator(system, state, int(config.seed), _device(config.trainer), training, chunk)
        dataset = system.dataset("train")
        assert dataset is not None
        dataset.set_epoch(epoch)
        return _Frozen(evaluator, _drawn(system, epoch))

    with run_arithmetic(config.trainer.threads, config.trainer.deterministic):
        run_itself = frozen([])
        places = _places(run_itself.batches, batches)
        chosen = [run_itself.batches[place] for place in places]
        rows = len(chosen[0])
        say(f"{len(chosen)} batches of {rows} rows, epoch {epoch + 1}, {path.name} at step {state.step}")
        base = [run_itself.evaluator.evaluate(batch, i, rows) for i, batch in enumerate(chosen)]
        scale = base[0].record.get("scale")
        temperature = 1 / scale if scale else None
        if counterfactuals is None:
            counterfactuals = [*standard(config, temperature), *_prescribed(folder)]
        effects: list[Effect] = []
        refused: list[Refused] = []
        for each in [*counterfactuals, *(Counterfactual(" ".join(o), tuple(o), "own") for o in overrides)]:
            if isinstance(each, Refused):
                refused.append(each)
                continue
            say(f"what if: {each.name} ({' '.join(each.overrides) or 'no override'})")
            try:
                other = frozen(each.overrides)
                evaluated = _rows_of(each, run_itself.batches, places, other.batches)
                changed = [other.evaluator.evaluate(batch, i, rows) for i, batch in enumerate(evaluated)]
                same_rows = [batch[:rows] == own for batch, own in zip(evaluated, chosen, strict=True)]
                effects.append(effect_of(each, base, changed, same_rows))
            except NearfarError as error:
                refused.append(Refused(each.name, str(error)))
    itself = effect_of(Counterfactual("the run"), base, base, [True] * len(base))
    result = WhatIf(
        str(folder),
        path.name,
        state.step,
        epoch + 1,
        len(base),
        rows,
        training,
        temperature,
        itself,
        effects,
        refused,
    )
    if write:
        folder.write_json("what_if.json", result.to_dict())
    return result


def _device(settings: DictConfig) -> torch.device:
    on_gpu = torch.cuda.is_available() and settings.accelerator in ("auto", "gpu", "cuda")
    return torch.device("cuda" if on_gpu else "cpu")


def _drawn(system: System, epoch: int) -> list[list[int]]:
    """Every batch of an epoch; sets the system's schedules to this epoch too."""
    sampler = system.build_sampler()
    system.on_epoch(epoch, sampler, lambda _: None)
    sampler.set_epoch(epoch)
    return [list(batch) for batch in sampler]


def _places(drawn: Sequence[Sequence[int]], count: int) -> list[int]:
    """Where ``count`` of the largest batches stand, evenly spaced; all of them where there are fewer."""
    largest = max(map(len, drawn))
    full = [i for i, batch in enumerate(drawn) if len(batch) == largest]
    spaced = (
        np.linspace(0, len(full) - 1, min(count, len(full)) + 2)[1:-1]
        if count < len(full)
        else range(len(full))
    )
    return [full[int(i)] for i in spaced]


def _rows_of(
    each: Counterfactual, drawn: list[list[int]], places: Sequence[int], own: list[list[int]]
) -> list[list[int]]:
    """The rows that a counterfactual is evaluated on, batch by batch."""
    if each.batch == "same":
        return [drawn[place] for place in places]
    if each.batch == "own":
        if len(own) == len(drawn):
            return [own[place] for place in places]
        batches = [own[place] for place in _places(own, len(places))]
        if len(batches) < len(places):
            raise NearfarError(
                f"its epoch has {len(batches)} full batches, and {len(places)} are needed (--batches)."
            )
        return batches
    full = [i for i, batch in enumerate(drawn) if len(batch) == len(drawn[places[0]])]
    if len(full) < 2:
        rows = 2 * len(drawn[places[0]])
        raise NearfarError(
            f"a batch of {rows} rows is larger than the training set ({sum(map(len, drawn))} rows)."
        )
    after = dict(zip(full, [*full[1:], full[0]], strict=True))
    return [drawn[place] + drawn[after[place]] for place in places]


def _prescribed(folder: RunFolder) -> list[Counterfactual]:
    return [
        Counterfactual(f"prescribed: {each.finding}", tuple(each.overrides), "own", "by doctor.json")
        for each in prescriptions(folder)
    ]
