"""A loss over the batches of all ranks: the gradients of one process with the whole batch, on several.

Losses know nothing of ranks. ``DistributedLoss`` brings them the rows of all ranks (``nearfar.training.gather``),
joins their other arguments, and scales the result so that the mean of the ranks' gradients, which
DistributedDataParallel takes, is the gradient of the loss of the whole batch.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar.contrast import computing_dtype
from nearfar.errors import NearfarError
from nearfar.training.gather import gather_rows, row_counts, whole_value, world_size
from nearfar.training.ring import check_ring, ring_loss

__all__ = ["DistributedLoss", "join_arguments", "zero_with_grad"]


#: arguments whose rows are not rows of the batch, but further ones
FURTHER = ("negatives", "memory")
#: arguments about pairs of the whole batch: nothing that could be gathered
MASKS = ("mask", "negatives_mask", "positives")
#: arguments that are one number, in whatever shape
NUMBERS = ("scale", "logit_scale", "logit_bias")


def join_arguments(
    arguments: dict[str, Any],
    *,
    positions: Collection[str] = (),
    shared: Collection[str] = (),
    with_grad: bool = True,
    paired: bool = True,
) -> tuple[dict[str, Any], slice]:
    """The arguments of a loss for the batch of all ranks, and where this rank's rows stand in it.

    Tensors (n, …), in pairs too, are gathered, and ``positions`` in the batch moved along; numbers (0-d), masks,
    ``shared`` tensors and everything else stay. ``paired``: all arguments but further candidates are about the same
    rows. Collective: all ranks call it together, and the first argument is one of the batch's rows.

    Raises ``NearfarError`` where the rows do not fit together, where a mask is not one of the whole batch, where all
    ranks bring the same further rows (they would count several times), and where ``shared`` ones differ.
    """
    if arguments.get("rows") is not None:
        raise NearfarError(
            "rows: several processes share the rows out themselves; use local_loss=True instead"
        )
    rows = {
        key: tensor
        for name, value in arguments.items()
        if name not in shared and name not in MASKS and name not in NUMBERS
        for key, tensor in _parts(name, value)
        if tensor.ndim
    }
    if not rows:
        raise NearfarError(
            "no argument of the loss has rows: a tensor (n, …) for the rows of this rank is needed"
        )
    counts = row_counts(rows)
    name, first = next(iter(counts.items()))
    if paired:
        _check_partners(name, counts)
    before, own = sum(first[: dist.get_rank()]), first[dist.get_rank()]
    for pairs in ("mask", "positives"):
        _check_mask(pairs, arguments.get(pairs), own, sum(first))
    _check_further(rows, {key: x for name in shared for key, x in _parts(name, arguments.get(name))})
    found = {name: gather_rows(tensor, counts[name], with_grad) for name, tensor in rows.items()}
    for name in positions:
        if name in found:
            found[name] = _moved(name, rows[name], found[name], first, counts[name])
    joined = {name: _replaced(name, value, found) for name, value in arguments.items()}
    return joined, slice(before, before + own)


def zero_with_grad(arguments: Iterable[Any]) -> Float[Tensor, ""]:
    """0 that depends on all arguments: a rank without rows must take part in backward all the same."""
    tensors = [part for value in arguments for _, part in _parts("", value) if part.dtype.is_floating_point]
    dtype = computing_dtype(*tensors)
    return torch.stack([tensor.flatten()[:0].sum().to(dtype) for tensor in tensors]).sum()


def _check_partners(name: str, counts: dict[str, list[int]]) -> None:
    for other, each in counts.items():
        if not other.startswith(FURTHER) and each != counts[name]:
            raise NearfarError(
                f"{other} has {each} rows on the ranks, but {name} {counts[name]}: row i of both must be the same "
                f"item. Pass further rows as {' or '.join(FURTHER)}, where the loss has it"
            )


def _check_mask(name: str, mask: Any, own: int, total: int) -> None:
    if mask is not None and tuple(mask.shape) != (total, total):
        raise NearfarError(
            f"{name} is {tuple(mask.shape)}, but the batch of all ranks has {total} rows, {own} of them here. One of "
            "the own rows would say nothing of pairs of two ranks: make it from gathered values, such as "
            "duplicate_mask(gather(labels)), with nearfar.training.gather"
        )


def _check_further(rows: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    """Rows of a memory are the same on all ranks: gathered, each would count once for each rank."""
    own = {name: x for name, x in rows.items() if name.startswith(FURTHER) and x.dtype.is_floating_point}
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
    found = gather_rows(sums.unsqueeze(0), [1] * world_size())
    same = torch.isclose(found, found[:1], rtol=1e-9, equal_nan=True).all(0).all(1).tolist()
    return dict(zip(sorted(tensors), same, strict=True))


def _parts(name: str, value: Any) -> list[tuple[str, Tensor]]:
    """The tensors of an argument, each with a name; those of a pair one by one."""
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, (tuple, list)):
        return [part for i, each in enumerate(value) for part in _parts(f"{name}[{i}]", each)]
    return []


def _replaced(name: str, value: Any, found: dict[str, Tensor]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_replaced(f"{name}[{i}]", each, found) for i, each in enumerate(value))
    return found.get(name, value)


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

    Tensors (n, …) are this rank's rows and are gathered; numbers (0-d), such as a learnable scale, and whatever is
    no tensor are passed as they are. Arguments that hold positions in the batch, named by the loss in ``positions``,
    are moved to the rank's place in the whole batch. A ``mask`` of pairs must be one of the whole batch. ``shared``
    names tensors that are the same on all ranks, such as the rows of a memory, and are not gathered.

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
        self.local_loss, self.gather_with_grad, self.ring = local_loss, gather_with_grad, ring
        self.shared = frozenset(shared)
        self._signature = inspect.signature(loss.forward)
        self._said = False
        name, names = type(loss).__name__, self._signature.parameters
        if local_loss and "rows" not in names:
            raise NearfarError(
                f"local_loss=True: {name} cannot be taken apart by rows (its forward has no 'rows'); leave local_loss "
                "out, then every rank computes the whole loss, with the same gradients"
            )
        if local_loss and getattr(loss, "reduction", "mean") == "none":
            raise NearfarError(
                f"local_loss=True adds up the parts of the ranks, and {name} with reduction='none' has one value for "
                "each row; leave local_loss out, then every rank has those of the whole batch"
            )
        if ring:
            check_ring(loss)
        if ring and (local_loss or not gather_with_grad):
            raise NearfarError(
                "ring=True computes the own rows with exact gradients; leave the other options out"
            )
        unknown = sorted(self.shared - names.keys())
        if unknown:
            raise NearfarError(f"shared={unknown}: {name} has no such argument; it takes {', '.join(names)}")

    @property
    def record(self) -> Any:
        """The record of the loss's last call on this rank."""
        return getattr(self.loss, "record", None)

    def describe(self) -> str:
        """What this wrapper does with the processes there are, in one line for the log of a run."""
        ranks = world_size()
        if ranks == 1:
            given = {
                "local_loss": self.local_loss,
                "gather_with_grad": not self.gather_with_grad,
                "ring": self.ring,
            }
            names = [name for name, value in given.items() if value]
            idle = f"; {' and '.join(names)} {'have' if len(names) > 1 else 'has'} no effect" if names else ""
            return f"one process: the loss sees this batch alone{idle}"
        rows = "its own rows against all" if self.local_loss or self.ring else "the whole batch"
        rows += ", a block at a time" if self.ring else ""
        constant = (
            "" if self.gather_with_grad else ", other ranks' rows as constants (gradients are not exact)"
        )
        return f"{ranks} processes: each computes {rows}{constant}"

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, ""]:
        if world_size() == 1:
            if not self._said:
                warnings.warn(self.describe(), stacklevel=2)
                self._said = True
            return self.loss(*args, **kwargs)
        given = self._signature.bind(*args, **kwargs)
        if self.ring:
            return ring_loss(self.loss, given.arguments)
        arguments, own = join_arguments(
            given.arguments,
            positions=getattr(self.loss, "positions", ()),
            shared=self.shared,
            with_grad=self.gather_with_grad,
            # A loss of single rows, such as the distance of two sets of scores, takes as many as it is given.
            paired="rows" in self._signature.parameters,
        )
        given.arguments.update(arguments)
        if not self.local_loss:
            return self.loss(*given.args, **given.kwargs)
        if own.start == own.stop:
            return whole_value(zero_with_grad(arguments.values()))
        given.arguments["rows"] = own
        return whole_value(self.loss(*given.args, **given.kwargs))

    def extra_repr(self) -> str:
        return f"local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad}, ring={self.ring}"
