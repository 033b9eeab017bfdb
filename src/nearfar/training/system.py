"""What training asks of a system.

A system is one job from data to metrics. The loop, the run folder and exact resume know nothing of molecules
or images: they see a dataset that hands out batches, a batch sampler, a module that turns a batch into a loss
and outputs, and a function that turns the collected outputs of a split into estimates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.config.training import RunOptions
from nearfar.data.batch import Field
from nearfar.data.chunks import NewData
from nearfar.data.files import Json
from nearfar.data.items import Items
from nearfar.errors import NearfarError
from nearfar.metrics import Estimate
from nearfar.towers.base import Tower
from nearfar.training.grad_cache import cached_embeddings
from nearfar.training.sections import Section

__all__ = [
    "BatchDataset",
    "Comparison",
    "Evaluation",
    "PredictionWriter",
    "StepOutput",
    "System",
    "TrainSampler",
]


@dataclass
class StepOutput:
    """One training step: the loss to descend, and functions that give further numbers for the log.

    Both are called for logged steps only: reading numbers off a device makes it wait. ``logs`` is called after the
    step; ``gradient_logs`` before its backward, while the graph is there, as ``Objective.measure_shares`` needs it.
    """

    loss: Tensor
    logs: Callable[[], dict[str, float]] = dict
    gradient_logs: Callable[[], dict[str, float]] = dict


@dataclass
class Evaluation:
    """A split's estimates and, for paired comparison, the score of every item under each metric.

    ``per_item[metric]`` has one number per item in the order of ``ids``; of a metric that is no mean, such as F1,
    the values of ``nearfar.metrics.item_values``. ``facts`` stand at the top level of ``metrics.json``, where the
    doctor and the report read them: ``baselines``, ``groups``, ``change``, ``comparison`` (docs/run_folder.md). Those
    of test count where there is a test split.
    """

    split: str
    estimates: dict[str, Estimate]
    ids: Sequence[str] = ()
    per_item: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)


class PredictionWriter(Protocol):
    """Writes predictions in a format of its own, chunk by chunk; ``close`` makes the file appear whole."""

    def write(
        self, items: Items, columns: Mapping[str, Sequence[object]], outputs: Mapping[str, Tensor]
    ) -> None: ...

    def close(self) -> None: ...


class Comparison(Protocol):
    """Predictions that compare items: with a gallery, or with each other.

    ``add`` takes the items that others are compared with, chunk by chunk. Columns of predictions are those of the added
    items at ``start`` to ``stop``, compared with all of these (``of_all``), or of other items (``of_others``).
    """

    def add(self, outputs: Mapping[str, Tensor], items: Items) -> None: ...

    def of_all(self, start: int, stop: int) -> Mapping[str, Sequence[object]]: ...

    def of_others(self, outputs: Mapping[str, Tensor], items: Items) -> Mapping[str, Sequence[object]]: ...


Rows = TypeVar("Rows", covariant=True)


class BatchDataset(Protocol[Rows]):
    """A dataset that hands out a whole batch for a list of positions."""

    def __len__(self) -> int: ...

    def __getitems__(self, positions: list[int]) -> Rows: ...

    def set_epoch(self, epoch: int) -> None: ...


class TrainSampler(Protocol):
    """The batch samplers of ``nearfar.batching``."""

    def __iter__(self) -> Iterator[list[int]]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self, position: int | None = None) -> Json: ...

    def load_state_dict(self, state: Mapping[str, object]) -> None: ...


#: a batch as the system's dataset hands it out, and the model that ``build_model`` makes
Batch = TypeVar("Batch")
Model = TypeVar("Model", bound=nn.Module)
#: what ``encode`` gives: a tensor (rows, …), or several in a tuple, list or dictionary
Embeddings = Any
#: what announces a line
Say = Callable[[str], None]


class System(ABC, Generic[Batch, Model]):
    """One complete job, from data to metrics. Built from its options; reads its data in ``prepare``.

    ``System[Batch, ViewModel]`` says what its batches and its model are.

    A minimal system writes seven methods: ``prepare``, ``layout``, ``build_model``, ``build_sampler``, ``encode``,
    ``loss_of`` and ``evaluate``; ``encode`` and ``loss_of`` give it cached batches (``trainer.cached_chunk``), several
    processes and probes. A system whose rows are not encoded one by one writes ``training_step`` and ``embed``
    instead of those two. Everything else has a default.
    """

    name: str
    #: the estimate that chooses the best checkpoint, and that early stopping watches; it says which way is better
    monitor: str
    config: RunOptions
    #: ``train``, ``val``, ``test``, as far as there are any; filled by ``prepare``
    datasets: Mapping[str, BatchDataset[Batch]]
    #: the tower of each view, of a system that has any
    towers: Mapping[str, Tower] = MappingProxyType({})
    #: options of how new data is read (``NewData.options``): what each means
    new_options: Mapping[str, str] = MappingProxyType({})

    # -- data ------------------------------------------------------------------------------------------------
    @abstractmethod
    def prepare(self, say: Say) -> None:
        """Read, check and featurise the data; ``say`` announces what is really used."""

    @abstractmethod
    def layout(self) -> Json:
        """What goes into ``dataset_layout.json``: counts, rejections, split hashes, encoders in use."""

    def dataset(self, split: str) -> BatchDataset[Batch] | None:
        """The dataset of ``train``, ``val`` or ``test``; None where there is no such split."""
        return self.datasets.get(split)

    # -- batches ---------------------------------------------------------------------------------------------
    @abstractmethod
    def build_sampler(self) -> TrainSampler:
        """The training sampler."""

    def check_sampler(self, sampler: TrainSampler, say: Say) -> None:
        """Called once before training: refuse a sampler that does not do what its name says."""

    def on_epoch(self, epoch: int, sampler: TrainSampler, say: Say) -> Json:
        """Called before an epoch (counted from 0): applies schedules, returns numbers for the log."""
        return {}

    # -- model and loss --------------------------------------------------------------------------------------
    @abstractmethod
    def build_model(self) -> Model:
        """A freshly initialised model; draws from the generator that ``seed`` has set."""

    def read_weights(self, weights: Json) -> Json:
        """The weights of a checkpoint by the names that ``build_model`` gives them today; those of earlier versions may
        have been called differently."""
        return weights

    def parameter_groups(self, model: nn.Module) -> list[Json]:
        """Optimiser groups; by default no weight decay for biases, norms and scales."""
        return decayed_groups(model, self.config.weight_decay)

    def split(self, batch: Batch, rows: int) -> Sequence[Batch]:
        """The batch in parts of at most ``rows`` rows, in order."""
        parts: Sequence[Batch] = batch.split(rows)  # type: ignore[attr-defined]
        return parts

    def encode(self, model: Model, batch: Batch) -> Embeddings:
        """Embeddings of a batch or of a part of it: a tensor (rows, …), or several in a tuple, list or dictionary."""
        raise NearfarError(f"system '{self.name}' defines neither encode and loss_of nor training_step")

    def loss_of(self, model: Model, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """The loss of the embeddings of a whole batch; called once a step.

        A probe asks for it in eval mode, too, and puts buffers back as they were; weights must not be changed then.
        """
        raise NearfarError(f"system '{self.name}' defines encode and no loss_of")

    def training_step(self, model: Model, batch: Batch) -> StepOutput:
        """The loss of one batch, under the same rule as ``loss_of``."""
        return self.loss_of(model, self.encode(model, batch), batch)

    def step(self, model: Model, batch: Batch, cached_chunk: int | None = None) -> StepOutput:
        """One training step; with ``cached_chunk``, the same within rounding, with the activations of so many rows in
        memory at a time (``nearfar.training.grad_cache``)."""
        if cached_chunk is None:
            return self.training_step(model, batch)
        if not self.defines("encode"):
            raise NearfarError(
                f"trainer.cached_chunk={cached_chunk}: system '{self.name}' does not encode its rows one by one (it "
                "defines no encode); set trainer.cached_chunk=null."
            )
        parts = self.split(batch, cached_chunk)
        embeddings = cached_embeddings(lambda part: self.encode(model, part), parts, model)
        return self.loss_of(model, embeddings, batch)

    # -- evaluation ------------------------------------------------------------------------------------------
    def embed(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """What evaluation needs of one batch, by default the result of ``encode``; joined over a split."""
        encoded = self.encode(model, batch)
        if not isinstance(encoded, dict):
            raise NearfarError(
                f"encode of {type(self).__name__} gives a {type(encoded).__name__}, and evaluation needs names: let it "
                "give a dictionary, or define embed"
            )
        return encoded

    def before_evaluation(self, model: Model, split: str, final: bool) -> None:
        """Called in eval mode, without gradients, before a split is embedded: for metrics that need more than that
        split, such as a probe fitted on training rows."""

    @abstractmethod
    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """Estimates of a split from its collected outputs; ``final`` asks for every interval."""

    def calibrate(self, outputs: Callable[[str], Mapping[str, Tensor]], say: Say) -> None:
        """Called once before the final evaluation: choose thresholds and the like.

        ``outputs`` collects what ``embed`` gives of any split that ``dataset`` knows, under the best weights.
        """

    def average(self, outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The outputs of several trainings on the same rows as those of one (``nearfar ensemble``)."""
        raise NearfarError(f"system '{self.name}' does not say how its outputs are averaged.")

    def beside_outputs(self) -> dict[str, Tensor]:
        """What evaluation has kept beside the outputs of a split, such as embedded training items."""
        return {}

    def average_beside(self, every: Sequence[Mapping[str, Tensor]]) -> None:
        """Goes on with the average of what several trainings kept beside their outputs (``nearfar ensemble``)."""

    # -- results ---------------------------------------------------------------------------------------------
    def report_examples(self, outputs: Mapping[str, Tensor], split: str) -> list[Json]:
        """Examples for the report: right, nearly and wrong."""
        return []

    def report_sections(self, outputs: Mapping[str, Tensor], split: str) -> Sequence[Section]:
        """Tables and pictures of the system's own for the report, such as a confusion matrix."""
        return ()

    def save_assets(self, folder: Path) -> None:
        """Whatever is needed later to embed new inputs with this run (text encoder, feature scales)."""

    def save_results(self, folder: Path) -> None:
        """Results beyond estimates, such as the prediction for every item; after the last evaluation."""

    # -- use of a trained run --------------------------------------------------------------------------------
    @property
    def views(self) -> list[str]:
        """The views that can be embedded one by one, in order; none where a system has no such."""
        return list(self.towers)

    def load_assets(self, folder: Path) -> None:
        """What ``save_assets`` wrote, also that of earlier versions: ``build_model`` then works without ``prepare``."""
        raise NearfarError(
            f"runs of system '{self.name}' cannot be loaded for use: it does not define load_assets."
        )

    def own_data(self, say: Say) -> tuple[dict[str, Items], str]:
        """The splits of the configured data, read again, and their ``data_hash`` as ``layout`` has it, which tells
        whether they are what a run was trained on. Nothing is fitted."""
        raise NearfarError(f"system '{self.name}' does not read its data again.")

    def embed_view(self, model: Model, view: str, field: Field) -> Tensor:
        """The embeddings (b, d) of what the view's tower read, a batch of it; not normalised."""
        raise NearfarError(f"system '{self.name}' does not embed one view alone.")

    def view_dim(self, model: Model, view: str) -> int:
        """The length of an embedding."""
        raise NearfarError(f"system '{self.name}' does not embed one view alone.")

    def new_items(self, source: NewData) -> Iterator[Items]:
        """What a user's file or folder holds, in chunks; values that cannot be read are counted as rejections."""
        raise NearfarError(f"system '{self.name}' does not say how new data is read.")

    def items_of(self, values: Sequence[object]) -> Items:
        """New values of a system without views, such as pictures for a detector; an unreadable one is an error."""
        raise NearfarError(
            f"system '{self.name}' takes values by the name of their view, as {{view: values}}."
        )

    def new_dataset(self, items: Items) -> BatchDataset[Batch]:
        """New items as batches that ``embed`` understands."""
        raise NearfarError(f"system '{self.name}' does not say how new items become batches.")

    def predicts_from(self) -> Sequence[str]:
        """The views, or other columns, that ``predictions`` needs of an item, for those who ask of one item."""
        return self.views

    def predictions(self, outputs: Mapping[str, Tensor], items: Items) -> Mapping[str, Sequence[object]]:
        """Columns of a table of predictions for new items, from what ``embed`` gave of them.

        Where an item may have several rows or none, such as a picture's boxes, a column ``item`` has the position of
        the item that each row belongs to.
        """
        able = " It embeds and searches: nearfar embed, nearfar search." if self.views else ""
        raise NearfarError(f"system '{self.name}' predicts nothing.{able}")

    def comparison(self, gallery: bool, k: int | None = None) -> Comparison | None:
        """What compares items, of a system whose predictions are comparisons; None: each item is predicted by itself.

        ``gallery``: they are compared with items of their own, not with each other; ``k``: how many nearest ones are
        asked for, None leaves it to the system.
        """
        return None

    def load_results(self, folder: Path) -> None:
        """What ``save_results`` wrote: called with the folder of an ensemble, whose outputs then are predicted from.

        Of a run ``load_assets`` reads it as well.
        """

    def prediction_writer(self, output: Path, source: NewData) -> PredictionWriter | None:
        """What writes predictions in a format that is no table, such as COCO results; None: ``output`` is a table."""
        return None

    def defines(self, method: str) -> bool:
        """Whether this system has a method of its own where ``System`` has a default."""
        return getattr(type(self), method) is not getattr(System, method)


