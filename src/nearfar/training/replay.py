"""The second pass of ``nearfar.training.cached``: each chunk again as it was, for its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from nearfar.errors import NearfarError
from nearfar.training.checkpoint import generator_state, load_generator_state

__all__ = ["Chunk", "Replay"]

# How far, relative to its length, an embedding may be from that of the first pass. Kernels of a GPU that add up in any
# order stay far below; another dropout mask is far above.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2}
_HALF_TOLERANCE = 0.1


@dataclass
class Chunk:
    """What ``encode`` was given, the state of the generators then, and the rows of each output."""

    content: Any
    generators: dict[str, Any]
    rows: list[int]


class Replay:
    """Encodes ``chunks`` again and hands the gradients of ``leaves`` to autograd.

    ``learns`` says which outputs have a gradient, ``expected`` holds the outputs of the first chunk.
    """

    def __init__(
        self,
        encode: Callable[[Any], Any],
        model: nn.Module | None,
        chunks: list[Chunk],
        learns: list[bool],
        expected: list[Tensor],
        leaves: Sequence[Tensor],
    ) -> None:
        self.encode, self.model, self.chunks = encode, model, chunks
        self.learns, self.expected, self.leaves = learns, expected, leaves
        self.versions = [leaf._version for leaf in leaves]
        self.autocast = _autocast_settings()

    def attach(self, parts: Sequence[Sequence[Tensor]], origins: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each output's ``parts`` in one, as if autograd had followed them from ``origins``, one for each leaf."""
        return _Embeddings.apply(self, parts, *origins)

    def gradients(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the leaves, from those of the embeddings that learn."""
        if [leaf._version for leaf in self.leaves] != self.versions:
            raise NearfarError(
                "weights (or chunks) were changed between the forward of cached_embeddings and its backward, so that "
                "the chunks cannot be encoded again as they were: call backward before the optimiser's step"
            )
        slots = iter(gradients)
        every = [next(slots) if learns else None for learns in self.learns]
        starts = [0] * len(every)
        sums = _Sums(len(self.leaves))
        before = generator_state()
        try:
            with _running_statistics_held(self.model), _hooks_held(self.leaves):
                for number, chunk in enumerate(self.chunks):
                    outputs = self._encode(chunk)
                    if number == 0:
                        self._check(outputs)
                    pairs = [
                        (output, gradient[start : start + rows])
                        for output, gradient, start, rows in zip(
                            outputs, every, starts, chunk.rows, strict=True
                        )
                        if gradient is not None and output.requires_grad
                    ]
                    if pairs:
                        roots, theirs = zip(*pairs, strict=True)
                        sums.add(torch.autograd.grad(roots, self.leaves, theirs, allow_unused=True))
                    starts = [start + rows for start, rows in zip(starts, chunk.rows, strict=True)]
        finally:
            load_generator_state(before)
        return sums.totals

    def _encode(self, chunk: Chunk) -> list[Tensor]:
        load_generator_state(chunk.generators)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for settings in self.autocast:
                stack.enter_context(torch.autocast(**settings))
            try:
                return pytree.tree_leaves(self.encode(chunk.content))
            except RuntimeError as error:
                if "finished reduction" not in str(error):
                    raise
                raise NearfarError(
                    "encode calls a DistributedDataParallel wrapper, which waits for the gradients of one forward at "
                    "a time; let the wrapper hold the whole step, a module whose forward calls cached_loss"
                ) from error

    def _check(self, outputs: Sequence[Tensor]) -> None:
        for output, expected in zip(outputs, self.expected, strict=True):
            same = output.shape == expected.shape
            if same and expected.is_floating_point():
                gap, length = (
                    torch.linalg.vector_norm(x.detach().float()) for x in (output - expected, expected)
                )
                # Not "gap <= …": embeddings that are not finite are for the loss to find.
                same = not bool(gap > _TOLERANCE.get(expected.dtype, _HALF_TOLERANCE) * length)
            if not same:
                raise NearfarError(
                    "the first chunk did not come out the same when it was encoded again for its gradient: encode "
                    "draws from a random generator that is not PyTorch's own (CPU or CUDA), changes its input in "
                    "place, or the model went from train() to eval() in between. Draw augmentations before the "
                    "chunks are made"
                )


class _Embeddings(torch.autograd.Function):
    """The node of the graph that stands for all the chunks' graphs.

    It returns gradients instead of adding to ``.grad``: hooks on parameters, such as those of DistributedDataParallel,
    see one gradient per backward, and ``torch.autograd.grad`` works.
    """

    @staticmethod
    def forward(
        ctx: Any, replay: Replay, parts: Sequence[Sequence[Tensor]], *origins: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.replay = replay
        ctx.set_materialize_grads(False)
        # Nothing is needed of it: reading it makes autograd complain of a second backward in its own words.
        ctx.save_for_backward(torch.empty(0))
        return tuple(torch.cat(list(part)) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        _ = ctx.saved_tensors
        return None, None, *ctx.replay.gradients(gradients)


class _Sums:
    """Adds up gradients, without writing into tensors that autograd may share."""

    def __init__(self, count: int) -> None:
        self.totals: list[Tensor | None] = [None] * count
        self._own = [False] * count

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        for i, gradient in enumerate(gradients):
            total = self.totals[i]
            if gradient is None:
                continue
            if total is None:
                self.totals[i] = gradient
            elif self._own[i] and not (total.is_sparse or gradient.is_sparse):
                total.add_(gradient)
            else:
                self.totals[i], self._own[i] = total + gradient, True


def _autocast_settings() -> list[dict[str, Any]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for device in devices
    ]


@contextmanager
def _running_statistics_held(model: nn.Module | None) -> Iterator[None]:
    """Running statistics have counted each chunk when it was first encoded."""
    modules = model.modules() if model is not None else ()
    layers = [m for m in modules if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False  # in training: take those of the chunk, and keep nothing
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@contextmanager
def _hooks_held(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Hooks on a parameter see its whole gradient, once, and not that of every chunk before."""
    held = [(leaf._backward_hooks, dict(leaf._backward_hooks)) for leaf in leaves if leaf._backward_hooks]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in held:
            hooks.update(content)
