"""Spatial relations as a system: crops, boxes and names aligned, and a probe on the frozen embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import cast

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.batching import BalancedBatchSampler, BatchSampler, RandomBatchSampler
from nearfar.data.batch import Augment, Batch, Inputs, ItemDataset, Rows
from nearfar.data.chunks import NewData
from nearfar.data.files import Json
from nearfar.data.items import Items
from nearfar.data.scenes.new_pairs import MIN_SCORE, items_of, read_pairs
from nearfar.data.scenes.relation_data import RelationData
from nearfar.data.scenes.triples import NAMES, SPATIAL, VISUAL
from nearfar.errors import NearfarError
from nearfar.losses.views import ViewContext, ViewLoss
from nearfar.models.projection import perceptron
from nearfar.models.views import ViewModel
from nearfar.systems.new_items import prepare_again
from nearfar.systems.relations.data import GROUP, JITTERED, BatchesBySort, BoxJitter, load_data
from nearfar.systems.relations.evaluator import Evaluator
from nearfar.systems.relations.options import InfoNCEOptions, RelationOptions, SupConInsideOptions
from nearfar.systems.relations.probe import LINEAR, Predictor, blocks_of_rows, has_pixels
from nearfar.systems.relations.report import sections
from nearfar.systems.view_system import LABEL, PRESENT, ViewSystem
from nearfar.towers import Tower
from nearfar.towers.boxes import BoxTower, names_of
from nearfar.towers.object_pairs import CropTower, NamesTower
from nearfar.training.sections import Section
from nearfar.training.state import initial_model
from nearfar.training.system import Evaluation, Say, TrainSampler

__all__ = ["RelationSystem"]

#: which views are contrasted; the jittered boxes are the second view of pairs with boxes alone
CONTRASTED = ((VISUAL, SPATIAL), (VISUAL, NAMES), (SPATIAL, NAMES), (SPATIAL, JITTERED))
BOX_LAYERS = (64, 128)


class RelationSystem(ViewSystem):
    """Aligns the views of a pair of objects; a probe on the embedding predicts their relation."""

    name = "relations"
    monitor = LINEAR
    new_options = MappingProxyType(
        {"min_score": f"boxes of a detector with lower scores are left out; by default {MIN_SCORE:g}"}
    )

    config: RelationOptions

    def __init__(self, config: RelationOptions) -> None:
        super().__init__(config)
        self.data: RelationData
        self.evaluator: Evaluator
        self._repeated = True
        #: what predicts new pairs, once the probe was fitted or loaded
        self.predictor: Predictor | None = None
        self._folder: Path | None = None
        self._whole: RelationSystem | None = None

    # -- data ------------------------------------------------------------------------------------------------
    def load_data(self, say: Say) -> RelationData:
        """The splits, from the configured files or composed; encodes nothing."""
        return load_data(self.config)

    def load_items(self, say: Say) -> dict[str, Items]:
        self.data = self.load_data(say)
        say(self.data.summary())
        group = self.data.train.group
        self._repeated = len(np.unique(group)) < len(group)
        return {name: self._items(name) for name in self.data.splits}

    def own_data(self, say: Say) -> tuple[dict[str, Items], str]:
        self._read(say)
        return self.splits, self.data.content_hash()

    def _items(self, split: str) -> Items:
        """The pairs of a split with a column for each view."""
        pairs = self.data.splits[split]
        items = items_of(pairs, self.data.source, photos=True, names=True)
        return replace(items, columns={view: items[view] for view in (SPATIAL, VISUAL, NAMES)})

    def readable(self, items: Items) -> Items:
        """All of them: the reader has checked boxes, names and photos, and a pair may have boxes alone."""
        return items

    def build_towers(self, say: Say) -> dict[str, Tower]:
        config = self.config
        towers: dict[str, Tower] = {SPATIAL: BoxTower(config.spatial)}
        if self.without_pixels is None:
            crops = CropTower(config.image_encoder, config.crop_size)
            crops.say = say
            towers[VISUAL] = crops
        else:
            say(f"visual: none, {self.without_pixels}")
        if config.categories:
            encoder = dict(config.text_encoder)
            towers[NAMES] = NamesTower(encoder.pop("kind"), train="head", **encoder)
        return towers

    @property
    def without_pixels(self) -> str | None:
        """Why there is no view of pixels; None where there is one."""
        if not self.config.pixels:
            return "pixels=false"
        return None if self.data.train.photos else "no training pair has a photo"

    def prepare(self, say: Say) -> None:
        """Read and check the data, encode crops and names (or take them from the cache), standardise."""
        super().prepare(say)
        if not self.config.categories and not self.config.box_jitter:
            alone = int((~has_pixels(self.datasets["train"])).sum())
            if alone == len(self.datasets["train"]):
                raise NearfarError(
                    "no training pair has a second view: no photo was found, and categories=false and box_jitter=0. "
                    "Give the photos with data.images=, or set box_jitter=0.05 or categories=true."
                )
            if alone:
                say(
                    f"{alone} training pairs have boxes alone, and box_jitter=0: nothing is learned from them "
                    "(box_jitter=0.05 gives them a second view)"
                )
        self.evaluator = Evaluator(self.config, self.data, self.datasets, self.embed)

    def value_groups(self, view: str) -> None:
        """None by view: rows with the same two boxes are the same in all."""

    def further_inputs(self, split: str, items: Items) -> dict[str, Inputs]:
        return {LABEL: Rows(self.data.labels(split)), GROUP: Rows(self.data.splits[split].group)}

    def augment(self) -> Augment | None:
        """Jittered boxes for pairs with boxes alone."""
        if not self.config.box_jitter or NAMES in self.towers:
            return None
        train, tower = self.splits["train"], self.towers[SPATIAL]
        assert isinstance(tower, BoxTower)
        if VISUAL in self.towers and train.present(VISUAL).all():
            return None
        present = f"{PRESENT}{VISUAL}" if VISUAL in self.towers else None
        return BoxJitter(train.array(SPATIAL), tower, self.config.box_jitter, present)

    def reference_view(self) -> str | None:
        """The boxes, which every pair has, where hard batches or likely false negatives are asked for."""
        return SPATIAL if self.needs_reference() else None

    def layout(self) -> Json:
        """Counts, rejections, hashes, and which encoders are really used."""
        encoders = {view: tower.description for view, tower in self.towers.items()}
        if VISUAL not in encoders:
            encoders[VISUAL] = f"none ({self.without_pixels})"
        own = {
            "data_hash": self.data.content_hash(),
            "spatial": {"variant": self.config.spatial, "numbers": list(names_of(self.config.spatial))},
            "encoders": encoders,
        }
        return self.data.layout() | own | self.neighbors_layout()

    # -- batches ---------------------------------------------------------------------------------------------
    def labels(self) -> np.ndarray:
        """The relation of every training pair."""
        return self.data.labels("train")

    def build_sampler(self) -> BatchSampler:
        """Batches of pairs with and without a photo for random ones; equal shares of every relation (small ones
        repeat); hard ones by the numbers of the boxes."""
        config, train = self.config, self.datasets["train"]
        size, seed = config.batch_size, config.seed
        if size > len(train):
            raise NearfarError(
                f"batch_size={size} is larger than the training set of {len(train)} pairs; lower it."
            )
        if config.sampler.name == "random":
            pixels = has_pixels(train)
            if pixels.all() or not pixels.any():
                return RandomBatchSampler(len(train), size, seed=seed)
            return BatchesBySort(pixels, size, seed=seed)
        if config.sampler.name == "balanced":
            return BalancedBatchSampler(self.labels(), size, repeat=True, seed=seed)
        return super().build_sampler()

    def check_sampler(self, sampler: TrainSampler, say: Say) -> None:
        """Announce how batches are composed; the A/A check of hard ones."""
        super().check_sampler(sampler, say)
        same = self.same_class_negatives(sampler)
        how = f"batches of {self.config.batch_size}, {self.config.sampler.name}"
        say(f"{how}: {same:.0%} of negatives share the relation")

    def on_epoch(self, epoch: int, sampler: TrainSampler, say: Say) -> Json:
        """Numbers on the batches of this epoch."""
        record = super().on_epoch(epoch, sampler, say)
        return record | {"same_class_negatives": self.same_class_negatives(sampler)}

    def same_class_negatives(self, sampler: TrainSampler, batches: int = 200) -> float:
        """The share of other rows of a batch that have an anchor's relation."""
        assert isinstance(sampler, BatchSampler)
        label, same, every = self.datasets["train"].tensor(LABEL).numpy(), 0, 0
        for batch in sampler.plan().batches()[:batches]:
            counts = np.bincount(label[batch])
            same, every = same + int((counts * (counts - 1)).sum()), every + len(batch) * (len(batch) - 1)
        return same / max(every, 1)

    # -- model and loss --------------------------------------------------------------------------------------
    def build_loss(self) -> ViewLoss:
        config, loss = self.config, self.config.loss
        if isinstance(loss, InfoNCEOptions):
            return ViewLoss("infonce", config.temperature, loss.symmetric, pairs=CONTRASTED)
        own_pair = not isinstance(loss, SupConInsideOptions)
        return ViewLoss("supcon", config.temperature, sum=loss.sum, own_pair=own_pair, pairs=CONTRASTED)

    def build_head(self, tower: Tower, view: str, width: int, dim: int) -> nn.Module:
        config = self.config
        if view == SPATIAL:
            return perceptron((width, *BOX_LAYERS, dim), config.spatial_dropout)
        hidden = config.visual_hidden if view == VISUAL else dim
        return perceptron((width, hidden, dim), config.visual_dropout)

    def read_weights(self, weights: Json) -> Json:
        """Those of versions whose model had its heads by the names of the views."""
        former = (f"{SPATIAL}.", f"{VISUAL}.", f"{NAMES}.")
        return {f"heads.{name}" if str(name).startswith(former) else name: w for name, w in weights.items()}

    def encode(self, model: ViewModel, batch: Batch) -> dict[str, Tensor]:
        """The embeddings of every view, in training also of the jittered boxes; of a view that a pair lacks, 0."""
        embeddings = super().encode(model, batch)
        if JITTERED in batch and model.training:
            embeddings[JITTERED] = model.encode(SPATIAL, batch[JITTERED])
        return embeddings

    def contrasted(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(embeddings)

    def context(self, embeddings: Mapping[str, Tensor], batch: Batch) -> ViewContext:
        """Rows with the same two boxes, annotated with two relations, are no negatives of each other in infonce."""
        context = super().context(embeddings, batch)
        present = dict(context.present)
        if VISUAL in present:
            present[JITTERED] = ~present[VISUAL]
        masked = (
            self.config.mask_duplicates and self._repeated and isinstance(self.config.loss, InfoNCEOptions)
        )
        groups = dict.fromkeys([*self.views, JITTERED], batch.tensor(GROUP))
        return replace(context, groups=groups, mask_duplicates=masked, present=present)

    def embed(self, model: ViewModel, batch: Batch) -> dict[str, Tensor]:
        """Every view at unit length; one that a pair lacks stays 0."""
        if self._folder is not None and self.predictor is None:  # a run of before probes were kept
            self.predictor = self._prepared().evaluator.fit_predictor(model)
        return {name: F.normalize(view, dim=1) for name, view in self.encode(model, batch).items()}

    # -- evaluation ------------------------------------------------------------------------------------------
    def before_evaluation(self, model: ViewModel, split: str, final: bool) -> None:
        """Embed the training pairs on which the probes are fitted."""
        self.evaluator.embed_train(model, split, final, lambda: initial_model(self, self.config.seed))

    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """Probe accuracy, with its controls when ``final``, and pair retrieval."""
        return self.evaluator.evaluate(outputs, split, final)

    # -- report ----------------------------------------------------------------------------------------------
    def report_examples(self, outputs: Mapping[str, Tensor], split: str) -> list[Json]:
        """None: the pictures of pairs are a section of the report."""
        return []

    def report_sections(self, outputs: Mapping[str, Tensor], split: str) -> Sequence[Section]:
        """Probes and controls, the confusion table, pair retrieval, pictures of pairs with their boxes."""
        evaluator = self.evaluator
        return sections(self.data.splits[split], evaluator.predictions[split], evaluator.scores[split])

    def save_assets(self, folder: Path) -> None:
        """The towers; of a run that was trained or loaded also the probe."""
        super().save_assets(folder)
        if self.predictor is not None:
            self.predictor.save(folder)

    def save_results(self, folder: Path) -> None:
        """The prediction for every pair, for re-scoring and pooled cross-validation; the probe, for new pairs."""
        for split, predictions in self.evaluator.predictions.items():
            predictions.save(folder / f"predictions_{split}.npz")
        self.predictor = self.evaluator.predictor()
        if self.predictor is not None:
            self.predictor.save(folder)

    # -- use of a trained run --------------------------------------------------------------------------------
    def load_assets(self, folder: Path) -> None:
        """Towers and probe; what an earlier version did not keep is made anew from the run's data, if it is there."""
        self._folder = folder
        self.predictor = Predictor.load(folder)
        if (folder / "towers").is_dir():
            super().load_assets(folder)
        else:
            self.towers = self._prepared().towers

    def _prepared(self) -> RelationSystem:
        """The same with the data of its run read anew."""
        assert self._folder is not None
        if self._whole is None:
            self._whole = RelationSystem(self.config)
            prepare_again(self._whole, self._folder, "the towers of its views, or its probe")
        return self._whole

    def new_items(self, source: NewData) -> Iterator[Items]:
        """Pairs of boxes in pictures, see `read_pairs`."""
        return read_pairs(
            source,
            photos=VISUAL in self.towers,
            required=self.config.data.photos == "required",
            names=NAMES in self.towers,
            min_score=source.number("min_score", MIN_SCORE, 0, 1),
        )

    def new_dataset(self, items: Items) -> ItemDataset:
        for view in self.views:
            if view not in items and view != VISUAL:
                raise NearfarError(f"a relation is predicted from '{view}', too: give it for every pair.")
        if VISUAL in self.towers and VISUAL not in items:
            items = replace(items, columns=dict(items.columns) | {VISUAL: [None] * len(items)})
        return super().new_dataset(items)

    def predictions(self, outputs: Mapping[str, Tensor], items: Items) -> dict[str, Sequence[object]]:
        """The relation of every pair by the probe of the run, and the probability of each relation."""
        assert self.predictor is not None
        kept = (SPATIAL, NAMES) if self.config.keep_inputs else ()
        inputs = {
            view: cast(Rows, self.towers[view].read(items[view])).values.numpy()
            for view in kept
            if view in self.towers
        }
        pixels = items.present(VISUAL) if VISUAL in items else np.zeros(len(items), bool)
        at, shares = self.predictor(blocks_of_rows(inputs, outputs, pixels))
        relations = self.predictor.relations
        columns: dict[str, Sequence[object]] = {
            name: list(items[name])
            for name in ("image", "subject", "object", "subject_box", "object_box")
            if name in items
        }
        columns["relation"] = [relations[i] for i in at.tolist()]
        columns["probability"] = shares[np.arange(len(at)), at].tolist()
        columns |= {f"p({relation})": shares[:, i].tolist() for i, relation in enumerate(relations)}
        if VISUAL in self.towers:
            columns["photo"] = pixels.tolist()
        return columns
