"""Which kernel computes the log-sums on a card: PyTorch's operations tile by tile, or the fused one of Triton.

Which is faster depends on the card, the sizes and the precision, so nothing is assumed: the fused kernel is taken where
a measurement on this card, in this process, has found it faster (``measure_kernels``), and before there is one the
path is that of PyTorch's operations. Both give the same numbers to the last few digits.

``use_kernel("measure")``, or the environment variable ``NEARFAR_KERNEL=measure``, measures by itself, once for every
new kind of batch (some seconds, most of them for compiling); "fused" takes the fused kernel wherever it can be taken,
"torch" nowhere.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from nearfar.arguments import choice
from nearfar.contrast.fused import fused_results, has_triton, reason_against
from nearfar.contrast.kernel import LogSums
from nearfar.contrast.running_sums import Statistics
from nearfar.contrast.targets import OwnPair
from nearfar.contrast.tiles import Setting, tile_size
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from nearfar.contrast.triton_kernels import Blocks

__all__ = ["KERNELS", "KernelTime", "forget_measurements", "fused_blocks", "measure_kernels", "use_kernel"]

KERNELS = ("auto", "measure", "fused", "torch")
Kernel = Literal["auto", "measure", "fused", "torch"]
#: steps of each way in a measurement, of which the quickest counts
REPEATS = 5


class _Kind(NamedTuple):
    """Batches that one measurement stands for: a card, a precision, directions, whether PyTorch's operations need a
    running maximum (``Setting.bounded``), and sizes to the nearest power of 2."""

    card: str
    half: bool
    both: bool
    bounded: bool
    rows: int
    dimensions: int

    @classmethod
    def of(cls, n: int, m: int, d: int, half: bool, setting: Setting, device: torch.device) -> _Kind:
        rows, dimensions = round(math.log2(n * m) / 2), round(math.log2(d))
        return cls(_card(device), half, setting.both, setting.bounded, rows, dimensions)


class KernelTime(NamedTuple):
    """Seconds of forward and backward on a card with either kernel; ``blocks`` are the best tiles of the fused one.

    ``reason``: why the fused one was not measured, "" where it was; its time is infinite then.
    """

    card: str
    rows: int
    dimensions: int
    dtype: str
    both: bool
    learned_scale: bool
    torch_seconds: float
    fused_seconds: float
    blocks: Blocks | None
    reason: str = ""

    @property
    def faster(self) -> bool:
        """Whether the fused kernel is the faster one."""
        return self.fused_seconds < self.torch_seconds


_wanted: list[str] = []
_measured: dict[_Kind, KernelTime] = {}


def use_kernel(kernel: Kernel | None = None) -> str:
    """Set the kernel for this process, or ask for it; returns what is set.

    "auto" (default): the fused one where ``measure_kernels`` has found it faster, else PyTorch's operations.
    "measure": the same, and what has not been measured is. "fused": wherever it can be taken. "torch": nowhere.
    The environment variable ``NEARFAR_KERNEL`` is the default of a process.

    >>> use_kernel(), use_kernel("torch"), use_kernel("auto")
    ('auto', 'torch', 'auto')
    """
    if kernel is not None:
        _wanted[:] = [choice("kernel", kernel, KERNELS)]
    if not _wanted:
        given = os.environ.get("NEARFAR_KERNEL", "auto")
        if given not in KERNELS:
            raise NearfarError(f"NEARFAR_KERNEL is {given!r}; it is one of {', '.join(KERNELS)}")
        _wanted[:] = [given]
    return _wanted[0]


def forget_measurements() -> None:
    """As if nothing had been measured."""
    _measured.clear()


def fused_blocks(setting: Setting, a: Tensor, b: Tensor, half: bool) -> Blocks | None:
    """The tiles of the fused kernel for a call; None where the call is one for PyTorch's operations."""
    wanted = use_kernel()
    if wanted == "torch" or (wanted == "auto" and not _measured):
        return None
    if a.device.type != "cuda" and not (wanted == "fused" and _interpreted()):
        return None
    if reason_against(setting, a, b) is not None:
        return None
    kind = _Kind.of(len(a), len(b), a.shape[1], half, setting, a.device)
    measured = _measured.get(kind)
    if measured is None and wanted == "measure":
        measured = _measured[kind] = _measure(len(a), len(b), a.shape[1], half, setting, a.device)
    if wanted == "fused":
        return _default_blocks() if measured is None or measured.blocks is None else measured.blocks
    return measured.blocks if measured is not None and measured.faster else None


