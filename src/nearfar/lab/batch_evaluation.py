"""One batch under a run's weights: its loss, its record and its gradients; the run itself does not change.

Every evaluation starts from the same state (weights, running statistics, memories) and the same generators, so that
two of them differ only by what was changed between them: the same batch twice gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nearfar.errors import NearfarError
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.fabric import to_device
from nearfar.training.grad_cache import cached_embeddings
from nearfar.training.state import initial_model, load_weights
from nearfar.training.system import Embeddings, System

__all__ = ["BatchEvaluation", "BatchEvaluator", "cosine", "norm", "run_arithmetic"]


#: of parameters, or of embeddings, by name
Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class BatchEvaluation:
    """The loss of a batch in nats, the numbers that its step would log, and gradients in CPU memory.

    ``parameters``: by name, of all that are trained. ``embeddings``: of each embedding that has a gradient, row by
    row, by its place in what ``encode`` gives; empty for a system that does not encode rows.
    """

    loss: float
    record: Mapping[str, float]
    parameters: Mapping[str, Tensor]
    embeddings: Mapping[str, Tensor]

    @property
    def above_guessing(self) -> float | None:
        """Loss − uniform level: how much worse than guessing (below 0: better); None where no level is logged."""
        level = self.record.get("uniform_level")
        return None if level is None else self.loss - level


class BatchEvaluator:
    """A system and the state of a run, on which single batches are evaluated.

    ``training=True`` evaluates in training mode, with dropout: the gradient that training descends. The masks come
    from ``seed`` and the number of the batch alone. Single precision, whatever the run trained in. ``chunk``: rows that
    are encoded at a time without their graphs, as ``trainer.cached_chunk`` asks for.

    Raises ``NearfarError`` where the state does not fit the system, or would be loaded in part only.
    """

    def __init__(
        self,
        system: System,
        checkpoint: Checkpoint,
        seed: int,
        device: torch.device,
        training: bool = True,
        chunk: int | None = None,
    ) -> None:
        self.system, self.state, self.seed = system, system.read_weights(checkpoint.model), seed
        self.device, self.training, self.chunk = device, training, chunk
        self.model = initial_model(system, seed)
        load_weights(self.model, checkpoint, system, "the run's checkpoint")
        self._check_state()
        self.model.to(device)

    def _check_state(self) -> None:
        """A model may replace what does not fit it, such as a memory of a different size: its state then differs."""
        mine = self.model.state_dict()
        both = mine.keys() & self.state.keys()
        other = (mine.keys() ^ self.state.keys()) | {k for k in both if not _same(mine[k], self.state[k])}
        other -= (mine.keys() ^ self.state.keys()) & set(getattr(self.model, "set_by_options", ()))
        if other:
            raise NearfarError(
                f"this would start from a different state than the run's ({', '.join(sorted(other)[:3])}): it "
                "changes what the model keeps."
            )

    def evaluate(self, positions: Sequence[int], number: int, rows: int) -> BatchEvaluation:
        """The batch at ``positions`` of the training set, encoded ``rows`` rows at a time.

        ``number``: of the batch, from which dropout draws. A larger batch that begins with the same rows has the same
        embeddings of these.
        """
        dataset = self.system.dataset("train")
        assert dataset is not None
        self.model.load_state_dict(self.state)
        self.model.train(self.training)
        self.model.zero_grad(set_to_none=True)
        batch = to_device(dataset.__getitems__(list(positions)), self.device)
        with torch.random.fork_rng(), torch.enable_grad():
            if self.system.defines("encode"):
                embeddings = self._encode(batch, len(positions), number, rows)
                for leaf in _learning(embeddings):
                    leaf.retain_grad()
                output = self.system.loss_of(self.model, embeddings, batch)
            else:
                embeddings = None
                torch.manual_seed(_seed(self.seed, number, 0))
                output = self.system.training_step(self.model, batch)
            if output.loss.requires_grad:
                output.loss.backward()
        record = {k: float(v) for k, v in output.logs().items() if isinstance(v, (bool, int, float))}
        parameters = {
            name: p.grad.detach().float().cpu().clone()
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }
        leaves, _ = pytree.tree_flatten_with_path(embeddings)
        gradients = {
            pytree.keystr(path): leaf.grad.float().cpu()
            for path, leaf in leaves
            if isinstance(leaf, Tensor) and leaf.grad is not None
        }
        return BatchEvaluation(float(output.loss.detach()), record, parameters, gradients)

    def _encode(self, batch: object, size: int, number: int, rows: int) -> Embeddings:
        pieces = []
        for k, part in enumerate([batch] if size <= rows else self.system.split(batch, rows)):
            torch.manual_seed(_seed(self.seed, number, k))
            pieces.append(pytree.tree_flatten(self._embeddings(part)))
        if len(pieces) == 1:
            return pytree.tree_unflatten(*pieces[0])
        whole = [torch.cat(leaves) for leaves in zip(*(leaves for leaves, _ in pieces), strict=True)]
        return pytree.tree_unflatten(whole, pieces[0][1])

    def _embeddings(self, part: object) -> Embeddings:
        if self.chunk is None:
            return self.system.encode(self.model, part)
        parts = self.system.split(part, self.chunk)
        return cached_embeddings(partial(self.system.encode, self.model), parts, self.model)


def _same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def _learning(embeddings: object) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(embeddings):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            yield leaf


def _seed(seed: int, number: int, part: int) -> int:
    return int(np.random.SeedSequence((seed, number, part)).generate_state(1, np.uint64)[0] >> 1)


def cosine(a: Gradients, b: Gradients) -> float:
    """The cosine of two gradients, over what has a gradient in both, in float64; NaN where one of them is 0.

    Of embeddings with different numbers of rows the first ones are taken.

    >>> cosine({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 4.0])})
    0.6
    """
    dot = first = second = 0.0
    for x, y in _pairs(a, b):
        x, y = x.double(), y.double()
        dot, first, second = (
            dot + (x * y).sum().item(),
            first + (x * x).sum().item(),
            second + (y * y).sum().item(),
        )
    if not first * second > 0:
        return math.nan
    # sqrt(x · x) is x without a rounding, so that a gradient has the cosine 1 with itself.
    return min(1.0, max(-1.0, dot / math.sqrt(first * second)))


def norm(gradient: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all of a gradient.

    >>> norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    5.0
    """
    return math.sqrt(sum((g.double() ** 2).sum().item() for g in gradient.values()))


def _pairs(a: Gradients, b: Gradients) -> Iterator[tuple[Tensor, Tensor]]:
    for name in a:
        if name in b:
            x, y = a[name], b[name]
            rows = min(len(x), len(y)) if x.ndim else None
            yield (x, y) if rows is None else (x[:rows], y[:rows])


@contextmanager
def run_arithmetic(threads: int | None, deterministic: bool) -> Iterator[None]:
    """The run's threads and deterministic kernels while a block runs; before and after it, what the caller had."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(
        deterministic or before[1], warn_only=warn_only or torch.cuda.is_available()
    )
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=warn_only)
