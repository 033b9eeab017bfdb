"""A second device without a card: real numbers in the CPU's memory, under the rules of a GPU.

``card()`` registers PyTorch's open slot for devices of one's own (``PrivateUse1``) with kernels that compute on the
CPU. What a GPU refuses is refused here: operations on tensors of two devices (but for one number beside a tensor, and
copies), and ``.numpy()``. What makes the host wait for a GPU is listed by name in ``Card.waits``: reading a number,
results whose size depends on values, Boolean indices, copies to the CPU. Registering is for the whole process, so use
it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "card"
#: operations that may take tensors of two devices, as on a GPU
CROSSING = {"copy_", "_to_copy", "_copy_from", "set_"}
#: operations whose result the host must see before it goes on
WAITING = {
    "_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "unique_consecutive", "masked_select", "equal",
    "is_nonzero", "repeat_interleave",
}  # fmt: skip


#: operations that take positions, or flags whose count the host would have to know
INDEXED = {"index", "index_put_", "_index_put_impl_"}


class OnCard(Tensor):
    """A tensor that says it is on the card; ``inner`` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCard:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        tensor.inner = inner
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.inner})"

    def tolist(self) -> Any:
        # Written in C++ for PyTorch's own tensors alone.
        if Card.active is not None:
            Card.active.waits.append("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, None)


class Card(TorchDispatchMode):
    """Operations in this context see the card; ``waits`` are those for which the host waited."""

    active: ClassVar[Card | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __enter__(self) -> Self:
        Card.active = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        Card.active = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self)


def _run(func: Any, args: Any, kwargs: Any, mode: Card | None) -> Any:
    flat: list[Tensor] = []
    plain = _inside(args, flat), {key: _inside(value, flat) for key, value in kwargs.items()}
    ours = [leaf for leaf in flat if type(leaf) is OnCard]
    wanted = kwargs.get("device")
    to_card = wanted is None or torch.device(wanted).type == NAME
    if not ours and (wanted is None or not to_card):
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    if ours and name not in CROSSING:
        others = [leaf for leaf in flat if type(leaf) is not OnCard]
        strange = [tuple(leaf.shape) for leaf in others if leaf.ndim or leaf.requires_grad]
        if strange:
            raise RuntimeError(f"{name}: tensors on the card and on the CPU, {strange}")
    leaves = name == "copy_" and type(args[0]) is not OnCard
    if mode is not None:
        by_flags = name in INDEXED and any(each.dtype == torch.bool for each in ours[1:])
        if name in WAITING or by_flags or leaves or not to_card:
            mode.waits.append(name)
    if wanted is not None:
        plain[1]["device"] = torch.device("cpu")
        plain[1].pop("pin_memory", None)
    result = func(*plain[0], **plain[1])
    if leaves:
        return args[0]
    if not to_card:
        return result
    known = {id(leaf.inner): leaf for leaf in ours}  # what an operation wrote into is given back as it came
    return _outside(result, known)


def _inside(value: Any, tensors: list[Tensor]) -> Any:
    """Arguments with the numbers of the card's tensors; all tensors are noted down."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.inner if type(value) is OnCard else value
    if isinstance(value, (list, tuple)):
        return type(value)([_inside(each, tensors) for each in value])
    return value


def _outside(value: Any, known: dict[int, OnCard]) -> Any:
    """Results as tensors of the card."""
    if isinstance(value, Tensor):
        return known[id(value)] if id(value) in known else OnCard(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_outside(each, known) for each in value])
    return value


class _Module(_DummyBackendModule):
    """``torch.card``, which autocast asks for what it may cast to."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_KEPT: list[torch.library.Library] = []


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
    return OnCard(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, dtype: Any = None, **_: Any) -> Tensor:
    return OnCard(torch.empty(size, dtype=dtype))


def _copy_from(source: Tensor, into: Tensor, non_blocking: bool = False) -> Tensor:
    for each in (source, into):
        if not isinstance(each, OnCard) and each.device.type != "cpu":
            raise RuntimeError(f"a copy to or from {each.device}")
    numbers, place = (each.inner if isinstance(each, OnCard) else each for each in (source, into))
    place.copy_(numbers)
    return into


def register() -> None:
    """Add the device to this process, before its first backward: autograd counts devices once."""
    if torch._C._get_privateuse1_backend_name() == NAME:
        return
    _setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("aten", "IMPL")  # what PyTorch itself allocates, below any mode
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _KEPT.append(library)


@contextmanager
def card() -> Iterator[Card]:
    """The second device in use."""
    register()
    with Card() as mode:
        yield mode
