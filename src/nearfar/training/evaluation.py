"""Embedding and judging a split: loaders in order, outputs of every row, estimates.

Did training help? The scores of the model before its first step, and what training changed on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nearfar.config.training import RunOptions
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.metrics import Difference, Estimate, comparable, compare, paired_difference
from nearfar.training import ranks
from nearfar.training.checkpoint import Checkpoint, find_checkpoint
from nearfar.training.fabric import build_fabric
from nearfar.training.state import initial_model, load_weights
from nearfar.training.system import Batch, BatchDataset, Evaluation, System, collect

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.utils.data import Dataset

__all__ = [
    "consecutive",
    "embed_split",
    "evaluate",
    "evaluate_start",
    "gains",
    "loader",
    "model_at_start",
    "outputs_of",
]


def _identity(batch: Batch) -> Batch:
    return batch


def loader(
    dataset: BatchDataset[Batch], batches: list[list[int]], workers: int = 0, pin: bool = False
) -> DataLoader[Batch]:
    """A loader over exactly these batches of positions.

    The loader gets a generator of its own: without one every new iterator draws a seed from the global
    generator, and dropout would depend on how often an epoch was started.
    """
    return DataLoader(
        cast("Dataset[Batch]", dataset),
        batch_sampler=batches,
        collate_fn=_identity,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),
    )


def consecutive(n: int, batch_size: int) -> list[list[int]]:
    """Positions 0 … n − 1 in order, for evaluation.

    >>> consecutive(5, 2)
    [[0, 1], [2, 3], [4]]
    """
    return [list(range(start, min(start + batch_size, n))) for start in range(0, n, batch_size)]


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Eval mode, and every module's own mode back afterwards: frozen parts may be in eval mode all along."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Gloo moves no inference tensors between processes.
        with torch.inference_mode() if ranks.count() == 1 else torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def embed_split(
    fabric: Fabric, system: System, model: nn.Module, config: RunOptions, split: str, final: bool
) -> dict[str, Tensor]:
    """What ``system.embed`` gives of a split's rows, in order, on the CPU."""
    dataset = system.dataset(split)
    assert dataset is not None
    parts = []
    with _without_gradients(model):
        system.before_evaluation(model, split, final)
        for batch in loader(dataset, consecutive(len(dataset), config.trainer.eval_batch_size)):
            if fabric.device.type != "cpu":
                batch = fabric.to_device(batch)
            with fabric.autocast():
                outputs = system.embed(model, batch)
            parts.append({name: output.detach().cpu() for name, output in outputs.items()})
    return collect(parts)


def outputs_of(system: System, model: nn.Module, config: RunOptions, split: str) -> dict[str, Tensor]:
    """The same for a finished model, brought to the device that ``trainer.accelerator`` names."""
    fabric = build_fabric(config)
    return embed_split(fabric, system, model.to(fabric.device), config, split, final=True)


def evaluate(
    system: System, model: nn.Module, config: RunOptions, split: str
) -> tuple[Evaluation, dict[str, Tensor]] | None:
    """Estimates, with intervals, and outputs of one split; None where the system has no such split."""
    if system.dataset(split) is None:
        return None
    outputs = outputs_of(system, model, config, split)
    return system.evaluate(outputs, split, final=True), outputs


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
