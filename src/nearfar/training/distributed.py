"""A loss over the batches of all ranks: the gradients of one process with the whole batch, on several.

Losses know nothing of ranks. ``DistributedLoss`` brings them the rows of all ranks (``nearfar.training.gather``), and
sees to it that what DistributedDataParallel makes of the ranks' gradients, their mean, is the gradient of the loss
of the whole batch.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from nearfar.errors import NearfarError
from nearfar.training.gather import whole_value, world_size
from nearfar.training.rank_arguments import join_arguments, nothing
from nearfar.training.ring import check_ring, ring_loss

__all__ = ["DistributedLoss"]


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
            return whole_value(nothing(arguments.values()))
        given.arguments["rows"] = own
        return whole_value(self.loss(*given.args, **given.kwargs))

    def extra_repr(self) -> str:
        return f"local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad}, ring={self.ring}"
