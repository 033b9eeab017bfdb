"""A look at a run from outside: the same few rows again and again, without leaving a trace in the training.

From the embeddings of a fixed sample come the numbers of ``nearfar.metrics.embedding_health``. The same rows, in random
batches of the training's size, also go through the training loss, and so do as many training rows: two losses of one
composition, whose difference is what the model knows of its training rows alone. The log's steps have a
different one: there a sampler composes the batches, and dropout is on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from nearfar.contrast import NoPositivesWarning
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.metrics import embedding_health
from nearfar.training.checkpoint import generator_state, load_generator_state
from nearfar.training.system import Embeddings, System, collect, modules_of, whole_rows

__all__ = ["Probe", "preserve_state"]


@contextmanager
def preserve_state(model: nn.Module, system: object = None) -> Iterator[Callable[[], None]]:
    """Eval mode without gradients; then modes, buffers, extra states and random generators as they were.

    Buffers (running statistics, memories of earlier batches) are those of ``model`` and of modules that ``system``
    holds itself, such as its losses. What is yielded puts them back at once. Weights must stay as they are:
    ``NearfarError`` if one was changed, as by the moving average of a momentum encoder, which then has to look at
    ``model.training``.

    >>> model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    >>> with preserve_state(model) as put_back:
    ...     _ = model[0].running_mean.add_(1)
    ...     model.training, torch.is_grad_enabled()
    (False, False)
    >>> model.training, model[0].running_mean
    (True, tensor([0., 0., 0.]))
    """
    modules = modules_of(model, system)
    modes = [module.training for module in modules]
    state = _State(modules)
    weights = [(weight, weight._version) for weight in model.parameters()]
    generators = generator_state()
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield state.put_back
    finally:
        state.put_back()
        load_generator_state(generators)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
    if any(weight._version != version for weight, version in weights):
        raise NearfarError(
            "weights were changed in eval mode, by a batch that was only to be looked at: update them (a momentum "
            "encoder?) only while model.training is true, or switch probes off with trainer.probe_rows=0"
        )


class _State:
    """Buffers and extra states of modules as they are now."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._versions = [buffer._version for _, _, buffer, _ in self._buffers]
        self._extras = [
            (module, module.get_extra_state())
            for module in modules
            if type(module).get_extra_state is not nn.Module.get_extra_state
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Write what was changed since, and nothing else."""
        for i, (module, name, buffer, content) in enumerate(self._buffers):
            if buffer._version != self._versions[i]:
                buffer.copy_(content)
                self._versions[i] = buffer._version
            module._buffers[name] = buffer
        for module, extra in self._extras:
            module.set_extra_state(extra)


class Probe:
    """A fixed sample of validation rows (training rows, where there is no validation), and as many training rows.

    ``rows``: how many at most; ``seed`` chooses them and their composition. ``batch_size``: of the batches that the
    training loss sees; what does not fill a batch is embedded and has no loss. Where a split has fewer rows, batches
    are so much smaller, on both sides.
    """

    def __init__(self, system: System, rows: int, batch_size: int, seed: int) -> None:
        self.system = system
        samples = {split: _sample(system, split, rows, seed) for split in ("val", "train")}
        self.split = "val" if len(samples["val"]) > 1 else "train"
        self.positions, self.train = samples[self.split], samples["train"]
        self.size = max(1, min(batch_size, len(self.positions), len(self.train)))
        self.full = len(self.positions) // self.size if self.size > 1 else 0
        self.train = self.train[: self.full * self.size]

    def views(self, model: nn.Module, ready: Callable[[object], object]) -> dict[str, int]:
        """Names of the embeddings and their length, from two rows."""
        with preserve_state(model, self.system):
            views = self.system.embed(model, ready(self._batch(self.split, self.positions[:2])))
        return {name: view.shape[1] for name, view in _views(views).items()}

    def record(
        self,
        model: nn.Module,
        ready: Callable[[object], object],
        validated: Mapping[str, Tensor] | None = None,
    ) -> Json:
        """The fields of a ``probe`` record.

        ``ready`` brings a batch to where the model is. ``validated`` are outputs of the whole validation split, where
        these very weights have just given them, a row for each of its items: they are not embedded again.
        """
        dataset = self.system.dataset(self.split)
        items = 0 if dataset is None else len(dataset)
        if self.split != "val" or not validated or any(len(out) != items for out in validated.values()):
            validated = None
        record: Json = {"probe_rows": len(self.positions), "probe_split": self.split}
        with preserve_state(model, self.system) as put_back, warnings.catch_warnings():
            warnings.simplefilter("ignore", NoPositivesWarning)  # random batches may have none
            seen = _Pass(self, model, ready, put_back)
            seen.over(self.split, self.positions, embed=True, known=validated)
            views = whole_rows(_views(collect(seen.views)))
            bad = [name for name, view in views.items() if not bool(view.isfinite().all())]
            if bad:
                return record | {"finite": False}
            record |= embedding_health(views)
            if self.split == "val":
                record |= {f"val_{name}": value for name, value in seen.means().items()}
            if self.full:
                train = seen
                if self.split == "val":
                    train = _Pass(self, model, ready, put_back)
                    train.over("train", self.train, embed=False)
                if "loss" in train.means():
                    record["train_loss_same_composition"] = train.means()["loss"]
                if problem := seen.problem or train.problem:
                    record["loss_problem"] = problem
        return record

    def _batch(self, split: str, positions: Int[np.ndarray, " b"]) -> object:
        dataset = self.system.dataset(split)
        assert dataset is not None
        return dataset.__getitems__(positions.tolist())


class _Pass:
    """Embeddings and losses of some rows, a batch at a time."""

    def __init__(
        self, probe: Probe, model: nn.Module, ready: Callable[[object], object], put_back: Callable[[], None]
    ) -> None:
        self.probe, self.model, self.ready, self.put_back = probe, model, ready, put_back
        self.views: list[dict[str, Tensor]] = []
        self.losses: list[dict[str, float]] = []
        self.problem: str | None = None

    def over(
        self,
        split: str,
        positions: Int[np.ndarray, " n"],
        embed: bool,
        known: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Look at these rows; ``embed`` keeps their embeddings and the loss's record.

        ``known``: the embeddings of the whole split.
        """
        size = self.probe.size
        for start in range(0, len(positions), size):
            chosen = positions[start : start + size]
            batch = self.ready(self.probe._batch(split, chosen))
            views = {name: view[chosen] for name, view in known.items()} if known else None
            self._batch(batch, embed, views, loss=len(chosen) == size and self.probe.full > 0)

    def _batch(self, batch: object, embed: bool, views: dict[str, Tensor] | None, loss: bool) -> None:
        system = self.probe.system
        encoding = system.defines("encode")
        # A system that is evaluated on what it encodes need not encode it twice.
        same = encoding and not system.defines("embed")
        encoded: Embeddings = None
        if encoding and loss:
            encoded = self.ready(views) if same and views else system.encode(self.model, batch)
        if embed:
            known = views or (encoded if same else None)
            self.views.append(known or system.embed(self.model, batch))
        if not loss or self.problem:
            return
        try:
            step = (
                system.loss_of(self.model, encoded, batch)
                if encoding
                else system.training_step(self.model, batch)
            )
            measured = {"loss": step.loss.item()}
            if embed:
                logs = step.logs()
                measured |= {name: logs[name] for name in ("uniform_level", "candidates") if name in logs}
            self.losses.append(measured)
        except NearfarError as error:
            # A loss may ask for more than a random batch holds. Training goes on, and the record says what was missing.
            self.problem, self.losses = str(error), []
        self.put_back()  # else the next batch would find this one in a memory

    def means(self) -> dict[str, float]:
        """Loss, uniform level and candidates, averaged over the batches."""
        keys = self.losses[0].keys() if self.losses else ()
        return {key: float(np.mean([measured[key] for measured in self.losses])) for key in keys}


def _sample(system: System, split: str, rows: int, seed: int) -> Int[np.ndarray, " n"]:
    dataset = system.dataset(split)
    n = 0 if dataset is None else len(dataset)
    return np.random.default_rng([seed, n]).permutation(n)[:rows]


def _views(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs that are embeddings: matrices of floating point, and no scores, labels or maps."""
    return {name: out for name, out in outputs.items() if out.ndim == 2 and out.is_floating_point()}
