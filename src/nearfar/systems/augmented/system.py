"""One view seen twice: pictures under augmentation, other values under dropout, by SimCLR or MoCo."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar.contrast import DuplicateMask
from nearfar.data.augment import AugmentedViews, simclr_augmentation
from nearfar.data.batch import Augment, Batch, Draw, Pixels
from nearfar.errors import NearfarError
from nearfar.losses import InfoNCELoss, SupConLoss
from nearfar.losses.memory import CrossBatchMemory
from nearfar.metrics import rank_estimates, retrieval_ranks
from nearfar.models.views import ViewModel, module_name
from nearfar.systems.augmented.options import AugmentedOptions, MoCoOptions
from nearfar.systems.class_scores import Scores
from nearfar.systems.labelled import LabelledSystem
from nearfar.systems.view_system import GROUP
from nearfar.towers import Tower
from nearfar.training.system import Evaluation, Say, StepOutput

__all__ = ["AugmentedSystem"]

FIRST, SECOND, KEY = "first", "second", "key"
SECOND_VIEW = "second_view"


class AugmentedSystem(LabelledSystem):
    """Contrasts two augmented views of each item with those of other items; labels judge, and teach nothing.

    Pixels that a network is trained on are augmented. Everything else is passed through the network twice under
    dropout: that of the tower, and ``view_dropout`` of what the tower gives (as SimCSE, Gao et al. 2021).
    """

    name = "augmented"
    monitor = f"{SECOND_VIEW}/MRR"
    needs_labels = False

    config: AugmentedOptions

    @property
    def pixels(self) -> bool:
        """Whether views are augmented pixels; else they are two passes under dropout."""
        tower = self.towers[self.view]
        return tower.kind == "image" and tower.train in ("full", "lora")

    # -- data ------------------------------------------------------------------------------------------------
    def prepare(self, say: Say) -> None:
        super().prepare(say)
        if not self.pixels:
            say(f"two views: two passes under dropout, {self.config.view_dropout:g} of what the tower gives")
            return
        say(f"two views: {', '.join(repr(change) for change in self._augmentation().augmentation.changes)}")
        for name, data in self.datasets.items():
            if name != "train":  # drawn alike in every evaluation
                data.augment = self._augmentation()

    def augment(self) -> Augment | None:
        return self._augmentation() if self.pixels else None

    def _augmentation(self) -> AugmentedViews:
        options, pictures = self.config.augment, self.datasets.get("train")
        read = None if pictures is None else pictures.inputs[self.view]
        side = read.pictures.shape[1] if isinstance(read, Pixels) else 224
        changes = simclr_augmentation(
            options.crop, options.flip, options.jitter, options.grey, options.blur, side
        )
        if not changes.changes:
            raise NearfarError(
                "augment: every change is turned off, so that both views are the same picture."
            )
        return AugmentedViews({FIRST: self.view, SECOND: self.view}, changes)

    # -- model -----------------------------------------------------------------------------------------------
    def build_head(self, tower: Tower, view: str, width: int, dim: int) -> nn.Module:
        head, share = super().build_head(tower, view, width, dim), self.config.view_dropout
        return head if self.pixels or not share else nn.Sequential(nn.Dropout(share), head)

    def build_model(self) -> ViewModel:
        """Tower and head; of MoCo also those of the keys, which follow, and the queue."""
        model = super().build_model()
        if not self.pixels and not any(_drops(module) for module in model.modules()):
            raise NearfarError(
                "two passes give the same view twice: this tower has no dropout, and view_dropout=0. Set "
                "view_dropout=0.1."
            )
        loss = self.config.loss
        if isinstance(loss, MoCoOptions):
            tower, head = model.tower(self.view), model.heads[module_name(self.view)]
            width = int(cast(int, tower.width))
            keys = nn.Sequential(copy.deepcopy(tower), copy.deepcopy(head)).requires_grad_(False)
            model.add_module("keys", keys)
            dim = self.shared_dim({self.view: width})
            model.add_module("queue", CrossBatchMemory(loss.queue, dim, ids=True))
        return model

    def encode(self, model: ViewModel, batch: Batch) -> dict[str, Tensor]:
        """Both views of every item; of MoCo the second one by the encoder of keys."""
        fields = [batch[FIRST], batch[SECOND]] if self.pixels else 2 * [batch[self.view]]
        first = model.encode(self.view, fields[0])
        if isinstance(self.config.loss, MoCoOptions):
            with torch.no_grad():
                key: Tensor = model.get_submodule("keys")(fields[1])
            return {FIRST: first, KEY: key}
        return {FIRST: first, SECOND: model.encode(self.view, fields[1])}

    def embed(self, model: ViewModel, batch: Batch) -> dict[str, Tensor]:
        """What is judged, of the item as it is; and both views, those of dropout drawn from the first position."""
        judged = super().embed(model, batch)
        if f"{GROUP}{self.view}" not in batch:  # new items, which are predicted and not judged
            return judged
        if self.pixels:
            views = {name: model.encode(self.view, batch[name]) for name in (FIRST, SECOND)}
            return judged | views
        draw = Draw(self.config.seed, 0, int(batch.positions[0]))
        with _dropping(model, draw):
            return judged | {name: model.encode(self.view, batch[self.view]) for name in (FIRST, SECOND)}

    # -- loss ------------------------------------------------------------------------------------------------
    def build_loss(self) -> nn.Module:
        if isinstance(self.config.loss, MoCoOptions):
            return InfoNCELoss(self.config.temperature, symmetric=False)
        return SupConLoss(self.config.temperature)

    def loss_of(self, model: ViewModel, embeddings: Mapping[str, Tensor], batch: Batch) -> StepOutput:
        own = self._items(batch)
        if not isinstance(self.config.loss, MoCoOptions):
            both = torch.cat([embeddings[FIRST], embeddings[SECOND]])
            return StepOutput(self.loss(both, own.repeat(2)), self._contrast_record)
        queue = cast(CrossBatchMemory, model.get_submodule("queue"))
        rows, masks = None, None
        if queue.filled:
            rows, masks = (queue.rows(), None), (DuplicateMask(own, queue.ids()), None)
        same = DuplicateMask(own)
        value = self.loss(embeddings[FIRST], embeddings[KEY], same, None, rows, masks)
        age = queue.age().float().mean() if queue.filled else torch.zeros(())
        queue.push(embeddings[KEY].float(), own)
        if model.training:  # a probe asks for losses in eval mode, and weights must not change then
            self._follow(model, self.config.loss.momentum)
        return StepOutput(value, lambda: self._contrast_record() | {"memory_age": age.item()})

    def _items(self, batch: Batch) -> Int[Tensor, " b"]:
        """What tells items apart: their value, where copies are no negatives, else their position."""
        name = f"{GROUP}{self.view}"
        return batch.tensor(name) if self.config.mask_duplicates and name in batch else batch.positions

    @torch.no_grad()
    def _follow(self, model: ViewModel, momentum: float) -> None:
        """The weights of the keys' encoder a step nearer to those of the model (He et al. 2020)."""
        own = [model.tower(self.view), model.heads[module_name(self.view)]]
        trained = [parameter for module in own for parameter in module.parameters()]
        for key, parameter in zip(model.get_submodule("keys").parameters(), trained, strict=True):
            key.lerp_(parameter.to(key.dtype), 1 - momentum)

    # -- evaluation ------------------------------------------------------------------------------------------
    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """What labels say, where there are any, and retrieval of the second view by the first."""
        judged = super().evaluate(outputs, split, final)
        estimates, per_item = dict(judged.estimates), dict(judged.per_item)
        numbers, scores = self._second_view(outputs, split, final)
        estimates |= numbers
        per_item |= scores
        return Evaluation(split, estimates, judged.ids, per_item, judged.facts)

    @torch.inference_mode(False)
    def _second_view(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Scores:
        items = self.datasets[split].tensor(f"{GROUP}{self.view}")
        first, second = (outputs[name].float().clone() for name in (FIRST, SECOND))
        ranks = retrieval_ranks(first, second, (items, items))
        numbers = rank_estimates(
            ranks, (1,), bootstrap=self.config.bootstrap if final else 0, split=self._content(split)
        )
        estimates = {
            f"{SECOND_VIEW}/{name}": replace(numbers[name], metric=f"{SECOND_VIEW}/{name}")
            for name in ("R@1", "MRR")
        }
        scores = {f"{SECOND_VIEW}/R@1": ranks.hits(1), f"{SECOND_VIEW}/MRR": ranks.reciprocal()}
        return estimates, scores

    def average(self, outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Unit vectors of the models side by side: their cosine is the mean of the models' cosines."""
        return {
            name: torch.cat([_unit(each[name]) for each in outputs], dim=1)
            for name in (self.view, FIRST, SECOND)
            if name in outputs[0]
        }


def _unit(rows: Tensor) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(rows.float(), dim=1)


def _drops(module: nn.Module) -> bool:
    """Whether two passes in training mode differ by this module."""
    if isinstance(module, nn.Dropout | nn.AlphaDropout):
        return module.p > 0
    rates = (getattr(module, name, 0.0) for name in ("dropout", "word_dropout"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


@contextmanager
def _dropping(model: nn.Module, draw: Draw) -> Iterator[None]:
    """Dropout as in training, drawn from ``draw``; everything else as in evaluation."""
    modes = {module: module.training for module in model.modules()}
    seed = int(np.random.SeedSequence((draw.seed, draw.epoch, draw.first)).generate_state(1)[0])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in modes:
            module.training = module.training or _drops(module)
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
