"""Items with views, a tower for each view, a loss between the views: what most systems are made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.batching import BatchSampler, Neighbors
from nearfar.batching.mapped_neighbors import UnitVectors
from nearfar.config.samplers import Items as SamplerItems
from nearfar.config.views import ViewOptions
from nearfar.contrast import SimilarityMask, join_masks
from nearfar.data.batch import Augment, Batch, Inputs, ItemDataset, Rows, one_after_another
from nearfar.data.cache import content_key
from nearfar.data.files import Json
from nearfar.data.items import Column, Items, ItemSplits, LoadedData, shared_values, value_groups
from nearfar.errors import NearfarError
from nearfar.losses.views import ViewContext, ViewLoss, view_pairs
from nearfar.metrics import Estimate, batch_signals, rank_estimates, retrieval_ranks
from nearfar.models.views import ViewMemory, ViewModel, build_head, module_name
from nearfar.systems.new_items import PRESENT, NewItems, some_of
from nearfar.towers import Tower, save_towers
from nearfar.towers.build import tower_folder
from nearfar.training.batches import (
    LIKELY_FALSE_NEGATIVE,
    build_sampler,
    cached_neighbors,
    check_batches,
    epoch_record,
    listed_neighbors,
    neighbors_needed,
    without_zero_rows,
)
from nearfar.training.sections import retrieval_examples
from nearfar.training.system import (
    Evaluation,
    Say,
    StepOutput,
    TrainSampler,
)

__all__ = ["PRESENT", "ViewSystem"]

KS = (1, 5, 10)
#: fields of a batch that belong to a view: ``group:VIEW`` are equal where its value is, ``present:VIEW`` is whether a
#: row has it, ``negatives:VIEW:i`` are further values that are negatives of their own row
GROUP, NEGATIVES = "group:", "negatives:"
REFERENCE, LABEL = "reference", "label"


class ViewSystem(NewItems):
    """A system of items with views. It defines ``load_items`` and ``build_towers``; everything else has a default.

    ``prepare`` reads the items, counts values that a tower cannot read as rejections, fits towers on the training
    values alone, and makes a dataset of each split. The model has a tower and a head for each view, the loss is
    contrastive between views, and success is judged by retrieval between views.
    """

    config: ViewOptions

    def __init__(self, config: ViewOptions) -> None:
        self.config = config
        self.loss: nn.Module = self.build_loss()
        self.splits: dict[str, Items] = {}
        self.towers: dict[str, Tower] = {}
        self.datasets: dict[str, ItemDataset] = {}
        self.neighbors: Neighbors | None = None
        #: what splits share, see ``shared_values``; None: nobody looked
        self.shared: dict[str, Json] | None = None
        self._directions: np.ndarray | UnitVectors | None = None
        self._say: Say = lambda text: None

    # -- to define -------------------------------------------------------------------------------------------
    @abstractmethod
    def load_items(self, say: Say) -> dict[str, Items]:
        """The splits, by name: ``train``, and ``val``, ``test`` or both."""

    @abstractmethod
    def build_towers(self, say: Say) -> dict[str, Tower]:
        """The tower of each view, not fitted; one tower under two names is shared. ``splits`` are there by now."""

    # -- data ------------------------------------------------------------------------------------------------
    def prepare(self, say: Say) -> None:
        """Read items, fit towers, turn values into arrays, look for neighbours where they are needed."""
        self._say = say
        self._read(say)
        for name, items in self.splits.items():
            if len(items.rejections):
                say(f"{name}: {items.source}: {items.rejections.summary()}")
        self.fit_towers()
        for tower, views in self._distinct():
            say(f"{' and '.join(views)}: {tower.description}")
        groups = {view: known for view in self.views if (known := self.value_groups(view)) is not None}
        for name, items in self.splits.items():
            inputs = self.view_inputs(items)
            inputs |= {f"{GROUP}{view}": Rows(known[name]) for view, known in groups.items()}
            inputs |= self.further_inputs(name, items)
            train = name == "train"
            self.datasets[name] = ItemDataset(
                inputs, self.augment() if train else None, seed=self.config.seed
            )
        if set(groups) == set(self.views):
            self.shared = shared_values(groups, {name: items.ids for name, items in self.splits.items()})
            self.announce_shared(say)
        self._find_neighbors(say)

    def announce_shared(self, say: Say) -> None:
        """A line for each two splits that share values; a whole item in both is a leak."""
        for pair, counts in (self.shared or {}).items():
            listed = [
                f"{each['shared']} values of '{view}'" for view, each in counts.items() if view != "item"
            ]
            if "item" in counts:
                listed.insert(0, f"{counts['item']['shared']} whole items (split leak)")
            say(f"{pair.replace('/', ' and ')} share {', '.join(listed)}")

    def _read(self, say: Say) -> None:
        self.splits = self.load_items(say)
        self.towers = self.build_towers(say)
        check_names(self.views)
        self.splits = {name: self.readable(items) for name, items in self.splits.items()}

    def load_data(self, say: Say) -> LoadedData:
        """The splits for ``nearfar data``: what is taken, what is rejected and why; fits and computes nothing."""
        self._read(say)
        return ItemSplits(self.splits)

    def readable(self, items: Items) -> Items:
        """Without items of which a value cannot be read, or that have fewer than two views; each is counted with its
        reason."""
        views = self.views
        reasons: list[str | None] = [None] * len(items)
        for view in views:
            present = np.flatnonzero(items.present(view))
            values = some_of(items[view], present)
            for at, reason in zip(present.tolist(), self.towers[view].check(values), strict=True):
                if reason is not None and reasons[at] is None:
                    reasons[at] = f"{view}: {reason}"
        items = items.rejecting(views[0], reasons)
        if len(views) > 1:
            enough = np.sum([items.present(view) for view in views], axis=0) > 1
            items = items.rejecting(views[0], [None if each else "fewer than two views" for each in enough])
        if not len(items):
            what = "no item has two views" if len(views) > 1 else f"no item has a value in '{views[0]}'"
            raise NearfarError(f"{items.source}: {what} that can be read; {items.rejections.summary()}.")
        return items

    def _distinct(self) -> list[tuple[Tower, list[str]]]:
        """Each tower once, with the views that it reads."""
        readers: list[tuple[Tower, list[str]]] = []
        for view, tower in self.towers.items():
            known = next((views for each, views in readers if each is tower), None)
            if known is None:
                readers.append((tower, [view]))
            else:
                known.append(view)
        return readers

    def fit_towers(self) -> None:
        """Every tower on the training values of its views."""
        train = self.splits["train"]
        for tower, views in self._distinct():
            parts = [some_of(train[view], np.flatnonzero(train.present(view))) for view in views]
            if any(not len(part) for part in parts):
                empty = views[[len(part) for part in parts].index(0)]
                raise NearfarError(f"{train.source}: no training item has a value in the column '{empty}'.")
            values = parts[0] if len(parts) == 1 else _joined(parts)
            tower.fit(values)

    def view_inputs(self, items: Items) -> dict[str, Inputs]:
        """What each tower reads of the items, and which items have a view that some of them lack."""
        inputs = self.tower_inputs(items, self.towers)
        reference = self.reference_view()
        if reference is not None:
            vectors = self._reference(reference, items, inputs[reference])
            if vectors is not None:
                inputs[REFERENCE] = Rows(vectors)
        return inputs

    def value_groups(self, view: str) -> dict[str, np.ndarray] | None:
        """For the items of each split a number that is equal where a view's value is the same, as its tower sees it.

        None: the loss need not know, and no value is looked at.
        """
        return value_groups(self.splits, view, self.towers[view].keys)

    def further_inputs(self, split: str, items: Items) -> dict[str, Inputs]:
        """Fields beyond the views, such as labels."""
        return {}

    def augment(self) -> Augment | None:
        """What changes every training batch: what the towers change of their views."""
        changes = [
            change for view, tower in self.towers.items() if (change := tower.augment(view)) is not None
        ]
        return one_after_another(changes) if changes else None

    # -- likeness before training ----------------------------------------------------------------------------
    def reference_view(self) -> str | None:
        """The view whose frozen vectors tell what is alike before training: hard batches and likely false negatives."""
        return None

    def needs_reference(self) -> bool:
        """Whether the run cannot do without: then vectors are computed even where they cost a pass over the data."""
        config = self.config
        computed = config.sampler.composes_hard_batches and config.sampler.lists is None
        return computed or config.false_negative_threshold is not None

    def _reference(self, view: str, items: Items, inputs: Inputs) -> Tensor | np.ndarray | None:
        tower = self.towers[view]
        if isinstance(inputs, Rows) and tower.reads_reference:
            return inputs.values
        if not self.needs_reference():
            return None
        if not items.present(view).all():
            raise NearfarError(
                f"hard batches and false_negative_threshold go by the vectors of '{view}', which some items lack; name "
                "a view that every item has, or take sampler=random."
            )
        vectors = tower.reference(some_of(items[view], np.arange(len(items))))
        if vectors is None:
            raise NearfarError(
                f"hard batches and false_negative_threshold go by vectors from before training, and the tower of "
                f"'{view}' has none ({tower.description}). Take a pretrained or n-gram encoder for it, name a "
                "different view, or take sampler=random."
            )
        return vectors

    def _find_neighbors(self, say: Say) -> None:
        train, ids = self.datasets["train"], self.splits["train"].ids
        if REFERENCE in train.inputs:
            self._directions = without_zero_rows(train.tensor(REFERENCE).numpy(), say)
        if self.config.sampler.lists is not None:
            self.neighbors, listed = listed_neighbors(self.config, ids, say)
            self._directions = listed if self._directions is None else self._directions
        elif isinstance(self._directions, np.ndarray):
            self.neighbors = cached_neighbors(
                self._directions, neighbors_needed(self.config, len(train)), ids
            )

    def layout(self) -> Json:
        """Counts, rejections, hashes, and which encoders are really used."""
        layout: Json = {
            "system": self.name,
            "splits": {name: items.layout() for name, items in self.splits.items()},
            "data_hash": self.data_hash(*self.splits.values()),
            "views": {view: tower.description for view, tower in self.towers.items()},
        }
        if self.shared is not None:
            # A value may stand in two splits, as the topic of two texts does; a whole item may not.
            layout["shared"] = self.shared
            layout["leaks"] = {
                pair: {"item": each["item"]} for pair, each in self.shared.items() if "item" in each
            }
        return layout | self.neighbors_layout()

    def neighbors_layout(self) -> Json:
        """What neighbours are of and how they were found, where there are any."""
        known = self.neighbors
        if known is None:
            return {}
        how = {"k": known.k, "exact": known.exact, "index": known.index, "recall": known.recall}
        of = self.reference_view() if self.config.sampler.lists is None else "sampler.neighbors"
        return {"neighbors": {"of": of, **how}}

    def data_hash(self, *splits: Items) -> str:
        """Names what splits hold, in order: sixteen hexadecimal digits. A run is resumed on the same data alone."""
        return content_key(*map(self.content_hash, splits))[:16]

    def content_hash(self, items: Items) -> str:
        """Names what a split holds: sixteen hexadecimal digits of its ids and of the values of its views, in order.

        Of pictures in files it is their names: the same data is the same in a different folder.
        """
        columns = {}
        for view in self.views:
            values = items[view]
            if self.towers[view].kind == "image" and not isinstance(values, np.ndarray):
                values = [None if value is None else Path(str(value)).name for value in values]
            columns[view] = values
        return Items(items.ids, columns).content_hash()

    # -- batches ---------------------------------------------------------------------------------------------
    def labels(self) -> np.ndarray | None:
        """Classes of the training items, of which ``sampler=balanced`` draws as many each; None: there are none."""
        return None

    def places(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Positions (n, 2) of the training items and the plane that each lies on, which ``sampler=spatial`` needs;
        None: they have none."""
        return None

    def build_sampler(self) -> BatchSampler:
        """The sampler that the configuration names."""
        labels = self.labels()
        items = SamplerItems(
            len(self.datasets["train"]),
            self.neighbors,
            labels=None if labels is None else lambda: labels,
            places=self.places(),
        )
        return build_sampler(self.config, items)

    def on_epoch(self, epoch: int, sampler: TrainSampler, say: Say) -> Json:
        """Apply schedules and measure how hard the resulting batches are, where neighbours are known."""
        if self.neighbors is not None:
            return epoch_record(self.config, epoch, sampler, self.neighbors, say)
        sampler.set_epoch(epoch)
        choice = self.config.sampler
        return {"sampler": choice.name, "composes_hard_batches": choice.composes_hard_batches}

    def check_sampler(self, sampler: TrainSampler, say: Say) -> None:
        """The A/A check of the first hard epoch."""
        if self._directions is not None:
            check_batches(self.config, sampler, self._directions, say)

    # -- model and loss --------------------------------------------------------------------------------------
    def build_loss(self) -> nn.Module:
        """The loss between views; a `ViewLoss` unless a system has its own."""
        return ViewLoss("infonce", self.config.temperature)

    def build_model(self) -> ViewModel:
        """The module of every tower, then the heads above them; a shared tower has one head."""
        readers = self._distinct()
        built = [tower.build() for tower, _ in readers]
        widths = {
            views[0]: int(cast(int, module.width)) for (_, views), module in zip(readers, built, strict=True)
        }
        dim = self.shared_dim(widths)
        modules: dict[str, nn.Module] = {}
        heads: dict[str, nn.Module] = {}
        for (tower, views), module in zip(readers, built, strict=True):
            head = self.build_head(tower, views[0], widths[views[0]], dim)
            modules |= dict.fromkeys(views, module)
            heads |= dict.fromkeys(views, head)
        ordered = {view: modules[view] for view in self.views}
        return ViewModel(ordered, {view: heads[view] for view in self.views}, **self.model_options(dim))

    def shared_dim(self, widths: Mapping[str, int]) -> int:
        """Dimensions of the shared space, given the widths of the towers by their first view."""
        return self.config.embedding_dim

    def build_head(self, tower: Tower, view: str, width: int, dim: int) -> nn.Module:
        """What stands above a tower; heads are made in the order of the views, from PyTorch's generator."""
        return build_head("linear", width, dim)

    def model_options(self, dim: int) -> Json:
        """Temperature and memory of the model."""
        config, memory = self.config, None
        if config.memory:
            reference = None
            if config.false_negative_threshold is not None:
                reference = int(self.datasets["train"].tensor(REFERENCE).shape[1])
            dims = dict.fromkeys(self.views, dim)
            memory = ViewMemory(dims, config.memory, reference)
        return {
            "temperature": config.temperature,
            "learn_temperature": config.learn_temperature,
            "memory": memory,
        }

    def parameter_groups(self, model: nn.Module) -> list[Json]:
        """Weight decay for matrices that are no embeddings; a tower may have a learning rate of its own."""
        assert isinstance(model, ViewModel)
        rates: dict[int, float] = {}
        for view, tower in self.towers.items():
            if tower.lr is not None:
                rates |= {id(p): float(tower.lr) for p in model.tower(view).parameters()}
        tables = {
            id(module.weight)
            for module in model.modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        }
        groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                decays = parameter.ndim >= 2 and id(parameter) not in tables
                groups.setdefault((rates.get(id(parameter)), decays), []).append(parameter)
        return [
            {"params": some, "weight_decay": self.config.weight_decay if decays else 0.0}
            | ({} if rate is None else {"lr": rate})
            for (rate, decays), some in groups.items()
        ]

    def encode(self, model: ViewModel, batch: Batch) -> dict[str, Tensor]:
        """The embeddings of every view; of a row that lacks one, 0. Further negatives are embedded as their view is."""
        embeddings = {}
        for view in self.views:
            if view in batch:  # new items may have some of the views alone
                present = batch.tensor(f"{PRESENT}{view}") if f"{PRESENT}{view}" in batch else None
                embeddings[view] = model.encode(view, batch[view], present)
        for name in batch:
            if name.startswith(NEGATIVES):
                embeddings[name] = model.encode(negated_view(name), batch[name])
        return embeddings

    def context(self, embeddings: Mapping[str, Tensor], batch: Batch) -> ViewContext:
        """What the loss has to know of the rows of a batch beside their embeddings."""
        negatives: dict[str, list[Tensor]] = {}
        for name, rows in embeddings.items():
            if name.startswith(NEGATIVES):
                negatives.setdefault(negated_view(name), []).append(rows)
        return ViewContext(
            {view: batch.tensor(f"{GROUP}{view}") for view in self.views if f"{GROUP}{view}" in batch},
            self.config.mask_duplicates,
            {view: batch.tensor(f"{PRESENT}{view}") for view in self.views if f"{PRESENT}{view}" in batch},
            batch.tensor(REFERENCE) if REFERENCE in batch else None,
            self.config.false_negative_threshold,
            batch.tensor(LABEL) if LABEL in batch else None,
            {view: torch.stack(rows, dim=1) for view, rows in negatives.items()},
        )

    def contrasted(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The embeddings that the loss is given, by view."""
        return {view: embeddings[view] for view in self.views}

    def loss_of(self, model: ViewModel, embeddings: Mapping[str, Tensor], batch: Batch) -> StepOutput:
        """The loss between views; equal values and likely false negatives are no negatives."""
        loss = cast(ViewLoss, self.loss)
        context, memory = self.context(embeddings, batch), model.memory
        value = loss(
            self.contrasted(embeddings), context, scale=model.scale(), bias=model.bias, memory=memory
        )
        if memory is None:
            return StepOutput(value, lambda: self._record(context, batch))
        age = memory.age()
        whole: slice | Tensor = slice(None)
        partial = [context.present[view] for view in self.views if view in context.present]
        if partial:
            whole = torch.stack(partial).all(0).nonzero()[:, 0]
        memory.push(
            {view: embeddings[view][whole] for view in self.views},
            {view: context.groups[view][whole] for view in self.views},
            None if context.reference is None else context.reference[whole],
        )
        return StepOutput(value, lambda: self._record(context, batch) | {"memory_age": age.item()})

    def _record(self, context: ViewContext, batch: Batch) -> dict[str, float]:
        """The loss's record, and the shares of copies and likely false negatives among the batch's negatives."""
        record = cast(ViewLoss, self.loss).record()
        if "scale" in record:
            record["largest_logit"] = record["scale"]  # embeddings have unit length
        first, second = next(iter(self.pairs()), ("", ""))
        if not {first, second} <= context.groups.keys() - context.present.keys():
            return record
        copies = join_masks(ViewContext(context.groups).same_content(first, second))
        likely = None
        if context.reference is not None:
            threshold = LIKELY_FALSE_NEGATIVE if context.threshold is None else context.threshold
            likely = SimilarityMask(context.reference, threshold)
        return record | batch_signals(copies, likely, left_out=context.mask(first, second))

    # -- evaluation ------------------------------------------------------------------------------------------
    def pairs(self) -> list[tuple[str, str]]:
        """The views that are contrasted and judged with each other."""
        return self.loss.pairs_of(self.views) if isinstance(self.loss, ViewLoss) else view_pairs(self.views)

    def answers(self, split: str) -> np.ndarray | None:
        """A label (n,) for each item of a split: those of the same label answer a query; None: its own item alone."""
        return None

    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """Retrieval between views, the whole split as gallery."""
        estimates, per_item = self.retrieval(outputs, split, final)
        return Evaluation(split, estimates, self.splits[split].ids, per_item)

    def retrieval(
        self, outputs: Mapping[str, Tensor], split: str, final: bool
    ) -> tuple[dict[str, Estimate], dict[str, np.ndarray]]:
        """Estimates and scores of every item for each two views, in both directions."""
        estimates: dict[str, Estimate] = {}
        per_item: dict[str, np.ndarray] = {}
        items = self.splits[split]
        for first, second in self.pairs():
            rows = items.present(first) & items.present(second)
            if int(rows.sum()) < 2:
                continue
            labels = self.answers(split)
            relevant = None if labels is None else (labels[rows], labels[rows])
            at = torch.from_numpy(np.flatnonzero(rows))
            ranks = retrieval_ranks(outputs[first][at], outputs[second][at], relevant, both=True)
            for (query, key), direction in zip(((first, second), (second, first)), ranks, strict=True):
                name = f"{query}_to_{key}"
                numbers = rank_estimates(
                    direction,
                    KS,
                    bootstrap=self.config.bootstrap if final else 0,
                    split=self.content_hash(items),
                )
                estimates |= {f"{name}/{metric}": estimate for metric, estimate in numbers.items()}
                if rows.all():
                    per_item |= {f"{name}/R@{k}": direction.hits(k) for k in KS}
                    per_item[f"{name}/MRR"] = direction.reciprocal()
        return estimates, per_item

    # -- results ---------------------------------------------------------------------------------------------
    def shown(self, split: str, view: str, position: int) -> Json:
        """What the report shows of a value."""
        return {"text": str(self.splits[split][view][position])[:300]}

    def report_examples(self, outputs: Mapping[str, Tensor], split: str) -> list[Json]:
        """Queries with their nearest items: right, nearly right and wrong ones."""
        if not self.pairs():
            return []
        query, key = self.pairs()[0]
        return retrieval_examples(
            outputs[query],
            outputs[key],
            lambda position: self.shown(split, query, position),
            lambda position: self.shown(split, key, position),
        )

    def save_assets(self, folder: Path) -> None:
        """Every tower, so that new values can be embedded with this run."""
        save_towers(self.towers, folder / "towers")

    # -- use of a trained run --------------------------------------------------------------------------------
    def own_data(self, say: Say) -> tuple[dict[str, Items], str]:
        self._read(say)
        return self.splits, self.data_hash(*self.splits.values())

    def view_dim(self, model: ViewModel, view: str) -> int:
        widths = {views[0]: int(cast(int, model.tower(views[0]).width)) for _, views in self._distinct()}
        return self.shared_dim(widths)


def check_names(views: Sequence[str]) -> None:
    """Raise ``NearfarError`` where two views would have one name as a module, or as a folder."""
    for named in (module_name, tower_folder):
        first: dict[str, str] = {}
        for view in views:
            if (other := first.setdefault(named(view), view)) != view:
                raise NearfarError(
                    f"the views '{other}' and '{view}' differ in signs alone that names of files and modules cannot "
                    "have; rename one of these columns."
                )


def negated_view(name: str) -> str:
    """The view of a field of further negatives; a view's name may hold colons.

    >>> negated_view("negatives:meta:title:0")
    'meta:title'
    """
    return name.removeprefix(NEGATIVES).rsplit(":", 1)[0]


def _joined(parts: Sequence[Column]) -> Column:
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts):
        return np.concatenate(arrays)
    return [value for part in parts for value in part]
