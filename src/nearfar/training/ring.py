"""InfoNCE over all ranks without any rank ever holding all rows.

Blocks of keys travel around the ring of ranks: each rank holds one at a time, scores its queries against it, and
passes it on, while the next one is on its way already. With a block travel the running sums of its keys as queries
(forward) and the gradient of its keys (backward); after as many steps as there are ranks both are home again. Features
and gradients take O(rows of one rank × dimensions) of memory, and the work is shared out evenly.

Blockwise and ring evaluation of a softmax: Liu, Zaharia and Abbeel 2023 (arXiv:2310.01889); both directions of the
contrastive loss come out of one round here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nearfar.contrast import (
    Direction,
    NoPositives,
    OwnPair,
    Statistics,
    Step,
    Target,
    computing_dtype,
    embeddings,
)
from nearfar.contrast.kernel import accumulate_tile, query_views
from nearfar.contrast.logit_grads import LogitGrads, tile_logit_grads
from nearfar.contrast.numerics import Context, full_precision
from nearfar.contrast.positives import Workspace
from nearfar.contrast.running_sums import RunningSums
from nearfar.contrast.tiles import TILE, Setting, tiles
from nearfar.errors import NearfarError
from nearfar.losses.arguments import scale_of
from nearfar.losses.base import ContrastiveLoss, traits_of
from nearfar.training.gather import row_counts, whole_value

__all__ = ["check_ring", "ring_loss", "ring_sums"]


def ring_loss(loss: nn.Module, arguments: Mapping[str, object]) -> Float[Tensor, ""]:
    """``loss`` of the batches of all ranks, called with the arguments of its ``forward`` for this rank.

    The value is that of the whole batch; the gradient is this rank's share, times the number of ranks, so that
    DistributedDataParallel's mean is that of the whole batch. The loss's record describes this rank's rows.
    """
    check_ring(loss, arguments)
    assert isinstance(loss, ContrastiveLoss)
    a, b, scale, both, normalize = loss.pair_arguments(arguments)
    counts = row_counts({"a": a, "b": b})
    if counts["a"] != counts["b"]:
        raise NearfarError(
            f"rows of a per rank are {counts['a']}, of b {counts['b']}; row i of both belong together"
        )
    dtype, total = computing_dtype(a, b), sum(counts["a"])
    device, problem = a.device, None
    factor = torch.ones((), dtype=dtype)
    try:
        a, b = (embeddings(x, name, normalize, dtype) for x, name in ((a, "a"), (b, "b")))
        factor = scale_of(scale, a)
    except NearfarError as error:
        problem = error
    # A rank that stops alone would leave the others waiting for its block.
    failed = torch.tensor(float(problem is not None), device=device)
    dist.all_reduce(failed)
    if problem is not None:
        raise problem
    if failed:
        raise NearfarError(f"{int(failed)} other rank(s) cannot take this step; their own message says why")
    *rests, positive, hardest = ring_sums(a, b, factor, counts["a"], both)
    rests = rests if both else rests[:1]
    losses = [torch.nn.functional.softplus(rest - positive, threshold=50.0) for rest in rests]
    value = whole_value(torch.stack([each.sum() for each in losses]).sum() / (total * len(losses)))
    directions = [
        Direction(each.detach(), rest.detach(), Statistics(most, float(total), 1.0, 1.0, 0.0))
        for each, rest, most in zip(losses, rests, hardest, strict=False)
    ]
    loss._step = Step(value.detach(), partial(list, directions), factor.detach())
    return value


def check_ring(loss: nn.Module, arguments: Mapping[str, object] | None = None) -> None:
    """``NearfarError`` unless there is a ring version of this loss with its options and the ``arguments`` of a call."""
    traits = traits_of(loss)
    if traits.ring is None:
        stated = {each: getattr(each, "traits", None) for each in ContrastiveLoss.__subclasses__()}
        known = [
            each.__name__ for each, traits in stated.items() if traits is not None and traits.ring is not None
        ]
        raise NearfarError(
            f"ring=True: there is no ring version of {type(loss).__name__}, only of {' and '.join(known)}"
        )
    for needed in traits.ring:
        value = getattr(loss, needed.option)
        if value not in needed.values:
            raise NearfarError(
                f"ring=True: {needed.option}={value!r} is not supported, only {needed.values[0]!r}: "
                f"{needed.reason}; use local_loss=True instead"
            )
    for name, value in (arguments or {}).items():
        if value is not None and name not in (*traits.rows, *traits.numbers):
            raise NearfarError(
                f"ring=True: {name} is not supported, as it would be needed for the rows of other ranks; use "
                "local_loss=True, which needs more memory and takes it"
            )


def ring_sums(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    counts: list[int],
    both: bool = True,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "2 n"]]:
    """For this rank's rows: log Σ exp over the negatives of ``a`` and of ``b`` (-inf without ``both``), the logits of
    the pairs, and, without a gradient, the largest logit of a negative in both directions.

    ``counts`` are the rows of each rank. Logits are ``scale`` times dot products. All ranks must call it together, and
    its backward: gradients of ``a`` and ``b`` are those of the sum of what the ranks differentiate, and each rank's
    gradient of ``scale`` is its part of that.
    """
    return _RingSums.apply(a, b, scale, counts, both)


class _RingContext(Context):
    counts: list[int]
    both: bool


class _RingSums(torch.autograd.Function):
    """The round of the keys, forward and backward. A block is named by the rank it belongs to."""

    @staticmethod
    def forward(
        ctx: _RingContext, a: Tensor, b: Tensor, scale: Tensor, counts: list[int], both: bool
    ) -> tuple[Tensor, ...]:
        here, others = dist.get_rank(), sum(counts) - 1
        space = Workspace(a, _size(counts))
        home = _setting(OwnPair(len(a)), counts, both)
        rows = RunningSums(len(a), others, a, home)
        sums = torch.stack([a.new_full((len(b),), -torch.inf), a.new_zeros(len(b))])  # largest logit, Σ exp
        with full_precision(a.device):
            for block, keys in _round(b, counts):
                setting = home if block == here else _setting(NoPositives(len(a), len(keys)), counts, both)
                columns = RunningSums(len(keys), others, a, setting)
                if block != here:
                    columns.top, columns.total = sums.unbind()
                if len(a) and len(keys):
                    for tile in tiles(a, keys, scale, setting, space):
                        accumulate_tile(tile, [rows, columns], space)
                    if both:
                        sums = torch.stack([columns.top, columns.total])
                if both:
                    sums = _pass_on(sums, (2, counts[block - 1]))
        rest, positive, _, _ = rows.results() if len(a) else (a.new_zeros(0),) * 4
        back = sums[0] + sums[1].log() if both else torch.full_like(rest, -torch.inf)
        ctx.save_for_backward(a, b, scale, rest, back)
        ctx.counts, ctx.both = counts, both
        hardest = torch.stack([rest if rows.top is None else rows.top, sums[0]])
        ctx.mark_non_differentiable(hardest)
        return rest, back, positive, hardest

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _RingContext, by_rest: Tensor, by_back: Tensor, by_positive: Tensor, by_hardest: Tensor
    ) -> tuple[Tensor | None, ...]:
        a, b, scale, rest, back = ctx.saved_tensors
        counts, both, here = ctx.counts, ctx.both, dist.get_rank()
        space = Workspace(a, _size(counts))
        home = _setting(OwnPair(len(a)), counts, both)
        rows = _grads_of(home, rest, by_rest, by_positive)
        by_a, by_b = torch.zeros_like(a), torch.zeros_like(b)
        with full_precision(a.device):
            # What the keys know of themselves as queries travels with them.
            known = torch.stack([back, by_back], 1)
            for (block, keys), (_, sums) in zip(_round(b, counts), _round(known, counts), strict=True):
                setting = home if block == here else _setting(NoPositives(len(a), len(keys)), counts, both)
                columns = _grads_of(setting, sums[:, 0], sums[:, 1], torch.zeros_like(sums[:, 0]))
                for tile in tiles(a, keys, scale, setting, space) if len(a) and len(keys) else ():
                    values = tile_logit_grads(tile, query_views(tile, [rows, columns]), space)
                    by_a[tile.rows].addmm_(values, tile.keys)
                    by_b[tile.columns].addmm_(values.T, tile.queries)
                by_b = _pass_on(by_b, (counts[block - 1], b.shape[1]))
            by_scale = torch.dot(a.flatten(), by_a.flatten()) if ctx.needs_input_grad[2] else None
        return by_a.mul_(scale), by_b.mul_(scale), by_scale, None, None


def _size(counts: list[int]) -> tuple[int, int]:
    longest = max(counts)
    return min(TILE[0], longest), min(TILE[1], longest)


def _setting(target: Target, counts: list[int], both: bool) -> Setting:
    return Setting(
        target=target,
        mask=None,
        offset=0,
        without_self=False,
        normalize=False,
        both=both,
        twin=False,
        inside=False,
        expected=False,
        bounded=False,  # the shift is part of the sums that travel, and all ranks must agree on it
        size=_size(counts),
        keep=False,
    )


def _grads_of(setting: Setting, rest: Tensor, by_rest: Tensor, by_positive: Tensor) -> LogitGrads:
    side = RunningSums(len(rest), 0, rest, setting)
    return LogitGrads(side, (rest, torch.zeros_like(rest), None, None), (by_rest, by_positive, None, None))


def _round(block: Tensor, counts: list[int]) -> Iterator[tuple[int, Tensor]]:
    """The blocks of all ranks, the own one first; while one is worked on, the next is on its way."""
    here, ranks = dist.get_rank(), len(counts)
    for step in range(ranks):
        name = (here - step) % ranks
        last = step == ranks - 1
        coming, arrived = (block, None) if last else _send(block, (counts[name - 1], *block.shape[1:]))
        yield name, block
        if arrived is not None:
            arrived()
        block = coming


def _pass_on(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    received, arrived = _send(tensor, shape)
    arrived()
    return received


def _send(tensor: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Callable[[], None]]:
    """To the next rank, and of ``shape`` from the one before; the function waits for both."""
    here, ranks = dist.get_rank(), dist.get_world_size()
    tensor, received = tensor.contiguous(), tensor.new_empty(shape)
    wanted = [(dist.isend, tensor, (here + 1) % ranks), (dist.irecv, received, (here - 1) % ranks)]
    transfers = [dist.P2POp(kind, each, peer) for kind, each, peer in wanted if each.numel()]
    handles = dist.batch_isend_irecv(transfers) if transfers else []

    def arrived(_alive: Tensor = tensor) -> None:  # what is being sent must not be freed
        for handle in handles:
            handle.wait()

    return received, arrived
