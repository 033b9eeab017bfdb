"""The log-sums of ``kernel`` by a fused kernel on a card: the same numbers, and no logit is ever written to memory.

It is for one positive for each query, the partner of its row (InfoNCE, CLIP, what else is made of such sums), and for
none (further negatives); ``reason_against`` says which calls it is not for.

Which kernel is faster depends on the card, the sizes and the precision, so nothing is assumed: the fused kernel is
taken where a measurement on this card, in this process, has found it faster (``measure_kernels``), and before there is
one the path is that of PyTorch's operations. ``use_kernel("measure")``, or the environment variable
``NEARFAR_KERNEL=measure``, measures by itself, once for every new kind of batch (some seconds, most of them for
compiling); "fused" takes the fused kernel wherever it can be taken, "torch" nowhere.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from nearfar.arguments import choice
from nearfar.contrast.kernel import LogSums
from nearfar.contrast.masks import DenseMask, DuplicateMask, Mask, joined_parts
from nearfar.contrast.numerics import (
    Context,
    full_precision,
    no_second_derivative,
    through_length_,
    unit_and_length,
)
from nearfar.contrast.running_sums import Statistics
from nearfar.contrast.targets import NoPositives, OwnPair
from nearfar.contrast.tiles import Setting, tile_size
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from nearfar.contrast.triton_kernels import Blocks, Masks

__all__ = [
    "KERNELS",
    "FusedLogSums",
    "KernelTime",
    "forget_measurements",
    "fused_blocks",
    "fused_results",
    "has_triton",
    "measure_kernels",
    "reason_against",
    "use_kernel",
]


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, as it is with PyTorch's builds for CUDA."""
    return importlib.util.find_spec("triton") is not None


def reason_against(setting: Setting, a: Tensor, b: Tensor) -> str | None:
    """Why a call cannot be computed by the fused kernel; None where it can.

    >>> from nearfar.contrast.tiles import tile_size
    >>> setting = Setting(OwnPair(4), None, 0, False, True, True, False, False, False, False, (4, 4), True)
    >>> reason_against(setting, torch.ones(4, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64))
    'numbers are torch.float64, and the kernel computes in single precision'
    """
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        return f"numbers are {a.dtype}, and the kernel computes in single precision"
    if type(setting.target) not in (OwnPair, NoPositives):
        return f"{type(setting.target).__name__} has positives other than the own partner"
    if setting.expected:
        return "the mean logit under the softmax is wanted (SpatialLoss with its regulariser)"
    if setting.without_self:
        return "queries are their own keys, without themselves"
    if not len(a) or not len(b):
        return "there are no pairs"
    if setting.mask is not None and _labels_and_matrix(setting.mask) is None:
        return f"a {type(setting.mask).__name__} is neither a Boolean matrix nor pairs of equal numbers"
    if not has_triton():
        return "Triton is not installed (pip install triton)"
    return None


def _labels_and_matrix(mask: Mask) -> tuple[DuplicateMask | None, DenseMask | None] | None:
    """A mask as at most one of each; None where it is more."""
    labels: DuplicateMask | None = None
    matrix: DenseMask | None = None
    for part in joined_parts(mask):
        if type(part) is DuplicateMask and labels is None:
            labels = part
        elif type(part) is DenseMask and matrix is None:
            matrix = part
        else:
            return None
    return labels, matrix


def _masks(mask: Mask | None, rows: slice, device: torch.device) -> Masks:
    from nearfar.contrast.triton_kernels import Masks

    parts = None if mask is None else _labels_and_matrix(mask)
    if parts is None:
        return Masks()
    labels, matrix = parts
    numbers = None if labels is None else [each.to(device) for each in labels.numbers]
    return Masks(
        None if numbers is None else numbers[0][rows].contiguous(),
        None if numbers is None else numbers[1].contiguous(),
        None if matrix is None else matrix.matrix[rows].to(device),
    )


class _FusedContext(Context):
    setting: Setting
    masks: Masks
    blocks: Blocks
    shift: int | None
    half: bool


