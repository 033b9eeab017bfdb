"""Batches of named fields, and the dataset that hands them out: the same for every system.

What a tower reads of a view is an ``Inputs`` object: the arrays of a whole split, from which ``batch`` takes the rows
of one batch. A dataset holds one for each field and makes whole batches of them by index operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "Augment",
    "Batch",
    "Draw",
    "Field",
    "Inputs",
    "ItemDataset",
    "Partial",
    "Pixels",
    "Rows",
    "one_after_another",
]

Self = TypeVar("Self")


class Field(Protocol):
    """The rows of a batch under one name: a tensor, or an object that moves and splits like one (tokens, graphs)."""

    def __len__(self) -> int: ...

    def to(self: Self, device: torch.device | str, *, non_blocking: bool = False) -> Self: ...

    def pin_memory(self: Self) -> Self: ...

    def split(self: Self, rows: int) -> Sequence[Self]: ...


class Inputs(Protocol):
    """What a tower reads of the values of a split: arrays, from which the rows of a batch are taken."""

    def __len__(self) -> int: ...

    def batch(self, positions: Int[Tensor, " b"]) -> Field:
        """The rows at these positions, in this order."""
        ...


class Rows:
    """Inputs that are the rows of an array: numbers, frozen features, labels.

    >>> Rows(np.arange(6.0).reshape(3, 2)).batch(torch.tensor([2, 0])).tolist()
    [[4.0, 5.0], [0.0, 1.0]]
    """

    def __init__(self, values: Shaped[np.ndarray, "n ..."] | Shaped[Tensor, "n ..."]) -> None:
        self.values = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, positions: Int[Tensor, " b"]) -> Tensor:
        return self.values.index_select(0, positions)  # half the time of values[positions]


class Pixels:
    """Inputs that are pictures (n, h, w, 3) of uint8, also mapped from disk; batches hold them as (b, 3, h, w)."""

    def __init__(self, pictures: Shaped[np.ndarray, "n h w 3"]) -> None:
        if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
            raise NearfarError(
                f"pictures are {pictures.dtype} {pictures.shape}; (n, height, width, 3) of uint8 is needed"
            )
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, positions: Int[Tensor, " b"]) -> Tensor:
        chosen = np.asarray(self.pictures[positions.numpy()])
        return torch.from_numpy(np.ascontiguousarray(chosen.transpose(0, 3, 1, 2)))


@dataclass(frozen=True)
class Batch:
    """One batch: ``positions`` of its rows in the split, and named fields in their order.

    ``batch[name]`` is a field, ``batch.tensor(name)`` one that has to be a tensor; an unknown name is an error that
    names the fields that are there.

    >>> batch = Batch(torch.tensor([4, 7, 9]), {"x": torch.eye(3), "label": torch.tensor([0, 1, 0])})
    >>> len(batch), [len(part) for part in batch.split(2)], "y" in batch
    (3, [2, 1], False)
    """

    positions: Int[Tensor, " b"]
    fields: Mapping[str, Field]

    def __len__(self) -> int:
        return len(self.positions)

    def __contains__(self, name: object) -> bool:
        return name in self.fields

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __getitem__(self, name: str) -> Field:
        try:
            return self.fields[name]
        except KeyError:
            raise NearfarError(f"this batch has no '{name}': {nearest_name(name, self.fields)}") from None

    def tensor(self, name: str) -> Tensor:
        """The field of that name, which has to be a tensor."""
        field = self[name]
        if not isinstance(field, Tensor):
            raise NearfarError(f"'{name}' of this batch is a {type(field).__name__} and no tensor")
        return field

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Every field on a different device."""
        return Batch(
            self.positions.to(device, non_blocking=non_blocking),
            {name: field.to(device, non_blocking=non_blocking) for name, field in self.fields.items()},
        )

    def pin_memory(self) -> Batch:
        """Every field in pinned memory, from which copies to a GPU need not wait."""
        return Batch(
            self.positions.pin_memory(), {name: field.pin_memory() for name, field in self.fields.items()}
        )

    def split(self, rows: int) -> list[Batch]:
        """The batch in parts of at most ``rows`` rows, in order."""
        positions = self.positions.split(rows)
        parts = {name: field.split(rows) for name, field in self.fields.items()}
        return [
            Batch(own, {name: pieces[i] for name, pieces in parts.items()}) for i, own in enumerate(positions)
        ]

    def replaced(self, **fields: Field) -> Batch:
        """The batch with some fields changed or added."""
        return replace(self, fields={**self.fields, **fields})