def measure_kernels(
    device: str | torch.device = "cuda",
    rows: Sequence[int] = (1024, 4096, 16384),
    dimensions: Sequence[int] = (256,),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    both: Sequence[bool] = (True,),
    learned_scale: Sequence[bool] = (True, False),
) -> list[KernelTime]:
    """Measure both kernels on a card; from then on "auto" takes the faster one for batches of about these sizes.

    ``learned_scale``: the scale is a tensor on the card, as a model's is, or a number, with which PyTorch's operations
    need no running maximum. Returns a ``KernelTime`` for each combination; one that cannot be measured, such as for
    want of memory, says why. Raises ``NearfarError`` where there is no such card.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise NearfarError(f"device is {device}; kernels are measured on a CUDA card, and PyTorch sees none")
    times = []
    for n, d, dtype, directions, learned in itertools.product(rows, dimensions, dtypes, both, learned_scale):
        setting, half = _setting(n, n, device, directions, not learned), dtype == torch.bfloat16
        kind = _Kind.of(n, n, d, half, setting, device)
        _measured[kind] = _measure(n, n, d, half, setting, device)
        times.append(_measured[kind])
    return times


def _setting(n: int, m: int, device: torch.device, both: bool, bounded: bool) -> Setting:
    """What InfoNCE asks of the kernel."""
    size = tile_size(n, m, device)
    return Setting(
        OwnPair(n, m), None, offset=0, without_self=False, normalize=True, both=both, twin=False, inside=False,
        expected=False, bounded=bounded, size=size, keep=size == (n, m),
    )  # fmt: skip


def _interpreted() -> bool:
    if not has_triton():
        return False
    from nearfar.contrast.triton_kernels import INTERPRETED

    return bool(INTERPRETED)


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _default_blocks() -> Blocks:
    """Those that fit into every card."""
    from nearfar.contrast.triton_kernels import BLOCKS, INTERPRETED, Blocks

    return Blocks(32, 32, 32, 1, 1) if INTERPRETED else BLOCKS[-1]


def _measure(n: int, m: int, d: int, half: bool, like: Setting, device: torch.device) -> KernelTime:
    """Forward and backward of random rows with either kernel."""
    setting = _setting(n, m, device, like.both, like.bounded)
    known = (_card(device), n, d, "bfloat16" if half else "float32", like.both, not like.bounded)
    if not has_triton():
        return KernelTime(*known, math.nan, math.inf, None, "Triton is not installed (pip install triton)")
    from nearfar.contrast.triton_kernels import BLOCKS

    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(rows, d, generator=generator, device=device) for rows in (n, m))
    if half:
        a, b = a.bfloat16().float(), b.bfloat16().float()
    a, b = a.requires_grad_(), b.requires_grad_()
    scale = torch.tensor(14.0, device=device)

    def step(blocks: Blocks | None) -> None:
        a.grad = b.grad = None
        if blocks is None:
            statistics: list[Statistics] = []
            flat = LogSums.apply(a, b, scale, setting, statistics)
            pairs = [(flat[4 * i], flat[4 * i + 1]) for i in range(1 + setting.both)]
        else:
            pairs = [result[:2] for result in fused_results(a, b, scale, setting, half, blocks)]
        torch.stack([(rest - positive).sum() for rest, positive in pairs]).sum().backward()

    with torch.enable_grad():
        try:
            plain = _seconds(lambda: step(None), device)
        except torch.OutOfMemoryError:
            plain = math.inf
        best, chosen, reason = math.inf, None, ""
        for blocks in BLOCKS:
            try:
                seconds = _seconds(functools.partial(step, blocks), device)
            except Exception as error:  # a card may be too small for some tiles, or its compiler unable
                reason = f"{type(error).__name__}: {error}"[:200]
                continue
            if seconds < best:
                best, chosen = seconds, blocks
    return KernelTime(*known, plain, best, chosen, "" if chosen else reason)


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    step()  # compiles
    best = math.inf
    for _ in range(REPEATS):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        step()
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best
