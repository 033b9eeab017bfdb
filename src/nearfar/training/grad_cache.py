"""Batches larger than memory: encode in chunks without keeping their graphs, score all rows together, encode again.

A contrastive loss needs all embeddings of its batch at once, but an encoder can work row by row. Its activations take
nearly all memory, so only one chunk's are alive at a time: the price is a second forward pass (GradCache, Gao, Zhang,
Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils import _pytree as pytree

from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.training.checkpoint import generator_state, load_generator_state

__all__ = ["Chunk", "Replay", "cached_embeddings", "cached_loss"]

#: a chunk; what ``encode`` gives of it: a tensor, or several in a tuple, list or dictionary; what ``loss`` returns
Part = TypeVar("Part")
Encoded = TypeVar("Encoded")
Loss = TypeVar("Loss")


def cached_loss(
    encode: Callable[[Part], Encoded],
    chunks: Iterable[Part],
    loss: Callable[[Encoded], Loss],
    model: nn.Module | None = None,
) -> Loss:
    """``loss`` of the embeddings of all ``chunks``; its ``backward`` encodes the chunks again, one at a time.

    The same as ``loss(cached_embeddings(encode, chunks, model))``. What ``loss`` returns is returned as it is: a 0-d
    tensor, or anything that holds one.

    >>> from nearfar.losses import InfoNCELoss
    >>> encoder, loss = nn.Linear(16, 8), InfoNCELoss()
    >>> text = torch.randn(64, 8)
    >>> images = torch.randn(64, 16)
    >>> value = cached_loss(encoder, images.split(10), lambda z: loss(z, text))
    >>> value.backward()
    >>> plain = torch.autograd.grad(loss(encoder(images), text), encoder.weight)[0]
    >>> torch.allclose(encoder.weight.grad, plain, atol=1e-5)
    True
    """
    return loss(cached_embeddings(encode, chunks, model))


def cached_embeddings(
    encode: Callable[[Part], Encoded], chunks: Iterable[Part], model: nn.Module | None = None
) -> Encoded:
    """The embeddings of all chunks in one piece, with a gradient but without the graphs of the chunks.

    ``encode(chunk)`` gives a tensor (rows, …), or several in a tuple, list or dictionary; what comes back has the same
    form, with the rows of all chunks in their order. It is used like the output of a layer: with any loss, under
    accumulation, ``GradScaler``, clipping, Lightning, with several forwards before a backward. ``backward`` encodes
    each chunk once more, with the dropout masks and autocast settings of the first time, and gives their gradients to
    everything that ``encode`` used, and to chunks that need one. Value and gradient are those of the plain batch
    encoded in these chunks, within rounding, and the random generators end where that would leave them.

    Memory: the graph of one chunk, all embeddings, and one more copy of the gradients. Time: one more forward pass.

    ``model`` (``encode`` itself where it is a module) must be given if a layer keeps running statistics, as BatchNorm
    does while it trains: the second pass must not count the chunks again. Such layers see the statistics of a chunk
    instead of the batch, of which a warning tells.

    With several processes let DistributedDataParallel hold the whole step, as Lightning does, and not the encoder
    alone: gradients are then exchanged once, and ranks may have different numbers of chunks. Encoders sharded by FSDP
    are not supported.

    Raises ``NearfarError`` without chunks, for outputs that are no rows, for a chunk that does not come out the same
    again (it draws from a generator other than PyTorch's own on CPU and CUDA, or was changed in place), for weights
    that change between forward and backward, for checkpointing with ``use_reentrant=True``, and for a wrapper of
    several processes inside ``encode``. A second backward needs ``retain_graph=True``, as elsewhere; gradients of
    gradients are not available.
    """
    chunks = list(chunks)
    if not chunks:
        raise NearfarError("there are no chunks to encode: give at least one, for instance batch.split(64)")
    if model is None and isinstance(encode, nn.Module):
        model = encode
    if model is not None:
        _check_model(model)
    first = _FirstPass(encode, model)
    for chunk in chunks:
        first.add(chunk)
    return first.embeddings()


class _FirstPass(Generic[Part, Encoded]):
    """Encodes chunk after chunk, notes what their gradients will belong to, and drops their graphs.

    The graph is made although it is dropped: it alone knows which parameters a closure used, and an encoder may take
    other kernels, with other roundings, where no graph is made.
    """

    def __init__(self, encode: Callable[[Part], Encoded], model: nn.Module | None) -> None:
        self.encode, self.model = encode, model
        self.chunks: list[Chunk[Part]] = []
        self.form: pytree.TreeSpec | None = None
        self.parts: list[list[Tensor]] = []  # of each output, one for each chunk
        self.learns: list[bool] = []  # whether an output has a gradient at all
        # By identity: a leaf of the chunks' graphs, and the tensor that takes its gradient.
        self.leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, content: Part) -> None:
        origins: dict[int, Tensor] = {}
        if torch.is_grad_enabled():
            content = pytree.tree_map_only(Tensor, lambda tensor: _cut(tensor, origins), content)
        generators = generator_state()
        outputs, form = pytree.tree_flatten(self.encode(content))
        if not self.chunks:
            self.form, self.parts, self.learns = form, [[] for _ in outputs], [False for _ in outputs]
        _check_outputs(outputs, form, self.form, len(self.chunks))
        for leaf in _leaves(outputs, self.model):
            self.leaves.setdefault(id(leaf), (leaf, origins.get(id(leaf), leaf)))
        for i, output in enumerate(outputs):
            self.learns[i] |= output.requires_grad
            self.parts[i].append(output.detach())
        self.chunks.append(Chunk(content, generators, [len(output) for output in outputs]))

    def embeddings(self) -> Encoded:
        learning = [parts for parts, learns in zip(self.parts, self.learns, strict=True) if learns]
        attached: Iterator[Tensor] = iter(())
        if learning:
            if self.model is not None:
                _warn_of_statistics(self.model)
            leaves, origins = zip(*self.leaves.values(), strict=True)
            expected = [parts[0] for parts in self.parts]
            replay = Replay(self.encode, self.model, self.chunks, self.learns, expected, leaves)
            attached = iter(replay.attach(learning, origins))
        whole = [
            next(attached) if learns else torch.cat(parts)
            for parts, learns in zip(self.parts, self.learns, strict=True)
        ]
        assert self.form is not None
        return pytree.tree_unflatten(whole, self.form)


def _cut(tensor: Tensor, origins: dict[int, Tensor]) -> Tensor:
    """A leaf in place of a tensor with a history, which the outer backward walks, once."""
    if not tensor.requires_grad or tensor.is_leaf:
        return tensor
    leaf = tensor.detach().requires_grad_()
    origins[id(leaf)] = tensor
    return leaf


def _leaves(outputs: Sequence[Tensor], model: nn.Module | None) -> Iterator[Tensor]:
    """The leaves of the graph behind ``outputs``: parameters, and inputs that need a gradient."""
    yield from (output for output in outputs if output.is_leaf and output.requires_grad)
    waiting: list[Node] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        else:
            _check_node(node, model)
        waiting.extend(behind for behind, _ in node.next_functions if behind is not None)


_WRAPPED = (
    "let the wrapper hold the whole step: a module whose forward makes the chunks, calls cached_loss and returns the "
    "loss, as Lightning's DDP strategy has it"
)


def _check_node(node: Node, model: nn.Module | None) -> None:
    name = node.name()
    if "CheckpointFunction" in name:
        raise NearfarError(
            "encode uses torch.utils.checkpoint with use_reentrant=True, which hides what it trains; set "
            "use_reentrant=False (in transformers: gradient_checkpointing_kwargs={'use_reentrant': False})"
        )
    if "DDPSink" in name:
        raise NearfarError(f"encode calls a DistributedDataParallel wrapper for each chunk; {_WRAPPED}")
    counts = "BatchNorm" in name and getattr(node, "_saved_running_mean", None) is not None
    if counts and getattr(node, "_saved_training", True) and model is None:
        raise NearfarError(
            "encode holds a BatchNorm in training, whose running statistics would count every chunk twice: pass "
            "model=, the module that holds it. It will see the statistics of a chunk, not of the batch; LayerNorm "
            "does not depend on other rows, nor does BatchNorm after .eval()"
        )


def _check_model(model: nn.Module) -> None:
    wrappers = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
    wrapping = sorted({c.__name__ for m in model.modules() for c in type(m).__mro__} & wrappers)
    if wrapping:
        raise NearfarError(f"the encoder holds a {wrapping[0]} wrapper, called for each chunk; {_WRAPPED}")


def _check_outputs(
    outputs: Sequence[object], form: pytree.TreeSpec, expected: pytree.TreeSpec | None, number: int
) -> None:
    if form != expected:
        raise NearfarError(f"encode gave {form} for chunk {number}, but {expected} for the first one")
    wrong = [output for output in outputs if not isinstance(output, Tensor) or output.ndim == 0]
    if wrong or not outputs:
        given = "nothing"
        if wrong:
            given = "a single number" if isinstance(wrong[0], Tensor) else f"a {type(wrong[0]).__name__}"
        raise NearfarError(
            f"encode gave {given} for chunk {number}; it must give tensors whose first dimension counts rows. A scale "
            "or a bias that learns belongs into the loss"
        )


def _warn_of_statistics(model: nn.Module) -> None:
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    if layers:
        warnings.warn(
            f"{len(layers)} {type(layers[0]).__name__} layers train with the statistics of a chunk, not of the whole "
            "batch: the result depends on the size of the chunks",
            stacklevel=4,
        )


# How far, relative to its length, an embedding may be from that of the first pass. Kernels of a GPU that add up in any
# order stay far below; a different dropout mask is far above.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2}
_HALF_TOLERANCE = 0.1


@dataclass
class Chunk(Generic[Part]):
    """What ``encode`` was given, the state of the generators then, and the rows of each output."""

    content: Part
    generators: Json
    rows: list[int]


class Replay(Generic[Part]):
    """Encodes ``chunks`` again and hands the gradients of ``leaves`` to autograd.

    ``learns`` says which outputs have a gradient, ``expected`` holds the outputs of the first chunk.
    """

    def __init__(
        self,
        encode: Callable[[Part], object],
        model: nn.Module | None,
        chunks: list[Chunk[Part]],
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

    def _encode(self, chunk: Chunk[Part]) -> list[Tensor]:
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
        ctx: Any, replay: Replay[object], parts: Sequence[Sequence[Tensor]], *origins: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.replay = replay
        ctx.set_materialize_grads(False)
        # Nothing is needed of it: reading it makes autograd complain of a second backward in its own words.
        ctx.save_for_backward(torch.empty(0))
        return tuple(torch.cat(list(part)) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
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


def _autocast_settings() -> list[Json]:
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
    removed_hooks = [
        (leaf._backward_hooks, dict(leaf._backward_hooks)) for leaf in leaves if leaf._backward_hooks
    ]
    for hooks, _ in removed_hooks:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in removed_hooks:
            hooks.update(content)
