"""One view and labels, by a contrastive loss or a classifier, judged on items or classes that were never seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.data.batch import Batch, Inputs, Rows
from nearfar.data.classes import Classes
from nearfar.data.files import Json
from nearfar.data.items import Items, joined
from nearfar.errors import NearfarError
from nearfar.losses import MultiLabelSupConLoss, SupConLoss
from nearfar.models.views import ViewModel
from nearfar.systems.labelled import LabelledSystem
from nearfar.systems.labels.options import CrossEntropyOptions, LabelOptions, MultiLabelOptions, SupConOptions
from nearfar.systems.view_system import LABEL
from nearfar.training.system import Say, StepOutput

__all__ = ["LabelSystem"]


class LabelSystem(LabelledSystem):
    """Brings items of a class together (SupCon), by labels in common (several each), or classifies them."""

    name = "labels"
    config: LabelOptions

    def __init__(self, config: LabelOptions) -> None:
        super().__init__(config)
        self.several = isinstance(config.loss, MultiLabelOptions)
        self._unseen: list[str] = []

    # -- data ------------------------------------------------------------------------------------------------
    def divide(self, splits: dict[str, Items], say: Say) -> dict[str, Items]:
        """Keep the classes of the test split out of the others, where that was asked for."""
        labels = {name: self._labels_of(items) for name, items in splits.items()}
        many = any(len(each) > 1 for part in labels.values() for each in part)
        if many and isinstance(self.config.loss, CrossEntropyOptions):
            self.several = True
            if self.config.sampler.name == "balanced":
                raise NearfarError("sampler=balanced is for items with one label, and these have several.")
        share = self.config.unseen_classes
        if share is False:
            return splits
        if self.several or many:
            raise NearfarError("unseen_classes is for items with one label, and these have several.")
        own = {name: [each[0] for each in part] for name, part in labels.items()}
        given = self.config.data.test is not None or (self.config.data.dir is not None and "test" in splits)
        if share is True and given:
            shared = sorted(
                set(own["test"]) & {label for name in own if name != "test" for label in own[name]}
            )
            if shared:
                raise NearfarError(
                    f"unseen_classes=true: {len(shared)} classes of test are in training or validation, too "
                    f"({', '.join(shared[:5])}). Set a share instead, such as unseen_classes=0.5: these classes are "
                    "then taken out of training."
                )
            self._unseen = sorted(set(own["test"]))
            return splits
        fraction = 0.5 if share is True else float(share)
        counts = Counter(label for part in own.values() for label in part)
        names, drawn = sorted(counts), np.random.default_rng([self.config.data.split_seed, 2])
        wanted = round(fraction * len(names))
        if wanted < 2 or len(names) - wanted < 2:
            raise NearfarError(
                f"unseen_classes={share}: of {len(names)} classes {wanted} would be left for the test and "
                f"{len(names) - wanted} for training; two are needed on either side."
            )
        self._unseen = sorted(names[i] for i in drawn.permutation(len(names))[:wanted])
        hidden = set(self._unseen)
        if not given:  # a test split that was drawn at random gives way to all items of these classes
            whole = joined(list(splits.values()), splits["train"].source)
            of_whole = [label for part in own.values() for label in part]
            test = whole.take([i for i, label in enumerate(of_whole) if label in hidden])
        else:
            test = splits["test"].take([i for i, label in enumerate(own["test"]) if label in hidden])
        seen = {
            name: items.take([i for i, label in enumerate(own[name]) if label not in hidden])
            for name, items in splits.items()
            if name != "test"
        }
        for name, items in seen.items():
            items.rejections = splits[name].rejections
        shown = ", ".join(self._unseen[:8]) + (", …" if len(self._unseen) > 8 else "")
        say(
            f"test: {len(test):,} items of {wanted} of {len(names)} classes, none of them in training: {shown}"
        )
        return {name: items for name, items in {**seen, "test": test}.items() if len(items)}

    def check_classes(self, classes: Classes) -> None:
        train, counts = self.splits["train"], classes.counts
        if classes.known < 2:
            only = f"the label {classes.names[0]!r}" if classes.known else "no label"
            raise NearfarError(
                f"{train.source}: every training item has {only} in the column '{self.label}'; two classes are needed. "
                "Without labels: experiment=augmented."
            )
        if int(counts.max()) < 2:
            raise NearfarError(
                f"{train.source}: {len(train)} training items have {classes.known} different labels in the column "
                f"'{self.label}', each its own: no two belong together. Is it the column of ids? Name that of the "
                "classes with label=NAME."
            )

    def prepare(self, say: Say) -> None:
        super().prepare(say)
        assert self.classes is not None
        alone = int((self.classes.counts == 1).sum())
        if alone and not isinstance(self.config.loss, CrossEntropyOptions):
            say(
                f"{alone} classes have one training item, which has no positive and is a negative of the others"
            )

    def further_inputs(self, split: str, items: Items) -> dict[str, Inputs]:
        assert self.classes is not None
        return {LABEL: Rows(self.classes.codes[split])}

    def value_groups(self, view: str) -> dict[str, np.ndarray] | None:
        """None: what belongs together is a matter of labels."""
        return None

    def labels(self) -> np.ndarray | None:
        assert self.classes is not None
        return None if self.classes.several else self.classes.codes["train"]

    def votes(self, split: str) -> bool:
        return super().votes(split) and not (split == "test" and bool(self._unseen))

    # -- model and loss --------------------------------------------------------------------------------------
    def build_loss(self) -> nn.Module:
        config = self.config
        if isinstance(config.loss, SupConOptions):
            return SupConLoss(config.temperature, sum=config.loss.sum)
        if isinstance(config.loss, MultiLabelOptions):
            return MultiLabelSupConLoss(config.temperature)
        return nn.CrossEntropyLoss(label_smoothing=config.loss.smoothing)

    def build_model(self) -> ViewModel:
        """Tower and head; with ``loss=cross_entropy`` a linear classifier above the embedding."""
        model = super().build_model()
        if isinstance(self.config.loss, CrossEntropyOptions):
            width = self.shared_dim({self.view: int(model.tower(self.view).width)})  # type: ignore[arg-type]
            model.add_module("classifier", nn.Linear(width, len(self.class_names().names)))
        return model

    def loss_of(self, model: ViewModel, embeddings: Mapping[str, Tensor], batch: Batch) -> StepOutput:
        rows, labels = embeddings[self.view], batch.tensor(LABEL)
        if isinstance(self.config.loss, CrossEntropyOptions):
            return self._classified(model, rows, labels)
        return StepOutput(self.loss(rows, labels), self._contrast_record)

    def _classified(self, model: ViewModel, rows: Tensor, labels: Tensor) -> StepOutput:
        logits: Tensor = model.get_submodule("classifier")(rows)
        if labels.ndim == 1:
            loss: Tensor = self.loss(logits, labels)
            right = (logits.detach().argmax(1) == labels).float().mean()
            return StepOutput(loss, lambda: {"accuracy": right.item()})
        target = labels[:, : logits.shape[1]].to(logits.dtype)
        return StepOutput(F.binary_cross_entropy_with_logits(logits, target))

    # -- results ---------------------------------------------------------------------------------------------
    def unseen_classes(self) -> Sequence[str]:
        return self._unseen

    def layout(self) -> Json:
        return super().layout() | ({"unseen_classes": self._unseen} if self._unseen else {})

    @torch.no_grad()
    def average(self, outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Unit vectors of the models side by side: their cosine is the mean of the models' cosines."""
        return {
            self.view: torch.cat([F.normalize(each[self.view].float(), dim=1) for each in outputs], dim=1)
        }