def decayed_groups(model: nn.Module, weight_decay: float) -> list[Json]:
    """Two optimiser groups: weight decay for matrices, none for biases, norms and scales."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups: list[Json] = [{"params": decayed, "weight_decay": weight_decay}]
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    return groups


def modules_of(model: nn.Module, system: object = None) -> list[nn.Module]:
    """Every module of ``model``, and of the modules that ``system`` holds itself, such as its losses; each once."""
    own = (
        [part for part in vars(system).values() if isinstance(part, nn.Module)] if system is not None else []
    )
    return list(dict.fromkeys(module for part in [model, *own] for module in part.modules()))


def whole_rows(views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows that have every view: a row of zeros is a view that its item does not have (a pair without a photo).

    A view that fewer than two rows have is left out.

    >>> views = {"a": torch.ones(3, 2), "b": torch.tensor([[1.0, 0], [0, 0], [0, 1]]), "c": torch.zeros(3, 2)}
    >>> {name: len(view) for name, view in whole_rows(views).items()}
    {'a': 2, 'b': 2}
    """
    present = {name: (view != 0).any(dim=1) for name, view in views.items()}
    kept = {name: rows for name, rows in present.items() if int(rows.sum()) > 1}
    if len(kept) == len(views) and all(bool(rows.all()) for rows in kept.values()):
        return dict(views)
    if not kept:
        return {}
    every = torch.stack(list(kept.values())).all(dim=0)
    return {name: views[name][every] for name in kept}


def rows_of(
    columns: Mapping[str, Sequence[object]], items: Items
) -> tuple[Items, dict[str, Sequence[object]]]:
    """Ids of the rows of ``System.predictions``, as items without columns, and the columns but for ``item``.

    >>> rows, columns = rows_of({"item": [0, 0], "score": [0.9, 0.2]}, Items(["a", "b"], {}))
    >>> rows.ids, columns
    (['a', 'a'], {'score': [0.9, 0.2]})
    """
    own = dict(columns)
    at, bare = own.pop("item", None), replace(items, columns={}, groups=None)
    return (bare if at is None else bare.take(np.asarray(at))), own


def collect(outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the outputs of a split's batches, on the CPU."""
    if not outputs:
        return {}
    return {key: torch.cat([part[key].detach().cpu() for part in outputs]) for key in outputs[0]}
