"""A loss over the batches of all ranks: the gradients of one process with the whole batch, on several.

Losses know nothing of ranks. Each is called with the rows of all (``nearfar.training.gather``), as its ``traits`` say
which arguments are rows, and the result is scaled so that the mean of the ranks' gradients, which
DistributedDataParallel takes, is the gradient of the loss of the whole batch. ``SharingOptions.value`` is the one place
that does it: ``DistributedLoss`` calls it for any loop, ``nearfar.training.shared_step`` for ``nearfar train``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar.contrast import computing_dtype
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.losses.base import LossTraits, traits_of
from nearfar.training.gather import gather_rows, row_counts, whole_value, world_size
from nearfar.training.ring import check_ring, ring_loss

__all__ = ["DistributedLoss", "SharingOptions", "join_arguments"]


@dataclass(frozen=True)
class SharingOptions:
    """How several processes share out the rows of a batch.

    - ``local_loss=False``: each rank computes the whole loss. Any loss.
    - ``local_loss=True``: each rank computes the part of its own rows against all, 1 / ranks of the work and memory.
      For losses whose traits have ``local``.
    - ``gather_with_grad=False``: rows of other ranks are constants (not exact).
    - ``ring=True``: rows are never gathered, other ranks' come a block at a time (``nearfar.training.ring``). For
      losses whose traits have ``ring``.
    """

    local_loss: bool = False
    gather_with_grad: bool = True
    ring: bool = False

    def check(self, prefix: str = "", true: str = "True") -> None:
        """``NearfarError`` for options that exclude each other; ``prefix`` and ``true`` are how its caller writes
        them."""
        if self.ring and (self.local_loss or not self.gather_with_grad):
            raise NearfarError(
                f"{prefix}ring={true} computes the own rows with exact gradients; leave the other options out"
            )

    def check_loss(self, loss: nn.Module, prefix: str = "", true: str = "True") -> None:
        """``NearfarError`` unless this loss, with its options, can be computed so."""
        if self.ring:
            check_ring(loss)
        if not self.local_loss:
            return
        name, local = type(loss).__name__, traits_of(loss).local
        otherwise = "leave local_loss out, then every rank computes the whole loss, with the same gradients"
        if local is None:
            raise NearfarError(
                f"{prefix}local_loss={true}: {name} cannot be taken apart by rows (its traits have no 'local'); "
                f"{otherwise}"
            )
        for needed in local:
            value = getattr(loss, needed.option, needed.values[0])
            if value not in needed.values:
                raise NearfarError(
                    f"{prefix}local_loss={true} adds up the parts of the ranks, and {name} with "
                    f"{needed.option}={value!r} has none: {needed.reason}; {otherwise}"
                )

    def without_effect(self) -> str:
        """What the options come to in one process: "" where none is set."""
        given = {
            "local_loss": self.local_loss,
            "gather_with_grad": not self.gather_with_grad,
            "ring": self.ring,
        }
        names = [name for name, value in given.items() if value]
        return f"{' and '.join(names)} {'have' if len(names) > 1 else 'has'} no effect" if names else ""

    def value(
        self,
        loss: nn.Module,
        call: Callable[..., Tensor],
        given: inspect.BoundArguments,
        own: slice = slice(0),
    ) -> Float[Tensor, ""]:
        """The value of ``loss`` of the rows of all ranks, with this rank's gradient of it. All ranks call it together.

        ``given`` are the arguments of ``call``, the forward of the loss: with the rows of all, of which ``own`` are
        those of this rank; for the ring with the rows of this rank.
        """
        if self.ring:
            return ring_loss(loss, given.arguments)
        if not self.local_loss:
            return call(*given.args, **given.kwargs)
        if own.start == own.stop:
            return whole_value(_zero_with_grad(given.arguments.values()))
        given.arguments["rows"] = own
        return whole_value(call(*given.args, **given.kwargs))


def join_arguments(
    arguments: Json,
    traits: LossTraits,
    *,
    shared: Collection[str] = (),
    with_grad: bool = True,
) -> tuple[Json, slice]:
    """The arguments of a loss for the batch of all ranks, and which of its rows are this rank's.

    ``traits`` say which tensors (n, …), in pairs too, are gathered, and which of them hold positions in the batch,
    which move along. ``shared`` ones and everything else stay. Collective: all ranks call it together.

    Raises ``NearfarError`` where the rows do not fit together, where a mask is not one of the whole batch, where all
    ranks bring the same further rows (they would count several times), and where ``shared`` ones differ.
    """
    if arguments.get("rows") is not None:
        raise NearfarError(
            "rows: several processes share the rows out themselves; use local_loss=True instead"
        )
    rows, further = (
        {
            key: tensor
            for name in arguments
            if name in names and name not in shared
            for key, tensor in _parts(name, arguments[name])
            if tensor.ndim
        }
        for names in (traits.rows, traits.further)
    )
    if not rows:
        raise NearfarError(
            "no argument of the loss has rows: a tensor (n, …) for the rows of this rank is needed"
        )
    counts = row_counts(rows | further)
    name = next(iter(rows))
    first = counts[name]
    if traits.aligned:
        _check_partners(name, rows, counts, traits.further)
    before, own = sum(first[: dist.get_rank()]), first[dist.get_rank()]
    for pairs in traits.pairs:
        _check_mask(pairs, arguments.get(pairs), own, sum(first))
    _check_further(further, {key: x for name in shared for key, x in _parts(name, arguments.get(name))})
    gathered = {
        name: gather_rows(tensor, counts[name], with_grad) for name, tensor in (rows | further).items()
    }
    for name in traits.positions:
        if name in gathered:
            gathered[name] = _moved(name, rows[name], gathered[name], first, counts[name])
    joined = {name: _replaced(name, value, gathered) for name, value in arguments.items()}
    return joined, slice(before, before + own)


def _zero_with_grad(arguments: Iterable[object]) -> Float[Tensor, ""]:
    """0 that depends on all arguments: a rank without rows must take part in backward all the same."""
    tensors = [part for value in arguments for _, part in _parts("", value) if part.dtype.is_floating_point]
    dtype = computing_dtype(*tensors)
    return torch.stack([tensor.flatten()[:0].sum().to(dtype) for tensor in tensors]).sum()


def _check_partners(
    name: str, rows: Collection[str], counts: dict[str, list[int]], further: tuple[str, ...]
) -> None:
    for other in rows:
        if counts[other] != counts[name]:
            hint = f". Pass further rows as {' or '.join(further)}, where the loss has it" if further else ""
            raise NearfarError(
                f"{other} has {counts[other]} rows on the ranks, but {name} {counts[name]}: row i of both must be the "
                f"same item{hint}"
            )


def _check_mask(name: str, mask: Tensor | None, own: int, total: int) -> None:
    if mask is not None and tuple(mask.shape) != (total, total):
        raise NearfarError(
            f"{name} is {tuple(mask.shape)}, but the batch of all ranks has {total} rows, {own} of them here. One of "
            "the own rows would say nothing of pairs of two ranks: make it from gathered values, such as "
            "duplicate_mask(gather(labels)), with nearfar.training.gather"
        )


def _check_further(further: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    """Rows of a memory are the same on all ranks: gathered, each would count once for each rank."""
    own = {name: x for name, x in further.items() if x.dtype.is_floating_point}
    same = _same_on_all({**own, **shared})
    for name, tensor in own.items():
        if same[name] and len(tensor):
            raise NearfarError(
                f"{name}: all ranks bring the same {len(tensor)} rows, which would be counted {world_size()} times; "
                f"rows of a memory are not gathered: DistributedLoss(loss, shared={(name.split('[')[0],)})"
            )
    for name in shared:
        if not same[name]:
            raise NearfarError(
                f"shared={name}: it is not the same on all ranks. Fill a memory with the rows of all, "
                "memory.push(gather(features)), with nearfar.training.gather"
            )


def _same_on_all(tensors: dict[str, Tensor]) -> dict[str, bool]:
    """By two sums of each, which differ in rounding at most where the ranks' machines do."""
    if not tensors:
        return {}
    values = [tensor.detach().double() for _, tensor in sorted(tensors.items())]
    sums = torch.stack([torch.stack([value.sum(), value.square().sum()]) for value in values])
    each = gather_rows(sums.unsqueeze(0), [1] * world_size())
    same = torch.isclose(each, each[:1], rtol=1e-9, equal_nan=True).all(0).all(1).tolist()
    return dict(zip(sorted(tensors), same, strict=True))


