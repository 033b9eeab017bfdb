"""Rows of all ranks in one tensor, with exact gradients.

A contrastive loss of a batch that is split over processes needs the rows of the others as candidates. ``gather``
brings them; the loss itself never learns that there are ranks (``nearfar.training.distributed`` wraps it).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from nearfar.contrast.numerics import Context
from nearfar.errors import NearfarError

__all__ = ["gather", "gather_rows", "row_counts", "whole_value", "world_size"]

#: tensors that one exchange of row counts describes
_MOST = 16
# Renamed in torch 2.13; the old name warns there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather(tensor: Shaped[Tensor, "n ..."], with_grad: bool = True) -> Shaped[Tensor, "total ..."]:
    """The rows of all ranks, in the order of the ranks; in one process ``tensor`` itself.

    ``tensor`` is (n, …); n may differ from rank to rank, as in an uneven last batch, and may be 0. Any dtype:
    labels and Boolean masks travel too, without a gradient. All ranks must call it, and ``backward`` after it.

    The gradient is exact: a row receives the sum of the gradients that all ranks have for it. With
    ``with_grad=False`` the rows of other ranks are constants and the own ones keep their gradient on this rank
    alone (``gather_with_grad=False`` of open_clip): nothing is exchanged in backward, and what other ranks would
    have said of the own rows is lost.

    Raises ``NearfarError`` on every rank if the ranks pass different dtypes, shapes behind the rows, or only some
    of them need a gradient, and if torchrun's variables promise several processes but no group was started.

    >>> features = torch.randn(4, 8)
    >>> gather(features) is features
    True
    """
    if world_size() == 1:
        return tensor
    return gather_rows(tensor, row_counts({"tensor": tensor})["tensor"], with_grad)


def world_size() -> int:
    """The number of processes that train together; 1 where no process group was started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    promised = os.environ.get("WORLD_SIZE", "1")
    if promised.isdigit() and int(promised) > 1:
        raise NearfarError(
            f"WORLD_SIZE is {promised}, but this process belongs to no group, so that it would train on its own rows "
            "alone. Call torch.distributed.init_process_group() first, in a program started with "
            f"torchrun --nproc-per-node={promised} train.py (Lightning's DDP strategy does both)."
        )
    return 1


def row_counts(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """How many rows each rank has of each tensor, from one exchange of a few whole numbers.

    Raises ``NearfarError`` on every rank where the ranks' tensors do not fit together: left to themselves they
    would wait for each other without end.
    """
    if len(tensors) > _MOST:
        raise NearfarError(
            f"{len(tensors)} tensors to gather; at most {_MOST} of rows can go through one loss"
        )
    for name, tensor in tensors.items():
        if tensor.ndim == 0:
            raise NearfarError(
                f"{name} is a single number, and gather takes rows (n, …); it is the same on all ranks or one per "
                "rank: pass it on as it is, or unsqueeze(0) it"
            )
    own = torch.full((_MOST, 2), -1, dtype=torch.int64)
    for i, (name, tensor) in enumerate(tensors.items()):
        own[i, 0], own[i, 1] = len(tensor), _kind(name, tensor)
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    own = own.to(device)
    every = own.new_empty(dist.get_world_size(), *own.shape)
    _all_gather(every.flatten(), own.flatten())
    table = every.tolist()
    kinds = [[kind for _, kind in rank] for rank in table]
    if any(kind != kinds[0] for kind in kinds):
        mine = ", ".join(
            f"{name} {tuple(tensor.shape)} {tensor.dtype}{' with gradient' * _needs_grad(tensor)}"
            for name, tensor in tensors.items()
        )
        raise NearfarError(
            f"the ranks pass different things; rank {dist.get_rank()} has {mine or 'no tensor'}. Only the number of "
            "rows may differ: give all ranks the same arguments, dtypes, dimensions and frozen parts"
        )
    return {name: [rank[i][0] for rank in table] for i, name in enumerate(tensors)}


def gather_rows(
    tensor: Shaped[Tensor, "n ..."], counts: list[int], with_grad: bool = True
) -> Shaped[Tensor, "total ..."]:
    """``gather`` where the rows of each rank (``row_counts``) are known already."""
    if not _needs_grad(tensor):
        return _collect(tensor, counts)
    if with_grad:
        return _Gather.apply(tensor, counts)
    before = sum(counts[: dist.get_rank()])
    others = _collect(tensor, counts)
    return torch.cat([others[:before], tensor, others[before + len(tensor) :]])


def whole_value(part: Shaped[Tensor, ""]) -> Shaped[Tensor, ""]:
    """The sum of the ranks' parts of a loss as the value on every rank, with the gradient of ranks × the own part.

    DistributedDataParallel takes the mean over ranks, and the mean of ranks × part is the sum of the parts. Without
    the factor all gradients would be too small by the number of ranks.
    """
    return _Whole.apply(part)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, part: Tensor) -> Tensor:
        value = part.detach().clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return gradient * dist.get_world_size()


class _GatherContext(Context):
    counts: list[int]


class _Gather(torch.autograd.Function):
    """Forward: own rows to all. Backward: each rank's gradients to the ranks that own the rows, added up there."""

    @staticmethod
    def forward(ctx: _GatherContext, tensor: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _collect(tensor, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: _GatherContext, gradient: Tensor) -> tuple[Tensor, None]:
        counts = ctx.counts
        gradient = gradient.contiguous()
        own, ranks = counts[dist.get_rank()], len(counts)
        parts = gradient.new_empty(ranks, own, *gradient.shape[1:])
        width = gradient[0].numel() * gradient.element_size() if len(gradient) else 0
        if width:
            sent = [count * width for count in counts]
            dist.all_to_all_single(_bytes(parts), _bytes(gradient), [own * width] * ranks, sent)
        return parts.sum(0), None  # always in the order of the ranks, so that a run repeats bit for bit


def _collect(tensor: Tensor, counts: list[int]) -> Tensor:
    # Bytes travel, so that every dtype does; a collective wants the same number from all, so that rows are padded.
    longest = max(counts)
    rows = tensor.detach().contiguous()
    if len(rows) < longest:
        rows = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    gathered = rows.new_empty(len(counts), *rows.shape)
    if rows.numel():
        _all_gather(_bytes(gathered), _bytes(rows))
    if min(counts) == longest:
        return gathered.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _needs_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _kind(name: str, tensor: Tensor) -> int:
    """The same number for tensors that can be gathered together, on all machines."""
    text = f"{name} {tensor.dtype} {tuple(tensor.shape[1:])} {_needs_grad(tensor)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
