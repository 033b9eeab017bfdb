"""What the kernels keep to: full precision under autocast, first derivatives, no compilation of their tile loops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch

from nearfar.errors import NearfarError

__all__ = ["computing_dtype", "full_precision", "no_second_derivative", "uncompiled"]

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
