"""Did training help? The scores of the model before its first step, and what training changed on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import nn

from nearfar.config.training import RunOptions
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.metrics import Difference, Estimate, comparable, compare, paired_difference
from nearfar.training.checkpoint import Checkpoint, find_checkpoint
from nearfar.training.evaluation import evaluate, outputs_of
from nearfar.training.state import initial_model, load_weights
from nearfar.training.system import Evaluation, System

__all__ = ["evaluate_start", "gains", "model_at_start"]


def model_at_start(system: System, config: RunOptions) -> nn.Module:
    """The model before the first step: as the seed initialises it, or with the weights of ``init_from``."""
    model: nn.Module = initial_model(system, config.seed)
    if config.init_from:
        path = find_checkpoint(config.init_from, prefer="best")
        load_weights(model, Checkpoint.load(path), system, str(path))
    return model


def evaluate_start(
    system: System, config: RunOptions, stopped: Callable[[], bool], say: Callable[[str], None]
) -> dict[str, Evaluation]:
    """The final evaluation of the model before its first step, by split: thresholds are chosen for it as for the
    trained one, so that both are judged by one procedure.

    Called before the trained model is evaluated, since a system keeps what its last evaluation fitted. ``stopped`` is
    asked between splits. Where the weights of ``init_from`` are not there any more, the reason is said and nothing is
    compared.
    """
    try:
        model = model_at_start(system, config)
    except NearfarError as error:
        say(f"the scores before training are not known: {error}")
        return {}
    system.calibrate(lambda split: outputs_of(system, model, config, split), lambda _: None)
    starts: dict[str, Evaluation] = {}
    for split in ("val", "test"):
        if stopped():
            return {}
        evaluated = evaluate(system, model, config, split)
        if evaluated is not None:
            starts[split] = evaluated[0]
    return starts


def gains(trained: Mapping[str, Evaluation], starts: Mapping[str, Evaluation]) -> Json:
    """What ``metrics.json`` says of the start: ``before_training``, the estimates by split and metric, and ``gain``,
    the change of each by training with its interval and verdict.

    The difference is paired by item (``nearfar.metrics.paired_difference``) where both evaluations have a score of
    every item; otherwise it is that of the two estimates, taken as independent, which is cautious (``paired``: false).
    Controls are left out. Empty without ``starts``.

    >>> def scores(values):
    ...     e = Estimate(float(np.mean(values)), 0.0, 1.0, 0.01, 100, False, "R@1", {"split": "5f0c"})
    ...     return {"val": Evaluation("val", {"R@1": e}, per_item={"R@1": np.array(values)})}
    >>> facts = gains(scores([1.0] * 80 + [0.0] * 20), scores([1.0] * 10 + [0.0] * 90))
    >>> facts["before_training"]["val"]["R@1"]["value"], facts["gain"]["val"]["R@1"]["verdict"]
    (0.1, 'better')
    """
    before: dict[str, dict[str, Json]] = {}
    gained: dict[str, dict[str, Json]] = {}
    for split, start in starts.items():
        if split not in trained:
            continue
        now = trained[split]
        before[split] = {name: each.to_dict() for name, each in start.estimates.items() if not each.control}
        gained[split] = {}
        for name, estimate in now.estimates.items():
            if name not in before[split] or estimate.control:
                continue
            paired = _paired(name, estimate, now, start)
            change = paired or _unpaired(estimate, start.estimates[name])
            if change is not None:
                gained[split][name] = {
                    "value": change.value,
                    "low": change.low,
                    "high": change.high,
                    "n": change.n,
                    "verdict": change.verdict,
                    "paired": paired is not None,
                }
    return {"before_training": before, "gain": gained} if before else {}


def _paired(name: str, estimate: Estimate, now: Evaluation, start: Evaluation) -> Difference | None:
    ours, theirs = now.per_item.get(name), start.per_item.get(name)
    if ours is None or theirs is None or len(ours) < 2 or list(now.ids) != list(start.ids):
        return None
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return None
    return paired_difference(ours, theirs, metric=name, higher_is_better=estimate.higher_is_better)


def _unpaired(estimate: Estimate, start: Estimate) -> Difference | None:
    numbers = [number for each in (estimate, start) for number in (each.value, each.low, each.high)]
    if comparable(estimate, start) is not None or not np.isfinite(numbers).all():
        return None
    return compare(estimate, start)
