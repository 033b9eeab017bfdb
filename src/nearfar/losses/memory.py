"""Embeddings of earlier batches, kept as further negatives."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearfar.arguments import flag, whole_number
from nearfar.errors import NearfarError
from nearfar.labels import apart, whole_labels
from nearfar.losses.arguments import check_tensors

__all__ = ["CrossBatchMemory"]


class CrossBatchMemory(nn.Module):
    """The last ``size`` embeddings that were pushed: negatives without encoding anything (XBM, Wang et al. 2020).

    Encoders move slowly, so that the rows of a few steps ago still say where an item lies. With rows from an
    encoder of moving averages this is the queue of MoCo (He et al. 2020).

    ``dim`` is the length of an embedding, ``ids=True`` keeps a whole number with each row: what tells rows that are
    no negatives of each other, such as the class or the number of the item, −1 where it is not known.

    After each step ``push`` the batch; ``rows()`` are the negatives of the next one, without a gradient. A row is
    handed out only after it was pushed: a new memory has none, ``(0, dim)``. Everything is in the state, so that a
    resumed run goes on with the same rows. Move it with ``.to(device)``; ``.half()`` halves what it takes.

    With several processes each must push the same rows (``nearfar.training.gather``), because
    DistributedDataParallel sends the buffers of its first rank to all.

    Sources: Wang, Zhang, Huang and Scott, "Cross-Batch Memory for Embedding Learning", CVPR 2020; He, Fan, Wu, Xie
    and Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020.

    >>> memory = CrossBatchMemory(size=3, dim=2, ids=True)
    >>> memory.rows().shape
    torch.Size([0, 2])
    >>> memory.push(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([1, 2]))
    >>> memory.push(torch.tensor([[3.0, 3.0], [4.0, 4.0]]), torch.tensor([3, 4]))
    >>> memory.ids(), memory.age()
    (tensor([4, 2, 3]), tensor([1, 2, 1]))
    >>> memory.same(torch.tensor([2, 7]))
    tensor([[False,  True, False],
            [False, False, False]])
    """

    _rows: Tensor
    _ids: Tensor | None
    _born: Tensor

    def __init__(self, size: int, dim: int, ids: bool = False) -> None:
        super().__init__()
        size, dim = whole_number("size", size, 1), whole_number("dim", dim, 1)
        ids = flag("ids", ids)
        self.size, self.dim = size, dim
        self.register_buffer("_rows", torch.zeros(size, dim))
        self.register_buffer("_ids", torch.zeros(size, dtype=torch.int64) if ids else None)
        self.register_buffer("_born", torch.zeros(size, dtype=torch.int64))
        # Counted on the host: a slice whose length lies on a device would wait for it in every step.
        self._pushed, self._steps = 0, 0

    @property
    def filled(self) -> int:
        """How many rows there are by now, at most ``size``."""
        return min(self._pushed, self.size)

    @property
    def pointer(self) -> int:
        """Where the next row will be written."""
        return self._pushed % self.size

    @torch.no_grad()
    def push(self, features: Float[Tensor, "n d"], ids: Int[Tensor, " n"] | None = None) -> None:
        """Keep these rows in place of the oldest, without their gradient; of more than ``size`` rows the last.

        Raises ``NearfarError`` for a wrong shape, for ``ids`` that are missing or not expected, and, on the CPU, for
        rows that are not finite or too large for the memory's type: they would spoil the loss of many steps.
        """
        check_tensors(features=features)
        if features.ndim != 2 or features.shape[1] != self.dim or not features.is_floating_point():
            raise NearfarError(
                f"features are {tuple(features.shape)} {features.dtype}; this memory keeps rows (n, {self.dim}) of "
                "floating point"
            )
        if (ids is None) != (self._ids is None):
            raise NearfarError(
                "this memory keeps ids, and none were pushed"
                if ids is None
                else "this memory keeps no ids; make it with CrossBatchMemory(…, ids=True)"
            )
        if ids is not None:
            ids = whole_labels(ids, "ids")
            if ids.shape != features.shape[:1]:
                raise NearfarError(
                    f"ids are {tuple(ids.shape)} {ids.dtype}; {len(features)} rows need one whole number each"
                )
        if features.device.type == "cpu" and not features.isfinite().all():
            bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
            raise NearfarError(
                f"features are not finite in {len(bad)} of {len(features)} rows, first in row {bad[0]}"
            )
        narrow = features.to(self._rows.dtype)
        if features.device.type == "cpu" and narrow is not features and not narrow.isfinite().all():
            raise NearfarError(
                f"features reach {features.abs().max().item():g}, more than the {self._rows.dtype} of this memory "
                "holds; normalise them, or keep the memory in torch.bfloat16 or torch.float32"
            )
        kept = min(len(features), self.size)
        start = (self._pushed + len(features) - kept) % self.size
        first = min(kept, self.size - start)
        born = torch.full((kept,), self._steps)
        for store, new in ((self._rows, narrow), (self._ids, ids), (self._born, born)):
            if store is not None and new is not None:
                new = new[len(new) - kept :].detach()
                store[start : start + first] = new[:first].to(store.device, store.dtype)
                store[: kept - first] = new[first:].to(store.device, store.dtype)
        self._pushed += len(features)
        self._steps += 1

    def clear(self) -> None:
        """Forget all rows."""
        for store in (self._rows, self._ids, self._born):
            if store is not None:
                store.zero_()
        self._pushed, self._steps = 0, 0

    def rows(self) -> Float[Tensor, "filled d"]:
        """The rows in the order of their places, which is that of ``ids`` and ``age``; not by age.

        A copy: a push between a loss and its backward must not change what the loss saw.
        """
        return self._rows[: self.filled].clone()

    def ids(self) -> Int[Tensor, " filled"]:
        """The id of each row."""
        if self._ids is None:
            raise NearfarError("this memory keeps no ids; make it with CrossBatchMemory(…, ids=True)")
        return self._ids[: self.filled].clone()

    def age(self) -> Int[Tensor, " filled"]:
        """How many pushes ago each row came, from 1; in steps, that is how old the encoder is that made it."""
        return self._steps - self._born[: self.filled]

    def same(self, ids: Int[Tensor, " n"]) -> Bool[Tensor, "n filled"]:
        """True where a row of the memory has the id of a query, so that it is no negative of it.

        An id that is missing (−1) equals no other, so that the row stays a negative.
        """
        ids = whole_labels(ids, "ids")
        if ids.ndim != 1:
            raise NearfarError(
                f"ids have shape {tuple(ids.shape)}; one whole number for each query is needed"
            )
        return apart(ids)[:, None] == self.ids().to(ids.device)[None, :]

    def get_extra_state(self) -> Tensor:
        """The rows and the steps counted so far: pointer, fill level and ages follow from them."""
        return torch.tensor([self._pushed, self._steps])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on counting from a saved state."""
        self._pushed, self._steps = (int(count) for count in state)

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, ids={self._ids is not None}, filled={self.filled}"