def _parts(name: str, value: object) -> list[tuple[str, Tensor]]:
    """The tensors of an argument, each with a name; those of a pair one by one."""
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, (tuple, list)):
        return [part for i, each in enumerate(value) for part in _parts(f"{name}[{i}]", each)]
    return []


def _replaced(name: str, value: object, gathered: dict[str, Tensor]) -> object:
    if isinstance(value, (tuple, list)):
        return type(value)(_replaced(f"{name}[{i}]", each, gathered) for i, each in enumerate(value))
    return gathered.get(name, value)


def _moved(
    name: str,
    own: Int[Tensor, "n ..."],
    gathered: Int[Tensor, "total ..."],
    batch: list[int],
    rows: list[int],
) -> Int[Tensor, "total ..."]:
    """Positions in the batches of the ranks as positions in the whole batch; below 0 stays, it stands for none."""
    size = batch[dist.get_rank()]
    # On a device, to look would mean to wait for it.
    if own.device.type == "cpu" and own.numel() and int(own.max()) >= size:
        raise NearfarError(
            f"{name} names position {int(own.max())}, but this rank's batch has {size} rows: positions count from 0 "
            "within the rank, -1 stands for none"
        )
    starts = torch.tensor([sum(batch[:rank]) for rank in range(len(batch))], device=own.device)
    shift = starts.repeat_interleave(torch.tensor(rows, device=own.device), output_size=len(gathered))
    return torch.where(gathered >= 0, gathered + shift.view(-1, *[1] * (gathered.ndim - 1)), gathered)