class FusedLogSums(torch.autograd.Function):
    """``rest`` and ``positive`` of the queries and, with ``both``, of the keys as queries, as ``kernel.LogSums``."""

    @staticmethod
    def forward(
        ctx: _FusedContext,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        setting: Setting,
        half: bool,
        blocks: Blocks,
        statistics: list[Statistics],
    ) -> tuple[Tensor, ...]:
        from nearfar.contrast.triton_kernels import forward_sums

        lengths: list[Tensor] = []
        half = half and setting.normalize
        with _computing_on(a):
            first, second = a.contiguous(), b.contiguous()
            by_a, by_b = (x.new_ones(len(x)) for x in (a, b))
            if setting.normalize:
                unit, length_a = unit_and_length(first)
                other, length_b = unit_and_length(second)
                lengths = [length_a, length_b]
                if half:
                    (first, by_a), (second, by_b) = (
                        _halves(x, length) for x, length in ((first, length_a), (second, length_b))
                    )
                else:
                    first, second = unit, other
            shift = None if isinstance(setting.target, NoPositives) else setting.offset
            masks = _masks(setting.mask, slice(setting.offset, setting.offset + len(a)), a.device)
            flat: list[Tensor] = []
            scaled = by_a * scale  # a scale on the CPU is a number here
            sides = [(first, second, scaled, by_b, shift, masks)]
            if setting.both:
                back = None if shift is None else -shift
                sides.append((second, first, by_b, scaled, back, masks.transposed()))
            for queries, keys, by_query, by_key, own, left_out in sides:
                rest, hardest, positive, count = forward_sums(
                    queries, keys, by_query, by_key, own, left_out, blocks
                )
                statistics.append(_statistics(len(keys), hardest, positive, count))
                flat += [rest, torch.full_like(rest, -torch.inf) if positive is None else positive]
        # Of rows in half precision the products are taken; what they are divided by is of the rows as they came.
        kept = (a, b) if half else (first, second)
        ctx.save_for_backward(*kept, first, second, by_a, by_b, scale, *flat, *lengths)
        ctx.setting, ctx.masks, ctx.blocks, ctx.shift, ctx.half = setting, masks, blocks, shift, half
        ctx.set_materialize_grads(False)
        return tuple(flat)

    @staticmethod
    def backward(ctx: _FusedContext, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        from nearfar.contrast.triton_kernels import backward_rows

        no_second_derivative()
        a, b, first, second, by_a, by_b, scale, *flat = ctx.saved_tensors
        setting, shift = ctx.setting, ctx.shift
        lengths = [flat.pop() for _ in range(2 * setting.normalize)][::-1]
        sides = []
        for i in range(1 + setting.both):
            rest, grads = flat[2 * i], upstream[2 * i : 2 * i + 2]
            by_rest, by_positive = (torch.zeros_like(rest) if g is None else g.contiguous() for g in grads)
            sides.append((torch.where(rest > -torch.inf, rest, torch.inf), by_rest, by_positive))
        ours, theirs = sides[0], sides[1] if setting.both else None
        wanted = ctx.needs_input_grad[2]
        along: Tensor | None = None
        with _computing_on(a):
            slopes_a = backward_rows(
                first, second, by_a * scale, by_b, shift, ctx.masks, ctx.blocks, ours, theirs
            )
            if theirs is None:  # the keys ask nothing themselves
                nothing = by_b.new_zeros(len(second))
                theirs = (torch.full_like(nothing, torch.inf), nothing, nothing)
            back, turned = None if shift is None else -shift, ctx.masks.transposed()
            slopes_b = backward_rows(
                second, first, by_b * scale, by_a, back, turned, ctx.blocks, theirs, ours
            )
            if lengths:
                along = through_length_(slopes_a, a, lengths[0], scale, are_unit=not ctx.half)
                through_length_(slopes_b, b, lengths[1], scale, are_unit=not ctx.half)
            else:
                along = torch.dot(a.flatten(), slopes_a.flatten()) if wanted else None
                slopes_a.mul_(scale)
                slopes_b.mul_(scale)
        by_scale = along.to(scale.device).reshape(scale.shape) if wanted and along is not None else None
        return slopes_a, slopes_b, by_scale, None, None, None, None


@contextmanager
def _computing_on(rows: Tensor) -> Iterator[None]:
    """Programs start on the card of the rows, and products beside them are in full precision."""
    with torch.cuda.device(rows.device) if rows.is_cuda else nullcontext(), full_precision(rows.device):
        yield


def _halves(x: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that came in bfloat16 as such again, each divided by a power of two near its largest number, and what
    brings each to unit length: no product of them overflows, and none of their digits is lost."""
    exponent = torch.frexp(x.abs().amax(1, keepdim=True)).exponent.clamp(-100, 100)
    narrow = torch.ldexp(x, -exponent).to(torch.bfloat16)
    return narrow, torch.ldexp(1.0 / length, exponent).squeeze(1)


def _statistics(keys: int, hardest: Tensor, positive: Tensor | None, count: Tensor | None) -> Statistics:
    own = 0.0 if positive is None else 1.0
    candidates: Tensor | float = float(keys) if count is None else count + own
    return Statistics(hardest, candidates, own, own, 0.0, float(keys) - candidates)


def fused_results(
    a: Tensor, b: Tensor, scale: Tensor, setting: Setting, half: bool, blocks: Blocks
) -> list[tuple[Tensor, Tensor, None, None, Statistics]]:
    """``rest``, ``positive``, no excess and no mean logit, and the statistics of each direction."""
    statistics: list[Statistics] = []
    flat: tuple[Tensor, ...] = FusedLogSums.apply(a, b, scale, setting, half, blocks, statistics)
    return [(flat[2 * i], flat[2 * i + 1], None, None, each) for i, each in enumerate(statistics)]


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