@dataclass(frozen=True)
class Draw:
    """Where the randomness of a batch comes from: (seed, epoch, first position) and nothing else.

    So a batch is augmented in the same way in every loader process, and in a resumed run.

    >>> [int(Draw(0, 1, 5).numpy().integers(100)) for _ in range(2)] == 2 * [int(Draw(0, 1, 5).numpy().integers(100))]
    True
    """

    seed: int
    epoch: int
    first: int

    def numpy(self) -> np.random.Generator:
        """A new NumPy generator."""
        return np.random.default_rng([self.seed, self.epoch, self.first])

    def torch(self) -> torch.Generator:
        """A new PyTorch generator on the CPU."""
        entropy = np.random.SeedSequence((self.seed, self.epoch, self.first))
        return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


#: changes a batch of the training split: crops, masked atoms, a second view
Augment = Callable[[Batch, Draw], Batch]


def one_after_another(changes: Sequence[Augment]) -> Augment:
    """Several augmentations as one; each draws from the same `Draw`."""

    def augment(batch: Batch, draw: Draw) -> Batch:
        for change in changes:
            batch = change(batch, draw)
        return batch

    return changes[0] if len(changes) == 1 else augment


class ItemDataset(Dataset[Batch]):
    """The items of a split as named inputs; ``__getitems__`` gives a whole `Batch`.

    Use it with ``DataLoader(dataset, batch_sampler=…, collate_fn=lambda batch: batch)``.

    Args:
        inputs: what each field of a batch is taken from, all of the same length: `Rows`, `Pixels`, or any object with
            ``__len__`` and ``batch(positions)``.
        augment: changes every batch, with a `Draw`; None for a split that is only evaluated.
        seed: of the augmentation.

    Augmentation depends on (seed, epoch, first position of the batch) alone. Call ``set_epoch`` before each epoch; the
    epoch lies in shared memory, so that the processes of a loader see it.

    >>> data = ItemDataset({"x": Rows(np.eye(3)), "label": Rows(np.array([5, 6, 7]))})
    >>> data.__getitems__([2, 0]).tensor("label").tolist()
    [7, 5]
    """

    def __init__(self, inputs: Mapping[str, Inputs], augment: Augment | None = None, seed: int = 0) -> None:
        if not inputs:
            raise NearfarError("a dataset needs at least one field")
        sizes = {name: len(part) for name, part in inputs.items()}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise NearfarError(f"the fields of a dataset have different numbers of rows: {listed}")
        self.inputs = dict(inputs)
        self.augment, self.seed = augment, seed
        self._size = next(iter(sizes.values()))
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self._size

    @property
    def epoch(self) -> int:
        """The epoch whose augmentation is drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's augmentation."""
        self._epoch.fill_(epoch)

    def tensor(self, name: str) -> Tensor:
        """All rows of a field that consists of `Rows`."""
        part = self.inputs.get(name)
        if not isinstance(part, Rows):
            raise NearfarError(
                f"'{name}' of this dataset is "
                + ("missing" if part is None else f"a {type(part).__name__}")
                + ", and rows of numbers are needed"
            )
        return part.values

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        at = torch.as_tensor(positions, dtype=torch.int64)
        batch = Batch(at, {name: part.batch(at) for name, part in self.inputs.items()})
        if self.augment is None or not len(at):
            return batch
        return self.augment(batch, Draw(self.seed, self.epoch, int(at[0])))


def present_rows(present: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """For each item its row among those that have a value, and 0 where it has none.

    >>> present_rows(np.array([True, False, True])).tolist()
    [0, 0, 1]
    """
    return np.where(present, np.cumsum(present) - 1, 0)


class Partial:
    """Inputs of a view that some items lack: those have the rows of some other item, and are marked by ``present``.

    Where no item of a split has the view, rows of numbers are 0.

    >>> Partial(Rows(np.array([[5.0], [7.0]])), np.array([False, True, True])).batch(torch.tensor([2, 0])).tolist()
    [[7.0], [5.0]]
    """

    def __init__(self, inputs: Inputs, present: Bool[np.ndarray, " n"]) -> None:
        if int(present.sum()) != len(inputs):
            raise NearfarError(f"{int(present.sum())} items have this view, and there are {len(inputs)} rows")
        if not len(inputs) and isinstance(inputs, Rows):
            inputs = Rows(inputs.values.new_zeros(1, *inputs.values.shape[1:]))
        self.inputs = inputs
        self.present = torch.from_numpy(present)
        self._rows = torch.from_numpy(present_rows(present))

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, positions: Int[Tensor, " b"]) -> Field:
        return self.inputs.batch(self._rows[positions])