class DistributedLoss(nn.Module):
    """``loss`` of the batches of all ranks; called with this rank's arguments.

    Each rank gets the value of the loss of the whole batch. After DistributedDataParallel has averaged the
    gradients, those of encoder and scale are what one process with the whole batch would have (within rounding),
    for any number of rows per rank.

    The ``traits`` of the loss say which tensors are this rank's rows, and are gathered; numbers, such as a learnable
    scale, are passed as they are. Positions in the batch are moved to the rank's place in the whole batch. A ``mask``
    of pairs must be one of the whole batch. ``shared`` names tensors that are the same on all ranks, such as the rows
    of a memory, and are not gathered. Of a loss without traits, arguments are what those of the same name are in the
    losses here, and all other tensors are rows.

    - ``local_loss=False``: each rank computes the whole loss. Any loss.
    - ``local_loss=True``: each rank computes the part of its own rows against all, 1 / ranks of the work and
      memory. For losses that take ``rows``. ``record`` then describes this rank's rows.
    - ``gather_with_grad=False``: as in open_clip, features of other ranks are constants. No longer exact: without
      ``local_loss`` the encoder's gradient is 1 / ranks of the exact one (the scale's is exact), with it what the
      other ranks' queries say of a row is missing.
    - ``ring=True``: no rank ever holds the rows of all (``nearfar.training.ring``). ``InfoNCELoss`` and ``ClipLoss``.

    In one process ``loss`` is called as it is, and a warning says so once. All ranks must call it together.

    >>> import torch, warnings
    >>> from nearfar.losses import InfoNCELoss
    >>> loss = DistributedLoss(InfoNCELoss(), local_loss=True)
    >>> loss.describe()
    'one process: the loss sees this batch alone; local_loss has no effect'
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     value = loss(torch.eye(4), torch.eye(4))
    >>> loss.record.candidates
    4.0
    """

    def __init__(
        self,
        loss: nn.Module,
        local_loss: bool = False,
        gather_with_grad: bool = True,
        ring: bool = False,
        shared: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.loss = loss
        self.sharing = SharingOptions(local_loss, gather_with_grad, ring)
        self.shared = frozenset(shared)
        self._signature = inspect.signature(loss.forward)
        self._warned = False
        self.sharing.check_loss(loss)
        self.sharing.check()
        name, names = type(loss).__name__, self._signature.parameters
        unknown = sorted(self.shared - names.keys())
        if unknown:
            raise NearfarError(f"shared={unknown}: {name} has no such argument; it takes {', '.join(names)}")

    @property
    def record(self) -> object:
        """The record of the loss's last call on this rank."""
        return getattr(self.loss, "record", None)

    def describe(self) -> str:
        """What this wrapper does with the processes there are, in one line for the log of a run."""
        ranks, sharing = world_size(), self.sharing
        if ranks == 1:
            without_effect = sharing.without_effect()
            return f"one process: the loss sees this batch alone{'; ' * bool(without_effect)}{without_effect}"
        rows = "its own rows against all" if sharing.local_loss or sharing.ring else "the whole batch"
        rows += ", a block at a time" if sharing.ring else ""
        constant = (
            "" if sharing.gather_with_grad else ", other ranks' rows as constants (gradients are not exact)"
        )
        return f"{ranks} processes: each computes {rows}{constant}"

    def forward(self, *args: object, **kwargs: object) -> Float[Tensor, ""]:
        if world_size() == 1:
            if not self._warned:
                warnings.warn(self.describe(), stacklevel=2)
                self._warned = True
            return self.loss(*args, **kwargs)
        given, own = self._signature.bind(*args, **kwargs), slice(0)
        if not self.sharing.ring:
            arguments, own = join_arguments(
                given.arguments,
                traits_of(self.loss),
                shared=self.shared,
                with_grad=self.sharing.gather_with_grad,
            )
            given.arguments.update(arguments)
        return self.sharing.value(self.loss, self.loss, given, own)

    def extra_repr(self) -> str:
        options = self.sharing
        return f"local_loss={options.local_loss}, gather_with_grad={options.gather_with_grad}, ring={options.ring}"
