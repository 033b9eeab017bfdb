"""Embedding and judging a split: loaders in order, outputs of every row, estimates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nearfar.config.training import RunOptions
from nearfar.training import ranks
from nearfar.training.fabric import build_fabric
from nearfar.training.system import Batch, BatchDataset, Evaluation, System, collect

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.utils.data import Dataset

__all__ = ["consecutive", "embed_split", "evaluate", "loader", "outputs_of"]


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
