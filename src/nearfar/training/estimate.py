"""``nearfar train --dry-run``: what a run would read, build and cost, measured on a few real steps."""

from __future__ import annotations

import copy
import resource
import sys
import time
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nearfar.config.training import RunOptions
from nearfar.data.files import Json
from nearfar.training.evaluation import consecutive
from nearfar.training.fabric import processes_to_start
from nearfar.training.state import initial_model
from nearfar.training.system import BatchDataset, System

__all__ = ["describe"]

STEPS = 4


def _megabytes(tensors: Iterable[Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def describe(system: System, config: RunOptions, console: Console) -> Json:
    """Prepare the data, build the model, time a few training steps and print a table; nothing is written."""
    system.prepare(lambda text: console.print(text, markup=False, highlight=False))
    model = initial_model(system, config.seed)
    sampler = system.build_sampler()
    system.on_epoch(0, sampler, lambda _: None)
    dataset = system.dataset("train")
    assert dataset is not None
    batches = list(sampler)
    # With accumulation a step costs several batches; the time is per batch, so nothing changes.
    with torch.random.fork_rng():
        per_batch, loss = _time_steps(
            system, copy.deepcopy(model), dataset, batches[: STEPS + 1], config.trainer.cached_chunk
        )
    evaluation = 0.0
    validation = system.dataset("val")
    if validation is not None:
        evaluation = _time_evaluation(system, model, validation, config.trainer.eval_batch_size)
    epoch = per_batch * len(batches) + evaluation
    if (processes := processes_to_start(config.trainer)) > 1:
        console.print(f"timed in one process with whole batches; trainer.devices={processes} share them")
    weights = _megabytes(model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    facts = {
        "training items": len(dataset),
        "batches per epoch": len(batches),
        "epochs": config.epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss before training": loss,
        "weights MB": weights,
        "checkpoint MB": 3 * weights,
        "peak memory MB": peak,
        "seconds per batch": per_batch,
        "seconds per epoch": epoch,
        "minutes in all": epoch * config.epochs / 60,
    }
    table = Table(title="dry run: nothing was trained or written", title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.3g}")
    console.print(table)
    return facts


def _time_steps(
    system: System,
    model: nn.Module,
    dataset: BatchDataset[object],
    batches: list[list[int]],
    cached_chunk: int | None,
) -> tuple[float, float]:
    """Median seconds of forward, backward and update, the first batch (warm-up) left out; the first loss."""
    optimizer = torch.optim.AdamW(system.parameter_groups(model), lr=0.0)
    model.train()
    times, first = [], float("nan")
    for i, positions in enumerate(batches):
        start = time.perf_counter()
        output = system.step(model, dataset.__getitems__(positions), cached_chunk)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
        if i == 0:
            first = output.loss.item()
    times = sorted(times[1:] or times)
    return times[len(times) // 2], first


@torch.inference_mode()
def _time_evaluation(
    system: System, model: nn.Module, dataset: BatchDataset[object], batch_size: int
) -> float:
    """Seconds to embed a split, from its first batch."""
    batches = consecutive(len(dataset), batch_size)
    model.eval()
    start = time.perf_counter()
    system.embed(model, dataset.__getitems__(batches[0]))
    return (time.perf_counter() - start) * len(batches)
