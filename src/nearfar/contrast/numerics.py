"""Rows of unit length and their derivatives; full precision under autocast; what the kernels refuse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nearfar.errors import NearfarError

__all__ = [
    "Context",
    "computing_dtype",
    "embeddings",
    "full_precision",
    "lengths_of",
    "no_second_derivative",
    "through_length_",
    "uncompiled",
    "unit_and_length",
    "unit_rows",
]


#: lengths whose squares neither overflow nor vanish, above this and below its inverse
ORDINARY = 1e-15
#: rows at a time in backward
_PART = 1024


class Context(FunctionCtx):
    """The ``ctx`` of a differentiable function; one that keeps more than tensors for backward derives a class."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    if TYPE_CHECKING:

        def save_for_backward(
            self, *tensors: Tensor | None
        ) -> None: ...  # torch takes None, and does not say so


def unit_rows(x: Float[Tensor, "n d"], name: str | None = None) -> Float[Tensor, "n d"]:
    """Rows brought to unit length, without overflow or underflow on the way; rows of zeros stay zero.

    Their gradient is finite too: that of the identity. With a ``name``, a row that is not finite is an error on the
    CPU.

    >>> unit_rows(torch.tensor([[3e30, 4e30], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    unit: Tensor = _UnitRows.apply(x, name)
    return unit


class _UnitRows(torch.autograd.Function):
    """Keeps the result and the lengths, where plain operations would keep every step between."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, name: str | None) -> Tensor:
        unit, length = unit_and_length(x, name)
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, None]:
        no_second_derivative()  # lengths are kept as numbers
        unit, length = ctx.saved_tensors
        (gradient,) = gradients
        out = torch.empty_like(gradient)
        with full_precision(unit.device):
            for part in _parts(len(unit)):
                own, given = unit[part], gradient[part]
                along = torch.linalg.vecdot(own, given).unsqueeze(1)
                torch.addcmul(given, own, along, value=-1, out=out[part]).div_(length[part])
        return out, None


def unit_and_length(
    x: Float[Tensor, "n d"], name: str | None = None
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n 1"]]:
    """Rows at unit length and the length of each, 1 for a row of zeros. With a ``name``, as ``unit_rows``."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if x.device.type == "cpu" and len(x) and _ordinary(length):
        return x / length, length
    return _any_length(x, name)


def through_length_(
    by_unit: Tensor, rows: Tensor, length: Tensor, factor: Tensor, are_unit: bool = True
) -> Float[Tensor, ""]:
    """Derivatives by unit rows become, in place, ``factor`` times those by the rows themselves.

    Without ``are_unit``, ``rows`` are those themselves. The result is the product of unit rows and derivatives, all
    added up.
    """
    total = by_unit.new_zeros(())
    for part in _parts(len(rows)):
        own, given, long = rows[part], by_unit[part], length[part]
        along = torch.linalg.vecdot(own, given).unsqueeze(1)
        if not are_unit:
            along.div_(long)
        total += along.sum()
        given.addcmul_(own, along if are_unit else along.div_(long), value=-1).mul_(factor / long)
    return total


def lengths_of(x: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"] | None:
    """The length of each row; None where a plain division by it would not do: rows of zeros, of extreme size, on
    a different device."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return length if x.device.type == "cpu" and len(x) and _ordinary(length) else None


def _parts(n: int) -> Iterator[slice]:
    """Some rows at a time: of all at once, a product would be as large as they are."""
    return (slice(start, start + _PART) for start in range(0, n, _PART))


def _ordinary(length: Float[Tensor, "n 1"]) -> bool:
    """Whether no square on the way to these lengths has overflowed or vanished; false for NaN."""
    shortest, longest = torch.aminmax(length)
    return bool(shortest > ORDINARY) and bool(longest < 1.0 / ORDINARY)


def _any_length(x: Float[Tensor, "n d"], name: str | None) -> tuple[Tensor, Tensor]:
    """Unit rows and lengths of rows of any size, by way of their largest number; a row of zeros has length 1."""
    largest = x.abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)
    if name is not None and x.device.type == "cpu" and not bool(largest.isfinite().all()):
        _say_which(x, name)
    largest = torch.where(largest == 0, 1.0, largest)
    unit = x / largest
    length = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    length = torch.where(length == 0, 1.0, length)
    return unit.div_(length), length.mul_(largest)


def embeddings(x: Tensor, name: str, normalize: bool | None, dtype: torch.dtype) -> Float[Tensor, "n d"]:
    """``x`` in the precision of the computation and, if wanted, at unit length; None leaves that to the kernel.

    Raises ``NearfarError`` where it is no matrix and, on the CPU, where a row is not finite. Elsewhere the look would
    make every step wait for the device: the loss is NaN there, and its record says so.
    """
    if x.ndim != 2 or not x.dtype.is_floating_point:
        raise NearfarError(
            f"{name} is {tuple(x.shape)} {x.dtype}; a loss takes a matrix of floating point (rows, dimensions)"
        )
    if x.shape[1] == 0:
        raise NearfarError(f"{name} is {tuple(x.shape)}: rows of no dimension have no similarity")
    x = x.to(dtype)
    if normalize:
        return unit_rows(x, name)
    # A sum is finite only if all its terms are; in double precision, finite terms do not overflow it. Lengths are
    # quicker, and who is not finite is looked at closely anyway.
    whole = torch.linalg.vector_norm(x.detach()) if normalize is None else x.detach().sum(dtype=torch.float64)
    if x.device.type == "cpu" and not whole.isfinite():
        _say_which(x, name)
    return x


def _say_which(x: Tensor, name: str) -> None:
    bad = (~x.detach().isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        raise NearfarError(
            f"{name} is not finite in {len(bad)} of {len(x)} rows (row {shown}): look at what the encoder gives for "
            "them; a learning rate too high or a row of missing input are the usual reasons"
        )


P = ParamSpec("P")
R = TypeVar("R")


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: it would take the products in half precision, where scores of 1 / 0.001 have steps of a half."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def computing_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The widest of these, and float32 at least.

    >>> computing_dtype(torch.ones(1, dtype=torch.float16))
    torch.float32
    """
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def no_second_derivative() -> None:
    """Raise where a backward is asked for a graph of itself."""
    if torch.is_grad_enabled():
        raise NearfarError(
            "nearfar's losses give first derivatives only, which their kernels write down themselves. For a second "
            "derivative (create_graph=True, gradient penalties) write the loss with plain operations, such as "
            "torch.nn.functional.cross_entropy(a @ b.T * scale, torch.arange(len(a)))"
        )


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Leave a function out of ``torch.compile``: the graph ends before it and goes on behind it.

    As ``torch.compiler.disable``, which however loads the compiler where it decorates (seconds at import) and costs
    more at each call than the losses of a small batch.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            eager: Callable[P, R] = torch.compiler.disable(function)
            return eager(*args, **kwargs)
        return function(*args, **kwargs)

    return call
