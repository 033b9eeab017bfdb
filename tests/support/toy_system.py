"""A system small enough to train in a second: noisy linear pairs, an MLP with dropout."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nearfar.batching import RandomBatchSampler
from nearfar.config.options import set_option
from nearfar.config.training import RunOptions, TrainerOptions
from nearfar.losses import InfoNCELoss
from nearfar.metrics import rank_estimates, retrieval_ranks
from nearfar.training.checkpoint import Resume
from nearfar.training.fit import fit
from nearfar.training.run_folder import RunFolder
from nearfar.training.system import Evaluation, StepOutput, System

N, DIM = 70, 6


class ToyDataset:
    """Pairs (x, y); hands out whole batches, with noise drawn from (epoch, first position)."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y, self.epoch = x, y, 0
        self.noise = 0.01

    def __len__(self) -> int:
        return len(self.x)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, position: int) -> Any:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.epoch + positions[0])
        noise = self.noise * torch.randn(len(positions), DIM, generator=generator)
        return self.x[positions] + noise, self.y[positions]


class ToyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(DIM, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 8))
        self.b = nn.Sequential(nn.Linear(DIM, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 8))


class ToySystem(System):
    name, monitor = "toy", "MRR"

    def __init__(self, config: Any, data_seed: int = 0) -> None:
        self.config, self.data_seed = config, data_seed
        self.loss = InfoNCELoss(0.2)

    def prepare(self, say: Any) -> None:
        generator = torch.Generator().manual_seed(self.data_seed)
        x = torch.randn(N + 20, DIM, generator=generator)
        y = x @ torch.randn(DIM, DIM, generator=generator)
        self.datasets = {"train": ToyDataset(x[:N], y[:N]), "val": ToyDataset(x[N:], y[N:])}

    def layout(self) -> dict[str, Any]:
        return {"data_hash": f"toy{self.data_seed}"}

    def build_model(self) -> nn.Module:
        return ToyModel()

    def build_sampler(self) -> Any:
        return RandomBatchSampler(N, self.config.batch_size, seed=self.config.seed)

    def split(self, batch: Any, rows: int) -> list[Any]:
        return list(zip(batch[0].split(rows), batch[1].split(rows), strict=True))

    def encode(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {"a": model.a(batch[0]), "b": model.b(batch[1])}

    def loss_of(self, model: Any, embeddings: Any, batch: Any) -> StepOutput:
        return StepOutput(self.loss(embeddings["a"], embeddings["b"]))

    def evaluate(self, outputs: Any, split: str, final: bool) -> Evaluation:
        ranks = retrieval_ranks(outputs["a"], outputs["b"])
        estimates = rank_estimates(ranks, split="toy")
        return Evaluation(split, estimates, [str(i) for i in range(20)], {"MRR": ranks.reciprocal()})


def toy_config(**changes: Any) -> RunOptions:
    """Options of a toy run; ``trainer__threads=1`` changes one of the trainer."""
    config = RunOptions(
        system="toy",
        seed=3,
        epochs=4,
        batch_size=8,
        lr=1e-2,
        warmup=0.1,
        trainer=TrainerOptions(accelerator="cpu", eval_batch_size=16, log_every=2, checkpoint_minutes=60.0),
    )
    for key, value in changes.items():
        set_option(config, key.replace("__", "."), value)
    return config


def toy(config: Any, data_seed: int = 0) -> ToySystem:
    """A prepared system."""
    system = ToySystem(config, data_seed)
    system.prepare(print)
    return system


def silent(text: str) -> None:
    pass


def train(folder: Path, config: Any, resume: Resume | None = None, data_seed: int = 0) -> RunFolder:
    return fit(toy(config, data_seed), config, RunFolder(folder), resume, say=silent)


def killed_after(config: Any, folder: Path, steps: int) -> None:
    """Train in this (child) process and kill it, hard, after ``steps`` steps."""
    step = ToySystem.training_step
    count = 0

    def dying(self: ToySystem, model: Any, batch: Any) -> Any:
        nonlocal count
        if count == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return step(self, model, batch)

    ToySystem.training_step = dying  # type: ignore[method-assign]
    train(folder, config)
