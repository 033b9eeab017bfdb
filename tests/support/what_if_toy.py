"""The toy system with the options that counterfactuals change, planted false negatives and planted duplicates."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nearfar.batching import nearest_neighbors
from nearfar.config import RunOptions, group, option
from nearfar.config.options import read_options, set_option
from nearfar.config.samplers import HardBatchOptions, Items
from nearfar.contrast import DuplicateMask, SimilarityMask, join_masks
from nearfar.losses import InfoNCELoss
from nearfar.training.batches import build_sampler, neighbors_needed
from nearfar.training.fit import fit
from nearfar.training.run_folder import RunFolder
from nearfar.training.system import StepOutput
from toy_system import N, ToyModel, ToySystem, toy_config


class OptionsToy(ToySystem):
    """Rows 0 and 1 mean nearly the same (a false negative), rows 2 and 3 are copies."""

    def __init__(self, config: Any) -> None:
        if not isinstance(config, ToyOptions):  # that of a saved run
            config = read_options(ToyOptions, config, saved=True)
        super().__init__(config)
        self.loss = InfoNCELoss(config.temperature, symmetric=config.loss.symmetric)

    def prepare(self, say: Any) -> None:
        super().prepare(say)
        x, y = self.datasets["train"].x, self.datasets["train"].y
        x[1], y[1] = x[0] + 0.05, y[0] + 0.05
        x[3], y[3] = x[2], y[2]

    def build_model(self) -> nn.Module:
        model = ToyModel()
        if self.config.batchnorm:
            model.a.insert(1, nn.BatchNorm1d(16))
        return model

    def build_sampler(self) -> Any:
        neighbors = nearest_neighbors(self.datasets["train"].y, neighbors_needed(self.config, N))
        return build_sampler(self.config, Items(N, neighbors))

    def loss_of(self, model: Any, embeddings: Any, batch: Any) -> StepOutput:
        masks: list[Any] = []
        if self.config.mask_duplicates:
            masks.append(DuplicateMask((batch[1] * 1e4).sum(1).long()))
        if self.config.false_negative_threshold is not None:
            masks.append(SimilarityMask(batch[1], self.config.false_negative_threshold))
        value = self.loss(embeddings["a"], embeddings["b"], join_masks(masks))
        record = self.loss.record
        assert record is not None
        return StepOutput(value, record.to_dict)


@dataclass
class ToyLoss:
    """InfoNCE."""

    name: Literal["infonce"] = option("infonce", "the loss")
    symmetric: bool = option(True, "both directions")


@dataclass
class ToyOptions(HardBatchOptions):
    """Options of an ``OptionsToy``."""

    system: str = "toy"
    hardness_k: Any = 10
    temperature: float = option(0.2, "of the similarities", role="loss")
    mask_duplicates: bool = option(False, "copies are no negatives", role="loss")
    batchnorm: bool = option(False, "a batch norm in one tower")
    loss: ToyLoss = group(infonce=ToyLoss(), role="loss")


def options(**changes: Any) -> ToyOptions:
    """The configuration of an ``OptionsToy``."""
    config = ToyOptions(**{each.name: getattr(toy_config(), each.name) for each in fields(RunOptions)})
    for key, value in changes.items():
        set_option(config, key.replace("__", "."), value)
    return config


def trained(folder: Path, **changes: Any) -> RunFolder:
    """A run of the toy."""
    config = options(**changes)
    system = OptionsToy(config)
    system.prepare(print)
    return fit(system, config, RunFolder(folder), say=lambda _: None)


def explicit_loss(
    a: torch.Tensor, b: torch.Tensor, temperature: float, left_out: torch.Tensor, symmetric: bool = True
) -> torch.Tensor:
    """InfoNCE as a loop over rows, without the pairs that are left out."""
    a, b = (each / each.norm(dim=1, keepdim=True) for each in (a, b))
    directions = []
    for first, second in ((a, b), (b, a))[: 2 if symmetric else 1]:
        rows = []
        for i in range(len(first)):
            candidates = ~left_out[i]
            candidates[i] = True
            scores = (second @ first[i] / temperature)[candidates]
            rows.append(torch.logsumexp(scores, 0) - first[i] @ second[i] / temperature)
        directions.append(torch.stack(rows).mean())
    return torch.stack(directions).mean()
