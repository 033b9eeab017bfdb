"""One training step on several processes: each encodes its rows, and the loss sees those of all.

Every rank has the whole batch of the sampler, as one process would, so that augmentation, labels and masks are those of
one process. It encodes its own part, the embeddings are gathered, and ``System.loss_of`` is called with the
embeddings and the batch of all rows: a system needs no code for it. What DistributedDataParallel makes of the ranks'
gradients, their mean, is then the gradient of one process (``nearfar.training.gather``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from nearfar.config.training import RunOptions
from nearfar.errors import NearfarError
from nearfar.losses.base import traits_of
from nearfar.training import ranks
from nearfar.training.distributed import DistributedLoss, SharingOptions
from nearfar.training.gather import gather_rows, row_counts
from nearfar.training.grad_cache import cached_embeddings
from nearfar.training.system import Embeddings, StepOutput, System

__all__ = ["Sharing", "check_shared"]


@dataclass(frozen=True)
class Sharing(SharingOptions):
    """How the processes of a run share out a batch: the options of ``trainer`` by the names of ``SharingOptions``."""

    @classmethod
    def of(cls, config: RunOptions) -> Sharing:
        """From a run's configuration."""
        settings = config.trainer
        return cls(
            settings.local_loss,
            settings.gather_with_grad,
            settings.ring,
        )

    @property
    def describes_own_rows(self) -> bool:
        """Whether the loss's record describes a rank's rows, not those of the batch."""
        return ranks.count() > 1 and (self.local_loss or self.ring)

    def describe(self, batch_size: int | None) -> str | None:
        """What several processes do, in one line for the first lines of a run; of one, which options do nothing."""
        world = ranks.count()
        if world == 1:
            without_effect = self.without_effect()
            return f"one process: {without_effect}" if without_effect else None
        rows = "" if batch_size is None else f" of {batch_size} rows, {-(-batch_size // world)} in each"
        how = "every process computes the whole loss"
        if self.local_loss:
            how = "every process computes the loss of its rows against all (local_loss)"
        if self.ring:
            how = "embeddings pass from process to process (ring)"
        exact = "" if self.gather_with_grad else "; gradients are not exact (gather_with_grad=false)"
        return f"{world} processes share every batch{rows}; {how}{exact}"

    def rows_of(self, rows: int, rank: int) -> int:
        """How many rows of a batch of ``rows`` are those of ``rank``.

        >>> [Sharing().rows_of(5, rank) for rank in range(1)]
        [5]
        """
        size = -(-rows // ranks.count())
        return max(0, min(size, rows - rank * size))

    def step(
        self, system: System, model: nn.Module, batch: object, rows: int, chunk: int | None = None
    ) -> StepOutput:
        """The loss of a batch of ``rows`` rows, ``chunk`` of them encoded at a time; every rank calls it together."""
        parts = system.split(batch, -(-rows // ranks.count()))
        here = ranks.rank() < len(parts)
        # A rank without rows encodes some of another's and keeps none: its weights get gradients of 0, for which
        # DistributedDataParallel would otherwise wait.
        part = parts[ranks.rank()] if here else parts[0]
        if chunk is None:
            own = system.encode(model, part)
        else:
            own = cached_embeddings(lambda some: system.encode(model, some), system.split(part, chunk), model)
        if not here:
            own = pytree.tree_map_only(Tensor, lambda tensor: tensor[:0], own)
        if self.ring and len(parts) < ranks.count():
            raise NearfarError(
                f"trainer.ring=true: a batch has rows for {len(parts)} of the {ranks.count()} processes. Take a "
                "batch_size that leaves no such rest, or trainer.local_loss=true instead."
            )
        # In the ring a process holds its own rows alone, and so does the batch that the loss sees.
        embeddings, counts = (own, []) if self.ring else _gathered(own, self.gather_with_grad)
        losses = losses_of(system) if self.local_loss or self.ring else []
        values: list[Tensor] = []

        def around(loss: nn.Module) -> Callable[..., Tensor]:
            forward, signature = loss.forward, inspect.signature(loss.forward)

            def shared(*args: object, **kwargs: object) -> Tensor:
                given = signature.bind(*args, **kwargs)
                here = slice(0) if self.ring else self._share(len(given.args[0]), counts)
                values.append(self.value(loss, forward, given, here))
                return values[-1]

            return shared

        with _replaced(losses, around):
            output: StepOutput = system.loss_of(model, embeddings, part if self.ring else batch)
        if self.ring and (len(values) != 1 or output.loss is not values[0]):
            raise NearfarError(
                f"trainer.ring=true: the loss of system '{system.name}' is more than one contrastive loss, and the "
                "rest of it would see the rows of one process alone; use trainer.local_loss=true."
            )
        return output

    def _share(self, rows: int, counts: list[int]) -> slice:
        """This process's part of the rows that a loss is called with: its own, where they are those of the batch."""
        own, world = ranks.rank(), ranks.count()
        if rows == sum(counts):
            return slice(sum(counts[:own]), sum(counts[: own + 1]))
        if not self.gather_with_grad:
            raise NearfarError(
                f"trainer.gather_with_grad=false: a loss gets {rows} rows of a batch of {sum(counts)}, so that it does "
                "not show which are this process's; leave it true."
            )
        return slice(rows * own // world, rows * (own + 1) // world)


def losses_of(system: System) -> list[nn.Module]:
    """The losses that ``system`` holds and that can be taken apart by rows."""
    parts = [part for part in vars(system).values() if isinstance(part, nn.Module)]
    every = dict.fromkeys(module for part in parts for module in part.modules())
    return [module for module in every if traits_of(module).local is not None]


@contextmanager
def _replaced(
    losses: Sequence[nn.Module], make: Callable[[nn.Module], Callable[..., Tensor]]
) -> Iterator[None]:
    """A different ``forward`` for some modules while a step runs; a probe gets their own."""
    for loss in losses:
        loss.__dict__["forward"] = make(loss)
    try:
        yield
    finally:
        for loss in losses:
            loss.__dict__.pop("forward", None)


def _gathered(own: object, with_grad: bool) -> tuple[Embeddings, list[int]]:
    """Embeddings of all ranks in the form of those of one, and how many rows of the first each rank has."""
    leaves, form = pytree.tree_flatten(own)
    wrong = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)]
    if wrong or not leaves:
        raise NearfarError(
            f"encode gives {wrong[0] if wrong else 'nothing'}; embeddings are tensors (rows, …), alone or several"
        )
    named = {f"embedding {i}": leaf for i, leaf in enumerate(leaves)}
    counts = row_counts(named)
    whole = [gather_rows(leaf, counts[name], with_grad) for name, leaf in named.items()]
    return pytree.tree_unflatten(whole, form), counts["embedding 0"]


def check_shared(system: System, model: nn.Module, sharing: Sharing) -> None:
    """Refuse, with words, what several processes would not compute as one does."""
    if ranks.count() == 1:
        return
    if not system.defines("encode"):
        raise NearfarError(
            f"system '{system.name}' does not encode its rows one by one (it defines no encode), so that its "
            "batches cannot be shared out between processes; set trainer.devices=1."
        )
    if system.defines("training_step"):
        raise NearfarError(
            f"system '{system.name}' has a training_step of its own, which sees the rows of one process alone; set "
            "trainer.devices=1."
        )
    layers = [
        name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training
    ]
    if layers:
        raise NearfarError(
            f"{len(layers)} layers normalise by the statistics of the batch ({layers[0]}, …), and a process sees its "
            "own rows alone: they would not train as in one process. Freeze these layers, take an encoder with a "
            "different normalisation, or set trainer.devices=1."
        )
    wrapped = [part for part in vars(system).values() if isinstance(part, DistributedLoss)]
    if wrapped:
        raise NearfarError(
            f"system '{system.name}' wraps its loss in DistributedLoss, and would gather rows that are gathered "
            "already: let it hold the loss itself."
        )
    sharing.check("trainer.", "true")
    if not (sharing.local_loss or sharing.ring):
        return
    losses = losses_of(system)
    if not losses:
        option = "ring" if sharing.ring else "local_loss"
        raise NearfarError(
            f"trainer.{option}=true: system '{system.name}' holds no loss that can be taken apart by rows; set it to "
            "false, then every process computes the whole loss, with the same gradients."
        )
    for loss in losses:
        sharing.check_loss(loss, "trainer.", "true")
