"""Embeddings that can be cut: one loss at several lengths, from one pass of the encoder (Kusupati et al. 2022)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from nearfar.arguments import entries, number, text, whole_number
from nearfar.errors import NearfarError
from nearfar.losses.base import LossTraits, Record
from nearfar.losses.objective import Objective

__all__ = ["MatryoshkaLoss", "check_lengths", "term_name"]

#: arguments of the losses here that are embeddings
EMBEDDINGS = ("a", "b", "z", "other", "image", "text", "negatives", "memory")


def check_lengths(name: str, lengths: object) -> list[int]:
    """Lengths of embeddings, ascending; ``NearfarError`` for none, for one twice, and for what is no length.

    >>> check_lengths("dims", [64, 16])
    [16, 64]
    """
    given = sorted(whole_number(f"an entry of {name}", each, 1) for each in entries(name, lengths))
    if not given:
        raise NearfarError(f"{name} is empty; lengths of embeddings are needed, such as [64, 128, 256]")
    if len(set(given)) != len(given):
        raise NearfarError(f"{name} is {given}: a length is named twice")
    return given


def term_name(length: int) -> str:
    """What a length is called as a term.

    >>> term_name(64)
    'dim64'
    """
    return f"dim{length}"


class MatryoshkaLoss(nn.Module):
    """Σ_d w_d · loss of the first d numbers of every embedding (Kusupati et al. 2022, arXiv:2205.13147).

    Every prefix becomes an embedding of its own: the loss brings it to unit length. The encoder runs once; each length
    costs its own pass of the loss.

    Args:
        loss: any loss of embeddings; it is called with the arguments of this one.
        dims: the lengths, in any order. The whole length is one only if it is named.
        weights: of each length; None: 1 each, so that the loss is a sum, as sentence-transformers has it.
        embeddings: names of the arguments that are embeddings and are cut; None: those of the losses here.

    ``record`` is that of the longest, ``records`` of all lengths, and ``objective.record`` holds values and weights by
    the names ``dim64``, ….

    >>> import torch
    >>> from nearfar.losses import InfoNCELoss
    >>> loss = MatryoshkaLoss(InfoNCELoss(), [2, 4])
    >>> a, b = torch.eye(4), torch.eye(4).roll(1, 0)
    >>> whole = InfoNCELoss()(a, b) + InfoNCELoss()(a[:, :2], b[:, :2])
    >>> torch.equal(loss(a, b), whole), list(loss.objective.record.raw), loss.record.candidates
    (True, ['dim2', 'dim4'], 4.0)
    """

    #: it is made of one loss, which has traits of its own and is what several processes take apart
    traits: ClassVar[LossTraits] = LossTraits()

    def __init__(
        self,
        loss: nn.Module,
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
        embeddings: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise NearfarError(
                f"loss is a {type(loss).__name__}; a loss of nearfar.losses is needed, such as InfoNCELoss()"
            )
        self.dims = check_lengths("dims", dims)
        given = [1.0] * len(self.dims)
        if weights is not None:
            given = [number("an entry of weights", each, 0.0) for each in entries("weights", weights)]
        if len(given) != len(self.dims):
            raise NearfarError(
                f"weights are {len(given)} and dims {len(self.dims)}; one for each length is needed"
            )
        order = sorted(range(len(given)), key=lambda k: entries("dims", dims)[k])
        self.loss = loss
        self.objective = Objective({term_name(d): given[k] for d, k in zip(self.dims, order, strict=True)})
        self._signature = inspect.signature(loss.forward)
        known = list(self._signature.parameters)
        names: Sequence[str] = EMBEDDINGS
        if embeddings is not None:
            names = [text("an entry of embeddings", each) for each in entries("embeddings", embeddings)]
        if embeddings is not None and not set(names) <= set(known):
            raise NearfarError(
                f"embeddings are {list(names)}; {type(loss).__name__} takes {', '.join(known)}"
            )
        self.embeddings = tuple(name for name in known if name in names)
        if not self.embeddings:
            raise NearfarError(
                f"{type(loss).__name__} takes {', '.join(known)}; name those that are embeddings with embeddings="
            )
        self.records: dict[str, Record | None] = {}

    @property
    def record(self) -> Record | None:
        """The record of the longest."""
        return getattr(self.loss, "record", None)

    def forward(self, *args: object, **kwargs: object) -> Float[Tensor, ""]:
        given = self._signature.bind(*args, **kwargs)
        values: dict[str, Tensor] = {}
        self.records = {}
        for length in self.dims:
            cut = {
                name: _first(name, value, length) if name in self.embeddings else value
                for name, value in given.arguments.items()
            }
            call = inspect.BoundArguments(self._signature, cut)
            values[term_name(length)] = self.loss(*call.args, **call.kwargs)
            self.records[term_name(length)] = self.record
        total: Tensor = self.objective(values)
        return total


def _first(name: str, value: object, length: int) -> object:
    """The first numbers of an embedding, or of several."""
    if isinstance(value, (tuple, list)):
        return type(value)(_first(name, each, length) for each in value)
    if not isinstance(value, Tensor) or not value.ndim:  # the loss says what is wrong with it
        return value
    if value.shape[-1] < length:
        raise NearfarError(
            f"{name} is {tuple(value.shape)}, and dims names a length of {length}; take lengths up to {value.shape[-1]}"
        )
    return value[..., :length]
