"""The first step of the tissue system in one process or two."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nearfar.overrides import compose_config
from nearfar.systems import build_system
from nearfar.training.fit import initial_model

ROWS = 24


def first_gradients(rank: int, world: int, overrides: list[str]) -> dict[str, Tensor]:
    """Gradients of the first step, averaged over the processes as DistributedDataParallel does."""
    config = compose_config(overrides)
    system: Any = build_system(config)
    system.prepare(lambda _: None)
    model = initial_model(system, config.seed).double()
    # Shuffled, so that neighbours stand on different ranks; uneven, as a last batch may be.
    batch = next(iter(system.build_sampler()))[:ROWS]
    batch = [batch[at] for at in torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).tolist()]
    cut = {1: [ROWS], 2: [ROWS - 10, 10]}[world]
    rows = [batch[sum(cut[:at]) : sum(cut[: at + 1])] for at in range(world)][rank]
    part = system.dataset("train").__getitems__(rows)
    part.images, part.genes, part.alpha = part.images.double(), part.genes.double(), part.alpha.double()
    model.eval()  # without dropout: each process would draw its own
    step = system.training_step(model, part)
    step.loss.backward()
    found = {"loss": step.loss.detach(), "reached": torch.tensor(step.logs().get("rows_with_neighbors", 0.0))}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            gradient = weight.grad.clone()
            if world > 1:
                dist.all_reduce(gradient)
            found[name] = gradient / world
    return found


def all_gradients(rank: int, world: int, overrides: list[str]) -> dict[str, dict[str, Tensor]]:
    """The same under each loss."""
    found = {}
    for name, more in {
        "spatial": [],
        "local": ["temp_reg_weight=0", "local_loss=true", "neighbors=positive"],
        "mask": ["neighbors=mask"],
        "clip": ["loss=clip", "local_loss=true"],
    }.items():
        found[name] = first_gradients(rank, world, [*overrides, *more])
    return found


def one_rank(rank: int, folder: Path, overrides: list[str]) -> None:
    """A process of two: writes its gradients to ``folder``."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=2)
    torch.save(all_gradients(rank, 2, overrides), folder / f"{rank}.pt")
    dist.destroy_process_group()
